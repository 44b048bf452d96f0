"""Bouts of behaviour in whole recordings: from windows to bouts, their picture, and how they fit a table of events.

Letters: W windows, C classes, U videos or groups, D resamples. Units: seconds from the start of a recording.
"""
import dataclasses
import fractions
import functools
import itertools
import typing
from pathlib import Path

import numpy as np

import common
from evidence import metric_names, plotting, subject_intervals
from readers import event_tables, video_files

IOUS = (0.25, 0.5)
SLACK_SEC = 1e-6  # times of a grid are rounded: 0.1 + 0.2 is as long as 0.3
STRIP_SEC = 600  # of the recording in one strip of its ethogram
MOST_STRIPS = 12  # of an ethogram, which are longer where the recording is


def add_arguments(add):
    """What predict does with recordings that have no table of events."""
    add("--video", type=Path, metavar="FILE_OR_FOLDER",
        help="predict: recordings instead of a manifest; the trained window slides over each")
    add("--every", type=common.bounded(float, 1e-3), default=0.5,
        help="seconds from one window to the next")
    add("--min_bout_sec", type=common.AMOUNT, default=0.0,
        help="a shorter bout is left out, after close ones have been joined")
    add("--merge_gap_sec", type=common.AMOUNT, default=0.0,
        help="bouts of one class that are at most so far apart are one, which takes what lies between")
    add("--annotate", action="store_true",
        help="also write a copy of each video with class and probability drawn in (without sound)")


@dataclasses.dataclass
class Windows:
    """What a model says of overlapping windows of one recording, in their order."""
    spans: np.ndarray  # (W, 2) start and end
    probability: np.ndarray  # (W, C)
    chosen: np.ndarray  # (W,) class indices

    @functools.cached_property
    def edges(self):
        """(W + 1,) times: from edge k to edge k + 1 window k decides, whose middle is the nearest there."""
        middles = self.spans.mean(1)
        between = (middles[1:] + middles[:-1]) / 2
        return np.array([self.spans[0, 0], *between, self.spans[-1, 1]])

    def at(self, time_sec):
        """Index of the window that decides at a time."""
        return np.searchsorted(self.edges[1:-1], time_sec, "right")


class Bout(typing.NamedTuple):
    """A behaviour from its start to its end: a row of bouts.csv."""
    label: str
    start_sec: float
    end_sec: float
    mean_probability: float


def join_close(windows, merge_gap_sec):
    """(W,) class indices after each gap of at most merge_gap_sec between two bouts of one class became theirs.

    The smallest gaps are filled first, of equal ones the earlier; bouts that lay in them are gone.
    """
    edges = windows.edges
    joined = windows.chosen.copy()
    gaps = []
    for c in np.unique(joined):
        own = np.flatnonzero(joined == c)
        for before, after in itertools.pairwise(own):
            gap = round(edges[after] - edges[before + 1], 6)
            gaps.append((gap, before, after))
    for gap, before, after in sorted(gaps):
        if gap <= merge_gap_sec + SLACK_SEC and joined[before] == joined[after]:
            joined[before:after] = joined[before]
    return joined


def bouts_of(windows, names, min_bout_sec=0.0, merge_gap_sec=0.0):
    """Bouts of one recording by their start: runs of windows with one class; none overlaps another.

    Two of one class with a gap of at most merge_gap_sec become one, which takes the gap; then what
    is shorter than min_bout_sec is left out.
    """
    classes = join_close(windows, merge_gap_sec)
    changes = np.flatnonzero(np.diff(classes, prepend=-1, append=-1))
    bouts = []
    for begin, end in itertools.pairwise(changes):
        start_sec, end_sec = windows.edges[[begin, end]]
        if end_sec - start_sec >= min_bout_sec - SLACK_SEC:
            c = classes[begin]
            bouts.append(Bout(names[c], start_sec, end_sec, windows.probability[begin:end, c].mean()))
    return bouts


