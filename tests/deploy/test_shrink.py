"""Physical removal: outputs stay, sizes go, on every kind of architecture."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa import (
    Compose,
    CompressedModel,
    FilterPrune,
    NeuronPrune,
    PackedFileError,
    Prune,
    Quantize,
    load_compressed,
)
from lightning_condensa.deploy import apply_plan, plan_from_json, plan_to_json, shrink
from lightning_condensa.deploy.plan import plan_from_text, plan_to_text

from ..graph.networks import NETWORKS, filled, inputs_like, vgg

#: The comparison of outputs must not hide what a rule got wrong.
pytestmark = pytest.mark.filterwarnings("error:.*not made smaller")

#: Each example traces a network; one that fails is told by its seed.
FEW = settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
TYPES = ("Linear", "Conv2d", "ConvTranspose2d")


def wide(example: Tensor) -> Tensor:
    return example.double() if example.is_floating_point() else example


def network(name: str, seed: int = 0) -> nn.Module:
    build, example = NETWORKS[name]
    module = filled(build(), seed)
    module.example_input_array = wide(example)
    return module


def relative_difference(name: str, a: nn.Module, b: nn.Module) -> float:
    inputs = inputs_like(NETWORKS[name][1])
    with torch.no_grad():
        expected, found = a.eval()(inputs), b.eval()(inputs)
    return float((expected - found).abs().max() / expected.abs().max())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("coupled", [False, True])
@FEW
@given(seed=st.integers(0, 1000), density=st.floats(0.2, 0.9))
def test_outputs_stay_under_random_structured_masks(
    name: str, coupled: bool, seed: int, density: float
) -> None:
    module = network(name, seed)
    scheme = FilterPrune(density, types=TYPES, coupled=coupled)
    compressed = CompressedModel.compress(module, scheme)
    smaller = compressed.shrink()
    assert relative_difference(name, compressed.module, smaller.module) <= 1e-12
    if coupled:
        assert count(smaller.module) < count(compressed.module)


@pytest.mark.parametrize("name", NETWORKS)
@FEW
@given(seed=st.integers(0, 1000))
def test_outputs_stay_under_random_masks_of_anything(name: str, seed: int) -> None:
    """Rows, columns, single weights, biases, γ and β are zero at random, not as a scheme would."""
    module = network(name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            for dim, extent in enumerate(parameter.shape[:2]):
                gone = torch.rand(extent, generator=generator) < 0.4
                parameter.index_fill_(dim, gone.nonzero().flatten(), 0)
    before = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is rolled back
        smaller, plan = shrink(module, module.example_input_array)
    assert relative_difference(name, before, smaller) <= 1e-12
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in module.named_parameters())
    assert bool(plan) == (count(smaller) < count(module))


@pytest.mark.parametrize("name", ["vgg", "resnet", "mobilenet", "unet", "densenet", "resnext"])
def test_coupled_groups_are_gone_from_every_axis(name: str) -> None:
    """What coupled pruning removes, all of it, is taken out."""
    compressed = CompressedModel.compress(
        network(name), FilterPrune(0.5, types=TYPES, coupled=True)
    )
    smaller = compressed.shrink().module
    for parameter_name, encoded in compressed.theta.items():
        if encoded.mask is not None and encoded.mask.dim() > 1:
            kept = encoded.mask.flatten(2).any(2) if encoded.mask.dim() > 2 else encoded.mask
            dim = int(parameter_name.startswith("up2"))  # transposed
            assert smaller.get_parameter(parameter_name).shape[dim] == int(kept.any(1 - dim).sum())


def test_layers_know_their_new_sizes() -> None:
    smaller = CompressedModel.compress(
        network("mobilenet"), FilterPrune(0.5, types=TYPES, coupled=True)
    ).shrink()
    assert smaller.plan
    for layer in smaller.module.modules():
        if isinstance(layer, nn.Conv2d):
            shape = (layer.out_channels, layer.in_channels // layer.groups)
            assert layer.weight.shape[:2] == shape
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight) == len(layer.running_mean)


def test_a_constant_channel_stays() -> None:
    """A zero filter before a norm with β ≠ 0 is no zero: at borders it is no bias either."""
    module = network("vgg")
    with torch.no_grad():
        module[0].weight[:4] = 0
    assert "0.weight" not in shrink(module, module.example_input_array)[1]
    with torch.no_grad():
        module[1].weight[:4] = 0
    assert "0.weight" not in shrink(module, module.example_input_array)[1]
    with torch.no_grad():
        module[1].bias[:4] = 0
    assert shrink(module, module.example_input_array)[1]["0.weight"] == {0: [4, 5, 6, 7]}


def test_a_channel_that_nothing_reads_goes_though_it_is_not_zero() -> None:
    module = network("alexnet")
    with torch.no_grad():
        module.features[3].weight[:, 2] = 0
    smaller, plan = shrink(module, module.example_input_array)
    assert plan["features.0.weight"][0] == [0, 1, 3, 4, 5, 6, 7]
    assert relative_difference("alexnet", module, smaller) <= 1e-12


def test_dead_ends_go_to_the_end() -> None:
    """What only dead channels read is dead: one pass over consumers would not find it."""
    module = filled(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 1)))
    with torch.no_grad():
        module[4].weight[0, 1:] = 0
        for layer in module[1:4]:
            layer.weight.copy_(torch.eye(4))
    _, plan = shrink(module, torch.zeros(1, 4, dtype=torch.float64))
    assert [plan[f"{i}.weight"][0] for i in range(4)] == [[0]] * 4


def test_something_is_left_of_every_layer() -> None:
    module = network("vgg")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    smaller, _ = shrink(module, module.example_input_array)
    assert smaller(inputs_like(NETWORKS["vgg"][1])).shape == (2, 5)
    assert [len(p) for n, p in smaller.named_parameters() if n.endswith("weight")] == [1] * 5 + [5]


def test_what_is_added_in_place_is_seen_under_the_old_name() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            kept = self.a(x)
            kept.add_(self.b(x))
            return self.head(kept)

    module = Aliased()
    with torch.no_grad():
        module.a.weight.zero_()
        module.a.bias.zero_()
        module.b.weight[1] = module.b.bias[1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shrink(module, torch.zeros(1, 3))[1]["a.weight"] == {0: [0, 2, 3]}


class FixedSize(nn.Module):
    """Code that spells a size out where nobody would look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        assert x.shape[1] == 4, "four of them"
        return self.second(x.view(len(x), 4))


