"""`stemtune label --from`: a map of another program on the patterns of a store; what is refused changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from laue_phases import crystal
from orix.quaternion import Rotation

from stemtune.cli import main
from stemtune.crystal.lattice import Lattice
from stemtune.crystal.phase import Phase
from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.crystal_map.io import write_map, write_map_h5
from stemtune.crystal_map.orientation_map import OrientationMap, PhaseDescription
from stemtune.crystal_map.phase_matching import with_crystals
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

SHAPE = (5, 6)
SIZE = 16


def random_map(phases: list[Phase], shape: tuple[int, int] = SHAPE) -> OrientationMap:
    rng = np.random.default_rng(9)
    n = shape[0] * shape[1]
    answers = rng.normal(size=(n, 1, 4))
    answers /= np.linalg.norm(answers, axis=-1, keepdims=True)
    score = rng.random(n).astype(np.float32)
    phase = rng.integers(-1, len(phases), n).astype(np.int16)
    return OrientationMap(shape, answers, score[:, None], phase, phases, score, score, (3.0, 3.0))


def scan_store(path: Path, phases: list[Phase], order: np.ndarray | None = None) -> None:
    """A scan without labels, its patterns in any order."""
    order = np.arange(SHAPE[0] * SHAPE[1]) if order is None else order
    patterns = np.random.default_rng(1).integers(0, 200, (len(order), SIZE, SIZE)).astype(np.uint8)
    attrs = {"scan_shape": SHAPE, "step_nm": (3.0, 3.0)}
    with StoreWriter(
        path, len(order), Geometry(SIZE, 0.05, 200.0, (8.0, 8.0)), phases, dtype="uint8", attrs=attrs
    ) as writer:
        position = np.stack(np.divmod(order, SHAPE[1]), axis=1)
        writer.write(0, patterns, position=position, group=np.arange(len(order)))


def cif_file(folder: Path, phase: Phase) -> str:
    path = folder / f"{phase.symmetry.laue.replace('/', '_')}.cif"
    path.write_text(phase.cif)
    return str(path)


@pytest.mark.parametrize("to", ["ctf", "ang", "h5"])
def test_labels_are_those_of_the_map(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    phases = [crystal("-3m"), crystal("m-3m"), crystal("2/m")]
    made = random_map(phases)
    write_map_h5(made, tmp_path / "map.h5")
    file = write_map(tmp_path / "map.h5", to)
    order = np.random.default_rng(3).permutation(30)
    scan_store(tmp_path / "scan.h5", [], order)
    cifs = [word for phase in reversed(phases) for word in ("--cif", cif_file(tmp_path, phase))]
    out = tmp_path / "labelled.h5"
    assert main(["label", str(tmp_path / "scan.h5"), "--from", str(file), *cifs, "--out", str(out)]) == 0
    assert "patterns labelled from" in capsys.readouterr().out
    with Store.open(out) as store, Store.open(tmp_path / "scan.h5") as before:
        assert not before.labelled.any()
        np.testing.assert_array_equal(store.patterns, before.patterns)
        assert [phase.symmetry.laue for phase in store.phases] == ["2/m", "m-3m", "-3m"]
        np.testing.assert_array_equal(store.phase, np.array([-1, 2, 1, 0])[made.phase + 1][order])
        for index, phase in enumerate(store.phases):
            own = store.phase == index
            truth = torch.from_numpy(made.orientation[order][own])
            off = disorientation_deg(torch.from_numpy(store.orientation[own]), truth, phase.symmetry)
            assert float(off.max()) < 0.05
        assert np.isnan(store.orientation[store.phase < 0]).all()
        facts = json.loads(store.attrs["labelled"])
        assert (facts["method"], facts["map"], len(facts["map_sha256"])) == ("map", file.name, 64)
        assert facts["frame"] == ("oxford" if to == "ctf" else "orix")
        score = {"ctf": "BC", "ang": "CI", "h5": "confidence"}[to]
        assert score in store.scores
        indexed = store.phase >= 0
        assert np.isfinite(store.confidence[indexed]).all() and np.isnan(store.confidence[~indexed]).all()


def test_what_is_refused_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phase = crystal("-3m")
    scan_store(tmp_path / "scan.h5", [phase])
    kept = (tmp_path / "scan.h5").read_bytes()
    good, bad = random_map([phase]), random_map([phase], (4, 6))
    for name, made in (("good", good), ("bad", bad)):
        write_map_h5(made, tmp_path / f"{name}.h5")
        write_map(tmp_path / f"{name}.h5", "ctf")
    store, ctf = str(tmp_path / "scan.h5"), str(tmp_path / "good.ctf")

    def refused(*words: str, says: str) -> None:
        assert main(["label", store, *words]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert says in told[-1], told

    refused("--from", str(tmp_path / "bad.ctf"), says="the map has 4 x 6 positions, but the scan in")
    refused("--from", ctf, "--cif", cif_file(tmp_path, crystal("m-3m")), says="which is none of 'class m-3m'")
    refused("--from", ctf, "--frame", "edx", says="there are auto, orix, oxford")
    refused("--from", ctf, "--refine", says="--refine has nothing to do with a map made elsewhere")
    refused("--frame", "orix", says="give the map with --from")
    refused("--from", str(tmp_path / "none.ctf"), says="does not exist")
    assert (tmp_path / "scan.h5").read_bytes() == kept
    assert main(["label", store, "--from", ctf]) == 0  # the store names its phase
    with Store.open(store) as labelled:
        np.testing.assert_array_equal(labelled.phase, good.phase)


def test_frame_reaches_the_labels(tmp_path: Path) -> None:
    """The same file as of EDAX's setting 1: a quarter turn about the beam."""
    phase = crystal("m-3m")
    made = random_map([phase])
    write_map_h5(made, tmp_path / "map.h5")
    file = write_map(tmp_path / "map.h5", "ang")
    scan_store(tmp_path / "scan.h5", [phase])
    assert main(["label", str(tmp_path / "scan.h5"), "--from", str(file), "--frame", "edax1"]) == 0
    with Store.open(tmp_path / "scan.h5") as store:
        keep = store.phase >= 0
        turned = (Rotation(made.orientation[keep]) * Rotation.from_axes_angles((0, 0, 1), np.pi / 2)).data
        off = disorientation_deg(torch.from_numpy(store.orientation[keep]), torch.from_numpy(turned), phase.symmetry)
        assert float(off.max()) < 0.05