def write_recording(recording, windows, names, args, folder):
    """Write tables and ethogram of a recording, and with --annotate its copy; returns {name of a table: DataFrame}."""
    import pandas as pd
    folder.mkdir(parents=True, exist_ok=True)
    bouts = bouts_of(windows, names, args.min_bout_sec, args.merge_gap_sec)
    plot_ethogram(windows, bouts, names, folder / "ethogram.png")
    if args.annotate:
        annotate(recording, windows, names, folder / "annotated.mp4")
    start_sec, end_sec = windows.spans.T
    columns = {
        "video": str(recording.path.resolve()),
        "start_sec": start_sec,
        "end_sec": end_sec,
        "pred_label": np.array(names)[windows.chosen],
        **{f"prob_{name}": p for name, p in zip(names, windows.probability.T)}}
    tables = {"windows": pd.DataFrame(columns), "bouts": pd.DataFrame(bouts, columns=Bout._fields)}
    tables["bouts"].insert(0, "video", columns["video"])
    write_tables(folder, [tables])
    return tables


def write_tables(folder, recordings):
    """windows.csv and bouts.csv of these recordings; each is what write_recording returns."""
    import pandas as pd
    for kind in recordings[0]:
        table = pd.concat([tables[kind] for tables in recordings])
        common.write_table(folder / f"{kind}.csv", table)


def plot_ethogram(windows, bouts, names, path):
    """The time of one recording in strips, a row a class: its bouts as bars, its probability as a line.

    A strip is some 10 minutes, so that bouts of seconds are seen, but there are 12 at most.
    """
    begin, end = windows.edges[[0, -1]]
    n_strips = np.clip(round((end - begin) / STRIP_SEC), 1, MOST_STRIPS)
    unit = 60 if end - begin > 300 else 1
    edges = np.linspace(begin, end, n_strips + 1) / unit
    figure, axes = plotting.new_figure(n_strips, 1, (9, 0.7 + 0.45 * len(names)))
    middles = windows.spans.mean(1) / unit
    for axis, left, right in zip(axes, edges, edges[1:]):
        for c, name in enumerate(names):
            bars = [(bout.start_sec / unit, (bout.end_sec - bout.start_sec) / unit)
                    for bout in bouts if bout.label == name]
            colour = plotting.CYCLE[c % len(plotting.CYCLE)]
            axis.broken_barh(bars, (c - 0.4, 0.8), color=colour, alpha=0.6, linewidth=0)
            axis.plot(middles, c + 0.4 - 0.8 * windows.probability[:, c], color=plotting.INK, linewidth=0.7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), plotting.without_math(names, 28))
        axis.set_xlim(left, right)
    axes[-1].set_xlabel("seconds" if unit == 1 else "minutes", color=plotting.SOFT, fontsize=8)
    plotting.save_figure(figure, path)


def annotate(recording, windows, names, path):
    """Write a copy of a Recording, without sound, with the class and its probability drawn into every frame."""
    av = video_files.load_pyav()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(path, "w") as container:
        stream = None
        for time, convert in recording.frames():
            pixels = convert(None)
            height = len(pixels) // 2 * 2  # even, for the codec
            width = pixels.shape[1] // 2 * 2
            pixels = pixels[:height, :width].copy()
            if stream is None:
                stream = container.add_stream(
                    codec, options={"g": "50"}, width=width, height=height, pix_fmt="yuv420p")
                stream.codec_context.time_base = fractions.Fraction(1, 1000)
                longest = max(plotting.picture_font(100).getlength(f"{name} 0.00") for name in names)
                widest = 100 * (width - 16) / longest
                font = plotting.picture_font(min(max(height / 14, 12), widest))  # no smaller ones can be read
            k = windows.at(time)
            c = windows.chosen[k]
            draw_text(pixels, f"{names[c]} {windows.probability[k, c]:.2f}", font)
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = round(1000 * time)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_text(pixels, text, font):
    """Write a line at the top left of a frame, uint8 (H, W, 3): white within black, so legible on any ground."""
    from PIL import Image, ImageDraw
    top = Image.fromarray(pixels[:round(2 * font.size)])  # a part, as a copy of the whole takes its time
    rim = round(font.size / 10)
    ImageDraw.Draw(top).text((8, 0), text, "white", font, stroke_width=rim, stroke_fill="black")
    pixels[:top.height] = top


# --- against a table of events ---------------------------------------------------------------------

