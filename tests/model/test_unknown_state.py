"""States that cannot be read: refused where something would rely on them, and nowhere else."""

import functools
import os
import subprocess
import sys

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steering_tools import direction, split
from tiny import fresh_model, tiny_tokenizer
from torch.nn.utils import prune
from transformers.models.llama.modeling_llama import LlamaMLP

import kfac
from lirefs import Gate, Steer, capture, compare, fit, mine, wrap
from lirefs.errors import CheckpointError, ProvenanceError
from lirefs.model import traits
from lirefs.steering.scope import Scope, mask, spans
from lirefs.tasks import Perplexity

PROMPTS = ["Math: 31 + 27 =", "the baker"]
TASKS = [Perplexity("texts", [("0", PROMPTS[0])])]
TEXTS = [("a", "the quick brown fox jumps over the lazy dog")]


def offloaded(lm):
    accelerate.cpu_offload(lm.model)


def hooked(lm):
    lm.model.model.layers[1].register_forward_hook(lambda module, args, output: None)


def pre_hooked(lm):
    lm.model.lm_head.register_forward_pre_hook(functools.partial(lambda amount, *_: None, 1.0))


def replaced(lm):
    plain = lm.model.model.norm.forward
    lm.model.model.norm.forward = lambda hidden: plain(hidden) * 2


def borrowed_name(lm):
    module = lm.model.model.layers[0].mlp
    plain = module.forward

    @functools.wraps(plain)
    def forward(hidden):
        return plain(hidden) * 2

    module.forward = forward


def own_accelerate_hook(lm):
    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    accelerate.hooks.add_hook_to_module(lm.model.model.norm, Doubling())


def opaque(lm):
    class Secret(torch.nn.Linear):
        def get_extra_state(self):
            return object()

    layer = lm.model.model.layers[0].mlp.down_proj
    layer.__class__ = Secret


ATTACHED = []


def custom_scope(lm):
    scope = Scope("mine", lambda tokens: tokens.position > 1)
    ATTACHED.append(Steer(direction(), "add", scope=scope).attach(lm.model))


UNKNOWN = {
    offloaded: "offloaded",
    hooked: r"'model.layers.1' has a forward hook of unknown effect",
    pre_hooked: "'lm_head' has a forward hook",
    replaced: "forward method of module 'model.norm' is replaced",
    borrowed_name: "forward method of module 'model.layers.0.mlp'",
    own_accelerate_hook: "'model.norm' has a forward hook of unknown effect .*Doubling",
    opaque: "down_proj.*object and cannot be read",
    custom_scope: "scope 'mine' is a function of your own",
}


@pytest.fixture
def lm():
    yield wrap(fresh_model("llama"), tiny_tokenizer())
    while ATTACHED:
        ATTACHED.pop().remove()


@pytest.mark.parametrize("change", UNKNOWN, ids=lambda one: one.__name__)
def test_what_relies_on_it_is_refused_by_name_and_everything_else_works(change, lm, tmp_path):
    change(lm)
    relying = {
        "identity": lambda: lm.identity,
        "capture": lambda: capture(lm, PROMPTS, cache=tmp_path / "a", progress=False),
        "compare": lambda: compare(lm, {}, TASKS, journal=tmp_path / "b", progress=False),
    }
    for name, call in relying.items():
        with pytest.raises(ProvenanceError, match=UNKNOWN[change] + ".*leave out cache=") as found:
            call()
        assert "\n" not in str(found.value), name
    assert not list(tmp_path.iterdir())
    assert capture(lm, PROMPTS, progress=False).values.isfinite().all()
    made = compare(lm, {}, TASKS, resamples=1, progress=False).provenance
    assert "identity" not in made
    assert made["model_unknown"].startswith(str(found.value)[:40])
    assert ("model" in made) == (change not in (offloaded, opaque, custom_scope))


@pytest.mark.parametrize("change", [offloaded, hooked, opaque], ids=lambda one: one.__name__)
def test_fits_with_any_model(change, lm, tmp_path):
    questions = split()
    settings = {"layers": [1, 2], "shuffles": 2, "progress": False}
    expected = fit(lm, questions, **settings)
    change(lm)
    with pytest.raises(ProvenanceError):
        fit(lm, questions, cache=tmp_path, any_model=True, **settings)
    if change is not hooked:
        with pytest.raises(ProvenanceError, match="any_model=True"):
            fit(lm, questions, **settings)
    probe = fit(lm, questions, any_model=True, **settings)
    assert torch.allclose(probe.best.vector, expected.best.vector)
    assert probe.best.model == ("" if change is not hooked else expected.best.model)
    assert "model_unknown" in probe.directions.provenance
    with Steer(probe.best, "add").apply(lm.model):
        lm.generate("abc", max_new_tokens=2)


