"""`python -m experiments.arithmetic REPORT`: what happened to calculations in worked answers."""

from __future__ import annotations

import argparse
from pathlib import Path

import lirefs
from experiments.arithmetic.traces import arithmetic_lines


def main() -> None:
    """Count what happened to the calculations of worked answers that a variant made wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("report", type=Path, help="results.json or its folder")
    parser.add_argument("--variants", nargs="+", help="default: all except the unchanged model")
    options = parser.parse_args()
    comparison = lirefs.load_comparison(options.report)
    lines = arithmetic_lines(comparison, options.variants or comparison.variants[1:])
    print(
        "\n".join(lines)
        or "no variant makes a worked answer wrong that the unchanged model gets right"
    )


if __name__ == "__main__":
    main()
