"Every Gaussian path: levels found again, answers read and changed, one guard on all of them."

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_guards import SCHEDULE, looking, pictures
from torch import nn

from cpsample.core.ddpm import MLPDenoiser, sample, seeded
from cpsample.core.guard import IdleGuardWarning, UncalibratedGuardWarning, correct_at_x_t
from cpsample.core.paths import (
    PREDICTIONS,
    OtherPathWarning,
    ddpm_path,
    edm_network_path,
    edm_path,
    flow_loss,
    flow_path,
    protect_path,
    walk,
)
from cpsample.core.predicted import undecided
from cpsample.core.protection import protect
from cpsample.core.schedule import Schedule, abar_at, level_of, make_schedule

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{UncalibratedGuardWarning.__module__}.UncalibratedGuardWarning"
)

# path, prediction, times at which it is asked: from little noise to much
WAYS = {
    "eps": (ddpm_path(SCHEDULE), torch.tensor([5.0, 100.5, 300, 600, 850, 990])),
    "v": (ddpm_path(SCHEDULE), torch.tensor([5, 100, 300, 600, 850, 990])),
    "flow": (flow_path(), torch.tensor([0.01, 0.2, 0.5, 0.7, 0.9, 0.99])),
    "x0": (edm_path(), torch.tensor([0.02, 0.3, 1.0, 3.0, 10.0, 70.0])),
    "edm": (edm_network_path(), torch.tensor([0.02, 0.3, 1.0, 3.0, 10.0, 70.0]).log() / 4),
}


def wave(x, time):
    return (3 * x).sin()


def per_row(numbers):
    return numbers.view(-1, 1, 1, 1)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.floats(0, 999), st.sampled_from(["linear", "cosine"]))
def test_the_level_of_a_share_is_the_one_that_has_it(level, name):
    schedule = make_schedule(name)
    abar = abar_at(schedule, torch.tensor([level], dtype=torch.float64)).double()
    again = abar_at(schedule, level_of(schedule, abar)).double()
    torch.testing.assert_close(again, abar, rtol=1e-3, atol=1e-7)


def test_whole_levels_are_found_as_whole_ones_and_the_ends_hold():
    assert torch.equal(level_of(SCHEDULE, SCHEDULE.abar), torch.arange(1000).double())
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert level_of(SCHEDULE, ends).tolist() == [0, 999]
    flat = Schedule("flat", torch.tensor([0.9, 0.5, 0.5, 0.0]))
    assert level_of(flat, torch.tensor([0.95, 0.9, 0.5, 0.0])).tolist() == [0, 0, 1, 3]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie within 0 … 1"):
            level_of(SCHEDULE, torch.tensor([wrong]))


