"What training asks of a GPU, seen without one."

import contextlib
import importlib.util
from functools import partial

import pytest
import torch
from gpu_without_one import GPU, GpuGenerator, Watching
from safetensors.torch import load_file
from torch import nn

from cpsample.core import ddpm
from cpsample.core.classifier import MLPClassifier, label_loss
from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, run, seeded, train
from cpsample.core.images import load_digits, pixels
from cpsample.core.paths import flow_loss
from cpsample.core.schedule import make_schedule, rand, randint, randn
from cpsample.judgement.baselines import ambient_loss
from cpsample.practice.datasets import load_fashion
from cpsample.practice.training import (
    SideBySide,
    TrainingState,
    fit,
    load_checkpoint,
    mirrored,
    save_checkpoint,
    update_ema,
)
from cpsample.practice.unet import UNet
from cpsample.workshop import seeds

SCHEDULE = make_schedule()
LOSS = partial(ddpm_loss, schedule=SCHEDULE)


@pytest.fixture(autouse=True)
def fused_adam_passes_for_meta(monkeypatch):
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)


def pictures(n=100):
    "Bytes on the GPU."
    return torch.zeros((n, 3, 16, 16), dtype=torch.uint8, device=GPU)


def traffic_of_fit(steps, network=None, **options):
    "A training of so many steps, watched."
    network = network or MLPDenoiser((3, 16, 16), 8, depth=1).to(GPU)
    LOSS(network, torch.zeros((1, 3, 16, 16), device=GPU))  # the schedule is there before
    with Watching() as watching:
        fit(network, mirrored(LOSS), (pictures(),), steps, **options)
    return watching


OPTIONS = dict(batch_size=8, clip=1.0, every=1000, progress=False)


def test_fifty_steps_on_a_gpu_wait_twice_and_nothing_is_sent_there():
    "Once in `train`, to see that the losses are numbers, and once in `fit`, to write them down."
    few = traffic_of_fit(100, generator=GpuGenerator(), **OPTIONS)
    many = traffic_of_fit(300, generator=GpuGenerator(), **OPTIONS)
    assert many.waits - few.waits == 4 * 2
    assert many.arrivals == few.arrivals


def test_a_step_of_a_unet_neither_waits_nor_is_sent_anything():
    network = UNet((3, 16, 16), width=8).to(GPU, memory_format=torch.channels_last)
    x0 = torch.zeros((4, 3, 16, 16), device=GPU)
    LOSS(network, x0)
    with Watching() as watching:
        LOSS(network, x0, generator=GpuGenerator()).backward()
    assert watching.waits == watching.arrivals == 0
    assert all(weight.grad.device == GPU for weight in network.parameters())


def test_every_draw_of_a_training_is_on_the_gpu():
    "Rows, mirrors, noise levels and noise: four draws in each step."
    draws = traffic_of_fit(20, generator=GpuGenerator(), **OPTIONS).draws
    assert draws == [(name, GPU) for name in ("randint", "rand", "randint", "randn")] * 20


def test_a_generator_on_the_cpu_draws_there_whatever_the_model_is_on():
    draws = traffic_of_fit(3, generator=torch.Generator().manual_seed(0), **OPTIONS).draws
    cpu = torch.device("cpu")
    assert draws == [(name, cpu) for name in ("multinomial", "rand", "randint", "randn")] * 3


def test_a_guard_whose_rows_have_weights_is_trained_without_waiting_either():
    loss = partial(label_loss, schedule=SCHEDULE)
    data = pictures(), torch.zeros((100, 8), device=GPU)

    def traffic(steps):
        model = MLPClassifier((3, 16, 16), 8, width=8, depth=1).to(GPU)
        loss(model, pixels(data[0][:1]), data[1][:1])
        with Watching() as watching:
            weights = torch.ones(100)
            steps_of_it = train(
                model, loss, data, steps, weights=weights, generator=GpuGenerator(), batch_size=8
            )
            run(steps_of_it, steps, progress=False)
        return watching

    few, many = traffic(100), traffic(300)
    assert many.waits - few.waits <= 4 * 2 and many.arrivals == few.arrivals
    expected = [(name, GPU) for name in ("multinomial", "rand", "randn")]
    assert many.draws == expected * 300


