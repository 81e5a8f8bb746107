"The audit: planted copies, duplicates, disguises, bad input, and the command."

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu, norm
from typer.testing import CliRunner

import cpsample.judgement.copy_audit
from cpsample.cli import app
from cpsample.core.copying import copy_test
from cpsample.core.images import pixels, plant_duplicates
from cpsample.judgement.copy_audit import CHANGES, audit, auth_pct, c_t, feature_space, plant
from cpsample.judgement.report import report_html
from cpsample.practice.datasets import load_fashion
from cpsample.workshop.neighbours import nearest

TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


def seed(n):
    return torch.Generator().manual_seed(n)


def call(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def noised(x, strength, seed_number):
    return x + strength * torch.randn(x.shape, generator=seed(seed_number))


def test_a_copy_of_any_member_of_a_group_is_found():
    """Also of one that is not the first; with the first alone, it would be as far away as the group
    is wide."""
    training = torch.cat([TRAIN[:100], noised(TRAIN[:100], 0.03, 0)])
    audited = audit(training[100:], training)
    assert audited.record["duplicates"]["rows"] == 100
    assert audited.record["tests"]["ratio"]["copies"] == 100
    assert audited.distances["generated"].max() < 1e-3


@pytest.mark.parametrize("change", ["exact", "slightly noised", "mirrored"])
@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.5])
@pytest.mark.parametrize("duplicates", [0, 200])
def test_planted_rates_are_read(change, share, duplicates):
    n, training = 400, TRAIN[:500]
    copies, _ = plant(training, share * n / 500, change, seed(1))
    if duplicates:
        training, _ = plant_duplicates(training, duplicates, seed=0)
        training[500:] = noised(training[500:], 0.02, 2)

    record = audit(torch.cat([copies, REAL[: n - len(copies)]]), training).record
    ratio = record["tests"]["ratio"]
    assert ratio["ci"][0] <= share <= ratio["ci"][1]
    assert ratio["copies"] >= 0.9 * len(copies)
    assert record["duplicates"]["rows"] == duplicates


def test_the_audit_says_what_it_cannot_see():
    audited = audit(REAL[:100], TRAIN[:300])
    finds = audited.record["finds"]
    assert set(finds) == set(CHANGES)
    assert finds["exact"]["ratio"] == finds["mirrored"]["ratio"] == 1
    assert finds["shifted by one pixel"]["ratio"] < 0.5
    words = r"misses more than a tenth of copies that are [^.]*shifted by one pixel"
    assert re.search(words, report_html(audited))
    unmirrored = audit(REAL[:100], TRAIN[:300], flips=False)
    assert unmirrored.record["finds"]["mirrored"]["ratio"] < 0.2


def test_auth_pct_and_c_t_on_planted_copies():
    g = seed(0)
    train, real = torch.randn(600, 5, generator=g), torch.randn(600, 5, generator=g)
    near = train[:300] + 0.01 * torch.randn(300, 5, generator=g)
    assert auth_pct(near, train) < 0.02
    assert auth_pct(real + 20, train) == 1
    assert 0.2 < auth_pct(real, train) < 0.8
    assert c_t(near, real, train) < -6
    assert abs(c_t(torch.randn(600, 5, generator=g), real, train)) < 2
    assert c_t(2 * real, torch.randn(600, 5, generator=g), train) > 4
    assert c_t(real[:5], real, train) is None


def test_c_t_in_one_cell_is_scipys_rank_test():
    g = seed(3)
    train, real, generated = (torch.randn(k, 3, generator=g) for k in (80, 60, 50))
    d, d_real = (nearest(f, train, 1)[0][:, 0].numpy() for f in (generated, real))
    options = {"method": "asymptotic", "use_continuity": False, "alternative": "less"}
    p = mannwhitneyu(d, d_real, **options).pvalue
    assert c_t(generated, real, train, cells=1) == pytest.approx(norm.ppf(p), abs=1e-4)


def test_verdict_asks_for_the_upper_bound():
    audited = audit(torch.cat([TRAIN[:10], REAL[:390]]), TRAIN[:500])
    ratio = audited.record["tests"]["ratio"]
    low, high = ratio["ci"]
    assert low < ratio["rate"] < high
    assert audited.verdict(high).passed
    passed, sentence = audited.verdict(ratio["rate"])
    assert not passed and "FAILED" in sentence


def test_near_duplicates_that_hide_copies_are_found_first():
    twice = torch.cat([TRAIN[:100], noised(TRAIN[:100], 0.02, 0)])
    copies = noised(TRAIN[:100], 0.05, 1)
    assert copy_test(copies, twice).copies == 0
    assert audit(copies, twice).record["tests"]["ratio"]["copies"] == 100


