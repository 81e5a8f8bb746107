"One check at every door: what can be converted is, what is on another scale is refused."

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core.calibration import UncoveredGuardError, calibrate
from cpsample.core.classifier import coverage
from cpsample.core.copying import SharedImagesWarning, copy_test, ideal_denoiser, neighbourhood_test
from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, train
from cpsample.core.guard import fit_guard
from cpsample.core.images import (
    ContrastWarning,
    ImageRangeWarning,
    bytes_or_floats,
    check_images,
    conversion_of,
    difference_as_wholes,
    exchanged_channels,
    load_digits,
    pixels,
    to_bytes,
)
from cpsample.core.schedule import make_schedule
from cpsample.judgement.attacks import nearest_sample_attack, published_attacks, scores_of
from cpsample.judgement.baselines import spell
from cpsample.judgement.copy_audit import audit
from cpsample.practice.datasets import load_crops
from cpsample.practice.encoders import features
from cpsample.practice.runs import CONFIGS, fit_run_guard, train_denoiser
from cpsample.practice.training import fit

S = make_schedule()
X = load_digits()[0][:60]
OTHERS = load_digits()[0][100:160]
GUARD = fit_guard(X, S, OTHERS, preset="member", steps=3, width=16)
LOSS = partial(ddpm_loss, schedule=S)

