import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Directions, wrap
from lirefs.errors import DirectionError, DirectionsFileError, ProvenanceError


def some():
    generator = torch.Generator().manual_seed(0)
    items = {
        (layer, "resid_pre"): Direction(
            torch.randn(32, generator=generator), layer, "resid_pre", (0.1, 0.2), (1.0, 2.0), (3, 4)
        )
        for layer in range(3)
    }
    return Directions(items, {"model": "abc", "model_name": "m"})


def test_round_trip_keeps_everything(tmp_path):
    directions = some()
    directions.save(tmp_path / "d.safetensors")
    loaded = Directions.load(tmp_path / "d.safetensors")
    assert list(loaded) == list(directions)
    assert loaded.provenance == directions.provenance
    for place, one in directions.items():
        assert torch.equal(loaded[place].vector, one.vector)
        assert (loaded[place].means, loaded[place].spread) == (one.means, one.spread)
        assert (loaded[place].counts, loaded[place].site) == (one.counts, one.site)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_lookup_by_layer_or_place():
    directions = some()
    assert directions[1] is directions[1, "resid_pre"]
    with pytest.raises(KeyError):
        directions[7]


def test_projection_and_random_control():
    one = some()[0]
    assert one.project(one.vector) == pytest.approx(one.norm)
    control = one.random_like(3)
    assert control.norm == pytest.approx(one.norm)
    assert torch.equal(control.vector, one.random_like(3).vector)
    assert not torch.equal(control.vector, one.random_like(4).vector)


def test_another_model_is_refused(tmp_path):
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    directions = some()
    directions.provenance["model"] = lm.fingerprint
    directions.save(tmp_path / "d.safetensors")
    Directions.load(tmp_path / "d.safetensors", lm)
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ProvenanceError, match="another model"):
        Directions.load(tmp_path / "d.safetensors", lm)
    Directions(dict(some())).save(tmp_path / "unknown.safetensors")
    with pytest.raises(ProvenanceError, match=r"does not say .* Directions\.load\(path\)"):
        Directions.load(tmp_path / "unknown.safetensors", lm)
    assert Directions.load(tmp_path / "unknown.safetensors")


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "d.safetensors"
    some().save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[:-5], b"not safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(DirectionsFileError):
            Directions.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(DirectionsFileError, match="not a file of directions"):
        Directions.load(path)
    save_file(
        {"x": torch.zeros(2)},
        path,
        {"format": "lirefs-directions-1", "provenance": "{}", "places": json.dumps([{}])},
    )
    with pytest.raises(DirectionsFileError, match="cannot be read"):
        Directions.load(path)
    with pytest.raises(DirectionsFileError, match="no such file"):
        Directions.load(tmp_path / "absent.safetensors")


PLACE = {"layer": 0, "site": "resid_pre", "means": [0, 1], "spread": [1, 1], "counts": [2, 2]}


@pytest.mark.parametrize(
    ("vector", "places", "provenance", "says"),
    [
        (torch.ones(4), "[" * 100_000, "{}", "nested too deep"),
        (torch.ones(4), [PLACE], "1", "not an object"),
        (torch.ones(4), [PLACE, PLACE], "{}", "two directions of the same place"),
        (torch.ones(4), [], "{}", "no direction"),
        (torch.ones(4), [{**PLACE, "layer": True}], "{}", "layer True"),
        (torch.ones(4), [{**PLACE, "layer": -1}], "{}", "layer -1"),
        (torch.ones(4), [{**PLACE, "site": "nowhere"}], "{}", "nowhere"),
        (torch.ones(4), [{**PLACE, "means": [0, float("nan")]}], "{}", "two numbers"),
        (torch.ones(4), [{**PLACE, "spread": [1]}], "{}", "two numbers"),
        (torch.ones(4), [{**PLACE, "counts": [1, -2]}], "{}", "counts"),
        (torch.ones(4).double(), [PLACE], "{}", "not a vector of float32"),
        (torch.ones(2, 2), [PLACE], "{}", "not a vector of float32"),
        (torch.tensor([1.0, torch.inf]), [PLACE], "{}", "not finite"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, vector, places, provenance, says):
    text = places if isinstance(places, str) else json.dumps(places)
    about = {"format": "lirefs-directions-1", "provenance": provenance, "places": text}
    save_file({"0.resid_pre": vector}, tmp_path / "d", about)
    with pytest.raises(DirectionsFileError, match=says):
        Directions.load(tmp_path / "d")


def test_arithmetic_is_that_of_vectors():
    one = some()[0]
    two = Direction(torch.arange(32.0), 0, "resid_pre", (0.5, 0.6), (1.0, 1.0), (5, 5))
    assert torch.equal((one + two).vector, one.vector + two.vector)
    assert torch.equal((one - two).vector, one.vector - two.vector)
    assert torch.equal((2 * one).vector, (one * 2.0).vector)
    torch.testing.assert_close((one / 4).vector, one.vector / 4)
    assert one.normalized().norm == pytest.approx(1)
    rest = one.project_off(two)
    assert abs(float(rest.vector @ two.unit)) < 1e-5
    torch.testing.assert_close(rest.vector + float(one.vector @ two.unit) * two.unit, one.vector)
    torch.testing.assert_close(one.project_off(two * 0).vector, one.vector)
    mean = Direction.mean_of([one, two, one])
    torch.testing.assert_close(mean.vector, (2 * one.vector + two.vector) / 3)
    assert (mean.layer, mean.site, mean.counts) == (0, "resid_pre", (0, 0))


def test_what_was_measured_follows_the_unit_vector():
    one = some()[0]
    assert (3 * one).means == one.means
    assert (-one).means == (-one.means[0], -one.means[1])
    assert one.normalized().counts == one.counts
    assert (one + one).counts == (0, 0)
    assert (one * 0).counts == (0, 0)


def test_what_does_not_fit_is_refused():
    one = some()[0]
    for wrong in [
        lambda: one + some()[1],
        lambda: one - Direction(torch.ones(8), 0),
        lambda: one.project_off(Direction(torch.ones(32), 0, model="another")),
        lambda: one / 0,
        lambda: Direction.mean_of([]),
        lambda: Directions({(1, "resid_pre"): one}),
        lambda: Directions({(0, "resid_post"): one}),
    ]:
        with pytest.raises(DirectionError):
            wrong()
    for wrong in (lambda: one + 1.0, lambda: one - 1.0, lambda: one * one, lambda: one / "2"):
        with pytest.raises(TypeError):
            wrong()
