"Mistakes get one line that says what to do, and leave no half-written file."

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.calibration import calibrate
from cpsample.core.classifier import MLPClassifier, label_loss, random_labels, with_reference
from cpsample.core.copying import copy_test, cosine_test, neighbourhood_test, reject, reject_copies
from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, final_sample, run, sample, timesteps, train
from cpsample.core.demo import run_demo
from cpsample.core.densities import GaussianMixture, exact_denoiser, toy
from cpsample.core.digit_encoder import frechet_distance
from cpsample.core.guard import Guard, fit_guard, push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import check_images, load_digits, plant_duplicates, split
from cpsample.core.protection import protect
from cpsample.core.rejection import ideal_classifier, lipschitz_bound, log_acceptance, tilt
from cpsample.core.schedule import add_noise, make_schedule
from cpsample.practice.datasets import load_images
from cpsample.workshop.files import atomic, data_path, save_json, writable
from cpsample.workshop.views import start_values

X, OTHERS = load_digits()[0][:80].split(40)
S = make_schedule()
GAUSS = GaussianMixture(torch.zeros(1, 1), torch.ones(1), torch.ones(1))
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


def drain(training):
    return run(training, 5, progress=False)


def draw(model):
    return final_sample(sample(model, S, (2, 1, 8, 8), steps=5))


def wide_sure(x, t):
    return 9 + 1e-3 * x.flatten(1)[:, :1]


def wide(K):
    return lambda x, t: torch.ones(len(x) + 1, K)


