"Options and inputs that cannot work: one line, status 2, and no file that was not there before."

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from cpsample.cli import PlainStream, app, check_memory, on_device, plain_streams

BAR = re.compile(r"\d+%\||\d+it \[|it/s\]|s/it\]|\?it/s")


class Place:
    "A folder with a run, pictures and arrays, in which a command must leave everything as it was."

    def __init__(self, base):
        self.base, self.here = base, base / "a" / "here"
        self.here.mkdir(parents=True)
        self.names = {
            name: str(base / name)
            for name in (
                "run",
                "pictures",
                "others",
                "folder",
                "file",
                "array",
                "new",
                "taken",
                "fifo",
            )
        }

    def files(self):
        "Every file below, and when it was written."
        paths = (path for path in self.base.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in paths}

    def call(self, words):
        "(exit status, output, messages on standard error without progress bars) of a command."
        given_words = [str(word).format(**self.names) for word in words]
        with at(self.here), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = CliRunner().invoke(app, given_words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        lines = re.split(r"[\r\n]", result.stderr)
        said = [line for line in lines if line.strip("\x1b[A ") and not BAR.search(line)]
        return result.exit_code, result.stdout, said


@contextlib.contextmanager
def at(folder):
    former = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)


def pictures(folder, n, first):
    "A folder of n random grey pictures of 8×8 pixels."
    folder.mkdir()
    for i in range(n):
        random = np.random.default_rng(first + i)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("options")
    made = Place(base)
    pictures(base / "pictures", 24, 0)
    pictures(base / "others", 40, 100)
    (base / "folder").mkdir()
    for suffix in (".npz", ".html", ".safetensors"):
        (base / f"folder{suffix}").mkdir()
    (base / "file").write_text("mine")
    os.mkfifo(base / "fifo")  # a device of the system would be lost, should a check ever fail
    (base / "taken.png").write_text("mine")
    random = np.random.default_rng(0)
    np.save(base / "array.npy", random.integers(0, 256, (30, 8, 8), dtype=np.uint8))

    # A model of two steps and the paper's guard, which is not calibrated.
    train = "train {pictures} --size 8 --grey --tiny --steps 2 --images 16 --out {run}"
    guard = "guard {run} --preset paper --steps 2"
    for words in (train, guard):
        code, _, said = made.call(words.split())
        assert code == 0, said
    return made


TRAIN = "train {pictures} --size 8 --grey --tiny --steps 2 --out {new}/run "
SAMPLE = "sample {run} -n 2 --steps 2 --out {new}/s "
AUDIT = "audit {array}.npy {array}.npy --space thumbnail-48 --out {new}/a "
ATTACK = "attack {run} --others {others} --limit 20 "
GUARD = "guard {run} --reference {others} --steps 2 "
PIPELINE = "guard --pipeline {folder} --data {pictures} --reference {others} "
DEMO = (
    "demo --images 30 --train-steps 2 --guard-steps 2 --samples 5 --sample-steps 2 --out {new}/d "
)
HUGE = str(10**30)
LONG = "x" * 249

