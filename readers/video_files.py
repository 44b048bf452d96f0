"""Frames of videos at known times, with an audit of what each file really holds, and the cache of clips.

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

#
# Frames are taken by time stamp: a file is decoded from its first frame on, one thread a file, and only the frames that
# are wanted are converted to RGB and scaled; seeking each frame is ten times slower. One seek, to a window late in a
# long file, counts only where every stamp after it stands in the list of stamps that a whole pass has made.

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
    first frame's own stamp. is_exact: the file's stamps increase by themselves, none had to be mended.
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


def decoder_name():
    """The decoders in the order in which they are tried, with versions, for the log."""
    cv2, av = _decoders()
    has_ffmpeg = cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends()
    names = [f"OpenCV {cv2.__version__} (FFmpeg, 1 thread a file)"] if has_ffmpeg else []
    return ", then ".join(names + ([f"PyAV {av.__version__}"] if av else [])) or "none (OpenCV without FFmpeg)"


def _decoders():
    """(cv2, PyAV or None), both silent and with one thread."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read by OpenCV when it opens its first file
    import cv2
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with contextlib.suppress(ImportError):
        import av
        av.logging.set_level(None)
        return cv2, av
    return cv2, None


class _CvVideo:
    """One open file in OpenCV: header values, then frames() from the start or a seek. BadVideo: no frame in it."""

    def __init__(self, path):
        self.cv2 = _decoders()[0]
        self.capture = self.cv2.VideoCapture(os.path.abspath(path), self.cv2.CAP_FFMPEG,
                                             [self.cv2.CAP_PROP_N_THREADS, 1])
        if not (self.capture.isOpened() and self.capture.grab()):
            raise BadVideo(f"no video that can be opened and decoded ({os.path.getsize(path)} bytes)")
        cv2, get = self.cv2, self.capture.get
        self.fps, self.n_frames = get(cv2.CAP_PROP_FPS), int(get(cv2.CAP_PROP_FRAME_COUNT))
        self.size = int(get(cv2.CAP_PROP_FRAME_WIDTH)), int(get(cv2.CAP_PROP_FRAME_HEIGHT))  # upright

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
        return self.cv2.cvtColor(_shrink(pixels, self.size, short_side), self.cv2.COLOR_BGR2RGB)

    def close(self):
        self.capture.release()


class _AvVideo:
    """The same in PyAV, for what OpenCV's decoder cannot open; it never seeks."""

    def __init__(self, path):
        self.av = _decoders()[1]
        try:
            self.container = self.av.open(os.path.abspath(path))
            self.stream = self.container.streams.video[0]
        except (self.av.FFmpegError, IndexError, ValueError) as error:
            reason = getattr(error, "strerror", "it has no picture track")
            raise BadVideo(f"no video that can be opened: {reason}") from None
        self.stream.codec_context.thread_count = 1
        self.fps, self.n_frames = float(self.stream.average_rate or 0), self.stream.frames
        self.size = self.stream.codec_context.width, self.stream.codec_context.height

    def frames(self, start_sec=0.0):
        """As _CvVideo.frames, always from the first frame."""
        assert not start_sec, f"asked to seek to {start_sec} s"
        with contextlib.suppress(self.av.FFmpegError):
            for frame in self.container.decode(self.stream):
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                self.size = (frame.width, frame.height)[::-1 if turns % 2 else 1]
                yield -1.0 if frame.time is None else frame.time, functools.partial(self._pixels, frame, turns)

    def _pixels(self, frame, turns, short_side):
        pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        return _shrink(pixels, self.size, short_side)

    def close(self):
        self.container.close()


@contextlib.contextmanager
def _open_video(path):
    """The file in the first decoder that finds a frame in it; BadVideo with the bare reason."""
    if Path(path).name.startswith("._"):
        raise BadVideo(f"{Path(path).name} is a macOS resource file, no video")
    if not Path(path).is_file():  # a pipe or device would block for ever
        raise BadVideo(f"{'not a regular file' if os.path.exists(path) else 'no such file'}")
    if not os.path.getsize(path):
        raise BadVideo(f"empty file, {os.path.getsize(path)} bytes")
    try:
        video = _CvVideo(path)
    except BadVideo:
        if _decoders()[1] is None:
            raise
        video = _AvVideo(path)
    try:
        if math.prod(video.size) > common.MAX_PIXELS:
            raise BadVideo(f"its header claims {video.size[0]} x {video.size[1]} pixels")
        yield video
    except video.cv2.error if isinstance(video, _CvVideo) else video.av.FFmpegError as error:
        raise BadVideo(f"damaged: {common.one_line(error)}") from None
    finally:
        video.close()


