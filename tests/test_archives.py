"Pictures in archives: the same as in the folder, and nothing lost in silence."

import io
import itertools
import json
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_archives import pack, picture, unpack
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.practice import datasets
from cpsample.practice.datasets import (
    ImageFileWarning,
    holds_pictures,
    load_cifar10,
    load_folder,
    load_labelled,
    picture_paths,
    read_data,
    read_together,
)
from cpsample.practice.runs import members_of, run_of
from cpsample.workshop.archives import Archive, is_archive

KINDS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def said_by(read):
    "What read() returns, and all that it warns of, in one line each."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = read()
    lines = [str(one.message) for one in caught if one.category is ImageFileWarning]
    assert not any("\n" in line for line in lines)
    return result, lines


def in_silence(data, size=8, **reading):
    "The pictures of a data set of which nothing has to be said, all of them."
    result, lines = said_by(lambda: load_folder(data, size, strict=True, **reading))
    assert lines == []
    return result


def with_one_warning(data, size=8):
    result, lines = said_by(lambda: load_folder(data, size))
    assert len(lines) == 1
    with pytest.raises(OSError, match="not all of|cannot be read as an image"):
        load_folder(data, size, strict=True)
    return *result, lines[0]


NAMES = st.from_regex(
    r"([a-c]{1,2}/){0,2}[a-zA-Z0-9é -]{1,4}\.(png|jpg|bmp|tif|gif|webp)", fullmatch=True
)
FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "gif": "GIF", "webp": "WEBP"}


@settings(max_examples=40, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=8, unique=True), st.sampled_from(KINDS), st.randoms())
def test_any_pictures_in_any_order_are_those_of_the_folder(names, kind, random):
    files = [(n, picture(i, 9, FORMATS[n.rpartition(".")[2]])) for i, n in enumerate(names)]
    with tempfile.TemporaryDirectory() as place:
        folder = unpack(Path(place) / "folder", files)
        random.shuffle(files)
        archive = pack(Path(place) / f"packed{kind}", files)
        x, paths = in_silence(folder)
        y, members = in_silence(archive)
        assert torch.equal(x, y) and y.dtype == torch.uint8
        inner = [path.relative_to(folder).as_posix() for path in paths]
        assert inner == [member.inner for member in members]
        assert sorted(path.name for path in Path(place).iterdir()) == ["folder", archive.name]


def test_several_are_one_set_in_the_order_given(tmp_path):
    parts = [
        [(f"{c}/{i}{c}.png", picture(10 * i + j)) for j, c in enumerate("ab")] for i in range(3)
    ]
    first = pack(tmp_path / "z.zip", parts[0])
    second = unpack(tmp_path / "folder", parts[1])
    third = pack(tmp_path / "a.tar.gz", parts[2])
    alone = [in_silence(source)[0] for source in (first, second, third)]
    for order in itertools.permutations(range(3)):
        sources = [(first, second, third)[i] for i in order]
        x, _ = in_silence(sources)
        assert torch.equal(x, torch.cat([alone[i] for i in order]))
        assert torch.equal(read_data([str(source) for source in sources], 8), x)

    # The same class in all of them, and paths as each source has them.
    labelled = load_labelled([third, second], 8)
    assert labelled.names == ["a", "b"] and labelled.classes.tolist() == [0, 1, 0, 1]
    assert [str(path) for path in labelled.inner] == [
        "a/2a.png",
        "b/2b.png",
        "a/1a.png",
        "b/1b.png",
    ]
    with pytest.raises(ValueError, match="z.zip is given twice"):
        load_folder([first, second, first])
    (tmp_path / "link.zip").symlink_to(first)
    with pytest.raises(ValueError, match="is given twice"):
        load_folder([first, tmp_path / "link.zip"])


