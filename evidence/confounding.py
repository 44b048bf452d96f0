"""What metadata predict without a pixel.

Letters: N rows, R scores.
"""

import math
import re

import numpy as np

import common
from evidence import prediction_tables, reporting, splitting, subject_intervals
from readers import event_tables

NO_CONFOUND = re.compile(
    "row_order|filename|_time$|_path$|_idx$|"  # the columns hour and video stand for these
    "^image_index|^behavior_type|^behavioral_cat|^modifier")  # BORIS, The Observer: what the behaviour itself is like


def smoothed_means(codes, target, train, test):
    """Train mean of the target in each test row's level: codes (N,), target (N, R) -> (m, R).

    One row at the overall train mean is added to each level (smoothing); a level without train
    rows has that mean. NaN in the target = missing.
    """
    import pandas as pd
    known = pd.DataFrame(target[train])
    levels = known.groupby(codes[train])
    means = (levels.sum() + known.mean()) / (levels.count() + 1)
    return means.reindex(codes[test]).fillna(known.mean()).to_numpy()


def _level_codes(levels, n_rows, train, position):
    """{name: (N,) codes} of the columns that can tell anything, and `row order`.

    Columns have 2 levels or more, up to three for four train rows in these; row order is cut into 2
    to 20 blocks of neighbouring rows, one for 10 train rows.
    """
    codes = {}
    for name, values in levels.items():
        found, code = np.unique(values, return_inverse=True)
        if len(found) >= 2 and len(set(code[train])) <= max(2, 0.75 * len(train)):
            codes[name] = code
    blocks = min(20, max(2, len(train) // 10))
    position = np.arange(n_rows) if position is None else position
    codes["row order"] = position * blocks // (position.max() + 1)
    return codes


def level_priors(levels, target, train, test, groups=None, positive=1, position=None):
    """What metadata alone predict, without a pixel: a list of dicts, best column first.

    levels: {name: (N,) values}; target: (N,) class indices, or (N, R) scores, NaN = missing; train,
    test: lists of row indices, an entry a fold, whose test rows are judged as one; groups: (N,)
    names for the interval. A column predicts the smoothed train rate of the `positive` class, or
    the smoothed train mean, in the row's level; `row order` does the same with blocks of
    neighbouring rows (position: (N,) row number of each in its own file; None = its index).
    dict(name, codes: (N,) levels of all rows, n_levels, auc or r2, low, high, subjects), for scores
    also mae, mae_low and mae_high; low and high are NaN where there is no interval.
    """
    is_classes = target.ndim == 1
    metric = "auc" if is_classes else "r2"
    if is_classes:
        target = (target == positive)[:, None].astype(float)
    held_out = np.concatenate(test)
    subjects = None if groups is None else groups[held_out]
    found = []
    for name, codes in _level_codes(levels, len(target), train[0], position).items():
        predicted = []
        for rows, judged in zip(train, test):
            means = smoothed_means(codes, target, rows, judged)
            if is_classes:
                # A fold's overall rate is high where its held-out rows are negative: it must not count.
                means = means - common.mean_without_nan(target[rows], axis=0)
            predicted.append(means)
        predicted = np.concatenate(predicted)
        if is_classes:
            label = target[held_out, 0].astype(int)
            result = subject_intervals.bootstrap_classification(
                np.hstack([-predicted, predicted]), label, subjects, folds=len(test))
            main = result.overall.model["roc_auc"]
            further = {}
        else:
            result = subject_intervals.bootstrap_regression(predicted, target[held_out], subjects, folds=len(test))
            main = result.overall.model["r2"]
            further = result.overall.model["mae"].columns("mae")
        found.append({
            "name": name,
            "codes": codes,
            "n_levels": codes.max() + 1,
            metric: main.value,
            "low": main.low,
            "high": main.high,
            **further,
            "subjects": result.subjects,
        })
    return sorted(found, key=lambda row: -np.nan_to_num(row[metric], nan=-math.inf))


def flag_confounds(rows, model, table, places):
    """The rows of level_priors with red_flag, True where the prior reaches the model's interval.

    model: Estimate of its AUC or R2; NaN flags nothing, and neither does a prior that knows nothing
    (AUC up to .5, R2 up to 0). places: (M,) which of the N rows those of the model's table are;
    within their levels its AUC or R2 is given too.
    """
    bar = model.value if math.isnan(model.low) else model.low
    flagged = []
    for row in rows:
        metric, chance = ("auc", 0.5) if "auc" in row else ("r2", 0.0)
        row = row | {"red_flag": bool(row[metric] > chance and row[metric] >= bar)}
        row[f"model_{metric}_within_levels"] = table.quality_within(row.pop("codes")[places])
        flagged.append(row)
    return flagged


def flagged_doubts(rows):
    """A sentence on flagged columns in a list, [] without any; row order is none."""
    names = [row["name"] for row in rows if row["red_flag"] and row["name"] != "row order"]
    if not names:
        return []
    return [f"Without a look at the input these columns predict as well as the model's interval allows: "
            f"{common.shorten_list(names, 3)}. Judge the model within the levels (the section "
            "Without a pixel), and across them: --group_column"]


def confound_blocks(rows):
    """HTML of the section Without a pixel: what metadata alone predict, beside the model."""
    shown = [{**row, "red_flag": "reaches the model" if row["red_flag"] else ""} for row in rows]
    for row in shown:
        del row["subjects"]
    return [reporting.html_table(
        shown, caption="The train rate (or mean) of each level of a column as the prediction")]


def prior_levels(table):
    """{name: (N,) text} of the metadata columns; video first."""
    levels = {"video": table.videos}
    for name, cells in table.extra.items():
        if not NO_CONFOUND.search(name):
            levels[name] = cells.map(event_tables.plain_level).to_numpy(str)
    return levels


def judged_rows(table):
    """{what a split keeps whole: (train rows, judged rows), lists with an entry a fold}.

    With parts (train, val, test, or all where there is none): from the first to the last. Without:
    five folds that keep events whole, so that a prior may know the animals and places it is judged
    on, and, where there are groups or videos, five that keep those whole.
    """
    parts = [part for part in ("train", "all", "val", "test") if part in table.parts]
    if len(parts) > 1:
        train, *_, judged = (np.flatnonzero(table.parts == part) for part in parts)
        return {"parts": ([train], [judged])}
    ways = {}
    strata = event_tables.strata_of(table)
    for split_by in ("event", None):
        units = event_tables.split_keys(table, split_by)
        if len(set(units)) < 5:
            continue
        judged = splitting.make_folds(table.clip_ids, 5, strata, units)
        train = [np.setdiff1d(np.arange(len(table)), held) for held in judged]
        kind = units[0].split()[0]  # a unit is spelled "event NAME", "video NAME" or "group NAME"
        ways[f"{kind}s"] = (train, judged)
    return ways


def no_pixel_priors(table, positive):
    """level_priors of each metadata column of a table, with what (predicted) and across.

    Rates or means come from other rows than those judged, see judged_rows; for the class `positive`
    (default: the rarest). `row order` compares the same places of the manifests.
    """
    what = "scores"
    chosen = None
    if table.label is not None:
        chosen = prediction_tables.choose_positive(positive, table.names, table.label)
        what = table.names[chosen]
    levels = prior_levels(table)
    position = np.rint(1e6 * table.extra["row_order"].to_numpy(float)).astype(int)
    found = []
    for across, (train, judged) in judged_rows(table).items():
        if table.label is not None and len(set(table.label[np.concatenate(judged)] == chosen)) < 2:
            continue
        rows = level_priors(levels, table.truth, train, judged, table.groups, chosen, position)
        for row in rows:
            del row["codes"]
            found.append({"what": what, "across": across, **row})
    return found
