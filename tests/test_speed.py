"""No needless waiting: no copy to the host, no image decoded twice, no cost that grows faster than the data.

And the number formats and compilation that make a step faster.
"""

import os
import platform
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from scarcenet.affine import crop_affine
from scarcenet.checkpoint import State
from scarcenet.config import DEMO, Config
from scarcenet.data.augment import strong_geometry
from scarcenet.data.coco import Labels, find_split, read_coco
from scarcenet.data.loader import CropCache, TrainingSet, load_crops, make_batch, seeded
from scarcenet.experiments.benchmark import in_turns, ratio, set_up, works
from scarcenet.heatmap import Keypoints
from scarcenet.models.hrnet import hrnet_tiny, mbhrnet
from scarcenet.pseudo_labels import make_pseudo, multi_views, predict_multiview
from scarcenet.schema import AP10K
from scarcenet.train import Engine, fit, learn_scarcenet, learn_supervised
from scarcenet.utils.device import AmpModel

CPU = torch.device("cpu")


def training_set(n: int, size: int, device: str = "cpu") -> TrainingSet:
    """n crops of noise with 17 keypoints each, every other one labelled."""
    rng = seeded(0)
    box = torch.tensor([[30.0, 30, 60, 60]]).repeat(n, 1)
    xy = 30 + 60 * torch.rand(n, 17, 2, generator=rng)
    pixels = torch.randint(0, 255, (n, 2 * size, 2 * size, 3), generator=rng, dtype=torch.uint8)
    crops = CropCache(pixels, crop_affine(box, 2 * size, 1.875), crop_affine(box, size), size)
    labels = Labels(xy.to(device), torch.ones(n, 17).to(device), (torch.arange(n) % 2 == 0).to(device))
    return TrainingSet(AP10K, crops.to(device), labels)


# ---- no copy from the device to the host


def meta_run() -> tuple[TrainingSet, State, Engine]:
    """A run on the device "meta", whose tensors have shapes and no values.

    Reading a value is an error there, and so is mixing it with the CPU.
    """
    data = training_set(8, 64, "meta")
    student, teacher = hrnet_tiny(17).to("meta"), hrnet_tiny(17).to("meta").eval()
    state = State(student, teacher, torch.optim.Adam(student.parameters()), "scarcenet")
    student, teacher = (AmpModel(model, folding="each pass") for model in (student, teacher))
    return data, state, Engine(student, teacher, torch.amp.GradScaler(enabled=False))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(half_body=1.0),
        dict(consistency_soft=True),
        dict(consistency_confident=True, mix_left_right=True, bn_train_mode=True, quantize_targets=True),
    ],
    ids=["default", "half body", "maps as targets", "official"],
)
def test_a_step_reads_no_value(options):
    config = replace(Config(size=64), **options)
    data, state, engine = meta_run()
    strong = strong_geometry(config)
    for seed in range(6):  # so that every photometric operation occurs
        rng = seeded(seed)
        batch = make_batch(
            data.crops, data.labels, torch.arange(8), schema=AP10K, rng=rng, p_half=config.half_body, strong=strong
        )
        losses, step = learn_scarcenet(config, data, state, engine, batch)
        learn_supervised(config, data, state, engine, batch)
    assert losses.device.type == "meta" and all(t.device.type == "meta" for t in step)


def test_pseudo_labels_read_no_value():
    data, state, _ = meta_run()
    found = predict_multiview(state.student, data.crops, lambda crop: multi_views(crop, 64, seeded(0), 2), schema=AP10K)
    assert found.xy.device.type == "meta" and found.xy.shape == (8, 17, 2)


def test_the_meta_device_refuses_to_read_a_value():
    with pytest.raises((RuntimeError, NotImplementedError)):
        training_set(8, 64, "meta").labels.xy.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        training_set(8, 64, "meta").labels.labelled.nonzero()


# ---- cached crops in a file


@pytest.fixture(scope="module")
def poses(zoo):
    return read_coco(*find_split(zoo, "train"))


BRIEF = Config(
    network="hrnet_tiny",
    size=32,
    sigma=1.0,
    device="cpu",
    precision="float32",
    supervised_epochs=1,
    supervised_batch=8,
    epochs=2,
    batch=8,
    views=1,
    evaluate_every=1,
)


def half_labelled(poses) -> Labels:
    """The labels of every other instance."""
    xy = torch.as_tensor(poses.truth.xy)
    weight = torch.as_tensor(poses.truth.visible > 0).float()
    return Labels(xy, weight, torch.arange(len(poses)) % 2 == 0)


