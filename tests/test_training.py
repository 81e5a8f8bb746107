"Training: reproducible, weighted as asked, and polite to everybody else's random numbers."

from functools import partial

import pytest
import torch

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
from cpsample.practice.training import update_ema

X = load_digits()[0][:50]


def test_same_seed_same_weights(schedule):
    a, b, c = (fit_denoiser(X, schedule, 20, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_seeded_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seeded(5, lambda: torch.rand(100))
    assert torch.equal(torch.rand(3), expected)


def test_weights_decide_how_often_a_row_is_drawn(generator):
    "Members and reference images, ten of one and forty of the other, are drawn equally often."
    seen = []

    def loss(model, x, targets, generator):
        seen.append((targets == 0.5).all(1))
        return model.weight.sum()

    x, targets, weights = with_reference(X[:10], random_labels(10, 2), X[10:])
    run(
        train(torch.nn.Linear(1, 1), loss, (x, targets), 100, weights=weights, generator=generator),
        100,
        progress=False,
    )
    share = torch.cat(seen).float().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / (100 * 256) ** 0.5


def test_training_yields_one_record_per_step_and_can_be_left(schedule):
    records = train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=schedule), (X,), 1000)
    assert [next(records).step for _ in range(3)] == [1, 2, 3] and next(records).loss > 0


def test_loss_falls(schedule, generator):
    losses = run(
        train(
            seeded(0, lambda: MLPDenoiser((1, 8, 8), 64)),
            partial(ddpm_loss, schedule=schedule),
            (X,),
            300,
            generator=generator,
        ),
        300,
        progress=False,
    )
    assert len(losses) == 300 and sum(losses[:10]) / 10 > 0.8 and sum(losses[-50:]) / 50 < 0.65


@pytest.mark.parametrize("T, steps", [(1000, 100), (1000, 1000), (10, 2), (1000, 7)])
def test_timesteps_include_both_ends(T, steps):
    levels = timesteps(T, steps)
    assert (
        len(levels) == steps
        and levels[0] == T - 1
        and levels[-1] == 0
        and timesteps(T, levels) == levels
    )


@pytest.mark.parametrize("chunk, portions", [(None, [7]), (3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_draw_gives_so_many_images_in_portions_from_one_stream_of_noise(
    schedule, chunk, portions, capsys
):
    model, generator = (
        seeded(0, lambda: MLPDenoiser((1, 8, 8), width=16)),
        torch.Generator().manual_seed(3),
    )
    expected = torch.cat(
        [
            final_sample(sample(model, schedule, (k, 1, 8, 8), 5, clip=1, generator=generator))
            for k in portions
        ]
    )
    assert torch.equal(
        generate(model, schedule, (1, 8, 8), 7, 5, seed=3, chunk=chunk, progress=True), expected
    )
    assert f"{5 * len(portions)}/{5 * len(portions)}" in capsys.readouterr().err


def test_labels_follow_the_index_and_repeats_share_them():
    assert torch.equal(random_labels(50, 8, 3)[:20], random_labels(20, 8, 3))
    doubled, rows = plant_duplicates(X, 7, copies=2)
    labels = member_labels(doubled, 8, 3)
    assert (
        torch.equal(first_occurrence(doubled)[50:57], rows)
        and torch.equal(labels[50:57], labels[rows])
        and torch.equal(labels[:50], random_labels(50, 8, 3))
    )


def test_split_is_disjoint_complete_and_bound_to_the_data():
    a, b = (split(X, {"a": 20, "b": None}, seed=4) for _ in range(2))
    assert (
        a == b
        and sorted(a.indices["a"] + a.indices["b"]) == list(range(50))
        and a != split(X, {"a": 20, "b": None}, seed=5)
    )
    assert torch.equal(a.of(X, "a"), X[a.indices["a"]])


def test_the_average_warms_up_and_then_forgets_slowly():
    "After step n the average moves by 1 − min(β, (1+n)/(10+n)) of the way: nine tenths at first, a thousandth in the end."
    for n, share in ((0, 0.9), (1, 9 / 11), (90, 0.09), (10**6, 0.001)):
        slow, fast = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        before = slow.weight.detach().clone()
        update_ema(slow, fast, n)
        torch.testing.assert_close(slow.weight, before + share * (fast.weight - before))
