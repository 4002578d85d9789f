"""What to compress for: bytes, parameters, FLOPs, latency, throughput, or any callable."""

from lightning_condensa.objectives.base import CallableObjective, Direction, Objective
from lightning_condensa.objectives.named import as_objective
from lightning_condensa.objectives.several import Several
from lightning_condensa.objectives.size import FileSize, FLOPs, MemoryFootprint, Parameters
from lightning_condensa.objectives.timing import Latency, Throughput

__all__ = [
    "CallableObjective",
    "Direction",
    "FLOPs",
    "FileSize",
    "Latency",
    "MemoryFootprint",
    "Objective",
    "Parameters",
    "Several",
    "Throughput",
    "as_objective",
]
