"Copy tests on planted truth; the ideal denoiser; intervals."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from small_pipelines import pixel_pipeline

from cpsample.core.copying import (
    SharedImagesWarning,
    copy_test,
    cosine_test,
    describe_rate,
    hidden_copies,
    ideal_denoiser,
    leave_out_shared,
    nearness,
    neighbourhood_test,
    proportion_ci,
    refuse_shared,
    reject_copies,
    shared_rows,
    warn_of_near,
)
from cpsample.core.ddpm import ddpm_loss, final_sample, sample
from cpsample.core.densities import GaussianMixture, exact_denoiser
from cpsample.core.images import ContrastWarning, load_digits, pixels, plant_duplicates, to_bytes
from cpsample.practice.datasets import load_crops, load_fashion
from cpsample.production.pipelines import fit_pipeline_guard
from cpsample.workshop.neighbours import nearest

DIGITS = load_digits()[0]
MEMBERS, OTHERS = DIGITS[:100], DIGITS[500:1500]


@pytest.mark.parametrize("share", [0, 10, 50, 500])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("duplicates", [0, 100])
def test_planted_copies_are_read(share, noise, duplicates, generator):
    copies = MEMBERS[torch.randint(100, (share,), generator=generator)]
    copies = copies + noise * torch.randn(copies.shape, generator=generator)
    x = torch.cat([copies, OTHERS[: 1000 - share]])
    train = plant_duplicates(MEMBERS, duplicates)[0] if duplicates else MEMBERS
    report = copy_test(x, train)
    assert report.copied[:share].all() and report.ci[0] <= share / 1000 <= report.ci[1]


def test_cosine_test_is_brute_force_over_many_tiles(generator):
    f, known = torch.randn(700, 8, generator=generator), torch.randn(2500, 8, generator=generator)
    value, rows = torch.nn.functional.cosine_similarity(f[:, None], known[None], dim=2).max(1)
    report = cosine_test(f, known)
    assert torch.equal(report.nearest, rows)
    torch.testing.assert_close(report.score, 1 - value, atol=1e-5, rtol=0)


def test_neighbourhood_and_cosine_tests_find_exact_copies(generator):
    x = torch.cat([MEMBERS[:30], OTHERS[:30]])
    copied = neighbourhood_test(x, MEMBERS, threshold=0.3).copied
    assert copied.tolist() == [True] * 30 + [False] * 30

    # The cosine ignores length.
    features = torch.randn(100, 64, generator=generator)
    mixed = torch.cat([3 * features[:10], torch.randn(10, 64, generator=generator)])
    assert cosine_test(mixed, features).copied.tolist() == [True] * 10 + [False] * 10


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_interval_is_the_beta_quantile(kn):
    k, n = kn
    low, high = proportion_ci(k, n)
    assert low == pytest.approx(0 if k == 0 else beta.ppf(0.025, k, n - k + 1), abs=1e-6)
    assert high == pytest.approx(1 if k == n else beta.ppf(0.975, k + 1, n - k), abs=1e-6)


def test_zero_is_never_bare():
    assert describe_rate(0, 1000) == "0 of 1000, below 0.37 % at 95 %"


def test_rates_read_as_numbers():
    assert describe_rate(100, 100) == "100 of 100 = 100 % [96, 100]"
    assert describe_rate(1, 1000) == "1 of 1000 = 0.1 % [0.0025, 0.56]"


def test_nearest_is_exact_for_near_copies():
    d, rows = nearest(MEMBERS + 1e-5, MEMBERS, 3, chunk=7)
    full = (MEMBERS[:, None] + 1e-5 - MEMBERS[None]).flatten(2).double().norm(dim=2)
    torch.testing.assert_close(d.double(), full.sort(1).values[:, :3], atol=1e-6, rtol=1e-3)
    assert (rows[:, 0] == torch.arange(100)).all()


