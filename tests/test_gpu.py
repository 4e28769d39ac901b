"""The same training on a GPU: it computes what the CPU computes, a step never waits, and its files are read anywhere. Skipped without CUDA."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from scarcenet.data.augment import strong_geometry
from scarcenet.config import DEMO, Config
from scarcenet.data.loader import make_batch, seeded
from scarcenet.models.hrnet import tiny
from scarcenet.checkpoint import State, load_checkpoint
from scarcenet.schema import AP10K
from scarcenet.step import scarce_step
from scarcenet.train import fit, learn_scarce, make_engine
from scarcenet.predict.predictor import predict
from scarcenet.run.load import gather
from scarcenet.run.train_run import train_run
from test_speed import training_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def networks(device: str):
    """A student and a teacher, untrained, whose maps have peaks."""
    torch.manual_seed(0)
    pair = tiny(17), tiny(17)
    for model in pair:
        torch.nn.init.normal_(model.head.weight, std=0.1)
    return tuple(model.to(device) for model in pair)


@pytest.mark.parametrize("soft", [False, True], ids=["Gaussians", "maps as targets"])
def test_a_step_never_waits_for_the_gpu(soft):
    """CUDA itself raises an error wherever a step of stage 3, views included, lets Python wait."""
    data, config, (student, teacher) = training_set(16, 64, "cuda"), Config(size=64, consistency_soft=soft), networks("cuda")
    state = State(student, teacher.eval(), torch.optim.Adam(student.parameters(), fused=True), "scarce")
    engine = make_engine(config, state)
    for seed in range(4):                                          # the first makes what is made once
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            learn_scarce(config, data, state, engine, make_batch(data.canvases, data.labels, torch.arange(16), AP10K, seeded(seed), 1.0, strong_geometry(config)))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_the_same_on_both_devices():
    """Views, losses, decisions and gradients of one batch, in float32; up to what the order of sums makes of them: a few decisions lie on an edge."""
    config, steps = Config(size=64, agree_px=3.0, consistency_soft=True), {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in ("cpu", "cuda"):
            data, (student, teacher) = training_set(16, 64, device), networks(device)
            batch = make_batch(data.canvases, data.labels, torch.arange(16), AP10K, seeded(1), 1.0, strong_geometry(config))
            step = scarce_step(student.train(), teacher.eval(), batch, 20, config, AP10K)
            step.loss.backward()
            steps[device] = batch, step, torch.cat([p.grad.flatten() for p in student.parameters()]).cpu()
    (views, here, gradient), (others, there, other) = steps.values()
    for view in ("strong", "weak", "plain"):
        pictures, same = getattr(views, view).pictures, getattr(others, view).pictures.cpu()
        assert ((pictures - same).abs() < 0.02).float().mean() > 0.99, view          # a grey value is 1 / 58; some are rounded the other way
    for loss in ("loss", "supervised", "consistency"):
        assert getattr(there, loss).item() == pytest.approx(getattr(here, loss).item(), rel=1e-2), loss
    assert (there.decision.cpu() == here.decision).float().mean() > 0.95 and len(here.decision.unique()) > 2
    assert torch.cosine_similarity(gradient, other, 0) > 0.98


def test_fp16_learns_with_its_scale():
    data, config = training_set(16, 64, "cuda"), replace(Config(size=64), precision="fp16")
    student, teacher = networks("cuda")
    state = State(student, teacher.eval(), torch.optim.Adam(student.parameters(), 1e-3, fused=True), "scarce")
    engine, losses = make_engine(config, state), []
    for seed in range(40):
        batch = make_batch(data.canvases, data.labels, torch.arange(16), AP10K, seeded(seed), 0.0, strong_geometry(config))
        student.train()
        losses.append(learn_scarce(config, data, state, engine, batch)[0][1].item())
    assert engine.scaler.get_scale() > 1 and all(p.isfinite().all() for p in student.parameters())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[2:7])


@pytest.mark.parametrize("canvas_mb", [8192.0, 0.0])
def test_a_run_on_the_gpu_is_read_on_the_cpu(zoo, tmp_path, canvas_mb):
    """From pictures on the GPU or in a file, in the format that `auto` takes; taken up again; elsewhere it has the same weights, which see the same."""
    config = replace(DEMO, network="tiny", backbone="", data=str(zoo), labels="1", device="cuda", size=64, supervised_epochs=2, epochs=2, supervised_repeat=2, labelled_repeat=2,
                     canvas_mb=canvas_mb, cache=str(tmp_path / "cache"))
    material = gather(config, tmp_path)
    assert material.data.canvases.mapped == (canvas_mb == 0) == (not material.data.canvases.pixels.is_cuda)
    summary = train_run(config, tmp_path / "run", material)
    assert torch.cuda.get_device_name() in summary["device"]
    file = tmp_path / "run/checkpoint.safetensors"
    state, on_cpu = load_checkpoint(file, config, material.data), replace(config, device="cpu", precision="float32", canvas_mb=8192.0)
    assert next(state.student.parameters()).is_cuda and (state.stage, state.epoch) == ("scarce", 2)

    other = gather(on_cpu, tmp_path)
    again = load_checkpoint(file, on_cpu, other.data)
    assert all(torch.equal(value.cpu(), again.teacher.state_dict()[name]) for name, value in state.teacher.state_dict().items())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        there, here = (predict(model, m.canvases["test"], replace(c, precision="float32"), AP10K.swap)
                       for model, m, c in ((state.teacher, material, config), (again.teacher, other, on_cpu)))
    assert ((there.xy.cpu() - here.xy).norm(dim=-1) < 1).float().mean() > 0.9

    more = list(fit(replace(config, epochs=3), material.data, state))
    assert len(more) == 1 and np.isfinite(more[0].loss)
