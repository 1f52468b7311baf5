"""Labels into a store: all of them arrive, nothing else moves, and no kill or mistake costs the store."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stemtune.crystal.phase import linio2
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset import labels
from stemtune.dataset.labels import LABELLED, Labels, label_target, labels_from_map, write_labels
from stemtune.dataset.schema import SIMULATED
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

ROWS, COLUMNS = 3, 5
N = ROWS * COLUMNS


def write_scan(path: Path, **attrs: Any) -> Path:
    counts = np.random.default_rng(1).integers(0, 60000, (N, 16, 16)).astype("uint16")
    place = np.indices((ROWS, COLUMNS)).reshape(2, -1).T
    kept = {"scan_shape": [ROWS, COLUMNS], "command": "ingest", "options": {"kv": 200}, **attrs}
    with StoreWriter(path, N, Geometry(16, 0.1, 200.0), attrs=kept) as writer:
        writer.write(0, counts, position=place, group=place[:, 0], scores={"old": np.ones(N)})
    return path


def some_labels(seed: int = 0) -> Labels:
    rng = np.random.default_rng(seed)
    orientation = rng.normal(size=(N, 4))
    orientation /= np.linalg.norm(orientation, axis=1, keepdims=True)
    orientation[3] = np.nan
    phase = np.zeros(N, dtype=np.int16)
    phase[3] = -1
    confidence = np.where(phase < 0, np.nan, rng.random(N)).astype("float32")
    scores = {"Q": rng.random(N).astype("float32"), "R": 100 * rng.random(N).astype("float32")}
    return Labels(orientation, confidence, phase, [linio2()], scores, {"method": "template", "cif": ["a.cif"]})


@pytest.mark.parametrize("in_place", [True, False])
def test_labels_arrive_and_the_rest_stays(tmp_path: Path, in_place: bool) -> None:
    path = write_scan(tmp_path / "scan.h5")
    before = path.read_bytes()
    with h5py.File(path) as file:
        old = {name: file[name][()] for name in ("patterns", "position", "group", "split")}
        attrs = {name: value for name, value in file.attrs.items() if not name.startswith("phases")}
    labels = some_labels()
    out = write_labels(path, labels, None if in_place else tmp_path / "out.h5")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["scan.h5"] if in_place else ["out.h5", "scan.h5"])
    assert in_place or path.read_bytes() == before
    with h5py.File(out) as file:  # as anyone would open it
        for name, values in old.items():
            np.testing.assert_array_equal(file[name][()], values)
        for name, value in attrs.items():
            np.testing.assert_array_equal(file.attrs[name], value)
        np.testing.assert_array_equal(file["orientation"][()], labels.orientation)
        assert sorted(file["scores"]) == ["Q", "R"]
        facts = json.loads(file.attrs[LABELLED])
    assert facts["method"] == "template" and facts["cif"] == ["a.cif"] and "stemtune" in facts
    with Store.open(out) as store:
        assert store.is_mapped and store.phases == [linio2()]
        np.testing.assert_array_equal(store.labelled, labels.phase >= 0)
        np.testing.assert_array_equal(store.confidence, labels.confidence)
        np.testing.assert_array_equal(store.scores["R"], labels.scores["R"])
    again = write_labels(out, some_labels(1))  # a second time: nothing is left of the first
    with Store.open(again) as store:
        np.testing.assert_array_equal(store.orientation, some_labels(1).orientation)


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from stemtune.dataset import labels as labels_module
from test_labels import some_labels
replace = labels_module._replace
def half(file, labels):
    replace(file, labels)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
labels_module._replace = half
labels_module.write_labels({path!r}, some_labels())
"""


def test_a_kill_in_the_middle_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.h5")
    before = path.read_bytes()
    code = _KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    with Store.open(path) as store:
        assert not store.labelled.any()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("a fault"), OSError(28, "no space")])
