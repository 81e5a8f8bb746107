"Pipelines by their names: whatever stands there, one line, and nothing in it is run."

import json
import os
import pickle
import shutil
from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest
import torch
from fake_hub import FakeHub
from small_pipelines import QUIET, latent_pipeline, pixel_pipeline, save_noise
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.production import pipelines
from cpsample.production.pipelines import _load_without_captions, fit_named_pipeline_guard

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PART = "unet/diffusion_pytorch_model"


class Planted:
    "Runs when it is unpickled: it leaves a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path):
    "A pipeline in a folder, as `save_pretrained` wrote it."
    pixel_pipeline().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def weights(folder):
    return folder / f"{PART}.safetensors"


def planted(folder):
    "Its weights are a pickle that runs code."
    weights(folder).unlink()
    (folder / f"{PART}.bin").write_bytes(pickle.dumps(Planted(folder / "ran")))


def with_index(change):
    def build(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return build


def pipe_for(name):
    "A named pipe instead of a file: whoever reads it waits for ever."

    def build(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return build


def damaged(name):
    return lambda folder: (folder / name).write_text("[]")


def custom_pipeline(folder):
    with_index(lambda index: index | {"_class_name": ["mine", "Mine"]})(folder)
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def custom_network(folder):
    with_index(lambda index: index | {"unet": ["mine", "Mine"]})(folder)
    (folder / "unet" / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def single_file(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "v1-5.safetensors").write_bytes(b"weights")


def backwards(folder):
    "And the network does not say its size: first of all a pipeline is what it is."
    shutil.rmtree(folder)
    pipe = latent_pipeline()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe.save_pretrained(folder)
    network = folder / "unet/config.json"
    config = json.loads(network.read_text())
    network.write_text(json.dumps(config | {"sample_size": None}))


WRONG = {
    "pickle": (planted, "weights are pickles, which can run code when they are read"),
    "pipeline of its own": (custom_pipeline, "contains custom code in mine.py"),
    "network of its own": (custom_network, "contains custom code in mine.py"),
    "one file": (single_file, "v1-5.safetensors is a checkpoint in one file: .*from_single_file"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "holds no pipeline"),
    "empty index": (with_index(lambda index: {}), "names no class"),
    "list": (with_index(lambda index: []), "names no class"),
    "no JSON": (lambda f: (f / "model_index.json").write_text('{"_class_name"'), "valid JSON"),
    "unknown class": (with_index(lambda i: i | {"_class_name": "Nope"}), "cannot be read .*Nope"),
    "weights missing": (lambda f: weights(f).unlink(), "cannot be read as a pipeline: .*named"),
    "weights cut": (lambda f: weights(f).write_bytes(b"\x00" * 20), "cannot be read as a pipeline"),
    "weights of others": (
        lambda f: (f / "unet/config.json").write_text("{}"),
        "cannot be read as a pipeline",
    ),
    "no network": (with_index(lambda i: i | {"unet": [None, None]}), "neither a unet|cannot be"),
    "index is a pipe": (pipe_for("model_index.json"), "model_index.json is no file"),
    "weights are a pipe": (pipe_for(f"{PART}.safetensors"), "is no file"),
    "index is a list": (with_index(lambda index: ["_class_name"]), "names no class"),
    "network is a list": (damaged("unet/config.json"), "unet/config.json is damaged"),
    "scheduler is a list": (
        damaged("scheduler/scheduler_config.json"),
        "scheduler_config.json is damaged",
    ),
    "a flow backwards": (backwards, "^FlowMatchEuler.* with invert_sigmas runs backwards"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_folder_that_is_no_pipeline_for_a_guard(wrong, folder, tmp_path):
    "One line that does not send anybody to the network; nothing is run or written."
    change, says = WRONG[wrong]
    change(folder)
    with pytest.raises((ValueError, OSError), match=says) as told:
        fit_named_pipeline_guard(str(folder), "mine", "others", tmp_path / "guard")
    assert "\n" not in str(told.value) and "network and try" not in str(told.value)
    assert not (folder / "ran").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("size", ["8", [8], [1, 8, 8], 0, -8, 8.5, True, [8, "8"]])
def test_a_size_that_is_none_is_told_of(size, folder, tmp_path):
    network = folder / "unet/config.json"
    network.write_text(json.dumps(json.loads(network.read_text()) | {"sample_size": size}))
    with pytest.raises(ValueError, match=r"says that it draws sample_size=.*must be") as told:
        fit_named_pipeline_guard(str(folder), "mine", "others", tmp_path / "guard")
    assert "\n" not in str(told.value)


@pytest.mark.filterwarnings("ignore:6 of 6 pictures")
def test_an_oblong_pipeline_wants_an_array(folder, tmp_path):
    "Folders are cut to squares; saying so again helps nobody."
    network = folder / "unet/config.json"
    network.write_text(json.dumps(json.loads(network.read_text()) | {"sample_size": [8, 16]}))
    save_noise(tmp_path / "mine", 6, 20)
    with pytest.raises(ValueError, match=r"draws \(1, 8, 16\): folders are cut to squares"):
        fit_named_pipeline_guard(str(folder), *[tmp_path / "mine"] * 2, tmp_path / "guard")


def test_the_planted_pickle_would_run(folder):
    planted(folder)
    pickle.loads((folder / f"{PART}.bin").read_bytes())
    assert (folder / "ran").exists()


@pytest.mark.parametrize("name", ["none/of/these", "/no/such/folder", "./none", "."])
def test_a_path_where_nothing_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no folder|holds no pipeline") as told:
        _load_without_captions(name, "cpu")
    assert "\n" not in str(told.value)


def test_a_single_file_by_its_name(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(ValueError, match="is a checkpoint in one file"):
        _load_without_captions(str(tmp_path / "model.ckpt"), "cpu")
    assert not (tmp_path / "ran").exists()


def test_half_precision_alone_is_read(tmp_path):
    "Weights of the variant fp16; text encoders are not read, however they are kept."
    pipe = latent_pipeline()
    half = {name: part.half() for name, part in pipe.components.items() if name == "unet"}
    pipe.save_pretrained(tmp_path, variant="fp16")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/pytorch_model.bin").write_bytes(
        pickle.dumps(Planted(tmp_path / "ran"))
    )
    read = _load_without_captions(str(tmp_path), "cpu")
    assert read.unet.dtype == read.vae.dtype == torch.float32
    for name, weight in half["unet"].state_dict().items():
        assert read.unet.state_dict()[name].equal(weight.float())
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        for name, value in hub.settings(tmp_path / "cache").items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield hub


def test_a_name_that_the_hub_does_not_know(hub):
    with pytest.raises(OSError, match="^loading 'me/none' on the Hub failed") as told:
        _load_without_captions("me/none", "cpu")
    assert "\n" not in str(told.value)


def test_pickles_on_the_hub_are_told_as_such():
    "By what diffusers says of a repository that holds nothing else."
    words = "Could not find the necessary `safetensors` weights in {'unet/x.bin'} (variant=None)"
    with pytest.raises(ValueError, match="^me/old is not read: its weights are pickles"):
        with pipelines._pipeline_errors("me/old"):
            raise OSError(words)


def test_the_command_line_says_it_in_one_line(folder, tmp_path):
    planted(folder)
    save_noise(tmp_path / "mine", 6, 8)
    words = ["guard", "--pipeline", folder, "--data", tmp_path / "mine"]
    words += ["--reference", tmp_path / "mine", "--device", "cpu", "--out", tmp_path / "guard"]
    refused = CliRunner().invoke(app, [str(word) for word in words])
    assert refused.exit_code == 2 and "weights are pickles" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
