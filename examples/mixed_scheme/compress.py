"""Every layer in its own way: filters, blocks, int8 and int4 in one YAML file.

python examples/mixed_scheme/compress.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytorch_lightning as pl

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "digits"))  # the network and data of the other examples

from model import DigitsCNN, DigitsData, train_dense  # noqa: E402

from lightning_condensa import CondensaCallback, Scheme, load_compressed  # noqa: E402


def main() -> None:
    """Compress a trained network by ``scheme.yaml`` and load the file that is left of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30, help="of training, dense and compressed")
    parser.add_argument("--scheme", type=Path, default=HERE / "scheme.yaml")
    arguments = parser.parse_args()

    scheme = Scheme.from_yaml(arguments.scheme.read_text())
    model, data = train_dense(max_epochs=arguments.epochs), DigitsData()
    lc = CondensaCallback(scheme)
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        callbacks=[lc],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (dense,) = trainer.test(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    size = lc.compressed.save("mixed.condensa")
    (compressed,) = trainer.test(
        load_compressed("mixed.condensa", DigitsCNN()), datamodule=data, verbose=False
    )
    print(lc.report())
    print(f"test accuracy {dense['test_acc']:.2%} dense, {compressed['test_acc']:.2%} compressed")
    print(f"{sum(p.numel() * 4 for p in model.parameters()):,} bytes dense, {size:,} in the file")


if __name__ == "__main__":
    main()
