"""Frames of videos at known times, with an audit of what each file really holds, and the cache of clips.

PyAV decodes. A file is decoded from its first frame on, one thread a file, and only the frames that
are wanted are converted to RGB and scaled: seeking each frame is ten times slower.

Letters: N clips, G frames of the time grid, H, W height and width. Units: seconds from the start of
a file, as a player shows them: its first picture may come later, after the sound.
"""
import collections
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

LEAST_RATE = 0.98  # of the grid's frames a second; below it a recording is called slow
STAMP_SLACK_SEC = 1e-3  # Matroska rounds its stamps to milliseconds
# FFmpeg's SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND, which PyAV 17 does not name. Without them
# colours are up to 1.5 of 255 too dark, and more so in frames that are scaled than in others.
EXACT_COLOURS = 0x2000 | 0x40000
MOST_GUESSED_FRAMES = 2**20  # what a header may claim before its frames are counted
UNREADABLE = common.UserError, OSError  # what a source that cannot be read raises
# formats that open other files or devices, and text that FFmpeg draws as a picture
NO_VIDEO_FORMATS = set("hls dash concat imf sdp rtsp rtp sap webm_dash_manifest image2 image2pipe "
                       "vapoursynth avisynth lavfi tty".split())


class BadVideo(pixel_cache.BadImage):
    """One file that cannot be used as a video; the message is the reason."""


@dataclasses.dataclass
class VideoInfo:
    """What a whole pass over one video found; `error` is one line, or None for a good one.

    times: (n_frames,) float64 of the frames that can be decoded, increasing. damaged: (D,) of those
    that cannot, NaN where unknown. duration_sec: until the last frame has been shown. By the
    header, which may lie: header_fps, 25 where that says none that could be true; header_sec, the
    length of the picture, 0 where it says none.
    """
    error: str | None = None
    duration_sec: float = 0.0
    n_frames: int = 0
    size: tuple = (0, 0)  # width, height in pixels
    times: np.ndarray | None = None
    damaged: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    header_fps: float = 0.0
    header_sec: float = 0.0

    @property
    def damage(self):
        """'71 of 400 frames damaged, between 4.96 and 7.80 s'; '' for a sound file."""
        if not len(self.damaged):
            return ""
        text = f"{len(self.damaged)} of {self.n_frames + len(self.damaged)} frames damaged"
        known = self.damaged[~np.isnan(self.damaged)]
        return f"{text}, between {known.min():.2f} and {known.max():.2f} s" if len(known) else text


# ----------------------------------------------------------------------------------------
# The decoder

def decoder_name():
    """Name and version, for the log."""
    return f"PyAV {load_pyav().__version__} (FFmpeg, 1 thread a file)"


def load_pyav():
    """PyAV without the decoders' own messages."""
    import av
    av.logging.set_level(None)
    return av


def _video_formats():
    """The formats of FFmpeg that hold a video in one file, as its option format_whitelist wants them."""
    names = {name for name in load_pyav().formats_available if not name.endswith("_pipe")}
    return ",".join(names - NO_VIDEO_FORMATS)


def _constant_rate(fps, n_frames, size, first_sec=0.0):
    """VideoInfo of frames of size (width, height), fps of them a second, the first one shown at first_sec."""
    times = first_sec + np.arange(n_frames) / fps
    return VideoInfo(
        duration_sec=first_sec + n_frames / fps, n_frames=n_frames, size=size, times=times, header_fps=fps)


