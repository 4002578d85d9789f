"""Compression during training, as Lightning callbacks."""

from lightning_condensa.callbacks.condensa import CondensaCallback
from lightning_condensa.callbacks.direct import DirectCompression
from lightning_condensa.callbacks.distillation import Distillation
from lightning_condensa.callbacks.ladder import compress_ladder, geometric_densities
from lightning_condensa.callbacks.masked_finetune import MaskedFineTune

__all__ = [
    "CondensaCallback",
    "DirectCompression",
    "Distillation",
    "MaskedFineTune",
    "compress_ladder",
    "geometric_densities",
]
