"""Every public `seed=` takes the same numbers, and names what is wrong with others."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
import lirefs.main_job
from lirefs import organism
from lirefs.directions import geometry
from lirefs.errors import LirefsError
from lirefs.organism.questions import question_set
from lirefs.questions import Question, Questions
from lirefs.statistics import significance
from lirefs.statistics.intervals import permutation_p, resample_counts
from lirefs.tasks import synthetic
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.papers.suite import suite_tasks

BAD = ["a", None, 1.5, 1.0, True, -1, 2**63, 2**70, [1], np.array([1, 2]), torch.tensor([1, 2])]
TEXTS = ["some text here", "another text"]
QUIET = {"progress": False}


class World:
    """What a user has at hand: made once, and never changed."""

    def __init__(self):
        self.lm = lirefs.wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
        labels = ("memory", "reasoning")
        self.questions = Questions(
            [
                Question(f"{label} {i} text", label, f"{label}-{i}")
                for label in labels
                for i in range(8)
            ]
        )
        self.direction = lirefs.Direction(torch.ones(32), 1)
        self.factors = kfac.collect(self.lm, TEXTS, layers=[1], **QUIET)
        self.batches = self.lm.batches(TEXTS)
        self.targets = kfac.find_targets(self.lm.model, [1])
        self.bands = kfac.band_profile(self.lm.model, self.batches, self.factors)
        self.language = organism.Language()
        self.directions = lirefs.Directions({(1, "resid_pre"): self.direction})


@pytest.fixture(scope="module")
def world():
    return World()


# Public function or method to a call of it with a seed.
CALLS = {
    "lirefs.compare": lambda w, s: lirefs.compare(
        w.lm, {}, [lirefs.Perplexity("p", TEXTS)], seed=s, **QUIET
    ),
    "lirefs.fit": lambda w, s: lirefs.fit(w.lm, w.questions, seed=s, **QUIET),
    "lirefs.plant": lambda w, s: lirefs.plant(w.lm, TEXTS, TEXTS, seed=s, **QUIET),
    "lirefs.Direction.random_like": lambda w, s: w.direction.random_like(s),
    "lirefs.Questions.split": lambda w, s: w.questions.split(seed=s),
    "lirefs.directions.transfer": lambda w, s: geometry.transfer(
        w.lm, w.directions, w.questions, w.questions.split(), seed=s, **QUIET
    ),
    "lirefs.main_job.run": lambda w, s: lirefs.main_job.run(w.lm, seed=s),
    "lirefs.organism.Language": lambda w, s: organism.Language(s),
    "lirefs.organism.Language.items": lambda w, s: w.language.items("addition", "test", 3, seed=s),
    "lirefs.organism.Language.texts": lambda w, s: w.language.texts("test", 3, seed=s),
    "lirefs.organism.training_texts": lambda w, s: organism.training_texts(w.language, 3, s),
    "lirefs.organism.question_set": lambda w, s: question_set(w.language, "mixed", "test", 3, s),
    "lirefs.statistics.auroc": lambda w, s: kfac.auroc([1, 2], [0, 1], seed=s),
    "lirefs.statistics.resample_counts": lambda w, s: resample_counts(3, 2, s),
    "lirefs.statistics.permutation_p": lambda w, s: permutation_p(
        np.arange(5.0), np.arange(5.0), seed=s
    ),
    "lirefs.statistics.sign_flip": lambda w, s: significance.sign_flip([1.0, 2.0], seed=s),
    "lirefs.statistics.paired_p_value": lambda w, s: significance.paired_p_value(
        np.array([0.1, 2]), np.array([1.0, 3]), seed=s
    ),
    "lirefs.statistics.best_of_null": lambda w, s: significance.best_of_null([[1.0, 2.0]], seed=s),
    "lirefs.tasks.papers.skill_tasks": lambda w, s: skill_tasks(w.lm, names=["boolean"], seed=s),
    "lirefs.tasks.papers.suite_tasks": lambda w, s: suite_tasks(w.lm, "skills", seed=s),
    **{
        f"lirefs.tasks.{name}": lambda w, s, name=name: getattr(synthetic, name)(3, seed=s)
        for name in ("addition_items", "simple_math_items", "boar_items", "boolean_items",
                     "tracking_items", "elimination_items")
    },
    "kfac.collect": lambda w, s: kfac.collect(w.lm, TEXTS, layers=[1], seed=s, **QUIET),
    "kfac.correct": lambda w, s: kfac.correct(w.lm, TEXTS, w.factors, seed=s, **QUIET),
    "kfac.RandomPairsEdit": lambda w, s: kfac.RandomPairsEdit(w.factors, 0.5, s),
    "kfac.RandomRotationEdit": lambda w, s: kfac.RandomRotationEdit(w.factors, 0.5, s),
    "kfac.auroc": lambda w, s: kfac.auroc([1, 2], [0, 1], seed=s),
    "kfac.band_ratios": lambda w, s: kfac.band_ratios(w.bands, w.bands, seed=s),
    "kfac.task_band_ratios": lambda w, s: kfac.task_band_ratios(
        {"a": w.bands}, {"b": w.bands}, seed=s
    ),
    "kfac.fit_balanced_subnet": lambda w, s: kfac.fit_balanced_subnet(
        w.lm.model, w.batches, w.batches, w.targets, seed=s, **QUIET
    ),
    "kfac.project": lambda w, s: kfac.project(
        w.factors, 0.5, {w.targets[0].name: w.targets[0].weight}, seed=s
    ),
    "kfac.projected_training": lambda w, s: kfac.projected_training(
        w.lm.model, w.factors, 0.5, seed=s
    ).__enter__(),
    "kfac.relearn": lambda w, s: kfac.relearn(
        w.lm.model, {"a": None}, w.batches, w.batches, seed=s, **QUIET
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("seed", BAD, ids=lambda seed: f"{type(seed).__name__} {seed}"[:20])
def test_a_bad_seed_is_named(name, seed, world):
    with pytest.raises(LirefsError, match="seed must be"):
        CALLS[name](world, seed)


def public_functions():
    """Every public function, class and method of both packages that has a `seed`."""
    modules = [lirefs, kfac]
    for package in (lirefs, kfac):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            modules.append(importlib.import_module(found.name))
    for module in modules:
        for name in getattr(module, "__all__", ()):
            one = getattr(module, name)
            if callable(one) and takes_seed(one):
                yield f"{module.__name__}.{name}"
            for method, function in vars(one).items() if inspect.isclass(one) else ():
                if not method.startswith("_") and callable(function) and takes_seed(function):
                    yield f"{module.__name__}.{name}.{method}"


def takes_seed(one):
    try:
        return "seed" in inspect.signature(one).parameters
    except (TypeError, ValueError):
        return False


def test_every_public_seed_is_tried():
    # Of those two others have checked it: one is a result, the other may have a derived one.
    tried = {name.rpartition(".")[2] for name in CALLS} | {"Comparison", "Resamples"}
    assert not [name for name in public_functions() if name.rpartition(".")[2] not in tried]


def test_whole_numbers_of_other_types_are_seeds(world):
    plain = world.direction.random_like(3).vector
    for seed in (np.int64(3), torch.tensor(3)):
        assert torch.equal(world.direction.random_like(seed).vector, plain)
    factors = kfac.collect(world.lm, TEXTS, layers=[1], seed=np.int64(3), **QUIET)
    assert type(factors.seeds[0]) is int
    assert kfac.RandomPairsEdit(factors, 0.5, 2**63 - 1).seed == 2**63 - 1
    assert synthetic.boolean_items(2, np.int64(3)) == synthetic.boolean_items(2, 3)
