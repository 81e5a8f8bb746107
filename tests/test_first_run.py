"""The first run of `cpsample train`: what it will take is said, and changes nothing of it.

Seconds are never waited for: where something follows from them, the test says how many they are.
"""

import copy
import json
import re
import shlex
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from cpsample import cli
from cpsample.cli import (
    Training,
    TrainingOrder,
    app,
    attack_in_words,
    count_of_pictures,
    in_words,
    made_to_fit,
    name_of_member,
    pushed_in_words,
    training_in_words,
)
from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.core.schedule import make_schedule
from cpsample.practice import runs
from cpsample.practice.runs import CONFIGS, begun_run, run_of
from cpsample.practice.training import fit, seconds_per_step, steps_done, steps_within
from cpsample.workshop import choices
from cpsample.workshop.files import save_json
from cpsample.workshop.records import plain

DIGITS = ["train", "digits", "--images", "8", "--device", "cpu"]
TINY = [*DIGITS, "--tiny"]


def call(*words):
    "A command: (exit status, what it printed, what stood on standard error)."
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeeds(*words):
    "What a command prints that ends well."
    status, printed, errors = call(*words)
    assert status == 0, errors
    return printed


def refused(says, *words):
    "Status 2, and one line that says so."
    status, _, errors = call(*words)
    lines = [line for line in errors.splitlines() if line.startswith("cpsample: ")]
    assert status == 2 and len(lines) == 1 and says in lines[0], (status, errors)


def pictures(folder, n):
    "A folder of n random pictures in colour."
    folder.mkdir()
    for i in range(n):
        random = np.random.default_rng(i)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.fixture
def step_takes(monkeypatch):
    "Say how many seconds a step takes, instead of having it measured."

    def say(seconds):
        monkeypatch.setattr(runs, "probe_denoiser", lambda *_, **__: seconds)

    return say


@pytest.fixture
def planned(monkeypatch):
    "Nothing is trained; what would have been lands in this list, as (configuration, description)."
    trainings = []

    def note(config, images, folder, *, about, **_):
        trainings.append((config, about))

    monkeypatch.setattr(runs, "train_denoiser", note)
    return trainings


# The probe.


class Shaken(nn.Module):
    "A network that draws from torch's global random numbers, with a number that it only notes."

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.dropout(self.layer(x))


def shaken_loss(network, x0, generator=None):
    return (network(x0) - x0).square().mean()


def trained(with_probe):
    "The weights of such a network after a few steps, and the losses on the way."
    torch.manual_seed(3)
    network, x = Shaken(), torch.rand(20, 4)
    if with_probe:
        seconds_per_step(network, shaken_loss, (x,), 12, batch_size=8)
    average, losses = fit(network, shaken_loss, (x,), 12, batch_size=8, progress=False)
    return network.state_dict() | {
        f"average.{k}": v for k, v in average.state_dict().items()
    }, losses


def test_a_probe_changes_no_bit_of_what_is_trained():
    (weights, losses), (probed_weights, probed_losses) = trained(False), trained(True)
    assert losses == probed_losses
    assert all(torch.equal(weights[key], probed_weights[key]) for key in weights)


def test_the_first_step_does_not_count_and_one_that_stumbles_counts_little():
    x, moments = torch.rand(20, 4), iter([100.0, 102.0, 104.5, 204.5])
    seconds = seconds_per_step(Shaken(), shaken_loss, (x,), 50, clock=lambda: next(moments))
    assert seconds == 2.5  # of 2, 2.5 and 100; whatever came before 100 was not looked at
    assert steps_within(10, seconds) == 240 and steps_within(0.001, seconds) == 1


def test_the_probe_of_a_run_leaves_a_model_to_fine_tune_as_it_is():
    config = replace(CONFIGS["digits"].tiny(), steps=12)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    start = runs._denoiser(config, images.shape[1:], None).requires_grad_(False)
    before = copy.deepcopy(start.state_dict())
    assert runs.probe_denoiser(config, images, start) > 0
    assert all(torch.equal(before[key], value) for key, value in start.state_dict().items())
    assert not any(weight.requires_grad for weight in start.parameters())


