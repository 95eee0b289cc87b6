"""Every way to run one steering of one model, asked by the checks of the exporters themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lirefs.errors import BackendError, must_be
from lirefs.export.bake import prepared
from lirefs.export.runtimes import RUNTIMES, Runtime
from lirefs.files import html_table
from lirefs.model.language_model import LanguageModel
from lirefs.steering.steer import Steer

_BAKED = Runtime(
    "baked weights",
    prepared,
    "lirefs.bake(steer, lm.model).save_pretrained(folder), for any server",
)


@dataclass(frozen=True)
class Way:
    """One runtime, for one steering of one model.

    Attributes:
        runtime: Its name.
        possible: Whether it can carry the steering. Whether it knows the architecture, only the
            runtime itself can say, when it loads the model.
        exact: Whether its numbers are those of the hooks on the same weights, up to the rounding of
            its arithmetic.
        reason: Why it is not possible; empty where it is.
        run: The lines or the command to run.
    """

    runtime: str
    possible: bool
    exact: bool
    reason: str
    run: str


class Ways(tuple[Way, ...]):
    """Ways to run a steering; a notebook shows a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        lines = [
            f"{one.runtime}: {one.run if one.possible else 'no, ' + one.reason}" for one in self
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        able = [one.runtime for one in self if one.possible]
        return html_table(f"Ways({', '.join(able)})", [asdict(one) for one in self])


def ways(lm: LanguageModel, steer: Steer) -> Ways:
    """List every runtime for this model and this steering.

    Nothing is copied or changed, and no other runtime is imported. A way that is possible is exact:
    what would only come near is refused by the exporters.

    Args:
        lm: The model.
        steer: The steering.

    Returns:
        For transformers hooks, TransformerLens, nnsight, vLLM, a control vector of llama.cpp and
        baked weights: whether it can carry the steering, whether it is exact, the reason if not,
        and what to run.

    Raises:
        BackendError: `lm` or `steer` is something else.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> questions = lirefs.load_questions("organism")
        >>> direction = lirefs.fit(lm, questions, layers=[2], progress=False).best
        >>> found = lirefs.export.ways(lm, lirefs.Steer(direction, "amplify", 0.1))
        >>> [one.runtime for one in found if one.possible]
        ['transformers hooks', 'TransformerLens', 'nnsight', 'vLLM']
    """
    must_be(lm, LanguageModel, "lm", BackendError)
    must_be(steer, Steer, "steer", BackendError)
    found = []
    for one in (*RUNTIMES, _BAKED):
        reason = one.refusal(steer, lm.model)
        found.append(Way(one.name, not reason, not reason, reason, one.run))
    return Ways(found)
