import pytest
import torch
from torch import nn

from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.core.schedule import make_schedule


@pytest.fixture
def schedule():
    return make_schedule()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def network():
    "An untrained digit denoiser whose output is not zero."

    def build():
        model = MLPDenoiser((1, 8, 8), width=64)
        nn.init.normal_(model.out.weight, std=0.1)
        return model

    return seeded(0, build)
