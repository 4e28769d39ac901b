"""A grid on a tiny zoo: whole, stopped and continued, in the transfer setting; and its messages about bad input."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from scarcenet.cli import main as cli
from scarcenet.config import OFFICIAL, PRESETS, Config
from scarcenet.data.coco import find_split, read_coco
from scarcenet.data.loader import steps_per_epoch
from scarcenet.experiments import ablation, jobs
from scarcenet.experiments.ablation import (
    STAGE_3_FIELDS,
    Cell,
    add_row,
    grid_cells,
    matched_steps,
    read_grid,
    row_columns,
    scale_repeats,
    until_stage_3,
)
from scarcenet.experiments.jobs import Cluster, StudyJob
from scarcenet.experiments.study import STUDY_METHODS, run_study
from scarcenet.run.folder import open_run

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("supervised", "scarcenet", "official", "all labels")


@pytest.fixture(scope="module")
def config(zoo):
    return Config(
        data=str(zoo),
        labels=1,
        device="cpu",
        precision="float32",
        network="hrnet_tiny",
        size=32,
        sigma=1.0,
        supervised_epochs=1,
        supervised_schedule="one_cycle",
        supervised_batch=8,
        epochs=1,
        schedule="one_cycle",
        views=1,
        batch=8,
        evaluate_every=1,
    )


def train(config, folder, methods=METHODS, counts=(1,)) -> list[dict]:
    """The new rows of a grid with one seed."""
    return list(run_study(config, folder, counts=counts, seeds=(0,), methods=methods))


def numbers(row) -> dict:
    """A row without its seconds."""
    return {k: str(v) for k, v in row.items() if k != "seconds"}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A finished grid, its folder and its rows: one number of labels, one seed, four methods."""
    folder = tmp_path_factory.mktemp("study")
    return folder, train(config, folder)


def test_rows(whole, config):
    folder, rows = whole
    written_rows = read_grid(folder / "study.csv")
    assert list(written_rows) == [Cell("1", 0, m) for m in METHODS]
    test = read_coco(*find_split(config.data, "test"))
    for row, written in zip(rows, written_rows.values(), strict=True):
        assert tuple(written) == row_columns(test, config) and numbers(row) == numbers(written)
    for method, row in zip(METHODS, rows, strict=True):
        stage_3 = method in ("scarcenet", "official")
        assert all((row[f"{d}_coverage"] != "") == stage_3 for d in ("pseudo", "reliable", "reusable"))
        assert row["selected_AP"] == row["teacher_AP"] or row["selected_epoch"] != 1
        assert 0 <= row["teacher_PCK"] <= 1 and all(f"{c}_PCK" in row for c in set(test.column("category")))
    # the official code's rules have a stage 1 of their own, the others share one, the baselines need none
    assert sorted(f.name for f in folder.glob("stage1*")) == ["stage1-0-official.safetensors", "stage1-0.safetensors"]


def test_stopped_and_continued(whole, config, tmp_path, monkeypatch):
    """Interrupted in its third training and missing a row of the first two, it ends with the same rows."""
    calls, real = [], ablation.evaluate_epochs

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ablation, "evaluate_epochs", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    monkeypatch.setattr(ablation, "evaluate_epochs", real)
    file = tmp_path / "study.csv"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3 and not list(tmp_path.glob("*.part"))
    file.write_text(lines[0] + lines[2])
    train(config, tmp_path)
    found, expected = read_grid(file), read_grid(whole[0] / "study.csv")
    assert {c: numbers(r) for c, r in found.items()} == {c: numbers(r) for c, r in expected.items()}
    assert train(config, tmp_path) == []  # finished: nothing is trained again


def test_transfer(config, tmp_path):
    """One family is labelled; the counts have no meaning; the others are rated apart."""
    transfer = replace(config, families=("Bovidae",))
    rows = train(transfer, tmp_path, methods=("supervised", "all labels"), counts=(5, 10))
    assert [(r["labels"], r["method"]) for r in rows] == [("Bovidae", "supervised"), ("Bovidae", "all labels")]
    assert all(0 <= r["other_families_PCK"] <= 1 for r in rows)