def _sane_fps(fps):
    """The rate that a header states, or 25 where it states none that could be true."""
    return fps if math.isfinite(fps) and 0.01 <= fps <= 1000 else 25.0


def _guess(path, video):
    """VideoInfo as the header has it, constant rate and every frame there: for planning, before the pass that tells."""
    fps, n_frames = _sane_fps(video.fps), min(max(video.n_frames, 1), MOST_GUESSED_FRAMES)
    return VideoInfo(str(path), None, n_frames / fps, n_frames, fps, *video.size, np.arange(n_frames) / fps,
                     video.n_frames, fps)


def _header(path):
    with _open_video(path) as video:
        return _guess(path, video)


def _sweep(path, choose, short_side, until_sec=math.inf):
    """One pass from the first frame: (VideoInfo up to until_sec, {index: pixels uint8 (H, W, 3)} of those wanted).

    choose: function of the header's VideoInfo that returns the wanted indices. A frame whose stamp does not exceed the
    one before it (AVI with B-frames has such) follows that one at the header's rate.
    """
    frames, times, origin, exact = {}, [], 0.0, True
    with _open_video(path) as video:
        guess = _guess(path, video)
        wanted, step = choose(guess), 1 / guess.header_fps
        for index, (stamp, pixels) in enumerate(video.frames()):
            origin = stamp if index == 0 else origin
            mended = index > 0 and stamp - origin <= times[-1]
            times.append(times[-1] + step if mended else stamp - origin)
            exact &= not mended
            if index in wanted:
                frames[index] = pixels(short_side)
            if times[-1] > until_sec + step:
                break
        if not times:
            raise BadVideo(f"{video.n_frames} frames by its header, none that can be decoded")
        size = video.size
    last_sec = float(np.median(np.diff(times))) if len(times) > 1 else step
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else guess.header_fps
    return VideoInfo(str(path), None, times[-1] + last_sec, len(times), fps, *size, np.array(times),
                     guess.header_frames, guess.header_fps, origin, exact), frames


def _seek(path, wanted, short_side, info):
    """{index: pixels} by one seek, or None where any stamp after it is not the one that the whole pass saw."""
    frames, first, index = {}, min(wanted), None
    with _open_video(path) as video:
        if not isinstance(video, _CvVideo):
            return None
        for stamp, pixels in video.frames(info.origin_sec + info.times[first] - SEEK_MARGIN_SEC):
            stamp -= info.origin_sec
            index = bisect.bisect_left(info.times, stamp - SAME_STAMP_SEC) if index is None else index + 1
            if index >= info.n_frames or abs(info.times[index] - stamp) > SAME_STAMP_SEC:
                return None
            if index in wanted:
                frames[index] = pixels(short_side)
            if index >= max(wanted):
                break
    return frames if len(frames) == len(wanted) else None


def _shrink(pixels, size, short_side):
    cv2 = _decoders()[0]
    size = picture_files.scaled_size(*size, short_side)
    method = cv2.INTER_AREA if size[0] <= pixels.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(pixels, size, interpolation=method)


def on_screen(info, times_sec):
    """(T,) index of the frame on screen at each time; the first before the start, the last after the end.

    A frame counts from half a frame before its stamp (half the gap before it, where that is shorter), so that a rounded
    stamp does not show the frame before.
    """
    lead = np.minimum(np.diff(info.times, prepend=info.times[0] - 1), 1 / info.header_fps) / 2
    index = np.searchsorted(info.times - lead, np.asarray(times_sec, float) + STAMP_SLACK_SEC, "right") - 1
    return np.clip(index, 0, info.n_frames - 1)


def read_frames(path, times_sec, short_side, info=None):
    """The frames on screen at these times (seconds since the first frame): uint8 (T, H, W, 3) RGB, upright.

    short_side: pixels of the shorter side, None for the whole size; info: what probe found, which spares a second pass
    over files whose header lies. Times beyond the end show the last frame. Raises BadVideo: file and reason.
    """
    try:
        return _by_index(path, times_sec, short_side, info)
    except pixel_cache.BadImage as error:
        raise BadVideo(f"{path}: {error}") from None


def _by_index(path, times_sec, short_side, info):
    if info:
        wanted = on_screen(info, times_sec).tolist()
        frames = _collect(path, set(wanted), short_side, info)
        return np.stack([frames[index] for index in wanted])
    until = max(times_sec)
    found, frames = _sweep(path, lambda guess: set(on_screen(guess, times_sec).tolist()), short_side, until)
    wanted = on_screen(found, times_sec).tolist()
    if not frames.keys() >= set(wanted):  # the header had lied
        frames = _sweep(path, lambda _: set(wanted), short_side, until)[1]
    return np.stack([frames[index] for index in wanted])