@pytest.mark.parametrize("name", WAYS)
def test_the_new_answer_leads_to_the_moved_picture(name):
    "Of rows that the guard is certain of; all others keep every bit."
    path, times = WAYS[name]
    guard, x, time = looking(), pictures(60), times.repeat(10)
    model = protect_path(wave, guard, path, name)
    plain, answer = wave(x, time), model(x, time)

    a, b = path.signal(time.double()), path.noise(time.double())
    of_x, of_answer = [per_row(number).float() for number in PREDICTIONS[name](a, b)]
    x0 = of_x * x + of_answer * plain
    rows, moved = undecided(guard, x0)
    assert 0 < len(rows) < 60 and model.rows_pushed == len(rows) and model.rows_seen == 60
    new_x0 = (of_x * x + of_answer * answer)[rows]
    scale = 1 + of_x.abs().max() * x.abs().max()  # of the rounding, where x0 is a difference
    torch.testing.assert_close(new_x0 / scale, moved / scale, rtol=1e-3, atol=1e-5)
    kept = torch.ones(60, dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(answer[kept], plain[kept])


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.floats(0.05, 2), st.floats(0.05, 20))
def test_every_answer_is_read_on_every_path(a, b):
    "Whoever knows x0 and ε answers so, whatever signal and noise there are."
    x0, eps = torch.randn((2, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, size, sigma = a * x0 + b * eps, (a**2 + b**2) ** 0.5, b / a
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5
    answers = {
        "eps": eps,
        "x0": x0,
        "v": (a * eps - b * x0) / size,
        "flow": eps - x0,
        "edm": (x0 - c_skip * x / a) / c_out,
    }
    assert set(answers) == set(PREDICTIONS)
    a, b = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    for name, answer in answers.items():
        of_x, of_answer = PREDICTIONS[name](a, b)
        torch.testing.assert_close(of_x * x + of_answer * answer, x0)


def test_at_x_t_a_velocity_changes_by_the_change_of_the_noise_over_the_signal():
    guard, x = looking(at="x_t", scale=3.0), pictures(60)
    tau = torch.linspace(0.02, 0.98, 60)
    model = protect_path(wave, guard, flow_path(), "flow")
    size = ((1 - tau) ** 2 + tau**2).sqrt()
    level = level_of(SCHEDULE, ((1 - tau) ** 2 / size**2).double()).float()
    rows, delta_eps = correct_at_x_t(guard, x / per_row(size), level, x)
    wanted = wave(x, tau).index_add(0, rows, delta_eps / per_row(1 - tau[rows]))
    assert 0 < len(rows) < 60
    torch.testing.assert_close(model(x, tau), wanted, rtol=1e-3, atol=1e-3)


def test_on_the_path_of_its_schedule_it_is_protect():
    x, t = pictures(40), torch.arange(40) * 25
    for at in ("x0", "x_t"):
        guard = looking(at=at, t_max=500)
        by_path, by_level = (
            protect_path(wave, guard, ddpm_path(SCHEDULE), "eps"),
            protect(wave, guard),
        )
        torch.testing.assert_close(by_path(x, t), by_level(x, t), rtol=1e-3, atol=1e-3)
        assert by_path.rows_pushed == by_level.rows_pushed > 0


def test_it_is_asked_below_its_t_max_by_whatever_clock():
    "At the same ᾱ on every path, and nowhere in pure noise."
    asked = []

    def classifier(x, t):
        asked.append(len(x))
        return 9 + x.flatten(1)[:, :1]

    sigma = ((1 - SCHEDULE.abar) / SCHEDULE.abar).sqrt().double()[[399, 400]]
    times = {
        "x0": sigma,
        "edm": sigma.log() / 4,
        "flow": sigma / (1 + sigma),
        "v": torch.tensor([399, 400]),
    }
    for name, time in times.items():
        asked.clear()
        model = protect_path(wave, looking(classifier, t_max=400), WAYS[name][0], name)
        model(pictures(2), time)
        assert asked[0] == 1, name
    asked.clear()
    model = protect_path(wave, looking(classifier), flow_path(), "flow")
    x = pictures(2)
    assert torch.equal(model(x, torch.tensor([1.0, 0.0])), wave(x, None)) and not asked


def test_noise_far_below_the_first_level_makes_no_difference_to_the_picture():
    "EDM ends at σ = 0.002, the guard's schedule at 0.01."
    guard, x0 = looking(), pictures(20)
    model = protect_path(lambda x, sigma: x0, guard, edm_path(), "x0")
    wanted = x0.index_copy(0, *undecided(guard, x0))
    for sigma in (1e-6, 0.002, 1.0, 80.0):
        torch.testing.assert_close(model(x0, torch.full((20,), sigma)), wanted)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from(list(WAYS)))
def test_a_row_decides_for_itself(order, kept, name):
    path, time = WAYS[name]
    x, rows = pictures(6), torch.tensor(order[:kept])
    model = protect_path(wave, looking(), path, name)
    torch.testing.assert_close(
        model(x[rows], time[rows]), model(x, time)[rows], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", WAYS)
def test_scale_zero_and_never_certain_change_no_bit(name):
    path, time = WAYS[name]
    x = pictures(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleGuardWarning)
        idle = protect_path(wave, looking(scale=0.0), path, name)
    never = protect_path(wave, looking(lambda x, t: 0 * x.flatten(1)[:, :2]), path, name)
    for model in (idle, never):
        assert torch.equal(model(x, time), wave(x, time)) and model.rows_pushed == 0
    assert not torch.equal(protect_path(wave, looking(), path, name)(x, time), wave(x, time))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_looks_in_full_and_answers_in_half(dtype):
    x, v = pictures(30).to(dtype), pictures(30, seed=1).to(dtype)
    tau = torch.linspace(0.05, 0.9, 30)
    model = protect_path(lambda x, tau: v, looking(), flow_path(), "flow")
    full = protect_path(lambda x, tau: v.float(), looking(), flow_path(), "flow")
    answer, wanted = model(x, tau), full(x.float(), tau)
    assert answer.dtype == dtype and model.rows_pushed == full.rows_pushed > 0
    torch.testing.assert_close(answer.float(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


def test_no_gradient_goes_through_the_model():
    x = pictures(6).requires_grad_()
    model = protect_path(wave, looking(), flow_path(), "flow")
    tau = torch.full((6,), 0.4)
    answer = model(x, tau)
    assert model.rows_pushed > 0
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    torch.testing.assert_close(gradient, 3 * (3 * x).cos().detach())


def test_what_is_refused_and_what_is_told():
    with pytest.raises(ValueError, match="unknown prediction 'speed': choose one of eps, x0, v"):
        protect_path(wave, looking(), flow_path(), "speed")
    with pytest.raises(ValueError, match="takes a denoiser and a Guard, in this order"):
        protect_path(looking(), wave, flow_path(), "flow")
    model = protect_path(wave, looking(), flow_path(), "flow")
    with pytest.raises(ValueError, match="has this guard already"):
        protect_path(model, model.guard, flow_path(), "flow")
    with pytest.raises(ValueError, match="one level or one per row"):
        model(pictures(3), torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="knows images of shape"):
        model(pictures(3, shape=(1, 5, 5)), 0.5)
    with pytest.warns(UncalibratedGuardWarning) as told:
        protect_path(wave, looking(), flow_path(), "flow")
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "path, time",
    [
        (flow_path(), 500.0),
        (flow_path(), 1.01),
        (flow_path(1000), -1.0),
        (flow_path(), float("nan")),
        (edm_path(), -0.5),
    ],
)
def test_a_time_beyond_the_clock_is_refused(path, time):
    "Its square would hide the sign, and the guard would look on in silence."
    model = protect_path(wave, looking(), path, "flow")
    x = torch.randn(4, 1, 4, 4)
    times = torch.tensor([0.5, 0.2, time, 0.9])
    with pytest.raises(ValueError, match="beyond the clock of the path"):
        model(x, times)
    with pytest.raises(ValueError, match="beyond the clock of the path"):
        walk(wave, path, "flow", x=x, times=[time, 0.0])


@pytest.mark.parametrize(
    "path, times, size",
    [
        (edm_network_path(), [80.0, 10.0, 1.0], 80.0),  # a σ-model, taken for EDM's network
        (flow_path(1000), [1.0, 0.8, 0.6, 0.4, 0.2], 1.0),  # a flow with another clock
        (ddpm_path(SCHEDULE), [0.999, 0.7, 0.5, 0.2, 0.0], 1.0),  # a DDPM that is told t/1000
        (flow_path(), [0.01, 0.005], 20.0),
    ],
)
def test_a_plausible_path_that_is_another_is_told(path, times, size):
    x = size * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = protect_path(wave, looking(), path, "flow")
    with pytest.warns(OtherPathWarning, match="is it the model's path") as told:
        for time in times:
            model(x, time)
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize(
    "path, times",
    [(edm_path(), (80.0, 9, 1, 0.1, 0.01, 0.002)), (flow_path(1000), (1000, 700, 300, 90, 20, 1))],
)
def test_images_of_a_path_are_believed_whatever_the_noise(path, times, recwarn):
    generator = torch.Generator().manual_seed(0)
    model = protect_path(wave, looking(), path, "flow")
    for time in torch.tensor(times):
        for picture in (torch.zeros(4, 1, 4, 4), torch.ones(4, 1, 4, 4)):
            noise = torch.randn(picture.shape, generator=generator)
            model(path.signal(time) * picture + path.noise(time) * noise, time)
    assert not [one for one in recwarn if issubclass(one.category, OtherPathWarning)]


PICTURES = 2.0 * torch.randint(2, (8, 1, 4, 4), generator=torch.Generator().manual_seed(1)) - 1


def who_knows_the_pictures(path, kind):
    "A network that has `PICTURES` in mind, whatever it is shown, and answers in one kind."

    def answer(x, time):
        a, b = path.parts(time.double().expand(len(x)))
        of_x, of_answer = (per_row(part).float() for part in PREDICTIONS[kind](a, b))
        return (PICTURES - of_x * x) / of_answer

    return answer


def ask_along(model, path):
    "Ask about noised pictures, from much noise to little, as a sampler does."
    generator = torch.Generator().manual_seed(0)
    start = 0.99 if path.name == "flow matching" else 999.0
    for time in torch.linspace(start, start / 50, 40):
        noise = torch.randn(PICTURES.shape, generator=generator)
        model(path.signal(time) * PICTURES + path.noise(time) * noise, time)


OTHER_READINGS = [
    (flow_path(), "flow", "eps"),
    (flow_path(), "flow", "x0"),
    (ddpm_path(SCHEDULE), "eps", "x0"),
    (ddpm_path(SCHEDULE), "x0", "eps"),
    (ddpm_path(SCHEDULE), "v", "eps"),
    (ddpm_path(SCHEDULE), "v", "x0"),
]


@pytest.mark.parametrize("path, answered, read", OTHER_READINGS)
def test_an_answer_that_is_read_as_another_kind_is_told(path, answered, read, recwarn):
    network = who_knows_the_pictures(path, answered)
    ask_along(protect_path(network, looking(), path, answered), path)
    assert not [one for one in recwarn if issubclass(one.category, OtherPathWarning)]
    with pytest.warns(OtherPathWarning, match="is the prediction the model's") as told:
        ask_along(protect_path(network, looking(), path, read), path)
    (one,) = [one for one in told if issubclass(one.category, OtherPathWarning)]
    assert one.filename == __file__


def test_rows_of_much_and_of_little_noise_in_one_call_are_told_once():
    model = protect_path(lambda x, time: 3 * x, looking(), flow_path(), "eps")
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(OtherPathWarning, match="is the prediction the model's") as told:
        model(x, torch.tensor([0.75, 0.1]).repeat_interleave(4))
    assert sum(issubclass(one.category, OtherPathWarning) for one in told) == 1


def test_what_makes_a_path_is_not_a_path():
    with pytest.raises(ValueError, match="must be a GaussianPath, such as flow_path()"):
        protect_path(wave, looking(), flow_path, "flow")


def test_a_protected_network_is_a_network():
    network = seeded(2, lambda: MLPDenoiser((1, 4, 4), width=16, depth=1)).eval()
    nn.init.normal_(network.out.weight, std=0.1)
    model = protect_path(network, looking(), flow_path(1000), "flow")
    assert model.schedule is None and set(model.state_dict()) == set(network.state_dict())
    assert protect(network, looking()).schedule is SCHEDULE
    assert model.for_rows(slice(0, 2), 4) is model
    assert len(list(sample(model, make_schedule("cosine"), (2, 1, 4, 4), steps=2))) == 2


def test_the_loss_of_a_flow_is_zero_for_whoever_knows_the_answer():
    x0 = torch.ones(50, 1, 4, 4)
    seen = []

    def knows(x, time):
        seen.append(time)
        tau = per_row(time / 1000)
        return (x - x0) / tau  # (x − x0) / τ = ε − x0

    loss = flow_loss(knows, x0, generator=torch.Generator().manual_seed(0))
    assert loss < 1e-6 and 0 < seen[0].min() < 100 and 900 < seen[0].max() < 1000


def test_a_walk_ends_at_the_picture_that_the_model_has_in_mind():
    "On every path, in steps of any number; and clipped, if so wished."
    x0, noise = 2 * torch.ones(3, 1, 4, 4), pictures(3)
    sigmas = [80.0, 5.0, 0.5, 0.0]
    ways = {
        "flow": (lambda x, tau: (x - x0) / per_row(tau), [1.0, 0.6, 0.3, 0.0], noise),
        "x0": (lambda x, sigma: x0, sigmas, 80 * noise),
    }
    for name, (model, times, x) in ways.items():
        path = WAYS[name][0]
        torch.testing.assert_close(walk(model, path, name, x=x, times=times), x0)
        clipped = walk(model, path, name, x=x, times=times, clip=1)
        torch.testing.assert_close(clipped, torch.ones_like(x0))


def test_a_guard_of_another_schedule_does():
    "Its level is found in its own schedule."
    cosine = replace(looking(t_max=700), schedule=make_schedule("cosine"))
    x, tau = pictures(20), torch.linspace(0.1, 0.9, 20)
    model = protect_path(wave, cosine, flow_path(), "flow")
    changed = (model(x, tau) != wave(x, tau)).flatten(1).any(1)
    size = (1 - tau) ** 2 + tau**2
    above = (1 - tau) ** 2 / size <= make_schedule("cosine").abar[700]
    assert changed.any() and above.any() and not changed[above].any()
