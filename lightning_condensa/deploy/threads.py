"""How many CPU threads torch uses, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def check_threads(threads: int | None) -> None:
    """Check an argument.

    Raises:
        ValueError: If it is neither ``None`` nor a positive int.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be an int >= 1, got {threads!r}")


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Let torch use so many threads inside; as many as before where ``None``."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)
