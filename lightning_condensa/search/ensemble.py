"""Ensembles of `DamageCurves` fitted to what has been seen, and their mixture."""

# ruff: noqa: N803 - `X` is BoTorch's name for points

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_condensa.search.certification import expected_metric, probability_of_level
from lightning_condensa.search.cliff import RUN_SD
from lightning_condensa.search.damage import DamageCurves, DamagePrior, features
from lightning_condensa.search.feasibility import Feasibility, Outlook, aim
from lightning_condensa.search.problem import Observation, Problem

__all__ = ["DamageEnsemble", "DamageMixture"]

_ITERATIONS = 15
#: A fit ends where no member gains this much in a step.
_ENOUGH = 1e-2
#: Log-evidence of a member whose linearization is of no use.
_HOPELESS = -1e6
#: Members fitted first, to learn how much runs vary.
_PILOTS = 24


class DamageEnsemble:
    """Draws from the posterior of `DamageCurves` by randomize-then-optimize.

    Each member fits the observations, perturbed by their noise, under a prior that is centred on
    a draw from it (Bardsley et al., Randomize-Then-Optimize, 2014): for a linear model exact
    posterior draws. All members are fitted at once by Levenberg-Marquardt. The variance of an
    observation is its noise, the member's run-to-run variance (drawn from its posterior, by the
    evidence of a few members fitted first) and ``(0.15 * loss)^2``, since the form is only roughly
    right far down the cliff. A diverged run pulls only where a member takes
    it for less than three tolerances below the level, an aborted one where it takes it for more
    than its bound. Members that found no fit weigh less.

    Args:
        problem: A problem with a domain.
        history: Finished evaluations; every member passes through the baseline.
        seed: Seed of the draws.
        members: How many.
        scan: As for `DamagePrior.of`; None for the generic prior.

    Raises:
        ValueError: If the problem has no domain.
    """

    likelihood_discrepancy = 0.15
    predictive_discrepancy = 0.05

    def __init__(
        self,
        problem: Problem,
        history: Sequence[Observation],
        seed: int,
        members: int = 64,
        scan: Tensor | None = None,
    ) -> None:
        """Draw, fit and weigh."""
        if problem.domain is None:
            raise ValueError("problem must have a domain for an ensemble of damages")
        generator = torch.Generator().manual_seed(seed)
        self.baseline_metric, self.target = problem.baseline_metric, aim(problem)
        self.noise_variance = problem.noise_variance
        prior = DamagePrior.of(problem.domain.axes, max(problem.tolerance, 0.0), scan)
        data = _Data(problem, history)
        levels = torch.arange(_PILOTS) % len(RUN_SD)
        pilot = _Fit(problem, prior, data, levels, generator)
        by_level = pilot.log_evidence.view(-1, len(RUN_SD)).median(dim=0).values
        self.log_evidence = torch.logsumexp(by_level, dim=0)
        chance = torch.softmax(by_level, dim=0)
        levels = torch.multinomial(chance, members, replacement=True, generator=generator)
        fit = _Fit(problem, prior, data, levels, generator)
        self.curves, self.run_variance = fit.curves, fit.run_variance
        usual = fit.misfit.median()
        excess = (fit.misfit - usual - 3 * usual.clamp(min=1).sqrt()).clamp(min=0, max=200)
        self.log_weights = torch.log_softmax(-excess, dim=0)

    def predictive(self, X: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The metric at ``X`` [..., n, d] and the variance of one evaluation, ``[..., S, n]``."""
        drop = self.curves.drop(X)
        variance = self.noise_variance + self.run_variance[:, None]
        return self.baseline_metric - drop, variance + (share * drop.clamp(min=0)) ** 2

    def feasibility(self, X: Tensor) -> Feasibility:
        """Feasibility of ``X`` [..., q, d]; one member each."""
        metric, variance = self.predictive(X, self.predictive_discrepancy)
        return Feasibility((metric - self.target) / variance.sqrt(), self.log_weights)


class DamageMixture:
    """A generic ensemble, and one that believes a scan, mixed by how well they predicted.

    Each ensemble's weight is the probability that it gave to the observations, one after the other
    (Dawid's prequential likelihood, which for a probabilistic model is its evidence): a useless
    scan is soon ignored.

    Args:
        problem: A problem with a domain.
        history: Finished evaluations.
        seed: Seed of the draws.
        members: Members of each ensemble.
    """

    def __init__(
        self, problem: Problem, history: Sequence[Observation], seed: int, members: int = 64
    ) -> None:
        """Fit, and compare where there is a scan."""
        scans = [None] if problem.scan is None else [None, problem.scan]
        self.parts = [DamageEnsemble(problem, history, seed, members, scan) for scan in scans]
        evidence = torch.stack([part.log_evidence for part in self.parts])
        self.log_shares = torch.log_softmax(evidence, dim=0)

    @property
    def log_weights(self) -> Tensor:
        """Log-weights of all members, shape ``[S]``."""
        return torch.cat(
            [share + p.log_weights for share, p in zip(self.log_shares, self.parts, strict=True)]
        )

    def damage(self, X: Tensor) -> Tensor:
        """The damage that each member sees at ``X`` [..., n, d]; shape ``[..., S, n]``."""
        return torch.cat([part.curves.damage(X) for part in self.parts], dim=-2)

    def feasibility(self, X: Tensor) -> Feasibility:
        """Feasibility of ``X`` [..., q, d], jointly over both ensembles."""
        margins = [part.feasibility(X).margin for part in self.parts]
        return Feasibility(torch.cat(margins, dim=-2), self.log_weights)

    def outlook(self, X: Tensor) -> Outlook:
        """The metric at ``X`` [..., q, d], over the members of both ensembles."""
        found = [p.predictive(X, p.predictive_discrepancy) for p in self.parts]
        mean = torch.cat([metric for metric, _ in found], dim=-2)
        variance = torch.cat([spread for _, spread in found], dim=-2)
        sd = (variance - self.parts[0].noise_variance).clamp(min=1e-16).sqrt()
        return Outlook(mean, sd, self.log_weights)

    def worth(self, seen: Observation) -> Tensor:
        """What each member takes a measured model to be, shape ``[S]``."""
        mean, sd, _ = self.outlook(seen.point[None])
        return expected_metric(seen, mean[:, 0], sd[:, 0] ** 2)

    def certainty(self, seen: Observation, level: float) -> float:
        """Probability that a model of the history truly reaches a level."""
        mean, sd, _ = self.outlook(seen.point[None])
        return probability_of_level(seen, level, mean[:, 0], sd[:, 0] ** 2, self.log_weights)

    def predict(self, X: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted mean and quantiles of the members at ``X`` [N, d]."""
        drop = torch.cat([part.curves.drop(X) for part in self.parts], dim=-2)
        metric, order = (self.parts[0].baseline_metric - drop).sort(dim=0)
        weights = self.log_weights.exp()[order]
        cumulative = weights.cumsum(dim=0)
        low, high = (
            metric.gather(0, (cumulative < tail).sum(0, keepdim=True).clamp(max=len(metric) - 1))
            for tail in ((1 - coverage) / 2, (1 + coverage) / 2)
        )
        return (metric * weights).sum(dim=0), low[0], high[0]


class _Data:
    """Observations as tensors; what a censored run lost stands for 'at least so much'."""

    def __init__(self, problem: Problem, history: Sequence[Observation]) -> None:
        far = problem.level - 3 * max(problem.tolerance, 1e-3)
        metrics = [s.ceiling(far) if s.metric is None else s.metric for s in history]
        losses = [problem.baseline_metric - metric for metric in metrics]
        d = len(problem.baseline.point)
        self.points = torch.stack([s.point for s in history]) if history else torch.empty(0, d)
        self.loss = torch.tensor(losses, dtype=torch.float64)
        self.variance = torch.tensor([s.variance for s in history], dtype=torch.float64)
        self.censored = torch.tensor([s.censored for s in history], dtype=torch.bool)


class _Fit:
    """Members with given run-to-run variances, moved to their optima.

    Attributes:
        curves: The members.
        run_variance: Of each, shape ``[S]``.
        misfit: Squared deviations from what each was fitted to, in variances, shape ``[S]``.
        log_evidence: Log-probability of the observations under the prior, by linearization at
            each member, up to a constant; shape ``[S]``.
    """

    def __init__(
        self,
        problem: Problem,
        prior: DamagePrior,
        data: _Data,
        levels: Tensor,
        generator: torch.Generator,
    ) -> None:
        assert problem.domain is not None
        count = len(levels)
        self.prior, self.data = prior, data
        self.run_variance = torch.tensor(RUN_SD, dtype=torch.float64)[levels] ** 2
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        depth = (0.5 + 0.5 * share) * problem.baseline_metric
        self.drawn = prior.draw(count, generator)
        self.misfit = torch.zeros(count, dtype=torch.float64)
        self.log_evidence = torch.zeros(count, dtype=torch.float64)
        if len(data.loss):
            depth = depth.clamp(min=1.02 * float(data.loss.max()))
        self.curves = DamageCurves(problem.domain.axes, self.drawn, depth)
        if len(data.loss):
            self._features = features(self.curves.axes, data.points)
            variance = data.variance + self.run_variance[:, None]
            discrepancy = DamageEnsemble.likelihood_discrepancy * data.loss.clamp(min=0)
            self.variance = variance + discrepancy**2
            noise = torch.randn(self.variance.shape, generator=generator, dtype=torch.float64)
            noise = torch.where(data.censored, 0.0, noise)
            self._optimize(data.loss + noise * self.variance.sqrt())
            self.log_evidence = self._evidence()

    def _evaluate(self, parameters: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Deviations in standard deviations, their derivatives, and their squares' sum."""
        trial = DamageCurves(self.curves.axes, parameters, self.curves.depth)
        loss, derivatives = trial.jacobian(*self._features)
        root = self.variance.sqrt()
        miss = (target - loss) / root
        active = ~self.data.censored | (miss > 0)
        miss = torch.where(active, miss, 0.0)
        return miss, derivatives * (active / root)[..., None], (miss**2).sum(-1)

    def _optimize(self, target: Tensor) -> None:
        """Levenberg-Marquardt, a damping for each member."""
        precision = torch.cholesky_inverse(self.prior.scale)

        def energy(parameters: Tensor, misfit: Tensor) -> Tensor:
            away = parameters - self.drawn
            return misfit + ((away @ precision) * away).sum(-1)

        parameters = self.drawn
        damping = torch.full((len(parameters), 1), 1e-2, dtype=torch.float64)
        miss, jacobian, misfit = self._evaluate(parameters, target)
        current = energy(parameters, misfit)
        for _ in range(_ITERATIONS):
            curvature = precision + jacobian.mT @ jacobian
            downhill = (jacobian.mT @ miss[..., None])[..., 0]
            downhill = downhill - (parameters - self.drawn) @ precision
            ridge = torch.diag_embed(damping * curvature.diagonal(dim1=-2, dim2=-1))
            factor, failed = torch.linalg.cholesky_ex(curvature + ridge)
            step = torch.cholesky_solve(downhill[..., None], factor)[..., 0]
            step = torch.where(failed[:, None] > 0, 0.0, step)  # more damping helps
            trial = parameters + step.clamp(min=-1.0, max=1.0)
            miss_t, jacobian_t, misfit_t = self._evaluate(trial, target)
            energy_t = energy(trial, misfit_t)
            better = energy_t < current
            parameters = torch.where(better[:, None], trial, parameters)
            miss = torch.where(better[:, None], miss_t, miss)
            jacobian = torch.where(better[:, None, None], jacobian_t, jacobian)
            misfit = torch.where(better, misfit_t, misfit)
            gained = torch.where(better, current - energy_t, 0.0)
            current = torch.where(better, energy_t, current)
            damping = torch.where(better[:, None], damping / 4, damping * 4).clamp(1e-6, 1e6)
            if bool(better.any()) and float(gained.max()) < _ENOUGH:
                break
        self.curves.parameters, self.misfit = parameters, misfit

    def _evidence(self) -> Tensor:
        """A Gaussian: the linearized members under the prior, and the observations' variance."""
        parameters = self.curves.parameters
        miss, jacobian, _ = self._evaluate(parameters, self.data.loss)
        away = (jacobian @ (self.prior.mean - parameters)[..., None])[..., 0]
        spread = jacobian @ self.prior.scale
        covariance = spread @ spread.mT + torch.eye(miss.shape[1], dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        white = torch.linalg.solve_triangular(factor, (miss - away)[..., None], upper=False)
        volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * self.variance.log().sum(-1)
        found = -0.5 * (white**2).sum((-2, -1)) - volume
        return torch.where((failed == 0) & found.isfinite(), found, _HOPELESS)
