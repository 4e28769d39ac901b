"""Labels of other tools: each format is written here as its tool writes it, from the zoo, and read again exactly."""

import csv
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image

from scarcenet.data.deeplabcut import read_deeplabcut
from scarcenet.data.exif import image_size
from scarcenet.data.formats import read_labels
from scarcenet.data.hdf5 import plain_pickle, read_stored_table
from scarcenet.data.images import read_image
from scarcenet.data.joining import join_sources
from scarcenet.data.label_source import LONGEST_YAML, Animal, LabelSource, SourceImage, find_below, read_yaml
from scarcenet.data.label_studio import task_path
from scarcenet.data.layout import annotation_files, find_splits, name_parts
from scarcenet.data.values import Findings
from scarcenet.schema import AP10K

NAMES = AP10K.names
BONES = [(NAMES[a], NAMES[b]) for a, b in AP10K.skeleton]
PAIRS = [(NAMES[a], NAMES[b]) for a, b in AP10K.flip_pairs]


class Picture(NamedTuple):
    """One image of the zoo and what is known of it."""

    file: Path
    points: np.ndarray  # (n, 17, 3): x, y, COCO's flag
    boxes: np.ndarray  # (n, 4)
    categories: list[str]


@pytest.fixture(scope="module")
def pictures(zoo) -> list[Picture]:
    """The training images of the zoo, those with two animals first."""
    content = json.loads((zoo / "annotations" / "ap10k-train-split1.json").read_text())
    category = {c["id"]: c["name"] for c in content["categories"]}
    found = []
    for entry in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        points = np.array([a["keypoints"] for a in own], float).reshape(-1, 17, 3)
        boxes = np.array([a["bbox"] for a in own], float)
        names = [category[a["category_id"]] for a in own]
        found.append(Picture(zoo / "data" / entry["file_name"], points, boxes, names))
    found.sort(key=lambda p: -len(p.points))
    assert len(found[0].points) == 2
    return found


def one_line(call, *, says: str, error=ValueError) -> str:
    """The error of `call()`: one line that holds `says`."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert says in text, text
    return text


def kinds(source: LabelSource) -> dict[str, int]:
    return {f.kind: f.count for f in source.findings}


def assert_same(source: LabelSource, pictures, *, flags="all 2", names=NAMES, boxes=False, tolerance=0.0) -> None:
    """The source has these pictures in this order, with exactly their animals."""
    assert source.names == tuple(names)
    assert len(source.images) == len(pictures)
    order = [NAMES.index(name) for name in names]
    for row, picture in enumerate(pictures):
        animals = [a for a in source.animals if a.image == row]
        assert len(animals) == len(picture.points)
        for animal, points, box in zip(animals, picture.points[:, order], picture.boxes, strict=True):
            shown = points[:, 2] > 0
            wanted = np.where(shown, 2, 0) if flags == "all 2" else points[:, 2]
            assert np.array_equal(animal.visible, wanted) and animal.visible.dtype == np.uint8
            assert np.abs(animal.xy - points[:, :2] * shown[:, None]).max() <= tolerance
            if boxes:
                assert np.allclose(animal.box, box, atol=1e-6)
            else:
                assert animal.box is None


# ---- DeepLabCut


def cell(value: float) -> str:
    return repr(float(value))


def write_csv(file: Path, rows: dict[str, np.ndarray], names=NAMES, animals=(), columns=1, scorer="Ann") -> Path:
    """DeepLabCut's table. `rows`: path -> (n, 17, 3); `animals`: names of n individuals, none for one animal."""
    people = animals or [""]
    head = [(person, name, coord) for person in people for name in names for coord in "xy"]
    empty = [""] * (columns - 1)
    lines = [["scorer", *empty, *[scorer] * len(head)]]
    if animals:
        lines.append(["individuals", *empty, *(h[0] for h in head)])
    lines += [["bodyparts", *empty, *(h[1] for h in head)], ["coords", *empty, *(h[2] for h in head)]]
    order = [NAMES.index(name) for name in names]
    for path, points in rows.items():
        points = np.concatenate([points, np.zeros((len(people) - len(points), 17, 3))]) if len(people) > 1 else points
        cells = [cell(v) if p[2] else "" for animal in points[: len(people)] for p in animal[order] for v in p[:2]]
        lines.append([*(path.split("/", columns - 1) if columns > 1 else [path]), *cells])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(lines)
    return file


def first_only(pictures) -> list[Picture]:
    return [p._replace(points=p.points[:1], boxes=p.boxes[:1], categories=p.categories[:1]) for p in pictures]


CONFIG = """Task: zoo
scorer: Ann
date: Jan1
multianimalproject: false
video_sets:
  D:\\lab\\zoo\\videos\\cats.mp4:
    crop: 0, 640, 0, 480
bodyparts:
{names}
skeleton:
{bones}
"""


def write_config(project: Path, names=NAMES, bones=BONES) -> None:
    listed = "\n".join(f"- {name}" for name in names)
    text = CONFIG.format(names=listed, bones="\n".join(f"- - {a}\n  - {b}" for a, b in bones) or "[]")
    (project / "config.yaml").write_text(text)


def write_project(project: Path, pictures, config=True, row="labeled-data/{video}/{name}", **options) -> Path:
    """A project of two videos, cats and dogs, each with half of the pictures."""
    half = len(pictures) // 2
    for video, part in (("cats", pictures[:half]), ("dogs", pictures[half:])):
        folder = project / "labeled-data" / video
        folder.mkdir(parents=True)
        rows = {row.format(video=video, name=p.file.name): p.points for p in part}
        write_csv(folder / "CollectedData_Ann.csv", rows, **options)
        for p in part:
            shutil.copy(p.file, folder)
    if config:
        write_config(project)
    return project


ROWS = [
    "labeled-data/{video}/{name}",
    r"labeled-data\{video}\{name}",
    r"D:\lab\zoo-Ann-2024\labeled-data\{video}\{name}",
    "/mnt/lab/zoo-Ann-2024/labeled-data/{video}/{name}",
    "../labeled-data/{video}/{name}",
    "{name}",
]


@pytest.mark.parametrize("row", ROWS)
def test_a_deeplabcut_project(row, pictures, tmp_path):
    some = first_only(pictures[:6])
    project = write_project(tmp_path / "zoo", some, row=row)
    (project / "videos").mkdir()
    for name in ("cats.mp4", "dogs.mp4", "catsDLC_resnet50_zooJan1shuffle1_50000_labeled.mp4", "notes.txt"):
        (project / "videos" / name).touch()
    source = read_labels(project)
    assert_same(source, some)
    assert source.tool == "DeepLabCut project" and source.flip_pairs is None and source.findings == ()
    assert source.skeleton == AP10K.skeleton
    assert [v.name for v in source.videos] == ["cats.mp4", "dogs.mp4"]
    assert [i.group for i in source.images] == ["cats"] * 3 + ["dogs"] * 3
    assert source.images[0].name == f"cats/{some[0].file.name}"
    for image, picture in zip(source.images, some, strict=True):
        assert image.file.read_bytes() == picture.file.read_bytes() and not image.upright and not image.split
    assert read_labels(project / "config.yaml").images == source.images
    table = read_labels(project / "labeled-data" / "dogs" / "CollectedData_Ann.csv")
    assert_same(table, some[3:])
    assert table.tool == "DeepLabCut csv" and table.images == source.images[3:]
    assert read_labels(project / "labeled-data" / "dogs").images == table.images


def test_paths_relative_to_the_working_folder(pictures, tmp_path, monkeypatch):
    project = write_project(tmp_path / "zoo", first_only(pictures[:4]))
    monkeypatch.chdir(project / "labeled-data" / "cats")
    assert len(read_labels("CollectedData_Ann.csv").images) == 2
    assert len(read_labels(".").images) == 2
    monkeypatch.chdir(project)
    assert len(read_labels(".").images) == 4


def test_three_columns_and_several_animals(pictures, tmp_path):
    some = pictures[:4]
    project = write_project(tmp_path / "zoo", some, columns=3, animals=["m1", "m2"])
    source = read_labels(project)
    assert_same(source, some)
    assert source.images[0].name == f"cats/{some[0].file.name}"
    assert sum(a.image == 0 for a in source.animals) == 2


def test_unique_bodyparts_belong_to_no_animal(pictures, tmp_path):
    folder = tmp_path / "zoo" / "labeled-data" / "v"
    file = write_csv(
        folder / "CollectedData_Ann.csv", {"labeled-data/v/a.jpg": pictures[0].points}, animals=["m1", "m2"]
    )
    with file.open(newline="") as f:
        lines = list(csv.reader(f))
    for line, more in zip(lines, (["Ann"] * 2, ["single"] * 2, ["corner"] * 2, ["x", "y"], ["3", "4"]), strict=True):
        line += more
    with file.open("w", newline="") as f:
        csv.writer(f).writerows(lines)
    shutil.copy(pictures[0].file, folder / "a.jpg")
    source = read_labels(file)
    assert_same(source, pictures[:1])
    assert kinds(source) == {"bodyparts of the individual 'single'": 1}
    assert source.findings[0].first == ("CollectedData_Ann.csv: corner",)
    only = write_csv(
        folder / "CollectedData_Bob.csv", {"labeled-data/v/a.jpg": pictures[0].points[:1]}, animals=["single"]
    )
    assert_same(read_labels(only), first_only(pictures[:1]))


def test_the_config_decides_on_the_names(pictures, tmp_path):
    some = first_only(pictures[:4])
    project = write_project(tmp_path / "zoo", some, names=NAMES[::-1])
    assert_same(read_labels(project), some)  # in the config's order
    (project / "config.yaml").unlink()
    assert_same(read_labels(project), some, names=NAMES[::-1])  # in the tables' order
    fewer = (*NAMES[:5], "whisker")
    write_config(project, names=fewer)
    source = read_labels(project)
    assert source.names == fewer and not any(a.visible[5] for a in source.animals)
    assert source.skeleton == tuple(e for e in AP10K.skeleton if max(e) < 5)
    assert kinds(source) == {
        "bodyparts of config.yaml that a table does not have": 2,
        "bodyparts of a table that config.yaml does not have": 12,
    }


def test_names_that_differ_between_tables(pictures, tmp_path):
    project = write_project(tmp_path / "zoo", first_only(pictures[:4]), config=False)
    write_csv(
        project / "labeled-data" / "dogs" / "CollectedData_Ann.csv",
        {f"labeled-data/dogs/{pictures[2].file.name}": pictures[2].points},
        names=NAMES[:3],
    )
    text = one_line(lambda: read_labels(project), says="got left_eye, right_eye, nose; name them alike")
    assert "root_of_tail" in text


