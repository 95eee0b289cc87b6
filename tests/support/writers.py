"""Every kind of file that the packages write, in two versions, and what is in a folder."""

from __future__ import annotations

import json

import torch
from checkpoint_runs import BATCHES, targets
from curvature_tools import llama
from journal_runs import tasks
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
from lirefs import Direction, Directions, compare
from lirefs.comparison import write_report
from lirefs.export import to_gguf
from lirefs.files import atomic_write_text
from lirefs.organism.training.checkpoint import save_checkpoint


def contents(folder):
    """Everything in a folder, temporary files too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): _read(path) for path in files}


def _read(path):
    """A file's bytes; of safetensors the header is parsed, because its keys are in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def direction(seed):
    return Direction(torch.randn(32, generator=torch.Generator().manual_seed(seed)), 2)


def two_versions(lm):
    """Factors and a comparison of each version, which take seconds to compute."""
    found = []
    for seed in (0, 1):
        model = llama(torch.float32)
        factors = kfac.collect(model, BATCHES, targets(model), seed=seed, progress=False)
        variants = {"steered": lirefs.Steer(direction(seed), "add", 9.0)}
        comparison = compare(lm, variants, tasks(), progress=False, resamples=20)
        found.append((factors, comparison))
    return found


def write_organism(folder, seed):
    folder.mkdir(parents=True, exist_ok=True)
    model = fresh_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight += seed
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    save_checkpoint(folder, model, tiny_tokenizer(), [optimizer], seed, 0, {})


# Each takes the lm, what `two_versions` made, a folder, and which of the versions to write.
WRITERS = {
    "directions": lambda lm, made, folder, seed: Directions(
        {(2, "resid_pre"): direction(seed)}
    ).save(folder / "d.safetensors"),
    "factors": lambda lm, made, folder, seed: made[seed][0].save(folder / "f.safetensors"),
    "report": lambda lm, made, folder, seed: write_report(made[seed][1], folder, ()),
    "control vector": lambda lm, made, folder, seed: to_gguf(
        direction(seed), folder / "c.gguf", lm
    ),
    "organism": lambda lm, made, folder, seed: write_organism(folder, seed),
    "text": lambda lm, made, folder, seed: atomic_write_text(folder / "t", f"{seed}" * 999),
}
