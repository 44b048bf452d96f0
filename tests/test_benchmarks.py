"""The benchmarks' arithmetic on known numbers, and each of them for a moment.

    python -m pytest tests/test_benchmarks.py [-m ""]
"""
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from conftest import ROOT
from readers import video_files

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import assessor  # noqa: E402
import equality  # noqa: E402
import plain_training  # noqa: E402
import scaling  # noqa: E402
import summary  # noqa: E402
import turns  # noqa: E402
import video  # noqa: E402

ROWS = [{"N": n, "cache": cache, "seconds an epoch": base + 0.01 * n, "GB": 1.0}
        for cache, base in (("ram", 1.0), ("none", 3.0)) for n in (100, 200, 400)]


def loop(*seconds, first_step=2.0, peak=2 ** 30):
    return [{"seconds": each, "first_step": first_step, "peak": peak} for each in seconds]


@pytest.fixture
def report():
    """The first epoch of each is slow and must not count."""
    measured = {"script": loop(99, 2, 4, 3), "bare": loop(99, 1, 2, 4, peak=2 ** 29), "reference": loop(99, 6, 6, 9)}
    return turns.summarise(measured, "train_x.py: a network, 8 pictures, batch 4", "pictures", 12,
                           [("script", "bare", "<=", 1.05), ("reference", "script", ">=", 3),
                            ("timm", "script", ">", 1)])


def test_ratios_are_of_medians_and_ranges_of_turns(report):
    over_bare, over_script = report["ratios"]
    assert (over_bare["ratio"], over_bare["low"], over_bare["high"]) == (1.5, 0.75, 2.0)
    assert (over_script["ratio"], over_script["low"], over_script["high"]) == (2.0, 1.5, 3.0)
    text = turns.as_text(report)
    assert "| script | 3.00 | 4.00 | 2.0 | 1.00 |" in text
    assert "| script / bare | 1.50 | 0.75 to 2.00 | <= 1.05 |" in text
    assert "timm" not in text and "medians of 3 epochs" in text


def test_a_bend_is_told_from_a_line():
    assert "cache ram: 10.0 ms a sample + 1.00 s, off the line by at most 0 %" in scaling.straightness(ROWS)
    bent = [{**row, "seconds an epoch": row["N"] ** 2 / 1e4} for row in ROWS[:3]]
    assert int(scaling.straightness(bent).rsplit(" % ", 1)[0].rsplit(" ", 1)[1]) > 5


def test_made_data_are_whole_and_hold_no_copies(tmp_path):
    """Runs on them, as those of scaling.py, stop at exact duplicates on two sides of a split; clips are whole, too."""
    assessor.make_data(tmp_path, SimpleNamespace(images=300, side=32))
    video.make_data(tmp_path, SimpleNamespace(clips=70, side=32))
    for suffix, count in ((".jpg", 300), (".mp4", 70)):
        assert len({path.read_bytes() for path in tmp_path.glob(f"*{suffix}")}) == count
    assert video_files.probe(tmp_path / "0.mp4").n_frames == video.SECONDS * video.RATE


@pytest.mark.parametrize("column, shift, agree", [
    ("val_r2", 0.01, "yes"), ("val_r2", 0.5, "NO, WORSE"), ("val_r2", -0.5, "no, better"),
    ("val_loss", 0.5, "no, better"), ("val_loss", -0.5, "NO, WORSE")])
def test_results_agree_within_the_spread_of_the_seeds(monkeypatch, tmp_path, column, shift, agree):
    monkeypatch.setitem(equality.TASKS, "made", lambda folder: ("train_x.py", [], column))
    monkeypatch.setattr(equality, "train", lambda script, flags, column, seed, way, out: {
        "value": 0.1 * seed + (shift if way == "plain" else 0), "seconds": 2.0 if way == "plain" else 1.0})
    found = equality.compare("made", [1, 2, 3], "plain", tmp_path)
    assert found["agree"] == agree and found["difference"] == pytest.approx(-shift)
    assert found["spread"] == pytest.approx(0.1)
    assert f"| {agree} | 1.0 | 2.0 | 2.0 |" in equality.as_text([found])


@pytest.mark.parametrize("preset", [preset for preset in common.AUGMENTATIONS if preset != "none"])
def test_plain_training_applies_the_same_draws_step_by_step(monkeypatch, preset):
    """What one warp shows of a smooth picture, the steps show too, but for black corners and the contrast,
    which starts from a mean that counts them."""
    ramp = np.linspace(90, 160, 80).astype(np.uint8)
    frames = np.stack([np.repeat((ramp[:, None] // 2 + ramp // 2)[..., None], 3, 2)] * 2)
    draws = [common.sample_augmentation(preset, torch.Generator().manual_seed(seed)) for seed in range(5)]
    draws = [dataclasses.replace(drawn, erase=None, autocontrast=False, noise=None, contrast=1.0) for drawn in draws]
    at_once = [common.augment_clip(frames, drawn, 64) for drawn in draws]
    plain_training.slow_down(False, monkeypatch.setattr)
    for drawn, fast in zip(draws, at_once):
        plain = common.augment_clip(frames, drawn, 64)
        assert plain.shape == fast.shape and plain.dtype == np.uint8
        inside = plain.min(axis=-1) > 40
        assert inside.mean() > 0.4 and np.abs(plain[inside].astype(float) - fast[inside]).mean() < 6, drawn
    assert not common.choose_compute("cpu", "off").channels_last


def test_the_summary_is_a_table_and_a_picture(report, tmp_path, monkeypatch, capsys):
    file = tmp_path / "speed.jsonl"
    result = {"task": "made", "metric": "val_r2", "values": {"fast": [0.5, 0.6], "plain": [0.5, 0.7]}, "agree": "yes",
              "difference": -0.05, "sd_of_differences": 0.07, "spread": 0.1, "seconds": {"fast": 1.0, "plain": 3.0}}
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (report, {"part": "images", "rows": ROWS}, result)))
    monkeypatch.setattr(sys, "argv", ["summary.py", str(file)])
    summary.main()
    printed = capsys.readouterr().out
    assert "3.00 s, 4.0 pictures/s | 1.50 (0.75 to 2.00) | 2.00 (1.50 to 3.00) |  |  |  | 2.00 |" in printed
    assert "| 400 | ram | 5.00 | 1.00 |" in printed and "| made | val_r2 | 0.500 0.600 |" in printed
    assert (tmp_path / "speed.md").read_text().strip() in printed
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [
    ("assessor", "--images 6 --side 64 --batch_size 3"), ("video", "--clips 4 --side 96 --batch_size 2"),
    ("detector", "--images 4 --side 96 --min_size 64 --batch_size 2"),
    ("dreamer", "--transitions 4 --side 32 --batch_size 2 --d_model 48 --n_layers 1 --encoder resnet18")])
def test_each_benchmark_runs(name, flags, tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmarks" / f"{name}.py", *flags.split(), "--repeats", "1",
               "--loops", "bare", "reference", "--json", tmp_path / "found.jsonl"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.jsonl").read_text())
    assert set(found["loops"]) == {"script", "bare", "reference"} and len(found["ratios"]) == 2
    assert all(each["first_step"] > 0 and each["peak"] > 2 ** 20 for each in found["loops"].values())
