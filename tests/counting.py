"""How often each call of MLflow's client is made."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stemtune.tracking import events


@contextlib.contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Yield how often each call of MLflow's client is made while the block runs."""
    calls: Counter[str] = Counter()
    make = events.client

    class Counted:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            calls[name] += 1
            return getattr(self._inner, name)

    events.client = lambda where: Counted(make(where))  # type: ignore[assignment, return-value]
    try:
        yield calls
    finally:
        events.client = make
