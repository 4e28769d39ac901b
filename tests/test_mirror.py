"""The switch `mirror`: without it no view is ever flipped, in training, in pseudo-labels, in the flip test."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import scarcenet as sn
from scarcenet.affine import is_flipped
from scarcenet.data.augment import STRONG, strong_geometry
from scarcenet.data.coco import Labels
from scarcenet.data.labels import draw_labelled, reveal
from scarcenet.data.loader import IMAGENET_MEAN, IMAGENET_STD, CropCache, load_crops, make_batch, seeded
from scarcenet.models.build import build_network, describe_network
from scarcenet.models.weights import public_state, read_metadata, read_model_info, save_weights, write_tensors
from scarcenet.predict.predictor import find_config, predict
from scarcenet.pseudo_labels import make_pseudo, multi_views, predict_multiview
from scarcenet.utils.files import read_json

ON = sn.Config(network="hrnet_tiny", size=64, device="cpu", precision="float32", views=3)
OFF = replace(ON, mirror=False)


# ---- views


@pytest.fixture(scope="module")
def data(zoo):
    poses = sn.read_coco(zoo / "annotations" / "ap10k-train-split1.json")
    labels = Labels(*map(torch.as_tensor, reveal(poses, draw_labelled(poses, 1, seed=0))))
    return load_crops(poses.instances, 64), labels


def batch_of(data, config, epoch, **options):
    crops, labels = data
    index = torch.arange(len(crops))
    return make_batch(
        crops, labels, index, schema=sn.AP10K, rng=seeded(0, 3, epoch), strong=strong_geometry(config), **options
    )


def test_no_view_is_flipped(data):
    for epoch in range(20):
        views = batch_of(data, OFF, epoch)
        assert not any(is_flipped(view.affine).any() for view in (views.strong, views.weak, views.plain))
    alone = batch_of(data, OFF, 0, extra_views=False)
    assert not is_flipped(alone.strong.affine).any()


def test_all_other_draws_stay(data):
    """With and without the switch a view has the same zoom, turn, colours and squares; only the flip is left out."""
    flipped = 0
    for epoch in range(6):
        on, off = batch_of(data, ON, epoch), batch_of(data, OFF, epoch)
        for name in ("strong", "weak", "plain"):
            with_flips, without = getattr(on, name), getattr(off, name)
            same = ~is_flipped(with_flips.affine)
            assert torch.equal(with_flips.affine[same], without.affine[same])
            assert torch.equal(with_flips.images[same], without.images[same])
            flipped += int((~same).sum())
    assert 0.4 < flipped / (2 * 6 * len(data[0])) < 0.6


def test_the_geometry_of_today_is_the_default():
    assert strong_geometry(sn.Config()) == STRONG and STRONG.p_flip == 0.5
    assert strong_geometry(sn.Config(mirror=False)) == replace(STRONG, p_flip=0.0)


def test_the_views_of_stage_2():
    crop = torch.eye(3).repeat(4, 1, 1)
    both, one = multi_views(crop, 64, seeded(1), 3), multi_views(crop, 64, seeded(1), 3, mirror=False)
    assert both.shape == (6, 4, 3, 3) and torch.equal(both[:3], one)
    assert multi_views(crop, 64, seeded(1), 1, mirror=False).shape == (1, 4, 3, 3)


# ---- a network that reads the side from the image


class Handed(torch.nn.Module):
    """Finds a red spot; blind where its green and blue neighbours stand as in a mirror. Counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = self.mirrored = 0

    def forward(self, images):
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
        maps = (images * std + mean).clamp(min=0)
        axis = torch.arange(images.shape[-1], dtype=torch.float32)
        mass = maps.sum((-2, -1)) + 1e-9
        middle = torch.stack(((maps.sum(-2) * axis).sum(-1), (maps.sum(-1) * axis).sum(-1)), -1) / mass[..., None]
        green, blue = middle[:, 1] - middle[:, 0], middle[:, 2] - middle[:, 0]
        mirror = green[:, 0] * blue[:, 1] - green[:, 1] * blue[:, 0] < 0
        self.seen += len(images)
        self.mirrored += int(mirror.sum())
        found = maps[:, :1, ::4, ::4] * ~mirror[:, None, None, None]
        return found + self.weight


