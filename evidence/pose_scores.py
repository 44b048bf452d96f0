"""How well a probe's motions are predicted: errors of each axis, predictor and patient.

Letters: M transitions scored. Units: a pose is (x, y, z, roll, pitch, yaw), mm and degrees, NaN =
missing. A table is a prediction_tables.ScoreTable of poses, patients as its groups, angles
`wrapped`, so that errors subtract.
"""
import dataclasses

import numpy as np
import torch

import common
from evidence import subject_intervals, verdicts
from readers import probe_poses

BASELINES = {
    "zero": "no motion",
    "train_mean": "mean of the train rows",
    "train_median": "median of the train rows, of all constants the one with the smallest error there",
    "copy": "the known motion taken for the answer",
    "motion_ridge": "ridge on the known motion alone",
    "frame_index": "mean of the train rows at the same place in a sequence",
    "interpolated": "the poses before and after in the same sequence, without a pixel",
    "nearest_in_time": "the nearest pose in time in the same sequence, without a pixel",
    "patient_mean": "mean of the patient's train rows",
    "grid_readout": "linear readout, solved on two grids of three resolutions of the untuned encoder",
}
LARGE_OUTSIDE = 0.1  # share of the rows
COLLAPSED = 0.025  # spread of the features over frames, as a share of their rms, that is too small
SMALL_MOTION = 0.1  # in label sds: a model may as well ignore it


def wrapped(predicted, target):
    """Predictions (M, 6) turned by whole turns to within 180 degrees of their targets, so that errors subtract.

    Where a target is missing, to within 180 degrees of 0.
    """
    target = np.nan_to_num(target)
    return target + probe_poses.difference(predicted, target)


def unwrapped(target):
    """True poses (M, 6) with angles within 180 degrees of their circular mean: a truth about 180 is not two clouds."""
    turns = np.round((probe_poses.centre_and_spread(target)[0] - target) / 360)
    turns[:, :3] = 0
    return target + 360 * turns


def correlation_time(errors):
    """How many neighbouring rows say as much as one: 1 + 2 x the autocorrelations before their first zero.

    errors: (M, P, 6) of P predictors in the order of time, NaN = missing. The longest
    time of any predictor counts.
    """
    n_rows = len(errors)
    centred = errors - common.mean_without_nan(errors, 0)
    scaled = np.nan_to_num(centred / common.sd_without_nan(errors).clip(1e-9))
    power = np.abs(np.fft.rfft(scaled, 2 * n_rows, axis=0)) ** 2
    products = np.fft.irfft(power, axis=0)[:n_rows].sum(2)  # (M, P) of each lag
    autocorrelation = products / products[0].clip(1e-9)  # 1 at lag 0
    before_zero = np.cumprod(autocorrelation > 0, axis=0)
    times = 1 + 2 * (autocorrelation * before_zero)[1:].sum(0)  # (P,)
    return times.max()


def time_blocks(table, sequences, order):
    """(M,) numbers of blocks of neighbouring rows, each ten correlation times of the errors long.

    Blocks of real sweeps are not independent otherwise: in simulated AR(1) errors,
    shorter ones cover .57 to .86 where they promise .95. A short sequence makes few
    blocks or one, and so no interval.
    """
    in_time = np.lexsort((order, sequences))
    predictors = np.stack([table.predicted, *table.baselines.values()], axis=1)  # (M, P, 6)
    length = 10 * correlation_time(np.abs(predictors - table.truth[:, None])[in_time])
    n_blocks = max(1, int(len(in_time) / length))
    place = np.argsort(in_time)  # of each row
    return place * n_blocks // len(place)


def compare(table, blocks, sd, unit="patients"):
    """The model against each baseline, errors in units of sd (6,): {baseline: Result}.

    Resampled are the groups, which are patients or folders (`unit`); with fewer than five, `blocks`
    of time, which say nothing about other patients.
    """
    units = table.groups
    if len(set(units)) < subject_intervals.FEWEST_FOR_INTERVAL:
        units = blocks
        unit = subject_intervals.TIME_BLOCKS
    return {
        name: subject_intervals.bootstrap_regression(
            table.predicted / sd, table.truth / sd, units, baseline / sd, unit,
            names=table.names,
            baseline_name=name,
            folds=table.n_folds)
        for name, baseline in table.baselines.items()}


