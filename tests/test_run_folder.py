"""The folder of a run: what is refused changes nothing, and what lies there belongs together.

A guard of another model, two programs at once, a training that is continued.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.ddpm import MLPDenoiser
from cpsample.core.guard import Guard, check_guard_fits, members_identity
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, pixels
from cpsample.core.schedule import make_schedule
from cpsample.practice import runs
from cpsample.practice.runs import (
    CONFIGS,
    UnknownMembersWarning,
    coverage_watch,
    fit_run_guard,
    load_model,
    load_protected_run,
    members_of,
    run_of,
    save_model,
    steps_needed,
    train_denoiser,
)
from cpsample.practice.unet import UNetClassifier
from cpsample.workshop.files import write_tensors
from cpsample.workshop.records import plain

# The guards here are of a few steps: what they do not know is not the subject.
pytestmark = pytest.mark.filterwarnings("default::cpsample.core.calibration.UncoveredMemberWarning")

TRAIN = ["train", "digits", "--images", "8", "--tiny", "--device", "cpu"]
DIGITS = load_digits()[0]
SMALL = replace(CONFIGS["digits"].tiny(), guard_steps=30)


def call(*words):
    "A command: (exit status, what it printed, its one line on standard error)."
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("cpsample: ")]
    return result.exit_code, result.stdout, lines


def succeeds(*words):
    status, printed, lines = call(*words)
    assert status == 0, lines
    return printed


def refused(says, *words):
    "The refusal, which is one line and says so."
    status, _, lines = call(*words)
    assert status == 2 and len(lines) == 1 and says in lines[0], (status, lines)
    return lines[0]


def content(folder):
    "Every file below a folder, with its bytes."
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header(path):
    with safe_open(path, "pt") as file:
        return json.loads(next(iter(file.metadata().values())))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A tiny run with a tiny guard that covers what it covers."
    folder = tmp_path_factory.mktemp("made") / "run"
    succeeds(*TRAIN, "--out", folder)
    succeeds("guard", folder, "--preset", "x_t", "--steps", 500, "--wanted", 0.02)
    return folder


@pytest.fixture
def run(made, tmp_path):
    "A copy of it, to be spoiled."
    return shutil.copytree(made, tmp_path / "run")


def edit(run, **changes):
    "Change what a run says about itself."
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(description | changes))


# What is refused changes nothing.


REFUSALS = {
    "other images": ("images 8 there, 9 here", ["--images", 9]),
    "another seed": ("config.seed 0 there, 1 here", ["--seed", 1]),
    "another rate": ("config.lr", ["--lr", 0.01]),
    "another batch": ("config.batch_size 8 there, 4", ["--batch-size", 4]),
    "fewer steps": ("steps 20 there, 19 here", ["--steps", 19]),
    "a device that is none": ("", ["--device", "abacus"]),
    "a rate that is none": ("", ["--lr", "inf"]),
    "mirrors": ("config.mirror False there", ["--mirror"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_training_leaves_every_byte_of_the_folder(name, run):
    before, (says, options) = content(run), REFUSALS[name]
    refused(says, *TRAIN, "--out", run, *options)
    assert content(run) == before


def test_another_set_of_images_is_refused_by_its_fingerprint(run):
    before = content(run)
    refused("belongs to another run", "train", "fashion-small", *TRAIN[2:], "--out", run)
    (run / "checkpoint.safetensors").unlink()  # the description alone knows it, too
    before.pop(run / "checkpoint.safetensors")
    refused("images 8 there, 9 here", *TRAIN, "--out", run, "--images", 9)
    assert content(run) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "abacus"],
        ["--device", "meta"],
        ["--lr", "inf"],
        ["--batch-size", 0],
        ["--from", "model.safetensors"],
    ],
)
def test_a_training_that_is_refused_leaves_no_description_behind(options, tmp_path):
    save_model(MLPDenoiser((1, 4, 4), 8), make_schedule(), tmp_path / "model.safetensors", {})
    options = [tmp_path / word if word == "model.safetensors" else word for word in options]
    refused("", *TRAIN, "--out", tmp_path / "run", *options)
    assert not content(tmp_path / "run")


def test_a_model_that_fails_in_its_first_step_leaves_nothing(tmp_path, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(runs, "ddpm_loss", out_of_memory)
    refused("out of memory", *TRAIN, "--out", tmp_path / "run")
    assert not content(tmp_path / "run")


def test_a_lone_description_of_an_earlier_version_binds_nobody(run):
    for path in content(run):
        if path.name != "run.json":
            path.unlink()
    succeeds(*TRAIN, "--out", run, "--images", 9)
    assert run_of(run)["images"] == 9


# To start from another model.


def test_a_model_of_another_shape_or_schedule_is_no_start(tmp_path):
    path, out = tmp_path / "start.safetensors", tmp_path / "run"
    save_model(MLPDenoiser((1, 4, 4), 8), make_schedule(), path, {})
    says = "draws images of shape (1, 4, 4), these are (1, 8, 8)"
    refused(says, *TRAIN, "--out", out, "--from", path)
    save_model(MLPDenoiser((1, 8, 8), 8), make_schedule("cosine", T=50), path, {})
    refused("the schedule of", *TRAIN, "--out", out, "--from", path)
    assert not content(out)


def test_models_to_start_from_are_told_apart_by_all_their_weights(tmp_path):
    def start(value):
        torch.manual_seed(0)
        model = MLPDenoiser((1, 8, 8), 8)
        nn.init.constant_(model.out.bias, value)
        return model

    how = {"progress": False}
    train_denoiser(SMALL, DIGITS[:8], tmp_path, start=start(0.0), **how)
    train_denoiser(SMALL, DIGITS[:8], tmp_path, start=start(0.0), **how)
    with pytest.raises(ValueError, match="belongs to another run .start"):
        train_denoiser(SMALL, DIGITS[:8], tmp_path, start=start(0.1), **how)


def test_a_start_that_could_not_be_saved_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "fit", pytest.fail)
    with_object = MLPDenoiser((1, 8, 8), 8)
    with_object.config["width"] = object()
    for start in (nn.Linear(2, 2), with_object):
        with pytest.raises(ValueError, match="unknown network|cannot be written as JSON"):
            train_denoiser(SMALL, DIGITS[:8], tmp_path, start=start, progress=False)


@pytest.mark.parametrize(
    "change", [{"lr": float("nan")}, {"steps": 0}, {"every": 0}, {"clip": 0.0}, {"beta": 1.0}]
)
def test_numbers_that_cannot_work_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        train_denoiser(replace(SMALL, **change), DIGITS[:8], tmp_path, progress=False)
    assert not content(tmp_path)


# More steps.


def test_a_finished_run_is_continued_and_says_so(run):
    losses = load_file(run / "checkpoint.safetensors")["losses"]
    succeeds(*TRAIN, "--out", run, "--steps", 35)
    after = load_file(run / "checkpoint.safetensors")["losses"]
    assert len(after) == 35 and torch.equal(after[:20], losses)
    assert load_model(run / "model.safetensors").made["continued"] == [20]
    assert run_of(run)["config"]["steps"] == 35
    assert load_protected_run(run, device="cpu").guard.calibrated


def test_description_and_model_stay_those_of_one_training_until_both_are_new(run, monkeypatch):
    "The disk is full when the longer model is written, or the training is stopped before."
    before = {name: (run / name).read_bytes() for name in ("run.json", "model.safetensors")}

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(runs, "write_model", full)
    refused("no space left", *TRAIN, "--out", run, "--steps", 35)
    assert {name: (run / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    succeeds(*TRAIN, "--out", run, "--steps", 35)
    assert run_of(run)["config"]["steps"] == load_model(run / "model.safetensors").made["steps"]


def test_a_run_that_is_interrupted_says_how_it_goes_on(tmp_path, monkeypatch):
    import signal

    loss, calls, through = runs.ddpm_loss, [], tmp_path / "through"

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGTERM)
        return loss(*args, **options)

    monkeypatch.setattr(runs, "ddpm_loss", interrupted)
    status, _, lines = call(*TRAIN, "--out", tmp_path / "run")
    assert status == 143 and "after step 9 of 20" in lines[0] and "goes on from there" in lines[0]
    assert sorted(path.name for path in content(tmp_path / "run")) == [
        "checkpoint.safetensors",
        "run.json",
    ]
    monkeypatch.undo()
    for folder in (tmp_path / "run", through):
        succeeds(*TRAIN, "--out", folder)
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (through / name).read_bytes()


# Two programs at once.


def test_a_folder_in_use_is_left_alone(run):
    before, says = content(run), "is in use by another program"
    with filelock.FileLock(run / ".cpsample.lock"):
        refused(says, *TRAIN, "--out", run, "--steps", 35)
        refused(says, "guard", run, "--steps", 50)
    after = content(run)
    after.pop(run / ".cpsample.lock", None)
    assert after == before
    succeeds(*TRAIN, "--out", run)


# Guards that are another model's.


def commands(run, out):
    "What loads a model and its guard."
    yield "sample", run, "-n", 2, "--steps", 2, "--out", out / "samples"
    yield "audit", run, "-n", 4, "--out", out / "audit"
    yield "attack", run


def swapped(run, **changes):
    "Put another guard into the folder of a run."
    guard = load_guard(run / "guard")
    save_guard(replace(guard, **changes), run / "guard")


def shape_of_others(run):
    other = UNetClassifier((1, 4, 4), 8, width=8)
    swapped(run, classifier=other)


GUARDS_OF_OTHERS = {
    "images": (
        lambda run: swapped(run, made=members_identity(DIGITS[100:108])),
        "on other images than",
    ),
    "schedule": (lambda run: swapped(run, schedule=make_schedule("cosine")), "noise schedule"),
    "levels": (lambda run: swapped(run, schedule=make_schedule(T=500)), "T=500"),
    "shape": (shape_of_others, "(1, 4, 4)"),
}


@pytest.mark.parametrize("name", GUARDS_OF_OTHERS)
def test_a_guard_of_another_model_is_refused_by_every_command(name, run, tmp_path):
    spoil, says = GUARDS_OF_OTHERS[name]
    spoil(run)
    for words in commands(run, tmp_path):
        refused(says, *words, "--device", "cpu")
    assert not list(tmp_path.glob("samples*")) and not list(tmp_path.glob("audit*"))


def test_a_model_trained_on_other_images_than_the_description_says(run, tmp_path):
    "As after a training that an earlier version refused, too late."
    edit(run, images=9)
    says = "was trained on other images than its run.json says"
    refused(says, "guard", run, "--steps", 50)
    for words in [*commands(run, tmp_path)][1:]:
        refused(says, *words, "--device", "cpu")


def test_headers_of_model_and_guard_name_the_images_alike(run):
    model, guard = header(run / "model.safetensors"), header(run / "guard.safetensors")
    assert model["made"]["data"] == guard["made"]["members"]
    assert guard["made"]["members_as"] == "bytes"


def test_a_guard_of_version_0_1_is_compared_by_the_images(run):
    "It holds the fingerprint of floats, so the images are asked; if they are gone, it is said."
    members = members_of(run).members
    old = {"members": runs.fingerprint(pixels(members)), "n": 8}
    swapped(run, made=old)
    assert load_protected_run(run, device="cpu").guard.calibrated

    swapped(run, made=old | {"members": runs.fingerprint(DIGITS[:8])})
    with pytest.raises(ValueError, match="on other images than"):
        load_protected_run(run, device="cpu")
    swapped(run, made=old)
    edit(run, data=str(run / "gone"))
    with pytest.warns(UnknownMembersWarning, match="nobody can tell"):
        load_protected_run(run, device="cpu")


def test_a_guard_and_a_model_that_disagree_without_their_images_are_refused(run):
    swapped(run, made=members_identity(DIGITS[100:108]))
    edit(run, data=str(run / "gone"))
    with pytest.raises(ValueError, match="on other images than"):
        load_protected_run(run, device="cpu")


# A guard that covers too little.


def members_and_others(n=8):
    return DIGITS[:n], DIGITS[n : n + 60]


def fit_small(path, steps=30, **options):
    members, others = members_and_others()
    config = replace(SMALL, guard_steps=steps)
    options = {"schedule": make_schedule(), "progress": False} | options
    return fit_run_guard(config, members, others, path=path, **options)


def test_a_refused_guard_is_kept_and_continued(run):
    (run / "guard.safetensors").unlink()
    line = refused("certain of", "guard", run, "--steps", 45)
    assert "95% are wanted, after 45 steps" in line and f"cpsample guard {run} --steps " in line
    kept = load_file(run / "guard.checkpoint.safetensors")
    assert len(kept["losses"]) == 45 and not (run / "guard.safetensors").exists()

    # The same again is refused again, without a step; more steps go on; less can be accepted.
    refused("after 45 steps", "guard", run, "--steps", 45)
    assert torch.equal(load_file(run / "guard.checkpoint.safetensors")["losses"], kept["losses"])
    succeeds("guard", run, "--steps", 600, "--wanted", 0.02)
    guard = load_guard(run / "guard")
    assert guard.made["steps"] == 600 and guard.made["continued"] == [45]
    assert guard.report["wanted"] == 0.02
    assert not (run / "guard.checkpoint.safetensors").exists()


def test_the_message_names_every_option_that_makes_it_the_same_guard(run):
    line = refused("certain of", "guard", run, "--steps", 5, "--t-max", 300, "--preset", "member")
    assert f"cpsample guard {run} --t-max 300 --preset member --steps 10 continues it" in line


@pytest.mark.parametrize(
    "change, says",
    [
        ({"t_max": 300}, "guard.t_max 200 there, 300 here"),
        ({"alpha": 0.1}, "guard.alpha 0.3 there, 0.1 here"),
        ({"t_power": 2.0}, "guard.t_power 1.0 there, 2.0 here"),
        ({"form": "away"}, "guard.form toward there, away here"),
        ({"preset": "member"}, "guard.preset x0 there, member here"),
        ({"schedule": make_schedule("cosine")}, "guard.schedule linear there, cosine here"),
        ({"schedule": make_schedule(T=900)}, "guard.abar"),
    ],
)
def test_a_checkpoint_of_another_guard_is_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match="certain of"):
        fit_small(tmp_path / "g")
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        fit_small(tmp_path / "g", steps=40, **change)
    assert says in str(caught.value)


def test_other_members_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="certain of"):
        fit_small(tmp_path / "g")
    with pytest.raises(ValueError, match="guard.members"):
        fit_run_guard(
            SMALL,
            DIGITS[200:208],
            DIGITS[8:68],
            make_schedule(),
            tmp_path / "g",
            progress=False,
        )


def test_the_paper_s_guard_is_neither_calibrated_nor_shown_others(tmp_path):
    guard = fit_small(tmp_path / "g", preset="paper")
    assert guard.report is None and not (tmp_path / "g.checkpoint.safetensors").exists()


def test_coverage_is_looked_at_without_a_trace():
    "Random numbers, modes and weights are as before; the few members are always the same."
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 8))
    classifier[0].eval()

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier

        def forward(self, x, t):
            return self.inner(x)

    network, before = Timeless(), torch.get_rng_state()
    settings = {"at": "x_t", "t_max": 400, "form": "toward"}
    watch = coverage_watch(DIGITS[:3], make_schedule(), settings)
    values = {watch.measure(network) for _ in range(3)}
    assert len(values) == 1 and 0 <= values.pop() <= 1
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training and not classifier[0].training and classifier[2].training


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_the_estimate_is_right_where_the_missed_share_falls_like_a_power(power):
    history = [(step, 1 - 0.9 * (step / 50) ** -power) for step in range(50, 2001, 50)]
    coverage = history[-1][1]
    wanted = 1 - 0.9 * (6000 / 50) ** -power
    assert steps_needed(history, 2000, coverage, wanted) == pytest.approx(6000, rel=0.02)


def test_there_is_no_estimate_without_progress():
    assert steps_needed([], 100, 0.5, 0.9) is None
    assert steps_needed([(50, 0.0), (100, 0.0), (150, 0.0), (200, 0.0)], 200, 0.0, 0.9) is None
    falling = [(step, 1 - step / 3000) for step in range(50, 2001, 50)]
    assert steps_needed(falling, 2000, 0.3, 0.9) is None


# What a folder holds is read with care.


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("null"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(path.read_text().replace('"size": 32', '"size": "32"')),
        lambda path: path.write_text(path.read_text().replace('"seed"', '"sead"')),
        lambda path: path.write_text(path.read_text().replace('"steps": 20', '"steps": null')),
    ],
)
def test_a_damaged_description_is_one_line_with_its_file(spoil, run, tmp_path):
    spoil(run / "run.json")
    before = content(run)
    for words in [*commands(run, tmp_path), ["guard", run], [*TRAIN, "--out", run]]:
        refused("run.json", *words)
    assert content(run) == before


@pytest.mark.parametrize("name", ["model", "guard"])
def test_a_damaged_header_is_one_line_with_its_file(name, run):
    path = run / f"{name}.safetensors"
    whole = path.read_bytes()
    for change in (b'{\\"network\\": 5', b'{\\"netw\\"', b"null"):
        begin = whole.index(b'"{\\"') + 1
        path.write_bytes(whole[:begin] + change.ljust(40, b" ")[:40] + whole[begin + 40 :])
        refused(path.name, "sample", run, "-n", 2, "--device", "cpu")


# What can be written.


def test_wrapped_and_tied_networks_come_back(tmp_path, schedule):
    tied = MLPDenoiser((1, 8, 8), 8)
    tied.blocks[1] = tied.blocks[0]
    for model in (tied, torch.compile(tied), nn.DataParallel(tied)):
        save_model(model, schedule, tmp_path / "m.safetensors", {"seed": torch.tensor(3)})
        saved = load_model(tmp_path / "m.safetensors")
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
        assert torch.equal(saved.model(x, t), tied(x, t)) and saved.made == {"seed": 3}

    classifier = UNetClassifier((1, 8, 8), 8, width=8)
    for wrapped in (torch.compile(classifier), nn.DataParallel(classifier)):
        guard = Guard(wrapped, schedule, scale=torch.tensor(2.0).item(), made={"n": 3})
        guard.made["level"], guard.alpha = torch.tensor(5), torch.tensor(0.1)
        save_guard(guard, tmp_path / "g")
        loaded = load_guard(tmp_path / "g")
        assert loaded.made == plain(guard.made) and loaded.alpha == pytest.approx(0.1)
        check_guard_fits(loaded, schedule=schedule, shape=(1, 8, 8))
    assert Path(tmp_path / "g.json").stat().st_mode & 0o777 == 0o600


def test_a_guard_whose_record_cannot_be_written_leaves_no_file(tmp_path, schedule):
    guard = Guard(UNetClassifier((1, 8, 8), 8, width=8), schedule, made={"by": object()})
    with pytest.raises(ValueError, match="the guard's record cannot be written as JSON"):
        save_guard(guard, tmp_path / "g")
    assert not content(tmp_path)


@pytest.mark.parametrize("name", ["model", "guard"])
@pytest.mark.parametrize(
    "change, says", [({"made": None}, "`made`"), ({"schedule": 3}, "`schedule`"), ({"x": 1}, "x")]
)
def test_a_header_of_other_names_or_types_is_refused(name, change, says, run):
    "Not one that is met later, somewhere else, and no setting is ignored."
    path = run / f"{name}.safetensors"
    write_tensors(load_file(path), path, {name: json.dumps(header(path) | change)})
    line = refused(path.name, "sample", run, "-n", 2, "--device", "cpu")
    assert "is damaged, or of another version" in line and says in line


def test_the_guard_of_a_pipeline_is_kept_and_continued_too(tmp_path):
    pytest.importorskip("diffusers")
    from small_pipelines import pixel_pipeline

    from cpsample.production.pipelines import fit_pipeline_guard

    pipe, path = pixel_pipeline(), tmp_path / "g.checkpoint.safetensors"
    images = DIGITS[:20]
    how = {"options": {"width": 8}, "progress": False, "command": "cpsample guard --pipeline P"}
    for steps, losses in ((2, 2), (4, 4)):
        says = f"after {steps} steps: cpsample guard --pipeline P --steps {2 * steps} continues"
        with pytest.raises(ValueError, match=says):
            fit_pipeline_guard(pipe, images[:4], images[4:], tmp_path / "g", steps=steps, **how)
        assert len(load_file(path)["losses"]) == losses