def test_odd_rows_and_cells(pictures, tmp_path):
    some = first_only(pictures[:6])
    project = write_project(tmp_path / "zoo", some, config=False)
    file = project / "labeled-data" / "cats" / "CollectedData_Ann.csv"
    with file.open(newline="") as f:
        lines = list(csv.reader(f))
    second = list(lines[3])
    lines[3][1:5] = ["abc", "2", "3", ""]  # left eye of the first image: no number; right eye: only x
    lines[4][1:] = [""] * 34  # nothing labelled in the second
    lines.append(["labeled-data/cats/img999.jpg", *["1"] * 34])
    lines.append(second)
    lines.append(["labeled-data/cats/x.jpg", *["1"] * 36])
    lines.append(["../../etc/passwd.png", *["1"] * 34])
    lines.append(["", "1"])
    lines.append([])
    with file.open("w", newline="") as f:
        csv.writer(f).writerows(lines)
    shutil.copy(some[0].file, file.parent / "extracted.jpg")
    source = read_labels(project)
    assert len(source.images) == 6 and len(source.animals) == 5
    assert not any(a.image == 1 for a in source.animals)  # it is an unlabelled image
    first = next(a for a in source.animals if a.image == 0)
    assert first.visible[:2].tolist() == [0, 0] and not first.xy[:2].any()
    shown = some[0].points[0, 2:, 2] > 0
    assert np.array_equal(first.xy[2:][shown], some[0].points[0, 2:, :2][shown])
    assert (
        kinds(source)
        == {
            "cells that are not numbers": 1,
            "rows that do not fit the header": 2,
            "keypoints with only one of x and y": 2,
            "rows whose image is not there": 2,
            "duplicate rows of an image": 1,
            "images beside the labelled ones without a row": 1,
        }
        or kinds(source)["keypoints with only one of x and y"] >= 2
    )


def test_short_rows_semicolons_and_a_byte_order_mark(pictures, tmp_path):
    """A table that a spreadsheet saved with decimal commas."""
    text = "\ufeffscorer;Ann;Ann;Ann;Ann\nbodyparts;nose;nose;tail;tail\ncoords;x;y;x;y\na.jpg;1,5;2,25\n\n"
    (tmp_path / "CollectedData_Ann.csv").write_text(text, encoding="utf-8")
    shutil.copy(pictures[0].file, tmp_path / "a.jpg")
    source = read_labels(tmp_path / "CollectedData_Ann.csv")
    assert source.names == ("nose", "tail") and source.animals[0].visible.tolist() == [2, 0]
    assert source.animals[0].xy.tolist() == [[1.5, 2.25], [0, 0]]


def test_a_renamed_video_folder(pictures, tmp_path):
    """The bare name beside the table is taken only where all rows name one folder."""
    some = first_only(pictures[:4])
    project = write_project(tmp_path / "zoo", some, config=False)
    (project / "labeled-data" / "cats").rename(project / "labeled-data" / "kittens")
    source = read_labels(project)
    assert_same(source, some[2:] + some[:2])
    assert {i.group for i in source.images} == {"dogs", "kittens"}
    rows = {f"labeled-data/{v}/{p.file.name}": p.points for v, p in zip(("cats", "gone"), some, strict=False)}
    write_csv(project / "labeled-data" / "kittens" / "CollectedData_Ann.csv", rows)
    assert kinds(read_labels(project))["rows whose image is not there"] == 2


def test_nothing_is_read_outside_of_the_project(pictures, tmp_path):
    for name in ("secret.png", "other/labeled-data/v/secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[0].file, tmp_path / name)
    outside = [
        "../../secret.png",
        "labeled-data/v/../../../secret.png",
        str(tmp_path / "secret.png"),
        str(tmp_path / "other/labeled-data/v/secret.png"),
        "..\\..\\secret.png",
        "file://" + str(tmp_path / "secret.png"),
        "a\0b.png",
        "x" * 5000 + ".png",
    ]
    folder = tmp_path / "zoo" / "labeled-data" / "v"
    rows = dict.fromkeys(outside, pictures[0].points[:1])
    write_csv(folder / "CollectedData_Ann.csv", {k.replace("\0", ""): v for k, v in rows.items()})
    one_line(lambda: read_labels(tmp_path / "zoo"), says="8 rows whose image is not there")
    for text in outside:
        assert find_below([tmp_path / "zoo", folder], text) is None
    assert name_parts(r"C:\a\..\b/c.png") == ("b", "c.png") and name_parts("/a//./b") == ("a", "b")
    assert name_parts("//a/b.png") == ("a", "b.png") and name_parts("../C:b.png") == ("b.png",)


def test_a_link_of_the_owner_s_is_followed(pictures, tmp_path):
    """Images often lie on another disk. What a table says leads out neither past such a link nor without one."""
    (tmp_path / "disk").mkdir()
    shutil.copy(pictures[0].file, tmp_path / "disk" / "a.png")
    project = tmp_path / "zoo"
    (project / "labeled-data").mkdir(parents=True)
    (project / "labeled-data" / "v").symlink_to(tmp_path / "disk", target_is_directory=True)
    rows = dict.fromkeys(["labeled-data/v/a.png", "labeled-data/v/../a.jpg"], pictures[0].points[:1])
    write_csv(project / "labeled-data" / "v" / "CollectedData_Ann.csv", rows)
    source = read_labels(project)
    assert [i.file for i in source.images] == [project / "labeled-data" / "v" / "a.png"]
    assert kinds(source) == {"rows whose image is not there": 1}


def test_a_table_with_a_row_that_is_no_path(pictures, tmp_path):
    rows = dict.fromkeys(["..", "C:"], pictures[0].points[:1])
    write_csv(tmp_path / "CollectedData_Ann.csv", rows)
    one_line(lambda: read_labels(tmp_path / "CollectedData_Ann.csv"), says="2 rows whose image is not there")


def test_yaml_that_grows(pictures, tmp_path):
    """A few lines that refer to each other stand for a million names, or for themselves."""
    file = tmp_path / "data.yaml"
    grown = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 7))
    letters = f"a: &a {'x' * 2000}\nb: [{', '.join(['*a'] * 1000)}]\n"
    for text in (grown, letters, "a: &a [*a]\n", "# \n" * LONGEST_YAML):
        file.write_text("kpt_shape: [17, 3]\n" + text)
        one_line(lambda: read_yaml(file), says=f"more than {LONGEST_YAML} characters")
        one_line(lambda: read_labels(file), says="not a readable YAML file")
    names = "kpt_shape: [2, 3]\ntrain: images/train\nn: &n [[a, b], [c]]\nnames: *n\nkpt_names: *n\nskeleton: [*n]\n"
    one = [p._replace(points=p.points[:, :2]) for p in pictures[:1]]
    source = read_labels(write_pose_folder(tmp_path, {"train": one}, settings=names))
    assert source.names == ("0", "1") and {a.category for a in source.animals} == {"class 0"}
    write_project(tmp_path / "zoo", pictures, row="labeled-data/{video}/{name}")
    config = tmp_path / "zoo" / "config.yaml"
    config.write_text(f"Task: t\nscorer: Ann\nvideo_sets: {{}}\nbodyparts: [[a], {', '.join(NAMES)}]\n")
    assert read_labels(tmp_path / "zoo").names == NAMES


def test_the_tables_of_two_scorers(pictures, tmp_path):
    some = first_only(pictures[:4])
    project = write_project(tmp_path / "zoo", some)
    write_csv(project / "labeled-data" / "cats" / "CollectedData_Aaron.csv", {"x.png": some[0].points}, names=NAMES[:2])
    source = read_labels(project)
    assert_same(source, some)  # Ann's, whom the config names
    assert kinds(source) == {"other tables of a folder, by other scorers": 1}


def test_a_damaged_table_costs_only_itself(pictures, tmp_path):
    some = first_only(pictures[:4])
    project = write_project(tmp_path / "zoo", some)
    (project / "labeled-data" / "cats" / "CollectedData_Ann.csv").write_bytes(b"scorer,\xff\xfe\x00")
    source = read_labels(project)
    assert_same(source, some[2:])
    assert kinds(source) == {"tables that cannot be read": 1}
    (project / "labeled-data" / "dogs" / "CollectedData_Ann.csv").write_text("scorer,Ann\nnose\n")
    one_line(lambda: read_labels(project), says="CollectedData_Ann.csv")


def test_without_labels_or_images(pictures, tmp_path):
    project = write_project(tmp_path / "zoo", first_only(pictures[:4]))
    for table in project.glob("labeled-data/*/*.csv"):
        table.unlink()
    one_line(lambda: read_labels(project), says="no table labeled-data/*/CollectedData_*.csv")
    empty = {"labeled-data/cats/a.jpg": np.zeros((1, 17, 3))}
    write_csv(project / "labeled-data" / "cats" / "CollectedData_Ann.csv", empty)
    one_line(lambda: read_labels(project), says="no labelled keypoint was found")
    (project / "config.yaml").write_text("a: [1\n")
    one_line(lambda: read_labels(project), says="not a readable YAML file")
    (project / "config.yaml").write_text("- a\n")
    one_line(lambda: read_labels(project), says="expected settings by name")


# ---- DeepLabCut's h5


def write_fixed(file: Path, columns: list[tuple], rows: list[tuple], values: np.ndarray) -> Path:
    """pandas' fixed layout, written by hand."""
    h5py = pytest.importorskip("h5py")

    def axis(group, name, items):
        group.attrs[f"{name}_nlevels"] = len(items[0])
        for level, parts in enumerate(zip(*items, strict=True)):
            known = sorted(set(parts))
            group[f"{name}_level{level}"] = np.array([part.encode() for part in known])
            group[f"{name}_label{level}"] = np.array([known.index(part) for part in parts], np.int8)

    with h5py.File(file, "w") as content:
        group = content.create_group("df_with_missing")
        group.attrs.update(pandas_type=np.bytes_("frame"), encoding=np.bytes_("UTF-8"), nblocks=1)
        axis(group, "axis0", columns)
        axis(group, "block0_items", columns)
        if len(rows[0]) == 1:
            group["axis1"] = np.array([row[0].encode() for row in rows])
        else:
            axis(group, "axis1", rows)
        group["block0_values"] = values
        group["block0_values"].attrs["transposed"] = 1
    return file


def write_records(
    file: Path, columns: list[tuple], rows: list[str], values: np.ndarray, kind: bytes | None = None
) -> Path:
    """pandas' table layout, written by hand. `kind`: the pickle of the columns."""
    h5py = pytest.importorskip("h5py")
    longest = max(map(len, rows))
    records = np.zeros(len(rows), [("index", f"S{longest}"), ("values_block_0", "f8", (len(columns),))])
    records["index"], records["values_block_0"] = [row.encode() for row in rows], values
    with h5py.File(file, "w") as content:
        group = content.create_group("df_with_missing")
        group.attrs.update(pandas_type=np.bytes_("frame_table"), encoding=np.bytes_("UTF-8"))
        group["table"] = records
        group["table"].attrs["values_block_0_kind"] = np.bytes_(kind or pickle.dumps(columns, 0))
    return file


def as_table(pictures, row="labeled-data/v/{}") -> tuple[list[tuple], list[str], np.ndarray]:
    columns = [("Ann", name, coord) for name in NAMES for coord in "xy"]
    values = np.array([np.where(p.points[0, :, 2:] > 0, p.points[0, :, :2], np.nan).ravel() for p in pictures])
    return columns, [row.format(p.file.name) for p in pictures], values


