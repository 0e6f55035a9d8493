"""Headers of safetensors that lie: refused with a sentence, and without taking the memory that they ask for."""

import json
import pathlib
import struct
import tracemalloc

import pytest

from llama_eqx.errors import CheckpointError
from llama_eqx.interop.huggingface import filed_tensors


def entry(shape=(2,), offsets=(0, 8), kind="F32", **more):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets), **more}


def filed(header: dict | bytes, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
ABUSES = {
    "no header": b"",
    "half a length": b"\0" * 4,
    "a header beyond the end": filed({"a": entry()}, length=10**6),
    "a header of 2^63 bytes": filed({"a": entry()}, length=2**63),
    "a header of 2^64 - 1 bytes": filed({"a": entry()}, length=2**64 - 1),
    "a header of 17 MB": filed(b'{"a":' + json.dumps(entry()).encode() + b"}" + b" " * (17 * 2**20)),
    "a header of 100 MB": filed(b'{"a":' + json.dumps(entry()).encode() + b"}" + b" " * (100 * 2**20)),
    "a header that is not JSON": filed(b"{" * 50),
    "a header that is a list": filed(b"[]"),
    "a header that is not UTF-8": filed(b'{"\xff":1}'),
    "a header nested deep": filed(DEEP),
    "overlapping": filed({"a": entry(), "b": entry()}),
    "overlapping by a byte": filed({"a": entry(), "b": entry(offsets=(7, 15))}, bytes(16)),
    "a hole": filed({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "out of the file": filed({"a": entry(offsets=(100, 108))}),
    "backwards": filed({"a": entry(offsets=(8, 0))}),
    "negative": filed({"a": entry(offsets=(-8, 0))}),
    "too short for its shape": filed({"a": entry((1000,))}),
    "2^63 elements": filed({"a": entry((2**63,))}),
    "2^64 elements by product": filed({"a": entry((2**32, 2**32))}),
    "overflow to the right size": filed({"a": entry((2**62, 8, 2), (0, 0))}, b""),
    "a negative shape": filed({"a": entry((-2,))}),
    "an unknown dtype": filed({"a": entry(kind="X99")}),
    "a name twice": filed(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry((4,), (0, 16))).encode() + b"}", bytes(16)),
    "bytes after the end": filed({"a": entry()}, bytes(1000)),
}


@pytest.mark.parametrize("name", ABUSES)
def test_is_refused(tmp_path, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(ABUSES[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            filed_tensors(file)
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()
    assert error.value.where == str(file)
    assert len(str(error.value)) < 600


def test_what_is_in_order_is_read(tmp_path):
    file = pathlib.Path(tmp_path, "model.safetensors")
    file.write_bytes(filed({"a": entry(), "__metadata__": {"format": "pt"}}))
    assert filed_tensors(file)["a"].map().shape == (2,)
