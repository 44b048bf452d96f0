"""What the parts of a split of events share: events, videos, groups, windows and copies of files.

Letters: N rows. Units: seconds.
"""
import collections
import dataclasses
import math
import os

import numpy as np

import common
from evidence import confounding, splitting
from readers import csv_tables, video_files

TELLS_ALL = 0.95  # AUC or R2 of a column from which it leaves a model nothing to show
SAME_EVENT = ("events", "exact_duplicates")  # leaks that stop a run which keeps no groups apart


def content_keys(sources):
    """(N,) text, equal for sources of equal bytes; a source that is not there is like no other.

    Files of equal size are read for their SHA-256; of others the size says enough, so that an audit
    does not read whole recordings.
    """
    files = {source: video_files.files_of(source) for source in set(sources) if os.path.exists(source)}
    sizes = {source: str([os.path.getsize(file) for file in inside]) for source, inside in files.items()}
    n_sources = collections.Counter(sizes.values())
    keys = {source: f"not there: {source}" for source in sources} | sizes
    for source, size in sizes.items():
        if n_sources[size] > 1:
            keys[source] += video_files.sha_of(files[source])
    return np.array([keys[source] for source in sources])


def window_pairs(table, file_keys, gap_sec):
    """Rows of one video -> {overlapping_windows, near_windows: lists of (i, j)}.

    Near windows do not overlap and are closer than gap_sec. Pairs with the same window are exact
    duplicates and in neither; a whole clip overlaps with each of its windows.
    """
    start, end = table.windows.T
    is_whole = np.isnan(start)
    start = np.where(is_whole, -np.inf, start)
    end = np.where(is_whole, np.inf, end)
    by_start = np.lexsort((table.clip_ids, end, start))
    overlapping = []
    near = []
    for places in common.rows_by_key(file_keys[by_start]).values():
        rows = by_start[places]
        for place, i in enumerate(rows):
            for j in rows[place + 1:]:
                gap = start[j] - end[i]
                if gap >= gap_sec:
                    break  # those that start later are farther away
                is_same = start[j] == start[i] and end[j] == end[i]
                is_same_unit = is_whole[i] or table.unit[j] == table.unit[i]  # whole clips come first
                if is_same or not is_same_unit:
                    continue
                if gap < 0:
                    overlapping.append((i, j))
                elif table.unit[i] == "sec":
                    near.append((i, j))
    return {"overlapping_windows": overlapping, "near_windows": near}


def audit_table(table, split, audits=None, positive=None, gap_sec=30.0):
    """The leakage report of events, split {part: rows}, with all that their times and files tell.

    Besides splitting.leakage_report: parts, seen_events, priors, and notes that say it in text.
    audits: N video_files.ClipAudit of a run, which judges the priors itself, on its own folds;
    without them file and window say which clips are alike. positive: class whose priors are judged
    (default: the rarest).
    """
    rows = np.concatenate([own[np.argsort(table.clip_ids[own])] for own in split.values()])
    parts = np.repeat(list(split), [len(own) for own in split.values()])
    table = dataclasses.replace(table.take(rows), parts=parts)
    split = {part: np.flatnonzero(parts == part) for part in split if part in parts}
    if audits:
        audits = [audits[row] for row in rows]
        file_keys = np.array([found.file_sha for found in audits])
        contents = [found.pixel_sha for found in audits]
        phash = [found.phash for found in audits]
    else:
        file_keys = content_keys(table.sources)
        # equal where the same pixels are meant
        contents = list(map(str, zip(file_keys, np.round(table.windows, 3).tolist(), table.unit)))
        phash = None
    values = {
        "groups": table.groups,
        "events": table.events,
        "videos": table.videos,
        "renamed_copies": _renamed_copies(table, file_keys)}
    leakage = splitting.leakage_report(
        split, table.clip_ids, contents, phash, values, window_pairs(table, file_keys, gap_sec))
    report = {
        "parts": {part: describe_part(table.take(held)) for part, held in split.items()},
        **leakage,
        "seen_events": seen_events(table)}
    notes = [_part_note(part, held) for part, held in report["parts"].items()]
    for part, seen in report["seen_events"].items():
        notes.append(f"{seen['count']} of {seen['of']} {part} events are in {seen['in']}")
    if not audits:
        report["priors"] = confounding.no_pixel_priors(table, positive)
        notes += map(prior_note, report["priors"])
        if not report["priors"]:
            notes.append("no-pixel priors: too few labelled clips on both sides to judge any")
    return report | {"notes": notes}


