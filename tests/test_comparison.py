"The comparison: what a trial is, what is kept, what is made again, what is counted."

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.calibration import UncoveredGuardError
from cpsample.core.copying import ideal_denoiser, neighbourhood_test
from cpsample.judgement import comparison, comparison_study
from cpsample.judgement.comparison import (
    BAGS,
    DIGITS,
    FACTOR,
    FASHION,
    METHODS,
    Look,
    Method,
    PushedEarly,
    World,
    behind_look,
    choose,
    comparison_on_file,
    draw_images,
    flops_served,
    grid,
    last_word,
    make_world,
    model_itself,
    new_denoiser,
    trial,
    unguarded,
    word_of_one,
    world_images,
)
from cpsample.judgement.comparison_study import (
    SITUATIONS,
    STUDY,
    beside_yardsticks,
    compare,
    flops_per_image,
    growth_point,
    outside_method,
    outside_study,
    run_seed,
    situation_costs,
    training_flops,
    world_of,
    wrapper_named,
)
from cpsample.practice.datasets import load_fashion
from cpsample.practice.training import weights_fingerprint
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Workspace, run_study

SMALL = replace(DIGITS, drawn=20)
FEW = {
    "first": Method(make=None, settings=[{"x": 1}, {"x": 2}]),
    "second": Method(make=None, settings=[{"x": 3}]),
}


@pytest.fixture
def calls(monkeypatch):
    "Trials that do nothing but note that they were called: (method, x, seed, attacked)."
    calls = []
    names = {id(method): name for name, method in FEW.items()}

    def noted(method, setting, seed, *, attack, check=None):
        calls.append((names[id(method)], setting["x"], seed, attack))
        copies = 5 if setting["x"] == 1 else 0
        record = {"setting": setting, "n": 20, "copies": copies, "fd": 10.0 - setting["x"]}
        return record, torch.full((20, 3), 1.0 if seed else -1.0)

    monkeypatch.setattr(comparison_study, "trial", noted)
    monkeypatch.setattr(comparison_study, "world_of", lambda situation, seed, folder: seed)
    monkeypatch.setitem(SITUATIONS, "digits", SMALL)
    monkeypatch.setitem(METHODS, "digits", FEW)
    return calls


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, progress=False)


def two_seeds(workspace):
    return compare(SMALL, FEW, workspace, seeds=(0, 1))


def without_seconds(part):
    "{method: rows}, less the one number that may differ."
    timeless = {}
    for method, rows in part.items():
        timeless[method] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return timeless


def test_a_setting_is_chosen_on_one_seed_and_reported_on_others(calls, workspace):
    record = two_seeds(workspace)
    assert calls == [
        ("first", 1, 100, False),
        ("first", 2, 100, False),
        ("second", 3, 100, False),
        ("first", 2, 0, True),
        ("second", 3, 0, True),
        ("first", 2, 1, True),
        ("second", 3, 1, True),
    ]
    assert record["chosen"] == {"first": {"x": 2}, "second": {"x": 3}}
    assert [row["seed"] for row in record["reported"]["first"]] == [0, 1]


def test_the_record_has_the_keys_of_the_results_on_file(calls, workspace, tmp_path):
    file = json.loads(data_path("results/comparison.json").read_text())["bags"]
    study = replace(STUDY, parts={"digits": two_seeds})
    record = run_study(study, tmp_path / "out", workspace, command="cpsample reproduce comparison")
    assert set(record["digits"]) - {"threads"} == set(file) - {"threads"}
    assert BAGS.on_file() == {"tries": BAGS.tries} | file["size"]
    assert list(STUDY.parts) == ["digits", "bags", "fashion", "costs", "growth"]
    trials = [*record["digits"]["tuning"].values(), *record["digits"]["reported"].values()]
    seconds = sum(row["seconds"] for rows in trials for row in rows)
    assert record["digits"]["seconds"] == pytest.approx(seconds)


def test_the_methods_and_settings_are_those_of_the_results_on_file():
    file = comparison_on_file()
    for data in ("digits", "bags"):
        methods, tried = METHODS[data], {}
        for method, rows in file[data]["tuning"].items():
            tried[method] = [row["setting"] for row in rows]
        assert {name: method.settings for name, method in methods.items()} == tried, data


