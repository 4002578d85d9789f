"""Variance of the difference of two models on the same samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_condensa.functional.paired import paired_variance, sample_scores


@given(both=st.integers(0, 200), ours=st.integers(0, 40), theirs=st.integers(0, 40), n=st.just(300))
def test_right_and_wrong_answers_give_mcnemars_variance(
    both: int, ours: int, theirs: int, n: int
) -> None:
    a, b = torch.zeros(n), torch.zeros(n)
    a[:both] = b[:both] = 1
    a[both : both + ours] = 1
    b[both + ours : both + ours + theirs] = 1
    order = torch.randperm(n)
    exact = (ours + theirs - (ours - theirs) ** 2 / n + 1) / n**2
    assert paired_variance(a[order], b[order]) == pytest.approx(exact)


@settings(deadline=None, max_examples=15)
@given(
    right=st.floats(0.6, 0.99),
    flips=st.floats(0.005, 0.2),
    n=st.sampled_from([200, 1000]),
    seed=st.integers(0, 2**20),
)
def test_it_is_the_variance_over_validation_sets(
    right: float, flips: float, n: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    sets = 1200
    dense = (torch.rand(sets, n, generator=draw) < right).float()
    lost = (torch.rand(sets, n, generator=draw) < flips).float()
    sparse = (dense - lost).abs()
    true = (flips - (flips * (1 - 2 * right)) ** 2) / n
    said = [paired_variance(a, b) for a, b in zip(sparse, dense, strict=True)]
    expected = sum(said) / sets - 1 / n**2  # less the pseudo-sample
    # One answer turned over in a set is the least: five standard errors of a Poisson count's mean.
    assert expected == pytest.approx(true, rel=5 / sets**0.5)


@given(shift=st.floats(-1, 1), scale=st.floats(0.01, 5), n=st.integers(2, 400))
def test_other_scores_have_the_variance_of_their_mean_difference(
    shift: float, scale: float, n: int
) -> None:
    draw = torch.Generator().manual_seed(n)
    losses = torch.rand(n, generator=draw).exp()
    other = losses + shift + scale * torch.randn(n, generator=draw)
    d = (other - losses).double()
    plain = float(d.var(correction=0)) / n
    found = paired_variance(other, losses)
    assert plain <= found <= plain + float(d.abs().max()) ** 2 / n**2 * 1.0001
    assert paired_variance(other, losses) == pytest.approx(paired_variance(losses, other))


def test_a_model_beside_itself() -> None:
    right = torch.ones(50)
    assert paired_variance(right, right) == pytest.approx(1 / 50**2)
    losses = torch.rand(50)
    assert paired_variance(losses, losses) == 0


@pytest.mark.parametrize("pair", [(torch.ones(3), torch.ones(4)), (torch.ones(0), torch.ones(0))])
def test_shapes_are_checked(pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="scores and reference"):
        paired_variance(*pair)


def check(prediction: Tensor, target: Tensor, name: str, mean: Tensor) -> None:
    scores = sample_scores(prediction, target)[name]
    assert scores.shape == (len(target),)
    torch.testing.assert_close(scores.mean(), mean)


def test_means_of_scores_are_the_usual_metrics() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 5), torch.randint(5, (20,))
    accuracy = (logits.argmax(1) == labels).float().mean()
    check(logits, labels, "accuracy", accuracy)
    check(logits.argmax(1), labels, "accuracy", accuracy)
    check(logits, labels, "cross entropy", F.cross_entropy(logits, labels))
    last = torch.randn(20, 7, 5), torch.randint(5, (20, 7))  # (n, time, classes)
    check(*last, "accuracy", (last[0].argmax(-1) == last[1]).float().mean())
    check(*last, "cross entropy", F.cross_entropy(last[0].movedim(-1, 1), last[1]))
    image = torch.randn(4, 3, 6, 6), torch.randint(3, (4, 6, 6))
    check(*image, "accuracy", (image[0].argmax(1) == image[1]).float().mean())
    one, y = torch.randn(20, 1), torch.randint(2, (20,))
    check(one, y, "accuracy", ((one.squeeze(1) > 0) == (y > 0)).float().mean())
    check(
        one,
        y,
        "binary cross entropy",
        F.binary_cross_entropy_with_logits(one.squeeze(1), y.float()),
    )
    check(one.sigmoid(), y, "accuracy of probabilities", ((one.squeeze(1) > 0) == y).float().mean())
    value, number = torch.randn(20, 3), torch.randn(20, 3)
    check(value, number, "squared error", F.mse_loss(value, number))
    check(value, number, "absolute error", F.l1_loss(value, number))


def test_nothing_is_made_of_what_does_not_fit() -> None:
    assert sample_scores(torch.randn(4, 5, 6), torch.zeros(4, dtype=torch.long)) == {}
    assert sample_scores(torch.randn(4, 5), torch.randn(3)) == {}
    assert sample_scores(torch.tensor(1.0), torch.tensor(1)) == {}
    ignored = torch.tensor([0, -100])
    assert set(sample_scores(torch.randn(2, 3), ignored)) == {"accuracy"}
