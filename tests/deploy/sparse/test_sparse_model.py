"""A sparse model gives the dense model's outputs, wherever its layers stand."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_condensa import CompressedModel, FilterPrune, Prune, SparseModel
from lightning_condensa.deploy import SparseMismatchError, compare, to_sparse
from lightning_condensa.deploy.sparse.choice import _check, fastest
from lightning_condensa.deploy.sparse.direct import DirectLayer
from lightning_condensa.deploy.sparse.fusion import gather_layers, join_layers
from lightning_condensa.deploy.sparse.layers import DenseLayer, Epilogue
from lightning_condensa.deploy.threads import torch_threads
from lightning_condensa.deploy.timing import Comparison, Ratio


class Residual(pl.LightningModule):
    """Batch norms, a shortcut, functional ReLU and pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.max_pool2d(functional.relu(self.second(x)) + x, 2)
        return self.head(self.depthwise(x).flatten(1))


class Branching(nn.Module):
    """What no symbolic tracer can follow, around a part that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x) if x.mean() < 100 else x
        return {"logits": self.head(input=y.flatten(1)), "features": y}


class Misleading(nn.Module):
    """A trace of this module computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if type(x) is Tensor else self.net(x) * 2


class ReadingUntraced(nn.Module):
    """Reads the weights of a child where no trace tells so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.weight.mean() if x.mean() < 100 else x


class Reader(nn.Module):
    """Layers that are used in other ways than by calling them once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(12, 12)
        self.read = nn.Linear(12, 12)
        self.idle = nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(functional.relu(self.twice(x)))
        x = functional.linear(self.read(x), self.read.weight)
        return self.attention(x, x, x)[0]


def images(samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, 10, 10) if samples else torch.zeros(0)


def prepared(module: nn.Module, density: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    module = CompressedModel.compress(module, Prune(density)).module.eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.2)
    return module


def all_direct(module: nn.Module, x: Tensor) -> nn.Module:
    """Every gathered layer on the kernel, whatever is faster."""
    holder = nn.ModuleList([gather_layers(deepcopy(module), trace=True)])
    for name, part in list(holder.named_modules()):
        if isinstance(part, DenseLayer) and getattr(part.layer, "groups", 1) == 1:
            holder.set_submodule(name, DirectLayer(part))
    return holder[0]


@pytest.mark.parametrize(
    "module",
    [Residual(), Branching(), Misleading(), ReadingUntraced()],
    ids=lambda m: type(m).__name__,
)
def test_outputs_are_those_of_the_dense_model(module: nn.Module) -> None:
    module = prepared(module)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    sparse = to_sparse(module, images(), threads=1)
    for samples in (2, 7):
        x = images(samples)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), module(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, module.state_dict()[n]) for n, v in before.items())


def test_a_model_that_cannot_be_taken_apart_says_why() -> None:
    with pytest.warns(UserWarning, match=r"no layer of ReadingUntraced .*AttributeError"):
        to_sparse(prepared(ReadingUntraced()), images(), threads=1)


@pytest.mark.parametrize("module", [Residual(), Branching()], ids=lambda m: type(m).__name__)
def test_outputs_when_the_kernel_does_all(module: nn.Module) -> None:
    module = prepared(module)
    for samples in (1, 5):
        x = images(samples)
        with torch.no_grad():
            wanted, ours = module(x), all_direct(module, x)(x)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def gathered(module: nn.Module) -> dict[str, Epilogue]:
    found = gather_layers(prepared(module), trace=True)
    return {n: m.epilogue for n, m in found.named_modules() if isinstance(m, DenseLayer)}


def test_what_a_layer_takes_in() -> None:
    assert gathered(Branching())["net.0"] == Epilogue(relu=True, pool=2)
    assert gathered(Residual()) == {
        "first": Epilogue(relu=True),  # used twice after that
        "second": Epilogue(relu=True),
        "depthwise": Epilogue(),
        "head": Epilogue(),
    }
    assert "norm" not in dict(gather_layers(prepared(Residual()), trace=True).named_modules())


@pytest.mark.parametrize(
    "following",
    [
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((2, 3)),
        nn.LeakyReLU(),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_what_a_layer_does_not_take_in(following: nn.Module) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), following).eval()
    assert gathered(module) == {"0": Epilogue()}
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(all_direct(module, x)(x), module(x), rtol=1e-4, atol=1e-5)


