"""Two real processes, with the same global batch, give the losses of one: denoiser and guard.

Labels follow the image, not the process.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpsample import CopyRate
from cpsample.core.classifier import member_labels
from cpsample.core.copying import copy_test
from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.core.guard import fit_guard
from cpsample.core.images import load_digits, pixels
from cpsample.core.schedule import make_schedule
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS, train_denoiser
from cpsample.practice.training import fit
from cpsample.practice.unet import UNetClassifier
from cpsample.workshop.parallel import Together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over fork")
STEPS = 50
CONFIG = replace(
    CONFIGS["fashion"].tiny(), steps=STEPS, batch_size=16, every=25, guard_steps=STEPS, mirror=True
)


def guard_losses(images, folder, accelerator):
    "The losses of a guard's training."
    losses = []

    def drive(model, loss, data, steps, **training_options):
        _, losses[:] = fit(
            model,
            loss,
            data,
            steps=steps,
            path=folder / "guard.safetensors",
            accelerator=accelerator,
            progress=False,
            **training_options,
        )

    torch.manual_seed(0)
    classifier = UNetClassifier((1, 28, 28), 8, width=8)
    options = dict(steps=STEPS, batch_size=16, classifier=classifier, drive=drive)
    fit_guard(pixels(images), make_schedule(), **options)
    return losses


def gradients(images, accelerator):
    "The gradients of one backward pass: Adam hides a wrong factor on all of them, so we look."
    plain = seeded(0, lambda: MLPDenoiser((1, 28, 28), 8))
    network = Together(accelerator.prepare(plain)) if accelerator else plain
    (network(pixels(images[:16]), torch.arange(16)) - 1).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in plain.named_parameters()}


def measure(folder, accelerator=None):
    "50 steps of denoiser and guard; each process writes its losses and what labels it saw."
    torch.set_num_threads(1)
    images = load_fashion(small=True)[0][:40]
    trained = train_denoiser(CONFIG, images, folder, accelerator=accelerator, progress=False)
    record = {
        "denoiser": trained.losses,
        "guard": guard_losses(images, folder, accelerator),
        "labels": member_labels(images, 8, 0).tolist(),
    }
    rank = accelerator.process_index if accelerator else 0
    save_file(gradients(images, accelerator), folder / f"gradient-{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(record))


def one_of_two():
    "The accelerator of one of two processes."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A fork inherits what its parent has said of itself: that it is the only process.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def worker(folder):
    measure(folder, one_of_two())


MEMBERS = load_digits()[0][:60]
SAMPLES = torch.cat([MEMBERS[:9], load_digits()[0][100:140]])  # nine copies of 49


def counting_worker(folder):
    "Counts copies in its share of the samples, 30 or 19, in batches of 8."
    torch.set_num_threads(1)
    rank = one_of_two().process_index
    metric = CopyRate(MEMBERS)
    for batch in SAMPLES.split(30)[rank].split(8):
        metric.update(batch)
    record = {"rate": metric.compute().item(), "own": [int(metric.copies), int(metric.images)]}
    (folder / f"{rank}.json").write_text(json.dumps(record))


def test_two_processes_give_the_losses_of_one(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    launcher = accelerate.debug_launcher
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    measure(alone)

    # Tests that ran in this process before may have made one, of one process.
    accelerate.Accelerator(cpu=True)
    launcher(worker, args=(together,), num_processes=2)

    # Each process found the gradients of one, and no other factor.
    expected = load_file(alone / "gradient-0.safetensors")
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for rank in (0, 1):
        shared = load_file(together / f"gradient-{rank}.safetensors")
        torch.testing.assert_close(shared, expected, atol=1e-6, rtol=1e-4)

    # The same losses in each step, the same labels.
    one = json.loads((alone / "0.json").read_text())
    for rank in (0, 1):
        record = json.loads((together / f"{rank}.json").read_text())
        assert record["labels"] == one["labels"]
        for part in ("denoiser", "guard"):
            torch.testing.assert_close(record[part], one[part], atol=1e-4, rtol=0)
    for part in ("denoiser", "guard"):
        assert len(one[part]) == STEPS and one[part][-1] < one[part][0]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    network = Together(MLPDenoiser((1, 8, 8), 8))
    with pytest.raises(ValueError, match="make it a multiple of 2"):
        network(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))


def test_two_processes_count_the_copies_of_one(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    accelerate.Accelerator(cpu=True)
    accelerate.debug_launcher(counting_worker, args=(tmp_path,), num_processes=2)

    # All nine copies lie in the share of the first; both say the rate of all.
    expected = copy_test(SAMPLES, MEMBERS)
    assert expected.copies == 9
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [record["own"] for record in records] == [[9, 30], [0, 19]]
    for record in records:
        assert abs(record["rate"] - expected.rate) < 1e-6


# What commands share: the same work in one process, and dealt out to two by torchrun.

PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TRAIN = ("train", "digits", "--images", 8, "--tiny", "--device", "cpu")


def command(*words, processes=1):
    "A call of the command line, in several processes if it is said."
    start = PROCESSES if processes > 1 else ()
    call = [sys.executable, *start, "-m", "cpsample", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, env=environment)


def succeeds(*words, processes=1):
    done = command(*words, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_draw_the_images_of_one(tmp_path):
    "In chunks of 250; what the guard recognises is drawn anew in the process that drew it."
    succeeds(*TRAIN, "--out", tmp_path / "run")
    succeeds("guard", tmp_path / "run", "--preset", "x_t", "--steps", 500, "--wanted", 0.02)
    draw = ("sample", tmp_path / "run", "-n", 540, "--steps", 4)
    alone = succeeds(*draw, "--out", tmp_path / "alone")
    together = succeeds(*draw, "--out", tmp_path / "together", processes=2)
    for name in (".npz", ".png"):
        of_one, of_two = (tmp_path / f"{who}{name}" for who in ("alone", "together"))
        assert of_one.read_bytes() == of_two.read_bytes()
    assert together.replace("together", "alone") == alone  # said once, with the same counts


def test_two_processes_audit_as_one(tmp_path):
    "Features are shared a thousand at a time; the verdict is said once, by its status by both."
    images = (load_digits()[0] * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "known.npy", images[:1300])
    np.save(tmp_path / "made.npy", images[1280:1400])
    audit = ("audit", tmp_path / "made.npy", tmp_path / "known.npy", "--space", "digits-mlp-64")
    of = {}
    for processes, name in ((1, "alone"), (2, "together")):
        done = command(*audit, "--out", tmp_path / name, processes=processes)
        assert done.returncode == 1 and done.stdout.count("this test counts") == 1
        of[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert of["alone"]["tests"] == of["together"]["tests"]


def test_a_report_is_whole_before_anybody_ends_with_its_status(tmp_path):
    "Whoever ends with 1 makes the launcher stop the others, which may be writing."
    images = (load_digits()[0][:60] * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "known.npy", images[:40])
    np.save(tmp_path / "made.npy", images[20:])
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        "from cpsample.judgement import report\n"
        "from cpsample.cli import app\n"
        "write = report.write_report\n"
        "report.write_report = lambda *a, **k: time.sleep(3) or write(*a, **k)\n"
        "app()\n"
    )
    out = tmp_path / "out" / "audit"
    words = ["audit", tmp_path / "made.npy", tmp_path / "known.npy", "--out", out]
    call = [sys.executable, *PROCESSES, slow, *words]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("this test counts") == 1
    assert json.loads(out.with_suffix(".json").read_text())["tests"]["ratio"]["copies"] == 20
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_what_one_process_raises_is_said_and_nobody_waits(tmp_path):
    done = command("sample", tmp_path / "nothing", processes=2)
    assert done.returncode and f"{tmp_path / 'nothing'} holds no run" in done.stderr


def test_a_command_that_shares_nothing_is_started_once():
    done = command("demo", processes=2)
    assert done.returncode and "demo does not share its work among processes" in done.stderr
