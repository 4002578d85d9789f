"""Pruning with the network in view: norms that follow, units that go together."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa import (
    Add,
    Codebook,
    Compose,
    CompressedModel,
    CondensaCallback,
    FilterPrune,
    MaskedFineTune,
    NeuronPrune,
    Quantize,
    Range,
    Scheme,
)
from lightning_condensa.schemes import SelectionError
from lightning_condensa.search.space import SearchSpace

from ..graph.networks import NETWORKS, DenseNet, filled, vgg
from .networks import pi

IMAGE = torch.zeros(2, 3, 16, 16)
FEW = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])


def network(name: str, seed: int = 0) -> nn.Module:
    build, example = NETWORKS[name]
    module = filled(build(), seed).float()
    module.example_input_array = example
    return module


def kept(theta, name: str) -> list[bool]:  # type: ignore[no-untyped-def]
    mask = theta[name].mask
    return mask.reshape(len(mask), -1).any(1).tolist()


# -- norms that follow -------------------------------------------------------------------------


def test_a_removed_filter_takes_its_norm_along() -> None:
    module = network("vgg")
    compressed = CompressedModel.compress(module, FilterPrune(0.5, scope="layer"))
    theta = compressed.theta
    for conv, norm in (("0", "1"), ("4", "5")):
        for parameter in ("weight", "bias"):
            assert kept(theta, f"{norm}.{parameter}") == kept(theta, f"{conv}.weight")
    seen = compressed.module[:3](torch.randn(2, 3, 16, 16))
    gone = [not k for k in kept(theta, "0.weight")]
    assert not seen[:, gone].any() and seen[:, [not g for g in gone]].any()


def test_norms_stay_where_they_are_to() -> None:
    names = FilterPrune(0.5, prune_norm=False).bind(network("vgg")).names
    assert names == ("0.weight", "4.weight")


def test_a_bias_that_is_kept_keeps_its_norm() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    module.example_input_array = IMAGE
    assert FilterPrune(0.5, prune_bias=False).bind(module).names == ("0.weight", "2.weight")
    assert "1.bias" in FilterPrune(0.5).bind(module).names


class Sum(nn.Module):
    """A norm after a sum (ResNet v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
        self.example_input_array = IMAGE

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x) + self.b(x)).relu())


@FEW
@given(seed=st.integers(0, 1000))
def test_a_norm_after_a_sum_goes_when_all_that_is_added_is_gone(seed: int) -> None:
    theta = pi(FilterPrune(0.4), filled(Sum(), seed))
    added = zip(kept(theta, "a.weight"), kept(theta, "b.weight"), strict=True)
    assert kept(theta, "norm.weight") == [a or b for a, b in added]


def test_a_norm_after_a_concatenation_follows_each_part() -> None:
    module = filled(DenseNet(), 1)
    module.example_input_array = IMAGE.double()
    theta = pi(FilterPrune(0.5), module)
    parts = [kept(theta, f"{n}.weight") for n in ("stem", "convs.0", "convs.1")]
    assert kept(theta, "norms.2.bias") == parts[0] + parts[1] + parts[2]
    assert kept(theta, "norms.0.bias") == parts[0]


def test_a_norm_that_is_called_twice_must_see_zeros_twice() -> None:
    class Shared(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu())

    theta = pi(FilterPrune(0.4), filled(Shared(), 3))
    both = zip(kept(theta, "a.weight"), kept(theta, "b.weight"), strict=True)
    assert kept(theta, "norm.weight") == [a or b for a, b in both]


def test_without_an_example_norms_stay_and_a_warning_says_what_to_do() -> None:
    with pytest.warns(UserWarning, match=r"set Sequential\.example_input_array"):
        bound = FilterPrune(0.5).bind(vgg())
    assert bound.names == ("0.weight", "4.weight")


