"No guard does nothing in silence: each way has its refusal, or its warning, in one line."

import copy
import io
import math
import pickle
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpsample.core.calibration import UncoveredGuardError, calibrate
from cpsample.core.classifier import MLPClassifier, coverage, is_certain
from cpsample.core.ddpm import (
    MLPDenoiser,
    ddpm_loss,
    final_sample,
    generate,
    sample,
    seeded,
    train,
)
from cpsample.core.guard import (
    Guard,
    IdleGuardWarning,
    UncalibratedGuardWarning,
    check_guard_fits,
    fit_guard,
    members_identity,
)
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, pixels, to_bytes
from cpsample.core.protection import protect
from cpsample.core.rejection import log_acceptance
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


def test_a_setting_that_is_changed_later_is_looked_at_again(schedule):
    guard = Guard(certain, schedule, scale=1.0, report={"alpha": 0.05})
    model, x = protect(zero_eps, guard), torch.ones(2, 3)
    guard.scale = 0
    with pytest.warns(IdleGuardWarning, match="scale is 0"):
        assert (model(x, 5) == 0).all()
    guard.scale, guard.alpha = 1.0, 0.2
    with pytest.warns(UncalibratedGuardWarning, match=r"alpha=0.2, t_max=400"):
        assert (model(x, 5) != 0).any()
    for setting, value in dict(scale=-1.0, alpha=0.7, t_max=-3, form="up").items():
        guard = Guard(certain, schedule, scale=1.0, report={"alpha": 0.05})
        model = protect(zero_eps, guard)
        setattr(guard, setting, value)
        with pytest.raises(ValueError, match=setting):
            model(x, 5)


@pytest.mark.parametrize(
    "report, calibrated",
    [
        ({"alpha": 0.05}, True),
        ({"alpha": 0.05, "t_max": 400}, True),
        ({"alpha": 0.05, "t_max": 300}, True),
        ({"alpha": 0.05, "t_max": 401}, False),  # from 400 on it is not asked any more
        ({"alpha": 0.05, "scale": 60.0}, True),
        ({"alpha": 0.05, "scale": 15.0}, True),  # it pushes harder than it was measured
        ({"alpha": 0.05, "scale": 60.1}, False),
        ({"alpha": 0.1}, False),
        ({}, False),
        (None, False),
    ],
)
def test_a_report_of_other_settings_is_none(report, calibrated, schedule):
    assert Guard(certain, schedule, report=report, t_max=400).calibrated == calibrated


def test_a_guard_is_not_asked_where_it_has_learned_nothing(schedule):
    with refused("t_max=500 is above 400, from where on"):
        Guard(certain, schedule, t_max=500, made={"t_max": 400})
    guard = Guard(certain, schedule, t_max=400, made={"t_max": 400})
    guard.t_max = 500
    with refused("learned nothing"):
        protect(zero_eps, guard)


def test_a_guard_is_put_before_a_model_once(schedule):
    guard, other = Guard(certain, schedule), Guard(certain, schedule)
    twice = protect(protect(zero_eps, guard), other)
    with refused("has this guard already"):
        protect(twice, guard)


# a classifier that says nothing


def network(**options):
    "A small label classifier for images of one channel, 4×4 pixels."

    def build():
        net = MLPClassifier((1, 4, 4), K=2, width=8, depth=1)
        torch.nn.init.normal_(net.out.weight)
        return net

    return seeded(0, build)


X = torch.randn((3, 1, 4, 4), generator=torch.Generator().manual_seed(1))


def spoiled(how):
    "A guard whose weights go bad after it was made."
    guard = Guard(network(), make_schedule(), alpha=0.4, scale=1.0)
    for parameter in guard.classifier.parameters():
        parameter.data.view(-1)[0] = how
    return guard


@pytest.mark.parametrize("how", [math.nan, math.inf])
def test_a_guard_whose_weights_went_bad_refuses_and_says_that_it_is_the_guard(how, tmp_path):
    guard = spoiled(how)
    model = protect(zero_eps, guard)
    with refused("guard's classifier are NaN: its weights hold NaN"):
        model(X, 5)
    assert model(X, 700).abs().max() == 0  # there it is not asked
    with refused("guard's weights hold NaN"):
        save_guard(guard, tmp_path / "g")
    with refused("guard's weights hold NaN"):
        Guard(guard.classifier, guard.schedule)
    assert list(tmp_path.iterdir()) == []
    with refused("guard's classifier are NaN"):
        final_sample(sample(model, guard.schedule, (2, 1, 4, 4), steps=5))


