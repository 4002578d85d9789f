"""What L-C costs: step time with and without the callback, and the C-step itself.

    python benchmarks/lc_overhead.py [--reference-python PYTHON] [--device cuda --dtype bf16]

*Steps.* Trainer runs of the same module with and without the callback take turns, a few steps each;
a ratio is of the medians of a round. With the default schedule a step is one of two kinds:
*masked*, where the gradients of pruned weights are zeroed (so in the fine-tune phase, too), and
*window*, the steps just before a C-step, where squared gradients are summed besides. They are timed
in blocks of one kind; what the callback does at a C-step is timed apart. The cost of a whole run
follows from these parts and from how many of each the default schedule has.

*Reference.* The same ratio for the L-step of ``condensa==0.5.0b0``, where it is installed, or with
the interpreter that ``--reference-python`` names (`reference_steps.py`).

*C-steps.* Time and memory of the projection alone (`c_steps.py`).

On the CPU the script starts itself again with an allocator that keeps what it has. By default glibc
may give memory back to the kernel in the middle of every step, or not, as the heap happens to lie:
one and the same step of AdamW takes 7 or 18 ms, which would hide what is to be measured.

A run replaces the parts that it measured in the result file; on CUDA that is a file of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import c_steps
import pytorch_lightning as pl
import torch
from block_clock import BLOCK, BlockClock, now, take_turns
from common import RESULTS, environment, silence, update_results
from overhead_cases import CASES, DENSITY, DTYPES, Case, loss_of, plain_seconds
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_condensa import CondensaCallback, Prune
from lightning_condensa.lc import LCSchedule

#: Optimizer steps of the run whose whole cost is reckoned.
RUN_STEPS = 1500

#: glibc: never unmap, never trim.
STEADY_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "67108864",
}

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-true"}
PARTS = ("steps", "reference", "c_steps")


class Module(pl.LightningModule):
    """Trains a case, by the clock."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, clock: BlockClock) -> None:
        super().__init__()
        self.case = case
        self.net = case.net(device, dtype)
        self.clock = clock

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss that needs every output."""
        self.clock.step()
        return loss_of(self.net(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the case's optimizer."""
        return self.case.optimizer_for(self.parameters())


