"""Fine-tuning of a pruned module: what is zero stays zero."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_condensa.callbacks.sharded import gathered, placed_like
from lightning_condensa.functional.placement import reshard
from lightning_condensa.lc import Support
from lightning_condensa.schemes.selection import WEIGHT_TYPES, is_norm, select


class MaskedFineTune(Callback):
    """Train a module that was pruned before, keeping its zeros (Condensa's ``FineTuner``).

    Learning-rate rewinding (Renda et al., arXiv:2003.02389) needs nothing more: let
    ``configure_optimizers`` return the schedule of the original training.

    Args:
        biases: Whether zeros in the biases of the same layers are kept, too, and the channels of
            norm layers of which both γ and β are zero.

    Example:
        >>> from lightning_condensa import MaskedFineTune
        >>> trainer = pl.Trainer(max_epochs=2, callbacks=[MaskedFineTune()], logger=False)
    """

    def __init__(self, biases: bool = True) -> None:
        self.biases = biases
        self._support: Support | None = None
        self._parameters: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the state of a checkpoint that was loaded before, by ``trainer.test`` say."""
        self._masks = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the zeros are.

        Raises:
            ValueError: If there are none.
        """
        reshard(pl_module)
        targets = select(pl_module, WEIGHT_TYPES)
        names = [t.name for t in targets]
        if self.biases:
            names += [t.bias for t in targets if t.bias is not None]
        named = dict(pl_module.named_parameters())
        if self._masks is None:
            support = Support.nonzero({n: named[n] for n in names})
            if self.biases:
                support.masks.update(_removed_channels(pl_module))
        else:
            masks = placed_like(self._masks, named)
            support = Support({n: m.to(named[n].device) for n, m in masks.items()})
            self._masks = None
        if not support.masks:
            raise ValueError(
                f"MaskedFineTune found no zeros in the weights of {type(pl_module).__name__}: "
                "prune it first, or train without this callback"
            )
        self._support = support
        self._parameters = {n: named[n] for n in support.masks}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep pruned weights out of gradient clipping and the optimizer's statistics."""
        assert self._support is not None
        self._support.mask_gradients(self._parameters)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Undo what a restored momentum may have moved."""
        assert self._support is not None
        self._support.apply(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return {} if self._support is None else {"masks": gathered(self._support.masks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the masks of the interrupted run: a weight may have become zero by chance."""
        self._masks = state_dict.get("masks")


def _removed_channels(module: nn.Module) -> dict[str, Tensor]:
    """What to keep of γ and β, by name, where some channels have neither."""
    masks: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        weight, bias = (getattr(layer, key, None) for key in ("weight", "bias"))
        if is_norm(layer) and weight is not None and bias is not None:
            kept = (weight.detach() != 0) | (bias.detach() != 0)
            if not bool(kept.all()):
                masks |= {f"{name}.{key}".lstrip("."): kept for key in ("weight", "bias")}
    return masks
