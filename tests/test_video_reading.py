"""Video reading: the right frame at every time, proved by numbers drawn into the pictures; lying and broken files.

    python -m pytest tests/test_video_reading.py -q

The films are written with PyAV from drawn pictures; these, their numbers and the stamps that were given are the judges.
"""
import errno
import functools
import hashlib
import json
import math
import os
import pickle
import re
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import common
from readers import event_tables, event_times, picture_files, pixel_cache, video_files

pytestmark = pytest.mark.fault("pictures and videos: cuts, modes, EXIF, bombs, lying headers")

WIDTH, HEIGHT, BLOCK, N, FPS = 128, 96, 32, 90, 15
WHOLE = (math.nan, math.nan)
B_FRAME = 3  # AV_PICTURE_TYPE_B
X264 = "bframes=3:b-adapt=0:keyint=30:scenecut=0:open-gop="
UNEVEN_MS = np.cumsum(np.random.default_rng(0).choice([20, 33, 50, 67, 140, 400], N)) + 240  # starts late, too
FILMS = {  # file: codec, options, B-frames, stamps in ms
    "bframes.mp4": ("libx264", {"x264-params": X264 + "0"}, 3, None),
    "bframes.mkv": ("libx264", {"x264-params": X264 + "0"}, 3, None),
    "open_gop.mp4": ("libx264", {"x264-params": X264 + "1"}, 3, None),
    "open_gop.ts": ("libx264", {"x264-params": X264 + "1"}, 3, None),
    "uneven.mp4": ("libx264", {"x264-params": X264 + "0"}, 3, UNEVEN_MS),
    "uneven.mkv": ("libx264", {"x264-params": X264 + "0"}, 3, UNEVEN_MS),
    "hevc.mp4": ("libx265", {"x265-params": "bframes=3:log-level=none"}, None, None),
    "mpeg4.mp4": ("mpeg4", {}, 2, None),
    "mpeg4_without_stamps.avi": ("mpeg4", {}, 2, None),
    "mjpeg.avi": ("mjpeg", {}, 0, None),
}


def numbered(index):
    """uint8 (H, W, 3) picture whose 12 blocks are the bits of its number, with a little colour in them."""
    bits = np.array([index >> b & 1 for b in range(12)]).reshape(3, 4)
    grey = np.kron(np.where(bits, 225, 30), np.ones((BLOCK, BLOCK)))
    return np.stack([grey, grey * 0.9 + 5, grey * 0.8 + 20], axis=-1).astype(np.uint8)


def number_of(picture):
    """The number drawn in a picture of any size with these proportions."""
    side = picture.shape[0] / 3
    centres = [picture[int((r + 0.5) * side), int((c + 0.5) * side)].mean() > 128 for r in range(3) for c in range(4)]
    return sum(int(bit) << b for b, bit in enumerate(centres))


def numbers_of(clip):
    return [number_of(picture) for picture in clip]