def images_into(folder: Path, pictures) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for p in pictures:
        shutil.copy(p.file, folder)
    return folder


@pytest.mark.parametrize("layout", ["fixed", "three parts", "table"])
def test_h5_without_csv(layout, pictures, tmp_path):
    some = first_only(pictures[:4])
    folder = images_into(tmp_path / "zoo" / "labeled-data" / "v", some)
    columns, rows, values = as_table(some)
    file = folder / "CollectedData_Ann.h5"
    if layout == "table":
        write_records(file, columns, rows, values)
    else:
        write_fixed(file, columns, [tuple(r.split("/")) if layout == "three parts" else (r,) for r in rows], values)
    assert_same(read_labels(file), some)
    assert_same(read_labels(tmp_path / "zoo"), some)
    write_csv(folder / "CollectedData_Ann.csv", {rows[0]: some[0].points})
    assert_same(read_labels(tmp_path / "zoo"), some[:1])  # the csv is preferred
    assert len(read_labels(file).images) == 4


def test_h5_of_several_animals(pictures, tmp_path):
    folder = images_into(tmp_path / "labeled-data" / "v", pictures[:1])
    columns = [("Ann", animal, name, coord) for animal in ("m1", "m2") for name in NAMES for coord in "xy"]
    points = pictures[0].points
    values = np.where(points[..., 2:] > 0, points[..., :2], np.nan).reshape(1, -1)
    file = write_fixed(folder / "CollectedData_Ann.h5", columns, [("labeled-data", "v", pictures[0].file.name)], values)
    assert_same(read_labels(file), pictures[:1])


@pytest.mark.parametrize("layout", ["fixed", "table"])
def test_h5_that_pandas_wrote(layout, pictures, tmp_path):
    pytest.importorskip("tables")
    import pandas as pd

    some = first_only(pictures[:4])
    folder = images_into(tmp_path / "labeled-data" / "v", some)
    columns, rows, values = as_table(some)
    values[:, 4:6] = np.round(np.nan_to_num(values[:, 4:6], nan=3))  # a second block, of integers
    index = pd.MultiIndex.from_tuples(columns, names=["scorer", "bodyparts", "coords"])
    frame = pd.DataFrame(values, columns=index, index=rows)
    frame = frame.astype({columns[4]: int, columns[5]: int})
    frame.to_hdf(folder / "CollectedData_Ann.h5", key="df_with_missing", mode="w", format=layout)
    table = read_stored_table(folder / "CollectedData_Ann.h5")
    order = [table.columns.index(column) for column in columns]
    assert np.array_equal(table.values[:, order], frame.to_numpy(float), equal_nan=True)
    assert table.rows == [(row,) for row in rows]
    assert len(read_labels(folder / "CollectedData_Ann.h5").images) == 4


