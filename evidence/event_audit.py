"""What the parts of a split share: events, videos, groups, windows and copies of files.

Units: seconds.
"""
import collections
import dataclasses
import itertools
import math
import os

import numpy as np

import common
from evidence import confounding
from readers import csv_tables, event_tables, video_files


def content_keys(sources):
    """{path: text} equal for sources of equal bytes: sha256 where the sizes agree, read once; else the size."""
    files = {source: video_files.files_of(source) for source in dict.fromkeys(sources)}
    sizes = {source: tuple(os.path.getsize(file) for file in inside) for source, inside in files.items()}
    real = {source: os.path.realpath(source) for source in files}
    twins = collections.Counter(sizes[path] for path in {real[source]: source for source in files}.values())
    return {source: video_files.sha_of(files[source] if twins[sizes[source]] > 1 else (), sizes[source]) for source in files}


def clip_contents(table, keys=None):
    """(N,) text, equal where the same pixels are meant: content of the file and window."""
    keys = content_keys(table.sources) if keys is None else keys
    spans = [tuple(np.round(window, 3).tolist()) + (unit,) for window, unit in zip(table.windows, table.unit)]
    return np.array([f"{keys[source]} {span}" for source, span in zip(table.sources, spans)], dtype=str)


def window_pairs(table, keys, gap_sec=30.0):
    """Rows of one video -> (pairs that overlap in time, pairs that are closer than gap_sec): lists of (i, j).

    Pairs with the same window are exact duplicates and in neither; a whole clip overlaps with each of its windows.
    """
    rows_of = collections.defaultdict(list)
    for row, source in enumerate(table.sources):
        rows_of[keys[source]].append(row)
    bounds = np.where(np.isnan(table.windows), [-np.inf, np.inf], table.windows)
    unit = np.where(np.isnan(table.windows[:, 0]), "any", table.unit)
    reach = bounds[:, 1] + np.where(unit == "frame", 0, gap_sec)
    pairs = []
    for rows in rows_of.values():
        rows = sorted(rows, key=lambda row: (*bounds[row], table.clip_ids[row]))
        pairs += [(i, j) for a, i in enumerate(rows)
                  for j in itertools.takewhile(lambda j: bounds[j, 0] < reach[i], rows[a + 1:])
                  if not np.array_equal(bounds[i], bounds[j]) and (unit[i] == unit[j] or "any" in unit[[i, j]])]
    does_overlap = [bounds[j, 0] < bounds[i, 1] for i, j in pairs]
    return list(itertools.compress(pairs, does_overlap)), [pair for pair, hit in zip(pairs, does_overlap) if not hit]


def join_tables(tables):
    """{part: Table of the same names} -> one Table whose parts are the keys."""
    import pandas as pd
    every = [dataclasses.replace(table, parts=np.full(len(table), part)) for part, table in tables.items()]
    if any(table.names != every[0].names for table in every):
        raise common.UserError(f"the parts name different classes: {[table.names for table in every]}; give one "
                               "--label_map")
    fields = {name: np.concatenate([getattr(table, name) for table in every])
              for name in ("clip_ids", "windows", "unit", "events", "videos", "parts", "repeats", "label", "target",
                           "groups") if all(getattr(table, name) is not None for table in every)}
    extra = pd.concat([table.extra for table in every], ignore_index=True).fillna("")
    return event_tables.Table(every[0].names, sources=[source for table in every for source in table.sources], extra=extra,
                 skipped=[row for table in every for row in table.skipped], **fields)


def audit_tables(tables, clip_audit=None, durations=None, predictions=None, positive=None, gap_sec=30.0):
    """{part: Table} -> dict of counts, whatever the order of the rows: parts, within, between, windows_past_the_end,
    probability_clusters (the two where they can be judged), priors.

    clip_audit: objects with path and duration_sec, or durations: {source path: seconds}; predictions: predictions.csv;
    positive: the class whose priors are judged (default: the rarest one).
    """
    durations = durations if clip_audit is None else {str(found.path): found.duration_sec for found in clip_audit}
    table = join_tables({part: table for part, table in tables.items() if len(table)})
    order = np.lexsort((table.clip_ids, table.parts))
    table, keys = table.take(order), content_keys(table.sources)
    contents, pairs = clip_contents(table, keys), window_pairs(table, keys, gap_sec)
    parts = [part for part in tables if len(tables[part])]
    report = {"parts": {part: describe_part(table.take(table.parts == part)) for part in parts},
              "within": {part: within_part(table, part, contents, pairs) for part in parts},
              "between": {f"{a}-{b}": between_parts(table, a, b, keys, contents, pairs)
                          for a, b in itertools.combinations(parts, 2)}}
    if durations is not None:
        report["windows_past_the_end"] = past_the_end(table, durations)
    if predictions is not None:
        report["probability_clusters"] = probability_clusters(predictions)
    report["priors"] = confounding.no_pixel_priors(table, positive)
    return report


