from __future__ import annotations

import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lightning_condensa.deploy import chunks
from lightning_condensa.deploy.chunks import (
    Chunk,
    compress,
    decompress,
    estimate_size,
    inflate,
)
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.streams import (
    BLOCK,
    check_gaps,
    encode_gaps,
    join_planes,
    joined,
    positions,
    split_planes,
)
from lightning_condensa.deploy.words import Words


def decode_gaps(stream: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *positions(stream)])


def bytes_array(values: list[int]) -> NDArray[np.uint8]:
    return np.array(values, dtype=np.uint8)


@st.composite
def increasing(draw: st.DrawFn) -> NDArray[np.int64]:
    """Strictly increasing indices, with gaps around multiples of 255 as likely as small ones."""
    gap = st.one_of(
        st.integers(0, 5),
        st.integers(0, 4).flatmap(lambda k: st.integers(max(0, 255 * k - 2), 255 * k + 2)),
        st.integers(0, 100_000),
    )
    gaps = np.array(draw(st.lists(gap, max_size=50)), dtype=np.int64)
    return np.cumsum(gaps + 1) - 1


@given(increasing())
def test_gaps_round_trip(indices: NDArray[np.int64]) -> None:
    stream = encode_gaps(indices)
    assert stream.dtype == np.uint8
    np.testing.assert_array_equal(decode_gaps(stream), indices)
    size = int(indices[-1]) + 1 if len(indices) else 0
    check_gaps(stream, len(indices), size)
    for count, elements in ((len(indices) + 1, size), (len(indices), size - 1)):
        with pytest.raises(PackedFileError):
            check_gaps(stream, count, elements)
    if len(indices):
        assert len(stream) <= len(indices) + (indices[-1] + 1) // 255


@pytest.mark.parametrize(
    ("indices", "stream"),
    [
        ([], []),
        ([0], [0]),
        ([254], [254]),
        ([255], [255, 0]),
        ([510, 511], [255, 255, 0, 0]),
        ([3, 260], [3, 255, 1]),
    ],
)
def test_gaps_by_hand(indices: list[int], stream: list[int]) -> None:
    assert encode_gaps(np.array(indices, dtype=np.int64)).tolist() == stream
    assert decode_gaps(bytes_array(stream)).tolist() == indices


@pytest.mark.parametrize("stream", [[255], [0, 255], [3, 255, 255]])
def test_gaps_that_do_not_end_are_refused(stream: list[int]) -> None:
    with pytest.raises(PackedFileError, match="end in the middle"):
        check_gaps(bytes_array(stream), 1, 1_000_000)


def test_gaps_of_several_blocks() -> None:
    generator = np.random.default_rng(0)
    gaps = generator.choice([0, 3, 254, 255, 300, 70_000], 100_000)
    indices = np.cumsum(gaps + 1) - 1
    blocks = list(positions(encode_gaps(indices)))
    assert len(blocks) > 3
    assert max(map(len, blocks)) <= BLOCK
    np.testing.assert_array_equal(np.concatenate(blocks), indices)


@given(
    st.sampled_from(["uint8", "uint16", "uint32", "uint64"]).flatmap(
        lambda dtype: hnp.arrays(dtype, st.integers(0, 40))
    )
)
def test_planes_round_trip(words: Words) -> None:
    planes = split_planes(words)
    assert len(planes) == words.dtype.itemsize
    for i, plane in enumerate(planes):
        np.testing.assert_array_equal(plane, (words.astype(np.uint64) >> np.uint64(8 * i)) & 0xFF)
    again = join_planes(planes)
    assert again.dtype == words.dtype
    assert again.flags.writeable
    np.testing.assert_array_equal(again, words)


