"""The command line from end to end, on a small zoo and, where they are at hand, on real images."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import Warm

from scarcenet.cli import main as cli
from scarcenet.config import PRESETS, Config, read_config
from scarcenet.data.coco import coco_json, find_split, read_coco
from scarcenet.ledger.ledger import open_ledger
from scarcenet.run import train_run
from scarcenet.utils.files import read_json, write_json

REAL = Path(os.environ.get("SCARCENET_DATA", Path(__file__).parents[2] / "shared" / "data"))
TINY = (
    "--network hrnet_tiny --size 64 --labels 1 --supervised-epochs 1 --supervised-schedule one_cycle "
    "--supervised-batch 8 --epochs 2 --schedule one_cycle --batch 8 --views 2 --centre-jitter 0 --evaluate-every 1 "
    "--device cpu --precision float32"
).split()
WEIGHTS = ("supervised", "student", "teacher")


def scarcenet(*argv, code=0):
    """Run a command, which must end with this exit code."""
    assert cli.main([str(a) for a in argv]) == code


def train(data, out, *flags, code=0):
    """Train a tiny network."""
    scarcenet("train", "official", "--data", data, "--out", out, *TINY, *flags, code=code)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small zoo in `zoo` and a finished run in `run`; no test may change them."""
    folder = tmp_path_factory.mktemp("cli")
    scarcenet("zoo", "--out", folder / "zoo", "--train", 16, "--val", 4, "--test", 4)
    train(folder / "zoo", folder / "run")
    return folder


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.timing
def test_starts_at_once():
    """No command, no --help imports what takes long; counted in CPU seconds, which a busy machine does not stretch."""
    python("import sys, scarcenet.cli.main; assert not {'torch', 'numpy', 'cv2', 'matplotlib'} & set(sys.modules)")
    seconds = "import resource; u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    assert min(float(python("import scarcenet; " + seconds).stdout) for _ in range(3)) < 0.2
    show_help = """
import os, sys
from scarcenet.cli.main import main
sys.stdout = open(os.devnull, "w")
try:
    main(["--help"])
except SystemExit:
    sys.stdout = sys.__stdout__
"""
    assert min(float(python(show_help + seconds).stdout) for _ in range(3)) < 0.5


