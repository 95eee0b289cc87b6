"""The same collection with other libraries; runs in a separate environment (`--peers`)."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn


class _Flat(nn.Module):
    """Returns logits as a tensor: (B, T, C), or (B, C, T) as PyTorch's cross entropy expects."""

    def __init__(self, model: Any, classes_second: bool = False) -> None:
        super().__init__()
        self.model = model
        self.classes_second = classes_second

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.transpose(1, 2) if self.classes_second else logits


def run_kronfluence(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Collect with kronfluence (Grosse et al. 2023), which writes its factors to files."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            inputs, targets = batch
            logits = model(inputs).flatten(0, 1)
            targets = targets.flatten()
            if sample:
                with torch.no_grad():
                    chances = torch.softmax(logits.detach(), dim=-1)
                    targets = torch.multinomial(chances, 1).flatten()
            return nn.functional.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return ["model." + name for name in names]

    task = LanguageModelling()
    flat = _Flat(model)
    prepared = flat if getattr(model, "_prepared", False) else prepare_model(flat, task)
    model._prepared = True
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "benchmark",
            prepared,
            task,
            cpu=ids.device.type == "cpu",
            disable_tqdm=True,
            output_dir=folder,
        )
        analyzer.fit_covariance_matrices(
            "factors",
            TensorDataset(ids[:, :-1].cpu(), ids[:, 1:].cpu()),
            per_device_batch_size=size,
            factor_args=FactorArguments(use_empirical_fisher=labels == "data"),
        )
        found = analyzer.load_covariance_matrices("factors")
    activations, gradients = found["activation_covariance"], found["gradient_covariance"]
    return {n: (activations["model." + n], gradients["model." + n]) for n in names}


def run_curvlinops(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Collect with curvlinops (Dangel et al.)."""
    from curvlinops import KFACLinearOperator
    from curvlinops.kfac import FisherType

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = dict(model.named_modules())
    parameters = [modules[name].weight.requires_grad_(True) for name in names]
    batches = [(part[:, :-1], part[:, 1:]) for part in ids.split(size)]
    flat = _Flat(model, classes_second=True)
    operator = KFACLinearOperator(
        flat,
        nn.CrossEntropyLoss(reduction="sum"),
        parameters,
        batches,
        check_deterministic=False,
        fisher_type=FisherType.EMPIRICAL if labels == "data" else FisherType.MC,
        num_per_example_loss_terms=ids.shape[1] - 1,
        num_data=len(ids),
    )
    operator.compute_kronecker_factors()
    inputs, outputs = operator._input_covariances, operator._gradient_covariances
    return {n: (inputs["model." + n], outputs["model." + n]) for n in names}


def run_bergson(model: Any, names: list[str], ids: torch.Tensor, size: int, labels: str) -> Any:
    """Collect with bergson (EleutherAI), which writes its factors to files."""
    from bergson.config.config import HessianConfig, IndexConfig
    from bergson.hessians.hessian_approximations import collect_hessians
    from datasets import Dataset

    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as bergson's own workers do
    with tempfile.TemporaryDirectory() as folder:
        index = IndexConfig(run_path=f"{folder}/run")
        index.partial_run_path.mkdir(parents=True)
        found = collect_hessians(
            model,
            Dataset.from_dict({"input_ids": ids.tolist()}),
            index,
            batches=[rows.tolist() for rows in torch.arange(len(ids)).split(size)],
            target_modules={name.removeprefix("model.") for name in names},
            hessian_cfg=HessianConfig(method="kfac", use_dataset_labels=labels == "data"),
        )
    tables = found.A_cov_dict, found.S_cov_dict
    return {n: tuple(one[n.removeprefix("model.")] for one in tables) for n in names}