class Program:
    """A pickle that is a program: it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_in_an_h5_is_not_run(pictures, tmp_path):
    folder = images_into(tmp_path / "labeled-data" / "v", pictures[:1])
    columns, rows, values = as_table(first_only(pictures[:1]))
    victim = tmp_path / "taken_over"
    evil = pickle.dumps([*columns[:-1], Program(victim)], 0)
    file = write_records(folder / "CollectedData_Ann.h5", columns, rows, values, kind=evil)
    for call in (lambda: read_labels(file), lambda: read_labels(tmp_path)):
        one_line(call, says="give the .csv instead")
    assert not victim.exists()
    with pytest.raises(FileExistsError):
        pickle.loads(evil), pickle.loads(evil)  # noqa: S301 (it is a program indeed)
    assert victim.exists()


def test_object_columns_in_an_h5_are_not_unpickled(tmp_path):
    """PyTables stores columns of Python objects as rows of pickles."""
    tables = pytest.importorskip("tables")
    import warnings

    import pandas as pd

    frame = pd.DataFrame({"a": [Program(tmp_path / "taken_over"), "b"]}, index=["x.png", "y.png"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tables.PerformanceWarning)
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)
        frame.to_hdf(tmp_path / "CollectedData_Ann.h5", key="df", mode="w")
    (tmp_path / "taken_over").rmdir() if (tmp_path / "taken_over").exists() else None
    one_line(lambda: read_labels(tmp_path / "CollectedData_Ann.h5"), says="give the .csv instead")
    assert not (tmp_path / "taken_over").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles(protocol, tmp_path):
    """Texts, numbers, lists and tuples are read; everything else is refused."""
    same = ("t", "é", "x" * 300)
    plain = [(0, [("Ann", "nose", "x"), ("Ann", "nose", "y")]), same, same, [], (), None, 7, -70000, 1.5, 2**70]
    assert plain_pickle(pickle.dumps(plain, protocol)) == plain
    for other in ({1}, b"bytes" if protocol > 2 else {1}, np.float64(1), Program(tmp_path), Path("x"), len):
        one_line(lambda other=other: plain_pickle(pickle.dumps(other, protocol)), says="names and numbers alone")
    one_line(lambda: plain_pickle(b""), says="pickle")
    one_line(lambda: plain_pickle(pickle.dumps(plain, protocol)[:-3]), says="pickle")
    one_line(lambda: plain_pickle(b"(lp0\nS'x'\nc"), says="pickle")


def test_h5_that_leads_elsewhere(pictures, tmp_path):
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(800))
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["x"] = np.zeros(3)
    with h5py.File(tmp_path / "link.h5", "w") as f:
        f["a"] = h5py.ExternalLink("other.h5", "/x")
    with h5py.File(tmp_path / "raw.h5", "w") as f:
        f.create_dataset("g/a", shape=(100,), dtype="f8", external=[(str(secret), 0, 800)])
    layout = h5py.VirtualLayout(shape=(3,), dtype="f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape=(3,))
    with h5py.File(tmp_path / "virtual.h5", "w") as f:
        f.create_virtual_dataset("a", layout)
    for name in ("link.h5", "raw.h5", "virtual.h5"):
        one_line(lambda name=name: read_labels(tmp_path / name), says="links to another file")


def test_h5_whose_group_holds_itself(pictures, tmp_path):
    """A second name of a group, inside of it: it is looked at once (and not for ever)."""
    h5py = pytest.importorskip("h5py")
    images_into(tmp_path / "labeled-data" / "v", pictures[:2])
    columns, rows, values = as_table(first_only(pictures[:2]))
    file = write_fixed(tmp_path / "CollectedData_Ann.h5", columns, [(row,) for row in rows], values)
    with h5py.File(file, "a") as f:
        group = f[next(iter(f))]
        group["again"] = group
        group["top"] = f["/"]
    assert_same(read_labels(file), first_only(pictures[:2]))


def test_h5_that_is_none(tmp_path, pictures):
    h5py = pytest.importorskip("h5py")
    file = tmp_path / "a.h5"
    file.write_bytes(b"\x89HDF\r\n\x1a\nhalf")
    one_line(lambda: read_labels(file), says="cut short")
    with h5py.File(file, "w") as f:
        f["tracks"], f["node_names"], f["track_occupancy"] = np.zeros(3), np.zeros(3), np.zeros(3)
    one_line(lambda: read_labels(file), says="predictions (SLEAP's analysis file)")
    with h5py.File(file, "w") as f:
        f["x"] = 1
    one_line(lambda: read_labels(file), says="expected a DeepLabCut project")
    columns = [("net", "nose", c) for c in ("x", "y", "likelihood")]
    write_fixed(file, columns, [("a.png",)], np.ones((1, 3)))
    one_line(lambda: read_labels(file), says="holds predictions")


def test_without_h5py(monkeypatch, pictures, tmp_path):
    file = tmp_path / "CollectedData_Ann.h5"
    file.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    one_line(lambda: read_labels(file), says='pip install "scarcenet[io]"')


# ---- Lightning Pose


def test_lightning_pose(pictures, tmp_path):
    some = first_only(pictures[:5])
    images_into(tmp_path / "labeled-data", some)
    rows = {f"labeled-data/{p.file.name}": p.points for p in some}
    file = write_csv(tmp_path / "CollectedData.csv", rows, scorer="rick")
    (tmp_path / "config_mirror-mouse.yaml").write_text("data:\n  num_keypoints: 17\n")
    for path in (file, tmp_path):
        source = read_labels(path)
        assert_same(source, some)
        assert source.tool == "Lightning Pose csv" and source.skeleton == () and source.flip_pairs is None
        assert [i.name for i in source.images] == [p.file.name for p in some]
    write_csv(tmp_path / "CollectedData_new.csv", rows)
    assert len(read_labels(tmp_path).images) == 5
    file.rename(tmp_path / "CollectedData_top.csv")
    one_line(lambda: read_labels(tmp_path), says="CollectedData_new.csv, CollectedData_top.csv; give one")


def test_predictions_are_no_labels(tmp_path):
    text = "scorer,net,net,net\nbodyparts,nose,nose,nose\ncoords,x,y,likelihood\n0,1,2,0.9\n"
    (tmp_path / "clipDLC_resnet50.csv").write_text(text)
    one_line(lambda: read_labels(tmp_path / "clipDLC_resnet50.csv"), says="holds predictions")
    (tmp_path / "x.analysis.csv").write_text("track,frame_idx,instance.score,nose.x,nose.y,nose.score\n")
    one_line(lambda: read_labels(tmp_path / "x.analysis.csv"), says="holds predictions")


# ---- SLEAP


@pytest.fixture
def sio():
    return pytest.importorskip("sleap_io")


def skeleton_of(sio, names=NAMES, symmetric=True):
    pairs = [(a, b) for a, b in PAIRS if a in names and b in names]
    bones = [(a, b) for a, b in BONES if a in names and b in names]
    return sio.Skeleton(nodes=list(names), edges=bones, symmetries=pairs if symmetric else [])


def instances_of(sio, picture, skeleton, names=NAMES):
    order = [NAMES.index(name) for name in names]
    xy = np.where(picture.points[..., 2:] > 0, picture.points[..., :2], np.nan)[:, order]
    return [sio.Instance.from_numpy(points, skeleton=skeleton) for points in xy]


def image_labels(sio, pictures, names=NAMES, symmetric=True):
    """Labels on a list of image files, as SLEAP makes of a folder of images."""
    skeleton = skeleton_of(sio, names, symmetric)
    video = sio.Video.from_filename([str(p.file) for p in pictures])
    frames = [
        sio.LabeledFrame(video=video, frame_idx=n, instances=instances_of(sio, p, skeleton, names))
        for n, p in enumerate(pictures)
    ]
    return sio.Labels(frames)


def write_video(file: Path, frames: int = 12, size: tuple[int, int] = (80, 60)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    for n in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 * n, np.uint8))
    writer.release()
    return file


@pytest.mark.parametrize("order", [1, -1])
def test_sleap_images(order, sio, pictures, tmp_path):
    some, names = pictures[:4], NAMES[::order]
    local = [p._replace(file=images_into(tmp_path / "images", [p]) / p.file.name) for p in some]
    file = tmp_path / "labels.slp"
    image_labels(sio, local, names).save(str(file), verbose=False)
    source = read_labels(file)
    assert_same(source, some, names=names)
    assert source.tool == "SLEAP labels" and source.findings == ()
    named = [(names[a], names[b]) for a, b in source.skeleton]
    assert named == BONES
    assert {frozenset((names[a], names[b])) for a, b in source.flip_pairs} == {frozenset(pair) for pair in PAIRS}
    assert [i.file for i in source.images] == [p.file for p in local]
    assert {i.group for i in source.images} == {"images"}
    assert read_labels(tmp_path).images == source.images  # the only labels in the folder
    # on another computer: the longest end of each path that is there
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "images", moved / "images")
    shutil.move(file, moved / "labels.slp")
    assert_same(read_labels(moved / "labels.slp"), some, names=names)


def test_sleap_package(sio, pictures, tmp_path):
    some = pictures[:4]
    file = tmp_path / "labels.pkg.slp"
    image_labels(sio, some, symmetric=False).save(str(file), embed="user", verbose=False)
    source = read_labels(file)
    assert_same(source, some)
    assert source.flip_pairs is None
    for image, picture in zip(source.images, some, strict=True):
        assert image.file is None and image.video is None
        assert np.array_equal(image.pixels(), cv2.imread(str(picture.file))[..., ::-1])


def test_sleap_video(sio, pictures, tmp_path):
    """Two animals in a frame, predictions, points that are not visible, negative and suggested frames, two videos."""
    skeleton = skeleton_of(sio)
    cats, other = (write_video(tmp_path / "videos" / name / "clip.mp4") for name in ("a", "b"))
    video, second = sio.Video.from_filename(str(cats)), sio.Video.from_filename(str(other))
    two = instances_of(sio, pictures[0], skeleton)
    two[0].points["visible"][2] = False
    two[0].points["xy"][2] = (5, 6)
    predicted = sio.PredictedInstance.from_numpy(np.ones((17, 2)), skeleton=skeleton)
    empty = sio.Instance.from_numpy(np.full((17, 2), np.nan), skeleton=skeleton)
    labels = sio.Labels(
        [
            sio.LabeledFrame(video=video, frame_idx=3, instances=[*two, predicted]),
            sio.LabeledFrame(video=video, frame_idx=4, instances=[predicted]),
            sio.LabeledFrame(video=video, frame_idx=5, instances=[], is_negative=True),
            sio.LabeledFrame(video=video, frame_idx=6, instances=[empty]),
            sio.LabeledFrame(video=second, frame_idx=3, instances=instances_of(sio, pictures[1], skeleton)),
        ]
    )
    labels.suggestions = [sio.SuggestionFrame(video, 8), sio.SuggestionFrame(video, 3)]
    file = tmp_path / "labels.slp"
    labels.save(str(file), verbose=False)
    source = read_labels(file)
    assert [(i.video, i.frame) for i in source.images] == [(cats, 3), (cats, 5), (cats, 6), (other, 3), (cats, 8)]
    assert [i.name for i in source.images][2:4] == ["clip/frame000006.png", "clip~2/frame000003.png"]
    assert [i.group for i in source.images] == ["clip"] * 3 + ["clip~2", "clip"]
    assert source.videos == (cats, other)
    assert [a.image for a in source.animals] == [0, 0, *[3] * len(pictures[1].points)]
    assert source.animals[0].visible[2] == 0 and not source.animals[0].xy[2].any()
    assert kinds(source) == {
        "predicted animals": 2,
        "points marked as not visible": 1,
        "animals without any labelled point": 1,
    }
    # the package of the same labels: pixels inside, the same frames
    package = tmp_path / "inside" / "labels.pkg.slp"
    package.parent.mkdir()
    labels.save(str(package), embed="user+suggestions", verbose=False)
    inside = read_labels(package)
    assert {(i.group, i.frame) for i in source.images} - {("clip", 6)} <= {(i.group, i.frame) for i in inside.images}
    shown = next(i for i in inside.images if i.frame == 3 and i.group == "clip")
    assert shown.pixels().shape == (60, 80, 3) and abs(int(shown.pixels().mean()) - 60) < 6


@pytest.mark.parametrize(("home", "kept"), [("m1", 0), ("m2", 1), ("all", None)])
def test_sleap_videos_of_one_name_of_which_one_is_there(home, kept, sio, pictures, tmp_path):
    """Labels of m1/cam.mp4 and m2/cam.mp4: one cam.mp4 beside them is not both."""
    skeleton = skeleton_of(sio)
    files = [write_video(tmp_path / "lab" / name / "cam.mp4") for name in ("m1", "m2")]
    videos = [sio.Video.from_filename(str(file)) for file in files]
    frames = [
        sio.LabeledFrame(video=v, frame_idx=3 + n, instances=instances_of(sio, pictures[n], skeleton))
        for n, v in enumerate(videos)
    ]
    labels = sio.Labels(frames)
    there = write_video(tmp_path / "moved" / home / "cam.mp4")
    labels.save(str(there.with_name("labels.slp")), verbose=False)
    if kept is None:
        one_line(lambda: read_labels(there.with_name("labels.slp")), says="put each into its own folder")
        return
    source = read_labels(there.with_name("labels.slp"))
    assert [(i.video, i.frame) for i in source.images] == [(there, 3 + kept)]
    assert len(source.animals) == len(pictures[kept].points)
    assert kinds(source) == {"frames whose image or video is not there": 1} and source.videos == (there,)
    assert f"m{2 - kept}/cam.mp4 (another video has the same name" in source.findings[0].first[0]
    both = tmp_path / "both" / "labels.slp"
    shutil.copytree(tmp_path / "lab", both.parent)
    labels.save(str(both), verbose=False)
    assert len(read_labels(both).images) == 2 and read_labels(both).findings == ()


def test_sleap_lists_of_images_of_one_name(sio, pictures, tmp_path):
    lab = [images_into(tmp_path / "lab" / name, [pictures[0]]) / pictures[0].file.name for name in ("m1", "m2")]
    skeleton = skeleton_of(sio)
    frames = [
        sio.LabeledFrame(
            video=sio.Video.from_filename([str(file)]), frame_idx=0, instances=instances_of(sio, pictures[0], skeleton)
        )
        for file in lab
    ]
    images_into(tmp_path / "moved", [pictures[0]])
    sio.Labels(frames).save(str(tmp_path / "moved" / "labels.slp"), verbose=False)
    one_line(lambda: read_labels(tmp_path / "moved" / "labels.slp"), says="put each into its own folder")


def test_sleap_without_its_video(sio, pictures, tmp_path):
    skeleton = skeleton_of(sio)
    clip = write_video(tmp_path / "away" / "clip.mp4")
    frame = sio.LabeledFrame(
        video=sio.Video.from_filename(str(clip)), frame_idx=3, instances=instances_of(sio, pictures[0], skeleton)
    )
    file = tmp_path / "project" / "labels.slp"
    file.parent.mkdir()
    sio.Labels([frame]).save(str(file), verbose=False)
    text = one_line(lambda: read_labels(file), says="is not below")  # it is there, but outside
    assert "clip.mp4" in text and "labels package" in text
    (file.parent / "clip.mp4").symlink_to(clip)
    assert read_labels(file).images[0].video == file.parent / "clip.mp4"


def test_sleap_leads_to_no_other_file(sio, pictures, tmp_path):
    """A file that says its images are embedded in another one, or in a file at an absolute path."""
    h5py = pytest.importorskip("h5py")
    package, other = tmp_path / "project" / "labels.pkg.slp", tmp_path / "other.pkg.slp"
    package.parent.mkdir()
    for file in (package, other):
        image_labels(sio, pictures[:2]).save(str(file), embed="user", verbose=False)
    with h5py.File(package, "a") as f:
        video = json.loads(f["videos_json"][0])
        video["backend"]["filename"] = str(other)
        del f["videos_json"], f["video0"]
        f["videos_json"] = np.array([json.dumps(video)], object)
    one_line(lambda: read_labels(package), says="is not below")
    with h5py.File(package, "a") as f:
        f["video0"] = h5py.ExternalLink(str(other), "/video0")
    one_line(lambda: read_labels(package), says="links to another file")


def test_sleap_stack_of_images(sio, pictures, tmp_path):
    """Images in an HDF5 file of their own, grey, of another type."""
    h5py = pytest.importorskip("h5py")
    stack = np.random.default_rng(0).integers(0, 255, (4, 60, 80, 1), np.uint8)
    with h5py.File(tmp_path / "stack.h5", "w") as f:
        f["box"] = stack
    video = sio.Video.from_filename(str(tmp_path / "stack.h5"), dataset="box", input_format="channels_last")
    instances = instances_of(sio, pictures[0], skeleton_of(sio))
    file = tmp_path / "labels.slp"
    sio.Labels([sio.LabeledFrame(video=video, frame_idx=2, instances=instances)]).save(str(file), verbose=False)
    (image,) = read_labels(file).images
    assert image.name == "stack/frame000002.png" and image.file is None and image.video is None
    assert np.array_equal(image.pixels(), np.repeat(stack[2], 3, axis=2))
    (tmp_path / "b").mkdir()
    shutil.copy(file, tmp_path / "b")
    (tmp_path / "b" / "stack.h5").write_bytes((tmp_path / "stack.h5").read_bytes()[:3000])
    one_line(lambda: read_labels(tmp_path / "b" / "labels.slp"), says="stack.h5")


def test_sleap_of_other_skeletons(sio, pictures, tmp_path):
    images_into(tmp_path, pictures[:3])
    local = [p._replace(file=tmp_path / p.file.name) for p in pictures[:3]]
    labels = image_labels(sio, local)
    other = sio.Skeleton(nodes=["wing", "beak"])
    labels.labeled_frames[0].instances.append(sio.Instance.from_numpy(np.ones((2, 2)), skeleton=other))
    labels.skeletons.append(other)
    labels.save(str(tmp_path / "labels.slp"), verbose=False)
    source = read_labels(tmp_path / "labels.slp")
    assert_same(source, pictures[:3])
    assert kinds(source) == {"animals with another skeleton": 1}


def test_sleap_without_labels(sio, pictures, tmp_path):
    skeleton = skeleton_of(sio)
    predicted = sio.PredictedInstance.from_numpy(np.ones((17, 2)), skeleton=skeleton)
    video = sio.Video.from_filename([str(pictures[0].file)])
    frame = sio.LabeledFrame(video=video, frame_idx=0, instances=[predicted])
    file = tmp_path / "labels.slp"
    sio.Labels([frame]).save(str(file), verbose=False)
    one_line(lambda: read_labels(file), says="no human labels (1 predicted animals)")
    file.write_bytes(file.read_bytes()[:2000])
    one_line(lambda: read_labels(file), says="labels.slp")
    file.write_text("{}")
    one_line(lambda: read_labels(file), says="not a readable HDF5 file")
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as f:
        f["x"] = 1
    one_line(lambda: read_labels(file), says="not a SLEAP labels file")
    with h5py.File(file, "w") as f:
        f.create_group("metadata").attrs["json"] = "{broken"
    one_line(lambda: read_labels(file), says="could not be read")


def test_without_sleap_io(monkeypatch, tmp_path):
    (tmp_path / "labels.slp").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "sleap_io", None)
    one_line(lambda: read_labels(tmp_path / "labels.slp"), says='pip install "scarcenet[io]"')


# ---- Label Studio


def label_studio_task(picture: Picture, number: int, image: str, parents=True, boxes=True, size=True) -> dict:
    """One task as Label Studio exports it: rectangles, and keypoints under them."""
    height, width = cv2.imread(str(picture.file)).shape[:2]
    scale = 100 / np.array([width, height])
    stated = dict(original_width=width, original_height=height, image_rotation=0) if size else {}
    result = []
    for n, (points, box, category) in enumerate(zip(picture.points, picture.boxes, picture.categories, strict=True)):
        (x, y), (w, h) = box[:2] * scale, box[2:] * scale
        value = dict(x=x, y=y, width=w, height=h, rotation=0, rectanglelabels=[category])
        if boxes:
            common = dict(from_name="box", to_name="img", origin="manual", **stated)
            result.append(dict(id=f"r{n}", type="rectanglelabels", value=value, **common))
        for k, (px, py, flag) in enumerate(points):
            x, y = (px + 0.5) * scale[0], (py + 0.5) * scale[1]  # 0 % is the edge of the first pixel, not its centre
            value = dict(x=x, y=y, width=0.4, keypointlabels=[NAMES[k]])
            item = dict(id=f"k{n}-{k}", type="keypointlabels", value=value, from_name="kp", to_name="img", **stated)
            if flag:
                result.append(item | (dict(parentID=f"r{n}") if parents else {}))
    annotation = dict(id=number, completed_by=1, was_cancelled=False, ground_truth=False, result=result)
    return dict(id=number, data=dict(img=image), annotations=[annotation], predictions=[], project=1)


def write_tasks(folder: Path, tasks: list) -> Path:
    file = folder / "project-1-at-2024.json"
    file.write_text(json.dumps(tasks))
    return file


LABEL_STUDIO_PATHS = [
    "/data/upload/1/3f2a91bc-{}",
    "/data/local-files/?d=mice%2F{}",
    "s3://bucket/mice/{}",
    "https://example.org/mice/{}?token=1",
    "mice/{}",
]


def all_points(pictures) -> list[Picture]:
    """As if all keypoints were labelled, so that the order of the names is known."""
    return [p._replace(points=np.where(p.points[..., 2:] > 0, p.points, [7.0, 9.0, 2.0])) for p in pictures]


@pytest.mark.parametrize("path", LABEL_STUDIO_PATHS)
@pytest.mark.parametrize("folder", ["", "images", "mice"])
def test_label_studio(path, folder, pictures, tmp_path):
    some = all_points(pictures[:3])
    images_into(tmp_path / folder, some)
    tasks = [label_studio_task(p, n, path.format(p.file.name), size=n > 0) for n, p in enumerate(some)]
    source = read_labels(write_tasks(tmp_path, tasks))
    assert_same(source, some, boxes=True, tolerance=1e-9)
    assert source.tool == "Label Studio export" and source.findings == ()
    assert [a.category for a in source.animals] == [c for p in some for c in p.categories]
    assert [i.file.name for i in source.images] == [p.file.name for p in some]
    assert read_labels(tmp_path).images == source.images


def test_label_studio_uploads_with_their_prefix(pictures, tmp_path):
    some = all_points(pictures[:2])
    for p in some:
        shutil.copy(p.file, tmp_path / f"3f2a91bc-{p.file.name}")
    tasks = [label_studio_task(p, n, f"/data/upload/1/3f2a91bc-{p.file.name}") for n, p in enumerate(some)]
    assert_same(read_labels(write_tasks(tmp_path, tasks)), some, boxes=True, tolerance=1e-9)
    assert task_path({"data": {"text": "hello", "image": "/data/upload/1/a%20b.JPG"}}) == "/data/upload/1/a b.JPG"
    assert task_path({"data": {}, "file_upload": "a.png"}) == "a.png" and task_path({"data": None}) == ""


def test_label_studio_whose_keypoint_is_it(pictures, tmp_path):
    """By a relation, by the only rectangle, by the only rectangle around it; one animal where there is none."""
    two, one = all_points(pictures[:1])[0], all_points(first_only(pictures[1:2]))[0]
    images_into(tmp_path, [two, one])
    related = label_studio_task(two, 1, two.file.name, parents=False)
    result = related["annotations"][0]["result"]
    for item in [i for i in result if i["type"] == "keypointlabels"]:
        result.append(dict(type="relation", from_id=item["id"], to_id=f"r{item['id'][1]}", direction="right"))
    only = label_studio_task(one, 2, one.file.name, parents=False)
    assert_same(read_labels(write_tasks(tmp_path, [related, only])), [two, one], boxes=True, tolerance=1e-9)
    bare = label_studio_task(one, 2, one.file.name, parents=False, boxes=False)
    assert_same(read_labels(write_tasks(tmp_path, [bare])), [one], tolerance=1e-9)
    apart = two._replace(
        boxes=np.array([[0, 0, 40, 40], [60, 0, 40, 40.0]]),
        points=np.stack([np.tile([20.0, 20, 2], (17, 1)), np.tile([80.0, 20, 2], (17, 1))]),
    )
    inside = label_studio_task(apart, 1, two.file.name, parents=False)
    assert_same(read_labels(write_tasks(tmp_path, [inside])), [apart], boxes=True, tolerance=1e-9)
    mixed = label_studio_task(two, 1, two.file.name, parents=False, boxes=False)
    source = read_labels(write_tasks(tmp_path, [mixed, bare]))
    assert len(source.images) == 2 and [a.image for a in source.animals] == [1]
    assert list(kinds(source).values()) == [1] and "no rectangles that tell them apart" in source.findings[0].kind


def test_label_studio_odd_tasks(pictures, tmp_path):
    some = all_points(pictures[:6])
    images_into(tmp_path, some)
    tasks = [label_studio_task(p, n, p.file.name) for n, p in enumerate(some)]
    tasks[1]["annotations"] = []  # not labelled
    tasks[2]["annotations"][0]["was_cancelled"] = True  # skipped by the labeller
    better = json.loads(json.dumps(tasks[3]["annotations"][0])) | dict(ground_truth=True)
    better["result"] = [r for r in better["result"] if r.get("parentID") == "r0" or r["id"] == "r0"]
    tasks[3]["annotations"].append(better)
    tasks[4]["annotations"][0]["result"][1]["image_rotation"] = 90
    tasks[5]["annotations"][0]["result"][1]["value"] = {"keypointlabels": ["nose"]}
    tasks[5]["annotations"][0]["result"].append(dict(id="x", type="keypointlabels", value=dict(x=1, y=1)))
    tasks[5]["annotations"][0]["result"].append(dict(id="y", type="choices", value=dict(choices=["blurred"])))
    tasks += [label_studio_task(some[0], 7, "gone.jpg"), 5, dict(data=5, annotations=3)]
    source = read_labels(write_tasks(tmp_path, tasks))
    assert len(source.images) == 6 and not {1, 2, 4} & {a.image for a in source.animals}
    assert [a.image for a in source.animals].count(3) == 1
    assert kinds(source) == {
        "further annotations of the same image": 1,
        "images that were turned in Label Studio": 1,
        "regions without a place": 1,
        "keypoints without a name": 1,
        "tasks whose image is not there": 3,
    }


def test_label_studio_turned_rectangles_and_boxes_without_keypoints(pictures, tmp_path):
    picture = all_points(first_only(pictures[:1]))[0]
    height, width = cv2.imread(str(picture.file)).shape[:2]
    images_into(tmp_path, [picture])
    task = label_studio_task(picture, 1, picture.file.name)
    value = task["annotations"][0]["result"][0]["value"]
    value.update(x=50, y=50, width=20, height=10, rotation=90)
    other = dict(x=1, y=2, width=3, height=4, rotation=0, rectanglelabels=["rat"])
    task["annotations"][0]["result"].append(dict(id="other", type="rectanglelabels", value=other))
    first, second = read_labels(write_tasks(tmp_path, [task])).animals
    assert np.allclose(first.box, (width / 2 - height / 10, height / 2, height / 10, width / 5))
    assert second.category == "rat" and not second.visible.any()
    assert np.allclose(second.box, (width / 100, height / 50, 3 * width / 100, height / 25))


def turned_copy(picture: Picture, file: Path) -> None:
    """The picture as a camera would have stored it that was held upright: turned, with EXIF orientation 6."""
    image, exif = Image.open(picture.file).rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def test_label_studio_exif(pictures, tmp_path):
    """Percentages are of the image as the browser shows it."""
    picture = next(p for p in all_points(first_only(pictures)) if len(set(cv2.imread(str(p.file)).shape[:2])) == 2)
    turned_copy(picture, tmp_path / picture.file.name)
    source = read_labels(write_tasks(tmp_path, [label_studio_task(picture, 1, picture.file.name)]))
    assert source.images[0].upright
    assert_same(source, [picture], boxes=True, tolerance=1e-9)


def test_sizes_in_headers(pictures, tmp_path, monkeypatch):
    """A turned TIFF is handed out upright, and a size is read without decoding."""
    picture = next(p for p in pictures if len(set(cv2.imread(str(p.file)).shape[:2])) == 2)
    height, width = cv2.imread(str(picture.file)).shape[:2]
    turned_copy(picture, tmp_path / "a.png")
    turned_copy(picture, tmp_path / "a.tif")
    cv2.imwrite(str(tmp_path / "plain.png"), cv2.imread(str(picture.file)))
    for upright in (False, True):
        assert read_image(tmp_path / "a.tif", upright=upright).shape[:2] == (height, width)

    decoded = []

    def load(self):
        decoded.append(self.filename)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert image_size(tmp_path / "a.png") == ((height, width), (width, height))  # width first
    for name in ("a.tif", "plain.png"):
        assert image_size(tmp_path / name) == ((width, height), (width, height))
    assert image_size(tmp_path / "gone.png") is None and decoded == []
    root = write_pose_folder(tmp_path / "set", {"train": [picture]}, settings="kpt_shape: [17, 3]\n")
    next((root / "images" / "train").iterdir()).unlink()
    turned_copy(picture, (root / "images" / "train" / picture.file.name).with_suffix(".tif"))
    assert_same(replace(read_labels(root), names=NAMES), [picture], flags="as in the file", boxes=True, tolerance=1e-9)


def test_label_studio_of_two_images_with_one_name(pictures, tmp_path):
    picture = pictures[0]
    for folder in ("a", "b"):
        images_into(tmp_path / folder, [picture])
    task = label_studio_task(picture, 1, f"/data/upload/1/3f2a91bc-{picture.file.name}")
    one_line(lambda: read_labels(write_tasks(tmp_path, [task])), says="is that of several files")
    minimum = [dict(id=1, annotator=1, annotation_id=1, image="a.jpg", kp=[])]
    one_line(lambda: read_labels(write_tasks(tmp_path, minimum)), says="JSON-MIN")


# ---- Ultralytics


def write_pose_folder(root: Path, parts: dict[str, list[Picture]], style="images/{}", settings="", numbers=3) -> Path:
    """A pose folder; `style`: where a split's images are, `numbers` of each keypoint."""
    for split, pictures in parts.items():
        images_into(root / style.format(split), pictures)
        labels = root / style.replace("images", "labels").format(split)
        labels.mkdir(parents=True, exist_ok=True)
        for p in pictures:
            height, width = cv2.imread(str(p.file)).shape[:2]
            size, lines = np.array([width, height]), []
            for points, box in zip(p.points, p.boxes, strict=True):
                shares = points.copy()
                shares[:, :2] /= size
                row = [*((box[:2] + box[2:] / 2) / size), *(box[2:] / size), *shares[:, :numbers].ravel()]
                lines.append(" ".join(["0", *map(repr, map(float, row))]))
            (labels / p.file.name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(settings)
    return root


FLIP = "flip_idx: [1, 0, 2, 3, 4, 8, 9, 10, 5, 6, 7, 14, 15, 16, 11, 12, 13]\n"


@pytest.mark.parametrize(
    ("style", "train"),
    [
        ("images/{}", "path: ../datasets/zoo\ntrain: images/train\nval: images/val\ntest:\n"),
        ("{}/images", "train: ../train/images\nval: ../val/images\n"),
        ("{}/images", "path: /content/zoo\ntrain: train/images\nval: val/images\n"),
        ("images/{}", "train: [images/train]\nval: list.txt\n"),
        ("images/{}", ""),
        ("{}/images", ""),
    ],
)
def test_ultralytics(style, train, pictures, tmp_path):
    settings = train + FLIP + "kpt_shape: [17, 3]\nnames:\n  0: animal\n"
    root = write_pose_folder(tmp_path, {"train": pictures[:3], "val": pictures[3:5]}, style, settings)
    folder = root / style.format("val")
    (root / "list.txt").write_text("\n".join(f"./images/val/{p.file.name}" for p in pictures[3:5]) + "\n./gone.jpg\n")
    source = read_labels(root)
    order = sorted(pictures[:3], key=lambda p: p.file.name) + sorted(pictures[3:5], key=lambda p: p.file.name)
    if "list.txt" in train:
        order[3:] = pictures[3:5]
    assert source.names == tuple(map(str, range(17)))
    assert_same(replace(source, names=NAMES), order, flags="as in the file", boxes=True, tolerance=1e-9)
    assert source.flip_pairs == AP10K.flip_pairs and source.tool == "Ultralytics pose folder"
    assert [i.split for i in source.images] == ["train"] * 3 + ["val"] * 2
    assert kinds(source)["files without names of the keypoints"] == 1 and folder.is_dir()
    assert {a.category for a in source.animals} == {"animal"}
    assert read_labels(root / "data.yaml").images == source.images


def test_ultralytics_names_and_two_numbers(pictures, tmp_path):
    names = "kpt_names:\n  0: [" + ", ".join(NAMES) + "]\n"
    bones = f"skeleton: {[list(edge) for edge in AP10K.skeleton]}\n"
    settings = "train: images/train\nkpt_shape: [17, 2]\nnames: [animal]\n" + names + bones
    seen = [p._replace(points=p.points * (p.points[..., 2:] > 0)) for p in pictures[:3]]
    root = write_pose_folder(tmp_path, {"train": seen}, settings=settings, numbers=2)
    source = read_labels(root)
    assert_same(source, sorted(seen, key=lambda p: p.file.name), boxes=True, tolerance=1e-9)
    assert source.flip_pairs is None and source.skeleton == AP10K.skeleton and source.findings == ()


def test_ultralytics_odd_lines(pictures, tmp_path):
    settings = (
        "train: images/train\nval: images/val\nkpt_shape: [17, 3]\nflip_idx: [1, 2, 0]\nnames: {0: cat, 1: dog}\n"
    )
    some = sorted(pictures[:5], key=lambda p: p.file.name)
    root = write_pose_folder(tmp_path, {"train": some}, settings=settings)
    labels = [root / "labels" / "train" / f"{p.file.stem}.txt" for p in some]
    labels[0].unlink()  # no label file: an unlabelled image
    labels[1].write_text("")  # background
    labels[2].write_text("1 0.5 0.5 0.25 0.5\n1 0.5 0.5\nx y\n0 nan 0.5 0.2 0.2\n\n0 0.5 0.5 0 0" + " 0.5 0.5 1" * 17)
    (root / "images" / "train" / "broken.jpg").write_text("no image")
    source = read_labels(root)
    assert len(source.images) == 5
    box, points = [a for a in source.animals if a.image == 2]
    height, width = cv2.imread(str(some[2].file)).shape[:2]
    assert np.allclose(box.box, (width * 0.375, height / 4, width / 4, height / 2)) and box.category == "dog"
    assert not box.visible.any() and points.box is None and (points.visible == 1).all()
    assert np.allclose(points.xy, (width / 2, height / 2))
    assert source.flip_pairs is None and kinds(source) == {
        "files without names of the keypoints": 1,
        "flip_idx that do not exchange 17 keypoints": 1,
        "folders of images that are not there": 1,
        "lines that are not an animal": 3,
        "images that cannot be read": 1,
    }


def test_ultralytics_exif(pictures, tmp_path):
    picture = next(p for p in pictures if len(set(cv2.imread(str(p.file)).shape[:2])) == 2)
    root = write_pose_folder(tmp_path, {"train": [picture]}, settings="train: images/train\nkpt_shape: [17, 3]\n")
    turned_copy(picture, root / "images" / "train" / picture.file.name)
    source = read_labels(root)
    assert source.images[0].upright
    assert_same(replace(source, names=NAMES), [picture], flags="as in the file", boxes=True, tolerance=1e-9)


def test_ultralytics_settings_that_are_none(pictures, tmp_path):
    root = write_pose_folder(tmp_path, {"train": pictures[:1]}, settings="kpt_shape: 17\n")
    one_line(lambda: read_labels(root), says="expected kpt_shape: [keypoints, 2 or 3], got 17")
    label = next((root / "labels").rglob("*.txt"))
    one_line(lambda: read_labels(label), says="give the folder with data.yaml")
    (root / "data.yaml").write_text("train: images/train\nnames: [a]\n")
    one_line(lambda: read_labels(root / "data.yaml"), says="no kpt_shape")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "data.yaml").write_text("train: images/train\nkpt_shape: [17, 3]\n")
    one_line(lambda: read_labels(empty), says="no image found")


