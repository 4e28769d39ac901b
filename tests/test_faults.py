"""What goes wrong outside the program: one line that names the file and the entry, exit code 1, no file changed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scarcenet.cli import main as cli
from scarcenet.models.weights import write_tensors
from scarcenet.zoo import dataset

TINY = (
    "--network hrnet_tiny --size 64 --labels 1 --supervised-epochs 1 --supervised-schedule one_cycle "
    "--supervised-batch 8 --epochs 1 --schedule one_cycle --batch 8 --views 2 --device cpu --precision float32"
).split()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small set and a finished run on it, to be copied."""
    folder = tmp_path_factory.mktemp("faults")
    assert cli.main(["zoo", "--out", str(folder / "set"), "--train", "8", "--val", "2", "--test", "2"]) == 0
    (folder / "set" / "zoo.json").unlink()
    assert cli.main(["train", "official", "--data", str(folder / "set"), "--out", str(folder / "run"), *TINY]) == 0
    config = folder / "run" / "config.json"
    # relative, since the folder is copied
    config.write_text(config.read_text().replace(json.dumps(str(folder / "set")), '"set"'))
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A copy that a test may spoil, as the current folder."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys, argv, *words, code=1):
    """Run a command that must fail: exit code, one line on stderr with these words, and every file as it was."""
    shutil.rmtree("new", ignore_errors=True)
    before = snapshot(Path.cwd())
    capsys.readouterr()
    assert cli.main([str(a) for a in argv]) == code
    err = capsys.readouterr().err
    assert re.fullmatch(r"scarcenet: [^\n]+\n", err), err
    for word in words:
        assert str(word) in err, err
    after = snapshot(Path.cwd())
    assert before.items() <= after.items(), "a file was changed or removed"
    assert not [*Path.cwd().rglob("*.part"), *Path.cwd().rglob(".lock")]


def train(*flags, out="new"):
    return ["train", "official", "--data", "set", "--out", out, *TINY, *flags]


TRAIN = Path("set/annotations/ap10k-train-split1.json")
IMAGE = Path("set/data/000000000003.jpg")


def edit(change, file=TRAIN):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def note(number, **values):
    """A function that changes entries of one annotation."""
    return lambda: edit(lambda data: data["annotations"][number].update(values))


def first_keypoints(data, number=0):
    return data["annotations"][number]["keypoints"]


SPOILED = {
    "missing image": (lambda: IMAGE.unlink(), (IMAGE, "no such image")),
    "torn image": (lambda: IMAGE.write_bytes(IMAGE.read_bytes()[:-900]), (IMAGE, "truncated")),
    "no image": (lambda: IMAGE.write_text("a text"), (IMAGE,)),
    "image of another size": (lambda: Image.open(IMAGE).reduce(2).save(IMAGE), (IMAGE, "px as the set states, got")),
    "grey of 16 bits": (
        lambda: Image.fromarray(np.full((160, 160), 5000, np.uint16)).save(IMAGE, "PNG"),
        (IMAGE, "more than 8 bits"),
    ),
    "broken JSON": (lambda: TRAIN.write_text(TRAIN.read_text()[:-100]), (TRAIN, "broken JSON")),
    "empty file": (lambda: TRAIN.write_text(""), (TRAIN, "broken JSON")),
    "foreign JSON": (lambda: TRAIN.write_text('{"images": "elsewhere", "version": 3}'), (TRAIN, "COCO")),
    "no keypoint set": (
        lambda: edit(lambda d: [c.pop("keypoints") for c in d["categories"]]),
        (TRAIN, "category", "keypoint"),
    ),
    "no list of the stated length": (
        lambda: edit(lambda d: [a["keypoints"].extend([1, 2, 2]) for a in d["annotations"]]),
        (TRAIN, "annotation 10", "51 numbers", "54"),
    ),
    "other keypoints": (
        lambda: edit(lambda d: d["categories"][0].update(keypoints=["nose"])),
        (TRAIN, "other keypoints", "give all categories the same list"),
    ),
    "path out of the set": (
        lambda: edit(lambda d: d["images"][0].update(file_name="../../secret.jpg")),
        (Path("set/data/secret.jpg"), "no such image"),
    ),
    "no id fits": (
        lambda: edit(lambda d: [a.update(image_id=a["image_id"] + 1000) for a in d["annotations"]]),
        (TRAIN, "nothing is left", "of an unknown image"),
    ),
}
ODD = {  # how it is spoiled, what --strict says, and what `check` counts
    "another K": (
        lambda: edit(lambda d: first_keypoints(d, 2).extend([1, 2, 2])),
        (TRAIN, "annotation 30", "51 finite numbers"),
        "keypoint lists of another length than 51: 1, first annotation 30",
    ),
    "zero-area box": (
        note(1, bbox=[5, 5, 0, 40]),
        (TRAIN, "annotation 20", "expected width and height above 0"),
        "annotations with a box of no width or height: 1, first annotation 20; box computed from the keypoints",
    ),
    "NaN keypoint": (
        lambda: edit(lambda d: first_keypoints(d, 1).__setitem__(slice(3, 6), [float("nan"), 5, 2])),
        (TRAIN, "annotation 20", "keypoints"),
        "labelled keypoints that are not numbers: 1, first annotation 20, right_eye; not labelled",
    ),
    "NaN box": (
        note(1, bbox=[float("nan"), 5, 9, 40]),
        (TRAIN, "annotation 20", "bbox"),
        "annotations with a box that is not four numbers: 1, first annotation 20; box computed from the keypoints",
    ),
    "unknown image": (
        note(1, image_id=999),
        (TRAIN, "annotation 20", "image_id 999"),
        "annotations of an unknown image: 1, first annotation 20; skipped",
    ),
    "unknown category": (
        note(1, category_id=77),
        (TRAIN, "annotation 20", "category_id 77"),
        "annotations of an unknown category: 1, first annotation 20; skipped",
    ),
    "id twice": (
        note(1, id=10),
        (TRAIN, "annotations[1]", "10"),
        "annotations without an id of their own: 1, first annotation 10; numbered",
    ),
}