@pytest.mark.parametrize("command", [(), *((c,) for c in cli.COMMANDS), *(("train", p) for p in PRESETS)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for name in cli.COMMANDS if not command else ():
        assert name in out
    for field in dataclasses.fields(Config) if len(command) == 2 else ():
        assert f"--{field.name.replace('_', '-')}" in out
    assert len(command) != 1 or f"$ scarcenet {command[0]} " in out, "no example"
    assert "(default: None)" not in out or len(command) == 2, "a default that says nothing"


def test_every_choice_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "official", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = (Path(cli.__file__).parents[1] / "config.py").read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        note = source.split(f"    {field.name}: ", 1)[1].split('"""', 2)[1]
        assert note and " ".join(note.split()) in words, field.name


def test_zoo_and_check(home, tmp_path, capsys):
    scarcenet("zoo", "--out", home / "zoo", "--train", 16, "--val", 4, "--test", 4)  # the same set: nothing to do
    scarcenet("check", home / "zoo", "--draw", tmp_path, "--samples", 5)
    out = capsys.readouterr().out
    assert "16 images" in out and "17 keypoints" in out and "Bovidae" in out and out.count("broken images: 0") == 3
    for split in ("train", "val", "test"):
        with Image.open(tmp_path / f"ap10k-{split}-split1.png") as sheet:
            assert np.asarray(sheet.convert("L")).std() > 20, "nothing is drawn"


def test_train_writes_a_whole_run(home, capsys):
    run = home / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.csv",
        "summary.json",
        "index.html",
        "figures",
        "ledger",
        "pseudo.json",
        "checkpoint.safetensors",
        *(f"{name}.safetensors" for name in WEIGHTS),
    }
    train(home / "zoo", run, "--resume")  # a finished run is evaluated again
    out = capsys.readouterr().out
    assert "val split" in out and "test split" in out and f"page: {run / 'index.html'}" in out
    assert all(name in out for name in WEIGHTS)


def test_eval_agrees_with_the_run(home, tmp_path, capsys):
    scarcenet("eval", home / "run", "--json", tmp_path / "all.json", "--device", "cpu")
    out = capsys.readouterr().out
    for word in "PCK@0.05 PCK@0.1 APM APL AR left_front_paw".split() + ["teacher by family", "teacher by category"]:
        assert word in out
    scores = read_json(tmp_path / "all.json")
    networks = read_json(home / "run" / "summary.json")["networks"]
    for name in WEIGHTS:
        expected, overall = networks[name]["test"]["overall"], scores[name]["overall"]
        assert overall["PCK@0.1"] == expected.pop("PCK")
        assert expected.items() <= overall.items()
        assert overall["PCK@0.05"] <= overall["PCK@0.1"]
    shutil.copy(home / "run" / "teacher.safetensors", tmp_path)
    flags = ["--config", home / "run" / "config.json", "--data", home / "zoo", "--split", "test", "--device", "cpu"]
    scarcenet("eval", tmp_path / "teacher.safetensors", *flags, "--json", tmp_path / "one.json")
    assert read_json(tmp_path / "one.json")["teacher"] == scores["teacher"]


@pytest.mark.parametrize("quantize_targets", [True, False])
def test_pseudo_is_stage_2(home, tmp_path, quantize_targets):
    """The command makes the labels that a run makes itself, with the network of stage 1, on heatmap px or between them.

    Not so their flags: a run cuts among the unlabelled, and the command does not ask which are labelled.
    """
    weights, run = home / "run" / "supervised.safetensors", home / "run"
    if not quantize_targets:
        run = tmp_path / "fine"
        stages = ["--supervised-epochs", 0, "--epochs", 1, "--weights", weights]
        train(home / "zoo", run, "--no-quantize-targets", *stages)
    scarcenet("pseudo", weights, "--config", run / "config.json", "--out", tmp_path / "p.json", "--device", "cpu")
    made, own = read_json(tmp_path / "p.json"), read_json(run / "pseudo.json")
    for a, b in zip(made["annotations"], own["annotations"], strict=True):
        a_xy, b_xy = (np.reshape(annotation["keypoints"], (-1, 3))[:, :2] for annotation in (a, b))
        np.testing.assert_allclose(a_xy, b_xy, atol=1e-3)
        np.testing.assert_allclose(a["keypoint_scores"], b["keypoint_scores"], atol=1e-3)
    scarcenet("check", tmp_path / "p.json", "--images", home / "zoo" / "data")


def test_one_stage_at_a_time(home, tmp_path, capsys):
    """Stage 1 alone, then stages 2 and 3 from its weights; in the transfer setting."""
    families = ["--families", "Bovidae", "Canidae"]
    train(home / "zoo", tmp_path / "1", *families, "--epochs", 0)
    assert not (tmp_path / "1" / "teacher.safetensors").exists()
    weights = ["--weights", tmp_path / "1" / "supervised.safetensors"]
    train(home / "zoo", tmp_path / "3", *families, "--supervised-epochs", 0, "--epochs", 1, *weights)
    assert "teacher, other families" in capsys.readouterr().out
    assert not (tmp_path / "3" / "supervised.safetensors").exists()
    assert "other families" in read_json(tmp_path / "3" / "summary.json")["networks"]["teacher"]["test"]


def interruptible(argv):
    """A shell that starts its jobs in the background has them ignore Ctrl-C, and their children too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(argv))


def test_ctrl_c(home, tmp_path):
    """Interrupted in the middle of stage 3: exit code 130, a hint at --resume, and no half-written file."""
    flags = [*TINY, "--epochs", "40", "--evaluate-every", "40"]
    argv = ["train", "official", "--data", str(home / "zoo"), "--out", str(tmp_path / "run"), *flags]
    process = Warm(interruptible, argv)
    deadline = time.monotonic() + 240
    pseudo = tmp_path / "run" / "pseudo.json"  # stage 3 begins when it has been written
    while not pseudo.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.strip() == f"scarcenet: interrupted; {tmp_path / 'run'}: go on with --resume"
    assert not (tmp_path / "run" / "summary.json").exists() and not list(tmp_path.rglob("*.part"))


def test_resumed_is_uninterrupted(home, tmp_path, monkeypatch, capsys):
    real, calls = train_run.append_metrics, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(train_run, "append_metrics", stop)
    train(home / "zoo", tmp_path / "run", code=130)
    monkeypatch.setattr(train_run, "append_metrics", real)
    assert "--resume" in capsys.readouterr().err
    train(home / "zoo", tmp_path / "run", "--resume")
    for file in (f"{name}.safetensors" for name in WEIGHTS):
        assert (tmp_path / "run" / file).read_bytes() == (home / "run" / file).read_bytes()


def test_explain(home, tmp_path, capsys):
    question = ["explain", home / "run", "--instance", 2]
    scarcenet(*question, "--keypoint", "neck", "--epoch", 1, "--figure", tmp_path / "neck.png")
    out = capsys.readouterr().out
    assert "instance 2" in out and "neck, epoch 1 of 2" in out and "epochs: 1 " in out
    assert (tmp_path / "neck.png").read_bytes()[:4] == b"\x89PNG"
    scarcenet(*question, "--keypoint", 3)  # by number, in the last epoch
    assert "neck, epoch 2 of 2" in capsys.readouterr().out


def test_report(home, tmp_path, capsys):
    scarcenet("report", home / "run", "--out", tmp_path / "r.html", "--animals", 6)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "MB: " in capsys.readouterr().out
    assert text.count("data:image/jpeg") == 6 and "</html>" in text and len(text) < 15e6


def test_labels_go_to_a_tool_and_come_back(home, tmp_path, capsys):
    """What is accepted, corrected by a person, is what the next run learns from."""
    scarcenet("accepted", home / "run", "--out", tmp_path / "labels.json", "--epoch", 2)
    content, poses = read_json(tmp_path / "labels.json"), read_coco(*find_split(home / "zoo", "train"))
    assert len(content["annotations"]) == len(poses)
    first = content["annotations"][0]
    assert len(first["keypoint_scores"]) == len(first["keypoint_decisions"]) == 17
    for annotation in content["annotations"]:
        used = [d in ("truth", "reliable", "reusable") for d in annotation["keypoint_decisions"]]
        assert used == [flag > 0 for flag in annotation["keypoints"][2::3]]
    chosen = [a for a in content["annotations"] if a["num_keypoints"]][:3]
    for a in chosen:
        a["keypoints"][:3] = [31.0, 17.5, 2]  # the person moves the left eye
        a["id"] += 5000  # and the tool numbers anew
    write_json(tmp_path / "corrected.json", content | {"annotations": chosen})
    train(home / "zoo", tmp_path / "next", "--labels", tmp_path / "corrected.json", "--epochs", 1)
    ledger = open_ledger(tmp_path / "next")
    assert int(ledger.labelled.sum()) == 3
    assert (ledger.label_xy[ledger.labelled][:, 0] == np.float32([31.0, 17.5])).all()


def test_ablate(home, tmp_path, capsys):
    argv = ["ablate", "official", "--data", home / "zoo", "--out", tmp_path / "a", *TINY, "--epochs", 1, "--seeds", 3]
    scarcenet(*argv)
    out = capsys.readouterr().out
    rows = (tmp_path / "a" / "ablation.csv").read_text().splitlines()
    assert len(rows) == 6
    for word in ("supervised", "all pseudo-labels", "+ small loss", "+ relabeling", "scarcenet", "over supervised"):
        assert word in out
    (tmp_path / "a" / "ablation.csv").write_text("\n".join(rows[:-1]) + "\n")
    scarcenet(*argv, "--resume")
    assert capsys.readouterr().out == out


@pytest.mark.slow
def test_demo(home, tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(
        read_config(home / "run"), milestones=(), supervised_milestones=(), families=(), epochs=1
    )
    monkeypatch.setitem(PRESETS, "demo", tiny)
    demo = ["demo", "--out", tmp_path / "demo", "--seed", 2]
    scarcenet(*demo)
    out = capsys.readouterr().out
    for row in ("stage 1 ", "supervised, as many steps", "ScarceNet student", "ScarceNet teacher"):
        assert row in out
    assert f"page: {tmp_path / 'demo' / 'index.html'}" in out and (tmp_path / "demo" / "index.html").is_file()
    # the page begins with the same animals as both networks see them, chosen without a look at any result
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    order = [page.index(f"figures/{name}.png") for name in ("compare", "keypoints", "curves", "decisions")]
    assert [*order, page.index("<table>")] == sorted([*order, page.index("<table>")]) and page.index("<h2>") < order[0]
    assert re.search(r"<h2>Supervised beside ScarceNet</h2><img[^>]*><p[^>]*>.*no prediction was looked at", page)
    for name in ("compare", "keypoints"):
        assert (tmp_path / "demo" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # an error of the process that trains the baseline is this one's; what is finished is not trained again
    checkpoint = tmp_path / "demo" / "baseline" / "checkpoint.safetensors"
    checkpoint.write_bytes(b"torn")
    scarcenet(*demo, "--resume", code=1)
    assert str(checkpoint) in capsys.readouterr().err
    checkpoint.unlink()
    scarcenet(*demo, "--resume")

    def table(text):
        return [line for line in text.splitlines() if line.startswith("|")]

    assert table(capsys.readouterr().out) == table(out)


def small(folder: Path, source: Path, count: int) -> Path:
    """A real set with a few instances of each split; its images stay where they are."""
    for split in ("train", "val", "test"):
        file, images = find_split(source, split)
        poses = read_coco(file, images)
        rows = np.linspace(0, len(poses) - 1, count).astype(int)
        write_json(folder / "annotations" / f"{split}.json", coco_json(poses.subset(rows)))
    (folder / "images").symlink_to((source / "images").resolve())
    return folder


@pytest.mark.parametrize("name, k", [("animals", 17), ("livestock", 18)])
def test_real_images(name, k, tmp_path, capsys):
    """Every annotation file is checked; all stages run on a few instances; their network is measured on each split."""
    if not (REAL / name).is_dir():
        pytest.skip(f"no real images at {REAL / name} (SCARCENET_DATA)")
    scarcenet("check", REAL / name)
    out = capsys.readouterr().out
    files = sorted((REAL / name / "annotations").glob("*.json"))
    assert out.count("broken images: 0") == len(files) and out.count(f"{k} keypoints each") == len(files)
    train(small(tmp_path / "set", REAL / name, 12), tmp_path / "run", "--epochs", 1)
    weights = tmp_path / "run" / "teacher.safetensors"
    assert weights.is_file()
    for file in files:
        if file.stem not in ("train", "test"):  # the largest: nothing but more of the same
            scarcenet("eval", weights, "--data", file, "--json", tmp_path / file.name, "--device", "cpu")
            scores = json.loads((tmp_path / file.name).read_text())["teacher"]
            assert scores["overall"]["instances"] == len(read_coco(file)) and len(scores["keypoint"]) == k
