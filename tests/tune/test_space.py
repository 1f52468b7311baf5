"""Search spaces: the five forms, and every mistake caught at load by one line that names it."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from stemtune.config import Config
from stemtune.errors import UserError
from stemtune.tune.space.budget import Budget
from stemtune.tune.space.describe import check, describe_space
from stemtune.tune.space.space import SearchSpace, load_space, samples, space_from_text

ROOT = Path(__file__).parents[2]

GOOD = """\
about: A question?
metric: val/within_5deg
budget: {trials: 5, epochs: 4, grace_epochs: 2, reduction: 2, hours: 0.5}
resources: {gpus_per_worker: 0.5, workers: 2, cpus_per_worker: 1}
fixed: {data.store: linio2.h5, simulate.thickness: 20:80}
search:
  optim.lr: {log: [1e-5, 3.0e-3]}
  optim.lr_decay: {uniform: [0.8, 1.0], step: 0.05}
  train.batch_size: [32, 64]
  model.name:
    one_of:
      cnn: {model.kernel_size: [3, 5], model.width: {log_int: [16, 64]}}
      polar: {model.width: {int: [8, 32], step: 8}, model.depth: 3}
first:
  - {model.name: cnn, model.width: 20, optim.lr: 1e-4}
  - {model.name: matched}
