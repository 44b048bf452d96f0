"""Estimators against a truth that is known: interval coverage, noise ceilings, conformal coverage, by simulation.

    python -m pytest tests/test_estimators.py
    python -m pytest -m long tests/test_estimators.py
    python tests/test_estimators.py            # print the table of docs/judging.md, from the same simulations

Every seed is fixed; the bounds are those that the estimator promises, not those that a run happened to give.
"""
import math

import conftest  # puts the repository on the path
import numpy as np
import pytest
from scipy import signal, stats

import common
from evidence import baseline_models, calibrating, class_scores, pose_scores, prediction_tables, rater_agreement
from evidence import row_warnings, subject_intervals

ROWS_PER_SUBJECT, ICC = 18, 0.3


def clustered(subjects, simulations, generator, rows=ROWS_PER_SUBJECT):
    """(S * rows, simulations) unit-variance draws with intra-class correlation .3: each column is one simulation."""
    own = generator.normal(size=(subjects, 1, simulations)) * math.sqrt(ICC)
    rest = generator.normal(size=(subjects, rows, simulations)) * math.sqrt(1 - ICC)
    return (own + rest).reshape(-1, simulations)


def coverage(estimate, truth):
    """Share of the (R,) intervals that hold the truth."""
    return float(np.mean((estimate.low <= truth) & (truth <= estimate.high)))


def mae_coverage(subjects, by_subject, repeats=5, simulations=400):
    """Coverage of the interval of an MAE whose expectation is 10, over repeats x simulations data sets."""
    names, shares = np.repeat(np.arange(subjects), ROWS_PER_SUBJECT), []
    for seed in range(repeats):
        error = 10 + clustered(subjects, simulations, np.random.default_rng((seed, subjects)))
        result = subject_intervals.bootstrap_regression(error, np.zeros_like(error), names if by_subject else None)
        shares.append(coverage(result.each.model["mae"], 10.0))
    return float(np.mean(shares))


# --- intervals over subjects ---------------------------------------------------------------------

@pytest.mark.parametrize("subjects", [5, 9, 18, 40])
def test_interval_over_subjects_covers_92_to_97_percent(subjects):
    assert 0.92 <= mae_coverage(subjects, by_subject=True) <= 0.97


@pytest.mark.parametrize("subjects", [9, 40])
def test_a_row_bootstrap_covers_about_55_percent(subjects):
    assert 0.50 <= mae_coverage(subjects, by_subject=False, repeats=1) <= 0.60


def score_coverage(subjects, repeats, rows=ROWS_PER_SUBJECT):
    """{what: coverage} where labels, model errors and baseline errors all cluster; repeats x 400 data sets."""
    names, shares = np.repeat(np.arange(subjects), rows), []
    truth = {"r": 1 / math.sqrt(1.49), "R2": 0.51, "MAE": 0.7 * math.sqrt(2 / math.pi), "MSE": 0.49,
             "difference of R2": 0.51 - 0.36, "difference of MAE": (0.7 - 0.8) * math.sqrt(2 / math.pi)}
    for seed in range(repeats):
        generator = np.random.default_rng((seed, subjects, 1))
        target, error, other = (clustered(subjects, 400, generator, rows) for _ in range(3))
        result = subject_intervals.bootstrap_regression(
            target + 0.7 * error, target, names, target + 0.8 * other).each
        found = [result.model[name] for name in ("pearson_r", "r2", "mae", "mse")]
        found += [result.difference[name] for name in ("r2", "mae")]
        shares.append([coverage(each, value) for each, value in zip(found, truth.values())])
    return dict(zip(truth, np.mean(shares, 0)))


@pytest.mark.parametrize("subjects", [5, 9, 20, 40])
def test_scores_cover_92_to_97_percent(subjects):
    """The difference of R2 over five subjects covers a little more, cut or not."""
    held = score_coverage(subjects, repeats=8 if subjects < 40 else 4)
    assert all(0.92 <= share <= 0.985 for share in held.values()), held


@pytest.mark.parametrize("rows", [9, 20, 200])
def test_mse_and_mae_of_single_rows_cover(rows):
    """The quantiles of a bootstrap covered .905 for the MSE of 20 rows. R2 has no interval in a part of 9 rows."""
    held = score_coverage(rows, repeats=4 if rows < 200 else 1, rows=1)
    assert all(0.92 <= held[name] <= 0.97 for name in ("MAE", "MSE", "r", "difference of MAE")), held
    assert rows < 20 or 0.92 <= min(held["R2"], held["difference of R2"])


def test_interval_of_the_mean_over_targets_covers_92_to_97_percent():
    """The means over targets resample all targets of a subject together, so their correlation counts."""
    subjects, hits = np.repeat(np.arange(9), ROWS_PER_SUBJECT), []
    for seed in range(1000):
        generator = np.random.default_rng((seed, 2))
        shared = clustered(9, 1, generator)
        error = 10 + (shared + clustered(9, 4, generator)) / math.sqrt(2)
        mean = subject_intervals.bootstrap_regression(error, np.zeros_like(error), subjects).overall.model["mae"]
        hits.append(coverage(mean, 10.0))
    assert 0.92 <= np.mean(hits) <= 0.97


MEANS_OF = {"5 subjects, 18 rows each": (5, 18), "20 subjects, 18 rows each": (20, 18), "20 rows": (20, 1), "60 rows": (60, 1)}


