"""`stemtune label --method template`: orientations by template matching, for one phase or several, with their scores.

The engine is the model `matched`, one bank of templates per phase at the store's own calibration. All phases are
compared with a pattern in the same polar cells, so that their correlations can be compared with each other: the phase
whose best template fits best is the pattern's. The templates' small power makes a spot that a phase predicts and the
pattern lacks cost much, which is what tells a phase from another that has some of the same spots.

Scores
------
Q
    How well the best template fits: the correlation coefficient of pattern and template in polar cells, each cell
    raised to the power `data.gamma`, every ring's mean subtracted and cells weighted with their area, at the top of
    the parabola through the templates around. 0, no likeness, to 1, the same up to a factor. Patterns of a crystal
    reach 0.3 to 0.7 with the default settings, the vacuum beside the cathode particle 0.2.
R
    The reliability: how far the best orientation is ahead of the best different one of the same phase, further away
    than 5 degrees and the crystal's symmetry, 100 (1 - Q2 / Q1), from 0, another fits as well, to 100. The formula is
    that of the field's precession maps. A zero-layer pattern fits its twin, turned half about the beam, as well.
R_phase
    With several phases the same between the best phase and the next: 100 (1 - Q(other phase) / Q1).
spot_z_score, explained_intensity
    Whether the predicted spots are there at all, see `indexing.spot_check`. They decide what is *not indexed*.
ncc
    With refinement only, see `indexing.refine`.

References
----------
E. F. Rauch, L. Dupuy, Arch. Metall. Mater. 50 (2005) 87: template matching with a correlation index. E. F. Rauch et
al., Z. Kristallogr. 225 (2010) 103: the reliability.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune._parallel import Spread
from stemtune._progress import Progress
from stemtune.config import Config
from stemtune.crystal.phase import Phase, phase_from
from stemtune.dataset.labels import Labels, label_target, write_labels
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.predictor import read_ahead
from stemtune.indexing.refine import Refiner
from stemtune.indexing.spot_check import SpotCheck, is_crystal
from stemtune.learning.calibration import Calibration
from stemtune.learning.checkpoint import read_description
from stemtune.learning.fit import default_device
from stemtune.learning.model import Candidates
from stemtune.learning.models.matched import Matched, confidence_of
from stemtune.learning.models.polar_templates import inner_radius

SETTINGS = (
    "data.gamma",
    "model.grid_step",
    "model.angles",
    "model.radii",
    "model.reach",
    "model.template_power",
    "model.template_width",
    "model.template_spot",
    "model.centring",
)
"""The knobs that matching has."""


class Matches(NamedTuple):
    """Labels of B patterns: `orientation` (B, 4) and `phase` (B,) of the best candidate whether indexed or not, its
    `confidence` (B,), `indexed` (B,), and `scores`, each (B,), by name.
    """

    orientation: Tensor
    phase: Tensor
    confidence: Tensor
    indexed: Tensor
    scores: dict[str, Tensor]


class TemplateLabeller:
    """Matches patterns of the calibration of `store` with the templates of some phases, by the settings called
    `SETTINGS`.

    With `refine` the best candidate is fitted to the pattern (`indexing.refine`). `calibration` makes matching's own
    confidence a probability; left out, it stays as it is.

    Raises a `UserError` when no reflection of a phase falls on the patterns.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        store: Store,
        config: Config | None = None,
        refine: bool = False,
        calibration: Calibration | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = default_device() if device is None else torch.device(device)
        self.phases, self.config, geometry = list(phases), config or Config(), store.geometry
        self.calibration = calibration or Calibration()
        inner = min(inner_radius(phase, geometry) for phase in phases)
        self.models = [Matched(self.config, phase, geometry, inner).to(self.device).eval() for phase in phases]
        self.checks = [SpotCheck(phase, geometry, self.device) for phase in phases]
        self.refiners = [
            Refiner(self.config, phase, geometry, self.device, model.spread_deg)
            for phase, model in zip(phases, self.models, strict=True)
            if refine
        ]

    @torch.inference_mode()
    def __call__(self, patterns: Tensor) -> Matches:
        """Return the labels of patterns (B, H, W) of counts."""
        counts = patterns.to(self.device, non_blocking=True)
        tops = [model.tops(counts) for model in self.models]
        best_BP = torch.stack([each.score[:, 0] for each in tops], dim=1)
        phase_B = best_BP.argmax(1)
        rows = torch.arange(len(counts), device=self.device)
        orientation_B4 = torch.stack([each.orientation[:, 0] for each in tops], dim=1)[rows, phase_B]
        every_BM = torch.cat([each.score for each in tops], dim=1).sort(dim=1, descending=True).values
        confidence_B = self.calibration(confidence_of(every_BM))[:, 0]
        own_BPr = torch.stack([each.score for each in tops], dim=1)[rows, phase_B]
        scores = {"Q": own_BPr[:, 0].clamp(0, 1).nan_to_num(0.0), "R": ahead(own_BPr[:, 0], own_BPr[:, 1])}
        if len(self.phases) > 1:
            scores["R_phase"] = ahead(*best_BP.topk(2, dim=1).values.unbind(1))
        orientation_B4, further = self._checked(counts, phase_B, orientation_B4, confidence_B)
        indexed_B = further.pop("indexed") > 0
        return Matches(orientation_B4, phase_B, confidence_B, indexed_B, scores | further)

    def _checked(
        self, counts_BHW: Tensor, phase_B: Tensor, orientation_B4: Tensor, confidence_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the orientations, refined if wanted, and what their spots say; each phase on its own."""
        orientation_B4 = orientation_B4.clone()
        names = ("indexed", "spot_z_score", "explained_intensity", *(("ncc",) if self.refiners else ()))
        found = {name: torch.zeros(len(phase_B), device=self.device) for name in names}
        for number, check in enumerate(self.checks):
            mine = (phase_B == number).nonzero()[:, 0]
            if not len(mine):
                continue
            counts = counts_BHW[mine]
            if self.refiners:
                candidates = Candidates(orientation_B4[mine, None], confidence_B[mine, None])
                fit = self.refiners[number].refine(counts, candidates)
                orientation_B4[mine], found["ncc"][mine] = fit.orientation[:, 0], fit.ncc[:, 0]
            scores = check(counts, orientation_B4[mine])
            found["indexed"][mine] = is_crystal(scores).float()
            found["spot_z_score"][mine] = scores.spot_z_score
            found["explained_intensity"][mine] = scores.explained_intensity
        return orientation_B4, found

    def on_cpu(self, patterns: Tensor) -> Matches:
        """Return the labels of patterns (B, H, W) of counts, moved to the CPU."""
        found = self(patterns)
        scores = {name: values.cpu() for name, values in found.scores.items()}
        return Matches(found.orientation.cpu(), found.phase.cpu(), found.confidence.cpu(), found.indexed.cpu(), scores)

    def run(self, store: Store, batch: int = 256) -> Generator[Matches]:
        """Yield the labels of all patterns of a store, `batch` at a time."""
        for patterns in read_ahead(store, np.arange(store.n), batch, self.device):
            yield self.on_cpu(patterns)


def _prepare(given: tuple[list[Phase], str, Config, bool, Calibration, Any]) -> tuple[TemplateLabeller, Store]:
    """Return a worker's labeller, from its arguments but for the path of the store, and the store."""
    phases, path, *further = given
    store = Store.open(path)
    return TemplateLabeller(phases, store, *further), store


def _work(state: tuple[TemplateLabeller, Store], rows: npt.NDArray[np.intp]) -> Matches:
    labeller, store = state
    return labeller.on_cpu(torch.from_numpy(store.take(rows)))


def _joined(parts: Iterable[Matches], phases: list[Phase], count: int, facts: Mapping[str, Any]) -> Labels:
    """Return the labels of `count` patterns from what batch after batch gave."""
    kept: list[Matches] = []
    with Progress(count, "label", "pattern") as bar:
        for part in parts:
            kept.append(part)
            bar.update(len(part.phase))
    indexed = torch.cat([part.indexed for part in kept])
    orientation = torch.cat([part.orientation for part in kept]).double()
    orientation = orientation / orientation.norm(dim=1, keepdim=True)
    confidence = torch.cat([part.confidence for part in kept]).float()
    scores = {name: torch.cat([part.scores[name] for part in kept]).float() for name in kept[0].scores}
    return Labels(
        orientation=orientation.where(indexed[:, None], torch.nan).numpy(),
        confidence=confidence.where(indexed, torch.nan).numpy(),
        phase=torch.cat([part.phase for part in kept]).where(indexed, -1).short().numpy(),
        phases=phases,
        scores={name: values.numpy() for name, values in scores.items()},
        facts=facts,
    )


def ahead(first: Tensor, second: Tensor) -> Tensor:
    """Return the reliability 100 (1 - second / first), from 0 to 100; 0 where nothing fits, 100 where no rival does."""
    share = second.clamp_min(0) / first.clamp_min(1e-6)
    return torch.where(first > 0, 100 * (1 - share).clamp(0, 1), 0.0)


def label_by_templates(
    store: str | os.PathLike[str],
    cifs: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    model_folder: str | os.PathLike[str] | None = None,
    refine: bool = False,
    batch: int = 256,
    device: torch.device | str | None = None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Label the patterns of a store by template matching.

    Parameters without a word here are those of `indexing.pseudo_labels.label_by_model`. `cifs` are the phases, as
    `crystal.phase.phase_from` takes them; without any, those of the store, or else the model's. `settings` (of
    `SETTINGS`) differ from the defaults, or from those of the model. The model in `model_folder` is a `matched`, a
    sweep's champion for instance: its settings and the calibration of its confidence count.

    The result holds `store`, `patterns`, `indexed`, `patterns_per_second`, and the medians `Q` and `R` of the indexed
    patterns.

    Raises a `UserError` for unusable input, before anything is written.
    """
    flat, calibration = chosen_settings(settings or {}, model_folder)
    config = Config.from_flat(flat)
    target = label_target(store, out)
    with Store.open(store) as opened:
        phases = chosen_phases(opened, cifs, model_folder)
        facts = {
            "method": "template",
            "store": Path(store).name,
            "cif": [Path(cif).name for cif in cifs],
            "model": None if model_folder is None else str(model_folder),
            "refine": refine,
            "settings": {name: value for name, value in config.to_flat().items() if name in SETTINGS},
        }
        given = (phases, str(Path(store).resolve()), config, refine, calibration, device)
        if spread is None:
            parts = _prepare(given)[0].run(opened, batch)
        else:  # batches are those of `run`
            rows = np.arange(opened.n)
            parts = spread(_prepare, given, _work, [rows[start : start + batch] for start in rows[::batch]])
        began = time.perf_counter()
        with closing(parts):
            labels = _joined(parts, phases, opened.n, facts)
        rate = opened.n / (time.perf_counter() - began)
    write_labels(store, labels, target)
    indexed = labels.phase >= 0
    middle = {name: float(np.median(labels.scores[name][indexed])) if indexed.any() else None for name in ("Q", "R")}
    return {
        "store": str(target),
        "patterns": len(indexed),
        "indexed": int(indexed.sum()),
        "patterns_per_second": rate,
        **middle,
    }


def chosen_phases(store: Store, cifs: Sequence[str], model_folder: str | os.PathLike[str] | None = None) -> list[Phase]:
    """Return the phases that the CIFs name; where there are none, those of the store, or else that of the model."""
    if not cifs and store.phases:
        return store.phases
    if not cifs and model_folder is not None:
        return [Phase.from_cif_text(read_description(model_folder)["phase"]["cif"], f"the CIF in '{model_folder}'")]
    if not cifs:
        raise UserError(f"'{store.path}' does not say which crystal it shows; give --cif CIF")
    phases = [phase_from(cif) for cif in cifs]
    for number, phase in enumerate(phases):
        if phase in phases[:number]:
            first = cifs[phases.index(phase)]
            raise UserError(f"--cif {cifs[number]} is the same crystal as --cif {first}; give each phase once")
    return phases


def chosen_settings(
    settings: Mapping[str, object], model_folder: str | os.PathLike[str] | None
) -> tuple[dict[str, object], Calibration]:
    """Return the settings of matching that differ from the defaults, and the calibration of its confidence."""
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"--set {name}: matching has no such setting; it has {', '.join(SETTINGS)}")
    if model_folder is None:
        return dict(settings), Calibration()
    described = read_description(model_folder)
    if described.get("architecture") != "matched":
        raise UserError(
            f"the model '{model_folder}' is a '{described.get('architecture')}', but template matching takes its"
            " settings from a `matched`; give a champion of search_spaces/matching.yaml"
        )
    kept = {name: value for name, value in described["config"].items() if name in SETTINGS}
    return {**kept, **settings}, Calibration.from_dict(described.get("calibration", {}))
