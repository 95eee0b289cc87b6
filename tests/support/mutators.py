"""Changes to valid files: to bytes, JSON, and the structure of safetensors and GGUF files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Change = Callable[[Random, bytes, list[bytes]], bytes]

EDGES = (0, 1, -1, 2, 7, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1)
NAMES = (
    "../../x", "/etc/passwd", "con", "..", ".", "", "a\x00b", "x" * 10_000, "a/b", "\ud800", "\n",
    "<b>", "résumé \u202e", "unchanged", "{}", "{0.__class__}", "%s", "__metadata__",
)  # fmt: skip
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4",
           "U64", "F8_E8M0", "nonsense")  # fmt: skip
# Text that json.dumps cannot write; it replaces a placeholder afterwards.
_RAW = {
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@open@": "[" * 100_000,
    "@objects@": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "@level@": "[" * 450 + "]" * 450,
    "@shallow@": "[" * 40 + "]" * 40,
    "@inf@": "1e999",
    "@minus@": "-1e999",
    "@digits@": "1" + "0" * 5_000,
    "@twice@": '{"a": 1, "a": [2]}',
}


def flipped(rng: Random, content: bytes, samples: list[bytes]) -> bytes:
    """Change bytes, whatever they mean."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((1, 1, 2, 4, 8, 64, 4096)), len(data) - at)
    kind = rng.randrange(10)
    if kind == 0 and data:
        for _ in range(rng.choice((1, 2, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = rng.randbytes(length or 1)
    elif kind == 4:
        data[at : at + length] = rng.randbytes(length)
    elif kind == 5:
        other = rng.choice(samples)
        data[at:] = other[rng.randrange(len(other) + 1) :]
    elif kind == 6:
        data[at:at] = data[at : at + length] * rng.choice((1, 2, 100))
    elif kind == 7:
        width = rng.choice((4, 8))
        low = rng.randrange(min(len(data), 200) + 1)
        data[low : low + width] = (rng.choice(EDGES) % 2 ** (8 * width)).to_bytes(width, "little")
    elif kind == 8:
        data = bytearray(rng.choice((b"", b"\x00" * len(data), b"\x00", data + data)))
    else:
        data = bytearray(_recoded(rng, bytes(data)))
    return bytes(data)


def _recoded(rng: Random, content: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return b"\xef\xbb\xbf" + content
    if kind == 1:
        return content.decode("latin-1").encode("utf-16")
    if kind == 2:
        return content.replace(b"\n", b"\r\n")
    if kind == 3:
        return content.replace(b" ", b"\x00", 1)
    return content.replace(b"\n", b"\r")


def json_changed(rng: Random, content: bytes, samples: list[bytes]) -> bytes:
    """Change values, keys and lists of a JSON document."""
    return json_text(rng, json.loads(content)).encode("utf-8", "surrogatepass")


def lines_changed(rng: Random, content: bytes, samples: list[bytes]) -> bytes:
    """Change one line of JSON Lines, or the order and number of lines."""
    lines = content.split(b"\n")
    at = rng.choice([row for row, line in enumerate(lines) if line.strip()])
    kind = rng.randrange(8)
    if kind == 0:
        lines.insert(at, rng.choice(lines))
    elif kind == 1:
        rng.shuffle(lines)
    elif kind == 2:
        del lines[at]
    else:
        lines[at] = json_changed(rng, lines[at], samples)
    return b"\n".join(lines)


def json_text(rng: Random, value: Any) -> str:
    """The JSON of a value with one change in it."""
    text = json.dumps(_changed(rng, value), ensure_ascii=rng.random() < 0.7)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def _changed(rng: Random, value: Any) -> Any:
    """A copy with one value or key changed, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        copy = dict(value)
        key = rng.choice(list(copy))
        kind = rng.randrange(12)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[rng.choice((*NAMES, key + "x"))] = copy[key]
        elif kind == 2:
            copy[rng.choice(NAMES)] = copy.pop(key)
        elif kind == 3:
            other = rng.choice(list(copy))
            copy[key], copy[other] = copy[other], copy[key]
        else:
            copy[key] = _changed(rng, copy[key])
        return copy
    if isinstance(value, list) and value and rng.random() < 0.9:
        items = list(value)
        at = rng.randrange(len(items))
        kind = rng.randrange(10)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items.insert(at, rng.choice(items))
        elif kind == 2:
            items[at] = rng.choice(items)
        else:
            items[at] = _changed(rng, items[at])
        return items
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, value * 2, value + 0.5, str(value), *EDGES, -5))
    return _anything(rng, value)


def _anything(rng: Random, value: Any) -> Any:
    return rng.choice(
        (
            None, True, False, 0, 1, -1, 1.5, 1e308, 1e-320, math.nan, math.inf, -math.inf, 10**18,
            10**400, -(10**400), "", "text", "1", "x" * 100_000, [], {}, [[]], [None], ["a"], [0],
            {"a": 1}, [value], {"x": value}, [1e308, 1e308], [value, value],
            *_RAW, *NAMES, *NAMES,
        )
    )  # fmt: skip


def safetensors_changed(rng: Random, content: bytes, samples: list[bytes]) -> bytes:
    """Change header, metadata or values of safetensors, sizes kept consistent where they can be."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        raise ValueError("no header to change")
    header = json.loads(content[8 : 8 + size])
    data = bytearray(content[8 + size :])
    metadata = header.get("__metadata__") or {}
    tensors = [name for name in header if name != "__metadata__"]
    kind = rng.randrange(12)
    if kind < 4 and metadata:
        key = rng.choice(list(metadata))
        try:
            metadata[key] = json_text(rng, json.loads(metadata[key]))
        except ValueError:
            metadata[key] = rng.choice(
                (*NAMES, "1", "-1", "1e9", "9" * 5_000, "0x1", "\u0661", " 2 ")
            )
        return _with_header(json.dumps(header).encode(), data)
    if kind == 4:
        return _with_header(json_text(rng, header).encode("utf-8", "surrogatepass"), data)
    if kind == 5 and metadata:
        del metadata[rng.choice(list(metadata))]
        return _with_header(json.dumps(header).encode(), data)
    name = rng.choice(tensors)
    begin, end = header[name]["data_offsets"]
    if kind == 6:  # another name for the same data
        new = rng.choice((*NAMES[:5], "x", name + "x", name.replace("0", "1"), name.upper()))
        header[new] = header.pop(name)
    elif kind == 7:  # one tensor less or more, with its data
        if rng.random() < 0.5:
            del header[name], data[begin:end]
            for other in header.values():
                if other.get("data_offsets", [0])[0] >= end:
                    other["data_offsets"] = [at - (end - begin) for at in other["data_offsets"]]
        else:
            copy = {**header[name], "data_offsets": [len(data), len(data) + end - begin]}
            data += data[begin:end]
            header[rng.choice((name + "2", "E." + name, "values." + name, "extra"))] = copy
    elif kind == 8:  # another dtype of the same size, or another shape
        _retyped(rng, header[name], end - begin)
    else:
        _other_values(rng, data, begin, end, header[name]["dtype"])
    return _with_header(json.dumps(header).encode(), data)


def _retyped(rng: Random, entry: dict[str, Any], n_bytes: int) -> None:
    widths = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    if rng.random() < 0.5:
        shape = entry["shape"]
        n = math.prod(shape)
        shapes = ([n], [1, n], [n, 1], shape[::-1], [*shape, 1], [1, *shape], [n // 2, 2], [])
        entry["shape"] = rng.choice(shapes)
    else:
        entry["dtype"] = rng.choice(_DTYPES)
        width = widths.get(entry["dtype"], 1)
        entry["shape"] = rng.choice(([n_bytes // width], [1, n_bytes // width]))


def _other_values(rng: Random, data: bytearray, begin: int, end: int, dtype: str) -> None:
    forms = {"F32": "<f", "F64": "<d", "F16": "<e", "I64": "<q"}
    form = forms.get(dtype, "<B")
    width = struct.calcsize(form)
    odd: tuple[Any, ...] = (math.nan, math.inf, -math.inf, -1.0, 0.0, 6e4, -6e4)
    if form in ("<f", "<d"):
        odd = (*odd, 1e38, -1e38, 1e-40, -0.0)
    if form in ("<q", "<B"):
        odd = (0, 1, 255) if form == "<B" else EDGES
    for _ in range(rng.choice((1, 1, 3, 50))):
        at = begin + width * rng.randrange(max(1, (end - begin) // width))
        if at + width <= end:
            data[at : at + width] = struct.pack(form, rng.choice(odd))


def _with_header(header: bytes, data: bytes | bytearray) -> bytes:
    padded = header + b" " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded + bytes(data)


def gguf_changed(rng: Random, content: bytes, samples: list[bytes]) -> bytes:
    """Write an edge value into a field of a GGUF header, or put an odd entry into it."""
    data = bytearray(content)
    fields, entries = _gguf_fields(content)
    if rng.random() < 0.2:  # one more entry, counted in the header
        key = rng.choice((b"general.architecture", b"general.alignment", b"x", b"\xff", b""))
        value = rng.choice(
            (
                struct.pack("<IIQ", 9, rng.randrange(14), 2**60),
                struct.pack("<IIQ", 9, 0, 5) + b"abcde",
                struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5_000 + struct.pack("<IQ", 4, 0),
                struct.pack("<IQ", 8, 2**63) + b"text",
                struct.pack("<II", 4, rng.choice((0, 3, 2**31))),
                struct.pack("<IIQ", 9, 9, 2**40) + struct.pack("<IQ", 4, 0) * 3,
            )
        )
        data[entries:entries] = struct.pack("<Q", len(key)) + key + value
        data[16:24] = struct.pack("<Q", struct.unpack("<Q", data[16:24])[0] + 1)
        return bytes(data)
    at, width = rng.choice(fields)
    old = int.from_bytes(data[at : at + width], "little")
    new = rng.choice((*EDGES, *range(14), len(data), old + 1, old - 1, old * 2, 2**62, -(2**63)))
    data[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(data)


def _gguf_fields(content: bytes) -> tuple[list[tuple[int, int]], int]:
    """Offset and width of every number in a header, and the offset of its entries."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    fields = [(4, 4), (8, 8), (16, 8)]
    at = 24

    def number(width: int) -> int:
        nonlocal at
        if at + width > len(content):
            raise ValueError("no header to change")
        fields.append((at, width))
        at += width
        return int.from_bytes(content[at - width : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner = number(4)
            for _ in range(number(8)):
                value(inner)
        else:
            number(widths[kind])

    tensors, entries = struct.unpack("<QQ", content[8:24])
    for _ in range(entries):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return fields, 24


MUTATORS: dict[str, Change] = {
    "bytes": flipped,
    "json": json_changed,
    "lines": lines_changed,
    "safetensors": safetensors_changed,
    "gguf": gguf_changed,
}
