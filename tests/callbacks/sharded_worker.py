"""Every case of ``test_sharded.py`` without a Trainer, in one group of processes.

``python sharded_worker.py WORLD FOLDER all`` writes what became of each case to
``FOLDER/RANK.json``; ``quick`` leaves some out.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from lightning_condensa.callbacks import MaskedFineTune
from lightning_condensa.callbacks.checks import check_inference_mode
from lightning_condensa.callbacks.sharded import gathered
from lightning_condensa.callbacks.snapshot import Snapshot
from lightning_condensa.callbacks.swap import WeightSwap
from lightning_condensa.deploy import CompressedModel, load_compressed, load_theta
from lightning_condensa.functional.placement import local, reshard, whole
from lightning_condensa.lc import LCRun, make_schedule
from lightning_condensa.schemes import Codebook, Compose, Encoded, Prune, Quantize, Scheme

STEPS, SAVED = 12, 7
PRUNE = Prune(0.1)
BOTH = Compose([Prune(0.2), Quantize("int8")])


@lru_cache
def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """All processes in a line, and in a rectangle."""
    world = dist.get_world_size()
    rectangle = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    return init_device_mesh("cpu", (world,)), rectangle


def network() -> nn.Sequential:
    """Layers that no number of processes divides evenly; of four, one has none of the head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 22), nn.Tanh(), nn.Linear(22, 14), nn.Tanh(), nn.Linear(14, 3)
    )


def alone() -> tuple[nn.Module, int, int]:
    """The network, and which part of how many of the data it sees."""
    return network(), 0, 1


def sharded() -> tuple[nn.Module, int, int]:
    """FSDP2; the outermost module keeps whole parameters after a forward pass."""
    module = network()
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=meshes()[0])
    return module, dist.get_rank(), dist.get_world_size()


def parallel() -> tuple[nn.Module, int, int]:
    """FSDP2 and tensor parallelism."""
    module, mesh = network(), meshes()[1]
    parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=mesh["dp"])
    return module, mesh["dp"].get_local_rank(), mesh["dp"].size()


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.02)


@lru_cache
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 10, generator=generator)
    return x, (x[:, :3] @ torch.randn(3, 3, generator=generator)).argmax(1)


