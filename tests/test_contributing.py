"What CONTRIBUTING.md tells people to do is done here, as printed."

import re
from pathlib import Path

import pytest

from cpsample.workshop import registry

PAGE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"### (An? [\w ]+)\n(?:(?!###).)*?```python\n(.*?)```", PAGE, re.S))


def test_there_is_a_block_for_everything_that_can_be_added():
    assert set(BLOCKS) == {"A network", "An attack", "A baseline", "A measure", "A data format"}
    assert all(len(block.splitlines()) < 40 for block in BLOCKS.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_runs_as_printed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for table in (registry.networks, registry.image_readers):
        monkeypatch.setattr(table, "added", {})
    exec(BLOCKS[name], {"__name__": "contributed"})
