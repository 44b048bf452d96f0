"""Intervals over subjects, whose rows are not independent, and the paired comparison with a baseline.

Letters: N rows, R scores, C classes, S subjects, D resamples.
"""
import math
import statistics
import warnings

import numpy as np

import common

FEWEST_FOR_INTERVAL, FEWEST_FOR_BOOTSTRAP, MOST_FOR_SIGN_FLIP = 5, 20, 16
# where a jackknife estimate is nearer to a normal distribution: (to that scale, and back)
NORMAL_SCALES = {"pearson_r": (np.arctanh, np.tanh), "r2": (lambda r2: np.log1p(-r2), lambda s: -np.expm1(s)),
                 "mse": (np.log, np.exp), "rmse": (np.log, np.exp), "loss": (np.log, np.exp), "brier": (np.log, np.exp)}
SHARES = ("accuracy", "macro_f1", "precision", "recall", "f1", "roc_auc")  # ends of the names of what lies in 0 to 1
INFLATED_BY_RESAMPLING = ("ece", "ece_adaptive", "average_precision")  # ends of names; rows drawn twice flatter them


def subject_sums(moments, subjects):
    """Sum the rows of each subject: (M, N, R) and (N,) names -> (S, M, R), subjects in sorted order."""
    order = np.argsort(subjects, kind="stable")
    first = np.unique(np.asarray(subjects)[order], return_index=True)[1]
    return np.add.reduceat(moments[:, order], first, axis=1).swapaxes(0, 1)


def t_quantile(level, df):
    """Two-sided Student t quantile: t with P(|T| < t) = level for df >= 1 degrees of freedom."""
    angle = np.linspace(0.0, math.pi / 2, 20001)  # with t = sqrt(df) tan(a) the density is cos(a)^(df - 1)
    density = np.cos(angle) ** (df - 1)
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return float(math.sqrt(df) * math.tan(np.interp(level, mass / mass[-1], angle)))


def sign_flip_p(differences):
    """Exact two-sided sign-flip p of the mean of (S,) differences, one a subject, NaN left out; None unless 5 to 16."""
    differences = np.array([value for value in differences if not math.isnan(value)], np.float64)
    if not FEWEST_FOR_INTERVAL <= len(differences) <= MOST_FOR_SIGN_FLIP:
        return None
    bits = (np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))) & 1
    flipped = np.abs((1 - 2 * bits) @ differences)  # (2^S,)
    return float(np.mean(flipped >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()))


def cluster_intervals(statistic, sums, draws=2000, seed=0, level=0.95, unit="subjects"):
    """Intervals over subjects for any statistic of summed rows.

    statistic: (D, ...) sums of D resamples -> dict of name -> (D,) or (D, R); sums: (S, ...), one row per subject, or
    the number S, for a statistic of how often each subject was drawn, (D, S).
    Returns (dict of name -> (2,) or (R, 2), or None; the method in words). From 20 subjects: percentile bootstrap, its
    levels widened to the t distribution (Hesterberg 2015, expanded percentile); 5 to 19: t-interval on jackknife
    pseudo-values, for a mean over equal clusters the subjects' own means; under 5: None.
    """
    count = sums if isinstance(sums, int) else len(sums)
    if count < FEWEST_FOR_INTERVAL:
        return None, f"no interval: only {count} {unit}"
    if count < FEWEST_FOR_BOOTSTRAP:
        sums = np.eye(count) if isinstance(sums, int) else sums
        return _jackknife_intervals(statistic, sums, level), f"{level:.0%} t-interval over {count} {unit}"
    tail = 0.5 * math.erfc(t_quantile(level, count - 1) * math.sqrt(count / (count - 1) / 2))
    drawn = _recentred(_bootstrap_draws(statistic, sums, draws, seed), statistic, sums).items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a target that is undefined in every draw
        ends = {name: np.nanquantile(values, (tail, 1 - tail), axis=0).T for name, values in drawn}
    return ends, f"{level:.0%} bootstrap interval over {count} {unit}"


