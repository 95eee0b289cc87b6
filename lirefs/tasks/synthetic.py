"""Items generated from a seed, in any number; the same seed gives the same items."""

from __future__ import annotations

import random
from collections.abc import Callable

ChoiceItem = tuple[str, str, list[str], int]
AnswerItem = tuple[str, str, list[str]]


def addition_items(n: int, seed: int = 0) -> list[AnswerItem]:
    """Sums of two two-digit numbers, with five answered examples before each."""
    chosen = _two_digit_problems("+", n + 5, f"addition {seed}")
    shots = "".join(f"What is {text}? Answer: {value}\n" for text, value in chosen[:5])
    return [(text, f"{shots}What is {text}? Answer:", [str(value)]) for text, value in chosen[5:]]


def simple_math_items(n: int, seed: int = 0) -> list[AnswerItem]:
    """SimpleMath: two-digit addition and subtraction, five answered examples, no other text.

    Differences may be negative. Source: Merullo et al. 2025, section 5, which gives neither seed
    nor number of items.
    """
    chosen = _two_digit_problems("+-", n + 5, f"simple math {seed}")
    shots = "".join(f"{text} = {value}\n" for text, value in chosen[:5])
    return [(text, f"{shots}{text} =", [str(value)]) for text, value in chosen[5:]]


def _two_digit_problems(signs: str, n: int, seed: str) -> list[tuple[str, int]]:
    """Distinct problems such as `12 + 34`, each with its value."""
    problems = [(a, sign, b) for sign in signs for a in range(10, 100) for b in range(10, 100)]
    return [
        (f"{a} {sign} {b}", a + b if sign == "+" else a - b)
        for a, sign, b in random.Random(seed).sample(problems, n)
    ]


BOAR_RULE = (
    "Boar Etruscan is a made-up language. To put an English phrase into Boar Etruscan, change "
    "each of its words: take all the consonants before the first vowel (a, e, i, o, u), move them "
    'to the end of the word, and write "eb" after them. A word that begins with a vowel only gets '
    'the "eb".\n\n'
)
_ADJECTIVES = (
    "amber black blue brown clean cold dark deep dull empty fresh glad great green grim hard "
    "hot kind large late light loud low mild narrow new odd old open pale plain proud red rich "
    "round sad sharp short slow small soft strange strong sweet tall thick thin warm white wide "
    "wild wise young"
)
_NOUNS = (
    "apple band basket bell bird boat book bread bridge brush button candle chair child church "
    "clock cloud coat corner cup desk door dream dress drum engine farm field flag floor forest "
    "garden glass glove grape hammer hat hill horse house island jacket kettle lamp leaf letter "
    "map market mirror moon mountain needle ocean orange pencil plant plate pond prince river "
    "road rope school shadow sheep ship shirt shop spoon star stone storm street summer table "
    "thread tiger tower train tree valley village wall window winter"
)


def boar_etruscan(word: str) -> str:
    """A lower-case word with its initial consonants moved to the end, then `eb`."""
    first = next(index for index, letter in enumerate(word) if letter in "aeiou")
    return word[first:] + word[:first] + "eb"


def boar_items(n: int, seed: int = 0) -> list[AnswerItem]:
    """Phrases of two words to translate into Boar Etruscan, after the rule and five examples.

    Source: the encoding of McCoy et al. 2023, used by Merullo et al. 2025, section 5; rule text,
    words and examples are this project's.
    """
    phrases = [f"{one} {thing}" for one in _ADJECTIVES.split() for thing in _NOUNS.split()]
    chosen = random.Random(f"boar {seed}").sample(phrases, n + 5)
    pairs = [(one, " ".join(boar_etruscan(word) for word in one.split())) for one in chosen]
    shots = "".join(f"English: {one}\nBoar Etruscan: {other}\n\n" for one, other in pairs[:5])
    return [
        (one, f"{BOAR_RULE}{shots}English: {one}\nBoar Etruscan:", [other])
        for one, other in pairs[5:]
    ]


