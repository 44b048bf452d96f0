"""How long does a whole recording take, and how long its decoding alone? Both in turn, for several sizes of picture.

    python tests/benchmarks/recording.py --checkpoint outputs/run_YYYYMMDD_HHMMSS
    --videos clips --minutes 60

The clips of the folder are shown one after the other, scaled to each size with the noise of a
camera, as H.264 with 25 frames a second; one minute of this is repeated without encoding it again.
decoding: PyAV decodes every frame in one thread and forgets it. script: `train_video.py --mode
predict --video FILE --every 0.5` from its start to its end.
"""
import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FPS = 25
NOISE_SD = 4  # levels of 255


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder of a train_video.py classifier")
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos that the recording is made of")
    parser.add_argument("--minutes", type=int, default=60, help="length of the recording")
    parser.add_argument("--sizes", nargs="+", default=["320x240", "1280x720", "1920x1080"], help="WIDTHxHEIGHT")
    parser.add_argument("--repeats", type=int, default=1, help="timed turns of both")
    return parser.parse_args()


def frames_of(folder):
    """RGB pictures of all videos of a folder, again and again."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".mp4", ".avi"))
    for path in itertools.cycle(paths):
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")


def write_minute(path, pictures, size):
    """One minute of these pictures in this size."""
    draws = np.random.default_rng(0)
    noise = [draws.normal(0, NOISE_SD, (size[1], size[0], 3)).astype(np.int16) for _ in range(5)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "26", "preset": "veryfast"}
        for index, picture in enumerate(itertools.islice(pictures, 60 * FPS)):
            scaled = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
            scaled = np.clip(scaled + noise[index % len(noise)], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scaled, "rgb24")))
        container.mux(stream.encode(None))


def repeat(minute, path, times):
    """The packets of a file, several times one after the other."""
    with av.open(str(path), "w") as made:
        stream = None
        begin = 0
        for _ in range(times):
            with av.open(str(minute)) as container:
                stream = stream or made.add_stream_from_template(container.streams.video[0])
                packets = [packet for packet in container.demux(video=0) if packet.size]
                for packet in packets:
                    packet.pts += begin
                    packet.dts += begin
                    packet.stream = stream
                    made.mux(packet)
                begin = max(packet.pts + packet.duration for packet in packets)


def decode(path):
    """Number of frames."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def predict(path, options, folder):
    command = [sys.executable, ROOT / "train_video.py", "--mode", "predict", "--checkpoint", options.checkpoint,
               "--video", path, "--every", "0.5", "--output_dir", folder / "out"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def seconds_of(function, *args):
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def main():
    options = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for text in options.sizes:
            size = tuple(map(int, text.split("x")))
            write_minute(folder / "minute.mp4", frames_of(options.videos), size)
            recording = folder / "recording.mp4"
            repeat(folder / "minute.mp4", recording, options.minutes)
            assert decode(recording) == options.minutes * 60 * FPS
            for _ in range(options.repeats):
                alone = seconds_of(decode, recording)
                whole = seconds_of(predict, recording, options, folder)
                print(f"{text}: decoding {alone:.1f} s, script {whole:.1f} s, {whole / alone:.2f} times", flush=True)


if __name__ == "__main__":
    main()
