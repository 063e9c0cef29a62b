"""A folder of pictures and masks: what is read, in which order, and which file is named when one does not fit."""

from __future__ import annotations

import logging
import os

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image

from scalpel.core.pairs import find_pairs, natural
from scalpel.nodes.token_dataset import PartTokenDataset

WIDE, HIGH = 80, 64


def picture(mode="RGB", size=(WIDE, HIGH), colour=None):
    """A picture whose left half is dark and whose right half is bright."""
    image = Image.new("L", size, 40)
    image.paste(200, (size[0] // 2, 0, *size))
    return image.convert(mode) if colour is None else Image.new(mode, size, colour)


def mask(size=(WIDE, HIGH), white=255, box=(40, 16, 56, 48)):
    image = Image.new("L", size, 0)
    image.paste(white, box)
    return image


def add(folder, name, **kind):
    picture(**kind).save(folder / f"{name}.png")
    mask(kind.get("size", (WIDE, HIGH))).save(folder / f"{name}_mask.png")


def load(folder, size=0, limit=0):
    return PartTokenDataset.execute(str(folder), size, limit).args


def refusal(folder, size=0, limit=0):
    with pytest.raises(ValueError, match=r"^directory: ") as error:
        load(folder, size, limit)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- what is read


def test_pictures_come_with_their_masks_in_natural_order(tmp_path):
    for name, shade in (("a10", 100), ("a2", 20), ("A1", 10)):
        add(tmp_path, name, mode="RGB", colour=(shade, shade, shade))
    images, masks, names = load(tmp_path)
    assert names == "A1\na2\na10"
    assert images.shape == (3, HIGH, WIDE, 3)
    assert masks.shape == (3, HIGH, WIDE)
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([10, 20, 100]) / 255)
    assert masks[0, 20, 45] == 1
    assert masks[0, 0, 0] == 0


def test_two_folders_are_the_other_layout(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    picture().save(tmp_path / "images" / "head.jpg", quality=95)
    mask().save(tmp_path / "masks" / "head.png")
    images, masks, names = load(tmp_path)
    assert (len(images), len(masks), names) == (1, 1, "head")


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "PNG"])
def test_every_accepted_kind_of_file_is_read(tmp_path, suffix):
    picture().save(tmp_path / f"a.{suffix}")
    mask().save(tmp_path / f"a_mask.{suffix}")
    assert load(tmp_path)[0].shape == (1, HIGH, WIDE, 3)


def test_other_files_are_left_alone(tmp_path):
    add(tmp_path, "a")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "._a.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "folder.png").mkdir()
    assert load(tmp_path)[2] == "a"


def test_the_limit_takes_the_first_by_name(tmp_path):
    for i in range(12):
        add(tmp_path, str(i))
    assert load(tmp_path, limit=3)[2] == "0\n1\n2"


def test_a_directory_is_relative_to_the_input_folder_or_absolute_and_may_be_quoted(tmp_path, monkeypatch):
    (tmp_path / "heads").mkdir()
    add(tmp_path / "heads", "a")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    assert load("heads")[2] == load(tmp_path / "heads")[2] == load(f' "{tmp_path / "heads"}" ')[2] == "a"


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_a_picture_loses_nothing_on_its_way_to_rgb(tmp_path, mode):
    add(tmp_path, "a", mode=mode)
    expected = np.asarray(picture(mode).convert("RGB"), dtype=np.float32) / 255
    assert torch.equal(load(tmp_path)[0][0], torch.from_numpy(expected))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "RGBA", "I;16"])
def test_a_mask_is_the_same_in_every_kind_of_grey(tmp_path, mode):
    add(tmp_path, "a")
    expected = load(tmp_path)[1]
    if mode == "I;16":
        painted = Image.fromarray(np.asarray(mask(), dtype=np.uint16) * 257)
    else:
        painted = mask().convert(mode)
    painted.save(tmp_path / "a_mask.png")
    assert torch.equal(load(tmp_path)[1], expected)