@pytest.mark.parametrize("spoil, words", SPOILED.values(), ids=SPOILED)
def test_spoiled_set(place, capsys, spoil, words):
    """`check` and `train` name the same fault."""
    assert [a["id"] for a in json.loads(TRAIN.read_text())["annotations"]][:3] == [10, 20, 30]
    spoil()
    refused(capsys, ["check", "set"], *words)
    refused(capsys, train(), *words)
    refused(capsys, ["pseudo", "run", "--out", "new.json"], *words)
    assert not Path("new.json").exists()


@pytest.mark.parametrize("spoil, words, counted", ODD.values(), ids=ODD)
def test_odd_entry(place, capsys, spoil, words, counted):
    """`check` counts it; --strict refuses it in both."""
    spoil()
    capsys.readouterr()
    assert cli.main(["check", "set"]) == 0
    assert counted in capsys.readouterr().out
    refused(capsys, ["check", "set", "--strict"], *words)
    refused(capsys, train("--strict"), *words)


def test_odd_entries_are_warned_of_once(place, capsys):
    """All of them in one line, and the training takes the rest."""
    note(1, bbox=[5, 5, 0, 40])()
    note(2, area=-1)()
    note(3, iscrowd="0", bbox=None)()
    edit(lambda d: first_keypoints(d, 4).extend([1, 2, 2]))
    capsys.readouterr()
    assert cli.main(train("--epochs", "0")) == 0
    err = capsys.readouterr().err
    assert re.fullmatch(r"scarcenet: [^\n]+\n", err) and f"{TRAIN}: odd entries: " in err, err
    assert "keypoint lists of another length than 51: 1 (not used" in err and "`scarcenet check" in err
    assert "areas that are not positive numbers: 1" in err and "annotations without a box: 1" in err


def test_a_failed_start_can_be_repeated(place, capsys):
    """What failed before it began leaves no folder that would have to be removed first."""
    IMAGE.rename("away.jpg")
    refused(capsys, train(), "no such image")
    Path("away.jpg").rename(IMAGE)
    assert cli.main(train("--seed", "1")) == 0


