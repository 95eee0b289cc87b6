"""Capture and steering with peers that need older packages; runs in a separate environment."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from measuring import measure, versions

PACKAGES = {"steering-vectors": "steering-vectors==0.12.2", "repeng": "repeng==0.4.0"}


def work(name: str, folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Time capture and generation inside the peers' environment, and plain generation."""
    # The older transformers there does not know the tokenizer class named in the folder.
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    layers = list(range(model.config.num_hidden_layers))
    vector = torch.ones(model.config.hidden_size) / model.config.hidden_size**0.5
    batch = tokenizer(job["texts"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": job["tokens"], "min_new_tokens": job["tokens"]}

    def plain(generating: Any = model) -> None:
        with torch.no_grad():
            generating.generate(**batch, **settings, do_sample=False, pad_token_id=0)

    if name == "steering-vectors":
        from steering_vectors import SteeringVector
        from steering_vectors.train_steering_vector import extract_activations

        pairs = list(zip(job["prompts"][::2], job["prompts"][1::2], strict=True))
        steer = SteeringVector(dict.fromkeys(layers, vector), "decoder_block")

        def capture() -> None:
            extract_activations(model, tokenizer, pairs, show_progress=False)

        def generate() -> None:
            with steer.apply(model):
                plain()

    else:
        from repeng import ControlModel, ControlVector
        from repeng.extract import batched_get_hiddens

        wrapped = ControlModel(model, layers)
        control = ControlVector(
            model_type=model.config.model_type,
            directions={layer: vector.numpy() for layer in layers},
        )

        def capture() -> None:
            batched_get_hiddens(wrapped, tokenizer, job["prompts"], layers, 32)

        def generate() -> None:
            wrapped.set_control(control)
            plain(wrapped)
            wrapped.reset()

    variants = {"capture": capture, "plain": plain, "generate": generate}
    times = measure(variants, job["rounds"])
    return times | {"versions": versions(name, "transformers")}


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    print(json.dumps(work(name, folder, json.loads(sys.stdin.read()))))
