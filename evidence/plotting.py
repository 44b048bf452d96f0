"""Small pictures in the Okabe-Ito colours, drawn without pyplot: no window and no hidden state.

Letters: N rows, R scores, C classes. Sizes in inches.
"""

import io
import textwrap

import numpy as np

import common
from evidence import calibrating, class_scores, metric_names, subject_intervals

INK = "#20262d"
SOFT = "#66707a"
GRID = "#e3e7ea"
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
YELLOW = "#E69F00"
CYCLE = (BLUE, GREEN, PURPLE, YELLOW, SKY, ORANGE)  # of curves, bars and classes, in turn
MOST_TARGETS = 40  # of one plot
MOST_NAMES = 18  # beside the bars of a small panel; of more bars each second, third ... is named


def note_if_cut(n, what):
    """What a caption says of a plot of n scores or other rows where it does not show all; else ""."""
    return f": the first {MOST_TARGETS} of {n} {what}" if n > MOST_TARGETS else ""


def new_figure(n_panels, columns, panel_inches, share_y=False):
    """(figure, n_panels axes) in the look of all plots, filled row by row.

    columns: at most so many; panel_inches: (width, height) of a panel with its labels; share_y: one
    y axis, labelled in the first column.
    """
    from matplotlib.figure import Figure

    columns = min(columns, n_panels)
    rows = -(-n_panels // columns)
    width, height = panel_inches
    figure = Figure(figsize=(columns * width, rows * height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).flatten()
    for axis in axes[n_panels:]:
        axis.remove()
    for axis in axes[:n_panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", colors=SOFT, labelsize=8)
        axis.ticklabel_format(useOffset=False)
        axis.xaxis.offsetText.set_size(8)  # of a power of ten
        axis.yaxis.offsetText.set(size=8, horizontalalignment="right")  # beside the title
        axis.grid(color=GRID)
        axis.set_axisbelow(True)
        axis.set_prop_cycle(color=CYCLE)
    return figure, axes[:n_panels]


def picture_font(size):
    """The font of the plots, so many pixels high, to write on pictures: Pillow's and OpenCV's own have no accents.

    Of several families in matplotlibrc the last: it is there for what the others lack.
    """
    from matplotlib import font_manager, rcParams
    from PIL import ImageFont

    last = font_manager.FontProperties(family=rcParams["font.family"][-1:])
    return ImageFont.truetype(font_manager.findfont(last), size)


def draw_figure(figure):
    """The figure as a Pillow picture; savefig would draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def save_figure(figure, path):
    """Write a PNG of 256 colours: half the usual size, the same bytes for the same figure.

    They are chosen by an octree, which keeps rare ones: Pillow's median cut would paint the only
    bar of a class in the colour of another.
    """
    from PIL import Image

    write_picture(path, draw_figure(figure).quantize(256, Image.Quantize.FASTOCTREE), "PNG")


def write_picture(path, picture, kind="JPEG"):
    """Write a Pillow picture, whole."""
    packed = io.BytesIO()
    picture.save(packed, kind, quality=85)
    common.write_whole(path, packed.getvalue())


def set_title(axis, title, note=""):
    """Title at the left in ink, a note at the right in the soft colour; y: nothing above it is looked for."""
    axis.set_title(title, loc="left", y=1, fontsize=9, color=INK, parse_math=False)
    axis.set_title(note, loc="right", y=1, fontsize=8, color=SOFT, parse_math=False)


def _label_axes(axis, x, y):
    axis.set_xlabel(x, fontsize=9, color=SOFT)
    axis.set_ylabel(y, fontsize=9, color=SOFT)


def _add_legend(axis):
    axis.legend(fontsize=7, frameon=False)


def _draw_diagonal(axis, ends):
    axis.plot(ends, ends, color=SOFT, linewidth=1, linestyle="--")


def shorten_name(name, length):
    """A name of at most so many letters, cut in its middle: the items of a scale differ at their ends."""
    end = length // 2
    return name if len(name) <= length else f"{name[:length - 3 - end]}...{name[-end:]}"


def without_math(names, length):
    """Names of at most so many letters, a dollar sign shown as such."""
    return [shorten_name(name, length).replace("$", r"\$") for name in names]


def write_lines(axis, lines):
    """Lines of text in place of a plot, a long one in several."""
    axis.axis("off")
    text = "\n".join(textwrap.fill(line, 42) for line in lines)
    axis.text(0, 0.95, text, fontsize=9, va="top", linespacing=1.7, parse_math=False)


def _history_panels(history):
    """{title: [columns]} of a table of epochs: train_loss and val_loss share a panel; the learning rate is the last."""
    panels = {}
    for column in history.dropna(axis=1, how="all").filter(regex="^(train|val)_"):
        panels.setdefault(column.split("_", 1)[1], []).append(column)
    if "learning_rate" in history and history["learning_rate"].max() > 0:
        panels["learning_rate"] = ["learning_rate"]
    return panels


def plot_history(history, path, best_epoch, facts=()):
    """Learning curves as PNG, train_ dashed: a panel for each of _history_panels, and one for facts, lines of text.

    history: dicts with epoch and any train_*, val_* and learning_rate (None leaves a gap).
    best_epoch is marked in every panel. It takes a good part of a second, so it belongs at the end
    of a run, not into each epoch.
    """
    import pandas as pd

    history = pd.DataFrame(history, dtype=float)
    panels = _history_panels(history)
    n_panels = len(panels) + bool(facts)
    figure, axes = new_figure(n_panels, 3, (3.5, 2.5))
    for axis, (title, columns) in zip(axes, panels.items()):
        for column in columns:
            style = {"linestyle": "--", "color": ORANGE} if column.startswith("train_") else {}
            axis.plot(history["epoch"], history[column], marker=".", label=column, **style)
        axis.set_xlabel(f"epoch, best {best_epoch:g}", fontsize=8, color=SOFT)
        axis.locator_params(axis="x", integer=True)
        if len(columns) > 1:
            _add_legend(axis)
        axis.axvline(best_epoch, color=INK, linewidth=0.9, linestyle=":")
        axis.set_xlim(left=0)  # around a single epoch there would be ticks at .98 and 1.02
        set_title(axis, shorten_name(title, 40))
        if title == "learning_rate":
            axis.set_yscale("log")
    if facts:
        write_lines(axes[-1], facts)
    save_figure(figure, path)


def plot_dataset(split, groups, facts, samples, path):
    """dataset_statistics.png of probe guidance: transitions of each part and group, the facts as text, sample frames.

    split: {part: rows}; groups: (N,) patients or folders; facts: lines of text;
    samples: up to 4 (title, pixels).
    """
    n_panels = 3 + len(samples)
    figure, axes = new_figure(n_panels, 4, (3.2, 2.6))
    parts, by_group, text = axes[:3]
    names, number = np.unique(groups, return_inverse=True)
    left = np.zeros(len(names))
    for place, rows in enumerate(split.values()):  # both axes take the same colours in turn
        parts.barh(place, len(rows))
        counts = np.bincount(number[rows], minlength=len(names))
        by_group.barh(range(len(names)), counts, left=left)
        left += counts
    for axis, bars in ((parts, list(split)), (by_group, names)):
        step = -(-len(bars) // MOST_NAMES)
        axis.set_yticks(range(0, len(bars), step), without_math(bars[::step], 16), fontsize=7)
        axis.invert_yaxis()  # the first at the top
        axis.locator_params(axis="x", integer=True)
    set_title(parts, "transitions")
    set_title(by_group, "per patient or folder")
    write_lines(text, facts)
    for axis, (title, pixels) in zip(axes[3:], samples):
        axis.imshow(pixels, cmap="gray")
        axis.axis("off")
        set_title(axis, title[-26:])
    save_figure(figure, path)


def _draw_target_bars(axis, rows, metric):
    """Bars of one metric with intervals, baseline and ceiling; the true number beside each."""
    columns = [metric, f"{metric}_low", f"{metric}_high", f"baseline_{metric}", f"ceiling_{metric}"]
    value, low, high, baseline, ceiling = rows.reindex(columns=columns).to_numpy(float).T
    place = np.arange(len(rows))
    axis.barh(place, value, height=0.62, color=SKY, label="model")
    if np.isfinite(low).any():
        axis.hlines(place, low, high, color=INK, linewidth=1.3, label="interval")
    axis.plot(baseline, place, "|", color=ORANGE, markersize=11, markeredgewidth=2.4, label="baseline")
    if np.isfinite(ceiling).any():
        axis.plot(ceiling, place, "D", color=INK, markersize=4.5, label="noise ceiling")
    shown = [0.0, *value, *low, *high, *baseline]
    highest = np.nanmax(shown)
    known = metric_names.METRICS.get(metric)  # None: an error in mm or degrees, which ends nowhere
    right = 1.0 if known and highest <= 1 else None
    left = max(-0.5, 1.1 * np.nanmin(shown) - 0.02 * (right or highest))  # a baseline of 0 is seen beside the axis
    axis.set_xlim(left, right)
    beside = axis.get_yaxis_transform()
    for y, number in enumerate(value):
        text = metric_names.number_text(number, ".2f" if known else ".3g")
        axis.text(1.02, y, text, transform=beside, va="center", fontsize=8)
    set_title(axis, known.label if known else metric)
    axis.axvline(0, color=SOFT, linewidth=0.9)


def plot_per_target(rows, path, metrics=("pearson_r", "r2")):
    """Horizontal bars per target (the first 40) as PNG; one panel per metric.

    rows: dicts with target and, for each metric m, m, m_low and m_high (interval), baseline_m and
    ceiling_m; all but target and m may be missing. The axis ends at -0.5, and that of shares at 1
    where nothing is larger.
    """
    import pandas as pd

    rows = rows[:MOST_TARGETS]
    labels = without_math([row["target"] for row in rows], 28)
    size = 4.2, 1 + 0.26 * len(rows)
    figure, axes = new_figure(len(metrics), 3, size, share_y=True)
    named = {}  # what any of the panels shows
    for axis, metric in zip(axes, metrics):
        _draw_target_bars(axis, pd.DataFrame(rows), metric)
        axis.tick_params(axis="y", labelcolor=INK)
        handles, names = axis.get_legend_handles_labels()
        named |= dict(zip(names, handles))
    axes[0].set_yticks(range(len(rows)), labels)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


def strip_of(clip):
    """Five frames of a clip (T, H, W, 3) side by side, evenly from its first to its last: (H, 5 W, 3)."""
    return np.hstack(clip[np.linspace(0, len(clip) - 1, 5).astype(int)])


@common.first_process_only
def plot_batch(run, dataset, labels):
    """training_batch.jpg: up to twelve samples of a train set, augmented as in the first epoch, with their labels.

    dataset: of samples with the key "input", uint8 (S, S, 3), or (T, S, S, 3), of which five frames
    are shown; of features nothing is. labels: a text for each sample.
    """
    chosen = np.unique(np.linspace(0, len(dataset) - 1, 12).astype(int))
    inputs = [dataset[0, int(index)]["input"].numpy() for index in chosen]
    if inputs[0].dtype != np.uint8:
        return
    if inputs[0].ndim == 4:
        inputs = list(map(strip_of, inputs))
    aspect = inputs[0].shape[1] // inputs[0].shape[0]
    figure, axes = new_figure(len(chosen), 6 // aspect, (1.8 * aspect, 2.4))
    for axis, picture, index in zip(axes, inputs, chosen):
        axis.imshow(picture)
        axis.axis("off")
        set_title(axis, "\n".join(line[-24 * aspect:] for line in labels[index].splitlines()))
    draw_figure(figure).save(run.path("training_batch.jpg"))


def plot_scatter(table, path):
    """Predicted over true of a ScoreTable as PNG, a panel per score (the first 40) with identity line, r and n."""
    pearson_r = common.regression_metrics(table.predicted, table.truth)["pearson_r"]  # (R,)
    n_panels = min(len(table.names), MOST_TARGETS)
    figure, axes = new_figure(n_panels, 6, (2.1, 2.1))
    for j, axis in enumerate(axes):
        known = table.is_known[:, j]
        x = table.truth[known, j]  # (n,)
        y = table.predicted[known, j]
        axis.plot(x, y, "o", color=BLUE, markersize=3, alpha=0.4, markeredgewidth=0)
        both = [*x, *y] or [0, 1]
        _draw_diagonal(axis, [min(both), max(both)])
        axis.locator_params(axis="x", nbins=3)  # -200000 beside 0
        axis.locator_params(axis="y", nbins=4)
        set_title(axis, shorten_name(table.names[j], 20))
        facts = f"r {metric_names.number_text(pearson_r[j], '.2f')}\nn {len(x)}"
        axis.text(0.03, 0.97, facts, transform=axis.transAxes, va="top", fontsize=7)
    figure.supxlabel("true", fontsize=9, color=SOFT)
    figure.supylabel("predicted", fontsize=9, color=SOFT)
    save_figure(figure, path)


def plot_confusion(confusion, names, path):
    """Confusion matrix as PNG: (C, C) counts, rows true, columns predicted; shade: share of the row."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    labels = without_math(names, 22)
    side = 2.6 + 0.42 * len(labels)
    figure, (axis,) = new_figure(1, 1, (side, side))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), count in np.ndenumerate(confusion):
        colour = "white" if shares[i, j] > 0.55 else INK
        axis.text(j, i, f"{count}\n{shares[i, j]:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(labels)), labels, color=INK, rotation=90)
    axis.set_yticks(range(len(labels)), labels, color=INK)
    axis.grid(visible=False)
    _label_axes(axis, "predicted", "true")
    set_title(axis, f"n {confusion.sum()}", f"{np.trace(confusion)} right")
    save_figure(figure, path)


def plot_reliability(probability, label, path, before=None):
    """Reliability diagram as PNG: share of right rows over the confidence, with Wilson intervals.

    probability, before: (N, C), after and (None: not drawn) before calibration; label: (N,). The
    title tells the ECE and what a perfectly calibrated model of these confidences shows at this n:
    mean, 95th percent.
    """
    figure, (axis,) = new_figure(1, 1, (4.2, 4.2))
    _draw_diagonal(axis, [0, 1])
    if before is not None:
        _draw_reliability(axis, before, label, ORANGE, "before")
    _draw_reliability(axis, probability, label, BLUE, "after")
    if before is not None:
        _add_legend(axis)
    confidence = probability.max(1)
    ece = class_scores.classification_metrics(probability, label).overall["ece"]
    calibrated = calibrating.simulated_ece(confidence)
    set_title(
        axis,
        f"ECE {ece:.3f}, n {len(confidence)}\nof a calibrated model "
        f"{calibrated.mean():.3f} (95 % under {np.quantile(calibrated, 0.95):.3f})",
    )
    axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
    _label_axes(axis, "confidence", "share of right answers")
    save_figure(figure, path)


def _draw_reliability(axis, probability, label, colour, name):
    """One model's bins with Wilson intervals; rows of (N, C) and (N,)."""
    import pandas as pd

    rows = pd.DataFrame({"confidence": probability.max(1), "right": probability.argmax(1) == label})
    bins = rows.groupby(class_scores.confidence_bins(rows["confidence"], adaptive=False))
    means = bins.mean()
    low, high = subject_intervals.share_interval(bins["right"].sum(), bins.size())
    axis.vlines(means["confidence"], low, high, color=colour, linewidth=1.2, alpha=0.6)
    axis.plot(means["confidence"], means["right"], "o-", color=colour, label=name)


def plot_risk_coverage(confidence, correct, path):
    """Risk-coverage curve as PNG: error rate among the most confident share of the rows; (N,) each."""
    coverage, risk = calibrating.risk_coverage(confidence, correct)
    figure, (axis,) = new_figure(1, 1, (4.2, 3.0))
    axis.step(coverage, risk, color=BLUE, where="post")
    half = risk[np.searchsorted(coverage, 0.5)]
    axis.axhline(risk[-1], color=ORANGE, linestyle="--", label="random order")
    _add_legend(axis)
    set_title(axis, "risk over coverage", f"all {risk[-1]:.2f}, surest half {half:.2f}")
    axis.set(xlim=(0, 1.02), ylim=(-0.002, max(0.1, 1.15 * risk.max())))
    _label_axes(axis, "coverage: share of rows, most confident first", "error rate")
    save_figure(figure, path)


def plot_precision_recall(probability, label, names, path, shown):
    """Precision-recall and ROC curves as PNG: each of the classes `shown` (indices) against the rest.

    probability: (N, C); label: (N,); a class without rows, or without others, has no curve. The
    dotted line is the precision of a random order.
    """
    figure, axes = new_figure(2, 2, (3.9, 3.9 + 0.08 * len(shown)))
    for axis in axes:  # the style tells apart what has one colour
        axis.set_prop_cycle(color=CYCLE * 4, linestyle=np.repeat(["-", "--", "-.", ":"], len(CYCLE)))
    for c, name in zip(shown, without_math([names[c] for c in shown], 28)):
        score = probability[:, c]
        is_own = label == c
        if len(set(is_own)) < 2:
            continue
        n_called, found = class_scores.hits_by_threshold(score, is_own)
        false = n_called - found
        recall = found / found[-1]
        precision = found[1:] / n_called[1:]
        auc, average_precision = class_scores.ranking_metrics(score, is_own, np.ones((1, len(score))))
        named = f"{name}: AP {average_precision[0]:.2f}, AUC {auc[0]:.2f}"
        curve, = axes[0].step(recall, [precision[0], *precision], label=named)
        axes[0].axhline(is_own.mean(), color=curve.get_color(), linewidth=1, linestyle=":")
        axes[1].plot(false / false[-1], recall)
    _draw_diagonal(axes[1], [0, 1])
    _label_axes(axes[0], "recall", "precision")
    _label_axes(axes[1], "false positive rate", "recall")
    for axis, title in zip(axes, ("precision-recall", "ROC")):
        set_title(axis, title, f"n {len(label)}")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    save_figure(figure, path)