def describe_part(table):
    """Rows, repeats, events per video, and videos with one class (pure) or several (mixed) of one part."""
    events_of, classes_of_video = collections.defaultdict(set), collections.defaultdict(set)
    for row, video in enumerate(table.videos):
        events_of[video].add(table.events[row])
        if table.label is not None and table.label[row] >= 0:
            classes_of_video[video].add(table.names[table.label[row]])
    per_video = sorted(len(events) for events in events_of.values())
    counts = {} if table.label is None else {name: int((table.label == c).sum()) for c, name in enumerate(table.names)}
    return {"rows": len(table), "repeated_rows": int((table.repeats - 1).sum()), "videos": len(events_of),
            "events": len(set(table.events)), "groups": None if table.groups is None else len(set(table.groups)),
            "classes": counts, "unlabelled": 0 if table.label is None else int((table.label < 0).sum()),
            "events_per_video": {"min": per_video[0], "median": float(np.median(per_video)), "max": per_video[-1]},
            "pure_videos": sum(len(found) == 1 for found in classes_of_video.values()),
            "mixed_videos": sum(len(found) > 1 for found in classes_of_video.values())}


def found_items(items):
    """Distinct texts -> {count, examples: the first five}."""
    items = sorted(set(items))
    return {"count": len(items), "examples": items[:5]}


def within_part(table, part, contents, pairs):
    """What one part holds twice: exact duplicates beyond the first, overlapping windows, events with two labels."""
    rows = np.flatnonzero(table.parts == part)
    counts, labels = collections.Counter(contents[rows]), collections.defaultdict(set)
    for row in rows if table.label is not None else ():
        labels[table.events[row]].add(table.label[row])
    inside = [(i, j) for i, j in pairs[0] if table.parts[i] == table.parts[j] == part]
    return {"exact_duplicates": {"count": len(rows) - len(counts), "examples": sorted(
                table.clip_ids[row] for row in rows if counts[contents[row]] > 1)[:5]},
            "overlapping_windows": found_items(pair_text(table, pair) for pair in inside),
            "events_with_two_labels": found_items(event for event, found in labels.items() if len(found) > 1)}


def pair_text(table, pair):
    """Names of two rows in order, for an example."""
    return " = ".join(sorted(table.clip_ids[row] for row in pair))


def between_parts(table, a, b, keys, contents, pairs):
    """What two parts share: distinct videos, groups, events and contents; pairs of windows that overlap or are near.

    renamed_copies: equal files under different paths. shared_events_other_camera: of the shared events those that no
    two rows show in the same video. shared_rows: rows of the second part whose event is in the first.
    """
    in_a, in_b = table.parts == a, table.parts == b

    def shared(values):
        return sorted(set(np.asarray(values, str)[in_a]) & set(np.asarray(values, str)[in_b]))
    file_of = np.array([keys[source] for source in table.sources], dtype=str)
    videos, events = shared(table.videos), shared(table.events)
    same_video = {event.split("\0")[0] for event in shared(np.char.add(np.char.add(table.events, "\0"), table.videos))}
    seen = set(file_of[np.isin(table.videos, videos)])
    copies = [" = ".join(sorted(set(table.videos[file_of == key]))) for key in shared(file_of) if key not in seen]
    duplicates = [" = ".join(sorted(table.clip_ids[(contents == key) & (in_a | in_b)])) for key in shared(contents)]
    overlapping, near = ([pair_text(table, pair) for pair in found if {*table.parts[list(pair)]} == {a, b}]
                         for found in pairs)
    return {"shared_videos": found_items(videos), "renamed_copies": found_items(copies),
            "shared_groups": None if table.groups is None else found_items(shared(table.groups)),
            "shared_events": found_items(events),
            "shared_events_other_camera": found_items(event for event in events if event not in same_video),
            "shared_rows": {"count": int(np.isin(table.events[in_b], events).sum()), "of": int(in_b.sum())},
            "exact_duplicates": found_items(duplicates), "overlapping_windows": found_items(overlapping),
            "near_windows": found_items(near)}


