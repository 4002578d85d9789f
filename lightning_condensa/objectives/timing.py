"""Objectives that are measured: latency and throughput of the model as it would run."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from lightning_condensa.deploy import Comparison, CompressedModel, compare
from lightning_condensa.deploy.engines import Engine, prepare
from lightning_condensa.deploy.factors import is_product
from lightning_condensa.deploy.shrink import shrunk
from lightning_condensa.deploy.threads import check_threads, torch_threads
from lightning_condensa.graph import TraceError
from lightning_condensa.objectives.base import Objective, example_of

#: How long a model runs in a row, and how often at least.
_TURN_SECONDS, _MIN_TURNS = 0.005, 5


class Latency(Objective):
    """Median seconds of one forward pass.

    The model is timed as it would be deployed: without the units that are zero
    (:meth:`CompressedModel.shrink`), and with two layers for one of low rank
    (:meth:`CompressedModel.factorize`). A dense engine gains nothing from single zeros: this
    measures what the user would get, not what a count promises.

    In a search the uncompressed model runs in turn with each compressed one, and what is reported
    is its latency, as measured once, times the median ratio of the two: trials that ended at other
    times, or on other machines, compare.

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
        self._dense: _Dense | None = None

    def __call__(self, compressed: CompressedModel) -> float:
        """The value alone."""
        return float(self.details(compressed)["value"])

    def beside(self, dense: nn.Module, values: Mapping[str, float]) -> Latency:
        """The same objective, which runs the uncompressed module in turn with each other one."""
        told = copy(self)
        told._dense = _Dense(dense, values[self.name])
        return told

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """Median and spread in seconds, with engine, threads, batch size, device and turns.

        Beside an uncompressed module also its median in the same run (``"dense"``), and how many
        times faster than it this one was, with quartiles (``"speedup"``).
        """
        module = compressed.module
        device = torch.device(self.device or next(module.parameters()).device)
        example = example_of(module, self.example, self.name)
        inputs = tuple(i.to(device) if isinstance(i, Tensor) else i for i in example)
        batch = next((len(i) for i in inputs if isinstance(i, Tensor) and i.dim()), 1)
        with torch_threads(self.threads) as threads:

            def ready(module: nn.Module) -> Callable[[], Any]:
                return prepare(module, inputs, self.engine, threads, device)

            runs = {"own": ready(_deployed(compressed, example))}
            if self._dense is not None:
                runs["dense"] = self._dense.ready(ready, (threads, device))
            measured = compare(
                runs,
                min_seconds=self.min_seconds,
                min_rounds=_MIN_TURNS,
                turn_seconds=_TURN_SECONDS,
            )
        own = measured.timing("own")
        return {
            **self._value(measured, batch),
            "median": own.median,
            "iqr": own.iqr,
            "minimum": own.minimum,
            "mean": statistics.fmean(measured.seconds["own"]),
            "turns": own.runs,
            "engine": self.engine,
            "threads": threads,
            "batch": batch,
            "device": str(device),
        }

    def _value(self, measured: Comparison, batch: int) -> dict[str, Any]:
        if self._dense is None:
            return {"value": self._of(measured.timing("own").median, batch)}
        speedup = measured.speedup("own", "dense")
        return {
            "value": self._faster(self._dense.value, speedup.median),
            "dense": measured.timing("dense").median,
            "speedup": [speedup.low, speedup.median, speedup.high],
        }

    def _of(self, seconds: float, batch: int) -> float:
        """The value of a model that needs so long for a batch."""
        return seconds

    def _faster(self, value: float, speedup: float) -> float:
        """The value of a model that is so many times faster than one of a known value."""
        return value / speedup


class Throughput(Latency):
    """Samples per second: the batch size of the example over its median latency."""

    direction = "max"
    unit: ClassVar[str] = "samples/s"

    def _of(self, seconds: float, batch: int) -> float:
        return batch / seconds

    def _faster(self, value: float, speedup: float) -> float:
        return value * speedup


def _deployed(compressed: CompressedModel, example: tuple[Any, ...]) -> nn.Module:
    """The module that computes the same in fewer operations; as it is where it is not traceable."""
    if any(is_product(encoding) for encoding in compressed.theta.values()):
        compressed = compressed.factorize(example)
    module: nn.Module = getattr(compressed.module, "_orig_mod", compressed.module)
    if compressed.plan or not any(_has_zero_units(p) for p in module.parameters()):
        return module
    try:
        return shrunk(module, example).module
    except TraceError as error:
        warnings.warn(f"timed at its full size: {error}", UserWarning, stacklevel=4)
        return module


def _has_zero_units(weight: Tensor) -> bool:
    """Whether all that goes to, or comes from, some unit is zero."""
    if weight.dim() < 2:
        return False
    used = weight.detach() != 0
    return any(not bool(used.transpose(0, d).flatten(1).any(1).all()) for d in (0, 1))


class _Dense:
    """The uncompressed module, made ready to run once in each process.

    Args:
        module: The module.
        value: Its objective.
    """

    def __init__(self, module: nn.Module, value: float) -> None:
        self.module, self.value = module, value
        self._ready: dict[tuple[int, torch.device], Callable[[], Any]] = {}

    def ready(
        self, prepare: Callable[[nn.Module], Callable[[], Any]], place: tuple[int, torch.device]
    ) -> Callable[[], Any]:
        """A call of it on so many threads of a device."""
        if place not in self._ready:
            self._ready[place] = prepare(self.module)
        return self._ready[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}  # sessions stay in their process
