"""Reading pictures: every quirk of real files, bad files by name, and the three caches.

    python -m pytest tests/test_images.py -q
"""
import csv
import errno
import hashlib
import importlib
import io
import multiprocessing
import os
import pickle
import pwd
import resource
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from readers import file_names, picture_files, pixel_cache

GROUP = "pictures and videos: cuts, modes, EXIF, bombs, lying headers"
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
              pytest.mark.fault(GROUP)]
ODD = Path(__file__).resolve().parents[2] / "shared" / "data" / "images_odd"
# Pillow's own tests refuse this PNG; the manifest calls it readable because it was loaded twice.
REFUSED_AGAINST_MANIFEST = {"broken_data_stream.png"}


def smooth_picture(height=96, width=128, seed=0):
    """uint8 (H, W, 3) with smooth colour and some texture, as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(coarse, np.int16) + rng.integers(-6, 7, (height, width, 3)), 0, 255).astype(np.uint8)


def save(folder, name, pixels, mode=None, **options):
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image = image.convert(mode) if mode else image
    image.save(folder / name, **options)
    return folder / name


def mean_difference(a, b):
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    return np.abs(a.astype(int) - b.astype(int)).mean()


def png_file(width, height, bits, rows):
    """An RGB PNG written by hand, whatever its header claims; rows: bytes with a filter byte before each row."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_file(samples, bits, sample_format, photometric=1):
    """Uncompressed little-endian single-strip grey TIFF written by hand, (H, W) samples."""
    data = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    height, width = samples.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
            (277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def reason(path):
    with pytest.raises(pixel_cache.BadImage) as caught:
        picture_files.load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message[len(str(path)) + 2:]


# EXIF orientation ---------------------------------------------------------

UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
           7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix, options", [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}),
                                             ("jpg", {"quality": 100, "subsampling": 0}), ("webp", {"lossless": True})])
def test_exif_orientation(tmp_path, orientation, suffix, options):
    stored = smooth_picture(40, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, f"turned.{suffix}", stored, exif=exif, **options)
    loaded = picture_files.load_image(path)
    assert mean_difference(loaded, UPRIGHT[orientation](stored)) < (1.5 if suffix == "jpg" else 1e-9)
    small = picture_files.load_image(path, 20)
    assert min(small.shape[:2]) == 20 and (small.shape[0] > small.shape[1]) == (orientation >= 5)
    audit, _ = picture_files.audit_image(path, 20)
    assert (audit.height, audit.width) == loaded.shape[:2]
    assert audit.phash == picture_files.perceptual_hash(small).tolist()


