"""What may be wrong with a set or a training is said: in a line, with a count and the first entries."""

import json
import os
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scarcenet import train as training
from scarcenet.cli import main as cli
from scarcenet.config import PRESETS, Config
from scarcenet.data.check import describe_same, same_images, warn_findings
from scarcenet.data.coco import find_split, read_coco
from scarcenet.data.labels import describe_few
from scarcenet.data.loader import load_crops
from scarcenet.data.splits import read_splits
from scarcenet.experiments import ablation
from scarcenet.experiments.ablation import row_columns, run_ablation
from scarcenet.heatmap import Keypoints
from scarcenet.models.build import build_network, describe_network
from scarcenet.models.weights import save_weights
from scarcenet.predict.predictor import find_networks
from scarcenet.predict.save import _columns
from scarcenet.pseudo_labels import join_labels
from scarcenet.record import start_ledger, write_labels
from scarcenet.run.folder import describe_collapse, open_run, read_rows
from scarcenet.run.load import load_run_data, warn_of_set
from scarcenet.run.train_run import train_in_folder
from scarcenet.utils.device import explain_step, fitting_batch
from scarcenet.utils.files import plain_cell, read_json, write_json

QUICK = dict(network="hrnet_tiny", backbone="", size=32, labels=1, device="cpu", views=2, batch=8, labelled_repeat=1)
QUICK |= dict(supervised_epochs=1, supervised_batch=8, supervised_repeat=1, epochs=1)


@pytest.fixture
def animals(zoo, tmp_path):
    return shutil.copytree(zoo, tmp_path / "zoo")


def quick(folder, **changes):
    return replace(PRESETS["demo"], **QUICK | {"data": str(folder)} | changes)


# ---- sets


def test_the_same_image_in_two_splits(animals, capsys):
    """By its bytes, under whatever name; said by check and before a training, and no reason to refuse."""
    train, val = (read_coco(*find_split(animals, split)) for split in ("train", "val"))
    shutil.copy(train.instances[0].file, val.instances[0].file)
    size = Image.open(train.instances[0].file).size
    with open(val.file) as f:
        content = json.load(f)
    for image in content["images"]:
        if image["id"] == val.instances[0].image_id:
            image["width"], image["height"] = size
    val.file.write_text(json.dumps(content))
    names = f"{train.instances[0].file.name} = {val.instances[0].file.name}"
    assert cli.main(["check", str(animals)]) == 0
    assert f"images in two splits, which makes scores too high: 1, first {names}" in capsys.readouterr().out
    config = quick(animals)
    with pytest.warns(UserWarning, match="images in two splits"):
        warn_of_set(config, load_run_data(config, animals))


def test_same_images_reads_little(tmp_path, monkeypatch):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"three"), ("d", b"one")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert same_images({"train": [a, b, c], "val": [d, tmp_path / "none"]}) == [(a, d)]
    assert same_images({"train": [a, b, c, d]}) == [] and describe_same([]) is None


def test_boxes_elsewhere_are_said_before_a_training(zoo):
    poses = read_coco(*find_split(zoo, "train"))
    x, y, w, h = poses.instances[0].box
    moved = replace(poses.instances[0], box=(x + 3 * w, y, w, h))
    changed = replace(poses, instances=(moved, *poses.instances[1:]))
    with pytest.warns(UserWarning, match=f"boxes without most of their keypoints: 1, first {moved.id};"):
        warn_findings(changed)


def test_species_with_fewer_labels_than_asked(zoo, capsys):
    poses = read_coco(*find_split(zoo, "train"))
    line = str(describe_few(poses, 1000))
    kinds = len(set(poses.column("category")))
    assert line.startswith(f"species with fewer than 1000 labelled images: {kinds}, first ")
    assert describe_few(poses, 1) is None
    assert cli.main(["check", str(zoo), "--labels", "1000"]) == 0
    assert capsys.readouterr().out.count(line) == 1
    from scarcenet.data.splits import known_labels

    with pytest.warns(UserWarning, match="fewer than 1000 labelled images"):
        known_labels(quick(zoo, labels=1000), poses)


def test_a_list_of_ids_of_another_set(zoo, tmp_path, capsys):
    poses = read_coco(*find_split(zoo, "train"))
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([poses.instances[0].image_id, 90001, 90002, 90003, 90004]))
    from scarcenet.data.splits import known_labels

    with pytest.warns(
        UserWarning, match="4 ids that are not in .*first: 90001, 90002, 90003; only 1 match: is it the list"
    ):
        known_labels(quick(zoo, labels=str(file)), poses)
    assert cli.main(["check", str(zoo), "--labels", str(file)]) == 0
    assert "only 1 match" in capsys.readouterr().out