PYTHON = {
    "labels for other images": (
        lambda: with_reference(X, random_labels(39), X),
        "40 images but 39 rows of labels",
    ),
    "reference of another shape": (
        lambda: with_reference(X, random_labels(40), X[..., :7]),
        "differ in shape",
    ),
    "images and labels differ in number": (
        lambda: drain(
            train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=S), (X, X[:5]), 5)
        ),
        "[40, 5]",
    ),
    "classifier of the wrong width": (
        lambda: label_loss(MLPClassifier((1, 8, 8), 2, 16), X, random_labels(40, 3), S),
        "must give [B, K]",
    ),
    "classifier that is not [B, K]": (
        lambda: protect(lambda x, t: x, Guard(lambda x, t: x, S))(
            X, torch.zeros(40, dtype=torch.int64)
        ),
        "logits [B, K]",
    ),
    "classifier with other rows": (
        lambda: protect(lambda x, t: x, Guard(wide(2), S))(X, torch.zeros(40, dtype=torch.int64)),
        "logits [B, K]",
    ),
    "alpha 0": (lambda: Guard(None, S, alpha=0), "alpha must lie between 0 and 0.5"),
    "alpha above 1/2": (lambda: Guard(None, S, alpha=0.501), "alpha must lie between 0 and 0.5"),
    "alpha 1/2 at predictions": (
        lambda: Guard(None, S, alpha=0.5, at="x0"),
        "take a smaller alpha, or at='x_t'",
    ),
    "calibration to alpha 1/2 at predictions": (
        lambda: calibrate(Guard(wide_sure, S, at="x0"), X, OTHERS, alpha=0.5),
        "take a smaller alpha, or at='x_t'",
    ),
    "alpha NaN": (lambda: Guard(None, S, alpha=float("nan")), "alpha must lie between 0 and 0.5"),
    "negative scale": (lambda: Guard(None, S, scale=-1), "scale must be finite and at least 0"),
    "infinite scale": (
        lambda: Guard(None, S, scale=float("inf")),
        "scale must be finite and at least 0",
    ),
    "NaN scale": (
        lambda: Guard(None, S, scale=float("nan")),
        "scale must be finite and at least 0",
    ),
    "unknown form": (lambda: Guard(None, S, form="up"), "toward, away"),
    "NaN weights in the guard": (lambda: Guard(nan_network(), S), "weights hold NaN"),
    "NaN weights in the model": (lambda: draw(nan_denoiser()), "the model's weights hold NaN"),
    "NaN images in training": (
        lambda: drain(train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=S), (NAN,), 5)),
        "row 3",
    ),
    "NaN images in a guard": (lambda: fit_guard(NAN, S, steps=5, width=16), "row 3"),
    "NaN reference images": (
        lambda: fit_guard(X, S, NAN, steps=5, width=16),
        "reference images hold NaN",
    ),
    "NaN samples in a copy test": (lambda: copy_test(NAN, X), "row 3"),
    "NaN training images in a copy test": (
        lambda: neighbourhood_test(X, NAN),
        "training images hold NaN",
    ),
    "integer images": (
        lambda: check_images(torch.zeros(3, 1, 8, 8, dtype=torch.int64)),
        "floating point",
    ),
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
    "t of another length": (
        lambda: add_noise(X, torch.zeros(3, dtype=torch.int64), S),
        "one entry per row",
    ),
    "noise of another shape": (
        lambda: add_noise(X, torch.zeros(40, dtype=torch.int64), S, noise=X[:1]),
        "must have the shape of x0",
    ),
    "steps 0": (lambda: timesteps(1000, 0), "between 2 and 1000"),
    "levels that rise": (lambda: timesteps(1000, [0, 5]), "fall strictly"),
    "levels that stop early": (lambda: timesteps(1000, [999, 39]), "end at 0"),
    "mixed levels in exact_denoiser": (
        lambda: exact_denoiser(GaussianMixture(*torch.ones(3, 1, 1)), S)(
            X[:2, 0, 0, :1], torch.tensor([1, 2])
        ),
        "common noise level",
    ),
    "exploding loss": (
        lambda: drain(
            train(MLPDenoiser((1, 8, 8), 16), partial(ddpm_loss, schedule=S), (X,), 5, lr=1e38)
        ),
        "lower the learning rate",
    ),
    "nothing but copies": (
        lambda: reject_copies(lambda: X, X, 5, max_rounds=2),
        "rejects too much for this model",
    ),
    "no label": (lambda: fit_guard(X, S, K=0), "K must be at least 1"),
    "no training of the guard": (
        lambda: fit_guard(X, S, steps=0),
        "steps must be at least 1",
    ),
    "misspelt setting": (lambda: fit_guard(X, S, aplha=0.1), "unknown settings ['aplha']"),
    "members in the reference": (
        lambda: fit_guard(X[:20], S, X[15:]),
        "5 of 25 reference images are members",
    ),
    "t_max beyond the schedule": (
        lambda: Guard(None, S, t_max=1001),
        "t_max must be between 0 and the schedule's T=1000",
    ),
    "training beyond the schedule": (
        lambda: label_loss(
            MLPClassifier((1, 8, 8), 3, 16), X, random_labels(40, 3), make_schedule(T=100)
        ),
        "between 1 and T=100",
    ),
    "unknown form of push": (
        lambda: push(
            MLPClassifier((1, 8, 8), 3, 16), X, torch.zeros(40, dtype=torch.int64), form="up"
        ),
        "toward, away",
    ),
    "t for other rows": (
        lambda: protect(lambda x, t: x, Guard(wide(2), S))(X, torch.zeros(3, dtype=torch.int64)),
        "one level or one per row",
    ),
    "eta above 1": (
        lambda: final_sample(sample(lambda x, t: x, S, (2, 2), steps=5, eta=2)),
        "eta must lie between 0",
    ),
    "one sampling step": (lambda: timesteps(1000, 1), "between 2 and 1000"),
    "features with NaN": (
        lambda: cosine_test(torch.full((3, 2), torch.nan), torch.ones(3, 2)),
        "features hold NaN",
    ),
    "Fréchet distance of one image": (
        lambda: frechet_distance(torch.ones(1, 3), torch.ones(5, 3)),
        "at least 2 rows",
    ),
    "a guard that is no module": (
        lambda: save_guard(Guard(wide(1), S), "/nonexistent/g"),
        "torch.nn.Module",
    ),
    "the same seed twice": (lambda: run_demo((1, 1)), "seeds must be different"),
    "no seed": (lambda: run_demo(()), "seeds must be different"),
    "huge seed": (lambda: run_demo((2**40,)), "seeds must be different"),
    "unknown preset": (lambda: fit_guard(X, S, preset="best"), "x0, x_t, member, paper"),
    "unknown demo setting": (lambda: run_demo(sample=3), "unknown settings ['sample']"),
    "missing data file": (lambda: data_path("nothing.json"), "reinstall cpsample"),
    "wanted coverage of none": (
        lambda: calibrate(Guard(wide(1), S), X, OTHERS, wanted=0),
        "wanted must lie in (0, 1]",
    ),
    "level beyond the training": (
        lambda: calibrate(Guard(wide(1), S, t_max=100), X, OTHERS, level=100),
        "level in [0, 100)",
    ),
    "NaN held-out images": (
        lambda: calibrate(Guard(wide(1), S), X, NAN),
        "held-out images hold NaN",
    ),
    "membership without others": (
        lambda: fit_guard(X, S, preset="member", steps=5, width=16),
        "needs reference images",
    ),
    "one-sided alpha of 1": (lambda: Guard(None, S, alpha=1, form="member"), "between 0 and 1"),
    "noise levels drawn with power 0": (
        lambda: label_loss(MLPClassifier((1, 8, 8), 3, 16), X, random_labels(40, 3), S, t_power=0),
        "t_power must be positive",
    ),
    "a grid in 3-D": (
        lambda: tilt(
            GaussianMixture(torch.zeros(1, 3), torch.ones(1), torch.ones(1)),
            lambda x: x[:, 0],
            torch.linspace(-1, 1, 3),
        ),
        "1 or 2 dimensions",
    ),
    "a rule that accepts nothing": (
        lambda: reject(lambda: X, lambda x: torch.zeros(len(x), dtype=torch.bool), 5, max_rounds=2),
        "0 of 80 draws were accepted",
    ),
    "a rule for a push that has none": (
        lambda: log_acceptance(torch.ones(2, 1), 0.2, form="away"),
        "no acceptance rule",
    ),
    "calibration to a negative scale": (
        lambda: calibrate(Guard(wide_sure, S), X, OTHERS, scale=-1),
        "scale must be finite",
    ),
    "calibration to a two-sided alpha of 0.7": (
        lambda: calibrate(Guard(wide_sure, S), X, OTHERS, alpha=0.7),
        "alpha must lie between 0 and 0.5",
    ),
    "mixed levels in ideal_classifier": (
        lambda: ideal_classifier(GAUSS, torch.ones(1, 1), GAUSS, S)(
            X[:2, 0, 0, :1], torch.tensor([1, 2])
        ),
        "common noise level",
    ),
    "a layer without a bound": (
        lambda: lipschitz_bound([nn.Conv2d(1, 1, 3)]),
        "no bound is known for Conv2d",
    ),
    "a control without a start": (lambda: start_values({"s": (0, 1, 2)}), "control s must be"),
    "a control that starts outside": (
        lambda: start_values({"s": (0, 1, 1, 5)}),
        "control s must be",
    ),
    "missing guard": (
        lambda: load_guard("/nonexistent/guard"),
        "no guard at /nonexistent/guard.safetensors",
    ),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_mistakes(name):
    mistake, says = PYTHON[name]
    with pytest.raises((ValueError, ArithmeticError, OSError)) as caught:
        mistake()
    assert says in str(caught.value) and "\n" not in str(caught.value)