def _bootstrap_draws(statistic, sums, draws, seed):
    """The statistic of `draws` resamples of subjects, in blocks that bound the memory: dict of name -> (D, ...)."""
    generator, count = np.random.default_rng(seed), sums if isinstance(sums, int) else len(sums)
    blocks, block = [], max(1, 2_000_000 // count)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = generator.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times_drawn = np.bincount(picks.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        by_sums = None if isinstance(sums, int) else times_drawn @ sums.reshape(count, -1)
        blocks.append(statistic(times_drawn if by_sums is None else by_sums.reshape(size, *sums.shape[1:])))
    return {name: np.concatenate([part[name] for part in blocks]) for name in blocks[0]}


def _recentred(drawn, statistic, sums):
    """The draws; those of INFLATED_BY_RESAMPLING moved so that their mean is the value of the whole sample."""
    moved = [name for name in drawn if name.endswith(INFLATED_BY_RESAMPLING)]
    whole = statistic(np.ones((1, sums)) if isinstance(sums, int) else sums.sum(0)[None]) if moved else {}
    for name in moved:
        drawn[name] = drawn[name] + whole[name] - common.mean_without_nan(drawn[name], axis=0)
        drawn[name] = drawn[name] if name.startswith("difference_") else np.clip(drawn[name], 0.0, 1.0)
    return drawn


def _jackknife_intervals(statistic, sums, level):
    """dict of name -> (..., 2): value -+ t x jackknife standard error, r and R2 and squared errors on NORMAL_SCALES."""
    reach, intervals = t_quantile(level, len(sums) - 1) * math.sqrt(len(sums) - 1), {}
    whole, left_out = statistic(sums.sum(0)[None]), statistic(sums.sum(0) - sums)
    for name, value in whole.items():
        metric = name.removeprefix("baseline_").removeprefix("mean_")
        is_share = metric.endswith(SHARES) and not metric.startswith("difference_")
        forward, backward = (_logit, _share) if is_share else NORMAL_SCALES.get(metric, (np.asarray, np.asarray))
        with np.errstate(divide="ignore", invalid="ignore"):
            centre, parts = forward(value[0]), forward(left_out[name])
            half = reach * parts.std(0)
            intervals[name] = np.sort(np.stack([backward(centre - half), backward(centre + half)], -1), -1)
    return intervals


def _logit(share):
    """log(p / (1 - p)) of shares held to 0.0001 and 0.9999, so that all right is not infinitely sure."""
    share = np.clip(share, 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share))


def _share(logit):
    """The inverse of _logit."""
    return 1.0 / (1.0 + np.exp(-logit))


def _paired_statistic(sums):
    """(D, 8, R) model, or (D, 16, R) with baseline -> dict of `r2`, `mean_r2`, `baseline_r2`, `difference_r2`, ..."""
    model = common.metrics_from_sums(sums[:, :8])
    values = {**model, **{f"mean_{name}": common.mean_without_nan(value) for name, value in model.items()}}
    if sums.shape[1] == 8:
        return values
    baseline = _paired_statistic(sums[:, 8:])
    paired = {f"baseline_{name}": value for name, value in baseline.items()}
    return {**values, **paired, **{f"difference_{name}": values[name] - baseline[name] for name in values}}


def bootstrap_regression(predicted, target, subjects=None, baseline=None, draws=2000, seed=0):
    """Metrics of a whole split with intervals over subjects, and the paired comparison with a baseline.

    predicted, target, baseline: (N, R), NaN in target = missing; subjects: (N,) names, None = every row its own.
    Returns a dict: `value` and `interval` (None under 5 subjects) with the keys METRIC, mean_METRIC (over targets) and
    baseline_, difference_ (model - baseline, same resamples) before both; arrays (R,) and (R, 2), means () and (2,),
    NaN interval for a target labelled in under 5 subjects; `per_subject` the same keys with (S, R) and (S,), None from
    20 subjects; `sign_flip_p` {METRIC: p or None}; `subjects`, `rows`, `method`.
    """
    labelled = ~np.isnan(np.asarray(target, np.float64)).all(1)
    names = np.arange(len(labelled)) if subjects is None else np.asarray(subjects, str)
    models = [np.asarray(model)[labelled] for model in (predicted, baseline) if model is not None]
    moments = np.concatenate([common.regression_moments(model, np.asarray(target)[labelled]) for model in models])
    sums = subject_sums(moments, names[labelled])  # (S, 8 or 16, R)
    value = {name: array[0] for name, array in _paired_statistic(sums.sum(0)[None]).items()}
    unit = "rows" if subjects is None else "subjects"
    interval, method = cluster_intervals(_paired_statistic, sums, draws, seed, unit=unit)
    sparse = (sums[:, 0] > 0).sum(0) < FEWEST_FOR_INTERVAL  # (R,)
    for pair in (pair for pair in (interval or {}).values() if pair.ndim == 2):
        pair[sparse] = np.nan
    per_subject = _paired_statistic(sums) if len(sums) < FEWEST_FOR_BOOTSTRAP else {}
    flips = {name: sign_flip_p(per_subject.get(f"difference_mean_{name}", ())) for name in common.REGRESSION_METRICS}
    return {"value": value, "interval": interval, "per_subject": per_subject or None, "sign_flip_p": flips,
            "subjects": len(sums), "rows": int(labelled.sum()), "method": method}


