"""A run from end to end on a tiny zoo: what it yields and writes, that it can be interrupted, what it may not see; and real pictures learnt by heart."""
import csv
import json
import math
from dataclasses import asdict, replace
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scarcenet.data.augment import strong_geometry
from scarcenet.run import train_run as trials
from scarcenet.data.coco import Labels, find_split, read_coco
from scarcenet.config import ORIGINAL, Config
from scarcenet.data.loader import TrainingSet, load_canvases, make_batch, seeded
from scarcenet.evaluate import pck
from scarcenet.data.labels import reveal
from scarcenet.record import by_instance
from scarcenet.relabel import Decision
from scarcenet.checkpoint import load_checkpoint, save_checkpoint, start
from scarcenet.config import read_config
from scarcenet.run.folder import open_run, read_rows
from scarcenet.mean_teacher import ema_decay
from scarcenet.pseudo_labels import join_labels
from scarcenet.train import begin_scarce, fit, learn_scarce, learning_rate, make_engine
from scarcenet.predict.predictor import predict
from scarcenet.run.load import gather, known_labels
from scarcenet.run.train_run import train_run
from scarcenet.models.weights import load_weights

TINY = Config(network="tiny", size=64, labels="1", device="cpu", seed=3, supervised_epochs=3, supervised_repeat=2, supervised_batch=8,
              supervised_milestones=(), supervised_lr=4e-3, views=2, epochs=3, batch=8, milestones=(), lr=2e-3, agree_px=3.0, evaluate_every=2)


@pytest.fixture(scope="module")
def config(zoo):
    return replace(TINY, data=str(zoo))


@pytest.fixture(scope="module")
def material(config, tmp_path_factory):
    return gather(config, tmp_path_factory.mktemp("unused"))


@pytest.fixture(scope="module")
def whole(config, material):
    """The run that nothing interrupts: what it yielded (its states are one object) and its last state, as it was left."""
    epochs = list(fit(config, material.data))
    return epochs, snapshot(epochs[-1].state)


def snapshot(state) -> dict[str, torch.Tensor]:
    """Every number that a run goes on from, copied."""
    tensors = {f"student.{k}": v for k, v in state.student.state_dict().items()} | {f"teacher.{k}": v for k, v in state.teacher.state_dict().items()}
    tensors |= {f"optimiser.{i}.{k}": v for i, s in state.optimiser.state_dict()["state"].items() for k, v in s.items()}
    tensors |= {"place": torch.tensor([state.stage == "scarce", state.epoch, state.step])}
    return {k: v.clone() for k, v in tensors.items()} | ({} if state.pseudo is None else {"pseudo": torch.cat([state.pseudo.xy.flatten(1), state.pseudo.score], 1)})


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- what `fit` yields

def test_epochs(config, material, whole):
    epochs, n, k = whole[0], len(material.train), len(material.train.schema)
    assert [(e.stage, e.epoch, e.epochs) for e in epochs] == [(s, i, 3) for s in ("supervised", "scarce") for i in (1, 2, 3)]
    labelled = int(material.data.labels.labelled.sum())
    assert 0 < labelled < n
    steps = math.ceil(n / config.batch)
    assert epochs[-1].state.step == 3 * steps
    for e in epochs:
        assert e.loss == pytest.approx(e.supervised + e.consistency, rel=1e-4) and math.isfinite(e.loss) and e.seconds > 0
        if e.stage == "supervised":
            assert e.consistency == 0 and e.record is None
        else:
            record = by_instance(e.record)
            assert e.consistency > 0 and {t.shape[:2] for t in record[2:]} == {(n, k)} and torch.equal(record.index, torch.arange(n))
            assert e.record.batch.bincount().tolist() == [config.batch] * steps       # the last batch is filled up
            truth = record.decision == Decision.TRUTH
            assert torch.equal(truth, material.data.labels.weight > 0)          # every labelled keypoint was seen, and no other taken for one
            assert torch.equal(record.target_xy[truth], material.data.labels.xy[truth])
            assert (record.decision == Decision.RELIABLE).any()