def test_what_fails_when_smaller_is_rolled_back() -> None:
    module = FixedSize()
    with torch.no_grad():
        module.second.weight[:, 0] = 0
    with pytest.warns(UserWarning, match=r"FixedSize was not made smaller: .*four of them"):
        same, plan = shrink(module, torch.zeros(1, 3))
    assert plan == {} and len(same.first.weight) == 4


class Averaged(FixedSize):
    """A constant that was the number of channels: outputs would change without an error."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.second(x / x.shape[1])


def test_what_computes_something_else_when_smaller_is_rolled_back() -> None:
    module = Averaged()
    with torch.no_grad():
        module.second.weight[:, 0] = 0
    with pytest.warns(UserWarning, match="outputs would differ by"):
        _, plan = shrink(module, torch.zeros(1, 3))
    assert plan == {}


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = vgg()
        self.example_input_array = torch.zeros(2, 3, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_lightning_module_trains_on_after_shrinking(trainer) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    scheme = Compose([FilterPrune(0.5, coupled=True, scope="layer"), Quantize("float16")])
    smaller = CompressedModel.compress(Lit(), scheme).shrink()
    assert sorted(smaller.plan) == sorted(
        f"net.{n}"
        for n in (
            *("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"),
            *("4.weight", "5.weight", "5.bias", "5.running_mean", "5.running_var", "9.weight"),
        )
    )
    data = [(torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))) for _ in range(2)]
    before = {n: p.detach().clone() for n, p in smaller.module.named_parameters()}
    trainer(max_epochs=1).fit(smaller.module, torch.utils.data.DataLoader(data, batch_size=None))
    assert all(not torch.equal(before[n], p) for n, p in smaller.module.named_parameters())


@pytest.mark.parametrize(
    "scheme",
    [
        Compose([FilterPrune(0.5, coupled=True), Quantize("int8")]),
        Compose([FilterPrune(0.5, coupled=True), Quantize("int4", granularity="group:3")]),
        Compose([FilterPrune(0.5, coupled=True), Prune(0.3), Quantize("binary")]),
    ],
    ids=lambda s: s.describe(),
)
def test_theta_shrinks_with_the_module_and_goes_through_a_file(scheme, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    compressed = CompressedModel.compress(Lit(), scheme)
    smaller = compressed.shrink()
    for name, encoded in smaller.theta.items():
        assert torch.equal(encoded.decode(), smaller.module.get_parameter(name))
        assert encoded.mask is None or encoded.mask.shape == encoded.codes.shape
    smaller.save(tmp_path / "model.condensa")
    loaded = load_compressed(tmp_path / "model.condensa", Lit()).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), smaller.module.eval()(x))
    torch.testing.assert_close(loaded(x), compressed.module.eval()(x))
    again = load_compressed(tmp_path / "model.condensa", loaded)  # small already
    assert torch.equal(again(x), smaller.module(x))


def test_what_is_small_already_is_not_shrunk_again() -> None:
    smaller = CompressedModel.compress(Lit(), FilterPrune(0.5, coupled=True)).shrink()
    with pytest.raises(ValueError, match="made smaller before"):
        smaller.shrink()


def test_shrink_without_an_example_says_what_to_do() -> None:
    compressed = CompressedModel.compress(nn.Linear(3, 4), NeuronPrune(0.5))
    with pytest.raises(ValueError, match=r"pass example=.*Linear\.example_input_array"):
        compressed.shrink()


def test_a_plan_goes_through_json_and_applies_to_a_fresh_module() -> None:
    module = CompressedModel.compress(
        network("resnet"), FilterPrune(0.5, coupled=True, scope="layer")
    ).module
    smaller, plan = shrink(module, module.example_input_array)
    text = plan_to_json(plan)
    assert json.loads(text)["0.weight"]["0"] == plan["0.weight"][0]
    assert plan_from_json(text) == plan == plan_from_text(plan_to_text(plan))
    fresh = network("resnet", seed=5)
    fresh.requires_grad_(False)
    apply_plan(fresh, plan)
    fresh.load_state_dict(smaller.state_dict())
    assert relative_difference("resnet", module, fresh) <= 1e-12
    assert not any(p.requires_grad for p in fresh.parameters())


def test_a_plan_keeps_tied_weights_tied() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    apply_plan(net, {"0.weight": {0: [1, 2], 1: [1, 2]}})
    assert net[0].weight is net[1].weight and net[0].weight.shape == (2, 2)
    assert net[1].in_features == 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"1.weight": {0: [0]}}, "does not have"),
        ({"0.weight": {2: [0]}}, "dimension 2"),
        ({"0.weight": {0: []}}, "ascending indices below 3"),
        ({"0.weight": {0: [1, 1]}}, "ascending indices"),
        ({"0.weight": {0: [0, 3]}}, "below 3"),
        ({"0.weight": {0: [-1, 0]}}, "below 3"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, message: str) -> None:  # type: ignore[no-untyped-def]
    net = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=message):
        apply_plan(net, plan)
    assert net[0].weight.shape == (3, 2)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": []}', '{"a": {"x": [0]}}', '{"a": {"0": [-1]}}', '{"a": {"64": []}}']
)
def test_a_hostile_plan_is_refused(text: str) -> None:
    with pytest.raises(PackedFileError):
        plan_from_json(text)


@pytest.mark.parametrize("text", ["", "?", "eJw=", plan_to_text({"a": {0: [1]}})[:-8] + "AAAAAAA="])
def test_a_damaged_plan_in_a_file_is_refused(text: str) -> None:
    with pytest.raises(PackedFileError):
        plan_from_text(text)