@pytest.mark.parametrize("change", [hooked, replaced, custom_scope], ids=lambda one: one.__name__)
def test_curvature_checkpoints_are_refused_before_a_batch_is_read(change, lm, tmp_path):
    change(lm)
    targets = kfac.find_targets(lm.model, layers=[1])
    with pytest.raises(ProvenanceError, match=UNKNOWN[change]):
        kfac.collect(lm, iter([]), targets, checkpoint=tmp_path / "state", progress=False)
    assert kfac.collect(lm, PROMPTS, targets, progress=False).tokens


@pytest.mark.parametrize("change", [hooked, replaced, opaque], ids=lambda one: one.__name__)
def test_a_search_for_windows_has_no_journal_then(change, lm, tmp_path):
    change(lm)
    with pytest.raises(ProvenanceError, match=UNKNOWN[change]):
        mine(lm, TEXTS, 8, 4, journal=tmp_path / "journal", progress=False)
    assert not list(tmp_path.iterdir())
    found = mine(lm, TEXTS, 8, 4, progress=False)
    assert "model_unknown" in found.provenance
    found.save(tmp_path / "windows")


def test_a_checkpoint_of_another_state_is_not_continued(lm, tmp_path):
    path, targets = tmp_path / "state", kfac.find_targets(lm.model, layers=[1])
    kfac.collect(lm, PROMPTS, targets, checkpoint=path, progress=False)
    changes = [
        lambda: Steer(direction(layer=3), "add").attach(lm.model).remove,
        lambda: kfac.SVDEdit(["model.layers.0.mlp.up_proj"], 0.5).attach(lm.model).remove,
        lambda: [lm.model.set_attn_implementation("eager"), lambda: None][1],
    ]
    for change in changes:
        undo = change()
        with pytest.raises(CheckpointError, match=r"other settings \(\['model'\]\)"):
            kfac.collect(lm, PROMPTS, targets, checkpoint=path, progress=False)
        undo()


def watching(lm):
    """Hooks and forward methods that leave the numbers as they are."""
    model = lm.model
    model.enable_input_require_grads()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    model.model.layers[0].mlp.register_full_backward_hook(lambda *_: None)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.lm_head.weight.register_hook(lambda gradient: gradient * 2)
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        model(torch.tensor([[4, 5]]), output_hidden_states=True)  # transformers keeps its hooks


def test_hooks_that_do_not_change_the_forward_pass_do_not_count(lm):
    before = lm.identity
    watching(lm)
    assert lm.identity == before


@pytest.mark.parametrize("kind", ["parametrization", "weight norm", "pruning"])
def test_what_torch_computes_weights_from_counts(kind, lm):
    block = lm.model.model.layers[1].mlp
    before, tool = lm.identity, torch.nn.utils
    if kind == "parametrization":
        tool.parametrizations.weight_norm(block.up_proj)
        changed = block.up_proj.parametrizations.weight.original0
    elif kind == "weight norm":
        with pytest.warns(FutureWarning):
            tool.weight_norm(block.up_proj)
        changed = block.up_proj.weight_g
    else:
        prune.l1_unstructured(block.up_proj, "weight", 0.5)
        changed = block.up_proj.weight_mask
    found = [before, lm.identity]
    with torch.no_grad():
        changed.mul_(2)
    assert len({*found, lm.identity}) == 3


def test_module_hooks_of_the_whole_of_torch_are_refused(lm):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ProvenanceError, match="every module has a forward hook"):
            _ = lm.identity
    finally:
        handle.remove()
    assert lm.identity


MARKS = [
    mask([True, False]),
    mask([False, True]),
    mask([[True, False], [True, False]]),
    spans(tiny_tokenizer(), ["abcd"], [[(0, 1)]]),
    spans(tiny_tokenizer(), ["abcd"], [[(1, 2)]]),
    Scope("mine", lambda tokens: tokens.position > 1, {"after": 1}),
    Scope("mine", lambda tokens: tokens.position > 2, {"after": 2}),
]


def fading(index):
    return 1.0 / (index + 1)


def ending(values):
    return lambda index: values[index]


STRENGTHS = [
    1.0,
    lambda index: 0.0,
    lambda index: 50.0,
    lambda index: 50.0 if index < 9_999 else 49.0,
    fading,
    ending([1.0, 2.0]),
    ending([1.0, 2.0, 2.0]),
    ending([1.0, float("nan"), 2.0]),
    [1.0],
    [None],
    {1: 1.0},
]


def test_descriptions_tell_every_two_apart():
    steers = [Steer(direction(), "add", scope=one) for one in MARKS]
    steers += [Steer(direction(), "add", one) for one in STRENGTHS]
    for per in ("token", "row"):
        steers += [
            Steer(direction(), "add", gate=Gate(direction(0), 0.5, per, side))
            for side in (True, False)
        ]
    described = [one.describe() for one in steers]
    assert all(described[i] != described[k] for i in range(len(steers)) for k in range(i))
    assert [one.describe() for one in steers] == described


