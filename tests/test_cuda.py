"The same on a GPU, where there is one: everything follows its device, and nothing is drawn twice."

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cpsample.core.calibration import calibrate
from cpsample.core.copying import copy_test
from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, generate, seeded, train
from cpsample.core.guard import Guard, fit_guard
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, pixels
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule
from cpsample.judgement.attacks import published_attacks, scores_of
from cpsample.practice.datasets import load_fashion
from cpsample.practice.encoders import features
from cpsample.practice.runs import CONFIGS, fit_run_guard, load_model, train_denoiser
from cpsample.practice.training import fit
from cpsample.practice.unet import UNet, UNetClassifier
from cpsample.workshop.gpu import for_sampling
from cpsample.workshop.neighbours import nearest, work_device, working_on
from cpsample.workshop.seeds import seeded_generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SCHEDULE = make_schedule()
LOSS = partial(ddpm_loss, schedule=SCHEDULE)


@pytest.fixture(scope="module")
def digits():
    return load_digits()[0].cuda()


@pytest.fixture(scope="module")
def guard(digits):
    "A calibrated guard of thirty digits, trained on the GPU."
    guard = fit_guard(digits[:30], SCHEDULE, digits[100:300], steps=800)
    calibrate(guard, digits[:30], digits[300:600])
    return guard


def device_of(network):
    return next(network.parameters()).device.type


def test_a_guard_is_trained_calibrated_kept_and_read(guard, digits, tmp_path):
    assert device_of(guard.classifier) == "cuda" and guard.calibrated
    save_guard(guard, tmp_path / "guard")
    again = load_guard(tmp_path / "guard")
    t = torch.full((5,), 10)
    logits = again.classifier(digits[:5].cpu(), t)
    torch.testing.assert_close(
        logits, guard.classifier(digits[:5], t.cuda()).cpu(), atol=1e-3, rtol=1e-3
    )


def test_the_guard_follows_the_model_and_nothing_changes_at_scale_zero(guard, tmp_path):
    save_guard(guard, tmp_path / "guard")
    model = seeded(0, lambda: MLPDenoiser((1, 8, 8))).eval()
    torch.nn.init.normal_(model.out.weight, std=0.1)
    silent = protect(model, replace(load_guard(tmp_path / "guard"), scale=0.0))
    assert device_of(silent.guard.classifier) == "cpu"

    silent = silent.cuda()
    assert device_of(silent.guard.classifier) == device_of(silent) == "cuda"
    draw = {"steps": 20, "seed": 3, "device": "cuda"}
    plain = generate(model, SCHEDULE, (1, 8, 8), 16, **draw)
    assert torch.equal(generate(silent, SCHEDULE, (1, 8, 8), 16, **draw), plain)


