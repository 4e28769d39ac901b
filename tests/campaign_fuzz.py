"""Damaged and hostile files for everything that reads: no traceback, no hang, no memory, no way out, no code run.

`python tests/campaign_fuzz.py --inputs 100000` counts; the suite has a few hundred (test_fuzz.py). An input is told by
its target and number: `--target coco --first 17 --inputs 1` makes it again, alone.
"""

import argparse
import copy
import csv
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

SECONDS = 5.0  # of the processor, after which an input counts as a hang
MEMORY = 2 << 30  # bytes beyond what the reader's process has before its first input
QUIET = 120.0  # s without a sign from that process, after which it is ended
RUN = "demo --network hrnet_tiny --size 32 --device cpu --labels 1 --views 2 --batch 8 --supervised-batch 8".split()
RUN += "--supervised-repeat 1 --labelled-repeat 1 --epochs 1 --supervised-epochs 1 --backbone".split()

# ---- what is odd

OUTSIDE = ["../../outside/secret.png", "../outside/secret.png", "{outside}/secret.png", "..\\..\\outside\\secret.png"]
ODD: list[Any] = [None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 10**30, 2**31]
ODD += [2**63, -(2**63), 2**64, 10**5, "", " ", "0", "7", "1e999", "nan", "\0", "\ud800", "\u0661", "x" * 5000, "NULL"]
ODD += ["<script>alert(1)</script>", "=1+1", "@x", "a\nb", "C:\\a.png", "con", ".", "..", "/", "a/../b.png", "9" * 5000]
ODD += [[], {}, [[]], [None], [1], ["a"], [1, 2, 3, 4], {"id": 1}, {"a": {"b": []}}, [0] * 1000, [[1, 2]] * 3, *OUTSIDE]
DEEP = [50, 400, 900, 10_000]


class Words(NamedTuple):
    """What an input is made with."""

    rng: random.Random
    outside: str

    def odd(self) -> Any:
        """One odd value."""
        if self.rng.random() < 0.05:
            value: Any = 1
            for _ in range(self.rng.choice(DEEP[:3])):
                value = [value] if self.rng.random() < 0.5 else {"a": value}
            return value
        value = copy.deepcopy(self.rng.choice(ODD))
        return value.format(outside=self.outside) if isinstance(value, str) else value


# ---- how a file is damaged


def damage_bytes(data: bytes, words: Words) -> bytes:
    """Bits flipped, parts cut out, doubled, overwritten; the end missing."""
    rng, found = words.rng, bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not found:
            break
        a = rng.randrange(len(found))
        if rng.random() < 0.3:  # where headers are
            a = rng.randrange(min(len(found), 512))
        b = min(len(found), a + rng.choice((1, 2, 4, 8, 64, 1000)))
        how = rng.randrange(7)
        if how == 0:
            found[a] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[a:b] = bytes(rng.choice((0, 255, 127, rng.randrange(256))) for _ in range(b - a))
        elif how == 2:
            del found[a:b]
        elif how == 3:
            found[a:a] = found[a:b] * rng.choice((1, 2, 20))
        elif how == 4:
            del found[a:]
        elif how == 5:
            found[a:a] = str(words.odd()).encode("utf-8", "replace")
        else:
            found[a:b] = struct.pack("<q", rng.choice((-1, 0, 1, 2**31, 2**62, len(found))))[: b - a]
    return bytes(found)