def whole(classifier):
    for parameter in classifier.parameters():
        parameter.requires_grad = False
        parameter.data = parameter.data.int()


def all_zero(classifier):
    for parameter in classifier.parameters():
        torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize(
    "spoil, words", [(whole, r"whole numbers \(torch.int32\)"), (all_zero, "weights are 0")]
)
def test_weights_that_can_say_nothing_are_refused(spoil, words, schedule, tmp_path):
    "When a guard is made, and when it is saved."
    guard = Guard(network(), schedule)
    spoil(guard.classifier)
    with refused(words):
        Guard(guard.classifier, schedule)
    with refused(words):
        save_guard(guard, tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weight: weight.int(), "out.weight are whole numbers|whole numbers"),
        (torch.zeros_like, "all of the guard's weights are 0"),
    ],
)
def test_a_file_whose_weights_can_say_nothing_is_refused(change, words, schedule, tmp_path):
    save_guard(Guard(network(), schedule), tmp_path / "g")
    path = tmp_path / "g.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors |= {name: change(tensors[name]) for name in tensors if name != "abar"}
    save_file(tensors, path, header)
    with refused(f"g.safetensors cannot be read as a guard: .*({words})"):
        load_guard(tmp_path / "g")


def overflowing(x, t):
    "Logits of a network in half precision that ends in −∞ wherever it should be sure."
    return -(x.flatten(1)[:, :1].square() + 1) * torch.inf


def test_a_members_guard_that_overflows_is_refused(schedule):
    "-∞ reads as 'surely no member'; of two-sided labels it is certain."
    guard = Guard(overflowing, schedule, form="member", scale=1.0)
    with refused("are -infinity: its classifier overflows in torch.float32"):
        protect(zero_eps, guard)(torch.ones(3, 2), 5)
    two_sided = Guard(overflowing, schedule, scale=1.0)
    assert is_certain(two_sided.logits(torch.ones(3, 2), torch.tensor([5] * 3)), 0.05).all()


def test_buffers_count_as_weights(schedule):
    net = torch.nn.BatchNorm1d(3)
    net.running_var[0] = torch.nan
    with refused("guard's weights hold NaN"):
        Guard(net, schedule)


def nan_for(rows):
    def classifier(x, t):
        logits = certain(x, t)
        return torch.where(rows[:, None], torch.nan, logits)

    return classifier


