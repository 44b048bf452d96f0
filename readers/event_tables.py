"""Manifests of events, BORIS exports, label tables -> one EventTable: a row a clip, with file, window, label, groups.

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
from readers import csv_tables, event_times, file_names, video_files

PATH_COLUMNS = ("video_path sequence_path clip_path path file filename video_filename video clip "
                "folder media_file media_file_path media_file_name video_file video_name").split()
LABEL_COLUMNS = "behavior behaviour label class category action".split()
FRAME_COLUMNS = "frame frames frame_number frame_index frame_id index unnamed_0".split()


@dataclasses.dataclass(kw_only=True)
class EventTable:
    """What is known of N clips before any video is opened; a row that the manifest repeats stands here once."""
    names: list  # C classes, or R targets
    clip_ids: np.ndarray  # (N,) unique text
    lines: np.ndarray  # (N,) text: file and line of the manifest
    sources: np.ndarray  # (N,) paths: a video, a folder of frames or a .npy
    windows: np.ndarray  # (N, 2) float64 start and end in `unit`, NaN = the whole clip
    unit: np.ndarray  # (N,) sec or frame
    events: np.ndarray  # (N,) text: identity of what happens, whatever the camera, path or row
    videos: np.ndarray  # (N,) text: the source's path below the video root
    parts: np.ndarray  # (N,) the manifest's part: train, val, test or ''
    repeats: np.ndarray  # (N,) int64 rows of the manifest that it stands for: more where rare events were repeated
    extra: object  # DataFrame of N rows: the other columns as text, and pair, hour, row_order
    label: np.ndarray | None  # (N,) int64 class, -1 = unknown
    target: np.ndarray | None  # (N, R) float64, NaN = missing
    single_ratings: np.ndarray | None = None  # (N,) arrays (raters, R), where several raters scored a sequence
    groups: np.ndarray | None  # (N,) text
    skipped: list  # dicts of row, video and reason
    notes: list

    def __len__(self):
        return len(self.clip_ids)

    @property
    def truth(self):
        """(N,) labels or (N, R) scores."""
        return self.label if self.target is None else self.target

    def groups_of(self, rows=slice(None)):
        """(M,) text of these rows, equal for those that are not independent: the groups, else rows of one video.

        None where every row of the table has a video of its own.
        """
        if self.groups is not None:
            return self.groups[rows]
        has_shared = len(set(self.videos)) < len(self)
        return self.videos[rows] if has_shared else None

    def take(self, rows):
        """The table of these rows: (M,) int, or (N,) bool."""
        changed = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, extra=self.extra.iloc[rows].reset_index(drop=True), **changed)

    def without(self, reasons):
        """The table of the rows without a reason (N texts, '' = none); the others are added to `skipped`."""
        bad = [{"row": line, "video": str(source), "reason": reason}
               for line, source, reason in zip(self.lines, self.sources, reasons) if reason]
        kept = self.take([not reason for reason in reasons])
        return dataclasses.replace(kept, skipped=self.skipped + bad)


# --------------------------------------------------------------------------------------
# Cells and columns in one spelling
# --------------------------------------------------------------------------------------

def keyed_columns(table, source):
    """The table with its columns named by column_key.

    Raises UserError where two names become one.
    """
    keys = table.columns.map(csv_tables.column_key)
    twice = table.columns[keys.duplicated(keep=False)]
    if len(twice):
        raise common.UserError(
            f"{source}: columns that differ only in spelling: {common.shorten_list(twice)}. Rename or delete one")
    return table.set_axis(keys, axis=1)


def without_tensor(cell):
    """'tensor(9)' -> '9': as scripts print ids that they forgot to unpack."""
    return re.sub(r"^\s*tensor\(\s*\[?([^,()\]]*).*\)\s*$", r"\1", str(cell)).strip()


def plain_level(cell):
    """One spelling of a cell that names something: case and spaces, '07' = '7' = '7.0' = 'Group 7' = tensor(7), and
    '7/6/2024 0:00' = '07/06/2024'."""
    text = without_tensor(" ".join(str(cell).casefold().split()))
    text = re.sub(r"^(group|day|animal|subject)[ _-]*(?=\d+$)", "", text)
    text = re.sub(r"(?<=\d)[ t]0?0:00(:00)?(\.0+)?$", "", text)  # spreadsheets add midnight to a date
    text = re.sub(r"^(\d+)\.0+$", r"\1", text)
    if re.search("[a-z]", text):
        return text
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def event_keys(extra, fallback):
    """(N,) identity of each row's event: group, day, start time, initiator, receiver; never path, row or camera.

    Where start time, day (or date) or the animals have no column, or the time is blank: fallback
    (N,), source and window.
    """
    filled = extra.columns[(extra != "").any()]
    known = [("day", "date"), ("start_time",), ("initiator_id", "initiator"), ("receiver_id", "receiver")]
    names = [csv_tables.find_column(filled, spellings) for spellings in known]
    if None in names:
        return fallback
    levels = extra.reindex(columns=["group", *names], fill_value="").map(plain_level)
    seconds = extra["start_time"].map(event_times.clock_seconds)
    levels["start_time"] = levels["start_time"].where(seconds.isna(), seconds.map("{:g} s".format))
    return np.where(extra["start_time"] == "", fallback, levels.agg(" | ".join, axis=1)).astype(str)


# --------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------

def read_label_map(path):
    """JSON, YAML or CSV -> {spelling: class, or None = left out}; also {class: [spellings]}.

    A class spells itself.
    """
    classes = csv_tables.read_pairs(path, "--label_map", ("spelling", "class"))
    spell_themselves = {name: name for name in classes.values() if name}
    return spell_themselves | {key: name or None for key, name in classes.items()}


def classes_of(spelled, label_map, names):
    """(N,) labels as written -> (C names, N class names; '' = blank, None = left out by the map).

    Without a map the spellings that differ in case are one class, named by the most frequent one.
    Raises UserError that counts the labels that are not in the map, or not among `names`.
    """
    counts = collections.Counter(filter(None, spelled))
    is_mapped = label_map is not None
    if not is_mapped:
        rarest_first = sorted(sorted(counts, reverse=True), key=counts.get)
        label_map = {label: label for label in names or rarest_first}  # the last one of a spelling counts
    known = {label.strip().casefold(): name for label, name in label_map.items()
             if names is None or name in {*names, None}}
    unknown = [
        f"{label!r} ({count} rows)" for label, count in sorted(counts.items()) if label.casefold() not in known]
    if unknown:
        raise common.UserError(
            f"labels without a class: {common.shorten_list(unknown, 30)}; known: {common.shorten_list(known, 30)}. "
            "Write --label_map FILE (JSON, YAML or CSV: spelling -> class, blank = leave out)")
    known[""] = ""
    chosen = [known[label.casefold()] for label in spelled]
    if names is None:
        names = [name for name in dict.fromkeys(known.values()) if name and name in chosen]
        if not is_mapped:
            names.sort()
        csv_tables.refuse_blank_names(names, "labels")
    return names, chosen


# --------------------------------------------------------------------------------------
# Reading manifests
# --------------------------------------------------------------------------------------

def folder_table(root, notes):
    """Class folders root/CLASS/clip.mp4 (or a folder of frames, or .npy) -> DataFrame of path and label, by clip name:
    the folders' order is no order of the rows."""
    import pandas as pd
    videos, others = file_names.find_videos(root)
    unused = [name for name, path in others.items() if "/" in name and video_files.claimed(path).error]
    clips = [name for name in [*videos, *others] if "/" in name and name not in unused]
    if not clips:
        clips = [name for name in file_names.images_by_name(root) if "/" in name]
        notes.append(f"class folders of {len(clips)} pictures: each is a clip of one frame")
    if not clips:
        raise common.UserError(f"{root}: expected class folders with clips (CLASS/clip.mp4), found none")
    if unused:
        notes.append(f"{len(unused)} files in class folders are no videos: {common.shorten_list(unused, 3)}")
    clips.sort(key=lambda name: (name.split("/")[1:], name))
    return pd.DataFrame({"path": clips, "label": [name.split("/")[0] for name in clips]})


