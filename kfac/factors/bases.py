"""Eigenbases of factors: computed when needed, and kept in a folder next to the factors' file."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kfac.factors.eigen import eigenbasis
from kfac.factors.tensor_file import read_tensors, write_tensors
from kfac.target import TargetRecord, weight_digest
from lirefs.errors import FactorsFileError, WriteError
from lirefs.files import holds_mark
from lirefs.model.processes.world import World, together

Basis = tuple[Tensor, Tensor]
"""Eigenvalues (d,), descending, and eigenvectors (d, d) in columns, float64 on CPU."""

_HEADER, _FORMAT = "kfac_basis", 1
_OURS = re.compile("[0-9a-f]{32}.safetensors")
_log = logging.getLogger(__name__)


class Bases:
    """The eigenbases of both sides of some targets, by key: "A.<source>" and "G.<name>".

    In the folder each basis is a file of its own, so what was decomposed before an interruption is
    found again. Files are named by the SHA-256 of the matrix, so the basis of another matrix is
    never found; they are memory-mapped.

    Args:
        records: The targets.
        mean: Returns A or G of a target, by "A" or "G" and its name.
        fixed: Bases that belong to the factors themselves; they are not put in the folder.
    """

    def __init__(
        self,
        records: Mapping[str, TargetRecord],
        mean: Callable[[str, str], Tensor],
        fixed: Mapping[str, Basis],
    ) -> None:
        self._sizes = {
            record.key(kind, name): record.shape(kind)[0]
            for name, record in records.items()
            for kind in "AG"
        }
        self._mean = mean
        self._fixed = set(fixed)
        self._known = {key: (values.double(), u.double()) for key, (values, u) in fixed.items()}
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}  # of eigenvectors
        self._digests: dict[str, str] = {}
        self._folder: Path | None = None

    def __getitem__(self, key: str) -> Basis:
        if key not in self:
            self._known[key] = eigenbasis(self._matrix(key))
            self._write(key)
        return self._known[key]

    def __contains__(self, key: str) -> bool:
        """Whether a basis is at hand, in memory or in the folder."""
        if key not in self._known and self._folder is not None:
            path = self._path(self._folder, key)
            try:
                if path.exists():
                    self._known[key] = _read(path, self._digests[key])
            except (FactorsFileError, OSError) as error:
                _log.warning("%s; it is computed again", error)
        return key in self._known

    def __iter__(self) -> Iterator[str]:
        """Keys of the bases at hand."""
        return (key for key in self._sizes if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def vectors(self, key: str, like: Tensor) -> Tensor:
        """Return eigenvectors (d, d) on the device and in the dtype of `like`, copied once."""
        which = (key, like.device, like.dtype)
        if which not in self._copies:
            self._copies[which] = self[key][1].to(like.device, like.dtype)
        return self._copies[which]

    def forget(self, keys: Collection[str]) -> None:
        """Free bases that can be had again: from the folder, or else by decomposing."""
        for key in set(keys) - self._fixed:
            self._known.pop(key, None)
        self._copies = {}

    def keep_in(self, path: str | os.PathLike[str]) -> None:
        """Look for bases next to the factors' file, and keep there what is computed from now on."""
        self._folder = Path(f"{os.fspath(path)}.bases")

    def save_in(self, path: str | os.PathLike[str]) -> None:
        """Write the bases at hand next to the factors' file, and remove those of other factors."""
        folder = Path(f"{os.fspath(path)}.bases")
        for key in self:  # also those of the former folder
            if not self._path(folder, key).exists():
                self._write(key, folder)
        self._folder = folder
        if folder.is_dir():
            ours = {self._path(folder, key) for key in self._sizes}
            for path in folder.iterdir():
                named = _OURS.fullmatch(path.name) and path not in ours
                if named and holds_mark(path, _HEADER):
                    path.unlink(missing_ok=True)

    def compute(self, keys: Iterable[str], *, spread: bool, progress: bool) -> None:
        """Decompose the matrices of `keys` whose bases are not at hand.

        With `spread`, all processes of `torch.distributed` call this; each decomposes a share of
        about the same cost, and all of them get all bases.
        """
        keys = list(dict.fromkeys(keys))
        missing = [key for key in keys if key not in self]
        if not spread:
            self._compute(missing, progress)
            return
        with together("Factors.decompose") as world:
            if world.size == 1:
                self._compute(missing, progress)
                return
            world.agree({f"factor {key!r}": self._digest(key)[:12] for key in keys})
            lacking = world.gather(missing)
            owners = _owners(keys, lacking, self._sizes)
            mine = [key for key in missing if owners[key] == world.rank]
            self._compute(mine, progress and world.rank == 0, world.check)
            world.wait()
            for key, owner in owners.items():
                received = _broadcast(world, self._known.get(key), self._sizes[key], owner)
                self._known.setdefault(key, received)

    def _compute(
        self, keys: Sequence[str], progress: bool, check: Callable[[], object] = lambda: None
    ) -> None:
        # Small matrices take no time: the bar appears only where somebody waits.
        shown = not progress or None
        with tqdm(total=len(keys), desc="eigenbases", delay=1, disable=shown) as bar:
            for key in keys:
                bar.set_postfix_str(key, refresh=False)
                check()
                self[key]
                bar.update()

    def _matrix(self, key: str) -> Tensor:
        return self._mean(*key.split(".", 1))

    def _digest(self, key: str) -> str:
        if key not in self._digests:
            self._digests[key] = weight_digest(self._matrix(key))
        return self._digests[key]

    def _path(self, folder: Path, key: str) -> Path:
        return folder / f"{self._digest(key)[:32]}.safetensors"

    def _write(self, key: str, folder: Path | None = None) -> None:
        folder = folder or self._folder
        if folder is None or key in self._fixed:
            return
        path = self._path(folder, key)
        values, vectors = self._known[key]
        header = {
            "format": _FORMAT,
            "matrix": self._digests[key],
            "values": weight_digest(values),
            "vectors": weight_digest(vectors),
        }
        tensors = {"values": values, "vectors": vectors}
        try:
            write_tensors(path, tensors, {_HEADER: json.dumps(header)})
            # From now on its memory is a cache of the file, which the system can take back.
            self._known[key] = _read(path, self._digests[key])
        except (WriteError, FactorsFileError) as error:
            _log.warning("%s; continuing, but the next run decomposes it again", error)


