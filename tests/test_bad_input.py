"Mistakes get one line that says what to do, from Python and from the command line, and leave no half-written file."
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from cpsample.classifier import MLPClassifier, label_loss, with_reference
from cpsample.data import GaussianMixture, atomic, check_images, data_path, exact_denoiser, load_images, plant_duplicates, random_labels, save_json, split, toy
from cpsample.ddpm import MLPDenoiser, ddpm_loss, last, run, sample, timesteps, train
from cpsample.demo import run_demo
from cpsample.memorization import carlini_test, copy_test, reject_copies
from cpsample.protect import Guard, fit_guard, load_guard, protect, save_guard
from cpsample.schedule import make_schedule, noisify

X = load_images("digits")[0][:40]
S = make_schedule()
NAN = X.clone()
NAN[3, 0, 2, 2] = torch.nan


def nan_network():
    net = MLPClassifier((1, 8, 8), K=1, width=16)
    net.out.bias.data.fill_(torch.nan)
    return net


def nan_denoiser():
    net = MLPDenoiser((1, 8, 8), width=16)
    net.out.bias.data.fill_(torch.nan)
    return net


def drain(training): return run(training, 5, progress=False)


def draw(model): return last(sample(model, S, (2, 1, 8, 8), 5))


def wide(K): return lambda x, t: torch.ones(len(x) + 1, K)


PYTHON = {
    "labels for other images": (lambda: with_reference(X, random_labels(39), X), "40 images but 39 rows of labels"),
    "reference of another shape": (lambda: with_reference(X, random_labels(40), X[..., :7]), "differ in shape"),
    "images and labels differ in number": (lambda: drain(train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=S), (X, X[:5]), 5)), "[40, 5]"),
    "classifier of the wrong width": (lambda: label_loss(MLPClassifier((1, 8, 8), 2, 16), X, random_labels(40, 3), S), "must give [B, K]"),
    "classifier that is not [B, K]": (lambda: protect(lambda x, t: x, Guard(lambda x, t: x, S))(X, torch.zeros(40, dtype=torch.int64)), "logits [B, K]"),
    "classifier with other rows": (lambda: protect(lambda x, t: x, Guard(wide(2), S))(X, torch.zeros(40, dtype=torch.int64)), "logits [B, K]"),
    "alpha 0": (lambda: Guard(None, S, alpha=0), "alpha must lie between 0 and 1/2"),
    "alpha 1/2": (lambda: Guard(None, S, alpha=0.5), "alpha must lie between 0 and 1/2"),
    "alpha NaN": (lambda: Guard(None, S, alpha=float("nan")), "alpha must lie between 0 and 1/2"),
    "negative scale": (lambda: Guard(None, S, scale=-1), "scale must be finite and at least 0"),
    "infinite scale": (lambda: Guard(None, S, scale=float("inf")), "scale must be finite and at least 0"),
    "NaN scale": (lambda: Guard(None, S, scale=float("nan")), "scale must be finite and at least 0"),
    "unknown form": (lambda: Guard(None, S, form="up"), "toward, away"),
    "NaN weights in the guard": (lambda: Guard(nan_network(), S), "weights hold NaN"),
    "NaN weights in the model": (lambda: draw(nan_denoiser()), "check the model's weights"),
    "NaN images in training": (lambda: drain(train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=S), (NAN,), 5)), "row 3"),
    "NaN images in a guard": (lambda: fit_guard(NAN, S, steps=5, width=16), "row 3"),
    "NaN reference images": (lambda: fit_guard(X, S, NAN, steps=5, width=16), "reference images hold NaN"),
    "NaN samples in a copy test": (lambda: copy_test(NAN, X), "row 3"),
    "NaN training images in a copy test": (lambda: carlini_test(X, NAN), "training images hold NaN"),
    "integer images": (lambda: check_images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)), "floating point"),
    "no images": (lambda: check_images(X[:0]), "non-empty"),
    "samples of another size": (lambda: copy_test(X, X[..., :7]), "differ in shape"),
    "one training image": (lambda: copy_test(X, X[:1].repeat(5, 1, 1, 1)), "two distinct"),
    "unknown data set": (lambda: load_images("cats"), "choose one of digits"),
    "unknown toy set": (lambda: toy("cats", 5), "choose one of two_gaussians"),
    "unknown schedule": (lambda: make_schedule("cubic"), "choose one of linear, cosine"),
    "schedule of one level": (lambda: make_schedule("linear", 1), "at least 2"),
    "split of too many": (lambda: split(X, {"a": 30, "b": 11}), "cannot split 40 images"),
    "split of none": (lambda: split(X, {"a": 0}), "at least 1"),
    "split that leaves none": (lambda: split(X, {"a": 40, "rest": None}), "at least 1"),
    "split of other data": (lambda: split(X, {"a": 3}).of(X.flip(0), "a"), "split again"),
    "duplicates of too many": (lambda: plant_duplicates(X, 41), "cannot duplicate 41 of 40"),
    "t of another length": (lambda: noisify(X, torch.zeros(3, dtype=torch.int64), S), "one entry per row"),
    "noise of another shape": (lambda: noisify(X, torch.zeros(40, dtype=torch.int64), S, X[:1]), "must have the shape of x0"),
    "steps 0": (lambda: timesteps(1000, 0), "between 1 and T=1000"),
    "levels that rise": (lambda: timesteps(1000, [0, 5]), "fall strictly"),
    "levels that stop early": (lambda: timesteps(1000, [999, 39]), "end at 0"),
    "mixed levels in exact_denoiser": (lambda: exact_denoiser(GaussianMixture(*torch.ones(3, 1, 1)), S)(X[:2, 0, 0, :1], torch.tensor([1, 2])), "common noise level"),
    "exploding loss": (lambda: drain(train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=S), (X,), 5, lr=1e38)), "lower the learning rate"),
    "nothing but copies": (lambda: reject_copies(lambda: X, X, 5, max_rounds=2), "copies too much"),
    "no label": (lambda: fit_guard(X, S, K=0), "at least 1 label"),
    "unknown preset": (lambda: fit_guard(X, S, preset="best"), "default, paper"),
    "unknown demo setting": (lambda: run_demo(sample=3), "unknown settings ['sample']"),
    "missing data file": (lambda: data_path("nothing.json"), "reinstall cpsample"),
    "missing guard": (lambda: load_guard("/nonexistent/guard"), "/nonexistent/guard.json"),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_mistakes(name):
    mistake, says = PYTHON[name]
    with pytest.raises((ValueError, RuntimeError, ArithmeticError, OSError)) as caught: mistake()
    assert says in str(caught.value) and "\n" not in str(caught.value)


