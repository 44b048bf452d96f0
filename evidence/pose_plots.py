"""Plots of a probe's transitions: the data and their split, and the errors of each patient."""
import numpy as np

from evidence import plotting
from readers import probe_poses

PART_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MOST_PATIENTS = 30


def _title(axis, text):
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold")


def plot_dataset(split, groups, facts, samples, path):
    """dataset_statistics.png: transitions of each part and group, the facts as text, sample frames.

    split: {part: rows}; groups: (N,) patients or folders; facts: lines of text; samples: up to 4 (title, pixels).
    """
    figure, axes = plotting.new_figure(3 + len(samples), 4, (3.2, 2.6), (0.75, 0.15, 0.3, 0.3))
    parts, by_group, text = axes[:3]
    names = sorted(set(groups))
    left = np.zeros(len(names))
    for k, (part, rows) in enumerate(split.items()):
        colour = PART_COLOURS[k % len(PART_COLOURS)]
        counts = np.array([np.sum(groups[rows] == name) for name in names])
        parts.bar(part, len(rows), color=colour)
        by_group.barh(range(len(names)), counts, left=left, color=colour)
        left += counts
    by_group.set_yticks(range(len(names)), [name[-14:] for name in names],
                        fontsize=7 if len(names) <= 20 else 4)
    _title(parts, "transitions")
    _title(by_group, "per patient or folder")
    text.axis("off")
    text.text(0, 0.95, "\n".join(facts), fontsize=9, va="top", linespacing=1.7)
    for axis, (title, pixels) in zip(axes[3:], samples):
        axis.imshow(pixels, cmap="gray")
        axis.set_title(title[-30:], fontsize=7, loc="left")
        axis.axis("off")
    plotting.save_figure(figure, path)


def plot_per_patient(rows, baseline, path):
    """Horizontal bars: MAE of each axis and patient, the baseline's as a tick; the first 30 of pose_scores.patient_rows.
    """
    rows = rows[:MOST_PATIENTS]
    n_shown = len(rows)
    place = np.arange(n_shown)
    labels = [row["patient"][-18:] for row in rows]
    figure, axes = plotting.new_figure(6, 3, (3.4, 0.75 + 0.22 * n_shown), (0.2, 0.15, 0.3, 0.3),
                                       edges=(plotting.label_inches(labels), 0.35), share_y=True)
    for axis, name in zip(axes, probe_poses.AXES):
        axis.barh(place, [row[f"mae_{name}"] for row in rows], color="#56B4E9", height=0.62, label="model")
        axis.plot([row[f"baseline_mae_{name}"] for row in rows], place, "|", color="#D55E00", markersize=11, markeredgewidth=2.4,
                  label=baseline)
        _title(axis, name)
        axis.set_xlim(left=0)
    axes[0].set_yticks(place, labels)
    axes[0].set_ylim(n_shown - 0.4, -0.6)
    plotting.add_figure_legend(figure, axes[0])
    plotting.save_figure(figure, path)