class _Video:
    """One open file: what its header says, then frames(). BadVideo: no pictures in it.

    start_sec: the stamp at which the file starts; where it does not say when each frame is shown,
    None until the first frame, shown at first_sec, is decoded.
    """

    def __init__(self, path):
        self.av = av = load_pyav()
        try:
            self.container = av.open(os.path.abspath(path), options={"format_whitelist": _video_formats()})
        except (av.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise BadVideo(f"no video that can be opened ({reason}; {os.path.getsize(path)} bytes)") from None
        covers = av.stream.Disposition.attached_pic
        tracks = [track for track in self.container.streams.video if not track.disposition & covers]
        if not tracks:
            self.container.close()
            raise BadVideo("no video that can be opened: it has no picture track")
        self.stream = tracks[0]
        codec = self.stream.codec_context
        codec.thread_count = 1
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.size = codec.width, codec.height
        rate = float(self.stream.guessed_rate or self.stream.average_rate or 0)
        self.fps = rate if 0.01 <= rate <= 1000 else 25.0  # the header states none that could be true
        self.damaged = []
        self.turns = None  # quarter turns that make a frame upright; the first one says it
        self.start_sec = None
        self.first_sec = 0.0
        if self.stream.start_time is not None:
            begin_sec = self.container.start_time / av.time_base
            self.first_sec = float(self.stream.start_time * self.stream.time_base) - begin_sec
            is_reordered_avi = self.container.format.name == "avi" and codec.has_b_frames
            if not is_reordered_avi:
                self.start_sec = begin_sec

    def guess(self):
        """VideoInfo by the header, as if every frame were there at a constant rate: a plan before the file is read."""
        import pandas as pd
        stream = self.stream
        duration_sec = (self.container.duration or 0) / self.av.time_base
        n_frames = stream.frames or round(self.fps * (duration_sec - self.first_sec))
        n_frames = min(max(n_frames, 1), MOST_GUESSED_FRAMES)
        info = _constant_rate(self.fps, n_frames, self.size, self.first_sec)
        if stream.frames and stream.average_rate:  # without what only the sound goes on
            picture_sec = float(stream.frames / stream.average_rate)
        else:  # Matroska has 00:01:02.5; NaN where there is no such tag
            tag = stream.metadata.get("DURATION", "")
            picture_sec = pd.to_timedelta(tag, errors="coerce").total_seconds()
        info.header_sec = picture_sec if picture_sec > 0 else duration_sec
        return info

    def frames(self):
        """Yield (time in seconds, function short_side -> pixels (H, W, 3) RGB, upright), each later than the last one.

        A stamp that does not exceed the one before (AVI with B-frames has such, NaN
        too) becomes one frame later.
        """
        last_sec = -math.inf
        for frame in self._whole_frames():
            if self.turns is None:
                self.turns = round(frame.rotation / 90) % 4
                size = frame.width, frame.height
                self.size = size[::-1] if self.turns % 2 else size
            time = self._since_start(frame.time)
            if not time > last_sec:
                time = max(last_sec + 1 / self.fps, 0.0)
            last_sec = time
            yield time, functools.partial(self._pixels, frame)

    def _whole_frames(self):
        """Yield PyAV's frames to the end of the file, without damaged ones.

        The times of packets that cannot be decoded, or of which the decoder made up a part, go to
        `damaged`, and so do those after it that build on its picture, up to the next key frame: of
        these a decoder does not say so.
        """
        lost = set()
        is_broken = False
        is_made_up = False
        for packet in self._packets():
            is_broken = is_broken and not packet.is_keyframe
            decoded = ()
            try:
                decoded = packet.decode()
            except self.av.FFmpegError:
                is_broken = True
            if is_broken and packet.size:
                lost |= {packet.pts} - {None}
                stamp = packet.dts if packet.pts is None else packet.pts
                time = self._since_start(None if stamp is None else float(stamp * packet.time_base))
                self.damaged.append(time)
            for frame in decoded:
                if frame.pts in lost or (is_broken and frame.pts is None):
                    continue
                is_made_up = frame.is_corrupt or (is_made_up and not frame.key_frame)
                if is_made_up:
                    self.damaged.append(self._since_start(frame.time))
                else:
                    yield frame

    def _packets(self):
        with contextlib.suppress(self.av.FFmpegError):  # a file may end in the middle of one
            yield from self.container.demux(self.stream)

    def _since_start(self, stamp_sec):
        """A stamp of the container -> seconds as a player shows them; NaN for None."""
        if stamp_sec is None:
            return math.nan
        if self.start_sec is None:
            self.start_sec = stamp_sec - self.first_sec
        return stamp_sec - self.start_sec

    def _pixels(self, frame, short_side):
        """A frame of PyAV -> uint8 (H, W, 3) RGB, upright, in the size of the first one scaled to short_side."""
        width, height = picture_files.scaled_size(*self.size, short_side)
        if self.turns % 2:
            width, height = height, width
        filters = self.av.video.reformatter.Interpolation
        scaling = filters.AREA if width <= frame.width else filters.BICUBIC
        try:
            scaled = self.reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1,
                                               interpolation=scaling.value | EXACT_COLOURS)
            pixels = scaled.to_ndarray()
        except self.av.FFmpegError as error:
            raise BadVideo(f"damaged: {common.one_line(error)}") from None
        return np.ascontiguousarray(np.rot90(pixels, self.turns))


