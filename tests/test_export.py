"""A network as one ONNX file: equal to what the library predicts, used without PyTorch, and never half written."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from scarcenet.affine import crop_affine
from scarcenet.cli import main as cli
from scarcenet.config import PRESETS, Config
from scarcenet.data.coco import Labels, find_split, read_coco
from scarcenet.data.labels import reveal
from scarcenet.data.loader import CropCache, TrainingSet, load_crops
from scarcenet.models.build import build_network, describe_network
from scarcenet.models.weights import save_weights
from scarcenet.predict import export
from scarcenet.predict.predictor import Predictor, predict
from scarcenet.schema import AP10K, KeypointSchema
from scarcenet.train import fit
from scarcenet.utils.files import write_json

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "predict" / "export.ipynb"


def random_network(folder: Path, network: str, size: int, schema: KeypointSchema = AP10K, **settings) -> Predictor:
    """A network with its first weights."""
    config = Config(network=network, size=size, device="cpu", **settings)
    file = folder / f"{network.removeprefix('timm:')}.safetensors"
    save_weights(build_network(config, len(schema)), file, describe_network(config, schema))
    return Predictor(file, device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Predictor:
    return random_network(tmp_path_factory.mktemp("tiny"), "hrnet_tiny", 64)


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory):
    """`tiny` as an ONNX file, and what PyTorch's exporter has made of it."""
    file, programs, trace = tmp_path_factory.mktemp("traced") / "net.onnx", [], export.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", lambda *given: programs.append(trace(*given)) or programs[0])
        assert export.export_onnx(tiny, file) < 1e-3
    return file, programs[0]


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory) -> Predictor:
    """The demo's network after a few steps, whose heatmaps have peaks."""
    poses = read_coco(*find_split(zoo, "train"))
    labels = Labels(*map(torch.as_tensor, reveal(poses, np.ones(len(poses), bool))))
    config = replace(PRESETS["demo"], supervised_epochs=10, supervised_repeat=1, epochs=0, device="cpu")
    *_, last = fit(config, TrainingSet(poses.schema, load_crops(poses.instances, config.size), labels))
    file = tmp_path_factory.mktemp("trained") / "net.safetensors"
    save_weights(last.state.student, file, describe_network(config, poses.schema))
    return Predictor(file, device="cpu")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """`trained` as an ONNX file."""
    file = tmp_path_factory.mktemp("exported") / "net.onnx"
    assert export.export_onnx(trained, file) < 1e-3
    return file


def noise(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)


def answer(file: Path, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(onnxruntime.InferenceSession(file).run(["keypoints", "scores"], {"views": views}))


def cache_of(views: np.ndarray) -> CropCache:
    """Cached crops of which `predict` makes the views (N, S, S, 3), and beyond them their repeated edge."""
    padded = np.pad(views, ((0, 0), (8, 8), (8, 8), (0, 0)), "edge")
    eye = torch.eye(3).repeat(len(views), 1, 1)
    affine = eye.clone()
    affine[:, :2, 2] = 8
    return CropCache(torch.from_numpy(padded), affine, eye, views.shape[1])


def assert_equal(pose: Predictor, file: Path, views: np.ndarray) -> None:
    """onnxruntime's keypoints within 1e-3 px of `predict`'s, and its scores within 1e-5 of their height."""
    want = predict(pose.model, cache_of(views), pose.config, schema=pose.schema, shared=False)
    xy, score = answer(file, views)
    assert xy.dtype == score.dtype == np.float32
    assert xy.shape == want.xy.shape and score.shape == want.score.shape
    assert np.abs(score - want.score.numpy()).max() < 1e-5 * max(1, want.score.max())
    assert np.abs(xy - want.xy.numpy()).max() < 1e-3


# ---- equal to the library


@pytest.mark.parametrize(
    ("network", "size"),
    [
        ("timm:tf_efficientnet_lite0", 96),
        pytest.param("hrnet_w32", 64, marks=pytest.mark.slow),
        pytest.param("mbhrnet_w32", 64, marks=pytest.mark.slow),
    ],
)
def test_equal_with_random_weights(tmp_path, network, size):
    pose = random_network(tmp_path, network, size)
    assert export.export_onnx(pose, tmp_path / "net.onnx") < 1e-3
    for batch in (1, 5):
        assert_equal(pose, tmp_path / "net.onnx", noise(batch, size))


def test_equal_with_a_tiny_network(tiny, traced):
    for batch in (1, 5):
        assert_equal(tiny, traced[0], noise(batch, 64))


def test_equal_on_animals(trained, exported, zoo):
    """Crops as the library renders them, of a network whose heatmaps have peaks."""
    crops = load_crops(read_coco(*find_split(zoo, "test")).instances, trained.size)
    views = crops.render(torch.arange(len(crops)), crops.crop).byte().permute(0, 2, 3, 1).contiguous().numpy()
    assert answer(exported, views)[1].max() > 0.1, "there are peaks"
    for batch in (1, 5, len(views)):
        assert_equal(trained, exported, views[:batch])


def test_the_other_way_of_decoding(tmp_path):
    """A quarter of a heatmap px, for targets on whole heatmap px."""
    pose = random_network(tmp_path, "hrnet_tiny", 64, quantize_targets=True)
    export.export_onnx(pose, tmp_path / "net.onnx")
    assert_equal(pose, tmp_path / "net.onnx", noise(5, 64))


def test_other_keypoints(tmp_path):
    """Five of them, one pair; the sides are exchanged where the view is flipped, or the test above would not hold."""
    schema = KeypointSchema(("a", "b_left", "c", "b_right", "d"), flip_pairs=((1, 3),), skeleton=((0, 2),))
    pose = random_network(tmp_path, "hrnet_tiny", 64, schema)
    export.export_onnx(pose, tmp_path / "net.onnx")
    assert_equal(pose, tmp_path / "net.onnx", noise(5, 64))


def test_without_mirrored_views(trained, zoo, tmp_path):
    """No flip test for a network that has seen no mirror image; no edge matters then."""
    single = replace(trained.config, mirror=False)
    crops = load_crops(read_coco(*find_split(zoo, "test")).instances, trained.size)
    views = crops.render(torch.arange(len(crops)), crops.crop).byte().permute(0, 2, 3, 1).contiguous().numpy()
    want = predict(trained.model, crops, single, schema=trained.schema, shared=False)
    in_view = want.xy.numpy() * crops.crop[:, None, None, 0, 0].numpy() + crops.crop[:, None, :2, 2].numpy()

    save_weights(trained.model, tmp_path / "single.safetensors", describe_network(single, trained.schema))
    export.export_onnx(Predictor(tmp_path / "single.safetensors", device="cpu"), tmp_path / "net.onnx")
    xy, score = answer(tmp_path / "net.onnx", views)
    assert np.abs(xy - in_view).max() < 1e-3 and np.abs(score - want.score.numpy()).max() < 1e-5
    assert about(tmp_path / "net.onnx")["flip_test"] is False


# ---- the file


def about(file: Path) -> dict:
    return json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map["scarcenet"])


