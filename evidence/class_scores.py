"""Scores of classes, of a whole split or of its resamples: each is a function of how often every row counts.

Letters: N rows, C classes, D resamples.
"""
import dataclasses

import numpy as np

import common

CLASSIFICATION_METRICS = "loss accuracy balanced_accuracy macro_f1 roc_auc mcc ece ece_adaptive brier".split()
CLASS_METRICS = "precision recall f1 average_precision roc_auc".split()
ECE_BINS = 15
ECE_METRICS = {"ece": False, "ece_adaptive": True}  # name -> bins of equal mass


@dataclasses.dataclass
class ClassMetrics:
    """Metrics of C classes."""
    overall: dict  # CLASSIFICATION_METRICS -> float
    per_class: dict  # CLASS_METRICS -> (C,), each class against the rest


def classification_metrics(probability, label, threshold=None, positive=1):
    """ClassMetrics of a whole split: (N, C) probabilities, (N,) class indices.

    loss: mean negative log-likelihood; ece, ece_adaptive: 15 bins of equal width, of equal mass.
    With a threshold, rows whose probability of `positive` reaches it get that class, the others the
    most probable of the rest. roc_auc: of the positive class, for three classes or more the mean
    one-vs-rest. NaN: recall, average precision and AUC of a class without rows, precision of one
    never predicted, f1 where both are so; means leave them out. mcc of a constant prediction is 0,
    of constant labels NaN. The Brier score is the sum over classes, halved for two (0 to 1). Not a
    finite number in any probability: all NaN.
    """
    statistic = class_statistic(probability, label, threshold, positive)
    overall, per_class = statistic(np.ones((1, len(label))))
    return ClassMetrics(overall={name: float(value[0]) for name, value in overall.items()},
                        per_class={name: value[0] for name, value in per_class.items()})


def confusion_matrix(label, chosen, n_classes):
    """(C, C) rows, true x predicted; label, chosen: (N,) class indices."""
    return np.bincount(label * n_classes + chosen, minlength=n_classes ** 2).reshape(n_classes, n_classes)


def predicted_class(probability, threshold, positive):
    """(N, C) -> (N,) class indices: the most probable class, or as classification_metrics says with a threshold."""
    if threshold is None:
        return probability.argmax(1)
    rest = probability.copy()
    rest[:, positive] = -np.inf
    return np.where(probability[:, positive] >= threshold, positive, rest.argmax(1))


def ranking_metrics(score, is_positive, weights):
    """ROC AUC and average precision of (N,) scores under (D, N) row weights -> two (D,), NaN = undefined.

    Equal scores count half in the AUC (Mann-Whitney) and are one step of the precision-recall
    curve, which is summed without interpolation.
    """
    order, first = tied_runs(score)
    drawn = weights[:, order]
    hits = drawn * is_positive[order]
    if len(first) < len(order):
        drawn = np.add.reduceat(drawn, first, axis=1)
        hits = np.add.reduceat(hits, first, axis=1)
    misses = drawn - hits  # (D, distinct scores), highest score first
    found = hits.cumsum(1)
    false = misses.cumsum(1)
    with common.undefined_is_nan():
        pairs = found[:, -1] * false[:, -1]  # of a positive and a negative row
        auc = 1.0 - (hits * (false - misses / 2)).sum(1) / pairs
        precision = np.where(found > 0, found / (found + false), 0.0)
        return auc, (hits * precision).sum(1) / found[:, -1]


def tied_runs(score):
    """(order of falling scores, first place of each run of equal ones) of (N >= 1,) scores."""
    order = np.argsort(-score, kind="stable")
    return order, np.flatnonzero(np.append(True, np.diff(score[order]) != 0))


def hits_by_threshold(score, is_hit):
    """(n_called, hits), (G + 1,) each: how many rows reach a threshold, and how many of them are hits.

    score, is_hit: (N,) each. The first threshold is above all scores, then come the G
    different scores, highest first.
    """
    order, first = tied_runs(score)
    n_called = np.append(first, len(order))
    return n_called, np.append(0, np.cumsum(is_hit[order]))[n_called]


