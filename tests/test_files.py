"""Files appear whole, and in pairs; nothing is touched that the program did not write.

Full disks and file systems without permissions are played by functions of `os` that fail; kills are
real.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core import demo
from cpsample.practice.datasets import load_fashion
from cpsample.workshop import files
from cpsample.workshop.files import (
    NoLockWarning,
    OthersMayReadWarning,
    atomic,
    atomic_together,
    locked,
    output_files,
    printable,
    remove_leftovers,
    save_json,
    writable,
)

NOBODY = 2**22 + 1  # above the largest number of a process


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(real, code, call=1):
    "The function `real`, whose call number `call` (from 1) fails with this error of the system."
    calls = []

    def function(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    return function


def write_pair(folder, text):
    with atomic_together([folder / "a.npz", folder / "a.png"], mode=0o600) as temporaries:
        for temporary in temporaries:
            temporary.write_text(text)


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize(
    "function, call", [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("chmod", 2)]
)
def test_of_a_pair_both_appear_or_none(tmp_path, monkeypatch, with_old, function, call):
    if with_old:
        write_pair(tmp_path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(getattr(os, function), errno.ENOSPC, call))
        with pytest.raises(OSError, match="No space left"):
            write_pair(tmp_path, "new")
    assert names(tmp_path) == (["a.npz", "a.png"] if with_old else [])
    assert all(path.read_text() == "old" for path in tmp_path.iterdir())
    write_pair(tmp_path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new", "new"]


def test_without_hard_links_a_pair_is_put_back_all_the_same(tmp_path, monkeypatch):
    write_pair(tmp_path, "old")
    monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))
    monkeypatch.setattr(os, "replace", failing(os.replace, errno.EIO, 2))
    with pytest.raises(OSError):
        write_pair(tmp_path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old", "old"]


KILLED = """
import os, sys
from cpsample.workshop.files import atomic_together
with atomic_together(sys.argv[1:]) as temporaries:
    temporaries[0].write_text("half")
    print("here", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_writer_left_goes_with_the_next_write_of_the_same_file(tmp_path):
    "While it runs its files are safe from other writers."
    targets = [tmp_path / "audit.html", tmp_path / "audit.json"]
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, targets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "here\n"
    with atomic_together(targets) as temporaries:
        for temporary in temporaries:
            temporary.write_text("whole")
    assert len(names(tmp_path)) == 4

    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close(), child.stdout.close()
    save_json(tmp_path / "other.json", {})
    assert len(names(tmp_path)) == 5
    remove_leftovers(targets[0])
    save_json(targets[1], {})
    assert names(tmp_path) == ["audit.html", "audit.json", "other.json"]


ALIKE = st.text("abc.0123456789-_part\\", min_size=1, max_size=12)


@settings(max_examples=60, derandomize=True)
@given(name=ALIKE, tail=ALIKE, pid=st.sampled_from([NOBODY, os.getpid(), 0, "x"]))
def test_names_that_only_look_alike_stay(tmp_path_factory, name, tail, pid):
    folder, place = tmp_path_factory.mktemp("alike"), files._this_place()
    target = folder / (name if name not in (".", "..") else "a")
    ours = f".{target.name}.{NOBODY}-{place}-abcd1234.part{target.suffix}"
    alike = {
        f".{target.name}.{pid}-{place}-{tail}",
        f".{target.name}.{tail}.part{target.suffix}",
        f".{target.name}.abcd1234{target.suffix}",
        f".{target.name}x.{NOBODY}-{place}-abcd1234.part{target.suffix}",
        f"{target.name}.{NOBODY}-{place}-abcd1234.part{target.suffix}",
        f".{target.name}.{NOBODY}-00000000-abcd1234.part{target.suffix}",
    } - {ours}
    for other in {ours, *alike}:
        (folder / other).touch()
    remove_leftovers(target)
    assert set(names(folder)) == alike


def test_a_folder_or_link_that_is_called_like_a_leftover_stays(tmp_path):
    name = f".a.json.{NOBODY}-{files._this_place()}-abcd123{{}}.part.json".format
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one" / name(1)).mkdir()
    (tmp_path / "two" / name(2)).symlink_to(tmp_path / "one")
    for folder in ("one", "two"):
        save_json(tmp_path / folder / "a.json", {})
        assert len(names(tmp_path / folder)) == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_where_there_are_no_permissions_a_file_is_kept_and_one_warning_says_it(
    tmp_path, monkeypatch, code
):
    monkeypatch.setattr(os, "chmod", failing(os.chmod, code))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_json(tmp_path / "public.json", {})  # nothing is secret here

    def for_all(path, mode):
        "As on a disk of which every file is everybody's."
        real(path, 0o777)

    real = os.chmod
    monkeypatch.setattr(os, "chmod", for_all)
    with pytest.warns(OthersMayReadWarning, match="others may read a.npz") as told:
        write_pair(tmp_path, "secret")
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert names(tmp_path) == ["a.npz", "a.png", "public.json"]


def test_through_a_link_the_file_is_replaced_and_not_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "r.json")
    save_json(tmp_path / "link.json", {})
    assert (tmp_path / "link.json").is_symlink() and names(tmp_path / "real") == ["r.json"]