def mean_r2_coverage(subjects, rows, missing=0.0, simulations=400):
    """Coverage of the interval of a mean R2 over 14 targets with labels and errors of their own, so that it is narrow."""
    names = np.repeat(np.arange(subjects), rows)
    generator = np.random.default_rng((subjects, rows, 3))
    hits = []
    for _ in range(simulations):
        target, error = (clustered(subjects, 14, generator, rows) for _ in range(2))
        target[generator.random(target.shape) < missing] = np.nan
        result = subject_intervals.bootstrap_regression(target + 0.7 * error, target, names if rows > 1 else None)
        hits.append(coverage(result.overall.model["r2"], 0.51))
    return float(np.mean(hits))


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("case", MEANS_OF)
def test_the_mean_r2_over_targets_covers(case, missing):
    """About an R2 whose bias is left in it covered .82 to .92, as such an interval is narrow."""
    assert 0.92 <= mean_r2_coverage(*MEANS_OF[case], missing=missing) <= 0.995


@pytest.mark.parametrize("subjects, rows", [(5, 18), (60, 1)])
def test_the_gain_of_a_mean_r2_over_targets_covers(subjects, rows):
    """R2 of .8 against .19, 34 targets. With its bias left in, .83 to .87 of the intervals of the gain held the truth."""
    names = np.repeat(np.arange(subjects), rows)
    generator = np.random.default_rng((subjects, 12))
    hits = []
    for _ in range(150):
        target, error, other = (clustered(subjects, 34, generator, rows) for _ in range(3))
        result = subject_intervals.bootstrap_regression(target + 0.45 * error, target, names, target + 0.9 * other)
        hits.append(coverage(result.overall.difference["r2"], 0.81 - 0.2025))
    assert 0.93 <= np.mean(hits) <= 0.995


@pytest.mark.parametrize("subjects, rows", [(20, 18), (60, 1)])
def test_r2_of_a_constant_covers(subjects, rows):
    """As of a model that has learnt nothing. About an R2 without its bias alone it lay above the truth in .15 of all cases."""
    names = np.repeat(np.arange(subjects), rows)
    generator = np.random.default_rng((subjects, 11))
    target = clustered(subjects, 1000, generator, rows)
    constant = clustered(4 * subjects, 1000, generator, rows).mean(0)
    found = subject_intervals.bootstrap_regression(np.tile(constant, (len(names), 1)), target, names).each.model["r2"]
    assert 0.96 <= coverage(found, -constant ** 2) <= 0.995
    assert np.mean(found.low > -constant ** 2) <= 0.025


def test_the_mean_r2_of_constants_covers_over_210_rows():
    """The bias is that of the bootstrap from 200 rows on, where it was left in: 0.1 of such intervals held the truth."""
    generator = np.random.default_rng(11)
    hits = []
    for _ in range(10):
        target = generator.normal(size=(210, 60))
        constant = generator.normal(size=60) / math.sqrt(840)
        result = subject_intervals.bootstrap_regression(np.tile(constant, (210, 1)), target)
        hits.append(coverage(result.overall.model["r2"], np.mean(-constant ** 2)))
    assert np.mean(hits) == 1


def test_sign_flip_p_is_uniform_where_there_is_no_difference():
    generator = np.random.default_rng(0)
    p = np.array([subject_intervals.sign_flip_p(generator.normal(size=9)) for _ in range(1000)])
    assert abs(np.mean(p <= 0.05) - 0.05) < 0.02 and stats.kstest(p, "uniform").pvalue > 0.01


def test_sign_flip_p_of_r2_and_auc_is_uniform_where_there_is_no_difference():
    """Model and baseline err alike; two targets in very different units, subjects with unlike numbers of rows."""
    p = {"r2": [], "roc_auc": []}
    for seed in range(200):
        generator = np.random.default_rng((seed, 5))
        names = np.repeat(np.arange(9), generator.integers(2, 12, 9))
        draw = lambda: generator.normal(size=(len(names), 2)) + generator.normal(size=(9, 2))[names]
        target, unit = draw(), np.array([1.0, 1000.0])
        model, baseline = ((target + draw()) * unit for _ in range(2))
        p["r2"].append(subject_intervals.bootstrap_regression(model, target * unit, names, baseline).sign_flip_p["r2"])
        label = (target[:, 0] > 0).astype(int)
        first, second = (class_scores.softmax(np.stack([0 * label, label + draw()[:, 0]], 1)) for _ in range(2))
        found = subject_intervals.bootstrap_classification(first, label, names, second)
        if min(len(set(names[label == c])) for c in (0, 1)) >= subject_intervals.FEWEST_FOR_INTERVAL:
            p["roc_auc"].append(found.sign_flip_p["roc_auc"])
    for metric, values in p.items():
        values = np.array(values)
        assert len(values) > 150, metric
        assert 0.01 <= np.mean(values <= 0.05) <= 0.10 and 0.12 <= np.mean(values <= 0.2) <= 0.29, metric


def test_the_target_with_the_largest_unit_does_not_decide_the_p():
    """A target in units of 1000 with noise alone beside one whose error every subject has halved."""
    generator = np.random.default_rng(3)
    names, target = np.repeat(np.arange(8), 10), generator.normal(size=(80, 2))
    error, other = generator.normal(size=(2, 80, 2))
    baseline = target + error
    model = target + np.stack([error[:, 0] / 2, other[:, 1]], 1)
    unit = np.array([1.0, 1000.0])
    first, both, scaled = (
        subject_intervals.bootstrap_regression(model[:, :k] * u, target[:, :k] * u, names, baseline[:, :k] * u)
        for k, u in ((1, unit[:1]), (2, np.ones(2)), (2, unit)))
    assert first.sign_flip_p["r2"] == 2 / 2 ** 8
    assert scaled.sign_flip_p["r2"] == both.sign_flip_p["r2"]
    assert np.mean(scaled.per_subject["r2"]) == pytest.approx(scaled.overall.difference["r2"].value)


