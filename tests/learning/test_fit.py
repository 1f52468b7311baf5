"""The epoch loop: repeatable, exactly resumed, equal over workers, and clear when it diverges."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stemtune.config import METRICS, Config, SimulateConfig
from stemtune.dataset.loaders import Batch, loaders
from stemtune.dataset.simulate import simulate_store
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning import fit as fit_module
from stemtune.learning import trainer as trainer_module
from stemtune.learning.checkpoint import load_checkpoint, load_model
from stemtune.learning.fit import fit
from stemtune.learning.metrics import WORST
from stemtune.learning.train import run_workers
from stemtune.learning.trainer import Diverged, Trainer, chosen_precision, learning_rate

Settings = Callable[..., Config]
CPU = torch.device("cpu")
MEASURED = ("train/samples_per_s", "train/peak_memory_mb", "model/ms_per_pattern")


class Notes:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.folders: list[Path | None] = []

    def __call__(self, metrics: dict[str, float], folder: Path | None) -> None:
        self.metrics.append(metrics)
        self.folders.append(folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "checkpoint" / "model" / "model.safetensors"))


def test_every_epoch_reports_every_metric_and_a_whole_checkpoint(tiny: Settings, tmp_path: Path) -> None:
    notes = Notes()
    last = fit(tiny(), notes, tmp_path, device=CPU)
    assert len(notes.metrics) == 2 and notes.metrics[-1] == last
    for metrics in notes.metrics:
        assert set(metrics) == set(METRICS) == set(WORST)
        assert all(math.isfinite(value) for value in metrics.values())
    assert notes.folders == [tmp_path / "checkpoint"] * 2
    model = load_model(tmp_path / "checkpoint" / "model")
    assert model.config.model.width == 8
    assert notes.metrics[1]["train/loss"] < notes.metrics[0]["train/loss"]


def test_two_epochs_and_two_more_are_four(tiny: Settings, tmp_path: Path) -> None:
    config = tiny(train__epochs=4, model__dropout=0.2, optim__warmup=1.5)
    whole = fit(config, Notes(), tmp_path / "whole", device=CPU)

    class Stop(Exception):
        pass

    def stop_after_two(metrics: dict[str, float], folder: Path | None) -> None:
        notes(metrics, folder)
        if len(notes.metrics) == 2:
            raise Stop

    notes = Notes()
    with pytest.raises(Stop):
        fit(config, stop_after_two, tmp_path / "half", device=CPU)
    torch.manual_seed(99)
    resumed = fit(config, notes, tmp_path / "rest", resume=tmp_path / "half" / "checkpoint", device=CPU)
    assert len(notes.metrics) == 4
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "rest")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    for timed in MEASURED:
        del whole[timed], resumed[timed]
    assert whole == resumed


def test_the_seed_decides(tiny: Settings, tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(tiny(train__seed=seed, train__epochs=1), Notes(), tmp_path / name, device=CPU)
        runs[name] = weights_of(tmp_path / name)["head.to_product.weight"]
    assert torch.equal(runs["a"], runs["b"])
    assert not torch.equal(runs["a"], runs["c"])


def _fit_worker(rank: int, world: int, flat: dict[str, object], folder: str) -> None:
    torch.set_num_threads(1)
    fit(Config.from_flat(flat), Notes(), Path(folder), rank=rank, world=world, device=CPU)


def test_two_workers_are_as_good_as_one(tiny: Settings, tmp_path: Path) -> None:
    config = tiny(data__augment="none")
    alone = fit(config, Notes(), tmp_path / "one", device=CPU)
    run_workers(_fit_worker, 2, (config.to_flat(), str(tmp_path / "two")))
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-4, rtol=2e-3, msg=key)
    state = torch.load(tmp_path / "two" / "checkpoint" / "checkpoint.pt", weights_only=True)
    for key in ("train/loss", "val/loss", "val/disorientation_mean_deg"):
        assert state["metrics"][key] == pytest.approx(alone[key], rel=0.02)


def test_a_diverged_run_reports_finite_metrics_and_says_so(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "CHECK_EVERY", 1)
    monkeypatch.setattr(trainer_module, "learning_rate", lambda *_: math.inf)
    notes = Notes()
    with pytest.raises(Diverged, match=r"in epoch 1: training diverged; lower `optim.lr`, now 0.001"):
        fit(tiny(), notes, tmp_path, device=CPU)
    assert notes.metrics == [WORST] and notes.folders == [None]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_reduced_precision_trains(tiny: Settings, tmp_path: Path, precision: str) -> None:
    notes = Notes()
    fit(tiny(train__precision=precision, train__epochs=2), notes, tmp_path, device=CPU)
    assert notes.metrics[1]["train/loss"] < notes.metrics[0]["train/loss"]
    kinds = {value.dtype for value in weights_of(tmp_path).values()}
    assert kinds == {torch.float32}


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


def test_a_model_without_training_reports_once(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = fit_module.build

    def untrainable(*arguments: object) -> object:
        model = make(*arguments)  # type: ignore[arg-type]
        model.trainable = False
        return model

    monkeypatch.setattr(fit_module, "build", untrainable)
    notes = Notes()
    fit(tiny(train__epochs=5), notes, tmp_path, device=CPU)
    assert len(notes.metrics) == 1 and set(notes.metrics[0]) == set(METRICS)
    assert load_model(tmp_path / "checkpoint" / "model")


def test_training_goes_on_at_the_calibration_of_the_pretrained_model(
    tiny: Settings, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured patterns of another camera length are brought to the model's, and prediction does the same."""
    fit(tiny(train__epochs=1), Notes(), tmp_path / "first", device=CPU)
    first = tmp_path / "first" / "checkpoint" / "model"
    finer: SimulateConfig = Config.from_flat({"simulate.size": 48, "simulate.scale": 0.06, "simulate.dose": 0}).simulate
    measured = simulate_store("", tmp_path / "measured.h5", 160, finer, seed=4)
    capsys.readouterr()
    further = tiny(data__store=str(measured), model__pretrained=str(first), train__epochs=1)
    fit(further, Notes(), tmp_path / "second", device=CPU)
    said = capsys.readouterr().err
    assert "patterns are resampled from 48 px at 0.06 1/Å to the model's 32 px at 0.08 1/Å" in said
    model = load_model(tmp_path / "second" / "checkpoint" / "model")
    assert model.geometry == Geometry(32, 0.08, 200.0)
    same = tiny(model__pretrained=str(first), train__epochs=1)
    fit(same, Notes(), tmp_path / "third", device=CPU)
    assert "resampled" not in capsys.readouterr().err


