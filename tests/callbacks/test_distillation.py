from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from launch import run_script
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_condensa import CondensaCallback, Prune
from lightning_condensa.callbacks.distillation import Distillation
from lightning_condensa.callbacks.tap import Stopwatch

WEIGHT, TEMPERATURE, EPOCHS = 0.6, 3.0, 4


def distillation(**kwargs: Any) -> Distillation:
    return Distillation(**({"weight": WEIGHT, "temperature": TEMPERATURE} | kwargs))


def mixed(loss: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Hinton's loss as everybody writes it."""
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    divergence = functional.kl_div(
        (student / TEMPERATURE).log_softmax(1),
        (teacher / TEMPERATURE).softmax(1),
        reduction="batchmean",
    )
    return (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * divergence


def plain_loop(
    module: Any,
    batches: list[tuple[Tensor, Tensor]],
    teacher: nn.Module | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """The same training without Lightning and without the callback."""
    teacher = copy.deepcopy(module) if teacher is None else teacher
    teacher.eval()
    module.train()
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=autocast == torch.float16)
    for step in range(EPOCHS * len(batches)):
        x, y = batches[step % len(batches)]
        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            x = prepare(x)
            logits = module(x)
            loss = functional.cross_entropy(logits, y)
            with torch.no_grad():
                target = teacher(x)
        scaler.scale(mixed(loss, logits, target) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in module.state_dict().items()}


def assert_close(module: nn.Module, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance, msg=name)


def assert_untouched(module: nn.Module) -> None:
    for part in module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks


# -- the same as a plain loop ----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_equals_a_plain_loop(  # type: ignore[no-untyped-def]
    net, trainer, loader, batches, optimizer, accumulate
) -> None:
    # In double precision: AdamW blows up the noise in the gradient of a bias before batch norm.
    options = {"accumulate_grad_batches": accumulate, "precision": "64-true", "max_epochs": EPOCHS}
    doubles = [(x.double(), y) for x, y in batches]
    expected = plain_loop(net(optimizer).double(), doubles, accumulate=accumulate)
    module, plain = net(optimizer), net(optimizer)
    trainer(distillation(), **options).fit(module, loader, loader)
    assert_close(module, expected, tolerance=1e-10)
    trainer(**options).fit(plain, loader)
    assert not torch.allclose(plain.layers[0].weight, module.layers[0].weight, atol=1e-3)
    assert vars(module).keys() == vars(plain).keys()
    assert_untouched(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(net, trainer, loader, batches, dtype) -> None:  # type: ignore[no-untyped-def]
    expected = plain_loop(net(), batches, accumulate=2, autocast=dtype)
    plugin = (
        MixedPrecision("bf16-mixed", "cpu")
        if dtype == torch.bfloat16
        else MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    )
    module = net()
    trainer(distillation(), max_epochs=EPOCHS, accumulate_grad_batches=2, plugins=[plugin]).fit(
        module, loader
    )
    # A last bit of the loss may differ, and rounding to 8 or 11 bits magnifies it.
    assert_close(module, expected, tolerance=1e-4)


def test_the_teacher_sees_the_augmented_inputs(net, net_class, trainer, loader, batches) -> None:  # type: ignore[no-untyped-def]
    noise = torch.Generator()

    def augmented(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=noise)

    class Noisy(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self(augmented(batch[0])), batch[1])

    noise.manual_seed(7)
    expected = plain_loop(net(), batches, prepare=augmented)
    noise.manual_seed(7)
    module = net(cls=Noisy)
    trainer(distillation(), max_epochs=EPOCHS).fit(module, loader)
    assert_close(module, expected)


def test_a_submodule_as_the_student(net, net_class, trainer, loader, batches) -> None:  # type: ignore[no-untyped-def]
    class Bypass(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            x, y = batch
            return {"loss": functional.cross_entropy(self.layers(x), y)}

    expected = plain_loop(net(), batches)
    module = net(cls=Bypass)
    trainer(distillation(layer="layers"), max_epochs=EPOCHS).fit(module, loader)
    assert_close(module, expected)
    assert_untouched(module)


def test_a_teacher_of_another_architecture(net, trainer, loader, batches) -> None:  # type: ignore[no-untyped-def]
    teacher = nn.Sequential(nn.Linear(8, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 3))
    teacher[1].eval()
    before = copy.deepcopy(teacher.state_dict())
    expected = plain_loop(net(), batches, copy.deepcopy(teacher))
    module = net()
    trainer(distillation(teacher=teacher), max_epochs=EPOCHS).fit(module, loader)
    assert_close(module, expected)
    assert [part.training for part in teacher.modules()] == [True, True, False, True, True]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_of_several_calls_the_mean_counts(net, net_class, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Twice(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            with torch.no_grad():
                self(10 * x)  # not distilled
            return functional.cross_entropy(torch.cat([self(x[:8]), self(x[8:])]), y)

    class Once(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self(x), y)

    modules = []
    for cls in (Twice, Once):
        module = net(cls=cls)
        module.layers[1] = nn.Identity()  # batch norm would see other batches
        trainer(distillation(), max_epochs=2).fit(module, loader)
        modules.append(module)
    assert_close(modules[0], modules[1].state_dict())


def test_lbfgs_runs_the_step_many_times(net, net_class, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Full(net_class):  # type: ignore[misc,valid-type]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

    module, callback = net(cls=Full), Distillation(weight=1.0)
    with torch.no_grad():
        module.layers[3].bias[0] += 1.0
    target = module.eval()(torch.ones(1, 8)).softmax(1).detach()
    trainer(callback, max_epochs=2).fit(module, loader)
    # It starts at the optimum in evaluation mode; in training mode it is driven back there.
    assert torch.allclose(module.eval()(torch.ones(1, 8)).softmax(1), target, atol=0.1)


# -- shapes of logits ------------------------------------------------------------------------------


class Dense(pl.LightningModule):
    """Predicts for every position: classes last (a sequence) or second (an image)."""

    def __init__(self, class_dim: int, key: str | int | None) -> None:
        super().__init__()
        self.class_dim, self.key = class_dim, key
        self.network = nn.Linear(4, 5) if class_dim == -1 else nn.Conv2d(4, 5, 1)

    def forward(self, *, x: Tensor) -> Any:
        logits = self.network(x)
        return {None: logits, "logits": {"logits": logits}, 1: ("state", logits)}[self.key]  # type: ignore[index]

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        output = self(x=x)
        logits = output if self.key is None else output[self.key]
        labels = torch.zeros(x.shape[:-1] if self.class_dim == -1 else (len(x), 6, 7)).long()
        return functional.cross_entropy(logits.movedim(self.class_dim, 1), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("key", [None, "logits", 1])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_logits_at_every_position(trainer, class_dim, key) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    shape = (8, 6, 4) if class_dim == -1 else (8, 4, 6, 7)
    x, module = torch.randn(shape), Dense(class_dim, key)
    network = copy.deepcopy(module.network)
    teacher = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for batch in x.split(4):
        logits, target = (
            n(batch).movedim(class_dim, -1).flatten(0, -2) for n in (network, teacher)
        )
        loss = functional.cross_entropy(logits, torch.zeros(len(logits)).long())
        optimizer.zero_grad()
        mixed(loss, logits, target.detach()).backward()
        optimizer.step()
    callback = distillation(class_dim=class_dim, logits=key)
    trainer(callback, max_epochs=1).fit(module, DataLoader(x, batch_size=4))  # type: ignore[arg-type]
    assert_close(module.network, network.state_dict())


# -- beside others --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "in place", "submodule"])
def test_compiled(net, net_class, trainer, loader, batches, how) -> None:  # type: ignore[no-untyped-def]
    class Step(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logits = self.layers(batch[0]) if how == "submodule" else self(batch[0])
            return functional.cross_entropy(logits, batch[1])

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    expected = plain_loop(net(), batches)
    module = compiled = net(cls=Step)
    if how == "whole":
        compiled = torch.compile(module, backend=counter)
    elif how == "in place":
        module.compile(backend=counter)
    else:
        module.layers = torch.compile(module.layers, backend=counter)
        expected = {n.replace("layers", "layers._orig_mod"): v for n, v in expected.items()}
    callback = distillation(layer="layers" if how == "submodule" else None)
    trainer(callback, max_epochs=EPOCHS).fit(compiled, loader)
    assert_close(module, expected)
    assert_untouched(module)
    assert 1 <= counter.frame_count <= 4  # compiled, and not anew for every batch


def test_beside_compression_the_teacher_stays_dense(net, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    module = net()
    start = copy.deepcopy(module).eval()
    x = torch.randn(5, 8)
    lc, callback = CondensaCallback(Prune(0.25), schedule={"l_steps": 5}), distillation()
    trainer(lc, callback, max_epochs=3).fit(module, loader, loader)
    assert callback._copy is not None
    assert torch.equal(callback._copy(x), start(x))
    assert density(module) == 0.25
    assert_untouched(module)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_validation_and_other_runs_do_not_call_the_teacher(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    teacher = Counting(8, 3)
    runs = trainer(distillation(teacher=teacher), max_epochs=2)
    module = net()
    runs.validate(module, loader, verbose=False)
    runs.fit(module, loader, loader)
    runs.test(module, loader, verbose=False)
    assert teacher.calls == 2 * len(loader)


def test_checkpointed_activations_call_the_teacher_once(
    net, net_class, trainer, loader, batches
) -> None:  # type: ignore[no-untyped-def]
    class Recomputing(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logits = torch.utils.checkpoint.checkpoint(self, batch[0], use_reentrant=False)
            return functional.cross_entropy(logits, batch[1])

    module, reference, teacher = net(cls=Recomputing), net(), Counting(8, 3)
    for one in (module, reference):
        one.layers[1] = nn.Identity()  # batch norm would count the batch twice
    expected = plain_loop(reference, batches, copy.deepcopy(teacher))
    trainer(distillation(teacher=teacher), max_epochs=EPOCHS).fit(module, loader)
    assert_close(module, expected)
    assert teacher.calls == EPOCHS * len(batches)


# -- reports ---------------------------------------------------------------------------------------


def test_loss_and_cost_are_logged(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    callback, logger = distillation(), CSVLogger(tmp_path)
    assert callback.teacher_seconds is None
    trainer(callback, max_epochs=2, logger=logger, log_every_n_steps=3).fit(net(), loader)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    losses = {r["step"]: r["condensa/distillation_loss"] for r in rows}
    assert [step for step, loss in losses.items() if loss] == ["2", "5", "8", "11"]
    assert all(0 <= float(loss) < 10 for loss in losses.values() if loss)
    assert callback.teacher_seconds is not None and callback.teacher_share is not None
    assert 0 < callback.teacher_share < 1
    assert float(rows[-1]["condensa/teacher_share"]) == callback.teacher_share
    assert float(rows[-1]["condensa/teacher_seconds"]) == callback.teacher_seconds


def test_cuda_spans_are_read_when_they_are_over(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Event:
        clock, done = 0.0, False

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.clock += 5.0
            self.at = Event.clock

        def query(self) -> bool:
            return Event.done

        def synchronize(self) -> None:
            Event.done = True

        def elapsed_time(self, end: Event) -> float:
            assert Event.done
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        stopwatch.start()
        stopwatch.stop()  # does not wait for the device: elapsed_time would fail
    assert stopwatch.seconds() == pytest.approx(0.015)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 1.5}, r"weight must be in \[0, 1\], got 1.5"),
        ({"weight": float("nan")}, "weight must be in"),
        ({"temperature": 0.0}, "temperature must be finite and more than 0, got 0.0"),
        ({"teacher": "resnet"}, "teacher must be a torch.nn.Module or None, got 'resnet'"),
    ],
)
def test_arguments_are_checked(arguments, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "head"}, r"submodule of TinyNet, such as \['layers'\], got 'head'"),
        ({"layer": "layers.2"}, "shape of the student's"),
        ({"class_dim": 2}, r"class_dim must be a dimension of the logits.*got 2"),
        ({"teacher": nn.Linear(8, 4)}, r"the student's, \(16, 3\), got \(16, 4\)"),
        ({"teacher": nn.LSTM(8, 3)}, r"a tensor in the tuple that the teacher returns, got None"),
        ({"teacher": nn.LSTM(8, 3), "logits": "y"}, "that the teacher returns, got 'y'"),
    ],
)
def test_errors_in_fit_leave_nothing_behind(net, trainer, loader, arguments, message) -> None:  # type: ignore[no-untyped-def]
    module = net()
    if arguments.get("layer") == "layers.2":
        arguments = arguments | {"teacher": nn.Linear(16, 3)}
    with pytest.raises(ValueError, match=message):
        trainer(distillation(**arguments), max_epochs=1).fit(module, loader)
    assert_untouched(module)


def test_a_step_must_call_the_student(net, net_class, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Direct(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self.forward(batch[0]), batch[1])

    class Overwriting(net_class):  # type: ignore[misc,valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self(batch[0]).div_(2.0), batch[1])

    for cls, message in ((Direct, "saw no call of the student"), (Overwriting, "in place")):
        with pytest.raises(ValueError, match=message):
            trainer(distillation(), max_epochs=1).fit(net(cls=cls), loader)


def test_manual_optimization_and_shared_weights_are_errors(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    module = net()
    with pytest.raises(ValueError, match="must not share parameters"):
        trainer(distillation(teacher=module.layers), max_epochs=1).fit(module, loader)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="with manual optimization add"):
        trainer(distillation(), max_epochs=1).fit(module, loader)


# -- two processes ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    run_script(Path(__file__).with_name("distillation_worker.py"), tmp_path)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        first, second, plain = (
            torch.load(tmp_path / f"{strategy}-{which}.pt", weights_only=True)
            for which in ("0", "1", "plain")
        )
        for name, value in first.items():
            assert torch.equal(value, second[name])
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