def test_a_device_and_a_folder_are_no_files(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "folder.json", tmp_path / "pipe.json"):
        with pytest.raises(OSError, match="is a folder or a device, and no file"):
            save_json(path, {})
    assert (tmp_path / "folder.json").is_dir() and (tmp_path / "pipe.json").is_fifo()


@pytest.mark.parametrize(
    "out, says",
    [
        ("", "is no name for a file"),
        (".", "is no name for a file"),
        ("..", "is no name for a file"),
        (Path(".."), "is no name for a file"),
        ("a/..", "is no name for a file"),
        ("a/", "is no name for a file"),
        ("x" * 220, "at most 200 bytes"),
        ("猫" * 70, "at most 200 bytes"),
        ("taken", "but .*taken.npz is a folder or a device"),
    ],
)
def test_outputs_that_cannot_be_files_are_refused(tmp_path, monkeypatch, out, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.npz").mkdir()
    with pytest.raises(ValueError, match=f"^--to .*{says}") as told:
        output_files(out, ".npz", ".png", option="--to")
    assert "\n" not in str(told.value)


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=2, unique=True))
def test_different_names_are_different_files(two):
    try:
        a, b = (output_files(name, ".npz", ".png") for name in two)
    except ValueError:
        return
    assert not {str(path) for path in a} & {str(path) for path in b}
    assert [str(path) for path in a] == [f"{two[0]}.npz", f"{two[0]}.png"]


def test_the_longest_name_that_is_accepted_can_be_written(tmp_path):
    (path,) = output_files(tmp_path / ("x" * 188), ".safetensors")
    save_json(path, {})
    assert path.exists()


@settings(max_examples=200, derandomize=True)
@given(st.text(st.characters(), max_size=30))
def test_a_printable_name_is_one_line_of_text_that_can_be_seen(name):
    shown = printable(name)
    assert shown.isprintable()
    shown.encode()
    assert shown == name or not name.isprintable()


def test_a_name_of_bytes_and_escapes_is_shown():
    assert (
        printable(os.fsdecode(b"a\xff\x1b[31m\r\n\xc2\x9b.png")) == r"a\udcff\x1b[31m\r\n\x9b.png"
    )
    assert printable(Path("naïve 图.png")) == "naïve 图.png"
    assert printable("txt\u202egnp.exe") == r"txt\u202egnp.exe"  # it would read backwards


LOCKING = """
import sys
from cpsample.workshop.files import locked
with locked(sys.argv[1]):
    print("here", flush=True)
    sys.stdin.readline()
"""


def test_a_second_program_is_kept_out_until_the_first_is_killed(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", LOCKING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "here\n"
    for _ in range(2):
        with pytest.raises(OSError, match="is in use by another program: wait"), locked(tmp_path):
            pass
    child.kill()
    child.wait()
    child.stdin.close(), child.stdout.close()
    with locked(tmp_path):
        assert names(tmp_path) == [".cpsample.lock"]
    assert names(tmp_path) == []


def test_a_failure_under_a_lock_unlocks(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError("none")])
def test_where_nothing_can_be_locked_the_work_goes_on(tmp_path, monkeypatch, error):
    def refuse(lock):
        raise error

    monkeypatch.setattr(files.filelock.FileLock, "acquire", refuse)
    with pytest.warns(NoLockWarning, match="run no second program in it"), locked(tmp_path):
        done = True
    assert done


HOMELESS = """
import os, pwd
def nobody(*_): raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = nobody
from cpsample.workshop.files import CACHE, writable
import cpsample.practice.datasets, cpsample.cli
assert not CACHE.is_absolute(), CACHE
try:
    writable(CACHE / "guards")
except OSError as error:
    print(error)
"""


def test_without_a_home_folder_everything_can_be_imported(tmp_path):
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "CPSAMPLE_CACHE")}
    kept = {k: v for k, v in kept.items() if not k.startswith("XDG")}
    ended = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=kept, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "set CPSAMPLE_CACHE" in ended.stdout and names(tmp_path) == []


def test_the_cache_is_where_it_was_and_where_the_variable_says(monkeypatch):
    for name in ("CPSAMPLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/somebody")
    if sys.platform == "linux":
        assert files._cache_folder() == Path("/somebody/.cache/cpsample")
    monkeypatch.setenv("CPSAMPLE_CACHE", "/elsewhere")
    assert files._cache_folder() == Path("/elsewhere")


