"""Calibration: the error against a table done by hand, the map against known distortions, and what it must not do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import testset
from stemtune.config import Config
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.learning.calibration import Calibration, cross_validated_error, reliability
from stemtune.learning.checkpoint import load_model
from stemtune.learning.fit import fit
from stemtune.learning.inference import predict_candidates


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True probabilities, many of them high, and whether the answer came out right."""
    rng = np.random.default_rng(seed)
    truth = rng.beta(2.0, 0.7, count)
    return truth, rng.random(count) < truth


def test_the_error_is_that_of_a_table_done_by_hand() -> None:
    confidence = [0.1, 0.1, 0.2, 0.2, 0.9, 0.9, 0.9, 0.7]
    right = [0, 0, 1, 0, 1, 1, 0, 1]
    table = reliability(confidence, right, bins=2)
    assert table.patterns.tolist() == [4, 4]
    assert table.confidence.tolist() == pytest.approx([0.15, 0.85])
    assert table.right.tolist() == [0.25, 0.75]
    assert table.error == pytest.approx(0.1)


def test_equal_confidences_stay_in_one_bin() -> None:
    table = reliability([0.5] * 60, [True, False] * 30)
    assert table.patterns.tolist() == [60]
    assert table.error == 0
    assert reliability([], []).error == 0


def test_what_chance_alone_gives_is_what_true_probabilities_show() -> None:
    errors, expected = [], []
    for seed in range(40):
        table = reliability(*drawn(300, seed))
        errors.append(table.error)
        expected.append(table.by_chance)
    assert np.mean(errors) == pytest.approx(np.mean(expected), rel=0.15)
    assert 0.02 < np.mean(expected) < 0.1


def test_a_true_probability_has_no_error_and_a_distorted_one_has() -> None:
    truth, right = drawn(20_000, 1)
    assert reliability(truth, right).error < 0.02
    assert len(reliability(truth, right).patterns) == 15
    assert reliability(truth**3, right).error > 0.1


@pytest.mark.parametrize("distort", [lambda p: p**4, lambda p: p**0.25, lambda p: 1 / (1 + (1 / p - 1) ** 3)])
def test_five_hundred_patterns_undo_a_distortion(distort: object) -> None:
    truth, right = drawn(500, 2)
    unseen, hit = drawn(20_000, 3)
    made = Calibration.fitted(distort(truth), right)  # type: ignore[operator]
    mapped = made(torch.from_numpy(distort(unseen))[:, None]).numpy()[:, 0]  # type: ignore[operator]
    assert reliability(distort(unseen), hit).error > 0.08  # type: ignore[operator]
    assert reliability(mapped, hit).error < 0.03
    assert cross_validated_error(distort(unseen), hit) < 0.02  # type: ignore[operator]


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_the_map_rises_and_stays_a_probability_even_when_all_are_right_or_wrong(right: float) -> None:
    made = Calibration.fitted(np.linspace(0.2, 0.9, 30), np.full(30, right))
    line = torch.linspace(0, 1, 101)[:, None]
    mapped = made(line)[:, 0]
    assert (mapped.diff() >= 0).all() and mapped[0] == 0
    assert float(mapped.min()) >= 0 and float(mapped.max()) <= 1
    assert abs(float(mapped[60]) - right) < 0.15
    assert Calibration.fitted([], []) == Calibration()


def test_further_answers_keep_their_order_and_leave_room_for_each_other() -> None:
    made = Calibration(0.3, 0.4, 1.0)
    raw = torch.tensor([[0.5, 0.3, 0.15, 0.0], [0.9, 0.05, 0.01, 0.01]])
    mapped = made(raw)
    torch.testing.assert_close(mapped[:, :1], made(raw[:, :1]))
    assert (mapped.diff(dim=1) <= 0).all()
    assert (mapped.sum(1) <= 1 + 1e-6).all()
    assert mapped[0, 3] == 0 and mapped[0, 2] > 0


def test_the_map_comes_back_from_its_parameters_and_changes_nothing_by_default() -> None:
    made = Calibration.fitted(*drawn(100, 5))
    assert Calibration.from_dict(made.to_dict()) == made
    line = torch.linspace(0, 1, 11)[:, None]
    torch.testing.assert_close(Calibration()(line), line, rtol=0, atol=0)
    torch.testing.assert_close(Calibration(1.0, 1.0, 1e-9)(line), line, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_matched_is_calibrated_on_dynamical_patterns_it_was_not_calibrated_on(tmp_path: Path) -> None:
    """The map comes from our kinematic patterns; the unseen ones are py4DSTEM's, of other doses, centres and scales.

    Measured: at most 0.024 more than chance alone gives in any condition.
    """
    flat = {"data.source": "simulate", "data.validation_patterns": 512, "model.name": "matched"}
    microscope = {"simulate.thickness": "20:80", "simulate.precession": "0:0.5"}
    metrics = fit(Config.from_flat(flat | microscope), lambda *_: None, tmp_path, device=torch.device("cpu"))
    assert metrics["val/ece"] < 0.06
    model = load_model(tmp_path / "checkpoint" / "model")
    trigonal = model.phase.symmetry
    assert model.calibration != Calibration()
    conditions = [
        testset.Condition(0.0, electrons=1000, centre_px=1.0),
        testset.Condition(0.0, electrons=3000, scale_error=0.01),
        testset.Condition(0.0, electrons=30_000),
        testset.Condition(0.5, electrons=300),
    ]
    confidence, right = [], []
    for condition in conditions:
        beams = testset.py4dstem(condition.precession_deg)
        found = predict_candidates(model, torch.from_numpy(testset.pictures(beams, condition, 1)))
        error = disorientation_deg(found.orientation[:, 0].double(), torch.from_numpy(beams.orientation), trigonal)
        confidence.append(found.confidence[:, 0].numpy())
        right.append(error.numpy() < 5)
        table = reliability(confidence[-1], right[-1])
        assert table.error < table.by_chance + 0.05, condition
    assert reliability(np.concatenate(confidence), np.concatenate(right)).error <= 0.05