@given(rows=st.lists(st.booleans(), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_one_nan_is_enough(rows):
    rows = torch.tensor(rows)
    guard = Guard(nan_for(rows), make_schedule(), scale=1.0)
    model = protect(zero_eps, guard)
    x = torch.ones(len(rows), 2)
    if rows.any():
        with refused("guard's classifier are NaN: its classifier overflows in torch.float32"):
            model(x, 5)
    else:
        assert (model(x, 5)[:, 0] != 0).all()


def test_nan_images_are_the_models_fault_and_not_the_guards(schedule):
    guard = Guard(network(), schedule, alpha=0.4, scale=1.0)
    with refused("noisy images that it is shown .* check the model"):
        protect(zero_eps, guard)(X * torch.nan, 5)


def broken_model(x, t):
    return torch.where(t[:, None] < 300, torch.nan, x)


def test_nan_samples_of_a_guarded_model_are_the_models_fault(schedule):
    guard = Guard(certain, schedule, alpha=1e-6, scale=1.0, t_max=400)
    for model in (broken_model, protect(broken_model, Guard(certain, schedule, scale=0))):
        with pytest.raises(FloatingPointError, match=r"what it predicts is NaN or overflows"):
            final_sample(sample(model, schedule, (2, 2), steps=5))
    with refused("noisy images that it is shown"):
        final_sample(sample(protect(broken_model, guard), schedule, (2, 2), steps=20))

    model = MLPDenoiser((2,), width=8, depth=1)
    model.out.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the model's weights hold NaN"):
        final_sample(sample(model, schedule, (2, 2), steps=5))
    with pytest.raises(FloatingPointError, match="weights held NaN or infinity before the first"):
        next(train(model, partial(ddpm_loss, schedule=schedule), (torch.ones(9, 2),), 3))


def test_half_precision_that_overflows_is_refused(schedule):
    def build():
        return MLPClassifier((1, 4, 4), K=2, width=8, depth=1).half()

    guard = Guard(seeded(0, build), schedule, scale=1.0)
    guard.classifier.inp.weight.data.fill_(6e4)
    with refused("overflows in torch.float16|no numbers in torch.float16"):
        protect(zero_eps, guard)(X.abs() * 100, 5)
    with refused("no numbers in torch.float16: check the model"):
        protect(zero_eps, guard)(X * 1e6, 5)


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_logits_are_certain_and_push(sign, schedule):
    "In half precision they overflow where the gradient does not."
    guard = Guard(lambda x, t: sign * 300 * x[:, :1].half(), schedule, scale=1.0)
    x, t = torch.full((1, 2), 300.0), torch.tensor([5])
    assert guard.logits(x, t).isinf().all()
    assert is_certain(torch.tensor([[math.inf, -math.inf]]), 0.05).item()
    model = protect(zero_eps, guard)
    eps = model(x, t)
    assert eps.isfinite().all() and eps[0, 0] > 1 and model.rows_pushed == 1


@pytest.mark.parametrize(
    "logits, words",
    [
        (lambda x: x[:, 0], r"got Tensor \(3,\) for 3 rows"),
        (lambda x: x[:, None], r"got Tensor \(3, 1, 2\)"),
        (lambda x: x[:1], r"got Tensor \(1, 2\)"),
        (lambda x: x[:, :0], r"got Tensor \(3, 0\)"),
        (lambda x: (x,), r"got tuple \(\)"),
        (lambda x: None, r"got NoneType \(\)"),
        (lambda x: (x > 0).long(), "must be floating point, got torch.int64"),
        (lambda x: x > 0, "must be floating point, got torch.bool"),
    ],
)
def test_logits_of_another_form_are_refused(logits, words, schedule):
    guard = Guard(lambda x, t: logits(x), schedule)
    with refused(words):
        protect(zero_eps, guard)(torch.ones(3, 2), 5)


def test_a_guard_in_training_mode_is_refused(schedule):
    guard = Guard(network(), schedule, alpha=0.4, scale=1.0)
    for part in (guard.classifier, guard.classifier.blocks[0]):
        part.train()
        with refused("training mode, where dropout"):
            protect(zero_eps, guard)(X, 5)
        guard.classifier.eval()
    protect(zero_eps, guard)(X, 5)


@pytest.mark.parametrize("shape", [(3, 64), (3, 1, 8, 8), (3, 4, 4), (3, 1, 16, 1), (3, 2, 8)])
def test_images_of_another_shape_are_refused_also_of_as_many_pixels(shape, schedule):
    guard = Guard(network(), schedule, alpha=0.4, scale=1.0)
    with refused(r"knows images of shape \(1, 4, 4\)"):
        protect(zero_eps, guard)(torch.zeros(shape), 700)
    with refused(r"knows images of shape \(1, 4, 4\)"):
        protect(MLPDenoiser(shape[1:], width=8, depth=1), guard)


# a push that does nothing


@pytest.mark.parametrize(
    "classifier, form",
    [
        (lambda x, t: 9 + 0 * x[:, :1], "toward"),  # the same for everybody
        (lambda x, t: 9 * x[:, :1].sign(), "toward"),  # in steps
        (lambda x, t: 200 * x[:, :1], "away"),  # its push vanishes with certainty
    ],
)
def test_a_push_of_zero_warns_once(classifier, form, schedule):
    model = protect(zero_eps, Guard(classifier, schedule, scale=1.0, form=form))
    with pytest.warns(IdleGuardWarning, match="is 0 at 2 of 2 images"):
        assert model(torch.ones(2, 2), 5).abs().max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 2), 5)


