"No guard does nothing in silence: each way has its refusal, or its warning, in one line."

import warnings
from dataclasses import replace

import pytest
import torch

from cpsample.core.classifier import MLPClassifier
from cpsample.core.ddpm import seeded
from cpsample.core.guard import (
    Guard,
    IdleGuardWarning,
    UncalibratedGuardWarning,
    check_guard_fits,
    fit_guard,
    members_identity,
    protect,
)
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, pixels, to_bytes
from cpsample.core.schedule import Schedule, make_schedule
from cpsample.workshop.files import fingerprint


def certain(x, t):
    "A classifier that is certain of everything, with a gradient."
    return 9 + x.flatten(1)[:, :1]


def zero_eps(x, t):
    return torch.zeros_like(x)


def refused(words):
    "The context in which a ValueError of one line with these words is raised."
    return pytest.raises(ValueError, match=rf"\A[^\n]*{words}[^\n]*\Z")


# a guard of another model


def guard_of(members, shape=None):
    "A guard that remembers these members, and the shape of its images."
    classifier = certain
    if shape is not None:
        classifier = seeded(0, lambda: MLPClassifier(shape, K=2, width=8, depth=1))
    return Guard(classifier, make_schedule(), made=members_identity(members))


IMAGES = to_bytes(torch.rand((5, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(schedule=make_schedule("cosine")), r"noise schedule \(linear, T=1000\)"),
        (dict(schedule=make_schedule(T=100)), r"the model's \(linear, T=100\)"),
        (dict(schedule=Schedule("broken", torch.full((1000,), torch.nan))), "broken"),
        (dict(shape=(1, 8, 8)), r"shape \(1, 4, 4\), the model draws \(1, 8, 8\)"),
        (dict(shape=[3, 4, 4]), r"the model draws \(3, 4, 4\)"),
        (dict(members=IMAGES.flip(0)), "other images"),
        (dict(members=IMAGES[:4]), "other images"),
        (dict(members=pixels(IMAGES) + 2), "other images"),
        (dict(members="0123456789abcdef"), "other images"),
    ],
)
def test_a_guard_of_another_model_is_refused(other, words):
    guard = guard_of(IMAGES, (1, 4, 4))
    check_guard_fits(guard, schedule=make_schedule(), shape=[1, 4, 4], members=IMAGES)
    with refused(words):
        check_guard_fits(guard, **other)


def test_bytes_and_what_became_of_them_are_the_same_members():
    identity = members_identity(IMAGES)
    assert identity == {"members": fingerprint(IMAGES), "members_as": "bytes"}
    for form in (pixels(IMAGES), pixels(IMAGES).double(), pixels(IMAGES).half()):
        assert members_identity(form) == identity
        check_guard_fits(guard_of(IMAGES), members=form)
    check_guard_fits(guard_of(IMAGES), members=identity["members"])

    latents = 3 * pixels(IMAGES)
    assert members_identity(latents) == {"members": fingerprint(latents), "members_as": "floats"}
    check_guard_fits(guard_of(latents), members=latents)


@pytest.mark.parametrize("images", [IMAGES, pixels(IMAGES)], ids=["bytes", "floats"])
def test_a_guard_of_version_0_1_knows_its_members_by_their_floats(images):
    old = Guard(certain, make_schedule(), made={"members": fingerprint(pixels(IMAGES))})
    check_guard_fits(old, members=images)
    check_guard_fits(old, members=fingerprint(IMAGES))  # of bytes: not to be compared
    with refused("other images"):
        check_guard_fits(old, members=images.flip(0))


def test_a_guard_that_knows_nothing_is_not_refused():
    check_guard_fits(Guard(certain, make_schedule()), shape=(3, 9, 9), members=IMAGES)


def test_a_trained_guard_remembers_bytes_in_its_file(tmp_path, schedule):
    members = load_digits()[0][:6]
    save_guard(fit_guard(members, schedule, K=1, steps=1, width=8), tmp_path / "g")
    guard = load_guard(tmp_path / "g")
    assert guard.made["members"] == fingerprint(to_bytes(members))
    check_guard_fits(guard, schedule=schedule, shape=members.shape[1:], members=members)


# settings that change nothing


@pytest.mark.parametrize("setting", ["scale", "t_max"])
def test_a_guard_that_changes_nothing_warns_where_it_protects(setting, schedule):
    guard = replace(Guard(certain, schedule, report={"alpha": 0.05}), **{setting: 0})
    with pytest.warns(IdleGuardWarning, match=f"{setting} is 0: samples are unprotected") as seen:
        model = protect(zero_eps, guard)
    assert [warning.filename for warning in seen] == [__file__]
    assert torch.equal(model(torch.ones(2, 3), 5), torch.zeros(2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", category=IdleGuardWarning)
        protect(zero_eps, guard)
    assert not issubclass(IdleGuardWarning, UncalibratedGuardWarning)
