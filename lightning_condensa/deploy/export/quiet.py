"""ONNX export without a message that is of no use to anyone here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = "torch.onnx._internal.exporter._registration"


@contextmanager
def quiet_export() -> Iterator[None]:
    """Drop torch's message that torchvision is not installed; nothing else, and only within.

    Example:
        >>> with quiet_export():
        ...     pass
    """
    logger = logging.getLogger(_LOGGER)
    logger.addFilter(_wanted)
    try:
        yield
    finally:
        logger.removeFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed")
