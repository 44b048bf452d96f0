"""Manifests of events -> one Table: a row a clip, with its file, window, label and groups.

Letters: N rows, C classes. Units: seconds from the start of a file.
"""
import collections
import dataclasses
import math
import os
import re
from pathlib import Path

import numpy as np

import common
from readers import csv_tables, file_names, score_tables

PATH_COLUMNS = ("video_path", "sequence_path", "clip_path", "path", "file", "filename", "video_filename", "video",
                "clip", "folder")
LABEL_COLUMNS = ("behavior", "behaviour", "label", "class", "category", "action")
GROUP_COLUMNS = ("animal", "animal_id", "subject", "group")
WINDOW_COLUMNS = ("start_sec", "end_sec", "event_offset_sec", "duration_sec", "start_frame", "end_frame")


@dataclasses.dataclass
class Table:
    """What is known of N clips before any video is opened; a row that the manifest repeats stands here once.

    windows: (N, 2) float64 start and end, NaN = the whole clip, in `unit`; events: identity of what happens, whatever
    the camera, path or row; videos: the source's path below the video root; repeats: rows of the manifest that each
    row stands for, more than 1 where rare events were repeated on purpose.
    """
    names: list  # C classes, or R targets
    clip_ids: np.ndarray  # (N,) unique text
    sources: list  # N paths: a video, a folder of frames or a .npy
    windows: np.ndarray  # (N, 2)
    unit: np.ndarray  # (N,) sec or frame
    events: np.ndarray  # (N,) text
    videos: np.ndarray  # (N,) text
    parts: np.ndarray  # (N,) the manifest's part: train, val, test or ''
    repeats: np.ndarray  # (N,) int64, 1 or more
    extra: object  # DataFrame of N rows: the other columns as text, and pair, hour, row_order
    label: np.ndarray | None = None  # (N,) int64 class, -1 = unknown
    target: np.ndarray | None = None  # (N, R) float64, NaN = missing
    groups: np.ndarray | None = None  # (N,) text
    single_ratings: dict | None = None  # target -> N arrays, where several raters scored a sequence
    skipped: list = dataclasses.field(default_factory=list)  # dicts of row and reason
    notes: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.clip_ids)

    def take(self, rows):
        """The Table of these rows: (M,) int, or (N,) bool."""
        rows = np.arange(len(self))[rows]
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: value[rows] for name, value in fields.items() if isinstance(value, np.ndarray)}
        single = {name: [each[row] for row in rows] for name, each in (self.single_ratings or {}).items()} or None
        return dataclasses.replace(self, **changed, sources=[self.sources[row] for row in rows],
                                   extra=self.extra.iloc[rows].reset_index(drop=True), single_ratings=single)


def column_key(name):
    """'Total.Facial.scale' = 'Total_Facial_scale' = 'total_facial_scale'."""
    return re.sub(r"\W+", "_", str(name).casefold()).strip("_")


def keyed_columns(table, source):
    """The table with its columns named by column_key. Raises UserError where two names become one."""
    keys = [column_key(name) for name in table.columns]
    twice = [name for name, key in zip(table.columns, keys) if keys.count(key) > 1]
    if twice:
        raise common.UserError(f"{source}: columns that differ only in spelling: {common.shorten_list(twice)}. Delete one")
    return table.set_axis(keys, axis=1)


def first_column(table, wanted, known, flag, source):
    """Key of the column asked for by `flag`, else the first of `known` that the table has, else None."""
    if wanted and column_key(wanted) not in table.columns:
        raise common.UserError(f"{source}: no column for {flag} {wanted}{common.closest(wanted, table.columns)} "
                               f"(found: {common.shorten_list(table.columns, 40)})")
    return column_key(wanted) if wanted else next((name for name in known if name in table.columns), None)


def clock_seconds(text):
    """Seconds since midnight of '6:00:25', '06:00:25', '7/6/2024 6:00:25' or '6:00:25 pm'; NaN where it is no time."""
    clock = r"(?:.*[ t])?(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d*)?))?\s*(?:([ap])\.?m\.?)?"
    match = re.fullmatch(clock, str(text).strip().casefold())
    if not match:
        return math.nan
    hour = int(match[1]) if match[4] is None else int(match[1]) % 12 + 12 * (match[4] == "p")
    return 3600 * hour + 60 * int(match[2]) + float(match[3] or 0)