def test_what_the_file_says(trained, exported):
    told = about(exported)
    assert tuple(told["schema"]["names"]) == trained.names
    assert tuple(map(tuple, told["schema"]["flip_pairs"])) == trained.schema.flip_pairs
    assert tuple(map(tuple, told["schema"]["skeleton"])) == trained.schema.skeleton
    assert told["size"] == 96 and told["network"] == "timm:tf_efficientnet_lite0" and told["version"]
    assert told["flip_test"] is True and told["padding"] == 1.25
    assert "RGB" in told["views"] and "first pixel is (0, 0)" in told["keypoints"]
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    dims = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert dims == {"views": ["batch", 96, 96, 3]}


def test_nothing_of_this_machine_is_in_the_file(exported):
    model = onnx.load(exported)
    del model.graph.initializer[:]  # the weights, which may hold any bytes
    text = str(model)
    for word in ("site-packages", "stack_trace", "File ", ".py", str(Path.cwd())):
        assert word not in text


def test_equal_bytes(tiny, traced, tmp_path):
    """And tracing leaves nothing behind: neither in the network, nor in the constants that `affine` keeps."""
    before = tiny(noise(1, 64)[0])
    export.export_onnx(tiny, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == traced[0].read_bytes()
    assert np.array_equal(before.xy, tiny(noise(1, 64)[0]).xy)


@pytest.mark.slow
def test_other_opsets(tiny, tmp_path):
    for opset in (20, 21):
        export.export_onnx(tiny, tmp_path / f"{opset}.onnx", opset=opset)
        assert onnx.load(tmp_path / f"{opset}.onnx").opset_import[0].version == opset
        assert_equal(tiny, tmp_path / f"{opset}.onnx", noise(5, 64))


# ---- the example without PyTorch


def example() -> str:
    """The notebook's twenty lines."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if cell["id"] == "no-torch"))


def test_the_example_runs_without_torch(trained, exported, zoo, tmp_path):
    """In a process of its own; its keypoints are those that the library finds, but for how the crop is cut."""
    assert len([line for line in example().splitlines() if line.strip() and "import" not in line]) <= 20
    animals = read_coco(*find_split(zoo, "test")).instances
    program = "\n".join(
        (
            "import sys",
            "from pathlib import Path",
            f"folder = Path({str(exported.parent)!r})",
            example(),
            f"image = cv2.cvtColor(cv2.imread({str(animals[0].file)!r}), cv2.COLOR_BGR2RGB)",
            f"xy, score = locate(image, [{list(animals[0].box)}, {list(animals[0].box)}])",
            "assert not {'torch', 'scarcenet'} & set(sys.modules)",
            f"np.savez({str(tmp_path / 'found.npz')!r}, xy=xy, score=score)",
        )
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert found["xy"].shape == (2, 17, 2) and np.array_equal(found["xy"][0], found["xy"][1])
    want = trained(animals[0].file, [animals[0].box])
    scale = trained.size / (1.25 * max(animals[0].box[2:]))
    apart = scale * np.linalg.norm(found["xy"][0] - want.xy[0], axis=-1)
    assert np.median(apart) < 1 and np.median(np.abs(found["score"][0] - want.score[0])) < 0.02


@pytest.mark.parametrize("side", [40, 90, 131, 400], ids=["enlarged", "about as large", "smaller", "shrunk"])
def test_the_example_cuts_as_the_library_does(exported, side):
    """With a network that answers with the middle of what is bright, a dot in the image comes back where it is."""
    scope: dict = {"folder": exported.parent}
    exec(example(), scope)

    class Middle:
        def run(self, names, inputs):
            grey = inputs["views"].astype(float).sum(-1)
            at = [(grey.sum(axis) * np.arange(96)).sum(1) / grey.sum((1, 2)) for axis in (1, 2)]
            self.found = np.stack(at, -1)
            return self.found[:, None], np.ones((len(grey), 1))

    scope["session"] = Middle()
    dot = np.array([250.3, 210.6])
    y, x = np.mgrid[:500, :600]
    grey = 255 * np.exp(-((x - dot[0]) ** 2 + (y - dot[1]) ** 2) / (2 * (side / 12) ** 2))
    image = np.repeat(grey.round().astype(np.uint8)[..., None], 3, 2)
    corner = dot - (0.4 * side, 0.3 * side)
    boxes = [[*corner, side, side / 1.5], [*corner, side / 1.5, side]]
    xy, score = scope["locate"](image, boxes)
    affine = crop_affine(torch.tensor(boxes, dtype=torch.float64), 96).numpy()
    assert xy.shape == (2, 1, 2) and score.shape == (2, 1)
    assert np.abs(xy[:, 0] - dot).max() * affine[0, 0, 0] < 0.05  # view px
    assert np.abs(scope["session"].found - affine[:, :2, :2] @ dot - affine[:, :2, 2]).max() < 0.05


# ---- the command, and what goes wrong


def test_the_command(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "net.onnx"
    assert cli.main(["export", str(tiny.file), "--out", str(out), "--no-flip-test"]) == 0
    said = capsys.readouterr().out
    assert "net.onnx" in said and "17 keypoints" in said and "64 px" in said and "no flip test" in said
    assert about(out)["flip_test"] is False
    content = out.read_bytes()
    assert cli.main(["export", str(tiny.file), "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err and out.read_bytes() == content


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--opset", "9"], "opset: expected 18 to"), (["--opset", "999"], "opset: expected 18 to")],
    ids=["old", "new"],
)
def test_opsets_that_do_not_do(tiny, tmp_path, capsys, flags, says):
    assert cli.main(["export", str(tiny.file), "--out", str(tmp_path / "net.onnx"), *flags]) == 1
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_weights_from_elsewhere(tiny, zoo, tmp_path, monkeypatch, capsys):
    """They say nothing of themselves: a configuration and a set do."""
    save_weights(tiny.model, tmp_path / "foreign.safetensors")
    command = ["export", str(tmp_path / "foreign.safetensors"), "--out", str(tmp_path / "net.onnx")]
    assert cli.main(command) == 1 and "--config" in capsys.readouterr().err
    write_json(tmp_path / "config.json", asdict(Config(network="hrnet_tiny", size=64)))
    given = []
    monkeypatch.setattr(export, "export_onnx", lambda predictor, *_, **__: given.append(predictor) or 0.0)
    assert cli.main([*command, "--config", str(tmp_path / "config.json"), "--data", str(zoo)]) == 0
    assert given[0].names == AP10K.names and given[0].size == 64 and "hrnet_tiny, 17" in capsys.readouterr().out


def test_no_such_run(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "net.onnx")]) == 1
    line = capsys.readouterr().err
    assert "nowhere" in line and line.count("\n") == 1


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra(tiny, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert cli.main(["export", str(tiny.file), "--out", str(tmp_path / "net.onnx")]) == 1
    line = capsys.readouterr().err
    assert f"needs {name}" in line and 'pip install "scarcenet[onnx]"' in line and line.count("\n") == 1


@pytest.mark.slow
def test_nothing_is_left_of_an_export_that_fails(tiny, traced, tmp_path, monkeypatch):
    """A network that cannot be traced, a full disk, a file that answers otherwise: one line, and no file."""

    def fails(*_: object, **__: object):
        raise RuntimeError("Could not trace\nmany\nlines")

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="cannot be exported.*Could not trace") as error,
    ):
        patch.setattr(torch.onnx, "export", fails)
        export.export_onnx(tiny, tmp_path / "net.onnx")
    assert "\n" not in str(error.value)

    monkeypatch.setattr(export, "trace", lambda *_: traced[1])

    def full(*_: object):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot be written .No space left.*net.onnx"):
        patch.setattr(Path, "write_bytes", full)
        export.export_onnx(tiny, tmp_path / "net.onnx")
    forward = export.ExportedPose.forward

    def other(self, views):
        found = forward(self, views)
        return found._replace(score=found.score + 1)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="differs from PyTorch's"):
        patch.setattr(export.ExportedPose, "forward", other)
        export.export_onnx(tiny, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
