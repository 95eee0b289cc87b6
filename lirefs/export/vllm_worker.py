"""The worker class of an engine of vLLM that can be steered; vLLM imports it in each worker."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from lirefs.directions.directions import Directions
from lirefs.errors import BackendError, LirefsError
from lirefs.export.vllm import must_carry, plan_of
from lirefs.export.vllm_layers import place_operators
from lirefs.steering.steer import Steer

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):
    """vLLM's worker, which steers the decoder layers that are in its process.

    Of the setting `additional_config={"lirefs": {...}}` it makes a steering when the model has been
    loaded: `directions` names the file, `layer` one of several directions in it, and the rest are
    arguments of `lirefs.Steer`.
    """

    def load_model(self, **settings: Any) -> None:
        """Load the model, and steer it if the configuration says so."""
        super().load_model(**settings)
        self.lirefs_hooks: dict[str, list[Any]] = {}
        given = dict((self.vllm_config.additional_config or {}).get("lirefs", {}))
        if not given:
            return
        if "directions" not in given:
            raise BackendError('additional_config["lirefs"] needs "directions", the file\'s path')
        found: Any = Directions.load(given.pop("directions"))
        if len(found) == 1 or "layer" in given:
            found = found[given.pop("layer", next(iter(found)))]
        steer = Steer(found, given.pop("operator", "add"), given.pop("strength", 1.0), **given)
        must_carry(self.vllm_config, [steer])
        self._place("served", [plan_of(steer, self.vllm_config)])

    def lirefs_steer(self, key: str, plans: list[dict[str, Any]]) -> str:
        """Place operators until `lirefs_release`; returns why not, empty if they are in place."""
        try:
            self._place(key, plans)
        except LirefsError as problem:
            return str(problem)
        return ""

    def lirefs_release(self, key: str) -> None:
        """Remove what was placed under this key, if anything was."""
        for hook in self.lirefs_hooks.pop(key, []):
            hook.remove()

    def lirefs_weight(self, name: str) -> list[float]:
        """The values of a parameter that is in this process, empty if it is not here."""
        found = dict(self.get_model().named_parameters()).get(name)
        return [] if found is None else found.detach().float().flatten().tolist()

    def _place(self, key: str, plans: list[dict[str, Any]]) -> None:
        hooks = self.lirefs_hooks[key] = []
        try:
            for plan in plans:
                hooks += place_operators(self.get_model(), plan, self._batch)
        except BaseException:
            self.lirefs_release(key)
            raise

    def _batch(self) -> tuple[Any, Any]:
        """Prompt lengths of the requests of this forward pass, and where each one's tokens end."""
        requests = self.model_runner.input_batch.num_reqs
        ends = self.model_runner.query_start_loc.np[1 : requests + 1]
        return self.model_runner.input_batch.num_prompt_tokens[:requests], ends
