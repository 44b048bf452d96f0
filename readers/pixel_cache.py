"""Decoded pictures and clips, kept in memory or on disk, so that each file is decoded once."""
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import uuid
from pathlib import Path

import numpy as np

import common

MAX_PIXELS = 200_000_000  # of a picture or a frame
LARGE = 1e9  # bytes of decoded pixels that are worth a word before they are decoded
NPY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError)  # what np.load raises on bad files


class BadImage(common.UserError):
    """One file that cannot be used as a picture; the message is the reason."""


@dataclasses.dataclass
class Audit:
    """What decoding one item found; `error` is None for a good one, else the reason and all else is empty.

    file_sha, pixel_sha: SHA-256 of the file and of the decoded, resized pixels. phash:
    perceptual_hash as 4 integers.
    """
    path: str
    error: str | None = None
    file_sha: str = ""
    pixel_sha: str = ""
    phash: list | tuple = (0,) * 4


def available_memory():
    """Bytes this process may still take: what the machine has free, or what its cgroup (a SLURM job) leaves."""
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        group = re.search(r"^0::/(.*)", Path("/proc/self/cgroup").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return 4 << 30  # not Linux: a careful guess
    innermost = Path("/sys/fs/cgroup", group)
    for folder in (innermost, *innermost.parents):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file: no limit here
            limit = int((folder / "memory.max").read_text())
            free = min(free, limit - int((folder / "memory.current").read_text()))
    return max(free, 0) // common.launched_processes().local_size


def content_hashes(*columns):
    """K columns of N texts, such as digests of files -> (N, K) int64: rows that share a number share their content."""
    def number(text):
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
    return np.array([[number(text) for text in column] for column in columns], np.int64).T


class PixelStore:
    """N uint8 arrays (..., H, W, 3), each decoded once; the base of ImageStore and ClipStore.

    cache: "ram"; "disk", one .npy file an array, which later runs use again; "none",
    decoded at each access; "auto", ram up to a quarter of the available memory, else
    disk, else none. `audit` is a list of N Audits; an item with an error raises
    BadImage when it is asked for. Pixels from a cache are read-only: worker processes
    share them. Raises UserError where --cache disk has no room.

    A subclass names its item, its audit_class and what makes the items smaller, calls load_all at
    the end of its __init__, and has four methods. `rows` are the items of one file: decode(rows) ->
    [(audit, pixels)], estimate(rows) -> bytes of these pixels, and cache_keys(rows) -> [JSON types
    that decide the pixels of each row]; decode_again(row) -> pixels.
    """

    places = (itertools.repeat(""),)  # where the N items lie in their files, said in K ways; a picture is all of it
    pixel_range = None  # values that become 0 and 255, of pictures of more than 8 bits

    def load_all(self, rows_of_files, cache):
        """Choose the cache, then take every item from it or decode it."""
        n_items = sum(map(len, rows_of_files))
        self.audit = [None] * n_items
        self._kept = [None] * n_items  # arrays in ram, files on disk
        self.bytes = 0
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = Path(home, "small-data-scripts").absolute()
        sizes = list(in_threads(self.estimate, rows_of_files))
        self.cache = self._choose_cache(rows_of_files, sizes, cache)
        if sum(sizes) > LARGE:
            common.print_first(f"note: {n_items} {self.item}s take about {sum(sizes) / 1e9:.1f} GB decoded "
                               f"(--cache {self.cache}). {self.smaller} would take less")
        files = common.with_progress("decoding", in_threads(self._load, rows_of_files), len(rows_of_files))
        for loaded, rows in zip(files, rows_of_files):
            for row, (audit, n_bytes, kept) in zip(rows, loaded):
                self.audit[row] = audit
                self.bytes += n_bytes
                self._kept[row] = kept

    def __len__(self):
        return len(self.audit)

    def __getitem__(self, row):
        if self.audit[row].error:
            raise BadImage(f"{self.audit[row].path}: {self.audit[row].error}")
        if self.cache == "ram":
            return self._kept[row]
        if self.cache == "disk":
            with contextlib.suppress(*NPY_ERRORS):  # the cache folder was emptied during the run
                return np.load(self._kept[row], mmap_mode="r")
        return self.decode_again(row)

    @property
    def hashes(self):
        """(N, K + 1) content_hashes of the items: of their file and each of K `places`, and of their decoded pixels."""
        pieces = [[f"{audit.file_sha}{place}" for audit, place in zip(self.audit, each)] for each in self.places]
        return content_hashes(*pieces, [audit.pixel_sha for audit in self.audit])

    @property
    def description(self):
        """Which cache, how many items and how many MB, and the pixel_range, for the log."""
        where = f" in {self.folder}" if self.cache == "disk" else ""
        text = f"{self.cache} cache{where}: {len(self)} {self.item}s, {self.bytes / 1e6:.0f} MB decoded"
        if not self.pixel_range:
            return text
        low, high = self.pixel_range
        return (f"{text}\nnote: of grey pictures of more than 8 bits, the values {low:g} to "
                f"{high:g} became 0 to 255 (--pixel_range)")

    def _choose_cache(self, rows_of_files, sizes, cache):
        if cache == "auto" and sum(sizes) <= available_memory() / 4:
            return "ram"
        if cache in ("ram", "none"):
            return cache
        needed = sum(size for size, rows in zip(sizes, rows_of_files) if not self._from_disk(self._cache_files(rows)))
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        if os.access(existing, os.W_OK) and shutil.disk_usage(existing).free > 1.1 * needed + 2**26:
            return "disk"
        if cache == "auto":
            return "none"
        raise common.UserError(f"--cache disk needs {needed / 1e6:.0f} MB of writable space in {self.folder}; free "
                               f"some, set XDG_CACHE_HOME to a larger disk, or use --cache none")

    def _load(self, rows):
        """[(audit, bytes, array, its file or None)] of the rows of one file."""
        if self.cache != "disk":
            decoded = self.decode(rows)
            for _, pixels in decoded:
                pixels.flags.writeable = False
            return [(audit, pixels.nbytes, pixels if self.cache == "ram" else None) for audit, pixels in decoded]
        files = self._cache_files(rows)
        loaded = self._from_disk(files)
        if not loaded:
            loaded = self.decode(rows)
            for file, (audit, pixels) in zip(files, loaded):
                if not audit.error:  # a bad file may be readable in the next run
                    write_cache_file(file, audit, pixels)
        return [(audit, pixels.nbytes, file) for file, (audit, pixels) in zip(files, loaded)]

    def _cache_files(self, rows):
        import cv2
        import PIL
        versions = [10, cv2.__version__, PIL.__version__]
        keys = [json.dumps([*versions, key]).encode() for key in self.cache_keys(rows)]
        return [self.folder / f"{self.item}_{hashlib.sha256(key).hexdigest()[:32]}.npy" for key in keys]

    def _from_disk(self, files):
        """[(audit, memory-mapped pixels)] of these cache files; None where one is missing or damaged."""
        loaded = []
        try:
            for file in files:
                audit = self.audit_class(**json.loads(file.with_suffix(".json").read_text()))
                loaded.append((audit, np.load(file, mmap_mode="r")))
        except NPY_ERRORS:
            return None
        return loaded


def frames_on_disk(folder, shape):
    """uint8 frames of `shape` (G, H, W, 3), mapped from a temporary .npy file; write_cache_file gives it its own name.

    Its room is reserved first, so that a full disk is CannotSave here: within a mapped
    file it would be a crash.
    """
    path = folder / f".{uuid.uuid4()}.tmp"
    with common.explained_write_errors(folder, math.prod(shape)):
        folder.mkdir(parents=True, exist_ok=True)
        frames = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        try:
            if hasattr(os, "posix_fallocate"):  # elsewhere the file system reserves it
                with open(path, "r+b") as handle:
                    os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise
    return frames


def write_cache_file(path, audit, pixels):
    """The pixels as .npy, then what is known of them as .json of the same name."""
    about = dataclasses.asdict(audit)
    temporary = path.with_name(f".{uuid.uuid4()}.tmp")  # several runs may write the same one at once
    with common.explained_write_errors(path, pixels.nbytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(pixels, np.memmap):  # frames_on_disk
            pixels.flush()
            os.replace(pixels.filename, path)
        else:
            content = io.BytesIO()
            np.save(content, pixels)
            common.replace_file(path, content.getvalue(), temporary)
        common.replace_file(path.with_suffix(".json"), json.dumps(about).encode(), temporary)


def in_threads(work, items):
    """Yield work(item) in order, from one thread a core; after an error no further item is begun."""
    # OpenCV's import writes to the environment, and a thread that reads it then (libjpeg does) can crash the process.
    common.load_opencv()
    with concurrent.futures.ThreadPoolExecutor(common.count_cores()) as pool:
        yield from pool.map(work, items)  # which cancels what is left


def file_stamp(path):
    """[absolute path, size, date in ns] of a file, or [absolute path]: changes when the file does."""
    path = path.absolute()
    if not path.is_file():
        return [str(path)]
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]
