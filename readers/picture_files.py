"""One decoder for every picture, in training and in prediction alike, with an audit of what it found.

Letters: H, W height and width in pixels.
"""
import contextlib
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

import common
from readers import pixel_cache

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "TGA")  # Pillow opens MPO as JPEG
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError,
                 RuntimeError, MemoryError, struct.error, zlib.error)  # what its parsers raise on damaged files


def perceptual_hash(image):
    """(H, W, 3) uint8 RGB -> (4,) uint64: 256 bits, which of the 16 x 16 lowest DCT frequencies exceed their median.

    Stands resizing, recompression and brightness; not mirroring or cropping. After pHash (Zauner 2010).
    """
    import cv2
    gray = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    low = cv2.dct(gray.astype(np.float32))[1:17, 1:17].ravel()
    return np.packbits(low > np.median(low) + 0.01).view(np.uint64)


@contextlib.contextmanager
def _open_picture(path):
    """Pillow's image of a regular file with the header read and no pixels; BadImage for whatever happens inside."""
    Image = common.imaging_libraries()[1]
    try:
        if not Path(path).is_file():  # a pipe or device would block for ever
            raise pixel_cache.BadImage(f"{'not a regular file' if os.path.exists(path) else 'no such file'}")
        if not (size := Path(path).stat().st_size):
            raise pixel_cache.BadImage(f"empty file, {size} bytes")
        with open(path, "rb") as handle:
            yield Image.open(handle, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise pixel_cache.BadImage(f"its header claims more than {common.MAX_PIXELS // 10**6} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise pixel_cache.BadImage(f"no picture, or a damaged header (formats read: {', '.join(IMAGE_FORMATS)})") from error
    except PILLOW_ERRORS as error:
        raise pixel_cache.BadImage(f"damaged: {common.one_line(error) or type(error).__name__}") from error


def scaled_size(width, height, short_side):
    """(width, height) with the short side equal to short_side, the long side rounded; None keeps the size."""
    scale = 1 if short_side is None else short_side / min(width, height)
    size = round(width * scale), round(height * scale)
    if size[0] * size[1] > common.MAX_PIXELS:
        raise pixel_cache.BadImage(f"too elongated to be scaled: {width} x {height} pixels")
    return size


def _grey_to_8bit(image):
    """uint8 (H, W) from integers of more than 8 bits or floats, scaled and never clipped.

    Integers up to 16 bits: their whole range becomes 0..255, so signed zero is mid-grey. 32-bit integers and floats
    declare no white: floats within 0..1 are multiplied by 255, all else is stretched from its minimum to its maximum.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, sample_format = tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0], tags.get(TIFF_SAMPLE_FORMAT, (1,))[0]
    if bits == 32 and sample_format == 1:
        values = values.view(np.uint32)  # Pillow holds unsigned 32-bit samples as signed
    if not np.isfinite(values).all():
        raise pixel_cache.BadImage(f"has {np.sum(~np.isfinite(values))} NaN or infinite pixels")
    low, high = float(values.min()), float(values.max())
    if bits <= 16 and values.dtype.kind in "iu":
        low = -2.0 ** (bits - 1) if sample_format == 2 else 0.0
        high = low + 2.0 ** bits - 1
    elif values.dtype.kind == "f" and 0 <= low and high <= 1:
        low, high = 0.0, 1.0
    grey = np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return 255 - grey if tags.get(TIFF_PHOTOMETRIC) == 0 else grey


def _to_rgb(image):
    """uint8 (H, W, 3) from any Pillow mode: transparency on white, CMYK by Pillow's formula without a profile."""
    if image.mode[0] in "IF":
        return np.repeat(_grey_to_8bit(image)[..., None], 3, axis=2)
    if "A" in image.mode or "transparency" in image.info:
        Image, rgba = common.imaging_libraries()[1], image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _decode(path, short_side):
    """(pixels uint8 (H, W, 3), (width, height) of the whole upright picture); BadImage with the bare reason."""
    from PIL import ImageOps  # decodes, because OpenCV, a fifth faster, returns the rest of a truncated JPEG as grey
    cv2 = common.imaging_libraries()[0]
    with _open_picture(path) as image:
        whole = image.size
        scaled_size(*whole, short_side)  # refuses before anything is allocated
        if short_side is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (math.ceil(1.5 * short_side),) * 2)  # decodes at 1/2, 1/4 or 1/8, never below this
        drafted = image.size
        image.load()
        with contextlib.suppress(*PILLOW_ERRORS):  # damaged EXIF does not damage the picture
            ImageOps.exif_transpose(image, in_place=True)
        whole = whole if image.size == drafted else whole[::-1]
        pixels, size = _to_rgb(image), scaled_size(*whole, short_side)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if size[0] <= image.width else cv2.INTER_CUBIC), whole


