"The studies of the core part: resumable, of the shape that is on file, honest about refusals."

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core import guard_study, predicted_study, rejection_study
from cpsample.core.classifier import MLPClassifier, certainty, member_labels
from cpsample.core.demo import DEFAULTS, split_digits
from cpsample.core.densities import round_mixture
from cpsample.core.digit_encoder import digit_features
from cpsample.core.guard_study import RECIPES, GuardSettings, measure_guards
from cpsample.core.predicted_study import (
    QUESTIONS,
    PredictedSettings,
    Variant,
    knows_members,
    least_certain,
    measure_predicted,
    precision_recall,
)
from cpsample.core.rejection import ideal_classifier
from cpsample.core.rejection_study import RejectionSettings, measure_rejection
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import (
    Study,
    Workspace,
    cached_stage,
    check_settings,
    claim_files,
    differences,
    load_or_create,
    run_study,
    settings_of,
)

TINY_REJECTION = RejectionSettings(
    equality_seeds=(0,),
    line_n=300,
    ring_n=60,
    steps=20,
    wrong_steps=10,
    permutations=19,
    table_seeds=(0, 1),
    n=60,
    table_steps=10,
    labels=(1,),
    training=(5,),
)
TINY_GUARDS = GuardSettings(
    choosing=(100,),
    reported=(0, 1),
    recipes=("K=8, ½ on generated", "K=1, members only, all t (paper)"),
    alphas=(0.05,),
    scales=(20.0,),
    n=20,
    sample_steps=5,
    train_steps=20,
    guard_steps=20,
    copies=(0,),
)
TINY_PREDICTED = PredictedSettings(
    seeds=(100, 101),
    questions=("start", "width", "t_max", "gradient", "ceiling"),
    n=20,
    sample_steps=5,
    train_steps=20,
    guard_steps=20,
)
STUDIES = {
    "rejection": partial(measure_rejection, settings=TINY_REJECTION),
    "guards": partial(measure_guards, settings=TINY_GUARDS),
    "predicted": partial(measure_predicted, settings=TINY_PREDICTED),
}


def without_times(record):
    "A record without seconds, which no two runs share."
    record = json.loads(json.dumps(record))
    for part in ("choosing", "reported"):
        for row in record.get(part, {}).get("rows", []):
            row.pop("guard_seconds", None)
    return record


def measured(name, folder):
    return STUDIES[name](Workspace(folder, progress=False))


def counted(monkeypatch, module, function, limit=10**9):
    "Count the calls of a function; the one after `limit` is interrupted."
    work, calls = getattr(module, function), []

    def counting(*args, **options):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(1)
        return work(*args, **options)

    monkeypatch.setattr(module, function, counting)
    return calls


class Whole(dict):
    "The numbers of all studies, not interrupted, and the folders of their stages."

    folders: dict


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in STUDIES}
    studies = Whole({name: measured(name, folder) for name, folder in folders.items()})
    studies.folders = folders
    return studies


