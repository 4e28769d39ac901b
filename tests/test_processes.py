"""Two processes with half of a batch each compute what one process with the whole does: masks, ledger and weights.

In double precision, see launched.py.
"""

import csv
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from warm import Warm, command

from scarcenet.config import PRESETS, read_config
from scarcenet.ledger.ledger import open_ledger
from scarcenet.relabel import Decision
from scarcenet.run.folder import write_config
from scarcenet.utils.files import read_json

# despite the flag --multi_gpu the processes are connected by gloo, on CPUs
LAUNCH = [
    sys.executable,
    *"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0".split(),
    *"--mixed_precision no --dynamo_backend no".split(),
]
PROGRAM = Path(__file__).parent / "launched.py"
# CPUs are compared, also where there are GPUs
pytestmark = pytest.mark.slow  # each test starts processes of its own
ENV = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def run(words):
    done = subprocess.run([str(w) for w in words], env=ENV, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def two_processes():
    """The environments of two processes which find each other as a launcher's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [env | sizes | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def start_together(words):
    """`scarcenet` in two processes at once."""
    both = [Warm(command, words, env=env) for env in two_processes()]
    return [subprocess.CompletedProcess(words, p.wait(400), *p.communicate()) for p in both]


def together(words):
    """What the first of two processes has printed; the second prints nothing."""
    first, second = start_together(words)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-3000:] + second.stderr[-3000:]
    assert second.stdout == ""
    return first


def train_flags(zoo, more):
    """The arguments of `scarcenet train` for a small network on the CPU."""
    flags = "--network hrnet_tiny --size 32 --device cpu --precision float32"
    return ["train", "demo", "--data", zoo, "--backbone", "", *flags.split(), *more.split()]


def alone(zoo, out):
    import launched  # which changes batch norm

    launched.main(zoo, out)


@pytest.fixture(scope="module")
def outcomes(zoo, tmp_path_factory):
    """What one process and two compute in one epoch of stage 1, the pseudo-labels and three steps of stage 3."""
    folder = tmp_path_factory.mktemp("processes")
    assert Warm(alone, zoo, folder / "1.pt", env=ENV).wait(400) == 0
    run([*LAUNCH, PROGRAM, zoo, folder / "2.pt"])
    one, two = (torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2) and one.keys() == two.keys()
    return one, two


def test_the_same_decisions(outcomes):
    """The small-loss quota is that of the whole batch; the record's rows are in the order of one process."""
    for epoch in (1, 2, 3):  # from the second on, the share that is kept is less than 1
        one, two = (outcome[f"scarcenet {epoch} record"] for outcome in outcomes)
        assert len(one["index"]) == 24 and set(one["index"].tolist()) == set(range(24))
        for name in ("index", "batch", "decision"):
            assert torch.equal(one[name], two[name]), (epoch, name)
        for name in ("label_loss", "offset", "target_xy", "teacher_xy"):
            torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-5, equal_nan=True)
        assert set(one["decision"].unique().tolist()) == set(Decision)


def test_the_same_pseudo_labels(outcomes):
    one, two = (outcome["pseudo"] for outcome in outcomes)
    torch.testing.assert_close(two["xy"], one["xy"], atol=1e-4, rtol=0)  # image px
    torch.testing.assert_close(two["score"], one["score"], atol=1e-6, rtol=0)


def test_the_same_weights(outcomes):
    one, two = outcomes
    assert one["steps"] == two["steps"] == 3
    for network in ("student", "teacher"):
        assert one[network].keys() == two[network].keys()
        for name, weight in one[network].items():
            torch.testing.assert_close(two[network][name], weight, atol=1e-8, rtol=0, msg=f"{network} {name}")
    # the tolerance means something: training has moved the weights a hundred thousand times as far
    assert max((one["student"][name] - weight).abs().max() for name, weight in one["before"].items()) > 1e-3


