"""How well a probe's motions are predicted: errors of each axis, predictor and patient.

Letters: M transitions scored. Units: a pose is (x, y, z, roll, pitch, yaw), mm and degrees, NaN = missing. predicted:
{"predicted" (the model) and each baseline: (M, 6)}; target: (M, 6).
"""
import dataclasses
import math

import numpy as np
import torch

import common
from evidence import subject_intervals, verdicts
from readers import probe_poses


@dataclasses.dataclass
class Judged:
    """The model beside its baselines on the same rows."""
    results: dict  # baseline -> Result, errors in label sds
    result: subject_intervals.Result  # beside the best baseline; each axis in mm and degrees
    per_axis: list  # of axis_rows
    per_patient: list  # of patient_rows


def judge(predicted, target, patients, blocks, sd):
    """Judged; patients: (M,) names; blocks: of time_blocks; sd: (6,) of the labels."""
    results = compare(predicted, target, patients, blocks, sd)
    best = min(results.values(), key=lambda result: result.overall.baseline["mae"].value)
    result = in_units(best, sd)
    baseline = predicted[result.baseline_name]
    return Judged(
        results=results,
        result=result,
        per_axis=axis_rows(result, predicted, target),
        per_patient=patient_rows(patients, predicted["predicted"], baseline, target))


def pose_errors(predicted, target):
    """predicted - target (M, 6), angles wrapped at 180 degrees."""
    return probe_poses.on_arrays(probe_poses.pose_error, predicted, target)


def wrapped(predicted, target):
    """Predictions (M, 6) turned by whole turns to within 180 degrees of their targets, so that errors subtract."""
    return np.where(np.isnan(target), predicted, target + pose_errors(predicted, target))


