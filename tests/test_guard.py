"The guard: gradients, gates, bits; the caller's network is left alone; a model stays a model."

import inspect
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpsample.core.classifier import (
    MLPClassifier,
    TrainingSet,
    coverage,
    is_certain,
    random_labels,
    training_set,
)
from cpsample.core.copying import copy_test
from cpsample.core.ddpm import MLPDenoiser, final_sample, sample, seeded
from cpsample.core.guard import (
    FORMS,
    GUARDS,
    Guard,
    UncalibratedGuardWarning,
    fit_guard,
    frozen_copy,
    preset_settings,
    push,
)
from cpsample.core.guard_files import SETTINGS, guard_record, load_guard, save_guard
from cpsample.core.images import load_digits, plant_duplicates
from cpsample.core.protection import Correction, Corrector, level_per_row, protect
from cpsample.core.schedule import make_schedule


def classifier(K=3, shape=(1, 8, 8)):
    "A label classifier with random, not tiny, outputs."

    def build():
        net = MLPClassifier(shape, K, width=32)
        nn.init.normal_(net.out.weight, std=1.0)
        return net

    return seeded(1, build)


def first_coordinate(x, t):
    "A plain function as a classifier: one label, its logit 4·x₁."
    return 4 * x[:, :1]


def zero_eps(x, t):
    return torch.zeros_like(x)


def draw(model, schedule, eta=1.0):
    noise = torch.Generator().manual_seed(2)
    steps = sample(model, schedule, (6, 1, 8, 8), steps=40, eta=eta, clip=1, generator=noise)
    return final_sample(steps)


def push_of_logit(z, form):
    "The push of a classifier whose logit is x itself."
    t = torch.zeros(1, dtype=torch.int64)
    return push(lambda x, t: x, torch.tensor([[z]]), t, form=form).item()


# the push


