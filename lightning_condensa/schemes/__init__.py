"""What to compress and how: schemes, their composition and their configuration."""

from lightning_condensa.schemes.add import Add
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import BoundScheme
from lightning_condensa.schemes.codebook import Codebook
from lightning_condensa.schemes.combined import SumOfProducts
from lightning_condensa.schemes.compose import Compose
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.encoding import Encoding
from lightning_condensa.schemes.finite import NotFiniteError
from lightning_condensa.schemes.groups import per_group
from lightning_condensa.schemes.heads import HeadPrune
from lightning_condensa.schemes.hidden import HiddenPrune
from lightning_condensa.schemes.lowrank import LowRank
from lightning_condensa.schemes.prune import Prune
from lightning_condensa.schemes.quantize import Quantize
from lightning_condensa.schemes.selection import SelectionError, Skipped, Target
from lightning_condensa.schemes.slices import FilterPrune, NeuronPrune
from lightning_condensa.schemes.space import Choice, Range
from lightning_condensa.schemes.structured import BlockPrune, NMPrune

__all__ = [
    "Add",
    "BlockPrune",
    "BoundScheme",
    "Choice",
    "Codebook",
    "Compose",
    "Encoded",
    "Encoding",
    "FilterPrune",
    "HeadPrune",
    "HiddenPrune",
    "LowRank",
    "NMPrune",
    "NeuronPrune",
    "NotFiniteError",
    "Prune",
    "Quantize",
    "Range",
    "Scheme",
    "SelectionError",
    "Skipped",
    "SumOfProducts",
    "Target",
    "per_group",
]