def load_image(path, short_side=None):
    """Decode one picture to uint8 (H, W, 3) RGB, upright, scaled so that its short side is `short_side` pixels.

    Transparency is put on white, more than 8 bits are scaled to 8, the first frame is taken. JPEGs are decoded at
    reduced size, at least 1.5 times the target; smaller pictures are enlarged. Raises BadImage: file and reason.
    """
    try:
        return _decode(path, short_side)[0]
    except pixel_cache.BadImage as error:
        raise pixel_cache.BadImage(f"{path}: {error}") from error


def audit_image(path, short_side):
    """(ImageAudit, pixels uint8 (H, W, 3)) of one file; pixels has no rows when the file is bad."""
    try:
        pixels, (width, height) = _decode(path, short_side)
    except pixel_cache.BadImage as error:
        return pixel_cache.ImageAudit(str(path), str(error)), np.empty((0, 0, 3), np.uint8)
    file_sha, pixel_sha = (hashlib.sha256(data).hexdigest() for data in (Path(path).read_bytes(), pixels))
    phash = tuple(perceptual_hash(pixels).tolist())
    return pixel_cache.ImageAudit(str(path), None, width, height, file_sha, pixel_sha, phash), pixels


def check_bad_files(audit, on_bad_file):
    """Indices of the good ones in a list of ImageAudit; "error" raises UserError listing all bad ones."""
    bad = [f"  {found.path}: {found.error}" for found in audit if found.error]
    if bad and on_bad_file == "error":
        raise common.UserError(f"{len(bad)} of {len(audit)} pictures cannot be read. Mend or remove them, or pass "
                        f"--on_bad_file skip:\n" + "\n".join(bad))
    print("".join(f"skipped{line[1:]}\n" for line in bad), end="", flush=True)
    return [index for index, found in enumerate(audit) if not found.error]


class ImageStore(pixel_cache.PixelStore):
    """N pictures, each decoded once, served as uint8 (H, W, 3) with the given short side in pixels.

    cache, cache_dir, progress: see PixelStore. `audit` is a list of N ImageAudit. Raises
    BadImage for a bad picture.
    """

    def __init__(self, paths, short_side, cache="auto", cache_dir=None, progress=None):
        self.paths, self.short_side = [Path(path) for path in paths], short_side
        self.data_folders = {path.absolute().parent for path in self.paths}
        self.start(len(self.paths), cache, cache_dir, progress)

    def _estimate(self):
        return sum(self._threaded(self._decoded_bytes, self.paths))

    def _decoded_bytes(self, path):
        with contextlib.suppress(pixel_cache.BadImage), _open_picture(path) as image:
            return 3 * math.prod(scaled_size(*image.size, self.short_side))
        return 0

    def _decoded(self):
        results = self._threaded(lambda path: audit_image(path, self.short_side), self.paths)
        return ((index, *result) for index, result in enumerate(results))

    def _load(self, index):
        return load_image(self.paths[index], self.short_side)

    def _contents(self):
        return [self.short_side, [pixel_cache.file_stamp(path) for path in self.paths]]

    def _still_bad(self, path):
        return bool(audit_image(path, self.short_side)[0].error)
