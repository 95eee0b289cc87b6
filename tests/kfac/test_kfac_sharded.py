"""Models that FSDP2 shards over two processes: all is as in one process."""

import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from curvature_tools import assert_same, batch, build, llama
from processes import run
from tiny import fresh_model, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, MixtralConfig

import kfac
from kfac import CurvatureEdit, Factors
from kfac.collection.hooks import TargetTracker
from kfac.edits.baselines import SVDEdit
from kfac.factors.tensor_file import read_tensors
from lirefs.comparison.compare import compare
from lirefs.errors import (
    ChangedWeightsError,
    DistributedError,
    EditError,
    KfacError,
    NonFiniteError,
    ProvenanceError,
    SettingError,
    TargetError,
)
from lirefs.model.identity import fingerprint, first_difference, identity, parts_of
from lirefs.model.language_model import wrap
from lirefs.model.processes import heartbeat
from lirefs.model.weight_swap import gathered
from lirefs.tasks.task import ShortAnswer

# An odd number; one has a row less, and one no position that is counted.
ONE_TOKEN = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
BATCHES = [batch([0, 1]), batch([2]), batch([0, 4], "left", 1), ONE_TOKEN, batch([3])]


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = MixtralConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": lambda: llama(torch.float32),
    "gpt2": lambda: build("gpt2").eval(),
    "mixtral": mixtral,
}


FIVE = [*BATCHES[:3], BATCHES[4], BATCHES[0]]


def sharded(model, **policy):
    """Shard the blocks of a model, and the rest together, as guides do."""
    for block in getattr(model, "model", getattr(model, "transformer", None)).modules():
        if type(block).__name__.endswith(("DecoderLayer", "GPT2Block")):
            fully_shard(block, **policy)
    return fully_shard(model, **policy)


def factors_of(model, batches=BATCHES, correct=False, **kwargs):
    targets = kfac.find_targets(model, layers=[1], projections="mlp")
    factors = kfac.collect(
        model, batches, targets, marginals=True, diagonal=True, progress=False, **kwargs
    )
    return kfac.correct(model, batches, factors, progress=False) if correct else factors


def edits(factors):
    return {
        "kfac": CurvatureEdit(factors, 0.6),
        "ekfac": CurvatureEdit(factors, 0.6, estimator="ekfac"),
        "svd": SVDEdit(factors.names, 0.5),
        "both": CurvatureEdit(factors, 0.6) + SVDEdit(factors.names, 0.5),
        "head": SVDEdit(["lm_head"], 0.5),  # which a forward pass leaves whole
    }


def weights_of(model):
    return {name: gathered(one).detach().clone() for name, one in model.named_parameters()}


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).norm() <= 1e-6 * weight.norm(), name


def test_two_processes_do_what_one_does_after_a_kill_as_well(tmp_path):
    """One test, because it takes seconds to start a process."""
    for name, make in MODELS.items():
        factors_of(make(), correct=True).save(tmp_path / f"{name}.safetensors")
    factors_of(llama(torch.float32), FIVE).save(tmp_path / "five.safetensors")
    run(killed, tmp_path, exits=[0, 9])
    run(work, tmp_path)


def work(rank, folder):
    resumed(folder)
    hybrid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    policies = {"gpt2": {"reshard_after_forward": False}, "mixtral": {"mesh": hybrid}}
    for name, make in MODELS.items():
        one = Factors.load(f"{folder}/{name}.safetensors")
        model = sharded(make(), **policies.get(name, {}))
        check_factors(one, factors_of(model, correct=True))
        check_edits(one, make(), model)
    checkpoints(rank, folder)
    texts()
    failures(rank)
    training()
    refusals()
    other_ways()
    failure_inside_a_pass(rank)


def counted_adds(then=lambda calls: None):
    """Count the batches that are added to sums."""
    add, calls = TargetTracker.add, []

    def counted(self, draws):
        calls.append(draws)
        then(calls)
        add(self, draws)

    TargetTracker.add = counted
    return calls