# --- classes -------------------------------------------------------------------------------------

def scored_subjects(subjects, generator, rows=6, separation=2.5):
    """(M, 2) probabilities, (M,) labels and subjects; labels and scores cluster, the AUC is about .96."""
    names = np.repeat(np.arange(subjects), rows)
    drawn = clustered(subjects, 2, generator, rows)
    label = (drawn[:, 0] > 0.25).astype(int)
    score = separation * (label - 0.5) + drawn[:, 1]
    return class_scores.softmax(np.stack([0 * score, separation * score], 1)), label, names


def class_coverage(subjects, simulations):
    """{what: coverage} of a model of AUC .96 beside one of .86, whose errors are its own; truth: of 3,000 subjects."""
    generator, of_other = (np.random.default_rng((subjects, seed)) for seed in (7, 8))

    def draw(subjects):
        probability, label, names = scored_subjects(subjects, generator)
        score = 1.5 * (label - 0.5) + clustered(subjects, 1, of_other, 6)[:, 0]
        return probability, label, names, class_scores.softmax(np.stack([0 * score, score], 1))
    probability, label, _, other = draw(3000)
    truth = class_scores.classification_metrics(probability, label).overall
    gain = truth["roc_auc"] - class_scores.classification_metrics(other, label).overall["roc_auc"]
    metrics = ("roc_auc", "accuracy", "macro_f1", "mcc", "brier")
    hits = []
    while len(hits) < simulations:
        result = subject_intervals.bootstrap_classification(*draw(subjects)).overall
        found = [result.model[metric] for metric in metrics]
        if not math.isnan(found[0].low):  # under five subjects with one of the classes
            difference = result.difference["roc_auc"]
            hits.append([each.low <= truth[metric] <= each.high for metric, each in zip(metrics, found)]
                        + [difference.low <= gain <= difference.high])
    return dict(zip((*metrics, "difference of roc_auc"), np.mean(hits, 0)))


def test_an_auc_over_20_subjects_covers():
    """The quantiles of the bootstrap covered .87."""
    held = class_coverage(20, 150)
    assert held["roc_auc"] >= 0.92 and min(held.values()) >= 0.90, held


def test_a_high_auc_covers_where_errors_cluster_by_subject():
    """One subject may make most of the errors: by the slope of the log odds at the value .90 and less were covered."""
    def draw(generator, subjects):
        names = np.repeat(np.arange(subjects), 18)
        label = (generator.random(len(names)) < 0.3).astype(int)
        own = 1.5 * generator.normal(size=subjects)[names]
        score = 5 * (label - 0.5) + own + generator.normal(size=len(names))
        return class_scores.softmax(np.stack([0 * score, score], 1)), label, names
    probability, label, _ = draw(np.random.default_rng(0), 3000)
    truth = class_scores.classification_metrics(probability, label).overall["roc_auc"]
    found = [subject_intervals.bootstrap_classification(*draw(np.random.default_rng((k, 9)), 10)).overall.model["roc_auc"]
             for k in range(300)]
    assert 0.92 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.99


def test_the_gain_over_class_shares_is_as_doubtful_as_the_auc_itself():
    """The AUC of class shares is .5 in every resample: t on the raw scale gave AUC - .5 a narrower interval of its own,

    which held the truth in .75 to .9 of all cases, and beat .5 where the interval of the AUC did not.
    """
    generator = np.random.default_rng(0)
    for subjects, separation in ((6, 1.0), (12, 3.0), (300, 2.5)):
        probability, label, names = scored_subjects(subjects, generator, separation=separation)
        shares = np.tile([0.7, 0.3], (len(label), 1))
        found = subject_intervals.bootstrap_classification(probability, label, names, shares).overall
        for metric, constant in (("roc_auc", 0.5), ("mcc", 0.0), ("balanced_accuracy", 0.5)):
            model, gain = found.model[metric], found.difference[metric]
            assert [gain.low, gain.high] == pytest.approx([model.low - constant, model.high - constant], abs=1e-9), metric
        swapped = subject_intervals.bootstrap_classification(shares, label, names, probability).overall
        assert swapped.difference["roc_auc"].high == pytest.approx(0.5 - found.model["roc_auc"].low)


def test_mcc_of_a_perfect_classifier_is_not_beyond_doubt():
    label = np.tile([0, 1], 20)
    perfect = np.stack([1 - label, label], 1) * 0.8 + 0.1
    mcc = subject_intervals.bootstrap_classification(perfect, label, np.repeat(np.arange(10), 4)).overall.model["mcc"]
    lowest = stats.binomtest(10, 10).proportion_ci(0.95).low
    assert (mcc.value, mcc.high) == pytest.approx((1, 1)) and mcc.low == pytest.approx(2 * lowest - 1)


@pytest.mark.parametrize("rows, subjects", [(100, 100), (120, 12), (400, 400)])
def test_one_subject_with_all_the_errors_does_not_undo_a_good_model(rows, subjects):
    """Left out it leaves a perfect model, which was taken for infinitely far away: an AUC of .980 had [.001, 1.000]."""
    label = np.arange(rows) % 2
    score = np.where(label, 0.8, 0.2)
    score[1] = 0.005
    names = np.arange(rows) * subjects // rows
    found = subject_intervals.bootstrap_classification(
        np.stack([1 - score, score], 1), label, names).overall.model
    for metric in ("roc_auc", "accuracy", "mcc"):
        assert 0.8 < found[metric].low < found[metric].value < found[metric].high <= 1, metric
    predicted = np.random.default_rng(0).normal(size=(rows, 1))
    target = predicted + 0.01 * np.random.default_rng(1).normal(size=(rows, 1))
    target[0] += 1.5
    r = subject_intervals.bootstrap_regression(predicted, target).overall.model["pearson_r"]
    assert 0.85 < r.low < r.value < r.high < 1


