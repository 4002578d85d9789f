"""What several tests of the callbacks share."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_condensa.lc import LCRun


@pytest.fixture
def c_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Optimizer steps before each C-step."""
    made: list[int] = []

    def recorded(method: Any) -> Any:
        def wrapper(self: LCRun, *args: Any) -> Any:
            c_step = method(self, *args)
            if c_step is not None:
                made.append(self.step)
            return c_step

        return wrapper

    for name in ("start", "after_step"):
        monkeypatch.setattr(LCRun, name, recorded(getattr(LCRun, name)))
    return made