def class_statistic(probability, label, threshold, positive, owners=slice(None)):
    """classification_metrics as a function of weights (D, S) of subjects in D resamples: {name: (D,)}, {name: (D, C)}.

    Every metric of a resample follows from how often each row was drawn. owners: (N,) number of
    each row's subject; default: every row its own.
    """
    count = probability.shape[1]
    cell = label * count + predicted_class(probability, threshold, positive)
    row_terms = _row_terms(probability, label)  # (2, N)
    confidence = probability.max(1)
    gap = confidence - (probability.argmax(1) == label)
    bins = {name: confidence_bins(confidence, adaptive) for name, adaptive in ECE_METRICS.items()}
    unknown = 0.0 if np.isfinite(probability).all() else np.nan  # added to every metric

    def statistic(weights):
        weights = weights[:, owners]  # (D, N)
        total = weights.sum(1)
        overall, per_class = confusion_metrics(sums_by(cell, count ** 2, weights).reshape(-1, count, count))
        ranks = [ranking_metrics(probability[:, c], label == c, weights) for c in range(count)]
        auc, average_precision = np.moveaxis(np.array(ranks), 0, -1)  # (D, C) each
        per_class |= {"average_precision": average_precision, "roc_auc": auc}
        with common.undefined_is_nan():
            overall["loss"], overall["brier"] = (weights @ row_terms.T / total[:, None]).T
            for name, own in bins.items():
                overall[name] = np.abs(sums_by(own, ECE_BINS, weights * gap)).sum(1) / total
        overall["roc_auc"] = auc[:, positive] if count == 2 else common.mean_without_nan(auc)
        return ({name: overall[name] + unknown for name in CLASSIFICATION_METRICS},
                {name: per_class[name] + unknown for name in CLASS_METRICS})
    return statistic


def _row_terms(probability, label):
    """(2, N): each row's negative log-likelihood, clipped at the float64 epsilon, and its Brier term."""
    is_label = label[:, None] == np.arange(probability.shape[1])  # (N, C)
    likelihood = np.where(is_label, probability, 0.0).sum(1)
    squared = ((probability - is_label) ** 2).sum(1) / (2 if probability.shape[1] == 2 else 1)
    return np.stack([-np.log(np.maximum(likelihood, np.finfo(np.float64).eps)), squared])


def confidence_bins(confidence, adaptive):
    """(N,) bin of each confidence: ECE_BINS of equal width over 0 to 1, or between its quantiles; ties share a bin."""
    inner = np.linspace(0.0, 1.0, ECE_BINS + 1)[1:-1]
    return np.searchsorted(np.quantile(confidence, inner) if adaptive else inner, confidence)


def sums_by(code, size, weights):
    """Sum (D, N) weights over rows of the same code: (N,) codes below size -> (D, size)."""
    place = code + size * np.arange(len(weights))[:, None]
    return np.bincount(place.ravel(), weights.ravel(), len(weights) * size).reshape(len(weights), size)


def confusion_metrics(confusion):
    """(D, C, C) -> ({accuracy, balanced_accuracy, macro_f1, mcc: (D,)}, {precision, recall, f1: (D, C)}).

    mcc: Gorodkin 2004.
    """
    right = np.diagonal(confusion, axis1=1, axis2=2)  # (D, C)
    true = confusion.sum(2)
    given = confusion.sum(1)
    total = true.sum(1)
    hit = right.sum(1)
    with common.undefined_is_nan():
        per_class = {"precision": right / given, "recall": right / true, "f1": 2 * right / (true + given)}
        spread_true = total ** 2 - (true ** 2).sum(1)
        spread_given = total ** 2 - (given ** 2).sum(1)
        mcc = (hit * total - (true * given).sum(1)) / np.sqrt(spread_true * spread_given)
        mcc = np.where(spread_given > 0, mcc, 0.0)
        overall = {"accuracy": hit / total,
                   "balanced_accuracy": common.mean_without_nan(per_class["recall"]),
                   "macro_f1": common.mean_without_nan(per_class["f1"]),
                   "mcc": np.where(spread_true > 0, mcc, np.nan)}
    return overall, per_class


def softmax(logits):
    """(..., C) -> probabilities over the last axis; a logit of -inf gives 0."""
    grown = np.exp(logits - np.max(logits, -1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def log_of(probability):
    """Logits of probabilities, finite also for those of 0."""
    return np.log(np.maximum(probability, 1e-12))


def combine_clips(outputs, row_starts, aggregation):
    """Mean or max over the clips of each row: (clips, K), (row, start) of each -> (M, K)."""
    rows = np.array([row for row, _ in row_starts])  # of the clips
    combine = getattr(np, aggregation)
    return np.stack([combine(outputs[rows == row], axis=0) for row in dict.fromkeys(rows)])