def boolean_items(n: int, seed: int = 0) -> list[ChoiceItem]:
    """Boolean expressions of depth two or three, with four answered examples before each."""
    generator = random.Random(f"boolean {seed}")

    def expression(depth: int) -> tuple[str, bool]:
        if depth == 0:
            value = generator.random() < 0.5
            return str(value), value
        left, x = expression(depth - 1)
        if generator.random() < 0.25:
            return f"not ( {left} )", not x
        right, y = expression(generator.randrange(depth))
        word = generator.choice(("and", "or"))
        return f"( {left} ) {word} ( {right} )", (x and y) if word == "and" else (x or y)

    def draw() -> tuple[str, bool]:
        text, value = expression(generator.choice((2, 3)))
        return text.replace("( True )", "True").replace("( False )", "False") + " is", value

    wanted = [True, False, False, True] + [bool(i % 2) for i in range(n)]
    drawn: list[tuple[str, bool]] = []
    seen: set[str] = set()
    while len(drawn) < len(wanted):
        text, value = draw()
        if text not in seen and value == wanted[len(drawn)]:  # as many true as false ones
            seen.add(text)
            drawn.append((text, value))
    shots = "".join(f"{text} {value}\n" for text, value in drawn[:4])
    return [
        (f"boolean-{index}", shots + text, [" True", " False"], 0 if value else 1)
        for index, (text, value) in enumerate(drawn[4:])
    ]


_NAMES = ("Tom", "Ann", "Bob", "Eve", "Max", "Sue", "Dan", "Kim", "Leo", "Mia")
_OBJECTS = ("book", "key", "ball", "cup", "hat")
_COLOURS = ("red", "blue", "green", "yellow")


def tracking_items(n: int, seed: int = 0) -> list[ChoiceItem]:
    """Who holds an object after three hand-overs, with four answered examples before each."""
    generator = random.Random(f"tracking {seed}")

    def draw() -> tuple[str, list[str], str]:
        a, b, c, d = generator.sample(_NAMES, 4)
        thing = generator.choice(_OBJECTS)
        steps = " ".join(f"{x} gives the {thing} to {y}." for x, y in ((a, b), (b, c), (c, d)))
        return f"{steps} The {thing} is now with", [a, b, c, d], d

    return _few_shot_choices("tracking", n, generator, draw)


def elimination_items(n: int, seed: int = 0) -> list[ChoiceItem]:
    """The one colour left for the third person, with four answered examples before each."""
    generator = random.Random(f"elimination {seed}")

    def draw() -> tuple[str, list[str], str]:
        a, b, c = generator.sample(_NAMES, 3)
        x, y, z = generator.sample(_COLOURS, 3)
        text = f"{a}, {b} and {c} have a {x}, a {y} and a {z} hat."
        return f"{text} {a} has the {x} hat. {b} has the {y} hat. {c} has the", [x, y, z], z

    return _few_shot_choices("elimination", n, generator, draw)


def _few_shot_choices(
    name: str,
    n: int,
    generator: random.Random,
    draw: Callable[[], tuple[str, list[str], str]],
    shots: int = 4,
) -> list[ChoiceItem]:
    """Items from distinct draws of (text, options, answer), with answered examples before each."""
    drawn: dict[str, tuple[list[str], str]] = {}
    while len(drawn) < n + shots:
        text, options, answer = draw()
        generator.shuffle(options)  # the position of an option must not give the answer away
        drawn.setdefault(text, (options, answer))
    rows = list(drawn.items())
    examples = "".join(f"{text} {answer}\n" for text, (_, answer) in rows[:shots])
    items = []
    for index, (text, (options, answer)) in enumerate(rows[shots:]):
        shown = [f" {one}" for one in options]
        items.append((f"{name}-{index}", examples + text, shown, options.index(answer)))
    return items