@pytest.mark.parametrize("kind", ["", ".zip", ".tar"])
def test_classes_are_those_of_a_list_or_of_folders(tmp_path, kind):
    pictures = [(f"{i % 2:05}/img{i:08}.png", picture(i)) for i in range(4)]

    def labelled(number, labels, files=pictures):
        "What is read with such a dataset.json, as EDM writes it."
        listed = json.dumps({"labels": labels})
        files = [*files, ("dataset.json", listed.encode())] if labels != "absent" else files
        place = tmp_path / f"{number}{kind}"
        place = pack(place, files) if kind else unpack(place, files)
        return load_labelled(place, 8)

    names = [name for name, _ in pictures]
    result = labelled(0, [[name, label] for name, label in zip(names[::-1], (6, 0, 6, 2))])
    assert result.classes.tolist() == [2, 0, 6, 6]  # sorted: 0, 2, 1, 3
    assert result.names == list("0123456")

    # Folders with the names of classes, where nothing is listed.
    of_folders = labelled(1, "absent", [(f"{c}/{i}.png", picture(i)) for i, c in enumerate("dcd")])
    assert of_folders.names == ["c", "d"] and of_folders.classes.tolist() == [0, 1, 1]

    # No classes, in one line; the pictures can be had all the same.
    for number, (labels, says) in enumerate(
        {
            "null": (None, "lists no classes"),
            "numbers": ([1, 2], "lists no classes"),
            "vectors": ([[name, [0.1, 0.2]] for name in names], "lists no classes"),
            "fewer": ([[name, 1] for name in names[:3]], "img00000003.png has no label"),
        }.values(),
        start=2,
    ):
        with pytest.raises(ValueError, match=says) as caught:
            labelled(number, labels)
        assert "\n" not in str(caught.value)
        assert len(in_silence(tmp_path / f"{number}{kind}")[0]) == 4
    with pytest.raises(ValueError, match="x.png has no folder of a class"):
        labelled(9, "absent", [("x.png", picture(0))])


def test_cifar10_from_archives(tmp_path):
    "One picture more of each class to train on; the folder above is none of the archive's."
    (tmp_path / "test").mkdir()
    files = []
    for part, n in (("train", 3), ("test", 2)):
        for name in ("cat", "airplane", "bird"):
            files += [(f"x/{part}/{name}/{i}.png", picture(i + n, 32)) for i in range(n)]
    archive = pack(tmp_path / "test" / "cifar.zip", files)
    for part, n in (("train", 3), ("test", 2)):
        x, classes = load_cifar10(part, sources=archive)
        assert x.shape == (3 * n, 3, 32, 32)
        assert classes.tolist() == sorted(n * [0, 1, 2])
        assert torch.equal(x[0], in_silence(archive, 32)[0][0 if part == "test" else 6])


JUNK = [
    ("__MACOSX/._a.png", b"\0\5\x16\7 nothing"),
    ("._a.png", b"\0\5\x16\7 nothing"),
    (".DS_Store", b"\0\0\0\1Bud1"),
    ("Thumbs.db", b"junk"),
    ("labels.csv", b"a,1"),
    ("notes.txt", b"a picture"),
    ("code.zip", b"no archive"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_picture_is_ignored_as_in_a_folder(tmp_path, kind):
    pictures = [("a.png", picture(0)), ("b/c.png", picture(1))]
    x, _ = in_silence(pack(tmp_path / f"x{kind}", JUNK + pictures))
    assert torch.equal(x, in_silence(unpack(tmp_path / "folder", JUNK + pictures))[0])


@pytest.mark.parametrize("kind", ["", ".zip", ".tar.gz"])
def test_what_may_be_a_picture_is_named(tmp_path, kind):
    inner = pack(tmp_path / "inner.zip", [("x.png", picture(5))]).read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros((2, 8, 8, 3), np.uint8))
    files = [
        ("a.png", picture(0)),
        ("b.heic", b"junk"),
        ("c.bak", picture(1)),
        (".hidden.png", picture(2)),
        ("more.npy", array.getvalue()),
        ("album.zip", inner),
        ("run/run.json", b'{"data": "x", "fingerprint": "y"}'),
        ("run/samples-000010.png", picture(3)),
    ]
    place = tmp_path / f"x{kind}"
    place = pack(place, files) if kind else unpack(place, files)
    x, paths, words = with_one_warning(place)
    assert [path.name for path in paths] == ["a.png"] and len(x) == 1
    for part in (
        "endings that Pillow does not read here (2): b.heic, c.bak",
        "hidden (1): .hidden.png",
        "arrays, which are read when they are named (1): more.npy",
        "archives, which are read when they are named (1): album.zip",
        "folders of runs (1): run",
    ):
        assert part in words, part


def replaced_flags(path, flag):
    "Set a flag of all files in a zip file, in both of its lists of them."
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + place] |= flag
            start = content.find(mark, start + 4)
    path.write_bytes(content)


