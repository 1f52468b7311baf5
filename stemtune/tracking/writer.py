"""One writer for a whole sweep, which outlives an absent server and a killed driver.

Every event is a line of JSON that is appended to a journal beside the sweep's other files; one thread reads the
journal and sends each event to MLflow, then notes how far it got. While the server is away the lines wait; after a
crash the next run sends what was left. Events may be sent twice and mean the same then.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stemtune.config import Scalar
from stemtune.tracking.client import Address, short_reason
from stemtune.tracking.events import RecordsGone, Sender, judge_failure

JOURNAL = "tracking.jsonl"
SENT = "tracking.sent"  # how many bytes of the journal MLflow has
_PATIENCE_S = 5.0  # longest pause between two attempts to reach the server
_AHEAD = 2000  # lines of the journal that are looked at together
_JOINED = 40  # reports of a trial in one call; MLflow takes 1,000 values
_ATTEMPTS = 5  # on an error that is neither a refusal nor an absence


def joined_metrics(lines: list[bytes]) -> list[tuple[bytes, list[bytes]]]:
    """Return every line with the lines that are to be sent with it: itself, or none where an earlier one took it along.

    Reports of one trial that wait together become one call, so that a server that is slower than the trials falls
    behind by a few epochs and no further. A trial's other events keep their place among its reports.
    """
    plan: list[tuple[bytes, list[bytes]]] = []
    takers: dict[str, list[bytes]] = {}
    for line in lines:
        kind, trial = "", ""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(line)
            kind, trial = event["kind"], event.get("trial", "")
        taker = takers.get(trial) if kind == "metrics" else None
        if taker is not None and len(taker) < _JOINED:
            taker.append(line)
            plan.append((line, []))
            continue
        alone = [line]
        takers.pop(trial, None)
        if kind == "metrics":
            takers[trial] = alone
        plan.append((line, alone))
    return plan


def journal_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the events in the journal of the sweep in `folder`; a line that a crash cut short is left out."""
    if (folder / JOURNAL).exists():
        with (folder / JOURNAL).open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and "kind" in event:
                        yield event


def resend(folder: Path) -> None:
    """Have the next tracker of the sweep in `folder` send its journal from the start."""
    (folder / SENT).unlink(missing_ok=True)


class NullTracker:
    """Takes every event of a sweep and keeps none."""

    def sweep(self, params: dict[str, Scalar], tags: dict[str, str], text: str) -> None:
        """Begin or go on with the sweep."""
        self._put("sweep", params=params, tags=tags, text=text)

    def trial(self, trial: str, name: str, params: dict[str, Scalar], tags: dict[str, str]) -> None:
        """Begin or go on with a trial."""
        self._put("trial", trial=trial, name=name, params=params, tags=tags)

    def metrics(self, trial: str, step: int, values: dict[str, float]) -> None:
        """Keep what a trial reported after epoch `step`."""
        self._put("metrics", trial=trial, step=step, values=values)

    def end(self, trial: str, status: str, reason: str, values: dict[str, float], tags: dict[str, str]) -> None:
        """End a trial: `status` is finished, stopped or failed, `reason` says why."""
        self._put("end", trial=trial, status=status, reason=reason, values=values, tags=tags)

    def figures(self, trial: str, step: int, values: dict[str, float], tags: dict[str, str]) -> None:
        """Keep figures of a trial that were measured after its end, and words about it."""
        self._put("figures", trial=trial, step=step, values=values, tags=tags)

    def lost(self, trial: str) -> None:
        """Take back a trial that a crash took from the sweep's own memory, so that it never was."""
        self._put("lost", trial=trial)

    def champion(self, trial: str, folder: str, tags: dict[str, str]) -> None:
        """Keep the model folder of the best trial, a path in the sweep's folder, and register it."""
        self._put("champion", trial=trial, folder=folder, tags=tags)

    def done(self, status: str, values: dict[str, float], tags: dict[str, str]) -> None:
        """End the sweep."""
        self._put("done", status=status, values=values, tags=tags)

    def begun(self) -> set[str]:
        """Return the trials that were recorded so far, by this process or one before it."""
        return set()

    def close(self, wait_s: float = 60.0) -> int:
        """Return how many events could not be sent."""
        return 0

    def _put(self, kind: str, **fields: Any) -> None:
        """Take an event."""