def _nodes(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _nodes(item, (*path, key))
    return found


def damage_value(value: Any, words: Words) -> Any:
    """A JSON value of which some parts are replaced, dropped, doubled or exchanged."""
    rng, value = words.rng, copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        nodes = _nodes(value)
        depth = rng.choice(sorted({len(n) for n in nodes}))  # few are near the root
        path = rng.choice([n for n in nodes if len(n) == depth])
        if not path:
            if rng.random() < 0.1:
                return words.odd()
            continue
        parent: Any = value
        for key in path[:-1]:
            parent = parent[key]
        key, how = path[-1], rng.randrange(10)
        if how < 6:
            parent[key] = words.odd()
        elif how == 6:
            del parent[key]
        elif how == 7 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == 8:
            parent[key] = str(parent[key]) if not isinstance(parent[key], (list, dict)) else [parent[key]]
        else:
            other = rng.choice(nodes)
            source: Any = value
            try:
                for step in other:
                    source = source[step]
                parent[key] = copy.deepcopy(source)
            except (KeyError, IndexError, TypeError):
                pass
    return value


def damage_json(data: bytes, words: Words) -> bytes:
    """JSON of another content, or no JSON."""
    if words.rng.random() < 0.2:
        return damage_bytes(data, words)
    if words.rng.random() < 0.01:
        deep = words.rng.choice(DEEP)
        return b"[" * deep + (b"]" * deep if words.rng.random() < 0.5 else b"")
    try:
        return json.dumps(damage_value(json.loads(data), words)).encode()
    except RecursionError:  # parts of it were put into each other
        return b"[" * DEEP[2]


def damage_table(data: bytes, words: Words) -> bytes:
    """Text of which cells, rows or columns are other ones."""
    rng = words.rng
    if rng.random() < 0.2:
        return damage_bytes(data, words)
    rows = list(csv.reader(io.StringIO(data.decode())))
    for _ in range(rng.choice((1, 1, 2, 5))):
        n = rng.randrange(len(rows))
        k = rng.randrange(len(rows[n])) if rows[n] else 0
        how = rng.randrange(6)
        if how < 3 and rows[n]:
            rows[n][k] = str(words.odd()).encode("utf-8", "replace").decode()
        elif how == 3:
            rows[n][k:] = rows[n][k + 1 :] if rng.random() < 0.5 else rows[n][k:] * 2
        elif how == 4 and len(rows) > 1:
            del rows[n]
        else:
            rows.insert(rng.randrange(len(rows)), list(rows[n]))
    out = io.StringIO()
    csv.writer(out, delimiter=rng.choice(",,,;\t")).writerows(rows)
    return out.getvalue().encode()


def damage_lines(data: bytes, words: Words) -> bytes:
    """Lines of which words are other ones: YAML, and the text files of YOLO."""
    rng = words.rng
    if rng.random() < 0.2:
        return damage_bytes(data, words)
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        n = rng.randrange(len(lines))
        parts = lines[n].split(" ")
        parts[rng.randrange(len(parts))] = str(words.odd())
        lines[n] = " ".join(parts)
        if rng.random() < 0.2:
            lines.insert(n, lines[rng.randrange(len(lines))])
    return "\n".join(lines).encode("utf-8", "replace")


def damage_safetensors(data: bytes, words: Words) -> bytes:
    """A header, or metadata in it, of other content."""
    if words.rng.random() < 0.3:
        return damage_bytes(data, words)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    try:
        if words.rng.random() < 0.6:
            own = json.loads(header["__metadata__"]["scarcenet"])
            header["__metadata__"]["scarcenet"] = json.dumps(damage_value(own, words))
        else:
            header = damage_value(header, words)
        text = json.dumps(header).encode()
    except RecursionError:  # parts of it were put into each other
        text = b"[" * DEEP[2]
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


class Program:
    """A pickle that is a program: it makes a folder when it is loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def damage_pth(data: bytes, words: Words) -> bytes:
    """A torch file with other objects in it: also such as run code."""
    import torch

    rng = words.rng
    if rng.random() < 0.5:
        return damage_bytes(data, words)
    content: Any = torch.load(io.BytesIO(data), weights_only=True)
    for name in rng.sample(sorted(content), rng.choice((1, 2))):
        value = content[name]
        tensors = (
            value.flatten()[:1],
            value.double(),
            value[None],
            torch.full_like(value.float(), torch.nan),
            value.bool(),
        )
        tensors += (torch.zeros(1).expand(10**5, 10**5), value.to(torch.complex64), torch.empty(0), value.to_sparse())
        content[name] = rng.choice((*tensors, words.odd(), Program(f"{words.outside}/ran"), value))
        if rng.random() < 0.3:
            content = {"state_dict": content, "meta": words.odd()}
            break
    out = io.BytesIO()
    try:
        if rng.random() < 0.1:
            return pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
        torch.save(content, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    except RecursionError:  # too deep for a pickle
        return damage_bytes(data, words)
    return out.getvalue()


def damage_parquet(data: bytes, words: Words) -> bytes:
    """A table of other columns, types or values."""
    import pyarrow as pa
    from pyarrow import parquet

    rng = words.rng
    if rng.random() < 0.5:
        return damage_bytes(data, words)
    table = parquet.read_table(io.BytesIO(data))
    for _ in range(rng.choice((1, 2))):
        n = rng.randrange(table.num_columns)
        name, rows = table.column_names[n], table.num_rows
        odd = words.odd()
        how = rng.randrange(7)
        if how == 0 and table.num_columns > 1:
            table = table.remove_column(n)
        elif how == 1:
            table = table.slice(0, rng.choice((0, 1, max(0, rows - 1))))
        elif how == 2:
            values = [rng.choice((-1, 0, 10**6, 2**31 - 1, -(2**31), None)) for _ in range(rows)]
            table = table.set_column(n, name, pa.array(values, pa.int32()))
        elif how == 3:
            table = table.set_column(n, name, pa.array([str(odd).encode("utf-8", "replace").decode()] * rows))
        elif how == 4:
            table = table.set_column(n, name, pa.array([rng.choice((float("nan"), 1e300, -1.0))] * rows, pa.float64()))
        elif how == 5:
            table = table.set_column(n, name, pa.array([[1, 2]] * rows))
        else:
            table = table.rename_columns([*table.column_names[:n], "other", *table.column_names[n + 1 :]])
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def damage_hdf5(data: bytes, words: Words) -> bytes:
    """An HDF5 file of which datasets or attributes are missing, or other ones."""
    import h5py
    import numpy as np

    rng = words.rng
    if rng.random() < 0.5:
        return damage_bytes(data, words)
    out = io.BytesIO(data)
    with h5py.File(out, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(rng.choice((1, 2))):
            name, odd, how = rng.choice(names), words.odd(), rng.randrange(6)
            try:
                item = file[name]
                if how == 0:
                    del file[name]
                elif how == 1 and len(item.attrs):
                    del item.attrs[rng.choice(sorted(item.attrs))]
                elif how == 2 and len(item.attrs):
                    key = rng.choice(sorted(item.attrs))
                    old = item.attrs[key]
                    own = json.dumps(damage_value(json.loads(old), words)) if key == "json" else odd
                    item.attrs[key] = own if isinstance(own, (str, int, float)) else str(own)
                elif how == 3 and isinstance(item, h5py.Dataset) and item.shape:
                    values = item[()]
                    flat = values.reshape(-1).view(np.uint8).copy()
                    at = rng.randrange(len(flat))
                    flat[at : at + 8] = rng.choice((0, 255, 127))
                    item[()] = flat.view(values.dtype).reshape(values.shape)
                elif how == 4 and isinstance(item, h5py.Dataset):
                    values = item[()]
                    del file[name]
                    new = (
                        values[:1],
                        np.zeros((2, 2)),
                        np.array([b"x"]),
                        np.array(7),
                        values[:0],
                        np.concatenate([values] * 3),
                    )
                    file[name] = rng.choice(new)
                else:
                    del file[name]
                    file[name] = rng.choice((h5py.SoftLink("/nowhere"), h5py.ExternalLink("../outside/x.h5", "/")))
            except (ValueError, TypeError, KeyError, OSError, RuntimeError, OverflowError, IndexError, UnicodeError):
                continue
    return out.getvalue()


# ---- what reads


class Target(NamedTuple):
    """A reader, the file that is damaged, and how."""

    file: str  # below the home
    damage: Callable[[bytes, Words], bytes]
    read: Callable[[Path, Path], object]  # of the home and the file


def read_set(home: Path, file: Path) -> None:
    """A set, as check and training read it."""
    from scarcenet.data.check import check_poses, warn_findings
    from scarcenet.data.coco import coco_json, read_coco

    for strict in (False, True):
        try:
            poses = read_coco(file, strict=strict)
        except ValueError:
            if strict:
                continue
            raise
        str(check_poses(poses))
        warn_findings(poses)
        json.dumps(coco_json(poses))
        for instance in poses.instances + poses.empty + poses.unannotated:
            assert_inside(home, instance.file)


def read_images(home: Path, file: Path) -> None:
    """An image, and a set that has it."""
    from scarcenet.data.coco import read_coco
    from scarcenet.data.images import broken_images
    from scarcenet.data.loader import load_crops

    poses = read_coco(home / "set/annotations/train.json")
    for instance in poses.instances:
        if instance.file == file:
            for line in broken_images([instance]).values():
                raise ValueError(line)
            load_crops([instance], 32)


def read_known(home: Path, file: Path) -> None:
    """--labels FILE."""
    from scarcenet.config import PRESETS
    from scarcenet.data.coco import read_coco
    from scarcenet.data.splits import known_labels, read_splits

    config = replace(PRESETS["demo"], data=str(home / "set"), labels=str(file))
    known_labels(config, read_coco(home / "set/annotations/train.json"))
    read_splits(config, home)


def read_settings(home: Path, file: Path) -> None:
    """config.json, of a run and of its networks."""
    from scarcenet.config import read_config
    from scarcenet.predict.predictor import find_config, find_networks

    config = read_config(home / "run")
    json.dumps(config.__dict__)
    find_config(home / "run", "")
    find_networks(home / "run")


def read_checkpoint(home: Path, file: Path) -> None:
    """--resume."""
    from scarcenet.checkpoint import load_checkpoint

    load_checkpoint(file, *run_data(home))


def read_weights(home: Path, file: Path) -> None:
    """--weights, --backbone, and the Predictor."""
    from scarcenet.models.build import build_network
    from scarcenet.models.weights import read_model_info, read_state
    from scarcenet.predict.predictor import Predictor

    read_state(file)
    config, data = run_data(home)
    try:
        build_network(replace(config, weights=str(file)), len(data.schema))
    except ValueError:
        build_network(replace(config, backbone=str(file)), len(data.schema))
    if read_model_info(file):
        Predictor(file, device="cpu", config=config)


def read_ledger(home: Path, file: Path) -> None:
    """explain, report, accepted."""
    from scarcenet.data.coco import read_coco
    from scarcenet.ledger.ledger import accepted_labels, open_ledger, read_frame, redecide

    ledger = open_ledger(home / "run")
    epoch = ledger.epoch()
    ledger.explain(0, 0)
    read_frame(ledger)
    redecide(ledger, epoch, ledger.record(epoch), keep=0.5, drop=0.2, agree_px=1.0)
    poses = read_coco(home / "set/annotations/train.json")
    accepted_labels(ledger, poses, epoch)


def read_results(home: Path, file: Path) -> None:
    """metrics.csv, as a report and a resumed run read it."""
    from scarcenet.run.figures import curves
    from scarcenet.run.folder import append_metrics, describe_collapse, read_metrics

    rows = read_metrics(file)
    curves(rows)
    if rows:
        describe_collapse(rows)
        append_metrics(file, {**rows[0], "stage": "scarcenet", "epoch": 1})


def read_study(home: Path, file: Path) -> None:
    """study.csv, to which rows are added."""
    from scarcenet.experiments.ablation import read_grid
    from scarcenet.experiments.study import summary

    rows = list(read_grid(file).values())
    if rows:
        summary(rows, rows[0]["labels"], "student")


def read_source(home: Path, file: Path) -> None:
    """What another tool wrote; sometimes a set is made of it."""
    from scarcenet.data.formats import read_labels
    from scarcenet.data.importing import import_set

    source = read_labels(file)
    for image in source.images:
        for path in (image.file, image.video):
            if path is not None:
                assert_inside(home, path)
    if time.time_ns() % 10 == 0:
        new = home / "imported"
        shutil.rmtree(new, ignore_errors=True)
        import_set(source, new, frames=2)
        for written in new.rglob("*"):
            assert_inside(home, written)


def read_folder(home: Path, file: Path) -> None:
    """The project that a file belongs to."""
    read_source(
        home, file.parents[{"yolo": 2 if file.suffix == ".txt" else 0, "dlc": 0}[file.relative_to(home).parts[0]]]
    )


TARGETS = {
    "coco": Target("set/annotations/train.json", damage_json, read_set),
    "ids": Target("ids.json", damage_json, read_known),
    "corrected": Target("corrected.json", damage_json, read_known),
    "image": Target("set/data/{image}", damage_bytes, read_images),
    "config": Target("run/config.json", damage_json, read_settings),
    "checkpoint": Target("run/checkpoint.safetensors", damage_safetensors, read_checkpoint),
    "weights": Target("run/teacher.safetensors", damage_safetensors, read_weights),
    "pth": Target("plain.pth", damage_pth, read_weights),
    "ledger-instances": Target("run/ledger/instances.parquet", damage_parquet, read_ledger),
    "ledger-labels": Target("run/ledger/labels.parquet", damage_parquet, read_ledger),
    "ledger-epoch": Target("run/ledger/epoch-0001.parquet", damage_parquet, read_ledger),
    "metrics": Target("run/metrics.csv", damage_table, read_results),
    "study": Target("study.csv", damage_table, read_study),
    "deeplabcut-csv": Target("csv/labeled-data/v/CollectedData_Ann.csv", damage_table, read_source),
    "deeplabcut-h5": Target("h5/labeled-data/v/CollectedData_Ann.h5", damage_hdf5, read_source),
    "deeplabcut-h5-records": Target("records/labeled-data/v/CollectedData_Ann.h5", damage_hdf5, read_source),
    "deeplabcut-yaml": Target("dlc/config.yaml", damage_lines, read_folder),
    "lightning-pose": Target("lightning/CollectedData.csv", damage_table, read_source),
    "sleap": Target("sleap/labels.slp", damage_hdf5, read_source),
    "sleap-package": Target("sleap/labels.pkg.slp", damage_hdf5, read_source),
    "yolo-yaml": Target("yolo/data.yaml", damage_lines, read_folder),
    "yolo-labels": Target("yolo/labels/train/{image}.txt", damage_lines, read_folder),
    "label-studio": Target("studio/tasks.json", damage_json, read_source),
    "coco-roboflow": Target("roboflow/_annotations.coco.json", damage_json, read_source),
}


def run_data(home: Path) -> tuple:
    """The configuration and the training set of the run."""
    from scarcenet.config import read_config
    from scarcenet.run.load import load_run_data

    if home not in _known:
        config = replace(read_config(home / "run"), data=str(home / "set"))
        _known[home] = (config, load_run_data(config, home / "run").data)
    return _known[home]


_known: dict[Path, tuple] = {}


def assert_inside(home: Path, path: Path) -> None:
    """AssertionError for a path that leads out of the home."""
    assert Path(os.path.normpath(home / path)).is_relative_to(home), f"leads out: {path}"


def prepare(home: Path) -> None:
    """Write a whole file of each kind, and what must not be read beside them."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from test_formats import (
        Picture,
        as_table,
        images_into,
        label_studio_task,
        write_coco,
        write_csv,
        write_fixed,
        write_pose_folder,
        write_project,
        write_records,
    )

    from scarcenet.cli.main import main
    from scarcenet.zoo.dataset import write_zoo

    home.mkdir(parents=True)
    zoo = write_zoo(home / "set", train=6, val=2, test=2, seed=0)
    (zoo / "annotations" / "ap10k-train-split1.json").rename(zoo / "annotations" / "train.json")
    for split in ("val", "test"):
        (zoo / "annotations" / f"ap10k-{split}-split1.json").rename(zoo / "annotations" / f"{split}.json")
    assert main(["train", *RUN, "", "--data", str(zoo), "--out", str(home / "run")]) == 0
    study = ["study", *RUN, "", "--data", str(zoo), "--out", str(home / "st"), "--counts", "1", "--seeds", "0"]
    assert main([*study, "--methods", "supervised"]) == 0
    shutil.move(home / "st" / "study.csv", home)
    shutil.rmtree(home / "st")
    torch.save(load_file(home / "run" / "teacher.safetensors"), home / "plain.pth")
    content = json.loads((zoo / "annotations" / "train.json").read_text())
    (home / "ids.json").write_text(json.dumps([i["id"] for i in content["images"]][:4]))
    few = [a for a in content["annotations"] if a["image_id"] in [i["id"] for i in content["images"]][:2]]
    (home / "corrected.json").write_text(json.dumps(content | {"annotations": few}))
    some = []
    for entry in content["images"][:3]:
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"]][:1]
        points, boxes = (np.array([a[key] for a in own], float) for key in ("keypoints", "bbox"))
        some.append(Picture(zoo / "data" / entry["file_name"], points.reshape(-1, 17, 3), boxes, ["animal"]))
    rows = {f"labeled-data/v/{p.file.name}": p.points for p in some}
    images_into(home / "csv/labeled-data/v", some)
    write_csv(home / "csv/labeled-data/v/CollectedData_Ann.csv", rows)
    columns, names, values = as_table(some)
    for layout in ("h5", "records"):
        file = images_into(home / layout / "labeled-data/v", some) / "CollectedData_Ann.h5"
        if layout == "h5":
            write_fixed(file, columns, [tuple(n.split("/")) for n in names], values)
        else:
            write_records(file, columns, names, values)
    write_project(home / "dlc", some)
    images_into(home / "lightning/labeled-data/v", some)
    write_csv(home / "lightning/CollectedData.csv", rows)
    write_pose_folder(
        home / "yolo", {"train": some}, settings="kpt_shape: [17, 3]\ntrain: images/train\nnames: [cat]\n"
    )
    images_into(home / "studio", some)
    tasks = [label_studio_task(p, n, f"/data/local-files/?d={p.file.name}") for n, p in enumerate(some)]
    (home / "studio/tasks.json").write_text(json.dumps(tasks))
    write_coco(home / "roboflow", some)
    try:
        import sleap_io
        from test_formats import image_labels
    except ImportError:
        print("sleap-io is not installed: .slp is left out")
    else:
        inside = [p._replace(file=images_into(home / "sleap", [p]) / p.file.name) for p in some]
        labels = image_labels(sleap_io, inside)
        labels.save(str(home / "sleap/labels.slp"), verbose=False)
        labels.save(str(home / "sleap/labels.pkg.slp"), embed="user", verbose=False)
    outside = home.parent / "outside"
    outside.mkdir()
    shutil.copy(some[0].file, outside / "secret.png")


