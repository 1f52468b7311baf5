"""Which patterns train and which validate: scores, cuts, guard band, the random split; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemtune.config import Config, DataConfig
from stemtune.crystal.phase import linio2
from stemtune.dataset.ingest import scan_group
from stemtune.dataset.loaders import loaders
from stemtune.dataset.selection import confident_rows, guarded, split_rows
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

ROWS, COLUMNS = 24, 40
N = ROWS * COLUMNS
PLACE = np.stack(np.divmod(np.arange(N), COLUMNS), axis=1)


def make_scan(path: Path, scan: bool = True, **columns: Any) -> Path:
    """Write a scan in 8 x 8 blocks whose labels have the scores Q, falling with the row, and R, of random order."""
    generator = np.random.default_rng(1)
    q = generator.normal(size=(N, 4))
    labels: dict[str, Any] = {
        "orientation": q / np.linalg.norm(q, axis=1, keepdims=True),
        "phase": np.zeros(N),
        "confidence": np.linspace(0, 1, N),
        "group": scan_group(PLACE, COLUMNS),
        "position": PLACE,
    }
    scores = {"Q": np.linspace(40, 0, N), "R": generator.permutation(N) * 30 / N}
    attrs = {"scan_shape": [ROWS, COLUMNS]} if scan else {}
    with StoreWriter(path, N, Geometry(8, 0.05, 200.0), [linio2()], attrs=attrs) as writer:
        writer.write(0, np.zeros((N, 8, 8), dtype=np.uint16), scores=scores, **{**labels, **columns})
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(make_scan(tmp_path_factory.mktemp("choosing") / "s.h5"))


def data(**settings: object) -> DataConfig:
    return Config.from_flat({f"data.{key}": value for key, value in settings.items()}).data


def nearest(store: Store, some: np.ndarray, others: np.ndarray) -> int:
    """Return the smallest distance, in scan pixels along the longer axis, between two sets of rows, pair by pair."""
    apart = np.abs(store.position[some][:, None] - store.position[others][None]).max(axis=-1)
    return int(apart.min())


@pytest.mark.parametrize("guard", [0, 1, 2, 3])
def test_no_training_pattern_is_within_the_guard_band(store: Store, guard: int) -> None:
    everything = np.ones(N, dtype=bool)
    train, validation = split_rows(store, everything, data(guard=guard))
    held = np.flatnonzero(store.split > 0)
    assert nearest(store, train, held) == guard + 1
    assert np.array_equal(validation, np.flatnonzero(store.split == 1))
    left_out = np.setdiff1d(np.flatnonzero(store.split == 0), train)
    assert all(nearest(store, left_out[number : number + 1], held) <= guard for number in range(len(left_out)))


def test_unlabelled_neighbours_need_no_guard(store: Store) -> None:
    held = store.split > 0
    train, _ = split_rows(store, ~held | (store.split == 1), data(guard=2))
    assert nearest(store, train, np.flatnonzero(store.split == 1)) == 3
    assert nearest(store, train, np.flatnonzero(store.split == 2)) == 1


def test_patterns_of_no_scan_have_no_neighbours(tmp_path: Path) -> None:
    with Store.open(make_scan(tmp_path / "s.h5", scan=False, position=np.full((N, 2), -1))) as loose:
        assert not guarded(loose, loose.split > 0, 5).any()


def test_a_guard_that_leaves_nothing_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="`data.guard` is 40, and every training pattern .* lower it"):
        split_rows(store, np.ones(N, dtype=bool), data(guard=40))


def test_random_split_warns_and_mixes_neighbours(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    learnable = np.arange(N) % 2 == 0
    train, validation = split_rows(store, learnable, data(split="random"))
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "`data.split` is random" in warned
    assert len(train) == 0.8 * N / 2 and len(validation) == 0.1 * N / 2
    assert not set(train) & set(validation) and learnable[train].all() and learnable[validation].all()
    assert nearest(store, train, validation) <= 2
    again = split_rows(store, learnable, data(split="random"), verbose=False)
    assert np.array_equal(train, again[0]) and not capsys.readouterr().err  # the same for every trial and every rank


def test_cuts_on_two_scores_at_once(store: Store) -> None:
    everything = np.arange(N)
    kept = confident_rows(store, everything, data(cut="Q>20 R>15"))
    quality, reliability = store.scores["Q"], store.scores["R"]
    assert kept.tolist() == [row for row in range(N) if quality[row] > 20 and reliability[row] > 15]
    with_confidence = confident_rows(store, everything, data(cut="confidence>=0.5, Q>10"))
    expected = [row for row in range(N) if store.confidence[row] >= 0.5 and quality[row] > 10]
    assert with_confidence.tolist() == expected


@pytest.mark.parametrize("score", ["confidence", "Q", "R"])
def test_fraction_cut_and_order_go_by_the_score(store: Store, score: str) -> None:
    everything = np.arange(N)
    values = np.asarray(store.confidence if score == "confidence" else store.scores[score])
    best = np.argsort(-values, kind="stable")
    kept = confident_rows(store, everything, data(score=score, keep_fraction=0.25, order="confidence"))
    assert kept.tolist() == best[: N // 4].tolist()
    limit = float(values[best[99]])
    above = confident_rows(store, everything, data(score=score, min_confidence=limit))
    assert above.tolist() == sorted(best[:100].tolist())
    after = confident_rows(store, everything, data(score=score, keep_fraction=0.5, cut="Q>20"))
    passed = [row for row in best if store.scores["Q"][row] > 20]
    assert after.tolist() == sorted(passed[: -(-len(passed) // 2)])  # half of what the cut leaves


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "q"}, "`data.score` asks for the score 'q', but the labels of .* have confidence, Q, R"),
        ({"score": "confidenc"}, "did you mean 'confidence'"),
        ({"cut": "Q>20 S>15"}, "`data.cut` asks for the score 'S', but .* have confidence, Q, R"),
        ({"cut": "Q>100"}, "`data.cut` is 'Q>100', but no training label of .* passes"),
        ({"score": "Q", "min_confidence": 99}, r"no training label of .* reaches it \(Q\)"),
    ],
)
def test_scores_that_are_not_there(store: Store, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        confident_rows(store, np.arange(N), data(**settings))


@pytest.mark.parametrize("cut", ["Q", "Q<20", "Q>twenty", ">20", "Q>20 R", "Q>20R>15", 20, True])
def test_a_malformed_cut_is_caught_at_load(cut: object) -> None:
    with pytest.raises(UserError, match="`data.cut` is .*, but must be scores and what they must exceed, Q>0.2 R>5"):
        data(cut=cut)


@pytest.mark.parametrize("cut", ["Q>20 R>15", " Q > 20,R>15 ", "Q>20 and R > 15.0", "Q>2e1,  R>15"])
def test_a_cut_has_one_form(cut: str) -> None:
    assert data(cut=cut).cut == "Q>20 R>15"
    assert data(cut="").cut == ""


def test_loaders_keep_the_guard_band(store: Store) -> None:
    flat = {"data.store": str(store.path), "data.augment": "none", "train.batch_size": 1, "data.cut": "Q>20"}
    train, _ = loaders(Config.from_flat(flat))
    expected = split_rows(store, np.ones(N, dtype=bool), data())[0]
    assert train.batches_per_epoch == (store.scores["Q"][expected] > 20).sum()
