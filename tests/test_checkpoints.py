"""Training that is killed, at any moment, goes on to the same bits.

What cannot be written leaves what was there.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpsample.core.calibration import certainties
from cpsample.core.classifier import log_odds
from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.core.images import load_digits
from cpsample.core.schedule import make_schedule
from cpsample.practice.runs import CONFIGS, fit_run_guard, load_model, save_model, train_denoiser
from cpsample.practice.training import (
    TrainingState,
    fit,
    half_precision,
    load_checkpoint,
    mirrored,
    save_checkpoint,
    update_ema,
)
from cpsample.practice.unet import UNet

PROGRAM = """
import os, sys, torch
from dataclasses import replace
from cpsample.practice import runs
from cpsample.workshop import files
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS, train_denoiser

folder, mode, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(7)


def wait_to_be_killed():
    print("here", flush=True)
    sys.stdin.readline()


# In the middle of a write, or between the write and the renaming.
written, save, rename = [], files.save_file, os.replace


def half_written(tensors, path, header):
    written.append(path)
    save(tensors, path, header)
    if mode == "half" and len(written) == moment:
        os.truncate(path, os.path.getsize(path) // 2)
        wait_to_be_killed()


def before_rename(source, target):
    if mode == "rename" and len(written) == moment:
        wait_to_be_killed()
    rename(source, target)


files.save_file, files.os.replace = half_written, before_rename

# In the middle of a step; each draws from the global stream, as dropout would.
loss, drawn = runs.ddpm_loss, []


def counted(model, x0, **options):
    drawn.append(torch.rand(1))
    if mode == "step" and len(drawn) == moment:
        wait_to_be_killed()
    return loss(model, x0, **options)


runs.ddpm_loss = counted


# A disk that is full from some step on.
def limit(step, ema_model):
    import resource

    if mode == "full" and step == moment:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))


config = replace(CONFIGS["fashion"].tiny(), steps=30, every=5, mirror=True)
images = load_fashion(small=True)[0][:50]
try:
    train_denoiser(config, images, folder, after_checkpoint=limit, progress=False)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def start(folder, mode="none", moment=0):
    "The program in a process of its own, with one thread."
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), mode, str(moment)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_when_there(child):
    assert child.stdout.readline().strip() == "here"
    child.kill()
    child.wait()


def finish(folder):
    "Let the program run, or go on, to its end: the tensors of its model and of its checkpoint."
    child = start(folder)
    said, _ = child.communicate()
    assert child.returncode == 0, said
    return load_file(folder / "model.safetensors"), load_file(folder / "checkpoint.safetensors")


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "The run that nobody disturbs: its model and its last checkpoint."
    return finish(tmp_path_factory.mktemp("through"))


def test_kill_at_six_points_then_resume_bit_identically(through, tmp_path):
    """One run is killed six times, the other runs through; weights in channels_last, mirrors.

    Before the first checkpoint, between two, in the middle of writing one, between writing and
    renaming, in the first step after going on, and in the last step.
    """
    moments = ("step", 3), ("step", 8), ("half", 1), ("rename", 2), ("step", 1), ("step", 15)
    for mode, moment in moments:
        kill_when_there(start(tmp_path, mode, moment))
    model, checkpoint = finish(tmp_path)
    assert same_tensors(model, through[0]) and same_tensors(checkpoint, through[1])
    assert len(checkpoint["losses"]) == 30
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint.safetensors", "model.safetensors"]


def test_a_full_disk_leaves_the_last_checkpoint(through, tmp_path):
    """After step 10 no file may grow beyond 4,000 bytes, as on a full disk.

    The checkpoint of step 10 stays whole, and the run goes on from it.
    """
    child = start(tmp_path, "full", 10)
    said, _ = child.communicate()
    assert child.returncode == 3, said
    assert said.startswith("OSError") and "checkpoint.safetensors" in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert len(load_file(tmp_path / "checkpoint.safetensors")["losses"]) == 10
    model, checkpoint = finish(tmp_path)
    assert same_tensors(model, through[0]) and same_tensors(checkpoint, through[1])


