"""The store: what plain h5py sees of it, what survives a round trip, what is refused, and what an interrupt leaves."""

import hashlib
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemtune.dataset.store import Store, StoreWriter, make_splits
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

SIZE, N = 24, 40
GEOMETRY = Geometry(SIZE, 0.02, 200.0, (11.0, 12.5))


class NamedCif:
    """As much of a phase as a store keeps."""

    name = "linio2"
    cif = "data_linio2\n" + "# long\n" * 20_000  # far above the 64 kB that a plain HDF5 attribute can hold


def counts(dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(1).integers(0, 250, (N, SIZE, SIZE)).astype(dtype)


@pytest.fixture(params=["uint8", "uint16", "float32"])
def store_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    patterns = counts(request.param)
    orientation = np.tile([1.0, 0, 0, 0], (N, 1))
    path = tmp_path / "made.h5"
    attrs = {"scan_shape": (5, 8), "options": {"size": SIZE}, "origin": "scan.hspy", "step_nm": None}
    with StoreWriter(path, N, GEOMETRY, [NamedCif()], dtype=request.param, attrs=attrs) as writer:
        for start in range(0, N, 16):
            rows = slice(start, start + 16)
            labels = {"orientation": orientation[rows], "group": np.arange(N)[rows] // 4}
            writer.write(
                start,
                patterns[rows],
                phase=np.zeros(len(patterns[rows])),
                scores={"q": [7] * len(patterns[rows])},
                **labels,
            )
    return path


def test_the_hash_covers_every_pattern_and_is_that_of_old_stores_without_one(tmp_path: Path) -> None:
    def made(name: str, patterns: np.ndarray, step: int) -> str:
        with StoreWriter(tmp_path / name, len(patterns), GEOMETRY) as writer:
            for start in range(0, len(patterns), step):
                writer.write(start, patterns[start : start + step])
        with Store.open(tmp_path / name) as store:
            return store.sha256

    patterns = np.random.default_rng(1).integers(0, 250, (200, SIZE, SIZE)).astype(np.uint16)
    whole = made("a.h5", patterns, 200)
    assert made("b.h5", patterns, 7) == made("c.h5", patterns.astype(np.int64), 50) == whole
    for row in range(0, 200, 19):  # most are not among the 64 that an old store is known by
        changed = patterns.copy()
        changed[row, 5, 5] += 1
        assert made("d.h5", changed, 200) != whole
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        digests = b"".join(hashlib.sha256(pattern.tobytes()).digest() for pattern in patterns)
        assert file.attrs["content_sha256"].decode() == hashlib.sha256(digests).hexdigest()
        del file.attrs["content_sha256"]
    with Store.open(tmp_path / "a.h5") as old:
        assert old.sha256 == "47c760ff5fbfe35eab8db3e7ccc097bb05e6246f9fa4a1746cffeef9e843f2cf"
        assert old.describe()[1]["content"].startswith("fingerprint (of 64 patterns and all labels) ")
    with Store.open(tmp_path / "b.h5") as new:
        assert new.describe()[1]["content"].startswith(f"sha256 {whole[:16]}")


def test_plain_h5py_sees_the_documented_layout(store_path: Path) -> None:
    with h5py.File(store_path) as file:
        shapes = {name: data.shape for name, data in file.items() if isinstance(data, h5py.Dataset)}
        kinds = {name: file[name].dtype.name for name in shapes}
        assert shapes.pop("patterns") == (N, SIZE, SIZE)
        assert shapes == {
            "orientation": (N, 4), "confidence": (N,), "phase": (N,), "position": (N, 2), "group": (N,), "split": (N,)
        }  # fmt: skip
        assert (kinds["orientation"], kinds["confidence"], kinds["phase"]) == ("float64", "float32", "int16")
        assert (kinds["position"], kinds["group"]) == ("int32", "int32")
        assert file.attrs["schema"] == 1
        assert file.attrs["kv"] == 200
        assert file.attrs["scale_inv_angstrom"] == 0.02
        assert list(file.attrs["centre_px"]) == [11, 12.5]
        assert file["patterns"].chunks is None
        np.testing.assert_array_equal(file["patterns"][()], counts(kinds["patterns"]))


def test_what_was_written_comes_back(store_path: Path) -> None:
    with Store.open(store_path) as store:
        assert store.is_mapped
        assert not store.patterns.flags.writeable
        assert store.patterns.flags.aligned
        np.testing.assert_array_equal(store.patterns, counts(store.patterns.dtype.name))
        rows = np.array([39, 3, 3, 17])
        np.testing.assert_array_equal(store.take(rows), counts(store.patterns.dtype.name)[rows])
        assert store.geometry == GEOMETRY
        assert store.scan_shape == (5, 8)
        assert store.attrs["phases_cif"] == [NamedCif.cif]
        assert store.labelled.all()
        assert store.scores["q"].tolist() == [7] * N
        assert pickle.loads(pickle.dumps(store)).sha256 == store.sha256


def test_patterns_map_the_file_itself(store_path: Path) -> None:
    """A byte changed in the file shows in the mapped array: there is no private copy."""
    with Store.open(store_path) as store, store_path.open("r+b") as raw:
        offset = h5py.File(store_path)["patterns"].id.get_offset()
        before = store.patterns.reshape(-1).view(np.uint8)[0]
        raw.seek(offset)
        raw.write(bytes([before ^ 1]))
        raw.flush()
        assert store.patterns.reshape(-1).view(np.uint8)[0] == before ^ 1


@pytest.mark.parametrize("options", [{"chunks": (4, SIZE, SIZE), "compression": "gzip"}, {"dtype": ">u2"}])
def test_store_made_by_someone_else_reads_the_same(options: dict[str, object], tmp_path: Path) -> None:
    own, foreign = tmp_path / "own.h5", tmp_path / "foreign.h5"
    with StoreWriter(own, N, GEOMETRY) as writer:
        writer.write(0, counts())
    with h5py.File(own) as source, h5py.File(foreign, "w") as target:
        target.attrs.update(source.attrs)
        for name in source:
            if name != "patterns":
                source.copy(name, target)
        target.create_dataset("patterns", data=source["patterns"][()], **options)
    with Store.open(foreign) as store:
        assert store.is_mapped == ("chunks" not in options)
        rows = np.array([30, 2, 2, 9])
        taken = store.take(rows)
        np.testing.assert_array_equal(taken, counts()[rows])
        assert taken.dtype.isnative
        store.expect(rows)
        assert store.sha256 == Store.open(own).sha256


def test_content_hash_tells_labels_and_calibration_apart(tmp_path: Path) -> None:
    hashes = []
    for number, (geometry, phase) in enumerate(
        [(GEOMETRY, 0), (GEOMETRY, 0), (GEOMETRY, 1), (Geometry(SIZE, 0.03, 200), 0)]
    ):
        path = tmp_path / f"{number}.h5"
        with StoreWriter(path, N, geometry) as writer:
            writer.write(0, counts(), phase=np.full(N, phase))
        hashes.append(Store.open(path).sha256)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_unlabelled_rows_are_known(tmp_path: Path) -> None:
    orientation = np.tile([1.0, 0, 0, 0], (N, 1))
    orientation[3] = np.nan
    phase = np.zeros(N)
    phase[5] = -1
    with StoreWriter(tmp_path / "s.h5", N, GEOMETRY) as writer:
        writer.write(0, counts(), orientation=orientation, phase=phase)
    assert np.flatnonzero(~Store.open(tmp_path / "s.h5").labelled).tolist() == [3, 5]


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError])
def test_interrupt_leaves_nothing(problem: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(problem), StoreWriter(tmp_path / "s.h5", N, GEOMETRY) as writer:
        writer.write(0, counts()[:10])
        raise problem
    assert not list(tmp_path.iterdir())


def test_unwritten_rows_are_a_fault_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="30 of 40 rows"), StoreWriter(tmp_path / "s.h5", N, GEOMETRY) as writer:
        writer.write(0, counts()[:10])
    assert not list(tmp_path.iterdir())


