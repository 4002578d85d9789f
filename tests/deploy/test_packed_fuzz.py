"""Packed files damaged by chance: at every bit, at every length, and with a good hash."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_condensa.deploy.container import read_container, write_container
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed import Packed, pack, unpack
from lightning_condensa.schemes import Encoded, SumOfProducts


def small() -> Packed:
    codes = torch.zeros(40, dtype=torch.int8)
    codes[::9] = 3
    factors = [Encoded(torch.ones(sizes).half(), torch.float32) for sizes in ((2, 1), (1, 3))]
    product = SumOfProducts.product(factors[0], factors[1], (2, 3))
    low = SumOfProducts.sum([product, Encoded(torch.eye(2, 3).half(), torch.float32)])
    return Packed(
        {"w": Encoded(codes.view(4, 10), torch.float32, torch.rand(4, 1)), "low": low},
        {"b": torch.tensor([True, False]), "steps": torch.tensor(3)},
        {"tied": "w"},
        {"note": "é"},
    )


def spec_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    _, blobs = read_container(data)
    return json.loads(zlib.decompress(blobs["spec"])), bytes(blobs["data"])


def with_spec(spec: object, data: bytes) -> bytes:
    """A file with a correct hash."""
    return write_container({"spec": zlib.compress(json.dumps(spec).encode()), "data": data}, {})


def test_every_flipped_bit_is_noticed_or_harmless() -> None:
    data = pack(small())
    good = pack(unpack(data))
    refused = 0
    for position in range(len(data)):
        for flip in (*(1 << bit for bit in range(8)), 255):
            damaged = bytearray(data)
            damaged[position] ^= flip
            try:
                back = unpack(bytes(damaged))
            except PackedFileError:
                refused += 1
            else:
                assert pack(back) == good
    assert refused > 8.9 * len(data)


def test_every_truncation_is_noticed() -> None:
    data = pack(small())
    for length in range(len(data)):
        with pytest.raises(PackedFileError):
            unpack(data[:length])
    with pytest.raises(PackedFileError, match="follow"):
        unpack(data + b"\0")


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.sampled_from([2**31, 2**47, 2**63, 2**64, 10**30, -1, 0]),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["", "w", "b", "I8", "F32", "BOOL", "raw", "zstd", "zlib", "g8", "r64"]),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(p for key, item in items for p in places(item, (*path, key)))]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_spec_with_a_good_hash_loads_or_is_refused(data: st.DataObject) -> None:
    spec, body = spec_of(pack(small()))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places(spec)[1:]))
        target = spec
        for key in parents:
            target = target[key]
        target[last] = data.draw(JSON_VALUES)
    try:
        unpack(with_spec(spec, body), max_bytes=10_000_000)
    except PackedFileError:
        return


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_data_with_a_good_hash_loads_or_is_refused(data: st.DataObject) -> None:
    spec, body = spec_of(pack(small()))
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack(with_spec(spec, bytes(changed)))
    except PackedFileError:
        return


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PackedFileError):
        unpack(data)
