"""What the channel graph says of networks: who is tied to whom, who has to stay."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_condensa.graph import ChannelGraph, TraceError, trace
from lightning_condensa.graph.builder import connected_components
from lightning_condensa.graph.liveness import removable

from .networks import NETWORKS, Gated, conv_bn


class Net(nn.Module):
    """Two layers and what is between them."""

    def __init__(self, between, dim: int = 2, parameter: Tensor | None = None) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.between = between
        self.first = nn.Conv2d(3, 4, 1) if dim == 2 else nn.Linear(3, 4)
        self.second = nn.Conv2d(4, 2, 1) if dim == 2 else nn.Linear(4, 2)
        if parameter is not None:
            self.parameter = nn.Parameter(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


IMAGE, ROWS = torch.zeros(2, 3, 6, 6), torch.zeros(2, 3)


def graph_of(between, dim: int = 2, parameter: Tensor | None = None) -> ChannelGraph:  # type: ignore[no-untyped-def]
    return trace(Net(between, dim, parameter), IMAGE if dim == 2 else ROWS)


def reasons(graph: ChannelGraph, name: str, dim: int) -> set[str | None]:
    return {graph.pinned.get(group) for group in graph.axes[name, dim].tolist()}


def tied(graph: ChannelGraph, *axes: tuple[str, int]) -> bool:
    first, *others = (graph.axes[axis].tolist() for axis in axes)
    return len(set(first)) == len(first) and all(other == first for other in others)


def rectified_under(context: AbstractContextManager[Any], x: Tensor) -> Tensor:
    """With a block of its own in the exported graph."""
    with context:
        y = x.relu()
    return y + x


FOLLOWED = {
    "relu": lambda m, x: x.relu(),
    "in place": lambda m, x: F.relu(x, inplace=True),
    "hardswish": lambda m, x: F.hardswish(x),
    "sigmoid": lambda m, x: x.sigmoid(),
    "scaled": lambda m, x: 2 * x / 3 - 1,
    "pooled": lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1),
    "with indices": lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "upsampled": lambda m, x: F.interpolate(x, scale_factor=2),
    "padded": lambda m, x: F.pad(x, (1, 1, 1, 1)),
    "reflected": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "there and back": lambda m, x: x.flatten(2).transpose(1, 2).mT.unflatten(2, (6, 6)),
    "cropped": lambda m, x: x[:, :, 1:, ::2],
    "gated by itself": lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "spatial softmax": lambda m, x: x.flatten(2).softmax(-1).view(x.shape),
    "dropped out": lambda m, x: F.dropout(x, 0.5, m.training),
    "glued": lambda m, x: torch.cat([x[:, :, :3], x[:, :, 3:]], dim=2),
    "leaky": lambda m, x: F.leaky_relu(x),
    "without gradients": lambda m, x: rectified_under(torch.no_grad(), x),
    "under autocast": lambda m, x: rectified_under(torch.autocast("cpu", torch.bfloat16), x),
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_channels_are_followed(kind: str) -> None:
    graph = graph_of(FOLLOWED[kind])
    assert tied(graph, ("first.weight", 0), ("first.bias", 0), ("second.weight", 1))
    assert reasons(graph, "first.weight", 0) == {None}
    assert reasons(graph, "first.weight", 1) == {"an input or a constant"}
    assert reasons(graph, "second.weight", 0) == {"an output of the network"}


PINNED = {
    "sorted": (lambda m, x: x.sort(dim=2).values, "used by sort"),
    "mean of channels": (lambda m, x: x + x.mean(1, keepdim=True), "used by mean"),
    "channel softmax": (lambda m, x: x.softmax(1), "used by softmax"),
    "layer norm": (lambda m, x: F.group_norm(x, 2), "normalized together"),
    "first half": (lambda m, x: torch.cat([x[:, :2], x[:, :2]], 1), "cut at a fixed"),
    "unequal": (lambda m, x: torch.cat(x.split([1, 3], 1), 1), "cut at a fixed"),
    "shuffled": (
        lambda m, x: x.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6),
        "brought into a fixed shape",
    ),
    "spread": (lambda m, x: x * torch.ones(1, 4, 1, 1).exp(), "an input or a constant"),
    "written to": (lambda m, x: x.index_fill(1, torch.tensor([0]), 1.0), "used by index_fill"),
}


@pytest.mark.parametrize("kind", PINNED)
def test_channels_that_have_to_stay_say_why(kind: str) -> None:
    between, why = PINNED[kind]
    found = reasons(graph_of(between), "first.weight", 0)
    assert all(reason is not None and reason.startswith(why) for reason in found)


def test_one_channel_that_many_read_stays_and_ties_none() -> None:
    """A map of attention over positions: one channel multiplies all the others."""

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.map, self.head = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(3, 1, 1),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wide(x) * self.map(x).sigmoid())

    graph = trace(Mapped(), IMAGE)
    assert tied(graph, ("wide.weight", 0), ("head.weight", 1))
    assert reasons(graph, "wide.weight", 0) == {None}
    assert reasons(graph, "map.weight", 0) == {"spread over other channels by mul"}


@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 1, 1), 0), ((1, 4, 1, 1), 1), ((4, 6, 6), 0), ((1, 4, 6, 1), 1)]
)
def test_a_parameter_used_by_hand_has_its_axis(shape: tuple[int, ...], dim: int) -> None:
    graph = graph_of(lambda m, x: x * m.parameter, parameter=torch.ones(shape))
    assert tied(graph, ("parameter", dim), ("first.weight", 0), ("second.weight", 1))


def test_a_scalar_parameter_ties_nothing() -> None:
    graph = graph_of(lambda m, x: x * m.parameter, parameter=torch.ones(1))
    assert tied(graph, ("first.weight", 0), ("second.weight", 1))


def test_slopes_of_a_prelu() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    assert tied(trace(net, ROWS), ("0.weight", 0), ("1.weight", 0), ("2.weight", 1))


def test_sums_tie_what_is_added() -> None:
    net = NETWORKS["resnet"][0]()
    graph = trace(net, NETWORKS["resnet"][1])
    stage = [("4.path.3.weight", 0), ("4.shortcut.0.weight", 0), ("5.path.3.weight", 0)]
    assert tied(graph, *stage, ("5.path.4.running_var", 0), ("8.weight", 1))
    assert not set(graph.axes["5.path.0.weight", 0].tolist()) & set(
        graph.axes["5.path.3.weight", 0].tolist()
    )


def test_concatenation_keeps_channels_apart() -> None:
    graph = trace(NETWORKS["unet"][0](), NETWORKS["unet"][1])
    joined = graph.axes["merge2.0.weight", 1].tolist()
    own = [graph.axes["down2.1.weight", 0].tolist(), graph.axes["up2.weight", 1].tolist()]
    assert joined == own[0] + own[1]


def test_flattened_maps_give_every_position_its_channel() -> None:
    graph = trace(NETWORKS["vgg"][0](), NETWORKS["vgg"][1])
    filters = graph.axes["4.weight", 0]
    assert torch.equal(graph.axes["9.weight", 1], filters.repeat_interleave(4))


def test_depthwise_convolutions_tie_and_grouped_ones_go_by_groups() -> None:
    graph = trace(NETWORKS["mobilenet"][0](), NETWORKS["mobilenet"][1])
    assert tied(graph, ("3.layers.0.weight", 0), ("3.layers.3.weight", 0), ("3.layers.7.weight", 1))
    graph = trace(NETWORKS["resnext"][0](), NETWORKS["resnext"][1])
    outputs, inputs = graph.axes["3.weight", 0], graph.axes["0.weight", 0]
    assert outputs.tolist() == [g for g in inputs[::3].tolist() for _ in range(2)]
    assert inputs.tolist() == [g for g in inputs[::3].tolist() for _ in range(3)]


def test_halves_of_a_gated_unit_are_tied() -> None:
    graph = trace(Gated(), torch.zeros(2, 4, dtype=torch.long))
    wide = graph.axes["wide.weight", 0]
    assert torch.equal(wide[:8], wide[8:])
    assert tied(graph, ("table.weight", 1), ("wide.weight", 1))


def test_equal_parts_lose_the_same() -> None:
    def swapped(module: nn.Module, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([second, first], 1)

    filters = graph_of(swapped).axes["first.weight", 0]
    assert torch.equal(filters[:2], filters[2:]) and filters[0] != filters[1]


def test_positions_that_were_joined_tie_their_channels() -> None:
    """A layer reads tokens of two kinds alike: its inputs go only where both kinds lose them."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.stack([self.a(x), self.b(x)], dim=1))

    net = Joined()
    graph = trace(net, ROWS)
    assert tied(graph, ("a.weight", 0), ("b.weight", 0), ("head.weight", 1))
    with torch.no_grad():
        net.a.weight[0] = net.a.bias[0] = 0
        named = dict(net.named_parameters())
        assert not removable(graph, named)[graph.axes["head.weight", 1]].any()
        net.b.weight[0] = net.b.bias[0] = 0
        gone = removable(graph, named)[graph.axes["head.weight", 1]]
    assert gone.tolist() == [True, False, False, False]


