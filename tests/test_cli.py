"""The command line from end to end, on a small zoo and, where they are at hand, on real pictures."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scarcenet.cli import main as cli
from scarcenet.data.coco import coco_json, find_split, read_coco
from scarcenet.config import PRESETS, Config
from scarcenet.utils.files import read_json, write_json

REAL = Path(os.environ.get("SCARCENET_DATA", Path(__file__).parents[2] / "shared" / "data"))
TINY = ("--network tiny --size 64 --labels 1 --supervised-epochs 1 --supervised-milestones --supervised-batch 8 --epochs 2 --milestones "
        "--batch 8 --views 2 --centre-jitter 0 --evaluate-every 1 --device cpu").split()
WEIGHTS = ("supervised", "student", "teacher")


def scarcenet(*argv, code=0):
    assert cli.main([str(a) for a in argv]) == code


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small zoo in `zoo` and a finished run in `run`; nothing may change them."""
    folder = tmp_path_factory.mktemp("cli")
    scarcenet("zoo", "--out", folder / "zoo", "--train", 16, "--val", 4, "--test", 4)
    scarcenet("train", "original", "--data", folder / "zoo", "--out", folder / "run", *TINY)
    return folder


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_starts_at_once():
    """No command, no --help imports what takes long; counted in CPU seconds, which a busy machine does not stretch."""
    python("import sys, scarcenet.cli.main; assert not {'torch', 'numpy', 'cv2', 'matplotlib'} & set(sys.modules)")
    seconds = "import resource; u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    assert min(float(python("import scarcenet; " + seconds).stdout) for _ in range(3)) < 0.2
    helped = "import atexit, scarcenet.cli.main\nscarcenet.cli.main.sys.stdout = open('/dev/null', 'w')\ntry: scarcenet.cli.main.main(['--help'])\nexcept SystemExit: scarcenet.cli.main.sys.stdout = scarcenet.cli.main.sys.__stdout__\n"
    assert min(float(python(helped + seconds).stdout) for _ in range(3)) < 0.5


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


def test_every_choice_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "original", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = (Path(cli.__file__).parents[1] / "config.py").read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        note = source.split(f"    {field.name}: ", 1)[1].split('"""', 2)[1]
        assert note and note in words, field.name


def test_zoo_and_check(home, tmp_path, capsys):
    scarcenet("zoo", "--out", home / "zoo", "--train", 16, "--val", 4, "--test", 4)      # there already: nothing to do
    scarcenet("check", home / "zoo", "--draw", tmp_path, "--samples", 5)
    out = capsys.readouterr().out
    assert "16 pictures" in out and "17 keypoints" in out and "Bovidae" in out and out.count("broken pictures: 0") == 3
    from PIL import Image
    for split in ("train", "val", "test"):
        with Image.open(tmp_path / f"ap10k-{split}-split1.png") as sheet:
            assert np.asarray(sheet.convert("L")).std() > 20, "nothing is drawn"


def test_train_writes_a_whole_run(home, capsys):
    run = home / "run"
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.csv", "summary.json", "index.html", "pictures", "ledger", "pseudo.json",
                                               "checkpoint.safetensors", *(f"{w}.safetensors" for w in WEIGHTS)}
    scarcenet("train", "original", "--data", home / "zoo", "--out", run, *TINY, "--resume")     # finished: evaluates, prints
    out = capsys.readouterr().out
    assert "val split" in out and "test split" in out and f"page: {run / 'index.html'}" in out
    assert all(who in out for who in WEIGHTS)


def test_eval_agrees_with_the_run(home, tmp_path, capsys):
    scarcenet("eval", home / "run", "--json", tmp_path / "all.json", "--device", "cpu")
    out, scores, summary = capsys.readouterr().out, read_json(tmp_path / "all.json"), read_json(home / "run" / "summary.json")
    assert all(word in out for word in ("PCK@0.05", "PCK@0.1", "APM", "APL", "AR", "teacher by family", "teacher by category", "left_front_paw"))
    for who in WEIGHTS:
        expected = summary[who]["test"]["overall"]
        assert scores[who]["overall"]["PCK@0.1"] == expected.pop("PCK")
        assert expected.items() <= scores[who]["overall"].items()
        assert scores[who]["overall"]["PCK@0.05"] <= scores[who]["overall"]["PCK@0.1"]
    shutil.copy(home / "run" / "teacher.safetensors", tmp_path)
    scarcenet("eval", tmp_path / "teacher.safetensors", "--config", home / "run" / "config.json", "--data", home / "zoo", "--split", "test",
              "--json", tmp_path / "one.json", "--device", "cpu")
    assert read_json(tmp_path / "one.json")["teacher"] == scores["teacher"]


