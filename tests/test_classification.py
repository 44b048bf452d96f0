"""Classification: metrics, intervals, baselines, no-pixel priors, calibration, alarms and plots.

    python -m pytest tests/test_classification.py

Judges are scikit-learn and torchmetrics; estimators are held against a truth that a simulation knows.
"""
import functools
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as torch_classification
from scipy import optimize, special, stats
from sklearn import metrics as judge
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit

import common
from evidence import (
    baseline_models, calibrating, class_judging, class_scores, confounding, plotting, prediction_tables,
    reporting, subject_intervals, verdicts)
from conftest import class_alarms, fit_as_sklearn

NAMES = ["ear", "none", "tail", "wall"]


def scored_rows(rows=300, classes=4, seed=0, digits=None, sharpness=1.0):
    """Logits, probabilities (N, C) and labels (N,) drawn from them; digits rounds the probabilities, to make ties."""
    generator = np.random.default_rng((seed, rows, classes))
    logits = 1.3 * generator.normal(size=(rows, classes))
    probability = class_scores.softmax(logits)
    label = (probability.cumsum(1) < generator.random((rows, 1))).sum(1)
    probability = class_scores.softmax(logits * sharpness)
    if digits is not None:
        probability = np.maximum(np.round(probability, digits), 10.0 ** -digits)
        probability /= probability.sum(1, keepdims=True)
    return logits, probability, label


def two_classes(rows=300, separation=1.2, seed=0, rate=0.4):
    """Calibrated probabilities (N, 2) and labels of two normal classes `separation` apart."""
    generator = np.random.default_rng((seed, rows))
    label = (generator.random(rows) < rate).astype(int)
    return binormal(separation * label + generator.normal(size=rows), separation, rate), label


def binormal(score, separation, rate):
    logit = separation * (score - separation / 2) + math.log(rate / (1 - rate))
    return np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], 1)


# --- metrics -------------------------------------------------------------------------------------

@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_sklearn_with_and_without_ties(classes, digits):
    _, probability, label = scored_rows(classes=classes, digits=digits)
    ours, chosen = class_scores.classification_metrics(probability, label), probability.argmax(1)
    score = probability[:, 1] if classes == 2 else probability
    judged = {"loss": judge.log_loss(label, probability), "accuracy": judge.accuracy_score(label, chosen),
              "balanced_accuracy": judge.balanced_accuracy_score(label, chosen),
              "macro_f1": judge.f1_score(label, chosen, average="macro"),
              "roc_auc": judge.roc_auc_score(label, score, multi_class="ovr"),
              "mcc": judge.matthews_corrcoef(label, chosen), "brier": judge.brier_score_loss(label, score)}
    assert {name: ours.overall[name] for name in judged} == pytest.approx(judged, rel=1e-9)
    assert {*judged, "ece", "ece_adaptive"} == set(ours.overall) == set(class_scores.CLASSIFICATION_METRICS)
    parts = judge.precision_recall_fscore_support(label, chosen, labels=range(classes), zero_division=np.nan)
    theirs = dict(zip(("precision", "recall", "f1"), parts))
    theirs["average_precision"] = [judge.average_precision_score(label == c, probability[:, c]) for c in range(classes)]
    theirs["roc_auc"] = [judge.roc_auc_score(label == c, probability[:, c]) for c in range(classes)]
    assert set(theirs) == set(ours.per_class) == set(class_scores.CLASS_METRICS)
    for name, values in theirs.items():
        np.testing.assert_allclose(ours.per_class[name], values, rtol=1e-9, err_msg=name)
    ours = class_scores.confusion_matrix(label, chosen, classes)
    np.testing.assert_array_equal(ours, judge.confusion_matrix(label, chosen))
    with pytest.raises(ValueError):  # a label of no class
        class_scores.confusion_matrix(np.where(label, label, -1), chosen, classes)


@pytest.mark.parametrize("classes", [2, 4])
def test_ece_equals_torchmetrics_and_the_bins_of_sklearn(classes):
    _, probability, label = scored_rows(classes=classes, sharpness=2.0)
    ours, confidence = class_scores.classification_metrics(probability, label).overall, probability.max(1)
    p, t = torch.from_numpy(probability), torch.from_numpy(label)
    theirs = torch_classification.multiclass_calibration_error(p, t, classes, n_bins=15, norm="l1")
    assert ours["ece"] == pytest.approx(float(theirs), rel=1e-5)
    correct = probability.argmax(1) == label
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15, strategy="quantile")
    inner = np.quantile(confidence, np.arange(1, 15) / 15)
    share = np.bincount(np.searchsorted(inner, confidence), minlength=15) / len(label)
    assert len(accuracy) == 15 and np.ptp(share) <= 1.01 / 15  # equal mass
    assert ours["ece_adaptive"] == pytest.approx(np.sum(share * np.abs(accuracy - mean)))


def test_other_metrics_equal_torchmetrics():
    _, probability, label = scored_rows(digits=2)
    ours = class_scores.classification_metrics(probability, label)
    p, t = torch.from_numpy(probability), torch.from_numpy(label)
    precision = torch_classification.multiclass_average_precision(p, t, 4, average=None).numpy()
    np.testing.assert_allclose(ours.per_class["average_precision"], precision, rtol=1e-5)
    assert ours.overall["roc_auc"] == pytest.approx(float(torch_classification.multiclass_auroc(p, t, 4)), rel=1e-5)
    mcc = float(torch_classification.multiclass_matthews_corrcoef(p, t, 4))
    assert ours.overall["mcc"] == pytest.approx(mcc, rel=1e-5)


def test_an_absent_class_is_left_out_of_the_means_and_nan_itself(recwarn):
    _, probability, label = scored_rows()
    kept = label != 2
    probability, label = probability[kept], label[kept]
    ours, chosen = class_scores.classification_metrics(probability, label), probability.argmax(1)
    overall, tail = ours.overall, {name: values[2] for name, values in ours.per_class.items()}
    assert all(math.isnan(tail[metric]) for metric in ("recall", "average_precision", "roc_auc"))
    assert tail["f1"] == tail["precision"] == 0.0
    assert overall["macro_f1"] == pytest.approx(judge.f1_score(label, chosen, average="macro"))
    aucs = [judge.roc_auc_score(label == c, probability[:, c]) for c in (0, 1, 3)]
    assert overall["roc_auc"] == pytest.approx(np.mean(aucs))
    assert not recwarn.list
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predictions that no label has
        assert overall["balanced_accuracy"] == pytest.approx(judge.balanced_accuracy_score(label, chosen))