def write_film(path, codec="libx264", options=None, b_frames=None, stamps_ms=None, n=N, fps=Fraction(FPS), sound_sec=0,
               duration_tag=None):
    """A film of numbered pictures; sound_sec: silence from 0 s on."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound_sec else None
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.options = WIDTH, HEIGHT, options or {}
        if duration_tag is not None:
            stream.metadata["DURATION"] = duration_tag
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 30
        stream.codec_context.bit_rate = 2_000_000
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if stamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for start in range(0, 8000 * sound_sec, 80):  # packets of 10 ms
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 80), np.int16), "s16", "mono")
            silence.pts, silence.sample_rate, silence.time_base = start, 8000, Fraction(1, 8000)
            container.mux(sound.encode(silence))
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(numbered(i), "rgb24")
            frame.pts, frame.time_base = (i, 1 / fps) if stamps_ms is None else (int(stamps_ms[i]), Fraction(1, 1000))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def kinds_of_frames(path):
    with av.open(str(path)) as container:
        return {int(frame.pict_type) for frame in container.decode(video=0)}


def opencv_pictures(path):
    """What another decoder shows, RGB."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    pictures = []
    while (read := capture.read())[0]:
        pictures.append(read[1][..., ::-1])
    return pictures


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films with spaces")
    return {name: write_film(folder / name, *how) for name, how in FILMS.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def frames_at(path, times_sec, short_side=None):
    """The frames on screen at these times, uint8 (T, H, W, 3)."""
    info = video_files.probe(path)
    wanted = video_files.on_screen(info, np.array(times_sec)).tolist()
    frames = {}
    video_files.read_source(path, wanted, frames.__setitem__, short_side, FPS, last=max(wanted))
    return np.stack([frames[index] for index in wanted])


def true_times(name):
    stamps = FILMS[name][3]
    return np.arange(N) / FPS if stamps is None else (stamps - stamps[0]) / 1000


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_at_its_own_time(films, name):
    info = video_files.probe(films[name])
    assert (info.error, info.n_frames, info.size) == (None, N, (WIDTH, HEIGHT))
    np.testing.assert_allclose(info.times, true_times(name), atol=0.00051)  # Matroska has whole milliseconds
    assert numbers_of(frames_at(films[name], true_times(name))) == list(range(N))
    assert numbers_of(frames_at(films[name], true_times(name), 48)) == list(range(N))


def test_the_films_are_as_hard_as_they_say(films):
    for name, (_, _, b_frames, _) in FILMS.items():
        kinds = kinds_of_frames(films[name])
        assert (B_FRAME in kinds) == (b_frames != 0), f"{name}: {kinds}"
    assert video_files._header(films["uneven.mkv"], FPS).n_frames != N and len(set(np.diff(UNEVEN_MS))) == 6


@pytest.mark.parametrize("name", FILMS)
def test_the_frame_on_screen_between_stamps(films, name):
    """Every frame from its stamp until half a frame before the next, in any order; a freeze is not cut short."""
    times = true_times(name)
    gap = np.diff(times)
    nominal = 1 / video_files.probe(films[name]).header_fps
    early, late = times[:-1] + 0.25 * np.minimum(gap, nominal), times[1:] - 0.6 * np.minimum(gap, nominal)
    wanted, order = np.tile(np.arange(N - 1), 2), np.random.default_rng(1).permutation(2 * (N - 1))
    clip = frames_at(films[name], np.r_[early, np.maximum(early, late)][order], 48)
    assert numbers_of(clip) == wanted[order].tolist()


@pytest.mark.parametrize("name", FILMS)
def test_pixels_are_those_of_another_decoder(films, name):
    """Same frames; what differs is how two libraries round and filter the colour of neighbouring blocks."""
    pictures = opencv_pictures(films[name])
    clip = frames_at(films[name], true_times(name))
    flat = np.kron(np.ones((3, 4)), np.pad(np.ones((BLOCK - 8, BLOCK - 8)), 4)).astype(bool)  # without the edges
    difference = np.abs(clip.astype(int) - np.stack(pictures))
    assert difference[:, flat].max() <= 3 and difference.mean() < 1.5


def turned_film(path, source, height):
    """The film as a phone held upright writes it: stored lying, to be shown turned by a quarter, clockwise."""
    data = bytearray(source.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 16  # version 0: the matrix of the track header
    assert data[matrix:matrix + 4] == struct.pack(">i", 0x10000)
    data[matrix:matrix + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, height * 0x10000, 0, 0x40000000)
    path.write_bytes(data)
    return path


def test_rotation_is_applied(films, tmp_path):
    turned = turned_film(tmp_path / "turned.mp4", films["bframes.mp4"], HEIGHT)
    info = video_files.probe(turned)
    assert info.size == (HEIGHT, WIDTH)
    clip = frames_at(turned, [1.0, 2.0])
    assert clip.shape == (2, WIDTH, HEIGHT, 3) and numbers_of(np.rot90(clip, 1, (1, 2))) == [15, 30]  # stored lying
    data = turned.read_bytes()
    for matrix, size, quarters in (((0, -1, 1, 0), (HEIGHT, WIDTH), -1), ((-1, 0, 0, -1), (WIDTH, HEIGHT), 2)):
        rows = [value * 0x10000 for value in matrix]
        turned.write_bytes(data.replace(struct.pack(">5i", 0, 0x10000, 0, -0x10000, 0),
                                        struct.pack(">5i", *rows[:2], 0, *rows[2:])))
        clip = frames_at(turned, [1.0, 2.0])
        assert video_files.probe(turned).size == size and clip.shape == (2, *size[::-1], 3)
        assert numbers_of(np.rot90(clip, quarters, (1, 2))) == [15, 30], "the other way round, or on its head"


def test_odd_rate_is_sampled_by_time(tmp_path):
    path = write_film(tmp_path / "odd.mp4", fps=Fraction(149937, 10000), n=120)
    info = video_files.probe(path)
    assert 119 / np.ptp(info.times) == pytest.approx(14.9937, abs=1e-4)
    assert info.duration_sec == pytest.approx(120 / 14.9937, abs=1e-3)
    times = np.arange(0, 7.9, 1 / 12)
    times = times[np.abs(times * 14.9937 % 1 - 0.5) > 0.02]  # between two frames the later one counts a ms early
    nearest = np.abs(times[:, None] - np.arange(120) / 14.9937).argmin(axis=1)
    assert numbers_of(frames_at(path, times)) == nearest.tolist()
    assert np.abs(np.floor(times * 15).astype(int) - nearest).max() == 1, "an index by 15 fps would be off"


# Times as a player shows them.


@pytest.mark.parametrize("delay_sec", [0, 2])
def test_seconds_count_from_the_start_of_the_file_not_from_its_first_picture(tmp_path, delay_sec):
    stamps_ms = 1000 * delay_sec + np.arange(N) * 40
    path = write_film(tmp_path / "late.mkv", stamps_ms=stamps_ms, sound_sec=6, fps=Fraction(25))
    info = video_files.probe(path)
    assert info.times[0] == pytest.approx(delay_sec) and info.duration_sec == pytest.approx(delay_sec + N / 25)
    store = open_store([path] * 2, [(2.4, 3.4), (0.2, 1.4)], fps=25, n_frames=8)
    first = round((2.4 - delay_sec) * 25)
    assert numbers_of(store[0]) == list(range(first, first + 25))
    assert store.audit[0].fault == ""
    assert ("before the first picture, at 2.00 s" in store.audit[1].fault) == (delay_sec > 0)
    assert numbers_of(open_store([path], [WHOLE], fps=25)[0]) == list(range(N)), "a whole file: all its pictures"


def test_a_transport_stream_that_begins_after_an_hour(tmp_path):
    path = write_film(tmp_path / "dvr.ts", stamps_ms=3_600_000 + np.arange(N) * 40, fps=Fraction(25))
    assert kinds_of_frames(path) and video_files.probe(path).times[0] == 0
    assert numbers_of(open_store([path], [(1, 2)], fps=25, n_frames=8)[0]) == list(range(25, 50))


def test_frame_numbers_are_looked_up_in_the_times_of_an_uneven_film(films, tmp_path):
    """First and last frame of each window, both inclusive, whatever the rate does between."""
    (tmp_path / "m.csv").write_text("path,label,start_frame,end_frame\n" + "".join(
        f"uneven.mp4,{'ab'[i % 2]},{10 * i},{10 * i + 9}\n" for i in range(9)))
    table = event_tables.read_events({"": tmp_path / "m.csv"}, films["uneven.mp4"].parent, min_event_sec=0)
    info = video_files.probe(films["uneven.mp4"])
    table = event_times.seconds_of(table, FPS, 0)
    store = open_store(table.sources, table.windows, fps=100, n_frames=4)
    for row in range(9):
        seen = numbers_of(store[row])
        assert seen[0] == 10 * row and set(seen) >= set(range(10 * row, 10 * row + 10)) and seen[-1] <= 10 * row + 10
    assert event_times.time_of_frame(info, 95) > info.duration_sec, "beyond the end"
    for n_frames in range(1, 400):
        info = made_info(n_frames / 25, 25)
        assert event_times.time_of_frame(info, n_frames) >= info.duration_sec, "the first frame that is not there"


# Suffixes and formats.


def test_interlaced_film(tmp_path):
    path = write_film(tmp_path / "camcorder.mts", options={"x264-params": "interlaced=1:bframes=2:keyint=30"})
    clips = [open_store([path], [WHOLE], fps=FPS)[0] for _ in range(2)]
    assert numbers_of(clips[0]) == list(range(N)) and np.array_equal(*clips)


@pytest.mark.parametrize("name", ["raw.h264", "a.m2ts", "a.3gp", "a.flv", "a.vob", "a.asf", "a.mkv", "no_suffix"])
def test_whatever_ffmpeg_opens_is_a_video(tmp_path, name):
    codec = {"a.vob": "mpeg2video", "a.asf": "wmv2"}.get(name, "libx264")
    path = write_film(tmp_path / name.replace("no_suffix", "made.mp4"), codec, fps=Fraction(25))
    path = path.rename(tmp_path / name)
    info = video_files.probe(path)
    assert (info.error, info.n_frames) == (None, N)
    np.testing.assert_allclose(info.times, np.arange(N) / 25, atol=0.0011)
    assert numbers_of(open_store([path], [(1, 2)], fps=25, n_frames=8)[0]) == list(range(25, 50))


def test_a_file_never_opens_another(films, tmp_path):
    """Playlists under a video's name."""
    write_film(tmp_path / "secret.ts")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "parts.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    for name in ("list.mp4", "parts.mp4"):
        assert "no video that can be opened" in video_files.probe(tmp_path / name).error


CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "video"


def barcode(picture):
    """The number in the ten bars of the cases' pictures, the lowest bit left."""
    height, width = picture.shape[:2]
    row = picture[height // 5:height * 45 // 100].mean((0, 2))
    bars = [row[int((bit + 0.3) * width / 10):int((bit + 0.7) * width / 10) + 1].mean() for bit in range(10)]
    return sum(int(bar > 128) << bit for bit, bar in enumerate(bars))


@pytest.mark.skipif(not CASES.is_dir(), reason=f"files of other programs are not at {CASES.name}")
@pytest.mark.parametrize("name, window, first, n_frames", [
    ("01_interlaced/clip01.mts", WHOLE, 10, 60), ("03_frame_windows_vfr/vfr.mp4", (15, 17), 200, 400),
    ("04_video_starts_after_audio/late.mp4", (5, 6.5), 75, 400), ("04_video_starts_after_audio/cut.mp4", (15, 17), 630, 157),
    ("05_damaged_in_the_middle/hole.mp4", (9, 11), 225, 325), ("06_still_picture_with_sound/rec.mp4", (123.2, 124.7), 80, 150),
    ("07_suffixes/cage1.h264", (0, 1), 0, 100), ("07_suffixes/dvr.ts", (1, 2), 25, 100)])
def test_files_of_other_programs(name, window, first, n_frames):
    store = open_store([CASES / name], [window], fps=25, n_frames=8, short_side=96)
    seen = [barcode(picture) for picture in store[0]]
    assert (store.audit[0].error, store.audit[0].fault, store.audit[0].n_frames) == (None, "", n_frames)
    assert seen[0] == first and (np.diff(seen) >= 0).all() and len(set(seen)) > 0.9 * len(seen)


@pytest.mark.parametrize("apart, expected", [(0.0, {2}), (0.05, {1, 2}), (0.099, {1, 2}), (0.2, {0}), (0.27, {0})])
def test_windows_of_nearly_one_middle_share_a_place_and_those_a_fifth_of_a_second_apart_none(apart, expected):
    middles = np.arange(0, 2, 0.003)
    windows = [(middle - length, middle + length) for length in (1, 3) for middle in (middles + apart * (length == 3))]
    places = np.transpose(video_files.places_of(windows)[1:]).reshape(2, len(middles), 2)
    assert set((places[0] == places[1]).sum(1)) == expected


# Files that lie, and broken ones.


def damaged_film(path, first=40, last=55, b_frames=0):
    """A film of 90 frames, one packet each, whose packets from `first` to `last` are overwritten."""
    write_film(path, options={"x264-params": f"bframes={b_frames}:b-adapt=0:keyint=10:scenecut=0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[first:last]:
        data[packet.pos:packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    return path


def test_damage_in_the_middle_is_stepped_over_counted_and_named(tmp_path, capsys):
    path = damaged_film(tmp_path / "hole.mp4")
    info = video_files.probe(path)
    assert info.error is None and info.duration_sec == pytest.approx(N / FPS)
    assert (info.n_frames, info.damage) == (70, "20 of 90 frames damaged, between 2.67 and 3.93 s"), "to the next key frame"
    windows = [(0.2, 1.2), (2.8, 3.5), (4.2, 5.2)]
    store = open_store([path] * 3, windows, fps=FPS, n_frames=8)
    assert numbers_of(store[0]) == list(range(3, 18)) and numbers_of(store[2]) == list(range(63, 78))
    assert [found.fault for found in store.audit] == ["", "most frames of its window are damaged", ""]
    with pytest.raises(common.UserError, match="20 of 90 frames are damaged.*--max_missing[^!]*hole.mp4: 20 of 90"):
        video_files.check_clips(store.audit, 0.05, "skip")
    video_files.check_clips(store.audit, 0.4, "skip")
    assert "note: 20 of 90 frames are damaged; left out:" in capsys.readouterr().out


def test_damaged_frames_that_are_stored_in_another_order_keep_their_times(tmp_path):
    info = video_files.probe(damaged_film(tmp_path / "hole.mp4", 40, 45, b_frames=2))
    assert sorted(np.rint(info.damaged * FPS)) == list(range(40, 50)), "to the next key frame"
    assert np.rint(info.times * FPS).tolist() == [*range(40), *range(50, N)]


def test_a_frame_that_cannot_be_converted_stops_the_reading_of_its_file(films, monkeypatch):
    class Reformatter:
        own = av.video.reformatter.VideoReformatter()
        n_asked = 0

        def reformat(self, frame, **options):
            self.n_asked += 1
            if self.n_asked == 31:
                raise av.error.InvalidDataError(1, "bad frame")
            return self.own.reformat(frame, **options)
    monkeypatch.setattr(av.video.reformatter, "VideoReformatter", Reformatter)
    with pytest.raises(video_files.BadVideo, match="bad frame"):
        list(video_files.Recording(films["bframes.mp4"], FPS, 48).grid())
    assert "bad frame" in open_store([films["bframes.mp4"]], [WHOLE], fps=FPS).audit[0].error


def rgb_by_definition(frame, size):
    """(H, W, 3) float of a yuv420p frame: its planes averaged over areas (colours that grow: linear), then ITU-R BT.601 with studio swing."""
    planes = frame.to_ndarray()
    height, width = frame.height, frame.width
    blue, red = planes[height:].reshape(2, height // 2, width // 2)
    light, blue, red = (
        cv2.resize(plane.astype(np.float32), size,
                   interpolation=cv2.INTER_AREA if size[0] <= plane.shape[1] else cv2.INTER_LINEAR)
        for plane in (planes[:height], blue, red))
    light = (light - 16) * 255 / 219
    blue = (blue - 128) * 255 / 224
    red = (red - 128) * 255 / 224
    return np.stack([light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue], -1)


@pytest.mark.parametrize("is_turned, size", [(False, (149, 112)), (True, (149, 112)), (False, (640, 480))])
def test_frames_have_the_colours_of_the_definition(tmp_path, is_turned, size):
    """No level of 255 off on average, in either direction; turned by a quarter, too."""
    colours = np.random.default_rng(0).integers(40, 216, (6, 8, 3), dtype=np.uint8)
    picture = cv2.resize(colours, (640, 480), interpolation=cv2.INTER_CUBIC)
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        expected = rgb_by_definition(next(container.decode(video=0)), size)
    if is_turned:
        path = turned_film(tmp_path / "turned.mp4", path, 480)
        expected = np.rot90(expected, -1)
    [pixels] = frames_at(path, [0.0], short_side=size[1])
    error = pixels - expected
    assert np.abs(error.mean((0, 1))).max() < 0.2
    assert np.abs(error).mean() < 0.5


@pytest.mark.parametrize("name", ["flipped.mp4", "flipped.h264"])
def test_pictures_that_a_decoder_made_up_are_damaged_ones(tmp_path, name):
    """Bytes inside a packet are others: nothing is raised, and the pictures up to the next key frame are wrong."""
    path = write_film(tmp_path / name, options={"x264-params": "bframes=0:keyint=10:scenecut=0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][44]
    begin, end = (packet.pos + packet.size * third // 3 for third in (1, 2))
    data[begin:end] = np.random.default_rng(0).integers(0, 256, end - begin, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    info = video_files.probe(path, FPS)
    assert (info.n_frames, len(info.damaged)) == (84, 6) and "6 of 90 frames damaged" in info.damage
    recording = video_files.Recording(path, FPS, 48)
    shown = {number_of(pixels(48)) for _, pixels in recording.frames()}
    assert shown == {*range(44), *range(50, N)}
    list(recording.grid())
    loss = " ".join(recording.losses())
    assert "6 frames are damaged" in loss and "nan" not in loss


def test_rows_in_frames_of_a_damaged_film_are_skipped(tmp_path):
    damaged_film(tmp_path / "hole.mp4")
    (tmp_path / "m.csv").write_text("path,label,start_frame,end_frame\nhole.mp4,a,0,9\nhole.mp4,b,70,79\n")
    table = event_tables.read_events({"": tmp_path / "m.csv"})
    table = event_times.seconds_of(table, FPS)
    assert len(table) == 0 and "frames cannot be counted" in table.skipped[0]["reason"]


def test_a_row_in_frames_of_a_file_that_cannot_be_read_stays_in_frames(tmp_path):
    write_film(tmp_path / "good.mp4", n=30)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "m.csv").write_text("path,label,start_frame,end_frame\nbad.mp4,a,0,9\ngood.mp4,b,15,29\n")
    table = event_times.seconds_of(event_tables.read_events({"": tmp_path / "m.csv"}), FPS)
    assert table.unit.tolist() == ["frame", "sec"] and table.windows[0].tolist() == [0, 10]
    assert table.windows[1] == pytest.approx([1, 2])


def test_a_standing_picture_with_sound_is_read_to_its_end(tmp_path):
    """60 s and 6,000 packets of sound without a picture."""
    stamps_ms = np.r_[np.arange(45) * 40, 60_000 + np.arange(45) * 40]
    path = write_film(tmp_path / "slide.mkv", stamps_ms=stamps_ms, sound_sec=62, fps=Fraction(25))
    assert video_files.probe(path).n_frames == N
    assert numbers_of(open_store([path], [(60.2, 61.2)], fps=25, n_frames=8)[0]) == list(range(50, 75))


def avi_of(tmp_path, n=60):
    return write_film(tmp_path / "whole.avi", "mjpeg", n=n)


def test_half_an_avi_is_read_to_its_real_end(tmp_path):
    """The header says 60 frames, the file holds 29."""
    data = avi_of(tmp_path).read_bytes()
    at = data.find(b"movi")
    for _ in range(30):
        at = data.find(b"00dc", at + 4)
    half = tmp_path / "half.avi"
    half.write_bytes(data[:at])
    info = video_files.probe(half)
    assert (info.error, info.n_frames, video_files._header(half, FPS).n_frames) == (None, 29, 60)
    assert info.duration_sec == pytest.approx(29 / FPS)
    assert numbers_of(frames_at(half, [0, 1, 1.9, 3.5], 48)) == [0, 15, 28, 28]
    store = open_store([half] * 3, [(0.2, 1.2), (1.5, 3.0), (2.5, 3.5)], fps=15, n_frames=8)
    past = "its window starts past the end of the video"
    assert [found.fault for found in store.audit] == ["", "", past]
    assert numbers_of(store[0]) == list(range(3, 18)) and numbers_of(store[1]) == list(range(21, 29))
    assert numbers_of(store[2]) == list(range(21, 29)), "the last frames that there are"


def test_a_header_that_claims_too_few_or_far_too_many(tmp_path):
    for claim in (5, 2**31 - 1):
        data = bytearray(avi_of(tmp_path).read_bytes())
        data[48:52] = struct.pack("<I", claim)  # avih: dwTotalFrames
        length = data.find(b"strh") + 8 + 32  # strh: dwLength
        assert struct.unpack_from("<I", data, length)[0] == 60
        data[length:length + 4] = struct.pack("<I", claim)
        path = tmp_path / f"claims {claim}.avi"
        path.write_bytes(data)
        info = video_files.probe(path)
        assert (info.n_frames, info.error) == (60, None) and video_files._header(path, FPS).n_frames != 60
        assert numbers_of(open_store([path], [WHOLE], fps=15, n_frames=8)[0]) == list(range(60))


def test_truncated_mp4_with_its_index_first_is_read_as_far_as_it_goes(tmp_path):
    path = write_film(tmp_path / "a.mp4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "front.mp4"), "w", options={
            "movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "front.mp4").write_bytes(data[:len(data) * 2 // 3])
    info = video_files.probe(tmp_path / "front.mp4")
    assert info.error is None and 10 < info.n_frames < N == video_files._header(tmp_path / "front.mp4", FPS).n_frames
    assert numbers_of(frames_at(tmp_path / "front.mp4", info.times[:-1], 48)) == list(range(info.n_frames - 1))


def broken_files(folder):
    """{path: part of the reason} of files that are no video."""
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("no video at all\n" * 40)
    (folder / "noise.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty").mkdir()
    reasons = {"zero.mp4": "empty file", "text.mp4": "no video", "noise.avi": "no video",
               "empty": "without pictures", "missing.mp4": "no such file"}
    return {folder / name: reason for name, reason in reasons.items()}


def test_films_of_which_nothing_can_be_shown_say_why(tmp_path, monkeypatch):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 80), np.int16), "s16", "mono")
        silence.pts, silence.sample_rate, silence.time_base = 0, 8000, Fraction(1, 8000)
        container.mux(sound.encode(silence))
    assert "no picture track" in video_files.probe(tmp_path / "sound.mkv").error
    path = damaged_film(tmp_path / "lost.mp4", first=0, last=90)
    assert "none of its frames can be decoded" in video_files.probe(path).error
    with pytest.raises(video_files.BadVideo, match="no frame can be decoded"):
        list(video_files.Recording(path, FPS, 48).grid())
    monkeypatch.setattr(pixel_cache, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    assert f"its header claims {WIDTH} x {HEIGHT} pixels" in video_files.probe(path).error


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_broken_files_are_named_and_never_raise(tmp_path, cache):
    files = broken_files(tmp_path)
    for path, reason in files.items():
        info = video_files.probe(path)
        assert reason in info.error and "\n" not in info.error and info.n_frames == 0
    store = open_store(list(files), [WHOLE] * len(files), cache=cache)
    for row, (path, reason) in enumerate(files.items()):
        assert store.audit[row].path == str(path) and reason in store.audit[row].error
        with pytest.raises(pixel_cache.BadImage, match="no |empty|without"):
            store[row]


def test_truncated_mp4_without_index_is_broken(films, tmp_path):
    data = films["bframes.mp4"].read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:len(data) // 2])
    assert "no video that can be opened" in video_files.probe(tmp_path / "cut.mp4").error


def audits(n_good, n_bad, n_files):
    good = [video_files.ClipAudit(f"good{i}.mp4") for i in range(n_good)]
    return good + [video_files.ClipAudit(f"bad{i % n_files}.mp4", "empty file") for i in range(n_bad)]


def test_broken_videos_stop_the_run_above_the_limit(capsys):
    video_files.check_clips(audits(20, 0, 1), 0.05, "error")
    assert not capsys.readouterr().out
    video_files.check_clips(audits(95, 5, 2), 0.05, "skip")
    out = capsys.readouterr().out
    assert "2 videos" in out and "5 of 100 rows" in out and "bad0.mp4: empty file" in out and "bad1.mp4" in out
    with pytest.raises(common.UserError, match="6 videos cannot be read, which takes 6 of 100 rows") as caught:
        video_files.check_clips(audits(94, 6, 6), 0.05, "skip")
    assert all(f"bad{i}.mp4" in str(caught.value) for i in range(6)) and "--max_missing" in str(caught.value)
    with pytest.raises(common.UserError, match="1 videos cannot be read"):
        video_files.check_clips(audits(99, 1, 1), 0.05, "error")
    with pytest.raises(common.UserError, match="2 of 2 rows"):
        video_files.check_clips(audits(0, 2, 1), 1.0, "skip")


# Folders of frames and arrays.


def frame_folder(folder, n, side=None):
    folder.mkdir(parents=True)
    for i in range(n):
        picture = Image.fromarray(numbered(i))
        (picture.resize(side) if side else picture).save(folder / f"frame {i}.png")
    return folder


def test_frame_folder_in_natural_order_with_spaces(tmp_path):
    path = frame_folder(tmp_path / "Animal 1 M0 visit 2", 23)
    (path / "._frame 3.png").write_bytes(b"resource")
    info = video_files.probe(path, fps=10)
    assert (info.n_frames, info.duration_sec, info.size) == (23, 2.3, (WIDTH, HEIGHT))
    even = open_store([path], [WHOLE], grid="even", n_frames=40)
    assert numbers_of(even[0]) == list(range(23)) and even.audit[0].usable == 23
    eight = open_store([path], [WHOLE], grid="even", n_frames=8)
    assert numbers_of(eight[0]) == np.floor(np.linspace(0, 22, 8) + 0.5).astype(int).tolist()
    rate = open_store([path], [(0.5, 1.5)], fps=10, n_frames=4)
    assert numbers_of(rate[0]) == list(range(5, 15))


def test_frame_folder_with_a_bad_or_odd_frame(tmp_path):
    bad, odd = frame_folder(tmp_path / "bad", 5), frame_folder(tmp_path / "odd", 5)
    (bad / "frame 3.png").write_text("no picture")
    Image.fromarray(numbered(1)[:64]).save(odd / "frame 1.png")
    store = open_store([bad, odd], [WHOLE] * 2, grid="even")
    assert "frame 3.png" in store.audit[0].error and "128 x 96 and 128 x 64" in store.audit[1].error


@pytest.mark.parametrize("pixel_range, expected", [(None, (0, 1023)), ([100, 900], (100, 900))])
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_folders_of_deep_frames_share_one_range(tmp_path, pixel_range, expected, cache):
    values = np.random.default_rng(0).integers(0, [[[[400]]], [[[1000]]]], (2, 5, 16, 16))
    for folder, frames in zip("ab", values):
        (tmp_path / folder).mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame.astype(np.uint16)).save(tmp_path / folder / f"{i}.png")
    sources = [tmp_path / "a", tmp_path / "b", frame_folder(tmp_path / "c", 3)]
    store = open_store(sources, [WHOLE] * 3, grid="even", short_side=16, cache=cache, pixel_range=pixel_range)
    low, high = expected
    scaled = np.rint(((values - low) * (255 / (high - low))).clip(0, 255))
    for row in range(2):
        np.testing.assert_array_equal(store[row][..., 0], scaled[row])
    recording = video_files.Recording(sources[0], FPS, 16, store.pixel_range)
    np.testing.assert_array_equal([pixels[..., 0] for pixels, _ in recording.grid()], scaled[0])
    assert f"{low} to {high} became 0 to 255" in store.description
    assert open_store(sources[2:], [WHOLE], grid="even").pixel_range is None


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(numbered(7)).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    store = open_store([tmp_path / "a.png", tmp_path / "broken.jpg"], [WHOLE] * 2, n_frames=4)
    assert numbers_of(store[0]) == [7] * 4 and store.audit[0].indices == [0] * 4 and store.audit[0].n_frames == 1
    assert store.audit[1].error


def test_animations_and_stacks_of_pages_are_no_still_pictures(tmp_path):
    """Pillow shows the first one alone; a phone's JPEG with a preview inside is one picture."""
    pages = [Image.fromarray(numbered(i)) for i in range(3)]
    for name in ("a.gif", "a.tif", "a.webp", "a.mpo", "still.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:] if name[0] == "a" else [])
    for name in ("a.gif", "a.tif", "a.webp"):
        assert f"3 pictures in one file: make a video or a folder of frames of {name}" in video_files.probe(tmp_path / name).error
    assert not video_files.probe(tmp_path / "a.mpo").error and not video_files.probe(tmp_path / "still.gif").error


class Bomb:
    """Pickled, it would write a file when it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_npy_clips(tmp_path):
    clip = np.stack([numbered(i) for i in range(20)])
    np.save(tmp_path / "good.npy", clip)
    store = open_store([tmp_path / "good.npy"], [(0.5, 1.5)], fps=10, n_frames=4, short_side=HEIGHT)
    assert np.array_equal(store[0], clip[5:15])
    np.save(tmp_path / "float.npy", clip.astype(np.float32))
    np.save(tmp_path / "flat.npy", clip[0])
    np.save(tmp_path / "bomb.npy", np.array([Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    whole = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "claims.npy").write_bytes(whole.replace(b"(20, 96, 128, 3)", b"(9999999, 9, 9, 3)")[:2000])
    for name, reason in {"float": "found float32", "flat": r"found uint8 \(96", "bomb": "no .npy", "pickle": "no .npy",
                         "cut": "no .npy", "claims": "no .npy"}.items():
        error = video_files.probe(tmp_path / f"{name}.npy").error
        assert re.search(reason, error), f"{name}: {error}"
    assert not (tmp_path / "exploded").exists()


# Plans: which frames stand on the grid of a row.


def made_info(duration, fps):
    n = round(duration * fps)
    return video_files.VideoInfo(duration_sec=n / fps, n_frames=n, times=np.arange(n) / fps, header_fps=fps)


def planned(window, duration=10.0, source_fps=12.0, n_frames=16, jitter_sec=0.0):
    plan = video_files.plan_grid(made_info(duration, source_fps), window, "rate", 12.0, n_frames, jitter_sec)
    return plan.indices, plan.first, plan.usable, "past the end" in plan.fault


def test_grid_of_a_window_by_hand():
    span = lambda a, b: list(range(a, b))  # noqa: E731
    assert planned((2.0, 4.0)) == (span(24, 48), 0, 24, False)
    assert planned((2.0, 4.0), jitter_sec=0.25) == (span(21, 51), 3, 24, False)
    assert planned((3.0, 3.0), n_frames=12) == (span(30, 42), 0, 12, False), "duration 0: widened around its centre"
    assert planned((0.0, 0.5), n_frames=12, jitter_sec=0.25) == (span(0, 15), 0, 12, False), "shifted into the file"
    assert planned((9.5, 11.0), n_frames=12, jitter_sec=0.25) == (span(105, 120), 3, 12, False)
    assert planned((10.0, 12.0), n_frames=12) == (span(108, 120), 0, 12, True)
    assert planned((500.0, 502.0), n_frames=12)[3] and planned((9.99, 20.0))[3] is False
    assert planned(WHOLE, duration=1.0) == (span(0, 12) + [11] * 4, 0, 16, False), "the last frame is repeated"
    assert planned((-3.0, 2.0)) == (span(0, 24), 0, 24, False)
    assert planned((2.0, 3.5), source_fps=24.0)[0] == span(48, 84)[::2]
    assert planned((2.0, 3.5), source_fps=6.0)[0][:6] == [12, 13, 13, 14, 14, 15], "halfway counts as the later frame"


def test_grids_hold_what_they_promise():
    rng = np.random.default_rng(0)
    for _ in range(300):
        duration, fps, n_frames = rng.uniform(0.1, 20), rng.choice([5, 12, 14.9937, 30]), int(rng.integers(1, 40))
        start, length, jitter = rng.uniform(-1, duration + 1), rng.uniform(0, 5), rng.uniform(0, 1)
        info = made_info(max(duration, 1 / fps), fps)
        plan = video_files.plan_grid(info, (start, start + length), "rate", 12.0, n_frames, jitter)
        after = len(plan.indices) - plan.first - plan.usable
        assert plan.usable >= n_frames and 0 <= plan.first <= 12 * jitter + 1e-6 and 0 <= after <= 12 * jitter + 1e-6
        assert (np.diff(plan.indices) >= 0).all() and 0 <= plan.indices[0] and plan.indices[-1] < info.n_frames
        assert ("past the end" in plan.fault) == (start >= info.duration_sec)
        even = video_files.plan_grid(info, (start, start + length), "even", 12.0, n_frames).indices
        assert 1 <= len(even) <= n_frames and (np.diff(even) > 0).all()


def test_even_grid_has_both_ends_of_its_window():
    plan = functools.partial(video_files.plan_grid, made_info(10, 12), grid="even", fps=12, n_frames=16)
    assert plan(window=WHOLE).indices[::15] == [0, 119]
    assert plan(window=(2.0, 4.0)).indices[::15] == [24, 47]
    assert plan(window=(2.0, 3.0)).indices == list(range(24, 36)), "fewer frames than asked for: all of them"


# The store.


def open_store(sources, windows, grid="rate", fps=12.0, n_frames=16, short_side=48, cache="ram", **options):
    return video_files.ClipStore(sources, windows, grid=grid, fps=fps, n_frames=n_frames, short_side=short_side,
                                 cache=cache, **options)


@pytest.fixture
def mixed(films, tmp_path):
    """(sources, windows) of films, a folder, an array and a broken file; two rows of one file stand apart."""
    np.save(tmp_path / "clip.npy", np.stack([numbered(i) for i in range(30)]))
    (tmp_path / "zero.mp4").touch()
    sources = [films["bframes.mp4"], films["uneven.mkv"], frame_folder(tmp_path / "frames", 9), films["bframes.mp4"],
               tmp_path / "clip.npy", tmp_path / "zero.mp4"]
    return sources, [(1, 2), (0.5, 2.5), WHOLE, (3.5, 5.5), (0, 1), WHOLE]


@pytest.mark.parametrize("cache", ["ram", "disk", "none", "auto"])
def test_every_cache_serves_the_same_clips(mixed, cache):
    store = open_store(*mixed, cache=cache, jitter_sec=0.2)
    reference = open_store(*mixed, jitter_sec=0.2)
    assert store.audit == reference.audit and len(store) == 6
    assert all(np.array_equal(store[i], reference[i]) for i in range(5))
    assert store.cache == ("ram" if cache == "auto" else cache) and "6 clips" in store.description
    assert store.audit[5].error and not any(found.error for found in store.audit[:5])
    if cache != "none":
        with pytest.raises(ValueError, match="read-only"):
            store[0][:] = 0


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_forked_workers_read_clips(mixed, cache):
    store = open_store(mixed[0][:5], mixed[1][:5], cache=cache)
    loader = torch.utils.data.DataLoader(range(5), batch_size=None, num_workers=2, multiprocessing_context="fork",
                                         collate_fn=store.__getitem__)
    assert [np.array_equal(clip, store[i]) for i, clip in enumerate(loader)] == [True] * 5


def test_rows_of_one_honest_file_are_decoded_in_one_pass(films, monkeypatch):
    passes, read = [], video_files.read_source
    monkeypatch.setattr(video_files, "read_source", lambda path, *a, **k: passes.append(path) or read(path, *a, **k))
    windows = [(t, t + 1) for t in (0, 4.5, 2, 2.5)]
    store = open_store([films["bframes.mp4"]] * 4, windows, fps=15, n_frames=8)
    assert len(passes) == 1 and [number_of(store[i][0]) for i in range(4)] == [0, 68, 30, 38]
    assert len({found.pixel_sha for found in store.audit}) == 4
    open_store([films["uneven.mkv"]], [(1, 2)])
    assert len(passes) == 3, "its header lies: counted first, read then"


def test_audit_of_a_clip(films):
    store = open_store([films["bframes.mp4"]], [(1, 3)], jitter_sec=0.5)
    found = store.audit[0]
    assert (found.n_frames, found.first, found.usable, found.fault) == (N, 6, 24, "")
    assert store[0].shape == (36, 48, 64, 3) and store[0].dtype == np.uint8
    assert found.pixel_sha == hashlib.sha256(store[0][6:30].tobytes()).hexdigest()
    assert found.phash == picture_files.perceptual_hash(store[0][18]).tolist()
    times = 1 + np.arange(-6, 30) / 12
    assert np.array_equal(store[0], frames_at(films["bframes.mp4"], times, 48))


@pytest.mark.parametrize("window", [(1, 3), (0, 2)])
def test_a_clip_has_the_same_hashes_whatever_jitter_reads_around_it(films, window):
    """So that prediction, which has none, knows the rows of a training with jitter."""
    found, same = (
        open_store([films["bframes.mp4"]], [window], jitter_sec=jitter_sec).audit[0] for jitter_sec in (0, 0.5))
    assert len(same.indices) > len(found.indices)
    assert (found.pixel_sha, found.phash) == (same.pixel_sha, same.phash)


def test_grid_frames_of_a_slow_source_are_marked_as_shown_before(films):
    store = open_store([films["bframes.mp4"]], [(1, 3)], fps=2 * FPS)
    again = [place for place in range(1, len(store[0])) if (store[0][place] == store[0][place - 1]).all()]
    indices = store.audit[0].indices
    assert [place for place in range(1, len(indices)) if indices[place] == indices[place - 1]] == again and len(again) == 29


@pytest.mark.parametrize("make, window, fps, is_said", [
    (write_film, WHOLE, FPS, False), (write_film, WHOLE, 2 * FPS, True), (damaged_film, (2.3, 3.3), FPS, False),
    (lambda path: write_film(path, stamps_ms=UNEVEN_MS), WHOLE, 6, True),
    (lambda path: write_film(path, n=14), WHOLE, FPS, True)])
@pytest.mark.parametrize("jitter_sec", [0, 0.5])
def test_videos_that_are_slow_uneven_or_short_are_named(tmp_path, make, window, fps, is_said, jitter_sec):
    """Not where a hole of damaged frames repeats some."""
    store = open_store([make(tmp_path / "film.mp4")], [window], fps=fps, jitter_sec=jitter_sec)
    notes = store.time_notes()
    assert len(notes) == is_said and all(f"1 videos show some frames twice ({tmp_path}" in note for note in notes)


# --- whole recordings ----------------------------------------------------------------------------

@pytest.mark.parametrize("fps", [4, 12, 2 * FPS])
@pytest.mark.parametrize("name", FILMS)
def test_a_recording_shows_what_stands_on_the_grid_of_a_clip(films, name, fps):
    """Frame by frame in one pass, with the times and the repeats of the grid; judge: the grid that clips are cut from."""
    info = video_files.probe(films[name])
    plan = video_files.plan_grid(info, WHOLE, "rate", fps, 1)
    recording = video_files.Recording(films[name], fps, 48)
    shown = list(recording.grid())
    n = min(len(shown), len(plan.indices))
    assert abs(len(shown) - len(plan.indices)) <= 1, "how long the last frame is shown is a guess"
    assert recording.spans(range(n), 1)[:, 0] == pytest.approx(info.times[0] + np.arange(n) / fps)
    assert numbers_of([pixels for pixels, _ in shown[:n]]) == plan.indices[:n]
    assert [is_new for _, is_new in shown[:n]] == (np.diff(plan.indices[:n], prepend=-1) > 0).tolist()
    assert recording.read_sec == pytest.approx(info.duration_sec, abs=0.5)


def test_a_recording_of_frames_without_a_clock(tmp_path):
    np.save(tmp_path / "clip.npy", np.stack([numbered(i) for i in range(7)]))
    recording = video_files.Recording(tmp_path / "clip.npy", 5, 48)
    assert numbers_of([pixels for pixels, _ in recording.grid()]) == list(range(7))
    assert recording.read_sec == pytest.approx(7 / 5)


def test_a_recording_of_pictures_steps_over_damaged_ones(tmp_path):
    """The frame before is shown again, as in a video, and none is written with --annotate; the first tells the size."""
    for i in range(8):
        Image.fromarray(numbered(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:200])
    recording = video_files.Recording(tmp_path, 5, 48)
    shown = list(recording.grid())
    assert numbers_of([pixels for pixels, _ in shown]) == [0, 1, 2, 2, 2, 5, 6, 7]
    assert [is_new for _, is_new in shown] == [True] * 3 + [False] * 2 + [True] * 3
    [loss] = recording.losses()
    assert "2 frames are damaged, the first at 0.60 s" in loss
    found = [(round(5 * time), number_of(convert(48))) for time, convert in recording.frames()]
    assert found == [(i, i) for i in (0, 1, 2, 5, 6, 7)]
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(pixel_cache.BadImage, match="0.png: empty file, 0 bytes"):
        video_files.Recording(tmp_path, 5, 48)


def test_the_frames_of_a_folder_of_16_bits_share_what_16_bits_can_hold(tmp_path):
    """A model of pictures of 8 bits keeps no range."""
    for i, last in enumerate((60, 60, 60, 200)):
        Image.fromarray(np.array([[60, last]], np.uint16) * np.uint16(257)).save(tmp_path / f"{i}.png")
    shown = [pixels[0, :, 0].tolist() for pixels, _ in video_files.Recording(tmp_path, 5, 1).grid()]
    assert shown == [[60, 60]] * 3 + [[60, 200]]


@pytest.mark.parametrize("tag", ["", "abc", "2:05", "N/A", "-0:00:01"])
@pytest.mark.parametrize("suffix", ["mkv", "nut"])
def test_a_duration_that_is_no_time_is_that_of_the_container(tmp_path, suffix, tag):
    path = write_film(tmp_path / f"film.{suffix}", duration_tag=tag)
    if suffix == "mkv":  # which writes its own
        content = path.read_bytes()
        own = b"00:00:06.000000000"
        assert content.count(own) == 1
        path.write_bytes(content.replace(own, tag.encode().ljust(len(own), b"\0")))
    recording = video_files.Recording(path, FPS, 48)
    assert recording.info.header_sec == pytest.approx(6, abs=0.1)


def test_a_recording_slower_than_its_grid_says_so(films):
    for fps, notes in ((FPS, []), (2 * FPS, [f"has {FPS:.1f} frames a second, fewer than the {2 * FPS} of a window"])):
        recording = video_files.Recording(films["bframes.mp4"], fps, 48)
        list(recording.grid())
        assert len(recording.losses()) == len(notes)
        assert all(note in loss for note, loss in zip(notes, recording.losses()))


def test_a_hole_in_a_recording_is_damage_and_no_lower_rate(tmp_path):
    recording = video_files.Recording(damaged_film(tmp_path / "hole.mp4"), FPS, 48)
    list(recording.grid())
    [loss] = recording.losses()
    assert "20 frames are damaged" in loss


@pytest.mark.parametrize("suffix", ["mov", "mkv"])
def test_a_recording_whose_sound_goes_on_has_lost_nothing(tmp_path, suffix):
    path = write_film(tmp_path / f"film.{suffix}", sound_sec=12)
    recording = video_files.Recording(path, FPS, 48)
    n_shown = len(list(recording.grid()))
    assert n_shown == N - (suffix == "mkv") and recording.losses() == [], "Matroska rounds its stamps"


def test_a_recording_that_breaks_is_read_up_to_there(films, tmp_path):
    whole = Path(films["mpeg4.mp4"].with_name("open_gop.ts")).read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(whole[:len(whole) // 2])
    recording = video_files.Recording(cut, 12, 48)
    shown = list(recording.grid())
    assert 20 < len(shown) < 60 and numbers_of([shown[10][0]]) == [13]
    assert recording.read_sec < 4.5
    half = tmp_path / "half.avi"
    data = avi_of(tmp_path).read_bytes()
    half.write_bytes(data[:len(data) // 2])
    recording = video_files.Recording(half, FPS, 48)
    n_shown = len(list(recording.grid()))
    assert 25 < n_shown < 32 and f"read up to {n_shown / FPS:.1f} of 4.0 s" in " ".join(recording.losses())
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    with pytest.raises(video_files.BadVideo, match="no video that can be opened"):
        video_files.Recording(tmp_path / "no.mp4", 12, 48)


def test_a_long_recording_takes_no_more_memory(tmp_path):
    film = write_film(tmp_path / "long.mp4", n=1200)
    tracemalloc.start()
    for _ in video_files.Recording(film, 12, 48).grid():
        pass
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6, "each of 960 frames takes 9 kB"


def test_without_a_cache_only_the_frames_in_use_are_read(films, monkeypatch):
    store = open_store([films["bframes.mp4"]], [WHOLE], fps=FPS, cache="none")
    converted, convert = [], video_files._Video._pixels
    monkeypatch.setattr(video_files._Video, "_pixels", lambda *a: converted.append(1) or convert(*a))
    assert numbers_of(store.part(0, 40, 44)) == [40, 41, 42, 43] and len(converted) == 4


@pytest.mark.parametrize("cache, most", [("none", 0.2), ("disk", 0.2), ("ram", 1.2)])
def test_a_long_event_takes_no_more_memory_than_its_cache_keeps(films, cache, most):
    path = films["uneven.mp4"]
    open_store([path], [(0, 1)])
    tracemalloc.start()
    store = open_store([path], [WHOLE], fps=300, short_side=96, cache=cache)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.bytes > 1e8 and peak < most * store.bytes


def test_what_many_frames_take_is_said_before_they_are_decoded(films, monkeypatch, capsys):
    monkeypatch.setattr(pixel_cache, "LARGE", 1e6)
    monkeypatch.setattr(video_files.ClipStore, "decode", lambda *a: pytest.fail(capsys.readouterr().out))
    with pytest.raises(pytest.fail.Exception, match=r"note: 1 clips take about 0.4 GB decoded \(--cache none\).*--fps"):
        open_store([films["bframes.mp4"]], [WHOLE], fps=1600, short_side=96, cache="none")


def cache_files():
    return set(Path(os.environ["XDG_CACHE_HOME"], "small-data-scripts").glob("*"))


@pytest.mark.parametrize("damage", [None, "cut", "empty"])
def test_second_run_takes_up_the_disk_cache_unless_it_is_damaged(mixed, damage, monkeypatch):
    first = open_store(*mixed, cache="disk")
    expected = [np.array(first[i]) for i in range(5)]
    files = sorted(cache_files())
    if damage:
        for path in files:
            data = path.read_bytes()
            path.unlink()  # the first run still has it open
            path.write_bytes(data[:-100] if damage == "cut" else b"")
    passes, read = [], video_files.read_source
    monkeypatch.setattr(video_files, "read_source", lambda path, *a, **k: passes.append(path) or read(path, *a, **k))
    second = open_store(*mixed, cache="disk")
    decoded = {Path(path).name for path in passes} - {"zero.mp4"}  # what was broken is looked at again
    assert bool(decoded) == bool(damage) and second.audit == first.audit and sorted(cache_files()) == files
    assert all(np.array_equal(second[i], expected[i]) for i in range(5))
    assert second.audit[0].phash == first.audit[0].phash


def test_a_cache_whose_hashes_count_the_frames_for_jitter_is_not_read(films, monkeypatch):
    """As version 9 wrote it: prediction, which reads no jitter, would not know its rows."""
    def audit_of(cache):
        return open_store([films["bframes.mp4"]], [(1, 3)], jitter_sec=0.5, cache=cache).audit
    expected = audit_of("none")
    dumps = json.dumps
    with monkeypatch.context() as before:
        before.setattr(pixel_cache.json, "dumps", lambda value: dumps([9, *value[1:]] if isinstance(value, list) else value))
        audit_of("disk")
    for path in cache_files():
        if path.suffix == ".json":
            path.write_text(path.read_text().replace(expected[0].pixel_sha, "f" * 64))
    assert audit_of("disk") == expected


def test_a_cache_that_is_emptied_during_the_run_does_not_stop_it(mixed):
    open_store(*mixed, cache="disk")
    store, reference = open_store(*mixed, cache="disk"), open_store(*mixed, cache="none")
    for path in cache_files():
        path.unlink()
    assert all(np.array_equal(store[i], reference[i]) for i in range(5))


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(films, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(common.CannotSave, match=r"no space to write .*: \d+ bytes needed, \d+ free"):
        open_store([films["mjpeg.avi"]], [WHOLE], cache="disk")
    assert not cache_files()


def test_another_window_or_file_makes_another_cache_file(mixed):
    sources, windows = mixed
    def files_after(windows=windows, **change):  # noqa: E306
        open_store(sources, windows, cache="disk", **change)
        return len(cache_files()) // 2  # .npy and .json
    assert files_after() == 5
    changes = ({"fps": 10.0}, {"n_frames": 8}, {"short_side": 32}, {"jitter_sec": 0.1}, {"grid": "even"})
    assert [files_after(**change) for change in changes] == [10, 15, 20, 25, 30]
    assert files_after([(1, 2.1), *windows[1:]]) == 31, "one window changed"
    Image.fromarray(numbered(5)).save(sources[2] / "frame 1.png", optimize=True)
    assert files_after() == 32, "one source changed"
    store = open_store(sources, windows, cache="disk")
    assert files_after() == 32 and numbers_of(store[2])[:3] == [0, 5, 2]


def test_store_of_nothing():
    assert len(open_store([], [])) == 0
