"""The result of compression: a module that holds Δ(θ), together with θ itself."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.deploy.densities import kept_by_pool
from lightning_condensa.deploy.export import OnnxReport, program_bytes, require_onnx, trace
from lightning_condensa.deploy.factors import factored
from lightning_condensa.deploy.loading import SHRINK_PLAN, eager_name
from lightning_condensa.deploy.packed import Packed, pack, write_packed
from lightning_condensa.deploy.plan import Plan, plan_to_text
from lightning_condensa.deploy.report import Report
from lightning_condensa.deploy.shrink import shrink_theta, shrunk
from lightning_condensa.deploy.sparse import SparseModel, to_semi_structured, to_sparse
from lightning_condensa.functional.placement import whole
from lightning_condensa.functional.ranks import Ranks, count_nonzero
from lightning_condensa.graph import ChannelGraph
from lightning_condensa.schemes import Encoding, Scheme


class CompressedModel:
    """A module whose compressed parameters hold Δ(θ), with θ beside it.

    Where parameters are sharded over processes (DTensors), whatever counts, packs or saves is a
    collective call: every process makes it, and :meth:`save` lets one of them write.

    Args:
        module: The module; its compressed parameters already hold the decoded values.
        theta: θ by parameter name.
        scheme: The scheme that made θ.
        plan: What :meth:`shrink` kept, where it has made the module smaller than its class makes
            it: parameter → dimension → kept indices, attribute → number.
        stays: Weight → why :meth:`shrink` left units in it that are zero.
        factors: Whether :meth:`factorize` made two layers of one.

    Attributes:
        module: The module.
        theta: θ by parameter name.
        scheme: The scheme.
        plan: The shrink plan; empty where the module has its full size.
        stays: Weight → why :meth:`shrink` left units in it that are zero, or :meth:`factorize` its
            layer as it is; :meth:`report` says so, too.
        factors: Whether :meth:`factorize` made two layers of one.
    """

    def __init__(
        self,
        module: nn.Module,
        theta: Mapping[str, Encoding],
        scheme: Scheme,
        plan: Plan | None = None,
        stays: Mapping[str, str] | None = None,
        *,
        factors: bool = False,
    ) -> None:
        self.module = module
        self.theta = dict(theta)
        self.scheme = scheme
        self.plan = plan or {}
        self.stays = dict(stays or {})
        self.factors = factors

    @classmethod
    def compress(
        cls, module: nn.Module, scheme: Scheme, graph: ChannelGraph | None = None
    ) -> CompressedModel:
        """Project a copy of ``module`` onto the scheme, without any training.

        Args:
            module: The module; left as it is.
            scheme: What to compress, and how.
            graph: What :meth:`Scheme.trace` found in it, where that is known.

        Example:
            >>> from lightning_condensa import CompressedModel, Prune
            >>> compressed = CompressedModel.compress(nn.Linear(10, 10), Prune(0.2))
            >>> int(torch.count_nonzero(compressed.module.weight))
            20
        """
        copy = deepcopy(module)
        theta = scheme.bind(copy, graph).pi(dict(copy.named_parameters()))
        load_theta(copy, theta)
        return cls(copy, theta, scheme)

    @property
    def value_bytes(self) -> float:
        """The paper's memory footprint: bytes of all non-zero values, without positions."""
        other = [p for n, p in self.module.named_parameters() if n not in self.theta]
        counts = count_nonzero([p.detach() for p in other])
        dense = sum(n * p.element_size() for n, p in zip(counts, other, strict=True))
        return dense + sum(e.storage_bits for e in self.theta.values()) / 8

    def state_dict(self) -> dict[str, Tensor]:
        """A plain state dict that loads into the original class."""
        packed = self.packed()
        state = {n: e.decode() for n, e in packed.encoded.items()}
        state.update(packed.rest)
        state.update({alias: state[name] for alias, name in packed.aliases.items()})
        return {name: state[eager_name(name)] for name in self.module.state_dict()}

    def packed(self) -> Packed:
        """θ and the rest of the module's state, ready to be written.

        Names are those of the module without ``torch.compile``.

        Raises:
            ValueError: If the module keeps extra state that is not a tensor.
        """
        rest: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        owners: dict[int, str] = {}  # keep_vars: tied entries are the same object
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} in the module's state dict is {type(value).__name__}, not a tensor: "
                    "it cannot be stored without pickle"
                )
            owner = owners.setdefault(id(value), name)
            if owner != name:
                aliases[eager_name(name)] = eager_name(owner)
                continue
            if name not in self.theta:
                rest[eager_name(name)] = whole(value.detach()).cpu()
        encoded = {eager_name(n): e.whole().to(torch.device("cpu")) for n, e in self.theta.items()}
        metadata = {"scheme": self._scheme_text()}
        if self.plan:
            metadata[SHRINK_PLAN] = plan_to_text(
                {eager_name(n): cuts for n, cuts in self.plan.items()}
            )
        return Packed(encoded, rest, aliases, metadata)

    def _scheme_text(self) -> str:
        """The scheme for readers of the file; nothing is built from it on load."""
        try:
            return self.scheme.to_yaml()
        except ValueError:  # it holds a function that no configuration can name
            return self.scheme.describe()

    def save(self, path: str | Path) -> int:
        """Write the packed file.

        Args:
            path: Where to; replaced atomically.

        Returns:
            Its size in bytes.

        Raises:
            ValueError: If :meth:`factorize` made the model.
        """
        if self.factors:
            raise ValueError(
                "a file is loaded into the original class, which has one layer where factorize() "
                "made two: save the model that this one was made from"
            )
        packed = self.packed()
        ranks = Ranks.holding([leaf.codes for e in self.theta.values() for leaf in e.leaves])
        # The sum waits for the file to be there.
        return ranks.totals([write_packed(path, packed) if ranks.leads else 0])[0]

    def file_bytes(self) -> int:
        """Size of the packed file, without writing it."""
        return len(pack(self.packed()))

    def to_onnx(
        self,
        path: str | Path,
        example: Any,
        precision: Literal["float32", "float16", "int8"] = "float32",
        calibration: Any = None,
    ) -> OnnxReport:
        """Write an ONNX file (opset 21) of forward in evaluation mode, for any batch size.

        The weights of ``Codebook`` are stored as a table and indices of four bits (up to 16
        values, zero among them) or eight.

        Args:
            path: Where to; replaced atomically.
            example: A batch of inputs, or a tuple of positional inputs: tensors, the first with
                the batch in dimension 0.
            precision: ``"float16"`` for smaller weights; inputs and outputs stay float32.
                ``"int8"`` for integer arithmetic with the codes and scales of θ as they are, batch
                norm folded into the scales; layers for which that cannot be stay float32, and the
                report says why.
            calibration: For int8, data from which the ranges of activations are learnt: a
                ``LightningDataModule``, whose training batches are taken, or an iterable of
                batches that begin with the inputs. 1,024 samples are used.

        Returns:
            The size of the file, and how each compressed parameter is stored.

        Raises:
            ImportError: If the packages of the extra ``onnx`` are missing.
            ValueError: If an argument is none of these, or no layer can be computed in int8.
        """
        require_onnx()
        from lightning_condensa.deploy.export.onnx_file import onnx_file

        data, layers = onnx_file(self.module, self.theta, example, precision, calibration)
        write_atomically(path, data)
        return OnnxReport(len(data), layers)

    def to_torch_export(self, path: str | Path, example: Any) -> int:
        """Write forward in evaluation mode, for any batch size, as a ``.pt2`` archive.

        ``torch.export.load(path).module()`` runs it without the code of the module. Weights are
        dense in it.

        Args:
            path: Where to; replaced atomically.
            example: See :meth:`to_onnx`.

        Returns:
            Its size in bytes.

        Raises:
            ValueError: If ``example`` is nothing of the kind.
        """
        data = program_bytes(trace(self.module, example))
        write_atomically(path, data)
        return len(data)

    def to_sparse(self, example: Any, threads: int | None = None) -> SparseModel:
        """A model for inference on the CPU that skips zero weights wherever that is faster.

        Each Conv2d and Linear layer is measured; see
        :func:`lightning_condensa.deploy.sparse.to_sparse`.

        Args:
            example: An input batch, or a tuple of positional inputs.
            threads: CPU threads to measure with; as many as torch uses where ``None``.

        Returns:
            A new module; ``.report`` says what each layer uses.

        Raises:
            ValueError: If ``threads`` is not positive.
            SparseMismatchError: If outputs differ by more than rounding.
        """
        return to_sparse(self.module, example, threads)

    def to_semi_structured(self, example: Any, dtype: torch.dtype = torch.float16) -> SparseModel:
        """A model for a CUDA device that skips two weights in four wherever that is faster.

        Linear layers that `NMPrune` left 2:4 sparse are measured; see
        :func:`lightning_condensa.deploy.sparse.to_semi_structured`.

        Args:
            example: An input batch, or a tuple of positional inputs.
            dtype: That the model computes in: float16 or bfloat16.

        Returns:
            A new module, on the CUDA device; ``.report`` says what each layer uses.

        Raises:
            ValueError: If ``dtype`` is another one.
            RuntimeError: If there is no CUDA device with sparse tensor cores.
            SparseMismatchError: If outputs differ by more than rounding.
        """
        return to_semi_structured(self.module, example, dtype)

    def report(self, gaps: Mapping[str, float] | None = None) -> Report:
        """Per-layer density, bits, bytes and gap, and why other parameters were left alone.

        Beside it what was asked of pruned parameters, and warnings where a layer is nearly removed;
        not of a model that :meth:`shrink` made smaller, in which what is left is all there is.
        """
        limits = self.scheme.held(self.module)
        found = [*self.scheme.skipped(self.module), *limits]
        named = [s for s in found if s.name not in self.theta]
        held = dict(self.stays)
        for each in limits:
            held[each.name] = "; ".join(filter(None, [held.get(each.name), each.reason]))
        changed = self.plan or self.factors
        pools = () if changed else kept_by_pool(self.scheme.bind(self.module), self.theta)
        return Report.of(self.theta, named, gaps or {}, pools, held)

    def shrink(self, example: Any = None) -> CompressedModel:
        """A physically smaller model with the same outputs: see :func:`shrink`.

        It can be trained on, measured and saved; :func:`load_compressed` makes a module of the full
        size as small again.

        Args:
            example: An input in Lightning's ``example_input_array`` convention; that of the module
                where ``None``.

        Returns:
            A model of its own, with the plan by which it was cut.

        Raises:
            ValueError: If there is no example, the module cannot be traced on it, or it is smaller
                than its class makes it already.

        Example:
            >>> from lightning_condensa import CompressedModel, NeuronPrune
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> net.example_input_array = torch.zeros(1, 4)
            >>> smaller = CompressedModel.compress(net, NeuronPrune(0.25, coupled=True)).shrink()
            >>> smaller.module[0], len(smaller.plan["2.weight"][1])
            (Linear(in_features=4, out_features=2, bias=True), 2)
        """
        if self.plan:
            raise ValueError("the model was made smaller before: shrink the one it was made from")
        result = shrunk(self.module, self._example("shrink", example))
        theta = shrink_theta(self.theta, result.plan)
        stays = {**self.stays, **result.stays}
        return CompressedModel(
            result.module, theta, self.scheme, result.plan, stays, factors=self.factors
        )

    def factorize(self, example: Any = None) -> CompressedModel:
        """A model in which each Linear and convolution of low rank is two layers in a row.

        Only that makes a low rank fast: ``r (m + n)`` multiplications in the place of ``m n``.
        θ holds the factors as they are, rounded ones too, so that :meth:`to_onnx` with ``"int8"``
        stores their codes. It can be trained on, measured, made smaller and exported. Save the
        packed file from the model that this was made from: it holds the same numbers, and loads
        into the original class.

        Args:
            example: As for :meth:`shrink`; the model runs on it after every step.

        Returns:
            A model of its own. Where a layer must stay as it is (tied, grouped, part of attention,
            or what is around it reads its weight), ``stays`` and :meth:`report` say why.

        Raises:
            ValueError: If there is no example.

        Example:
            >>> from lightning_condensa import CompressedModel, LowRank
            >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> net.example_input_array = torch.zeros(1, 8)
            >>> compressed = CompressedModel.compress(net, LowRank(rank=2, include=["0.weight"]))
            >>> compressed.factorize().module[0]
            Sequential(
              (0): Linear(in_features=8, out_features=2, bias=False)
              (1): Linear(in_features=2, out_features=8, bias=True)
            )
        """
        result = factored(self.module, self.theta, self._example("factorize", example))
        stays = {**self.stays, **result.stays}
        return CompressedModel(
            result.module, result.theta, self.scheme, self.plan, stays, factors=True
        )

    def _example(self, method: str, example: Any) -> Any:
        found = getattr(self.module, "example_input_array", None) if example is None else example
        if found is None:
            raise ValueError(
                f"{method} must run the model: pass example=, an input batch, or set "
                f"{type(self.module).__name__}.example_input_array"
            )
        return found

    def __repr__(self) -> str:
        return f"CompressedModel({type(self.module).__name__}, {self.scheme.describe()})"


@torch.no_grad()
def load_theta(module: nn.Module, theta: Mapping[str, Encoding]) -> None:
    """Overwrite the compressed parameters of a module with Δ(θ)."""
    parameters = dict(module.named_parameters())
    for name, encoded in theta.items():
        parameters[name].copy_(encoded.decode())