class _Stills:
    """Frames without a clock, all of one size, fps of them a second: a folder of pictures, a picture or a .npy clip.

    As _Video: guess() is all that there is to know, frames() steps over damaged
    pictures; pixels() reads one alone.
    """

    def __init__(self, path, fps, pixel_range):
        self.damaged = []
        self.fps = fps
        if path.suffix.lower() == ".npy":
            self.pictures = _open_npy(path)
            self.load = np.asarray
        else:
            self.pictures = files_of(path)
            self.load = functools.partial(picture_files.load_image, pixel_range=pixel_range)
        if not len(self.pictures):
            raise BadVideo(f"a folder without pictures ({' '.join(file_names.IMAGE_SUFFIXES)})")
        first = self.pictures[0]
        height, width = self.load(first).shape[:2]
        self.size = width, height
        count = picture_files.count_pictures(first) if isinstance(first, Path) else 1
        if count > 1:
            raise BadVideo(f"{count} pictures in one file: make a video or a folder of frames of {first.name}")

    def guess(self):
        return _constant_rate(self.fps, len(self.pictures), self.size)

    def frames(self):
        for index, picture in enumerate(self.pictures):
            time = index / self.fps
            try:
                loaded = self.load(picture)
            except pixel_cache.BadImage:
                self.damaged.append(time)
            else:
                yield time, functools.partial(self._scaled, loaded)

    def pixels(self, index, short_side):
        """Picture number `index`, uint8 (H, W, 3)."""
        return self._scaled(self.load(self.pictures[index]), short_side)

    def _scaled(self, pixels, short_side):
        height, width = pixels.shape[:2]
        if (width, height) != self.size:
            raise BadVideo(
                f"its frames differ in size: {self.size[0]} x {self.size[1]} and {width} x {height} pixels")
        return picture_files.resize(pixels, picture_files.scaled_size(width, height, short_side))


def _open_npy(path):
    """uint8 (T, H, W, 3), mapped from the file."""
    try:
        clip = np.load(path, mmap_mode="r")
    except pixel_cache.NPY_ERRORS as error:
        raise BadVideo(f"no .npy array of plain numbers: {common.one_line(error)}") from None
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise BadVideo(f"expected uint8 (T, H, W, 3), found {clip.dtype} {clip.shape}")
    return clip


@contextlib.contextmanager
def _open_source(path, fps, pixel_range=None):
    """The open _Video or _Stills; BadVideo with the bare reason."""
    if has_no_clock(path):
        yield _Stills(path, fps, pixel_range)
        return
    picture_files.check_file(path)
    video = _Video(path)
    with video.container:
        if math.prod(video.size) > pixel_cache.MAX_PIXELS:
            raise BadVideo(f"its header claims {video.size[0]} x {video.size[1]} pixels")
        yield video


# ----------------------------------------------------------------------------------------
# Frames of a source: a video file, a folder of frames, a picture or a .npy clip

def probe(path, fps=25.0):
    """VideoInfo of a source, read to its real end; never raises for bad files.

    fps: rate of a source that has no clock of its own.
    """
    try:
        return read_source(path, (), None, None, fps)
    except UNREADABLE as error:
        return VideoInfo(common.one_line(error))


