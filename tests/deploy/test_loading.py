"""Packed files into modules and tensors, without a second copy of the weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import (
    Codebook,
    Compose,
    CompressedModel,
    FilterPrune,
    LowRank,
    Prune,
    Quantize,
    Scheme,
    load_compressed,
    load_tensors,
)
from lightning_condensa.deploy import Packed, PackedFileError, write_packed
from lightning_condensa.deploy.container import write_container
from lightning_condensa.schemes import Encoded


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 70, 5), nn.Flatten()
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.first.weight.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def saved(module: nn.Module, scheme: Scheme, path: Path) -> dict[str, Tensor]:
    """Writes a file, and gives the state dict that it must lead to."""
    compressed = CompressedModel.compress(module, scheme)
    compressed.save(path)
    return compressed.state_dict()


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


SCHEMES = [
    Prune(0.02),
    Compose([Prune(0.02), Quantize("int8")]),
    Compose([Prune(0.5), Quantize("int8")]),
    Compose([Prune(0.02), Quantize("int4", granularity="group:8")]),
    Compose([Prune(0.1), Quantize("float8_e4m3fn")]),
    Compose([Prune(0.1), Quantize("bfloat16")]),
    Compose([Prune(0.05), Codebook(15)]),
    Codebook(4),
    LowRank(rank=3),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.describe())
@pytest.mark.parametrize("place", ["memory", "channels last", "float64", "meta"])
def test_weights_are_those_of_theta(scheme: Scheme, place: str, tmp_path: Path) -> None:
    expected = saved(network(), scheme, tmp_path / "m.condensa")
    if place == "meta":
        with torch.device("meta"):
            module = network()
    else:
        module = network()
    if place == "channels last":
        module = module.to(memory_format=torch.channels_last)
    if place == "float64":
        module = module.double()
        expected = {n: t.double() if t.is_floating_point() else t for n, t in expected.items()}
    assert load_compressed(tmp_path / "m.condensa", module) is module
    assert_equal(module.state_dict(), expected)
    if place != "float64":
        assert_equal(load_tensors(tmp_path / "m.condensa"), expected)


def test_parameters_stay_and_autograd_knows_that_they_changed(tmp_path: Path) -> None:
    module = nn.Linear(300, 200)
    for scheme in (Prune(0.01), Codebook(4)):
        saved(module, scheme, tmp_path / "m.condensa")
        weight, memory = module.weight, module.weight.data_ptr()
        loss = module(torch.rand(2, 300, requires_grad=True)).square().sum()
        load_compressed(tmp_path / "m.condensa", module)
        assert module.weight is weight
        assert weight.data_ptr() == memory
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_module_on_the_meta_device(tmp_path: Path) -> None:
    expected = saved(Tied(), Prune(0.5), tmp_path / "m.condensa")
    with torch.device("meta"):
        module = Tied()
    load_compressed(tmp_path / "m.condensa", module)
    assert_equal(module.state_dict(), expected)
    assert module.first.weight is module.second.weight
    assert [p.requires_grad for p in module.parameters()] == [False, True]
    assert isinstance(module.second.bias, nn.Parameter)
    module(torch.rand(2, 6)).sum().backward()


def test_a_module_of_which_a_part_is_on_the_meta_device(tmp_path: Path) -> None:
    expected = saved(network(), Prune(0.5), tmp_path / "m.condensa")
    module = network()
    module[3].to("meta")
    first = module[0].weight
    load_compressed(tmp_path / "m.condensa", module)
    assert_equal(module.state_dict(), expected)
    assert module[0].weight is first


def test_buffers_that_no_file_holds(tmp_path: Path) -> None:
    saved(nn.Linear(4, 3), Prune(0.5), tmp_path / "m.condensa")
    with torch.device("meta"):
        module = nn.Linear(4, 3)
        module.register_buffer("table", torch.ones(5), persistent=False)
    with pytest.raises(ValueError, match="no file holds values for table"):
        load_compressed(tmp_path / "m.condensa", module)
    assert module.weight.is_meta
    module.table = torch.ones(5)
    load_compressed(tmp_path / "m.condensa", module)
    assert not module.weight.is_meta


@pytest.mark.parametrize("meta", [False, True])
def test_inference_mode(meta: bool, tmp_path: Path) -> None:
    expected = saved(network(), Compose([Prune(0.1), Quantize("int8")]), tmp_path / "m.condensa")
    with torch.inference_mode():
        with torch.device("meta" if meta else "cpu"):
            module = network()
        load_compressed(tmp_path / "m.condensa", module)
        assert_equal(load_tensors(tmp_path / "m.condensa"), expected)
    assert_equal(module.state_dict(), expected)
    # A module that was made outside can be trained afterwards.
    module = network()
    with torch.inference_mode():
        load_compressed(tmp_path / "m.condensa", module)
    module(torch.rand(1, 3, 8, 8)).sum().backward()
    # One that was made inside can still be overwritten outside.
    with torch.inference_mode():
        module = network()
    load_compressed(tmp_path / "m.condensa", module)
    assert_equal(module.state_dict(), expected)


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("compiled", [False, True])
def test_smaller_models(where: str, compiled: bool, tmp_path: Path) -> None:
    module = network()
    module.example_input_array = torch.rand(1, 3, 8, 8)
    smaller = CompressedModel.compress(module, FilterPrune(0.5)).shrink()
    smaller.save(tmp_path / "m.condensa")
    with torch.device(where):
        fresh = network()
    load_compressed(tmp_path / "m.condensa", torch.compile(fresh) if compiled else fresh)
    assert_equal(fresh.state_dict(), dict(smaller.module.state_dict()))


def test_a_module_that_does_not_fit_is_not_cut(tmp_path: Path) -> None:
    module = network()
    module.example_input_array = torch.rand(1, 3, 8, 8)
    CompressedModel.compress(module, FilterPrune(0.5)).shrink().save(tmp_path / "m.condensa")
    other = network().append(nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(PackedFileError, match=r"missing from the file: 5\.bias"):
        load_compressed(tmp_path / "m.condensa", other)
    assert_equal(other.state_dict(), before)


def test_hooks_of_the_module_see_the_values(tmp_path: Path) -> None:
    seen: list[float] = []

    class Hooked(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], *args: object) -> None:
            seen.append(float(state["weight"].sum()))
            super()._load_from_state_dict(state, *args)

    expected = saved(Hooked(4, 3), Prune(0.5), tmp_path / "m.condensa")
    load_compressed(tmp_path / "m.condensa", Hooked(4, 3))
    assert seen == [float(expected["weight"].sum())]


def one_damaged(path: Path) -> None:
    """A file of three tensors, of which the first has a damaged chunk, under a good hash."""
    good = zlib.compress(bytes(100))
    spec = {
        "encoded": [["bad", [50], 50, None, "I8", 8, "F32", None, None, None]],
        "rest": [["x", [60], "U8"], ["y", [40], "U8"]],
        "aliases": {"z": "y"},
        "streams": [
            ["v8", [[50, [["zlib", 9]]]]],
            ["r8", [[100, [["zlib", len(good)]]]]],
        ],
    }
    text = zlib.compress(json.dumps(spec).encode())
    path.write_bytes(write_container({"spec": text, "data": b"nonsense!" + good}, {}))


def test_only_what_is_asked_for_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "m.condensa"
    one_damaged(path)
    found = load_tensors(path, ["z", "x", "y"])
    assert list(found) == ["z", "x", "y"]
    assert (len(found["x"]), len(found["y"])) == (60, 40)
    assert found["z"] is found["y"]
    for names in (None, ["bad"]):
        with pytest.raises(PackedFileError, match=r"m\.condensa: a zlib chunk is corrupt"):
            load_tensors(path, names)
    with pytest.raises(KeyError, match="holds no tensors named 'v', 'w'"):
        load_tensors(path, ["x", "w", "v"])


def test_memory_is_counted_for_what_is_asked_for(tmp_path: Path) -> None:
    empty = Encoded(torch.zeros(3000, 3000, dtype=torch.int8), torch.float32)
    write_packed(tmp_path / "m.condensa", Packed({"large": empty}, {"small": torch.ones(3)}))
    assert load_tensors(tmp_path / "m.condensa", ["small"], max_bytes=10_000)["small"].sum() == 3
    with pytest.raises(PackedFileError, match="max_bytes is 10000"):
        load_tensors(tmp_path / "m.condensa", ["large"], max_bytes=10_000)


def test_a_damaged_file_leaves_the_module_alone(tmp_path: Path) -> None:
    one_damaged(tmp_path / "m.condensa")
    module = nn.ParameterDict({n: nn.Parameter(torch.ones(50)) for n in ("bad", "x", "y", "z")})
    with pytest.raises(PackedFileError, match="corrupt"):
        load_compressed(tmp_path / "m.condensa", module)
    assert all(bool((p == 1).all()) for p in module.parameters())


def many_blocks(change: Callable[[Tensor], Tensor]) -> Encoded:
    """Codes of more than one block, with one scale for each of three rows."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (3, 50_001), generator=generator, dtype=torch.int8)
    return Encoded(change(codes), torch.float32, torch.tensor([[0.5], [2.0], [3.0]]))