# ---- COCO


def test_coco_folder(zoo, pictures, tmp_path):
    source = read_labels(zoo)
    assert source.tool == "COCO keypoints" and source.names == NAMES
    assert source.flip_pairs == AP10K.flip_pairs and source.skeleton == AP10K.skeleton and source.sigmas == AP10K.sigmas
    splits = [i.split for i in source.images]
    assert {s: splits.count(s) for s in set(splits)} == {"train": 24, "val": 6, "test": 6}
    rows = {i.file.name: n for n, i in enumerate(source.images)}
    for picture in pictures:
        animals = [a for a in source.animals if a.image == rows[picture.file.name]]
        for animal, points, box, category in zip(
            animals, picture.points, picture.boxes, picture.categories, strict=True
        ):
            assert np.allclose(animal.xy, points[:, :2] * (points[:, 2:] > 0), atol=1e-4)
            assert np.array_equal(animal.visible, points[:, 2]) and np.allclose(animal.box, box)
            assert animal.category == category and animal.family
    one = read_labels(zoo / "annotations" / "ap10k-val-split1.json")
    assert len(one.images) == 6 and {i.split for i in one.images} == {""}


def write_coco(folder: Path, pictures, *, name="_annotations.coco.json", names=NAMES, box=True) -> Path:
    images_into(folder, pictures)
    images, annotations = [], []
    for n, p in enumerate(pictures):
        height, width = cv2.imread(str(p.file)).shape[:2]
        images.append(dict(id=n, file_name=p.file.name, width=width, height=height))
        for points, own in zip(p.points, p.boxes, strict=True):
            flat = points[[NAMES.index(name) for name in names]].ravel().tolist()
            entry = dict(id=len(annotations) + 1, image_id=n, category_id=1, keypoints=flat, iscrowd=0)
            annotations.append(entry | (dict(bbox=own.tolist()) if box else {}))
    category = dict(id=1, name="animal", supercategory="none", keypoints=list(names), skeleton=[[1, 2]])
    file = folder / name
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=[category])))
    return file


