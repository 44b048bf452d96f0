"""What a report says of predicted poses, from the records of pose_scores.

Units: errors of an axis in mm or degrees; means over the axes in label sds.
"""
import numpy as np

from evidence import reporting
from readers import probe_poses


def metric_blocks(run, metrics):
    """Alarms, then errors of the axes, baselines, predictors and patients; criteria and folds where there are any."""
    kinds = [row["baseline"] for row in metrics["baselines"]]
    columns = {"target": "axis", "n": "n", "mae": "MAE", "mae_low": "low", "mae_high": "high", "r2": "R2",
               **{f"mae_{kind}": kind.replace("_", " ") for kind in kinds}}
    of_patient = {"patient": "patient", "transitions": "n", **{f"mae_{axis}": axis for axis in probe_poses.AXES},
                  "geodesic_deg": "geodesic"}
    of_predictor = ["predictor", "mae_mm", "mae_deg", "distance_mm", "geodesic_deg"]
    two_digits = {name: ".2f" for name in (*columns, *of_patient, *of_predictor) if name not in ("n", "transitions")}
    three_digits = dict.fromkeys(("error", "difference", "low", "high"), ".3f")
    blocks = [reporting.html_text(f"ALARM: {alarm}", "poor") for alarm in metrics["alarms"]]
    blocks += [
        reporting.html_table(metrics["per_axis"], columns, two_digits,
                             f"MAE of each axis on the {metrics['part']} rows in mm or degrees, beside the baselines'; "
                             f"{metrics['method']}"),
        reporting.html_table(metrics["baselines"], None, three_digits,
                             "Mean over the axes of MAE in label sds: each baseline, and model - baseline"),
        reporting.html_table(metrics["predictors"], of_predictor, two_digits, "In mm and degrees"),
        reporting.html_image(run.path("per_patient_error.png"), "MAE per axis and patient, and the baseline's"),
        reporting.html_table(metrics["per_patient"], of_patient, two_digits),
        reporting.html_image(run.path("predicted_against_true.png"), "Predicted against true, at t1")]
    if metrics["criteria"]:
        blocks.append(reporting.html_table(metrics["criteria"], caption="Criteria"))
    if metrics["folds"]:
        blocks.append(reporting.html_table(fold_rows(metrics["folds"]), caption="Folds"))
    return blocks


def key_figures(result, predictors):
    """[(label, value, remark)] for the top of the report."""
    name = result.baseline_name
    model, other = (next(row for row in predictors if row["predictor"] == kind) for kind in ("model", name))
    shown = name.replace("_", " ")
    return [reporting.key_figure("Error in label sds", result.overall.model["mae"], result.method),
            reporting.key_figure(f"The same of {shown}", result.overall.baseline["mae"], result.method),
            ("MAE, translations", f"{model['mae_mm']:.2f} mm", f"{shown}: {other['mae_mm']:.2f} mm"),
            ("MAE, angles", f"{model['mae_deg']:.2f} deg", f"{shown}: {other['mae_deg']:.2f} deg")]


def fold_rows(folds):
    """Fold table: one dict per fold, then mean and SD over the folds."""
    rows = [{"fold": fold["fold"], "patients": ", ".join(fold["patients"]), "rows": fold["rows"],
             "best_epoch": fold["best_epoch"], "baseline": fold["baseline_name"],
             "error": fold["model"]["mae"]["value"], "baseline_error": fold["baseline"]["mae"]["value"],
             "r2": fold["model"]["r2"]["value"], **fold["use"]} for fold in folds]
    mean, sd = {"fold": "mean"}, {"fold": "SD"}
    for name in ("error", "baseline_error", "r2", *folds[0]["use"]):
        values = np.array([row[name] for row in rows], float)
        mean[name] = values.mean()
        sd[name] = values.std(ddof=1) if len(values) > 1 else np.nan
    return [*rows, mean, sd]


def say_axes(run, per_axis, baseline_names):
    """The MAE of model and baselines on the terminal, one line an axis."""
    run.say("MAE       " + " ".join(f"{name:>12}" for name in ["model", *baseline_names]))
    for row in per_axis:
        errors = [row["mae"], *(row[f"mae_{name}"] for name in baseline_names)]
        run.say(f"{row['target']:10}" + " ".join(f"{error:12.2f}" for error in errors))
