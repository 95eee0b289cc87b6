"""What a bfloat16 output layer saves in a collection, and how wrong it makes the factors.

    python benchmarks/head.py --model smollm2-135m --layers 20,21,22

The same texts, with the products of the output layer in float32 and in bfloat16. Labels are those
of the data: rounding changes some sampled labels, and that is the noise of a draw, not an error.
"""

from __future__ import annotations

import argparse

import torch
from measuring import measure, ratios, versions, with_range

import kfac
import lirefs
from lirefs.tasks.default_suite import calibration_texts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="20,21,22")
    parser.add_argument("--texts", type=int, default=10, help="texts of about 200 tokens")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lm = lirefs.load(options.model, dtype=torch.float32)
    layers = [int(layer) for layer in options.layers.split(",")]
    texts = calibration_texts()[: options.texts]
    found: dict[str, kfac.Factors] = {}

    def collect(name: str, dtype: torch.dtype | None) -> None:
        found[name] = kfac.collect(
            lm, texts, layers=layers, labels="data", head_dtype=dtype, progress=False
        )

    times = measure(
        {
            "float32": lambda: collect("float32", None),
            "bfloat16": lambda: collect("bfloat16", torch.bfloat16),
        },
        options.rounds,
    )
    ours, whole = found["bfloat16"], found["float32"]
    weights = [
        {
            target.name: weight
            for target, weight in kfac.CurvatureEdit(one, options.keep).prepare(lm.model)
        }
        for one in (ours, whole)
    ]
    faster = with_range(ratios(times, "float32", "bfloat16"))
    print(f"bfloat16 head: {faster} times as fast ({versions('torch', 'transformers')})")
    for what, pairs in {
        "G": [(ours.G(name), whole.G(name)) for name in whole.names],
        "W'": [(weights[0][name], weights[1][name]) for name in whole.names],
    }.items():
        errors = [float((one - other).norm() / other.norm()) for one, other in pairs]
        print(f"{what} differs by {min(errors):.4f} to {max(errors):.4f} of its norm")


if __name__ == "__main__":
    main()
