"""Small versions of architectures whose channels are tied in different ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def vgg() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *conv_bn(8, 12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(10, 5),
    )


class AlexNet(nn.Module):
    """Biases, no norms, and a view in the place of a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(6 * 16, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        inner = outputs // 2 if bottleneck else outputs
        if bottleneck:
            layers = [*conv_bn(inputs, inner, 1), nn.ReLU(), *conv_bn(inner, inner, 3, stride)]
            layers += [nn.ReLU(), *conv_bn(inner, outputs, 1)]
        else:
            layers = [*conv_bn(inputs, inner, 3, stride), nn.ReLU(), *conv_bn(inner, outputs)]
        self.path = nn.Sequential(*layers)
        change = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*conv_bn(inputs, outputs, 1, stride) if change else [])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.path(x)
        out += self.shortcut(x)
        return self.relu(out)


def resnet(bottleneck: bool = False) -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 8),
        nn.ReLU(),
        Block(8, 8, 1, bottleneck),
        Block(8, 12, 2, bottleneck),
        Block(12, 12, 1, bottleneck),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


class Shifted(nn.Module):
    """ResNet for CIFAR with parameter-free shortcuts: channels are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
        self.path = nn.Sequential(*conv_bn(6, 10, 3, 2), nn.ReLU(), *conv_bn(10, 10))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(self.path(x) + shortcut).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, 4)
        self.up = nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate = x.mean((2, 3)).view(batch, channels)
        gate = torch.sigmoid(self.up(F.silu(self.down(gate)))).view(batch, channels, 1, 1)
        return x * gate.expand_as(x)


class Inverted(nn.Module):
    """Inverted residual: expand, depthwise, gate, project."""

    def __init__(self, inputs: int, outputs: int, wide: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(inputs, wide, 1),
            nn.ReLU6(),
            *conv_bn(wide, wide, groups=wide),
            nn.Hardswish(),
            Squeeze(wide),
            *conv_bn(wide, outputs, 1),
        )
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 6, stride=2),
        nn.ReLU6(),
        Inverted(6, 8, 12),
        Inverted(8, 8, 12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def resnext() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 12),
        nn.ReLU(),
        *conv_bn(12, 8, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class UNet(nn.Module):
    """Skips by concatenation, upsampling by transposed convolutions and by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
        self.down2 = nn.Sequential(nn.MaxPool2d(2), *conv_bn(6, 8), nn.LeakyReLU())
        self.down3 = nn.Sequential(nn.MaxPool2d(2), *conv_bn(8, 10), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(10, 7, 2, 2)
        self.merge2 = nn.Sequential(*conv_bn(15, 9), nn.ReLU())
        self.merge1 = nn.Sequential(*conv_bn(15, 6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(first)
        third = self.up2(self.down3(second))
        second = self.merge2(torch.cat([second, third], dim=1))
        wide = F.interpolate(second, scale_factor=2, mode="bilinear")
        return self.head(self.merge1(torch.cat([first, wide], dim=1)))


class DenseNet(nn.Module):
    """Norms after concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (6, 10, 14))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (6, 10))
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(F.relu(self.norms[-1](torch.cat(features, 1))).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention in three styles: torch's, separate projections, one fused projection."""

    def __init__(self, width: int, heads: int, style: str) -> None:
        super().__init__()
        self.style, self.heads = style, heads
        if style == "torch":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        elif style == "separate":
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        if self.style == "torch":
            return self.out(self.attention(x, x, x, need_weights=False)[0])
        if self.style == "separate":
            shape = (batch, tokens, self.heads, width // self.heads)
            q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
            weights = (q @ k.transpose(-2, -1) / shape[-1] ** 0.5).softmax(-1)
            mixed = weights @ v
        else:
            shape = (batch, tokens, 3, self.heads, width // self.heads)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    def __init__(self, width: int, style: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2, style)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.layers = nn.Sequential(Encoder(8, style), Encoder(8, style))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


class Gated(nn.Module):
    """A table of embeddings, gated units in halves, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 16)
        self.narrow = nn.Linear(8, 7)
        self.recurrent = nn.LSTM(7, 5, batch_first=True)
        self.scale = nn.Parameter(torch.randn(5))
        self.hidden = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(self.table(x)).chunk(2, dim=-1)
        x = self.narrow(F.silu(a) * b)
        x = self.recurrent(x)[0] * self.scale
        return self.head(torch.tanh(self.hidden(x)))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


_IMAGE = torch.zeros(2, 3, 16, 16)

#: Builders with example inputs.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "vgg": (vgg, _IMAGE),
    "alexnet": (AlexNet, torch.zeros(2, 3, 24, 24)),
    "resnet": (resnet, _IMAGE),
    "bottleneck": (lambda: resnet(bottleneck=True), _IMAGE),
    "shifted": (Shifted, _IMAGE),
    "mobilenet": (mobilenet, _IMAGE),
    "resnext": (resnext, _IMAGE),
    "unet": (UNet, _IMAGE),
    "densenet": (DenseNet, _IMAGE),
    "vit, torch": (lambda: ViT("torch"), _IMAGE),
    "vit, separate": (lambda: ViT("separate"), _IMAGE),
    "vit, fused": (lambda: ViT("fused"), _IMAGE),
    "transformer": (transformer, torch.zeros(2, 5, 8)),
    "gated": (Gated, torch.zeros(2, 4, dtype=torch.long)),
}


@torch.no_grad()
def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with random parameters and statistics, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
            elif tensor.dim() > 1:
                tensor.mul_(tensor[0].numel() ** -0.5)
    return module


def inputs_like(example: Tensor, seed: int = 1) -> Tensor:
    """Random inputs of the shape of an example."""
    generator = torch.Generator().manual_seed(seed)
    if not example.is_floating_point():
        return torch.randint(0, 11, example.shape, generator=generator)
    return torch.randn(example.shape, generator=generator, dtype=torch.float64)