def test_undefined_values_are_nan_and_a_constant_prediction_has_no_correlation(recwarn):
    constant = np.tile([0.3, 0.7], (6, 1))
    ours = class_scores.classification_metrics(constant, np.array([0, 1, 1, 0, 1, 1]))
    assert ours.overall["mcc"] == 0.0 and ours.overall["roc_auc"] == 0.5
    assert math.isnan(ours.per_class["precision"][0]) and ours.per_class["recall"][0] == ours.per_class["f1"][0] == 0.0
    assert ours.per_class["average_precision"][1] == pytest.approx(4 / 6)
    one = class_scores.classification_metrics(constant, np.ones(6, int))
    assert math.isnan(one.overall["roc_auc"]) and math.isnan(one.overall["mcc"])
    assert one.overall["accuracy"] == one.per_class["recall"][1] == 1.0
    assert not recwarn.list


def test_nan_is_not_hidden():
    _, probability, label = scored_rows()
    probability[4, 1] = np.nan
    found = class_scores.classification_metrics(probability, label)
    assert np.isnan([*found.overall.values()]).all() and np.isnan([*found.per_class.values()]).all()


def test_softmax_of_large_logits_is_finite():
    assert class_scores.softmax(np.array([[1000.0, 0.0, -np.inf], [-2000.0, -2000.0, -2000.0]])).tolist() == [
        [1, 0, 0], [1 / 3] * 3]


