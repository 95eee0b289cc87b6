from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import save_file

from lirefs.errors import DataFileError, QuestionsError
from lirefs.files import (
    atomic_path,
    atomic_write_text,
    cache_dir,
    parse_json,
    read_jsonl,
    sha256_of,
)


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    atomic_write_text(path, "eins\n")
    atomic_write_text(path, "zwei ü\n")
    assert path.read_bytes() == "zwei ü\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "b.txt"
    atomic_write_text(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_a_file_and_of_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 700_000)
    expected = hashlib.sha256(b"abc" * 700_000).hexdigest()
    assert sha256_of(path) == sha256_of(str(path)) == sha256_of(b"abc" * 700_000) == expected


def test_cache_dir_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LIREFS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LIREFS_CACHE")
    assert cache_dir().name == "lirefs"


def test_read_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    # The line separator U+2028 inside a string does not end a line of JSON Lines.
    path.write_bytes(b'\xef\xbb\xbf{"a": "1\xe2\x80\xa82"}\r\n\n{"b": null}')
    assert read_jsonl(path) == [(1, {"a": "1\u20282"}), (3, {"b": None})]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        (b'{"a": 1}\n\n[1]\n', "line 3: expected an object {...}, found [1]"),
        (b"null\n", "found null"),
        (b'{"a": "\xff"}\n', "line 1: not UTF-8"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"a": "\\ud83d"}\n', "line 1: not JSON (\\ud83d is half of a character"),
        (b'{"a": 1' + b"0" * 400 + b"}\n", "line 1: not JSON (a number with too many digits"),
        (b'{"a": 1' + b"0" * 5_000 + b"}\n", "line 1: not JSON (a number with too many digits"),
        (b"\n \n", "empty"),
        (b"", "empty"),
    ],
)
def test_read_jsonl_says_what_is_wrong_and_where(tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(QuestionsError) as caught:
        read_jsonl(path, QuestionsError)
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert "\n" not in message


def test_json_is_read_as_deep_as_asked():
    assert parse_json("[[1]]", levels=2) == [[1]]
    assert parse_json('{"a": "\\ud83d\\ude00", "b": [NaN]}')["a"] == "\U0001f600"
    with pytest.raises(ValueError, match="deeper than 2 levels"):
        parse_json("[[[1]]]", levels=2)


def test_read_jsonl_without_a_file(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataFileError, match="cannot be read"):
        read_jsonl(tmp_path)


def test_a_written_file_has_the_permissions_that_the_user_gives(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a.txt", "a")
        with atomic_path(tmp_path / "b.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
