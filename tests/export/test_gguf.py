import dataclasses
import struct

import gguf
import numpy as np
import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Directions, Steer, load, wrap
from lirefs.errors import (
    BackendError,
    DirectionsFileError,
    InterventionError,
    LayoutError,
    ModelLoadError,
    ProvenanceError,
    SettingError,
)
from lirefs.export.gguf import from_gguf, to_gguf
from lirefs.model import layout_search
from lirefs.steering.scope import generated


def direction(layer=2, site="resid_pre", width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Direction(torch.randn(width, generator=generator), layer, site)


def logits(lm, steer):
    tokens = torch.tensor(lm.encode(["a prompt"]))
    with torch.no_grad(), steer.apply(lm.model):
        return lm.model(tokens).logits


@pytest.mark.parametrize(
    ("layer", "site", "block"),
    [(2, "resid_pre", 1), (3, "resid_post", 3), (1, "resid_post", 1), (2, "mlp_out", 2)],
)
def test_what_is_read_back_steers_like_what_was_written(lm, tmp_path, layer, site, block):
    one = direction(layer, site)
    to_gguf(Steer(one, "add", -1.5), tmp_path / "c.gguf", lm)
    back = from_gguf(tmp_path / "c.gguf")
    assert list(back) == [(block, "resid_post")]
    torch.testing.assert_close(
        logits(lm, Steer(back, "add")), logits(lm, Steer(one, "add", -1.5)), atol=1e-5, rtol=1e-5
    )


def test_what_llama_cpp_and_other_readers_look_for_is_in_the_file(lm, tmp_path):
    to_gguf(direction(3), tmp_path / "c.gguf", lm)
    reader = gguf.GGUFReader(tmp_path / "c.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 1
    (tensor,) = reader.tensors
    assert tensor.name == "direction.2"
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_allclose(tensor.data, direction(3).vector.numpy(), rtol=1e-6)


def test_directions_that_meet_at_one_block_are_summed(lm, tmp_path):
    both = Directions(
        {(2, "resid_pre"): direction(2), (1, "resid_post"): direction(1, "resid_post", seed=1)}
    )
    to_gguf(both, tmp_path / "c.gguf", lm)
    back = from_gguf(tmp_path / "c.gguf")
    expected = direction(2).vector + direction(1, seed=1).vector
    torch.testing.assert_close(back[1].vector, expected)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (Steer(direction(1), "add"), "block 1 and later"),
        (Steer(direction(0, "resid_post"), "add"), "block 1 and later"),
        (Steer(direction(2, "attn_out"), "add"), "attn_out"),
        (Steer(direction(2), "ablate"), "baked"),
        (Steer(direction(2), "add", scope=generated()), "every token"),
        (Steer(direction(2), "add", 0.0), "strength is 0"),
    ],
)
def test_what_cannot_be_written_says_so_and_leaves_no_file(lm, tmp_path, steer, message):
    with pytest.raises(BackendError, match=message):
        to_gguf(steer, tmp_path / "c.gguf", lm)
    assert not list(tmp_path.glob("*.gguf"))


def test_another_width_is_refused(lm, tmp_path):
    with pytest.raises(InterventionError, match="width"):
        to_gguf(direction(width=16), tmp_path / "c.gguf", lm)


def test_another_model_and_places_that_are_not_there_are_refused(lm, tmp_path, monkeypatch):
    file = tmp_path / "c.gguf"
    with pytest.raises(ProvenanceError, match="another model"):
        to_gguf(dataclasses.replace(direction(), model="f" * 64), file, lm)
    to_gguf(dataclasses.replace(direction(), model=lm.fingerprint), file, lm)
    file.unlink()
    with pytest.raises(SettingError, match="site must be"):
        to_gguf(direction(site="resid_mid"), file, lm)
    without = dataclasses.replace(lm.layout, mlp=(None,) * lm.n_layers)
    monkeypatch.setitem(layout_search._LAYOUTS, lm.model, without)
    with pytest.raises(LayoutError, match="mlp_out is not available"):
        to_gguf(direction(site="mlp_out"), file, lm)
    assert not file.exists()


def test_other_files_are_named(lm, tmp_path):
    with pytest.raises(DirectionsFileError, match="no such file"):
        from_gguf(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a control vector")
    with pytest.raises(DirectionsFileError, match="cannot be read"):
        from_gguf(tmp_path / "text.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(DirectionsFileError):
        from_gguf(tmp_path / "empty.gguf")
    to_gguf(direction(), tmp_path / "c.gguf", lm)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "c.gguf").read_bytes()[:-64])
    with pytest.raises(DirectionsFileError):
        from_gguf(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DirectionsFileError, match="not a control vector"):
        from_gguf(tmp_path / "model.gguf")


def test_strengths_by_layer_are_written(tmp_path):
    lm = wrap(fresh_model("gpt2"), tiny_tokenizer())
    steer = Steer(direction(2), "add", {2: 1.0, 3: -2.0}, layers=[2, 3])
    to_gguf(steer, tmp_path / "c.gguf", lm)
    back = from_gguf(tmp_path / "c.gguf")
    torch.testing.assert_close(back[2].vector, -2 * back[1].vector)


def test_a_list_longer_than_its_file_is_refused_at_once(tmp_path):
    path = tmp_path / "c.gguf"
    entry = struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 2**60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with pytest.raises(DirectionsFileError, match="lists that are too long"):
        from_gguf(path)
    with pytest.raises(ModelLoadError, match="lists that are too long"):
        load(path)


def test_lists_of_lists_are_refused(tmp_path):
    lists = struct.pack("<IQ", 9, 1) * 5_000
    entry = struct.pack("<Q1sI", 1, b"x", 9) + lists
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with pytest.raises(DirectionsFileError, match="list of lists"):
        from_gguf(tmp_path / "c.gguf")


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("direction.2", gguf.GGMLQuantizationType.Q8_0, "quantized"),
        ("direction.\u0663", gguf.GGMLQuantizationType.F32, "unexpected tensor"),
        ("direction." + "9" * 5_000, gguf.GGMLQuantizationType.F32, "unexpected tensor"),
    ],
)
def test_only_numbered_floats_are_directions(tmp_path, name, kind, says):
    writer = gguf.GGUFWriter(str(tmp_path / "c.gguf"), "controlvector")
    data = gguf.quants.quantize(np.ones(32, np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DirectionsFileError, match=says):
        from_gguf(tmp_path / "c.gguf")