def plain_level(cell):
    """One spelling of a cell that names something: case and spaces, '07' = '7' = '7.0' = 'Group 7' = tensor(7), and
    '7/6/2024 0:00' = '07/06/2024'."""
    text = re.sub(r"tensor\(\s*([^,()]*).*\)", r"\1", " ".join(str(cell).casefold().split())).strip()
    text = re.sub(r"^(group|day|animal|subject)[ _-]*(?=\d+$)", "", text)
    text = re.sub(r"(?<=\d)[ t]0?0:00(:00)?(\.0+)?$", "", text)  # spreadsheets add midnight to a date
    text = re.sub(r"^(\d+)\.0+$", r"\1", text)
    return text if re.search("[a-z]", text) else re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def event_keys(extra, fallback):
    """(N,) identity of each row's event: group, day, start time, initiator, receiver; never path, row or camera.

    Where start time, day (or date) or the animals have no column, or the time is blank: fallback (N,), source and
    window.
    """
    def column(*names):
        found = next((name for name in names if name in extra and (extra[name] != "").any()), None)
        return None if found is None else [plain_level(cell) for cell in extra[found]]
    group, day, initiator, receiver = (column(*names) for names in (
        ("group",), ("day", "date"), ("initiator_id", "initiator"), ("receiver_id", "receiver")))
    if "start_time" not in extra or None in (day, initiator, receiver):
        return np.array(fallback, dtype=str)
    seconds = [clock_seconds(cell) for cell in extra["start_time"]]
    times = [plain_level(cell) if math.isnan(s) else f"{s:g} s" for cell, s in zip(extra["start_time"], seconds)]
    keys = zip(group or [""] * len(extra), day, times, initiator, receiver)
    return np.array([" | ".join(key) if key[2] else other for key, other in zip(keys, fallback)], dtype=str)


def read_label_map(path):
    """JSON, YAML or CSV -> {spelling: class, or None = left out}; also {class: [spellings]}. A class spells itself."""
    if Path(path).suffix.lower() in (".csv", ".tsv", ".txt"):
        rows = csv_tables.read_table(path).to_numpy()
        if rows.shape[1] != 2:
            raise common.UserError(f"--label_map {path}: expected 2 columns, spelling and class; found {rows.shape[1]}")
        pairs = [tuple(row) for row in rows]
    else:
        pairs = [(item, key) if isinstance(value, list) else (key, value)
                 for key, value in common.read_config(path).items()
                 for item in (value if isinstance(value, list) else [None])]
    classes = {str(spelling): None if name in (None, "") else str(name) for spelling, name in pairs}
    return {**classes, **{name: name for name in classes.values() if name is not None and name not in classes}}


def classes_of(spelled, label_map=None, names=None):
    """(N,) labels as written -> (C names, N class names; '' = blank, None = left out by the map).

    Without a map the spellings that differ in case and outer spaces are one class, named by the most frequent one.
    Raises UserError that counts the labels that are not in the map, or not among `names`.
    """
    counts = collections.Counter(str(label).strip() for label in spelled)
    counts.pop("", None)
    known = {name.casefold(): name for name in names or []}
    if label_map is None:
        for label in sorted(counts, key=lambda label: (-counts[label], label)) if names is None else ():
            known.setdefault(label.casefold(), label)
    else:
        known = {label.strip().casefold(): name for label, name in label_map.items()}
    unknown = [f"{label!r} ({count} rows)" for label, count in sorted(counts.items()) if label.casefold() not in known
               or names and known[label.casefold()] not in [*names, None]]
    if unknown:
        raise common.UserError(f"labels without a class: {common.shorten_list(unknown, 30)}; known: {common.shorten_list(known, 30)}. "
                               "Write --label_map FILE (JSON, YAML or CSV: spelling -> class, blank = leave out)")
    chosen = [known[str(label).strip().casefold()] if str(label).strip() else "" for label in spelled]
    used = [name for name in dict.fromkeys(known.values()) if name and name in chosen]
    return list(names or (sorted(used) if label_map is None else used)), chosen