def test_a_pretrained_model_that_looks_much_farther_is_refused(tiny: Settings, tmp_path: Path) -> None:
    fit(tiny(train__epochs=1), Notes(), tmp_path / "first", device=CPU)
    first = tmp_path / "first" / "checkpoint" / "model"
    near: SimulateConfig = Config.from_flat({"simulate.size": 32, "simulate.scale": 0.03, "simulate.dose": 0}).simulate
    measured = simulate_store("", tmp_path / "measured.h5", 160, near, seed=4)
    with pytest.raises(UserError, match=r"`model.pretrained` is '.*', but the patterns reach 0\.48 1/Å"):
        fit(tiny(data__store=str(measured), model__pretrained=str(first)), Notes(), tmp_path, device=CPU)


def test_mixed_batches_resume_exactly(tiny: Settings, tmp_path: Path) -> None:
    config = tiny(data__mix=0.25, train__epochs=2, simulate__dose=0)
    whole = fit(config, Notes(), tmp_path / "whole", device=CPU)

    class Stop(Exception):
        pass

    def stop(metrics: dict[str, float], folder: Path | None) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(config, stop, tmp_path / "half", device=CPU)
    resumed = fit(config, Notes(), tmp_path / "rest", resume=tmp_path / "half" / "checkpoint", device=CPU)
    for timed in MEASURED:
        del whole[timed], resumed[timed]
    assert whole == resumed


def trainer_of(config: Config) -> tuple[Trainer, Batch]:
    """Return a trainer of a new model, and the first batch of its first epoch."""
    loader, _ = loaders(config)
    torch.manual_seed(0)
    model = fit_module.build(config, loader.phase, loader.geometry)
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

    def forward(self, patterns: torch.Tensor, orientation: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.inner(patterns, orientation)
        if len(patterns) > self.limit or self.times > 0:
            self.times -= 1
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
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
    fit(Config.from_flat(flat), Notes(), Path(folder), rank=rank, world=world, device=CPU)


def test_a_worker_without_memory_does_not_hold_up_the_other(tiny: Settings, tmp_path: Path) -> None:
    config = tiny(data__augment="none")
    fit(config, Notes(), tmp_path / "one", device=CPU)
    run_workers(_short_of_memory, 2, (config.to_flat(), str(tmp_path / "two")))
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-4, rtol=2e-3, msg=key)
