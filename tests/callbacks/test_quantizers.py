"""L-C with every quantizer: what training ends with, and that it beats rounding once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional

from lightning_condensa import (
    Codebook,
    Compose,
    CondensaCallback,
    DirectCompression,
    Prune,
    Quantize,
    Scheme,
)

SCHEMES: dict[str, tuple[Scheme, int]] = {
    "int4": (Quantize("int4"), 15),
    "int4 by group": (Quantize("int4", granularity="group:4"), 15),
    "int2": (Quantize("int2", symmetric=False), 4),
    "ternary": (Quantize("ternary", granularity="tensor"), 3),
    "binary": (Quantize("binary"), 2),
    "float8": (Quantize("float8_e4m3fn"), 256),
    "codebook": (Codebook(2), 2),
    "prune, binary": (Compose([Prune(0.5), Quantize("binary")]), 3),
    "prune, codebook": (Compose([Prune(0.5), Codebook(4)]), 5),
}
QUICK = {"int4", "binary", "codebook", "prune, binary"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCHEMES]
)
def test_training_ends_on_the_grid_and_beats_rounding_once(  # type: ignore[no-untyped-def]
    net, net_class, trainer, loader, batches, name: str
) -> None:
    class Annealed(net_class):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            steps = int(self.trainer.estimated_stepping_batches)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
            scheduler = {"scheduler": cosine, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    scheme, levels = SCHEMES[name]
    dense = net(cls=Annealed)
    trainer(max_epochs=10).fit(dense, loader)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(callback: pl.Callback) -> float:
        module = copy.deepcopy(dense)
        trainer(callback, max_epochs=40).fit(module, loader)
        theta = callback.compressed.theta  # type: ignore[attr-defined]
        for key, encoded in theta.items():
            assert torch.equal(module.get_parameter(key).detach(), encoded.decode())
            assert len(encoded.codes.float().unique()) <= levels
        with torch.no_grad():
            return float(functional.cross_entropy(module.eval()(x), y))

    ours, once = loss(CondensaCallback(scheme)), loss(DirectCompression(scheme))
    # Eight bits lose nothing either way.
    assert ours < once * (1.05 if name == "float8" else 1.0) + 0.01
