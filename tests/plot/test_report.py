"""The report: needs nothing else, holds the map's orientations, shows what files say as text and never as markup."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orix.quaternion import Orientation, Rotation
from orix.vector import Miller
from sample_maps import NICKEL, map_of

from stemtune.analysis.grain_analysis import Analysis, analyse
from stemtune.config import GrainsConfig
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal_map.orientation_map import orix_phase
from stemtune.diffraction.geometry import Geometry
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.plot.pole_figures import density, lambert, on_sphere, poles
from stemtune.plot.report import report, write_report

SHAPE = (9, 14)
EVIL = "<script>alert('x')</script>&\"NiO"
VOID = {"meta", "img", "input"}


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    """Two grains of one phase beside one of another, whose name is markup; a pixel that is not indexed."""
    column = np.arange(SHAPE[0] * SHAPE[1]) % SHAPE[1]
    grain = np.digitize(column, (5, 9))
    g = random_orientations(3, 2).numpy()[grain]
    g[17] = np.nan
    phases = [linio2(), dataclasses.replace(Phase.from_cif_text(NICKEL), name=EVIL)]
    made = map_of(SHAPE, g, phases, phase=(grain == 2).astype(int))
    weight = np.full(len(g), np.nan, np.float32)
    weight[40] = 0.3
    geometry = Geometry(64, 0.05, 200).to_dict()
    facts = {"source": "/data/<b>scan</b>.h5", "calibration": {"centre": "</td><script>"}, "geometry": geometry}
    return analyse(dataclasses.replace(made, layers={WEIGHT_LAYER: weight}, attrs=facts), GrainsConfig())


@pytest.fixture(scope="module")
def page(analysis: Analysis) -> str:
    summary = {"patterns": 126, "indexed_fraction": 0.99, "notes": ["<img onerror=1>"], "median_confidence": None}
    return report(analysis, summary)


class Elements(HTMLParser):
    """Every element with its attributes, and whether all of them are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(page: str) -> None:
    assert "http:" not in page and "https:" not in page
    assert "@import" not in page and "file:" not in page
    elements = Elements(page)
    assert elements.open == []
    links = [value for _, named in elements.found for name, value in named.items() if name in ("src", "href")]
    assert links
    assert all(str(link).startswith(("data:image/png;base64,", "#")) for link in links)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {
        f"#{named['id']}" for _, named in elements.found if "id" in named
    }
    targets = {named["href"] for _, named in elements.found if str(named.get("href", "")).startswith("#")}
    assert targets <= {f"#{named['id']}" for _, named in elements.found if "id" in named}


def test_what_files_say_is_no_markup(page: str) -> None:
    elements = Elements(page).found
    assert sum(tag == "script" for tag, _ in elements) == 2
    assert not any("onerror" in named for _, named in elements)
    assert not any(tag == "b" and named for tag, named in elements)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;NiO" in page
    assert "&lt;img onerror=1&gt;" in page and "&lt;b&gt;scan&lt;/b&gt;.h5" in page
    assert told(page)["phases"] == [linio2().name, EVIL]


