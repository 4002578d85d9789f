"""The bundled kernel computes what torch computes, for any window, shape, group and thread."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import reduce

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa.deploy.sparse.direct import DirectLayer
from lightning_condensa.deploy.sparse.layers import DenseLayer, Epilogue, SparseLayer
from lightning_condensa.deploy.sparse.matrix import MatrixLayer, block_side
from lightning_condensa.deploy.threads import torch_threads

PLAIN = Epilogue()


def sparse_layer(layer: nn.Module, density: float, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer.requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < density)
    return layer


def agree(
    layer: nn.Module, x: Tensor, epilogue: Epilogue = PLAIN, kinds: str = "direct csr"
) -> None:
    """Check against float64, within the rounding of a float32 sum."""
    dense = DenseLayer(layer, epilogue)
    exact = deepcopy(dense).double()(x.double())
    makers = {"direct": DirectLayer, "csr": MatrixLayer, "bsr": lambda d: MatrixLayer(d, 4)}
    for kind in kinds.split():
        ours = makers[kind](dense)(x)
        assert ours.shape == exact.shape
        assert ours.is_contiguous()
        limit = 1e-5 * max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=limit)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(
    channels=st.integers(1, 5),
    filters=st.integers(1, 5),
    size=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.just("valid")),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    samples=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    relu=st.booleans(),
    pool=st.integers(1, 3),
)
def test_any_convolution(
    channels, filters, size, stride, dilation, padding, shape, samples, density, bias, relu, pool
) -> None:
    layer = nn.Conv2d(channels, filters, size, stride, padding, dilation, bias=bias)
    around = (0, 0) if padding == "valid" else padding
    for axis in (0, 1):
        length = shape[axis] + 2 * around[axis] - dilation[axis] * (size[axis] - 1) - 1
        assume(length >= 0 and length // stride[axis] + 1 >= pool)
    x = torch.randn(samples, channels, *shape)
    agree(sparse_layer(layer, density), x, Epilogue(relu, pool))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 5)])
def test_padding_that_keeps_the_shape(size: tuple[int, int], dilation: int) -> None:
    layer = sparse_layer(nn.Conv2d(3, 4, size, padding="same", dilation=dilation), 0.4)
    agree(layer, torch.randn(2, 3, 9, 11))


@settings(max_examples=60, deadline=None)
@given(
    features=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    leading=st.lists(st.integers(1, 6), max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    bias=st.booleans(),
    relu=st.booleans(),
)
def test_any_linear_layer(features, leading, density, bias, relu) -> None:
    layer = sparse_layer(nn.Linear(*features, bias=bias), density)
    agree(layer, torch.randn(*leading, features[0]), Epilogue(relu))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(256, 24, 3, padding=1), (1, 256, 4, 4)),  # several blocks of channels
        (nn.Conv2d(96, 40, 3, padding=1), (3, 96, 34, 34)),  # several tiles, sample by sample
        (nn.Conv2d(512, 300, 1), (75, 512, 3, 2)),  # several groups, the last not full
        (nn.Linear(3000, 900), (300, 3000)),  # the same for a matrix
        (nn.Linear(3000, 900), (1, 3000)),  # one sample, a dot product for each output
        (nn.Linear(3000, 900), (3, 3000)),
        (nn.Conv2d(8, 6, 3, 2, 1), (37, 8, 6, 6)),
    ],
)
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_large_layers(layer: nn.Module, shape: tuple[int, ...], density: float) -> None:
    agree(sparse_layer(layer, density), torch.randn(shape), Epilogue(relu=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    for layer, shape in (
        (nn.Conv2d(33, 7, 3, padding=1), (5, 33, 20, 20)),
        (nn.Linear(50, 31), (40, 50)),
        (nn.Linear(50, 31), (1, 50)),
        (nn.Linear(5, 1), (1, 5)),
    ):
        ours = DirectLayer(DenseLayer(sparse_layer(layer, 0.2), PLAIN))
        x = torch.randn(shape)
        with torch_threads(1):
            alone = ours(x)
        with torch_threads(threads):
            for _ in range(20):
                assert torch.equal(ours(x), alone)


def test_inputs_in_any_memory_format() -> None:
    layer = sparse_layer(nn.Conv2d(4, 6, 3), 0.5)
    x = torch.randn(3, 4, 8, 8)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2, 1:]):
        agree(layer, view)
    agree(layer, torch.randn(4, 8, 8))  # no batch


def test_a_layer_serves_one_shape_after_another() -> None:
    dense = DenseLayer(sparse_layer(nn.Conv2d(3, 4, 3, padding=1), 0.5), PLAIN)
    ours = DirectLayer(dense)
    for shape in ((1, 3, 8, 8), (5, 3, 8, 8), (1, 3, 30, 9), (1, 3, 8, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), dense(x), rtol=1e-5, atol=1e-5)


CONVOLUTIONS = [
    (nn.Conv2d(3, 20, 3, padding=1), Epilogue(True, 2)),
    (nn.Conv2d(20, 9, (1, 3), 2), Epilogue(True)),
    (nn.Conv2d(9, 33, 2, dilation=2), PLAIN),
]
MATRICES = [(nn.Linear(n, 70), Epilogue(True)) for n in (40, 70, 70)] + [(nn.Linear(70, 5), PLAIN)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        (
            CONVOLUTIONS,
            [(1, 3, 14, 17), (5, 3, 14, 17), (3, 14, 17), (0, 3, 14, 17), (20, 3, 12, 15)],
        ),
        (MATRICES, [(1, 40), (7, 40), (2, 3, 40)]),
    ],
    ids=["convolutions", "matrices"],
)
def test_layers_in_a_row_change_no_bit(layers, shapes, threads: int) -> None:
    dense = [DenseLayer(sparse_layer(layer, 0.3), epilogue) for layer, epilogue in layers]
    parts = [DirectLayer(d, alone=i == 1) for i, d in enumerate(dense)]
    joined = reduce(DirectLayer.then, parts)
    with torch_threads(threads):
        for x in map(torch.randn, shapes):
            wanted = reduce(lambda y, part: part(y), parts, x)
            for ours in (joined, joined.shared(), deepcopy(joined)):
                for _ in range(5):
                    assert torch.equal(ours(x), wanted)
    assert (shared := joined.shared()) is not joined and shared.shared() is shared
    assert parts[0].shared() is parts[0]


@pytest.mark.parametrize("make", [DirectLayer, MatrixLayer, lambda d: MatrixLayer(d, 4)])
def test_copies_outlive_the_original(make: Callable[[DenseLayer], SparseLayer]) -> None:
    dense = DenseLayer(sparse_layer(nn.Linear(32, 20), 0.3), PLAIN)
    x = torch.randn(4, 32)
    ours = make(dense)
    wanted = ours(x)
    copy = deepcopy(ours)
    held = [
        *vars(ours).values(),
        *(v for w in getattr(ours, "_layers", ()) for v in vars(w).values()),
    ]
    tensors = [value for value in held if isinstance(value, Tensor)]
    assert len(tensors) >= 2
    for value in tensors:
        (value if value.layout == torch.strided else value.values()).zero_()
    del ours
    assert torch.equal(copy(x), wanted)


def test_nan_is_not_rectified_or_pooled_away() -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    x = torch.randn(1, 1, 4, 4)
    for position in ((0, 0), (1, 1), (2, 3)):
        hurt = x.clone()
        hurt[0, 0, position[0], position[1]] = torch.nan
        for epilogue in (Epilogue(True, 1), Epilogue(True, 2), Epilogue(False, 4)):
            dense = DenseLayer(layer, epilogue)
            torch.testing.assert_close(DirectLayer(dense)(hurt), dense(hurt), equal_nan=True)
    rows = nn.Linear(1, 1, bias=False).requires_grad_(False)
    rows.weight.fill_(1.0)
    dense = DenseLayer(rows, Epilogue(relu=True))
    for samples in (1, 3):
        assert DirectLayer(dense)(torch.full((samples, 1), torch.nan)).isnan().all()


@pytest.mark.parametrize("make", [DirectLayer, MatrixLayer])
def test_only_inference_in_float32_on_the_cpu(make: type[SparseLayer]) -> None:
    ours = make(DenseLayer(sparse_layer(nn.Linear(4, 3), 0.5), PLAIN))
    with pytest.raises(RuntimeError, match="gives no gradients"):
        ours(torch.randn(2, 4, requires_grad=True))
    for x in (torch.randn(2, 4).double(), torch.randn(2, 4, device="meta")):
        with pytest.raises(ValueError, match="takes float32 on the CPU"):
            ours(x)
    with pytest.raises(ValueError, match=r"can't take an input of shape \(2, 5\)"):
        ours(torch.randn(2, 5))
    assert not list(ours.parameters())


@pytest.mark.parametrize("make", [DirectLayer, MatrixLayer])
def test_channels_are_checked(make: type[SparseLayer]) -> None:
    ours = make(DenseLayer(sparse_layer(nn.Conv2d(3, 4, 1), 0.5), PLAIN))
    for shape in ((2, 4, 5, 5), (2, 2, 5, 5), (5, 5), (1, 2, 3, 5, 5)):
        with pytest.raises(ValueError, match="can't take an input of shape"):
            ours(torch.randn(shape))
    assert ours(torch.randn(0, 3, 5, 5)).shape == (0, 4, 5, 5)


def test_an_input_smaller_than_the_filter_is_a_clear_error() -> None:
    ours = DirectLayer(DenseLayer(sparse_layer(nn.Conv2d(1, 1, 5), 0.5), PLAIN))
    with pytest.raises(ValueError, match="input of 4 x 9 is smaller than the filter"):
        ours(torch.randn(1, 1, 4, 9))


def test_blocks_of_weights() -> None:
    mask = (torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    blocks = torch.kron(mask, torch.ones(4, 4)) * torch.randn(32, 24)
    assert block_side(blocks) == 4
    assert block_side(torch.randn(32, 24) * (torch.rand(32, 24) < 0.05)) is None
    assert block_side(torch.zeros(32, 32)) is None
    assert block_side(torch.ones(30, 30)) is None
    layer = sparse_layer(nn.Linear(24, 32), 1.0)
    layer.weight.copy_(blocks)
    agree(layer, torch.randn(5, 24), kinds="bsr csr direct")
    convolution = sparse_layer(nn.Conv2d(6, 32, 2, padding=1), 1.0)
    convolution.weight.copy_(blocks.view(32, 6, 2, 2))
    agree(convolution, torch.randn(3, 6, 7, 7), Epilogue(True, 2), kinds="bsr csr direct")
