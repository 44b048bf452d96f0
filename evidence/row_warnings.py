"""Which predictions deserve doubt: the column `warning`.

What a model knows of its training data for this stands in its checkpoint as known_data.

Letters: N train rows, M rows, F features, R scores.
"""
import numpy as np

from evidence import baseline_models


def known_data(train, held_out, target=None):
    """{mean, sd: (F,) of the features (N, F) of the train rows; farthest: the largest distance of a held-out row}.

    held_out: (M, F) of rows that no network was trained on. A new row like them is farther in one
    of M + 1 cases. target: (N, R) scores of the train rows, whose label_range (2, R) is kept too.
    """
    mean, sd = baseline_models.standardisation(train, sd_floor=0.1)
    known = {"mean": mean, "sd": sd}
    known["farthest"] = distance(held_out, known).max()
    if target is not None:
        known["label_range"] = np.stack([np.nanmin(target, axis=0), np.nanmax(target, axis=0)])
    return known


def distance(features, known):
    """(M,) root mean square over features (M, F) of the distance from the train mean in train sds."""
    return (((features - known["mean"]) / known["sd"]) ** 2).mean(1) ** 0.5


def find(unit, say, content, features, predicted=None):
    """{what: (M,) bool}: which rows are unlike the training data, and which scores lie outside the training labels."""
    if "known_data" not in content:
        say(f"note: a checkpoint does not say what its training {unit} are like, as best_model.pth "
            "of a finished run does; the column warning is without it")
        return {}
    known = {name: np.asarray(value) for name, value in content["known_data"].items()}
    limit = 1.01 * known["farthest"]  # another device or precision rounds otherwise
    flags = {f"unlike the training {unit}": distance(features, known) > limit}
    if "label_range" in known:
        low, high = known["label_range"]
        outside = (predicted < low) | (predicted > high)  # (M, R)
        for name, column in zip(content["names"], outside.T):
            flags[f"{name} outside the training labels"] = column
    return flags


def texts(members, seen, unit, say):
    """(M,) text on each row, '' = nothing: what all members find, and whether one was trained on it; each is counted.

    members: (content of its checkpoint, features (M, F), for scores predicted (M, R)) of each
    model, NaN = unreadable; all look at the mean of the scores; seen: (M,) of seen_rows.WORDS;
    unit: what rows are, as pictures.
    """
    flags = {"trained on": seen == "train"}
    contents, features, *predicted = zip(*members)
    means = [np.mean(each, axis=0) for each in predicted]
    for content, own in zip(contents, features):
        for what, is_so in find(unit, say, content, own, *means).items():
            flags[what] = flags.get(what, True) & is_so
    for what, is_so in flags.items():
        if is_so.any():
            say(f"warning: {is_so.sum()} of {len(is_so)} {unit}: {what}")
    found = ["; ".join(what for what, is_so in flags.items() if is_so[row]) for row in range(len(seen))]
    return np.array(found, dtype=str)
