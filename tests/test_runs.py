"cpsample train, guard and sample: a run from the shell, and the mistakes people make with it."

import json
import re
import shutil
import warnings
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.calibration import UncoveredGuardError
from cpsample.core.guard import UncalibratedGuardWarning
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import first_occurrence, pixels
from cpsample.core.protection import protect
from cpsample.core.recognition import probed, recognise
from cpsample.practice import runs
from cpsample.practice.runs import (
    CONFIGS,
    Config,
    divide_non_members,
    load_model,
    load_protected_run,
    members_of,
)

TRAIN = ["train", "fashion-small", "--images", "16", "--tiny"]


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeeds(*words):
    "What a command says that ends well."
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(says, *words):
    result = call(*words)
    lines = [line for line in result.stderr.splitlines() if line.startswith("cpsample: ")]
    assert result.exit_code == 2 and len(lines) == 1 and says in lines[0], result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A tiny model with a tiny guard."
    folder = tmp_path_factory.mktemp("runs") / "run"
    succeeds(*TRAIN, "--out", folder)
    assert "Certain of" in succeeds("guard", folder, "--steps", "800")
    return folder


def test_a_guard_of_a_run_asks_its_model_before_it_has_the_last_word(run):
    "Behind its own push it sees little by itself."
    guard, model = load_guard(run / "guard"), load_model(run / "model.safetensors").model
    members = pixels(members_of(run).members)
    assert guard.recognition["through"] == 100
    assert recognise(guard, members, model).float().mean() > 0.9
    with pytest.raises(ValueError, match="asks the model first .* give model="):
        recognise(guard, members)


def test_without_a_model_or_where_that_sees_too_little_the_guard_is_asked_itself(run, monkeypatch):
    guard, asked = load_guard(run / "guard"), []
    members = pixels(members_of(run).members)

    def calibrate_check(guard, covered, held_out, *, model, through=None, **options):
        asked.append((model, through))
        if through is not None:
            raise UncoveredGuardError(0.5, 0.99, "it recognises too few")

    monkeypatch.setattr(runs, "calibrate_check", calibrate_check)
    runs.calibrate_check_asking_first(guard, members, members, model=None)
    runs.calibrate_check_asking_first(guard, members, members, model="model")
    assert asked == [(None, None), ("model", 100), ("model", None)]


def test_samples_are_guarded_unless_told_otherwise(run, tmp_path):
    def sample(name, *options):
        "What the command says, and the images that it writes."
        said = succeeds("sample", run, "-n", 12, "--out", tmp_path / name, "--seed", 3, *options)
        return said, np.load(tmp_path / f"{name}.npz")["images"]

    said, images = sample("guarded")
    assert "The guard stepped in" in said
    assert images.shape == (12, 28, 28, 1) and images.dtype == np.uint8 and images.std() > 1
    assert (tmp_path / "guarded.png").stat().st_size > 1000

    # What makes a GPU faster changes nothing here, and says so.
    said, fast = sample("fast", "--fast")
    assert "--fast is for a GPU: on cpu images are drawn as always" in said
    assert np.array_equal(fast, images)

    said, unguarded = sample("unguarded", "--unguarded")
    assert "The guard" not in said and unguarded.std() > 1
    _, again = sample("again")
    assert np.array_equal(images, again)


def with_check(run, folder, threshold):
    "A copy of a run whose guard recognises what is more familiar than a threshold."
    shutil.copytree(run, folder)
    guard = load_guard(folder / "guard")
    look = {"levels": [0], "noisings": 1, "mirrored": False, "through": None}
    members = members_of(run)[1]
    guard.recognition = {"threshold": threshold, **look, **probed(guard, pixels(members), [0])}
    save_guard(guard, folder / "guard")
    return folder


def test_the_guard_has_the_last_word_on_the_command_line(run, tmp_path):
    def sample(folder, *options):
        out = tmp_path / "samples"
        said = succeeds("sample", folder, "-n", 6, "--steps", 4, "--out", out, *options)
        return said, len(np.load(f"{out}.npz")["images"])

    lenient = with_check(run, tmp_path / "lenient", threshold=1e6)
    assert "recognised 0 of 6" in sample(lenient)[0]

    # Who recognises everything serves nothing, and writes nothing.
    strict = with_check(run, tmp_path / "strict", threshold=-1e6)
    out = tmp_path / "none"
    refused("recognised all 6 images in 10 tries", "sample", strict, "-n", 6, "--steps", 4)
    refused("in 2 tries", "sample", strict, "-n", 6, "--steps", 4, "--tries", 2, "--out", out)
    assert not out.with_suffix(".npz").exists()
    assert sample(strict, "--no-check")[1] == 6

    # An audit draws as `sample` does.
    refused("recognised all 5", "audit", strict, "--number", 5, "--out", tmp_path / "a")


