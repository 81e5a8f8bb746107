"Each image has noise of its own, and what a judge refuses is drawn anew."

import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cpsample
from cpsample.core.copying import copy_test
from cpsample.core.ddpm import (
    LeftoverWarning,
    MLPDenoiser,
    _noise_of_walk,
    draw_accepted,
    final_sample,
    for_rows,
    generate,
    sample,
    seeded,
)
from cpsample.core.densities import exact_denoiser, round_mixture
from cpsample.core.guard import Guard
from cpsample.core.images import load_digits
from cpsample.core.protection import protect
from cpsample.core.recognition import calibrate_check, recognise
from cpsample.core.schedule import MOST_TRIES, make_schedule, randn, row_generators, row_seeds

SCHEDULE = make_schedule()
DIGITS, _ = load_digits()
STEPS, SHAPE, N, TRIES = 20, (3, 2), 6, 4


def by_pixel(x_t, t):
    "A denoiser whose rows and pixels have nothing to do with one another: no bit is rounded anew."
    return x_t.sin()


def alone(row, earlier, model=by_pixel, **options):
    "An image drawn alone, from the noise of its row after so many tries."
    options = {"steps": STEPS, "clip": 1, **options}
    noise = row_generators(0, [row], [earlier])
    return final_sample(sample(model, SCHEDULE, (1, *SHAPE), generator=noise, **options))[0]


TABLE = torch.stack([torch.stack([alone(i, k) for k in range(TRIES)]) for i in range(N)])


def judge(pattern):
    "Accept what a table bool [N, TRIES] says; an image is known by its pixels."

    def accept(x):
        same = (x[:, None, None] == TABLE.to(x)).flatten(3).all(3)  # [B, N, TRIES]
        return (same & pattern).flatten(1).any(1)

    return accept


def draw(accept, **options):
    options = {"steps": STEPS, "tries": TRIES, **options}
    return draw_accepted(by_pixel, SCHEDULE, SHAPE, N, accept, **options)


def everything(x):
    return torch.ones(len(x), dtype=torch.bool)


def nothing(x):
    return ~everything(x)


