"The study on Fashion-MNIST: arms, numbers and stages, with the networks that ship."

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from cpsample import cli
from cpsample.core.copying import proportion_ci
from cpsample.core.ddpm import Accepted, generate
from cpsample.core.guard import push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import pixels
from cpsample.core.schedule import make_schedule
from cpsample.practice import fashion_study
from cpsample.practice.fashion_study import (
    ARMS,
    CHECKS,
    CHOOSING,
    FINALISTS,
    LOOKS,
    REPORTED,
    SHIPPED,
    STUDY,
    Arm,
    Drawn,
    arm_numbers,
    choose_look,
    copy_numbers,
    distances_of_thousands,
    draw_arms,
    draw_rows,
    flops_over_unguarded,
    held_out_images,
    looking_ahead,
    measure_part,
    requests_of,
    sampler,
    ship_weights,
    shipped_guard,
    study,
    study_images,
    with_look,
)
from cpsample.practice.runs import load_model
from cpsample.workshop.costs import flops_of, network_cost
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace

FIRST = REPORTED[0]
QUICK = replace(FIRST, small=True, n=7, chunk=5, base=replace(FIRST.base, sample_steps=4))
UNLIKE_LOOKS = ("unguarded", "rejection", *CHECKS)
ON_RECORD = json.loads(data_path("results/fashion.json").read_text())


@pytest.fixture
def workspace(tmp_path):
    "A workspace in which the networks of the first seed have been trained already."
    for name, stage in SHIPPED.items():
        weights = data_path(f"weights/fashion_{name}.safetensors")
        copy = tmp_path / f"{stage}.safetensors"
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(weights, copy)
    save_guard(shipped_guard("x_t"), tmp_path / "seed-0/guarded_xt")
    return Workspace(tmp_path, progress=False)


def test_the_parts_share_no_images_and_are_those_of_the_file_on_record():
    assert list(STUDY.parts) == ["choosing", "seed-0", "seed-1", "seed-2"]
    assert [part.seed for part in REPORTED] == [0, 1, 2]
    for part in REPORTED:
        assert not set(CHOOSING.rows) & set(part.rows) and CHOOSING.seed != part.seed
        assert CHOOSING.test[0] != part.test[0] and part.n == 10_000
    assert (ON_RECORD["choosing"]["seed"], ON_RECORD["seed-0"]["seed"]) == (100, 0)
    tried = ON_RECORD["choosing"]
    assert tried["arms"].keys() | tried["refused"].keys() == {*UNLIKE_LOOKS, *LOOKS}
    assert FIRST.look in LOOKS.values()
    assert tried["arms"]["model asked"]["n"] == tried["n"] >= 10 * tried["arms"]["preset"]["n"]
    assert ON_RECORD["seed-0"]["settings"]["look"] == FIRST.look


def test_a_part_has_the_keys_of_the_file_on_record(workspace, monkeypatch):
    on_record = ON_RECORD["seed-0"]
    monkeypatch.setattr(fashion_study, "flops_per_try", lambda draw, arm: 2.0)
    answer = json.loads(json.dumps(measure_part(QUICK, workspace)))
    assert answer.keys() == on_record.keys() - {"sampling_time", "training"} - {
        "command",
        "commit",
        "hardware",
        "date",
        "seconds",
        "threads",
    }
    assert answer["settings"].keys() == on_record["settings"].keys()
    assert answer["calibration"] == on_record["calibration"]
    assert answer["calibration_xt"] == on_record["calibration_xt"]
    assert answer["recognition"] == on_record["recognition"]
    assert list(answer["arms"]) == [*ARMS, "held_out"]
    for arm, numbers in on_record["arms"].items():
        assert answer["arms"][arm].keys() == numbers.keys(), arm

    # Guards have the settings of the record, whatever the number of samples.
    for arm in ("guarded_xt", "guarded", "paper", "checked", "accepted"):
        assert answer["arms"][arm]["settings"] == on_record["arms"][arm]["settings"], arm
    assert all(numbers["n"] == 7 for numbers in answer["arms"].values())
    assert len(list((workspace.folder / "seed-0" / "accepted").glob("*.safetensors"))) == 2

    # The files of another guard are refused.
    other = replace(QUICK, strength=3)
    with pytest.raises(ValueError, match="other settings .*guard.scale"):
        measure_part(other, workspace)


