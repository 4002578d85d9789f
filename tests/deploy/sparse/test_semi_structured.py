"""2:4 weights fit the format of `torch.sparse`; on a CUDA device they give dense outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lightning_condensa import CompressedModel, NMPrune
from lightning_condensa.deploy import SparseMismatchError, to_semi_structured
from lightning_condensa.deploy.sparse import semi_structured
from lightning_condensa.deploy.sparse.semi_structured import is_semi_structured, why_not
from lightning_condensa.deploy.timing import Ratio

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs sparse tensor cores",
)


class Net(nn.Module):
    """Layers that can be 2:4 sparse, and some that can't."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 64, 1)
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.head(self.second(self.first(x).relu()).relu())


def pruned(width: int = 128) -> CompressedModel:
    torch.manual_seed(0)
    return CompressedModel.compress(Net(width), NMPrune(2, 4, exclude=[r"^head\."]))


def through_the_format(weight: Tensor) -> Tensor:
    """What `torch.sparse` packs a weight to, as a dense one: the CPU can't multiply with it."""
    packed = sparse_semi_structured_from_dense_cutlass(weight)
    return sparse_semi_structured_to_dense_cutlass(*packed)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice among layers without a device."""
    monkeypatch.setattr(semi_structured, "_require_device", lambda: None)
    monkeypatch.setattr(semi_structured, "DEVICE", "cpu")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", through_the_format)


@given(st.integers(0, 2**16 - 1))
def test_two_of_four_in_the_same_row(bits: int) -> None:
    weight = torch.tensor([(bits >> i) & 1 for i in range(16)]).view(2, 8)
    groups = [weight[r, 4 * g : 4 * g + 4].sum() <= 2 for r in range(2) for g in range(2)]
    assert is_semi_structured(weight.float()) == all(groups)
    assert not is_semi_structured(weight[:, :6].float())


def test_what_nm_prune_leaves_fits_the_format() -> None:
    weight = pruned().module.second.weight.detach().half()
    assert is_semi_structured(weight)
    assert int((weight != 0).sum()) == weight.numel() // 2
    assert torch.equal(through_the_format(weight), weight)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(64, 10), "10 × 64 weights are no multiples of 32 × 64"),
        (nn.Linear(96, 32), "32 × 96 weights are no multiples of 32 × 64"),
        (nn.Linear(64, 32), "its weights are not 2:4 sparse"),
        (pruned().module.second, ""),
    ],
)
def test_why_a_layer_stays_dense(layer: nn.Linear, reason: str) -> None:
    assert why_not(layer) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_the_error_says_what_to_use() -> None:
    with pytest.raises(RuntimeError, match="need a CUDA device: to_sparse is for the CPU"):
        pruned().to_semi_structured(torch.rand(2, 4, 3, 3))


def test_the_type_is_checked() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch\.float16 or .* got torch\.float32"):
        to_semi_structured(nn.Linear(64, 64), torch.rand(2, 64), torch.float32)


@pytest.mark.usefixtures("on_the_cpu")
def test_each_layer_has_a_row_that_says_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed, x = pruned(), torch.rand(8, 4, 3, 3)
    monkeypatch.setattr(semi_structured, "fastest", lambda _: ("2:4", Ratio(1.5, 1.4, 1.6)))
    sparse = compressed.to_semi_structured(x, torch.bfloat16)
    rows = {row.name: row for row in sparse.report.rows}
    assert list(rows) == ["conv", "first", "second", "head", "unused"]
    assert rows["conv"].reason == "is no plain Linear layer"
    assert rows["unused"].reason == "is not called on the example"
    assert rows["head"].reason == "10 × 128 weights are no multiples of 32 × 64"
    for name, inputs in (("first", (8, 64)), ("second", (8, 128))):
        row = rows[name]
        assert (row.inputs, row.density, row.method) == (inputs, 0.5, "2:4")
        assert set(row.seconds) == {"dense", "2:4"}
    assert "Sparse execution, CUDA" in str(sparse.report)
    dense = compressed.module.bfloat16()(x.bfloat16())
    torch.testing.assert_close(sparse(x.bfloat16()), dense, rtol=0, atol=0.01)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_layer_that_gains_nothing_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "fastest", lambda _: ("dense", Ratio(1.0, 1.0, 1.0)))
    compressed = pruned()
    sparse = compressed.to_semi_structured(torch.rand(8, 4, 3, 3))
    rows = {row.name: row for row in sparse.report.rows}
    assert rows["second"].method == "dense"
    assert rows["second"].reason == "2:4 is not faster"
    assert torch.equal(sparse.module.second.weight, compressed.module.second.weight.half())
    assert sparse(torch.rand(8, 4, 3, 3).half()).dtype == torch.float16


@pytest.mark.usefixtures("on_the_cpu")
def test_wrong_outputs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight.roll(1, 0)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", broken)
    with pytest.raises(SparseMismatchError, match="2:4 gives other outputs than dense in first"):
        pruned().to_semi_structured(torch.rand(8, 4, 3, 3))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("measured", [False, True])
def test_on_cuda_outputs_are_those_of_the_dense_model(
    dtype: torch.dtype, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not measured:
        monkeypatch.setattr(semi_structured, "fastest", lambda _: ("2:4", Ratio(1.5, 1.4, 1.6)))
    compressed, x = pruned(2048), torch.rand(512, 4, 3, 3)
    sparse = compressed.to_semi_structured(x, dtype)
    inputs = x.cuda().to(dtype)
    dense = compressed.module.cuda().to(dtype)
    torch.testing.assert_close(sparse(inputs), dense(inputs), rtol=0, atol=0.02)
    for row in sparse.report.rows:
        if row.name in ("first", "second"):
            assert (row.method == "2:4") == (row.speedup is not None and row.speedup.median > 1)
