"Chapters 4.3 and 16: a plan that is true and costs nothing, and runs that survive a disconnect, a full disk and a network that is away."

import errno
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cpsample.core.ddpm import generate
from cpsample.core.schedule import make_schedule
from cpsample.practice.runs import Config, fit_run_guard, train_denoiser
from cpsample.production import experiments
from cpsample.production.experiments import (
    DATA,
    DDPM_32,
    EXPERIMENTS,
    DiffusersUNet,
    plan,
    plan_table,
    public_denoiser,
    run_experiment,
)
from cpsample.workshop import studies
from cpsample.workshop.costs import count
from cpsample.workshop.registry import build_network
from cpsample.workshop.studies import load_or_create

ROOT = Path(__file__).resolve().parent.parent
TINY = EXPERIMENTS["celeba64"]["tiny"]  # and smaller still: 32×32, folded to 8×8
FOLDED = {"width": 16, "mults": (1, 2), "unshuffle": 4}
TINY = replace(
    TINY,
    data="crops-32",
    attacked=2,
    subset=5,
    tune=TINY.tune | {"steps": 5},
    config=replace(
        TINY.config,
        shape=(3, 32, 32),
        options=TINY.config.options | FOLDED,
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


def same(a, b):
    "The same record, but for times."

    def timeless(x):
        return (
            {k: timeless(v) for k, v in x.items() if "seconds" not in k}
            if isinstance(x, dict)
            else x
        )

    return timeless(a) == timeless(b)


def watched(monkeypatch, *names):
    "Which of the functions `names` of the module are called, in order; they do what they did."
    calls = []
    for name in names:
        real = getattr(experiments, name)
        monkeypatch.setattr(
            experiments,
            name,
            lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k),
        )
    return calls


WORK = ("generate", "train_denoiser", "fit_run_guard", "scores_of", "frechet_distance")


def test_a_second_run_makes_nothing(copied, done, monkeypatch):
    calls = watched(monkeypatch, *WORK)
    monkeypatch.setitem(
        DATA, TINY.data, (None, *DATA[TINY.data][1:])
    )  # not even the data are asked for again
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*.safetensors")}
    assert run_experiment(TINY, copied, progress=False) == done[1] and calls == []
    assert before == {p: p.stat().st_mtime_ns for p in copied.rglob("*.safetensors")}


def test_killed_between_stages(copied, done, monkeypatch):
    for name in ("subset.json", "subset_attacks.json", "results.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "subset_guarded")
    calls = watched(monkeypatch, *WORK)
    assert same(run_experiment(TINY, copied, progress=False), done[1])
    assert (
        calls.count("generate") == 2
        and "train_denoiser" not in calls
        and "fit_run_guard" not in calls
    )


def test_killed_while_sampling(copied, done, monkeypatch):
    "Chunk 0 is there, chunk 1 half: one is drawn, the half is swept out, and the images are those of the first run."
    whole = copied / "all_guarded" / "00001.safetensors"
    half = whole.with_name(".00001.safetensors.abcd_123.safetensors")
    half.write_bytes(whole.read_bytes()[:1000])
    whole.unlink(), (copied / "all.json").unlink()
    calls = watched(monkeypatch, *WORK)
    assert same(run_experiment(TINY, copied, progress=False), done[1])
    assert (
        calls.count("generate") == 1
        and calls.count("fit_run_guard") == 0
        and not half.exists()
        and whole.exists()
    )


@pytest.mark.parametrize("owner", ["this run's", "somebody's"])
def test_only_leftovers_of_this_run_are_removed(copied, done, tmp_path, owner):
    "`--out .` in somebody's project: every hidden file of his stays, whether the folder is refused or a run's own."
    folder = copied if owner == "this run's" else tmp_path / "project"
    his = [
        ".gitlab-ci.yml",
        ".env.local",
        ".results.json.bak",
        "src/.eslintrc.json",
        "base/.model.safetensors.backup.safetensors",
        ".github/.a.b",
    ]
    for name in his:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("his")
    if owner == "somebody's":
        (folder / "experiment.json").write_text('{"name": "another"}')
        with pytest.raises(ValueError, match="belongs to another run"):
            run_experiment(TINY, folder, progress=False)
    else:
        assert run_experiment(TINY, folder, progress=False) == done[1]
    assert all((folder / name).read_text() == "his" for name in his)


def test_killed_while_training(copied, done, monkeypatch):
    "Training goes on from its checkpoint, to the same weights."
    weights = (copied / "tuned" / "model.safetensors").read_bytes()
    shutil.rmtree(copied / "tuned"), (copied / "tuned.json").unlink()
    real, steps = experiments.train_denoiser, []

    def killed(config, *args, **how):
        def stop(step, slow):
            raise KeyboardInterrupt

        return real(replace(config, every=3), *args, **how, after_checkpoint=stop)

    monkeypatch.setattr(experiments, "train_denoiser", killed)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(TINY, copied, progress=False)
    assert (copied / "tuned" / "checkpoint.safetensors").exists() and not (
        copied / "tuned.json"
    ).exists()
    monkeypatch.setattr(
        experiments,
        "train_denoiser",
        lambda *a, **k: real(*a, **k, after_checkpoint=lambda step, _: steps.append(step)),
    )
    run_experiment(TINY, copied, progress=False)
    assert steps == [5] and (copied / "tuned" / "model.safetensors").read_bytes() == weights


def test_a_half_written_file_never_counts(tmp_path):
    "The process is really killed, with half of the bytes written."
    program = f"""
import os, signal, torch
from cpsample.production import experiments
def half(tensors, path, header):
    path.write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
studies.write_tensors = half
studies.load_or_create(studies.Path({str(tmp_path)!r}) / "x.safetensors", lambda: {{"x": torch.ones(1000)}})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert [p.stat().st_size for p in left] == [1000] and left[0].name.startswith(".")
    assert load_or_create(tmp_path / "x.safetensors", lambda: {"x": torch.zeros(2)})[
        "x"
    ].tolist() == [0, 0]


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(copied, done, monkeypatch):
    (
        (copied / "subset.json").unlink(),
        shutil.rmtree(copied / "subset_guarded"),
        (copied / "results.json").unlink(),
    )
    real, written = studies.write_tensors, []

    def full(tensors, path, header):
        if written:
            with open("/dev/full", "wb") as disk:
                disk.write(bytes(100_000))  # the kernel's own error
        written.append(path)
        real(tensors, path, header)

    monkeypatch.setattr(studies, "write_tensors", full)
    with pytest.raises(
        OSError, match=r"^the disk that holds .*run is full: make room and run again"
    ) as told:
        run_experiment(TINY, copied, progress=False)
    assert "\n" not in str(told.value) and [
        p.name for p in (copied / "subset_guarded").iterdir()
    ] == ["00000.safetensors"]
    monkeypatch.setattr(studies, "write_tensors", real)
    calls = watched(monkeypatch, "generate")
    assert same(run_experiment(TINY, copied, progress=False), done[1]) and calls == ["generate"]


def test_a_full_disk_while_a_result_is_written(copied, done, monkeypatch):
    (copied / "subset.json").unlink()

    def full(path, record):
        open("/dev/full", "w", buffering=1).write("x\n")

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "save_json", full)
        with pytest.raises(OSError, match="is full: make room"):
            run_experiment(TINY, copied, progress=False)
    assert not (copied / "subset.json").exists()
    assert same(run_experiment(TINY, copied, progress=False), done[1])


@pytest.mark.parametrize(
    "error, kind, says",
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), OSError, "is full: make room"),
        (
            RuntimeError("Download quota exceeded: come back tomorrow"),
            RuntimeError,
            "come back tomorrow",
        ),
    ],
)
def test_the_quota_of_a_disk_is_not_that_of_a_download(tmp_path, monkeypatch, error, kind, says):
    def refuse(run):
        raise error

    monkeypatch.setattr(experiments, "reproduce", refuse)
    with pytest.raises(kind, match=says):
        run_experiment(TINY, tmp_path / "run", progress=False)


def test_a_folder_belongs_to_one_experiment(copied):
    with pytest.raises(ValueError, match=r"belongs to another run \(chunk 20 there, 10 here\)"):
        run_experiment(replace(TINY, chunk=10), copied, progress=False)


def test_offline_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    e = replace(EXPERIMENTS["cifar10"]["tiny"], pretrained="nobody/nothing")
    with pytest.raises(
        OSError,
        match=r"^loading 'nobody/nothing' on the Hub failed: .*: connect to the network and try again$",
    ) as told:
        run_experiment(e, tmp_path / "run", progress=False)
    assert (
        "\n" not in str(told.value)
        and (tmp_path / "run" / "data.safetensors").exists()
        and not (tmp_path / "run" / "base.json").exists()
    )


@pytest.mark.parametrize(
    "error, says",
    [
        (
            ConnectionResetError("Connection broken: IncompleteRead(7 bytes read)"),
            "IncompleteRead.*try again",
        ),
        (TimeoutError("timed out"), "timed out: connect"),
    ],
)
def test_a_lost_connection_is_one_line(monkeypatch, error, says):
    diffusers = pytest.importorskip("diffusers")

    def lost(*_, **__):
        raise error

    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", lost)
    with pytest.raises(OSError, match=f"^loading 'a/b' on the Hub failed: .*{says}") as told:
        public_denoiser("a/b", EXPERIMENTS["cifar10"]["full"].config)
    assert "\n" not in str(told.value)


def test_missing_data_and_missing_inception_are_told_before_anything_is_made(tmp_path, monkeypatch):
    def away(*_):
        raise OSError("CIFAR-10 cannot be downloaded: connect to the network")

    with monkeypatch.context() as patch:
        patch.setitem(DATA, TINY.data, (away, *DATA[TINY.data][1:]))
        with pytest.raises(OSError, match="cannot be downloaded"):
            run_experiment(TINY, tmp_path / "a", progress=False)
    monkeypatch.setattr(experiments, "inception", away)
    with pytest.raises(OSError, match="cannot be downloaded"):
        run_experiment(replace(TINY, space="inception-2048"), tmp_path / "b", progress=False)
    assert [p.name for folder in "ab" for p in (tmp_path / folder).iterdir()] == [
        "experiment.json"
    ] * 2


def counted(work):
    with (
        FlopCounterMode(display=False) as flops,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        work()
    return flops.get_total_flops()


def test_the_plan_counts_what_is_really_computed(done, tmp_path):
    costs, images = (
        {row["stage"]: row["flops"] for row in plan(TINY)},
        DATA[TINY.data][0]()[0][: TINY.images],
    )
    schedule = make_schedule()
    assert (
        counted(lambda: train_denoiser(TINY.config, images, tmp_path, progress=False))
        == costs["base"]
    )
    few = replace(TINY.config, guard_steps=TINY.all_steps)
    assert (
        counted(
            lambda: fit_run_guard(
                few, images, images[:8], schedule, tmp_path / "guard", "paper", progress=False
            )
        )
        == costs["all_guard"]
    )
    model = build_network(TINY.config.network, {"shape": TINY.config.shape} | TINY.config.options)
    sampling = (
        counted(lambda: generate(model, schedule, TINY.config.shape, 3, TINY.config.sample_steps))
        * TINY.fid_samples
        // 3
    )
    assert (
        costs["all"] > 2 * sampling
        and sampling
        == TINY.fid_samples * TINY.config.sample_steps * count(model, TINY.config.shape)[0]
    )
    more = {
        row["stage"]: row["flops"] for row in plan(replace(TINY, fid_samples=2 * TINY.fid_samples))
    }
    assert 2 * sampling < more["all"] - costs["all"] == costs["all"]


def test_attacks_are_counted():
    rows = []

    def model(x, t):
        return rows.append(len(x)) or torch.ones_like(x)

    for ask in (
        experiments.attacks(make_schedule()) | experiments.guard_attacks(make_schedule())
    ).values():
        ask(model, torch.ones(1, 1, 2, 2))
    assert sum(rows) == experiments.ATTACKS


class Real(TorchDispatchMode):
    "The bytes of the largest tensor that is not on the meta device."

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max(
            [
                self.largest,
                *(
                    x.untyped_storage().nbytes()
                    for x in tree_leaves(out)
                    if isinstance(x, torch.Tensor) and x.device.type != "meta"
                ),
            ]
        )
        return out


@pytest.mark.parametrize(
    "e",
    [e for sizes in EXPERIMENTS.values() for e in sizes.values()],
    ids=lambda e: f"{e.name}-{e.size}",
)
def test_a_plan_allocates_and_writes_nothing(e, tmp_path, monkeypatch):
    if e.config.network == "DiffusersUNet":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATA, e.data, (None, *DATA[e.data][1:]))
    with Real() as real:
        text = plan_table(e)
    assert real.largest < 10_000 and list(tmp_path.iterdir()) == []
    assert [line.split()[0] for line in text.splitlines()[2:11]] == [
        "base",
        "all_guard",
        "all",
        "all_attacks",
        "tuned",
        "subset_guard",
        "subset",
        "subset_attacks",
        "total",
    ]
    assert "derived, not measured" in text and all(
        gpu in text for gpu in ("T4 8.1 TFLOP/s at 40%", "A100 156", "H100 495")
    )


def test_sizes_of_the_data_are_those_that_are_planned_for():
    for name in ("crops-32", "crops-64"):
        train, held_out = DATA[name][0]()
        assert (
            (len(train), len(held_out)) == DATA[name][1:]
            and train.dtype == torch.uint8
            and train.shape[1:] == (3, int(name[-2:]), int(name[-2:]))
        )
        ours, others = (
            {tuple(f) for f in experiments.features(x.float() / 255, "thumbnail-48").tolist()}
            for x in (train, held_out)
        )
        assert len(ours) > 0.9 * len(train) and not ours & others
    assert (
        EXPERIMENTS["cifar10"]["full"].cosine == 0.97
        and EXPERIMENTS["celeba64"]["full"].cosine == 0.95
        and EXPERIMENTS["celeba64"]["full"].fid_samples == 50_000
    )


NARROW = DDPM_32 | {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4}


def test_a_public_model_is_read_and_another_one_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = Config("crops-32", (3, 32, 32), "DiffusersUNet", options=NARROW)
    network = diffusers.UNet2DModel(sample_size=32, in_channels=3, out_channels=3, **NARROW)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "right")
    model, schedule = public_denoiser(str(tmp_path / "right"), config)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 900])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), network(x, t).sample)
    assert isinstance(model, DiffusersUNet) and schedule.name == "linear"
    other = replace(config, options=NARROW | {"norm_eps": 1e-5})
    with pytest.raises(ValueError, match="differs from the planned model in norm_eps$"):
        public_denoiser(str(tmp_path / "right"), other)
    for name, options in (
        ("schedule", {"beta_schedule": "squaredcos_cap_v2"}),
        ("prediction_type", {"prediction_type": "v_prediction"}),
    ):
        diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**options)).save_pretrained(
            tmp_path / name
        )
        with pytest.raises(ValueError, match=f"differs from the planned model in {name}$"):
            public_denoiser(str(tmp_path / name), config)


@pytest.mark.parametrize("name", ["4_production/04_cifar10", "4_production/05_celeba64"])
def test_the_results_cell_finds_all_it_reads(done, name):
    "In a record of tiny; and without a file it says how to get one."
    cells = [
        "".join(c["source"])
        for c in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    cell = next(c for c in cells if c.startswith("# results"))
    space = {"json": json, "data_path": lambda _: ROOT / "no such folder", "record": done[1]}
    exec(cell, space)
    table = space["results_table"](done[1])
    assert all(
        len(re.findall(rf"^{arm} ", table, re.M)) == 2
        for arm in ("unguarded", "guarded", "rejection", "held_out")
    )
    assert "not run yet" in space["results"](
        name[3:]
    ) and f"cpsample reproduce {name[3:]} --size full" in space["results"](name[3:])


def test_a_record_says_what_it_is(done):
    folder, record = done
    assert (
        record["experiment"] == json.loads(json.dumps(asdict(TINY)))
        and {"name", "size", "command", "commit", "hardware", "date", "seeds"} <= record.keys()
    )
    assert list(record["costs"]) == [row["stage"] for row in plan(TINY)] and all(
        cost["seconds"] > 0 for cost in record["costs"].values()
    )
    assert json.loads((folder / "results.json").read_text()) == record
    assert (folder / "guards" / "subset.safetensors").stat().st_mode & 0o777 == 0o600
