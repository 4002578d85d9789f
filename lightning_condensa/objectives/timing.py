"""Objectives that are measured: latency and throughput of the model as it would run."""

from __future__ import annotations

import statistics
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives.base import Objective, example_of


class Latency(Objective):
    """Median seconds of one eager forward pass of the module as it is.

    A dense engine gains nothing from unstructured zeros: this measures what the user would get,
    not what a count promises.

    Args:
        example: An input batch, or a tuple of positional inputs; the module's
            ``example_input_array`` where ``None``.
        threads: CPU threads; all that torch uses where ``None``.
        min_seconds: Measuring time after the warm-up.
        device: Where to run; the module's own device where ``None``.
    """

    unit: ClassVar[str] = "s"

    def __init__(
        self,
        example: Any = None,
        *,
        threads: int | None = None,
        min_seconds: float = 0.5,
        device: str | torch.device | None = None,
    ) -> None:
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads must be an int >= 1, got {threads!r}")
        if not min_seconds > 0:
            raise ValueError(f"min_seconds must be positive, got {min_seconds!r}")
        self.example = example
        self.threads = threads
        self.min_seconds = min_seconds
        self.device = device

    def __call__(self, compressed: CompressedModel) -> float:
        """Median seconds per forward pass."""
        return float(self.details(compressed)["median"])

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """Median and spread in seconds, with threads, batch size, device and number of runs."""
        module = compressed.module
        device = torch.device(self.device or next(module.parameters()).device)
        home = next(module.parameters()).device
        modes = [(m, m.training) for m in module.modules()]
        inputs = tuple(
            i.to(device) if isinstance(i, Tensor) else i
            for i in example_of(module, self.example, self.name)
        )
        threads = self.threads or torch.get_num_threads()
        try:
            module.to(device).eval()
            with torch.inference_mode():
                # Timer synchronizes CUDA itself; the first block is the warm-up.
                timer = Timer(
                    "module(*inputs)",
                    globals={"module": module, "inputs": inputs},
                    num_threads=threads,
                )
                timer.blocked_autorange(min_run_time=self.min_seconds / 5)
                measured = timer.blocked_autorange(min_run_time=self.min_seconds)
        finally:
            module.to(home)
            for part, training in modes:  # a frozen part keeps its own mode
                part.training = training
        times = measured.times
        return {
            "value": measured.median,
            "median": measured.median,
            "iqr": measured.iqr if len(times) > 1 else 0.0,
            "minimum": min(times),
            "mean": statistics.fmean(times),
            "runs": len(times) * measured.number_per_run,
            "threads": threads,
            "batch": next((len(i) for i in inputs if isinstance(i, Tensor) and i.dim()), 1),
            "device": str(device),
        }


class Throughput(Latency):
    """Samples per second: the batch size of the example over its median latency."""

    direction = "max"
    unit: ClassVar[str] = "samples/s"

    def __call__(self, compressed: CompressedModel) -> float:
        """Samples per second."""
        return float(self.details(compressed)["value"])

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """As for :class:`Latency`, with the throughput as the value."""
        figures = super().details(compressed)
        return {**figures, "value": figures["batch"] / figures["median"]}
