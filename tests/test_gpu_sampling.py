"What sampling, judging and a guard ask of a GPU, seen without one."

import contextlib
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from gpu_without_one import GPU, GpuGenerator, Watching
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from cpsample import cli
from cpsample.core import ddpm, recognition
from cpsample.core.ddpm import MLPDenoiser, generate, seeded
from cpsample.core.guard import Guard, correct_at_x_t
from cpsample.core.predicted import correct_at_x0
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule, row_generators
from cpsample.practice import runs
from cpsample.practice.encoders import features
from cpsample.practice.unet import UNet
from cpsample.production import degrees
from cpsample.production.cifar10 import CIFAR10
from cpsample.production.experiments import plan_table
from cpsample.workshop import gpu, neighbours
from cpsample.workshop.gpu import (
    FixedBatches,
    HalfPrecision,
    asked,
    for_sampling,
    gpu_in_words,
    in_all_digits,
    in_batch_of,
    one_ahead,
)
from cpsample.workshop.neighbours import nearest, nearest_groups, work_device, working_on
from cpsample.workshop.registry import feature_spaces

SCHEDULE = make_schedule()
SHAPE = (3, 16, 16)


def small_unet(device="cpu"):
    "A U-Net that predicts something, in evaluation mode."
    network = seeded(0, lambda: UNet(SHAPE, width=8))
    nn.init.normal_(network.out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return network.eval().requires_grad_(False).to(device)


def noisy(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


# Sampling waits for nothing but its end.


def traffic_of_sampling(steps, rows=6, chunk=6):
    "So many images, drawn on the GPU and watched."
    model = MLPDenoiser(SHAPE, 8, depth=1).to(GPU)
    with Watching() as watching:
        generate(model, SCHEDULE, SHAPE, rows, steps=steps, chunk=chunk, device=GPU)
    return watching


def test_fifty_steps_wait_no_more_often_than_ten():
    "Twice: to see that the images are numbers, and to fetch them."
    few, many = traffic_of_sampling(10), traffic_of_sampling(50)
    assert few.waits == many.waits == 2


def test_noise_is_sent_for_sixteen_steps_at_once():
    "The noise that 50 steps begin from, and 49 times fresh noise in four portions."
    assert traffic_of_sampling(50).arrivals == 1 + 4
    assert traffic_of_sampling(17).arrivals == 1 + 1
    assert traffic_of_sampling(50, rows=12).arrivals == 2 * (1 + 4)


def test_every_draw_of_a_sampling_is_on_the_cpu_so_that_a_seed_is_an_image_everywhere():
    "Each row draws its first noise, and that of 49 steps in four portions."
    draws = traffic_of_sampling(50, rows=6).draws
    assert draws == [("normal_", torch.device("cpu"))] * 6 * (1 + 4)


def test_noise_ahead_of_time_is_the_same_noise(monkeypatch):
    "Drawn by another thread, into memory that a GPU can fetch from without stopping."

    def noise_of_walk(rows=5):
        generators = row_generators(3, range(rows), [0] * rows)
        return list(ddpm._noise_of_walk((rows, 2), generators, 40, device="cpu"))

    plain, pinned = noise_of_walk(), []

    def pin_memory(tensor):
        pinned.append(threading.get_ident())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(ddpm, "is_gpu", lambda device: True)
    ahead = noise_of_walk()
    assert len(pinned) == 3 and threading.get_ident() not in pinned
    assert len(plain) == len(ahead) == 40
    assert all(torch.equal(one, other) for one, other in zip(plain, ahead))
    assert all(len(noise) == 0 for noise in noise_of_walk(rows=0))


def test_rows_with_generators_on_a_gpu_draw_there(monkeypatch):
    "And nothing of it passes through a thread."
    monkeypatch.setattr(ddpm, "is_gpu", lambda device: True)
    monkeypatch.setattr(ddpm, "sent_ahead", lambda *_: pytest.fail("it need not be sent"))
    noises = ddpm._noise_of_walk((2, 3), [GpuGenerator(), GpuGenerator()], 20, device=GPU)
    assert [noise.device for noise in noises] == [GPU] * 20


def test_a_device_may_be_left_to_torch():
    generators = row_generators(3, range(2), [0] * 2)
    noises = list(ddpm._noise_of_walk((2, 3), generators, 20, device=None))
    assert len(noises) == 20 and noises[5].device.type == "cpu"


def test_what_is_made_ahead_fails_where_it_would_have_come():
    def broken():
        yield 1
        raise OSError("the disk is full")

    items = one_ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is full"):
        next(items)
    assert list(one_ahead([])) == []


def test_what_is_made_ahead_may_be_left_before_its_end():
    "As a sampler is whose consumer has seen enough; nothing hangs, and at most one is in vain."
    made = []
    for item in one_ahead(made.append(n) or n for n in range(100)):
        if item == 3:
            break
    assert len(made) <= 5


# Batches of one size.


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), extra=st.integers(0, 7))
def test_a_batch_that_is_filled_up_has_the_answers_and_gradients_of_its_rows(n, extra):
    network, t = small_unet(), torch.arange(n) * 100
    x, filled = noisy(n).requires_grad_(), noisy(n).requires_grad_()
    answer = network(x, t)
    answer_filled = in_batch_of(n + extra, network, filled, t)
    torch.testing.assert_close(answer_filled, answer, atol=1e-5, rtol=1e-5)
    answer.square().sum().backward()
    answer_filled.square().sum().backward()
    torch.testing.assert_close(filled.grad, x.grad, atol=1e-4, rtol=1e-4)


