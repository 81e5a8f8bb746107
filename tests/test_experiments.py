"A plan that is true and costs nothing, and runs that survive a disconnect and a full disk."

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_archives import pack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.ddpm import generate
from cpsample.core.schedule import make_schedule
from cpsample.practice import datasets
from cpsample.practice.runs import Config, fit_run_guard, train_denoiser
from cpsample.production import cifar10, experiments
from cpsample.production.celeba64 import CELEBA64
from cpsample.production.cifar10 import CIFAR10, DDPM_32, NARROW, DiffusersUNet
from cpsample.production.experiments import (
    DATA,
    EXPERIMENTS,
    plan,
    plan_table,
    public_denoiser,
    results,
    results_table,
    run_experiment,
    tiny_size,
    with_archives,
)
from cpsample.workshop import files, studies
from cpsample.workshop.costs import network_cost
from cpsample.workshop.registry import build_network
from cpsample.workshop.studies import load_or_create

ROOT = Path(__file__).resolve().parent.parent
NARROW_CIFAR10 = tiny_size(CIFAR10["full"], "crops-32", options=NARROW)
SIZES = [*CIFAR10.values(), NARROW_CIFAR10, *CELEBA64.values()]
STAGES = "base all_guard all all_attacks tuned subset_guard subset subset_attacks".split()
ARMS = ("unguarded", "guarded", "rejection", "held_out")

