"""One decoder for every picture, in training and in prediction alike, with an audit of what it found.

Letters: H, W height and width in pixels.
"""
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import struct
import warnings
import zlib

import numpy as np
import torch

import common
from readers import file_names, pixel_cache

IMAGE_FORMATS = "JPEG PNG GIF BMP TIFF WEBP TGA".split()  # Pillow opens MPO as JPEG
TIFF_BITS_PER_SAMPLE = 258
TIFF_PHOTOMETRIC = 262
TIFF_SAMPLE_FORMAT = 339
SIGNATURES = {b"ftyphe": ".heic", b"ftypmif1": ".heif", b"ftypavi": ".avif"}  # of those that are often called .jpg
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError,
                 RuntimeError, MemoryError, struct.error, zlib.error)  # what its parsers raise on damaged files


@dataclasses.dataclass
class ImageAudit(pixel_cache.Audit):
    """Of a picture; width, height: pixels of the whole upright one."""
    width: int = 0
    height: int = 0


def perceptual_hash(image):
    """(H, W, 3) uint8 RGB -> (4,) uint64: 256 bits, which of the 16 x 16 lowest DCT frequencies exceed their median.

    Robust to resizing, recompression and brightness; not to cropping. After pHash (Zauner 2010).
    """
    import cv2
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[1:17, 1:17].ravel()
    return np.packbits(low > np.median(low) + 0.01).view(np.uint64)


def mirrored_hash(phash):
    """perceptual_hash (..., 4) of pictures -> those of their mirror images, but for frequencies near the median.

    Mirroring changes the sign of the odd horizontal frequencies, every other bit from the first on.
    """
    return phash ^ np.packbits(np.tile([1, 0], 128)).view(np.uint64)


@functools.cache
def load_pillow():
    """Pillow's Image module with our limit on the size of pictures."""
    from PIL import Image
    Image.MAX_IMAGE_PIXELS = pixel_cache.MAX_PIXELS // 2  # it raises above twice its limit, from the header alone
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image