class Training:
    """A training loop around an L-C run."""

    def __init__(
        self,
        build: Callable[[], tuple[nn.Module, int, int]],
        scheme: Scheme,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        preset: str = "default",
        **schedule: object,
    ) -> None:
        self.module, self.place, self.places = build()
        self.bound = scheme.bind(self.module)
        plan = make_schedule(preset, schedule).plan(
            STEPS, prunes=self.bound.prunes, projects=self.bound.projects
        )
        named = dict(self.module.named_parameters())
        self.run = LCRun(self.bound, plan, {n: named[n] for n in self.bound.names})
        self.optimizer = optimizer(self.module)

    def start(self) -> None:
        self.run.start()

    def train(self, until: int = STEPS) -> None:
        x, y = data()
        while self.run.step < until:
            batch = torch.arange(24 * (self.run.step % 2), 24 * (self.run.step % 2) + 24)
            mine = batch.chunk(self.places)[self.place]
            self.optimizer.zero_grad()
            functional.cross_entropy(self.module(x[mine]), y[mine]).backward()
            self.run.before_step(self.optimizer, only_its_own=False)
            self.optimizer.step()
            self.run.after_step([self.optimizer])

    def state(self) -> dict[str, Any]:
        """Everything, as it is written: whole, by the first process."""
        return gathered(
            {
                "run": self.run.state_dict(),
                "module": copied(self.module.state_dict()),
                "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            }
        )

    def load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(placed_as(state["module"][name], parameter))
        parameters = list(self.module.parameters())
        for i, values in state["optimizer"]["state"].items():
            self.optimizer.state[parameters[i]] = {
                key: placed_as(value, parameters[i]) for key, value in values.items()
            }
        self.run.load_state_dict(state["run"])


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def placed_as(value: Any, reference: Tensor) -> Any:
    """A whole tensor of an optimizer's state, sharded like its parameter."""
    if not isinstance(reference, DTensor) or value.shape != reference.shape:
        return value
    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def held(engine: Any) -> dict[str, int]:
    """Elements of all buffers that this process holds, by parameter."""
    sizes: dict[str, int] = {}
    lagrangian = getattr(engine, "_lagrangian", None)
    importance = getattr(engine, "_importance", None)
    for buffers in (
        getattr(engine, "_factors", {}),
        getattr(engine, "_targets", {}),
        {} if importance is None else importance._squares,
        {} if lagrangian is None else {n: local(a) for n, a in lagrangian._anchor.items()},
        {} if lagrangian is None else {n: local(e.codes) for n, e in lagrangian.theta.items()},
    ):
        for name, buffer in buffers.items():
            assert not isinstance(buffer, DTensor)
            sizes[name] = max(sizes.get(name, 0), buffer.numel())
    return sizes


def assert_close(theta: Mapping[str, Encoded], right: Mapping[str, Encoded]) -> None:
    """The same support, and weights that differ by the order of summation only."""
    assert theta.keys() == right.keys()
    for name, encoded in theta.items():
        ours, theirs = encoded.whole().decode(), right[name].decode()
        assert torch.equal(ours != 0, theirs != 0), name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def on_disk(state: object, folder: Path) -> Any:
    """What other processes read when the first has written a state."""
    path = folder / "state.pt"
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    loaded = torch.load(path, weights_only=True)
    dist.barrier()
    return loaded


# -- L-C runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a run is made of."""

    scheme: Scheme
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    preset: str
    schedule: Mapping[str, object]

    def on(self, build: Callable[[], tuple[nn.Module, int, int]]) -> Training:
        return Training(build, self.scheme, self.optimizer, self.preset, **self.schedule)


SETTINGS = {
    "prune, momentum": Setting(PRUNE, momentum, "default", {"l_steps": 5, "window": 2}),
    "soft prune, int8, adamw": Setting(
        BOTH, adamw, "default", {"l_steps": 4, "prune_rate": 0.5, "window": 2}
    ),
    "ternary, codebook, momentum": Setting(
        Compose([Quantize("ternary", include="^0"), Codebook(4, include="^[24]")]),
        momentum,
        "default",
        {"l_steps": 4},
    ),
    "paper, momentum": Setting(BOTH, momentum, "paper", {"steps": 4, "mu_init": 0.1}),
}


def check_run(
    setting: Setting, build: Callable[[], tuple[nn.Module, int, int]], folder: Path
) -> None:
    expected = setting.on(alone)
    expected.start()
    expected.train()
    theta = expected.run.finish()

    training = setting.on(build)
    training.start()
    training.train(SAVED)
    sizes = held(training.run._engine)
    if training.run.bound.prunes:
        assert sizes == {n: local(p).numel() for n, p in training.run.parameters.items()}
    if setting.preset == "paper":
        assert sizes
    saved = on_disk(training.state(), folder)
    in_place = training.run.state_dict()
    training.run.load_state_dict(in_place)  # sharded as it is
    training.train()
    ours = training.run.finish()
    assert_close(ours, theta)
    for name, gap in training.run.relative_gaps(ours).items():
        assert abs(gap - expected.run.relative_gaps(theta)[name]) < 1e-4

    continued = setting.on(build)
    continued.load(saved)
    continued.train()
    pairs = zip(continued.module.parameters(), training.module.parameters(), strict=True)
    assert all(torch.equal(local(a), local(b)) for a, b in pairs)
    for name, encoded in continued.run.finish().items():
        assert type(encoded.codes) is type(training.run.parameters[name].detach())
        assert torch.equal(local(encoded.decode()), local(ours[name].decode()))


def case_gradients_that_are_not_summed_yet(folder: Path) -> None:
    """Replicated weights, a batch that is sharded: ``DTensor``'s own data parallelism."""

    def build() -> tuple[nn.Module, int, int]:
        module = network()
        return distribute_module(module, meshes()[0]), 0, 1

    setting = SETTINGS["paper, momentum"]
    expected, training = setting.on(alone), setting.on(build)
    x, y = data()
    mesh = meshes()[0]
    rows = (24 // mesh.size()) * mesh.size()
    for each in (expected, training):
        each.start()
        for _ in range(STEPS):
            each.optimizer.zero_grad()
            inputs, labels = x[:rows], y[:rows]
            if each is training:
                inputs = distribute_tensor(inputs, mesh, [Shard(0)], src_data_rank=None)
                labels = distribute_tensor(labels, mesh, [Shard(0)], src_data_rank=None)
            logits = each.module(inputs).log_softmax(1)
            picked = logits * functional.one_hot(labels, 3)
            (-picked.sum() / rows).backward()
            if each is training:
                gradient = each.module[0].weight.grad
                assert isinstance(gradient, DTensor)
                assert isinstance(gradient.placements[0], Partial)
            each.run.before_step(each.optimizer, only_its_own=False)
            each.optimizer.step()
            each.run.after_step([each.optimizer])
    assert_close(training.run.finish(), expected.run.finish())


# -- what the callback does with the results -------------------------------------------------------


def case_whole_parameters_do_not_outlive_a_swap(folder: Path) -> None:
    module, _, _ = sharded()
    x, _ = data()
    before = copied(dict(module.named_parameters()))
    with torch.no_grad():
        expected = module(x)
    assert not isinstance(module[4].weight, DTensor)  # FSDP2 expects a backward pass
    swap = WeightSwap(module, ["0.weight", "4.weight"])
    zeros = {n: torch.zeros_like(p) for n, p in before.items()}
    swap.swap_in({n: zeros[n] for n in ("0.weight", "4.weight")})
    with torch.no_grad():
        assert torch.equal(module(x), whole(before["4.bias"]).expand(48, 3))
    swap.swap_out()
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    reshard(module)
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(local(parameter), local(before[name]))


def case_inference_mode_is_refused(folder: Path) -> None:
    parameters = dict(sharded()[0].named_parameters())
    check_inference_mode(parameters)
    with torch.inference_mode():
        check_inference_mode(dict(network().named_parameters()))
        try:
            check_inference_mode(parameters)
        except ValueError as raised:
            assert "inference_mode=False" in str(raised)
        else:
            raise AssertionError("no ValueError")


def case_compressed_model(folder: Path) -> None:
    plain, (module, _, _) = network(), sharded()
    expected, compressed = (
        CompressedModel(m, theta, BOTH)
        for m in (plain, module)
        for theta in [BOTH.bind(m).pi(dict(m.named_parameters()))]
    )
    for each in (expected, compressed):
        load_theta(each.module, each.theta)
    assert isinstance(module[0].weight, DTensor)
    assert compressed.value_bytes == expected.value_bytes
    assert str(compressed.report()) == str(expected.report())
    assert compressed.file_bytes() == expected.file_bytes()
    state, right = compressed.state_dict(), expected.state_dict()
    assert state.keys() == right.keys()
    assert all(type(t) is Tensor and torch.equal(t, right[n]) for n, t in state.items())
    size = compressed.save(folder / "sharded.condensa")
    alike = folder / f"plain-{dist.get_rank()}.condensa"
    assert size == expected.save(alike)
    assert (folder / "sharded.condensa").read_bytes() == alike.read_bytes()
    x, _ = data()
    loaded = load_compressed(folder / "sharded.condensa", network())
    assert torch.equal(loaded(x), plain(x))


def case_snapshot(folder: Path) -> None:
    module, _, _ = sharded()
    theta = BOTH.bind(module).pi(dict(module.named_parameters()))
    snapshot = Snapshot.take(0.5, 3, theta, module)
    assert all(isinstance(t, DTensor) for t in snapshot.rest.values())
    bias = module[2].bias.detach().clone()
    with torch.no_grad():
        module[2].bias.zero_()
    restored = Snapshot.from_state(on_disk(gathered(snapshot.state_dict()), folder), module)
    for each in (snapshot, restored):
        module.load_state_dict(each.rest, strict=False)
        load_theta(module, each.theta)
        assert torch.equal(local(module[2].bias), local(bias))
        for name, encoded in each.theta.items():
            assert local(encoded.codes).numel() == local(theta[name].codes).numel()
            decoded = local(theta[name].decode())
            assert torch.equal(local(dict(module.named_parameters())[name]), decoded)


def case_masked_finetune(folder: Path) -> None:
    pruned, trainer = sharded()[0], cast(Any, None)
    load_theta(pruned, PRUNE.bind(pruned).pi(dict(pruned.named_parameters())))
    masks = {n: local(p) != 0 for n, p in pruned.named_parameters() if p.dim() > 1}
    callback, resumed = MaskedFineTune(), MaskedFineTune()
    callback.on_train_start(trainer, cast(Any, pruned))
    resumed.load_state_dict(on_disk(callback.state_dict(), folder))
    dense, _, _ = sharded()
    resumed.on_train_start(trainer, cast(Any, dense))
    x, y = data()
    functional.cross_entropy(dense(x), y).backward()
    resumed.on_before_optimizer_step(trainer, cast(Any, dense), adamw(dense))
    for name, parameter in dense.named_parameters():
        if name in masks:
            assert parameter.grad is not None
            assert not local(parameter.grad)[~masks[name]].any()
            assert local(parameter.grad)[masks[name]].all()


def case_only_the_first_process_gathers(folder: Path) -> None:
    tensor = torch.arange(10.0)
    placed = distribute_tensor(tensor, meshes()[0], [Shard(0)], src_data_rank=None)
    copies = distribute_tensor(tensor, meshes()[0], [Replicate()], src_data_rank=None)
    state = gathered({"a": [placed, 3], "b": {"c": copies, "d": tensor}})
    assert state["a"][1] == 3 and state["b"]["d"] is tensor
    for whole_one in (state["a"][0], state["b"]["c"]):
        if dist.get_rank() == 0:
            assert type(whole_one) is Tensor and torch.equal(whole_one, tensor)
        else:
            assert whole_one is None


CASES: dict[str, Callable[[Path], None]] = {
    name.removeprefix("case_").replace("_", " "): function
    for name, function in list(globals().items())
    if name.startswith("case_")
}
RUNS = {
    build: {
        f"{name}, {build.__name__}": partial(check_run, s, build) for name, s in SETTINGS.items()
    }
    for build in (sharded, parallel)
}


def chosen(world: int, extent: str) -> Mapping[str, Callable[[Path], None]]:
    """All cases, or those that say most about this number of processes."""
    if extent == "all":
        return CASES | RUNS[sharded] | RUNS[parallel]
    return CASES | RUNS[sharded] if world == 2 else RUNS[parallel]


def run(rank: int, world: int, folder: Path, extent: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, case in chosen(world, extent).items():
        try:
            case(folder)
            results[name] = "passed"
        except Exception:
            # The processes may no longer be in step: the others fail too, in time.
            results[name] = traceback.format_exc()
            break
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main(world: int, folder: Path, extent: str) -> None:
    mp.start_processes(run, (world, folder, extent), world, start_method="fork")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
