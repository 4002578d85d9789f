"""The envelope: foreign files, damaged headers, the hash."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_condensa.deploy.container import content_hash, write_container
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed import (
    Packed,
    inspect_packed,
    pack,
    read_packed,
    unpack,
)


def small() -> Packed:
    return Packed(rest={"b": torch.tensor([True, False])}, metadata={"note": "é"})


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.condensa"
    path.write_bytes(b"hello")
    for read in (read_packed, inspect_packed):
        with pytest.raises(PackedFileError, match=r"foreign\.condensa: not a safetensors file"):
            read(path)
    path.write_bytes(safetensors.torch.save({"w": torch.ones(2)}))
    with pytest.raises(PackedFileError, match=r"foreign\.condensa: not a lightning-condensa file"):
        read_packed(path)


def test_other_versions_and_formats() -> None:
    header, body = header_of(pack(small()))
    for key, value, message in (
        ("version", "2", "version '2' of the format is not supported"),
        ("format", "other", "not a lightning-condensa file"),
        ("note", "edited", "the hash does not fit"),
    ):
        edited = copy.deepcopy(header)
        edited["__metadata__"][key] = value
        with pytest.raises(PackedFileError, match=message):
            unpack(with_header(edited, body))


def test_hostile_headers() -> None:
    header, body = header_of(pack(small()))
    text = json.dumps(header)

    def changed(**entry: object) -> dict[str, Any]:
        return {**header, "data": {**header["data"], **entry}}

    begin, end = header["data"]["data_offsets"]
    for bad in (
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        text.replace('"spec"', '"data"').encode(),
        text.replace('"U8"', "NaN").encode(),
        text.replace('"U8"', "9" * 5000).encode(),
        json.dumps({**header, "__metadata__": []}).encode(),
        json.dumps({**header, "__metadata__": {"format": 1}}).encode(),
        text.replace("note", "\\ud800").encode(),
        json.dumps(changed(dtype="F32")).encode(),
        json.dumps(changed(shape=[end - begin, 1])).encode(),
        json.dumps(changed(data_offsets=[begin - 1, end])).encode(),
        json.dumps(changed(data_offsets=[begin + 1, end])).encode(),
        json.dumps(changed(data_offsets=[begin, end + 1])).encode(),
        json.dumps(changed(data_offsets=[end, begin])).encode(),
        json.dumps(changed(data_offsets=[-1, True])).encode(),
        json.dumps(changed(extra=1)).encode(),
        json.dumps({**header, "more": 3}).encode(),
    ):
        with pytest.raises(PackedFileError):
            unpack(with_header(bad, body))
    with pytest.raises(PackedFileError, match="cut in its header"):
        unpack(b"\xff" * 8 + b"{}")
    with pytest.raises(PackedFileError, match="must hold spec and data"):
        unpack(write_container({"spec": b""}, {}))


def test_the_hash_covers_names_sizes_and_metadata() -> None:
    variants = [
        content_hash({}, {}),
        content_hash({"a": "b"}, {}),
        content_hash({}, {"a": b"b"}),
        content_hash({}, {"a": b"", "b": b"b"}),
        content_hash({}, {"a": b"b", "b": b""}),
    ]
    assert len(set(variants)) == len(variants)