def test_coco_of_roboflow(pictures, tmp_path):
    """Folders train, valid and test; copies of one image that the tool made are kept together."""
    for folder, some in (("train", pictures[:3]), ("valid", pictures[3:4])):
        write_coco(tmp_path / folder, some)
    file = tmp_path / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    for n, entry in enumerate(content["images"]):
        new = f"clip_01_jpg.rf.{n}a7c.jpg"
        (file.parent / entry["file_name"]).rename(file.parent / new)
        entry["file_name"] = new
    file.write_text(json.dumps(content))
    source = read_labels(tmp_path)
    assert [i.split for i in source.images] == ["train"] * 3 + ["val"]
    assert [i.group for i in source.images] == ["clip_01_jpg"] * 3 + [""]
    assert_same(source, pictures[:4], flags="as in the file", boxes=True, tolerance=1e-4)


def test_coco_boxes_are_the_file_s(pictures, tmp_path):
    file = write_coco(tmp_path, pictures[:2], name="person_keypoints_default.json", box=False)
    source = read_labels(file)
    assert all(a.box and a.box_source == "keypoints" for a in source.animals)
    assert {a.box_source for a in read_labels(write_coco(tmp_path / "boxes", pictures[:2])).animals} == {"file"}
    (tmp_path / pictures[1].file.name).unlink()
    source = read_labels(file)
    assert len(source.images) == 1 and kinds(source)["images that are not there"] == 1


def test_coco_in_the_frame_that_its_size_fits(pictures, tmp_path):
    """An image with a quarter turn: the stated size says in which frame the keypoints are, whatever was asked."""
    picture = next(p for p in pictures if len(set(cv2.imread(str(p.file)).shape[:2])) == 2)
    file = write_coco(tmp_path, [picture], name="train.json")
    turned_copy(picture, tmp_path / picture.file.name)
    for asked in (False, True):
        assert [i.upright for i in read_labels(file, upright=asked).images] == [True]
    content = json.loads(file.read_text())
    (entry,) = content["images"]
    entry["width"], entry["height"] = entry["height"], entry["width"]
    file.write_text(json.dumps(content))
    for asked in (False, True):
        assert [i.upright for i in read_labels(file, upright=asked).images] == [False]


def test_coco_splits_with_other_keypoints(pictures, tmp_path):
    write_coco(tmp_path / "train", pictures[:2])
    write_coco(tmp_path / "valid", pictures[2:3], names=NAMES[:3])
    text = one_line(lambda: read_labels(tmp_path), says="got the 3 keypoints left_eye, right_eye, nose")
    assert "two sets" in text


