"The audit on trial: planted shares, a stopped run, and the shape of what is on file."

import json
from functools import cache, partial

import pytest
import torch

from cpsample.core.images import pixels
from cpsample.judgement import audit_study, membership_study
from cpsample.judgement.audit_study import (
    AuditSettings,
    measure_large,
    measure_models,
    measure_planted,
    measure_renderings,
    plant_share,
    smooth_images,
    with_twins,
)
from cpsample.judgement.membership_study import MembershipSettings, digits_arms, kept_samples
from cpsample.practice.datasets import load_fashion
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace, run_study

MODELS = MembershipSettings(
    images=20,
    reference=1500,
    train_steps=200,
    guard_steps=300,
    others=10,
    small=True,
    samples=10,
    digit_steps=5,
    fashion_steps=2,
)
SMALL = AuditSettings(
    shares=(0, 0.1, 0.5),
    images=60,
    training=100,
    twins=30,
    small=True,
    audited=200,
    against=1000,
    queries=20,
    sizes=(200, 400),
    models=MODELS,
)
PARTS = {
    "planted": measure_planted,
    "renderings": measure_renderings,
    "large": measure_large,
    "models": measure_models,
}
STUDY = Study("audit", {name: partial(part, settings=SMALL) for name, part in PARTS.items()})
ON_FILE = json.loads(data_path("results/audit.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def train_once():
    "A model of digits comes out the same each time: here it is trained once."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(audit_study.ARMS, "digits", cache(digits_arms))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The record of a small run of all parts that was not stopped."
    folder = tmp_path_factory.mktemp("whole")
    return run_study(STUDY, folder, Workspace(folder, progress=False))


def test_a_small_run_has_the_shape_of_the_file_on_record(whole):
    assert whole.keys() - {"threads"} == ON_FILE.keys() - {"threads"}
    for part in PARTS:
        assert whole[part].keys() - {"threads"} == ON_FILE[part].keys() - {"threads"}
    for refs in ("training", "with duplicates"):
        found, on_file = whole["planted"][refs]["found"], ON_FILE["planted"][refs]["found"]
        assert found.keys() == on_file.keys()
        assert list(found["exact"]) == ["0", "0.1", "0.5"]
        assert found["exact"]["0"].keys() == on_file["exact"]["0"].keys()
    for pool in ("digits", "fashion"):
        arms, on_file = list(whole["models"][pool]), ON_FILE["models"][pool]
        assert arms[:4] == ["unguarded", "paper", "guarded_xt", "guarded"]
        assert [arm for arm in arms if arm in on_file] == list(on_file)


def test_what_is_planted_is_read_with_and_without_twins(whole):
    planted = whole["planted"]
    assert planted["n"] == 60 and planted["false_alarms"]["ratio"]["copies"] == 0
    for refs, images in (("training", 100), ("with duplicates", 130)):
        assert planted[refs]["images"] == images and planted[refs]["different"] <= 100
        for change in ("exact", "slightly noised", "mirrored"):
            found = planted[refs]["found"][change]
            assert [found[share]["ratio"]["copies"] for share in ("0", "0.1", "0.5")] == [0, 6, 30]


def test_times_are_of_the_sizes_asked_for(whole):
    large = whole["large"]
    assert large["images"] == [200, 1000] and len(large["product_seconds"]) == 3
    assert large["ratio"] == sorted(large["ratios"]["audit"])[1] > 0
    assert list(large["nearest_and_product_seconds"]) == ["200", "400"]
    assert large["peak_gb"] >= large["data_gb"] > 0


def test_stopped_and_gone_on_equals_not_interrupted(whole, tmp_path, monkeypatch):
    "Stopped within the digits' second audit: the samples of two arms are there by then."
    audit_really, audits = audit_study.audit, []

    def impatient(*sets):
        audits.append(sets)
        if len(audits) == 2:
            raise KeyboardInterrupt
        return audit_really(*sets)

    monkeypatch.setattr(audit_study, "audit", impatient)
    workspace = Workspace(tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, tmp_path, workspace, parts=["models"])
    assert len(list(tmp_path.rglob("*-samples.safetensors"))) == 2
    record = run_study(STUDY, tmp_path, workspace, parts=["models"])
    for pool in ("digits", "fashion"):
        assert record["models"][pool] == whole["models"][pool]


def test_samples_of_the_membership_study_are_not_drawn_again(tmp_path, monkeypatch):
    "In the same folder both studies know them by the same names."
    arms, workspace = audit_study.ARMS["digits"](0, MODELS), Workspace(tmp_path, progress=False)
    kept = {arm: kept_samples(arms, arm, workspace, MODELS) for arm in arms.models}
    drawn, generate = [], membership_study.generate

    def watched(*args, **settings):
        drawn.append(args)
        return generate(*args, **settings)

    monkeypatch.setattr(membership_study, "generate", watched)
    record = measure_models(workspace, SMALL)
    assert len(drawn) == 5  # the arms of the pictures
    assert record["digits"]["paper"]["sets"]["generated"]["n"] == len(kept["paper"])


def test_shares_are_of_the_audited_images():
    real, training = (pixels(load_fashion(part, small=True)[0][:40]) for part in ("test", "train"))
    generator = torch.Generator().manual_seed(0)
    assert plant_share(real, training, "exact", 0, generator) is real
    x = plant_share(real[:20], training, "exact", 0.25, generator)
    assert len(x) == 20 and torch.equal(x[5:], real[5:20])
    assert all((training == copy).flatten(1).all(1).any() for copy in x[:5])


def test_twins_are_near_and_not_equal():
    x = torch.zeros(10, 1, 8, 8)
    twice = with_twins(x, 4, torch.Generator().manual_seed(0))
    assert len(twice) == 14 and torch.equal(twice[:10], x)
    assert 0.01 < twice[10:].std() < 0.03


def test_smooth_images_are_those_of_their_seed():
    x = smooth_images(50, seed=3)
    assert x.shape == (50, 3, 32, 32) and x.abs().max() <= 1
    assert torch.equal(x, smooth_images(50, seed=3)) and not torch.equal(x, smooth_images(50, 4))
    variance = torch.linalg.svdvals((x - x.mean(0)).flatten(1)).square()
    assert variance[:12].sum() > 0.3 * variance.sum()