def claimed(path):
    """VideoInfo of a video by its header alone, in which its error says why FFmpeg opens none; never raises."""
    try:
        return _header(path, fps=1)
    except UNREADABLE as error:
        return VideoInfo(common.one_line(error))


def read_source(path, wanted, receive, short_side, fps, pixel_range=None, last=math.inf):
    """VideoInfo of the source, in one pass in which receive(index, pixels) gets the wanted frames.

    wanted: collection of indices; pixels: uint8 (H, W, 3) RGB, upright, scaled to
    short_side (in pixels, None for the whole size), in the order of the file;
    pixel_range: of the pictures of a folder, as picture_files.load_image has it; last:
    the frame after which the pass ends. BadImage: the reason.
    """
    times = []
    with _open_source(path, fps, pixel_range) as source:
        guess = source.guess()
        if has_no_clock(path):
            for index in sorted(wanted):
                receive(index, source.pixels(index, short_side))
            return guess
        for time, convert in source.frames():
            if len(times) in wanted:
                receive(len(times), convert(short_side))
            times.append(time)
            if len(times) > last:
                break
    if not times:
        raise BadVideo("damaged: none of its frames can be decoded")
    shown_sec = 1 / source.fps
    if len(times) > 1:
        shown_sec = np.median(np.diff(times))
    return dataclasses.replace(
        guess, duration_sec=times[-1] + shown_sec, n_frames=len(times), size=source.size,
        times=np.array(times), damaged=np.array(source.damaged))


def on_screen(info, times_sec):
    """Index of the frame on screen at a time, or at each of (T,); the first before the start, the last after the end.

    A frame counts from half a frame before its stamp (half the gap before it, where that is
    shorter), so that a rounded stamp does not show the frame before.
    """
    gaps = np.diff(info.times, prepend=info.times[0] - 1)
    starts = info.times - np.minimum(gaps, 1 / info.header_fps) / 2
    index = np.searchsorted(starts, times_sec + STAMP_SLACK_SEC, "right") - 1
    return np.maximum(index, 0)


def has_no_clock(path):
    """True for a folder of frames, a picture or a .npy clip: no file says when their frames are shown."""
    return path.is_dir() or path.suffix.lower() in (".npy", *file_names.IMAGE_SUFFIXES)


def _header(path, fps):
    """VideoInfo without a pass over the file."""
    with _open_source(path, fps) as source:
        return source.guess()


def choose_pixel_range(sources):
    """picture_files.choose_pixel_range of all frames of the folders whose first one has more than 8 bits."""
    files = [files_of(path) for path in set(sources) if has_no_clock(path)]
    deep = [frames for frames in files if picture_files.choose_pixel_range(frames[:1])]
    return picture_files.choose_pixel_range(sum(deep, []))


def files_of(path):
    """The files of a source: the pictures of a folder, else the file itself."""
    return file_names.find_images(path) if path.is_dir() else [path]


def sha_of(files):
    """SHA-256 (hex) of the bytes of the files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------
# Clips: which frames stand on the grid of a row, and their cache

@dataclasses.dataclass
class GridPlan:
    """Which frames stand on a row's grid."""
    indices: list | tuple = ()  # G numbers of frames in the file
    first: int = 0  # grid index where the window starts; before it lie frames for jitter
    usable: int = 0  # grid frames of the window
    fault: str = ""  # why the row cannot be used though its file can


