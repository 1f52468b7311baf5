"""Commands that make and show data: simulate, ingest, inspect."""

from __future__ import annotations

import argparse
from typing import Any

from stemtune.cli.parsing import (
    Command,
    Parser,
    command,
    over_ray,
    pair,
    positive,
    ray_option,
    scan_arguments,
    scan_options,
    seed,
    settings_options,
)
from stemtune.config import Config, SimulateConfig, parse_assignments
from stemtune.errors import UserError


def _simulate_config(options: argparse.Namespace) -> SimulateConfig:
    given = {key: value for key, value in vars(options).items() if key.startswith("simulate.") and value is not None}
    for key, value in parse_assignments(options.set).items():
        if not key.startswith("simulate."):
            raise UserError(f"--set {key}: a simulation has no other settings than those called simulate.*")
        given[key] = value
    if options.dynamical and given.setdefault("simulate.physics", "bloch") != "bloch":
        raise UserError(f"--dynamical asks for Bloch waves, but simulate.physics is {given['simulate.physics']!r}")
    return Config.from_flat(given).simulate


@command(
    "simulated patterns with exact orientations; after an interrupt the same command goes on",
    "stemtune simulate linio2 --out linio2.h5 --patterns 20000 --dynamical --thickness 20:80 --precession 0.5",
)
def simulate(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        settings = _simulate_config(options)
        shape = pair(options.scan, "--scan") if options.scan else None
        from stemtune.dataset import simulate

        how: dict[str, Any] = {name: getattr(options, name) for name in ("seed", "workers", "device", "restart")}
        if options.ray is not None:
            if shape and options.device == "cuda":
                raise UserError("--ray spreads a --scan over CPUs only; leave out --device cuda")
            how["device"] = "cuda" if options.device == "cuda" else "cpu"
            how["spread"] = over_ray(options, how["device"])
        if shape:
            simulate.simulate_polycrystal(options.cif, options.out, shape, options.grains, settings, **how)
        else:
            simulate.simulate_store(options.cif, options.out, options.patterns, settings, **how)
        from stemtune.cli.inspect import describe

        print(describe(options.out))

    parser.option(
        "cif",
        "the phase: a CIF file, or `linio2`, which ships with stemtune; atoms without displacement parameters"
        " (Debye-Waller factors) get a mean square of 0.005 Å²",
        "CIF",
    )
    parser.option("--out", "the store to write", "STORE", required=True)
    parser.option("--patterns", "how many; default 10000", "N", type=positive, default=10_000)
    parser.option("--scan", "instead a scan of a polycrystal with known truth", "NY,NX")
    parser.option("--grains", "grains of --scan; default 12", "N", type=positive, default=12)
    parser.option("--seed", "same seed, same patterns; default 0", type=seed, default=0)
    parser.option("--workers", "processes on a CPU; default 1", "N", type=positive, default=1)
    ray_option(parser)
    parser.flag("--dynamical", "Bloch waves; the same as --physics bloch")
    parser.option(
        "--device",
        "where to simulate; default auto, a GPU if there is one (its random numbers are its own), with --ray CPUs",
        choices=("auto", "cpu", "cuda"),
        default="auto",
    )
    parser.flag("--restart", "begin anew instead of going on with the unfinished STORE.part")
    parser.option("--set", "any setting simulate.*", "KEY=VALUE", action="append", default=[])
    title = "the microscope (low:high is drawn from anew for every pattern)"
    settings_options(parser, title, "simulate", SimulateConfig)
    return call


@command(
    "a measured scan, calibrated and centred, into a store",
    "stemtune ingest scan.hspy --out scan.h5 --kv 300",
)
def ingest(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.cli.inspect import describe
        from stemtune.dataset.ingest import ingest

        ingest(options.scan, options.out, **scan_arguments(options))
        print(describe(options.out))

    parser.option("scan", "the file: .hspy, .zspy, .mib, .blo, .dm4, .tvips, .h5, .npy, ...", "SCAN")
    parser.option("--out", "the store to write", "STORE", required=True)
    scan_options(parser)
    return call


@command(
    "what a scan, store, map, model or search space holds",
    "stemtune inspect scan.h5 --png scan.png",
)
def inspect(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.cli.inspect import describe

        print(describe(options.path))
        if options.png:
            from stemtune.plot.calibration import calibration_picture
            from stemtune.plot.patterns import contact_sheet

            contact_sheet(options.path, options.png)
            print(f"contact sheet: {options.png}")
            second = calibration_picture(options.path, options.png)
            if second:
                print(f"calibration: {second}")

    parser.option("path", metavar="PATH")
    parser.option(
        "--png", "draw a contact sheet of patterns; of a measured store also its calibration, FILE-calibration", "FILE"
    )
    return call