def test_damaged_and_encrypted_files_are_counted_and_named(tmp_path):
    files = [(f"{i}.png", picture(i)) for i in range(6)]
    broken = [("2.png", picture(2)[:60]), ("4.png", b""), *files[:2], files[3], files[5]]
    for kind in KINDS:
        archive = pack(tmp_path / f"x{kind}", broken)
        x, paths, words = with_one_warning(archive)
        assert [path.name for path in paths] == ["0.png", "1.png", "3.png", "5.png"]
        assert "cannot be read as images (2): 2.png [" in words and ", 4.png [" in words
    both, lines = said_by(lambda: load_folder([tmp_path / "x.zip", tmp_path / "x.tar"], 8))
    assert len(both[0]) == 8 and len(lines) == 1 and "images (4)" in lines[0]
    assert f"{tmp_path / 'x.zip'}/2.png" in lines[0]

    # None of them can be read: an error that counts, and names the first.
    secret = pack(tmp_path / "secret.zip", files)
    replaced_flags(secret, 1)
    for read in (load_folder, lambda path: read_data(str(path))):
        with pytest.warns(ImageFileWarning, match=r"\(6\): 0.png \[it is encrypted\], 1.png"):
            with pytest.raises(
                ValueError, match=r"none of the 6 images in .*secret.zip.*0.png \[it is"
            ) as caught:
                read(secret)
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="0.png cannot be read as an image: it is encrypted"):
        load_folder(secret, strict=True)