def killed(rank, folder):
    """The second process ends in its second batch; the first has added its own by then."""

    def end(calls):
        while rank == 1 and len(calls) == 2:
            header, _ = read_tensors(Path(f"{folder}/state.0-of-2"), "kfac_checkpoint", "")
            if header["done"] >= 3:
                os._exit(9)
            time.sleep(0.05)

    added = counted_adds(end)
    settings = {"checkpoint": f"{folder}/state", "checkpoint_every": 0}
    heartbeat.EVERY = 0.1
    with pytest.raises(DistributedError, match="process 1 has given no sign of life"):
        factors_of(sharded(llama(torch.float32)), FIVE, **settings)
    assert added == [1, 1]
    os._exit(0)  # the group cannot be destroyed: one of it is gone


def resumed(folder):
    """Of batches 0 to 4 the processes lack 4 and 3; both run the rounds of 2 to 4."""
    added = counted_adds()
    found = factors_of(sharded(llama(torch.float32)), FIVE, checkpoint=f"{folder}/state")
    assert added == [1]
    one = Factors.load(f"{folder}/five.safetensors")
    assert_same(one, found)
    assert (one.tokens, one.records) == (found.tokens, found.records)


def check_factors(one, found):
    assert_same(one, found, 1e-6)
    assert (one.tokens, one.records) == (found.tokens, found.records)
    for name in one.names:
        for estimator in ("marginal", "diagonal"):
            a, b = (f.curvature(name, estimator).mass() for f in (one, found))
            assert (a - b).norm() <= 1e-6 * a.norm()
        # Eigenvectors of nearly equal eigenvalues may turn; the total does not depend on them.
        a, b = (f.curvature(name, "ekfac").total for f in (one, found))
        assert a == pytest.approx(b, rel=1e-6)


def check_edits(factors, plain, model):
    ids = BATCHES[0]["input_ids"]
    before, identities = weights_of(model), (identity(model), identity(plain))
    pointers = [one.to_local().data_ptr() for one in model.parameters()]
    unedited = fingerprint(model)
    assert unedited == fingerprint(plain)
    for edit in edits(factors).values():
        with edit.apply(plain), edit.apply(model):
            assert_close(weights_of(plain), weights_of(model))
            assert fingerprint(model) == fingerprint(plain) != unedited
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        after = weights_of(model)
        assert all(torch.equal(one, after[name]) for name, one in before.items())
        assert (identity(model), identity(plain)) == identities
    assert [one.to_local().data_ptr() for one in model.parameters()] == pointers
    edit = edits(factors)["kfac"]
    reports = [edit.bake_in_turn(one) for one in (plain, model)]
    assert [one.pairs for one in reports[0]] == [one.pairs for one in reports[1]]
    assert_close(weights_of(plain), weights_of(model))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def checkpoints(rank, folder):
    """One process is ahead by a whole pass: it runs along, and counts nothing twice."""
    settings = {"budget": 32_000, "checkpoint": f"{folder}/two", "samples": 2}
    model = sharded(llama(torch.float32))
    whole = factors_of(model, **settings)
    if rank == 1:
        Path(f"{folder}/two.1-of-2").unlink()
    again = factors_of(model, **settings)
    assert_same(whole, factors_of(model, samples=2))
    assert_same(whole, again)
    assert whole.tokens == again.tokens


def failures(rank):
    """What fails in one process ends all, and says in which; the model can be used again."""
    model = sharded(llama(torch.float32))
    own = [batch([row]) for row in range(5)]

    def broken_in_the_second(model, given):
        logits = model(given["input_ids"]).logits
        broken = torch.equal(given["input_ids"], own[1]["input_ids"])
        return logits + float("nan") if broken else logits, given["attention_mask"].bool()

    expected = NonFiniteError if rank == 1 else DistributedError
    with pytest.raises(expected, match=r"batch 1.*the logits hold"):
        factors_of(model, own, forward=broken_in_the_second)
    # The first has as many rounds as batches are the same, and then waits for no one.
    for given in (own[: 5 - 2 * rank], own[rank:], own[: 4 + rank]):
        with pytest.raises(DistributedError, match="differ in batches"):
            factors_of(model, given)
    assert_same(factors_of(model, own), factors_of(llama(torch.float32), own))


