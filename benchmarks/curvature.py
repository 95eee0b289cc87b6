"""Speed of curvature collection compared with three other libraries, as ratios in one run.

    python benchmarks/curvature.py --model FOLDER --peers

All contenders collect the same targets over the same token ids of the same model and count all
positions. Each runs in a process of its own, so that its memory can be measured. They take turns,
so that changes in the machine's load affect all of them alike. Before anything is timed, their
factors are compared, with the data's labels (sampled labels differ by chance).

`forward` is the bare forward pass. `floor` is the work that no method can avoid: forward, backward
to the first target, and one plain product for each covariance. `kfac32` has sums in float32.
`published` is the method of Merullo et al. (2025) as described, without any economy: mean loss,
backward through the whole network, both products for every target, float32 sums. `--peers` creates
a virtual environment for kronfluence, curvlinops and bergson; it borrows torch and transformers
from this one.

    python benchmarks/curvature.py --model blocks

takes blocks with the shape of a 7B model and random weights. After the collection it times the
decomposition and the edit of one block (`curvature_edit.py`). `--model gemma` has a vocabulary of
262,144 words, and one of `--words`, for a comparison of the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import curvature_edit
import torch
from measuring import environment, synchronize, versions, with_range

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the peers' environment lacks this library
OURS = ("forward", "floor", "published", "kfac32", "kfac")
PEERS = {"kronfluence": "kronfluence", "curvlinops": "curvlinops-for-pytorch", "bergson": "bergson"}
"""Peers and their packages."""
# With dependencies, pip would install another torch, for a torchvision that is never imported.
PACKAGES = (
    "--no-deps", "kronfluence==1.0.1", "curvlinops-for-pytorch==3.0.1", "backpack-for-pytorch",
    "einconv", "linear_operator", "opt_einsum", "unfoldNd",
    "bergson==2.5.1", "docstring-parser", "jaxtyping", "natsort", "optree", "peft", "petname",
    "simple-parsing", "torchopt", "wadler-lindig",
)  # fmt: skip


def load(options: argparse.Namespace) -> tuple[Any, list[str], torch.Tensor]:
    """Return the model, target names, and token ids (N, T + 1)."""
    import transformers

    import kfac

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.model == "blocks":
        config = transformers.Olmo2Config(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=options.blocks,
            num_attention_heads=32,
            vocab_size=100352,
        )
        model = _made(config, torch.bfloat16, options.device)
        layers = list(range(options.blocks))
    elif options.model == "gemma":
        # The widths of Gemma 3 270M; of its 18 layers, four.
        config = transformers.Gemma3TextConfig(
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            vocab_size=options.words,
        )
        model = _made(config, torch.float32, options.device)
        layers = [2, 3]
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32
        ).to(options.device)
        layers = [int(layer) for layer in options.layers.split(",")]
    model = model.eval()
    projections = "mlp_in" if options.model == "blocks" else "mlp"  # as the published edit
    names = [target.name for target in kfac.find_targets(model, layers, projections)]
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.length + 1)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    return model, names, ids.to(options.device)


def _made(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Return a causal model with random weights."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype
        )


def batches_of(ids: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs (B, T) and the tokens that follow them (B, T)."""
    return [(part[:, :-1], part[:, 1:]) for part in torch.split(ids, size)]


