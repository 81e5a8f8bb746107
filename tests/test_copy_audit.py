"The audit: planted copies, duplicates, disguises, bad input, and the command."

import io
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom, mannwhitneyu, norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import gaussian_blur
from typer.testing import CliRunner

import cpsample.judgement.copy_audit
from cpsample import cli
from cpsample.cli import app, strangers_for_attack
from cpsample.core.classifier import MLPClassifier
from cpsample.core.copying import (
    CHANGES,
    RENDERINGS,
    SharedImagesWarning,
    copy_test,
    describe_rate,
    plant,
    proportion_ci,
    renderings_of,
)
from cpsample.core.guard import Guard
from cpsample.core.guard_files import save_guard
from cpsample.core.images import ContrastWarning, load_digits, pixels, plant_duplicates, to_bytes
from cpsample.core.schedule import make_schedule
from cpsample.judgement.audit_study import smooth_images
from cpsample.judgement.copy_audit import (
    TESTS,
    Answer,
    Audit,
    _per_cent,
    answer_of,
    audit,
    auth_pct,
    c_t,
    contradiction,
    counting_test,
    draw_samples,
    feature_space,
    grain,
    samples_needed,
)
from cpsample.judgement.repeats import Repeats, RepeatsWarning, duplicate_groups
from cpsample.judgement.report import report_html
from cpsample.practice.datasets import load_crops, load_fashion
from cpsample.practice.runs import members_of
from cpsample.workshop.files import data_path
from cpsample.workshop.neighbours import nearest

TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


def seed(n):
    return torch.Generator().manual_seed(n)


def call(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def noised(x, strength, seed_number):
    return x + strength * torch.randn(x.shape, generator=seed(seed_number))


def test_a_copy_of_any_member_of_a_group_is_found():
    """Also of one that is not the first; with the first alone, it would be as far away as the group
    is wide."""
    training = torch.cat([TRAIN[:100], noised(TRAIN[:100], 0.03, 0)])
    audited = audit(training[100:], training)
    assert audited.record["duplicates"]["rows"] == 100
    assert audited.record["tests"]["ratio"]["copies"] == 100
    assert audited.distances["generated"].max() < 1e-3


@pytest.mark.parametrize("change", ["exact", "slightly noised", "mirrored"])
@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.5])
@pytest.mark.parametrize("duplicates", [0, 200])
def test_planted_rates_are_read(change, share, duplicates):
    n, training = 400, TRAIN[:500]
    copies, _ = plant(training, share * n / 500, change, seed(1))
    if duplicates:
        training, _ = plant_duplicates(training, duplicates, seed=0)
        training[500:] = noised(training[500:], 0.02, 2)

    record = audit(torch.cat([copies, REAL[: n - len(copies)]]), training).record
    ratio = record["tests"]["ratio"]
    assert ratio["ci"][0] <= share <= ratio["ci"][1]
    assert ratio["copies"] >= 0.9 * len(copies)
    assert record["duplicates"]["rows"] == duplicates


def test_the_audit_says_what_it_cannot_see():
    audited = audit(REAL[:100], TRAIN[:300])
    finds = audited.record["finds"]
    assert list(finds) == [*CHANGES, *renderings_of(1)]
    assert finds["drawn at half the size"]["ratio"] < 1
    assert finds["exact"]["ratio"] == finds["mirrored"]["ratio"] == 1
    assert finds["shifted by one pixel"]["ratio"] < 0.5
    words = r"misses more than a tenth of copies that are [^.]*shifted by one pixel"
    assert re.search(words, report_html(audited))
    unmirrored = audit(REAL[:100], TRAIN[:300], flips=False)
    assert unmirrored.record["finds"]["mirrored"]["ratio"] < 0.2


def test_auth_pct_and_c_t_on_planted_copies():
    g = seed(0)
    train, real = torch.randn(600, 5, generator=g), torch.randn(600, 5, generator=g)
    near = train[:300] + 0.01 * torch.randn(300, 5, generator=g)
    assert auth_pct(near, train) < 0.02
    assert auth_pct(real + 20, train) == 1
    assert 0.2 < auth_pct(real, train) < 0.8
    assert c_t(near, real, train) < -6
    assert abs(c_t(torch.randn(600, 5, generator=g), real, train)) < 2
    assert c_t(2 * real, torch.randn(600, 5, generator=g), train) > 4
    assert c_t(real[:5], real, train) is None


def test_c_t_in_one_cell_is_scipys_rank_test():
    g = seed(3)
    train, real, generated = (torch.randn(k, 3, generator=g) for k in (80, 60, 50))
    d, d_real = (nearest(f, train, 1)[0][:, 0].numpy() for f in (generated, real))
    options = {"method": "asymptotic", "use_continuity": False, "alternative": "less"}
    p = mannwhitneyu(d, d_real, **options).pvalue
    assert c_t(generated, real, train, cells=1) == pytest.approx(norm.ppf(p), abs=1e-4)


