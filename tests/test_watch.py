"""Where nobody watches: lines instead of bars, a log, events for TensorBoard."""

import io
import sys
import types

import pytest

from scarcenet.cli import main as cli
from scarcenet.run.folder import read_rows
from scarcenet.utils import progress as module
from scarcenet.utils.files import read_json, write_json
from scarcenet.utils.progress import LoggedStream, Progress, duration, logged, watched

TINY = "demo --network hrnet_tiny --size 32 --device cpu --labels 1 --views 2 --batch 8 --supervised-batch 8".split()
TINY += "--supervised-repeat 1 --labelled-repeat 1 --epochs 1 --supervised-epochs 2 --backbone".split()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that every look moves by ten seconds."""
    now = [0.0]

    def tick() -> float:
        now[0] += 10.0
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", tick)
    return now


def test_a_line_about_every_minute(clock, capsys):
    """Its share, the time that is left, and the note, which is asked for only then."""
    asked = []
    with Progress("scarcenet", 40, done=8, unit="steps") as progress:
        for n in range(32):
            progress.update(note=lambda n=n: asked.append(n) or f"epoch 1 of 2, loss {n}")
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) == len(asked) <= 7
    assert lines[0].startswith("scarcenet: epoch 1 of 2, loss ") and "%" in lines[0] and lines[0].endswith(" left")
    assert " of 40 steps)" in lines[0]


def test_nothing_where_nothing_is_asked_for(clock, capsys):
    assert list(watched(range(40), "images", 40, shown=False)) == list(range(40))
    assert capsys.readouterr().err == ""


def test_without_a_total(clock, capsys):
    list(watched(iter(range(12)), "film", unit="frames"))
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("film: ") and line.endswith(" so far") for line in lines)
    assert duration(59) == "59 s" and duration(3600) == "1 h 0 min"


def test_a_terminal_has_a_bar_and_its_log_the_lines(clock, monkeypatch, tmp_path):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with logged(tmp_path / "logs" / "a.log"):
        print("a line", file=sys.stderr)
        list(watched(range(40), "images", 40))
    log = (tmp_path / "logs" / "a.log").read_text()
    assert "\r" in terminal.getvalue() and "\r" not in log
    assert log.startswith("a line\nimages: ") and terminal.getvalue().startswith("a line\n")


def test_a_log_that_cannot_be_written_stops_nothing():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    screen = io.StringIO()
    print("text", file=LoggedStream(screen, Full()))
    assert screen.getvalue() == "text\n"


def test_log(zoo, tmp_path, capsys):
    """What is printed, errors included, goes to the end of the file; a log in the run's own folder is no obstacle."""
    log = tmp_path / "run" / "train.log"
    words = ["train", *TINY, "", "--data", str(zoo), "--out", str(tmp_path / "run"), "--log", str(log)]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert all(line in log.read_text() for line in (printed.out + printed.err).splitlines())
    assert cli.main(words) == 1
    assert "already exists" in capsys.readouterr().err and "already exists" in log.read_text().splitlines()[-1]
    assert cli.main(["check", str(tmp_path / "none"), "--log", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_of_the_program_is_in_the_log(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scarcenet.data.layout.annotation_files", lambda data: 1 / 0)
    assert cli.main(["check", str(zoo), "--log", str(tmp_path / "log")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err and "ZeroDivisionError" in (tmp_path / "log").read_text()


def test_what_cannot_be_printed(zoo, tmp_path, monkeypatch):
    """A letter that the encoding of stdout lacks, a stdout or stderr that is closed: the work is done all the same."""
    content = read_json(zoo / "annotations" / "ap10k-val-split1.json")
    for category in content["categories"]:
        category["name"] += " 猫"
    write_json(tmp_path / "val.json", content)
    words = ["check", str(tmp_path / "val.json"), "--images", str(zoo / "data")]
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="cp1252"))
    assert cli.main(words) == 0
    sys.stdout.flush()
    assert rb"\u732b" in screen.getvalue()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
        assert cli.main([*words, "--log", str(tmp_path / "log")]) == 0
    assert "猫" in (tmp_path / "log").read_text(encoding="utf-8")


def test_every_long_command_has_a_log(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main(
                [name, "demo", "--help"] if name in ("train", "study", "ablate", "suggest-study") else [name, "--help"]
            )
        assert "--log" in capsys.readouterr().out, name


def test_tensorboard_is_asked_for(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = ["train", *TINY, "", "--data", str(zoo), "--out", str(tmp_path / "run"), "--tensorboard"]
    assert cli.main(words) == 1
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers_of_metrics(zoo, tmp_path, monkeypatch):
    """With a stand-in: the same names and numbers, one step an epoch, later ones of an interrupted run purged."""
    events, purged = {}, []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder.endswith("tensorboard")
            purged.append(purge_step)

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            events[name, step] = value

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    words = ["train", *TINY, "", "--data", str(zoo), "--out", str(tmp_path / "run"), "--tensorboard"]
    assert cli.main(words) == 0
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert purged == [1, 2, 3] and len(rows) == 3
    for step, row in enumerate(rows, 1):
        assert events[f"{row['stage']}/loss", step] == float(row["loss"])
        assert events[f"{row['stage']}/peak", step] == float(row["peak"])
    assert ("scarcenet/teacher_AP", 3) in events