def below_header(table):
    """The table from the row that names paths and labels: BORIS writes lines about the observation above it."""
    for place, cells in enumerate(table.to_numpy()):
        if csv_tables.find_column(cells, PATH_COLUMNS) and csv_tables.find_column(cells, LABEL_COLUMNS):
            below = table.iloc[place + 1:].set_axis(cells, axis=1)
            return below.loc[:, cells != ""]
    return table


def paired_states(table, path_column, label_column, notes):
    """Tabular events: the rows START and STOP of one behaviour become one with start_sec and end_sec.

    BORIS writes START, STOP and POINT; The Observer State start, State stop and Point.
    """
    kind = csv_tables.find_column(table, ("status", "behavior_type", "event_type"))
    time = csv_tables.find_column(table, ("time", "time_relative_sf"))
    if kind is None or time is None:
        return table
    states = table[kind].str.upper().str.removeprefix("STATE ")
    known = ("observation_id", "observation", path_column, "subject", label_column)
    same = [name for name in table if name in known or name.startswith("modifier")]
    following = table.assign(state=states).groupby(same)[["state", time]].shift(-1)
    is_start = states == "START"
    is_point = states == "POINT"
    is_pair = is_start & (following["state"] == "STOP")
    is_event = is_pair | is_point
    if not is_event.any() or (states == "STATE").any():  # each row is an event already
        return table
    n_lost = is_start.sum() - is_pair.sum()
    notes.append(f"rows START and STOP became {is_event.sum()} events; {n_lost} without a STOP are left out")
    ends = following[time].mask(is_point, table[time])
    timed = table.assign(start_sec=table[time], end_sec=ends)
    return timed[is_event].drop(columns=[time, kind])


