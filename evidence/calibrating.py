"""How far a prediction may be off: temperature, threshold and conformal intervals.

All are fitted on rows that no network was trained on.

Letters: N rows, C classes.
"""

import dataclasses
import math

import numpy as np

from evidence import class_scores, prediction_tables, subject_intervals


def simulated_ece(confidence, adaptive=False):
    """(1000,) ECE of a perfectly calibrated model of these (N,) confidences at this N.

    Each draw is a set of answers that are right with the stated probability.
    """
    bins = class_scores.confidence_bins(confidence, adaptive)
    correct = np.random.default_rng(0).random((1000, len(confidence))) < confidence
    gaps = class_scores.sums_by(bins, class_scores.ECE_BINS, confidence - correct)  # (1000, bins)
    return np.abs(gaps).sum(1) / len(confidence)


def calibration_numbers(probability, overall):
    """NLL, Brier score and ECEs in `overall` metrics, beside the ECEs of a calibrated model of the same confidences."""
    confidence = probability.max(1)
    numbers = {"nll": overall["loss"], "brier": overall["brier"]}
    for name, adaptive in class_scores.ECE_METRICS.items():
        numbers[name] = overall[name]
        numbers[f"{name}_of_a_calibrated_model"] = simulated_ece(confidence, adaptive).mean()
    return numbers


def take_null(comparison, confidence):
    """Add NAME_above_null of the model for both ECEs, with an interval for the true calibration error.

    comparison: subject_intervals.Comparison; confidence: (N,) of the model. Chance adds to an ECE,
    so the ECE itself loses its intervals. Of a true gap d and noise s, E|N(d, s)| lies between d
    and d + E|N(0, s)|, and for large d near the root of d^2 + s^2: the null is taken off as it is
    at the low end, and by squares at the high end.
    """
    for name, adaptive in class_scores.ECE_METRICS.items():
        found = comparison.model[name]
        null = simulated_ece(confidence, adaptive).mean()
        half = (found.high - found.low) / 2
        rest = math.sqrt(max(found.value ** 2 - null ** 2, 0.0))
        above = found.value - null
        comparison.model[f"{name}_above_null"] = subject_intervals.Estimate(above, above - half, rest + half)
        for estimates in vars(comparison).values():
            if name in estimates:
                estimates[name].low = estimates[name].high = math.nan


def risk_coverage(confidence, correct):
    """Error rate among the most confident rows: (N,), (N,) bool -> (coverage, risk).

    One entry a distinct confidence. Coverage rises to 1; rows of equal confidence enter together,
    so the order of the rows does not matter.
    """
    n_called, wrong = class_scores.hits_by_threshold(confidence, ~correct)
    return n_called[1:] / len(correct), wrong[1:] / n_called[1:]


def conformal_quantile(abs_residuals, alpha, subjects=None):
    """Half-width of a 1 - alpha interval from (M,) |residuals|.

    It is the ceil((n + 1)(1 - alpha))-th smallest.

    NaN residuals are dropped; too few give inf (alpha .1 needs 9). With subjects (M,) n counts
    subjects, each giving one residual drawn at random: exchangeable with a row of a new subject
    (Dunn, Wasserman & Ramdas 2023).
    """
    kept = ~np.isnan(abs_residuals)
    values = abs_residuals[kept]
    if subjects is not None:
        order = np.random.default_rng(0).permutation(len(values))
        first_of_each = np.unique(subjects[kept][order], return_index=True)[1]
        values = values[order][first_of_each]
    rank = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9)
    if rank > len(values):
        return math.inf
    return np.sort(values)[rank - 1]


