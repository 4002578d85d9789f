from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.deploy import chunks
from lightning_condensa.deploy.packed import (
    Packed,
    inspect_packed,
    pack,
    unpack,
    write_packed,
)
from lightning_condensa.deploy.packed_reader import PackedReader
from lightning_condensa.deploy.stored_tensor import decoded
from lightning_condensa.deploy.words import DTYPES
from lightning_condensa.schemes import Encoded, Encoding, SumOfProducts

VALUE_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COUNTS = st.integers(1, 3)
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (3, 0, 2), (1, 1, 1), (2_000,)]),
    st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern: NaNs with payloads, infinities, denormals, negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    high = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator)
    return high.to(torch.uint8).view(dtype).reshape(shape)


def thin(tensor: Tensor, density: float, seed: int) -> Tensor:
    """``tensor`` with all but about ``density`` of it set to zero bits."""
    keep = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < density
    bits = INTEGERS[tensor.itemsize]
    return torch.where(keep, tensor.view(bits), 0).view(tensor.dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(bits(a), bits(b))


def assert_same_leaf(first: Encoded, second: Encoded) -> None:
    assert (first.dtype, first.group) == (second.dtype, second.group)
    assert_same_bits(first.codes, second.codes)
    assert (first.scale is None) == (second.scale is None)
    if first.scale is not None and second.scale is not None:
        assert_same_bits(first.scale, second.scale)


def assert_same(a: Packed, b: Packed) -> None:
    assert list(a.encoded) == list(b.encoded)
    for name, first in a.encoded.items():
        second = b.encoded[name]
        assert [len(term) for term in first.terms] == [len(term) for term in second.terms]
        assert first.shape == second.shape
        for leaf, other in zip(first.leaves, second.leaves, strict=True):
            assert_same_leaf(leaf, other)
        assert_same_bits(first.decode(), second.decode())
    assert list(a.rest) == list(b.rest)
    for name, tensor in a.rest.items():
        assert_same_bits(tensor, b.rest[name])
    assert a.aliases == b.aliases
    assert a.metadata == b.metadata


@st.composite
def encodeds(draw: st.DrawFn) -> Encoded:
    shape = draw(SHAPES)
    seed = draw(st.integers(0, 2**32 - 1))
    codes = random_bits(shape, draw(st.sampled_from(VALUE_DTYPES)), seed)
    codes = thin(codes, draw(st.sampled_from([0.0, 0.001, 0.05, 0.5, 0.99, 1.0])), seed + 1)
    if draw(st.booleans()):  # few values: an alphabet
        few = random_bits((draw(st.integers(1, 300)),), codes.dtype, seed + 3)
        few[0] = 0
        picked = torch.randint(len(few), shape, generator=torch.Generator().manual_seed(seed))
        codes = few.view(INTEGERS[codes.itemsize])[picked].view(codes.dtype)
    scale = group = None
    if shape and draw(st.booleans()):
        group = draw(st.integers(1, 5))
        scale_shape = tuple(draw(st.sampled_from([1, n, math.ceil(n / group)])) for n in shape)
        scale = random_bits(scale_shape, torch.float32, seed + 2)
    elif draw(st.booleans()):
        kept = draw(st.integers(0, len(shape)))
        scale_shape = tuple(
            size if draw(st.booleans()) else 1 for size in shape[len(shape) - kept :]
        )
        scale = random_bits(scale_shape, torch.float32, seed + 2)
    return Encoded(codes, draw(st.sampled_from(FLOATS)), scale, group=group)


@st.composite
def sums(draw: st.DrawFn) -> Encoding:
    """Sums of finite leaves and of products of such, as schemes make them."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(rows, columns), (columns, 1, rows)]))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def leaf(*sizes: int) -> Encoded:
        if draw(st.booleans()):
            codes = torch.randint(-3, 4, sizes, generator=generator, dtype=torch.int8)
            return Encoded(codes, dtype, torch.rand(sizes[0], *[1] * (len(sizes) - 1)))
        return Encoded.dense(torch.randn(sizes, generator=generator).to(dtype))

    def product() -> Encoding:
        rank = draw(st.integers(0, min(rows, columns)))
        return SumOfProducts.product(leaf(rows, rank), leaf(rank, columns), shape)

    terms = [product() if draw(st.booleans()) else leaf(*shape) for _ in range(draw(COUNTS))]
    return SumOfProducts.sum(terms)


@st.composite
def packeds(draw: st.DrawFn) -> Packed:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    names = draw(st.lists(text, unique=True, max_size=8))
    cuts = sorted(draw(st.tuples(*[st.integers(0, len(names))] * 2)))
    encoded = {name: draw(st.one_of(encodeds(), sums())) for name in names[: cuts[0]]}
    rest = {
        name: random_bits(
            draw(SHAPES), draw(st.sampled_from(list(DTYPES.values()))), draw(st.integers(0, 99))
        )
        for name in names[cuts[0] : cuts[1]]
    }
    targets = names[: cuts[1]]
    aliases = {name: draw(st.sampled_from(targets)) for name in names[cuts[1] :] if targets}
    reserved = {"format", "version", "hash"}
    metadata = draw(st.dictionaries(text.filter(lambda key: key not in reserved), text, max_size=3))
    return Packed(encoded, rest, aliases, metadata)


@settings(deadline=None)
@given(packeds())
def test_round_trip(packed: Packed) -> None:
    data = pack(packed)
    assert_same(unpack(data), packed)
    assert pack(packed) == data


@settings(deadline=None)
@given(packeds())
def test_tensors_decode_to_the_same_bits(packed: Packed) -> None:
    tensors = PackedReader(pack(packed)).tensors(max_bytes=2**30)
    assert list(tensors) == [*packed.encoded, *packed.rest]
    for name, tensor in packed.rest.items():
        assert_same_bits(decoded(tensors[name]), tensor)
    for name, encoding in packed.encoded.items():
        found, expected = decoded(tensors[name]), encoding.decode()
        # What bits a NaN has depends on the width of the processor's operation.
        assert torch.equal(found.isnan(), expected.isnan())
        assert_same_bits(found.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


@settings(deadline=None, max_examples=30)
@given(packeds())
def test_round_trip_without_zstandard(packed: Packed) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "zstandard", None)
        data = pack(packed)
        assert_same(unpack(data), packed)
    assert_same(unpack(data), packed)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_survive(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = [-0.0, math.inf, -math.inf, math.nan, tiny, -tiny, torch.finfo(dtype).max]
    codes = torch.zeros(1000, dtype=dtype)
    codes[::137][: len(special)] = torch.tensor(special, dtype=dtype)
    payload = torch.full((1,), 255, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
    codes[999] = payload[0]
    for packed in (Packed({"w": Encoded(codes, dtype)}), Packed(rest={"w": codes})):
        assert_same(unpack(pack(packed)), packed)


def test_gaps_of_many_times_255() -> None:
    codes = torch.zeros(200_000, dtype=torch.int8)
    codes[[254, 255, 510, 766, 100_000, 199_999]] = 1
    packed = Packed({"w": Encoded(codes, torch.float32)})
    assert_same(unpack(pack(packed)), packed)


def test_non_contiguous_and_trainable_tensors() -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4)).t()
    conjugate = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj()
    back = unpack(pack(Packed({"w": Encoded.dense(weight)}, {"c": conjugate})))
    assert torch.equal(back.encoded["w"].codes, weight)
    assert not back.encoded["w"].codes.requires_grad
    assert torch.equal(back.rest["c"], conjugate.resolve_conj())


@pytest.mark.parametrize("shape", [(1,), (0,), (2, 3)])
def test_expanded_tensors(shape: tuple[int, ...]) -> None:
    expanded = torch.tensor(2.0).expand(shape)
    back = unpack(pack(Packed({"w": Encoded.dense(expanded)}, {"r": expanded})))
    assert torch.equal(back.encoded["w"].codes, expanded)
    assert torch.equal(back.rest["r"], expanded)


def test_loaded_tensors_share_no_memory() -> None:
    rest = {"a": torch.ones(4), "b": torch.ones(4)}
    back = unpack(pack(Packed({"w": Encoded.dense(torch.ones(4))}, rest)))
    back.rest["a"].zero_()
    back.encoded["w"].codes.zero_()
    assert back.rest["b"].sum() == 4
    assert back.rest["a"].untyped_storage().nbytes() == 16


def test_masks_are_those_of_the_stored_codes() -> None:
    codes = torch.zeros(100, dtype=torch.int8)
    codes[3] = 5
    kept = torch.zeros(100, dtype=torch.bool)
    kept[[3, 4]] = True  # the second was quantized to zero
    dense = Encoded.dense(torch.arange(1.0, 101.0))
    back = unpack(pack(Packed({"s": Encoded(codes, torch.float32, mask=kept), "d": dense})))
    assert back.encoded["d"].mask is None
    mask = back.encoded["s"].mask
    assert mask is not None
    assert mask.nonzero().flatten().tolist() == [3]


def test_negative_zeros_are_stored_and_in_the_mask() -> None:
    codes = torch.zeros(100)
    codes[7] = -0.0
    back = unpack(pack(Packed({"w": Encoded.dense(codes)}))).encoded["w"]
    assert torch.signbit(back.codes).nonzero().flatten().tolist() == [7]
    assert back.mask is not None
    assert back.mask[7]


def test_storage_is_the_smaller_one(tmp_path: Path) -> None:
    encoded = {
        f"{density}": Encoded(
            thin(torch.ones(10_000, dtype=torch.float16) / 3, density, 0), torch.float32
        )
        for density in (0.0, 0.05, 1.0)
    }
    encoded["empty"] = Encoded.dense(torch.empty(0))
    write_packed(tmp_path / "m.condensa", Packed(encoded))
    info = inspect_packed(tmp_path / "m.condensa")
    assert [t.storage for t in info.tensors] == ["sparse", "sparse", "dense", "dense"]


@pytest.mark.parametrize("density", [0.005, 0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_size_is_near_the_entropy_bound(dtype: torch.dtype, density: float) -> None:
    count = 1_000_000
    codes = thin(random_bits((count,), dtype, 0), density, 1)
    nnz = int(torch.count_nonzero(codes.view(torch.int8 if dtype == torch.int8 else torch.int16)))
    share = nnz / count
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    bound = count * entropy / 8 + nnz * dtype.itemsize
    size = len(pack(Packed({"w": Encoded(codes, torch.float32)})))
    assert size < 1.05 * bound


@pytest.mark.parametrize("density", [0.005, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("values", [2, 4, 16, 256])
def test_size_of_few_values_is_near_the_entropy_bound(values: int, density: float) -> None:
    count = 400_000
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(values, generator=generator)
    codes = thin(book[torch.randint(values, (count,), generator=generator)], density, 1)
    share = int(codes.count_nonzero()) / count
    entropy = 0.0
    if share < 1:
        entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    bound = count * (entropy + share * math.log2(values)) / 8 + 6 * values
    packed = Packed({"w": Encoded(codes, torch.float32)})
    assert len(pack(packed)) < 1.1 * bound + 500
    assert_same(unpack(pack(packed)), packed)


def test_overhead_of_a_small_model(tmp_path: Path) -> None:
    shapes = {"conv1": (32, 1, 3, 3), "conv2": (64, 32, 3, 3), "fc1": (128, 1024), "fc2": (10, 128)}
    encoded = {
        f"{name}.weight": Encoded(thin(random_bits(s, torch.int8, 0), 0.01, 1), torch.float32)
        for name, s in shapes.items()
    }
    rest = {f"{name}.bias": torch.randn(s[0]) for name, s in shapes.items()}
    write_packed(tmp_path / "m.condensa", Packed(encoded, rest))
    assert inspect_packed(tmp_path / "m.condensa").overhead_bytes < 600


def test_sums_and_products_are_described_as_what_they_are(tmp_path: Path) -> None:
    left, right = Encoded.dense(torch.rand(6, 2)), Encoded.dense(torch.rand(2, 9))
    product = SumOfProducts.product(left, right, (6, 3, 3))
    correction = Encoded(thin(torch.ones(6, 3, 3).half(), 0.1, 0), torch.float32)
    total = SumOfProducts.sum([product, correction])
    write_packed(tmp_path / "m.condensa", Packed({"p": product, "s": total}))
    info = inspect_packed(tmp_path / "m.condensa")
    assert [(t.storage, t.value_type, t.bits, t.nnz) for t in info.tensors] == [
        ("product", "F32", 32, 30),
        ("sum", "F32+F16", 32, 30 + correction.nnz),
    ]
    assert sum(t.raw_bytes for t in info.tensors) == sum(s.raw_bytes for s in info.streams)
    assert sum(t.bytes for t in info.tensors) == pytest.approx(sum(s.bytes for s in info.streams))
    assert "product" in str(info)


@pytest.mark.parametrize("shape", [(6, 8), (54,)])
def test_parts_that_do_not_fit_are_not_stored(shape: tuple[int, ...]) -> None:
    left, right = Encoded.dense(torch.ones(6, 2)), Encoded.dense(torch.ones(2, 9))
    theta = SumOfProducts(((left, right), (Encoded.dense(torch.ones(6, 9)),)), torch.Size(shape))
    with pytest.raises(ValueError, match="factors and terms of 'w' do not make up a weight"):
        pack(Packed({"w": theta}))