# tiny, and smaller still: 32×32, folded to 8×8
FOLDED = {"width": 16, "mults": (1, 2), "unshuffle": 4}
_TINY = CELEBA64["tiny"]
TINY = replace(
    _TINY,
    data="crops-32",
    attacked=2,
    subset=5,
    tune=_TINY.tune | {"steps": 5},
    config=replace(
        _TINY.config,
        shape=(3, 32, 32),
        options=_TINY.config.options | FOLDED,
        guard=FOLDED,
        steps=5,
        sample_steps=4,
        guard_steps=300,
    ),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "(the folder of a finished run, its record)."
    folder = tmp_path_factory.mktemp("experiments") / "run"
    return folder, run_experiment(TINY, folder, progress=False)


@pytest.fixture
def copied(done, tmp_path):
    "A copy of the finished run, to take things away from."
    return Path(shutil.copytree(done[0], tmp_path / "run"))


def go_on(folder, e=TINY):
    return run_experiment(e, folder, progress=False)


def without_seconds(record):
    if not isinstance(record, dict):
        return record
    return {k: without_seconds(v) for k, v in record.items() if "seconds" not in k}


def same(a, b):
    "The same record, but for times."
    return without_seconds(a) == without_seconds(b)


def watched(monkeypatch, *names):
    "Which of the functions `names` of the module are called, in order; they do what they did."
    calls = []

    def noted(name):
        real = getattr(experiments, name)

        def call(*args, **options):
            calls.append(name)
            return real(*args, **options)

        return call

    for name in names:
        monkeypatch.setattr(experiments, name, noted(name))
    return calls


WORK = ("generate", "train_denoiser", "fit_run_guard", "scores_of", "frechet_distance")


def without_data(monkeypatch, name, load=None):
    "The images `name` cannot be loaded, or by `load`; how many they are is known."
    monkeypatch.setitem(DATA, name, DATA[name]._replace(load=load))


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_second_run_makes_nothing(copied, done, monkeypatch):
    calls = watched(monkeypatch, *WORK)
    without_data(monkeypatch, TINY.data)  # not even the data are asked for again
    before = times_of(copied)
    assert go_on(copied) == done[1]
    assert calls == []
    assert before == times_of(copied)


def test_killed_between_stages(copied, done, monkeypatch):
    for name in ("subset.json", "subset_attacks.json", "results.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "subset_guarded")
    calls = watched(monkeypatch, *WORK)
    assert same(go_on(copied), done[1])
    assert calls.count("generate") == 2
    assert "train_denoiser" not in calls and "fit_run_guard" not in calls


def test_killed_while_sampling(copied, done, monkeypatch):
    "Chunk 0 is there, chunk 1 half: one is drawn, the half is swept out, the images are the same."
    whole = copied / "all_guarded" / "00001.safetensors"
    writer = f"{2**22 + 1}-{files._this_place()}"  # a process that is gone
    half = whole.with_name(f".00001.safetensors.{writer}-abcd_123.part.safetensors")
    half.write_bytes(whole.read_bytes()[:1000])
    whole.unlink()
    (copied / "all.json").unlink()
    calls = watched(monkeypatch, *WORK)
    assert same(go_on(copied), done[1])
    assert calls.count("generate") == 1 and calls.count("fit_run_guard") == 0
    assert whole.exists() and not half.exists()


HIDDEN_FILES = [
    ".gitlab-ci.yml",
    ".env.local",
    ".results.json.bak",
    "src/.eslintrc.json",
    "base/.model.safetensors.backup01.safetensors",
    ".github/.a.b",
]


def put_hidden_files(folder):
    for name in HIDDEN_FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("his")


def test_in_its_own_folder_a_run_removes_only_its_leftovers(copied, done):
    put_hidden_files(copied)
    assert go_on(copied) == done[1]
    assert all((copied / name).read_text() == "his" for name in HIDDEN_FILES)


def test_in_somebodys_folder_a_run_removes_nothing(tmp_path):
    "`--out .` in a project: it is refused, and every hidden file stays."
    put_hidden_files(tmp_path)
    (tmp_path / "experiment.json").write_text('{"name": "another"}')
    with pytest.raises(ValueError, match="experiment.json is there and is not a stage"):
        go_on(tmp_path)
    assert all((tmp_path / name).read_text() == "his" for name in HIDDEN_FILES)


@pytest.mark.parametrize(
    "name", ["base/model.safetensors", "data.safetensors", "results.json", "tuned.json", "guards/a"]
)
def test_files_of_somebody_else_under_a_runs_names_are_left_alone(name, tmp_path):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    save_file({"x": torch.ones(2)}, mine) if mine.suffix == ".safetensors" else mine.write_text(
        "his"
    )
    before = mine.read_bytes()
    with pytest.raises(ValueError, match="is not (the folder|a stage) of a run") as told:
        go_on(tmp_path)
    assert "\n" not in str(told.value) and mine.read_bytes() == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


TUNED_LONGER = {"tune": TINY.tune | {"steps": 6}}
MORE_GUARD_STEPS = {"config": replace(TINY.config, guard_steps=301)}


@pytest.mark.parametrize(
    "change, file, says",
    [
        ({"chunk": 10}, "all_unguarded/00000.safetensors", r"\(chunk 20 there, 10 here\)"),
        ({"strength": 2.0}, "all.json", r"\(strength 4.0 there, 2.0 here\)"),
        ({"cosine": 0.5}, "all.json", r"\(cosine 0.95 there, 0.5 here\)"),
        ({"attacked": 1}, "all_attacks.json", r"\(attacked 2 there, 1 here\)"),
        ({"all_steps": 21}, "all_guard.json", r"\(config.guard_steps 20 there, 21 here\)"),
        (TUNED_LONGER, "tuned.json", r"\(tune.steps 5 there, 6 here\)"),
        (MORE_GUARD_STEPS, "subset_guard.json", r"\(config.guard_steps 300 there, 301 here\)"),
        ({"data": "crops-64"}, "data.safetensors", r"\(data crops-32 there, crops-64 here\)"),
    ],
)
def test_other_settings_never_get_the_numbers_of_a_stage(copied, monkeypatch, change, file, says):
    "Also when somebody removes experiment.json, as he is told that he may."
    (copied / "experiment.json").unlink()
    if "chunk" in change:
        (copied / "all.json").unlink()
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    calls = watched(monkeypatch, "generate", "train_denoiser", "fit_run_guard")
    with pytest.raises(ValueError, match=f"{file} was made with other settings {says}") as told:
        go_on(copied, replace(TINY, **change))
    assert "\n" not in str(told.value) and calls == []
    assert before.items() <= {p: p.read_bytes() for p in before}.items()


@pytest.mark.parametrize(
    "name, needed_by",
    [
        ("data.safetensors", None),
        ("base/model.safetensors", None),
        ("guards/subset.safetensors", None),
        ("features_all.safetensors", "subset.json"),
        ("subset_guarded/00000.safetensors", "subset.json"),
    ],
)
def test_a_truncated_file_is_one_line_with_its_name(copied, name, needed_by):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-9])
    if needed_by:
        (copied / needed_by).unlink()
    with pytest.raises(ValueError, match=rf"{name} (is damaged|cannot be read as)") as told:
        go_on(copied)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("e", [CIFAR10["full"], NARROW_CIFAR10], ids=lambda e: e.size)