def test_the_results_on_file_are_of_all_methods():
    record = comparison_on_file()
    for data in SITUATIONS:
        assert set(record[data]["reported"]) == set(record[data]["chosen"]) == set(METHODS[data])
    chosen = record["bags"]["chosen"]
    assert record["fashion"]["chosen"] == {name: chosen[name] for name in METHODS["fashion"]}


def test_the_page_gets_samples_of_the_first_reported_seed_and_the_members(calls, workspace):
    two_seeds(workspace)
    kept = load_file(workspace.folder / "comparison.safetensors")
    assert set(kept) == {"digits, members", "digits, first", "digits, second"}
    for name in ("digits, first", "digits, second"):
        assert kept[name].shape == (14, 3) and kept[name].unique().tolist() == [0]
    members = world_images(SMALL, 0)["members"]
    as_floats = kept["digits, members"].float() / 127.5 - 1
    torch.testing.assert_close(as_floats, members, atol=0.5 / 127.5 + 1e-6, rtol=0)


def test_a_run_that_was_stopped_goes_on(calls, workspace):
    first = two_seeds(workspace)
    calls.clear()
    (workspace.folder / "digits-1-second-best.json").unlink()
    again = two_seeds(workspace)
    assert calls == [("second", 3, 1, True)]
    for part in ("tuning", "reported"):
        assert without_seconds(first[part]) == without_seconds(again[part])


def test_a_trial_with_another_setting_is_not_taken_for_the_one_chosen(calls, workspace):
    two_seeds(workspace)
    calls.clear()
    path = workspace.folder / "digits-0-first-best.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"setting": {"x": 1}}))
    assert two_seeds(workspace)["reported"]["first"][0]["setting"] == {"x": 2}
    assert calls == [("first", 2, 0, True)]


def test_one_seed_alone_writes_its_trials_and_no_result(calls, workspace):
    run_seed("digits", 1, workspace)
    assert {seed for _, _, seed, _ in calls} == {100, 1}
    record = json.loads((workspace.folder / "digits-1-first-best.json").read_text())
    assert record["setting"] == {"x": 2}
    images = load_file(workspace.folder / "digits-1-first-best.safetensors")["x"]
    assert images.unique().tolist() == [1.0]
    assert not (workspace.folder / "comparison.safetensors").exists()


def test_the_rule_takes_the_nearest_of_those_that_protect():
    trials = [
        {"n": 1000, "copies": copies, "fd": fd}
        for copies, fd in ((11, 1.0), (10, 3.0), (0, 4.0), (2, 2.0))
    ]
    assert choose(trials) is trials[3]
    assert choose(trials[:1] + [{"n": 1000, "copies": 12, "fd": 0.5}]) is trials[0]


def test_a_request_that_gets_nothing_weighs_as_much_as_a_copy():
    copying, withholding = (
        {"n": 1000, "copies": copies, "withheld": withheld, "fd": fd}
        for copies, withheld, fd in ((9, 0, 4.0), (5, 6, 1.0))
    )
    assert choose([copying, withholding]) is copying
    assert choose([copying | {"copies": 12}, withholding])["fd"] == 1.0  # 12 against 11


def test_what_calibration_refuses_is_chosen_only_if_it_refuses_all():
    good = {"n": 1000, "copies": 0, "fd": 1.0, "refused": "it nudges"}
    poor = {"n": 1000, "copies": 500, "fd": 9.0}
    assert choose([good, poor]) is poor
    assert choose([good, poor | {"refused": "too"}]) is good


def test_a_grid_is_all_combinations():
    assert grid() == [{}]
    settings = grid(steps=(1, 2), lr=(0.1, 0.2, 0.3))
    assert len(settings) == 6 and settings[1] == {"steps": 1, "lr": 0.2}


