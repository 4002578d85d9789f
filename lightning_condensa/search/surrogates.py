"""What is believed of the metric: parametric cliff curves, or a Gaussian process.

Both are BoTorch models that add the methods of a `FeasibilityModel`: the metric and the probability
that it meets the level, in the form that acquisitions need, and a curve with a band for plots.
"""

# ruff: noqa: N803 - `X` is BoTorch's name for points

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from botorch import fit_gpytorch_mll, settings
from botorch.exceptions.errors import ModelFittingError
from botorch.models import SingleTaskGP
from botorch.models.ensemble import EnsembleModel
from botorch.models.transforms import Normalize
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.sampling import manual_seed
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.means import LinearMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior, NormalPrior
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from lightning_condensa.search.certification import expected_metric, probability_of_level
from lightning_condensa.search.cliff import CliffCurves, CliffShift, thin
from lightning_condensa.search.feasibility import Feasibility, Outlook, aim
from lightning_condensa.search.problem import Observation, Problem

__all__ = ["BilogGP", "CliffEnsemble", "bilog"]

#: Moments of |x| for a standard normal x.
_HALF_NORMAL_MEAN, _HALF_NORMAL_SD = math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)


class CliffEnsemble(EnsembleModel):
    """Prior draws of `CliffCurves`, weighted by how well they explain the observations.

    Importance sampling without Markov chains: each curve's weight is its likelihood with variance
    ``observation noise + run_sd^2 + (0.15 * drop)^2``; the last term says that the curves are
    only roughly right far down the cliff. A diverged or aborted run is a censored observation: its
    metric is known to lie below the level, or below its bound. The ``members`` that remain after
    `thin` are the ensemble; their weights are BoTorch's ``ensemble_weights``.

    Where the problem has shares of the training, each curve has a `CliffShift`, so that what less
    training lost tells of all of it as far as the shifts are known. Points may have the share as a
    second coordinate; without, they are of all training.

    Args:
        problem: A problem with ``cliff=True``; with a ``scan`` half of the curves are drawn as that
            suggests.
        history: Finished evaluations; the baseline is not among them, every curve passes
            through it.
        seed: Seed of the draws.
        draws: Number of prior curves.
        members: Number of curves kept.

    Example:
        >>> u = torch.linspace(0.1, 5.0, 50, dtype=torch.float64)[:, None]
        >>> dense = Observation(torch.zeros(1), metric=0.98, variance=1e-6, utility=0.0)
        >>> problem = Problem(u, u[:, 0], dense, level=0.97, noise_variance=1e-6, cliff=True)
        >>> seen = [Observation(u[25], metric=0.60, variance=1e-6, utility=None)]
        >>> centre, low, high = CliffEnsemble(problem, seen, seed=0).predict(u)
        >>> bool(centre[0] > 0.95), bool(high[40] < 0.7)
        (True, True)
    """

    likelihood_discrepancy = 0.15
    predictive_discrepancy = 0.05

    def __init__(
        self,
        problem: Problem,
        history: Sequence[Observation],
        seed: int,
        draws: int = 20_000,
        members: int = 2_000,
    ) -> None:
        """Draw, weigh and thin."""
        if not problem.cliff:
            raise ValueError("problem must have cliff=True, got cliff=False; use BilogGP")
        super().__init__()
        self._num_outputs = 1
        self.baseline_metric = problem.baseline_metric
        self.target = aim(problem)
        self.noise_variance = problem.noise_variance
        generator = torch.Generator().manual_seed(seed)
        u_max = float(problem.candidates[:, 0].max().clamp_min(1e-3))
        one_shot = None if problem.scan is None else float(problem.scan[0])
        self.curves = CliffCurves.prior(draws, u_max, generator, one_shot)
        self.shift = CliffShift.prior(draws, generator) if problem.fidelity else None
        log_weights = self._log_likelihood(history, problem.level)
        kept, self.log_weights = thin(log_weights, members, generator)
        self.curves = self.curves[kept]
        self.shift = None if self.shift is None else self.shift[kept]
        self.ensemble_weights = self.log_weights.exp()

    def _drop(self, X: Tensor) -> Tensor:
        """What is lost at ``X`` [..., n, d], by the share of the training where there is one."""
        if self.shift is None or X.shape[-1] == 1:
            return self.curves.drop(X[..., 0])
        return self.curves.drop(X[..., 0], self.shift.stretch(X[..., 1]))

    def _log_likelihood(self, history: Sequence[Observation], level: float) -> Tensor:
        curves = self.curves
        total = torch.zeros(len(curves), dtype=torch.float64)
        for seen in history:
            drop = self._drop(seen.point[None]).squeeze(-1)
            variance = self._variance(curves, drop, seen.variance, self.likelihood_discrepancy)
            expected = self.baseline_metric - drop
            if seen.metric is None:
                below = seen.ceiling(level) - expected
                total += torch.special.log_ndtr(below / variance.sqrt())
            else:
                total -= 0.5 * ((seen.metric - expected) ** 2 / variance + variance.log())
        return total

    @staticmethod
    def _variance(curves: CliffCurves, drop: Tensor, noise: float, share: float) -> Tensor:
        run_sd = curves.run_sd.reshape(-1, *[1] * (drop.ndim > 1))
        return noise + run_sd**2 + (share * drop.clamp(min=0)) ** 2

    def forward(self, X: Tensor) -> Tensor:
        """The curves at ``X`` [..., n, d]; shape ``[..., S, n, 1]``."""
        return (self.baseline_metric - self._drop(X)).unsqueeze(-1)

    def feasibility(self, X: Tensor) -> Feasibility:
        """Feasibility of ``X`` [..., q, d]; one member a curve."""
        metric = self.forward(X).squeeze(-1)
        drop = self.baseline_metric - metric
        variance = self._variance(
            self.curves, drop, self.noise_variance, self.predictive_discrepancy
        )
        return Feasibility((metric - self.target) / variance.sqrt(), self.log_weights)

    def certainty(self, seen: Observation, level: float) -> float:
        """Probability that a model of the history truly reaches a level."""
        drop = self._drop(seen.point[None]).squeeze(-1)
        variance = self._variance(self.curves, drop, 0.0, self.predictive_discrepancy)
        mean = self.baseline_metric - drop
        return probability_of_level(seen, level, mean, variance, self.log_weights)

    def outlook(self, X: Tensor) -> Outlook:
        """The metric at ``X`` [..., q, d]; one member a curve."""
        metric = self.forward(X).squeeze(-1)
        drop = self.baseline_metric - metric
        variance = self._variance(self.curves, drop, 0.0, self.predictive_discrepancy)
        return Outlook(metric, variance.clamp(min=1e-16).sqrt(), self.log_weights)

    def worth(self, seen: Observation) -> Tensor:
        """What each curve takes a measured model to be, shape ``[S]``."""
        mean, sd, _ = self.outlook(seen.point[None])
        return expected_metric(seen, mean[:, 0], sd[:, 0] ** 2)

    def predict(self, X: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted mean and quantiles of the curves at ``X`` [N, d]."""
        metric, order = self.forward(X).squeeze(-1).sort(dim=0)
        weights = self.log_weights.exp()[order]
        cumulative = weights.cumsum(dim=0).T.contiguous()
        tails = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=metric.dtype)
        at = torch.searchsorted(cumulative, tails.expand(len(cumulative), 2).contiguous())
        band = metric.T.gather(1, at.clamp(max=len(metric) - 1))
        return (metric * weights).sum(dim=0), band[:, 0], band[:, 1]


def bilog(value: Tensor) -> Tensor:
    """``sign(v) log(1 + |v|)``: linear around zero, logarithmic far from it.

    Eriksson and Poloczek, Scalable Constrained Bayesian Optimization, 2021.

    Example:
        >>> bilog(torch.tensor([0.0, -1.0])).tolist()
        [0.0, -0.6931471824645996]
    """
    return value.sign() * value.abs().log1p()


class BilogGP(SingleTaskGP):
    """A Gaussian process on the bi-log slack ``bilog((metric - target) / tolerance)``.

    Double precision, linear mean, Matérn-5/2 kernel, coordinates normalised to the unit cube of
    the candidates. Noise is transformed by hand, to first order and doubled for the run-to-run
    part: ``2 variance / tolerance^2 / (1 + |slack|)^2``. A diverged run enters as the worst slack
    seen, at least three tolerances below the level, with a standard deviation of 1/2; an aborted
    one as the mean and spread of a normal error, of standard deviation 1, below its bound.

    Members of `feasibility`: one, the exact marginal, for a single point; quasi-Monte Carlo draws
    of the joint posterior for a batch, so that points that would fail together count together.

    Args:
        problem: The problem; any number of coordinates.
        history: Finished evaluations; the baseline is added as data.
        seed: Seed of restarts of the fit and of the posterior draws.
        samples: Number of joint draws for a batch.

    Warns:
        RuntimeWarning: When the hyper-parameters cannot be fitted; those of the prior stay.
    """

    def __init__(
        self, problem: Problem, history: Sequence[Observation], seed: int, samples: int = 256
    ) -> None:
        """Transform the data and fit."""
        noise_sd = math.sqrt(problem.noise_variance)
        floor = 1e-9 * max(1.0, abs(problem.baseline_metric))
        scale = max(problem.tolerance, noise_sd, floor)
        observations = [problem.baseline, *history]
        points = torch.stack([seen.point for seen in observations])
        slack = torch.tensor(
            [(s.metric - problem.target) / scale for s in observations if s.metric is not None],
            dtype=torch.float64,
        )
        censored = torch.tensor([seen.censored for seen in observations])
        worst = min(float(slack.min()), -3.0)
        slack = torch.full((len(points),), worst, dtype=torch.float64).masked_scatter(
            ~censored, slack
        )
        variance = torch.tensor([seen.variance for seen in observations], dtype=torch.float64)
        noise = (2 * variance / scale**2 / (1 + slack.abs()) ** 2).clamp(min=1e-6)
        noise = torch.where(censored, 0.25, noise)
        targets = bilog(slack)
        for i, seen in enumerate(observations):
            if seen.bound is not None:
                bound = bilog(slack.new_tensor((seen.bound - problem.target) / scale))
                targets[i], noise[i] = bound - _HALF_NORMAL_MEAN, _HALF_NORMAL_SD**2
        everywhere = torch.cat([problem.candidates, problem.baseline.point[None]])
        d = points.shape[-1]
        with torch.random.fork_rng(devices=[]):  # LinearMean draws its initial weights
            mean = LinearMean(d)
        mean.initialize(weights=torch.zeros(d, 1), bias=torch.zeros(1))
        mean.register_prior("weights_prior", NormalPrior(0.0, 3.0), "weights")
        kernel = MaternKernel(nu=2.5, ard_num_dims=d, lengthscale_prior=GammaPrior(3.0, 6.0))
        with settings.validate_input_scaling(False):  # slack has a scale of its own
            super().__init__(
                points,
                targets.unsqueeze(-1),
                noise.unsqueeze(-1),
                covar_module=ScaleKernel(kernel, outputscale_prior=GammaPrior(2.0, 0.5)),
                mean_module=mean,
                outcome_transform=None,
                input_transform=Normalize(
                    d, bounds=torch.stack([everywhere.amin(0), everywhere.amax(0)])
                ),
            )
        self.scale, self.target, self.seed, self.samples = scale, problem.target, seed, samples
        self.noise_sd = max(math.sqrt(2) * noise_sd / scale, 1e-3)
        self._fit(seed)

    def _fit(self, seed: int) -> None:
        prior = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            with manual_seed(seed):  # a failed attempt restarts from a draw of the priors
                fit_gpytorch_mll(ExactMarginalLogLikelihood(self.likelihood, self))
        except (ModelFittingError, NanError, NotPSDError) as error:
            warnings.warn(
                f"the Gaussian process could not be fitted to {len(self.train_targets)} points "
                f"({error}); its prior hyper-parameters are used",
                RuntimeWarning,
                stacklevel=3,
            )
            self.load_state_dict(prior)
        self.eval()

    def feasibility(self, X: Tensor) -> Feasibility:
        """Feasibility of ``X`` [..., q, d]; see the class for its members."""
        posterior = self.posterior(X)
        if X.shape[-2] == 1:
            sd = (posterior.variance + self.noise_sd**2).sqrt()
            return Feasibility((posterior.mean / sd).mT, X.new_zeros(1))
        sampler = SobolQMCNormalSampler(torch.Size([self.samples]), seed=self.seed)
        draws = sampler(posterior).squeeze(-1).movedim(0, -2)
        log_weights = X.new_full((self.samples,), -math.log(self.samples))
        return Feasibility(draws / self.noise_sd, log_weights)

    def certainty(self, seen: Observation, level: float) -> float:
        """Probability that a model of the history truly reaches a level, by its own measurement.

        The process smooths the cliff too much to say of a point beside it how lucky it was: its
        posterior is less often right than the measurement alone.
        """
        mean = torch.tensor([seen.metric or 0.0], dtype=torch.float64)
        return probability_of_level(seen, level, mean, torch.tensor([torch.inf]), mean.new_zeros(1))

    def outlook(self, X: Tensor) -> Outlook:
        """The bi-log slack at ``X`` [..., q, d]; members as of `feasibility`."""
        posterior = self.posterior(X)
        if X.shape[-2] == 1:
            sd = posterior.variance.sqrt().mT.clamp(min=1e-6)
            return Outlook(posterior.mean.mT, sd, X.new_zeros(1))
        sampler = SobolQMCNormalSampler(torch.Size([self.samples]), seed=self.seed)
        draws = sampler(posterior).squeeze(-1).movedim(0, -2)
        log_weights = X.new_full((self.samples,), -math.log(self.samples))
        return Outlook(draws, torch.full_like(draws, self.noise_sd), log_weights)

    def worth(self, seen: Observation) -> Tensor:
        """The posterior mean of the bi-log slack where a model was measured, shape ``[1]``."""
        mean: Tensor = self.posterior(seen.point[None]).mean.flatten()
        return mean

    def predict(self, X: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Median and quantiles of the metric at ``X`` [N, d]."""
        posterior = self.posterior(X.unsqueeze(-2))  # N x 1 x d: no N x N covariance
        mean, sd = posterior.mean.flatten(), posterior.variance.flatten().sqrt()
        width = torch.special.ndtri(torch.tensor((1 + coverage) / 2, dtype=mean.dtype)) * sd
        centre, low, high = (
            self.target + self.scale * value.sign() * value.abs().expm1()
            for value in (mean, mean - width, mean + width)
        )
        return centre, low, high