def noisy(value):
    "A denoiser that predicts a constant: what is drawn is noise, moved."
    return lambda x, t: torch.full_like(x, value)


def test_portions_are_kept_and_go_on_to_more(tmp_path):
    settings = replace(QUICK, n=3, chunk=4)
    workspace, schedule = Workspace(tmp_path, progress=False), make_schedule()
    draw = sampler(settings, schedule, workspace)
    arms = {
        "plain": Arm(noisy(0.1)),
        "judged": Arm(noisy(0.1), lambda x: x.flatten(1)[:, 0] > 0, first="plain"),
    }
    few = draw_arms(settings, arms, draw, workspace=workspace)
    more = draw_arms(replace(settings, n=6), arms, draw, workspace=workspace)
    assert sorted(path.name for path in (tmp_path / "seed-0" / "plain").iterdir()) == [
        "000.safetensors",
        "001.safetensors",
    ]
    for name in arms:
        assert len(few[name].images) == 3 and len(more[name].images) == 6
        assert torch.equal(few[name].images, more[name].images[:3])

    # What is gone is drawn again, and nothing else.
    (tmp_path / "seed-0" / "judged" / "001.safetensors").unlink()
    broken = {"plain": Arm(None), "judged": arms["judged"]}
    again = draw_arms(replace(settings, n=6), broken, draw, workspace=workspace)
    assert torch.equal(again["judged"].images, more["judged"].images)

    # An arm that starts from another is what `generate` draws by itself.
    judge = {"accept": arms["judged"].accept, "tries": settings.tries, "leftover": "return"}
    alone = generate(noisy(0.1), schedule, (1, 28, 28), 6, steps=4, seed=0, **judge)
    torch.testing.assert_close(more["judged"].images, alone)

    # And its cost includes these tries.
    assert torch.equal(more["judged"].effort[2:], more["plain"].effort)
    assert more["judged"].tries.max() > 1 and more["judged"].accepted.all()


def test_arms_that_stand_beside_answer_fewer_requests(tmp_path):
    settings = replace(QUICK, n=6, chunk=2, beside=3)
    workspace, schedule = Workspace(tmp_path, progress=False), make_schedule()
    arms = {"paper": Arm(noisy(0.1)), "guarded": Arm(noisy(0.2))}
    draw = sampler(settings, schedule, workspace)
    drawn = draw_arms(settings, arms, draw, workspace=workspace)
    assert (len(drawn["paper"].images), len(drawn["guarded"].images)) == (3, 6)
    assert len(list((tmp_path / "seed-0" / "paper").iterdir())) == 2

    # Of the looks that were tried, all but the finalists.
    in_full = {name for name in LOOKS if requests_of(settings, name) == 6}
    assert in_full == {*FINALISTS} and FIRST.look in [LOOKS[name] for name in FINALISTS]


def test_exact_rejection_starts_from_the_unguarded_samples_and_serves_no_copy():
    images = study_images(QUICK)
    members, test = pixels(images.members), images.test
    first = Accepted(torch.cat([test[:3], members[:2]]), torch.ones(5, dtype=bool), torch.ones(5))
    asked = []

    def draw(model, accept, rows):
        asked.append(list(rows))
        return Accepted(test[100:102], torch.tensor([True, False]), torch.tensor([2, 20]))

    arm = Arm(None, fashion_study.rejecting(members), first="unguarded")
    drawn = draw_rows(draw, arm, range(10, 15), first=first)
    assert asked == [[13, 14]]
    assert torch.equal(drawn.images, torch.cat([test[:3], test[100:102]]))
    assert drawn.accepted.tolist() == [True, True, True, True, False]
    assert drawn.tries.tolist() == [1, 1, 1, 2, 20]


