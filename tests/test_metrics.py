"""Metrics, ridge, alarms, criteria and the verdict, against scikit-learn, scipy and torchmetrics.

    python -m pytest tests/test_metrics.py
"""
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics.functional.regression as torch_regression
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common
from evidence import (
    baseline_models, class_judging, confounding, judging, prediction_tables, rater_agreement, score_judging, seen_rows,
    subject_intervals, verdicts)
from conftest import class_alarms, fit_as_sklearn


def noisy_pair(rows=200, targets=3, seed=0, offset=0.0, missing=0.0):
    """Targets (N, R) and predictions that correlate with them; a share of the labels is NaN."""
    generator = np.random.default_rng(seed)
    target = offset + generator.normal(size=(rows, targets)) * [1.0, 5.0, 0.1][:targets]
    predicted = target + generator.normal(size=target.shape) * [0.5, 5.0, 0.3][:targets]
    target[generator.random(target.shape) < missing] = np.nan
    return predicted, target


# --- metrics -------------------------------------------------------------------------------------

@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_metrics_equal_sklearn_and_scipy_on_the_labelled_rows(offset, missing):
    predicted, target = noisy_pair(offset=offset, missing=missing)
    ours = common.regression_metrics(predicted, target)
    for k in range(target.shape[1]):
        seen = ~np.isnan(target[:, k])
        p, t = predicted[seen, k], target[seen, k]
        judged = {"n": seen.sum(), "pearson_r": stats.pearsonr(p, t)[0], "r2": r2_score(t, p),
                  "mae": mean_absolute_error(t, p), "mse": mean_squared_error(t, p),
                  "rmse": math.sqrt(mean_squared_error(t, p))}
        assert {name: values[k] for name, values in ours.items()} == pytest.approx(judged, rel=1e-7), k


def test_metrics_equal_torchmetrics():
    predicted, target = noisy_pair()
    ours = common.regression_metrics(predicted, target)
    p, t = torch.from_numpy(predicted), torch.from_numpy(target)
    np.testing.assert_allclose(ours["pearson_r"], torch_regression.pearson_corrcoef(p, t), rtol=1e-6)
    np.testing.assert_allclose(ours["r2"], torch_regression.r2_score(p, t, multioutput="raw_values"), rtol=1e-6)
    np.testing.assert_allclose(ours["mse"], torch_regression.mean_squared_error(p, t, num_outputs=3), rtol=1e-6)


def test_edge_cases_are_nan_or_zero_as_documented():
    nan = np.nan
    #                    no label  n = 1   constant target  constant prediction  perfect
    target = np.array([[nan, 2.0, 4.1, 1.0, 1.0], [nan, nan, 4.1, 2.0, 2.0], [nan, nan, 4.1, 4.0, 4.0]])
    predicted = np.array([[1.0, 2.5, 1.0, 0.1, 1.0], [1.0, 1.0, 2.0, 0.1, 2.0], [1.0, 1.0, 3.0, 0.1, 4.0]])
    ours = common.regression_metrics(predicted, target)
    assert ours["n"].tolist() == [0, 1, 3, 3, 3]
    np.testing.assert_array_equal(ours["pearson_r"], [nan, nan, nan, 0.0, 1.0])
    np.testing.assert_allclose(ours["mae"], [nan, 0.5, 2.1, 2.2333333333, 0.0])
    np.testing.assert_allclose(ours["r2"], [nan, nan, nan, r2_score([1, 2, 4], [0.1] * 3), 1.0])
    assert common.mean_metrics(predicted, target)["pearson_r"] == 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_takes_no_correlation_past_one(sign):
    target = np.random.default_rng(0).normal(size=(20, 500))
    r = common.regression_metrics(sign * (3 * target + 1), target)["pearson_r"]
    assert (sign * r).max() == 1 and (sign * r).min() > 1 - 1e-12


def test_no_defined_target_gives_nan_without_a_warning(recwarn):
    means = common.mean_metrics(np.zeros((0, 2)), np.zeros((0, 2)))
    assert math.isnan(means["r2"]) and not recwarn.list


def test_a_prediction_that_is_not_a_number_is_not_hidden():
    predicted, target = noisy_pair()
    predicted[3, 1] = np.nan
    ours = common.regression_metrics(predicted, target)
    assert np.isnan(ours["r2"]).tolist() == [False, True, False]


