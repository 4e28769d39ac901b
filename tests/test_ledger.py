"""The ledger: what training keeps of every decision, and that the same decisions follow from it again."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from scarcenet.config import OFFICIAL, Config
from scarcenet.ledger.audit import decision_table, draw_flow, label_outcomes, score_decisions, what_if, wrong_targets
from scarcenet.ledger.ledger import explain_keypoint, find_keypoint, open_ledger, read_frame, redecide
from scarcenet.record import read_epoch, start_ledger, write_epoch
from scarcenet.relabel import Decision
from scarcenet.run import train_run
from scarcenet.run.folder import open_run
from scarcenet.run.load import load_run_data
from scarcenet.run.train_run import train_in_folder
from scarcenet.train import fit
from scarcenet.utils import files

QUICK = dict(
    labels=1,
    device="cpu",
    precision="float32",
    network="hrnet_tiny",
    size=32,
    sigma=1.0,
    supervised_epochs=1,
    supervised_batch=8,
    epochs=3,
    keep_epochs=3,
    keep_floor=0.5,
    views=1,
    batch=8,
    labelled_repeat=2,
    rampup_epochs=2,
    drop=0.3,
)


def official(**changes) -> Config:
    """The official code's configuration with changes."""
    return replace(OFFICIAL, **changes)


@pytest.fixture(scope="module", params=[Config, official], ids=["default", "official"])
def run(request, zoo, tmp_path_factory):
    """A run's folder, its data, and the records that `fit` yielded."""
    config = request.param(data=str(zoo), **QUICK)
    folder = tmp_path_factory.mktemp("ledger")
    run_data = load_run_data(config, folder)
    train_in_folder(config, open_run(folder / "run", config), run_data)
    return folder / "run", run_data, {e.epoch: e.record for e in fit(config, run_data.data) if e.record}


def test_what_was_kept_is_what_happened(run):
    folder, run_data, records = run
    ledger = open_ledger(folder)
    assert ledger.epochs == (1, 2, 3) and ledger.names == run_data.train.schema.names
    assert torch.equal(ledger.labelled, run_data.data.labels.labelled)
    for epoch, record in records.items():
        for name, kept, was in zip(record._fields, ledger.record(epoch), record, strict=True):
            assert torch.equal(kept.nan_to_num(-1), was.nan_to_num(-1)), name


def test_the_same_rules_lead_to_the_same_decisions(run):
    ledger = open_ledger(run[0])
    for epoch in ledger.epochs:
        record = ledger.record(epoch)
        assert torch.equal(redecide(ledger, epoch, record), record.decision)
        frame = read_frame(ledger, [epoch], last=False)
        pd.testing.assert_frame_equal(
            read_frame(ledger, [epoch], last=False, instance=5),
            frame[frame["instance"] == 5].reset_index(drop=True),
            check_categorical=False,
        )
        unlabelled = frame[~frame["labelled"]]
        assert ((unlabelled["rank"] < unlabelled["quota"]) == (unlabelled["decision"] == "reliable")).all()


