"""Eckart–Young, budgets of rank, and products with the same bits everywhere."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.functional.lowrank import (
    Spectrum,
    break_even,
    budget_ranks,
    ordered_product,
)


def random_matrix(rows: int, columns: int, seed: int, decay: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * decay ** torch.arange(columns)


MATRICES = st.builds(
    random_matrix,
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 0.5]),
)


@settings(deadline=None)
@given(MATRICES, st.data())
def test_no_matrix_of_that_rank_is_nearer(matrix: Tensor, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(matrix.shape)))
    left, right = Spectrum.of(matrix).factors(rank)
    assert left.shape == (matrix.shape[0], rank)
    assert right.shape == (rank, matrix.shape[1])
    values = torch.linalg.svdvals(matrix.double())
    error = float((matrix - left @ right).square().sum())
    total = float(values.square().sum())
    assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-6, abs=1e-12 * total)


@settings(deadline=None)
@given(MATRICES)
def test_singular_values(matrix: Tensor) -> None:
    values = torch.linalg.svdvals(matrix.double())
    found = Spectrum.of(matrix).values
    torch.testing.assert_close(found, values, rtol=1e-6, atol=3e-7 * float(values[0]))


def test_both_factors_bear_the_singular_values_alike() -> None:
    left, right = Spectrum.of(100 * random_matrix(6, 9, 0)).factors(4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_what_is_within_rounding_of_zero_is_zero() -> None:
    matrix = random_matrix(8, 2, 0) @ random_matrix(2, 9, 1)
    spectrum = Spectrum.of(matrix)
    assert spectrum.values.count_nonzero() == 2
    left, right = spectrum.factors(5)
    assert not left[:, 2:].any()
    assert not right[2:].any()
    zeros = Spectrum.of(torch.zeros(3, 4))
    assert all(not factor.any() for factor in zeros.factors(2))
    assert zeros.rank_for(0.9) == 1


@settings(deadline=None)
@given(MATRICES, st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_smallest(matrix: Tensor, energy: float) -> None:
    spectrum = Spectrum.of(matrix)
    rank = spectrum.rank_for(energy)
    squares = spectrum.values.square()
    share = squares.cumsum(0) / squares.sum()
    assert share[rank - 1] >= energy - 1e-12
    assert rank == 1 or share[rank - 2] < energy + 1e-12


@given(st.integers(1, 40), st.integers(1, 40))
def test_break_even(rows: int, columns: int) -> None:
    rank = break_even((rows, columns))
    assert rank * (rows + columns) >= rows * columns
    assert (rank - 1) * (rows + columns) < rows * columns


def parameters(shapes: list[tuple[int, int]], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(min(r * sum(s), math.prod(s)) for s, r in zip(shapes, ranks, strict=True))


def squared_error(spectra: list[Tensor], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(float(v[r:].square().sum()) for v, r in zip(spectra, ranks, strict=True))


SHAPES = st.lists(st.tuples(st.integers(4, 9), st.integers(4, 9)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=200)
@given(SHAPES, st.booleans(), st.floats(0, 1), st.integers(0, 99))
def test_budgets(shapes: list[tuple[int, int]], alike: bool, share: float, seed: int) -> None:
    if alike:
        shapes = [shapes[0]] * len(shapes)
    generator = torch.Generator().manual_seed(seed)
    spectra = [
        torch.rand(break_even(s) - 1, generator=generator).sort(descending=True).values + 0.01
        for s in shapes
    ]
    least = parameters(shapes, [1] * len(shapes))
    budget = least + int(share * (sum(map(math.prod, shapes)) - least))
    ranks = budget_ranks(spectra, shapes, budget)
    assert parameters(shapes, ranks) <= budget

    def best_within(limit: int) -> float:
        every = product(*(range(1, len(v) + 1) for v in spectra))
        return min(squared_error(spectra, r) for r in every if parameters(shapes, r) <= limit)

    error = squared_error(spectra, ranks)
    if alike:
        assert error == pytest.approx(best_within(budget), abs=1e-9)
    # The first value that does not fit costs less than the largest.
    slack = max(sum(s) for s in shapes)
    assert error <= best_within(max(budget - slack, least)) + 1e-9


def test_a_matrix_may_be_kept_whole_and_a_budget_be_too_small() -> None:
    spectra = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([1.0, 0.5, 0.4, 0.1])]
    shapes = [(4, 4), (4, 4)]
    assert budget_ranks(spectra, shapes, 24) == [2, 1]
    assert budget_ranks(spectra, shapes, 16) == [1, 1]
    with pytest.raises(ValueError, match="takes 16 parameters, the budget is 15"):
        budget_ranks(spectra, shapes, 15)


@pytest.mark.parametrize(
    ("first", "second", "extra", "ranks"),
    [
        ([9.0, 5.0], [9.0, 4.5, 4.4], 32, [1, 3]),  # two cheap ones for one that is larger
        ([9.0, 6.0], [9.0, 4.4, 0.1], 24, [2, 1]),  # squares count
    ],
)
def test_what_counts_is_the_squared_error_for_each_parameter(
    first: list[float], second: list[float], extra: int, ranks: list[int]
) -> None:
    shapes = [(4, 20), (8, 8)]
    spectra = [torch.tensor(first), torch.tensor(second)]
    assert budget_ranks(spectra, shapes, 24 + 16 + extra) == ranks


def test_zeros_take_no_budget() -> None:
    values = torch.tensor([3.0, 0.0, 0.0, 0.0])
    assert budget_ranks([values], [(16, 16)], 16 * 16) == [1]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 7), st.integers(1, 7), st.integers(0, 99))
def test_products_are_right_and_every_part_has_the_same_bits(
    rows: int, inner: int, columns: int, seed: int
) -> None:
    left, right = random_matrix(rows, inner, seed), random_matrix(inner, columns, seed + 1)
    whole = ordered_product(left, right)
    torch.testing.assert_close(whole, left.double() @ right.double())
    for i in range(rows):
        for j in range(columns):
            alone = 0.0  # as any machine adds
            for a, b in zip(left[i].tolist(), right[:, j].tolist(), strict=True):
                alone += a * b
            assert float(whole[i, j]) == alone


def test_products_of_many_blocks() -> None:
    left, right = random_matrix(700, 5, 0), random_matrix(5, 400, 1)
    whole = ordered_product(left, right)
    torch.testing.assert_close(whole, left.double() @ right.double())
    assert torch.equal(whole[::50], ordered_product(left[::50], right))
