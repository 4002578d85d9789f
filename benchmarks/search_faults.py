"""A search whose driver and workers are killed at random: nothing finished is lost or repeated.

Run ``python benchmarks/search_faults.py --kills 50 --storage sqlite postgresql``. Each search runs
undisturbed once; then again with ``kill -9`` at random moments, of the driver (which is started
again) or of its worker, whose trial the search then retries by itself: a second kill of a worker
waits until a trial has ended. Then both are compared trial by trial. Kills during the first seconds
of a driver hit its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import torch
from common import RESULTS, write_results
from known_cliff import search, start
from servers import postgres

from lightning_condensa.search import ProcessPool


def drive(directory: Path, storage: str, trials: int, seconds: float) -> None:
    """Run the search, or what is left of it, in this process and one worker."""
    torch.set_num_threads(1)
    module, data = start(seconds)
    with ProcessPool(1, threads=1) as pool:
        task = search(
            directory,
            max_trials=trials,
            storage=storage,
            study_name=directory.name,
            executor=pool,
        )
        (directory / "ready").touch()
        task.fit(module, **data)


class Driver:
    """A driver in a process of its own.

    Args:
        arguments: Of `drive`.
    """

    def __init__(self, *arguments: object) -> None:
        self._ready = Path(str(arguments[0])) / "ready"
        self._ready.unlink(missing_ok=True)
        command = [sys.executable, __file__, "drive", *map(str, arguments)]
        with (self._ready.parent / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_ready(self) -> None:
        """Wait until the search begins."""
        while not self._ready.exists() and self.process.poll() is None:
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Worker processes of the driver."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        # Children belong to the thread that started them: those of all threads count.
        listed = [p.read_text().split() for p in path.parents[1].glob("*/children")]
        children = [int(pid) for part in listed for pid in part]
        return [pid for pid in children if b"spawn_main" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def finished(directory: Path) -> dict[int, dict[str, Any]]:
    """Records that trials left in their directories, by number."""
    paths = directory.glob("trials/*/trial.json")
    records = [json.loads(p.read_text()) for p in paths]
    return {r["number"]: r for r in records}


def disturb(directory: Path, arguments: tuple[object, ...], kills: int, seed: int) -> list[str]:
    """Run the search to its end, with up to ``kills`` kills; says what was killed."""
    rng = random.Random(seed)
    done: list[str] = []
    driver = Driver(directory, *arguments)
    while True:
        if rng.random() < 0.8:
            driver.wait_ready()
        ends = time.monotonic() + rng.uniform(0, 5)
        while time.monotonic() < ends and driver.process.poll() is None:
            time.sleep(0.01)
        if len(done) >= kills:
            driver.process.wait()
        if (code := driver.process.poll()) is not None:
            if code:
                raise RuntimeError((directory / "log.txt").read_text()[-3000:])
            return done
        workers = driver.workers()
        if workers and rng.random() < 0.5:
            os.kill(rng.choice(workers), signal.SIGKILL)
            done.append("worker")
            before = len(finished(directory))
            while len(finished(directory)) == before and driver.process.poll() is None:
                time.sleep(0.05)
        else:
            driver.process.kill()
            driver.process.wait()
            done.append("driver")
            driver = Driver(directory, *arguments)


def trials_of(storage: str, name: str) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study that count, in the order of the search."""
    study = optuna.load_study(study_name=name, storage=storage)
    counted = [t for t in study.trials if t.user_attrs.get("status") != "lost"]
    return sorted(counted, key=lambda t: int(t.user_attrs["index"]))


def compare(storage: str, kills: int, trials: int, seconds: float, seed: int) -> dict[str, Any]:
    """One search undisturbed, one with kills, and what differs."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        address = stack.enter_context(postgres()) if storage == "postgresql" else None
        address = address or f"sqlite:///{folder}/study.db"
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        began = time.monotonic()
        for directory in (calm, wild):
            directory.mkdir()
        if Driver(calm, address, trials, seconds).process.wait():
            raise RuntimeError((calm / "log.txt").read_text()[-3000:])
        undisturbed = time.monotonic() - began
        killed = disturb(wild, (address, trials, seconds), kills, seed)
        left, right = (trials_of(address, d.name) for d in (calm, wild))
        records = finished(wild)
        complete = optuna.trial.TrialState.COMPLETE
        numbers = [t.number for t in right]
        same = [
            a.params == b.params
            and a.value == b.value
            and a.user_attrs["metric"] == b.user_attrs["metric"]
            for a, b in zip(left, right, strict=True)
        ]
        best = [
            optuna.load_study(study_name=d.name, storage=address).best_trial for d in (calm, wild)
        ]
        return {
            "storage": storage,
            "trials": trials,
            "kills": len(killed),
            "kills of the driver": killed.count("driver"),
            "kills of a worker": killed.count("worker"),
            "finished": len(records),
            "finished, present once": sum(numbers.count(n) == 1 for n in records),
            "complete": sum(t.state == complete for t in right),
            "different points": len({str(t.params) for t in right}),
            "same as undisturbed": sum(same),
            "same best": best[0].params == best[1].params and best[0].value == best[1].value,
            "seconds": [round(undisturbed), round(time.monotonic() - began - undisturbed)],
        }


def main() -> None:
    """Run the comparison on each storage and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--storage", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=0.5, help="that each fit sleeps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for storage in options.storage:
        rows.append(compare(storage, options.kills, options.trials, options.seconds, options.seed))
        print(rows[-1], flush=True)
    write_results("search_faults", {"rows": rows}, options.results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]:
        drive(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
