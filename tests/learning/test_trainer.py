"""Optimiser steps: averaged weights, micro-batches, memory that does not suffice, and the rates of groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stemtune.config import Config
from stemtune.dataset.batches import Batch
from stemtune.dataset.loaders import loaders
from stemtune.errors import UserError
from stemtune.learning import fit as fit_module
from stemtune.learning.checkpoint import load_checkpoint, load_model
from stemtune.learning.fit import fit
from stemtune.learning.models import build
from stemtune.learning.train import run_workers
from stemtune.learning.trainer import Trainer, chosen_precision, learning_rate

Settings = Callable[..., Config]
CPU = torch.device("cpu")


def test_automatic_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, chosen in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert chosen_precision("auto", CPU) is chosen
    assert chosen_precision("fp32", CPU) is None


def test_the_learning_rate_warms_up_and_decays_by_epoch() -> None:
    optim = Config.from_flat({"optim.lr": 0.1, "optim.lr_decay": 0.5, "optim.warmup": 1}).optim
    rates = [learning_rate(optim, step, 10, 4) for step in range(40)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.05) and rates[39] == pytest.approx(0.0125)
    cosine = Config.from_flat({"optim.lr": 0.1, "optim.schedule": "cosine", "optim.warmup": 0}).optim
    rates = [learning_rate(cosine, step, 10, 4) for step in range(41)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == pytest.approx(0.0505) and rates[40] == pytest.approx(0.001)


def ignored(metrics: dict[str, float], folder: Path | None) -> None:
    """Take a report."""


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "checkpoint" / "model" / "model.safetensors"))


def trainer_of(config: Config) -> tuple[Trainer, Batch]:
    """Return a trainer of a new model, and the first batch of its first epoch."""
    loader, _ = loaders(config)
    torch.manual_seed(0)
    model = build(config, loader.phase, loader.geometry)
    batch = next(iter(loader.epoch(0)))
    return Trainer(config, model, loader.batches_per_epoch, CPU), batch


def test_the_model_that_is_kept_has_averaged_weights(tiny: Settings) -> None:
    trainer, batch = trainer_of(tiny(train__ema=0.3, train__channels_last=False))
    mean = {name: value.double() for name, value in trainer.model.state_dict().items()}
    for step in range(1, 5):
        trainer.train([batch])
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in trainer.model.state_dict().items():
            mean[name] = decay * mean[name] + (1 - decay) * value.double()
    last = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with trainer.averaged():
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value.double(), mean[name], atol=1e-6, rtol=1e-5)
            assert torch.equal(trainer.state()["weights"][name], last[name])
    assert all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())


def test_an_average_begins_with_the_weights_of_a_checkpoint_without_one(tiny: Settings, tmp_path: Path) -> None:
    """Up to version 0.1 there was none."""

    def stop(metrics: dict[str, float], folder: Path | None) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(tiny(train__ema=0), stop, tmp_path / "old", device=CPU)
    old = tmp_path / "old" / "checkpoint"
    assert "weights" not in torch.load(old / "checkpoint.pt", weights_only=True)
    trainer, _ = trainer_of(tiny())
    trainer.restore(load_checkpoint(trainer.model, old))
    kept = load_file(old / "model" / "model.safetensors")
    assert trainer.average is not None
    for name, value in trainer.average.mean.items():
        assert torch.equal(value, kept[name]) and torch.equal(trainer.model.state_dict()[name], kept[name])


@pytest.mark.parametrize("parts", [2, 5, 32])
def test_micro_batches_give_the_gradient_of_the_batch(tiny: Settings, parts: int) -> None:
    """Also where they are not equally large: 32 patterns in 5."""
    trainer, batch = trainer_of(tiny(train__accumulate=parts))
    loss = trainer.loss(batch.patterns, batch.orientation)
    plain = torch.autograd.grad(loss, trainer.weights)
    assert float(trainer._gradient(batch)) == pytest.approx(loss.item(), rel=1e-5)
    for weight, gradient in zip(trainer.weights, plain, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-3)


class Short(torch.nn.Module):
    """A loss that runs out of memory `times` times, and whenever it gets more than `limit` patterns."""

    def __init__(self, loss: torch.nn.Module, limit: int = 1000, times: int = 0, error: type[Exception] | None = None):
        super().__init__()
        self.inner, self.limit, self.times, self.error = loss, limit, times, error or torch.OutOfMemoryError
        self.message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"

    def forward(self, patterns: torch.Tensor, orientation: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.inner(patterns, orientation)
        if len(patterns) > self.limit or self.times > 0:
            self.times -= 1
            raise self.error(self.message)
        return loss


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_micro_batches(
    tiny: Settings, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, batch = trainer_of(tiny())
    plain = torch.autograd.grad(trainer.loss(batch.patterns, batch.orientation), trainer.weights)
    trainer.loss = Short(trainer.loss, limit=8, error=error)
    trainer._gradient(batch)
    assert capsys.readouterr().err.splitlines() == [
        "note: out of memory; training goes on with micro-batches of 16 patterns (train.accumulate=2)",
        "note: out of memory; training goes on with micro-batches of 8 patterns (train.accumulate=4)",
    ]
    for weight, gradient in zip(trainer.weights, plain, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-3)
    trainer.loss = Short(trainer.loss, limit=0)
    with pytest.raises(UserError, match="out of memory with one pattern at a time; choose a smaller model"):
        trainer._gradient(batch)


def test_more_micro_batches_than_patterns_are_refused(tiny: Settings) -> None:
    with pytest.raises(UserError, match="`train.accumulate` is 33, but a batch has 32 patterns; lower it to 32"):
        trainer_of(tiny(train__accumulate=33))


def _short_of_memory(rank: int, world: int, flat: dict[str, object], folder: str) -> None:
    torch.set_num_threads(1)
    make = fit_module.Trainer

    def made(*given: Any) -> Trainer:
        trainer = make(*given)
        trainer.loss = Short(trainer.loss, times=rank)  # the second worker runs out of memory once
        return trainer

    fit_module.Trainer = made  # type: ignore[assignment, misc]
    fit(Config.from_flat(flat), ignored, Path(folder), rank=rank, world=world, device=CPU)


def test_a_worker_without_memory_does_not_hold_up_the_other(tiny: Settings, tmp_path: Path) -> None:
    config = tiny(data__augment="none")
    fit(config, ignored, tmp_path / "one", device=CPU)
    run_workers(_short_of_memory, 2, (config.to_flat(), str(tmp_path / "two")))
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-4, rtol=2e-3, msg=key)


@pytest.fixture
def trunk(tiny: Settings, tmp_path: Path) -> str:
    """The backbone's weights of a model, as a file without the head's."""
    trainer, _ = trainer_of(tiny())
    weights = {name: value for name, value in trainer.model.state_dict().items() if name.startswith("backbone.")}
    torch.save(weights, tmp_path / "trunk.pt")
    return str(tmp_path / "trunk.pt")


def test_pretrained_weights_learn_at_a_rate_of_their_own(tiny: Settings, trunk: str) -> None:
    trainer, batch = trainer_of(tiny(model__pretrained=trunk, optim__pretrained_lr=0.1, optim__warmup=0))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train([batch])
    for group, factor in zip(trainer.optimiser.param_groups, (1.0, 1.0, 0.1, 0.1), strict=True):
        assert group["lr"] == pytest.approx(1e-3 * factor) and group["params"]
    after = dict(trainer.model.named_parameters())
    for name, rate in (("backbone.stages.0.down.weight", 1e-4), ("head.to_direction.weight", 1e-3)):
        moved = (after[name] - before[name]).detach().abs().max()
        assert float(moved) == pytest.approx(rate, rel=0.2), name  # Adam's first step is as long as the rate
    plain, _ = trainer_of(tiny(model__pretrained=trunk))
    assert len(plain.optimiser.param_groups) == 2  # as in checkpoints of version 0.1
    with pytest.raises(UserError, match="of a run with another `optim.pretrained_lr`; start the run anew"):
        plain.restore(trainer.state())


@pytest.mark.slow  # torch loads its compiler for half a minute
def test_what_cannot_be_compiled_is_one_line(tiny: Settings) -> None:
    trainer, batch = trainer_of(tiny(train__compile=True))
    trainer.loss = Short(trainer.loss, times=1, error=NotImplementedError)
    trainer.loss.message = "no C++ compiler\nand more"
    with pytest.raises(
        UserError, match=r"^the model cannot be compiled here \(no C\+\+ compiler\); install a C\+\+ c.*"
    ):
        trainer._gradient(batch)


@pytest.mark.slow
def test_a_compiled_run_learns_and_leaves_a_model(tiny: Settings, tmp_path: Path) -> None:
    """In its first step it is compiled: a minute or two."""
    losses: list[float] = []
    fit(tiny(train__compile=True), lambda metrics, _: losses.append(metrics["train/loss"]), tmp_path, device=CPU)
    assert losses[1] < losses[0]
    names = set(trainer_of(tiny())[0].model.state_dict())
    assert set(weights_of(tmp_path)) == names
    assert load_model(tmp_path / "checkpoint" / "model")
