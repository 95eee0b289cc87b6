"""Train a vision transformer on partly wrong labels; an interrupted training resumes.

The images of an epoch depend only on the seed and the number of the epoch, and the learning rate on
the step, so a training that is stopped and resumed ends with the same weights.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from experiments.vision.data import NoisySplit
from lirefs.errors import DataFileError, ProvenanceError, SettingError
from lirefs.files import atomic_path, sha256_of

SAVE_SECONDS = 30.0
SHIPPED = Path(__file__).parent / "shipped"
"""Networks trained on the digits: `noised-SEED` with the default recipe, `oracle-SEED` without
noise, and `decayVALUE-0` with other weight decays."""


@dataclass(frozen=True)
class VisionRecipe:
    """Everything that determines the weights, apart from images and seed.

    Attributes:
        blocks: Transformer blocks.
        width: Width of the residual stream.
        mlp: Hidden units of each MLP.
        heads: Attention heads.
        patch: Pixels on each side of a patch.
        noise: Share of the training labels that are replaced by another class.
        epochs: Passes over the training images.
        batch: Images per batch.
        rate: Largest learning rate of AdamW; it rises over 5 % of the steps, then falls along a
            cosine to 5 % of this value.
        weight_decay: Weight decay of matrices; biases, norms and embeddings are not decayed.
        smoothing: Label smoothing, which keeps the network less certain of what it memorized.
            Without it, the labels sampled for the factors are nearly always the first choice, and
            the same edit costs more accuracy (docs/vision.md).
        shift: Augmentation: largest shift in pixels along both axes.
        grain: Augmentation: standard deviation of noise on the standardized pixels.
    """

    blocks: int = 2
    width: int = 64
    mlp: int = 512
    heads: int = 4
    patch: int = 4
    noise: float = 0.1
    epochs: int = 400
    batch: int = 100
    rate: float = 3e-3
    weight_decay: float = 0.5
    smoothing: float = 0.1
    shift: float = 0.5
    grain: float = 0.2

    def rate_at(self, done: float) -> float:
        """Learning rate after a share `done` of the steps, in [0, 1)."""
        return self.rate * min(1.0, done / 0.05 + 1e-3, 0.525 + 0.475 * math.cos(math.pi * done))


def make_model(recipe: VisionRecipe, split: NoisySplit, seed: int) -> ViTForImageClassification:
    """Return a freshly initialised model (draws from torch's global generator).

    Raises:
        SettingError: The sizes do not fit together.
    """
    channels, side = split.train.pixels.shape[1:3]
    if side % recipe.patch or recipe.width % recipe.heads:
        raise SettingError(
            f"patches of {recipe.patch} do not tile {side} pixels, or {recipe.heads} heads do not "
            f"divide a width of {recipe.width}"
        )
    torch.manual_seed(seed)
    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        image_size=side,
        patch_size=recipe.patch,
        num_channels=channels,
        num_labels=len(split.train.classes),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def augment(
    split: NoisySplit, pixels: Tensor, recipe: VisionRecipe, generator: torch.Generator
) -> Tensor:
    """Return augmented, standardized images: shifted, with black at the edge, and with noise.

    Args:
        split: The split of the images.
        pixels: float32 (B, channels, side, side) in [0, 1].
        recipe: Recipe with the size of shift and grain.
        generator: Source of the random numbers.
    """
    if recipe.shift:
        places = torch.rand(len(pixels), 2, generator=generator) * 2 - 1
        moves = torch.eye(2, 3).repeat(len(pixels), 1, 1)
        moves[:, :, 2] = places * (2 * recipe.shift / pixels.shape[-1])
        grid = nn.functional.affine_grid(moves, list(pixels.shape), align_corners=False)
        pixels = nn.functional.grid_sample(pixels, grid, align_corners=False)
    inputs = (pixels - split.mean) / split.spread
    if recipe.grain:
        inputs = inputs + recipe.grain * torch.randn(inputs.shape, generator=generator)
    return inputs


def train(
    split: NoisySplit,
    recipe: VisionRecipe,
    seed: int,
    path: Path,
    *,
    title: str = "train",
    shipped: Path | None = None,
    progress: bool = True,
) -> ViTForImageClassification:
    """Train a model and keep it in a file; if the file exists, read it instead.

    Args:
        split: Images and the labels to show.
        recipe: Sizes and schedule.
        seed: Seed of the initial weights, the order of images and the augmentation.
        path: File of the weights, stored as float16. The state of an unfinished training is in
            `PATH.state`, from which the training resumes.
        title: Title of the progress bar.
        shipped: A file to read instead of training, if it exists and is of the same images, labels,
            settings and seed.
        progress: Show a progress bar.

    Returns:
        The model in evaluation mode, float32 with the values of the float16 weights.

    Raises:
        ProvenanceError: An existing file is of other images, labels, settings or seed.
        DataFileError: An existing file cannot be read.
        SettingError: The sizes do not fit together.
    """
    model = make_model(recipe, split, seed)
    record = provenance(split, recipe, seed)
    if not path.exists() and shipped is not None and _made_of(shipped) == record:
        path = shipped
    if path.exists():
        weights = _read(path, record)[0]
        _check_like(path, weights, model.state_dict())
        _fill(model, weights)
        model.train(False)
        return model
    optimizer = _optimizer(model, recipe)
    state = path.with_name(path.name + ".state")
    done = _resume(state, record, model, optimizer) if state.exists() else 0
    shown, saved = split.shown, time.monotonic()
    steps = math.ceil(len(shown) / recipe.batch)
    model.train()
    bar = tqdm(total=recipe.epochs, initial=done, unit="epoch", desc=title, disable=not progress)
    while done < recipe.epochs:
        generator = torch.Generator().manual_seed(1_000_003 * seed + done)
        order = torch.randperm(len(shown), generator=generator)
        for step, rows in enumerate(torch.split(order, recipe.batch)):
            rate = recipe.rate_at((done + step / steps) / recipe.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs = augment(split, split.train.pixels[rows], recipe, generator)
            loss = nn.functional.cross_entropy(
                model(pixel_values=inputs).logits, shown[rows], label_smoothing=recipe.smoothing
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        done += 1
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.2f}")
        if time.monotonic() - saved > SAVE_SECONDS and done < recipe.epochs:
            _save_state(state, record, model, optimizer, done)
            saved = time.monotonic()
    bar.close()
    weights = {name: value.detach().half() for name, value in model.state_dict().items()}
    _write(path, weights, record)
    state.unlink(missing_ok=True)
    _fill(model, weights)
    model.train(False)
    return model


def provenance(split: NoisySplit, recipe: VisionRecipe, seed: int) -> str:
    """Return what a training depends on, as JSON: recipe, seed, digests of images and labels."""
    return json.dumps(
        {
            "recipe": asdict(recipe),
            "seed": seed,
            "images": split.train.digest,
            "labels": sha256_of(split.shown.numpy().tobytes()),
        },
        sort_keys=True,
    )


def _optimizer(model: nn.Module, recipe: VisionRecipe) -> torch.optim.AdamW:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim > 1 and "token" not in name and "position" not in name
        (matrices if plain else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)


def _save_state(
    path: Path, record: str, model: nn.Module, optimizer: torch.optim.Optimizer, done: int
) -> None:
    tensors = {f"weight.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    _write(path, tensors, record, done)


def _resume(path: Path, record: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore model and optimizer; return the number of epochs done."""
    tensors, done = _read(path, record)
    like = {f"weight.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        like |= {f"exp_avg.{name}": parameter, f"exp_avg_sq.{name}": parameter}
        like[f"step.{name}"] = torch.zeros(())
    _check_like(path, tensors, like)
    _fill(model, {k[7:]: value for k, value in tensors.items() if k.startswith("weight.")})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].float() for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return done


def _check_like(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Verify names, shapes and values of tensors from a file.

    Raises:
        DataFileError: A tensor is missing, unknown, of another shape, or has impossible values.
    """
    wrong = [
        name for name in like if name not in tensors or tensors[name].shape != like[name].shape
    ]
    wrong += [name for name in tensors if name not in like]
    wrong += [name for name in like if name not in wrong and not _usual(name, tensors[name])]
    if wrong:
        raise DataFileError(
            f"{path}: tensor {wrong[0]!r:.80} is missing, unknown, of another shape, or has "
            "impossible values; remove the file"
        )


def _usual(name: str, tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are finite, and not negative where they must not be."""
    if tensor.dtype not in (torch.float16, torch.float32):
        return False
    least = 0.0 if name.startswith(("step.", "exp_avg_sq.")) else -math.inf
    return bool((tensor.isfinite() & (tensor >= least)).all())


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    model.load_state_dict({name: value.float() for name, value in tensors.items()})


def _write(path: Path, tensors: dict[str, Tensor], record: str, done: int = 0) -> None:
    with atomic_path(path) as temporary:
        held = {name: value.detach().contiguous() for name, value in tensors.items()}
        save_file(held, temporary, metadata={"made_of": record, "epochs": str(done)})


def _made_of(path: Path) -> str | None:
    """Return the record of a file; None if the file is missing."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("made_of"))
    except (SafetensorError, OSError) as problem:
        raise DataFileError(
            f"{path}: cannot be read as trained weights ({problem}); remove it"
        ) from None


def _read(path: Path, record: str) -> tuple[dict[str, Tensor], int]:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise DataFileError(
            f"{path}: cannot be read as trained weights ({problem}); remove it"
        ) from None
    if found.get("made_of") != record:
        raise ProvenanceError(
            f"{path}: trained with other images, labels, recipe or seed; remove it or use another "
            "folder"
        )
    epochs = found.get("epochs", "0")
    if not re.fullmatch("[0-9]{1,9}", epochs):
        raise DataFileError(f"{path}: 'epochs' is {epochs!r:.40}; remove the file")
    return tensors, int(epochs)
