"""Processes that begin with everything imported: copies of one that has done nothing else.

Importing takes some five seconds of a core, and the tests start two hundred processes.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_COPIES = multiprocessing.get_context("forkserver")
_COPIES.set_forkserver_preload(
    [
        "IPython.core.interactiveshell",
        "matplotlib_inline.backend_inline",
        "nbdev.test",
        "pandas",
        "pycocotools.cocoeval",
        "pytest",
        "timm",
        "scarcenet.cli.main",
        "scarcenet.experiments.baseline",
        "scarcenet.ledger.explorer",
        "scarcenet.run.train_run",
    ]
)


class Warm:
    """`work(*args)` in a process of its own, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, work: Callable, *args: object, env: Mapping[str, str] = os.environ, cwd: Path | None = None):
        self.texts = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        names = [file.name for file in self.texts]
        self.process = _COPIES.Process(target=_begin, args=(dict(env), cwd or Path.cwd(), names, work, args))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, to stdout and to stderr, when it has ended."""
        self.wait(timeout)
        return tuple(Path(file.name).read_text(encoding="utf-8") for file in self.texts)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _begin(env: dict[str, str], cwd: Path, names: Sequence[str], work: Callable, args: Sequence) -> None:
    """Be the process."""
    gc.freeze()  # what was imported is not looked through, nor copied
    for number, name in enumerate(names, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        work(*args)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


def run(work: Callable, *args: object, timeout: float, **where: object) -> subprocess.CompletedProcess:
    """The same as `subprocess.run`: it waits, and ends what takes too long."""
    process = Warm(work, *args, **where)
    try:
        out, error = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess([work, *args], process.returncode, out, error)


# ---- work


def command(words: Sequence) -> None:
    """`scarcenet` with these words."""
    from scarcenet.cli.main import main

    sys.argv = ["scarcenet", *map(str, words)]
    sys.exit(main())


def notebook(file: Path) -> None:
    """`nbdev_test` of one notebook."""
    from nbdev.test import nbdev_test

    nbdev_test(path=str(file), flags="", n_workers=0, do_print=True)