def test_a_method_is_a_function_from_a_world():
    "Shown on one that copies every member: all of it is found by both tests, and attacked."
    small = replace(DIGITS, images=60, drawn=20, sample_steps=5, attacked=200)
    world = World(small, 0, **world_images(small, 0))
    world.model = new_denoiser(small, 0)
    method = Method(
        make=unguarded, settings=grid(), draw=lambda model, world, accept, rows=None: world.members
    )
    record, x = trial(method, {}, replace(world, situation=replace(small, drawn=60)), attack=True)
    assert torch.equal(x, world.members)
    assert record["copies"] == record["ratio"] == record["neighbourhood"] == record["n"] == 60
    assert record["auc_samples"] == 1.0 and record["tpr_samples"] == 1.0
    assert record["near"] == 0 and record["most_copied"]["copies"] == 1


@pytest.fixture
def tiny():
    "A world of digits whose model has learned nothing."
    situation = replace(DIGITS, images=60, drawn=40, sample_steps=5, tries=3, guard_steps=5)
    world = World(situation, 0, **world_images(situation, 0))
    world.model = new_denoiser(situation, 0).eval()
    return world


def brighter(x):
    "A judge who refuses about half of what an untrained model draws."
    return x.flatten(1).mean(1) > 0


def test_rates_are_of_requests_and_what_is_withheld_is_counted(tiny):
    method = Method(unguarded, grid(), accept=lambda world: brighter)
    record, x = trial(method, {}, tiny)
    assert record["n"] == 40 and 0 < record["withheld"] == 40 - len(x) and brighter(x).all()

    # What is served at the first try is what it is without a judge.
    plain = draw_images(tiny.model, tiny)
    first = plain[brighter(plain)]
    assert all((x == image).flatten(1).all(1).any() for image in first)


def test_operations_of_a_served_image_include_what_is_refused(tiny):
    method = Method(unguarded, grid())
    one = flops_served(method, tiny.model, tiny, None)
    served, drawn = 0, []

    def noting(x):
        kept = brighter(x) if x.abs().sum() else torch.ones(len(x), dtype=torch.bool)
        drawn.append(len(x))
        return kept

    flops = flops_served(method, tiny.model, tiny, noting)
    served = len(draw_images(tiny.model, tiny, brighter))
    tries = sum(drawn) - 2  # it is shown two images of zeros before
    assert tries > 40 and flops == pytest.approx(one * tries / served)


def test_a_push_that_stops_early_leaves_the_model_alone_below():
    pushed = PushedEarly(lambda x, t: x, lambda x, t: -x, above=100)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([99, 100, 0, 999])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(-1, 1, 1, 1)
    assert torch.equal(pushed(x, t), signs * x)
    assert torch.equal(pushed(x[:1], t[:1]), x[:1]) and torch.equal(pushed(x[1:2], t[1:2]), -x[1:2])


def test_the_guard_of_predictions_takes_the_classifier_of_its_levels(tiny):
    for learned, preset in ((150, "x0"), (400, "x_t")):
        look = Look(learned=learned, level=120, factor=3.0, noisings=1, below=300, above=50)
        model = behind_look(tiny, judges=[150], allowed=0.3, **vars(look))
        guard = model.guard
        assert (guard.at, guard.level, guard.scale, guard.noisings) == ("x0", 120, 3.0, 1)
        assert (guard.alpha, guard.t_max, guard.made["t_max"], model.above) == (
            0.3,
            300,
            learned,
            50,
        )
        for a, b in zip(guard.classifier.parameters(), tiny.guards[preset].classifier.parameters()):
            assert torch.equal(a, b)
    assert set(tiny.guards) == {"x0", "x_t"}


def test_a_guard_that_calibration_refuses_serves_and_says_so(tiny):
    method = Method(behind_look, [])
    record, x = trial(method, vars(Look()), tiny)
    assert "this guard is certain of" in record["refused"] and len(x) == 40

    # What is wrong with the images is no refusal: it is not passed over.
    tiny.held_out = tiny.members
    with pytest.raises(ValueError, match="are training images, too"):
        trial(method, vars(Look()), tiny)


