"""Model compression for PyTorch Lightning."""

from lightning_condensa.callbacks import (
    CondensaCallback,
    DirectCompression,
    Distillation,
    MaskedFineTune,
    compress_ladder,
    geometric_densities,
)
from lightning_condensa.deploy import CompressedModel, OnnxReport, PackedFileError, load_compressed
from lightning_condensa.objectives import (
    FileSize,
    FLOPs,
    Latency,
    MemoryFootprint,
    Parameters,
    Throughput,
)
from lightning_condensa.schemes import (
    Add,
    BlockPrune,
    Choice,
    Codebook,
    Compose,
    FilterPrune,
    HeadPrune,
    LowRank,
    NeuronPrune,
    NMPrune,
    Prune,
    Quantize,
    Range,
    Scheme,
)
from lightning_condensa.search import CondensaSearch
from lightning_condensa.version import __version__

__all__ = [
    "Add",
    "BlockPrune",
    "Choice",
    "Codebook",
    "CompressedModel",
    "Compose",
    "CondensaCallback",
    "CondensaSearch",
    "DirectCompression",
    "Distillation",
    "FLOPs",
    "FileSize",
    "FilterPrune",
    "HeadPrune",
    "Latency",
    "LowRank",
    "MaskedFineTune",
    "MemoryFootprint",
    "NMPrune",
    "NeuronPrune",
    "OnnxReport",
    "PackedFileError",
    "Parameters",
    "Prune",
    "Quantize",
    "Range",
    "Scheme",
    "Throughput",
    "__version__",
    "compress_ladder",
    "geometric_densities",
    "load_compressed",
]
