"""make_sample_data.py --task video: repeatable, motion alone tells the class, scores learnable; the leaks planted in it.

    python -m pytest tests/test_sample_video.py -q
"""
import hashlib
import itertools
import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.stats import skew
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
import common
import make_sample_data

from planted_leaks import PLANTED, plant_leaks
from readers import file_names, picture_files, video_files

HEADER = ("event_idx,group,day,date,start_time,end_time,duration_sec,behavior,initiator_id,receiver_id,ended_by,"
          "pen_location,linked,camera_id,video_filename,video_path,event_offset_sec").split(",")
KEY = ["group", "day", "start", "initiator_id", "receiver_id"]


def make(folder, *flags):
    """Sample data of the video task made in the process; returns (their folder, ground truth)."""
    command = sys.argv
    sys.argv = ["make_sample_data.py", "--task", "video", "--output_dir", str(folder), *map(str, flags)]
    try:
        make_sample_data.main()
    finally:
        sys.argv = command
    return folder / "video", json.loads((folder / "video/ground_truth.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sample"))


def read_manifest(folder, name):
    """A manifest with the columns video (path on disk), label and start (seconds since midnight) added."""
    table = pd.read_csv(folder / f"manifests/{name}.csv")
    on_disk = {path.name.lower(): path for path in (folder / "videos").rglob("N*")}
    table["video"] = [on_disk[written.lower()] for written in table.video_filename]
    table["label"] = table.behavior.map(json.loads((folder / "manifests/label_map.json").read_text()))
    table["start"] = [sum(int(part) * 60 ** (2 - i) for i, part in enumerate(t.split(":"))) for t in table.start_time]
    return table


@pytest.fixture(scope="module")
def clips(made):
    """(labels (120,) True = tail, clips of all events (T, H, W, 3) at 12 fps)."""
    table = read_manifest(made[0], "all")
    windows = [(start, start + length) for start, length in zip(table.event_offset_sec, table.duration_sec)]
    store = video_files.ClipStore(table.video, windows, grid="rate", fps=12, n_frames=16, short_side=64, cache="ram")
    assert not any(found.error or found.fault for found in store.audit)
    return (table.label == "tail").to_numpy(), [store[i] for i in range(len(store))]