def test_the_command_trains_the_same_weights_with_and_without_a_probe(tmp_path, monkeypatch):
    words = [*TINY, "--steps", cli._FEW_STEPS]
    said = succeeds(*words, "--out", tmp_path / "probed")
    monkeypatch.setattr(cli, "_FEW_STEPS", 10**9)
    silent = succeeds(*words, "--out", tmp_path / "plain")
    assert "A step takes" in said and "A step takes" not in silent
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("probed", "plain")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


# How long.


def test_pictures_on_a_cpu_get_what_fits_into_the_hour(tmp_path, step_takes, planned):
    folder, run = pictures(tmp_path / "pictures", 12), tmp_path / "run"
    step_takes(1.5)
    said = succeeds("train", folder, "--out", run, "--device", "cpu")
    config, about = planned.pop()
    assert config.steps == 60 * choices.CPU_MINUTES / 1.5 == about["config"]["steps"]
    assert config.batch_size == choices.CPU_BATCH_SIZE
    assert "2,000 take 50 minutes" in said and "--minutes 20 makes 800" in said
    assert "2.5% of the work" in said
    assert "6,000 steps would take 2.5 hours" in said

    # A faster machine makes all of them, and no machine makes fewer than were asked for.
    step_takes(0.1)
    succeeds("train", folder, "--out", run, "--device", "cpu")
    assert planned.pop()[0].steps == choices.CPU_STEPS
    step_takes(100)
    for words, steps in ((["--steps", 7000], 7000), (["--full"], choices.TRAINING["steps"])):
        said = succeeds("train", folder, "--out", run, "--device", "cpu", *words)
        assert planned.pop()[0].steps == steps and "rougher" not in said


def test_a_setting_goes_by_device_and_number_of_images():
    order = TrainingOrder(["pictures"], Path("run"))
    by_number = [order.configs(n, "cpu")[0] for n in (10, 1000, 2000, 10**6)]
    assert [config.steps for config in by_number] == [6000, 6000, 12_000, 20_000]
    for device in ("cuda", "cuda:1"):
        config = order.configs(10, device)[0]
        assert (config.steps, config.batch_size) == (20_000, 128)
        assert order.minutes_at_most(device) is None
    assert replace(order, full=True).configs(10, "cpu") == [
        replace(CONFIGS["folder"], data="pictures")
    ]

    # Sets with a name are what the book trains, everywhere; what has no setting counts as pictures.
    for name in ("digits", "fashion", "fashion-small", "cifar10"):
        named = replace(order, data=[name])
        assert named.configs(10, "cpu") == [CONFIGS[name.replace("-small", "")]]
        assert named.minutes_at_most("cpu") is None
    assert replace(order, data=["crops"]).minutes_at_most("cpu") == choices.CPU_MINUTES
    assert replace(order, data=["folder"]).configs(10, "cpu")[0].data == "folder"  # of that name


def test_minutes_become_steps_which_the_run_remembers(tmp_path, step_takes):
    run = tmp_path / "run"
    step_takes(0.5)
    succeeds(*TINY, "--minutes", 0.2, "--out", run)
    assert run_of(run)["config"]["steps"] == 24 and run_of(run)["minutes"] == 0.2

    # Asked again, also on a slower machine, there is nothing left to do.
    before = (run / "model.safetensors").read_bytes()
    step_takes(5.0)
    for again in (["--minutes", 0.2], []):
        assert "all 24 steps are made" in succeeds(*TINY, *again, "--out", run)
        assert (run / "model.safetensors").read_bytes() == before
    assert run_of(run)["minutes"] == 0.2

    refused("24 steps, chosen for 0.2 minutes", *TINY, "--minutes", 3, "--out", run)
    succeeds(*TINY, "--steps", 30, "--out", run)
    refused("was begun for 30 steps, and goes on", *TINY, "--minutes", 3, "--out", run)


