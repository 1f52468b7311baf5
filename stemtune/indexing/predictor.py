"""A model run over a store: the next patterns are read while it works, its candidates are checked against them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune._parallel import Spread, map_over_threads, prefetch
from stemtune._progress import Progress
from stemtune.dataset.store import Store
from stemtune.diffraction.detector import Resampling
from stemtune.diffraction.geometry import Geometry
from stemtune.indexing.refine import Refiner
from stemtune.indexing.spot_check import SpotCheck, is_crystal
from stemtune.learning.checkpoint import load_model
from stemtune.learning.fit import default_device
from stemtune.learning.inference import candidates_of, predict_candidates
from stemtune.learning.model import Candidates, OrientationModel
from stemtune.learning.trainer import chosen_precision

_PIECE = 128  # patterns that a thread takes all the way from counts to scores


class Predictions(NamedTuple):
    """What a model and the checks of its candidates say of n patterns, in the order asked.

    `candidates` (n, k, 4) float64 and `confidence` (n, k) float32, best first; `indexed` (n,) whether the pattern shows
    the crystal of the best one; `spot_z_score` and `explained_intensity` (n,) float32, see `indexing.spot_check`. Of
    refined candidates, `ncc` (n, k), `scale` (n,) and `centre_px` (n, 2) float32 as in `indexing.refine.Refinement`.
    """

    candidates: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float32]
    indexed: npt.NDArray[np.bool_]
    spot_z_score: npt.NDArray[np.float32]
    explained_intensity: npt.NDArray[np.float32]
    ncc: npt.NDArray[np.float32] | None = None
    scale: npt.NDArray[np.float32] | None = None
    centre_px: npt.NDArray[np.float32] | None = None


class Indexer:
    """A model that indexes patterns of one calibration, and checks its candidates against them.

    The model is moved to `device`, by default the GPU if there is one, and set to evaluation. The patterns have any
    `geometry` that the model's can be resampled from, and get so many candidates as `alternatives`. With `refine` these
    are fitted to the patterns (`indexing.refine`); their order stays.

    Raises a `UserError` when the patterns do not reach far enough for the model, or no reflection is in reach.
    """

    def __init__(
        self,
        model: OrientationModel,
        geometry: Geometry,
        alternatives: int = 5,
        device: torch.device | str | None = None,
        refine: bool = False,
    ) -> None:
        self.device = default_device() if device is None else torch.device(device)
        self.model = model.to(self.device).eval()
        self.alternatives = alternatives
        self.precision = chosen_precision(model.config.train.precision, self.device)
        self._resample = Resampling(geometry, model.geometry)
        self._check = SpotCheck(model.phase, geometry, self.device)
        self._refiner = Refiner(model.config, model.phase, geometry, self.device, model.spread_deg) if refine else None
        self.notes = self._resample.notes  # for the user, one sentence each

    @torch.inference_mode()
    def on_device(self, patterns: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of `Predictions` for patterns (B, H, W), still on the device; refined ones are eight."""
        counts = patterns.to(self.device, non_blocking=True)
        if self.device.type != "cpu":
            return self._from_counts(counts)
        pieces = counts.split(_PIECE)  # type: ignore[no-untyped-call]
        return _columns(map_over_threads(self._from_counts, pieces))  # each thread takes patterns all the way

    @torch.inference_mode()
    def _from_counts(self, counts: Tensor) -> tuple[Tensor, ...]:
        orientation, confidence = candidates_of(self.model, self._resample(counts), self.alternatives, self.precision)
        further: list[Tensor] = []
        if self._refiner is not None:
            orientation, *further = self._refiner.refine(counts, Candidates(orientation, confidence))
        scores = self._check(counts, orientation[:, 0])
        checked = is_crystal(scores), scores.spot_z_score, scores.explained_intensity
        return orientation, confidence, *checked, *further

    @torch.inference_mode()
    def forward_only(self, patterns: Tensor, count: int = 1) -> Candidates:
        """Return the model's `count` best candidates for patterns of its own geometry, and do nothing else."""
        return predict_candidates(self.model, patterns, count, self.precision)

    def index(self, patterns: npt.NDArray[Any]) -> Predictions:
        """Return the predictions for patterns (n, H, W) at hand."""
        return _predictions([tuple(column.cpu() for column in self.on_device(torch.from_numpy(patterns)))])


