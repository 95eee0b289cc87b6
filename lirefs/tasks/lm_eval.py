"""Run our models in lm-evaluation-harness, and its tasks in our comparisons.

lm-evaluation-harness (`pip install lm-eval`, Gao et al.) is imported when a function is called.
"""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lirefs.errors import TaskError, as_list, must_be, whole_number
from lirefs.model.intervention import Intervention
from lirefs.model.language_model import LanguageModel
from lirefs.tasks.batches.recomputed import Advance
from lirefs.tasks.items import ItemTask
from lirefs.tasks.task import ItemResult

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

# The first of these that a task has is compared, else its first metric that is higher for better.
METRICS = ("acc", "exact_match", "acc_norm")
# The default seed with which `lm_eval.simple_evaluate` draws few-shot examples.
FEWSHOT_SEED = 1234


def lm_eval_model(
    lm: LanguageModel,
    intervention: Intervention | None = None,
    batch_tokens: int | None = None,
) -> TemplateLM:
    """The model, under an intervention, for `lm_eval.simple_evaluate(model=...)`.

    It runs requests with the tokens of lm-eval's `HFLM`, and raises `TaskError` for one that
    samples. For steering in scopes, the context of a request is the prompt, and what is scored or
    generated after it is generated text.

    Args:
        lm: The model.
        intervention: Attached only during each call; None for the model as it is.
        batch_tokens: Tokens per batch, padding included; None: as many as memory
            allows, see `lirefs.tasks.greedy`.

    Raises:
        TaskError: lm-eval is not installed.
    """
    must_be(lm, LanguageModel, "lm", TaskError)
    must_be(intervention, (Intervention, type(None)), "intervention", TaskError)
    _require()
    from lirefs.tasks.lm_eval_model import EngineLM

    return EngineLM(lm, intervention, batch_tokens)


def lm_eval_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    group: str = "lm-eval",
) -> list[LMEvalTask]:
    """Tasks of lm-eval, for `lirefs.compare`.

    Args:
        names: Tasks, and groups or tags, which give their single tasks.
        include_path: A folder with more tasks as YAML files.
        limit: Only the first this many documents of each task.
        group: Group of the tasks in a comparison.

    Raises:
        TaskError: lm-eval is not installed or has no such task, the data of a task cannot be read,
            or it has no score per document that is higher for better.
    """
    _require()
    from lm_eval.tasks import TaskManager

    names = as_list(names, "names", str, TaskError)
    if limit is not None:
        whole_number(limit, "limit", least=1, error=TaskError)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise TaskError(f"lm-eval has no task {', '.join(unknown)}; see `lm_eval ls tasks`")
    tasks = []
    for name in names:
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as problem:  # whatever its data loader raises
            raise TaskError(f"lm-eval could not load {name}: {problem}") from problem
        tasks += [_task(one, source, limit, group) for one, source in loaded.items()]
    return tasks


@dataclass(frozen=True, repr=False)
class LMEvalTask(ItemTask):
    """A task of lm-eval, made by `lm_eval_tasks`.

    An item is the list of requests (`lm_eval.api.instance.Instance`) of one document. They are
    built once: few-shot examples are drawn document by document, and a subset keeps those.
    """

    items: Sequence[Sequence[Any]]
    source: Any
    metric: str
    group: str = "lm-eval"

    @property
    def chance(self) -> float:
        """For multiple choice the mean of 1 / number of options, else 0."""
        if self.source.OUTPUT_TYPE != "multiple_choice":
            return 0.0
        options = [len(self.source.doc_to_choice(item[0].doc)) for item in self.items]
        return sum(1 / count for count in options) / len(options)

    @property
    def generates(self) -> bool:
        """Whether every request is for a text."""
        return all(one.request_type == "generate_until" for item in self.items for one in item)

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item as `lm_eval.simple_evaluate` does."""
        model: Any = lm_eval_model(lm)
        # Requests carry their responses, and self.items is shared by all runs.
        items = [[replace(one, resps=[], filtered_resps={}) for one in item] for item in self.items]
        flat = [one for item in items for one in item]
        for method in dict.fromkeys(one.request_type for one in flat):
            requests = [one for one in flat if one.request_type == method]
            responses = getattr(model, method)(requests, disable_tqdm=True)
            for one, response in zip(requests, responses, strict=True):
                one.resps = [response] * (one.repeats or 1)  # greedy: repeats are equal
        for filters in self.source._filters:
            filters.apply(flat)
        advance(len(items))
        return [self._result(item) for item in items]

    def _result(self, item: list[Any]) -> ItemResult:
        scores: dict[str, float] = {}
        first = next(iter(item[0].filtered_resps))
        for key in item[0].filtered_resps:
            found = self.source.process_results(item[0].doc, [r.filtered_resps[key] for r in item])
            for name, value in found.items():
                if isinstance(value, numbers.Real):  # else it is for the whole corpus
                    scores[name if key == first else f"{name},{key}"] = float(value)
        if self.metric not in scores:
            raise TaskError(f"{self.name}: lm-eval gives no {self.metric} for a single document")
        choosing = self.source.OUTPUT_TYPE == "multiple_choice"
        if choosing and any(math.isnan(one.resps[0][0]) for one in item):  # the model overflowed
            scores = dict.fromkeys(scores, math.nan)
        expected, output = self._texts(item, item[0].filtered_resps[first])
        parsed = output != "[invalid]"  # of lm-eval's filters, if they find no answer
        name, prompt = str(item[0].doc_id), str(item[0].args[0])
        return ItemResult(name, scores, 1.0, prompt, expected, output, parsed)

    def _texts(self, item: list[Any], response: Any) -> tuple[str, str]:
        """The expected answer and the model's."""
        target = self.source.doc_to_target(item[0].doc)
        if self.source.OUTPUT_TYPE != "multiple_choice":
            return str(target), str(response)
        if self.source.multiple_input:  # the options are contexts of one continuation
            target = self.source.doc_to_text(item[0].doc)
        options = self.source.doc_to_choice(item[0].doc)
        values = [one.resps[0][0] for one in item[: len(options)]]
        right = options[target] if isinstance(target, int) else str(target)
        return right, options[values.index(max(values))]


def _task(name: str, source: Any, limit: int | None, group: str) -> LMEvalTask:
    if getattr(source, "UNSAFE_CODE", False) or getattr(source, "MULTIMODAL", False):
        raise TaskError(f"{name}: tasks that run generated code or show images are not supported")
    better = source.higher_is_better()
    metrics = [one for one in METRICS if one in better] + [one for one in better if better[one]]
    if not metrics:
        raise TaskError(f"{name}: none of its metrics is higher for better: {', '.join(better)}")
    if source.get_config("num_fewshot") is None:
        source.set_config(key="num_fewshot", value=0)
    source.set_fewshot_seed(FEWSHOT_SEED)
    source.build_all_requests(limit=limit)
    documents: dict[int, list[Any]] = defaultdict(list)
    for one in source.instances:
        documents[one.doc_id].append(one)
    items = [sorted(document, key=lambda one: one.idx) for document in documents.values()]
    return LMEvalTask(name, items, source, metrics[0], group)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as problem:
        message = f"this needs lm-evaluation-harness: pip install 'lm-eval>=0.4.13' ({problem})"
        raise TaskError(message) from problem
