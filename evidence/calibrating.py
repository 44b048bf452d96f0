"""How far a prediction may be off: temperature, threshold and conformal intervals from rows not trained on.

Letters: N rows, C classes.
"""
import math

import numpy as np

import common


def expected_ece(confidence, n_bins=common.ECE_BINS, draws=1000, seed=0, adaptive=False, level=None):
    """ECE that a perfectly calibrated model of these (N,) confidences shows at this N, by simulation -> float.

    Its mean over `draws` sets of answers that are right with the stated probability; with a level that quantile.
    """
    confidence = np.asarray(confidence, np.float64)
    bins = common.confidence_bins(confidence, n_bins, adaptive)
    correct = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    ece = np.abs(common.sums_by(bins, n_bins, confidence - correct)).sum(1) / max(len(confidence), 1)  # (draws,)
    return float(ece.mean() if level is None else np.quantile(ece, level))


def risk_coverage(confidence, correct):
    """Error rate among the most confident rows: (N,), (N,) bool -> (coverage, risk), one entry a distinct confidence.

    Coverage rises to 1; rows of equal confidence enter together, so the order of the rows does not matter.
    """
    order, first = common.tied_runs(np.asarray(confidence, np.float64)) if len(confidence) else (np.zeros(0, int),) * 2
    last = np.append(first[1:], len(order))[:len(first)]
    wrong = np.cumsum(~np.asarray(correct, bool)[order])
    return last / max(len(order), 1), wrong[last - 1] / last


def conformal_quantile(abs_residuals, alpha, subjects=None, seed=0):
    """Half-width of a 1 - alpha prediction interval: the ceil((n + 1)(1 - alpha))-th smallest of (M,) |residuals|.

    NaN residuals are dropped; too few give inf (alpha .1 needs 9). With subjects (M,) n counts subjects, each giving
    one residual drawn at random: exchangeable with a row of a new subject (Dunn, Wasserman & Ramdas 2023).
    """
    kept = ~np.isnan(abs_residuals)
    values = np.asarray(abs_residuals, np.float64)[kept]
    if subjects is not None:
        order = np.random.default_rng(seed).permutation(len(values))
        values = values[order][np.unique(np.asarray(subjects, str)[kept][order], return_index=True)[1]]
    rank = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else math.inf


def fit_temperature(logits, label):
    """Temperature T in .05 to 20 with the smallest NLL of softmax(logits / T): (N, C), (N,) indices -> float.

    Dividing by T changes neither the most probable class nor a two-class AUC. 1.0 where every labelled row is right
    (the NLL would fall for ever, so nothing says how sure the model may be) and where no row is labelled.
    """
    label = np.asarray(label, np.int64)
    logits, label = np.asarray(logits, np.float64)[label >= 0], label[label >= 0]
    own = logits[np.arange(len(label)), label]
    if not len(label) or (own > np.where(np.arange(logits.shape[1]) == label[:, None], -np.inf, logits).max(1)).all():
        return 1.0
    low, high = math.log(1 / 20.0), math.log(1 / 0.05)  # of log(1 / T); the NLL is convex in 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((common.softmax(logits * math.exp(middle)) * logits).sum(1) - own).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def prior_correction(logits, train_prior, sampled_prior):
    """Logits (N, C) of a model that saw classes in shares sampled_prior, for shares train_prior, (C,) each.

    Adds log(train / sampled), to be done before the temperature (Saerens, Latinne & Decaestecker 2002); a class that
    either lacks is left as it is.
    """
    train_prior, sampled_prior = (np.asarray(prior, np.float64) for prior in (train_prior, sampled_prior))
    both = (train_prior > 0) & (sampled_prior > 0)
    return np.asarray(logits, np.float64) + np.log(np.where(both, train_prior, 1) / np.where(both, sampled_prior, 1))


def fit_threshold(probability, label, metric="f1", positive=1):
    """Threshold of the positive class with the best metric on these rows: (N, C), (N,) indices -> float in 0 to 1.

    metric: f1 of the positive class, balanced_accuracy, accuracy or mcc, positive against the rest. The threshold lies
    halfway between two scores; of equally good ones the nearest to .5. Without both classes .5.
    """
    label = np.asarray(label, np.int64)
    score, is_positive = np.asarray(probability, np.float64)[label >= 0, positive], label[label >= 0] == positive
    if is_positive.all() or not is_positive.any():
        return 0.5
    order, first = common.tied_runs(score)
    ends = np.append(first, len(score))  # (G + 1,) how many rows get the class
    hits = np.append(0, np.cumsum(is_positive[order]))[ends]
    misses, missed = ends - hits, is_positive.sum() - hits
    confusion = np.stack([len(score) - ends - missed, misses, missed, hits], -1).reshape(-1, 2, 2)
    overall, per_class = common.confusion_metrics(confusion.astype(np.float64))
    values = {**overall, "f1": per_class["f1"][:, 1]}
    if metric not in ("f1", "balanced_accuracy", "accuracy", "mcc"):
        raise ValueError(f"metric is {metric!r}, expected f1, balanced_accuracy, accuracy or mcc")
    edges = np.concatenate([[1.0], score[order][first], [0.0]])
    cuts = (edges[:-1] + edges[1:]) / 2
    best = np.flatnonzero(values[metric] >= np.nanmax(values[metric]) - 1e-12)
    return float(cuts[best[np.abs(cuts[best] - 0.5).argmin()]])
