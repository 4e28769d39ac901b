"""Two processes with half of a batch each are one process with the whole: the same masks, the same ledger, the same weights (computed in double precision, see launched.py)."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scarcenet.utils.files import read_json
from scarcenet.ledger.ledger import open_run_ledger
from scarcenet.relabel import Decision

# the flag's name notwithstanding: the processes talk by gloo, on CPUs
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
          "--mixed_precision", "no", "--dynamo_backend", "no"]
HERE = Path(__file__).parent
# what is compared is on CPUs, also where there are GPUs
ENV = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def run(command, **options):
    done = subprocess.run([str(c) for c in command], env=ENV, capture_output=True, text=True, timeout=400, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def outcomes(zoo, tmp_path_factory):
    """What one process and two have done with the same three steps of stage 3, after one epoch of stage 1 and the pseudo-labels."""
    folder = tmp_path_factory.mktemp("processes")
    run([sys.executable, HERE / "launched.py", zoo, folder / "1.pt"])
    run([*LAUNCH, HERE / "launched.py", zoo, folder / "2.pt"])
    one, two = (torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2) and one.keys() == two.keys()
    return one, two


def test_the_same_decisions(outcomes):
    """The quota of the small loss is the whole batch's; visits stand in the record in the order of one process."""
    for epoch in (1, 2, 3):                           # from the second on, the share that is kept is less than 1
        one, two = (o[f"scarce {epoch} record"] for o in outcomes)
        assert len(one["index"]) == 24 and set(one["index"].tolist()) == set(range(24))
        for name in ("index", "batch", "decision"):
            assert torch.equal(one[name], two[name]), (epoch, name)
        for name in ("label_loss", "offset", "target_xy", "teacher_xy"):
            torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-5, equal_nan=True)
        assert set(one["decision"].unique().tolist()) == set(Decision)


def test_the_same_pseudo_labels(outcomes):
    one, two = (o["pseudo"] for o in outcomes)
    torch.testing.assert_close(two["xy"], one["xy"], atol=1e-4, rtol=0)              # image px
    torch.testing.assert_close(two["score"], one["score"], atol=1e-6, rtol=0)


def test_the_same_weights(outcomes):
    one, two = outcomes
    assert one["steps"] == two["steps"] == 3
    for who in ("student", "teacher"):
        assert one[who].keys() == two[who].keys()
        for name, weight in one[who].items():
            torch.testing.assert_close(two[who][name], weight, atol=1e-8, rtol=0, msg=f"{who} {name}")
    # and this says something: they have gone a hundred thousand times as far
    assert max((one["student"][name] - weight).abs().max() for name, weight in one["before"].items()) > 1e-3


def test_the_same_losses(outcomes):
    one, two = outcomes
    for stage in ("supervised 1 losses", "scarce 1 losses", "scarce 3 losses"):
        assert two[stage] == pytest.approx(one[stage], rel=1e-6)


def test_command_line(zoo, tmp_path):
    """A run of two processes leaves one folder, whole: every keypoint of every epoch in the ledger, one table of epochs, one answer."""
    flags = ["demo", "--data", zoo, "--network", "tiny", "--backbone", "", "--size", "32", "--device", "cpu", "--supervised-epochs", "1",
             "--supervised-repeat", "1", "--epochs", "2", "--batch", "8", "--supervised-batch", "4", "--labelled-repeat", "1"]
    done = run([*LAUNCH, "-m", "scarcenet", "train", *flags, "--out", tmp_path / "run"])
    assert done.stdout.count("test split") == 1 and "2 x cpu" in done.stdout
    with open(tmp_path / "run" / "metrics.csv") as f:
        assert [(r["stage"], r["epoch"]) for r in csv.DictReader(f)] == [("supervised", "1"), ("scarce", "1"), ("scarce", "2")]
    ledger = open_run_ledger(tmp_path / "run")
    for epoch in ledger.epochs:
        assert sorted(set(ledger.record(epoch).index.tolist())) == list(range(len(ledger.instances)))
    # one process goes on with what two have begun, and finds it finished
    again = run([sys.executable, "-m", "scarcenet", "train", *flags, "--out", tmp_path / "run", "--resume"])
    table = lambda text: [line for line in text.splitlines() if line.startswith("|")]
    assert table(again.stdout) == table(done.stdout)
    # and both look at one's poses, and one tells
    asked = run([*LAUNCH, "-m", "scarcenet", "eval", tmp_path / "run", "--json", tmp_path / "eval.json"])
    assert asked.stdout.count("teacher by family") == 1
    assert read_json(tmp_path / "eval.json")["teacher"]["overall"]["AP"] == pytest.approx(read_json(tmp_path / "run" / "summary.json")["teacher"]["test"]["overall"]["AP"], abs=1e-3)
    run([*LAUNCH, "-m", "scarcenet", "pseudo", tmp_path / "run", "--out", tmp_path / "pseudo.json"])
    assert len(read_json(tmp_path / "pseudo.json")["annotations"]) == len(ledger.instances)


def test_a_batch_that_cannot_be_shared(zoo, tmp_path):
    flags = ["demo", "--data", zoo, "--network", "tiny", "--backbone", "", "--size", "32", "--device", "cpu", "--supervised-batch", "3"]
    done = subprocess.run([str(c) for c in (*LAUNCH, "-m", "scarcenet", "train", *flags, "--out", tmp_path / "run")], capture_output=True, text=True,
                          env=ENV, timeout=200)
    assert done.returncode != 0 and "scarcenet: 3 instances cannot be shared equally by 2 processes" in done.stderr


def test_work_for_one(tmp_path):
    """What has no shares to give away says so, and nothing has been written."""
    for command in (["demo"], ["study", "animals", "--data", tmp_path]):
        done = subprocess.run([str(c) for c in (*LAUNCH, "-m", "scarcenet", *command, "--out", tmp_path / "run")], capture_output=True, text=True, env=ENV, timeout=200)
        assert done.returncode != 0 and "is work for one process, but there are 2" in done.stderr
    assert not any(tmp_path.glob("run/*.csv"))


def test_a_notebook_that_was_alone():
    """Functions that were called before a launcher copies the process do not make the copies believe that they are alone."""
    program = """
from accelerate import debug_launcher
from scarcenet.utils.distributed import own_rows, processes
def work():
    assert processes() == 2 and own_rows(8).stop - own_rows(8).start == 4
assert processes() == 1
debug_launcher(work, num_processes=2)
"""
    run([sys.executable, "-c", program])
