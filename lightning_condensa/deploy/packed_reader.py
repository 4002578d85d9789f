"""A packed file from a stranger: checked, and decoded as far as is wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from lightning_condensa.deploy.container import open_container
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.spec import (
    CombinedEntry,
    Entry,
    RestEntry,
    Spec,
    stream_counts,
    stream_width,
    type_bits,
)
from lightning_condensa.deploy.spec_parser import parse_spec
from lightning_condensa.deploy.stored_tensor import StoredTensor, take_tensor
from lightning_condensa.deploy.stream_reader import StreamReader


class PackedReader:
    """The content of a packed file.

    Its hash is computed meanwhile: until `verify` or `tensors` was called, the file may be damaged.

    Args:
        data: The file.

    Raises:
        PackedFileError: If it is foreign, cut or inconsistent.

    Attributes:
        metadata: The user's.
        spec: What it holds.
    """

    metadata: dict[str, str]
    spec: Spec

    def __init__(self, data: bytes) -> None:
        self.metadata, blobs, self._check_hash = open_container(data)
        with self._damage_first():
            if set(blobs) != {"spec", "data"}:
                raise PackedFileError(f"must hold spec and data, holds {sorted(blobs)!a}")
            self._data = blobs["data"]
            self.spec = parse_spec(blobs["spec"], len(self._data))

    def verify(self) -> None:
        """Wait for the hash.

        Raises:
            PackedFileError: If the file is damaged.
        """
        self._check_hash()

    def tensors(
        self, *, max_bytes: int, names: Collection[str] | None = None
    ) -> dict[str, StoredTensor]:
        """Tensors, ready to be decoded; what they do not need is not decompressed.

        Args:
            max_bytes: Memory that they and decoding them may take.
            names: Of entries; ``None`` for all.

        Returns:
            They, in the order of the file.

        Raises:
            PackedFileError: If the file is damaged, words contradict the spec, or they take more
                memory.
            ImportError: If they are compressed with zstd and zstandard is not installed.
        """
        with self._damage_first():
            found = self._taken(max_bytes, names)
        self.verify()
        return found

    def _taken(self, max_bytes: int, names: Collection[str] | None) -> dict[str, StoredTensor]:
        wanted = [e for e in self.spec.entries if names is None or e.name in names]
        if (memory := memory_of(self.spec.entries, wanted)) > max_bytes:
            raise PackedFileError(f"unpacking takes {memory} bytes, max_bytes is {max_bytes}")
        reader = StreamReader(self.spec.streams, self._data)
        found: dict[str, StoredTensor] = {}
        try:
            for entry in self.spec.entries:
                if names is None or entry.name in names:
                    found[entry.name] = take_tensor(entry, reader)
                else:
                    reader.skip(entry.stored)
        except MemoryError:
            raise PackedFileError(f"not enough memory: unpacking takes {memory} bytes") from None
        return found

    @contextmanager
    def _damage_first(self) -> Iterator[None]:
        """What is found wrong within may come of damage, which is then what the error says."""
        try:
            yield
        except PackedFileError:
            self.verify()
            raise


def memory_of(entries: Iterable[Entry], wanted: Iterable[Entry]) -> int:
    """Bytes that it takes at most to decode tensors: streams, tensors, the largest work area.

    Args:
        entries: All of a file.
        wanted: Those to decode.

    Example:
        >>> memory_of([RestEntry("bias", (3,), "F32")], [RestEntry("bias", (3,), "F32")])
        36
    """
    counts = stream_counts(entries)
    # Twice: as planes and as words.
    total = 2 * sum(stream_width(name) * count for name, count in counts.items())
    work = 0
    for entry in wanted:
        if isinstance(entry, RestEntry):
            total += entry.numel * type_bits(entry.dtype) // 8
            continue
        for leaf in entry.leaves:
            value, weight = type_bits(leaf.value_type) // 8, type_bits(leaf.weight_type) // 8
            total += leaf.numel * (value + 1 + weight)  # codes and mask, or the weight
            # Codes, mask and scale of an unusual form, their product in float32, and the weight.
            work = max(work, leaf.numel * (value + 1 + 12 + weight))
        if isinstance(entry, CombinedEntry):
            # A product may be much larger than its factors: it is summed up in double precision.
            total += 16 * entry.numel
    return total + work