def fit_temperature(logits, label):
    """Temperature in .05 to 20 of the smallest NLL of softmax(logits / T): (N, C), (N,) -> float.

    Dividing by T changes neither the most probable class nor a two-class AUC. 1.0 where every row
    is right (the NLL would fall for ever, so nothing says how sure the model may be).
    """
    if (logits.argmax(1) == label).all():
        return 1.0
    own = logits[np.arange(len(label)), label]
    # bisection of the slope over log(1 / T): the NLL is convex in 1 / T
    low = math.log(1 / 20.0)
    high = math.log(1 / 0.05)
    for _ in range(60):
        middle = (low + high) / 2
        probability = class_scores.softmax(logits * math.exp(middle))
        slope = ((probability * logits).sum(1) - own).sum()
        if slope > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


def class_weights(args, prior, positive):
    """Tuple of C weights of the classes in the loss, whose mean over the train rows is 1."""
    weights = np.ones(len(prior))
    if args.balance == "weights":
        weights /= prior
    if args.focal_alpha is not None:
        is_positive = np.arange(len(prior)) == positive
        weights *= np.where(is_positive, args.focal_alpha, 1 - args.focal_alpha)
    return tuple(weights / (weights * prior).sum())


def prior_correction(train_prior, sampled_prior):
    """(C,) to add to the logits of a model that saw classes in shares sampled_prior, for shares train_prior, (C,) each.

    log(train / sampled), before the temperature (Saerens, Latinne & Decaestecker 2002); 0 for a
    class that either lacks.
    """
    both = (train_prior > 0) & (sampled_prior > 0)
    return np.log(np.where(both, train_prior, 1) / np.where(both, sampled_prior, 1))


def fit_threshold(probability, label, positive=1):
    """Threshold of the positive class with its best F1 on these rows: (N, C), (N,) -> 0 to 1.

    It lies halfway between two scores; of equally good ones the nearest to .5. Without both
    classes, or with a score that is no number: .5.
    """
    score = probability[:, positive]
    is_positive = label == positive
    if is_positive.all() or not is_positive.any() or np.isnan(score).any():
        return 0.5
    n_called, hits = class_scores.hits_by_threshold(score, is_positive)
    f1 = 2 * hits / (n_called + is_positive.sum())
    edges = np.array([1.0, *np.unique(score)[::-1], 0.0])
    cuts = (edges[:-1] + edges[1:]) / 2
    best = cuts[f1 >= f1.max() - 1e-12]
    return best[np.abs(best - 0.5).argmin()]


# --- predictions tables of classes ---------------------------------------------------------------


def calibrate(logits, label, positive):
    """Temperature, and threshold of the positive class after it: logits (N, C), labels (N,)."""
    temperature = fit_temperature(logits, label)
    probability = class_scores.softmax(logits / temperature)
    return {"temperature": temperature, "threshold": fit_threshold(probability, label, positive)}


def mean_threshold(calibrations):
    """Threshold of the mean of several models; None where one of them has none: the most probable class counts."""
    thresholds = [calibration.get("threshold") for calibration in calibrations]
    return None if None in thresholds else np.mean(thresholds)


def apply_calibration(table, calibration):
    """A prediction_tables.ClassTable after what calibrate gave; its logits stay as they are."""
    return dataclasses.replace(
        table,
        probability=class_scores.softmax(table.logits / calibration["temperature"]),
        uncalibrated=table.probability,
        threshold=np.full(len(table.truth), calibration["threshold"]))


def calibrate_on(table, others):
    """A ClassTable, its baselines too, with temperature and threshold from the rows of other ones."""
    others = prediction_tables.combine(others, np.concatenate)
    calibrated = apply_calibration(table, calibrate(others.logits, others.truth, table.positive))
    calibrated.baselines = {}
    calibrated.baseline_thresholds = {}
    for name, probability in table.baselines.items():
        found = calibrate(class_scores.log_of(others.baselines[name]), others.truth, table.positive)
        calibrated.baselines[name] = class_scores.softmax(class_scores.log_of(probability) / found["temperature"])
        calibrated.baseline_thresholds[name] = np.full(len(probability), found["threshold"])
    return calibrated


def calibrate_folds(tables):
    """The tables of several folds, each calibrated on the rows of the others."""
    return [calibrate_on(own, [each for each in tables if each is not own]) for own in tables]
