"""Training that is asked to stop, runs out of time or is asked for more steps.

What was done is kept, and goes on to the bits that it would have had.
"""

import json
import signal
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cpsample.core.ddpm import MLPDenoiser, seeded
from cpsample.practice import training
from cpsample.practice.training import (
    Keeping,
    TrainingState,
    TrainingStopped,
    Watch,
    fit,
    load_checkpoint,
    noted_signals,
    parts_of,
    save_checkpoint,
    weights_fingerprint,
)
from cpsample.workshop.files import write_tensors


@pytest.fixture(autouse=True)
def listening():
    "Ctrl-C is heard here, also where the tests run in the background of a shell, deaf to it."
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


X = torch.linspace(-1, 1, 24).view(12, 2)
EXTEND = Keeping(extend=True)


def network(width=4):
    return seeded(0, lambda: MLPDenoiser((2,), width, 1))


def mean_square(model, x0, generator=None):
    "A loss that draws from both streams of random numbers."
    noise = torch.randn(x0.shape, generator=generator) + torch.rand(1)
    return (model(x0, torch.zeros(len(x0), dtype=torch.long)) - noise).square().mean()


def asking(step, number=signal.SIGINT, times=1):
    "That loss, which sends a signal to its own process in one step."
    calls = []

    def loss(model, x0, generator=None):
        calls.append(step)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(number)
        return mean_square(model, x0, generator)

    return loss


def go(path, steps=10, loss=mean_square, model=None, seed=3, **options):
    "A small training: (the average, the losses, the network), after the same global seed."
    torch.manual_seed(5)
    model = network() if model is None else model
    options = {"batch_size": 4, "every": 100, "progress": False} | options
    generator = torch.Generator().manual_seed(seed)
    average, losses = fit(model, loss, (X,), steps, path=path, generator=generator, **options)
    return average, losses, model


def same(a, b):
    "Whether two trainings ended in the same bits."
    pairs = [(a[i].state_dict(), b[i].state_dict()) for i in (0, 2)]
    equal = all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)
    return equal and a[1] == b[1]


def identity_in(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"])


# Asked to stop.


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("step", [1, 4, 10])
def test_a_signal_lets_the_step_end_and_writes_it(number, status, step, tmp_path):
    # In a shell in the background some of them are ignored, which is respected.
    original = signal.signal(number, signal.SIG_DFL)
    path, before = tmp_path / "c.safetensors", signal.getsignal(number)
    try:
        with pytest.raises(TrainingStopped) as stopped:
            go(path, loss=asking(step, number))
        assert stopped.value.status == status and signal.getsignal(number) is before
    finally:
        signal.signal(number, original)
    message = str(stopped.value)
    assert f"after step {step} of 10" in message and str(path) in message and "goes on" in message
    assert len(load_file(path)["losses"]) == step
    assert same(go(path), go(None))


def test_the_second_signal_is_obeyed_at_once(tmp_path):
    path, before = tmp_path / "c.safetensors", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        go(path, loss=asking(3, times=2))
    assert not isinstance(stopped.value, TrainingStopped) and not path.exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_without_a_checkpoint_a_signal_does_what_it_always_did():
    with pytest.raises(KeyboardInterrupt) as stopped:
        go(None, loss=asking(3))
    assert not isinstance(stopped.value, TrainingStopped)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(go(tmp_path / "c.safetensors", loss=asking(3))[1]) == 10
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_training_works_and_signals_are_left_alone(tmp_path):
    seen = []

    def work():
        with noted_signals() as noted:
            seen.append((signal.getsignal(signal.SIGINT), noted))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, [])]


def test_a_picture_that_a_kill_prevented_is_drawn_when_the_run_goes_on(tmp_path):
    path, shown = tmp_path / "c.safetensors", []

    def stop(step, average):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        go(path, every=4, after_checkpoint=stop)
    go(path, every=4, after_checkpoint=lambda step, average: shown.append(step))
    assert shown == [4, 8, 10]


# By time.


def test_a_checkpoint_is_written_every_few_minutes(tmp_path, monkeypatch):
    seconds, written = iter(range(0, 10**6, 70)), []
    save = training.save_checkpoint

    def noted(path, state, identity):
        written.append(len(state.losses))
        save(path, state, identity)

    # Every look at the clock takes seventy seconds; one look per step, one per writing.
    monkeypatch.setattr(training, "save_checkpoint", noted)
    keeping = Keeping(minutes=5, clock=lambda: next(seconds))
    timed = go(tmp_path / "c.safetensors", steps=20, keeping=keeping)
    assert written == [5, 10, 15, 20]
    assert same(timed, go(None, steps=20))


# Before anything is written.