def test_a_check_that_calibration_refuses_has_no_word(tiny, monkeypatch):
    def refusing(guard, members, held_out, **options):
        raise UncoveredGuardError(0.5, 0.99, "this guard recognises half")

    monkeypatch.setattr(comparison, "calibrate_check", refusing)
    method = Method(model_itself, [], accept=word_of_one)
    record, x = trial(method, {"judge": 150, "allowed": 0.1}, tiny)
    assert record["refused"] == "this guard recognises half" and record["withheld"] == 0
    assert torch.equal(x, draw_images(tiny.model, tiny))


def test_what_one_of_two_judges_recognises_is_refused(tiny, monkeypatch):
    calls = []

    def noting(guard, members, held_out, **options):
        calls.append((guard.made["t_max"], options["allowed"], options["model"], options["levels"]))

    # One judge takes dark images for members, the other one those that are dark on top.
    keeps = {150: brighter, 400: lambda x: x[..., 0, :].flatten(1).mean(1) > 0}
    monkeypatch.setattr(comparison, "calibrate_check", noting)
    monkeypatch.setattr(comparison, "unrecognised_by", lambda guard: keeps[guard.made["t_max"]])
    look, x = vars(Look(learned=400)), torch.randn(50, 1, 8, 8)
    for judges, expected in (([150], keeps[150](x)), ([150, 400], keeps[150](x) & keeps[400](x))):
        assert torch.equal(last_word(tiny, judges=judges, allowed=0.1, **look)(x), expected)
    last_word(tiny, judges=[150], allowed=0.3)

    # Each is made once, and what pushes stays as it was.
    seen = (tiny.model, (0, 50, 100))
    assert calls == [(150, 0.1, *seen), (400, 0.1, *seen), (150, 0.3, *seen)]
    assert tiny.checks[150, 0.1] is not tiny.guards["x0"]


def test_worlds_are_large_enough_for_what_is_asked_of_them():
    for situation in SITUATIONS.values():
        assert 100 <= situation.attacked <= situation.test  # a TPR at 1 % needs a hundred others
        for method in METHODS[situation.data].values():
            assert len(method.settings) in (1, 6)
            for setting in method.settings:
                assert round(setting.get("share", 1) * situation.train_steps) >= 40


def test_the_sets_of_a_world_are_disjoint():
    images = world_images(DIGITS, 0)
    everything = torch.cat(list(images.values())).flatten(1)
    assert len(everything) == 100 + 697 + 500 + 500 == len(everything.unique(dim=0))


def test_clothes_that_are_public_are_no_members_and_choosing_has_clothes_of_its_own():
    sizes = dict(images=20, reference=100, held_out=30, test=30, small=True)
    for situation in (replace(BAGS, **sizes), replace(FASHION, **sizes)):
        chosen_by, reported = (world_images(situation, seed) for seed in (100, 0))
        public = images_of(comparison._clothes(situation)[0])
        for images in (chosen_by, reported):
            private = torch.cat([images[name] for name in ("members", "held_out", "test")])
            assert not images_of(private) & public and images_of(images["reference"]) <= public
        private = [torch.cat([one["members"], one["test"]]) for one in (chosen_by, reported)]
        assert not images_of(private[0]) & images_of(private[1])

        # Of the bags all private clothes are bags; elsewhere they are of many kinds.
        x, kinds = load_fashion(small=True)
        are_bags = images_of(private[1]) <= images_of(x[kinds == 8])
        assert are_bags == (situation.data == "bags")


def images_of(x):
    "The different pictures of a batch, as bytes."
    x = x if x.dtype == torch.uint8 else x.add(1).mul(127.5).round().byte()
    return {image.numpy().tobytes() for image in x}


@pytest.mark.parametrize("situation", [DIGITS, BAGS, FASHION])
def test_the_neighbourhood_test_rings_at_one_real_image_in_five_hundred_at_most(situation):
    "Of all seeds that choose together; of digits, more often at the next larger factor."
    if situation.data != "digits":
        situation = replace(situation, small=True, reference=100, held_out=60, test=60)
    alarms, n = {0: 0, 1: 0}, 0
    for seed in range(100, 106):
        images = world_images(situation, seed)
        real = torch.cat([images["held_out"], images["test"]])
        n += len(real)
        for step in alarms:
            factor = FACTOR[situation.data] + 0.05 * step
            report = neighbourhood_test(real, images["members"], factor=factor)
            alarms[step] += report.copies
    assert alarms[0] <= n / 500
    if situation.data == "digits":
        assert alarms[1] > n / 500


