"""Frames of videos at known times, with an audit of what each file really holds, and the cache of clips.

Frames are taken by time stamp. A file is decoded from its first frame on, one thread a file, and only the frames that
are wanted are converted to RGB and scaled: seeking each frame is ten times slower. One seek, to a window late in a long
file, counts only where every stamp after it stands in the list of stamps that a whole pass has made.

Letters: N clips, G frames of the time grid, H, W height and width. Units: seconds from the start of a file.
"""
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
from pathlib import Path

import numpy as np

import common
from readers import file_names, picture_files, pixel_cache

STAMP_SLACK_SEC, SAME_STAMP_SEC = 1e-3, 1e-4  # Matroska rounds its stamps to milliseconds
SEEK_FROM_SEC, SEEK_MARGIN_SEC = 30.0, 4.0  # the margin exceeds what a decoder reorders after a key frame
MOST_GUESSED_FRAMES = 2**20  # what a header may claim before its frames are counted


class BadVideo(pixel_cache.BadImage):
    """One file that cannot be used as a video; the message is the reason."""


@dataclasses.dataclass
class VideoInfo:
    """What a whole pass over one video found; `error` is one line, or None for a good one.

    times: (n_frames,) float64 seconds since the first frame, increasing. fps: frames a second by these times.
    duration_sec: until the last frame has been shown. header_fps, header_frames: what the file claims. origin_sec: the
    first frame's own stamp. is_exact: the file's stamps increase by themselves, none had to be corrected.
    """
    path: str
    error: str | None = None
    duration_sec: float = 0.0
    n_frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    header_frames: int = 0
    header_fps: float = 0.0
    origin_sec: float = 0.0
    is_exact: bool = True


# ----------------------------------------------------------------------------------------
# Two decoders with one interface

def decoder_name():
    """The decoders in the order in which they are tried, with versions, for the log."""
    cv2, av = _decoders()
    names = []
    if cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends():
        names.append(f"OpenCV {cv2.__version__} (FFmpeg, 1 thread a file)")
    if av:
        names.append(f"PyAV {av.__version__}")
    return ", then ".join(names) or "none (OpenCV without FFmpeg)"


def _decoders():
    """(cv2, PyAV or None), both silent and with one thread."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read by OpenCV when it opens its first file
    import cv2
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        import av
    except ImportError:
        return cv2, None
    av.logging.set_level(None)
    return cv2, av


class _CvVideo:
    """One open file in OpenCV: header values, then frames() from the start or a seek. BadVideo: no frame in it."""
    can_seek = True

    def __init__(self, path):
        self.cv2 = cv2 = _decoders()[0]
        self.errors = cv2.error
        self.capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not (self.capture.isOpened() and self.capture.grab()):
            raise BadVideo(f"no video that can be opened and decoded ({os.path.getsize(path)} bytes)")
        self.fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.n_frames = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        width = self.capture.get(cv2.CAP_PROP_FRAME_WIDTH)
        height = self.capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        self.size = int(width), int(height)  # upright

    def frames(self, start_sec=0.0):
        """Yield (the frame's own stamp in seconds, function short_side -> its pixels (H, W, 3) RGB, upright)."""
        is_grabbed = True
        if start_sec:
            self.capture.set(self.cv2.CAP_PROP_POS_MSEC, 1000 * start_sec)
            is_grabbed = self.capture.grab()
        while is_grabbed:
            yield self.capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000, self._pixels
            is_grabbed = self.capture.grab()

    def _pixels(self, short_side):
        found, pixels = self.capture.retrieve()
        if not found:
            raise BadVideo(f"a decoded frame of {self.size} pixels cannot be converted")
        pixels = _shrink(pixels, self.size, short_side)
        return self.cv2.cvtColor(pixels, self.cv2.COLOR_BGR2RGB)

    def close(self):
        self.capture.release()


class _AvVideo:
    """The same in PyAV, for what OpenCV's decoder cannot open."""
    can_seek = False

    def __init__(self, path):
        self.av = _decoders()[1]
        self.errors = self.av.FFmpegError
        try:
            self.container = self.av.open(os.path.abspath(path))
            self.stream = self.container.streams.video[0]
        except (self.av.FFmpegError, IndexError, ValueError) as error:
            reason = getattr(error, "strerror", "it has no picture track")
            raise BadVideo(f"no video that can be opened: {reason}") from None
        self.stream.codec_context.thread_count = 1
        self.fps = float(self.stream.average_rate or 0)
        self.n_frames = self.stream.frames
        self.size = self.stream.codec_context.width, self.stream.codec_context.height

    def frames(self):
        """As _CvVideo.frames, always from the first frame; a file may end in the middle of one."""
        with contextlib.suppress(self.av.FFmpegError):
            for frame in self.container.decode(self.stream):
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                self.size = frame.width, frame.height
                if turns % 2:
                    self.size = frame.height, frame.width
                stamp = -1.0 if frame.time is None else frame.time
                yield stamp, functools.partial(self._pixels, frame, turns)

    def _pixels(self, frame, turns, short_side):
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), turns)
        return _shrink(np.ascontiguousarray(pixels), self.size, short_side)

    def close(self):
        self.container.close()