def test_shares_stay_between_0_and_1_and_differences_within_what_their_sides_allow():
    generator = np.random.default_rng(0)
    for subjects in (6, 12, 30):
        probability, label, names = scored_subjects(subjects, generator, separation=3.0)
        other = scored_subjects(subjects, generator, separation=1.0)[0]
        result = subject_intervals.bootstrap_classification(probability, label, names, other)
        for comparison in (result.overall, result.each):
            for metric in set(comparison.model) - {"loss", "ece", "ece_adaptive"}:
                model, baseline, found = (getattr(comparison, side)[metric] for side in vars(comparison))
                lowest = -1 if metric == "mcc" else 0
                for each in (model, baseline):
                    assert not np.any(each.low < lowest) and not np.any(each.high > 1), metric
                assert not np.any(found.low < model.low - baseline.high - 1e-12)
                assert not np.any(found.high > model.high - baseline.low + 1e-12)


def test_r2_of_few_rows_has_no_interval_instead_of_an_endless_one():
    generator = np.random.default_rng(1)
    for rows in (5, 6, 8, 9, 12):
        target = generator.normal(size=(rows, 300))
        result = subject_intervals.bootstrap_regression(
            target + 0.9 * generator.normal(size=target.shape), target, baseline=0 * target).each
        found, difference = result.model["r2"], result.difference["r2"]
        given = np.isfinite(found.low)
        assert given.any() == (rows >= 9)
        assert (1 - found.low <= 20 * (1 - found.value))[given].all() and np.isnan(difference.low[~given]).all()
        assert np.isfinite(result.model["mse"].low).all()


# --- the error of calibration --------------------------------------------------------------------

def ece_coverage(rows, sharpness, simulations=60):
    """{ECE: coverage of the true one} of logits made `sharpness` times too sure."""
    generator, hits = np.random.default_rng((rows, 8)), []

    def draw(rows):
        score = 1.5 * generator.normal(size=rows)
        label = (generator.random(rows) < 1 / (1 + np.exp(-score))).astype(int)
        return class_scores.softmax(np.stack([0 * score, sharpness * score], 1)), label
    truth = class_scores.classification_metrics(*draw(200_000)).overall
    for _ in range(simulations):
        probability, label = draw(rows)
        comparison = subject_intervals.bootstrap_classification(probability, label).overall
        calibrating.take_null(comparison, probability.max(1))
        found = {name: comparison.model[f"{name}_above_null"] for name in class_scores.ECE_METRICS}
        hits.append([each.low <= truth[name] <= each.high for name, each in found.items()])
        assert math.isnan(comparison.model["ece"].low)
    return dict(zip(class_scores.ECE_METRICS, np.mean(hits, 0)))


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
def test_ece_above_its_null_covers_the_true_one(sharpness):
    """Of a calibrated model (sharpness 1) the interval of the ECE itself held the truth in .35 and 0 of all cases."""
    held = ece_coverage(60, sharpness)
    assert min(held.values()) >= 0.92, held


# --- pooled folds ----------------------------------------------------------------------------------

FOLDS_OF = {"60 rows of 20 subjects": (60, 20, 0.5), "120 rows of 20 subjects": (120, 20, 0.5),
            "300 rows of 30 subjects": (300, 30, 0.5), "800 rows of 40 subjects": (800, 40, 0.5),
            "300 rows of 60 subjects, R2 at most .2": (300, 60, 0.2)}


def pooled_folds(rows, subjects, best_r2, generator, targets=8, features=64, folds=5):
    """Ridge regression by folds over subjects: (predicted, target, train means, names, true MSE of the fold models).

    Features have a falling spectrum; they, and what no feature explains, cluster with an intra-class correlation of .3.
    """
    names = np.arange(rows) % subjects
    variance = np.arange(1, features + 1) ** -0.7
    variance /= variance.sum()

    def draw(columns):
        own = generator.normal(size=(subjects, columns))[names] * math.sqrt(ICC)
        return own + generator.normal(size=(rows, columns)) * math.sqrt(1 - ICC)
    x = draw(features) * np.sqrt(variance)
    weights = generator.normal(size=(features, targets))
    weights *= np.sqrt(best_r2 / (weights ** 2 * variance[:, None]).sum(0))
    target = x @ weights + draw(targets) * math.sqrt(1 - best_r2)
    fold_of = (generator.permutation(subjects) % folds)[names]
    predicted, means, true = np.zeros_like(target), np.zeros_like(target), []
    for k in range(folds):
        train = fold_of != k
        model = conftest.fit_as_sklearn(x[train], target[train], groups=names[train])
        predicted[~train], means[~train] = model.predict(x[~train]), target[train].mean(0)
        found, bias = model.weights, model.intercept
        mse = ((found - weights) ** 2 * variance[:, None]).sum(0) + bias ** 2 + 1 - best_r2
        true.append(mse * np.mean(~train))
    return predicted, target, means, names, sum(true)


def fold_coverage(rows, subjects, best_r2, repeats, folds=5):
    """{what: coverage} of the expected result of such training; repeats x 8 data sets."""
    drawn = [pooled_folds(rows, subjects, best_r2, np.random.default_rng((seed, rows))) for seed in range(repeats)]
    mse = np.mean([each[-1] for each in drawn])
    truth = {"MSE": mse, "R2": 1 - mse, "difference of R2": 1 - mse}
    shares = []
    for predicted, target, means, names, _ in drawn:
        result = subject_intervals.bootstrap_regression(predicted, target, names, means, folds=folds).each
        found = (result.model["mse"], result.model["r2"], result.difference["r2"])
        shares.append([coverage(each, value) for each, value in zip(found, truth.values())])
    return dict(zip(truth, np.mean(shares, 0)))