@pytest.mark.parametrize(
    "name, module, function, limit, left",
    [
        ("rejection", rejection_study, "cell", 8, 14),  # of 20 cells one line of 6 was finished
        ("guards", guard_study, "fit_guard", 3, 3),  # of 6 guards
        ("predicted", predicted_study, "fit_guard", 3, 3),  # of 6 guards
    ],
)
def test_a_study_that_was_stopped_goes_on_and_ends_with_the_same_numbers(
    name, module, function, limit, left, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        counted(patch, module, function, limit=limit)
        with pytest.raises(KeyboardInterrupt):
            measured(name, tmp_path)

    calls = counted(monkeypatch, module, function)
    assert without_times(measured(name, tmp_path)) == without_times(whole[name])
    assert len(calls) == left

    # What is finished is not measured again.
    measured(name, tmp_path)
    assert len(calls) == left


@pytest.mark.parametrize(
    "study",
    [rejection_study.STUDY, guard_study.STUDY, predicted_study.STUDY],
    ids=lambda s: s.name,
)
def test_the_record_has_the_shape_of_the_file(study, whole, tmp_path):
    record = json.loads(data_path(f"results/{study.name}.json").read_text())
    numbers = whole[study.name]
    run = run_study(Study(study.name, lambda workspace: numbers), tmp_path, Workspace(tmp_path))
    newer = {"seconds", "threads"}  # than some of the files
    assert run.keys() - newer == record.keys() - newer
    assert list(numbers) == [name for name in record if name in numbers]


def shapes(rows):
    "The keys of rows, in their order."
    return {tuple(row) for row in rows}


def test_rows_have_the_keys_of_the_file(whole):
    record = json.loads(data_path("results/rejection.json").read_text())
    for name in ("line", "ring"):
        assert list(whole["rejection"][name]) == list(record[name])
        assert shapes(whole["rejection"][name]["rows"]) == shapes(record[name]["rows"])
    assert shapes(whole["rejection"]["table"]) == shapes(record["table"])

    record = json.loads(data_path("results/guards.json").read_text())
    rows = [row for row in whole["guards"]["reported"]["rows"] if "refused" not in row]
    assert shapes(rows) == shapes(record["reported"]["rows"])
    recipes = dict.fromkeys(row["recipe"] for row in record["reported"]["rows"])
    assert list(recipes) == ["unguarded", "rejection", *RECIPES]


def test_every_answer_to_every_question_is_on_file(whole):
    record = json.loads(data_path("results/predicted.json").read_text())
    answers = [(question, answer) for question in QUESTIONS for answer in QUESTIONS[question]]
    base = [("no guard", "unguarded"), ("no guard", "exact rejection")]
    assert [(row["question"], row["answer"]) for row in record["rows"]] == base + answers
    assert shapes(whole["predicted"]["rows"]) == shapes(record["rows"])
    assert len(json.dumps(record)) < 200_000


def test_a_guard_pays_for_every_level_at_which_it_is_asked(whole):
    rows = {(row["question"], row["answer"]): row for row in whole["predicted"]["rows"]}
    assert rows["no guard", "unguarded"]["flops"] == 1
    start, early = rows["start", "x0"], rows["t_max", "1000"]
    assert (start["asked"], early["asked"]) == (0.4, 1.0)
    assert 1 < rows["width", "64"]["flops"] < rows["width", "128"]["flops"] < start["flops"]
    assert start["flops"] < early["flops"]
    assert "flops" not in rows["ceiling", "level 100"]


@pytest.mark.parametrize("preset", ["x0", "x_t"])
def test_gradients_are_counted_where_a_guard_moves(preset, tmp_path):
    "Certain of everything, it pays for the look, for another pass, and for most of the way back."
    workspace, trained = Workspace(tmp_path, progress=False), {"preset": preset}
    subject = predicted_study._subject(0, workspace, TINY_PREDICTED)
    row = partial(predicted_study._row, subject)
    silent = row(Variant(trained, {"alpha": 1e-9}))
    certain = row(Variant(trained, {"alpha": 0.5 - 1e-7, "moves": 1}))
    assert silent["moved"] == 0 and certain["moved"] > 0.9 * certain["asked"]
    assert 3 > (certain["flops"] - 1) / (silent["flops"] - 1) > 2.4


def test_the_least_certain_label_stands_for_all():
    classifier = MLPClassifier((1, 8, 8), K=5, width=16)
    torch.nn.init.normal_(classifier.out.weight)
    x, t = torch.randn(30, 1, 8, 8), torch.full((30,), 100)
    least = least_certain(classifier)(x, t)
    assert least.shape == (30, 1) and len(set(classifier(x, t).abs().argmin(1).tolist())) > 1
    torch.testing.assert_close(certainty(least), certainty(classifier(x, t)))


@pytest.mark.parametrize("level", [0, 50, 100])
def test_who_knows_the_members_is_the_ideal_classifier(level):
    digits = split_digits(DEFAULTS | {"images": 20}, 0)
    members, reference = digits.members.flatten(1), digits.reference.flatten(1)
    gaps = torch.cdist(reference, reference).fill_diagonal_(torch.inf).amin(1)
    laws = round_mixture(members, 0.05), round_mixture(reference, gaps.median().item() / 8)
    schedule = predicted_study._SCHEDULE
    ideal = ideal_classifier(laws[0], member_labels(digits.members, 3, 7), laws[1], schedule)
    x, t = torch.cat([digits.members[:5], digits.held_out[:10]]), torch.full((15,), level)
    answers = knows_members(digits, 3, 7)(x, t)
    torch.testing.assert_close(answers, ideal(x.flatten(1), t), rtol=1e-3, atol=1e-2)


def test_precision_and_recall_are_those_of_the_library():
    library = pytest.importorskip("torch_fidelity.metric_prc")
    digits = split_digits(DEFAULTS, 0)
    x = (digits.reference[:200] + 0.3 * torch.randn(200, 1, 8, 8)).clamp(-1, 1)
    features = [digit_features(images).double() for images in (x, digits.held_out)]
    expected = library.calculate_precision_recall_part(*features, 3)
    assert precision_recall(x, digits.held_out) == pytest.approx(tuple(map(float, expected)))


def test_the_defaults_are_the_sizes_on_file():
    record = json.loads(data_path("results/rejection.json").read_text())
    default = RejectionSettings()
    assert tuple(record["seeds"]) == default.table_seeds
    assert tuple(record["equality_seeds"]) == default.equality_seeds
    assert (record["line"]["n"], record["ring"]["n"]) == (default.line_n, default.ring_n)
    assert record["table"][0]["n"] == default.n * len(default.table_seeds)
    assert len(record["table"]) == 60

    record = json.loads(data_path("results/guards.json").read_text())
    default = GuardSettings()
    assert record["settings"]["n"] == default.n
    assert record["settings"]["steps"] == default.guard_steps
    for part, seeds in (("choosing", default.choosing), ("reported", default.reported)):
        assert tuple(record[part]["seeds"]) == seeds

    record = json.loads(data_path("results/predicted.json").read_text())
    default = PredictedSettings()
    assert tuple(record["seeds"]) == default.seeds
    assert record["settings"]["n"] == default.n
    assert record["settings"]["steps"] == default.guard_steps


def test_counts_of_seeds_add_up_and_a_refusal_stands_in_the_table(whole):
    rows = whole["guards"]["reported"]["rows"]
    counted_rows = [row for row in rows if "refused" not in row]
    assert all(row["n"] == 40 and len(row["fd_seeds"]) == 2 for row in counted_rows)
    assert all(row["copies"] == sum(row["copies_seeds"]) for row in counted_rows)

    # So little training covers nothing: calibration refuses, and says why for each seed.
    refused = [row for row in rows if "refused" in row]
    assert {row["setting"] for row in refused} == {f"calibrated, {s} s" for s in ("0.5", "1", "2")}
    assert all(len(row["refused"]) == 2 and "is certain of" in row["refused"][0] for row in refused)


def test_the_papers_guard_is_drawn_as_printed_too(whole):
    settings = [
        row["setting"]
        for row in whole["guards"]["reported"]["rows"]
        if row["recipe"] == "K=1, members only, all t (paper)"
    ]
    assert settings[:2] == [[0.05, 20.0], "preset"]


@pytest.mark.parametrize(
    "name, change",
    [
        ("rejection", {"ring_n": 61}),
        ("rejection", {"table_steps": 11}),
        ("guards", {"n": 21}),
        ("guards", {"train_steps": 21}),
        ("predicted", {"n": 21}),
        ("predicted", {"train_steps": 21}),
    ],
)
def test_other_settings_never_get_the_numbers_of_a_stage(name, change, whole):
    "In the folder of a study, the same one with another setting: refused, and nothing is lost."
    tiny, measure = {
        "rejection": (TINY_REJECTION, measure_rejection),
        "guards": (TINY_GUARDS, measure_guards),
        "predicted": (TINY_PREDICTED, measure_predicted),
    }[name]
    folder, (what, here) = whole.folders[name], *change.items()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    told = rf"made with other settings \({what.removeprefix('ring_').removeprefix('table_')} "
    with pytest.raises(ValueError, match=told + rf"\d+ there, {here} here\)") as error:
        measure(Workspace(folder, progress=False), replace(tiny, **change))
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_stages_without_settings_on_record_are_taken_with_a_word(tmp_path, capsys):
    workspace, path = Workspace(tmp_path), tmp_path / "x.safetensors"
    cached_stage(workspace, "old", lambda: {"n": 1})
    load_or_create(path, lambda: {"x": torch.ones(1)})
    assert cached_stage(workspace, "old", pytest.fail, settings={"n": 2})["n"] == 1
    assert load_or_create(path, pytest.fail, settings={"n": 2})["x"].tolist() == [1]
    assert "found, of settings that are not on record" in capsys.readouterr().out


def test_weights_are_claimed_for_their_settings(tmp_path):
    workspace = Workspace(tmp_path)
    for _ in range(2):
        claim_files(workspace, "base", {"steps": 3})
    with pytest.raises(ValueError, match=r"base-settings.json was .* \(steps 3 there, 4 here\)"):
        claim_files(workspace, "base", {"steps": 4})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text("ab"), inside),
    max_leaves=4,
)