# the last word behind everybody


def test_whoever_has_the_images_at_hand_is_followed_by_exact_neighbours(tiny, monkeypatch):
    "A memory of all members: with exact neighbours behind it, everything is withheld."
    tiny.model = ideal_denoiser(tiny.members, comparison.SCHEDULE)

    def trusting(x):
        "What a guard accepts that recognises nobody."
        return torch.ones(len(x), dtype=torch.bool)

    monkeypatch.setattr(comparison, "word_of_one", lambda world, **check: trusting)
    check = {"judge": 150, "allowed": 0.1}
    for keeps_images in (True, False):
        method = Method(unguarded, grid(), keeps_images=keeps_images)
        record, _ = trial(method, {}, tiny, check=check)
        assert record["copies"] == 40 and record["withheld"] == 0
        behind = record["redrawn"]
        assert behind["n"] == 40 and behind["flops"] > 0
        expected = (0, 40) if keeps_images else (40, 0)
        assert (behind["copies"], behind["withheld"]) == expected


def test_there_is_one_last_word_and_yardsticks_have_none(tiny):
    check = {"judge": 150, "allowed": 0.1}
    for name in ("unguarded", "rejection"):
        record, _ = trial(METHODS["digits"][name], {}, tiny, check=check)
        assert "redrawn" not in record
    taking = {name for name, method in METHODS["bags"].items() if method.takes_last_word}
    without = {"real images", "public model", "unguarded", "rejection", "checked", "accepted"}
    assert taking == set(METHODS["bags"]) - without


def test_a_check_that_calibration_refuses_is_on_record_as_no_last_word(tiny, monkeypatch):
    def refusing(guard, members, held_out, **options):
        raise UncoveredGuardError(0.5, 0.99, "this guard recognises half")

    monkeypatch.setattr(comparison, "calibrate_check", refusing)
    method = Method(unguarded, grid())
    record, _ = trial(method, {}, tiny, check={"judge": 150, "allowed": 0.1})
    assert record["redrawn"] == {"refused": "this guard recognises half"}


# settings that are carried over


def test_what_was_chosen_elsewhere_is_taken_as_it_is(calls, workspace, monkeypatch):
    elsewhere = replace(SMALL, settings_of="bags")
    chosen = {"first": {"x": 7}, "unknown here": {"x": 8}}
    (workspace.folder / "bags-chosen.json").write_text(json.dumps(chosen))
    record = compare(elsewhere, FEW, workspace, seeds=(0, 1))
    assert calls == [("first", 7, 0, True), ("first", 7, 1, True)]
    assert record["tuning"] == {} and record["chosen"] == {"first": {"x": 7}}
    assert list(record["reported"]) == ["first"]


def test_some_methods_alone_leave_what_was_chosen_for_the_others(calls, workspace):
    two_seeds(workspace)
    one = {"second": FEW["second"]}
    record = compare(SMALL, one, workspace, seeds=(0,))
    assert list(record["chosen"]) == ["second"]
    chosen = comparison_study.chosen_settings("digits", workspace)
    assert chosen == {"first": {"x": 2}, "second": {"x": 3}}


def test_the_check_behind_others_is_the_one_chosen_for_its_own_row(workspace, monkeypatch):
    checks = []

    def noted(method, setting, seed, *, attack, check=None):
        checks.append((seed, setting, check))
        return {"setting": setting, "n": 20, "copies": 0, "fd": 1.0}, torch.zeros(20, 3)

    monkeypatch.setattr(comparison_study, "trial", noted)
    monkeypatch.setattr(comparison_study, "world_of", lambda situation, seed, folder: seed)
    methods = {
        "unguarded": Method(None, grid(), is_yardstick=True),
        "first": Method(None, [{"x": 1}]),
        "checked": Method(None, [{"judge": 400}], accept=word_of_one),
    }
    compare(SMALL, methods, workspace, seeds=(0,))
    assert checks[-3:] == [(0, {}, None), (0, {"x": 1}, {"judge": 400}), (0, {"judge": 400}, None)]

    # Another check behind it is another trial.
    checks.clear()
    compare(SMALL, methods, workspace, seeds=(0,), check={"judge": 150})
    assert checks == [(0, {"x": 1}, {"judge": 150})]