def test_check_for_programs(animals, capsys):
    """One JSON object; exit code 1 only for what training refuses."""
    file = animals / "annotations" / "ap10k-train-split1.json"
    content = json.loads(file.read_text())
    first = content["annotations"][0]
    first["bbox"] = [0, 0, 3, 3]
    turned, exif = animals / "data" / content["images"][1]["file_name"], Image.Exif()
    exif[0x0112] = 3
    Image.open(turned).convert("RGB").rotate(180).save(turned, exif=exif)
    file.write_text(json.dumps(content))
    assert cli.main(["check", str(animals), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    train = next(part for part in told["files"] if part["file"] == str(file))
    faults = {fault["kind"]: fault for fault in train["faults"]}
    assert faults["boxes without most of their keypoints"] | {"first": [], "count": 0} == dict(
        kind="boxes without most of their keypoints", count=0, first=[]
    )
    assert first["id"] in faults["boxes without most of their keypoints"]["first"]
    assert any(f"first {turned.name} (3)" in note for note in train["notes"]) and train["broken_count"] == 0
    turned.write_bytes(turned.read_bytes()[:500])
    assert cli.main(["check", str(animals), "--json"]) == 1
    assert turned.name in json.dumps(json.loads(capsys.readouterr().out)["files"])


@pytest.fixture
def checked(animals, tmp_path, capsys):
    """Changes a set by `spoil(its files by split, their contents)`; returns what check and train say."""
    files = {split: find_split(animals, split)[0] for split in ("train", "val", "test")}

    def told(spoil, *flags):
        contents = {split: json.loads(file.read_text()) for split, file in files.items()}
        spoil(files, contents)
        for split, file in files.items():
            if split in contents:
                file.write_text(json.dumps(contents[split]))
        capsys.readouterr()
        code = cli.main(["check", str(animals), "--json", *flags])
        out, err = capsys.readouterr()
        try:
            load_run_data(quick(animals, labels="all"), tmp_path)
            refused = ""
        except (ValueError, OSError) as error:
            refused = str(error)
        content = json.loads(out)
        assert (code, bool(content["refused"])) == ((1, True) if refused else (0, False)), (code, err, refused)
        assert not refused or err == f"scarcenet: {content['refused']}\n"
        return content, refused

    return told


def bare_image(files, contents):
    """An image without annotation that cannot be decoded."""
    (files["train"].parents[1] / "data" / "bare.jpg").write_bytes(b"torn")
    contents["train"]["images"].append(dict(id=77, file_name="bare.jpg", width=9, height=9))


def extra_file(files, contents):
    """A draw that training does not read, with a missing image; and a file that is not JSON."""
    other = json.loads(json.dumps(contents["train"]))
    other["images"][0]["file_name"] = "gone.jpg"
    files["train"].with_name("ap10k-train-split2.json").write_text(json.dumps(other))
    files["train"].with_name("notes.json").write_text("{")


def other_keypoints(files, contents):
    contents["val"]["categories"] = [
        category | {"keypoints": [f"{name}_x" for name in category["keypoints"]]}
        for category in contents["val"]["categories"]
    ]


def no_label(files, contents):
    for annotation in contents["train"]["annotations"]:
        annotation["keypoints"] = [0] * len(annotation["keypoints"])


def no_train(files, contents):
    files["train"].unlink()
    del contents["train"]


def torn_val(files, contents):
    del contents["val"]
    files["val"].write_text("{")


def lost_image(files, contents):
    (files["val"].parents[1] / "data" / contents["val"]["images"][0]["file_name"]).unlink()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (bare_image, ""),
        (extra_file, ""),
        (other_keypoints, "expected the keypoints of"),
        (no_label, "no labelled instances"),
        (no_train, "no split 'train'"),
        (torn_val, "ap10k-val-split1.json"),
        (lost_image, "no such image"),
    ],
)
def test_check_refuses_what_training_refuses(checked, spoil, words):
    """Exit code 1 for that alone, with the reason; and the JSON is whole."""
    content, refused = checked(spoil)
    assert words in content["refused"] and words in refused
    unread = [part["file"] for part in content["files"] if "error" in part]
    assert len(unread) == (spoil in (extra_file, torn_val))