def test_length_of_stage_one(config, material):
    state = next(fit(config, material.data)).state
    assert state.step == math.ceil(int(material.data.labels.labelled.sum()) * config.supervised_repeat / config.supervised_batch)


def test_pseudo_labels_of_all(material, whole):
    pseudo = whole[0][-1].state.pseudo
    assert pseudo.xy.shape == (len(material.train), 17, 2) and pseudo.score.shape == (len(material.train), 17)
    assert pseudo.xy.isfinite().all()


def test_what_a_step_does(config, material):
    """The student descends on both terms; the teacher is the student after the first step, and then the average that `ema_decay` says."""
    def steps(**changes):
        settings = replace(config, ramp_epochs=1, **changes)
        state = begin_scarce(settings, material.data, start(settings, material.data))
        state.epoch, engine = 1, make_engine(settings, state)                   # the ramp is over
        labels, seen = join_labels(material.data.labels, state.pseudo, settings.drop), []
        for n in range(2):
            engine.student.train()
            engine.teacher.eval()
            batch = make_batch(material.data.canvases, labels, torch.arange(8) + 8 * n, material.train.schema, seeded(n), settings.half_body, strong_geometry(settings))
            losses, _ = learn_scarce(settings, material.data, state, engine, batch)
            state.step += 1
            seen.append([[p.detach().clone() for p in net.parameters()] for net in (state.student, state.teacher)] + [losses])
        return seen

    (first, teacher, losses), (second, later, _) = steps()
    assert losses[2] > 0 and losses[0] == pytest.approx(float(losses[1] + losses[2]), rel=1e-5)
    assert all(torch.equal(s, t) for s, t in zip(first, teacher))
    assert ema_decay(1, config.ema) == 0.5
    for s, t, new in zip(second, teacher, later):
        torch.testing.assert_close(new, 0.5 * t + 0.5 * s)
    assert any(not torch.equal(s, t) for s, t in zip(second, later))
    alone = steps(consistency=0.0)[0]
    assert alone[2][2] == 0 and alone[2][1] == losses[1]                        # the same batch, and what is learnt from it differs
    assert any(not torch.equal(a, b) for a, b in zip(alone[0], first))


def test_stage_one_alone(config, material):
    epochs = list(fit(replace(config, epochs=0), material.data))
    assert [e.stage for e in epochs] == ["supervised"] * 3 and epochs[-1].state.pseudo is None


def test_the_original_trains(config, material):
    """Its preset, with all that it does differently, goes through all stages."""
    quirks = {k: v for k, v in asdict(ORIGINAL).items() if v != getattr(Config(), k)}
    epochs = list(fit(replace(config, **quirks, supervised_epochs=1, epochs=2), material.data))
    assert [e.stage for e in epochs] == ["supervised", "scarce", "scarce"] and all(math.isfinite(e.loss) for e in epochs)
    assert (epochs[-1].record.decision == Decision.IGNORED).any()              # the dropped keypoints get no consistency term


def test_rates():
    assert [learning_rate(1.0, (2, 4), e, 0.5) for e in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cycle = [learning_rate(1.0, (), 0, p / 100) for p in range(101)]
    assert cycle[0] == pytest.approx(0.04) and max(cycle) == cycle[20] == pytest.approx(1) and cycle[-1] == pytest.approx(0, abs=1e-9)
    assert cycle[:20] == sorted(cycle[:20]) and cycle[20:] == sorted(cycle[20:], reverse=True)


def test_loss_falls(config, material):
    """Stage 1 on its own batches: the last epochs' losses are well below the first ones'."""
    losses = [e.loss for e in fit(replace(config, supervised_epochs=16, supervised_repeat=4, epochs=0), material.data)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[1:4]) and losses[-1] < losses[0]


# ---- seeds

def test_same_seed_same_weights(config, material, whole):
    *_, last = fit(config, material.data)
    assert_same(snapshot(last.state), whole[1])


def test_other_seed_other_weights(config, material, whole):
    *_, last = fit(replace(config, seed=4), material.data)
    assert not same(snapshot(last.state), whole[1])


def test_global_random_state_is_left_alone(config, material):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    next(fit(config, material.data))
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- interruption

@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_is_uninterrupted(config, material, whole, tmp_path, stop):
    """Stopped after any epoch, of stage 1, between the stages or in stage 3, and taken up from the file."""
    run = fit(config, material.data)
    for _ in range(stop):
        state = next(run).state
    run.close()
    save_checkpoint(tmp_path / "checkpoint.safetensors", state)
    del state
    state = load_checkpoint(tmp_path / "checkpoint.safetensors", config, material.data)
    rest = list(fit(config, material.data, state))
    assert len(rest) == 6 - stop
    assert_same(snapshot(rest[-1].state), whole[1])
    for ours, theirs in zip(rest, whole[0][stop:]):
        assert ours.loss == theirs.loss and ours.rate == theirs.rate
        assert (ours.record is None and theirs.record is None) or all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(ours.record, theirs.record))


