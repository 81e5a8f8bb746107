"The study of the collapsed pipeline: its files have the shape of those on record, and it goes on."

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from cpsample.core.guard_files import load_guard
from cpsample.practice.datasets import read_idx
from cpsample.production import stable_diffusion_study as study
from cpsample.production.stable_diffusion import CAPTIONS, TINY, load_collapsed
from cpsample.production.stable_diffusion_study import MAKING, SCHEDULERS, WAYS, Settings
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace, run_study

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHIPPED = data_path("collapse/made.json").parent
MADE = json.loads((SHIPPED / "made.json").read_text())
REPORTED = json.loads(data_path("results/stable_diffusion.json").read_text())
FEW = Settings(
    size=TINY,
    seeds=(0,),
    strengths=(0.5, 1.0),
    answers=5,
    answers_of_scheduler=2,
    steps=2,
    pictures=40,
)
pytest.importorskip("torch_fidelity")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, progress=False)


@pytest.fixture
def with_collapse(workspace):
    "A workspace in which pipeline and guard are those that ship."
    shutil.copytree(SHIPPED, workspace.folder / "collapse")
    return workspace


@pytest.fixture
def asked(monkeypatch):
    "The captions that the pipeline is asked, in order."
    real, captions = study.ask, []

    def ask(pipe, caption, n, **how):
        captions.append(caption)
        return real(pipe, caption, n, **how)

    monkeypatch.setattr(study, "ask", ask)
    return captions


def shape_of(record):
    "What a record is made of: keys, kinds of values, and of lists the first."
    if isinstance(record, dict):
        return {key: shape_of(value) for key, value in record.items()}
    if isinstance(record, list):
        return [shape_of(record[0])]
    return type(record).__name__


def test_the_record_has_the_shape_of_the_one_on_file(with_collapse, asked):
    measure = functools.partial(study.measure, settings=FEW)
    folder = with_collapse.folder
    record = run_study(Study("stable_diffusion", measure), folder, with_collapse, command="test")
    newer = {"threads": "int"}  # than the file
    assert shape_of(record) == shape_of(REPORTED) | newer
    assert list(record["arms"]["guarded"]) == list(REPORTED["arms"]["guarded"]) == CAPTIONS
    assert list(record["schedulers"]) == list(REPORTED["schedulers"]) == list(SCHEDULERS)
    assert json.loads((folder / "stable_diffusion.json").read_text()) == record
    assert len(asked) == 2 * (len(CAPTIONS) + len(SCHEDULERS))


def test_a_measurement_that_was_stopped_goes_on(with_collapse, asked):
    first = study.measure(with_collapse, FEW)
    asked.clear()
    (with_collapse.folder / "caption-3.json").unlink()
    assert study.measure(with_collapse, FEW) == first
    assert asked == [CAPTIONS[3]] * 2


def test_tables_are_made_of_what_was_measured(with_collapse):
    record = study.measure(with_collapse, FEW)
    origin = {"command": "mine", "commit": "0a1b", "hardware": "one core"}
    table = study.answers_table(record | origin)
    assert table.count("\n| ") == 5 and table.endswith("`mine` at `0a1b`, one core.")
    assert study.schedulers_table(record).count("\n| ") == len(SCHEDULERS)


@pytest.fixture
def shipped_guard_for_all(monkeypatch):
    "Instead of training, every way gives the guard that ships; the ways that were trained."
    trained = []

    def make(pipe, size, path, *, repeats, t_max, progress):
        trained.append((repeats, t_max))
        for kind in ("safetensors", "json"):
            shutil.copy(SHIPPED / f"guard.{kind}", f"{path}.{kind}")
        return load_guard(path)

    monkeypatch.setattr(study, "make_guard", make)
    return trained


def test_the_choice_has_the_shape_of_the_one_on_file(with_collapse, shipped_guard_for_all, asked):
    folder = with_collapse.folder / "collapse"
    for name in ("guard.safetensors", "guard.json", "answers-idx3-ubyte.xz"):
        (folder / name).unlink()
    answer = study.choose_guard(with_collapse, FEW)
    assert shape_of(answer) == {key: shape_of(MADE["guard"])[key] for key in answer}
    assert [row["guard"] for row in answer["tried"]] == [way for way in WAYS for _ in range(2)]
    assert shipped_guard_for_all == [tuple(way) for way in WAYS.values()]
    assert len(asked) == 8

    # What ships: the chosen guard, readable for all, and answers of each way.
    chosen = answer["tried"][answer["chosen"]]
    assert load_guard(folder / "guard").scale == chosen["s"]
    assert (folder / "guard.safetensors").stat().st_mode & 0o777 == 0o644
    assert read_idx(folder / "answers-idx3-ubyte.xz").shape == (4 * FEW.answers, 28, 28)

    # The second time nothing is trained, and nobody is asked.
    assert study.choose_guard(with_collapse, FEW) == answer
    assert len(shipped_guard_for_all) == 4 and len(asked) == 8


def test_the_best_is_near_and_leaves_few_copies():
    def row(copies, fd):
        return {"copies": copies, "n": 200, "fd": fd}

    tried = [row(3, 1.0), row(2, 9.0), row(1, 8.0), row(0, 8.5)]
    assert study.best_of(tried, range(4)) == 2
    assert study.best_of(tried, [0, 1]) == 1
    assert study.best_of([row(9, 1.0), row(7, 5.0)], range(2)) == 1


def test_a_pipeline_is_trained_and_can_be_read(workspace):
    study.train_pipeline(workspace, FEW)
    folder = workspace.folder / "collapse"
    pipe = load_collapsed(folder)
    assert pipe.unet.dtype == torch.float32
    assert read_idx(folder / "members-idx3-ubyte.xz").shape == (TINY.members, 28, 28)

    # Everything goes on from its checkpoint: the second time no step is left to be made.
    answer = study.train_pipeline(workspace, FEW)
    assert shape_of(answer["losses"]) == shape_of(MADE["train"]["losses"])
    on_record = MADE["train"]["size"].keys() | {"repeats"}  # which came later
    assert answer["size"].keys() == on_record and answer["seed"] == 0


@pytest.mark.parametrize("where", ["shipped", "trained"])
def test_the_pipeline_draws_when_it_is_loaded_plainly(workspace, where):
    folder = SHIPPED
    if where == "trained":
        study.train_pipeline(workspace, FEW)
        folder = workspace.folder / "collapse"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(CAPTIONS[0], num_inference_steps=2, output_type="np").images
    assert len(pictures) == 1 and not np.isnan(pictures).any()


def test_only_what_is_missing_is_made(with_collapse, monkeypatch):
    made, parts = [], {}
    for name in MAKING.parts:
        parts[name] = lambda workspace, name=name: made.append(name) or {"seed": 0}
    monkeypatch.setattr(study, "MAKING", Study("made", parts))
    path = study.made_folder(with_collapse) / "made.json"
    assert made == [] and json.loads(path.read_text()) == MADE

    path.write_text(json.dumps({"train": MADE["train"]}))
    study.made_folder(with_collapse)
    record = json.loads(path.read_text())
    assert made == ["guard"] and record["train"] == MADE["train"]
    assert record["guard"]["command"] == "cpsample reproduce stable_diffusion"