def told(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="pixels">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def layer(page: str, name: str) -> np.ndarray:
    """Return a layer as the page's script reads it."""
    held = told(page)["layers"][name]
    values = np.frombuffer(base64.b64decode(held["data"]), np.dtype(held["type"]).newbyteorder("<"))
    return np.where(values == held["missing"], np.nan, values * held["step"]).reshape(-1, held["per"])


def test_the_page_holds_the_orientations_of_the_map(page: str, analysis: Analysis) -> None:
    made = analysis.orientation_map
    euler, indexed = layer(page, "euler"), made.indexed
    assert np.isnan(euler[~indexed]).all() and not np.isnan(euler[indexed]).any()
    for index, phase in enumerate(made.phases):
        own = made.phase == index
        group = orix_phase(phase).point_group.laue
        read = Orientation(Rotation.from_euler(np.deg2rad(euler[own])), group)
        angle = np.rad2deg(read.angle_with(Orientation(made.orientation[own], group)))
        assert angle.max() < 0.02
    assert (told(page)["rows"], told(page)["columns"], told(page)["step"]) == (*SHAPE, [2.0, 2.0])
    np.testing.assert_array_equal(layer(page, "phase")[:, 0], np.where(indexed, made.phase, np.nan))
    grain = made.layers["grain"]
    np.testing.assert_array_equal(layer(page, "grain")[:, 0], np.where(grain >= 0, grain, np.nan))
    np.testing.assert_allclose(layer(page, "second")[40], 0.3, atol=0.003)
    np.testing.assert_allclose(layer(page, "kam")[:, 0], made.layers["kam_deg"], atol=0.006)


def test_boundaries_are_drawn_along_the_pixels(page: str) -> None:
    group = re.search(r'<g id="boundaries">(.*?)</g>', page)
    assert group
    lines = re.findall(r"M(\d+) (\d+)([VH])(\d+)", group[1])
    assert {(int(x), kind) for x, _, kind, _ in lines} == {(5, "V"), (9, "V")}
    assert sum(int(end) - int(start) for _, start, _, end in lines) == 2 * SHAPE[0]


def test_a_report_without_patterns_says_so(page: str) -> None:
    assert "They cannot be shown" in page and "does not exist" in page


def test_a_map_without_a_single_orientation_has_a_report(tmp_path: Path) -> None:
    made = analyse(map_of((3, 4), np.full((12, 4), np.nan), [linio2()], step=None), GrainsConfig())
    write_report(made, tmp_path, {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Elements(text).open == []
    assert "No pixel is indexed" in text


def test_a_map_of_40000_pixels_is_a_page_of_less_than_8_mb() -> None:
    """Neighbours all differ, which compresses worst."""
    g = random_orientations(40_000, 5).numpy()
    noisy = analyse(map_of((200, 200), g, [linio2()]), GrainsConfig(min_size=1))
    assert len(report(noisy, {"patterns": 40_000})) < 8e6


def test_equal_area_and_back() -> None:
    vectors = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(500, 3)))).numpy()
    disc = lambert(vectors)
    upper = np.where(vectors[:, 2:] < 0, -vectors, vectors)
    angle = np.arccos(upper[:, 2])
    np.testing.assert_allclose(np.hypot(*disc.T), np.sqrt(2) * np.sin(angle / 2), atol=1e-12)
    np.testing.assert_allclose(on_sphere(disc), upper, atol=1e-9)


def test_poles_are_those_of_orix() -> None:
    phase = linio2()
    g = random_orientations(3, 8).numpy()
    family = Miller(hkl=[1, 0, 4], phase=orix_phase(phase)).symmetrise(unique=False).unit
    for own in g:
        expected = (~Rotation(own) * family).data
        found = poles(own[None], phase, (1, 0, 4))
        near = np.abs(found @ expected.T)
        np.testing.assert_allclose(near.max(axis=0), 1, atol=1e-6)
        np.testing.assert_allclose(near.max(axis=1), 1, atol=1e-6)


def test_density_is_1_without_texture_and_peaks_at_a_pole() -> None:
    many = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(1).normal(size=(400_000, 3)))).numpy()
    flat = density(many)
    inside = np.isfinite(flat)
    assert inside.mean() == pytest.approx(np.pi / 4, abs=0.01)
    assert flat[inside].mean() == pytest.approx(1, abs=1e-9)
    assert np.abs(flat[inside] - 1).max() < 0.2
    one = density(np.array([[0.6, 0.0, 0.8]]))
    row, column = np.unravel_index(np.nanargmax(one), one.shape)
    place = (np.array([column, row]) + 0.5) * 2 / len(one) - 1
    np.testing.assert_allclose(place, [0.6 / np.sqrt(1.8), 0], atol=0.02)
    assert np.nanmean(one) == pytest.approx(1, abs=1e-9)
