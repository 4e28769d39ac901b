"""The ledger: what training keeps of every decision, and that the same decisions follow from it again."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from scarcenet.ledger.audit import audit_table, fates, judge, misled, what_if
from scarcenet.config import ORIGINAL, Config
from scarcenet.ledger.ledger import explain, find_keypoint, open_run_ledger, read_frame, redecide
from scarcenet.record import open_ledger, read_epoch, write_epoch
from scarcenet.relabel import Decision
from scarcenet.run.folder import open_run
from scarcenet.run.load import gather
from scarcenet.run.train_run import train_run
from scarcenet.train import fit

QUICK = dict(labels="1", device="cpu", network="tiny", size=32, sigma=1.0, supervised_epochs=1, supervised_batch=8, epochs=3, keep_epochs=3,
             keep_floor=0.5, views=1, batch=8, labelled_repeat=2, ramp_epochs=2, drop=0.3)


@pytest.fixture(scope="module", params=[Config, lambda **changes: replace(ORIGINAL, **changes)], ids=["default", "original"])
def run(request, zoo, tmp_path_factory):
    """A run's folder, its material, and the records that `fit` yielded."""
    config = request.param(data=str(zoo), **QUICK)
    folder = tmp_path_factory.mktemp("ledger")
    material = gather(config, folder)
    train_run(config, open_run(folder / "run", config), material)
    return folder / "run", material, {e.epoch: e.record for e in fit(config, material.data) if e.record}


def test_what_was_kept_is_what_happened(run):
    folder, material, records = run
    ledger = open_run_ledger(folder)
    assert ledger.epochs == (1, 2, 3) and ledger.names == material.train.schema.names
    assert torch.equal(ledger.labelled, material.data.labels.labelled)
    for epoch, record in records.items():
        for name, kept, was in zip(record._fields, ledger.record(epoch), record):
            assert torch.equal(kept.nan_to_num(-1), was.nan_to_num(-1)), name


def test_the_same_rules_lead_to_the_same_decisions(run):
    ledger = open_run_ledger(run[0])
    for epoch in ledger.epochs:
        record = ledger.record(epoch)
        assert torch.equal(redecide(ledger, epoch, record), record.decision)
        frame = read_frame(ledger, [epoch], last=False)
        pd.testing.assert_frame_equal(read_frame(ledger, [epoch], last=False, instance=5), frame[frame["instance"] == 5].reset_index(drop=True), check_categorical=False)
        free = ~frame["labelled"]
        assert ((frame["rank"] < frame["quota"]) == (frame["decision"] == "reliable"))[free].all()


def test_other_rules(run):
    ledger = open_run_ledger(run[0])
    record, free = ledger.record(2), ~ledger.labelled[ledger.record(2).index]
    count = lambda kind, **rules: int((redecide(ledger, 2, record, **rules)[free] == kind).sum())
    keeps = [count(Decision.RELIABLE, keep=k) for k in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert keeps == sorted(keeps) and keeps[0] == 0 < keeps[-1]
    agrees = [count(Decision.REUSABLE, agree_px=a) for a in (0.0, 0.3, 1.0, 100.0)]
    assert agrees == sorted(agrees) and agrees[0] == 0 < agrees[-1]
    drops = [count(Decision.RELIABLE, drop=d, keep=1.0) for d in (0.0, 0.3, 0.9)]
    assert drops == sorted(drops, reverse=True) and drops[0] > drops[-1] > 0
    truth = redecide(ledger, 2, record, keep=0.0, agree_px=0.0, drop=0.99)[~free]
    assert torch.equal(truth == Decision.TRUTH, (record.decision == Decision.TRUTH)[~free])      # no rule touches a person's labels


def test_the_bias_of_the_original(run):
    """With and without its half pixel, the two answers agree where the kept offsets say so."""
    ledger = open_run_ledger(run[0])
    record, free = ledger.record(1), ~ledger.labelled[ledger.record(1).index]
    for bias in (0.0, 0.5):
        reusable = redecide(ledger, 1, record, keep=0.0, agree_bias=bias) == Decision.REUSABLE
        assert torch.equal(reusable[free], ((record.offset + bias).square().sum(-1).sqrt() < ledger.config.agree_px)[free])


def test_nothing_of_the_truth_is_in_it(run, tmp_path):
    """Another held-back truth, the same files, every byte."""
    folder, material, _ = run
    truth = material.train.truth
    hidden = ~material.data.labels.labelled.numpy()
    xy = truth.xy.copy()
    xy[hidden] += 7
    other = replace(material, train=replace(material.train, truth=truth._replace(xy=xy)))
    config = open_run_ledger(folder).config
    train_run(config, open_run(tmp_path / "run", config), other)
    files = sorted(f.name for f in (folder / "ledger").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "run/ledger").iterdir())
    assert files == ["epoch-0001.parquet", "epoch-0002.parquet", "epoch-0003.parquet", "instances.parquet", "labels.parquet"]
    for name in files:
        assert (folder / "ledger" / name).read_bytes() == (tmp_path / "run/ledger" / name).read_bytes(), name