def past_the_end(table, durations, slack_sec=0.1):
    """Windows that start after their file has ended, and those that it cuts; durations: {source path: seconds}."""
    known = {str(path): seconds for path, seconds in durations.items()}
    seconds = np.array([known.get(str(source), math.nan) for source in table.sources])
    is_seconds = table.unit == "sec"
    past = is_seconds & (table.windows[:, 0] >= seconds)
    cut = is_seconds & ~past & (table.windows[:, 1] > seconds + slack_sec)
    return {"past": found_items(table.clip_ids[past]), "cut": found_items(table.clip_ids[cut]),
            "unknown_duration": int(np.isnan(seconds).sum())}


def probability_clusters(path, decimals=6):
    """predictions.csv -> how many rows share their probabilities (to 6 decimals) with two or more others."""
    rows = csv_tables.read_table(path)
    columns = [name for name in rows if name.startswith("prob_")]
    if not columns:
        raise common.UserError(f"--predictions {path}: expected columns prob_CLASS, found "
                               f"{common.shorten_list(rows.columns, 40)}")
    values = np.stack([csv_tables.to_numbers(rows[name], f"{path}, column {name}") for name in columns], axis=1)
    counts = collections.Counter(map(tuple, np.round(values, decimals).tolist()))
    clusters = sorted(((count, value) for value, count in counts.items() if count >= 3), reverse=True)
    return {"rows": len(rows), "distinct": len(counts), "values": len(clusters),
            "rows_in_clusters": sum(count for count, _ in clusters),
            "examples": [{"count": count, **dict(zip(columns, value))} for count, value in clusters[:5]]}


def audit_text(report):
    """The audit as lines of text: parts, what is inside each, what two share, then what needs no pixels."""
    lines = []
    for part, held in report["parts"].items():
        classes, per_video = ", ".join(f"{name} {n}" for name, n in held["classes"].items()), held["events_per_video"]
        lines.append(f"{part or 'all'}: {held['rows']} clips ({held['repeated_rows']} rows more repeat them), "
                     f"{held['events']} events, {held['videos']} videos with {per_video['min']} to {per_video['max']} "
                     f"events (median {per_video['median']:g}), {held['pure_videos']} with one class, "
                     f"{held['mixed_videos']} mixed; {classes or 'no classes'}")
    sections = [(f"inside {part or 'all'}", found) for part, found in report["within"].items()]
    sections += [(f"between {pair}", found) for pair, found in report["between"].items()]
    for where, found in sections:
        counts = {what: item for what, item in found.items() if item is not None and what != "shared_rows"}
        lines.append(f"{where}: " + ", ".join(f"{item['count']} {what.replace('_', ' ')}"
                                              for what, item in counts.items()))
        lines += [f"    {what.replace('_', ' ')}: {', '.join(item['examples'][:3])}"
                  for what, item in counts.items() if item["count"]]
    lines += [f"SHARED EVENTS: {shared['count']} of {shared['of']} rows of {pair.split('-')[-1]} show an event that is "
              f"also in {pair.split('-')[0]}" for pair, found in report["between"].items()
              if (shared := found["shared_rows"])["count"]]
    if past := report.get("windows_past_the_end"):
        lines.append(f"windows: {past['past']['count']} start past the end of their file "
                     f"({', '.join(past['past']['examples'][:3]) or 'none'}), {past['cut']['count']} are cut by it; "
                     f"{past['unknown_duration']} files of unknown length")
    if clusters := report.get("probability_clusters"):
        lines.append(f"probabilities: {clusters['rows_in_clusters']} of {clusters['rows']} rows share theirs with two "
                     f"or more others ({clusters['values']} values)")
    lines += [f"no-pixel prior on {row['name']} across {row['across']}: {'AUC' if 'auc' in row else 'R2'} of "
              f"{row['what']} {row.get('auc', row.get('r2')):.3f} [{row['low']:.3f}, {row['high']:.3f}]"
              for row in report["priors"]]
    lines += [] if report["priors"] else ["no-pixel priors: too few labelled clips on both sides to judge any"]
    return "\n".join(lines)
