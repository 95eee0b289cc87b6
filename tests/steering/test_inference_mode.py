"""What is made or attached in inference mode works outside it, and the reverse."""

import pytest
import torch
from steering_tools import IDS
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Gate, Schedule, Steer, prompt_lengths, wrap
from lirefs.steering import scope as scopes

PROBE = Direction(torch.ones(32), 0)
WAYS = {
    "add": ("add", {}),
    "ablate": ("ablate", {}),
    "clamp": ("clamp", {"strength": 2.0}),
    "rows": ("amplify", {"strength": [0.5]}),
    "schedule": ("norm_preserving_add", {"strength": Schedule([1.0, 0.5])}),
    "function": ("amplify", {"strength": lambda index: 1.0}),
    "mask": ("add", {"scope": scopes.mask([True, False, True, True, False, False])}),
    "token gate": ("ablate_then_add", {"gate": Gate(PROBE, 0.0)}),
    "row gate": ("amplify", {"gate": Gate(PROBE, 0.0, per="row")}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_mode_does_not_matter(way):
    operator, settings = WAYS[way]
    model = fresh_model("llama")
    lm = wrap(model, tiny_tokenizer())
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    found = []
    for made, attached in [(False, False), (True, False), (False, True), (True, True)]:
        model.zero_grad()
        with torch.inference_mode(made):
            steer = Steer(Direction(vector.clone(), 1), operator, **{"strength": 1.0, **settings})
            lengths = torch.tensor([4])
        if operator == "ablate":
            steer = Steer(Direction(vector.clone(), 1), operator)
        with torch.inference_mode(attached):
            handle = steer.attach(model)
            if way != "mask":
                lm.generate("abc", max_new_tokens=3)
                model(IDS)
        with prompt_lengths(lengths):
            model(IDS, use_cache=False).logits[0, -1].log_softmax(-1)[3].backward()
        with torch.inference_mode(), prompt_lengths(lengths):
            inside = model(IDS, use_cache=False).logits
        with torch.no_grad(), prompt_lengths(lengths):
            torch.testing.assert_close(inside, model(IDS, use_cache=False).logits)
        handle.remove()
        found.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
    for one in found[1:]:
        assert torch.equal(one, found[0])
    assert bool(found[0].any())
