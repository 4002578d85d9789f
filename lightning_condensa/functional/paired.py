"""Scores of single samples, and how noisy the difference of two models' means is."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def paired_variance(scores: Tensor, reference: Tensor) -> float:
    """Variance of ``mean(scores) − mean(reference)``, both measured on the same samples.

    With differences ``d``: ``[Σ(d − mean d)² + pseudo] / n²``. For right and wrong answers this is
    ``[n10 + n01 − (n10 − n01)²/n] / n²`` of McNemar's paired table. What is easy or hard for both
    models cancels; two unpaired binomial variances would count it twice.

    ``pseudo`` stands for one sample more that differs, as much as the worst one does (by 1 where
    right and wrong answers all agree): the rule of succession, so that two models that happen to
    agree are not taken to be free of noise. Other scores that agree in every sample are the same
    function of them, and have no variance.

    Args:
        scores: A score per sample, shape ``[n]``.
        reference: Those of the other model on the same samples in the same order.

    Raises:
        ValueError: If the shapes differ, or there is no sample.

    Example:
        >>> import torch
        >>> right, reference = torch.ones(100), torch.ones(100)
        >>> right[:3] = 0
        >>> round(paired_variance(right, reference) * 100**2, 2)  # 3 − 9/100, and 1
        3.91
    """
    if scores.ndim != 1 or scores.shape != reference.shape or len(scores) == 0:
        raise ValueError(
            "scores and reference must both have shape [n] with n >= 1, "
            f"got {list(scores.shape)} and {list(reference.shape)}"
        )
    difference = scores.double() - reference.double()
    pseudo = float(difference.abs().max()) ** 2
    if pseudo == 0 and is_binary(scores):
        pseudo = 1.0
    squares = float((difference - difference.mean()).square().sum())
    return (squares + pseudo) / len(difference) ** 2


def is_binary(scores: Tensor) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())


def sample_scores(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The usual scores of single samples whose mean may be a metric.

    Args:
        prediction: Logits ``(n, classes, ...)`` or ``(n, ..., classes)``, labels ``(n, ...)``, or
            numbers ``(n, ...)``.
        target: Labels or numbers, ``(n, ...)``; other dimensions are averaged over.

    Returns:
        Name → scores ``[n]``; empty where the shapes fit nothing.

    Example:
        >>> import torch
        >>> found = sample_scores(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> found["accuracy"].tolist(), [round(x, 2) for x in found["cross entropy"].tolist()]
        ([1.0, 0.0], [0.13, 2.13])
    """
    if target.ndim == 0 or prediction.ndim == 0 or len(target) == 0:
        return {}
    if prediction.ndim == target.ndim + 1 and prediction.shape[-1] == 1:
        prediction = prediction.squeeze(-1)
    whole = not target.is_floating_point()
    found: dict[str, Tensor] = {}
    if prediction.shape == target.shape and not prediction.is_floating_point():
        found["accuracy"] = prediction == target
    elif prediction.shape == target.shape:
        p, y = prediction.float(), target.float()
        if bool(((y == 0) | (y == 1)).all()):  # logits or probabilities of the one class
            found["accuracy"] = (p > 0) == (y > 0)
            found["accuracy of probabilities"] = (p > 0.5) == (y > 0)
            found["binary cross entropy"] = F.binary_cross_entropy_with_logits(
                p, y, reduction="none"
            )
        found["squared error"] = (p - y).square()
        found["absolute error"] = (p - y).abs()
    elif whole and prediction.is_floating_point():
        for class_dim in (1, -1):
            logits = prediction.movedim(class_dim, 1) if prediction.ndim > 1 else prediction
            if logits.ndim > 1 and logits.shape[:1] + logits.shape[2:] == target.shape:
                found["accuracy"] = logits.argmax(1) == target
                inside = bool(((target >= 0) & (target < logits.shape[1])).all())
                if inside:  # others, such as -100, are left out of losses, and not by every metric
                    found["cross entropy"] = F.cross_entropy(
                        logits.float(), target.long(), reduction="none"
                    )
                break
    return {
        name: value.float().flatten(1).mean(1) if value.ndim > 1 else value.float()
        for name, value in found.items()
    }
