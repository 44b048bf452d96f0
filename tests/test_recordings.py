"""Whole recordings: bouts of windows, their picture and copy, and how they are judged; train_video.py on recordings.

    python -m pytest tests/test_recordings.py
"""
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.metrics import cohen_kappa_score

import common
from evidence import ethograms, plotting
from readers import sliding_windows, video_files
import train_video
from conftest import ROOT, only_run, run_here, run_script

NAMES = ["rest", "walk", "bite"]
SMALL = ("--no_pretrained --image_size 32 --n_frames 4 --fps 4 --clips_per_event 1 --num_workers 0 "
         "--min_event_sec 0.5").split()


def video(*flags, code=0):
    run = run_here if code else run_script
    return run("train_video.py", *flags, code=code)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def windows_of(classes, every=0.5, length=2.0):
    """Windows whose most probable class is this one, at .8."""
    starts = every * np.arange(len(classes))
    probability = np.full((len(classes), len(NAMES)), 0.1)
    probability[np.arange(len(classes)), classes] = 0.8
    return ethograms.Windows(np.stack([starts, starts + length], 1), probability, np.array(classes))


def spelled(bouts):
    return [(bout.label, bout.start_sec, bout.end_sec) for bout in bouts]


# --- bouts --------------------------------------------------------------------------------------

def test_windows_become_bouts():
    """Each window decides around its middle, the first and the last up to the ends of the recording."""
    windows = windows_of([0, 0, 1, 1, 1, 0, 1, 2, 2])
    bouts = ethograms.bouts_of(windows, NAMES)
    assert spelled(bouts) == [("rest", 0, 1.75), ("walk", 1.75, 3.25), ("rest", 3.25, 3.75), ("walk", 3.75, 4.25),
                              ("bite", 4.25, 6)]
    assert [bout.mean_probability for bout in bouts] == pytest.approx([0.8] * 5)
    joined = ethograms.bouts_of(windows, NAMES, merge_gap_sec=0.5)
    assert spelled(joined) == [("rest", 0, 1.75), ("walk", 1.75, 4.25), ("bite", 4.25, 6)], "what lay between is no bout"
    [walk] = [bout for bout in joined if bout.label == "walk"]
    assert walk.mean_probability == pytest.approx((4 * 0.8 + 0.1) / 5)
    long = ethograms.bouts_of(windows, NAMES, min_bout_sec=1, merge_gap_sec=0.5)
    assert spelled(long) == [("rest", 0, 1.75), ("walk", 1.75, 4.25), ("bite", 4.25, 6)]
    assert [windows.at(time) for time in (-1, 0, 1.3, 1.8, 99)] == [0, 0, 1, 2, 8]


@pytest.mark.parametrize("seed", range(5))
def test_joined_bouts_never_overlap(seed):
    """Every time belongs to one class: the bouts of random windows follow each other without a gap; by any gap."""
    draws = np.random.default_rng(seed)
    windows = windows_of(draws.integers(0, 3, 60))
    for merge_gap_sec in (0.0, 0.5, 1.2, 5.0):
        bouts = ethograms.bouts_of(windows, NAMES, merge_gap_sec=merge_gap_sec)
        starts, ends = ([getattr(bout, name) for bout in bouts] for name in ("start_sec", "end_sec"))
        assert starts[1:] == ends[:-1] and (starts[0], ends[-1]) == (0, windows.spans[-1, 1])
        for label in NAMES:
            own = [bout for bout in bouts if bout.label == label]
            gaps = [later.start_sec - bout.end_sec for bout, later in zip(own, own[1:])]
            assert all(gap > 0 for gap in gaps)
        if merge_gap_sec == 5.0:
            assert len(bouts) < 8, "most of 60 windows are joined"


@pytest.mark.parametrize("every", [0.1, 0.3, 1 / 12])
def test_bouts_as_long_as_the_limits_are_kept_and_joined(every):
    """Whatever the rounding of their times."""
    classes = [0, 0, 0, 1, 1, 1, 0, 0, 0] * 7
    windows = windows_of(classes, every)
    kept = ethograms.bouts_of(windows, NAMES, min_bout_sec=round(3 * every, 9))
    assert len(kept) == len(ethograms.bouts_of(windows, NAMES)) == 15
    [joined] = ethograms.bouts_of(windows, NAMES, merge_gap_sec=round(3 * every, 9))
    assert joined.label == "rest"