@pytest.mark.parametrize(
    "scale, dtype", [(1e-30, torch.float32), (1e-9, torch.float32), (1e-4, torch.float16)]
)
def test_a_push_too_small_for_the_samples_precision_warns_once(scale, dtype, schedule):
    report = {"alpha": 0.05, "scale": 60.0}
    with pytest.warns(UncalibratedGuardWarning, match=f"scale={scale:g}"):
        model = protect(
            lambda x, t: x.clone(), Guard(certain, schedule, scale=scale, report=report)
        )
    x = torch.ones(2, 2, dtype=dtype)
    with pytest.warns(IdleGuardWarning, match="too small to change a number"):
        assert torch.equal(model(x, 5), x)
    assert model.rows_pushed == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, 5)


@pytest.mark.parametrize("steep", [torch.nan, torch.inf])
def test_a_push_that_is_no_number_is_refused(steep, schedule):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 9 + 0 * x[:, :1]

        @staticmethod
        def backward(ctx, gradient):
            return torch.full((len(gradient), 2), steep)

    guard = Guard(lambda x, t: Steep.apply(x), schedule, scale=1.0)
    with refused("guard's push is NaN or infinite"):
        protect(zero_eps, guard)(torch.ones(2, 2), 5)


def test_a_fresh_classifier_is_never_certain_and_so_warned_of_and_refused(schedule):
    "The last layer of a new network is zero: all its logits are."
    fresh = seeded(0, lambda: MLPClassifier((1, 4, 4), K=2, width=8, depth=1))
    guard = Guard(fresh, schedule)
    with pytest.warns(UncalibratedGuardWarning):
        protect(zero_eps, guard)
    with refused("certain of 0.0% of its training images"):
        calibrate(guard, X, X + 1)


@pytest.mark.parametrize("constant", [9.0, -9.0])
def test_calibration_warns_of_a_classifier_that_is_always_certain(constant, schedule):
    guard = Guard(lambda x, t: constant + 0 * x.flatten(1)[:, :2], schedule)
    with pytest.warns(IdleGuardWarning, match=r"push \(toward\) is 0 at 3 of 3 images"):
        calibrate(guard, X, X + 1)


def test_a_guard_that_is_nan_is_not_calibrated(schedule):
    for guard in (spoiled(math.nan), Guard(lambda x, t: torch.nan * x.flatten(1)[:, :1], schedule)):
        with refused("are NaN"):
            calibrate(guard, X, X + 1)
        with refused("are NaN"):
            coverage(guard.classifier, X, schedule, 0.05, [0])
        with refused("are NaN"):
            log_acceptance(guard.classifier(X, torch.tensor([5] * 3)), 0.05)


# another schedule, another answer


def test_a_protected_model_is_sampled_with_the_schedule_of_its_guard(schedule):
    model = protect(zero_eps, Guard(certain, schedule, scale=1e-3))
    assert model.schedule is schedule
    generate(model, Schedule("another name", schedule.abar), (2,), 2, steps=2)
    for other in (make_schedule("cosine"), make_schedule(T=100)):
        with refused("belongs to another noise schedule"):
            generate(model, other, (2,), 2, steps=2)


def test_a_model_whose_answer_has_another_shape_is_refused(schedule):
    model = protect(lambda x, t: torch.cat([x, x], 1), Guard(certain, schedule))
    for t in (5, 700):
        with refused(r"noise of the images' shape \(3, 2\), got \(3, 4\)"):
            model(torch.ones(3, 2), t)


# a protected network that is used further


@pytest.fixture
def model():
    "A network of points in the plane, protected, in training mode as new networks are."
    net = seeded(0, lambda: MLPDenoiser((2,), width=8, depth=1))
    torch.nn.init.normal_(net.out.weight)
    return protect(net, Guard(certain, make_schedule(), scale=1.0))


@pytest.mark.parametrize(
    "copied",
    [
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: torch.save({"model": model, "step": 3}, io.BytesIO()),
        lambda model: copy.deepcopy(torch.nn.Sequential(model)),
        lambda model: torch.optim.swa_utils.AveragedModel(model),
        lambda model: pickle.dumps(model.corrector),
    ],
)
def test_copies_and_pickles_are_refused(copied, model):
    with refused(r"neither pickled nor copied.* save its state_dict\(\)"):
        copied(model)


def test_a_trace_is_refused(model):
    inputs = torch.ones(2, 2), torch.tensor([5, 5])
    with refused("cannot be traced"):
        torch.jit.trace(model, inputs)


