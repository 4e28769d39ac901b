"""Killed at any moment, ended by a batch system, started twice, on a machine without the modules of Unix."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from campaign_kill import TINY, campaign, content, start
from test_processes import ENV as TWO
from test_processes import LAUNCH, together
from warm import Warm

from scarcenet.utils import files, lock
from scarcenet.utils.lock import Holder, locked, read_holder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills(tmp_path):
    """Of a training, its report, a study and a prediction; python tests/campaign_kill.py has more."""
    assert campaign(tmp_path / "kills", 10)["wrong"] == []


@pytest.fixture(scope="module")
def whole(zoo, tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(["train", *TINY, "", "--data", zoo, "--out", folder / "run"])
    assert done.wait() == 0
    return content(folder)


def wait_for(file, process):
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm(zoo, whole, tmp_path):
    """Exit code 143, one line that says how to go on, and no epoch lost that was being written."""
    words = ["train", *TINY, "", "--data", zoo, "--out", tmp_path / "run"]
    process = start(words)
    wait_for(tmp_path / "run" / "metrics.csv", process)  # the epoch is being written
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "go on with --resume" in error and "Traceback" not in error
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() and not list((tmp_path / "run").glob(".*"))
    assert start(words, resume=True).wait() == 0
    assert content(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_of_two_processes_is_killed(zoo, tmp_path):
    """The other ends, and the run goes on to the same end."""

    def words(folder):
        return ["train", *TINY, "", "--data", zoo, "--out", folder / "run"]

    together(words(tmp_path / "a"))
    launch = [*LAUNCH, "-m", "scarcenet", *words(tmp_path / "b")]
    process = subprocess.Popen(list(map(str, launch)), env=TWO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(tmp_path / "b" / "run" / "checkpoint.safetensors", process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    together([*words(tmp_path / "b"), "--resume"])
    assert content(tmp_path / "b") == content(tmp_path / "a")


@pytest.mark.slow
def test_two_trainings_in_one_folder(zoo, tmp_path):
    """The second is told of the first, changes nothing, and may go on when the first is dead."""
    words = ["train", *TINY, "", "--data", zoo, "--out", tmp_path / "run"]
    first = start(words)
    wait_for(tmp_path / "run" / "config.json", first)
    first.send_signal(signal.SIGSTOP)  # at work, as long as this takes
    for resume in (False, True):
        second = start(words, resume)
        _, error = second.communicate(timeout=60)
        assert second.returncode == 1 and error.count("\n") == 1
        assert f"in use by process {first.pid} on {files.HOST}" in error
    first.kill()
    first.wait()
    assert (tmp_path / "run" / ".lock").exists()
    assert start(words, resume=True).wait() == 0
    assert not (tmp_path / "run" / ".lock").exists()


def draw_a_zoo(folder):
    from scarcenet.zoo.dataset import write_zoo

    write_zoo(folder, train=10**4, workers=2)


def touch_and_sleep(file):
    file.parent.mkdir()
    file.touch()
    time.sleep(600)


def sleep_beside(folder):
    from scarcenet.utils.subprocess import background_process

    with background_process(1, touch_and_sleep, folder / "begun") as wait:
        wait()


@pytest.mark.parametrize("work", [draw_a_zoo, pytest.param(sleep_beside, marks=pytest.mark.slow)])
def test_no_process_outlives_its_parent(tmp_path, work):
    """The parent is killed, and cannot end them itself."""
    first = Warm(work, tmp_path / "a")
    while not list(tmp_path.glob("a/begun")) + list(tmp_path.glob("a/data/*.jpg")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    others = psutil.Process(first.pid).children()
    first.kill()
    end = time.monotonic() + 60
    try:
        while any(files.is_running(p.pid) for p in others):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        for process in others:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_the_baseline_of_a_demo_is_held(tmp_path):
    """Like the folder of every run."""
    from scarcenet.experiments.baseline import demo_config, train_files

    with locked(tmp_path / "baseline" / ".lock"), pytest.raises(ValueError, match="baseline: in use by process"):
        train_files(demo_config(), tmp_path / "baseline", tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:.*whether it still runs")
def test_stale_locks(tmp_path, monkeypatch):
    """Of a dead process, of a number that is used again, of another machine that no longer answers, half written."""
    monkeypatch.setattr(lock, "LOST", 0.5)
    monkeypatch.setattr(lock, "BEAT", 0.3)
    alive = lock.this_process()
    dead = [Holder(files.HOST, 99999999, 1.0), alive._replace(started=1.0), Holder("elsewhere", 1, 1.0), None]
    for holder in dead:
        (tmp_path / ".lock").write_text(json.dumps(holder._asdict()) if holder else '{"host')
        with locked(tmp_path / ".lock"):
            assert read_holder(tmp_path / ".lock") == alive
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("late", [False, True])
def test_two_break_one_dead_lock(tmp_path, monkeypatch, late):
    """While one looks at the dead lock once more, another tries the same: only one of them has a lock afterwards."""
    file, dead, taken, others = tmp_path / ".lock", Holder(files.HOST, 99999999, 1.0), [], []
    file.write_text(json.dumps(dead._asdict()))

    def other():
        lock._break(file, dead)
        taken.append(lock._take(file))

    def read(path):
        found = read_holder(path)
        if not others:  # the first look
            others.append(threading.Thread(target=other))
            others[0].start()
            others[0].join(timeout=0.3)  # it waits for us
            assert others[0].is_alive() and not taken
        return found

    if late:  # the other is through before we begin
        other()
    else:
        monkeypatch.setattr(lock, "read_holder", read)
    lock._break(file, dead)
    taken.append(lock._take(file))
    for thread in others:
        thread.join()
    assert sorted(taken) == [False, True] and read_holder(file) == lock.this_process()


def test_a_dead_lock_is_broken_in_turns(tmp_path, monkeypatch):
    """Eight threads find a dead lock twenty times: never do two hold it at once."""
    monkeypatch.setattr(lock, "LOST", 0.1)  # so they look again after 10 ms
    file, dead, inside, wrong = tmp_path / ".lock", Holder(files.HOST, 99999999, 1.0), [], []

    def hold():
        with locked(file, wait=True):
            inside.append(1)
            wrong.extend(inside[1:])
            inside.pop()

    for _ in range(20):
        file.write_text(json.dumps(dead._asdict()))
        threads = [threading.Thread(target=hold) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and not list(tmp_path.iterdir())


def test_a_lock_of_another_machine(tmp_path, monkeypatch):
    """It is held as long as its holder touches it."""
    monkeypatch.setattr(lock, "LOST", 5.0)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    with locked(tmp_path / ".lock"):
        (tmp_path / ".lock").write_text(json.dumps(Holder("node7", 12, 1.0)._asdict()))
        with (
            pytest.warns(UserWarning, match="whether it still runs"),
            pytest.raises(ValueError, match="process 12 on node7"),
        ):
            with locked(tmp_path / ".lock"):
                pass


def add_twenty_rows(file, method):
    from scarcenet.experiments.ablation import add_row

    for n in range(20):
        add_row(file, dict(labels="1", seed=n, method=method, seconds=0.0))


def test_two_studies_fill_one_file(tmp_path):
    """No row is lost."""
    both = [Warm(add_twenty_rows, tmp_path / "study.csv", method) for method in ("supervised", "scarcenet")]
    assert [p.wait(120) for p in both] == [0, 0]
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 41
    assert [f.name for f in tmp_path.iterdir()] == ["study.csv"]


HIDDEN = """
import json, os, sys

