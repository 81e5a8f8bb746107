"The last word: verdicts row by row, a fair threshold, refusals, and a check that goes stale."

import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpsample.core.calibration import UncoveredGuardError, UncoveredMemberWarning
from cpsample.core.classifier import MLPClassifier
from cpsample.core.copying import CHANGES, copy_test, plant
from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.core.guard import Guard
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, to_bytes
from cpsample.core.predicted import _fixed_noise
from cpsample.core.protection import protect
from cpsample.core.recognition import (
    LEAST_COPIES,
    _noise_of_check,
    calibrate_check,
    check_recognition,
    choose_threshold,
    copies_among,
    cross_judged,
    drawn_by,
    familiarity,
    least_known,
    noised_members,
    probed,
    recognise,
)
from cpsample.core.schedule import make_schedule
from cpsample.practice.unet import UNetClassifier

SCHEDULE = make_schedule()
DIGITS, _ = load_digits()
MEMBERS, OTHERS = DIGITS[:20], DIGITS[200:400]


class Memory(nn.Module):
    "A classifier that has memorised members: its one logit falls with the distance to the nearest."

    def __init__(self, members, height=6.0):
        super().__init__()
        self.members = nn.Parameter(members.flatten(1).clone())
        self.height = nn.Parameter(torch.tensor(height))

    def forward(self, x_t, t):
        distance = torch.cdist(x_t.flatten(1).float(), self.members.float())
        return (self.height.float() - 2 * distance.amin(1, keepdim=True)).to(self.height.dtype)


def knowing(members=MEMBERS, **settings):
    "A guard that knows members: only one side of its label counts."
    return Guard(Memory(members), SCHEDULE, form="member", **settings)


@pytest.fixture
def guard():
    guard = knowing()
    calibrate_check(guard, MEMBERS, OTHERS)
    return guard


@pytest.fixture
def network_guard():
    "A guard whose network knows nothing, with a threshold in the middle of its scores."

    def build():
        net = MLPClassifier((1, 8, 8), 3, width=32)
        nn.init.normal_(net.out.weight, std=1.0)
        return net

    guard = Guard(seeded(1, build), SCHEDULE)
    middle = familiarity(guard, OTHERS).median().item()
    calibrated = knowing()
    calibrate_check(calibrated, MEMBERS, OTHERS)
    look = probed(guard, MEMBERS, [0])
    guard.recognition = calibrated.recognition | look | {"threshold": middle}
    return guard


# a verdict


def test_copies_are_recognised_and_others_are_not(guard):
    assert recognise(guard, MEMBERS).tolist() == [True] * 20
    assert not recognise(guard, OTHERS).any()
    verdict = recognise(guard, MEMBERS[:3])
    assert verdict.dtype == torch.bool and verdict.shape == (3,)


@given(order=st.permutations(range(12)), size=st.integers(1, 12))
@settings(max_examples=20, derandomize=True, deadline=None)
def test_a_rows_verdict_does_not_depend_on_its_neighbours(order, size):
    guard = knowing()
    calibrate_check(guard, MEMBERS, OTHERS)
    x = torch.cat([MEMBERS[:6], OTHERS[:6]])
    alone = torch.cat([recognise(guard, row[None]) for row in x])
    rows = torch.tensor(order)[:size]
    assert torch.equal(recognise(guard, x[rows]), alone[rows])


def test_familiarity_is_a_rows_own_in_a_network_too(network_guard):
    alone = torch.cat([familiarity(network_guard, row[None]) for row in OTHERS[:30]])
    together = familiarity(network_guard, OTHERS)[:30]
    torch.testing.assert_close(together, alone)
    again = familiarity(network_guard, OTHERS)[:30]
    assert torch.equal(together, again)


def test_no_images_have_no_familiarity():
    "Where pixels are unshuffled, torch gives an empty batch back as it was."
    unet = UNetClassifier((1, 8, 8), 3, width=8)
    assert familiarity(Guard(unet, SCHEDULE), MEMBERS[:0]).shape == (0,)


