"""Checks of a probe's transitions before training: what is missing, inconsistent or tied to time or to one patient.

Letters: N transitions. Units: a pose is (x, y, z, roll, pitch, yaw), mm and degrees, NaN = missing.
"""
import collections
import dataclasses

import numpy as np

import common
from evidence import plotting, splitting
from readers import probe_poses

STRONG_R = 0.5


@dataclasses.dataclass
class Check:
    """One line of an audit."""
    status: str  # OK, WARN or FAIL
    name: str
    found: str
    remedy: str = ""


def check(is_bad, name, found, remedy="", status="WARN"):
    """Check whose status and remedy count only where it is bad."""
    return Check(status, name, found, remedy) if is_bad else Check("OK", name, found)


def check_study(study):
    """All checks of a train_dreamer.Study."""
    return [
        Check("OK", "data", f"{len(study.names)} transitions in {len(set(study.sequences))} sequences"),
        *check_rows(study.skipped),
        *(check("WARNING" in note, "note", note) for note in study.notes),
        *check_composition(study.residuals, study.compose),
        *check_ranges(study.poses),
        *check_chain(study.sequences, study.frames, study.at1, study.at2),
        *check_time(study.place, study.at1),
        *check_patients(study),
        *check_frames(study),
    ]


def check_rows(skipped):
    """Rows that cannot be used; skipped: dicts of sequence, row and reason."""
    missing = [f"{row['sequence']} row {row['row']}" for row in skipped if row["reason"].startswith("no file")]
    text = f"{len(missing)} rows name a picture that is not there"
    if missing:
        text += f": {common.shorten_list(missing, 5)}; their poses are checked all the same"
    n_others = len(skipped) - len(missing)
    return [check(missing, "missing files", text, "add them; all are listed in skipped.csv", "FAIL"),
            check(n_others, "skipped rows", f"{n_others} for other reasons", "see skipped.csv")]


def check_composition(residuals, chosen):
    """Do at1, motion and at2 fit together? residuals: as probe_poses.composition_residuals gives them."""
    checks = []
    for row in residuals:
        missed = "at1" if row["convention"] == "reversed" else "at2"
        text = f"{missed} missed by {row['mm']:.3g} mm, {row['deg']:.3g} degrees on average"
        total = row["mm"] + row["deg"]
        if row["convention"] == "additive" and total < 1e-6:
            text += "; exact, so the loss on at2 adds nothing to the one on at1"
        is_poor = row["convention"] == chosen and total > probe_poses.LARGE_RESIDUAL
        checks.append(check(is_poor, f"composition {row['convention']}", text, "check --angle_unit and the labels"))
    return checks or [Check("WARN", "composition", f"{chosen}, untested: no row has at1, motion and at2")]


def pose_ranges(poses):
    """{quantity: (N, 6)} -> {quantity: {axis: {min, max, count, mean, sd}}}; NaN does not count."""
    import pandas as pd
    ranges = {}
    for name, values in poses.items():
        numbers = pd.DataFrame(values, columns=probe_poses.AXES).agg(["min", "max", "count"])
        numbers.loc["mean"], sd = probe_poses.centre_and_spread(values)
        numbers.loc["sd"] = np.where(numbers.loc["min"] < numbers.loc["max"], sd, 0.0)
        ranges[name] = numbers.to_dict()
    return ranges


def check_ranges(poses):
    """Range of every quantity in {at1, motion, at2: (N, 6)}, and angles near the wrap."""
    checks = []
    for name, axes in pose_ranges(poses).items():
        text = ", ".join(f"{axis} {row['min']:.1f} to {row['max']:.1f}" for axis, row in axes.items())
        checks.append(check("nan" in text, f"range {name}", text, "no row has a number there"))
    n_far = np.sum(np.abs(poses["at1"][:, 3:]) > 170)
    checks.append(check(n_far, "wrap", f"{n_far} angles of at1 within 10 degrees of the wrap at 180",
                        "losses and errors are wrapped; the mean baseline is circular"))
    return checks


