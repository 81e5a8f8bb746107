"The study of attacks on the guard: a small run, one that was stopped, the file on record."

import json
from functools import partial

import pytest

from cpsample.core import guard_study
from cpsample.judgement import guard_attacks_study
from cpsample.judgement.guard_attacks_study import (
    GuardAttackSettings,
    attacks_of,
    measure_guard_attacks,
)
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace, run_study

SMALL = GuardAttackSettings(
    seeds=(0,),
    images=12,
    reference=1500,
    train_steps=120,
    guard_steps=400,
    strengths=(0.1,),
    asks=2,
    draws=20,
    few_steps=(5,),
    search_steps=5,
    starts=1,
    gradients=3,
    searches=4,
    halves=1,
)
STUDY = Study("guard_attacks", partial(measure_guard_attacks, settings=SMALL))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder and the record of a small run that was not stopped."
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_study(STUDY, folder, Workspace(folder, progress=False))


def test_a_small_study_has_the_shape_of_the_file_on_record(whole):
    on_file = json.loads(data_path("results/guard_attacks.json").read_text())
    _, record = whole
    assert record.keys() == on_file.keys()
    run, old = record["runs"][0], on_file["runs"][0]
    assert run.keys() == old.keys() and run["guard"].keys() == old["guard"].keys()
    assert list(run["attacks"]) == list(attacks_of(SMALL))
    assert list(old["attacks"]) == list(attacks_of(GuardAttackSettings()))
    for name, services in run["attacks"].items():
        assert list(services) == ["unguarded", "push", "push and check"], name
    assert [row["service"] for row in run["observers"]] == list(
        dict.fromkeys(row["service"] for row in old["observers"])
    )
    assert run["unfamiliar"].keys() == old["unfamiliar"].keys()


def test_a_stopped_study_goes_on_with_the_same_numbers(whole, monkeypatch):
    folder, record = whole
    for name in ("attack-0-3", "unfamiliar-0"):
        (folder / f"{name}.json").unlink()
    monkeypatch.setattr(guard_study, "fit_denoiser", None)  # trained already
    monkeypatch.setattr(guard_attacks_study, "fit_guard", None)
    again = run_study(STUDY, folder, Workspace(folder, progress=False))
    assert again["runs"] == record["runs"]


def test_other_settings_are_not_mixed(whole):
    folder, _ = whole
    other = GuardAttackSettings(**{**vars(SMALL), "draws": 30})
    study = Study("guard_attacks", partial(measure_guard_attacks, settings=other))
    with pytest.raises(ValueError, match="draws 20 there, 30 here"):
        run_study(study, folder, Workspace(folder, progress=False))
