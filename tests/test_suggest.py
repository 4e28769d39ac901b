"""What to label next: scores, spreading, files for correction, and the way back into a training."""

import csv
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import scarcenet as sn
from scarcenet.cli import main as cli
from scarcenet.data import correction
from scarcenet.data.correction import write_for_correction
from scarcenet.data.labels import add_corrected, corrected_animals
from scarcenet.data.splits import label_parts, read_splits
from scarcenet.experiments.suggest import ARM_COLUMNS, arm_table, run_arms
from scarcenet.ledger.explorer import explore
from scarcenet.ledger.suggest import (
    Doubt,
    choose_images,
    doubt_reason,
    doubt_scores,
    ledger_doubt,
    sheet_window,
    suggest,
    typical_images,
)
from scarcenet.utils.files import read_json, write_json

QUICK = dict(
    labels=1,
    network="hrnet_tiny",
    backbone="",
    size=32,
    supervised_epochs=1,
    supervised_repeat=1,
    epochs=2,
    batch=8,
    views=1,
    device="cpu",
    precision="float32",
    progress=False,
)
TRAIN = Path("annotations", "ap10k-train-split1.json")
FLAGS = (
    "--network hrnet_tiny --size 32 --supervised-epochs 1 --supervised-repeat 1 --epochs 1 --batch 8 --views 1 "
    "--device cpu --precision float32 --backbone"
).split() + [""]


@pytest.fixture(scope="module")
def run(zoo, tmp_path_factory) -> sn.Run:
    """A small finished run."""
    return sn.train_run("demo", data=zoo, out=tmp_path_factory.mktemp("runs") / "a", **QUICK)


@pytest.fixture(scope="module")
def found(run):
    return suggest(run.folder, 6, strategy="views", device="cpu")


@pytest.fixture(scope="module")
def bare(zoo, tmp_path_factory) -> Path:
    """A labelling project as `import` leaves it: 12 images with keypoints, 12 frames of a video without."""
    root = tmp_path_factory.mktemp("sets") / "mine"
    content = read_json(zoo / "annotations" / "ap10k-train-split1.json")
    (root / "images" / "clip").mkdir(parents=True)
    (root / "annotations").mkdir()
    for n, image in enumerate(content["images"]):
        name = image["file_name"]
        if n % 2:
            image.update(file_name=f"clip/{name}", video="clip")
        shutil.copy(zoo / "data" / name, root / "images" / image["file_name"])
    clip = {image["id"] for image in content["images"] if "video" in image}
    hidden = [a for a in content["annotations"] if a["image_id"] in clip]
    write_json(root / "hidden.json", content | {"annotations": hidden})
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in clip]
    write_json(root / "annotations" / "train.json", content)
    (root / "hidden.json").rename(root.parent / "hidden.json")
    return root


def scarcenet(*argv, code=0) -> None:
    assert cli.main([str(a) for a in argv]) == code


# ---- scores


def doubt(apart, unreliable, score, side=100.0, epochs=3) -> Doubt:
    arrays = (np.array(a, float) for a in (apart, score))
    apart, score = arrays
    return Doubt(apart, np.array(unreliable, bool), score, np.full(len(score), side), epochs)


def test_scores_say_what_the_table_says():
    some = doubt([[0, 0], [5, 50], [np.nan, 10]], [[0, 0], [0, 1], [1, 1]], [[1, 1], [0.5, 0.1], [0.2, 0.2]])
    assert doubt_scores(some, "views") == pytest.approx([0, (0.75 + 0.5) / 2, (0.5 + 1) / 2])
    assert doubt_scores(some, "confidence") == pytest.approx([0, 0.7, 0.8])
    lot = doubt_scores(some, "random", 3)
    assert np.array_equal(lot, doubt_scores(some, "random", 3)) and not np.array_equal(
        lot, doubt_scores(some, "random")
    )


def test_reasons_are_words():
    one = doubt([[10, 18]], [[1, 0]], [[0.5, 0.1]])
    said = doubt_reason(one, "views")
    assert said.startswith(
        "the two predictions were 14 px apart on average over 3 epochs; never reliable at 1 of 2 keypoin"
    )
    today = doubt_reason(one._replace(epochs=0), "views")
    assert "crop and mirror image are 14 px apart; below the confidence cut at 1 of 2" in today
    unflipped = doubt_reason(doubt([[np.nan] * 2], [[1, 0]], [[0.5, 0.1]], epochs=0), "views")
    assert unflipped.startswith("below the confidence cut at 1 of 2 keypoints")
    assert "below 0.2 at 1 of 2 keypoints" in doubt_reason(one, "confidence")
    assert doubt_reason(one, "random") == "chosen at random"