def test_a_batch_of_no_rows_is_not_filled_up():
    sizes = []
    in_batch_of(8, lambda x, t: sizes.append(len(x)) or x, noisy(0), torch.zeros(0))
    assert sizes == [0]


class Noted(nn.Module):
    "x + 1, and how large the batches were."

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, t):
        self.sizes.append(len(x))
        return x + 1


def test_what_is_compiled_sees_one_size_and_no_answer_changes_later():
    sizes, memory = [], torch.zeros(8, *SHAPE)

    def compiled(x, t):
        "It writes every answer to the same place, as a CUDA graph does."
        sizes.append(len(x))
        return torch.add(x, 1, out=memory[: len(x)])

    plain = Noted()
    fixed, t = FixedBatches(plain, compiled), torch.zeros(8)
    answers = {n: fixed(noisy(n, seed=n), t[:n]) for n in (8, 3, 7, 2, 1)}
    assert sizes == [8, 8, 8] and plain.sizes == [2, 1]  # a quarter is asked as it is
    for n, answer in answers.items():
        assert torch.equal(answer, noisy(n, seed=n) + 1)


# A guard where kernels are tuned.

CORRECT = {"x_t": correct_at_x_t, "x0": correct_at_x0}


def guard_of(at, sizes):
    "A guard that is certain of about half of what it sees, and notes how much that is."
    direction = torch.randn(3 * 16 * 16, 1, generator=torch.Generator().manual_seed(7))

    def classifier(x, t):
        sizes.append(len(x))
        return 0.05 * x.flatten(1) @ direction

    return Guard(classifier, SCHEDULE, alpha=0.32, scale=1.0, t_max=1000, at=at)


@pytest.mark.parametrize("at", ["x_t", "x0"])
def test_where_kernels_are_tuned_a_guard_is_asked_in_powers_of_two_and_changes_the_same(
    at, monkeypatch
):
    x, t = noisy(11), torch.full((11,), 50)
    plain_sizes, tuned_sizes = [], []
    plain = CORRECT[at](guard_of(at, plain_sizes), x, t, noisy(11, seed=1))
    monkeypatch.setattr(gpu, "tunes_kernels", lambda device: True)
    tuned = CORRECT[at](guard_of(at, tuned_sizes), x, t, noisy(11, seed=1))

    assert len(plain.rows) in (3, 5, 6, 7, 9, 10) and torch.equal(plain.rows, tuned.rows)
    torch.testing.assert_close(tuned.delta_eps, plain.delta_eps, atol=1e-4, rtol=1e-4)
    assert any(size & (size - 1) for size in plain_sizes)
    assert not any(size & (size - 1) for size in tuned_sizes)


