from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_condensa.deploy import CompressedModel, load_compressed
from lightning_condensa.schemes import (
    BlockPrune,
    Choice,
    Compose,
    FilterPrune,
    NeuronPrune,
    NMPrune,
    Prune,
    Quantize,
    Range,
    Scheme,
    SelectionError,
)

from .networks import linears


@dataclass(frozen=True)
class Ternarize(Scheme):
    """A user's scheme."""

    threshold: float = 0.1

    def project(self, weight: Tensor) -> Tensor:
        return torch.where(weight.abs() > self.threshold, weight.sign(), 0)


def largest(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    return magnitudes.amax(1)


EVERY = [
    Prune(0.1),
    Prune(1, scope="layer", min_per_layer=3, include="fc", exclude=["head", "stem"]),
    Prune(Range(0.01, 0.5, log=True), overrides={"a[0-9]": Range(0.1, 1.0), "b": 0.3}),
    Prune(Choice([0.1, 0.2])),
    NeuronPrune(0.5, criterion="l1", align=8, prune_bias=False),
    FilterPrune(0.5, types="Conv2d"),
    BlockPrune(0.5, (2, 4), criterion="max"),
    NMPrune(1, 4),
    Quantize("int8", granularity="tensor"),
    Quantize(Choice(["float16", "int8"])),
    Compose([NeuronPrune(0.5), Prune(Range(0.1, 1.0)), Quantize("bfloat16")]),
]


@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: s.describe())
def test_round_trip(scheme: Scheme) -> None:
    assert Scheme.from_config(json.loads(json.dumps(scheme.to_config()))) == scheme
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme
    assert list(Scheme.from_yaml(scheme.to_yaml()).space()) == list(scheme.space())


def test_round_trip_of_a_users_class_and_function() -> None:
    for scheme in (
        Compose([Prune(0.5), Ternarize(0.2)]),
        NeuronPrune(0.5, criterion=largest),
    ):
        module = sys.modules[__name__]
        sys.modules.setdefault(type(scheme).__module__, module)
        assert Scheme.from_yaml(scheme.to_yaml()) == scheme


def test_numpy_numbers_become_plain() -> None:
    assert Scheme.from_yaml(Prune(np.float64(0.25)).to_yaml()) == Prune(0.25)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        "just text",
        "{class_path: Prune, init_args: {densty: 0.1}}",
        "{class_path: Prune, init_args: {density: 7}}",
        "{class_path: os.system, init_args: {}}",
        "{class_path: nowhere.Prune}",
        "{class_path: Nothing}",
        "{class_path: 5}",
        "{class_path: NeuronPrune, init_args: {density: 0.5, criterion: {function: nothing}}}",
        "{class_path: NeuronPrune, init_args: {density: 0.5, criterion: {function: json.nothing}}}",
    ],
)
def test_configurations_that_describe_no_scheme(text: str) -> None:
    with pytest.raises(ValueError):
        Scheme.from_yaml(text)


def test_a_lambda_has_no_configuration() -> None:
    with pytest.raises(ValueError, match="use a named function"):
        NeuronPrune(0.5, criterion=lambda m, s: m.amax(1)).to_config()


# -- search dimensions -----------------------------------------------------------------------------


def test_space_and_at_with_overrides() -> None:
    scheme = Prune(Range(0.1, 0.5), overrides={"[0-2]": Choice([0.2, 0.4]), "3": 0.9})
    assert scheme.space() == {
        "density": Range(0.1, 0.5),
        "density[[0-2]]": Choice([0.2, 0.4]),
    }
    expected = Prune(0.3, overrides={"[0-2]": 0.4, "3": 0.9})
    assert scheme.at({"density": 0.3, "density[[0-2]]": 0.4}) == expected
    assert scheme.at({"density": 0.3}).at({"density[[0-2]]": 0.4}) == expected
    assert list(scheme.at({"density": 0.3}).space()) == ["density[[0-2]]"]
    empty = Prune(Range(0.1, 0.5), overrides={"": Range(0.1, 0.2)})
    assert empty.at({"density": 0.3, "density[]": 0.15}) == Prune(0.3, overrides={"": 0.15})


@pytest.mark.parametrize("name", ["sparsity", "density[3]", "density[x]", "scope"])
def test_values_for_what_is_no_dimension(name: str) -> None:
    with pytest.raises(ValueError, match="no search dimension"):
        Prune(Range(0.1, 0.5), overrides={"3": 0.9}).at({name: 0.5})


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="density must be"):
        Prune(Range(0.1, 0.5)).at({"density": 0.0})
    with pytest.raises(ValueError, match="dtype must be"):
        Quantize(Choice(["float16", "int8"])).at({"dtype": "int7"})


