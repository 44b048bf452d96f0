"""Columns of times in tables of events, under the names that people give them -> windows of each row.

Letters: N rows. Units: seconds from the start of a file, or frames counted from 0.
"""
import dataclasses
import functools
import math
import re

import numpy as np

import common
from readers import csv_tables, video_files

SECONDS = {"sec": 1, "ms": 0.001, "min": 60}
FILLER = "(?:event|time|clip|image|t)*"
TIME_COLUMN = re.compile(
    f"{FILLER}(?P<before>frame|index)?{FILLER}"  # the last group is the unit, where the name says one
    "(?:(?P<start>start|begin(?:ning)?|onset|first(?=frame))|(?P<end>stop|end|last(?=frame))|"
    f"(?P<offset>offset)|(?P<duration>duration|dur)){FILLER}"
    "(?:(?P<sec>s|secs?|seconds?|ssmsec|hhmmss(?:ms)?)|(?P<ms>ms|msecs?|milliseconds?)|(?P<min>mins?|minutes?)|"
    "(?P<frame>frames?|index))?")
TIME_WORDS = set("start begin beginning onset stop end offset time times timestamp timecode frame t s sec seconds ms "
                 "event video clip recording relative absolute sf f hms hmsf from to in out till "
                 "until t0 t1 t2".split())
CLOCK = re.compile(r"(?:.*[ t])?(\d+):(\d{1,2})(?::(\d{1,2}(?:[.,]\d*)?))?\s*(?:([ap])\.?m\.?)?")


@dataclasses.dataclass
class TimeColumn:
    """A column of times: role is start, end or duration; unit sec, ms, min or frame, None where its name says none."""
    name: str
    role: str
    unit: str | None


def column_match(key):
    """What the name of a column of times, in the spelling of column_key, says of it; None for other columns."""
    return TIME_COLUMN.fullmatch(key.replace("_", ""))


def time_columns(rows):
    """TimeColumns of the starts, then of the ends and durations: those whose names say their unit, else the others."""
    found = []
    for name in rows:
        match = column_match(name)
        if not match:
            continue
        [role] = [role for role in ("start", "end", "offset", "duration") if match[role]]
        unit = None if match.lastgroup == role else match.lastgroup  # the last group that matched, see TIME_COLUMN
        if match["before"]:
            unit = "frame"
        if role == "offset":  # with an onset it is the end; event_offset_sec is where an event starts
            role = "end" if any(other.startswith("onset") for other in rows) else "start"
        if looks_like_times(rows[name]) or (unit and any(rows[name])):  # other cells are errors
            found.append(TimeColumn(name, role, unit))
    found.sort(key=lambda column: "offset" in column.name)  # a start counts before an offset
    starts = [column for column in found if column.role == "start"]
    ends = [column for column in found if column.role != "start"]
    starts_in_unit = [column for column in starts if column.unit]
    ends_in_unit = [column for column in ends if column.unit]
    if starts_in_unit:  # then an end that is a time of day is no end
        ends = [column for column in ends if not rows[column.name].str.contains(":").any()]
    return (starts_in_unit or starts) + (ends_in_unit or ends)


def looks_like_times(cells):
    """True where a quarter of the cells that are not blank are numbers or clock times."""
    return csv_tables.looks_numeric(cells.str.replace(":", ""))


def check_times_are_used(rows, source, notes):
    """UserError for columns that look like times of events and are not read, where a start or an end is missing.

    Starts alone are points in time, which is noted.
    """
    columns = time_columns(rows)
    starts = [column.name for column in columns if column.role == "start"]
    if 0 < len(starts) < len(columns):
        return
    unused = []
    for name in rows:
        words = set(name.split("_"))
        is_end = words & {"end", "stop"}
        is_day_time = starts and not is_end and rows[name].str.contains(":").any()
        is_named_so = words <= TIME_WORDS and name not in starts
        if is_named_so and not is_day_time and looks_like_times(rows[name]):
            unused.append(name)
    if unused:
        raise common.UserError(
            f"{source}: columns that look like times of events are not understood: {common.shorten_list(unused)}. "
            "Rename them to start_sec and end_sec (or start_frame and end_frame), or delete them")
    if starts:
        notes.append(f"{source.name}: {', '.join(starts)} has neither an end nor a duration beside it: each event is a "
                     "point in time. Call a column that says when they end end_sec or end_frame, as the start")


def clock_seconds(text):
    """Seconds since midnight, or of a length, of '6:00:25', '06:00:25', '7/6/2024 6:00:25', '6:00:25 pm' or '6:00'.

    NaN where it is no time.
    """
    match = CLOCK.fullmatch(text.casefold())
    if not match:
        return math.nan
    hour = int(match[1])
    if match[4]:
        hour = hour % 12 + 12 * (match[4] == "p")
    second = (match[3] or "0").replace(",", ".")
    return 3600 * hour + 60 * int(match[2]) + float(second)


def seconds_in(cells, unit, where):
    """Column of numbers in this unit, or of H:MM:SS.s -> (N,) seconds, or frames; NaN where blank."""
    if unit == "frame":
        return csv_tables.to_numbers(cells, where, "frames")
    clock = cells.where(cells.str.count(":") == 2, "").map(clock_seconds)
    is_clock = clock.notna()
    numbers = csv_tables.to_numbers(cells.mask(is_clock, ""), where, "numbers or h:mm:ss")
    return np.where(is_clock, clock, SECONDS.get(unit, 1) * numbers)