@pytest.mark.parametrize("rounded", [True, False])
def test_pseudo_is_stage_2(home, tmp_path, rounded):
    """The labels that the command makes with the network of stage 1 are those that a run makes itself, on heatmap pixels or between them.

    Not so their flags: a run cuts among the unlabelled, and the command does not ask who is labelled.
    """
    weights, run = home / "run" / "supervised.safetensors", home / "run"
    if not rounded:
        run = tmp_path / "fine"
        scarcenet("train", "original", "--data", home / "zoo", "--out", run, *TINY, "--no-rounded", "--supervised-epochs", 0, "--epochs", 1, "--weights", weights)
    scarcenet("pseudo", weights, "--config", run / "config.json", "--out", tmp_path / "p.json", "--device", "cpu")
    made, own = read_json(tmp_path / "p.json"), read_json(run / "pseudo.json")
    for a, b in zip(made["annotations"], own["annotations"], strict=True):
        np.testing.assert_allclose(np.delete(a["keypoints"], np.s_[2::3]), np.delete(b["keypoints"], np.s_[2::3]), atol=1e-3)
        np.testing.assert_allclose(a["keypoint_scores"], b["keypoint_scores"], atol=1e-3)
    scarcenet("check", tmp_path / "p.json", "--images", home / "zoo" / "data")


def test_one_stage_at_a_time(home, tmp_path, capsys):
    """Stage 1 alone, then stages 2 and 3 from its weights; in the transfer setting."""
    flags = ["--data", home / "zoo", *TINY, "--families", "Bovidae", "Canidae"]
    scarcenet("train", "original", "--out", tmp_path / "1", *flags, "--epochs", 0)
    assert not (tmp_path / "1" / "teacher.safetensors").exists()
    scarcenet("train", "original", "--out", tmp_path / "3", *flags, "--supervised-epochs", 0, "--epochs", 1,
              "--weights", tmp_path / "1" / "supervised.safetensors")
    assert "teacher, other families" in capsys.readouterr().out
    assert not (tmp_path / "3" / "supervised.safetensors").exists()
    assert "other families" in read_json(tmp_path / "3" / "summary.json")["teacher"]["test"]


def test_ctrl_c_and_resume(home, tmp_path):
    """Interrupted in the middle of stage 3: exit code 130 and a hint; with --resume it ends as it would have without."""
    argv = ["train", "original", "--data", str(home / "zoo"), "--out", str(tmp_path / "run"), *TINY, "--epochs", "40", "--evaluate-every", "40"]
    # a shell that starts its jobs in the background has them ignore Ctrl-C, and their children too
    awake = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", awake + "import sys; from scarcenet.cli.main import main; sys.exit(main())", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "pseudo.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.strip() == f"scarcenet: interrupted; {tmp_path / 'run'}: go on with --resume"
    assert not (tmp_path / "run" / "summary.json").exists() and not list(tmp_path.rglob("*.part"))


def test_resumed_is_uninterrupted(home, tmp_path, monkeypatch, capsys):
    from scarcenet.run import train_run as trials
    argv = ["train", "original", "--data", home / "zoo", "--out", tmp_path / "run", *TINY]
    real, calls = trials.append_metrics, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)
    monkeypatch.setattr(trials, "append_metrics", stop)
    scarcenet(*argv, code=130)
    monkeypatch.setattr(trials, "append_metrics", real)
    assert "--resume" in capsys.readouterr().err
    scarcenet(*argv, "--resume")
    for who in WEIGHTS:
        assert (tmp_path / "run" / f"{who}.safetensors").read_bytes() == (home / "run" / f"{who}.safetensors").read_bytes()


def test_explain(home, tmp_path, capsys):
    scarcenet("explain", home / "run", "--instance", 2, "--keypoint", "neck", "--epoch", 1, "--picture", tmp_path / "neck.png")
    out = capsys.readouterr().out
    assert "instance 2" in out and "neck, epoch 1 of 2" in out and "epochs: 1:" in out
    assert (tmp_path / "neck.png").read_bytes()[:4] == b"\x89PNG"
    scarcenet("explain", home / "run", "--instance", 2, "--keypoint", 3)                 # by number, in the last epoch
    assert "neck, epoch 2 of 2" in capsys.readouterr().out


def test_report(home, tmp_path, capsys):
    scarcenet("report", home / "run", "--out", tmp_path / "r.html", "--animals", 6)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "MB: " in capsys.readouterr().out and text.count("data:image/jpeg") == 6 and "</html>" in text and len(text) < 15e6


