"""θ of one weight as an entry of the spec and words of the streams."""

from __future__ import annotations

from lightning_condensa.deploy.spec import CombinedEntry, EncodedEntry
from lightning_condensa.deploy.tensor_codec import (
    Parts,
    pack_encoded,
)
from lightning_condensa.deploy.terms import terms_fit
from lightning_condensa.schemes import Encoding


def pack_encoding(
    name: str, encoding: Encoding
) -> tuple[EncodedEntry | CombinedEntry, list[Parts]]:
    """A compressed weight as an entry and words, leaf by leaf.

    Args:
        name: Its key in a state dict.
        encoding: Leaves as `pack_encoded` takes them.

    Returns:
        The entry, and the words of each leaf by stream.

    Raises:
        ValueError: If it cannot be stored; the message names the tensor.
    """
    packed = [[pack_encoded(name, leaf) for leaf in term] for term in encoding.terms]
    terms = tuple(tuple(entry for entry, _ in term) for term in packed)
    words = [parts for term in packed for _, parts in term]
    if len(words) == 1:
        return terms[0][0], words
    shape = tuple(encoding.shape)
    if not terms_fit([tuple(leaf.shape for leaf in term) for term in terms], shape):
        raise ValueError(f"the factors and terms of {name!r} do not make up a weight of {shape}")
    return CombinedEntry(name, shape, terms), words