@pytest.mark.parametrize("with_zstd", [True, False])
@given(data=st.one_of(st.binary(max_size=300), st.integers(0, 5000).map(bytes)))
def test_compression_round_trip(with_zstd: bool, data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not with_zstd:
            patch.setattr(chunks, "zstandard", None)
        chunk = compress(data)
        assert len(chunk.data) <= len(data)
        assert chunk.codec in ("raw", "zstd" if with_zstd else "zlib")
        assert decompress(chunk, len(data)).tobytes() == data


def test_compression_keeps_the_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    assert compress(noise) == Chunk("raw", noise.tobytes())
    assert compress(bytes(1000)).codec == "zstd"


def test_zstd_without_zstandard_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = compress(bytes(1000))
    monkeypatch.setattr(chunks, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install lightning-condensa\[zstd\]"):
        decompress(chunk, 1000)


@pytest.mark.parametrize("with_zstd", [True, False])
def test_estimate_is_near_the_stored_size(with_zstd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_zstd:
        monkeypatch.setattr(chunks, "zstandard", None)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 10_000, dtype=np.uint8)
    gaps = rng.geometric(0.05, 10_000).astype(np.uint8)
    for planes in ([noise], [gaps], [noise, gaps]):
        stored = sum(len(compress(plane).data) for plane in planes)
        assert estimate_size(planes) == pytest.approx(stored, rel=0.1)
    assert estimate_size([bytes_array([])]) == 0


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
@pytest.mark.parametrize("declared", [0, 1, 999, 1001, 10**12])
def test_other_sizes_than_declared_are_refused(codec: str, declared: int) -> None:
    data = zlib.compress(bytes(1000)) if codec == "zlib" else compress(bytes(1000)).data
    with pytest.raises(PackedFileError, match=str(declared)):
        decompress(Chunk(codec, data), declared)


def test_zstd_that_hides_its_size_is_refused() -> None:
    data = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(PackedFileError, match="1000 declared"):
        decompress(Chunk("zstd", data), 1000)


def test_zstd_that_lies_about_its_size_is_refused() -> None:
    data = bytearray(zstandard.ZstdCompressor().compress(bytes(1000)))
    position = data.index((1000 - 256).to_bytes(2, "little"))
    data[position : position + 2] = (999 - 256).to_bytes(2, "little")
    with pytest.raises(PackedFileError, match="corrupt"):
        decompress(Chunk("zstd", bytes(data)), 999)


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_cut_or_followed_chunks_are_refused(codec: str) -> None:
    plain = b"abc" * 100
    data = zlib.compress(plain) if codec == "zlib" else bytes(compress(plain).data)
    assert decompress(Chunk(codec, data), 300).tobytes() == plain
    for wrong in (data[:-1], data[:5], b"", data + b"x"):
        with pytest.raises(PackedFileError):
            decompress(Chunk(codec, wrong), 300)


def test_unknown_codecs_and_wrong_raw_sizes_are_refused() -> None:
    with pytest.raises(PackedFileError, match="unknown codec 'lzma'"):
        decompress(Chunk("lzma", b"abc"), 3)
    with pytest.raises(PackedFileError, match="3 bytes, 4 declared"):
        decompress(Chunk("raw", b"abc"), 4)


def test_inflate_stops_at_its_limit() -> None:
    bomb = zlib.compress(bytes(50_000_000))
    with pytest.raises(PackedFileError, match="more than the 100 bytes"):
        inflate(bomb, limit=100)


@given(st.lists(st.lists(st.integers(0, 255), max_size=60), min_size=1, max_size=6))
def test_segments_hold_all_words_in_order(parts: list[list[int]]) -> None:
    segments = joined([np.array(part, np.uint8) for part in parts])
    assert all(len(segment) for segment in segments)
    flat = [word for segment in segments for word in segment.tolist()]
    assert flat == [word for part in parts for word in part]


def test_words_that_are_not_alike_are_compressed_apart() -> None:
    rng = np.random.default_rng(0)
    narrow = rng.geometric(0.5, 20_000).clip(max=255).astype(np.uint8)
    wide = rng.geometric(0.02, 20_000).clip(max=255).astype(np.uint8)
    few = np.zeros(3, np.uint8)  # joins either
    segments = joined([few, narrow, narrow, few, wide, wide])
    assert [len(segment) for segment in segments] == [40_006, 40_000]
    together = len(compress(np.concatenate([narrow, wide])).data)
    assert sum(len(compress(part).data) for part in (narrow, wide)) < 0.95 * together
