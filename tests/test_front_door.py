"`import cpsample` and `cpsample --help`: what a user needs, at once, with nothing heavy loaded."

import subprocess
import sys
from pathlib import Path

import pytest

import cpsample
from cpsample.workshop import choices, registry

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchvision", "numpy", "scipy", "sklearn", "matplotlib", "seaborn", "PIL"}


def heavy_after(program, *arguments):
    "(exit status, what was said, heavy modules loaded) of a program in a process of its own."
    watch = f"""
import atexit, os, sys
def said(): os.write(2, ("LOADED " + " ".join({HEAVY!r} & set(sys.modules)) + "\\n").encode())
atexit.register(said)
{program}
"""
    command = [sys.executable, "-c", watch, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    said, _, loaded = ended.stderr.rpartition("LOADED")
    return ended.returncode, ended.stdout + said, set(loaded.split())


CLI = "from cpsample.cli import app; app()"


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        ("--help", 0, "reproduce"),
        ("--version", 0, cpsample.__version__),
        ("train --help", 0, "fashion-small"),
        ("audit --help", 0, "neighbourhood"),
        ("reproduce --help", 0, "stable_diffusion"),
        ("demo --images many", 2, "valid int"),
        ("nonsense", 2, "No such command"),
        ("train", 2, "Missing argument"),
        ("guard", 2, "give the folder of a run, or --pipeline, and not both"),
        ("guard run --preset none", 2, "unknown preset 'none': choose one of x0, x_t, member"),
        ("audit a b --test hash", 2, "unknown test 'hash': choose one of ratio"),
        ("audit a b --max-copy-rate 1.5", 2, "--max-copy-rate must be between 0 and 1, got 1.5"),
        ("reproduce cats", 2, "unknown study or experiment 'cats'"),
        ("reproduce guards --plan", 2, "guards is a study: --plan, --size and --data are for"),
        ("reproduce guards --method a:b", 2, "--method is for comparison"),
        ("reproduce comparison --method a:b --n 3", 2, "--method is for comparison"),
        ("reproduce cifar10 all", 2, "cifar10 is an experiment: it has no parts"),
        (
            "reproduce cifar10 --size huge",
            2,
            "unknown size of cifar10 'huge': choose one of full, colab",
        ),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(arguments, status, words):
    code, said, loaded = heavy_after(CLI, *arguments.split())
    assert (code, loaded) == (status, set()) and words in said, said


def test_the_package_is_light_until_it_is_used():
    program = "import cpsample; assert len(dir(cpsample)) > 10; cpsample.__version__"
    assert heavy_after(program) == (0, "", set())
    code, _, loaded = heavy_after("import cpsample; cpsample.make_schedule()")
    assert code == 0 and "torch" in loaded


def test_every_name_at_the_front_door_leads_somewhere():
    from cpsample.front_door import PLACES

    assert set(PLACES) | {"__version__"} == set(cpsample.__all__) <= set(dir(cpsample))
    for name in PLACES:
        assert getattr(cpsample, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'protecc'"):
        cpsample.protecc  # noqa: B018


def test_python_m_cpsample_works():
    command = [sys.executable, "-m", "cpsample", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("cpsample ")


def test_the_choices_are_those_of_the_modules_that_do_the_work():
    from cpsample.core import demo, guard
    from cpsample.judgement import copy_audit
    from cpsample.practice import datasets
    from cpsample.production import experiments
    from cpsample.workshop import neighbours

    assert choices.IMAGE_SETS == tuple(datasets.IMAGE_SETS)
    assert choices.PRESETS == tuple(guard.GUARDS)
    assert choices.COPY_TESTS == tuple(copy_audit.TESTS)
    assert choices.SEARCHES == tuple(neighbours.SEARCH)
    assert set(choices.EXPERIMENTS) == set(experiments.EXPERIMENTS)
    assert {name: tuple(experiments.EXPERIMENTS[name]) for name in choices.EXPERIMENTS} == (
        choices.SIZES
    )
    assert choices.DEMO.items() <= demo.DEFAULTS.items()
    assert choices.DEMO_LABELS == demo.DEFAULTS["K"]


@pytest.mark.parametrize("name", list(choices.studies))
def test_every_study_is_where_its_name_says(name):
    study = choices.studies[name]
    assert study.name == name and study.parts


@pytest.mark.parametrize("name", list(registry.networks))
def test_every_network_is_found_in_a_fresh_process(name):
    "Nothing has to be imported first; a file that names a network can be read."
    if name == "DiffusersUNet":
        pytest.importorskip("diffusers")
    program = f"""
from cpsample.workshop.registry import networks
kind = networks[{name!r}]
assert kind.__name__ == {name!r}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_from_a_file_is_looked_up_and_never_imported(monkeypatch):
    for name in ("os.system", "cpsample.cli:app", "subprocess", ""):
        with pytest.raises(ValueError, match="unknown network"):
            registry.build_network(name, {})


def test_others_may_add_networks_and_feature_spaces_of_their_own(monkeypatch):
    monkeypatch.setattr(registry.networks, "added", {})

    @registry.networks.register
    class Mine:
        def __init__(self, width):
            self.width = width

    assert registry.build_network("Mine", {"width": 3}).width == 3
    with pytest.raises(ValueError, match="belongs to cpsample"):
        registry.networks.register(Mine, "UNet")
    impostor = type("UNet", (), {"__module__": "somewhere.else"})
    with pytest.raises(ValueError, match="belongs to cpsample"):
        registry.networks.register(impostor)


@pytest.mark.parametrize("space", list(registry.feature_spaces))
def test_every_feature_space_is_where_its_name_says(space):
    assert callable(registry.feature_spaces[space])