def test_verdict_asks_for_the_upper_bound():
    audited = audit(torch.cat([TRAIN[:10], REAL[:390]]), TRAIN[:500])
    ratio = audited.record["tests"]["ratio"]
    low, high = ratio["ci"]
    assert low < ratio["rate"] < high
    assert audited.verdict(high).answer is Answer.NO_COPIES
    between = audited.verdict(ratio["rate"])
    assert between.answer is Answer.TOO_FEW and between.exit_status == 3
    assert between.needed == samples_needed(ratio["rate"], ratio["copies"])
    assert f"draw at least {between.needed:,}" in between.sentence
    assert audited.verdict(low * 0.99).answer is Answer.COPIES
    assert audited.verdict(low).answer is Answer.TOO_FEW


def counts(copies, n, alarms=None, strangers=1000):
    "What a record holds of a test; with held-out images if there are alarms."
    record = {"copies": copies, "n": n, "ci": proportion_ci(copies, n)}
    record["words"] = describe_rate(copies, n)
    if alarms is not None:
        record["ci_held_out"] = proportion_ci(alarms, strangers)
        record["words_held_out"] = describe_rate(alarms, strangers)
    return record


def on_record(ratio, neighbourhood=None, cosine=None, **more):
    "An audit of which only the counts are there; the other two tests say what the first says."
    tests = dict(zip(TESTS, (ratio, neighbourhood or ratio, cosine or ratio)))
    return Audit({"tests": tests, **more}, torch.empty(0), {})


@pytest.mark.parametrize(
    "copies, n, rate, status, says",
    [
        (0, 367, 0.01, 3, "Too few samples: draw at least 368. So far, none of 367 images"),
        (0, 368, 0.01, 0, "No copies found, and enough samples to say so: none of 368 images"),
        (0, 3687, 0.001, 3, "draw at least 3,688"),
        (0, 3688, 0.001, 0, "None of 3,688".lower()),
        (1, 368, 0.01, 3, "draw at least 555, with no more than 1 copy among them"),
        (1, 555, 0.01, 0, "No more copies than are allowed, and enough samples to say so: 1 of"),
        (22, 200, 0.01, 1, "Copies found: 22 of 200 images are copies"),
        (1, 5, 0, 1, "Copies found: 1 of 5 images is a copy"),
        (0, 10**6, 0, 3, "no number of samples shows a rate of 0"),
        (5, 5, 1, 0, "No more copies than are allowed"),
    ],
)
def test_the_answers_their_status_and_their_words(copies, n, rate, status, says):
    verdict = on_record(counts(copies, n)).verdict(rate)
    assert verdict.exit_status == status and says in verdict.sentence
    assert verdict.passed is (status == 0)
    assert json.dumps(verdict.numbers(), allow_nan=False)
    assert (verdict.needed is None) is (status != 3 or rate == 0)


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(0.02, 0.98), copies=st.integers(0, 8))
def test_samples_needed_is_what_counting_up_finds(rate, copies):
    n = max(copies, 1)
    while binom.cdf(copies, n, rate) > 0.025:
        n += 1
    assert samples_needed(rate, copies) == n
    assert answer_of(proportion_ci(copies, n), rate) is Answer.NO_COPIES
    if n > max(copies, 1):
        assert answer_of(proportion_ci(copies, n - 1), rate) is not Answer.NO_COPIES


def test_a_test_that_rings_at_innocents_is_no_evidence_and_does_not_count():
    quiet, rings = counts(0, 400, 0), counts(90, 400, 189)
    verdict = on_record(quiet, rings, counts(30, 400, 41)).verdict(0.01)
    assert verdict.answer is Answer.NO_COPIES and verdict.test == "ratio"
    words = "The {} test is no evidence here: false alarms on held-out images {} of 1000"
    assert words.format("neighbourhood", 189) in verdict.ruling
    assert words.format("cosine", 41) in verdict.ruling

    # The next one counts, and if none is left, nothing can be said.
    assert on_record(rings, quiet, rings).verdict(0.01).test == "neighbourhood"
    assert on_record(rings, rings, counts(20, 400, 0)).verdict(0.01).answer is Answer.COPIES
    nothing = on_record(rings).verdict(0.01)
    assert nothing.answer is Answer.TOO_FEW and nothing.test is nothing.needed is None
    assert "Too little evidence" in nothing.sentence and "No test counts." in nothing.ruling
    assert on_record(quiet, rings).verdict(0.01, "neighbourhood").test is None

    # For certain: two alarms among a hundred may be one per cent, ten may not.
    for alarms, test in ((2, "ratio"), (10, None)):
        tests = on_record(counts(0, 400, alarms, 100)).record["tests"]
        assert counting_test(tests, 0.01) == test


def test_tests_that_disagree_and_tests_whose_alarms_are_not_known_are_named():
    verdict = on_record(counts(0, 400), counts(0, 400), counts(60, 400)).verdict(0.01)
    assert "No held-out images were given" in verdict.ruling
    assert "The neighbourhood test agrees (0 of 400" in verdict.ruling
    assert "The cosine test says copies found (60 of 400" in verdict.ruling