def file_of(home: Path, target: Target) -> Path:
    """The file that is damaged."""
    image = sorted((home / "set/data").iterdir())[0]
    return home / target.file.format(image=image.name if target.read is read_images else image.stem)


# ---- the reader's process


class Hang(BaseException):
    """An input takes too long."""


def _raise_hang(*_: object) -> None:
    raise Hang


def judge(home: Path, target: Target, file: Path) -> str:
    """What is wrong with how a damaged file is read; "" if nothing is."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(home, file)
    except (ValueError, OSError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        if str(home) not in text and not text.split(":")[0].isidentifier():
            return f"names no file: {type(error).__name__}: {text[:200]} | {where(error)}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {str(error)[:200]} | {where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (home.parent / "outside" / "ran").exists():
        (home.parent / "outside" / "ran").rmdir()
        return "code was run"
    return ""


def where(error: BaseException) -> str:
    """The last places in the package that an error came through."""
    lines = [f for f in traceback.extract_tb(error.__traceback__) if "/scarcenet/" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.name}:{f.lineno}" for f in reversed(lines[-3:]))


class Job(NamedTuple):
    """Some inputs of a target, by their numbers."""

    name: str
    first: int
    count: int


def work(home: Path, jobs: list[Job]) -> None:
    """Read the inputs of some jobs; a line for each that begins, and for each fault."""
    import scarcenet.data.formats
    import scarcenet.ledger.ledger
    import scarcenet.predict.predictor  # noqa: F401

    warnings.simplefilter("ignore")
    outside, opened = str(home.parent / "outside"), []

    def watch(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str) and args[0].startswith(outside + "/secret"):
            opened.append(args[0])
        elif event in ("os.system", "subprocess.Popen"):
            opened.append(event)

    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, _raise_hang)
    for name, first, count in jobs:
        target = TARGETS[name]
        file = file_of(home, target)
        kept = home.parent / f"whole-{name}"  # a process that was lost has left a damaged file
        if not kept.exists():
            shutil.copy(file, kept)
        whole = kept.read_bytes()
        file.write_bytes(whole)
        target.read(home, file)  # the whole file is read, and what is imported late is there
        memory = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))
        opened.clear()
        for number in range(first, first + count):
            print(json.dumps([name, number]), flush=True)
            words = Words(random.Random(f"{name} {number}"), outside)
            file.write_bytes(target.damage(whole, words))
            wrong = judge(home, target, file)
            if opened:
                wrong, _ = f"outside: {opened[0]}", opened.clear()
            if wrong:
                print(json.dumps([name, number, wrong]), flush=True)
        file.write_bytes(whole)


def read_some(home: Path, jobs: list[Job]) -> dict[str, str]:
    """The faults among the inputs of some jobs, by target and number, which a process reads that may be lost."""
    faults: dict[str, str] = {}
    while jobs:
        command = [sys.executable, __file__, "--work", str(home), "--jobs", json.dumps(jobs)]
        last: tuple[str, int] | None = None
        with tempfile.TemporaryFile("w+") as error:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error, text=True)
            timer = _Watchdog(process)
            for line in process.stdout or ():
                timer.sign()
                try:
                    name, number, *wrong = json.loads(line)
                except (ValueError, TypeError):  # what a library prints
                    continue
                last = (name, number)
                faults |= {f"{name} {number}": wrong[0]} if wrong else {}
            code = process.wait()
            timer.stop()
            if code == 0:
                return faults
            error.seek(0)
            if last is None:
                raise RuntimeError(f"{jobs[0]}: {error.read()[-2000:]}")
            name, number = last
            faults[f"{name} {number}"] = f"the process ended with {code}: {error.read()[-300:]}"
        rest = [job for job in jobs[[job.name for job in jobs].index(name) :]]
        end = rest[0].first + rest[0].count
        jobs = [Job(name, number + 1, end - number - 1), *rest[1:]]
    return faults


class _Watchdog:
    """Ends a process that gives no sign."""

    def __init__(self, process: subprocess.Popen) -> None:
        import threading

        self.process, self.last, self.over = process, time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.over.wait(1):
            if time.monotonic() - self.last > QUIET:
                self.process.kill()

    def sign(self) -> None:
        self.last = time.monotonic()

    def stop(self) -> None:
        self.over.set()


def campaign(
    folder: Path, inputs: int, first: int = 0, names: tuple[str, ...] = (), by_time: bool = False, verbose: bool = False
) -> dict:
    """Read `inputs` damaged files, of each target as many, or, `by_time`, those that take as long.

    Returns counts, and the faults by target and number.
    """
    home = folder / "home"
    prepare(home)
    names = names or tuple(n for n in TARGETS if file_of(home, TARGETS[n]).exists())
    counts, spent, wrong = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0), {}
    step = max(1, min(5000, -(-inputs // len(names))))
    if step < 100:  # one process for all of them
        jobs = [Job(name, first, step) for name in names]
        return {"inputs": step * len(names), "by target": dict.fromkeys(names, step), "wrong": read_some(home, jobs)}
    while sum(counts.values()) < inputs:
        name = min(names, key=(lambda n: spent[n]) if by_time else (lambda n: counts[n]))
        count, began = min(step, inputs - sum(counts.values())), time.monotonic()
        found = read_some(home, [Job(name, first + counts[name], count)])
        counts[name] += count
        spent[name] += time.monotonic() - began
        wrong |= found
        if verbose:
            print("".join(f"{key}: {line}\n" for key, line in found.items()), end="")
            print(f"{name}: {counts[name]} inputs, {spent[name]:.0f} s; {len(wrong)} faults", flush=True)
    return {"inputs": sum(counts.values()), "by target": counts, "wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--target", nargs="*", default=[], choices=list(TARGETS))
    parser.add_argument("--by-time", action="store_true", help="equal times instead of equal counts")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.work, [Job(*job) for job in chosen.jobs])
        sys.exit(0)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "fuzz"
        result = campaign(place, chosen.inputs, chosen.first, tuple(chosen.target), chosen.by_time, verbose=True)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["wrong"]))
