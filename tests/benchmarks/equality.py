"""Do the fast ways change results? Each task trained with them and without, three seeds each, on made data.

    python tests/benchmarks/equality.py
    python tests/benchmarks/equality.py --tasks assessor dreamer --seeds 1 2 3 4 5
    python tests/benchmarks/equality.py --tasks assessor --against one_warp

    fast        the defaults: bf16 and channels_last where the processor is fast at them, pictures cached, augmentation
                in one warp, JPEGs decoded at reduced size, fused optimiser
    plain       --use_amp off --cache none under plain_training.py: fp32, torchvision's operations one by one, nothing
                cached
    one_warp    plain, but for the augmentation: the one fast way that changes what a network sees, because it fills
                from the picture what separate steps leave black after the crop
Both of a seed share the split, the first weights of new layers and every random draw. Compared is the validation metric
after a fixed last epoch. They agree where the mean difference is within the spread (SD) of the seeds, and so no smaller
difference can be seen here. Exit code 1 where the fast ways are worse by more. Published ResNet-18 weights are used
where torch's cache (TORCH_HOME) has them.
"""
import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from readers import backbones  # noqa: E402

PLAIN_TRAINING = ROOT / "tests/benchmarks/plain_training.py"
WRAPPERS = {"fast": [], "plain": [PLAIN_TRAINING], "one_warp": [PLAIN_TRAINING, "--keep_one_warp"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="which to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of split, weights and draws")
    parser.add_argument("--against", choices=tuple(WRAPPERS)[1:], default="plain", help="what fast is held against")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the figures as lines of JSON")
    return parser.parse_args()


# --- data and flags of each task: function of a folder -> (script, flags, history column) ------------

def sample(folder, task, *flags):
    """Sample data of a task; returns their folder."""
    subprocess.run([sys.executable, ROOT / "make_sample_data.py", "--task", task, "--output_dir", folder, *flags],
                   check=True, stdout=subprocess.DEVNULL)
    return folder / task


def assessor(folder):
    made = sample(folder, "assessor", "--n_images", "240")
    return "train_assessor.py", [
        "--config", ROOT / "configs/assessor_small_data.yaml", "--images_dir", made / "images", "--ratings_file",
        made / "ratings/per_image_Slider_mean_sd_from_wide.csv", "--augment", "full", *weights()], "val_r2"


def clips(folder, n=96, side=64, frames=10):
    """A texture that drifts up or down: .npy clips that only motion tells apart, the slow ones not with certainty.

    Speeds are normal, SD 2 pixels a frame; the label is the sign of the speed + normal noise, SD 1.
    """
    draws, rows = np.random.default_rng(0), ["path,label"]
    for i in range(n):
        texture = np.kron(draws.integers(0, 256, (side // 8, side // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        speed = draws.normal(0, 2)
        np.save(folder / f"{i}.npy", np.stack([np.roll(texture, round(speed * t), 0) for t in range(frames)]))
        rows.append(f"{i}.npy,{('down', 'up')[int(speed + draws.normal() > 0)]}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return "train_video.py", [
        "--manifest", folder / "clips.csv", "--video_root", folder, "--model", "r3d_18", "--no_pretrained",
        "--image_size", "56", "--n_frames", "8", "--fps", "8", "--batch_size", "8", "--epochs", "8", "--lr", "1e-3",
        "--warmup_epochs", "1", "--patience", "0", "--train_ratio", "0.6", "--val_ratio", "0.4", "--augment",
        "enhanced"], "val_loss"


def scores(folder):
    made = sample(folder, "video")
    return "train_video.py", [
        "--manifest", made / "sequences.csv", "--video_root", made, "--task", "regress", "--model", "cnn_lstm",
        "--group_column", "animal", "--bounded", "--hidden", "128", "--dropout", "0.2", "--n_frames", "16",
        "--image_size", "64", "--batch_size", "8", "--epochs", "10", "--lr", "1e-3", "--backbone_lr_mult", "0.1",
        "--scheduler", "cosine", "--patience", "0", "--train_ratio", "0.6", "--val_ratio", "0.4", *weights()], "val_r2"


def detector(folder):
    made = sample(folder, "detector")
    return "train_detector.py", [
        "--config", ROOT / "configs/detector_small_data.yaml", "--train_json", made / "train_coco.json",
        "--train_images", made / "images", "--min_size", "224", "--max_size", "384", "--epochs", "8",
        *weights()], "val_map50"


def dreamer(folder):
    made = sample(folder, "dreamer", "--n_samples", "400")
    return "train_dreamer.py", [
        "--config", ROOT / "configs/dreamer_small_data.yaml", "--data_dir", made, "--patient_map",
        made / "patient_map.json", "--freeze_layers", "0", "--token_type", "channel", "--epochs", "8", "--augment",
        "full", *weights()], "val_main_task_loss"


TASKS = {"assessor": assessor, "clips": clips, "scores": scores, "detector": detector, "dreamer": dreamer}


def weights():
    """Flags of published weights where they are cached, else of random ones."""
    return [] if backbones.cached_weights_file("resnet18")[0].exists() else ["--no_pretrained"]


# --- one run ---------------------------------------------------------------------------

def train(script, flags, column, seed, way, out):
    """Run a script to its end; {value: the metric after the last epoch, seconds: median of its epochs}."""
    precision = [] if way == "fast" else ["--use_amp", "off", "--cache", "none"]
    command = [sys.executable, *WRAPPERS[way], ROOT / script, *flags, *precision, "--seed", seed, "--output_dir", out,
               "--save_minutes", 0]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          env={**os.environ, "XDG_CACHE_HOME": str(out)})
    if done.returncode:
        raise SystemExit(f"{common.shlex.join(map(str, command))}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    run = next(Path(out).glob("run_*"))
    with open(run / "training_history.csv", encoding="utf-8") as handle:
        last = list(csv.DictReader(handle))[-1]
    seconds = [float(each) for each in re.findall(r"^epoch .*\((\d+\.\d+) s, ", (run / "log.txt").read_text(), re.M)]
    return {"value": float(last[column]), "seconds": statistics.median(seconds[1:])}


def compare(name, seeds, against, folder):
    """Train a task the fast way and the other with each seed, in turn; a dict of plain numbers."""
    script, flags, column = TASKS[name](folder)
    runs = {way: [] for way in ("fast", against)}
    for seed in seeds:
        for way in runs:
            runs[way].append(train(script, flags, column, seed, way, folder / f"out_{way}_{seed}"))
            print(f"{name} {way} seed {seed}: {runs[way][-1]}", file=sys.stderr, flush=True)
    values = {way: [run["value"] for run in each] for way, each in runs.items()}
    differences = [fast - other for fast, other in zip(*values.values())]
    spread = statistics.mean([statistics.variance(each) for each in values.values()]) ** 0.5
    seconds = {way: statistics.median(run["seconds"] for run in each) for way, each in runs.items()}
    difference = statistics.mean(differences)
    gain = -difference if column.endswith("loss") else difference
    return {"task": name, "metric": column, "values": values, "difference": difference,
            "sd_of_differences": statistics.stdev(differences), "spread": spread, "seconds": seconds,
            "agree": "yes" if abs(gain) <= spread else "no, better" if gain > 0 else "NO, WORSE"}


def as_text(results):
    """The table as Markdown."""
    lines = ["| task | validation metric | fast | against | its values | difference (SD) | SD over seeds | agree | "
             "s an epoch, fast | against | ratio |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for each in results:
        fast, other = (" ".join(f"{value:.3f}" for value in values) for values in each["values"].values())
        quick, slow = each["seconds"].values()
        lines.append(f"| {each['task']} | {each['metric']} | {fast} | {list(each['values'])[1]} | {other} | "
                     f"{each['difference']:+.3f} ({each['sd_of_differences']:.3f}) | {each['spread']:.3f} | "
                     f"{each['agree']} | {quick:.1f} | {slow:.1f} | {slow / quick:.1f} |")
    return "\n".join(lines)


def main():
    options, results = parse_args(), []
    for name in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(name, options.seeds, options.against, Path(folder)))
        if options.json:
            with open(options.json, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(results[-1]) + "\n")
    print(as_text(results))
    sys.exit(any(each["agree"] == "NO, WORSE" for each in results))


if __name__ == "__main__":
    main()
