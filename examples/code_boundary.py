"""Where does code lie between memory and reasoning? Python's function signatures on a LiReF.

    python examples/code_boundary.py [--model NAME] [--limit N]

Takes two minutes on two cores, half a minute with `--limit 60`. On this scale, -0.5 is the mean of
the memory questions, 0.5 the mean of the reasoning questions, and 0 the middle between them.
"""

import argparse
import inspect
from importlib import import_module

import numpy as np

import lirefs
from lirefs.statistics import interval, resample_counts

MODULES = ("bisect", "calendar", "colorsys", "difflib", "fnmatch", "heapq", "shutil", "statistics")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--limit", type=int, help="use only this many questions and functions")
options = parser.parse_args()

lm = lirefs.load(options.model)
split = lirefs.Questions(lirefs.load_questions()[: options.limit]).split(seed=0)
best = lirefs.fit(lm, split, shuffles=10).best
code = [
    f"def {name}{inspect.signature(function)}:\n    {inspect.getdoc(function).splitlines()[0]}"
    for module in map(import_module, MODULES)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and function.__doc__ and not name.startswith("_")
]
asked = {
    "memory questions": [one.prompt for one in split.test if one.label == "memory"],
    "reasoning questions": [one.prompt for one in split.test if one.label == "reasoning"],
    "code": [f"Q: Complete this function.\n{head}\nA:" for head in code[: options.limit]],
}
memory, reasoning = best.means
for name, prompts in asked.items():
    states = lirefs.capture(lm, prompts, layers=[best.layer], progress=False).values
    places = best.project(states[:, 0, 0]).double().numpy() - (memory + reasoning) / 2
    places = places / (reasoning - memory)
    draws = resample_counts(len(places), 2000, seed=0) @ places / len(places)
    low, high = interval(draws, len(places))
    print(
        f"{name}: {places.mean():+.2f} [{low:+.2f}, {high:+.2f}], {np.mean(places > 0):.0%} on the "
        f"side of reasoning, n = {len(places)}"
    )
