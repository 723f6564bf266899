"""Pictures of every kind that Pillow writes, read back as a browser shows them."""

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from equipoise.pipelines.media import pictures, reading
from equipoise.pipelines.media.reading import EnormousError, MediaError

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def values(path) -> list:
    """The distinct colours, in the order of the rows."""
    made = pictures.decode(path)
    assert made.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(made).reshape(-1, 3).tolist()]


def grey(path) -> list[int]:
    found = np.asarray(pictures.decode(path))
    assert (found == found[..., :1]).all()
    return found[..., 0].ravel().tolist()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("grey16.png", RAMP.astype(np.uint16) * 257),
        ("grey16.tiff", RAMP.astype(np.uint16) * 257),
        ("shifted.png", RAMP.astype(np.uint16) << 8),
        ("grey32.tiff", RAMP.astype(np.int32) * 257),
        ("grey.pgm", RAMP.astype(np.int32) * 257),
        ("unit.tiff", RAMP.astype(np.float32) / 255),
        ("bytes.tiff", RAMP.astype(np.float32)),
        ("grey8.png", RAMP),
    ],
)
def test_grey_of_any_depth_is_what_it_is_in_8_bits(name, stored, tmp_path):
    Image.fromarray(stored).save(tmp_path / name)
    assert grey(tmp_path / name) == RAMP.ravel().tolist()


def test_grey_values_that_are_of_no_depth_are_refused(tmp_path):
    for name, stored in (
        ("deep.tiff", np.array([[0, 70000]], np.int32)),
        ("below.tiff", np.array([[-1, 5]], np.int32)),
        ("hdr.tiff", np.array([[0, 900.5]], np.float32)),
        ("nan.tiff", np.array([[0, np.nan]], np.float32)),
    ):
        Image.fromarray(stored).save(tmp_path / name)
        with pytest.raises(MediaError, match=rf"{name}: cannot be read as a picture \(its values go from"):
            pictures.decode(tmp_path / name)


def test_transparency_of_every_kind_is_laid_over_white(tmp_path):
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (200, 0, 0, 255))
    half.save(tmp_path / "rgba.png")
    half.save(tmp_path / "rgba.webp", lossless=True)
    few = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    few.putpalette([9, 9, 9, 200, 0, 0])
    few.save(tmp_path / "palette.gif", transparency=0)
    few.save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.array([[[9, 9, 9], [200, 0, 0]]], np.uint8)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    for name in ("rgba.png", "rgba.webp", "palette.gif", "palette.png", "key.png"):
        assert values(tmp_path / name) == [(255, 255, 255), (200, 0, 0)], name
    Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 128)]).save(tmp_path / "la.png")
    assert values(tmp_path / "la.png") == [(127, 127, 127)], "half of white"
    Image.fromarray(np.array([[0, 51400]], np.uint16)).save(tmp_path / "deep.png", transparency=0)
    assert grey(tmp_path / "deep.png") == [255, 200]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(suffix, orientation, tmp_path):
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:12, :20] = 255  # the first quarter is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
    shown = np.asarray(pictures.decode(tmp_path / f"a{suffix}"))[..., 0] > 128
    assert shown.shape == ((24, 40) if orientation < 5 else (40, 24))
    height, width = shown.shape
    corner = [shown[y, x] for y in (2, height - 3) for x in (2, width - 3)]
    white = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]  # of the four corners
    assert [i for i, is_white in enumerate(corner) if is_white] == [white]


def test_print_colours_and_palettes_and_one_bit(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red = np.asarray(pictures.decode(tmp_path / "print.jpg"))[4, 4]
    assert red[0] > 250 and red[1] < 5 and red[2] < 5
    Image.new("RGB", (2, 2), (10, 20, 30)).quantize(2).save(tmp_path / "few.png")
    assert set(values(tmp_path / "few.png")) == {(10, 20, 30)}
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert grey(tmp_path / "bits.png") == [255, 0]
    Image.new("LAB", (2, 2), (255, 128, 128)).save(tmp_path / "lab.tiff")
    assert min(min(value) for value in values(tmp_path / "lab.tiff")) > 250, "full lightness is white"


def test_the_first_picture_of_several_is_taken(tmp_path):
    first, second = Image.new("RGB", (4, 4), (250, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 250))
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        more = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **more)
        assert set(values(tmp_path / name)) == {(250, 0, 0)}, name


