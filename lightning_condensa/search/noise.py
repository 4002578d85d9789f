"""How noisy each measurement of the metric is, and from what that is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lightning_condensa.functional.paired import is_binary, paired_variance
from lightning_condensa.search.metrics import noise_variance
from lightning_condensa.search.scores import SCORES_FILE, Scores

#: From what a variance is known: sample by sample against the dense model (``"paired"``), the
#: spread of the dense model's scores (``"spread"``), the number of validation samples
#: (``"binomial"``), the user (``"given"``), or nothing but the tolerance (``"assumed"``).
Basis = Literal["paired", "spread", "binomial", "given", "assumed"]


def noise_text(variance: float, basis: Basis, samples: int | None) -> str:
    """A noise for people.

    Example:
        >>> noise_text(1e-6, "paired", 1000)
        'sd 0.001, paired with the dense model on 1,000 samples'
    """
    on = "" if samples is None else f" on {samples:,} samples"
    known = {
        "paired": f"paired with the dense model{on}",
        "spread": f"from the spread of the dense model's scores{on}",
        "binomial": f"binomial{on}",
        "given": "as given",
        "assumed": "assumed to be a tenth of the tolerance",
    }
    return f"sd {variance**0.5:.2g}, {known[basis]}"


class Noise(NamedTuple):
    """Variance of a measured metric's distance to the dense model's, and from what it is known."""

    variance: float
    basis: Basis


def expected_noise(
    metric: float,
    samples: int | None,
    tolerance: float,
    given: float | None = None,
    scores: Scores | None = None,
) -> Noise:
    """The noise to be expected before any compressed model has been measured.

    Args:
        metric: The dense model's metric.
        samples: Validation samples, or ``None`` where unknown.
        tolerance: How far the metric may fall.
        given: The standard deviation, where the user knows it.
        scores: The dense model's scores, where there are any.

    Example:
        >>> expected_noise(0.98, 400, 0.01).basis, expected_noise(3.2, 400, 0.1).basis
        ('binomial', 'assumed')
    """
    if given is not None:
        return Noise(given**2, "given")
    if scores is not None and len(scores.values) > 1 and not is_binary(scores.values):
        # As for shares: half of the variance of two means cancels twice over.
        spread = float(scores.values.double().var()) / len(scores.values) / 2
        if spread > 0:
            return Noise(spread, "spread")
    counted = samples is not None and 0 <= metric <= 1
    return Noise(noise_variance(metric, samples, tolerance), "binomial" if counted else "assumed")


class NoiseModel:
    """Tells the noise of trials from their scores, and of what it cannot from the dense model's.

    Args:
        expected: The noise where a trial cannot be paired with the dense model.
        dense: The dense model's scores; ``None`` where none are wanted.
        notify: Is told once why trials cannot be paired.
    """

    def __init__(
        self, expected: Noise, dense: Scores | None, notify: Callable[[str], None]
    ) -> None:
        self._expected, self._dense, self._notify = expected, dense, notify
        self._told = False

    def of(self, directory: Path) -> Noise:
        """The noise of a trial.

        Args:
            directory: Of the trial, with its scores.
        """
        if self._dense is None:
            return self._expected
        own = Scores.load(directory / SCORES_FILE)
        reason = unpaired(own, self._dense)
        if not reason:
            return Noise(paired_variance(own.values, self._dense.values), "paired")
        if not self._told:
            self._told = True
            self._notify(
                f"noise is {self._expected.basis}, not paired with the dense model: {reason}; "
                "return logits and target from validation_step, or set per_sample"
            )
        return self._expected


def unpaired(own: Scores, dense: Scores) -> str:
    """Why two models' scores cannot be compared sample by sample; empty where they can."""
    reason = dense.reason or own.reason
    if reason:
        return reason
    if own.kind != dense.kind:
        return f"scores are {own.kind}, the dense model's {dense.kind}"
    if own.batches.shape != dense.batches.shape or own.values.shape != dense.values.shape:
        return "another number of samples than the dense model's"
    if not torch.allclose(own.batches, dense.batches, rtol=1e-9, atol=1e-6):
        return "other samples, or in another order, than the dense model's"
    if not bool((own.values.isfinite() & dense.values.isfinite()).all()):
        return "scores that are not finite"
    return ""
