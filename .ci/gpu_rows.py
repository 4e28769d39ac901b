"""What to measure when a GPU is at hand for minutes: `python .ci/gpu_rows.py OUT [--rows 1 2 3] [--data ANIMALS]`.

1 tests/test_gpu.py, as written.
2 `scarcenet bench` of the paper's network, over batches, modes of torch.compile and the order in memory, the most
  wanted first, and what the paper's 5-label training on AP-10K would take at these rates.
3 the paper's network from scratch on photographs: ScarceNet, and the supervised baseline with as many steps, with 25
  and with 5 labels a species, side by side.

Each has a file or folder of its own in OUT. What is there is not measured again, and trainings go on from their last
epoch.
`--small` tries all of it on a CPU, with a tiny network and the embedded animals.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from scarcenet.config import PRESETS, Config, read_config
from scarcenet.evaluate import format_table
from scarcenet.experiments.ablation import scale_repeats
from scarcenet.experiments.baseline import matched_supervised, train_files
from scarcenet.run.folder import read_metrics
from scarcenet.run.load import load_run_data
from scarcenet.utils.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
GRAPHS = "reduce-overhead"  # the mode of torch.compile that makes CUDA graphs
PAPER = {"supervised step": 210 * 250, "pseudo-labels": 9122, "ScarceNet step": 150 * 9122}  # images of its training


def run(words: list, log: Path, limit: float) -> bool:
    """Run a command with its output in `log`; whether it ended well within `limit` seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as stream:
        try:
            done = subprocess.run(
                list(map(str, words)), stdout=stream, stderr=subprocess.STDOUT, timeout=limit, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def row_1(out: Path, limit: float) -> None:
    """The tests that need a GPU."""
    passed = run([sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"], out / "tests.log", limit)
    last = ["no output", *(out / "tests.log").read_text().strip().splitlines()][-1]
    print(f"row 1: {'ended well' if passed else 'FAILED'}: {last}")


def row_2(out: Path, limit: float, small: bool) -> None:
    """Rates for each batch, mode of torch.compile and order in memory, as many as fit into `limit` seconds."""
    network, size, batches = ("hrnet_tiny", 32, (4, 8)) if small else ("mbhrnet_w32", 256, (32, 128, 64))
    settings = [(batch, mode, False) for batch in batches for mode in ("", GRAPHS)]
    settings += [(batches[0], mode, True) for mode in ("", GRAPHS)] + [(batches[0], "default", False)]
    rows, end = {}, time.monotonic() + limit
    for batch, mode, channels_last in settings:
        title = f"batch {batch}, {mode or 'eager'}{', channels last' if channels_last else ''}"
        name = f"bench-{network}-{title.replace(', ', '-').replace(' ', '-')}"
        file, began = out / f"{name}.json", time.monotonic()
        words = f"bench --network {network} --size {size} --batch {batch} --views 5 --seconds {limit / 20:.0f}".split()
        words += (["--compile", mode] if mode else []) + (["--channels-last"] if channels_last else [])
        if not file.exists():
            command = [sys.executable, "-m", "scarcenet", *words, "--json", file]
            run(command, out / f"{name}.log", max(0.1, end - began))
            if file.exists():
                write_json(file, read_json(file) | {"seconds in all": time.monotonic() - began})
        if not file.exists():
            print(f"row 2: {name}: {'failed, see its .log' if time.monotonic() < end else 'no time is left'}")
            continue
        found = read_json(file)
        rate = {part: row["images/s"] for part, row in found["rows"].items()}
        rows[title] = {
            "steps' images/s": f"{rate['ScarceNet step']:.0f}",
            "network's share": f"{found['efficiency']['ScarceNet step']:.2f}",
            "MiB": found["peak_memory_mb"],
            "AP-10K, h": f"{sum(images / rate[part] for part, images in PAPER.items()) / 3600:.2f}",
            "s in all": f"{found['seconds in all']:.0f}",  # compiling included
        }
    print(
        format_table(rows, ("steps' images/s", "network's share", "MiB", "AP-10K, h", "s in all"), f"row 2: {network}")
    )


def settings(data: str, labels: int, small: bool) -> Config:
    """The paper's network from scratch on photographs."""
    if small:
        tiny = dict(network="hrnet_tiny", size=32, batch=16, supervised_batch=16, views=1, supervised_repeat=1)
        return replace(PRESETS["demo"], backbone="", labels=labels, epochs=2, labelled_repeat=1, **tiny)
    network = dict(network="mbhrnet_w32", backbone="", size=256, sigma=2.0, batch=32, supervised_batch=32)
    return replace(PRESETS["animals"], data=data, labels=labels, epochs=40, supervised_epochs=30, **network)


def row_3(out: Path, limit: float, data: str, small: bool) -> None:
    """Four trainings at once, ended after `limit` seconds; each goes on next time after its last whole epoch."""
    end = time.monotonic() + limit
    works, most = {}, None
    for labels in (25, 5) if not small else (2, 1):
        config = settings(data, labels, small)
        loaded = load_run_data(config, out)
        most = most or config
        config = scale_repeats(config, most, loaded.train)  # stages as long as with the most labels
        longer = matched_supervised(config, int(loaded.data.labels.labelled.sum()), len(loaded.train))
        works |= {f"scarcenet-{labels}": config, f"supervised-{labels}": longer}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(works)))
    with shared_gpu():
        processes = {}
        for name, config in works.items():
            if not (out / name / "summary.json").exists():
                (out / name).mkdir(parents=True, exist_ok=True)
                write_json(out / f"{name}.json", asdict(config))
                words = [sys.executable, __file__, out, "--one", name]
                processes[name] = subprocess.Popen(list(map(str, words)), stderr=open(out / f"{name}.log", "w"))
        for process in processes.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()  # the epoch's state is written
                process.wait()
    for name in works:
        file, metrics = out / name / "summary.json", out / name / "metrics.csv"
        if not file.exists():
            at = (read_metrics(metrics) if metrics.exists() else [{}])[-1]
            place = f"stage {at['stage']}, epoch {at['epoch']} of {at['epochs']}" if at else "before the first epoch"
            print(f"row 3: {name} is not done ({place}): the same command goes on with it")
            continue
        networks = read_json(file)["networks"]
        reached = {network: f"{splits['test']['overall']['AP']:.3f}" for network, splits in networks.items()}
        print(f"row 3: {name}: AP on test {reached}")


@contextmanager
def shared_gpu() -> Iterator[None]:
    """NVIDIA's MPS during the block, if it is there: processes share the GPU without taking turns."""
    if mps := shutil.which("nvidia-cuda-mps-control"):
        subprocess.run([mps, "-d"], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        if mps:
            subprocess.run([mps], input="quit\n", text=True, stderr=subprocess.DEVNULL)


def train_one(out: Path, name: str) -> None:
    """One training of row 3, in this process."""
    train_files(read_config(out / f"{name}.json"), out / name, out, resume=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", default="", help="folder of photographs in COCO's form, for row 3")
    parser.add_argument("--minutes", type=float, nargs=3, default=(1, 3, 8), help="for each row, at most")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = given.out.absolute()
    if given.one:
        train_one(out, given.one)
        sys.exit()
    out.mkdir(parents=True, exist_ok=True)
    limits = [60 * minutes for minutes in given.minutes]
    for number in given.rows:
        if number == 1:
            row_1(out, limits[0])
        elif number == 2:
            row_2(out, limits[1], given.small)
        elif given.data or given.small:
            row_3(out / "row-3", limits[2], given.data, given.small)
        else:
            print("row 3: needs --data")