def in_units(result, sd):
    """The Result with the axes' errors, which are in units of sd (6,), in mm and degrees; means stay in sd."""
    factors = {"mae": sd, "rmse": sd, "mse": sd ** 2}
    sides = {}
    for side, estimates in vars(result.each).items():
        errors = {metric: estimates[metric].times(factor) for metric, factor in factors.items()}
        sides[side] = estimates | errors
    return dataclasses.replace(result, each=subject_intervals.Comparison(**sides))


def axis_rows(result, table):
    """One dict per axis: n, metrics with intervals, and the MAE of every baseline; result: of in_units."""
    axes = subject_intervals.target_table(result)
    for name, baseline in table.baselines.items():
        axes[f"mae_{name}"] = common.regression_metrics(baseline, table.truth)["mae"]
    return axes.to_dict("records")


def geodesic_error(predicted, target):
    """Mean angle in degrees between the orientations of poses (M, 6)."""
    return common.mean_without_nan(probe_poses.on_arrays(probe_poses.geodesic_degrees, predicted, target))


def predictor_rows(table):
    """One dict per predictor: mean MAE over the translations and over the angles, distance in mm, geodesic angle."""
    rows = []
    for name, values in {"model": table.predicted, **table.baselines}.items():
        error = np.abs(values - table.truth)
        rows.append({
            "predictor": name,
            "mae_mm": common.mean_without_nan(error[:, :3].ravel()),
            "mae_deg": common.mean_without_nan(error[:, 3:].ravel()),
            "distance_mm": common.mean_without_nan(np.linalg.norm(error[:, :3], axis=1)),
            "geodesic_deg": geodesic_error(values, table.truth),
        })
    return rows


def patient_rows(table, baseline_name, sd):
    """One dict per patient: rows, error of the model and of that baseline, geodesic angle of the model.

    Errors are the MAE per axis, and its mean over the axes in units of sd (6,).
    """
    rows = []
    for patient in np.unique(table.groups):
        own = table.take(table.groups == patient)
        model = common.regression_metrics(own.predicted, own.truth)["mae"]  # (6,)
        baseline = common.regression_metrics(own.baselines[baseline_name], own.truth)["mae"]
        rows.append({
            "patient": patient,
            "transitions": len(own.truth),
            "error": common.mean_without_nan(model / sd),
            "baseline_error": common.mean_without_nan(baseline / sd),
            **{f"mae_{axis}": value for axis, value in zip(table.names, model)},
            **{f"baseline_mae_{axis}": value for axis, value in zip(table.names, baseline)},
            "geodesic_deg": geodesic_error(own.predicted, own.truth),
        })
    return rows


def baseline_rows(results):
    """One dict per baseline: error in label sds, and the model's difference from it with its interval."""
    rows = []
    for name, result in results.items():
        difference = result.overall.difference["mae"]
        rows.append({
            "baseline": name,
            "error": result.overall.baseline["mae"].value,
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "sign_flip_p": result.sign_flip_p.get("mae"),
            "meaning": BASELINES[name],
        })
    return rows


def fold_numbers(table, sd):
    """What the fold table says of one fold: error of the model and of its best baseline in units of sd (6,), and R2."""
    def means(predicted):
        return common.mean_metrics(predicted / sd, table.truth / sd)
    model = means(table.predicted)
    return {
        "rows": len(table.truth),
        "error": model["mae"],
        "baseline_error": min(means(baseline)["mae"] for baseline in table.baselines.values()),
        "r2": model["r2"],
    }


def verdict(result, per_patient, unit, seen):
    """One honest sentence: does the model beat its best baseline, over what, and what it proves nothing about.

    per_patient: rows of patient_rows; unit: patients, or folders where each counted as
    one; seen: see verdict_sentence.
    """
    text = verdicts.verdict_sentence(result, "mae", seen, "mean error in label sds")
    if result.unit != subject_intervals.TIME_BLOCKS:
        return text
    n = len(per_patient)
    if n == 1:
        return f"One patient proves nothing across patients. Within it, over blocks of time: {text}"
    better = sum(row["error"] < row["baseline_error"] for row in per_patient)
    return (f"{n} {unit} are too few for an interval across patients (better in {better} of {n}). "
            f"Within them, over blocks of time: {text}")


