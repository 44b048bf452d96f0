"""How far the raters agree, and so how far any model could come.

Letters: N rows, R ratings.
"""
import math

import numpy as np

import common


def noise_ceiling(mean, sd, n):
    """Ceiling from summary ratings: mean, sd (N, R), raters n (N, R) or a number -> dict of r2, r, rows (R,), note.

    R2 ceiling = 1 - mean(sd^2 / n) / var(mean), r ceiling its root (reliability of a mean in classical test theory).
    Rows with sd = 0 or anything missing do not count. A negative R2 ceiling is NaN with the note "not measurable".
    """
    mean, sd = np.asarray(mean, np.float64), np.asarray(sd, np.float64)
    n = np.broadcast_to(np.asarray(n, np.float64), mean.shape)
    valid = np.isfinite(mean) & (sd > 0) & (n > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = common.mean_without_nan(np.where(valid, sd ** 2 / n, np.nan), axis=0)
        centred = mean - common.mean_without_nan(np.where(valid, mean, np.nan), axis=0)
        signal_and_noise = np.where(valid, centred ** 2, 0.0).sum(0) / (valid.sum(0) - 1)
        r2 = np.where(valid.sum(0) >= 2, 1.0 - noise / signal_and_noise, np.nan)
    r2 = np.where(r2 >= 0, r2, np.nan)
    note = ["not measurable" if np.isnan(value) else "" for value in r2]
    return {"r2": r2, "r": np.sqrt(r2), "rows": valid.sum(0), "note": note}


def ceiling_table(mean, sd):
    """R2 ceilings for 2 to 30 raters, where their number is not known: (N, R), (N, R) -> dict of n -> (R,)."""
    return {n: noise_ceiling(mean, sd, n)["r2"] for n in range(2, 31)}


def _stack_ratings(ratings, fewest):
    """N 1-D arrays -> (values (M,), image (M,) sorted indices, counts (N,)) of images with `fewest` ratings or more."""
    parts = [values[~np.isnan(values)] for values in (np.asarray(part, np.float64) for part in ratings)]
    counts = np.array([len(part) for part in parts if len(part) >= fewest], np.int64)
    values = np.concatenate([np.empty(0)] + [part for part in parts if len(part) >= fewest])
    return values, np.repeat(np.arange(len(counts)), counts), counts


def split_half(ratings, halves=100, seed=0):
    """Reliability of the mean rating (= its R2 ceiling) of one target, from single ratings: N 1-D arrays -> float.

    Each image's raters are cut in two at random, the halves' means correlated over images (those with 2 raters or
    more), stepped up by Spearman-Brown 2r / (1 + r) and averaged over `halves`. Not above 0: NaN, not measurable.
    """
    values, image, counts = _stack_ratings(ratings, 2)
    if len(counts) < 3:  # two images always correlate by 1 or -1
        return math.nan
    generator, reliability = np.random.default_rng(seed), []
    first = np.arange(len(values)) - (np.cumsum(counts) - counts)[image] < (counts // 2)[image]  # (M,) True = half one
    total = np.bincount(image, values)
    for _ in range(halves):
        order = np.argsort(image + generator.random(len(values)))
        half_one = np.bincount(image[first], values[order[first]])
        r = np.corrcoef(half_one / (counts // 2), (total - half_one) / (counts - counts // 2))[0, 1]
        reliability.append(2 * r / (1 + r))
    return float(np.mean(reliability)) if np.mean(reliability) > 0 else math.nan


def icc(ratings):
    """ICC(1,1) and ICC(1,k) of one target by one-way ANOVA: N 1-D arrays -> (single rating, mean rating) floats.

    Shrout & Fleiss 1979; unequal numbers of raters enter as n0 = (M - sum n^2 / M) / (N - 1). Negative: NaN.
    """
    values, image, counts = _stack_ratings(ratings, 1)
    images, total = len(counts), len(values)
    if images < 2 or total == images:
        return math.nan, math.nan
    means = np.bincount(image, values) / counts
    between = (counts * (means - values.mean()) ** 2).sum() / (images - 1)
    within = ((values - means[image]) ** 2).sum() / (total - images)
    n0, signal = (total - (counts ** 2).sum() / total) / (images - 1), between - within
    return (float(signal / (between + (n0 - 1) * within)), float(signal / between)) if signal > 0 else (math.nan,) * 2
