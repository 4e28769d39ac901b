"""Images with an EXIF orientation: the stated size decides which frame is meant, the setting where it cannot."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from scarcenet.affine import apply
from scarcenet.data.coco import Instance
from scarcenet.data.exif import exif_turned
from scarcenet.data.images import Room, broken_images, instance_image, read_image
from scarcenet.data.loader import load_crops

Turn = Image.Transpose
UNDO = {
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE, 6: Turn.ROTATE_90, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_270,
}  # fmt: skip
SIZES = {"oblong": (40, 64), "square": (48, 48)}


def picture(size, xy):
    """(H, W, 3) with a red dot."""
    pixels = np.full((*size, 3), 90, np.uint8)
    x, y = xy
    pixels[y - 1 : y + 2, x - 1 : x + 2] = (255, 0, 0)
    return pixels


def dot_of(pixels):
    """Where the middle of the dot is, x and y."""
    red = np.asarray(pixels)[..., 0].astype(float) - np.asarray(pixels)[..., 1]
    y, x = np.nonzero(red > 80)
    return np.array([x.mean(), y.mean()])


def write(file: Path, upright, orientation, **options):
    """A file that shows `upright` once it is turned; returns the pixels as it stores them."""
    image = Image.fromarray(upright)
    stored = image.transpose(UNDO[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(file, exif=exif, **options)
    return np.asarray(stored)


def instance(file, size, **fields):
    h, w = size
    return Instance(
        id=1, image_id=1, file=file, width=w, height=h, box=(0.0, 0.0, float(w), float(h)), category="a", family="a",
        **fields,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_dot_is_where_the_keypoint_is(orientation, shape, suffix, tmp_path):
    """In both frames, by the stated size or by the setting, the dot lies on its keypoint, in the image and the crop."""
    size, file = SIZES[shape], tmp_path / f"a.{suffix}"
    upright = picture(size, (33, 9))
    options = {"png": {}, "jpg": dict(quality=98, subsampling=0), "webp": dict(lossless=True)}[suffix]
    stored = write(file, upright, orientation, **options)
    settled = orientation >= 5 and shape == "oblong"
    frames = {False: (stored.shape[:2], dot_of(stored)), True: (size, dot_of(upright))}
    for is_upright, (stated, xy) in frames.items():
        # without a stated size the setting decides alone
        assert np.abs(dot_of(read_image(file, upright=is_upright)) - xy).max() < 0.6
        for setting in (False, True) if settled else (is_upright,):
            animal = instance(file, stated, upright=setting)
            pixels = instance_image(animal)
            assert pixels.shape[:2] == stated and np.abs(dot_of(pixels) - xy).max() < 0.6
            crops = load_crops([animal], 64)
            at = apply(crops.affine, torch.tensor(xy, dtype=torch.float32)[None, None])[0, 0].numpy()
            assert np.abs(dot_of(crops.pixels[0]) - at).max() < 1.5
            assert not broken_images([animal])
            assert exif_turned([animal]) == ({file: orientation} if orientation > 1 and not settled else {})


def test_a_size_of_neither_frame_names_both(tmp_path):
    file = tmp_path / "a.jpg"
    write(file, picture((40, 64), (33, 9)), 6)
    with pytest.raises(ValueError) as error:
        read_image(file, (41, 64))
    assert (
        str(error.value)
        == f"{file}: expected 64 x 41 px as the set states, got 40 x 64 px as stored, upright 64 x 40 px"
    )
    assert exif_turned([instance(file, (41, 64))]) == {}
    write(file, picture((40, 64), (33, 9)), 1)
    with pytest.raises(ValueError, match=r"a.jpg: expected 40 x 64 px as the set states, got 64 x 40 px$"):
        read_image(file, (64, 40))


def test_files_that_are_no_images(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    animals = [instance(text, (40, 64)), instance(tmp_path / "missing.jpg", (40, 64))]
    assert exif_turned(animals) == {} and len(broken_images(animals)) == 2
    assert exif_turned([]) == {}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_turn(tmp_path):
    file, pixels = tmp_path / "a.jpg", picture((40, 64), (33, 9))
    for exif in (
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63",
    ):
        Image.fromarray(pixels).save(file, exif=exif)
        assert exif_turned([instance(file, (40, 64))]) == {}
        assert read_image(file, (40, 64), upright=True).shape == (40, 64, 3)


def test_a_tiff_comes_upright(tmp_path):
    """Pillow turns it while it decodes, and so do other readers of TIFF: its stored frame is never asked for."""
    file, pixels = tmp_path / "a.tif", picture((40, 64), (33, 9))
    stored = Image.fromarray(pixels).transpose(UNDO[6])
    stored.save(file, tiffinfo={274: 6})
    for upright in (False, True):
        assert np.array_equal(read_image(file, (40, 64), upright=upright), pixels)
    assert exif_turned([instance(file, (40, 64))]) == {}


def test_cached_crops_of_the_two_frames_have_two_names(tmp_path):
    """The frame is part of a cache file's name, and only where an image is turned."""
    cache, plain, turned = tmp_path / "cache", tmp_path / "plain.png", tmp_path / "turned.png"
    upright = picture((48, 48), (33, 9))
    write(plain, upright, 1)
    write(turned, upright, 6)
    for file, names in ((plain, 1), (turned, 2)):
        before = set(cache.glob("*")) if cache.is_dir() else set()
        for setting in (False, True):
            animal = instance(file, (48, 48), upright=setting)
            in_file, in_memory = load_crops([animal], 32, limit_mb=0, cache=cache), load_crops([animal], 32)
            assert torch.equal(in_file.pixels, in_memory.pixels)
        assert len(set(cache.glob("*")) - before) == names