def event_windows(rows, source, min_event_sec, time_unit, notes):
    """Time columns of one manifest -> (N,) starts, ends, units (sec or frame) and faults, text, '' = none.

    A start and an end or a duration, by the names that TIME_COLUMN knows; nothing: the whole clip.
    A row is in frames (both inclusive) where it has no start in seconds, or an end only in frames.
    time_unit: of columns whose names say none; seconds by default, which is noted. An event in
    seconds that is shorter than min_event_sec gets a window of that length around it; seconds_of
    does so for those in frames.
    """
    import pandas as pd
    columns = time_columns(rows)
    unsaid = [column.name for column in columns if not (column.unit or time_unit)]
    if unsaid:
        notes.append(f"{source.name}: {', '.join(unsaid)} are read as seconds from the start of "
                     "the file; --time_unit names another unit")
    found = {}  # (role, "frame" or "sec") -> (N,) numbers, of the first column that has one
    for column in columns:
        unit = column.unit or time_unit
        numbers = pd.Series(seconds_in(rows[column.name], unit, f"{source}, column {column.name}"))
        key = column.role, "frame" if unit == "frame" else "sec"
        found[key] = found.get(key, numbers).fillna(numbers)
    of_starts = {unit for role, unit in found if role == "start"}
    of_ends = {unit for role, unit in found if role != "start"}
    if of_starts and of_ends and not of_starts & of_ends:
        named = ", ".join(column.name for column in columns)
        raise common.UserError(
            f"{source}: expected starts and ends both in frames or both in seconds, found {named}. "
            "Rename or correct them")
    nothing = pd.Series(np.nan, range(len(rows)))

    def read_windows(unit, one_frame):
        """(N,) starts, ends and whether these are written, in this unit; the last frame of a window is in it."""
        start, end, duration = [found.get((role, unit), nothing) for role in ("start", "end", "duration")]
        end = end.fillna(start + duration - one_frame)
        return start, end.fillna(start) + one_frame, end.notna()
    start, end, has_end = read_windows("sec", 0)
    if unsaid:
        notes += _note_on_parts_of_a_day(source, start, found.get(("end", "sec"), start))
    first, stop, has_stop = read_windows("frame", 1)
    is_frame = first.notna() & (start.isna() | (has_stop & ~has_end))
    start = start.mask(is_frame, first)
    end = end.mask(is_frame, stop)
    faults = np.select(
        [start.isna() & start.notna().any(), end < start + is_frame, start < 0],
        ["no offset, while other rows have one", "ends before it starts", "starts before the file"], "")
    start, end = _widen(start, end, min_event_sec, ~is_frame)
    return start, end, np.where(is_frame, "frame", "sec"), faults


def _note_on_parts_of_a_day(source, start, end):
    """A list of one warning where all these seconds are below 1, as of times that a spreadsheet keeps, else of none."""
    if start.nunique() < 2 or not end.max() < 1:
        return []
    return [f"WARNING: {source.name}: no time is above {end.max():.2g} s. Parts of a day, as "
            "spreadsheets keep times? Format the cells as h:mm:ss"]


def _widen(start, end, min_event_sec, can_be_short):
    """(N,) starts and ends, the short ones widened to min_event_sec around their middle, not before the file."""
    is_short = can_be_short & (end - start < min_event_sec)
    widened = np.maximum((start + end - min_event_sec) / 2, 0)
    start = np.where(is_short, widened, start)
    end = np.where(is_short, widened + min_event_sec, end)
    return start, end


def seconds_of(table, fps, min_event_sec=1.0):
    """The table with windows counted in frames turned into seconds by the frames' own times; short ones widened.

    fps: of sources without a clock. A row of a damaged file, whose frames cannot be counted, is
    skipped; one of a file that cannot be read stays in frames.
    """
    windows = table.windows.copy()
    unit = table.unit.copy()
    in_seconds = table.sources[(unit == "sec") & ~np.isnan(windows[:, 0])]
    clockless = sum(map(video_files.has_no_clock, set(in_seconds)))
    if clockless:
        table.notes.append(f"times in seconds of {clockless} folders of frames or .npy clips, "
                           f"which have no clock: {fps:g} of their frames are a second (--fps)")
    reasons = [""] * len(table)
    probe = functools.cache(video_files.probe)  # once a file
    for row in np.flatnonzero(unit == "frame"):
        info = probe(table.sources[row], fps)
        if info.error:
            continue
        unit[row] = "sec"
        windows[row] = [time_of_frame(info, frame) for frame in windows[row]]
        if info.damage:
            reasons[row] = f"its frames cannot be counted: {info.damage}"
    windows = np.transpose(_widen(*windows.T, min_event_sec, unit != table.unit))  # (N, 2)
    return dataclasses.replace(table, windows=windows, unit=unit).without(reasons)


def time_of_frame(info, frame):
    """When a frame is first shown, in seconds."""
    if frame < info.n_frames:
        return info.times[int(frame)]
    return info.duration_sec * (frame / info.n_frames)  # past the end, at the earliest at it