def test_nonsense_exif_leaves_the_picture(tmp_path):
    pixels = smooth_picture()
    save(tmp_path, "a.jpg", pixels, quality=95)
    clean = picture_files.load_image(tmp_path / "a.jpg")
    save(tmp_path, "a.jpg", pixels, quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert np.array_equal(picture_files.load_image(tmp_path / "a.jpg"), clean)


# Modes --------------------------------------------------------------------

def test_greyscale_palette_and_bilevel(tmp_path):
    pixels = smooth_picture()
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    loaded = picture_files.load_image(save(tmp_path, "grey.png", grey))
    assert np.array_equal(loaded, np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(pixels).quantize(64)
    pixels = picture_files.load_image(save(tmp_path, "palette.png", palette))
    assert np.array_equal(pixels, np.asarray(palette.convert("RGB")))
    two = Image.fromarray(grey).convert("1")
    assert set(np.unique(picture_files.load_image(save(tmp_path, "two.png", two)))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    image = Image.fromarray(smooth_picture()).convert(mode)
    alpha = np.zeros((96, 128), np.uint8)
    alpha[:, 40:80], alpha[:, 80:] = 128, 255
    image.putalpha(Image.fromarray(alpha))
    colour = np.asarray(image.convert("RGB"), float)
    expected = 255 + (colour - 255) * (alpha[..., None] / 255)
    loaded = picture_files.load_image(save(tmp_path, "clear.png", image))
    assert np.abs(loaded - expected).max() <= 1
    assert (loaded[:, :40] == 255).all()


def test_palette_rgb_and_grey_with_a_transparent_colour(tmp_path):
    indices = np.tile(np.repeat(np.array([0, 1], np.uint8), 8), (8, 1))
    palette = Image.frombytes("P", (16, 8), indices.tobytes())
    palette.putpalette([200, 10, 10, 10, 10, 200])
    loaded = picture_files.load_image(save(tmp_path, "p.png", palette, transparency=0))
    assert loaded[0, 0].tolist() == [255] * 3 and loaded[0, 15].tolist() == [10, 10, 200]
    loaded = picture_files.load_image(save(tmp_path, "p.gif", palette, transparency=1))
    assert loaded[0, 0].tolist() == [200, 10, 10] and loaded[0, 15].tolist() == [255] * 3
    rgb = np.full((8, 8, 3), (1, 2, 3), np.uint8)
    rgb[:, 4:] = 90
    loaded = picture_files.load_image(save(tmp_path, "rgb.png", rgb, transparency=(1, 2, 3)))
    assert loaded[0, 0].tolist() == [255] * 3 and loaded[0, 7].tolist() == [90] * 3
    loaded = picture_files.load_image(save(tmp_path, "grey.png", rgb[..., 0], transparency=90))
    assert loaded[0, 0].tolist() == [1] * 3 and loaded[0, 7].tolist() == [255] * 3
    deep = rgb[..., 0].astype(np.uint16) * 257
    loaded = picture_files.load_image(save(tmp_path, "deep.png", Image.fromarray(deep), transparency=90 * 257))
    assert loaded[0, 0].tolist() == [1] * 3 and loaded[0, 7].tolist() == [255] * 3


def test_half_transparent_palette(tmp_path):
    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([200, 0, 0, 0, 0, 100])
    loaded = picture_files.load_image(save(tmp_path, "pa.png", palette, transparency=bytes([128, 255])))
    assert np.abs(loaded[0].astype(int) - [[227, 127, 127], [0, 0, 100]]).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk(tmp_path, name):
    ink = np.zeros((32, 64, 4), np.uint8)
    ink[:, :16, 0], ink[:, 16:32, 1], ink[:, 32:48, 3] = 255, 255, 255
    image = Image.frombytes("CMYK", (64, 32), ink.tobytes())
    loaded = picture_files.load_image(save(tmp_path, name, image, **({"quality": 100} if name == "a.jpg" else {})))
    cyan, magenta, black, paper = (loaded[16, x].astype(int) for x in (8, 24, 40, 56))
    for found, expected in [(cyan, (0, 255, 255)), (magenta, (255, 0, 255)), (black, (0,) * 3), (paper, (255,) * 3)]:
        assert np.abs(found - expected).max() <= 3


# More than 8 bits ---------------------------------------------------------

def test_16_bit_is_scaled_and_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (4, 1))
    for name in ("deep.png", "deep.tif"):
        loaded = picture_files.load_image(save(tmp_path, name, Image.fromarray(ramp)))
        assert np.array_equal(loaded[0, :, 0], np.arange(256)), name
    # A 12-bit sensor stored in 16 bits is dark, not saturated: the file's depth decides, not its content.
    dark = np.full((4, 4), 4095, np.uint16)
    assert (picture_files.load_image(save(tmp_path, "dark.png", Image.fromarray(dark))) == 16).all()
    grey = np.array([[60, 60, 200]], np.uint8)
    for name, pixels in (("8.png", grey), ("16.png", grey * np.uint16(257))):
        assert (picture_files.load_image(save(tmp_path, name, Image.fromarray(pixels)))[..., 0] == grey).all(), name


def test_16_bit_rgb_png(tmp_path):
    values = np.array([[[0, 257 * 7, 65535], [32896, 257, 257 * 200]]], np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "deep.png").write_bytes(png_file(2, 1, 16, rows))
    assert picture_files.load_image(tmp_path / "deep.png").tolist() == [[[0, 7, 255], [128, 1, 200]]]


@pytest.mark.parametrize("samples, bits, sample_format, expected", [
    (np.array([[-32768, 0, 32767]], np.int16), 16, 2, [0, 128, 255]),
    (np.array([[0, 65535, 32896]], np.uint16), 16, 1, [0, 255, 128]),
    (np.array([[-100, 0, 155]], np.int32), 32, 2, [0, 100, 255]),
    (np.array([[0, 3_000_000_000, 4_000_000_000]], np.uint32), 32, 1, [0, 191, 255]),
    (np.array([[0.0, 0.2, 0.5]], np.float32), 32, 3, [0, 51, 128]),
    (np.array([[-1000.0, 0.0, 3000.0]], np.float32), 32, 3, [0, 64, 255]),
    (np.array([[7, 7, 7]], np.int32), 32, 2, [0, 0, 0]),
], ids=["int16", "uint16", "int32", "uint32", "unit float", "any float", "constant int32"])
def test_deep_tiff(tmp_path, samples, bits, sample_format, expected):
    (tmp_path / "deep.tif").write_bytes(tiff_file(samples, bits, sample_format))
    assert picture_files.load_image(tmp_path / "deep.tif")[0, :, 0].tolist() == expected


def test_white_is_zero_tiff(tmp_path):
    (tmp_path / "negative.tif").write_bytes(tiff_file(np.array([[0, 65535]], np.uint16), 16, 1, photometric=0))
    assert picture_files.load_image(tmp_path / "negative.tif")[0, :, 0].tolist() == [255, 0]


def test_float_tiff_with_nan_is_refused(tmp_path):
    (tmp_path / "nan.tif").write_bytes(tiff_file(np.array([[0, np.nan]], np.float32), 32, 3))
    assert "NaN" in reason(tmp_path / "nan.tif")


# One range for all pictures of more than 8 bits --------------------------------

def deep_pictures(folder, offset=0, n=4):
    """12-bit pictures in PNGs of 16 bits, which differ by less than one step of 256."""
    noise = np.random.default_rng(0).integers(0, 4000, (n, 16, 16))
    pictures = noise + np.arange(n)[:, None, None] * 20 + offset
    return [save(folder, f"{k}.png", pixels.astype(np.uint16)) for k, pixels in enumerate(pictures)], pictures


@pytest.mark.parametrize("offset, expected", [(0, (0, 4095)), (32768, None)])
def test_12_bits_in_16_keep_their_grey_levels(tmp_path, offset, expected):
    paths, values = deep_pictures(tmp_path, offset)
    store = picture_files.ImageStore(paths, 16)
    low, high = store.pixel_range
    assert (low, high) == (expected or (values.min(), values.max()))
    expected = np.rint((values - low) * 255 / (high - low))
    for k in range(len(paths)):
        np.testing.assert_array_equal(store[k][..., 0], expected[k])
        np.testing.assert_array_equal(picture_files.load_image(paths[k], pixel_range=store.pixel_range), store[k])
    assert f"{low:g} to {high:g}" in store.description and "--pixel_range" in store.description
    assert len({found.pixel_sha for found in store.audit}) == len(paths)


def test_the_range_is_chosen_by_all_pictures_or_by_the_flag_and_clips(tmp_path):
    paths = [save(tmp_path, f"{k}.png", np.full((8, 8), value, np.uint16)) for k, value in enumerate((100, 1000))]
    paths.append(save(tmp_path, "8bit.png", np.full((8, 8), 7, np.uint8)))
    for highest, white in ((1024, 2047), (1023, 1023), (1000, 1023)):
        save(tmp_path, "1.png", np.full((8, 8), highest, np.uint16))
        assert picture_files.choose_pixel_range(paths) == (0, white)
    assert picture_files.choose_pixel_range(paths[2:]) is None
    assert "note" not in picture_files.ImageStore(paths[2:], 8).description
    for cache in ("ram", "none"):
        store = picture_files.ImageStore(paths, 8, cache, pixel_range=[200, 600])
        assert [store[k][0, 0, 0] for k in range(3)] == [0, 255, 7]


def test_the_disk_cache_knows_the_range(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = save(tmp_path, "a.png", np.full((8, 8), 100, np.uint16))
    for pixel_range, expected in (([0, 100], 255), ([0, 400], 64)):
        assert picture_files.ImageStore([path], 8, "disk", pixel_range)[0][0, 0, 0] == expected


# Formats, frames, names ---------------------------------------------------

@pytest.mark.parametrize("name, options", [
    ("a.bmp", {}), ("a.tif", {}), ("a.TIFF", {"compression": "tiff_lzw"}), ("a.webp", {"lossless": True}),
    ("a.tga", {}), ("A.PNG", {}), ("H\u00c4NDE gr\u00fcn 01.png", {})])
def test_lossless_formats_and_names(tmp_path, name, options):
    pixels = smooth_picture()
    assert np.array_equal(picture_files.load_image(save(tmp_path, name, pixels, **options)), pixels)


def test_first_frame_of_gif_and_mpo(tmp_path):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (picture_files.load_image(tmp_path / "moving.gif") == (255, 0, 0)).all()
    frames[0].save(tmp_path / "pair.mpo", save_all=True, append_images=frames[1:], quality=100)
    assert mean_difference(picture_files.load_image(tmp_path / "pair.mpo"), np.asarray(frames[0])) < 2


def test_symlink_and_suffix_that_lies(tmp_path):
    pixels = smooth_picture()
    save(tmp_path, "real.png", pixels)
    os.symlink(tmp_path / "real.png", tmp_path / "link.jpg")
    assert np.array_equal(picture_files.load_image(tmp_path / "link.jpg"), pixels)


# Size ---------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("height, width", [(300, 517), (517, 300), (64, 64), (40, 99), (1023, 767), (257, 256)])
def test_short_side_is_exact(tmp_path, suffix, height, width):
    path = save(tmp_path, f"a.{suffix}", smooth_picture(height, width))
    found = picture_files.load_image(path, 64).shape[:2]
    scale = 64 / min(height, width)
    assert found == (round(height * scale), round(width * scale)) and min(found) == 64


def test_reduced_decoding_is_close_to_full_decoding(tmp_path):
    # Decoding at a half or a quarter averages in the frequency domain: under one grey level on photographs.
    path = save(tmp_path, "large.jpg", smooth_picture(1200, 1600), quality=92)
    reduced = picture_files.load_image(path, 256)
    full = Image.open(path).convert("RGB").resize((341, 256), Image.BOX)
    assert mean_difference(reduced, np.asarray(full)) < 1.0


def test_decoded_size_stays_above_one_and_a_half_targets(tmp_path, monkeypatch):
    path, seen = save(tmp_path, "large.jpg", smooth_picture(1200, 1600)), []
    to_rgb = picture_files._to_rgb
    monkeypatch.setattr(picture_files, "_to_rgb", lambda image, _: (seen.append(min(image.size)), to_rgb(image, _))[1])
    for short_side in (100, 101, 199, 200, 201, 400, 801, 1300):
        picture_files.load_image(path, short_side)
    assert seen == [150, 300, 300, 300, 600, 600, 1200, 1200]


# Bad files ----------------------------------------------------------------

def test_reasons_of_bad_files(tmp_path):
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is not a picture\n" * 40)
    whole = save(tmp_path, "whole.jpg", smooth_picture()).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[:len(whole) // 2])
    assert "empty" in reason(tmp_path / "zero.jpg")
    assert "no picture" in reason(tmp_path / "text.jpg")
    assert "truncated" in reason(tmp_path / "half.jpg")
    assert "no such file" in reason(tmp_path / "absent.jpg")
    assert "not a regular file" in reason(tmp_path)


@pytest.mark.parametrize("name, head, word", [
    ("a.heic", b"\0\0\0\x18ftypheic", "HEIC (iPhone): convert to JPEG"),
    ("a.jpg", b"\0\0\0\x18ftypheic", "HEIC (iPhone)"),
    ("a.jpg", b"\0\0\0\x18ftypmif1", "HEIF"), ("b.png", b"\0\0\0\x1cftypavif", "AVIF"),
    ("c.jp2", b"\0\0\0\x0cjP  \r\n", "JPEG 2000"), ("D.DCM", bytes(128) + b"DICM", "DICOM: export as PNG")])
def test_formats_that_are_not_read_are_listed_with_the_remedy(tmp_path, name, head, word):
    (tmp_path / name).write_bytes(head + bytes(200))
    assert word in reason(tmp_path / name)
    assert file_names.find_images(tmp_path) == [tmp_path / name]


def test_jfif_is_a_jpeg(tmp_path):
    save(tmp_path, "a.jpg", smooth_picture()).rename(tmp_path / "a.jfif")
    path, = file_names.find_images(tmp_path)
    assert picture_files.load_image(path).shape[2] == 3


def test_pipe_and_device_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in reason(tmp_path / "pipe.jpg")
    assert "not a regular file" in reason(Path("/dev/zero"))


def _load_in_little_memory(path, queue):
    common.load_opencv()
    picture_files.load_pillow()
    resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 2 ** 28,) * 2)
    try:
        picture_files.load_image(path, 256)
    except pixel_cache.BadImage as error:
        queue.put(str(error))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_60000_pixel_header_is_refused_without_allocating(tmp_path, kind):
    data = png_file(60000, 60000, 8, b"")
    if kind == "jpg":
        whole = save(tmp_path, "whole.jpg", smooth_picture()).read_bytes()
        start = whole.index(b"\xff\xc0") + 5
        data = whole[:start] + struct.pack(">HH", 60000, 60000) + whole[start + 4:]
    (tmp_path / "bomb").write_bytes(data)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_load_in_little_memory, args=(tmp_path / "bomb", queue))
    process.start()
    assert "200 megapixels" in queue.get(timeout=60)
    process.join()


def test_strip_that_would_be_enlarged_without_end_is_refused(tmp_path):
    path = save(tmp_path, "strip.png", np.zeros((1, 60000, 3), np.uint8))
    audit, pixels = picture_files.audit_image(path, 256)
    assert "elongated" in audit.error and pixels.size == 0
    assert picture_files.load_image(path).shape == (1, 60000, 3)


CUT_FORMATS = {
    "jpeg": ("JPEG", "RGB", {}), "progressive": ("JPEG", "RGB", {"progressive": True}), "grey": ("JPEG", "L", {}),
    "cmyk": ("JPEG", "CMYK", {}), "png": ("PNG", "RGB", {}), "rgba": ("PNG", "RGBA", {}), "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}), "tiff": ("TIFF", "RGB", {}), "lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", "RGB", {}), "tga": ("TGA", "RGB", {}), "rle": ("TGA", "RGB", {"compression": "tga_rle"})}


@pytest.mark.parametrize("kind", CUT_FORMATS)
@pytest.mark.parametrize("short_side", [None, 24])
def test_a_cut_file_is_refused_or_whole(tmp_path, cases, kind, short_side):
    format_name, mode, options = CUT_FORMATS[kind]
    stream = io.BytesIO()
    Image.fromarray(smooth_picture()).convert(mode).save(stream, format_name, **options)
    data, path = stream.getvalue(), tmp_path / "cut"
    path.write_bytes(data)
    whole = picture_files.load_image(path, short_side)
    cuts = sorted({*np.linspace(0, len(data) - 1, 40).astype(int), *range(len(data) - 12, len(data))})
    refused = 0
    for cut in cuts:
        path.write_bytes(data[:cut])
        with cases.case(GROUP):
            try:
                assert np.array_equal(picture_files.load_image(path, short_side), whole), f"{kind} cut at {cut} of {len(data)}"
            except pixel_cache.BadImage:
                refused += 1
    assert refused >= 39


def test_damaged_bytes_raise_nothing_but_bad_image(tmp_path, cases):
    rng, path = np.random.default_rng(5), tmp_path / "damaged"
    for format_name, mode, options in CUT_FORMATS.values():
        stream = io.BytesIO()
        Image.fromarray(smooth_picture(24, 32)).convert(mode).save(stream, format_name, **options)
        for _ in range(25):
            data = np.frombuffer(stream.getvalue(), np.uint8).copy()
            data[rng.integers(0, min(len(data), 300), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(data.tobytes())
            with cases.case(GROUP):
                try:
                    found = picture_files.load_image(path, 16)
                    assert found.dtype == np.uint8 and found.ndim == 3 and min(found.shape[:2]) == 16
                except pixel_cache.BadImage as error:
                    assert "\n" not in str(error)


def test_the_note_on_many_pictures_names_no_flag_of_clips(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pixel_cache, "LARGE", 0)
    picture_files.ImageStore([save(tmp_path, "a.png", smooth_picture(20, 20, 0))], 16, "none")
    said = capsys.readouterr().out
    assert "(--cache none). A smaller --image_size would take less" in said and "--fps" not in said


def test_all_bad_files_are_listed_at_once(tmp_path, capsys):
    paths = [save(tmp_path, f"{index}.png", smooth_picture(20, 20, index)) for index in range(4)]
    paths[1].write_bytes(b"")
    paths[3].write_text("text")
    audit = picture_files.ImageStore(paths, 16, "none").audit
    with pytest.raises(common.UserError) as caught:
        picture_files.check_bad_files(audit, "error")
    first, *rest = str(caught.value).splitlines()
    assert "2 of 4" in first and "--on_bad_file skip" in first
    assert len(rest) == 2 and "1.png: empty" in rest[0] and "3.png: no picture" in rest[1]
    assert picture_files.check_bad_files(audit, "skip") == [0, 2]
    assert capsys.readouterr().out.count("skipped") == 2
    assert picture_files.check_bad_files([audit[0]], "error") == [0]


@pytest.mark.skipif(not ODD.is_dir(), reason="the shared folder of odd pictures is not beside the repository")
def test_shared_odd_pictures():
    with open(ODD / "manifest.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        audit, pixels = picture_files.audit_image(ODD / row["file"], None)
        readable = row["loads_without_LOAD_TRUNCATED"] == "yes" and row["file"] not in REFUSED_AGAINST_MANIFEST
        assert (audit.error is None) == readable, f"{row['file']}: {audit.error}"
        if readable:
            width, height = map(int, row["size"].split("x"))
            turned = row["exif_orientation"].isdigit() and int(row["exif_orientation"]) >= 5
            assert pixels.shape == ((width, height, 3) if turned else (height, width, 3)), row["file"]
    upright = picture_files.load_image(ODD / "hopper.jpg", 96)
    for other in ("hopper_orientation_2.jpg", "hopper_orientation_5.jpg", "hopper_orientation_8.jpg", "hopper.webp"):
        assert mean_difference(picture_files.load_image(ODD / other, 96), upright) < 6, other
    assert (picture_files.load_image(ODD / "uint16_1_4660.tif") == round(4660 / 257)).all()


# Store and caches ---------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [save(folder, f"{index}.jpg", smooth_picture(60 + index, 90, index)) for index in range(9)]
    (folder / "bad.jpg").write_text("no picture")
    return [*paths, folder / "bad.jpg"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.mark.parametrize("cache", ["ram", "disk", "none", "auto"])
def test_every_cache_serves_the_same_pixels(pictures, cache):
    store = picture_files.ImageStore(pictures, 32, cache)
    for index, path in enumerate(pictures[:-1]):
        assert np.array_equal(store[index], picture_files.load_image(path, 32))
    with pytest.raises(pixel_cache.BadImage, match="bad.jpg: no picture"):
        store[len(pictures) - 1]
    assert len(store) == 10
    assert store.cache == ("ram" if cache == "auto" else cache) and store.description.startswith(store.cache)
    good = store.audit[3]
    assert (good.width, good.height, good.error) == (90, 63, None)
    assert good.phash == picture_files.perceptual_hash(store[3]).tolist()
    assert [bool(found.error) for found in store.audit] == [False] * 9 + [True]
    if store.cache != "none":
        with pytest.raises(ValueError, match="read-only"):
            store[0][:] = 0


def test_hashes_are_those_of_hashlib(pictures):
    store = picture_files.ImageStore(pictures, 32, "ram")
    for index, path in enumerate(pictures[:-1]):
        assert store.audit[index].file_sha == hashlib.sha256(path.read_bytes()).hexdigest()
        assert store.audit[index].pixel_sha == hashlib.sha256(store[index].tobytes()).hexdigest()


def cache_files():
    return sorted(Path(os.environ["XDG_CACHE_HOME"], "small-data-scripts").glob("*"))


def test_second_run_reads_the_disk_cache(pictures, monkeypatch):
    first = picture_files.ImageStore(pictures, 32, "disk")
    decoded, decode = [], picture_files._decode
    monkeypatch.setattr(picture_files, "_decode", lambda path, *how: (decoded.append(path), decode(path, *how))[1])
    second = picture_files.ImageStore(pictures, 32, "disk")
    assert decoded == [pictures[-1]], "only the file that was bad is looked at again"
    assert second.audit == first.audit and all(np.array_equal(first[i], second[i]) for i in range(9))
    assert len(cache_files()) == 18 and isinstance(second[0], np.memmap), "a .npy and a .json a picture"


def test_only_what_changed_is_decoded_again(pictures, monkeypatch):
    picture_files.ImageStore(pictures[:9], 32, "disk")
    save(pictures[0].parent, "2.jpg", smooth_picture(70, 70, 77))
    decoded, decode = [], picture_files._decode
    monkeypatch.setattr(picture_files, "_decode", lambda path, *how: (decoded.append(path), decode(path, *how))[1])
    changed = picture_files.ImageStore(pictures[:9], 32, "disk")
    assert decoded == [pictures[2]] and np.array_equal(changed[2], picture_files.load_image(pictures[2], 32))
    decoded.clear()
    picture_files.ImageStore(pictures[:9], 24, "disk")
    assert sorted(decoded) == pictures[:9], "another short side"


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "noise"])
def test_damaged_disk_cache_is_not_used(pictures, suffix, damage):
    store = picture_files.ImageStore(pictures, 32, "disk")
    files, expected = cache_files(), [np.array(store[index]) for index in range(9)]
    for file in (file for file in files if file.suffix == suffix):
        data = file.read_bytes()
        file.unlink()  # the first run may have it open
        if damage != "missing":
            file.write_bytes({"cut": data[:-100], "empty": b"", "noise": bytes(range(256))}[damage])
    again = picture_files.ImageStore(pictures, 32, "disk")
    assert all(np.array_equal(again[index], expected[index]) for index in range(9))
    assert again.audit == store.audit and cache_files() == files


def _open_store(paths, barrier):
    barrier.wait()
    store = picture_files.ImageStore(paths, 32, "disk")
    assert all(np.array_equal(store[row], picture_files.load_image(path, 32)) for row, path in enumerate(paths))


def test_runs_that_start_together_share_a_cache(pictures):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    runs = [context.Process(target=_open_store, args=(pictures[:9], barrier)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 4 and len(cache_files()) == 18


def test_a_failed_write_leaves_no_file(pictures, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(common.CannotSave, match=r"no space to write .*picture_.*\.npy: \d+ bytes needed, \d+ free"):
        picture_files.ImageStore(pictures, 32, "disk")
    assert cache_files() == []


def test_auto_goes_to_disk_and_then_to_none(pictures, monkeypatch):
    needed = sum(picture_files.load_image(path, 32).nbytes for path in pictures[:-1])
    monkeypatch.setattr(pixel_cache, "available_memory", lambda: 4 * needed)
    assert picture_files.ImageStore(pictures, 32).cache == "ram"
    monkeypatch.setattr(pixel_cache, "available_memory", lambda: 4 * needed - 1)
    assert picture_files.ImageStore(pictures, 32).cache == "disk"
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
    assert picture_files.ImageStore(pictures, 32).cache == "none"
    with pytest.raises(common.UserError, match="MB of writable space"):
        picture_files.ImageStore(pictures, 48, "disk")


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_forked_workers_share_the_store(pictures, cache):
    store = picture_files.ImageStore(pictures[:-1], 32, cache)
    loader = torch.utils.data.DataLoader(range(9), batch_size=None, num_workers=2, multiprocessing_context="fork",
                                         collate_fn=store.__getitem__)
    served = [np.asarray(pixels) for pixels in loader]
    assert len(served) == 9 and all(np.array_equal(served[index], store[index]) for index in range(9))


def test_available_memory_is_plausible():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 <= pixel_cache.available_memory() <= total


@pytest.mark.parametrize("machine, step, job, processes, expected", [
    (1000, "max\n", "900000\n", {}, 500_000), (1000, "700000\n", "900000\n", {}, 300_000),
    (300, "max\n", "900000\n", {}, 307_200), (1000, "max\n", "100000\n", {}, 0),
    (1000, "max\n", "900000\n", {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 250_000),
    (None, "", "", {}, 4 << 30)])
def test_memory_is_what_the_machine_and_every_group_above_leave(tmp_path, monkeypatch, machine, step, job, processes,
                                                                expected):
    """Limits of a job bind its steps too; processes on one machine share; no Linux says nothing."""
    files = {"proc/meminfo": f"MemTotal: 9999 kB\nMemAvailable:   {machine} kB\n", "proc/self/cgroup": "0::/job/step\n",
             "sys/fs/cgroup/job/step/memory.max": step, "sys/fs/cgroup/job/memory.max": job}
    for name, text in files.items() if machine else ():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).with_name("memory.current").write_text("400000\n")
    for name, value in processes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pixel_cache, "Path", lambda *parts: tmp_path / "/".join(parts).lstrip("/"))
    assert pixel_cache.available_memory() == expected


def test_store_of_nothing():
    assert len(picture_files.ImageStore([], 32, "disk")) == 0 and picture_files.ImageStore([], 32, "ram").audit == []


def test_a_user_without_a_home_needs_none(pictures, monkeypatch):
    """As in a container that is started for a number: neither HOME nor a line in /etc/passwd."""
    def unknown(_):
        raise KeyError
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert picture_files.ImageStore(pictures[:2], 32, "ram")[0].shape[0] == 32


@pytest.mark.parametrize("script, sizes", [
    ("predict_assessor", {"image_size": 32}), ("train_detector", {"min_size": 32, "max_size": 64})])
def test_pictures_to_predict_can_be_given_to_workers_that_are_not_forked(pictures, script, sizes):
    names = [("a", path) for path in pictures] if script == "predict_assessor" else pictures[0].parent
    found = importlib.import_module(script).pictures_to_predict(names, {**sizes, "pixel_range": None})
    copy = pickle.loads(pickle.dumps(found))
    assert len(copy) == len(pictures) and torch.equal(copy[0, 3]["pixels"], found[0, 3]["pixels"])


def test_opencv_is_imported_before_the_threads_begin():
    """Its import writes to the environment while libjpeg in another thread reads it: a segmentation fault in 1 of 150."""
    lines = ("import sys", "from readers import pixel_cache",
             "print(list(pixel_cache.in_threads(lambda _: 'cv2' in sys.modules, [1, 2])))")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=Path(__file__).parents[1], capture_output=True,
                          text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[True, True]"
