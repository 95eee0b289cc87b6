"""What is done to a model while a removable edit is attached: never thrown away by half."""

import copy

import pytest
import torch
from curvature_tools import assert_restored, batch, build, collect, llama, snapshot
from tiny import fresh_model
from torch.nn.utils import parametrize, prune

import kfac
from kfac import CurvatureEdit, MagnitudeEdit, SVDEdit
from kfac.edits.weight_edit import WeightEdit
from lirefs.errors import ChangedWeightsError, EditOrderError, SettingError
from lirefs.model.weight_swap import is_edited, originals_of

IDS = batch([0, 4])
NAMES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def edit(kind="svd"):
    return (SVDEdit if kind == "svd" else MagnitudeEdit)(NAMES, 0.5)


def weight(model, name=NAMES[0]):
    return model.get_parameter(f"{name}.weight")


def train(model, optimizer=torch.optim.SGD, **settings):
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    optimizer(model.parameters(), **{"lr": 1.0} | settings).step()


def clip(model):
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)  # which no version counter sees


def permute(model):
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.flip(0))  # whose sum is the same


def load(model, assign=False):
    torch.manual_seed(7)
    other = {name: torch.randn_like(one) for name, one in model.state_dict().items()}
    model.load_state_dict(other, assign=assign)


CHANGES = {
    "sgd": train,
    "adamw": lambda model: train(model, torch.optim.AdamW, lr=0.1),
    "fused adam": lambda model: train(model, torch.optim.Adam, lr=0.1, fused=True),
    "clip": clip,
    "permute": permute,
    "load": load,
    "load, assigned": lambda model: load(model, assign=True),
    "new data": lambda model: setattr(weight(model), "data", torch.zeros_like(weight(model))),
    "half, and trained": lambda model: train(model.bfloat16()),
    "prune": lambda model: prune.l1_unstructured(
        model.get_submodule(NAMES[1]), "weight", amount=0.5
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_not_thrown_away(change):
    model = llama(torch.float32)
    originals = {name: weight(model, name).detach().clone() for name in NAMES}
    handle = edit().attach(model)
    CHANGES[change](model)
    changed = {name: one.detach().clone() for name, one in model.named_parameters()}
    with pytest.raises(
        ChangedWeightsError, match=r"changed while.*remove\(discard=True\)"
    ) as caught:
        handle.remove()
    assert "\n" not in str(caught.value)
    assert caught.value.handle is handle
    for name, one in model.named_parameters():  # nothing was restored, not even by half
        assert torch.equal(one, changed[name])
    handle.remove(discard=True)
    handle.remove()
    for name in NAMES:
        module = model.get_submodule(name)
        found = module.weight_orig if hasattr(module, "weight_orig") else module.weight
        assert torch.equal(found, originals[name].to(found.dtype))
    assert not any(originals_of(parameter) for parameter in model.parameters())
    if change != "prune":
        edit().attach(model).remove()  # the model is free again


def interrupted(model):
    with edit("magnitude").apply(model):
        weight(model).data += 1
        raise KeyboardInterrupt


def test_the_error_of_a_with_block_holds_the_handle():
    model = llama(torch.float32)
    before = weight(model).detach().clone()
    with pytest.raises(ChangedWeightsError, match="of 1 more") as caught, edit().apply(model):
        train(model)
    assert is_edited(model)
    assert torch.equal(originals_of(weight(model))[0], before)
    with pytest.raises(ChangedWeightsError) as second:
        interrupted(model)
    assert isinstance(second.value.__context__, KeyboardInterrupt)
    with pytest.raises(EditOrderError):
        caught.value.handle.remove(discard=True)
    second.value.handle.remove(discard=True)
    caught.value.handle.remove(discard=True)
    assert torch.equal(weight(model), before)


@pytest.mark.parametrize("composed", [False, True])
def test_other_weights_may_be_trained_under_an_edit(composed):
    model = llama(torch.float32)
    before = {name: weight(model, name).detach().clone() for name in NAMES}
    for name in NAMES:
        weight(model, name).requires_grad_(False)
    attached = (edit() + edit("magnitude") if composed else edit()).attach(model)
    head = model.lm_head.weight.detach().clone()
    train(model, torch.optim.AdamW, lr=0.1)
    attached.remove()
    assert not torch.equal(model.lm_head.weight, head)
    assert all(torch.equal(weight(model, name), before[name]) for name in NAMES)
    assert model.lm_head.weight.grad is not None  # gradients are the caller's


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to float16", "new parameters"])
def test_a_cast_under_an_edit_holds_for_the_originals(cast, twice):
    casts = {
        "half": lambda model: model.half(),
        "bfloat16": lambda model: model.bfloat16(),
        "double": lambda model: model.double(),
        "to float16": lambda model: model.to(torch.float16),
        "new parameters": lambda model: model.bfloat16(),
    }
    expected = casts[cast](llama(torch.float32)).state_dict()
    model = llama(torch.float32)
    handles = [edit().attach(model)] + [edit("magnitude").attach(model) for _ in range(twice)]
    torch.__future__.set_overwrite_module_params_on_conversion(cast == "new parameters")
    try:
        casts[cast](model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert not torch.equal(weight(model), expected[f"{NAMES[0]}.weight"])
    if cast == "new parameters" and twice:
        handles[-1].remove()
        handles[0].remove()
    else:
        for handle in reversed(handles):
            handle.remove()
    for name, found in model.state_dict().items():
        assert found.dtype == expected[name].dtype
        assert torch.equal(found, expected[name])
    train(model.float())


def test_there_and_back_is_a_change():
    model = llama(torch.float32)
    handle = edit().attach(model)
    model.half().float()  # the rest of the model is rounded now
    with pytest.raises(ChangedWeightsError):
        handle.remove()
    handle.remove(discard=True)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_stacks_of_experts_and_transposed_weights(family):
    model = build(family) if family == "gpt2" else _mixtral()
    targets = kfac.find_targets(model, layers=[0], projections="mlp_out")
    factors = collect(model, [batch(range(6))], targets)
    before = snapshot(model)
    with CurvatureEdit(factors, 0.5).apply(model):
        pass
    assert_restored(model, before)
    handle = CurvatureEdit(factors, 0.5).attach(model)
    targets[0].parameter.data.mul_(2.0)
    with pytest.raises(ChangedWeightsError, match=r"(layers|h)\.0"):
        handle.remove()
    handle.remove(discard=True)
    assert_restored(model, before)


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


class Given(WeightEdit):
    """An edit that hands out tensors of its own, as it has them."""

    kind = "given"

    def __init__(self, weights):
        self.weights = weights

    def prepare(self, model):
        targets = kfac.named_targets(model, list(self.weights))
        return [(target, self.weights[target.name]) for target in targets]

    def describe(self):
        return {"kind": self.kind}


@pytest.mark.parametrize("own", ["cached", "the weight itself", "bake"])
def test_training_under_an_edit_does_not_reach_tensors_of_others(own):
    model = llama(torch.float32)
    given = weight(model).detach() if own == "the weight itself" else torch.ones(24, 16)
    kept = given.clone()
    if own == "bake":
        Given({NAMES[0]: given}).bake(model)
        weight(model).data.zero_()
    else:
        handle = Given({NAMES[0]: given}).attach(model)
        weight(model).data.zero_()
        with pytest.raises(ChangedWeightsError):
            handle.remove()
        handle.remove(discard=True)
    assert torch.equal(given, kept)


def test_copies_of_an_edited_model_keep_the_edit(tmp_path):
    model = llama(torch.float32)
    before = snapshot(model)
    with edit().apply(model):
        edited = weight(model).detach().clone()
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    assert_restored(model, before)
    assert torch.equal(weight(twin), edited)
    assert torch.equal(weight(type(model).from_pretrained(tmp_path)), edited)
    assert not is_edited(twin)
    train(twin)  # shares nothing with the model
    assert_restored(model, before)


@pytest.mark.parametrize("way", ["attach", "bake", "composition"])
def test_an_edit_in_inference_mode_leaves_a_model_that_can_be_trained(way):
    model = llama(torch.float32)
    before = snapshot(model)
    with torch.inference_mode():
        one = edit() + edit("magnitude") if way == "composition" else edit()
        handle = None if way == "bake" else one.attach(model)
        if way == "bake":
            one.bake(model)
    assert not any(one.is_inference() for p in model.parameters() for one in (p, p.data))
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    with torch.inference_mode():
        model(**IDS)
        if handle is not None:
            handle.remove()
            assert_restored(model, before)
    train(model)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_made_in_inference_mode(inside):
    with torch.inference_mode():
        model = llama(torch.float32)
        expected = model(**IDS).logits
    with torch.inference_mode(inside), torch.no_grad():
        with edit().apply(model):
            assert not torch.equal(model(**IDS).logits, expected)
        assert torch.equal(model(**IDS).logits, expected)
    with torch.inference_mode(inside), pytest.raises(SettingError, match="inference_mode"):
        collect(model, [IDS])


@pytest.mark.parametrize("inside", [False, True])
def test_batches_made_in_inference_mode(inside):
    model = llama()
    expected = collect(model, [IDS]).digest
    with torch.inference_mode():
        made = {name: one.clone() for name, one in IDS.items()}
    with torch.inference_mode(inside):
        assert collect(model, [made]).digest == expected
    embedded = model.get_input_embeddings()(IDS["input_ids"]).detach()
    mask = IDS["attention_mask"].bool()

    def forward(model, inputs):  # floats, which the backward pass needs again
        return model(inputs_embeds=inputs * inputs.sigmoid()).logits, mask

    def factors(inputs):
        return kfac.collect(model, [inputs], layers=[1], forward=forward, progress=False)

    with torch.inference_mode():
        made = embedded.clone()
    with torch.inference_mode(inside):
        assert factors(made).digest == factors(embedded).digest


def test_parametrized_weights_are_refused_before_and_seen_after():
    model = llama(torch.float32)
    handle = edit().attach(model)
    parametrize.register_parametrization(model.get_submodule(NAMES[0]), "weight", torch.nn.Tanh())
    with pytest.raises(ChangedWeightsError):
        handle.remove()
    handle.remove(discard=True)


def test_a_copied_block_in_place_of_an_edited_one_is_not_taken_for_restored():
    model = fresh_model("llama")
    targets = kfac.find_targets(model, layers=[1])
    edit = kfac.SVDEdit([target.name for target in targets], 0.5)
    handle = edit.attach(model)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    with pytest.raises(ChangedWeightsError):
        handle.remove()
    handle.remove(discard=True)