def test_of_equally_close_bouts_the_earlier_are_joined():
    for every in (0.1, 0.3, 0.7):
        windows = windows_of([0] * 4 + [1] * 3 + [0] * 3 + [1] * 4, every)
        assert ethograms.join_close(windows, 4 * every).tolist() == [0] * 10 + [1] * 4


def test_one_window_is_one_bout():
    assert spelled(ethograms.bouts_of(windows_of([2]), NAMES)) == [("bite", 0, 2)]


def test_an_ethogram_has_a_row_a_class(tmp_path):
    windows = windows_of([0, 0, 1, 1, 2, 2, 0])
    ethograms.plot_ethogram(windows, ethograms.bouts_of(windows, NAMES), NAMES, tmp_path / "e.png")
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2 ** 24)) > 10


def test_a_bout_of_seconds_is_seen_in_the_ethogram_of_an_hour(tmp_path):
    """6 s of one class in minute 35, and the line of the others does not hide their bars."""
    classes = np.arange(7200) // 12 % 2
    classes[4200:4212] = 2
    windows = windows_of(classes)
    ethograms.plot_ethogram(windows, ethograms.bouts_of(windows, NAMES), NAMES, tmp_path / "hour.png")
    pixels = np.asarray(Image.open(tmp_path / "hour.png").convert("RGB")).astype(int)
    n_of = {}
    for name, colour in zip(NAMES, plotting.CYCLE):
        bar = 255 - 0.6 * (255 - 255 * np.array(to_rgb(colour)))  # on white
        n_of[name] = (np.abs(pixels - bar).max(2) < 20).sum(1)  # of each line of pixels
    assert 6 <= n_of["bite"].max() <= 12, "6 of 600 s on some 900 pixels"
    assert n_of["rest"].max() > 350 and n_of["walk"].max() > 350, "each half of the time"


# --- against a table of events ------------------------------------------------------------------

def test_spans_are_paired_one_to_one():
    true = np.array([[0, 10], [20, 30], [40, 44]], float)
    found = np.array([[1, 10], [2, 9], [24, 34], [60, 61]], float)
    assert ethograms.count_pairs(found, true, 0.25) == 2, "9 of 10 s, and 6 of 14 s"
    assert ethograms.count_pairs(found, true, 0.5) == 1
    assert ethograms.count_pairs(found[:0], true, 0.25) == ethograms.count_pairs(found, true[:0], 0.25) == 0
    assert ethograms.covered(found) == pytest.approx(9 + 10 + 1)


def table_of(spans):
    """{video: {class: (n, 2)}} -> DataFrame of video, label, start_sec, end_sec."""
    rows = [(video, label, start, end) for video, own in spans.items() for label, each in own.items()
            for start, end in each]
    return pd.DataFrame(rows, columns=["video", "label", "start_sec", "end_sec"])


def watched_of(spans):
    """{video: (start, end)} -> DataFrame of what was watched of each video."""
    return pd.DataFrame.from_dict(spans, orient="index", columns=["start_sec", "end_sec"])


def test_bouts_are_judged_as_short_frames_are():
    """Kappa against scikit-learn on frames of 10 ms; precision, recall and F1 of all videos together by hand."""
    draws = np.random.default_rng(0)
    found, true, watched = {}, {}, {}
    for v in range(8):
        edges = np.sort(draws.choice(np.arange(1, 5900), 40, replace=False) / 100)
        true[f"v{v}"] = {"bite": edges[:20].reshape(-1, 2), "walk": edges[20:].reshape(-1, 2)}
        moved = edges[:20].reshape(-1, 2) + draws.integers(0, 60, (10, 1)) / 100
        found[f"v{v}"] = {"bite": moved[draws.random(10) < 0.8]}
        watched[f"v{v}"] = (0.0, 60.0)
    found["v0"]["rear"] = true["v0"]["rear"] = [(1.0, 2.0)]
    (bite, walk, rear), method = ethograms.judge_bouts(
        watched_of(watched), table_of(found), table_of(true), ["bite", "walk", "rear"], {})
    middles = np.arange(6000) / 100 + 0.005
    frames = [[], []]
    n_pairs = n_found = 0
    for v in watched:
        for each, spans in zip(frames, (found[v]["bite"], true[v]["bite"])):
            each.append(((middles[:, None] > spans[:, 0]) & (middles[:, None] < spans[:, 1])).any(1))
        n_pairs += ethograms.count_pairs(found[v]["bite"], true[v]["bite"], 0.25)
        n_found += len(found[v]["bite"])
    assert bite["kappa"] == pytest.approx(cohen_kappa_score(*map(np.concatenate, frames)), abs=1e-6)
    assert (bite["bouts"], bite["events"]) == (n_found, 80)
    assert bite["precision_at_0.25"] == pytest.approx(n_pairs / n_found)
    assert bite["recall_at_0.25"] == pytest.approx(n_pairs / 80)
    assert bite["f1_at_0.25"] == pytest.approx(2 * n_pairs / (n_found + 80))
    assert bite["kappa_low"] < bite["kappa"] < bite["kappa_high"] and "8 videos" in method
    assert walk["recall_at_0.5"] == 0 and walk["kappa"] == pytest.approx(0) and np.isnan(walk["precision_at_0.5"])
    assert rear["precision_at_0.5"] == rear["recall_at_0.5"] == rear["kappa"] == 1
    assert np.isnan([rear["precision_at_0.5_low"], rear["recall_at_0.5_low"], rear["kappa_low"]]).all(), "of one video"


