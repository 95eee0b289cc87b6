"""Control vectors of llama.cpp: directions that are added, written to GGUF and read back."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.errors import BackendError, DirectionsFileError, must_be
from lirefs.export.operators import operators_on
from lirefs.files import atomic_path
from lirefs.model.language_model import LanguageModel
from lirefs.model.untrusted.gguf_header import check_header
from lirefs.steering.steer import Steer

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.([0-9]{1,6})")
_FLOATS = tuple(gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "F64"))


def to_gguf(steer: Steer | Direction | Directions, path: str | Path, lm: LanguageModel) -> None:
    """Write a control vector for llama.cpp (`--control-vector FILE`).

    llama.cpp adds the tensor `direction.N` to the output of block N, counted from 0, at every
    token, and ignores `direction.0`. Adding to the input of block L is adding to the output of
    block L - 1; adding to the MLP's contribution is adding to the block's output. So everything
    from `resid_pre` of layer 2 on can be written except `attn_out`, which the MLP of the same
    block reads.

    Args:
        steer: Steering by `add`, of every token, with one strength or one for each layer; a
            direction or directions stand for adding them once.
        path: The file, written whole or not at all.
        lm: The model to be steered, which gives the number of layers and the name of the
            architecture.

    Raises:
        BackendError: The steering is not an addition, or acts where llama.cpp cannot.
        InterventionError: The steering does not fit the model; `Steer.check` has the details.
    """
    must_be(lm, LanguageModel, "lm", BackendError)
    steering = steer if isinstance(steer, Steer) else Steer(steer, "add")
    summed = control_vector(steering, lm.model)
    config = getattr(lm.model, "config", None)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(getattr(config, "model_type", "")))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(summed))
        for block, vector in sorted(summed.items()):
            writer.add_tensor(f"direction.{block}", vector.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def control_vector(steer: Steer, model: nn.Module) -> dict[int, Tensor]:
    """What llama.cpp has to add to the output of each block, by block; raises what `to_gguf` does.

    Each is float64, (width,), on the CPU.
    """
    if steer.operator != "add":
        raise BackendError(
            f"a control vector can only be added; {steer.operator} has to be baked into the "
            "weights (lirefs.bake)"
        )
    summed: dict[int, Tensor] = {}
    for layer, site, operator in operators_on(steer, model):
        block = layer - 1 if site == "resid_pre" else layer
        if site == "attn_out":
            raise BackendError("attn_out cannot be written: the MLP of the same block reads it")
        if block < 1:
            raise BackendError(
                f"layer {layer}, {site} cannot be written: llama.cpp adds to the output of block 1 "
                "and later ones only"
            )
        added = (operator.strength * operator.direction).cpu()
        summed[block] = summed.get(block, torch.zeros_like(added)) + added
    if not summed:
        raise BackendError("there is nothing to write: the strength is 0")
    return summed


def from_gguf(path: str | Path) -> Directions:
    """Read a control vector, written here or by another program.

    Returns:
        One direction at `resid_post` of each block. The file does not say which model it was made
        for, only the name of the architecture: `provenance["model_hint"]`.

    Raises:
        DirectionsFileError: The file is missing, damaged, or holds something else.
    """
    must_be(path, (str, PathLike), "path", DirectionsFileError)
    try:
        check_header(path)
        reader = gguf.GGUFReader(str(path))
        kind = _text(reader, "general.architecture")
        hint = _text(reader, f"{ARCHITECTURE}.model_hint")
    except FileNotFoundError as error:
        raise DirectionsFileError(f"{path}: no such file") from error
    except (ValueError, IndexError, OSError, KeyError, OverflowError) as error:
        raise DirectionsFileError(f"{path}: cannot be read as GGUF: {error}") from error
    if kind != ARCHITECTURE:
        raise DirectionsFileError(f"{path}: not a control vector (architecture {kind!r})")
    items: dict[tuple[int, str], Direction] = {}
    for tensor in reader.tensors:
        name = _NAME.fullmatch(tensor.name)
        if not name:
            raise DirectionsFileError(f"{path}: unexpected tensor {tensor.name!r:.80}")
        if tensor.tensor_type not in _FLOATS:
            raise DirectionsFileError(
                f"{path}: {tensor.name} is quantized ({tensor.tensor_type.name}); directions are "
                "read as F32, F16 or F64"
            )
        vector = torch.from_numpy(np.array(tensor.data, np.float32).reshape(-1))
        if not bool(torch.isfinite(vector).all()):
            raise DirectionsFileError(f"{path}: {tensor.name} has entries that are not finite")
        block = int(name[1])
        items[block, "resid_post"] = Direction(vector, block, "resid_post")
    widths = {len(one.vector) for one in items.values()}
    if len(widths) != 1 or 0 in widths or len(items) != len(reader.tensors):
        raise DirectionsFileError(
            f"{path}: no directions, directions of several widths, or two of one layer"
        )
    provenance = {"source": Path(path).name, "model_hint": hint or ""}
    return Directions(dict(sorted(items.items())), provenance)


def _text(reader: gguf.GGUFReader, key: str) -> str | None:
    """A text in the header, None where it is not there; a ValueError where it is not a text."""
    field = reader.get_field(key)
    found = None if field is None else field.contents()
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{key} is not a text")
    return found
