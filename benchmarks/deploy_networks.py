"""The networks of the deploy benchmark, for 32 x 32 pixels and 10 classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks import CLASSES, Residual, vgg19_bn
from torch import Tensor, nn
from torch.nn import functional


def alexnet() -> nn.Sequential:
    """Krizhevsky et al.'s network as it is used for CIFAR, with two hidden linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, CLASSES),
    )


def resnet20() -> nn.Sequential:
    """He et al.'s 20 layers for CIFAR, with 1 x 1 convolutions where the shape changes."""
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks: list[nn.Module] = []
    channels = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for position in range(3):
            blocks.append(Residual(channels, width, stride if position == 0 else 1))
            channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]
    return nn.Sequential(*stem, *blocks, *head)


class Inverted(nn.Module):
    """Sandler et al.'s block: expand, depthwise, project, and add where shapes agree."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int = 6) -> None:
        super().__init__()
        wide = channels * expansion
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet() -> nn.Sequential:
    """MobileNetV2 with ten blocks."""
    blocks: list[nn.Module] = []
    channels = 16
    for out, stride, count in ((24, 1, 2), (32, 2, 3), (64, 2, 3), (96, 1, 2)):
        for position in range(count):
            blocks.append(Inverted(channels, out, stride if position == 0 else 1))
            channels = out
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *blocks,
        *(nn.Conv2d(channels, 384, 1, bias=False), nn.BatchNorm2d(384), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(384, CLASSES)),
    )


class Attention(nn.Module):
    """Self-attention with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens ``(batch, tokens, width)``."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    """A pre-norm layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al.'s Transformer in the tiny size, over 4 x 4 patches."""

    def __init__(self, width: int = 192, layers: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.layers = nn.Sequential(*(Encoder(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "VGG-19-BN": vgg19_bn,
    "AlexNet": alexnet,
    "ResNet-20": resnet20,
    "MobileNet-like": mobilenet,
    "ViT-tiny": ViT,
}


def build(network: str) -> nn.Module:
    """A network with random weights, and statistics and norms as if it had been trained."""
    torch.manual_seed(0)
    module = NETWORKS[network]().eval().requires_grad_(False)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr,operator]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(0, 0.1)
    return module
