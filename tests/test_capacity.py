"How much a guard holds: what can be known at all, trainings of a grid, and a formula for them."

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core.classifier import member_labels
from cpsample.core.schedule import add_noise, make_schedule
from cpsample.production import capacity
from cpsample.production.capacity import (
    FACTORS,
    STUDY,
    Cell,
    Grid,
    fit_formula,
    formula,
    grid_record,
    held,
    ideal_logits,
    measure_cell,
    measure_grid,
    pictures_held,
    pool_of,
    price_of_doubling,
    right_bits,
)
from cpsample.workshop.choices import studies
from cpsample.workshop.studies import Workspace

SCHEDULE = make_schedule()
TINY = Grid(
    members=(20, 40), widths=(8, 16), steps=(20, 40), labels=(2,), levels=(0, 200), batch_size=32
)


def noisy(members, level, seed=0, draws=1):
    "Pictures, noised: (x_t, t, rows)."
    rows = torch.arange(draws * len(members)) % len(members)
    t = torch.full((len(rows),), level)
    x_t, _ = add_noise(members[rows], t, SCHEDULE, generator=torch.Generator().manual_seed(seed))
    return x_t, t, rows


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 999), st.integers(0, 100))
def test_the_ideal_guard_is_bayes_rule(level, seed):
    "Beside sums that a person would write down, picture by picture."
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn(5, 1, 2, 2, generator=generator).double()
    labels = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]]).double()
    x_t, t, _ = noisy(members, level, seed)
    logits = ideal_logits(x_t, t, members, labels, SCHEDULE)
    abar = SCHEDULE.abar[level].item()
    for x, found in zip(x_t, logits):
        far = ((x - math.sqrt(abar) * members) ** 2).sum((1, 2, 3)) / (2 * (1 - abar))
        weights = (-(far - far.min())).exp()
        p = (weights[:, None] * labels).sum(0) / weights.sum()
        torch.testing.assert_close(found.sigmoid(), p.to(found), rtol=1e-4, atol=1e-6)


def test_nobody_has_more_bits_right_than_the_ideal_guard():
    "Not the nearest picture, and no linear classifier: by more than chance."
    members = torch.randn(30, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    labels = member_labels(members)
    for level in (100, 300, 600):
        x_t, t, rows = noisy(members, level, draws=200)
        best = right_bits(ideal_logits(x_t, t, members, labels, SCHEDULE), labels[rows])
        scaled = (x_t / SCHEDULE.abar[level].sqrt()).flatten(1)
        nearest = torch.cdist(scaled, members.flatten(1)).argmin(1)
        linear = scaled @ torch.linalg.lstsq(members.flatten(1), 2 * labels - 1).solution
        for rival in (2 * labels[nearest] - 1, linear):
            assert right_bits(rival, labels[rows]) <= best + 0.005
    assert right_bits(labels - 0.5, labels) == 1 and right_bits(0.5 - labels, labels) == 0


def test_a_picture_without_noise_is_known_and_one_label_for_all_is_certain():
    members = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    labels[0, 1] = 1
    x_t, t, _ = noisy(members, 0)
    logits = ideal_logits(x_t, t, members, labels, SCHEDULE)
    assert logits[:, 0].eq(math.inf).all() and right_bits(logits, labels) == 1
    assert not logits.isnan().any()


def test_pools_share_no_picture_and_smaller_tasks_lie_in_larger_ones():
    pool = pool_of(TINY)
    everything = torch.cat(list(pool)).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything) == 40 + 300 + 297
    fashion = pool_of(replace(TINY, data="fashion", small=True, reference=10, others=10))
    assert fashion.members.shape == (40, 1, 28, 28) and fashion.members.min() == -1


def test_a_grid_has_each_size_with_each_and_other_labels_in_the_middle():
    cells = TINY.cells
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 + 2
    assert [cell for cell in cells if cell.K == 2] == [Cell(20, 16, 40, 2), Cell(40, 16, 40, 2)]
    assert [cell.steps for cell in cells] == sorted(cell.steps for cell in cells)
    assert len(Grid().cells) == 55


def test_a_cell_is_learned_and_asked_beside_the_ideal():
    "The classifier that learns longer has more bits right; chance decides nothing twice."
    pool = pool_of(TINY)
    short, long = (measure_cell(Cell(20, 32, steps), TINY, pool) for steps in (5, 400))
    assert long["levels"]["0"]["bits"] > short["levels"]["0"]["bits"] + 0.2
    assert long["levels"]["0"]["ideal"] == 1 and long["levels"]["0"]["others"] < 0.2
    assert measure_cell(Cell(20, 32, 5), TINY, pool) == short
    assert long["parameters"] == short["parameters"] > 1000


def test_a_stopped_grid_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    whole = measure_grid(Workspace(tmp_path, progress=False), TINY)
    seconds = [cell.pop("seconds") for cell in whole["cells"]]
    assert len(seconds) == 10 and set(whole["fits"]) == {"0", "200"}
    for path in list(tmp_path.glob("*.json"))[:4]:
        path.unlink()
    made = []
    measure = capacity.measure_cell
    monkeypatch.setattr(
        capacity, "measure_cell", lambda *given: made.append(given[0]) or measure(*given)
    )
    again = measure_grid(Workspace(tmp_path, progress=False), TINY)
    for cell in again["cells"]:
        del cell["seconds"]
    assert len(made) == 4 and json.dumps(again) == json.dumps(whole)
    with pytest.raises(ValueError, match="made with other settings"):
        measure_grid(Workspace(tmp_path, progress=False), replace(TINY, batch_size=16))