def test_a_plan_needs_no_diffusers(e, monkeypatch):
    "It says the same to the last digit as where diffusers counts it."
    pytest.importorskip("diffusers")
    counted_here = plan(e)

    def missing(*_):
        raise ImportError("diffusers is not installed")

    monkeypatch.setattr(cifar10, "import_optional", missing)
    known = plan(e)
    assert [(c.stage, c.flops, c.disk) for c in known] == [
        (c.stage, c.flops, c.disk) for c in counted_here
    ]
    assert all(a.memory == pytest.approx(b.memory, rel=0.1) for a, b in zip(known, counted_here))
    other = replace(e.config, options=DDPM_32 | {"norm_eps": 1e-5})
    with pytest.raises(ImportError):
        plan(replace(e, config=other))


def test_the_plan_of_a_tiny_run_says_more_than_nothing_and_names_all_files(done):
    text = plan_table(TINY)
    assert "GFLOP" in text and "<0.01" in text and " 0.00" not in text
    for path in done[0].iterdir():
        stage = path.stem in STAGES and path.suffix == ".json"
        folder = path.name.startswith(("all_", "subset_")) and path.is_dir()
        assert stage or folder or path.name in text, path


def test_killed_while_training(copied, done, monkeypatch):
    "Training goes on from its checkpoint, to the same weights."
    tuned = copied / "tuned"
    weights = (tuned / "model.safetensors").read_bytes()
    shutil.rmtree(tuned)
    (copied / "tuned.json").unlink()
    real, steps = experiments.train_denoiser, []

    def stop(step, average):
        raise KeyboardInterrupt

    def stopped(config, *args, **options):
        return real(replace(config, every=3), *args, **options, after_checkpoint=stop)

    def noted(*args, **options):
        return real(*args, **options, after_checkpoint=lambda step, average: steps.append(step))

    monkeypatch.setattr(experiments, "train_denoiser", stopped)
    with pytest.raises(KeyboardInterrupt):
        go_on(copied)
    assert (tuned / "checkpoint.safetensors").exists()
    assert not (copied / "tuned.json").exists()

    monkeypatch.setattr(experiments, "train_denoiser", noted)
    go_on(copied)
    assert steps == [5] and (tuned / "model.safetensors").read_bytes() == weights


KILLED_WHILE_WRITING = """
import os, signal, sys, torch
from pathlib import Path
from cpsample.workshop import files, studies

def half(tensors, path, header):
    path.write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)

studies.write_tensors = half
studies.load_or_create(Path(sys.argv[1]) / "x.safetensors", lambda: {"x": torch.ones(1000)})
"""


def test_a_half_written_file_never_counts(tmp_path):
    "The process is really killed, with half of the bytes written."
    program = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)]
    assert subprocess.run(program).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size == 1000 and left.name.startswith(".")
    zeros = load_or_create(tmp_path / "x.safetensors", lambda: {"x": torch.zeros(2)})
    assert zeros["x"].tolist() == [0, 0]


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(copied, done, monkeypatch):
    (copied / "subset.json").unlink()
    (copied / "results.json").unlink()
    shutil.rmtree(copied / "subset_guarded")
    real, written = studies.write_tensors, []

    def full(tensors, path, header):
        if written:
            with open("/dev/full", "wb") as disk:
                disk.write(bytes(100_000))  # the kernel's own error
        written.append(path)
        real(tensors, path, header)

    monkeypatch.setattr(studies, "write_tensors", full)
    one_line = r"^the disk that holds .*run is full: make room and run again"
    with pytest.raises(OSError, match=one_line) as told:
        go_on(copied)
    assert "\n" not in str(told.value)
    chunks = [path.name for path in (copied / "subset_guarded").iterdir()]
    assert chunks == ["00000.safetensors"]

    monkeypatch.setattr(studies, "write_tensors", real)
    calls = watched(monkeypatch, "generate")
    assert same(go_on(copied), done[1]) and calls == ["generate"]


