"""A run from end to end on a tiny zoo: what it yields and writes, that it can be interrupted, what it may not see.

At the end, a few real animals are learnt by heart.
"""

import csv
import json
import math
from dataclasses import asdict, replace
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scarcenet.checkpoint import load_checkpoint, save_checkpoint, start
from scarcenet.config import OFFICIAL, Config, read_config
from scarcenet.data.augment import strong_geometry
from scarcenet.data.coco import Labels, find_split, read_coco
from scarcenet.data.labels import reveal
from scarcenet.data.loader import TrainingSet, load_crops, make_batch, seeded
from scarcenet.data.splits import known_labels
from scarcenet.evaluate import pck
from scarcenet.mean_teacher import ema_decay
from scarcenet.models.weights import load_weights
from scarcenet.predict.predictor import predict
from scarcenet.pseudo_labels import join_labels
from scarcenet.record import by_instance
from scarcenet.relabel import Decision
from scarcenet.run import train_run as train_run_module
from scarcenet.run.folder import open_run, read_rows
from scarcenet.run.load import load_run_data
from scarcenet.run.train_run import train_in_folder
from scarcenet.train import begin_scarcenet, fit, learn_scarcenet, learning_rate, make_engine

TINY = Config(
    network="hrnet_tiny",
    size=64,
    labels=1,
    device="cpu",
    precision="float32",
    seed=3,
    supervised_epochs=3,
    supervised_repeat=2,
    supervised_batch=8,
    supervised_schedule="one_cycle",
    supervised_lr=4e-3,
    views=2,
    epochs=3,
    batch=8,
    schedule="one_cycle",
    lr=2e-3,
    agree_px=3.0,
    evaluate_every=2,
)


@pytest.fixture(scope="module")
def config(zoo):
    return replace(TINY, data=str(zoo))


@pytest.fixture(scope="module")
def run_data(config, tmp_path_factory):
    return load_run_data(config, tmp_path_factory.mktemp("unused"))


@pytest.fixture(scope="module")
def whole(config, run_data):
    """A run without interruption: what it yielded (all its states are one object), and a copy of its last state."""
    epochs = list(fit(config, run_data.data))
    return epochs, snapshot(epochs[-1].state)


def snapshot(state) -> dict[str, torch.Tensor]:
    """Every number that a run goes on from, copied."""
    tensors = {f"student.{k}": v for k, v in state.student.state_dict().items()}
    tensors |= {f"teacher.{k}": v for k, v in state.teacher.state_dict().items()}
    tensors |= {f"optimiser.{i}.{k}": v for i, s in state.optimiser.state_dict()["state"].items() for k, v in s.items()}
    tensors["place"] = torch.tensor([state.stage == "scarcenet", state.epoch, state.step])
    if state.pseudo is not None:
        tensors["pseudo"] = torch.cat([state.pseudo.xy.flatten(1), state.pseudo.score], 1)
    return {k: v.clone() for k, v in tensors.items()}


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- what `fit` yields


def test_epochs(config, run_data, whole):
    epochs, n, k = whole[0], len(run_data.train), len(run_data.train.schema)
    expected = [(stage, i, 3) for stage in ("supervised", "scarcenet") for i in (1, 2, 3)]
    assert [(e.stage, e.epoch, e.epochs) for e in epochs] == expected
    labelled = int(run_data.data.labels.labelled.sum())
    assert 0 < labelled < n
    steps = math.ceil(n / config.batch)
    assert epochs[-1].state.step == 3 * steps
    for e in epochs:
        assert e.loss == pytest.approx(e.supervised + e.consistency, rel=1e-4)
        assert math.isfinite(e.loss) and e.seconds > 0
        if e.stage == "supervised":
            assert e.consistency == 0 and e.record is None
            continue
        record = by_instance(e.record)
        assert e.consistency > 0
        assert {t.shape[:2] for t in record[2:]} == {(n, k)} and torch.equal(record.index, torch.arange(n))
        assert e.record.batch.bincount().tolist() == [config.batch] * steps  # the last batch is filled up
        # the decision is TRUTH for every annotated keypoint of a labelled instance, and for no other
        truth = record.decision == Decision.TRUTH
        assert torch.equal(truth, run_data.data.labels.weight > 0)
        assert torch.equal(record.target_xy[truth], run_data.data.labels.xy[truth])
        assert (record.decision == Decision.RELIABLE).any()


def test_length_of_stage_one(config, run_data):
    state = next(fit(config, run_data.data)).state
    shown = int(run_data.data.labels.labelled.sum()) * config.supervised_repeat
    assert state.step == math.ceil(shown / config.supervised_batch)