def test_a_guard_without_a_check_says_so(run, tmp_path):
    folder = with_check(run, tmp_path / "plain", threshold=0.0)
    guard = load_guard(folder / "guard")
    guard.recognition = None
    save_guard(guard, folder / "guard")
    said = succeeds("sample", folder, "-n", 2, "--steps", 2, "--out", tmp_path / "s")
    assert "cpsample guard RUN --check" in said


def test_strength_multiplies_the_scale_of_the_guard(run, tmp_path, monkeypatch):
    guards, own_scale = [], load_guard(run / "guard").scale

    def watched(model, guard):
        guards.append(guard)
        return protect(model, guard)

    monkeypatch.setattr(runs, "protect", watched)
    for strength in (1, 4):
        out = "--out", tmp_path / "s"
        succeeds("sample", run, "-n", 2, *out, "--steps", 2, "--strength", strength)
    assert [guard.scale for guard in guards] == [own_scale, 4 * own_scale]
    assert all(guard.calibrated for guard in guards)


def test_a_run_is_loaded_with_all_that_sampling_needs(run):
    protected = load_protected_run(run, device="cpu")
    assert protected._fields == ("model", "schedule", "shape", "guard", "device")
    assert protected.shape == [1, 28, 28] and protected.device == "cpu"
    assert protected.guard.calibrated and protected.schedule.T == 1000

    bare = load_protected_run(run, unguarded=True, device="cpu")
    assert bare.guard is None
    x_t, t = torch.randn(2, 1, 28, 28), torch.tensor([999, 999])
    torch.testing.assert_close(protected.model(x_t, t), bare.model(x_t, t))


def test_the_guard_is_private_and_the_run_says_what_it_is(run):
    assert (run / "guard.safetensors").stat().st_mode & 0o777 == 0o600
    description = json.loads((run / "run.json").read_text())
    assert list(description) == "data size channels images fingerprint from config".split()
    assert description["data"] == "fashion-small" and description["images"] == 16
    assert description["config"]["steps"] == 20


def test_a_stopped_run_goes_on_and_a_finished_one_stays(run):
    before = (run / "model.safetensors").read_bytes()
    succeeds(*TRAIN, "--out", run)
    assert (run / "model.safetensors").read_bytes() == before
    refused("steps 20 there, 10 here", *TRAIN, "--out", run, "--steps", 10)


def test_fine_tuning_from_a_model(run, tmp_path):
    options = "--images", 5, "--tiny", "--seed", 4, "--from", run / "model.safetensors"
    succeeds("train", "fashion-small", *options, "--out", tmp_path / "tuned")
    tuned = load_model(tmp_path / "tuned" / "model.safetensors")
    assert tuned.model.config == load_model(run / "model.safetensors").model.config


# Who may see which images.


@given(n_members=st.integers(1, 60), n_non_members=st.integers(0, 1500))
def test_what_teaches_a_guard_never_judges_it(n_members, n_non_members):
    "The two parts are disjoint and complete, and the same for everybody who asks."
    members = torch.zeros(n_members, 1)
    non_members = 1 + torch.arange(float(n_non_members))[:, None]
    for_guard, test = divide_non_members(members, non_members)
    assert torch.equal(torch.cat([for_guard, test]), non_members)
    assert not set(for_guard.flatten().tolist()) & set(test.flatten().tolist())
    assert len(for_guard) == min(n_non_members, 4 * n_members + 400)

    again = divide_non_members(-torch.ones(n_members, 1), non_members.clone())
    assert torch.equal(again.for_guard, for_guard) and torch.equal(again.test, test)


def test_members_and_non_members_of_a_run_are_all_images_and_disjoint(run):
    images, again = members_of(run), members_of(run)
    assert len(images.members) == 16 and images.description["images"] == 16
    assert torch.equal(images.members, again.members)
    assert torch.equal(images.non_members, again.non_members)

    everything = torch.cat([images.members, images.non_members])
    first = first_occurrence(everything)
    assert len(everything) == 3000 and (first[16:] >= 16).all()


def test_every_field_of_a_configuration_is_explained_and_none_can_be_changed():
    for field in fields(Config):
        assert re.search(rf"^    {field.name}\b[^:]*: \S", Config.__doc__, re.MULTILINE), field.name
    with pytest.raises(FrozenInstanceError):
        CONFIGS["digits"].steps = 5


# Mistakes.


def pictures(folder, n, broken=False, first=0):
    "A folder of n random pictures, and perhaps half a file."
    folder.mkdir()
    for i in range(n):
        random = np.random.default_rng(first + i)
        image = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.jpg")
    if broken:
        (folder / "bad.jpg").write_bytes((folder / "0.jpg").read_bytes()[:200])
    return folder


