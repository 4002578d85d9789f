"""The main job: find the smallest network that keeps its accuracy, and walk away with the file.

Trains a small CNN on handwritten digits, searches how far it can be pruned and stored in half
precision within one point of validation accuracy, and compares what came out with the original:

    python examples/digits/search.py
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from model import DigitsCNN, DigitsData, train_dense
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.utils.benchmark import Timer

from lightning_condensa import (
    Compose,
    CondensaSearch,
    MemoryFootprint,
    Prune,
    Quantize,
    Range,
    load_compressed,
)

console = Console()


def main() -> None:
    """Train, search, compare, save, and check the file in a process of its own."""
    args = parse_arguments()
    quiet()
    torch.set_num_threads(1)  # images of 8 x 8 pixels: more threads only wait for each other
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = DigitsData(seed=args.seed)

    console.rule("1  a dense network")
    dense = dense_network(out / "dense.safetensors", args.seed)
    console.print(f"{sum(p.numel() for p in dense.parameters()):,} weights")

    console.rule("2  the search")
    scheme = Compose([Prune(density=Range(0.002, 1.0, log=True)), Quantize("float16")])
    search = CondensaSearch(
        scheme,
        objective=MemoryFootprint(),
        metric="val_acc",
        tolerance=args.tolerance,
        confidence=args.confidence,
        max_trials=args.trials,
        trainer={"max_epochs": args.epochs, "check_val_every_n_epoch": 4},
        dirpath=out,
        seed=args.seed,
    )
    result = search.fit(dense, datamodule=data)
    console.print(result.table())
    console.print(result.summary())
    result.save(out / "result")
    if result.best is None:
        sys.exit("nothing to save: no trial kept the accuracy")

    console.rule("3  before and after")
    packed = out / "result" / "best.condensa"
    compressed = load_compressed(packed, DigitsCNN())
    figures = {
        "dense": measure(dense, out / "dense.safetensors", data),
        "compressed": measure(compressed, packed, data),
    }
    console.print(comparison(figures))
    report = {"seed": args.seed, "best": result.best.values, "trials": len(result.trials)}
    (out / "figures.json").write_text(json.dumps({**report, **figures}, indent=1))

    console.rule("4  the file, in a second process")
    images = test_images(data)
    save_file({"outputs": outputs(compressed, images)}, out / "outputs.safetensors")
    command = [sys.executable, __file__, "--verify", str(packed), str(out / "outputs.safetensors")]
    subprocess.run(command, check=True)
    console.print(
        f"\nplots and models: {out / 'result'}\ncurves:           tensorboard --logdir {out}"
    )


def dense_network(path: Path, seed: int) -> DigitsCNN:
    """The trained network; kept in a file so that an interrupted search starts from the same."""
    if not path.exists():
        save_file(train_dense(seed).state_dict(), path)
    model = DigitsCNN()
    model.load_state_dict(load_file(path))
    return model.eval()


def measure(model: DigitsCNN, path: Path, data: DigitsData) -> dict[str, float]:
    """Test accuracy, weights, bytes on disk and time per image."""
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    model.eval()
    images = test_images(data)[:64]
    with torch.inference_mode():
        timer = Timer("model(images)", globals={"model": model, "images": images})
        seconds = timer.blocked_autorange(min_run_time=0.5).median / len(images)
    return {
        "test accuracy": tested["test_acc"],
        "non-zero weights": sum(int(torch.count_nonzero(p)) for p in model.parameters()),
        "bytes on disk": path.stat().st_size,
        "µs per image": seconds * 1e6,
    }


def comparison(figures: dict[str, dict[str, float]]) -> Table:
    """Dense and compressed side by side."""
    table = Table("", "dense", "compressed", "ratio", title="before and after")
    for name, before in figures["dense"].items():
        after = figures["compressed"][name]
        if name == "test accuracy":
            cells = (f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.2f} points")
        else:
            cells = (f"{before:,.0f}", f"{after:,.0f}", f"{before / after:.1f} ×")
        table.add_row(name, *cells)
    table.caption = "eager PyTorch computes with the zeros: the gain of this scheme is the file"
    return table


def test_images(data: DigitsData) -> torch.Tensor:
    """The test images, ``(400, 1, 8, 8)``."""
    data.setup("test")
    images: torch.Tensor = data.test.tensors[0]
    return images


def outputs(model: DigitsCNN, images: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(images)
    return logits


def verify(packed: str, expected: str) -> None:
    """Load the packed file and compare outputs, bit for bit."""
    torch.set_num_threads(1)
    model = load_compressed(packed, DigitsCNN())
    found = outputs(model, test_images(DigitsData()))
    if not torch.equal(found, load_file(expected)["outputs"]):
        sys.exit(f"{packed}: the loaded model gives other outputs")
    console.print(f"loaded {packed}: all {found.numel():,} outputs are equal, bit for bit")


def quiet() -> None:
    """Leave the terminal to the search's own progress bars."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60, help="of each trial")
    parser.add_argument("--tolerance", type=float, default=0.01, help="drop in accuracy")
    parser.add_argument("--confidence", type=float, default=0.9, help="that it is kept")
    parser.add_argument("--out", default="runs/digits", help="an interrupted search goes on there")
    parser.add_argument("--verify", nargs=2, metavar=("FILE", "OUTPUTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.verify:
        verify(*args.verify)
        sys.exit()
    return args


if __name__ == "__main__":
    main()
