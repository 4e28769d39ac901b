"""The network, number by number and name by name."""

import json

import pytest
import torch

from scarcenet.models.hrnet import hrnet, mbhrnet_w32
from scarcenet.models.weights import load_weights, public_state
from scarcenet.schema import AP10K


def test_output_and_features(network, tiny):
    model = network()
    with torch.no_grad():
        torch.testing.assert_close(model(tiny["input"]), tiny["output"], atol=1e-4, rtol=0)
        torch.testing.assert_close(model.features(tiny["input"])[..., ::2, ::2], tiny["feature"], atol=1e-4, rtol=0)


def test_every_tensor_is_loaded(network, tiny):
    model = network()
    state = {name.removeprefix("state/"): t for name, t in tiny.items() if name.startswith("state/")}
    ours = public_state(model)
    assert ours.keys() == state.keys()
    for name, t in state.items():
        assert torch.equal(ours[name], t), name
    report = load_weights(model, state)
    assert set(report.loaded) == state.keys() and not (report.missing or report.unexpected or report.mismatched)


@pytest.mark.parametrize("name, make", [("hrnet_w32", hrnet), ("mbhrnet_w32", mbhrnet_w32)])
def test_names_of_the_public_checkpoints(parity, name, make):
    expected = {n: tuple(shape) for n, shape in json.loads((parity / "w32_keys.json").read_text())[name]}
    with torch.device("meta"):
        model = make(len(AP10K))
    assert {n: tuple(t.shape) for n, t in public_state(model).items()} == expected
