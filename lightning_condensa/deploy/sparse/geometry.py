"""Where a convolution's inputs lie: the numbers that the kernel works with."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from torch import Tensor, nn

_INT32 = 2**31


@dataclass(frozen=True)
class Window:
    """How a filter moves over its input; pairs are rows, then columns.

    Attributes:
        size: Weights of one channel.
        stride: Distance of neighbouring outputs.
        dilation: Distance of neighbouring weights.
        before: Zeros above and left of the input.
        after: Zeros below and right of it.
    """

    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window:
        """The window of a convolution; ``padding="same"`` puts the odd zero after, as torch."""
        size, stride, dilation = (_pair(v) for v in (conv.kernel_size, conv.stride, conv.dilation))
        if isinstance(conv.padding, str):
            total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
            total = total if conv.padding == "same" else [0, 0]
            before = (total[0] // 2, total[1] // 2)
            return cls(size, stride, dilation, before, (total[0] - before[0], total[1] - before[1]))
        padding = _pair(conv.padding)
        return cls(size, stride, dilation, padding, padding)

    @property
    def phases(self) -> tuple[int, int]:
        """How many remainders of rows, and of columns, the weights see."""
        (h, w), (sh, sw), (dh, dw) = self.size, self.stride, self.dilation
        return min(h, sh // math.gcd(sh, dh)), min(w, sw // math.gcd(sw, dw))

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result.

        Raises:
            ValueError: If the input is smaller than the filter.
        """
        found = []
        for axis, length in enumerate((height, width)):
            padded = self.before[axis] + length + self.after[axis]
            reach = self.dilation[axis] * (self.size[axis] - 1) + 1
            found.append((padded - reach) // self.stride[axis] + 1 if padded >= reach else 0)
        if min(found) < 1:
            raise ValueError(
                f"input of {height} x {width} is smaller than the filter: kernel size {self.size}, "
                f"dilation {self.dilation}, padding {self.before}"
            )
        return found[0], found[1]


class Geometry(ctypes.Structure):
    """``geometry`` of ``kernel.c``, field by field."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("samples", "channels", "height", "width"),
            *("filters", "out_height", "out_width"),
            *("top", "left", "stride_h", "stride_w", "dilation_h", "dilation_w"),
            *("phases_h", "phases_w", "rows", "columns", "relu", "pool"),
        )
    ]

    samples: int
    rows: int
    columns: int
    phases_h: int
    phases_w: int
    channels: int

    @classmethod
    def of(
        cls, window: Window, shape: tuple[int, ...], filters: int, *, relu: bool, pool: int
    ) -> Geometry:
        """The geometry of one call.

        Args:
            window: Of the convolution.
            shape: Of the input: samples, channels, height, width.
            filters: Output channels.
            relu: Whether to rectify.
            pool: Side of the max pooling that follows, 1 for none.

        Raises:
            ValueError: If the input is smaller than the filter, or too large for the kernel.
        """
        samples, channels, height, width = shape
        out_height, out_width = window.outputs(height, width)
        if min(out_height, out_width) < pool:
            raise ValueError(f"outputs of {out_height} x {out_width} are smaller than pool {pool}")
        reach = [d * (k - 1) // s for k, d, s in _axes(window)]
        geometry = cls(
            *(samples, channels, height, width, filters, out_height, out_width),
            *(*window.before, *window.stride, *window.dilation, *window.phases),
            *(out_height + reach[0], out_width + reach[1], relu, pool),
        )
        if geometry.plane * channels * math.prod(window.phases) >= _INT32:
            raise ValueError(f"an input of shape {tuple(shape)} is too large for the sparse kernel")
        return geometry

    @property
    def plane(self) -> int:
        """Inputs of one phase of one channel, over all samples."""
        return self.samples * self.rows * self.columns

    def offsets(self, window: Window, columns: Tensor) -> Tensor:
        """Where the input that each weight multiplies begins.

        Args:
            window: Of the convolution.
            columns: Indices into the flattened channels, rows and columns of a filter.

        Returns:
            int32, of the same shape.
        """
        (kh, kw), (sh, sw), (dh, dw) = window.size, window.stride, window.dilation
        channel, i, j = columns // (kh * kw), columns // kw % kh, columns % kw
        phase = (channel * self.phases_h + i % self.phases_h) * self.phases_w + j % self.phases_w
        shift = i * dh // sh * self.columns + j * dw // sw
        return (phase * self.plane + shift * self.samples).int()


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _axes(window: Window) -> list[tuple[int, int, int]]:
    return list(zip(window.size, window.dilation, window.stride, strict=True))