def plan_grid(info, window, grid, fps, n_frames, jitter_sec=0.0):
    """GridPlan of one window (start, end) in seconds, NaN = from the start, to the end of the file.

    "rate": a frame every 1 / fps s; a window too short for n_frames of them is widened around its
    centre and shifted into the file, whose last frame is repeated where it is shorter still; up to
    jitter_sec more on either side. "even": up to n_frames evenly from the first to the last frame
    of the window, all of them where it has fewer.
    """
    start, end = np.where(np.isnan(window), (0, math.inf), window)
    fault = window_fault(info, start, end)
    begin = info.times[0]
    start, end = np.clip((start, end), begin, info.duration_sec)
    if grid == "even":
        indices = _even_indices(info, start, end, n_frames).tolist()
        return GridPlan(indices, usable=len(indices), fault=fault)
    length = n_frames / fps
    if end - start < length:
        centred = (start + end - length) / 2
        start = max(begin, min(centred, info.duration_sec - length))
        end = start + length
    usable = max(n_frames, _whole((end - start) * fps))
    reach = _whole(jitter_sec * fps)
    before = min(reach, _whole((start - begin) * fps))
    after = min(reach, _whole((info.duration_sec - start) * fps) - usable)
    times_sec = start + np.arange(-before, usable + max(after, 0)) / fps  # (G,)
    return GridPlan(on_screen(info, times_sec).tolist(), first=before, usable=usable, fault=fault)


def window_fault(info, start, end):
    """Why the file has no picture of a window in seconds; '' where it has."""
    if start >= info.duration_sec:
        return "its window starts past the end of the video"
    if end < info.times[0]:
        return f"its window ends before the first picture, at {info.times[0]:.2f} s"
    n_damaged, n_good = [np.count_nonzero((times >= start) & (times < end)) for times in (info.damaged, info.times)]
    return "most frames of its window are damaged" if n_damaged > n_good else ""


def _whole(number):
    """Whole frames in a number of them, which rounding may have left just below one more."""
    return math.floor(number + 1e-6)


def _even_indices(info, start, end, n_frames):
    """Up to n_frames frames, evenly in time from the first to the last one of a window in seconds."""
    first = on_screen(info, start)
    last = max(first, np.searchsorted(info.times, end - STAMP_SLACK_SEC) - 1)
    if last - first < n_frames:
        return np.arange(first, last + 1)
    return on_screen(info, np.linspace(info.times[first], info.times[last], n_frames))


@dataclasses.dataclass
class ClipAudit(GridPlan, pixel_cache.Audit):
    """Of a row and its grid; file_sha: of all frames' files in a folder.

    pixel_sha: of the frames of the window, without those for jitter; phash: of its middle one.
    n_frames, n_damaged, damage: of the whole file.
    """
    n_frames: int = 0
    n_damaged: int = 0
    damage: str = ""

    def even_starts(self, length, count):
        """Grid frames where `count` clips of `length` frames start, evenly over the window; one alone in its middle.

        Fewer where the window has fewer places.
        """
        last = self.first + max(self.usable - length, 0)
        places = np.linspace(self.first, last, count) if count > 1 else [(self.first + last) / 2]
        return np.unique(np.round(places).astype(int)).tolist()


class GridFrames:
    """The grid of one row while its file is decoded: each frame is hashed as it comes, then kept or let go.

    Frames for jitter are not hashed: with those around it a clip is still the same. cache: "ram"
    keeps frames in one array, "disk" in a temporary file in `folder`, "none" only counts them.
    """

    def __init__(self, plan, cache, folder):
        self.plan = plan
        self.cache = cache
        self.folder = folder
        self.n_added = 0
        self.digest = hashlib.sha256()
        self.middle = None  # frame of the window, that the perceptual hash is taken of
        self.kept = None  # (G, H, W, 3)

    def add(self, pixels):
        """Take the next frame, uint8 (H, W, 3)."""
        if self.kept is None:
            shape = (len(self.plan.indices), *pixels.shape)
            if self.cache == "ram":
                self.kept = np.empty(shape, np.uint8)
            elif self.cache == "disk":
                self.kept = pixel_cache.frames_on_disk(self.folder, shape)
            else:
                self.kept = np.broadcast_to(pixels, shape)  # their number and size, without memory
        place = self.n_added - self.plan.first
        if 0 <= place < self.plan.usable:
            self.digest.update(pixels)
        if place == self.plan.usable // 2:
            self.middle = pixels
        if self.cache != "none":
            self.kept[self.n_added] = pixels
        self.n_added += 1

    def discard(self):
        if isinstance(self.kept, np.memmap):
            Path(self.kept.filename).unlink()
        self.kept = None