def _collect(path, wanted, short_side, info):
    """{index: pixels} of a video whose frames are known from `info`."""
    is_far = info.is_exact and info.times[min(wanted)] > SEEK_FROM_SEC
    frames = _seek(path, wanted, short_side, info) if is_far else None
    return frames or _sweep(path, lambda _: wanted, short_side, info.times[max(wanted)])[1]


def probe(path, fps=25.0):
    """VideoInfo of a video file, a folder of frames or a .npy clip, read to its real end; never raises for bad files.

    fps: rate of a source that has no clock of its own.
    """
    try:
        return _open_still(path, fps)[0] if _is_still(path) else _sweep(path, lambda _: (), None)[0]
    except (common.UserError, OSError) as error:
        return VideoInfo(str(path), common.one_line(error))


def _is_still(path):
    return Path(path).is_dir() or Path(path).suffix.lower() == ".npy"


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
    n = len(frames)
    return VideoInfo(str(path), None, n / fps, n, fps, width, height, np.arange(n) / fps, n, fps), frames


def _open_npy(path):
    try:
        clip = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        raise BadVideo(f"no .npy array of plain numbers: {common.one_line(error)}") from None
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise BadVideo(f"expected uint8 (T, H, W, 3), found {clip.dtype} {clip.shape}")
    return clip


def _still_frames(frames, wanted, info, short_side):
    """{index: pixels} of a folder or array; every frame is cut to the size of the first."""
    pixels = {i: picture_files.load_image(frames[i]) if isinstance(frames, list) else np.asarray(frames[i]) for i in wanted}
    odd = sorted({f"{p.shape[1]} x {p.shape[0]}" for p in pixels.values() if p.shape[:2] != (info.height, info.width)})
    if odd:
        raise BadVideo(f"its frames differ in size: {info.width} x {info.height} and {', '.join(odd[:9])} pixels")
    return {i: _shrink(picture, (info.width, info.height), short_side) for i, picture in pixels.items()}


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
    start, end = (default if math.isnan(value) else value for value, default in zip(window, (0.0, math.inf)))
    past_end = start >= info.duration_sec
    end = min(max(end, 0.0), info.duration_sec)
    start = min(max(start, 0.0), end)
    if grid == "even":
        indices = _even_indices(info, start, end, n_frames)
        return GridPlan(indices, 0, len(indices), past_end)
    length = n_frames / fps
    if end - start < length:
        start = max(0.0, min((start + end - length) / 2, info.duration_sec - length))
        end = start + length
    usable = max(n_frames, _whole((end - start) * fps))
    reach = _whole(jitter_sec * fps)
    before, after = min(reach, _whole(start * fps)), min(reach, _whole((info.duration_sec - start) * fps) - usable)
    times_sec = start + np.arange(-before, usable + max(after, 0)) / fps  # (G,)
    return GridPlan(on_screen(info, times_sec), before, usable, past_end)


def _whole(number):
    return math.floor(number + 1e-6)