def test_as_many_steps(config):
    """The baselines have at least as many gradient steps as all stages together, and less than an epoch more."""
    poses = read_coco(*find_split(config.data, "train"))
    base = replace(
        config, supervised_epochs=5, supervised_milestones=(4,), supervised_repeat=3, labelled_repeat=2, epochs=4
    )
    few = 8  # one image of each of eight species, one animal on each
    total = 5 * 3 + 4 * steps_per_epoch(len(poses) + few, 8)
    for method, labelled, repeat in (("supervised", few, 3), ("all labels", len(poses), 1)):
        longer = matched_steps(replace(base, **STUDY_METHODS[method]), base, poses)
        steps = steps_per_epoch(labelled, 8, repeat)
        assert longer.epochs == 0 and total <= longer.supervised_epochs * steps < total + steps, method
        # the rate falls after the same share of the epochs
        assert longer.supervised_milestones == (round(4 / 5 * longer.supervised_epochs),), method


def test_fewer_labels_are_shown_more_often(config):
    """All numbers of labels have stages of about the same length."""
    poses = read_coco(*find_split(config.data, "train"))
    own = replace(config, labels=3, supervised_repeat=4, labelled_repeat=2)
    assert scale_repeats(own, own, poses) == own  # the configuration's own number: nothing changes
    one = scale_repeats(replace(own, labels=1), own, poses)  # 8 labelled instead of 24
    assert (one.supervised_repeat, one.labelled_repeat) == (12, 6)
    assert scale_repeats(own, one, poses).supervised_repeat == 4  # and back


def test_every_field_has_its_stage():
    """A method that changes stage 3 alone shares stage 1 with the others."""
    base = Config()
    assert until_stage_3(replace(base, **STUDY_METHODS["+ small loss"]), base) == base
    early = {name: getattr(OFFICIAL, name) for name in STUDY_METHODS["official"] if name not in STAGE_3_FIELDS}
    assert until_stage_3(replace(base, **STUDY_METHODS["official"]), base) == replace(base, **early)
    assert {"network", "supervised_lr", "views", "quantize_targets", "seed", "labels"}.isdisjoint(STAGE_3_FIELDS)


def test_order_of_cells():
    cells = grid_cells(Config(), ("5", "10"), (0, 1), ("a", "b"))
    assert cells[:4] == [Cell("5", 0, "a"), Cell("5", 0, "b"), Cell("10", 0, "a"), Cell("10", 0, "b")]
    assert len(cells) == 8
    transfer = grid_cells(Config(families=("Bovidae", "Felidae")), ("5", "10"), (0,), ("a",))
    assert {c.labels for c in transfer} == {"Bovidae Felidae"}


def test_two_processes_fill_one_file(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def row(n):
        return dict(labels="5", method="supervised", seed=n, teacher_AP=n / 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add_row(tmp_path / "study.csv", row(n)), range(40)))
    add_row(tmp_path / "study.csv", row(7) | dict(teacher_AP=0.5))  # once more: in place of the first
    rows = read_grid(tmp_path / "study.csv")
    assert {c.seed for c in rows} == set(range(40)) and rows[Cell("5", 7, "supervised")]["teacher_AP"] == "0.5"


# ---- the command, and what it says about bad input


def flags(config) -> list[str]:
    return [
        *("--data", config.data, "--device", "cpu", "--evaluate-every", "1"),
        *("--network", "hrnet_tiny", "--size", "32", "--views", "1"),
        *("--supervised-epochs", "1", "--supervised-repeat", "1", "--supervised-batch", "8"),
        *("--supervised-schedule", "one_cycle", "--schedule", "one_cycle"),
        *("--epochs", "1", "--batch", "8", "--labelled-repeat", "1"),
    ]