def test_tied_weights_tie_their_channels() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu())

    graph = trace(Tied(), ROWS)
    assert ("b.weight", 0) not in graph.axes
    assert reasons(graph, "a.weight", 0) == {"an input or a constant"}  # it reads the input, too


def test_norms_know_what_they_follow() -> None:
    graph = trace(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)), IMAGE)
    (norm,) = graph.norms
    assert torch.equal(norm.inputs, graph.products[0].outputs)


def test_an_example_may_be_a_tuple_or_a_dictionary() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(y))

    x, y = torch.zeros(2, 3), torch.zeros(2, 5)
    for example in ((x, y), {"y": y, "x": x}):
        assert tied(trace(Two(), example), ("a.weight", 0), ("b.weight", 0), ("head.weight", 1))


def test_the_module_is_left_as_it_is() -> None:
    net = nn.Sequential(*conv_bn(3, 4), nn.Dropout(), nn.Conv2d(4, 2, 1)).train()
    net[1].eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    trace(net, IMAGE)
    assert [m.training for m in net] == [True, False, True, True]
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_what_depends_on_values_is_refused() -> None:
    def branching(module: nn.Module, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"forward pass of Net .* same way for every input"):
        graph_of(branching)


def test_an_example_that_does_not_fit_is_refused() -> None:
    net = Net(lambda m, x: x).train()
    with pytest.raises(TraceError, match="must run on it"):
        trace(net, torch.zeros(2, 5, 6, 6))
    assert net.training


@pytest.mark.parametrize("edges", [[], [[0, 1]], [[i, i + 1] for i in range(63)], [[5, 3], [3, 5]]])
def test_connected_components(edges: list[list[int]]) -> None:
    expected = list(range(64))
    for _ in edges:
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    found = connected_components(64, torch.tensor(edges, dtype=torch.long).view(-1, 2).t())
    assert found.tolist() == expected
