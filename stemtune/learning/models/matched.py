"""The polar matched filter: kinematic templates, correlated with the pattern over all in-plane angles at once.

It learns nothing and is the baseline that every trained model has to beat. Two stages keep it fast. The first scores
every beam direction in half precision at low angular resolution: one matrix product per angular frequency, then
one that turns frequencies into angles. The second scores the few best directions exactly, finds the different
candidates among them, and moves each to the top of a parabola through the scores of the cells around it.

Shape legend: B patterns, R radii, A in-plane angles, F angular frequencies, D beam directions, T shortlisted
directions, P peaks per direction, M candidates, K neighbouring directions, J angles around a peak, n candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from stemtune._parallel import map_over_threads
from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.model import Candidates, OrientationModel
from stemtune.learning.models.peaks import RIVALS, Maxima, Peaks
from stemtune.learning.models.polar_templates import PolarView, polar_grid, template_views

GRID_STEP = 2.0  # spacing of beam directions in degrees where `model.grid_step` is 0
COARSE = 0.36  # frequencies of the first stage, as a part of the number of in-plane angles; 0.5 would be all of them
SHARPNESS = 0.01  # difference of correlation at which a candidate is e times as likely; from simulated patterns
NCC_WITHOUT_CRYSTAL, NCC_OF_CRYSTAL = 0.12, 0.24
"""Correlations at which the confidence in the best candidate is 0, and no longer lowered."""

_CPU_BATCH, _GPU_BATCH = 32, 512  # patterns worked on at once
_DIRECTIONS = 256  # directions that the first stage works on at once: on a CPU their scores stay in its cache

Part = TypeVar("Part")


class Proposals(NamedTuple):
    """The best candidates of the matched filter: `orientation` (B, n, 4) as in `Candidates`, and their correlations
    `score` (B, n), best first; NaN and -inf where there are no more. `clear` (B,) is 0 to 1, no crystal to crystal, by
    the best.
    """

    orientation: Tensor
    score: Tensor
    clear: Tensor


class Matched(OrientationModel):
    """Polar matched filter over a bank of kinematic templates.

    Settings: `model.grid_step`, `angles`, `radii`, `reach`, `template_power`, `template_width`, `template_spot` and
    `data.gamma`. A score is a correlation coefficient, between -1 and 1. `view` and `grid` are the polar view and the
    cells that are scored, `inner` is that of `PolarView`.
    """

    trainable = False
    measures_spread = False
    coarse: Tensor
    fine: Tensor
    to_frequency: Tensor
    to_angle: Tensor
    even: Tensor
    odd: Tensor
    order: Tensor

    def __init__(self, config: Config, phase: Phase, geometry: Geometry, inner: float | None = None) -> None:
        super().__init__(config, phase, geometry)
        self.view = PolarView(config, phase, geometry, inner)
        self.grid = polar_grid(config, phase, GRID_STEP)
        angles = self.view.shape[1]
        bank_DRA = template_views(config, phase, geometry, self.view, self.grid.base)
        spectrum_DFR = torch.fft.rfft(bank_DRA, dim=-1).transpose(1, 2).contiguous()
        self.peaks = Peaks(self.grid, spectrum_DFR.shape[1])
        frequency = torch.arange(spectrum_DFR.shape[1], dtype=torch.float64)
        wave_AF = torch.outer(self.view.angle.double(), frequency)
        share = torch.where((frequency == 0) | (2 * frequency == angles), 1.0, 2.0) / angles
        self.coarse_frequencies = max(2, min(round(COARSE * angles), (angles - 1) // 2))
        order = torch.cat((torch.arange(0, self.coarse_frequencies, 2), torch.arange(1, self.coarse_frequencies, 2)))
        buffers = {
            "fine": torch.cat((spectrum_DFR.real, spectrum_DFR.imag), -1).transpose(0, 1).to(half_precision()),
            "coarse": _coarse_bank(spectrum_DFR, order, angles),
            "even": _half_turn(order[order % 2 == 0], self.coarse_frequencies),
            "odd": _half_turn(order[order % 2 == 1], self.coarse_frequencies),
            "order": order,
            "to_frequency": torch.stack((wave_AF.cos(), -wave_AF.sin()), dim=-1).flatten(1).float(),
            "to_angle": (torch.stack((wave_AF.cos(), -wave_AF.sin()), dim=-1) * share[:, None]).flatten(1).T.float(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous(), persistent=False)

    @torch.no_grad()
    def forward(self, patterns: Tensor) -> dict[str, Tensor]:
        """Score patterns (B, H, W) of any numeric type.

        Returns `peak` (B, D), the best score of each direction at low angular resolution (float32), and `spectrum`
        (B, F, R, 2), what `candidates` scores the best directions with.
        """
        parts = _in_parts(self._first_stage, patterns)
        return {name: torch.cat([part[name] for part in parts]) for name in ("peak", "spectrum")}

    def _first_stage(self, patterns: Tensor) -> dict[str, Tensor]:
        spectrum_BRF2 = (self.view(patterns) @ self.to_frequency).unflatten(-1, (-1, 2))
        spectrum_BFR2 = spectrum_BRF2.transpose(1, 2)
        low = self.coarse.dtype
        known_FRB = spectrum_BFR2[:, self.order].permute(1, 3, 2, 0).flatten(1, 2).to(low)
        batch, evens, peaks = patterns.shape[0], self.even.shape[1] // 2, []
        for bank_FdR in self.coarse.split(2 * _DIRECTIONS, dim=1):  # type: ignore[no-untyped-call]
            product_FdB = torch.bmm(bank_FdR, known_FRB)
            # A half turn leaves even frequencies and negates odd ones: the larger of the two angles is even + |odd|.
            even = self.even.to(low) @ product_FdB[:evens].view(2 * evens, -1)
            odd = self.odd.to(low) @ product_FdB[evens:].view(self.odd.shape[1], -1)
            peaks.append(even.add_(odd.abs_()).amax(0).view(-1, batch))
        return {"peak": torch.cat(peaks).T.float(), "spectrum": spectrum_BFR2.contiguous()}

    @torch.no_grad()
    def scores(self, patterns: Tensor) -> Tensor:
        """Return the exact correlation (B, D, A) of patterns (B, H, W) with every cell of the grid, float32."""
        spectrum_BFR2 = (self.view(patterns) @ self.to_frequency).unflatten(-1, (-1, 2)).transpose(1, 2)
        every = torch.arange(self.grid.shape[0], device=patterns.device).expand(len(patterns), -1)
        return self._rows(spectrum_BFR2, every)

    def _correlate(self, spectrum_BFR2: Tensor, direction_BT: Tensor) -> Tensor:
        """Return the products pattern * conj(template) (B, T, F, 2) with some directions each, float32."""
        batch, count = direction_BT.shape
        known_FBR2 = spectrum_BFR2.transpose(0, 1)
        real, imaginary = known_FBR2.unbind(-1)
        known_FBQ2 = torch.stack((torch.cat((real, imaginary), -1), torch.cat((imaginary, -real), -1)), dim=-1)
        bank_FNQ = self.fine.index_select(1, direction_BT.flatten())
        product = torch.bmm(bank_FNQ.view(-1, count, bank_FNQ.shape[-1]), known_FBQ2.flatten(0, 1).to(self.fine.dtype))
        return product.view(-1, batch, count, 2).permute(1, 2, 0, 3).float()

    def _rows(self, spectrum_BFR2: Tensor, direction_BT: Tensor) -> Tensor:
        """Return the scores (B, T, A) of some directions each at all in-plane angles."""
        return self._correlate(spectrum_BFR2, direction_BT).flatten(-2) @ self.to_angle

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the cross-entropy over beam directions, for comparison between settings; nothing is trained."""
        labels = self.grid.encode(orientation.to(output["peak"].device), self.config.head.softness)
        likely_BD = functional.log_softmax(output["peak"] / SHARPNESS, dim=1)
        return -(labels.weight * likely_BD.gather(1, labels.cell // self.grid.shape[1])).sum(1).mean()

    @torch.no_grad()
    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the `n` best orientations that are more than 5 degrees apart; see `OrientationModel.candidates`."""
        tops = self._tops(output, n)
        return Candidates(tops.orientation, confidence_of(tops.score)[:, :n])

    @torch.no_grad()
    def proposals(self, patterns: Tensor, n: int) -> Proposals:
        """Return the `n` best different orientations of patterns (B, H, W) with their correlations."""
        tops = self.tops(patterns, n)
        return Proposals(tops.orientation, tops.score[:, :n], _clear(tops.score[:, 0]))

    @torch.no_grad()
    def tops(self, patterns: Tensor, n: int = 1) -> Maxima:
        """Return the `n` best different orientations of patterns (B, H, W), and the correlations of all rivals."""
        return self._tops(self(patterns), n)

    def _tops(self, output: dict[str, Tensor], n: int) -> Maxima:
        parts = _in_parts(partial(self._second_stage, n=n), output["peak"], output["spectrum"])
        return Maxima(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _second_stage(self, peak_BD: Tensor, spectrum_BFR2: Tensor, n: int) -> Maxima:
        direction_BT = self.peaks.shortlist(peak_BD, 10 + 2 * n)
        rows_BTA = self._rows(spectrum_BFR2, direction_BT)
        return self.peaks.tops(direction_BT, rows_BTA, partial(self._correlate, spectrum_BFR2), n)


def _in_parts(work: Callable[..., Part], *tensors: Tensor) -> list[Part]:
    """Return `work` of the tensors' rows, a small batch at a time: on a CPU, one thread per batch."""
    if torch.compiler.is_exporting():  # their number is not known then
        return [work(*tensors)]
    device = tensors[0].device
    batch = _CPU_BATCH if device.type == "cpu" else _GPU_BATCH

    def alone(rows: tuple[Tensor, ...]) -> Part:
        with torch.autocast(device.type, enabled=False):
            return work(*rows)

    return map_over_threads(alone, list(zip(*(tensor.split(batch) for tensor in tensors), strict=True)), device)  # type: ignore[no-untyped-call]


def _coarse_bank(spectrum_DFR: Tensor, order: Tensor, angles: int) -> Tensor:
    """Return the first stage's bank (F, 2 D, 2 R): in turns real and imaginary part of pattern * conj(template) / A."""
    part_FDR = spectrum_DFR[:, order].transpose(0, 1)
    share = torch.where(order == 0, 1.0, 2.0) / angles
    real, imaginary = part_FDR.real * share[:, None, None], part_FDR.imag * share[:, None, None]
    bank_F2DR = torch.stack((torch.cat((real, imaginary), dim=-1), torch.cat((-imaginary, real), dim=-1)), dim=1)
    parts = [part.flatten(1, 2) for part in bank_F2DR.split(_DIRECTIONS, dim=2)]  # type: ignore[no-untyped-call]
    return torch.cat(parts, dim=1).to(half_precision())


def half_precision() -> torch.dtype:
    """Return the number format of large products here: bfloat16 where a GPU or the CPU has it built in."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _half_turn(frequencies: Tensor, highest: int) -> Tensor:
    """Return the waves (A', 2 F') that turn frequencies (real, imaginary) into scores over half a turn."""
    angle = torch.arange(highest, dtype=torch.float64) * (math.pi / highest)
    wave = torch.outer(angle, frequencies.double())
    return torch.stack((wave.cos(), -wave.sin()), dim=-1).flatten(1).float()


def confidence_of(score_Br: Tensor) -> Tensor:
    """Return the confidence (B, r) of different candidates from their scores, best first; -inf is no candidate."""
    total_B1 = (score_Br[:, :RIVALS] / SHARPNESS).logsumexp(dim=1, keepdim=True)
    share_Br = (score_Br / SHARPNESS - total_B1).exp().nan_to_num(0.0)
    return share_Br * _clear(score_Br[:, :1])


def _clear(score: Tensor) -> Tensor:
    """Return the factor on the confidence that a best correlation of `score` gives: 0 to 1, no crystal to crystal."""
    return ((score - NCC_WITHOUT_CRYSTAL) / (NCC_OF_CRYSTAL - NCC_WITHOUT_CRYSTAL)).clamp(0.0, 1.0)