def test_what_comes_before_writing_comes_once_and_only_after_a_step_that_worked(tmp_path):
    path, calls = tmp_path / "c.safetensors", []

    def note():
        calls.append(path.exists())

    def broken(model, x0, generator=None):
        return mean_square(model, x0, generator) * float("nan")

    keeping = Keeping(before_writing=note)
    with pytest.raises(FloatingPointError):
        go(path, loss=broken, keeping=keeping, every=1)
    assert not calls and not path.exists()
    go(path, keeping=keeping, every=1)
    assert calls == [False]


def test_what_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    def never(*args, **options):
        raise AssertionError("it trains")

    for identity in ({"start": network()}, {"scale": torch.ones(2)}, {1j: 2}):
        with pytest.raises(ValueError, match="^what this run is cannot be written as JSON"):
            go(tmp_path / "c.safetensors", loss=never, identity=identity)


def test_numbers_of_numpy_and_torch_are_the_numbers_that_they_are(tmp_path):
    path = tmp_path / "c.safetensors"
    numbers = {"lr": np.float32(0.5), "batch_size": np.int64(4), "beta": torch.tensor(0.5)}
    go(path, steps=np.int64(4), identity={"level": torch.tensor(7)}, **numbers)
    plain = {"lr": 0.5, "batch_size": 4, "beta": 0.5}
    assert len(go(path, steps=4, identity={"level": 7}, **plain)[1]) == 4
    with pytest.raises(ValueError, match="lr 0.5 there, 0.25 here"):
        go(path, steps=4, identity={"level": 7}, **plain | {"lr": np.float32(0.25)})


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_what_stands_round_a_network_is_not_in_its_checkpoint(wrap, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(TrainingStopped):
        go(path, loss=asking(4), model=wrap(network()))
    expected = go(None)
    average, losses, _ = go(path)
    assert losses == expected[1] and isinstance(average, MLPDenoiser)
    assert weights_fingerprint(average) == weights_fingerprint(expected[0])


def test_tied_weights_are_saved_and_go_on(tmp_path):
    def tied():
        model = network(width=2)
        model.blocks.append(model.blocks[0])
        return model

    path = tmp_path / "c.safetensors"
    with pytest.raises(TrainingStopped):
        go(path, loss=asking(4), model=tied())
    assert same(go(path, model=tied()), go(None, model=tied()))


# More steps.


def test_a_finished_training_is_continued_with_a_rate_of_its_own(tmp_path, monkeypatch):
    path, rates = tmp_path / "c.safetensors", []
    advance = training._train_parts

    def noted(*args):
        for record in advance(*args):
            rates.append((record.step, record.lr))
            yield record

    monkeypatch.setattr(training, "_train_parts", noted)
    short = go(path, steps=10, warmup=4, lr=1e-2)
    assert parts_of(path) == [10] and "continued" not in identity_in(path)
    longer = go(path, steps=30, warmup=4, lr=1e-2, keeping=EXTEND)
    assert longer[1][:10] == short[1] and len(longer[1]) == 30
    assert parts_of(path) == [10, 30] and identity_in(path)["continued"] == [10]

    # A warm-up and a cosine of the added steps.
    steps, rate = zip(*rates)
    assert steps == (*range(1, 31),)
    assert rate[9] < 1e-3 and rate[10] < 0.3e-2 and max(rate[10:]) > 0.9e-2 and rate[29] < 1e-3
    assert not same(longer, go(None, steps=30, warmup=4, lr=1e-2))


def test_a_training_is_not_made_longer_by_accident_nor_shorter(tmp_path):
    path = tmp_path / "c.safetensors"
    go(path)
    with pytest.raises(ValueError, match="steps 10 there, 20 here"):
        go(path, steps=20)
    go(path, steps=20, keeping=EXTEND)
    for steps in (10, 19):
        with pytest.raises(ValueError, match=f"steps 20 there, {steps} here"):
            go(path, steps=steps, keeping=EXTEND)
    with pytest.raises(ValueError, match="seed 3 there, 4 here"):
        go(path, steps=30, keeping=EXTEND, seed=4)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    plan=st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True).map(sorted),
    stops=st.lists(st.integers(1, 4), max_size=4),
)
def test_interrupted_anywhere_a_training_in_parts_ends_in_the_same_bits(
    plan, stops, tmp_path_factory
):
    "Each part is asked for, and each attempt may be interrupted after some steps."
    folder = tmp_path_factory.mktemp("parts")
    for steps in plan:
        through = go(folder / "through.safetensors", steps=steps, keeping=EXTEND)
    for steps in plan:
        while stops:
            try:
                loss = asking(stops.pop())
                go(folder / "stopped.safetensors", steps=steps, loss=loss, keeping=EXTEND)
                break
            except TrainingStopped:
                continue
        stopped = go(folder / "stopped.safetensors", steps=steps, keeping=EXTEND)
    assert same(stopped, through)
    assert parts_of(folder / "stopped.safetensors") == plan


