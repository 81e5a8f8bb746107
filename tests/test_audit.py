"The audit: planted copies, duplicates, disguises, bad input, a report that opens without a network."

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import mannwhitneyu, norm
from typer.testing import CliRunner

import cpsample.judgement.copy_audit
import cpsample.judgement.report
from cpsample.cli import app
from cpsample.core.copying import copy_test
from cpsample.core.images import pixels, plant_duplicates
from cpsample.judgement.copy_audit import CHANGES, audit, auth_pct, c_t, feature_space, plant
from cpsample.judgement.repeats import duplicate_groups, near_pairs
from cpsample.judgement.report import report_html
from cpsample.practice.datasets import load_fashion
from cpsample.workshop.neighbours import nearest, nearest_groups, typical_distance

TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


def seed(n):
    return torch.Generator().manual_seed(n)


def call(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.booleans()
)
def test_nearest_is_brute_force(k, n, m, neighbours, flips):
    x, refs = (
        torch.randn(n, 1, 3, 4, generator=seed(k)),
        torch.randn(m, 1, 3, 4, generator=seed(k + 1)),
    )
    full = (x[:, None] - refs[None]).flatten(2).norm(dim=2)
    if flips:
        full = torch.minimum(full, (x[:, None] - refs.flip(-1)[None]).flatten(2).norm(dim=2))
    d, rows = nearest(x, refs, neighbours, chunk=7, flips=flips)
    torch.testing.assert_close(d, full.sort(1).values[:, :neighbours], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(full.gather(1, rows), d, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flips", [False, True])
def test_faiss_finds_the_same(flips):
    pytest.importorskip("faiss")
    d, rows = nearest(REAL[:50], TRAIN[:300], 5, flips=flips)
    again, rows_again = nearest(REAL[:50], TRAIN[:300], 5, flips=flips, backend="faiss")
    torch.testing.assert_close(d, again, atol=1e-3, rtol=1e-4)
    assert (rows == rows_again).float().mean() > 0.99


def test_backends_are_checked_before_anything_is_computed(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'annoy'"):
        nearest(REAL[:2], TRAIN[:9], backend="annoy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"cpsample\[audit\]"):
        nearest(REAL[:2], TRAIN[:9], backend="faiss")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 80), st.floats(0.01, 4), st.booleans())
def test_near_pairs_are_brute_force(k, n, radius, flips):
    g = seed(k)
    x = torch.randn(n, 1, 3, 4, generator=g)
    x[n // 2 :] = x[: n - n // 2] + 0.3 * torch.rand(
        n - n // 2, 1, 1, 1, generator=g
    ) * torch.randn(n - n // 2, 1, 3, 4, generator=g)
    x[n // 2 :: 2] = x[n // 2 :: 2].flip(-1)
    full = (x[:, None] - x[None]).flatten(2).norm(dim=2)
    if flips:
        full = torch.minimum(full, (x[:, None] - x.flip(-1)[None]).flatten(2).norm(dim=2))
    if (full - radius).abs().min() < 1e-4:
        return  # a tie that rounding decides
    assert torch.equal(near_pairs(x, radius, flips, chunk=16), (full <= radius).triu(1).nonzero())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 30))
def test_of_a_group_only_the_nearest_member_is_a_neighbour(k, k_groups, n):
    "The nearest distance is exact; so are all of them when only the nearest group has more than one member nearby."
    g = seed(k)
    refs, x = torch.randn(n, 1, 2, 3, generator=g), torch.randn(9, 1, 2, 3, generator=g)
    labels = torch.randint(k_groups, (n,), generator=g)
    groups = torch.stack([(labels == label).nonzero()[0, 0] for label in labels])
    full = (x[:, None] - refs[None]).flatten(2).norm(dim=2)
    d, rows = nearest_groups(x, refs, groups, 2)
    torch.testing.assert_close(d[:, 0], full.min(1).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(full.gather(1, rows), d, atol=1e-4, rtol=1e-4)
    if d.shape[1] > 1:
        assert (groups[rows[:, 0]] != groups[rows[:, 1]]).all()


def test_a_copy_of_any_member_of_a_group_is_found():
    "Also of one that is not the first; with the first alone, it would be as far away as the group is wide."
    training = TRAIN[:200].clone()
    training[100:] = training[:100] + 0.03 * torch.randn(100, 1, 28, 28, generator=seed(0))
    found = audit(training[100:], training)
    assert (
        found.record["duplicates"]["rows"] == 100
        and found.record["tests"]["ratio"]["copies"] == 100
        and found.distances["generated"].max() < 1e-3
    )


def test_groups_follow_chains_and_exact_repeats():
    x = torch.zeros(7, 1, 2, 2)
    x[:, 0, 0, 0] = torch.tensor([0.0, 5, 1, 2, 5, 9, 0])
    x[:, 0, 0, 1] = x[:, 0, 0, 0]
    assert duplicate_groups(x, 1.5).tolist() == [
        0,
        1,
        0,
        0,
        1,
        5,
        0,
    ]  # 0–1–2 is a chain, 5 is there twice, 9 is alone
    assert duplicate_groups(x, 0.1).tolist() == [0, 1, 2, 3, 1, 5, 0]


def test_ten_thousand_repeats_are_one_image():
    x = TRAIN[:3].repeat(3000, 1, 1, 1)
    assert duplicate_groups(x, 0.1).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("change", ["exact", "slightly noised", "mirrored"])
@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.5])
@pytest.mark.parametrize("duplicates", [0, 200])
def test_planted_rates_are_read(change, share, duplicates):
    n, training = 400, TRAIN[:500]
    copies, _ = plant(training, share * n / 500, change, seed(1))
    if duplicates:
        training, rows = plant_duplicates(training, duplicates, seed=0)
        training[500:] += 0.02 * torch.randn(training[500:].shape, generator=seed(2))
    found = audit(torch.cat([copies, REAL[: n - len(copies)]]), training).record
    low, high = found["tests"]["ratio"]["ci"]
    assert (
        low <= share <= high
        and found["tests"]["ratio"]["copies"] >= 0.9 * len(copies)
        and found["duplicates"]["rows"] == duplicates
    )


def test_the_audit_says_what_it_cannot_see():
    found = audit(REAL[:100], TRAIN[:300])
    finds = found.record["finds"]
    assert (
        set(finds) == set(CHANGES)
        and finds["exact"]["ratio"] == finds["mirrored"]["ratio"] == 1
        and finds["shifted by one pixel"]["ratio"] < 0.5
    )
    assert re.search(
        r"misses more than a tenth of copies that are [^.]*shifted by one pixel", report_html(found)
    )
    assert audit(REAL[:100], TRAIN[:300], flips=False).record["finds"]["mirrored"]["ratio"] < 0.2


def test_auth_pct_and_c_t_on_planted_copies():
    g = seed(0)
    train, real = torch.randn(600, 5, generator=g), torch.randn(600, 5, generator=g)
    near = train[:300] + 0.01 * torch.randn(300, 5, generator=g)
    assert (
        auth_pct(near, train) < 0.02
        and auth_pct(real + 20, train) == 1
        and 0.2 < auth_pct(real, train) < 0.8
    )
    assert (
        c_t(near, real, train) < -6
        and abs(c_t(torch.randn(600, 5, generator=g), real, train)) < 2
        and c_t(2 * real, torch.randn(600, 5, generator=g), train) > 4
    )
    assert c_t(real[:5], real, train) is None


def test_c_t_in_one_cell_is_scipys_rank_test():
    g = seed(3)
    train, real, made = (torch.randn(k, 3, generator=g) for k in (80, 60, 50))
    d, d_real = (nearest(f, train, 1)[0][:, 0].numpy() for f in (made, real))
    p = mannwhitneyu(
        d, d_real, method="asymptotic", use_continuity=False, alternative="less"
    ).pvalue
    assert c_t(made, real, train, cells=1) == pytest.approx(norm.ppf(p), abs=1e-4)


def test_verdict_asks_for_the_upper_bound():
    found = audit(torch.cat([TRAIN[:10], REAL[:390]]), TRAIN[:500])
    rate, (low, high) = found.record["tests"]["ratio"]["rate"], found.record["tests"]["ratio"]["ci"]
    assert (
        low < rate < high
        and not found.verdict(rate)[0]
        and found.verdict(high)[0]
        and "FAILED" in found.verdict(rate)[1]
    )


def test_near_duplicates_that_hide_copies_are_found_first():
    twice = torch.cat(
        [TRAIN[:100], TRAIN[:100] + 0.02 * torch.randn(100, 1, 28, 28, generator=seed(0))]
    )
    copies = TRAIN[:100] + 0.05 * torch.randn(100, 1, 28, 28, generator=seed(1))
    assert (
        copy_test(copies, twice).copies == 0
        and audit(copies, twice).record["tests"]["ratio"]["copies"] == 100
    )


def test_spaces_for_other_images(monkeypatch):
    colour = torch.rand(80, 3, 16, 16, generator=seed(0)) * 2 - 1

    def missing(*_):
        raise OSError("no weights")

    monkeypatch.setattr(cpsample.judgement.copy_audit, "features", missing)
    name, embed = feature_space(colour)
    assert name == "pca-64" and embed(colour).shape == (80, 64)
    assert (torch.pdist(embed(colour)) <= torch.pdist(colour.flatten(1)) + 1e-3).all()
    with pytest.raises(ValueError, match="unknown feature space"):
        monkeypatch.undo()
        feature_space(colour, "vgg")[1](colour)


def test_without_the_extra_the_rest_is_there(monkeypatch):
    def missing(*_, **__):
        raise ImportError("torchmetrics is not installed: pip install 'cpsample[metrics]'")

    monkeypatch.setattr(cpsample.judgement.copy_audit, "kid", missing)
    found = audit(REAL[:100], TRAIN[:100])
    assert "fd" in found.record["quality"] and "cpsample[metrics]" in report_html(found)


@pytest.mark.parametrize(
    "generated, training, words",
    [
        (REAL[:5], TRAIN[:1], "at least two different"),
        (REAL[:5], TRAIN[:1].repeat(9, 1, 1, 1), "at least two different"),
        (REAL[:5, :, :20], TRAIN[:9], "of one size"),
        (REAL[:5] / 0, TRAIN[:9], "NaN"),
        (REAL[:0], TRAIN[:9], "non-empty"),
        (REAL[:5].flatten(1), TRAIN[:9], "of one size"),
    ],
)
def test_bad_images_are_refused(generated, training, words):
    with pytest.raises(ValueError, match=words):
        audit(generated, training)


def test_constant_and_few_images_are_audited():
    for x in (torch.zeros(30, 1, 28, 28), REAL[:1], torch.ones(1, 1, 28, 28)):
        found = audit(x, TRAIN[:50], REAL[100:105])
        json.dumps(found.record, allow_nan=False), report_html(found)
        assert found.record["tests"]["ratio"]["n"] == len(x)
    assert (
        audit(
            torch.zeros(30, 1, 28, 28), torch.cat([torch.zeros(1, 1, 28, 28), TRAIN[:50]])
        ).record["tests"]["ratio"]["copies"]
        == 30
    )


def save(folder, images):
    folder.mkdir()
    for i, x in enumerate(images):
        Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{i:04}.png")


def test_the_command_reads_folders_and_arrays_and_sets_its_exit_status(tmp_path):
    save(tmp_path / "train", TRAIN[:60])
    save(tmp_path / "made", torch.cat([TRAIN[:5], REAL[:95]]))
    np.savez(tmp_path / "held.npz", images=REAL[100:200].numpy())
    (tmp_path / "made" / "broken.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="broken.png"):
        done = call(
            "audit",
            tmp_path / "made",
            tmp_path / "train",
            "--out",
            tmp_path / "a",
            "--max-copy-rate",
            "0.01",
        )
    assert done.exit_code == 1 and "FAILED" in done.stdout
    record = json.loads((tmp_path / "a.json").read_text())
    assert (
        record["tests"]["ratio"]["copies"] == 5
        and record["passed"] is False
        and record["sets"]["generated"]["n"] == 100
    )
    np.save(tmp_path / "grey.npy", ((TRAIN[:60, 0] + 1) * 127.5).round().byte().numpy())
    np.save(tmp_path / "made.npy", REAL[:100].permute(0, 2, 3, 1).numpy())
    done = call(
        "audit",
        tmp_path / "made.npy",
        tmp_path / "grey.npy",
        "--held-out",
        tmp_path / "held.npz",
        "--out",
        tmp_path / "b",
        "--max-copy-rate",
        "0.05",
    )
    assert (
        done.exit_code == 0
        and "passed" in done.stdout
        and "held-out images 0 of 100" in done.stdout
    )
    assert json.loads((tmp_path / "b.json").read_text())["tests"]["ratio"]["n_held_out"] == 100


@pytest.mark.parametrize(
    "words, said",
    [
        (["{}/none", "{}/train"], "neither a folder"),
        (["{}/made", "{}/empty"], "no images in"),
        (["{}/made"], "is no run"),
        (["{}/made", "{}/train", "--test", "x"], "unknown test"),
        (["{}/bad.npz", "{}/train"], "cannot be read as an array"),
        (["{}/made", "{}/one"], "at least two different"),
        (["{}/nan.npy", "{}/train"], "NaN"),
        (["{}/small.npy", "{}/train"], "of one size"),
        (["{}/made", "{}/train", "--out", "/dev/null/x"], "File exists"),
        (["{}/made", "{}/train", "--strict"], "broken.png"),
    ],
)
def test_errors_are_one_line(tmp_path, words, said):
    save(tmp_path / "train", TRAIN[:6])
    save(tmp_path / "made", REAL[:6])
    save(tmp_path / "one", TRAIN[:1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    np.save(tmp_path / "nan.npy", np.full((3, 28, 28), np.nan, dtype=np.float32))
    np.save(tmp_path / "small.npy", np.zeros((3, 9, 9), dtype=np.float32))
    if "--strict" in words:
        (tmp_path / "made" / "broken.png").write_bytes(b"not a picture")
    done = call("audit", "--out", tmp_path / "out", *(w.format(tmp_path) for w in words))
    assert (
        done.exit_code == 2
        and said in done.stderr
        and len([line for line in done.stderr.splitlines() if line.startswith("cpsample:")]) == 1
    )
    assert not list(tmp_path.glob("out*"))


def test_a_run_is_audited_and_attacked(tmp_path):
    run = tmp_path / "run"
    assert call("train", "fashion-small", "--images", 16, "--tiny", "--out", run).exit_code == 0
    said = call("attack", run)
    assert said.exit_code == 2 and "has no guard" in said.stderr
    said = call("audit", run, "-n", 12, "--unguarded", "--out", tmp_path / "a")
    assert said.exit_code == 0, said.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert (
        record["sets"]["training"]["n"] == 16
        and record["sets"]["held-out"]["n"] == 2984
        and record["sets"]["generated"]["n"] == 12
    )
    said = call("attack", run, "--unguarded", "--limit", 30, "--json", tmp_path / "attack.json")
    assert said.exit_code == 0 and "best of all" in said.stdout, said.stderr
    record = json.loads((tmp_path / "attack.json").read_text())
    assert (
        record["members"] == 16
        and record["others"] == 30
        and "oracle" not in record["attacks"]
        and 0 <= record["attacks"]["SimA"]["auc"] <= 1
    )


def test_the_report_opens_without_a_network(tmp_path):
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    api = pytest.importorskip("playwright.sync_api")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    cpsample.judgement.report.write_report(
        audit(torch.cat([TRAIN[:5], REAL[:45]]), TRAIN[:60], REAL[50:150]),
        tmp_path / "report",
        (True, "passed"),
    )
    page_text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page_text) and "<script" not in page_text
    with api.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page, said, asked = chrome.new_context(offline=True).new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        sizes = page.eval_on_selector_all(
            "img", "all => all.map(i => i.complete && i.naturalWidth)"
        )
        assert (
            len(sizes) == 2
            and min(sizes) > 300
            and not said
            and [u for u in asked if not u.startswith("data:")]
            == [(tmp_path / "report.html").as_uri()]
        )
        assert (
            page.inner_text("h1") == "Does the model copy?" and page.locator("table").count() == 4
        )
        chrome.close()


def test_typical_distance_is_the_median_to_the_kth_other():
    x = torch.tensor([0.0, 1, 3, 7, 20]).view(5, 1, 1, 1)
    assert (
        typical_distance(x, k=1) == 2.0 and typical_distance(x, k=2) == 3.0
    )  # 1, 1, 2, 4, 13 and 3, 2, 3, 6, 17


def test_images_that_taught_the_guard_are_no_strangers(tmp_path):
    assert (
        call(
            "train", "fashion-small", "--images", 2500, "--tiny", "--out", tmp_path / "run"
        ).exit_code
        == 0
    )
    said = call("attack", tmp_path / "run", "--unguarded")
    assert said.exit_code == 2 and "neither the model nor its guard has seen" in said.stderr
