"""Judge predicted poses: intervals, baselines, patients, use of the inputs and verdict of a ScoreTable of poses.

Letters: M transitions scored. Units: errors of an axis in mm or degrees; means over
the axes in label sds.
"""
import numpy as np

import common
from evidence import judging, plotting, pose_scores, reporting, subject_intervals, verdicts
from readers import probe_poses

USE_MEANINGS = {
    "action_shuffle_ratio": "loss with false motions over loss (1 = the motion is ignored)",
    "latent_skill": "error of the imagined features over that of a copy of t1 (under 1 is better)",
    "retrieval_rank": "share of the patient's frames nearer to the imagined one than the true (chance .5)",
    "feature_spread": "how much the features differ between frames (0 = collapsed)",
    "outside_training_range": "share of the scored poses outside the range of the training poses",
}
WITHIN_PATIENTS = ("Fewer than five patients were scored. Intervals, if any, are over blocks of time ten times as long "
                   "as the errors are correlated: they say how steady the result is within these "
                   "patients, and nothing about others.")


def judge_poses(run, table, setting, *, blocks, label_sd, unit, doubts, compose, use):
    """Judge a table of pose_scores, write tables, plots, report.html and metrics.json; returns the metrics.

    blocks: (M,) of pose_scores.time_blocks; label_sd: (6,); unit: patients, or folders
    where each counts as one; doubts: sentences on the split; compose: the name of a
    Convention; use: numbers of USE_MEANINGS.
    """
    results = pose_scores.compare(table, blocks, label_sd, unit)
    best = min(results.values(), key=lambda result: result.overall.baseline["mae"].value)
    result = pose_scores.in_units(best, label_sd)
    axes = pose_scores.axis_rows(result, table)
    patients = pose_scores.patient_rows(table, result.baseline_name, label_sd)
    predictors = pose_scores.predictor_rows(table)
    baselines = pose_scores.baseline_rows(results)
    common.write_table(run.path("per_axis_error.csv"), axes)
    common.write_table(run.path("per_patient_error.csv"), patients)
    plotting.plot_per_target(
        [{**row, "target": row["patient"]} for row in patients],
        run.path("per_patient_error.png"),
        [f"mae_{axis}" for axis in probe_poses.AXES])
    plotting.plot_scatter(table, run.path("predicted_against_true.png"))

    alarms = axis_alarms(table) + pose_scores.place_alarms(results)
    if result.unit == subject_intervals.TIME_BLOCKS:
        doubts = [*doubts, WITHIN_PATIENTS]
    return judging.close_run(
        run, setting,
        verdict=pose_scores.verdict(result, patients, unit, setting.worst_seen),
        result=result,
        metric="mae",
        doubts=verdicts.baseline_doubts(results) + doubts,
        alarms=alarms,
        meanings=criteria_names(),
        figures=key_figures(result, predictors),
        blocks=metric_blocks(run, setting, result, axes, baselines, predictors, patients),
        sections=[("Does it use the image and the motion?", use_blocks(use))],
        numbers={
            "sample": table.sample,
            "label_sd": label_sd,
            "baselines": baselines,
            "predictors": predictors,
            "use": use,
            "per_axis": axes,
            "per_patient": patients,
            "compose": compose,
        })


def axis_alarms(table):
    """verdicts.regression_alarms of the axes along which the probe moves; of all where it moves along none."""
    is_fixed = common.sd_without_nan(table.truth) <= 1e-6
    judged = np.flatnonzero(is_fixed.all() | ~is_fixed)
    names = [table.names[axis] for axis in judged]
    return verdicts.regression_alarms(
        table.predicted[:, judged], table.truth[:, judged], names, table.keys.get("fold"))


def criteria_names():
    """What --criteria may name: mae_x_mm an axis, mae the mean over axes in label sds."""
    metrics = common.REGRESSION_METRICS
    return verdicts.spell_metrics(metrics, metrics, probe_poses.AXES)


def key_figures(result, predictors):
    """[(label, value, remark)] for the top of the report."""
    of_name = {row["predictor"]: row for row in predictors}
    model = of_name["model"]
    baseline = of_name[result.baseline_name]
    shown = result.baseline_label
    errors = {
        "Error in label sds": result.overall.model["mae"],
        f"The same of {shown}": result.overall.baseline["mae"],
    }
    return [
        *reporting.key_figures(errors, result),
        ("MAE, translations", f"{model['mae_mm']:.3g} mm", f"{shown}: {baseline['mae_mm']:.3g} mm"),
        ("MAE, angles", f"{model['mae_deg']:.3g} deg", f"{shown}: {baseline['mae_deg']:.3g} deg"),
    ]


def metric_blocks(run, setting, result, axes, baselines, predictors, patients):
    """HTML of the section Metrics: errors of the axes, baselines, predictors and patients."""
    columns = {"target": "axis", "n": "n", "mae": "MAE", "mae_low": "low", "mae_high": "high", "r2": "R2"}
    columns |= {f"mae_{row['baseline']}": row["baseline"] for row in baselines}
    of_patient = {"patient": "patient", "transitions": "n", "geodesic_deg": "geodesic deg"}
    of_patient |= {f"mae_{axis}": axis for axis in probe_poses.AXES}
    return [
        reporting.html_table(
            axes, columns, ".2f",
            f"MAE of each axis on {setting.rows_judged} in mm or degrees, beside the baselines'; {result.method}. R2: "
            "share of the variance explained, 0 = as good as the mean, below 0 = worse"),
        reporting.html_table(
            baselines, digits=".3g",
            caption="Mean over the axes of MAE in label sds: each baseline, and model - baseline"),
        reporting.html_table(predictors, digits=".2f", caption="In mm and degrees"),
        reporting.html_image(run.path("per_patient_error.png"), "MAE per axis and patient, and the "
                             f"baseline's{plotting.note_if_cut(len(patients), 'patients')}"),
        reporting.html_table(patients, of_patient, ".2f"),
        reporting.html_image(run.path("predicted_against_true.png"), "Predicted against true, at t1"),
    ]


def use_blocks(use):
    """HTML of the section on the use of the inputs."""
    rows = [{"measure": name, "value": value, "meaning": USE_MEANINGS[name]} for name, value in use.items()]
    blocks = [reporting.html_table(rows)]
    if "latent_skill" not in use:
        blocks.append(reporting.html_text("at1 is read off the frame at t1 alone, and nothing is "
                                          "imagined; the known motion leads from at1 to at2."))
    return blocks
