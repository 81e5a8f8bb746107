"Who has the last word: three judges, and a study that pools its seeds."

from dataclasses import replace

import pytest
import torch
from test_recognition import knowing

from cpsample.core.copying import ideal_denoiser
from cpsample.core.images import load_digits
from cpsample.core.protection import protect
from cpsample.core.recognition import calibrate_check, recognise, redrawn, unrecognised_by
from cpsample.core.schedule import make_schedule
from cpsample.practice import judges_study
from cpsample.practice.judges_study import Judges, JudgesSettings, judges_of, measure_judges
from cpsample.workshop.studies import Workspace

SCHEDULE = make_schedule()
DIGITS, _ = load_digits()
MEMBERS, OTHERS = DIGITS[:20], DIGITS[200:400]


@pytest.fixture
def guard():
    guard = knowing()
    calibrate_check(guard, MEMBERS, OTHERS)
    return guard


def test_a_perfect_memory_leads_back_to_the_member():
    model = ideal_denoiser(MEMBERS, SCHEDULE)
    near = MEMBERS + 0.05 * torch.randn(MEMBERS.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(redrawn(model, SCHEDULE, near), MEMBERS, atol=1e-3, rtol=0)

    # Each row by itself, the same every time.
    alone = torch.cat([redrawn(model, SCHEDULE, near[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(alone, redrawn(model, SCHEDULE, near)[:3])
    further = redrawn(model, SCHEDULE, OTHERS[:5], level=0)
    assert (further - OTHERS[:5]).flatten(1).norm(dim=1).max() > 0.5  # even there


def test_what_was_moved_out_of_sight_is_seen_where_it_leads(guard):
    # Just unknown to the guard: members, moved along noise until they are not recognised.
    noise = torch.randn(MEMBERS.shape, generator=torch.Generator().manual_seed(1))
    amounts = torch.linspace(0, 1, 41).view(-1, 1, 1, 1, 1)
    shifted = MEMBERS + amounts * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 6
    known = recognise(guard, shifted.flatten(0, 1).clamp(-1, 1)).view(41, -1)
    first = known.long().argmin(0)  # the first amount at which it is unknown
    hidden = shifted[first, torch.arange(len(MEMBERS))].clamp(-1, 1)
    assert unrecognised_by(guard)(hidden).all()

    # Seen through a model that also knows others, with a threshold that is calibrated there.
    model, asking = ideal_denoiser(torch.cat([MEMBERS, OTHERS]), SCHEDULE), replace(guard)
    report = calibrate_check(asking, MEMBERS, OTHERS, model=model, through=50, steps=10)
    assert report["through"] == 50 and guard.recognition["through"] is None
    assert unrecognised_by(asking, model)(hidden).float().mean() < 0.1


def test_a_check_that_asks_the_model_is_given_it(guard):
    model, asking = ideal_denoiser(torch.cat([MEMBERS, OTHERS]), SCHEDULE), replace(guard)
    calibrate_check(asking, MEMBERS, OTHERS, model=model, through=50, steps=10)
    for mistake in (
        lambda: unrecognised_by(asking),
        lambda: recognise(asking, MEMBERS),
        lambda: calibrate_check(asking, MEMBERS, OTHERS, through=50),
        lambda: calibrate_check(asking, MEMBERS, OTHERS, model=MEMBERS, through=50),
    ):
        with pytest.raises(ValueError, match="give model="):
            mistake()
    with pytest.raises(ValueError, match="without the guard, as protected.model"):
        recognise(asking, MEMBERS, protect(model, asking))
    with pytest.raises(ValueError, match="noise levels must lie within"):
        calibrate_check(asking, MEMBERS, OTHERS, model=model, through=1000)


def test_the_same_guard_a_second_one_and_the_model(guard):
    blind = replace(guard, recognition=guard.recognition | {"threshold": 1e6})
    asking = replace(guard, recognition=guard.recognition | {"through": 50})
    judges = judges_of(Judges(blind, guard, asking), ideal_denoiser(MEMBERS, SCHEDULE))
    assert judges["nobody"] is None
    assert judges["the same guard"](MEMBERS).all()
    assert not judges["a second guard"](MEMBERS).any()
    assert not judges["the model asked first"](MEMBERS).any()


def test_pairs_are_pooled_over_seeds_and_cost_what_they_cost(tmp_path, monkeypatch):
    def measure_seed(seed, settings):
        def numbers(copies, flops):
            counts = dict(n=10, withheld=0, copies=copies, near=1, neighbourhood=2, drawn=11)
            worst = {"member": 1, "copies": copies, "below": 0.5}
            means = {name: [1.0] for name in ("fd", "precision", "recall")}
            rest = {"most_copied": worst, "histogram": [1], "seconds": 1.0, "flops": flops}
            return counts | means | rest

        pair = {"nobody": numbers(seed, 4.0), "a second guard": numbers(0, 6.0)}
        return dict.fromkeys(("none", "at x_t", "at x0"), pair)

    monkeypatch.setattr(judges_study, "measure_seed", measure_seed)
    settings = JudgesSettings(seeds=(1, 2))
    record = measure_judges(Workspace(tmp_path, progress=False), settings)
    assert record["seeds"] == [1, 2] and record["settings"]["n"] == 1000
    assert record["pairs"]["at x_t"]["nobody"]["copies"] == 3
    assert record["pairs"]["none"]["a second guard"]["cost"] == 1.5
