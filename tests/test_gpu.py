"""The same training on a GPU: it computes what the CPU computes, a step never waits, and its files are read anywhere.

Skipped without CUDA.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_speed import training_set

from scarcenet.checkpoint import State, load_checkpoint
from scarcenet.config import DEMO, Config
from scarcenet.data.augment import strong_geometry
from scarcenet.data.loader import Batch, TrainingSet, make_batch, seeded
from scarcenet.models.hrnet import hrnet_tiny
from scarcenet.predict.predictor import predict
from scarcenet.run.load import load_run_data
from scarcenet.run.train_run import train_in_folder
from scarcenet.schema import AP10K
from scarcenet.step import scarcenet_step
from scarcenet.train import fit, learn_scarcenet, make_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def networks(device: str):
    """A student and a teacher, untrained, whose maps have peaks."""
    torch.manual_seed(0)
    pair = hrnet_tiny(17), hrnet_tiny(17)
    for model in pair:
        torch.nn.init.normal_(model.head.weight, std=0.1)
    return tuple(model.to(device) for model in pair)


def batch_of(data: TrainingSet, config: Config, *, seed: int, p_half: float) -> Batch:
    """All views of the first 16 instances."""
    index, strong = torch.arange(16), strong_geometry(config)
    return make_batch(data.crops, data.labels, index, schema=AP10K, rng=seeded(seed), p_half=p_half, strong=strong)


@pytest.mark.parametrize("soft", [False, True], ids=["Gaussians", "maps as targets"])
def test_a_step_never_waits_for_the_gpu(soft):
    """CUDA itself raises an error wherever a step of stage 3, views included, lets Python wait."""
    data = training_set(16, 64, "cuda")
    config = Config(size=64, consistency_soft=soft)
    student, teacher = networks("cuda")
    state = State(student, teacher.eval(), torch.optim.Adam(student.parameters(), fused=True), "scarcenet")
    engine = make_engine(config, state)
    for seed in range(4):  # the first step also allocates what all of them use
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            learn_scarcenet(config, data, state, engine, batch_of(data, config, seed=seed, p_half=1.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_the_same_on_both_devices():
    """Views, losses, decisions and gradients of one batch in float32 agree.

    Sums in another order have other last bits, so a few decisions, close to a threshold, may differ.
    """
    config, steps = Config(size=64, agree_px=3.0, consistency_soft=True), {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in ("cpu", "cuda"):
            student, teacher = networks(device)
            batch = batch_of(training_set(16, 64, device), config, seed=1, p_half=1.0)
            step = scarcenet_step(student.train(), teacher.eval(), batch, epoch=20, rules=config, schema=AP10K)
            step.loss.backward()
            steps[device] = batch, step, torch.cat([p.grad.flatten() for p in student.parameters()]).cpu()
    (cpu_batch, cpu_step, cpu_gradient), (gpu_batch, gpu_step, gpu_gradient) = steps.values()
    for view in ("strong", "weak", "plain"):
        difference = getattr(cpu_batch, view).images - getattr(gpu_batch, view).images.cpu()
        # a grey value is 1 / 58; some are rounded the other way
        assert (difference.abs() < 0.02).float().mean() > 0.99, view
    for loss in ("loss", "supervised", "consistency"):
        assert getattr(gpu_step, loss).item() == pytest.approx(getattr(cpu_step, loss).item(), rel=1e-2), loss
    assert (gpu_step.decision.cpu() == cpu_step.decision).float().mean() > 0.95
    assert len(cpu_step.decision.unique()) > 2
    assert torch.cosine_similarity(cpu_gradient, gpu_gradient, 0) > 0.98


def test_fp16_learns_with_its_scale():
    data = training_set(16, 64, "cuda")
    config = Config(size=64, precision="fp16")
    student, teacher = networks("cuda")
    state = State(student, teacher.eval(), torch.optim.Adam(student.parameters(), 1e-3, fused=True), "scarcenet")
    engine, losses = make_engine(config, state), []
    for seed in range(40):
        batch = batch_of(data, config, seed=seed, p_half=0.0)
        student.train()
        (_, supervised, _), _ = learn_scarcenet(config, data, state, engine, batch)
        losses.append(supervised.item())
    assert engine.scaler.get_scale() > 1 and all(p.isfinite().all() for p in student.parameters())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[2:7])


@pytest.mark.parametrize("crop_cache_mb", [8192.0, 0.0])
def test_a_run_on_the_gpu_is_read_on_the_cpu(zoo, tmp_path, crop_cache_mb):
    """A run from crops on the GPU or in a file, in the format of `auto`, is resumed there and read on the CPU.

    There it has the same weights, and they predict the same.
    """
    config = replace(
        DEMO,
        network="hrnet_tiny",
        backbone="",
        data=str(zoo),
        labels=1,
        device="cuda",
        size=64,
        supervised_epochs=2,
        epochs=2,
        supervised_repeat=2,
        labelled_repeat=2,
        crop_cache_mb=crop_cache_mb,
        cache=str(tmp_path / "cache"),
    )
    run_data = load_run_data(config, tmp_path)
    assert run_data.data.crops.mapped == (crop_cache_mb == 0) == (not run_data.data.crops.pixels.is_cuda)
    summary = train_in_folder(config, tmp_path / "run", run_data)
    assert torch.cuda.get_device_name() in summary["device"]
    file = tmp_path / "run/checkpoint.safetensors"
    state = load_checkpoint(file, config, run_data.data)
    assert next(state.student.parameters()).is_cuda and (state.stage, state.epoch) == ("scarcenet", 2)

    cpu_config = replace(config, device="cpu", precision="float32", crop_cache_mb=8192.0)
    cpu_data = load_run_data(cpu_config, tmp_path)
    cpu_state = load_checkpoint(file, cpu_config, cpu_data.data)
    cpu_weights = cpu_state.teacher.state_dict()
    assert all(torch.equal(value.cpu(), cpu_weights[name]) for name, value in state.teacher.state_dict().items())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        gpu_config = replace(config, precision="float32")
        on_gpu = predict(state.teacher, run_data.crops["test"], gpu_config, schema=AP10K)
        on_cpu = predict(cpu_state.teacher, cpu_data.crops["test"], cpu_config, schema=AP10K)
    assert ((on_gpu.xy.cpu() - on_cpu.xy).norm(dim=-1) < 1).float().mean() > 0.9

    (third,) = fit(replace(config, epochs=3), run_data.data, state)
    assert np.isfinite(third.loss)