def test_planted_copies_are_counted_by_every_test():
    images = study_images(QUICK)
    members = pixels(images.members)
    for planted in (0, 10, 40):
        x = torch.cat([members[:planted], images.test[: 100 - planted]])
        numbers = copy_numbers(x, members)
        assert numbers["copies"] == planted and numbers["copy_rate"] == planted / 100
        assert abs(numbers["copies_carlini"] - planted) <= 1
        assert abs(numbers["copies_cosine"] - planted) <= 1
        assert numbers["copies_near"] == 0

    # Moved towards the nearest other member until d₁/d₂ is 0.4.
    distances = torch.cdist(members.flatten(1), members.flatten(1)).fill_diagonal_(torch.inf)
    other = members[distances.argmin(1)]
    share = 0.4 / 1.4
    near = members + share * (other - members)
    numbers = copy_numbers(near[:20], members, requests=40)
    assert numbers["copies"] == 0 and numbers["copies_near"] > 15
    assert numbers["copy_rate_near"] == numbers["copies_near"] / 40


def test_the_most_copied_member_is_named_with_its_bound():
    members = pixels(study_images(QUICK).members)
    x = members[[3, 5, 5, 9]]
    named = copy_numbers(x, members, requests=10)["most_copied"]
    assert (named["member"], named["copies"]) == (5, 2)
    assert 0.5561 < named["below"] == proportion_ci(2, 10, 1 - 0.05 / 100)[1] < 0.8


def test_withheld_images_are_counted_and_not_measured():
    images = study_images(QUICK)
    members = pixels(images.members)
    x = torch.cat([images.test[:30], members[:10]])
    is_served = torch.arange(40) < 35
    effort = torch.tensor([[200.0, 20.0, 3.0], [200.0, 0.0, 4.0]])
    drawn = Drawn(x, is_served, torch.arange(40), effort)
    numbers = arm_numbers(drawn, members, images.test)
    assert (numbers["n"], numbers["copies"], numbers["copy_rate"]) == (40, 5, 5 / 40)
    assert numbers["withheld"] == 5 / 40 and numbers["tries"] == 19.5
    assert numbers["certain"] == 0.05 and numbers["seconds"] == 7
    ratios = flops_over_unguarded(
        {"unguarded": 2.0, "a": 3.0}, {"unguarded": numbers, "a": numbers}
    )
    assert ratios["a"] == 1.5 * ratios["unguarded"] == pytest.approx(1.5 * 19.5 * 40 / 35)


def test_distances_are_those_of_whole_parts():
    test = study_images(QUICK).test
    parts = distances_of_thousands(test[:250], test[1000:], size=100)
    assert len(parts) == 2 and distances_of_thousands(test[:90], test[1000:], size=100) == []
    assert parts[1] == distances_of_thousands(test[100:200], test[1000:], size=100)[0]


def test_another_look_is_calibrated_on_images_that_taught_nothing(workspace):
    images = study_images(QUICK)
    held_out = held_out_images(QUICK, images)
    assert len(held_out) == 725
    trained = looking_ahead(load_guard(workspace.folder / "seed-0" / "guarded_xt"))
    changed = with_look(trained, {"level": 60, "alpha": 0.2, "scale": 5.0}, QUICK, images)
    assert (changed.level, changed.alpha) == (60, 0.2) and changed.scale >= 5
    assert changed.report["level"] == 60 and changed.calibrated
    assert (trained.level, trained.alpha) != (60, 0.2)


