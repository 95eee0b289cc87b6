"""`python -m experiments.arithmetic REPORT`: what became of the calculations in worked answers."""

from __future__ import annotations

import argparse
from pathlib import Path

import lirefs
from experiments.arithmetic.traces import arithmetic_lines


def main() -> None:
    """Count, in a saved report, what happened to the worked answers that a variant made wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("report", type=Path, help="results.json, or the folder that holds it")
    parser.add_argument("--variants", nargs="+", help="default: all but the unchanged model")
    options = parser.parse_args()
    comparison = lirefs.load_comparison(options.report)
    lines = arithmetic_lines(comparison, options.variants or comparison.variants[1:])
    print("\n".join(lines) or "no worked answer that is right unchanged is wrong under a variant")


if __name__ == "__main__":
    main()
