"""What trains no network: the train mean, the class shares, and linear models on fixed features.

Letters: N rows, F features, R scores, C classes.
"""
import dataclasses
import math

import numpy as np
import torch

import common

RIDGE_LAMBDAS = tuple(10.0 ** (k / 2) for k in range(-2, 13))
LOGISTIC_LAMBDAS = tuple(10.0 ** (k / 2) for k in range(-2, 11))


def train_mean_baseline(train_target, n_rows):
    """Each target's mean over the train rows as the prediction: (N, R) with NaN = missing -> (n_rows, R)."""
    return np.tile(common.mean_without_nan(np.asarray(train_target, np.float64), axis=0), (n_rows, 1))


@dataclasses.dataclass
class Ridge:
    """A linear model on standardised features, made by fit_ridge; penalty (R,) is the chosen lambda of each target."""
    feature_mean: np.ndarray  # (F,)
    feature_sd: np.ndarray  # (F,)
    weights: np.ndarray  # (F, R)
    intercept: np.ndarray  # (R,)
    penalty: np.ndarray  # (R,)

    def predict(self, features):
        """(N, F) features -> (N, R) float64 in the unit of the labels."""
        return (np.asarray(features, np.float64) - self.feature_mean) / self.feature_sd @ self.weights + self.intercept


def standardisation(features, sd_floor=0.0):
    """(mean, sd), both (F,), of (N, F) features; 1 for the sd of a constant one; sd_floor as fit_ridge explains."""
    mean, sd = features.mean(0), features.std(0)
    sd = np.where(sd > 1e-10 * (np.abs(mean) + 1e-300), sd, 1.0)
    return mean, np.hypot(sd, sd_floor * math.sqrt(np.mean(sd ** 2)))


def fit_ridge(features, target, lambdas=RIDGE_LAMBDAS, groups=None, folds=5, seed=0, sd_floor=0.0):
    """Ridge regression in closed form, lambda > 0 per target by inner cross-validation -> Ridge.

    features: (N, F), standardised here (a constant one becomes 0); target: (N, R), NaN = missing; groups: (N,) names,
    never cut by an inner fold. Minimises |y - Xw - b|^2 + lambda |w|^2. Targets labelled on the same rows share one
    eigendecomposition; under 3 labelled rows the prediction is their mean. sd_floor: features of one network share a
    unit, so one that hardly varied here must not count as many sds when it does later; a share of the RMS sd is added.
    """
    features, target = np.asarray(features, np.float64), np.asarray(target, np.float64)
    mean, sd = standardisation(features, sd_floor)
    x, groups = (features - mean) / sd, np.arange(len(features)) if groups is None else np.asarray(groups, str)
    model = Ridge(mean, sd, np.zeros((x.shape[1], target.shape[1])), common.mean_without_nan(target, axis=0),
                  np.full(target.shape[1], np.nan))
    labelled = ~np.isnan(target)
    for rows in (rows for rows in np.unique(labelled, axis=1).T if rows.sum() >= 3):
        columns = np.flatnonzero((labelled == rows[:, None]).all(0))
        weights, penalty = _ridge_solve(x[rows], target[np.ix_(rows, columns)], np.asarray(lambdas, np.float64),
                                        _inner_folds(groups[rows], folds, seed))
        model.weights[:, columns], model.penalty[columns] = weights, penalty
        model.intercept[columns] -= x[rows].mean(0) @ weights
    return model


def _ridge_solve(x, y, lambdas, folds):
    """Weights (F, R) and the lambda (R,) with the smallest held-out squared error for x (N, F), y (N, R)."""
    x, y = x - x.mean(0), y - y.mean(0)
    primal = x.shape[1] <= len(x)
    power, basis = np.linalg.eigh(x.T @ x if primal else x @ x.T)
    power = np.maximum(power, 0.0)  # (K,), the smaller of N and F
    scores = x @ basis if primal else basis * np.sqrt(power)  # (N, K): orthogonal columns of squared length `power`
    projected = scores.T @ y  # (K, R)
    error = np.stack([_held_out_error(scores, y, projected, power + penalty, folds) for penalty in lambdas])  # (L, R)
    penalty = lambdas[error.argmin(0)]
    coefficients = projected / (power[:, None] + penalty)  # (K, R)
    dual = coefficients / np.sqrt(np.maximum(power, 1e-300))[:, None]
    return basis @ coefficients if primal else x.T @ (basis @ dual), penalty