REFUSED = {
    # devices
    TRAIN + "--device gpu": "unknown device 'gpu': choose cpu, cuda",
    SAMPLE + "--device gpu": "unknown device 'gpu'",
    AUDIT + "--device gpu": "unknown device 'gpu'",
    ATTACK + "--device tpu": "unknown device 'tpu'",
    GUARD + "--device cuda:x": "unknown device 'cuda:x'",
    PIPELINE + "--device gpu": "unknown device 'gpu'",
    "reproduce guards --device gpu": "unknown device 'gpu'",
    "reproduce cifar10 --device gpu --plan": "unknown device 'gpu'",
    TRAIN + "--device cuda:99": "--device cuda:99: torch sees none here, only cpu",
    SAMPLE + "--device cuda:99": "--device cuda:99: torch sees none here, only cpu",
    ATTACK + "--device cuda:99": "--device cuda:99: torch sees none here, only cpu",
    GUARD + "--device cuda:99": "--device cuda:99: torch sees none here, only cpu",
    # numbers
    SAMPLE + "--steps 0": "--steps must be between 2 and 1,000, got 0",
    SAMPLE + "--steps -1": "--steps must be between 2 and 1,000, got -1",
    SAMPLE + "-n 0": "--number must be between 1 and",
    SAMPLE + "-n 1000000000": "1,000,000,000 images of 1×8×8 take 576 GB of memory",
    "audit {run} -n 1000000000 --out {new}/a": "take 576 GB of memory",
    SAMPLE + f"-n {HUGE}": "--number must be between 1 and 1,000,000,000",
    SAMPLE + f"--seed {HUGE}": "--seed must be between 0 and 1,000,000,000,000,000,000",
    AUDIT + f"--seed {2**31}": "--seed must be between 0 and 2,147,483,647",
    TRAIN + "--seed -1": "--seed must be between 0 and",
    DEMO + "--seed 1 --seed -1": "--seed must be between 0 and 2,147,483,647, got -1",
    SAMPLE + "--strength nan": "--strength must be between 0.001 and 1,000,000, got nan",
    SAMPLE + "--strength 0": "--strength must be between 0.001",
    ATTACK + "--strength inf": "--strength must be between 0.001",
    ATTACK + "--unguarded --strength nan": "--strength must be between 0.001",
    ATTACK + "--limit -1": "--limit must be between 20 and",
    TRAIN + "--lr inf": "--lr must be between 1e-09 and 10, got inf",
    TRAIN + "--lr nan": "--lr must be between 1e-09 and 10, got nan",
    TRAIN + "--size 0": "--size must be between 1 and 4,096",
    TRAIN + "--size 10000000": "--size must be between 1 and 4,096",
    AUDIT + "--size 10000000": "--size must be between 1 and 4,096",
    TRAIN + "--batch-size 0": "--batch-size must be between 1 and",
    TRAIN + f"--batch-size {10**12}": "--batch-size must be between 1 and",
    TRAIN + f"--steps {HUGE}": "--steps must be between 1 and 1,000,000,000",
    TRAIN + "--images -4": "--images must be between 1 and",
    TRAIN + "--images 25": "cannot split 24 images",
    GUARD + "--steps 0": "--steps must be between 1 and",
    GUARD + "--t-max 0": "--t-max must be between 1 and",
    GUARD + "--t-max 5000": "must be between 0 and the schedule's T=1000",
    AUDIT + "--max-copy-rate nan": "--max-copy-rate must be between 0 and 1, got nan",
    DEMO + "--samples 1000000000": "--samples must be between 2 and 1,000,000",
    DEMO + "-K 0": "--labels must be between 1 and 1,024",
    DEMO + "--alpha nan": "alpha must lie between 0 and 0.5",
    # names to choose from
    AUDIT + "--backend magic": "unknown backend 'magic': choose one of torch, faiss",
    AUDIT + "--space hash": "unknown feature space 'hash': choose one of digits-mlp-64",
    GUARD + "--preset best": "unknown preset 'best': choose one of x0",
    "trian": "Did you mean 'train'?; see",
    "train --nonsense": "No such option: --nonsense",
    "": "Missing command; see",
    # options that would be ignored
    SAMPLE + "--unguarded --strength 2": "--strength would change nothing: --unguarded leaves",
    ATTACK + "--unguarded --strength 2": "--strength would change nothing",
    GUARD + "--data {pictures} --out {new}/g": "--data, --out would change nothing: a run knows",
    AUDIT + "-n 5": "--number would change nothing",
    AUDIT + "--unguarded --strength 2": "--unguarded, --strength would change nothing",
    AUDIT + "--test hash": "unknown test 'hash': choose one of ratio",
    "audit {run} {pictures}": "TRAINING would change nothing",
    "audit {run} --size 9": "--size would change nothing",
    "train digits --tiny --size 64 --out {new}": "--size would change nothing: digits comes as",
    "train {array}.npy --tiny --grey --out {new}": "--grey would change nothing",
    # outputs
    "sample {run} --out {folder}": "folder.npz is a folder or a device: give another name",
    "sample {run} --out ..": "--out '..' is no name for a file",
    "sample {run} --out .": "--out '.' is no name for a file",
    f"sample {{run}} --out {LONG}": "is too long: give a name of at most",
    "sample {run} --out {taken}": "taken.png is there already, and this command has not written",
    AUDIT.replace("{new}/a", "{folder}"): "folder.html is a folder or a device",
    AUDIT.replace("{new}/a", ".."): "--out '..' is no name for a file",
    AUDIT.replace("{new}/a", LONG): "is too long",
    AUDIT.replace("{new}/a", "{run}/run"): "run.json is there already",
    ATTACK + "--json {folder}": "--json '",
    ATTACK + "--json {run}/run.json": "run.json is there already",
    ATTACK + "--json {file}": "file is there already",
    ATTACK + "--json {file}/x.json": "cannot be a folder: it is a file, or lies below one",
    ATTACK + f"--json {LONG}.json": "is too long",
    PIPELINE + "--out {folder}": "folder.safetensors is a folder or a device",
    PIPELINE + "--out {run}/guard": "guard.safetensors is there already",
    DEMO + "--json {folder}": "needs a file",
    DEMO + f"--json {LONG}.json": "is too long",
    DEMO.replace("{new}/d", "{file}"): "file",
    # inputs
    TRAIN + "--from {folder}": "--from needs a file: give",
    TRAIN + "--from {run}": "run/model.safetensors",
    TRAIN + "--from {file}": "cannot be read as a model",
    GUARD + "--preset paper": "--reference would change nothing: the paper's guard learns of",
    "guard {run} --preset paper --wanted 0.99": "--wanted would change nothing: the paper's guard",
    PIPELINE + "--preset paper --wanted 0.99": "--wanted would change nothing",
    "train digits --strict --out {new}/run": "--strict would change nothing: digits comes as it is",
    "audit {run} --strict --out {new}/a": "--strict would change nothing: {run} is a run",
    "sample {folder}": "holds no run: cpsample train DATA",
    "audit {array}.npy": "is no run: give the training images too",
    "attack {run} --others {file}": "neither a folder, nor",
    "guard --pipeline {folder}": "(--data)",
    "guard --pipeline {file} --data {pictures} --reference {others}": "file",
    "guard": "give the folder of a run, or --pipeline, and not both",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(words, place):
    before = place.files()
    code, said, messages = place.call(words.split())
    assert code == 2 and not said and len(messages) == 1, messages
    assert messages[0].startswith("cpsample: ")
    assert REFUSED[words].replace("{run}", place.names["run"]) in messages[0]
    assert "unexpected" not in messages[0] and place.files() == before


@pytest.mark.parametrize("command", ["train", "sample", "guard {run} --reference", "audit x"])
def test_an_empty_argument_is_not_the_current_folder(command, place):
    code, _, messages = place.call([*command.split(), ""])
    assert code == 2 and messages == [
        "cpsample: an argument is empty: is a variable of the shell not set?"
    ]


def test_what_is_right_passes_the_same_checks(place):
    "The commands that the table spoils are right as they are; a second call replaces the first."
    for words in (TRAIN, SAMPLE, SAMPLE, AUDIT, AUDIT, ATTACK + "--json {new}/x.json"):
        code, _, messages = place.call(words.split())
        assert code == (words == AUDIT), messages  # whose images are the training images
    new = Path(place.names["new"])
    names = {path.name for path in new.iterdir()}
    assert names == {"run", "s.npz", "s.png", "a.html", "a.json", "a.csv", "x.json"}


# Files that are not what they should be.


def claiming(path, shape, damage=False):
    "An .npz whose array claims a shape, and has 5 KB; perhaps with bytes of it turned over."
    header = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(5120))
    if damage:
        content = bytearray(path.read_bytes())
        content[1000] ^= 255
        path.write_bytes(content)


