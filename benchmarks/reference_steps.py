"""Time of a mini-batch in an L-step of the reference package, beside a plain loop.

`lc_overhead.py` runs it, with ``--reference-python`` in an environment of its own; it needs torch
and ``condensa==0.5.0b0``. The package's loop runs untouched: its loss function, which is ours to
give, reads the clock. The plain loop has the same batches and ``torch.optim.SGD`` with the Nesterov
momentum that the package's own optimizer has.

Prints a line of JSON: ``null`` where the package is not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from block_clock import BLOCK, BlockClock, take_turns
from common import environment
from overhead_cases import CASES, DENSITY, DTYPES, Case, loss_of, plain_seconds
from torch import Tensor

Batches = list[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Case, Batches, Loss], None]


def reference_loop(case: Case, batches: Batches, loss: Loss) -> None:
    """A C-step and an L-step over the batches, in the package's own loop."""
    import condensa  # type: ignore[import-not-found]

    inputs = batches[0][0]
    engine = condensa.opt.LC(
        steps=2,  # the first has no L-step
        l_optimizer=condensa.opt.lc.SGD,
        l_optimizer_params={"momentum": 0.9},
        lr=1e-3,
        mb_iterations_per_l=len(batches),
        mb_iterations_first_l=len(batches),
        mu_init=1e-3,
        mu_multiplier=1.1,
        debugging_flags={"disable_train_stats": True},
    )
    scheme = condensa.schemes.Prune(DENSITY)
    net = case.net(inputs.device.type, inputs.dtype)
    engine.compress(net, scheme.pi, scheme.delta, batches, None, None, loss)


def plain_loop(case: Case, batches: Batches, loss: Loss) -> None:
    """The same mini-batches without L-C."""
    net = case.net(batches[0][0].device.type, batches[0][0].dtype)
    optimizer = case.optimizer_for(net.parameters())
    for inputs, targets in batches:
        value = loss(net(inputs), targets)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def measure(
    case: Case, device: str, dtype: torch.dtype, seconds: float, rounds: int
) -> dict[str, Any]:
    """Time of a mini-batch in both loops, which take turns, and the ratio in every round."""
    blocks = max(round(seconds / BLOCK / plain_seconds(case, device, dtype)), 3)
    inputs = case.inputs(device, dtype)
    batches = [(inputs, inputs[:1])] * (blocks * BLOCK + 1)

    def timed(loop: Loop, clock: BlockClock) -> None:
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            clock.step()
            return loss_of(outputs)

        loop(case, batches, loss)

    runs = [partial(timed, loop) for loop in (plain_loop, reference_loop)]
    times = [take_turns(runs, device) for _ in range(rounds)]
    # The first block allocates.
    plain, reference = ([statistics.median(t[i][1:]) for t in times] for i in range(len(runs)))
    ratios = [r / p for r, p in zip(reference, plain, strict=True)]
    return {
        "case": case.title,
        "plain_ms": 1e3 * statistics.median(plain),
        "ms": 1e3 * statistics.median(reference),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    """Measure the cases that train with SGD, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if find_spec("condensa") is None:
        print("null")
        return
    warnings.filterwarnings("ignore")  # it calls deprecated overloads of `Tensor.add_`
    torch.set_num_threads(1)
    # The package turns this on by itself, after the first plain run.
    torch.backends.cudnn.benchmark = args.device == "cuda"
    cases = (c for c in CASES[args.device] if c.optimizer == "SGD" and args.only in c.title)
    rows = [measure(c, args.device, DTYPES[args.dtype], args.seconds, args.rounds) for c in cases]
    print(json.dumps({"environment": environment(), "rows": rows}))


if __name__ == "__main__":
    main()