def test_of_each_kind_the_least_sure():
    """Three kinds of images; the best scores are all of the first kind."""
    looks = np.repeat(np.eye(3) * 10, 5, 0) + np.random.default_rng(0).normal(0, 0.1, (15, 3))
    score = np.concatenate([np.linspace(0.9, 1, 5), np.linspace(0.5, 0.6, 5), np.linspace(0.1, 0.2, 5)])
    assert choose_images(score, looks, 3, among=5).tolist() == [4, 9, 14]
    assert choose_images(score, looks, 3, among=1).tolist() == [4, 3, 2]
    assert np.array_equal(choose_images(score, looks, 3, seed=5), choose_images(score, looks, 3, seed=5))
    assert len(choose_images(score, looks, 99)) == 15
    assert len(set(choose_images(score, np.zeros((15, 3)), 5).tolist())) == 5  # all look alike


def test_typical_images_differ():
    looks = np.repeat(np.eye(3) * 10, (6, 3, 1), 0) + np.random.default_rng(0).normal(0, 0.1, (10, 3))
    chosen, alike = typical_images(looks, 3)
    assert [int(looks[n].argmax()) for n in chosen] == [0, 1, 2] and alike[chosen].tolist() == [6, 3, 1]
    assert alike.sum() == 10 and len(typical_images(looks, 99)[0]) == 10


def test_the_ledger_knows(run):
    ledger = sn.open_ledger(run.folder)
    apart, never = ledger_doubt(ledger)
    by_hand = [np.linalg.norm((r.weak_xy - r.student_xy).numpy(), axis=-1) for r in map(ledger.record, ledger.epochs)]
    assert apart.shape == never.shape == ledger.score.shape and 0 < never.mean() < 1
    assert apart[ledger.record(1).index.numpy()[0]].mean() > 0 and np.isfinite(by_hand[0]).any()


# ---- suggestions