def _held_out_error(scores, y, projected, damped, folds):
    """(R,) squared errors of the left-out folds without refitting: residual_g = (I - H_gg)^-1 (y - H y)_g, exact for
    H = 11'/N + Z (Z'Z + lambda)^-1 Z' (PRESS, Allen 1974, for blocks of rows)."""
    residual, total = y - scores @ (projected / damped[:, None]), np.zeros(y.shape[1])
    for rows in folds:
        hat = scores[rows] / damped @ scores[rows].T + 1.0 / len(y)
        total += (np.linalg.solve(np.eye(len(rows)) - hat, residual[rows]) ** 2).sum(0)
    return total


def _inner_folds(groups, folds, seed):
    """Row indices of each fold: groups in random order, each into the smallest fold; one group alone: cut by rows."""
    if len(np.unique(groups)) == 1:
        groups = np.arange(len(groups))
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    fold_of, filled = np.zeros(len(names), np.int64), np.zeros(min(folds, len(names)))
    for group in np.random.default_rng(seed).permutation(len(names)):
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return [np.flatnonzero(fold_of[index] == fold) for fold in range(len(filled))]


def prior_baseline(train_label, n_rows, n_classes):
    """Share of each class among the train labels (below 0 = missing) as everybody's prediction -> (n_rows, C)."""
    train_label = np.asarray(train_label, np.int64)
    counts = np.bincount(train_label[train_label >= 0], minlength=n_classes).astype(np.float64)
    return np.tile(counts / max(counts.sum(), 1.0), (n_rows, 1))


@dataclasses.dataclass
class Logistic:
    """A multinomial logistic model on standardised features, made by fit_logistic; penalty is the chosen lambda."""
    feature_mean: np.ndarray  # (F,)
    feature_sd: np.ndarray  # (F,)
    weights: np.ndarray  # (F, C)
    intercept: np.ndarray  # (C,), -inf for a class without a train row
    penalty: float

    def predict(self, features):
        """(M, F) features -> (M, C) probabilities."""
        features = (np.asarray(features, np.float64) - self.feature_mean) / self.feature_sd
        return common.softmax(features @ self.weights + self.intercept)


def fit_logistic(features, label, n_classes=None, lambdas=LOGISTIC_LAMBDAS, groups=None, folds=5, seed=0, sd_floor=0.0):
    """Multinomial logistic regression with a ridge penalty, lambda > 0 by inner cross-validation -> Logistic.

    features (N, F), groups, folds and sd_floor as in fit_ridge; label: (N,) class indices, below 0 = missing (row left
    out). Minimises the summed NLL + lambda / 2 |W|^2, with two classes + lambda |W|^2, so that lambda = 1 / C of
    scikit-learn. The inner folds judge by the NLL, from large lambdas down until three bring no gain; a held-out row
    of a class that the other folds lack does not count.
    """
    label = np.asarray(label, np.int64)
    kept = label >= 0
    if not kept.any():
        raise common.UserError(f"a logistic baseline needs labelled rows, found none among {len(label)}")
    features, names = np.asarray(features, np.float64)[kept], np.arange(len(label)) if groups is None else groups
    n_classes, label = n_classes or int(label.max()) + 1, label[kept]
    mean, sd = standardisation(features, sd_floor)
    left, power, basis = np.linalg.svd((features - mean) / sd, full_matrices=False)
    scores = left * power  # (N, K), K the smaller of N and F: the penalty does not change under rotation
    parts = _inner_folds(np.asarray(names, str)[kept], folds, seed) if len(lambdas) > 1 else []
    trained_on = np.ones((len(parts), len(label)), bool)
    for number, rows in enumerate(parts):
        trained_on[number, rows] = False
    chosen = len(parts) > 1 and _choose_penalty(scores, power, label, n_classes, trained_on, lambdas)
    penalty = chosen or max(lambdas)
    weights, intercept = _logistic_solve(scores, power, label, n_classes, np.ones((1, len(label)), bool), penalty)
    return Logistic(mean, sd, basis.T @ weights[0], intercept[0, 0], float(penalty))


