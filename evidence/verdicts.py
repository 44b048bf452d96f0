"""What must be said before any number: signs of a broken model, bars set beforehand, the one-sentence verdict.
"""
import itertools
import math
import re

import numpy as np

import common


def regression_alarms(predicted, target, names):
    """Sentences on signs of a broken model or of data that cannot judge it, for (N, R), (N, R) and R names; else []."""
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    seen = np.where(np.isnan(target) | ~np.isfinite(predicted), np.nan, predicted)
    spread_p, spread_t = np.sqrt([common.mean_without_nan((a - common.mean_without_nan(a, 0)) ** 2, 0) for a in (seen, target)])  # (R,), (R,)
    modal = [np.unique(c[~np.isnan(c)], return_counts=True)[1].max(initial=0) for c in target.T]
    faults = {"not a finite number in the predictions": ~np.isfinite(predicted).all(0),
              "constant output (sd under 5 % of the labels')": spread_p < 0.05 * spread_t,
              "constant prediction, so r has no value and counts as 0": spread_p <= 1e-9 * spread_t,
              "correlation undefined, the labels do not vary": ~(spread_t > 0),
              "labels almost all equal (95 % or more share one value)": modal >= 0.95 * (~np.isnan(target)).sum(0)}
    alarms = [f"{text}: {', '.join(itertools.compress(names, flags))}" for text, flags in faults.items() if flags.any()]
    repeats = np.unique(predicted, axis=0, return_counts=True)[1].max() if len(predicted) else 0
    if repeats >= 3:
        alarms.append(f"the same prediction for {repeats} of {len(predicted)} rows")
    return alarms


def split_gap_alarms(train_metrics, val_metrics, metric="pearson_r"):
    """Sentences where a train and a validation metric (dicts of floats, higher is better) lie far apart; else []."""
    train, val = train_metrics[metric], val_metrics[metric]
    numbers = f"({metric} {train:.3f} and {val:.3f})"
    below = [f"train far below validation {numbers}: a leak, or a fault in evaluation"] if train < val - 0.15 else []
    return below + ([f"train far above validation {numbers}: rows learnt by heart"] if train > val + 0.3 else [])


def identical_fold_alarms(fold_results):
    """Sentences on folds with the same numbers to the last digit; fold_results: one array of any shape per fold."""
    return [f"folds {a} and {b} have identical results: were they trained and judged on the same rows?"
            for a, b in itertools.combinations(range(len(fold_results)), 2)
            if np.array_equal(fold_results[a], fold_results[b])]


def classification_alarms(probability, label, names, threshold=None, positive=None):
    """Sentences on signs of a broken classifier or of labels that cannot judge it; else [].

    probability: (N, C); label: (N,) indices, below 0 = missing; names: C classes; the rest as classification_metrics.
    """
    probability, label = np.asarray(probability, np.float64), np.asarray(label, np.int64)
    if not len(probability):
        return ["no rows to judge"]
    finite, given = np.isfinite(probability).all(), np.unique(common.predicted_class(probability, threshold, positive))
    rows, labelled = len(probability), label[label >= 0]
    counts = np.bincount(labelled, minlength=len(names))
    spread, wanted = probability.std(0), (labelled[:, None] == np.arange(len(names))).std(0)  # (C,), (C,)
    values, repeats = np.unique(np.round(probability, 6), axis=0, return_counts=True)
    alarms = [] if finite else ["not a finite number in the probabilities"]
    if len(given) == 1 and finite:
        alarms.append(f"one class only: {names[given[0]]} is given to all {rows} rows")
    if len(labelled) and (spread < 0.05 * wanted).any():
        alarms.append("constant output (sd of the probability under 5 % of the labels'): "
                      + ", ".join(itertools.compress(names, spread < 0.05 * wanted)))
    if repeats.max() >= 3:
        last = min(1, len(names) - 1) if positive is None else positive
        alarms.append(f"the same probability 3 times or more: {repeats[repeats >= 3].sum()} of {rows} rows share "
                      f"{(repeats >= 3).sum()} values, {repeats.max()} of them {names[last]} "
                      f"{values[repeats.argmax(), last]:.6f}")
    if len(labelled) and counts.max() >= 0.95 * len(labelled):
        alarms.append(f"labels almost all equal: {names[counts.argmax()]} in {counts.max()} of {len(labelled)} rows")
    return alarms


def classification_values(result, names):
    """bootstrap_classification's result under all names of classification_names -> (values, intervals or None)."""
    keys = common.classification_names(names)
    return ({name: result["value"][key] for name, key in keys.items()},
            {name: result["interval"] and tuple(result["interval"][key].tolist()) for name, key in keys.items()})


def named_values(result, names):
    """bootstrap_regression's result under the names of --criteria: `r2` = mean over targets, `r2_Valence` one target.

    Returns (dict of name -> float, dict of name -> (low, high) or None).
    """
    places = {metric: (f"mean_{metric}", ...) for metric in common.REGRESSION_METRICS}
    places |= {f"{metric}_{name}": (metric, k) for metric in common.REGRESSION_METRICS for k, name in enumerate(names)}
    values = {name: float(result["value"][key][k]) for name, (key, k) in places.items()}
    return values, {name: result["interval"] and tuple(result["interval"][key][k].tolist())
                    for name, (key, k) in places.items()}


