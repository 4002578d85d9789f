"""The envelope of a packed file: safetensors, with a hash over all that it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from lightning_condensa.deploy.checked_json import (
    dump_json,
    load_json,
    require_count,
    require_list,
    require_object,
    require_text,
    texts,
)
from lightning_condensa.deploy.errors import PackedFileError

FORMAT = "lightning-condensa"
VERSION = "1"
RESERVED = ("format", "version", "hash")
"""Metadata keys of the envelope itself."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8


def write_container(blobs: Mapping[str, bytes], metadata: Mapping[str, str]) -> bytes:
    """Named blobs and metadata as one safetensors file.

    The header is written here, not by the safetensors library, because that one orders the
    metadata by chance: equal content must give equal files.

    Args:
        blobs: Each becomes a one-dimensional ``U8`` tensor.
        metadata: Strings to strings, none of the keys in `RESERVED`.

    Returns:
        The file.

    Raises:
        ValueError: If the metadata uses a reserved key, or holds anything but valid strings.

    Example:
        >>> file = write_container({"a": b"xyz"}, {"note": "hello"})
        >>> metadata, blobs = read_container(file)
        >>> metadata, bytes(blobs["a"])
        ({'note': 'hello'}, b'xyz')
    """
    if taken := sorted(set(metadata) & set(RESERVED)):
        raise ValueError(f"metadata must not use the reserved keys {taken}")
    try:
        stamped = {**dict(texts(dict(metadata), "metadata")), "format": FORMAT, "version": VERSION}
    except PackedFileError as error:
        raise ValueError(str(error)) from None
    header: dict[str, object] = {
        "__metadata__": {**stamped, "hash": content_hash(stamped, blobs)},
    }
    begin = 0
    for name, blob in blobs.items():
        end = begin + len(blob)
        header[name] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [begin, end]}
        begin = end
    text = dump_json(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *blobs.values()])


def read_container(data: bytes | memoryview) -> tuple[dict[str, str], dict[str, memoryview]]:
    """The inverse of `write_container`, for files from strangers.

    Args:
        data: The file.

    Returns:
        The metadata without the reserved keys, and views of the blobs.

    Raises:
        PackedFileError: If it is not such a file, is of another version, is cut, or its hash
            does not fit its content.
    """
    metadata, blobs, check_hash = open_container(data)
    check_hash()
    return metadata, blobs


def open_container(
    data: bytes | memoryview,
) -> tuple[dict[str, str], dict[str, memoryview], Callable[[], None]]:
    """The same before the hash is known, which is computed in another thread meanwhile.

    Args:
        data: The file.

    Returns:
        The metadata without the reserved keys, views of the blobs, and what waits for the hash and
        raises where it does not fit.

    Raises:
        PackedFileError: If it is not such a file, is of another version, or is cut.
    """
    header, body = _split_header(memoryview(data))
    metadata = dict(texts(header.pop("__metadata__", {}), "the metadata"))
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"not a {FORMAT} file: its metadata does not say so")
    if metadata.get("version") != VERSION:
        raise PackedFileError(
            f"version {metadata.get('version')!a} of the format is not supported, only {VERSION!r}"
        )
    blobs = _split_blobs(header, body)
    given = metadata.pop("hash", None)
    pool = ThreadPoolExecutor(1)
    computed = pool.submit(content_hash, metadata, blobs)
    pool.shutdown(wait=False)

    def check_hash() -> None:
        if given != computed.result():
            raise PackedFileError(
                "the hash does not fit the content: the file is damaged or edited"
            )

    return {k: text for k, text in metadata.items() if k not in RESERVED}, blobs, check_hash


def content_hash(metadata: Mapping[str, str], blobs: Mapping[str, bytes | memoryview]) -> str:
    """SHA-256 over the metadata (without ``hash``), and the names, types, sizes, bytes of blobs.

    It covers the content and not the layout, so that a tool that rewrites a safetensors file
    with its header in another order leaves it valid.

    Args:
        metadata: With ``format`` and ``version``, without ``hash``.
        blobs: By name.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.

    Example:
        >>> content_hash({}, {"a": b"x"})[:15]
        'sha256:1bf780c7'
    """
    names = sorted(blobs)
    described = [dict(metadata), [[name, "U8", [len(blobs[name])]] for name in names]]
    digest = hashlib.sha256(dump_json(described))
    for name in names:
        digest.update(blobs[name])
    return f"sha256:{digest.hexdigest()}"


def _split_header(data: memoryview) -> tuple[dict[str, object], memoryview]:
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    body = _LENGTH_BYTES + size
    if len(data) < _LENGTH_BYTES or body > len(data):
        raise PackedFileError("not a safetensors file, or cut in its header")
    header = load_json(bytes(data[_LENGTH_BYTES:body]), "the header")
    return require_object(header, "the header"), data[body:]


def _split_blobs(header: Mapping[str, object], body: memoryview) -> dict[str, memoryview]:
    """The blobs, which must be bytes and tile the body without holes or overlaps."""
    spans: dict[str, tuple[int, int]] = {}
    for key in header:
        name = require_text(key, "a tensor's name")
        what = f"tensor {name!a}"
        entry = require_object(header[name], what, ("dtype", "shape", "data_offsets"))
        first, last = require_list(entry["data_offsets"], f"data_offsets of {what}", 2)
        end = require_count(last, f"the end of {what}", len(body))
        begin = require_count(first, f"the begin of {what}", end)
        if entry["dtype"] != "U8" or entry["shape"] != [end - begin]:
            raise PackedFileError(f"{what} must be one-dimensional U8 and as long as its offsets")
        spans[name] = begin, end
    position = 0
    for begin, end in sorted(spans.values()):
        if begin != position:
            raise PackedFileError("the tensors overlap or leave a hole")
        position = end
    if position != len(body):
        raise PackedFileError(f"{len(body) - position} bytes follow the last tensor")
    return {name: body[begin:end] for name, (begin, end) in spans.items()}