def test_bouts_of_few_videos_are_told_without_nan(tmp_path, capsys):
    """A class without bouts and events has no F1 and no kappa, and two videos give no interval."""
    (tmp_path / "windows.csv").write_text(
        "video,start_sec,end_sec,pred_label,prob_bite,prob_rear\n/v,0,10,bite,1,0\n/w,0,10,bite,1,0\n")
    (tmp_path / "bouts.csv").write_text("video,label,start_sec,end_sec,mean_probability\n/v,bite,0,4,1\n")
    events = SimpleNamespace(
        windows=np.array([(0, 4), (0, 5)], float), sources=[Path("/v"), Path("/w")], names=["bite", "rear"],
        label=np.zeros(2, int), notes=[], skipped=[], groups=None)
    ethograms.judge_folder(tmp_path, lambda names: events, None)
    said = capsys.readouterr().out
    assert "bite: 1 bouts, 2 events; F1 at IoU .25 0.667, at .5 0.667; kappa 0.468\n" in said
    assert "rear: 0 bouts, 0 events; F1 at IoU .25 undefined, at .5 undefined; kappa undefined\n" in said
    assert "no interval under 5 videos, here 2" in said


def test_events_past_what_was_watched_are_cut(capsys):
    """What lies past the end, and points of which no bout can hold a part, are said and do not count as missed."""
    watched = watched_of({"/v": (0, 10)})
    spans = np.array([(0, 4), (8, 14), (12, 13), (5, 5), (1, 2)], float)
    table = SimpleNamespace(windows=spans, names=["bite"], label=np.zeros(5, int))
    events = ethograms.events_in(watched, table, [*4 * ["/v"], "/w"])
    said = capsys.readouterr().out
    assert "note: 2 events in these recordings are left out" in said and "2 of 5 events are in the recordings" in said
    [row], _ = ethograms.judge_bouts(watched, table_of({"/v": {"bite": [(8, 10)]}}), events, ["bite"], {})
    assert (row["events"], row["bouts"], row["recall_at_0.5"]) == (2, 1, 0.5)
    assert np.isnan(row["recall_at_0.5_low"]), "one video gives no interval"
    table.windows = spans[[3, 3, 3, 3, 3]]
    events = ethograms.events_in(watched, table, [*4 * ["/v"], "/w"])
    assert "--min_event_sec 1" in capsys.readouterr().out
    [row], _ = ethograms.judge_bouts(watched, table_of({"/v": {"bite": [(8, 10)]}}), events, ["bite"], {})
    assert (row["events"], row["bouts"], row["precision_at_0.5"]) == (0, 1, 0), "a false bout counts"


# --- the script -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(made_data, tmp_path_factory):
    """40 events in 8 videos, and runs of two models on them: the motion readout in 2 folds, an LSTM alone."""
    folder = tmp_path_factory.mktemp("made")
    data = made_data("video", 40)
    table = ["--manifest", data / "manifests" / "all.csv", "--label_map", data / "manifests" / "label_map.json",
             "--video_root", data / "videos"]
    run_script("train_video.py", *table, *SMALL, "--model", "motion_readout", "--folds", 2, "--output_dir",
               folder / "motion")
    run_script("train_video.py", *table, *SMALL, "--model", "cnn_lstm", "--hidden", 8, "--epochs", 1, "--dry_run",
               "--output_dir", folder / "lstm")
    films = sorted((data / "videos").rglob("*.mp4"))
    (folder / "two").mkdir()
    for k, film in enumerate([path for path in films if not path.name.startswith("._")][:2]):
        shutil.copy(film, folder / "two" / f"cam {k}.mp4")
    folder.joinpath("events.csv").write_text(data.joinpath("manifests", "all.csv").read_text())
    return folder