patterns = st.lists(st.booleans(), min_size=N * TRIES, max_size=N * TRIES)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(patterns, st.integers(1, N + 1), st.permutations(range(N)), st.integers(1, N))
def test_each_image_is_its_first_accepted_try_whatever_happens_to_the_others(
    pattern, chunk, order, n_rows
):
    "Any pattern of acceptances, any portions, any part of the rows in any order: to the bit."
    pattern = torch.tensor(pattern).view(N, TRIES)
    rows = order[:n_rows]
    drawn = draw(judge(pattern), chunk=chunk, rows=rows)
    for place, row in enumerate(rows):
        accepted = pattern[row].nonzero()[:, 0].tolist()
        earlier = accepted[0] if accepted else TRIES - 1
        assert bool(drawn.accepted[place]) == bool(accepted)
        assert int(drawn.tries[place]) == earlier + 1
        assert torch.equal(drawn.images[place], TABLE[row, earlier])


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_with_a_network_images_are_the_same_up_to_rounding(seed, n, more, chunk):
    model = seeded(0, lambda: MLPDenoiser((1, 8, 8), width=32))
    nn.init.normal_(model.out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    options = {"steps": 5, "seed": seed}
    images = generate(model, SCHEDULE, (1, 8, 8), n, **options)
    others = generate(model, SCHEDULE, (1, 8, 8), n + more, chunk=chunk, **options)
    assert torch.equal(images, generate(model, SCHEDULE, (1, 8, 8), n, **options))
    torch.testing.assert_close(others[:n], images, atol=1e-4, rtol=1e-4)


def test_a_run_shared_by_three_processes_is_the_run():
    whole = draw(everything)
    parts = [draw(everything, rows=range(rank, N, 3)).images for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole.images[rank::3])
    assert len(draw(everything, rows=[]).images) == 0


def test_other_seeds_rows_and_tries_have_other_noise():
    "200 seeds, rows and tries: no image is near another."
    images = [TABLE.flatten(0, 1)]
    for seed in range(1, 9):
        images.append(draw(nothing, seed=seed, tries=3).images)
    images = torch.cat(images).flatten(1)
    assert torch.pdist(images).min() > 1e-3


def test_no_two_images_and_tries_of_a_run_have_the_same_seed():
    rows, tries = [*range(3000), 2**24 - 1], [*range(9), MOST_TRIES - 1]
    pairs = [(row, k) for row in rows for k in tries]
    seeds = row_seeds(3, *zip(*pairs))
    assert len(set(seeds)) == len(pairs) and min(seeds) >= 0 and max(seeds) < 2**32
    for row, k in ((2**24, 0), (-1, 0), (0, MOST_TRIES), (0, -1)):
        with pytest.raises(ValueError, match="must lie within 0 … "):
            row_seeds(0, [row], [k])
    assert row_seeds(-1, [5], [0]) == row_seeds(2**64 - 1, [5], [0]) != row_seeds(0, [5], [0])
    assert row_seeds(np.int64(4), [5], [0]) == row_seeds(4, [5], [0])


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_with_generators_of_their_own_have_noise_of_their_own(shape, dtype):
    together = randn(shape, row_generators(0, range(3), [0] * 3), dtype=dtype)
    for row, own in zip(together, row_generators(0, range(3), [0] * 3)):
        assert torch.equal(row, torch.randn(shape[1:], generator=own, dtype=dtype))
    assert randn((0, 4), []).shape == (0, 4)
    with pytest.raises(ValueError, match="got 2 for 3 rows"):
        randn(shape, row_generators(0, range(2), [0] * 2))


@pytest.mark.parametrize("eta, steps", [(0.0, 5), (1.0, 2), (1.0, 17), (1.0, 18), (1.0, 40)])
def test_a_row_walks_from_noise_of_its_own_however_many_steps(eta, steps):
    options = {"steps": steps, "eta": eta, "clip": None}
    own = row_generators(0, range(N), [2] * N)
    together = final_sample(sample(by_pixel, SCHEDULE, (N, *SHAPE), generator=own, **options))
    for row in range(N):
        assert torch.equal(together[row], alone(row, 2, **options))


def test_no_noise_is_used_twice():
    noises = _noise_of_walk((50, 7, 3), row_generators(0, range(50), [0] * 50), 40, device="cpu")
    noises = torch.stack(list(noises))  # [40, 50, 7, 3]
    assert len(noises) == 40 and abs(noises.mean()) < 0.02 and abs(noises.std() - 1) < 0.02
    for values in (noises[:, :, 0, 0], noises[:, :, 6, 2]):
        assert len(values.unique()) == values.numel()


def test_portions_stay_full_with_the_refused_ones_of_several():
    sizes = []

    def model(x_t, t):
        if t[0] == 0:
            sizes.append(len(x_t))
        return x_t

    drawn = draw_accepted(model, SCHEDULE, SHAPE, N, nothing, steps=5, tries=4, chunk=5)
    assert sizes == [5, 5, 5, 5, 4] and drawn.tries.tolist() == [4] * N


def test_the_bar_counts_the_calls_of_redraws_too(capsys):
    draw(nothing, tries=3, chunk=4, progress=True)
    calls = STEPS * 5  # 18 images in portions of 4
    assert f"{calls}/{calls}" in capsys.readouterr().err


class Captioned:
    "A denoiser with a caption for each image, which it writes into it."

    def __init__(self, captions):
        self.captions = captions

    def for_rows(self, rows, n):
        assert n == N and len(self.captions) == n
        return Captioned(self.captions[rows])

    def __call__(self, x_t, t):
        return x_t - self.captions.view(-1, 1, 1)


def test_redrawn_images_keep_their_captions():
    "Whatever else is drawn beside them, and through a guard."
    captions = torch.arange(N) / N
    refuse_once = {i for i in range(N) if i % 2}
    expected = [alone(i, i % 2, Captioned(captions[i : i + 1])) for i in range(N)]

    def accept(x):
        seen = [[torch.equal(one, image) for image in expected] for one in x]
        return torch.tensor(seen).any(1)

    for model in (Captioned(captions), protect(Captioned(captions), silent_guard())):
        drawn = draw_accepted(model, SCHEDULE, SHAPE, N, accept, steps=STEPS, tries=2, chunk=4)
        assert torch.equal(drawn.images, torch.stack(expected))
        assert {i for i in range(N) if drawn.tries[i] == 2} == refuse_once

    asked = []
    recorder = type("Recorder", (), {"for_rows": lambda self, rows, n: asked.append(rows)})()
    for rows in (torch.tensor([2, 3, 4]), torch.tensor([4]), torch.tensor([2, 4])):
        for_rows(recorder, rows, 9)
    assert asked[:2] == [slice(2, 5), slice(4, 5)] and asked[2].tolist() == [2, 4]


def silent_guard():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Guard(lambda x, t: 0 * x.flatten(1)[:, :1], SCHEDULE)


def count(accept, **options):
    "(images, the warnings) of `generate`."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"steps": STEPS, "tries": TRIES, "accept": accept, **options}
        images = generate(by_pixel, SCHEDULE, SHAPE, N, **options)
    return images, caught


def test_what_is_left_over_is_withheld_or_returned_and_counted_but_never_named(caplog):
    caplog.set_level(logging.INFO, "cpsample")
    pattern = torch.zeros(N, TRIES, dtype=torch.bool)
    pattern[[0, 2, 3], [0, 1, 3]] = True
    kept = torch.stack([TABLE[0, 0], TABLE[2, 1], TABLE[3, 3]])

    images, caught = count(judge(pattern))
    assert torch.equal(images, kept)
    (warning,) = caught
    assert warning.category is LeftoverWarning and warning.filename == __file__
    text = str(warning.message)
    assert text.startswith("3 of 6 images were refused in all 4 tries and are left out: ")
    assert "\n" not in text

    images, (warning,) = count(judge(pattern), leftover="return")
    assert torch.equal(images[[0, 2, 3]], kept)
    assert torch.equal(images[[1, 4, 5]], TABLE[[1, 4, 5], -1])
    assert "3 of 6 images were refused in all 4 tries and are returned" in str(warning.message)

    words = "accepted 3 of 6 images in 19 draws; images by number of tries: 1: 1, 2: 1, 4: 4"
    assert [record.getMessage() for record in caplog.records] == [words] * 2
    assert all(record.name == "cpsample" for record in caplog.records)


