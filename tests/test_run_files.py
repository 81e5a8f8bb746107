"What lies in the folder of a run is what it should be, or one line says what it is."

import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cpsample.cli import app, processes
from cpsample.core.guard import fit_guard
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import check_images, load_digits, values_anywhere
from cpsample.core.schedule import make_schedule
from cpsample.practice.runs import (
    CONFIGS,
    UnknownMembersWarning,
    fit_run_guard,
    load_model,
    load_protected_run,
    members_of,
    run_of,
)
from cpsample.practice.training import STOPPING
from cpsample.workshop.files import output_files, writable
from cpsample.workshop.records import read_tensors
from cpsample.workshop.registry import build_network, fill_network
from cpsample.workshop.studies import Study, Workspace, load_or_create, run_study

DIGITS = load_digits()[0]
SCHEDULE = make_schedule()
TRAIN = ["train", "digits", "--images", "30", "--tiny", "--device", "cpu", "--out"]


def call(*words):
    "(exit status, the last line on standard error) of a command."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, (result.stderr.splitlines() or [""])[-1]


def refused(says, *words):
    status, line = call(*words)
    assert status == 2 and says in line and "cpsample: unexpected" not in line, line


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path):
    assert call(*TRAIN, tmp_path / "run")[0] == 0
    assert call("guard", tmp_path / "run", "--preset", "paper", "--steps", 2)[0] == 0
    return tmp_path / "run"


def rewritten(path, **changes):
    "Change entries of the record in the header of a guard."
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["guard"])
    save_file(load_file(path), path, {"guard": json.dumps(record | changes)})


# Whose guard it is.


def test_a_guard_that_names_no_images_is_used_with_a_warning(run):
    rewritten(run / "guard.safetensors", made={})
    with pytest.warns(UnknownMembersWarning, match="does not say whose images it protects"):
        load_protected_run(run, device="cpu")


def test_a_run_without_others_gets_the_guard_of_the_paper(run):
    "It learns of its members alone, so nobody has to be found who is none."
    members = members_of(run).members
    for others in (members[:0], DIGITS[100:120]):
        path = run / f"g{len(others)}"
        config = replace(CONFIGS["digits"].tiny(), guard_steps=3)
        fit_run_guard(config, members, others, SCHEDULE, path, preset="paper", progress=False)
    first, second = (load_guard(run / f"g{n}").classifier.state_dict() for n in (0, 20))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="at least 8"):
        fit_run_guard(config, members, members[:0], SCHEDULE, run / "h", progress=False)


# Asked to stop.


def test_a_terminal_that_is_closed_is_a_signal_to_stop():
    assert {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)} == {*STOPPING}


# Names that are no text.


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes")
def test_a_folder_whose_name_is_no_text_is_refused_before_training(tmp_path):
    out = Path(f"{tmp_path}/run\udcff")
    refused(r"run\udcff is no name in UTF-8", *TRAIN, out)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="is no name in UTF-8"):
        writable(out / "below")
    guard = fit_guard(DIGITS[:8], SCHEDULE, steps=1, width=8)
    with pytest.raises(OSError, match="is no name in UTF-8"):
        save_guard(guard, tmp_path / "g\udcff")
    assert not list(tmp_path.iterdir())


@given_settings(max_examples=30, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40))
def test_any_text_is_a_name(name):
    if name not in (".", ".."):
        output_files(f"folder/{name}", ".safetensors")


# Pipes.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_nobody_waits_for_a_pipe(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused("it is a pipe or a device", *TRAIN, tmp_path / "new", "--from", pipe)
    for name in ("run.json", "model.safetensors", "guard.safetensors"):
        kept = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        refused(name, "sample", run, "-n", 1, "--out", tmp_path / "s")
        refused(name, *TRAIN, run) if name == "run.json" else None
        (run / name).unlink()
        (run / name).write_bytes(kept)

    # The stages of a study, too.
    os.mkfifo(tmp_path / "s.json")
    study = Study("s", lambda workspace: {})
    with pytest.raises(ValueError, match="s.json is there and is not"):
        run_study(study, tmp_path, Workspace(tmp_path, progress=False))
    with pytest.raises(ValueError, match="pipe is no file"):
        load_or_create(pipe, dict)
    with pytest.raises(ValueError, match="it is a pipe or a device"):
        read_tensors(pipe, "guard", "a guard")


# Latents.