def test_compose_prefixes_its_dimensions() -> None:
    scheme = Compose(
        [
            Prune(Range(0.1, 0.5), include="a"),
            Prune(Range(0.2, 0.6), include="b", overrides={"c": Range(0.1, 0.2)}),
            Quantize(Choice(["float16", "int8"])),
        ]
    )
    assert list(scheme.space()) == [
        "prune.density",
        "prune_2.density",
        "prune_2.density[c]",
        "quantize.dtype",
    ]
    done = scheme.at(
        {
            "prune.density": 0.2,
            "prune_2.density": 0.3,
            "prune_2.density[c]": 0.15,
            "quantize.dtype": "int8",
        }
    )
    assert done == Compose(
        [
            Prune(0.2, include="a"),
            Prune(0.3, include="b", overrides={"c": 0.15}),
            Quantize("int8"),
        ]
    )
    with pytest.raises(ValueError, match="no search dimension"):
        scheme.at({"density": 0.2})
    with pytest.raises(ValueError, match="open dimensions"):
        scheme.bind(nn.Linear(2, 2))


def test_range_at() -> None:
    assert Range(0.01, 1.0, log=True).at(0.5) == pytest.approx(0.1)
    assert Range(0.2, 1.0).at(0.5) == pytest.approx(0.6)
    assert (Range(0.2, 1.0).at(0), Range(0.2, 1.0).at(1)) == (1.0, 0.2)


def test_equal_structure_means_equal_result() -> None:
    module = linears(10, 10, 10)

    def structure(scheme: Scheme) -> Any:
        return scheme.bind(module).structure

    assert structure(Prune(0.3)) == structure(Prune(0.3001))
    assert hash(structure(Prune(0.3))) == hash(structure(Prune(0.3001)))
    assert structure(Prune(0.3)) != structure(Prune(0.31))
    assert structure(NeuronPrune(0.5)) == structure(NeuronPrune(0.51))
    different = [
        NeuronPrune(0.5),
        NeuronPrune(0.5, align=4),
        NeuronPrune(0.5, criterion="l1"),
        BlockPrune(0.5, (1, 10)),
        Quantize("int8"),
        Quantize("float16"),
        NMPrune(1, 2),
        Compose([NeuronPrune(0.5), Quantize("int8")]),
    ]
    assert len({structure(s) for s in different}) == len(different)


def test_relaxed_runs_from_dense_to_compressed() -> None:
    module = linears(10, 10)
    weights = dict(module.named_parameters())
    bound = Compose([Prune(0.1, overrides={"0": 0.2}), Quantize("float16")]).bind(module)
    kept = [bound.relaxed(p).pi(weights)["0.weight"].nnz for p in (0, 0.5, 0.75, 1)]
    assert kept == [100, 60, 40, 20]
    assert bound.relaxed(1.0) is bound


def test_n_of_m_falls_from_m() -> None:
    module = linears(8, 8)
    weights = dict(module.named_parameters())
    bound = NMPrune(1, 4).bind(module)
    kept = [bound.relaxed(p).pi(weights)["0.weight"].nnz for p in (0, 0.5, 1)]
    assert kept == [64, 32, 16]


# -- composition -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schemes",
    [
        [Quantize(), Prune(0.5)],
        [Ternarize(), NMPrune()],
        [Quantize("int8"), Ternarize()],
        [Compose([Prune(0.5), Quantize()]), NeuronPrune(0.5)],
    ],
)
def test_illegal_orders(schemes: list[Scheme]) -> None:
    with pytest.raises(ValueError, match="the order is prune, then project values, then quantize"):
        Compose(schemes)


def test_compositions_are_flattened() -> None:
    nested = Compose([Compose([Prune(0.5), Ternarize()]), Quantize()])
    assert nested == Compose([Prune(0.5), Ternarize(), Quantize()])
    assert replace(nested) == nested