def test_pooled_folds_are_widened():
    """Short form: unwidened, R2 covers .80."""
    held, narrow = (fold_coverage(60, 20, 0.5, repeats=20, folds=folds) for folds in (5, 1))
    assert min(held.values()) >= 0.90 and narrow["R2"] < 0.87, (held, narrow)


# --- blocks of time ----------------------------------------------------------------------------------

def block_coverage(rows, correlation, simulations):
    """(share of data sets with an interval, coverage of those) of an MAE whose errors are AR(1) in time."""
    generator, given, held = np.random.default_rng((rows, int(1e4 * correlation))), 0, 0
    for _ in range(simulations):
        noise = generator.normal(size=(rows, 6)) * math.sqrt(1 - correlation ** 2)
        noise[0] /= math.sqrt(1 - correlation ** 2)
        error = signal.lfilter([1], [1, -correlation], noise, axis=0)
        table = prediction_tables.ScoreTable(
            keys={}, names=list("abcdef"), truth=0 * error, predicted=error, baselines={"zero": error},
            groups=np.zeros(rows))
        blocks = pose_scores.time_blocks(table, np.zeros(rows), np.arange(rows))
        result = pose_scores.compare(table, blocks, np.ones(6))["zero"]
        assert not result.sign_flip_p
        mae = result.each.model["mae"].at(0)
        given += np.isfinite(mae.low)
        held += mae.low <= math.sqrt(2 / math.pi) <= mae.high
    return given / simulations, held / max(given, 1)


def test_blocks_of_time_give_no_interval_where_they_would_not_cover():
    """Ten blocks of 20 rows covered .42 at .9955, the autocorrelation of a real sweep, and .88 at .9."""
    assert block_coverage(200, 0.9955, 40)[0] == 0
    given, held = block_coverage(400, 0.5, 60)
    assert given > 0.9 and held >= 0.88


# --- the table of docs/judging.md ------------------------------------------------------------------

TIME_CASES = [(200, 0.0), (200, 0.8), (200, 0.96), (1000, 0.9), (1000, 0.96), (1000, 0.9955)]


@pytest.mark.long
@pytest.mark.parametrize("subjects", [5, 9, 20, 40])
def test_whole_coverage_over_subjects(subjects):
    held = score_coverage(subjects, repeats=15) | class_coverage(max(subjects, 9), 400)
    assert all(0.92 <= share <= 0.985 for share in held.values()), held


@pytest.mark.long
@pytest.mark.parametrize("case", FOLDS_OF)
def test_whole_coverage_of_pooled_folds(case):
    """R2 misses 92 % by one where the ridge turns from learning nothing to learning; reports state what is covered."""
    held = fold_coverage(*FOLDS_OF[case], repeats=60)
    lowest, highest = map(float, subject_intervals.FOLD_COVERAGE.split(" to "))
    assert all(lowest - 0.005 <= share <= highest + 0.005 for share in held.values()), held


@pytest.mark.long
@pytest.mark.parametrize("rows, correlation", TIME_CASES)
def test_whole_coverage_of_time_blocks(rows, correlation):
    """Of all data sets at most 7 % show an interval that misses."""
    given, held = block_coverage(rows, correlation, 300)
    assert given * (1 - held) <= 0.07 and (held >= 0.92 or not given), (given, held)


def coverage_table():
    """Yield the Markdown lines of all of these."""
    yield "| simulated | coverage of nominal 95 % |"
    yield "|---|---|"

    def line(name, held):
        shown = ", ".join(f"{what} {share:.3f}".replace("0.", ".") for what, share in held.items())
        return f"| {name} | {shown} |"
    for subjects in (5, 9, 20, 40):
        yield line(f"{subjects} subjects, 18 rows each", score_coverage(subjects, repeats=15))
    for case, numbers in MEANS_OF.items():
        yield line(case, {"mean R2 over 14 targets": mean_r2_coverage(*numbers, simulations=2000)})
    for subjects in (9, 20, 40):
        yield line(f"{subjects} subjects, 6 rows each", class_coverage(subjects, 400))
    for case, numbers in FOLDS_OF.items():
        yield line(f"5 pooled folds, {case}", fold_coverage(*numbers, repeats=60))
    for rows, correlation in TIME_CASES:
        given, held = block_coverage(rows, correlation, 300)
        yield (f"| {rows} rows in time, autocorrelation {correlation:g} | an interval in {given:.2f} of all, "
               f"one that misses in {given * (1 - held):.3f} of all |")


# --- noise ceiling -------------------------------------------------------------------------------

TRUE_CEILING = {2: 1 / 3, 4: 1 / 2, 6: 0.6, 30: 30 / 34}  # rater noise of four times the images' variance
IMAGES = 600


def simulated_ratings(raters, seed):
    """(600, raters) single ratings of one target: true scores of variance 1, rater noise of variance 4."""
    generator = np.random.default_rng((seed, raters))
    return 5 + generator.normal(size=(IMAGES, 1)) + 2 * generator.normal(size=(IMAGES, raters))


@pytest.mark.parametrize("raters, truth", TRUE_CEILING.items())
def test_ceiling_from_mean_sd_n_comes_back_within_05(raters, truth):
    """Median over 101 targets: a single target scatters by .055 (2 raters) to .006 (30 raters) around the truth."""
    ratings = np.stack([simulated_ratings(raters, seed) for seed in range(101)], -1)  # (600, raters, 101)
    ceiling = rater_agreement.noise_ceiling(ratings.mean(1), ratings.std(1, ddof=1), np.full((IMAGES, 101), raters))
    assert abs(np.median(ceiling) - truth) < 0.05