# ---- what is none of these


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("labels.zip", "", "unpack"),
        ("labels.tar.gz", "", "unpack"),
        ("Documentation_data.pickle", "", "pickle"),
        ("x.pkl", "", "pickle"),
        ("clip.mp4", "", "--unlabelled"),
        ("a.jpg", "", "--unlabelled"),
        ("a.xml", "<a/>", "COCO Keypoints"),
        ("a.mat", "", "expected a DeepLabCut project"),
        ("noending", "", "expected a DeepLabCut project"),
        ("a.txt", "0 0.5", "expected a DeepLabCut project"),
        ("a.csv", "x,y\n1,2\n", "begins with 'x,y'"),
        ("a.csv", "", "expected a DeepLabCut project"),
        ("a.csv", "scorer,Ann\n", "expected rows 'scorer', 'bodyparts', 'coords'"),
        ("a.csv", "scorer,Ann\nbodyparts,nose\ncoords,z\n", "columns 'x' and 'y' in the header"),
        ("a.json", "{", "broken JSON"),
        ("a.json", "[]", "expected a DeepLabCut project"),
        ("a.json", "7", "expected a DeepLabCut project"),
        ("a.json", '{"shapes": [], "imagePath": "a.jpg"}', "LabelMe"),
        ("a.json", '[{"image_id": 1, "score": 0.5, "keypoints": []}]', "holds predictions"),
        ("a.yaml", "a: 1\n", "no kpt_shape"),
        ("a.yaml", "{", "not a readable YAML file"),
        ("a.yaml", "!!python/object/apply:os.mkdir [taken_over]\n", "not a readable YAML file"),
    ],
)
def test_not_understood(name, text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    assert name in one_line(lambda: read_labels(tmp_path / name), says=says)
    assert not (tmp_path / "taken_over").exists()


def test_folders_that_hold_no_labels(pictures, tmp_path):
    one_line(lambda: read_labels(tmp_path / "nowhere"), says="no such file or folder", error=FileNotFoundError)
    one_line(lambda: read_labels(tmp_path), says="it holds no files")
    images_into(tmp_path, pictures[:2])
    one_line(lambda: read_labels(tmp_path), says="--unlabelled")
    (tmp_path / "notes.docx").touch()
    one_line(lambda: read_labels(tmp_path), says="it holds 2 .jpg, 1 .docx")
    for name in ("a.slp", "b.slp"):
        (tmp_path / name).touch()
    one_line(lambda: read_labels(tmp_path), says="holds a.slp, b.slp; give one of them")


# ---- several sources


def test_join(pictures, tmp_path):
    """Two projects with the same folders and file names, the second with its keypoints in another order."""
    some, more = first_only(pictures[:4]), first_only(pictures[4:8])
    renamed = []
    for old, new in zip(some, more, strict=True):
        file = tmp_path / "renamed" / old.file.name
        file.parent.mkdir(exist_ok=True)
        shutil.copy(new.file, file)
        renamed.append(new._replace(file=file))
    one = read_labels(write_project(tmp_path / "ann" / "zoo", some))
    two = read_labels(write_project(tmp_path / "bob" / "zoo", renamed, config=False, names=NAMES[::-1]))
    assert two.names == NAMES[::-1]
    both = join_sources([one, two])
    assert_same(both, some + renamed)
    assert both.skeleton == AP10K.skeleton and both.tool == "DeepLabCut project"
    assert len({i.name for i in both.images}) == 8
    assert both.images[0].name == f"ann_zoo/cats/{some[0].file.name}"
    assert [i.group for i in both.images] == [
        f"{who}_zoo/{v}" for who in ("ann", "bob") for v in ("cats",) * 2 + ("dogs",) * 2
    ]
    assert join_sources([one]) is one
    back = join_sources([two, one])
    assert back.names == NAMES[::-1] and {(NAMES[::-1][a], NAMES[::-1][b]) for a, b in back.skeleton} == set(BONES)
    three = join_sources([one, two, read_labels(write_project(tmp_path / "cyd" / "zoo", first_only(pictures[8:12])))])
    assert len({i.name for i in three.images}) == 12 and three.findings == ()


def test_join_of_other_names(pictures, tmp_path):
    one = read_labels(write_project(tmp_path / "a", first_only(pictures[:2])))
    two = read_labels(write_project(tmp_path / "b", first_only(pictures[:2]), config=False, names=NAMES[:3]))
    text = one_line(lambda: join_sources([one, two]), says="got the 3 keypoints left_eye, right_eye, nose")
    assert "right_back_paw" in text


def test_join_of_other_pairs(zoo):
    source, other, third = (
        read_labels(zoo / "annotations" / f"ap10k-{s}-split1.json") for s in ("val", "test", "train")
    )
    both = join_sources([replace(source, flip_pairs=None), replace(other, flip_pairs=((0, 1),)), third])
    assert both.flip_pairs == ((0, 1),) and kinds(both)["sources that state other left/right pairs"] == 1
    turned = join_sources([source, replace(other, flip_pairs=tuple((b, a) for a, b in other.flip_pairs))])
    assert turned.findings == source.findings + other.findings


ALIKE, DIFFERENT = "animals that two sources label alike", "animals that two sources label differently"
TWICE = "images that two sources have"


def test_labels_given_twice_are_joined_once(zoo, pictures, tmp_path):
    """A project and its own table, a json and its copy, a source by two paths: each image and each animal is one."""
    some = first_only(pictures[:6])
    project = write_project(tmp_path / "zoo", some)
    whole = read_labels(project)
    table = read_labels(project / "labeled-data" / "dogs" / "CollectedData_Ann.csv")
    for pair in ([whole, table], [table, whole]):
        both = join_sources(pair)
        assert len(both.images) == len(both.animals) == 6 and kinds(both) == {TWICE: 3, ALIKE: 3}
        assert {i.group for i in both.images} == {"cats", "dogs"}  # the frames of one video stay together
        assert {i.name for i in both.images} == {i.name for i in whole.images}
    (tmp_path / "link").symlink_to(project)
    assert len(join_sources([whole, read_labels(tmp_path / "link")]).animals) == 6
    file = zoo / "annotations" / "ap10k-train-split1.json"
    copy = tmp_path / "copy" / "annotations" / "train.json"
    copy.parent.mkdir(parents=True)
    shutil.copy(file, copy)
    (tmp_path / "copy" / "data").symlink_to(zoo / "data")
    one = read_labels(file)
    both = join_sources([one, read_labels(copy)])
    assert [i.name for i in both.images] == [i.name for i in one.images]
    assert all(np.array_equal(a.xy, b.xy) and a.box == b.box for a, b in zip(both.animals, one.animals, strict=True))
    assert kinds(both) == {TWICE: len(one.images), ALIKE: len(one.animals)}


def test_two_people_label_one_image(pictures, tmp_path):
    """What differs is said; the animal with more keypoints is kept; animals that only one has are added."""
    project = write_project(tmp_path / "zoo", first_only(pictures[:4]))
    ann = read_labels(project)
    moved = [a._replace(xy=a.xy + 3 * (a.visible[:, None] > 0)) for a in ann.animals]
    fewer = moved[1].visible.copy()
    fewer[np.flatnonzero(fewer)[0]] = 0
    moved[1] = moved[1]._replace(visible=fewer)
    moved[2] = ann.animals[2]._replace(xy=ann.animals[2].xy + 500)
    bob = replace(ann, animals=tuple(moved))
    both = join_sources([bob, ann])
    assert kinds(both) == {DIFFERENT: 3, TWICE: 4}
    found = next(f for f in both.findings if f.kind == DIFFERENT)
    assert "up to 4.2 px apart" in found.first[0]
    kept = {row: [a for a in both.animals if a.image == row] for row in range(4)}
    assert [len(animals) for animals in kept.values()] == [1, 1, 2, 1]
    assert np.array_equal(kept[0][0].xy, moved[0].xy) and np.array_equal(kept[1][0].xy, ann.animals[1].xy)
    # two animals close together: each is the other source's nearest
    near = [a._replace(image=0, xy=ann.animals[0].xy + d) for a, d in zip(ann.animals[:2], (0, 9), strict=True)]
    near = [a._replace(visible=ann.animals[0].visible, xy=a.xy * (ann.animals[0].visible[:, None] > 0)) for a in near]
    pair = replace(ann, animals=tuple(near))
    assert kinds(join_sources([pair, replace(pair, animals=tuple(near[::-1]))])) == {ALIKE: 2, TWICE: 4}


def test_a_frame_is_known_by_its_video_and_number(tmp_path):
    video = tmp_path / "clip.avi"
    video.touch()
    animal = Animal(0, np.ones((2, 2)), np.full(2, 2, np.uint8))

    def source(*frames):
        images = tuple(SourceImage(f"{frames}/{n}.png", video=video, frame=n) for n in frames)
        return LabelSource(Path("a.slp"), "by hand", ("a", "b"), None, (), images, (animal,))

    assert [i.frame for i in join_sources([source(3, 5), source(5, 9)]).images] == [3, 5, 9]


def test_an_image_in_two_splits_is_in_the_first(zoo, tmp_path):
    root = tmp_path / "set"
    (root / "annotations").mkdir(parents=True)
    (root / "images").symlink_to(zoo / "data")
    for split in ("train", "val"):
        shutil.copy(zoo / "annotations" / "ap10k-val-split1.json", root / "annotations" / f"{split}.json")
    source = read_labels(root)
    assert len(source.images) == 6 and {i.split for i in source.images} == {"train"}
    assert kinds(source)["images in two splits"] == 6 and len(source.animals) == kinds(source)[ALIKE]


# ---- what lies elsewhere


def test_videos_of_another_computer(sio, pictures, tmp_path):
    """--videos: found by the last parts of their paths; of two that end alike, none is taken, and it is said."""
    skeleton = skeleton_of(sio)
    there = [write_video(tmp_path / "disk" / name / "cam.mp4") for name in ("m1", "m2")]
    videos = [sio.Video.from_filename(f"/lab/{name}/cam.mp4") for name in ("m1", "m2")]
    frames = [
        sio.LabeledFrame(video=v, frame_idx=3 + n, instances=instances_of(sio, pictures[n], skeleton))
        for n, v in enumerate(videos)
    ]
    file = tmp_path / "project" / "labels.slp"
    file.parent.mkdir()
    sio.Labels(frames).save(str(file), verbose=False)
    one_line(lambda: read_labels(file), says="--videos FOLDER")
    source = read_labels(file, videos=[tmp_path / "disk"])
    assert [(i.video, i.frame) for i in source.images] == [(there[0], 3), (there[1], 4)] and source.findings == ()
    assert source.videos == tuple(there)
    alone = tmp_path / "project" / "one.slp"
    sio.Labels(frames[:1]).save(str(alone), verbose=False)
    for name in ("a", "b"):
        write_video(tmp_path / "other" / name / "cam.mp4")
    text = one_line(lambda: read_labels(alone, videos=[tmp_path / "other"]), says="cam.mp4 is not below")
    assert str(tmp_path / "other") in text
    both = read_labels(file, videos=[tmp_path / "disk" / "m1", tmp_path / "other"])
    assert kinds(both)["names that match several files"] == 1 and len(both.images) == 1
    one_line(
        lambda: read_labels(file, videos=[tmp_path / "gone"]), says="gone: no such folder", error=FileNotFoundError
    )


def test_frames_of_a_video_of_another_size(sio, pictures, tmp_path):
    """The labels state the size of their video: another one of the same name is another video."""
    clip = write_video(tmp_path / "a" / "clip.mp4")
    frame = sio.LabeledFrame(
        video=sio.Video.from_filename(str(clip)),
        frame_idx=3,
        instances=instances_of(sio, pictures[0], skeleton_of(sio)),
    )
    sio.Labels([frame]).save(str(tmp_path / "a" / "labels.slp"), verbose=False)
    assert read_labels(tmp_path / "a" / "labels.slp").images[0].size == (60, 80)


def test_images_and_videos_of_a_project_lie_elsewhere(pictures, tmp_path):
    some = first_only(pictures[:4])
    project = write_project(tmp_path / "zoo", some)
    videos = tmp_path / "disk" / "films"
    videos.mkdir(parents=True)
    (videos / "cats.mp4").touch()  # the config says D:\\lab\\zoo\\videos\\cats.mp4
    assert read_labels(project).videos == ()
    source = read_labels(project, videos=[tmp_path / "disk"])
    assert source.videos == (videos / "cats.mp4",) and source.findings == ()
    for picture in some[:2]:
        (tmp_path / "disk" / "cats").mkdir(exist_ok=True)
        shutil.move(project / "labeled-data" / "cats" / picture.file.name, tmp_path / "disk" / "cats")
    assert kinds(read_labels(project)) == {"rows whose image is not there": 2}
    moved = read_labels(project, videos=[tmp_path / "disk"])
    assert_same(moved, some)
    assert moved.images[0].name == f"cats/{some[0].file.name}" and moved.findings == ()


def test_coco_images_and_tasks_of_label_studio_lie_elsewhere(zoo, pictures, tmp_path):
    shutil.copy(zoo / "annotations" / "ap10k-val-split1.json", tmp_path / "val.json")
    one_line(lambda: read_labels(tmp_path / "val.json"), says="images that are not there")
    source = read_labels(tmp_path / "val.json", videos=[zoo])
    assert [i.file for i in source.images] == [zoo / "data" / i.name for i in source.images] and source.findings == ()
    tasks = write_tasks(
        images_into(tmp_path / "tasks", []), [label_studio_task(pictures[0], 1, f"/x/{pictures[0].file.name}")]
    )
    one_line(lambda: read_labels(tasks), says="no image found")
    assert read_labels(tasks, videos=[zoo / "data"]).images[0].file == pictures[0].file


# ---- what a user may say


def square(file: Path) -> None:
    """A square image that viewers turn: its size says nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)).save(file, exif=exif)


def turned_sources(sio, pictures, folder: Path) -> dict[str, Path]:
    """The labels of one turned square image by each tool that names image files."""
    points = np.where(pictures[0].points[:1, :, 2:] > 0, 20.0, 0) * [1, 1, 0.1]
    picture = Picture(folder / "a.png", points, np.array([[5.0, 5, 30, 30]]), ["cat"])
    folder.mkdir()
    square(picture.file)
    found = {"deeplabcut": write_csv(folder / "CollectedData_Ann.csv", {"a.png": picture.points})}
    image = sio.Video.from_filename([str(picture.file)])
    frame = sio.LabeledFrame(video=image, frame_idx=0, instances=instances_of(sio, picture, skeleton_of(sio)))
    found["sleap"] = folder / "labels.slp"
    sio.Labels([frame]).save(str(found["sleap"]), verbose=False)
    category = dict(id=1, name="cat", keypoints=list(NAMES))
    flat = np.concatenate([points[0, :, :2], (points[0, :, 2:] > 0) * 2], 1).ravel().tolist()
    annotation = dict(id=1, image_id=1, category_id=1, keypoints=flat, bbox=[5, 5, 30, 30])
    for name, size in (("coco", dict(width=48, height=48)), ("coco without sizes", {})):
        found[name] = folder / f"{name}.json"
        content = dict(images=[dict(id=1, file_name="a.png", **size)], annotations=[annotation], categories=[category])
        found[name].write_text(json.dumps(content))
    return found


@pytest.mark.parametrize("tool", ["deeplabcut", "sleap", "coco", "coco without sizes"])
def test_exif_is_for_every_source(tool, sio, pictures, tmp_path):
    """None: the usual frame, which is only a choice; otherwise what the user says."""
    file = turned_sources(sio, pictures, tmp_path / "a")[tool]
    for said, upright, settled in ((None, False, False), (False, False, True), (True, True, True)):
        (image,) = read_labels(file, upright=said).images
        assert (image.upright, image.settled) == (upright, settled)


def test_exif_of_an_oblong_image_without_a_size(pictures, tmp_path):
    """Where the file says no size, reading one from the image is no answer to which frame is meant."""
    picture = next(p for p in first_only(pictures) if len(set(cv2.imread(str(p.file)).shape[:2])) == 2)
    turned_copy(picture, tmp_path / "a.png")
    height, width = cv2.imread(str(picture.file)).shape[:2]
    category = dict(id=1, name="cat", keypoints=list(NAMES))
    annotation = dict(id=1, image_id=1, category_id=1, keypoints=picture.points[0].ravel().tolist())
    for size, answers in (
        ({}, [(False, False), (False, True), (True, True)]),
        (dict(width=width, height=height), [(True, True)] * 3),
        (dict(width=height, height=width), [(False, True)] * 3),
    ):
        content = dict(images=[dict(id=1, file_name="a.png", **size)], annotations=[annotation], categories=[category])
        (tmp_path / "a.json").write_text(json.dumps(content))
        images = [read_labels(tmp_path / "a.json", upright=said).images[0] for said in (None, False, True)]
        assert [(i.upright, i.settled) for i in images] == answers


def test_exif_of_tools_that_show_images_upright(pictures, tmp_path):
    picture = next(p for p in first_only(pictures) if len(set(cv2.imread(str(p.file)).shape[:2])) == 2)
    root = write_pose_folder(tmp_path / "yolo", {"train": [picture]}, settings="kpt_shape: [17, 3]\n")
    image = next((root / "images").rglob("*.jpg"))
    turned_copy(picture, image)
    usual, stored = read_labels(root), read_labels(root, upright=False)
    assert usual.images[0].upright and not stored.images[0].upright
    width, height = image_size(image).upright
    assert np.allclose(usual.animals[0].xy / (width, height), stored.animals[0].xy / (height, width))


def test_strict_reading_refuses_what_is_odd(zoo, pictures, tmp_path):
    project = write_project(tmp_path / "zoo", first_only(pictures[:4]))
    table = project / "labeled-data" / "cats" / "CollectedData_Ann.csv"
    (table.parent / "extracted.jpg").write_bytes(b"")
    assert len(read_labels(project, strict=True).findings) == 1  # an image that nobody has labelled is not odd
    table.write_text(table.read_text() + "labeled-data/cats/gone.jpg" + ",1" * 34 + "\n")
    assert len(read_labels(project).images) == 4
    one_line(lambda: read_labels(project, strict=True), says="rows whose image is not there: 1, first CollectedData")
    content = json.loads((zoo / "annotations" / "ap10k-val-split1.json").read_text())
    content["annotations"][0]["bbox"] = [1, 2, 3]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(zoo / "data")
    assert read_labels(tmp_path / "odd.json").findings
    one_line(lambda: read_labels(tmp_path / "odd.json", strict=True), says="bbox")


def test_parts_of_projects_and_folders_that_lack_something(pictures, zoo, tmp_path):
    """Each answer is a line that says what to give."""
    project = write_project(tmp_path / "zoo", first_only(pictures[:4]))
    (project / "videos").mkdir()
    (project / "videos" / "a.mp4").touch()
    pose = write_pose_folder(tmp_path / "yolo", {"train": first_only(pictures[:2])}, settings="kpt_shape: [17, 3]\n")
    for part in (project / "labeled-data", project / "videos", pose / "images", pose / "labels", zoo / "data"):
        for call in (read_labels, find_splits):
            one_line(
                lambda call=call, part=part: call(part), says=f"a part of {part.parent.absolute()}; give that folder"
            )
    (pose / "data.yaml").write_text("names: [cat]\ntrain: images/train\n")
    one_line(lambda: read_labels(pose), says="data.yaml does not state kpt_shape")
    (pose / "data.yaml").unlink()
    one_line(lambda: read_labels(pose), says="a YOLO set without data.yaml")
    one_line(lambda: find_splits(pose), says="scarcenet import")
    for call in (read_labels, find_splits, annotation_files):
        one_line(
            lambda call=call: call(tmp_path / "gone"), says="gone: no such file or folder", error=FileNotFoundError
        )


def test_findings_are_counted_by_kind_and_deed():
    tally = Findings()
    for n in range(4):
        tally.add("odd rows", "skipped", f"row {n}")
    tally.add("odd rows", "left out", "row 9")
    assert [(f.kind, f.count, f.first, f.done) for f in tally.all()] == [
        ("odd rows", 4, ("row 0", "row 1", "row 2"), "skipped"),
        ("odd rows", 1, ("row 9",), "left out"),
    ]


# ---- real projects


def by_pandas(file: Path):
    import pandas as pd

    frame = pd.read_csv(file, header=[0, 1, 2], index_col=0)
    names = tuple(dict.fromkeys(frame.columns.get_level_values(1)))
    values = frame.to_numpy(float).reshape(len(frame), len(names), 2)
    return names, list(frame.index), values


@pytest.mark.parametrize(
    ("folder", "table", "images", "keypoints"),
    [("mouse_dlc", "labeled-data/m4s1/CollectedData_Pranav.csv", 36, 4), ("mouse_lp", "CollectedData.csv", 90, 17)],
)
def test_the_mice(folder, table, images, keypoints, real_data):
    source = read_labels(real_data / folder)
    names, rows, values = by_pandas(real_data / folder / table)
    assert source.names == names and len(names) == keypoints and len(source.images) == images
    assert [i.file for i in source.images] == [real_data.absolute() / folder / row for row in rows]
    assert [a.image for a in source.animals] == list(range(images))
    labelled = np.isfinite(values).all(2)
    assert np.array_equal([a.visible for a in source.animals], labelled * 2)
    assert np.allclose([a.xy for a in source.animals], np.where(labelled[..., None], values, 0), atol=1e-12)
    assert len(source.videos) == 1 and all(a.box is None for a in source.animals)
    assert (folder == "mouse_lp") == bool((~labelled).any())


def test_the_mouse_s_h5(real_data):
    """The h5 that DeepLabCut wrote says what the csv says."""
    folder = real_data / "mouse_dlc" / "labeled-data" / "m4s1"
    one, two = (read_deeplabcut(folder / f"CollectedData_Pranav.{end}") for end in ("csv", "h5"))
    assert one.names == two.names and one.images == two.images
    for a, b in zip(one.animals, two.animals, strict=True):
        assert np.array_equal(a.visible, b.visible) and np.allclose(a.xy, b.xy, atol=1e-9)
