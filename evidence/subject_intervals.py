"""Intervals over subjects, whose rows are not independent, and the paired comparison with a baseline.

Letters: N rows, R scores, C classes, S subjects, D resamples.
"""
import dataclasses
import math
import statistics

import numpy as np

import common
from evidence import class_scores, metric_names

FEWEST_FOR_INTERVAL = 5
FEWEST_FOR_BOOTSTRAP = 200
MOST_FOR_SIGN_FLIP = 16
FEWEST_ROWS_FOR_R2 = 9
WIDEST_LOG_RATIO = math.log(20)  # an R2 whose SSE / SST is less certain than that has no interval
CLASS_SIGN_FLIP_METRICS = ("roc_auc", "loss", "brier", "accuracy")
LEVEL = 0.95
FOLD_COVERAGE = ".93 to .99"  # by tests/test_estimators.py
TIME_BLOCKS = "time blocks"  # a unit too few and too alike for a p; nor does a p know that folds share train rows


# --- records -------------------------------------------------------------------------------------

@dataclasses.dataclass
class Estimate:
    """A number with its interval, or arrays with an entry for each target or class; low and high NaN = no interval."""
    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray

    def at(self, index):
        """The Estimate of one target or class."""
        return Estimate(self.value[index], self.low[index], self.high[index])

    def columns(self, name):
        """Its columns in a table: NAME, NAME_low and NAME_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def times(self, factor):
        """The Estimate in another unit; a negative factor turns the interval round."""
        ends = np.sort([self.low * factor, self.high * factor], axis=0)
        return Estimate(self.value * factor, *ends)


@dataclasses.dataclass
class Comparison:
    """Metric name -> Estimate of a model, of its baseline, and of model - baseline on the same resamples."""
    model: dict
    baseline: dict
    difference: dict

    def record(self, index=None):
        """What metrics.json says of it, or of one target or class of it."""
        return {side: {name: vars(each if index is None else each.at(index)) for name, each in estimates.items()}
                for side, estimates in vars(self).items()}


@dataclasses.dataclass(kw_only=True)
class Result:
    """A model judged on a whole split, beside a baseline where there is one."""
    names: list | tuple = ()  # R targets or C classes
    n: np.ndarray  # (R,) labelled rows of each
    overall: Comparison  # of numbers: means over the targets, or metrics of all classes
    each: Comparison  # of arrays (R,) or (C,)
    subjects: int
    rows: int
    unit: str  # what is resampled: subjects, rows, ...
    method: str
    per_subject: dict  # metric -> (S,) whose mean is the difference; empty for more than 16 subjects
    sign_flip_p: dict  # metric -> p or None
    baseline_name: str | None = None
    confusion: np.ndarray | None = None  # (C, C) rows, true x predicted
    exceptions: str = ""  # to the method of the intervals

    @property
    def baseline_label(self):
        """The baseline's name as sentences write it."""
        return metric_names.BASELINES.get(self.baseline_name, self.baseline_name.replace("_", " "))

    @property
    def has_intervals(self):
        """Whether there are subjects enough for any interval."""
        return self.subjects >= FEWEST_FOR_INTERVAL

    def gain(self, metric):
        """Estimate of how much better than the baseline the model is."""
        difference = self.overall.difference[metric]
        return difference.times(-1.0) if metric_names.METRICS[metric].lower_is_better else difference

    def record(self):
        """What metrics.json says of it."""
        kind = "per_target" if self.confusion is None else "per_class"
        each = [{"name": name, "n": self.n[k], **self.each.record(k)}
                for k, name in enumerate(self.names)]
        fields = ("sign_flip_p", "per_subject", "subjects", "rows", "unit", "method")
        return {"baseline_name": self.baseline_name, **self.overall.record(), kind: each,
                **{name: getattr(self, name) for name in fields}}


# --- the engine: a statistic of how often each subject is drawn -> estimates -------------------------

