from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lightning_condensa.deploy import chunks
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed import (
    Packed,
    inspect_packed,
    load_tensors,
    pack,
    read_packed,
    unpack,
    write_packed,
)
from lightning_condensa.schemes.encoded import Encoded


def test_the_container_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.condensa"
    packed = Packed({"w": Encoded.dense(torch.ones(3))}, metadata={"scheme": '{"é": "\\n"}'})
    assert write_packed(path, packed) == path.stat().st_size
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) == {"spec", "data"}
    assert metadata["scheme"] == '{"é": "\\n"}'
    assert (metadata["format"], metadata["version"]) == ("lightning-condensa", "1")
    # Another writer may order the header otherwise: the content, and so the hash, is the same.
    assert pack(unpack(safetensors.torch.save(tensors, metadata))) == path.read_bytes()


def test_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.zeros(100, 10, dtype=torch.int8)
    codes[::10] = 3
    packed = Packed(
        {"w": Encoded(codes, torch.float32, torch.ones(100, 1))},
        {"steps": torch.tensor(7)},
        {"tied": "w"},
        {"scheme": "Prune", "evil": "\x1b[2J"},
    )
    size = write_packed(tmp_path / "m.condensa", packed)
    monkeypatch.setattr(chunks, "zstandard", None)
    info = inspect_packed(tmp_path / "m.condensa")
    weight, steps = info.tensors
    assert (weight.name, weight.shape, weight.nnz, weight.density) == ("w", (100, 10), 100, 0.1)
    assert (weight.storage, weight.value_type, weight.bits) == ("sparse", "I8", 8)
    assert (steps.storage, steps.value_type, steps.nnz, steps.density) == (
        "rest",
        "I64",
        None,
        None,
    )
    assert [(s.name, s.raw_bytes) for s in info.streams] == [
        ("g8", 100),
        ("v8", 100),
        ("s32", 400),
        ("r64", 8),
    ]
    assert weight.raw_bytes == 600
    assert info.aliases == {"tied": "w"}
    assert info.metadata == packed.metadata
    assert info.file_bytes == size
    assert sum(t.bytes for t in info.tensors) == pytest.approx(size - info.overhead_bytes)
    table = str(info)
    assert "w       100x10  sparse" in table
    assert "tied is tied to w" in table
    assert "scheme: Prune" in table
    assert "\x1b" not in table
    with pytest.raises(ImportError, match="pip install"):
        read_packed(tmp_path / "m.condensa")


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (Packed({"w": Encoded(torch.ones(2, dtype=torch.int64), torch.float32)}), "torch.int64"),
        (Packed({"w": Encoded(torch.ones(2), torch.int8)}), "'w' is torch.int8"),
        (
            Packed({"w": Encoded(torch.ones(2), torch.float32, torch.ones(1).double())}),
            "scale of 'w': torch.float64",
        ),
        (Packed({"w": Encoded(torch.ones(2), torch.float32, torch.ones(3))}), "not broadcast"),
        (Packed(rest={"c": torch.ones(2, dtype=torch.complex128)}), "complex128"),
        (Packed(rest={"m": torch.ones(2, device="meta")}), "strided"),
        (Packed(rest={"m": torch.ones(2).to_sparse()}), "strided"),
        (Packed({"w": Encoded.dense(torch.ones(1))}, {"w": torch.ones(1)}), "two tensors"),
        (Packed(rest={"w": torch.ones(1)}, aliases={"w": "w"}), "also the name"),
        (Packed(rest={"w": torch.ones(1)}, aliases={"v": "x"}), "names no tensor"),
        (Packed(rest={"\ud800": torch.ones(1)}), "not valid Unicode"),
        (Packed(metadata={"hash": "x"}), "reserved"),
        (Packed(metadata={"a": 1}), "must be a string"),  # type: ignore[dict-item]
    ],
)
def test_what_cannot_be_packed(packed: Packed, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pack(packed)
    assert not isinstance(error.value, PackedFileError)


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_failing_write_changes_nothing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.condensa"
    old = Packed(rest={"w": torch.ones(1)})
    write_packed(path, old)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    if failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="disk full"):
        write_packed(path, Packed(rest={"w": torch.zeros(1)}))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]
    assert pack(read_packed(path)) == pack(old)


def test_write_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "m.condensa"
    write_packed(path, Packed(rest={"w": torch.ones(1)}))
    new = Packed(rest={"w": torch.zeros(1)})
    write_packed(str(path), new)
    assert pack(read_packed(str(path))) == pack(new)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_missing_files_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "none.condensa")
    with pytest.raises(FileNotFoundError):
        write_packed(tmp_path / "none" / "m.condensa", Packed())


@pytest.mark.parametrize("part", ["spec", "data"])
def test_damage_is_what_the_error_tells(tmp_path: Path, part: str) -> None:
    path = tmp_path / "m.condensa"
    write_packed(path, Packed(rest={"a": torch.ones(5)}))
    data = bytearray(path.read_bytes())
    # The spec comes first, after the header and its length.
    data[8 + int.from_bytes(data[:8], "little") if part == "spec" else -1] ^= 1
    path.write_bytes(data)
    for read in (
        inspect_packed,
        read_packed,
        load_tensors,
        lambda file: load_tensors(file, ["absent"]),
    ):
        with pytest.raises(PackedFileError, match="the hash does not fit"):
            read(path)
