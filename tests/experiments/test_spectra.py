from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import fresh_model, tiny_model, tiny_tokenizer

import kfac
import lirefs
from experiments.sharpness import contacts, direction_sharpness, spread
from experiments.spectra import edit_and_steer, edit_moves_projection, task_positions
from lirefs import MultipleChoice, Perplexity, Recitation, ShortAnswer
from lirefs.directions.capture import capture
from lirefs.directions.direction import Direction
from lirefs.errors import DirectionError, TaskError
from lirefs.model.language_model import wrap
from lirefs.questions import Question, Questions
from lirefs.steering.steer import Steer

ALL = ["gate_proj", "up_proj", "down_proj", "q_proj", "o_proj"]


@pytest.fixture(scope="module")
def factors(lm):
    texts = lm.encode([f"some text of number {n} to be read" for n in range(30)])
    batches = [lm.pad(texts[:15], side="right"), lm.pad(texts[15:], side="right")]
    return kfac.collect(
        lm.model, batches, kfac.find_targets(lm.model, projections=ALL), progress=False
    )


@pytest.fixture(scope="module")
def questions():
    return Questions(
        [
            Question(f"word {n} {'why' * (n % 2)}", label, id=str(n), prompt_format="{question}")
            for n in range(24)
            for label in [("memory", "reasoning")[n % 2]]
        ],
        source="made",
    )


@pytest.fixture(scope="module")
def direction(lm, questions):
    states = capture(lm, questions.prompts, layers=[2], progress=False)
    return lirefs.fit_directions(states, questions.labels)[2, "resid_pre"]


def unit(seed, width=32):
    vector = np.random.default_rng(seed).normal(size=width)
    return vector / np.linalg.norm(vector)


NAMES = {
    "llama": ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
    "olmo2": ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
    "gemma2": ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"),
    "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.attn.c_proj"),
    "gpt_neox": ("gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.1.attention.dense"),
}


@pytest.mark.parametrize("family", NAMES)
def test_readers_and_writers_are_distinguished(family):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    reader, writer = NAMES[family]
    found = contacts(lm, [reader, writer])
    assert [found[name].role for name in (reader, writer)] == ["reads", "writes"]


def test_what_does_not_touch_the_stream_has_no_contact(lm):
    found = contacts(lm, [f"model.layers.0.{n}" for n in ("mlp.gate_proj", "self_attn.v_proj")])
    assert {one.role for one in found.values()} == {"reads"}
    model = fresh_model("llama", intermediate_size=32)  # as wide as the stream
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
    found = contacts(wrap(model, tiny_tokenizer()), names)
    assert [found[name].role for name in names] == ["reads", "writes"]


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("llama", "model.layers.1.post_attention_layernorm"),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm"),
        ("gpt2", "transformer.h.1.ln_2"),
    ],
)
def test_a_direction_goes_through_the_norm_as_a_small_step_does(family, norm):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    name, _ = NAMES[family]
    contact, module = contacts(lm, [name])[name], lm.model.get_submodule(norm)
    vector, state = torch.tensor(unit(0)), torch.tensor(unit(1)) * 5
    # For states without a component along it; a LayerNorm subtracts the mean first.
    across = vector - vector.mean() if contact.centred else vector
    state = state - (state @ across) / (across @ across) * across
    if contact.centred:
        state = state - state.mean()
    step, state = 0.05 * vector, state[None, None]
    with torch.no_grad():
        moved = (module((state + step).float()) - module((state - step).float()))[0, 0].numpy()
    expected = moved / np.linalg.norm(moved)
    np.testing.assert_allclose(contact.carry(vector.numpy()[None])[0], expected, atol=2e-3)


def test_what_is_written_through_a_norm_comes_out_along_the_direction():
    lm = wrap(tiny_model("olmo2"), tiny_tokenizer())
    name = NAMES["olmo2"][1]
    contact = contacts(lm, [name])[name]
    norm = lm.model.get_submodule("model.layers.1.post_feedforward_layernorm")
    vector = unit(0)
    written = torch.tensor(contact.carry(vector[None])[0])
    state = torch.tensor(unit(1)) * 5
    state = (state - (state @ written) * written)[None, None]
    with torch.no_grad():
        moved = (norm((state + 0.05 * written).float()) - norm((state - 0.05 * written).float()))[
            0, 0
        ].numpy()
    np.testing.assert_allclose(moved / np.linalg.norm(moved), vector, atol=2e-3)