def target_rows(result, names):
    """bootstrap_regression's result, with n (R,) -> one dict per target: metrics, their intervals, the baseline's."""
    rows = []
    for r, name in enumerate(names):
        row = {"target": name, "n": result["n"][r]}
        for metric in common.REGRESSION_METRICS:
            low, high = result["interval"][metric][r] if result["interval"] else (np.nan, np.nan)
            row |= {metric: result["value"][metric][r], f"{metric}_low": low, f"{metric}_high": high,
                    f"baseline_{metric}": result["value"][f"baseline_{metric}"][r]}
        rows.append(row)
    return rows


def score_regression(predicted, target, subjects, baselines):
    """bootstrap_regression of a model, paired with the best of its baselines by mean R2 -> (result with n, its name).

    predicted, target: (N, R), NaN in target = missing; baselines: {name: (N, R)}.
    """
    r2 = {kind: common.mean_metrics(common.regression_metrics(values, target))["r2"] for kind, values in baselines.items()}
    best = max(r2, key=lambda kind: np.nan_to_num(r2[kind], nan=-np.inf))
    result = bootstrap_regression(predicted, target, subjects, baselines[best])
    result["n"] = common.regression_metrics(predicted, target)["n"]
    return result, best


def wilson_interval(k, n, level=0.95):
    """Wilson score interval of a proportion k of n independent rows -> (low, high); NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max((centre - half) / (n + z * z), 0.0), min((centre + half) / (n + z * z), 1.0)


def bootstrap_classification(probability, label, groups=None, baseline=None, names=None, threshold=None, positive=None,
                             baseline_threshold=None, draws=2000, seed=0):
    """Metrics of a whole split with intervals over subjects, and the paired comparison with a baseline's probabilities.

    probability, baseline: (N, C); label: (N,), below 0 = missing; groups: (N,) names, None = every row its own; the
    rest as in classification_metrics. Returns a dict as bootstrap_regression does: `value` {key: float} with the keys
    of classification_metrics and baseline_, difference_ (model - baseline, same resamples) before them; `interval`
    {key: (2,)} or None under 5 subjects; `per_subject` {key: (S,)}, None from 20 subjects; `sign_flip_p` of METRIC
    among loss, brier, accuracy; `confusion` (C, C), `n` (C,) rows and `n_subjects` (C,) subjects of each class;
    `subjects`, `rows`, `method`. Intervals of a class seen in (or outside of) under 5 subjects are NaN. Exceptions, by
    Wilson: accuracy, recall and precision of ungrouped rows; and a value of 0 or 1 that no resample changes, over the
    subjects of the rarest class that it needs.
    """
    probability, label = np.asarray(probability, np.float64), np.asarray(label, np.int64)
    names = [str(c) for c in range(probability.shape[1])] if names is None else list(names)
    subjects = (np.arange(len(label)) if groups is None else np.asarray(groups, str))[label >= 0]
    index, count = _subject_index(subjects)
    scored = {"": (probability, threshold), "baseline_": (baseline, baseline_threshold)}
    scored = {prefix: pair for prefix, pair in scored.items() if pair[0] is not None}
    models = [common.class_statistic(each, label, cut, positive, names) for each, cut in scored.values()]
    confusion = {prefix: common.classification_metrics(each, label, cut, positive, names)["confusion"]
                 for prefix, (each, cut) in scored.items()}
    statistic = _paired_weights(models, index)
    value = {key: float(array[0]) for key, array in statistic(np.ones((1, count))).items()}
    interval, method = cluster_intervals(statistic, count, draws, seed, unit="rows" if groups is None else "subjects")
    seen, other = (np.array([len(np.unique(index[(label[label >= 0] == c) == is_in])) for c in range(len(names))])
                   for is_in in (True, False))  # (C,) subjects with rows of the class, and with rows of another
    if interval:
        _mend_intervals(value, interval, count, seen, np.minimum(seen, other), names)
        if groups is None:
            interval |= _wilson_intervals(confusion, names)
    per_subject = statistic(np.eye(count)) if 0 < count < FEWEST_FOR_BOOTSTRAP else {}
    flips = {name: sign_flip_p(per_subject.get(f"difference_{name}", ())) for name in ("loss", "brier", "accuracy")}
    return {"value": value, "interval": interval, "per_subject": per_subject or None, "sign_flip_p": flips,
            "confusion": confusion[""], "n": confusion[""].sum(1), "n_subjects": seen, "subjects": count,
            "rows": len(index), "method": method}


def _mend_intervals(value, interval, count, seen, both, names):
    """NaN for classes seen in, or outside of, too few subjects; Wilson for a share of 0 or 1 that no resample changes.

    seen, both (C,): subjects with rows of the class; the smaller of that and of those with rows of another class.
    """
    needed = {f"{name}_{metric}": (seen if metric in ("recall", "precision", "f1") else both)[c]
              for c, name in enumerate(names) for metric in common.CLASS_METRICS}
    rarest = min(both) if len(names) == 2 else min(seen[seen > 0], default=0)
    needed |= {"roc_auc": rarest, "macro_f1": rarest, "balanced_accuracy": rarest}
    for key, pair in interval.items():
        base, is_share = key.removeprefix("baseline_").removeprefix("difference_"), key.endswith(SHARES)
        units = needed.get(base, count)
        if units < FEWEST_FOR_INTERVAL and (len(names) == 2 or base not in common.CLASSIFICATION_METRICS):
            interval[key] = np.full(2, np.nan)
        elif is_share and not key.startswith("difference_") and value[key] in (0.0, 1.0) and np.ptp(pair) < 1e-9:
            interval[key] = np.array(wilson_interval(value[key] * units, units))


def _wilson_intervals(confusion, names):
    """{key: (2,)} of accuracy, recall and precision of independent rows, for each prefix -> (C, C) of confusion."""
    found = {}
    for prefix, table in confusion.items():
        counts = {"accuracy": (np.trace(table), table.sum())}
        counts |= {f"{name}_recall": (table[c, c], table[c].sum()) for c, name in enumerate(names)}
        counts |= {f"{name}_precision": (table[c, c], table[:, c].sum()) for c, name in enumerate(names)}
        found |= {prefix + key: np.array(wilson_interval(int(k), int(n))) for key, (k, n) in counts.items()}
    return found


def _subject_index(subjects):
    """((N,) number of each row's subject, how many there are), subjects in sorted order."""
    found, index = np.unique(subjects, return_inverse=True)
    return index, len(found)


def _paired_weights(models, index):
    """The metrics of one or two _class_statistic as a function of (D, S) times that each subject was drawn.

    dict of name -> (D,), with baseline_ and difference_ for the second; in blocks that bound the memory.
    """
    def paired(weights):
        model, *baselines = ({k: v for k, v in each(weights).items() if k != "confusion"} for each in models)
        for other in baselines:
            return {**model, **{f"baseline_{key}": array for key, array in other.items()},
                    **{f"difference_{key}": model[key] - array for key, array in other.items()}}
        return model

    def statistic(drawn):
        block = max(1, 1_000_000 // max(1, len(index)))
        parts = [paired(drawn[start:start + block][:, index]) for start in range(0, len(drawn), block)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return statistic
