from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives import (
    CallableObjective,
    FileSize,
    FLOPs,
    Latency,
    MemoryFootprint,
    Objective,
    Parameters,
    Several,
    Throughput,
    as_objective,
)
from lightning_condensa.schemes import (
    Add,
    Codebook,
    Compose,
    FilterPrune,
    LowRank,
    NeuronPrune,
    Prune,
    Quantize,
    Scheme,
)


def compress(module: nn.Module, scheme: Scheme | None = None) -> CompressedModel:
    return CompressedModel.compress(module, scheme or Prune(1.0))


# -- bytes and parameters --------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_memory_footprint_is_the_file_on_disk_and_the_papers_count(
    tmp_path: Path, dtype: str
) -> None:
    compressed = compress(network(), Compose([Prune(0.1), Quantize(dtype)]))
    size = compressed.save(tmp_path / "model.condensa")
    on_disk = (tmp_path / "model.condensa").stat().st_size
    assert size == on_disk == MemoryFootprint()(compressed) == FileSize()(compressed)
    kept = round(0.1 * (8 * 27 + 288 * 10))
    survivors = sum(int(torch.count_nonzero(e.codes)) for e in compressed.theta.values())
    assert survivors == kept if dtype == "float16" else survivors <= kept
    values = survivors * 2 if dtype == "float16" else survivors + 4 * (8 + 10)
    dense = 4 * (8 + 8 + 10)  # two biases and γ; β is zero
    assert MemoryFootprint("values")(compressed) == values + dense
    for count in ("file", "values"):
        details = MemoryFootprint(count).details(compressed)
        assert details["value"] == MemoryFootprint(count)(compressed)
        assert (details["file_bytes"], details["value_bytes"]) == (on_disk, values + dense)


def test_memory_footprint_rejects_other_counts() -> None:
    with pytest.raises(ValueError, match="count must be 'file' or 'values', got 'bits'"):
        MemoryFootprint("bits")  # type: ignore[arg-type]


def test_parameters_count_non_zeros() -> None:
    module = nn.Linear(10, 4)
    assert Parameters()(compress(module)) == 44
    assert Parameters()(compress(module, Prune(0.25))) == 10 + 4
    assert Parameters()(compress(module, NeuronPrune(0.5))) == 20 + 2
    assert Parameters()(compress(module, LowRank(rank=1))) == 14 + 4


# -- FLOPs -----------------------------------------------------------------------------------------

BATCH = 2