def test_spread_against_the_closed_form():
    root = np.random.default_rng(0).normal(size=(6, 6))
    moments = root @ root.T
    values, basis = np.linalg.eigh(moments)
    values, basis = values[::-1], basis[:, ::-1]
    own = spread(basis.T, moments, values, basis)
    np.testing.assert_allclose(own[:, 0], values / values.mean())
    np.testing.assert_allclose(own[:, 1], [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-12)
    assert own[:, 0].mean() == pytest.approx(1)
    middle = spread((basis.sum(1) / np.sqrt(6))[None], moments, values, basis)
    np.testing.assert_allclose(middle, [[1, 0.5]])


def test_the_sharpest_and_flattest_directions_are_found(lm, factors, questions):
    name = "model.layers.2.mlp.gate_proj"
    scale = lm.model.model.layers[2].post_attention_layernorm.weight.detach().double()
    vectors = factors.eigen(name).u_in / scale[:, None]
    for column, order in ((0, 1.0), (-1, 0.0)):
        direction = Direction(vectors[:, column].float(), 2)
        found = {
            one.target: one for one in direction_sharpness(lm, [direction], factors, questions)
        }
        assert set(found) == {
            name,
            "model.layers.2.self_attn.q_proj",
            "model.layers.1.mlp.down_proj",
            "model.layers.1.self_attn.o_proj",
        }
        assert found[name].order.value == pytest.approx(order, abs=1e-4)
        assert found[name].order.above_isotropic == order
        assert found[name].curvature.above_matched == order
        assert found[name].curvature.isotropic.value == pytest.approx(1, abs=0.3)
    written = Direction(
        factors.eigen("model.layers.1.mlp.down_proj").u_out[:, 0].float(), 1, "resid_post"
    )
    found = {one.target: one for one in direction_sharpness(lm, [written], factors, questions)}
    assert found["model.layers.1.mlp.down_proj"].order.value == pytest.approx(1, abs=1e-4)


def test_matched_directions_have_the_covariance_of_states(lm, factors, questions, direction):
    name = "model.layers.2.mlp.gate_proj"
    (found,) = (
        one
        for one in direction_sharpness(lm, [direction], factors, questions)
        if one.target == name
    )
    states = capture(lm, questions.prompts, layers=[2], progress=False).values[:, 0, 0].double()
    scale = lm.model.model.layers[2].post_attention_layernorm.weight.detach().double()
    draws = (
        np.random.default_rng(1).multivariate_normal(
            np.zeros(32), np.cov(states.numpy().T), size=4000
        )
        * scale.numpy()
    )
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    moments = factors.A(name).double().numpy()
    expected = np.einsum("nw,wv,nv->n", draws, moments, draws) / np.diag(moments).mean()
    assert found.curvature.matched.value == pytest.approx(expected.mean(), rel=0.1)
    assert found.curvature.matched.high == pytest.approx(np.percentile(expected, 97.5), rel=0.2)


def test_directions_that_nothing_touches_are_refused(lm, factors, questions, direction):
    with pytest.raises(DirectionError, match="attn_out"):
        direction_sharpness(lm, [replace(direction, site="attn_out")], factors, questions)
    few = kfac.collect(
        lm.model,
        [lm.pad(lm.encode(["some text"]))],
        kfac.find_targets(lm.model, layers=[0]),
        progress=False,
    )
    with pytest.raises(DirectionError, match="no matrix with factors"):
        direction_sharpness(lm, [direction], few, questions)


def tasks(lm):
    ids = lm.encode(["abc def", "ghi jkl", "mno pqr"])
    return [
        Recitation("recited", [(str(n), row[:4], row[4:]) for n, row in enumerate(ids)]),
        ShortAnswer("asked", [("a", "who is", ["x"]), ("b", "where was that", ["y"])]),
        ShortAnswer("asked again", [("a", "who is", ["z"]), ("b", "where was that", ["z"])]),
        MultipleChoice(
            "chosen", [("a", "true or", (" t", " f"), 0), ("b", "one", (" t", " f"), 1)]
        ),
        Perplexity("read", [("a", "a story."), ("b", "another, longer story.")]),
    ]


def test_task_positions_against_one_prompt_at_a_time(lm, factors, direction):
    found = task_positions(lm, direction, factors, tasks(lm))
    assert [one.task for one in found.positions] == ["recited", "asked", "chosen", "read"]
    assert [one.projection.n for one in found.positions] == [3, 2, 2, 2]
    prompts = lm.encode(["who is", "where was that"])
    values, shares = [], []
    for row in prompts:
        state = capture(lm, [row], layers=[2], progress=False).values[0, 0, 0]
        along = float(direction.project(state))
        middle = sum(direction.means) / 2
        values.append((along - middle) / (direction.means[1] - direction.means[0]))
        shares.append(kfac.flat_shares(lm.model, [lm.pad([row])], factors).passages[0])
    asked = found.positions[1]
    assert asked.projection.value == pytest.approx(np.mean(values), abs=1e-4)
    assert asked.flat.value == pytest.approx(np.mean(shares), abs=1e-5)
    assert asked.projection.low == pytest.approx(min(values), abs=1e-4)
    whole = lm.encode(["abc def", "ghi jkl", "mno pqr"])
    texts = kfac.flat_shares(lm.model, [lm.pad(whole, side="right")], factors).passages
    assert found.positions[0].flat.value == pytest.approx(texts.mean(), abs=1e-5)
    sides = [
        [getattr(one, side).value for one in found.positions] for side in ("projection", "flat")
    ]
    assert found.spearman.value == pytest.approx(spearmanr(*sides).statistic)
    assert found.spearman.n == 4
    assert 0 <= found.random.low <= found.random.value <= found.random.high <= 1


def test_class_means_lie_half_a_distance_from_the_middle(lm, factors, direction, questions):
    sides = [
        ShortAnswer(label, [(q.id, q.prompt, ["x"]) for q in questions if q.label == label])
        for label in ("memory", "reasoning")
    ]
    found = task_positions(lm, direction, factors, [*sides, tasks(lm)[0]])
    assert [one.projection.value for one in found.positions[:2]] == pytest.approx(
        [-0.5, 0.5], abs=1e-3
    )


def test_positions_need_tasks_prompts_and_a_fitted_direction(lm, factors, direction):
    with pytest.raises(TaskError, match="at least three"):
        task_positions(lm, direction, factors, tasks(lm)[:3])

    class Foreign:
        name, group, metric, chance = "foreign", "reasoning", "accuracy", 0.0

    with pytest.raises(TaskError, match="'foreign' has no items"):
        task_positions(lm, direction, factors, [Foreign()])
    with pytest.raises(DirectionError, match="no class means"):
        task_positions(lm, direction.random_like(0), factors, tasks(lm))


def test_an_edit_moves_projections_as_two_captures_say(lm, factors, direction, questions):
    names = [name for name in factors.names if ".0." in name or ".1." in name]
    edit = kfac.CurvatureEdit(factors, dict.fromkeys(names, 0.6))
    moves = edit_moves_projection(lm, direction, edit, questions)
    assert list(moves) == ["edit", "random pairs"]

    def projections():
        states = capture(lm, questions.prompts, layers=[2], progress=False).values[:, 0, 0]
        return direction.project(states).double().numpy()

    before = projections()
    with edit.apply(lm.model):
        gaps = projections() - before
    gaps /= direction.means[1] - direction.means[0]
    labels = np.array(questions.labels)
    move = moves["edit"]
    assert move.memory.value == pytest.approx(gaps[labels == 0].mean(), abs=1e-4)
    assert move.reasoning.value == pytest.approx(gaps[labels == 1].mean(), abs=1e-4)
    assert move.memory.low < move.memory.value < move.memory.high
    assert move.memory.n == 12
    assert moves["random pairs"].auroc_before == move.auroc_before
    assert projections() == pytest.approx(before)  # nothing remains


def test_an_edit_of_later_layers_moves_nothing(lm, factors, direction, questions):
    names = [name for name in factors.names if ".3." in name]
    edit = kfac.CurvatureEdit(factors, dict.fromkeys(names, 0.6))
    move = edit_moves_projection(lm, direction, edit, questions)["edit"]
    assert (move.memory.value, move.reasoning.value) == (0, 0)


def test_variants_of_an_edit_and_a_steering_run_in_a_comparison(lm, factors, direction):
    edit = kfac.CurvatureEdit(factors, 0.8)
    variants = edit_and_steer(edit, direction, 2.0, scope="last_prompt_token")
    assert list(variants) == ["edit", "edit + steer", "edit + random direction", "steer"]
    assert isinstance(variants["steer"], Steer)
    found = lirefs.compare(lm, variants, [tasks(lm)[-1]], resamples=10, progress=False)
    values = {name: found.cell(name, "read").value.value for name in found.variants}
    assert len(set(values.values())) == 5
