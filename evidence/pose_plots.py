"""Plot of a probe's transitions and their split."""
import numpy as np

from evidence import plotting


def plot_dataset(split, groups, facts, samples, path):
    """dataset_statistics.png: transitions of each part and group, the facts as text, sample frames.

    split: {part: rows}; groups: (N,) patients or folders; facts: lines of text; samples: up to 4 (title, pixels).
    """
    n_panels = 3 + len(samples)
    figure, axes = plotting.new_figure(n_panels, 4, (3.2, 2.6))
    parts, by_group, text = axes[:3]
    names = sorted(set(groups))
    places = np.arange(len(names))
    left = np.zeros(len(names))
    for part, rows in split.items():  # both axes take the same colours in turn
        parts.bar(part, len(rows))
        counts = np.array([np.sum(groups[rows] == name) for name in names])
        by_group.barh(places, counts, left=left)
        left += counts
    labels = plotting.without_math([name[-14:] for name in names], 14)
    by_group.set_yticks(places, labels, fontsize=7 if len(names) <= 20 else 4)
    plotting.set_title(parts, "transitions")
    plotting.set_title(by_group, "per patient or folder")
    plotting.write_lines(text, facts)
    for axis, (title, pixels) in zip(axes[3:], samples):
        axis.imshow(pixels, cmap="gray")
        axis.axis("off")
        plotting.set_title(axis, title[-26:])
    plotting.save_figure(figure, path)