def check_chain(sequences, frames, at1, at2):
    """Is each sequence one continuous sweep? Rows in the order of the files; frames: (N, 2) indices of t1 and t2."""
    before = np.flatnonzero(sequences[:-1] == sequences[1:])
    after = before + 1
    if not len(after):
        return []
    linked = (frames[before, 1] == frames[after, 0]) & (frames[after, 0] >= 0)
    text = f"{linked.sum()} of {len(after)} transitions begin with the frame at which the one before ends"
    if linked.mean() > 0.5:
        text += ": a continuous sweep, so a random split would leak"
    checks = [Check("OK", "chain", text)]
    jumps = np.abs(probe_poses.difference(at1[after[linked]], at2[before[linked]]))
    if np.isfinite(jumps).any():
        worst = np.nanmax(jumps)
        checks.append(check(worst >= 0.01, "chain of poses", f"at1 differs from the at2 before it by up to {worst:.3g} "
                            "mm or degrees", "find out which of the two labels is right"))
    return checks


def check_time(place, at1):
    """Does the place in the sequence, (N,) from 0 to 1, tell the pose?"""
    import pandas as pd
    if len(place) < 3:
        return []
    poses = pd.DataFrame(at1, columns=probe_poses.AXES)
    r = poses.corrwith(pd.Series(place)).fillna(0)  # an axis that never varies has none
    named = ", ".join(f"{axis} {value:+.2f}" for axis, value in r.items())
    return [check(r.abs().max() > STRONG_R, "order and time", f"r of at1 with the place in the sequence: {named}",
                  "a model may learn when instead of where: compare with the frame_index baseline")]


def check_patients(study):
    """Who owns which folder."""
    n_folders = collections.Counter(dict(zip(study.sequences, study.patients)).values())
    owners = "not known: each folder counts as one"
    if study.has_patients:
        owners = ", ".join(f"{name} ({count})" for name, count in sorted(n_folders.items())) + " (folders)"
    return [check(not study.has_patients, "patients", owners, "give --patient_map or --patient_regex"),
            check(len(n_folders) < 2, "several patients", f"{len(n_folders)} {study.unit}",
                  "one patient proves nothing across patients: --split_by time, or more patients")]


def check_frames(study):
    """Unreadable and shared pictures."""
    audit = study.store.audit
    bad = [f"{found.path}: {found.error}" for found in audit if found.error]
    owners = collections.defaultdict(set)
    for patient, pair in zip(study.patients, study.frames):
        for index in pair[pair >= 0]:  # -1 = none
            owners[audit[index].pixel_sha].add(patient)
    n_shared = sum(len(names) > 1 for names in owners.values())
    return [check(bad, "unreadable frames", f"{len(bad)} of {len(audit)} {common.shorten_list(bad, 5)}",
                  "replace or remove them", "FAIL"),
            check(n_shared, "shared frames", f"{n_shared} pictures belong to two patients",
                  "one patient under two names? see --patient_map")]


def write_statistics(run, study, split):
    """dataset_stats.json and dataset_statistics.png of a train_dreamer.Study."""
    parts = {part: {"transitions": len(rows), "patients": sorted(set(study.patients[rows]))}
             for part, rows in split.items()}
    stats = {
        "transitions": len(study.patients),
        "parts": parts,
        "transitions_of_patient": collections.Counter(study.patients),
        "patients_in_two_parts": splitting.in_several_parts(study.patients, split),
        "left_out": len(study.patients) - sum(map(len, split.values())),
        "sequences": len(set(study.sequences)),
        "patients_known": study.has_patients,
        "angle_unit": study.angle_unit,
        "compose": study.compose,
        "residuals": study.residuals,
        "poses": pose_ranges(study.poses),
        "skipped": len(study.skipped),
        "notes": study.notes,
    }
    common.write_json(run.path("dataset_stats.json"), stats)
    facts = [
        f"in two parts: {common.shorten_list(stats['patients_in_two_parts'], 2) or 'nobody'}",
        f"transitions in no part: {stats['left_out']}",
        f"rows skipped: {stats['skipped']}",
        f"angles in {study.angle_unit}",
        f"poses composed: {study.compose}"]
    rows = np.linspace(0, len(study.names) - 1, 4).astype(int)
    samples = [(study.names[row], study.picture(study.frames[row, 0])) for row in rows]
    plotting.plot_dataset(split, study.patients, facts, samples, run.path("dataset_statistics.png"))