def test_nearest_is_ordered_where_the_fast_distances_are_not():
    "Far from the origin the matrix-product distances lose their order; ours must not."
    g = torch.Generator().manual_seed(0)
    refs = 300 + torch.randn(200, 64, generator=g)
    d, rows = nearest(refs + 0.5 * torch.randn(200, 64, generator=g), refs, 20)
    assert (d.diff(dim=1) >= 0).all() and (rows[:, 0] == torch.arange(200)).all()


def test_ideal_denoiser_is_the_narrow_limit_of_a_mixture(schedule, generator):
    x = torch.randn(6, 2, generator=generator)
    narrow = GaussianMixture(x, torch.full((6,), 1e-4), torch.full((6,), 1 / 6))
    x_t, t = torch.randn(50, 2, generator=generator), torch.full((50,), 300)
    ideal, exact = ideal_denoiser(x, schedule), exact_denoiser(narrow, schedule)
    torch.testing.assert_close(ideal(x_t, t), exact(x_t, t), atol=1e-3, rtol=1e-3)


def test_ideal_denoiser_copies_and_minimises_the_loss(schedule, generator):
    ideal = ideal_denoiser(MEMBERS, schedule)
    drawn = final_sample(sample(ideal, schedule, (50, 1, 8, 8), clip=1, generator=generator))
    assert copy_test(drawn, MEMBERS).rate == 1

    def loss(factor):
        same_noise = torch.Generator().manual_seed(1)
        x0 = MEMBERS.repeat(20, 1, 1, 1)
        return ddpm_loss(lambda x, t: factor * ideal(x, t), x0, schedule, generator=same_noise)

    assert loss(1) < loss(0.97) and loss(1) < loss(1.03)


def test_stopping_above_zero_hides_copies(schedule, generator):
    "The trap that `timesteps` closes: the same copies, with the noise of level 39 left on them."
    ideal = ideal_denoiser(MEMBERS, schedule)
    levels = [*range(999, 0, -40), 0]
    options = {"steps": levels, "clip": 1, "generator": generator}
    stopped = {step.t: step.x_t for step in sample(ideal, schedule, (100, 1, 8, 8), **options)}
    assert copy_test(stopped[0], MEMBERS).rate == 1
    assert copy_test(stopped[39], MEMBERS).rate < 0.7


def test_rejection_returns_only_what_is_no_copy(generator):
    pool = torch.cat([MEMBERS[:50], OTHERS[:50]])

    def draw():
        return pool[torch.randperm(100, generator=generator)]

    x, accepted = reject_copies(draw, MEMBERS, 120)
    assert len(x) == 120 and copy_test(x, MEMBERS).copies == 0 and accepted == 0.5


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_shared_rows_are_those_whose_bytes_are_equal(k, n, m, as_bytes):
    g = torch.Generator().manual_seed(k)
    levels = torch.randint(0, 3, (n + m, 1, 2, 2), generator=g, dtype=torch.uint8) * 100
    x, members = levels[:n], levels[n:]
    expected = [i for i in range(n) if any(torch.equal(x[i], other) for other in members)]
    floats = pixels(x) + 1e-4 * (2 * (x == 0) - 1.0) if not as_bytes else x  # a rounding away
    assert shared_rows(floats, pixels(members)).tolist() == expected
    assert shared_rows(pixels(x).double(), members).tolist() == expected

    # Points and latents have no bytes: every number counts.
    points = 3 * pixels(x).flatten(1)
    assert shared_rows(points, 3 * pixels(members).flatten(1)).tolist() == expected
    assert shared_rows(points + 1e-4, 3 * pixels(members).flatten(1)).tolist() == []
    assert shared_rows(x[:0], members).tolist() == shared_rows(x, members[:0]).tolist() == []


def test_strangers_are_kept_in_their_order_and_counted():
    members = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    others = -members.roll(1, 2)
    mixed = torch.cat([others[:2], members[2:4], others[2:]])
    with pytest.warns(
        SharedImagesWarning, match=r"left out 2 of 8 other .* \(first in rows 2, 3\)"
    ):
        assert torch.equal(leave_out_shared(mixed, members), others)
    assert leave_out_shared(others, members) is others
    refuse_shared(others, members)
    with pytest.raises(ValueError, match=r"1 of 1 strangers are pupils, too \(first in row 0\)"):
        refuse_shared(members[:1], members, "strangers", of="pupils")