def test_kernels_are_tuned_on_a_gpu_that_was_told_to(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert gpu.tunes_kernels(torch.device("cuda")) and not gpu.tunes_kernels(torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert not gpu.tunes_kernels(torch.device("cuda"))


def test_elsewhere_a_guard_is_asked_about_the_very_tensors():
    seen, x, t = [], noisy(3), torch.zeros(3)
    asked(lambda x, t: seen.append((x, t)), x, t)
    assert seen[0][0] is x and seen[0][1] is t


# What draws many images.


def test_on_a_cpu_the_network_stays_as_it_is():
    network = small_unet()
    assert for_sampling(network, "cpu", mode="default") is network
    assert gpu_in_words("cpu") == {}


@pytest.fixture
def meta_is_a_gpu(monkeypatch):
    "The device `meta` passes for a GPU that has bfloat16 and compiles; returns what is compiled."
    compiled = []

    def compile_(network, **options):
        compiled.append(options)
        return network

    monkeypatch.setattr(gpu, "is_gpu", lambda device: torch.device(device) == GPU)
    monkeypatch.setattr(gpu, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(gpu, "can_compile", lambda device: True)
    monkeypatch.setattr(gpu.torch, "compile", compile_)
    return compiled


def test_on_a_gpu_it_is_compiled_filled_up_and_in_bfloat16(meta_is_a_gpu, monkeypatch):
    network = small_unet()
    fast = for_sampling(network, GPU, mode="reduce-overhead")
    assert isinstance(fast, HalfPrecision) and isinstance(fast.network, FixedBatches)
    assert meta_is_a_gpu == [{"mode": "reduce-overhead", "dynamic": False}]
    assert network.out.weight.is_contiguous(memory_format=torch.channels_last)
    assert {weight.device for weight in fast.parameters()} == {GPU}
    assert in_all_digits(fast) is network and fast.config == network.config
    assert gpu_in_words(GPU) == {"sampling": "bfloat16, compiled"}

    # Without a mode in bfloat16 alone, and where that is slow not even that.
    assert isinstance(for_sampling(small_unet(), GPU).network, UNet) and len(meta_is_a_gpu) == 1
    monkeypatch.setattr(gpu, "has_bfloat16", lambda device: False)
    assert isinstance(for_sampling(small_unet(), GPU), UNet)


def test_it_is_compiled_for_its_largest_batch_at_once(meta_is_a_gpu, monkeypatch):
    "So that the first arm that is timed does not pay for all."
    monkeypatch.setattr(gpu, "has_bfloat16", lambda device: False)  # torch has no autocast for meta
    fast = for_sampling(small_unet(), GPU, mode="default", batch=(8, *SHAPE))
    assert isinstance(fast, FixedBatches) and fast.size == 8


def test_where_torch_cannot_compile_it_says_so_and_draws(meta_is_a_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "can_compile", lambda device: False)
    with pytest.warns(UserWarning, match="cannot compile for meta"):
        fast = for_sampling(small_unet(), GPU, mode="default")
    assert isinstance(fast.network, UNet) and meta_is_a_gpu == []
    assert gpu_in_words(GPU) == {"sampling": "bfloat16, not compiled"}


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_protected_model_is_refused_since_it_would_hide_its_guard(meta_is_a_gpu, device):
    guarded = protect(small_unet(), guard_of("x_t", []))
    with pytest.raises(ValueError, match="protect, or give conditions to, what it returns"):
        for_sampling(guarded, device, mode="default")


def test_a_model_behind_it_is_protected_as_ever(meta_is_a_gpu):
    guarded = protect(for_sampling(small_unet(), GPU, mode="default"), guard_of("x_t", []))
    assert tuple(guarded.config["shape"]) == SHAPE and guarded.schedule is guarded.guard.schedule
    with pytest.raises(ValueError, match="another noise schedule"):
        generate(guarded, make_schedule("cosine"), SHAPE, 2, steps=3)


def test_the_last_word_of_a_run_is_asked_in_all_digits(meta_is_a_gpu, monkeypatch):
    "Calibration has measured what it recognises with these."
    network, asked_about = small_unet(), []
    guard = guard_of("x_t", [])
    guard.recognition = {}
    model = protect(for_sampling(network, GPU, mode="default"), guard)
    run = runs.ProtectedRun(model, SCHEDULE, SHAPE, guard, "cpu")
    monkeypatch.setattr(
        recognition, "unrecognised_by", lambda guard, model: asked_about.append(model)
    )
    cli.last_word(run, no_check=False)
    assert asked_about == [network]


def test_all_arms_of_a_degree_draw_with_one_compiled_model(monkeypatch):
    compiled, drawn = [], []
    arms = ("unguarded", "guarded", "spell")

    class Run:
        experiment = degrees.SIZES["tiny"]

        class ledger:
            answers = {f"low {arms[1]}": {}, "low held_out": {}}

            @staticmethod
            def step(*_):
                pass

        @staticmethod
        def drawing_model(degree):
            compiled.append(degree)
            return f"a model of {degree}"

    monkeypatch.setattr(degrees, "arms_of", lambda e: dict.fromkeys(arms))
    monkeypatch.setattr(degrees, "_measure_arm", lambda run, *what: drawn.append(what))
    degrees.measure_arms(Run, "low")
    model = "a model of low"
    assert drawn == [("low", "unguarded", model), ("low", "spell", model)]
    assert compiled == ["low"]


# Where images are searched and encoded.


@pytest.fixture
def with_a_gpu(monkeypatch):
    "A machine with a GPU of 1,000 free bytes, of which torch keeps 200 for itself."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (800, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 300)


@pytest.mark.parametrize("asked_for", [None, "cuda"])
def test_images_on_a_cpu_are_worked_on_by_the_gpu_if_they_fit(with_a_gpu, asked_for):
    x = torch.zeros(2, 3)
    with working_on(asked_for) if asked_for else contextlib.nullcontext():
        assert work_device(x).type == "cuda"
        assert work_device(x, needs=500).type == "cuda" and work_device(x, needs=501).type == "cpu"
        assert work_device(x, work=1e6).type == "cpu" and work_device(x, work=1e12).type == "cuda"
        assert work_device(x.to(GPU), needs=501) == GPU


def test_a_gpu_that_cannot_be_asked_is_left_alone(with_a_gpu, monkeypatch):
    "In a fork of a process that uses it, say."

    def broken():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert work_device(torch.zeros(2), needs=1).type == "cpu"


def test_who_asks_for_a_cpu_gets_it_until_the_end_whatever_happens(with_a_gpu):
    x = torch.zeros(2, 3)
    with pytest.raises(OSError), working_on("cpu"):
        with working_on("meta"):
            assert work_device(x) == GPU
        assert work_device(x).type == "cpu"
        raise OSError
    assert work_device(x).type == "cuda"


def test_a_command_on_the_cpu_searches_there(with_a_gpu, monkeypatch, tmp_path):
    "`--device cpu`, of every command that has it; and nothing of it is left for the next."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = []

    def load(*_, **__):
        seen.append(work_device(torch.zeros(2)).type)
        raise ValueError("enough")

    monkeypatch.setattr(runs, "load_protected_run", load)
    monkeypatch.setattr(runs, "members_of", load)
    for command in ("sample", "attack", "audit"):
        folder = tmp_path / command
        folder.mkdir()
        (folder / "run.json").write_text("{}")
        for device in ("cpu", "cuda"):
            result = CliRunner().invoke(cli.app, [command, str(folder), "--device", device])
            assert "enough" in result.output
    assert seen == ["cpu", "cuda"] * 3 and work_device(torch.zeros(2)).type == "cuda"


@pytest.mark.parametrize("space", [space for space in feature_spaces if space[-1].isdigit()])
def test_an_experiment_in_any_space_has_a_plan(space):
    e = replace(CIFAR10["colab"], space=space)
    assert plan_table(e).count("\n") > 8


def test_neighbours_are_searched_there_and_the_answer_comes_back(monkeypatch):
    places = []

    def search_on(refs, k, flips, chunk):
        def search(part):
            places.append((refs.device, part.device))
            return torch.zeros(len(part), k), torch.zeros(len(part), k, dtype=torch.int64)

        return search

    monkeypatch.setitem(neighbours.SEARCH, "torch", search_on)
    monkeypatch.setattr(neighbours, "_check_squares", lambda x, name: None)
    x, refs = torch.rand(5, 4), torch.rand(9, 4)
    with working_on(GPU):
        distances, rows = nearest(x, refs, 2, chunk=2)
    assert places == [(GPU, GPU)] * 3
    assert distances.shape == rows.shape == (5, 2)
    assert distances.device.type == rows.device.type == "cpu"


def test_features_are_computed_there_and_come_back(monkeypatch):
    places = []

    def encode(x):
        places.append(x.device)
        return x.flatten(1)[:, :4]

    monkeypatch.setitem(feature_spaces.added, "first-four-4", encode)
    with working_on(GPU), Watching():
        f = features(2 * torch.rand(5, 1, 4, 4) - 1, "first-four-4", chunk=3)
    assert places == [GPU, GPU] and f.device.type == "cpu" and f.shape == (5, 4)


def test_groups_are_sent_there_once(monkeypatch):
    x, refs = torch.rand(20, 4), torch.rand(30, 4).repeat(2, 1)
    groups, sent = torch.arange(30).repeat(2), []
    direct = torch.cdist(x, refs[:30]).sort(1)

    def place_of_search(x, refs, backend):
        sent.append(refs.device)
        return refs.device

    monkeypatch.setattr(neighbours, "_place_of_search", place_of_search)
    distances, rows = nearest_groups(x, refs, groups, k=3)
    torch.testing.assert_close(distances, direct.values[:, :3])
    assert torch.equal(rows % 30, direct.indices[:, :3])
    assert len(sent) >= 2 and neighbours.work_device(x, work=0) == x.device


# The rows of `make bench`: what is compared has to be the same work.


def test_the_benchs_guards_are_never_certain_always_and_now_and_then(bench):
    guards = bench.guards_for_bench(SHAPE, "cpu")
    x, t = noisy(64), torch.full((64,), 100)
    corrections = {name: correct_at_x_t(guard, x, t, x) for name, guard in guards.items()}
    assert corrections["never"] is None
    assert len(corrections["always"].rows) == 64
    assert 0 < len(corrections["some"].rows) < 64


def test_the_jobs_of_the_bench_draw_the_same_images(bench, monkeypatch):
    monkeypatch.setattr(bench, "GPU_IMAGES", 3)
    monkeypatch.setattr(bench, "GPU_SAMPLE_STEPS", 4)
    monkeypatch.setattr(bench, "generate", partial(generate, seed=5))
    network = small_unet()
    jobs = bench.gpu_sampling_jobs(network, "cpu")
    drawn = {name: job() for name, job in jobs.items() if name != "network"}
    assert list(jobs) == ["fast", "float32", "graphs", "network"]
    assert all(torch.equal(x, drawn["float32"]) for x in drawn.values())
    assert jobs["network"]() == 4