SHORT = [
    "demo",
    "--images",
    "30",
    "--train-steps",
    "20",
    "--guard-steps",
    "400",
    "--samples",
    "20",
    "--sample-steps",
    "5",
]
COMMAND = {
    "a guard that covers too little": (["--guard-steps", "5"], "train it longer"),
    "alpha too large": (["--alpha", "0.7"], "alpha must lie"),
    "alpha one half": (["--alpha", "0.5"], "take a smaller alpha"),
    "alpha zero": (["--alpha", "0"], "alpha must lie"),
    "negative scale": (["--scale=-3"], "scale must be finite"),
    "scale NaN": (["-s", "nan"], "scale must be finite"),
    "no labels": (["-K", "0"], "--labels must be between 1 and 1,024"),
    "too many images": (["--images", "5000"], "at least 100 are needed"),
    "unknown data": (["--data", "cats"], "the demo runs on digits"),
    "unknown schedule": (["--schedule", "cubic"], "choose one of linear, cosine"),
    "too many steps": (["--sample-steps", "2000"], "between 2 and 1,000"),
    "one sampling step": (["--sample-steps", "1"], "between 2 and 1,000"),
    "nothing held out": (["--images", "1099"], "at least 100 are needed"),
    "the same seed twice": (["--seed", "3", "--seed", "3"], "seeds must be different"),
    "JSON that is a folder": (["--json", "/dev"], "/dev is a folder or a device"),
    "no samples": (["--samples", "0"], "--samples must be between 2"),
    "no training": (["--train-steps", "0"], "--train-steps must be between 1"),
    "folder that cannot be made": (["--out", "/dev/null/out"], "/dev/null/out"),
    "JSON that cannot be written": (["--json", "/dev/null/x.json"], "/dev/null"),
}


