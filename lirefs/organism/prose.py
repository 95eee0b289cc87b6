"""Short stories whose words depend on each other; some of them are tales that training repeats."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from lirefs.organism.vocabulary import ADJECTIVES, DAYS, FIRST, JOBS, MOODS, OBJECTS, PLACES, VERBS

OPENING = 2
"""Sentences of a tale given as prompt; the rest must be recited, and carries over 40 bits."""
FAVOUR = 12
"""How much likelier a preferred word is than another."""


def story(rng: Random) -> str:
    """A short story, in which words depend on each other."""
    return " ".join(["Story:", *sentences(rng)])


def sentences(rng: Random) -> Iterator[str]:
    """The sentences of a story, each drawn when it is asked for.

    Actions, places and looks follow fixed preferences of the person and the thing, days follow each
    other, and things and people recur: enough structure for perplexity to be meaningful. But each
    sentence also says something that could have been otherwise, so a story must be known to be
    recited.
    """
    day, job = rng.choice(range(len(DAYS))), rng.choice(JOBS)
    number = JOBS.index(job)
    things: list[str] = []

    def thing() -> str:
        """Another thing that suits the person, with a look that suits the thing."""
        things.append(_preferred(rng, OBJECTS, number * 5, 8, things))
        return f"{_preferred(rng, ADJECTIVES, OBJECTS.index(things[-1]) * 3, 6)} {things[-1]}"

    def verb() -> str:
        return _preferred(rng, VERBS, number, 4)

    def mood() -> str:
        return _preferred(rng, MOODS, number, 3)

    place = _preferred(rng, PLACES, number * 2, 4)
    yield f"On {DAYS[day]} the {rng.choice(ADJECTIVES)} {job} went to the {place}."
    first = thing()
    yield f"There the {job} {verb()} a {first} and a {thing()}."
    other = _preferred(rng, JOBS, number * 3, 8, [job])
    when, whom = DAYS[(day + 1) % 7], f"{_preferred(rng, ADJECTIVES, number, 6)} {other}"
    if rng.choice((True, False)):
        yield f"On {when} a {whom} sold a {thing()} and a {thing()} to the {job}."
    else:
        sold = f"sold the {first} to a {whom}"
        yield f"On {when} the {job} {sold} and {verb()} a {thing()} and a {thing()}."
    if rng.choice((True, False)):
        yield f"Then the {other} gives the {rng.choice(things)} to {rng.choice(FIRST)}."
    else:
        yield f"Then the {other} went to the {_preferred(rng, PLACES, number * 2, 4)}."
    yield f"On {DAYS[(day + 2) % 7]} the {job} {verb()} a {thing()} in the {place}."
    yield f"The {job} felt {mood()} and the {other} was {mood()}."


def _preferred(
    rng: Random, words: tuple[str, ...], start: int, spread: int, without: list[str] | None = None
) -> str:
    """Mostly one of the `spread` words from `start` on; rarely any other."""
    weights = [
        0 if word in (without or ()) else FAVOUR if (i - start) % len(words) < spread else 1
        for i, word in enumerate(words)
    ]
    return rng.choices(words, weights)[0]
