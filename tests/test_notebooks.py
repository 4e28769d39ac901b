"""Every notebook runs from top to bottom in a process of its own, as `nbdev_test` runs it.

Cells that are flagged as slow or for a GPU (`tst_flags` in settings.ini) are left out.
"""

import os
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds a notebook, with one thread


def run(file: Path) -> subprocess.CompletedProcess:
    """`nbdev_test` of one notebook; its exit code is not 0 if a cell fails."""
    folder = ROOT if ROOT in file.parents else file.parent.parent
    return warm.run(warm.notebook, file, timeout=LIMIT, env=os.environ | {"MPLBACKEND": "agg"}, cwd=folder)


NOTEBOOKS = sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(f.parts))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.relative_to(ROOT / "nbs").with_suffix("").as_posix())
@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 30)
def test_notebook(file):
    done = run(file)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert f"Completed {file}" in done.stdout, "it was not run: " + done.stdout[-2000:]


@pytest.fixture
def project(tmp_path):
    """A function that writes a notebook with the given cells into a project with our settings."""
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "scarcenet").mkdir()

    def write(*cells) -> Path:
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        nbformat.write(content, tmp_path / "nbs" / "one.ipynb")
        return tmp_path / "nbs" / "one.ipynb"

    return write


def test_a_failing_cell_is_a_failure(project):
    good = run(project("assert 1 + 1 == 2"))
    bad = run(project("1 + 1", "assert 1 + 1 == 3"))
    assert good.returncode == 0 and "Completed" in good.stdout
    assert bad.returncode != 0 and "AssertionError" in bad.stdout + bad.stderr


def test_flagged_cells_are_left_out(project):
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    flags = settings["DEFAULT"]["tst_flags"].split()
    assert flags == ["slow", "gpu"]
    directives = [*flags, "eval: false"]
    done = run(project(*(f"#| {directive}\nraise RuntimeError" for directive in directives)))
    assert done.returncode == 0
