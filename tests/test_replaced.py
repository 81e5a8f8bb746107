"Only what a command has written itself is replaced: anything else under its names stays."

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core import demo
from cpsample.core.guard import fit_guard
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits
from cpsample.core.schedule import make_schedule
from cpsample.judgement import report
from cpsample.practice.runs import CONFIGS, fit_run_guard, run_of
from cpsample.workshop.files import is_written_by, write_arrays, write_picture

DIGITS = load_digits()[0]
TRAIN = ["train", "digits", "--images", "30", "--tiny", "--device", "cpu", "--out"]


def call(*words):
    "(exit status, the last line on standard error) of a command."
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, (result.stderr.splitlines() or [""])[-1]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of a few steps, beside the arrays that an audit compares."
    folder = tmp_path_factory.mktemp("replaced")
    images = (DIGITS[:60] * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.save(folder / "made.npy", images[:20])
    np.save(folder / "known.npy", images[20:])
    assert call(*TRAIN, folder / "run")[0] == 0
    return folder / "run"


@pytest.fixture
def quick_demo(monkeypatch):
    record = {"name": "demo", "command": "cpsample demo", "arms": {}}
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: (record, {}, None))
    monkeypatch.setattr(demo, "show_arms", lambda *_: plt.figure())
    monkeypatch.setattr(demo, "table", lambda *_: "")


def commands(run, out):
    "The files that commands write, and their words."
    made, known = run.parent / "made.npy", run.parent / "known.npy"
    return {
        "sample": ([".npz", ".png"], ["sample", run, "--unguarded", "-n", 2, "--out", out]),
        "attack": ([""], ["attack", run, "--unguarded", "--limit", 20, "--json", out]),
        "audit": (
            [".html", ".json", ".csv", ".png"],
            ["audit", made, known, "--thumbnails", "--out", out],
        ),
        "demo": (["/demo.png", "/n"], ["demo", "--out", out, "--json", out / "n"]),
    }


NAMES = ("sample", "attack", "audit", "demo")


def a_page(path):
    path.write_text("<!doctype html><html><head><title>mine</title></head></html>")


def a_picture(path):
    fig = plt.figure()
    fig.savefig(path, format="png")
    plt.close(fig)


def arrays(path):
    with open(path, "wb") as file:
        np.savez(file, images=np.zeros((2, 8, 8, 1), np.uint8))


FOREIGN = {
    "text": lambda path: path.write_text("mine"),
    "nothing": lambda path: path.touch(),
    "a package": lambda path: path.write_text('{"name": "x", "version": "1.0"}'),
    "a record of the same name": lambda path: path.write_text('{"name": "attack"}'),
    "a list": lambda path: path.write_text('["name", "command", "attacks"]'),
    "arrays": arrays,
    "a picture": a_picture,
    "a page": a_page,
    "tensors": lambda path: save_file({"a": np.zeros(2)}, path),
}


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("command", NAMES)
def test_a_foreign_file_is_refused_whatever_it_is_and_whoever_stands_beside_it(
    command, foreign, run, tmp_path, quick_demo
):
    out = tmp_path / "o"
    suffixes, words = commands(run, out)[command]
    for taken in ([suffixes[0]], suffixes):
        for suffix in taken:
            path = Path(f"{out}{suffix}")
            path.parent.mkdir(exist_ok=True)
            FOREIGN[foreign](path)
        before = content(tmp_path)
        status, line = call(*words)
        assert status == 2 and "this command has not written it" in line
        assert content(tmp_path) == before


@pytest.mark.parametrize("command", NAMES)
def test_what_a_command_has_written_it_replaces_also_when_a_part_is_gone(
    command, run, tmp_path, quick_demo
):
    out = tmp_path / "o"
    suffixes, words = commands(run, out)[command]
    paths = [Path(f"{out}{suffix}") for suffix in suffixes]
    for gone in (None, *paths):
        if gone and len(paths) > 1:
            gone.unlink()
        status, line = call(*words)
        assert status in (0, 1, 3), line
        assert all(path.is_file() for path in paths)


def test_commands_do_not_replace_one_another_s_files(run, tmp_path, quick_demo):
    out = tmp_path / "o"
    assert call(*commands(run, out)["demo"][1])[0] == 0
    for name in ("sample", "audit"):
        for _, words in [commands(run, out / "demo")[name], commands(run, out / "n")[name]]:
            for ending in (".npz", ".json"):
                shutil.copy(out / "n", f"{words[-1]}{ending}")
            before = content(tmp_path)
            assert call(*words)[0] == 2 and content(tmp_path) == before
    status, line = call("attack", run, "--unguarded", "--json", out / "n")
    assert status == 2 and "has not written it" in line


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", "checkpoint.safetensors"])
def test_no_part_of_a_run_is_replaced_by_results(name, run):
    before = content(run)
    assert call("attack", run, "--unguarded", "--json", run / name)[0] == 2
    assert content(run) == before


