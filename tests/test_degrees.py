"An experiment in pieces: however it is cut or killed, its folder holds the same bytes."

import json
import shutil
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import save_file
from test_experiments import LargestReal, crops_in_archives
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.calibration import UncoveredGuardError
from cpsample.core.ddpm import Accepted
from cpsample.core.guard import Guard
from cpsample.core.images import pixels
from cpsample.practice.runs import CONFIGS
from cpsample.practice.unet import UNetClassifier
from cpsample.production import degrees, experiments
from cpsample.production.degrees import (
    ALONE,
    CAPACITY,
    SIZES,
    STAGES,
    DegreesRun,
    Leg,
    arms_of,
    degrees_plan_table,
    degrees_table,
    expected_draws,
    guards_of,
    network_of,
    numbers_of,
    plan_degrees,
    read_base,
    read_pictures,
    run_two_degrees,
    stages_alone,
    stages_of,
    with_base,
    with_pictures,
    write_pack,
)
from cpsample.workshop import choices, ledgers
from cpsample.workshop.files import data_path
from cpsample.workshop.gpu import HalfPrecision
from cpsample.workshop.ledgers import VOLUME, Ledger, open_ledger

ROOT = Path(__file__).parent.parent

# tiny, with fewer arms and one guard
TINY = replace(
    SIZES["tiny"],
    arms=("unguarded", "rejection", "guarded", "held_out"),
    base_legs=1,
    most_legs=2,
    attacked=2,
)


def clock():
    "A clock that moves by a minute whenever it is looked at."
    minutes = iter(range(0, 10**9, 60))
    return lambda: next(minutes)


def go_on(folder, e=TINY, **options):
    options = {"progress": False, "command": "test", "clock": clock()} | options
    return run_two_degrees(e, folder, **options)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module", autouse=True)
def few_attacks():
    "Of the attacks one is enough here, and what is made of the members' guard once is enough."
    real = degrees.published_attacks, degrees._guard_bytes
    guards = {}

    def one_attack(schedule):
        return {"loss, t=100": real[0](schedule)["loss, t=100"]}

    def made_once(run, preset):
        key = str((run.experiment, preset))
        if key not in guards:
            guards[key] = real[1](run, preset)
        return guards[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degrees, "published_attacks", one_attack)
        patch.setattr(degrees, "guard_attacks", lambda *_: {})
        patch.setattr(degrees, "_guard_bytes", made_once)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The folder of a run that was made in one call."
    folder = tmp_path_factory.mktemp("degrees") / "run"
    assert go_on(folder) is None
    return folder


@pytest.fixture
def demo(tmp_path):
    "A run that has begun nothing."
    folder = tmp_path / "demo"
    folder.mkdir()
    return DegreesRun(TINY, open_ledger(folder, {"name": "demo"}), read_pictures(TINY, ()))