def test_pseudo_labels_of_all(run_data, whole):
    pseudo, n = whole[0][-1].state.pseudo, len(run_data.train)
    assert pseudo.xy.shape == (n, 17, 2) and pseudo.score.shape == (n, 17)
    assert pseudo.xy.isfinite().all()


def test_what_a_step_does(config, run_data):
    """The student descends on both terms; the teacher equals it after the first step, and then averages it."""

    def two_steps(**changes):
        """After each of two steps: the parameters of student and teacher, and the losses."""
        settings = replace(config, rampup_epochs=1, **changes)
        state = begin_scarcenet(settings, run_data.data, start(settings, run_data.data))
        state.epoch = 1  # the ramp is over
        engine = make_engine(settings, state)
        labels = join_labels(run_data.data.labels, state.pseudo, settings.drop)
        results = []
        for n in range(2):
            engine.student.train()
            engine.teacher.eval()
            batch = make_batch(
                run_data.data.crops,
                labels,
                torch.arange(8) + 8 * n,
                schema=run_data.train.schema,
                rng=seeded(n),
                p_half=settings.half_body,
                strong=strong_geometry(settings),
            )
            losses, _ = learn_scarcenet(settings, run_data.data, state, engine, batch)
            state.step += 1
            student, teacher = ([p.detach().clone() for p in m.parameters()] for m in (state.student, state.teacher))
            results.append((student, teacher, losses))
        return results

    (first, teacher, losses), (second, later, _) = two_steps()
    assert losses[2] > 0 and losses[0] == pytest.approx(float(losses[1] + losses[2]), rel=1e-5)
    assert all(torch.equal(s, t) for s, t in zip(first, teacher, strict=True))
    assert ema_decay(1, config.ema) == 0.5
    for s, t, new in zip(second, teacher, later, strict=True):
        torch.testing.assert_close(new, 0.5 * t + 0.5 * s)
    assert any(not torch.equal(s, t) for s, t in zip(second, later, strict=True))
    without_teacher, _, supervised = two_steps(consistency=0.0)[0]
    assert supervised[2] == 0 and supervised[1] == losses[1]  # the same batch, and the student learns something else
    assert any(not torch.equal(a, b) for a, b in zip(without_teacher, first, strict=True))


def test_stage_one_alone(config, run_data):
    epochs = list(fit(replace(config, epochs=0), run_data.data))
    assert [e.stage for e in epochs] == ["supervised"] * 3 and epochs[-1].state.pseudo is None


def test_the_official_preset_trains(config, run_data):
    """With all switches of the preset, training goes through all stages."""
    quirks = {k: v for k, v in asdict(OFFICIAL).items() if v != getattr(Config(), k)}
    epochs = list(fit(replace(config, **quirks, supervised_epochs=1, epochs=2), run_data.data))
    assert [e.stage for e in epochs] == ["supervised", "scarcenet", "scarcenet"]
    assert all(math.isfinite(e.loss) for e in epochs)
    assert (epochs[-1].record.decision == Decision.IGNORED).any()  # dropped keypoints do not get the teacher's term


