"""Two networks trained, compressed and deployed: accuracy, bytes and milliseconds.

    python benchmarks/end_to_end.py --data DATA
    python benchmarks/end_to_end.py --data DATA --retime

The networks are those of `lc_quality.py` at twice the width. Half of the filters of each layer go,
coupled, and weights become int8 under L-C with distillation; then `shrink`, the packed file, and
ONNX in int8 with the codes of θ. Each network is written when it is done, its files stay in the
scratch folder, and ``--retime`` measures their times anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import RESULTS, environment, read_results, silence, update_results
from networks import resnet8, vgg
from onnx import numpy_helper
from ort import session
from peers import fit
from safetensors.torch import save_file
from tasks import SCRATCH, TASKS, Start, TaskModule, dense_start
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_condensa import (
    Compose,
    CompressedModel,
    CondensaCallback,
    Distillation,
    FilterPrune,
    Quantize,
    compare,
    load_compressed,
)

NAME = "end_to_end"
#: Ten epochs of compression, twice budget S of `lc_quality.py`.
NETWORKS = {
    task.name: task
    for task in (
        replace(TASKS["cifar-vgg"], name="wide-vgg", network=partial(vgg, 48), epochs=10),
        replace(
            TASKS["cifar-resnet8"], name="wide-resnet8", network=partial(resnet8, 48), epochs=10
        ),
    )
}


def plain(start: Start, weights: nn.Module | None = None) -> TaskModule:
    """The network in float32: its autocast is for training."""
    module = start.module() if weights is None else weights
    if hasattr(module.network, "net"):
        module.network = module.network.net
    module.to(memory_format=torch.contiguous_format)
    return module.eval()  # type: ignore[return-value]


def train(start: Start) -> CompressedModel:
    """L-C, then removal of what is zero."""
    module = start.module()
    example = start.splits.train.tensors[0][:1]
    module.example_input_array = example
    scheme = Compose([FilterPrune(0.5, scope="layer", coupled=True), Quantize("int8")])
    callback = CondensaCallback(scheme)
    fit(module, start, [callback, Distillation()], start.task.epochs)
    return callback.compressed.shrink(example)


def without_autocast(compressed: CompressedModel, start: Start) -> CompressedModel:
    """The same θ on the network in float32."""
    prefix, short = "network.net.", "network."
    theta = {n.replace(prefix, short, 1): e for n, e in compressed.theta.items()}
    plan = {n.replace(prefix, short, 1): cuts for n, cuts in compressed.plan.items()}
    return CompressedModel(
        plain(start, compressed.module),
        theta,
        compressed.scheme,
        plan,  # type: ignore[arg-type]
    )


def accuracy(path: Path, data: TensorDataset) -> float:
    """In percent, in ONNX Runtime."""
    model = session(path)
    name = model.get_inputs()[0].name
    x, y = data.tensors
    logits = np.concatenate([model.run(None, {name: part.numpy()})[0] for part in x.split(500)])
    return 100 * float((logits.argmax(1) == y.numpy()).mean())


def mismatches(path: Path, compressed: CompressedModel) -> int:
    """Codes of int8 weights in the file that are not those of θ, up to the sign of a channel.

    Batch norm with a negative γ turns the sign of a channel.

    Raises:
        ValueError: If a weight that θ holds as int8 has no counterpart in the file.
    """
    stored = [numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer]
    integers = [a for a in stored if a.dtype == np.int8 and a.ndim > 1]
    wrong = 0
    for name, encoding in compressed.theta.items():
        codes = encoding.leaves[0].codes
        if codes.dtype != torch.int8 or codes.dim() < 2:
            continue
        ours = codes.numpy()
        ways = [a for a in integers if a.shape == ours.shape]
        ways += [a.T for a in integers if a.ndim == 2 and a.T.shape == ours.shape]
        if not ways:
            raise ValueError(f"{path.name} has no int8 weight like {name}")
        wrong += min(_differences(way, ours) for way in ways)
    return wrong


def _differences(found: np.ndarray, codes: np.ndarray) -> int:
    rows, wanted = (a.reshape(len(a), -1).astype(np.int16) for a in (found, codes))
    either = np.minimum((rows != wanted).sum(1), (rows != -wanted).sum(1))
    return int(either.sum())


def files(task: str, folder: Path) -> dict[str, Path]:
    """Where a network's files are."""
    names = ("dense.safetensors", "dense.onnx", "compressed.condensa", "compressed.onnx")
    return {name: folder / f"end-to-end-{task}-{name}" for name in names}


