from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.functional import threshold
from lightning_condensa.functional.topk import kth_largest, topk_masks

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0)
LARGE = 300_000  # beyond the size from which on a sample brackets the threshold


def reference(scores: list[Tensor], k: int) -> Tensor:
    """The k first of a stable descending order over the concatenation, as a mask."""
    joined = torch.cat([s.flatten().to(torch.float64) for s in scores])
    mask = torch.zeros_like(joined, dtype=torch.bool)
    mask[joined.sort(descending=True, stable=True).indices[:k]] = True
    return mask


def assert_exact(scores: list[Tensor], k: int) -> None:
    masks = topk_masks(scores, k)
    assert [m.shape for m in masks] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in masks)
    assert torch.equal(torch.cat([m.flatten() for m in masks]), reference(scores, k))
    if k > 0:
        joined = torch.cat([s.flatten().to(torch.float64) for s in scores])
        expected = torch.topk(joined, k).values[-1]
        threshold = kth_largest(scores, k)
        assert threshold.value == float(expected)
        assert threshold.ties == k - int((joined > expected).sum())
        assert threshold.equal == int((joined == expected).sum())


@given(
    SIZES, st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), st.data()
)
@settings(max_examples=200, deadline=None)
def test_equals_a_sort_of_the_concatenation_with_heavy_ties(
    sizes: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    value = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 2.0, math.inf])
    scores = [
        torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n)), dtype=dtype) for n in sizes
    ]
    assert_exact(scores, data.draw(st.integers(0, sum(sizes))))


@pytest.mark.parametrize("k", [0, 1, 5, 11, 12])
def test_all_equal_keeps_the_first(k: int) -> None:
    assert_exact([torch.ones(2, 3), torch.ones(6)], k)


def layouts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(LARGE, generator=generator)
    stride = LARGE // threshold.sample_size(LARGE)
    periodic = noise * 1e-3
    periodic[::stride] += 1  # the sample sees nothing but these
    unseen = noise + 1
    unseen[::stride] = 0
    spike = torch.zeros(LARGE)
    spike[12_345] = 1e30
    return {
        "random": noise,
        "ascending": noise.sort().values,
        "descending": noise.sort(descending=True).values,
        "periodic": periodic,
        "unseen": unseen,
        "one huge": spike,
        "few values": (noise * 4).floor(),
        "infinities": torch.where(noise > 0.5, math.inf, -math.inf),
        "all equal": torch.full((LARGE,), 0.5),
        "heavy tail": noise.pow(-3),
    }


@pytest.mark.parametrize("layout", list(layouts()))
@pytest.mark.parametrize("share", [1e-5, 0.01, 0.5, 0.99])
def test_exact_beyond_the_sampling_threshold(layout: str, share: float) -> None:
    scores = layouts()[layout]
    parts = [scores[:100_000].reshape(100, 1000), scores[100_000:100_001], scores[100_001:]]
    assert_exact(parts, max(round(share * LARGE), 1))


@pytest.mark.parametrize("k", [1, 2, LARGE - 1, LARGE])
def test_extreme_ranks(k: int) -> None:
    assert_exact([layouts()["random"]], k)


def test_many_tensors() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(n % 37, generator=generator) for n in range(400)]
    assert_exact(scores, 1000)


def test_float64_below_the_resolution_of_float32() -> None:
    scores = 1 + torch.randperm(LARGE, generator=torch.Generator().manual_seed(2)) * 1e-12
    assert scores.float().unique().numel() < 20
    assert_exact([scores.double()], 1234)


def test_float64_beyond_the_range_of_float32() -> None:
    scores = 10.0 ** (300 * torch.rand(LARGE, dtype=torch.float64))
    assert_exact([scores], 1234)


def test_mixed_types_compare_exactly() -> None:
    # 1.0001 rounds to 1 in half precision: the half 1.0 is below it all the same.
    halves = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float16)
    assert_exact([halves, torch.tensor([1.0001, 0.5])], 2)
    assert_exact([torch.tensor([0.1]), torch.tensor([0.1], dtype=torch.float64)], 1)


def test_non_contiguous_scores() -> None:
    scores = torch.rand(300, 400, generator=torch.Generator().manual_seed(3)).t()
    assert_exact([scores], 777)


@pytest.mark.parametrize("k", [-1, 5])
def test_rank_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in \[0, 4\]"):
        topk_masks([torch.ones(4)], k)


def with_floors(scores: list[Tensor], k: int, floors: list[int]) -> list[Tensor]:
    """By the definition: whoever falls below its floor keeps its floor, the others share."""
    free, keep = list(range(len(scores))), [torch.empty(0)] * len(scores)
    while True:
        parts = reference([scores[i] for i in free], k).split([scores[i].numel() for i in free])
        poor = [i for i, mask in zip(free, parts, strict=True) if mask.sum() < floors[i]]
        for i, mask in zip(free, parts, strict=True):
            keep[i] = mask
        if not poor:
            return keep
        for i in poor:
            keep[i] = reference([scores[i]], floors[i])
            k -= floors[i]
        free = [i for i in free if i not in poor]


@given(SIZES, st.integers(0, 4), st.data())
@settings(max_examples=200, deadline=None)
def test_floors(sizes: list[int], floor: int, data: st.DataObject) -> None:
    value = st.sampled_from([-2.0, 0.0, 0.25, 0.5, 2.0])
    scores = [torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n))) for n in sizes]
    floors = [min(floor, n) for n in sizes]
    k = data.draw(st.integers(sum(floors), sum(sizes)))
    masks = topk_masks(scores, k, floors)
    for mask, right in zip(masks, with_floors(scores, k, floors), strict=True):
        assert torch.equal(mask, right)


@pytest.mark.parametrize("layout", ["random", "few values", "heavy tail", "all equal"])
@pytest.mark.parametrize("floor", [1, 7, 3000])
def test_floors_beyond_the_sampling_threshold(layout: str, floor: int) -> None:
    scores = list(layouts()[layout].split([100_000, 5_000, 100_000, 3_000, 92_000]))
    for poor in (1, 3):
        scores[poor] = scores[poor] * 1e-4
    for k in (15_000, 150_000):
        masks = topk_masks(scores, k, [floor] * 5)
        for mask, right in zip(masks, with_floors(scores, k, [floor] * 5), strict=True):
            assert torch.equal(mask, right)


def test_the_repair_of_a_poor_tensor_reads_the_others_no_second_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = [torch.rand(LARGE, generator=generator) * scale for scale in (1, 1e-3, 1)]
    read = 0
    select = threshold.Parts.select

    def counting(parts: threshold.Parts, first: float, last: float) -> object:
        nonlocal read
        read += parts.held
        return select(parts, first, last)

    monkeypatch.setattr(threshold.Parts, "select", counting)
    masks = topk_masks(scores, 30_000, [5, 5, 5])
    assert [int(m.sum()) for m in masks][1] == 5
    assert read < 4.2 * LARGE  # all three once, the poor one once more


@pytest.mark.parametrize("k", [0, 3, 1000, LARGE])
def test_magnitudes_without_a_copy(k: int) -> None:
    scores = layouts()["random"] - 0.5
    before = scores.clone()
    (mask,) = topk_masks([scores], k, absolute=True)
    assert torch.equal(mask, reference([scores.abs()], k))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("floors", [[5], [-1], [3]])
def test_floors_out_of_range(floors: list[int]) -> None:
    with pytest.raises(ValueError, match=r"floors must fit"):
        topk_masks([torch.ones(4)], 2, floors)