def _shrink(pixels, size, short_side):
    """Pixels of a frame that is shown with `size` (width, height), scaled to the short side."""
    return picture_files.resize(pixels, picture_files.scaled_size(*size, short_side))


@contextlib.contextmanager
def _open_video(path):
    """The file in the first decoder that finds a frame in it; BadVideo with the bare reason."""
    name = Path(path).name
    if name.startswith("._"):
        raise BadVideo(f"{name} is a macOS resource file, no video")
    picture_files.check_file(path)
    try:
        video = _CvVideo(path)
    except BadVideo:
        if _decoders()[1] is None:
            raise
        video = _AvVideo(path)
    try:
        if math.prod(video.size) > pixel_cache.MAX_PIXELS:
            raise BadVideo(f"its header claims {video.size[0]} x {video.size[1]} pixels")
        yield video
    except video.errors as error:
        raise BadVideo(f"damaged: {common.one_line(error)}") from None
    finally:
        video.close()


# ----------------------------------------------------------------------------------------
# Frames of a video file

def _guess(path, video):
    """VideoInfo as the header has it, constant rate and every frame there: for planning, before the pass that tells."""
    fps = video.fps
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        fps = 25.0  # the header states none that could be true
    n_frames = min(max(video.n_frames, 1), MOST_GUESSED_FRAMES)
    return _constant_rate(path, fps, n_frames, video.size, video.n_frames)


def _constant_rate(path, fps, n_frames, size, header_frames):
    width, height = size
    return VideoInfo(path=str(path), duration_sec=n_frames / fps, n_frames=n_frames, fps=fps, width=width,
                     height=height, times=np.arange(n_frames) / fps, header_frames=header_frames, header_fps=fps)


def _sweep(path, choose, short_side, until_sec=math.inf):
    """One pass from the first frame: (VideoInfo up to until_sec, {index: pixels uint8 (H, W, 3)} of those wanted).

    choose: function of the header's VideoInfo that returns the wanted indices. A frame whose stamp does not exceed the
    one before it (AVI with B-frames has such) follows that one at the header's rate.
    """
    frames = {}
    times = []
    origin_sec = 0.0
    is_exact = True
    with _open_video(path) as video:
        guess = _guess(path, video)
        wanted = choose(guess)
        step_sec = 1 / guess.header_fps
        for index, (stamp, pixels) in enumerate(video.frames()):
            if index == 0:
                origin_sec = stamp
            time = stamp - origin_sec
            if times and time <= times[-1]:
                time = times[-1] + step_sec
                is_exact = False
            times.append(time)
            if index in wanted:
                frames[index] = pixels(short_side)
            if time > until_sec + step_sec:
                break
        width, height = video.size
    if not times:
        raise BadVideo(f"{guess.header_frames} frames by its header, none that can be decoded")
    last_sec, fps = step_sec, guess.header_fps
    if len(times) > 1:
        last_sec = float(np.median(np.diff(times)))
        fps = (len(times) - 1) / times[-1]
    info = dataclasses.replace(
        guess, duration_sec=times[-1] + last_sec, n_frames=len(times), fps=fps, width=width, height=height,
        times=np.array(times), origin_sec=origin_sec, is_exact=is_exact)
    return info, frames