def foreign(*phases: PhaseDescription) -> OrientationMap:
    n = len(phases)
    confidence = np.ones((n, 1), np.float32)
    return OrientationMap((1, n), np.tile([1.0, 0, 0, 0], (n, 1, 1)), confidence, np.arange(n, dtype=np.int16), phases)


def test_phases_are_told_apart() -> None:
    oxide, cubic = crystal("-3m"), crystal("m-3m")
    other = Phase.from_cif_text(oxide.cif.replace("2.878", "2.92").replace("number 166", "number 160"))
    known = [cubic, other, oxide]

    def found(phase: PhaseDescription, among: list[Phase]) -> int:
        return int(with_crystals(foreign(phase), among, "it").phase[0])

    class_3m = Symmetry.of_laue("-3m")
    near = Lattice(2.90, 2.90, 14.2, 90.0, 90.0, 120.0)
    assert found(PhaseDescription("a", class_3m, near, 166), known) == 2  # by its space group
    assert found(PhaseDescription("a", class_3m, near, 160), known) == 1
    assert (
        found(PhaseDescription("a", class_3m, Lattice(2.915, 2.915, 14.2, 90.0, 90.0, 120.0)), known) == 1
    )  # by its lattice
    assert found(PhaseDescription("a"), [oxide]) == 0  # the file does not say, and there is one
    with pytest.raises(UserError, match="may be"):
        found(PhaseDescription("a"), [oxide, cubic])
    with pytest.raises(UserError, match="which is none of"):
        found(PhaseDescription("a", class_3m, Lattice(4.9, 4.9, 5.4, 90.0, 90.0, 120.0)), known)
    unused = dataclasses.replace(
        foreign(PhaseDescription("a")),
        phase=np.array([1], np.int16),
        phases=[PhaseDescription("x", class_3m, near), PhaseDescription("a")],
    )
    assert with_crystals(unused, [oxide], "it").phase[0] == 0  # a phase without points need not be known
    nothing = dataclasses.replace(foreign(PhaseDescription("a")), phase=np.array([-1], np.int16))
    with pytest.raises(UserError, match="no indexed point"):
        with_crystals(nothing, [oxide], "it")
