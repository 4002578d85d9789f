"""Every case of ``test_distributed.py``, one after the other in one group of processes.

``python sharded_worker.py WORLD FOLDER`` writes what became of each case to ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from lightning_condensa.deploy.densities import kept_by_pool
from lightning_condensa.functional import threshold
from lightning_condensa.functional.ranks import Ranks, count_nonzero
from lightning_condensa.functional.topk import kth_largest, topk_masks
from lightning_condensa.schemes import (
    BlockPrune,
    Codebook,
    Compose,
    Encoded,
    FilterPrune,
    HeadPrune,
    NeuronPrune,
    NMPrune,
    NotFiniteError,
    Prune,
    Quantize,
    Scheme,
)
from lightning_condensa.schemes.bound import boundaries_of

Layout = tuple[DeviceMesh, Sequence[Placement]]


@lru_cache
def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """All processes in a line, and in a rectangle."""
    world = dist.get_world_size()
    rectangle = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    return init_device_mesh("cpu", (world,)), rectangle


def layouts(dims: int) -> list[Layout]:
    """Ways to place a tensor of ``dims`` dimensions."""
    line, square = meshes()
    return [
        (line, [Shard(0)]),
        (line, [Shard(dims - 1)]),
        (line, [Replicate()]),
        (square, [Shard(0), Shard(0)]),
        (square, [Shard(dims - 1), Shard(0)]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Replicate()]),
        (square, [_StridedShard(0, split_factor=2), Shard(0)]),
    ]


def place(tensor: Tensor, layout: Layout) -> DTensor:
    placed: DTensor = distribute_tensor(tensor.detach().clone(), *layout, src_data_rank=None)
    return placed


def assert_part(ours: Tensor, right: Tensor, weight: Tensor) -> None:
    """What this process holds is its part of ``right``, placed like ``weight``."""
    assert type(ours) is type(weight)
    assert ours.shape == right.shape
    if isinstance(ours, DTensor) and isinstance(weight, DTensor):
        assert ours.placements == weight.placements
        right = place(right, (ours.device_mesh, ours.placements)).to_local()
        ours = ours.to_local()
    assert ours.dtype == right.dtype
    assert torch.equal(ours, right)


def raises(error: type[Exception], words: str, function: Callable[[], object]) -> None:
    try:
        function()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}")


def values(seed: int) -> dict[str, list[Tensor]]:
    """Scores of all kinds in shapes of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (1, 9), (3, 4), (5, 1), (2, 3, 3, 2), (2, 0), (40, 33)]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    types = cycle([torch.float32, torch.bfloat16, torch.float64, torch.float16])
    return {
        "random": noise,
        "few values": [(3 * n).round() / 4 for n in noise],
        "all equal": [torch.full_like(n, -0.5) for n in noise],
        "mostly zero": [torch.where(n > 1.5, n, 0.0) for n in noise],
        "infinite": [torch.where(n > 0.5, math.inf, n).clamp_min(-1) for n in noise],
        "types": [n.to(dtype) for n, dtype in zip(noise, types, strict=False)],
    }


def check_topk(
    full: list[Tensor], scores: list[Tensor], k: int, floors: list[int] | None = None
) -> None:
    absolute = floors is not None
    expected = topk_masks(full, k, floors, absolute=absolute)
    masks = topk_masks(scores, k, floors, absolute=absolute)
    for mask, right, score in zip(masks, expected, scores, strict=True):
        assert_part(mask, right, score)
    if k > 0:
        assert kth_largest(scores, k) == kth_largest(full, k)


def case_topk_in_every_layout() -> None:
    # A small sample takes small tensors through every step of the selection.
    with mock.patch.multiple(threshold, _FEW=64, chunk_length=lambda piece: 32):
        for layout in range(len(layouts(2))):
            for kind in ("few values", "types"):
                full = values(layout)[kind]
                scores = [place(f, layouts(f.dim())[layout]) for f in full]
                total = sum(f.numel() for f in full)
                check_topk(full, scores, round(0.3 * total))


