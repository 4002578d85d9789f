"""Packed files that are foreign, damaged, or made to harm."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from lightning_condensa.deploy.chunks import compress
from lightning_condensa.deploy.container import write_container
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed import (
    Packed,
    read_packed,
    unpack,
    write_packed,
)


def with_spec(spec: object, data: bytes) -> bytes:
    """A file with a correct hash."""
    text = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
    return write_container({"spec": zlib.compress(text), "data": data}, {})


def stream(name: str, words: int, codec: str = "raw") -> list[object]:
    """A stream of bytes in one segment, as the spec lists it."""
    return [name, [[words, [[codec, words]]]]]


def one_tensor(shape: list[int], nnz: object, gaps: list[int] | None, values: list[int]) -> bytes:
    """A file of one int8 tensor, stored raw, as declared."""
    listed = [stream("g8", len(gaps))] if gaps else []
    listed += [stream("v8", len(values))] if values else []
    gap_bytes = None if gaps is None else len(gaps)
    entry = ["w", shape, nnz, gap_bytes, "I8", 8, "F32", None, None, None]
    spec = {"encoded": [entry], "rest": [], "aliases": {}, "streams": listed}
    return with_spec(spec, bytes(gaps or []) + bytes(values))


def encoded_entry(**changes: object) -> list[object]:
    fields: dict[str, object] = {
        "name": "w",
        "shape": [8],
        "nnz": 8,
        "gaps": None,
        "type": "I8",
        "bits": 8,
        "weight": "F32",
        "scale": None,
        "group": None,
        "alphabet": None,
    }
    return list({**fields, **changes}.values())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (encoded_entry(name=3), "name must be a string"),
        (encoded_entry(name="\ud800"), "not valid Unicode"),
        (encoded_entry(shape=[-8]), "must be an integer from 0"),
        (encoded_entry(shape=[8.0]), "must be an integer from 0"),
        (encoded_entry(shape=[True] * 8), "must be an integer from 0"),
        (encoded_entry(shape="8"), "must be a list"),
        (encoded_entry(shape=[2**40, 2**40]), "spans more than"),
        (encoded_entry(shape=[0, 2**40, 2**40], nnz=0), "spans more than"),
        (encoded_entry(shape=[10**4000]), "an integer of"),
        (encoded_entry(shape=[1] * 65), "at most 64"),
        (encoded_entry(nnz=9), "nnz of tensor 'w' must be an integer from 0 to 8"),
        (encoded_entry(nnz=-1), "nnz"),
        (encoded_entry(nnz=None), "nnz"),
        (encoded_entry(gaps=7), "8 values but 7 gap bytes"),
        (encoded_entry(gaps=9), "gap bytes"),
        (encoded_entry(gaps=-1), "gap bytes"),
        (encoded_entry(type="I64"), "unknown value type"),
        (encoded_entry(type="torch.load"), "unknown value type"),
        (encoded_entry(type=["I8"]), "must be a string"),
        (encoded_entry(bits=4), "bits of tensor 'w' must be 8, they are 4"),
        (encoded_entry(bits=32, type="F32", alphabet=[1]), "must be 8, they are 32"),
        (encoded_entry(alphabet=[]), "0 codes, 1 to 256"),
        (encoded_entry(alphabet=list(range(257))), "257 codes, 1 to 256"),
        (encoded_entry(alphabet=[3, 3]), "not ascending"),
        (encoded_entry(alphabet=[256]), "a code of tensor 'w' must be an integer from 0 to 255"),
        (encoded_entry(alphabet=[-1]), "a code of tensor 'w'"),
        (encoded_entry(alphabet=8), "must be a list"),
        (encoded_entry(group=4), "has a group but no scale"),
        (encoded_entry(scale=[3], group=4), "does not broadcast"),
        (encoded_entry(scale=[2], group=0), "does not broadcast"),
        (encoded_entry(scale=[2], group=-4), "group of tensor 'w'"),
        (encoded_entry(scale=[1, 2], group=4), "does not broadcast"),
        (encoded_entry(weight="I8"), "unknown weight type"),
        (encoded_entry(scale=[9]), "does not broadcast"),
        (encoded_entry(scale=[1, 8]), "does not broadcast"),
        (encoded_entry(scale=[2**50]), "a dimension of the scale"),
        (encoded_entry()[:7], "a list of 10 items"),
        ({"name": "w"}, r"an object with the keys \['name', 'shape', 'terms'\]"),
    ],
)
def test_hostile_entries(entry: object, message: str) -> None:
    streams = [stream("v8", 8)]
    spec = {"encoded": [entry], "rest": [], "aliases": {}, "streams": streams}
    with pytest.raises(PackedFileError, match=message):
        unpack(with_spec(spec, b"12345678"))


def combined_entry(*terms: list[list[object]], **changes: object) -> dict[str, object]:
    """A sum of terms; parts are what an entry has beside its name."""
    return {"name": "w", "shape": [2, 4], "terms": list(terms), **changes}


def part(*shape: int, **changes: object) -> list[object]:
    """A dense int8 part."""
    return encoded_entry(shape=list(shape), nnz=int(np.prod(shape)), **changes)[1:]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (combined_entry(), "has 0 parts, it needs 2"),
        (combined_entry([part(2, 4)]), "has 1 parts, it needs 2"),
        (combined_entry([], [part(2, 4)]), "a term of tensor 'w' has 0 parts"),
        (combined_entry([part(2, 1), part(1, 4), part(2, 4)]), "has 3 parts, it may have 1 or 2"),
        (combined_entry([part(2, 1), part(4, 1)]), "do not make up its own"),
        (combined_entry([part(2, 1), part(1, 3)]), "do not make up its own"),
        (combined_entry([part(2, 3), part(3, 4)]), "do not make up its own"),
        (combined_entry([part(2), part(1, 4)]), "do not make up its own"),
        (combined_entry([part(2, 4)], [part(8)]), "do not make up its own"),
        (combined_entry([part(2, 1), part(1, 4, weight="F16")]), "different weight types"),
        (combined_entry([part(2, 1), encoded_entry()]), "a list of 9 items"),
        (combined_entry([part(2, 1), [part(1, 4)]]), "a list of 9 items"),
        (combined_entry([part(2, 1), combined_entry()]), "a list of 9 items"),
        (combined_entry([part(2, 1), part(1, 4, bits=4)]), "bits of tensor 'a part of w' must be"),
        (combined_entry([part(2, 1), part(1, 4, type="I64")]), "unknown value type"),
        (combined_entry(terms=8), "the terms of tensor 'w' must be a list"),
        (combined_entry(terms=[8]), "a term of tensor 'w' must be a list"),
        (combined_entry(name=3), "name must be a string"),
        (combined_entry(shape=[2**40, 2**40]), "spans more than"),
        (combined_entry(more=1), "an object with the keys"),
    ],
)
def test_hostile_sums(entry: object, message: str) -> None:
    streams = [stream("v8", 6)]
    spec = {"encoded": [entry], "rest": [], "aliases": {}, "streams": streams}
    with pytest.raises(PackedFileError, match=message):
        unpack(with_spec(spec, b"\1" * 6))


def test_the_parts_of_those_tests_are_good_by_themselves() -> None:
    entry = combined_entry([part(2, 1), part(1, 4)])
    streams = [stream("v8", 6)]
    spec = {"encoded": [entry], "rest": [], "aliases": {}, "streams": streams}
    found = unpack(with_spec(spec, b"\1\2\3\4\5\6")).encoded["w"]
    assert found.decode().tolist() == [[3, 4, 5, 6], [6, 8, 10, 12]]


def test_a_small_product_of_a_huge_weight_is_refused_before_it_is_decoded() -> None:
    size = 2**20
    parts = [part(size, 1), part(1, size)]
    empty = [[*p[:1], 0, 0, *p[3:]] for p in parts]
    spec = {
        "encoded": [combined_entry(empty, shape=[size, size])],
        "rest": [],
        "aliases": {},
        "streams": [],
    }
    with pytest.raises(PackedFileError, match="max_bytes is"):
        unpack(with_spec(spec, b""))


def test_the_entry_of_those_tests_is_good_by_itself() -> None:
    streams = [stream("v8", 8)]
    spec = {"encoded": [encoded_entry()], "rest": [], "aliases": {}, "streams": streams}
    assert unpack(with_spec(spec, b"12345678")).encoded["w"].codes.tolist() == list(b"12345678")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoded": 3}, "encoded must be a list"),
        ({"rest": [["b", [2], "F128"]]}, "unknown type of tensor 'b'"),
        ({"rest": [["b", [2]]]}, "a list of 3 items"),
        ({"rest": [["w", [], "U8"]]}, "two tensors are named 'w'"),
        ({"aliases": {"w": "w"}}, "also the name of a tensor"),
        ({"aliases": {"v": "u"}}, "names no tensor"),
        ({"aliases": {"v": "u", "u": "w"}}, "names no tensor"),
        ({"aliases": {"v": 1}}, "must be a string"),
        ({"aliases": []}, "must be an object"),
        ({"streams": []}, "need the streams"),
        ({"streams": [["v16", [[8, [["raw", 8], ["raw", 8]]]]]]}, "need the streams"),
        ({"streams": [stream("v8", 8)] * 2}, "need the streams"),
        ({"streams": [["v8", [[8, []]]]]}, "a list of 1 items"),
        ({"streams": [["v8", [[8]]]]}, "a list of 2 items"),
        ({"streams": [["v8", []]]}, "segments of 0 words, the tensors need 8"),
        ({"streams": [["v8", [[4, [["raw", 8]]], [4, [["raw", 0]]]]]]}, "from 0 to 4"),
        ({"streams": [["v8", [[8, [["raw", 8]]]] * 2]]}, "segments of 16 words"),
        ({"streams": [["v8", [[-8, [["raw", 0]]], [8, [["raw", 8]]]]]]}, "from 0 to 8"),
        ({"streams": [stream("v8", 9)]}, "from 0 to 8"),
        ({"streams": [["v8", [[8, [["raw", 7]]]]]]}, "streams take 7 bytes, the file holds 8"),
        ({"streams": [stream("v8", 8, "pickle")]}, "unknown codec"),
        ({"streams": [stream("v8", 8, "zstd")]}, "zstd chunk"),
        ({"streams": [stream("v8", 8, "zlib")]}, "zlib chunk is corrupt"),
        ({"streams": {"v8": 8}}, "streams must be a list"),
        ({"more": 1}, "must be an object with the keys"),
    ],
)
def test_hostile_specs(changes: dict[str, object], message: str) -> None:
    streams = [stream("v8", 8)]
    spec = {"encoded": [encoded_entry()], "rest": [], "aliases": {}, "streams": streams}
    with pytest.raises(PackedFileError, match=message):
        unpack(with_spec({**spec, **changes}, b"12345678"))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"a":1,"a":2}'])
def test_specs_that_are_no_objects(text: bytes) -> None:
    with pytest.raises(PackedFileError, match="the spec"):
        unpack(with_spec(text, b""))


def test_specs_that_are_not_zlib_or_bombs() -> None:
    with pytest.raises(PackedFileError, match="zlib chunk is corrupt"):
        unpack(write_container({"spec": b"hello", "data": b""}, {}))
    with pytest.raises(PackedFileError, match="more than the"):
        unpack(with_spec(b" " * (2**24 + 1), b""))


@pytest.mark.parametrize(
    ("shape", "nnz", "gaps", "values", "message"),
    [
        ([300], 2, [0, 255], [1, 1], "end in the middle"),
        ([300], 1, [255, 45], [1], "beyond its 300 elements"),
        ([2], 2, [1, 0], [1, 1], "beyond its 2 elements"),
        ([600], 1, [0, 0], [1], "2 positions, not 1"),
        ([600], 2, [255, 0, 255, 0], [1, 1], None),
        ([600], 2, [255, 255, 1], [1, 1], "1 positions, not 2"),
        ([600], 2, [3, 4], [1, 0], "does not hold 2 non-zero codes"),
        ([3], 2, None, [1, 1, 1], "does not hold 2 non-zero codes"),
        ([600], 0, [5], [], "0 positions|1 positions"),
    ],
)
def test_contradicting_positions_and_values(
    shape: list[int], nnz: int, gaps: list[int] | None, values: list[int], message: str | None
) -> None:
    data = one_tensor(shape, nnz, gaps, values)
    if message is None:
        assert unpack(data).encoded["w"].codes.nonzero().flatten().tolist() == [255, 511]
        return
    with pytest.raises(PackedFileError, match=message):
        unpack(data)


def test_booleans_are_0_or_1() -> None:
    spec = {
        "encoded": [],
        "rest": [["b", [2], "BOOL"]],
        "aliases": {},
        "streams": [stream("r8", 2)],
    }
    assert unpack(with_spec(spec, b"\1\0")).rest["b"].tolist() == [True, False]
    with pytest.raises(PackedFileError, match="boolean"):
        unpack(with_spec(spec, b"\1\2"))


def test_huge_tensors_are_refused_before_they_are_allocated(tmp_path: Path) -> None:
    data = one_tensor([2**40], 0, [], [])
    with pytest.raises(PackedFileError, match="max_bytes is 17179869184"):
        unpack(data)
    data = one_tensor([1000, 1000], 0, [], [])
    assert unpack(data).encoded["w"].codes.shape == (1000, 1000)
    with pytest.raises(PackedFileError, match="max_bytes is 1000000"):
        unpack(data, max_bytes=1_000_000)
    path = tmp_path / "m.condensa"
    size = write_packed(path, Packed())
    with pytest.raises(PackedFileError, match=f"the file has {size} bytes"):
        read_packed(path, max_bytes=size - 1)


def test_lack_of_memory_is_an_error_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = one_tensor([1000], 0, [], [])

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "zeros", fail)
    with pytest.raises(PackedFileError, match="not enough memory"):
        unpack(data)


def test_indices_beyond_the_alphabet() -> None:
    entry = encoded_entry(shape=[4], nnz=3, type="F32", alphabet=[0, 1 << 30])
    spec = {"encoded": [entry], "rest": [], "aliases": {}, "streams": [stream("v8", 4)]}
    found = unpack(with_spec(spec, bytes([1, 0, 1, 1]))).encoded["w"]
    assert found.decode().tolist() == [2.0, 0.0, 2.0, 2.0]
    with pytest.raises(PackedFileError, match="indices beyond its alphabet"):
        unpack(with_spec(spec, bytes([1, 0, 2, 1])))
    with pytest.raises(PackedFileError, match="does not hold 3 non-zero codes"):
        unpack(with_spec(spec, bytes([1, 0, 1, 0])))


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_bombs_do_not_go_off(codec: str) -> None:
    bomb = bytes(20_000_000)
    stored = zlib.compress(bomb) if codec == "zlib" else bytes(compress(bomb).data)
    numel = len(stored) + 10
    spec = {
        "encoded": [encoded_entry(shape=[numel], nnz=0)],
        "rest": [],
        "aliases": {},
        "streams": [["v8", [[numel, [[codec, len(stored)]]]]]],
    }
    with pytest.raises(PackedFileError, match=f"{numel}"):
        unpack(with_spec(spec, stored))
