"""Where does code lie between memory and reasoning? Heads of Python's own functions on a LiReF.

python examples/code_boundary.py [MODEL [LIMIT]]
"""

import inspect
import sys
from importlib import import_module

import numpy as np

import lirefs
from lirefs.statistics import interval, resample_counts

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
LIMIT = int(sys.argv[2]) if len(sys.argv) > 2 else None
MODULES = ("bisect", "calendar", "colorsys", "difflib", "fnmatch", "heapq", "shutil", "statistics")

lm = lirefs.load(MODEL)
split = lirefs.load_questions().split(seed=0)
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
    "code": [f"Q: Complete this function.\n{head}\nA:" for head in code],
}
memory, reasoning = best.means
for name, prompts in asked.items():
    states = lirefs.capture(lm, prompts[:LIMIT], layers=[best.layer], progress=False).values
    # 0 lies in the middle of the class means, -0.5 and 0.5 at the means.
    places = best.project(states[:, 0, 0]).double().numpy() - (memory + reasoning) / 2
    places = places / (reasoning - memory)
    draws = resample_counts(len(places), 2000, seed=0) @ places / len(places)
    low, high = interval(draws, len(places))
    share = np.mean(places > 0)
    print(
        f"{name}: {places.mean():+.2f} [{low:+.2f}, {high:+.2f}], {share:.0%} on the side of "
        f"reasoning, n = {len(places)}"
    )