@pytest.mark.parametrize(
    ("module", "shape", "multiplications"),
    [
        (nn.Linear(8, 12), (8,), 8 * 12),
        (nn.Linear(8, 12), (5, 8), 5 * 8 * 12),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (4, 8, 8), 16 * 6 * 4 * 9),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), 9 * 6 * 9),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3), (4, 5, 5), 25 * 4 * 6 * 9),
        (nn.LSTM(8, 16, batch_first=True), (5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, num_layers=2, batch_first=True), (5, 8), 5 * 3 * 16 * (8 + 16 + 32)),
        (
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            (6, 16),
            6 * 16 * 16 * 4 + 2 * 6 * 6 * 16 + 2 * 6 * 16 * 32,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_flops_of_dense_layers(
    module: nn.Module, shape: tuple[int, ...], multiplications: int
) -> None:
    for weight in module.parameters():
        nn.init.uniform_(weight, 0.5, 1.0)  # none is zero by chance
    scheme = Prune(1.0, types=("Linear", "_ConvNd", "RNNBase", "MultiheadAttention"))
    objective = FLOPs(torch.rand(BATCH, *shape))
    details = objective.details(compress(module, scheme))
    assert details == {"value": 2 * BATCH * multiplications, "dense": 2 * BATCH * multiplications}
    assert objective(compress(module, scheme)) == 2 * BATCH * multiplications


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


def test_flops_of_the_products_that_read_a_weight_scale_with_its_density() -> None:
    x = torch.rand(BATCH, 6, 16)
    projection, products = 2 * BATCH * 6 * 16 * 16, 2 * BATCH * 2 * 6 * 6 * 16
    pruned = compress(SelfAttention(), Prune(0.5, include="out_proj"))
    assert FLOPs(x).details(pruned) == {
        "value": projection * 3.5 + products,
        "dense": projection * 4 + products,
    }
    pruned = compress(SelfAttention(), Prune(0.25, include="in_proj"))
    assert FLOPs(x)(pruned) == projection * (3 * 0.25 + 1) + products


def test_effective_flops_of_a_network() -> None:
    compressed = compress(network(), FilterPrune(0.5))
    convolution, linear = 2 * 36 * 8 * 27, 2 * 288 * 10
    assert FLOPs(torch.rand(1, 3, 8, 8)).details(compressed) == {
        "value": convolution / 2 + linear,
        "dense": convolution + linear,
    }


def test_flops_of_factors_are_those_of_two_small_layers() -> None:
    module = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    low = compress(module, LowRank(rank=2, include="^0"))
    assert FLOPs(torch.rand(1, 40))(low) == pytest.approx(2 * (2 * 70 + 600))
    # A codebook with corrections stores more values than the weight has, and computes with as many.
    more = compress(module, Add([Codebook(2), Prune(0.1)]))
    assert FLOPs(torch.rand(1, 40))(more) == 2 * (1200 + 600)


def test_effective_flops_of_a_pruned_lstm() -> None:
    module = nn.LSTM(8, 16, batch_first=True)
    pruned = compress(module, Prune(0.125, include="weight_ih"))
    flops = FLOPs(torch.rand(BATCH, 5, 8))(pruned)
    assert flops == 2 * BATCH * 5 * 64 * (8 * 0.125 + 16)


def test_a_module_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.tied(nnf.relu(self.inner(self.inner(x))))
            return out

    details = FLOPs(torch.rand(1, 4)).details(compress(Twice(), Prune(0.5)))
    assert details == {"value": 3 * 16, "dense": 3 * 32}


def test_flops_leaves_the_module_alone() -> None:
    compressed = compress(network())
    compressed.module.train()
    before = {n: v.clone() for n, v in compressed.module.state_dict().items()}
    FLOPs(torch.rand(1, 3, 8, 8))(compressed)
    assert compressed.module.training
    after = compressed.module.state_dict()
    assert all(torch.equal(v, after[n]) for n, v in before.items())


# -- example inputs --------------------------------------------------------------------------------


def test_the_modules_example_is_used_unless_one_is_given() -> None:
    module = nn.Linear(4, 4)
    module.example_input_array = torch.rand(3, 4)
    compressed = compress(module)
    assert FLOPs()(compressed) == 3 * 32
    assert FLOPs(torch.rand(5, 4))(compressed) == 5 * 32
    assert Latency(min_seconds=0.01).details(compressed)["batch"] == 3


@pytest.mark.parametrize("objective", [FLOPs(), Latency(), Throughput()])
def test_a_missing_example_is_a_clear_error(objective: Objective) -> None:
    with pytest.raises(ValueError, match=rf"pass {objective.name}\(example=\.\.\.\)"):
        objective(compress(nn.Linear(2, 2)))


def test_several_inputs() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
            return self.left(x) @ y * scale

    example = (torch.rand(2, 4), torch.rand(3, 5), 0.5)
    assert FLOPs(example)(compress(Bilinear())) == 2 * (2 * 4 * 3 + 2 * 3 * 5)


# -- time ------------------------------------------------------------------------------------------


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def test_latency_and_throughput_measure_one_pass() -> None:
    compressed = compress(Sleeper(0.004))
    example = torch.rand(8, 2)
    figures = Latency(example, threads=1, min_seconds=0.05).details(compressed)
    assert set(figures) == {
        *("value", "median", "iqr", "minimum", "mean", "turns"),
        *("engine", "threads", "batch", "device"),
    }
    assert 0.004 <= figures["minimum"] <= figures["median"] == figures["value"]
    assert figures["median"] < 0.03
    assert figures["turns"] >= 5
    assert (figures["threads"], figures["batch"], figures["device"]) == (1, 8, "cpu")
    throughput = Throughput(example, threads=1, min_seconds=0.05).details(compressed)
    assert throughput["value"] == pytest.approx(8 / throughput["median"])
    assert throughput["value"] < 8 / 0.004


class Busy(nn.Module):
    """Takes longer while others use the machine."""

    others = 1

    def __init__(self, work: float) -> None:
        super().__init__()
        self.work = work
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.work * Busy.others)
        return x


def test_beside_the_dense_model_what_the_machine_does_drops_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.rand(8, 2)
    dense, half = Busy(0.006), compress(Busy(0.003))
    settings = {"example": x, "threads": 1, "min_seconds": 0.05}
    latency = Latency(**settings).beside(dense, {"Latency": 10.0})
    throughput = Throughput(**settings).beside(dense, {"Throughput": 10.0})
    for _ in range(2):
        monkeypatch.setattr(Busy, "others", 1)
        first = latency.details(half)
        assert first["value"] == 10.0 / first["speedup"][1]
        monkeypatch.setattr(Busy, "others", 10)
        later = latency.details(half)
        assert later["median"] > 2 * first["median"]
        assert later["value"] == pytest.approx(5.0, rel=0.3)
        assert throughput(half) == pytest.approx(20.0, rel=0.3)
        # What is made ready in one process does not go to another one.
        latency, throughput = (pickle.loads(pickle.dumps(o)) for o in (latency, throughput))


def test_counts_are_the_same_beside_the_dense_model() -> None:
    objective = Several([MemoryFootprint(), Latency(torch.rand(2, 3, 8, 8), min_seconds=0.01)])
    module = network()
    told = objective.beside(module, {"MemoryFootprint": 1.0, "Latency": 7.0})
    compressed = CompressedModel.compress(module, Prune(0.1))
    assert told.parts[0] is objective.parts[0]
    assert told(compressed) == objective(compressed)
    found = told.details(compressed)["objectives"]["Latency"]
    assert found["value"] == 7.0 / found["speedup"][1]
    assert "speedup" not in objective.details(compressed)["objectives"]["Latency"]