def test_a_home_that_was_not_found_makes_no_folder_called_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="there is no home folder for ~/runs"):
        writable("~/runs")
    assert names(tmp_path) == [] and writable(tmp_path / "a~b" / "~").is_dir()


def test_a_folder_that_cannot_be_written_is_named_with_the_reason():
    "/proc takes no folders, whoever asks."
    with pytest.raises(
        OSError, match=r"^/proc/nope cannot be written \(.*\): give another folder$"
    ):
        writable("/proc/nope")


def test_a_writer_that_fails_names_no_temporary_file(tmp_path):
    with pytest.raises(RuntimeError), atomic(tmp_path / "r.json"):
        raise RuntimeError
    assert names(tmp_path) == []


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of a few steps, beside the arrays `made.npy` and `known.npy`."
    folder = tmp_path_factory.mktemp("commands")
    images = load_fashion(small=True)[0][:, 0].numpy()
    np.save(folder / "made.npy", images[:20])
    np.save(folder / "known.npy", images[10:40])
    said = call("train", "fashion-small", "--images", 16, "--tiny", "--out", folder / "run")
    assert said.exit_code == 0, said.stderr
    return folder / "run"


PAIRS = {
    "sample": ("{run} --unguarded -n 4 --steps 2 --out {out}", ["o-0.1.npz", "o-0.1.png"]),
    "audit": ("{made} {known} --out {out}", ["o-0.1.csv", "o-0.1.html", "o-0.1.json"]),
}


STATUS = {"sample": 0, "audit": 1}  # ten of the twenty images are training images


def words_of(command, run, out):
    made, known = run.parent / "made.npy", run.parent / "known.npy"
    line = PAIRS[command][0].format(run=run, out=out, made=made, known=known)
    return [command, *line.split(" ")]


@pytest.mark.parametrize("command", PAIRS)
def test_a_command_writes_both_of_its_files_or_none(command, run, tmp_path, monkeypatch):
    "The disk is full when the second file is to be put on it; the next time both are there."
    words = words_of(command, run, tmp_path / "o-0.1")
    for broken in ("fsync", "replace"):
        for which in range(2, len(PAIRS[command][1]) + 1):
            with monkeypatch.context() as patch:
                patch.setattr(os, broken, failing(getattr(os, broken), errno.ENOSPC, which))
                told = call(*words)
            assert told.exit_code == 2 and "No space left" in told.stderr.splitlines()[-1]
            assert names(tmp_path) == []
    assert call(*words).exit_code == STATUS[command] and names(tmp_path) == PAIRS[command][1]

    # A name that differs behind its dot is another name.
    assert call(*words[:-1], tmp_path / "o-0.2").exit_code == STATUS[command]
    assert names(tmp_path) == PAIRS[command][1] + [
        n.replace("0.1", "0.2") for n in PAIRS[command][1]
    ]


def test_the_demo_writes_its_picture_and_its_numbers_or_none(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: ({"name": "demo"}, {}, None))
    monkeypatch.setattr(demo, "show_arms", lambda *_: plt.figure())
    monkeypatch.setattr(demo, "table", lambda *_: "")
    words = ["demo", "--out", tmp_path / "a", "--json", tmp_path / "a" / "n"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, errno.EDQUOT, 2))
        told = call(*words)
    assert told.exit_code == 2 and "quota" in told.stderr.splitlines()[-1]
    assert names(tmp_path / "a") == []
    assert call(*words).exit_code == 0 and names(tmp_path / "a") == ["demo.png", "n"]
    assert json.loads((tmp_path / "a" / "n").read_text())["name"] == "demo"


@pytest.mark.parametrize("command", PAIRS)
def test_names_that_a_terminal_would_obey_are_printed_escaped(command, run, tmp_path):
    out = tmp_path / "o\x1b[2J\n\u202e"
    said = call(*words_of(command, run, "OUT")[:-1], out)
    assert said.exit_code == STATUS[command], said.stderr
    shown = [line for line in said.stdout.splitlines() if "OUT" in line or "x1b" in line]
    assert r"o\x1b[2J\n\u202e." in shown[0] and "\x1b" not in said.stdout
    told = call(*words_of(command, run, "OUT")[:-1], out / "..")
    assert told.exit_code == 2 and "\x1b" not in told.stderr and r"\x1b[2J" in told.stderr


@pytest.mark.parametrize("out", ["..", ".", "taken", "x" * 250])
@pytest.mark.parametrize("command", PAIRS)
def test_a_command_refuses_an_output_before_its_work(command, out, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in (".npz", ".html"):
        Path(f"taken{suffix}").mkdir()
    told = call(*words_of(command, run, out))
    (line,) = told.stderr.splitlines()
    assert told.exit_code == 2 and line.startswith("cpsample: --out") and out[:9] in line
    assert names(tmp_path) == ["taken.html", "taken.npz"]
