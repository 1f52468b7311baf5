"""Fixtures that every test may use: the shared data, and a bound on torch's threads."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

QUICK = (
    *("test_architecture.py", "test_cli.py", "test_config.py", "test_docs.py", "test_files.py", "test_progress.py"),
    *("crystal/test_rotations.py", "crystal/test_symmetry.py", "crystal/test_variants.py", "crystal_map/"),
    *("diffraction/test_geometry.py", "diffraction/test_detector.py"),
    *("scan/test_beam_center.py", "scan/test_readers.py"),
    *("dataset/test_augment.py", "dataset/test_labels.py", "dataset/test_selection.py", "dataset/test_store.py"),
    *("learning/test_metrics.py", "tune/test_space.py", "tune/test_trial_state.py"),
    *("analysis/test_boundaries.py", "analysis/test_evaluate.py"),
)
"""Files and folders of the quick tier, `make quick`: one look at every room, under 90 seconds on two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        if place.startswith(QUICK) and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "README.md").is_file():
        pytest.skip(f"the shared data is not at {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Let Ctrl-C be heard: what a script starts in the background ignores it, and so would the tests of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """Keep torch to two threads, so that tests do not slow each other down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)