# Ways into the project, each called with images that it should look at.
DOORS = {
    "train": lambda x, place: next(train(MLPDenoiser((1, 8, 8), 8), LOSS, (x,), 1)),
    "fit": lambda x, place: fit(MLPDenoiser((1, 8, 8), 8), LOSS, (x,), 1, progress=False),
    "train_denoiser": lambda x, place: train_denoiser(
        CONFIGS["digits"].tiny(), x, place, progress=False
    ),
    "fit_guard": lambda x, place: fit_guard(x, S, steps=1, width=8),
    "fit_guard, reference": lambda x, place: fit_guard(OTHERS, S, x, steps=1, width=8),
    "fit_run_guard": lambda x, place: fit_run_guard(
        CONFIGS["digits"].tiny(), x, OTHERS, S, place / "g", preset="paper", progress=False
    ),
    "calibrate": lambda x, place: calibrate(GUARD, x, OTHERS, alpha=0.999),
    "calibrate, held out": lambda x, place: calibrate(GUARD, OTHERS, x, alpha=0.999),
    "coverage": lambda x, place: coverage(GUARD.classifier, x, S, 0.1, [5]),
    "copy_test": lambda x, place: copy_test(x, OTHERS),
    "copy_test, training": lambda x, place: copy_test(OTHERS, x),
    "neighbourhood_test": lambda x, place: neighbourhood_test(x, OTHERS),
    "ideal_denoiser": lambda x, place: ideal_denoiser(x, S),
    "audit": lambda x, place: audit(x, OTHERS, space="pca-64"),
    "audit, training": lambda x, place: audit(OTHERS, x, space="pca-64"),
    "audit, held out": lambda x, place: audit(X, OTHERS, x, space="pca-64"),
    "scores_of": lambda x, place: scores_of(
        published_attacks(S)["SimA"], MLPDenoiser((1, 8, 8), 8), x
    ),
    "nearest sample": lambda x, place: nearest_sample_attack(None, OTHERS, x),
    "features": lambda x, place: features(x, "digits-mlp-64"),
    "spell": lambda x, place: spell(lambda x, t: x, S, x, 1.0),
}
REFUSED = {
    "0 to 255": ((X + 1) * 127.5, "reach from 0 to 255.*x / 127.5 - 1 converts"),
    "0 to 1": ((X + 1) / 2, "reach from 0 to 1,.*2 \\* x - 1 converts"),
    "whole numbers": (to_bytes(X).long(), "int64, from 0 to 255: x.to"),
    "NaN": (X.clone().fill_(torch.nan), "NaN or infinity in 60 rows, first in row 0"),
    "none": (X[:0], "non-empty batch"),
    "a list": ([*X], "got list: torch.stack"),
    "as PIL gives them": (np.zeros((9, 8, 8, 3)), "channels last.*puts them first"),
}
CONVERTED = {
    "bytes": to_bytes(X),
    "bytes of numpy": to_bytes(X).numpy(),
    "float64": X.double(),
    "float16": X.half(),
    "bfloat16": X.bfloat16(),
    "numpy": X.numpy(),
    "big-endian numpy": X.numpy().astype(">f8"),
    "long double": X.numpy().astype(np.longdouble),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_another_scale_in_one_line(door, tmp_path):
    for name, (x, says) in REFUSED.items():
        with pytest.raises(ValueError, match=says) as caught:
            DOORS[door](x, tmp_path / name)
        assert "\n" not in str(caught.value), (door, name)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_door_takes_what_needs_no_guess(door, tmp_path):
    for k, x in enumerate(CONVERTED.values()):
        (tmp_path / str(k)).mkdir()
        DOORS[door](x, tmp_path / str(k))


def test_copies_are_found_whatever_their_type():
    "A hundred copies on another scale would be 0 of 100; now that is an error, and these are found"
    for x in CONVERTED.values():
        assert copy_test(x, X).copies == copy_test(X, x).copies == len(X)


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 1.3), st.integers(1, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_only_other_scales_ring(seed, contrast, n):
    "Images, samples that stick out, and latents pass; the same on another scale never does."
    generator = torch.Generator().manual_seed(seed)
    x = (contrast * torch.randn(n, 1, 4, 4, generator=generator)).clamp(-1.3, 1.3)
    x[0, 0, 0, :2] = torch.tensor([-1, 1])
    for fine in (x, 4 * torch.randn(n, 4, 4, 4, generator=generator), 300 * x.flatten(1)):
        if fine.dim() == 2 or fine.min() < -0.2:
            assert check_images(fine) is fine
    for scale in (1 / 2, 127.5, 32767.5):
        refusal = pytest.raises(ValueError, match="converts them")
        with refusal if n > 2 else pytest.warns(ImageRangeWarning, match="another scale"):
            check_images((x.clamp(-1.05, 1) + 1) * scale)


@pytest.mark.parametrize(
    "high, line, convert",
    [
        (1, "2 * x - 1", lambda x: 2 * x - 1),
        (255, "x / 127.5 - 1", lambda x: x / 127.5 - 1),
        (65535, "x / 32767.5 - 1", lambda x: x / 32767.5 - 1),
    ],
)
def test_the_line_converts(high, line, convert):
    assert conversion_of(0, high) == line
    x = convert(torch.linspace(0, high, 7).view(7, 1, 1, 1))
    assert check_images(x) is x and (x.min(), x.max()) == (-1, 1)


@given(st.integers(0, 2**32 - 1), st.integers(0, 254), st.integers(3, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_scaled_bytes_are_never_taken_for_another_scale(seed, darkest, n):
    generator = torch.Generator().manual_seed(seed)
    in_bytes = torch.randint(darkest, 256, (n, 1, 8, 8), generator=generator).byte()
    x = pixels(in_bytes)
    assert check_images(x) is x
    in_bytes[0, 0, 0, :2] = torch.tensor([0, 255])
    with pytest.raises(ValueError, match="2 . x - 1 converts"):
        check_images(in_bytes / 255)


def test_bright_pictures_pass_as_bytes_and_few_cost_a_warning():
    bright = torch.full((5, 1, 4, 4), 130, dtype=torch.uint8)
    bright[:, :, 0] = 250
    off_levels = pixels(bright) + 0.001
    with pytest.raises(ValueError, match="or give bytes"):
        check_images(off_levels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_images(bright).equal(pixels(bright))
        assert check_images(pixels(bright)).min() > 0
        assert check_images(off_levels, any_range=True) is off_levels
        assert bytes_or_floats(bright) is bright
    with pytest.warns(ImageRangeWarning):
        check_images(off_levels[:2])


def test_the_guard_of_a_run_takes_pictures_that_are_bright_by_nature(tmp_path):
    "Drawings on white, from a folder, that have nothing darker than a middle grey."
    bright = (to_bytes(X).float() / 2 + 127).byte()
    assert conversion_of(pixels(bright).min().item(), pixels(bright).max().item())
    config = replace(CONFIGS["digits"].tiny(), mirror=True)
    with pytest.raises(UncoveredGuardError, match="this guard is certain of"):  # after 20 steps
        fit_run_guard(config, bright[:5], bright[10:], S, tmp_path / "g", progress=False)


def test_doubles_stay_where_distances_are_computed():
    x = X.double()
    assert check_images(x, dtype=None) is x and check_images(x).dtype == torch.float32
    assert check_images(X.half(), dtype=None).dtype == torch.float32
    assert check_images(np.broadcast_to(np.float32(0.5), (3, 4))).sum() == 6


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(8, 200))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_two_parts_of_one_set_do_not_differ_as_wholes(seed, channels, n):
    generator = torch.Generator().manual_seed(seed)
    level, spread = torch.rand(2, 2 * n, 1, 1, 1, generator=generator)
    x = (level - 0.5 + spread * torch.randn(2 * n, channels, 4, 4, generator=generator)).clamp(
        -1, 1
    )
    first, second = x.split(n)
    assert difference_as_wholes(first, second) == difference_as_wholes(first[:7], -second) == ""
    assert "brighter" in difference_as_wholes(first / 9 + 0.7, second / 9 - 0.7)


def test_a_reference_of_another_contrast_teaches_contrast():
    with pytest.warns(ContrastWarning, match="reference images differ as a whole from members"):
        fit_guard(X, S, OTHERS / 2, steps=1, width=8)


def test_neighbours_tell_which_channels_are_exchanged():
    x = pixels(load_crops(16)[0])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    first, second = x[:200], x[200:600]
    for changed, says in (
        (first.flip(1), "red and blue seem to be exchanged"),
        (first[:, [2, 0, 1]], "channels seem to be out of order, G, B, R would fit"),
        (-first, "black and white seem to be exchanged"),
        (first, ""),
        ((first / 2).clamp(-1, 1), ""),
        (first[:29].flip(1), ""),
    ):
        assert exchanged_channels(changed, second) == says
    assert difference_as_wholes(-X, OTHERS) == "black and white seem to be exchanged"


@pytest.mark.parametrize("scale, shift", [(2.3, 0.2), (50, 0), (2.5, 0)])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_standardised_bytes(door, scale, shift, tmp_path):
    with pytest.raises(ValueError, match="in the levels of bytes.*undo their standardisation"):
        DOORS[door](X * scale + shift, tmp_path)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 4]), st.floats(0.3, 1.2))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_latents_and_samples_that_stick_out_have_no_levels(seed, channels, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(40, channels, 8, 8, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_images(x) is x
        assert check_images(2 * (2 * x).clamp(-1, 1)) is not None  # atoms, and far too large


def test_images_far_off_cost_a_warning():
    with pytest.warns(ImageRangeWarning, match="on another scale. images reach from"):
        check_images(9 * torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_a_reference_of_members_saved_again_teaches_nothing():
    near = (X.flip(-1) + 0.02).clamp(-1, 1)
    for reference, counted in ((near, "60 of 60"), (torch.cat([OTHERS, near[:8]]), "8 of 68")):
        with pytest.warns(SharedImagesWarning, match=f"{counted} reference images are nearly memb"):
            fit_guard(X, S, reference, steps=1, width=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharedImagesWarning)
        fit_guard(X, S, torch.cat([OTHERS, near[:4]]), steps=1, width=8)