def test_rates():
    steps = [learning_rate(1.0, "step", (2, 4), epoch=e, progress=0.5) for e in range(6)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert learning_rate(1.0, "step", (), epoch=5, progress=1.0) == 1  # without milestones it never falls
    cycle = [learning_rate(1.0, "one_cycle", (), epoch=0, progress=p / 100) for p in range(101)]
    assert cycle[0] == pytest.approx(0.04) and cycle[-1] == pytest.approx(0, abs=1e-9)
    assert max(cycle) == cycle[20] == pytest.approx(1)
    assert cycle[:20] == sorted(cycle[:20]) and cycle[20:] == sorted(cycle[20:], reverse=True)


def test_loss_falls(config, run_data):
    """In stage 1 the losses of the last epochs are well below those of the first."""
    long = replace(config, supervised_epochs=16, supervised_repeat=4, epochs=0)
    losses = [e.loss for e in fit(long, run_data.data)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[1:4]) and losses[-1] < losses[0]


# ---- seeds


def test_same_seed_same_weights(config, run_data, whole):
    *_, last = fit(config, run_data.data)
    assert_same(snapshot(last.state), whole[1])


def test_other_seed_other_weights(config, run_data, whole):
    *_, last = fit(replace(config, seed=4), run_data.data)
    assert not same(snapshot(last.state), whole[1])


def test_global_random_state_is_left_alone(config, run_data):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    next(fit(config, run_data.data))
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- interruption


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_is_uninterrupted(config, run_data, whole, tmp_path, stop):
    """Stopped after an epoch of stage 1, between the stages or in stage 3, and resumed from the file."""
    run = fit(config, run_data.data)
    for _ in range(stop):
        state = next(run).state
    run.close()
    save_checkpoint(tmp_path / "checkpoint.safetensors", state)
    del state
    state = load_checkpoint(tmp_path / "checkpoint.safetensors", config, run_data.data)
    rest = list(fit(config, run_data.data, state))
    assert len(rest) == 6 - stop
    assert_same(snapshot(rest[-1].state), whole[1])
    for resumed, uninterrupted in zip(rest, whole[0][stop:], strict=True):
        assert resumed.loss == uninterrupted.loss and resumed.lr == uninterrupted.lr
        for a, b in zip(resumed.record or (), uninterrupted.record or (), strict=True):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


class PowerCut(Exception):
    pass


def cut_after(monkeypatch, name, calls):
    """The function `name` of the module fails when it is called for the (calls + 1)th time."""
    real, count = getattr(train_run_module, name), iter(range(calls))

    def failing(*args, **kwargs):
        if next(count, None) is None:
            raise PowerCut
        return real(*args, **kwargs)

    monkeypatch.setattr(train_run_module, name, failing)


@pytest.fixture(scope="module")
def finished(config, run_data, tmp_path_factory):
    folder = open_run(tmp_path_factory.mktemp("runs") / "whole", config)
    return folder, train_in_folder(config, folder, run_data)


FILES = {
    "config.json",
    "metrics.csv",
    "pseudo.json",
    "checkpoint.safetensors",
    "supervised.safetensors",
    "student.safetensors",
    "teacher.safetensors",
    "summary.json",
    "index.html",
    "figures",
    "ledger",
}
SCORES = ("supervised", "student", "teacher")


@pytest.mark.parametrize(
    "place, calls", [("append_metrics", 1), ("write_pseudo", 0), ("save_checkpoint", 4), ("save_figure", 1)]
)
def test_a_run_is_resumed_after_a_power_cut(config, run_data, finished, tmp_path, monkeypatch, place, calls):
    """Whatever it was writing, `resume` ends at the same weights, table and scores."""
    folder = open_run(tmp_path / "run", config)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, place, calls)
        train_in_folder(config, folder, run_data)
    assert not (folder / "summary.json").exists() or place == "save_figure"
    summary = train_in_folder(config, open_run(folder, config, resume=True), run_data, resume=True)
    for name in ("checkpoint", *SCORES):
        assert_same(load_file(folder / f"{name}.safetensors"), load_file(finished[0] / f"{name}.safetensors"))
    assert {n: summary["networks"][n] for n in SCORES} == {n: finished[1]["networks"][n] for n in SCORES}

    def timeless(rows):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    assert timeless(read_rows(folder / "metrics.csv")) == timeless(read_rows(finished[0] / "metrics.csv"))
    assert (folder / "pseudo.json").read_bytes() == (finished[0] / "pseudo.json").read_bytes()
    assert {f.name for f in folder.iterdir()} == FILES


def test_a_finished_run_resumed_trains_no_more(config, finished, run_data, tmp_path):
    folder = copytree(finished[0], tmp_path / "run")
    summary = train_in_folder(config, open_run(folder, config, resume=True), run_data, resume=True)
    assert (folder / "checkpoint.safetensors").read_bytes() == (finished[0] / "checkpoint.safetensors").read_bytes()
    assert {n: summary["networks"][n] for n in SCORES} == {n: finished[1]["networks"][n] for n in SCORES}