def _choose_penalty(scores, power, label, n_classes, trained_on, lambdas):
    """The lambda with the smallest held-out NLL; trained_on: (folds, N)."""
    errors = {}
    for penalty in sorted(lambdas, reverse=True):
        weights, intercept = _logistic_solve(scores, power, label, n_classes, trained_on, penalty, tolerance=1e-3)
        errors[penalty] = _held_out_nll(scores @ weights + intercept, label, trained_on)
        if len(errors) > 3 and min(errors, key=errors.get) not in list(errors)[-3:]:
            break
    return min(errors, key=errors.get)


def _held_out_nll(logits, label, trained_on):
    """Summed NLL of the rows left out of each fit: (folds, N, C) logits, (folds, N) True = trained on -> float."""
    known = np.isfinite(np.take_along_axis(logits, label[None, :, None], 2)[..., 0])
    likelihood = np.take_along_axis(common.softmax(logits), label[None, :, None], 2)[..., 0]  # (folds, N)
    return float(-np.log(np.maximum(likelihood[known & ~trained_on], 1e-300)).sum())


def _logistic_solve(scores, power, label, n_classes, trained_on, penalty, tolerance=1e-7):
    """Weights (J, K, C) and intercepts (J, 1, C) of J fits on the rows (J, N) True, all in one L-BFGS.

    scores: (N, K) with orthogonal columns of length `power`: dividing each by the root of the curvature that it can
    have at most (Boehning 1992: a half, and the penalty) makes the problem round, whatever the features.
    """
    scale = torch.from_numpy(1.0 / np.sqrt(power ** 2 / 2 + penalty))[:, None]  # (K, 1)
    x, y, rows = torch.from_numpy(scores) * scale.T, torch.from_numpy(label), torch.from_numpy(trained_on).double()
    present = torch.stack([(rows * (y == c)).sum(1) > 0 for c in range(n_classes)], 1)[:, None]  # (J, 1, C)
    weights = torch.zeros(len(rows), x.shape[1], n_classes, dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(len(rows), 1, n_classes, dtype=torch.float64, requires_grad=True)
    width, strength = math.sqrt(2.0 / len(label)), penalty * (1 if n_classes == 2 else 0.5)
    optimizer = torch.optim.LBFGS([weights, intercept], max_iter=500, history_size=20, tolerance_grad=tolerance,
                                  tolerance_change=1e-5 * tolerance, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = torch.where(present, x @ weights + intercept * width, -math.inf)  # (J, N, C)
        likelihood = torch.log_softmax(logits, 2).gather(2, y[None, :, None].expand(len(rows), -1, 1))[..., 0]
        loss = strength * ((weights * scale) ** 2).sum() - torch.where(rows > 0, likelihood, 0.0).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    found = torch.where(present, intercept * width, -math.inf)
    return (weights * scale).detach().numpy(), found.detach().numpy()


def place_weights(place, sequences, train, rows, width=0.05):
    """(M, N_train) weights, rows adding up to 1, by nearness of place (0 to 1) in a sequence; the own one's, if any."""
    apart = (place[rows][:, None] - place[train][None]) / width
    logits = -0.5 * apart ** 2
    same = sequences[rows][:, None] == sequences[train][None]
    logits[~same & same.any(1, keepdims=True)] = -np.inf
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
