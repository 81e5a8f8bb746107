"The guard: gradients, gates, bits."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpsample.core.classifier import MLPClassifier, coverage, is_certain, random_labels
from cpsample.core.ddpm import final_sample, sample, seeded
from cpsample.core.guard import FORMS, Guard, fit_guard, protect, push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, plant_duplicates
from cpsample.core.schedule import make_schedule


def classifier(K=3, shape=(1, 8, 8)):
    "A label classifier with random, not tiny, outputs."

    def build():
        net = MLPClassifier(shape, K, width=32)
        nn.init.normal_(net.out.weight, std=1.0)
        return net

    return seeded(1, build)


def draw(model, schedule, **options):
    return final_sample(
        sample(
            model,
            schedule,
            (6, 1, 8, 8),
            40,
            clip=1,
            generator=torch.Generator().manual_seed(2),
            **options,
        )
    )


@pytest.mark.parametrize("form", FORMS)
def test_push_is_the_gradient_with_respect_to_x_t(form, generator):
    net = classifier().double()
    x, t = (
        torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64),
        torch.tensor([0, 3, 100, 399]),
    )
    found, h = push(net, x, t, form).flatten(1), 1e-6
    for k in range(64):
        step = torch.zeros(64, dtype=torch.float64)
        step[k] = h
        up, down = (FORMS[form](net(x + s * step.view(1, 8, 8), t)).mean(1) for s in (1, -1))
        torch.testing.assert_close(found[:, k], (up - down) / (2 * h), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("z", [-80.0, -20.0, 20.0, 80.0])
def test_toward_is_finite_and_does_not_vanish_at_huge_logits(z):
    x = torch.full((1, 1), z)
    assert push(
        lambda x, t: x, x, torch.zeros(1, dtype=torch.int64), "toward"
    ).item() == pytest.approx(-1 if z > 0 else 1)
    assert abs(push(lambda x, t: x, x, torch.zeros(1, dtype=torch.int64), "away").item()) < 1e-8


@pytest.mark.parametrize("z", [-3.0, -0.5, 0.5, 3.0])
def test_both_forms_have_the_sign_and_length_of_the_text(z):
    "By hand, for a classifier whose logit is x itself: −σ(|z|)·sign z, −(1 − σ(|z|))·sign z, −σ(z)."
    sigma, sign = 1 / (1 + math.exp(-abs(z))), math.copysign(1, z)
    for form, slope in (
        ("toward", -sigma * sign),
        ("away", -(1 - sigma) * sign),
        ("member", -1 / (1 + math.exp(-z))),
    ):
        assert push(
            lambda x, t: x, torch.tensor([[z]]), torch.zeros(1, dtype=torch.int64), form
        ).item() == pytest.approx(slope, rel=1e-5)


@given(z=st.floats(-30, 30), alpha=st.floats(0.001, 0.49))
@settings(deadline=None)
def test_gate_is_the_papers_in_probabilities(z, alpha):
    p = torch.sigmoid(torch.tensor(z, dtype=torch.float64)).item()
    if abs(max(p, 1 - p) - (1 - alpha)) > 1e-6:
        assert is_certain(torch.tensor([[z]]), alpha).item() == (max(p, 1 - p) > 1 - alpha)


def test_a_row_is_certain_only_when_all_its_labels_are():
    assert is_certain(
        torch.tensor([[9.0, -9.0, 9.0], [9.0, 9.0, 0.1], [0.1, 0.1, 0.1]]), 0.05
    ).tolist() == [True, False, False]


def test_scale_zero_does_not_even_ask_the_classifier(schedule):
    def loud(x, t):
        raise AssertionError("called")

    x = torch.ones(3, 2)
    assert torch.equal(
        protect(lambda x, t: 2 * x, Guard(loud, schedule, scale=0))(
            x, torch.zeros(3, dtype=torch.int64)
        ),
        2 * x,
    )


def test_push_does_not_depend_on_K_when_labels_agree():
    x, t = (
        torch.randn(5, 1, generator=torch.Generator().manual_seed(0)),
        torch.zeros(5, dtype=torch.int64),
    )
    one, many = push(lambda x, t: x, x, t), push(lambda x, t: x.expand(-1, 7), x, t)
    torch.testing.assert_close(one, many)


def test_the_formula_is_applied_on_certain_rows_only(schedule):
    model, a = (lambda x, t: torch.zeros_like(x)), 0.05
    guard = Guard(lambda x, t: 4 * x[:, :1], schedule, alpha=a, scale=3.0, t_max=400)
    x, t = (
        torch.tensor([[1.0, 9.0], [0.1, 9.0], [-1.0, 9.0], [1.0, 9.0]]),
        torch.tensor([50, 50, 399, 400]),
    )
    out = protect(model, guard)(x, t)
    sigma = torch.sigmoid(torch.tensor(4.0))
    expected = torch.zeros(4, 2)
    expected[0, 0] = 3 * (1 - schedule.abar[50]).sqrt() * 4 * sigma
    expected[2, 0] = -3 * (1 - schedule.abar[399]).sqrt() * 4 * sigma
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("t", [50, torch.tensor(50), torch.tensor([50]), torch.full((3,), 50)])
def test_one_level_for_all_rows_is_understood(t):
    guarded = protect(
        lambda x, t: torch.zeros_like(x),
        Guard(lambda x, t: 4 * x[:, :1], make_schedule(), scale=1.0),
    )
    x = torch.ones(3, 2)
    assert (
        torch.equal(guarded(x, t), guarded(x, torch.full((3,), 50)))
        and guarded(x, t)[:, 0].abs().min() > 0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_guard_keeps_its_dtype_and_the_model_its_own(dtype):
    guarded = protect(
        lambda x, t: torch.zeros_like(x),
        Guard(classifier(), make_schedule(), alpha=0.45, scale=1.0),
    )
    x, t = (
        torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 3, 50, 100, 399, 400]),
    )
    out, expected = guarded(x.to(dtype), t), guarded(x.to(dtype).float(), t)
    assert out.dtype == dtype and expected.abs().max() > 0
    torch.testing.assert_close(out.float(), expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_scale_zero_and_never_certain_change_no_bit(network, schedule, eta):
    plain = draw(network, schedule, eta=eta)
    assert torch.equal(
        plain, draw(protect(network, Guard(classifier(), schedule, scale=0)), schedule, eta=eta)
    )
    assert torch.equal(
        plain,
        draw(
            protect(network, Guard(lambda x, t: 0 * x.flatten(1)[:, :2], schedule)),
            schedule,
            eta=eta,
        ),
    )
    assert not torch.equal(
        plain,
        draw(
            protect(network, Guard(classifier(), schedule, alpha=0.4, scale=5.0)), schedule, eta=eta
        ),
    )


def test_rows_do_not_influence_each_other(network, schedule, generator):
    guarded = protect(network, Guard(classifier(), schedule, alpha=0.4, scale=5.0))
    x, t = (
        torch.randn(8, 1, 8, 8, generator=generator),
        torch.randint(400, (8,), generator=generator),
    )
    together, alone = (
        guarded(x, t),
        torch.cat([guarded(x[k : k + 1], t[k : k + 1]) for k in range(8)]),
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(classifier()(x, t)[0].sum(), x)
    assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0


def test_works_under_no_grad_and_inference_mode_and_leaves_grad_mode_alone(
    network, schedule, generator
):
    guarded = protect(network, Guard(classifier(), schedule, alpha=0.4, scale=5.0))
    x, t = torch.randn(4, 1, 8, 8, generator=generator), torch.full((4,), 10)
    with torch.no_grad():
        expected = guarded(x, t)
    with torch.inference_mode():
        torch.testing.assert_close(guarded(x.clone(), t.clone()), expected)
    steps = sample(guarded, schedule, (4, 1, 8, 8), 10)
    next(steps)
    assert torch.is_grad_enabled()


def test_classifier_is_lazy(network, schedule):
    seen = []

    def spy(x, t):
        seen.append((int(t.max()), x.requires_grad))
        return torch.full((len(x), 1), 0.1) + 0 * x.flatten(1)[:, :1]

    draw(protect(network, Guard(spy, schedule, t_max=200)), schedule)
    assert seen and max(t for t, _ in seen) < 200 and not any(grad for _, grad in seen)


def test_fit_guard_memorises_and_is_reproducible(schedule):
    x = load_digits()[0][:20]
    a, b = (fit_guard(x, schedule, K=4, steps=300, width=64, seed=3) for _ in range(2))
    assert all(
        torch.equal(p, q) for p, q in zip(a.classifier.parameters(), b.classifier.parameters())
    )
    t = torch.zeros(20, dtype=torch.int64)
    assert ((a.classifier(x, t) > 0) == (random_labels(20, 4, 3) > 0.5)).float().mean() > 0.95


def test_duplicates_are_memorised_like_the_others(schedule):
    "Exact repeats share their labels; with independent ones the guard would never be certain of them."
    x, rows = plant_duplicates(load_digits()[0][:20], 10)
    guard = fit_guard(x, schedule, K=4, steps=400, width=64)
    assert (
        guard.made["n"] == 30 and coverage(guard.classifier, x[rows], schedule, 0.2, [0])[0] > 0.9
    )


def test_save_and_load_give_the_same_guard(tmp_path, schedule, network):
    guard = Guard(
        classifier(),
        make_schedule("cosine", 500),
        0.3,
        7.0,
        "away",
        123,
        {"seed": 5},
        {"alpha": 0.3, "levels": [0, 20]},
    )
    save_guard(guard, tmp_path / "g")
    again = load_guard(tmp_path / "g")
    assert [getattr(again, k) for k in ("alpha", "scale", "form", "t_max", "made")] == [
        0.3,
        7.0,
        "away",
        123,
        {"seed": 5},
    ]
    assert again.report == guard.report and again.calibrated
    assert torch.equal(again.schedule.abar, guard.schedule.abar)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    assert torch.equal(guard.classifier(x, t), again.classifier(x, t))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "g.safetensors"]