# methods from outside

MINE = """
def wrap(model, members, schedule, seed, size):
    assert len(members) == 12 and schedule.T == 1000
    return lambda x_t, t: size * model(x_t, t) + 0 * seed

wrap.settings = [{"size": 0.5}, {"size": 1.0}]
"""


@pytest.fixture
def my_method(tmp_path, monkeypatch):
    "A module of its own for each test, in the working folder."
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_method_from_outside_gets_its_row_and_twice_the_same_one(my_method, monkeypatch):
    sizes = dict(images=12, train_steps=4, guard_steps=4, drawn=8, sample_steps=3, attacked=100)
    monkeypatch.setitem(SITUATIONS, "digits", replace(DIGITS, **sizes))
    study = outside_study(f"{my_method}:wrap")
    assert list(study.parts) == ["digits", "bags"] and study.name.startswith("comparison-mine_")

    # Two runs from nothing: the same numbers, and the same images to the byte.
    records, images = [], []
    for run in ("one", "two"):
        folder = Path(run)
        folder.mkdir()
        world_of.cache_clear()
        record = run_study(
            study, folder / "out", Workspace(folder, progress=False), parts=["digits"]
        )
        records.append(record["digits"])
        images.append(sorted(file.read_bytes() for file in folder.rglob("digits-*.safetensors")))

        # Whoever keeps the comparison in the same folder finds there what it had chosen.
        assert not list(folder.glob("*-chosen.json"))
    assert images[0] == images[1] and len(images[0]) == 5
    for part in ("tuning", "reported"):
        assert without_seconds(records[0][part]) == without_seconds(records[1][part])
    (rows,) = records[0]["reported"].values()
    assert len(rows) == 3 and len(records[0]["tuning"][f"{my_method}.wrap"]) == 2

    words = beside_yardsticks({"digits": records[0]})
    assert f"{my_method}.wrap" in words and "rejection" in words and "bags" not in words


def test_a_tiny_run_of_a_method_stands_beside_nothing(my_method, monkeypatch):
    sizes = dict(images=12, train_steps=4, guard_steps=4, drawn=8, sample_steps=3, attacked=100)
    monkeypatch.setattr(comparison_study, "TINY", replace(DIGITS, **sizes))
    command = ["reproduce", "comparison", "--method", f"{my_method}:wrap", "--out", "out"]
    result = CliRunner().invoke(app, [*command, "--size", "tiny", "--work", "work"])
    assert result.exit_code == 0, result.output
    assert f"{my_method}.wrap" in result.stdout and "SPELL" not in result.stdout
    (file,) = Path("out").glob("*.json")
    assert file.stem.endswith("-tiny")
    result = CliRunner().invoke(app, [*command, "--size", "full"])
    assert result.exit_code == 2 and "--size tiny" in result.stderr


def test_a_setting_that_a_method_does_not_take_is_refused_before_anything_is_made():
    def wrap(model, radius):
        return model

    wrap.settings = [{"radius": 1.0}, {"raduis": 1.0}]
    with pytest.raises(ValueError, match="cannot be called with {'raduis': 1.0}: .*radius"):
        outside_method(wrap)


def test_costs_are_kept_method_by_method_and_made_again_for_another_setting(tmp_path, monkeypatch):
    timed = []

    def measured(world, name, method, setting):
        timed.append(name)
        return {"setting": setting, "sampling": 1.0}

    monkeypatch.setattr(comparison_study, "world_of", lambda *_: None)
    monkeypatch.setattr(comparison_study, "method_costs", measured)
    workspace = Workspace(tmp_path, progress=False)
    settings = {"real images": {}, "unguarded": {}, "SPELL": {"radius": 1.0}}
    first = situation_costs(SMALL, METHODS["digits"], settings, workspace)
    assert timed == ["unguarded", "SPELL"] and list(first["rows"]) == timed
    assert situation_costs(SMALL, METHODS["digits"], settings, workspace) == first
    settings["SPELL"] = {"radius": 2.0}
    again = situation_costs(SMALL, METHODS["digits"], settings, workspace)
    assert timed == ["unguarded", "SPELL", "SPELL"]
    assert again["rows"]["SPELL"]["setting"] == {"radius": 2.0}