def places_of(windows):
    """N windows -> 3 places (N,) of each in its file: the window, and its middle rounded to .2 s in two ways.

    The two differ by .1 s. So middles less than .1 s apart are equal in one or both,
    and those .2 s apart in neither.
    """
    steps = np.round(np.reshape(windows, (-1, 2)).mean(1) / 0.2, 6)
    return windows, np.floor(steps), np.floor(steps + 0.5) - 0.5


class ClipStore(pixel_cache.PixelStore):
    """N rows of videos, each decoded once onto its grid of times and served as uint8 (G, H, W, 3) RGB, read-only.

    sources: N paths of video files, folders of frames or .npy clips (T, H, W, 3) uint8; windows: N
    pairs (start_sec, end_sec), NaN = the whole; grid, fps, n_frames, jitter_sec: see plan_grid;
    short_side in pixels. A source without a clock has fps frames a second. cache: see PixelStore.
    pixel_range: of folders of pictures of more than 8 bits; None: one for all, by
    choose_pixel_range. `audit` is a list of N ClipAudit; a row with an error raises BadImage when
    it is asked for. All rows of a file are taken from the same pass over it.
    """
    item = "clip"
    smaller = "A smaller --image_size, a lower --fps, shorter events or (scores) fewer --n_frames"
    audit_class = ClipAudit

    def __init__(self, sources, windows, *, grid, fps, n_frames, short_side, jitter_sec=0.0, cache="auto",
                 pixel_range=None):
        self.sources = sources
        self.windows = [tuple(map(float, window)) for window in windows]
        self.places = places_of(self.windows)
        self.grid_settings = grid, fps, n_frames, jitter_sec  # in the order of plan_grid
        self.fps = fps
        self.short_side = short_side
        self.pixel_range = pixel_range or choose_pixel_range(self.sources)
        self.load_all(common.rows_by_key(self.sources).values(), cache)

    def part(self, row, start, stop):
        """Grid frames start to stop of a row without an error (T, H, W, 3); without a cache no others are read."""
        if self.cache == "none":
            return self.decode_again(row, slice(start, stop))
        return self[row][start:stop]

    def time_notes(self):
        """A sentence on the videos that show frames twice on their grid, where there are any."""
        grid, fps, n_frames, _ = self.grid_settings
        again = sorted({found.path for found in self.audit
                        if len(set(found.indices)) < len(found.indices) and not found.n_damaged})
        if grid != "rate" or not again:
            return []
        return [
            f"{len(again)} videos show some frames twice ({common.shorten_list(again, 3)}): they have fewer than "
            f"{fps:g} frames a second (--fps), an uneven rate, or are shorter than a clip of {n_frames / fps:.3g} s"]

    def decode(self, rows):
        """[(ClipAudit, pixels (G, H, W, 3))] of all rows of one file; pixels has no frames when it is bad."""
        path = self.sources[rows[0]]
        try:
            info, plans, grids = self._read(path, rows)
            file_sha = sha_of(files_of(path))
        except common.CannotSave:
            raise
        except UNREADABLE as error:
            audit = ClipAudit(str(path), common.one_line(error))
            return [(audit, np.empty((0, 0, 0, 3), np.uint8))] * len(rows)
        return [self._clip(path, info, plan, grid, file_sha) for plan, grid in zip(plans, grids)]

    def decode_again(self, row, part=slice(None)):
        indices = self.audit[row].indices[part]
        frames = {}
        read_source(self.sources[row], set(indices), frames.__setitem__, self.short_side, self.fps, self.pixel_range,
                    last=max(indices))
        return np.stack([frames[index] for index in indices])

    def estimate(self, rows):
        path = self.sources[rows[0]]
        with contextlib.suppress(*UNREADABLE):
            info = _header(path, self.fps)
            n_frames = sum(len(self._plan(row, info).indices) for row in rows)
            return 3 * n_frames * math.prod(picture_files.scaled_size(*info.size, self.short_side))
        return 0

    def cache_keys(self, rows):
        settings = [*self.grid_settings, self.short_side, self.pixel_range, decoder_name()]
        stamps = [pixel_cache.file_stamp(file) for file in files_of(self.sources[rows[0]])]
        return [[settings, self.windows[row], stamps] for row in rows]

    def _plan(self, row, info):
        return plan_grid(info, self.windows[row], *self.grid_settings)

    def _read(self, path, rows):
        """(VideoInfo, GridPlans, GridFrames of the rows), in one pass where the header tells the truth, else in two."""
        header = _header(path, self.fps)
        guesses = [self._plan(row, header) for row in rows]
        info, grids = self._fill(path, guesses)
        plans = [self._plan(row, info) for row in rows]
        if plans != guesses:
            for grid in grids:
                grid.discard()
            info, grids = self._fill(path, plans)
        return info, plans, grids

    def _fill(self, path, plans):
        """(VideoInfo, GridFrames of each plan) of one pass over a file."""
        grids = [GridFrames(plan, self.cache, self.folder) for plan in plans]
        takers = collections.defaultdict(list)  # frame index -> the grids in which it stands, as often as it does
        for grid, plan in zip(grids, plans):
            for index in plan.indices:
                takers[index].append(grid)

        def receive(index, pixels):
            for grid in takers[index]:
                grid.add(pixels)
        try:
            return read_source(path, takers, receive, self.short_side, self.fps, self.pixel_range), grids
        except BaseException:
            for grid in grids:
                grid.discard()
            raise

    def _clip(self, path, info, plan, grid, file_sha):
        audit = ClipAudit(
            path=str(path),
            file_sha=file_sha,
            pixel_sha=grid.digest.hexdigest(),
            phash=picture_files.perceptual_hash(grid.middle).tolist(),
            n_frames=info.n_frames,
            n_damaged=len(info.damaged),
            damage=info.damage,
            **vars(plan))
        return audit, grid.kept


