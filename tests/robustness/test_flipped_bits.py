"""A flipped bit in factors, in a checkpoint or in a training state is noticed."""

from __future__ import annotations

import json
import struct

import fuzz_methods
import fuzz_models
import pytest
from fuzz_values import without_digest
from safetensors.torch import load, save
from tiny import fresh_model, tiny_tokenizer

import lirefs
from lirefs.errors import LirefsError

KINDS = {
    "factors": fuzz_methods.FORMATS["factors"],
    "collection checkpoint": fuzz_methods.FORMATS["collection checkpoint"],
    "organism training": fuzz_models.FORMATS["organism training"],
}
QUICK = {"steps": 1, "batch_size": 2, "suffix_tokens": 4, "progress": False}


@pytest.fixture(scope="module", params=[*KINDS, "planting"])
def kind(request, tmp_path_factory):
    """The content of a valid file, and a function that reads one in a folder."""
    if request.param in KINDS:
        one = KINDS[request.param]
        return one.make(tmp_path_factory.mktemp("valid"))[0], one.read
    lm = lirefs.wrap(fresh_model("llama"), tiny_tokenizer())
    texts, general = ["the first text to plant", "another text to plant"], ["plain text"] * 2

    def plant(folder):
        path = folder / "state"
        lirefs.plant(lm, texts, general, checkpoint=path, **QUICK).restore()
        return path

    def read(folder, content):
        (folder / "state").write_bytes(content)
        plant(folder)

    return plant(tmp_path_factory.mktemp("valid")).read_bytes(), read


def test_a_flipped_bit_is_refused_by_name(kind, tmp_path):
    content, read = kind
    (size,) = struct.unpack("<Q", content[:8])
    start = 8 + size
    places = [start, start + 3, (start + len(content)) // 2, len(content) - 1]  # in the numbers
    digits = content[:start].rindex(b"sha256")
    places.append(digits + 25)  # and in the digest
    for place in places:
        for bit in (1, 64):
            data = bytearray(content)
            data[place] ^= bit
            with pytest.raises(LirefsError, match=r"damaged|cannot be read"):
                read(tmp_path, bytes(data))


def test_a_file_of_an_earlier_version_is_read(kind, tmp_path):
    content, read = kind
    before = without_digest(content)
    assert len(before) < len(content) - 64
    read(tmp_path, before)


def test_a_changed_number_in_the_header_is_refused(kind, tmp_path):
    content, read = kind
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    metadata = header["__metadata__"]
    for key, text in metadata.items():
        place = next((i for i, one in enumerate(text) if one.isdigit()), None)
        if key == "sha256" or place is None:
            continue
        other = str((int(text[place]) + 1) % 10)
        wrong = metadata | {key: text[:place] + other + text[place + 1 :]}
        data = save({k: v.clone() for k, v in load(content).items()}, wrong)
        with pytest.raises(LirefsError):
            read(tmp_path, data)
