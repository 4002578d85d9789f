"""The loss that makes one network's logits follow another's."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, class_dim: int = -1
) -> Tensor:
    """``T²·KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over all positions.

    Hinton, Vinyals and Dean 2015 (arXiv:1503.02531). The factor T² keeps the gradient's size when
    the temperature changes. Computed in float32 at least. A class that the teacher rules out
    (logit ``-inf``) adds nothing, also where the student rules it out.

    Args:
        student: Logits; ``(..., classes)`` with the default ``class_dim``.
        teacher: Logits of the same shape; gradients reach them, too: detach what must not learn.
        temperature: T; more of it lets the teacher's small probabilities count.
        class_dim: The dimension of the classes; 1 for ``(batch, classes, height, width)``.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ, or ``class_dim`` is none of their dimensions.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> distillation_loss(student, teacher, temperature=1.0)
        tensor(0.1109)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits must have the shape of the student's, {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    if not -student.dim() <= class_dim < student.dim():
        raise ValueError(
            f"class_dim must be a dimension of the logits, whose shape is {tuple(student.shape)}, "
            f"got {class_dim}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = (student.to(dtype) / temperature).log_softmax(class_dim)
    log_p = (teacher.to(dtype) / temperature).log_softmax(class_dim)
    p = log_p.exp()
    # 0·log(0 / q) is 0 by continuity, not the NaN of 0·(-inf + inf).
    divergence = (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(class_dim)
    return temperature**2 * divergence.mean()