def event_windows(rows, source, min_event_sec=1.0):
    """Window columns of one manifest -> (windows (N, 2), unit (N,), faults (N,) text, '' = none).

    start_sec and end_sec, else event_offset_sec and duration_sec, else start_frame and end_frame (both inclusive);
    nothing: the whole clip. An event shorter than min_event_sec gets a window of that length around it.
    """
    def numbers(name):
        has = name in rows
        return csv_tables.to_numbers(rows[name], f"{source}, column {name}") if has else np.full(len(rows), np.nan)
    start, end, offset, duration, first, last = map(numbers, WINDOW_COLUMNS)
    start = np.where(np.isnan(start), offset, start)
    end = np.where(np.isnan(end), start + np.nan_to_num(duration), end)
    is_frame = np.isnan(start) & ~np.isnan(first)
    windows = np.where(is_frame[:, None], np.stack([first, np.where(np.isnan(last), first, last) + 1], 1),
                       np.stack([start, end], 1))
    is_short = ~is_frame & (windows[:, 1] >= windows[:, 0]) & (windows[:, 1] - windows[:, 0] < min_event_sec)
    centred = np.maximum(windows[is_short].mean(1) - min_event_sec / 2, 0)
    faults = np.where(windows[:, 0] < 0, "starts before the file", "").astype(object)
    faults[windows[:, 1] < windows[:, 0] + is_frame] = "ends before it starts"
    windows[is_short] = np.stack([centred, centred + min_event_sec], 1)
    has_start = ~np.isnan(windows[:, 0])
    if has_start.any():
        faults[~has_start] = "no offset, while other rows have one"
    return windows, np.where(is_frame, "frame", "sec"), faults


def seconds_of(table, fps, min_event_sec=1.0):
    """The Table with windows counted in frames turned into seconds, by fps (N,); short ones widened as in seconds."""
    start, end = np.where((table.unit == "frame")[:, None], table.windows / np.asarray(fps, float)[:, None],
                          table.windows).T
    is_short = (table.unit == "frame") & (end - start < min_event_sec)
    start = np.where(is_short, np.maximum((start + end - min_event_sec) / 2, 0), start)
    windows = np.stack([start, np.where(is_short, start + min_event_sec, end)], 1)
    return dataclasses.replace(table, windows=windows, unit=np.full(len(table), "sec"))


def folder_table(root):
    """Class folders root/CLASS/clip.mp4 (or a folder of frames, or .npy) -> DataFrame of path and label, by clip name:
    the folders' order is no order of the rows."""
    import pandas as pd
    clips = sorted((name for name in file_names.find_videos(root) if "/" in name), key=lambda name: (name.split("/")[1:], name))
    if not clips:
        raise common.UserError(f"{root}: expected class folders with clips (CLASS/clip.mp4), found none")
    labels = [name.split("/")[0] for name in clips]
    return pd.DataFrame({"path": clips, "label": labels}, index=range(1, len(clips) + 1), dtype=object)


def row_places(n_rows):
    """Place of each row in its file, 0 to 1, as text: a file sorted by class gives itself away."""
    return [f"{row / n_rows:.6f}" for row in range(n_rows)]