def test_a_compiled_one_is_still_protected(model):
    x, t = torch.randn(4, 2), torch.tensor([5, 5, 700, 700])
    expected = model.eval()(x, t)
    seen = model.rows_pushed
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x, t), expected)
    torch.testing.assert_close(
        protect(torch.compile(model.model, backend="eager"), model.guard)(x, t), expected
    )
    assert model.rows_pushed == 2 * seen == 4


def test_training_it_is_refused_before_the_first_step(model):
    "In training mode, once a gradient goes to the weights; the optimiser has not moved."
    before = copy.deepcopy(model.state_dict())
    loss = partial(ddpm_loss, schedule=model.schedule)
    with refused("cannot be trained"):
        next(train(model, loss, (torch.ones(9, 2),), 3))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for record in train(model.model, loss, (torch.ones(9, 2),), 3):
        assert record.loss > 0


def test_sampling_in_training_mode_and_gradients_in_evaluation_mode_are_not(model):
    x, t = torch.ones(2, 2, requires_grad=True), torch.tensor([5, 700])
    assert model.training
    generate(model, model.schedule, (2,), 3, steps=3)
    model(x, t)  # nobody asks for a gradient

    model.eval()
    model(x, t).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    model.train().requires_grad_(False)
    assert x.grad is not None
    model(x, t).sum().backward()  # weights that get no gradient are not trained


@pytest.mark.parametrize("depth", [1, 2])
def test_as_a_part_of_a_larger_network_it_is_saved_as_if_unguarded(depth, model, schedule):
    other = seeded(1, lambda: MLPDenoiser((2,), width=8, depth=1))
    plain = torch.nn.ModuleDict({"net": other, "linear": torch.nn.Linear(2, 2)})
    part = model if depth == 1 else protect(model, Guard(certain, schedule))
    larger = torch.nn.ModuleDict({"net": part, "linear": torch.nn.Linear(2, 2)})
    assert larger.state_dict().keys() == plain.state_dict().keys()

    larger.load_state_dict(plain.state_dict())
    for name, weight in other.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight)
    plain.load_state_dict(larger.state_dict())

    # What is missing or too much is still noticed.
    incomplete = {k: v for k, v in plain.state_dict().items() if "out" not in k}
    with pytest.raises(RuntimeError, match="Missing key"):
        larger.load_state_dict(incomplete)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        larger.load_state_dict(plain.state_dict() | {"net.extra": torch.ones(1)})


def test_a_function_has_no_weights_to_save(schedule):
    part = torch.nn.ModuleDict({"net": protect(zero_eps, Guard(certain, schedule))})
    assert dict(part.state_dict()) == {}
    part.load_state_dict({})


def test_a_guard_that_calibrate_refused_says_so_when_it_protects(schedule):
    members = load_digits()[0][:20]
    held_out = load_digits()[0][20:200]
    guard = fit_guard(members, schedule, preset="x_t", steps=2, width=16, depth=1)
    with pytest.raises(UncoveredGuardError):
        calibrate(guard, members, held_out)
    with pytest.warns(UncalibratedGuardWarning, match="calibrate has refused this guard"):
        protect(lambda x, t: x, guard)

    # One that was fit before, and is not for these images.
    guard.report, guard.refusal = {"alpha": guard.alpha, "t_max": guard.t_max}, None
    assert guard.calibrated
    with pytest.raises(UncoveredGuardError):
        calibrate(guard, held_out, members)
    assert not guard.calibrated


def test_protect_says_which_way_round_and_for_which_shape(schedule):
    guard = Guard(seeded(0, lambda: MLPClassifier((1, 4, 4), K=2, width=8, depth=1)), schedule)
    for swapped in (lambda: protect(guard, zero_eps), lambda: protect(zero_eps, zero_eps)):
        with refused("takes a denoiser and a Guard, in this order"):
            swapped()

    # The guard is asked about shapes before a network of another shape says it in its own words.
    network = seeded(0, lambda: MLPDenoiser((1, 4, 4), width=8, depth=1))
    with refused(r"knows images of shape \(1, 4, 4\), the model draws \(3, 4, 4\)"):
        generate(protect(network, guard), schedule, (3, 4, 4), 2)