def test_suggestions(run, found):
    train, labels, _ = read_splits(run.config, run.folder)
    known = set(train.column("image_id")[labels.labelled].tolist())
    assert len(found.table) == 6 and not known & set(found.image_ids)
    assert found.table["score"].is_monotonic_decreasing and found.table["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert all("predictions were" in reason and "over 2 epochs" in reason for reason in found.table["reason"])
    again = suggest(run.folder, 6, strategy="views", device="cpu")
    assert again.table.equals(found.table) and np.array_equal(again.poses.truth.xy, found.poses.truth.xy)
    by_id = {i.id: n for n, i in enumerate(train.instances)}
    rows = [by_id[i.id] for i in found.poses.instances]
    assert not np.allclose(train.truth.xy[rows], found.poses.truth.xy), "predictions, not the truth"


def test_strategies(run):
    chosen = {s: suggest(run.folder, 4, strategy=s, device="cpu").table["file"].tolist() for s in ("views", "random")}
    lot = suggest(run.folder, 4, strategy="random", seed=1, device="cpu").table["file"].tolist()
    assert chosen["random"] != lot and chosen["views"] != chosen["random"]
    typical = suggest(run.folder, 4, device="cpu").table  # the default, which won in experiments/suggest
    assert typical["score"].sum() == pytest.approx(1, abs=1e-3) and typical["reason"].str.contains("typical of").all()
    by_confidence = suggest(run.folder, 99, strategy="confidence", among=1, device="cpu")
    mean = [by_confidence.score[[i.image_id == n for i in by_confidence.poses.instances]].mean() for n in
            by_confidence.image_ids]  # fmt: skip
    assert by_confidence.table["score"].to_numpy() == pytest.approx(1 - np.array(mean), abs=1e-3)


def test_all_of_them_and_it_says_so(run):
    every = suggest(run.folder, 1000, device="cpu")
    assert "asked for 1000 images" in every.note and len(every.table) == len(set(every.image_ids)) < 24


def test_without_a_ledger(run, zoo, tmp_path):
    """Today's views are taken, and that is said: of a run without a ledger, and of one without stage 3."""
    for name, changes in (("no ledger", dict(ledger=False)), ("stage 1", dict(epochs=0)), ("one", dict(mirror=False))):
        changes |= dict(ledger=False)
        other = sn.train_run("demo", data=zoo, out=tmp_path / name, **QUICK | changes)
        today = suggest(other.folder, 3, strategy="views", device="cpu")
        assert "has no ledger" in today.note and "\n" not in today.note
        assert all("below the confidence cut at" in reason for reason in today.table["reason"])


# ---- for correction


def accept(folder: Path, file: Path) -> Path:
    """What a person does with a prediction that is right; returns what is then read."""
    if file.name == "tasks.json":
        tasks = read_json(file)
        for task in tasks:
            assert task["annotations"] == []
            task["annotations"] = task.pop("predictions")
        write_json(file, tasks)
    if file.suffix == ".slp":
        sio = pytest.importorskip("sleap_io")
        labels = sio.load_slp(str(file), open_videos=False)
        assert not any(frame.user_instances for frame in labels), "what nobody has looked at is no label"
        for frame in labels:
            frame.instances = [sio.Instance.from_numpy(i.numpy(), skeleton=i.skeleton) for i in frame.instances]
        labels.save(str(file), verbose=False)
    return folder if file.name == "config.yaml" else file


FORMATS = ("coco", "label-studio", "slp", "deeplabcut")


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read_again(format, found, run, tmp_path):
    """By our own reader, with equal names and px; and as labels of the set that it is from."""
    if format == "slp":
        pytest.importorskip("sleap_io")
    source = accept(tmp_path / "out", found.save(tmp_path / "out", format))
    back = sn.read_labels(source)
    assert back.names == found.poses.schema.names and len(back.images) == 6
    pixels = {}
    for animal in back.animals:
        pixels.setdefault(Path(back.images[animal.image].name).name, []).append(animal.xy)
    for instance, xy in zip(found.poses.instances, found.poses.truth.xy, strict=True):
        assert np.allclose(pixels[instance.file.name].pop(0), xy, atol=1e-4)
    assert not any(pixels.values())
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"suggested.csv", "suggested.png"} <= files
    with open(tmp_path / "out" / "suggested.csv", newline="") as f:
        assert [row["file"] for row in csv.DictReader(f)] == found.table["file"].tolist()
    before = read_splits(run.config, run.folder)
    after = read_splits(replace(run.config, labels=f"1,{source}"), run.folder)
    assert after.labels.labelled.sum() == before.labels.labelled.sum() + len(found.poses)
    rows = {i.id: n for n, i in enumerate(after.train.instances)}
    for instance, xy in zip(found.poses.instances, found.poses.truth.xy, strict=True):
        assert np.allclose(after.labels.xy[rows[instance.id]], xy, atol=1e-4)


@pytest.mark.parametrize("format", ["coco", "slp", "deeplabcut"])
def test_frames_keep_their_video(format, bare, tmp_path):
    if format == "slp":
        pytest.importorskip("sleap_io")
    config = replace(sn.PRESETS["demo"], data=str(bare), labels="all", boxes="image")
    train, labels, _ = read_splits(config, tmp_path)
    frames = train.subset(~labels.labelled).subset(range(4))
    assert all(i.video == "clip" for i in frames.instances)
    rng = np.random.default_rng(0)
    truth = frames.truth._replace(
        xy=rng.uniform(5, 60, (4, 17, 2)).astype(np.float32), visible=np.full((4, 17), 2, np.uint8)
    )
    (tmp_path / "out").mkdir()
    file = write_for_correction(
        replace(frames, truth=truth), np.ones((4, 17)), tmp_path / "out", format, tmp_path / "out"
    )
    back = sn.read_labels(accept(tmp_path / "out", tmp_path / "out" / file))
    assert {image.group for image in back.images} == {"clip"} and len(back.animals) == 4