def test_what_a_method_changes_in_place_nobody_else_sees():
    "Neither who judges it nor the setting that comes next."
    world = SimpleNamespace(
        model=torch.nn.Linear(2, 2), schedule=None, members=torch.ones(3, 2), seed=0
    )

    def wrap(model, members):
        members.mul_(-1)
        model.weight.data.zero_()
        return model

    assert (outside_method(wrap).make(world).weight == 0).all()
    assert (world.members == 1).all() and (world.model.weight != 0).any()


def test_a_method_that_returns_no_denoiser_is_told_so():
    world = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the method returned None, not a denoiser"):
        outside_method(lambda model: None).make(world)


def test_a_method_may_draw_from_the_state_of_torch_and_comes_out_twice_the_same(tmp_path):
    def noisy(model):
        return lambda x_t, t: model(x_t, t) + 0.1 * torch.randn_like(x_t)

    sizes = dict(images=12, train_steps=4, guard_steps=4, drawn=8, sample_steps=3, attacked=100)
    rows = []
    for run in ("one", "two"):
        torch.rand(1)  # the state is another one
        workspace = Workspace(tmp_path / run, progress=False)
        workspace.folder.mkdir()
        method = {"noisy": outside_method(noisy)}
        record = compare(replace(DIGITS, **sizes), method, workspace, seeds=(0,))
        rows.append(without_seconds(record["reported"]))
    assert rows[0] == rows[1]


def test_a_module_that_cannot_be_imported_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("half_written.py").write_text("def wrap(model:")
    with pytest.raises(ValueError, match="half_written cannot be imported .SyntaxError") as error:
        wrapper_named("half_written:wrap")
    assert "\n" not in str(error.value)


def test_another_version_of_a_method_is_another_study(my_method):
    first = outside_study(f"{my_method}:wrap").name
    assert outside_study(f"{my_method}:wrap").name == first
    Path(f"{my_method}.py").write_text(MINE + "# changed")
    assert outside_study(f"{my_method}:wrap").name != first


def test_another_version_of_what_a_method_imports_is_another_study(my_method):
    helper = f"{my_method}_helper"
    Path(f"{helper}.py").write_text(MINE)
    Path(f"{my_method}.py").write_text(f"from {helper} import wrap")
    first = outside_study(f"{my_method}:wrap").name
    assert outside_study(f"{my_method}:wrap").name == first
    Path(f"{helper}.py").write_text(MINE + "# changed")
    assert outside_study(f"{my_method}:wrap").name != first


def test_a_method_may_be_any_object_that_can_be_called(my_method):
    Path(f"{my_method}.py").write_text(
        "from functools import partial\n"
        "class Same:\n    def __call__(self, model):\n        return model\n"
        "wrap, halved = Same(), partial(lambda model, size: model, size=0.5)\n"
    )
    for name in ("wrap", "halved"):
        assert outside_study(f"{my_method}:{name}").name.startswith("comparison-mine_")


def test_a_method_that_serves_nothing_has_dashes_and_no_crash():
    nothing = {"n": 40, "withheld": 40, "copies": 0, "ratio": 0, "neighbourhood": 0, "near": 0}
    served = nothing | {"withheld": 0, "copies": 4, "fd": 2.0, "precision": 0.5}
    words = beside_yardsticks({"digits": {"reported": {"mine": [served | {"redrawn": nothing}]}}})
    rows = [" ".join(line.split()) for line in words.splitlines()]
    assert rows[-2:] == ["mine 10.00% 0.00% 2.00 0.50", "with the last word 0.00% 0.00% – –"]