def show_results(folder, monkeypatch):
    "Run the cells of chapter 4.4 that show what is on file, with `folder` for data/results."
    imread, shown = plt.imread, []
    monkeypatch.setattr(experiments, "data_path", lambda _: folder)
    monkeypatch.setattr(plt, "imread", lambda path: shown.append(path.name) or imread(path))
    chapter = json.loads((ROOT / "nbs/4_production/04_cifar10.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in chapter["cells"]]
    first = next(k for k, source in enumerate(sources) if source.startswith("tables = "))
    names = vars(experiments) | vars(degrees) | {"plt": plt, "data_path": lambda _: folder}
    for source in (sources[first], sources[first + 2]):
        exec(source, names)
    plt.close("all")
    monkeypatch.undo()
    return shown


def test_the_chapter_shows_what_is_on_file_and_says_how_to_get_the_rest(
    done, tmp_path, monkeypatch, capsys
):
    assert show_results(tmp_path, monkeypatch) == []
    printed = capsys.readouterr().out
    assert all(f"reproduce cifar10 --size {size} " in printed for size in ("full", "h100", "cores"))

    # Of one that was run its table and its picture.
    shutil.copy(done / "results.json", tmp_path / "cifar10-cores.json")
    shutil.copy(done / "figure.png", tmp_path / "cifar10-cores.png")
    assert show_results(tmp_path, monkeypatch) == ["cifar10-cores.png"]
    printed = capsys.readouterr().out
    assert degrees_table(json.loads((done / "results.json").read_text())) in printed
    assert "--size h100 " in printed and "--size cores " not in printed


def test_a_run_that_minutes_cut_holds_the_same_bytes(done, tmp_path):
    stops = []
    while (stage := go_on(tmp_path, minutes=8)) is not None:
        assert not (tmp_path / "results.json").exists()
        stops.append(stage)
    assert len(stops) >= 3 and stops == sorted(stops, key=list(STAGES).index)
    assert contents(tmp_path) == contents(done)


class Killed(BaseException):
    "In the place of a process that ends."


def test_a_run_that_is_killed_at_ten_moments_holds_the_same_bytes(done, tmp_path, monkeypatch):
    "In turn before a record is written, with new volumes, and after it, with the old ones still."
    real_write, real_sweep, kills = ledgers.save_json, Ledger.sweep, []
    writings = {"write": 0, "sweep": 0}

    def sometimes(name, real, remainder, *args):
        writings[name] += 1
        if writings[name] % 5 == remainder:
            kills.append(name)
            raise Killed
        real(*args)

    monkeypatch.setattr(ledgers, "save_json", partial(sometimes, "write", real_write, 2))
    monkeypatch.setattr(Ledger, "sweep", lambda ledger: sometimes("sweep", real_sweep, 4, ledger))
    for _ in range(60):
        try:
            go_on(tmp_path)
            break
        except Killed:
            assert not (tmp_path / "results.json").exists()
    assert len(kills) >= 10 and set(kills) == {"write", "sweep"}
    assert contents(tmp_path) == contents(done)


def test_a_finished_run_makes_nothing_again(done, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("this was finished")

    before = contents(done)
    for name in ("train_denoiser", "fit_run_guard", "draw_accepted", "scores_of", "generate"):
        monkeypatch.setattr(degrees, name, never)
    assert go_on(done, minutes=1e-9) is None
    assert contents(done) == before


def test_a_run_goes_no_further_than_the_stage_that_is_named(done, tmp_path):
    assert go_on(tmp_path, stage="tuned") is None
    record = json.loads((tmp_path / "record.json").read_text())
    names = {"base leg 0", "tuned leg 0", "tuned leg 1", "degrees"}
    assert record["answers"].keys() == names and not (tmp_path / "results.json").exists()
    with pytest.raises(ValueError, match="unknown stage 'arms': choose one of base, tuned"):
        go_on(tmp_path, stage="arms")
    assert (*STAGES, *ALONE) == choices.STAGES


def test_one_degree_is_half_the_stages(tmp_path):
    "In bfloat16, too; what is left out is neither planned nor drawn nor reported."
    e = replace(TINY, degrees=("high",), in_bfloat16=True, arms=("unguarded", "held_out"))
    stages = [name for name in STAGES if not name.startswith("low")]
    assert [stage.stage for stage in plan_degrees(e)] == stages == list(stages_of(e))
    with pytest.raises(ValueError, match="unknown stage 'low_arms'"):
        go_on(tmp_path, e, stage="low_arms")
    assert go_on(tmp_path, e) is None
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["degrees"]) == ["high"] and "low:" not in degrees_table(record)
    assert set(record["degrees"]["high"]["arms"]) == {"unguarded", "held_out"}


def test_in_bfloat16_a_model_answers_nearly_the_same_in_float32(tmp_path):
    e, answers = replace(TINY, in_bfloat16=True), []
    x, t = torch.randn(4, *TINY.config.shape), torch.tensor([0, 100, 500, 999])
    weights = network_of(TINY.config).state_dict()  # its last layer is zero
    weights = {name: w + 0.02 * torch.randn(w.shape) for name, w in weights.items()}
    ledger = open_ledger(tmp_path, {"name": "precision"})
    for experiment in (TINY, e):
        run = DegreesRun(experiment, ledger, read_pictures(TINY, ()))
        answers.append(run.model_with(weights, what="it")(x, t))
    assert answers[1].dtype == torch.float32 and not torch.equal(*answers)
    torch.testing.assert_close(*answers, rtol=0.05, atol=0.02)


def test_the_size_for_two_cores_is_planned_at_their_pace():
    e = replace(SIZES["cores"], weights="given")
    table = degrees_plan_table(e)
    assert "a trial on one CPU core" in table and "low" not in table
    assert 60 < sum(stage.minutes for stage in plan_degrees(e)) < 600


def test_the_plan_for_two_cores_is_within_a_fifth_of_the_run_on_file():
    """Stage by stage: it counts what the run does, for its pace was taken from that very run.

    Of the fine-tuning those legs count that had a core for themselves. The check of that run
    refused three draws of four, since then it asks the model first: its arm is left out.
    """
    record = json.loads((data_path("results") / "cifar10-cores.json").read_text())
    training, high = record["training"], record["degrees"]["high"]
    legs = [training[f"tuned leg {number}"]["seconds"] for number in range(24)]
    arms = tuple(name for name in SIZES["cores"].arms if name != "checked")
    measured = {
        "tuned": 24 * statistics.median(sorted(legs)[:8]),
        "guards": sum(one["seconds"] for name, one in training.items() if "guard" in name),
        "high_arms": sum(one["seconds"] for name, one in high["arms"].items() if name != "checked"),
        "high_attacks": sum(one["seconds"] for one in high["attacks"].values()),
    }
    planned = plan_degrees(replace(SIZES["cores"], weights="given", arms=arms))
    minutes = {stage.stage: stage.minutes for stage in planned}
    for stage, seconds in measured.items():
        assert minutes[stage] == pytest.approx(seconds / 60, rel=0.2), stage


def test_the_folder_of_the_h100_size_is_at_most_eight_files(tmp_path):
    "With everything at its largest: two models, all guards, rows of two arms, the figure's images."
    e = SIZES["h100"]
    ledger = open_ledger(tmp_path, {"name": "sizes"})
    network = network_of(e.config)
    half = {name: torch.zeros(w.shape).half() for name, w in network.state_dict().items()}
    guards = {}
    for preset in guards_of(e):
        classifier = UNetClassifier(e.config.shape, 8, **e.config.guard)
        numbers = sum(w.numel() for w in classifier.state_dict().values()) + 1000
        guards[preset] = torch.zeros(4 * numbers + 20_000, dtype=torch.uint8)
    scores = {name: torch.zeros(e.samples) for name in ("ratio", "neighbourhood", "cosine")}
    nearest = torch.zeros(e.samples, dtype=torch.int64)
    rows = scores | {"nearest": nearest, "features": torch.zeros(e.samples, 64)}
    shown = {f"{i}": torch.zeros(e.shown, *e.config.shape, dtype=torch.uint8) for i in range(6)}

    # While the fine-tuning runs, and while arms are drawn; results and figure come at the end.
    ledger.keep({}, {"low": half, "model": dict(half)})
    assert len([*tmp_path.iterdir()]) <= 8
    arms = {"guards": guards, "rows": rows, "unguarded": dict(rows), "shown": shown}
    ledger.keep({}, {"model": None, "high": dict(half)} | arms)
    assert len([*tmp_path.iterdir()]) <= 8
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= VOLUME
    ledger.keep({}, {"low": None, "rows": None, "unguarded": None})
    assert len([*tmp_path.iterdir()]) + 2 <= 8


def test_the_last_word_of_an_arm_is_calibrated_for_its_model_and_asks_it_first(demo, monkeypatch):
    network = network_of(TINY.config)
    guard = Guard(lambda x, t: x.flatten(1)[:, :1], demo.schedule, alpha=0.3, t_max=100)
    half = {name: w.half() for name, w in network.state_dict().items()}
    demo.ledger.keep({}, {"low": half})
    calibrated, asked = [], []

    def calibrate(guard, members, held_out, *, model, draws):
        calibrated.append((len(members), len(held_out), type(model), draws))

    monkeypatch.setattr(degrees, "why_no_guard", lambda run, preset: "")
    monkeypatch.setattr(degrees, "read_guard", lambda run, preset: guard)
    monkeypatch.setattr(degrees, "calibrate_check_asking_first", calibrate)
    monkeypatch.setattr(degrees, "unrecognised_by", lambda guard, model: asked.append(model))
    arm = arms_of(replace(TINY, arms=("checked",)))["checked"]
    assert degrees._guard_of_arm(demo, "low", arm) == (guard, "")
    assert calibrated == [(TINY.members, TINY.reference // 4, type(network), 0)]

    # Drawn with half of the digits, judged with all.
    arm.build(HalfPrecision(network), guard, demo)
    assert asked == [network]

    def refuse(*_, **__):
        raise UncoveredGuardError(0.5, 0.99, "it recognises too few")

    monkeypatch.setattr(degrees, "calibrate_check_asking_first", refuse)
    assert "too few copies" in degrees._guard_of_arm(demo, "low", arm)[1]


def planted(run, share):
    "Draws that serve members and real images in turn, so that a share of each chunk are copies."

    def draw(model, schedule, shape, n, accept, **options):
        copies = round(share * n)
        images = torch.cat([run.members[[0]].expand(copies, -1, -1, -1), run.real[copies:n]])
        x = pixels(images)
        is_kept = torch.ones(n, dtype=torch.bool) if accept is None else accept(x)
        return Accepted(x, is_kept, torch.ones(n, dtype=torch.int64))

    return draw


@pytest.mark.parametrize("share, kept, requests", [(0.5, 40, 80), (0.75, 30, 120), (1.0, 0, 120)])
def test_planted_copies_are_counted_and_exact_rejection_keeps_none(
    share, kept, requests, tmp_path, monkeypatch
):
    e = replace(TINY, arms=("unguarded", "rejection"))
    monkeypatch.setattr(degrees, "draw_accepted", planted(read_pictures(e, ()), share))
    assert go_on(tmp_path, e, stage="low_arms") is None
    answers = json.loads((tmp_path / "record.json").read_text())["answers"]
    unguarded, rejection = answers["low unguarded"], answers["low rejection"]
    assert (unguarded["n"], unguarded["copies"]) == (40, 40 * share)
    assert unguarded["copies"] == unguarded["tests"]["ratio"]["copies"]
    assert (rejection["n"], rejection["requests"]) == (kept, requests)
    assert rejection.get("copies", 0) == 0 and unguarded["requests"] == 40
    assert "unguarded" not in open_ledger(tmp_path, json_identity(tmp_path)).entries


def json_identity(folder):
    return json.loads((folder / "record.json").read_text())["identity"]


@pytest.mark.parametrize(
    "rates, low, high",
    [
        ([0.0, 0.1, 0.35, 0.8, 0.97], 1, 4),
        ([0.0, 0.15, 0.89, 1.0], 1, 2),
        ([0.95], 0, 0),
        ([0.0, 0.3, 0.2, 0.4, 0.5, 0.6], 2, 5),  # legs run out
    ],
)
def test_the_two_degrees_are_the_legs_that_came_nearest(rates, low, high, demo, monkeypatch):
    e = replace(TINY, most_legs=6)
    run = replace(demo, experiment=e)
    network = network_of(e.config)

    def leg(run, config, images, number, start):
        weights = {
            n: torch.full_like(w, number + 1).half() for n, w in network.state_dict().items()
        }
        return Leg(weights, 0.0)

    judged = iter(rates)
    monkeypatch.setattr(degrees, "train_leg", leg)
    monkeypatch.setattr(degrees, "_copied_share", lambda run, model: next(judged))
    run.ledger.keep({}, {"model": leg(run, None, None, -1, None).weights})
    degrees.fine_tune(run)
    assert next(judged, None) is None  # it ended where it should
    entries = run.ledger.entries
    marks = {name: int(entries[name]["out.bias"][0]) - 1 for name in ("low", "high")}
    assert marks == {"low": low, "high": high} and "model" not in entries
    found = run.ledger.answers["degrees"]
    assert found["low"] == {"leg": low, "copied": rates[low]}
    assert found["high"] == {"leg": high, "copied": rates[high]}


def test_a_leg_goes_on_from_the_weights_of_the_one_before(demo):
    first = degrees.train_leg(demo, TINY.config, demo.pictures.train, 0, None)
    demo.ledger.keep({}, {"model": first.weights})
    still = replace(TINY.tuned, lr=1e-12)
    after = degrees.train_leg(demo, still, demo.pictures.members, 0, "model")
    assert all(torch.equal(w, after.weights[name]) for name, w in first.weights.items())
    moved = degrees.train_leg(demo, TINY.tuned, demo.pictures.members, 0, "model")
    assert any(not torch.equal(w, moved.weights[name]) for name, w in first.weights.items())
    assert all(w.dtype == torch.float16 for w in moved.weights.values())


def test_a_guard_that_covers_too_little_is_not_asked_and_the_others_do_not_wait(tmp_path):
    hasty = replace(TINY, config=replace(TINY.config, guard_steps=1))
    assert go_on(tmp_path, hasty) is None
    record = json.loads((tmp_path / "results.json").read_text())
    low = record["degrees"]["low"]
    assert low["arms"]["guarded"]["n"] == 0 and "is certain of" in low["arms"]["guarded"]["refused"]
    assert low["arms"]["unguarded"]["n"] == 40 and set(low["attacks"]) == {"unguarded"}
    assert "guarded       this guard is certain of" in degrees_table(record)


def write_base(folder, e=TINY, parts=2, **changes):
    "A base in a folder: base.json, and weights in half precision in several files."
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    network = network_of(e.config)
    names = sorted(network.state_dict())
    for part in range(parts):
        half = {name: network.state_dict()[name].half() for name in names[part::parts]}
        save_file(half, folder / f"base-{part}.safetensors")
    about = {"network": "UNet", "config": network.config, "schedule": "linear, T=1000"} | changes
    (folder / "base.json").write_text(json.dumps(about))
    return folder


def test_a_base_that_is_given_takes_the_place_of_the_training(tmp_path):
    base, folder = write_base(tmp_path / "base"), tmp_path / "run"
    assert go_on(folder, base=base, stage="base") is None
    record = json.loads((folder / "record.json").read_text())
    assert list(record["answers"]) == ["base"] and str(tmp_path) not in json.dumps(record)
    identity = record["identity"]
    assert identity["weights"] == with_base(TINY, base).weights
    entries = open_ledger(folder, identity).entries
    given = read_base(base, TINY.config).state_dict()
    assert all(torch.equal(given[name], w) for name, w in entries["model"].items())

    # From here on it need not be there; another one is another run.
    assert go_on(folder, stage="tuned") is None
    other = write_base(tmp_path / "other", parts=1)
    weights = {name: w + 1 for name, w in given.items()}
    save_file(weights, other / "base-0.safetensors")
    with pytest.raises(ValueError, match=r"belongs to another run \(weights"):
        go_on(folder, base=other)
    with pytest.raises(ValueError, match="a base that was given: give it again, --base"):
        go_on(tmp_path / "new", with_base(TINY, base), stage="base")


def test_another_base_than_the_planned_one_is_refused_in_one_line(tmp_path):
    base = write_base(tmp_path / "base")
    for changes, says in (
        ({"config": {"width": 8}}, "is another model than the one that was planned: UNet of"),
        ({"network": "MLPDenoiser"}, "is another model than the one that was planned"),
        ({"schedule": "cosine"}, "is another model than the one that was planned"),
    ):
        write_base(base, **changes)
        with pytest.raises(ValueError, match=says) as told:
            read_base(base, TINY.config)
        assert "\n" not in str(told.value)
    write_base(base)
    (base / "base-1.safetensors").unlink()
    with pytest.raises(ValueError, match="has other weights than its network: Missing") as told:
        read_base(base, TINY.config)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="holds no base: --base takes a folder with base.json"):
        read_base(tmp_path, TINY.config)


def test_a_pack_holds_the_same_pictures_and_a_run_goes_on_with_it(tmp_path, monkeypatch):
    archives = crops_in_archives(tmp_path)
    e = with_pictures(TINY, archives)
    packed = tmp_path / "pack.zip"
    write_pack(e, archives, packed)
    assert with_pictures(TINY, [packed]) == e and e.data.startswith("a.tar, b.zip (sha256")
    ours, theirs = read_pictures(e, archives), read_pictures(e, [packed])
    assert all(torch.equal(a, b) for a, b in zip(ours[:5], theirs[:5])) and theirs.train is None
    assert packed.stat().st_size < sum(path.stat().st_size for path in archives)

    # A run that began with the archives goes on; one without a base has nothing to train it on.
    folder = tmp_path / "run"
    assert go_on(folder, e, archives=archives, stage="base") is None
    assert go_on(folder, e, archives=[packed], stage="tuned") is None
    with pytest.raises(ValueError, match="a pack holds no pictures for a base: give one, --base"):
        go_on(tmp_path / "new", e, archives=[packed])
    base = write_base(tmp_path / "base")
    assert go_on(tmp_path / "based", e, archives=[packed], base=base, stage="tuned") is None

    # Written again, but nothing of somebody else is replaced.
    write_pack(e, archives, packed)
    with pytest.raises(ValueError, match="b.zip is there and is no pack"):
        write_pack(e, archives, archives[0])
    with pytest.raises(ValueError, match="--pack writes a .zip"):
        write_pack(e, archives, tmp_path / "pack.tar")
    seed = replace(TINY, config=replace(TINY.config, seed=1))
    with pytest.raises(ValueError, match="was packed with seed 0, this experiment has 1"):
        with_pictures(seed, [packed])
    with pytest.raises(ValueError, match="of the kind members, tiny needs 6"):
        read_pictures(replace(e, members=6), [packed])


def test_no_picture_is_of_two_kinds(demo):
    kinds = [images.flatten(1) for images in demo.pictures[:5]]
    assert [len(kind) for kind in kinds] == [5, 48, 5, 40, 64]
    assert len(torch.cat(kinds).unique(dim=0)) == sum(map(len, kinds))


def test_a_plan_counts_what_is_drawn(done):
    "And it allocates nothing, and names the stages that there are."
    record = json.loads((done / "results.json").read_text())
    for degree, found in record["degrees"].items():
        for name in ("unguarded", "guarded"):
            drawn = found["arms"][name]["tries"]
            assert expected_draws(TINY, name, found["copied"]) == drawn
    with LargestReal() as largest:
        stages = plan_degrees(SIZES["h100"])
    assert largest.bytes < 10_000 and [stage.stage for stage in stages] == list(STAGES)

    # Six of ten copies, four tries: 1 + 0.6 + 0.36 + 0.216 draws for a request.
    assert expected_draws(SIZES["h100"], "checked", 0.6) == pytest.approx(5000 * 2.176)
    assert expected_draws(SIZES["h100"], "rejection", 0.9) == 2 * 5000  # the bound
    assert degrees_plan_table(SIZES["h100"]).count("\n") == 2 + len(STAGES) + 3 + len(ALONE)


def test_a_plan_takes_as_long_as_the_trial_did():
    "The trial's network, and numbers of steps whose times were measured: 240 s and 80 s."
    e = SIZES["h100"]
    config = replace(CONFIGS["cifar10"], steps=3380, batch_size=240, guard_steps=4000)
    measured = replace(e, config=config, base_legs=1, arms=("unguarded", "guarded"), judged=0)
    minutes = {stage.stage: stage.minutes for stage in plan_degrees(measured)}
    assert minutes["base"] == pytest.approx(4) and minutes["guards"] == pytest.approx(80 / 60)
    one_step = replace(measured, most_legs=1, tune={"steps": 1000, "batch_size": 64})
    tuned = {stage.stage: stage.minutes for stage in plan_degrees(one_step)}["tuned"]
    assert tuned == pytest.approx(38 / 60)


def test_the_results_say_what_they_are(done):
    record = json.loads((done / "results.json").read_text())
    assert {"name", "command", "commit", "hardware", "date", "seeds", "data"} <= record.keys()
    assert record["space"] == "pca-64" and "fid" not in json.dumps(record).lower()
    assert set(record["degrees"]) == {"low", "high"}
    for found in record["degrees"].values():
        assert set(found["arms"]) == set(TINY.arms)
        assert set(found["attacks"]) == {"unguarded", "guarded"}
        for arm in found["arms"].values():
            assert arm["fd_n"] == TINY.fewer and set(arm["tests"]) == {
                "ratio",
                "neighbourhood",
                "cosine",
            }
    table = degrees_table(record)
    assert all(table.count(f"\n{name} ") == 2 for name in TINY.arms)
    assert sorted(path.name.split("-")[0] for path in done.iterdir()) == [
        "figure.png",
        "record.json",
        "results.json",
        "small",
    ]


@pytest.mark.parametrize("name", ["results.json", "experiment.json"])
def test_folders_of_others_are_left_alone(tmp_path, name):
    "Results without a run, and runs of the experiment that had this size before."
    (tmp_path / name).write_text("his")
    with pytest.raises(ValueError, match=f"holds {name} and no run: choose another folder"):
        go_on(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "his"


def test_all_arms_of_the_tiny_size_have_samplers_that_draw(demo):
    "Each arm is built from the same model and draws something finite."
    e = SIZES["tiny"]
    run = replace(demo, experiment=e)
    assert {name.split("_1")[0] for name in arms_of(e)} | {"held_out"} == set(degrees.ARMS)
    assert [arm.preset for arm in arms_of(e).values() if arm.is_judged] == ["x0", "x0"]
    model = network_of(e.config).eval()
    for name, arm in arms_of(e).items():
        if arm.preset is None:
            drawn = degrees._draw(run, arm.build(model, None, run), 0)
            assert len(drawn.images) == e.chunk and drawn.tries == e.chunk, name


def test_distances_are_of_equally_many_images(demo):
    rows = degrees.looked_at(demo, demo.pictures.held_out)
    fewer = {name: values[: TINY.fewer] for name, values in rows.items()}
    of_all, of_fewer = numbers_of(demo, rows), numbers_of(demo, fewer)
    assert of_all["n"] == 40 and of_fewer["n"] == 20
    assert [of_all[k] for k in ("fd", "fd_n", "precision")] == [
        of_fewer[k] for k in ("fd", "fd_n", "precision")
    ]


def call(*words):
    return CliRunner().invoke(app, ["reproduce", *map(str, words)])


def test_the_command_is_stopped_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(degrees.SIZES, "tiny", TINY)
    archives = crops_in_archives(tmp_path)
    data = [word for archive in archives for word in ("--data", archive)]
    base, packed, folder = write_base(tmp_path / "base"), tmp_path / "pack.zip", tmp_path / "run"
    words = ["cifar10", "--size", "tiny", *data, "--base", base, "--out", folder]

    planned = call(*words, "--plan")
    assert planned.exit_code == 0 and "base model: given" in planned.output
    assert "5 members of a.tar, b.zip (sha256" in planned.output and not folder.exists()
    assert "pack.zip" in call("cifar10", "--size", "tiny", *data, "--pack", packed).output
    assert packed.exists() and not folder.exists()

    monkeypatch.setattr(sys, "argv", ["cpsample", "reproduce", *map(str, words)])
    stopped = call(*words, "--minutes", 1e-9)
    assert stopped.exit_code == 0
    assert stopped.stdout.splitlines()[-1] == (
        "The minutes are over in the stage tuned: the same command goes on."
    )
    staged = call(*words, "--stage", "tuned")
    assert staged.stdout.endswith("Finished up to the stage tuned: without --stage it goes on.\n")
    command = json.loads((folder / "record.json").read_text())["made"]["command"]
    assert "--data b.zip --data a.tar --base base" in command


def test_options_of_pieces_are_for_experiments_in_pieces():
    for words, says in (
        (("cifar10", "--minutes", 8), "are for cifar10 with --size h100, cores or tiny"),
        (("celeba64", "--size", "tiny", "--stage", "base"), "are for cifar10 with --size h100"),
        (("celeba64", "--size", "h100"), "unknown size of celeba64 'h100': choose one of full"),
        (("cifar10", "--size", "tiny", "--stage", "arms"), "unknown stage 'arms'"),
        (("cifar10", "--size", "tiny", "--minutes", 0), "minutes must be above 0, got 0"),
    ):
        result = call(*words)
        lines = result.stderr.splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and says in lines[0], result.output


def test_archives_that_are_not_enough_are_refused(tmp_path):
    archives = crops_in_archives(tmp_path)
    with pytest.raises(ValueError, match="needs 80 pictures to train on and 2 in a folder"):
        with_pictures(TINY, archives[1:])


def test_what_is_known_by_its_pictures_is_called_a_jpeg_copy(tmp_path, monkeypatch):
    archives = crops_in_archives(tmp_path)
    digest = with_pictures(TINY, archives).data.split()[-1].rstrip(")")
    monkeypatch.setitem(experiments._KNOWN_COPIES, digest, "CIFAR-10, JPEG copy")
    e = with_pictures(TINY, archives)
    assert e.data == "CIFAR-10, JPEG copy"
    write_pack(e, archives, tmp_path / "pack.zip")
    assert with_pictures(TINY, [tmp_path / "pack.zip"]).data == "CIFAR-10, JPEG copy"
    assert "5 members of CIFAR-10, JPEG copy" in degrees_plan_table(e)


def capacity_of(folder):
    "What is reported of a stage `capacity`, without what a clock said."
    record = json.loads((folder / "capacity.json").read_text())
    for cell in record["cells"]:
        del cell["seconds"]
    return record


def test_how_much_a_guard_holds_is_a_stage_by_itself(tmp_path):
    "It needs no base, and cut by minutes it gives the same."
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert go_on(whole, stage="capacity") is None
    answers = json.loads((whole / "record.json").read_text())["answers"]
    assert not (whole / "results.json").exists() and all("capacity" in name for name in answers)
    cuts = 0
    while go_on(cut, stage="capacity", minutes=3) == "capacity":
        cuts += 1
    assert cuts >= 2 and capacity_of(cut) == capacity_of(whole)
    record = capacity_of(whole)
    assert len(record["cells"]) == 8 and record["data"] == "crops-32"
    assert record["settings"] == json.loads(json.dumps(asdict(CAPACITY["tiny"])))

    # A guard that trains longer than a dozen steps is another measurement.
    other = {"tiny": replace(CAPACITY["tiny"], batch_size=8)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="batch_size"):
        patch.setattr(degrees, "CAPACITY", other)
        go_on(whole, stage="capacity")


def test_a_pack_is_too_few_pictures_for_capacity_and_some_sizes_have_no_grid(tmp_path):
    write_pack(TINY, (), tmp_path / "pack.zip")
    packed = with_pictures(TINY, [tmp_path / "pack.zip"])
    with pytest.raises(ValueError, match="a pack holds too few pictures"):
        go_on(tmp_path / "run", packed, stage="capacity", archives=[tmp_path / "pack.zip"])
    assert not stages_alone(SIZES["cores"])
    with pytest.raises(ValueError, match="unknown stage 'capacity'"):
        run_two_degrees(SIZES["cores"], tmp_path / "cores", stage="capacity")
    assert "16 guards, as many pictures" in degrees_plan_table(SIZES["h100"])