def _seek(path, wanted, short_side, info):
    """{index: pixels} by one seek, or None where any stamp after it is not the one that the whole pass saw."""
    frames = {}
    index = None
    start_sec = info.times[min(wanted)] - SEEK_MARGIN_SEC
    with _open_video(path) as video:
        if not video.can_seek:
            return None
        for stamp, pixels in video.frames(info.origin_sec + start_sec):
            time = stamp - info.origin_sec
            index = bisect.bisect_left(info.times, time - SAME_STAMP_SEC) if index is None else index + 1
            if index >= info.n_frames or abs(info.times[index] - time) > SAME_STAMP_SEC:
                return None
            if index in wanted:
                frames[index] = pixels(short_side)
            if index >= max(wanted):
                break
    return frames if len(frames) == len(wanted) else None


def on_screen(info, times_sec):
    """(T,) index of the frame on screen at each time; the first before the start, the last after the end.

    A frame counts from half a frame before its stamp (half the gap before it, where that is shorter), so that a rounded
    stamp does not show the frame before.
    """
    gaps = np.diff(info.times, prepend=info.times[0] - 1)
    starts = info.times - np.minimum(gaps, 1 / info.header_fps) / 2
    index = np.searchsorted(starts, np.asarray(times_sec, float) + STAMP_SLACK_SEC, "right") - 1
    return np.clip(index, 0, info.n_frames - 1)


# ----------------------------------------------------------------------------------------
# Videos, folders of frames and .npy clips alike

def probe(path, fps=25.0):
    """VideoInfo of a video file, a folder of frames or a .npy clip, read to its real end; never raises for bad files.

    fps: rate of a source that has no clock of its own.
    """
    try:
        return read_source(path, lambda _: (), None, fps)[0]
    except (common.UserError, OSError) as error:
        return VideoInfo(str(path), common.one_line(error))


def read_source(path, choose, short_side, fps):
    """(VideoInfo of the source, {index: pixels uint8 (H, W, 3) RGB, upright} of the wanted frames) in one pass.

    choose: function of a VideoInfo that returns the wanted indices. It gets what the header says, which may be wrong:
    compare with the VideoInfo that is returned. short_side: in pixels, None for the whole size. BadImage: the reason.
    """
    if not _has_no_clock(path):
        return _sweep(path, choose, short_side)
    info, source = _open_still(path, fps)
    return info, _still_frames(source, choose(info), info, short_side)


def read_again(path, wanted, short_side, info):
    """{index: pixels} of a source whose frames are known: `info` is what read_source or probe returned."""
    if _has_no_clock(path):
        return read_source(path, lambda _: wanted, short_side, info.fps)[1]
    frames = None
    if info.is_exact and info.times[min(wanted)] > SEEK_FROM_SEC:
        frames = _seek(path, wanted, short_side, info)
    return frames or _sweep(path, lambda _: wanted, short_side, info.times[max(wanted)])[1]


def _has_no_clock(path):
    return Path(path).is_dir() or Path(path).suffix.lower() == ".npy"


def _header(path, fps):
    """VideoInfo without a pass over the file."""
    if _has_no_clock(path):
        return _open_still(path, fps)[0]
    with _open_video(path) as video:
        return _guess(path, video)


def _open_still(path, fps):
    """(VideoInfo, the frames as a sequence: paths, or a memory-mapped array (T, H, W, 3)); BadVideo: the reason."""
    if Path(path).is_dir():
        frames = file_names.find_images(path)
        if not frames:
            raise BadVideo(f"a folder without pictures ({' '.join(file_names.IMAGE_SUFFIXES)})")
        height, width = picture_files.load_image(frames[0]).shape[:2]
    else:
        frames = _open_npy(path)
        height, width = frames.shape[1:3]
    return _constant_rate(path, fps, len(frames), (width, height), len(frames)), frames


def _open_npy(path):
    try:
        clip = np.load(path, mmap_mode="r", allow_pickle=False)
    except pixel_cache.NPY_ERRORS as error:
        raise BadVideo(f"no .npy array of plain numbers: {common.one_line(error)}") from None
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise BadVideo(f"expected uint8 (T, H, W, 3), found {clip.dtype} {clip.shape}")
    return clip


def _still_frames(source, wanted, info, short_side):
    """{index: pixels} of a folder or array; all frames must have the size of the first."""
    frames = {}
    size = info.width, info.height
    for index in wanted:
        frame = source[index]
        pixels = picture_files.load_image(frame) if isinstance(frame, Path) else np.asarray(frame)
        height, width = pixels.shape[:2]
        if (width, height) != size:
            raise BadVideo(f"its frames differ in size: {info.width} x {info.height} and {width} x {height} pixels")
        frames[index] = _shrink(pixels, size, short_side)
    return frames


