"""Objectives that are measured: latency and throughput of the model as it would run."""

from __future__ import annotations

import statistics
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.deploy.engines import Engine, prepare
from lightning_condensa.deploy.threads import check_threads
from lightning_condensa.objectives.base import Objective, example_of


class Latency(Objective):
    """Median seconds of one forward pass.

    A dense engine gains nothing from unstructured zeros: this measures what the user would get,
    not what a count promises.

    Args:
        example: An input batch, or a tuple of positional inputs; the module's
            ``example_input_array`` where ``None``.
        threads: CPU threads; all that torch uses where ``None``.
        min_seconds: Measuring time after the warm-up.
        device: Where to run; the module's own device where ``None``.
        engine: What runs the module: ``"eager"`` PyTorch; ``"compile"``, `torch.compile`;
            ``"onnxruntime"`` (``pip install 'lightning-condensa[onnx]'``); ``"sparse"``, which
            skips zero weights where that is faster (:meth:`CompressedModel.to_sparse`).
    """

    unit: ClassVar[str] = "s"

    def __init__(
        self,
        example: Any = None,
        *,
        threads: int | None = None,
        min_seconds: float = 0.5,
        device: str | torch.device | None = None,
        engine: Engine = "eager",
    ) -> None:
        check_threads(threads)
        if not min_seconds > 0:
            raise ValueError(f"min_seconds must be positive, got {min_seconds!r}")
        if engine not in get_args(Engine):
            raise ValueError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
        self.example = example
        self.threads = threads
        self.min_seconds = min_seconds
        self.device = device
        self.engine = engine

    def __call__(self, compressed: CompressedModel) -> float:
        """Median seconds per forward pass."""
        return float(self.details(compressed)["median"])

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """Median and spread in seconds, with engine, threads, batch size, device and runs."""
        module = compressed.module
        device = torch.device(self.device or next(module.parameters()).device)
        inputs = tuple(
            i.to(device) if isinstance(i, Tensor) else i
            for i in example_of(module, self.example, self.name)
        )
        threads = self.threads or torch.get_num_threads()
        run = prepare(module, inputs, self.engine, threads, device)
        # Timer synchronizes CUDA itself; the first block is the warm-up.
        timer = Timer("run()", globals={"run": run}, num_threads=threads)
        timer.blocked_autorange(min_run_time=self.min_seconds / 5)
        measured = timer.blocked_autorange(min_run_time=self.min_seconds)
        times = measured.times
        return {
            "value": measured.median,
            "median": measured.median,
            "iqr": measured.iqr if len(times) > 1 else 0.0,
            "minimum": min(times),
            "mean": statistics.fmean(times),
            "runs": len(times) * measured.number_per_run,
            "engine": self.engine,
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