def check_clips(audit, max_missing, on_bad_file):
    """Name and count the broken and damaged videos in a list of ClipAudit.

    UserError, listing all of them, where their rows are more than max_missing of all
    rows, or damaged frames more than that of all frames; with on_bad_file "error"
    where there is any; and where nothing is left.
    """
    allowed = 0.0 if on_bad_file == "error" else max_missing
    files = {found.path: found for found in audit}
    damaged = {path: found.damage for path, found in files.items() if found.damage}
    n_damaged = sum(found.n_damaged for found in files.values())
    n_frames = n_damaged + sum(found.n_frames for found in files.values())
    name_losses(f"{n_damaged} of {n_frames} frames are damaged", damaged, allowed, n_damaged > allowed * n_frames)
    bad = {path: found.error for path, found in files.items() if found.error}
    n_lost = sum(bool(found.error) for found in audit)
    what = f"{len(bad)} videos cannot be read, which takes {n_lost} of {len(audit)} rows"
    name_losses(what, bad, allowed, n_lost > allowed * len(audit) or n_lost == len(audit))


def name_losses(what, reasons, allowed, is_too_much):
    """Name the videos that are lost or damaged, {path: reason}.

    UserError where this is too much.
    """
    if not reasons:
        return
    listed = "".join(f"\n  {path}: {reason}" for path, reason in reasons.items())
    if is_too_much:
        raise common.UserError(f"{what}; at most {allowed:.0%} may be lost (--max_missing, "
                               f"--on_bad_file skip). Repair or remove these videos:{listed}")
    common.print_first(f"note: {what}; left out:{listed}")


# ----------------------------------------------------------------------------------------
# Whole recordings: every frame once, none kept

