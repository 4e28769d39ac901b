"""A full disk, a quota that is used up, a closed folder: injected into each writer, below its library."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# the system's calls, which fail with the number in FAULT for whatever lies in FAULT_FOLDER
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
static int fault(void) { const char *f = getenv("FAULT"); return f ? atoi(f) : 0; }
static int inside(const char *path) {
  const char *folder = getenv("FAULT_FOLDER");
  return folder && path && !strncmp(path, folder, strlen(folder));
}
static int fd_inside(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return inside(path);
}
static int closed(const char *path, int flags) {  /* a folder in which nothing may be made or changed */
  int f = fault();
  return (f == EROFS || f == EACCES) && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && inside(path) ? f : 0;
}
static int full(int fd) { int f = fault(); return (f == ENOSPC || f == EDQUOT) && fd_inside(fd) ? f : 0; }
#define OPEN(name) int name(const char *path, int flags, ...) { \
  va_list a; va_start(a, flags); mode_t mode = va_arg(a, mode_t); va_end(a); \
  int f = closed(path, flags); if (f) { errno = f; return -1; } \
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); return real(path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int d, const char *path, int flags, ...) { \
  va_list a; va_start(a, flags); mode_t mode = va_arg(a, mode_t); va_end(a); \
  int f = closed(path, flags); if (f) { errno = f; return -1; } \
  int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name); return real(d, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)
int mkdir(const char *path, mode_t mode) {
  int f = closed(path, O_CREAT); if (f) { errno = f; return -1; }
  int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir"); return real(path, mode); }
ssize_t write(int fd, const void *b, size_t n) {
  int f = full(fd); if (f) { errno = f; return -1; }
  ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write"); return real(fd, b, n); }
ssize_t writev(int fd, const struct iovec *b, int n) {
  int f = full(fd); if (f) { errno = f; return -1; }
  ssize_t (*real)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "writev"); return real(fd, b, n); }
#define PWRITE(name) ssize_t name(int fd, const void *b, size_t n, off_t o) { \
  int f = full(fd); if (f) { errno = f; return -1; } \
  ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, #name); return real(fd, b, n, o); }
PWRITE(pwrite) PWRITE(pwrite64)
"""