def test_familiarity_averages_logits_and_not_certainties():
    "Views that contradict each other cancel."

    def by_level(x_t, t):
        return torch.where(t == 0, 5.0, -5.0)[:, None].expand(-1, 2)

    guard = Guard(by_level, SCHEDULE)
    x = torch.zeros(2, 2)
    assert familiarity(guard, x).tolist() == [5, 5]
    assert familiarity(guard, x, levels=[0, 50]).tolist() == [0, 0]


def test_a_mirror_image_is_recognised_only_if_asked_about():
    x = torch.cat([MEMBERS.flip(-1), OTHERS[:5]])
    for mirrored in (False, True):
        guard = knowing()
        calibrate_check(guard, MEMBERS, OTHERS, mirrored=mirrored)
        assert recognise(guard, x)[:20].all() == mirrored
        assert not recognise(guard, x)[20:].any()
        assert recognise(guard, MEMBERS).all()


def test_points_latents_bytes_and_an_empty_batch_are_judged(guard):
    assert torch.equal(recognise(guard, to_bytes(MEMBERS)), recognise(guard, MEMBERS))
    assert recognise(guard, MEMBERS[:0]).shape == (0,)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2,), (4, 4, 4)):
        members, others = 3 * torch.randn((2, 60, *shape), generator=generator)
        of_latents = Guard(Memory(members[:20]), SCHEDULE, form="member")
        calibrate_check(of_latents, members[:20], others, wanted=0.5, allowed=0.2)
        assert recognise(of_latents, members[:20]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_judge_alike(dtype, guard):
    x = torch.cat([MEMBERS, OTHERS])
    verdict = recognise(guard, x)
    assert torch.equal(recognise(guard, x.to(dtype)), verdict)
    guard.classifier.to(dtype)
    assert torch.equal(recognise(guard, x), verdict)
    with torch.inference_mode():
        assert torch.equal(recognise(guard, x), verdict)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_on_a_gpu_are_judged_there(network_guard):
    verdict = recognise(network_guard, OTHERS)
    on_gpu = recognise(network_guard, OTHERS.cuda())
    assert on_gpu.is_cuda and (on_gpu.cpu() == verdict).float().mean() > 0.99


def test_what_cannot_be_judged_is_refused(guard):
    with_nan = MEMBERS[:3].clone()
    with_nan[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, first in row 1"):
        recognise(guard, with_nan)
    of_pictures = replace(guard, clip=1.0)
    with pytest.raises(ValueError, match="images lie in"):
        recognise(of_pictures, (MEMBERS + 1) * 127.5)


def test_images_of_another_shape_are_refused(network_guard):
    with pytest.raises(ValueError, match=r"knows images of shape \(1, 8, 8\)"):
        recognise(network_guard, torch.zeros(2, 1, 9, 9))


# a check that nobody has calibrated, or that has gone stale


def test_an_uncalibrated_guard_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"calibrate_check\(.*cpsample guard RUN --check") as error:
        recognise(knowing(), MEMBERS)
    assert "\n" not in str(error.value)


def changed_weights(guard):
    with torch.no_grad():
        guard.classifier.height += 1


def changed_classifier(guard):
    guard.classifier = Memory(MEMBERS + 0.1)


def changed_schedule(guard):
    guard.schedule = make_schedule("cosine", 50)


def changed_levels(guard):
    guard.recognition = guard.recognition | {"levels": [0, 300]}


def two_sided(guard):
    guard.form = "toward"


def probe_of_nan(guard):
    guard.recognition = guard.recognition | {"probe": [math.nan]}


def boundless(guard):
    guard.recognition = guard.recognition | {"threshold": math.inf}


def more_labels(guard):
    guard.classifier = lambda x_t, t: Memory(MEMBERS)(x_t, t).expand(-1, 2)


@pytest.mark.parametrize(
    "change",
    [
        changed_weights,
        changed_classifier,
        changed_schedule,
        changed_levels,
        two_sided,
        probe_of_nan,
        boundless,
        more_labels,
    ],
)
def test_a_check_is_stale_when_its_guard_has_changed(change, guard):
    check_recognition(guard)
    change(guard)
    for ask in (check_recognition, lambda guard: recognise(guard, MEMBERS)):
        with pytest.raises(
            ValueError, match="measured with another classifier or form, or at other"
        ):
            ask(guard)


def test_gate_and_strength_may_change(guard):
    other = replace(guard, alpha=0.3, scale=0.0)
    assert torch.equal(recognise(other, MEMBERS), recognise(guard, MEMBERS))


def test_a_file_keeps_the_check(tmp_path, network_guard):
    save_guard(network_guard, tmp_path / "g")
    loaded = load_guard(tmp_path / "g")
    assert loaded.recognition == network_guard.recognition
    assert torch.equal(recognise(loaded, OTHERS), recognise(network_guard, OTHERS))

    network_guard.recognition = {"levels": [0]}
    save_guard(network_guard, tmp_path / "g")
    with pytest.raises(ValueError, match="cannot be read as a guard"):
        load_guard(tmp_path / "g")


@pytest.mark.parametrize(
    "damage",
    [
        {"threshold": math.nan},
        {"threshold": math.inf},
        {"threshold": "3"},
        {"probe": [math.nan] * 3},
        {"levels": []},
        {"levels": "0"},
        {"noisings": 1.5},
        {"mirrored": "no"},
        *({name: None} for name in ("threshold", "probe", "levels", "noisings", "shape")),
    ],
    ids=str,
)
def test_a_damaged_check_is_no_check(tmp_path, network_guard, damage):
    kept = network_guard.recognition | damage
    network_guard.recognition = {name: value for name, value in kept.items() if value is not None}
    save_guard(network_guard, tmp_path / "g")
    with pytest.raises(ValueError, match="cannot be read as a guard: its check") as error:
        load_guard(tmp_path / "g")
    assert "\n" not in str(error.value)


def test_pictures_of_another_scale_are_refused_by_guards_of_pictures(guard):
    assert guard.clip is None
    with pytest.raises(ValueError, match="images lie in"):
        recognise(guard, (MEMBERS + 1) * 127.5)


def test_a_default_precision_does_not_change_the_noise_of_a_check():
    program = """
import torch
torch.set_default_dtype(torch.float64)
from cpsample.core.predicted import _fixed_noise
from cpsample.core.recognition import _noise_of_check
for noise in (_fixed_noise, _noise_of_check):
    x = noise(1, (2, 2))
    print(x.dtype, [round(v, 4) for v in x.flatten().tolist()])
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    expected = []
    for noise in (_fixed_noise, _noise_of_check):
        x = noise(1, (2, 2))
        expected.append(f"torch.float32 {[round(v, 4) for v in x.flatten().tolist()]}")
    assert printed.splitlines() == expected


def test_members_that_no_copy_speaks_for_are_named_when_the_guard_does_not_know_them():
    "A model that draws one member alone says nothing about the others."
    guard = knowing(MEMBERS[:15])
    one_member = MEMBERS[:1].expand(50, -1, -1, -1)
    with pytest.warns(
        UncoveredMemberWarning, match="5 of 20 training images are not, number 1[5-9]"
    ):
        report = calibrate_check(guard, MEMBERS, OTHERS, model=one_member)
    assert report["coverage"]["share"] == 1 and report["members_with_copies"] == 1
    assert report["members"]["share"] == 0.75 and report["members"]["n"] == 20

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_check(knowing(), MEMBERS, OTHERS, model=one_member)


def test_a_guard_file_without_a_check_is_read(tmp_path, network_guard):
    network_guard.recognition = None
    save_guard(network_guard, tmp_path / "g")
    assert load_guard(tmp_path / "g").recognition is None


# copies to measure with


@given(seed=st.integers(0, 1000), n=st.integers(2, 30))
@settings(max_examples=15, derandomize=True, deadline=None)
def test_members_with_noise_are_copies_by_the_ratio_test(seed, n):
    members = DIGITS[:n]
    copies = noised_members(members, 2, seed=seed)
    report = copy_test(copies.images, members)
    assert report.copied.all() and torch.equal(report.nearest, copies.member)
    assert copies.images.abs().max() <= 1 and not torch.equal(copies.images[:n], members)


def test_a_models_copies_are_used_if_there_are_enough():
    generator = torch.Generator().manual_seed(0)
    copies, rows = plant(MEMBERS.repeat(2, 1, 1, 1), 1, "slightly noised", generator)
    drawn = torch.cat([copies, OTHERS])
    many = copies_among(drawn, MEMBERS)
    assert many.source == "drawn by the model" and many.drawn == len(many.images) == 40
    assert torch.equal(many.member, rows % 20)

    # Of a few they are asked about, too, beside members with noise.
    few = copies_among(torch.cat([copies[: LEAST_COPIES - 1], OTHERS]), MEMBERS)
    assert few.source == "members with noise" and few.drawn == LEAST_COPIES - 1
    assert len(few.images) == 400 + few.drawn and torch.equal(few.images[:5], copies[:5])


def test_a_model_draws_from_its_seed_and_without_a_guard(network):
    guard = knowing()
    options = dict(steps=3, seed=4)
    x = drawn_by(network, guard, MEMBERS, 7, **options)
    assert x.shape == (7, 1, 8, 8) and x.abs().max() <= 1
    assert torch.equal(x, drawn_by(network, guard, MEMBERS, 7, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        protected = protect(network, guard)
    with pytest.raises(ValueError, match="give its .model"):
        calibrate_check(guard, MEMBERS, OTHERS, model=protected)


# calibration


@given(
    copies=st.lists(st.floats(-5, 9), min_size=1, max_size=60),
    others=st.lists(st.floats(-5, 9), min_size=1, max_size=60),
    wanted=st.floats(0.5, 1),
    allowed=st.floats(0, 0.5),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_the_threshold_keeps_to_the_false_alarms_and_covers_where_it_can(
    copies, others, wanted, allowed
):
    copies, others = torch.tensor(copies), torch.tensor(others)
    threshold = choose_threshold(copies, others, wanted, allowed)
    assert (others > threshold).sum() <= allowed * len(others) + 1e-6

    # Both can be had where nearly all copies are above nearly all others.
    misses, alarms = int((1 - wanted) * len(copies)), int(allowed * len(others))
    covering, sparing = copies.sort().values[misses], others.sort(descending=True).values[alarms]
    if covering > sparing + 1e-2:
        assert (copies > threshold).sum() >= wanted * len(copies) - 1
        assert abs(threshold - (covering + sparing).item() / 2) < 1e-3


def test_each_half_is_judged_by_the_others_threshold():
    "The odd ones are all higher: the threshold of the even ones lets all of them pass."
    others = torch.tensor([0.0, 3.0] * 50)
    copies = torch.full((40,), 5.0)
    _, rings = cross_judged(copies, others, 1.0, 0.0)
    assert choose_threshold(copies[1::2], others[::2], 1.0, 0.0) == pytest.approx(2.5)
    assert rings.tolist() == [False, True] * 50
    known, _ = cross_judged(torch.tensor([5.0, 3.0] * 20), torch.zeros(10), 1.0, 0.0)
    assert known.tolist() == [True, True] * 20
    known, _ = cross_judged(torch.tensor([9.0, 2.0] * 20), torch.zeros(10), 1.0, 0.0)
    assert known.tolist() == [True, False] * 20


def test_the_report_says_what_was_measured(guard):
    report = guard.recognition
    assert report["copies"] == "members with noise" and report["drawn"]["n"] == 0
    assert report["coverage"]["share"] == 1 and report["coverage"]["n"] == 400
    low, high = report["coverage"]["ci"]
    assert 0.98 < low < high == 1
    assert report["false_alarms"]["share"] <= 0.05 and report["false_alarms"]["n"] == 200
    assert report["members_with_copies"] == 20

    generator = torch.Generator().manual_seed(0)
    copies, _ = plant(MEMBERS[:7].repeat(5, 1, 1, 1), 1, "slightly noised", generator)
    report = calibrate_check(guard, MEMBERS, OTHERS, model=torch.cat([copies, OTHERS]))
    assert report is guard.recognition
    assert report["copies"] == "drawn by the model" and report["members_with_copies"] == 7
    assert report["drawn"] == {"n": 235, "copies": 35, "recognised": 35}


def test_the_least_known_member_is_named_by_its_row():
    is_known = torch.tensor([True, False, True, True, False, True])
    scores = torch.tensor([5.0, 1.0, 5.0, 3.0, 2.0, 4.0])
    least = least_known(is_known, scores, torch.tensor([7, 7, 8, 8, 9, 9]))
    assert (least["member"], least["share"], least["n"]) == (7, 0.5, 2)
    assert least["familiarity"] == 1 and least["ci"][0] < 0.5 < least["ci"][1]


def test_a_member_that_is_a_stranger_is_named():
    "A repeat before it shifts the rows among distinct images, not the number that is named."
    guard = knowing(MEMBERS[:19])
    members = torch.cat([MEMBERS[:1], MEMBERS])
    with pytest.warns(UncoveredMemberWarning, match="of 20 copies of training image 20 .* none"):
        report = calibrate_check(guard, members, OTHERS, wanted=0.9)
    assert report["least_known"]["member"] == 20 and report["coverage"]["share"] == 0.95


def test_a_guard_that_knows_too_few_copies_is_refused_and_left_alone():
    guard = knowing(MEMBERS[:10])
    with pytest.raises(UncoveredGuardError, match="recognises 200 of 400 .* 99% are wanted") as no:
        calibrate_check(guard, MEMBERS, OTHERS)
    assert no.value.coverage == 0.5 and guard.recognition is None and "\n" not in str(no.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wanted": 0}, "wanted must lie in"),
        ({"wanted": 1.1}, "wanted must lie in"),
        ({"allowed": 1.0}, "allowed in"),
        ({"allowed": float("nan")}, "allowed in"),
        ({"draws": -1}, "at least 0"),
        ({"noisings": 0}, "at least 1"),
        ({"levels": ()}, r"levels must lie in \[0, 400\)"),
        ({"levels": (1000,)}, r"levels must lie in \[0, 400\)"),
        ({"held_out": OTHERS[:1]}, "2 held-out ones, got 20 and 1"),
        ({"members": MEMBERS[:1]}, "2 different training images"),
        ({"held_out": torch.cat([OTHERS, MEMBERS[:1]])}, "are training images, too"),
        ({"held_out": torch.zeros(5, 1, 9, 9)}, "give images of one shape"),
        ({"model": torch.full((5, 1, 8, 8), torch.nan)}, "the model's images hold NaN"),
    ],
)
def test_what_no_check_can_be_calibrated_with_is_refused(change, message, guard):
    before = guard.recognition
    options = {"members": MEMBERS, "held_out": OTHERS} | change
    members, held_out = options.pop("members"), options.pop("held_out")
    with pytest.raises(ValueError, match=message) as error:
        calibrate_check(guard, members, held_out, **options)
    assert guard.recognition is before and "\n" not in str(error.value)


def test_points_have_no_mirror_image():
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    guard = Guard(Memory(points[:5]), SCHEDULE, form="member")
    with pytest.raises(ValueError, match="mirrored=True is for images"):
        calibrate_check(guard, points[:5], points[5:], mirrored=True)


def test_a_models_copies_of_the_plane_are_not_clipped():
    "Points may lie anywhere; only pictures are held within [−1, 1]."
    members = torch.tensor([[5.0, 5.0], [-5.0, 5.0]])
    model = MLPDenoiser((2,), width=8)
    x = drawn_by(model, Guard(Memory(members), SCHEDULE), members, 50, steps=5, seed=0)
    assert x.abs().max() > 1.5
    assert noised_members(members, 3).images.abs().max() > 4


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_seen_where_they_are_near(change, guard):
    "This guard's memory is a distance, so it sees what is near, and nothing else."
    x, rows = plant(MEMBERS, 1, change, torch.Generator().manual_seed(0))
    near = (x - MEMBERS[rows]).flatten(1).norm(dim=1) < 0.6
    assert torch.equal(recognise(guard, x)[near], torch.ones(int(near.sum()), dtype=torch.bool))
