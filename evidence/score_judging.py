"""Judge predicted scores: intervals, baseline, ceiling, confounds and verdict of a ScoreTable.

Letters: M rows, R scores.
"""
import dataclasses

import numpy as np

import common
from evidence import (
    confounding, judging, metric_names, plotting, rater_agreement, reporting, subject_intervals, verdicts)


def judge_scores(run, table, setting, ceiling=None, confounds=(), places=None, moments=(), table_file="scores.csv",
                 plot_file="scores.png"):
    """Judge a prediction_tables.ScoreTable, write tables, plots, report.html and metrics.json; returns the metrics.

    ceiling: rater_agreement.Ceiling, or None; confounds, places: of confounding.flag_confounds;
    moments: (M,) levels whose rows are also judged apart, () for none; table_file, plot_file: names
    of the table and of the plot of the scores.
    """
    result = table.compare()
    rows = score_rows(result, table, ceiling)
    moment_rows = rows_of_moments(table, moments)
    confounds = confounding.flag_confounds(confounds, result.overall.model["r2"], table, places)
    common.write_table(run.path(table_file), rows)
    plotting.plot_per_target(rows, run.path(plot_file))
    plotting.plot_scatter(table, run.path("predicted_against_true.png"))

    best_r2 = ceiling.mean_r2 if ceiling else None
    is_same = is_baseline(table, result.baseline_name)

    def describe(result):
        return verdicts.verdict_sentence(result, "r2", setting.worst_seen, "mean R2", best_r2, is_same)
    setting, doubts = judging.judge_without_similar(
        run, setting, result, lambda kept: table.take(kept).compare(), describe, "r2")
    doubts += verdicts.baseline_doubts(table.baselines) + confounding.flagged_doubts(confounds)
    if is_same:
        doubts.append("A model that predicts what its baseline predicts adds nothing to it")
    alarms = verdicts.regression_alarms(table.predicted, table.truth, table.names, table.keys.get("fold"))
    return judging.close_run(
        run, setting,
        verdict=describe(result),
        result=result,
        metric="r2",
        doubts=doubts,
        alarms=alarms + slope_alarms(rows),
        meanings=criteria_names(table.names, moments),
        further_estimates=estimates_of_moments(table, moments) if run.args.criteria else {},
        figures=key_figures(result, table.truth, best_r2),
        blocks=[*metric_blocks(run, setting, result, rows, moment_rows, plot_file),
                *judging.subject_blocks(table, result)],
        sections=[
            ("Noise ceiling", rater_agreement.ceiling_blocks(ceiling)),
            ("Without a pixel", confounding.confound_blocks(confounds)),
        ],
        numbers={
            "sample": table.sample,
            "ceiling": dataclasses.asdict(ceiling) if ceiling else None,
            "per_moment": moment_rows,
            "confounds": confounds,
        })


def is_baseline(table, name):
    """True where the predictions are those of a baseline, as of a ridge head on a frozen backbone."""
    difference = np.abs(table.predicted - table.baselines[name])
    tolerance = 1e-3 * common.sd_without_nan(table.truth)  # (R,), NaN for a score that no row has
    return ((difference <= tolerance) | np.isnan(tolerance)).all()


def score_rows(result, table, ceiling):
    """One dict a score: metrics with intervals, baseline, bias and slope, and the share of the ceiling reached."""
    scores = subject_intervals.target_table(result)
    scores["bias"] = common.mean_without_nan(table.predicted - table.truth, axis=0)
    judged = np.where(table.is_known, table.predicted, np.nan)
    # of target on prediction, 1 = no correction needed; a constant prediction has r 0 and no slope
    r = scores["pearson_r"].replace(0, np.nan)
    scores["slope"] = r * common.sd_without_nan(table.truth) / common.sd_without_nan(judged)
    if ceiling and ceiling.r2 is not None:
        scores = scores.assign(**ceiling.columns(), share_of_ceiling_r2=scores["r2"] / ceiling.r2)
    return scores.to_dict("records")