class Rows(nn.Module):
    """Layers that follow each other, and some that do not, though they seem to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.twice = nn.Conv2d(4, 4, 1)
        self.columns = nn.Linear(6, 6)
        self.more = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()))
        x = self.twice(self.twice(x) + x)
        return self.more(self.columns(self.inner(x)))


def test_layers_in_a_row_become_one() -> None:
    module = prepared(Rows())
    holder = nn.ModuleList([gather_layers(deepcopy(module), trace=True)])
    for name, part in list(holder.named_modules()):
        if isinstance(part, DenseLayer):
            holder.set_submodule(name, DirectLayer(part))
    assert join_layers(holder) == {
        "0.a": ["0.a", "0.b", "0.c"],
        "0.inner.0": ["0.inner.0", "0.inner.2"],
        "0.columns": ["0.columns", "0.more"],
    }
    left = {n for n, m in holder.named_modules() if isinstance(m, DirectLayer)}
    assert left == {"0.a", "0.twice", "0.inner.0", "0.columns"}
    for samples in (1, 3):
        x = torch.randn(samples, 4, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(holder[0](x), module(x), rtol=1e-4, atol=1e-5)


def test_an_output_that_others_use_is_not_passed_over() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(self.b(y)) + y

    holder = nn.ModuleList([gather_layers(prepared(Skip()), trace=True)])
    for name in ("0.a", "0.b"):  # c stays as it is
        holder.set_submodule(name, DirectLayer(holder.get_submodule(name)))
    assert join_layers(holder) == {}


def test_an_output_that_is_used_twice_stays_as_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return functional.relu(y) + y

    assert gathered(Twice()) == {"conv": Epilogue()}


def test_pooling_before_a_relu_is_not_reordered() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(2)).eval()
    assert gathered(module) == {"0": Epilogue(relu=False, pool=2)}


def test_layers_that_are_not_simply_called() -> None:
    module = prepared(Reader())
    hooked = nn.Linear(12, 12)
    hooked.register_forward_hook(lambda m, i, o: o + 1)
    module = nn.Sequential(module, hooked, nn.Linear(12, 3)).eval()
    x = torch.randn(2, 4, 12)
    sparse = to_sparse(module, x)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), module(x), rtol=1e-4, atol=1e-5)
    reasons = {row.name: row.reason for row in sparse.report.rows}
    assert set(reasons) == {
        *("0.twice", "0.read", "0.idle", "0.attention.out_proj", "1", "2"),
    }
    for name in ("0.read", "1"):
        assert "others read its weights" in reasons[name]
    for name in ("0.idle", "0.attention.out_proj"):
        assert reasons[name] == "is not called on the example"


def test_the_report_says_why_a_layer_stays_dense() -> None:
    module = nn.ModuleDict(
        {
            "groups": nn.Conv2d(4, 4, 3, groups=2),
            "circular": nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1),
            "full": nn.Conv2d(4, 4, 1),
            "narrow": nn.Conv2d(4, 4, 1).bfloat16(),
            "idle": nn.Linear(4, 4),
        }
    ).requires_grad_(False)
    for name in ("groups", "circular", "narrow", "idle"):
        module[name].weight[1:] = 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers["full"](self.layers["circular"](self.layers["groups"](x)))
            return self.layers["narrow"](x.bfloat16())

    rows = to_sparse(Net(), torch.randn(1, 4, 8, 8)).report.rows
    reasons = {row.name.removeprefix("layers."): row.reason for row in rows}
    assert reasons["groups"] == "groups=2"
    assert reasons["circular"] == "padding_mode='circular'"
    assert reasons["full"] == "100% of its weights are not zero"
    assert reasons["narrow"] == "computes in bfloat16"
    assert reasons["idle"] == "is not called on the example"
    assert all(row.method == "dense" for row in rows)


def test_a_large_sparse_layer_is_exchanged_and_faster() -> None:
    module = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16)).eval()
    compressed = CompressedModel.compress(module, Prune(0.01, scope="layer"))
    x = torch.randn(4, 1024)
    sparse = compressed.to_sparse(x, threads=1)
    row = sparse.report.rows[0]
    assert row.method == "direct"
    assert row.speedup is not None and row.speedup.median > 1.5
    assert row.inputs == (4, 1024)
    assert row.density == pytest.approx(0.01, abs=1e-4)
    assert isinstance(sparse.module.get_submodule("0"), DirectLayer)
    with torch.inference_mode():
        timed = compare({"dense": lambda: compressed.module(x), "sparse": lambda: sparse(x)})
    assert timed.speedup("sparse", "dense").median > 1.5
    data = json.loads(json.dumps(sparse.report.to_dict()))
    assert data["threads"] == 1 and data["rows"][0]["method"] == "direct"
    assert "direct" in str(sparse.report)


def test_a_layer_may_leave_threads_idle() -> None:
    module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16)).eval()
    compressed = CompressedModel.compress(module, Prune(0.02, scope="layer"))
    x = torch.randn(4, 512)
    assert "direct, one thread" not in compressed.to_sparse(x, threads=1).report.rows[0].seconds
    sparse = compressed.to_sparse(x, threads=2)
    assert {"direct", "direct, one thread"} <= sparse.report.rows[0].seconds.keys()
    layer = DenseLayer(compressed.module[0], Epilogue())
    with torch_threads(3):
        alone, all_threads = (DirectLayer(layer, alone=a)(x) for a in (True, False))
    assert torch.equal(alone, all_threads)


@pytest.mark.parametrize("share", [True, False])
def test_the_report_says_in_how_many_threads_a_row_runs(
    monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    alone = ("direct, one thread", Ratio(2.0, 2.0, 2.0))
    monkeypatch.setattr("lightning_condensa.deploy.sparse.choice.fastest", lambda _: alone)
    monkeypatch.setattr("lightning_condensa.deploy.sparse.model.share_threads", lambda *_: share)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    sparse = CompressedModel.compress(module, Prune(0.1)).to_sparse(torch.randn(2, 64), threads=2)
    joined = sparse.module.get_submodule("0")
    assert isinstance(joined, DirectLayer)
    assert (joined.shared() is joined) == share
    wanted = "direct" if share else "direct, one thread"
    assert [(row.name, row.method) for row in sparse.report.rows] == [("0", wanted), ("2", wanted)]


def test_only_what_wins_by_measurement_is_exchanged() -> None:
    dense = (1.0, 1.0, 1.0, 1.0)
    assert fastest(Comparison({"dense": dense, "csr": (0.97,) * 4}))[0] == "dense"
    shaky = {"dense": (*dense, 1.0), "csr": (0.5, 0.6, 0.9, 2.0, 2.0)}
    assert Comparison(shaky).speedup("csr", "dense").median > 1.1
    assert fastest(Comparison(shaky))[0] == "dense"
    method, speedup = fastest(
        Comparison({"dense": dense, "csr": (0.9,) * 4, "direct": (0.5, 0.5, 0.5, 1.0)})
    )
    assert (method, speedup.median) == ("direct", 2.0)
    method, _ = fastest(Comparison({"dense": dense, "csr": (0.8,) * 4, "direct": (2.0,) * 4}))
    assert method == "csr"


def test_wrong_outputs_are_an_error() -> None:
    layer = nn.Linear(200, 50).requires_grad_(False)
    layer.weight.mul_(torch.rand(50, 200) < 0.1)
    dense = DenseLayer(layer, Epilogue(relu=True))
    x = torch.randn(4, 200)
    _check("fc", "direct", DirectLayer(dense), dense, x)
    wrong = deepcopy(dense)
    position = tuple(wrong.layer.weight.nonzero()[7].tolist())
    wrong.layer.weight[position] = 0
    wrong.layer.bias += 10  # so that no output is rectified
    dense.layer.bias += 10
    with pytest.raises(SparseMismatchError, match="direct gives other outputs than fc"):
        _check("fc", "direct", DirectLayer(wrong), dense, x)


def test_a_model_that_gives_random_outputs_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.rand(4)

    with pytest.raises(SparseMismatchError, match="sparse Noisy gives other outputs"):
        to_sparse(Noisy(), torch.randn(2, 4))


def test_it_is_for_inference_only() -> None:
    module = prepared(Branching()).train()
    sparse = to_sparse(module, images())
    assert module.training and not sparse.training
    with pytest.raises(RuntimeError, match="inference only"):
        sparse.train()
    with pytest.raises(RuntimeError, match="gives no gradients"):
        sparse(images().requires_grad_())
    assert sparse.eval() is sparse
    assert not sparse(images())["logits"].requires_grad
    assert not any(p.requires_grad for p in sparse.parameters())


def test_a_copy_works_on_its_own() -> None:
    module = nn.Linear(512, 512).requires_grad_(False)
    module.weight.mul_(torch.rand(512, 512) < 0.01)
    x = torch.randn(2, 512)
    sparse = to_sparse(module, x)
    copy = deepcopy(sparse)
    wanted = sparse(x)
    del sparse
    assert isinstance(copy, SparseModel)
    assert torch.equal(copy(x), wanted)


def test_pruned_filters_make_blocks_or_not_but_outputs_stay() -> None:
    module = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1)).eval()
    compressed = CompressedModel.compress(module, FilterPrune(0.25))
    x = torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            compressed.to_sparse(x)(x), compressed.module(x), rtol=1e-4, atol=1e-5
        )


def test_bad_threads() -> None:
    for threads in (0, -1, 1.5):
        with pytest.raises(ValueError, match="threads must be an int >= 1"):
            to_sparse(nn.Linear(2, 2), torch.rand(1, 2), threads=threads)  # type: ignore[arg-type]