def test_checkpoints_of_other_runs_are_refused(config, run_data, finished, tmp_path):
    file = finished[0] / "checkpoint.safetensors"
    data, cut = run_data.data, tmp_path / "cut.safetensors"
    wide = replace(config, network="hrnet_w32")
    fewer = replace(data, crops=replace(data.crops, pixels=data.crops.pixels[:-1]))
    moved = replace(data, labels=data.labels._replace(xy=data.labels.xy + 1))
    cut.write_bytes(file.read_bytes()[:-1000])
    for checkpoint, settings, training_set, message in (
        (file, wide, data, "checkpoint.safetensors: not a checkpoint of this run"),
        (file, config, fewer, "checkpoint.safetensors: expected pseudo-labels of the data set's 24 instances, got 25"),
        (file, config, moved, "checkpoint.safetensors: checkpoint was trained with different labels"),
        (cut, config, data, "cut.safetensors: not a checkpoint of this run"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            load_checkpoint(checkpoint, settings, training_set)
        assert "\n" not in str(refused.value)


# ---- the held-back truth


def test_unlabelled_truth_never_reaches_training(config, run_data, whole):
    """Other keypoints for all unlabelled instances: the same weights to the last bit."""
    hidden = ~run_data.data.labels.labelled.numpy()
    truth = run_data.train.truth
    rng = np.random.default_rng(0)
    xy = np.where(hidden[:, None, None], rng.uniform(0, 300, truth.xy.shape).astype(np.float32), truth.xy)
    visible = np.where(hidden[:, None], rng.integers(1, 3, truth.visible.shape).astype(np.uint8), truth.visible)
    changed = replace(run_data.train, truth=truth._replace(xy=xy, visible=visible))
    labels = Labels(*map(torch.as_tensor, known_labels(config, changed)))
    data = TrainingSet(changed.schema, load_crops(changed.instances, config.size), labels)
    assert torch.equal(data.labels.labelled, run_data.data.labels.labelled)
    *_, last = fit(config, data)
    assert_same(snapshot(last.state), whole[1])


def test_labelled_truth_does(config, run_data, whole):
    """The counter-test: move the keypoints of one labelled instance and the weights change."""
    labels = run_data.data.labels
    xy = labels.xy.clone()
    xy[labels.labelled.nonzero()[0]] += 5
    *_, last = fit(config, replace(run_data.data, labels=labels._replace(xy=xy)))
    assert not same(snapshot(last.state), whole[1])


def test_files_of_truth_never_reach_training(config, run_data, whole, zoo, tmp_path):
    """The same through the files: scrambled keypoints in the annotations of unlabelled instances."""
    file, folder = find_split(zoo, "train")
    content = json.loads(file.read_text())
    labelled = set(np.array([i.id for i in run_data.train.instances])[run_data.data.labels.labelled.numpy()].tolist())
    rng = np.random.default_rng(1)
    for a in content["annotations"]:
        if a["id"] not in labelled:
            a["keypoints"] = [v if n % 3 == 2 else float(v + rng.normal(0, 30)) for n, v in enumerate(a["keypoints"])]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "data").symlink_to(folder)
    (tmp_path / "annotations" / file.name).write_text(json.dumps(content))
    for split in ("val", "test"):
        other = find_split(zoo, split)[0]
        (tmp_path / "annotations" / other.name).write_text(other.read_text())
    scrambled = load_run_data(replace(config, data=str(tmp_path)), tmp_path)
    assert not np.array_equal(scrambled.train.truth.xy, run_data.train.truth.xy)
    *_, last = fit(config, scrambled.data)
    assert_same(snapshot(last.state), whole[1])


# ---- the run's folder


def test_files_of_a_run(config, finished, whole):
    folder, summary = finished
    assert {f.name for f in folder.iterdir()} == FILES
    assert read_config(folder) == config
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {f.name for f in (folder / "figures").iterdir()} == {"curves.png", "decisions.png", "best.png", "worst.png"}
    for figure in (folder / "figures").iterdir():
        assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and figure.stat().st_size < 400_000


def test_metrics(config, finished, whole):
    with open(finished[0] / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["stage"], int(r["epoch"])) for r in rows] == [(e.stage, e.epoch) for e in whole[0]]
    assert [float(r["loss"]) for r in rows] == pytest.approx([e.loss for e in whole[0]])
    for row, epoch in zip(rows, whole[0], strict=True):
        decision = by_instance(epoch.record).decision if epoch.record else None
        for d in Decision:
            count = "" if decision is None else str(int((decision == d).sum()))
            assert row[f"{d.name.lower()}_count"] == count
        due = epoch.epoch in (2, 3)  # every second, and the last
        assert bool(row["student_AP"]) == due and bool(row["teacher_AP"]) == (due and epoch.stage == "scarcenet")


def test_summary(config, finished, run_data):
    folder, summary = finished
    assert summary["seed"] == config.seed and "cpu" in summary["device"]
    assert summary["seconds"] > 0 and summary["peak_rss_mb"] > 50
    for name in SCORES:
        for split, poses in run_data.evaluated.items():
            scores = summary["networks"][name][split]
            overall = scores["overall"]
            assert overall["instances"] == len(poses)
            assert 0 <= overall["AP"] <= 1 and 0 <= overall["PCK"] <= 1
            assert {"AP50", "AP75", "APM", "APL", "AR"} <= overall.keys()
            assert set(scores["category"]) == set(poses.column("category"))
            assert set(scores["family"]) == set(poses.column("family"))


