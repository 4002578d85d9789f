"""The version, in one place; no imports, so that building a wheel needs none."""

__version__ = "0.1.0"
