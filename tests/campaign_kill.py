"""A small run of everything, killed at random moments and resumed until it ends: bit for bit the uninterrupted one.

`python tests/campaign_kill.py --kills 200` counts; the suite has ten kills (test_kill.py).
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from warm import Warm, command

from scarcenet.data.sources import find_images
from scarcenet.utils.files import read_json
from scarcenet.utils.video import open_mp4

TINY = "demo --network hrnet_tiny --size 32 --device cpu --labels 1 --views 2 --batch 16 --supervised-batch 8".split()
TINY += "--supervised-repeat 1 --labelled-repeat 1 --epochs 2 --supervised-epochs 2".split()
TINY += ["--precision", "float32", "--backbone"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TIMES = {"seconds", "peak_rss_mb"}  # what no two runs have in common


def commands(place: Path) -> dict[str, list]:
    """The work, one command after the other, and the file that is there when one is done."""
    settings = [*TINY, "", "--data", place / "set"]
    grid = ["--counts", "1", "--seeds", "0", "--methods", "supervised", "scarcenet"]
    return {
        "run/index.html": ["train", *settings, "--out", place / "run"],
        "report.html": ["report", place / "run", "--out", place / "report.html", "--animals", "4"],
        "study/study.csv": ["study", *settings, *grid, "--out", place / "study"],
        "poses.csv": ["predict", place / "run", place / "film.mp4", "--device", "cpu", "--out", place / "poses.csv"],
    }


def film(folder: Path, file: Path) -> None:
    """A video of the set's images."""
    import cv2

    from scarcenet.data.images import read_image

    with open_mp4(file, 25, (96, 96)) as add:
        for image in find_images(folder) * 8:
            add(cv2.resize(read_image(image), (96, 96)))


def start(words: list, resume: bool = False) -> Warm:
    """Start a command."""
    return Warm(command, [*words, *(["--resume"] if resume else [])], env=ENV)


def is_begun(place: Path, name: str) -> bool:
    """Whether a command has left something to resume."""
    if name == "poses.csv":
        return (place / ".poses.csv.rows").exists()
    return name != "report.html" and (place / name).with_name("config.json").exists()


def content(place: Path) -> dict[str, object]:
    """All that the work has left, by name; without times."""
    found: dict[str, object] = {}
    for file in sorted(f for f in place.rglob("*") if f.is_file()):
        name = file.relative_to(place).as_posix()
        if name.startswith("set/") or name == "film.mp4":
            continue
        if file.suffix == ".csv" and file.parent != place:
            with open(file, newline="") as rows:
                found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(rows)]
        elif file.name == "summary.json":
            found[name] = {k: v for k, v in read_json(file).items() if k not in TIMES}
        elif file.name == "config.json":
            found[name] = read_json(file) | {"data": ""}
        elif file.suffix in (".html", ".png"):
            found[name] = file.stat().st_size > 0  # they show times
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def whole(place: Path, name: str) -> list[str]:
    """Files under a final name that cannot be read."""
    import pyarrow.parquet as pq
    from safetensors import safe_open

    broken = []
    readers = {".json": read_json, ".parquet": pq.read_table, ".safetensors": lambda f: safe_open(f, "pt")}
    for file in place.rglob("*"):
        if file.suffix in readers and ".part" not in str(file):
            try:
                readers[file.suffix](file)
            except Exception as error:
                broken.append(f"{file.relative_to(place)}: {error}")
    return broken


def campaign(folder: Path, kills: int, seed: int = 0, how: int = signal.SIGKILL, verbose: bool = False) -> dict:
    """Kill the work `kills` times; returns counts, and what went wrong."""
    rng, first = random.Random(seed), folder / "first"
    first.mkdir(parents=True)
    zoo = ["zoo", "--out", first / "set", "--train", "16", "--val", "4", "--test", "4"]
    assert start(zoo).wait() == 0
    film(first / "set" / "data", first / "film.mp4")
    seconds, wrong = {}, []
    for name, words in commands(first).items():
        began, process = time.monotonic(), start(words)
        _, error = process.communicate()
        assert process.returncode == 0, error
        seconds[name] = time.monotonic() - began
    expected, killed, runs = content(first), 0, 0
    while killed < kills:
        place, runs = folder / f"run-{runs}", runs + 1
        place.mkdir()
        shutil.copytree(first / "set", place / "set")
        shutil.copy(first / "film.mp4", place)
        before, count = killed, 0
        for name, words in commands(place).items():
            while True:
                begun = is_begun(place, name)
                if (place / name).exists() and not begun:  # killed when all was done
                    break
                process = start(words, begun)
                try:  # after some kills, let it end
                    limit = rng.uniform(0.2, 1.1) * seconds[name] if count < 8 and killed < kills else 600
                    _, error = process.communicate(timeout=limit)
                except subprocess.TimeoutExpired:
                    process.send_signal(how)
                    _, error = process.communicate()
                    killed, count = killed + 1, count + 1
                    wrong += [f"run {runs}, {name}: {b}" for b in whole(place, name)]
                    expected_codes = (0, 143, -how)  # the last before anything is begun
                    if how == signal.SIGTERM and process.returncode not in expected_codes:
                        wrong.append(f"run {runs}, {name}: code {process.returncode}: {error[-300:]}")
                    if process.returncode in (-how, 143):
                        continue
                if process.returncode:
                    wrong.append(f"run {runs}, {name}: {error[-500:]}")
                break
        found = content(place)
        different = [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]
        wrong += [f"run {runs}: {name} differs" for name in different]
        left = [f.name for f in place.rglob(".*") if "set" not in f.relative_to(place).parts]
        wrong += [f"run {runs}: left {name}" for name in left]
        if verbose:
            print(f"run {runs}: {killed - before} kills; {len(wrong)} faults so far", flush=True)
        if not wrong:
            shutil.rmtree(place)
    return {"kills": killed, "runs": runs, "files": len(expected), "wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigterm", action="store_true", help="as a batch system does, instead of SIGKILL")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        how = signal.SIGTERM if chosen.sigterm else signal.SIGKILL
        result = campaign(Path(temporary) / "kills", chosen.kills, chosen.seed, how, verbose=True)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["wrong"]))