def test_truncated_store_is_refused(store_path: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.h5"
    short.write_bytes(store_path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"short\.h5' is truncated"):
        Store.open(short)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.h5"
    text.write_text("not HDF5")
    with pytest.raises(UserError, match="is no HDF5 file"):
        Store.open(text)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["spectrum"] = [1, 2, 3]
    with pytest.raises(UserError, match=r"not a stemtune store \(it holds spectrum\)"):
        Store.open(tmp_path / "other.h5")
    with pytest.raises(UserError, match="does not exist"):
        Store.open(tmp_path / "nowhere.h5")
    with pytest.raises(UserError, match="is a folder"):
        Store.open(tmp_path)


def test_damaged_stores_are_refused_by_name(store_path: Path) -> None:
    def damage(change: object) -> str:
        bad = store_path.with_name("bad.h5")
        bad.write_bytes(store_path.read_bytes())
        with h5py.File(bad, "r+") as file:
            change(file)  # type: ignore[operator]
        with pytest.raises(UserError) as caught:
            Store.open(bad)
        return str(caught.value)

    def shorten(file: h5py.File) -> None:
        del file["phase"]
        file["phase"] = np.zeros(3, dtype="int16")

    assert "`orientation` is missing" in damage(lambda file: file.__delitem__("orientation"))
    assert "`phase` is (3,), but must be (40,)" in damage(shorten)
    assert "schema 9" in damage(lambda file: file.attrs.modify("schema", 9))
    assert "`kv` is missing" in damage(lambda file: file.attrs.__delitem__("kv"))


def test_overlapping_grains_come_back_and_other_stores_open_without(store_path: Path, tmp_path: Path) -> None:
    path, weight = tmp_path / "o.h5", np.tile([0.7, 0.3, 0.0], (N, 1))
    further = np.full((N, 2, 4), np.nan)
    further[:, 0] = [0.0, 1, 0, 0]
    with StoreWriter(path, N, GEOMETRY, overlap=True) as writer:
        writer.write(0, counts(), overlap_orientation=further, overlap_weight=weight)
    with Store.open(path) as store, Store.open(store_path) as other:
        np.testing.assert_array_equal(store.overlap_orientation, further)
        np.testing.assert_allclose(store.overlap_weight, weight, atol=1e-7)
        assert other.overlap_orientation is None and other.overlap_weight is None
        before = store.sha256
    with h5py.File(path, "r+") as file:
        file["overlap_weight"][3] = [0.6, 0.4, 0]
    with Store.open(path) as store:
        assert store.sha256 != before
    with h5py.File(path, "r+") as file:
        del file["overlap_orientation"]
    with pytest.raises(UserError, match="`overlap_orientation` is missing"):
        Store.open(path)
    with pytest.raises(TypeError, match="no column 'overlap_weight'"), StoreWriter(path, N, GEOMETRY) as writer:
        writer.write(0, counts(), overlap_weight=weight)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60), seed=st.integers(0, 1000))
def test_splits_never_cut_a_group(sizes: list[int], seed: int) -> None:
    group = np.repeat(np.arange(len(sizes)) * 3, sizes)
    split = make_splits(group, seed=seed)
    for number in np.unique(group):
        assert len(set(split[group == number])) == 1
    assert len(set(split)) == min(3, len(sizes))
    np.testing.assert_array_equal(split, make_splits(group, seed=seed))
    shuffled = np.random.default_rng(seed).permutation(len(group))
    np.testing.assert_array_equal(make_splits(group[shuffled], seed=seed), split[shuffled])


def test_splits_have_the_wanted_shares_and_depend_on_the_seed() -> None:
    group = np.arange(10_000) // 5
    split = make_splits(group)
    np.testing.assert_allclose(np.bincount(split) / len(split), [0.8, 0.1, 0.1], atol=0.002)
    assert (make_splits(group, seed=1) != split).any()
    assert set(make_splits(group, (0.5, 0.5, 0))) == {0, 1}
