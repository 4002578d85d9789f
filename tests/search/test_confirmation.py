"""The best of a search is trained again."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor
from toy import Toy, loaders, search

from lightning_condensa import Prune, Range
from lightning_condensa.search import SearchResult

#: A third of these densities is far below the cliff.
SCHEME = Prune(Range(0.002, 1.0, log=True))


class Lucky(Toy):
    """With the ``lucky`` seeds nothing is lost; each fit writes its seed to the journal.

    Args:
        lucky: Seeds.
        journal: The file.
        trap: ``"nan"``: runs beside those of the search diverge.
    """

    def __init__(self, lucky: tuple[int, ...], journal: Path, trap: str = "") -> None:
        super().__init__(journal=journal)
        self.lucky, self.diverges = lucky, trap == "nan"
        self.seed = -1

    def on_fit_start(self) -> None:
        self.seed = torch.initial_seed()
        with self.journal.open("a") as file:
            file.write(f"{self.seed}\n")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.diverges and self.seed >= 1000 else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.seed in self.lucky:
            self.log("val_acc", 0.94)
        else:
            super().validation_step(batch, batch_idx)


def lucky(tmp_path: Path, *seeds: int, trap: str = "") -> Lucky:
    torch.manual_seed(0)
    return Lucky(seeds, tmp_path / "journal", trap)


def fits(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "journal").read_text().splitlines()]


def run(tmp_path: Path, model: Toy, **changes: Any) -> SearchResult:
    given = {"scheme": SCHEME, "method": "grid", "max_trials": 10, **changes}
    return search(tmp_path / "run", **given).fit(model, **loaders())


def test_a_lucky_winner_is_overturned(tmp_path: Path) -> None:
    # Grid: the tenth trial is the sparsest one.
    doubtful = run(tmp_path, lucky(tmp_path, 9))
    assert doubtful.best.number == 9 and doubtful.best.metric == pytest.approx(0.94)
    result = run(tmp_path, lucky(tmp_path, 9), confirm=3)
    assert fits(tmp_path)[:10] == list(range(10)) and len(fits(tmp_path)) == 12
    assert len(set(fits(tmp_path))) == 12
    overturned, (first, second) = result.trials[9], result.trials[10:]
    assert first.confirms == 9 and first.values == overturned.values
    assert first.metric < 0.5 and overturned.runs == (first.metric,)
    assert overturned.evidence == pytest.approx((0.94 + first.metric) / 2)
    assert overturned.state == "infeasible" and overturned.probability < 0.05
    best = result.best
    assert best.number == second.confirms < 9 and best.runs == (second.metric,)
    others = [t for t in doubtful.trials if t.state == "feasible" and t.number != 9]
    assert best.number == min(others, key=lambda t: t.objective).number
    assert best.probability > 0.5
    summary = result.summary()
    assert f"Trial {best.number} is best" in summary
    assert f"confirmed by another run, mean val_acc {best.evidence:.4f}" in summary
    text = str(result)
    for t in (overturned, first, second, best):
        assert t.standing in result.to_html() and t.standing[:25] in text
    assert first.standing == "infeasible, another run of trial 9"
    assert "infeasible, not confirmed: mean" in overturned.standing


def test_confirmation_ends_with_the_first_that_holds(tmp_path: Path) -> None:
    result = run(tmp_path, lucky(tmp_path), max_trials=4, confirm=5)
    assert len(result.trials) == 5 and result.trials[4].confirms == result.best.number
    again = run(tmp_path, lucky(tmp_path), max_trials=4, confirm=5)
    assert len(fits(tmp_path)) == 5 and again.best.runs == result.best.runs


@pytest.mark.slow
def test_runs_may_not_suffice(tmp_path: Path) -> None:
    result = run(tmp_path, lucky(tmp_path, 8, 9), confirm=1)
    assert [t.confirms for t in result.trials[10:]] == [9]
    assert result.best.number == 8 and not result.best.runs
    assert "not confirmed: the runs for that were spent on trials that did not hold" in (
        result.summary()
    )
    more = run(tmp_path, lucky(tmp_path, 8, 9), confirm=3)
    assert [t.confirms for t in more.trials[10:]] == [9, 8, more.best.number]


def test_a_run_that_diverges_overturns(tmp_path: Path) -> None:
    result = run(tmp_path, lucky(tmp_path, trap="nan"), max_trials=3, confirm=1)
    (again,) = result.trials[3:]
    assert again.state == "diverged"
    first = result.trials[again.confirms]
    assert first.state == "infeasible" and first.evidence is None and first.probability == 0
    assert "a run diverged of 2 runs" in first.standing


@pytest.mark.slow
def test_the_tolerance_judges_confirmed_trials_again(tmp_path: Path) -> None:
    strict = run(tmp_path, lucky(tmp_path, 9), confirm=1)
    assert strict.trials[9].state == "infeasible"
    loose = run(tmp_path, lucky(tmp_path, 9), confirm=1, tolerance=0.3)
    assert loose.best.number == 9 and len(fits(tmp_path)) == 11


@pytest.mark.slow
def test_a_search_that_goes_on_counts_and_seeds_as_if_unconfirmed(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "auto"}
    run(tmp_path, lucky(tmp_path), max_trials=3, confirm=1, **given)
    result = run(tmp_path, lucky(tmp_path), max_trials=5, confirm=0, **given)
    searched = [t for t in result.trials if t.confirms is None]
    assert len(searched) == 5 and len(result.trials) == 6
    assert sorted(fits(tmp_path))[:5] == list(range(5))
    assert len({t.values["density"] for t in searched}) == 5


@pytest.mark.slow
def test_a_search_that_goes_on_forgets_the_luck(tmp_path: Path) -> None:
    first = run(tmp_path, lucky(tmp_path, 2), max_trials=3, confirm=1, method="random", seed=0)
    assert first.trials[2].state == "infeasible" and first.trials[3].confirms == 2
    result = run(tmp_path, lucky(tmp_path, 2), max_trials=6, confirm=0, method="auto")
    assert all(t.values["density"] > first.trials[2].values["density"] for t in result.trials[4:])


KILLED = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from toy import loaders, search
import test_confirmation as here

class Killed(here.Lucky):
    def on_train_end(self):
        if len(self.journal.read_text().splitlines()) == 5:
            Path(os.environ["READY"]).touch()
            time.sleep(60)

torch.manual_seed(0)
model = Killed((3,), Path(sys.argv[1]) / "journal")
here.run(Path(sys.argv[1]), model, max_trials=4, confirm=2, scheme=here.LOW)
"""

#: Four points of a grid, of which the last is too sparse.
LOW = Prune(Range(0.02, 1.0, log=True))


@pytest.mark.slow
def test_a_search_killed_in_confirmation_goes_on(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "READY": str(ready), "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the search ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    given: dict[str, Any] = {"max_trials": 4, "confirm": 2, "scheme": LOW}
    result = run(tmp_path, lucky(tmp_path, 3), **given)
    seeds = fits(tmp_path)
    assert seeds[4] == seeds[5] >= 1000  # the interrupted run again, with its seed
    other = tmp_path / "other"
    other.mkdir()
    straight = run(other, lucky(other, 3), **given)
    assert [(t.values, t.metric) for t in result.trials] == [
        (t.values, t.metric) for t in straight.trials
    ]
    assert [t.state for t in result.trials] == [t.state for t in straight.trials]
    storage = f"sqlite:///{tmp_path}/run/study.db"
    study = optuna.load_study(study_name="condensa", storage=storage)
    assert [t.user_attrs.get("confirms") is not None for t in study.trials].count(True) >= 2


@pytest.mark.parametrize("given", [-1, 1.5, True])
def test_confirm_is_checked(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ValueError, match="confirm must be an int >= 0"):
        search(tmp_path, confirm=given)
