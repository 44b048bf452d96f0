"""What does a run cost as the data grow? Whole runs of the scripts on made data; times and memory from their own logs.

    python tests/benchmarks/scaling.py
    python tests/benchmarks/scaling.py --parts images startup

    images      train_assessor.py on N = 100 to 1,600 pictures with each cache: seconds an epoch, and the most memory
                that the run and its workers hold and no file stands for (pages of a disk cache are the system's)
    clips       train_video.py on N = 20 to 160 clips
    folds       train_assessor.py --freeze_backbone with 1 to 10 folds: seconds of the whole run
    frozen      5 folds on frozen features that are cached, against 5 folds that run the frozen network in every epoch:
                ResNet-18 at 160 px, and ResNet-50 at 224 px (half an hour)
    startup     --help of each script against `python -c "import torch, torchvision"`, in turn
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import assessor  # it puts the repository on the import path
import video

ROOT = Path(__file__).resolve().parents[2]
EPOCH = re.compile(r"^epoch .*\((\d+\.\d+) s, ", re.MULTILINE)
SCRIPTS = ("train_assessor.py", "train_video.py", "train_detector.py", "train_dreamer.py", "predict_assessor.py")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="which to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the figures as lines of JSON")
    return parser.parse_args()


def run(script, *flags):
    """Train to the end in a folder that is then removed; {epochs: seconds of each, memory: GB, whole: seconds}."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / script, *flags, "--output_dir", out, "--no_pretrained", "--patience", 0,
                   "--save_minutes", 0, "--save_every", 0]
        start, largest = time.perf_counter(), 0
        with open(Path(out, "said"), "w+") as said:
            process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, start_new_session=True,
                                       env={**os.environ, "XDG_CACHE_HOME": out})
            while process.poll() is None:
                largest = max(largest, private_memory(process.pid))
                time.sleep(0.1)
            said.seek(0)
            assert process.returncode == 0, said.read()[-3000:]
        whole = time.perf_counter() - start
        logs = [path.read_text() for path in sorted(Path(out).rglob("log.txt"))]
    return {"epochs": [float(each) for each in EPOCH.findall("\n".join(logs))], "memory": largest / 1e9, "whole": whole}


def private_memory(session):
    """Bytes that the processes of a session, so the loader workers too, hold and that no file stands for (Linux)."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                found = re.search(r"^Pss_Anon:\s+(\d+)", (stat.parent / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) << 10 if found else 0
    return total


def assessor_flags(folder, n, side=512):
    """n made pictures and the flags of a run on them that leaves most of the time to pictures, not to the network."""
    data = folder / f"pictures_{n}"
    if not data.exists():
        data.mkdir()
        assessor.make_data(data, SimpleNamespace(images=n, side=side))
    return ["--images_dir", data, "--ratings_file", data / "ratings.csv", "--backbone", "resnet18", "--image_size",
            "160", "--select", "last"]


def measure_images(folder):
    for n, cache in itertools.product((100, 200, 400, 800, 1600), ("ram", "disk", "none")):
        measured = run("train_assessor.py", *assessor_flags(folder, n), "--epochs", 3, "--cache", cache)
        yield {"N": n, "cache": cache, "seconds an epoch": statistics.median(measured["epochs"][1:]),
               "GB": measured["memory"]}


def measure_clips(folder):
    for n in (20, 40, 80, 160):
        data = folder / f"clips_{n}"
        data.mkdir()
        video.make_data(data, SimpleNamespace(clips=n, side=160))
        for cache in ("ram", "disk"):
            measured = run("train_video.py", "--manifest", data / "manifest.csv", "--model", "cnn_lstm", "--image_size",
                           "64", "--batch_size", "8", "--epochs", 3, "--cache", cache, "--select", "loss")
            yield {"N": n, "cache": cache, "seconds an epoch": statistics.median(measured["epochs"][1:]),
                   "GB": measured["memory"]}


def measure_folds(folder):
    for folds in (0, 2, 5, 10):
        measured = run("train_assessor.py", *assessor_flags(folder, 400), "--freeze_backbone", "--epochs", 20,
                       "--folds", folds)
        yield {"folds": folds or 1, "seconds of the run": measured["whole"], "GB": measured["memory"]}


def measure_frozen(folder):
    flags = [*assessor_flags(folder, 800), "--epochs", 20, "--folds", 5]
    ways = {"features cached": ["--freeze_backbone"], "network run in every epoch": ["--freeze_epochs", 20]}
    for (backbone, size), (way, more) in itertools.product((("resnet18", 160), ("resnet50", 224)), ways.items()):
        each = run("train_assessor.py", *flags, "--backbone", backbone, "--image_size", size, *more)
        yield {"800 pictures, 5 folds, 20 epochs": f"{backbone}, {size} px, {way}", "seconds of the run": each["whole"],
               "seconds of all epochs": sum(each["epochs"]), "GB": each["memory"]}


def measure_startup(folder, repeats=7):
    commands = {"import torch, torchvision": ["-c", "import torch, torchvision"],
                **{f"{script} --help": [ROOT / script, "--help"] for script in SCRIPTS}}
    seconds = {name: [] for name in commands}
    for _, (name, words) in itertools.product(range(repeats), commands.items()):
        start = time.perf_counter()
        subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        seconds[name].append(time.perf_counter() - start)
    bare = statistics.median(seconds["import torch, torchvision"])
    for name, each in seconds.items():
        yield {"command": name, "seconds": statistics.median(each), "ratio": statistics.median(each) / bare}


PARTS = {"images": measure_images, "clips": measure_clips, "folds": measure_folds, "frozen": measure_frozen,
         "startup": measure_startup}


def as_text(rows):
    """Rows as a Markdown table."""
    def cell(value):
        return f"{value:.2f}" if isinstance(value, float) else str(value)
    head = list(rows[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in
                     [head, ["---"] * len(head), *([cell(row[name]) for name in head] for row in rows)])


def straightness(rows):
    """Text for each cache: the least-squares line of seconds over N, and the largest deviation from it in per cent."""
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        n, seconds = np.array([(row["N"], row["seconds an epoch"]) for row in rows if row["cache"] == cache], float).T
        slope, offset = np.polyfit(n, seconds, 1)
        largest = np.abs(seconds - slope * n - offset).max() / seconds.max()
        lines.append(f"cache {cache}: {1000 * slope:.1f} ms a sample + {offset:.2f} s, off the line by at most "
                     f"{100 * largest:.0f} % of the longest")
    return "\n".join(lines)


def main():
    options = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            rows = list(PARTS[part](Path(folder)))
            print(f"\n### {part}\n\n{as_text(rows)}", flush=True)
            if "N" in rows[0]:
                print(f"\n{straightness(rows)}")
            if options.json:
                with open(options.json, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"part": part, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