def _even_indices(info, start, end, n_frames):
    first = int(on_screen(info, [start])[0])
    last = max(first, int(np.searchsorted(info.times, end - STAMP_SLACK_SEC)) - 1)
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
    clock has fps frames a second. cache, cache_dir, progress: see common.PixelStore. `audit` is a list of N ClipAudit;
    a row with an error raises BadImage when it is asked for. Every file is read once, whatever its number of rows.
    """
    item, file_prefix, audit_class = "clip", "clips", ClipAudit

    def __init__(self, sources, windows, *, grid, fps, n_frames, short_side, jitter_sec=0.0, cache="auto",
                 cache_dir=None, progress=None):
        assert grid in ("rate", "even"), f"grid {grid!r} is neither rate nor even"
        assert len(sources) == len(windows), f"{len(sources)} sources and {len(windows)} windows"
        self.sources, self.windows = [str(path) for path in sources], [tuple(map(float, window)) for window in windows]
        self.grid, self.fps, self.n_frames = grid, fps, n_frames
        self.jitter_sec, self.short_side = jitter_sec, short_side
        self.data_folders = {Path(path).absolute().parent for path in self.sources}
        self.rows_of, self._infos = {}, {}
        for row, path in enumerate(self.sources):
            self.rows_of.setdefault(path, []).append(row)
        self.start(len(self.sources), cache, cache_dir, progress)

    def _plan(self, row, info):
        return plan_grid(info, self.windows[row], self.grid, self.fps, self.n_frames, self.jitter_sec)

    def _plans(self, path, info):
        """({row: its plan}, every index wanted of the file)."""
        plans = {row: self._plan(row, info) for row in self.rows_of[path]}
        return plans, set(np.concatenate([plan.indices for plan in plans.values()]).tolist())

    def _file_frames(self, path):
        """(VideoInfo, {row: its plan}, {index: pixels}), in one pass where the header tells the truth."""
        if _is_still(path):
            info, source = _open_still(path, self.fps)
            plans, wanted = self._plans(path, info)
            return info, plans, _still_frames(source, wanted, info, self.short_side)
        info, frames = _sweep(path, lambda guess: self._plans(path, guess)[1], self.short_side)
        plans, wanted = self._plans(path, info)
        missing = wanted - frames.keys()
        if missing:  # the header had lied
            frames |= _sweep(path, lambda _: missing, self.short_side)[1]
        return info, plans, frames

    def _decode_file(self, path):
        """[(row, ClipAudit, pixels (G, H, W, 3))] of all rows of one file; pixels has no frames when it is bad."""
        try:
            info, plans, frames = self._file_frames(path)
            file_sha = sha_of(files_of(path))
        except (common.UserError, OSError) as error:
            nothing = np.empty((0, 0, 0, 3), np.uint8)
            return [(row, ClipAudit(path, common.one_line(error)), nothing) for row in self.rows_of[path]]
        if self.cache == "none":
            self._infos[path] = info
        facts = [path, None, info.duration_sec, info.n_frames, info.fps, info.width, info.height]
        done = []
        for row, plan in plans.items():
            pixels = np.stack([frames[index] for index in plan.indices.tolist()])
            phash = tuple(picture_files.perceptual_hash(pixels[len(pixels) // 2]).tolist())
            places = [bool(plan.past_end), len(pixels), plan.first, plan.usable]
            done.append((row, ClipAudit(*facts, *places, file_sha, hashlib.sha256(pixels).hexdigest(), phash), pixels))
        return done

    def _decoded(self):
        for rows in self._threaded(self._decode_file, list(self.rows_of), in_flight=2):
            yield from rows

    def _load(self, row):
        path, info = self.sources[row], self._infos[self.sources[row]]
        indices = self._plan(row, info).indices.tolist()
        if _is_still(path):
            frames = _still_frames(_open_still(path, self.fps)[1], set(indices), info, self.short_side)
        else:
            frames = _collect(path, set(indices), self.short_side, info)
        return np.stack([frames[index] for index in indices])

    def _estimate(self):
        return sum(self._threaded(self._estimate_file, list(self.rows_of)))

    def _estimate_file(self, path):
        with contextlib.suppress(common.UserError, OSError):
            info = _open_still(path, self.fps)[0] if _is_still(path) else _header(path)
            frame = 3 * math.prod(picture_files.scaled_size(info.width, info.height, self.short_side))
            return frame * sum(len(plan.indices) for plan in self._plans(path, info)[0].values())
        return 0

    def _contents(self):
        settings = [self.grid, self.fps, self.n_frames, self.jitter_sec, self.short_side, decoder_name()]
        return [settings, self.windows, self.sources,
                [pixel_cache.file_stamp(file) for path in self.rows_of for file in files_of(path)]]

    def _still_bad(self, path):
        return bool(self._decode_file(path)[0][1].error)


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


def check_clips(audit, max_missing=0.05, on_bad_file="skip"):
    """Indices of the good rows in a list of ClipAudit; the broken videos are named and counted.

    UserError, listing all of them, where their rows are more than max_missing of all rows, with on_bad_file "error"
    where there is any, and where nothing is left.
    """
    bad = {found.path: found.error for found in audit if found.error}
    good = [row for row, found in enumerate(audit) if not found.error]
    n_lost = len(audit) - len(good)
    lines = "".join(f"\n  {path}: {error}" for path, error in bad.items())
    if bad and (on_bad_file == "error" or n_lost > max_missing * len(audit) or not good):
        raise common.UserError(f"{len(bad)} videos cannot be read, which takes {n_lost} of {len(audit)} rows; at most "
                               f"{0 if on_bad_file == 'error' else max_missing:.0%} may be lost (--max_missing, "
                               f"--on_bad_file skip). Mend or remove them:{lines}")
    if bad:
        print(f"skipped: {len(bad)} videos that cannot be read, {n_lost} of {len(audit)} rows:{lines}", flush=True)
    return good