def mean_square(model, x0, generator=None):
    "A loss that needs no noise."
    return model(x0, torch.zeros(len(x0), dtype=torch.long)).square().mean()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    digits, path = load_digits()[0][:30], tmp_path / "c.safetensors"

    def go(data=digits, steps=4, width=16, seed=0, **options):
        fit(
            MLPDenoiser((1, 8, 8), width),
            mean_square,
            (data,),
            steps=steps,
            path=path,
            progress=False,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )

    go()
    go()
    for change in (
        dict(steps=5),
        dict(data=digits[:20]),
        dict(lr=0.1),
        dict(batch_size=8),
        dict(width=8),
        dict(seed=1),
        dict(identity={"schedule": "cosine"}),
    ):
        with pytest.raises(ValueError, match="belongs to another run") as caught:
            go(**change)
        assert "\n" not in str(caught.value)
    for junk in (b"junk", path.read_bytes()[:-9]):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            go()


def test_a_checkpoint_keeps_the_names_of_version_0_1(tmp_path):
    network, path = MLPDenoiser((2,), 4, 1), tmp_path / "c.safetensors"
    fit(network, mean_square, (torch.randn(8, 2),), 2, path=path, progress=False)
    with safe_open(path, "pt") as file:
        names, header = set(file.keys()), file.metadata()
    assert {name.split(".")[0] for name in names} == set(
        "model slow optimizer generator global losses".split()
    )
    assert header.keys() == {"run"}
    weights = {f"{part}.{name}" for part in ("model", "slow") for name in network.state_dict()}
    assert weights < names
    assert {"optimizer.0.step", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"} < names


def test_the_random_streams_go_on_from_where_they_were(tmp_path):
    path = tmp_path / "c.safetensors"
    network = MLPDenoiser((2,), 4, 1)
    state = TrainingState.fresh(network, torch.Generator().manual_seed(3))
    save_checkpoint(path, state, {})
    expected = torch.rand(3, generator=state.generator), torch.rand(3)
    load_checkpoint(path, state, {})
    assert torch.equal(torch.rand(3, generator=state.generator), expected[0])
    assert torch.equal(torch.rand(3), expected[1])


def test_after_checkpoint_is_told_the_step_and_the_average(tmp_path):
    network, calls = MLPDenoiser((2,), 4, 1), []
    ema_model, losses = fit(
        network,
        mean_square,
        (torch.randn(8, 2),),
        steps=5,
        every=2,
        progress=False,
        after_checkpoint=lambda step, average: calls.append((step, average)),
    )
    assert [step for step, _ in calls] == [2, 4, 5] and len(losses) == 5
    assert all(average is ema_model for _, average in calls)
    assert not any(weight.requires_grad for weight in ema_model.parameters())


def test_average_follows_the_formula():
    ema_layer, layer = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = ema_layer.weight.detach().clone()
    for n in range(1, 200):
        torch.nn.init.normal_(layer.weight)
        beta_n = min(0.9, (1 + n) / (10 + n))
        expected = beta_n * expected + (1 - beta_n) * layer.weight.detach()
        update_ema(ema_layer, layer, n, beta=0.9)
    torch.testing.assert_close(ema_layer.weight.detach(), expected)
    assert beta_n == 0.9


def test_mirrored_flips_images_not_targets(generator):
    x0, y = torch.rand(400, 1, 3, 4), torch.arange(400)

    def mirrored_share(model, x, targets, generator):
        same = (x == x0).flatten(1).all(1)
        turned = (x == x0.flip(-1)).flatten(1).all(1)
        assert (same ^ turned).all() and torch.equal(targets, y)
        return turned.float().mean()

    assert 0.4 < mirrored(mirrored_share)(None, x0, y, generator=generator) < 0.6
    assert mirrored(mirrored_share, 0)(None, x0, y, generator=generator) == 0


@pytest.mark.parametrize("mirror", [False, True])
def test_a_guard_for_a_model_that_saw_mirror_images_is_calibrated_with_them(
    schedule, tmp_path, mirror
):
    digits = load_digits()[0][:300]
    members, non_members = digits[:10], digits[10:]
    config = replace(CONFIGS["digits"], mirror=mirror, guard_steps=1500, guard_batch_size=64)
    guard = fit_run_guard(
        config, members, non_members, schedule=schedule, path=tmp_path / "guard", progress=False
    )
    assert guard.report["n_train"] == 10 * (1 + mirror)

    def certain_share(images):
        certainty = certainties(guard, images, [guard.report["level"]], draws=20)
        return (certainty > log_odds(guard.alpha)).float().mean()

    assert certain_share(members) > 0.85
    assert (certain_share(members.flip(-1)) > 0.85) == mirror


def test_half_precision_leaves_weights_and_later_calls_alone(schedule):
    model = UNet((1, 28, 28), width=8)

    def loss(model, x0, generator=None):
        return model(x0, torch.zeros(len(x0), dtype=torch.long)).add(x0).square().mean()

    value = half_precision(loss, "cpu")(model, torch.rand(2, 1, 28, 28))
    value.backward()
    assert value.dtype == torch.float32
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.dtype == torch.float32 for gradient in gradients)
    answer = model(torch.rand(1, 1, 28, 28), torch.zeros(1, dtype=torch.long))
    assert answer.dtype == torch.float32