@pytest.mark.parametrize("format", FORMATS)
def test_images_without_any_annotation_come_back(format, bare, tmp_path):
    """Frames that the set has no keypoints for: once they are corrected, they are labelled animals of the set."""
    if format == "slp":
        pytest.importorskip("sleap_io")
    config = QUICK | dict(data=bare, labels="all", boxes="image")
    run = sn.train_run("demo", out=tmp_path / "run", **config)
    found = suggest(run.folder, 3, device="cpu")
    assert all(name.startswith("clip/") for name in found.table["file"])
    source = accept(tmp_path / "out", found.save(tmp_path / "out", format))
    before = read_splits(run.config, run.folder)
    after = read_splits(replace(run.config, labels=f"all,{source}"), run.folder)
    assert len(after.train) == len(before.train)
    assert after.labels.labelled.sum() == before.labels.labelled.sum() + 3
    new = [n for n in np.flatnonzero(after.labels.labelled) if after.train.instances[n].video == "clip"]
    files = {after.train.instances[n].file.name: after.labels.xy[n] for n in new}
    for instance, xy in zip(found.poses.instances, found.poses.truth.xy, strict=True):
        assert np.allclose(files[instance.file.name], xy, atol=1e-4)
    again = sn.train_run("demo", out=tmp_path / "again", **config | dict(labels=f"all,{source}", epochs=1))
    assert again.summary["labelled"] == run.summary["labelled"] + 3


def test_what_is_held_out_stays_held_out(bare, tmp_path):
    """Corrected images change neither which images are evaluated nor which are drawn."""
    config = replace(sn.PRESETS["demo"], data=str(bare), labels="all", boxes="image", holdout=0.25)
    train, labels, evaluated = read_splits(config, tmp_path)
    content = read_json(bare.parent / "hidden.json")
    content["annotations"] = content["annotations"][:5]
    write_json(tmp_path / "corrected.json", content)
    later = read_splits(replace(config, labels=f"all,{tmp_path / 'corrected.json'}"), tmp_path)
    names = [sorted(i.file.name for i in s["val"].instances) for s in (evaluated, later.evaluated)]
    assert names[0] == names[1] and len(names[0]) > 1
    assert later.labels.labelled.sum() == labels.labelled.sum() + 5
    drawn = [
        read_splits(replace(config, labels=f"1{more}", holdout=0.0), tmp_path)
        for more in ("", f",{tmp_path / 'corrected.json'}")
    ]
    first, second = ({i.file.name for i in s.train.subset(s.labels.labelled).instances} for s in drawn)
    assert first < second


def test_labels_in_parts():
    config = sn.PRESETS["demo"]
    assert label_parts(config) == (5,) and label_parts(replace(config, labels="all")) == ("all",)
    assert label_parts(replace(config, labels="5, a.json,all")) == (5, "a.json", "all")
    assert label_parts(replace(config, families=("Bovidae",))) == (("Bovidae",),)
    with pytest.raises(ValueError, match="labels: expected"):
        label_parts(replace(config, labels=","))


def test_boxes_of_a_set_are_taken_up(zoo, tmp_path):
    """An animal that has a box and no keypoints becomes the corrected one; its image has no second one."""
    content = read_json(zoo / "annotations" / "ap10k-train-split1.json")
    chosen = content["annotations"][3]
    write_json(tmp_path / "corrected.json", content | {"annotations": [dict(chosen)]})
    chosen.update(keypoints=[0] * 51, num_keypoints=0)
    write_json(tmp_path / "set.json", content)
    poses = sn.read_coco(tmp_path / "set.json", zoo / "data")
    corrected = corrected_animals(tmp_path / "corrected.json", poses)
    more = add_corrected(poses, corrected)
    alone = [i.image_id for i in poses.instances].count(chosen["image_id"]) == 0
    assert len(more) == len(poses) + alone and len(more.unannotated) == len(poses.unannotated) - alone


# ---- the round trip