def run(*argv, code=0):
    assert cli.main([str(a) for a in argv]) == code


def interrupted(*_):
    """Instead of an evaluation, Ctrl-C."""
    raise KeyboardInterrupt


def test_command(config, tmp_path, capsys):
    argv = ["study", "animals", "--out", tmp_path / "s", "--counts", 1, "--backbone", "", *flags(config)]
    run(*argv, "--seeds", 0, "--methods", "supervised", "scarcenet")
    out = capsys.readouterr().out
    assert "1 of 2; about" in out and "2 of 2\n" in out and "over supervised" in out
    assert f"rows: {tmp_path / 's' / 'study.csv'}" in out
    # another seed is added; rows of other seeds stay, and are not shown
    run(*argv, "--seeds", 1, "--methods", "supervised", "--resume")
    out = capsys.readouterr().out
    assert "seed 1, supervised" in out and "seed 0" not in out and len(read_grid(tmp_path / "s" / "study.csv")) == 3
    # stopped: how to go on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "evaluate_epochs", interrupted)
        run(*argv, "--seeds", 2, "--methods", "supervised", "--resume", code=130)
    assert "go on with --resume" in capsys.readouterr().err


def error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_no_data(tmp_path, capsys):
    run("study", "animals", "--out", tmp_path / "s", "--data", tmp_path / "nowhere", "--device", "cpu", code=1)
    assert str(tmp_path / "nowhere") in error(capsys)


def test_unknown_method(config, tmp_path, capsys):
    run("study", "animals", "--out", tmp_path / "s", "--methods", "magic", *flags(config), code=1)
    assert "method 'magic': expected one of supervised, " in error(capsys)


def test_no_stage_3(config, tmp_path, capsys):
    run("study", "animals", "--out", tmp_path / "s", *flags(config), "--epochs", 0, code=1)
    assert "epochs: expected 1 or more" in error(capsys)


def test_another_configuration(whole, config, tmp_path, capsys):
    argv = ["study", "animals", "--out", tmp_path / "s", "--backbone", "", *flags(config)]
    argv += ["--counts", 1, "--seeds", 0, "--methods", "supervised"]
    run(*argv)
    capsys.readouterr()
    run(*argv, "--resume", "--lr", 0.5, code=1)
    assert "lr: expected 0.002, got 0.5" in error(capsys)
    run(*argv, code=1)
    assert "--resume" in error(capsys)


def test_another_configuration_in_the_library(whole, config):
    with pytest.raises(ValueError, match="lr: expected 0.001, got 0.5"):
        train(replace(config, lr=0.5), whole[0])


