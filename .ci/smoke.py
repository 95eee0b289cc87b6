"""A short walk through both packages with whatever versions are installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import kfac
import lirefs

COMMANDS = ("", "compare", "probe", "steer", "export", "mine", "report", "curvature", "organism")
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "pandas", "typer")


def main() -> None:
    """Import, help pages, load, fit, steer, collect, edit, compare, report."""
    print(", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    lirefs_command = str(Path(sys.executable).with_name("lirefs"))
    for command in COMMANDS:
        words = [lirefs_command, *command.split(), "--help"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    lm = lirefs.load("organism")
    prompt = lirefs.load_questions("organism")[0].prompt
    unchanged = lm.generate(prompt, max_new_tokens=2)
    probe = lirefs.fit(lm, lirefs.load_questions("organism").split(), shuffles=5, progress=False)
    steer = lirefs.Steer(probe.best, "add", 4.0)
    with steer.apply(lm.model):
        lm.generate(prompt, max_new_tokens=2)
    texts = lirefs.organism.training_texts(lirefs.organism.Language(), 20)
    factors = kfac.collect(lm, texts, layers=[0], progress=False)
    edit = kfac.CurvatureEdit(factors, keep=0.9)
    weight = kfac.find_targets(lm.model, layers=[0])[0].weight.clone()
    with edit.apply(lm.model):
        assert not torch.equal(kfac.find_targets(lm.model, layers=[0])[0].weight, weight)
    assert torch.equal(kfac.find_targets(lm.model, layers=[0])[0].weight, weight)
    assert lm.generate(prompt, max_new_tokens=2) == unchanged

    tasks = lirefs.organism.organism_tasks(lm, lirefs.organism.Language(), "test", limit=4)[:4]
    comparison = lirefs.compare(lm, {"LiReF": steer, "K-FAC": edit}, tasks, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        page = lirefs.write_report(comparison, Path(folder))
        assert page.stat().st_size > 10_000
        assert lirefs.load_comparison(folder).variants == comparison.variants
        factors.save(Path(folder) / "factors.safetensors")
        kfac.Factors.load(Path(folder) / "factors.safetensors", model=lm.model)
    print("the smoke test passes")


if __name__ == "__main__":
    main()
