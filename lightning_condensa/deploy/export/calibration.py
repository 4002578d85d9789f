"""Ranges of activations, from batches of the user's data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_condensa.deploy.export.runtime import session

#: Ranges of activations settle after a few hundred samples.
SAMPLES = 1024
_LEVELS = 255
_BINS = 2048
#: Shares of an end of the range that are tried: clipping rare large values can pay.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class Activation:
    """How a tensor of activations becomes uint8: ``round(x / scale) + zero_point``.

    Attributes:
        scale: A positive float32.
        zero_point: 0 to 255.
    """

    scale: np.float32
    zero_point: int

    @classmethod
    def covering(cls, low: float, high: float) -> Activation:
        """The grid from ``low ≤ 0`` to ``high ≥ 0``, in which zero is exact.

        Example:
            >>> Activation.covering(-1.0, 1.55)
            Activation(scale=np.float32(0.01), zero_point=100)
        """
        step = np.float32((high - low) / _LEVELS)
        if not step >= np.finfo(np.float32).tiny:  # nothing but zeros was seen
            return cls(np.float32(1), 0)
        return cls(step, int(np.clip(np.rint(-low / float(step)), 0, _LEVELS)))

    @property
    def amplitude(self) -> float:
        """The largest magnitude that it can give."""
        return float(self.scale) * max(self.zero_point, _LEVELS - self.zero_point)


def input_batches(calibration: Any, inputs: int) -> list[tuple[Tensor, ...]]:
    """The inputs of forward from what a user may give.

    Args:
        calibration: A ``LightningDataModule``, whose training data is taken, or an iterable of
            batches, such as a ``DataLoader``: tensors, or tuples or lists that begin with the
            inputs of forward (labels may follow).
        inputs: How many inputs forward takes.

    Returns:
        The first batches, until there are 1,024 samples. The random number generator of torch is
        left as it was, and the same data gives the same batches.

    Raises:
        ValueError: If it is something else, or empty.
    """
    batches: list[tuple[Tensor, ...]] = []
    seen = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in _iterable(calibration):
            given = (batch,) if isinstance(batch, Tensor) else batch
            if (
                not isinstance(given, tuple | list)
                or len(given) < inputs
                or not all(isinstance(t, Tensor) for t in given[:inputs])
            ):
                raise ValueError(
                    "calibration must give batches that begin with the tensors that forward takes "
                    f"({inputs}), got a batch of type {type(batch).__name__}"
                )
            batches.append(tuple(t.detach().cpu() for t in given[:inputs]))
            seen += len(batches[-1][0])
            if seen >= SAMPLES:
                break
    if not seen:
        raise ValueError("calibration gave no samples")
    return batches


def calibrate(
    model: bytes, names: Sequence[str], batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, Activation]:
    """For each tensor the grid that nearly minimizes the squared error of rounding to it.

    The ends are tried from the smallest and largest value that are seen inwards, over a histogram
    of 2,048 bins; values beyond are clipped.

    Args:
        model: An ONNX file that gives these tensors beside its outputs.
        names: Their names; inputs of the model may be among them.
        batches: Inputs.

    Raises:
        ValueError: If a tensor is not finite.
    """
    run = session(model)
    fed = [i.name for i in run.get_inputs()]
    computed = [name for name in names if name not in fed]

    def values() -> Iterable[tuple[str, np.ndarray]]:
        for batch in batches:
            feed = {name: t.numpy() for name, t in zip(fed, batch, strict=True)}
            outputs = dict(zip(computed, run.run(computed, feed) if computed else (), strict=True))
            yield from ((name, (feed | outputs)[name]) for name in names)

    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for name, value in values():
        if not np.isfinite(value).all():
            raise ValueError(f"calibration: the activations of {name} are not finite")
        low[name] = min(low[name], float(value.min(initial=0)))
        high[name] = max(high[name], float(value.max(initial=0)))
    counts = {name: np.zeros(_BINS) for name in names}
    for name, value in values():
        counts[name] += np.histogram(value, _BINS, (low[name], _above(low[name], high[name])))[0]
    return {name: _best(counts[name], low[name], high[name]) for name in names}


def _best(counts: np.ndarray, low: float, high: float) -> Activation:
    """The grid of least squared error over a histogram."""
    edges = np.linspace(low, _above(low, high), len(counts) + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    best, least = Activation.covering(low, high), np.inf
    for below, above in product(_SHARES if low < 0 else (1.0,), _SHARES if high > 0 else (1.0,)):
        grid = Activation.covering(below * low, above * high)
        scale = float(grid.scale)
        codes = np.clip(np.rint(centres / scale) + grid.zero_point, 0, _LEVELS)
        error = float(counts @ ((codes - grid.zero_point) * scale - centres) ** 2)
        if error < least:
            best, least = grid, error
    return best


def _above(low: float, high: float) -> float:
    return high if high > low else low + 1


def _iterable(calibration: Any) -> Iterable[Any]:
    if hasattr(calibration, "train_dataloader"):
        calibration.prepare_data()
        calibration.setup("fit")
        calibration = calibration.train_dataloader()
    if not isinstance(calibration, Iterable) or isinstance(calibration, Tensor | Mapping | str):
        raise ValueError(
            "calibration must be a LightningDataModule or an iterable of batches such as a "
            f"DataLoader, got {type(calibration).__name__}"
        )
    return calibration