def cpsample(*words):
    "The result of a command."
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("name", COMMAND)
def test_command_line_mistakes(name, tmp_path):
    options, says = COMMAND[name]
    done = cpsample(*SHORT, "--out", str(tmp_path), *options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("cpsample: ")]
    assert done.exit_code == 2 and len(lines) == 1 and says in lines[0]
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
    assert "denoiser" not in done.stderr, (
        "settings must be refused before training starts, a guard before the model is trained"
    )


def test_interrupt_leaves_nothing_half_written(tmp_path):
    program = [sys.executable, "-m", "cpsample", *SHORT, "--train-steps", "100000"]
    program += ["--out", tmp_path, "--json", tmp_path / "demo.json"]

    def listen():
        "A shell's background jobs are born deaf to the signal."
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        program,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    # Stopped once it says that it trains, however long that takes.
    said = ""
    while "denoiser" not in said:
        said = process.stderr.readline(50)
        assert said, "it ended by itself"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


WRITER = """
import os, signal, sys
from cpsample.workshop.files import atomic
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
    with pytest.raises(ValueError):
        save_json(tmp_path / "r.json", {"x": float("nan")})
    with pytest.raises(OSError), atomic(tmp_path / "missing" / "r.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_guard_are_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    for spoil in (
        lambda: path.write_bytes(b"junk"),
        lambda: path.write_bytes(path.read_bytes()[:-5]),
        lambda: save_file({"x": torch.ones(1)}, path),
        lambda: save_file({"abar": S.abar}, path, {"guard": "{broken"}),
        lambda: save_file({"abar": S.abar}, path, {"guard": "{}"}),
    ):
        path.unlink(missing_ok=True)  # what is no guard is not replaced
        save_guard(Guard(MLPClassifier((2,), 1, 16), S), tmp_path / "g")
        spoil()
        says = r"g\.safetensors (cannot be read as a guard|holds no JSON|is damaged)"
        with pytest.raises(ValueError, match=says) as caught:
            load_guard(tmp_path / "g")
        assert "\n" not in str(caught.value)


def test_guard_of_another_architecture_is_refused(tmp_path):
    save_guard(Guard(MLPClassifier((2,), 1, 16), S), tmp_path / "g")
    with pytest.raises(ValueError, match="cannot be read as a guard"):
        load_guard(tmp_path / "g", MLPClassifier((2,), 1, 32))


def test_a_guard_is_readable_for_its_owner_alone_and_other_files_follow_the_umask(tmp_path):
    save_guard(Guard(MLPClassifier((2,), 1, 16), S), tmp_path / "g")
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}
    old = os.umask(0o027)
    save_json(tmp_path / "r.json", {})
    os.umask(old)
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o640


def test_probing_a_folder_keeps_the_files_in_it(tmp_path):
    (tmp_path / "probe").write_text("mine")
    assert writable(tmp_path) == tmp_path and list(tmp_path.iterdir()) == [tmp_path / "probe"]
    assert (tmp_path / "probe").read_text() == "mine"


def test_refused_settings_do_not_make_the_folder(tmp_path):
    assert (
        cpsample(*SHORT, "--out", tmp_path / "new", "--alpha", "0.9").exit_code == 2
        and not (tmp_path / "new").exists()
    )


def test_guard_with_an_unknown_network_needs_an_instance(tmp_path):
    class Mine(nn.Linear):
        pass

    guard = Guard(Mine(2, 1), S)
    save_guard(guard, tmp_path / "g")
    with pytest.raises(ValueError, match="pass classifier="):
        load_guard(tmp_path / "g")
    assert torch.equal(
        load_guard(tmp_path / "g", Mine(2, 1)).classifier.weight, guard.classifier.weight
    )
