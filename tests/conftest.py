import importlib.util
import os
from pathlib import Path

import pytest

# Tests and the processes they start compute with one thread each: two threads that wait for one
# another on busy cores make a small network hundreds of times slower. Read when torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings
from torch import nn

from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.core.schedule import make_schedule

# No property waits for a clock: a busy machine is no fault of the code.
settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


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


# Files whose tests take more than a few seconds each: whole runs, processes that are killed,
# studies, the matrix of schedulers. `make test-fast` leaves them out.
SLOW_FILES = {
    "test_adapters",
    "test_audit_study",
    "test_bad_input",
    "test_caption_attacks",
    "test_checkpoints",
    "test_comparison",
    "test_core_studies",
    "test_degrees",
    "test_demo",
    "test_distributed",
    "test_experiments",
    "test_guard_attacks_study",
    "test_latents",
    "test_membership_study",
    "test_path_pipelines",
    "test_paths_study",
    "test_paper_study",
    "test_rejection",
    "test_runs",
    "test_scheduler_matrix",
    "test_stable_diffusion",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def bench():
    "tools/bench.py, as a module."
    path = Path(__file__).parent.parent / "tools" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
