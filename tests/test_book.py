"The book: solutions pass their checks, links lead somewhere, the owner stands once."

import ast
import importlib
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402

BOOK = book.notebooks()
LESSONS = [p for p in BOOK if p.stem != "index" and "5_workshop" not in p.parts]


def below(path):
    "A notebook's path below nbs/: what its identity is in tests, links and messages."
    return path.relative_to(ROOT / "nbs").as_posix()


def imports_of(code):
    "The import statements of cells, as source."
    trees = [ast.parse(re.sub(r"^\s*%.*$", "pass", c, flags=re.M)) for c in code if "%pip" not in c]
    statements = [
        s for tree in trees for s in tree.body if isinstance(s, ast.Import | ast.ImportFrom)
    ]
    return "\n".join(map(ast.unparse, statements))


def cells(path, kind):
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", LESSONS, ids=below)
def test_solutions_pass_their_checks(path):
    "Imports, exports, the check cell and the folded solutions run; every check is used."
    code, prose = cells(path, "code"), "\n".join(cells(path, "markdown"))
    imports = imports_of(code)
    exports = [
        f"from cpsample.{m.group(1)} import *"
        for c in code
        if (m := re.search(r"#\| default_exp ([\w.]+)", c))
    ]
    check = next(c for c in code if c.startswith("# check"))
    solutions = "\n".join(
        re.findall(r"~~~python\n(.*?)~~~", prose[prose.index("<summary>Solutions") :], flags=re.S)
    )
    space = {"answer_1": None}
    exec("\n".join([imports, *exports]), space)
    definitions, loop = check.split("\nfor check, answer in ")
    exec(definitions, space)
    names = re.findall(r"def (check_\d)", definitions)
    assert len(names) >= 2 and all(
        f"{name}(" in solutions and f"({name}, " in loop for name in names
    )
    exec(solutions, space)


@pytest.mark.parametrize("path", BOOK, ids=below)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(cells(path, "markdown"))):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def way_of(path, end):
    """{"←": the page before, "map": the start page, "→": the page behind} at one end of a page."""
    cell = json.loads(path.read_text(encoding="utf-8"))["cells"][1 if end == "top" else -1]
    links = re.findall(r"\[([^]]+)\]\(([^)]+)\)", "".join(cell["source"]))
    return {re.search("←|map|→", words)[0]: (path.parent / to).resolve() for words, to in links}


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_the_pages_are_one_chain_that_leads_to_each_of_them_once_and_back(end):
    start, *pages = sorted(BOOK, key=lambda path: path.stem != "index")
    for before, page in zip([None, *pages], pages):
        way = way_of(page, end)
        assert way["map"] == start and way.get("←") == before
        assert before is None or way_of(before, end)["→"] == page
    assert "→" not in way


def test_whoever_adds_a_page_finds_it_in_the_chain(tmp_path):
    for name in ("index", "1_a/01_first", "1_a/02_second", "2_b/01_third"):
        path = tmp_path / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": [f"# {name}"]}
        path.write_text(json.dumps({"cells": [title]}))
    for _ in range(2):  # the second time changes nothing
        book.write_ways(tmp_path)
    first, second, third = (cells(path, "markdown") for path in book.notebooks(tmp_path)[:3])
    assert second[1] == second[-1] and len(second) == 3
    assert second[1] == (
        "[← 1.1 1_a/01_first](01_first.ipynb) · [map](../index.ipynb) · "
        "[2.1 2_b/01_third →](../2_b/01_third.ipynb)"
    )
    assert "←" not in first[1] and "→" not in third[1]


@pytest.mark.parametrize("path", BOOK, ids=below)
def test_first_code_cell_installs_and_badge_is_derived(path):
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    user, repo, branch = (ini["DEFAULT"][k] for k in ("user", "repo", "branch"))
    assert f"github/{user}/{repo}/blob/{branch}/nbs/{below(path)}" in "\n".join(
        cells(path, "markdown")
    )
    assert re.search(
        rf'%pip install -q ("cpsample\[[\w,]+\] @ )?git\+https://github\.com/{user}/{repo}\b',
        cells(path, "code")[0],
    )