@pytest.mark.parametrize("model", ["motion", "lstm"])
def test_windows_are_what_predict_says_of_their_rows(made, model, tmp_path):
    """A table of the same windows, read by the other way through the script, gives the same probabilities."""
    trained = only_run(made / model)
    checkpoint = next(trained.glob("fold_0/best_model.pth"), trained / "best_model.pth")
    video("--mode", "predict", "--checkpoint", checkpoint, "--video", made / "two", "--every", 0.7, "--output_dir",
          tmp_path / "out", "--num_workers", 0, "--val_batch_size", 3, "--use_amp", "off")
    run = only_run(tmp_path / "out")
    said = (run / "log.txt").read_text()
    assert said.count("note: --every 0.7 is 0.75 s, on the grid of 4 frames a second") == 1, "of all recordings"
    rows = read_csv(run / "windows.csv")
    first = [row for row in rows if row["video"].endswith("cam 0.mp4")][:-1]  # the last is cut by the video's end
    starts = np.array([float(row["start_sec"]) for row in first])
    assert len(starts) > 10 and np.diff(starts) == pytest.approx(0.75), "0.7 s, on the grid of 4 a second"
    with open(tmp_path / "m.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([("video", "start_sec", "end_sec")] + [
            (row["video"], row["start_sec"], row["end_sec"]) for row in first])
    video("--mode", "predict", "--checkpoint", checkpoint, "--manifest", tmp_path / "m.csv", "--video_root",
          made / "two", "--output", tmp_path / "p.csv", "--num_workers", 0, "--use_amp", "off")
    judge = read_csv(tmp_path / "p.csv")
    assert [row["video"] for row in judge] == [row["video"] for row in first]
    assert [float(row["start_sec"]) for row in judge] == pytest.approx(starts)
    for name in ("ear", "tail"):
        expected = [float(row[f"prob_{name}"]) for row in judge]
        assert [float(row[f"prob_{name}"]) for row in first] == pytest.approx(expected, abs=2e-4)
    assert [row["pred_label"] for row in first] == [row["pred_label"] for row in judge]


def test_recordings_get_their_tables_pictures_and_copies(made, tmp_path):
    """The mean of two folds, whose backbone is used once a frame; a broken file beside them is named."""
    folder = tmp_path / "videos"
    shutil.copytree(made / "two", folder)
    (folder / "broken.mp4").write_bytes(b"nothing")
    text = video("--mode", "predict", "--checkpoint", only_run(made / "motion"), "--video", folder, "--output_dir",
                 tmp_path / "out", "--num_workers", 0, "--annotate", "--min_bout_sec", 0.5, "--merge_gap_sec", 0.5,
                 "--use_amp", "on").stdout
    assert re.search("device: cpu .*, fp32", text), "whatever the flags say"
    assert "skipped: broken.mp4: no video that can be opened" in text and "2 of 3 recordings read" in text
    run = only_run(tmp_path / "out")
    assert f"{run} is finished" in video("--resume", run).stdout
    for k in range(2):
        own = run / f"cam {k}_mp4"
        assert {path.name for path in own.iterdir()} == {"windows.csv", "bouts.csv", "ethogram.png", "annotated.mp4"}
        source, copy = video_files.probe(folder / f"cam {k}.mp4"), video_files.probe(own / "annotated.mp4")
        assert copy.n_frames == source.n_frames and np.allclose(copy.times, source.times, atol=2e-3)
        windows = read_csv(own / "windows.csv")
        assert float(windows[-1]["end_sec"]) == pytest.approx(source.duration_sec, abs=0.3)
        bouts = read_csv(own / "bouts.csv")
        assert bouts and all(float(row["end_sec"]) - float(row["start_sec"]) >= 0.5 for row in bouts)
    assert len(read_csv(run / "windows.csv")) > len(windows)
    # its own bouts as a table of events: all is found
    text = video("--mode", "judge_bouts", "--predictions", run, "--manifest", run / "bouts.csv", "--video_root", folder,
                 "--output", tmp_path / "b.csv").stdout
    assert "no interval under 5 videos, here 2" in text
    for row in read_csv(tmp_path / "b.csv"):
        if int(row["bouts"]):
            assert float(row["f1_at_0.5"]) == 1 and float(row["kappa"]) == pytest.approx(1)