def test_a_pipeline_is_not_guarded_with_its_own_images_as_the_others(tmp_path):
    "In a pipeline's own space a draw of the autoencoder would hide that they are the same."
    pipe = pixel_pipeline(channels=3)
    size = pipe.unet.config.sample_size
    x = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.raises(ValueError, match="4 of 4 other images are images to protect, too"):
        fit_pipeline_guard(pipe, x, to_bytes(x[:4]), tmp_path / "guard")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_copies_of_large_pictures_are_found_in_any_precision(kind):
    "The square of a distance among them is larger than any number of half precision."
    x = torch.rand(6, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = to_bytes(x) if kind == torch.uint8 else x.to(kind)
    for test in (copy_test, neighbourhood_test):
        report = test(x[:3], x)
        assert report.copies == 3 and report.nearest.tolist() == [0, 1, 2]
        assert torch.isfinite(report.score).all()
        assert test(-x[:3].float().flip(2) if kind != torch.uint8 else 255 - x[:3], x).copies == 0


@pytest.mark.parametrize("test", [copy_test, neighbourhood_test])
@pytest.mark.parametrize(
    "x, training, says",
    [
        (MEMBERS / 2, MEMBERS, "brightness or contrast"),
        ((MEMBERS + 1) / 2 * 0.69, MEMBERS, "brightness or contrast"),
        (MEMBERS, (MEMBERS + 1) / 2 * 0.69, "brightness or contrast"),
        (-MEMBERS, MEMBERS, "black and white"),
        (torch.cat([OTHERS[:30], MEMBERS[:9] / 2]), MEMBERS, "brightness or contrast"),
    ],
)
def test_copies_on_another_scale_are_not_passed_over_in_silence(test, x, training, says):
    with pytest.warns(ContrastWarning, match=f"{says} seem to be .*: else .* would be copies"):
        test(x, training)


@pytest.mark.parametrize("k", range(3))
def test_honest_sets_hide_no_copies(k):
    crops, clothes = pixels(load_crops(16)[0]), pixels(load_fashion(small=True)[0])
    plane = torch.randn(300, 2, 1, 1, generator=torch.Generator().manual_seed(k))
    latents = torch.randn(300, 4, 8, 8, generator=torch.Generator().manual_seed(k))
    for x in (DIGITS, crops, clothes, plane, latents, plane.flatten(1)):
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(k))]
        half = min(1000, len(x) // 2)
        assert hidden_copies(x[:half], x[half : 2 * half]).counts == {}
        assert hidden_copies(x[:half] + 0, x[:half]).counts == {}


def test_near_strangers_are_found_in_every_row():
    near = (MEMBERS[:60] + 0.02).clamp(-1, 1)
    scores = nearness(torch.cat([DIGITS[400:], near, near.flip(-1)]), MEMBERS)
    assert (scores[-120:] < 1 / 6).all() and (scores[:-120] > 1 / 6).all()
    with pytest.warns(SharedImagesWarning, match="120 of 1517"):
        warn_of_near(scores)

    # Of very many, some: as many as can be looked at.
    some = nearness(near, MEMBERS, 20)
    assert (some < 1 / 6).sum() == 20 and (some == 1).sum() == 40
    assert nearness(near.flatten(1), MEMBERS.flatten(1)).tolist() == [1] * 60


@pytest.mark.parametrize("k", range(3))
def test_what_is_nearly_a_copy_is_not_hidden(k):
    "Blurred copies, of a little less contrast: their ratio lies on both sides of the threshold."
    faded = 0.9 * MEMBERS + 0.08 * torch.randn(
        MEMBERS.shape, generator=torch.Generator().manual_seed(k)
    )
    assert 20 < copy_test(faded, MEMBERS).copies < 80
    assert hidden_copies(faded, MEMBERS).counts == {}