def test_check_counts_what_concerns_several_files(checked):
    """Images in two splits and species with few labels: by kind, with a count and the first three."""

    def twice(files, contents):
        folder, content = files["train"].parents[1] / "data", contents["val"]
        first, copy = contents["train"]["images"][0], content["images"][0]
        shutil.copy(folder / first["file_name"], folder / copy["file_name"])
        copy |= {side: first[side] for side in ("width", "height")}

    content, _ = checked(twice, "--labels", "1000")
    (same,) = content["faults"]
    assert same["kind"].startswith("images in two splits") and same["count"] == len(same["first"]) == 1
    faults = {fault["kind"]: fault for part in content["files"] for fault in part["faults"]}
    few = faults["species with fewer than 1000 labelled images"]
    assert few["count"] >= len(few["first"]) == 3 and content["notes"] == []


def test_odd_entries_of_the_other_splits(animals, tmp_path, capsys):
    """An animal that is left out of the scores is told, by train and by eval."""
    file, _ = find_split(animals, "test")
    content = json.loads(file.read_text())
    for annotation in content["annotations"][:4]:
        annotation["bbox"] = [0, 0, 3, 3]
    content["annotations"][4]["keypoints"] = [1, 2]
    file.write_text(json.dumps(content))
    config = quick(animals)
    with pytest.warns(UserWarning) as caught:
        warn_of_set(config, read_splits(config, tmp_path))
    lines = [str(line.message) for line in caught]
    expected = [f"{file}: odd entries: keypoint lists of another", f"{file}: boxes without most of their keypoints: 4"]
    assert all(sum(line.startswith(start) for line in lines) == 1 for start in expected)
    model, weights = build_network(config, 17), tmp_path / "network.safetensors"
    save_weights(model, weights, describe_network(config, read_coco(file).schema))
    assert cli.main(["eval", str(weights), "--data", str(animals), "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert all(told.count(f"scarcenet: {start}") == 1 for start in expected)


# ---- trainings


def test_a_loss_that_is_not_finite(zoo, tmp_path, monkeypatch):
    """The training ends with the images of the batch, and keeps nothing of that epoch."""
    config = quick(zoo, supervised_epochs=2)
    run_data = load_run_data(config, tmp_path)
    real, seen = training.learn_supervised, []

    def broken(config, data, state, engine, batch):
        values, step = real(config, data, state, engine, batch)
        seen.append(batch.index.tolist())
        return (values * float("nan") if len(seen) == 2 else values), step

    monkeypatch.setattr(training, "SUPERVISED", replace(training.SUPERVISED, learn=broken))
    with pytest.raises(ValueError, match="not finite: stage supervised, epoch .*lower --supervised-lr") as caught:
        train_in_folder(config, tmp_path, run_data)
    ids = str(caught.value).rpartition(": ")[2].split(", ")
    assert ids == list(dict.fromkeys(str(run_data.train.instances[n].image_id) for n in seen[1]))
    assert "\n" not in str(caught.value)
    rows = read_rows(tmp_path / "metrics.csv") if (tmp_path / "metrics.csv").exists() else []
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_a_last_step_that_leaves_nothing_finite(zoo, tmp_path, monkeypatch):
    """It is the learning rate, not the set: said with the stage and the step, with and without a val split."""
    config = quick(zoo)
    run_data = load_run_data(config, tmp_path)
    real = training.learn_supervised

    def blow_up(config, data, state, engine, batch):
        values = real(config, data, state, engine, batch)
        with torch.no_grad():
            next(state.student.parameters()).fill_(float("nan"))
        return values

    monkeypatch.setattr(training, "steps_per_epoch", lambda *_: 1)
    monkeypatch.setattr(training, "batches", lambda index, *_: [index[:8]])
    monkeypatch.setattr(training, "SUPERVISED", replace(training.SUPERVISED, learn=blow_up))
    for data in (run_data, replace(run_data, evaluated={}, crops={})):
        with pytest.raises(ValueError, match="not finite: stage supervised, epoch 1, after step 1; choose a lower --s"):
            train_in_folder(config, tmp_path, data)


def test_a_grid_warns_as_a_training_does(animals, tmp_path, monkeypatch, capsys):
    """Of the set once; of flat maps, and of a loss that is not finite with its images, for each cell by its name."""
    train, test = (read_coco(*find_split(animals, split)) for split in ("train", "test"))
    shutil.copy(train.instances[0].file, test.instances[0].file)
    content = json.loads(test.file.read_text())
    size = Image.open(train.instances[0].file).size
    for image in content["images"]:
        if image["id"] == test.instances[0].image_id:
            image["width"], image["height"] = size
    content["annotations"][1]["keypoints"] = [1, 2]
    test.file.write_text(json.dumps(content))
    config = quick(animals, supervised_epochs=3, supervised_lr=1e-9)
    grid = dict(seeds=(0,), methods={"supervised": dict(epochs=0), "again": dict(epochs=0)}, progress=True)
    monkeypatch.setattr(ablation, "matched_steps", lambda settings, *_: settings)
    with pytest.warns(UserWarning) as caught:
        list(run_ablation(config, tmp_path / "a", **grid))
    lines = [str(line.message) for line in caught]
    assert sum("images in two splits" in line for line in lines) == 1
    assert sum(line.startswith(f"{test.file}: odd entries") for line in lines) == 1
    told = capsys.readouterr().err
    for name in ("1 labels, seed 0, supervised", "1 labels, seed 0, again"):
        assert f"training: {name}\n" in told
        assert sum(line.startswith(f"{name}: stage supervised, epoch 3: the heatmaps stay flat") for line in lines) == 1

    def broken(*args):
        values, step = training.learn_supervised(*args)
        return values * float("nan"), step

    monkeypatch.setattr(training, "SUPERVISED", replace(training.SUPERVISED, learn=broken))
    for methods in ({"supervised": dict(epochs=0)}, {"scarcenet": {}}):  # in its own and in the shared stage 1
        words = f"1 labels, seed 0, {next(iter(methods))}: the loss is not finite: .*; image ids of its batch: [0-9]+,"
        with pytest.raises(ValueError, match=words):
            list(run_ablation(config, tmp_path / "b", seeds=(0,), methods=methods))


def test_a_learning_rate_at_which_maps_fade(zoo, tmp_path):
    """A whole training that diverges says so."""
    row = dict(stage="scarcenet", epochs=9, epoch=3, peak=0.4, student_AP=0.3, teacher_AP=0.2)
    assert describe_collapse([row, row | dict(epoch=4)]) == []
    (score,) = describe_collapse([row, row | dict(epoch=4, student_AP=0.0)])
    assert score == "stage scarcenet, epoch 4: student AP on val fell from 0.300 to 0; choose a lower --lr"
    (faded,) = describe_collapse([row, row | dict(epoch=4, peak=0.001)])
    assert "the heatmaps have collapsed, mean peak 0.001, before 0.400" in faded
    config = quick(zoo, supervised_epochs=4, supervised_lr=1e-9, epochs=0)
    with pytest.warns(UserWarning, match="stage supervised, epoch 4: the heatmaps stay flat"):
        train_in_folder(config, tmp_path, load_run_data(config, tmp_path))
    assert all(float(row["peak"]) < 0.02 for row in read_rows(tmp_path / "metrics.csv"))


def test_out_of_gpu_memory(zoo, tmp_path, monkeypatch, capsys):
    """One line with batch and size, and a batch that probably fits; exit code 1."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(training, "SUPERVISED", replace(training.SUPERVISED, learn=full))
    words = "train demo --network hrnet_tiny --size 32 --device cpu --labels 1 --supervised-batch 12 --backbone".split()
    assert cli.main([*words, "", "--data", str(zoo), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == ("scarcenet: out of GPU memory with batch 12 of 32 x 32 px; --supervised-batch 6 probably fits")
    assert fitting_batch(64, held=1e9, needed=40e9, total=8e9) == 10
    with pytest.raises(ValueError, match="smaller --size"), explain_step("--batch", 1, 256, torch.device("cpu")):
        full()


def test_torch_s_words_elsewhere(monkeypatch, capsys):
    def fail(error):
        def check() -> None:
            """A command that fails."""
            raise error

        monkeypatch.setitem(cli.COMMANDS, "check", check)
        return cli.main(["check"])

    assert fail(torch.OutOfMemoryError("CUDA out of memory.\nmore")) == 1
    assert capsys.readouterr().err.startswith("scarcenet: out of GPU memory")
    assert fail(RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert fail(RuntimeError("a mistake in the program")) == 1
    assert "Traceback" in (said := capsys.readouterr().err) and "RuntimeError: a mistake in the program" in said


def test_batch_one_at_32_px(zoo, tmp_path, capsys):
    """It works where batch norm has two pixels to compare, and is one line where it has not."""
    words = (
        "train demo --network hrnet_tiny --device cpu --labels 1 --supervised-repeat 1 --supervised-epochs 1".split()
    )
    words += ["--epochs", "0", "--supervised-batch", "1", "--backbone", "", "--data", str(zoo), "--size"]
    code = cli.main([*words, "32", "--out", str(tmp_path / "a")])
    error = capsys.readouterr().err
    assert code == 0 or code == 1 and "batch 1 of 32 x 32 px" in error and "value per channel" not in error
    assert cli.main([*words, "64", "--out", str(tmp_path / "b")]) == 0


# ---- tables and caches


def test_a_species_called_like_a_network(zoo):
    """Its columns are not the network's."""
    poses = read_coco(*find_split(zoo, "test"))
    names = ("teacher", "=1+1", *poses.column("category")[2:])
    renamed = replace(
        poses, instances=tuple(replace(i, category=n) for i, n in zip(poses.instances, names, strict=True))
    )
    columns = row_columns(renamed, PRESETS["demo"])
    assert len(set(columns)) == len(columns) and "species teacher_AP" in columns and "'=1+1_AP" in columns


def test_formulas_in_tables(zoo):
    """Text of a set that a spreadsheet would run is text in the tables that are written; numbers stay numbers."""
    cells = {"=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0", "@SUM(A1)": "'@SUM(A1)", "-1.5": "-1.5", -2: -2, "a-b": "a-b"}
    assert [plain_cell(cell) for cell in cells] == list(cells.values())
    assert plain_cell("-a.png", is_path=True) == "./-a.png"
    assert _columns([1], ["=nose", "tail"])["bodyparts"] == ["'=nose"] * 3 + ["tail"] * 3


def test_a_cache_that_was_cut_short_is_made_again(zoo, tmp_path):
    instances = read_coco(*find_split(zoo, "train")).instances[:6]
    whole = load_crops(instances, 32)
    for cut in (1, 12 * 32**2, 10**6):
        load_crops(instances, 32, limit_mb=0, cache=tmp_path)
        (file,) = tmp_path.glob("*.crops")
        file.write_bytes(file.read_bytes()[:-cut])
        again = load_crops(instances, 32, limit_mb=0, cache=tmp_path)
        assert torch.equal(again.pixels, whole.pixels)


def test_a_cache_without_a_place_names_the_flag(zoo, tmp_path, monkeypatch):
    """Neither a home folder, as in some containers, nor one that can be written."""
    instances = read_coco(*find_split(zoo, "train")).instances[:2]

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*; --cache FOLDER chooses another place"):
        load_crops(instances, 32, limit_mb=0, cache=tmp_path / "file" / "cache")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ValueError, match="^~/x: there is no home folder; choose another place with --cache FOLDER$"):
        load_crops(instances, 32, limit_mb=0, cache=Path("~/x"))


def test_a_cache_does_not_grow_for_ever(zoo, tmp_path):
    """What no run has used for a month goes; what is used stays, however old it is."""
    instances = read_coco(*find_split(zoo, "train")).instances[:4]
    load_crops(instances, 32, limit_mb=0, cache=tmp_path)
    (used,) = tmp_path.glob("*.crops")
    for name, days in (("old.crops", 40), ("new.crops", 10), ("notes.txt", 400), (used.name, 50)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    load_crops(instances, 32, limit_mb=0, cache=tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {used.name, "new.crops", "notes.txt"}


def test_what_an_unfinished_run_has(zoo, tmp_path, capsys):
    """The network of stage 1, which is said; and no epoch in its ledger."""
    config = quick(zoo)
    run = open_run(tmp_path / "run", config)
    run_data = load_run_data(config, run)
    weights = run / "supervised.safetensors"
    save_weights(build_network(config, 17), weights, describe_network(config, run_data.train.schema))
    line = "the run has not finished; the network of stage 1 is used"
    for argv in (["eval", run], ["predict", run, run_data.train.instances[0].file, "--out", tmp_path / "p.json"]):
        assert cli.main([*map(str, argv), "--device", "cpu"]) == 0
        assert capsys.readouterr().err.count(line) == 1
    labels = run_data.data.labels
    pseudo = Keypoints(torch.zeros_like(labels.xy), torch.ones_like(labels.weight))
    start_ledger(run / "ledger", run_data.train, labels.labelled)
    write_labels(run / "ledger", run_data.train.schema.names, join_labels(labels, pseudo, config.drop), pseudo)
    animal = str(run_data.train.instances[0].id)
    for argv in (
        ["explain", run, "--instance", animal, "--keypoint", "nose"],
        ["accepted", run, "--out", tmp_path / "a"],
    ):
        assert cli.main([*map(str, argv)]) == 1
        assert "no epoch of stage 3 is recorded yet" in capsys.readouterr().err
    write_json(run / "config.json", read_json(run / "config.json") | {"epochs": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(find_networks(run)) == ["supervised"]


def test_the_upper_limit_is_said():
    with pytest.raises(ValueError, match=r"supervised_lr: expected at least 0 and at most 1e\+09, got 1e\+30"):
        Config(supervised_lr=1e30)
