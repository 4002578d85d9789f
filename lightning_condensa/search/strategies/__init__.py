"""Search strategies: pure functions from what has been seen to what should be tried."""

from __future__ import annotations

from collections.abc import Callable

from lightning_condensa.search.goal import Goal
from lightning_condensa.search.strategies.base import Strategy
from lightning_condensa.search.strategies.known_objective import KnownObjectiveStrategy
from lightning_condensa.search.strategies.paper import PaperStrategy
from lightning_condensa.search.strategies.simple import (
    BisectionStrategy,
    GridStrategy,
    RandomStrategy,
)

__all__ = [
    "BisectionStrategy",
    "GridStrategy",
    "KnownObjectiveStrategy",
    "PaperStrategy",
    "RandomStrategy",
    "Strategy",
    "make_strategy",
    "strategy_for",
]


def strategy_for(method: str, goal: Goal) -> Strategy:
    """A strategy by name that can do what is asked for.

    Raises:
        ValueError: If the name is unknown, or the strategy knows nothing of budgets.

    Example:
        >>> strategy_for("bisection", Goal("max", "min", budget=1e6))
        Traceback (most recent call last):
            ...
        ValueError: method='bisection' looks for the edge of a tolerance; with a budget use ...
    """
    if goal.budget is not None and method in ("paper", "bisection"):
        raise ValueError(
            f"method={method!r} looks for the edge of a tolerance; with a budget use 'auto', "
            "'random' or 'grid'"
        )
    return make_strategy(method)


def make_strategy(name: str, **options: float) -> Strategy:
    """Build a strategy by name.

    Args:
        name: ``"auto"`` or ``"condensa"`` (`KnownObjectiveStrategy`), ``"paper"``,
            ``"bisection"``, ``"random"`` or ``"grid"``.
        **options: Arguments of the strategy, such as ``points`` of the grid.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the strategy has no such option.

    Example:
        >>> type(make_strategy("auto")).__name__
        'KnownObjectiveStrategy'
    """
    strategies: dict[str, Callable[..., Strategy]] = {
        "auto": KnownObjectiveStrategy,
        "condensa": KnownObjectiveStrategy,
        "paper": PaperStrategy,
        "bisection": BisectionStrategy,
        "random": RandomStrategy,
        "grid": GridStrategy,
    }
    if name not in strategies:
        raise ValueError(f"strategy must be one of {sorted(strategies)}, got {name!r}")
    return strategies[name](**options)
