"""The reference study: its spaces, how claims are judged, and the whole of it at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stemtune import study
from stemtune.dataset.labels import with_truth
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.study.findings import FINDINGS, Finding, Group, judged, label_of
from stemtune.tune.space.space import space_from_text

ROOT = Path(__file__).parents[2]
TINY = study.Size(24, 12, 32, 0.1, 256, 1, 0.025, 2, False)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
@pytest.mark.parametrize("kind", ["full", "small"])
def test_each_space_runs_the_groups_that_its_claim_compares(finding: Finding, kind: str, tmp_path: Path) -> None:
    size = study.SIZES[kind]
    text = (ROOT / study.SPACES / f"{finding.name}.yaml").read_text()
    made = space_from_text(study.sized(text, size, tmp_path), finding.name)
    assert "STUDY" not in json.dumps({**made.fixed, **{str(number): dict(p) for number, p in enumerate(made.first)}})
    assert made.budget.trials == len(made.first) and made.budget.trials % size.seeds == 0
    assert made.design == "grid"  # so that nobody is stopped
    defaults = {"model.adjusted": "False", "head.clamp": "False", "model.pretrained": "False"}
    groups = {
        label_of(finding, defaults | {key: str(value) for key, value in {**made.fixed, **point}.items()})
        for point in made.first
    }
    assert len(groups) == made.budget.trials // size.seeds
    for pair in (*finding.better, *finding.no_better):
        assert set(pair) <= groups


def group(label: str, *values: float) -> Group:
    return Group(label, list(values))


def test_a_claim_holds_only_beyond_the_seeds() -> None:
    better = replace(FINDINGS[0], better=(("a", "b"),), no_better=())
    assert judged(better, {"a": group("a", 1.0, 1.2), "b": group("b", 1.3, 1.9)})[0] == "agrees"
    assert judged(better, {"a": group("a", 1.0, 1.4), "b": group("b", 1.3, 1.9)})[0] == "cannot tell"
    assert judged(better, {"a": group("a", 2.0, 2.4), "b": group("b", 1.3, 1.9)})[0] == "disagrees"
    assert judged(better, {"a": group("a", 1.0)})[0] == "cannot tell"
    useless = replace(FINDINGS[0], better=(), no_better=(("a", "b"),))
    assert judged(useless, {"a": group("a", 1.0, 1.4), "b": group("b", 1.3, 1.9)})[0] == "agrees"
    assert judged(useless, {"a": group("a", 1.0, 1.2), "b": group("b", 1.3, 1.9)})[0] == "disagrees"
    blind = {"a": group("a", 61.0, 62.0), "b": group("b", 65.0, 66.0)}  # chance: neither has learned anything
    assert judged(better, blind)[0] == judged(useless, blind)[0] == "cannot tell"
    assert judged(better, {**blind, "a": group("a", 3.0, 4.0)})[0] == "agrees"
    both = replace(FINDINGS[0], better=(("a", "b"), ("b", "c")), no_better=())
    mixed = {"a": group("a", 1.0, 1.1), "b": group("b", 2.0, 2.1), "c": group("c", 1.5, 1.6)}
    verdict, reasons = judged(both, mixed)
    assert verdict == "partly"
    assert reasons[1] == "b is worse than c (2.0 ± 0.1° and 1.6 ± 0.1°)"


def command(line: Sequence[str]) -> int:
    from stemtune.cli import main

    return main(line)


def test_labels_train_and_the_truth_validates(tmp_path: Path) -> None:
    truth, labels, out = (tmp_path / name for name in ("truth.h5", "labels.h5", "out.h5"))
    scan = "--scan 16,16 --grains 6 --seed 5 --size 32 --scale 0.1 --dose 1000"
    assert command(["simulate", "linio2", "--out", str(truth), *scan.split()]) == 0
    assert command(["label", str(truth), "--cif", "linio2", "--out", str(labels)]) == 0
    dealt = np.random.default_rng(0).choice(3, 256, p=(0.6, 0.2, 0.2)).astype(np.int8)
    with_truth(labels, truth, out, dealt)
    with Store.open(truth) as exact, Store.open(labels) as guessed, Store.open(out) as made:
        crystal = exact.phase >= 0
        held = (dealt > 0) & crystal
        assert 20 < held.sum() < crystal.sum()
        np.testing.assert_array_equal(made.orientation[held], exact.orientation[held])
        np.testing.assert_array_equal(made.orientation[~held], guessed.orientation[~held])
        np.testing.assert_array_equal(made.split, np.where(held, dealt, 0))  # vacuum validates nothing
        np.testing.assert_array_equal(made.take(np.arange(256)), exact.take(np.arange(256)))
    other = tmp_path / "other.h5"
    assert (
        command(["simulate", "linio2", "--out", str(other), "--patterns", "8", "--size", "32", "--scale", "0.1"]) == 0
    )
    with pytest.raises(UserError, match="holds 256 patterns, .* 8; give the scan it came from"):
        with_truth(labels, other, tmp_path / "no.h5")


def test_what_the_study_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no study 'other'; there is reference"):
        study.run("other", tmp_path / "s", command)
    with pytest.raises(UserError, match="the study has no finding 'kernels'; it has architectures, labels"):
        study.run("reference", tmp_path / "s", command, only=["kernels"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / study.MANIFEST).write_text('{"study": "reference", "size": "full"}')
    with pytest.raises(UserError, match="holds the full study; give the small one a folder of its own"):
        study.run("reference", tmp_path / "full", command, small=True)
    with pytest.raises(UserError, match="--share is 1.5, but must be above 0 and at most 1"):
        study.run("reference", tmp_path / "s", command, share=1.5)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / study.MANIFEST).write_text(
        '{"study": "reference", "size": "small", "share": 0.5, "seeds": 1}'
    )
    with pytest.raises(UserError, match="began with --share 0.5 --seeds 1; leave both out to go on"):
        study.run("reference", tmp_path / "begun", command, small=True, seeds=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"):
        study.run("reference", tmp_path / "mine", command, small=True)


@pytest.mark.slow
def test_the_study_from_nothing_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study.SIZES, "small", TINY)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(ROOT)
    ran: list[str] = []

    def noted(line: Sequence[str]) -> int:
        ran.append(line[0])
        return command(line)

    page = study.run("reference", tmp_path / "out", noted, small=True, only=["split"])
    assert ran == ["simulate", "label", "simulate", "train", "simulate", "train", "sweep"]
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = facts["findings"]
    assert {len(group["error_deg"]) for group in found["groups"]} == {2}
    assert found["failed"] == 0
    assert "What a random split hides" in page.read_text()
    ran.clear()
    study.run("reference", tmp_path / "out", noted, small=True, only=["split"])
    assert ran == []  # all of it is there