def count_pairs(found, true, iou):
    """How many of the spans (n, 2) and (m, 2) are pairs, one to one, the best first, that overlap by at least iou."""
    starts, ends = np.hsplit(found, 2)  # (n, 1) each
    true_starts, true_ends = true.T  # (m,) each
    both = np.minimum(ends, true_ends) - np.maximum(starts, true_starts)  # (n, m), below 0: apart
    hull = np.maximum(ends, true_ends) - np.minimum(starts, true_starts)
    overlap = both / hull
    count = 0
    while overlap.max(initial=-1.0) >= iou:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row] = -1.0
        overlap[:, column] = -1.0
        count += 1
    return count


def covered(spans):
    """Seconds that at least one of the spans (n, 2) covers."""
    starts, ends = spans[np.argsort(spans[:, 0])].T
    reached = np.maximum.accumulate([-np.inf, *ends])[:-1]  # by the spans before
    return np.maximum(ends - np.maximum(starts, reached), 0).sum()


def read_spans(path):
    """windows.csv or bouts.csv -> DataFrame whose start_sec and end_sec are numbers."""
    import pandas as pd
    if not path.is_file():
        raise common.UserError(f"no such file: {path} (expected the run folder of --mode predict --video)")
    return pd.read_csv(path, dtype={"video": str, "label": str}, keep_default_na=False)


def events_in(watched, table, videos):
    """DataFrame of the events of an EventTable in the recordings, cut to what was watched of them.

    watched: DataFrame of start_sec and end_sec of each recording, whose index is its video; videos: that of each of
    the N events. What is left out is printed. Raises UserError where no event is of a recording.
    """
    import pandas as pd
    first_sec, last_sec = watched.reindex(videos).to_numpy().T  # NaN: of no recording
    start_sec = np.fmax(first_sec, table.windows[:, 0])  # without times: from the start to the end
    end_sec = np.fmin(last_sec, table.windows[:, 1])
    events = pd.DataFrame({
        "video": videos,
        "label": np.array(table.names)[table.label],
        "start_sec": start_sec,
        "end_sec": end_sec})
    is_watched = ~np.isnan(last_sec)
    has_time = is_watched & (end_sec > start_sec)
    n_without = (is_watched & ~has_time).sum()
    if n_without:
        print(f"note: {n_without} events in these recordings are left out: they lie past the end, "
              "or are points in time (--min_event_sec 1 makes each a second long)")
    print(f"{has_time.sum()} of {len(events)} events are in the recordings")
    if not is_watched.any():
        raise common.UserError(
            f"no event is of one of the recordings: expected {common.shorten_list(watched.index, 3)}, "
            f"found {common.shorten_list(sorted(set(videos)), 3)}")
    events = events[has_time]
    empty = set(watched.index) - set(events["video"])
    if empty:
        print(f"note: {len(empty)} recordings have no event in the table, and every bout in them "
              f"counts as false: {common.shorten_list(sorted(empty), 3)}")
    overlapping = set()
    for (video, _), own in events.groupby(["video", "label"]):
        spans = own[["start_sec", "end_sec"]].to_numpy()
        if np.diff(spans).sum() > covered(spans) + SLACK_SEC:
            overlapping.add(video)
    if overlapping:
        print(f"note: events of one class overlap in {len(overlapping)} recordings. A bout is paired with one of them, "
              "and the others count as missed: of several observers keep one (--filter \"observer==A\")")
    return events


def judge_folder(folder, read_table, output):
    """Judge the bouts in a run folder of predict --video by the EventTable that read_table(names of classes) gives.

    Prints what it finds and writes it to the path `output`, for None to bout_scores.csv in the folder. Intervals are
    over the table's groups, without any over videos. Raises UserError for a folder without windows and bouts.
    """
    windows = read_spans(folder / "windows.csv")
    table = read_table([name.removeprefix("prob_") for name in windows if name.startswith("prob_")])
    for note in table.notes:
        print(f"note: {note}")
    if table.skipped:
        lines = [f"{entry['row']}, {entry['video']}: {entry['reason']}" for entry in table.skipped]
        print(f"skipped: {common.shorten_list(lines)}")
    bouts = read_spans(folder / "bouts.csv")
    videos = [str(source.resolve()) for source in table.sources]
    group_of = {}
    if table.groups is not None:
        group_of = dict(zip(videos, event_tables.connected([videos, table.groups])))  # groups in one video are one
    watched = windows.groupby("video", sort=False).agg({"start_sec": "min", "end_sec": "max"})
    rows, method = judge_bouts(watched, bouts, events_in(watched, table, videos), table.names, group_of)
    output = output or folder / "bout_scores.csv"
    common.write_table(output, rows)
    shown = metric_names.number_text
    for row in rows:
        interval = "" if np.isnan(row["kappa_low"]) else f" [{row['kappa_low']:.3f}, {row['kappa_high']:.3f}]"
        print(f"{row['label']}: {row['bouts']} bouts, {row['events']} events; "
              f"F1 at IoU .25 {shown(row['f1_at_0.25'])}, at .5 {shown(row['f1_at_0.5'])}; "
              f"kappa {shown(row['kappa'])}{interval}")
    print(f"{method}; written to {output}")
    print("note: whether the model was trained on these events is not known here; --mode predict "
          "with this --manifest says it (column seen)")


