"""The one error that a bad packed file raises."""

from __future__ import annotations


class PackedFileError(ValueError):
    """A packed file is foreign, truncated, corrupt, inconsistent or larger than allowed.

    Example:
        >>> issubclass(PackedFileError, ValueError)
        True
    """
