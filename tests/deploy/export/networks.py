"""Small networks of every kind, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional


class ConvNet(nn.Module):
    """Convolutions with batch norm, one of them depthwise, a residual addition, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.other_norm = nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = (self.other_norm(self.second(x)) + x).relu()
        return self.head(functional.relu6(self.third(x)).flatten(1))


class Perceptron(nn.Module):
    """A linear layer that is called twice, with batch norm after a first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.twice = nn.Linear(16, 16)
        self.last = nn.Linear(16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.twice(self.twice(x).relu()).relu())


class Encoder(nn.Module):
    """An embedding and a Transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@dataclass(frozen=True)
class Case:
    """A network, and what gives it inputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]

    def network(self) -> nn.Module:
        """The network in training mode, with batch statistics of its own data."""
        torch.manual_seed(0)
        module = self.build().train()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(part.weight, -1.0, 1.0)
                nn.init.uniform_(part.bias, -1.0, 1.0)
        with torch.no_grad():
            for _ in range(10):
                module(self.inputs(32))
        return module


CASES = {
    "convolutions": Case(ConvNet, lambda n: torch.randn(n, 1, 8, 8)),
    "perceptron": Case(Perceptron, lambda n: torch.randn(n, 8)),
    "encoder": Case(Encoder, lambda n: torch.randint(0, 20, (n, 5))),
    "recurrent": Case(Recurrent, lambda n: torch.randn(n, 5, 8)),
}


def runtime(path: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Exact sums on processors whose 8-bit products saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Tensor) -> Tensor:
    """The first output of an ONNX file."""
    session = runtime(path)
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def evaluate(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The output of a module in evaluation mode."""
    with torch.no_grad():
        output: Tensor = module.eval()(*inputs)
    return output


def constants(path: Path) -> dict[str, Any]:
    """The constants in an ONNX file by name."""
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def integer_types(path: Path) -> set[Any]:
    """Types of the constants in a file that are stored as integers of at most a byte."""
    return {c.dtype for c in constants(path).values() if c.dtype.itemsize == 1} - {np.dtype(bool)}