def test_no_flipped_bit_of_a_picture_is_taken_for_a_picture(tmp_path):
    files = [(f"{i}.png", picture(i)) for i in range(3)]
    whole = pack(tmp_path / "whole.zip", files, zipfile.ZIP_STORED)
    x, _ = in_silence(whole)
    content = whole.read_bytes()
    end = content.find(b"PK\1\2")
    for place in range(0, end, 5):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (tmp_path / "flipped.zip").write_bytes(flipped)
        (y, _), lines = said_by(lambda: load_folder(tmp_path / "flipped.zip", 8))
        missing = len(x) - len(y)
        assert missing == len(lines) and all(
            (y[i] == x).flatten(1).all(1).any() for i in range(len(y))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_half_an_archive_is_never_taken_for_a_whole_one(tmp_path, kind):
    files = [(f"{i}.png", picture(i)) for i in range(4)]
    whole = pack(tmp_path / f"whole{kind}", files)
    x, _ = in_silence(whole)
    content, half = whole.read_bytes(), tmp_path / f"half{kind}"

    # What follows the first block of zeros is filling.
    end = 4 * 1024 if kind == ".tar" else len(content)
    for size in (*range(0, end, max(1, end // 40)), end - 1):
        half.write_bytes(content[:size])
        try:
            (y, _), lines = said_by(lambda: load_folder(half, 8))
        except ValueError as error:
            assert "\n" not in str(error) and half.name in str(error)
            continue
        assert len(lines) == 1 and "end too early (1): half" in lines[0], size
        assert torch.equal(y, x[: len(y)])
        with pytest.raises(OSError):
            load_folder(half, 8, strict=True)


def test_a_file_that_is_cut_off_is_not_read(tmp_path):
    archive = pack(tmp_path / "x.tar", [("a.txt", b"12345678")])
    (entry,) = Archive(archive).files.values()
    assert entry.read() == b"12345678"
    archive.write_bytes(archive.read_bytes()[:515])
    with pytest.raises(EOFError, match="it is cut off"):
        entry.read()


def test_a_header_that_is_broken_is_not_the_end(tmp_path):
    files = [(f"{i}\n.png", picture(i)) for i in range(3)]
    archive = pack(tmp_path / "x.tar", files)
    content = bytearray(archive.read_bytes())
    content[1024 + 150] ^= 1  # the checksum of the second header
    archive.write_bytes(content)
    x, _, words = with_one_warning(archive)
    assert len(x) == 1 and "archives that end too early (1): x.tar [after 0\\n.png: " in words


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    # A picture that claims 80 million pixels.
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "BMP")
    claims = bytearray(file.getvalue())
    claims[18:26] = struct.pack("<ii", 20_000, 4_000)
    for kind in KINDS:
        archive = pack(tmp_path / f"x{kind}", [("a.png", picture(0)), ("b.bmp", bytes(claims))])
        _, paths, words = with_one_warning(archive)
        assert len(paths) == 1 and "b.bmp [it claims 80,000,000 pixels in" in words

    # A file that unfolds to a thousand times its size.
    archive = pack(tmp_path / "y.zip", [("a.png", picture(0)), ("b.png", bytes(30_000_000))])
    _, paths, words = with_one_warning(archive)
    assert len(paths) == 1 and "b.png [it claims 30,000,000 bytes in" in words

    # Of a tar file that is compressed everything is kept, so there has to be room.
    packed = pack(tmp_path / "y.tar.gz", [("b.png", bytes(30_000_000))])
    with pytest.raises(
        ValueError, match=r"y.tar.gz .* unpacks to more than 0.0 GB: make it a .tar"
    ):
        Archive(packed, room=29_000_000)
    plain = pack(tmp_path / "y.tar", [("b.png", bytes(30_000_000))])
    assert Archive(plain, room=0).files.keys() == {"b.png"}
    monkeypatch.setattr(datasets, "memory_of_machine", lambda: 10_000)
    with pytest.raises(ValueError, match="unpacks to more"):
        load_folder(packed)
    many = pack(tmp_path / "many.zip", [(f"{i}.png", picture(i, 4)) for i in range(9)])
    with pytest.raises(ValueError, match="9 pictures in .*many.zip, of 32×32 pixels each, need"):
        load_folder(many)


@pytest.mark.parametrize("kind", KINDS)
def test_names_lead_nowhere(tmp_path, kind):
    odd = {
        "./a.png": "a.png",
        "/etc/b.png": "etc/b.png",
        "../../c.png": "c.png",
        "d/../e/f.png": "d/e/f.png",
        "g\x1b[31m\n.png": "g\x1b[31m\n.png",
        "é/ü.png": "é/ü.png",
    }
    files = [(name, picture(i)) for i, name in enumerate(odd)]
    x, paths = in_silence(pack(tmp_path / f"x{kind}", files))
    assert sorted(path.inner for path in paths) == sorted(odd.values())
    assert [path.name for path in tmp_path.iterdir()] == [f"x{kind}"]


def test_names_in_other_alphabets(tmp_path):
    "Bytes that are no UTF-8; UTF-8 of old programs, that do not say so; folders of Windows."
    archive = pack(tmp_path / "x.tar", [("a\udcff.png", picture(0)), ("b.png", b"")])
    x, paths, words = with_one_warning(archive)
    assert len(x) == 1 and words.isprintable() and str(paths[0]).encode("utf-8", "replace")

    # Four letters of one byte become two of two bytes.
    archive = pack(tmp_path / "x.zip", [("wxyz.png", picture(0))])
    archive.write_bytes(archive.read_bytes().replace(b"wxyz", "éü".encode()))
    assert [path.inner for path in in_silence(archive)[1]] == ["éü.png"]
    archive.write_bytes(archive.read_bytes().replace("éü".encode(), b"\xffabc"))
    assert len(in_silence(archive)[1]) == 1
    with zipfile.ZipFile(archive, "w") as packed:
        info = zipfile.ZipInfo("a.png")
        info.filename, info.create_system = "cat\\a.png", 0
        packed.writestr(info, picture(0))
    assert load_labelled(archive).names == ["cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_comes_twice_is_the_last_file(tmp_path, kind):
    files = [("a.png", picture(0)), ("b.png", picture(1)), ("./a.png", picture(2))]
    x, paths, words = with_one_warning(pack(tmp_path / f"x{kind}", files))
    assert "names that come again, of which the last is read (1): a.png" in words
    assert torch.equal(x, in_silence(unpack(tmp_path / "folder", files))[0])
    assert len(paths) == 2

    # A file that is a folder, too.
    files = [("a.png", picture(0)), ("a.png/b.png", picture(1))]
    _, paths, words = with_one_warning(pack(tmp_path / f"y{kind}", files))
    assert [path.inner for path in paths] == ["a.png/b.png"]
    assert "files with the name of a folder (1): a.png" in words
    assert Archive(tmp_path / f"y{kind}").files.keys() == {"a.png/b.png"}


@pytest.mark.parametrize("kind", [".tar", ".tgz"])
def test_links_are_left_out(tmp_path, kind):
    (tmp_path / "outside.png").write_bytes(picture(9))
    archive = pack(tmp_path / f"x{kind}", [])
    with tarfile.open(archive, f"w:{'gz' if kind == '.tgz' else ''}") as packed:
        header = tarfile.TarInfo("a.png")
        header.size = len(picture(0))
        packed.addfile(header, io.BytesIO(picture(0)))
        for name, target, type_ in (
            ("b.png", str(tmp_path / "outside.png"), tarfile.SYMTYPE),
            ("c.png", "a.png", tarfile.LNKTYPE),
            ("album", "/", tarfile.SYMTYPE),
            ("notes.txt", "/etc/passwd", tarfile.SYMTYPE),
            ("d.png", "", tarfile.FIFOTYPE),
            ("e.png", "", tarfile.CHRTYPE),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = type_, target
            packed.addfile(header)
    _, paths, words = with_one_warning(archive)
    assert [path.name for path in paths] == ["a.png"]
    assert "links (3): b.png, c.png, album" in words and "regular files (2): d.png, e.png" in words

    # As zip files keep them: the target is the content.
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a.png", picture(0))
        info = zipfile.ZipInfo("b.png")
        info.external_attr = 0o120777 << 16
        packed.writestr(info, str(tmp_path / "outside.png"))
    assert "links (1): b.png" in with_one_warning(tmp_path / "x.zip")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_archive_of_pictures_is_refused_in_one_line(tmp_path, kind):
    for number, (content, says) in enumerate(
        {
            "files": (pack(tmp_path / f"empty{kind}", []).read_bytes(), "no images in"),
            "notes": (pack(tmp_path / f"n{kind}", JUNK).read_bytes(), "no images in"),
            "words": (b"this is no archive", "cannot be read as a (zip|tar) archive"),
            "nothing": (b"", "cannot be read as a (zip|tar) archive"),
            "other": (picture(0), "cannot be read as a (zip|tar) archive"),
        }.values()
    ):
        path = tmp_path / f"{number}{kind}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says) as caught:
            read_data(str(path))
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a folder, nor an archive"):
        load_folder(tmp_path / f"missing{kind}")
    (tmp_path / f"folder{kind}").mkdir()
    assert not is_archive(tmp_path / f"folder{kind}")
    unpack(tmp_path / f"folder{kind}", [("a.png", picture(0))])
    assert len(in_silence(tmp_path / f"folder{kind}")[0]) == 1


def test_only_pictures_are_joined(tmp_path):
    archive = pack(tmp_path / "X.ZIP", [("a.png", picture(0))])
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert holds_pictures(archive) and holds_pictures([archive, tmp_path])
    for other in ("digits", str(tmp_path / "a.npy"), "missing"):
        with pytest.raises(ValueError, match="only those are joined") as caught:
            read_data([str(archive), other])
        assert other in str(caught.value)
    with pytest.raises(ValueError, match="neither a folder, nor an archive"):
        read_data(str(tmp_path / "missing.zip"))
    assert len(read_data(["digits"])) == 1797
    assert [path.inner for path in picture_paths(archive)] == ["a.png"]


def test_sets_of_archives_are_compared_at_one_size(tmp_path):
    small = pack(tmp_path / "small.zip", [(f"{i}.png", picture(i, 8)) for i in range(3)])
    large = pack(tmp_path / "large.tgz", [(f"{i}.png", picture(i, 16)) for i in range(3)])
    sources = {"generated": str(small), "training": [str(large), str(small)]}
    together = read_together(sources)
    assert {name: len(x) for name, x in together.images.items()} == {"generated": 3, "training": 6}
    assert {x.shape[1:] for x in together.images.values()} == {(3, 8, 8)}
    assert together.note == "Compared at 8 pixels; scaled to that: training (16)"


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    lines = [line for line in result.stderr.splitlines() if line.startswith("cpsample: ")]
    return result.exit_code, result.output, lines


def test_commands_take_archives(tmp_path):
    files = [(f"{i:02}.png", picture(i)) for i in range(60)]
    first, second = pack(tmp_path / "a.zip", files[:10]), pack(tmp_path / "b.tar.gz", files[10:20])
    others = [pack(tmp_path / "c.tar", files[20:40]), unpack(tmp_path / "d", files[40:])]
    run = tmp_path / "run"
    words = ["train", first, second, "--out", run, "--tiny", "--size", 16, "--fit", "cut"]
    status, output, _ = call(*words)
    assert status == 0 and "Trained on 20 images" in output, output

    # The run finds its images again, in their order, and not others.
    assert run_of(run)["data"] == [str(first), str(second)]
    members = members_of(run).members
    assert torch.equal(members, load_folder([first, second], 16)[0])
    model = (run / "model.safetensors").read_bytes()
    status, _, lines = call("guard", run, "--reference", others[0], "--reference", first)
    assert status == 2 and f"--reference {others[0]}, {first}" in lines[0]
    status, _, lines = call(
        "guard", run, "--steps", 1, "--reference", others[0], "--reference", others[1]
    )
    assert status == 2 and len(lines) == 1, lines
    assert f"--reference {others[0]} --reference {others[1]} --steps 2" in lines[0]

    # Attacked, and audited, beside several archives.
    several = [word for place in others for word in ("--others", place)]
    status, output, _ = call("attack", run, *several, "--unguarded", "--limit", 20)
    assert status == 0 and "loss" in output, output
    out = tmp_path / "audit"
    held_out = [word for place in others for word in ("--held-out", place)]
    words = ["audit", first, first, second, "--out", out, "--space", "pca-64", "--no-flips"]
    status, output, _ = call(*words, *held_out)
    assert status == 1 and "10 of 10" in output and "of 40" in output, output

    # In another order they are other images; a single one is named as a folder is.
    assert call("train", second, first, "--out", run, "--tiny", "--size", 16)[0] == 2
    assert (run / "model.safetensors").read_bytes() == model
    shutil.move(second, tmp_path / "moved.tar.gz")
    status, _, lines = call("attack", run, "--unguarded")
    assert status == 2 and "b.tar.gz" in lines[0]
    single = tmp_path / "single"
    assert call("train", first, "--out", single, "--tiny", "--size", 16)[0] == 0
    assert run_of(single)["data"] == str(first)
    assert call("train", first, "digits", "--out", tmp_path / "x")[0] == 2


@pytest.mark.parametrize("command", ["train", "guard", "audit", "attack", "reproduce"])
def test_help_speaks_of_archives(command):
    status, output, _ = call(command, "--help")
    assert status == 0 and "archive" in " ".join(output.split())