def record_split(run, study, split):
    """splitting.record_split of a run with a train_video.Study; returns its alarms.

    Where another column than that of the groups is to be kept whole, what repeats
    stands on both sides on purpose.
    """
    args = run.args
    table = study.table
    report = audit_table(table, split, study.audits, gap_sec=args.gap_sec)
    keeps_groups = args.split_by in (None, "group")
    columns = confounding.prior_levels(table) if keeps_groups else {}
    columns.pop("video", None)  # which is no column of the manifest
    groups = table.groups if args.group_column else None
    has_several = groups is not None and len(set(groups)) > 1  # a study of one animal has no other to keep apart
    stopping = splitting.STOPPING_LEAKS if keeps_groups and has_several else SAME_EVENT
    alarms = splitting.record_split(run, split, table.clip_ids, report, stopping, columns, groups)
    if groups is not None and not has_several:
        alarms.append(
            f"--group_column {args.group_column} has one value, {groups[0]}, so nothing is known of others "
            "and there is no interval. Where there are several, name the column that tells them apart")
    parted = splitting.in_several_parts(table.videos, split)
    if parted:
        alarms.append(
            f"{len(parted)} of {len(set(table.videos))} videos stand on two sides of the split, such as {parted[0]}, "
            "so nothing is known of new ones. --split_by video keeps each on one side")
    return alarms


def audit_videos(table, fps, predictions=None, **options):
    """audit_table of the parts of a table, with what a whole pass over each video finds, and predictions.csv.

    Besides audit_table: windows_past_the_end, probability_clusters (with predictions), skipped, unreadable,
    damaged. options: of audit_table.
    """
    infos = {source: video_files.probe(source, fps) for source in dict.fromkeys(table.sources)}
    split = {part or "all": np.flatnonzero(table.parts == part) for part in (*splitting.PARTS, "")}
    report = audit_table(table, split, **options)
    notes = report["notes"]
    durations = {source: info.duration_sec for source, info in infos.items() if not info.error}
    late = past_the_end(table, durations)
    report["windows_past_the_end"] = late
    notes.append(
        f"windows: {late['past']['count']} start past the end of their file "
        f"({common.shorten_list(late['past']['examples'], 3) or 'none'}), {late['cut']['count']} are cut by it; "
        f"{late['unknown_duration']} files of unknown length")
    if predictions:
        clusters = probability_clusters(predictions)
        report["probability_clusters"] = clusters
        notes.append(
            f"probabilities: {clusters['rows_in_clusters']} of {clusters['rows']} rows "
            f"share theirs with two or more others ({clusters['values']} values)")
    report["skipped"] = table.skipped
    notes += [f"note: {note}" for note in table.notes]
    for what, field in (("unreadable", "error"), ("damaged", "damage")):
        report[what] = {str(source): getattr(info, field) for source, info in infos.items() if getattr(info, field)}
        lines = [f"{path}: {reason}" for path, reason in report[what].items()]
        if lines:
            notes.append(f"{what}, {len(lines)} of {len(infos)} videos: {common.shorten_list(lines)}")
    return report


def seen_events(table):
    """{part: count of its events that are in a part before it, of how many, and in which parts}."""
    seen = {}
    for place, part in enumerate(splitting.PARTS):
        before = splitting.PARTS[:place]
        known = set(table.events[np.isin(table.parts, before)])
        events = set(table.events[table.parts == part])
        if known and events:
            seen[part] = {"count": len(events & known), "of": len(events), "in": " or ".join(before)}
    return seen


