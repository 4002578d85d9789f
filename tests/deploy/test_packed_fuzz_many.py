"""Many mutations of packed files of every value type, each with bounded memory.

``PACKED_FUZZ=20000`` sets how many the slow test makes.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zstandard

from lightning_condensa.deploy.container import read_container, write_container
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed import Packed, pack, unpack
from lightning_condensa.deploy.packed_reader import PackedReader, memory_of
from lightning_condensa.deploy.stored_tensor import decoded
from lightning_condensa.deploy.words import DTYPES
from lightning_condensa.schemes import Encoded, SumOfProducts

LIMIT = 4_000_000
# Parsing a spec of 16 MiB of JSON, the largest one allowed, is not part of what it declares.
PARSING = 400 * 2**20
HUGE = [0, -1, 255, 2**24, 2**31, 2**40, 2**48, 2**63, 10**30, 1.5, True, None, "", [], {}]
TYPES = [*DTYPES, "F128", "pickle", "torch.load", "v8", "r8", "raw", "zlib", "zstd"]
BOMB = bytes(50_000_000)
BOMBS = {
    "zlib": zlib.compress(BOMB, 9),
    "zstd": zstandard.ZstdCompressor(level=3).compress(BOMB),
    # Without its content size, and with a window of 128 MiB.
    "zstd, unknown size": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            compression_level=3, window_log=27, write_content_size=False
        )
    ).compress(BOMB),
}


def corpus() -> list[bytes]:
    """Files with every type of codes and of other tensors, sparse and dense."""
    generator = torch.Generator().manual_seed(0)
    types = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I8", "U8"]
    files = []
    for value in types:
        raw = torch.randint(-3, 4, (8, 40), generator=generator).float()
        raw = raw.abs() if value == "U8" else raw
        thin = raw * (torch.rand(8, 40, generator=generator) < 0.1)
        encoded = {
            "dense": Encoded(raw.to(DTYPES[value]), torch.float32, torch.rand(8, 1)),
            "sparse": Encoded(thin.to(DTYPES[value]), torch.float16),
            "grouped": Encoded(thin.to(DTYPES[value]), torch.bfloat16, torch.rand(8, 10), group=4),
        }
        files.append(pack(Packed(encoded, {"b": torch.rand(5)}, {"tied": "sparse"}, {"n": value})))
    rest = {n: torch.ones(70).to(t) for n, t in DTYPES.items() if not n.startswith("U")}
    files.append(pack(Packed({}, rest)))
    left, right = (Encoded(torch.rand(s).half(), torch.float32) for s in ((9, 2), (2, 12)))
    low = SumOfProducts.product(left, right, (9, 12))
    files.append(pack(Packed({"low": SumOfProducts.sum([low, Encoded.dense(torch.rand(9, 12))])})))
    return files


def places(value: object) -> list[tuple[Any, Any]]:
    """Containers in a JSON value, each with a key."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    found = [(value, key) for key in keys]
    return found + [p for key in keys for p in places(value[key])]  # type: ignore[index]


def rebuilt(spec: object, data: bytes) -> bytes:
    return write_container({"spec": zlib.compress(json.dumps(spec).encode(), 1), "data": data}, {})


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    _, blobs = read_container(file)
    return json.loads(zlib.decompress(blobs["spec"])), bytes(blobs["data"])


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip(file: bytes, rng: random.Random) -> bytes:
    return flipped(file, rng)


def cut(file: bytes, rng: random.Random) -> bytes:
    return file[: rng.randrange(len(file))] + rng.randbytes(rng.choice([0, 0, 9]))