def read_manifest(part, path, flags):
    """One manifest file, or folder of class folders -> DataFrame of text: path, label, line, part, fault, root, start,
    end, unit, then the other columns under column_key. Raises UserError without a path column."""
    path = Path(path)
    rows = keyed_columns(folder_table(path) if path.is_dir() else csv_tables.read_table(path), path)
    source = first_column(rows, flags["path_column"], PATH_COLUMNS, "--path_column", path)
    label = first_column(rows, flags["label_column"], LABEL_COLUMNS, "--label_column", path)
    if source is None or label is None and flags["need_labels"]:
        raise common.UserError(f"{path}: expected a column of paths ({', '.join(PATH_COLUMNS)}) and one of labels "
                               f"({', '.join(LABEL_COLUMNS)}), found {common.shorten_list(rows.columns, 40)}")
    windows, unit, faults = event_windows(rows, path, flags["min_event_sec"])
    written = rows[source].mask(rows[source] == "", rows.get("video_filename", ""))
    extra = rows.drop(columns=[name for name in rows if name in (source, label, *WINDOW_COLUMNS)])
    core = {"path": written, "label": "" if label is None else rows[label], "part": part, "fault": faults,
            "line": [f"{path.name} line {line}" for line in rows.index],
            "root": str(flags["video_root"] or (path if path.is_dir() else path.parent)),
            "start": windows[:, 0], "end": windows[:, 1], "unit": unit, "row_order": row_places(len(rows))}
    return extra.assign(**{f"@{name}": value for name, value in core.items()})


def read_events(manifests, video_root=None, label_map=None, min_event_sec=1.0, group_column=None, path_column=None,
                label_column=None, names=None, need_labels=True, max_missing=0.05):
    """{part: CSV manifest or folder of class folders} -> Table for --task classify.

    video_root: where the paths are looked for (default: beside each manifest); names: the classes of a trained model;
    need_labels False: rows without a label stay, label -1. Without group_column a column `group` is the group.
    Raises UserError: see the functions above; more than the share max_missing of the videos is not there.
    """
    import pandas as pd
    flags = {"path_column": path_column, "label_column": label_column, "need_labels": need_labels,
             "min_event_sec": min_event_sec, "video_root": video_root}
    rows = pd.concat([read_manifest(part, path, flags) for part, path in manifests.items()], ignore_index=True)
    rows = rows.fillna({name: "" for name in rows.columns if not name.startswith("@")})
    group = first_column(rows, group_column, ("group",), "--group_column", common.shorten_list(manifests.values()))
    notes = []
    sources = find_sources(rows, video_root is None, max_missing, notes)
    names, classes = classes_of(rows["@label"], label_map and read_label_map(label_map), names)
    reasons = [fault or ("no such video" if source is None else "left out by --label_map" if name is None
                         else "no label" if need_labels and not name else "")
               for fault, source, name in zip(rows["@fault"], sources, classes)]
    keep, table = build_table(rows, sources, names, reasons, notes)
    index = {name: c for c, name in enumerate(names)}
    table.label = np.array([index.get(classes[i], -1) for i in keep], dtype=np.int64)
    table.groups = groups_of(rows.iloc[keep], group, group_column is not None, table)
    return merge_repeats(table)


def groups_of(rows, column, is_wanted, table):
    """(N,) groups in one spelling, or None. Blank ones: a UserError where the column was asked for, else no groups."""
    if column is None:
        return None
    groups = np.array([plain_level(cell) for cell in rows[column]], dtype=str)
    if (groups != "").all():
        return groups
    if is_wanted:
        raise common.UserError(f"--group_column {column} is blank in {common.shorten_list(rows['@line'][groups == ''])}: fill")
    table.notes.append(f"column {column} is blank in {(groups == '').sum()} rows and names no groups")
    return None


def find_sources(rows, is_open, max_missing, notes):
    """Paths of the rows' videos, None where there is none; appends to notes. Raises UserError above max_missing.

    is_open: no --video_root was given, so that an absolute path may also name a video elsewhere.
    """
    found = {}
    for root, names in rows.groupby("@root")["@path"]:
        hits, by_base = file_names.match_videos(names, root)
        if by_base:
            notes.append(f"{len(by_base)} videos found by base name alone, other folder on disk: "
                         f"{common.shorten_list(by_base, 3)}")
        for name, path in hits.items():
            is_there = path is None and is_open and os.path.isabs(name) and os.path.exists(name)
            found[root, name] = Path(name) if is_there else path
    missing = [name for (_, name), path in found.items() if path is None]
    if len(missing) > max_missing * len(found):
        raise common.UserError(f"{len(missing)} of {len(found)} videos are not below --video_root {root}: "
                               f"{common.shorten_list(missing)}; correct it, or allow a larger share: --max_missing")
    if missing:
        notes.append(f"{len(missing)} of {len(found)} videos are not there: {common.shorten_list(missing)}")
    return [found[key] for key in zip(rows["@root"], rows["@path"])]


