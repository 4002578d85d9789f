"""What shapes the parts of a weight may have that is a sum or a product."""

from __future__ import annotations

import math
from collections.abc import Iterable


def terms_fit(terms: Iterable[tuple[tuple[int, ...], ...]], shape: tuple[int, ...]) -> bool:
    """Whether parts of these shapes make up a weight: terms of its shape, or matrices to multiply.

    The inner dimension of a product is at most as long as the others, so that it takes no longer
    than a product of the weight's own size.

    Example:
        >>> terms_fit([((4, 2), (2, 9)), ((4, 3, 3),)], (4, 3, 3))
        True
        >>> terms_fit([((4, 2), (1, 9))], (4, 3, 3)), terms_fit([((36,),)], (4, 3, 3))
        (False, False)
    """
    return all(_term_fits(term, shape) for term in terms)


def _term_fits(term: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> bool:
    if len(term) == 1:
        return term[0] == shape
    if [len(part) for part in term] != [2, 2]:
        return False
    (rows, inner), (same, columns) = term
    return inner == same <= min(rows, columns) and rows * columns == math.prod(shape)