@settings(max_examples=100, derandomize=True)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), JSON))
def test_settings_are_the_same_after_a_file_and_one_change_is_told(record):
    there = json.loads(json.dumps(record))
    check_settings("f", there, settings_of(record))
    assert differences(there, record) == ""
    assert differences(there, record | {"changed": 7}) == "changed None there, 7 here"


@pytest.mark.parametrize("content", ["[1]", "{}", "null", "{broken", '{"name": "taxes"}', "\0"])
def test_a_file_of_somebody_else_is_neither_read_nor_replaced(content, tmp_path):
    mine = tmp_path / "count.json"
    mine.write_text(content)
    workspace, calls = Workspace(tmp_path, progress=False), []
    study = Study("count", lambda workspace: calls.append(1) or {"n": 1})
    for work in (
        lambda: run_study(study, tmp_path, workspace),
        lambda: run_study(Study("count", {"n": study.parts}), tmp_path, workspace),
        lambda: cached_stage(workspace, "count", lambda: study.parts(workspace)),
    ):
        with pytest.raises(ValueError, match="count.json is there and is not"):
            work()
    assert mine.read_text() == content and not calls


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_tensors_are_one_line_with_the_name(keep, tmp_path):
    path = tmp_path / "x.safetensors"
    load_or_create(path, lambda: {"x": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged \(.*remove it") as told:
        load_or_create(path, pytest.fail)
    assert "\n" not in str(told.value)
