"""Small models, batches and references for the tests of kfac."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import kfac
from kfac.collection.sampling import RowSeeds, row_contents
from lirefs.model.weight_swap import originals_of

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "olmo2": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "qwen2": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "qwen3": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "gemma2": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "gemma3_text": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "mistral": (SMALL | HEADS, ["gate_proj", "up_proj"], ["down_proj"]),
    "phi3": (SMALL | HEADS | {"pad_token_id": 0}, ["gate_up_proj"], ["down_proj"]),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}, ["c_fc"], ["c_proj"]),
    "gpt_neox": (SMALL | {"num_attention_heads": 2}, ["dense_h_to_4h"], ["dense_4h_to_h"]),
    "opt": (
        {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "vocab_size": 50},
        ["fc1"],
        ["fc2"],
    ),
    "falcon": (
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50},
        ["dense_h_to_4h"],
        ["dense_4h_to_h"],
    ),
    "bloom": (
        {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50},
        ["dense_h_to_4h"],
        ["dense_4h_to_h"],
    ),
}
IDS = torch.randint(5, 50, (6, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = [9, 4, 7, 2, 9, 5]


def build(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family][0]))


def llama(dtype=torch.float64):
    return build("llama").to(dtype)


def batch(rows, side="right", extra=0, labels=None):
    """Pad the first LENGTHS[row] tokens of rows of IDS to one length."""
    width = max(LENGTHS[row] for row in rows) + extra
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    marks = torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        length = LENGTHS[row]
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[place, where] = IDS[row, :length]
        mask[place, where] = 1
        if labels is not None:
            marks[place, where] = labels[row, :length]
    result = {"input_ids": ids, "attention_mask": mask}
    return result if labels is None else result | {"labels": marks}


def collect(model, batches, targets=None, **kwargs):
    targets = targets or kfac.find_targets(model)
    kwargs.setdefault("dtype", torch.float64)
    return kfac.collect(model, batches, targets, progress=False, **kwargs)


def assert_same(one, two, tolerance=1e-6):
    assert one.names == two.names
    for name in one.names:
        assert one.count(name) == two.count(name)
        for a, b in ((one.A(name), two.A(name)), (one.G(name), two.G(name))):
            assert (a - b).norm() <= tolerance * a.norm()


def draws(batch, where=None, seed=0):
    """Return the uniform numbers that `collect` draws for one batch."""
    where = torch.ones(len(batch), dtype=torch.bool) if where is None else where
    return RowSeeds(seed).draw(row_contents(batch), where)[0]


class Deep(nn.Module):
    """A deep linear network; the last layer gives the logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in [(3, 4), (4, 5)]])

    def forward(self, x):
        return self.layers(x)


def mlp_forward(model, batch):
    return model(batch), torch.ones(len(batch), dtype=torch.bool)


def snapshot(model):
    return {
        name: (p.data_ptr(), p.detach().clone(), p.requires_grad)
        for name, p in model.named_parameters()
    }


def assert_restored(model, before):
    for name, p in model.named_parameters():
        pointer, value, flag = before[name]
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)
        assert p.requires_grad == flag
    assert not any(originals_of(p) for p in model.parameters())


def reference(factors, name, weight, keep):
    """The paper's formula with numpy, by sorting all pairs."""
    lam, u_out = np.linalg.eigh(factors.G(name).double().numpy())
    mu, u_in = np.linalg.eigh(factors.A(name).double().numpy())
    mass = np.outer(lam.clip(0), mu.clip(0))
    order = np.argsort(-mass.ravel(), kind="stable")
    running = np.cumsum(mass.ravel()[order])
    kept = order[: np.searchsorted(running, keep * running[-1]) + 1]
    mask = np.zeros(mass.size)
    mask[kept] = 1
    c = u_out.T @ weight.double().numpy() @ u_in
    return u_out @ (c * mask.reshape(mass.shape)) @ u_in.T
