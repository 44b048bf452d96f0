"""Small pictures in the Okabe-Ito colours, drawn without pyplot: no window and no hidden state.
"""
import io
import itertools
import math

import numpy as np

import common
from evidence import calibrating, subject_intervals

_INK, _SOFT, _GRID = "#20262d", "#66707a", "#e3e7ea"
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"


def new_figure(rows, columns, panel_inches, used, **subplots):
    """(figure, its first `used` axes) in the look of all plots; panel_inches = (width, height) of one panel."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(columns * panel_inches[0], rows * panel_inches[1]), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots).ravel()
    for k, axis in enumerate(axes):
        axis.set_visible(k < used)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_SOFT)
        axis.tick_params(colors=_SOFT, labelsize=8, length=3)
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes[:used]


def save_figure(figure, path):
    """Write the figure as a PNG of 64 colours: a third of the usual size, the same bytes for the same figure."""
    from PIL import Image
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    common.write_whole(path, packed.getvalue())


def _values(rows, key):
    """One column of a list of dicts as floats (len(rows),); an empty, missing or None cell is NaN."""
    return np.array([float("nan") if row.get(key) in (None, "") else float(row[key]) for row in rows])


def _metric_families(history):
    """{family: [columns]}: train_loss and val_loss share a panel, and so do val_mae and val_mae_left."""
    columns = [c for c in dict.fromkeys(c for row in history for c in row) if c.startswith(("train_", "val_"))]
    names = [column.split("_", 1)[1] for column in columns]
    families = {}
    for column, name in zip(columns, names):
        roots = [other for other in names if name == other or name.startswith(other + "_")]
        families.setdefault(min(roots, key=len), []).append(column)
    return families


def _draw_history_panel(axis, history, family, columns, best_epoch):
    """One family over the epochs; the title tells the value of its first val_ column at the best epoch."""
    epochs, colours = _values(history, "epoch"), itertools.cycle([_BLUE, _GREEN, _PURPLE, _YELLOW, _SKY])
    for column in columns:
        colour, style = (_ORANGE, "--") if column.startswith("train_") else (next(colours), "-")
        axis.plot(epochs, _values(history, column), style, color=colour, label=column, marker=".", markersize=3)
    axis.set_title(family, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axis.set_xlabel("epoch", fontsize=8, color=_SOFT)
    axis.locator_params(axis="x", integer=True)
    if len(columns) > 1:
        axis.legend(fontsize=7, frameon=False, labelcolor=_INK)
    if best_epoch in epochs:
        shown = next((column for column in columns if column.startswith("val_")), columns[0])
        value = _values(history, shown)[epochs == best_epoch][0]
        axis.axvline(best_epoch, color=_INK, linewidth=0.9, linestyle=":")
        axis.plot([best_epoch], [value], "o", color=_INK, markersize=4)
        axis.set_title(f"epoch {best_epoch:g}: {value:.3g}", loc="right", fontsize=8, color=_SOFT)


def plot_history(history, path, best_epoch=None):
    """Learning curves as PNG: a panel per family of train_ and val_ columns, then the learning rate (log scale).

    history: dicts with epoch and any train_*, val_* and learning_rate (None or "" leaves a gap). best_epoch is marked
    in every panel. It takes half a second or more, so it belongs at the end of a run, not into each epoch.
    """
    families = _metric_families(history)
    if np.nanmax([0.0, *_values(history, "learning_rate")]) > 0:
        families["learning_rate"] = ["learning_rate"]
    columns = min(3, len(families))
    figure, axes = new_figure(-(-len(families) // columns), columns, (3.5, 2.5), len(families))
    for axis, (family, members) in zip(axes, families.items()):
        _draw_history_panel(axis, history, family, members, best_epoch)
        axis.set_yscale("log" if family == "learning_rate" else "linear")
    save_figure(figure, path)


def plot_per_target(rows, path, metrics=("pearson_r", "r2")):
    """Horizontal bars per target (1 to 40), best on top, as PNG; one panel per metric.

    rows: dicts with target and, for each metric m, the keys m, m_low and m_high (interval), baseline_m and ceiling_m;
    all but target and m may be missing. The axis ends at -0.5; the number beside the bar is always the true one.
    """
    rows = sorted(rows, key=lambda row: np.nan_to_num(_values([row], metrics[0])[0], nan=-math.inf))
    figure, axes = new_figure(1, len(metrics), (4.8, 1.15 + 0.26 * len(rows)), len(metrics), sharey=True)
    height = np.arange(len(rows))
    for axis, metric in zip(axes, metrics):
        value, low, high, baseline, ceiling = (_values(rows, key) for key in (
            metric, f"{metric}_low", f"{metric}_high", f"baseline_{metric}", f"ceiling_{metric}"))
        axis.barh(height, value, height=0.62, color=_SKY, label="model")
        axis.hlines(height, low, high, color=_INK, linewidth=1.3, label="interval")
        axis.plot(baseline, height, "|", color=_ORANGE, markersize=11, markeredgewidth=2.4, label="baseline")
        if np.isfinite(ceiling).any():
            axis.plot(ceiling, height, "D", color=_INK, markersize=4.5, markerfacecolor="none", label="noise ceiling")
        axis.set_title(metric, loc="left", fontsize=10, fontweight="bold", color=_INK)
        axis.set_xlim(max(-0.5, 1.1 * np.nanmin([0.0, *value, *low, *baseline])), 1.0)
        for y, number in zip(height, value):
            axis.annotate(f"{number:.2f}", (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.axvline(0, color=_SOFT, linewidth=0.9)
        axis.grid(visible=False, axis="y")
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(height, [str(row["target"])[:28].replace("$", r"\$") for row in rows], color=_INK)
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


def plot_scatter(predicted, target, names, path):
    """Small multiples of predicted over true as PNG, a panel per target (up to 40) with identity line, r and n.

    predicted, target: (N, R) in the original unit, NaN = missing; names: R labels.
    """
    predicted, target = np.asarray(predicted, float), np.asarray(target, float)  # (N, R)
    known = np.isfinite(predicted) & np.isfinite(target)
    pearson_r = common.regression_metrics(predicted, np.where(known, target, np.nan))["pearson_r"]  # (R,)
    columns, inches = (min(len(names), 4), 2.4) if len(names) <= 16 else (7, 1.75)
    figure, axes = new_figure(-(-len(names) // columns), columns, (inches, inches), len(names))
    for j, axis in enumerate(axes):
        x, y = target[known[:, j], j], predicted[known[:, j], j]  # (n,)
        low, high = (min(*x, *y), max(*x, *y)) if len(x) else (0.0, 1.0)
        margin = 0.05 * (high - low) or 0.5
        axis.plot([low, high], [low, high], color=_SOFT, linewidth=1, linestyle="--")
        axis.plot(x, y, "o", color=_BLUE, markersize=3, alpha=0.5 if len(x) < 300 else 0.2, markeredgewidth=0)
        axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), box_aspect=1)
        axis.locator_params(nbins=4 if columns <= 4 else 2)
        axis.set_title(str(names[j])[:18], loc="left", fontsize=8, fontweight="bold", color=_INK, parse_math=False)
        axis.annotate(f"r {pearson_r[j]:.2f}\nn {len(x)}", (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=7)
    figure.supxlabel("true", fontsize=9, color=_SOFT)
    figure.supylabel("predicted", fontsize=9, color=_SOFT)
    save_figure(figure, path)


def _panel_title(axis, title, note=""):
    """Title at the left in ink, a note at the right in the soft colour."""
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK, parse_math=False)
    axis.set_title(note, loc="right", fontsize=8, color=_SOFT, parse_math=False)


def plot_confusion(confusion, names, path):
    """Confusion matrix as PNG: (C, C) counts, rows true, columns predicted; the shade is the share of the row."""
    confusion = np.asarray(confusion, np.int64)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = max(2.9, 1.5 + 0.62 * len(names))
    figure, (axis,) = new_figure(1, 1, (side + 0.5, side), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in itertools.product(range(len(names)), repeat=2):
        axis.text(j, i, f"{confusion[i, j]}\n{share[i, j]:.0%}", ha="center", va="center", fontsize=8,
                  color="white" if share[i, j] > 0.55 else _INK)
    labels = [str(name)[:22].replace("$", r"\$") for name in names]
    turned = {"rotation": 40, "ha": "right"} if len(names) > 4 else {}
    axis.set_xticks(range(len(names)), labels, color=_INK, **turned)
    axis.set_yticks(range(len(names)), labels, color=_INK)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("predicted", fontsize=9, color=_SOFT)
    axis.set_ylabel("true", fontsize=9, color=_SOFT)
    _panel_title(axis, f"n {confusion.sum()}", f"{np.trace(confusion)} right")
    save_figure(figure, path)


def plot_reliability(probability, label, path, before=None, n_bins=common.ECE_BINS, seed=0):
    """Reliability diagram as PNG: share of right rows over the confidence, a bin a point, its area the rows in it.

    probability, before: (N, C), after and (None: not drawn) before calibration; label: (N,), below 0 = missing. The
    title tells the ECE and what a perfectly calibrated model of these confidences shows at this n: mean, 95th percent.
    """
    label = np.asarray(label, np.int64)
    figure, (axis,) = new_figure(1, 1, (4.2, 3.9), 1)
    axis.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle="--")
    for values, colour, name in ((before, _ORANGE, "before"), (probability, _BLUE, "after")):
        if values is not None:
            values = np.asarray(values, np.float64)[label >= 0]
            _draw_reliability(axis, values.max(1), values.argmax(1) == label[label >= 0], n_bins, colour, name)
    confidence = np.asarray(probability, np.float64)[label >= 0].max(1, initial=0)
    ece = common.classification_metrics(probability, label).overall["ece"]
    null, high = (calibrating.expected_ece(confidence, n_bins, seed=seed, level=level) for level in (None, 0.95))
    _panel_title(axis, f"ECE {ece:.3f}, n {len(confidence)}\nof a calibrated model {null:.3f} (95 % under {high:.3f})")
    axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    axis.set_xlabel("confidence", fontsize=9, color=_SOFT)
    axis.set_ylabel("share of right answers", fontsize=9, color=_SOFT)
    if before is not None:
        axis.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="upper left")
    save_figure(figure, path)


def _draw_reliability(axis, confidence, correct, n_bins, colour, name):
    """One model's bins with Wilson intervals."""
    bins = common.confidence_bins(confidence, n_bins, adaptive=False)
    ones = np.ones((1, len(bins)))
    count, mean, right = (common.sums_by(bins, n_bins, ones * part)[0] for part in (1, confidence, correct))
    used = count > 0
    ends = np.array([subject_intervals.wilson_interval(k, n) for k, n in zip(right[used], count[used])]).reshape(-1, 2)
    x = mean[used] / count[used]
    axis.vlines(x, ends[:, 0], ends[:, 1], color=colour, linewidth=1.2, alpha=0.6)
    axis.plot(x, right[used] / count[used], color=colour, linewidth=1, alpha=0.6)
    axis.scatter(x, right[used] / count[used], 12 + 150 * count[used] / max(count.sum(), 1), color=colour,
                 label=name, zorder=3, linewidths=0)


