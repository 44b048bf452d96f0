"""Bouts of behaviour in whole recordings: from windows to bouts, their picture, and how well they fit a table of events.

Letters: W windows, C classes, V videos, D resamples. Units: seconds from the start of a recording.
"""
import dataclasses
import fractions

import numpy as np

import common
from evidence import plotting, subject_intervals
from readers import video_files

IOUS = (0.25, 0.5)
COLOURS = (plotting.BLUE, plotting.ORANGE, plotting.GREEN, plotting.PURPLE, plotting.SKY, plotting.YELLOW)


@dataclasses.dataclass
class Windows:
    """What a model says of overlapping windows of one recording, in their order."""
    spans: np.ndarray  # (W, 2) start and end
    probability: np.ndarray  # (W, C)
    chosen: np.ndarray  # (W,) class indices

    @property
    def edges(self):
        """(W + 1,) times: window k decides from edge k to edge k + 1, the time nearest to its middle."""
        middles = self.spans.mean(1)
        between = (middles[1:] + middles[:-1]) / 2
        return np.array([self.spans[0, 0], *between, self.spans[-1, 1]])

    def at(self, time_sec):
        """Index of the window that decides at a time."""
        place = np.searchsorted(self.edges, time_sec, "right") - 1
        return int(np.clip(place, 0, len(self.chosen) - 1))


@dataclasses.dataclass
class Bout:
    """A behaviour from its start to its end."""
    label: str
    start_sec: float
    end_sec: float
    mean_probability: float


def bouts_of(windows, names, min_bout_sec=0.0, merge_gap_sec=0.0):
    """Bouts of one recording by their start: runs of windows with one class.

    Two of one class with a gap of at most merge_gap_sec become one; then what is shorter than min_bout_sec is left out.
    """
    edges = windows.edges
    bouts = []
    for c, name in enumerate(names):
        borders = np.flatnonzero(np.diff(windows.chosen == c, prepend=False, append=False))
        runs = borders.reshape(-1, 2).tolist()  # first window, and the one after the last
        joined = runs[:1]
        for first, last in runs[1:]:
            if edges[first] - edges[joined[-1][1]] <= merge_gap_sec:
                joined[-1][1] = last
            else:
                joined.append([first, last])
        for first, last in joined:
            if edges[last] - edges[first] >= min_bout_sec:
                mean = windows.probability[first:last, c].mean()
                bouts.append(Bout(name, float(edges[first]), float(edges[last]), float(mean)))
    return sorted(bouts, key=lambda bout: bout.start_sec)


def plot_ethogram(windows, bouts, names, path):
    """A row a class over the time of one recording: its bouts as bars, its probability as a line."""
    size = (9, 1.0 + 0.45 * len(names))
    margins = (plotting.label_inches(names) + 0.2, 0.15, 0.48, 0.2)
    figure, [axis] = plotting.new_figure(1, 1, size, margins)
    is_long = windows.spans[-1, 1] > 300
    unit = 60 if is_long else 1
    middles = windows.spans.mean(1) / unit
    for c, name in enumerate(names):
        own = [bout for bout in bouts if bout.label == name]
        bars = [(bout.start_sec / unit, (bout.end_sec - bout.start_sec) / unit) for bout in own]
        axis.broken_barh(bars, (c - 0.4, 0.8), color=COLOURS[c % len(COLOURS)], alpha=0.6, linewidth=0)
        axis.plot(middles, c + 0.4 - 0.8 * windows.probability[:, c], color=plotting.INK, linewidth=0.7)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(windows.spans[0, 0] / unit, windows.spans[-1, 1] / unit)
    axis.set_xlabel("minutes" if is_long else "seconds", color=plotting.SOFT, fontsize=8)
    plotting.save_figure(figure, path)