def test_suggest_correct_train(run, zoo, tmp_path, capsys):
    """Four images are suggested, a person sets the truth, and the next training has four more."""
    scarcenet("suggest", run.folder, "--count", 4, "--out", tmp_path / "next", "--device", "cpu")
    said = capsys.readouterr().out
    assert "4 images" in said and f"--labels 1,{tmp_path / 'next' / 'labels.json'}" in said
    train, labels, _ = read_splits(run.config, run.folder)
    truth = {i.id: (xy, v) for i, xy, v in zip(train.instances, *train.truth[:2], strict=True)}
    content = read_json(tmp_path / "next" / "labels.json")
    for annotation in content["annotations"]:
        assert len(annotation["keypoint_scores"]) == 17
        xy, visible = truth[annotation["id"]]
        annotation["keypoints"] = np.column_stack([xy, visible]).ravel().tolist()
    write_json(tmp_path / "corrected.json", content)
    flags = ["--data", zoo, "--labels", f"1,{tmp_path / 'corrected.json'}", "--out", tmp_path / "b"]
    scarcenet("train", "demo", *flags, *FLAGS)
    after = sn.open_ledger(tmp_path / "b")
    known = after.instances[after.instances["labelled"]]
    assert known["image_id"].nunique() == len(set(train.column("image_id")[labels.labelled])) + 4
    assert after.instances["labelled"].sum() == labels.labelled.sum() + len(content["annotations"])


@pytest.mark.parametrize("format", FORMATS)
def test_what_nobody_has_touched_is_told(format, found, run, tmp_path):
    """Once, with its number, where the tool does not tell a prediction from a label; and it is used all the same."""
    if format == "slp":
        pytest.importorskip("sleap_io")
    source = accept(tmp_path / "out", found.save(tmp_path / "out", format))
    says = (
        r"6 images with every keypoint where .* predicted it \(.+, .+, .+, \.\.\.\); used as labels: correct or remove"
    )
    known = format in ("coco", "deeplabcut")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = read_splits(replace(run.config, labels=f"1,{source}"), run.folder).labels
    told = [str(w.message) for w in caught if "predicted it" in str(w.message)]
    assert len(told) == known and all(re.search(says, line) for line in told)
    assert labels.labelled.sum() >= len(found.poses)
    assert [f.count for f in sn.read_labels(source).findings if "predicted it" in f.kind] == [6] * known


def test_what_was_touched_is_not_told(found, run, tmp_path):
    """A keypoint was moved in one image, and one removed in another; a tool's rounding is no correction."""
    file = found.save(tmp_path / "out")
    content = read_json(file)
    images = [i["id"] for i in content["images"]]
    by_image = {image: [a for a in content["annotations"] if a["image_id"] == image] for image in images}
    for annotation in content["annotations"]:
        annotation["keypoints"] = [round(value, 2) for value in annotation["keypoints"]]
    by_image[images[0]][0]["keypoints"][0] += 1
    by_image[images[1]][0]["keypoints"][3:6] = 0, 0, 0
    write_json(file, content)
    with pytest.warns(UserWarning, match="labels.json: 4 images with every keypoint where"):
        read_splits(replace(run.config, labels=f"1,{file}"), run.folder)
    (tmp_path / "out" / "predicted.csv").write_text("file\nnonsense\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_splits(replace(run.config, labels=f"1,{file}"), run.folder)


@pytest.mark.parametrize("command", ["pseudo", "accepted"])
def test_other_predictions_are_told_too(command, run, tmp_path, capsys):
    """As with suggest: images in which nothing was corrected are counted; human labels are not."""
    scarcenet(command, run.folder, "--out", tmp_path / "labels.json")
    content = read_json(tmp_path / "labels.json")
    predicted = [a for a in content["annotations"] if not a.get("labelled") and a["num_keypoints"]]
    images = list(dict.fromkeys(a["image_id"] for a in predicted))
    config = replace(run.config, labels=str(tmp_path / "labels.json"))
    with pytest.warns(UserWarning, match=f"labels.json: {len(images)} images with every keypoint where"):
        read_splits(config, run.folder)
    moved, removed = (next(a for a in predicted if a["image_id"] == i)["keypoints"] for i in images[:2])
    moved[3 * moved[2::3].index(2)] += 5
    removed[3 * removed[2::3].index(2) + 2] = 0
    write_json(tmp_path / "labels.json", content)
    with pytest.warns(UserWarning, match=f"labels.json: {len(images) - 2} images with every keypoint where"):
        read_splits(config, run.folder)


# ---- a project of DeepLabCut


def test_a_deeplabcut_project(run, tmp_path, monkeypatch, capsys):
    """Of the user's own scorer, which the import has noted; with an h5 that holds what the csv holds."""
    pytest.importorskip("tables")
    first = suggest(run.folder, 8, device="cpu").save(tmp_path / "first", "deeplabcut", scorer="Ann/B")
    settings = yaml.safe_load(first.read_text())
    assert settings["scorer"] == "Ann_B" and settings["project_path"] == str(tmp_path / "first")
    (folder,) = (tmp_path / "first" / "labeled-data").iterdir()
    table, stored = (pd.read_csv(folder / "CollectedData_Ann_B.csv", header=[0, 1, 2], index_col=[0, 1, 2]),
                     pd.read_hdf(folder / "CollectedData_Ann_B.h5", key="df_with_missing"))  # fmt: skip
    assert list(stored.columns.names) == ["scorer", "bodyparts", "coords"] and stored.index.nlevels == 3
    assert stored.columns.equals(table.columns) and stored.index.tolist() == table.index.tolist()
    assert np.array_equal(stored.to_numpy(), table.to_numpy())
    (folder / "CollectedData_Ann_B.csv").unlink()
    assert len(sn.read_labels(tmp_path / "first").animals) == 8

    for name in ("predicted.csv", "suggested.csv", "suggested.png"):
        (tmp_path / "first" / name).unlink()
    extra = tmp_path / "extra"
    shutil.copytree(folder, extra, ignore=shutil.ignore_patterns("Collected*"))
    for n, image in enumerate(sorted(extra.iterdir())):
        Image.fromarray(np.asarray(Image.open(image))[:-1]).save(image.with_name(f"more{n}.png"))
        image.unlink()
    sn.import_set(tmp_path / "first", tmp_path / "set", unlabelled=[extra])
    again = sn.train_run(
        "demo", data=tmp_path / "set", out=tmp_path / "again", **QUICK | dict(labels="all", boxes="image")
    )
    monkeypatch.setattr(correction, "find_spec", lambda name: None)
    scarcenet(
        "suggest", again.folder, "--count", 2, "--format", "deeplabcut", "--out", tmp_path / "next", "--device", "cpu"
    )
    assert "next: the tables are .csv alone: DeepLabCut's .h5 needs PyTables" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "next" / "config.yaml").read_text())["scorer"] == "Ann_B"
    assert [f.name for f in (tmp_path / "next").rglob("Collected*")] == ["CollectedData_Ann_B.csv"]


