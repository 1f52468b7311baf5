"""`python -m benchmarks accuracy`: the score against cases whose answer is known, and a small run from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy, testset
from benchmarks.__main__ import main as benchmark
from benchmarks.testset import Condition
from stemtune.crystal.phase import linio2
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import beam180
from stemtune.errors import UserError

X = torch.tensor([1.0, 0, 0], dtype=torch.float64)


def test_the_score_of_known_errors() -> None:
    phase, truth = linio2(), random_orientations(6, 4)
    told = truth.clone()
    told[0] = multiply(phase.symmetry.operations[3], told[0])  # the same orientation
    told[1] = multiply(told[1], from_axis_angle_deg(X, 1.0))
    told[2] = multiply(told[2], from_axis_angle_deg(X, 3.0))
    told[3] = beam180(told[3])
    told[4] = multiply(pseudo_variants(phase)[0][1], told[4])
    told[5] = torch.nan
    second = truth.clone()
    found = accuracy.score(torch.stack((told, second), 1), truth, phase, torch.full((6, 2), 0.5))
    assert found["strict"]["within_2deg"] == pytest.approx(2 / 6)
    assert found["strict"]["within_5deg"] == pytest.approx(3 / 6)
    assert found["beam180"]["within_5deg"] == pytest.approx(4 / 6)
    assert found["strict"]["mean_deg"] > 180 / 6
    assert found["beam180"]["median_deg"] == pytest.approx(2, abs=0.01)
    assert found["within_5deg_of_best"] == pytest.approx([3 / 6, 1])
    assert found["pseudo"] == pytest.approx(1 / 6)
    assert found["taken_for"]["60 about c"] == found["pseudo"]
    assert found["taken_for"]["beam180"] == pytest.approx(1 / 6)
    assert found["taken_for"]["other"] == pytest.approx(1 / 6)
    assert found["calibration_error"] == pytest.approx(0)


def test_a_small_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 0.0.1\n')  # says that it has the peers, and fails to run them
    broken.chmod(0o755)
    options = accuracy.Options(
        patterns=8,
        models=("matched",),
        peer_pythons=(str(broken),),
        conditions=(Condition(0.5, 3000), Condition(0.5, 0, 1.0, 0.01)),
        out=str(tmp_path / "set"),
        json=str(tmp_path / "figures.json"),
    )
    result = accuracy.run(options)
    printed = capsys.readouterr()
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert [(row["source"], row["electrons"], row["centre_px"]) for row in result["rows"]] == [
        (source, *condition) for source in ("stemtune", "py4DSTEM") for condition in ((3000, 0.0), (0, 1.0))
    ]
    for row in result["rows"]:  # measured on 16: 94 %
        assert row["method"] == "matched" and row["n"] == 8
        assert row["strict"]["median_deg"] < 1 and row["strict"]["within_5deg"] > 0.7
        assert row["within_5deg_of_best"][-1] > 0.9
        assert row["patterns_per_s"] > 0
    assert [(pair["program"], pair["precession_deg"]) for pair in result["foreign"]] == [
        ("py4DSTEM", 0.5),
        ("diffsims", 0.0),
    ]
    for pair in result["foreign"]:
        wanted = pair["median_ratio"] <= 1.1 and pair["within_5deg_ratio"] >= 0.9
        assert pair["no_worse"] == wanted
        assert pair["theirs"]["strict"]["within_5deg"] > 0.6
    assert [told.split(" ")[0] for told in result["left_out"]] == ["pyxem", "py4DSTEM"]
    assert all(f"failed in {broken}" in told and told in printed.out for told in result["left_out"])
    table = [line for line in printed.out.splitlines() if line.startswith("| py4DSTEM")]
    assert len(table) == 3 and "matched" in table[0] and "3,000" in table[0] and "no noise" in table[1]
    assert len({len(line) for line in table[:2]}) == 1
    assert "(built)" in printed.err and str(tmp_path / "set") in printed.err
    assert list((tmp_path / "set").glob("bloch_linio2_p0.5_n8_*.npz"))


def test_a_model_that_is_not_there_and_a_peer_that_is_no_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model 'nowhere'"):
        accuracy.run(accuracy.Options(models=("nowhere",), out=str(tmp_path)))
    with pytest.raises(UserError, match="--peer-python /no/python: this is no Python"):
        accuracy.run(accuracy.Options(peer_pythons=("/no/python",), out=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_what_it_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["accuracy", "--patterns", "0"]) == 2
    assert benchmark(["acuracy"]) == 2
    assert "did you mean 'accuracy'" in capsys.readouterr().err


def test_peers_are_asked_for_few_sets_unless_all_are_wanted() -> None:
    beams = testset.Beams(np.zeros((0, 4)), np.zeros(0, np.float32), [])
    sets = [
        accuracy.Set(source, condition, beams, 0)
        for source in (accuracy.OURS, accuracy.THEIRS)
        for condition in testset.CONDITIONS
    ]
    chosen = [each.condition.name for each in sets if accuracy._for_pyxem(each)]
    assert chosen == [
        "p0-e3000-c0-s0",
        "p0-e3000-c1-s1",
        "p0-e0-c0-s0",
        "p0.5-e3000-c0-s0",
        "p0.5-e3000-c1-s1",
        "p0.5-e0-c0-s0",
    ]
    assert [each.condition.name for each in sets if accuracy._for_py4dstem(each)] == [
        "p0-e3000-c0-s0",
        "p0.5-e3000-c0-s0",
    ]