class PowerCut(Exception):
    pass


def cut_after(monkeypatch, name, calls):
    """`trials.name` fails when it is called for the (calls + 1)th time."""
    real, count = getattr(trials, name), iter(range(calls))

    def failing(*args, **kwargs):
        if next(count, None) is None:
            raise PowerCut
        return real(*args, **kwargs)
    monkeypatch.setattr(trials, name, failing)


@pytest.fixture(scope="module")
def finished(config, material, tmp_path_factory):
    folder = open_run(tmp_path_factory.mktemp("runs") / "whole", config)
    return folder, train_run(config, folder, material)


FILES = {"config.json", "metrics.csv", "pseudo.json", "checkpoint.safetensors", "supervised.safetensors", "student.safetensors",
         "teacher.safetensors", "summary.json", "index.html", "pictures", "ledger"}
SCORES = ("supervised", "student", "teacher")


@pytest.mark.parametrize("place, calls", [("append_metrics", 1), ("write_pseudo", 0), ("save_checkpoint", 4), ("save_figure", 1)])
def test_a_run_is_taken_up_again(config, material, finished, tmp_path, monkeypatch, place, calls):
    """Whatever it was doing when the power went, `resume` ends at the same weights, table and scores."""
    folder = open_run(tmp_path / "run", config)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(patch, place, calls)
        train_run(config, folder, material)
    assert not (folder / "summary.json").exists() or place == "save_figure"
    summary = train_run(config, open_run(folder, config, resume=True), material, resume=True)
    for name in ("checkpoint", *SCORES):
        assert_same(load_file(folder / f"{name}.safetensors"), load_file(finished[0] / f"{name}.safetensors"))
    assert {n: summary[n] for n in SCORES} == {n: finished[1][n] for n in SCORES}
    timeless = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert timeless(read_rows(folder / "metrics.csv")) == timeless(read_rows(finished[0] / "metrics.csv"))
    assert (folder / "pseudo.json").read_bytes() == (finished[0] / "pseudo.json").read_bytes()
    assert {f.name for f in folder.iterdir()} == FILES


def test_a_finished_run_resumed_trains_no_more(config, finished, material, tmp_path):
    folder = copytree(finished[0], tmp_path / "run")
    summary = train_run(config, open_run(folder, config, resume=True), material, resume=True)
    assert (folder / "checkpoint.safetensors").read_bytes() == (finished[0] / "checkpoint.safetensors").read_bytes()
    assert {n: summary[n] for n in SCORES} == {n: finished[1][n] for n in SCORES}


def test_checkpoints_of_others_are_refused(config, material, finished, tmp_path):
    file = finished[0] / "checkpoint.safetensors"
    with pytest.raises(ValueError, match="checkpoint.safetensors") as wide:
        load_checkpoint(file, replace(config, network="hrnet_w32"), material.data)
    fewer = replace(material.data, canvases=replace(material.data.canvases, pixels=material.data.canvases.pixels[:-1]))
    with pytest.raises(ValueError, match="checkpoint.safetensors: pseudo-labels") as short:
        load_checkpoint(file, config, fewer)
    with pytest.raises(ValueError, match="checkpoint.safetensors: was trained with other labels") as moved:
        load_checkpoint(file, config, replace(material.data, labels=material.data.labels._replace(xy=material.data.labels.xy + 1)))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut.safetensors") as cut:
        load_checkpoint(tmp_path / "cut.safetensors", config, material.data)
    assert not any("\n" in str(e.value) for e in (wide, short, moved, cut))


