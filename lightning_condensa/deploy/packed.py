"""The packed file of a compressed model: `.condensa`, specified in ``docs/format.md``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.deploy.checked_json import require_text, texts
from lightning_condensa.deploy.container import read_container, write_container
from lightning_condensa.deploy.encoding_codec import pack_encoding, unpack_encoding
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed_info import PackedInfo, describe
from lightning_condensa.deploy.spec import (
    Segment,
    Spec,
    StoredStream,
    dump_spec,
    stream_counts,
)
from lightning_condensa.deploy.spec_parser import check_names, parse_spec
from lightning_condensa.deploy.streams import (
    Chunk,
    compress,
    decompress,
    join_planes,
    joined,
    split_planes,
)
from lightning_condensa.deploy.tensor_codec import (
    StreamReader,
    pack_rest,
    unpack_rest,
)
from lightning_condensa.deploy.words import Words
from lightning_condensa.schemes import Encoding

DEFAULT_MAX_BYTES = 16 * 2**30
"""Memory that loading a file may take unless told otherwise."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Packed:
    """What a packed file holds.

    Attributes:
        encoded: Compressed tensors by their key in a state dict.
        rest: The other tensors of the state dict, stored exactly.
        aliases: Keys of tied tensors, to the key in ``encoded`` or ``rest`` that holds the data.
        metadata: The user's strings: the scheme's configuration and the like.
    """

    encoded: Mapping[str, Encoding] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def pack(packed: Packed) -> bytes:
    """The packed file of a model. Equal content gives equal bytes.

    Each tensor, or factor or term of one, is stored sparse (positions and non-zero codes) or
    dense, whichever is smaller.
    "Non-zero" is decided on the bit pattern.

    Args:
        packed: Codes of a type in `VALUE_TYPES`; scales, if any, float32.

    Returns:
        The file.

    Raises:
        ValueError: If a tensor, name or type cannot be stored.

    Example:
        >>> import torch
        >>> from lightning_condensa.schemes import Encoded
        >>> weight = torch.tensor([[0.0, -0.0, 2.5]])
        >>> again = unpack(pack(Packed({"weight": Encoded.dense(weight)}, metadata={"n": "1"})))
        >>> again.encoded["weight"].decode(), again.metadata
        (tensor([[0.0000, -0.0000, 2.5000]]), {'n': '1'})
    """
    try:
        names = [require_text(name, "a name") for name in (*packed.encoded, *packed.rest)]
        check_names(names, dict(texts(dict(packed.aliases), "aliases")))
    except PackedFileError as error:
        raise ValueError(str(error)) from None
    coded = [pack_encoding(name, item) for name, item in packed.encoded.items()]
    plain = [pack_rest(name, tensor) for name, tensor in packed.rest.items()]
    encoded = tuple(entry for entry, _ in coded)
    rest = tuple(entry for entry, _ in plain)
    words: defaultdict[str, list[Words]] = defaultdict(list)
    for parts in (*(p for _, leaves in coded for p in leaves), *(p for _, p in plain)):
        for name, part in parts.items():
            words[name].append(part)
    streams = []
    data: list[bytes | memoryview] = []
    for name in stream_counts([*encoded, *rest]):
        segments = []
        for part in joined(words[name]):
            chunks = [compress(plane) for plane in split_planes(part)]
            data += [chunk.data for chunk in chunks]
            sizes = tuple((chunk.codec, len(chunk.data)) for chunk in chunks)
            segments.append(Segment(len(part), sizes))
        streams.append(StoredStream(name, tuple(segments)))
    spec = dump_spec(Spec(encoded, rest, dict(packed.aliases), tuple(streams)))
    return write_container({"spec": spec, "data": b"".join(data)}, packed.metadata)


def unpack(data: bytes, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Packed:
    """The inverse of `pack`, safe for files from strangers: they are parsed, never executed.

    Codes, scales, types, and so ``decode()``, come back bit for bit. Masks are not stored: that
    of a tensor stored sparse is true where the bits of its codes are not zero, that of one
    stored dense is ``None``.

    Args:
        data: The file.
        max_bytes: Memory that unpacking may take.

    Returns:
        Its content, on the CPU.

    Raises:
        PackedFileError: If the file is foreign, cut, damaged, inconsistent, or takes more memory.
        ImportError: If the file is compressed with zstd and zstandard is not installed.
    """
    metadata, spec, body = _open(data)
    if spec.memory > max_bytes:
        raise PackedFileError(f"unpacking takes {spec.memory} bytes, max_bytes is {max_bytes}")
    try:
        reader = StreamReader(_read_streams(spec, body))
        encoded = {entry.name: unpack_encoding(entry, reader) for entry in spec.encoded}
        rest = {entry.name: unpack_rest(entry, reader) for entry in spec.rest}
    except MemoryError:
        raise PackedFileError(f"not enough memory: unpacking takes {spec.memory} bytes") from None
    return Packed(encoded, rest, spec.aliases, metadata)


def write_packed(path: str | os.PathLike[str], packed: Packed) -> int:
    """Write the packed file of a model, atomically.

    Args:
        path: Where to; an existing file is replaced.
        packed: See `pack`.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: See `pack`.
        OSError: If it cannot be written; an existing file is then as it was.
    """
    data = pack(packed)
    write_atomically(path, data)
    return len(data)


def read_packed(path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES) -> Packed:
    """Read a packed file.

    Args:
        path: The file.
        max_bytes: Memory that unpacking may take, and the most that the file may have.

    Returns:
        Its content, see `unpack`.

    Raises:
        PackedFileError: See `unpack`; the message names the file.
        ImportError: See `unpack`.
        OSError: If it cannot be read.
    """
    return _read(path, max_bytes, lambda data: unpack(data, max_bytes=max_bytes))


def inspect_packed(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> PackedInfo:
    """What is in a packed file, without decompressing the tensors; zstandard is not needed.

    Args:
        path: The file.
        max_bytes: The most that the file may have.

    Returns:
        Its tensors, streams and metadata; printing it gives a table.

    Raises:
        PackedFileError: If it is not a packed file, or damaged.
        OSError: If it cannot be read.
    """
    return _read(path, max_bytes, _inspect)


def _read(
    path: str | os.PathLike[str], max_bytes: int, parse: Callable[[bytes], _Result]
) -> _Result:
    path = Path(path)
    if (size := path.stat().st_size) > max_bytes:
        raise PackedFileError(f"{path}: the file has {size} bytes, max_bytes is {max_bytes}")
    data = path.read_bytes()
    try:
        return parse(data)
    except PackedFileError as error:
        raise PackedFileError(f"{path}: {error}") from None


def _inspect(data: bytes) -> PackedInfo:
    metadata, spec, _ = _open(data)
    return describe(spec, metadata, len(data))


def _open(data: bytes) -> tuple[dict[str, str], Spec, memoryview]:
    metadata, blobs = read_container(data)
    if set(blobs) != {"spec", "data"}:
        raise PackedFileError(f"must hold spec and data, holds {sorted(blobs)!a}")
    return metadata, parse_spec(blobs["spec"], len(blobs["data"])), blobs["data"]


def _read_streams(spec: Spec, data: memoryview) -> dict[str, Words]:
    streams: dict[str, Words] = {}
    position = 0
    for stream in spec.streams:
        parts = []
        for segment in stream.segments:
            planes = []
            for codec, size in segment.chunks:
                chunk = Chunk(codec, data[position : position + size])
                planes.append(decompress(chunk, segment.words))
                position += size
            parts.append(join_planes(planes))
        streams[stream.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return streams
