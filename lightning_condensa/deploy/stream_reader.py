"""The words of a packed file's streams, decompressed where they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate

import numpy as np

from lightning_condensa.deploy.chunks import Chunk, decompress
from lightning_condensa.deploy.spec import Segment, StoredStream, stream_width
from lightning_condensa.deploy.streams import join_planes
from lightning_condensa.deploy.tensor_codec import Parts
from lightning_condensa.deploy.words import Words, word_type


class StreamReader:
    """Hands out the words of each stream in order, and skips those that nobody wants.

    Args:
        streams: In the order in which they are stored.
        data: Their bytes in the file, as many as the streams take.
    """

    def __init__(self, streams: Iterable[StoredStream], data: memoryview) -> None:
        self._streams: dict[str, _Stream] = {}
        for stream in streams:
            stored = stream.stored_bytes
            self._streams[stream.name] = _Stream(stream, data[:stored])
            data = data[stored:]

    def take(self, counts: Mapping[str, int]) -> Parts:
        """The next words of each stream named in ``counts``, read-only, often as views.

        Raises:
            PackedFileError: If a chunk does not hold what the spec says.
        """
        # A file has no empty streams.
        return {
            name: self._streams[name].take(count) if count else _no_words(name)
            for name, count in counts.items()
        }

    def skip(self, counts: Mapping[str, int]) -> None:
        """Pass over the next words of each stream named in ``counts``."""
        for name, count in counts.items():
            if count:
                self._streams[name].position += count


class _Stream:
    """One stream; holds one decompressed segment at a time, which neighbours often share."""

    def __init__(self, stream: StoredStream, data: memoryview) -> None:
        self.position = 0
        self._segments = stream.segments
        self._data = data
        self._begins = list(accumulate((s.words for s in stream.segments), initial=0))
        self._offsets = list(accumulate((s.stored_bytes for s in stream.segments), initial=0))
        self._held: tuple[int, Words] | None = None

    def take(self, count: int) -> Words:
        begin, end = self.position, self.position + count
        self.position = end
        index = bisect_right(self._begins, begin) - 1
        parts = []
        while begin < end:
            words = self._segment(index)
            offset = self._begins[index]
            parts.append(words[begin - offset : end - offset])
            begin = offset + len(words)
            index += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _segment(self, index: int) -> Words:
        if self._held is None or self._held[0] != index:
            self._held = None  # frees the last one first
            data = self._data[self._offsets[index] : self._offsets[index + 1]]
            self._held = index, _decompressed(self._segments[index], data)
        return self._held[1]


def _decompressed(segment: Segment, data: memoryview) -> Words:
    planes = []
    for codec, size in segment.chunks:
        planes.append(decompress(Chunk(codec, data[:size]), segment.words))
        data = data[size:]
    return join_planes(planes)


def _no_words(stream: str) -> Words:
    return np.empty(0, word_type(8 * stream_width(stream)))
