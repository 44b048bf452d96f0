"""Manifests with every kind of leak, made from the sample videos: what an audit must find, and how much of it."""
import shutil

import cv2
import numpy as np
import pandas as pd

PARTS = ("train", "val", "test")
PLANTED = {  # the only difference of leaky_*.csv from train, val and test.csv
    "train-val": {"duplicates": 2},
    "train-test": {"shared_groups": 2, "shared_videos": 2, "overlapping_windows": 1},
    "val-test": {"shared_groups": 1, "shared_events": 3},
    "train": {"overlapping_windows": 2, "repeated_rows": 2},
    "test": {"windows_past_the_end": 3}}
SIDE_FILE = "Group 5 Day 1/Cam 3/N864_ch3_side.avi"
COPIED_FILE = "Group 6 Day 9/Cam 8/N899_ch8_main.avi"


def plant_leaks(folder):
    """Write manifests/leaky_{train,val,test}.csv of the video task's sample data, and the two videos that they need."""
    videos, manifests = folder / "videos", folder / "manifests"
    clean = {part: pd.read_csv(manifests / f"{part}.csv", dtype=str, keep_default_na=False) for part in PARTS}
    leaky = {part: [table] for part, table in clean.items()}
    moved = pd.concat([first_video(clean["test"], group).tail(1) for group in (7, 8)])
    leaky["test"] = [clean["test"].drop(moved.index)]  # one event of each of two test videos is trained on
    overlapping = [first_video(clean[part], group).head(1) for part, group in (("test", 7), ("train", 1), ("train", 2))]
    leaky["train"] += [moved, later(pd.concat(overlapping), 1), first_video(clean["train"], 3).head(2)]
    seen = first_video(clean["val"], 5).head(3)
    delay = film_from_the_side(on_disk(videos, seen), videos / SIDE_FILE)
    seen = seen.assign(camera_id="3", **names_of(SIDE_FILE))
    leaky["test"].append(seen.assign(event_offset_sec=seen.event_offset_sec.astype(float) - delay))
    source = first_video(clean["train"], 4).head(2)
    copy = videos / COPIED_FILE
    copy.parent.mkdir(parents=True)
    shutil.copy(on_disk(videos, source), copy)
    leaky["val"].append(source.assign(group="6", day="9", date="", initiator_id="603", receiver_id="604",
                                      **names_of(COPIED_FILE)))
    leaky["test"].append(later(first_video(clean["test"], 8).head(3), 1000))  # past the end
    for part, tables in leaky.items():
        pd.concat(tables).to_csv(manifests / f"leaky_{part}.csv", index=False)


def first_video(table, group):
    """Rows of the first video of a group, those with a duration first."""
    of_group = table[table.group == str(group)]
    files = of_group.video_filename.str.lower()
    rows = of_group[files == files.iloc[0]]
    return rows.sort_values("duration_sec", key=lambda duration: duration.astype(float) == 0, kind="stable")


def later(rows, seconds):
    """Other events, so many seconds later in the same videos."""
    clocks = {name: [shifted_clock(text, seconds) for text in rows[name]] for name in ("start_time", "end_time")}
    number = (rows.event_idx.astype(int) + 1000 * seconds).astype(str)
    return rows.assign(event_idx=number, event_offset_sec=rows.event_offset_sec.astype(float) + seconds, **clocks)


def shifted_clock(text, seconds):
    hours, minutes, old = map(int, text.split(":"))
    total = 3600 * hours + 60 * minutes + old + seconds
    return f"{total // 3600}:{total // 60 % 60:02}:{total % 60:02}"


def names_of(file):
    """The two cells that name a video."""
    path = file.replace("/", "\\")
    return {"video_filename": file.split("/")[-1], "video_path": f"E:\\Some study 2024\\{path}"}


def on_disk(videos, rows):
    """The video of these rows, whatever the case in which the table writes it."""
    [found] = {path for path in videos.rglob("N*") if path.name.lower() == rows.video_filename.iloc[0].lower()}
    return found


def film_from_the_side(source, target):
    """The same motion in a turned picture, by a camera that starts seven frames later; returns the delay in seconds."""
    video = cv2.VideoCapture(str(source))
    fps = video.get(cv2.CAP_PROP_FPS)
    frames = []
    while (read := video.read())[0]:
        frames.append(np.rot90(read[1]).copy())
    target.parent.mkdir(parents=True)
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(target), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    for frame in frames[7:]:
        writer.write(frame)
    writer.release()
    return 7 / fps