def test_a_report_of_version_0_1_is_recognised_by_its_form(tmp_path):
    style = f"<style>{report._STYLE_0_1}</style>"
    page = f"<html><head><title>t</title>{style}</head><body></body></html>"
    (tmp_path / "o.html").write_text(f'<!doctype html><html lang="en">{page}')
    (tmp_path / "o.json").write_text('{"name": "audit", "sets": {}, "tests": {}}')
    report.check_report(tmp_path / "o")


# Guards.


def guard_of(images, schedule=None):
    return fit_guard(images, schedule or make_schedule(), steps=1, width=8)


def test_a_guard_does_not_replace_what_is_no_guard(tmp_path):
    guard = guard_of(DIGITS[:8])
    (tmp_path / "package.json").write_text('{"name": "x"}')
    before = content(tmp_path)
    with pytest.raises(ValueError, match="package.json is there already, and is no guard"):
        save_guard(guard, tmp_path / "package")
    assert content(tmp_path) == before
    save_file({"a": np.zeros(2)}, tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match="g.safetensors is there already, and is no guard"):
        save_guard(guard, tmp_path / "g")

    # Its own it does replace, also one whose settings are gone.
    for _ in range(2):
        save_guard(guard, tmp_path / "own")
        (tmp_path / "own.json").unlink()


SMALL = CONFIGS["digits"].tiny()


def fitted(path, members, schedule=None, **more):
    options = dict(preset="paper", progress=False) | more
    schedule = schedule or make_schedule()
    return fit_run_guard(SMALL, members, DIGITS[100:120], schedule, path, **options)


def test_a_guard_of_other_images_or_levels_is_kept(tmp_path):
    fitted(tmp_path / "g", DIGITS[:8])
    before = content(tmp_path)
    for images, schedule in ((DIGITS[8:16], None), (DIGITS[:8], make_schedule("cosine"))):
        with pytest.raises(
            ValueError, match="g.safetensors is the guard of other .*: give another"
        ):
            fitted(tmp_path / "g", images, schedule)
    assert content(tmp_path) == before
    fitted(tmp_path / "g", DIGITS[:8])
    assert load_guard(tmp_path / "g").made["n"] == 8

    # In the folder of a run, to which it belongs, a wrong one is what is to be replaced.
    fitted(tmp_path / "g", DIGITS[8:16], replaces=True)


def test_a_guard_that_does_not_say_whose_it_is_is_kept(tmp_path):
    guard = guard_of(DIGITS[:8])
    guard.made = {}
    save_guard(guard, tmp_path / "g")
    with pytest.raises(ValueError, match="g.safetensors is the guard of other"):
        fitted(tmp_path / "g", DIGITS[:8])


def test_the_guard_of_a_pipeline_is_refused_before_the_pipeline_is_read(tmp_path):
    (tmp_path / "g.json").write_text("{}")
    words = ["--pipeline", tmp_path / "nothing", "--data", tmp_path, "--out", tmp_path / "g"]
    status, line = call("guard", *words)
    assert status == 2 and "g.json is there already, and is no guard" in line


# The folder of a run.


@pytest.mark.parametrize("text", ['{"experiment": "wandb"}', "[]", "mine", ""])
def test_a_description_of_somebody_else_is_kept(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    before = content(tmp_path)
    status, line = call(*TRAIN, tmp_path)
    assert status == 2 and "run.json" in line
    assert content(tmp_path) == before


def test_pictures_that_are_called_like_sheets_of_samples_are_kept(tmp_path):
    a_picture(tmp_path / "samples-000020.png")
    before = content(tmp_path)
    status, line = call(*TRAIN, tmp_path)
    assert status == 2 and "samples-000020.png is there already" in line
    assert content(tmp_path) == before


def test_a_run_that_goes_on_replaces_its_sheets_also_those_without_a_mark(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    a_picture(tmp_path / "run" / "samples-000020.png")
    assert call(*TRAIN, tmp_path / "run")[0] == 0
    assert is_written_by("train", tmp_path / "run" / "samples-000020.png")
    assert run_of(tmp_path / "run")["images"] == 30


def test_a_mark_can_be_read_and_changes_no_number(tmp_path):
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    write_arrays(tmp_path / "a.npz", "sample", images=images)
    assert np.array_equal(np.load(tmp_path / "a.npz")["images"], images)
    write_picture(tmp_path / "a.png", plt.figure(), "sample")
    for path in (tmp_path / "a.npz", tmp_path / "a.png"):
        assert is_written_by("sample", path) and not is_written_by("demo", path)


def test_results_of_a_study_do_not_replace_tensors_of_somebody_else(tmp_path):
    from cpsample.workshop.studies import Study, Workspace, run_study

    study, calls = Study("s", {"a": lambda workspace: calls.append(1) or {"x": 1}}), []
    work = tmp_path / "work"
    work.mkdir()
    save_file({"a": np.zeros(2)}, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="s.safetensors is there and is not results of s"):
        run_study(study, tmp_path, Workspace(work, progress=False))
    assert not calls and not (tmp_path / "s.json").exists()
    (tmp_path / "s.json").write_text(json.dumps({"name": "s"}))
    run_study(study, tmp_path, Workspace(work, progress=False))