def per_frame_events(table, path, path_column, notes):
    """One row a frame and one column of 0 and 1 a behaviour (DeepEthogram, SimBA, JAABA) -> a row an event.

    Without a column of paths the file is named like its video. Frames without any behaviour become
    events of the class background, unless a column has that name. An event ends where the table
    lacks the next frame, which is up to twice its usual step away: tables of every fifth frame have
    events too. None where the table is none of this kind.
    """
    import pandas as pd
    frame_column = csv_tables.find_column(table, FRAME_COLUMNS)
    names = [name for name in behaviour_columns(table) if name not in (frame_column, path_column)]
    if not names or (frame_column is None and (path_column or len(table) == 1)):  # else a list of videos
        return None
    own_name = re.sub("[ _-]*(labels?|annotations?|targets?|scores?|behaviou?rs?)$", "", path.stem, flags=re.I)
    videos = table[path_column] if path_column else pd.Series(own_name, table.index)
    numbers = range(len(table))
    if frame_column:
        csv_tables.refuse_blank(table, path, frame_column)
        numbers = csv_tables.to_numbers(table[frame_column], f"{path}, column {frame_column}").astype(int)
    frames = pd.Series(numbers, table.index)
    is_on = table[names].isin(["1", "1.0"])
    if "background" not in names:
        is_on["background"] = table[names].isin(["0", "0.0"]).all(axis=1)
    events = []
    for video, rows in is_on.groupby(videos, sort=False):
        steps = frames[rows.index].diff()
        is_after_gap = steps > 2 * steps[steps > 0].median()
        for name, cells in rows.items():
            run = (~cells | is_after_gap).cumsum()[cells]  # the same number in all frames of a run
            for _, own in frames[run.index].groupby(run):
                events.append((own.index[0], video, name, own.iloc[0], own.iloc[-1]))
    notes.append(f"{path.name}: one row a frame, counted from 0; {len(events)} events of {', '.join(is_on)}")
    columns = "line path label start_frame end_frame".split()
    return pd.DataFrame(events, columns=columns).set_index("line").astype(str)


def behaviour_columns(table):
    """Names of the columns of 0 and 1 (-1 or blank: unknown), without the coordinates of a tracked body."""
    names = []
    for name in table:
        cells = set(table[name])
        is_coordinate = re.search("_(x|y|p|probability)$|^probability", name)
        if cells - {"-1", ""} and cells <= {"0", "1", "0.0", "1.0", "-1", ""} and not is_coordinate:
            names.append(name)
    return names