def test_whatever_stops_the_writing_leaves_nothing(
    tmp_path: Path, problem: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_scan(tmp_path / "scan.h5")
    before = path.read_bytes()

    def stop(*_: object) -> None:
        raise problem

    monkeypatch.setattr(labels, "_replace", stop)
    expected = UserError if isinstance(problem, OSError) else type(problem)
    with pytest.raises(expected, match="the disk is full" if isinstance(problem, OSError) else None):
        write_labels(path, some_labels())
    assert [entry.name for entry in tmp_path.iterdir()] == ["scan.h5"] and path.read_bytes() == before


def test_a_link_to_a_store_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path = write_scan(tmp_path / "disk" / "scan.h5")
    (tmp_path / "scan.h5").symlink_to(path)
    write_labels(tmp_path / "scan.h5", some_labels())
    assert (tmp_path / "scan.h5").is_symlink() and Store.open(path).labelled.any()


def test_what_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = write_scan(tmp_path / "exact.h5", origin=SIMULATED)
    with pytest.raises(UserError, match="holds the exact orientations of a simulation, .*; give --out"):
        label_target(exact)
    with pytest.raises(UserError, match="give --out"):
        label_target(exact, exact)
    copy = write_labels(exact, some_labels(), tmp_path / "copy.h5")
    assert label_target(copy) == copy  # labels may be made anew, exact orientations are gone from here already
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no store, so it is not replaced"):
        label_target(copy, tmp_path / "notes.txt")
    with pytest.raises(UserError, match="the store 'absent.h5' does not exist"):
        label_target("absent.h5")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="needs 0.0 GB beside the old one, but 0.0 GB are free"):
        label_target(copy)


def test_labels_that_do_not_fit_are_a_fault(tmp_path: Path) -> None:
    good = some_labels()
    with pytest.raises(ValueError, match="for 0 phases"):
        Labels(good.orientation, good.confidence, good.phase, [])
    with pytest.raises(ValueError, match="of `confidence`"):
        Labels(good.orientation, good.confidence[1:], good.phase, good.phases)
    with pytest.raises(ValueError, match="called 'a/b'"):
        Labels(good.orientation, good.confidence, good.phase, good.phases, {"a/b": good.confidence})


def a_map(rows: int, columns: int) -> OrientationMap:
    n = rows * columns
    orientation = np.tile([1.0, 0, 0, 0], (n, 1, 1))
    phase = np.zeros(n, dtype=np.int16)
    phase[::4] = -1
    confidence = np.ones((n, 1), dtype=np.float32)
    layers = {"CI": np.arange(n, dtype=np.float32)}
    return OrientationMap((rows, columns), orientation, confidence, phase, [linio2()], layers=layers)


def test_a_map_is_laid_on_the_scan_it_belongs_to(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.h5", origin_window=[2, 1, 2 + ROWS, 1 + COLUMNS])
    with Store.open(path) as store:
        same = labels_from_map(store, a_map(ROWS, COLUMNS), {})
        np.testing.assert_array_equal(same.scores["CI"], np.arange(N))
        np.testing.assert_array_equal(np.isnan(same.orientation[:, 0]), np.arange(N) % 4 == 0)
        refined = dataclasses.replace(a_map(ROWS, COLUMNS), ncc=np.full((N, 1), 0.75, dtype=np.float32))
        assert labels_from_map(store, refined, {}).scores["ncc"][1] == 0.75
        whole = labels_from_map(store, a_map(8, 9), {})  # of the scan that this store is a part of
        np.testing.assert_array_equal(whole.scores["CI"].reshape(ROWS, COLUMNS)[0], 2 * 9 + 1 + np.arange(COLUMNS))
        np.testing.assert_array_equal(whole.phase, np.where(whole.scores["CI"] % 4 == 0, -1, 0))
        with pytest.raises(UserError, match=r"the map has 2 x 9 positions, but the scan in .* has 3 x 5"):
            labels_from_map(store, a_map(2, 9), {})