def find_recordings(path):
    """{name below the folder: path} of the recordings that --video names, a file or a folder."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise common.UserError(f"--video {path}: no such file or folder")
    videos, others = file_names.find_videos(path)
    videos |= {name: file for name, file in others.items() if not claimed(file).error}
    if not videos:
        raise common.UserError(f"--video {path}: found no video in it")
    pictures = videos.pop(".", None)
    if not videos:
        return {path.resolve().name: pictures}
    if pictures:
        print(f"note: the pictures in {path} are not read as a recording, as there are videos beside them")
    return videos


@dataclasses.dataclass
class Recording:
    """A source read from its start to its end, or to where it breaks, without keeping a frame.

    BadVideo: it cannot be opened.
    """
    path: Path
    fps: float  # of the grid, and of a source without a clock
    short_side: int  # of the frames, in pixels
    pixel_range: tuple | None = None  # see ClipStore
    # what the pass over the source has found so far
    begin_sec: float = 0.0  # where the first frame starts
    read_sec: float = 0.0  # where the last frame ends
    n_read: int = 0  # frames
    n_shown: int = 0  # times of the grid
    damaged: list | tuple = ()  # times of frames that cannot be decoded

    def __post_init__(self):
        self.info = _header(self.path, self.fps)
        self.expected_sec = self.info.header_sec or self.info.duration_sec  # the length by the header

    def losses(self):
        """Sentences on what could not be read, and on too low a rate."""
        found = []
        if self.read_sec < 0.98 * self.info.header_sec - 1:
            found.append(f"{self.path}: read up to {self.read_sec:.1f} of {self.expected_sec:.1f} s by its header")
        if self.damaged:
            first_sec = np.fmin.reduce(self.damaged)
            place = "" if np.isnan(first_sec) else f", the first at {first_sec:.2f} s"
            found.append(f"{self.path}: {len(self.damaged)} frames are damaged{place}; "
                         "windows there show the frames before them")
        rate = (self.n_read + len(self.damaged)) / (self.read_sec - self.begin_sec)
        if rate < LEAST_RATE * self.fps:
            found.append(f"{self.path}: it has {rate:.1f} frames a second, fewer than the "
                         f"{self.fps:g} of a window, which shows some twice")
        return found

    def spans(self, places, length):
        """(W, 2) start and end of windows of `length` frames from these places of the grid on, once that is read."""
        starts = self.begin_sec + np.array(places) / self.fps
        return np.stack([starts, np.minimum(starts + length / self.fps, self.read_sec)], 1)

    def frames(self):
        """Yield (time in seconds, function short_side -> pixels) of each frame."""
        with _open_source(self.path, self.fps, self.pixel_range) as source:
            self.damaged = source.damaged
            yield from source.frames()

    def grid(self, at_least=0):
        """Yield (pixels, is_new) for every 1 / fps s from the first frame on; on_screen says which frame that is.

        pixels: uint8 (H, W, 3); is_new False: the frame before again, as the source is slower than the grid.
        A recording of fewer frames than at_least shows its last one on. BadVideo: it has none.
        """
        step_sec = 1 / self.info.header_fps
        before = -math.inf  # time of the frame before
        convert_before = None
        for time, convert in self.frames():
            gap = min(step_sec, time - before)
            if convert_before is None:
                self.begin_sec = time
            else:
                yield from self._show(convert_before, time - gap / 2)
            self.read_sec = time + gap
            self.n_read += 1
            before = time
            convert_before = convert
        if convert_before is None:
            raise BadVideo("no frame can be decoded")
        n_frames = max(_whole((self.read_sec - self.begin_sec) * self.fps), at_least)
        yield from self._show(convert_before, self.begin_sec + n_frames / self.fps)

    def _show(self, convert, until):
        """Yield one frame for every time of the grid before `until` that has not been shown."""
        pixels = None
        while self.begin_sec + self.n_shown / self.fps < until - STAMP_SLACK_SEC:
            is_new = pixels is None
            if is_new:
                pixels = convert(self.short_side)
            yield pixels, is_new
            self.n_shown += 1