def test_other_rules(run):
    ledger = open_ledger(run[0])
    record = ledger.record(2)
    unlabelled = ~ledger.labelled[record.index]

    def count(kind, **rules):
        return int((redecide(ledger, 2, record, **rules)[unlabelled] == kind).sum())

    keeps = [count(Decision.RELIABLE, keep=k) for k in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert keeps == sorted(keeps) and keeps[0] == 0 < keeps[-1]
    agrees = [count(Decision.REUSABLE, agree_px=a) for a in (0.0, 0.3, 1.0, 100.0)]
    assert agrees == sorted(agrees) and agrees[0] == 0 < agrees[-1]
    drops = [count(Decision.RELIABLE, drop=d, keep=1.0) for d in (0.0, 0.3, 0.9)]
    assert drops == sorted(drops, reverse=True) and drops[0] > drops[-1] > 0
    # no rule touches a person's labels
    decision = redecide(ledger, 2, record, keep=0.0, agree_px=0.0, drop=0.99)
    assert torch.equal((decision == Decision.TRUTH)[~unlabelled], (record.decision == Decision.TRUTH)[~unlabelled])
    with pytest.raises(ValueError, match="drop: expected at least 0 and at most 1, got 2.0"):
        redecide(ledger, 2, record, drop=2.0)


def test_the_bias_of_the_official_code(run):
    """With and without its half pixel, the two answers agree where the recorded offsets say so."""
    ledger = open_ledger(run[0])
    record = ledger.record(1)
    unlabelled = ~ledger.labelled[record.index]
    for bias in (0.0, 0.5):
        reusable = redecide(ledger, 1, record, keep=0.0, agree_bias=bias) == Decision.REUSABLE
        agree = (record.offset + bias).square().sum(-1).sqrt() < ledger.config.agree_px
        assert torch.equal(reusable[unlabelled], agree[unlabelled])


def test_nothing_of_the_truth_is_in_it(run, tmp_path):
    """Another held-back truth, the same files, every byte."""
    folder, run_data, _ = run
    truth = run_data.train.truth
    hidden = ~run_data.data.labels.labelled.numpy()
    xy = truth.xy.copy()
    xy[hidden] += 7
    other = replace(run_data, train=replace(run_data.train, truth=truth._replace(xy=xy)))
    config = open_ledger(folder).config
    train_in_folder(config, open_run(tmp_path / "run", config), other)
    epochs = [f"epoch-{n:04d}.parquet" for n in (1, 2, 3)]
    files = sorted(f.name for f in (folder / "ledger").iterdir())
    assert files == [*epochs, "instances.parquet", "labels.parquet"]
    assert files == sorted(f.name for f in (tmp_path / "run/ledger").iterdir())
    for name in files:
        assert (folder / "ledger" / name).read_bytes() == (tmp_path / "run/ledger" / name).read_bytes(), name


def test_audit_by_hand(run):
    folder, run_data, _ = run
    ledger = open_ledger(folder)
    frame = score_decisions(ledger, run_data.train, [3])
    assert len(frame) == int((~ledger.labelled).sum()) * len(ledger.names)
    side = np.array([max(i.box[2:]) for i in run_data.train.instances])
    for _, row in frame.sample(60, random_state=0).iterrows():
        i, k = row["instance"], row["keypoint"]
        if not run_data.train.truth.visible[i, k]:
            assert np.isnan(row["target_right"])
            continue
        x, y = run_data.train.truth.xy[i, k]
        gap = np.hypot(row["target_x"] - x, row["target_y"] - y)
        assert row["target_right"] == (gap <= 0.1 * side[i])
    table = decision_table(frame)
    assert table["coverage"].sum() == pytest.approx(1) and table["count"].sum() == frame["target_right"].notna().sum()
    assert label_outcomes(frame).notna().sum() == table["count"].sum()
    asked = what_if(ledger, run_data.train, 3, rule="keep", values=[0.0, 1.0])
    assert asked[(asked["keep"] == 0) & (asked["decision"] == "reliable")]["coverage"].item() == 0


def test_outcomes_and_wrong_targets():
    """A wrong target is in use where a wrong label is accepted, and where a wrong answer replaces a right label."""
    cases = pd.DataFrame(
        [
            ("reliable", 1, 1, "kept", False),
            ("reliable", 0, 0, "wrongly accepted", True),
            ("reusable", 0, 1, "rescued", False),
            ("reusable", 1, 0, "lost", True),
            ("teacher_only", 1, 1, "lost", False),
            ("ignored", 0, 0, "left alone", False),
            ("reusable", np.nan, np.nan, np.nan, False),
        ],
        columns=["decision", "label_right", "target_right", "outcome", "wrong_target"],
    )
    assert label_outcomes(cases).astype(str).tolist() == cases["outcome"].astype(str).tolist()
    assert wrong_targets(cases).tolist() == cases["wrong_target"].tolist()


def test_figures_have_every_decision(run):
    """None is left out of the flow between the decisions."""
    ledger = open_ledger(run[0])
    frame = score_decisions(ledger, run[1].train)
    names = [text.get_text().replace(" ", "_") for text in draw_flow(frame).legends[0].get_texts()]
    assert sorted(names) == sorted(frame["decision"].unique())


def test_resuming_writes_no_epoch_twice(run, tmp_path):
    """A run that is stopped in stage 3, with a torn file left behind, ends with the same ledger."""
    folder, run_data, _ = run
    config = open_ledger(folder).config

    class PowerCut(Exception):
        pass

    real = train_run.save_checkpoint

    def cut(file, state):
        if state.stage == "scarcenet" and state.epoch == 2:
            raise PowerCut  # the epoch is in the ledger, but not in the checkpoint
        real(file, state)

    train_run.save_checkpoint = cut
    try:
        with pytest.raises(PowerCut):
            train_in_folder(config, open_run(tmp_path / "run", config), run_data)
    finally:
        train_run.save_checkpoint = real
    assert open_ledger(tmp_path / "run").epochs == (1, 2)
    left = tmp_path / f"run/ledger/.epoch-0003.parquet.{files._TAG}.99999999.part"  # of a process that was killed
    left.mkdir()
    (left / "epoch-0003.parquet").write_bytes(b"PAR1torn")
    train_in_folder(config, open_run(tmp_path / "run", config, resume=True), run_data, resume=True)
    ledger = open_ledger(tmp_path / "run")
    assert ledger.epochs == (1, 2, 3) and not left.exists()
    for name in ("epoch-0002.parquet", "epoch-0003.parquet", "labels.parquet"):
        assert (ledger.folder / name).read_bytes() == (folder / "ledger" / name).read_bytes()


def test_explain(run):
    """By name or number; without an epoch, of the last one; a decision is called as people call it."""
    ledger = open_ledger(run[0])
    frame = read_frame(ledger, [3])
    for _, row in frame.groupby("decision", observed=True).head(1).iterrows():
        text = ledger.explain(row["instance"], row["name"])
        assert text == explain_keypoint(ledger, row["instance"], row["keypoint"], 3)
        assert text.splitlines()[0].endswith(f"epoch 3 of 3: {row['decision'].replace('_', ' ').upper()}")


def test_a_number_is_an_index_even_if_the_names_are_numbers(run):
    ledger = replace(open_ledger(run[0]), names=tuple(str(n + 1) for n in range(17)))
    assert find_keypoint(ledger, 0, "2") == 1 and find_keypoint(ledger, 0, 2) == 2


def test_faults(run, tmp_path):
    folder, run_data, records = run
    val = run_data.evaluated["val"]
    ledger = open_ledger(folder)
    with pytest.raises(ValueError, match="expected the ledger of the instances and labels of .* got another"):
        start_ledger(ledger.folder, val, torch.zeros(len(val), dtype=torch.bool))
    with pytest.raises(ValueError, match="epoch 9 is not recorded; epochs 1 to 3 are"):
        explain_keypoint(ledger, 0, "nose", 9)
    with pytest.raises(ValueError, match="not the .* instances of"):
        score_decisions(ledger, val)
    torn = write_epoch(tmp_path, 1, records[1])
    torn.write_bytes(torn.read_bytes()[:-30])
    with pytest.raises(ValueError, match="epoch-0001.parquet: not a Parquet file"):
        read_epoch(tmp_path, 1, ledger.label_xy)
    write_epoch(tmp_path, 2, records[2])
    with pytest.raises(ValueError, match="epoch-0002.parquet: not an epoch of this ledger"):
        read_epoch(tmp_path, 2, ledger.label_xy[:, :5])  # another K
    with pytest.raises(ValueError, match="epoch-0002.parquet: not an epoch of this ledger"):
        read_epoch(tmp_path, 2, ledger.label_xy[:3])  # other instances


def test_a_run_without(zoo, tmp_path):
    config = Config(data=str(zoo), **{**QUICK, "epochs": 1}, ledger=False)
    run_data = load_run_data(config, tmp_path)
    train_in_folder(config, open_run(tmp_path / "run", config), run_data)
    assert not (tmp_path / "run/ledger").exists()
    with pytest.raises(FileNotFoundError, match="no ledger;"):
        open_ledger(tmp_path / "run")