def files_of(path):
    return file_names.find_images(path) if Path(path).is_dir() else [path]


def sha_of(files, sizes=""):
    """SHA-256 (hex) of a text and the bytes of the files, one after the other."""
    digest = hashlib.sha256(str(sizes).encode())
    for file in files:
        with open(file, "rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------
# Clips: which frames stand on the grid of a row, and their cache

@dataclasses.dataclass
class GridPlan:
    """Which frames stand on a row's grid: indices (G,) into the file; see ClipAudit for the others."""
    indices: np.ndarray
    first: int
    usable: int
    past_end: bool


def plan_grid(info, window, grid, fps, n_frames, jitter_sec=0.0):
    """GridPlan of one window (start, end) in seconds, NaN = from the start, to the end of the file.

    "rate": a frame every 1 / fps s; a window too short for n_frames of them is widened around its centre and shifted
    into the file, whose last frame is repeated where it is shorter still; up to jitter_sec more on either side.
    "even": up to n_frames evenly from the first to the last frame of the window, all of them where it has fewer.
    """
    start, end = window
    start = 0.0 if math.isnan(start) else start
    end = math.inf if math.isnan(end) else end
    past_end = start >= info.duration_sec
    end = min(max(end, 0.0), info.duration_sec)
    start = min(max(start, 0.0), end)
    if grid == "even":
        indices = _even_indices(info, start, end, n_frames)
        return GridPlan(indices, first=0, usable=len(indices), past_end=past_end)
    length = n_frames / fps
    if end - start < length:
        centred = (start + end - length) / 2
        start = max(0.0, min(centred, info.duration_sec - length))
        end = start + length
    usable = max(n_frames, _whole((end - start) * fps))
    reach = _whole(jitter_sec * fps)
    before = min(reach, _whole(start * fps))
    after = min(reach, _whole((info.duration_sec - start) * fps) - usable)
    times_sec = start + np.arange(-before, usable + max(after, 0)) / fps  # (G,)
    return GridPlan(on_screen(info, times_sec), first=before, usable=usable, past_end=past_end)


def _whole(number):
    return math.floor(number + 1e-6)


def _even_indices(info, start, end, n_frames):
    first = int(on_screen(info, [start])[0])
    last = int(np.searchsorted(info.times, end - STAMP_SLACK_SEC)) - 1
    last = max(first, last)
    if last - first < n_frames:
        return np.arange(first, last + 1)
    return on_screen(info, np.linspace(info.times[first], info.times[last], n_frames))


@dataclasses.dataclass
class ClipAudit:
    """What decoding one row found; `error` is None for a good one, else the reason and all else is empty.

    duration_sec to height: of the whole file, as VideoInfo has them. past_end: the window starts beyond the real end.
    n_grid: grid frames; first: grid index where the window starts, before it lie frames for jitter; usable: grid frames
    of the window.
    file_sha, pixel_sha: SHA-256 of the file (of all frames' files in a folder) and of the decoded grid. phash:
    perceptual_hash of its middle frame.
    """
    path: str
    error: str | None = None
    duration_sec: float = 0.0
    n_frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    past_end: bool = False
    n_grid: int = 0
    first: int = 0
    usable: int = 0
    file_sha: str = ""
    pixel_sha: str = ""
    phash: tuple = (0, 0, 0, 0)


class ClipStore(pixel_cache.PixelStore):
    """N rows of videos, each decoded once onto its grid of times and served as uint8 (G, H, W, 3) RGB, read-only.

    sources: N paths of video files, folders of frames or .npy clips (T, H, W, 3) uint8; windows: N pairs (start_sec,
    end_sec), NaN = the whole; grid, fps, n_frames, jitter_sec: see plan_grid; short_side in pixels. A source without a
    clock has fps frames a second. cache: see PixelStore. `audit` is a list of N ClipAudit; a row with an error raises
    BadImage when it is asked for. Every file is read once, whatever its number of rows.
    """
    item = "clip"
    audit_class = ClipAudit

    def __init__(self, sources, windows, *, grid, fps, n_frames, short_side, jitter_sec=0.0, cache="auto"):
        self.sources = [str(path) for path in sources]
        self.windows = [tuple(map(float, window)) for window in windows]
        self.grid = grid
        self.fps = fps
        self.n_frames = n_frames
        self.jitter_sec = jitter_sec
        self.short_side = short_side
        self._infos = {}  # of the files that were decoded
        rows_of = {}
        for row, path in enumerate(self.sources):
            rows_of.setdefault(path, []).append(row)
        self.load_all(list(rows_of.values()), cache)

    def decode(self, rows):
        """[(ClipAudit, pixels (G, H, W, 3))] of all rows of one file; pixels has no frames when it is bad."""
        path = self.sources[rows[0]]
        try:
            info, frames = self._read(path, rows)
            file_sha = sha_of(files_of(path))
        except (common.UserError, OSError) as error:
            nothing = ClipAudit(path, common.one_line(error)), np.empty((0, 0, 0, 3), np.uint8)
            return [nothing] * len(rows)
        self._infos[path] = info
        return [self._clip(row, info, frames, file_sha) for row in rows]

    def decode_again(self, row):
        path = self.sources[row]
        if path not in self._infos:  # it came from the disk cache
            self._infos[path] = probe(path, self.fps)
        info = self._infos[path]
        indices = self._plan(row, info).indices.tolist()
        frames = read_again(path, set(indices), self.short_side, info)
        return np.stack([frames[index] for index in indices])

    def estimate(self, rows):
        with contextlib.suppress(common.UserError, OSError):
            info = _header(self.sources[rows[0]], self.fps)
            n_frames = sum(len(self._plan(row, info).indices) for row in rows)
            return 3 * n_frames * math.prod(picture_files.scaled_size(info.width, info.height, self.short_side))
        return 0

    def cache_keys(self, rows):
        settings = [self.grid, self.fps, self.n_frames, self.jitter_sec, self.short_side, decoder_name()]
        stamps = [pixel_cache.file_stamp(file) for file in files_of(self.sources[rows[0]])]
        return [[settings, self.windows[row], stamps] for row in rows]

    def _plan(self, row, info):
        return plan_grid(info, self.windows[row], self.grid, self.fps, self.n_frames, self.jitter_sec)

    def _read(self, path, rows):
        """(VideoInfo, {index: pixels} of all rows' frames), in one pass where the header tells the truth."""
        def choose(info):
            return {index for row in rows for index in self._plan(row, info).indices.tolist()}
        info, frames = read_source(path, choose, self.short_side, self.fps)
        missing = choose(info) - frames.keys()
        if missing:
            frames |= _sweep(path, lambda _: missing, self.short_side)[1]
        return info, frames

    def _clip(self, row, info, frames, file_sha):
        plan = self._plan(row, info)
        pixels = np.stack([frames[index] for index in plan.indices.tolist()])
        middle = pixels[len(pixels) // 2]
        audit = ClipAudit(
            path=self.sources[row], duration_sec=info.duration_sec, n_frames=info.n_frames, fps=info.fps,
            width=info.width, height=info.height, past_end=bool(plan.past_end), n_grid=len(pixels), first=plan.first,
            usable=plan.usable, file_sha=file_sha, pixel_sha=hashlib.sha256(pixels).hexdigest(),
            phash=tuple(picture_files.perceptual_hash(middle).tolist()))
        return audit, pixels


def check_clips(audit, max_missing=0.05, on_bad_file="skip"):
    """Indices of the good rows in a list of ClipAudit; the broken videos are named and counted.

    UserError, listing all of them, where their rows are more than max_missing of all rows, with on_bad_file "error"
    where there is any, and where nothing is left.
    """
    bad = {found.path: found.error for found in audit if found.error}
    good = [row for row, found in enumerate(audit) if not found.error]
    if not bad:
        return good
    n_lost = len(audit) - len(good)
    allowed = 0.0 if on_bad_file == "error" else max_missing
    listed = "".join(f"\n  {path}: {error}" for path, error in bad.items())
    if n_lost > allowed * len(audit) or not good:
        raise common.UserError(f"{len(bad)} videos cannot be read, which takes {n_lost} of {len(audit)} rows; at most "
                               f"{allowed:.0%} may be lost (--max_missing, --on_bad_file skip). Repair or remove "
                               f"them:{listed}")
    print(f"skipped: {len(bad)} videos that cannot be read, {n_lost} of {len(audit)} rows:{listed}", flush=True)
    return good
