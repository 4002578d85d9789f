"""What every scheme and executor must do, as checks for yours.

    import pytest
    from lightning_condensa.testing import LAWS, check_scheme

    @pytest.mark.parametrize("law", LAWS)
    def test_my_scheme(law):
        check_scheme(MyScheme(), law)

A scheme that fails one raises ``AssertionError`` with the layer and what was seen. Every scheme of
this package passes all of them. Laws on Π of what Π has made are checked to the bit, or where the
scheme has a ``tolerance``, against that. ``check_executor(make, law)`` with a law of
``EXECUTOR_LAWS`` does the same for ``concurrent.futures`` executors.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa.callbacks import CondensaCallback
from lightning_condensa.deploy import CompressedModel, load_compressed
from lightning_condensa.deploy.packed import pack
from lightning_condensa.schemes import Compose, Encoding, NotFiniteError, Prune, Scheme
from lightning_condensa.schemes.bound import PRUNE
from lightning_condensa.schemes.coupling import Coupling
from lightning_condensa.schemes.prune import DensityPrune
from lightning_condensa.schemes.slices import LinkedPrune
from lightning_condensa.search.executors.laws import EXECUTOR_LAWS as EXECUTOR_LAWS
from lightning_condensa.search.executors.laws import check_executor as check_executor

_Law = Callable[[Scheme, nn.Module], None]


class _GroupedQuery(nn.Module):
    """The projections of an attention whose query heads share keys and values in pairs."""

    num_heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 16), nn.Linear(16, 8)
        self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class _Residual(nn.Module):
    """Layers with what follows from them: norms, a sum, a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.path = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        )
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        self.example_input_array = torch.zeros(2, 3, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head((x + self.path(x)).relu().mean((2, 3)))
        return y


#: Layers that models are made of, small; a scheme is tried on those that it selects.
LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "conv1d": lambda: nn.Conv1d(8, 12, 3),
    "conv2d": lambda: nn.Conv2d(8, 12, 3),
    "conv3d": lambda: nn.Conv3d(4, 8, 2),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
    "grouped": lambda: nn.Conv2d(16, 12, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, groups=12),
    "lstm": lambda: nn.LSTM(8, 6),
    "gru": lambda: nn.GRU(8, 6),
    "attention": lambda: nn.MultiheadAttention(16, 4),
    "grouped-query attention": _GroupedQuery,
    "two layers": lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)),
}

#: Networks with example inputs, for schemes that follow channels through a forward pass.
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"residual": _Residual}


def check_scheme(
    scheme: Scheme, law: str, layers: Mapping[str, Callable[[], nn.Module]] = LAYERS
) -> int:
    """Check that a scheme keeps a law on every layer that it can compress.

    Args:
        scheme: Without open search dimensions.
        law: A key of :data:`LAWS`.
        layers: Builders of modules to try it on; those that the scheme refuses are left out.

    Returns:
        How many modules it was tried on.

    Raises:
        AssertionError: If it does not keep the law, or can compress none of the modules.

    Example:
        >>> from lightning_condensa import Quantize
        >>> check_scheme(Quantize("int4"), "idempotent")
        12
    """
    tried = 0
    for name, build in layers.items():
        module = _filled(build())
        try:
            scheme.bind(module)
        except ValueError:  # selects nothing here, or refuses the shape
            continue
        tried += 1
        try:
            LAWS[law](scheme, module)
        except AssertionError as error:
            raise AssertionError(f"{scheme.describe()} on {name}: {error}") from error
    assert tried > 0, f"{scheme.describe()} can compress none of {', '.join(layers)}"
    return tried


def _filled(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def _pi(scheme: Scheme, module: nn.Module) -> dict[str, Encoding]:
    return scheme.bind(module).pi(_weights(module))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _idempotent(scheme: Scheme, module: nn.Module) -> None:
    bound = scheme.bind(module)
    once = bound.delta(bound.pi(_weights(module)))
    again = bound.delta(bound.pi(_weights(module) | once))
    _check_unmoved(scheme, once, again, "Π(Δ(Π(w))) differs from Π(w)")


def _check_unmoved(
    scheme: Scheme, once: Mapping[str, Tensor], again: Mapping[str, Tensor], message: str
) -> None:
    """Check that Π gives back what it made: to the bit, or as near as the scheme promises."""
    if scheme.tolerance == 0:
        for name, weight in once.items():
            assert _same(weight, again[name]), f"{message} in {name}"
        return
    moved = _norm([again[n].to(torch.float64) - w for n, w in once.items()])
    # Next to zero numbers are far apart.
    step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    rounding = step * math.sqrt(sum(w.numel() for w in once.values()))
    allowed = scheme.tolerance * _norm(once.values()) + rounding
    assert moved <= allowed, f"{message} by {moved:g}, its tolerance allows {allowed:g}"


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.to(torch.float64).square().sum()) for t in tensors))


