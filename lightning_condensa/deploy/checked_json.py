"""JSON of a file from a stranger: parsed strictly, each value checked where it is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from lightning_condensa.deploy.errors import PackedFileError


def dump_json(value: object) -> bytes:
    """Compact UTF-8 JSON with sorted keys: equal values give equal bytes.

    Args:
        value: Anything ``json`` takes.

    Returns:
        JSON without insignificant whitespace.

    Raises:
        UnicodeEncodeError: If a string holds a lone surrogate.

    Example:
        >>> dump_json({"b": [1, None], "a": "é"}).decode()
        '{"a":"é","b":[1,null]}'
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8")


def load_json(data: bytes, what: str) -> Any:
    """Parse UTF-8 JSON, refusing duplicate keys and ``NaN``.

    Args:
        data: The encoded text.
        what: Its name in the error.

    Returns:
        The parsed value.

    Raises:
        PackedFileError: If ``data`` is not such JSON, or is nested too deeply.

    Example:
        >>> load_json(b'{"a":[1,2]}', "the header")
        {'a': [1, 2]}
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"{what} is not valid JSON: {error}") from None


def require_list(value: object, what: str, length: int | None = None) -> list[Any]:
    """``value`` if it is a list, of ``length`` items where given.

    Raises:
        PackedFileError: If it is not.
    """
    if not isinstance(value, list) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length} items"
        raise PackedFileError(f"{what} must be a list{size}, got {_short(value)}")
    return value


def require_object(value: object, what: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """``value`` if it is an object, with exactly ``keys`` where given.

    Raises:
        PackedFileError: If it is not.
    """
    if not isinstance(value, dict) or (keys is not None and set(value) != set(keys)):
        names = "" if keys is None else f" with the keys {sorted(keys)}"
        raise PackedFileError(f"{what} must be an object{names}, got {_short(value)}")
    return value


def require_text(value: object, what: str) -> str:
    """``value`` if it is a string that UTF-8 can encode.

    Raises:
        PackedFileError: If it is not.
    """
    if not isinstance(value, str):
        raise PackedFileError(f"{what} must be a string, got {_short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise PackedFileError(f"{what} is not valid Unicode: {_short(value)}") from None
    return value


def require_count(value: object, what: str, limit: int) -> int:
    """``value`` if it is an integer from 0 to ``limit``.

    Raises:
        PackedFileError: If it is not; ``true`` and ``1.0`` are no integers.
    """
    if type(value) is not int or not 0 <= value <= limit:
        raise PackedFileError(f"{what} must be an integer from 0 to {limit}, got {_short(value)}")
    return value


def texts(value: object, what: str) -> Iterator[tuple[str, str]]:
    """The items of an object that maps strings to strings.

    Raises:
        PackedFileError: If ``value`` is anything else.
    """
    for key, item in require_object(value, what).items():
        yield require_text(key, f"a key of {what}"), require_text(item, f"{what}[{_short(key)}]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("an object holds a key twice")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _short(value: object) -> str:
    """A hostile value for a message: ASCII, bounded."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)} items"
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
