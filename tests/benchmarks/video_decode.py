"""How fast are clips read? Clips per second of processor time, each way in turn in the same run.

    python tests/benchmarks/video_decode.py python tests/benchmarks/video_decode.py --videos
    ../shared/data/video/fight_surveillance --repeats 5

    script        as train_video.py does it: one pass, one thread, only wanted frames converted and scaled
    opencv        OpenCV decodes every frame in one thread, and converts and scales the wanted ones
    read_all      OpenCV reads, converts and scales every frame, then picks
    seek_each     OpenCV seeks to each wanted frame
    cached        the same clips from a uint8 .npy file
Without --videos, clips of 4 s at 30 fps are made (H.264 with B-frames). Printed: the medians over the repeats, the
ratio to script with its range, and how many frames differ from those of script.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from readers import video_files  # noqa: E402

SHORT_SIDE, N_FRAMES = 112, 16


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of .mp4 and .avi files to read instead of made ones")
    parser.add_argument("--clips", type=int, default=24, help="number of clips")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not timed")
    return parser.parse_args()


def make_clip(path, seed, size=(320, 240), fps=30, seconds=4):
    """A video of a picture that drifts and breathes."""
    rng = np.random.default_rng(seed)
    texture = cv2.resize(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), (size[0] + 130, size[1] + 40),
                         interpolation=cv2.INTER_CUBIC)
    frames = [np.roll(texture, (i % 30, i), (0, 1))[:size[1], :size[0]] for i in range(fps * seconds)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "bgr24")))
        container.mux(stream.encode(None))
    return path


def shrink(bgr):
    height, width = bgr.shape[:2]
    scale = SHORT_SIDE / min(height, width)
    small = cv2.resize(bgr, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2RGB)


def open_capture(path):
    return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])


def read_all(path, times, indices):
    capture, frames = open_capture(path), []
    while True:
        found, frame = capture.read()
        if not found:
            return np.stack([frames[i] for i in indices])
        frames.append(shrink(frame))


def seek_each(path, times, indices):
    capture, frames = open_capture(path), []
    for index in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
        frames.append(shrink(capture.read()[1]))
    return np.stack(frames)


def read_opencv(path, times, indices):
    wanted = set(indices.tolist())
    frames = {}
    capture = open_capture(path)
    index = 0
    while capture.grab():
        if index in wanted:
            frames[index] = shrink(capture.retrieve()[1])
        index += 1
    return np.stack([frames[i] for i in indices])


def read_as_script(path, times, indices):
    frames = {}
    video_files.read_source(path, set(indices.tolist()), frames.__setitem__, SHORT_SIDE, fps=None)
    return np.stack([frames[i] for i in indices])


def main():
    options = parse_args()
    ways = {"script": read_as_script, "opencv": read_opencv, "read_all": read_all, "seek_each": seek_each}
    with tempfile.TemporaryDirectory() as folder:
        made = options.videos or Path(folder)
        paths = sorted(path for path in made.rglob("*") if path.suffix in (".mp4", ".avi"))[:options.clips]
        paths = paths or [make_clip(made / f"{i}.mp4", i) for i in range(options.clips)]
        jobs = []
        for number, path in enumerate(paths):
            info = video_files.probe(path)
            times = np.linspace(0, info.times[-1], N_FRAMES)
            jobs.append((path, times, video_files.on_screen(info, times)))
            np.save(Path(folder, f"{number}.npy"), ways["script"](*jobs[-1]))
        cached = {path: Path(folder, f"{number}.npy") for number, path in enumerate(paths)}
        ways["cached"] = lambda path, times, indices: np.load(cached[path])
        report(ways, jobs, options.repeats)


def report(ways, jobs, repeats):
    """Time every way in turn and print the table."""
    seconds, differing = {name: [] for name in ways}, dict.fromkeys(ways, 0)
    reference = [ways["script"](*job) for job in jobs]
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            clips = [way(*job) for job in jobs]
            seconds[name].append((time.process_time() - start) / len(jobs))
            if turn == 0:  # a wrong frame differs far more than two libraries round
                differing[name] = sum(int((np.abs(a.astype(int) - b).mean((1, 2, 3)) > 4).sum())
                                      for a, b in zip(clips, reference))
    print(f"{video_files.decoder_name()}; {len(jobs)} clips, {N_FRAMES} frames at {SHORT_SIDE} px, n = {repeats}")
    for name, each in seconds.items():
        ratios = sorted(ours / other for ours, other in zip(seconds["script"][1:], each[1:]))
        rate, ratio = 1 / statistics.median(each[1:]), statistics.median(ratios)
        print(f"{name:12s} {rate:8.1f} clips/s per core   {ratio:6.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})   "
              f"{differing[name]} frames differ")


if __name__ == "__main__":
    main()