def calls_of(latency: Latency, compressed: CompressedModel) -> list[str]:
    """What a latency has run: the layers of the module that it prepared."""
    ran: list[str] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            ran.append(str(module))

    with nn.modules.module.register_module_forward_hook(note):
        latency(compressed)
    return ran[-2:]


def test_zero_units_are_taken_out_before_timing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    latency = Latency(torch.rand(4, 16), min_seconds=0.01)
    scheme = NeuronPrune(0.25, include="0.weight")
    compressed = CompressedModel.compress(module, scheme)
    assert [line.split(", bias")[0] for line in calls_of(latency, compressed)] == [
        "Linear(in_features=16, out_features=16",
        "Linear(in_features=16, out_features=8",
    ]
    assert module[0].out_features == compressed.module[0].out_features == 64
    low = CompressedModel.compress(module, LowRank(rank=2, include="2.weight"))
    assert [line.split(", bias")[0] for line in calls_of(latency, low)] == [
        "Linear(in_features=64, out_features=2",
        "Linear(in_features=2, out_features=8",
    ]


class Branching(nn.Module):
    """Its way depends on values: its channels cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.second(-x)


def test_what_cannot_be_traced_is_timed_at_its_full_size() -> None:
    compressed = compress(Branching(), NeuronPrune(0.25, include="first.weight"))
    latency = Latency(torch.rand(4, 4), min_seconds=0.01)
    with pytest.warns(UserWarning, match="timed at its full size: the forward pass of Branching"):
        ran = calls_of(latency, compressed)
    assert ran[0].startswith("Linear(in_features=4, out_features=8")


def test_a_larger_model_is_slower() -> None:
    x = torch.rand(64, 32)
    small = compress(nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 32)))
    large = compress(nn.Sequential(nn.Linear(32, 4096), nn.Linear(4096, 32)))
    latency = Latency(x, threads=1, min_seconds=0.05)
    throughput = Throughput(x, threads=1, min_seconds=0.05)
    assert latency(large) > 2 * latency(small)
    assert throughput(large) < throughput(small) / 2


def test_latency_restores_modes_and_threads_even_after_an_error() -> None:
    module = network()
    module.train()
    module[1].eval()  # a frozen batch norm
    compressed = compress(module)
    threads = torch.get_num_threads()
    Latency(torch.rand(2, 3, 8, 8), threads=1, min_seconds=0.01)(compressed)
    with pytest.raises(RuntimeError):
        Latency(torch.rand(2, 5, 8, 8), min_seconds=0.01)(compressed)
    assert [m.training for m in compressed.module] == [True, False, True, True, True]
    assert compressed.module.training
    assert torch.get_num_threads() == threads


def test_latency_runs_in_eval_mode() -> None:
    compressed = compress(network().train())
    before = compressed.module[1].running_mean.clone()
    Latency(torch.rand(2, 3, 8, 8), min_seconds=0.01)(compressed)
    assert torch.equal(compressed.module[1].running_mean, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "threads must be"),
        ({"threads": 1.5}, "threads must be"),
        ({"min_seconds": 0}, "min_seconds must be"),
        ({"min_seconds": float("nan")}, "min_seconds must be"),
    ],
)
def test_bad_timing_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Latency(**settings)  # type: ignore[arg-type]


# -- callables -------------------------------------------------------------------------------------


def test_callables_become_objectives() -> None:
    def layers(compressed: CompressedModel) -> int:
        return len(compressed.theta)

    objective = as_objective(layers, "max")
    assert (objective.name, objective.direction, objective(compress(network()))) == (
        *("layers", "max"),
        2.0,
    )
    assert objective.details(compress(network())) == {"value": 2.0}
    assert as_objective(lambda c: torch.tensor(3), "min")(compress(network())) == 3.0
    assert CallableObjective.direction == "min"


def test_objectives_pass_through() -> None:
    objective = Throughput()
    assert as_objective(objective, None) is objective
    assert as_objective(objective, "max") is objective
    assert [o.direction for o in (MemoryFootprint(), FLOPs(), Latency(), Parameters())] == [
        "min"
    ] * 4


@pytest.mark.parametrize(
    ("objective", "direction", "message"),
    [
        (Throughput(), "min", "direction='min' contradicts Throughput, which is maximized"),
        (len, None, "a callable objective needs direction='min' or direction='max'"),
        (len, "up", "got direction='up'"),
        ("bytes", "min", "objective must be one of .*'memory'.*, got 'bytes'"),
        (None, None, "objective must be an Objective such as MemoryFootprint"),
    ],
)
def test_what_is_no_objective(objective: object, direction: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_objective(objective, direction)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None])
def test_callables_must_return_finite_numbers(value: object) -> None:
    objective = as_objective(lambda c: value, "min")  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="must return a finite number"):
        objective(compress(nn.Linear(2, 2)))