def run_forward(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Run only the model's forward pass."""
    with torch.no_grad():
        for inputs, _ in batches_of(ids, size):
            model(input_ids=inputs, use_cache=False)


def run_floor(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Run forward, backward from a constant gradient, and one product for each matrix."""
    modules = dict(model.named_modules())
    sums: dict[str, torch.Tensor] = {}
    gradient: torch.Tensor | None = None

    def add(key: str, rows: torch.Tensor) -> None:
        flat = rows.detach().flatten(0, -2).float()
        if key not in sums:
            sums[key] = flat.new_zeros(flat.shape[1], flat.shape[1])
        sums[key].addmm_(flat.T, flat)

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            # The up projection has the same input as the gate.
            if not name.endswith("up_proj"):
                add("A." + name, inputs[0])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.register_hook(lambda g: add("G." + name, g))
            return output

        return hook

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    for inputs, _ in batches_of(ids, size):
        logits = model(input_ids=inputs, use_cache=False).logits
        if gradient is None or gradient.shape != logits.shape:
            gradient = torch.full_like(logits, 1e-5)
        logits.backward(gradient)
    for handle in handles:
        handle.remove()


def run_published(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Collect as Merullo et al. (2025) describe it, with a product for each target and side."""
    modules = dict(model.named_modules())
    sums: dict[str, torch.Tensor] = {}

    def add(key: str, rows: torch.Tensor) -> None:
        flat = rows.detach().flatten(0, -2).float()
        sums[key] = sums.get(key, 0) + flat.T @ flat

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            add("A." + name, inputs[0])
            output.register_hook(lambda g: add("G." + name, g))

        return hook

    def to_embeddings(module: Any, inputs: Any, output: Any) -> Any:
        return output.detach().requires_grad_()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    handles.append(model.get_input_embeddings().register_forward_hook(to_embeddings))
    for inputs, targets in batches_of(ids, size):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        if labels == "sampled":
            with torch.no_grad():
                targets = torch.multinomial(logits.float().softmax(-1), 1)
        torch.nn.functional.cross_entropy(logits, targets.flatten()).backward()
    for handle in handles:
        handle.remove()
    return {name: (sums["A." + name], sums["G." + name]) for name in names}


def run_kfac(
    model: Any,
    names: list[str],
    ids: torch.Tensor,
    size: int,
    labels: str,
    dtype: torch.dtype | None = None,
) -> Any:
    """Collect with this library. It also runs the last token of each row, which is not counted."""
    import kfac

    factors = kfac.collect(
        model,
        [{"input_ids": part} for part in torch.split(ids, size)],
        kfac.named_targets(model, names),
        labels=labels,
        dtype=dtype,
        progress=False,
    )
    return {name: (factors.A(name), factors.G(name)) for name in names}


def run_kfac32(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Collect with this library, with float32 sums."""
    return run_kfac(model, names, ids, size, labels, torch.float32)


def contender(name: str) -> Any:
    """Return the function of a contender; peers are imported only in their own environment."""
    if name in PEERS:
        import curvature_peers

        return getattr(curvature_peers, "run_" + name)
    return globals()["run_" + name]


def work(options: argparse.Namespace) -> None:
    """Run one contender in this process and print its measurements as JSON."""
    torch.set_num_threads(options.threads)
    model, names, ids = load(options)
    run = contender(options.only)
    result: dict[str, Any] = {}
    if options.factors:
        found = run(model, names, ids[: options.batch], options.batch, "data")
        tensors: dict[str, torch.Tensor] = {}
        for name, (a, g) in found.items():
            tensors |= {"A." + name: a.contiguous().cpu(), "G." + name: g.contiguous().cpu()}
        from safetensors.torch import save_file

        save_file(tensors, options.factors)
    else:
        run(model, names, ids[: options.batch], options.batch, "sampled")
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        synchronize()
        began = time.perf_counter()
        run(model, names, ids, options.batch, "sampled")
        synchronize()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = {
            "tokens/s": options.sequences * options.length / seconds,
            "peak MB": max(peak, loaded) / 1024,
        }
        if torch.cuda.is_available():
            result["GPU MB"] = torch.cuda.max_memory_allocated() / 2**20
        if options.only in PEERS:
            result["versions"] = versions(PEERS[options.only])
        if options.only == "kfac":
            result["ideal"] = _ideal_seconds(model, names, options) / seconds
    print("RESULT " + json.dumps(result))


def _ideal_seconds(model: Any, names: list[str], options: argparse.Namespace) -> float:
    """Return the time of all products at the speed of one large product.

    Forward, truncated backward and both covariances, of which half suffices.
    """
    head = model.get_output_embeddings().weight.numel()
    total = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    total += head * (
        id(model.get_output_embeddings().weight) == id(model.get_input_embeddings().weight)
    )
    modules = dict(model.named_modules())
    shapes = {name: modules[name].weight.shape for name in names}
    products = sum(out**2 for out, _ in shapes.values())
    products += sum(inner**2 for n, (_, inner) in shapes.items() if not n.endswith("up_proj"))
    first = min(int(name.split(".layers.")[1].split(".")[0]) for name in names)
    layers = model.config.num_hidden_layers
    passes = 2 * (total + head + (total - head) * (layers - first) / layers)
    tokens = options.sequences * options.length
    dtype = modules[names[0]].weight.dtype
    return tokens * (
        passes / _speed(options.device, dtype) + products / _speed(options.device, torch.float32)
    )


def _speed(device: str, dtype: torch.dtype) -> float:
    """Measure the floating-point operations a second of a large product."""
    size, times = (2048, 5) if device == "cpu" else (8192, 20)
    matrix = torch.randn(size, size, device=device).to(dtype)
    matrix @ matrix
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        matrix @ matrix
    synchronize()
    return times * 2 * size**3 / (time.perf_counter() - began)


def spawn(options: argparse.Namespace, name: str, python: str, *extra: str) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    command = [python, str(Path(__file__).resolve()), "--only", name, *extra]
    same = "model layers blocks words sequences length batch device threads"
    for key in same.split():
        command += [f"--{key}", str(getattr(options, key))]
    variables = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(lines[-1][7:]))


def compare(options: argparse.Namespace, contenders: dict[str, str]) -> None:
    """Print how far each contender's factors are from ours, after scaling traces to 1."""
    from safetensors.torch import load_file

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, python in contenders.items():
            if name in ("forward", "floor"):
                continue
            spawn(options, name, python, "--factors", f"{folder}/{name}")
            found[name] = load_file(f"{folder}/{name}")
    for name, tensors in found.items():
        worst = 0.0
        for key, tensor in found["kfac"].items():
            one, two = (x.double() / x.double().trace() for x in (tensor, tensors[key]))
            worst = max(worst, float((one - two).norm() / one.norm()))
        print(f"factors of {name:12s} differ from ours by at most {worst:.1e}")
        if worst > (0.05 if options.model == "blocks" else 1e-3):  # blocks are in bfloat16
            raise SystemExit(f"{name} computes different factors, so nothing was timed")


def collection(options: argparse.Namespace) -> None:
    """Time all contenders in turns."""
    contenders = dict.fromkeys(OURS, sys.executable)
    if options.peers:
        contenders |= dict.fromkeys(PEERS, str(environment(options.peers_folder, PACKAGES)))
    compare(options, contenders)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, python in contenders.items():
            results[name].append(spawn(options, name, python))
    ours = [result["tokens/s"] for result in results["kfac"]]
    print("\n| contender | tokens/s | kfac is faster by [range of rounds] | peak MB |")
    print("|---|---|---|---|")
    for name, rounds in results.items():
        speeds = [result["tokens/s"] for result in rounds]
        ratio = with_range([a / b for a, b in zip(ours, speeds, strict=True)])
        peak = max(result["peak MB"] for result in rounds)
        print(f"| {name} | {statistics.median(speeds):.0f} | {ratio} | {peak:.0f} |")
        if "GPU MB" in rounds[0]:
            print(f"  {name}: {rounds[0]['GPU MB']:.0f} MB on the GPU")
    share = statistics.median(result["ideal"] for result in results["kfac"])
    print(f"\nkfac: {share:.0%} of the speed of a large product")
    peers = [rounds[0]["versions"] for rounds in results.values() if "versions" in rounds[0]]
    print(f"{options.rounds} rounds; {', '.join([versions('torch', 'transformers'), *peers])}")


def main() -> None:
    """Run all contenders, or only the one that a parent process asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="folder or hub id; blocks of 7B shape; or gemma"
    )
    parser.add_argument("--layers", default="20,21,22", help="blocks whose MLPs are collected")
    parser.add_argument("--blocks", type=int, default=3, help="of 7B shape")
    parser.add_argument("--words", type=int, default=262_144, help="vocabulary of gemma")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences per batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action="store_true", help="also time kronfluence and curvlinops")
    parser.add_argument("--peers-folder", type=Path, default=Path(".peers/curvature"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--factors", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only in ("factors", *curvature_edit.PARTS):
        curvature_edit.work(options, *load(options))
    elif options.only:
        work(options)
    else:
        torch.set_num_threads(options.threads)
        collection(options)
        if options.model == "blocks":
            curvature_edit.compare(options, spawn)


if __name__ == "__main__":
    main()