def test_weights_are_those_that_were_evaluated(config, finished, run_data):
    folder, summary = finished
    for name in SCORES:
        model = train_run_module.build_network(config, 17)
        load_weights(model, folder / f"{name}.safetensors")
        scores = train_run_module.evaluate_network(model, run_data.evaluated["test"], run_data.crops["test"], config)
        assert scores["overall"] == summary["networks"][name]["test"]["overall"], name


def test_pseudo_labels_in_the_folder(config, finished, run_data, whole):
    """They are a COCO file that `read_coco` takes: the positions, the cut as flags, nothing of the truth."""
    poses = read_coco(finished[0] / "pseudo.json", images=run_data.train.folder)
    pseudo = whole[0][-1].state.pseudo
    assert [i.id for i in poses.instances] == [i.id for i in run_data.train.instances]
    np.testing.assert_allclose(poses.truth.xy, pseudo.xy.numpy(), atol=1e-3)
    unlabelled = ~run_data.data.labels.labelled  # whose labels training cuts
    above = join_labels(run_data.data.labels, pseudo, config.drop).weight > 0
    assert np.array_equal((poses.truth.visible == 2)[unlabelled], above[unlabelled].numpy())
    assert set(np.unique(poses.truth.visible)) == {1, 2}
    np.testing.assert_allclose(poses.truth.area, run_data.train.column("box")[:, 2:].prod(1))
    scores = [a["keypoint_scores"] for a in json.loads((finished[0] / "pseudo.json").read_text())["annotations"]]
    np.testing.assert_allclose(scores, pseudo.score.numpy(), atol=1e-4)


def test_page(finished):
    """It needs nothing but its figures beside it, and has every network's scores."""
    folder, summary = finished
    text = (folder / "index.html").read_text()
    assert f"scarcenet predict {folder.name}" in text
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    for figure in (folder / "figures").iterdir():
        assert f'src="figures/{figure.name}"' in text
    for name in SCORES:
        assert f"<td>{name}</td><td>{summary['networks'][name]['test']['overall']['AP']:.3f}</td>" in text
    assert "http" not in text and str(folder) not in text


def test_stage_one_alone_leaves_a_whole_folder(config, run_data, tmp_path):
    short = replace(config, supervised_epochs=1, epochs=0)
    summary = train_in_folder(short, open_run(tmp_path / "run", short), run_data)
    assert summary["networks"].keys() == {"supervised"} and summary["best"] == "supervised"
    of_stage_3 = {"ledger", "pseudo.json", "student.safetensors", "teacher.safetensors"}
    assert {f.name for f in (tmp_path / "run").iterdir()} == FILES - of_stage_3
    assert (tmp_path / "run" / "figures" / "best.png").is_file()
    assert "supervised" in (tmp_path / "run" / "index.html").read_text()


def test_a_folder_with_something_in_it_is_left_alone(config, finished):
    before = {f.name: f.stat().st_mtime_ns for f in finished[0].iterdir()}
    with pytest.raises(ValueError, match="already exists"):
        open_run(finished[0], config)
    with pytest.raises(ValueError, match="seed: expected 3"):
        open_run(finished[0], replace(config, seed=4), resume=True)
    assert {f.name: f.stat().st_mtime_ns for f in finished[0].iterdir()} == before


# ---- real images


@pytest.mark.slow
def test_eight_real_animals_are_learnt_by_heart(real_data):
    """Eight instances through all of the data's way, from the file to the strong views and back to image px."""
    poses = read_coco(*find_split(real_data / "animals", "train"))
    clear = (poses.truth.visible > 0).sum(1) >= 12
    large = poses.column("box")[:, 2:].max(1) > 120  # image px
    poses = poses.subset(np.flatnonzero(clear & large)[::40][:8])
    assert len(poses) == 8
    # of the defaults only the schedule is changed, and sigma, in proportion to maps of 16 px
    config = Config(
        network="hrnet_tiny",
        size=64,
        sigma=1.5,
        supervised_batch=16,
        supervised_repeat=20,
        supervised_epochs=120,
        supervised_lr=1.5e-2,
        supervised_schedule="one_cycle",
        epochs=0,
        device="cpu",
        precision="float32",
    )
    assert config.half_body > 0
    labels = reveal(poses, np.ones(len(poses), bool))
    data = TrainingSet(poses.schema, load_crops(poses.instances, config.size), Labels(*map(torch.as_tensor, labels)))
    *_, last = fit(config, data)
    found = predict(last.state.student, data.crops, config, schema=poses.schema)
    assert pck(poses, found.xy.numpy()) >= 0.95