class Predictor(Indexer):
    """Runs a model over the patterns of a store, `batch` at a time; see `Indexer`."""

    def __init__(
        self,
        model: OrientationModel,
        store: Store,
        batch: int = 256,
        alternatives: int = 5,
        device: torch.device | str | None = None,
        refine: bool = False,
    ) -> None:
        super().__init__(model, store.geometry, alternatives, device, refine)
        self.store, self.batch = store, batch

    def run(self, rows: npt.NDArray[np.intp] | None = None, progress: bool = True) -> Predictions:
        """Return the predictions for the patterns `rows` of the store; all of them when left out."""
        wanted = np.arange(self.store.n) if rows is None else rows
        parts: list[tuple[Tensor, ...]] = []
        with Progress(len(wanted), "predict", "pattern", shown=progress) as bar:
            for patterns in read_ahead(self.store, wanted, self.batch, self.device):
                parts.append(tuple(column.cpu() for column in self.on_device(patterns)))
                bar.update(len(patterns))
        return _predictions(parts)

    def over(self, spread: Spread, folder: str | os.PathLike[str], progress: bool = True) -> Predictions:
        """Return the predictions for all patterns from workers that load the model in `folder` and open the store.

        Batches are those of `run`, so the predictions are the same.
        """
        plan = [np.arange(start, min(start + self.batch, self.store.n)) for start in range(0, self.store.n, self.batch)]
        given = (str(folder), str(self.store.path), self.batch, self.alternatives, self._refiner is not None)
        bar = Progress(self.store.n, "predict", "pattern", shown=progress)
        parts: list[Predictions] = []
        with bar, closing(spread(_prepare, given, _run, plan)) as found:
            for part in found:
                parts.append(part)
                bar.update(len(part.candidates))
        return joined(parts)

    def resampled(self, rows: npt.NDArray[np.intp], doing: str) -> Iterator[Tensor]:
        """Yield the patterns `rows` of the store as the model wants them, batch by batch; the bar says `doing`."""
        with Progress(len(rows), doing, "pattern") as bar:
            for patterns in read_ahead(self.store, rows, self.batch, self.device):
                yield self._resample(patterns.to(self.device, non_blocking=True))
                bar.update(len(patterns))


def _columns(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _predictions(parts: Sequence[tuple[Tensor, ...]]) -> Predictions:
    """Return what `Indexer.on_device` made of batch after batch, as one."""
    candidates, confidence, indexed, *further = _columns(parts)
    candidates = candidates.double()
    return Predictions(
        (candidates / candidates.norm(dim=-1, keepdim=True)).numpy(),
        confidence.float().numpy(),
        indexed.numpy(),
        *(column.float().numpy() for column in further),
    )


def joined(parts: Iterable[Predictions]) -> Predictions:
    """Return the predictions for several runs of patterns, one after the other, as one."""
    columns = zip(*parts, strict=True)
    whole: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
    return Predictions(*whole)


def _prepare(given: tuple[str, str, int, int, bool]) -> Predictor:
    folder, path, batch, alternatives, refine = given
    return Predictor(load_model(folder), Store.open(path), batch, alternatives, refine=refine)


def _run(predictor: Predictor, rows: npt.NDArray[np.intp]) -> Predictions:
    return predictor.run(rows, progress=False)


def read_ahead(
    store: Store, rows: npt.NDArray[np.intp], batch: int, device: torch.device | None = None
) -> Iterator[Tensor]:
    """Yield the patterns of `rows` of a store, `batch` at a time, reading the next ones in another thread meanwhile."""

    def read(start: int) -> Tensor:
        patterns = torch.from_numpy(store.take(rows[start : start + batch]))
        return patterns.pin_memory() if device is not None and device.type == "cuda" else patterns

    yield from prefetch(map(read, range(0, len(rows), batch)))