def test_where_nothing_is_accepted_nothing_is_served():
    images, caught = count(nothing)
    assert images.shape == (0, *SHAPE) and len(caught) == 1
    assert count(nothing, leftover="return")[0].shape == (N, *SHAPE)


def test_without_a_judge_or_with_a_content_one_nothing_is_said(caplog):
    caplog.set_level(logging.INFO, "cpsample")
    images, caught = count(None)
    assert torch.equal(images, TABLE[:, 0]) and not caught and not caplog.records
    same, caught = count(everything)
    assert torch.equal(same, images) and not caught and len(caplog.records) == 1


@pytest.mark.parametrize(
    "answer, got",
    [
        (lambda x: x.flatten(1)[:, 0], "torch.float32"),
        (lambda x: torch.ones(len(x), 1, dtype=torch.bool), r"torch.bool \[2, 1\]"),
        (lambda x: torch.tensor(True), r"torch.bool \[\]"),
        (lambda x: torch.ones(len(x)).long(), "torch.int64"),
        (lambda x: np.ones(len(x), dtype=bool), "ndarray"),
        (lambda x: [True] * len(x), "list"),
        (lambda x: None, "NoneType"),
    ],
)
def test_an_answer_that_is_no_bool_per_image_is_refused_before_anything_is_drawn(answer, got):
    def model(x_t, t):
        raise AssertionError("nothing is to be drawn")

    message = rf"accept must return a tensor of a bool per image, \[2\]: got {got}"
    with pytest.raises(ValueError, match=message):
        generate(model, SCHEDULE, SHAPE, N, accept=answer)


def test_an_answer_that_is_wrong_later_is_refused_too():
    with pytest.raises(ValueError, match=r"\[6\]: got torch.bool \[2\]"):
        draw(lambda x: torch.ones(2, dtype=torch.bool))


def test_what_a_judge_raises_comes_through_and_what_it_changes_does_not():
    def broken(x):
        raise RuntimeError("the judge is ill")

    with pytest.raises(RuntimeError, match="the judge is ill"):
        draw(broken)

    def painter(x):
        x.zero_()
        return everything(x)

    assert torch.equal(draw(painter).images, TABLE[:, 0])


def test_images_that_are_not_finite_are_no_question_of_taste():
    with pytest.raises(FloatingPointError, match="the samples are not finite"):
        generate(lambda x, t: x * torch.nan, SCHEDULE, SHAPE, N, steps=5, accept=everything)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tries": 0}, "tries must be between 1 and 256, got 0"),
        ({"tries": 257}, "tries must be between 1 and 256, got 257"),
        ({"leftover": "keep"}, "leftover must be one of withhold, return, got 'keep'"),
        ({"rows": [0, 6]}, "rows must be different whole numbers within 0 … 5"),
        ({"rows": [-1]}, "rows must be different whole numbers within 0 … 5"),
        ({"rows": torch.zeros(N, dtype=torch.bool)}, "rows must be different whole numbers"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(by_pixel, SCHEDULE, SHAPE, N, accept=everything, **options)
    assert "\n" not in str(error.value)


def test_what_a_guard_recognises_is_drawn_anew():
    "A model that has learned twelve digits by heart, four of which a guard knows: none is served."
    known, others = DIGITS[:4], DIGITS[200:208]
    memory = exact_denoiser(round_mixture(torch.cat([known, others]).flatten(1), 0.05), SCHEDULE)

    def model(x_t, t):
        return memory(x_t.flatten(1), t).view_as(x_t)

    def near_known(x_t, t):
        return 6 - 2 * torch.cdist(x_t.flatten(1), known.flatten(1)).amin(1, keepdim=True)

    guard = Guard(near_known, SCHEDULE, form="member")
    calibrate_check(guard, known, DIGITS[300:400])
    request = (model, SCHEDULE, (1, 8, 8), 40)
    plain = generate(*request, steps=20)
    served = generate(*request, steps=20, accept=lambda x: ~recognise(guard, x))
    assert copy_test(plain, known).copies > 5
    assert copy_test(served, known).copies == 0 and len(served) == 40
    untouched = ~recognise(guard, plain)
    torch.testing.assert_close(served[untouched], plain[untouched], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("the_protect", [protect, cpsample.protect])
def test_a_denoiser_cannot_draw_anew(the_protect):
    guard = silent_guard()
    with pytest.raises(ValueError, match="a denoiser cannot draw an image anew: give accept to"):
        the_protect(by_pixel, guard, accept=everything)
    with pytest.raises(ValueError, match="a denoiser cannot draw an image anew"):
        the_protect(by_pixel, guard, accept=True)