@pytest.mark.parametrize("path", BOOK, ids=below)
def test_outputs_name_no_folder_of_the_machine_that_ran_them(path):
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    assert not re.search(
        r"site-packages|ipykernel_|/home/|/Users/",
        json.dumps([{k: v for k, v in o.items() if k != "data"} for o in outputs]),
    )


def test_changing_the_owner_changes_every_link(monkeypatch):
    sys.path.insert(0, str(ROOT / "tools"))
    import book

    monkeypatch.setattr(book, "owner", lambda: ("someone", "fork", "dev"))
    for path in BOOK:
        text = book.link("\n".join(cells(path, "markdown") + cells(path, "code")), below(path))
        assert (
            f"github/someone/fork/blob/dev/nbs/{below(path)}" in text
            and "git+https://github.com/someone/fork" in text
        )


def test_the_package_needs_none_of_the_extras():
    "Imported with every optional package blocked."
    blocked = "nbdev execnb fastcore diffusers transformers accelerate torchmetrics".split()
    blocked += "torch_fidelity faiss opacus jupyterlab ipywidgets pytest hypothesis".split()
    blocked += "smalldiffusion denoising_diffusion_pytorch azula flow_matching k_diffusion".split()
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in book.modules()]
    program = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n" + "\n".join(
        f"import {m}" for m in modules
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_what_ships_is_small_and_says_how_it_was_made():
    data = ROOT / "data"
    assert sum(p.stat().st_size for p in data.rglob("*") if p.is_file()) < 16e6
    for path in (data / "weights").glob("*.safetensors"):
        record = json.loads(path.with_suffix(".json").read_text())
        assert {"command", "commit", "hardware", "date", "seed"} <= record.keys() and not record[
            "commit"
        ].endswith("-dirty"), path.name
    for path in (data / "results").glob("*.json"):
        commits = re.findall(
            r'"commit": "([^"]+)"', path.read_text()
        )  # of the file, or of each of its parts
        assert commits and not any(commit.endswith("-dirty") for commit in commits), path.name


@pytest.mark.parametrize(
    "name, first, tables",
    [
        ("index", "#| echo: false", 7),
        ("3_judgement/09_comparison", "# results", 9),
        ("4_production/07_stable_diffusion_study", "# results", 5),
    ],
)
def test_numbers_on_the_page_are_those_of_the_files(name, first, tables):
    "Every table that a page makes from data/results is made again: nothing in it was typed."
    page, space, compared = ROOT / "nbs" / f"{name}.ipynb", {}, 0
    exec(imports_of(cells(page, "code")), space)
    exported = re.search(r"#\| default_exp ([\w.]+)", "\n".join(cells(page, "code")))
    if exported:
        space |= vars(importlib.import_module(f"cpsample.{exported[1]}"))
    for cell in json.loads(page.read_text())["cells"]:
        source = "".join(cell["source"])
        if not source.startswith(first):
            continue
        tree = ast.parse(source)
        if not ast.unparse(tree.body[-1]).startswith("Markdown("):
            continue
        exec(compile(ast.Module(tree.body[:-1], []), name, "exec"), space)
        shown = eval(compile(ast.Expression(tree.body[-1].value), name, "eval"), space).data
        assert shown == "".join(cell["outputs"][0]["data"]["text/markdown"])
        compared += 1
    assert compared == tables


def test_no_output_names_a_place_on_the_machine_that_made_it():
    said = "cpsample/core/guard.py:7: IdleGuardWarning: it\n"
    assert book.without_places(f"/home/me/x/{said}") == said == book.without_places(said)
    assert book.without_places("/tmp/ipykernel_1/22.py:3: W: it\n") == "this page, line 3: W: it\n"
    for path in BOOK:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("text", []))
                assert book.without_places(text) == text, path