class Observed(CondensaCallback):
    """The default L-C, with a C-step after every other block; notes what C-steps take.

    Attributes:
        c_steps: Seconds of each, and of all else that the callback does then.
    """

    def __init__(self) -> None:
        schedule = LCSchedule(every_n_steps=2 * BLOCK, window=BLOCK, finetune=0.0)
        super().__init__(Prune(DENSITY), schedule=schedule)
        self.c_steps: list[float] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Time those that make a C-step."""
        due = (batch_idx + 1) % (2 * BLOCK) == 0
        started = now(pl_module.device.type) if due else 0.0
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if due:
            self.c_steps.append(now(pl_module.device.type) - started)


def fit(
    case: Case,
    device: str,
    dtype: str,
    blocks: int,
    callbacks: list[pl.Callback],
    clock: BlockClock,
) -> None:
    """Train a new network."""
    steps = blocks * BLOCK + 1  # the last one only ends the last block
    batch = case.inputs(device, DTYPES[dtype])
    loader: DataLoader[Tensor] = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        precision=PRECISIONS[dtype],  # type: ignore[arg-type]
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(case, device, DTYPES[dtype], clock), loader)


def one_round(case: Case, device: str, dtype: str, blocks: int) -> dict[str, float]:
    """Median seconds of a plain, a masked and a window step, and of a C-step.

    The first block of each run is left out: it allocates.
    """
    callback = Observed()
    without_and_with: list[list[pl.Callback]] = [[], [callback]]
    runs = [partial(fit, case, device, dtype, blocks, callbacks) for callbacks in without_and_with]
    plain, ours = take_turns(runs, device)
    # Masked blocks and windows take turns, and each window ends with a C-step.
    window = [w - c / BLOCK for w, c in zip(ours[1::2], callback.c_steps, strict=True)]
    return {
        "plain": statistics.median(plain[1:]),
        "masked": statistics.median(ours[2::2]),
        "window": statistics.median(window),
        "c_step": statistics.median(callback.c_steps),
    }


def run_seconds(parts: dict[str, float]) -> float:
    """A run of `RUN_STEPS` optimizer steps with the default schedule, C-steps included."""
    plan = LCSchedule().plan(RUN_STEPS)
    window = sum(min(plan.window, b - a) for a, b in pairwise(plan.c_steps))
    counts = {"masked": RUN_STEPS - window, "window": window, "c_step": len(plan.c_steps)}
    return sum(count * parts[kind] for kind, count in counts.items())


def measure(case: Case, device: str, dtype: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Step times with and without the callback, and their ratios in every round.

    Args:
        case: What to train.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Key of `DTYPES`.
        seconds: How long each run of a round shall take, about; at least four blocks are made.
        rounds: Pairs of runs.
    """
    per_block = BLOCK * plain_seconds(case, device, DTYPES[dtype])
    blocks = 2 * max(round(seconds / per_block / 2), 2)
    found = [one_round(case, device, dtype, blocks) for _ in range(rounds)]
    ratios = {
        "masked": [r["masked"] / r["plain"] for r in found],
        "window": [r["window"] / r["plain"] for r in found],
        "run": [run_seconds(r) / (RUN_STEPS * r["plain"]) for r in found],
    }
    return {
        "case": case.title,
        "network": f"{case.network}, batch {case.batch:,}",
        "label": case.weights,
        "optimizer": case.optimizer,
        "weights": sum(p.numel() for p in case.net("meta", torch.float32).parameters()),
        "blocks": blocks,
        "plain_ms": 1e3 * statistics.median(r["plain"] for r in found),
        "c_step_ms": 1e3 * statistics.median(r["c_step"] for r in found),
        **{f"{kind}_ratio": statistics.median(values) for kind, values in ratios.items()},
        "ratios": ratios,
    }


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Step times of every case."""
    rows = []
    for case in CASES[args.device]:
        if args.only in case.title:
            row = measure(case, args.device, args.dtype, args.seconds, args.rounds)
            print(json.dumps(row), flush=True)
            rows.append(row)
    common = {"environment": environment(), "device": args.device}
    return {**common, "run_steps": RUN_STEPS, "rows": rows}


def reference(args: argparse.Namespace) -> dict[str, Any] | None:
    """Step times of the reference, ``None`` where it is not installed."""
    script = Path(__file__).with_name("reference_steps.py")
    command = [args.reference_python, str(script)]
    for option in ("device", "dtype", "rounds", "seconds", "only"):
        command += [f"--{option}", str(getattr(args, option))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        print(f"condensa is not installed for {args.reference_python}: not measured")
        return None
    for row in found["rows"]:
        print(json.dumps(row))
    return found


def projections(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of the C-step."""
    rows: list[dict[str, Any]] = []
    for label, numel in c_steps.SIZES[args.device].items():
        if args.only in label:
            found = c_steps.measure(numel, args.device, args.dtype, args.repeats)
            rows.append({"label": label, "weights": numel, "ways": found})
            print(json.dumps(rows[-1]), flush=True)
    growth = c_steps.growth(rows)
    print(json.dumps(growth))
    common = {"environment": environment(), "device": args.device}
    return {**common, "rows": rows, "growth": growth}


def main() -> None:
    """Measure, print and write ``results/lc_overhead.json``, or ``lc_overhead_cuda_*.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run, about")
    parser.add_argument("--repeats", type=int, default=5, help="of each C-step")
    parser.add_argument("--reference-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--only", default="", help="cases with this text; prints, writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.device == "cpu" and not STEADY_HEAP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY_HEAP)
    silence()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    measures = {"steps": steps, "reference": reference, "c_steps": projections}
    name = "lc_overhead" if args.device == "cpu" else f"lc_overhead_{args.device}_{args.dtype}"
    for part in args.parts:
        found = measures[part](args)
        if found is not None and not args.only:
            update_results(name, partial(_put, part, found), args.results)


def _put(part: str, found: dict[str, Any], payload: dict[str, Any]) -> None:
    payload[part] = found


if __name__ == "__main__":
    main()
