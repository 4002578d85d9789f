"""Figures, with matplotlib (the ``plots`` extra)."""

from lightning_condensa.plots.search import plot_search

__all__ = ["plot_search"]
