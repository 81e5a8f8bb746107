"The package as PyPI would show it: links that lead somewhere, and facts beside it."

import re
import subprocess
import sys
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    "The metadata that setup.py writes, as a message of headers and a body."
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (folder / "cpsample.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    return Parser().parsestr(text)


def test_links_lead_somewhere_from_outside_of_the_repository(shown):
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    repo, branch = ini["DEFAULT"]["git_url"], ini["DEFAULT"]["branch"]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", shown.get_payload())
    inside = []
    for mark, target in links:
        assert target.startswith(("https://", "#")), target
        kind = "raw" if mark else "blob"
        if target.startswith(f"{repo}/{kind}/{branch}/"):
            inside.append(target.partition(f"/{kind}/{branch}/")[2])
        else:
            assert not target.startswith(repo), target

    # They are the same that the README has, and the files are there.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert inside == re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme)
    assert "data/results/demo.png" in inside
    assert all((ROOT / name).exists() for name in inside)


def test_the_page_begins_with_the_title(shown):
    assert shown.get_payload().startswith("# cpsample\n")


def test_versions_of_python_are_those_that_are_tested(shown):
    said = re.findall(r"Python :: (3\.\d+)", "\n".join(shown.get_all("Classifier")))
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    oldest, newest = re.search(r'python: \["(3\.\d+)", "(3\.\d+)"\]', workflow).groups()
    assert (said[0], said[-1]) == (oldest, newest)
    assert shown["Requires-Python"] == f">={oldest}"
    assert sorted(said, key=lambda version: int(version[2:])) == said