def cell(start: Start, folder: Path) -> dict[str, Any]:
    """Train, compress, write files, and measure accuracy and bytes."""
    task, test = start.task, start.splits.test
    at = files(task.name, folder)
    example = start.splits.train.tensors[0][:1]
    dense = plain(start)
    state = {n: t.contiguous() for n, t in dense.state_dict().items()}
    save_file(state, at["dense.safetensors"])
    CompressedModel(dense, {}, Quantize("int8")).to_onnx(at["dense.onnx"], example)
    compressed = without_autocast(train(start), start)
    compressed.save(at["compressed.condensa"])
    batches = start.splits.train.tensors[0][:1024].split(128)
    path = at["compressed.onnx"]
    compressed.to_onnx(path, example, precision="int8", calibration=list(batches))
    if wrong := mismatches(path, compressed):
        raise RuntimeError(f"{wrong} codes in {path.name} are not those of θ")
    fresh = load_compressed(at["compressed.condensa"], plain(start))
    found = {
        "task": task.name,
        "mismatches": wrong,
        "dense": {
            "test": task.measure(dense, test),
            "ort_test": accuracy(at["dense.onnx"], test),
            "bytes": at["dense.safetensors"].stat().st_size,
            "onnx_bytes": at["dense.onnx"].stat().st_size,
        },
        "compressed": {
            "test": task.measure(fresh, test),
            "ort_test": accuracy(path, test),
            "bytes": at["compressed.condensa"].stat().st_size,
            "onnx_bytes": path.stat().st_size,
        },
    }
    ours = found["compressed"]
    return {**found, "ort_minus_torch": ours["ort_test"] - ours["test"]}  # type: ignore[index]


def timed(found: dict[str, Any], folder: Path, x: Tensor, seconds: float) -> dict[str, Any]:
    """A cell with times at batch 1."""
    at = files(found["task"], folder)

    def call(name: str) -> Callable[[], Any]:
        model = session(at[f"{name}.onnx"])
        feed = {model.get_inputs()[0].name: x.numpy()}
        return lambda: model.run(None, feed)

    compared = compare({n: call(n) for n in ("dense", "compressed")}, min_seconds=seconds)
    for name in compared.seconds:
        timing = compared.timing(name)
        found[name] |= {"ms": 1e3 * timing.median, "iqr_ms": 1e3 * timing.iqr}
    ratio = compared.speedup("compressed", over="dense")
    return {**found, "times": [ratio.median, ratio.low, ratio.high]}


def main() -> None:
    """Run what is not there, and record each network as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10/")
    parser.add_argument("--retime", action="store_true", help="only measure times anew")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        done = {c["task"]: c for c in read_results(NAME, options.out).get("cells", [])}
        if name in done and not options.retime:
            continue
        start = dense_start(NETWORKS[name], 0, options.data)
        found = done[name] if options.retime else cell(start, SCRATCH)
        found = timed(found, SCRATCH, start.splits.test.tensors[0][:1], options.seconds)

        def add(results: dict[str, Any], found: dict[str, Any] = found) -> None:
            kept = [c for c in results.get("cells", []) if c["task"] != found["task"]]
            results.update({"environment": environment(), "cells": [*kept, found]})

        update_results(NAME, add, options.out)
        print(found, flush=True)


if __name__ == "__main__":
    main()