def digest(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_flags_same_bytes_and_another_seed_differs(tmp_path):
    small = [digest(make(tmp_path / name, "--n_samples", 30, "--seed", seed)[0]) for name, seed in ("a1", "b1", "c2")]
    assert small[0] == small[1] and len(small[0]) > 250
    same = {name for name, sha in small[0].items() if small[2].get(name) == sha}
    assert all(name.startswith("cv_") or "._" in name or name.endswith("label_map.json") for name in same)


def test_manifests_have_the_published_header_and_its_quirks(made):
    folder, _ = made
    table = read_manifest(folder, "all")
    assert list(pd.read_csv(folder / "manifests/all.csv").columns) == HEADER and len(table) == 120
    assert table.label.notna().all() and table.behavior.nunique() >= 6 and set(table.label) == {"ear", "tail"}
    assert 0.22 < (table.label == "tail").mean() < 0.28 and (table.duration_sec == 0).sum() == 13
    assert table.date.isna().sum() > 30 and table.date.dropna().str.endswith(" 0:00").sum() > 30
    assert table.start_time.str.len().nunique() == 2, "6:00:25 and 06:00:25"
    end = pd.to_timedelta(table.end_time).dt.total_seconds()
    filmed_from = (table.start - table.event_offset_sec).groupby(table.video)
    assert (filmed_from.agg(np.ptp) < 1).all(), "the clock is that of the video, in whole seconds"
    assert (end - table.start - table.duration_sec).abs().max() < 1
    assert table.video_path.str.startswith("E:\\Some study 2024\\Group ").all()
    assert table.video.nunique() == 24 and not table.duplicated(KEY).any()
    rates = {round(video_files.probe(path).header_fps, 3) for path in table.video.unique()}
    assert 14.994 in rates and len(rates) == 5
    assert sorted({path.suffix for path in table.video}) == [".avi", ".mp4"]
    assert any(path.name.startswith("._") for path in (folder / "videos").rglob("*.mp4"))


def test_parts_share_no_group_and_make_up_the_whole(made):
    folder, truth = made
    parts = {part: read_manifest(folder, part) for part in ("train", "val", "test")}
    assert {part: sorted(set(table.group)) for part, table in parts.items()} == truth["groups"]
    whole = read_manifest(folder, "all")
    assert sorted(itertools.chain(*(table.event_idx for table in parts.values()))) == whole.event_idx.tolist()
    assert all((table.label == "tail").sum() >= 6 for table in parts.values())


def test_one_pair_a_pen_is_the_confound(made):
    table = read_manifest(made[0], "all")
    busy = (table.initiator_id == 100 * table.group + 1) & (table.receiver_id == 100 * table.group + 2)
    assert 15 < busy.sum() < 45
    assert roc_auc_score(table.label == "tail", busy) > 0.75, "the pair alone, without a pixel"


def test_motion_tells_the_class_and_frames_do_not(clips):
    """Judge: skewness of the steps of |frame - median frame|, and statistics that no shuffling of frames changes."""
    is_tail, films = clips
    nearness = [np.abs(film - np.median(film, axis=0)).mean((1, 2, 3)) for film in films]
    assert roc_auc_score(is_tail, [skew(np.diff(series)) for series in nearness]) > 0.95
    null_sd = np.sqrt((len(is_tail) + 1) / (12 * is_tail.sum() * (~is_tail).sum()))  # of an AUC by chance
    for statistic in (np.mean, np.std, np.min, np.max, np.median):
        auc = roc_auc_score(is_tail, [statistic(series) for series in nearness])
        assert abs(auc - 0.5) < 2.6 * null_sd, f"{statistic.__name__} {auc:.3f}"
    thumbs = np.array([cv2.resize(film[len(film) // 2], (16, 16), interpolation=cv2.INTER_AREA) for film in films])
    group = np.arange(len(films)) // 5  # five events a video
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9)))
    guess = cross_val_predict(model, thumbs.reshape(len(films), -1), is_tail, groups=group, cv=GroupKFold(6))
    assert abs(roc_auc_score(is_tail, guess) - 0.5) < 2.6 * null_sd


def test_a_tail_event_is_an_ear_event_backwards():
    phases = np.linspace(0, 1, 200, endpoint=False) + 1 / 400
    ear, tail, idle = ([make_sample_data.nearness(p, kind) for p in phases] for kind in ("ear", "tail", None))
    np.testing.assert_allclose(ear, tail[::-1], atol=1e-9)
    np.testing.assert_allclose(idle, idle[::-1], atol=1e-9)
    assert (np.diff(ear) > 0).mean() == pytest.approx(make_sample_data.SLOW_SHARE, abs=0.01)


def events_of(table):
    return set(map(tuple, table[KEY].to_numpy().tolist()))


def overlaps(one, other, is_same):
    """Pairs of different rows whose windows in one video overlap; each once where both tables are the same."""
    pairs = itertools.combinations(one.itertuples(), 2) if is_same else itertools.product(
        one.itertuples(), other.itertuples())
    return sum(a.video == b.video and a.event_idx != b.event_idx
               and min(a.event_offset_sec + a.duration_sec, b.event_offset_sec + b.duration_sec)
               > max(a.event_offset_sec, b.event_offset_sec) for a, b in pairs)


@pytest.fixture(scope="module")
def planted(made):
    """The folder of the data, with the manifests of planted_leaks.py."""
    plant_leaks(made[0])
    return made[0]


def test_planted_leaks_are_those_counted(planted):
    folder = planted
    leaky = {part: read_manifest(folder, f"leaky_{part}") for part in ("train", "val", "test")}
    content = {path: hashlib.sha256(path.read_bytes()).hexdigest() for table in leaky.values() for path in table.video}
    for one, other in itertools.combinations(leaky, 2):
        a, b = leaky[one], leaky[other]
        windows = [{(content[row.video], row.event_offset_sec, row.duration_sec): row.video for row in t.itertuples()}
                   for t in (a, b)]
        found = {"shared_groups": len(set(a.group) & set(b.group)), "shared_videos": len(set(a.video) & set(b.video)),
                 "shared_events": len(events_of(a) & events_of(b)),
                 "duplicates": sum(windows[0][k] != windows[1][k] for k in windows[0].keys() & windows[1].keys()),
                 "overlapping_windows": overlaps(a, b, False)}
        assert {leak: n for leak, n in found.items() if n} == PLANTED[f"{one}-{other}"], f"{one}-{other}"
    within = {part: overlaps(table, table, True) for part, table in leaky.items()}
    assert within == {"train": PLANTED["train"]["overlapping_windows"], "val": 0, "test": 0}
    repeats = {part: int(table.duplicated(HEADER).sum()) for part, table in leaky.items()}
    assert repeats == {"train": PLANTED["train"]["repeated_rows"], "val": 0, "test": 0}
    ends = {path: video_files.probe(path).duration_sec for path in content}
    late = {part: sum(t.event_offset_sec >= [ends[path] for path in t.video]) for part, t in leaky.items()}
    assert late == {"train": 0, "val": 0, "test": PLANTED["test"]["windows_past_the_end"]}


def test_the_other_camera_saw_the_same_motion(planted):
    val, test = read_manifest(planted, "leaky_val"), read_manifest(planted, "leaky_test")
    pairs = val.merge(test, on=KEY, suffixes=("_1", "_2"))
    assert len(pairs) == 3 and (pairs.camera_id_1 != pairs.camera_id_2).all() and (pairs.label_1 == pairs.label_2).all()
    for row in pairs.itertuples():
        series = []
        for path, offset in ((row.video_1, row.event_offset_sec_1), (row.video_2, row.event_offset_sec_2)):
            window = (offset, offset + 1.5)
            store = video_files.ClipStore([path], [window], grid="rate", fps=12, n_frames=18, short_side=64)
            film = store[0].astype(float)
            series.append(np.abs(film - np.median(film, axis=0)).mean((1, 2, 3)))
        assert np.corrcoef(*map(np.diff, series))[0, 1] > 0.7


def test_scores_are_thirds_with_gaps_and_folders_hold_the_frames(made):
    folder, _ = made
    table = pd.read_csv(folder / "sequences.csv")
    assert list(table.columns[:5]) == ["sequence_path", "animal", "moment", "sequence_id", "num_frames"]
    assert list(table.columns[5:12]) == list(make_sample_data.ACTION_UNITS)
    assert list(table.columns[12:]) == ["NRS (1-10)", "Total.Facial.scale"]
    assert len(table) == 60 and (table.groupby("animal").moment.agg("".join) == "M0M1M2M3M4").all()
    assert table.animal.nunique() == 12
    parts = table[list(make_sample_data.ACTION_UNITS)]
    known = parts.to_numpy()[parts.notna().to_numpy()]
    assert 0 <= known.min() and known.max() <= 2 and np.abs(3 * known - np.round(3 * known)).max() < 1e-3
    assert 3 <= parts.isna().sum().sum() <= 40 and table["Total.Facial.scale"].between(0, 14).all()
    complete = parts.notna().all(axis=1)
    assert (parts.sum(axis=1) - table["Total.Facial.scale"])[complete].abs().max() < 0.51
    frames = [file_names.find_images(folder / path) for path in table.sequence_path]
    assert [len(each) for each in frames] == table.num_frames.tolist() and set(table.num_frames) <= set(range(8, 41))
    assert frames[0][1].name == "frame 2.jpg" and frames[0][-1].name == f"frame {table.num_frames[0]}.jpg"


def test_sequences_are_learnable_beyond_their_moment(made):
    folder, _ = made
    table = pd.read_csv(folder / "sequences.csv")
    frames = [file_names.find_images(folder / path) for path in table.sequence_path]

    def thumb(path):
        return cv2.resize(picture_files.load_image(path), (24, 24), interpolation=cv2.INTER_AREA)
    thumbs = [np.mean([thumb(path) for path in each[::4]], 0) for each in frames]
    target = table["Total.Facial.scale"].to_numpy()
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 20)))
    predicted = cross_val_predict(model, np.reshape(thumbs, (60, -1)), target, groups=table.animal, cv=GroupKFold(4))
    of_moment = table.groupby("moment")["Total.Facial.scale"].transform("mean")
    assert r2_score(target, predicted) > r2_score(target, of_moment) + 0.1 and 0.3 < r2_score(target, of_moment) < 0.7


def test_every_animal_is_held_out_in_one_fold(made):
    folder, _ = made
    folds = json.loads((folder / "cv_folds.json").read_text())["cv_folds"]
    animals = set(pd.read_csv(folder / "sequences.csv").animal)
    assert sorted(itertools.chain(*(fold["val_animals"] for fold in folds))) == sorted(animals)
    assert all(set(fold["train_animals"]) == animals - set(fold["val_animals"]) for fold in folds)


def test_an_opencv_that_cannot_write_videos_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoWriter", lambda *_: SimpleNamespace(isOpened=lambda: False))
    video = SimpleNamespace(size=(64, 48), file="pen 1/a.mp4", fps=12, events={})
    with pytest.raises(common.UserError, match="OpenCV .* cannot write .*a.mp4: it was built without FFmpeg"):
        make_sample_data.render_video(tmp_path, video, np.random.default_rng(0))
