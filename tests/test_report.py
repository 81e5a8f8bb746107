"The report: one page that asks for nothing, and says what the record says."

import csv
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image

from cpsample.core.images import pixels, to_bytes
from cpsample.judgement import report
from cpsample.judgement.copy_audit import Answer, Verdict, audit
from cpsample.judgement.report import report_html, side_by_side, write_report
from cpsample.practice.datasets import load_fashion

ROOT = Path(__file__).resolve().parent.parent
SETS = ("generated", "training", "held-out")
TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


@pytest.fixture(scope="module")
def audited():
    return audit(torch.cat([TRAIN[:5], REAL[:45]]), TRAIN[:60], REAL[50:150])


def verdict_of(answer, sentence="Copies found: 0 < 1.", **more):
    fields = {"ruling": "It <i>counts</i>.", "test": "ratio", "max_copy_rate": 0.01} | more
    return Verdict(answer, sentence, **fields)


def test_texts_are_escaped(audited):
    evil = "<script>alert(1)</script>"
    verdict = verdict_of(Answer.COPIES, f"{evil}: {evil}", ruling=evil)
    about = {"model": evil, "command": evil, evil: '"quoted"'}
    page = report_html(audited, evil, verdict, about=about, sources=dict.fromkeys(SETS, evil))
    assert "<script" not in page.lower() and "<h1>&lt;script&gt;alert(1)" in page
    assert page.count("&lt;script&gt;") >= 2 + 3 + 3 + 2 * len(SETS)


def test_a_hostile_name_of_a_set_or_a_test_is_escaped(audited):
    text = json.dumps(audited.record).replace('"held-out"', '"<script>"')
    record = json.loads(text.replace("shifted by one pixel", "<img src=x onerror=y>"))
    page = report_html(replace(audited, record=record))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_the_page_says_what_the_record_says(audited):
    page, record = report_html(audited), audited.record
    for numbers in record["tests"].values():
        assert numbers["words_held_out"] in page
    for images in record["sets"].values():
        assert images["fingerprint"] in page
    assert f"{record['auth_pct']:.1%}" in page and f"{record['quality']['fd']:.4g}" in page
    assert audited.verdict().ruling in html.unescape(page)


@pytest.mark.parametrize(
    "answer, color", [(Answer.COPIES, "bad"), (Answer.NO_COPIES, "good"), (Answer.TOO_FEW, "open")]
)
def test_each_answer_stands_at_the_top_with_model_date_and_command(audited, answer, color):
    about = {"model": "my model", "command": "cpsample audit a", "date": "2001-02-03"}
    page = report_html(audited, "T", verdict_of(answer), about=about, sources={"training": "here"})
    top = page[page.index("<body>") : page.index("<h2>")]
    assert f'<div class="verdict {color}">' in top
    assert '<p class="answer">Copies found</p>' in top and "<p>0 &lt; 1.</p>" in top
    for words in (*about.values(), "50 generated images", "60 training images (here)"):
        assert words in top


def test_a_test_that_is_no_evidence_is_not_shown_as_one(audited):
    record = json.loads(json.dumps(audited.record))
    cosine = record["tests"]["cosine"]
    alarms = {"ci_held_out": [0.2, 0.4], "words_held_out": "30 of 100 = 30 % [20, 40]"}
    cosine |= {"words": "COSINE FOUND", "ci_held_out": [0, 0.04]}
    loud = replace(audited, record=record)
    assert "COSINE FOUND" in report_html(loud)
    cosine |= alarms
    page = report_html(loud)
    assert "COSINE FOUND" not in page and "30 of 100 = 30 % [20, 40]" in page
    assert not re.search(r"<figcaption>[^<]*cosine", page)


def test_the_glossary_explains_every_term(audited):
    page = report_html(audited)
    glossary = page[page.index('<dl class="glossary">') :]
    for term in (
        *("ratio test", "neighbourhood test", "cosine test", "false alarm", "interval"),
        *("authpct", "c_t", "kid", "fréchet distance", "near copy"),
    ):
        assert f"<dt>{term}" in glossary.lower()


def test_the_page_suits_the_dark_a_phone_and_paper(audited):
    page = report_html(audited)
    for words in (
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "@media (prefers-color-scheme: dark)",
        "@media print",
        "overflow-x: auto",
    ):
        assert words in page
    images = re.findall("<img[^>]*>", page)
    assert len(images) == 13 and all(re.search('alt="[^"]{10}', image) for image in images)
    assert page.count("<table") == page.count('class="scroll"') == 5


def test_a_template_that_asks_for_what_nobody_gave_is_an_error():
    with pytest.raises(UndefinedError):
        report._templates().from_string("{{ nobody }}").render()


def test_page_and_numbers_are_written_side_by_side(audited, tmp_path):
    verdict = audited.verdict(0.5)
    about = {"model": "m", "command": "cpsample audit", "date": "2001-02-03"}
    written = write_report(audited, tmp_path / "a.b", verdict, sources={"training": "t"}, **about)
    assert [path.name for path in written] == ["a.b.html", "a.b.json", "a.b.csv"]
    page = report_html(audited, verdict=verdict, about=about, sources={"training": "t"})
    assert written[0].read_text() == page
    record = json.loads(written[1].read_text())
    assert record["command"] == "cpsample audit" and record["model"] == "m"
    assert record["passed"] is True and record["verdict"] == verdict.numbers()
    assert record["verdict"]["answer"] == "no copies found"
    assert record["sources"] == {"training": "t"}

    # Whoever says nothing gets the verdict at one per cent, and today's date.
    record = json.loads(write_report(audited, tmp_path / "c")[1].read_text())
    assert record["verdict"] == audited.verdict(0.01).numbers() and re.match(
        "20..-", record["date"]
    )