def test_threshold_gives_the_positive_class_from_the_threshold_on():
    probability = np.array([[0.8, 0.2, 0.0], [0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
    assert class_scores.predicted_class(probability, 0.3, 2).tolist() == [0, 0, 2, 2]
    assert class_scores.predicted_class(probability, 0.75, 2).tolist() == [0, 0, 1, 1]
    low, label = two_classes()
    ours = class_scores.classification_metrics(low, label, threshold=0.25)
    assert ours.per_class["recall"][1] == pytest.approx(judge.recall_score(label, low[:, 1] >= 0.25))
    assert ours.overall["roc_auc"] == class_scores.classification_metrics(low, label).overall["roc_auc"]


def test_the_same_probabilities_under_the_same_threshold_make_no_difference():
    probability, label = two_classes()
    groups = np.arange(len(label)) % 25

    def compared(baseline_threshold):
        return subject_intervals.bootstrap_classification(
            probability, label, groups, probability, threshold=np.full(len(label), 0.25), positive=1,
            baseline_threshold=baseline_threshold)
    alike = compared(np.full(len(label), 0.25))
    assert all(found.value == found.low == found.high == 0 for found in alike.overall.difference.values())
    assert not np.any(alike.each.difference["f1"].value)
    assert compared(None).overall.difference["macro_f1"].value != 0


def test_row_weights_equal_repeated_rows():
    _, probability, label = scored_rows(rows=80, digits=1)
    times = np.random.default_rng(1).integers(0, 4, (5, 80))
    overall, per_class = class_scores.class_statistic(probability, label, None, 1)(times.astype(float))
    for draw, counts in enumerate(times):
        rows = np.repeat(np.arange(80), counts)
        direct = class_scores.classification_metrics(probability[rows], label[rows])
        for name in set(direct.overall) - {"ece_adaptive"}:  # whose bins stay those of all rows
            assert overall[name][draw] == pytest.approx(direct.overall[name], rel=1e-9, nan_ok=True), name
        for name, values in direct.per_class.items():
            np.testing.assert_allclose(per_class[name][draw], values, rtol=1e-9, err_msg=name)


def test_sklearn_average_precision_and_auc_under_weights():
    _, probability, label = scored_rows(rows=90, classes=2, digits=1)
    weights = np.random.default_rng(0).random((3, 90))
    auc, precision = class_scores.ranking_metrics(probability[:, 1], label == 1, weights)
    for draw, w in enumerate(weights):
        assert auc[draw] == pytest.approx(judge.roc_auc_score(label, probability[:, 1], sample_weight=w))
        theirs = judge.average_precision_score(label, probability[:, 1], sample_weight=w)
        assert precision[draw] == pytest.approx(theirs)


# --- the ECE of a calibrated model, and the risk-coverage curve ------------------------------------

@pytest.mark.parametrize("rows, published", [(35, 0.149), (60, 0.115), (128, 0.080), (191, 0.065), (361, 0.046),
                                             (1000, 0.028)])
def test_expected_ece_of_confidences_between_a_half_and_one(rows, published):
    found = [calibrating.simulated_ece(np.random.default_rng(seed).uniform(0.5, 1.0, rows)).mean() for seed in range(10)]
    assert abs(np.mean(found) - published) < 0.005


def test_expected_ece_is_what_calibrated_models_show():
    shown, expected = [], []
    for seed in range(100):
        _, probability, label = scored_rows(rows=128, classes=2, seed=seed)
        metrics = class_scores.classification_metrics(probability, label)
        shown.append(metrics.overall["ece"])
        expected.append(calibrating.simulated_ece(probability.max(1)).mean())
    assert np.mean(shown) == pytest.approx(np.mean(expected), abs=0.006)


def test_risk_coverage_by_hand_and_whatever_the_order_of_tied_rows():
    coverage, risk = calibrating.risk_coverage(np.array([0.9, 0.6, 0.8, 0.6]), np.array([True, True, False, False]))
    np.testing.assert_allclose(coverage, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(risk, [0.0, 0.5, 0.5])


# --- intervals -----------------------------------------------------------------------------------

def test_interval_of_a_share_of_7_of_19_and_against_scipy():
    assert [round(float(end), 2) for end in subject_intervals.share_interval(7, 19)] == [0.19, 0.59]
    for k, n in ((1, 5), (3, 8), (49, 50), (1, 400)):
        theirs = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert subject_intervals.share_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert all(math.isnan(end) for end in subject_intervals.share_interval(0, 0))
    for k in (0, 10):
        exact = stats.binomtest(k, 10).proportion_ci(0.95)
        assert subject_intervals.share_interval(k, 10) == pytest.approx((exact.low, exact.high))


def clustered_scores(subjects, rows, generator, separation=1.2, icc=0.3, rate=0.4):
    """(two models' probabilities, labels, subjects): scores share a subject's offset, labels vary by subject."""
    names = np.repeat(np.arange(subjects), rows)
    odds = math.log(rate / (1 - rate)) + 0.5 * generator.normal(size=subjects)[names]
    label = (generator.random(len(names)) < 1 / (1 + np.exp(-odds))).astype(int)

    def model(apart):
        own = generator.normal(size=subjects)[names] * math.sqrt(icc)
        return binormal(apart * label + own + generator.normal(size=len(names)) * math.sqrt(1 - icc), apart, rate)
    return model(separation), model(separation / 2), label, names


def covered_estimates(result):
    """{what: Estimate} of the numbers whose coverage is simulated; b is the second class."""
    overall, each = result.overall, result.each
    found = {metric: overall.model[metric] for metric in ("roc_auc", "accuracy", "macro_f1", "brier")}
    found |= {f"{metric} of b": each.model[metric].at(1) for metric in ("average_precision", "recall")}
    found |= {f"difference of {metric}": overall.difference[metric] for metric in ("roc_auc", "brier")}
    return found | {"difference of average_precision": each.difference["average_precision"].at(1)}


@pytest.mark.parametrize("subjects, rows, separation", [
    (6, 18, 1.2), pytest.param(12, 18, 2.0, marks=pytest.mark.long),
    pytest.param(40, 9, 1.2, marks=pytest.mark.long)])
def test_intervals_over_subjects_cover_89_to_98_percent(subjects, rows, separation, monkeypatch):
    """The truth is that of 4,000 subjects; labels, scores of the model and those of the baseline all cluster.

    Nominal 95 %; a run of 600 gave 92 to 94 % at 40 subjects, and three standard errors of 400 are 4 %.
    """
    generator, hits, draw = np.random.default_rng(subjects), [], subject_intervals.bootstrap_classification
    model, baseline, label, names = clustered_scores(4000, rows, generator, separation)
    with monkeypatch.context() as patched:  # only the values count
        patched.setattr(subject_intervals, "estimate", functools.partial(subject_intervals.estimate, draws=1))
        truth = covered_estimates(draw(model, label, names, baseline, names=["a", "b"]))
    for _ in range(400):
        model, baseline, label, names = clustered_scores(subjects, rows, generator, separation)
        found = covered_estimates(draw(model, label, names, baseline, names=["a", "b"]))
        hits.append([each.low <= truth[name].value <= each.high for name, each in found.items()])
    shares = dict(zip(truth, np.mean(hits, axis=0)))
    assert all(0.89 <= share <= 0.98 for share in shares.values()), shares


def test_copies_of_a_row_add_nothing_where_subjects_are_named(monkeypatch):
    """18 copies of each row: over subjects the interval stays that of single rows, over rows it shrinks by root 18.

    By root 18 on the scale of the interval, that of the logit, and where both take their error from the bootstrap.
    """
    monkeypatch.setattr(subject_intervals, "FEWEST_FOR_BOOTSTRAP", 20)
    probability, label = two_classes(rows=60)
    copies = [np.repeat(array, 18, axis=0) for array in (probability, label)]
    single, subjects, rows = (subject_intervals.bootstrap_classification(*given) for given in (
        (probability, label), (*copies, np.repeat([f"s{k:02d}" for k in range(60)], 18)), copies))

    def ends(result):
        found = [result.overall.model[name] for name in ("roc_auc", "macro_f1", "brier")]
        found.append(result.each.model["average_precision"].at(1))
        return np.array([[each.low, each.high] for each in found])
    np.testing.assert_allclose(ends(subjects), ends(single), rtol=1e-9)
    wide, narrow = (np.ptp(special.logit(ends(result)), axis=1) for result in (single, rows))
    np.testing.assert_allclose(narrow, wide / math.sqrt(18), rtol=0.15)


def test_the_interval_is_t_times_the_sd_of_metrics_of_resampled_rows(monkeypatch):
    """Subjects drawn by hand, every metric computed anew on their rows; on the scale where it is nearest to normal."""
    monkeypatch.setattr(subject_intervals, "FEWEST_FOR_BOOTSTRAP", 20)
    monkeypatch.setattr(subject_intervals, "estimate", functools.partial(subject_intervals.estimate, draws=40))
    _, probability, label = scored_rows(rows=100)
    subjects = np.repeat([f"s{k:02d}" for k in range(25)], 4)
    result = subject_intervals.bootstrap_classification(probability, label, subjects)
    drawn = []
    for pick in np.random.default_rng(0).integers(0, 25, (40, 25)):
        rows = np.concatenate([np.flatnonzero(subjects == f"s{k:02d}") for k in pick])
        drawn.append(class_scores.classification_metrics(probability[rows], label[rows]))
    reach = stats.t.ppf(0.975, 24) * math.sqrt(25 / 24)

    def ends(values, whole, forward, backward):
        half = reach * np.std(forward(np.array(values)))
        return backward(forward(whole) - half), backward(forward(whole) + half)
    scales = {"loss": (np.log, np.exp), "roc_auc": (special.logit, special.expit), "macro_f1": (special.logit, special.expit),
              "mcc": (lambda mcc: 2 * np.arctanh(mcc), lambda scaled: np.tanh(scaled / 2))}
    for name, scale in scales.items():
        found = result.overall.model[name]
        judged = ends([each.overall[name] for each in drawn], found.value, *scale)
        assert (found.low, found.high) == pytest.approx(judged, rel=1e-4), name
    found = result.each.model["average_precision"].at(2)
    judged = ends([each.per_class["average_precision"][2] for each in drawn], found.value, special.logit, special.expit)
    assert (found.low, found.high) == pytest.approx(judged, rel=1e-4)


def test_bootstrap_classification_holds_values_and_pairs_the_baseline():
    _, probability, label = scored_rows(rows=171)
    result = subject_intervals.bootstrap_classification(
        probability, label, baseline=probability, names=NAMES)
    direct = class_scores.classification_metrics(probability, label)
    for comparison, values in ((result.overall, direct.overall), (result.each, direct.per_class)):
        for name, value in values.items():
            model, difference = comparison.model[name], comparison.difference[name]
            np.testing.assert_array_equal(model.value, value)
            np.testing.assert_array_equal(comparison.baseline[name].value, value)
            assert np.all(model.low < value) and np.all(value < model.high), name
            assert not np.any([difference.low, difference.high]), name
    confusion = class_scores.confusion_matrix(label, probability.argmax(1), probability.shape[1])
    assert result.rows == result.subjects == confusion.sum() and result.method.endswith("rows")
    recall = result.each.model["recall"].at(2)
    assert (recall.low, recall.high) == subject_intervals.share_interval(
        confusion[2, 2], confusion[2].sum())


def test_classes_may_be_called_as_anything():
    """A class called baseline, difference or like a metric keeps its own numbers, in the record and as a criterion."""
    _, probability, label = scored_rows(rows=200, classes=4)
    names = ["baseline", "difference_a", "mean", "roc_auc"]
    flat = np.tile(np.bincount(label) / len(label), (len(label), 1))
    result = subject_intervals.bootstrap_classification(probability, label, baseline=flat, names=names)
    record = result.record()
    meanings = verdicts.spell_class_metrics(names)
    estimates = verdicts.named_estimates(result, meanings)
    for c, (name, entry) in enumerate(zip(names, record["per_class"])):
        auc = pytest.approx(judge.roc_auc_score(label == c, probability[:, c]))
        assert entry["name"] == name and entry["model"]["roc_auc"]["value"] == auc == estimates[f"auc_{name}"].value
        assert entry["baseline"]["roc_auc"]["value"] == 0.5
    assert record["baseline"]["roc_auc"]["value"] == 0.5


def test_blocks_of_draws_give_the_same_intervals(monkeypatch):
    probability, label = two_classes(rows=120)
    auc = subject_intervals.bootstrap_classification(probability, label).overall.model["roc_auc"]
    statistic, shapes = class_scores.class_statistic, []

    def spy(*given):
        inner = statistic(*given)
        return lambda weights: shapes.append(weights.shape) or inner(weights)
    monkeypatch.setattr(class_scores, "class_statistic", spy)
    many = np.tile(probability, (200, 1)), np.tile(label, 200)
    subject_intervals.bootstrap_classification(*many, np.tile(np.arange(120), 200))
    assert max(rows for rows, _ in shapes) == 41  # 1,000,000 // 24,000 of 120 at once
    monkeypatch.undo()
    again = subject_intervals.bootstrap_classification(probability, label).overall.model["roc_auc"]
    assert (auc.low, auc.high) == (again.low, again.high)


def test_few_subjects_get_values_only_and_nine_get_p():
    model, baseline, label, names = clustered_scores(9, 18, np.random.default_rng(0), 2.5)
    two = subject_intervals.bootstrap_classification(model[:36], label[:36], names[:36], baseline[:36])
    assert not two.has_intervals and set(two.sign_flip_p.values()) == {None}
    assert math.isnan(two.overall.model["roc_auc"].low)
    nine = subject_intervals.bootstrap_classification(model, label, names, baseline)

    def brier(probability, subject):
        rows = names == subject
        return class_scores.classification_metrics(probability[rows], label[rows]).overall["brier"]
    own = [brier(model, subject) - brier(baseline, subject) for subject in range(9)]
    assert nine.per_subject["brier"] == pytest.approx(own)
    assert nine.sign_flip_p["brier"] == pytest.approx(subject_intervals.sign_flip_p(np.array(own)))
    assert "t-interval over 9 subjects" in nine.method


def test_a_class_in_few_subjects_has_no_interval_and_a_perfect_one_is_not_beyond_doubt():
    subjects, label = np.repeat(np.arange(24), 5), np.tile([0, 0, 0, 1, 1], 24)
    perfect = np.stack([1 - label, label], 1) * 0.8 + 0.1
    found = subject_intervals.bootstrap_classification(perfect, label, subjects, names=["a", "b"])
    for estimate in (found.overall.model["roc_auc"], found.each.model["recall"].at(1)):
        exact = stats.binomtest(24, 24).proportion_ci(0.95)
        assert (estimate.low, estimate.high) == pytest.approx((exact.low, exact.high))
    rare = np.where(subjects < 4, label, 0)
    found = subject_intervals.bootstrap_classification(perfect, rare, subjects, names=["a", "b"])
    assert math.isnan(found.overall.model["roc_auc"].low) and math.isnan(found.each.model["recall"].at(1).high)
    kept = subjects < 12  # a p of .018 came of one subject with b
    baseline = np.random.default_rng(0).dirichlet([1, 1], 60)
    lone = subject_intervals.bootstrap_classification(
        perfect[kept], np.where(subjects == 0, label, 0)[kept], subjects[kept], baseline)
    assert "roc_auc" not in lone.sign_flip_p and lone.sign_flip_p["accuracy"] is not None
    kept = subjects < 4  # too few for any p, whatever they have
    few = subject_intervals.bootstrap_classification(
        perfect[kept], np.where(subjects < 2, label, 0)[kept], subjects[kept], baseline[:20])
    assert len(few.per_subject["roc_auc"]) == 4
    assert math.isfinite(found.overall.model["accuracy"].low)
    for folds, groups in ((1, subjects), (5, None)):  # b is given to two rows, both right
        given = perfect.copy()
        given[np.flatnonzero(label)[2:]] = [0.9, 0.1]
        for model, baseline in ((given, perfect), (perfect, given)):
            each = subject_intervals.bootstrap_classification(
                model, label, groups, baseline, folds=folds, names=["a", "b"]).each
            found, other = (each.model, each.baseline) if model is given else (each.baseline, each.model)
            rare, often = found["precision"], other["precision"]
            ends = [rare.low[1], rare.high[1], each.difference["precision"].low[1]]
            assert rare.value[1] == 1 and np.isnan(ends).all()
            assert np.isfinite([found["recall"].low[1], rare.low[0], often.low[1], often.high[1]]).all()


@pytest.mark.parametrize("subjects, resolved", [(5, False), (6, True)])
def test_a_perfect_model_of_few_subjects_is_as_doubtful_beside_a_baseline_as_alone(subjects, resolved):
    """No resample changes the difference of the AUC, 1 - .5; two equal models differ by 0 for certain."""
    label = np.tile([0, 1], subjects)
    perfect = np.stack([1 - label, label], 1) * 0.8 + 0.1
    groups = np.repeat(np.arange(subjects), 2)
    result = subject_intervals.bootstrap_classification(perfect, label, groups, np.full_like(perfect, 0.5))
    assert "roc_auc" not in result.sign_flip_p, "a p that no subject decides"
    found = result.overall
    gain = found.difference["roc_auc"]
    assert (gain.low, gain.high) == pytest.approx((found.model["roc_auc"].low - 0.5, 0.5))
    assert (gain.low > 0) == resolved
    same = subject_intervals.bootstrap_classification(perfect, label, groups, perfect).overall.difference["roc_auc"]
    assert same.low == same.value == same.high == 0


def test_what_differs_by_rounding_alone_is_as_sure_as_what_is_equal():
    """Nor does the unit decide which differences are taken for certain."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(100, 1))
    predicted = target + rng.normal(size=(100, 1))
    groups = np.repeat(np.arange(20), 5)

    def gain(baseline, unit=1.0):
        found = subject_intervals.bootstrap_regression(
            unit * predicted, unit * target, subjects=groups, baseline=unit * baseline)
        return found.overall.difference
    rounded = gain(predicted.round(9))["r2"]
    assert -1e-7 < rounded.low <= rounded.high < 1e-7
    mean = np.zeros_like(target)
    plain, small = gain(mean)["mse"], gain(mean, unit=1e-5)["mse"]
    assert [1e10 * small.low, 1e10 * small.high] == pytest.approx([plain.low, plain.high])


# --- baselines -----------------------------------------------------------------------------------

def test_prior_baseline_is_the_train_share():
    np.testing.assert_allclose(baseline_models.prior_baseline(np.array([0, 2, 2, -1, 2]), 2, 4), [[0.25, 0, 0.75, 0]] * 2)


def features_of_classes(rows, features, classes, seed=0):
    generator = np.random.default_rng((seed, rows, features))
    x = 3 + generator.normal(size=(rows, features)) * generator.uniform(0.1, 10, features)
    z = (x - x.mean(0)) / x.std(0)
    return x, z, (z[:, :classes] + generator.normal(size=(rows, classes))).argmax(1)


def probabilities(model, features):
    """(M, C) of a logistic model."""
    return class_scores.softmax(model.predict(features))


@pytest.mark.parametrize("rows, features, classes", [(120, 12, 2), (120, 12, 4), (50, 150, 2), (60, 200, 3)])
@pytest.mark.parametrize("penalty", [0.1, 30.0])
def test_logistic_equals_sklearn_at_equal_lambda(rows, features, classes, penalty):
    x, z, label = features_of_classes(rows, features, classes)
    ours = fit_as_sklearn(x, label, penalty, n_classes=classes)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=20000).fit(z, label)
    np.testing.assert_allclose(probabilities(ours, x), theirs.predict_proba(z), atol=1e-4)
    weights = (ours.weights * x.std(0)[:, None]).T  # of standardised features
    np.testing.assert_allclose(weights if classes > 2 else np.diff(weights, axis=0), theirs.coef_, atol=1e-4)
    intercept = ours.predict(x.mean(0))
    intercept = intercept - intercept.mean() if classes > 2 else np.diff(intercept)
    theirs_centred = theirs.intercept_ - theirs.intercept_.mean() if classes > 2 else theirs.intercept_
    np.testing.assert_allclose(intercept, theirs_centred, atol=1e-4)


@pytest.mark.parametrize("rows, features", [(150, 10), (60, 120)])
def test_logistic_chooses_lambda_as_a_grid_search_over_the_same_folds(rows, features):
    x, z, label = features_of_classes(rows, features, 3)
    fold_of = np.zeros(rows, int)
    groups = np.arange(rows) // 2
    for number, members in enumerate(baseline_models.inner_folds(groups.astype(str))):
        fold_of[members] = number
    search = GridSearchCV(LogisticRegression(max_iter=5000), {"C": [1 / v for v in baseline_models.LOGISTIC_LAMBDAS]},
                          cv=PredefinedSplit(fold_of), scoring=lambda m, a, b: -judge.log_loss(
                              b, m.predict_proba(a), labels=[0, 1, 2], normalize=False))
    ours = fit_as_sklearn(x, label, n_classes=3, groups=groups.astype(str))
    best = fit_as_sklearn(x, label, 1 / search.fit(z, label).best_params_["C"], n_classes=3)
    np.testing.assert_allclose(ours.weights, best.weights, atol=1e-6)


def test_logistic_survives_absent_and_lone_classes():
    x, _, label = features_of_classes(80, 5, 3)
    label[label == 1] = 0
    label[3] = 1  # a class with one row, class 3 and 4 unseen
    predicted = probabilities(fit_as_sklearn(x, label, n_classes=5), x)
    assert predicted.shape == (80, 5) and np.isfinite(predicted).all() and (predicted[:, 3:] == 0).all()
    np.testing.assert_allclose(predicted.sum(1), 1.0)
    lone = fit_as_sklearn(x, np.zeros(80, int), n_classes=2)
    assert (probabilities(lone, x)[:, 0] == 1).all()


def test_logistic_on_noise_comes_back_to_the_prior():
    generator = np.random.default_rng(0)
    x, label = generator.normal(size=(100, 300)), (generator.random(100) < 0.3).astype(int)
    predicted = probabilities(fit_as_sklearn(x, label, n_classes=2), generator.normal(size=(100, 300)))
    assert predicted[:, 1].std() < 0.15 and abs(predicted[:, 1].mean() - label.mean()) < 0.05


# --- no-pixel confounds --------------------------------------------------------------------------

def planted_levels(rows=600, seed=0):
    """Labels whose rate is set by the pair of animals (.1, .3, .6, .9); the room tells nothing, the id is unique."""
    generator = np.random.default_rng(seed)
    pair = generator.integers(0, 4, rows)
    label = (generator.random(rows) < np.array([0.1, 0.3, 0.6, 0.9])[pair]).astype(int)
    return {"pair": [f"p{k}" for k in pair], "room": generator.integers(0, 3, rows), "clip": np.arange(rows),
            "pen": ["one"] * rows}, label, generator.permutation(rows), pair


def estimate(low):
    return subject_intervals.Estimate(value=low, low=low, high=1.0)


def flagged(rows, model):
    """flag_confounds, whatever the model is worth within the levels."""
    table = SimpleNamespace(quality_within=lambda levels: math.nan)
    return confounding.flag_confounds([{"codes": np.zeros(1), **row} for row in rows], model, table, [0])


def test_level_priors_find_the_planted_column_and_only_it():
    levels, label, order, pair = planted_levels()
    rows = confounding.level_priors(levels, label, [order[:300]], [order[300:]])
    found = {row["name"]: row for row in rows}
    assert rows[0]["name"] == "pair" and set(found) == {"pair", "room", "row order"}
    rate = np.array([label[order[:300]][pair[order[:300]] == k].mean() for k in range(4)])[pair]
    direct = judge.roc_auc_score(label[order[300:]], rate[order[300:]])
    assert found["pair"]["auc"] == pytest.approx(direct) and direct > 0.75 and found["pair"]["n_levels"] == 4
    assert found["room"]["low"] < 0.5 < found["room"]["high"]
    flags = {row["name"]: row["red_flag"] for row in flagged(rows, estimate(0.7))}
    assert flags == {"pair": True, "room": False, "row order": False}
    assert not any(row["red_flag"] for row in flagged(rows, estimate(math.nan)))
    [doubt] = confounding.flagged_doubts([{"name": "room", "red_flag": True}, {"name": "row order", "red_flag": True}])
    start = "Without a look at the input these columns predict as well as the model's interval allows: room. Judge"
    assert doubt.startswith(start), "beside a model at chance they may know no more than it does"


def test_level_rates_are_smoothed_and_new_levels_get_the_overall_rate():
    codes, target = np.array([0, 0, 1, 1, 1, 1, 2]), np.array([1.0, 1, 0, 0, 0, np.nan, 1])[:, None]
    rates = confounding.smoothed_means(codes, target, np.arange(6), np.array([0, 2, 6]))
    np.testing.assert_allclose(rates[:, 0], [(2 + 0.4) / 3, (0 + 0.4) / 4, 0.4])


def test_a_column_has_two_levels_or_more_and_up_to_three_for_four_train_rows():
    levels = {str(n): np.arange(60) % n for n in (1, 2, 30, 31)}
    levels["30 and new ones"] = np.where(np.arange(60) < 40, levels["30"], np.arange(60))
    rows = confounding.level_priors(levels, np.arange(60) % 2, [np.arange(40)], [np.arange(40, 60)])
    assert {row["name"] for row in rows} == {"2", "30", "30 and new ones", "row order"}


def test_row_order_is_a_predictor_where_the_file_is_sorted():
    label = np.sort(np.random.default_rng(0).integers(0, 2, 400))
    order = np.random.default_rng(1).permutation(400)
    row = confounding.level_priors({}, label, [order[:200]], [order[200:]])[0]
    assert row["name"] == "row order" and row["auc"] > 0.95
    # two files, each sorted by class: the row number in the own file tells it, the index over both does not
    files, train, test = np.concatenate([label, label]), np.arange(400), np.arange(400, 800)
    rows = [confounding.level_priors({}, files, [train], [test], position=given)[0]["auc"]
            for given in (np.tile(np.arange(400), 2), None)]
    assert rows[0] > 0.95 and rows[1] == 0.5


def test_priors_use_subjects():
    levels, label, order, _ = planted_levels(200)
    groups = np.random.default_rng(0).integers(0, 3, 200)
    row = confounding.level_priors(levels, label, [order[:100]], [order[100:150]], groups)[0]
    assert row["auc"] > 0.6 and math.isnan(row["low"])  # three subjects


def test_folds_without_shared_levels_leave_a_prior_at_exactly_one_half():
    """Pooled over group-disjoint folds, raw rates would rank each fold by what it does not hold: AUC far below .5."""
    levels, label, _, pair = planted_levels()
    held_out = [np.flatnonzero(pair == k) for k in range(4)]
    train = [np.flatnonzero(pair != k) for k in range(4)]
    found = confounding.level_priors({"pair": pair}, label, train, held_out)
    assert {row["name"]: row["auc"] for row in found}["pair"] == 0.5
    folds = [np.arange(600) % 3 == k for k in range(3)]
    pooled = confounding.level_priors({"pair": pair}, label, [np.flatnonzero(~f) for f in folds],
                                 [np.flatnonzero(f) for f in folds])
    pooled = {row["name"]: row["auc"] for row in pooled}["pair"]
    assert pooled == pytest.approx(judge.roc_auc_score(label, pair), abs=0.02)


def test_priors_over_folds_are_as_wide_as_the_model_beside_them():
    """The same predictions as of one model and as of two: wider by the root of 1 + 2 / 1, on the log scale of the MAE."""
    target = np.random.default_rng(0).normal(size=(200, 1))
    levels = {"moment": np.where(target[:, 0] > 0, "late", "early")}
    train, first, second = np.arange(100), np.arange(100, 150), np.arange(150, 200)
    one = confounding.level_priors(levels, target, [train], [np.arange(100, 200)])[0]
    two = confounding.level_priors(levels, target, [train, train], [first, second])[0]
    assert one["mae"] == two["mae"] < one["mae_high"]
    width = np.log(two["mae_high"] / two["mae"]) / np.log(one["mae_high"] / one["mae"])
    assert width == pytest.approx(np.sqrt(3))


def test_level_priors_of_scores():
    generator = np.random.default_rng(0)
    moment = generator.integers(0, 5, 400)
    target = np.stack([moment + generator.normal(size=400), generator.normal(size=400)], 1)
    target[::9, 0] = np.nan
    rows = confounding.level_priors({"moment": moment}, target, [np.arange(200)], [np.arange(200, 400)])
    assert rows[0]["name"] == "moment" and rows[0]["low"] < rows[0]["r2"] < rows[0]["high"]
    means = np.stack([np.nanmean(target[:200][moment[:200] == k], 0) for k in range(5)])[moment[200:]]
    unsmoothed = common.mean_metrics(means, target[200:])
    assert abs(rows[0]["r2"] - unsmoothed["r2"]) < 0.01 and abs(rows[0]["mae"] - unsmoothed["mae"]) < 0.01
    assert flagged(rows, estimate(rows[0]["r2"] - 0.01))[0]["red_flag"]


def test_a_confound_is_held_against_the_auc_of_the_class_that_it_predicts():
    """The model tells one of three classes; a column that knows another one better than it is flagged."""
    label = np.arange(300) % 3
    known = np.where(label == 0, 0.7, 0.1)
    guess = 0.2 * np.random.default_rng(0).random(300)
    result = subject_intervals.bootstrap_classification(
        np.stack([known, 1 - known - guess, guess], 1), label, baseline=np.full((300, 3), 1 / 3))
    assert result.overall.model["roc_auc"].low > 0.6 and result.each.model["roc_auc"].value[2] < 0.5
    for positive, auc, is_flagged in ((2, 0.6, True), (0, 0.9, False)):
        [row] = flagged([{"name": "pen", "auc": auc}], result.each.model["roc_auc"].at(positive))
        assert row["red_flag"] == is_flagged


def auc_within(score, label, levels):
    """AUC of class 1 within levels, for scores (N,)."""
    table = SimpleNamespace(probability=np.stack([-score, score], axis=1), positive=1, truth=label)
    return prediction_tables.ClassTable.quality_within(table, levels)


def test_within_level_auc_by_hand():
    score = np.array([0.9, 0.2, 0.4, 0.8, 0.7, 0.1])
    label = np.array([1, 0, 0, 1, 0, 0])
    levels = np.array(list("aaabbc"))
    # level a: (.9 > .2), (.9 > .4); level b: (.8 > .7); level c has no pair
    assert auc_within(score, label, levels) == 1.0
    assert auc_within(np.array([0.3, 0.2, 0.4, 0.7, 0.7, 0.1]), label, levels) == pytest.approx(1.5 / 3)
    assert math.isnan(auc_within(score, label, np.arange(6)))
    everywhere = auc_within(score, label, np.zeros(6))
    assert everywhere == judge.roc_auc_score(label, score)


def test_a_score_that_is_only_the_level_has_no_auc_within_levels():
    levels, label, order, pair = planted_levels()
    assert judge.roc_auc_score(label, pair) > 0.75 and auc_within(pair, label, pair) == 0.5


# --- calibration ---------------------------------------------------------------------------------

@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_temperature_comes_back_and_keeps_accuracy_and_auc(true_temperature):
    logits, _, label = scored_rows(rows=4000, classes=2)
    before = logits * true_temperature
    found = calibrating.fit_temperature(before, label)
    assert found == pytest.approx(true_temperature, rel=0.12)

    def overall(values):
        return class_scores.classification_metrics(class_scores.softmax(values), label).overall
    raw, mended = overall(before), overall(before / found)
    assert mended["accuracy"] == raw["accuracy"] and mended["roc_auc"] == pytest.approx(raw["roc_auc"], abs=1e-9)
    assert mended["loss"] <= raw["loss"] + 1e-12
    losses = [overall(before / (found * t))["loss"] for t in (0.98, 1.02)]
    assert mended["loss"] < min(losses)


def test_temperature_of_few_rows_equals_a_search_by_scipy():
    logits, _, label = scored_rows(rows=30, classes=3)
    found = optimize.minimize_scalar(lambda t: judge.log_loss(label, special.softmax(logits / t, 1)), bounds=(0.05, 20),
                                     method="bounded", options={"xatol": 1e-9})
    assert calibrating.fit_temperature(logits, label) == pytest.approx(found.x, rel=1e-6)


def test_temperature_stays_within_bounds_and_is_one_where_all_are_right():
    logits = np.array([[3.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    right = np.array([0, 1, 0])
    two_right = np.array([0, 1, 1])
    assert calibrating.fit_temperature(logits, right) == 1.0
    assert calibrating.fit_temperature(logits, 1 - right) == pytest.approx(20.0)
    assert calibrating.fit_temperature(logits * 0.001, two_right) == pytest.approx(0.05)
    assert np.isfinite(calibrating.fit_temperature(logits * 1e4, two_right))


@pytest.mark.parametrize("balance, focal_alpha, expected", [
    ("none", None, [1, 1]), ("weights", None, [0.625, 2.5]), ("none", 0.25, [0.75 / 0.65, 0.25 / 0.65]),
    ("weights", 0.25, [0.9375, 1.25])])
def test_class_weights_by_hand(balance, focal_alpha, expected):
    args = SimpleNamespace(balance=balance, focal_alpha=focal_alpha)
    assert calibrating.class_weights(args, np.array([0.8, 0.2]), positive=1) == pytest.approx(expected)


def test_prior_correction_undoes_a_balanced_sampler():
    """A model fitted to resampled rows is calibrated on the natural ones once its logits are corrected."""
    generator = np.random.default_rng(0)
    label = (generator.random(40000) < 0.1).astype(int)
    x = (label + generator.normal(size=40000))[:, None]
    positives, others = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    rows = np.concatenate([generator.choice(positives, 5000), generator.choice(others, 5000)])
    balanced = probabilities(fit_as_sklearn(x[rows], label[rows], 1.0, n_classes=2), x)
    shift = calibrating.prior_correction(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    corrected = class_scores.softmax(np.log(balanced) + shift)
    assert balanced[:, 1].mean() > 0.25 and corrected[:, 1].mean() == pytest.approx(label.mean(), abs=0.005)
    natural = probabilities(fit_as_sklearn(x, label, 1.0, n_classes=2), x)
    np.testing.assert_allclose(corrected, natural, atol=0.02)
    loss = [class_scores.classification_metrics(each, label).overall["loss"] for each in (corrected, natural, balanced)]
    assert loss[0] == pytest.approx(loss[1], abs=1e-3) and loss[2] > loss[0] + 0.1
    lacking = np.array([1.0, 0.0])
    assert calibrating.prior_correction(lacking, lacking).tolist() == [0, 0]


def test_threshold_equals_trying_every_one():
    probability, label = two_classes(rows=150, rate=0.15)
    probability = np.round(probability, 2)
    best = max(judge.f1_score(label, probability[:, 1] >= t) for t in np.arange(0.005, 1.01, 0.01))
    found = calibrating.fit_threshold(probability, label)
    assert judge.f1_score(label, probability[:, 1] >= found) == pytest.approx(best)


def test_threshold_edge_cases():
    both = np.array([[0.8, 0.2], [0.1, 0.9]])
    one_class = [calibrating.fit_threshold(both, np.full(2, label)) for label in (0, 1)]
    assert one_class == [0.5, 0.5]
    assert calibrating.fit_threshold(both, np.array([0, 1])) == pytest.approx(0.55)
    assert calibrating.fit_threshold(np.vstack([both, [[np.nan, np.nan]]]), np.array([0, 1, 1])) == 0.5


# --- alarms, criteria, verdict -------------------------------------------------------------------

def test_a_healthy_classifier_raises_no_alarm():
    _, probability, label = scored_rows()
    assert class_alarms(probability, label, NAMES) == []
    for least in (0.0, 2e-6):  # told apart with ease
        sure = np.where(np.eye(len(NAMES))[label] == 1, 1 - least * (len(NAMES) - 1), least)
        assert class_alarms(sure, label, NAMES) == []


def test_alarms_name_what_is_wrong():
    label = np.array([0] * 97 + [1] * 3)
    constant = np.tile([0.9, 0.1], (100, 1))
    alarms = class_alarms(constant, label, ["none", "tail"])
    assert [alarm.split(". ")[0] for alarm in alarms] == [
        "one class only: none is given to all 100 rows",
        "constant output (sd of the probability under 5 % of the labels', of all or in each fold): none, tail",
        "labels almost all equal: none in 97 of 100 rows"]
    for alarm in alarms[:2]:
        for_all, _ = alarm.split("; where a network is trained, ")
        assert "--" not in for_all, "a solved readout is told no flag that it refuses"
    probability, label = two_classes()
    probability[:6] = np.array([0.75, 0.25]) + 3e-8 * np.outer(np.arange(6) % 3 - 1, [1, -1])  # the same to seven digits
    found = class_alarms(probability, label, ["none", "tail"])
    assert len(found) == 1 and "3 times or more, in 6 of 300 rows; that of tail is 0.25 in 6 of them" in found[0]
    probability[9] = np.nan
    alarms = class_alarms(probability, label, ["a", "b"])
    assert alarms[0].startswith("not a finite number in the probabilities. ")


def test_criteria_give_pass_fail_and_not_resolvable():
    """19 tail events of 128, 7 found: recall .37 with .19-.59 cannot be told from the bar .35."""
    label = np.repeat([1, 0], [19, 109])
    score = np.concatenate([np.linspace(0.55, 0.95, 7), np.linspace(0.3, 0.45, 12), np.linspace(0.01, 0.44, 109)])
    result = subject_intervals.bootstrap_classification(np.stack([1 - score, score], 1), label, names=["ear", "tail"])
    known = verdicts.spell_class_metrics(["ear", "tail"])
    text = "tail_recall>0.35,auc>0.60,ece<0.25,recall_tail<0.1,ap_tail>0.3,nll<2"
    judged = verdicts.judge_criteria(verdicts.parse_criteria(text, known), verdicts.named_estimates(result, known))
    assert [bar["verdict"] for bar in judged] == ["NOT RESOLVABLE", "PASS", "PASS", "FAIL", "PASS", "PASS"]
    assert [round(judged[0][key], 2) for key in ("value", "low", "high")] == [0.37, 0.19, 0.59]
    with pytest.raises(common.UserError, match=r"tail_recal \(did you mean tail_recall\?\)"):
        verdicts.parse_criteria("tail_recal>0.3", known)
    two = subject_intervals.bootstrap_classification(np.stack([1 - score, score], 1), label, np.arange(128) % 2)
    assert math.isnan(verdicts.named_estimates(two, verdicts.spell_class_metrics("01"))["auc"].low)


def test_a_name_of_all_classes_means_all_and_the_other_spelling_means_the_class():
    known = verdicts.spell_class_metrics(["macro", "tail"])
    assert known["macro_f1"] == verdicts.MetricOf("macro_f1") and known["f1_macro"] == verdicts.MetricOf("f1", "macro")
    columns = verdicts.history_columns(known)
    assert columns["macro_f1", None] == "macro_f1" and columns["f1", "macro"] == "f1_macro"
    of_tail = [f"tail_{metric}" for metric in class_scores.CLASS_METRICS]
    assert list(columns.values())[:-5] == [
        *class_scores.CLASSIFICATION_METRICS, "macro_precision", "macro_recall", "f1_macro", "macro_average_precision",
        "macro_roc_auc"]
    assert list(columns.values())[-5:] == of_tail


def test_verdict_of_a_classifier_names_the_metric_and_the_direction():
    model, baseline, label, names = clustered_scores(30, 18, np.random.default_rng(0), 2.5)
    result = subject_intervals.bootstrap_classification(model, label, names, baseline, names=["ear", "tail"],
                                                        baseline_name="pair_prior")
    text = verdicts.verdict_sentence(result, "roc_auc", label="ROC AUC", seen="chose")
    assert text.startswith("The model beats the baseline (pair prior): ROC AUC 0.9")
    assert "95% t-interval over 30 subjects" in text and text.endswith("therefore optimistic.")
    assert verdicts.verdict_sentence(result, "loss").startswith("The model beats the baseline (pair prior): loss 0.")
    worse = subject_intervals.bootstrap_classification(baseline, label, names, model, baseline_name="prior")
    for metric in ("roc_auc", "brier", "macro_f1"):
        assert verdicts.verdict_sentence(worse, metric).startswith("The model does worse than"), metric
    nine = subject_intervals.bootstrap_classification(model[:162], label[:162], names[:162], baseline[:162],
                                                      baseline_name="prior")
    text = verdicts.verdict_sentence(nine, "roc_auc")

    def gain(rows):
        return np.subtract(*(judge.roc_auc_score(label[rows], each[rows, 1]) for each in (model, baseline)))
    first = np.arange(162)
    pseudo = [9 * gain(first) - 8 * gain(first[names[:162] != name]) for name in np.unique(names[:162])]
    p = subject_intervals.sign_flip_p(np.array(pseudo))
    assert text.endswith(f"sign-flip p of this difference {p:.4f}."), "a pseudo-value is no AUC of one subject"
    swapped = subject_intervals.bootstrap_classification(baseline[:162], label[:162], names[:162], model[:162],
                                                         baseline_name="prior")
    right = [((each[:162, 1] > 0.5) == label[:162]).reshape(9, 18).mean(1) for each in (baseline, model)]
    assert verdicts.verdict_sentence(swapped, "accuracy").endswith(f"in {(right[0] > right[1]).sum()} of 9 subjects.")
    nine.overall.difference["roc_auc"].low = np.nan
    assert "[no interval: too few to resolve it]" in verdicts.verdict_sentence(nine, "roc_auc")

    def key_figure(estimate, result):
        return reporting.key_figures({"ROC AUC": estimate}, result)[0]
    assert key_figure(subject_intervals.Estimate(0.9, np.nan, np.nan), nine) == (
        "ROC AUC", "0.900", "no interval: it rests on too few of the 9 subjects, or is too uncertain")
    few = subject_intervals.bootstrap_classification(model[:72], label[:72], names[:72])
    assert key_figure(few.overall.model["roc_auc"], few)[2] == "no interval under 5 subjects, here 4"
    assert key_figure(subject_intervals.Estimate(0.9, 0.8, 1.0), nine)[2] == "95 % interval 0.800 to 1.000"


def test_risk_over_coverage_ends_at_the_errors_of_the_confusion_matrix(tmp_path, monkeypatch):
    """The decision is by the threshold in both."""
    draw = np.random.default_rng(0)
    label = draw.integers(0, 2, 200)
    p = np.clip(0.2 + 0.3 * label + 0.15 * draw.normal(size=200), 0.01, 0.99)
    table = prediction_tables.ClassTable(
        keys={"id": np.arange(200)}, names=["ear", "tail"], baselines={}, positive=1, truth=label,
        probability=np.stack([1 - p, p], 1), threshold=np.full(200, 0.35))
    confusion = class_scores.confusion_matrix(label, table.chosen, 2)
    drawn = []
    monkeypatch.setattr(plotting, "plot_risk_coverage", lambda confidence, correct, path: drawn.append(correct))
    class_judging.plot_classes(SimpleNamespace(path=lambda name: tmp_path / name), table, confusion)
    assert (~drawn[0]).sum() == confusion.sum() - np.trace(confusion)
    assert (~drawn[0]).sum() != (table.probability.argmax(1) != label).sum()


# --- plots ---------------------------------------------------------------------------------------

def test_plots_are_written_and_survive_absent_classes(tmp_path):
    _, probability, label = scored_rows(rows=60)
    p, t = probability[label != 2], label[label != 2]
    confusion = class_scores.confusion_matrix(t, p.argmax(1), len(NAMES))
    plotting.plot_confusion(confusion, NAMES, tmp_path / "confusion.png")
    plotting.plot_reliability(p, t, tmp_path / "reliability.png", before=p)
    plotting.plot_risk_coverage(p.max(1), p.argmax(1) == t, tmp_path / "risk.png")
    plotting.plot_precision_recall(p, t, NAMES, tmp_path / "curves.png", range(3))
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert len(sizes) == 4 and min(sizes.values()) > 500


def test_curves_are_those_of_scikit_learn(tmp_path, monkeypatch):
    _, probability, label = scored_rows(rows=60)
    probability = probability.round(1)  # with ties
    drawn = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: drawn.append(figure))
    plotting.plot_precision_recall(probability, label, NAMES, tmp_path, [1])
    of_precision, of_rate = drawn[0].axes
    precision, recall, _ = judge.precision_recall_curve(label == 1, probability[:, 1])
    false_rate, true_rate, _ = judge.roc_curve(label == 1, probability[:, 1], drop_intermediate=False)
    assert np.allclose(of_precision.lines[0].get_data(), [recall[::-1], [precision[-2], *precision[-2::-1]]])
    assert np.allclose(of_rate.lines[0].get_data(), [false_rate, true_rate])


def test_the_reliability_title_tells_the_ece_of_a_calibrated_model(tmp_path, monkeypatch):
    probability, label = two_classes(rows=128)
    said = []
    monkeypatch.setattr(plotting, "set_title", lambda axis, title, note="": said.append(title))
    plotting.plot_reliability(probability, label, tmp_path / "reliability.png")
    ece = class_scores.classification_metrics(probability, label).overall["ece"]
    null = calibrating.simulated_ece(probability.max(1)).mean()
    assert said[0].startswith(f"ECE {ece:.3f}, n 128\nof a calibrated model {null:.3f} (95 % under ")


def test_within_level_r2_is_that_of_the_distances_from_the_level_means():
    draws = np.random.default_rng(0)
    levels = draws.integers(0, 4, 60)
    target = draws.normal(size=(60, 2)) + 5 * levels[:, None]
    predicted = target + draws.normal(0, 0.5, (60, 2))
    target[::7, 0] = np.nan
    expected = []
    for r in range(2):
        known = ~np.isnan(target[:, r])
        by_level = np.eye(4)[levels[known]]
        explained = [values - LinearRegression(fit_intercept=False).fit(by_level, values).predict(by_level)
                     for values in (target[known, r], predicted[known, r])]
        expected.append(judge.r2_score(*explained))
    table = prediction_tables.ScoreTable(keys={}, names=[], baselines={}, truth=target, predicted=predicted)
    assert table.quality_within(levels) == pytest.approx(np.mean(expected))
    table.predicted = np.tile(5.0 * levels[:, None], 2)
    assert table.quality_within(levels) == pytest.approx(0)