def test_the_same_losses(outcomes):
    one, two = outcomes
    for stage in ("supervised 1 losses", "scarcenet 1 losses", "scarcenet 3 losses"):
        assert two[stage] == pytest.approx(one[stage], rel=1e-6)


def test_command_line(zoo, tmp_path):
    """A run of two processes leaves one complete folder: one table of epochs, every keypoint of each in the ledger."""
    epochs = "--supervised-epochs 1 --supervised-repeat 1 --epochs 2 --labelled-repeat 1"
    train = train_flags(zoo, f"{epochs} --batch 8 --supervised-batch 4")
    folder = tmp_path / "run"
    done = run([*LAUNCH, "-m", "scarcenet", *train, "--out", folder])
    assert done.stdout.count("test split") == 1 and "2 x cpu" in done.stdout
    with open(folder / "metrics.csv") as f:
        stages = [(row["stage"], row["epoch"]) for row in csv.DictReader(f)]
    assert stages == [("supervised", "1"), ("scarcenet", "1"), ("scarcenet", "2")]
    ledger = open_ledger(folder)
    for epoch in ledger.epochs:
        assert sorted(set(ledger.record(epoch).index.tolist())) == list(range(len(ledger.instances)))
    # one process resumes what two have begun, and finds it finished
    again = warm.run(command, [*train, "--out", folder, "--resume"], timeout=400, env=ENV)

    def table(text):
        return [line for line in text.splitlines() if line.startswith("|")]

    assert table(again.stdout) == table(done.stdout)
    # both predict their share of the poses, and one process reports
    evaluation = together(["eval", folder, "--json", tmp_path / "eval.json"])
    assert evaluation.stdout.count("teacher by family") == 1
    measured = read_json(tmp_path / "eval.json")["teacher"]["overall"]["AP"]
    expected = read_json(folder / "summary.json")["networks"]["teacher"]["test"]["overall"]["AP"]
    assert measured == pytest.approx(expected, abs=1e-3)
    together(["pseudo", folder, "--out", tmp_path / "pseudo.json"])
    assert len(read_json(tmp_path / "pseudo.json")["annotations"]) == len(ledger.instances)


def settle(home):
    """Choose the number format of a run; the second process comes when the first has written it."""
    from scarcenet.run import settings

    settings.has_bf16, settings.fastest_precision = lambda device: True, lambda *_: "bf16-eval"
    time.sleep(3 * int(os.environ["RANK"]))
    assert settings.settle_precision(read_config(home), home).precision == "bf16-eval"


def test_a_process_that_comes_late_finds_the_number_format(tmp_path):
    write_config(tmp_path, replace(PRESETS["demo"], device="cpu"))
    both = [Warm(settle, tmp_path, env=env) for env in two_processes()]
    assert [process.wait(100) for process in both] == [0, 0]
    assert read_config(tmp_path).precision == "bf16-eval"


def test_a_batch_that_cannot_be_shared(zoo, tmp_path):
    for done in start_together([*train_flags(zoo, "--supervised-batch 3"), "--out", tmp_path / "run"]):
        assert done.returncode != 0 and "scarcenet: 3 instances cannot be shared equally by 2 processes" in done.stderr


def test_work_for_one_process(tmp_path):
    """Work that cannot be shared is refused before anything is written."""
    for words in (["demo"], ["study", "animals", "--data", tmp_path]):
        for done in start_together([*words, "--out", tmp_path / "run"]):
            assert done.returncode != 0 and "expected one process, got 2" in done.stderr
    assert not any(tmp_path.glob("run/*.csv"))


def test_a_notebook_that_launches_processes():
    """Calls before a launcher copies the process must not fix the answers of the copies."""
    program = """
from accelerate import debug_launcher
from scarcenet.utils.distributed import barrier, rank_slice, world_size

def work():
    assert world_size() == 2 and rank_slice(8).stop - rank_slice(8).start == 4
    barrier()          # neither ends while the other is still connecting

assert world_size() == 1
debug_launcher(work, num_processes=2)
"""
    run([sys.executable, "-c", program])