def test_a_full_disk_while_a_result_is_written(copied, done, monkeypatch):
    (copied / "subset.json").unlink()

    def full(path, record):
        open("/dev/full", "w", buffering=1).write("x\n")

    with monkeypatch.context() as patch:
        patch.setattr(studies, "save_json", full)
        with pytest.raises(OSError, match="is full: make room"):
            go_on(copied)
    assert not (copied / "subset.json").exists()
    assert same(go_on(copied), done[1])


def test_a_full_disk_while_the_record_is_written(copied, done, monkeypatch):
    (copied / "results.json").unlink()

    def full(path, record):
        open("/dev/full", "w", buffering=1).write("x\n")

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "save_json", full)
        with pytest.raises(OSError, match="is full: make room"):
            go_on(copied)
    assert not (copied / "results.json").exists()
    assert go_on(copied) == done[1]


DISK_QUOTA = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
DOWNLOAD_QUOTA = RuntimeError("Download quota exceeded: come back tomorrow")


@pytest.mark.parametrize(
    "error, kind, says",
    [
        (DISK_QUOTA, OSError, "is full: make room"),
        (DOWNLOAD_QUOTA, RuntimeError, "come back tomorrow"),
    ],
)
def test_the_quota_of_a_disk_is_not_that_of_a_download(tmp_path, monkeypatch, error, kind, says):
    def refuse(run):
        raise error

    monkeypatch.setattr(experiments, "reproduce", refuse)
    with pytest.raises(kind, match=says):
        go_on(tmp_path / "run")


def test_a_folder_belongs_to_one_experiment(copied):
    with pytest.raises(ValueError, match=r"belongs to another run \(chunk 20 there, 10 here\)"):
        go_on(copied, replace(TINY, chunk=10))


def test_offline_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "run"
    one_line = (
        "^loading 'nobody/nothing' on the Hub failed: .*: connect to the network and try again$"
    )
    with pytest.raises(OSError, match=one_line) as told:
        go_on(folder, replace(NARROW_CIFAR10, pretrained="nobody/nothing"))
    assert "\n" not in str(told.value)
    assert (folder / "data.safetensors").exists() and not (folder / "base.json").exists()


@pytest.mark.parametrize(
    "error, says",
    [
        (ConnectionResetError("Connection broken: IncompleteRead(7)"), "IncompleteRead.*try again"),
        (TimeoutError("timed out"), "timed out: connect"),
    ],
)
def test_a_lost_connection_is_one_line(monkeypatch, error, says):
    diffusers = pytest.importorskip("diffusers")

    def lost(*_, **__):
        raise error

    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", lost)
    with pytest.raises(OSError, match=f"^loading 'a/b' on the Hub failed: .*{says}") as told:
        public_denoiser("a/b", CIFAR10["full"].config)
    assert "\n" not in str(told.value)


def away(*_):
    raise OSError("it cannot be downloaded: connect to the network")