def failure_inside_a_pass(rank):
    """The other process waits for weights that never come, and is freed; the groups are lost."""
    model = sharded(llama(torch.float32))

    mlp = type(model.model.layers[1].mlp)
    forward = mlp.forward

    def broken(self, hidden):
        if rank == 1 and torch.is_grad_enabled():  # and not where the model is tried out
            raise MemoryError("no memory for this layer")
        return forward(self, hidden)

    expected, begun = (MemoryError if rank == 1 else DistributedError), time.monotonic()
    with (
        mock.patch.object(mlp, "forward", broken),
        pytest.raises(expected, match="no memory for this layer"),
    ):
        factors_of(model)
    assert time.monotonic() - begun < 30


def training():
    """A collection before the first step leaves no trace in training, mixed precision included."""
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)}
    models = [sharded(llama(torch.float32), **policy) for _ in range(2)]
    factors_of(models[0])
    assert identity(models[0]) == identity(models[1]) != identity(sharded(llama(torch.float32)))
    for model in models:
        model(BATCHES[0]["input_ids"]).logits.square().sum().backward()
        assert all(one.requires_grad for one in model.parameters())
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one.grad.to_local(), two.grad.to_local())
    parts = parts_of(models[0])
    models[0](BATCHES[0]["input_ids"])  # leaves whole weights behind
    assert not first_difference(parts, parts_of(models[0]))


def texts():
    """Whether a model may be padded is found out by running it, in all processes."""
    some = ["Dan Reed lives in Paris.", "Paris", "17 + 4 = 21", "a", "bc"]
    models = fresh_model("llama"), sharded(fresh_model("llama"))
    lms = [wrap(model, tiny_tokenizer(), name="tiny") for model in models]
    one, found = (kfac.collect(lm, some, layers=[1], batch_tokens=16, progress=False) for lm in lms)
    assert_same(one, found)
    with pytest.raises(SettingError, match="its own items"):
        compare(lms[1], {}, [ShortAnswer("sums", [("a", "17 + 4 =", ["21"])])], progress=False)


def refusals():
    """What cannot be done on a sharded model is refused by name, and it stays as it was."""
    model = sharded(llama(torch.float32))
    factors = factors_of(model)
    with pytest.raises(KfacError, match="labels='exact' takes a different number"):
        factors_of(model, labels="exact")
    with pytest.raises(KfacError, match="before it is sharded"):
        kfac.plan(kfac.find_targets(model), model=model)
    with pytest.raises(EditError, match="in one process"):
        kfac.loss_slices(model, BATCHES, factors, factors.names[0])
    with (
        pytest.raises(EditError, match="in one process"),
        kfac.projected_training(model, factors, 0.5),
    ):
        pass
    handle = CurvatureEdit(factors, 0.6).attach(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.to_local().add_(1)
    with pytest.raises(ChangedWeightsError, match="up_proj"):
        handle.remove()
    handle.remove(discard=True)
    assert fingerprint(model) == fingerprint(llama(torch.float32))


def other_ways():
    """FSDP1 and tensor parallelism are refused by name."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    plan = {"lm_head": ColwiseParallel()}
    by_tensor, both = (
        parallelize_module(llama(torch.float32), mesh["tensor"], plan) for _ in range(2)
    )
    fully_shard(both, mesh=mesh["data"])
    flat = FullyShardedDataParallel(llama(torch.float32), device_id=torch.device("cpu"))
    tensors = r"parameter lm_head.weight is sharded, and not by FSDP2 alone"
    for model, why in ((by_tensor, tensors), (both, tensors), (flat, "FSDP1.*fully_shard")):
        for call in (kfac.find_targets, lambda model: kfac.collect(model, BATCHES, [])):
            with pytest.raises(TargetError, match=why):
                call(model)
        with pytest.raises(ProvenanceError, match=why):
            fingerprint(model)