@pytest.mark.parametrize("size", [(240, 320), (640, 360)])
@pytest.mark.parametrize("name", ["dig", "Fl\xfcgel schlagen, nahe am anderen Tier, links"])
def test_a_copy_names_the_class_in_whole_with_a_rim_around_the_letters(tmp_path, size, name):
    pixels = np.full((*size, 3), 128, np.uint8)
    recording = SimpleNamespace(frames=lambda: [(k / 10, lambda short_side: pixels) for k in range(3)])
    windows = ethograms.Windows(np.array([[0.0, 0.3]]), np.array([[0.93, 0.07]]), np.array([0]))
    ethograms.annotate(recording, windows, [name, "other"], tmp_path / "copy.mp4")
    with av.open(tmp_path / "copy.mp4") as container:
        frame = next(container.decode(video=0)).to_ndarray(format="gray").astype(int)
    white, dark = (np.flatnonzero(is_ink.any(0)) for is_ink in (frame > 200, frame < 50))  # columns
    assert white[0] > 4 and white[-1] < size[1] - 4, "all of it is on the picture"
    assert 0 < dark[-1] - white[-1] < 8 and 0 < white[0] - dark[0] < 8
    assert white[-1] > 60


def test_the_class_on_a_small_recording_can_be_read(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(ethograms, "draw_text", lambda pixels, text, font: sizes.append(font.size))
    windows = ethograms.Windows(np.array([[0.0, 0.3]]), np.array([[0.93, 0.07]]), np.array([0]))
    for height, width in ((96, 128), (96, 40), (480, 640)):
        recording = SimpleNamespace(frames=lambda: [(0.0, lambda short_side: np.zeros((height, width, 3), np.uint8))])
        ethograms.annotate(recording, windows, ["dig", "other"], tmp_path / "copy.mp4")
    assert sizes[0] == 12 and sizes[1] < 6 and sizes[2] == 480 / 14, "unless it is too narrow"


@pytest.mark.parametrize("name, kind, n_members", [
    ("motion", train_video.MotionReadout, 2), ("lstm", train_video.FrameLstm, 1)])
def test_every_frame_goes_once_through_the_backbone(made, monkeypatch, name, kind, n_members):
    """Whatever the number of windows, and of folds of a motion readout, which share it."""
    monkeypatch.setattr(sys, "argv", ["train_video.py"])
    args = train_video.parse_args(["--mode", "predict", "--checkpoint", str(only_run(made / name)), "--manifest", "m.csv"])
    compute = common.choose_compute("cpu", "off")
    members = train_video.load_members(args)
    assert len(members) == n_members and len({member.model.backbone for member in members}) == 1
    n_seen = []
    look = kind.frame_features
    monkeypatch.setattr(kind, "frame_features", lambda self, clips: n_seen.append(clips.shape[1]) or look(self, clips))
    recording = video_files.Recording(made / "two" / "cam 0.mp4", 4, 37)
    windows = train_video.read_windows(recording, members, 2, compute, "cam 0")
    assert len(windows.chosen) > 10
    assert sum(n_seen) == recording.n_shown + len(n_seen), "with the frame before each batch"


@pytest.mark.parametrize("step", [3, 40, 200])
def test_a_network_sees_few_frames_at_once_whatever_the_step(step, monkeypatch):
    """Windows far apart take no more memory than close ones, and hold the same frames; those before are forgotten."""
    n_kept = []
    join = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: n_kept.append(sum(map(len, parts))) or join(parts))
    pixels = np.arange(500).astype(np.uint8)[:, None, None, None] + np.zeros((1, 8, 8, 3), np.uint8)
    frames = [(picture, True) for picture in pixels]
    n_seen = []

    def frame_features(crops):
        n_seen.append(len(crops))
        return {"change": crops[1:, 0, 0, 0].int() - crops[:-1, 0, 0, 0].int()}
    places = []
    for starts, windows in sliding_windows.slide(iter(frames), 5, step, 4, 8, frame_features):
        places += starts
        expected = np.array(starts)[:, None] + np.arange(5)
        assert (windows["pixels"][:, :, 0, 0, 0].numpy() == expected % 256).all()
        assert (windows["change"].numpy() == np.where(expected == 0, 0, np.where(expected % 256, 1, -255))).all()
    assert places[:-1] == list(range(0, 496, step))[:len(places) - 1] and places[-1] == 495
    assert max(n_seen) <= 65 and max(n_kept) <= 2 * 64 + 5