# ---- the held-back truth

def test_unlabelled_truth_never_reaches_training(config, material, whole):
    """Other keypoints for all unlabelled instances: the same weights to the last bit."""
    hidden = ~material.data.labels.labelled.numpy()
    truth = material.train.truth
    rng = np.random.default_rng(0)
    xy = np.where(hidden[:, None, None], rng.uniform(0, 300, truth.xy.shape).astype(np.float32), truth.xy)
    visible = np.where(hidden[:, None], rng.integers(1, 3, truth.visible.shape).astype(np.uint8), truth.visible)
    changed = replace(material.train, truth=truth._replace(xy=xy, visible=visible))
    labels = known_labels(config, changed)
    data = TrainingSet(changed.schema, load_canvases(changed.instances, config.size), Labels(*map(torch.as_tensor, labels)))
    assert torch.equal(data.labels.labelled, material.data.labels.labelled)
    *_, last = fit(config, data)
    assert_same(snapshot(last.state), whole[1])


def test_labelled_truth_does(config, material, whole):
    """The counter-test: move one labelled keypoint and the weights change."""
    labels = material.data.labels
    xy = labels.xy.clone()
    xy[labels.labelled.nonzero()[0]] += 5
    *_, last = fit(config, replace(material.data, labels=labels._replace(xy=xy)))
    assert not same(snapshot(last.state), whole[1])


def test_files_of_truth_never_reach_training(config, material, whole, zoo, tmp_path):
    """The same through the files: scrambled keypoints in the annotations of unlabelled instances."""
    file, folder = find_split(zoo, "train")
    content = json.loads(file.read_text())
    labelled = set(np.array([i.id for i in material.train.instances])[material.data.labels.labelled.numpy()].tolist())
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
    scrambled = gather(replace(config, data=str(tmp_path)), tmp_path)
    assert not np.array_equal(scrambled.train.truth.xy, material.train.truth.xy)
    *_, last = fit(config, scrambled.data)
    assert_same(snapshot(last.state), whole[1])


# ---- the run's folder

def test_files_of_a_run(config, finished, whole):
    folder, summary = finished
    assert {f.name for f in folder.iterdir()} == FILES
    assert read_config(folder) == config
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {f.name for f in (folder / "pictures").iterdir()} == {"curves.png", "decisions.png", "best.png", "worst.png"}
    for picture in (folder / "pictures").iterdir():
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size < 400_000


def test_metrics(config, finished, whole):
    with open(finished[0] / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["stage"], int(r["epoch"])) for r in rows] == [(e.stage, e.epoch) for e in whole[0]]
    assert [float(r["loss"]) for r in rows] == pytest.approx([e.loss for e in whole[0]])
    for row, epoch in zip(rows, whole[0]):
        for d in Decision:
            assert row[f"{d.name.lower()}_count"] == ("" if epoch.record is None else str(int((by_instance(epoch.record).decision == d).sum())))
        due = epoch.epoch in (2, 3)                                            # every second, and the last
        assert bool(row["student_AP"]) == due and bool(row["teacher_AP"]) == (due and epoch.stage == "scarce")


def test_summary(config, finished, material):
    folder, summary = finished
    assert summary["seed"] == config.seed and "cpu" in summary["device"] and summary["seconds"] > 0 and summary["peak_rss_mb"] > 50
    for name in SCORES:
        for split, poses in (("val", material.val), ("test", material.test)):
            overall = summary[name][split]["overall"]
            assert overall["instances"] == len(poses)
            assert 0 <= overall["AP"] <= 1 and 0 <= overall["PCK"] <= 1 and {"AP50", "AP75", "APM", "APL", "AR"} <= overall.keys()
            assert set(summary[name][split]["category"]) == set(poses.column("category"))
            assert set(summary[name][split]["family"]) == set(poses.column("family"))