@settings(max_examples=200, deadline=None)
@given(arrays(np.float64, st.integers(3, 12), elements=st.integers(-50, 50).map(float)),
       st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_r_ignores_shift_and_scale_and_a_constant_gives_zero(target, shift, scale):
    predicted = np.random.default_rng(0).normal(size=target.shape)
    first = common.regression_metrics(predicted[:, None], target[:, None])["pearson_r"]
    moved = common.regression_metrics((predicted * scale + shift)[:, None], target[:, None])["pearson_r"]
    np.testing.assert_allclose(first, moved, rtol=1e-6, atol=1e-9)
    constant = common.regression_metrics(np.full_like(target, shift)[:, None], target[:, None])["pearson_r"]
    assert constant[0] == 0.0 or np.ptp(target) == 0.0


def test_shapes_that_differ_are_a_programming_error():
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(3, 2\)"):
        common.regression_moments(np.zeros((3, 1)), np.zeros((3, 2)))


# --- the bootstrap's values, exact parts of it --------------------------------------------------

def test_the_interval_is_t_times_the_sd_of_metrics_of_resampled_rows(monkeypatch):
    """Subjects drawn by hand, every metric computed anew on their rows; on the scale where it is nearest to normal.

    That of R2 also lies about the value without the bias that the resamples show.
    """
    monkeypatch.setattr(subject_intervals, "FEWEST_FOR_BOOTSTRAP", 20)
    monkeypatch.setattr(subject_intervals, "estimate", functools.partial(subject_intervals.estimate, draws=40))
    predicted, target = noisy_pair(rows=120, missing=0.1)
    subjects = np.repeat([f"s{k:02d}" for k in range(24)], 5)
    result = subject_intervals.bootstrap_regression(predicted, target, subjects)
    drawn = []
    for pick in np.random.default_rng(0).integers(0, 24, (40, 24)):
        rows = np.concatenate([np.flatnonzero(subjects == f"s{k:02d}") for k in pick])
        drawn.append(common.regression_metrics(predicted[rows], target[rows]))
    reach = stats.t.ppf(0.975, 23) * math.sqrt(24 / 23)
    scales = dict.fromkeys(("mae", "mse", "rmse"), (np.log, np.exp))
    scales |= {"pearson_r": (np.arctanh, np.tanh), "r2": (lambda r2: -np.log(1 - r2), lambda scaled: 1 - np.exp(-scaled))}
    for name, (forward, backward) in scales.items():
        found = result.each.model[name]
        scaled = np.array([forward(each[name]) for each in drawn])
        half = reach * scaled.std(0)
        centre = forward(found.value)
        bias = scaled.mean(0) - centre if name == "r2" else 0.0
        np.testing.assert_allclose(found.low, backward(centre - np.maximum(bias, 0) - half), rtol=1e-4)
        np.testing.assert_allclose(found.high, backward(centre - np.minimum(bias, 0) + half), rtol=1e-4)


def test_values_equal_the_metrics_and_the_difference_is_paired():
    predicted, target = noisy_pair(rows=400, missing=0.1)
    labelled = 400 - np.isnan(target).all(1).sum()
    result = subject_intervals.bootstrap_regression(predicted, target, baseline=predicted)
    direct = common.regression_metrics(predicted, target)
    for name in common.REGRESSION_METRICS:
        np.testing.assert_allclose(result.each.model[name].value, direct[name], rtol=1e-9)
        mean = result.overall.model[name]
        assert mean.low < mean.value < mean.high, name
        # a model against itself: the same resamples leave no difference at all
        np.testing.assert_array_equal(result.each.difference[name].low, np.zeros(3))
        np.testing.assert_array_equal(result.each.difference[name].high, np.zeros(3))
    assert result.rows == result.subjects == labelled < 400 and "rows" in result.method


def test_blocks_of_draws_do_not_change_what_is_drawn():
    blocks = list(subject_intervals.draw_subjects(300, 10, block=4))
    [whole] = subject_intervals.draw_subjects(300, 10, block=10)
    assert [len(block) for block in blocks] == [4, 4, 2] and (whole.sum(1) == 300).all()
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_few_subjects_get_values_and_no_interval_and_no_p():
    predicted, target = noisy_pair(rows=40)
    result = subject_intervals.bootstrap_regression(predicted, target, np.repeat(["a", "b"], 20), baseline=target * 0)
    assert not result.has_intervals and set(result.sign_flip_p.values()) == {None}
    assert math.isnan(result.overall.model["r2"].low) and math.isfinite(result.overall.model["r2"].value)
    own = [common.mean_metrics(each[:20], target[:20])["mae"] for each in (predicted, target * 0)]
    assert result.per_subject["mae"][0] == pytest.approx(own[0] - own[1])
    assert result.method == "no interval under 5 subjects, here 2"


def test_a_target_seen_in_few_subjects_has_no_interval():
    predicted, target = noisy_pair(rows=100)
    subjects = np.repeat(np.arange(25), 4)
    target[subjects >= 4, 2] = np.nan
    found = subject_intervals.bootstrap_regression(predicted, target, subjects).each.model["mae"]
    for ends in (found.low, found.high):
        assert np.isfinite(ends[:2]).all() and np.isnan(ends[2])


def test_equal_clusters_give_the_t_interval_of_the_subjects_means():
    predicted, target = noisy_pair(rows=9 * 6, targets=1)
    subjects = np.repeat(np.arange(9), 6)
    found = subject_intervals.bootstrap_regression(predicted, target, subjects, target * 0).overall.difference["mae"]
    own = (np.abs(predicted - target) - np.abs(target)).reshape(9, 6).mean(1)
    judged = stats.t.interval(0.95, 8, own.mean(), stats.sem(own))
    np.testing.assert_allclose([found.low, found.high], judged, rtol=1e-6)


@pytest.mark.parametrize("df", [1, 2, 4, 17, 39, 803, 4999])
def test_t_quantile_equals_scipy(df):
    assert subject_intervals.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-4)


def test_sign_flip_p_equals_scipy_and_stops_at_its_limits():
    differences = np.random.default_rng(1).normal(0.4, 1.0, 12)
    judged = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert subject_intervals.sign_flip_p(differences) == pytest.approx(judged.pvalue)
    assert subject_intervals.sign_flip_p(np.arange(1.0, 6.0)) == 2 / 32
    assert subject_intervals.sign_flip_p(np.zeros(6)) == 1.0
    assert subject_intervals.sign_flip_p(np.ones(16)) == 2 / 2 ** 16
    assert subject_intervals.sign_flip_p(np.ones(4)) is None and subject_intervals.sign_flip_p(np.ones(17)) is None
    assert subject_intervals.sign_flip_p(np.array([1, 2, 3, 4, np.nan])) is None


# --- baselines -----------------------------------------------------------------------------------