@pytest.mark.parametrize(
    "loss",
    [
        LOSS,
        flow_loss,
        mirrored(LOSS),
        lambda model, x0, generator: ambient_loss(
            model, x0, torch.ones_like(x0[:, :1]), SCHEDULE, generator=generator
        ),
    ],
    ids=["ddpm", "flow", "mirrored", "ambient"],
)
@pytest.mark.parametrize("of_gpu", [True, False])
def test_every_loss_draws_where_its_generator_lives(loss, of_gpu):
    generator = GpuGenerator() if of_gpu else torch.Generator()
    x0 = torch.zeros((4, 3, 16, 16), device=GPU)
    with Watching() as watching:
        value = loss(lambda x, t: x, x0, generator=generator)
    assert value.device == GPU and watching.waits == 0
    assert len(watching.draws) >= 2
    assert {device for _, device in watching.draws} == {generator.device}


def test_without_a_generator_numbers_are_drawn_where_they_are_wanted():
    assert randn((2, 3), device=GPU).device == rand((2,), device=GPU).device == GPU
    assert randint(5, 2, device=GPU).device == GPU


def test_whether_weights_are_finite_is_asked_once_for_all():
    network = UNet((3, 16, 16), width=8).to(GPU)
    with Watching() as watching:
        assert ddpm.has_finite_weights(network)
    assert watching.waits == 1


def test_a_schedule_goes_to_the_gpu_once():
    t = torch.zeros(4, dtype=torch.int64, device=GPU)
    schedule = make_schedule()
    with Watching() as watching:
        for _ in range(10):
            ddpm.add_noise(torch.zeros((4, 2), device=GPU), t, schedule)
    assert watching.arrivals == 1


def test_a_seed_becomes_a_generator_on_the_gpu_where_the_numbers_are_used_there(monkeypatch):
    places = []

    class Generator:
        def __init__(self, place):
            places.append(place)

        def manual_seed(self, seed):
            return seed

    monkeypatch.setattr(seeds, "Generator", Generator)
    for device in ("cpu", "cuda", torch.device("cuda:1"), "mps"):
        assert seeds.seeded_generator(3, device) == 3
    assert places == ["cpu", "cuda", torch.device("cuda:1"), "cpu"]


def test_the_walk_through_a_network_for_its_weights_is_not_made_at_every_step(monkeypatch):
    walks = []
    named_parameters = nn.Module.named_parameters

    def counted(self, *args, **options):
        walks.append(self)
        return named_parameters(self, *args, **options)

    def walks_of(steps):
        walks.clear()
        traffic_of_fit(steps, generator=GpuGenerator(), **OPTIONS)
        return len(walks)

    monkeypatch.setattr(nn.Module, "named_parameters", counted)
    assert walks_of(60) == walks_of(10) > 0


def test_the_average_with_kept_lists_is_the_average():
    networks = [seeded(0, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))) for _ in "ab"]
    model = seeded(1, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    average = SideBySide.of(networks[0], model)
    for n in (1, 2, 3):
        model(n + torch.randn(8, 3))
        nn.init.normal_(model[0].weight)
        average.update(n)
        update_ema(networks[1], model, n)
    for one, other in zip(networks[0].state_dict().values(), networks[1].state_dict().values()):
        assert torch.equal(one, other)
    assert networks[0][1].num_batches_tracked == 3


# What is read late must not do harm in the meantime.


@pytest.fixture
def read_late(monkeypatch):
    "Losses on the CPU are looked at when those on a GPU would be."
    is_time = ddpm._is_time_to_read

    def as_on_a_gpu(step, start, steps, device):
        return is_time(step, start, steps, GPU)

    monkeypatch.setattr(ddpm, "_is_time_to_read", as_on_a_gpu)


def spoiled_at(step, spoil):
    "A loss of digits that `spoil(loss, model)` changes, once, at a step."
    calls = []

    def loss(model, x0, generator=None):
        calls.append(x0)
        value = LOSS(model, x0, generator=generator)
        return spoil(value, model) if len(calls) == step else value

    return loss


def to_nan(value, model):
    return value * torch.nan


def gradient_to_nan(value, model):
    "The same number, but √0 has no derivative."
    return value + (0 * model.out.bias).sqrt().sum()


def fit_spoiled(path, step, spoil, **options):
    digits = load_digits()[0][:50]
    model = seeded(0, lambda: MLPDenoiser((1, 8, 8), 16))
    fit(model, spoiled_at(step, spoil), (digits,), 40, path=path, progress=False, **options)


def test_a_loss_that_is_read_late_never_gets_into_a_checkpoint(tmp_path, read_late):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FloatingPointError, match="nan at step 12: lower the learning rate"):
        fit_spoiled(path, 12, to_nan, every=5)
    assert len(load_file(path)["losses"]) == 10