@pytest.fixture
def ctrl_c():
    "Ctrl-C stops a program, also where these tests run in a background that ignores it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_stopped_run_goes_on_to_the_same_step_on_the_same_learning_rate(
    tmp_path, step_takes, monkeypatch
):
    step_takes(0.5)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    succeeds(*TINY, "--steps", 24, "--out", straight)

    # Somebody presses Ctrl-C while the tenth step is made.
    calls, loss = [], runs.ddpm_loss

    def interrupted(*words, **options):
        calls.append(0)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return loss(*words, **options)

    monkeypatch.setattr(runs, "ddpm_loss", interrupted)
    minutes = ["--minutes", 0.2, "--out", stopped]
    status, _, errors = call(*TINY, *minutes)
    assert status == 130 and "after step 10 of 24" in errors
    assert steps_done(stopped / "checkpoint.safetensors") == 10

    # By the same command, although the machine is now ten times slower.
    step_takes(5.0)
    said = succeeds(*TINY, *minutes)
    assert "goes on after step 10 of 24" in said
    models = [load_file(folder / "model.safetensors") for folder in (straight, stopped)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.usefixtures("ctrl_c")
def test_a_continuation_that_was_stopped_goes_on_without_saying_how_far(tmp_path, monkeypatch):
    run = tmp_path / "run"
    succeeds(*TINY, "--out", run)
    loss = runs.ddpm_loss

    def stopping(*words, **options):
        signal.raise_signal(signal.SIGINT)
        return loss(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "ddpm_loss", stopping)
        assert call(*TINY, "--steps", 32, "--out", run)[0] == 130
    assert "goes on after step 21 of 32" in succeeds(*TINY, "--out", run)
    assert run_of(run)["config"]["steps"] == 32


def test_a_run_goes_on_with_the_setting_it_was_begun_with(tmp_path):
    "Begun on a GPU, or by a version that had one setting: the CPU goes on with it."
    order = TrainingOrder(["pictures"], tmp_path)
    on_cpu, on_gpu = order.configs(10, "cpu")
    about = {"data": "pictures", "size": 32, "channels": 3, "images": None}
    about |= {"fingerprint": "0", "from": None}
    assert begun_run(tmp_path, [on_cpu, on_gpu]) is None
    for config in (on_gpu, on_cpu):
        config = replace(config, steps=77)
        save_json(tmp_path / "run.json", plain(about | {"config": asdict(config)}))
        (tmp_path / "model.safetensors").touch()
        begun = begun_run(tmp_path, [on_cpu, on_gpu])
        assert begun.config.batch_size == config.batch_size and begun.steps == 77
    assert begun_run(tmp_path, [on_gpu]) is None
    assert begun_run(tmp_path, [replace(on_cpu, lr=0.1)]) is None


@pytest.mark.parametrize(
    "words, says",
    [
        (["--steps", 5, "--minutes", 5], "give --steps or --minutes, and not both"),
        (["--minutes", 0], "--minutes must be between 0.01 and"),
        (["--minutes", "nan"], "--minutes must be between 0.01 and"),
        (["--full"], "--full would change nothing: digits has one setting"),
    ],
)
def test_lengths_that_cannot_be_are_refused(words, says, tmp_path):
    refused(says, *DIGITS, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_not_timed(tmp_path, monkeypatch, planned):
    class Two:
        device, is_main_process = torch.device("cpu"), True

    monkeypatch.setattr(cli, "processes", lambda device: (Two(), torch.device("cpu")))
    refused("several processes are not timed", *DIGITS, "--minutes", 5, "--out", tmp_path / "run")
    assert not planned


def test_a_damaged_number_of_minutes_is_named(tmp_path, step_takes):
    step_takes(0.5)
    succeeds(*TINY, "--minutes", 0.1, "--out", tmp_path)
    description = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(description | {"minutes": -1}))
    refused("minutes must be finite and above 0", *TINY, "--out", tmp_path)


# What it says.


def test_durations_are_said_as_people_say_them():
    words = {0.4: "1 second", 119: "119 seconds", 121: "2 minutes", 7100: "118 minutes"}
    words |= {7300: "2.0 hours", 36_000_000: "10,000 hours"}
    assert {seconds: in_words(seconds) for seconds in words} == words


def test_what_is_short_is_not_made_shorter():
    training = made_to_fit(Training(CONFIGS["digits"]), 0.01, None)
    lines = training_in_words(training, np.zeros((9, 1, 8, 8)), "cpu", None)
    assert lines[1] == "A step takes 0.01 s here, 4,000 take 40 seconds."
    slower = made_to_fit(Training(CONFIGS["digits"]), 3600.0, None)
    assert (
        "Shorter: --minutes 60 makes 1."
        in training_in_words(slower, np.zeros((9, 1, 8, 8)), "cpu", None)[1]
    )


def test_the_next_commands_can_be_pasted(tmp_path):
    run = tmp_path / "a run"
    said = succeeds(*TINY, "--seed", 3, "--mirror", "--out", run)
    more, guard = (re.search(rf"{words}: (cpsample .*)", said)[1] for words in ("steps", "guard"))
    assert (run / "samples-000020.png").exists() and "samples-000020.png" in said
    said = succeeds(*shlex.split(more)[1:])
    assert "goes on after step 20 of 40" in said and run_of(run)["config"]["steps"] == 40
    assert shlex.split(guard) == ["cpsample", "guard", str(run)]

    # Every option is in it that is part of the run; a run that took everything needs others.
    order = TrainingOrder(["a b"], run, size=64, mirror=False, lr=0.1, use_compile=True)
    again = shlex.split(order.again)
    assert again[:5] == ["cpsample", "train", "a b", "--no-mirror", "--compile"]
    assert "--size 64" in order.again and "--lr 0.1" in order.again and "--seed" not in again
    folder = pictures(tmp_path / "pictures", 9)
    said = succeeds("train", folder, "--size", 8, "--grey", "--tiny", "--out", tmp_path / "all")
    assert "--reference OTHER_PICTURES" in said and "--grey --tiny" in said


def test_quiet_leaves_one_line_and_no_bar(tmp_path):
    folder = pictures(tmp_path / "pictures", 9)
    words = ["train", folder, "--size", 8, "--tiny", "--out", tmp_path / "run"]
    status, said, errors = call(*words, "--quiet")
    assert status == 0 and errors == ""
    assert said == f"Trained on 9 images: {tmp_path}/run/model.safetensors\n"


@pytest.mark.filterwarnings("ignore::cpsample.core.guard.UncalibratedGuardWarning")
def test_quiet_says_of_each_command_what_came_out(tmp_path):
    "Of a sampling the files, of an audit the verdict; with advice there are more lines."
    run = tmp_path / "run"
    succeeds(*TINY, "--out", run)
    succeeds("guard", run, "--preset", "paper", "--steps", 2, "--device", "cpu", "-q")
    sample = ["sample", run, "-n", 3, "--out", tmp_path / "s", "--device", "cpu"]
    audit = ["audit", run, "-n", 3, "--unguarded", "--out", tmp_path / "a", "--device", "cpu"]
    for words, expected, ends in ((sample, 0, ".png\n"), (audit, 3, ".\n")):
        status, said, errors = call(*words, "--quiet")
        assert status == expected and said.count("\n") == 1 and said.endswith(ends), said
        assert "it/s" not in errors and "%|" not in errors
        status, talk, errors = call(*words)
        assert status == expected and talk.endswith(said) and talk.count("\n") > 1
        assert "it/s" in errors


# Answers in words, of the other commands.


def auc_of(auc, low, high, tpr):
    turned = {"auc": auc, "auc_ci": (low, high), "tpr": {0.01: tpr, 0.001: None}}
    return {"best of all": {"turned": turned}}


def test_the_sentence_of_an_attack_says_leak_only_where_the_whole_interval_does():
    leak = attack_in_words(auc_of(0.9, 0.8, 0.95, 0.25), 60, 70)
    assert leak.startswith("An attacker learns something of who was in the training set")
    assert "90% of pairs, one of 60 training images and one of 70 others" in leak
    assert "80% to 95%" in leak and leak.endswith("it finds 25% of the training images.")
    assert "Accusing" not in attack_in_words(auc_of(0.9, 0.8, 0.95, None), 60, 70)
    for interval in ((0.4, 0.7), (0.5, 0.9), (0.2, 0.4)):
        none = attack_in_words(auc_of(0.55, *interval, 0.2), 60, 70)
        assert none.startswith("No attacker learned") and "finds" not in none


def test_an_attack_on_a_model_that_gives_its_images_away_is_said_to_learn(tmp_path, monkeypatch):
    "A planted attack: members score 1, others 0. And one that sees nothing."
    run = tmp_path / "run"
    succeeds("train", "digits", "--images", 40, "--tiny", "--device", "cpu", "--out", run)
    for says, gap in (("An attacker learns", 1.0), ("No attacker learned", 0.0)):

        def scores(model, attacks, members, test, gap=gap):
            random = torch.Generator().manual_seed(0)
            noise = [torch.rand(len(side), generator=random) for side in (members, test)]
            return {"planted": (gap + noise[0], noise[1])}

        monkeypatch.setattr(cli, "attack_scores", scores)
        said = succeeds("attack", run, "--unguarded", "--limit", 40)
        assert said.splitlines()[-1].startswith(says)
        quiet = succeeds("attack", run, "--unguarded", "--limit", 40, "--quiet")
        assert quiet.splitlines() == said.splitlines()[-1:]


class FakeGuard:
    "What a sentence about a guard needs to know of it."

    def __init__(self, at, t_max, report):
        self.at, self.t_max, self.report = at, t_max, report
        self.alpha, self.scale = 0.1, 2.0


def test_the_normal_share_of_guarded_steps_is_that_of_unseen_pictures():
    levels = list(range(0, 1000, 100))
    report = {"levels": [0, 100, 200], "level": 200, "false_alarms": [0.4, 0.2, 0.1]}
    said = pushed_in_words(0.123, FakeGuard("x0", 300, report), levels)
    assert "12.3% of all rows" in said and "30% is the most" in said  # three of ten steps
    assert "about 3.0% is normal" in said  # at each of them one in ten
    noisy = pushed_in_words(0.123, FakeGuard("x_t", 300, report), levels)
    assert "about 7.0% is normal" in noisy  # (0.4 + 0.2 + 0.1) of ten steps

    # Where nothing was measured, or nothing is asked, nothing is called normal.
    for guard in (FakeGuard("x_t", 300, None), FakeGuard("x0", 0, report)):
        assert "normal" not in pushed_in_words(0.0, guard, levels)


def test_draws_that_are_taken_back_are_counted(tmp_path, monkeypatch, capsys):
    "Of each image the first draw is refused, and of the last one every draw."
    model = seeded(0, lambda: MLPDenoiser((1, 8, 8), width=8))
    shape, looks = [1, 8, 8], []

    def accept(x):
        looks.append(len(x))
        is_second = len(looks) > 2  # before the first it is shown two images of zeros
        keep = torch.full((len(x),), is_second)
        return keep if len(looks) != 3 else keep & (torch.arange(len(x)) < len(x) - 1)

    monkeypatch.setattr(cli, "last_word", lambda *_: accept)
    protected = runs.ProtectedRun(model, make_schedule(), shape, None, "cpu")
    kept = cli.drawn_images(protected, 4, steps=2, seed=0, tries=2)
    said = capsys.readouterr().out
    assert len(kept.images) == 3 and kept.counts == {"drawn_anew": 3, "left_out": 1, "draws": 8}
    assert "recognised 4 of 4 images in the end: 3 were drawn anew, 1 left out" in said
    assert "(5 of 8 draws were taken back)" in said


def test_a_guard_counts_pictures_and_no_mirrored_ones():
    assert count_of_pictures(40, None) == "40 training images"
    assert count_of_pictures(40, 20) == "20 training images (and of these mirrored)"
    assert name_of_member(7, None) == name_of_member(7, 20) == "number 7"
    assert name_of_member(27, 20) == "number 7, mirrored"


def test_the_guard_of_a_mirrored_run_speaks_of_its_pictures(tmp_path, capsys):
    "Eight pictures, learned mirrored, too: calibration has looked at sixteen images."
    mirrored, plain = tmp_path / "mirrored", tmp_path / "plain"
    succeeds(*TINY, "--mirror", "--out", mirrored)
    succeeds(*TINY, "--out", plain)
    assert cli.mirrored_pictures(mirrored) == 8
    assert cli.mirrored_pictures(plain) is None and cli.mirrored_pictures(None) is None

    report = {"levels": [0, 100], "level": 100, "coverage": [1.0, 0.75], "n_train": 16}
    guard = FakeGuard("x0", 300, report | {"false_alarms": [0.4, 0.2], "n_held_out": 30})
    guard.recognition = {
        "coverage": {"share": 0.9, "n": 160},
        "false_alarms": {"share": 0.02, "n": 30},
        "copies": "members with noise",
        "least_known": {"member": 11, "share": 0.4, "n": 10},
        "members": {"share": 0.875, "n": 16},
    }
    cli.print_coverage(guard, tmp_path / "guard", 8)
    said = capsys.readouterr().out
    assert "Certain of 75.0% of 8 training images (and of these mirrored) and of 20.0%" in said
    assert "Least known: number 3, mirrored, 40% of 10 copies" in said
    assert "87.5% of 8 training images (and of these mirrored) themselves" in said
    assert " 16 " not in said


def test_help_has_every_default():
    "What no default is shown for says in words what happens without it."
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            is_silent = option.param_type_name == "option" and option.default is None
            if is_silent and not option.required and option.name != "help":
                assert "default" in option.help, (name, option.opts)

    # The numbers are those that are used.
    options = {
        option.name: option for option in typer.main.get_command(app).commands["train"].params
    }
    folder = CONFIGS["folder"]
    for name in ("steps", "batch_size", "lr"):
        assert f"{getattr(folder, name):g}" in options[name].help
    assert str(choices.CPU_MINUTES) in options["steps"].help
    assert {name: config.mirror for name, config in CONFIGS.items()} == {
        "digits": False,
        "fashion": False,
        "cifar10": True,
        "celeba64": True,
        "folder": True,
    }


def test_verbose_shows_the_numbers_behind_the_sentences(tmp_path):
    "Each command says more with it than without, and the sentences stay."
    run = tmp_path / "run"
    tiny = ["train", "fashion-small", "--images", "16", "--tiny", "--out", run]
    assert re.search(r"^batch_size +8$", succeeds(*tiny, "--verbose"), re.M)
    printed = succeeds("guard", run, "--steps", "800", "-v")
    report = json.loads((run / "guard.json").read_text())["report"]
    for t, covered, alarms in zip(report["levels"], report["coverage"], report["false_alarms"]):
        assert re.search(rf"^ *{t} +{covered:.1%} +{alarms:.1%}$", printed, re.M)

    # Of sampling, how often images were drawn; the file has it, too.
    sample = ["sample", run, "-n", "6", "--out", tmp_path / "s", "--json", tmp_path / "s.json"]
    printed, record = succeeds(*sample, "-v"), json.loads((tmp_path / "s.json").read_text())
    often = re.findall(r"^Drawn (\d+)×: (\d+) of 6 images$", printed, re.M)
    assert sum(int(images) for _, images in often) == record["asked_for"] == 6
    assert sum(int(number) * int(images) for number, images in often) == record["draws"]
    assert record["served"] + record["left_out"] == 6
    assert f"{record['rows_pushed'] / record['rows_seen']:.1%} of all rows" in printed
    assert "Drawn 1×" not in succeeds(*sample)

    # Of an audit, what has no threshold.
    arrays = tmp_path / "s.npz"
    audit = ["audit", arrays, "fashion-small", "--out", tmp_path / "a", "--max-copy-rate", "0.9"]
    assert "AuthPct" in call(*audit, "-v")[1] and "AuthPct" not in call(*audit)[1]


@pytest.mark.parametrize("words", [["-q", "-v"], ["--verbose", "--quiet"]])
def test_a_command_cannot_be_quiet_and_verbose(words, tmp_path):
    refused("give --quiet or --verbose", *TINY, "--out", tmp_path / "run", *words)


def test_a_record_that_is_somebody_elses_is_not_replaced(tmp_path):
    (tmp_path / "s.json").write_text('{"name": "sample"}')
    succeeds(*TINY, "--out", tmp_path / "run")
    sample = ["sample", tmp_path / "run", "--unguarded", "-n", "2", "--out", tmp_path / "s"]
    refused("has not written it", *sample, "--json", tmp_path / "s.json")
    assert not (tmp_path / "s.npz").exists()