def _like_the_weight(scheme: Scheme, module: nn.Module) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(module).to(dtype)
        bound, weights = scheme.bind(narrow), _weights(narrow)
        theta = bound.pi(weights)
        assert tuple(theta) == bound.names, f"θ has {tuple(theta)}, the scheme names {bound.names}"
        for name, decoded in bound.delta(theta).items():
            weight = weights[name]
            for what in ("dtype", "shape", "device"):
                ours, wanted = getattr(decoded, what), getattr(weight, what)
                assert ours == wanted, f"{what} of {name} is {ours}, not {wanted}"
            assert decoded.isfinite().all(), f"{name} is not finite in {dtype}"
        for name, parameter in narrow.named_parameters():
            assert _same(parameter.detach(), weights[name]), f"Π has changed {name} in place"


def _deterministic(scheme: Scheme, module: nn.Module) -> None:
    first = scheme.bind(module).delta(_pi(scheme, module))
    second = scheme.bind(module).delta(_pi(scheme, module))
    for name in first:
        assert _same(first[name], second[name]), f"{name} differs from one call to the next"


def _keeps_zeros(scheme: Scheme, module: nn.Module) -> None:
    if scheme.stages[0].order == PRUNE:
        theta = _pi(scheme, module)
    else:
        names = [re.escape(t.name) for t in scheme.stages[0].select(module)]
        after_pruning = Compose(
            [Prune(0.4, types=scheme.stages[0].layer_types, include=names), *scheme.stages]
        )
        if any(stage.splits for stage in scheme.stages):
            _check_refused(after_pruning, module)
            return
        theta = _pi(after_pruning, module)
    for name, encoded in theta.items():
        if encoded.mask is not None:
            pruned = encoded.decode()[~encoded.mask]
            assert not pruned.any(), f"{name} is not zero where it was pruned"
            assert not torch.signbit(pruned).any(), f"{name} holds -0.0 where it was pruned"


def _check_refused(scheme: Scheme, module: nn.Module) -> None:
    """Check that zeros which would not stay are not made in the first place."""
    try:
        scheme.bind(module)
    except ValueError:
        return
    raise AssertionError(f"{scheme.describe()} splits what was pruned, and is not refused")


def _exact_density(scheme: Scheme, module: nn.Module) -> None:
    stage, targets = scheme.bind(module).stages[0]
    if getattr(scheme.stages[0], "align", 1) != 1:
        return
    theta = _pi(scheme.stages[0], module)
    if isinstance(stage, LinkedPrune) and stage.couplings is not None:
        _exact_groups(stage, stage.couplings, theta)
        return
    pruning = stage.scheme if isinstance(stage, LinkedPrune) else stage
    if not isinstance(pruning, DensityPrune):
        return
    for pool in pruning.pools(targets):
        sizes = [
            pruning.score(t, torch.empty(t.shape, device="meta")).numel() for t in pool.members
        ]
        kept = 0
        for target in pool.members:
            mask = theta[target.name].mask
            assert mask is not None, f"{target.name} was pruned but has no mask"
            score = pruning.score(target, mask.to(torch.float32))
            kept += int(score.count_nonzero())
        wanted = round(pool.density * sum(sizes))
        assert kept == wanted, f"{kept} of {sum(sizes)} groups are kept, {wanted} were asked for"


def _exact_groups(
    stage: LinkedPrune, couplings: Sequence[Coupling], theta: Mapping[str, Encoding]
) -> None:
    for pool in stage.scheme.pools(couplings):
        kept, total = 0, 0
        for coupling in pool.members:
            verdicts = []
            for target, units in zip(coupling.targets, coupling.units, strict=True):
                mask = theta[target.name].mask
                assert mask is not None, f"{target.name} was pruned but has no mask"
                rows, _ = stage.scheme.grouping(target).split(mask)
                verdicts.append(rows.any(1)[units])
            joined = torch.cat(verdicts, dim=1)
            assert bool((joined == joined[:, :1]).all()), f"a group of {coupling.name} is cut"
            kept += int(joined[:, 0].sum())
            total += coupling.groups
        wanted = round(pool.density * total)
        assert kept == wanted, f"{kept} of {total} groups are kept, {wanted} were asked for"


