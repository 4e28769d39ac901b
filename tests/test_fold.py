"""Eval passes with batch norms inside the convolutions: the same answers, whatever the weights are by then."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from scarcenet.config import DEMO, Config, read_config
from scarcenet.data.augment import strong_geometry
from scarcenet.data.loader import make_batch, seeded
from scarcenet.experiments.baseline import run_demo
from scarcenet.experiments.benchmark import set_up
from scarcenet.experiments.study import run_study
from scarcenet.models.build import build_network
from scarcenet.relabel import Decision
from scarcenet.run import settings
from scarcenet.run.folder import open_run, write_config
from scarcenet.run.load import load_run_data
from scarcenet.run.train_run import train_in_folder, train_run
from scarcenet.step import scarcenet_step
from scarcenet.train import learn_scarcenet, make_engine
from scarcenet.utils.device import AmpModel, failed_compilations, number_formats, prepare_model
from scarcenet.utils.fold import fold, folded_twin

CPU = torch.device("cpu")
NETWORKS = ("timm:tf_efficientnet_lite0", "timm:resnet18", "hrnet_tiny", "hrnet_w32", "mbhrnet_w32")


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with batch norms as a training leaves them: none of them does nothing."""
    rng = Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for tensor, low in (
                (norm.weight, 0.5),
                (norm.bias, -0.5),
                (norm.running_mean, -0.5),
                (norm.running_var, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + low)
    return model.eval()


def views(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=Generator().manual_seed(1))


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("network", NETWORKS)
def test_the_answers_are_the_networks_and_follow_its_weights(network):
    model, images = shaken(build_network(Config(network=network), 17)), views(2, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold(model, images)
    assert folded and not any(isinstance(m, nn.BatchNorm2d) for m in folded.net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        first = model(images)
        assert gap(folded.net(images), first) < 1e-5
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.mul_(1.1)
        shaken(model, seed=2)
        assert gap(folded.net(images), model(images)) > 1e-3  # not before `refresh`
        folded.refresh()
        assert gap(folded.net(images), model(images)) < 1e-5 and gap(model(images), first) > 1e-3


class Twice(nn.Module):
    """Uses what its convolution makes a second time, behind its batch norm's back."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        made = self.conv(x)
        return self.norm(made) + 3 * made


class Standardised(nn.Conv2d):
    """Gives its weights another size before it uses them, as some networks do."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


class Gated(nn.Module):
    """As `Twice`, with a gate that begins at zero, so that nothing shows at first."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        made = self.conv(x)
        return self.norm(made) + self.gate * made


def test_what_cannot_be_folded_stays():
    """Also while batch norms are as they begin, and do nothing."""
    for model in (Twice(), Gated(), nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(3, 4, 3)):
        images = views(2, 16)
        assert fold(model, images) is None
        with torch.no_grad():
            prepared = prepare_model(model.eval())
            assert torch.equal(prepared(images), model(images))
            assert torch.equal(prepared(images), model(images))


def test_a_prepared_model_folds_where_nothing_is_learnt():
    model, images = shaken(build_network(Config(network="hrnet_tiny"), 5)), views(3, 32)
    follows, fixed = prepare_model(model).eval(), prepare_model(model, folding="once").eval()
    assert torch.equal(follows(images), model(images)) and follows.folded is None  # with a gradient
    with torch.inference_mode():
        expected = model(images)
        assert all(0 < gap(m(images), expected) < 1e-5 for m in (follows, fixed))
    shaken(model, seed=1)
    with torch.no_grad():
        changed = model(images)
        assert gap(fixed(images), expected) < 1e-5 and gap(follows(images), changed) < 1e-5
        assert fixed.folded is follows.folded is folded_twin(model, images)  # one twin, and one trial
        mean = model.backbone.bn1.running_mean.clone()
        follows.train()(images)
        assert not torch.equal(mean, model.backbone.bn1.running_mean)  # in train mode it is the network itself
    assert follows.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    assert prepare_model(follows) is follows


def test_one_trial_for_one_model(monkeypatch):
    """Another device or number format is another trial, and so is another model; a twin goes with its model."""
    tried = []
    monkeypatch.setattr("scarcenet.utils.fold.fold", lambda *given: tried.append(1) or fold(*given))
    model, images = shaken(build_network(Config(network="hrnet_tiny"), 5)), views(2, 32)
    for _ in range(3):
        with torch.inference_mode():
            expected = model(images)
            assert gap(prepare_model(model, folding="once").eval()(images), expected) < 1e-5
        shaken(model, seed=1)
    assert len(tried) == 1
    assert folded_twin(model.double(), images.double()) and len(tried) == 2
    assert folded_twin(deepcopy(model), images.double()) and len(tried) == 3
    plain = nn.Conv2d(3, 4, 3)
    assert not folded_twin(plain, images) and not folded_twin(plain, images) and len(tried) == 4
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_a_compiled_model_folds_as_well():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 17, 3, padding=1))
    images, prepared = views(2, 32), prepare_model(shaken(net), compile="default")
    for seed in (1, 2):
        shaken(net, seed)
        with torch.no_grad():
            assert gap(prepared(images), net(images)) < 1e-5
    assert prepared.folded


@pytest.mark.slow
def test_frozen_weights():
    """Constants of a compiled network: for any size of a batch, and never those of a network prepared before."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 17, 3, padding=1))
    images, earlier, failed = views(8, 32), None, failed_compilations()
    with torch.no_grad():
        for seed in (1, 2):
            shaken(net, seed)
            frozen = prepare_model(net, compile="default", folding="frozen").eval()
            for count in (8, 5, 1, 8):
                assert gap(frozen(images[:count]), net(images[:count])) < 1e-5
            if earlier:
                assert gap(earlier[0](images), earlier[1]) < 1e-5  # it stays as it was
            earlier = frozen, net(images)
    assert failed_compilations() == failed


def test_formats_of_both_kinds_of_passes():
    assert number_formats("auto", CPU) == (torch.float32, torch.float32)
    assert number_formats("bf16", CPU) == (torch.bfloat16, torch.bfloat16)
    assert number_formats("bf16-eval", CPU)[0] == torch.float32
    model, images = shaken(build_network(Config(network="hrnet_tiny"), 5)), views(2, 32)
    mixed = AmpModel(model, eval_format=torch.bfloat16)
    assert torch.equal(mixed(images), model(images))
    with torch.no_grad():
        assert 1e-4 < gap(mixed(images), model(images)) < 0.1


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    config = Config(network="hrnet_tiny", size=64, batch=8, device="cpu", precision="float32")
    found = set_up(config, tmp_path_factory.mktemp("zoo"), instances=16)
    shaken(found.state.student)
    found.state.teacher.load_state_dict(found.state.student.state_dict())
    return found


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_step_of_folded_passes(subject, train_mode):
    """The same step as without folding, after the weights have moved; and no folding with batch norms in train mode."""
    config, data = replace(subject.config, bn_train_mode=train_mode), subject.data
    state = replace(subject.state, student=deepcopy(subject.state.student), teacher=deepcopy(subject.state.teacher))
    state.optimiser = torch.optim.Adam(state.student.parameters(), 1e-3, fused=True)
    engine = make_engine(config, state)
    engine.student.train()
    engine.teacher.train(train_mode)

    def batch():
        strong = strong_geometry(config)
        return make_batch(data.crops, data.labels, torch.arange(8), schema=data.schema, rng=seeded(3), strong=strong)

    for _ in range(3):
        learn_scarcenet(config, data, state, engine, batch())
    plain = deepcopy(state.student), deepcopy(state.teacher)
    kwargs = dict(epoch=0, rules=config, schema=data.schema)
    folded = scarcenet_step(engine.student, engine.teacher, batch(), **kwargs)
    expected = scarcenet_step(*plain, batch(), **kwargs)
    assert (engine.student.folded is None) == train_mode == (engine.teacher.folded is None)
    assert torch.equal(folded.prediction, expected.prediction)
    if train_mode:
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(folded, expected, strict=True))
    assert (folded.decision == expected.decision).float().mean() > 0.98
    assert gap(folded.teacher_target, expected.teacher_target) < 1e-3 or not config.consistency_soft
    assert folded.supervised.item() == pytest.approx(expected.supervised.item(), rel=0.02)
    assert {Decision.TRUTH, Decision.RELIABLE} <= {Decision(int(d)) for d in folded.decision.unique()}


def test_auto_is_chosen_once(zoo, tmp_path, monkeypatch, capsys):
    """At the beginning of a run, and a run that goes on keeps the choice; without bf16 there is nothing to choose."""
    quick = dict(network="hrnet_tiny", backbone="", size=32, labels=1, supervised_epochs=1, epochs=0, device="cpu")
    times = {"float32": {True: 1.0, False: 1.0}, "bf16": {True: 2.0, False: 0.5}}
    monkeypatch.setattr(settings, "time_passes", lambda config, keypoints, names, **_: [times[n] for n in names])
    monkeypatch.setattr(settings, "has_bf16", lambda device: True)
    run = train_run("demo", data=zoo, out=tmp_path / "a", progress=False, **quick)
    assert run.config.precision == read_config(tmp_path / "a").precision == "bf16-eval"
    assert "precision: bf16-eval (bf16 is 2.00 times as fast in eval passes" in capsys.readouterr().out
    times["bf16"] = {True: 0.5, False: 0.5}
    again = train_run("demo", data=zoo, out=tmp_path / "a", resume=True, progress=False, **quick)
    assert again.config.precision == "bf16-eval" and "times as fast" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="precision: expected 'bf16-eval', got 'float32'"):
        train_run("demo", data=zoo, out=tmp_path / "a", resume=True, progress=False, precision="float32", **quick)
    assert settings.fastest_precision(run.config, 17) == "bf16"
    times["bf16"] = {True: 0.5, False: 0.95}
    assert settings.fastest_precision(run.config, 17) == "float32"
    # what has begun without a choice, in float32, goes on in it
    write_config(tmp_path / "a", replace(run.config, precision="auto"))
    again = train_run("demo", data=zoo, out=tmp_path / "a", resume=True, progress=False, **quick)
    assert again.config.precision == read_config(tmp_path / "a").precision == "float32"
    monkeypatch.setattr(settings, "has_bf16", lambda device: False)
    assert train_run("demo", data=zoo, out=tmp_path / "b", progress=False, **quick).config.precision == "float32"


def test_a_run_that_failed_after_the_choice_keeps_its_set(tmp_path):
    write_config(tmp_path, replace(DEMO, precision="bf16-eval"))
    (tmp_path / "data").mkdir()
    open_run(tmp_path, DEMO)
    assert (tmp_path / "data").exists() and read_config(tmp_path).precision == "auto"
    open_run(tmp_path, replace(DEMO, data="other"))
    assert not (tmp_path / "data").exists()


def test_auto_is_chosen_once_for_a_grid_and_the_demo(zoo, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(settings, "has_bf16", lambda device: True)
    monkeypatch.setattr(settings, "fastest_precision", lambda *_: chosen.append(1) or "bf16-eval")
    small = dict(network="hrnet_tiny", backbone="", size=32, labels=1, supervised_repeat=1, labelled_repeat=1, views=1)
    config = replace(DEMO, data=str(zoo), device="cpu", supervised_epochs=1, epochs=1, **small)
    grid = dict(counts=(1,), methods=("supervised",))
    for seed in (0, 1):  # two commands that add to one folder
        assert len(list(run_study(config, tmp_path / "grid", seeds=(seed,), **grid))) == 1
    assert len(chosen) == 1 and read_config(tmp_path / "grid").precision == "bf16-eval"
    run_demo(config, tmp_path / "demo")  # whose baseline has a process of its own, where nothing is patched
    assert len(chosen) == 2
    assert {read_config(tmp_path / "demo" / home).precision for home in (".", "baseline")} == {"bf16-eval"}


def test_threads_of_the_next_epoch(zoo, tmp_path):
    """The demo lets the training that is left have all cores; without `threads`, their number stays."""
    config = Config(network="hrnet_tiny", size=32, data=str(zoo), labels=1, supervised_epochs=2, epochs=0, device="cpu")
    config = replace(config, precision="float32", supervised_batch=8)
    before, seen = torch.get_num_threads(), []

    def threads():
        seen.append(torch.get_num_threads())
        return 2

    try:
        train_in_folder(
            config, open_run(tmp_path / "a", config), load_run_data(config, tmp_path / "a"), threads=threads
        )
        assert seen == [before, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    train_in_folder(config, open_run(tmp_path / "b", config), load_run_data(config, tmp_path / "b"))
    assert torch.get_num_threads() == before