def test_labels_go_to_a_tool_and_come_back(home, tmp_path, capsys):
    """What is accepted, corrected by a person, is what the next run learns from."""
    scarcenet("accepted", home / "run", "--out", tmp_path / "labels.json", "--epoch", 2)
    content, poses = read_json(tmp_path / "labels.json"), read_coco(*find_split(home / "zoo", "train"))
    assert len(content["annotations"]) == len(poses)
    first = content["annotations"][0]
    assert len(first["keypoint_scores"]) == len(first["keypoint_decisions"]) == 17
    assert all((d in ("truth", "reliable", "reusable")) == (v > 0) for a in content["annotations"] for d, v in zip(a["keypoint_decisions"], a["keypoints"][2::3]))
    chosen = [a for a in content["annotations"] if a["num_keypoints"]][:3]
    for a in chosen:
        a["keypoints"][:3] = [31.0, 17.5, 2]                                            # the person moves the left eye
        a["id"] += 5000                                                                  # and the tool numbers anew
    write_json(tmp_path / "corrected.json", content | {"annotations": chosen})
    scarcenet("train", "original", "--data", home / "zoo", "--out", tmp_path / "next", *TINY, "--labels", tmp_path / "corrected.json", "--epochs", 1)
    from scarcenet.ledger.ledger import open_run_ledger
    ledger = open_run_ledger(tmp_path / "next")
    assert int(ledger.labelled.sum()) == 3 and (ledger.label_xy[ledger.labelled][:, 0] == np.float32([31.0, 17.5])).all()


def test_ablate(home, tmp_path, capsys):
    argv = ["ablate", "original", "--data", home / "zoo", "--out", tmp_path / "a", *TINY, "--epochs", 1, "--seeds", 3]
    scarcenet(*argv)
    out, rows = capsys.readouterr().out, (tmp_path / "a" / "ablation.csv").read_text().splitlines()
    assert len(rows) == 6 and all(word in out for word in ("supervised", "all pseudo-labels", "+ small loss", "+ re-labelling", "+ consistency"))
    (tmp_path / "a" / "ablation.csv").write_text("\n".join(rows[:-1]) + "\n")
    scarcenet(*argv, "--resume")
    assert capsys.readouterr().out == out


def test_demo(home, tmp_path, monkeypatch, capsys):
    tiny = read_json(home / "run" / "config.json") | {"milestones": (), "supervised_milestones": (), "families": (), "epochs": 1}
    monkeypatch.setitem(PRESETS, "demo", Config(**tiny))
    scarcenet("demo", "--out", tmp_path / "demo", "--seed", 2)
    out = capsys.readouterr().out
    for row in ("stage 1 ", "supervised, as many steps", "ScarceNet student", "ScarceNet teacher"):
        assert row in out
    assert f"page: {tmp_path / 'demo' / 'index.html'}" in out and (tmp_path / "demo" / "index.html").is_file()
    # an error of the process that trains the baseline is this one's; what is finished is not trained again
    (tmp_path / "demo" / "baseline" / "checkpoint.safetensors").write_bytes(b"torn")
    scarcenet("demo", "--out", tmp_path / "demo", "--seed", 2, "--resume", code=1)
    assert str(tmp_path / "demo" / "baseline" / "checkpoint.safetensors") in capsys.readouterr().err
    (tmp_path / "demo" / "baseline" / "checkpoint.safetensors").unlink()
    scarcenet("demo", "--out", tmp_path / "demo", "--seed", 2, "--resume")
    table = lambda text: [line for line in text.splitlines() if line.startswith("|")]
    assert table(capsys.readouterr().out) == table(out)


def small(folder: Path, source: Path, count: int) -> Path:
    """A real set with a few instances of each split; its pictures stay where they are."""
    for split in ("train", "val", "test"):
        file, images = find_split(source, split)
        poses = read_coco(file, images)
        rows = np.linspace(0, len(poses) - 1, count).astype(int)
        write_json(folder / "annotations" / f"{split}.json", coco_json(poses.subset(rows)))
    (folder / "images").symlink_to((source / "images").resolve())
    return folder


@pytest.mark.parametrize("name, k", [("animals", 17), ("livestock", 18)])
def test_real_pictures(name, k, tmp_path, capsys):
    """All annotation files are checked; all three stages run on a few instances; the networks are measured on the files' own splits."""
    if not (REAL / name).is_dir():
        pytest.skip(f"no real pictures at {REAL / name} (SCARCENET_DATA)")
    scarcenet("check", REAL / name)
    out = capsys.readouterr().out
    files = sorted((REAL / name / "annotations").glob("*.json"))
    assert out.count("broken pictures: 0") == len(files) and out.count(f"{k} keypoints each") == len(files)
    scarcenet("train", "original", "--data", small(tmp_path / "set", REAL / name, 12), "--out", tmp_path / "run", *TINY, "--epochs", 1)
    assert (tmp_path / "run" / "teacher.safetensors").is_file()
    for file in files:
        if file.stem not in ("train", "test"):     # the largest: nothing but more of the same
            scarcenet("eval", tmp_path / "run" / "teacher.safetensors", "--data", file, "--json", tmp_path / file.name, "--device", "cpu")
            scores = json.loads((tmp_path / file.name).read_text())["teacher"]
            assert scores["overall"]["instances"] == len(read_coco(file)) and len(scores["keypoint"]) == k
