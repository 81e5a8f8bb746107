"cpsample train, guard and sample: a run from the shell, and the mistakes people make with it."

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.guard import UncalibratedGuardWarning, protect
from cpsample.core.guard_files import load_guard
from cpsample.practice import runs
from cpsample.practice.runs import load_model

TRAIN = ["train", "fashion-small", "--images", "16", "--tiny"]


def call(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(says, *words):
    result = call(*words)
    lines = [line for line in result.stderr.splitlines() if line.startswith("cpsample: ")]
    assert result.exit_code == 2 and len(lines) == 1 and says in lines[0], result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A tiny model with a tiny guard."
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert call(*TRAIN, "--out", folder).exit_code == 0
    done = call("guard", folder, "--steps", "800")
    assert done.exit_code == 0 and "Certain of" in done.stdout, done.output
    return folder


def test_samples_are_guarded_unless_told_otherwise(run, tmp_path):
    said = call("sample", run, "-n", 12, "--out", tmp_path / "a", "--seed", 3).stdout
    assert "The guard stepped in" in said
    assert (
        "The guard"
        not in call(
            "sample", run, "-n", 12, "--out", tmp_path / "b", "--seed", 3, "--unguarded"
        ).stdout
    )
    assert call("sample", run, "-n", 12, "--out", tmp_path / "c", "--seed", 3).exit_code == 0
    a, b, c = (np.load(tmp_path / f"{k}.npz")["images"] for k in "abc")
    assert (
        a.shape == (12, 28, 28, 1)
        and a.dtype == np.uint8
        and np.array_equal(a, c)
        and a.std() > 1
        and b.std() > 1
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_strength_multiplies_the_scale_of_the_guard(run, tmp_path, monkeypatch):
    guards, own = [], load_guard(run / "guard").scale
    monkeypatch.setattr(
        runs, "protect", lambda model, guard: guards.append(guard) or protect(model, guard)
    )
    for strength in (1, 4):
        assert (
            call(
                "sample",
                run,
                "-n",
                2,
                "--out",
                tmp_path / "s",
                "--steps",
                2,
                "--strength",
                strength,
            ).exit_code
            == 0
        )
    assert [g.scale for g in guards] == [own, 4 * own] and all(g.calibrated for g in guards)


def test_the_guard_is_private_and_the_run_says_what_it_is(run):
    assert (run / "guard.safetensors").stat().st_mode & 0o777 == 0o600
    about = json.loads((run / "run.json").read_text())
    assert (
        about["data"] == "fashion-small"
        and about["images"] == 16
        and about["config"]["steps"] == 20
    )


def test_a_stopped_run_goes_on_and_a_finished_one_stays(run):
    before = (run / "model.safetensors").read_bytes()
    assert (
        call(*TRAIN, "--out", run).exit_code == 0
        and (run / "model.safetensors").read_bytes() == before
    )
    refused("belongs to another run", *TRAIN, "--out", run, "--steps", 30)


def test_fine_tuning_from_a_model(run, tmp_path):
    assert (
        call(
            "train",
            "fashion-small",
            "--images",
            5,
            "--tiny",
            "--seed",
            4,
            "--from",
            run / "model.safetensors",
            "--out",
            tmp_path / "tuned",
        ).exit_code
        == 0
    )
    assert (
        load_model(tmp_path / "tuned" / "model.safetensors")[0].config
        == load_model(run / "model.safetensors")[0].config
    )


def pictures(folder, n, broken=False, first=0):
    folder.mkdir()
    for i in range(n):
        Image.fromarray(
            np.random.default_rng(first + i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        ).save(folder / f"{i}.jpg")
    if broken:
        (folder / "bad.jpg").write_bytes((folder / "0.jpg").read_bytes()[:200])
    return folder


def test_a_folder_of_three_images(tmp_path):
    mine = pictures(tmp_path / "mine", 3)
    assert call("train", mine, "--size", 16, "--tiny", "--out", tmp_path / "run").exit_code == 0
    refused("--reference FOLDER", "guard", tmp_path / "run")
    refused(
        "at least 8",
        "guard",
        tmp_path / "run",
        "--reference",
        pictures(tmp_path / "few", 2, first=100),
    )
    refused(
        "certain of",
        "guard",
        tmp_path / "run",
        "--reference",
        pictures(tmp_path / "others", 12, first=100),
        "--steps",
        1,
    )
    (mine / "1.jpg").unlink()
    refused("not those that", "guard", tmp_path / "run")


def test_broken_files(tmp_path):
    mine = pictures(tmp_path / "mine", 4, broken=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert call("train", mine, "--size", 16, "--tiny", "--out", tmp_path / "run").exit_code == 0
    assert any("bad.jpg" in str(w.message) for w in said)
    refused(
        "bad.jpg", "train", mine, "--size", 16, "--tiny", "--strict", "--out", tmp_path / "strict"
    )


def test_mistakes(tmp_path, run):
    (tmp_path / "empty").mkdir()
    refused("no images in", "train", tmp_path / "empty", "--out", tmp_path / "r")
    refused(
        "neither a folder, nor a .npy or .npz file, nor a known data set",
        "train",
        "cats",
        "--out",
        tmp_path / "r",
    )
    refused("cannot split", "train", "fashion-small", "--images", 9999, "--out", tmp_path / "r")
    refused("at least 1", "train", "fashion-small", "--steps", 0, "--out", tmp_path / "r")
    refused(
        "cannot be divided by",
        "train",
        pictures(tmp_path / "odd", 3),
        "--size",
        30,
        "--tiny",
        "--out",
        tmp_path / "r2",
    )
    refused(
        "no model at",
        "train",
        "fashion-small",
        "--from",
        tmp_path / "none",
        "--out",
        tmp_path / "r",
    )
    refused("/dev/null", *TRAIN, "--out", "/dev/null/r")
    refused("holds no run", "guard", tmp_path)
    refused("holds no run", "sample", tmp_path)
    refused("at least 1, got 0", "sample", run, "-n", 0)
    refused("at least 1, got -3", "audit", run, "-n", -3)
    refused("between 0 and 1, got 1.5", "audit", run, "--max-copy-rate", 1.5)
    refused("between 2 and T=1000", "sample", run, "--steps", 1)
    refused("scale must be finite and at least 0", "sample", run, "--strength", -1)
    refused("unknown preset", "guard", run, "--preset", "best")
    assert not (tmp_path / "r").exists()


def test_sampling_without_a_guard_has_to_be_asked_for(tmp_path):
    assert (
        call("train", "fashion-small", "--images", 4, "--tiny", "--out", tmp_path / "run").exit_code
        == 0
    )
    refused("--unguarded", "sample", tmp_path / "run", "--out", tmp_path / "s")
    assert (
        call("sample", tmp_path / "run", "--unguarded", "--out", tmp_path / "s", "-n", 3).exit_code
        == 0
    )


def test_the_papers_guard_is_written_as_printed(tmp_path):
    assert call(*TRAIN, "--out", tmp_path).exit_code == 0
    assert "not calibrated" in call("guard", tmp_path, "--preset", "paper", "--steps", 5).stdout
    with pytest.warns(UncalibratedGuardWarning):
        assert call("sample", tmp_path, "-n", 4, "--out", tmp_path / "s").exit_code == 0