"""


def space(text: str) -> SearchSpace:
    return space_from_text(text, "test")


def with_search(line: str, rest: str = "") -> str:
    return f"search:\n  {line}\n{rest}"


def test_the_five_forms() -> None:
    read = space(GOOD)
    assert (read.metric, read.mode) == ("val/within_5deg", "max")
    assert read.budget.grace_epochs == 2
    assert read.budget.hours == 0.5
    assert read.fixed["simulate.thickness"] == "20:80"  # YAML 1.1 would read a base-60 number
    drawn = [read.settings(flat) for flat in samples(read, 300)]
    assert {flat["model.name"] for flat in drawn} == {"cnn", "polar"}
    for flat in drawn:
        config = Config.from_flat(flat)
        assert 1e-5 <= config.optim.lr <= 3e-3
        assert config.train.epochs == 4
        assert config.train.workers == 2
        assert config.train.batch_size in (32, 64)
        steps = (config.optim.lr_decay - 0.8) / 0.05
        assert steps == pytest.approx(round(steps), abs=1e-6)
        if config.model.name == "cnn":
            assert 16 <= config.model.width <= 64
        else:
            assert config.model.width in (8, 16, 24, 32)
            assert config.model.depth == 3
            assert "model.kernel_size" not in flat
    assert min(float(flat["optim.lr"]) for flat in drawn) < 1e-4  # logarithmic, not uniform


def test_rungs_are_where_asha_decides() -> None:
    """Each is the one before times the reduction, rounded up to whole epochs, and the last epoch is none."""
    rungs = {
        (1, 3.0, 9): [1, 3],
        (1, 3.0, 10): [1, 3, 9],
        (2, 3.0, 30): [2, 6, 18],
        (1, 2.5, 20): [1, 3, 7, 16],
        (4, 2.0, 4): [],
    }
    for (grace, reduction, epochs), wanted in rungs.items():
        budget = Budget(grace_epochs=grace, reduction=reduction)
        assert budget.rungs(epochs) == wanted
        at = {epoch: budget.rung_reached({}, {"epoch": epoch}) for epoch in range(1, epochs)}
        first = [epoch for epoch in at if at[epoch] is not None and at[epoch] != at.get(epoch - 1)]
        assert first == wanted, "`check` and `compare` say what the scheduler does"


STOPS = {
    "the default": ("budget: {trials: 20, epochs: 9}", "after epoch 1, 3 ASHA lets 1 in 3 go on, by val/loss among"),
    "epochs that are left": ("budget: {trials: 20, epochs: 9}", "some 47 of 180 epochs in all"),  # 1 + 2 / 3 + 6 / 9
    "no rung": ("budget: {epochs: 1}", "ASHA stops none"),
    "the sampler": ("budget: {trials: 20}\nsearch: {optim.lr: [0.1, 0.2]}", "0 given as `first`, 5 at random, 15 by"),
    "a plateau": (
        "budget: {epochs: 9, stop_by: val/within_5deg}",
        "note: ASHA goes by val/within_5deg, which stays at chance for the first epochs",
    ),
    "losses of two units": (
        "budget: {epochs: 9}\nsearch: {head.softness: [0.3, 0.5]}",
        "note: ASHA goes by val/loss, but trials of another head.softness have losses of other units",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_check_says_what_asha_and_the_sampler_do(case: str) -> None:
    text, wanted = STOPS[case]
    assert wanted in describe_space(space(text), "test")
    notes = [line for line in describe_space(space(text), "test").splitlines() if "note: ASHA" in line]
    assert len(notes) == ("note" in wanted)
    apart = text.replace("9}", "9, within: [model.name, head.softness]}")
    assert case == "a plateau" or "note: ASHA" not in describe_space(space(apart), "test")


def test_a_budget_of_patterns() -> None:
    text = "budget: {patterns: 100000, within: [head.name]}\nfixed: {data.source: simulate}\n"
    read = space(text + "search: {data.patterns_per_epoch: [10000, 25000]}")
    assert read.extremes[2] == 10 and read.budget.within == ("head.name",)
    epochs = {flat["data.patterns_per_epoch"]: read.settings(flat)["train.epochs"] for flat in samples(read, 20)}
    assert epochs == {10_000: 10, 25_000: 4}


def test_a_key_of_two_branches_has_two_names() -> None:
    read = space(GOOD)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point in read.enqueued():
        study.enqueue_trial(point)
    names = set()
    for number in range(40):
        trial = study.ask()
        flat = read.suggest(trial)
        names |= set(trial.params)
        if number == 0:
            assert flat["model.name"] == "cnn"
            assert flat["model.width"] == 20
            assert flat["optim.lr"] == pytest.approx(1e-4)
        study.tell(trial, 1.0)
    assert {"model.width@cnn", "model.width@polar", "model.kernel_size"} <= names
    assert "model.width" not in names


def test_a_first_trial_outside_the_branches_is_a_baseline() -> None:
    read = space(GOOD)
    assert [point["model.name"] for point in read.baselines()] == ["matched"]
    assert len(read.enqueued()) == 1


MISTAKES = {
    "empty range": (with_search("optim.lr: {log: [1e-3, 1e-3]}"), "`optim.lr` has the empty range"),
    "reversed range": (with_search("optim.lr: {log: [1e-2, 1e-3]}"), "`optim.lr` has the empty range"),
    "empty list": (with_search("train.batch_size: []"), "`train.batch_size` is an empty list"),
    "unknown knob": (with_search("optim.lrr: [1.0e-3]"), "'optim.lrr'; did you mean 'optim.lr'?"),
    "unknown knob in a branch": (
        with_search("model.name: {one_of: {cnn: {model.widht: [8]}}}"),
        "'model.widht'; did you mean 'model.width'?",
    ),
    "unknown model": (
        with_search("model.name: {one_of: {cnm: {}}}"),
        "`model.name` is 'cnm', but must be one of cnn, densenet, swin, circular, matched, polar, rerank; "
        "did you mean 'cnn'?",
    ),
    "fixed and searched": (
        with_search("optim.lr: [1.0e-3, 1.0e-2]", "fixed: {optim.lr: 1.0e-3}"),
        "`optim.lr` is both fixed and searched",
    ),
    "fixed and searched in a branch": (
        with_search("model.name: {one_of: {cnn: {model.width: [8, 16]}}}", "fixed: {model.width: 8}"),
        "`model.width` is both fixed and searched",
    ),
    "searched twice": (
        with_search("model.name: {one_of: {cnn: {optim.lr: [1.0e-3]}}}\n  optim.lr: [1.0e-2]"),
        "`optim.lr` is searched in the branch 'cnn' and above it",
    ),
    "out of range": (with_search("optim.lr: {uniform: [0.1, 3]}"), "`optim.lr` is 3, but must be in (0, 1]"),
    "text in a range": (with_search("optim.lr: {log: [1e-5x, 1.0e-3]}"), "`optim.lr` is '1e-5x', but must be a number"),
    "log from zero": (with_search("optim.weight_decay: {log: [0, 1]}"), "a logarithmic range must start above 0"),
    "unknown range": (with_search("optim.lr: {logg: [1.0e-5, 1.0e-3]}"), "did you mean 'log'?"),
    "range of words": (with_search("head.name: {uniform: [1, 2]}"), "`head.name`"),
    "float range of a whole number": (with_search("model.width: {uniform: [8, 16]}"), "write int instead of uniform"),
    "step in a log range": (with_search("optim.lr: {log: [1.0e-4, 1.0e-2], step: 0.001}"), "has a step in a log range"),
    "step that misses the end": (with_search("model.depth: {int: [2, 7], step: 2}"), "end the range at 6"),
    "even kernel": (with_search("model.kernel_size: {int: [3, 7]}"), "but must be odd"),
    "twice in a list": (with_search("train.batch_size: [32, 32]"), "lists 32 twice"),
    "bare no": (with_search("model.pretrained: [no, true]"), "the bare word no means false"),
    "bare off": ("fixed: {data.augment: off}", "write false, or 'off' in quotes"),
    "repeated key": ("fixed:\n  optim.lr: 1.0e-3\n  optim.lr: 1.0e-2", "line 3: duplicate key 'optim.lr'"),
    "unknown metric": (
        "metric: val/within_5degrees",
        "no trial reports the metric 'val/within_5degrees'; did you mean 'val/within_5deg'?",
    ),
    "unknown mode": ("mode: minimum", "`mode` is 'minimum', but must be min or max"),
    "unknown block": ("serach: {}", "no block called 'serach'; did you mean 'search'?"),
    "unknown budget": ("budget: {trails: 3}", "no setting called 'trails'; did you mean 'trials'?"),
    "no trials": ("budget: {trials: 0}", "`budget.trials` is 0, but must be at least 1"),
    "no reduction": ("budget: {reduction: 1}", "`budget.reduction` is 1, but must be more than 1"),
    "long grace": ("budget: {epochs: 3, grace_epochs: 4}", "`budget.grace_epochs` is 4, but must be at most the 3"),
    "stop by the size": (
        "budget: {stop_by: model/parameters}",
        "`budget.stop_by` is 'model/parameters', which does not say how well a trial learns",
    ),
    "stop by a typo": ("budget: {stop_by: val/los}", "did you mean 'val/loss'?"),
    "within a typo": ("budget: {within: model.nam}", "did you mean 'model.name'?"),
    "two graces": (
        "budget: {grace_epochs: 2, grace_patterns: 4000}",
        "`budget.grace_epochs` is given, and so is `budget.grace_patterns`; keep one of the two",
    ),
    "patterns of a store": (
        "budget: {patterns: 4000}",
        "`budget.patterns` counts fresh patterns, but `data.source` is store",
    ),
    "epochs twice": (
        "budget: {epochs: 3}\nfixed: {train.epochs: 4}",
        "`train.epochs` is given, and so is `budget.epochs`",
    ),
    "workers twice": (
        "resources: {workers: 2}\nfixed: {train.workers: 2}",
        "`train.workers` is given, and so is `resources.workers`",
    ),
    "uneven batch": (
        "resources: {workers: 3}\nfixed: {train.batch_size: 64}",
        "`train.batch_size` 64 does not divide among 3 workers",
    ),
    "odd GPUs": ("resources: {gpus_per_worker: 1.5}", "above 1 it must be whole"),
    "first outside the range": (
        with_search("optim.lr: {log: [1.0e-4, 1.0e-3]}", "first: [{optim.lr: 0.01}]"),
        "first, trial 1: `optim.lr` is 0.01, but the search has 0.0001 to 0.001",
    ),
    "first of another branch": (
        with_search(
            "model.name: {one_of: {cnn: {model.kernel_size: [3, 5]}, polar: {}}}",
            "first: [{model.name: polar, model.kernel_size: 3}]",
        ),
        "`model.kernel_size` is not searched; it belongs to another branch",
    ),
    "first of what is fixed": ("fixed: {optim.lr: 0.01}\nfirst: [{optim.lr: 0.01}]", "`optim.lr` is fixed"),
    "not YAML": ("search: [", "is not valid YAML"),
    "empty": ("", "holds no search space"),
    "a list": ("- 1\n- 2", "holds no search space"),
    "text for a block": ("fixed: nothing", "the block fixed is 'nothing'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_caught_at_load(case: str, tmp_path: Path) -> None:
    text, wanted = MISTAKES[case]
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_space(file)
    message = str(caught.value)
    assert wanted in message
    assert "\n" not in message
    assert "wrong.yaml" in message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_space(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_spaces_that_ship_are_sound(file: Path) -> None:
    read = load_space(file)
    assert read.about
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1, n_startup_trials=3))
    for point in read.enqueued():
        study.enqueue_trial(point)
    for number in range(20):
        trial = study.ask()
        flat = read.suggest(trial)
        if number < len(read.enqueued()):
            wanted = [point for point in read.first if point not in read.baselines()]
            assert wanted, "an enqueued trial comes from `first`"
        Config.from_flat(read.settings(flat))
        study.tell(trial, float(number))
    assert f"{file}: fine" in check([file])


def test_architectures_holds_the_seven_models_and_more() -> None:
    read = load_space(ROOT / "search_spaces" / "architectures.yaml")
    first = {(point["model.name"], point.get("model.pretrained"), point.get("model.adjusted")) for point in read.first}
    seven = {
        ("cnn", None, None),
        ("densenet", False, None),
        ("densenet", True, None),
        ("swin", False, False),
        ("swin", True, False),
        ("swin", False, True),
        ("swin", True, True),
    }
    assert seven <= first
    assert {"matched", "polar"} <= {name for name, _, _ in first}


def test_set_fixes_what_is_searched() -> None:
    read = space(GOOD).with_settings({"model.name": "cnn", "optim.lr": "1e-3", "train.epochs": "2"})
    for flat in samples(read, 30):
        settings = read.settings(flat)
        assert settings["model.name"] == "cnn"
        assert settings["optim.lr"] == pytest.approx(1e-3)
        assert settings["train.epochs"] == 2
        assert settings["model.kernel_size"] in (3, 5)  # the branch's own settings stay
    assert "optim.lr" not in read.search
    assert read.first == ({"model.width": 20},) or all("optim.lr" not in point for point in read.first)


def test_set_is_checked_like_the_file() -> None:
    with pytest.raises(UserError, match="does not divide among 5 workers"):
        space(GOOD).with_settings({"train.workers": 5})


def test_check_says_what_would_run(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    text = check([file])
    for part in ("5 trials of up to 4 epochs", "2 worker(s) of 1 CPU and 0.5 GPU", "cnn: model.width: 16 to 64"):
        assert part in text
    assert "matched" in text
    assert "linio2.h5 is not here yet" in text


GRID = """\
design: grid
search:
  train.seed: [0, 1]
  head.name:
    one_of:
      grid: {}
      euler: {head.clamp: [false, true]}
  model.name: cnn