def _read(path: Path, digest: str) -> Basis:
    """Return the basis in a file; FactorsFileError unless it is whole and of this matrix."""
    header, tensors = read_tensors(path, _HEADER, "basis")
    found = {key: weight_digest(tensor) for key, tensor in tensors.items()}
    if header != {"format": _FORMAT, "matrix": digest, **found} or len(found) != 2:
        raise FactorsFileError(f"{path} is not a whole eigenbasis of its matrix")
    return tensors["values"], tensors["vectors"]


def _owners(
    keys: Sequence[str], lacking: Sequence[Sequence[str]], sizes: Mapping[str, int]
) -> dict[str, int]:
    """Return which process gives each basis that some lack: one that has it, or the least busy.

    The cost of a basis is the cube of its side; the widest are shared out first.
    """
    work = [0] * len(lacking)
    owners = {}
    for key in sorted(keys, key=lambda key: (-sizes[key], key)):
        having = [rank for rank, some in enumerate(lacking) if key not in some]
        if len(having) == len(lacking):
            continue
        owner = having[0] if having else work.index(min(work))
        if not having:
            work[owner] += sizes[key] ** 3
        owners[key] = owner
    return owners


def _broadcast(world: World, mine: Basis | None, size: int, owner: int) -> Basis:
    """Send a basis from its owner to all processes."""
    received = []
    for index, shape in enumerate([(size,), (size, size)]):
        table = torch.empty(shape, dtype=torch.float64) if mine is None else mine[index]
        received.append(world.broadcast(table, owner))
    return received[0], received[1]
