"""Shared by all tests: where the real data and the original's numbers are, and one small zoo for the whole session."""
import os
from pathlib import Path

import pytest

from scarcenet.zoo.dataset import write_zoo

ROOT = Path(__file__).resolve().parents[1]


def folder_or_skip(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; {variable} says where it is")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real pictures."""
    return folder_or_skip("SCARCENET_DATA", "../shared/data")


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder with what the original computed."""
    return folder_or_skip("SCARCENET_PARITY", "../shared/parity")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """24, 6 and 6 pictures, three of each species in the first."""
    return write_zoo(tmp_path_factory.mktemp("sets") / "zoo", train=24, val=6, test=6, seed=0)