def test_wrong_labels(place, capsys):
    Path("ids.json").write_text("[901, 902]")
    refused(capsys, train("--labels", "ids.json"), "ids.json", "none of its 2 image ids", TRAIN)
    Path("odd.json").write_text('{"ids": [1]}')
    refused(capsys, train("--labels", "odd.json"), "odd.json", "not a COCO keypoint file")
    Path("text.json").write_text('"five"')
    refused(capsys, train("--labels", "text.json"), "text.json", "expected a JSON array")
    refused(capsys, train("--labels", "nowhere.json"), "nowhere.json")
    refused(capsys, train("--labels", "0"), "1 or more images per category, got 0")
    refused(capsys, train("--families", "Hominidae"), TRAIN, "Hominidae", "Bovidae")


def test_a_label_list_with_surplus_ids(place, capsys):
    """Duplicate ids, and ids of no image, are counted in a warning and do no harm."""
    Path("ids.json").write_text("[1, 2, 2, 901]")
    capsys.readouterr()
    assert cli.main(train("--labels", "ids.json", "--epochs", "0")) == 0
    err = capsys.readouterr().err
    assert re.fullmatch(r"scarcenet: ids\.json: 1 duplicate ids, 1 ids that are not in [^\n]+\n", err), err


@pytest.mark.parametrize("split", ["val", "test"])
def test_split_is_absent(place, capsys, split):
    """The training takes what there is to evaluate; the train split it cannot do without."""
    file = Path(f"set/annotations/ap10k-{split}-split1.json")
    file.unlink()
    assert cli.main(train("--epochs", "0")) == 0
    summary = json.loads(Path("new/summary.json").read_text())
    other = "val" if split == "test" else "test"
    assert list(summary["networks"]["supervised"]) == [other]
    refused(capsys, ["eval", "run", "--split", split], "set", f"split '{split}': expected one of")
    refused(capsys, ["eval", "run", "--split", "nosplit"], "set", "split 'nosplit': expected one of")
    refused(capsys, train("--split", "2"), "set", "ap10k-train-split2.json")
    refused(capsys, ["check", "nowhere"], "nowhere")
    TRAIN.unlink()
    refused(capsys, train(), "set", "no split 'train'", TRAIN.name)


def five(file=Path("five.json"), source=Path("set/annotations/ap10k-test-split1.json")):
    """The test split with five of its keypoints."""
    data = json.loads(source.read_text())
    for c in data["categories"]:
        c.update(keypoints=c["keypoints"][:5], flip_pairs=[[0, 1]], skeleton=[])
    for a in data["annotations"]:
        a["keypoints"] = a["keypoints"][:15]
    file.write_text(json.dumps(data))


def test_another_number_of_keypoints(place, capsys):
    five()
    refused(
        capsys,
        ["eval", "run", "--data", "five.json", "--images", "set/data", "--json", "new.json"],
        "run/supervised.safetensors",
        "five.json",
        "5 keypoints",
    )
    assert not Path("new.json").exists()
    five(Path("set/annotations/ap10k-val-split1.json"))
    refused(capsys, train(), "ap10k-val-split1.json", TRAIN)


HEADS = ("final_layer", "part_layers.16")


def spoil_weights(file):
    """Cut the layers that have an output for each keypoint to five of them."""
    state = load_file(file)
    heads = {name: weight[:5].clone() for name, weight in state.items() if name.startswith(HEADS)}
    save_file(state | heads, file)


TORN = {
    "text": lambda f: f.write_text("not a tensor in sight"),
    "torn": lambda f: f.write_bytes(f.read_bytes()[:5000]),
    "empty": lambda f: f.write_bytes(b""),
    "another K": spoil_weights,
}


@pytest.mark.parametrize("spoil", TORN.values(), ids=TORN)
def test_weights_that_do_not_fit(place, capsys, spoil):
    spoil(Path("run/teacher.safetensors"))
    refused(capsys, ["eval", "run"], "run/teacher.safetensors")
    refused(capsys, ["pseudo", "run", "--out", "new.json"], "run/teacher.safetensors")
    refused(capsys, train("--weights", "run/teacher.safetensors"), "run/teacher.safetensors")
    assert not Path("new.json").exists()


@pytest.mark.parametrize(
    "spoil",
    [*list(TORN.values())[:3], lambda f: shutil.copy("run/teacher.safetensors", f)],
    ids=[*list(TORN)[:3], "weights alone"],
)
def test_torn_checkpoint(place, capsys, spoil):
    spoil(Path("run/checkpoint.safetensors"))
    refused(capsys, train("--resume", out="run"), "run/checkpoint.safetensors", "not a checkpoint of this run")