def headless_list(table, root, notes):
    """Lines without a header, path and label, or path, number of frames and label -> DataFrame of path and label.

    None where the first line names no video. notes: to which one is added that it is a list.
    """
    import pandas as pd
    lines = table.to_numpy().tolist()
    if not any(name.startswith("column_") for name in table):  # the first line was taken for a header
        lines.insert(0, list(table.columns))
    whole = [" ".join(cells) for cells in lines]
    parted = [[line.rsplit(None, n_others) for line in whole] for n_others in (1, 2)]  # blanks in the paths
    for rows in [lines, *parted]:
        if set(map(len, rows)) not in ({2}, {3}):
            continue
        first, *n_frames, _ = rows[0]
        if all(map(str.isdigit, n_frames)) and file_names.match_videos([first], root)[0][first]:
            notes.append("no header line: each line is read as a path and, at its end, a label")
            lines_in_file = [1, *table.index][-len(rows):]
            listed = pd.DataFrame(rows, lines_in_file)
            return listed.iloc[:, [0, -1]].set_axis(["path", "label"], axis=1)
    return None


def describe_rows(table, path, root, written, min_event_sec, part="", time_unit=None, notes=None):
    """Rows of one file -> DataFrame: video as written, root, part, row, window (start, end, unit), fault, place.

    place: of the row in its file, 0 to 1, as text: a file sorted by class gives itself away.
    """
    import pandas as pd
    start, end, unit, faults = event_times.event_windows(table, path, min_event_sec, time_unit, notes)
    return pd.DataFrame({
        "video": written,
        "root": root,
        "part": part,
        "row": written if path.is_dir() else [f"{path.name} line {line}" for line in table.index],
        "start": start,
        "end": end,
        "unit": unit,
        "fault": np.where(
            written == "", "its path is blank (of merged cells the first one alone is exported: fill in the rest)",
            faults),
        "place": [f"{row / len(table):.6f}" for row in range(len(table))]})


def read_manifest_file(path, root, asked, need_labels, notes):
    """Manifest, list, BORIS export or label table -> (table of text cells, its columns of paths and of labels).

    asked: the columns of paths and labels that flags name, or None. Raises UserError
    that names what is missing.
    """
    raw = csv_tables.read_table(path)
    said = raw.attrs["notes"]
    if not any(asked) and csv_tables.find_column(raw, LABEL_COLUMNS) is None:
        listed = headless_list(raw, root, said)
        raw = below_header(raw) if listed is None else listed
    notes += [f"{path.name}: {note}" for note in said]
    table = keyed_columns(raw, path)
    source = csv_tables.find_column(table, PATH_COLUMNS, asked[0], f"{path} has no column for --path_column")
    label = csv_tables.find_column(table, LABEL_COLUMNS, asked[1], f"{path} has no column for --label_column")
    lacks_labels = label is None and need_labels
    if lacks_labels:
        events = per_frame_events(table, path, source, notes)
        if events is not None:
            return events, "path", "label"
    if source is None or lacks_labels:
        raise common.UserError(
            f"{path}: column of paths: {source or 'none, name it with --path_column'}; column of labels: "
            f"{label or 'none, name it with --label_column'} (found: {common.shorten_list(table, 40)})")
    if label:
        table = paired_states(table, source, label, notes)
    return table, source, label


def manifest_files(path):
    """The label tables of a folder that holds no folders; else the manifest, or the folder of class folders, itself."""
    visible = list(path.glob("[!.]*"))
    if any(each.is_dir() for each in visible):
        return [path]
    return sorted(each for each in visible if each.suffix.lower() in (".csv", ".tsv")) or [path]


def read_manifest(part, path, video_root, min_event_sec, need_labels, asked, time_unit, notes):
    """One manifest file or folder of class folders -> (rows of describe_rows with label, DataFrame of other columns).

    Raises UserError without a column of paths.
    """
    if path.is_dir():
        root = video_root or path
        table = folder_table(path, notes)
        source = "path"
        label = "label"
    else:
        root = video_root or path.parent
        table, source, label = read_manifest_file(path, root, asked, need_labels, notes)
    written = table[source]
    if "video_filename" in table:
        written = written.mask(written == "", table["video_filename"])
    event_times.check_times_are_used(table, path, notes)
    rows = describe_rows(table, path, root, written, min_event_sec, part, time_unit, notes)
    rows["label"] = "" if label is None else table[label]
    check_whole_clips(rows, table, path)
    used = {source, label, *(column.name for column in event_times.time_columns(table))}
    return rows, table.drop(columns=used, errors="ignore")