def test_weights_that_are_not_finite_never_get_into_a_checkpoint(tmp_path):
    "The loss of step 10 was a number, its gradient was not, and nobody has seen the next loss."
    path = tmp_path / "c.safetensors"
    with pytest.raises(FloatingPointError, match="weights are NaN or infinite after step 10"):
        fit_spoiled(path, 10, gradient_to_nan, every=5)
    saved = load_file(path)
    assert len(saved["losses"]) == 5
    assert all(value.isfinite().all() for name, value in saved.items() if name.startswith("model"))


def test_without_checkpoints_the_step_is_named_just_as_well(read_late):
    with pytest.raises(FloatingPointError, match="nan at step 12: lower the learning rate"):
        fit_spoiled(None, 12, to_nan)


def test_weights_that_were_nan_before_the_first_step_are_said_to_be(read_late):
    model = MLPDenoiser((1, 8, 8), 16)
    nn.init.constant_(model.inp.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="before the first step"):
        next(train(model, LOSS, (load_digits()[0][:50],), 100))


def test_losses_read_late_are_the_losses(read_late):
    def losses(steps):
        model = seeded(0, lambda: MLPDenoiser((1, 8, 8), 16))
        return fit(model, LOSS, (load_digits()[0][:50],), steps, progress=False)[1]

    seventy = losses(70)
    assert len(seventy) == 70 and all(isinstance(loss, float) for loss in seventy)
    assert seventy[:2] == losses(70)[:2] and seventy[0] == pytest.approx(1, abs=0.1)


# A run goes on where it was begun.


def state_on(device, generator=None):
    "A training on a device, before its first step."
    return TrainingState.fresh(MLPDenoiser((2,), 8).to_empty(device=device), generator)


def test_a_checkpoint_holds_the_state_of_a_generator_on_the_gpu(tmp_path):
    path, generator = tmp_path / "c.safetensors", GpuGenerator()
    generator.state = torch.arange(16, 32, dtype=torch.uint8)
    options = OPTIONS | dict(path=path)
    data = (torch.zeros((8, 2), device=GPU),)
    with Watching():
        fit(MLPDenoiser((2,), 8).to(GPU), LOSS, data, 4, generator=generator, **options)
    assert load_file(path)["generator"].tolist() == list(range(16, 32))

    # Another process goes on from it.
    later = GpuGenerator()
    with Watching():
        fit(MLPDenoiser((2,), 8).to(GPU), LOSS, data, 4, generator=later, **options)
    assert later.state.tolist() == list(range(16, 32))


def test_a_run_that_was_begun_on_a_cpu_goes_on_drawing_there(tmp_path):
    path = tmp_path / "c.safetensors"
    of_cpu = state_on("cpu")
    torch.rand(5, generator=of_cpu.generator)
    save_checkpoint(path, of_cpu, {})
    expected = torch.rand(3, generator=of_cpu.generator)

    on_gpu = state_on(GPU, GpuGenerator())
    with Watching():
        load_checkpoint(path, on_gpu, {})
    assert on_gpu.generator.device.type == "cpu"
    assert torch.equal(torch.rand(3, generator=on_gpu.generator), expected)


def test_a_run_that_was_begun_on_a_gpu_is_not_taken_for_one_of_a_cpu(tmp_path):
    path = tmp_path / "c.safetensors"
    with Watching():
        save_checkpoint(path, state_on(GPU, GpuGenerator()), {})
    with pytest.raises(ValueError, match="begun with the random numbers of a GPU") as caught:
        load_checkpoint(path, state_on("cpu"), {})
    assert "\n" not in str(caught.value)


def test_several_processes_draw_on_the_cpu():
    "GPUs of two kinds deal out other numbers, and every process has to draw the same batch."

    class TwoProcesses:
        num_processes, is_main_process = 2, True

        def prepare(self, network):
            return network

    generator = GpuGenerator()
    generator.manual_seed(5)
    model = MLPDenoiser((3, 16, 16), 8).to(GPU)
    x = torch.zeros((8, 3, 16, 16), device=GPU)
    together = TwoProcesses()
    with pytest.MonkeyPatch.context() as patch, Watching() as watching:
        patch.setattr("cpsample.practice.training.Together", lambda network: network)
        fit(model, LOSS, (x,), 2, accelerator=together, generator=generator, progress=False)
    assert {device.type for _, device in watching.draws} == {"cpu"}