def test_missing_data_are_told_before_anything_is_made(tmp_path, monkeypatch):
    without_data(monkeypatch, TINY.data, load=away)
    with pytest.raises(OSError, match="cannot be downloaded"):
        go_on(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["experiment.json"]


def test_missing_weights_of_inception_are_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "inception", away)
    with pytest.raises(OSError, match="cannot be downloaded"):
        go_on(tmp_path / "run", replace(TINY, space="inception-2048"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["experiment.json"]


def counted(work):
    plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain_attention:
        work()
    return counter.get_total_flops()


def planned(e):
    return {cost.stage: cost.flops for cost in plan(e)}


def test_the_plan_counts_what_is_really_computed_in_training(tmp_path):
    costs, images = planned(TINY), DATA[TINY.data].load()[0][: TINY.images]
    base = counted(lambda: train_denoiser(TINY.config, images, tmp_path, progress=False))
    assert base == costs["base"]

    def fit_guard_of_all():
        config = replace(TINY.config, guard_steps=TINY.all_steps)
        path, schedule = tmp_path / "guard", make_schedule()
        how = {"schedule": schedule, "path": path, "preset": "paper", "progress": False}
        fit_run_guard(config, images, images[:8], **how)

    assert counted(fit_guard_of_all) == costs["all_guard"]


def test_the_plan_counts_what_is_really_computed_in_sampling():
    config, n, schedule = TINY.config, TINY.fid_samples, make_schedule()
    model = build_network(config.network, {"shape": config.shape} | config.options)
    steps = config.sample_steps
    three_images = counted(lambda: generate(model, schedule, config.shape, n=3, steps=steps))
    one_arm = three_images * n // 3
    assert one_arm == n * steps * network_cost(model, config.shape).flops

    once, twice = planned(TINY)["all"], planned(replace(TINY, fid_samples=2 * n))["all"]
    assert 2 * one_arm < once
    assert 2 * one_arm < twice - once == once


def test_attacks_are_counted():
    asked_rows = []

    def model(x, t):
        asked_rows.append(len(x))
        return torch.ones_like(x)

    schedule = make_schedule()
    asks = experiments.published_attacks(schedule) | experiments.guard_attacks(schedule)
    for ask in asks.values():
        ask(model, torch.ones(1, 1, 2, 2))
    assert sum(asked_rows) == experiments.ATTACKS


def test_a_network_that_is_given_more_than_an_image_and_a_level_is_counted():
    class WithWords(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(8, 4)

        def forward(self, x_t, t, words):
            return x_t.mean() + self.mix(words)

    cost = network_cost(WithWords(), (1, 2, 2), conditions=[(3, 8)])
    assert cost.flops == 2 * 3 * 8 * 4 and cost.kept_bytes == 0


class LargestReal(TorchDispatchMode):
    "The bytes of the largest tensor that is not on the meta device."

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("e", SIZES, ids=lambda e: f"{e.name}-{e.size}")
def test_a_plan_allocates_and_writes_nothing(e, tmp_path, monkeypatch):
    if e.config.network == "DiffusersUNet":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    without_data(monkeypatch, e.data)
    with LargestReal() as largest:
        text = plan_table(e)
    assert largest.bytes < 10_000 and list(tmp_path.iterdir()) == []
    first_words = [line.split()[0] for line in text.splitlines()[2:11]]
    assert first_words == [*STAGES, "total"]
    assert "derived, not measured" in text
    assert all(words in text for words in ("T4 8.1 TFLOP/s at 40%", "A100 156", "H100 495"))


def test_experiments_are_found_by_name():
    assert list(EXPERIMENTS) == ["celeba64", "cifar10"]
    assert EXPERIMENTS["cifar10"].items() >= CIFAR10.items()
    assert EXPERIMENTS["celeba64"] is CELEBA64
    for name in EXPERIMENTS:
        for size, e in EXPERIMENTS[name].items():
            assert (e.name, e.size) == (name, size)
    assert CIFAR10["full"].cosine == 0.97 and CELEBA64["full"].cosine == 0.95
    assert CELEBA64["full"].fid_samples == 50_000


@pytest.mark.parametrize("name", ["crops-32", "crops-64"])
def test_sizes_of_the_data_are_those_that_are_planned_for(name):
    side = int(name[-2:])
    source = DATA[name]
    train, held_out = source.load()
    assert (len(train), len(held_out)) == (source.train, source.held_out)
    assert train.dtype == torch.uint8 and train.shape[1:] == (3, side, side)

    def distinct(images):
        thumbnails = experiments.features(images, "thumbnail-48")
        return {tuple(row) for row in thumbnails.tolist()}

    assert len(distinct(train)) > 0.9 * len(train)
    assert not distinct(train) & distinct(held_out)


class TestPublicModel:
    options = DDPM_32 | NARROW
    config = Config("crops-32", (3, 32, 32), "DiffusersUNet", options=options)

    @pytest.fixture
    def save(self, tmp_path):
        "save(name, scheduler options) → (folder of a pipeline, its network)."
        diffusers = pytest.importorskip("diffusers")
        unet = diffusers.UNet2DModel(sample_size=32, in_channels=3, out_channels=3, **self.options)

        def save(name, **scheduler):
            pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**scheduler))
            pipe.save_pretrained(tmp_path / name)
            return str(tmp_path / name), unet

        return save

    def test_is_read(self, save):
        folder, unet = save("right")
        model, schedule = public_denoiser(folder, self.config)
        x, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 900])
        with torch.no_grad():
            torch.testing.assert_close(model(x, t), unet(x, t).sample)
        assert isinstance(model, DiffusersUNet) and schedule.name == "linear"

    def test_of_another_architecture_is_refused(self, save):
        folder, _ = save("right")
        other = replace(self.config, options=self.options | {"norm_eps": 1e-5})
        with pytest.raises(ValueError, match="differs from the planned model in norm_eps$"):
            public_denoiser(folder, other)

    @pytest.mark.parametrize(
        "name, scheduler",
        [
            ("schedule", {"beta_schedule": "squaredcos_cap_v2"}),
            ("prediction_type", {"prediction_type": "v_prediction"}),
        ],
    )
    def test_of_another_kind_is_refused(self, save, name, scheduler):
        folder, _ = save(name, **scheduler)
        with pytest.raises(ValueError, match=f"differs from the planned model in {name}$"):
            public_denoiser(folder, self.config)