def header(file: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(file[:8], "little")
    value = json.loads(file[8 : 8 + size])
    target, key = rng.choice(places(value))
    target[key] = rng.choice([*HUGE, *TYPES])
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def counts_and_types(file: bytes, rng: random.Random) -> bytes:
    spec, data = parts(file)
    for _ in range(rng.randint(1, 3)):
        target, key = rng.choice(places(spec))
        old = target[key]
        near = [old + 1, old - 1, old * 2] if type(old) is int else []
        target[key] = rng.choice([*near, *near, *HUGE, *TYPES])
    return rebuilt(spec, data)


def streams(file: bytes, rng: random.Random) -> bytes:
    spec, data = parts(file)
    return rebuilt(spec, flipped(data, rng))


def huge_shapes(file: bytes, rng: random.Random) -> bytes:
    """Shapes that fit each other, but not the data or the memory."""
    spec, data = parts(file)
    copied = copy.deepcopy(spec)
    for entry in [e for e in copied["encoded"] if isinstance(e, list)] + copied["rest"]:
        if rng.random() < 0.5:
            entry[1] = [rng.choice([1, 7, 1000, 2**20, 2**40]) for _ in range(rng.randint(0, 3))]
    return rebuilt(copied, data)


def bomb(file: bytes, rng: random.Random) -> bytes:
    """A chunk that is much larger than it says, or whose size the spec does say."""
    name = rng.choice(list(BOMBS))
    stored = BOMBS[name]
    words = rng.choice([len(stored) + 10, len(BOMB), len(BOMB) + 1])
    chunk = [name.partition(",")[0], len(stored)]
    spec = {
        "encoded": [],
        "rest": [["x", [words], "U8"]],
        "aliases": {},
        "streams": [["r8", [[words, [chunk]]]]],
    }
    return rebuilt(spec, stored)


def spec_bomb(file: bytes, rng: random.Random) -> bytes:
    stored = rng.choice([BOMBS["zlib"], zlib.compress(b"[" * 2**24, 1)])
    return write_container({"spec": stored, "data": b""}, {})


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (flip, cut, header, counts_and_types, streams, huge_shapes)
}


def outcome(file: bytes, limit: int) -> str:
    """``loaded`` or ``refused``; any other error propagates."""
    try:
        packed = unpack(file, max_bytes=limit)
        tensors = PackedReader(file).tensors(max_bytes=limit)
        for tensor in tensors.values():
            decoded(tensor)
    except PackedFileError:
        return "refused"
    assert pack(unpack(pack(packed))) == pack(packed)
    return "loaded"


def fuzz(count: int, seed: int) -> Counter[str]:
    files, rng = corpus(), random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(count):
        name = rng.choice(list(MUTATIONS))
        changed = MUTATIONS[name](rng.choice(files), rng)
        found[f"{name} {outcome(changed, LIMIT)}"] += 1
    return found


def test_a_thousand_mutations() -> None:
    found = fuzz(1000, 0)
    assert found["flip loaded"] + found["cut loaded"] < 30
    assert found["streams loaded"] > 20  # of values, which no check can tell from good ones
    assert found["counts_and_types refused"] > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutations() -> None:
    count = int(os.environ.get("PACKED_FUZZ", "20000"))
    found = fuzz(count, 1)
    print(dict(found))
    assert sum(found.values()) == count
    assert found["flip loaded"] + found["cut loaded"] < 0.03 * count
    assert found["streams loaded"] > 0.02 * count


@pytest.mark.parametrize("seed", range(12))
def test_bombs_take_no_more_than_twice_what_they_declare(seed: int) -> None:
    rng = random.Random(seed)
    for make in (bomb, spec_bomb):
        file = make(b"", rng)
        limit = rng.choice([LIMIT, 2**30])
        allowed = 2**24
        try:
            entries = PackedReader(file).spec.entries
            declared = memory_of(entries, entries)
            allowed += 2 * declared if declared <= limit else 0
        except PackedFileError:
            allowed = PARSING
        tracemalloc.start()
        try:
            outcome_of_bomb(file, limit)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= allowed


def outcome_of_bomb(file: bytes, limit: int) -> None:
    try:
        unpack(file, max_bytes=limit)
    except PackedFileError:
        return