def test_the_crop_box_is_what_the_network_looks_at(tmp_path):
    file = tmp_path / "a.png"
    write(file, picture((48, 48), (33, 9)), 1)
    animal = instance(file, (48, 48))
    looked = replace(animal, crop_box=(10.0, 4.0, 20.0, 20.0))
    same = replace(animal, box=(10.0, 4.0, 20.0, 20.0))
    for field in ("pixels", "affine", "crop"):
        assert torch.equal(getattr(load_crops([looked], 32), field), getattr(load_crops([same], 32), field))
    assert not torch.equal(load_crops([looked], 32).crop, load_crops([animal], 32).crop)


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("LA", "png"), ("CMYK", "jpg")])
def test_an_image_read_in_parts_is_the_whole(mode, suffix, tmp_path):
    """A large image is converted some rows at a time, and turned in place; nothing shifts or stays out."""
    file, noise = tmp_path / f"a.{suffix}", np.random.default_rng(0).integers(0, 255, (1500, 1100, 3), np.uint8)
    image, exif = Image.fromarray(noise).convert(mode), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(file, exif=exif)
    stored = image if suffix != "jpg" else Image.open(file).convert("RGB")
    upright = np.asarray(stored.transpose(Turn.ROTATE_270).convert("RGB"))
    assert np.array_equal(read_image(file, upright=True), upright)


@pytest.mark.parametrize("side", [2**13 + 1, 2**14])  # beyond our limit, and beyond Pillow's
def test_an_image_too_large_for_the_memory_is_named(side, tmp_path):
    """By its header: nothing of it is decoded."""
    file = tmp_path / "map.png"
    Image.new("1", (2**14, side)).save(file)
    with pytest.raises(ValueError, match=r"map\.png: more than 134 megapixels, too large .* make it smaller"):
        read_image(file)


def test_large_images_wait_for_each_other(tmp_path):
    """However many threads decode, they hold no more pixels than there is room; what is larger goes alone."""
    sizes, held, most = (3, 4, 5, 9, 2, 20, 1, 6, 5, 4), [], []
    files = [tmp_path / f"{n}.png" for n in range(len(sizes))]
    for size, file in zip(sizes, files, strict=True):
        Image.new("L", (1, size)).save(file)
    room = Room(10)

    def decode(size, file):
        with room(file):
            held.append(size)
            most.append(sum(held) if len(held) > 1 else 0)
            time.sleep(0.01)
            held.remove(size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, sizes, files))
    assert len(most) == len(sizes) and 0 < max(most) <= 10