def test_audit_by_hand(run):
    folder, material, _ = run
    ledger = open_run_ledger(folder)
    frame = judge(ledger, material.train, [3])
    assert len(frame) == int((~ledger.labelled).sum()) * len(ledger.names)
    side = np.array([max(i.box[2:]) for i in material.train.instances])
    for _, row in frame.sample(60, random_state=0).iterrows():
        i, k = row["instance"], row["keypoint"]
        if not material.train.truth.visible[i, k]:
            assert np.isnan(row["target_right"])
            continue
        gap = np.hypot(row["target_x"] - material.train.truth.xy[i, k, 0], row["target_y"] - material.train.truth.xy[i, k, 1])
        assert row["target_right"] == (gap <= 0.1 * side[i])
    table = audit_table(frame)
    assert table["coverage"].sum() == pytest.approx(1) and table["count"].sum() == frame["target_right"].notna().sum()
    assert fates(frame).notna().sum() == table["count"].sum()
    asked = what_if(ledger, material.train, 3, "keep", [0.0, 1.0])
    assert asked[(asked["keep"] == 0) & (asked["decision"] == "reliable")]["coverage"].item() == 0


def test_fates_and_wrong_targets():
    """A wrong target is in use where a wrong label was believed, and where a right one gave way to a wrong answer."""
    cases = pd.DataFrame([("reliable", 1, 1, "kept", False), ("reliable", 0, 0, "believed", True), ("reusable", 0, 1, "rescued", False), ("reusable", 1, 0, "lost", True),
                          ("consistency", 1, 1, "lost", False), ("ignored", 0, 0, "left alone", False), ("reusable", np.nan, np.nan, np.nan, False)],
                         columns=["decision", "label_right", "target_right", "fate", "misled"])
    assert fates(cases).astype(str).tolist() == cases["fate"].astype(str).tolist() and misled(cases).tolist() == cases["misled"].tolist()


def test_resuming_writes_no_epoch_twice(run, tmp_path):
    """A run that is stopped in stage 3, with a torn file left behind, ends with the same ledger."""
    folder, material, _ = run
    config = open_run_ledger(folder).config

    class PowerCut(Exception):
        pass

    import scarcenet.run.train_run as trials
    real = trials.save_checkpoint

    def cut(file, state):
        if state.stage == "scarce" and state.epoch == 2:
            raise PowerCut              # the epoch is in the ledger, but not in the checkpoint
        real(file, state)
    trials.save_checkpoint = cut
    try:
        with pytest.raises(PowerCut):
            train_run(config, open_run(tmp_path / "run", config), material)
    finally:
        trials.save_checkpoint = real
    assert open_run_ledger(tmp_path / "run").epochs == (1, 2)
    (tmp_path / "run/ledger/.epoch-0003.parquet.1.part").write_bytes(b"PAR1torn")
    train_run(config, open_run(tmp_path / "run", config, resume=True), material, resume=True)
    ledger = open_run_ledger(tmp_path / "run")
    assert ledger.epochs == (1, 2, 3)
    for name in ("epoch-0002.parquet", "epoch-0003.parquet", "labels.parquet"):
        assert (ledger.folder / name).read_bytes() == (folder / "ledger" / name).read_bytes()


def test_a_number_is_an_index_also_where_keypoints_are_called_by_numbers(run):
    ledger = replace(open_run_ledger(run[0]), names=tuple(str(n + 1) for n in range(17)))
    assert find_keypoint(ledger, 0, "2") == 1 and find_keypoint(ledger, 0, 2) == 2


def test_faults(run, tmp_path):
    folder, material, records = run
    ledger = open_run_ledger(folder)
    with pytest.raises(ValueError, match="other instances"):
        open_ledger(ledger.folder, material.val, torch.zeros(len(material.val), dtype=torch.bool))
    with pytest.raises(ValueError, match="epoch 9 is not on record; epochs 1 to 3 are"):
        explain(ledger, 0, "nose", 9)
    with pytest.raises(ValueError, match="not the .* instances of"):
        judge(ledger, material.val)
    torn = write_epoch(tmp_path, 1, records[1])
    torn.write_bytes(torn.read_bytes()[:-30])
    with pytest.raises(ValueError, match="epoch-0001.parquet: no Parquet file"):
        read_epoch(tmp_path, 1, ledger.label_xy)
    write_epoch(tmp_path, 2, records[2])
    with pytest.raises(ValueError, match="epoch-0002.parquet: not an epoch of this ledger"):
        read_epoch(tmp_path, 2, ledger.label_xy[:, :5])                                    # another K
    with pytest.raises(ValueError, match="epoch-0002.parquet: not an epoch of this ledger"):
        read_epoch(tmp_path, 2, ledger.label_xy[:3])                                       # other instances


def test_a_run_without(zoo, tmp_path):
    config = Config(data=str(zoo), **{**QUICK, "epochs": 1}, ledger=False)
    material = gather(config, tmp_path)
    train_run(config, open_run(tmp_path / "run", config), material)
    assert not (tmp_path / "run/ledger").exists()
    with pytest.raises(FileNotFoundError, match="no ledger there"):
        open_run_ledger(tmp_path / "run")