def test_nothing_is_said_where_there_are_no_norms() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuronPrune(0.5).bind(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        FilterPrune(0.5, prune_norm=False).bind(vgg())


# -- units that go together --------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 1000), density=st.floats(0.1, 0.9))
def test_the_groups_of_largest_root_mean_square_are_kept(seed: int, density: float) -> None:
    module = network("resnet", seed)
    theta = pi(FilterPrune(density, coupled=True, min_per_layer=0), module)
    weights = {n: p.detach().flatten(1) for n, p in module.named_parameters() if p.dim() == 4}
    stream = [["0.weight", "3.path.3.weight"], ["3.path.0.weight"], ["4.path.0.weight"]]
    stream += [["4.path.3.weight", "4.shortcut.0.weight", "5.path.3.weight"], ["5.path.0.weight"]]
    rows = [torch.cat([weights[name] for name in names], 1) for names in stream]
    scores = torch.cat([row.square().mean(1) for row in rows])
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[scores.topk(round(density * len(scores))).indices] = True
    for names, verdict in zip(stream, expected.split([len(row) for row in rows]), strict=True):
        for name in names:
            assert kept(theta, name) == verdict.tolist()


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_density_is_the_share_of_groups(density: float) -> None:
    bound = FilterPrune(density, coupled=True).bind(network("resnet"))
    (((_, counts),),) = [[bound.structure[0]]]
    assert [count for _, count in counts] == [round(density * (8 + 8 + 12 + 12 + 12))]


def test_one_threshold_for_each_set_of_weights() -> None:
    theta = pi(FilterPrune(0.5, coupled=True, scope="layer"), network("resnet"))
    assert [sum(kept(theta, n)) for n in ("0.weight", "4.path.0.weight", "5.path.3.weight")] == [
        *(4, 6, 6)
    ]


def test_overrides_hold_for_all_that_a_weight_is_tied_to() -> None:
    scheme = FilterPrune(0.5, coupled=True, overrides={r"shortcut": 0.25, r"^0\.": 1.0})
    theta = pi(scheme, network("resnet"))
    for name in ("4.path.3.weight", "4.shortcut.0.weight", "5.path.3.weight"):
        assert sum(kept(theta, name)) == 3
    assert all(kept(theta, "3.path.3.weight"))


def test_every_set_of_weights_keeps_some() -> None:
    theta = pi(FilterPrune(0.2, coupled=True, min_per_layer=2), network("resnet"))
    assert all(sum(kept(theta, name)) >= 2 for name in theta)
    theta = pi(FilterPrune(0.4, coupled=True, align=4), network("resnet"))
    assert all(sum(kept(theta, name)) % 4 == 0 for name in theta)


def test_outputs_stay_and_say_why() -> None:
    module = network("vgg")
    report = CompressedModel.compress(module, NeuronPrune(0.5, coupled=True)).report()
    assert [row.name for row in report.rows] == ["9.weight", "9.bias"]
    why = {s.name: s.reason for s in report.skipped}
    assert why["12.weight"] == "an output of the network"


def test_units_that_stay_are_told_of_in_compositions_too() -> None:
    scheme = Compose([FilterPrune(0.5, coupled=True), Quantize("int8")])
    compressed = CompressedModel.compress(network("shifted"), scheme)
    held = {row.name: row.note for row in compressed.report().rows}
    assert held["path.3.weight"] == "4 of 10 units: an input or a constant"
    assert held["path.0.weight"] == ""
    assert "4 of 10 units" in str(compressed.report())
    mask = compressed.theta["path.3.weight"].mask
    assert mask is not None and mask[[0, 1, 8, 9]].all()


def test_a_unit_that_a_layer_left_alone_adds_to_stays() -> None:
    module = network("resnet")
    scheme = FilterPrune(0.5, coupled=True, exclude=r"4\.shortcut")
    bound = scheme.bind(module)
    assert "4.path.3.weight" not in bound.names and "4.path.0.weight" in bound.names
    (reason,) = {h.reason for h in scheme.held(module) if h.name == "4.path.3.weight"}
    assert "a layer that is not selected" in reason


def test_where_nothing_can_go_it_says_so() -> None:
    module = nn.Linear(4, 2)
    module.example_input_array = torch.zeros(1, 4)
    with pytest.raises(SelectionError, match="nothing that can be taken out: weight: an output"):
        NeuronPrune(0.5, coupled=True).bind(module)


def test_coupling_needs_an_example_that_can_be_traced() -> None:
    with pytest.raises(ValueError, match=r"coupled=True\): set Sequential\.example_input_array"):
        FilterPrune(0.5, coupled=True).bind(vgg())
    module = vgg()
    module.example_input_array = torch.zeros(2, 4, 16, 16)
    with pytest.raises(ValueError, match=r"coupled=True\): the forward pass of Sequential"):
        FilterPrune(0.5, coupled=True).bind(module)


def test_it_goes_through_yaml_and_ramps_and_a_search() -> None:
    scheme = FilterPrune(Range(0.2, 1.0), coupled=True)
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme
    module = network("resnext")
    values = SearchSpace(scheme).candidates(module)
    assert len(values) == 9  # 2 to 10 of 4 + 6 groups
    half = FilterPrune(0.2, coupled=True).bind(module).relaxed(0.5)
    theta = half.pi(dict(module.named_parameters()))
    assert sum(kept(theta, "0.weight")) // 3 + sum(kept(theta, "6.weight")) == 6


def test_training_keeps_norms_zero_and_the_result_shrinks(trainer, net, loader) -> None:  # type: ignore[no-untyped-def]
    module = net()
    module.example_input_array = next(iter(loader))[0][:2]
    callback = CondensaCallback(NeuronPrune(0.5, coupled=True), schedule={"l_steps": 4})
    trainer(callback, max_epochs=2).fit(module, loader)
    theta = callback.compressed.theta
    norms = [n for n, m in module.named_modules() if isinstance(m, nn.BatchNorm1d)]
    for name in norms:
        for parameter in (f"{name}.weight", f"{name}.bias"):
            assert not module.get_parameter(parameter)[~theta[parameter].mask].any()
            assert int(theta[parameter].mask.sum()) < len(theta[parameter].mask)
    smaller = callback.compressed.shrink().module
    x = next(iter(loader))[0]
    torch.testing.assert_close(smaller.eval()(x), module.eval()(x))
    assert sum(map(torch.numel, smaller.parameters())) < sum(map(torch.numel, module.parameters()))


def test_a_masked_finetune_keeps_removed_channels(trainer, net, loader) -> None:  # type: ignore[no-untyped-def]
    module = net()
    module.layers[2] = nn.Tanh()  # a ReLU would pass no gradient at zero
    module.example_input_array = next(iter(loader))[0][:2]
    compressed = CompressedModel.compress(module, NeuronPrune(0.5, coupled=True))
    trainer(MaskedFineTune(), max_epochs=1).fit(compressed.module, loader)
    for name, encoded in compressed.theta.items():
        tuned = compressed.module.get_parameter(name)
        assert not tuned[~encoded.mask].any() and not torch.equal(tuned, encoded.decode())


def test_the_report_sets_groups_asked_for_beside_those_left() -> None:
    report = CompressedModel.compress(network("resnet"), FilterPrune(0.5, coupled=True)).report()
    (pool,) = report.pools
    assert (pool.scheme, pool.kept, pool.total) == ("FilterPrune", 26, 52)


def test_effects_of_single_units_judge_no_groups() -> None:
    with pytest.raises(ValueError, match="criterion='taylor' judges single units"):
        FilterPrune(0.5, coupled=True, criterion="taylor")


def test_a_term_of_a_sum_takes_nothing_out() -> None:
    module = network("vgg")
    scheme = Add([FilterPrune(0.5, coupled=True, prune_bias=False), Codebook(2, types="Conv2d")])
    with pytest.raises(ValueError, match=r"FilterPrune in Add .* coupled=False"):
        scheme.bind(module)