def check_whole_clips(rows, table, path):
    """UserError where rows of one video have different labels and no times."""
    whole = rows[rows["start"].isna() & (rows["label"] != "") & (rows["video"] != "")]
    n_labels = whole.groupby("video")["label"].nunique()
    several = n_labels.index[n_labels > 1]
    if len(several):
        raise common.UserError(
            f"{path}: {len(several)} videos stand in rows with different labels and without times, such as "
            f"{several[0]}; found columns {common.shorten_list(table, 40)}. Name the times of the "
            "events start_sec and end_sec, or start_frame and end_frame")


def refuse_several_files(rows, extra):
    """UserError where a BORIS observation is longer than its files: its times count on from one to the next.

    60|60 are two players that run at once, of which the first names the files; 30;30
    are two files of one player.
    """
    import pandas as pd
    length = csv_tables.find_column(extra, ("total_length", "media_duration_s"))
    if length is None or "observation_id" not in extra:
        return
    first_player = extra[length].str.replace(",", ".").str.partition("|")[0]  # 60,000 of Excel is 60
    of_files = first_player.str.split(";").explode()
    lines = rows["row"].str.replace("(.*) line (.*)", r"\2 of \1", regex=True)[of_files.index]
    seconds = csv_tables.to_numbers(of_files.set_axis(lines), f"column {length}")
    totals = pd.Series(seconds).groupby(of_files.index).sum(min_count=1)
    is_there = [bool(source) and source.exists() for source in rows["source"]]
    known = rows.assign(total=totals)[is_there]
    for name, own in known.groupby(extra["observation_id"].replace("", np.nan)):  # blank: of another table
        files = own[["source", "total"]].drop_duplicates()
        first, total = files.iloc[0]
        is_one_of_unknown_length = len(files) == 1 and (math.isnan(total) or not video_files.claimed(first).header_sec)
        if not is_one_of_unknown_length and not any(map(has_length, files["source"], files["total"])):
            raise common.UserError(
                f"observation {name}: {length} {extra[length][own.index[0]] or '(blank)'}, expected the seconds of one "
                f"of its {len(files)} files (such as {first}). Where it goes over several, export "
                "each as an observation of its own; else write its length")


def has_length(video, seconds):
    """True for a video that is as long, by its header or, since headers lie, by its frames."""
    return (seconds <= 1.02 * video_files.claimed(video).header_sec
            or seconds <= 1.02 * video_files.probe(video).duration_sec)


def read_events(manifests, video_root=None, label_map=None, min_event_sec=1.0, group_column=None, names=None,
                need_labels=True, path_column=None, label_column=None, time_unit=None, row_filter=None, **finding):
    """{part: CSV manifest or folder of class folders} -> EventTable for --task classify.

    video_root: where the paths are looked for (default: beside each manifest); names: the classes
    of a trained model; need_labels False: rows without a label stay, label -1. Without group_column
    a column `group` is the group. path_column, label_column, time_unit: for columns whose names do
    not say it. row_filter: the text of --filter. finding: options of find_sources. Raises
    UserError: see the functions above; more than the share max_missing of the videos is not there.
    """
    import pandas as pd
    notes = []
    asked = (path_column, label_column)
    found = [
        read_manifest(part, file, video_root, min_event_sec, need_labels, asked, time_unit, notes)
        for part, path in manifests.items() for file in manifest_files(path)]
    rows, extra = [pd.concat(tables, ignore_index=True) for tables in zip(*found)]
    extra = extra.fillna("")
    where = f"{common.shorten_list(manifests.values())} has no column for --group_column"
    group = csv_tables.find_column(extra, ["group"], group_column, where)
    rows["source"] = find_sources(rows, notes, video_root is None, **finding)
    refuse_several_files(rows, extra)
    known = label_map and read_label_map(label_map)
    names, classes = classes_of(rows["label"], known, names)
    reasons = {None: "left out by --label_map", "": "no label" if need_labels else ""}
    rows["reason"] = [reasons.get(name, "") for name in classes]
    rows["label"] = pd.Index(names).get_indexer(classes)  # -1 = none
    return merge_repeats(build_table(rows, extra, names, notes, group, group_column, row_filter))