def test_spaces_for_other_images(monkeypatch):
    colour = torch.rand(80, 3, 16, 16, generator=seed(0)) * 2 - 1

    def missing(*_):
        raise OSError("no weights")

    monkeypatch.setattr(cpsample.judgement.copy_audit, "inception", missing)
    name, embed = feature_space(colour)
    assert name == "pca-64" and embed(colour).shape == (80, 64)
    assert (torch.pdist(embed(colour)) <= torch.pdist(colour.flatten(1)) + 1e-3).all()
    with pytest.raises(ValueError, match="unknown feature space"):
        feature_space(colour, "vgg")[1](colour)


def test_without_the_extra_the_rest_is_there(monkeypatch):
    def missing(*_, **__):
        raise ImportError("torchmetrics is not installed: pip install 'cpsample[metrics]'")

    monkeypatch.setattr(cpsample.judgement.copy_audit, "kid", missing)
    audited = audit(REAL[:100], TRAIN[:100])
    assert "fd" in audited.record["quality"] and "cpsample[metrics]" in report_html(audited)


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
        audited = audit(x, TRAIN[:50], REAL[100:105])
        assert json.dumps(audited.record, allow_nan=False) and report_html(audited)
        assert audited.record["tests"]["ratio"]["n"] == len(x)
    black = torch.zeros(30, 1, 28, 28)
    audited = audit(black, torch.cat([black[:1], TRAIN[:50]]))
    assert audited.record["tests"]["ratio"]["copies"] == 30


def save(folder, images):
    folder.mkdir()
    for i, x in enumerate(images):
        Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{i:04}.png")


def test_the_command_reads_folders_and_sets_its_exit_status(tmp_path):
    save(tmp_path / "train", TRAIN[:60])
    save(tmp_path / "made", torch.cat([TRAIN[:5], REAL[:95]]))
    (tmp_path / "made" / "broken.png").write_bytes(b"not a picture")
    options = ["--out", tmp_path / "a", "--max-copy-rate", "0.01"]
    with pytest.warns(UserWarning, match="broken.png"):
        done = call("audit", tmp_path / "made", tmp_path / "train", *options)
    assert done.exit_code == 1 and "FAILED" in done.stdout

    record = json.loads((tmp_path / "a.json").read_text())
    assert record["tests"]["ratio"]["copies"] == 5
    assert record["passed"] is False
    assert record["sets"]["generated"]["n"] == 100


def test_the_command_reads_arrays(tmp_path):
    np.savez(tmp_path / "held.npz", images=REAL[100:200].numpy())
    np.save(tmp_path / "grey.npy", ((TRAIN[:60, 0] + 1) * 127.5).round().byte().numpy())
    np.save(tmp_path / "made.npy", REAL[:100].permute(0, 2, 3, 1).numpy())
    options = ["--held-out", tmp_path / "held.npz", "--out", tmp_path / "b"]
    images = [tmp_path / "made.npy", tmp_path / "grey.npy"]
    done = call("audit", *images, *options, "--max-copy-rate", "0.05")
    assert done.exit_code == 0 and "passed" in done.stdout
    assert "held-out images 0 of 100" in done.stdout
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
        (["{}/made", "{}/train", "--out", "/dev/null/x"], "cannot be a folder"),
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
    assert done.exit_code == 2 and said in done.stderr
    assert sum(line.startswith("cpsample:") for line in done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


def test_a_run_is_audited_and_attacked(tmp_path):
    run = tmp_path / "run"
    assert call("train", "fashion-small", "--images", 16, "--tiny", "--out", run).exit_code == 0
    said = call("attack", run)
    assert said.exit_code == 2 and "has no guard" in said.stderr
    said = call("audit", run, "-n", 12, "--unguarded", "--out", tmp_path / "a")
    assert said.exit_code == 0, said.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    sizes = {name: images["n"] for name, images in record["sets"].items()}
    assert sizes == {"generated": 12, "training": 16, "held-out": 2984}

    said = call("attack", run, "--unguarded", "--limit", 30, "--json", tmp_path / "attack.json")
    assert said.exit_code == 0 and "best of all" in said.stdout, said.stderr
    record = json.loads((tmp_path / "attack.json").read_text())
    assert record["members"] == 16 and record["others"] == 30
    assert "oracle" not in record["attacks"]
    assert 0 <= record["attacks"]["SimA"]["auc"] <= 1


def test_images_that_taught_the_guard_are_no_strangers(tmp_path):
    words = ("train", "fashion-small", "--images", 2500, "--tiny", "--out", tmp_path / "run")
    assert call(*words).exit_code == 0
    said = call("attack", tmp_path / "run", "--unguarded")
    assert said.exit_code == 2 and "neither the model nor its guard has seen" in said.stderr