@pytest.mark.parametrize("copies, answer", [(0, Answer.TOO_FEW), (100, Answer.COPIES)])
def test_an_alarm_forbids_a_pass_and_hides_no_copies(copies, answer):
    looks = {"n": 400, "odd": {"like static": 201, "far": 3}}
    verdict = on_record(counts(copies, 400), looks=looks).verdict(0.01)
    assert verdict.answer is answer
    assert ("201 of 400 images are like static" in verdict.sentence) is (copies == 0)
    for calm in ({"n": 400, "odd": {"like static": 200}}, {"n": 9, "odd": {"like static": 9}}):
        assert on_record(counts(0, 400), looks=calm).verdict(0.01).passed


NOISE = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
DIGITS = load_digits()[0]
STRANGE = {
    "static": (NOISE.clamp(-1, 1), "like static"),
    "faint static": (0.1 * NOISE, "like static"),
    "dark static": ((0.1 * NOISE - 0.9).clamp(-1, 1), "like static"),
    "in noise": ((REAL[:100] + NOISE).clamp(-1, 1), "like static"),
    "blurred": (gaussian_blur(REAL[:100], 9, 2.0), "as if blurred"),
    "photographs": (F.avg_pool2d(pixels(load_crops(56)[0])[:100].mean(1, True), 2), "in features"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("strangers", [None, REAL[500:700]])
def test_what_does_not_look_like_the_data_raises_an_alarm(kind, strangers):
    x, words = STRANGE[kind]
    audited = audit(x, TRAIN[:500], strangers)
    odd = audited.record["looks"]["odd"]
    assert next(count for key, count in odd.items() if words in key) > 50
    verdict = audited.verdict(0.05)
    if audited.record["tests"]["ratio"]["copies"] == 0:
        assert verdict.answer is Answer.TOO_FEW and verdict.needed == samples_needed(0.05)
        assert "Too few samples that look like the data" in verdict.sentence


@pytest.mark.parametrize("strangers", [None, "held out"])
def test_real_digits_raise_no_alarm_and_broken_ones_do(strangers):
    x = shuffled(DIGITS, 0)
    held_out = x[1200:1600] if strangers else None
    noise = torch.randn(x[:200].shape, generator=seed(1))
    for generated, is_odd in (
        (x[:200], False),
        (gaussian_blur(x[:200], 3, 0.5), False),
        (gaussian_blur(x[:200], 5, 2.0), True),
        (noise.clamp(-1, 1), True),
    ):
        record = audit(generated, x[200:1200], held_out).record
        assert (max(record["looks"]["odd"].values()) > 100) is is_odd


def test_grain_is_one_for_static_and_nothing_for_one_colour():
    assert grain(0.01 * NOISE).mean() == pytest.approx(1, abs=0.05)
    assert grain(torch.ones(2, 3, 8, 8)).tolist() == [0, 0]
    assert grain(torch.rand(2, 1, 1, 1)).tolist() == [0, 0]
    checks = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8)).view(1, 1, 8, 8)
    assert grain(checks).item() == pytest.approx(2 * 63 / 64)


def test_near_duplicates_that_hide_copies_are_found_first():
    twice = torch.cat([TRAIN[:100], noised(TRAIN[:100], 0.02, 0)])
    copies = noised(TRAIN[:100], 0.05, 1)
    assert copy_test(copies, twice).copies == 0
    assert audit(copies, twice).record["tests"]["ratio"]["copies"] == 100


def test_spaces_for_other_images(monkeypatch):
    colour = torch.rand(80, 3, 16, 16, generator=seed(0)) * 2 - 1

    def missing(*_):
        raise OSError("no weights")

    monkeypatch.setattr(cpsample.judgement.copy_audit, "inception", missing)
    name, embed = feature_space(colour)
    assert name == "pca-64" and embed(colour).shape == (80, 64)
    assert (torch.pdist(embed(colour)) <= torch.pdist(colour.flatten(1)) + 1e-3).all()
    with pytest.raises(ValueError, match="unknown feature space"):
        feature_space(colour, "vgg")[1](colour)


def test_without_the_extra_the_rest_is_there(monkeypatch):
    def missing(*_, **__):
        raise ImportError("torchmetrics is not installed: pip install 'cpsample[metrics]'")

    monkeypatch.setattr(cpsample.judgement.copy_audit, "kid", missing)
    audited = audit(REAL[:100], TRAIN[:100])
    assert "fd" in audited.record["quality"] and "cpsample[metrics]" in report_html(audited)


@pytest.mark.parametrize(
    "generated, training, words",
    [
        (REAL[:5], TRAIN[:1], "at least two different"),
        (REAL[:5], TRAIN[:1].repeat(9, 1, 1, 1), "at least two different"),
        (REAL[:5, :, :20], TRAIN[:9], "of one size"),
        (REAL[:5] / 0, TRAIN[:9], "NaN"),
        (REAL[:0], TRAIN[:9], "non-empty"),
        (REAL[:5].flatten(1), TRAIN[:9], "of one size"),
    ],
)
def test_bad_images_are_refused(generated, training, words):
    with pytest.raises(ValueError, match=words):
        audit(generated, training)


