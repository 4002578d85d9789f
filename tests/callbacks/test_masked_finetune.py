from __future__ import annotations

from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_condensa import (
    CompressedModel,
    CondensaCallback,
    DirectCompression,
    MaskedFineTune,
    NeuronPrune,
    Prune,
)


@pytest.fixture
def pruned(net) -> Callable[..., pl.LightningModule]:  # type: ignore[no-untyped-def]
    def build(optimizer: str = "sgd", scheme=Prune(0.3)) -> pl.LightningModule:  # type: ignore[no-untyped-def] # noqa: B008
        return CompressedModel.compress(net(optimizer), scheme).module

    return build


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_zeros_stay_zero_and_the_rest_trains(  # type: ignore[no-untyped-def]
    pruned, trainer, loader, optimizer, accumulate
) -> None:
    module = pruned(optimizer)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer(MaskedFineTune(), max_epochs=4, accumulate_grad_batches=accumulate).fit(module, loader)
    for n, p in module.named_parameters():
        if p.dim() > 1:
            assert torch.equal(p.detach() == 0, before[n] == 0)
            assert not torch.equal(p.detach(), before[n])


def test_biases_of_removed_neurons(pruned, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    for biases in (True, False):
        module = pruned(scheme=NeuronPrune(0.5))
        dead = module.layers[0].bias.detach() == 0
        assert bool(dead.any())
        trainer(MaskedFineTune(biases=biases), max_epochs=2).fit(module, loader)
        assert not module.layers[0].weight.detach()[dead].any()
        # batch norm follows, so a bias has no effect but weight decay or rounding may move it
        if biases:
            assert not module.layers[0].bias.detach()[dead].any()


def test_masked_gradients_do_not_count_in_clipping(pruned, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Norm(pl.Callback):
        masked = True

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
            for p in pl_module.parameters():
                if p.dim() > 1:
                    Norm.masked &= not p.grad[p.detach() == 0].any()

    trainer(MaskedFineTune(), Norm(), max_epochs=1, gradient_clip_val=0.1).fit(pruned(), loader)
    assert Norm.masked


def test_resume_is_bit_identical_and_keeps_the_masks(pruned, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    module = pruned("adamw")
    trainer(MaskedFineTune(), saver, max_epochs=4).fit(module, loader)
    other = pruned("adamw", Prune(0.9))  # other zeros, which the checkpoint overrides
    file = tmp_path / "epoch=1.ckpt"
    trainer(MaskedFineTune(), max_epochs=4).fit(other, loader, ckpt_path=file, weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_a_module_without_zeros_is_an_error(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="found no zeros in the weights of TinyNet"):
        trainer(MaskedFineTune(), max_epochs=1).fit(net(), loader)


def test_masks_of_an_earlier_fit_are_forgotten(pruned, trainer, loader, tmp_path, density) -> None:  # type: ignore[no-untyped-def]
    saver = ModelCheckpoint(tmp_path, filename="early", every_n_epochs=1)
    trainer(MaskedFineTune(), saver, max_epochs=1).fit(pruned(), loader)
    callback, module = MaskedFineTune(), pruned(scheme=Prune(0.5))
    trainer(callback).test(pruned(), loader, ckpt_path=tmp_path / "early.ckpt", verbose=False)
    trainer(callback, max_epochs=1).fit(module, loader)
    assert density(module) == 0.5


def test_finetuning_after_condensa(net, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    module = net()
    trainer(CondensaCallback(Prune(0.25), schedule={"l_steps": 5}), max_epochs=3).fit(
        module, loader
    )
    trainer(MaskedFineTune(), max_epochs=2).fit(module, loader)
    assert density(module) == 0.25


def test_direct_compression(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    plain, module = net(), net()
    trainer(max_epochs=2).fit(plain, loader)
    callback = DirectCompression(Prune(0.25))
    trainer(callback, max_epochs=2).fit(module, loader)
    expected = CompressedModel.compress(plain, Prune(0.25)).module
    for name, value in expected.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])
    assert callback.compressed.module is module
    assert sum(e.nnz for e in callback.compressed.theta.values()) == 44
    assert callback.report() is not None


def test_direct_compression_errors(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="scheme must be a scheme"):
        DirectCompression("int8")  # type: ignore[arg-type]
    callback = DirectCompression(Prune(0.25, include="nowhere"))
    with pytest.raises(RuntimeError, match=r"run trainer\.fit first"):
        _ = callback.compressed
    with pytest.raises(ValueError, match="'nowhere' matches no weight"):
        trainer(callback, max_epochs=1).fit(net(), loader)
