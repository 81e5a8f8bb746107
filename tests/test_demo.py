"The demo: reproducible, recorded in the agreed shape, and quoted truthfully."

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpsample.core import demo
from cpsample.core.copying import CopyReport, reject_copies
from cpsample.core.demo import DEFAULTS, readme_table, run_demo, show_arms, table
from cpsample.core.images import load_digits
from cpsample.workshop.files import data_path

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(images=30, reference=60, train_steps=150, guard_steps=500, samples=60, sample_steps=20)
OPTIONS = [
    "--images",
    "30",
    "--train-steps",
    "60",
    "--guard-steps",
    "400",
    "--samples",
    "40",
    "--sample-steps",
    "10",
]


def without_times(record):
    record = copy.deepcopy(record)
    for key in ("seconds", "date", "command"):
        record.pop(key)
    for arm in record["arms"].values():
        arm.pop("seconds")
    return record


def test_two_processes_give_identical_json_apart_from_times(tmp_path):
    records = []
    for name in ("a", "b"):
        subprocess.run(
            [
                Path(sys.executable).parent / "cpsample",
                "demo",
                "--seed",
                "7",
                "--seed",
                "8",
                *OPTIONS,
                "--out",
                tmp_path / name,
                "--json",
                tmp_path / name / "demo.json",
            ],
            check=True,
            capture_output=True,
        )
        records.append(json.loads((tmp_path / name / "demo.json").read_text()))
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["demo.json", "demo.png"]
    assert without_times(records[0]) == without_times(records[1])
    assert records[0]["seeds"] == [7, 8] and records[0]["arms"]["unguarded"]["n"] == 80


def test_another_seed_gives_other_numbers():
    a, b = (run_demo((seed,), **SMALL)[0]["arms"]["unguarded"]["fd"] for seed in (0, 1))
    assert a != b


@pytest.fixture(scope="module")
def small():
    return run_demo((3,), **SMALL)


def test_record_has_the_agreed_shape(small):
    record, images, members = small
    assert {
        "name",
        "command",
        "commit",
        "hardware",
        "date",
        "seeds",
        "arms",
        "seconds",
    } <= record.keys()
    assert list(record["arms"]) == ["unguarded", "rejection", "guarded"]
    for arm in record["arms"].values():
        assert {
            "n",
            "copies",
            "copy_rate",
            "copy_ci",
            "fd",
            "fd_held_out",
            "certain",
            "seconds",
            "settings",
        } <= arm.keys()
        assert (
            arm["copies"] / arm["n"] == arm["copy_rate"]
            and arm["copy_ci"][0] <= arm["copy_rate"] <= arm["copy_ci"][1]
        )
    assert set(record["seconds"]) == {"denoiser", "guard", "sampling", "total"}
    assert record["arms"]["rejection"]["copies"] == 0 and members.shape == (30, 1, 8, 8)
    assert all(x.shape == (60, 1, 8, 8) and x.abs().max() <= 1 for x in images.values())


def test_scale_zero_gives_the_unguarded_images():
    _, images, _ = run_demo((3,), scale=0.0, **SMALL)
    assert torch.equal(images["unguarded"], images["guarded"])


def test_few_samples_and_a_model_that_copies_everything_lose_no_result(monkeypatch):
    record, images, members = run_demo((3,), **SMALL | {"samples": 2})
    assert len(show_arms(images, members).axes) == 2 * 3 * 2

    def copier(model, schedule, shape, n, *rest, **options):
        model(torch.zeros(n, *shape), torch.zeros(n, dtype=torch.int64))
        return load_digits()[0][:1].repeat(n, 1, 1, 1)

    monkeypatch.setattr(demo, "generate", copier)
    monkeypatch.setattr(
        demo,
        "copy_test",
        lambda x, x_train: CopyReport(
            torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.int64), 1 / 3
        ),
    )
    monkeypatch.setattr(
        demo,
        "reject_copies",
        lambda draw, x_train, n: reject_copies(draw, x_train, n, demo.copy_test, 2),
    )
    with pytest.warns(UserWarning, match="no arm of exact rejection"):
        record, images, _ = run_demo((3,), **SMALL)
    assert (
        list(record["arms"]) == ["unguarded", "guarded"]
        and record["arms"]["unguarded"]["copy_rate"] == 1
        and "guarded" in table(record)
    )


def test_table_and_picture_show_every_arm(small):
    record, images, members = small
    assert all(
        name in table(record) and name.split()[0] in readme_table(record) for name in record["arms"]
    )
    assert len(show_arms(images, members, columns=5).axes) == 2 * 3 * 5


def test_readme_quotes_the_result_on_file():
    "Every number in the README's table is the file's, and the file was made with the settings that the package ships."
    record = json.loads(data_path("results/demo.json").read_text())
    assert readme_table(record) in (ROOT / "README.md").read_text()
    assert record["settings"] == DEFAULTS and len(record["seeds"]) >= 3


def test_result_on_file_keeps_what_the_readme_promises():
    arms = json.loads(data_path("results/demo.json").read_text())["arms"]
    assert all(a["n"] >= 3000 for a in arms.values())
    assert arms["unguarded"]["copy_rate"] >= 0.4
    assert arms["guarded"]["copy_rate"] <= arms["unguarded"]["copy_rate"] / 10
    assert arms["guarded"]["fd"] <= 1.3 * arms["rejection"]["fd"]
