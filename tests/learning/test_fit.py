"""The epoch loop: repeatable, exactly resumed, equal over workers, and clear when it diverges."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stemtune.config import METRICS, Config, SimulateConfig
from stemtune.dataset.simulate import simulate_store
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning import fit as fit_module
from stemtune.learning import trainer as trainer_module
from stemtune.learning.checkpoint import load_model
from stemtune.learning.fit import Patience, fit
from stemtune.learning.metrics import WORST
from stemtune.learning.train import run_workers
from stemtune.learning.trainer import Diverged

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


def test_a_run_ends_when_it_gets_no_better(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After two epochs without a better value; a resumed run counts what was before it."""
    values = iter([3.0, 2.0, 2.5, 2.0, 1.0, 1.0])

    def scripted(*_: object) -> dict[str, float]:
        return {**WORST, "val/ece": next(values)}

    def stop_after_three(metrics: dict[str, float], folder: Path | None) -> None:
        notes(metrics, folder)
        if len(notes.metrics) == 3:
            raise InterruptedError

    monkeypatch.setattr(fit_module, "validate", scripted)
    notes, config, objective = Notes(), tiny(train__patience=2, train__epochs=9), ("val/ece", "min")
    with pytest.raises(InterruptedError):
        fit(config, stop_after_three, tmp_path / "half", device=CPU, objective=objective)
    half = tmp_path / "half" / "checkpoint"
    fit(config, notes, tmp_path / "rest", resume=half, device=CPU, objective=objective)
    assert [metrics["val/ece"] for metrics in notes.metrics] == [3.0, 2.0, 2.5, 2.0]
    assert "ended after epoch 4: no better val/ece since epoch 2\n" in capsys.readouterr().err
    again = fit(config, notes, tmp_path / "again", resume=tmp_path / "rest" / "checkpoint", device=CPU)
    assert again["val/ece"] == 2.0 and len(notes.metrics) == 4  # it had ended


def test_patience_follows_the_mode() -> None:
    patience = Patience(1, "val/within_5deg", "max")
    for epoch, value in enumerate((0.1, 0.2, 0.2), 1):
        patience.look({"val/within_5deg": value}, epoch)
        assert patience.over(epoch) == (epoch == 3)
    assert not Patience(0, "val/loss", "min").over(10**6)
