"""Run as a program: writes a scan frame by frame, as an acquisition does, and says when each line was there.

    python scan_writer.py PATTERNS.npy OUT KIND RATE [PAUSE_AT PAUSE_S] [STOP_AT]

PATTERNS.npy holds (rows, columns, height, width) uint16; OUT is written at RATE frames per second. KIND: npy
(appended), memmap (full size from the start), mib (Merlin, with its .hdr), swmr and closing (HDF5 resized along its
first axis, in SWMR mode or closed after every line), counted (HDF5 of full size with `frames_written`). In the middle
of frame PAUSE_AT of appended kinds it stops for PAUSE_S seconds; at STOP_AT it ends with half a frame written. The
times of the lines go to OUT.times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def main() -> None:
    source, out, kind, rate, pause_at, pause_s, stop_at = (*sys.argv[1:], *("-1", "0", "-1")[len(sys.argv) - 5 :])
    patterns = np.load(source)
    pace = Pace(float(rate), patterns.shape[1], Path(f"{out}.times"))
    if kind in ("npy", "mib"):
        appended(Path(out), kind, patterns, pace, int(pause_at), float(pause_s), int(stop_at))
    elif kind == "memmap":
        mapped = np.lib.format.open_memmap(out, "w+", patterns.dtype, patterns.shape)
        for row, column in pace.over(patterns):
            mapped[row, column] = patterns[row, column]
    else:
        hdf5(out, kind, patterns, pace)


def write_in_background(source: Path, out: Path, kind: str, rate: float, *further: float) -> subprocess.Popen[bytes]:
    """Run this program."""
    return subprocess.Popen([sys.executable, __file__, str(source), str(out), kind, str(rate), *map(str, further)])


class Pace:
    """Frames at a steady rate, whatever the writing takes; notes when each line was done."""

    def __init__(self, rate: float, columns: int, log: Path) -> None:
        self.each, self.columns, self.log, self.times = 1 / rate, columns, log, []  # type: ignore[var-annotated]

    def over(self, patterns: np.ndarray) -> Iterator[tuple[int, int]]:
        begun = time.monotonic()
        for number in range(patterns.shape[0] * patterns.shape[1]):
            time.sleep(max(0.0, begun + number * self.each - time.monotonic()))
            yield divmod(number, self.columns)
            if (number + 1) % self.columns == 0:
                self.times.append(time.time())
                self.log.write_text(json.dumps(self.times))


def appended(
    out: Path, kind: str, patterns: np.ndarray, pace: Pace, pause_at: int, pause_s: float, stop_at: int
) -> None:
    rows, columns, height, width = patterns.shape
    if kind == "mib":
        beside = {"Frames per Trigger (Number)": columns, "Frames in Acquisition (Number)": rows * columns}
        lines = ["HDR,\t", *(f"{name}:\t{value}" for name, value in beside.items()), "End\t"]
        out.with_suffix(".hdr").write_text("\n".join(lines) + "\n")
    with out.open("wb", buffering=0) as file:
        if kind == "npy":
            np.lib.format.write_array_header_1_0(
                file, {"descr": patterns.dtype.str, "fortran_order": False, "shape": patterns.shape}
            )
        for row, column in pace.over(patterns):
            number = row * columns + column
            whole = patterns[row, column].tobytes()
            if kind == "mib":
                whole = merlin_header(number, height, width) + patterns[row, column, ::-1].astype(">u2").tobytes()
            half = len(whole) // 2
            file.write(whole[:half])
            if number == stop_at:
                return
            if number == pause_at:
                time.sleep(pause_s)
            file.write(whole[half:])


def merlin_header(number: int, height: int, width: int) -> bytes:
    words = f"MQ1,{number + 1:06d},00384,01,{width:04d},{height:04d},U16,   1x1,01,2026-11-25T10:00:00.000000Z"
    return f"{words},0.010000,0,0,0,1.0,MQ1A,2026-11-25T10:00:00.000000Z,10000000ns,12,".encode().ljust(384, b" ")


def hdf5(out: str, kind: str, patterns: np.ndarray, pace: Pace) -> None:
    import h5py

    rows, columns, height, width = patterns.shape
    with h5py.File(out, "w", libver="latest") as file:
        length = rows if kind == "counted" else 0
        data = file.create_dataset(
            "scan/data", (length, columns, height, width), "u2", maxshape=(None, columns, height, width)
        )
        if kind == "counted":
            count = file.create_dataset("scan/frames_written", data=0)
        if kind != "closing":
            file.swmr_mode = True
            for row, column in pace.over(patterns):
                if kind == "swmr" and column == 0:
                    data.resize(row + 1, axis=0)
                data[row, column] = patterns[row, column]
                if kind == "counted":
                    data.flush()
                    count[()] = row * columns + column + 1
                    count.flush()
                elif column == columns - 1:
                    data.flush()
    if kind == "closing":
        for row, column in pace.over(patterns):
            if column == columns - 1:
                with h5py.File(out, "r+") as file:
                    file["scan/data"].resize(row + 1, axis=0)
                    file["scan/data"][row] = patterns[row]


if __name__ == "__main__":
    main()
