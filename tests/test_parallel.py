"""Items that another thread makes ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stemtune._parallel import prefetch


def test_items_are_made_ahead_in_order_and_no_further() -> None:
    made: list[int] = []
    there = threading.Semaphore(0)

    def source() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            there.release()
            yield number

    items = prefetch(source(), 2)
    assert next(items) == 0
    for _ in range(3):
        assert there.acquire(timeout=10)
    assert made == [0, 1, 2]
    assert list(items) == [1, 2, 3, 4, 5]
    assert list(prefetch([])) == []


def test_an_error_comes_in_its_place_and_a_reader_that_stops_ends_the_thread() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