def time_blocks(sequences, order, length=8, most=10):
    """(M,) names of blocks of neighbouring rows, up to `most` in a sequence, of `length` rows or more."""
    blocks = np.empty(len(sequences), dtype=object)
    for sequence in np.unique(sequences):
        own = np.flatnonzero(sequences == sequence)
        own = own[np.argsort(order[own])]
        n_blocks = min(most, max(1, len(own) // length))
        for number, part in enumerate(np.array_split(own, n_blocks)):
            blocks[part] = f"{sequence} {number}"
    return blocks.astype(str)


def predictor_rows(predicted, target, meanings):
    """One dict per predictor: mean MAE over the translations and over the angles, distance in mm, geodesic angle."""
    rows = []
    for kind, values in predicted.items():
        error = pose_errors(values, target)
        numbers = {"mae_mm": np.abs(error[:, :3]).ravel(), "mae_deg": np.abs(error[:, 3:]).ravel(),
                   "distance_mm": np.linalg.norm(error[:, :3], axis=1),
                   "geodesic_deg": probe_poses.on_arrays(probe_poses.geodesic_degrees, values,
                                                         target)}
        means = {name: common.mean_without_nan(each) for name, each in numbers.items()}
        rows.append({"predictor": "model" if kind == "predicted" else kind, **means,
                     "meaning": meanings.get(kind, "")})
    return rows


def patient_rows(patients, predicted, baseline, target):
    """One dict per patient: rows, MAE per axis of the model and of the baseline, geodesic angle.

    patients: (M,) names; predicted, baseline: (M, 6).
    """
    errors = {"mae_": np.abs(pose_errors(predicted, target)),
              "baseline_mae_": np.abs(pose_errors(baseline, target))}
    angle = probe_poses.on_arrays(probe_poses.geodesic_degrees, predicted, target)  # (M,)
    rows = []
    for patient in np.unique(patients):
        own = patients == patient
        row = {"patient": patient, "transitions": int(own.sum())}
        for prefix, error in errors.items():
            mae = common.mean_without_nan(error[own], axis=0)
            row |= {prefix + axis: value for axis, value in zip(probe_poses.AXES, mae)}
        rows.append({**row, "geodesic_deg": common.mean_without_nan(angle[own])})
    return rows


def compare(predicted, target, patients, blocks, sd):
    """bootstrap_regression of the model against each baseline, in units of sd (6,): {baseline: Result}.

    Resampled are patients, (M,) names; with fewer than five, blocks of time, which say nothing about other patients.
    """
    units, unit = patients, "patients"
    if len(set(patients)) < subject_intervals.FEWEST_FOR_INTERVAL:
        units, unit = blocks, "time blocks"
    scaled = {kind: wrapped(values, target) / sd for kind, values in predicted.items()}
    model = scaled.pop("predicted")
    return {kind: subject_intervals.bootstrap_regression(
        model, target / sd, units, baseline, unit=unit, names=probe_poses.AXES, baseline_name=kind)
            for kind, baseline in scaled.items()}


def in_units(result, sd):
    """The Result with the axes' errors, which are in units of sd (6,), in mm and degrees; means stay in sd."""
    factors = {"mae": sd, "rmse": sd, "mse": sd ** 2}
    sides = {}
    for side, estimates in vars(result.each).items():
        errors = {metric: estimates[metric].times(factor) for metric, factor in factors.items()}
        sides[side] = {**estimates, **errors}
    return dataclasses.replace(result, each=subject_intervals.Comparison(**sides))


def axis_rows(result, predicted, target):
    """One dict per axis: n, metrics with intervals, and the MAE of every baseline; result: of in_units."""
    rows = subject_intervals.target_rows(result)
    for kind, values in predicted.items():
        if kind == "predicted":
            continue
        mae = common.mean_without_nan(np.abs(pose_errors(values, target)), axis=0)
        for row, value in zip(rows, mae):
            row[f"mae_{kind}"] = value
    return rows


def baseline_rows(results, meanings):
    """One dict per baseline: error in label sds, and the model's difference from it with its interval."""
    rows = []
    for kind, result in results.items():
        difference = result.overall.difference["mae"]
        rows.append({"baseline": kind, "error": result.overall.baseline["mae"].value,
                     "difference": difference.value,
                     "low": difference.low, "high": difference.high,
                     "sign_flip_p": result.sign_flip_p["mae"],
                     "meaning": meanings[kind]})
    return rows


def _place_alarms(results):
    """Does the place in the sequence predict as well as the model? Sentences."""
    if "frame_index" not in results:
        return []
    model = results["frame_index"].overall.model["mae"]
    place = results["frame_index"].overall.baseline["mae"].value
    if place > model.value and not model.low <= place <= model.high:
        return []
    return [f"the place in the sequence alone predicts as well as the model ({place:.3f} against {model.value:.3f}): it "
            "may know when, not where"]


def verdict(result, per_patient, has_patients, held_out):
    """One honest sentence: does the model beat its best baseline, over what, and what it proves nothing about.

    per_patient: rows of patient_rows; has_patients False: each folder counted as a patient.
    """
    text = verdicts.verdict_sentence(result, "mae", held_out=held_out,
                                     label="mean error in label sds")
    if result.unit == "patients":
        return text
    n = len(per_patient)
    if n == 1:
        return f"One patient proves nothing across patients. Within it, over blocks of time: {text}"
    shares = [np.mean([row[f"mae_{axis}"] / row[f"baseline_mae_{axis}"]
                       for axis in probe_poses.AXES])
              for row in per_patient]
    who = f"{n} patients are" if has_patients else f"{n} folders, whose patients are not known, are"
    return (f"{who} too few for an interval across patients (better in {np.sum(np.array(shares) < 1)} of {n}). "
            f"Within them, over blocks of time: {text}")


def find_alarms(predicted, target, results, use, spread_floor):
    """Sentences on what must be known before any number; use: of the inputs, spread_floor: healthy feature_spread."""
    alarms = verdicts.regression_alarms(wrapped(predicted, target), target, probe_poses.AXES)
    alarms += _place_alarms(results)
    if abs(use["action_shuffle_ratio"] - 1) < 0.02:
        alarms.append(f"the known motion is ignored: action-shuffle ratio {use['action_shuffle_ratio']:.3f}")
    if use["latent_skill"] > 1:
        alarms.append(f"the imagined frame is worse than a copy of t1: latent skill {use['latent_skill']:.2f}")
    if use["feature_spread"] < spread_floor / 2:
        alarms.append(f"the features hardly differ between frames (spread {use['feature_spread']:.4f}): collapsed")
    return alarms


def retrieval_rank(guess, truth, patients):
    """Mean share of a patient's other true frames that lie nearer to the guess than its own: tensors (M, .), (M, .), names (M,).

    0 = the own one is always nearest, .5 = chance; ties count half. NaN where no patient has two rows.
    """
    ranks = []
    for patient in np.unique(patients):
        rows = np.flatnonzero(patients == patient)
        if len(rows) < 2:
            continue
        apart = torch.cdist(guess[rows].float(), truth[rows].float())  # (m, m)
        own = apart.diagonal()[:, None]
        nearer = (apart < own).sum(1) + 0.5 * ((apart == own).sum(1) - 1)
        ranks += (nearer / (len(rows) - 1)).tolist()
    return float(np.mean(ranks)) if ranks else math.nan