def test_a_folder_of_three_images(tmp_path):
    few, others = pictures(tmp_path / "few", 2, first=100), tmp_path / "others"
    images, run = pictures(tmp_path / "images", 3), tmp_path / "run"
    pictures(others, 12, first=100)
    succeeds("train", images, "--size", 16, "--tiny", "--out", run)
    refused("--reference FOLDER", "guard", run)
    refused("at least 8", "guard", run, "--reference", few)
    refused("certain of", "guard", run, "--reference", others, "--steps", 1)
    assert [path.name for path in run.glob("guard*")] == ["guard.checkpoint.safetensors"]

    (images / "1.jpg").unlink()
    refused("not those that", "guard", run)


def test_broken_files(tmp_path):
    images = pictures(tmp_path / "images", 4, broken=True)
    train = "train", images, "--size", 16, "--tiny", "--out"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        succeeds(*train, tmp_path / "run")
    assert any("bad.jpg" in str(warning.message) for warning in said)
    refused("bad.jpg", *train, tmp_path / "strict", "--strict")


def test_mistakes_in_training(tmp_path, run):
    out = "--out", tmp_path / "r"
    (tmp_path / "empty").mkdir()
    refused("no images in", "train", tmp_path / "empty", *out)
    unknown = "neither a folder, nor an archive (.zip, .tar, .tar.gz), nor a .npy or .npz file"
    refused(unknown, "train", "cats", *out)
    refused("cannot split", "train", "fashion-small", "--images", 9999, *out)
    refused("--steps must be between 1", "train", "fashion-small", "--steps", 0, *out)
    refused("no model at", "train", "fashion-small", "--from", tmp_path / "none", *out)
    refused("/dev/null", *TRAIN, "--out", "/dev/null/r")
    assert not (tmp_path / "r").exists()

    odd = pictures(tmp_path / "odd", 3)
    out = "--out", tmp_path / "r2"
    refused("cannot be divided by", "train", odd, "--size", 30, "--tiny", *out)


def test_mistakes_afterwards(tmp_path, run):
    refused("holds no run", "guard", tmp_path)
    refused("holds no run", "sample", tmp_path)
    refused("--number must be between 1", "sample", run, "-n", 0)
    refused("--number must be between 1", "audit", run, "-n", -3)
    refused("between 0 and 1, got 1.5", "audit", run, "--max-copy-rate", 1.5)
    refused("between 2 and 1,000", "sample", run, "--steps", 1)
    refused("--strength must be between", "sample", run, "--strength", -1)
    refused("unknown preset", "guard", run, "--preset", "best")


def test_sampling_without_a_guard_has_to_be_asked_for(tmp_path):
    succeeds("train", "fashion-small", "--images", 4, "--tiny", "--out", tmp_path / "run")
    sample = "sample", tmp_path / "run", "--out", tmp_path / "s"
    refused("--unguarded", *sample)
    succeeds(*sample, "--unguarded", "-n", 3)


def test_the_papers_guard_is_written_as_printed(tmp_path):
    succeeds(*TRAIN, "--out", tmp_path)
    assert "not calibrated" in succeeds("guard", tmp_path, "--preset", "paper", "--steps", 5)
    with pytest.warns(UncalibratedGuardWarning):
        succeeds("sample", tmp_path, "-n", 4, "--out", tmp_path / "s")


def test_the_check_of_a_run_is_calibrated_and_kept(tmp_path):
    run = tmp_path / "run"
    succeeds("train", "digits", "--images", "10", "--steps", "600", "--out", run)
    said = succeeds("guard", run, "--steps", "1200")
    found = r"Recognises \d+\.\d% of \d+ copies \({}\) and \d+\.\d% of \d+ unseen images, "
    found += r"(after the model was asked .*t = 100|by itself; behind its own push)"
    assert re.search(found.format("members with noise"), said)
    before = load_guard(run / "guard")
    assert before.at == "x0" and before.recognition["copies"] == "members with noise"

    # Nothing is trained: the guard is the same, and knows now what it recognises of the model's.
    said = succeeds("guard", run, "--check")
    assert re.search(found.format("drawn by the model"), said)
    after, model = load_guard(run / "guard"), load_model(run / "model.safetensors").model
    assert recognise(after, pixels(members_of(run).members), model).all()
    for name, weight in before.classifier.state_dict().items():
        assert torch.equal(weight, after.classifier.state_dict()[name])
    assert (after.alpha, after.scale, after.report) == (before.alpha, before.scale, before.report)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--check"], "give the folder of a run, or --pipeline"),
        (["--pipeline", "p", "--check"], "--check takes the folder of a run"),
        (["nowhere", "--check"], "nowhere holds no run"),
        (["nowhere", "--check", "--steps", "9"], "--check trains nothing"),
    ],
)
def test_a_check_that_cannot_be_is_refused(words, says):
    refused(says, "guard", *words)


def test_a_run_is_not_written_among_its_images(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    refused("is the folder of the images", "train", tmp_path, "--out", f"{tmp_path}/.")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
