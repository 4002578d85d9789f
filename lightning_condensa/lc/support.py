"""Training on a fixed support: what a scheme pruned stays exactly zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_condensa.schemes import Encoding


class Support:
    """The elements of each parameter that may be non-zero.

    Args:
        masks: Boolean tensors by parameter name, of the parameters' shapes.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    @classmethod
    def of(cls, theta: Mapping[str, Encoding]) -> Support:
        """The support of θ: its masks where it was pruned."""
        return cls({n: e.mask for n, e in theta.items() if e.mask is not None})

    @classmethod
    def nonzero(cls, weights: Mapping[str, Tensor]) -> Support:
        """The support of weights that already hold zeros."""
        return cls({n: w.detach() != 0 for n, w in weights.items() if bool((w == 0).any())})

    @torch.no_grad()
    def mask_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Zero the gradients outside the support, in place."""
        grads = {n: parameters[n].grad for n in self.masks}
        self.apply({n: g for n, g in grads.items() if g is not None})

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the tensors outside the support, in place."""
        for name, tensor in tensors.items():
            if name in self.masks:
                tensor.detach().masked_fill_(~self.masks[name], 0)
