"""Sweeps that are taken up again: refused, checked, extended, or resumed where their folder was moved to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_sweep import TINY, script

from stemtune import sweep
from stemtune.errors import UserError
from stemtune.tracking import Address, Tracker
from stemtune.tune.run.manifest import (
    absolute,
    extended,
    located,
    new_manifest,
    read_manifest,
    single_driver,
    space_from_manifest,
    write_manifest,
)
from stemtune.tune.run.trial_state import TrialState
from stemtune.tune.space.space import space_from_text

SIMULATED = TINY.replace("data.store: small.h5", "data.source: simulate, data.patterns_per_epoch: 64")


def test_checking_a_resume_says_what_is_left_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space = space_from_text(SIMULATED, "tiny")
    folder = tmp_path / "sweeps" / "part"
    folder.mkdir(parents=True)
    write_manifest(folder, new_manifest(space, "part"))
    tracker = Tracker(folder, "part", "1", Address("http://127.0.0.1:9"))
    for number, trial in enumerate(("a", "b")):
        tracker.trial(trial, trial, {}, {"stemtune.number": str(number)})
    tracker.end("a", "finished", "", {}, {})
    tracker.close(0.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sweep.main(["--resume", "part", "--check"]) == 0
    said = capsys.readouterr().out
    assert "trials so far: 1 finished, 1 running; --resume would go on with 1 and start 1 more" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_sweep_in_an_object_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("STEMTUNE_SWEEPS", "s3://me:secret@bucket/sweeps")
    assert sweep.main(["tiny.yaml", "--local"]) == 2
    said = capsys.readouterr().err
    assert "STEMTUNE_SWEEPS is 's3://...@bucket/sweeps', but must be a folder" in said
    assert len(said.splitlines()) == 1 and [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("place", ["snapshots/00000007/searcher-state-2026.pkl", "search_gen_state-2026.json"])
def test_an_interrupted_sweep_of_0_1_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pickles name modules that are gone; finished ones are read from MLflow (`test_version_0_1`)."""
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "sweeps" / "old" / place
    state.parent.mkdir(parents=True)
    state.write_bytes(b"\x80\x05\x8c\x16stemtune.tune.searcher\x94\x8c\x0bStudySearch\x94\x93\x94.")
    manifest = {"name": "old", "started": 1, "status": "interrupted", "version": "0.1.0", "space": "", "fixed": {}}
    (tmp_path / "sweeps" / "old" / "sweep.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    assert sweep.main(["--resume", "--local"]) == 2
    said = capsys.readouterr().err
    assert "was begun by stemtune 0.1, and this version cannot resume it; finish it with stemtune 0.1" in said
    assert len(said.splitlines()) == 1 and sorted(tmp_path.rglob("*")) == before


def test_a_sweep_has_one_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one, by --resume in another terminal, would take the first one's trials for lost."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweeps" / "busy"
    folder.mkdir(parents=True)
    write_manifest(folder, new_manifest(space_from_text(SIMULATED, "busy"), "busy"))
    with single_driver(folder):
        second = script("--resume", "busy", "--local")
    assert second.returncode == 2
    assert f"the sweep 'busy' is running (process {os.getpid()} on " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    with single_driver(folder):
        pass  # the first one is gone


def test_a_moved_sweep_finds_its_files_and_a_copy_its_own_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("STEMTUNE_SWEEPS", raising=False)
    old, new = tmp_path / "a", tmp_path / "b"
    folder = old / "sweeps" / "first"
    folder.mkdir(parents=True)
    (old / "small.h5").touch()
    monkeypatch.chdir(old)
    space = absolute(space_from_text(TINY, "tiny"), old)
    write_manifest(folder, new_manifest(space, "first"))
    assert located(folder, read_manifest(folder)) == read_manifest(folder)
    shutil.copytree(old, new)
    monkeypatch.chdir(new)
    copy = new / "sweeps" / "first"
    found = located(copy, read_manifest(copy))
    assert found["folder"] == str(copy) and "records_id" not in found  # the copy's own mlflow.db
    assert found["fixed"]["data.store"] == str(old / "small.h5")  # what is still there is the same store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert located(copy, read_manifest(copy))["records_id"] != found["sweep_id"]
    shutil.rmtree(old)
    found = located(copy, read_manifest(copy))
    assert found["fixed"]["data.store"] == str(new / "small.h5") and "records_id" not in found  # it was moved
    assert located(copy, found) == found


def test_a_sweep_is_extended_but_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = new_manifest(space_from_text(SIMULATED, "tiny"), "tiny")
    states = [TrialState(name, number, {}) for number, name in enumerate("abc")]
    more = space_from_manifest(extended(manifest, states, 5, 0.5)).budget
    assert (more.trials, more.hours, more.epochs) == (5, 0.5, 2)
    assert extended(manifest, states, None, None) == manifest
    with pytest.raises(UserError, match="--trials is 2, but 3 trials of 'tiny' have begun"):
        extended(manifest, states, 2, None)