def test_a_table_of_results_has_a_line_for_every_arm_of_both_questions(done):
    table = results_table(done[1])
    for arm in ARMS:
        assert len(re.findall(rf"^{arm} ", table, re.M)) == 2
    assert table.startswith("celeba64, tiny | run_experiment | commit ")
    assert table.endswith("planned PFLOP")


@pytest.mark.parametrize("name", ["cifar10", "celeba64"])
def test_without_results_the_page_says_how_to_get_them(name, tmp_path, monkeypatch, done):
    monkeypatch.setattr(experiments, "data_path", lambda _: tmp_path)
    assert results(name).startswith(f"{name}, full: not run yet")
    assert f"cpsample reproduce {name} --size full" in results(name)
    shutil.copy(done[0] / "results.json", tmp_path / f"{name}-full.json")
    assert results(name) == results_table(done[1])


def test_a_record_says_what_it_is(done):
    folder, record = done
    assert record["experiment"] == json.loads(json.dumps(asdict(TINY)))
    assert {"name", "size", "command", "commit", "hardware", "date", "seeds"} <= record.keys()
    assert list(record["costs"]) == [cost.stage for cost in plan(TINY)] == STAGES
    assert all(cost["seconds"] > 0 for cost in record["costs"].values())
    assert json.loads((folder / "results.json").read_text()) == record
    assert (folder / "guards" / "subset.safetensors").stat().st_mode & 0o777 == 0o600


def crops_in_archives(folder, names=("b.zip", "a.tar")):
    "The crops of `TINY` as two archives: those for training, and those held out."
    archives = [folder / name for name in names]
    for archive, part, images in zip(archives, ("train", "test"), DATA["crops-32"].load()):
        files = []
        for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            files.append((f"copy/{part}/x/{row:04}.png", content.getvalue()))
        pack(archive, files[::-1])
    return archives


