"Training that is killed, at any moment, goes on to the same bits; what cannot be written leaves what was there."

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpsample.core.calibration import certainties
from cpsample.core.classifier import log_odds
from cpsample.core.ddpm import MLPDenoiser
from cpsample.core.images import load_digits
from cpsample.core.schedule import make_schedule
from cpsample.practice.runs import CONFIGS, fit_run_guard, load_model, save_model, train_denoiser
from cpsample.practice.training import fit, half_precision, mirrored, update_ema
from cpsample.practice.unet import UNet

PROGRAM = """
import os, sys, time, torch
from dataclasses import replace
from cpsample.practice import runs, training
from cpsample.workshop import files
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS, train_denoiser
folder, mode, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
def hang(word):
    print(word, flush=True)
    time.sleep(600)
calls, save, rename = [], files.save_file, os.replace
def half_written(tensors, path, header):
    calls.append(path)
    save(tensors, path, header)
    if mode == "half" and len(calls) == at:
        os.truncate(path, os.path.getsize(path) // 2)
        hang("here")
def before_rename(a, b):
    if mode == "rename" and len(calls) == at: hang("here")
    rename(a, b)
files.save_file, files.os.replace = half_written, before_rename
loss, steps = runs.ddpm_loss, []
def counted(model, x0, **kw):
    steps.append(torch.rand(1))              # as dropout would draw from the global stream
    if mode == "step" and len(steps) == at: hang("here")
    return loss(model, x0, **kw)
runs.ddpm_loss = counted
torch.manual_seed(7)
if mode == "full":
    import resource
    def limit(step, slow): resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)) if step == at else None
else: limit = None
config = replace(CONFIGS["fashion"].tiny(), steps=30, every=5, mirror=True)
try: train_denoiser(config, load_fashion(small=True)[0][:50], folder, after=limit, progress=False)
except Exception as error: print(type(error).__name__, error); sys.exit(3)
"""


def start(folder, mode="none", at=0):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), mode, str(at)],
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_when_there(child):
    assert child.stdout.readline().strip() == "here"
    child.kill()
    child.wait()


def finish(folder):
    child = start(folder)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0, said
    return load_file(folder / "model.safetensors"), load_file(folder / "checkpoint.safetensors")


def test_kill_at_six_points_then_resume_bit_identically(tmp_path):
    """One run is killed before its first checkpoint, between two, in the middle of writing one, between writing and renaming,
    in the first step after going on, and in the last step; another runs through. channels_last weights, mirrored images."""
    (tmp_path / "through").mkdir(), (tmp_path / "killed").mkdir()
    whole = finish(tmp_path / "through")
    for mode, at in (
        ("step", 3),
        ("step", 8),
        ("half", 1),
        ("rename", 2),
        ("step", 1),
        ("step", 15),
    ):
        kill_when_there(start(tmp_path / "killed", mode, at))
    pieces = finish(tmp_path / "killed")
    for a, b in zip(whole, pieces):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert len(whole[1]["losses"]) == 30 and sorted(
        p.name for p in (tmp_path / "killed").iterdir()
    ) == ["checkpoint.safetensors", "model.safetensors"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    "After step 10 no file may grow beyond 4,000 bytes, as on a full disk; the checkpoint of step 10 stays whole, and the run goes on from it."
    (tmp_path / "through").mkdir(), (tmp_path / "full").mkdir()
    child = start(tmp_path / "full", "full", 10)
    said, _ = child.communicate(timeout=120)
    assert (
        child.returncode == 3 and said.startswith("OSError") and "checkpoint.safetensors" in said
    ), said
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["checkpoint.safetensors"]
    assert len(load_file(tmp_path / "full" / "checkpoint.safetensors")["losses"]) == 10
    for a, b in zip(finish(tmp_path / "through"), finish(tmp_path / "full")):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    x, path = load_digits()[0][:30], tmp_path / "c.safetensors"

    def go(data=x, steps=4, width=16, seed=0, **kw):
        fit(
            MLPDenoiser((1, 8, 8), width),
            mean,
            (data,),
            steps,
            path,
            progress=False,
            generator=torch.Generator().manual_seed(seed),
            **kw,
        )

    def mean(model, x0, generator):
        return model(x0, torch.zeros(len(x0), dtype=torch.long)).square().mean()

    go()
    go()
    for kw in (
        dict(steps=5),
        dict(data=x[:20]),
        dict(lr=0.1),
        dict(batch_size=8),
        dict(width=8),
        dict(seed=1),
        dict(about={"schedule": "cosine"}),
    ):
        with pytest.raises(ValueError, match="belongs to another run") as caught:
            go(**kw)
        assert "\n" not in str(caught.value)
    for junk in (b"junk", path.read_bytes()[:-9]):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            go()


def test_average_follows_the_formula():
    slow, fast, expected = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1), None
    for n in range(1, 200):
        torch.nn.init.normal_(fast.weight)
        beta = min(0.9, (1 + n) / (10 + n))
        expected = (
            beta * (slow.weight.detach() if expected is None else expected)
            + (1 - beta) * fast.weight.detach()
        )
        update_ema(slow, fast, n, 0.9)
    torch.testing.assert_close(slow.weight.detach(), expected)
    assert beta == 0.9


