"""Schemes as plain data: dictionaries, JSON and YAML, in the layout that jsonargparse reads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import FunctionType
from typing import Any

PACKAGE = "lightning_condensa"


def changed_fields(value: Any) -> dict[str, Any]:
    """The dataclass fields of ``value`` that differ from their defaults."""
    changed = {}
    for f in fields(value):
        current = getattr(value, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if default is MISSING or current != default:
            changed[f.name] = current
    return changed


def encode(value: Any) -> Any:
    """Schemes, dimensions and what they hold as plain data, defaults left out.

    Raises:
        ValueError: If there is something that plain data cannot hold, such as a function.
    """
    if is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        own = cls.__module__.startswith(f"{PACKAGE}.schemes.")
        path = f"{PACKAGE if own else cls.__module__}.{cls.__qualname__}"
        arguments = {name: encode(v) for name, v in changed_fields(value).items()}
        return {"class_path": path, "init_args": arguments}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(value)  # NumPy's float64 is a float that YAML refuses
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, FunctionType) and "<" not in value.__qualname__:
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    raise ValueError(f"a configuration cannot hold {value!r}: use a named function of a module")


def decode(value: Any) -> Any:
    """What :func:`encode` wrote.

    Raises:
        ValueError: If a class is not a scheme or a search dimension, or refuses its arguments,
            or a function cannot be imported.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        cls = _find(value["class_path"])
        arguments = {k: decode(v) for k, v in (value.get("init_args") or {}).items()}
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"{value['class_path']}: {error}") from error
    if isinstance(value, Mapping) and set(value) == {"function"}:
        found = _import(value["function"])
        if not isinstance(found, FunctionType):
            raise ValueError(f"function={value['function']!r} is not a function")
        return found
    if isinstance(value, list):
        return [decode(v) for v in value]
    if isinstance(value, Mapping):
        return {k: decode(v) for k, v in value.items()}
    return value


def _find(path: object) -> Any:
    schemes = importlib.import_module(f"{PACKAGE}.schemes")
    if isinstance(path, str) and path.rpartition(".")[0] in ("", PACKAGE):
        found = getattr(schemes, path.rpartition(".")[2], None)
    else:
        found = _import(path)
    accepted = (schemes.Scheme, schemes.Range, schemes.Choice)
    if not (isinstance(found, type) and issubclass(found, accepted)):
        raise ValueError(f"class_path={path!r} is not a scheme, Range or Choice")
    return found


def _import(path: object) -> Any:
    if not isinstance(path, str) or not all(path.rpartition(".")[::2]):
        raise ValueError(f"a class or function must be given as module.name, got {path!r}")
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