PROGRAM = r"""
import copy, errno, json, os, sys, warnings
from pathlib import Path

import numpy as np
import torch

from scarcenet.checkpoint import State, adam, save_checkpoint
from scarcenet.config import Config
from scarcenet.data.coco import find_split, read_coco
from scarcenet.data.image_folder import ImageFolder, new_folder
from scarcenet.data.loader import load_crops
from scarcenet.data.values import Findings
from scarcenet.models.build import build_network
from scarcenet.models.weights import save_weights
from scarcenet.predict.frames import Source
from scarcenet.predict.poses import PoseTable, row_type
from scarcenet.predict.save import SAVERS, save_table
from scarcenet.record import make_table, write_table
from scarcenet.run.figures import save_figure, write_page
from scarcenet.run.folder import append_metrics, open_run
from scarcenet.schema import AP10K
from scarcenet.utils.files import write_json
from scarcenet.utils.lock import locked
from scarcenet.utils.video import open_mp4, video_codec
import matplotlib.pyplot as plt

warnings.simplefilter("ignore")
zoo, place, faults = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
model = build_network(Config(network="hrnet_tiny", backbone=""), 17)
state = State(model, copy.deepcopy(model), adam(model, 1e-3))
poses = read_coco(*find_split(zoo, "val"))
film = Source(str(place / "film.mp4"), "film", True, 400, 25.0)
table = PoseTable(17)
rows = np.zeros(400, row_type(17))
rows["item"] = rows["frame"] = np.arange(400)
rows["id"], rows["size"] = 1, 96
table.append(rows)


def figure(file):
    save_figure(plt.figure(), file)


def video(codec):
    def write(file):
        with open_mp4(file, 25, (96, 64), codec) as add:
            for _ in range(60):
                add(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))

    return write


def lock(file):
    with locked(file):
        file.with_name("held").touch()


def images(out):
    with new_folder(out) as part:
        ImageFolder(part, Findings()).add(np.zeros((8, 8, 3), np.uint8), "a.png")


def metrics(file):
    append_metrics(file, {"stage": "supervised", "epoch": 1, "loss": 0.5})


def page(home):
    return lambda file: write_page(home, {})


WRITERS = {
    "checkpoint.safetensors": lambda f: save_checkpoint(f, state),
    "student.safetensors": lambda f: save_weights(model, f),
    "metrics.csv": metrics,
    "epoch-0001.parquet": lambda f: write_table(f, make_table(dict(x=np.arange(9.0)))),
    "a.json": lambda f: write_json(f, [1]),
    "run/config.json": lambda f: open_run(f.parent, Config()),
    "figure.png": figure,
    "index.html": page(place),
    "set": images,
    "cache": lambda f: load_crops(poses.instances, 32, limit_mb=0, cache=f),
    ".lock": lock,
    ".poses.csv.rows": lambda f: PoseTable(17, f).append(rows.copy()),
    **{f"poses{ending}": lambda f: save_table(f, table, AP10K, [film]) for ending in SAVERS},
    "film-mp4v.mp4": video("mp4v"),
    **({"film-h264.mp4": video(video_codec())} if video_codec() != "mp4v" else {}),
}
again = {"set", "run/config.json", "cache", ".poses.csv.rows"}  # these are not written twice


def faulty(fault, folder):
    # what is wrong with the writers when each fails with this number
    wrong = []
    for name, write in WRITERS.items():
        home = folder / name.replace("/", "-").strip(".")
        home.mkdir(parents=True)
        file = home / name
        if name == "index.html":
            write_json(home / "summary.json", dict(seed=0, device="", seconds=0, peak_rss_mb=0))
            write = page(home)
        if name not in again and name != ".lock":
            file.parent.mkdir(exist_ok=True)
            write(file)
        before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
        os.environ["FAULT"] = str(fault)
        try:
            write(file)
            wrong.append(f"{name}: no error")
        except (OSError, ValueError) as e:
            line = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
            good = os.strerror(fault) in line or "disk" in line
            if not good or str(home) not in line and name not in line or "\n" in line or ".part" in line:
                wrong.append(f"{name}: {line!r}")
        except BaseException as e:
            wrong.append(f"{name}: {e!r}")
        finally:
            del os.environ["FAULT"]
        after = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
        if after != before:
            wrong.append(f"{name}: changed {sorted(str(p) for p in after.keys() ^ before.keys())}")
        write(file)  # there is room again
        if [p for p in home.rglob("*.part")]:
            wrong.append(f"{name}: left something")
    return wrong


print(json.dumps({fault: faulty(fault, place / str(fault)) for fault in faults}))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library to be loaded before the system's."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    if not sys.platform.startswith("linux"):
        pytest.skip("LD_PRELOAD is Linux'")
    try:
        words = ["cc", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
        subprocess.run(words, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return folder / "shim.so"


FAULTS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES"]


@pytest.fixture(scope="module")
def wrong(zoo, shim, tmp_path_factory):
    """What went wrong in a process that has met every fault, by the fault's number."""
    place = tmp_path_factory.mktemp("faults")
    env = os.environ | {"LD_PRELOAD": str(shim), "FAULT_FOLDER": str(place), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, zoo, place, *(getattr(errno, name) for name in FAULTS)]
    done = subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_writers(wrong, name):
    """One line that names the file; what was there is unchanged; the next attempt, with room, succeeds."""
    assert wrong[str(getattr(errno, name))] == []


def test_permissions(tmp_path):
    """Files have the umask's, whichever library writes them."""
    import torch

    from scarcenet.models.weights import write_tensors

    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert Path(tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "é" * 125 + ".json"])
def test_names_as_long_as_the_disk_allows(name, tmp_path):
    """The temporary name is not longer; two long names that begin alike do not meet."""
    from scarcenet.utils.files import atomic, write_json

    with atomic(tmp_path / name) as part, atomic(tmp_path / name.replace(".json", ".jsom")) as other:
        part.write_text("1")
        other.write_text("2")
    assert (tmp_path / name).read_text() == "1" and len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path / name, 3)
    assert (tmp_path / name).read_text() == "3"
    with pytest.raises(OSError, match="File name too long"):
        write_json(tmp_path / f"a{name}", 3)