@pytest.mark.parametrize("shift", [14.0, -40.0, 400.0])
def test_latents_may_lie_anywhere(shift, tmp_path):
    x = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0)) + shift
    config = replace(CONFIGS["folder"], guard={"width": 8}, guard_steps=2, guard_batch_size=8)
    how = {"schedule": SCHEDULE, "path": tmp_path / "g", "progress": False, "preset": "paper"}
    config = replace(config, mirror=False)
    with values_anywhere():
        guard = fit_run_guard(config, x[:20], x[20:], **how)
    assert guard.made["members_as"] == "floats"
    if shift > 0:
        with pytest.raises(ValueError, match="images lie in"):
            check_images(x)


# What a header may say.

CHECK = {
    "threshold": 1.0,
    "levels": [0],
    "noisings": 1,
    "mirrored": False,
    "shape": [1, 8, 8],
    "probe": [0.0],
}
BROKEN_GUARDS = {
    "no levels": (lambda t: t.pop("abar"), {}, "abar, are missing"),
    "another shape": (
        lambda t: t.update({"classifier.inp.weight": torch.zeros(8, 9)}),
        {},
        "its weights are of another network: its inp.weight is",
    ),
    "a weight too few": (lambda t: t.pop("classifier.inp.bias"), {}, "its inp.bias is missing"),
    "a weight too many": (lambda t: t.update({"more": torch.zeros(1)}), {}, "its more is [1]"),
    "an empty report": (None, {"report": {}}, "its report does not say at which alpha"),
    "a report of texts": (None, {"report": {"alpha": "x"}}, "its report does not say"),
    "a level that there is not": (
        None,
        {"recognition": CHECK | {"through": 1000}},
        "its check asks the model at t = 1000, of 1000 levels",
    ),
    "another K": (None, {"config": {"shape": [1, 8, 8], "K": 3}}, "its weights are of another"),
    "an argument too many": (None, {"config": {"wide": 3}}, "wide=3) cannot be built"),
    "a width that is none": (None, {"config": {"shape": [1], "width": -1}}, "cannot be built"),
}


@pytest.mark.parametrize("name", BROKEN_GUARDS)
def test_a_broken_guard_says_in_words_what_is_wrong(name, tmp_path):
    spoil, changes, says = BROKEN_GUARDS[name]
    save_guard(fit_guard(DIGITS[:8], SCHEDULE, steps=1, width=8), tmp_path / "g")
    path = tmp_path / "g.safetensors"
    rewritten(path, **changes)
    if spoil:
        tensors = load_file(path)
        spoil(tensors)
        with safe_open(path, "pt") as file:
            save_file(tensors, path, file.metadata())
    with pytest.raises(ValueError, match="g.safetensors cannot be read as a guard: ") as caught:
        load_guard(tmp_path / "g")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "state_dict" not in str(caught.value)


def test_a_model_without_levels_or_with_other_weights_says_so(run):
    path = run / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    whole = load_file(path)
    for tensors, says in (
        ({name: x for name, x in whole.items() if name != "abar"}, "abar, are missing"),
        (whole | {"out.bias": torch.zeros(3)}, "its out.bias is \\[3\\], this network's \\[64\\]"),
    ):
        save_file(tensors, path, header)
        with pytest.raises(ValueError, match=f"cannot be read as a model: .*{says}"):
            load_model(path)


@pytest.mark.parametrize("options", [{"wide": 3}, {"width": -1}, {"width": "a"}, {"depth": 2.5}])
def test_a_guard_that_cannot_be_built_is_refused_in_one_line(options, run):
    record = run_of(run)
    record["config"]["guard"] = options
    (run / "run.json").write_text(json.dumps(record))
    before = content(run)
    refused("cannot be built: ", "guard", run)
    assert content(run) == before


def test_a_network_is_filled_whole_or_not_at_all():
    network = build_network("MLPDenoiser", {"shape": (1, 8, 8), "width": 8})
    other = build_network("MLPDenoiser", {"shape": (1, 8, 8), "width": 16})
    before = {name: x.clone() for name, x in network.state_dict().items()}
    with pytest.raises(ValueError, match="its .* is .*, this network's"):
        fill_network(network, other.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    fill_network(other, other.state_dict())


@pytest.mark.parametrize("said", ["abc", "-1", "0", "1.5", "²"])
def test_a_number_of_processes_that_is_none(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(ValueError, match="WORLD_SIZE must be the number of processes"):
        processes("cpu")