@pytest.mark.parametrize("raters, truth", TRUE_CEILING.items())
def test_split_half_and_icc_come_back_within_05(raters, truth):
    """Mean over 20 targets of the ICC; of split-half over 5, which costs more."""
    singles, means = np.transpose([rater_agreement.icc(simulated_ratings(raters, seed)) for seed in range(20)])
    halves = [rater_agreement.split_half(simulated_ratings(raters, seed)) for seed in range(5)]
    assert abs(np.mean(singles) - 0.2) < 0.05
    assert abs(np.mean(means) - truth) < 0.05
    assert abs(np.mean(halves) - truth) < 0.05


@pytest.mark.parametrize("raters", [3, 5])
def test_an_odd_number_of_raters_does_not_lower_the_split_half(raters):
    """Spearman-Brown takes halves of one and two raters for equal ones: it gave .407 for .429 of three."""
    found = [rater_agreement.split_half(list(simulated_ratings(raters, seed)), halves=20) for seed in range(60)]
    assert np.mean(found) == pytest.approx(1 / (1 + 4 / raters), abs=0.012 if raters == 3 else 0.008)


def test_a_perfect_model_reaches_the_ceiling():
    """What the ceiling promises: the true scores, judged on noisy means, reach R2 = ceiling."""
    generator = np.random.default_rng(4)
    true_score = generator.normal(size=(20000, 1))
    ratings = true_score + 2 * generator.normal(size=(20000, 6))
    mean, sd = ratings.mean(1, keepdims=True), ratings.std(1, ddof=1, keepdims=True)
    ceiling = rater_agreement.noise_ceiling(mean, sd, 6)
    reached = common.regression_metrics(true_score, mean)
    assert abs(reached["r2"][0] - ceiling[0]) < 0.02
    assert abs(reached["pearson_r"][0] - math.sqrt(ceiling[0])) < 0.02


def test_unequal_numbers_of_raters_keep_icc_and_split_half_near_the_truth():
    """2 to 10 raters an image: ICC(1,1) stays .2, and the lists agree with the summary formula."""
    singles, gaps = [], []
    for seed in range(20):
        generator = np.random.default_rng((seed, 9))
        ratings = [row[:count] for row, count in zip(simulated_ratings(10, seed), generator.integers(2, 11, IMAGES))]
        mean, sd, n = np.transpose([(part.mean(), part.std(ddof=1), len(part)) for part in ratings])[:, :, None]
        singles.append(rater_agreement.icc(ratings)[0])
        gaps.append(rater_agreement.split_half(ratings, halves=20) - rater_agreement.noise_ceiling(mean, sd, n)[0])
    assert abs(np.mean(singles) - 0.2) < 0.05 and abs(np.mean(gaps)) < 0.05


def test_icc_equals_shrout_and_fleiss_table():
    """Six targets, four judges of Shrout & Fleiss 1979, table 2: ICC(1,1) = .17, ICC(1,4) = .44."""
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    single, mean = rater_agreement.icc(ratings)
    assert round(single, 2) == 0.17 and round(mean, 2) == 0.44
    groups = stats.f_oneway(*ratings).statistic
    assert mean == pytest.approx(1 - 1 / groups)


def test_split_half_equals_the_only_possible_halves():
    """Two raters leave one way to halve, up to a swap: Spearman-Brown of r over randomly swapped columns."""
    ratings = np.repeat(np.arange(40.0)[:, None], 2, axis=1)
    assert rater_agreement.split_half(ratings) == pytest.approx(1.0)
    noisy = ratings + np.random.default_rng(0).normal(size=ratings.shape) * 8
    swapped = np.random.default_rng(1).permuted(np.repeat(noisy[None], 400, 0), axis=2)
    r = np.array([np.corrcoef(part.T)[0, 1] for part in swapped])
    assert rater_agreement.split_half(noisy, halves=400) == pytest.approx(np.mean(2 * r / (1 + r)), abs=0.003)


def test_pure_noise_is_not_measurable_and_never_clipped():
    generator = np.random.default_rng(12)
    ratings = generator.normal(size=(IMAGES, 4, 40))  # no image differs from another: half of all estimates below 0
    ceiling = rater_agreement.noise_ceiling(ratings.mean(1), ratings.std(1, ddof=1), 4)
    refused = np.isnan(ceiling)
    assert 8 <= refused.sum() <= 32 and not (ceiling[~refused] == 0).any()
    column = int(np.flatnonzero(refused)[0])
    assert math.isnan(rater_agreement.icc(ratings[:, :, column])[1])
    assert math.isnan(rater_agreement.split_half(ratings[:, :, column]))


def test_pictures_of_one_rater_lower_the_ceiling_of_all():
    """Two thirds of the pictures have one rater: the others alone allow .909, and a perfect model reaches .59."""
    found = []
    for seed in range(20):
        generator = np.random.default_rng((seed, 11))
        true_score, n = generator.normal(size=300), generator.choice([1, 1, 10], 300)
        ratings = [score + generator.normal(size=count) for score, count in zip(true_score, n)]
        mean = np.array([[part.mean()] for part in ratings])
        sd = np.array([[part.std(ddof=1) if len(part) > 1 else 0.0] for part in ratings])
        ceilings = [rater_agreement.measure_ceiling(["v"], mean, sd, n[:, None]),
                    rater_agreement.measure_ceiling(["v"], mean, single_ratings={"v": ratings})]
        reached = common.regression_metrics(true_score[:, None], mean)["r2"][0]
        found.append([ceiling.mean_r2 - reached for ceiling in ceilings])
        several = n > 1
        whole = rater_agreement.noise_ceiling(mean[several], sd[several], n[several, None])
        assert whole == pytest.approx(1 - np.mean(sd[several] ** 2 / 10) / np.var(mean[several], ddof=1))
    assert np.abs(np.mean(found, axis=0)).max() < 0.03