def test_models_come_back_as_they_were(tmp_path, schedule):
    path = tmp_path / "m.safetensors"
    model = UNet((1, 28, 28), width=8).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(model.out.weight)
    save_model(model, schedule, path, made={"seed": 3})
    saved = load_model(path)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([1, 500])
    torch.testing.assert_close(saved.model(x, t), model(x, t), atol=1e-5, rtol=1e-4)
    assert torch.equal(saved.schedule.abar, schedule.abar) and saved.made == {"seed": 3}

    with pytest.raises(FileNotFoundError, match="cpsample train"):
        load_model(tmp_path / "none.safetensors")
    for spoil in (lambda: path.write_bytes(b"junk"), lambda: save_file({"x": torch.ones(1)}, path)):
        spoil()
        with pytest.raises(ValueError, match="cannot be read as a model"):
            load_model(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_trains_in_its_tiny_version(name, tmp_path):
    config = CONFIGS[name].tiny()
    x = torch.rand(12, *config.shape) * 2 - 1
    trained = train_denoiser(config, x, tmp_path, progress=False)
    assert len(trained.losses) == config.steps
    assert torch.isfinite(torch.tensor(trained.losses)).all()
    t = torch.full((12,), make_schedule(config.schedule).T - 1)
    assert trained.model(x, t).shape == x.shape


def test_fine_tuning_starts_from_the_given_weights(tmp_path):
    config = replace(CONFIGS["digits"].tiny(), steps=1, every=1, lr=1e-9)
    base = seeded(0, lambda: MLPDenoiser((1, 8, 8), 8))
    torch.nn.init.normal_(base.out.weight)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    tuned = train_denoiser(config, load_digits()[0][:20], tmp_path, start=base, progress=False)
    for name, weight in tuned.model.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)


def test_a_network_of_diffusers_goes_on(tmp_path):
    """Its configuration holds notes in an order that changes from process to process.

    It also holds numbers that matter.
    """
    diffusers = pytest.importorskip("diffusers")

    def loss(model, x, generator=None):
        return model(x, 1).sample.square().mean()

    def again(shuffled, **options):
        network = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(4,),
            norm_num_groups=2,
            add_attention=False,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            **options,
        )
        notes = dict(network.config) | {"_use_default_values": shuffled}
        network._internal_dict = type(network.config)(notes)
        data, path = torch.zeros(4, 1, 8, 8), tmp_path / "c.safetensors"
        _, losses = fit(network, loss, (data,), 2, path=path, progress=False, batch_size=2)
        return losses

    first = again(["a", "b"])
    assert again(["b", "a"]) == first
    with pytest.raises(ValueError, match="belongs to another run"):
        again(["a", "b"], act_fn="gelu")
