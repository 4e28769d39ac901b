"""Shared by all tests: the real data, the official code's numbers, a small zoo; one thread a worker, timing alone."""

import fcntl
import os
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: each worker has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from scarcenet.zoo.dataset import write_zoo

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Tests that measure time come last."""
    items.sort(key=lambda item: item.get_closest_marker("timing") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that measures time runs alone: no other test or fixture runs until it ends."""
    run = getattr(item.config, "workerinput", {}).get("testrunuid", os.getpid())
    timing = item.get_closest_marker("timing") is not None
    with open(Path(tempfile.gettempdir()) / f"scarcenet-tests-{run}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if timing else fcntl.LOCK_SH)
        return (yield)


def folder_or_skip(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; {variable} says where it is")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real images."""
    return folder_or_skip("SCARCENET_DATA", "../shared/data")


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder with what the official code computed."""
    return folder_or_skip("SCARCENET_PARITY", "../shared/parity")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """24, 6 and 6 images, three of each species in the first."""
    return write_zoo(tmp_path_factory.mktemp("sets") / "zoo", train=24, val=6, test=6, seed=0)
