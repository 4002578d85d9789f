"""Attention heads are taken out, and what counts them follows."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa import (
    Compose,
    CompressedModel,
    HeadPrune,
    Quantize,
    load_compressed,
    profile,
)
from lightning_condensa.deploy import apply_plan, plan_from_json, plan_to_json, shrink
from lightning_condensa.deploy.heads import FewerHeads

from ..graph.networks import filled
from .attentions import HEADS, LAYOUTS, WIDTH, FusedAsWide, Network, Torch

pytestmark = pytest.mark.filterwarnings("error:.*not made smaller")

#: Each example traces a network.
FEW = settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
MANY = settings(FEW, max_examples=40)


def network(build) -> nn.Module:  # type: ignore[no-untyped-def]
    module = filled(Network(build))
    module.example_input_array = torch.zeros(2, 5, WIDTH, dtype=torch.float64)
    return module


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def difference(a: nn.Module, b: nn.Module, x: Tensor | None = None) -> float:
    x = inputs() if x is None else x
    with torch.no_grad():
        expected, found = a.eval()(x), b.eval()(x)
    return float((expected - found).abs().max() / expected.abs().max())


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_go_with_all_that_counts_them(layout: str, tmp_path: Path) -> None:
    build, attributes = LAYOUTS[layout]
    compressed = CompressedModel.compress(
        network(build), Compose([HeadPrune(0.5, num_heads=HEADS), Quantize("int8")])
    )
    smaller = compressed.shrink()
    assert smaller.stays == {}
    assert difference(compressed.module, smaller.module) <= 1e-12
    removed = sum(int((e.decode() == 0).sum()) for e in compressed.theta.values())
    left = sum(int((e.decode() == 0).sum()) for e in smaller.theta.values())
    assert removed - left == numbers(compressed.module) - numbers(smaller.module) > 300
    assert {n.rpartition(".")[2] for n, v in smaller.plan.items() if isinstance(v, int)} == (
        attributes
    )
    assert plan_from_json(plan_to_json(smaller.plan)) == smaller.plan
    smaller.save(tmp_path / "small.condensa")
    loaded = load_compressed(tmp_path / "small.condensa", network(build))
    assert difference(loaded, smaller.module) == 0
    again = load_compressed(tmp_path / "small.condensa", loaded)  # small already
    assert difference(again, smaller.module) == 0


def check_random_heads(layout: str, seed: int) -> None:
    """Heads, hidden units of the MLP, and single rows and columns are zero at random."""
    module = network(LAYOUTS[layout][0])
    generator = torch.Generator().manual_seed(seed)
    density = 0.3 + 0.6 * float(torch.rand((), generator=generator))
    module = CompressedModel.compress(
        module, HeadPrune(density, num_heads=HEADS, min_per_layer=seed % 2)
    ).module
    with torch.no_grad():
        for parameter in module.parameters():
            for dim, extent in enumerate(parameter.shape[:2]):
                gone = torch.rand(extent, generator=generator) < 0.2
                parameter.index_fill_(dim, gone.nonzero().flatten(), 0)
    smaller, plan = shrink(module, module.example_input_array)
    assert difference(module, smaller) <= 1e-12
    assert bool(plan) == (numbers(smaller) < numbers(module))


@pytest.mark.parametrize("layout", LAYOUTS)
@FEW
@given(seed=st.integers(0, 1000))
def test_outputs_stay_whatever_is_zero(layout: str, seed: int) -> None:
    check_random_heads(layout, seed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@MANY
@given(seed=st.integers(0, 1000))
def test_outputs_stay_whatever_is_zero_many_times(layout: str, seed: int) -> None:
    check_random_heads(layout, seed)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (FusedAsWide, "FusedAsWide.forward spells out a size that no attribute of it can change"),
        (lambda: Torch(weights=True, batch_first=True), "used by mean"),
        (lambda: Torch(kdim=WIDTH, add_zero_attn=True), "an input or a constant"),
    ],
)
def test_heads_that_have_to_stay_say_why(build, why: str) -> None:  # type: ignore[no-untyped-def]
    """The MLP loses its units all the same."""
    module = network(build)
    with torch.no_grad():
        module.mlps[0][0].weight[:4] = module.mlps[0][0].bias[:4] = 0
    compressed = CompressedModel.compress(module, HeadPrune(0.5))
    smaller = compressed.shrink()
    assert sorted(smaller.plan) == ["mlps.0.0.bias", "mlps.0.0.weight", "mlps.0.3.weight"]
    notes = [row.note for row in smaller.report().rows if "stay" in row.note]
    assert len(notes) == 2 and all(why in note for note in notes)
    assert difference(compressed.module, smaller.module) <= 1e-12


class OwnAttention(nn.MultiheadAttention):
    """Computes as its base does, for all that anybody knows."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(*args, **kwargs)


