"""Every kind of file that the packages read: a small valid one, and what a user does with it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import gguf
import numpy as np
import torch
from fuzzing import Format, Insane
from PIL import Image
from skill_rows import rows_of
from tiny import fresh_model, tiny_model, tiny_tokenizer
from torch import nn

import kfac
import lirefs
from lirefs.builtin import language_seed
from lirefs.commands.mine import read_texts
from lirefs.errors import NoDataError
from lirefs.gguf import from_gguf, to_gguf
from lirefs.harness import exports, page, report, storage
from lirefs.harness.comparison import Comparison, TaskInfo
from lirefs.harness.skill_table import SKILLS
from lirefs.harness.skills import skill_tasks
from lirefs.harness.tasks import ItemResult, MultipleChoice
from lirefs.organism import train as organism_train
from lirefs.organism.checkpoint import STATE, load_checkpoint, save_checkpoint
from lirefs.organism.vocabulary import build_tokenizer
from lirefs.probe import load_grades
from lirefs.studies.vision import training
from lirefs.studies.vision.data import Images, _picture, load_images, noisy_split


def check(holds: object, what: str) -> None:
    """Raise `Insane` unless something holds."""
    if not holds:
        raise Insane(what)


def written(folder: Path, name: str, content: bytes) -> Path:
    """The path of a file with this content."""
    path = folder / name
    path.write_bytes(content)
    return path


def contents(folder: Path, pattern: str = "*") -> list[bytes]:
    """What the files of a folder hold."""
    return [path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()]


def now_and_then(content: bytes) -> bool:
    """Whether a case shall do what takes longest: one in ten does."""
    return zlib.crc32(content) % 10 == 0


def text(value: Any) -> bool:
    """Whether a value is a text that can be written."""
    return isinstance(value, str) and value.encode() is not None


def whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer of at least so much."""
    return type(value) is int and value >= least


def finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


@functools.cache
def tiny_lm() -> lirefs.LanguageModel:
    """A model that no case changes."""
    return lirefs.wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")


# Directions and control vectors


def make_directions(folder: Path) -> list[bytes]:
    some = {}
    for layer, site in ((0, "resid_pre"), (2, "resid_pre"), (2, "mlp_out")):
        vector = torch.randn(8, generator=torch.Generator().manual_seed(layer))
        some[layer, site] = lirefs.Direction(vector, layer, site, (-1.0, 1.5), (0.5, 0.25), (3, 4))
    made = {"model": "0" * 64, "model_name": "tiny", "seed": 0, "sides": {"train": [1, 2.5, None]}}
    lirefs.Directions(some, made).save(folder / "two")
    lirefs.Directions({(0, "resid_pre"): some[0, "resid_pre"]}).save(folder / "one")
    return contents(folder)


def same_directions(one: lirefs.Directions, other: lirefs.Directions) -> bool:
    return (
        one.provenance == other.provenance
        and list(one) == list(other)
        and all(
            (torch.equal(a.vector, b.vector) and replace(a, vector=0) == replace(b, vector=0))
            or dataclasses.astuple(a)[1:] == dataclasses.astuple(b)[1:]
            for a, b in zip(one.values(), other.values())
        )
    )  # fmt: skip


def read_directions(folder: Path, content: bytes) -> None:
    found = lirefs.Directions.load(written(folder, "d.safetensors", content))
    for (layer, site), one in found.items():
        check(whole(layer) and isinstance(site, str), f"place {layer!r}, {site!r}")
        check(one.vector.dtype == torch.float32 and one.vector.ndim == 1, "vector")
        check(len(one.vector) and bool(one.vector.isfinite().all()), "values")
        for pair in (one.means, one.spread):
            check(type(pair) is tuple and len(pair) == 2 and all(map(finite, pair)), f"{pair!r}")
        check(len(one.counts) == 2 and all(map(whole, one.counts)), f"{one.counts!r}")
    check(len(found) and isinstance(found.provenance, dict), "provenance")
    check(len({len(one.vector) for one in found.values()}) == 1, "widths")
    found.save(folder / "again")
    check(same_directions(found, lirefs.Directions.load(folder / "again")), "differs when saved")
    found.steer("add", 2.0).describe()
    with contextlib.suppress(lirefs.errors.ProvenanceError):
        lirefs.Directions.load(folder / "again", tiny_lm())


