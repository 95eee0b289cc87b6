import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Directions, wrap
from lirefs.errors import DirectionsFileError, ProvenanceError


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