def damaged_files(folder):
    "{name of a file or folder: what is wrong with it}, written into a folder."
    folder.mkdir()
    claiming(folder / "huge.npz", (10**6, 1, 280, 280))
    claiming(folder / "negative.npz", (-5, 8, 8))
    claiming(folder / "crc.npz", (20, 8, 8), damage=True)
    (folder / "cut.npz").write_bytes((folder / "huge.npz").read_bytes()[:200])
    (folder / "empty.npz").touch()
    (folder / "junk.npy").write_bytes(b"\x93NUMPY\x01\x00junk")
    np.save(folder / "nan.npy", np.full((20, 8, 8), np.nan, np.float32))
    np.save(folder / "no_side.npy", np.zeros((20, 0, 8), np.uint8))
    np.save(folder / "text.npy", np.array(["a"] * 20))
    np.save(folder / "five_axes.npy", np.zeros((5, 5, 5, 5, 5), np.uint8))
    names = [path.name for path in folder.iterdir()]

    # Folders of one picture that is none.
    for name in ("nan_picture", "pipe", "escape"):
        (folder / name).mkdir()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan_picture" / "a.tif")
    os.mkfifo(folder / "pipe" / "a.png")
    (folder / "escape" / "\x1b[31m\n.png").write_bytes(b"no picture")
    return [*names, "nan_picture", "pipe", "escape"]


