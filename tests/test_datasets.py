"Images as a person has them."

import gzip
import lzma
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import cpsample.practice.datasets
from cpsample.core.images import first_occurrence, pixels
from cpsample.practice.datasets import (
    load_array,
    load_crops,
    load_fashion,
    load_folder,
    load_images,
    read_idx,
    read_image,
    write_idx,
)

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
            x, paths = load_folder(tmp_path, 16, channels)
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
    with pytest.warns(UserWarning, match="0500b.jpg.*cannot be read") as warned:
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
        x, paths = load_folder(tmp_path, 8)
    assert [p.name for p in paths] == ["a.png"]


def test_dark_bytes_are_bytes(tmp_path):
    "Their values, 0 and 1, would be black and white as floats."
    np.save(tmp_path / "dark.npy", np.eye(4, dtype=np.uint8)[None])
    assert load_array(tmp_path / "dark.npy").max() < -0.99
    np.save(tmp_path / "floats.npy", np.eye(4, dtype=np.float32)[None])
    assert load_array(tmp_path / "floats.npy").max() == 1
