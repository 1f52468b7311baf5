"""`stemtune inspect`: every kind of file says what it holds, and patterns can be looked at."""

from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest

from stemtune.cli.inspect import describe
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal_map.io import write_map_h5
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.store import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build
from stemtune.plot.patterns import contact_sheet
from stemtune.tune.space.space import load_space

SIZE = 32
GEOMETRY = Geometry(SIZE, 0.08, 200.0)
SPACES = Path(__file__).resolve().parents[2] / "search_spaces"


def make_store(path: Path, labelled: bool = True, scan: tuple[int, int] | None = (6, 7)) -> Path:
    n = 42
    patterns = np.zeros((n, SIZE, SIZE), dtype=np.uint16)
    patterns[:, 15:17, 15:17] = 250
    patterns[np.arange(n), 3, np.arange(n) % SIZE] = 90
    attrs = {"origin": "made.hspy", "command": "ingest", "options": {"kv": 200.0, "keep": None}}
    columns = {"group": np.arange(n) // 6}
    if scan:
        attrs |= {"scan_shape": scan, "step_nm": (4.0, 4.0)}
        columns["position"] = np.stack(np.divmod(np.arange(n), scan[1]), axis=1)
    if labelled:
        orientation = np.tile([1.0, 0, 0, 0], (n, 1))
        orientation[:2] = np.nan
        phase = np.where(np.arange(n) < 2, -1, 0)
        columns |= {"orientation": orientation, "phase": phase, "confidence": np.linspace(0, 1, n)}
    with StoreWriter(path, n, GEOMETRY, [linio2()] if labelled else [], attrs=attrs) as writer:
        writer.write(0, patterns, **columns)
    return path


def test_store_in_words(tmp_path: Path) -> None:
    text = describe(make_store(tmp_path / "s.h5"))
    assert text.startswith("s.h5: a store of 42 patterns of 32 x 32 pixels, uint16\n")
    for words in (
        "6 rows x 7 columns, 4 x 4 nm apart",
        "200 kV (wavelength 0.02508 Å), 0.08 1/Å per pixel",
        "1,090 per pattern (median)",
        "40 of 42 patterns have an orientation; confidence",
        "0 LiNiO2 (space group 166, Laue class -3m), 40 patterns; no phase, 2 patterns",
        "whole groups, of which there are 7",
        "made.hspy ingest",
        "kv 200.0",
    ):
        assert words in text
    assert "keep" not in text  # an option that was not given
    assert "none: these patterns can be predicted, not trained on" in describe(make_store(tmp_path / "u.h5", False))


def test_real_scan_in_words(shared_data: Path) -> None:
    text = describe(shared_data / "cathode" / "cathode_scan.hspy")
    for words in (
        "a scan of 4,640 patterns of 128 x 128 pixels, uint16",
        "80 rows x 58 columns",
        "0.0235 1/Å per pixel",
        "row 63.5, column 63.5",
        "give --kv",
        "stemtune ingest cathode_scan.hspy",
    ):
        assert words in text
    text = describe(shared_data / "formats" / "blockfile" / "test1.blo")
    assert "0.0160617 cm per pixel; give --scale in 1/Å" in text
    assert "200 kV" in text


def test_map_in_words(tmp_path: Path) -> None:
    n = 12
    phase = np.where(np.arange(n) < 3, -1, 0).astype(np.int16)
    made = OrientationMap(
        shape=(3, 4),
        answers=np.tile([1.0, 0, 0, 0], (n, 2, 1)),
        answer_confidence=np.full((n, 2), 0.75, dtype=np.float32),
        phase=phase,
        spot_z_score=np.ones(n, dtype=np.float32),
        explained_intensity=np.ones(n, dtype=np.float32),
        phases=[linio2()],
        step_nm=(2.0, 2.0),
        attrs={"source": "scan.h5"},
    )
    (tmp_path / "map").mkdir()
    write_map_h5(made, tmp_path / "map" / "map.h5")
    (tmp_path / "map" / "ipf_z.png").touch()
    text = describe(tmp_path / "map")
    for words in (
        "an orientation map of 3 x 4 pixels",
        "75.0% of 12 pixels (LiNiO2 75.0%)",
        "0.75 (median",
        "the best 2",
        "scan.h5",
        "ipf_z.png",
    ):
        assert words in text
    assert "an orientation map" in describe(tmp_path / "map" / "map.h5")
    with pytest.raises(UserError, match="is a map, which holds no patterns"):
        contact_sheet(tmp_path / "map", tmp_path / "x.png")


def test_model_in_words(tmp_path: Path) -> None:
    config = Config.from_flat({"model.name": "cnn", "model.width": 4, "model.depth": 1, "head.name": "sixd"})
    model = build(config, linio2(), GEOMETRY)
    save_model(model, tmp_path / "m", {"val/within_5deg": 0.25}, "abc")
    text = describe(tmp_path / "m")
    weights = sum(weight.numel() for weight in model.parameters())
    for words in (f"a model, cnn of {weights:,} weights", "LiNiO2 (space group 166)", "32 x 32 pixels of 0.08 1/Å",
                  "val/within_5deg 0.25", "model.width 4", "head.name sixd"):  # fmt: skip
        assert words in text
    assert "optim.lr" not in text  # as by default
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "without its model.safetensors" in describe(tmp_path / "m")


@pytest.mark.parametrize("space", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_search_space_in_words(space: Path) -> None:
    text = describe(space)
    assert "a search space over" in text
    assert load_space(space).metric in text
    assert f"stemtune check {space}" in " ".join(text.split())


def test_what_cannot_be_described_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "no.yaml").write_text("a: [1, 2")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "short.h5").write_bytes(make_store(tmp_path / "s.h5").read_bytes()[:9000])
    (tmp_path / "text.h5").write_text("text")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "no.yaml": "is not YAML",
        "list.yaml": "is not a search space: it has no block 'search'",
        "short.h5": "is truncated",
        "text.h5": "is no HDF5 file",
        "notes.txt": "has no ending that rosettasciio knows",
        "empty": "is a folder without model.json or map.h5",
        "gone": "does not exist",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            describe(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scan", [(6, 7), (42, 1), None])
def test_contact_sheet_shows_patterns(scan: tuple[int, int] | None, tmp_path: Path) -> None:
    store, png = make_store(tmp_path / "s.h5", scan=scan), tmp_path / "sheet.png"
    contact_sheet(store, png)
    picture = matplotlib.image.imread(png)
    assert min(picture.shape[:2]) > 300
    bright = (picture[..., :3].mean(axis=2) > 0.9).mean()
    assert 0.001 < bright < 0.2  # direct beams and text on a dark ground
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == ["sheet.png"]


def test_contact_sheet_of_a_foreign_scan(shared_data: Path, tmp_path: Path) -> None:
    contact_sheet(shared_data / "formats" / "blockfile" / "test1.blo", tmp_path / "blo.png")
    assert matplotlib.image.imread(tmp_path / "blo.png").std() > 0.1


def test_contact_sheet_of_a_chunked_store(tmp_path: Path) -> None:
    made, chunked = make_store(tmp_path / "s.h5"), tmp_path / "chunked.h5"
    with h5py.File(made) as source, h5py.File(chunked, "w") as target:
        target.attrs.update(source.attrs)
        for name in source:
            target.create_dataset(name, data=source[name][()], chunks=True)
    assert "in chunks, so loading is slower" in describe(chunked)
    contact_sheet(made, tmp_path / "a.png")
    contact_sheet(chunked, tmp_path / "b.png")
    first, second = (matplotlib.image.imread(tmp_path / name)[60:] for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(first, second)  # below the title