def parse_criteria(text, known):
    """`"r2>0.15,mae_M2<3.0"` -> list of dict(name, relation, bar); known: the metric names that exist.

    Raises UserError that lists every part that cannot be read, or every unknown name with the closest known one.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    matches = [re.fullmatch(r"([^<>=]+?)\s*([<>]=?)\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)", p) for p in parts]
    bad = [part for part, match in zip(parts, matches) if match is None]
    if bad:
        raise common.UserError(f"--criteria expects NAME>NUMBER or NAME<NUMBER separated by commas, found: {'; '.join(bad)}")
    unknown = [match[1] + common.closest(match[1], known) for match in matches if match[1] not in known]
    if unknown:
        raise common.UserError(f"--criteria names no metric of this run: {', '.join(unknown)}. Use METRIC or METRIC_TARGET.")
    return [{"name": match[1], "relation": match[2], "bar": float(match[3])} for match in matches]


def judge_criteria(criteria, values, intervals):
    """PASS where the whole interval clears the bar, FAIL where none of it does, else (or without one) NOT RESOLVABLE.

    criteria: from parse_criteria; values: dict of name -> float; intervals: dict of name -> (low, high) or None.
    Returns a list of dict(name, relation, bar, value, low, high, verdict).
    """
    compare, judged = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}, []
    for entry in criteria:
        low, high = intervals[entry["name"]] or (math.nan, math.nan)
        clears = {bool(compare[entry["relation"]](end, entry["bar"])) for end in (low, high)}
        verdict = "NOT RESOLVABLE"
        if len(clears) == 1 and not math.isnan(low + high):
            verdict = "PASS" if True in clears else "FAIL"
        judged.append({**entry, "value": values[entry["name"]], "low": low, "high": high, "verdict": verdict})
    return judged


def verdict_sentence(result, baseline_name, metric="r2", ceiling=None, held_out=True, lower_is_better=None, label=None):
    """One honest sentence: does the model beat its baseline, by how much, and what could be reached at best.

    result: dict of bootstrap_regression's or bootstrap_classification's shape: value and interval (or None) with the
    keys METRIC, baseline_METRIC and difference_METRIC or, over targets, the same with mean_METRIC; method; sign_flip_p
    and, where there is one, per_subject.
    ceiling: what `metric` could reach, or None. held_out False: the numbers are neither a test split's nor folds'.
    lower_is_better: None = as LOWER_IS_BETTER says; label: the metric's name in the sentence.
    """
    key = f"mean_{metric}" if f"mean_{metric}" in result["value"] else metric
    model, baseline, difference = (result["value"][part + key] for part in ("", "baseline_", "difference_"))
    low, high = (result["interval"] or {}).get(f"difference_{key}", (np.nan, np.nan))
    downwards = metric in common.LOWER_IS_BETTER if lower_is_better is None else lower_is_better
    gains = [-difference, -low, -high] if downwards else [difference, low, high]
    beaten = "The model beats" if min(gains) > 0 else "The model does not beat" if gains[0] <= 0 else None
    verdict = beaten if beaten and np.isfinite(gains).all() else "Not resolvable whether the model beats"
    text = f"{verdict} the {baseline_name} baseline: {label or key.replace('mean_', 'mean ', 1)} {model:.3f} against "
    text += f"{baseline:.3f}, "
    how = result["method"]
    if result["interval"]:
        known = np.isfinite([low, high]).all()
        how = f"{low:+.3f} to {high:+.3f}, {how}" if known else "no interval: too few to resolve it"
    text += f"difference {difference:+.3f} [{how}]"
    # R2 within a subject has no meaning, nor has a rank metric: their errors stand in
    flips, errors = result["sign_flip_p"], "mse" if metric == "r2" else metric
    errors = errors if errors in flips else "brier"
    if flips.get(errors) is not None:
        own = result["per_subject"][f"difference_{key.replace(metric, errors)}"]  # (S,)
        fewer = int(((own if errors in common.LOWER_IS_BETTER else -own) < 0).sum())
        text += f", exact sign-flip p {flips[errors]:.4f} on the subjects' errors, smaller than the baseline's in "
        text += f"{fewer} of {int(np.isfinite(own).sum())}"
    text += "" if ceiling is None or not np.isfinite(ceiling) else f"; the raters' agreement allows {ceiling:.3f}"
    return text + ("." if held_out else "; selected on validation, therefore optimistic.")


def verdict_level(gain, gain_low, alarms):
    """Level of a verdict: good only where the gain over the baseline is beyond its interval and no alarm is raised."""
    level = "good" if gain_low > 0 and not alarms else "caution"
    return level if gain > 0 else "poor"


def say_results(run, metrics):
    """The closing lines of a run: verdict, alarms, criteria, and the file to open next."""
    run.say(metrics["verdict"])
    for alarm in metrics["alarms"]:
        run.say(f"ALARM: {alarm}")
    for bar in metrics["criteria"]:
        run.say(f"{bar['verdict']}: {bar['name']} {bar['relation']} {bar['bar']:g}, found {bar['value']:.4g}")
    run.say(f"open next: {run.path('report.html')}")
