"""Directions on the Hugging Face hub: pushed with a model card, and loaded back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from lirefs.directions.directions import Directions
from lirefs.errors import DownloadError, first_line_of_error, must_be
from lirefs.files import in_markdown
from lirefs.model.language_model import LanguageModel

FILE = "directions.safetensors"
_CARD = """\
---
library_name: lirefs
tags: [steering, interpretability, lirefs]
---

# Directions from {second} to {first}

Linear directions in the hidden states of a language model, for steering.

* model: {name} (fingerprint {fingerprint})
* questions: {source}
* estimator: {estimator}
* best layer: {best_layer}
* lirefs: {lirefs}

```python
import lirefs
from lirefs.export.hub import load_directions

lm = lirefs.load({quoted})
directions = load_directions("THIS/REPOSITORY", lm)
```

Projections on the unit direction, by class ({second}, {first}):

| layer | site | norm | {columns} |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def model_card(directions: Directions) -> str:
    """A model card in Markdown: model, data, estimator, and what was measured at each layer.

    All of it comes from the directions and their provenance.
    """
    must_be(directions, Directions, "directions")
    given = directions.provenance
    name = str(given.get("model_name") or given.get("model_hint") or "unknown")
    rows = [
        f"| {one.layer} | {in_markdown(one.site)} | {one.norm:.3g} | {one.means[0]:.3g} | "
        f"{one.means[1]:.3g} | {one.spread[0]:.3g} | {one.spread[1]:.3g} | {one.counts[0]} | "
        f"{one.counts[1]} |"
        for one in directions.values()
    ]
    first, second = map(in_markdown, directions.names)
    columns = [f"{what} {one}" for what in ("mean", "spread", "n") for one in (second, first)]
    known = ("source", "estimator", "best_layer", "lirefs")
    return _CARD.format(
        first=first,
        second=second,
        columns=" | ".join(columns),
        name=in_markdown(name),
        quoted=json.dumps(name),  # pure ASCII, in one line
        fingerprint=in_markdown(str(given.get("model", "unknown"))[:16]),
        rows="\n".join(rows),
        **{key: in_markdown(str(given.get(key, "unknown"))) for key in known},
    )


def push_directions(
    directions: Directions, repository: str, *, private: bool = False, token: str | None = None
) -> str:
    """Push directions and their model card to a hub repository; return the commit's address.

    Args:
        directions: The directions.
        repository: `owner/name`; created if need be.
        private: Whether a new repository is private.
        token: Access token; None for the one that `hf auth login` has stored.

    Raises:
        DownloadError: The hub refused, or could not be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as work:
        directions.save(Path(work) / FILE)
        (Path(work) / "README.md").write_text(model_card(directions), encoding="utf-8")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=work, commit_message="Add directions"
            )
        except Exception as problem:  # the hub's client lets its HTTP library's errors through
            reason = first_line_of_error(problem)
            raise DownloadError(f"{repository}: cannot be pushed: {reason}") from problem
    return str(commit.commit_url)


def load_directions(
    repository: str,
    lm: LanguageModel | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Directions:
    """Load directions from a hub repository; the hub's client caches the file.

    Args:
        repository: `owner/name`.
        lm: If given, the directions must have been fitted on this very model.
        revision: Branch, tag or commit.
        token: Access token, for a private repository.

    Raises:
        DownloadError: The repository or the file does not exist, or the hub cannot be reached.
        DirectionsFileError: The file is damaged or holds something else.
        ProvenanceError: The directions were fitted on a model other than `lm`.
    """
    try:
        path = hf_hub_download(repository, FILE, revision=revision, token=token)
    except Exception as problem:  # the hub's client lets its HTTP library's errors through
        message = f"{repository}: cannot be loaded: {first_line_of_error(problem)}"
        raise DownloadError(message) from problem
    return Directions.load(path, lm)
