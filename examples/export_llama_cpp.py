"""Write a direction as a control vector for llama.cpp, and read it back.

    python examples/export_llama_cpp.py [--model NAME] [--limit N] [--out FILE]

Takes a minute on two cores, a quarter of a minute with `--limit 60`.
"""

import argparse

import lirefs
from lirefs.export import from_gguf, to_gguf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--limit", type=int, help="use only this many questions")
parser.add_argument("--out", default="direction.gguf", help="file to write")
options = parser.parse_args()

lm = lirefs.load(options.model)
split = lirefs.Questions(lirefs.load_questions()[: options.limit]).split(seed=0)
layers = list(range(2, lm.n_layers))  # llama.cpp cannot reach the input of the first two blocks
probe = lirefs.fit(lm, split, layers=layers, shuffles=10)
to_gguf(lirefs.Steer(probe.best, "add", 1.0), options.out, lm)

for (layer, site), direction in from_gguf(options.out).items():
    print(f"layer {layer}, {site}: norm {direction.norm:.2f}")
print(f"wrote {options.out}; use it with the same model as GGUF:")
print(f'llama-cli -m MODEL.gguf --control-vector-scaled {options.out}:1.0 -p "..."')