def read_groups(cells, group_column, lines, notes):
    """(N,) groups in one spelling, or None.

    Blank ones: a UserError where group_column names them, else no groups.
    """
    groups = cells.map(plain_level).to_numpy(str)
    blank = lines[groups == ""]
    if not len(blank):
        return groups
    if group_column:
        raise common.UserError(f"--group_column {cells.name} is blank in {common.shorten_list(blank)}: fill")
    notes.append(f"column {cells.name} is blank in {len(blank)} rows and names no groups")


def find_sources(rows, notes, is_open, max_missing=0.05, need_files=True, exact_names=False):
    """N paths of the rows' videos, None where there is none. Raises UserError above max_missing.

    is_open: no --video_root was given, so that an absolute path may also name a video
    elsewhere. need_files False: a missing video has the path at which it would lie.
    exact_names: as match_images has it.
    """
    found = {}
    for root, names in rows[rows["video"] != ""].groupby("root")["video"]:
        hits, matching = file_names.match_videos(names, root, exact_names)
        notes += matching
        for name, path in hits.items():
            if path is None and is_open and os.path.isabs(name) and os.path.exists(name):
                path = Path(name)
            found[root, name] = path
    missing = [name for (_, name), path in found.items() if path is None]
    counted = f"{len(missing)} of {len(found)} videos"
    if missing and not need_files:
        notes.append(f"{counted} are not there: their bytes, frames and the ends of their windows are not checked")
        for root, name in found:  # never a path outside the root
            found[root, name] = found[root, name] or root / file_names.without_root(name)
    elif len(missing) > max_missing * len(found):
        raise common.UserError(
            f"{counted} are not below {common.shorten_list(set(rows['root']))}: {common.shorten_list(missing)}; "
            "correct --video_root, or allow a larger share: --max_missing")
    elif missing:
        notes.append(f"{counted} are not there: {common.shorten_list(missing)}")
    return [found.get(key) for key in zip(rows["root"], rows["video"])]


def build_table(rows, extra, names, notes, group, group_column, row_filter, target=None):
    """N rows of describe_rows, and what is known of each -> EventTable of those without a reason to skip.

    rows: also with source, reason (to skip it) and, for classes, label as int. extra: the other
    columns; group: the one of the groups, or None; group_column: that which a flag asks for;
    row_filter: the text of --filter. Clip ids do not depend on the order of the rows. Raises
    UserError where no row is left.
    """
    rows = rows.assign(reason=np.select(
        [rows["fault"] != "", rows["source"].isna()], [rows["fault"], "no such video or folder"], rows["reason"]))
    keep = (rows["reason"] == "").to_numpy()
    skipped = rows.loc[~keep, ["row", "video", "reason"]].to_dict("records")
    if not keep.any():
        first = [f"{row['row']}: {row['reason']}" for row in skipped]
        raise common.UserError(f"no usable row of {len(rows)}: {common.shorten_list(first, 3)}")
    rows = rows[keep]
    extra = with_own_columns(extra[keep].assign(row_order=rows["place"]).reset_index(drop=True))
    videos = paths_below_root(rows["source"], rows["root"])
    clip_ids = np.array(list(map(clip_name, videos, rows["start"], rows["end"], rows["unit"])))
    table = EventTable(
        names=names,
        clip_ids=clip_ids,
        lines=rows["row"].to_numpy(str),
        sources=rows["source"].to_numpy(),
        windows=rows[["start", "end"]].to_numpy(float),
        unit=rows["unit"].to_numpy(str),
        events=event_keys(extra, clip_ids),
        videos=videos,
        parts=rows["part"].to_numpy(str),
        repeats=np.ones(len(rows), np.int64),
        extra=extra,
        label=rows["label"].to_numpy() if "label" in rows else None,
        target=None if target is None else target[keep],
        groups=read_groups(extra[group], group_column, rows["row"], notes) if group else None,
        skipped=skipped,
        notes=notes)
    return table.take(filter_rows(table, row_filter)) if row_filter else table