def make_control_vector(folder: Path) -> list[bytes]:
    lm = tiny_lm()
    for name, layers in (("one", [2]), ("two", [1, 3])):
        vectors = {
            (layer, "resid_post"): lirefs.Direction(torch.ones(lm.width), layer, "resid_post")
            for layer in layers
        }
        to_gguf(lirefs.Directions(vectors), folder / name, lm)
    return contents(folder)


def read_control_vector(folder: Path, content: bytes) -> None:
    found = from_gguf(written(folder, "c.gguf", content))
    for (layer, site), one in found.items():
        check(whole(layer) and site == "resid_post", f"{layer!r}, {site!r}")
        check(one.vector.dtype == torch.float32 and one.vector.ndim == 1, "vector")
        check(len(one.vector) and bool(one.vector.isfinite().all()), "values")
    found.save(folder / "again")
    check(same_directions(found, lirefs.Directions.load(folder / "again")), "differs when saved")


# Factors and collections


class Net(nn.Module):
    """Two targets of one input, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.a(x)) * self.b(x))


@functools.cache
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


@functools.cache
def net_batches() -> list[torch.Tensor]:
    return list(torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1)))


def forward(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model(batch), torch.ones(len(batch), dtype=torch.bool)


def collected(batches: list[torch.Tensor] | None = None, **settings: Any) -> kfac.Factors:
    targets = kfac.named_targets(net(), ["a", "b", "c"])
    batches = net_batches() if batches is None else batches
    return kfac.collect(
        net(), batches, targets, forward=forward, marginals=True, progress=False, **settings
    )


def make_factors(folder: Path) -> list[bytes]:
    plain = collected(diagonal=True, provenance={"data": ["a", 1.5, None], "hash": "0" * 8})
    plain.save(folder / "plain")
    corrected = kfac.correct(net(), net_batches(), plain, forward=forward, progress=False)
    corrected.save(folder / "corrected")
    return contents(folder)


def read_factors(folder: Path, content: bytes) -> None:
    found = kfac.Factors.load(written(folder, "f.safetensors", content))
    check(whole(found.tokens) and all(type(seed) is int for seed in found.seeds), "counts")
    check(found.labels in ("sampled", "data", "mixed") and found.names, "labels")
    check(type(found.weighted) is bool and isinstance(found.provenance, dict), "provenance")
    for name, record in found.records.items():
        check(text(name) and whole(record.count) and text(record.digest), f"{record!r}")
        for matrix in (found.A(name), found.G(name)):
            check(bool(matrix.isfinite().all()), "matrix")
            apart = float((matrix - matrix.T).abs().max())
            check(apart <= 2e-3 * float(matrix.abs().max()), "not symmetric")
        basis = found.eigen(name)
        for values in vars(basis).values():
            check(bool(values.isfinite().all()), "basis")
        for estimator in found.estimators:
            mass = found.curvature(name, estimator)
            for values in (mass.lam, mass.mu, mass.table):
                check(values is None or bool(values.isfinite().all()), estimator)
    found.save(folder / "again")
    again = kfac.Factors.load(folder / "again")
    check(again.digest == found.digest and again.provenance == found.provenance, "differs")
    kfac.merge([found, again])
    with contextlib.suppress(kfac.FactorsMismatchError):
        kfac.Factors.load(folder / "again", model=net())
        with kfac.CurvatureEdit(found, 0.5).apply(net()):
            pass


def make_checkpoint(folder: Path) -> list[bytes]:
    for name, budget in (("whole", None), ("passes", 1200)):

        def broken(model: nn.Module, batch: torch.Tensor, left: list[int]) -> Any:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return forward(model, batch)

        path = folder / name
        with contextlib.suppress(KeyboardInterrupt):
            kfac.collect(
                net(),
                net_batches(),
                kfac.named_targets(net(), ["a", "b", "c"]),
                forward=functools.partial(broken, left=[3 if budget is None else 7]),
                marginals=True,
                progress=False,
                checkpoint=path,
                checkpoint_every=0.0,
                budget=budget,
            )
    return contents(folder)


def read_checkpoint(folder: Path, content: bytes) -> None:
    path = written(folder, "c.safetensors", content)
    one_pass = b'\\"passes\\": [[\\"a\\", \\"b\\", \\"c\\"]]' in content
    found = collected(checkpoint=path, budget=None if one_pass else 1200)
    for name, record in found.records.items():
        check(whole(record.count, 1) and record.source in found.records, f"{record!r}")
        check(bool(found.A(name).isfinite().all() and found.G(name).isfinite().all()), "sums")
    check(whole(found.tokens, 1), "tokens")
    found.save(folder / "again")
    check(kfac.Factors.load(folder / "again").digest == found.digest, "differs when saved")


# Texts


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_questions(folder: Path) -> list[bytes]:
    rows = [
        {
            "question": f"What is {i} and {i}?",
            "label": ("reasoning", "memory")[i % 2],
            "id": f"q{i}",
            "options": ["a", "b"],
            "answer_index": i % 2,
            "subject": "maths",
        }
        for i in range(12)
    ]
    sides = ("train", "validation", "test")
    return [lines(rows), lines([{**row, "split": sides[i // 4]} for i, row in enumerate(rows)])]


def read_questions(folder: Path, content: bytes) -> None:
    found = lirefs.load_questions(written(folder, "q.jsonl", content))
    for one in found:
        check(all(map(text, (one.text, one.label, one.id, one.subject, one.side))), f"{one!r:.200}")
        check(all(map(text, one.options)) and one.text, "options")
        check(one.answer_index is None or one.options[one.answer_index] is not None, "answer")
        check(text(one.prompt) and one.key is not None, "prompt")
    tiny_lm().encode(found.prompts)
    for side in found.split(seed=0).sides.values():
        check(set(side.labels) == {0, 1}, "a side of one label")


def make_grades(folder: Path) -> list[bytes]:
    rows = [{"id": f"q{i}", "question": "x", "score": i / 7} for i in range(8)]
    return [lines(rows), lines([{"question": "x", "score": 1} for _ in rows])]


def read_grades(folder: Path, content: bytes) -> None:
    found = load_grades(written(folder, "g.jsonl", content))
    check(found is None or all(text(key) and finite(one) for key, one in found.items()), "grades")


def make_memorized(folder: Path) -> list[bytes]:
    tokenizer = tiny_lm().tokenizer_fingerprint
    return [
        lines([{"id": f"t{i}", "text": f"a text {i} of some length to cut"} for i in range(4)]),
        lines([{"prefix": "it begins in", "suffix": " this way", "suffix_tokens": 4}] * 3),
        lines([{"prefix": f"it begins {i} in", "suffix": " this way"} for i in range(3)]),
        lines([{"prefix_ids": [5, 6, i], "suffix_ids": [7, 8], "tokenizer": tokenizer}
               for i in range(3)]),
    ]  # fmt: skip


def read_memorized(folder: Path, content: bytes) -> None:
    found = lirefs.recitation_task(tiny_lm(), written(folder, "m.jsonl", content))
    for name, prefix, suffix in found.items:
        check(text(name) and prefix and suffix, "an empty side")
        check(all(whole(one) and one < 128 for one in (*prefix, *suffix)), "ids")


def make_corpus(folder: Path) -> list[bytes]:
    rows = [{"id": f"t{i}", "text": f"a text, n° {i}\nof two lines", "n": i} for i in range(4)]
    return [lines(rows), lines([{"text": row["text"]} for row in rows])]


def read_corpus(folder: Path, content: bytes) -> None:
    path = written(folder, "corpus.jsonl", content)
    (folder / "texts").mkdir()
    written(folder / "texts", "plain.txt", content)
    refused = []
    for source in (path, folder / "texts"):
        try:
            for name, one in read_texts([source]):
                check(text(name) and text(one), "text")
                tiny_lm().encode([one[:200]])
        except lirefs.LirefsError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def make_skill(file: str, folder: Path) -> list[bytes]:
    return [lines(rows_of(file)[:12])]


def read_skill(file: str, folder: Path, content: bytes) -> None:
    written(folder, f"{file.replace('*', '_x')}.jsonl", content)
    names = [name for name, skill in SKILLS.items() if skill.file == file]
    tasks, left_out = skill_tasks(tiny_lm(), folder, names)
    for task in tasks:
        for item in task.items:
            parts = [item[0], item[1]] if isinstance(item[1], str) else [item[0]]
            check(all(map(text, parts)), f"{item!r:.200}")
        check(0 <= task.chance <= 1, "chance")
    if not tasks:
        raise NoDataError(f"{left_out}")


# Comparisons and journals


def make_results(folder: Path) -> list[bytes]:
    tasks = {
        "sums": TaskInfo("arithmetic", "accuracy", 0.1),
        "texts": TaskInfo("language", "perplexity"),
    }
    results: dict[str, dict[str, list[ItemResult]]] = {}
    for v, variant in enumerate(("unchanged", "steered")):
        right = [float((i + v) % 3 > 0) for i in range(5)]
        results[variant] = {
            "sums": [
                ItemResult(f"a/{i}", {"accuracy": one, "other": 0.5 * i}, 1.0, f"{i}?", "1", f"{v}")
                for i, one in enumerate(right)
            ],
            "texts": [ItemResult(f"t{i}", {"nll": 9.0 + i + v}, 4.0 + i, "x") for i in range(4)],
        }
    made_by = {"model_name": "tiny", "findings": ["one", "two"], "nested": {"keep": [0.5, None]}}
    found = Comparison(results, tasks, made_by, resamples=40, seed=3)
    return [storage.dumps(found).encode()]


def read_results(folder: Path, content: bytes) -> None:
    path = written(folder, "results.json", content)
    found = Comparison.load(path)
    check(found.variants[0] == "unchanged", f"first variant {found.variants[0]!r}")
    for by_task in found.results.values():
        check(list(by_task) == list(found.tasks), "tasks")
        for items in by_task.values():
            for one in items:
                check(all(map(text, (one.id, one.prompt, one.expected, one.output))), f"{one!r}")
                check(finite(one.weight) and one.weight > 0, f"weight {one.weight!r}")
                check(type(one.parsed) is bool, "parsed")
                check(all(type(score) is float for score in one.scores.values()), "scores")
    report.load_figures(path, replace_variants(found))
    again = storage.dumps(found)
    check(storage.dumps(Comparison.load(written(folder, "again", again.encode()))) == again, "save")
    for made in (exports.csv_text(found), exports.latex(found), report.markdown(found, [])):
        check(text(made), "report")
    check(text(page.html(found, [])), "page")


def replace_variants(found: Comparison) -> Comparison:
    """The unchanged model alone: no default figure, which takes a second to draw."""
    return replace(found, results={"unchanged": found.results["unchanged"]})


FIGURES = [
    {"name": "own", "title": "Own", "caption": "Mine."},
    {"name": "b", "title": "B", "caption": ""},
]


@functools.cache
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "png")
    return buffer.getvalue()


def read_figures(folder: Path, content: bytes) -> None:
    """A list of figures, in results that are whole."""
    results = make_results(folder)[0].replace(b'"figures": []', b'"figures": ' + content)
    path = written(folder, "results.json", results)
    for name in ("own", "b"):
        written(folder, f"{name}.png", picture())
        written(folder, f"{name}.svg", b"<svg/>")
    _report(folder, path)


def read_picture(folder: Path, content: bytes) -> None:
    """One picture of a report."""
    listed = json.dumps(FIGURES[:1]).encode()
    results = make_results(folder)[0].replace(b'"figures": []', b'"figures": ' + listed)
    written(folder, "own.png", content)
    written(folder, "own.svg", b"<svg/>")
    _report(folder, written(folder, "results.json", results))


def _report(folder: Path, path: Path) -> None:
    comparison = replace_variants(Comparison.load(path))
    figures, missing = report.load_figures(path, comparison)
    check(all(map(text, missing)), "missing")
    for one in figures:
        check(all(map(text, (one.name, one.title, one.caption))), f"{one!r}")
        check(one.picture.png.startswith(b"\x89PNG"), "no picture")
    for one in figures:
        one.picture.save(folder / "out", one.name)
    if now_and_then(path.read_bytes() + (folder / "own.png").read_bytes()):
        report.write(comparison, folder / "out", figures)


@functools.cache
def journalled() -> MultipleChoice:
    return MultipleChoice("choose", [(str(i), f"q{i}", [" a", " b"], i % 2) for i in range(3)])


class Broken(Exception):
    """Ends a comparison before its journal is of no use."""


def make_journal(folder: Path) -> list[bytes]:
    compared(folder / "j")
    return contents(folder / "j")


def compared(folder: Path) -> Comparison:
    steer = lirefs.Direction(torch.ones(32), 2).steer("add", 5.0)
    return lirefs.compare(
        tiny_lm(), {"s": steer}, [journalled()], journal=folder, resamples=20, progress=False
    )


def read_journal(folder: Path, content: bytes) -> None:
    (folder / "j").mkdir()
    written(folder / "j", "items-0.jsonl", content)
    found = compared(folder / "j")
    for by_task in found.results.values():
        for items in by_task.values():
            check(len(items) == 3, "items")
            for one in items:
                check(all(map(text, (one.id, one.prompt, one.expected, one.output))), f"{one!r}")
                check(type(one.scores["accuracy"]) is float, "score")
                check(finite(one.weight) and one.weight > 0 and type(one.parsed) is bool, f"{one}")
    found.cells()
    check(storage.dumps(found), "saved")


RECITED = "Lr4tHb9sJc1nqz7m!vk2xw0pd5gY#o8i"


@functools.cache
def reciter() -> lirefs.LanguageModel:
    """A model that has learned the windows of a text by heart."""
    lm = lirefs.wrap(fresh_model("llama", num_hidden_layers=1), tiny_tokenizer(), name="reciter")
    ids = torch.tensor(lm.encode([RECITED[at : at + 8] for at in range(0, 32, 8)]))
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        lm.model(ids, labels=ids).loss.backward()
        optimizer.step()
    lm.model.zero_grad(set_to_none=True)
    return lm


def mined(journal: Path) -> lirefs.Mined:
    texts = [("known", RECITED), ("other", "nothing that anybody has learned")]
    return lirefs.mine(reciter(), texts, 4, 4, 8, batch_tokens=24, journal=journal, progress=False)


def make_mining_journal(folder: Path) -> list[bytes]:
    found = mined(folder / "j")
    assert found.windows
    return contents(folder)


def read_mining_journal(folder: Path, content: bytes) -> None:
    found = mined(written(folder, "j", content))
    for one in found.windows:
        check(all(map(text, (one.id, one.prefix_text, one.suffix_text))), f"{one!r}")
        check(len(one.suffix_ids) == 4 and len(one.prefix_ids) == 5, "lengths")
        check(all(whole(i) and i < 128 for i in (*one.prefix_ids, *one.suffix_ids)), "ids")
    check(all(map(whole, found.counts.values())), "counts")
    check(found.counts["confirmed"] <= found.counts["screened"] <= found.counts["windows"], "order")
    found.save(folder / "mined.jsonl")


PROMPTS = ["abc", "de"]


def make_capture(folder: Path) -> list[bytes]:
    lirefs.capture(tiny_lm(), PROMPTS, layers=[1, 2], cache=folder, progress=False)
    return contents(folder)


@functools.cache
def capture_name() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_capture(Path(folder))
        return next(path.name for path in Path(folder).iterdir())


def read_capture(folder: Path, content: bytes) -> None:
    written(folder, capture_name(), content)
    found = lirefs.capture(tiny_lm(), PROMPTS, layers=[1, 2], cache=folder, progress=False)
    check(found.values.dtype == torch.float32 and found.values.shape == (2, 2, 1, 32), "shape")
    check(bool(found.values.isfinite().all()), "values")


# Models and trainings


@functools.cache
def shape() -> organism_train.ModelShape:
    return organism_train.ModelShape(hidden=8, layers=1, mlp=12, heads=2, context=16)


def organism_parts() -> tuple[Any, Any, Any]:
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = organism_train.make_model(shape(), tokenizer, 7)
    return model, tokenizer, organism_train.make_optimizers(model, organism_train.Recipe())


def organism_step(model: Any, optimizers: Any) -> None:
    ids = torch.arange(12).reshape(2, 6)
    model(ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def make_organism_state(folder: Path) -> list[bytes]:
    model, tokenizer, optimizers = organism_parts()
    organism_step(model, optimizers)
    save_checkpoint(folder, model, tokenizer, optimizers, 1, 7, {})
    return contents(folder, STATE)


def read_organism_state(folder: Path, content: bytes) -> None:
    written(folder, STATE, content)
    model, _, optimizers = organism_parts()
    done = load_checkpoint(folder, model, optimizers, 7, "cpu")
    check(whole(done), f"step {done!r}")
    for one in model.parameters():
        check(one.dtype == torch.float32 and bool(one.isfinite().all()), "weights")
    organism_step(model, optimizers)


@functools.cache
def folder_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}  # fmt: skip
        fresh_model("llama", language_seed=3, **small).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def make_model_file(name: str, folder: Path) -> list[bytes]:
    return [folder_files()[name]]


def read_model_file(name: str, folder: Path, content: bytes) -> None:
    for other, one in folder_files().items():
        written(folder, other, one)
    written(folder, name, content)
    seed = language_seed(str(folder))
    check(seed is None or type(seed) is int, f"seed {seed!r}")
    lm = lirefs.load(folder, device="cpu")
    check(lm.n_layers >= 1 and lm.width >= 1 and len(lm.fingerprint) == 64, "layout")


def make_gguf_model(folder: Path) -> list[bytes]:
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    words = ["<s>", "</s>", *map(chr, range(33, 127)), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * 96)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (98, 8), "output_norm": (8,), "output": (98, 8),
        **{f"blk.0.{name}": (8, 8) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for name, size in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return contents(folder)


def read_gguf_model(folder: Path, content: bytes) -> None:
    lm = lirefs.load(written(folder, "m.gguf", content), device="cpu")
    check(lm.n_layers >= 1 and lm.width >= 1, "layout")


@functools.cache
def vision_split() -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 1, 8, 8, generator=generator)
    return noisy_split(Images(pixels, torch.arange(20) % 2, ["a", "b"]), 0.1, seed=0)


VISION = training.Recipe(blocks=1, width=8, heads=2, mlp=8, patch=4, epochs=2, batch=16)


def make_vision_state(folder: Path) -> list[bytes]:
    model = training.make_model(VISION, vision_split(), 0)
    optimizer = training._optimizer(model, VISION)
    logits = model(pixel_values=vision_split().train.pixels[:2]).logits
    logits.sum().backward()
    optimizer.step()
    record = training.provenance(vision_split(), VISION, 0)
    training._save_state(folder / "n.state", record, model, optimizer, 1)
    return contents(folder)


def make_vision_network(folder: Path) -> list[bytes]:
    training.train(vision_split(), VISION, 0, folder / "n", progress=False)
    return contents(folder)


def read_vision(suffix: str, folder: Path, content: bytes) -> None:
    path = written(folder, f"n{suffix}", content)
    shipped = path if suffix == ".shipped" else None
    model = training.train(vision_split(), VISION, 0, folder / "n", shipped=shipped, progress=False)
    for one in model.parameters():
        check(one.dtype == torch.float32, "type")
        # Moments of 1e38 are numbers, with which a training that goes on may end anywhere.
        check(suffix == ".state" or bool(one.isfinite().all()), "weights")


def make_image(folder: Path) -> list[bytes]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "gif", "bmp"):
        Image.fromarray(pixels).save(folder / f"x.{kind}")
    return contents(folder)


def read_image(folder: Path, content: bytes) -> None:
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        written(folder / "images" / name, "a.png", picture())
    path = written(folder / "images" / "cat", "b.png", content)
    found = _picture("images", {"path": str(path), "bytes": None})
    check(np.asarray(found.convert("RGB").resize((4, 4))).shape == (4, 4, 3), "pixels")
    if not now_and_then(content):
        return
    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # in the process of the case alone
    found = load_images(str(folder / "images"), side=4)
    check(len(found) == 3, "number")
    check(found.pixels.dtype == torch.float32 and found.pixels.shape[2:] == (4, 4), "pixels")
    check(0 <= float(found.pixels.min()) <= float(found.pixels.max()) <= 1, "values")
    check(bool((found.labels >= 0).all() and (found.labels < len(found.classes)).all()), "labels")
    shutil.rmtree(folder / "cache", ignore_errors=True)


FILES_OF_SKILLS = sorted({skill.file for skill in SKILLS.values() if skill.file})

FORMATS: dict[str, Format] = {
    "directions": Format("safetensors", make_directions, read_directions),
    "control vector": Format("gguf", make_control_vector, read_control_vector),
    "factors": Format("safetensors", make_factors, read_factors),
    "collection checkpoint": Format("safetensors", make_checkpoint, read_checkpoint),
    "questions": Format("lines", make_questions, read_questions),
    "grades": Format("lines", make_grades, read_grades),
    "memorized texts": Format("lines", make_memorized, read_memorized),
    "corpus": Format("lines", make_corpus, read_corpus),
    **{
        f"rows of {file}": Format(
            "lines", functools.partial(make_skill, file), functools.partial(read_skill, file)
        )
        for file in FILES_OF_SKILLS
    },
    "results": Format("json", make_results, read_results),
    "figures of a report": Format(
        "json", lambda folder: [json.dumps(FIGURES).encode()], read_figures
    ),
    "picture of a report": Format("bytes", lambda folder: [picture()], read_picture),
    "journal of a comparison": Format("lines", make_journal, read_journal),
    "journal of mining": Format("lines", make_mining_journal, read_mining_journal),
    "activations": Format("safetensors", make_capture, read_capture),
    "organism training": Format("safetensors", make_organism_state, read_organism_state),
    **{
        f"model folder, {name}": Format(
            structure,
            functools.partial(make_model_file, name),
            functools.partial(read_model_file, name),
            # Lost sizes become the defaults of the architecture: a layer of half a gigabyte.
            resident=600 << 20,
        )
        for name, structure in {
            "config.json": "json",
            "model.safetensors": "safetensors",
            "tokenizer.json": "json",
        }.items()
    },
    "GGUF model": Format("gguf", make_gguf_model, read_gguf_model, slowness=5),
    "vision network": Format(
        "safetensors", make_vision_network, functools.partial(read_vision, "")
    ),
    "vision network, shipped": Format(
        "safetensors", make_vision_network, functools.partial(read_vision, ".shipped")
    ),
    "vision training": Format(
        "safetensors", make_vision_state, functools.partial(read_vision, ".state")
    ),
    "image": Format("bytes", make_image, read_image, resident=256 << 20, slowness=5),
}
