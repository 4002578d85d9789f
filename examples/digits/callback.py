"""L-C in an ordinary training script: one scheme, one callback, one ``fit``.

python examples/digits/callback.py
"""

from __future__ import annotations

import pytorch_lightning as pl
from model import DigitsCNN, DigitsData, train_dense

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize, load_compressed


def main() -> None:
    """Compress a trained network to 2 % of its weights in half precision."""
    model = train_dense()
    data = DigitsData()
    scheme = Compose([Prune(density=0.02), Quantize("float16")])
    lc = CondensaCallback(scheme, monitor="val_acc")
    trainer = pl.Trainer(
        max_epochs=60, check_val_every_n_epoch=4, callbacks=[lc], default_root_dir="runs/callback"
    )
    trainer.test(model, datamodule=data)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)  # the module holds the compressed weights now
    print(lc.report())
    print(f"{lc.compressed.save('digits.condensa'):,} bytes in digits.condensa")
    load_compressed("digits.condensa", DigitsCNN())


if __name__ == "__main__":
    main()
