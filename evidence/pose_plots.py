"""Plots of a probe's transitions: the data and their split, and the errors of each patient."""
import itertools

import numpy as np

from evidence import plotting
from readers import probe_poses

PART_COLOURS = (plotting.BLUE, plotting.YELLOW, plotting.GREEN, plotting.PURPLE)
MOST_PATIENTS = 30
MARGINS = (0.2, 0.15, 0.3, 0.3)  # of a panel, in inches


def plot_dataset(split, groups, facts, samples, path):
    """dataset_statistics.png: transitions of each part and group, the facts as text, sample frames.

    split: {part: rows}; groups: (N,) patients or folders; facts: lines of text; samples: up to 4 (title, pixels).
    """
    n_panels = 3 + len(samples)
    margins = (0.75, *MARGINS[1:])
    figure, axes = plotting.new_figure(n_panels, 4, (3.2, 2.6), margins)
    parts, by_group, text = axes[:3]
    names = sorted(set(groups))
    places = np.arange(len(names))
    left = np.zeros(len(names))
    for (part, rows), colour in zip(split.items(), itertools.cycle(PART_COLOURS)):
        parts.bar(part, len(rows), color=colour)
        counts = np.array([np.sum(groups[rows] == name) for name in names])
        by_group.barh(places, counts, left=left, color=colour)
        left += counts
    labels = [name[-14:] for name in names]
    by_group.set_yticks(places, labels, fontsize=7 if len(names) <= 20 else 4)
    plotting.set_title(parts, "transitions")
    plotting.set_title(by_group, "per patient or folder")
    text.axis("off")
    text.text(0, 0.95, "\n".join(facts), fontsize=9, va="top", linespacing=1.7)
    for axis, (title, pixels) in zip(axes[3:], samples):
        axis.imshow(pixels, cmap="gray")
        axis.axis("off")
        plotting.set_title(axis, title[-26:])
    plotting.save_figure(figure, path)


def plot_per_patient(rows, baseline, path):
    """Bars: MAE of each axis and patient, the baseline's as a tick; the first 30 of pose_scores.patient_rows."""
    rows = rows[:MOST_PATIENTS]
    place = np.arange(len(rows))
    labels = [row["patient"][-18:] for row in rows]
    height = 0.75 + 0.22 * len(rows)
    edges = (plotting.label_inches(labels), 0.35)
    figure, axes = plotting.new_figure(6, 3, (3.4, height), MARGINS, edges, share_y=True)
    for axis, name in zip(axes, probe_poses.AXES):
        of_model = [row[f"mae_{name}"] for row in rows]
        of_baseline = [row[f"baseline_mae_{name}"] for row in rows]
        axis.barh(place, of_model, color=plotting.SKY, height=0.62, label="model")
        plotting.mark_baseline(axis, of_baseline, place, baseline)
        axis.set_xlim(left=0)
        plotting.set_title(axis, name)
    axes[0].set_yticks(place, labels)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    plotting.add_figure_legend(figure, axes[0])
    plotting.save_figure(figure, path)