def test_the_table_has_every_generated_image_the_closest_first(audited, tmp_path):
    table = write_report(audited, tmp_path / "a")[2]
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["rank", "generated", "training", "distance", "ratio", "copy_by"]
    assert list(rows[0]) == names and len(rows) == 50
    assert [int(row["rank"]) for row in rows] == [*range(1, 51)]
    assert sorted(int(row["generated"]) for row in rows) == [*range(50)]

    # The first five generated images are the first five training images.
    for row in rows[:5]:
        assert row["generated"] == row["training"] and float(row["distance"]) < 1e-2
        assert row["copy_by"].split()[0] == "ratio"
    ratios = [float(row["ratio"]) for row in rows]
    assert ratios == sorted(ratios)
    for test, numbers in audited.record["tests"].items():
        assert sum(test in row["copy_by"].split() for row in rows) == numbers["copies"]
    for row in rows[5:]:
        x, known = REAL[:45][int(row["generated"]) - 5], TRAIN[int(row["training"])]
        distance = min((x - known).norm(), (x.flip(-1) - known).norm())
        assert float(row["distance"]) == pytest.approx(distance.item(), rel=1e-3)


def test_thumbnails_come_when_asked_in_the_order_of_the_table(tmp_path):
    generated = torch.cat([REAL[:20], TRAIN[3:4]])
    audited = audit(generated, TRAIN[:60], pairs=15)
    written = write_report(audited, tmp_path / "a", thumbnails=True)
    assert written[3].name == "a.png"
    sheet = np.asarray(Image.open(written[3]))
    assert sheet.shape == (2 * 64, 10 * (2 * 56 + 2 + 8))  # of 28 pixels, twice as large
    for side in (sheet[4:60:2, 4:60:2], sheet[4:60:2, 62:118:2]):
        assert np.array_equal(side, to_bytes(TRAIN[3, 0]).numpy())
    assert (sheet[64:, 5 * 122 :] == 255).all()

    # Those of an earlier audit would be taken for this one's; what is not ours stays.
    write_report(audited, tmp_path / "a")
    assert not (tmp_path / "a.png").exists()
    (tmp_path / "a.png").write_bytes(b"mine")
    write_report(audited, tmp_path / "a")
    with pytest.raises(ValueError, match="a.png is there already"):
        write_report(audited, tmp_path / "a", thumbnails=True)
    assert (tmp_path / "a.png").read_bytes() == b"mine"


@pytest.mark.parametrize("ending", ["html", "json", "csv"])
def test_each_file_of_somebody_else_is_refused_alone(audited, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text("rank,mine\n")
    with pytest.raises(ValueError, match=f"a.{ending} is there already"):
        write_report(audited, tmp_path / "a")
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "rank,mine\n"
    path.unlink()
    for _ in range(2):
        write_report(audited, tmp_path / "a")


@pytest.mark.parametrize("shape, size", [((3, 9, 9), (90, 182, 3)), ((1, 200, 100), (96, 98, 1))])
def test_pairs_of_any_size_become_pictures(shape, size):
    pictures = side_by_side(torch.rand(2, 4, *shape) * 2 - 1)
    assert pictures.shape == (4, *size) and pictures.dtype == np.uint8
    assert side_by_side(torch.zeros(2, 1, 5, 8, 8)).shape[-1] == 1


@pytest.mark.parametrize("broken", ["write_json", "_write_table", "_sheet"])
def test_all_files_are_there_or_none(audited, tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, broken, fail)
        with pytest.raises(OSError):
            write_report(audited, tmp_path / "a", thumbnails=True)
    assert not list(tmp_path.iterdir())
    write_report(audited, tmp_path / "a", thumbnails=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(report, broken, fail)
        with pytest.raises(OSError):
            write_report(audited, tmp_path / "a", audited.verdict(0.3), thumbnails=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_template_and_style_travel_with_the_package(tmp_path):
    "Into what is installed, and into the archive of sources from which others build."
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns("data", "nbs", "tests", ".*", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skipped)
    (tree / "data").mkdir()
    setup = [sys.executable, "setup.py", "-q"]
    for words in (["build_py", "--build-lib", "built"], ["sdist", "--formats", "tar"]):
        done = subprocess.run([*setup, *words], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    (archive,) = (tree / "dist").glob("*.tar")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    names = {f"cpsample/judgement/templates/{name}" for name in ("report.css", "report.html.jinja")}
    assert names <= packed
    assert all((tree / "built" / name).is_file() for name in names)


def test_the_report_opens_without_a_network(audited, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    api = pytest.importorskip("playwright.sync_api")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(audited, tmp_path / "report")
    address = (tmp_path / "report.html").as_uri()
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", source) and "<script" not in source

    messages, requests = [], []
    with api.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chrome.new_context(offline=True).new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        widths = page.eval_on_selector_all(
            "img", "all => all.map(i => i.complete && i.naturalWidth)"
        )
        assert len(widths) == 13 and min(widths) > 100
        assert page.inner_text("h1") == "Does the model copy?"
        assert page.locator("table").count() == 5

        # Nothing sticks out of a phone, and the dark is dark.
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.emulate_media(color_scheme="dark")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background))) < 64
        chrome.close()
    assert not messages
    assert [url for url in requests if not url.startswith("data:")] == [address]
