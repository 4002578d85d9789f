"""One tensor of a packed file, checked but not yet decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_condensa.deploy.decoding import decode_into
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.spec import GAPS, SCALES, CombinedEntry, EncodedEntry, RestEntry
from lightning_condensa.deploy.stream_reader import StreamReader
from lightning_condensa.deploy.streams import check_gaps, positions
from lightning_condensa.deploy.tensor_codec import Parts
from lightning_condensa.deploy.words import DTYPES, Words, words_in, words_to_tensor
from lightning_condensa.schemes import Encoding
from lightning_condensa.schemes.combined import combined
from lightning_condensa.schemes.encoded import Encoded


@dataclass(frozen=True, eq=False)
class StoredLeaf:
    """A compressed tensor, or a part of one.

    Attributes:
        entry: What the spec says of it.
        parts: Its words by stream.
    """

    entry: EncodedEntry
    parts: Parts

    @classmethod
    def take(cls, entry: EncodedEntry, reader: StreamReader) -> StoredLeaf:
        """The leaf whose words come next.

        Raises:
            PackedFileError: If its words contradict the entry.
        """
        leaf = cls(entry, reader.take(entry.stored))
        try:
            leaf._check()
        except PackedFileError as error:
            raise PackedFileError(f"tensor {entry.name!a}: {error}") from None
        return leaf

    @property
    def codes(self) -> Words:
        """The stored ones, or indices into the alphabet."""
        return self.parts[f"v{self.entry.bits}"]

    def encoded(self) -> Encoded:
        """θ, in memory of its own; see `unpack` about its mask."""
        entry, codes = self.entry, self.codes
        mask: Tensor | None = None
        if (alphabet := entry.alphabet_words) is not None:
            codes = np.take(alphabet, codes, mode="clip")
        if entry.sparse:
            values, codes = codes, np.zeros(entry.numel, dtype=codes.dtype)
            done = 0
            for block in positions(self.parts[GAPS].view(np.uint8)):
                codes[block] = values[done : done + len(block)]
                done += len(block)
            mask = torch.from_numpy(codes != 0).reshape(entry.shape)
        else:
            codes = codes.copy()
        return Encoded(
            codes=words_to_tensor(codes, DTYPES[entry.value_type], entry.shape),
            dtype=DTYPES[entry.weight_type],
            scale=self._scale(),
            mask=mask,
            group=entry.group,
        )

    def write(self, out: Tensor) -> None:
        """Decode the weight into a contiguous tensor of its type and shape."""
        if not decode_into(out, self.entry, self.parts, self._scale()):
            out.copy_(self.encoded().decode())

    def _scale(self) -> Tensor | None:
        shape = self.entry.scale_shape
        if shape is None:
            return None
        return words_to_tensor(self.parts[SCALES].copy(), torch.float32, shape)

    def _check(self) -> None:
        """Everything that could be wrong with the words, so that decoding them cannot fail."""
        entry, codes = self.entry, self.codes
        if entry.alphabet is None:
            nonzero = int(np.count_nonzero(codes))
        else:
            if len(codes) and int(codes.max()) >= len(entry.alphabet):
                raise PackedFileError("it has indices beyond its alphabet")
            # Ascending: only the first code can be zero.
            nonzero = len(codes) if entry.alphabet[0] else int(np.count_nonzero(codes))
        if nonzero != entry.nnz:
            raise PackedFileError(f"it does not hold {entry.nnz} non-zero codes")
        if entry.sparse:
            check_gaps(self.parts[GAPS].view(np.uint8), entry.nnz, entry.numel)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A compressed weight.

    Attributes:
        entry: What the spec says of it.
        leaves: All that is stored of it, in order.
    """

    entry: EncodedEntry | CombinedEntry
    leaves: tuple[StoredLeaf, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded weight."""
        return DTYPES[self.leaves[0].entry.weight_type]

    def encoding(self) -> Encoding:
        """θ."""
        if isinstance(self.entry, EncodedEntry):
            return self.leaves[0].encoded()
        leaves = iter(self.leaves)
        terms = [tuple(next(leaves).encoded() for _ in term) for term in self.entry.terms]
        return combined(terms, self.entry.shape)

    def write(self, out: Tensor) -> None:
        """Decode into a contiguous tensor of this type and shape."""
        if isinstance(self.entry, EncodedEntry):
            self.leaves[0].write(out)
        else:
            out.copy_(self.encoding().decode())


@dataclass(frozen=True, eq=False)
class StoredRest:
    """A tensor that was stored as it is.

    Attributes:
        entry: What the spec says of it.
        words: Its elements.
    """

    entry: RestEntry
    words: Words

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return DTYPES[self.entry.dtype]

    def write(self, out: Tensor) -> None:
        """Copy into a contiguous tensor of this type and shape."""
        words_in(out)[:] = self.words


StoredTensor: TypeAlias = StoredWeight | StoredRest


def take_tensor(
    entry: EncodedEntry | CombinedEntry | RestEntry, reader: StreamReader
) -> StoredTensor:
    """The tensor whose words come next.

    Args:
        entry: Consistent with the streams.
        reader: Where its words are.

    Raises:
        PackedFileError: If they contradict the entry.
    """
    if not isinstance(entry, RestEntry):
        return StoredWeight(entry, tuple(StoredLeaf.take(leaf, reader) for leaf in entry.leaves))
    (words,) = reader.take(entry.stored).values()
    if entry.dtype == "BOOL" and bool(np.any(words > 1)):
        raise PackedFileError(
            f"tensor {entry.name!a} is boolean but holds other bytes than 0 and 1"
        )
    return StoredRest(entry, words)


def decoded(tensor: StoredTensor) -> Tensor:
    """The tensor itself, in memory of its own: of a weight, Δ(θ)."""
    out = torch.empty(tensor.entry.shape, dtype=tensor.dtype)
    tensor.write(out)
    return out