def test_colours_are_converted_from_the_pictures_own_profile_to_srgb(tmp_path):
    """A profile that exchanges red and blue shows whether it was obeyed; sRGB's own changes nothing."""
    linear = np.full((4, 4, 3), 64, np.uint8)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tEMP").replace(b"bXYZ", b"rXYZ").replace(b"tEMP", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")).replace(b"sRGB", b"mine")
    for suffix in (".png", ".jpg", ".webp", ".tiff"):
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / f"a{suffix}", icc_profile=swapped)
        red, green, blue = values(tmp_path / f"a{suffix}")[0]
        assert red < 40 and green < 40 and blue > 240, suffix
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png", icc_profile=swapped)
    assert values(tmp_path / "clear.png")[0] == (255, 255, 255)
    Image.fromarray(linear).save(tmp_path / "srgb.png", icc_profile=srgb)
    Image.fromarray(linear).save(tmp_path / "other.png", icc_profile=lab.tobytes())
    Image.fromarray(linear).save(tmp_path / "broken.png", icc_profile=b"no profile")
    for name in ("srgb.png", "other.png", "broken.png"):
        assert set(values(tmp_path / name)) == {(64, 64, 64)}, name


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    with pytest.raises(EnormousError, match=r"large.png: is enormous \(300 × 300 pixels\). Make it smaller."):
        pictures.decode(tmp_path / "large.png", largest=80_000)
    assert pictures.decode(tmp_path / "large.png", largest=90_000).size == (300, 300)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "vast.png")
    with pytest.raises(EnormousError, match=r"vast.png: is enormous"):
        pictures.decode(tmp_path / "vast.png")


def test_no_other_program_draws_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(MediaError, match="cannot identify image file"):
        pictures.decode(tmp_path / "a.png")
    assert ".eps" not in pictures.suffixes() and {".png", ".jpg", ".gif", ".tif", ".webp"} <= pictures.suffixes()


def test_a_picture_is_decoded_once_within_a_run_and_anew_when_it_changes(tmp_path, monkeypatch):
    counted, decode = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda path: counted.append(path.name) or decode(path))
    for name in "ab":
        Image.new("RGB", (10, 10)).save(tmp_path / f"{name}.png")
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    pictures.open_picture(a), pictures.open_picture(a)
    assert counted == ["a.png"] * 2, "outside of a run nothing is kept"
    monkeypatch.setattr(reading, "MEMORY", 500)  # bytes: one of them fits
    counted.clear()
    with reading.decoded_once():
        with reading.decoded_once():
            assert pictures.open_picture(a) is pictures.open_picture(a)
        pictures.open_picture(a), pictures.open_picture(b), pictures.open_picture(b)
        assert counted == ["a.png", "b.png", "b.png"]
        Image.new("RGB", (8, 8)).save(a)
        assert pictures.open_picture(a).size == (8, 8)
    assert reading._kept == {}


@pytest.mark.parametrize("place", ["none", "before the pixels", "behind the pixels"])
def test_the_size_of_a_png_is_read_without_decoding_it_unless_words_stand_behind_its_pixels(
    place, tmp_path, monkeypatch
):
    path, exif, loaded = tmp_path / "made.png", Image.Exif(), []
    if place != "none":
        exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(path, exif=exif)
    if place == "behind the pixels":
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        path.write_bytes(data[:start] + data[stop:-12] + data[start:stop] + data[-12:])
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: (loaded.append(path), load(image))[1])
    assert pictures.size_of(path) == ((40, 24) if place == "none" else (24, 40))
    assert bool(loaded) == (place == "behind the pixels")
    assert pictures.size_of(path, upright=False) == (40, 24)
    assert pictures.decode(path).size == pictures.size_of(path)