def test_one_guard_serves_models_on_two_devices(guard):
    "It follows whoever asks, and says the same on both."

    def silent(x, t):
        return torch.zeros_like(x)

    x = torch.randn((8, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (protect(silent, replace(guard)) for _ in range(2))
    on_gpu.corrector.guard = on_cpu.guard
    for _ in range(2):
        expected = on_cpu(x, 10)
        torch.testing.assert_close(on_gpu(x.cuda(), 10).cpu(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([True]), torch.tensor([999.5])])
def test_a_guard_refuses_levels_that_there_are_not_and_the_gpu_goes_on(guard, t):
    model = protect(lambda x, t: torch.zeros_like(x), guard)
    x = torch.zeros((1, 1, 8, 8), device="cuda")
    with pytest.raises(ValueError, match="noise levels must"):
        model(x, t.cuda() if isinstance(t, torch.Tensor) else t)
    assert model(x, 10).isfinite().all()


def test_a_guard_that_went_bad_on_the_gpu_refuses(guard):
    broken = replace(guard)
    next(broken.classifier.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN: its weights"):
        protect(lambda x, t: torch.zeros_like(x), broken)(torch.zeros(1, 1, 8, 8).cuda(), 10)


def test_neighbours_and_copies_are_those_of_the_cpu(digits):
    x = (
        digits[:200]
        + 0.3 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    )
    distances, rows = nearest(x, digits, k=3, flips=True)
    expected, expected_rows = nearest(x.cpu(), digits.cpu(), k=3, flips=True)
    torch.testing.assert_close(distances.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert (rows.cpu() == expected_rows).float().mean() > 0.99
    assert copy_test(x, digits).copies == copy_test(x.cpu(), digits.cpu()).copies


def test_attacks_answer_on_the_gpu(digits):
    model = seeded(0, lambda: MLPDenoiser((1, 8, 8))).cuda().eval()
    for name, attack in published_attacks(SCHEDULE).items():
        scores = scores_of(attack, model, digits[:20])
        assert scores.device.type == "cuda" and torch.isfinite(scores).all(), name


def test_a_run_is_trained_and_its_guard_with_it(tmp_path):
    images = load_fashion(small=True)[0]
    config = replace(CONFIGS["fashion"].tiny(), guard_steps=800)
    options = {"device": "cuda", "progress": False}
    train_denoiser(config, images[:8], tmp_path, **options)
    model, schedule, _ = load_model(tmp_path / "model.safetensors")
    guard = fit_run_guard(
        config, images[:8], images[100:200], schedule, tmp_path / "guard", **options
    )
    guarded = protect(model, guard).cuda()
    x = generate(guarded, schedule, (1, 28, 28), 8, steps=10, device="cuda")
    assert x.shape == (8, 1, 28, 28) and torch.isfinite(x).all() and guarded.rows_seen == 80


def test_steps_of_training_never_wait(digits):
    "Torch itself refuses whatever would wait for the GPU, in steps 11 to 40."
    model = MLPDenoiser((1, 8, 8)).cuda()
    training = train(model, LOSS, (digits,), 100, clip=1.0, generator=seeded_generator(0, "cuda"))
    for _ in range(10):
        next(training)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            next(training)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Dropping(MLPDenoiser):
    "A denoiser with dropout, which uses torch's own generator on the GPU."

    def forward(self, x_t, t):
        return nn.functional.dropout(super().forward(x_t, t), 0.1)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(digits, tmp_path):
    def train_to_the_end(path, stop=None):
        torch.cuda.manual_seed(1)
        model = seeded(0, lambda: Dropping((1, 8, 8), 32)).cuda()
        options = dict(path=path, every=10, after_checkpoint=stop, progress=False)
        _, losses = fit(model, LOSS, (digits,), 40, **options)
        return model.state_dict(), losses

    def stop_at_20(step, average):
        if step == 20:
            raise RuntimeError("stopped")

    weights, losses = train_to_the_end(tmp_path / "through.safetensors")
    path = tmp_path / "stopped.safetensors"
    with pytest.raises(RuntimeError, match="stopped"):
        train_to_the_end(path, stop_at_20)
    again, losses_again = train_to_the_end(path)
    assert losses_again == losses
    assert all(torch.equal(value, weights[name]) for name, value in again.items())


def drawn(model, n=8, **options):
    return generate(model, SCHEDULE, (3, 16, 16), n, steps=20, seed=3, device="cuda", **options)


@pytest.fixture(scope="module")
def unet():
    network = seeded(0, lambda: UNet((3, 16, 16), width=16)).eval().requires_grad_(False)
    nn.init.normal_(network.out.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    return network.cuda()


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_fast_samples_are_the_samples_in_fewer_digits(unet, mode):
    "Compiled, with CUDA graphs and without; the last portion is smaller than the others."
    exact = drawn(unet)
    fast = drawn(for_sampling(unet, "cuda", mode=mode), chunk=3)
    assert exact.shape == fast.shape and (exact - fast).norm() < 0.1 * exact.norm()


def test_a_seed_is_the_same_image_on_a_gpu(unet):
    on_cpu = copy.deepcopy(unet).cpu()
    expected = generate(on_cpu, SCHEDULE, (3, 16, 16), 4, steps=20, seed=3)
    assert (drawn(unet, n=4) - expected).norm() < 0.02 * expected.norm()


def test_a_guard_changes_the_same_where_kernels_are_tuned(monkeypatch):
    classifier = seeded(1, lambda: UNetClassifier((3, 16, 16), 1, width=16))
    nn.init.normal_(classifier.out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    guard = Guard(classifier.cuda(), SCHEDULE, alpha=0.3, scale=100.0, t_max=1000)
    model = protect(lambda x, t: torch.zeros_like(x), guard)
    x = torch.randn((11, 3, 16, 16), generator=torch.Generator().manual_seed(0)).cuda()
    plain = model(x, 50)
    assert plain.abs().max() > 0.5  # it pushes
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.testing.assert_close(model(x, 50), plain, atol=0.02, rtol=0.02)


def test_images_on_the_cpu_are_searched_and_encoded_on_the_gpu():
    x = load_fashion(small=True)[0][:50]
    assert work_device(x).type == "cuda"
    with working_on("cpu"):
        distances, rows = nearest(pixels(x[:5]), pixels(x), k=3)
        f = features(pixels(x))
    on_gpu, rows_on_gpu = nearest(pixels(x[:5]), pixels(x), k=3)
    assert on_gpu.device.type == "cpu" and torch.equal(rows, rows_on_gpu)
    torch.testing.assert_close(on_gpu, distances, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features(pixels(x)), f, atol=1e-3, rtol=1e-3)