def test_checkpoint_of_another_network(place, capsys):
    """The configuration fits, but the checkpoint was made for 5 keypoints."""
    for split in ("train", "val", "test"):
        five(Path(f"set/annotations/ap10k-{split}-split1.json"), Path(f"set/annotations/ap10k-{split}-split1.json"))
    refused(capsys, train("--resume", out="run"), "run/checkpoint.safetensors", "not a checkpoint of this run", "shape")


def test_labels_that_were_changed_since(place, capsys):
    """A person corrects labelled animals in the set, and resumes a run that was trained before."""

    def move(data):
        for annotation in data["annotations"]:
            annotation["keypoints"][0] += 1

    edit(move)
    refused(capsys, train("--resume", out="run"), "run/checkpoint.safetensors", "different labels")


def test_run_folders(place, capsys):
    refused(capsys, train(out="run"), "run: already exists", "--resume")
    refused(capsys, train("--resume", "--seed", "5", out="run"), "run/config.json", "seed: expected 0, got 5")
    refused(capsys, train("--resume"), "new/config.json")
    refused(capsys, train(out="set"), "set: already exists")
    refused(capsys, ["zoo", "--out", "set"], "set: expected the same set, got other files")
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"architectures": ["Bert"]}')
    refused(capsys, train(out="foreign"), "foreign/config.json", "expected the configuration of a run")
    refused(capsys, ["eval", "foreign"], "foreign", "expected a weights file")
    refused(capsys, ["eval", "nowhere"], "nowhere", "expected a weights file")
    Path("alone").mkdir()
    shutil.copy("run/teacher.safetensors", "alone")
    refused(capsys, ["eval", "alone/teacher.safetensors"], "alone/teacher.safetensors", "--data")


def test_nothing_can_be_written(place, capsys):
    """Below a regular file there can be no folder, not even for root."""
    Path("file").write_text("mine")
    refused(capsys, train(out="file/run"), "file")
    refused(capsys, train(out="file"), "file: already exists")
    refused(capsys, ["zoo", "--out", "file/zoo"], "file")
    refused(capsys, ["pseudo", "run", "--out", "file/p.json"], "file")
    refused(capsys, ["eval", "run", "--json", "file/e.json"], "file")
    refused(capsys, ["check", "set", "--draw", "file/d"], "file")
    refused(capsys, ["demo", "--out", "file/run"], "file")
    refused(capsys, ["ablate", "official", "--out", "file/run"], "file")


def test_questions_to_a_ledger(place, capsys):
    """A run without one, a torn file, an epoch, an instance and a keypoint that are not there; nothing is written."""
    refused(capsys, ["explain", "nowhere", "--instance", "0", "--keypoint", "nose"], "nowhere")
    refused(capsys, ["explain", "run", "--instance", "999", "--keypoint", "nose"], "instance 999: expected 0 to")
    refused(
        capsys,
        ["explain", "run", "--instance", "0", "--keypoint", "trunk"],
        "keypoint 'trunk': expected one of",
        "nose",
    )
    nose = ["explain", "run", "--instance", "0", "--keypoint", "nose"]
    refused(capsys, [*nose, "--epoch", "77"], "epoch 77 is not recorded")
    refused(capsys, ["accepted", "run", "--out", str(TRAIN)], TRAIN, "already exists")
    shutil.copytree("run", "torn")
    file = sorted(Path("torn/ledger").glob("epoch-*"))[-1]
    file.write_bytes(file.read_bytes()[:40])
    refused(capsys, ["explain", "torn", "--instance", "0", "--keypoint", "nose"], file.name, "cut short")
    refused(capsys, ["report", "torn", "--out", "torn.html"], file.name, "cut short")
    assert not Path("torn.html").exists()
    shutil.rmtree("torn/ledger")
    refused(capsys, ["report", "torn", "--out", "torn.html"], "torn/ledger", "no ledger;")