SHORT = ["demo", "--images", "30", "--train-steps", "20", "--guard-steps", "20", "--samples", "20", "--sample-steps", "5"]
COMMAND = {
    "alpha too large": (["--alpha", "0.7"], "alpha must lie"),
    "alpha zero": (["--alpha", "0"], "alpha must lie"),
    "negative scale": (["--scale=-3"], "scale must be finite"),
    "scale NaN": (["-s", "nan"], "scale must be finite"),
    "no labels": (["-K", "0"], "K must be at least 1"),
    "too many images": (["--images", "5000"], "cannot split 1797 images"),
    "unknown data": (["--data", "cats"], "choose one of digits"),
    "unknown schedule": (["--schedule", "cubic"], "choose one of linear, cosine"),
    "too many steps": (["--sample-steps", "2000"], "between 1 and T=1000"),
    "no samples": (["--samples", "0"], "samples must be at least 2"),
    "no training": (["--train-steps", "0"], "train_steps must be at least 1"),
    "folder that cannot be made": (["--out", "/dev/null/out"], "/dev/null/out"),
    "JSON that cannot be written": (["--json", "/dev/null/x.json"], "/dev/null"),
}


def cpsample(*args, **kw): return subprocess.run([Path(sys.executable).parent / "cpsample", *args], capture_output=True, text=True, timeout=300, **kw)


@pytest.mark.parametrize("name", COMMAND)
def test_command_line_mistakes(name, tmp_path):
    options, says = COMMAND[name]
    done = cpsample(*SHORT, "--out", str(tmp_path), *options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("cpsample: ")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0]
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
    assert "denoiser" not in done.stderr, "settings must be refused before training starts"


def test_interrupt_leaves_nothing_half_written(tmp_path):
    program = [Path(sys.executable).parent / "cpsample", *SHORT, "--train-steps", "100000", "--out", tmp_path, "--json", tmp_path / "demo.json"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "denoiser" not in process.stderr.readline(50): time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted, nothing was written" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


WRITER = """
import os, signal, sys
from cpsample.data import atomic
with atomic(sys.argv[1]) as tmp:
    tmp.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "result.json"
    save_json(path, {"n": 1})
    assert subprocess.run([sys.executable, "-c", WRITER, path]).returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"n": 1}


def test_a_failing_writer_leaves_no_rubbish(tmp_path):
    with pytest.raises(ValueError): save_json(tmp_path / "r.json", {"x": float("nan")})
    with pytest.raises(OSError), atomic(tmp_path / "missing" / "r.json"): pass
    assert list(tmp_path.iterdir()) == []


def test_guard_files_that_do_not_belong_together_are_refused(tmp_path):
    save_guard(Guard(MLPClassifier((2,), 1, 16), S), tmp_path / "a")
    save_guard(Guard(MLPClassifier((2,), 1, 16), S), tmp_path / "b")
    os.replace(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="save the guard again"): load_guard(tmp_path / "a")


def test_guard_with_an_unknown_network_needs_an_instance(tmp_path):
    class Mine(nn.Linear): pass
    guard = Guard(Mine(2, 1), S)
    save_guard(guard, tmp_path / "g")
    with pytest.raises(ValueError, match="pass classifier="): load_guard(tmp_path / "g")
    assert torch.equal(load_guard(tmp_path / "g", Mine(2, 1)).classifier.weight, guard.classifier.weight)
