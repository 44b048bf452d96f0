"""Judge predicted classes: intervals, baseline, calibration, confounds and verdict of a ClassTable.

Letters: M rows, C classes.
"""
import math

import numpy as np

from evidence import (
    calibrating, class_scores, confounding, judging, metric_names, plotting, reporting, subject_intervals, verdicts)


def judge_classes(run, table, setting, confounds=(), places=None):
    """Judge a prediction_tables.ClassTable; write plots, report.html and metrics.json.

    confounds, places: of confounding.flag_confounds.
    Returns the metrics.
    """
    result = table.compare()
    calibrating.take_null(result.overall, table.probability.max(1))
    confounds = confounding.flag_confounds(
        confounds, result.each.model["roc_auc"].at(table.positive), table, places)
    plot_classes(run, table, result.confusion)

    name = table.names[table.positive]

    def describe(result):
        return verdicts.verdict_sentence(result, "roc_auc", setting.worst_seen, auc_label(result.names, name))
    setting, doubts = judging.judge_without_similar(
        run, setting, result, lambda kept: table.take(kept).compare(), describe, "roc_auc")
    stages = calibration_rows(table)
    return judging.close_run(
        run, setting,
        verdict=describe(result),
        result=result,
        metric="roc_auc",
        doubts=[*doubts, *verdicts.baseline_doubts(table.baselines), *confounding.flagged_doubts(confounds)],
        alarms=verdicts.classification_alarms(table) + fold_alarms(table),
        meanings=criteria_names(table.names),
        figures=key_figures(result, table.positive),
        blocks=metric_blocks(run, setting, result) + judging.subject_blocks(table, result),
        sections=[
            ("Without a pixel", confounding.confound_blocks(confounds)),
            ("Calibration", calibration_blocks(run, stages, name)),
        ],
        numbers={
            "positive_class": name,
            "names": table.names,
            "confusion": result.confusion,
            "n": result.n,
            "sample": table.sample,
            "null_ece": stages[-1]["ece_of_a_calibrated_model"],
            "calibration": stages,
            "confounds": confounds,
        })


def fold_alarms(table):
    """A sentence where three folds or more all have one confusion matrix, and one no better than chance; else []."""
    folds = np.asarray(table.keys.get("fold", ()))
    answers = table.truth * len(table.names) + table.chosen  # true x predicted
    matrices = [tuple(np.sort(answers[folds == fold])) for fold in set(folds)]
    if len(matrices) < 3 or len(set(matrices)) > 1:
        return []
    if table.main_metrics()["balanced_accuracy"] > 1 / len(set(table.truth)):
        return []
    return ["identical confusion matrices in all folds: do the models tell the rows apart at all? "
            "Compare the folds' splits.json, and train longer (--epochs)"]


def criteria_names(names):
    """What --criteria may name; an ECE is judged by what is above its null."""
    return verdicts.spell_class_metrics(names) | {
        name: verdicts.MetricOf(f"{name}_above_null") for name in class_scores.ECE_METRICS}


def plot_classes(run, table, confusion):
    """The plots that the report shows, as files of the run folder."""
    probability = table.probability
    chosen = table.chosen
    confidence = probability[np.arange(len(chosen)), chosen]
    shown = [table.positive] if len(table.names) == 2 else range(len(table.names))
    plotting.plot_confusion(confusion, table.names, run.path("confusion.png"))
    plotting.plot_precision_recall(
        probability, table.truth, table.names, run.path("precision_recall.png"), shown)
    plotting.plot_risk_coverage(confidence, chosen == table.truth, run.path("risk_coverage.png"))
    plotting.plot_reliability(
        probability, table.truth, run.path("reliability.png"), table.uncalibrated)


def calibration_rows(table):
    """A dict of NLL, Brier, ECE and what the decision reaches, before and after calibration.

    Only one dict where no probabilities before calibration are known.
    """
    given = (table.probability, table.threshold)
    stages = {"as it is": given}
    if table.uncalibrated is not None:
        stages = {"before": (table.uncalibrated, None), "after": given}
    rows = []
    for stage, (probability, threshold) in stages.items():
        found = table.scores_of(probability, threshold)
        rows.append({
            "stage": stage,
            **calibrating.calibration_numbers(probability, found.overall),
            "accuracy": found.overall["accuracy"],
            **{name: found.per_class[name][table.positive] for name in ("precision", "recall", "f1")},
        })
    return rows


def calibration_blocks(run, stages, positive):
    """HTML of the section Calibration; positive: the class that precision and recall are of."""
    note = "Temperature and threshold were fitted on other rows (validation, or the other folds)."
    if len(stages) == 1:
        note = ("Only one set of probabilities is known, so there is no comparison. In a run, "
                "temperature and threshold are fitted on the validation rows, and shown for test "
                "rows and folds; the members of an ensemble are calibrated before their mean is "
                "taken.")
    return [
        reporting.html_text(note),
        reporting.html_table(stages, caption=f"Precision, recall and F1 of {positive}"),
        reporting.html_image(
            run.path("reliability.png"), "Reliability: how often a confidence is right"),
    ]


def auc_label(names, positive):
    """What the overall AUC is of: the positive one of two classes, else the mean of all."""
    return f"AUC of {positive}" if len(names) == 2 else "mean AUC"


def key_figures(result, positive):
    """[(label, value, remark)] for the top of the report; positive: index of that class."""
    name = result.names[positive]
    estimates = {
        auc_label(result.names, name): result.overall.model["roc_auc"],
        f"Average precision of {name}": result.each.model["average_precision"].at(positive),
        f"Recall of {name}": result.each.model["recall"].at(positive),
        f"AUC of the {result.baseline_label}": result.overall.baseline["roc_auc"],
    }
    return reporting.key_figures(estimates, result)


def metric_blocks(run, setting, result):
    """HTML of the section Metrics: the tables and plots of the classes."""
    per_class = [{
        "class": name,
        "n": result.n[c],
        **{metric_names.METRICS[metric].label: with_interval(found.at(c))
           for metric, found in result.each.model.items()},
    } for c, name in enumerate(result.names)]
    method = result.method + result.exceptions
    plots = {
        "confusion.png": "Confusion matrix: rows true, columns predicted",
        "precision_recall.png": "Precision-recall and ROC curves",
        "risk_coverage.png": "Wrong answers among the most confident ones",
    }
    return [
        *(reporting.html_image(run.path(file), text) for file, text in plots.items()),
        reporting.html_table(
            subject_intervals.overall_rows(result),
            caption=f"On {setting.rows_judged}; baseline: {result.baseline_label}; {method}"),
        reporting.html_table(
            per_class,
            caption=f"Each class against the rest; {method}. AUC: how often a row of the class is ranked above one of "
                    "another, .5 = by chance; average precision: mean over all recalls"),
    ]


def with_interval(found):
    """'0.812 [0.70, 0.89]', or the value alone."""
    ends = "" if math.isnan(found.low + found.value) else f" [{found.low:.2f}, {found.high:.2f}]"
    return metric_names.number_text(found.value) + ends
