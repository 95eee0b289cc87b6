"""Serve a steered model with llama-server, ask it over HTTP, and compare it with the hooks.

    python examples/serve_llama.py --gguf FILE [--model NAME] [--server FILE] [--strength A]

FILE is the same model as llama.cpp reads it: `convert_hf_to_gguf.py FOLDER --outtype f32`.
Takes a minute on two cores with SmolLM2.
"""

import argparse
import json
import socket
import subprocess
import time
import urllib.request

import lirefs

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--gguf", required=True, help="the model in GGUF")
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--server", default="llama-server", help="the program")
parser.add_argument("--strength", type=float, default=2.0, help="how strongly to steer")
options = parser.parse_args()

lm = lirefs.load(options.model, device="cpu")
split = lirefs.load_questions("organism" if options.model == "organism" else "default").split()
# llama.cpp cannot reach the input of the first two blocks.
direction = lirefs.fit(lm, split, layers=[lm.n_layers // 2], shuffles=1, progress=False).best
steer = lirefs.Steer(direction, "add", options.strength)
lirefs.export.to_gguf(steer, "direction.gguf", lm)
(ids,) = lm.encode([prompt := split.test.prompts[0]])


def ask(*arguments):
    """The greedy continuation that a server gives, started with these arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [options.server, "-m", options.gguf, "-fit", "off", "--port", str(port), *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        body = json.dumps({"prompt": ids, "n_predict": 12, "temperature": 0}).encode()
        url = f"http://127.0.0.1:{port}/completion"
        while server.poll() is None:
            try:
                request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                return json.load(urllib.request.urlopen(request))["content"].strip()
            except OSError:  # not yet listening, or still loading the model
                time.sleep(0.1)
        raise SystemExit(f"{options.server} ended with {server.returncode}")
    finally:
        server.terminate()
        server.wait()


steered = ("--control-vector", "direction.gguf")
for name, change, given in (("unchanged", lirefs.compose(), ()), ("steered", steer, steered)):
    with change.apply(lm.model):
        print(f"{name}, hooks:        {lm.generate(prompt, max_new_tokens=12).strip()!r}")
    print(f"{name}, llama-server: {ask(*given)!r}")
