"The study on Fashion-MNIST: arms, numbers and stages, with the networks that ship."

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from cpsample.core.guard_files import load_guard
from cpsample.core.images import pixels
from cpsample.practice import fashion_study
from cpsample.practice.fashion_study import (
    ARMS,
    CHOOSING,
    REPORTED,
    SHIPPED,
    STUDY,
    Drawn,
    always_on,
    arm_guards,
    copy_numbers,
    draw_accepted,
    keep_samples,
    measure_part,
    ship_weights,
    study_images,
    train_networks,
)
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Workspace

QUICK = replace(
    REPORTED, small=True, n=12, chunk=5, base=replace(REPORTED.base, sample_steps=4), tried=(8,)
)
ON_RECORD = json.loads(data_path("results/fashion.json").read_text())


@pytest.fixture
def workspace(tmp_path):
    "A workspace in which the networks of the part `reported` have been trained already."
    (tmp_path / "reported").mkdir()
    for name, stage in SHIPPED.items():
        weights = data_path(f"weights/fashion_{name}.safetensors")
        shutil.copyfile(weights, tmp_path / f"{stage}.safetensors")
    return Workspace(tmp_path, progress=False)


def test_the_parts_share_no_images_and_are_those_of_the_file_on_record():
    assert list(STUDY.parts) == ["choosing", "reported"]
    assert not set(CHOOSING.rows) & set(REPORTED.rows) and CHOOSING.seed != REPORTED.seed
    assert CHOOSING.test[0] != REPORTED.test[0]
    for settings in (CHOOSING, REPORTED):
        part = ON_RECORD[settings.name]
        assert (part["seed"], part["n"]) == (settings.seed, settings.n)
        assert part["arms"].keys() - {"held_out"} <= ARMS.keys()


@pytest.fixture
def quick_calibration(monkeypatch):
    "Calibration of the arm `paper_toward`, which takes long, answers what is on record."
    settings = ON_RECORD["reported"]["arms"]["paper_toward"]["settings"]

    def calibrate(guard, members, held_out):
        assert len(members) == 100 and len(held_out) == 500 and guard.form == "toward"
        for name in ("alpha", "scale", "t_max"):
            setattr(guard, name, settings[name])
        guard.report = {"alpha": guard.alpha}

    monkeypatch.setattr(fashion_study, "calibrate", calibrate)


def test_a_part_has_the_keys_of_the_file_on_record(workspace, quick_calibration):
    answer = json.loads(json.dumps(measure_part(QUICK, workspace)))
    assert answer["settings"].keys() == ON_RECORD["settings"].keys()
    assert answer["calibration"] == ON_RECORD["reported"]["calibration"]
    for arm, numbers in ON_RECORD["reported"]["arms"].items():
        assert answer["arms"][arm].keys() == numbers.keys(), arm
        assert answer["arms"][arm]["what"] == numbers["what"]

    # Guards have the settings of the record, whatever the number of samples.
    for arm in ("guarded", "paper", "paper_toward"):
        settings = ON_RECORD["reported"]["arms"][arm]["settings"]
        assert answer["arms"][arm]["settings"] == settings, arm
    assert list(answer["arms"])[:5] == ["unguarded", "guarded", "rejection", "paper", "guarded_8"]


def test_an_arm_whose_guard_covers_too_little_is_left_out(workspace, monkeypatch, capsys):
    def refuse(guard, members, held_out):
        raise ValueError("this guard is certain of 3 % of its training images")

    monkeypatch.setattr(fashion_study, "calibrate", refuse)
    images = study_images(QUICK)
    networks = train_networks(QUICK, images, workspace)
    guards = arm_guards(QUICK, networks, images, device="cpu")
    assert list(guards) == ["guarded", "paper", "guarded_8"]
    assert guards["guarded_8"].scale == 2 * guards["guarded"].scale == 8 * networks.guard.scale
    assert "no arm paper_toward: this guard is certain of 3 %" in capsys.readouterr().err


def test_a_stage_is_made_once(workspace):
    made = []

    def make():
        made.append(1)
        return Drawn(torch.ones(2, 1, 28, 28), {"certain": 0.5})

    for _ in range(2):
        images, notes = keep_samples(workspace, "reported/arm-2", make)
        assert images.shape == (2, 1, 28, 28) and notes["certain"] == 0.5
    assert len(made) == 1 and notes.keys() == {"certain", "seconds"}

    # Without its samples it is made again.
    (workspace.folder / "reported" / "arm-2.safetensors").unlink()
    keep_samples(workspace, "reported/arm-2", make)
    assert len(made) == 2


def test_rejection_starts_from_the_unguarded_samples_and_takes_no_copy():
    images = study_images(QUICK)
    members, test = pixels(images.members), images.test
    unguarded = torch.cat([test[:4], members[:8]])
    calls = []

    def draw(model, n, seed):
        calls.append((n, seed))
        return test[100:][: len(calls) * n][-n:]

    x, notes = draw_accepted(draw, None, unguarded, members=members, settings=QUICK)
    assert torch.equal(x, torch.cat([test[:4], test[100:108]]))
    assert calls == [(5, 1), (5, 2)] and notes == {"accepted": 14 / 22}


def test_planted_copies_are_counted_by_every_test():
    images = study_images(QUICK)
    members = pixels(images.members)
    for planted in (0, 10, 40):
        x = torch.cat([members[:planted], images.test[: 100 - planted]])
        numbers = copy_numbers(x, members)
        assert numbers["copies"] == planted and numbers["copy_rate"] == planted / 100
        assert abs(numbers["copies_carlini"] - planted) <= 1
        assert abs(numbers["copies_cosine"] - planted) <= 1


def test_a_guard_that_never_rests_leaves_the_other_as_it_is():
    guard = load_guard(data_path("weights/fashion_guard.safetensors").with_suffix(""))
    alpha, t_max = guard.alpha, guard.t_max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restless = always_on(guard)
        fashion_study.protect(lambda x, t: x, restless)
    assert (guard.alpha, guard.t_max, guard.report["alpha"]) == (alpha, t_max, alpha)
    assert restless.t_max == 1000 and restless.alpha == 0.4999


def test_what_ships_says_where_it_comes_from(workspace, tmp_path):
    destination = tmp_path / "weights"
    destination.mkdir()
    ship_weights(workspace.folder, destination)
    for name in SHIPPED:
        path = data_path(f"weights/fashion_{name}.safetensors")
        assert (destination / path.name).read_bytes() == path.read_bytes()
        record = json.loads((destination / f"fashion_{name}.json").read_text())
        on_file = json.loads(path.with_suffix(".json").read_text())
        assert record.keys() - {"threads"} == on_file.keys() - {"threads"}
