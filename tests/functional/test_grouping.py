from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_condensa.functional.criteria import CRITERIA, Reduction, get_criterion
from lightning_condensa.functional.grouping import Blocks, Slices, n_m_mask
from lightning_condensa.schemes import BlockPrune
from lightning_condensa.schemes.selection import Target


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (3, 2), (4, 3, 3, 2)])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_blocks_partition_the_weight(shape: tuple[int, ...], block: int) -> None:
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    grouping = Blocks((block,) * len(shape))
    rows, sizes = grouping.split(weight)
    assert torch.equal((rows != 0).sum(1, keepdim=True).float(), sizes)
    assert sizes.sum() == weight.numel()
    for i, row in enumerate(rows):
        mask = grouping.expand(torch.arange(len(rows)) == i, weight.shape)
        assert sorted(weight[mask].tolist()) == sorted(row[row != 0].tolist())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("conv", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_slices_of_a_transposed_convolution_are_its_output_channels(
    conv: type[nn.ConvTranspose2d], groups: int
) -> None:
    layer = conv(4, 6, 3, groups=groups, bias=False)
    grouping = Slices(transposed=True, groups=groups)
    x = torch.rand(1, 4, *[5] * (layer.weight.dim() - 2))
    rows, _ = grouping.split(layer.weight)
    assert rows.shape[0] == 6
    for channel in range(6):
        own = grouping.expand(torch.arange(6) == channel, layer.weight.shape)
        assert sorted(rows[channel].tolist()) == sorted(layer.weight[own].tolist())
        kept = nn.Parameter(
            layer.weight * grouping.expand(torch.arange(6) != channel, layer.weight.shape)
        )
        pruned = conv(4, 6, 3, groups=groups, bias=False)
        pruned.weight = kept
        difference = (layer(x) - pruned(x)).abs().flatten(2).sum(2).squeeze(0)
        assert (difference > 1e-6).nonzero().flatten().tolist() == [channel]
        assert pruned(x)[0, channel].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", 4.0),
        ("mean", 4.0),
        ("l2", (50 / 3) ** 0.5),
        ("max", 5.0),
        ("min", 3.0),
        ("sum", 12.0),
    ],
)
def test_criteria_ignore_padding(name: str, expected: float) -> None:
    magnitudes = torch.tensor([[3.0, 4.0, 5.0, 0.0]])
    score = CRITERIA[name](magnitudes, torch.tensor([[3.0]]))
    assert score.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize(
    ("shape", "block"),
    [((8, 12), (4, 3)), ((7, 5), (4, 3)), ((2, 3), (4, 4)), ((5, 4, 3, 3), (2,) * 4)],
)
def test_blocks_score_as_their_rows_do(
    name: str, shape: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheme, target = BlockPrune(0.5, block, criterion=name), Target("weight", shape, "Linear")
    rows, sizes = Blocks(block).split(weight.abs().to(torch.promote_types(dtype, torch.float32)))
    expected = CRITERIA[name](rows, sizes.to(rows.dtype))
    score = scheme.score(target, weight)
    assert score.dtype == rows.dtype
    torch.testing.assert_close(score.flatten(), expected)
    assert isinstance(CRITERIA[name], Reduction) == (name != "min")


def test_unknown_criterion() -> None:
    with pytest.raises(ValueError, match="criterion must be one of"):
        get_criterion("l3")


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 2)])
def test_n_m_mask_is_nearest_in_every_group(n: int, m: int, kernel: tuple[int, ...]) -> None:
    weight = torch.randn(3, 8, *kernel, generator=torch.Generator().manual_seed(n * m))
    mask = n_m_mask(weight, n, m)
    groups = weight.movedim(1, -1).reshape(-1, m).square()
    kept = mask.movedim(1, -1).reshape(-1, m)
    assert torch.all(kept.sum(1) == n)
    best = torch.stack(
        [groups[:, list(c)].sum(1) for c in itertools.combinations(range(m), n)]
    ).amax(0)
    torch.testing.assert_close((groups * kept).sum(1), best)


def test_n_m_mask_cuts_ties_in_order() -> None:
    assert n_m_mask(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]
