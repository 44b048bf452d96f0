"""Decoded pictures and clips, kept in memory or on disk, so that each file is decoded once."""
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

import common


class BadImage(common.UserError):
    """One file that cannot be used as a picture; the message is the reason."""


@dataclasses.dataclass
class ImageAudit:
    """What decoding one file found; `error` is None for a good picture, else the reason and all else is empty.

    width, height: pixels of the whole upright picture. file_sha, pixel_sha: SHA-256 of the file and of the decoded,
    resized pixels. phash: their perceptual_hash as 4 integers.
    """
    path: str
    error: str | None = None
    width: int = 0
    height: int = 0
    file_sha: str = ""
    pixel_sha: str = ""
    phash: tuple = (0, 0, 0, 0)


def available_memory():
    """Bytes this process may still take: what the machine has free, or what its cgroup (a SLURM job) leaves."""
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        group = Path("/sys/fs/cgroup", re.search(r"^0::/(.*)", Path("/proc/self/cgroup").read_text(), re.M)[1])
    except (OSError, TypeError):
        return 4 << 30  # not Linux: a careful guess
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file: no limit here
            free = min(free, int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(free, 0) // common.launched_processes()["local_size"]


class PixelStore:
    """N uint8 arrays (..., H, W, 3), each decoded once; the base of ImageStore and of the clips of train_video.py.

    cache: "ram"; "disk", one memory-mapped file in cache_dir that a second run takes up again; "none", decoded at
    each access; "auto", ram up to a quarter of the available memory, else disk, else none. `audit` is a list of N
    dataclasses with path, error, pixel_sha and phash. progress(done, total) is called after each one. Pixels from a
    cache are read-only: worker processes share them. Raises UserError for a cache in a data folder or without room.
    A subclass sets what its methods need, then calls start(); it gives _estimate, _decoded, _load, _contents and
    _still_bad, and names its items, its audit's class and the data folders.
    """
    item, file_prefix, audit_class, data_folders = "picture", "images", ImageAudit, frozenset()

    def start(self, n_items, cache, cache_dir, progress):
        """Choose the cache, then take it up or decode everything."""
        self.n_items, self.progress = n_items, progress
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "small-data-scripts")
        self.cache_dir = Path(cache_dir or home).absolute()
        if cache_dir and self.data_folders & {self.cache_dir, *self.cache_dir.parents}:
            raise common.UserError(f"cache folder {self.cache_dir} lies in a data folder; name one outside the {self.item}s")
        self.bytes = self._estimate() if cache in ("auto", "disk") else 0
        if cache == "auto":
            cache = "ram" if self.bytes <= available_memory() / 4 else "disk" if self._disk_fits() else "none"
        self.cache, self.file = cache, self._cache_file() if cache == "disk" else None
        if cache != "disk":
            self._pixels = [None] * n_items
            for index, pixels in self._decode_all():
                self._pixels[index] = pixels if cache == "ram" else None
        elif not self._open_cache():
            self._write_cache()
            assert self._open_cache(), f"{self.file} was written and does not read back"

    def __len__(self):
        return self.n_items

    def __getitem__(self, index):
        if self.audit[index].error:
            raise BadImage(f"{self.audit[index].path}: {self.audit[index].error}")
        return self._load(index) if self.cache == "none" else self._pixels[index]

    @property
    def description(self):
        """Which cache, how many items and how many MB, for the log."""
        where = f"{self.cache} cache {self.file}" if self.file else f"{self.cache} cache"
        return f"{where}: {len(self)} {self.item}s, {self.bytes / 1e6:.0f} MB decoded"

    def _threaded(self, work, items, in_flight=8):
        """Results of work(item) in order; `in_flight` items a thread at a time, so that memory stays flat."""
        threads = common.count_cores()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(items), in_flight * threads):
                yield from pool.map(work, items[start:start + in_flight * threads])

    def _disk_fits(self):
        existing = next(folder for folder in (self.cache_dir, *self.cache_dir.parents) if folder.exists())
        return os.access(existing, os.W_OK) and shutil.disk_usage(existing).free > 1.1 * self.bytes + 2 ** 26

    def _decode_all(self):
        """Yield (index, pixels) in the order of decoding; fills the audit."""
        self.audit, self.bytes = [None] * len(self), 0
        for done, (index, found, pixels) in enumerate(self._decoded(), 1):
            self.audit[index] = found
            self.bytes += pixels.nbytes
            pixels.flags.writeable = False
            if self.progress:
                self.progress(done, len(self))
            yield index, pixels

    def _cache_file(self):
        """The cache's name is a fingerprint of the files, the settings and the decoders."""
        key = json.dumps([2, [library.__version__ for library in common.imaging_libraries()], self._contents()])
        return self.cache_dir / f"{self.file_prefix}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache"

    def _write_cache(self):
        if not self._disk_fits():
            raise common.UserError(f"--cache disk needs {self.bytes / 1e6:.0f} MB of writable space in {self.cache_dir}; "
                            f"free some, set XDG_CACHE_HOME to a larger disk, or use --cache none")
        with common.explained_write_errors(self.file, self.bytes):
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            handle = tempfile.NamedTemporaryFile(dir=self.cache_dir, prefix=self.file.stem, suffix=".tmp", delete=False)
            try:
                with handle:
                    self._write_items(handle)
                os.replace(handle.name, self.file)
            finally:
                Path(handle.name).unlink(missing_ok=True)

    def _write_items(self, handle):
        """All pixels as they come, then offsets, shapes and audit as JSON, its length (8 bytes), its SHA-256 (32)."""
        places, offset = [None] * len(self), 0
        for index, pixels in self._decode_all():
            handle.write(pixels)
            places[index] = [offset, pixels.shape]
            offset += pixels.nbytes
        index = json.dumps([[*place, dataclasses.asdict(a)] for place, a in zip(places, self.audit)]).encode()
        handle.write(index + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest())
        handle.flush()
        os.fsync(handle.fileno())

    def _open_cache(self):
        """Take up the cache file; False where there is none or any part of it does not hold what it should."""
        if not self.file.is_file() or self.file.stat().st_size < 40:
            return False
        memory = np.memmap(self.file, np.uint8, "r")
        index = memory[max(-40 - int.from_bytes(memory[-40:-32].tobytes(), "little"), -len(memory)):-40].tobytes()
        if hashlib.sha256(index).digest() != memory[-32:].tobytes():
            return False
        items = json.loads(index)
        self.audit = [self.audit_class(**{**found, "phash": tuple(found["phash"])}) for *_, found in items]
        self._pixels = [memory[start:start + math.prod(shape)].reshape(shape) for start, shape, _ in items]
        self.bytes = sum(pixels.nbytes for pixels in self._pixels)
        # What could not be read then may be readable now without a change of its size and date: it is tried again.
        return all(self._still_bad(found.path) if found.error else hashlib.sha256(pixels).hexdigest() == found.pixel_sha
                   for found, pixels in zip(self.audit, self._pixels))


def file_stamp(path):
    """[absolute path, size, date in ns] of a file, or [absolute path, None]: changes when the file does."""
    state = Path(path).stat() if Path(path).is_file() else None
    return [os.path.abspath(path), *((state.st_size, state.st_mtime_ns) if state else (None,))]
