"""Quantization to few bits: grids, groups, signs, and what becomes of pruned weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import Compose, Prune, Quantize, load_compressed
from lightning_condensa.deploy import CompressedModel
from lightning_condensa.schemes import Choice, Scheme

from .networks import filled, pi

LEVELS = {"int8": 255, "int4": 15, "int2": 3, "ternary": 3, "binary": 2}
LAYERS = {
    "linear": lambda: nn.Linear(10, 6),
    "conv": lambda: nn.Conv2d(5, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(5, 4, 3),
    "depthwise": lambda: nn.Conv1d(6, 6, 3, groups=6),
    "lstm": lambda: nn.LSTM(7, 4),
}


def groups_of(weight: Tensor, transposed: bool, group: int) -> list[Tensor]:
    """What shares a scale, written out."""
    inputs_last = weight.movedim(0 if transposed else 1, -1)
    rows = inputs_last.reshape(-1, inputs_last.shape[-1])
    return [piece for row in rows for piece in row.split(group)]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group:4", "group:1", "group:100"])
@pytest.mark.parametrize("dtype", [*LEVELS, "float8_e4m3fn"])
def test_contract(dtype: str, granularity: str, layer: str) -> None:
    module = filled(LAYERS[layer]())
    scheme = Quantize(dtype, granularity=granularity)
    bound = scheme.bind(module)
    theta = pi(scheme, module)
    for name, encoded in theta.items():
        weight, decoded = module.get_parameter(name).detach(), encoded.decode()
        assert (decoded.dtype, decoded.shape) == (weight.dtype, weight.shape)
        assert encoded.codes.is_contiguous()
        if dtype in LEVELS:
            assert len(encoded.codes.unique()) <= LEVELS[dtype]
        assert (decoded - weight).norm() < weight.norm()
    again = bound.delta(bound.pi(bound.delta(theta)))
    assert all(torch.equal(again[n], e.decode()) for n, e in theta.items())


@pytest.mark.parametrize("layer", ["linear", "conv", "transposed"])
@pytest.mark.parametrize("dtype", ["int4", "binary", "float8_e4m3fn"])
def test_a_group_is_rounded_like_a_tensor_of_its_own(dtype: str, layer: str) -> None:
    module = filled(LAYERS[layer]())
    encoded = pi(Quantize(dtype, granularity="group:4"), module)["weight"]
    transposed = layer == "transposed"
    found = groups_of(encoded.decode(), transposed, 4)
    for piece, rounded in zip(groups_of(module.weight.detach(), transposed, 4), found, strict=True):
        alone = nn.Linear(len(piece), 1, bias=False)
        alone.weight.data = piece[None]
        assert torch.equal(
            pi(Quantize(dtype, granularity="tensor"), alone)["weight"].decode()[0], rounded
        )
    assert encoded.scale is not None
    assert encoded.scale.numel() == len(found)


def test_finer_scales_and_more_bits_come_closer() -> None:
    module = filled(nn.Linear(256, 16))
    with torch.no_grad():
        module.weight.mul_(torch.linspace(0.1, 3, 256))

    def error(scheme: Scheme) -> float:
        decoded = pi(scheme, module)["weight"].decode()
        return float((decoded - module.weight.detach()).norm())

    coarse_to_fine = ["tensor", "channel", "group:64", "group:16"]
    errors = [error(Quantize("int4", granularity=g)) for g in coarse_to_fine]
    assert errors == sorted(errors, reverse=True)
    errors = [error(Quantize(d)) for d in ("binary", "ternary", "int4", "int8", "float16")]
    assert errors == sorted(errors, reverse=True)
    assert error(Quantize("int2", symmetric=False)) < error(Quantize("int2"))
    assert error(Quantize("int4", symmetric=False)) < 1.02 * error(Quantize("int4"))


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group:3"])
@pytest.mark.parametrize("dtype", [*LEVELS, "float8_e4m3fn", "float16"])
def test_pruned_weights_stay_zero(dtype: str, granularity: str) -> None:
    module = filled(nn.Conv2d(5, 4, 3))
    theta = pi(Compose([Prune(0.3), Quantize(dtype, granularity=granularity)]), module)["weight"]
    assert theta.mask is not None
    decoded = theta.decode()
    assert not decoded[~theta.mask].any()
    assert not torch.signbit(decoded[~theta.mask]).any()
    if dtype == "binary":
        assert theta.nnz == round(0.3 * theta.numel)
        assert torch.equal(decoded.sign(), torch.where(theta.mask, module.weight.sign(), 0))


def test_a_binary_scale_is_the_mean_of_what_is_kept() -> None:
    module = nn.Linear(4, 1, bias=False)
    module.weight.data = torch.tensor([[8.0, -4.0, 1.0, 2.0]])
    theta = pi(Compose([Prune(0.5), Quantize("binary")]), module)["weight"]
    assert theta.decode().tolist() == [[6.0, -6.0, 0.0, 0.0]]
    assert pi(Quantize("binary"), module)["weight"].decode().tolist() == [[3.75, -3.75, 3.75, 3.75]]


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (Quantize("int4"), 40 * 4 + 4 * 32),
        (Quantize("binary"), 40 + 4 * 32),
        (Quantize("binary", granularity="group:4"), 40 + 4 * 3 * 32),
        (Quantize("float8_e4m3fn", granularity="tensor"), 40 * 8 + 32),
        (Compose([Prune(0.25), Quantize("binary")]), 10 + 4 * 32),
    ],
)
def test_storage_bits(scheme: Scheme, bits: int) -> None:
    encoded = pi(scheme, filled(nn.Linear(10, 4)))["weight"]
    zeros = encoded.numel - encoded.nnz if not isinstance(scheme, Compose) else 0
    assert encoded.storage_bits == bits - zeros * encoded.value_bits


@pytest.mark.parametrize("granularity", ["channel", "group:4"])
@pytest.mark.parametrize("dtype", [*LEVELS, "float8_e4m3fn"])
def test_files(tmp_path, dtype: str, granularity: str) -> None:  # type: ignore[no-untyped-def]
    module = filled(nn.Sequential(nn.Conv2d(5, 8, 3), nn.Flatten(), nn.Linear(8, 3)))
    scheme = Compose([Prune(0.4), Quantize(dtype, granularity=granularity)])
    theta = pi(scheme, module)
    with torch.no_grad():
        for name, encoded in theta.items():
            module.get_parameter(name).copy_(encoded.decode())
    compressed = CompressedModel(module, theta, scheme)
    compressed.save(tmp_path / "m.condensa")
    other = nn.Sequential(nn.Conv2d(5, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    loaded = load_compressed(tmp_path / "m.condensa", other)
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(loaded(x), module(x))
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme


def test_fewer_bits_make_smaller_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    module = filled(nn.Linear(300, 200))
    sizes = {}
    for dtype, bits in (("int8", 8), ("int4", 4), ("ternary", math.log2(3)), ("binary", 1)):
        scheme = Quantize(dtype)
        compressed = CompressedModel(module, pi(scheme, module), scheme)
        compressed.save(tmp_path / dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
        overhead = 200 * 4 + 200 * 4 + 1500  # scales, biases, header
        assert sizes[dtype] < 60_000 * bits / 8 * 1.1 + overhead
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"dtype": Choice(["int4", "int5"])}, "got 'int5'"),
        ({"granularity": "group:0"}, "granularity must be"),
        ({"granularity": "group:"}, "granularity must be"),
        ({"granularity": "row"}, "got 'row'"),
        ({"granularity": 64}, "got 64"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [*LEVELS, "float8_e4m3fn"])
@pytest.mark.parametrize(
    "values",
    [[0.0] * 4, [1e-45, -1e-45, 0.0, 1e-45], [1e38, -3e38, 1.0, 0.0], [2.5] * 4, [1e-30] * 4],
)
def test_extremes(dtype: str, values: list[float]) -> None:
    module = nn.Linear(4, 1, bias=False)
    module.weight.data = torch.tensor([values])
    bound = Quantize(dtype).bind(module)
    decoded = bound.delta(bound.pi(dict(module.named_parameters())))["weight"]
    assert decoded.isfinite().all()
    assert torch.equal(bound.delta(bound.pi({"weight": decoded}))["weight"], decoded)