def spots(n):
    """n images with a red, a green and a blue spot, seen whole, and where the red ones are: (n, 1, 2) image px."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(24, 40, (n, 1, 2)).astype(np.float32)
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    pixels = np.zeros((n, 64, 64, 3), np.uint8)
    for channel, (dx, dy) in enumerate(((0, 0), (8, 0), (0, 8))):
        near = (x - xy[:, :, :1] - dx) ** 2 + (y - xy[:, :, 1:] - dy) ** 2
        pixels[..., channel] = np.round(255 * np.exp(-near / 18))
    eye = torch.eye(3).repeat(n, 1, 1)
    return CropCache(torch.tensor(pixels), eye, eye, 64), torch.tensor(xy)


SPOT = sn.KeypointSchema(("spot",))


def test_pseudo_labels_come_from_unflipped_views_alone():
    crops, xy = spots(12)
    network = Handed()
    off = make_pseudo(network, crops, OFF, schema=SPOT)
    assert network.seen == 12 * 3 and network.mirrored == 0
    assert (off.xy - xy).abs().max() < 1.5  # px: of a heatmap pixel of 4
    rng = seeded(OFF.seed, 2)
    by_hand = predict_multiview(
        network, crops, lambda crop: multi_views(crop, 64, rng, 3)[:3], schema=SPOT, batch=OFF.inference_batch
    )
    assert torch.allclose(by_hand.score, off.score)
    network.seen = 0
    on = make_pseudo(network, crops, ON, schema=SPOT)
    assert network.seen == 12 * 6 and network.mirrored == 12 * 3
    assert torch.allclose(on.score, off.score / 2, atol=1e-3)  # half of its views show it what it never learnt


def test_the_flip_test_is_off():
    crops, xy = spots(12)
    network = Handed()
    found = predict(network, crops, OFF, schema=SPOT)
    assert network.seen == 12 and network.mirrored == 0
    assert (found.xy - xy).abs().max() < 1.5
    predict(network, crops, ON, schema=SPOT)
    assert network.seen == 12 + 24 and network.mirrored == 12


# ---- a weights file says what its network has seen


def forwards(pose):
    """How many images the network of a predictor sees for one crop, once its batch norms are folded."""
    seen: list[int] = []
    handle = pose.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for _ in range(2):  # the first folds, and tries the network for it; the twin has the hook, too
        seen.clear()
        pose(np.zeros((40, 60, 3), np.uint8))
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize(("config", "images"), [(ON, 2), (OFF, 1)], ids=["mirror", "no mirror"])
def test_a_file_is_read_as_it_was_trained(config, images, tmp_path):
    file, model = tmp_path / "weights.safetensors", build_network(config, 17)
    save_weights(model, file, describe_network(config, sn.AP10K))
    assert read_model_info(file).mirror == config.mirror and find_config(file).mirror == config.mirror
    assert forwards(sn.Predictor(file, device="cpu")) == images
    # a configuration gives the format and the batch size; the file, how it is read
    assert forwards(sn.Predictor(file, device="cpu", config=replace(config, mirror=not config.mirror))) == images


def test_files_of_before_the_switch(tmp_path):
    """They lack the field and mean True; and a file that means True has no field that they would not know."""
    file, model = tmp_path / "weights.safetensors", build_network(ON, 17)
    metadata = asdict(describe_network(ON, sn.AP10K))
    assert metadata.pop("mirror") is True
    write_tensors(file, public_state(model), metadata)
    before = file.read_bytes()
    assert read_model_info(file).mirror
    save_weights(model, file, describe_network(ON, sn.AP10K))
    assert file.read_bytes() == before
    save_weights(model, file, describe_network(OFF, sn.AP10K))
    assert read_metadata(file)["mirror"] is False
    write_tensors(file, public_state(model), metadata | {"mirror": "no"})
    with pytest.raises(ValueError, match="mirror: expected true or false, got str"):
        read_model_info(file)


def test_a_run_without_mirror_images(zoo, tmp_path, monkeypatch, capsys):
    """From training to `eval` and `pseudo` of one of its files, no network sees a flipped view."""
    from scarcenet.cli import main as cli
    from scarcenet.data import loader

    seen = []
    render = loader.CropCache.render

    def watched(self, index, view, pixels=None):
        seen.append(bool(is_flipped(view).any()))
        return render(self, index, view, pixels)

    monkeypatch.setattr(loader.CropCache, "render", watched)
    quick = dict(labels=1, network="hrnet_tiny", backbone="", size=32, device="cpu", precision="float32")
    quick |= dict(supervised_epochs=1, supervised_repeat=1, epochs=1, batch=8, views=2, progress=False)
    run = sn.train_run("demo", data=zoo, out=tmp_path / "run", mirror=False, **quick)
    assert len(seen) > 10 and not any(seen)
    alone, scores = tmp_path / "alone.safetensors", tmp_path / "scores.json"
    alone.write_bytes(run.networks["teacher"].read_bytes())
    for source in (run.folder, alone):
        common = [str(source), "--data", str(zoo), "--device", "cpu"]
        name = "teacher" if source == run.folder else "alone"
        assert cli.main(["eval", *common, "--json", str(scores)]) == 0
        overall = read_json(scores)[name]["overall"]
        assert overall["PCK@0.1"] == pytest.approx(run.summary["networks"]["teacher"]["test"]["overall"]["PCK"])
        scores.unlink()
        assert cli.main(["pseudo", *common, "--out", str(tmp_path / f"{name}.json")]) == 0
    capsys.readouterr()
    assert not any(seen)
    sn.train_run("demo", data=zoo, out=tmp_path / "mirrored", **quick)
    assert any(seen)