# ---- to look at


def test_in_the_explorer(run, found, tmp_path):
    found.save(tmp_path / "out")
    shown = explore(run.folder, most=8, suggested=tmp_path / "out").bundle["instances"]
    first = shown[: len(found.poses)]
    assert {i["rank"] for i in first} == set(range(1, 7)) and all("predictions were" in i["reason"] for i in first)
    assert [i["rank"] for i in explore(run.folder, most=4).bundle["instances"]] == [0] * 4
    scarcenet("report", run.folder, "--out", tmp_path / "r.html", "--suggested", tmp_path / "out", "--animals", 8)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "suggested to be labelled only" in page and '"rank": 6' in page


def test_a_sheet_shows_the_animal_and_not_its_box(found):
    """Boxes are whole images; one animal is small and sure, one lies anywhere; each window is in its image."""
    some = found.poses.subset(range(2))
    whole = tuple(replace(i, width=2000, height=1000, box=(0, 0, 2000, 1000), image_id=n)
                  for n, i in enumerate(some.instances))  # fmt: skip
    xy = np.stack([np.linspace((1900, 900), (1980, 980), 17), np.linspace((5, 5), (1900, 900), 17)]).astype(np.float32)
    visible = np.array([[2] * 10 + [1] * 7, [2] * 3 + [1] * 14], np.uint8)
    xy[0, 10:] = 3, 3
    poses = replace(some, instances=whole, truth=some.truth._replace(xy=xy, visible=visible))
    (low, high), (_, all_of_it) = (sheet_window(poses, np.array([n])) for n in range(2))
    assert (high - low).max() < 220 and (low >= (1750, 750)).all() and (high <= (2000, 1000)).all()
    assert (all_of_it >= 1000 - 0.5).all()


def test_contact_sheet(found):
    figure = found.draw()
    assert len([ax for ax in figure.axes if ax.images]) == 6
    assert figure.axes[0].get_xlabel().startswith("1. the two predictions were")


# ---- what it is worth