def test_constant_and_few_images_are_audited():
    for x in (torch.zeros(30, 1, 28, 28), REAL[:1], torch.ones(1, 1, 28, 28)):
        audited = audit(x, TRAIN[:50], REAL[100:105])
        assert json.dumps(audited.record, allow_nan=False) and report_html(audited)
        assert audited.record["tests"]["ratio"]["n"] == len(x)
    black = torch.zeros(30, 1, 28, 28)
    audited = audit(black, torch.cat([black[:1], TRAIN[:50]]))
    assert audited.record["tests"]["ratio"]["copies"] == 30


@pytest.mark.parametrize(
    "change, says",
    [
        ("brightened", "brighter"),
        ("of half the contrast", "of 0.48 times the contrast"),
        ("red and blue exchanged", "red and blue seem to be exchanged"),
    ],
)
def test_a_whole_set_that_was_changed_on_the_way_is_noticed(change, says):
    colour = smooth_images(120, seed=0) / 2 + torch.tensor([0.1, 0, -0.1]).view(3, 1, 1)
    generated, training = colour.split(60)
    changed = (CHANGES | RENDERINGS)[change](generated, seed(0)).clamp(-1, 1)
    with pytest.warns(ContrastWarning, match=f"generated images differ .*{says}"):
        audit(changed, training, space="pca-64")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContrastWarning)
        audit(generated, training, space="pca-64")


def save(folder, images):
    folder.mkdir()
    for i, x in enumerate(images):
        Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{i:04}.png")


def test_the_command_reads_folders_and_sets_its_exit_status(tmp_path):
    save(tmp_path / "train", TRAIN[:60])
    save(tmp_path / "made", torch.cat([TRAIN[:5], REAL[:95]]))
    (tmp_path / "made" / "broken.png").write_bytes(b"not a picture")
    options = ["--out", tmp_path / "a", "--max-copy-rate", "0.01"]
    with pytest.warns(UserWarning, match="broken.png"):
        done = call("audit", tmp_path / "made", tmp_path / "train", *options)
    assert done.exit_code == 1 and "Copies found: 5 of 100 images" in done.stdout

    record = json.loads((tmp_path / "a.json").read_text())
    assert record["tests"]["ratio"]["copies"] == 5
    assert record["passed"] is False
    verdict = record["verdict"]
    assert verdict["answer"] == "copies found" and verdict["exit_status"] == 1
    assert verdict["sentence"] in done.stdout and verdict["max_copy_rate"] == 0.01
    assert record["sets"]["generated"]["n"] == 100


def test_the_command_reads_arrays(tmp_path):
    np.savez(tmp_path / "held.npz", images=REAL[100:200].numpy())
    np.save(tmp_path / "grey.npy", ((TRAIN[:60, 0] + 1) * 127.5).round().byte().numpy())
    np.save(tmp_path / "made.npy", REAL[:100].permute(0, 2, 3, 1).numpy())
    options = ["--held-out", tmp_path / "held.npz", "--out", tmp_path / "b"]
    images = [tmp_path / "made.npy", tmp_path / "grey.npy"]
    done = call("audit", *images, *options, "--max-copy-rate", "0.05")
    assert done.exit_code == 0 and "No copies found, and enough samples" in done.stdout
    assert "held-out images 0 of 100" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["tests"]["ratio"]["n_held_out"] == 100