@pytest.mark.parametrize("number", [0, 7])
def test_nobody_is_tuned_harder_than_the_others(number):
    def wrap(model):
        return model

    wrap.settings = [{"x": k} for k in range(number)]
    with pytest.raises(ValueError, match=f"may try 1 to 6 settings, like all others, got {number}"):
        outside_method(wrap)


def test_a_function_without_a_file_has_no_version_to_be_known_by():
    with pytest.raises(ValueError, match="give a function of a file of Python"):
        outside_study("math:sqrt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing", "must be MODULE:WRAP"),
        ("no_such_module_at_all:wrap", "there is no module 'no_such_module_at_all' here"),
        ("json:wrap", "json has no function 'wrap'"),
        ("json:__name__", "json has no function '__name__'"),
    ],
)
def test_a_method_that_is_not_there_is_refused_in_one_line(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        wrapper_named(text)
    assert "\n" not in str(error.value)


def test_flops_of_a_network_are_those_counted_by_hand():
    """A multiplication and an addition per weight and row; backward twice as much, less the
    gradient of the input of the first layer, which nobody asks for."""
    network = new_denoiser(DIGITS, 0)
    weights = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    first = sum(layer.weight.numel() for layer in (network.inp, network.embed[0]))
    network.requires_grad_(False)
    assert flops_per_image(network) == 2 * (3 * weights - first)
    assert not any(p.requires_grad for p in network.parameters())


def test_training_is_counted_as_rows_times_flops():
    world = SimpleNamespace(
        situation=DIGITS,
        start=lambda missing=None: new_denoiser(DIGITS, 0, channels=1 if missing is None else 2),
        guards={
            preset: SimpleNamespace(classifier=new_denoiser(DIGITS, 1)) for preset in ("x_t", "x0")
        },
    )
    one = flops_per_image(world.start())
    plain = DIGITS.train_steps * DIGITS.batch * one
    assert training_flops("unguarded", {}, world) == (plain, 0)
    assert training_flops("early stopping", {"share": 0.25}, world) == (plain / 4, 0)
    guard = DIGITS.guard_steps * DIGITS.guard_batch * one
    assert training_flops("guarded_xt", {"strength": 1}, world) == (plain, guard)
    assert training_flops("checked", {"judge": 150}, world) == (plain, guard)
    assert training_flops("accepted", {"learned": 150, "judges": [150]}, world) == (plain, guard)
    assert training_flops("accepted", {"learned": 400, "judges": [150, 400]}, world) == (
        plain,
        2 * guard,
    )

    small = flops_per_image(new_denoiser(DIGITS, 0, small=True))
    denoiser, public = training_flops("DP-SGD", {"steps": 7, "lr": 1}, world)
    assert denoiser == pytest.approx(7 * 0.25 * 100 * 16 * small) and public == 0
    _, public = training_flops("DP-SGD, public start", {"steps": 7, "lr": 1}, world)
    assert public == DIGITS.train_steps * DIGITS.batch * small


def test_growth_is_measured_in_a_process_of_its_own():
    point = growth_point("digits", "rejection", 100)
    assert 0 < point["min"] <= point["seconds"] <= point["max"] and point["peak_gb"] > 0.1
    with pytest.raises(RuntimeError, match="growth of SPELL at 0 images failed"):
        growth_point("digits", "SPELL", 0)


def test_a_public_model_that_was_kept_makes_the_same_world_to_the_bit(tmp_path):
    "In whatever layout its numbers lay when it was trained: that decides how sums are rounded."
    tiny = replace(BAGS, small=True, images=10, reference=100, held_out=40, test=40)
    tiny = replace(tiny, public_steps=4, train_steps=8, batch=16)
    trained, read, without_folder = (make_world(tiny, 0, f) for f in (tmp_path, tmp_path, None))
    assert (tmp_path / "public-bags-None.safetensors").exists()
    prints = {weights_fingerprint(world.model) for world in (trained, read, without_folder)}
    assert len(prints) == 1
    for ours, theirs in zip(trained.model.parameters(), read.model.parameters()):
        assert ours.stride() == theirs.stride()
