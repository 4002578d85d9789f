import sys
from pathlib import Path

import pytest

from lightning_condensa.search import overview

HERE = Path(__file__).parent
# The toy is imported by worker processes too, which know nothing of pytest's import mode.
sys.path.insert(0, str(HERE))
# Where the database server of our own is.
sys.path.append(str(HERE.parents[1] / "benchmarks"))


@pytest.fixture
def figures() -> None:
    """Searches of this test draw figures for TensorBoard."""


@pytest.fixture(autouse=True)
def _figures_where_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches in milliseconds would spend seconds on figures that a test does not look at."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(overview, "search_plots", lambda result: {})