@pytest.mark.parametrize("scale", [[1.5, -2.0, 0.0], [1e-45, -1e-45, 1.0], [float("inf"), 1, -1]])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("weight", [torch.float32, torch.float16])
def test_scales_by_row(
    scale: list[float], density: float, weight: torch.dtype, tmp_path: Path
) -> None:
    kept = torch.rand(3, 50_001, generator=torch.Generator().manual_seed(1)) < density
    encoded = many_blocks(lambda codes: codes * kept).replace(
        scale=torch.tensor(scale).view(3, 1), dtype=weight
    )
    write_packed(tmp_path / "m.condensa", Packed({"w": encoded}))
    found, expected = load_tensors(tmp_path / "m.condensa")["w"], encoded.decode()
    bits = {4: torch.int32, 2: torch.int16}[weight.itemsize]
    assert torch.equal(found.isnan(), expected.isnan())
    same = found.view(bits) == expected.view(bits)
    assert bool((same | expected.isnan()).all())


@pytest.mark.parametrize("weight", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1_100_001, 2_000])
def test_few_values(weight: torch.dtype, count: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(200, generator=generator)
    encoded = Encoded(book[torch.randint(200, (count,), generator=generator)], weight)
    write_packed(tmp_path / "m.condensa", Packed({"w": encoded}))
    assert torch.equal(load_tensors(tmp_path / "m.condensa")["w"], encoded.decode())
