"""From batches to factors: K-FAC, and what the one-pass estimators need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kfac.collection.batches import Forward, module_and_batches
from kfac.collection.covariance import DIAGONALS, CovarianceSums
from kfac.collection.options import Options
from kfac.collection.passes import run_passes
from kfac.collection.plan import fitting_tokens, plan
from kfac.factors.factors import Factors
from kfac.factors.factors_file import checked_provenance
from kfac.target import Target, weight_digest
from kfac.targets import find_targets
from lirefs.errors import BatchError, KfacError, TargetError, as_list, must_be, whole_number
from lirefs.model.language_model import BATCH_TOKENS, LanguageModel
from lirefs.model.processes.world import together
from lirefs.model.weight_swap import must_be_readable


def collect(
    model: nn.Module | LanguageModel,
    batches: Iterable[Any],
    targets: Sequence[Target] | None = None,
    *,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    labels: str = "sampled",
    samples: int = 1,
    forward: Forward | None = None,
    dtype: torch.dtype | None = None,
    head_dtype: torch.dtype | None = None,
    marginals: bool = False,
    diagonal: bool = False,
    per: str = "position",
    batch_tokens: int | str = BATCH_TOKENS,
    budget: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 300.0,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Factors:
    """Collect the factors of some targets over some data.

    Labels are sampled from the model's own softmax: the true Fisher, not the empirical one
    (Merullo et al. 2025, arXiv 2510.24256, section 7). The draw of a position depends on `seed`, on
    the tokens of its sequence and on how often that sequence came before, never on batching,
    padding or order. The loss is summed over counted positions, so sums of any batches add up.

    The model is left as it was found: hooks removed, `requires_grad` flags and training mode
    restored, no gradient stored, also after an error or an interrupt.

    Under `torch.distributed` give every process the same batches; each takes its share of them, the
    sums are added once, at the end, and every process returns the same factors. The model may be
    sharded over all processes by FSDP2 (`torch.distributed.fsdp.fully_shard`): they then run in
    step, and the model computes all logits at a time.

    Args:
        model: An `lm` or any module; its own device and dtype are used. TF32 is off during the
            collection.
        batches: Texts, if `model` is an `lm`. Or mappings with input_ids (B, T), optional
            attention_mask (B, T), optional labels (B, T) whose -100 marks tokens that are not
            predicted. Position t is counted if t and t+1 are attended and label t+1 is not -100.
            With `forward`: mappings or sequences of tensors with B first, or one such tensor.
        targets: From `find_targets` or `named_targets`; None takes all that `find_targets` finds
            in `layers`.
        layers: Block indices from 0, instead of targets; None takes all.
        seed: Seed of the sampled labels.
        labels: "sampled"; "data" for the empirical Fisher: the batch's labels, else the next
            tokens; or "exact" for the expectation over all labels, without noise. It costs a
            backward pass for each class at each position, so it is for tests and small
            vocabularies (at most 256 classes).
        samples: Labels drawn for each position; each costs a backward pass, and the sums are means
            over them.
        forward: For models that are not causal language models: called as forward(model, batch),
            returns logits (B, ..., C) and a bool mask of the counted positions. The mask has the
            shape of the targets' input without its last axis: (B,) for an MLP, (B, T) for
            a transformer. If the logits have that shape too, a label is drawn for each counted
            position; otherwise (a ViT: one row of logits for each image) for each row of logits.
            With `labels="data"` it returns int64 labels (B, ...) as a third value.
        dtype: None computes the products of a batch in float32 (float64 for a model with float64
            targets) and sums them in float64, where a massive activation cannot round the rest
            away. torch.float32 does both in float32: half the memory, but such an activation makes
            flat directions wrong by percents. torch.float64 does both in float64. On MPS, which has
            no float64, None is float32.
        head_dtype: Dtype of the output layer's two products and of the logits, torch.bfloat16 for
            example: with a large vocabulary they are most of the work. None is that of the weights.
        marginals: Also sum what the "marginal" estimator needs: two more matrices for each target.
        diagonal: Also sum what the "diagonal" estimator needs: one matrix of the weight's shape.
        per: Which gradients the "diagonal" estimator squares: "position" or "sequence", as in
            `correct`. All other sums are over positions.
        batch_tokens: Most tokens of a batch that is made of texts, padding included; "auto" takes
            as many as fit into half of the memory that is free now, by `plan`.
        budget: Bytes that the sums may take at a time; targets are spread over several passes.
        checkpoint: File for the state of the collection. If it exists, the collection resumes
            from it. Ctrl-C writes it too. It is not deleted. Each process has its own, named by its
            rank.
        checkpoint_every: Seconds between writes.
        progress: Show the memory plan in a line, and a bar with tokens (counted positions) per
            second and the time left.
        provenance: JSON values to store with the factors, such as the origin of the data.

    Returns:
        The factors, on CPU.

    Raises:
        BatchError: No batch, a malformed batch, texts without an `lm`, no counted position, or,
            without `forward`, a model whose tokens see later ones.
        BudgetError: One target alone needs more than the budget.
        CheckpointError: The checkpoint belongs to other data or settings.
        DistributedError: The processes differ in model, batches, targets, settings or versions, or
            another process failed.
        NonFiniteError: NaN or infinity in logits, activations or gradients.
        TargetError: No targets, targets and layers together, a target that is never called, or one
            that cannot reach the logits.
        KfacError: A target's input does not have the positions of the mask, or a setting is wrong.
        ProvenanceError: With a checkpoint, if the model has no identity: a weight is offloaded, or
            a hook of your own may change it.

    Examples:
        >>> import kfac, lirefs
        >>> from lirefs.organism import Language, training_texts
        >>> lm = lirefs.load("organism")
        >>> texts = training_texts(Language(), 20)
        >>> factors = kfac.collect(lm, texts, layers=[0], progress=False)
        >>> factors.names
        ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    provenance = checked_provenance(provenance)  # before hours of work
    with together("kfac.collect") as world:
        whole = model.model if isinstance(model, LanguageModel) else model
        must_be(whole, nn.Module, "model", BatchError)
        must_be_readable(whole, TargetError)
        if targets is not None:
            targets = as_list(targets, "targets", Target, TargetError)
        if targets is None:
            targets = find_targets(whole, layers)
        elif layers is not None:
            raise TargetError("give targets or layers, not both")
        if per not in DIAGONALS or (per != "position" and not diagonal):
            raise KfacError(
                f"per={per!r}: use 'position' or 'sequence', which needs diagonal=True: no other "
                "sums of a collection are over sequences"
            )
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
        planned = plan(targets, budget, dtype=dtype, marginals=marginals, diagonal=diagonal)
        if batch_tokens == "auto":
            batch_tokens = fitting_tokens(whole, planned)
        tokens_of_batch = whole_number(batch_tokens, "batch_tokens", 1, error=BatchError)
        world.wait()  # from here on, a sharded model is read by all, or by none
        module, batches = module_and_batches(model, batches, tokens_of_batch)
        if len({target.name for target in targets}) < len(targets):
            raise TargetError("a target is given twice")
        digests = {target.name: weight_digest(target.weight) for target in targets}
        settings = {
            "task": "collect",
            "marginals": marginals,
            "diagonal": diagonal,
            "digests": digests,
        }
        settings |= {} if per == "position" else {"per": per}
        records, tables, tokens = run_passes(
            module,
            batches,
            planned,
            lambda dtype: CovarianceSums(dtype, marginals=marginals, diagonal=diagonal and per),
            options,
            digests,
            settings,
            world,
            title="factors",
        )
        return Factors(
            {target.name: records[target.name] for target in targets},
            tables,
            seeds=[options.seed],
            tokens=tokens,
            labels=labels,
            provenance=provenance,
        )