def place_alarms(results):
    """Does the place in the sequence predict as well as the model? Sentences."""
    if "frame_index" not in results:
        return []
    overall = results["frame_index"].overall
    model = overall.model["mae"]
    place = overall.baseline["mae"].value
    if place > np.nanmax([model.value, model.high]):
        return []
    return [f"the place in the sequence alone predicts as well as the model ({place:.3f} against {model.value:.3f}): "
            "it may know when, not where. Score sweeps that begin and end elsewhere"]


def outside_share(poses, train, rows):
    """{outside_training_range: share of the rows whose pose (N, 6) is beyond all train rows on an axis}"""
    if not len(train):
        return {}
    poses = unwrapped(poses)
    low = np.nanmin(poses[train], 0)
    high = np.nanmax(poses[train], 0)
    return {"outside_training_range": ((poses[rows] < low) | (poses[rows] > high)).any(1).mean()}


def use_alarms(use, motion, scores_one_block=False):
    """Sentences on poses that training did not show, and on inputs that a world model does not use.

    motion: mean size of the known motion in label sds, with which a world model composes at1: a
    large one is needed. scores_one_block: one block of time of each sequence was scored, so that
    --folds would score the others too.
    """
    alarms = []
    outside = use.get("outside_training_range", 0)
    if outside > LARGE_OUTSIDE:
        remedy = ", or each block of time left out in turn: --folds 5" if scores_one_block else ""
        alarms.append(f"{outside:.0%} of the scored poses lie outside the range of the training poses, where a model "
                      f"can only extrapolate. Train on sequences that reach as far{remedy}")
    if "latent_skill" not in use:
        return alarms
    if abs(use["action_shuffle_ratio"] - 1) < 0.02 and motion > SMALL_MOTION:
        alarms.append(f"the known motion is ignored: action-shuffle ratio {use['action_shuffle_ratio']:.3f}. "
                      "--token_type none reads at1 off the frame at t1, without it")
    if use["latent_skill"] > 1:
        alarms.append(f"the imagined frame is worse than a copy of t1: latent skill {use['latent_skill']:.2f}. "
                      "More epochs, a larger --lambda_latent, or --token_type none, which imagines nothing")
    if use["feature_spread"] < COLLAPSED:
        alarms.append(f"the features hardly differ between frames (spread {use['feature_spread']:.4f}): collapsed. "
                      "A larger --lambda_latent, a smaller --lr, or --token_type none")
    return alarms


# --- imagined features -------------------------------------------------------------------------------

def latent_terms(features_t1, imagined, features_t2):
    """What latent_numbers needs of each row, from feature maps (B, F, G) of F channels and G cells."""
    return {
        "latent_error": (imagined - features_t2).square().mean((1, 2)),  # (B,)
        "copy_error": (features_t1 - features_t2).square().mean((1, 2)),  # (B,)
        "feature_mean": features_t2.mean(2),  # (B, F, G) -> (B, F)
        "feature_square": features_t2.square().mean(2),  # (B, F, G) -> (B, F)
    }


def latent_numbers(rows):
    """latent_loss (1 = a constant map), latent_skill (1 = copying t1; lower is better), feature_spread; of these rows.

    variance: of the true features about their channel's mean. spread: sd over the frames of the
    channels' means, over the rms of the features.
    """
    mean = rows["feature_mean"]
    square = rows["feature_square"]
    error = rows["latent_error"].mean()
    variance = square.mean(0) - mean.mean(0).square()  # (F,)
    sd = mean.var(0, correction=0).mean().clamp(min=1e-12).sqrt()
    return {
        "latent_loss": error / variance.mean().clamp(min=1e-8),
        "latent_skill": error / rows["copy_error"].mean(),
        "feature_spread": sd / square.mean().sqrt().clamp(min=1e-6),
    }


def retrieval_rank(guess, truth, patients):
    """How many of a patient's other true frames lie nearer to the guess than its own, as a mean share.

    guess, truth: tensors (M, F); patients: (M,) names. 0 = the own one is always nearest, .5 =
    chance; ties count half. NaN where no patient has two rows.
    """
    ranks = []
    for rows in common.rows_by_key(patients).values():
        if len(rows) < 2:
            continue
        apart = torch.cdist(guess[rows].float(), truth[rows].float())  # (m, m)
        own = apart.diagonal()[:, None]
        nearer = (apart < own).sum(1) + 0.5 * ((apart == own).sum(1) - 1)
        ranks += (nearer / (len(rows) - 1)).tolist()
    return common.mean_without_nan(np.array(ranks))  # NaN where there is none