def test_corrected_labels_of_others(place, capsys):
    content = json.loads(Path(TRAIN).read_text())
    unknown = dict(content, annotations=[dict(content["annotations"][0], bbox=[0, 0, 3, 3], id=99999)])
    Path("unknown.json").write_text(json.dumps(unknown))
    refused(capsys, train("--labels", "unknown.json"), "unknown.json", "annotation 99999", "no animal of")
    twice = dict(content, annotations=[content["annotations"][0], dict(content["annotations"][0], id=99999)])
    Path("twice.json").write_text(json.dumps(twice))
    refused(
        capsys, train("--labels", "twice.json"), "twice.json", "annotation 99999", "expected one annotation of animal"
    )
    other = json.loads(json.dumps(content))
    for category in other["categories"]:
        category["keypoints"] = [n + "_x" for n in category["keypoints"]]
        category.pop("flip_pairs", None)
    Path("other.json").write_text(json.dumps(other))
    refused(capsys, train("--labels", "other.json"), "other.json", "expected the 17 keypoints of")


def test_no_instance_is_labelled(place, capsys):
    edit(lambda d: [a.update(keypoints=[0] * 51, num_keypoints=0) for a in d["annotations"]])
    refused(capsys, train(), TRAIN, "no labelled instances")


def test_weights_that_are_not_numbers(place, capsys):
    file = "run/teacher.safetensors"
    state = load_file(file)
    save_file({name: t * float("nan") if t.is_floating_point() else t for name, t in state.items()}, file)
    refused(capsys, ["pseudo", "run", "--out", "new.json"], "new.json", "not finite")
    assert not Path("new.json").exists()


def test_the_configuration_that_is_named(place, capsys):
    """Not the config.json beside it."""
    shutil.copy("run/config.json", "run/mine.json")
    Path("run/config.json").write_text('{"size": 1}')
    command = ["eval", "run/teacher.safetensors", "--data", "set", "--device", "cpu", "--config"]
    assert cli.main([*command, "run/mine.json"]) == 0
    refused(capsys, [*command, "run/none.json"], "run/none.json")


def test_tensors_that_cannot_be_written(tmp_path, monkeypatch):
    """A full disk, say: the library's message does not name the file, ours does."""

    def full(*_, **__):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="w.safetensors: cannot be written .No space"):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(place, capsys):
    refused(capsys, ["pseudo", "run", "--out", str(TRAIN)], TRAIN, "already exists")
    refused(capsys, ["eval", "run", "--json", str(TRAIN)], TRAIN, "already exists")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_absent(place, capsys):
    refused(capsys, train("--device", "cuda"), "device cuda", "not available on this machine")
    refused(capsys, ["eval", "run", "--device", "cuda:1"], "device cuda:1")
    refused(capsys, train("--device", "abacus"), "abacus", "expected auto, cpu, cuda")


def test_numbers_that_make_no_sense(place, capsys):
    """Flags outside of their range are a wrong command line; a network is looked for when the run starts."""
    for flags, words in {
        ("--size", "70"): "size: expected a multiple of 32 px",
        ("--batch", "0"): "batch: expected at least 1, got 0",
        ("--drop", "1.5"): "drop: expected at least 0 and at most 1, got 1.5",
        ("--lr", "nan"): "lr: expected at least 0 and at most 1e+09, got nan",
        ("--supervised-epochs", "0", "--epochs", "0"): "nothing to train",
    }.items():
        with pytest.raises(SystemExit) as end:
            cli.main(train(*flags))
        assert end.value.code == 2 and words in " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert not Path("new").exists()
    refused(capsys, train("--network", "w64"), "network 'w64'", "hrnet_tiny")
    refused(capsys, train("--network", "timm:nonesuch"), "nonesuch")
    refused(capsys, ["pseudo", "run", "--out", "new.json", "--drop", "2"], "drop: expected at least 0 and at most 1")


@pytest.mark.parametrize(
    "argv",
    [
        ["trane"],
        ["train", "nopreset", "--out", "new"],
        train("--epoch-count", "3"),
        train("--epochs", "many"),
        ["train", "official"],
        ["eval"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_command_line(place, capsys, argv):
    """Exit code 2, and what would have been right; nothing is begun."""
    before = snapshot(place)
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2 and "help" in (err := capsys.readouterr().err) and "Traceback" not in err
    assert snapshot(place) == before and not Path("new").exists()


def test_a_mistake_keeps_its_traceback(monkeypatch, capsys):
    """A fault of the program does not look like bad input."""
    monkeypatch.setattr(dataset, "write_zoo", lambda *_: {}["nothing"])
    assert cli.main(["zoo", "--out", "new"]) == 1
    assert "KeyError: 'nothing'" in capsys.readouterr().err