def test_weights_are_those_that_were_evaluated(config, finished, material):
    folder, summary = finished
    for name in SCORES:
        model = trials.build_network(config, 17)
        load_weights(model, folder / f"{name}.safetensors")
        scores = trials.evaluate_network(model, material.test, material.canvases["test"], config)
        assert scores["overall"] == summary[name]["test"]["overall"], name


def test_pseudo_labels_in_the_folder(config, finished, material, whole):
    """They are a COCO file that `read_coco` takes: the positions, the cut as flags, nothing of the truth."""
    poses = read_coco(finished[0] / "pseudo.json", images=material.train.folder)
    pseudo = whole[0][-1].state.pseudo
    assert [i.id for i in poses.instances] == [i.id for i in material.train.instances]
    np.testing.assert_allclose(poses.truth.xy, pseudo.xy.numpy(), atol=1e-3)
    unlabelled = ~material.data.labels.labelled              # whose labels training cuts
    above = join_labels(material.data.labels, pseudo, config.drop).weight > 0
    assert np.array_equal((poses.truth.visible == 2)[unlabelled], above[unlabelled].numpy()) and set(np.unique(poses.truth.visible)) == {1, 2}
    np.testing.assert_allclose(poses.truth.area, material.train.column("box")[:, 2:].prod(1))
    scores = [a["keypoint_scores"] for a in json.loads((finished[0] / "pseudo.json").read_text())["annotations"]]
    np.testing.assert_allclose(scores, pseudo.score.numpy(), atol=1e-4)


def test_page(finished):
    """It stands alone: its pictures beside it, every network's number in it, nothing fetched."""
    folder, summary = finished
    text = (folder / "index.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    for picture in (folder / "pictures").iterdir():
        assert f'src="pictures/{picture.name}"' in text
    for name in SCORES:
        assert f"<td>{name}</td><td>{summary[name]['test']['overall']['AP']:.3f}</td>" in text
    assert "http" not in text and str(folder) not in text


def test_stage_one_alone_leaves_a_whole_folder(config, material, tmp_path):
    short = replace(config, supervised_epochs=1, epochs=0)
    summary = train_run(short, open_run(tmp_path / "run", short), material)
    assert "supervised" in summary and not {"student", "teacher"} & summary.keys()
    assert {f.name for f in (tmp_path / "run").iterdir()} == FILES - {"ledger", "pseudo.json", "student.safetensors", "teacher.safetensors"}
    assert (tmp_path / "run" / "pictures" / "best.png").is_file() and "supervised" in (tmp_path / "run" / "index.html").read_text()


def test_a_folder_with_something_in_it_is_left_alone(config, finished):
    before = {f.name: f.stat().st_mtime_ns for f in finished[0].iterdir()}
    with pytest.raises(ValueError, match="already there"):
        open_run(finished[0], config)
    with pytest.raises(ValueError, match="seed is 3 there"):
        open_run(finished[0], replace(config, seed=4), resume=True)
    assert {f.name: f.stat().st_mtime_ns for f in finished[0].iterdir()} == before


# ---- real pictures

def test_eight_real_animals_are_learnt_by_heart(real_data):
    """Eight instances through the complete way of the data, from the file to the strong views and back to image px."""
    poses = read_coco(*find_split(real_data / "animals", "train"))
    clear = (poses.truth.visible > 0).sum(1) >= 12
    large = poses.column("box")[:, 2:].max(1) > 120                            # image px
    poses = poses.subset(np.flatnonzero(clear & large)[::40][:8])
    assert len(poses) == 8
    # of the defaults only the schedule is changed, and sigma, in proportion to maps of 16 px
    config = Config(network="tiny", size=64, sigma=1.5, supervised_batch=16, supervised_repeat=20, supervised_epochs=120, supervised_lr=1.5e-2,
                    supervised_milestones=(), epochs=0, device="cpu")
    assert config.half_body > 0
    labels = reveal(poses, np.ones(len(poses), bool))
    data = TrainingSet(poses.schema, load_canvases(poses.instances, config.size), Labels(*map(torch.as_tensor, labels)))
    *_, last = fit(config, data)
    found = predict(last.state.student, data.canvases, config, poses.schema.swap)
    assert pck(poses, found.xy.numpy()) >= 0.95