def _counts_its_bits(scheme: Scheme, module: nn.Module) -> None:
    for name, encoded in _pi(scheme, module).items():
        for leaf in encoded.leaves:
            distinct = len(torch.unique(leaf.codes.float()))
            bits = 8 * leaf.codes.element_size()
            assert leaf.value_bits <= bits, f"{name} counts more bits than its codes have"
            # What is pruned has no value; a binary code has no zero.
            values = distinct - int(bool((leaf.codes == 0).any()))
            assert 2**leaf.value_bits >= values, (
                f"{name} counts {leaf.value_bits} bits for {values} values"
            )
        least = sum(leaf.nnz * leaf.value_bits for leaf in encoded.leaves)
        assert encoded.storage_bits >= least, f"{name} counts fewer bits than its values have"


def _saves(scheme: Scheme, module: nn.Module) -> None:
    compressed = CompressedModel.compress(module, scheme)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.condensa"
        compressed.save(path)
        other = load_compressed(path, _filled(copy.deepcopy(module), seed=1))
    for name, tensor in compressed.module.state_dict().items():
        assert _same(other.state_dict()[name], tensor), f"{name} differs after loading"
    assert len(pack(compressed.packed())) == compressed.file_bytes(), "file_bytes is not the size"


def _configures(scheme: Scheme, module: nn.Module) -> None:
    again = Scheme.from_yaml(scheme.to_yaml())
    assert again == scheme, f"YAML gives {again!r}"
    first, second = (s.bind(module).delta(_pi(s, module)) for s in (scheme, again))
    assert all(_same(first[n], second[n]) for n in first), "a scheme from YAML projects otherwise"


#: Weights that rounding and selection are most likely to trip over.
_EXTREMES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "all equal": lambda w: torch.full_like(w, 0.37),
    "huge": lambda w: w * 1e30,
    "denormal": lambda w: w.sign() * 1e-41,
    "one outlier": lambda w: torch.where(torch.arange(w.numel()).view(w.shape) == 1, 1e6, w),
}


def _survives_extremes(scheme: Scheme, module: nn.Module) -> None:
    bound = scheme.bind(module)
    for kind, change in _EXTREMES.items():
        weights = {n: change(w) for n, w in _weights(module).items()}
        once = bound.delta(bound.pi(weights))
        for name in once:
            assert once[name].isfinite().all(), f"{name} is not finite where weights are {kind}"
        again = bound.delta(bound.pi(weights | once))
        _check_unmoved(scheme, once, again, f"not idempotent where weights are {kind}: differs")


def _refuses_nan(scheme: Scheme, module: nn.Module) -> None:
    for value in (torch.nan, torch.inf):
        weights = _weights(module)
        name = scheme.bind(module).names[0]
        weights[name].view(-1)[0] = value
        try:
            scheme.bind(module).pi(weights)
        except NotFiniteError as error:
            assert name in str(error), f"the error does not name {name}: {error}"
        else:
            raise AssertionError(f"a weight that is {value} raises no NotFiniteError")


class _Learner(pl.LightningModule):
    """Any module, taught to give back noise: its outputs' mean square is the loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.example_input_array = getattr(module, "example_input_array", None)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pulls = [(p - batch[0][0, 0]).square().mean() for p in self.module.parameters()]
        return torch.stack(pulls).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _trains(scheme: Scheme, module: nn.Module) -> None:
    learner = _Learner(module)
    callback = CondensaCallback(scheme, schedule={"l_steps": 4})
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False}
    for quiet in ("checkpointing", "progress_bar", "model_summary"):
        settings[f"enable_{quiet}"] = False
    data = DataLoader(TensorDataset(functional.normalize(torch.ones(12, 2))), batch_size=2)
    pl.Trainer(max_epochs=2, callbacks=[callback], **settings).fit(learner, data)
    theta = callback.compressed.theta
    for name, encoded in theta.items():
        held = learner.get_parameter(name).detach()
        assert _same(held, encoded.decode()), f"after fit the module does not hold Δ(θ) in {name}"
    bound = scheme.bind(learner)
    again = bound.delta(bound.pi(_weights(learner)))
    _check_unmoved(scheme, bound.delta(theta), again, "after fit off the constraint")


LAWS: Mapping[str, _Law] = {
    "idempotent": _idempotent,
    "like the weight": _like_the_weight,
    "deterministic": _deterministic,
    "keeps zeros": _keeps_zeros,
    "exact density": _exact_density,
    "counts its bits": _counts_its_bits,
    "saves": _saves,
    "configures": _configures,
    "survives extremes": _survives_extremes,
    "refuses NaN": _refuses_nan,
    "trains": _trains,
}
