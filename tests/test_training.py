"Training: reproducible, weighted as asked, and polite to everybody else's random numbers."

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

from cpsample.core.classifier import member_labels, random_labels, with_reference
from cpsample.core.ddpm import (
    MLPDenoiser,
    ddpm_loss,
    final_sample,
    generate,
    run,
    sample,
    seeded,
    timesteps,
    train,
)
from cpsample.core.demo import fit_denoiser
from cpsample.core.images import first_occurrence, load_digits, plant_duplicates, split
from cpsample.core.schedule import row_generators
from cpsample.practice.training import run_identity, update_ema

X = load_digits()[0][:50]


def small_denoiser(width=16):
    return seeded(0, lambda: MLPDenoiser((1, 8, 8), width))


def test_same_seed_same_weights(schedule):
    a, b, c = (fit_denoiser(X, schedule, 20, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_seeded_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seeded(5, lambda: torch.rand(100))
    assert torch.equal(torch.rand(3), expected)


def test_weights_decide_how_often_a_row_is_drawn(generator):
    "Members and reference images, ten of one and forty of the other, are drawn equally often."
    is_reference = []

    def loss(model, x, targets, generator):
        is_reference.append((targets == 0.5).all(1))
        return model.weight.sum()

    x, targets, weights = with_reference(X[:10], random_labels(10, 2), X[10:])
    training = train(nn.Linear(1, 1), loss, (x, targets), 100, weights=weights, generator=generator)
    run(training, 100, progress=False)
    share = torch.cat(is_reference).float().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / (100 * 256) ** 0.5


def test_training_yields_one_record_per_step_and_can_be_left(schedule):
    records = train(small_denoiser(), partial(ddpm_loss, schedule=schedule), (X,), 1000)
    assert [next(records).step for _ in range(3)] == [1, 2, 3]
    assert next(records).loss > 0


def test_loss_falls(schedule, generator):
    loss = partial(ddpm_loss, schedule=schedule)
    training = train(small_denoiser(width=64), loss, (X,), 300, generator=generator)
    losses = run(training, 300, progress=False)
    assert len(losses) == 300
    assert sum(losses[:10]) / 10 > 0.8
    assert sum(losses[-50:]) / 50 < 0.65


@pytest.mark.parametrize("T, steps", [(1000, 100), (1000, 1000), (10, 2), (1000, 7)])
def test_timesteps_include_both_ends(T, steps):
    levels = timesteps(T, steps)
    assert len(levels) == steps and levels[0] == T - 1 and levels[-1] == 0
    assert timesteps(T, levels) == levels


@pytest.mark.parametrize("chunk, portions", [(None, [7]), (3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_generate_gives_so_many_images_in_portions_each_from_its_own_noise(
    schedule, chunk, portions, capsys
):
    model, rows, expected = small_denoiser(), iter(range(7)), []
    for n in portions:
        noise = row_generators(3, list(islice(rows, n)), [0] * n)
        steps = sample(model, schedule, (n, 1, 8, 8), steps=5, clip=1, generator=noise)
        expected.append(final_sample(steps))

    images = generate(model, schedule, (1, 8, 8), 7, steps=5, seed=3, chunk=chunk, progress=True)
    assert torch.equal(images, torch.cat(expected))
    calls = 5 * len(portions)
    assert f"{calls}/{calls}" in capsys.readouterr().err


def test_labels_follow_the_index_and_repeats_share_them():
    assert torch.equal(random_labels(50, 8, 3)[:20], random_labels(20, 8, 3))
    doubled, rows = plant_duplicates(X, 7, copies=2)
    labels = member_labels(doubled, 8, 3)
    assert torch.equal(first_occurrence(doubled)[50:57], rows)
    assert torch.equal(labels[50:57], labels[rows])
    assert torch.equal(labels[:50], random_labels(50, 8, 3))


def test_split_is_disjoint_complete_and_bound_to_the_data():
    a, b = (split(X, {"a": 20, "b": None}, seed=4) for _ in range(2))
    assert a == b and a != split(X, {"a": 20, "b": None}, seed=5)
    assert sorted(a.indices["a"] + a.indices["b"]) == list(range(50))
    assert torch.equal(a.of(X, "a"), X[a.indices["a"]])


def test_the_average_warms_up_and_then_forgets_slowly():
    """After step n the average moves by 1 − min(β, (1+n)/(10+n)) of the way.

    That is nine tenths at first, a thousandth in the end.
    """
    for n, share in ((0, 0.9), (1, 9 / 11), (90, 0.09), (10**6, 0.001)):
        ema_layer, layer = nn.Linear(3, 2), nn.Linear(3, 2)
        before = ema_layer.weight.detach().clone()
        update_ema(ema_layer, layer, n)
        expected = before + share * (layer.weight - before)
        torch.testing.assert_close(ema_layer.weight, expected)


def test_the_average_has_the_running_statistics_of_the_network():
    "Buffers are copied: also whole numbers, such as the count of batches, which have no middle."
    network, ema_network = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for n in (1, 2, 3):
        network(n + torch.randn(8, 3, 4, 4))
        nn.init.normal_(network.weight)
        update_ema(ema_network, network, n)

    buffers = dict(network.named_buffers())
    assert buffers.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    for name, buffer in ema_network.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert ema_network.num_batches_tracked == 3 and ema_network.running_mean.abs().min() > 0.1
    assert not torch.equal(ema_network.weight, network.weight)


def test_the_average_of_a_network_with_buffers_answers_like_it_after_long_training():
    "In evaluation mode a BatchNorm with stale statistics would answer as if untrained."
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).train()
    ema_network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).train()
    for n in range(200):
        network(5 + 3 * torch.randn(64, 2))
        update_ema(ema_network, network, n, beta=0.9)
    x = 5 + 3 * torch.randn(10, 2)
    torch.testing.assert_close(ema_network.eval()(x), network.eval()(x), atol=1e-4, rtol=1e-4)


def test_whatever_decides_a_run_changes_its_identity():
    def identity(width=8, data=X, seed=0, steps=10, **options):
        generator = torch.Generator().manual_seed(seed)
        network = MLPDenoiser((1, 8, 8), width)
        return run_identity(network, (data,), generator, steps=steps, beta=0.9, **options)

    assert identity() == identity() and identity(weights=X) == identity()
    changes = dict(width=4), dict(data=X[:9]), dict(seed=1), dict(steps=11), dict(lr=1e-4)
    for change in changes:
        assert identity(**change) != identity(), change


def test_an_identity_has_the_names_and_the_order_of_version_0_1():
    network, generator = MLPDenoiser((1, 8, 8), 8), torch.Generator().manual_seed(5)
    identity = run_identity(network, (X,), generator, steps=3, beta=0.9, lr=1e-3, clip=1.0)
    assert list(identity) == "network options steps beta seed data lr clip".split()
