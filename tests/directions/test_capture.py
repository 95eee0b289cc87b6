import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, fresh_model, tiny_model, tiny_tokenizer

from lirefs import capture, wrap
from lirefs.errors import CaptureError, LayoutError

PROMPTS = ["one", "a much longer prompt than that", "Q: why?", "0123456789"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_output_hidden_states_of_single_prompts(family, side):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    states = capture(lm, PROMPTS, batch_tokens=64, padding_side=side, progress=False)
    positions = capture(
        lm, PROMPTS, layers=[2], positions=[0, 1, -2], padding_side=side, progress=False
    )
    for row, ids in enumerate(lm.encode(PROMPTS)):
        with torch.no_grad():
            reference = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in range(lm.n_layers):
            expected = reference[layer][0, -1]
            torch.testing.assert_close(states[layer][row], expected, atol=1e-5, rtol=1e-5)
        expected = reference[2][0, [0, 1, -2]]
        torch.testing.assert_close(positions[2][row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_add_up_to_the_residual_stream(family):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    states = capture(lm, PROMPTS, sites=sites, progress=False)
    for layer in range(lm.n_layers):
        pre, attention, mlp, post = (states[layer, site] for site in sites)
        torch.testing.assert_close(pre + attention + mlp, post, atol=1e-4, rtol=1e-4)
        if layer + 1 < lm.n_layers:
            torch.testing.assert_close(states[layer + 1, "resid_pre"], post)


def test_last_layer_is_the_raw_block_output(lm):
    last = lm.n_layers - 1
    raw = capture(lm, PROMPTS, layers=[last], sites=["resid_post"], progress=False)[last]
    ids = torch.tensor(lm.encode(PROMPTS[:1]))
    with torch.no_grad():
        normed = lm.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(lm.model.model.norm(raw[0]), normed)
    assert (raw[0] - normed).norm() > 0.1


def test_forward_stops_after_the_last_needed_block(lm):
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in lm.model.named_modules()
        if name in ("model.layers.0", "model.layers.1", "model.layers.2", "lm_head")
    ]
    try:
        capture(lm, PROMPTS, layers=[1], sites=["resid_post"], progress=False)
        assert set(ran) == {"model.layers.0", "model.layers.1"}
    finally:
        for hook in hooks:
            hook.remove()


def test_order_is_restored_for_any_batch_size(lm):
    prompts = [letter * length for letter, length in zip("abcdefgh", [3, 9, 1, 7, 30, 2, 8, 5])]
    one = capture(lm, prompts, batch_tokens=1, progress=False).values
    for budget in (16, 64, 4096):
        many = capture(lm, prompts, batch_tokens=budget, progress=False).values
        torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-5)


def test_leaves_no_trace():
    model = fresh_model("llama").train()
    lm = wrap(model, tiny_tokenizer())
    capture(lm, PROMPTS, progress=False)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(CaptureError):
        capture(lm, PROMPTS, positions=99, progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_cache_is_used_for_the_same_model_only(tmp_path, lm, monkeypatch):
    first = capture(lm, PROMPTS, cache=tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(lm, "pad", None)  # no batch is made
        again = capture(lm, PROMPTS, cache=tmp_path, progress=False)
    assert torch.equal(first.values, again.values)
    changed = fresh_model("llama")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    capture(wrap(changed, tiny_tokenizer()), PROMPTS, cache=tmp_path, progress=False)
    (file, _) = sorted(tmp_path.iterdir())
    whole = load_file(file)["values"]
    for damage in (
        lambda: file.write_bytes(file.read_bytes()[:20]),
        lambda: save_file({"values": whole[:1]}, file),
        lambda: save_file({"values": whole.double()}, file),
        lambda: save_file({"values": whole * torch.nan}, file),
    ):
        damage()  # a damaged file is made again
        torch.testing.assert_close(
            capture(lm, PROMPTS, cache=tmp_path, progress=False).values, first.values
        )


def test_named_errors(lm):
    with pytest.raises(CaptureError, match="no prompts"):
        capture(lm, [], progress=False)
    with pytest.raises(CaptureError, match="layer 9 does not exist"):
        capture(lm, PROMPTS, layers=[9], progress=False)
    with pytest.raises(CaptureError, match="prompt 0 has 4 token"):
        capture(lm, PROMPTS, positions=-5, progress=False)
    with pytest.raises(CaptureError, match="nothing to capture"):
        capture(lm, PROMPTS, layers=[], progress=False)
    broken = fresh_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    broken_lm = wrap(tiny_model("llama"), tiny_tokenizer())
    broken_lm.model = broken
    with pytest.raises(CaptureError, match="prompt 0, layer 2, resid_pre"):
        capture(broken_lm, PROMPTS, progress=False)


def test_missing_site_is_an_error():
    lm = wrap(tiny_model("llama"), tiny_tokenizer())
    from dataclasses import replace

    lm.layout = replace(lm.layout, attention=(None,) * lm.n_layers)
    with pytest.raises(LayoutError):
        capture(lm, PROMPTS, sites=["attn_out"], progress=False)


@pytest.mark.gpu
def test_capture_on_a_gpu_agrees_with_the_cpu():
    model = fresh_model("llama")
    expected = capture(wrap(model, tiny_tokenizer()), PROMPTS, progress=False).values
    found = capture(wrap(model.cuda(), tiny_tokenizer()), PROMPTS, progress=False).values
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_string_is_not_taken_for_a_list_of_characters(lm):
    with pytest.raises(CaptureError, match=r"got one string: use \['some text'\]"):
        capture(lm, "some text", progress=False)