def planted_cells(coefficients):
    "Cells that hold exactly what the formula says."
    cells = []
    for sizes in itertools.product((50, 100, 400), (1e3, 1e4), (100, 1000), (2, 8)):
        factors = dict(zip(FACTORS, sizes))
        bits = 0.5 + 0.45 * formula(coefficients, **factors)
        cells.append(factors | {"levels": {"0": {"bits": bits, "ideal": 0.95}}})
    return cells


TRUTH = {"constant": -1.0, "members": -0.8, "parameters": 0.3, "steps": 0.4, "K": 0.0}


def test_a_formula_that_was_planted_is_found_and_solved():
    fit = fit_formula(planted_cells(TRUTH), 0, draws=3)
    assert fit.error < 0.01
    n = pictures_held(fit, 5000, 500, K=4, share=0.6)
    assert formula(fit.coefficients, members=n, parameters=5000, steps=500, K=4) == pytest.approx(
        0.6
    )


@pytest.mark.parametrize(
    "asked, says",
    [
        (dict(parameters=10**6, steps=500), "parameters 1e\\+06 was not measured, only 1000 to"),
        (dict(parameters=5000, steps=5), "steps 5 was not measured"),
        (dict(parameters=5000, steps=500, K=64), "K 64 was not measured"),
        (dict(parameters=5000, steps=500, share=0.999), "fewer than 50, the fewest pictures"),
        (dict(parameters=5000, steps=500, share=0.001), "more than 400, the most pictures"),
    ],
)
def test_beyond_what_was_measured_nothing_is_said(asked, says):
    fit = fit_formula(planted_cells(TRUTH), 0, draws=2)
    with pytest.raises(ValueError, match=says):
        pictures_held(fit, **asked)


@pytest.mark.parametrize("constant", [-8.0, -1.0, 4.0, 10.0])
def test_nearly_full_and_nearly_empty_cells_are_fitted_as_well(constant):
    "Where all shares lie within a thousandth of 1, the search must not end at its first step."
    truth = {"constant": constant, "members": -1.2, "parameters": 0.6, "steps": 0.7, "K": -0.5}
    fit = fit_formula(planted_cells(truth), 0, draws=2)
    for name, value in truth.items():
        assert fit.coefficients[name] == pytest.approx(value, abs=0.01), name


def test_a_factor_that_never_varies_has_no_coefficient_of_its_own():
    cells = [cell for cell in planted_cells(TRUTH) if cell["K"] == 8 and cell["steps"] == 1000]
    cells += [cell | {"steps": 2000} for cell in cells]
    fit = fit_formula(cells, 0, draws=2)
    assert fit.coefficients["K"] == 0 and "K" not in fit.intervals and fit.ranges["K"] == (8, 8)
    assert set(fit.intervals) == {"constant", "members", "parameters", "steps"}


def test_what_makes_no_formula_is_refused():
    "Cells that hold everything, more pictures that are easier, levels where nothing can be known."
    full = [
        cell | {"levels": {"0": {"bits": 0.95, "ideal": 0.95}}} for cell in planted_cells(TRUTH)
    ]
    with pytest.raises(
        ValueError,
        match="all cells hold everything, measure more pictures: no formula fits level 0",
    ):
        fit_formula(full, 0)
    easier = fit_formula(planted_cells(TRUTH | {"members": 0.8}), 0, draws=2)
    with pytest.raises(ValueError, match="more pictures are not harder to hold"):
        pictures_held(easier, 5000, 500)
    for ideal in (0.5, 0.49, float("nan")):
        with pytest.raises(ValueError, match="nothing can be known"):
            held({"levels": {"0": {"bits": 0.5, "ideal": ideal}}}, 0)


@pytest.mark.parametrize("factor", ["steps", "parameters"])
def test_the_price_of_twice_the_pictures_is_the_planted_one(factor):
    price = price_of_doubling(planted_cells(TRUTH), 0, factor, draws=50)
    expected = 2 ** (-TRUTH["members"] / TRUTH[factor])
    assert price.times == pytest.approx(expected, rel=1e-3)
    assert price.low == pytest.approx(expected, rel=1e-2) == price.high


def test_what_does_not_help_has_no_price():
    price = price_of_doubling(planted_cells(TRUTH | {"steps": -0.1}), 0, "steps", draws=50)
    assert price.times == price.low == price.high == float("inf")


def test_a_level_without_a_formula_takes_no_measurement_along():
    "All cells are reported, and why one level has no formula."
    cells = planted_cells(TRUTH)
    for cell in cells:
        cell["levels"]["200"] = {"bits": 0.5, "ideal": 0.5}
    record = grid_record(TINY, cells)
    assert record["cells"] == cells and record["fits"]["0"]["error"] < 0.01
    assert "nothing can be known" in record["fits"]["200"]["refused"]


def test_a_grid_of_more_pictures_has_the_same_others():
    small, large = pool_of(TINY), pool_of(replace(TINY, members=(20, 400)))
    assert torch.equal(small.members, large.members[:40])
    assert torch.equal(small.reference, large.reference)
    assert torch.equal(small.others, large.others)


def test_too_few_cells_make_no_formula():
    with pytest.raises(ValueError, match="at least 6 cells, got 5"):
        fit_formula(planted_cells(TRUTH)[:5], 0)


def test_what_is_held_lies_between_a_coin_and_the_ideal():
    def cell(bits, ideal):
        return {"levels": {"0": {"bits": bits, "ideal": ideal}}}

    assert held(cell(0.5, 0.9), 0) == 0 and held(cell(0.9, 0.9), 0) == 1
    assert held(cell(0.45, 0.9), 0) == 0 and held(cell(0.95, 0.9), 0) == 1
    assert held(cell(0.7, 0.9), 0) == pytest.approx(0.5)


def test_the_study_can_be_asked_for():
    assert studies["capacity"] is STUDY and set(STUDY.parts) == {"digits", "fashion"}
