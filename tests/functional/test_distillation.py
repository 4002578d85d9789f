from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lightning_condensa.functional.distillation import distillation_loss


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    temperature=st.floats(0.5, 20),
    data=st.data(),
)
def test_it_is_the_mean_kl_divergence(seed, shape, temperature, data) -> None:  # type: ignore[no-untyped-def]
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 5 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    rows = [t.movedim(dim, -1).reshape(-1, shape[dim]) / temperature for t in (student, teacher)]
    expected = functional.kl_div(rows[0].log_softmax(1), rows[1].softmax(1), reduction="batchmean")
    loss = distillation_loss(student, teacher, temperature, dim)
    torch.testing.assert_close(loss, temperature**2 * expected, rtol=1e-9, atol=1e-9)
    assert loss >= -1e-9
    assert abs(distillation_loss(student, student + 1.0, temperature, dim)) < 1e-9


def test_at_a_high_temperature_it_is_the_mean_squared_distance_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 20, 10, generator=generator, dtype=torch.float64)
    centred = [t - t.mean(1, keepdim=True) for t in (student, teacher)]
    limit = (centred[0] - centred[1]).square().sum(1).mean() / (2 * 10)  # Hinton et al., eq. 4
    torch.testing.assert_close(distillation_loss(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


def test_classes_that_are_ruled_out_add_nothing() -> None:
    student = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[0.0, 3.0, -torch.inf]])
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss, distillation_loss(student[:, :2], teacher[:, :2]))
    loss.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).half()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float()))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shape of the student's, \(2, 3\), got \(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"whose shape is \(2, 3\), got 2"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), class_dim=2)