def plot_risk_coverage(confidence, correct, path):
    """Risk-coverage curve as PNG: the error rate among the most confident share of the rows, (N,) and (N,) bool."""
    coverage, risk = calibrating.risk_coverage(confidence, correct)
    figure, (axis,) = new_figure(1, 1, (4.2, 3.0), 1)
    axis.plot(coverage, risk, color=_BLUE, drawstyle="steps-post", linewidth=1.4, label="model")
    if len(risk):
        axis.axhline(risk[-1], color=_ORANGE, linestyle="--", linewidth=1.2, label="random order")
        axis.legend(fontsize=8, frameon=False, labelcolor=_INK)
    half = risk[np.searchsorted(coverage, 0.5)] if len(risk) else math.nan
    _panel_title(axis, "risk over coverage", f"all {risk[-1] if len(risk) else math.nan:.2f}, surest half {half:.2f}")
    axis.set(xlim=(0, 1.02), ylim=(0, max(0.1, 1.15 * risk.max(initial=0))))
    axis.set_xlabel("coverage: share of rows, most confident first", fontsize=9, color=_SOFT)
    axis.set_ylabel("error rate", fontsize=9, color=_SOFT)
    save_figure(figure, path)


def plot_precision_recall(probability, label, names, path, positive=None):
    """Precision-recall and ROC curves as PNG, each class against the rest (with `positive` that class alone).

    probability: (N, C); label: (N,), below 0 = missing; a class without rows, or without others, is left out.
    """
    label = np.asarray(label, np.int64)
    probability, label = np.asarray(probability, np.float64)[label >= 0], label[label >= 0]
    shown = [c for c in (range(len(names)) if positive is None else [positive]) if 0 < (label == c).sum() < len(label)]
    figure, axes = new_figure(1, 2, (3.9, 3.8), 2)
    colours = itertools.cycle([_BLUE, _ORANGE, _GREEN, _PURPLE, _YELLOW, _SKY])
    for c, colour in zip(shown, colours):
        _draw_curves(axes, probability[:, c], label == c, colour, str(names[c])[:18].replace("$", r"\$"))
    axes[1].plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle="--")
    for axis, title, x, y in ((axes[0], "precision-recall", "recall", "precision"),
                              (axes[1], "ROC", "false positive rate", "recall")):
        _panel_title(axis, title, f"n {len(label)}")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
        axis.set_xlabel(x, fontsize=9, color=_SOFT)
        axis.set_ylabel(y, fontsize=9, color=_SOFT)
        place = "lower left" if axis is axes[0] else "lower right"
        if shown:
            axis.legend(fontsize=7, frameon=False, labelcolor=_INK, loc=place)
    save_figure(figure, path)


def _draw_curves(axes, score, is_positive, colour, name):
    """Both curves of one class; the dotted line is the precision of a random order."""
    order, first = common.tied_runs(score)
    ends = np.append(first[1:], len(score))
    found = np.cumsum(is_positive[order])[ends - 1]
    recall, false_rate = found / is_positive.sum(), (ends - found) / (~is_positive).sum()
    auc, precision = (float(value[0]) for value in common.ranking_metrics(score, is_positive))
    axes[0].plot(np.append(0, recall), np.append(found[0] / ends[0], found / ends), color=colour, linewidth=1.4,
                 drawstyle="steps-pre", label=f"{name}: AP {precision:.2f}")
    axes[0].axhline(is_positive.mean(), color=colour, linewidth=1, linestyle=":")
    axes[1].plot(np.append(0, false_rate), np.append(0, recall), color=colour, linewidth=1.4,
                 label=f"{name}: AUC {auc:.2f}")
