from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.functional import kmeans
from lightning_condensa.functional.kmeans import cell_means, cells, kmeans_1d, middles, nearest

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TIED = st.integers(-4, 4).map(lambda i: i / 2)
#: Clusters narrow beside their distance, where differences of running sums would be all noise.
NARROW = st.builds(
    lambda centre, step: centre + step * 2.0**-12, st.sampled_from([-1000, 0, 3]), st.integers(0, 9)
)
SMALL = st.one_of(
    *(st.lists(each, min_size=1, max_size=8) for each in (TIED, NARROW, FINITE, TIED | NARROW))
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def least_error(values: Sequence[float], k: int) -> Fraction:
    """Exact optimum over all partitions of the sorted values into up to k runs."""
    ordered = sorted(map(Fraction, values))
    best = None
    for runs in range(1, min(k, len(ordered)) + 1):
        for cuts in combinations(range(1, len(ordered)), runs - 1):
            parts = [ordered[a:b] for a, b in pairwise([0, *cuts, len(ordered)])]
            means = [sum(part) / len(part) for part in parts]
            errors = (
                sum((x - mean) ** 2 for x in part) for part, mean in zip(parts, means, strict=True)
            )
            error = Fraction(sum(errors))
            best = error if best is None else min(best, error)
    assert best is not None
    return best


def exact_error(values: Sequence[float], centroids: Tensor) -> Fraction:
    table = [Fraction(c) for c in centroids.tolist()]
    return sum((min((Fraction(x) - c) ** 2 for c in table) for x in values), Fraction(0))


def squared_error(values: Tensor, centroids: Tensor) -> float:
    chosen = centroids.double()[nearest(values, centroids).long()]
    return (values.double() - chosen).square().sum().item()


@given(SMALL, st.integers(1, 4))
@settings(max_examples=400, deadline=None)
def test_few_values_get_the_best_of_all_partitions(values: list[float], k: int) -> None:
    centroids = kmeans_1d(torch.tensor(values), k)
    assert len(centroids) == min(k, len(set(values)))
    assert torch.all(centroids[1:] > centroids[:-1])
    # Rounding a mean to float32 adds the square of the rounding once for each value.
    rounding = Fraction(max(map(abs, values)) * 2.0**-24 + 2.0**-150)
    best = least_error(values, k)
    slack = best / 10**9 + len(values) * rounding**2
    assert exact_error(values, centroids) <= best + slack


def quadratic_program(points: np.ndarray, weights: np.ndarray, k: int) -> float:
    """The textbook recurrence, every start tried for every end."""
    n = len(points)
    mass, first, second = (
        np.concatenate([[0], np.cumsum(weights * points**power)]) for power in (0, 1, 2)
    )
    start, end = np.arange(n)[:, None], np.arange(1, n + 1)[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = (second[end] - second[start]) - (first[end] - first[start]) ** 2 / (
            mass[end] - mass[start]
        )
    error[start >= end] = np.inf
    best = error[0]
    for _ in range(k - 1):
        best = (np.concatenate([[np.inf], best[:-1]])[:, None] + error).min(0)
    return float(best[-1])


@pytest.mark.parametrize("n", [17, 64, 300])
@pytest.mark.parametrize("k", [2, 3, 7, 16])
def test_ties_count_and_every_size_is_optimal(
    n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "_BINS", 1)  # so that bins, if they were used, would be too coarse
    monkeypatch.setattr(kmeans, "_BINS_EACH", 2)
    points = torch.randn(n, generator=generator(n), dtype=torch.float64).float().unique()
    weights = torch.randint(1, 50, points.shape, generator=generator(k)) ** 2
    values = points.repeat_interleave(weights)
    values = values[torch.randperm(len(values), generator=generator())].reshape(1, -1, 1)
    expected = quadratic_program(points.double().numpy(), weights.double().numpy(), k)
    error = squared_error(values, kmeans_1d(values, k))
    assert error == pytest.approx(expected, rel=1e-6)


def sample(name: str, n: int = 20_000) -> Tensor:
    uniform = torch.rand(n, generator=generator(1), dtype=torch.float64)
    normal = torch.randn(n, generator=generator(2), dtype=torch.float64)
    outliers = torch.tensor([1e6, -3e5], dtype=torch.float64)
    return {
        "normal": normal,
        "laplace": (uniform - 0.5).sign() * -torch.log1p(-2 * (uniform - 0.5).abs()),
        "cauchy": torch.tan(math.pi * (uniform - 0.5)),
        "cubes": normal**3,
        "two clusters": torch.where(uniform < 0.3, normal - 1000, normal / 100 + 5),
        "sparse": torch.where(uniform < 0.7, 0, normal),
        "outliers": torch.cat([normal[2:], outliers]),
    }[name].float()


SAMPLES = ["normal", "laplace", "cauchy", "cubes", "two clusters", "sparse", "outliers"]


@pytest.mark.parametrize("k, gap", [(2, 1e-5), (4, 1e-5), (16, 1e-5), (64, 1e-4)])
@pytest.mark.parametrize("name", SAMPLES)
def test_bins_come_close_to_the_optimum(name: str, k: int, gap: float) -> None:
    values = sample(name)
    best = squared_error(values, kmeans_1d(values, k, exact_below=len(values)))
    error = squared_error(values, kmeans_1d(values, k, exact_below=1))
    assert best * (1 - 1e-6) <= error <= best * (1 + gap)


def test_many_clusters_have_bins_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_BINS", 64)
    values = sample("normal")
    best = squared_error(values, kmeans_1d(values, 64, exact_below=len(values)))
    assert squared_error(values, kmeans_1d(values, 64, exact_below=1)) <= best * 1.002


def test_nearly_as_many_clusters_as_values() -> None:
    values = sample("normal", 400).unique()
    expected = kmeans_1d(values, len(values) - 10)
    assert len(expected) == len(values) - 10
    assert torch.equal(kmeans_1d(values, len(values) - 10, exact_below=1), expected)


@pytest.mark.parametrize("name", ["normal", "laplace", "sparse"])
def test_refined_centroids_are_the_means_of_their_values(name: str) -> None:
    values = sample(name)
    centroids = kmeans_1d(values, 4, exact_below=1)
    chosen = nearest(values, centroids).long()
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, chosen, values.double())
    means = sums / torch.bincount(chosen)
    torch.testing.assert_close(centroids.double(), means, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("exact_below", [1, 4096])
@given(st.lists(FINITE, min_size=1, max_size=9, unique=True), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_values_of_few_kinds_are_returned_as_they_are(
    exact_below: int, kinds: list[float], spare: int
) -> None:
    table = torch.tensor(kinds)
    repeated = table[torch.randint(len(kinds), (300,), generator=generator())]
    values = torch.cat([table, repeated])
    centroids = kmeans_1d(values, len(kinds) + spare, exact_below=exact_below)
    assert torch.equal(centroids, table.unique())
    assert torch.equal(centroids[nearest(values, centroids).long()], values)


@pytest.mark.parametrize("exact_below", [1, 10**6])
def test_clustering_what_is_clustered_changes_nothing(exact_below: int) -> None:
    values = sample("laplace")
    centroids = kmeans_1d(values, 16, exact_below=exact_below)
    decoded = centroids[nearest(values, centroids).long()]
    assert torch.equal(kmeans_1d(decoded, 16, exact_below=exact_below), centroids)


def test_one_cluster_is_the_mean() -> None:
    values = sample("cubes")
    for exact_below in (1, len(values)):
        centroid = kmeans_1d(values, 1, exact_below=exact_below)
        assert centroid.tolist() == pytest.approx([values.double().mean().item()], abs=1e-6)


def test_small_clusters_far_from_the_mean_are_told_apart() -> None:
    # Errors of 1e-6 beside squares of 1e11: only moments about a nearby point can see them.
    near = [0.0, 0.001, 0.002, 0.010, 0.011, 0.012]
    centroids = kmeans_1d(torch.tensor([*near, 1e6, 1e6, 1e6]), 3)
    assert centroids.tolist() == pytest.approx([0.001, 0.011, 1e6])


@pytest.mark.parametrize("exact_below", [1, 10**6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_type_order_and_layout_do_not_matter(dtype: torch.dtype, exact_below: int) -> None:
    # Six bits of mantissa from 2⁻⁸ on: every type holds these values.
    mantissa = torch.randint(32, 64, (40, 50), generator=generator(1))
    sign = torch.randint(0, 2, (40, 50), generator=generator(2)) * 2 - 1
    values = torch.ldexp(sign * mantissa, torch.randint(-8, 8, (40, 50), generator=generator(3)))
    expected = kmeans_1d(values.flatten().sort().values, 5, exact_below=exact_below)
    given = values.to(dtype).requires_grad_()
    centroids = kmeans_1d(given.T, 5, exact_below=exact_below)
    assert centroids.dtype == torch.float32 and not centroids.requires_grad
    assert torch.equal(centroids, expected)
    assert torch.equal(nearest(given, centroids), nearest(values, expected))
    assert torch.equal(nearest(given.T, centroids).T, nearest(values, expected))


def test_the_input_is_left_alone() -> None:
    values = torch.tensor([3.0, -0.0, 1.0, 2.0, -5.0])
    before = values.clone()
    kmeans_1d(values, 2)
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("low", [[-0.0], [-(2.0**-149), 0.0, 0.0, 0.0]])
def test_a_zero_has_one_bit_pattern(low: list[float]) -> None:
    centroids = kmeans_1d(torch.tensor([*low, 1.0]), 2)
    assert torch.equal(centroids.view(torch.int32), torch.tensor([0.0, 1.0]).view(torch.int32))


def test_nothing_has_no_centroids() -> None:
    centroids = kmeans_1d(torch.empty(0, 3), 4)
    assert centroids.shape == (0,) and centroids.dtype == torch.float32


@pytest.mark.parametrize("k", [0, -3])
def test_too_few_clusters_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"^k is {k}: .* at least 1"):
        kmeans_1d(torch.ones(3), k)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("k", [1, 5])
def test_values_that_are_not_finite_are_refused(bad: float, k: int) -> None:
    values = torch.tensor([1.0, bad, -2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^values range .* must be finite"):
        kmeans_1d(values, k)


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.lists(st.integers(-20, 20), min_size=1, max_size=12, unique=True),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_nearest_is_the_first_of_least_distance(
    values: list[int], table: list[int], dtype: torch.dtype
) -> None:
    x, centroids = torch.tensor(values).to(dtype), torch.tensor(sorted(table)).float()
    distance = (x.double().numpy()[:, None] - centroids.double().numpy()).__abs__()
    index = nearest(x, centroids)
    assert index.dtype == torch.uint8
    assert index.tolist() == distance.argmin(1).tolist()


@given(st.lists(FINITE, min_size=1, max_size=12), st.lists(FINITE, min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_nearest_at_any_scale(values: list[float], table: list[float]) -> None:
    centroids = torch.tensor(sorted(table))
    chosen = centroids[nearest(torch.tensor(values), centroids).long()].tolist()
    for value, choice in zip(values, chosen, strict=True):
        least = min(abs(Fraction(value) - Fraction(c)) for c in table)
        assert abs(Fraction(value) - Fraction(choice)) <= least * (1 + Fraction(2) ** -50)


@given(FINITE.filter(lambda x: abs(x) < 1e38), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_a_centroid_is_nearest_to_itself_among_neighbours(value: float, count: int) -> None:
    table = [np.float32(value)]
    for _ in range(count):
        table.append(np.nextafter(table[-1], np.float32(np.inf)))
    centroids = torch.from_numpy(np.array(table))
    for values in (centroids, centroids.double()):
        assert nearest(values, centroids).tolist() == list(range(count + 1))


def test_doubles_are_compared_as_doubles() -> None:
    centroids = torch.tensor([1.0, 1.0 + 2.0**-23])  # whose middle is no float32
    middle = centroids.double().mean().item()
    values = torch.tensor([middle - 2.0**-40, middle, middle + 2.0**-40], dtype=torch.float64)
    assert nearest(values, centroids).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "k, dtype",
    [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_indices_are_as_narrow_as_may_be(k: int, dtype: torch.dtype) -> None:
    values = torch.arange(k).float()
    index = nearest(values, values)
    assert index.dtype == dtype
    assert torch.equal(index.long(), torch.arange(k))


def test_nearest_of_more_than_a_chunk() -> None:
    values = sample("cubes", 2 * 2**16 + 5).reshape(-1, 1)
    centroids = kmeans_1d(values, 16)
    expected = (values.double() - centroids.double()).abs().argmin(1, keepdim=True)
    assert torch.equal(nearest(values, centroids).long(), expected)


def test_nearest_of_nothing() -> None:
    assert nearest(torch.empty(0, 2), torch.zeros(1)).shape == (0, 2)


@pytest.mark.parametrize("table", [[], [1.0, 0.0], [[0.0, 1.0]], [0.0, math.nan]])
def test_centroids_in_disorder_are_refused(table: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^centroids of shape \(.* ascending"):
        nearest(torch.ones(2), torch.tensor(table))


def test_a_cluster_that_loses_its_values_keeps_its_centroid() -> None:
    # From a poor start, which no partition of bins is, Lloyd's iteration empties the middle run.
    ordered = np.array([0.0, 0.0, 0.0, 1.0, 9.0, 10.0, 10.0, 10.0], dtype=np.float32)
    centroids = kmeans._lloyd(ordered, np.array([0, 3, 5, 8]))
    assert centroids.tolist() == pytest.approx([0.25, 5.0, 9.75])


def test_values_between_two_centroids_join_the_lower_as_in_nearest() -> None:
    ordered = np.array([0.0, 2.0, 6.0], dtype=np.float32)
    assert kmeans._lloyd(ordered, np.array([0, 1, 3])).tolist() == [1.0, 6.0]


@given(
    st.lists(FINITE, min_size=1, max_size=12),
    st.lists(FINITE, max_size=5).map(sorted),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_cells_and_their_means(
    values: list[float], borders: list[float], dtype: torch.dtype
) -> None:
    x, cuts = torch.tensor(values, dtype=dtype), torch.tensor(borders, dtype=torch.float64)
    index = cells(x, cuts)
    assert index.tolist() == [sum(border < value for border in borders) for value in values]
    means = cell_means(x, cuts)
    assert means.shape == (len(borders) + 1,)
    for cell, mean in enumerate(means.tolist()):
        inside = [Fraction(v) for v, i in zip(values, index.tolist(), strict=True) if i == cell]
        if inside:
            exact = sum(inside) / len(inside)
            slack = max(map(abs, inside)) * Fraction(2) ** -23 + Fraction(2) ** -149
            assert abs(Fraction(mean) - exact) <= slack
        else:
            ends = borders[max(cell - 1, 0) : cell + 1]  # both of it, or the only one
            assert mean == float(np.float32(sum(ends) / len(ends)))
    assert means.tolist() == sorted(means.tolist())
    # The means are in their own cells: rounding to them again changes nothing.
    rounded = means[index.long()]
    assert torch.equal(cells(rounded, cuts), index)


def test_means_of_the_cells_of_an_optimum_are_the_optimum() -> None:
    values = sample("cubes", 5000)
    centroids = kmeans_1d(values, 7)
    again = cell_means(values, middles(centroids))
    torch.testing.assert_close(again, centroids, rtol=1e-3, atol=1e-4)