def _renamed_copies(table, file_keys):
    """(N,) text: the videos with the same content, '' where there is one."""
    names = {key: sorted(set(table.videos[rows]))
             for key, rows in common.rows_by_key(file_keys).items()}
    return [" = ".join(names[key]) if len(names[key]) > 1 else "" for key in file_keys]


def count_classes(table):
    """{class: how many rows are of it}; {} where the names are those of scores."""
    if table.label is None:
        return {}
    return {name: (table.label == c).sum() for c, name in enumerate(table.names)}


def describe_part(table):
    """Rows, repeats, events per video, and videos with one class (pure) or several (mixed)."""
    import pandas as pd

    shown = pd.DataFrame({"video": table.videos, "event": table.events, "label": table.label})
    of_videos = shown.groupby("video").nunique()  # 0 labels without classes
    n_labels = shown.groupby("event")["label"].nunique()
    return {
        "rows": len(table),
        "repeated_rows": (table.repeats - 1).sum(),
        "videos": len(of_videos),
        "events": len(n_labels),
        "groups": None if table.groups is None else len(set(table.groups)),
        "classes": count_classes(table),
        "events_per_video": of_videos["event"].agg(["min", "median", "max"]).to_dict(),
        "pure_videos": (of_videos["label"] == 1).sum(),
        "mixed_videos": (of_videos["label"] > 1).sum(),
        "events_with_two_labels": splitting.found_items(n_labels.index[n_labels > 1])}


def past_the_end(table, durations):
    """Windows that start after their file has ended, and those that it cuts.

    durations: {source: seconds}.
    """
    seconds = np.array([durations.get(source, math.nan) for source in table.sources])
    start, end = table.windows.T
    is_seconds = table.unit == "sec"
    past = is_seconds & (start >= seconds)
    cut = is_seconds & ~past & (end > seconds + 0.1)
    return {
        "past": splitting.found_items(table.clip_ids[past]),
        "cut": splitting.found_items(table.clip_ids[cut]),
        "unknown_duration": np.isnan(seconds).sum()}


def probability_clusters(path):
    """predictions.csv -> how many rows share their probabilities with two or more others."""
    rows = csv_tables.read_table(path).filter(regex="^prob_")
    if rows.empty:
        raise common.UserError(f"--predictions {path}: expected rows with columns prob_CLASS, found none")
    for name in rows:
        rows[name] = csv_tables.to_numbers(rows[name], f"{path}, column {name}")
    counts = rows.round(6).value_counts()  # the most frequent first
    clusters = counts[counts >= 3]
    return {
        "rows": len(rows),
        "distinct": len(counts),
        "values": len(clusters),
        "rows_in_clusters": clusters.sum(),
        "examples": clusters.head().reset_index(name="count").to_dict("records")}


def _part_note(part, held):
    classes = ", ".join(f"{name} {count}" for name, count in held["classes"].items())
    per_video = held["events_per_video"]
    return (
        f"{part}: {held['rows']} clips ({held['repeated_rows']} rows more repeat them), {held['events']} events "
        f"({held['events_with_two_labels']['count']} with two labels), {held['videos']} videos with "
        f"{per_video['min']:g} to {per_video['max']:g} events (median {per_video['median']:g}), "
        f"{held['pure_videos']} with one class, {held['mixed_videos']} mixed; {classes or 'no classes'}")


def prior_note(row):
    """A line on what one column predicts without a pixel; a WARNING where that leaves a model nothing to show."""
    metric = "auc" if "auc" in row else "r2"
    interval = f"{row['low']:.3f}, {row['high']:.3f}"
    if math.isnan(row["low"]):
        interval = f"no interval over {row['subjects']} groups"
    text = (
        f"no-pixel prior on {row['name']} across {row['across']}: {metric.upper()} of "
        f"{row['what']} {row[metric]:.3f} [{interval}]")
    if row[metric] >= TELLS_ALL and row["name"] != "row order":
        return (f"WARNING: {text}: this column tells it without a look at the clips, and a model "
                "may learn no more than that")
    return text
