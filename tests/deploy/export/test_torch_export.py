from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import CompressedModel, Quantize

from .networks import CASES, evaluate


@pytest.mark.parametrize("case", CASES)
def test_archives_give_the_same_outputs_and_hold_no_pickle(case: str, tmp_path: Path) -> None:
    model = CompressedModel.compress(CASES[case].network(), Quantize("int8"))
    path = tmp_path / "a.pt2"
    assert model.to_torch_export(path, CASES[case].inputs(1)) == path.stat().st_size
    assert model.module.training
    x = CASES[case].inputs(3)
    output = torch.export.load(path).module()(x)
    torch.testing.assert_close(output, evaluate(model.module, x), rtol=1e-5, atol=1e-6)
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            # What torch.save writes is a zip archive, a bare pickle begins with its protocol.
            assert not archive.read(member).startswith((b"PK", b"\x80\x02", b"\x80\x04")), member


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(2, 8))


def test_a_fixed_batch_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    model = CompressedModel.compress(Fixed(), Quantize("int8"))
    with pytest.raises(Exception, match="batch"):
        model.to_torch_export(tmp_path / "a.pt2", torch.zeros(2, 8))
    with pytest.raises(ValueError, match="example must be"):
        model.to_torch_export(tmp_path / "a.pt2", [1.0])
    assert not list(tmp_path.iterdir())
    assert model.module.training
