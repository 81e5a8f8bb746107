"What version 0.1 wrote is still read: guards, models, a run that goes on, stages, results."

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.ddpm import final_sample, sample
from cpsample.core.guard_files import load_guard
from cpsample.core.images import to_bytes
from cpsample.practice.runs import load_model, load_protected_run, members_of
from cpsample.production import experiments
from cpsample.production.cifar10 import CIFAR10, NARROW
from cpsample.production.experiments import EXPERIMENTS, run_experiment, tiny_size
from cpsample.workshop.studies import Study, Workspace, cached_stage, run_study

V0_1 = Path(__file__).parent / "data" / "v0_1"
RESULTS = Path(__file__).parents[1] / "data" / "results"
EXPECTED = json.loads((V0_1 / "expected.json").read_text())


def hash_of(tensors):
    "The sha256 of the bytes of tensors, one after another."
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_network(network, schedule, expected):
    "Weights and schedule are what was written, and the network answers as it did."
    state = network.state_dict()
    assert hash_of(state[name] for name in sorted(state)) == expected["weights_sha256"]
    assert hash_of([schedule.abar]) == expected["abar_sha256"]
    assert schedule.name == expected["schedule"] and type(network).__name__ == expected["network"]

    # Two rows, the second one backwards.
    shape = network.config["shape"]
    row = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    with torch.no_grad():
        answer = network(torch.stack([row, -row]), torch.tensor([10, 10]))
    assert list(answer.shape) == expected["shape"]
    values = answer.flatten()
    torch.testing.assert_close(values[:4].tolist(), expected["first"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values[-4:].tolist(), expected["last"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EXPECTED["guards"])
def test_a_guard(name):
    guard, expected = load_guard(V0_1 / name), EXPECTED["guards"][name]
    check_network(guard.classifier, guard.schedule, expected)
    for setting in ("alpha", "scale", "form", "t_max", "made", "calibrated"):
        assert getattr(guard, setting) == expected[setting]
    assert (guard.report and len(guard.report["levels"])) == expected["levels"]


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_a_model(name):
    if "diffusers" in name:
        pytest.importorskip("diffusers")
    saved, expected = load_model(V0_1 / name), EXPECTED["models"][name]
    check_network(saved.model, saved.schedule, expected)
    assert saved.made == expected["made"]
    assert json.loads(json.dumps(saved.model.config)) == expected["config"]


@pytest.fixture
def run(tmp_path):
    "A copy of the run, whose training was stopped after step 10 of 20."
    return shutil.copytree(V0_1 / "run", tmp_path / "run")


def test_a_run_knows_its_images_and_samples_as_it_did(run, tmp_path):
    images = members_of(run)
    assert images.description["images"] == len(images.members) == 6
    protected = load_protected_run(run, device="cpu")
    assert protected.guard.calibrated and protected.shape == [1, 8, 8]

    # From one stream of noise, as images were drawn then, the protected model gives them still.
    steps = images.description["config"]["sample_steps"]
    options = {"steps": steps, "clip": 1, "generator": torch.Generator().manual_seed(3)}
    walk = sample(protected.model, protected.schedule, (12, *protected.shape), **options)
    first = to_bytes(final_sample(walk))[0].flatten().numpy().astype(int)
    assert np.abs(first - EXPECTED["run"]["samples"]["first image"]).max() <= 1

    words = "sample", str(run), "-n", "12", "--seed", "3", "--device", "cpu", "--out"
    result = CliRunner().invoke(app, [*words, str(tmp_path / "samples")])
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "samples.npz")["images"].shape[0] == 12


def test_a_training_goes_on_from_its_checkpoint(run):
    "The checkpoint is recognised as this run's; from its step 10 the training ends as it did."
    before = load_file(run / "checkpoint.safetensors")
    description, expected = (run / "run.json").read_bytes(), load_model(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    words = "train", "digits", "--images", "6", "--tiny", "--device", "cpu", "--out", str(run)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output

    # It did not begin anew: the first ten losses are the old. The picture that belongs to the
    # checkpoint was missing, as after a kill between the two.
    pictures = sorted(path.name for path in run.glob("*.png"))
    assert pictures == ["samples-000010.png", "samples-000020.png"]
    after = load_file(run / "checkpoint.safetensors")
    assert after.keys() == before.keys() and len(after["losses"]) == 20
    assert torch.equal(after["losses"][:10], before["losses"])
    assert (run / "run.json").read_bytes() == description

    # On this machine the numbers may be rounded otherwise.
    saved = load_model(run / "model.safetensors")
    assert saved.made | {"data": expected.made["data"]} == expected.made
    torch.testing.assert_close(saved.model.state_dict(), expected.model.state_dict())


def test_a_checkpoint_of_another_run_is_still_refused(run):
    words = "train", "digits", "--images", "7", "--tiny", "--device", "cpu", "--out", str(run)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "belongs to another run (images 6 there, 7" in result.stderr


class Stopped(BaseException):
    "What the next test stops the experiment with."


def test_an_experiment_is_recognised_and_its_stages_are_kept(tmp_path, monkeypatch):
    "It is this experiment's folder; the base, whose weights were removed, is made again."
    folder = shutil.copytree(V0_1 / "experiment", tmp_path / "experiment")
    kept = cached_stage(Workspace(folder, progress=False), "base", make=pytest.fail)
    assert kept.keys() == {"loss", "seconds"}

    def stop(*args, **options):
        raise Stopped

    monkeypatch.setattr(experiments, "train_denoiser", stop)
    with pytest.raises(Stopped):
        run_experiment(
            tiny_size(CIFAR10["full"], "crops-32", options=NARROW), folder, progress=False
        )
    with pytest.raises(ValueError, match="belongs to another run"):
        run_experiment(EXPERIMENTS["celeba64"]["tiny"], folder, progress=False)


def test_a_part_measured_anew_leaves_the_others_of_its_file(tmp_path):
    shutil.copy(RESULTS / "membership.json", tmp_path)
    before = json.loads((RESULTS / "membership.json").read_text())
    study = Study("membership", {"digits": lambda workspace: {"n": 1}, "fashion": pytest.fail})
    record = run_study(study, tmp_path, Workspace(tmp_path), parts=["digits"])
    assert record["digits"]["n"] == 1 and record["fashion"] == before["fashion"]
