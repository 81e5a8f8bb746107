"Whole numbers are whole numbers, whoever wrote them; anything else is refused by its name."

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from cpsample.core.calibration import calibrate
from cpsample.core.ddpm import generate, timesteps
from cpsample.core.guard import Guard, fit_guard
from cpsample.core.images import load_digits, split
from cpsample.workshop.seeds import checked_seed, seeded_generator, whole_number

DIGITS = load_digits()[0]
KINDS = [np.int64, np.int32, np.uint8, torch.tensor]


@given_settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(-(2**63), 2**64 - 1))
def test_a_seed_of_64_bits_seeds_as_torch_does(seed):
    assert checked_seed(seed) == seed
    assert (
        seeded_generator(seed).initial_seed() == torch.Generator().manual_seed(seed).initial_seed()
    )


@pytest.mark.parametrize(
    "wrong", [2.5, "3", None, 2**64, 2**70, -(2**63) - 1, torch.ones(2).long()]
)
def test_anything_else_is_one_line_that_names_the_seed(wrong):
    with pytest.raises(ValueError, match="^seed must be .*between") as caught:
        seeded_generator(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_counts_of_numpy_and_torch_are_the_numbers_that_they_are(kind, network, schedule):
    def drawn(convert):
        counts = dict(steps=convert(4), chunk=convert(2), seed=convert(3))
        return generate(network, schedule, (1, 8, 8), convert(3), **counts)

    assert torch.equal(drawn(kind), drawn(int))
    rows = split(DIGITS[:20], {"a": 5, "b": None}, kind(3)).indices
    assert rows == split(DIGITS[:20], {"a": 5, "b": None}, 3).indices


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_remembers_its_seed_as_a_number(kind, schedule):
    guards = [fit_guard(DIGITS[:8], schedule, steps=2, width=8, seed=s) for s in (kind(3), 3)]
    assert type(guards[0].made["seed"]) is int
    for ours, truth in zip(*(guard.classifier.parameters() for guard in guards)):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"chunk": -1}, "chunk must be at least 1, got -1"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": 1.5}, "chunk must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number, between 2 and 1000, got 2.5"),
        ({"steps": None}, "steps must be a whole number"),
        ({"seed": 2**64}, "seed must be between"),
        ({"n": 2.0}, "the number of images must be a whole number"),
        ({"n": 0}, "the number of images must be at least 1, got 0"),
    ],
)
def test_generate_refuses_numbers_with_which_it_cannot_work(options, says, network, schedule):
    with pytest.raises(ValueError, match=f"^{says}"):
        generate(network, schedule, (1, 8, 8), **{"n": 2, "steps": 2} | options)


def test_a_list_of_levels_is_a_number_of_steps_too(network, schedule, capsys):
    levels = [999, 500, 0]
    x = generate(network, schedule, (1, 8, 8), 4, steps=levels, chunk=2, progress=True)
    assert x.shape == (4, 1, 8, 8)
    assert "6/6" in capsys.readouterr().err
    assert timesteps(1000, np.int64(50)) == timesteps(1000, 50)


@pytest.mark.parametrize("options", [{"steps": 2.5}, {"seed": 2**64}, {"K": 1.5}, {"steps": 0}])
def test_a_guard_is_refused_before_it_is_trained(options, schedule):
    with pytest.raises(ValueError, match="^(steps|seed|K) must be"):
        fit_guard(DIGITS[:8], schedule, **{"width": 8} | options)


def test_held_out_images_of_another_shape_are_refused_in_one_line(schedule):
    guard = Guard(lambda x, t: 0 * x.flatten(1)[:, :1], schedule, alpha=0.1, scale=1.0, t_max=100)
    words = r"held-out images are \(1, 4, 4\), training images \(1, 8, 8\)"
    with pytest.raises(ValueError, match=words):
        calibrate(guard, DIGITS[:8], DIGITS[8:20, :, :4, :4])


def test_a_whole_number_is_at_least_what_it_has_to_be():
    assert whole_number(np.int16(4), "n", 1, most=4) == 4
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"^n must be between 1 and 4, got {number}$"):
            whole_number(number, "n", 1, most=4)