class Tracker(NullTracker):
    """Journals every event in the sweep's `folder` and sends it to MLflow from one thread of its own.

    `name` is the experiment's; `sweep_id` tells this sweep from an earlier one of the same experiment.
    """

    def __init__(self, folder: Path, name: str, sweep_id: str, where: Address) -> None:
        self._journal = folder / JOURNAL
        self._mark = folder / SENT
        self._refused = folder / "tracking.refused.jsonl"
        self.where = where
        self.problem = ""
        self._sender = Sender(where, name, sweep_id, folder)
        self._resent: set[int] = set()  # places in the journal where it was begun again
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._closing = threading.Event()
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        self._end_cut_line()
        self._take_back()
        self._begun: set[str] = set()
        self._recorded: set[tuple[str, int]] = set()
        for event in journal_events(folder):  # what was recorded before: after a crash more than in Tune's snapshot
            self._remember(event["kind"], event.get("trial", ""), event.get("step", 0))
        self._thread = threading.Thread(target=self._work, name="stemtune-tracking", daemon=True)
        self._thread.start()

    def _end_cut_line(self) -> None:
        """End a line that a crash cut short, so that the next one starts on its own."""
        if self._journal.exists():
            content = self._journal.read_bytes()
            if content and not content.endswith(b"\n"):
                with self._journal.open("ab") as file:
                    file.write(b"\n")

    def _take_back(self) -> None:
        """Try once more what an earlier run put aside: its reason may be gone."""
        if not self._refused.exists():
            return
        with self._journal.open("ab") as file:
            for kept in self._refused.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    line = json.loads(kept)["line"]
                    json.loads(line)
                    file.write(line.encode() + b"\n")
        self._refused.unlink()

    def _remember(self, kind: str, trial: str, step: int) -> None:
        if kind == "trial":
            self._begun.add(trial)
        elif kind == "lost":
            self._begun.discard(trial)
        elif kind == "metrics":
            self._recorded.add((trial, step))

    def _put(self, kind: str, **fields: Any) -> None:
        if kind == "metrics" and (fields["trial"], fields["step"]) in self._recorded:
            return  # an epoch that is trained again after a crash
        event = {"kind": kind, "time": int(time.time() * 1000), **fields}
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._lock, self._journal.open("ab") as file:
            file.write(line)
        self._remember(kind, fields.get("trial", ""), fields.get("step", 0))
        self._news.set()

    def begun(self) -> set[str]:
        return set(self._begun)

    def close(self, wait_s: float = 60.0) -> int:
        """Send what is left for at most `wait_s` seconds; return how many events still wait in the journal."""
        deadline = time.monotonic() + wait_s
        while self.waiting() and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.1)
        self._closing.set()
        self._news.set()
        self._thread.join(timeout=5)
        return self.waiting()

    def waiting(self) -> int:
        """Return how many events wait to be sent."""
        if not self._journal.exists():
            return 0
        with self._lock, self._journal.open("rb") as file:
            file.seek(self._sent())
            return sum(1 for line in file if line.endswith(b"\n") and line.strip())

    def _sent(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int(self._mark.read_text())
        return 0

    def _work(self) -> None:
        position = self._sent()
        if position:  # of an earlier run, to a database that may have been replaced since
            with contextlib.suppress(Exception):
                position = position if self._sender.knows_sweep() else 0
        while not self._closing.is_set():
            lines = self._next(position)
            if not lines:
                self._news.wait(timeout=1.0)
                self._news.clear()
                continue
            for line, joined in joined_metrics(lines):
                try:
                    if joined and line.strip() and not self._send(joined):
                        return
                except RecordsGone:
                    if position in self._resent:  # a journal without its beginning
                        self._put_aside(line, "its trial or sweep was never begun")
                    else:
                        self._resent.add(position)
                        position = 0
                        break
                position += len(line)
                self._note(position)

    def _next(self, position: int) -> list[bytes]:
        """Return the next whole lines of the journal, if there are some."""
        with contextlib.suppress(OSError), self._lock, self._journal.open("rb") as file:
            file.seek(position)
            return [line for line in itertools.islice(file, _AHEAD) if line.endswith(b"\n")]
        return []

    def _note(self, position: int) -> None:
        part = self._mark.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(str(position))
            part.replace(self._mark)

    def _send(self, lines: list[bytes]) -> bool:
        """Send an event, or reports joined to one, however long it takes; return False if the tracker closes first."""
        try:
            first, *more = (json.loads(line) for line in lines)
        except ValueError:
            self._put_aside(lines[0], "a line that a crash cut short")
            return True
        attempt = 0
        while not self._closing.is_set():
            try:
                self._sender.send({**first, "more": more} if more else first)
            except RecordsGone:
                self._sender.forget()
                raise
            except Exception as problem:
                attempt += 1
                self.problem = f"{type(problem).__name__}: {short_reason(problem)}"
                verdict = judge_failure(problem)
                if verdict == "refused" or (verdict == "unclear" and attempt >= _ATTEMPTS):
                    if more:  # only one of them may be at fault
                        return all(self._send([line]) for line in lines)
                    self._put_aside(lines[0], self.problem)
                    return True
                self._sender.forget()
                self._closing.wait(min(_PATIENCE_S, 0.5 * 2 ** min(attempt, 5)))
            else:
                self.problem = ""
                return True
        return False

    def _put_aside(self, line: bytes, reason: str) -> None:
        with contextlib.suppress(OSError), self._refused.open("a") as file:
            file.write(json.dumps({"reason": reason, "line": line.decode(errors="replace").strip()}) + "\n")