def test_a_users_scheme_composes_and_is_saved(tmp_path: Any) -> None:
    module = linears(20, 10)
    compressed = CompressedModel.compress(
        module, Compose([Prune(0.3), Ternarize(0.01), Quantize("float16")])
    )
    weight = compressed.module[0].weight
    assert set(weight.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert not torch.signbit(weight[weight == 0]).any()
    compressed.save(tmp_path / "model.condensa")
    loaded = load_compressed(tmp_path / "model.condensa", linears(20, 10))
    assert torch.equal(loaded[0].weight, weight)


def test_projections_cannot_revive_pruned_weights() -> None:
    @dataclass(frozen=True)
    class Shift(Scheme):
        def project(self, weight: Tensor) -> Tensor:
            return weight - 1

    module = linears(5, 4)
    theta = Compose([Prune(0.5), Shift()]).bind(module).pi(dict(module.named_parameters()))
    decoded = theta["0.weight"].decode()
    pruned = decoded[~theta["0.weight"].mask]
    assert pruned.tolist() == [0.0] * 10
    assert not torch.signbit(pruned).any()


def test_a_scheme_without_projection() -> None:
    module = linears(2, 2)
    with pytest.raises(TypeError, match="must define project"):
        Scheme().bind(module).pi(dict(module.named_parameters()))


# -- bad input -------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *(
            (lambda d=d: Prune(d), "density must be a number in (0, 1]")
            for d in (0, 1.5, float("nan"), -0.1, "0.5", True, None, float("inf"))
        ),
        (lambda: Prune(Range(0.0, 0.5)), "density must be"),
        (lambda: Prune(Choice([0.5, 2])), "density must be"),
        (lambda: Prune(0.5, overrides={"a": 0}), "overrides['a'] must be"),
        (lambda: Prune(0.5, overrides={"(": 0.5}), "overrides must hold regular expressions"),
        (lambda: Prune(0.5, include="["), "include must hold regular expressions"),
        (lambda: Prune(0.5, exclude=["ok", "*"]), "exclude must hold regular expressions"),
        (lambda: Prune(0.5, include=[5]), "include must hold regular expressions"),
        (lambda: Prune(0.5, scope="network"), "scope must be"),
        (lambda: Prune(0.5, min_per_layer=-1), "min_per_layer must be"),
        (lambda: NeuronPrune(0.5, criterion="l3"), "criterion must be one of"),
        (lambda: NeuronPrune(0.5, align=0), "align must be"),
        (lambda: NeuronPrune(0.5, align=1.5), "align must be"),
        (lambda: BlockPrune(0.5, ()), "block_size must hold"),
        (lambda: BlockPrune(0.5, (2, 0)), "block_size must hold"),
        (lambda: BlockPrune(0.5, 4), "block_size must hold"),
        (lambda: NMPrune(4, 2), "1 <= n <= m"),
        (lambda: NMPrune(0, 2), "1 <= n <= m"),
        (lambda: Quantize("int7"), "dtype must be one of"),
        (lambda: Quantize(torch.float16), "dtype must be one of"),
        (lambda: Quantize(Choice(["int8", "int7"])), "dtype must be one of"),
        (lambda: Quantize("int8", granularity="row"), "granularity must be"),
        (lambda: Range(0.5, 0.5), "low < high"),
        (lambda: Range(0.5, 0.1), "low < high"),
        (lambda: Range(float("nan"), 1), "low < high"),
        (lambda: Range("a", 1), "low < high"),
        (lambda: Range(0.0, 1.0, log=True), "needs low > 0"),
        (lambda: Choice(["int8"]), "at least two options"),
        (lambda: Choice(["int8", "int8"]), "all different"),
        (lambda: Choice([[1], [1]]), "all different"),
        (lambda: Choice("int8"), "a list of options"),
        (lambda: Choice(3), "a list of options"),
        (lambda: Compose([]), "non-empty list"),
        (lambda: Compose([Prune(0.5), "Quantize"]), "must hold schemes"),
        (lambda: Compose([Prune(0.5)], include="a"), "give them to its schemes"),
    ],
)
def test_bad_values(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)
    assert one_line(error)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Prune(0.5, include="nothing"), "include='nothing' matches no weight"),
        (Prune(0.5, exclude="nothing"), "exclude='nothing' matches no weight"),
        (Prune(0.5, exclude="."), "selects no weight of Sequential"),
        (Prune(0.5, types="Conv2d"), "selects no weight of Sequential"),
        (FilterPrune(0.5), "selects no weight of Sequential"),
        (Prune(0.5, overrides={"nothing": 0.1}), "overrides='nothing' matches no selected weight"),
        (Prune(0.5, overrides={".": 0.1, "0": 0.2}), "overrides='0' matches no selected weight"),
        (NMPrune(2, 4), "m=4 does not divide the 6 inputs of 0.weight"),
        (BlockPrune(0.5, (2, 2, 2)), "block_size must have 2 entries"),
        (Prune(0.001), "keeps 0 of 66 elements or groups of 0.weight, 1.weight"),
        (Prune(0.03, min_per_layer=2), "fewer than the 4 needed"),
        (NeuronPrune(0.05, scope="layer"), "keeps 0 of 6 elements or groups of 0.weight"),
        (Compose([Quantize("float16"), Quantize("int8")]), "0.weight, 1.weight would be quantized"),
    ],
)
def test_schemes_that_do_not_fit_the_module(scheme: Scheme, message: str) -> None:
    with pytest.raises(ValueError) as error:
        scheme.bind(linears(6, 6, 5))
    assert message in str(error.value)
    assert one_line(error)
    if "matches" in message or "selects" in message:
        assert isinstance(error.value, SelectionError)


def test_quantizers_of_different_weights_compose() -> None:
    scheme = Compose([Quantize("float16", include="0"), Quantize("int8", exclude="0")])
    module = linears(6, 6, 5)
    theta = scheme.bind(module).pi(dict(module.named_parameters()))
    assert [e.codes.dtype for e in theta.values()] == [torch.float16, torch.int8]


def test_a_criterion_that_returns_the_wrong_thing() -> None:
    module = linears(4, 3)
    for criterion in (lambda m, s: m, lambda m, s: m[:, 0] * torch.nan):
        with pytest.raises(ValueError, match="must return 3 scores that are not NaN"):
            NeuronPrune(0.5, criterion=criterion).bind(module).pi(dict(module.named_parameters()))
