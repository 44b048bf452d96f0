"""What metadata predict without a pixel.

Letters: N rows, R scores.
"""
import itertools
import math
import re

import numpy as np

import common
from evidence import splitting, subject_intervals
from readers import event_tables


def _level_rates(codes, target, train, test):
    """Train mean of the target in each test row's level: codes (N,), target (N, R), NaN = missing -> (m, R).

    One row at the overall train mean is added to each level (smoothing); a level without train rows has that mean.
    """
    labelled = ~np.isnan(target[train])
    overall, levels = common.mean_without_nan(target[train], axis=0), codes.max() + 1
    total, count = np.zeros((levels, target.shape[1])), np.zeros((levels, target.shape[1]))
    np.add.at(total, codes[train], np.where(labelled, target[train], 0.0))
    np.add.at(count, codes[train], labelled)
    return ((total + overall) / (count + 1))[codes[test]]


def _level_codes(levels, n_rows, train, position):
    """{name: (N,) codes} of the columns that can tell anything (2 levels or more, up to three for four train rows),
    and `row order`: up to 20 blocks of neighbouring rows, of 10 train rows or more."""
    codes = {name: np.unique(np.asarray(values, str), return_inverse=True)[1] for name, values in levels.items()}
    codes = {name: code for name, code in codes.items() if 2 <= code.max(initial=0) + 1 <= max(2, 0.75 * len(train))}
    blocks = min(20, max(2, len(train) // 10))
    position = np.arange(n_rows) if position is None else np.asarray(position, np.int64)
    return {**codes, "row order": position * blocks // (position.max(initial=0) + 1)}


def _by_fold(rows):
    """Row indices, or a list of them, -> list of (n,) int64."""
    several = isinstance(rows, list) and len(rows) > 0 and np.ndim(rows[0]) > 0
    return [np.asarray(each, np.int64) for each in (rows if several else [rows])]


def level_priors(levels, label, train, test, groups=None, positive=1, position=None, draws=2000, seed=0):
    """What metadata alone predict of a class, without a pixel: a list of dicts, highest AUC first.

    levels: dict of name -> (N,) values; label: (N,) class indices, below 0 = missing; train, test: row indices, or
    lists of them, one entry a fold, whose test rows are judged as one; groups: (N,) names for the interval. Each
    column's predictor is the smoothed train rate of the `positive` class in the row's level, the rate of all train rows
    for a new level; `row order` does the same with blocks of neighbouring rows (position: (N,) row number of each in
    its own file; None = its index). dict(name, n_levels, auc, low, high, red_flag False); low and high are NaN where
    there is no interval. Rates count from their fold's overall rate: it is high where the held-out rows are negative.
    """
    label, train, test = np.asarray(label), _by_fold(train), _by_fold(test)
    held_out = np.concatenate(test)
    target, rows = np.where(label < 0, np.nan, label == positive)[:, None].astype(np.float64), []
    is_positive = np.where(label[held_out] < 0, -1, label[held_out] == positive)
    subjects = None if groups is None else np.asarray(groups)[held_out]
    for name, codes in _level_codes(levels, len(label), train[0], position).items():
        rate = np.concatenate([_level_rates(codes, target, *fold)[:, 0] - common.mean_without_nan(target[fold[0], 0])
                               for fold in zip(train, test)])
        result = subject_intervals.bootstrap_classification(np.stack([-rate, rate], 1), is_positive, subjects, draws=draws, seed=seed)
        auc = result.overall.model["roc_auc"]
        rows.append({"name": name, "n_levels": int(codes.max()) + 1, "auc": float(auc.value), "low": float(auc.low),
                     "high": float(auc.high), "red_flag": False})
    return sorted(rows, key=lambda row: -np.nan_to_num(row["auc"], nan=-1.0))


def level_means(levels, target, train, test, groups=None, position=None, draws=2000, seed=0):
    """What metadata alone predict of (N, R) scores, NaN = missing: a list of dicts, highest R2 first.

    As level_priors, with the smoothed train mean of the level: dict(name, n_levels, r2, low, high, mae, mae_low,
    mae_high, red_flag False), R2 and MAE as means over targets.
    """
    target, train, test = np.asarray(target, np.float64), _by_fold(train), _by_fold(test)
    held_out = np.concatenate(test)
    subjects, rows = None if groups is None else np.asarray(groups)[held_out], []
    for name, codes in _level_codes(levels, len(target), train[0], position).items():
        means = np.concatenate([_level_rates(codes, target, *fold) for fold in zip(train, test)])
        result = subject_intervals.bootstrap_regression(means, target[held_out], subjects, None, draws, seed)
        r2, mae = (result.overall.model[metric] for metric in ("r2", "mae"))
        rows.append({"name": name, "n_levels": int(codes.max()) + 1, "r2": float(r2.value), "low": float(r2.low),
                     "high": float(r2.high), "mae": float(mae.value), "mae_low": float(mae.low),
                     "mae_high": float(mae.high), "red_flag": False})
    return sorted(rows, key=lambda row: -np.nan_to_num(row["r2"], nan=-math.inf))


def flag_confounds(rows, model_low):
    """The rows of level_priors or level_means with red_flag set where the prior reaches the model's interval.

    model_low: the lower end of the interval of the model's AUC or R2 (its value where there is no interval); NaN flags
    nothing, and neither does a prior that knows nothing (AUC up to .5, R2 up to 0).
    """
    def reaches(row):
        value, chance = (row["auc"], 0.5) if "auc" in row else (row["r2"], 0.0)
        return bool(value > chance and value >= model_low)
    return [{**row, "red_flag": reaches(row)} for row in rows]


def within_level_auc(score, label, levels, positive=1):
    """AUC over the pairs of a positive and another row of the same level: (N,) scores, labels, levels -> float.

    What is left of an AUC once a level can no longer tell the class; NaN without such a pair.
    """
    score, is_positive = np.asarray(score, np.float64), np.asarray(label) == positive
    levels, labelled, won, pairs = np.asarray(levels, str), np.asarray(label) >= 0, 0.0, 0
    for level in np.unique(levels):
        here = labelled & (levels == level)
        count = int(is_positive[here].sum()) * int((~is_positive[here]).sum())
        won += count * common.ranking_metrics(score[here], is_positive[here])[0][0] if count else 0.0
        pairs += count
    return float(won / pairs) if pairs else math.nan


def within_level_metrics(predicted, target, levels):
    """regression_metrics of (N, R) predictions and targets after the mean of each level is taken from both."""
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    centred, levels = [np.where(np.isnan(target), np.nan, predicted), target.copy()], np.asarray(levels, str)
    for level, part in itertools.product(np.unique(levels), centred):
        part[levels == level] -= common.mean_without_nan(part[levels == level], axis=0)
    return common.regression_metrics(*centred)


def prior_levels(table):
    """{name: (N,) text} columns that know no pixels: video, pair of animals, camera, pen, day, hour, and all others."""
    columns = {name: [event_tables.plain_level(cell) for cell in table.extra[name]] for name in table.extra
               if not re.search("row_order|filename|_time$|_path$|_idx$", name)}  # hour and video stand for these
    columns = {"video": list(table.videos), **columns}
    return {name: np.array(values, dtype=str) for name, values in columns.items() if len(set(values)) > 1}


def judged_rows(table, is_known):
    """{what a split keeps whole: (train rows, judged rows), lists with an entry a fold} among the known rows.

    With parts: from train to test, else val. Without: five folds that keep events whole, so that a prior may know the
    animals and places it is judged on, and, where there are groups or videos, five that keep those whole.
    """
    parts, rows = sorted(set(table.parts)), np.flatnonzero(is_known)
    if len(parts) > 1:
        held = next(part for part in ("test", "val", *parts) if part in parts and part != "train")
        fitted = "train" if "train" in parts else next(part for part in parts if part != held)
        train, judged = (rows[table.parts[rows] == part] for part in (fitted, held))
        return {"parts": ([train], [judged])} if len(train) and len(judged) else {}
    ways = {}
    for units in (event_tables.split_keys(table, "event")[rows], event_tables.split_keys(table)[rows]):
        if len(set(units)) >= 5:
            fold_of = splitting.make_folds(len(rows), 5, event_tables.strata_of(table)[rows], units, keys=table.clip_ids[rows])
            ways[f"{units[0].split()[0]}s"] = ([rows[fold_of != k] for k in range(5)],
                                               [rows[fold_of == k] for k in range(5)])
    return ways


def no_pixel_priors(table, positive=None):
    """Dicts of what, across, name, auc (classes) or r2 (scores), low, high: each metadata column as the predictor.

    Rates or means come from other rows than those judged, see judged_rows; for the class `positive` (default: the
    rarest). `row order` compares the same places of the manifests.
    """
    levels, found = prior_levels(table), []
    position = np.rint(1e6 * table.extra["row_order"].to_numpy(float)).astype(int)
    if table.label is None:
        for across, (train, judged) in judged_rows(table, ~np.isnan(table.target).all(1)).items():
            rows = level_means(levels, table.target, train, judged, table.groups, position=position)
            found += [{"what": "scores", "across": across, **row} for row in rows]
        return found
    counts = [(table.label == c).sum() or len(table) for c in range(len(table.names))]
    positive = table.names[int(np.argmin(counts))] if positive is None else positive
    label = np.where(table.label < 0, -1, table.label == table.names.index(positive))
    for across, (train, judged) in judged_rows(table, label >= 0).items():
        if len(set(label[np.concatenate(judged)])) == 2:
            rows = level_priors(levels, label, train, judged, table.groups, position=position)
            found += [{"what": positive, "across": across, **row} for row in rows]
    return found