"""


def test_a_grid_runs_every_combination_once() -> None:
    made = space(GRID)
    assert made.budget.trials == 6
    points = [(point["train.seed"], point["head.name"], point.get("head.clamp")) for point in made.enqueued()]
    assert points == [
        *((0, "grid", None), (0, "euler", False), (0, "euler", True)),
        *((1, "grid", None), (1, "euler", False), (1, "euler", True)),
    ]
    assert made.with_settings({"train.seed": 1}).budget.trials == 3
    with pytest.raises(UserError, match="`optim.lr` has a range, but a grid needs lists"):
        space(GRID + "  optim.lr: {log: [1e-4, 1e-2]}\n")
    with pytest.raises(UserError, match="`design` is 'random', but must be sampler or grid"):
        space("design: random")


def test_several_metrics_are_weighed_against_each_other() -> None:
    made = space("metric: [val/within_5deg, model/ms_per_pattern]\nsearch:\n  optim.lr: {log: [1e-4, 1e-2]}")
    assert made.objectives == (("val/within_5deg", "max"), ("model/ms_per_pattern", "min"))
    for wrong in ("metric: [val/loss, val/loss]", "metric: [val/loss, val/ece]\nmode: min", "metric: []"):
        with pytest.raises(UserError, match="metrics have .* modes"):
            space(wrong)
    with pytest.raises(UserError, match="no trial reports the metric 'val/los'; did you mean 'val/loss'"):
        space("metric: [val/ece, val/los]")


def test_a_full_grid_is_noticed_and_runs_once() -> None:
    text = "budget: {trials: 20}\nsearch: {train.batch_size: [32, 64], model.kernel_size: [3, 5, 7]}\n"
    found = space(text + "first: [{model.kernel_size: 7}]").enumerated()
    assert (found.budget.trials, len({tuple(point.items()) for point in found.enqueued()})) == (6, 6)
    assert [point["model.kernel_size"] for point in found.first[:2]] == [7, 7]  # what was to be first is


def test_branches_and_baselines_of_a_full_grid() -> None:
    text = "search:\n  model.name:\n    one_of:\n      cnn: {model.kernel_size: [3, 5]}\n      polar: {}\n"
    planned = "first: [{model.name: matched}, {model.name: cnn, model.kernel_size: 5}]\n"
    found = space(f"budget: {{trials: 9}}\n{text}{planned}").enumerated()
    assert [*found.baselines(), *found.enqueued()] == [
        {"model.name": "matched"},
        {"model.name": "cnn", "model.kernel_size": 5},
        {"model.name": "cnn", "model.kernel_size": 3},
        {"model.name": "polar"},
    ]
    assert found.budget.trials == 4 == found.enumerated().budget.trials  # when a sweep is resumed
    few = space(f"budget: {{trials: 3}}\n{text}{planned}")
    assert few.enumerated() is few  # the matched filter takes one of the three
    wide = space("budget: {trials: 99}\nsearch: {optim.lr: {log: [1e-4, 1e-2]}}")
    assert wide.enumerated() is wide


def test_seeds_are_replicates() -> None:
    asked = space("replicates: {seeds: 2, of_best: 4}\nsearch: {optim.lr: {log: [1e-4, 1e-2]}}").replicates
    assert asked is not None and (asked.seeds, asked.of_best) == (2, 4)
    assert space("search: {optim.lr: {log: [1e-4, 1e-2]}}").replicates is None
    with pytest.raises(UserError, match="`train.seed` is given, and `replicates` gives every seed"):
        space("replicates: {seeds: 2}\nsearch: {train.seed: [0, 1]}")
    with pytest.raises(UserError, match="replicates has no setting called 'seed'; did you mean 'seeds'"):
        space("replicates: {seed: 2}")