def test_arms(zoo, tmp_path):
    config = replace(sn.PRESETS["demo"], data=str(zoo), **{k: v for k, v in QUICK.items() if k != "progress"})
    config = replace(config, epochs=1)
    rows = list(run_arms(config, tmp_path, seeds=(0,), count=3))
    assert [row["arm"] for row in rows] == ["first", "views", "random", "confidence", "appearance"]
    assert all(row["images"] == rows[0]["images"] + 3 for row in rows[1:])
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == ",".join(ARM_COLUMNS)
    assert list(run_arms(config, tmp_path, seeds=(0,), count=3)) == []
    assert list(arm_table(rows)) == ["first", "views", "random", "confidence", "appearance"]
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="rows.csv: expected the columns"):
        list(run_arms(config, tmp_path, seeds=(0,), count=3))
    (tmp_path / "rows.csv").write_text(",".join(ARM_COLUMNS) + "\n" + ",".join("x" for _ in ARM_COLUMNS) + "\n")
    with pytest.raises(ValueError, match="rows.csv: expected a whole number as the seed"):
        list(run_arms(config, tmp_path, seeds=(0,), count=3))


# ---- bad input: one line


def refused(capsys, *argv, says: str) -> None:
    scarcenet("suggest", *argv, code=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said, said


def test_a_set_that_has_moved(zoo, tmp_path, monkeypatch, capsys):
    """Its path is that of the configuration, relative to a folder that one has left; `--data` says where it is."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(zoo, "zoo_set")
    (Path("zoo_set") / "first.json").write_text(str([read_json(zoo / TRAIN)["images"][0]["id"]]))
    run = sn.train_run("demo", data="zoo_set", out="run", **QUICK | dict(labels="zoo_set/first.json")).folder.absolute()
    monkeypatch.chdir(tmp_path)
    moved = ["--data", "here/zoo_set"]
    for words in (["suggest", run], ["report", run], ["accepted", run]):
        capsys.readouterr()
        scarcenet(*words, "--out", tmp_path / "out", code=1)
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and f"zoo_set: no such file or folder, which is relative to the current folder {tmp_path}" in said
        )
        assert "--data" in said
        scarcenet(*words, "--out", tmp_path / "out", *moved, code=1)
        assert "first.json: no such file or folder, which is relative to" in capsys.readouterr().err
        Path("zoo_set").mkdir()
        shutil.copy("here/zoo_set/first.json", "zoo_set")
        scarcenet(*words, "--out", tmp_path / f"{words[0]}.out", *moved)
        assert (tmp_path / f"{words[0]}.out").exists()
        shutil.rmtree("zoo_set")


@pytest.mark.parametrize("command", ["suggest", "report", "accepted"])
def test_a_weights_file_is_no_run(command, run, tmp_path, capsys):
    scarcenet(command, run.folder / "teacher.safetensors", "--out", tmp_path / "out", code=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "teacher.safetensors: expected the folder of a run, got a file" in said


def test_bad_input(run, zoo, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    refused(capsys, tmp_path / "nowhere", "--out", out, says="expected a weights file or the folder of a finished run")
    refused(capsys, run.folder, "--out", out, "--count", 0, says="expected 1 or more images")
    whole = sn.train_run("demo", data=zoo, out=tmp_path / "whole", **QUICK | dict(labels="all", epochs=0))
    refused(capsys, whole.folder, "--out", out, says="all 24 images of the train split are labelled")
    (tmp_path / "there").mkdir()
    refused(capsys, run.folder, "--out", tmp_path / "there", says="already exists")
    monkeypatch.setitem(sys.modules, "sleap_io", None)
    refused(capsys, run.folder, "--out", out, "--format", "slp", says="format slp needs sleap-io: pip install")
    assert not out.exists()
    scarcenet("report", run.folder, "--out", tmp_path / "r.html", "--suggested", tmp_path / "there", code=1)
    assert "suggested.csv: no such file" in capsys.readouterr().err
    (tmp_path / "there" / "suggested.csv").write_text("a\n1\n")
    scarcenet("report", run.folder, "--out", tmp_path / "r.html", "--suggested", tmp_path / "there", code=1)
    assert "expected the columns rank" in capsys.readouterr().err
    with pytest.raises(ValueError, match="strategy 'luck'"):
        suggest(run.folder, 2, strategy="luck", device="cpu")
    with pytest.raises(ValueError, match="format 'txt'"):
        suggest(run.folder, 2, device="cpu").save(out, "txt")