def paths_below_root(sources, roots):
    """(N,) text: each source below the folder that all roots share."""
    try:
        base = os.path.commonpath([os.path.realpath(root) for root in set(roots)])
    except ValueError:  # two drives of Windows
        base = ""
    inside = os.path.join(base, "")
    return np.array([Path(os.path.realpath(source).removeprefix(inside)).as_posix() for source in sources])


def clip_name(video, start, end, unit):
    """'cam 8/a.mp4@10-14', in frames 'cam 8/a.mp4@10-14f'; the video's name for a whole clip."""
    if math.isnan(start):
        return video
    return f"{video}@{start:.10g}-{end:.10g}{'f' if unit == 'frame' else ''}"


def with_own_columns(extra):
    """The other columns, and what is derived from them: the pair of animals, the hour."""
    if "initiator_id" in extra and "receiver_id" in extra and "pair" not in extra:
        animals = extra[["initiator_id", "receiver_id"]].map(plain_level)
        extra["pair"] = animals.agg(" > ".join, axis=1)
    if "start_time" in extra and "hour" not in extra:
        hours = extra["start_time"].map(event_times.clock_seconds) // 3600
        extra["hour"] = hours.map("{:.0f}".format).replace("nan", "")
    return extra


def merge_repeats(table):
    """Rows of one part with the same clip, event and label become one that counts them; then clip_ids are unique."""
    keys = zip(table.clip_ids, table.parts, table.events, table.label)
    same = common.rows_by_key(keys).values()
    kept = table.take([rows[0] for rows in same])
    kept.repeats = np.array([len(rows) for rows in same])
    kept.clip_ids = unique_ids(kept)
    if len(kept) < len(table):
        kept.notes.append(
            f"{len(table) - len(kept)} rows repeat another one, of {(kept.repeats > 1).sum()} "
            "events: each event is counted once in every evaluation")
    return kept


def unique_ids(table):
    """(N,) clip ids; where one clip stands in several parts, or holds several events or classes, these are added."""
    import pandas as pd
    ids = pd.Series(table.clip_ids)
    events = np.where(table.events == table.clip_ids, "", table.events)
    labels = np.array([*table.names, ""])[table.label]  # -1: the last one
    for details in (table.parts, events, labels):
        is_shared = ids.duplicated(keep=False) & (details != "")
        ids = ids.mask(is_shared, ids + " [" + details + "]")
    return ids.to_numpy(str)


# --------------------------------------------------------------------------------------
# Units of a split, and choosing rows by their columns
# --------------------------------------------------------------------------------------

def split_keys(table, split_by):
    """(N,) text units that a split must keep whole: events, videos with their events, or groups with all of both.

    split_by None: the coarsest that there is more than one of. Units that share an
    event or a video are one.
    """
    levels = {"group": table.groups, "video": table.videos, "event": table.events}
    names = [name for name, units in levels.items() if units is not None]
    if split_by and split_by not in names:
        raise common.UserError(
            f"--split_by {split_by} needs --group_column (found: {common.shorten_list(table.extra, 40)})")
    for name in [split_by] if split_by else names:
        finer = names[names.index(name):]
        units = [f"{name} {unit}" for unit in connected([levels[other] for other in finer])]
        if len(set(units)) > 1:
            break
    return np.array(units)


def connected(columns):
    """Columns of (N,) text -> (N,) text: rows linked by an equal value in any column get the same, smallest name."""
    import pandas as pd
    units = pd.Series(columns[0])
    while True:
        before = units
        for column in columns:
            units = units.groupby(column).transform("min")
        if units.equals(before):
            return units.tolist()


def column_of(table, name, flag):
    """(N,) text of a column of the table by name in any spelling.

    Raises UserError where there is none.
    """
    targets = {} if table.target is None else dict(zip(table.names, table.target.T))
    [key] = csv_tables.pick_columns([name], [*targets, *table.extra], f"{flag}: no column")
    if key in table.extra:
        return table.extra[key].to_numpy(str)
    return np.where(np.isnan(targets[key]), "", targets[key].astype(str))