def test_mirrored_flips_images_not_targets(generator):
    x0, y = torch.rand(400, 1, 3, 4), torch.arange(400)

    def loss(model, x, targets, generator):
        same, turned = (x == x0).flatten(1).all(1), (x == x0.flip(-1)).flatten(1).all(1)
        assert (same ^ turned).all() and torch.equal(targets, y)
        return turned.float().mean()

    assert (
        0.4 < mirrored(loss)(None, x0, y, generator=generator) < 0.6
        and mirrored(loss, 0)(None, x0, y, generator=generator) == 0
    )


@pytest.mark.parametrize("mirror", [False, True])
def test_a_guard_for_a_model_that_saw_mirror_images_is_calibrated_with_them(
    schedule, tmp_path, mirror
):
    x = load_digits()[0][:300]
    config = replace(CONFIGS["digits"], mirror=mirror, guard_steps=1500, guard_batch_size=64)
    guard = fit_run_guard(config, x[:10], x[10:], schedule, tmp_path / "guard", progress=False)
    level = [guard.report["level"]]
    sure_of = {
        name: (certainties(guard, y, level, 20) > log_odds(guard.alpha)).float().mean()
        for name, y in (("members", x[:10]), ("mirrored", x[:10].flip(-1)))
    }
    assert (
        guard.report["n_train"] == 10 * (1 + mirror)
        and sure_of["members"] > 0.85
        and (sure_of["mirrored"] > 0.85) == mirror
    )


def test_half_precision_leaves_weights_and_later_calls_alone(schedule):
    model = UNet((1, 28, 28), width=8)

    def loss(model, x0, generator=None):
        return model(x0, torch.zeros(len(x0), dtype=torch.long)).add(x0).square().mean()

    value = half_precision(loss, "cpu")(model, torch.rand(2, 1, 28, 28))
    value.backward()
    assert value.dtype == torch.float32 and all(
        p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None
    )
    assert model(torch.rand(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)).dtype == torch.float32


def test_models_come_back_as_they_were(tmp_path, schedule):
    model, path = (
        UNet((1, 28, 28), width=8).to(memory_format=torch.channels_last),
        tmp_path / "m.safetensors",
    )
    torch.nn.init.normal_(model.out.weight)
    save_model(model, schedule, path, {"seed": 3})
    again, its_schedule, made = load_model(path)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([1, 500])
    torch.testing.assert_close(again(x, t), model(x, t), atol=1e-5, rtol=1e-4)
    assert torch.equal(its_schedule.abar, schedule.abar) and made == {"seed": 3}
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
    model, schedule, losses = train_denoiser(config, x, tmp_path, progress=False)
    assert len(losses) == config.steps and torch.isfinite(torch.tensor(losses)).all()
    assert model(x, torch.full((12,), make_schedule(config.schedule).T - 1)).shape == x.shape


def test_fine_tuning_starts_from_the_given_weights(tmp_path):
    from dataclasses import replace

    config, x = replace(CONFIGS["digits"].tiny(), steps=1, every=1, lr=1e-9), load_digits()[0][:20]
    base = MLPDenoiser((1, 8, 8), 8)
    torch.nn.init.normal_(base.out.weight)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    tuned, _, _ = train_denoiser(config, x, tmp_path, start=base, progress=False)
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in tuned.state_dict().items())


def test_a_network_of_diffusers_goes_on(tmp_path):
    "Its configuration holds notes in an order that changes from process to process, and numbers that matter."
    diffusers = pytest.importorskip("diffusers")

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
        network._internal_dict = type(network.config)(
            dict(network.config) | {"_use_default_values": shuffled}
        )
        loss = lambda model, x, generator=None: model(x, 1).sample.square().mean()
        return fit(
            network,
            loss,
            (torch.zeros(4, 1, 8, 8),),
            2,
            tmp_path / "c.safetensors",
            progress=False,
            batch_size=2,
        )

    first = again(["a", "b"])[1]
    assert again(["b", "a"])[1] == first
    with pytest.raises(ValueError, match="belongs to another run"):
        again(["a", "b"], act_fn="gelu")