def test_rows_without_an_sd_count_with_the_noise_of_the_others():
    """A quarter of the rows lack it, and their pictures differ thrice as much; a quarter have one rater."""
    generator = np.random.default_rng(13)
    true_score, n = generator.normal(size=(4000, 1)), np.full((4000, 1), 8)
    true_score[2000:3000] *= 3
    n[3000:] = 1
    mean = true_score + generator.normal(size=n.shape) / np.sqrt(n)
    sd = np.sqrt(generator.chisquare(7, n.shape) / 7)
    sd[2000:] = np.nan
    reached = common.regression_metrics(true_score, mean)["r2"][0]
    assert rater_agreement.measure_ceiling(["v"], mean, sd, n).mean_r2 == pytest.approx(reached, abs=0.02)


def test_rows_with_gaps_do_not_count_and_rows_of_one_rater_with_the_noise_of_the_others():
    mean = np.array([[1.0], [2.0], [4.0], [8.0], [100.0], [np.nan], [3.0]])
    sd = np.array([[1.0], [1.0], [2.0], [1.0], [0.0], [1.0], [1.0]])
    n = np.array([[4.0], [2.0], [4.0], [4.0], [1.0], [4.0], [np.nan]])
    ceiling = rater_agreement.noise_ceiling(mean, sd, n)
    noise = np.mean([1 / 4, 1 / 2, 4 / 4, 1 / 4]) / np.mean([1 / 4, 1 / 2, 1 / 4, 1 / 4])  # of a single rating
    by_hand = 1 - noise * np.mean([1 / 4, 1 / 2, 1 / 4, 1 / 4, 1]) / np.var([1, 2, 4, 8, 100], ddof=1)
    assert ceiling[0] == pytest.approx(by_hand)
    n[4] = 9  # raters who agree do
    by_hand = 1 - np.mean([1 / 4, 1 / 2, 4 / 4, 1 / 4, 0]) / np.var([1, 2, 4, 8, 100], ddof=1)
    assert rater_agreement.noise_ceiling(mean, sd, n)[0] == pytest.approx(by_hand)
    assert math.isnan(rater_agreement.noise_ceiling(mean[:1], sd[:1], 3)[0])


@pytest.mark.parametrize("raters", [2, 3, 5])
def test_ceiling_of_whole_number_ratings(raters):
    """A scale of 1 to 5, where raters often agree to the point. Truth: the variance of expected ratings by that of means."""
    generator = np.random.default_rng(raters)
    latent = 3 + generator.normal(size=(20000, 1))
    ratings = np.rint(latent + 0.7 * generator.normal(size=(20000, raters))).clip(1, 5)
    expected = 1 + stats.norm.sf(np.arange(1.5, 5), latent, 0.7).sum(1)
    mean = ratings.mean(1, keepdims=True)
    ceiling = rater_agreement.noise_ceiling(mean, ratings.std(1, ddof=1, keepdims=True), raters)
    assert abs(ceiling[0] - expected.var() / mean.var()) < 0.02


def test_a_number_of_raters_that_is_not_known_leaves_rows_without_spread_out():
    """They may be of one rater; whoever reads the table of ceilings is told."""
    ratings = np.rint(simulated_ratings(10, 0))
    mean, sd = ratings.mean(1, keepdims=True), ratings.std(1, ddof=1, keepdims=True)
    sd[:50] = 0
    found = rater_agreement.measure_ceiling(["Valence"], mean, sd)
    assert found.possible[0]["n = 30"] == rater_agreement.noise_ceiling(mean[50:], sd[50:], 30)[0]
    assert "sd = 0 are left out" in found.source


def test_a_ceiling_of_some_targets_is_none_of_their_mean(recwarn):
    """The mean R2 beside it is of all targets; those with a measurable ceiling are the ones that raters agree on."""
    for r2 in ([np.nan, np.nan], [0.9, np.nan]):
        ceiling = rater_agreement.Ceiling(source="", r2=np.array(r2))
        assert math.isnan(ceiling.mean_r2) and not recwarn.list
    assert "Measurable for 1 of 2 ratings" in "".join(rater_agreement.ceiling_blocks(ceiling))
    whole = rater_agreement.Ceiling(source="", r2=np.array([0.9, 0.7]))
    assert whole.mean_r2 == pytest.approx(0.8) and "Measurable" not in "".join(rater_agreement.ceiling_blocks(whole))


def test_ceilings_for_2_to_30_raters_where_their_number_is_not_known():
    ratings = simulated_ratings(10, 0)
    mean, sd = ratings.mean(1, keepdims=True), ratings.std(1, ddof=1, keepdims=True)
    (row,) = rater_agreement.measure_ceiling(["Valence"], mean, sd).possible
    assert row.pop("target") == "Valence" and list(row)[0] == "n = 2" and list(row)[-1] == "n = 30"
    assert row["n = 10"] == rater_agreement.noise_ceiling(mean, sd, 10)[0]
    known = [value for value in row.values() if np.isfinite(value)]
    assert known == sorted(known) and np.isnan(row["n = 2"])  # 10 raters' means are too alike for 2 raters' noise