def test_a_function_is_asked_for_its_strengths_only_to_describe_it():
    asked = []
    steer = Steer(direction(), "add", lambda index: asked.append(index) or 1.0)
    assert not asked
    assert steer.describe() == steer.describe()
    assert len(asked) == 10_000


def test_two_schedules_have_their_own_results_in_one_journal(lm, tmp_path):
    from lirefs.tasks import ShortAnswer

    task = ShortAnswer("t", [("0", "abc", ["x"])], max_new_tokens=4, group="reasoning")

    def answer(strength, **settings):
        steer = {"s": Steer(direction(), "add", strength)}
        found = compare(lm, steer, [task], resamples=1, progress=False, **settings)
        return found.results["s"]["t"][0].output

    strengths = [lambda i: 0.0, lambda i: 50.0, lambda i: -50.0, lambda i: 50.0 * (i > 1)]
    expected = [answer(one) for one in strengths]
    assert len(set(expected)) > 2
    assert [answer(one, journal=tmp_path) for one in [*strengths, *strengths]] == 2 * expected


class Own:
    """An intervention of a user."""

    def __init__(self, described):
        self.described = described

    def attach(self, model):
        return Steer(direction(), "add").attach(model)

    def describe(self):
        return self.described


@pytest.mark.parametrize("described", [{"unknown": "no name"}, {"a": [{"unknown": "no name"}]}])
def test_an_intervention_that_cannot_be_told_from_others_has_no_journal(described, lm, tmp_path):
    with pytest.raises(ProvenanceError):
        compare(lm, {"own": Own(described)}, TASKS, journal=tmp_path / "j", progress=False)
    assert not list(tmp_path.iterdir())
    assert compare(lm, {"own": Own(described)}, TASKS, resamples=1, progress=False)


def test_a_scope_of_ones_own_needs_settings_for_a_journal(lm, tmp_path):
    def run(*settings, **options):
        scope = Scope("mine", lambda tokens: tokens.position > 1, *settings)
        steer = {"own": Steer(direction(), "add", scope=scope)}
        return compare(lm, steer, TASKS, resamples=1, progress=False, **options)

    with pytest.raises(ProvenanceError, match=r"'own' cannot be told .*'mine'.*settings"):
        run(journal=tmp_path)
    for settings in ({"after": 1}, {"after": 2}):
        run(settings, journal=tmp_path)
    assert run().provenance["interventions"]["own"]["scope"]["unknown"]


def test_what_a_module_calls_and_holds_counts(lm):
    mlp = lm.model.model.layers[1].mlp
    del mlp.act_fn
    seen = []
    for value in (F.silu, F.relu, functools.partial(F.leaky_relu, negative_slope=0.1)):
        mlp.act_fn = value
        seen.append(lm.identity)
    mlp.factors = [1.0, 2.0]
    seen.append(lm.identity)
    mlp.factors.append(3.0)
    seen.append(lm.identity)
    mlp.table = np.arange(3)
    seen.append(lm.identity)
    mlp.table[1] = 5
    seen.append(lm.identity)
    assert len(set(seen)) == len(seen)
    factor = 2.0
    mlp.act_fn = lambda x: F.silu(x) * factor
    with pytest.raises(ProvenanceError, match=r"act_fn of module 'model\.layers\.1\.mlp'"):
        _ = lm.identity


def test_the_code_of_a_class_of_ones_own_counts():
    seen = []
    for factor in ("1.0", "2.0", "1.0"):
        own: dict = {"Base": LlamaMLP, "__name__": "my_model"}
        exec(
            f"class MyMLP(Base):\n  def forward(self, x): return super().forward(x) * {factor}", own
        )
        model = fresh_model("llama")
        model.model.layers[1].mlp.__class__ = own["MyMLP"]
        seen.append(wrap(model, tiny_tokenizer()).identity)
    assert seen[0] == seen[2] != seen[1]


def test_traits_found_under_hooks_of_others_are_not_kept(lm, monkeypatch):
    monkeypatch.setattr(traits, "_BY_CONFIG", {})
    mixed, clean = fresh_model("llama"), fresh_model("llama")
    mixed.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output + output.mean(1, keepdim=True)
    )
    for model, right in ((mixed, False), (clean, True), (mixed, False)):
        assert wrap(model, tiny_tokenizer()).traits.right is right


def test_the_code_of_a_function_reads_alike_in_every_process():
    script = (
        "from lirefs.model.code import _text_of\n"
        "print(_text_of((lambda x: x in {'one', 'two', 'three', 'four'}).__code__))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1
