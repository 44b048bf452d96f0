"""What trains no network: the train mean, the class shares, and linear models on fixed features.

Letters: N rows, F features, K the smaller of N and F, R scores, C classes.
"""

import dataclasses
import functools
import math

import numpy as np
import torch

import common
from evidence import class_scores, splitting

RIDGE_LAMBDAS = 10.0 ** (np.arange(-2, 13) / 2)  # .1 to a million
LOGISTIC_LAMBDAS = RIDGE_LAMBDAS[:-2]  # .1 to 100,000
FEATURE_SD_FLOOR = 0.01  # sd_floor for features of one network, see standardisation


def train_mean_baseline(train_target, n_rows):
    """Each target's mean over the train rows: (N, R), NaN = missing -> (n_rows, R)."""
    return np.tile(common.mean_without_nan(train_target, axis=0), (n_rows, 1))


def prior_baseline(train_label, n_rows, n_classes):
    """Share of each class among the train labels, below 0 = missing -> (n_rows, C)."""
    counts = np.bincount(train_label[train_label >= 0], minlength=n_classes)
    return np.tile(counts / max(counts.sum(), 1), (n_rows, 1))


def standardisation(features, sd_floor):
    """(mean, sd), both (F,), of (N, F) features; the sd of a constant one is 1.

    sd_floor: features of one network share a unit, so one that hardly varied here must not count as
    many sds when it does later; this share of the RMS sd of those that vary is added in quadrature.
    """
    mean = features.mean(0)
    sd = features.std(0)
    is_constant = sd <= 1e-10 * np.abs(mean)
    sd = np.where(is_constant, 1.0, sd)
    varied = np.ones(1) if is_constant.all() else sd[~is_constant]
    return mean, np.hypot(sd, sd_floor * math.sqrt(np.mean(varied**2)))


def inner_folds(groups):
    """Row indices of each of up to five folds: groups in random order, each into the smallest fold.

    A single group is cut by rows.
    """
    if len(np.unique(groups)) == 1:
        groups = np.arange(len(groups))
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    folds = min(5, len(names))
    order = np.random.default_rng(0).permutation(len(names))
    fold_of = splitting.deal_out_units(sizes, order, np.full(folds, 1 / folds))
    return [np.flatnonzero(fold_of[index] == fold) for fold in range(folds)]


@dataclasses.dataclass
class Readout:
    """A linear model on features as they are, K outputs: scores, or logits of classes."""

    weights: np.ndarray  # (F, K)
    intercept: np.ndarray  # (K,), -inf for a class without a train row
    blocks: list  # the chosen block of each target, one for all classes; the others weigh 0

    def predict(self, features):
        """(N, F) features -> (N, K) float64."""
        return features @ self.weights + self.intercept

    def write_into(self, layer):
        """Give an nn.Linear these weights."""
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.weights.T))
            layer.bias.copy_(torch.from_numpy(self.intercept))


# --- ridge regression ----------------------------------------------------------------------------


def _fit_ridge(x, target, groups):
    """Ridge regression in closed form, lambda > 0 per target by inner cross-validation.

    x: (N, F) standardised; target: (N, R), NaN = missing; groups: (N,), never cut by an inner fold. Minimises
    |y - Xw - b|^2 + lambda |w|^2. Targets labelled on the same rows share one eigendecomposition; a target with fewer
    than 3 labelled rows is predicted by its mean. Returns weights (F, R), intercepts (R,) and the squared errors (R,)
    summed over the left-out inner folds.
    """
    n_targets = target.shape[1]
    weights = np.zeros((x.shape[1], n_targets))
    intercept = common.mean_without_nan(target, axis=0)
    error = np.full(n_targets, np.nan)
    labelled = ~np.isnan(target)
    for rows in np.unique(labelled, axis=1).T:
        if rows.sum() < 3:
            continue
        columns = np.flatnonzero((labelled == rows[:, None]).all(0))
        folds = inner_folds(groups[rows])
        weights[:, columns], error[columns] = _solve_ridge(x[rows], target[np.ix_(rows, columns)], folds)
        intercept[columns] -= x[rows].mean(0) @ weights[:, columns]
    return weights, intercept, error


