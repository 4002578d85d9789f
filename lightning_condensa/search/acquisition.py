"""Acquisition functions: constrained improvement of a known objective, and the paper's."""

# ruff: noqa: N803 - `X` is BoTorch's name for points

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import AnalyticAcquisitionFunction
from botorch.models.model import Model
from botorch.utils.transforms import concatenate_pending_points, t_batch_mode_transform
from torch import Tensor

from lightning_condensa.search.feasibility import FeasibilityModel

__all__ = ["ILSUCB", "KnownObjectiveCEI"]


class KnownObjectiveCEI(AcquisitionFunction):
    r"""Log of the expected improvement of a known objective under an uncertain constraint.

    Only the feasibility of a point is random, so the improvement of a batch is that of its best
    feasible point. Given a member ``m`` of the surrogate, outcomes are independent; with the
    batch sorted by the known ``f``, best first,

    .. math::
        \alpha(X) = \log \sum_m w_m \sum_i (f_{(i)} - f^*)_+ \, p_m(i) \prod_{j<i} (1 - p_m(j)),

    exact for any batch together with the pending points, and computed in logs throughout so that
    hopeless candidates still have an order. Constrained expected improvement (Schonlau et al.,
    1998; Gardner et al., 2014) is the case of one point. As ``f*`` is at first the utility of the
    uncompressed model, which is feasible, the search for feasibility needs no special case: where
    feasibility is unlikely everywhere, its probability decides.

    Args:
        model: Gives the members and their feasibility.
        utility: The known ``f``, in logs for a positive objective: ``[..., d] -> [...]``.
        incumbent: ``f*``, the utility of the best feasible point so far.
        X_pending: Points under evaluation, shape ``[k, d]``.
    """

    def __init__(
        self,
        model: FeasibilityModel,
        utility: Callable[[Tensor], Tensor],
        incumbent: float,
        X_pending: Tensor | None = None,
    ) -> None:
        """Hold the surrogate, the objective and the incumbent."""
        super().__init__(model=model)  # type: ignore[arg-type] # only feasibility is asked
        self._feasibility = model.feasibility
        self.utility = utility
        self.incumbent = incumbent
        self.set_X_pending(X_pending)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate at ``X`` [b, q, d]; shape ``[b]``, -inf where no point can improve."""
        members: Tensor = self.by_member(X)
        return members.logsumexp(dim=-1)

    @concatenate_pending_points
    @t_batch_mode_transform(assert_output_shape=False)  # type: ignore[arg-type]
    def by_member(self, X: Tensor) -> Tensor:
        """Log of each member's part in it at ``X`` [b, q, d]; shape ``[b, S]``."""
        improvement, order = (
            (self.utility(X) - self.incumbent).clamp(min=0).sort(dim=-1, descending=True)
        )
        margin, log_weights = self._feasibility(X)  # b x S x q
        margin = margin.gather(-1, order.unsqueeze(-2).expand_as(margin))
        log_fail = torch.special.log_ndtr(-margin[..., :-1])
        none_better = torch.nn.functional.pad(log_fail.cumsum(dim=-1), (1, 0))
        terms = improvement.log().unsqueeze(-2) + torch.special.log_ndtr(margin) + none_better
        members: Tensor = terms.logsumexp(dim=-1) + log_weights
        return members


class ILSUCB(AnalyticAcquisitionFunction):
    r"""Implicit level-set upper confidence bound: where the model may cross the level.

    .. math::
        \alpha(x) = (1 - \gamma) \sigma(x) - \gamma |\mu(x) - L|

    after Bryan et al., Active learning for identifying function threshold boundaries, 2005, with
    the weights of the Condensa paper (Joseph et al., 2020).

    Args:
        model: A fitted single-output model of the metric.
        level: The metric ``L`` to locate.
        gamma: Weight of closeness to the level against uncertainty, in [0, 1].

    Raises:
        ValueError: If ``gamma`` is outside [0, 1].
    """

    def __init__(self, model: Model, level: float, gamma: float = 0.95) -> None:
        """Hold the level and the weight."""
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        super().__init__(model=model)
        self.level = level
        self.gamma = gamma

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """Evaluate at ``X`` [b, 1, d]; shape ``[b]``."""
        mean, sigma = self._mean_and_sigma(X)
        assert sigma is not None  # computed unless declined
        value = (1 - self.gamma) * sigma - self.gamma * (mean - self.level).abs()
        return value.squeeze(-1)