def slope_alarms(rows):
    """A sentence on scores whose order is right and whose values are not: R2 below 0, the whole interval of r above."""
    found = [f"{row['target']} (r {row['pearson_r']:.2f} but R2 {row['r2']:.2f}, bias {row['bias']:+.3g}, "
             f"slope {row['slope']:.2f})" for row in rows if row["r2"] < 0 < row["pearson_r_low"]]
    if not found:
        return []
    return [f"the order holds, the values do not: {common.shorten_list(found, 5)}. Trust the order alone; "
            "more rows, and --select r2 where the script has it"]


def rows_of_scores(table, moments):
    """Dicts of moment, target, n and the model's metrics: of all rows, and of those of each moment."""
    return rows_of_moments(table, np.full(len(table.truth), "all")) + rows_of_moments(table, moments)


def rows_of_moments(table, moments):
    """Dicts of moment, target, n and the model's metrics for each level of (M,) moments, if any, and score."""
    import pandas as pd
    rows = []
    for level in sorted(set(moments)):
        here = moments == level
        metrics = common.regression_metrics(table.predicted[here], table.truth[here])
        rows += pd.DataFrame({"moment": level, "target": table.names, **metrics}).to_dict("records")
    return rows


def criteria_names(names, moments=()):
    """What --criteria may name: a metric, METRIC_SCORE of one score, METRIC_LEVEL of the rows of one moment."""
    metrics = common.REGRESSION_METRICS
    return verdicts.spell_metrics(metrics, metrics, [*moments, *names])


def estimates_of_moments(table, moments):
    """{METRIC_LEVEL: Estimate} on the rows of each level of (M,) moments."""
    estimates = {}
    for level in set(moments):
        of_level = table.take(moments == level).compare()
        estimates |= {f"{metric}_{level}": each for metric, each in of_level.overall.model.items()}
    return estimates


def key_figures(result, target, best_r2):
    """[(label, value, remark)] for the top of the report; target: (M, R)."""
    model = result.overall.model
    estimates = {
        "Mean R2": model["r2"],
        "Mean r": model["pearson_r"],
        f"R2 of {result.baseline_label}": result.overall.baseline["r2"],
    }
    figures = reporting.key_figures(estimates, result)
    sd = common.sd_without_nan(target)
    error = common.mean_without_nan(result.each.model["mae"].value / np.where(sd > 0, sd, np.nan))
    figures.append(("Mean absolute error", f"{metric_names.number_text(error)} sd",
                    "in sds of the labels, as scores differ in scale"))
    if best_r2 is not None:
        figures.append(("R2 ceiling", metric_names.number_text(best_r2), "what the raters of all scores allow"))
    return figures


def metric_blocks(run, setting, result, rows, moment_rows, plot_file):
    """HTML of the section Metrics: the tables and plots of the scores."""
    columns = {"moment": "moment", "target": "score", "n": "n", "pearson_r": "r", "r2": "R2", "r2_low": "R2 low",
               "r2_high": "R2 high", "mae": "MAE", "rmse": "RMSE", "bias": "bias", "slope": "slope",
               "baseline_r2": "baseline R2", "baseline_mae": "baseline MAE", "icc_1_1": "ICC(1,1)",
               "icc_1_k": "ICC(1,k)", "ceiling_r2": "ceiling R2", "share_of_ceiling_r2": "share"}
    caption = (f"Each score on {setting.rows_judged}, in its unit; baseline: {result.baseline_label}; "
               f"{result.method}. R2: share of the variance explained, 0 = as good as the mean, "
               "below 0 = worse; r: correlation")
    shown = plotting.note_if_cut(len(rows), "scores")
    return [
        reporting.html_image(run.path(plot_file), "r and R2 of each score, with baseline, and "
                             f"interval and noise ceiling where they are known{shown}"),
        reporting.html_image(run.path("predicted_against_true.png"), f"Predicted against true{shown}"),
        reporting.html_table(rows, columns, caption=caption),
        reporting.html_table(moment_rows, columns, caption="The rows of each moment alone"),
    ]