def spans_of(table, video, label):
    """(n, 2) start and end of the rows of one class in one video, of a table of bouts or events."""
    rows = table[(table["video"] == video) & (table["label"] == label)]
    return rows[["start_sec", "end_sec"]].to_numpy(float)


def compare_spans(found, true, watched_sec):
    """{what: number} of the bouts (n, 2) and events (m, 2) of one class in one recording: counts, and seconds covered.

    found, true: start and end of each; watched_sec: how long the recording is.
    """
    return {
        **{f"pairs_at_{iou}": count_pairs(found, true, iou) for iou in IOUS},
        "bouts": len(found),
        "events": len(true),
        "found_sec": covered(found),
        "true_sec": covered(true),
        "either_sec": covered(np.concatenate([found, true])),
        "watched_sec": watched_sec,
    }


def bout_metrics(sums):
    """{metric: array} of what compare_spans gives, summed over recordings: {what: array}; NaN where undefined."""
    metrics = {}
    found, true, either = [sums[f"{name}_sec"] / sums["watched_sec"] for name in ("found", "true", "either")]
    with common.undefined_is_nan():
        for iou in IOUS:
            pairs = sums[f"pairs_at_{iou}"]
            metrics[f"precision_at_{iou}"] = pairs / sums["bouts"]
            metrics[f"recall_at_{iou}"] = pairs / sums["events"]
            metrics[f"f1_at_{iou}"] = 2 * pairs / (sums["bouts"] + sums["events"])
        agreed = found + true - either + 1 - either
        by_chance = found * true + (1 - found) * (1 - true)
        metrics["kappa"] = (agreed - by_chance) / (1 - by_chance)
    return metrics


def judge_bouts(watched, bouts, events, names, group_of):
    """(rows of a table, one for each class; how their intervals are made).

    watched: as in events_in; bouts, events: DataFrames with video, label, start_sec and
    end_sec. Of all videos that were watched: precision, recall and F1 of bouts that are
    paired with events at each IoU, and Cohen's kappa over time, that of infinitely
    short frames. Intervals over videos, or over the groups of group_of {video: group}
    (others are their own): none where under 5 have what a number is about.
    """
    import pandas as pd
    counts = []
    for video, start_sec, end_sec in watched.itertuples():
        for name in names:
            found = spans_of(bouts, video, name)
            true = spans_of(events, video, name)
            own = compare_spans(found, true, end_sec - start_sec)
            counts.append({"group": group_of.get(video, video), "label": name, **own})
    summed = pd.DataFrame(counts).groupby(["group", "label"], sort=False).sum()
    numbers = {key: column.to_numpy().reshape(-1, len(names)) for key, column in summed.items()}  # (U, C) each
    n_units = len(numbers["bouts"])

    def statistic(weights):
        return {}, bout_metrics({key: weights @ values for key, values in numbers.items()})  # (D, C) each
    n_events = numbers["events"].sum(0)  # (C,)
    support = subject_intervals.support_alone(statistic, n_units)
    unit = "groups" if group_of else "videos"
    result = subject_intervals.estimate(
        statistic, None, n_units, unit, names=names, n=n_events, rows=n_units, support=support)
    columns = {"label": names, "bouts": numbers["bouts"].sum(0), "events": n_events}
    for metric, found in result.each.model.items():
        columns |= found.columns(metric)
    return pd.DataFrame(columns).to_dict("records"), result.method