def case_topk_of_mixed_layouts() -> None:
    for seed in range(2):
        for kind, full in values(seed).items():
            ways = [*range(len(layouts(2))), None]  # plain tensors too
            scores = [
                f if way is None else place(f, layouts(f.dim())[way])
                for f, way in zip(full, cycle(ways[seed:] + ways[:seed]), strict=False)
            ]
            total = sum(f.numel() for f in full)
            for k in (0, 1, 40, total - 1, total) if kind == "few values" else (40, total // 2):
                check_topk(full, scores, k, [min(1, f.numel(), k // 9) for f in full])


def case_topk_of_large_tensors() -> None:
    noise = torch.randn(900, 333, generator=torch.Generator().manual_seed(0))
    square = layouts(2)[4]
    for full in ([noise, noise[:7] * 2], [noise.round(decimals=1), torch.ones(3, 5)]):
        scores: list[Tensor] = [place(full[0], square), full[1]]
        for k in (1, 15_000, 200_000):
            check_topk(full, scores, k, [0, 1])


def case_communication_does_not_grow_with_the_tensors() -> None:
    sent = []

    def counting(tensor: Tensor, *rest: Any, **options: Any) -> None:
        sent.append(tensor.numel())
        dist.distributed_c10d.all_reduce(tensor, *rest, **options)

    noise = torch.rand(500, 400, generator=torch.Generator().manual_seed(1))
    kinds = {
        "random": noise,
        "ties": (noise * 4).floor(),
        "all equal": torch.ones(500, 400),
        "ascending": noise.flatten().sort().values.view(500, 400),
    }
    for name, full in kinds.items():
        for layout in layouts(2)[1:6:2]:
            score = place(full, layout)
            sent.clear()
            with (
                mock.patch.multiple(threshold, _FEW=256),
                mock.patch.object(dist, "all_reduce", counting),
                CommDebugMode() as communication,
            ):
                topk_masks([score], 50_000)
            assert communication.get_total_counts() == len(sent)  # and nothing but these
            assert 0 < sum(sent) < 10_000, (name, layout, sent)


def case_meshes() -> None:
    _, square = meshes()
    generator = torch.Generator().manual_seed(5)
    full = [torch.randn(9, 4, generator=generator).round() for _ in range(3)]
    # As with FSDP and tensor parallelism: some weights lie on one axis of the mesh only.
    scores = [
        place(full[0], (square, [Shard(0), Shard(1)])),
        place(full[1], (square["dp"], [Shard(0)])),
        place(full[2], (square["tp"], [Shard(1)])),
    ]
    for k in (1, 20, 50, 107):
        check_topk(full, scores, k, [0, 0, 1])
    if dist.get_world_size() == 4:
        raises(ValueError, "on one mesh", lambda: topk_masks(scores[1:], 3))
    partial = DTensor.from_local(full[0], square["dp"], [Partial()], run_check=False)
    raises(ValueError, "not summed yet", lambda: topk_masks([partial], 3))
    assert count_nonzero([*scores, full[0]]) == [int(f.count_nonzero()) for f in (*full, full[0])]
    assert Ranks().totals([3]) == [3]


# -- schemes ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of several kinds and awkward sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 13)
        self.head = nn.Linear(12, 3)
        self.wide = nn.Linear(16, 1, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.up1 = nn.ConvTranspose1d(4, 5, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.head.weight.mul_(1e-3)  # below its floor under a global threshold


SCHEMES: dict[str, Scheme] = {
    "prune by layer, floors": Prune(0.3, scope="layer", min_per_layer=3),
    "prune, floors": Prune(0.2, min_per_layer=4),
    "neuron": NeuronPrune(0.5),
    "neuron, aligned": NeuronPrune(0.6, align=4, criterion="l1"),
    "filter": FilterPrune(0.5),
    "block": BlockPrune(0.4, (2, 4), criterion="min", include="first"),
    "block of columns": BlockPrune(0.4, (1, 3)),
    "n:m": NMPrune(1, 2, include=["first", "wide", "conv"]),
    "int8": Quantize("int8"),
    "int8 by tensor": Quantize("int8", granularity="tensor"),
    "int4": Quantize("int4", symmetric=False),
    "float8": Quantize("float8_e4m3fn"),
    "codebook": Codebook(4),
    "ternary by tensor": Quantize("ternary", granularity="tensor"),
    "prune, int8": Compose([Prune(0.3), Quantize("int8")]),
    "prune, ternary": Compose([Prune(0.3), Quantize("ternary")]),
    "prune, binary": Compose([Prune(0.3), Quantize("binary", granularity="tensor")]),
    "filter, n:m, bfloat16": Compose(
        [FilterPrune(0.5), NMPrune(1, 2, include="conv"), Quantize("bfloat16")]
    ),
}


def assert_same(theta: Encoded, right: Encoded, weight: Tensor) -> None:
    for name in ("codes", "mask", "scale"):
        ours, theirs = getattr(theta, name), getattr(right, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_part(ours, theirs, ours if name == "scale" else weight)
    assert_part(theta.decode(), right.decode(), weight)
    moved = theta.to(torch.device("cpu"))
    assert (moved.nnz, theta.density, theta.storage_bits) == (
        right.nnz,
        right.density,
        right.storage_bits,
    )


def refuses(scheme: Scheme, layout: int) -> bool:
    """Whether strided shards would have to move, which torch cannot do for all of them."""
    first = scheme.stages[0]
    cut = isinstance(first, BlockPrune) and first.block_size[0] > 1
    return layout == 7 and (cut or isinstance(first, FilterPrune))


def check_scheme(scheme: Scheme) -> None:
    module = Net()
    full = {n: p.detach() for n, p in module.named_parameters()}
    bound = scheme.bind(module)
    expected = bound.pi(full)
    moved = {n: w + 0.1 * w.roll(1, 0) for n, w in full.items()}
    held = bound.pi(moved, boundaries=boundaries_of(expected))
    for layout in (0, 1, 3, 4, 5, 7):
        weights = {n: place(w, layouts(w.dim())[layout]) for n, w in full.items()}
        if refuses(scheme, layout):
            raises(ValueError, "without cutting", lambda w=weights: bound.pi(w))
            continue
        theta = bound.pi(weights)
        for name in bound.names:
            assert_same(theta[name], expected[name], weights[name])
        assert kept_by_pool(bound, theta) == kept_by_pool(bound, expected)
        if boundaries_of(expected):
            weights = {n: place(w, layouts(w.dim())[layout]) for n, w in moved.items()}
            theta = bound.pi(weights, boundaries=boundaries_of(theta))
            for name in bound.names:
                assert_same(theta[name], held[name], weights[name])


def case_attention_heads() -> None:
    module = nn.ModuleDict({"torch": nn.MultiheadAttention(12, 3), "shared": nn.Module()})
    module["shared"].num_heads = 4
    for name, (rows, inputs) in {"q": (8, 5), "k": (4, 5), "v": (4, 5), "o": (5, 8)}.items():
        module["shared"].add_module(f"{name}_proj", nn.Linear(inputs, rows))
    torch.manual_seed(0)
    full = {n: torch.randn(p.shape) for n, p in module.named_parameters()}
    bound = HeadPrune(0.4).bind(module)
    expected = bound.pi(full)
    for layout in (0, 1, 2, 3, 4, 5, 7):
        weights = {n: place(w, layouts(w.dim())[layout]) for n, w in full.items()}
        theta = bound.pi(weights)
        for name in bound.names:
            assert_same(theta[name], expected[name], weights[name])
        assert kept_by_pool(bound, theta) == kept_by_pool(bound, expected)
    weights = {n: place(w, layouts(w.dim())[0]) if "q" in n else w for n, w in full.items()}
    theta = bound.pi(weights)
    for name in bound.names:
        assert_same(theta[name], expected[name], weights[name])


def case_effects_of_sharded_groups_are_refused() -> None:
    layer = nn.Linear(6, 8)
    bound = NeuronPrune(0.5, criterion="taylor").bind(layer)
    weights = {n: place(p, layouts(p.dim())[0]) for n, p in layer.named_parameters()}
    stage, targets = bound.stages[0]
    assert bound.pi(weights)["weight"].nnz == 4 * 6  # without gradients like l2
    raises(ValueError, "weight is sharded", lambda: stage.effects(targets, weights, weights))


def case_mixed_placements() -> None:
    module = Net()
    full = {n: p.detach() for n, p in module.named_parameters()}
    for scheme in (Prune(0.2), NeuronPrune(0.5), FilterPrune(0.4, align=2)):
        bound = scheme.bind(module)
        expected = bound.pi(full)
        for sharded in (0, 1):  # weights, or biases, are plain
            weights = {
                n: place(w, layouts(w.dim())[1]) if i % 2 == sharded else w
                for i, (n, w) in enumerate(full.items())
            }
            theta = bound.pi(weights)
            for name in bound.names:
                assert_same(theta[name], expected[name], weights[name])


def case_blocks_that_every_shard_cuts() -> None:
    bound = BlockPrune(0.5, (4, 4)).bind(nn.Linear(5, 5))
    weights = {"weight": place(torch.rand(5, 5), layouts(2)[0])}
    raises(ValueError, "weight (5, 5), placed", lambda: bound.pi(weights))


def case_divergence_is_seen_by_all() -> None:
    full = {"weight": torch.ones(8, 6), "bias": torch.ones(8)}
    full["weight"][7, 5] = torch.nan  # on the last process only
    weights = {n: place(w, layouts(w.dim())[0]) for n, w in full.items()}
    for scheme in (Prune(0.5), NeuronPrune(0.5), NMPrune(), Quantize("int8")):
        bound = scheme.bind(nn.Linear(6 if not isinstance(scheme, NMPrune) else 8, 8))
        raises(NotFiniteError, "weight holds values", lambda b=bound: b.pi(weights))


def case_scales_by_groups_of_inputs() -> None:
    torch.manual_seed(0)
    module = nn.Linear(10, 7)
    full = {n: p.detach().clone() for n, p in module.named_parameters()}
    for dtype in ("int4", "ternary", "binary", "float8_e4m3fn"):
        bound = Quantize(dtype, granularity="group:4").bind(module)
        expected = bound.pi(full)
        kept = boundaries_of(expected)
        for layout in (0, 2, 3, 5, 7):
            weights = {n: place(w, layouts(w.dim())[layout]) for n, w in full.items()}
            for theta in (bound.pi(weights), bound.pi(weights, boundaries=kept)):
                assert_same(theta["weight"], expected["weight"], weights["weight"])
        along_inputs = {n: place(w, layouts(w.dim())[1]) for n, w in full.items()}
        raises(ValueError, "needs whole rows of inputs", lambda b=bound, w=along_inputs: b.pi(w))


def case_fully_sharded() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(9, 15), nn.ReLU(), nn.Linear(15, 4))
    full = {n: p.detach().clone() for n, p in module.named_parameters()}
    scheme = Compose([Prune(0.1), Quantize("int8")])
    expected = scheme.bind(module).pi(full)
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=meshes()[0])
    module(torch.rand(3, 9)).sum().backward()
    weights = dict(module.named_parameters())
    bound = scheme.bind(module)
    theta = bound.pi(weights)
    for name in bound.names:
        assert_same(theta[name], expected[name], weights[name])


def case_fully_sharded_and_tensor_parallel() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 6), nn.Linear(6, 5))
    full = {n: p.detach().clone() for n, p in module.named_parameters()}
    bounds = [s.bind(module) for s in (Prune(0.3), NeuronPrune(0.4), Quantize("int8"))]
    expected = [bound.pi(full) for bound in bounds]
    square = meshes()[1]
    parallelize_module(module, square["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (module[0], module[2], module[3], module):
        fully_shard(layer, mesh=square["dp"])
    weights = dict(module.named_parameters())
    assert len({w.device_mesh for w in weights.values()}) == 2
    for bound, right in zip(bounds, expected, strict=True):
        theta = bound.pi(weights)
        for name in bound.names:
            assert_same(theta[name], right[name], weights[name])


CASES: dict[str, Callable[[], None]] = {
    name.removeprefix("case_").replace("_", " "): function
    for name, function in list(globals().items())
    if name.startswith("case_")
} | {f"scheme: {name}": partial(check_scheme, scheme) for name, scheme in SCHEMES.items()}


def run(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, case in CASES.items():
        try:
            case()
            results[name] = "passed"
        except Exception:
            # The processes may no longer be in step: the others fail too, in time.
            results[name] = traceback.format_exc()
            break
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main(world: int, folder: Path) -> None:
    mp.start_processes(run, (world, folder), world, start_method="fork")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
