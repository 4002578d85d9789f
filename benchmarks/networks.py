"""The networks of the accuracy study, in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Autocast(nn.Module):
    """Runs a network for images in bfloat16 and channels-last, logits in float32.

    The casts are part of the network so that every method trains it alike, also one that has
    its own training loop. A CPU without AVX-512 runs it in float32: it has no bfloat16 either, and
    would take fifty times as long.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch, 10)`` for images of shape ``(batch, 3, 32, 32)``."""
        native = x.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=native):
            logits: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return logits.float()


def vgg(width: int = 24) -> nn.Module:
    """Six convolutions with batch norm, strided instead of pooled; 162,994 parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for out, stride in zip((1, 1, 2, 2, 4, 4), (2, 1, 2, 1, 2, 1), strict=True):
        layers += _convolution(channels, out * width, stride)
        channels = out * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return Autocast(nn.Sequential(*layers))


VGG19 = (64, 64, 0, 128, 128, 0, *4 * (256,), 0, *4 * (512,), 0, *4 * (512,), 0)


def vgg19_bn() -> nn.Sequential:
    """Simonyan and Zisserman's 19 layers for 32 x 32 pixels, with one linear layer; 20 million."""
    layers: list[nn.Module] = []
    channels = 3
    for out in VGG19:  # 0 is a pooling
        layers += _convolution(channels, out, 1) if out else [nn.MaxPool2d(2)]
        channels = out or channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, CLASSES))


def perceptron(width: int = 1024) -> nn.Sequential:
    """Three hidden layers for 32 x 32 pixels; 5.3 million parameters."""
    sizes = (3 * 32 * 32, width, width, width)
    hidden = [
        layer
        for features, out in pairwise(sizes)
        for layer in (nn.Linear(features, out), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES))


def resnet8(width: int = 24) -> nn.Module:
    """He et al.'s CIFAR ResNet with one block a stage and a strided stem; 174,274 parameters."""
    return Autocast(
        nn.Sequential(
            *_convolution(3, width, 2),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )
    )


class Residual(nn.Module):
    """A basic block; the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolution(channels, out, stride))
        self.second = nn.Sequential(*_convolution(out, out, 1)[:2])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways, rectified."""
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class PatchTransformer(nn.Module):
    """A pre-norm Transformer encoder over the 2 x 2 patches of an 8 x 8 image."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch, 10)`` for images of shape ``(batch, 1, 8, 8)``."""
        patches = functional.unfold(x, 2, stride=2).transpose(1, 2)
        hidden = self.encoder(self.embed(patches) + self.position)
        logits: Tensor = self.head(self.norm(hidden.mean(1)))
        return logits


class CharLSTM(nn.Module):
    """A one-layer LSTM over characters."""

    def __init__(self, vocabulary: int, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch * time, characters)`` for codes ``(batch, time)``."""
        logits: Tensor = self.head(self.lstm(self.embed(x))[0]).flatten(0, 1)
        return logits


def _convolution(channels: int, out: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]