# On a CPU nothing has changed: the loop as it was before there was a GPU in it.


def loop_of_old(model, loss, x, steps, seed, *, clip, lr=1e-3, batch_size=256):
    "Every number drawn on the CPU, every loss read: the weights, their average and the losses."
    ema_model = seeded(0, lambda: type(model)(**model.config))
    ema_model.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    losses, chances = [], torch.ones(len(x))
    for step in range(steps):
        rows = torch.multinomial(chances, batch_size, replacement=True, generator=generator)
        value = loss(model, pixels(x[rows]), generator)
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.param_groups[0]["lr"] = ddpm._learning_rate(step, steps, lr, 100)
        optimizer.step()
        decay = min(0.999, (2 + step) / (11 + step))
        for average, weight in zip(ema_model.parameters(), model.parameters()):
            average.data.lerp_(weight.data, 1 - decay)
    return model.state_dict(), ema_model.state_dict(), losses


def loss_of_old(model, x0, generator):
    "The loss of mirrored images, with torch alone."
    is_mirrored = torch.rand(len(x0), generator=generator) < 0.5
    x0 = torch.where(is_mirrored[:, None, None, None], x0.flip(-1), x0)
    t = torch.randint(1000, (len(x0),), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    abar = SCHEDULE.abar[t][:, None, None, None]
    return (model(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t) - eps).square().mean()


@pytest.mark.parametrize("network", ["MLP", "U-Net"])
def test_training_on_a_cpu_ends_in_the_weights_of_old(network):
    "To the bit: weights, average and losses of 60 steps."
    if network == "MLP":
        x, build = load_digits()[0][:50], lambda: MLPDenoiser((1, 8, 8), 16)
    else:
        x, build = load_fashion(small=True)[0][:50], lambda: UNet((1, 28, 28), width=8)
    options = dict(batch_size=16, clip=1.0)
    expected = loop_of_old(seeded(0, build), loss_of_old, x, 60, 3, **options)

    model, generator = seeded(0, build), torch.Generator().manual_seed(3)
    ema_model, losses = fit(
        model, mirrored(LOSS), (x,), 60, generator=generator, progress=False, **options
    )
    assert losses == expected[2]
    for state, old in ((model.state_dict(), expected[0]), (ema_model.state_dict(), expected[1])):
        assert all(torch.equal(value, old[name]) for name, value in state.items())


# What torch.compile is given.


def test_a_unet_is_compiled_in_one_piece_and_once_for_all_levels():
    "No break in the graph, so that norms and activations can be fused; no other graph for other t."
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    network = UNet((3, 16, 16), width=8)
    compiled = torch.compile(network, backend=count, fullgraph=True)
    for t in (torch.tensor([3, 500]), torch.tensor([999, 0])):
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(compiled(x, t), network(x, t))
    assert len(graphs) == 1


# The ratio of `make bench`: the two loops have to do the same work, or it says nothing.


def test_the_plain_loop_of_the_bench_draws_what_ours_draws_and_waits_for_nothing(
    bench, monkeypatch
):
    x0 = torch.zeros((20, 3, 16, 16), dtype=torch.uint8, device=GPU)
    monkeypatch.setattr(bench, "half_precision", lambda loss, device: loss)
    monkeypatch.setattr(bench.torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    watched = {}
    for loop in (bench.plain_gpu_steps, bench.our_gpu_steps):
        network = MLPDenoiser((3, 16, 16), 8, depth=1).to(GPU)
        monkeypatch.setattr(TrainingState, "position", dict(start=0, generator=GpuGenerator()))
        job = loop(network, network, x0, 4)
        with Watching():
            job()
        with Watching() as watched[loop]:
            job()
    plain, ours = watched[bench.plain_gpu_steps], watched[bench.our_gpu_steps]
    assert plain.waits == 0 and ours.waits == 2
    assert plain.draws == ours.draws and len(ours.draws) == 3 * 50
    assert plain.arrivals == ours.arrivals == 0


def test_both_loops_of_the_bench_train(bench, monkeypatch):
    monkeypatch.setattr(bench, "GPU_STEPS", 3)
    x0 = load_fashion(small=True)[0][:20]
    for loop in (bench.plain_gpu_steps, bench.our_gpu_steps):
        network = UNet((1, 28, 28), width=8)
        before = [weight.detach().clone() for weight in network.parameters()]
        loop(network, network, x0, 4)()
        changed = [not torch.equal(a, b) for a, b in zip(before, network.parameters())]
        assert sum(changed) > len(changed) / 2