def estimate(model, baseline, subjects, unit, *,
             rows, support, draws=2000, folds=1, per_subject=None, **described):
    """Result of statistics of how often each subject is drawn.

    model, baseline (None = without): (D, S) times drawn -> ({metric: (D,)}, {metric: (D, R)}),
    overall and each; subjects: S; support: {(scope, metric): how many subjects it rests on}, where
    those are not all, with the side before the scope where the sides differ; folds: how many models
    predicted the rows; per_subject: {metric: (S,)}, None = pseudo-values of the jackknife; rows,
    described: the other fields of the Result. An interval is value -+ t x standard error on the
    scale where the metric is nearest to normal, of R2 also about the value without its bias; the
    error is that of the jackknife, from 200 subjects on that of the bootstrap. Resting on under 5
    subjects: no interval.
    """
    whole = _compare(model, baseline, np.ones((1, subjects)))
    estimates = {place: Estimate(value, value * np.nan, value * np.nan) for place, (value,) in whole.items()}
    method = f"no interval under {FEWEST_FOR_INTERVAL} {unit}, here {subjects}"
    if subjects >= FEWEST_FOR_INTERVAL:
        reach, method = _reach_of_interval(subjects, unit, folds)
        block = max(1, 1_000_000 // rows)  # resamples at a time
        drawn = [_compare(model, baseline, weights) for weights in draw_subjects(subjects, draws, block)]
        for place, found in estimates.items():  # differences are the last
            side, scope, metric = place
            values = np.concatenate([part[place] for part in drawn])
            scale = None if side == "difference" else metric_names.METRICS[metric].normal_scale
            rests_on = np.asarray(support.get(place, support.get((scope, metric), subjects)))
            ends = _t_ends(found.value, values, reach, scale, rests_on, metric)
            found.low, found.high = np.where(rests_on >= FEWEST_FOR_INTERVAL, ends, np.nan)
            if side == "difference":
                _hold_difference(found, estimates["model", scope, metric], estimates["baseline", scope, metric])
    if subjects > MOST_FOR_SIGN_FLIP or baseline is None or unit == TIME_BLOCKS or folds > 1:
        per_subject = {}
    elif per_subject is None:
        per_subject = _pseudo_values(model, baseline, whole, subjects, support)
    return Result(
        rows=rows,
        **_comparisons(estimates),
        subjects=subjects,
        unit=unit,
        method=method,
        per_subject=per_subject,
        sign_flip_p={metric: sign_flip_p(values) for metric, values in per_subject.items()},
        **described)


def support_alone(statistic, subjects):
    """Support for `estimate`: how many subjects have each metric by themselves."""
    alone = statistic(np.eye(subjects))
    return {(scope, metric): np.isfinite(values).sum(0) for scope, metrics in zip(("overall", "each"), alone)
            for metric, values in metrics.items()}


def _reach_of_interval(subjects, unit, folds):
    """(reach, method): how many sds of the draws an interval ends from the value, and how that is said.

    The variance of S values that leave one subject out is 1 / (S - 1) of that of the metric
    (jackknife), the one of resamples (S - 1) / S of it (bootstrap). Models of several folds that
    share train rows err alike, and resampled rows do not show it: the variance is multiplied by 1 +
    K n_test / n_train (Nadeau & Bengio 2003).
    """
    way = "t-interval"
    factor = subjects - 1
    if subjects >= FEWEST_FOR_BOOTSTRAP:
        way = "bootstrap interval"
        factor = subjects / (subjects - 1)
    reach = t_quantile(subjects - 1) * math.sqrt(factor)
    method = f"{LEVEL:.0%} {way} over {subjects} {unit}"
    if folds < 2:
        return reach, method
    widening = math.sqrt(1 + folds / (folds - 1))
    method += f", widened x{widening:.2f} for {folds} folds (simulated coverage at five folds: {FOLD_COVERAGE})"
    return reach * widening, method


def _pseudo_values(model, baseline, whole, subjects, support):
    """{metric: (S,)}: what each subject says of the difference; of a mean over equal subjects its own difference.

    Not where the difference is the same whoever is left out, or rests on a few of five or more
    subjects: then most say nothing of their own.
    """
    left_out = _compare(model, baseline, 1.0 - np.eye(subjects))
    places = {metric: ("difference", "overall", metric) for metric in CLASS_SIGN_FLIP_METRICS
              if subjects < FEWEST_FOR_INTERVAL or support.get(("overall", metric), subjects) >= FEWEST_FOR_INTERVAL}
    return {metric: subjects * whole[place] - (subjects - 1) * left_out[place]
            for metric, place in places.items()
            if place in whole and not np.allclose(left_out[place], whole[place], 1e-9)}


def _compare(model, baseline, weights):
    """{(side, scope, metric): (D, ...)} of both statistics under the same weights (D, S), and of their difference."""
    values = {}
    for side, statistic in (("model", model), ("baseline", baseline)):
        if statistic:
            for scope, metrics in zip(("overall", "each"), statistic(weights)):
                values |= {(side, scope, metric): each for metric, each in metrics.items()}
    for side, scope, metric in list(values):
        if side == "baseline":
            values["difference", scope, metric] = values["model", scope, metric] - values["baseline", scope, metric]
    return values


def _comparisons(estimates):
    """{overall, each: Comparison}."""
    comparisons = {scope: Comparison({}, {}, {}) for scope in ("overall", "each")}
    for (side, scope, metric), found in estimates.items():
        getattr(comparisons[scope], side)[metric] = found
    return comparisons


def draw_subjects(subjects, draws, block):
    """Yield blocks (D, S) of how often each subject counts: drawn at random; under 200, each left out once."""
    if subjects < FEWEST_FOR_BOOTSTRAP:
        yield from np.split(1.0 - np.eye(subjects), range(block, subjects, block))
        return
    generator = np.random.default_rng(0)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = generator.integers(0, subjects, (size, subjects)) + subjects * np.arange(size)[:, None]
        drawn = np.bincount(picks.ravel(), minlength=size * subjects)
        yield drawn.reshape(size, subjects).astype(np.float64)


def _t_ends(value, drawn, reach, scale, support, metric):
    """(low, high): value -+ reach x sd of the draws (D, ...), on the normal scale; support: subjects it rests on.

    Of R2 the ends lie about the value, and about it without its bias, whichever reaches further:
    labels spread less about the mean of a few rows than about that of all, which makes R2 too low,
    and the interval of a mean over many targets is narrow.
    """
    if scale in SHARE_RANGES:
        ends = _share_ends(value, drawn, reach, support, SHARE_RANGES[scale])
    else:
        forward, backward = NORMAL_SCALES[scale]
        centre = forward(value)
        scaled = forward(drawn)
        half = reach * common.sd_without_nan(scaled)
        bias = _bias(scaled, centre) if metric == "r2" else 0.0
        if scale == "log1m":
            half = np.where(half + np.abs(bias) > WIDEST_LOG_RATIO, np.nan, half)
        ends = [backward(each + side) for each in (centre, centre - bias) for side in (-half, half)]
    ends = [value, *ends]
    return np.min(ends, axis=0), np.max(ends, axis=0)


def _bias(drawn, value):
    """Bias (...) of a value (...), by those of its draws (D, ...): jackknife (Quenouille 1956) or bootstrap."""
    factor = len(drawn) - 1 if len(drawn) < FEWEST_FOR_BOOTSTRAP else 1
    return factor * (common.mean_without_nan(drawn, axis=0) - value)


def _share_ends(value, drawn, reach, support, bottom):
    """(low, high) of what lies between `bottom` and 1: value -+ reach x sd of the draws (D, ...), both as log odds.

    A draw goes no nearer to an end than a third of the value's way: without the one
    subject that makes all the errors the log odds would be infinite. Exact where all
    are right or wrong in every resample.
    """
    span = 1 - bottom
    share = (value - bottom) / span
    held = np.clip(share, 1e-4, 1 - 1e-4)
    near = np.clip((drawn - bottom) / span, held / NEAREST_DRAW, 1 - (1 - held) / NEAREST_DRAW)
    half = reach * common.sd_without_nan(_log_odds(near))
    scaled = _log_odds(held) + np.multiply.outer((-1, 1), half)
    ends = 1 / (1 + np.exp(-scaled))
    exact = share_interval(share * support, support)
    is_certain = np.isin(share, (0.0, 1.0)) & (half < 1e-9)
    return bottom + span * np.where(is_certain, exact, ends)


def _log_odds(share):
    return np.log(share / (1 - share))


def _hold_difference(found, model, baseline):
    """Cut a difference to what the intervals of its two sides allow; it has none where a side has none.

    What no resample changes, such as the gain of a perfect model, is as doubtful as its two sides.
    Where one side is the same in every resample, such as the AUC of .5 of class shares, the
    interval is that of the other side, moved.
    """
    size = np.abs(found.value)
    is_rounding = size < 1e-9 * (np.abs(model.value) + np.abs(baseline.value))
    is_certain = (found.high - found.low < 1e-9 * size) & ~is_rounding
    for side in (model, baseline):
        is_certain |= side.high - side.low <= 1e-9 * np.abs(side.value)
    widening = np.where(is_certain, np.inf, 0.0)
    found.low = np.maximum(found.low - widening, model.low - baseline.high)
    found.high = np.minimum(found.high + widening, model.high - baseline.low)


def _log(value):
    """Natural logarithm, also of the 0 of a perfect model."""
    return np.log(np.maximum(value, 1e-12))


NORMAL_SCALES = {  # to the scale, and back
    None: (np.asarray, np.asarray),
    "log": (_log, np.exp),
    "log1m": (lambda value: _log(1 - value), lambda scaled: 1 - np.exp(scaled))}
NEAREST_DRAW = 3  # a third of the value's way to 0 or 1
SHARE_RANGES = {"logit": 0.0, "signed_logit": -1.0}  # scale of what lies between this and 1


def t_quantile(df):
    """Two-sided Student t quantile: t with P(|T| < t) = LEVEL for df >= 1 degrees of freedom."""
    angle = np.linspace(0.0, math.pi / 2, 20001)  # with t = sqrt(df) tan(a) the density is cos(a)^(df - 1)
    density = np.cos(angle) ** (df - 1)
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(df) * math.tan(np.interp(LEVEL, mass / mass[-1], angle))


def sign_flip_p(differences):
    """Exact two-sided sign-flip p of the mean of (S,) differences, one a subject, NaN left out; None unless 5 to 16."""
    differences = differences[~np.isnan(differences)]
    if not FEWEST_FOR_INTERVAL <= len(differences) <= MOST_FOR_SIGN_FLIP:
        return None
    signs = np.stack(np.meshgrid(*[(-1, 1)] * len(differences)), -1)  # (2, ..., 2, S): every choice
    flipped = np.abs(signs @ differences)  # (2, ..., 2)
    rounding = 1e-12 * np.abs(differences).sum()
    return np.mean(flipped >= abs(differences.sum()) - rounding)


@np.vectorize
def share_interval(k, n):
    """(low, high) of k of n independent rows: Wilson; exact (Clopper & Pearson 1934) where all are alike.

    k, n: numbers or arrays.
    """
    if n == 0:
        return math.nan, math.nan
    furthest = (0.5 - LEVEL / 2) ** (1 / n)
    if k == 0:
        return 0.0, 1 - furthest
    if k == n:
        return furthest, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


# --- scores ----------------------------------------------------------------------------------------

def bootstrap_regression(predicted, target, subjects=None, baseline=None, unit="subjects", **described):
    """Result of a whole split of scores: metrics of each target, and their means over the targets.

    predicted, target, baseline: (N, R), NaN in target = missing; subjects: (N,) names, None = every
    row its own; unit: what the subjects are called; described: names, baseline_name and folds, as
    in `estimate`. A target labelled in under 5 subjects has no interval, its R2 none under 9 rows.
    """
    labelled = ~np.isnan(target).all(1)
    owners = (np.arange(len(target)) if subjects is None else subjects)[labelled]
    order = np.argsort(owners, kind="stable")
    first_of_each = np.unique(owners[order], return_index=True)[1]

    def sums_of(scores):
        """Summed moments of each subject: (N, R) -> (S, 8, R)."""
        moments = common.regression_moments(scores[labelled], target[labelled])
        return np.add.reduceat(moments[:, order], first_of_each, axis=1).swapaxes(0, 1)
    sums = sums_of(predicted)
    of_baseline = parts = None
    if baseline is not None:
        baseline_sums = sums_of(baseline)
        of_baseline = _regression_statistic(baseline_sums)
        parts = _parts_of_difference(sums, baseline_sums)
    labelled_by = (sums[:, 0] > 0).sum(0)  # (R,) subjects with a label
    n = (~np.isnan(target)).sum(0)
    support = {("each", metric): labelled_by for metric in common.REGRESSION_METRICS}
    support["each", "r2"] = np.where(n < FEWEST_ROWS_FOR_R2, 0, labelled_by)
    support["overall", "r2"] = support["each", "r2"].max(initial=0)
    return estimate(
        _regression_statistic(sums), of_baseline, len(sums), "rows" if subjects is None else unit, n=n,
        rows=len(owners), support=support, per_subject=parts, **described)


def _parts_of_difference(sums, of_baseline):
    """{metric: (S,)} with the difference of mae, mse and r2 as mean, from summed moments (S, 8, R) of both sides.

    Squared errors count in label sds for r2, so that a target's unit does not decide.
    """
    n, _, total, _, squares = sums.sum(0)[:5]  # (R,) each
    with common.undefined_is_nan():
        variance = squares - total ** 2 / n
        variance = np.where(variance > 1e-12 * squares, variance, np.nan)
        absolute, squared = len(sums) * (sums - of_baseline)[:, 6:].swapaxes(0, 1)  # (S, R) each
        parts = {"mae": absolute / n, "mse": squared / n, "r2": -squared / variance}
    return {metric: common.mean_without_nan(each) for metric, each in parts.items()}


def _regression_statistic(sums):
    """Summed moments (S, 8, R) -> the statistic for `estimate`: means over the targets, and each target."""
    def statistic(weights):
        each = common.metrics_from_sums(np.tensordot(weights, sums, 1))  # (D, R)
        return {metric: common.mean_without_nan(values) for metric, values in each.items()}, each
    return statistic


def overall_rows(result):
    """One dict per metric over all targets or classes: its label, value and interval, and the baseline's value."""
    rows = []
    for name, found in result.overall.model.items():
        baseline = result.overall.baseline.get(name)  # some are the model's alone
        rows.append({
            "metric": metric_names.METRICS[name].label,
            **vars(found),
            "baseline": baseline.value if baseline else None})
    return rows


def target_table(result):
    """DataFrame with a row per target: its name, n, each metric with its interval, and the baseline's."""
    import pandas as pd
    columns = {"target": result.names, "n": result.n}
    for metric in common.REGRESSION_METRICS:
        columns |= result.each.model[metric].columns(metric)
        columns[f"baseline_{metric}"] = result.each.baseline[metric].value
    return pd.DataFrame(columns)


# --- classes -----------------------------------------------------------------------------------------

def bootstrap_classification(probability, label, groups=None, baseline=None, threshold=None, positive=1,
                             baseline_threshold=None, folds=1, **described):
    """Result of a whole split of classes: metrics of all of them, and of each against the rest.

    probability, baseline: (N, C); label: (N,); groups: (N,) names, None = every row
    its own; threshold, positive: as in classification_metrics; baseline_threshold: the
    same for the baseline; folds, described (names and baseline_name): as in
    `estimate`. Intervals of a class seen in (or outside of) under 5 subjects are NaN,
    that of its precision also where it is given in under 5. Exceptions: accuracy,
    recall and precision of ungrouped rows of one model, by Wilson; and a share of 0 or
    1 that no resample changes, exact over the subjects that it rests on.
    """
    n_classes = probability.shape[1]
    owners = np.arange(len(label)) if groups is None else groups
    subjects, index = np.unique(owners, return_inverse=True)
    statistic = class_scores.class_statistic(probability, label, threshold, positive, index)
    chosen = {"model": class_scores.predicted_class(probability, threshold, positive)}
    of_baseline = None
    if baseline is not None:
        of_baseline = class_scores.class_statistic(baseline, label, baseline_threshold, positive, index)
        chosen["baseline"] = class_scores.predicted_class(baseline, baseline_threshold, positive)
    confusion = {side: class_scores.confusion_matrix(label, own, n_classes) for side, own in chosen.items()}
    result = estimate(
        statistic, of_baseline, len(subjects), "rows" if groups is None else "subjects", rows=len(index),
        n=confusion["model"].sum(1), support=_class_support(label, chosen, index, n_classes), folds=folds,
        confusion=confusion["model"], **described)
    if groups is None and folds == 1 and result.has_intervals:
        result.exceptions = "; accuracy, recall and precision: Wilson"
        for side, counts in confusion.items():
            _take_wilson_intervals(getattr(result.overall, side), getattr(result.each, side), counts)
    return result


def _class_support(label, chosen, index, n_classes):
    """Support for `estimate`: (N,) labels, {side: (N,) classes that it gives}, (N,) number of each row's subject."""
    def subjects_with(is_so):  # (C, N) -> (C,)
        return np.array([len(np.unique(index[rows])) for rows in is_so])
    classes = np.arange(n_classes)[:, None]
    seen = subjects_with(label == classes)
    both = np.minimum(seen, subjects_with(label != classes))
    # a mean over three classes or more keeps its interval, however rare one of them is
    rarest = both.min() if n_classes == 2 else max(FEWEST_FOR_INTERVAL, min(seen[seen > 0], default=0))
    support = {("overall", metric): rarest for metric in ("roc_auc", "macro_f1", "balanced_accuracy", "mcc")}
    support |= {("each", metric): seen for metric in ("recall", "f1")}
    support |= {("each", metric): both for metric in ("average_precision", "roc_auc")}
    for side, given in chosen.items():
        support[side, "each", "precision"] = np.minimum(seen, subjects_with(given == classes))
    return support


def _take_wilson_intervals(overall, each, confusion):
    """Intervals of accuracy, recall and precision of independent rows; confusion: (C, C)."""
    right = np.diag(confusion)
    accuracy = overall["accuracy"]
    accuracy.low, accuracy.high = share_interval(right.sum(), confusion.sum())
    for metric, counts in (("recall", confusion.sum(1)), ("precision", confusion.sum(0))):
        each[metric].low, each[metric].high = share_interval(right, counts)
