"""Reading the spec of a packed file from a stranger.

Nothing is trusted: after `parse_spec` every size and type is known to be consistent, and so is
the memory that unpacking takes, before any of it is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from lightning_condensa.deploy.checked_json import (
    load_json,
    require_count,
    require_list,
    require_object,
    require_text,
    texts,
)
from lightning_condensa.deploy.chunks import CODECS, inflate
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.spec import (
    MAX_ALPHABET,
    MAX_DIMENSIONS,
    MAX_NUMEL,
    MAX_SPEC_BYTES,
    VALUE_TYPES,
    WEIGHT_TYPES,
    CombinedEntry,
    EncodedEntry,
    Entry,
    RestEntry,
    Segment,
    Spec,
    StoredStream,
    scale_fits,
    stream_counts,
    stream_width,
    type_bits,
)
from lightning_condensa.deploy.terms import terms_fit
from lightning_condensa.deploy.words import DTYPES


def parse_spec(data: bytes | memoryview, data_bytes: int) -> Spec:
    """The inverse of `dump_spec`, checked.

    Args:
        data: Compressed spec.
        data_bytes: Bytes of the streams in the file.

    Returns:
        A consistent spec.

    Raises:
        PackedFileError: Naming what is wrong.

    Example:
        >>> from lightning_condensa.deploy.spec import dump_spec
        >>> parse_spec(dump_spec(Spec((), (), {"b": "a"}, ())), data_bytes=0)
        Traceback (most recent call last):
        lightning_condensa.deploy.errors.PackedFileError: alias 'b' names no tensor: 'a'
    """
    text = inflate(data, limit=MAX_SPEC_BYTES)
    keys = ("encoded", "rest", "aliases", "streams")
    fields = require_object(load_json(text, "the spec"), "the spec", keys)
    encoded = tuple(_parse_item(item) for item in require_list(fields["encoded"], "encoded"))
    rest = tuple(_parse_rest(item) for item in require_list(fields["rest"], "rest"))
    aliases = dict(texts(fields["aliases"], "aliases"))
    entries: tuple[Entry, ...] = (*encoded, *rest)
    check_names([entry.name for entry in entries], aliases)
    streams = _parse_streams(fields["streams"], stream_counts(entries))
    if (stored := sum(stream.stored_bytes for stream in streams)) != data_bytes:
        raise PackedFileError(f"the streams take {stored} bytes, the file holds {data_bytes}")
    return Spec(encoded, rest, aliases, streams)


def check_names(names: Iterable[str], aliases: Mapping[str, str]) -> None:
    """Check that names are unique and that aliases lead to tensors.

    Raises:
        PackedFileError: If not.
    """
    known: set[str] = set()
    for name in names:
        if name in known:
            raise PackedFileError(f"two tensors are named {name!a}")
        known.add(name)
    for alias, target in aliases.items():
        if alias in known:
            raise PackedFileError(f"alias {alias!a} is also the name of a tensor")
        if target not in known:
            raise PackedFileError(f"alias {alias!a} names no tensor: {target!a}")


def _parse_item(item: object) -> EncodedEntry | CombinedEntry:
    if isinstance(item, dict):
        return _parse_combined(item)
    fields = require_list(item, "an encoded entry", 10)
    return _parse_encoded(require_text(fields[0], "a tensor's name"), fields[1:])


def _parse_combined(item: object) -> CombinedEntry:
    fields = require_object(item, "an encoded entry", ("name", "shape", "terms"))
    name = require_text(fields["name"], "a tensor's name")
    what = f"tensor {name!a}"
    shape = _parse_shape(fields["shape"], what)
    terms = []
    for term in require_list(fields["terms"], f"the terms of {what}"):
        parts = require_list(term, f"a term of {what}")
        if len(parts) not in (1, 2):
            raise PackedFileError(f"a term of {what} has {len(parts)} parts, it may have 1 or 2")
        parsed = [require_list(part, f"a part of {what}", 9) for part in parts]
        terms.append(tuple(_parse_encoded(f"a part of {name}", part) for part in parsed))
    entry = CombinedEntry(name, shape, tuple(terms))
    if len(entry.leaves) < 2:
        raise PackedFileError(f"{what} has {len(entry.leaves)} parts, it needs 2 at least")
    if len({leaf.weight_type for leaf in entry.leaves}) > 1:
        raise PackedFileError(f"the parts of {what} have different weight types")
    if not terms_fit([tuple(leaf.shape for leaf in term) for term in terms], shape):
        raise PackedFileError(f"the shapes of the parts of {what} do not make up its own")
    return entry


def _parse_encoded(name: str, fields: list[Any]) -> EncodedEntry:
    what = f"tensor {name!a}"
    shape = _parse_shape(fields[0], what)
    numel = math.prod(shape)
    nnz = require_count(fields[1], f"nnz of {what}", numel)
    gap_bytes: int | None = None
    if fields[2] is not None:
        # Each byte beyond one for each value skips 255 elements.
        most = nnz + (numel - nnz) // 255
        gap_bytes = require_count(fields[2], f"gap bytes of {what}", most)
        if gap_bytes < nnz:
            raise PackedFileError(f"{what} has {nnz} values but {gap_bytes} gap bytes")
    value_type = _parse_choice(fields[3], VALUE_TYPES, f"value type of {what}")
    alphabet = _parse_alphabet(fields[8], value_type, what)
    wanted = type_bits(value_type) if alphabet is None else 8
    if (bits := require_count(fields[4], f"bits of {what}", 64)) != wanted:
        raise PackedFileError(f"bits of {what} must be {wanted}, they are {bits}")
    weight_type = _parse_choice(fields[5], WEIGHT_TYPES, f"weight type of {what}")
    scale_shape: tuple[int, ...] | None = None
    group: int | None = None
    if fields[6] is not None:
        scale_shape = _parse_shape(fields[6], f"the scale of {what}")
        if fields[7] is not None:
            group = max(require_count(fields[7], f"group of {what}", MAX_NUMEL), 1)
        if not scale_fits(scale_shape, shape, group):
            raise PackedFileError(f"the scale of {what} does not broadcast to its shape")
    elif fields[7] is not None:
        raise PackedFileError(f"{what} has a group but no scale")
    return EncodedEntry(
        name,
        shape,
        nnz,
        gap_bytes,
        value_type,
        bits,
        weight_type,
        scale_shape,
        group,
        alphabet,
    )


def _parse_alphabet(value: object, value_type: str, what: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    items = require_list(value, f"the alphabet of {what}")
    if not 1 <= len(items) <= MAX_ALPHABET:
        raise PackedFileError(f"the alphabet of {what} has {len(items)} codes, 1 to {MAX_ALPHABET}")
    most = 2 ** type_bits(value_type) - 1
    codes = tuple(require_count(item, f"a code of {what}", most) for item in items)
    if any(a >= b for a, b in pairwise(codes)):
        raise PackedFileError(f"the alphabet of {what} is not ascending")
    return codes


def _parse_rest(item: object) -> RestEntry:
    fields = require_list(item, "a rest entry", 3)
    name = require_text(fields[0], "a tensor's name")
    what = f"tensor {name!a}"
    dtype = _parse_choice(fields[2], DTYPES, f"type of {what}")
    return RestEntry(name, _parse_shape(fields[1], what), dtype)


def _parse_shape(value: object, what: str) -> tuple[int, ...]:
    sizes = require_list(value, f"the shape of {what}")
    if len(sizes) > MAX_DIMENSIONS:
        raise PackedFileError(f"{what} has {len(sizes)} dimensions, at most {MAX_DIMENSIONS}")
    shape = tuple(require_count(size, f"a dimension of {what}", MAX_NUMEL) for size in sizes)
    # Zeros count as ones: the strides of an empty tensor overflow as those of a full one do.
    if math.prod(max(size, 1) for size in shape) > MAX_NUMEL:
        raise PackedFileError(f"the shape of {what} spans more than {MAX_NUMEL} elements")
    return shape


def _parse_choice(value: object, choices: Iterable[str], what: str) -> str:
    name = require_text(value, what)
    if name not in choices:
        raise PackedFileError(f"unknown {what}: {name!a}, known are {', '.join(choices)}")
    return name


def _parse_streams(value: object, counts: dict[str, int]) -> tuple[StoredStream, ...]:
    items = [require_list(item, "a stream", 2) for item in require_list(value, "streams")]
    names = [require_text(name, "a stream's name") for name, _ in items]
    if names != list(counts):
        raise PackedFileError(f"the tensors need the streams {list(counts)}, others are listed")
    return tuple(StoredStream(name, _parse_segments(name, s, counts[name])) for name, s in items)


def _parse_segments(stream: str, value: object, count: int) -> tuple[Segment, ...]:
    what = f"stream {stream}"
    segments = []
    for item in require_list(value, f"the segments of {what}"):
        words, planes = require_list(item, f"a segment of {what}", 2)
        words = require_count(words, f"words of a segment of {what}", count)
        chunks = []
        for plane in require_list(planes, f"the planes of {what}", stream_width(stream)):
            codec, size = require_list(plane, f"a plane of {what}", 2)
            codec = _parse_choice(codec, CODECS, f"codec of {what}")
            # A stored plane is never larger than the plane itself.
            chunks.append((codec, require_count(size, f"a plane of {what}", words)))
        segments.append(Segment(words, tuple(chunks)))
    if (words := sum(segment.words for segment in segments)) != count:
        raise PackedFileError(f"{what} has segments of {words} words, the tensors need {count}")
    return tuple(segments)
