"Images as a person has them."

import gzip
import io
import lzma
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import cpsample.practice.datasets
from cpsample.cli import app
from cpsample.core.images import first_occurrence, pixels
from cpsample.practice.datasets import (
    ImageFileWarning,
    load_array,
    load_crops,
    load_fashion,
    load_folder,
    load_images,
    picture_endings,
    read_data,
    read_idx,
    read_image,
    read_together,
    resized,
    write_idx,
)
from cpsample.practice.runs import members_of, run_of

RNG = np.random.default_rng(0)


def photo(w, h, mode="RGB"):
    return Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)


def test_mixed_folder(tmp_path):
    "Sizes, modes and depths mixed, in folders below folders, in the order of the paths."
    for i, mode in enumerate(("RGB", "L", "RGBA", "LA", "P", "CMYK", "1")):
        suffix = "tif" if mode == "CMYK" else "png"
        photo(20 + 7 * i, 50 - 5 * i, mode).save(tmp_path / f"{i}.{suffix}")
    (tmp_path / "below").mkdir()
    photo(40, 40).save(tmp_path / "below" / "x.JPEG")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for channels in (1, 3):
            x, paths = load_folder(tmp_path, 16, channels, fit="cut")
            assert x.shape == (8, channels, 16, 16) and x.dtype == torch.uint8
            assert paths == sorted(paths)


def test_transparent_is_white_whatever_colour_lies_beneath(tmp_path):
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("LA", (9, 9), (0, 0)).save(tmp_path / "b.png")
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "c.png", transparency=1)
    assert all((read_image(tmp_path / f"{n}.png", 8) == 255).all() for n in "abc")


def test_sixteen_bits_keep_the_upper_ones(tmp_path):
    half = np.full((9, 9), 32896, np.uint16)  # 128.5 / 255 of the range
    Image.fromarray(half).save(tmp_path / "half.png")
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "full.png")
    assert set(read_image(tmp_path / "half.png", 8, 1).unique().tolist()) <= {128, 129}
    assert (read_image(tmp_path / "full.png", 8) == 255).all()