def test_archives_take_the_place_of_a_data_set(tmp_path, monkeypatch):
    archives = crops_in_archives(tmp_path)
    archived = with_archives(TINY, archives)
    assert archived == with_archives(TINY, archives[::-1]) and archived.counts == TINY.counts
    assert re.fullmatch(r"a.tar, b.zip \(sha256 of the pictures [0-9a-f]{64}\)", archived.data)
    assert replace(archived, data=TINY.data, given=None) == TINY
    assert plan(archived) == plan(TINY) and archived.data in plan_table(archived)

    # The images are those of the set, in the seed's order, and no record knows where they lay.
    folder = tmp_path / "run"
    folder.mkdir()
    run = experiments.Run(folder, progress=False, experiment=archived, archives=archives)
    experiments._claim_folder(run, "test")
    images, originals = experiments._image_sets(run), DATA["crops-32"].load()
    seed = archived.config.seed
    for found, side in zip((images["all"].members, images["all"].held_out), originals):
        order = torch.randperm(len(side), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, side[order][: len(found)])
        assert (order[: len(found) // 2] > len(side) // 2).any()  # also of the last class
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert str(tmp_path).encode() not in kept and archived.data.encode() in kept

    # Kept images need no archives any more; without them there is one line.
    without = replace(run, archives=())
    kept_held_out = experiments._image_sets(without)["all"].held_out
    assert torch.equal(kept_held_out, images["all"].held_out)
    (folder / "data.safetensors").unlink()
    with pytest.raises(ValueError, match="is about a.tar, b.zip .*give these archives again"):
        experiments._image_sets(without)
    with pytest.raises(ValueError, match="belongs to another run .*a.tar, b.zip"):
        go_on(folder)

    # Another set under the same names is another set; a known one has a name.
    digest = archived.data.split()[-1].rstrip(")")
    monkeypatch.setitem(experiments._KNOWN_COPIES, digest, "CIFAR-10, JPEG copy")
    assert with_archives(TINY, archives).data == "CIFAR-10, JPEG copy"
    pack(archives[1], [(f"test/{i}.png", bytes([i])) for i in range(104)])
    assert with_archives(TINY, archives).data.startswith("a.tar, b.zip (sha256")


def test_archives_that_are_not_enough_are_refused(tmp_path):
    archives = crops_in_archives(tmp_path)
    for given, says in (
        (
            archives[:1],
            "needs 70 pictures to train on and 2 in a folder called test, got 416 and 0",
        ),
        (archives[1:], "got 0 and 104: give all archives"),
        ([*archives, tmp_path], "is no archive: --data takes"),
        ([tmp_path / "missing.zip"], "missing.zip is no archive"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            with_archives(TINY, given)


def test_the_command_takes_archives_for_what_can_be_given_so(tmp_path, monkeypatch):
    def call(*words):
        return CliRunner().invoke(app, ["reproduce", *map(str, words)])

    archives = crops_in_archives(tmp_path)
    data = [word for archive in archives for word in ("--data", archive)]
    monkeypatch.setitem(EXPERIMENTS["cifar10"], "colab", NARROW_CIFAR10)
    result = call("cifar10", "--size", "colab", "--plan", *data)
    assert result.exit_code == 0 and "training images of a.tar, b.zip (sha256" in result.output
    for words, says in (
        (("celeba64", *data), "--data is for cifar10: leave it out for celeba64"),
        (("guards", *data), "guards is a study"),
        (("cifar10", *data), "needs 50,000 pictures to train on"),
        (("cifar10", "--data", tmp_path), "is no archive"),
    ):
        result = call(*words)
        lines = result.stderr.splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and says in lines[0], result.output

    # What is run is the same experiment, and its record names the archives alone.
    asked = []
    monkeypatch.setattr(
        experiments, "run_experiment", lambda *args, **more: asked.append((args, more))
    )
    words = ["cpsample", "reproduce", "cifar10", *map(str, data)]
    monkeypatch.setattr(sys, "argv", words)
    assert call("cifar10", "--size", "colab", "--out", tmp_path / "run", *data).exit_code == 0
    (((e, *_), more),) = asked
    assert e == with_archives(NARROW_CIFAR10, archives) and more["archives"] == archives
    assert more["command"] == "cpsample reproduce cifar10 --data b.zip --data a.tar"


def test_without_the_exact_set_the_error_says_where_to_put_it(tmp_path, monkeypatch):
    def refuse(root, **options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    says = "put cifar-10-python.tar.gz there, .* or cpsample reproduce cifar10 --data ARCHIVE"
    with pytest.raises(OSError, match=says):
        DATA["cifar10"].load()