@pytest.mark.parametrize("form", FORMS)
def test_push_is_the_gradient_with_respect_to_x_t(form, generator):
    net = classifier().double()
    x = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 3, 100, 399])
    gradient = push(net, x, t, form=form).flatten(1)
    h = 1e-6
    for pixel, step in enumerate(h * torch.eye(64, dtype=torch.float64)):
        ahead = FORMS[form](net(x + step.view(1, 8, 8), t)).mean(1)
        behind = FORMS[form](net(x - step.view(1, 8, 8), t)).mean(1)
        slope = (ahead - behind) / (2 * h)
        torch.testing.assert_close(gradient[:, pixel], slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("z", [-80.0, -20.0, 20.0, 80.0])
def test_toward_is_finite_and_does_not_vanish_at_huge_logits(z):
    assert push_of_logit(z, "toward") == pytest.approx(-1 if z > 0 else 1)
    assert abs(push_of_logit(z, "away")) < 1e-8


@pytest.mark.parametrize("z", [-3.0, -0.5, 0.5, 3.0])
def test_both_forms_have_the_sign_and_length_of_the_text(z):
    "By hand, for a classifier whose logit is x itself."
    sign = math.copysign(1, z)
    sigma = 1 / (1 + math.exp(-abs(z)))
    assert push_of_logit(z, "toward") == pytest.approx(-sigma * sign, rel=1e-5)
    assert push_of_logit(z, "away") == pytest.approx(-(1 - sigma) * sign, rel=1e-5)
    assert push_of_logit(z, "member") == pytest.approx(-1 / (1 + math.exp(-z)), rel=1e-5)


def test_push_does_not_depend_on_K_when_labels_agree():
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(5, dtype=torch.int64)
    one_label = push(lambda x, t: x, x, t)
    seven_labels = push(lambda x, t: x.expand(-1, 7), x, t)
    torch.testing.assert_close(one_label, seven_labels)


# the gate


@given(z=st.floats(-30, 30), alpha=st.floats(0.001, 0.49))
@settings(deadline=None)
def test_gate_is_the_papers_in_probabilities(z, alpha):
    p = torch.sigmoid(torch.tensor(z, dtype=torch.float64)).item()
    if abs(max(p, 1 - p) - (1 - alpha)) > 1e-6:
        assert is_certain(torch.tensor([[z]]), alpha).item() == (max(p, 1 - p) > 1 - alpha)


def test_a_row_is_certain_only_when_all_its_labels_are():
    logits = torch.tensor([[9.0, -9.0, 9.0], [9.0, 9.0, 0.1], [0.1, 0.1, 0.1]])
    assert is_certain(logits, 0.05).tolist() == [True, False, False]


def test_the_formula_is_applied_on_certain_rows_only(schedule):
    guard = Guard(first_coordinate, schedule, alpha=0.05, scale=3.0, t_max=400)
    x = torch.tensor([[1.0, 9.0], [0.1, 9.0], [-1.0, 9.0], [1.0, 9.0]])
    t = torch.tensor([50, 50, 399, 400])
    eps = protect(zero_eps, guard)(x, t)

    sigma = torch.sigmoid(torch.tensor(4.0))
    expected = torch.zeros(4, 2)
    expected[0, 0] = 3 * (1 - schedule.abar[50]).sqrt() * 4 * sigma
    expected[2, 0] = -3 * (1 - schedule.abar[399]).sqrt() * 4 * sigma
    torch.testing.assert_close(eps, expected)


def test_a_correction_names_the_rows_and_what_is_added_there(schedule):
    corrector = Corrector(Guard(first_coordinate, schedule, scale=0.0))
    assert corrector.correction(torch.ones(3, 2), 50, torch.ones(3, 2)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corrector = Corrector(Guard(first_coordinate, schedule, scale=1.0))

    x = torch.tensor([[0.1, 0.0], [1.0, 0.0]])
    correction = corrector.correction(x, 50, x)
    assert isinstance(correction, Correction)
    assert correction.rows.tolist() == [1]
    assert correction.delta_eps.shape == (1, 2)
    assert (corrector.rows_seen, corrector.rows_pushed) == (2, 1)


@pytest.mark.parametrize("t", [50, torch.tensor(50), torch.tensor([50]), torch.full((3,), 50)])
def test_one_level_for_all_rows_is_understood(t):
    guarded = protect(zero_eps, Guard(first_coordinate, make_schedule(), scale=1.0))
    x = torch.ones(3, 2)
    assert torch.equal(guarded(x, t), guarded(x, torch.full((3,), 50)))
    assert guarded(x, t)[:, 0].abs().min() > 0
    assert level_per_row(t, x).tolist() == [50, 50, 50]


def test_levels_for_other_rows_are_refused():
    with pytest.raises(ValueError, match="got 2 for 3 rows"):
        level_per_row(torch.tensor([1, 2]), torch.ones(3, 2))


# bits


def test_scale_zero_does_not_even_ask_the_classifier(schedule):
    def loud(x, t):
        raise AssertionError("called")

    x = torch.ones(3, 2)
    guarded = protect(lambda x, t: 2 * x, Guard(loud, schedule, scale=0))
    assert torch.equal(guarded(x, torch.zeros(3, dtype=torch.int64)), 2 * x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_scale_zero_and_never_certain_change_no_bit(network, schedule, eta):
    def draw_with(guard):
        return draw(protect(network, guard), schedule, eta=eta)

    plain = draw(network, schedule, eta=eta)
    undecided = Guard(lambda x, t: 0 * x.flatten(1)[:, :2], schedule)
    certain = Guard(classifier(), schedule, alpha=0.4, scale=5.0)
    assert torch.equal(plain, draw_with(Guard(classifier(), schedule, scale=0)))
    assert torch.equal(plain, draw_with(undecided))
    assert not torch.equal(plain, draw_with(certain))


def test_rows_do_not_influence_each_other(network, schedule, generator):
    guarded = protect(network, Guard(classifier(), schedule, alpha=0.4, scale=5.0))
    x = torch.randn(8, 1, 8, 8, generator=generator)
    t = torch.randint(400, (8,), generator=generator)
    alone = torch.cat([guarded(x[k : k + 1], t[k : k + 1]) for k in range(8)])
    torch.testing.assert_close(guarded(x, t), alone, atol=1e-5, rtol=1e-5)

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(classifier()(x, t)[0].sum(), x)
    assert gradient[0].abs().max() > 0
    assert gradient[1:].abs().max() == 0


def test_works_under_no_grad_and_inference_mode_and_leaves_grad_mode_alone(
    network, schedule, generator
):
    guarded = protect(network, Guard(classifier(), schedule, alpha=0.4, scale=5.0))
    x = torch.randn(4, 1, 8, 8, generator=generator)
    t = torch.full((4,), 10)
    with torch.no_grad():
        expected = guarded(x, t)
    with torch.inference_mode():
        torch.testing.assert_close(guarded(x.clone(), t.clone()), expected)
    next(sample(guarded, schedule, (4, 1, 8, 8), steps=10))
    assert torch.is_grad_enabled()


def test_classifier_is_lazy(network, schedule):
    levels, with_gradient = [], []

    def spy(x, t):
        levels.append(int(t.max()))
        with_gradient.append(x.requires_grad)
        return torch.full((len(x), 1), 0.1) + 0 * x.flatten(1)[:, :1]

    draw(protect(network, Guard(spy, schedule, t_max=200)), schedule)
    assert levels and max(levels) < 200
    assert not any(with_gradient)


# the caller's network is the caller's


def test_the_guard_keeps_a_frozen_copy_and_leaves_the_network_as_it_was(schedule):
    network = classifier().train()
    guard = Guard(network, schedule)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert guard.classifier is not network
    assert not guard.classifier.training
    assert not any(p.requires_grad for p in guard.classifier.parameters())


def test_training_the_network_further_does_not_change_the_guard(schedule):
    network = classifier()
    guard = Guard(network, schedule)
    x, t = torch.ones(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    before = guard.logits(x, t)
    network(x, t).sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    assert torch.equal(guard.logits(x, t), before)


def test_buffers_are_copied_too():
    network = nn.BatchNorm1d(3)
    network.running_mean.fill_(5.0)
    frozen = frozen_copy(network)
    network.running_mean.fill_(7.0)
    assert frozen.running_mean.tolist() == [5.0] * 3


# what is protected is still the model


@pytest.fixture
def protected(network, schedule):
    return protect(network, Guard(classifier(), schedule, alpha=0.45, scale=1.0))


def test_its_parameters_are_the_models(protected, network):
    assert list(map(id, protected.parameters())) == list(map(id, network.parameters()))
    assert all(p.requires_grad for p in protected.parameters())


def test_its_state_dict_is_the_models_key_by_key(protected, network):
    state, expected = protected.state_dict(), network.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_weights_of_the_model_load_into_it(protected, network):
    other = seeded(5, lambda: MLPDenoiser((1, 8, 8), width=64))
    protected.load_state_dict(other.state_dict())
    for name, weight in other.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)


def test_its_config_and_its_mode_are_the_models(protected, network):
    assert protected.config == network.config
    assert protected.eval() is protected
    assert not network.training
    protected.train()
    assert network.training
    assert not protected.guard.classifier.training


def test_a_model_in_evaluation_mode_stays_in_it(network, schedule):
    assert not protect(network.eval(), Guard(classifier(), schedule, scale=0)).training
    assert protect(network.train(), Guard(classifier(), schedule, scale=0)).training


def test_a_move_changes_the_models_precision_and_the_guards_device_alone(protected, network):
    assert protected.to(torch.float64) is protected
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert {p.dtype for p in protected.guard.classifier.parameters()} == {torch.float32}
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert protected(x, torch.full((6,), 10)).dtype == torch.float64
    assert protected.rows_pushed > 0
    protected.to("cpu")
    assert {p.device.type for p in protected.guard.classifier.parameters()} == {"cpu"}


def test_gradients_flow_through_it_in_evaluation_mode(protected, network, generator):
    x = torch.randn(4, 1, 8, 8, generator=generator)
    protected.eval()(x, torch.full((4,), 10)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in protected.guard.classifier.parameters())


def test_plain_functions_are_protected_as_well(schedule):
    guarded = protect(zero_eps, Guard(first_coordinate, schedule, scale=1.0))
    assert list(guarded.parameters()) == []
    assert guarded.config is None
    assert guarded.to(torch.float64).eval()(torch.ones(2, 2), 50).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_guard_keeps_its_dtype_and_the_model_its_own(dtype):
    guarded = protect(zero_eps, Guard(classifier(), make_schedule(), alpha=0.45, scale=1.0))
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.tensor([0, 3, 50, 100, 399, 400])
    eps, expected = guarded(x, t), guarded(x.float(), t)
    assert eps.dtype == dtype
    assert expected.abs().max() > 0
    torch.testing.assert_close(eps.float(), expected, atol=1e-4, rtol=1e-2)


def test_a_function_is_asked_in_the_precision_of_the_images(schedule):
    assert Guard(first_coordinate, schedule).cast(torch.ones(1, dtype=torch.float64)).dtype == (
        torch.float64
    )
    assert Guard(classifier(), schedule).cast(torch.ones(1, dtype=torch.float64)).dtype == (
        torch.float32
    )


# the warning


def test_the_warning_has_a_class_and_points_at_the_line_that_protects(schedule):
    guard = Guard(first_coordinate, schedule)
    with pytest.warns(UncalibratedGuardWarning, match="calibrate") as caught:
        line = inspect.currentframe().f_lineno + 1
        protect(zero_eps, guard)
    assert len(caught) == 1
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    assert issubclass(UncalibratedGuardWarning, UserWarning)


def test_the_warning_can_be_turned_off_by_its_class(schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", category=UncalibratedGuardWarning)
        protect(zero_eps, Guard(first_coordinate, schedule))


# training


def test_a_preset_takes_changes_and_fits_the_schedule():
    assert preset_settings("paper", {}, T=500)["t_max"] == 500
    assert preset_settings("paper", {"t_max": 800}, T=500)["t_max"] == 800  # refused later
    at_x_t = {**GUARDS["x_t"], "at": "x_t", "t_learn": 400}
    assert preset_settings("x_t", {"K": 3}, T=1000) == {**at_x_t, "K": 3}
    few_levels = preset_settings("x0", {}, T=100)
    assert (few_levels["t_learn"], few_levels["level"], few_levels["t_max"]) == (15, 10, 20)
    assert GUARDS["x_t"]["K"] == 8
    with pytest.raises(ValueError, match="choose one of x0, x_t, member, paper"):
        preset_settings("best", {}, T=1000)


def test_a_guard_says_in_five_lines_what_it_is(schedule):
    guard = Guard(
        first_coordinate, schedule, alpha=0.3, at="x0", made={"n": 1234, "reference": ["ff"]}
    )
    lines = repr(guard).splitlines()
    assert len(lines) == 5 and "1,234 training images" in lines[0]
    assert "not measured: calibrate(" in lines[2] and "calibrate_check(" in lines[3]
    assert "ff" not in repr(guard).replace("diffusion", "")  # sketches of images are a secret

    guard.report = dict(
        alpha=0.3,
        look=guard.look,
        manner=guard.manner,
        level=100,
        levels=[0, 100],
        coverage=[1.0, 0.97],
        false_alarms=[0.1, 0.012],
    )
    assert "97% of its training images at t = 100, and 1.2% of others" in repr(guard)
    assert "changed since" not in repr(guard)
    assert "changed since" in repr(replace(guard, alpha=0.2))

    # Who has the last word, and whether somebody is asked before.
    share = {"share": 0.99, "n": 400}
    guard.recognition = {"coverage": share, "false_alarms": {"share": 0.01}, "through": None}
    assert repr(guard).splitlines()[3].endswith("99.0% of 400 copies, 1.0% of other images")
    guard.recognition["through"] = 100
    assert repr(guard).splitlines()[3].endswith("asking the model first (t = 100)")


@pytest.mark.parametrize("T", [2, 3, 10, 13, 100, 999])
@pytest.mark.parametrize("preset", GUARDS)
def test_every_preset_fits_every_schedule(preset, T):
    settings = preset_settings(preset, {}, T=T)
    assert 1 <= settings["t_learn"] <= T and 1 <= settings["t_max"] <= T
    assert 0 <= settings.get("level", 0) < settings["t_learn"]


@pytest.mark.parametrize("name", ["level", "noisings", "moves"])
@pytest.mark.parametrize("number", [1.5, True, "1"])
def test_counts_are_whole_numbers(schedule, name, number):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        Guard(first_coordinate, schedule, alpha=0.3, at="x0", **{name: number})


@pytest.mark.parametrize("n", [1, 5])
def test_one_image_is_refused_before_a_guard_of_predictions_is_trained(schedule, n):
    alone = load_digits()[0][:1].expand(n, -1, -1, -1)
    with pytest.raises(ValueError, match="at least 2 different training images"):
        fit_guard(alone, schedule, steps=10**9)
    fit_guard(alone, schedule, preset="x_t", steps=2)


@pytest.mark.parametrize("change", [{"clip": 0.05}, {"form": "member"}, {"moves": 1}], ids=str)
def test_a_guard_that_pushes_in_another_manner_is_not_calibrated(schedule, change):
    guard = Guard(first_coordinate, schedule, alpha=0.3, at="x0", clip=1.0)
    measured = dict(alpha=0.3, look=guard.look, manner=guard.manner)
    assert replace(guard, report=measured).calibrated
    assert not replace(guard, report=measured, **change).calibrated


@pytest.mark.parametrize("change", [("longest", 0.01), ("moves", 1), ("clip", 0.05)], ids=str)
def test_a_guard_that_is_weakened_while_it_protects_is_looked_at_again(schedule, change):
    guard = Guard(first_coordinate, schedule, alpha=0.3, at="x0", clip=1.0)
    guard.report = dict(alpha=0.3, look=guard.look, manner=guard.manner, longest=guard.longest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        protected = protect(zero_eps, guard)
        protected(torch.zeros(2, 3), torch.tensor([5, 5]))
    setattr(protected.guard, *change)
    with pytest.warns(UncalibratedGuardWarning):
        protected(torch.zeros(2, 3), torch.tensor([5, 5]))


def test_what_nearly_is_a_member_does_not_unteach_it(schedule):
    "A reference image a tenth of the way to the next member: undecided there is unprotected here."
    x = load_digits()[0]
    members, reference = x[:20], x[20:60]
    almost = members[3:4] + 0.1 * (members[4:5] - members[3:4])
    data = training_set(members, torch.cat([reference[:5], almost, reference[5:]]), K=3)
    plain = training_set(members, reference, K=3)
    assert torch.equal(data.images, plain.images) and torch.equal(data.weights, plain.weights)
    assert "reference" in fit_guard(members, schedule, reference, steps=1, width=8).made

    # Two members the same: nobody can be near to one of two.
    alone = training_set(members[:1].repeat(2, 1, 1, 1), reference, K=3)
    assert len(alone.images) == 42
    with pytest.raises(ValueError, match="every reference image is nearly a member"):
        training_set(members, almost, K=3)

    # Halfway between two members is 1; at 0.6 it depends on what is asked for.
    between = members[:1] + 0.375 * (members[1:2] - members[:1])
    pair = members[:2]
    more = torch.cat([reference, between])
    assert copy_test(between, pair).score.item() == pytest.approx(0.6, abs=1e-3)
    for strangers, is_taught in ((1 / 2, True), (2 / 3, False)):
        images = training_set(pair, more, K=3, strangers=strangers).images
        assert any(torch.equal(image, between[0]) for image in images) == is_taught


def test_a_guard_is_taught_by_the_strangers_that_are_asked_for(monkeypatch):
    asked = []

    def noted(members, reference, K, **how):
        asked.append(how["strangers"])
        return training_set(members, reference, K, **how)

    monkeypatch.setattr("cpsample.core.guard.training_set", noted)
    x, _ = load_digits()
    for asked_for in ({}, {"strangers": 2 / 3}):
        fit_guard(x[:4], make_schedule(), x[4:60], steps=1, width=8, depth=1, **asked_for)
    assert asked == [1 / 2, 2 / 3]


def test_a_training_set_says_what_is_what():
    x = load_digits()[0][:12]
    data = training_set(x[:4], x[4:], K=3)
    assert isinstance(data, TrainingSet)
    assert data.targets[4:].unique().tolist() == [0.5]
    assert data.weights[:4].sum() == pytest.approx(data.weights[4:].sum().item())
    assert training_set(x[:4], None, K=3).weights is None


def test_fit_guard_memorises_and_is_reproducible(schedule):
    x = load_digits()[0][:20]
    first, second = (fit_guard(x, schedule, K=4, steps=300, width=64, seed=3) for _ in range(2))
    pairs = zip(first.classifier.parameters(), second.classifier.parameters())
    assert all(torch.equal(weight, same) for weight, same in pairs)

    logits = first.logits(x, torch.zeros(20, dtype=torch.int64))
    right = (logits > 0) == (random_labels(20, 4, 3) > 0.5)
    assert right.float().mean() > 0.95


def test_a_network_that_is_brought_along_stays_trainable(schedule):
    network = classifier(K=2)
    guard = fit_guard(load_digits()[0][:10], schedule, K=2, steps=3, classifier=network)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert torch.equal(guard.classifier.out.weight, network.out.weight)


def test_duplicates_are_memorised_like_the_others(schedule):
    "Exact repeats share their labels; else the guard would never be certain of them."
    x, rows = plant_duplicates(load_digits()[0][:20], 10)
    guard = fit_guard(x, schedule, K=4, steps=400, width=64)
    assert guard.made["n"] == 30
    assert coverage(guard.classifier, x[rows], schedule, 0.2, [0])[0] > 0.9


# on disk


@pytest.fixture
def unusual():
    "A guard none of whose settings is a default."
    return Guard(
        classifier(),
        make_schedule("cosine", 500),
        alpha=0.3,
        scale=7.0,
        form="away",
        t_max=123,
        made={"seed": 5},
        report={"alpha": 0.3, "levels": [0, 20]},
    )


def test_save_and_load_give_the_same_guard(tmp_path, unusual):
    save_guard(unusual, tmp_path / "g")
    loaded = load_guard(tmp_path / "g")
    for attribute in SETTINGS.values():
        assert getattr(loaded, attribute) == getattr(unusual, attribute)
    assert loaded.calibrated
    assert loaded.schedule.name == "cosine"
    assert torch.equal(loaded.schedule.abar, unusual.schedule.abar)

    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    assert torch.equal(loaded.logits(x, t), unusual.logits(x, t))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "g.safetensors"]


@pytest.mark.parametrize("written, read", [("g", "g.safetensors"), ("g.safetensors", "g")])
def test_the_ending_may_be_given_or_not(written, read, tmp_path, unusual):
    save_guard(unusual, tmp_path / written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "g.safetensors"]
    assert load_guard(tmp_path / read).alpha == unusual.alpha
    with pytest.raises(FileNotFoundError, match=r"no guard at .*/h.safetensors"):
        load_guard(str(tmp_path / "h.safetensors"))


def test_names_in_the_file_are_those_of_last_year(tmp_path, unusual):
    "Files outlive attributes: rename those as you like, but never these."
    save_guard(unusual, tmp_path / "g")
    record = json.loads((tmp_path / "g.json").read_text())
    settings_in_file = ["alpha", "scale", "form", "t_max", "made", "report"]
    settings_in_file += ["at", "level", "noisings", "moves", "longest", "clip", "recognition"]
    assert list(record) == [*settings_in_file, "schedule", "network", "config"]
    assert record == guard_record(unusual)