@pytest.mark.parametrize("turn, corner", [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_exif_turns_the_picture(tmp_path, turn, corner):
    """A picture with a white quarter at the top left in the file.

    EXIF 3 turns by 180 degrees, 6 to the right, 8 to the left.
    """
    image, exif = Image.new("RGB", (32, 32)), Image.Exif()
    image.paste("white", (0, 0, 16, 16))
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png", 32)[0].float()
    quarters = turned.unfold(0, 16, 16).unfold(1, 16, 16).mean((2, 3))
    assert quarters[corner] == 255 and quarters.sum() == 255


def test_the_middle_square_is_taken(tmp_path):
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    x = read_image(tmp_path / "wide.png", 10)
    assert x[2, :, 1:-1].min() > 250 and x[0, :, 1:-1].max() < 5


def test_one_truncated_jpeg_among_a_thousand(tmp_path):
    for i in range(999):
        Image.fromarray(np.full((4, 4), i % 256, np.uint8)).save(tmp_path / f"{i:04}.png")
    photo(64, 64).save(tmp_path / "0500b.jpg")
    whole = (tmp_path / "0500b.jpg").read_bytes()
    (tmp_path / "0500b.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read.*0500b.jpg") as warned:
        x, paths = load_folder(tmp_path, 4, 1)
    assert len(x) == len(paths) == 999 and len(warned) == 1
    assert all((x[i] == i % 256).all() for i in (0, 499, 500, 501, 998))
    with pytest.raises(OSError, match="0500b.jpg"):
        load_folder(tmp_path, 4, 1, strict=True)


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        load_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no images in"):
        load_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 1 images"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        load_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="channels must be"):
        load_folder(tmp_path, channels=2)


def test_three_images(tmp_path):
    for i in range(3):
        photo(10, 10).save(tmp_path / f"{i}.png")
    assert load_folder(tmp_path, 8)[0].shape == (3, 3, 8, 8)


def test_idx(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array([2, 3, 4], ">i4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + values.tobytes()))
    (tmp_path / "x.xz").write_bytes(lzma.compress(header + values.tobytes()))
    for name in ("x.gz", "x.xz"):
        assert np.array_equal(read_idx(tmp_path / name).numpy(), values)


def test_the_shipped_part_of_fashion_is_sound():
    (x, y), (u, v) = load_fashion(small=True), load_fashion("test", small=True)
    assert x.shape == (3000, 1, 28, 28) and u.shape == (2000, 1, 28, 28) and x.dtype == torch.uint8
    assert (first_occurrence(torch.cat([x, u])) == torch.arange(5000)).all()
    assert y.bincount().min() > 250 and v.bincount().min() > 150
    assert 0.2 < (pixels(x).mean() + 1) / 2 < 0.35
    assert torch.equal(load_images("fashion-small")[0], x)


def test_what_is_written_as_idx_is_read_again(tmp_path):
    images, classes = load_fashion("test", small=True)
    for name, values in (("images.xz", images[:20]), ("classes.xz", classes[:20])):
        write_idx(tmp_path / name, values)
    assert torch.equal(read_idx(tmp_path / "images.xz")[:, None], images[:20])
    assert torch.equal(read_idx(tmp_path / "classes.xz").long(), classes[:20])


def test_crops_tile_the_photographs():
    from sklearn.datasets import load_sample_image

    x, photograph = load_crops(32)
    flower = np.array(load_sample_image("flower.jpg"))
    assert x.shape == (520, 3, 32, 32) and photograph.bincount().tolist() == [260, 260]
    assert np.array_equal(x[260 + 21].permute(1, 2, 0).numpy(), flower[32:64, 32:64])


def test_without_files_and_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def refuse(root, **options):
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(cpsample.practice.datasets, "CACHE", tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    with pytest.raises(OSError, match="CIFAR-10 is not in .* connect to the network") as caught:
        load_images("cifar10")
    assert "\n" not in str(caught.value)


def test_float_and_32_bit_images(tmp_path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((9, 9), 200, np.int32)).save(tmp_path / "int.tif")
    assert set(read_image(tmp_path / "float.tif", 8, 1).unique().tolist()) <= {127, 128}
    assert (read_image(tmp_path / "int.tif", 8, 1) == 200).all()


def test_hidden_folders_and_bombs(tmp_path, monkeypatch):
    (tmp_path / ".thumbnails").mkdir()
    for place in (tmp_path / ".thumbnails" / "t.png", tmp_path / "a.png", tmp_path / "big.png"):
        photo(60 if place.name == "big.png" else 9, 40).save(place)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match="big.png"):
        x, paths = load_folder(tmp_path, 8, fit="cut")
    assert [p.name for p in paths] == ["a.png"]


def test_dark_bytes_are_bytes(tmp_path):
    "Their values, 0 and 1, would be black and white as floats."
    np.save(tmp_path / "dark.npy", np.eye(4, dtype=np.uint8)[None])
    assert load_array(tmp_path / "dark.npy").max() < -0.99
    np.save(tmp_path / "floats.npy", np.eye(4, dtype=np.float32)[None])
    assert load_array(tmp_path / "floats.npy").max() == 1


def only_warning(read):
    "What read() returns, and the one warning that it gives, in one line."
    with pytest.warns(ImageFileWarning) as caught:
        result = read()
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    return result, str(caught[0].message)


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place in (data / "inside", elsewhere / "deep"):
        place.mkdir(parents=True)
        photo(9, 9).save(place / "x.png")
    links = {"loop": data, "again": data / "inside", "out": elsewhere, "to_itself": "to_itself"}
    for name, target in links.items():
        (data / name).symlink_to(target)
    (elsewhere / "back").symlink_to(data)
    x, paths = load_folder(data, 8)
    names = [path.relative_to(data).as_posix() for path in paths]
    assert names == ["inside/x.png", "out/deep/x.png"]


def test_what_is_left_out_is_named_and_counted_in_one_warning(tmp_path, monkeypatch):
    photo(9, 9).save(tmp_path / "a.jfif", "JPEG")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "red\x1b[31m\n.png").write_bytes(b"junk")
    for i in range(5):
        (tmp_path / f"{i}.heic").write_bytes(b"junk")
    photo(9, 9).save(tmp_path / "no_ending", "PNG")
    for name in ("captions.txt", "labels.json", "table.csv", "model.safetensors", ".hidden.heic"):
        (tmp_path / name).write_text("{}")

    # A folder that may not be opened (the superuser may open all of them).
    (tmp_path / "closed").mkdir()
    look = Path.iterdir

    def refuse(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    (x, paths), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert [path.name for path in paths] == ["a.jfif"]
    for part in (
        "folders that cannot be opened (1): closed [Permission denied]",
        "endings that Pillow does not read here (6): 0.heic, 1.heic, 2.heic, …",
        "no regular files (2): gone.png, pipe.png",
        "cannot be read as images (1): red\\x1b[31m\\n.png",
    ):
        assert part in words, part
    with pytest.raises(OSError, match="not all of .*heic"):
        load_folder(tmp_path, 8, strict=True)


def test_pillow_reads_more_than_the_usual_endings(tmp_path):
    assert {".png", ".jpg", ".jfif", ".tif", ".webp", ".jp2", ".tga"} <= picture_endings()
    assert not {".eps", ".pdf", ".h5", ".mpg", ".wmf"} & picture_endings()
    for ending in (".jp2", ".jpe", ".qoi"):
        photo(8, 8).save(tmp_path / f"x{ending}")
    assert len(load_folder(tmp_path, 8)[0]) == 3

    # PostScript would be handed to another program, whatever its name is.
    photo(8, 8).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    (_, paths), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert len(paths) == 3 and "x.png [its content is that of no picture]" in words


def test_sheets_of_a_run_are_no_training_images(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "other").mkdir()
    for place in (tmp_path / "a.png", run / "samples-000010.png", tmp_path / "other" / "b.png"):
        photo(9, 9).save(place)
    (run / "run.json").write_text('{"data": "x", "fingerprint": "y"}')
    (tmp_path / "other" / "run.json").write_text('{"lr": 1}')  # of another program
    (_, paths), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert "folders of runs (1): run" in words

    # A run that lies among its own images.
    (tmp_path / "run.json").write_text('{"data": "x", "fingerprint": "y"}')
    photo(9, 9).save(tmp_path / "samples-000020.png")
    (_, paths), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert "sheets of samples of a run (1): samples-000020.png" in words
    with pytest.warns(ImageFileWarning):
        assert len(load_folder(tmp_path, 8, strict=True)[0]) == 2


def test_what_pillow_warns_of_is_said_once(tmp_path, monkeypatch):
    for i in range(9):
        photo(40, 40).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (x, _), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert len(x) == 9 and "doubts about 9 of 9 pictures, first 0.png: Image size" in words


def test_the_scale_of_sixteen_bits_is_that_of_the_type(tmp_path):
    "Of its own brightest pixel it would be another one for each picture."
    for high in (255, 256, 20000):
        Image.fromarray(np.full((9, 9), high, np.uint16)).save(tmp_path / f"{high}.png")
        read = read_image(tmp_path / f"{high}.png", 8, 1).unique().tolist()
        assert read == [round(high / 257)]
    load_folder(tmp_path, 8)
    (tmp_path / "20000.png").unlink()
    (tmp_path / "256.png").unlink()
    _, words = only_warning(lambda: load_folder(tmp_path, 8))
    assert "all 1 pictures of 16 bits" in words and "no value above 255 of 65535" in words


def test_pictures_that_do_not_tell_what_is_white(tmp_path):
    low = np.float32(-1)
    for values, says in (
        (np.full((9, 9), np.nan, np.float32), "NaN"),
        (np.linspace(low, 1, 81, dtype=np.float32).reshape(9, 9), "neither 0 to 1 nor bytes"),
        (np.full((9, 9), 1000, np.int32), "32 bits"),
    ):
        Image.fromarray(values).save(tmp_path / "x.tif")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of numpy
            with pytest.raises(ValueError, match=says):
                read_image(tmp_path / "x.tif", 8)


def npy_header(shape, dtype="|u1", version=1):
    file = io.BytesIO()
    write = getattr(np.lib.format, f"write_array_header_{version}_0")
    write(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_bombs_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    "Each claims far more than there is, in the file or on the machine."
    lie = npy_header((10**5, 10**3, 10**3, 3))
    (tmp_path / "lie.npy").write_bytes(lie + bytes(12))
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("images.npy", lie)
    for name in ("lie.npy", "lie.npz"):
        with pytest.raises(ValueError, match=f"{name}.*claims 300,000,000,000 bytes .* holds"):
            load_array(tmp_path / name)

    # A header that claims to be 4 GB long itself.
    (tmp_path / "long.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="long.npy.*a header of 4,294,967,295 bytes"):
        load_array(tmp_path / "long.npy")

    # A zip file that keeps its word.
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((100, 64, 64), np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 2000
    assert len(load_array(tmp_path / "bomb.npz")) == 100
    monkeypatch.setattr(cpsample.practice.datasets, "memory_of_machine", lambda: 10**6)
    with pytest.raises(ValueError, match="bomb.npz needs 0.0 GB, this machine has"):
        load_array(tmp_path / "bomb.npz")

    # A folder of honest pictures, too many for their size, which may be that of the first.
    (tmp_path / "folder").mkdir()
    for name in "ab":
        Image.new("L", (600, 600)).save(tmp_path / "folder" / f"{name}.png")
    for size in (600, None):
        with pytest.raises(ValueError, match="2 pictures in .* of 600×600 pixels each, need"):
            load_folder(tmp_path / "folder", size, 1)

    # A picture of 60 bytes that claims 80 million pixels.
    Image.new("L", (1, 1)).save(tmp_path / "x.bmp")
    content = bytearray((tmp_path / "x.bmp").read_bytes())
    content[18:26] = np.array([20_000, 4_000], "<i4").tobytes()
    (tmp_path / "x.bmp").write_bytes(content)
    with pytest.raises(ValueError, match="claims 80,000,000 pixels in"):
        read_image(tmp_path / "x.bmp", 8)


BYTES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
UNIT = BYTES / 255.0


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"x_test": BYTES, "x_train": BYTES}, r"x_test \(6, 8, 8, 3\).*choose one.*npz:x_test"),
        ({"labels": np.zeros(6)}, r"holds no images.*got float64 \(6,\)"),
        ({"x": BYTES.astype(object)}, "holds no images"),
        ({"x": np.zeros((6, 5, 8, 8))}, "C = 1 or 3"),
        ({"x": UNIT * 1.06 - 0.03}, "-0.03 to 1.03.*clip the few"),
        ({"x": UNIT * 1.2}, "0 to 1.2.*clip the few"),
        ({"x": UNIT - 0.2}, "-0.2 to 0.8.*clip the few"),
        ({"x": UNIT * 260}, "0 to 260: images lie"),
        ({"x": UNIT * 256 - 128}, "-128 to 128: images lie"),
        ({"x": np.full((6, 8, 8), 1e300)}, "NaN or infinity"),
        ({}, "got nothing"),
    ],
)
def test_arrays_that_are_not_clear_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of numpy
        with pytest.raises(ValueError, match=says) as caught:
            load_array(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_one_of_several_arrays_is_chosen_by_its_name(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_test=BYTES[:2], x_train=BYTES, labels=np.zeros(6))
    assert len(read_data(f"{path}:x_train")) == 6 and len(load_array(f"{path}:x_test")) == 2
    with pytest.raises(ValueError, match="no array 'x', but x_test .*, x_train .*, labels"):
        read_data(f"{path}:x")
    with pytest.raises(ValueError, match="holds no images"):
        read_data(f"{path}:labels")

    # The one that may be images, or the one that is called so.
    np.savez(path, latents=np.zeros((6, 4, 8, 8)), x=BYTES)
    assert len(load_array(path)) == 6
    np.savez(path, masks=BYTES[:2], images=BYTES)
    assert len(load_array(path)) == 6


def test_sixteen_bits_in_an_array(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 4, 4), 65535, ">u2"))
    assert (load_array(tmp_path / "a.npy") == 1).all()
    np.save(tmp_path / "a.npy", np.full((2, 4, 4), 255, np.uint16))
    x, words = only_warning(lambda: load_array(tmp_path / "a.npy"))
    assert x.max() < -0.99 and "no value above 255 of 65535" in words


def test_special_files_are_never_opened(tmp_path, monkeypatch):
    for module, name in ((Image, "open"), (cpsample.practice.datasets, "_claims")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pipe was opened"))
    for name in ("a.npy", "a.png"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="no regular file"):
        load_array(tmp_path / "a.npy")
    with pytest.raises(OSError, match="no regular file"):
        read_image(tmp_path / "a.png", 8)
    with pytest.raises(ValueError, match=r"skipped: no regular files \(1\): a.png"):
        read_data(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder"):
        read_data(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("fit, share", [("cut", 1), ("squash", 0.6), ("pad", 0.6)])
def test_three_ways_to_a_square(tmp_path, fit, share):
    "A picture of 100 × 60 pixels, its middle of 60 × 60 white."
    image = Image.new("L", (100, 60))
    image.paste(255, (20, 0, 80, 60))
    image.save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png", 20, 1, fit=fit).float() / 255
    rows = {"cut": 1, "squash": 1, "pad": 0.6}[fit]
    assert abs(x.mean() - share * rows) < 0.06
    array = torch.zeros(1, 1, 60, 100, dtype=torch.uint8)
    array[..., 20:80] = 255
    assert (resized(array, 20, fit=fit)[0].float() / 255 - x).abs().max() < 0.1
    floats = resized(pixels(array), 20, fit=fit)
    assert (floats - pixels(resized(array, 20, fit=fit))).abs().max() < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder(tmp_path, 8, fit=fit)
    _, words = only_warning(lambda: load_folder(tmp_path, 8))
    assert "1 of 1 pictures" in words and "not square" in words


def test_what_is_compared_has_the_smaller_size(tmp_path):
    large, small, flat = (tmp_path / name for name in ("large", "small", "flat.npy"))
    for folder, side in ((large, 64), (small, 16)):
        folder.mkdir()
        for i in range(3):
            photo(side, side).save(folder / f"{i}.png")
    np.save(flat, RNG.integers(0, 256, (4, 24, 24), dtype=np.uint8))
    sources = {"generated": str(small), "training": str(large)}
    together = read_together(sources)
    assert {x.shape[1:] for x in together.images.values()} == {(3, 16, 16)}
    assert together.note == "Compared at 16 pixels; scaled to that: training (64)"
    assert read_together(sources, 8).note == ""

    # Arrays have a size, too, and channels.
    together = read_together({"generated": str(flat), "training": str(large)})
    assert {x.shape[1:] for x in together.images.values()} == {(1, 24, 24)}
    together = read_together({"held-out": str(flat)}, like=torch.zeros(1, 3, 12, 12))
    assert together.images["held-out"].shape == (4, 1, 12, 12)
    assert "held-out (24)" in together.note
    assert read_together({"a": str(flat), "b": str(flat)}).note == ""


def formats(folder):
    "A small file of each kind: {name: bytes}."
    image = Image.fromarray(BYTES[0])
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.gif", "a.bmp", "a.avif", "a.jp2"):
        image.save(folder / name)
    image.save(folder / "packed.tif", compression="tiff_lzw")
    Image.fromarray(UNIT[0, :, :, 0].astype(np.float32)).save(folder / "float.tif")
    np.save(folder / "a.npy", BYTES)
    np.savez(folder / "a.npz", images=BYTES)
    np.savez_compressed(folder / "packed.npz", images=BYTES, labels=np.zeros(6))
    write_idx(folder / "a.xz", torch.from_numpy(BYTES))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(content, rng):
    "The bytes of a file: cut off, with a hole, or with some of them changed."
    content, kind = bytearray(content), rng.integers(4)
    if kind == 0:
        return bytes(content[: rng.integers(len(content))])
    if kind == 1:
        start = rng.integers(len(content))
        return bytes(content[:start] + content[start + rng.integers(1, 9) :])
    end = len(content) if kind == 2 else min(80, len(content))  # often in the header
    for place in rng.integers(end, size=rng.integers(1, 6)):
        content[place] = rng.integers(256)
    return bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_an_image_or_one_line(tmp_path, seed):
    "Fourteen kinds of files, each damaged in 25 ways; larger runs found nothing else."
    (tmp_path / "whole").mkdir()
    files, rng = formats(tmp_path / "whole"), np.random.default_rng(seed)
    for name, content in files.items():
        for case in range(25):
            folder = tmp_path / f"{name}-{case}"
            folder.mkdir()
            path = folder / name
            path.write_bytes(damaged(content, rng))
            readers = {".npy": load_array, ".npz": load_array, ".xz": read_idx}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ImageFileWarning)
                    if path.suffix in readers:
                        readers[path.suffix](path)
                    else:
                        assert len(load_folder(folder, 8, strict=True)[0]) == 1
            except (ValueError, OSError) as error:
                words = str(error)
                assert name in words and "\n" not in words, (name, case, words)


def test_the_command_line_reads_two_folders_at_one_size(tmp_path, monkeypatch):
    "What was squashed is found where the others are squashed, too, and not where they are cut."
    wide, copies = tmp_path / "wide", tmp_path / "copies"
    for folder in (wide, copies):
        folder.mkdir()
    for i in range(30):
        image = photo(40, 24).resize((160, 96))
        image.save(wide / f"{i:02}.png")
        image.resize((32, 32)).save(copies / f"{i:02}.png")
    monkeypatch.chdir(tmp_path)

    def copies_found(*words):
        "The output, and how many copies the ratio test counts."
        words = ["audit", "copies", "wide", "--space", "pca-64", "--no-flips", *words]
        result = CliRunner().invoke(app, words)
        copies = int(re.search(r"ratio +(\d+) of 30", result.output)[1])
        assert result.exit_code == (1 if copies else 3), result.output
        return result.output, copies

    with pytest.warns(ImageFileWarning, match="30 of 30 pictures in wide are not square"):
        output, cut = copies_found()
    assert "Compared at 32 pixels; scaled to that: training (96)" in output
    _, squashed = copies_found("--fit", "squash")
    assert cut < 10 and squashed == 30


def test_a_run_remembers_how_its_pictures_became_squares(tmp_path):
    for i in range(4):
        photo(40, 24).save(tmp_path / f"{i}.png")
    run = tmp_path / "run"  # inside the folder of its own images
    words = ["train", tmp_path, "--out", run, "--tiny", "--size", 16, "--fit", "pad"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert run_of(run)["fit"] == "pad" and list(run.glob("samples-*.png"))
    with pytest.warns(ImageFileWarning, match=r"folders of runs \(1\): run"):
        members = members_of(run).members
    assert len(members) == 4 and (members[:, :, 0] == 0).all()
    result = CliRunner().invoke(app, ["train", "digits", "--out", "x", "--fit", "pad"])
    assert result.exit_code == 2


def animated(path, n=4):
    frames = [photo(9, 9) for _ in range(n)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_frames_after_the_first_are_left_out_aloud(tmp_path):
    for name in ("a.gif", "b.tif", "c.webp", "d.png"):
        animated(tmp_path / name)
    animated(tmp_path / "e.mpo", 2)  # a camera's, with a preview
    photo(9, 9).save(tmp_path / "f.png")
    (x, _), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert (
        len(x) == 6 and "frames after the first (4): a.gif [3], b.tif [3], c.webp [3], …" in words
    )
    with pytest.raises(OSError, match=r"not all of .* frames after the first \(4\)"):
        load_folder(tmp_path, 8, strict=True)


def test_hidden_pictures_and_arrays_are_left_out_aloud(tmp_path):
    photo(9, 9).save(tmp_path / "a.png")
    for folder in (".git", ".thumbnails", ".notes"):
        (tmp_path / folder).mkdir()
    photo(9, 9).save(tmp_path / ".git" / "x.png")
    for junk in ("._a.png", ".DS_Store", ".notes/x.png", ".x.txt"):
        (tmp_path / junk).write_bytes(b"\0\5\x16\7 nothing")
    np.save(tmp_path / "labels.npy", np.zeros(9))
    np.savez(tmp_path / "features.npz", f=np.zeros((9, 64)), names=np.array(["a"]))
    (tmp_path / "broken.npy").write_bytes(b"junk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_folder(tmp_path, 8, strict=True)[0]) == 1

    # What holds images.
    (tmp_path / ".album" / "deep").mkdir(parents=True)
    photo(9, 9).save(tmp_path / ".album" / "deep" / "x.png")
    photo(9, 9).save(tmp_path / ".x.png")
    np.save(tmp_path / "more.npy", BYTES)
    (x, _), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert len(x) == 1 and "hidden (2): .album, .x.png" in words
    assert "arrays, which are read when they are named (1): more.npy" in words
    with pytest.raises(OSError, match=r"hidden \(2\)"):
        load_folder(tmp_path, 8, strict=True)


def test_the_content_tells_a_picture_whatever_its_name(tmp_path):
    photo(9, 9).save(tmp_path / "a.png")
    endings = "bak txt bin png~ pdf tmp mp4 zip csv old".split()
    for ending in endings:
        photo(9, 9).save(tmp_path / f"x.{ending}", "PNG")
    for name, content in (
        ("P5.txt", b"P5 and P6 are my notes"),
        ("b.csv", b"BM,GM"),
        ("c.bin", b""),
    ):
        (tmp_path / name).write_bytes(content)
    (x, _), words = only_warning(lambda: load_folder(tmp_path, 8))
    assert len(x) == 1 and "endings that Pillow does not read here (10)" in words


def test_floats_of_one_folder_are_on_one_scale(tmp_path):
    "One of them is nearly black, with no value above 1.4 of 255."
    levels = {"a": 1.4, "b": 180.0, "c": 255.0}
    for name, level in levels.items():
        Image.fromarray(np.full((9, 9), level, np.float32)).save(tmp_path / f"{name}.tif")
    x, _ = load_folder(tmp_path, 8, 1)
    assert x.amax((1, 2, 3)).tolist() == [1, 180, 255]

    # From 0 to 1, also where resizing went a little beyond.
    for name, level in levels.items():
        picture = np.full((9, 9), 1.02 * level / 255, np.float32)
        Image.fromarray(picture).save(tmp_path / f"{name}.tif")
    x, _ = load_folder(tmp_path, 8, 1)
    assert x.amax((1, 2, 3)).tolist() == [1, 184, 255]


def test_oblong_arrays_are_not_cut_in_silence(tmp_path):
    np.save(tmp_path / "square.npy", BYTES)
    np.save(tmp_path / "oblong.npy", RNG.integers(0, 256, (5, 8, 12, 3), dtype=np.uint8))
    sources = {"generated": str(tmp_path / "oblong.npy"), "training": str(tmp_path / "square.npy")}
    together, words = only_warning(lambda: read_together(sources))
    assert "the 5 images in" in words and "not square (8×12), their middles are taken" in words
    assert {x.shape[-2:] for x in together.images.values()} == {(8, 8)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fit in ("cut", "squash", "pad"):
            read_together(sources, fit=fit)
        read_together({"a": sources["generated"], "b": sources["generated"]})


def test_a_size_holds_for_arrays_too(tmp_path):
    np.save(tmp_path / "a.npy", BYTES)
    together = read_together({"a": str(tmp_path / "a.npy"), "b": str(tmp_path / "a.npy")}, 4)
    assert {x.shape[-2:] for x in together.images.values()} == {(4, 4)}
    assert together.note == "Compared at 4 pixels; scaled to that: a (8), b (8)"


@pytest.mark.parametrize("shape", [(64, 64, 3), (8, 5, 1), (64, 48, 4)])
def test_one_picture_is_no_set(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="holds one picture, .* array.None. makes it one"):
        load_array(tmp_path / "a.npy")