import accelerate, cv2, pandas, psutil, timm, torch, torchvision  # which ask for themselves what there is

for name in ("resource", "fcntl"):
    sys.modules[name] = None
del os.pread, os.pwrite

from scarcenet.utils import device

assert device.resource is None
device.peak_rss_mb = lambda: 1.0  # psutil's number is Windows' own
import scarcenet.run.train_run

scarcenet.run.train_run.peak_rss_mb = device.peak_rss_mb
from scarcenet.cli.main import main

sys.exit(any(main(words) for words in json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_without_the_modules_of_unix(zoo, tmp_path):
    """As on Windows: a training with a cache on the disk, and a prediction."""
    flags = [*TINY, "", "--data", zoo, "--crop-cache-mb", "0", "--cache", tmp_path / "cache"]
    train = ["train", *flags, "--out", tmp_path / "run"]
    predict = ["predict", tmp_path / "run", zoo / "data", "--device", "cpu", "--out", tmp_path / "poses.csv"]
    words = json.dumps([train, predict], default=str)
    result = subprocess.run([sys.executable, "-c", HIDDEN, words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "poses.csv").exists() and list((tmp_path / "cache").glob("*.crops"))


def test_float16_scale_is_kept(zoo, tmp_path):
    """A run in float16 that is resumed goes on with the loss scale that it had found."""
    from dataclasses import replace

    from scarcenet.checkpoint import load_checkpoint, save_checkpoint
    from scarcenet.config import PRESETS
    from scarcenet.run.load import load_run_data
    from scarcenet.train import fit

    config = replace(PRESETS["demo"], network="hrnet_tiny", backbone="", size=32, labels=1, data=str(zoo), device="cpu")
    config = replace(config, precision="fp16", supervised_epochs=2, supervised_batch=8, supervised_repeat=1, epochs=0)
    data = load_run_data(config, tmp_path).data
    epochs = fit(config, data)
    state = next(epochs).state
    assert state.scale["_growth_tracker"] or state.scale["scale"] != 65536
    save_checkpoint(tmp_path / "c.safetensors", state)
    resumed = load_checkpoint(tmp_path / "c.safetensors", config, data)
    assert resumed.scale == state.scale
    last, again = next(epochs), next(fit(config, data, resumed))
    assert last.loss == again.loss and last.state.scale == again.state.scale