def _solve_ridge(x, y, folds):
    """Weights (F, R) of the lambda with the smallest held-out squared error, and that error (R,)."""
    x = x - x.mean(0)
    y = y - y.mean(0)
    is_primal = x.shape[1] <= len(x)
    power, basis = np.linalg.eigh(x.T @ x if is_primal else x @ x.T)
    power = np.maximum(power, 0.0)  # (K,)
    # (N, K): orthogonal columns of squared length `power`
    scores = x @ basis if is_primal else basis * np.sqrt(power)
    projected = scores.T @ y  # (K, R)
    errors = held_out_errors(scores, y, projected, power, folds)  # (lambdas, R)
    penalty = RIDGE_LAMBDAS[errors.argmin(0)]
    error = errors.min(0)
    coefficients = projected / (power[:, None] + penalty)  # (K, R)
    if is_primal:
        return basis @ coefficients, error
    dual = coefficients / np.sqrt(np.maximum(power, 1e-300))[:, None]
    return x.T @ (basis @ dual), error


def held_out_errors(scores, y, projected, power, folds):
    """(lambdas, R) summed squared errors of the left-out folds of ridge regressions, without refitting.

    residual_g = (I - H_gg)^-1 (y - H y)_g, exact for H = 11'/N + Z (Z'Z + lambda)^-1 Z' (PRESS,
    Allen 1974, for blocks of rows); where a fold has more rows than Z columns, by Woodbury's identity.
    scores: Z (N, K); projected: Z'y; power: (K,) of Z'Z.
    """
    damped = [np.append(len(y), power + penalty) for penalty in RIDGE_LAMBDAS]  # (K + 1,), the constant first
    residuals = [y - scores @ (projected / own[1:, None]) for own in damped]
    totals = np.zeros((len(RIDGE_LAMBDAS), y.shape[1]))
    for rows in folds:
        z = np.column_stack([np.ones(len(rows)), scores[rows]])  # (n, K + 1)
        is_tall = len(rows) > z.shape[1]
        gram = z.T @ z if is_tall else None
        for total, residual, own in zip(totals, residuals, damped):
            if is_tall:
                left_out = residual[rows] + z @ np.linalg.solve(np.diag(own) - gram, z.T @ residual[rows])
            else:
                left_out = np.linalg.solve(np.eye(len(rows)) - z / own @ z.T, residual[rows])
            total += (left_out**2).sum(0)
    return totals


# --- logistic regression -------------------------------------------------------------------------


def _fit_logistic(x, label, groups, n_classes):
    """Multinomial logistic regression, lambda > 0 by inner cross-validation.

    x: (N, F) standardised; label: (N,) class indices; groups: as in _fit_ridge. Minimises the summed
    NLL + lambda / 2 |W|^2, with two classes + lambda |W|^2, so that lambda = 1 / C of scikit-learn.
    Returns weights (F, C), intercepts (C,) and the NLL summed over the left-out inner folds.
    """
    # rotated to K columns, which changes neither the penalty nor the prediction
    left, length, basis = np.linalg.svd(x, full_matrices=False)
    scores = left * length  # (N, K)
    penalty, error = _choose_penalty(scores, label, n_classes, inner_folds(groups))
    weights, intercept = _solve_logistic(scores, label, n_classes, penalty)
    return basis.T @ weights, intercept, error


def _choose_penalty(scores, label, n_classes, folds):
    """(lambda of the smallest held-out NLL, that NLL), from large ones down until three bring no gain."""
    penalties = LOGISTIC_LAMBDAS[::-1]
    errors = []
    for penalty in penalties:
        errors.append(sum(_held_out_nll(scores, label, n_classes, rows, penalty) for rows in folds))
        best = np.argmin(errors)
        if len(errors) - best > 3:
            break
    return penalties[best], errors[best]


def _held_out_nll(scores, label, n_classes, rows, penalty):
    """Summed NLL of these rows by a fit on the others; a class they lack does not count."""
    others = np.setdiff1d(np.arange(len(label)), rows)
    weights, intercept = _solve_logistic(scores[others], label[others], n_classes, penalty)
    rows = rows[np.isin(label[rows], label[others])]
    probability = class_scores.softmax(scores[rows] @ weights + intercept)
    likelihood = probability[np.arange(len(rows)), label[rows]]
    return -np.log(np.maximum(likelihood, 1e-300)).sum()