def test_missing_ratings_and_lone_images_do_not_break_the_rater_estimators():
    ratings = [np.array([1.0, 2.0, np.nan]), np.array([5.0, 6.0]), np.array([]), np.array([7.0]), np.array([9.0, 8.5])]
    kept = [[1.0, 2.0], [5.0, 6.0], [9.0, 8.5]]
    whole, lone = rater_agreement.split_half(kept), rater_agreement.split_half(ratings)
    assert rater_agreement.split_half(ratings[:3] + ratings[4:]) == whole
    weights = [np.mean(1 / np.array(n)) / np.var(means, ddof=1) for n, means in (
        ([2, 2, 2], [1.5, 5.5, 8.75]), ([2, 2, 1, 2], [1.5, 5.5, 7, 8.75]))]
    assert (1 - lone) / (1 - whole) == pytest.approx(weights[1] / weights[0])
    assert rater_agreement.icc(ratings) == rater_agreement.icc(kept + [[7.0]]) != rater_agreement.icc(kept)
    assert math.isnan(rater_agreement.split_half(kept[:2])), "two images always correlate by 1 or -1"
    assert math.isnan(rater_agreement.split_half([[1.0, 2.0]])) and math.isnan(rater_agreement.icc([[1.0], [2.0]])[0])


# --- conformal -----------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [9, 19, 99, 640])
def test_conformal_interval_covers_88_to_92_percent(count):
    """1,000 repetitions, each judged by the exact share of new residuals inside."""
    generator = np.random.default_rng((0, count))
    quantiles = [calibrating.conformal_quantile(np.abs(generator.normal(size=count)), 0.1) for _ in range(1000)]
    assert 0.88 <= np.mean(stats.halfnorm.cdf(quantiles)) <= 0.92


@pytest.mark.parametrize("subjects", [9, 19, 39])
def test_conformal_interval_over_subjects_covers_new_subjects(subjects):
    """Residuals of one subject are alike (intra-class correlation .3 and unequal numbers of rows)."""
    generator, inside = np.random.default_rng((1, subjects)), []
    for _ in range(1000):
        names = np.repeat(np.arange(subjects), generator.integers(2, 30, subjects))
        residual = generator.normal(size=subjects)[names] * math.sqrt(ICC)
        residual = np.abs(residual + generator.normal(size=len(names)) * math.sqrt(1 - ICC))
        inside.append(stats.halfnorm.cdf(calibrating.conformal_quantile(residual, 0.1, names)))
    assert 0.88 <= np.mean(inside) <= 0.92


def test_conformal_quantile_is_the_stated_rank_and_infinite_where_too_few():
    residuals = np.arange(1.0, 20.0)
    assert calibrating.conformal_quantile(residuals, 0.1) == 18  # rank 18 of 19 at alpha .1
    assert calibrating.conformal_quantile(residuals[:9], 0.1) == 9
    assert calibrating.conformal_quantile(residuals[:8], 0.1) == math.inf
    assert calibrating.conformal_quantile(residuals[:0], 0.1) == math.inf
    assert calibrating.conformal_quantile(np.append(residuals, np.nan), 0.1) == 18
    assert calibrating.conformal_quantile(residuals, 0.1, np.array(["one", "two"] * 9 + ["one"])) == math.inf
    each = calibrating.conformal_quantile(residuals, 0.1, np.array([f"s{k}" for k in range(19)]))
    assert each == 18  # one row a subject: the same as without subjects


# --- unlike the training pictures ------------------------------------------------------------------

def test_a_new_row_is_farther_than_19_held_out_ones_in_one_of_20_cases_and_a_strange_one_always():
    draws = np.random.default_rng(0)
    flagged = []
    for _ in range(300):
        unit = draws.uniform(0.1, 10, 12)
        rows = unit * draws.normal(size=(79, 12))  # 40 train, 19 held out, 20 new
        known = row_warnings.known_data(rows[:40], rows[40:59])
        flagged.append(row_warnings.distance(rows[59:], known) > known["farthest"])
        assert row_warnings.distance(rows[:1] + 10 * unit, known) > known["farthest"]
    assert abs(np.mean(flagged) - 1 / 20) < 0.012


def test_noise_does_not_beat_the_class_shares_of_twelve_folds(tmp_path):
    """A group left out in turn: the share among the others is high where the group has few, an AUC of .15.

    By an interval of 95 %, 1 or 2 of 60 are better by chance; against each fold's own share most of them are.
    """
    draw = np.random.default_rng(0)
    n_better = 0
    owner = np.repeat(np.arange(12), 10)
    for _ in range(60):
        label = (draw.random(120) < draw.beta(1, 2, 12)[owner]).astype(int)
        share = np.array([label[owner != own].mean() for own in owner])
        noise = draw.random(120)
        tables = [prediction_tables.ClassTable(
            keys={"id": np.flatnonzero(own).astype(str)}, names=["a", "b"], positive=1, groups=owner[own].astype(str),
            truth=label[own], probability=np.stack([1 - noise, noise], 1)[own],
            baselines={"train_prior": np.stack([1 - share, share], 1)[own]}) for own in owner == np.arange(12)[:, None]]
        pooled = prediction_tables.join(tables, range(12))
        assert pooled.quality(pooled.baselines["train_prior"]) == 0.5
        n_better += pooled.compare().gain("roc_auc").low > 0
    assert n_better <= 2
    pooled.baselines["train_prior"] = np.stack([1 - share, share], 1)  # as of an older version
    pooled.write(tmp_path / "t.csv")
    again = prediction_tables.read_predictions(tmp_path / "t.csv")
    assert again.quality(again.baselines["train_prior"]) == 0.5


if __name__ == "__main__":
    for line in coverage_table():
        print(line, flush=True)