@pytest.mark.parametrize(
    "words, said",
    [
        (["{}/none", "{}/train"], "neither a folder"),
        (["{}/made", "{}/empty"], "no images in"),
        (["{}/made"], "is no run"),
        (["{}/made", "{}/train", "--test", "x"], "unknown test"),
        (["{}/bad.npz", "{}/train"], "cannot be read as an array"),
        (["{}/made", "{}/one"], "at least two different"),
        (["{}/nan.npy", "{}/train"], "NaN"),
        (["{}/made", "{}/train", "--out", "/dev/null/x"], "cannot be a folder"),
        (["{}/made", "{}/train", "--strict"], "broken.png"),
    ],
)
def test_errors_are_one_line(tmp_path, words, said):
    save(tmp_path / "train", TRAIN[:6])
    save(tmp_path / "made", REAL[:6])
    save(tmp_path / "one", TRAIN[:1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    np.save(tmp_path / "nan.npy", np.full((3, 28, 28), np.nan, dtype=np.float32))
    np.save(tmp_path / "small.npy", np.zeros((3, 9, 9), dtype=np.float32))
    if "--strict" in words:
        (tmp_path / "made" / "broken.png").write_bytes(b"not a picture")
    done = call("audit", "--out", tmp_path / "out", *(w.format(tmp_path) for w in words))
    assert done.exit_code == 2 and said in done.stderr
    assert sum(line.startswith("cpsample:") for line in done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


def test_a_run_is_audited_and_attacked(tmp_path):
    run = tmp_path / "run"
    assert call("train", "fashion-small", "--images", 16, "--tiny", "--out", run).exit_code == 0
    said = call("attack", run)
    assert said.exit_code == 2 and "has no guard" in said.stderr
    said = call("audit", run, "-n", 12, "--unguarded", "--out", tmp_path / "a")
    assert said.exit_code == 3 and "Too few samples" in said.stdout, said.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    sizes = {name: images["n"] for name, images in record["sets"].items()}
    assert sizes == {"generated": 12, "training": 16, "held-out": 2984}

    said = call("attack", run, "--unguarded", "--limit", 30, "--json", tmp_path / "attack.json")
    assert said.exit_code == 0 and "best of all" in said.stdout, said.stderr
    record = json.loads((tmp_path / "attack.json").read_text())
    assert record["members"] == 16 and record["others"] == 30
    assert "oracle" not in record["attacks"]
    assert 0 <= record["attacks"]["SimA"]["auc"] <= 1


@pytest.mark.parametrize(
    "at, report, advice",
    [
        ("x0", {"alpha": 0.05}, "keep a copy of .*--preset x_t"),
        ("x_t", {"alpha": 0.05}, "--strength 2"),
        ("x_t", None, "Nobody has measured this guard"),
    ],
)
def test_where_a_guarded_run_copies_it_is_said_what_to_try(tmp_path, capsys, at, report, advice):
    guard = Guard(MLPClassifier((1, 8, 8), 1, 8), make_schedule(), t_max=100, at=at, report=report)
    nn.init.normal_(guard.classifier.out.weight)
    save_guard(guard, tmp_path / "guard")
    words = cli.against_copies(str(tmp_path), unguarded=False)
    assert re.search(advice, words) and cli.against_copies(str(tmp_path), unguarded=True) == ""

    # It is said where there are copies, and only there.
    digits = load_digits()[0]
    for drawn, is_said in ((digits[:200], True), (digits[400:800], False)):
        sets = drawn, digits[:200], digits[800:1200]
        about = cli.origins(str(tmp_path), None, None, False)
        compared = cli.ToAudit(sets, about, advice=words)
        options = dict(test="ratio", seed=0, device="cpu", thumbnails=False, max_copy_rate=0.2)
        verdict = cli.audit_and_report(lambda: compared, tmp_path / "audit", **options)
        assert (verdict.exit_status == 1) == is_said == (words in capsys.readouterr().out)


def test_images_that_taught_the_guard_are_no_strangers(tmp_path):
    words = ("train", "fashion-small", "--images", 2500, "--tiny", "--out", tmp_path / "run")
    assert call(*words).exit_code == 0
    said = call("attack", tmp_path / "run", "--unguarded")
    assert said.exit_code == 2 and "neither the model nor its guard has seen" in said.stderr


def saved_twelve_times(pictures):
    "As JPEG of quality 96 … 52, one whole set after the other."
    again = []
    for quality in range(96, 51, -4):
        for picture in to_bytes(pictures):
            file, pixels_last = io.BytesIO(), picture.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels_last).save(file, "jpeg", quality=quality)
            again.append(
                torch.from_numpy(np.atleast_3d(np.array(Image.open(file)))).permute(2, 0, 1)
            )
    return pixels(torch.stack(again))


def test_originals_of_pictures_saved_twelve_times_do_not_pass():
    training = saved_twelve_times(TRAIN[:25])
    audited = audit(TRAIN[:25], training, REAL[:100])
    assert audited.record["duplicates"]["rows"] == 275
    assert audited.record["duplicates"]["groups"] == 25
    ratio = audited.record["tests"]["ratio"]
    assert ratio["copies"] == 25 and ratio["copies_held_out"] == 0
    assert not audited.verdict(0.2).passed

    # Pictures that differ much in contrast: one scale does not suit them all, but they fail.
    crops = pixels(load_crops(32)[0])[7::21]
    audited = audit(crops, saved_twelve_times(crops), space="pca-64")
    assert audited.record["duplicates"]["rows"] > 200
    assert not audited.verdict(0.2).passed


def test_a_pass_that_the_other_tests_contradict_is_none(monkeypatch):
    "With the scale of the repeats the ratio test is blind to perfect copies."
    monkeypatch.setattr(
        cpsample.judgement.copy_audit,
        "find_repeats",
        lambda x, flips: Repeats(0.5 / 3, duplicate_groups(x, 0.5 / 3, flips)),
    )
    crops = pixels(load_crops(32)[0])[7::21]
    audited = audit(crops, saved_twelve_times(crops), space="pca-64")
    assert audited.record["tests"]["ratio"]["ci"][1] < 0.5
    verdict = audited.verdict(0.5)
    assert verdict.answer is Answer.COPIES
    words = "copies are 25 by the neighbourhood test and 25 by the cosine test: look at"
    assert verdict.sentence == f"Copies found, though not by the ratio test: {words}" + (
        " the closest pairs and at the repeats."
    )
    assert words in report_html(audited, verdict=verdict).replace("Copies are", "copies are")
    assert audited.verdict(0.9).passed  # so many copies are allowed


def test_verdicts_on_record_stand():
    """Guarded models pass, though the other tests ring more often: at innocents, too. What they
    call copies by mistake is no contradiction."""
    rates = [{"copies": c, "ci": [c / 25 - 0.1, 1]} for c in (0, 25, 25)]
    tests = dict(zip(TESTS, rates))
    assert contradiction(tests, "ratio", 0.2)
    tests["cosine"]["ci_held_out"] = [0.2, 0.4]
    assert contradiction(tests, "ratio", 0.2) is None
    models = json.loads(data_path("results/audit.json").read_text())["models"]
    for pool, arm, passes in (
        ("digits", "guarded_xt", True),
        ("digits", "unguarded", False),
        ("fashion", "guarded_xt", True),
        ("fashion", "before", True),
        ("fashion", "paper", False),
    ):
        record = models[pool][arm]
        alone = {test: dict(counts) for test, counts in record["tests"].items()}
        for counts in alone.values():
            del counts["ci_held_out"]
        for tests in (record["tests"], alone):
            read = cpsample.judgement.copy_audit.Audit({"tests": tests}, None, {})
            assert read.verdict(0.05).passed is passes, (pool, arm)


@pytest.mark.parametrize("form", [lambda x: x, to_bytes, lambda x: x.double(), lambda x: x.half()])
def test_held_out_images_must_be_strangers(form):
    held_out = torch.cat([REAL[:90], TRAIN[5:15]])
    message = r"10 of 100 held-out images are training images, too \(first in rows 90, 91, 92"
    with pytest.raises(ValueError, match=message):
        audit(REAL[100:150], TRAIN[:100], form(held_out))
    with pytest.raises(ValueError, match="100 of 100 held-out images are training images"):
        audit(REAL[100:150], form(TRAIN[:100]), TRAIN[:100])


def test_held_out_images_that_are_nearly_training_images_are_counted():
    nearly = noised(TRAIN[:7], 0.02, 0).clamp(-1, 1)
    nearly[::2] = nearly[::2].flip(-1)
    with pytest.warns(SharedImagesWarning, match=r"7 of 57 .* \(first in rows 50, 51"):
        audit(REAL[100:150], TRAIN[:100], torch.cat([REAL[:50], nearly]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit(REAL[100:150], TRAIN[:100], REAL[:50])


def test_where_all_distances_are_zero_nothing_is_warned_about():
    greys = torch.linspace(-1, 1, 40).view(40, 1, 1, 1).expand(40, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, space in ((TRAIN[:60], None), (greys, "pca-64")):
            audited = audit(x, x, space=space)
            assert audited.distances["generated"].max() == 0
            assert audited.record["quality"]["fd"] >= 0
            assert report_html(audited) and json.dumps(audited.record, allow_nan=False)
        assert c_t(torch.ones(40, 3), torch.ones(40, 3), torch.ones(40, 3)) == 0


def test_the_commands_refuse_strangers_that_are_none(tmp_path):
    """A set with a picture twice: the run leaves its other copy out. What the user names is refused
    before anything is drawn."""
    twice = torch.cat([TRAIN[:440], TRAIN[:440]])
    np.savez(tmp_path / "twice.npz", images=to_bytes(twice).numpy())
    np.savez(tmp_path / "some.npz", images=to_bytes(torch.cat([REAL[:30], TRAIN[:440]])).numpy())
    run = tmp_path / "run"
    assert (
        call("train", tmp_path / "twice.npz", "--images", 10, "--tiny", "--out", run).exit_code == 0
    )

    audit_it = ("audit", run, "-n", 8, "--unguarded", "--out", tmp_path / "a")
    with pytest.warns(SharedImagesWarning, match=r"left out \d+ of 870 held-out images"):
        assert call(*audit_it).exit_code == 3
    left_out = 870 - json.loads((tmp_path / "a.json").read_text())["sets"]["held-out"]["n"]
    assert 8 <= left_out <= 10

    for words in (
        (*audit_it, "--held-out", tmp_path / "some.npz"),
        ("attack", run, "--unguarded", "--others", tmp_path / "some.npz"),
        ("guard", run, "--reference", tmp_path / "some.npz"),
    ):
        said = call(*words)
        assert said.exit_code == 2 and "drawing" not in said.stderr
        assert re.search(r"\d+ of 470 images of --[a-z-]+ .* are training images, too", said.stderr)
        assert sum(line.startswith("cpsample:") for line in said.stderr.splitlines()) == 1
    assert not (run / "guard.safetensors").exists()
    with pytest.warns(SharedImagesWarning, match="images for (the guard|tests)"):
        said = call("attack", run, "--unguarded", "--limit", 20)
    assert said.exit_code == 0, said.stderr


def versions(picture, n):
    "A picture [3, H, W] of bytes, saved as JPEG in up to seventy qualities."
    again = []
    for quality in range(20, 20 + n):
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality)
        again.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(again)


def shuffled(x, k):
    return x[torch.randperm(len(x), generator=seed(k))]


PHOTOGRAPHS = shuffled(pixels(load_crops(16)[0]), 0)


def collapsed(how):
    "(a picture, training images of which most are that one: so many), in one of three ways."
    smooth = smooth_images(41, seed=3)
    if how == "noised":  # no two of them are near
        many = noised(smooth[:1].repeat(60, 1, 1, 1), 0.15, 4).clamp(-1, 1)
        return smooth[:1], torch.cat([many, smooth[1:]]), 60
    if how == "noised, more than a thousand":
        small = F.avg_pool2d(smooth, 4)
        many = noised(small[:1].repeat(1200, 1, 1, 1), 0.05, 4).clamp(-1, 1)
        return small[:1], torch.cat([many, small[1:]]), 1200
    many = pixels(versions(to_bytes(PHOTOGRAPHS[9]), 70))  # the scale of most is that of the saving
    return PHOTOGRAPHS[9:10], torch.cat([many, PHOTOGRAPHS[100:150]]), 70


@pytest.mark.parametrize("how", ["noised", "noised, more than a thousand", "saved as JPEG"])
def test_a_picture_that_is_most_of_the_training_set_is_recognised(how):
    picture, training, copies = collapsed(how)
    with pytest.warns(RepeatsWarning, match=f"of {len(training)} training images are nearly one"):
        audited = audit(picture.repeat(30, 1, 1, 1), training, space="pca-64")
    assert audited.record["duplicates"]["rows"] >= copies - 1
    assert audited.record["tests"]["ratio"]["copies"] == 30
    assert audited.record["tests"]["cosine"]["copies"] == 30
    assert not audited.verdict(0.2).passed


def test_a_model_that_draws_one_picture_again_and_again_does_not_pass():
    audited = audit(noised(REAL[:1].repeat(30, 1, 1, 1), 0.02, 0).clamp(-1, 1), TRAIN[:100])
    assert audited.record["tests"]["ratio"]["copies"] == 0
    verdict = audited.verdict(0.2)
    assert verdict.answer is Answer.TOO_FEW and verdict.needed == samples_needed(0.2)
    assert "30 of 30 generated images are nearly one picture" in verdict.sentence
    assert audit(REAL[:30], TRAIN[:100]).verdict(0.2).passed


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda x: x.flip(1), "red and blue seem to be exchanged"),
        (lambda x: x[:, [1, 2, 0]], "channels seem to be out of order, B, R, G would fit"),
        (lambda x: -x, "black and white seem to be exchanged"),
        (lambda x: x / 2, "brightness or contrast seem to be others"),
    ],
)
def test_copies_that_hide_among_others_do_not_pass(change, says):
    training, others = PHOTOGRAPHS[:400], PHOTOGRAPHS[400:445]
    with pytest.warns(ContrastWarning, match=f"{says} in generated images: else .* would be"):
        audited = audit(torch.cat([change(training[:25]), others]), training, space="pca-64")
    assert audited.record["tests"]["ratio"]["ci"][1] < 0.2
    verdict = audited.verdict(0.2)
    assert verdict.answer is Answer.COPIES and says in verdict.sentence


@pytest.mark.parametrize("k", range(3))
def test_honest_images_pass_in_silence(k):
    for x in (PHOTOGRAPHS, load_digits()[0], torch.cat([TRAIN, REAL])):
        x = shuffled(x, k)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", SharedImagesWarning)  # skies are all alike
            audited = audit(x[:60], x[60:260], x[260:320], space="pca-64")
        assert audited.record["hidden"]["counts"] == {}
        odd = audited.record["looks"]["odd"]
        assert len(odd) == 4 and max(odd.values()) < 15
        assert audited.verdict(0.4).passed


def test_records_from_before_are_judged_as_before():
    audited = audit(REAL[:60], TRAIN[:100])
    for key in ("hidden", "same", "looks"):
        del audited.record[key]
    assert audited.verdict(0.2).passed


@pytest.mark.parametrize(
    "share, words", [(0.0036, "0.36 %"), (0.69, "69 %"), (0.996, "99.6 %"), (1.0, "100 %")]
)
def test_shares_are_in_figures_that_people_read(share, words):
    assert _per_cent(share) == words


def test_strangers_that_nearly_are_members_are_counted_before_an_attack(tmp_path):
    "Of members that were saved again an attack would say that it cannot tell them from members."
    run = tmp_path / "run"
    assert call("train", "fashion-small", "--images", 16, "--tiny", "--out", run).exit_code == 0
    members = members_of(run).members
    near = (members.float() + 2).clamp(0, 255).byte()
    np.save(tmp_path / "near.npy", torch.cat([to_bytes(REAL[:30]), near.flip(-1)]).numpy())
    with pytest.warns(SharedImagesWarning, match="16 of 46 images for tests are nearly training"):
        assert len(strangers_for_attack(run, str(tmp_path / "near.npy"))) == 46
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharedImagesWarning)
        strangers_for_attack(run, None)