def test_a_folder_in_use_is_not_taken_over(config, tmp_path, monkeypatch):
    """A folder whose first training is running has no rows yet, and is not free; one whose start failed is."""
    no_data = replace(config, data=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        train(no_data, open_run(tmp_path / "s", no_data))

    def meanwhile(*_):
        with pytest.raises(ValueError, match="already exists"):
            open_run(tmp_path / "s", replace(config, lr=0.5))
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "evaluate_epochs", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        train(config, open_run(tmp_path / "s", config))


def test_a_training_that_fails_is_named(config, tmp_path, monkeypatch):
    def diverged(*_):
        raise ValueError("nan")

    monkeypatch.setattr(ablation, "evaluate_epochs", diverged)
    with pytest.raises(ValueError, match=r"1 labels, seed 0, supervised: nan"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        ("a,b\n1,2\n", "expected rows of a study"),
        ("labels,seed,method,cow_AP\n9,0,supervised,.1\n", "rows of another study"),
        ("labels,seed,method\n5,zero,supervised\n", "expected rows of a study"),
    ],
)
def test_csv_of_something_else(content, words, config, tmp_path):
    (tmp_path / "study.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        train(config, tmp_path, methods=("supervised",))
    assert (tmp_path / "study.csv").read_text() == content


def test_preset_is_for_photographs():
    preset = PRESETS["animals"]
    assert (preset.data, preset.backbone, preset.size) == ("animals", "lite0", 128)
    assert preset.supervised_epochs and preset.epochs


def test_a_training_that_fails_leaves_the_others(config, tmp_path):
    for seed in (0, 1):
        (tmp_path / f"stage1-{seed}.safetensors").write_text("not weights")
    methods, found = ("scarcenet", "supervised"), []
    with (
        pytest.warns(UserWarning, match="^1 labels, seed 0, scarcenet: .*; the other trainings go on$"),
        pytest.raises(
            ValueError, match=r"^1 labels, seed 0, scarcenet: .*stage1-0.safetensors.* \(1 more failed, too\)$"
        ),
    ):
        for row in run_study(config, tmp_path, counts=(1,), seeds=(0, 1), methods=methods):
            found.append((row["seed"], row["method"]))
    assert found == [(0, "supervised"), (1, "supervised")]
    assert {cell.method for cell in read_grid(tmp_path / "study.csv")} == {"supervised"}


# ---- jobs


def test_jobs_of_this_machine_train_a_grid(config, tmp_path, whole, capsys, monkeypatch):
    monkeypatch.setattr(jobs.os, "cpu_count", torch.get_num_threads)  # other threads round in another way
    grid = dict(counts=(1,), seeds=(0,), methods=METHODS[:2])
    rows = list(run_study(config, tmp_path, **grid, cluster=Cluster("local", options={"timeout_min": 5})))
    assert [row["method"] for row in rows] == list(METHODS[:2]) and "1 jobs" in capsys.readouterr().out
    by_method = {row["method"]: numbers(row) for row in whole[1]}
    assert [numbers(row) for row in rows] == [by_method[row["method"]] for row in rows]
    # a job that fails is named with the reason and its log
    log = next((tmp_path / "jobs").glob("*.err"))
    (tmp_path / "stage1-0-official.safetensors").write_text("not weights")
    with pytest.raises(
        ValueError, match=r"^1 of 1 jobs failed: job \d+: .*stage1-0-official.safetensors.*; its log: .*\.err$"
    ):
        list(run_study(config, tmp_path, **grid | dict(methods=METHODS[:3]), cluster=Cluster("local")))
    assert log.exists() and len(read_grid(tmp_path / "study.csv")) == 2


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        (Cluster("slurm"), 'cluster slurm: Could not detect "srun"'),
        (Cluster("local", options={"slurm_partitoin": "gpu"}), "cluster local: Unknown argument 'partitoin'"),
        (Cluster("local", options={"gpus_per_node": "one"}), 'cluster local: Parameter "gpus_per_node" expected type'),
        (Cluster("pbs"), "cluster pbs: "),
    ],
)
def test_what_a_cluster_does_not_take(config, tmp_path, cluster, reason):
    with pytest.raises(ValueError, match="^" + re.escape(reason)) as error:
        list(run_study(config, tmp_path, counts=(1,), seeds=(0,), methods=("supervised",), cluster=cluster))
    assert "\n" not in str(error.value)


def test_jobs_need_submitit(config, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('pip install "scarcenet[cluster]"')):
        list(run_study(config, tmp_path, counts=(1,), seeds=(0,), methods=("supervised",), cluster=Cluster("local")))


def test_a_job_that_is_ended_is_queued_again(config, tmp_path):
    job = StudyJob(config, tmp_path, tmp_path / "study.csv", [Cell("1", 0, "supervised")], STUDY_METHODS)
    again = job.checkpoint()
    assert again.function == job and job() == 1 and again.result() == 0  # its row is there


@pytest.mark.parametrize("name", ["one-machine", "two-machines"])
def test_accelerate_reads_the_settings_for_many_gpus(name):
    settings = load_config_from_file(str(ROOT / "nbs" / "accelerate" / f"{name}.yaml"))
    assert settings.num_processes == 8 * settings.num_machines and settings.mixed_precision == "no"