@contextlib.contextmanager
def _open_picture(path):
    """Pillow's image of a regular file with the header read and no pixels; BadImage for whatever happens inside."""
    Image = load_pillow()
    check_file(path)
    try:
        with open(path, "rb") as handle:
            yield Image.open(handle, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise pixel_cache.BadImage(
            f"its header claims more than {pixel_cache.MAX_PIXELS // 10**6} megapixels") from error
    except Image.UnidentifiedImageError as error:
        reason = f"no picture, or a damaged header (formats read: {', '.join(IMAGE_FORMATS)})"
        raise pixel_cache.BadImage(_unread_format(path) or reason) from error
    except PILLOW_ERRORS as error:
        raise pixel_cache.BadImage(f"damaged: {common.one_line(error) or type(error).__name__}") from error


def count_pictures(path):
    """How many pictures one file holds: an animation, a stack of pages, or a JPEG, whose preview is none of its own."""
    with _open_picture(path) as image:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _unread_format(path):
    """What to do with a picture in a format that is not read, known by its first bytes; None where it is none."""
    with open(path, "rb") as handle:
        head = handle.read(16)
    for signature, suffix in SIGNATURES.items():
        if signature in head:
            return file_names.UNREAD_FORMATS[suffix]
    return file_names.UNREAD_FORMATS.get(path.suffix.lower())


def check_file(path):
    """BadImage unless the path is a file with something in it; a pipe or device would block for ever."""
    if not os.path.isfile(path):
        raise pixel_cache.BadImage("not a regular file" if os.path.exists(path) else "no such file, or out of reach")
    if not os.path.getsize(path):
        raise pixel_cache.BadImage("empty file, 0 bytes")


def scaled_size(width, height, short_side):
    """(width, height) with the short side equal to short_side, the long side rounded; None keeps the size."""
    scale = 1 if short_side is None else short_side / min(width, height)
    size = round(width * scale), round(height * scale)
    if math.prod(size) > pixel_cache.MAX_PIXELS:
        raise pixel_cache.BadImage(f"too elongated to be scaled: {width} x {height} pixels")
    return size


def resize(pixels, size):
    """Pixels (H, W, 3) -> (height, width, 3) for size (width, height): areas averaged, or cubic where they grow."""
    cv2 = common.load_opencv()
    shrinks = size[0] <= pixels.shape[1]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _sample_type(image):
    """(bits of a sample, whether it has a sign) as a TIFF says; other formats have 16 bits without one."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0], tags.get(TIFF_SAMPLE_FORMAT, (1,))[0] == 2


def _deep_values(image):
    """(H, W) integers of more than 8 bits or floats. BadImage where some are not finite."""
    values = np.asarray(image)
    if _sample_type(image) == (32, False) and values.dtype.kind == "i":
        values = values.view(np.uint32)  # Pillow holds unsigned 32-bit samples as signed
    n_bad = np.sum(~np.isfinite(values))
    if n_bad:
        raise pixel_cache.BadImage(f"has {n_bad} NaN or infinite pixels")
    return values


def _declared_range(image, values):
    """(low, high) that one picture alone tells: that of its integers up to 16 bits, so that signed zero is mid-grey.

    32-bit integers and floats declare no white: floats within 0..1 have this range,
    all else that of its values.
    """
    bits, is_signed = _sample_type(image)
    if bits <= 16:
        low = -2.0 ** (bits - 1) if is_signed else 0.0
        return low, low + 2.0**bits - 1
    low = float(values.min())
    high = float(values.max())
    if values.dtype.kind == "f" and 0 <= low and high <= 1:
        return 0.0, 1.0
    return low, high


def choose_pixel_range(paths):
    """(low, high) for all grey pictures of more than 8 bits, None where there are none; colour keeps its upper 8 bits.

    From 0 to the smallest power of two above the highest value, less 1: 0 to 4095 for 12
    bits in files of 16. Where that would leave little of the range, as for negative
    values, from the lowest to the highest value.
    """
    found = list(filter(None, pixel_cache.in_threads(_deep_range, paths)))
    if not found:
        return None
    lows, highs = zip(*found)
    low = min(lows)
    high = max(highs)
    if 0 <= low <= high / 2:
        return 0.0, 2.0 ** math.ceil(math.log2(high + 1)) - 1
    return low, high


def _deep_range(path):
    with contextlib.suppress(pixel_cache.BadImage), _open_picture(path) as image:
        if image.mode[0] in "IF":
            values = _deep_values(image)
            return float(values.min()), float(values.max())
    return None


def _grey_to_8bit(image, pixel_range):
    """uint8 (H, W) from integers of more than 8 bits or floats; None: the range that the picture declares."""
    values = _deep_values(image)
    low, high = pixel_range or _declared_range(image, values)
    scaled = (values - float(low)) * (255 / max(high - low, 1e-30))
    grey = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    is_white_zero = getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0
    return 255 - grey if is_white_zero else grey


def _to_rgb(image, pixel_range):
    """uint8 (H, W, 3) from any Pillow mode: transparency on white, CMYK by Pillow's formula without a profile."""
    if image.mode[0] in "IF":
        return np.repeat(_grey_to_8bit(image, pixel_range)[..., None], 3, axis=2)
    if "A" in image.mode or "transparency" in image.info:
        Image = load_pillow()
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _decode(path, short_side, pixel_range):
    """(pixels uint8 (H, W, 3), (width, height) of the whole upright picture); BadImage with the bare reason.

    Pillow decodes: OpenCV is a fifth faster, but returns the missing rest of a
    truncated JPEG as grey.
    """
    from PIL import ImageOps
    with _open_picture(path) as image:
        whole = image.size
        scaled_size(*whole, short_side)  # refuses before anything is allocated
        if short_side is not None:
            least = math.ceil(1.5 * short_side)
            image.draft(None, (least, least))  # a JPEG is decoded at 1/2, 1/4 or 1/8, never below this
        drafted = image.size
        image.load()
        with contextlib.suppress(*PILLOW_ERRORS):  # damaged EXIF does not damage the picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.size != drafted:
            whole = whole[::-1]
        return resize(_to_rgb(image, pixel_range), scaled_size(*whole, short_side)), whole


def load_image(path, short_side=None, pixel_range=None):
    """Decode one picture to uint8 (H, W, 3) RGB, upright, scaled so that its short side is `short_side` pixels.

    Transparency is put on white, more than 8 bits are scaled to 8 (pixel_range: the values that
    become 0 and 255, those beyond are clipped; None: as the picture declares), the first frame is
    taken. JPEGs are decoded at reduced size, at least 1.5 times the target; smaller pictures are
    enlarged. Raises BadImage: file and reason.
    """
    try:
        return _decode(path, short_side, pixel_range)[0]
    except pixel_cache.BadImage as error:
        raise pixel_cache.BadImage(f"{path}: {error}") from error


def audit_image(path, short_side, pixel_range=None):
    """(ImageAudit, pixels uint8 (H, W, 3)) of one file; pixels has no rows when the file is bad."""
    try:
        pixels, (width, height) = _decode(path, short_side, pixel_range)
    except pixel_cache.BadImage as error:
        return ImageAudit(str(path), str(error)), np.empty((0, 0, 3), np.uint8)
    audit = ImageAudit(
        path=str(path), width=width, height=height,
        file_sha=hashlib.sha256(path.read_bytes()).hexdigest(),
        pixel_sha=hashlib.sha256(pixels).hexdigest(),
        phash=perceptual_hash(pixels).tolist())
    return audit, pixels


def check_bad_files(audit, on_bad_file):
    """Indices of the good ones in a list of ImageAudit; "error" raises UserError listing all bad ones."""
    bad = [f"{found.path}: {found.error}" for found in audit if found.error]
    if bad and on_bad_file == "error":
        listed = "\n  ".join(bad)
        raise common.UserError(f"{len(bad)} of {len(audit)} pictures cannot be read. Repair or "
                               f"remove them, or pass --on_bad_file skip:\n  {listed}")
    for line in bad:
        common.print_first(f"skipped {line}")
    return [index for index, found in enumerate(audit) if not found.error]


class ImageStore(pixel_cache.PixelStore):
    """N pictures, each decoded once, served as uint8 (H, W, 3) with the given short side in pixels.

    cache: see PixelStore. pixel_range: as load_image has it; None: one for all of them, by
    choose_pixel_range. `audit` is a list of N ImageAudit. Raises BadImage for a bad picture.
    """
    item = "picture"
    smaller = "A smaller --image_size"
    audit_class = ImageAudit

    def __init__(self, paths, short_side, cache="auto", pixel_range=None):
        self.paths = paths
        self.short_side = short_side
        self.pixel_range = pixel_range or choose_pixel_range(self.paths)
        self.load_all([[row] for row in range(len(self.paths))], cache)

    def decode(self, rows):
        return [audit_image(self.paths[row], self.short_side, self.pixel_range) for row in rows]

    def decode_again(self, row):
        return load_image(self.paths[row], self.short_side, self.pixel_range)

    def estimate(self, rows):
        path = self.paths[rows[0]]
        with contextlib.suppress(pixel_cache.BadImage), _open_picture(path) as image:
            return 3 * math.prod(scaled_size(*image.size, self.short_side))
        return 0

    def cache_keys(self, rows):
        return [[self.short_side, self.pixel_range, *pixel_cache.file_stamp(self.paths[row])] for row in rows]


@dataclasses.dataclass(kw_only=True)
class StoredPictures:
    """Base of what is known of N rows with a picture each."""
    store: ImageStore
    stored: np.ndarray  # (N,) index of each picture in the store

    def picture(self, row):
        """Decoded picture of a row, uint8 (H, W, 3)."""
        return self.store[self.stored[row]]

    def audit(self, field):
        """(N,) one field of the pictures' audit, such as pixel_sha."""
        return [getattr(self.store.audit[i], field) for i in self.stored]

    @property
    def hashes(self):
        """(N, 2) content_hashes of the pictures."""
        return self.store.hashes[self.stored]


@dataclasses.dataclass(eq=False)
class Pictures(common.Samples):
    """Pictures by path for prediction; one that cannot be read is black and its `error` says why.

    short_side: of the decoded pictures, in pixels; prepare(pixels uint8 (H, W, 3), (width, height)
    of the whole picture) -> the array for the model, pickled for loader workers that are not
    forked. scale: width and height of the whole picture over those of this array. hashes (2,): the
    picture's pixel_cache.content_hashes.
    """
    rows: list  # paths
    short_side: int
    prepare: object
    pixel_range: tuple | None = None

    def __getitem__(self, key):
        _, index = key
        audit, pixels = audit_image(self.rows[index], self.short_side, self.pixel_range)
        size = audit.width, audit.height
        error = ""
        if audit.error:
            error = f"{audit.path}: {audit.error}"
            size = (self.short_side, self.short_side)
            pixels = np.zeros((*size, 3), np.uint8)
        prepared = np.ascontiguousarray(self.prepare(pixels, size))
        scale = np.array(size) / prepared.shape[1::-1]
        [hashes] = pixel_cache.content_hashes([audit.file_sha], [audit.pixel_sha])
        return {"pixels": torch.from_numpy(prepared), "scale": scale, "hashes": hashes, "error": error}
