import ast
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from lirefs import Direction, Directions
from lirefs.errors import DirectionsFileError, DownloadError, ProvenanceError
from lirefs.export import hub


@pytest.fixture
def directions(lm):
    items = {
        (layer, "resid_pre"): Direction(torch.arange(32.0) + layer, layer, counts=(5, 6))
        for layer in (1, 2)
    }
    made = {"model": lm.fingerprint, "model_name": "tiny", "estimator": "MeanDifference()"}
    return Directions(items, {**made, "best_layer": 2})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that is a folder."""
    remote = tmp_path / "remote"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repository, **settings):
            remote.mkdir(exist_ok=True)

        def upload_folder(self, repo_id, folder_path, **settings):
            shutil.copytree(folder_path, remote, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub/{repo_id}")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, file, **_: str(remote / file))
    return remote


def test_what_is_pushed_is_loaded(directions, server, lm):
    assert hub.push_directions(directions, "me/mine") == "hub/me/mine"
    assert {path.name for path in server.iterdir()} == {"README.md", "directions.safetensors"}
    back = hub.load_directions("me/mine", lm)
    assert back.provenance == directions.provenance
    torch.testing.assert_close(back[1].vector, directions[1].vector)


def test_the_card_says_what_made_them(directions, server):
    card = hub.model_card(directions)
    assert card.startswith("---\nlibrary_name: lirefs\n")
    assert "MeanDifference()" in card
    assert "best layer: 2" in card
    assert card.count("| resid_pre |") == 2
    assert "unknown" in hub.model_card(Directions({(1, "resid_pre"): directions[1]}))


def test_no_name_breaks_out_of_the_card(directions):
    name = 'x")\n```\n\nimport evil\x1b[2J\u202e'
    made = dict.fromkeys(("model", "model_name", "source", "estimator", "best_layer"), name)
    labels = ["<b>|a", "![b](http://evil)"]
    card = hub.model_card(Directions(directions.items_by_place, {**made, "labels": labels}))
    code = card.split("```python\n")[1].split("\n```\n")[0]
    assert code.count("\n") == 4
    tree = ast.parse(code)
    assert name in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert len(re.findall("^```", card, re.MULTILINE)) == 2
    assert not re.search(r"[\x1b\u202e]|(?<!\\)(<b>|\]\()", card)
    assert (
        len({line.count("|") - line.count("\\|") for line in card.split("\n") if line[:1] == "|"})
        == 1
    )


def test_what_goes_wrong_has_a_name(directions, server, lm, monkeypatch):
    with pytest.raises(DirectionsFileError):
        hub.load_directions("me/absent")
    hub.push_directions(Directions(dict(directions), {"model": "another"}), "me/mine")
    with pytest.raises(ProvenanceError):
        hub.load_directions("me/mine", lm)

    def refuse(*arguments, **settings):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(DownloadError, match=r"no route to host$"):
        hub.load_directions("me/mine")

    class ConnectError(Exception):
        """An HTTP library's own error, as httpx has them: no OSError."""

    def unreachable(*arguments, **settings):
        raise ConnectError("name does not resolve")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(DownloadError, match="name does not resolve"):
        hub.load_directions("me/mine")
    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(DownloadError, match="cannot be pushed"):
        hub.push_directions(directions, "me/mine")