def test_the_same_bits_from_a_file(poses, tmp_path):
    """Training from cached crops in a file gives the same weights as from memory."""
    ends = []
    for limit in (100, 0.01):
        crops = load_crops(poses.instances, BRIEF.size, limit_mb=limit, cache=tmp_path)
        assert crops.mapped == (limit < 1)
        assert crops.to("cpu").pixels.data_ptr() == crops.pixels.data_ptr()
        *_, last = fit(BRIEF, TrainingSet(poses.schema, crops, half_labelled(poses)))
        ends.append(last.state.teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def test_a_cache_never_goes_stale(poses, tmp_path):
    """Another image under the old name, another box or size gives another file; the same again decodes nothing."""
    folder = copytree(poses.instances[0].file.parent, tmp_path / "images")
    cache = tmp_path / "cache"
    instances = [replace(instance, file=folder / instance.file.name) for instance in poses.instances[:4]]
    image_file = instances[0].file

    def load(some, size=32):
        return load_crops(some, size, limit_mb=0, cache=cache).pixels

    def files():
        """With the numbers that the disk gives them: a file that is written again has another."""
        return {file: file.stat().st_ino for file in sorted(cache.iterdir())}

    first = load(instances).clone()
    before = files()
    assert len(before) == 1 and torch.equal(load(instances), first) and files() == before
    load(instances, 64)
    load([replace(instances[0], box=(1.0, 2.0, 30.0, 40.0)), *instances[1:]])
    assert len(files()) == 3
    with Image.open(image_file) as image:
        flipped = ImageOps.mirror(image)
    flipped.save(image_file)
    changed = load(instances)
    assert len(files()) == 4 and not torch.equal(changed[0], first[0]) and torch.equal(changed[1], first[1])
    # a file that was cut short is made anew
    image_file.write_bytes(poses.instances[0].file.read_bytes())
    cut = next(iter(before))
    cut.write_bytes(cut.read_bytes()[:1000])
    assert torch.equal(load(instances), first)


def test_a_cache_that_cannot_be_written(poses, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot be written"):
        load_crops(poses.instances, 32, limit_mb=0, cache=tmp_path / "file")
    broken = [replace(poses.instances[0], file=tmp_path / "nowhere.jpg")]
    with pytest.raises(ValueError, match="nowhere.jpg: no such image"):
        load_crops(broken, 32, limit_mb=0, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(poses, tmp_path):
    """Cached crops in a file take no memory of the process: reading 300 MiB of them leaves next to nothing behind."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from pathlib import Path
from scarcenet.data.coco import find_split, read_coco
from scarcenet.data.loader import load_crops

def own_mib():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

poses = read_coco(*find_split(Path({str(poses.file.parents[1])!r}), "train"))

def read_all(count):
    crops = load_crops(list(poses.instances[:4]) * (count // 4), 256, limit_mb=0, cache=Path({str(tmp_path)!r}))
    parts = torch.arange(count).split(4)
    for part, pixels in zip(parts, crops.prefetch(parts), strict=True):
        crops.render(part, crops.crop[part], pixels).sum()
    return crops.pixels.nbytes / 2 ** 20

read_all(40)  # threads, libraries and buffers, which stay
before = own_mib()
print(read_all(400), own_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, grown = map(float, done.stdout.split())
    assert size == pytest.approx(300) and grown < 100


# ---- cost


class OneLayer(nn.Module):
    """Next to no network, so that the cost of everything else shows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 17, 4, 4)

    def forward(self, images):
        return self.layer(images)


def seconds_per_instance(n: int) -> float:
    """CPU time of an epoch of stage 3 and a pass of pseudo-labels over n instances."""
    torch.manual_seed(0)
    data = training_set(n, 32)
    config = replace(BRIEF, epochs=1, batch=32, bn_train_mode=False)
    student, teacher = OneLayer(), OneLayer()
    state = State(student, teacher, torch.optim.Adam(student.parameters()), "scarcenet", pseudo=None)
    began = time.process_time()
    state.pseudo = make_pseudo(student, data.crops, config, schema=data.schema)
    for epoch in fit(config, data, state):
        assert len(epoch.record.index) >= n
    return (time.process_time() - began) / n


@pytest.mark.timing
def test_cost_grows_linearly():
    """An instance among 10,000 costs what it costs among 1,000, within a tenth."""
    seconds_per_instance(64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for _ in range(3):
            small = min(seconds_per_instance(1000) for _ in range(3))
            ratios.append(seconds_per_instance(10_000) / small)
            if ratios[-1] <= 1.1:
                return
    finally:
        torch.set_num_threads(threads)
    raise AssertionError(ratios)


@pytest.mark.timing
def test_most_of_a_step_is_the_network(tmp_path):
    """The network takes at least 0.8 of the demo's step, the data at most a twentieth.

    Both are medians of ratios of calls that follow each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench = set_up(DEMO, tmp_path / "zoo", 32)
        for _ in range(3):  # other work on the machine may spoil one
            taken = in_turns(works(bench), CPU, 12)
            efficiency = ratio(taken, ("forward and backward", "two forwards", "forward"), "ScarceNet step")
            data = ratio(taken, ["data and views"], "ScarceNet step")
            if efficiency >= 0.8 and data <= 0.05:
                return
    finally:
        torch.set_num_threads(threads)
    raise AssertionError(f"efficiency {efficiency:.2f}, data {data:.3f}")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_stays():
    """A process keeps its heap when more than 2 GiB of it are free: the system would have to clear them again."""
    program = """
import ctypes
from scarcenet.utils.device import tune_malloc

tune_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
size = 9 * 2**28
block = libc.malloc(size)
end = libc.sbrk(0)
libc.free(block)
print(end - block >= size, libc.sbrk(0) == end)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    on_the_heap, kept = done.stdout.split()
    assert on_the_heap == kept == "True"


# ---- number formats and compilation


def test_formats():
    """Maps are float32 whatever the network computes in; they differ by the format's rounding."""
    torch.manual_seed(0)
    model = mbhrnet(5, 16, stem=16, layer1=1, modules=(1, 1, 1), blocks=1).eval()
    images = torch.randn(4, 3, 64, 64)
    nn.init.normal_(model.head[-1].weight, std=0.1)
    with torch.no_grad():
        exact, half = AmpModel(model)(images), AmpModel(model, torch.bfloat16)(images)
    assert torch.equal(exact, model(images)) and half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_training_in_bfloat16(poses):
    data = TrainingSet(poses.schema, load_crops(poses.instances, BRIEF.size), half_labelled(poses))
    losses = {}
    for name in ("float32", "bf16"):
        for epoch in fit(replace(BRIEF, precision=name), data):
            losses.setdefault(name, []).append(epoch.loss)
        assert {p.dtype for p in epoch.state.student.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.1) and losses["bf16"] != losses["float32"]


def test_unknown_formats():
    for wrong in (dict(precision="fp8"), dict(compile="fast")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected one of .*, got"):
            Config(**wrong)


@pytest.mark.slow
def test_compiled():
    """A compiled run computes the same up to rounding; interrupted and resumed, it has the same bits.

    With a small network, since compiling takes long.
    """
    data = training_set(16, 32)

    def train(compile, stops):
        """Train from the start, interrupted after each of the epochs `stops`."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 17, 3, padding=1))
        pseudo = Keypoints(data.labels.xy + 1, torch.rand(16, 17, generator=seeded(1)))
        state = State(net, deepcopy(net), torch.optim.Adam(net.parameters()), "scarcenet", pseudo=pseudo)
        config = replace(BRIEF, epochs=2, compile=compile)
        losses, decisions = [], []
        for stop in stops:  # each time the engine is made, and the network compiled, anew
            for epoch in fit(config, data, state):
                losses.append(epoch.loss)
                decisions.append(epoch.record.decision)
                if epoch.epoch == stop:
                    break
        return losses, torch.cat(decisions), list(state.student.state_dict().values())

    plain_losses, plain_decisions, _ = train("", stops=(2,))
    losses, decisions, weights = train("default", stops=(2,))
    _, _, resumed_weights = train("default", stops=(1, 2))
    assert losses == pytest.approx(plain_losses, rel=1e-3)
    assert (decisions == plain_decisions).float().mean() > 0.97
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))


@pytest.mark.slow
def test_what_cannot_be_compiled_runs_as_it_is(tmp_path):
    """For example on a machine without a C++ compiler."""
    program = """
import torch
from torch import nn
from scarcenet.utils.device import AmpModel, failed_compilations

assert failed_compilations() == 0
model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))
images = torch.randn(2, 3, 32, 32)
compiled = AmpModel(model, mode="default")
assert torch.equal(compiled.eval()(images), model.eval()(images))
compiled.train()(images).square().sum().backward()
assert model[0].weight.grad.abs().sum() > 0 and failed_compilations() > 0
"""
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "No working C++ compiler" in done.stderr, done.stderr[-2000:]