def test_the_part_that_chooses_has_an_arm_for_each_look(workspace, monkeypatch):
    looks = {"late": {"t_max": 200, "scale": 5.0}, "noisy": {"level": 390}}
    monkeypatch.setattr(fashion_study, "LOOKS", looks)
    monkeypatch.setattr(fashion_study, "flops_per_try", lambda draw, arm: 2.0)

    def calibrate(guard, *images, **asked):
        if guard.level == 390:
            raise ValueError("it covers too few")

    def with_check(guard, check, *of_part, model):
        asks = {"through": check["through"]}
        return replace(guard, recognition=shipped_guard().recognition | asks)

    monkeypatch.setattr(fashion_study, "calibrate", calibrate)
    monkeypatch.setattr(fashion_study, "with_check", with_check)
    answer = choose_look(replace(QUICK, chunk=8, look=looks["late"]), workspace)
    assert answer["refused"] == {"noisy": "it covers too few"}
    assert list(answer["arms"]) == ["unguarded", "rejection", "late", "own check", "model asked"]
    asked = [answer["arms"][arm]["settings"]["through"] for arm in ("own check", "model asked")]
    assert asked == [None, 50]
    assert answer["arms"]["late"]["settings"]["t_max"] == 200
    assert answer["arms"]["late"].keys() == ON_RECORD["choosing"]["arms"]["preset"].keys()


def test_the_study_has_any_size(tmp_path, monkeypatch):
    sizes = {}

    def note(settings, workspace):
        sizes[settings.name] = settings.n
        return {}

    for name in ("choose_look", "measure_part", "_first_seed"):
        monkeypatch.setattr(fashion_study, name, note)
    small = study(5000)
    for measure in small.parts.values():
        measure(None)
    assert sizes == {"choosing": 3000, "seed-0": 5000, "seed-1": 5000, "seed-2": 5000}

    # On the command line, for those studies that have it.
    monkeypatch.setattr(cli.choices, "studies", {"fashion": study(), "fixed": Study("fixed", {})})
    call = partial(CliRunner().invoke, cli.app)
    out = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert call(["reproduce", "fashion", "seed-1", "--n", "80", *out]).exit_code == 0
    assert sizes["seed-1"] == 80
    for words, message in (
        (["fashion", "--n", "0"], "--n must be at least 1"),
        (["fixed", "--n", "5"], "fixed has one size"),
        (["cifar10", "--n", "5"], "no --n"),
    ):
        refused = call(["reproduce", *words, "--work", str(tmp_path / "none")])
        assert refused.exit_code == 2 and message in " ".join(refused.output.split())
    assert not (tmp_path / "none").exists()


def test_flops_of_a_job_are_those_of_its_looks_and_gradients():
    guard = load_guard(data_path("weights/fashion_guard.safetensors"))
    network = guard.classifier.float()
    x, t = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)

    def look():
        with torch.no_grad():
            network(x, t)

    assert flops_of(look) == 3 * network_cost(network, (1, 28, 28)).flops
    network.requires_grad_(False)
    of_push = network_cost(network, (1, 28, 28), "push").flops
    assert flops_of(lambda: push(network, x[:2], t[:2])) == 2 * of_push


def test_what_ships_says_where_it_comes_from(workspace, tmp_path):
    destination = tmp_path / "weights"
    destination.mkdir()
    ship_weights(workspace.folder, destination)
    for name in SHIPPED:
        path = data_path(f"weights/fashion_{name}.safetensors")
        assert (destination / path.name).read_bytes() == path.read_bytes()
        record = json.loads((destination / f"fashion_{name}.json").read_text())
        on_file = json.loads(path.with_suffix(".json").read_text())
        assert record.keys() - {"threads"} == on_file.keys() - {"threads"}


def test_the_guards_that_ship_are_what_their_names_say():
    guard = load_guard(data_path("weights/fashion_guard.safetensors"))
    assert guard.at == "x0" and guard.calibrated and guard.recognition["drawn"]["copies"] > 20
    guard_xt = shipped_guard("x_t")
    assert guard_xt.at == "x_t" and guard_xt.calibrated and guard_xt.recognition is None
    assert guard_xt.scale == ON_RECORD["seed-0"]["calibration_xt"]["scale"]
    assert shipped_guard().at == "x0" and shipped_guard().report == guard.report
    with pytest.raises(ValueError, match="choose one of"):
        shipped_guard("x_0")
    assert load_model(data_path("weights/fashion_tuned.safetensors")).made["n"] == 100
