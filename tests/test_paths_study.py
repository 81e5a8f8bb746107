"One guard on three paths, in miniature: every arm, its own noise per image, one guard for all."

from functools import partial

import pytest
import torch

from cpsample.core.copying import copy_test
from cpsample.core.guard import UncalibratedGuardWarning
from cpsample.core.paths import flow_path
from cpsample.core.schedule import make_schedule
from cpsample.practice import paths_study
from cpsample.practice.paths_study import (
    PathSampler,
    PathsSettings,
    by_sigma,
    karras_sigmas,
    measure_paths,
)
from cpsample.workshop.studies import Study, Workspace, run_study

TINY = PathsSettings(
    seeds=(3,),
    n=40,
    images=12,
    train_steps=100,
    flow_train_steps=100,
    guard_steps=400,
    sample_steps=10,
    edm_steps=10,
    flow_steps=10,
)
pytestmark = pytest.mark.filterwarnings(
    f"ignore::{UncalibratedGuardWarning.__module__}.UncalibratedGuardWarning"
)


def test_the_record_has_three_paths_and_one_guard(tmp_path, monkeypatch):
    made, seen = [], []
    fit, arms_of_paths = paths_study.fit_guards, paths_study.arms_of_paths

    def counted(*args, **kwargs):
        made.append(args)
        return fit(*args, **kwargs)

    def noted(settings, seed, members, guard):
        seen.append(guard)
        return arms_of_paths(settings, seed, members, guard)

    monkeypatch.setattr(paths_study, "fit_guards", counted)
    monkeypatch.setattr(paths_study, "arms_of_paths", noted)
    study = Study("paths", partial(measure_paths, settings=TINY))
    record = run_study(study, tmp_path / "out", Workspace(tmp_path, progress=False))
    assert len(made) == len(seen) == 1 and seen[0].at == "x0"
    assert list(record["paths"]) == ["ddpm", "edm", "flow"] and record["seeds"] == [3]
    for arms in record["paths"].values():
        assert list(arms) == ["unguarded", "rejection", "guarded"]
        assert all(arm["n"] == 40 and arm["withheld"] == 0 for arm in arms.values())
        assert arms["rejection"]["copies"] == 0 and arms["unguarded"]["cost"] == 1
        assert arms["guarded"]["cost"] > 1


def still(x, time):
    "A model that has nothing in mind but what it sees."
    return 0 * x


def sampler(members, model=still):
    return PathSampler(model, flow_path(), "flow", [1.0, 0.5], members, seed=7)


def test_rejection_keeps_what_is_no_copy_and_counts_its_draws():
    # Two members; a copy is what lies much nearer to one of them.
    members = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    one = sampler(members)
    plain, drawn = one.serve(50), one.reject(50)
    copied = copy_test(plain.images, members).copied
    assert 0 < copied.sum() < 50 and drawn.drawn > 50 == plain.drawn
    assert len(drawn.images) == 50 and copy_test(drawn.images, members).copies == 0
    kept = plain.images[~copied]
    assert torch.equal(drawn.images[: len(kept)], kept)  # the unguarded ones come first
    assert plain.images.abs().max() <= 1


def test_an_image_depends_on_its_row_alone():
    one = sampler(torch.zeros(2, 1, 3, 3))
    assert torch.equal(one.images(still, range(0, 9))[5:7], one.images(still, range(5, 7)))


def test_a_denoiser_is_asked_at_the_level_of_sigma():
    seen = []

    def model(x_t, t):
        seen.append((x_t, t))
        return x_t

    schedule = make_schedule()
    x, sigma = torch.ones(3, 1, 2, 2), torch.tensor([0.002, 1.0, 500.0])
    by_sigma(model, schedule)(x, sigma)
    (x_t, t), size = seen[0], (1 + sigma**2).sqrt()
    torch.testing.assert_close(x_t[:, 0, 0, 0], 1 / size)
    assert t[0] == 0 and t[2] == 999 and t[1].item() == pytest.approx(258.1, abs=0.1)
    ramp = karras_sigmas(5)
    assert ramp[-1] == 0 and sorted(ramp, reverse=True) == ramp and len(ramp) == 6
