"""What a person reads on stderr while a sweep runs, a line per trial and how far it is, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable

from stemtune._progress import Progress, say
from stemtune.tune.formatting import STATUS_WORDS, better, format_metric, format_settings, format_table
from stemtune.tune.run.trial_state import TrialState


class SweepProgress:
    """Says what each of `total` trials tries and how it ended, and shows how many have.

    Settings that every trial shares (`fixed`) are left out; `before` are the trials from before a restart.
    """

    def __init__(
        self, total: int, metric: str, mode: str, fixed: Iterable[str], before: Iterable[TrialState] = ()
    ) -> None:
        self._metric, self._mode = metric, mode
        self._fixed = {*fixed, "train.epochs"}
        self._best: TrialState | None = None
        ended = [state for state in before if state.status not in ("running", "interrupted")]
        for state in ended:
            self._note_best(state)
        self._progress = Progress(total, "trials", "trial", done=len(ended))

    def started(self, state: TrialState) -> None:
        say(f"trial {state.number} starts: {format_settings(state.knobs, self._fixed)}")

    def reported(self, state: TrialState) -> None:
        value = format_metric(self._metric, state.last)
        self._progress.note(f"trial {state.number} {state.label} epoch {state.epoch}: {value}")

    def ended(self, state: TrialState) -> None:
        self._note_best(state)
        best = f"; best so far trial {self._best.number}, {self._value(self._best)}" if self._best else ""
        say(
            f"trial {state.number} {state.label} {STATUS_WORDS[state.status]} after epoch {state.epoch} and"
            f" {state.wall_s:.0f} s with {self._value(state)}{_because(state)}{best}"
        )
        self._progress.update()

    def _note_best(self, state: TrialState) -> None:
        if state.epoch and (self._best is None or better(state.best, self._best.best, self._mode)):
            self._best = state

    def close(self, finished: bool = True) -> None:
        """Take the bar away, or say that the sweep `finished`."""
        self._progress.close(finished)

    def _value(self, state: TrialState) -> str:
        return format_metric(self._metric, state.best)


def table(trials: Iterable[TrialState], metric: str, mode: str) -> str:
    """Return the trials as a table, best first."""
    rows = [("", "trial", "model", metric.removeprefix("val/"), "epoch", "epochs", "wall", "status")]
    ranked = sorted(trials, key=lambda state: (not state.epoch, state.best if mode == "min" else -state.best))
    for place, state in enumerate(ranked, 1):
        rows.append(
            (
                str(place) if state.epoch else "-",
                str(state.number),
                state.label,
                format_metric(metric, state.best),
                str(state.best_epoch),
                str(state.epoch),
                f"{state.wall_s:.0f} s",
                STATUS_WORDS[state.status] + _because(state),
            )
        )
    return format_table(rows)


def _because(state: TrialState) -> str:
    """Say why a trial failed or ended before its time; that ASHA stopped one its status says."""
    return f": {state.reason}" if state.reason and state.status in ("failed", "finished") else ""