def test_sixteen_bits_of_a_mask_are_all_read(tmp_path):
    add(tmp_path, "a")
    values = np.full((HIGH, WIDE), 40000, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a_mask.png")
    assert load(tmp_path)[1].unique().item() == pytest.approx(40000 / 65535)


def test_exif_orientation_is_followed_in_pictures_and_masks(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture().save(tmp_path / "a.jpg", exif=turned, quality=95)
    mask().save(tmp_path / "a_mask.png", exif=turned)
    images, masks, _ = load(tmp_path)
    assert images.shape == (1, WIDE, HIGH, 3)
    assert images[0, 10, 30, 0] < 0.3 < 0.6 < images[0, 70, 30, 0]
    assert torch.equal(masks[0], torch.from_numpy(np.rot90(np.asarray(mask(), dtype=np.float32) / 255, -1).copy()))


def test_a_size_scales_and_keeps_the_middle_square_of_picture_and_mask(tmp_path, caplog):
    add(tmp_path, "wide", size=(160, 64))
    add(tmp_path, "square", size=(64, 64))
    with caplog.at_level(logging.WARNING):
        images, masks, names = load(tmp_path, size=32)
    assert images.shape == (2, 32, 32, 3)
    assert names == "square\nwide"
    wide = images[1, :, :, 0]
    assert wide[16, 4] < 0.2 < 0.75 < wide[16, 28]  # the edge between dark and bright stays in the middle
    assert torch.allclose(masks[1, 12:20, :3], torch.ones(()), atol=0.2)  # painted from 40 on: 48 is the new left edge
    assert masks[1, :, 6:].max() == 0
    assert "wide" in caplog.text
    assert "square," not in caplog.text


# ---------------------------------------------------------------- what is refused


def test_a_folder_that_is_none_or_empty_is_named(tmp_path):
    assert "is empty; name a folder" in refusal("  ")
    assert f"{tmp_path / 'no'} is not a folder" in refusal(tmp_path / "no")
    assert "holds no pictures; accepted are .png, .jpg" in refusal(tmp_path)
    assert "is not a folder" in refusal("zero\0byte")


def test_a_missing_partner_is_named(tmp_path):
    add(tmp_path, "a")
    picture().save(tmp_path / "b.png")
    assert "b.png has no mask; b_mask.png is missing" in refusal(tmp_path)
    (tmp_path / "b.png").rename(tmp_path / "c_mask.png")
    assert "c_mask.png is the mask of no picture; 'c'" in refusal(tmp_path)


def test_one_name_for_two_files_is_refused(tmp_path):
    add(tmp_path, "a")
    picture().save(tmp_path / "a.jpg")
    assert "a.png and a.jpg have one mask between them" in refusal(tmp_path)
    (tmp_path / "a.jpg").rename(tmp_path / "a_mask.jpg")
    assert "are both masks of 'a'" in refusal(tmp_path)


def test_half_of_the_two_folders_or_a_picture_beside_them_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    assert "has a folder 'images', but no folder 'masks'" in refusal(tmp_path)
    (tmp_path / "masks").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    assert "a.png has no mask; masks/a.png is missing" in refusal(tmp_path)
    mask().save(tmp_path / "masks" / "a.png")
    picture().save(tmp_path / "loose.png")
    assert "loose.png lies beside the folders 'images' and 'masks'" in refusal(tmp_path)


def _truncated(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])


def _animated(folder):
    picture().save(folder / "a.webp", save_all=True, append_images=[picture(colour="red")], duration=100)
    (folder / "a.png").unlink()


def _see_through(file):
    def change(folder):
        image = Image.open(folder / file).convert("RGBA")
        image.putalpha(mask())
        image.save(folder / file)

    return change


BROKEN = {
    "a truncated picture": (_truncated, ["a.png cannot be read as a picture"]),
    "a text": (lambda f: (f / "a_mask.png").write_text("no"), ["a_mask.png cannot be read as a picture"]),
    "an animation": (_animated, ["a.webp", "animation of 2 pictures"]),
    "a transparent picture": (_see_through("a.png"), ["a.png is transparent in places", "background"]),
    "a transparent mask": (_see_through("a_mask.png"), ["a_mask.png is transparent", "black and white"]),
    "a print": (lambda f: picture("CMYK").save(f / "a.jpg") or (f / "a.png").unlink(), ["a.jpg", "CMYK", "RGB"]),
    "a picture of 16 bits": (
        lambda f: Image.fromarray(np.full((HIGH, WIDE), 999, np.uint16)).save(f / "a.png"),
        ["a.png", "8-bit RGB"],
    ),
    "a coloured mask": (lambda f: picture(colour="red").save(f / "a_mask.png"), ["a_mask.png is coloured", "white"]),
    "an empty mask": (lambda f: mask(white=0).save(f / "a_mask.png"), ["a_mask.png is empty", "white (255)"]),
    "a mask of labels": (lambda f: mask(white=1).save(f / "a_mask.png"), ["a_mask.png is empty", "0.00392 of 1"]),
    "a mask of another size": (
        lambda f: mask((40, 32)).save(f / "a_mask.png"),
        ["a_mask.png is 40 × 32", "a.png is 80 × 64"],
    ),
    "a picture of another size": (lambda f: add(f, "b", size=(64, 64)), ["b.png is 64 × 64", "a.png is 80 × 64"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_is_named(tmp_path, what):
    change, words = BROKEN[what]
    add(tmp_path, "a")
    change(tmp_path)
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


def test_a_part_that_the_crop_leaves_out_is_said(tmp_path):
    picture(size=(200, 64)).save(tmp_path / "a.png")
    mask((200, 64), box=(0, 0, 20, 20)).save(tmp_path / "a_mask.png")
    assert "a_mask.png is empty" in (message := refusal(tmp_path, size=64))
    assert "outside of the middle square" in message


@pytest.mark.parametrize(("size", "limit", "words"), [(-1, 0, "size: -1 is out of range"), (0, -1, "limit: -1 is out")])
def test_numbers_out_of_range_are_refused(tmp_path, size, limit, words):
    with pytest.raises(ValueError, match=words):
        load(tmp_path, size, limit)


# ---------------------------------------------------------------- again


def test_a_changed_file_changes_the_fingerprint_and_nothing_else_does(tmp_path):
    def fingerprint(size=0, limit=0):
        return PartTokenDataset.fingerprint_inputs(str(tmp_path), size, limit)

    add(tmp_path, "a")
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "note.txt").write_text("x")
    assert fingerprint() == first
    os.utime(tmp_path / "a_mask.png", ns=(1, 1))
    second = fingerprint()
    assert second != first
    add(tmp_path, "b")
    assert fingerprint() != second
    assert fingerprint(limit=1) == second
    assert fingerprint(size=64) != fingerprint()
    (tmp_path / "b_mask.png").unlink()
    assert "b.png has no mask" in fingerprint()


def test_numbers_in_names_sort_by_value_and_every_name_has_its_place():
    names = ["x", "10", "9b", "b2", "B10", "b02", "b1"]
    assert sorted(names, key=natural) == ["9b", "10", "b1", "b02", "b2", "B10", "x"]


def test_finding_pairs_reads_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a_mask.png").write_bytes(b"")
    assert [pair.name for pair in find_pairs(tmp_path)] == ["a"]