def build_table(rows, sources, names, reasons, notes):
    """Rows, (N,) sources, (N,) reasons to skip, '' = none -> (kept rows, their Table without labels).

    Clip ids do not depend on the order of the rows. Raises UserError where no row is left.
    """
    keep = [i for i, reason in enumerate(reasons) if not reason]
    skipped = [{"row": line, "video": path, "reason": reason}
               for line, path, reason in zip(rows["@line"], rows["@path"], reasons) if reason]
    if not keep:
        raise common.UserError(f"no usable row of {len(rows)}: "
                               f"{common.shorten_list((row['row'] + ': ' + row['reason'] for row in skipped), 3)}")
    rows, sources = rows.iloc[keep].reset_index(drop=True), [sources[i] for i in keep]
    base = Path(os.path.commonpath([os.path.realpath(root) for root in set(rows["@root"])]))
    real = {source: Path(os.path.realpath(source)) for source in set(sources)}
    below = {source: (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
             for source, path in real.items()}
    videos = np.array([below[source] for source in sources], dtype=str)
    windows = rows[["@start", "@end"]].to_numpy(float)
    spans = ["" if math.isnan(a) else f"@{a:g}-{b:g}{'f' * (unit == 'frame')}"
             for (a, b), unit in zip(windows, rows["@unit"])]
    clips = [video + span for video, span in zip(videos, spans)]
    extra = rows[[name for name in rows.columns if not name.startswith("@")]].copy()
    extra["row_order"] = rows["@row_order"]
    events = event_keys(extra, [f"{clip}" for clip in clips])
    if {"initiator_id", "receiver_id"} <= set(extra):
        extra["pair"] = [f"{plain_level(a)} > {plain_level(b)}"
                         for a, b in zip(extra["initiator_id"], extra["receiver_id"])]
    if "start_time" in extra:
        hours = [clock_seconds(cell) // 3600 for cell in extra["start_time"]]
        extra["hour"] = ["" if math.isnan(hour) else f"{hour:.0f}" for hour in hours]
    return keep, Table(names, np.array(clips, dtype=str), sources, windows, rows["@unit"].to_numpy(str), events, videos,
                       rows["@part"].to_numpy(str), np.ones(len(rows), np.int64), extra, skipped=skipped, notes=notes)


def merge_repeats(table):
    """Rows of one part with the same clip, event and label become one that counts them; then clip_ids are unique."""
    label = table.label if table.label is not None else table.target
    keys = list(zip(table.clip_ids, table.parts, table.events, [np.asarray(value).tobytes() for value in label]))
    first, counts = {key: row for row, key in reversed(list(enumerate(keys)))}, collections.Counter(keys)
    kept = table.take(np.array(sorted(first.values()), dtype=int))
    kept.repeats = np.array([counts[keys[row]] for row in sorted(first.values())], np.int64)
    if len(kept) < len(table):
        kept.notes.append(f"{len(table) - len(kept)} rows repeat another one ({(kept.repeats > 1).sum()} events were "
                          "repeated on purpose): each is counted once in every evaluation")
    kept.clip_ids = unique_ids(kept)
    return kept


def unique_ids(table):
    """(N,) clip ids; where one clip stands in several parts, or holds several events, its part and event are added."""
    ids, label = list(table.clip_ids), table.label if table.label is not None else table.target
    for detail in (table.parts, table.events, [str(value) for value in label]):
        counts = collections.Counter(ids)
        ids = [f"{name} [{more}]" if counts[name] > 1 and more else name for name, more in zip(ids, detail)]
    seen = collections.Counter()
    for i, name in enumerate(ids):
        seen[name] += 1
        ids[i] = f"{name} #{seen[name]}" if seen[name] > 1 else name
    return np.array(ids, dtype=str)


def split_keys(table, split_by=None):
    """(N,) text units that a split must keep whole: events, videos with their events, or groups with all of both.

    split_by None: the coarsest that there is more than one of. Units that share an event or a video are one.
    """
    levels = {"group": table.groups, "video": table.videos, "event": table.events}
    if split_by == "group" and table.groups is None:
        raise common.UserError(f"--split_by {split_by} needs --group_column (found: "
                               f"{common.shorten_list(table.extra.columns, 40)})")
    wanted = [split_by] if split_by else [name for name in levels if levels[name] is not None]
    for name in wanted:
        used = list(levels)[list(levels).index(name):]
        unit = connected([levels[other] for other in used if levels[other] is not None])
        if len(set(unit)) > 1 or name == wanted[-1]:
            return np.array([f"{name} {each}" for each in unit], dtype=str)
    raise common.UserError(f"--split_by {split_by}: expected group, video or event")


def connected(columns):
    """Columns of (N,) text -> (N,) text: rows linked by an equal value in any column get the same, smallest name."""
    parent = {}

    def root(node):
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node
    for row in zip(*columns):
        for level, value in enumerate(row):
            a, b = sorted((root((0, row[0])), root((level, value))))
            parent[b] = a
    return [root((0, value))[1] for value in columns[0]]


def filter_rows(table, text):
    """--filter 'moment==M2 and age>=3' -> (N,) bool, True = kept. Text is compared in any case, < and > as numbers.

    Raises UserError for what is not COLUMN ==, !=, <, <=, > or >= VALUE joined by `and`, or keeps no row.
    """
    keep = np.ones(len(table), bool)
    for part in re.split(r"\s+and\s+", text.strip()):
        match = re.fullmatch(r"\s*([^=!<>]+?)\s*(==|!=|<=|>=|<|>)\s*[\"']?(.+?)[\"']?\s*", part)
        if not match:
            raise common.UserError(f"--filter expects COLUMN==VALUE (or != < <= > >=) joined by `and`, found {part!r}")
        column, relation, value = score_tables.column_of(table, match[1], "--filter"), match[2], match[3]
        if relation in ("==", "!="):
            keep &= np.array([plain_level(cell) == plain_level(value) for cell in column]) == (relation == "==")
            continue
        compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}[relation]
        keep &= compare(csv_tables.to_numbers(column, f"--filter {part}"), csv_tables.to_numbers([value], "--filter")[0])
    if not keep.any():
        raise common.UserError(f"--filter {text!r} keeps none of {len(table)} rows")
    return keep


def parse_level_flag(text, flag):
    """'moment:M2=2.5' -> ('moment', 'M2', '2.5'). Raises UserError."""
    match = re.fullmatch(r"\s*([^:=]+?)\s*:\s*(.+?)\s*=\s*([^=]+?)\s*", text)
    if not match:
        raise common.UserError(f"{flag} expects COLUMN:LEVEL=VALUE as in moment:M2=2.5, found {text!r}")
    return match.groups()


def level_mask(table, column, level, flag):
    """(N,) bool, True = the row has this level. Raises UserError where no row has, listing the levels."""
    cells = score_tables.column_of(table, column, flag)
    mask = np.array([plain_level(cell) == plain_level(level) for cell in cells], bool)
    if not mask.any():
        raise common.UserError(f"{flag}: no row has {column} {level!r} (found: {common.shorten_list(sorted(set(cells)), 30)})")
    return mask


def group_mask(table, text, flag="--test_groups"):
    """'14,17' -> (N,) bool, True = a row of these groups. Raises UserError: no groups, or groups that are not there."""
    if table.groups is None:
        raise common.UserError(f"{flag} {text} needs --group_column")
    wanted = [plain_level(name) for name in str(text).split(",") if name.strip()]
    unknown = [name for name in wanted if name not in table.groups]
    if unknown or not wanted:
        raise common.UserError(f"{flag} {text}: no such groups: {common.shorten_list(unknown)} (found: "
                               f"{common.shorten_list(sorted(set(table.groups)), 40)})")
    return np.isin(table.groups, wanted)


def strata_of(table):
    """(N,) label, or mean score in sd, which splits are stratified on."""
    if table.target is None:
        return table.label.astype(str)
    return np.nanmean(table.target / np.nanstd(table.target, axis=0).clip(1e-9), axis=1)