def linear_data(rows, features, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(3.0, generator.uniform(0.1, 10.0, features), (rows, features))
    z = (x - x.mean(0)) / x.std(0)
    noise = np.array([0.3, 1.0, 3.0])
    return x, z @ generator.normal(size=(features, 3)) / math.sqrt(features) + generator.normal(size=(rows, 3)) * noise


def test_train_mean_baseline_leaves_missing_labels_out():
    baseline = baseline_models.train_mean_baseline([[1.0, np.nan], [3.0, 8.0]], 3)
    np.testing.assert_array_equal(baseline, [[2.0, 8.0]] * 3)


@pytest.mark.parametrize("rows, features", [(120, 20), (60, 200), (40, 40)])
def test_ridge_equals_sklearn_at_a_given_lambda(rows, features):
    x, y = linear_data(rows, features)
    ours = fit_as_sklearn(x[:-10], y[:-10], 7.0)
    theirs = make_pipeline(StandardScaler(), Ridge(7.0)).fit(x[:-10], y[:-10])
    np.testing.assert_allclose(ours.predict(x[-10:]), theirs.predict(x[-10:]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rows, features", [(120, 20), (60, 200)])
def test_ridge_chooses_lambda_as_a_refit_of_every_inner_fold_would(rows, features):
    x, y = linear_data(rows, features)
    folds = baseline_models.inner_folds(np.arange(rows))
    fold_of = np.zeros(rows, int)
    for number, members in enumerate(folds):
        fold_of[members] = number
    ours = fit_as_sklearn(x, y)
    z = StandardScaler().fit_transform(x)
    for k in range(3):
        errors = [_refit_error(z, y[:, k], fold_of, alpha) for alpha in baseline_models.RIDGE_LAMBDAS]
        chosen = baseline_models.RIDGE_LAMBDAS[int(np.argmin(errors))]
        alone = fit_as_sklearn(x, y[:, [k]], chosen)
        np.testing.assert_allclose(ours.weights[:, [k]], alone.weights, rtol=1e-9, atol=1e-12)
        search = GridSearchCV(Ridge(), {"alpha": baseline_models.RIDGE_LAMBDAS}, cv=PredefinedSplit(fold_of),
                              scoring="neg_mean_squared_error").fit(z, y[:, k])
        assert chosen == search.best_params_["alpha"]


def _refit_error(z, y, fold_of, alpha):
    return sum(np.sum((y[fold_of == f] - Ridge(alpha).fit(z[fold_of != f], y[fold_of != f]).predict(z[fold_of == f]))
                      ** 2) for f in range(5))


@pytest.mark.parametrize("features", [5, 15, 150])  # fewer than the 16 rows of a fold, as many with the constant, more
def test_left_out_residuals_equal_refitting(features):
    x, y = linear_data(80, features)
    z = StandardScaler().fit_transform(x)
    fold_of = np.arange(80) % 5
    centred = y - y.mean(0)
    basis, size, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    scores = basis * size
    errors = baseline_models.held_out_errors(
        scores, centred, scores.T @ centred, size ** 2, [np.flatnonzero(fold_of == f) for f in range(5)])
    expected = [[_refit_error(z, y[:, k], fold_of, alpha) for k in range(3)] for alpha in baseline_models.RIDGE_LAMBDAS]
    np.testing.assert_allclose(errors, expected, rtol=1e-7)


@pytest.mark.filterwarnings("error")
def test_a_readout_of_two_rows_of_two_classes_takes_the_first_block():
    features = np.array([[0.0, 1.0], [1.0, 0.0]])
    readout = baseline_models.fit_readout(features, np.array([0, 1]), n_classes=2, blocks={"a": [0], "b": [1]})
    assert readout.blocks == ["a"] and np.isfinite(readout.weights).all()


def test_a_readout_takes_for_each_target_the_block_with_the_smallest_error_of_the_inner_folds():
    """Two blocks tell a target each, a third needs both. Judge: scikit-learn's search over the same folds and blocks."""
    draws = np.random.default_rng(3)
    x = draws.normal(size=(120, 30)) * draws.uniform(0.5, 2, 30)
    y = np.stack([x[:, :10].sum(1), x[:, 10:].sum(1), x.sum(1)], 1) + draws.normal(size=(120, 3))
    blocks = {"left": np.arange(10), "right": np.arange(10, 30), "both": np.arange(30)}
    groups = (np.arange(120) // 4).astype(str)
    readout = baseline_models.fit_readout(x, y, groups, blocks=blocks)
    assert readout.blocks == ["left", "right", "both"]
    for k, name in enumerate(readout.blocks):
        own = baseline_models.fit_readout(x[:, blocks[name]], y[:, [k]], groups)
        np.testing.assert_allclose(readout.predict(x)[:, k], own.predict(x[:, blocks[name]])[:, 0], rtol=1e-7)
        outside = np.setdiff1d(np.arange(30), blocks[name])
        assert (readout.weights[outside, k] == 0).all()
    label = (x[:, :10].sum(1) + draws.normal(size=120) > 0).astype(int)
    fold_of = np.zeros(120, int)
    for number, members in enumerate(baseline_models.inner_folds(groups)):
        fold_of[members] = number
    classes = baseline_models.fit_readout(x, label, groups, n_classes=2, blocks=blocks)
    losses = {}
    for name, columns in blocks.items():
        grid = {"C": [1 / penalty for penalty in baseline_models.LOGISTIC_LAMBDAS]}
        search = GridSearchCV(LogisticRegression(max_iter=5000), grid, scoring="neg_log_loss",
                              cv=PredefinedSplit(fold_of))
        losses[name] = -search.fit(StandardScaler().fit_transform(x[:, columns]), label).best_score_
    assert classes.blocks == [min(losses, key=losses.get)]
    layer = torch.nn.Linear(30, 2)
    classes.write_into(layer)
    with torch.inference_mode():
        np.testing.assert_allclose(layer(torch.from_numpy(x).float()).numpy(), classes.predict(x), atol=1e-4)


def test_ridge_with_one_row_per_fold_equals_ridgecv(monkeypatch):
    monkeypatch.setattr(baseline_models, "inner_folds", lambda groups: np.arange(len(groups))[:, None])
    x, y = linear_data(50, 8)
    ours = fit_as_sklearn(x, y)
    z = StandardScaler().fit_transform(x)
    theirs = RidgeCV(baseline_models.RIDGE_LAMBDAS, alpha_per_target=True).fit(z, y)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(z))


def test_ridge_uses_each_targets_own_labelled_rows():
    x, y = linear_data(90, 10)
    y[::3, 0] = np.nan
    y[:, 2] = np.nan
    y[:2, 2] = [4.0, 6.0]
    ours = fit_as_sklearn(x, y, 3.0)
    z, seen = StandardScaler().fit_transform(x), ~np.isnan(y[:, 0])
    np.testing.assert_allclose(ours.predict(x)[:, 0], Ridge(3.0).fit(z[seen], y[seen, 0]).predict(z), rtol=1e-7)
    np.testing.assert_allclose(ours.predict(x)[:, 2], 5.0)


def test_ridge_survives_constant_features_and_perfect_copies(recwarn):
    x, y = linear_data(60, 5)
    x = np.concatenate([x, x, np.full((60, 2), 0.1)], 1)
    predicted = fit_as_sklearn(x, y).predict(x)
    assert np.isfinite(predicted).all()
    np.testing.assert_allclose(predicted, fit_as_sklearn(x[:, :10], y).predict(x[:, :10]), rtol=1e-6)
    for none in (x[:, :0], x[:, -1:]):  # no features, or none that varies
        assert baseline_models.standardisation(none, 0.01)[1].tolist() == [math.hypot(1, 0.01)] * none.shape[1]
        assert not recwarn.list


def test_inner_folds_keep_groups_whole_and_are_balanced():
    groups = np.random.default_rng(0).integers(0, 23, 400).astype(str)
    folds = baseline_models.inner_folds(groups)
    assert sorted(np.concatenate(folds)) == list(range(400))
    assert sum(len(np.unique(groups[rows])) for rows in folds) == 23
    assert min(map(len, folds)) > 50
    assert len(baseline_models.inner_folds(np.array(["a", "a", "b"]))) == 2
    assert len(baseline_models.inner_folds(np.array(["a"] * 10))) == 5


# --- alarms --------------------------------------------------------------------------------------

def faults(alarms):
    """What is wrong, without what to do."""
    return [alarm.split(". ")[0] for alarm in alarms]


def test_a_healthy_model_raises_no_alarm():
    predicted, target = noisy_pair(missing=0.1)
    assert verdicts.regression_alarms(predicted, target, ["a", "b", "c"]) == []


def test_alarms_name_the_fault_and_the_targets():
    predicted, target = noisy_pair()
    predicted[:, 0] = 0.1
    predicted[5, 2] = np.nan
    target[:, 1] = 3.0
    alarms = verdicts.regression_alarms(predicted, target, ["Valence", "Arousal", "Trust"])
    assert faults(alarms) == ["not a finite number in the predictions: Trust",
                              "constant prediction, so r has no value and counts as 0: Valence",
                              "correlation undefined, the labels do not vary: Arousal",
                              "labels almost all equal (95 % or more share one value): Arousal"]


def test_constant_output_begins_at_five_percent_of_the_labels_spread():
    target = np.random.default_rng(0).normal(size=(300, 2))
    alarms = verdicts.regression_alarms(target * [0.049, 0.051], target, ["near", "far"])
    assert faults(alarms) == ["constant output (sd under 5 % of the labels', of all or in each fold): near"]


def test_models_of_folds_that_each_give_one_value_are_constant():
    """Pooled they vary, as each gives another one; single rows of many models tell nothing of the kind."""
    draw = np.random.default_rng(0)
    target = draw.normal(size=(90, 1))
    healthy = target + draw.normal(size=(90, 1))
    folds = np.repeat(["0", "1", "2"], 30)
    one_each = np.repeat([[-0.3], [0.1], [0.3]], 30, axis=0) + 1e-3 * draw.normal(size=(90, 1))
    assert verdicts.regression_alarms(one_each, target, ["Trust"]) == []
    assert faults(verdicts.regression_alarms(one_each, target, ["Trust"], folds)) == [
        "constant output (sd under 5 % of the labels', of all or in each fold): Trust"]
    one_each[5] = np.nan
    target[:40:2] = np.nan
    assert "or in each fold): Trust" in str(verdicts.regression_alarms(one_each, target, ["Trust"], folds))
    assert verdicts.regression_alarms(healthy, target, ["Trust"], folds) == []
    assert verdicts.regression_alarms(healthy, target, ["Trust"], np.arange(90)) == [], "one row is left out at a time"
    assert faults(verdicts.regression_alarms(0.01 * healthy, target, ["Trust"], np.arange(90))) == [
        "constant output (sd under 5 % of the labels', of all or in each fold): Trust"]


def test_alarms_on_repeated_predictions_gaps_and_identical_folds():
    predicted, target = noisy_pair()
    predicted[:4] = predicted[0]
    alarms = verdicts.regression_alarms(predicted, target, list("abc"))
    assert faults(alarms) == ["the same prediction for 4 rows, and for 3 or more in 4 of 200 rows"]
    gap = verdicts.split_gap_alarms({"pearson_r": 0.2}, {"pearson_r": 0.6}, "more rows")
    assert len(gap) == 1 and gap[0].startswith("train far below validation (pearson_r 0.200 and 0.600)")
    assert "train far above" in verdicts.split_gap_alarms({"pearson_r": 0.99}, {"pearson_r": 0.3}, "more rows")[0]
    assert verdicts.split_gap_alarms({"pearson_r": math.nan}, {"pearson_r": 0.3}, "more rows") == []
    assert verdicts.split_gap_alarms({"pearson_r": 0.99}, {"pearson_r": 0.3}, None) == [], "of a solved readout"
    folds = judging.identical_fold_alarms([{"fold": k, "best_epoch": k, "rows": 20 + k, "r2": r2, "mae": 0.2}
                                           for k, r2 in enumerate((0.1, 0.3, 0.1))])
    assert len(folds) == 1 and folds[0].startswith("folds 0 and 2 have identical results")


def test_identical_confusion_matrices_over_folds():
    """Each fold gives ear to all its rows; of two folds that may be chance, and right answers are all alike."""
    def alarms(n_folds, chosen):
        label = np.tile([0, 0, 1], n_folds)
        table = prediction_tables.ClassTable(
            keys={"clip": np.arange(len(label)), "fold": np.arange(n_folds).repeat(3)}, names=["ear", "tail"], baselines={},
            positive=1, truth=label, probability=np.eye(2)[label if chosen is None else chosen])
        return class_judging.fold_alarms(table)
    assert alarms(4, [0] * 12)[0].startswith("identical confusion matrices in all folds")
    assert not alarms(4, [0, 1, 1] * 4), "each with one error, but far better than chance"
    assert alarms(2, [0] * 6) == alarms(4, None) == alarms(3, [0] * 8 + [1]) == []
    assert alarms(3, [0, 1, 0, 1, 0, 0, 0, 1, 0]), "one matrix, whichever rows are wrong"
    assert not alarms(3, [0] * 6 + [1, 1, 0]), "another matrix, though no better than chance"


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_rounding_is_no_repeated_prediction(digits):
    """Rounded predictions of different rows meet by chance; a model that is stuck is told from them."""
    draw = np.random.default_rng(digits)
    target = draw.normal(3, 1, (890, 1))
    rounded = np.round(target + draw.normal(size=(890, 1)), digits)
    assert np.unique(rounded, return_counts=True)[1].max() >= 3 or digits == 4
    assert verdicts.regression_alarms(rounded, target, ["v"]) == []
    stuck = np.where(np.arange(890)[:, None] % 3 > 0, 2.5, rounded)
    assert faults(verdicts.regression_alarms(stuck, target, ["v"]))[0].startswith("the same prediction for")


@pytest.mark.parametrize("digits", [2, 3, 4, 5, 6])
def test_rounding_is_no_repeated_probability(digits):
    """Neither is a model that is sure of many rows."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        label = draw.integers(0, 2, 890)
        score = np.round(1 / (1 + np.exp(-6 * (2 * label - 1) - draw.normal(size=890))), digits)
        assert class_alarms(np.stack([1 - score, score], 1), label, ["a", "b"]) == []
    score = 1 / (1 + np.exp(1 - 2 * label - draw.normal(size=890)))
    score[:300] = 0.893456
    [alarm] = class_alarms(np.stack([1 - score, score], 1), label, ["a", "b"])
    assert "in 300 of 890 rows; that of b is 0.893456 in 300 of them" in alarm
    few = np.where(label == 1, 1 / 2 ** 0.5, 0.4)[:200]
    few[::3] = 0.55
    [alarm] = class_alarms(np.stack([1 - few, few], 1), label[:200], ["a", "b"])
    assert alarm.startswith("the same probability 3 times or more, in 200 of 200 rows; that of b is ")


def test_answers_as_coarse_as_the_labels_are_no_fault():
    """Whole points of a scale, the shares of five neighbours; one answer alone is one."""
    draw = np.random.default_rng(0)
    points = draw.integers(1, 6, (200, 1)).astype(float)
    predicted = np.clip(points + draw.integers(-1, 2, (200, 1)), 1, 5)
    assert np.unique(predicted, return_counts=True)[1].max() > 40
    assert verdicts.regression_alarms(predicted, points, ["pain"]) == []
    mostly = np.where(np.arange(200)[:, None] < 190, 3.0, predicted)
    assert faults(verdicts.regression_alarms(mostly, points, ["pain"])) == ["the same prediction for 192 rows, and for 3 or more in 192 of 200 rows"]
    label = draw.integers(0, 2, 200)
    score = np.clip(2 * label + draw.integers(0, 4, 200), 0, 5) / 5
    assert class_alarms(np.stack([1 - score, score], 1), label, ["a", "b"]) == []


def test_pairs_beside_them_do_not_hide_repeated_predictions():
    draw = np.random.default_rng(0)
    target = draw.normal(size=(100, 1))
    predicted = target + draw.normal(size=(100, 1))
    predicted[:20] = np.repeat(predicted[:10], 2, axis=0)
    predicted[20:] = np.repeat(predicted[20:40], 4, axis=0)
    assert faults(verdicts.regression_alarms(predicted, target, ["v"])) == ["the same prediction for 4 rows, and for 3 or more in 76 of 100 rows"]


REPEATED = {
    "each three times": lambda values, draw: values.repeat(3)[:len(values)],
    "groups of five": lambda values, draw: values.repeat(5)[:len(values)],
    "one in twenty": lambda values, draw: np.where(np.arange(len(values)) % 20 == 0, 5 / 7 ** 0.5, values),
    "one in ten": lambda values, draw: np.where(np.arange(len(values)) % 10 == 0, 5 / 7 ** 0.5, values),
}


@pytest.mark.parametrize("rows", [60, 200, 1000])
@pytest.mark.parametrize("kind", REPEATED)
def test_repeats_are_found_in_few_and_many_rows(kind, rows, tmp_path):
    """In scores, in probabilities, and in the log odds of a table, whose ranks stand for them."""
    draw = np.random.default_rng(rows)
    label = draw.integers(0, 2, rows)
    target = draw.normal(0, 3, (rows, 1))
    predicted = REPEATED[kind](target[:, 0] + draw.normal(size=rows), draw)
    assert "the same prediction" in str(verdicts.regression_alarms(predicted[:, None], target, ["v"]))
    logit = REPEATED[kind](2 * label - 1 + draw.normal(size=rows), draw)
    score = 1 / (1 + np.exp(-logit))
    assert "the same probability" in str(class_alarms(np.stack([1 - score, score], 1), label, ["a", "b"]))
    common.write_table(tmp_path / "t.csv", {"id": np.arange(rows), "label": label, "score": logit})
    table = prediction_tables.read_predictions(tmp_path / "t.csv")
    found = verdicts.classification_alarms(table)
    assert "the same probability" in str(found)


@pytest.mark.parametrize("rows", [60, 200, 1000, 2000])
def test_honest_predictions_that_meet_are_no_repeats(rows):
    """Of a sure model, of few votes, and cut to the scale of the labels; a missing one is another fault."""
    draw = np.random.default_rng(rows)
    label = (draw.random(rows) < 0.1).astype(int)
    sure = [1 / (1 + np.exp(-6.2 * (2 * label - 1) - sd * draw.normal(size=rows))) for sd in (0.2, 1)]
    votes = [draw.binomial(k, 0.3 + 0.4 * label) / k for k in (3, 15, 300)]
    for score in (*sure, *votes, *np.round(sure, 5), *np.round(votes, 6)):
        alarms = class_alarms(np.stack([1 - score, score], 1), label, ["a", "b"])
        assert "the same probability" not in str(alarms)
    ratings = draw.normal(50, 40, (rows, 1)).clip(0, 100)
    latent = ratings + draw.normal(0, 15, (rows, 1))
    of_votes = np.stack([ratings.round(), latent.round(), latent.round()]).mean(0)
    cut = latent.clip(2, 100)
    bounded = np.float32(100) / (1 + np.exp(-(latent.astype(np.float32) - 50) / 3))
    for predicted in (cut, bounded, of_votes, cut.round(1)):
        assert verdicts.regression_alarms(predicted, ratings, ["v"]) == []
        predicted[0] = np.nan
        assert len(verdicts.regression_alarms(predicted, ratings, ["v"])) == 1


def test_of_very_many_rows_some_meet_by_chance():
    """A hundred thousand probabilities of six digits, most of them small."""
    draw = np.random.default_rng(0)
    label = draw.integers(0, 2, 100_000)
    score = 1 / (1 + np.exp(4 - 2 * label - draw.normal(size=100_000)))
    assert class_alarms(np.stack([1 - score, score], 1), label, ["a", "b"]) == []


def test_the_remedy_for_equal_labels_is_one_of_the_script():
    probability = np.linspace(0.1, 0.9, 40)
    label = np.where(np.arange(40) < 39, 0, 1)
    [alarm] = class_alarms(np.stack([1 - probability, probability], 1), label, ["a", "b"])
    assert "labels almost all equal" in alarm and "--target_columns" not in alarm


def test_alarms_on_a_split_without_labels(recwarn):
    alarms = verdicts.regression_alarms(np.ones((2, 1)), np.full((2, 1), np.nan), ["a"])
    assert any("labels do not vary: a" in alarm for alarm in alarms) and not recwarn.list
    assert not any("labels almost all equal" in alarm for alarm in alarms), "there are none"


def test_a_score_without_a_label_in_the_rows_is_judged_without_warnings(recwarn):
    """The others say how large an error is, and whether the model is its baseline."""
    target = np.stack([np.arange(6.0), np.full(6, np.nan)], 1)
    predicted = target[:, [0, 0]] + [[0.0], [0.0], [0.0], [0.0], [0.0], [3.0]]
    table = prediction_tables.ScoreTable(
        keys={"id": np.arange(6)}, names=["pain", "fear"], truth=target, predicted=predicted,
        baselines={"without a row": predicted * np.nan, "other": predicted + [0.1, 0.0], "ridge": predicted + [1e-6, 5.0]})
    assert table.best_baseline == "ridge"
    order, _ = table.rank_rows()
    assert order.tolist() == [0, 1, 2, 3, 4, 5]
    assert score_judging.is_baseline(table, "ridge") and not score_judging.is_baseline(table, "other")
    figures = score_judging.key_figures(table.compare(), target, None)
    assert figures[-1][1] == f"{0.5 / np.std(np.arange(6)):.3f} sd"
    assert not recwarn.list


# --- criteria and verdict ------------------------------------------------------------------------

KNOWN = verdicts.spell_metrics(["r2", "mae"], ["r2", "mae"], ["M1", "M2", "NRS (1-10)", "NRS, 0-10"])


def test_criteria_are_parsed_with_names_as_they_come():
    assert verdicts.parse_criteria(" r2>0.15, mae_M2 <= 3.,, r2_NRS (1-10)>=-.5,mae<1e-3,", KNOWN) == [
        {"name": "r2", "metric": "R2", "relation": ">", "bar": 0.15},
        {"name": "mae_M2", "metric": "MAE", "relation": "<=", "bar": 3.0},
        {"name": "r2_NRS (1-10)", "metric": "R2", "relation": ">=", "bar": -0.5},
        {"name": "mae", "metric": "MAE", "relation": "<", "bar": 0.001}]
    assert [bar["name"] for bar in verdicts.parse_criteria("r2_NRS, 0-10>.2 , mae<3", KNOWN)] == ["r2_NRS, 0-10", "mae"]
    assert verdicts.parse_criteria("", KNOWN) == verdicts.parse_criteria(None, KNOWN) == []


def test_an_ece_that_is_judged_is_called_what_it_is(capsys):
    bars = verdicts.parse_criteria("ece<0.25", class_judging.criteria_names(["a", "b"]))
    judged = verdicts.judge_criteria(bars, {"ece": subject_intervals.Estimate(-0.13, -0.2, 0.1)})
    assert judged[0]["metric"] == "ECE above its null"
    run = SimpleNamespace(say=print, path=str)
    verdicts.say_results(run, {"verdict": "v", "alarms": [], "doubts": [], "criteria": judged})
    assert "PASS: ece < 0.25, found ECE above its null -0.13\n" in capsys.readouterr().out


def test_criteria_mistakes_are_listed_together():
    with pytest.raises(common.UserError, match="found: r2=0.1; >3; mae<nan$"):
        verdicts.parse_criteria("r2=0.1,mae<2,>3,mae<nan", KNOWN)
    with pytest.raises(common.UserError, match=r"mae_m1 \(did you mean mae_M1\?\), r3\. Use"):
        verdicts.parse_criteria("mae_m1<2,r3>0.1,r2>0", KNOWN)


@pytest.mark.parametrize("text, interval, verdict", [
    ("r2>0.15", (0.2, 0.4), "PASS"), ("r2>0.15", (0.1, 0.4), "NOT RESOLVABLE"), ("r2>0.15", (0.0, 0.1), "FAIL"),
    ("r2<0.15", (0.0, 0.1), "PASS"), ("r2<0.15", (0.2, 0.4), "FAIL"), 
    ("r2>0.15", (math.nan, math.nan), "NOT RESOLVABLE"), ("r2>=0.15", (0.15, 0.4), "PASS"),
    ("r2>0.15", (0.15, 0.4), "NOT RESOLVABLE")])
def test_criteria_are_judged_by_the_interval(text, interval, verdict):
    found = {"r2": subject_intervals.Estimate(0.3, *interval)}
    judged = verdicts.judge_criteria(verdicts.parse_criteria(text, KNOWN), found)
    assert judged[0]["verdict"] == verdict and judged[0]["value"] == 0.3


def test_named_estimates_are_means_and_targets():
    predicted, target = noisy_pair()
    names = ["a", "b", "c"]
    known = verdicts.spell_metrics(common.REGRESSION_METRICS, common.REGRESSION_METRICS, names)
    result = subject_intervals.bootstrap_regression(predicted, target, names=names)
    found = verdicts.named_estimates(result, known)
    assert set(found) == set(known) and len(known) == 5 * 4
    assert found["r2"].value == pytest.approx(np.mean([found[f"r2_{name}"].value for name in names]))
    mae = result.each.model["mae"]
    assert found["mae_c"].low == mae.low[2] and found["mae_c"].value == mae.value[2]
    few = subject_intervals.bootstrap_regression(predicted[:3], target[:3], names=names)
    assert math.isnan(verdicts.named_estimates(few, known)["r2_b"].high)


def test_verdict_beats_does_not_beat_and_not_resolvable():
    _, target = noisy_pair(rows=300)
    generator = np.random.default_rng(5)
    near, far, like_near = (target + generator.normal(size=target.shape) * target.std(0) * noise
                            for noise in (0.5, 0.9, 0.5))

    def say(model, baseline, metric="r2", **options):
        result = subject_intervals.bootstrap_regression(model, target, baseline=baseline, baseline_name="ridge")
        return verdicts.verdict_sentence(result, metric, **options)

    better = say(near, far, ceiling=0.912, seen="chose", label="mean R2")
    assert better.startswith("The model beats the baseline (ridge regression): mean R2 0.7")
    assert better.endswith("; the raters' agreement allows 0.912; selected on these rows, therefore optimistic.")
    assert "95% bootstrap interval over 300 rows" in better
    assert say(near, far, metric="mae").startswith("The model beats")
    assert say(far, near).startswith("The model does worse than the baseline (ridge regression)")
    assert say(far, near, metric="mse", ceiling=math.nan).startswith("The model does worse than")
    pairs = {say(near, like_near).split(" the baseline")[0], say(like_near, near).split(" the baseline")[0]}
    assert pairs == {"Not resolvable whether the model beats"}


@pytest.mark.parametrize("interval, doubts, level, word", [
    ((0.01, 0.02), [], "good", "Holds"), ((0.01, 0.02), ["an alarm"], "caution", "Better, with doubts"),
    ((-0.053, 0.051), [], "caution", "Not resolvable"), ((-0.012, 0.012), ["an alarm"], "caution", "Not resolvable"),
    ((math.nan, math.nan), [], "caution", "Not resolvable"), ((-0.02, -0.01), [], "poor", "Worse than the baseline")])
def test_the_interval_alone_decides_between_better_worse_and_not_resolvable(interval, doubts, level, word):
    gain = subject_intervals.Estimate(-0.001, *interval)
    assert verdicts.reach_verdict(gain, doubts, "s") == verdicts.Verdict(level, word, "s")


def test_baselines_that_look_at_no_input_cannot_make_a_result_hold():
    assert "mean box" in verdicts.baseline_doubts(["mean box"])[0] and verdicts.baseline_doubts(["train_mean", "moment_mean"])
    assert verdicts.baseline_doubts(["train_mean", "ridge"]) == verdicts.baseline_doubts(["train_mean", "grid_readout"]) == []
    assert verdicts.baseline_doubts(["train_median"]), "a constant, as the mean is"
    for trivial in ("mean_of_these_rows", "train_mean", "train_prior"):
        assert "old" in verdicts.baseline_doubts(["old", trivial])[0], "a column of a table may be anything"
    assert verdicts.baseline_doubts(["ridge", "shares_of_these_rows"]) == verdicts.baseline_doubts(["old"]) == []


def test_alarms_name_a_remedy():
    rows = np.arange(40.0)[:, None]
    alarms = verdicts.regression_alarms(np.full((40, 1), 3.0), rows, ["Valence"])
    alarms += verdicts.regression_alarms(np.full((40, 1), np.nan), rows, ["Valence"])
    alarms += verdicts.split_gap_alarms({"pearson_r": 0.9}, {"pearson_r": 0.1}, remedy="--head ridge")
    alarms += verdicts.split_gap_alarms({"pearson_r": 0.1}, {"pearson_r": 0.9}, "more rows")
    alarms += class_alarms(np.tile([0.9, 0.1], (40, 1)), np.arange(40) % 2, ["ear", "tail"])
    alarms += verdicts.regression_alarms(3 + (rows % 7) ** 0.5 / 5, np.where(rows < 39, 3.0, 4.0), ["Valence"])
    alarms += judging.identical_fold_alarms([{"fold": 0, "r2": 0.1}, {"fold": 1, "r2": 0.1}])
    shifted = {"target": "Valence", "r2": -0.5, "pearson_r": 0.6, "pearson_r_low": 0.2, "bias": 2.0, "slope": 0.3}
    alarms += score_judging.slope_alarms([shifted])
    assert not score_judging.slope_alarms([{**shifted, "pearson_r_low": low} for low in (-0.1, math.nan)]), "by chance"
    [several] = score_judging.slope_alarms([{**shifted, "target": name} for name in "abcdefg"])
    assert several.startswith("the order holds, the values do not: a (r 0.60 but R2 -0.50, bias +2, slope 0.30), b (")
    assert "), e (r 0.60 but R2 -0.50, bias +2, slope 0.30) and 2 more. Trust" in several, "not the same words for each score"
    alarms.append(seen_rows.sentences(["train"])["train"])
    alarms += confounding.flagged_doubts([{"name": "camera", "red_flag": True}])
    assert len(alarms) == 13 and all("--" in alarm for alarm in alarms), alarms


def test_alarms_name_the_flag_of_train_dreamer_beside_that_of_the_others():
    """It refuses --group_column and --select r2."""
    target = np.random.default_rng(0).normal(0, 5, (40, 2))
    alarms = verdicts.regression_alarms(np.repeat(target[:10], 4, axis=0), target, ["x_mm", "z_mm"])
    alarms += verdicts.split_gap_alarms({"pearson_r": 0.1}, {"pearson_r": 0.9}, "more rows")
    assert len(alarms) == 2 and all("--group_column (probe guidance: --patient_map" in alarm for alarm in alarms)
    rows = [{"target": "x_mm", "r2": -0.5, "pearson_r": 0.6, "pearson_r_low": 0.2, "bias": 2.0, "slope": 0.3}]
    assert "--select r2 where the script has it" in score_judging.slope_alarms(rows)[0]


def score_table(predicted, target, ridge):
    return prediction_tables.ScoreTable(
        keys={}, names=["a", "b", "c"], truth=target, predicted=predicted, baselines={"ridge": ridge})


def test_the_table_of_scores_equals_scipy_and_says_what_the_raters_allow():
    predicted, target = noisy_pair(missing=0.2, offset=3.0)
    predicted[:, 2] = 0.7
    ridge = 0.5 * np.nan_to_num(target) + 1
    table = score_table(predicted, target, ridge)
    ceiling = rater_agreement.Ceiling(source="", r2=np.array([0.9, 0.6, 0.25]), icc=np.arange(6.0).reshape(3, 2))
    rows = score_judging.score_rows(table.compare(), table, ceiling)
    for k, row in enumerate(rows):
        seen = ~np.isnan(target[:, k])
        p, t = predicted[seen, k], target[seen, k]
        slope = stats.linregress(p, t).slope if k < 2 else math.nan
        expected = {"n": seen.sum(), "bias": np.mean(p - t), "slope": slope, "baseline_r2": r2_score(t, ridge[seen, k]),
                    "ceiling_r2": ceiling.r2[k], "ceiling_pearson_r": ceiling.r2[k] ** 0.5, "icc_1_1": 2 * k,
                    "icc_1_k": 2 * k + 1, "share_of_ceiling_r2": r2_score(t, p) / ceiling.r2[k]}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-7, nan_ok=True)


def test_the_scores_of_a_moment_are_those_of_its_rows_alone():
    predicted, target = noisy_pair(missing=0.2)
    table = score_table(predicted, target, np.zeros_like(target))
    moments = np.array(["before", "after", "before", "later"])[np.arange(200) % 4]
    rows = score_judging.rows_of_scores(table, moments)
    assert [row["moment"] for row in rows[::3]] == ["all", "after", "before", "later"]
    for row in rows:
        k = table.names.index(row["target"])
        seen = ~np.isnan(target[:, k]) & np.isin(moments, [row["moment"]] if row["moment"] != "all" else moments)
        assert (row["n"], row["r2"]) == (seen.sum(), pytest.approx(r2_score(target[seen, k], predicted[seen, k])))
    found = score_judging.estimates_of_moments(table, moments)
    assert set(found) <= set(score_judging.criteria_names(table.names, moments)) and len(found) == 3 * 5
    assert found["r2_before"].value == pytest.approx(np.mean([row["r2"] for row in rows if row["moment"] == "before"]))


def test_predictions_within_a_thousandth_of_each_scores_sd_are_those_of_the_baseline():
    _, target = noisy_pair(missing=0.2)
    ridge = np.nan_to_num(target)
    sd = np.nanstd(target, axis=0)
    shifts = {factor: [score_judging.is_baseline(score_table(ridge + factor * sd * one, target, ridge), "ridge")
                       for one in np.eye(3)] for factor in (0.0009, 0.0011)}
    assert shifts == {0.0009: [True] * 3, 0.0011: [False] * 3}


def test_verdict_with_two_subjects_resolves_nothing_and_with_nine_gives_p():
    predicted, target = noisy_pair(rows=90)
    def say(model, subjects, baseline, metric="r2"):
        result = subject_intervals.bootstrap_regression(model, target, subjects, baseline, baseline_name="train_mean")
        return verdicts.verdict_sentence(result, metric)
    text = say(predicted, np.repeat([1, 2], 45), target * 0)
    assert text.startswith("Not resolvable") and "no interval under 5 subjects, here 2" in text and "sign-flip" not in text
    text = say(predicted, np.repeat(np.arange(9), 10), predicted + 20, "mse")
    assert text.startswith("The model beats the baseline (train mean)") and "95% t-interval over 9 subjects" in text
    # 2 of 2^9 signs
    said = ", sign-flip p of this difference 0.0039, better in %d of 9 subjects."
    assert text.endswith(said % 9)
    assert say(predicted + 20, np.repeat(np.arange(9), 10), predicted).endswith(said % 0)
    folds = subject_intervals.bootstrap_regression(predicted, target, np.repeat(np.arange(9), 10), target * 0, folds=5)
    assert not folds.sign_flip_p, "it does not know that the models of folds share train rows"
