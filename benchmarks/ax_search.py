"""Ax as a peer of the search, where it is installed: in an environment of its own.

    python -m venv ax
    ax/bin/pip install -c constraints.txt torch==2.13.0
    ax/bin/pip install -c constraints.txt . ax-platform
    ax/bin/python benchmarks/search_1d.py --methods Ax
    ax/bin/python benchmarks/search_nd.py --methods Ax

Ax chooses its method itself. It is told the dense model, the level of the metric as an outcome
constraint, and the variance of each measurement.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from lightning_condensa.search.problem import Observation

#: Whether this environment has Ax.
INSTALLED = find_spec("ax") is not None


def available(methods: Iterable[str]) -> list[str]:
    """The methods that this environment can run: Ax only where it is installed."""
    return [name for name in methods if name != "Ax" or INSTALLED]


class AxLoop:
    """Ask for a point, tell what was seen there.

    Args:
        ranges: Least and largest value of each number, by name.
        choices: Values of each categorical parameter, by name.
        level: The metric must not be below it.
        seed: Of Ax.

    Raises:
        ModuleNotFoundError: Without Ax.
    """

    def __init__(
        self,
        ranges: Mapping[str, tuple[float, float]],
        choices: Mapping[str, list[int]],
        level: float,
        seed: int,
    ) -> None:
        if not INSTALLED:
            raise ModuleNotFoundError("Ax is not installed here: see benchmarks/ax_search.py")
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

        for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "ax"]:
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        self._client = Client(random_seed=seed)
        self._client.configure_experiment(
            [
                *(RangeParameterConfig(name, ends, "float") for name, ends in ranges.items()),
                *(
                    ChoiceParameterConfig(name, values, "int", is_ordered=False)
                    for name, values in choices.items()
                ),
            ]
        )
        self._client.configure_optimization("utility", [f"metric >= {level!r}"])
        self._client.configure_generation_strategy(initialization_random_seed=seed)

    def begin(self, parameters: Mapping[str, Any], seen: Observation) -> None:
        """Tell of a point that was known before."""
        self.tell(self._client.attach_trial(dict(parameters)), seen)

    def ask(self) -> tuple[int, Mapping[str, Any]]:
        """The next trial's number and its parameters."""
        (trial,) = self._client.get_next_trials(max_trials=1).items()
        return trial

    def tell(self, trial: int, seen: Observation) -> None:
        """What a trial gave."""
        assert seen.metric is not None and seen.utility is not None
        data = {
            "utility": (seen.utility, 0.0),
            "metric": (seen.metric, math.sqrt(seen.variance)),
        }
        self._client.complete_trial(trial, raw_data=data)