def copier(share, withheld=0.0):
    "A model: copies in that share of its images, some of which are withheld, as the seed has it."

    def generate(n, seed_number):
        noise = seed(seed_number)
        copies = TRAIN[torch.randint(60, (n,), generator=noise)]
        others = REAL[torch.randint(1000, (n,), generator=noise)]
        is_copy = torch.rand(n, 1, 1, 1, generator=noise) < share
        is_served = torch.rand(n, generator=noise) >= withheld
        return torch.where(is_copy, copies, others)[is_served]

    return generate


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 90),
    sources=st.integers(1, 4),
    batch_size=st.integers(3, 40),
    withheld=st.sampled_from([0, 0.3]),
    first=st.integers(0, 2**31),
)
def test_every_draw_is_drawn_again_by_its_seed(n, sources, batch_size, withheld, first):
    models = {f"{k}": copier(k / 4, withheld) for k in range(sources)}
    draws = draw_samples(models, n, batch_size=batch_size, seed=first)
    assert sum(call.drawn for call in draws.calls) == len(draws.images)
    seeds = [call.seed for call in draws.calls]
    assert seeds == list(range(first, first + len(seeds)))

    # Each draws its share, and each call can be repeated.
    for name in models:
        share = sum(call.drawn for call in draws.calls if call.source == name)
        assert share == -(-n // sources)
    parts = draws.images.split([call.drawn for call in draws.calls])
    for call, images in zip(draws.calls, parts):
        assert call.asked <= batch_size
        assert torch.equal(models[call.source](call.asked, call.seed), images)


@pytest.mark.parametrize("rate, n", [(0.01, 368), (0.05, 72), (0.1, 36)])
def test_as_many_are_drawn_as_the_claim_needs(rate, n):
    assert len(draw_samples(copier(0.5), max_copy_rate=rate).images) == n
    numbers = {"ci": proportion_ci(0, n)}
    assert answer_of(numbers["ci"], rate) is Answer.NO_COPIES
    assert answer_of(proportion_ci(0, n - 1), rate) is Answer.TOO_FEW


@pytest.mark.parametrize(
    "generate, options, says",
    [
        (lambda n, k: REAL[:n], {}, "the same images for two seeds"),
        (lambda n, k: REAL[: n + 1], {}, r"generate\(50, seed\) must return images \[50,"),
        (lambda n, k: [1], {}, "got list"),
        ({"a bag": lambda n, k: None}, {}, "of 'a bag' must return .* got NoneType"),
        (lambda n, k: REAL[:0], {}, "only 0 of 3700 images .* came, 368 are needed"),
        (copier(0), {"max_copy_rate": 0}, "no number of samples shows a rate of 0"),
        (copier(0), {"n": 0}, "n must be at least 1"),
        (copier(0), {"seed": 0.5}, "seed must be a whole number"),
        (copier(0), {"batch_size": 0}, "batch_size must be at least 1"),
        ({}, {}, "no function to draw from"),
    ],
)
def test_what_cannot_be_drawn_is_refused(generate, options, says):
    with pytest.raises(ValueError, match=says):
        draw_samples(generate, **options)


def test_a_model_that_draws_one_picture_again_and_again_is_drawn_from():
    "It does not ignore its seed: the audit has another word for it."
    draws = draw_samples(lambda n, k: REAL[:1].expand(n, 1, 28, 28), 120)
    assert len(draws.calls) == 3


def test_an_audit_draws_from_a_model_and_counts_by_prompt():
    models = {"honest": copier(0), "copying": copier(0.5)}
    audited = audit(models, TRAIN[:60], n=150, seed=3, space="pca-64")
    draws = draw_samples(models, 150, seed=3)
    again = audit(draws.images, TRAIN[:60], seed=3, space="pca-64").record
    drawn = audited.record.pop("drawn")
    assert audited.record == again and "drawn" not in again
    assert drawn["calls"] == [call._asdict() for call in draws.calls]

    # Of each prompt what the test says of its images alone, and together all.
    for prompt, images in zip(models, draws.images.split(75)):
        of_prompt = drawn["by_source"][prompt]["ratio"]
        assert of_prompt["n"] == 75
        assert of_prompt["copies"] == copy_test(images, TRAIN[:60]).copies
    for test, numbers in again["tests"].items():
        copies = [of_prompt[test]["copies"] for of_prompt in drawn["by_source"].values()]
        assert sum(copies) == numbers["copies"]
    json.dumps(drawn)

    page = report_html(replace(audited, record=audited.record | {"drawn": drawn}))
    assert "Prompt by prompt" in page and f"<td>{of_prompt['words']}</td>" in page
    assert "in 4 calls with the seeds 3 to 6" in page
    assert "Prompt by prompt" not in report_html(audited)
    with pytest.raises(ValueError, match="these images are drawn already"):
        audit(draws.images, TRAIN[:60], n=150)


class Gathered(TorchDispatchMode):
    "Notes the shape of everything that is gathered or flipped, so that it is copied."

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.flip):
            self.shapes.append(tuple(result.shape))
        return result


def test_an_audit_of_different_colour_images_copies_no_set_as_a_whole():
    "The training set may be as large as half of the memory."
    x, training = smooth_images(30, seed=1), smooth_images(600, seed=0)
    with Gathered() as gathered:
        audit(x, training, space="pca-64", flips=False)
    assert gathered.shapes and tuple(training.shape) not in gathered.shapes