def test_an_unfinished_part_is_finished_as_planned_before_the_next(tmp_path):
    path, other = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    with pytest.raises(TrainingStopped):
        go(path, loss=asking(4))
    go(other)
    longer = go(path, steps=15, keeping=EXTEND)
    assert same(longer, go(other, steps=15, keeping=EXTEND)) and parts_of(path) == [10, 15]


# Whose checkpoint it is.


def test_identities_are_compared_both_ways(tmp_path):
    path = tmp_path / "c.safetensors"
    go(path, identity={"mirror": True, "guard": {"t_max": 400, "form": "toward"}})
    for identity, says in (
        ({"mirror": True}, "guard {'t_max': 400, 'form': 'toward'} there, None here"),
        ({"guard": {"t_max": 400, "form": "toward"}}, "mirror True there, None here"),
        ({"mirror": True, "guard": {"t_max": 9, "form": "toward"}}, "guard.t_max 400 there, 9"),
        ({"mirror": True, "guard": {"t_max": 400}}, "guard.form toward there, None here"),
        ({"mirror": True, "guard": {"t_max": 400, "form": "toward"}, "x": None}, "x None there"),
    ):
        with pytest.raises(ValueError, match="belongs to another run") as caught:
            go(path, identity=identity)
        assert says in str(caught.value)


def test_a_checkpoint_of_version_0_1_goes_on_without_what_it_did_not_write(tmp_path):
    path = tmp_path / "c.safetensors"
    go(path, identity={"mirror": False, "start": "first weight"})
    now = {"mirror": False, "start": "all weights", "guard": {"t_max": 400}}
    assert len(go(path, identity=now, keeping=Keeping(older={"start": "first weight"}))[1]) == 10
    with pytest.raises(ValueError, match="start first weight there, all weights here"):
        go(path, identity=now, keeping=Keeping(older={"start": "another"}))


# What is done to the tensors of a checkpoint, and to its identity.
SPOILED = {
    **{f"no {name}": ([name], {}) for name in ("generator", "global", "losses")},
    "no weight": (["model.out.weight"], {}),
    "no means": (["optimizer"], {}),
    "another generator": ({"generator": torch.zeros(3)}, {}),
    "losses in a table": ({"losses": torch.zeros(2, 2)}, {}),
    "a list": ([], []),
    "nothing": ([], None),
    "no steps": ([], {"steps": None}),
    "steps as text": ([], {"steps": "10"}),
    "parts backwards": ([], {"continued": [20]}),
    "parts as text": ([], {"continued": "20"}),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_that_is_none_is_one_line(name, tmp_path):
    path = tmp_path / "c.safetensors"
    go(path)
    tensors, identity = load_file(path), identity_in(path)
    change, said = SPOILED[name]
    if isinstance(change, dict):
        tensors |= change
    else:
        tensors = {key: value for key, value in tensors.items() if not key.startswith((*change,))}
    identity = identity | said if isinstance(said, dict) else said
    write_tensors(tensors, path, {"run": json.dumps(identity)})
    with pytest.raises(ValueError, match="c.safetensors") as caught:
        go(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_the_header_of_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"w": torch.ones(1)}, path)
    state = TrainingState.fresh(network())
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(path, state, {})
    with pytest.raises(ValueError, match="cannot be read as a checkpoint: it is a folder"):
        go(tmp_path)


# Something to watch.


class WithDropout(nn.Module):
    "A network whose answer depends on its mode and on torch's global random numbers."

    def __init__(self):
        super().__init__()
        self.config = {}
        self.inner, self.norm = MLPDenoiser((2,), 4, 1), nn.BatchNorm1d(2)

    def forward(self, x, t):
        return nn.functional.dropout(self.norm(self.inner(x, t)), 0.5, self.training)


def test_watching_changes_no_bit_and_its_history_survives(tmp_path):
    path, made = tmp_path / "c.safetensors", partial(seeded, 0, WithDropout)

    def watch():
        return Watch("steps", lambda model: float(model.norm.num_batches_tracked), every=3)

    first, second = watch(), watch()
    with pytest.raises(TrainingStopped):
        go(path, loss=asking(5), model=made(), watch=first)
    assert first.history == [(3, 3.0)]
    watched = go(path, model=made(), watch=second)
    assert second.history == [(3, 3.0), (6, 6.0), (9, 9.0)]
    assert same(watched, go(None, model=made()))

    # A checkpoint without it is as it was in version 0.1.
    state = TrainingState.fresh(network())
    save_checkpoint(path, state, {})
    assert "watched" not in load_file(path)
