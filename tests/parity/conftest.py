"""The official code's tensors and its tiny network, as this library reads them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scarcenet.models.hrnet import mbhrnet
from scarcenet.models.weights import load_weights
from scarcenet.schema import AP10K


def read(file: Path) -> dict[str, torch.Tensor]:
    """An npz file's arrays as tensors, half precision widened."""
    with np.load(file) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}


@pytest.fixture(scope="session")
def functions(parity):
    return read(parity / "functions.npz")


@pytest.fixture(scope="session")
def golden(parity):
    return read(parity / "golden_step.npz")


@pytest.fixture(scope="session")
def pseudo(parity):
    return read(parity / "pseudo_label.npz")


@pytest.fixture(scope="session")
def tiny(parity):
    return read(parity / "mbhrnet_tiny.npz")


@pytest.fixture(scope="session")
def network(tiny):
    """Makes the official code's tiny MBHRNet, in eval mode, with weights `prefix`... of `arrays` (None: its own)."""

    def make(arrays=None, prefix="state/"):
        model = mbhrnet(len(AP10K), width=8, modules=(1, 1, 1), blocks=1)
        arrays = tiny if arrays is None else arrays
        load_weights(model, {name.removeprefix(prefix): t for name, t in arrays.items() if name.startswith(prefix)})
        return model.eval()

    return make