def filter_rows(table, text):
    """--filter 'moment==M2 and age>=3' -> (N,) bool, True = kept.

    Text is compared in any case, < and > as numbers.

    Raises UserError for what is not COLUMN ==, !=, <, <=, > or >= VALUE joined by
    `and`, or keeps no row.
    """
    keep = np.ones(len(table), bool)
    for part in re.split(r"\s+and\s+", text):
        match = re.fullmatch(r"\s*([^=!<>]+?)\s*(==|!=|<=|>=|<|>)\s*[\"']?(.+?)[\"']?\s*", part)
        if not match:
            raise common.UserError(
                f"--filter expects COLUMN==VALUE (or != < <= > >=) joined by `and`, found {part!r}")
        name, relation, value = match.groups()
        column = column_of(table, name, "--filter")
        if relation in common.RELATIONS:
            numbers = csv_tables.to_numbers(column, f"--filter {part}")
            limit = csv_tables.to_numbers([value], "--filter")
            keep &= common.RELATIONS[relation](numbers, limit)
        else:
            keep &= is_level(column, value) == (relation == "==")
    if not keep.any():
        raise common.UserError(f"--filter {text!r} keeps none of {len(table)} rows")
    return keep


def is_level(column, level):
    """(N,) bool, True = the cell names this level in any spelling."""
    return np.array(list(map(plain_level, column))) == plain_level(level)


def rows_of_level(table, text, flag):
    """'moment:M2=2.5' -> ((N,) bool, True = moment M2 in any spelling; '2.5').

    Raises UserError where no row has it.
    """
    match = re.fullmatch(r"\s*([^:=]+?)\s*:\s*(.+?)\s*=\s*([^=]+?)\s*", text)
    if not match:
        raise common.UserError(f"{flag} expects COLUMN:LEVEL=VALUE as in moment:M2=2.5, found {text!r}")
    column, level, value = match.groups()
    cells = column_of(table, column, flag)
    mask = is_level(cells, level)
    if not mask.any():
        raise common.UserError(f"{flag}: no row has {column} {level!r} "
                               f"(found: {common.shorten_list(sorted(set(cells)), 30)})")
    return mask, value


def sample_weights(table, flags):
    """--sample_weight moment:M2=2.5 (several multiply) -> (N,) weights of the rows in the loss."""
    weights = np.ones(len(table))
    for text in flags:
        rows, value = rows_of_level(table, text, "--sample_weight")
        [factor] = csv_tables.to_numbers([value], f"--sample_weight {text}")
        if not factor >= 0:
            raise common.UserError(f"--sample_weight {text}: expected a weight of 0 or more, found {value}")
        weights[rows] *= factor
    return weights


def augment_presets(table, flags, default):
    """--augment_for moment:M2=heavy (the last that fits counts) -> (N,) preset of each row."""
    presets = np.full(len(table), default, dtype=object)
    for text in flags:
        rows, preset = rows_of_level(table, text, "--augment_for")
        if preset not in common.AUGMENTATIONS:
            raise common.UserError(f"--augment_for {text}: expected one of "
                                   f"{', '.join(common.AUGMENTATIONS)}, found {preset!r}")
        presets[rows] = preset
    return presets


def group_mask(table, text):
    """--test_groups '14,17' -> (N,) bool, True = a row of these groups.

    UserError: groups that are not there.
    """
    if table.groups is None:
        raise common.UserError(f"--test_groups {text} needs --group_column")
    wanted = [plain_level(name) for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in table.groups]
    if unknown or not wanted:
        raise common.UserError(
            f"--test_groups {text}: no such groups: {common.shorten_list(unknown)} "
            f"(found: {common.shorten_list(sorted(set(table.groups)), 40)})")
    return np.isin(table.groups, wanted)


def strata_of(table):
    """(N,) label, or mean score in sd, which splits are stratified on."""
    if table.target is None:
        return table.label.astype(str)
    spread = common.sd_without_nan(table.target).clip(1e-9)
    return common.mean_without_nan(table.target / spread)
