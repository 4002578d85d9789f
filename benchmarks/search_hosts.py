"""A search over several hosts, one of which dies in mid-trial.

Run ``python benchmarks/search_hosts.py`` as root. Hosts are network namespaces with addresses of
their own, joined by a bridge. The search and a Dask scheduler run outside, a worker on each host;
they talk over TCP and share the search's folder. When the last host has begun its second trial, its
worker is killed with ``kill -9``, and nothing starts it again. Each trial notes where it begins and
ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
from common import RESULTS, environment, update_results
from distributed import Client, get_worker
from hosts import Host, hosts
from known_cliff import KnownCliff, search, start

from lightning_condensa.search import DaskExecutor

_PATIENCE = 180.0


class Noting(KnownCliff):
    """Notes in a file which trial begins and ends in which network namespace.

    Args:
        seconds: How long a fit sleeps.
        notes: The file, which all hosts share.
    """

    def __init__(self, seconds: float, notes: Path) -> None:
        super().__init__(seconds)
        self.notes = notes

    def _note(self, event: str) -> None:
        trial = Path(self.trainer.default_root_dir).name
        namespace = os.readlink("/proc/self/ns/net")  # noqa: PTH115 - no path at all
        with self.notes.open("a") as file:
            file.write(f"{trial} {event} {get_worker().address} {namespace}\n")

    def on_fit_start(self) -> None:
        """Note it, and sleep."""
        self._note("begins")
        super().on_fit_start()

    def on_fit_end(self) -> None:
        """Note it."""
        self._note("ends")


class Killer(threading.Thread):
    """Kills a worker in its second trial.

    Args:
        process: The worker.
        address: Its host's.
        notes: What trials have noted.
        delay: Seconds between the trial's beginning and the kill.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], address: str, notes: Path, delay: float
    ) -> None:
        super().__init__(daemon=True)
        self.process, self.address, self.notes, self.delay = process, address, notes, delay
        self.trial = ""

    def run(self) -> None:
        """Wait for the trial, and kill."""
        while self.process.poll() is None:
            begun = [n for n in read(self.notes) if n[1] == "begins" and n[2] == self.address]
            if len(begun) == 2:
                time.sleep(self.delay)
                self.trial = begun[-1][0]
                os.kill(self.process.pid, signal.SIGKILL)
                return
            time.sleep(0.05)


def read(notes: Path) -> list[tuple[str, str, str, str]]:
    """Trial, event, address of the host and its namespace, in the order of events."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    found = []
    for line in lines:
        trial, event, address, namespace = line.split()
        found.append((trial, event, address.split("//")[1].rsplit(":", 1)[0], namespace))
    return found


@contextlib.contextmanager
def cluster(own: str, made: list[Host], folder: Path) -> Iterator[tuple[Client, list[Any]]]:
    """A scheduler here and a worker on each host; yields a client and the workers' processes."""
    paths = [str(Path(__file__).parent), *sys.path]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables["OMP_NUM_THREADS"] = "1"
    file = folder / "scheduler.json"
    python = (sys.executable, "-m", "dask")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "cluster.log").open("wb"))

        def launch(*command: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        options = ("--host", own, "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        launch(*python, "scheduler", *options)
        processes = []
        for host in made:
            options = ("--scheduler-file", str(file), "--host", host.address, "--name", host.name)
            single = ("--nthreads", "1", "--no-nanny", "--no-dashboard")
            local = ("--local-directory", str(folder / host.name))
            command = (*python, "worker", *options, *single, *local)
            processes.append(launch(*host.command(*command)))
        deadline = time.monotonic() + _PATIENCE
        while not file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError((folder / "cluster.log").read_text()[-3000:])
            time.sleep(0.1)
        client = stack.enter_context(Client(scheduler_file=str(file), timeout=_PATIENCE))
        client.wait_for_workers(len(made), timeout=_PATIENCE)
        yield client, processes


def lose_a_host(trials: int, seconds: float) -> dict[str, Any]:
    """Search over two hosts and kill one; what ran where, and what came of it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, hosts(2) as (own, made):
        folder = Path(name)
        notes = folder / "notes.txt"
        _, data = start(seconds)
        with cluster(own, made, folder) as (client, processes):
            killer = Killer(processes[-1], made[-1].address, notes, seconds / 2)
            killer.start()
            task = search(folder / "search", max_trials=trials, executor=DaskExecutor(client))
            result = task.fit(Noting(seconds, notes), **data)
            killer.join(_PATIENCE)
            left = len(client.scheduler_info(n_workers=-1)["workers"])
        study = optuna.load_study(
            study_name="condensa", storage=f"sqlite:///{folder / 'search' / 'study.db'}"
        )
        noted = read(notes)
        begun = [(trial, host) for trial, event, host, _ in noted if event == "begins"]
        ended = [(trial, host) for trial, event, host, _ in noted if event == "ends"]
        names = [f"trial_{t.number:03d}" for t in result.trials]
        return {
            "scheduler": own,
            "hosts": [h.address for h in made],
            "network namespaces": len({namespace for *_, namespace in noted}),
            "killed": {"host": made[-1].address, "signal": 9, "in": killer.trial},
            "workers left": left,
            "trials": [
                {
                    "trial": trial,
                    "began on": [host for t, host in begun if t == trial],
                    "ended on": [host for t, host in ended if t == trial],
                    "state": found.state,
                }
                for trial, found in zip(names, result.trials, strict=True)
            ],
            "asked for": trials,
            "in the study": len(study.trials),
            "finished": sum(t.state in ("feasible", "infeasible") for t in result.trials),
            "ended once": sum([t for t, _ in ended].count(trial) == 1 for trial in names),
            "begun twice": [t for t in names if [b for b, _ in begun].count(t) == 2],
        }


def main() -> None:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="that each fit sleeps")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = lose_a_host(options.trials, options.seconds)
    print(found, flush=True)
    update_results(
        "search_hosts",
        lambda results: results.update({"environment": environment(), "dask": found}),
        options.results,
    )


if __name__ == "__main__":
    main()
