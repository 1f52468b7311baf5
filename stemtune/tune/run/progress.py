"""What a person reads on stderr while a sweep runs: a bar, a line per trial, and a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from stemtune.tune.run.trial_state import STATUS_WORDS, TrialState, better, figure
from stemtune.tune.space.describe import in_short


class Progress:
    """Writes lines to stderr, and keeps a bar below them where stderr is a terminal.

    Parameters
    ----------
    total
        Number of trials.
    metric, mode
        What is optimised.
    fixed
        Settings that every trial shares, left out of the lines.
    before
        Trials from before a restart.
    """

    def __init__(
        self, total: int, metric: str, mode: str, fixed: Iterable[str], before: Iterable[TrialState] = ()
    ) -> None:
        self._metric, self._mode = metric, mode
        self._fixed = {*fixed, "train.epochs"}
        self._best: TrialState | None = None
        ended = [state for state in before if state.status not in ("running", "interrupted")]
        for state in ended:
            self._crown(state)
        self._bar = tqdm(total=total, desc="trials", unit="trial", disable=None, leave=False, file=sys.stderr)
        self._bar.update(len(ended))

    def say(self, line: str) -> None:
        """Write one line."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def started(self, state: TrialState) -> None:
        """Say what a trial tries."""
        self.say(f"trial {state.number} starts: {in_short(state.knobs, self._fixed)}")

    def reported(self, state: TrialState) -> None:
        """Show a trial's last figure in the bar."""
        self._bar.set_postfix_str(
            f"trial {state.number} {state.label} epoch {state.epoch}: {figure(self._metric, state.last)}"
        )

    def ended(self, state: TrialState) -> None:
        """Say how a trial ended."""
        self._crown(state)
        word = STATUS_WORDS[state.status]
        tail = _because(state)
        best = f"; best so far trial {self._best.number}, {self._value(self._best)}" if self._best else ""
        self.say(
            f"trial {state.number} {state.label} {word} after epoch {state.epoch} and {state.wall_s:.0f} s"
            f" with {self._value(state)}{tail}{best}"
        )
        self._bar.update()

    def _crown(self, state: TrialState) -> None:
        if state.epoch and (self._best is None or better(state.best, self._best.best, self._mode)):
            self._best = state

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _value(self, state: TrialState) -> str:
        return figure(self._metric, state.best)


def table(trials: Iterable[TrialState], metric: str, mode: str) -> str:
    """Return the trials as a table, best first."""
    rows = [("", "trial", "model", metric.removeprefix("val/"), "epoch", "epochs", "wall", "status")]
    ranked = sorted(trials, key=lambda state: _rank(state, mode))
    for place, state in enumerate(ranked, 1):
        rows.append(
            (
                str(place) if state.epoch else "-",
                str(state.number),
                state.label,
                figure(metric, state.best),
                str(state.best_epoch),
                str(state.epoch),
                f"{state.wall_s:.0f} s",
                STATUS_WORDS[state.status] + _because(state),
            )
        )
    return aligned(rows)


def _because(state: TrialState) -> str:
    """Say why a trial failed or ended before its time; that ASHA stopped one its status says."""
    return f": {state.reason}" if state.reason and state.status in ("failed", "finished") else ""


def _rank(state: TrialState, mode: str) -> tuple[bool, float]:
    return (not state.epoch, state.best if mode == "min" else -state.best)


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as columns of equal width; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])
