"""The channel graph: which slices of which parameters belong together.

Depends on torch alone. :func:`trace` follows the channels of a module through its exported graph;
schemes prune by it, and :mod:`lightning_condensa.deploy` removes by it.
"""

from lightning_condensa.graph.channels import FIXED, ChannelGraph, Resize
from lightning_condensa.graph.definitions import Norm, Product, Removal
from lightning_condensa.graph.liveness import removable
from lightning_condensa.graph.trace import (
    TraceError,
    evaluating,
    example_arguments,
    trace,
    trace_example,
)

__all__ = [
    "FIXED",
    "ChannelGraph",
    "Norm",
    "Product",
    "Removal",
    "Resize",
    "TraceError",
    "evaluating",
    "example_arguments",
    "removable",
    "trace",
    "trace_example",
]
