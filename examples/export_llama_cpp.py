"""Write a direction as a control vector for llama.cpp, and read it back.

python examples/export_llama_cpp.py [MODEL] [FILE]
llama-cli -m model.gguf --control-vector-scaled FILE:1.0 -p "..."
"""

import sys

import lirefs
from lirefs.gguf import from_gguf, to_gguf

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
file = sys.argv[2] if len(sys.argv) > 2 else "direction.gguf"

lm = lirefs.load(model)
layers = list(range(2, lm.n_layers))  # llama.cpp cannot reach the input of the first two blocks
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0), layers=layers, shuffles=10)
to_gguf(probe.best.steer("add", 1.0), file, lm)
print(from_gguf(file).provenance, "block", [layer for layer, _ in from_gguf(file)])