def test_damaged_images_are_refused_by_every_command_that_reads_them(place):
    read = (
        "train {} --tiny --steps 2 --out {{new}}/damaged",
        "audit {} {{array}}.npy --space thumbnail-48 --out {{new}}/damaged",
        "audit {{array}}.npy {} --space thumbnail-48 --out {{new}}/damaged",
        "attack {{run}} --others {}",
        "guard {{run}} --steps 2 --reference {}",
    )
    names = damaged_files(place.base / "damaged")
    before = place.files()
    for name in names:
        for command in read:
            words = command.format(place.base / "damaged" / name).split()
            code, _, messages = place.call(words)
            assert code == 2 and len(messages) == 1, (words, messages)
            assert messages[0].startswith("cpsample: ") and name in messages[0], messages
            assert "unexpected" not in messages[0] and place.files() == before


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", "guard.safetensors"])
def test_a_damaged_run_is_refused_by_every_command_that_reads_it(name, place):
    path = Path(place.names["run"]) / name
    whole = path.read_bytes()
    contents = [b"", b"{}", b"[]", b"null", b"3", b"\xff", b"[" * 10**5, whole[: len(whole) // 2]]
    if name == "run.json":
        record = json.loads(whole)
        spoilt = [{"data": None}, {"size": "8"}, {"images": "4"}, {"config": {}}]
        spoilt += [{"size": 0}, {"size": -4}, {"size": 10**9}, {"channels": 7}, {"fit": "foo"}]
        spoilt += [{"images": 0}, {"config": record["config"] | {"seed": 2**70}}]
        spoilt += [{"config": record["config"] | {"sample_steps": 0}}]
        contents += [json.dumps(record | change).encode() for change in spoilt]

    try:
        for content in contents:
            path.write_bytes(content)
            before = place.files()
            for words in (SAMPLE, ATTACK, "audit {run} --out {new}/a"):
                code, _, messages = place.call(words.split())
                assert code == 2 and len(messages) == 1, (content[:60], words, messages)
                assert messages[0].startswith("cpsample: ") and name in messages[0], messages
                assert "unexpected" not in messages[0] and place.files() == before
    finally:
        path.write_bytes(whole)


# What libraries raise.

UNEXPECTED = {
    "unexpected RuntimeError: mat1 and mat2; run again with --debug": RuntimeError(
        "mat1 and mat2\n2"
    ),
    "unexpected AssertionError: no reason given": AssertionError(),
    "unexpected IndexError: index 0": IndexError("index 0"),
    "unexpected KeyError: 'steps'": KeyError("steps"),
    "unexpected TypeError: no": TypeError("no"),
    "unexpected BadZipFile: bad": zipfile.BadZipFile("bad"),
    "unexpected error: Error -3": zlib.error("Error -3"),
    "unexpected RecursionError": RecursionError("deep"),
    "smaller --batch-size": MemoryError(),
    "smaller --batch-size or --size": torch.OutOfMemoryError("CUDA out of memory. Tried"),
    "or another --device": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    "fewer images (": RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
    r"no \x1b[31m.png here": ValueError("no \x1b[31m.png\nhere"),
    r"\udcff.png": OSError("\udcff.png"),
}


@pytest.mark.parametrize("says", UNEXPECTED)
def test_whatever_is_raised_becomes_one_line(says, place, monkeypatch):
    def fail(*_, **__):
        raise UNEXPECTED[says]

    monkeypatch.setattr("cpsample.practice.runs.load_protected_run", fail)
    code, _, messages = place.call(SAMPLE.split())
    assert code == 2 and len(messages) == 1 and says in messages[0], messages


def test_debug_shows_the_traceback_wherever_it_stands(place, monkeypatch):
    for words in (["--debug", "sample", "{folder}"], ["sample", "{folder}", "--debug"]):
        code, _, messages = place.call(words)
        assert code == 2 and messages[0].startswith("Traceback")
        assert messages[-1].startswith("cpsample: ") and "holds no run" in messages[-1]
    monkeypatch.setenv("CPSAMPLE_DEBUG", "1")
    assert place.call(["sample", "{folder}"])[2][0].startswith("Traceback")
    assert len(place.call(["sample", "--nonsense"])[2]) == 1


def test_memory_is_counted_before_images_are_drawn():
    check_memory(64, [3, 256, 256])
    with pytest.raises(ValueError, match="10,000,000 images of 3×256×256 take 17,695 GB"):
        check_memory(10**7, [3, 256, 256])


def test_devices_are_those_that_torch_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = (None, "cuda", "cuda:1", "cpu")
    assert [on_device(name) for name in names] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="only cpu, cuda:0, cuda:1"):
        on_device("cuda:2")


# Where messages go.


def test_a_message_begins_on_a_line_of_its_own_after_a_bar(monkeypatch):
    from tqdm.auto import tqdm

    def show(*warning):
        "As Python shows warnings where no test collects them."
        sys.stderr.write(warnings.formatwarning(*warning))

    monkeypatch.setattr(warnings, "showwarning", show)
    with contextlib.redirect_stderr(io.StringIO()) as written, plain_streams():
        with contextlib.suppress(ValueError):
            for _ in (bar := tqdm(range(3), file=sys.stderr)):
                warnings.warn("skipped\na picture", stacklevel=1)
                raise ValueError
        print("cpsample: stopped", file=sys.stderr)
        bar.close()
    lines = re.split(r"[\r\n]", written.getvalue())
    assert "warning: skipped a picture" in lines and "cpsample: stopped" in lines


def test_an_error_of_a_command_is_not_glued_to_its_bar(place, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no scores")

    monkeypatch.setattr("cpsample.judgement.attacks.scores_of", fail)
    code, _, messages = place.call(ATTACK.split())
    assert code == 2 and messages == ["cpsample: no scores"]


def test_a_verdict_is_given_also_when_nobody_reads_it(place):
    "Finished is finished: the files are there, and the status is that of the audit."
    words = (AUDIT + "--max-copy-rate 0.5").format(**place.names).split()
    nobody, writer = os.pipe()
    os.close(nobody)
    with os.fdopen(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
        with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
            app(words)
    assert end.value.code == 1 and "cpsample:" not in said.getvalue()


def test_a_stream_writes_what_it_can():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("α = ½ \udcff", file=PlainStream(ascii_only), flush=True)
    assert ascii_only.buffer.getvalue() == b"? = ? ?\n"
    print("said to nobody", file=PlainStream(None), flush=True)

    # A full disk is an error, once; after it, nothing is left to fail at the end.
    if Path("/dev/full").exists():
        full = PlainStream(open("/dev/full", "w"))
        print("lost", file=full)
        with pytest.raises(OSError):
            full.flush()
        full.close()


@pytest.mark.parametrize(
    "redirected, status",
    [
        ("--help | true", 0),
        ("--help >&-", 0),
        ("nonsense 2>&-", 2),
        ("reproduce cats 2>&- | true", 2),
    ],
)
def test_shells_may_close_what_they_like(redirected, status):
    program = f"set -o pipefail; PYTHONIOENCODING=ascii {sys.executable} -m cpsample {redirected}"
    ended = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (status, "")


class Interrupted:
    "An importer that is interrupted at one module."

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise KeyboardInterrupt


def test_an_interrupt_during_imports_is_one_line(place, monkeypatch, capsys):
    from cpsample.__main__ import main

    # While a command imports what it works with.
    monkeypatch.delitem(sys.modules, "cpsample.judgement.attacks")
    monkeypatch.setattr(sys, "meta_path", [Interrupted("cpsample.judgement.attacks")])
    code, _, messages = place.call(ATTACK.split())
    assert code == 130 and len(messages) == 1 and "interrupted" in messages[0]

    # While the command line itself is loaded.
    monkeypatch.delitem(sys.modules, "cpsample.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted("cpsample.cli")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == "cpsample: interrupted\n"


# Whatever somebody types.

VALUES = (
    *("0", "1", "-1", "3", "nan", "inf", "-inf", "1e400", "1e-400", "-0.0", HUGE, "9" * 5000),
    *("", " ", "½", "٣", "0x10", "1_0", "true", "None", "[1]", "*", "-", "--", "--help", "{{}}"),
    *("..", ".", "~", "{fifo}", "{fifo}/x", "{folder}", "{file}", "{run}"),
    *("{array}.npy", "{pictures}", "{run}/run.json", "{run}/guard", "{taken}", "new", LONG),
    *("\x1b[31mred", "a\nb", "a\0b", "🙂", "\udcff", "%s", "cpu", "cuda", "cosine", "digits"),
)
COMMANDS = {
    "train": TRAIN.replace("{new}/run", "t"),
    "sample": SAMPLE.replace("{new}/s", "s"),
    "audit": AUDIT.replace("{new}/a", "a"),
    "audit a run": "audit {run} -n 20 --space thumbnail-48 --out ar",
    "attack": ATTACK,
    "guard": GUARD,
    "pipeline": PIPELINE,
    "demo": DEMO.replace("{new}/d", "d"),
    "reproduce": "reproduce cifar10 --plan",
}
HEAVY = {"--compile", "--install-completion", "--show-completion", "--pipeline"}


def options_of(command):
    "The long names of a command's options, and whether they are flags."
    from typer.main import get_command

    parameters = get_command(app).commands[command].params
    named = [p for p in parameters if p.param_type_name == "option"]
    return {max(p.opts, key=len): p.is_flag for p in named if max(p.opts, key=len) not in HEAVY}


@st.composite
def command_lines(draw):
    words = draw(st.sampled_from(list(COMMANDS.values()))).split()
    options = options_of(words[0])
    for name in draw(st.lists(st.sampled_from(list(options)), min_size=1, max_size=3)):
        words += [name] if options[name] else [name, draw(st.sampled_from(VALUES))]
    if draw(st.integers(0, 4)) == 0:
        words.insert(draw(st.integers(1, len(words))), draw(st.sampled_from(VALUES)))
    return words


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(words=command_lines())
def test_whatever_somebody_types(words, place):
    before = place.files()
    code, _, messages = place.call(words)
    errors = [line for line in messages if not line.startswith("warning: ")]
    # 1 and 3 are verdicts of an audit: copies, and too few images to tell.
    assert code in (0, 1, 2, 3) and len(errors) == (code == 2), (words, messages)
    assert not any("cpsample: unexpected" in line for line in errors), (words, errors)
    if code == 2:
        assert errors[0].startswith("cpsample: "), (words, errors)

        # A guard that covers too little keeps its checkpoint, and says so; else nothing changes.
        changed = {path for path, _ in place.files().items() ^ before.items()}
        may_change = {"guard.checkpoint.safetensors"} if "continues it" in errors[0] else set()
        assert {path.name for path in changed} <= may_change, (words, errors)
