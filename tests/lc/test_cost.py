"""What a run costs between its C-steps: no waiting for the device, and few buffers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_condensa
from lightning_condensa import Compose, FilterPrune, NeuronPrune, Prune, Quantize, Scheme
from lightning_condensa.lc import LCRun, LCSchedule, PaperSchedule, Schedule

from .problems import Classes, Training

EVERY, WINDOW, STEPS = 10, 4, 60
SCHEMES = {
    "prune": Prune(0.3),
    "quantize": Quantize("int8"),
    "prune+quantize": Compose([Prune(0.3), Quantize("int8")]),
    "neurons+quantize": Compose([NeuronPrune(0.5), Quantize("float16")]),
    "filters": FilterPrune(0.5),
}
SCHEDULES: dict[str, Schedule] = {
    "hard": LCSchedule(every_n_steps=EVERY, window=WINDOW, importance=1.0),
    "soft": LCSchedule(every_n_steps=EVERY, window=WINDOW, importance=1.0, prune_rate=0.5),
    # The paper's last step before a C-step compares two gradients for the logs, and waits.
    "paper": PaperSchedule(steps=7),
}


def training(scheme: Scheme, schedule: Schedule) -> Training:
    problem = Classes()
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=0.05, momentum=0.9)
    return Training(problem, scheme, schedule, optimizer, STEPS)


# -- no waiting ----------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails where a value or a shape that depends on values is asked for."""

    waits = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.is_nonzero,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        masks = func.overloadpacket is torch.ops.aten.index and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if func.overloadpacket in self.waits or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.item(),
        lambda t: bool(t > 0),
        lambda t: t[None][t[None] > 0],
        lambda t: t.nonzero(),
        lambda t: torch.equal(t, t),
    ],
)
def test_the_check_notices_what_waits(wait: Callable[[Tensor], Any]) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.tensor(1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_waits_for_the_device_between_c_steps(scheme: str, schedule: str) -> None:
    train = training(SCHEMES[scheme], SCHEDULES[schedule])
    observed = 1 if schedule == "paper" else 0
    steps = 0
    train.start()
    while train.run.step < STEPS:
        train.backward()
        due = train.run.step + 1 in train.plan.c_steps
        if due and observed:
            train.run.before_step(train.optimizer, only_its_own=True)
        else:
            with NoWaiting():
                train.run.before_step(train.optimizer, only_its_own=True)
        train.optimizer.step()
        if due:
            train.run.after_step([train.optimizer])
        else:
            steps += 1
            with NoWaiting():
                train.run.after_step([train.optimizer])
    assert steps >= 50


def on_meta(train: Training) -> tuple[LCRun, torch.optim.Optimizer]:
    """The same run on tensors that have no values: what needs one, or copies it, fails."""
    weights = {
        n: nn.Parameter(torch.empty_like(p, device="meta"))
        for n, p in train.weights.items()
        if n in train.bound.names
    }
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    run = LCRun(train.bound, train.plan, weights)
    run.load_state_dict(train.run.state_dict())
    return run, torch.optim.SGD(weights.values(), lr=0.1)


@pytest.mark.parametrize("stop", [20, 27, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_between_c_steps_need_no_values(scheme: str, schedule: str, stop: int) -> None:
    train = training(SCHEMES[scheme], SCHEDULES[schedule])
    train.start()
    while train.run.step < stop:
        train.step()
    run, optimizer = on_meta(train)
    while run.step + 1 < STEPS and run.step + 1 not in train.plan.c_steps:
        run.before_step(optimizer, only_its_own=False)
        assert run.after_step([optimizer]) is None
    if run.step + 1 in train.plan.c_steps:
        with pytest.raises((RuntimeError, NotImplementedError)):  # a C-step does
            run.before_step(optimizer, only_its_own=False)
            run.after_step([optimizer])


# -- memory --------------------------------------------------------------------------------------


def held(root: object, apart: set[int]) -> int:
    """Bytes of the tensors that can be reached from an object, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in apart:
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            todo.extend(thing)
        elif hasattr(thing, "__dict__"):
            todo.extend(vars(thing).values())
    return sum(storages.values())


@pytest.mark.parametrize(
    ("scheme", "schedule", "apart_from_window", "in_window"),
    [
        ("prune", "hard", 1, 2),  # the support; squared gradients
        ("prune", "soft", 1, 2),
        ("filters", "hard", 1, 2),
        ("quantize", "hard", 1, 1),  # Δ(θ)
        ("prune+quantize", "hard", 2, 3),
        ("prune+quantize", "soft", 2, 3),
        ("prune", "paper", 2.25, 2.25),  # θ with its mask, μΔ(θ) + λ
    ],
)
def test_buffers_per_parameter(
    scheme: str, schedule: str, apart_from_window: float, in_window: float
) -> None:
    train = training(SCHEMES[scheme], SCHEDULES[schedule])
    apart = {p.untyped_storage().data_ptr() for p in train.weights.values()}
    compressed = sum(train.weights[n].nbytes for n in train.bound.names)
    buffers: dict[bool, set[float]] = {True: set(), False: set()}
    for c_step in train.all():
        due = next((c for c in train.plan.c_steps if c > train.run.step), STEPS)
        near = due - train.run.step < train.plan.window
        observing = near and c_step is None and not train.run.finetuning
        buffers[observing].add(held(train.run, apart) / compressed)
    assert buffers[False] == {apart_from_window}
    if train.plan.proximal:
        assert buffers[True] == {in_window}


GROWTH = """
import gc, os
import torch
from torch import nn
from lightning_condensa import Compose, Prune, Quantize
from lightning_condensa.lc import LCRun, LCSchedule

torch.set_num_threads(1)
network = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))
optimizer = torch.optim.Adam(network.parameters())
bound = Compose([Prune(0.1), Quantize("int8")]).bind(network)
plan = LCSchedule(every_n_steps=1, finetune=0.2).plan(300, projects=True)
weights = dict(network.named_parameters())
run = LCRun(bound, plan, {n: weights[n] for n in bound.names})
run.start()
x = torch.randn(8, 300)
kept = []
resident = []
for step in range(1, 301):
    optimizer.zero_grad()
    network(x).square().mean().backward()
    run.before_step(optimizer, only_its_own=False)
    optimizer.step()
    c_step = run.after_step([optimizer])
    assert c_step is not None
    if step > 200:
        kept.append(c_step)
    del c_step
    if step % 100 == 0:
        gc.collect()
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
print(*resident)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_200_c_steps_take_no_more_memory_than_100() -> None:
    root = str(Path(lightning_condensa.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH],
        env=environment | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, third = map(int, done.stdout.split())
    # One buffer kept by each of a hundred C-steps would be 36 MB.
    assert second - first < 4e6
    assert third - second > 8e6  # the script keeps θ of the last hundred: it can be seen
