"""Estimators against a truth that is known: interval coverage, noise ceilings, conformal coverage, by simulation.

    python -m pytest tests/test_estimators.py

Every seed is fixed; the bounds are those that the estimator promises, not those that a run happened to give.
"""
import math

import numpy as np
import pytest
from scipy import stats

import common
from evidence import calibrating, rater_agreement, subject_intervals

ROWS_PER_SUBJECT, ICC = 18, 0.3


def clustered(subjects, simulations, generator):
    """(S * 18, simulations) unit-variance draws with intra-class correlation .3: each column is one simulation."""
    own = generator.normal(size=(subjects, 1, simulations)) * math.sqrt(ICC)
    rest = generator.normal(size=(subjects, ROWS_PER_SUBJECT, simulations)) * math.sqrt(1 - ICC)
    return (own + rest).reshape(-1, simulations)


def coverage(estimate, truth):
    """Share of the (R,) intervals that hold the truth."""
    return float(np.mean((estimate.low <= truth) & (truth <= estimate.high)))


def mae_coverage(subjects, by_subject, repeats=5, simulations=400):
    """Coverage of the interval of an MAE whose expectation is 10, over repeats x simulations data sets."""
    names, shares = np.repeat(np.arange(subjects), ROWS_PER_SUBJECT), []
    for seed in range(repeats):
        error = 10 + clustered(subjects, simulations, np.random.default_rng((seed, subjects)))
        result = subject_intervals.bootstrap_regression(error, np.zeros_like(error), names if by_subject else None, seed=seed)
        shares.append(coverage(result.each.model["mae"], 10.0))
    return float(np.mean(shares))


# --- intervals over subjects ---------------------------------------------------------------------

@pytest.mark.parametrize("subjects", [5, 9, 18, 40])
def test_interval_over_subjects_covers_92_to_97_percent(subjects):
    assert 0.92 <= mae_coverage(subjects, by_subject=True) <= 0.97


@pytest.mark.parametrize("subjects", [9, 40])
def test_a_row_bootstrap_covers_about_55_percent(subjects):
    assert 0.50 <= mae_coverage(subjects, by_subject=False, repeats=1) <= 0.60


@pytest.mark.parametrize("subjects", [5, 9, 18, 40])
def test_r_r2_and_the_paired_differences_cover_92_to_97_percent(subjects):
    """Labels, model errors and baseline errors all cluster; r = .819, R2 = .51, baseline R2 = .36 are the truth."""
    names, shares = np.repeat(np.arange(subjects), ROWS_PER_SUBJECT), []
    truth = {"r": 1 / math.sqrt(1.49), "R2": 0.51, "difference of R2": 0.51 - 0.36,
             "difference of MAE": (0.7 - 0.8) * math.sqrt(2 / math.pi)}
    for seed in range(25 if subjects < 20 else 4):  # the t-interval costs nothing, the bootstrap does
        generator = np.random.default_rng((seed, subjects, 1))
        target = clustered(subjects, 400, generator)
        model = target + 0.7 * clustered(subjects, 400, generator)
        baseline = target + 0.8 * clustered(subjects, 400, generator)
        found = subject_intervals.bootstrap_regression(model, target, names, baseline, seed=seed).each
        estimates = (found.model["pearson_r"], found.model["r2"], found.difference["r2"], found.difference["mae"])
        shares.append([coverage(each, value) for each, value in zip(estimates, truth.values())])
    held = dict(zip(truth, np.mean(shares, 0)))
    assert all(0.92 <= share <= 0.97 for share in held.values()), held


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


def test_sign_flip_p_is_uniform_where_there_is_no_difference():
    generator = np.random.default_rng(0)
    p = np.array([subject_intervals.sign_flip_p(generator.normal(size=9)) for _ in range(1000)])
    assert abs(np.mean(p <= 0.05) - 0.05) < 0.02 and stats.kstest(p, "uniform").pvalue > 0.01


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


def test_rows_with_zero_sd_or_gaps_do_not_count():
    mean = np.array([[1.0], [2.0], [4.0], [8.0], [100.0], [np.nan], [3.0]])
    sd = np.array([[1.0], [1.0], [2.0], [1.0], [0.0], [1.0], [1.0]])
    n = np.array([[4.0], [2.0], [4.0], [4.0], [9.0], [4.0], [np.nan]])
    ceiling = rater_agreement.noise_ceiling(mean, sd, n)
    by_hand = 1 - np.mean([1 / 4, 1 / 2, 4 / 4, 1 / 4]) / np.var([1, 2, 4, 8], ddof=1)
    assert ceiling[0] == pytest.approx(by_hand)
    assert math.isnan(rater_agreement.noise_ceiling(mean[:1], sd[:1], 3)[0])


def test_ceiling_table_holds_every_number_of_raters_where_none_is_known():
    ratings = simulated_ratings(10, 0)
    mean, sd = ratings.mean(1, keepdims=True), ratings.std(1, ddof=1, keepdims=True)
    table = rater_agreement.ceiling_table(mean, sd)
    assert list(table) == list(range(2, 31))
    assert table[10][0] == rater_agreement.noise_ceiling(mean, sd, 10)[0]
    known = [value[0] for value in table.values() if np.isfinite(value[0])]
    assert known == sorted(known) and np.isnan(table[2][0])  # 10 raters' means are too alike for 2 raters' noise


def test_missing_ratings_and_lone_images_do_not_break_the_rater_estimators():
    ratings = [np.array([1.0, 2.0, np.nan]), np.array([5.0, 6.0]), np.array([]), np.array([7.0]), np.array([9.0, 8.5])]
    kept = [[1.0, 2.0], [5.0, 6.0], [9.0, 8.5]]
    assert rater_agreement.split_half(ratings) == rater_agreement.split_half(kept)
    assert rater_agreement.icc(ratings) == rater_agreement.icc(kept + [[7.0]]) != rater_agreement.icc(kept)
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
    for seed in range(1000):
        names = np.repeat(np.arange(subjects), generator.integers(2, 30, subjects))
        residual = generator.normal(size=subjects)[names] * math.sqrt(ICC)
        residual = np.abs(residual + generator.normal(size=len(names)) * math.sqrt(1 - ICC))
        inside.append(stats.halfnorm.cdf(calibrating.conformal_quantile(residual, 0.1, names, seed)))
    assert 0.88 <= np.mean(inside) <= 0.92


def test_conformal_quantile_is_the_stated_rank_and_infinite_where_too_few():
    residuals = np.arange(1.0, 20.0)
    assert calibrating.conformal_quantile(residuals, 0.1) == 18  # rank 18 of 19 at alpha .1
    assert calibrating.conformal_quantile(residuals[:9], 0.1) == 9
    assert calibrating.conformal_quantile(residuals[:8], 0.1) == math.inf
    assert calibrating.conformal_quantile([], 0.1) == math.inf
    assert calibrating.conformal_quantile(np.append(residuals, np.nan), 0.1) == 18
    assert calibrating.conformal_quantile(residuals, 0.1, ["one", "two"] * 9 + ["one"]) == math.inf
    each = calibrating.conformal_quantile(residuals, 0.1, [f"s{k}" for k in range(19)])
    assert each == 18  # one row a subject: the same as without subjects