def annotate(recording, windows, names, path):
    """Write a copy of a Recording, without sound, with the class and its probability drawn into every frame."""
    av = video_files.load_pyav()
    cv2 = common.load_opencv()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = None
        for time, convert in recording.frames():
            pixels = convert(None)
            pixels = np.ascontiguousarray(pixels[:len(pixels) // 2 * 2, :pixels.shape[1] // 2 * 2])  # even, for the codec
            if stream is None:
                height, width = pixels.shape[:2]
                stream = container.add_stream(codec, options={"g": "50"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = fractions.Fraction(1, 1000)
            k = windows.at(time)
            c = windows.chosen[k]
            text = f"{names[c]} {windows.probability[k, c]:.2f}"
            size = max(height / 320, 0.5)
            for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):  # legible on any ground
                cv2.putText(pixels, text, (8, round(30 * size)), cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness,
                            cv2.LINE_AA)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(1000 * time)
            frame.time_base = fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())


# --- against a table of events ---------------------------------------------------------------------

def count_pairs(found, true, iou):
    """How many of the spans (n, 2) and (m, 2) are pairs, one to one, the best first, that overlap by at least iou."""
    found = found[:, None]  # (n, 1, 2)
    starts = np.maximum(found[..., 0], true[:, 0])
    ends = np.minimum(found[..., 1], true[:, 1])
    both = np.maximum(ends - starts, 0.0)  # (n, m)
    lengths = np.diff(found)[..., 0] + np.diff(true)[:, 0]
    overlap = both / np.maximum(lengths - both, 1e-9)
    count = 0
    while overlap.size and overlap.max() >= iou:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row] = -1.0
        overlap[:, column] = -1.0
        count += 1
    return count


def covered(spans):
    """Seconds that at least one of the spans (n, 2) covers."""
    total = 0.0
    reached = -np.inf
    for start, end in spans[np.argsort(spans[:, 0])]:
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def spans_of(table, video, label):
    """(n, 2) start and end of the rows of one class in one video, of a table of bouts or events."""
    rows = table[(table["video"] == video) & (table["label"] == label)]
    return rows[["start_sec", "end_sec"]].to_numpy(float)


def compare_spans(found, true, watched):
    """Numbers and seconds of the spans (n, 2) and (m, 2) of one class, the true ones cut to what was watched."""
    true = np.clip(true, *watched)
    true = true[true[:, 1] > true[:, 0]]
    numbers = {f"pairs_at_{iou}": count_pairs(found, true, iou) for iou in IOUS}
    return numbers | {
        "bouts": len(found),
        "events": len(true),
        "found_sec": covered(found),
        "true_sec": covered(true),
        "either_sec": covered(np.concatenate([found, true])),
        "watched_sec": watched[1] - watched[0],
    }


def bout_metrics(sums):
    """{metric: array} of sums of what compare_spans gives, each an array."""
    metrics = {}
    total = sums["watched_sec"]
    found = sums["found_sec"] / total
    true = sums["true_sec"] / total
    either = sums["either_sec"] / total
    with np.errstate(divide="ignore", invalid="ignore"):
        for iou in IOUS:
            pairs = sums[f"pairs_at_{iou}"]
            metrics[f"precision_at_{iou}"] = pairs / sums["bouts"]
            metrics[f"recall_at_{iou}"] = pairs / sums["events"]
            metrics[f"f1_at_{iou}"] = 2 * pairs / (sums["bouts"] + sums["events"])
        agreed = found + true - either + 1 - either
        by_chance = found * true + (1 - found) * (1 - true)
        metrics["kappa"] = (agreed - by_chance) / (1 - by_chance)
    return metrics


def judge_bouts(windows, bouts, events, names):
    """(rows of a table, one for each class; how their intervals are made).

    windows, bouts, events: DataFrames with video, start_sec and end_sec, the last two also label. Of all videos that
    have windows: precision, recall and F1 of bouts that are paired with events at each IoU, and Cohen's kappa over
    time, that of infinitely short frames. Intervals over videos: none under 5.
    """
    counts = []
    for video, rows in windows.groupby("video", sort=False):
        watched = rows["start_sec"].min(), rows["end_sec"].max()
        counts.append([
            compare_spans(spans_of(bouts, video, name), spans_of(events, video, name), watched)
            for name in names])
    numbers = {key: np.array([[each[key] for each in of_video] for of_video in counts], float)
               for key in counts[0][0]}  # (V, C) each

    def statistic(weights):
        return {}, bout_metrics({key: weights @ values for key, values in numbers.items()})  # (D, C) each
    n_events = numbers["events"].sum(0)
    result = subject_intervals.estimate(
        statistic, None, len(counts), "videos", draws=2000, seed=0, names=names, n=n_events, rows=len(counts))
    table = []
    for c, name in enumerate(names):
        row = {"label": name}
        row |= {key: int(numbers[key][:, c].sum()) for key in ("bouts", "events")}
        for metric, found in result.each.model.items():
            row |= found.at(c).columns(metric)
        table.append(row)
    return table, result.method