def test_folders_of_recordings_differ_where_their_names_do(made, tmp_path):
    """An interrupted run, begun again with the same command, takes what has been recorded since."""
    flags = ["--mode", "predict", "--checkpoint", only_run(made / "motion") / "fold_0", "--video", tmp_path / "in", "--every", 2,
             "--output_dir", tmp_path / "out", "--num_workers", 0, "--resume", "auto"]
    (tmp_path / "in").mkdir()
    for n, name in enumerate(["a.b.mp4", "a_b.mp4"], 1):
        shutil.copy(made / "two" / "cam 0.mp4", tmp_path / "in" / name)
        video(*flags)
        run = only_run(tmp_path / "out")
        assert len([path for path in run.iterdir() if path.is_dir()]) == n
        (run / "metrics.json").unlink()


def test_names_that_differ_in_blanks_or_composition_are_two_recordings(tmp_path):
    names = [" a.mp4", "a.mp4", "\u00fc.mp4", "u\u0308.mp4"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = video_files.find_recordings(tmp_path)
    assert sorted(found) == sorted(names) and len(set(found.values())) == 4


def test_recordings_shorter_than_a_window_and_folders_of_pictures(made, tmp_path):
    """One frame is a window, and so are three; a picture beside the recordings is none, a damaged one is stepped over."""
    frames = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    for n in (1, 3):
        np.save(tmp_path / f"{n}.npy", frames[:n])
    for folder in ("pictures", "damaged"):
        (tmp_path / folder).mkdir()
        for i, pixels in enumerate(frames):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:02}.png")
    (tmp_path / "damaged" / "08.png").write_bytes(b"no picture")
    assert list(video_files.find_recordings(tmp_path / "pictures")) == ["pictures"]
    Image.fromarray(frames[0]).save(tmp_path / "stray.png")
    writer = cv2.VideoWriter(str(tmp_path / "slow.avi"), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 2, (40, 40))
    for pixels in frames:
        writer.write(pixels)
    writer.release()
    text = video("--mode", "predict", "--checkpoint", only_run(made / "motion"), "--video", tmp_path,
                 "--output_dir", tmp_path / "out", "--num_workers", 0, "--annotate").stdout
    assert re.search("note: .*slow.avi: it has 2.0 frames a second, fewer than the 4 of a window", text)
    assert "5 of 5 recordings read" in text and "damaged: 1 frames are damaged, the first at 2.00 s" in text
    spans = {}
    for row in read_csv(only_run(tmp_path / "out") / "windows.csv"):
        span = float(row["start_sec"]), float(row["end_sec"])
        spans.setdefault(Path(row["video"]).name, []).append(span)
    assert spans["1.npy"] == [(0, 0.25)] and spans["3.npy"] == [(0, 0.75)]
    assert spans["pictures"] == spans["damaged"] == [(k / 2, k / 2 + 1) for k in range(5)]


