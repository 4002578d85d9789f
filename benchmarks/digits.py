"""The digits task as the benchmarks see it: data, dense starting points, how θ is measured."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

MODEL = Path(__file__).parents[1] / "examples" / "digits" / "model.py"
sys.path.insert(0, str(MODEL.parent))

from model import DigitsCNN as DigitsCNN  # noqa: E402
from model import DigitsData, train_dense  # noqa: E402

STEPS_PER_EPOCH = 16
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Start:
    """A dense network, its data and seed: where every method begins."""

    seed: int
    weights: dict[str, Tensor]
    data: DigitsData

    def model(self, **hparams: float) -> DigitsCNN:
        """Return a new copy of the dense network."""
        model = DigitsCNN(**hparams)
        model.load_state_dict(self.weights)
        return model


def silence() -> None:
    """Keep Lightning's start-up messages out of the tables."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that fix the task: densities and lengths in epochs of 16 steps."""
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.02, 0.005])
    parser.add_argument("--epochs", type=int, default=96, help="of compression")
    parser.add_argument("--dense-epochs", type=int, default=30, help="of the dense network")


def dense_start(seed: int, epochs: int, scratch: Path | None = None) -> Start:
    """Train the dense network of a seed, or read it from the scratch folder."""
    folder = scratch or Path(tempfile.gettempdir()) / "lightning-condensa-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    version = hashlib.sha256(MODEL.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    path = folder / f"digits-seed{seed}-epochs{epochs}-{version}.safetensors"
    if not path.exists():
        save_file(train_dense(seed, epochs).state_dict(), path)
    data = DigitsData(seed=seed)
    data.setup()
    return Start(seed, load_file(path), data)


def prunable(model: nn.Module) -> list[Tensor]:
    """Return the weights of all Linear and Conv2d layers, the tensors that `Prune` selects."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def density(model: nn.Module) -> float:
    """Return the share of non-zeros among the prunable weights, counted."""
    weights = prunable(model)
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


@torch.no_grad()
def accuracy(model: nn.Module, images: TensorDataset) -> float:
    """Return the share of images classified correctly, computed in the model's own dtype."""
    x, y = images.tensors
    dtype = next(model.parameters()).dtype
    return float((model.eval()(x.to(dtype)).argmax(1) == y).float().mean())