def test_a_class_of_ones_own_is_not_replaced() -> None:
    module = network(lambda: Torch())
    module.attentions[1].attention = filled(OwnAttention(WIDTH, HEADS))
    compressed = CompressedModel.compress(module, HeadPrune(0.5, scope="layer"))
    smaller = compressed.shrink()
    first, second = (a.attention for a in smaller.module.attentions)
    assert type(first) is FewerHeads and type(second) is OwnAttention
    assert first.num_heads == 2 and second.num_heads == HEADS
    assert list(smaller.stays) == ["attentions.1.attention.in_proj_weight"]
    assert difference(compressed.module, smaller.module) <= 1e-12


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("attentions.0.num_heads", 5, "sets 'attentions.0.num_heads' to 5, where .* holds 4"),
        ("attentions.0.num_heads", 0, "to 0"),
        ("attentions.0.training", 1, "where the module holds False"),
        ("attentions.0.missing", 1, "where the module holds None"),
        ("nowhere.num_heads", 1, "where the module holds None"),
    ],
)
def test_a_plan_only_makes_numbers_smaller(name: str, value: int, words: str) -> None:
    module = network(LAYOUTS["timm"][0])
    with pytest.raises(ValueError, match=words):
        apply_plan(module, {name: value})
    assert module.attentions[0].num_heads == HEADS


# -- torch's own, with fewer heads -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 5, "vdim": 7, "bias": False},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_with_all_heads_it_is_torchs(options: dict[str, object]) -> None:
    own = filled(nn.MultiheadAttention(WIDTH, HEADS, **options))  # type: ignore[arg-type]
    whole = copy.deepcopy(own)
    FewerHeads.adopt(own)
    generator = torch.Generator().manual_seed(0)
    queries, keys = 5, 6
    for batch, needed, averaged in product((None, 2), (False, True), (False, True)):
        shapes = [(queries, WIDTH), (keys, whole.kdim), (keys, whole.vdim)]
        args = [torch.randn(s, generator=generator).double() for s in shapes]
        padding = torch.arange(keys) > 3
        if batch:
            dim = 0 if whole.batch_first else 1
            args = [torch.stack([a, a * 2], dim) for a in args]
            padding = torch.stack([padding, torch.arange(keys) > 4])
        blocked = torch.rand(queries, keys, generator=generator) > 0.7
        blocked[:, 0] = False
        by_head = blocked.repeat((batch or 1) * HEADS, 1, 1)
        for mask in (None, blocked, torch.randn(queries, keys).double(), by_head):
            for pad in (None, padding):
                if pad is not None and mask is not None and mask.is_floating_point():
                    continue  # torch warns of two kinds of masks
                keywords = {
                    "attn_mask": mask,
                    "key_padding_mask": pad,
                    "need_weights": needed,
                    "average_attn_weights": averaged,
                }
                expected, found = whole(*args, **keywords), own(*args, **keywords)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_causal_hint_needs_its_mask() -> None:
    own = nn.MultiheadAttention(WIDTH, HEADS)
    FewerHeads.adopt(own)
    x = torch.zeros(5, 2, WIDTH)
    with pytest.raises(ValueError, match="pass the mask"):
        own(x, x, x, is_causal=True)


def test_dropout_is_random_in_training() -> None:
    own = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    FewerHeads.adopt(own)
    x = torch.randn(5, 2, WIDTH)
    for needed in (False, True):
        first, second = (own.train()(x, x, x, need_weights=needed)[0] for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_an_encoder_knows_padding_and_its_fused_kernels_stay_away() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 9, batch_first=True, norm_first=False)
    module = filled(nn.TransformerEncoder(layer, 2))
    module.example_input_array = torch.zeros(2, 5, WIDTH, dtype=torch.float64)
    compressed = CompressedModel.compress(module, HeadPrune(0.5))
    smaller = compressed.shrink()
    assert numbers(smaller.module) < numbers(module)
    padding = torch.arange(6) > torch.tensor([5, 3, 2])[:, None]
    with torch.no_grad():
        expected = compressed.module.eval()(inputs(), src_key_padding_mask=padding)
        found = smaller.module.eval()(inputs(), src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-12, atol=1e-12)


def test_a_smaller_transformer_is_measured_and_exported(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    module = network(LAYOUTS["torch, batch first"][0]).float()
    module.example_input_array = module.example_input_array.float()
    compressed = CompressedModel.compress(module, HeadPrune(0.5))
    smaller = compressed.shrink()
    x = inputs().float()
    assert profile(smaller, x).total.parameters < profile(compressed, x).total.parameters
    smaller.to_onnx(tmp_path / "small.onnx", x)
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(found), compressed.module(x), rtol=1e-4, atol=1e-5
        )
