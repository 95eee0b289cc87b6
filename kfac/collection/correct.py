"""EK-FAC: a second pass that replaces products of eigenvalues by exact second moments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac.collection.batches import Forward, module_and_batches
from kfac.collection.covariance import InputRows, Sums
from kfac.collection.options import Options
from kfac.collection.passes import run_passes
from kfac.collection.plan import plan
from kfac.factors.factors import Factors
from kfac.target import TargetRecord
from lirefs.errors import KfacError, must_be
from lirefs.model.guest import full_precision
from lirefs.model.language_model import LanguageModel
from lirefs.model.processes.world import together


def correct(
    model: nn.Module | LanguageModel,
    batches: Iterable[Any],
    factors: Factors,
    *,
    per: str = "position",
    seed: int = 0,
    labels: str = "sampled",
    samples: int = 1,
    forward: Forward | None = None,
    dtype: torch.dtype | None = None,
    head_dtype: torch.dtype | None = None,
    budget: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 300.0,
    progress: bool = True,
) -> Factors:
    """Add EK-FAC's corrected eigenvalues to factors (George et al. 2018, arXiv 1806.03884).

    In the eigenbases of G and A, each coordinate gets the mean square of its gradient, where K-FAC
    has the product of two means. With `per="sequence"` this is the diagonal of the Fisher there, up
    to the noise of the sampled labels (none with `labels="exact"`). With `per="position"` it is so
    only where the loss of each label reaches one position of the target: one position per sequence,
    or the MLP of the last block. Elsewhere products of different positions are left out, as in
    K-FAC.

    Args:
        model: The model that the factors were collected from.
        batches: As in `collect`; usually the same.
        factors: From `collect`; they are not changed.
        per: Which gradients are squared: "position" (g aᵀ of each counted position, as K-FAC
            assumes) or "sequence" (∂L/∂W: the sum over all attended positions of a sequence, with
            the cross terms that K-FAC leaves out, and with the part of prompts labelled -100; with
            `forward`, over all positions unless the batch has an attention_mask). For one position
            per sequence both are the same.
        seed: As in `collect`.
        labels: As in `collect`.
        samples: As in `collect`.
        forward: As in `collect`.
        dtype: As in `collect`; None is float32 for factors with sums in float32.
        head_dtype: As in `collect`.
        budget: As in `collect`; the rotated bases count as well.
        checkpoint: As in `collect`.
        checkpoint_every: As in `collect`.
        progress: As in `collect`.

    Returns:
        New factors that give the "ekfac" estimator; the eigenbases are saved with them.

    Raises:
        FactorsMismatchError: The factors are not of this model.
        KfacError: As in `collect`.
    """
    with together("kfac.correct") as world:
        module, batches = module_and_batches(model, batches)
        must_be(factors, Factors, "factors", KfacError)
        if per not in ("position", "sequence"):
            raise KfacError(f"per={per!r}: use 'position' or 'sequence'")
        if dtype is None and factors.dtype == torch.float32:
            dtype = torch.float32
        options = Options(
            seed=seed,
            labels=labels,
            samples=samples,
            forward=forward,
            dtype=dtype,
            head_dtype=head_dtype,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        world.wait()  # from here on, a sharded model is read by all, or by none
        factors.check(module)
        targets = factors.targets(module)
        planned = plan(targets, budget, dtype=dtype, correction=True)
        factors.decompose(spread=True, progress=progress)
        bases = {}
        for name, record in factors.records.items():
            basis = factors.eigen(name)  # rotations are products, in the dtype of the rows
            bases["A." + record.source] = (basis.mu, basis.u_in.to(planned.rows))
            bases["G." + name] = (basis.lam, basis.u_out.to(planned.rows))
        records, tables, _ = run_passes(
            module,
            batches,
            planned,
            lambda dtype: _CorrectionSums(dtype, factors.records, bases, per == "sequence"),
            options,
            {name: record.digest for name, record in factors.records.items()},
            {"task": "correct", "per": per, "factors": factors.digest},
            world,
            title="correction",
        )
        # Means are taken over the positions of the first pass; these data may have more or fewer.
        corrected = {
            f"E.{name}": tables[f"E.{name}"] * (record.count / max(records[name].count, 1))
            for name, record in factors.records.items()
        }
        return Factors(
            factors.records,
            factors.sums | corrected,
            seeds=factors.seeds,
            tokens=factors.tokens,
            labels=factors.labels,
            provenance=factors.provenance,
            bases=bases,
            weighted=factors.weighted,
        )


class _CorrectionSums(Sums):
    """Sums of squared gradients in the eigenbases."""

    def __init__(
        self,
        dtype: torch.dtype,
        records: Mapping[str, TargetRecord],
        bases: Mapping[str, tuple[Tensor, Tensor]],
        whole_sequences: bool,
    ) -> None:
        super().__init__(["E"], dtype, whole_sequences=whole_sequences)
        self._records = records
        self._bases = bases
        self._moved: dict[str, Tensor] = {}

    def add_input(self, source: str, a: InputRows) -> None:
        """Do nothing: inputs are used only together with gradients."""

    def add_gradient(self, name: str, g: Tensor, a: InputRows, share: float) -> None:
        """Rotate both sides, and add the squares of their products."""
        key, source = "E." + name, "A." + self._records[name].source
        with full_precision(g.device):
            inputs = a.derived("rotated", lambda: a.values @ self._basis(source, a.values))
            outputs = g @ self._basis("G." + name, g)
            if self.whole_sequences:
                self.add_sequence_squares(key, outputs, inputs, a, share)
                return
            squares = a.derived("squares", inputs.square)
            self.add_product(key, outputs.square(), squares, share)

    def leave_device(self) -> None:
        """Move the tables to the CPU and free the bases: the next pass needs the memory."""
        super().leave_device()
        self._moved = {}

    def _basis(self, key: str, like: Tensor) -> Tensor:
        if key not in self._moved:
            self._moved[key] = self._bases[key][1].to(like.device)
        return self._moved[key]