def test_events_in_frames_are_judged_at_the_rate_of_their_recording(made, tmp_path):
    """A clip without a clock has the 4 frames a second of the checkpoint, in both modes."""
    frames = np.random.default_rng(0).integers(0, 256, (24, 40, 40, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    video("--mode", "predict", "--checkpoint", only_run(made / "motion") / "fold_0", "--video", tmp_path / "clip.npy",
          "--output_dir", tmp_path / "out", "--num_workers", 0)
    run = only_run(tmp_path / "out")
    events = [(row["video"], row["label"], round(4 * float(row["start_sec"])), round(4 * float(row["end_sec"])) - 1)
              for row in read_csv(run / "bouts.csv")]
    with open(tmp_path / "events.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([("path", "label", "start_frame", "end_frame"), *events])
    flags = ["--mode", "judge_bouts", "--predictions", run, "--manifest", tmp_path / "events.csv", "--max_missing", 0]
    video(*flags)
    found = [row for row in read_csv(run / "bout_scores.csv") if int(row["bouts"])]
    assert found and all(float(row["f1_at_0.5"]) == 1 for row in found)
    video(*flags, "--fps", 12)
    other = [row for row in read_csv(run / "bout_scores.csv") if int(row["bouts"])]
    assert other != found, "what is typed counts"
    common.write_json(run / "args.json", {"data": {}})
    video(*flags)
    assert [row for row in read_csv(run / "bout_scores.csv") if int(row["bouts"])] == other, "the default is 12"
    (run / "args.json").unlink()
    video(*flags, "--fps", 4)
    assert [row for row in read_csv(run / "bout_scores.csv") if int(row["bouts"])] == found


@pytest.mark.parametrize("n_frames, expected", [
    (4, [0]), (5, [0, 1]), (10, [0, 3, 6]), (11, [0, 3, 6, 7]), (12, [0, 3, 6, 8]), (13, [0, 3, 6, 9])])
def test_windows_slide_by_their_step_and_the_last_one_ends_with_the_recording_once(n_frames, expected):
    grid = [(np.full((8, 8, 3), k, np.uint8), k > 0) for k in range(n_frames)]
    found = []
    for places, windows in sliding_windows.slide(grid, 4, 3, 2, 8, lambda pixels: {"level": pixels[1:, 0, 0, 0]}):
        assert len(places) <= 2 and windows["pixels"].shape == (len(places), 4, 8, 8, 3)
        assert windows["level"].tolist() == [[place + k for k in range(4)] for place in places]
        assert windows["is_new"].tolist() == [[place + k > 0 for k in range(4)] for place in places]
        found += places
    assert found == expected


def test_bouts_of_two_cameras_are_judged_over_their_sessions(tmp_path, capsys):
    """What both cameras filmed is one case: the numbers are those of all videos, the interval that of the sessions."""
    videos = [f"/s{s}_cam{cam}" for s in range(6) for cam in "ab"]
    watched = watched_of({video: (0, 20) for video in videos})
    bouts = table_of({video: {"bite": [(1, 5), (8, 9 + k // 2)]} for k, video in enumerate(videos)})
    events = table_of({video: {"bite": [(1, 4), (8, 12)]} for video in videos})
    sessions = {video: video[:3] for video in videos}
    [each], method = ethograms.judge_bouts(watched, bouts, events, ["bite"], {})
    [own], method_of_groups = ethograms.judge_bouts(watched, bouts, events, ["bite"], sessions)
    assert "12 videos" in method and "6 groups" in method_of_groups
    assert (own["kappa"], own["recall_at_0.5"]) == pytest.approx((each["kappa"], each["recall_at_0.5"]))
    assert own["kappa_high"] - own["kappa_low"] > 1.2 * (each["kappa_high"] - each["kappa_low"])

    (tmp_path / "windows.csv").write_text("video,start_sec,end_sec,pred_label,prob_bite\n" + "".join(
        f"{video},0,20,bite,1\n" for video in videos))
    bouts.assign(mean_prob=1).to_csv(tmp_path / "bouts.csv", index=False)
    table = SimpleNamespace(windows=events[["start_sec", "end_sec"]].to_numpy(), sources=[Path(v) for v in events["video"]],
                            names=["bite"], label=np.zeros(24, int), notes=[], skipped=[],
                            groups=events["video"].map(sessions).to_numpy())
    ethograms.judge_folder(tmp_path, lambda names: table, None)
    assert "over 6 groups" in capsys.readouterr().out

    # two animals in each video, each of which the next session has too: all is one case
    table.groups = np.array([f"animal {k // 4 + k % 2}" for k in range(24)])
    ethograms.judge_folder(tmp_path, lambda names: table, None)
    assert "no interval under 5 groups, here 1" in capsys.readouterr().out


@pytest.mark.parametrize("second, is_noted", [((4, 9), True), ((5, 9), False)])
def test_events_of_one_class_that_overlap_are_noted(capsys, second, is_noted):
    """Two observers in one table: each bout can be paired with an event of one of them alone."""
    table = SimpleNamespace(windows=np.array([(0, 5), second, (2, 8)], float),
                            names=["bite", "walk"], label=np.array([0, 0, 1]))
    ethograms.events_in(watched_of({"/v": (0, 10)}), table, 3 * ["/v"])
    note = "note: events of one class overlap in 1 recordings."
    assert (note in capsys.readouterr().out) is is_noted


def test_a_run_without_a_bout_finds_no_event(tmp_path, capsys):
    """Its table of bouts has a header alone: recall 0, and no complaint about the file."""
    (tmp_path / "windows.csv").write_text("video,start_sec,end_sec,pred_label,prob_none,prob_1\n/v.mp4,0,1,none,.9,.1\n"
                                          "/w.mp4,0,1,none,.9,.1\n")
    (tmp_path / "bouts.csv").write_text("video,label,start_sec,end_sec,mean_prob\n")
    table = SimpleNamespace(
        windows=np.array([[0.2, 0.8]]), sources=[Path("/v.mp4")], names=["none", "1"], label=np.array([1]),
        groups=None, notes=["start, end are read as seconds"],
        skipped=[{"row": "e.csv line 3", "video": "v.mp4", "reason": "ends before it starts"}])
    ethograms.judge_folder(tmp_path, lambda names: table, None)
    said = capsys.readouterr().out
    assert "note: 1 recordings have no event in the table, and every bout in them counts as false: /w.mp4" in said
    assert "trained on these events is not known here" in said
    assert "note: start, end are read as seconds" in said
    assert "skipped: e.csv line 3, v.mp4: ends before it starts" in said
    row = {own["label"]: own for own in read_csv(tmp_path / "bout_scores.csv")}["1"]
    assert (row["bouts"], row["events"], float(row["recall_at_0.25"])) == ("0", "1", 0)
    table.sources = [Path("/x.mp4")]
    with pytest.raises(common.UserError, match="no event is of one of the recordings: expected /v.mp4, /w.mp4, found /x"):
        ethograms.judge_folder(tmp_path, lambda names: table, None)
    assert "counts as false" not in capsys.readouterr().out


def test_recordings_that_cannot_be_read(made, tmp_path):
    flags = ["--mode", "predict", "--checkpoint", only_run(made / "motion"), "--output_dir", tmp_path / "out", "--video"]
    (tmp_path / "empty").mkdir()
    assert "found no video" in video(*flags, tmp_path / "empty", code=2).stderr
    text = video(*flags, tmp_path / "nowhere", code=2).stderr
    assert "--video " in text and "nowhere: no such file or folder" in text and "--video_root" not in text
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    assert "no recording" in video(*flags, tmp_path / "bad.mp4", code=2).stderr
    assert "either --manifest or --video" in video(*flags[:4], code=2).stderr
    text = video("--mode", "judge_bouts", "--predictions", tmp_path, "--manifest", made / "events.csv", code=2).stderr
    assert "windows.csv (expected the run folder of --mode predict --video)" in text


# --- the model in other programs -------------------------------------------------------------

def test_an_exported_model_predicts_by_the_five_lines_of_its_page(made, tmp_path):
    """In a fresh process that knows nothing of ours, on clips that need no resizing."""
    draws = np.random.default_rng(0)
    for k in range(3):
        np.save(tmp_path / f"{k}.npy", draws.integers(0, 256, (4, 37, 37, 3), dtype=np.uint8))
    (tmp_path / "m.csv").write_text("path\n0.npy\n1.npy\n2.npy\n")
    flags = ["--mode", "predict", "--checkpoint", only_run(made / "motion") / "fold_0", "--manifest", tmp_path / "m.csv",
             "--video_root", tmp_path, "--output", tmp_path / "p.csv", "--num_workers", 0, "--use_amp", "off"]
    text = run_script("train_video.py", *flags, "--export", tmp_path / "model.pt2").stdout
    assert "model.pt2: clips (B, 4, 32, 32, 3), mask (B, 4) -> ear, tail; on 3 rows within" in text
    lines = re.search(r"```python\n(files = .+?)```", (ROOT / "docs" / "video.md").read_text(), re.S)[1]
    program = (f"import json, sys, numpy as np, torch\nclip = np.load('1.npy')[:, 3:35, 3:35]\n{lines}\n"
               "print(json.dumps(predicted))\nassert 'common' not in sys.modules and about['frames_per_sec'] == 4")
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = read_csv(tmp_path / "p.csv")[1]
    expected = {name: float(row[f"prob_{name}"]) for name in ("ear", "tail")}
    assert json.loads(done.stdout) == pytest.approx(expected, abs=1e-4)


@pytest.mark.long
def test_the_benchmark_of_recordings_runs(made):
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "recording.py", "--checkpoint", only_run(made / "motion"),
               "--videos", made / "two", "--minutes", "1", "--sizes", "64x48"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"64x48: decoding [0-9.]+ s, script [0-9.]+ s, [0-9.]+ times\n", done.stdout)
