"""The packed file of a compressed model: `.condensa`, specified in ``docs/format.md``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.deploy.checked_json import require_text, texts
from lightning_condensa.deploy.chunks import compress
from lightning_condensa.deploy.container import write_container
from lightning_condensa.deploy.encoding_codec import pack_encoding
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed_info import PackedInfo, describe
from lightning_condensa.deploy.packed_reader import PackedReader
from lightning_condensa.deploy.spec import (
    Segment,
    Spec,
    StoredStream,
    dump_spec,
    stream_counts,
)
from lightning_condensa.deploy.spec_parser import check_names
from lightning_condensa.deploy.stored_tensor import StoredWeight, decoded
from lightning_condensa.deploy.streams import joined, split_planes
from lightning_condensa.deploy.tensor_codec import pack_rest
from lightning_condensa.deploy.words import Words
from lightning_condensa.schemes import Encoding

DEFAULT_MAX_BYTES = 16 * 2**30
"""Memory that loading a file may take unless told otherwise."""


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
    reader = PackedReader(data)
    tensors = reader.tensors(max_bytes=max_bytes)
    encoded: dict[str, Encoding] = {}
    rest: dict[str, Tensor] = {}
    with within_memory():
        for name, tensor in tensors.items():
            if isinstance(tensor, StoredWeight):
                encoded[name] = tensor.encoding()
            else:
                rest[name] = decoded(tensor)
    return Packed(encoded, rest, reader.spec.aliases, reader.metadata)


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
    with naming(path):
        return unpack(_file_bytes(path, max_bytes), max_bytes=max_bytes)


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
    with naming(path):
        data = _file_bytes(path, max_bytes)
        reader = PackedReader(data)
        reader.verify()
    return describe(reader.spec, reader.metadata, len(data))


def load_tensors(
    path: str | os.PathLike[str],
    names: Collection[str] | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> dict[str, Tensor]:
    """Tensors of a packed file as they stand in a state dict: of weights, Δ(θ).

    The file is read and its hash checked; beyond that, only what these tensors need is decompressed
    and decoded.

    Args:
        path: The file.
        names: Keys in the state dict, those of tied tensors too; ``None`` for all.
        max_bytes: Memory that it may take, and the most that the file may have.

    Returns:
        Tensors on the CPU, in the order of ``names``; of tied ones the same.

    Raises:
        KeyError: If the file holds no tensor of such a name.
        PackedFileError: See `unpack`; the message names the file.
        ImportError: See `unpack`.
        OSError: If it cannot be read.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = write_packed(file.name, Packed(rest={"a": torch.ones(2), "b": torch.ones(3)}))
        ...     load_tensors(file.name, ["b"])
        {'b': tensor([1., 1., 1.])}
    """
    reader = open_packed(path, max_bytes=max_bytes)
    aliases = reader.spec.aliases
    known = [entry.name for entry in reader.spec.entries]
    names = [*known, *aliases] if names is None else list(names)
    if unknown := sorted(set(names) - {*known, *aliases}):
        with naming(path):
            reader.verify()
        raise KeyError(f"{path} holds no tensors named {', '.join(map(ascii, unknown))}")
    owners = {name: aliases.get(name, name) for name in names}
    with naming(path), within_memory():
        stored = reader.tensors(max_bytes=max_bytes, names=set(owners.values()))
        found = {name: decoded(tensor) for name, tensor in stored.items()}
    return {name: found[owner] for name, owner in owners.items()}


def open_packed(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> PackedReader:
    """Read a packed file, and check all but its tensors and its hash, which they wait for.

    Args:
        path: The file.
        max_bytes: The most that it may have.

    Raises:
        PackedFileError: If it is not a packed file; the message names it.
        OSError: If it cannot be read.
    """
    with naming(path):
        return PackedReader(_file_bytes(path, max_bytes))


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors within name the file."""
    try:
        yield
    except PackedFileError as error:
        raise PackedFileError(f"{path}: {error}") from None


@contextmanager
def within_memory() -> Iterator[None]:
    """Lack of memory within, in spite of the limit, is an error of the file."""
    try:
        yield
    except MemoryError:
        raise PackedFileError("not enough memory to decode it") from None


def _file_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    path = Path(path)
    if (size := path.stat().st_size) > max_bytes:
        raise PackedFileError(f"the file has {size} bytes, max_bytes is {max_bytes}")
    return path.read_bytes()