def _solve_logistic(scores, label, n_classes, penalty):
    """Weights (K, C) and intercepts (C,) by full-batch L-BFGS; scores (N, K), label (N,).

    A column divided by the root of the curvature that it can have at most (a half of its squared
    length, Boehning 1992, and the penalty) makes the problem round: few steps, whatever the unit.
    """
    is_present = np.isin(np.arange(n_classes), label)
    scale = 1.0 / np.sqrt((scores**2).sum(0) / 2 + penalty)  # (K,)
    x = torch.from_numpy(scores * scale)
    y = torch.from_numpy(label)
    scale = torch.from_numpy(scale)[:, None]
    strength = penalty if n_classes == 2 else penalty / 2
    weights = torch.zeros(x.shape[1], n_classes, dtype=torch.float64, requires_grad=True)
    # the gradient of -inf is 0
    intercept = torch.from_numpy(np.where(is_present, 0.0, -np.inf)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights, intercept],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        nll = torch.nn.functional.cross_entropy(x @ weights + intercept, y, reduction="sum")
        loss = nll + strength * ((weights * scale) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weights * scale).detach().numpy(), intercept.detach().numpy()


# --- a readout of an untuned network -------------------------------------------------------------


def fit_readout(features, truth, groups=None, n_classes=None, blocks=None):
    """Linear model on (N, F) features of one untuned network -> Readout.

    truth: (N, R) scores, NaN = missing (ridge regression), or with n_classes (N,) labels (logistic
    regression). groups: (N,) text of rows that are not independent, None = every row its own.
    blocks: {name: indices of columns}, of which each target takes the one whose error on the inner
    folds is the smallest, as it takes its penalty; None = all columns.
    """
    features = np.asarray(features, np.float64)
    groups = np.arange(len(features)) if groups is None else groups
    blocks = blocks or {"all": np.arange(features.shape[1])}
    fit = functools.partial(_fit_logistic, n_classes=n_classes) if n_classes else _fit_ridge
    models = {}
    errors = []
    for name, columns in blocks.items():
        mean, sd = standardisation(features[:, columns], FEATURE_SD_FLOOR)
        weights, intercept, error = fit((features[:, columns] - mean) / sd, truth, groups)
        weights = weights / sd[:, None]  # of features as they are
        models[name] = weights, intercept - mean @ weights
        errors.append(np.atleast_1d(error))
    with common.undefined_is_nan():  # the first block where rows are too few to tell
        ratios = (errors / np.min(errors, axis=0)).round(9)  # equal ones are not told apart by rounding
    chosen = [list(blocks)[best] for best in ratios.argmin(axis=0)]
    n_outputs = n_classes or truth.shape[1]
    readout = Readout(np.zeros((features.shape[1], n_outputs)), np.zeros(n_outputs), chosen)
    for k, name in enumerate(np.resize(chosen, n_outputs)):
        weights, intercept = models[name]
        readout.weights[blocks[name], k] = weights[:, k]
        readout.intercept[k] = intercept[k]
    return readout


def time_baselines(values, times, sequences, train, rows):
    """{interpolated, nearest_in_time: (M, K)} from the train rows of the same sequence, on both sides of a gap.

    values: (N, K), NaN = missing; times: (N,). The train mean where a sequence has no
    train row; {} where none has any.
    """
    if not np.isin(sequences[rows], sequences[train]).any():
        return {}
    found = {name: train_mean_baseline(values[train], len(rows)) for name in ("interpolated", "nearest_in_time")}
    train = train[np.argsort(times[train])]
    for sequence in np.unique(sequences[rows]):
        own = sequences[rows] == sequence
        asked = times[rows[own]]
        for k, column in enumerate(values.T):
            known = train[(sequences[train] == sequence) & ~np.isnan(column[train])]
            if len(known):
                nearest = np.abs(asked[:, None] - times[known]).argmin(1)
                found["interpolated"][own, k] = np.interp(asked, times[known], column[known])
                found["nearest_in_time"][own, k] = column[known[nearest]]
    return found


def means_by_place(values, place, sequences, train, rows):
    """(M, K) means of the train rows' values (N_train, K), weighted by nearness of place (0 to 1) in a sequence.

    Those of the row's own sequence count, if there are any, else all.
    """
    found = []
    for block in np.array_split(rows, len(rows) // 1024 + 1):
        apart = (place[block][:, None] - place[train]) / 0.05  # (B, N_train), a twentieth of the sequence
        logits = -0.5 * apart ** 2
        same = sequences[block][:, None] == sequences[train]
        logits[~same & same.any(1, keepdims=True)] = -np.inf
        found.append(class_scores.softmax(logits) @ values)
    return np.concatenate(found)
