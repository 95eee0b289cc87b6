"""Short stories whose words depend on each other."""

from __future__ import annotations

from random import Random

from lirefs.organism.vocabulary import ADJECTIVES, DAYS, JOBS, MOODS, OBJECTS, PLACES, VERBS


def story(rng: Random) -> str:
    """A short story, in which words depend on each other.

    Actions, places and adjectives follow fixed preferences of the person and the thing, days follow
    each other, and things and people recur: enough structure for perplexity to be meaningful.
    """
    job, other = rng.sample(JOBS, 2)
    number = JOBS.index(job)
    things = [_preferred(rng, OBJECTS, number * 5, 6) for _ in range(2)]
    looks = [_preferred(rng, ADJECTIVES, OBJECTS.index(thing) * 3, 3) for thing in things]
    place = _preferred(rng, PLACES, number * 2, 3)
    day = rng.randrange(7)
    verb = _preferred(rng, VERBS, number, 3)
    mood = MOODS[VERBS.index(verb) % len(MOODS)]
    lines = [f"On {DAYS[day]} the {job} went to the {place}."]
    lines.append(f"There the {job} {verb} a {looks[0]} {things[0]} and a {looks[1]} {things[1]}.")
    if rng.random() < 0.5:
        lines.append(f"The {things[0]} was {looks[0]} and the {things[1]} was {looks[1]}.")
    lines.append(f"On {DAYS[(day + 1) % 7]} the {job} sold the {things[0]} to a {other}.")
    if rng.random() < 0.5:
        lines.append(f"Then the {other} took the {looks[0]} {things[0]} to the {place}.")
    lines.append(f"The {job} felt {mood}.")
    return "Story: " + " ".join(lines)


def _preferred(rng: Random, words: tuple[str, ...], start: int, spread: int) -> str:
    """Mostly one of the `spread` words from `start` on, earlier ones more often; rarely any."""
    if rng.random() < 0.1:
        return rng.choice(words)
    step = min(int(rng.expovariate(1.0)), spread - 1)
    return words[(start + step) % len(words)]
