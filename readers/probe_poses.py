"""Transitions of a probe, and the algebra of its poses in six degrees of freedom.

Letters: N transitions. Units: a pose is (x, y, z, roll, pitch, yaw), mm and degrees.
"""
import collections
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
from readers import csv_tables, file_names, picture_files

AXES = ("x_mm", "y_mm", "z_mm", "roll_deg", "pitch_deg", "yaw_deg")
FILE_NAME = "transitions_dataset.json"
FIELDS = {"at1": "at1_6dof", "motion": "action_change_6dof", "at2": "at2_6dof"}
LARGEST_LABEL = 200.0  # mm or degrees: anything beyond is a fault of the tracker

# A pose (..., 6) is T = [R | t] with t = (x, y, z) in mm and R = Rz(yaw) Ry(pitch) Rx(roll) of angles in degrees.
# Torch throughout, since the composition lies inside the loss; on_arrays runs the same code on numpy in float64.

def on_arrays(function, *arrays):
    """function(*tensors) on numpy arrays, in float64."""
    return function(*(torch.from_numpy(np.array(array, np.float64)) for array in arrays)).numpy()


def wrap_degrees(angle):
    """Angles in degrees -> [-180, 180)."""
    return torch.remainder(angle + 180.0, 360.0) - 180.0


def pose_error(predicted, target):
    """predicted - target (..., 6), the angles wrapped at 180: 179 and -179 degrees are 2 apart."""
    error = predicted - target
    return torch.cat([error[..., :3], wrap_degrees(error[..., 3:])], -1)


def rotation_matrix(angles):
    """(..., 3) roll, pitch, yaw in degrees -> (..., 3, 3) R = Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = (f(torch.deg2rad(angles)).unbind(-1) for f in (torch.cos, torch.sin))
    rows = [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
            sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
            -sp, cp * sr, cp * cr]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def euler_degrees(rotation):
    """(..., 3, 3) -> (..., 3) roll, pitch, yaw in degrees, pitch in [-90, 90]; at a pitch of 90 roll is taken as 0."""
    cos_pitch = torch.sqrt(rotation[..., 2, 1] ** 2 + rotation[..., 2, 2] ** 2 + 1e-14)
    locked = cos_pitch < 1e-6
    roll = torch.where(locked, 0.0, torch.atan2(rotation[..., 2, 1], rotation[..., 2, 2]))
    yaw = torch.where(locked, torch.atan2(-rotation[..., 0, 1], rotation[..., 1, 1]),
                      torch.atan2(rotation[..., 1, 0], rotation[..., 0, 0]))
    return torch.rad2deg(torch.stack([roll, torch.atan2(-rotation[..., 2, 0], cos_pitch), yaw], -1))


def compose(first, second):
    """Poses (..., 6) -> the pose of T(first) T(second)."""
    rotation = rotation_matrix(first[..., 3:])
    shift = (rotation @ second[..., :3, None])[..., 0] + first[..., :3]
    return torch.cat([shift, euler_degrees(rotation @ rotation_matrix(second[..., 3:]))], -1)


def invert(pose):
    """Pose (..., 6) -> the pose of its inverse."""
    back = rotation_matrix(pose[..., 3:]).transpose(-1, -2)
    return torch.cat([-(back @ pose[..., :3, None])[..., 0], euler_degrees(back)], -1)


def geodesic_degrees(predicted, target):
    """Poses (..., 6) -> (...) angle in degrees, 0 to 180, of the rotation between their orientations."""
    between = rotation_matrix(predicted[..., 3:]).transpose(-1, -2) @ rotation_matrix(target[..., 3:])
    axis = torch.stack([between[..., 2, 1] - between[..., 1, 2], between[..., 0, 2] - between[..., 2, 0],
                        between[..., 1, 0] - between[..., 0, 1]], -1)  # 2 sin(angle) long
    trace = between.diagonal(dim1=-2, dim2=-1).sum(-1)  # 1 + 2 cos(angle)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), trace - 1.0))


def _sum(pose, motion):
    return torch.cat([pose[..., :3] + motion[..., :3], wrap_degrees(pose[..., 3:] + motion[..., 3:])], -1)


class Convention(NamedTuple):
    """How at1, motion and at2 hang together; each function takes and gives poses (..., 6)."""
    at2: object  # (at1, motion) -> at2
    at1: object  # (at2, motion) -> at1
    motion: object  # (at1, at2) -> motion


CONVENTIONS = {
    "additive": Convention(_sum, lambda at2, motion: _sum(at2, -motion), lambda at1, at2: pose_error(at2, at1)),
    "se3_left": Convention(lambda at1, motion: compose(motion, at1), lambda at2, motion: compose(invert(motion), at2),
                           lambda at1, at2: compose(at2, invert(at1))),
    "se3_right": Convention(lambda at1, motion: compose(at1, motion), lambda at2, motion: compose(at2, invert(motion)),
                            lambda at1, at2: compose(invert(at1), at2)),
}


def composition_residuals(at1, motion, at2):
    """(N, 6) arrays -> dicts of convention, mean and 95th percentile of what at2 is missed by in mm and degrees, rows.

    Rows with anything missing are left out. The last line is the motion read the wrong way round, T(motion) T(at2).
    """
    whole = ~np.isnan(np.hstack([at1, motion, at2])).any(1)
    if not whole.any():
        return []
    at1, motion, at2 = at1[whole], motion[whole], at2[whole]
    tried = {name: (on_arrays(convention.at2, at1, motion), at2) for name, convention in CONVENTIONS.items()}
    tried["reversed"] = on_arrays(CONVENTIONS["se3_left"].at2, at2, motion), at1
    rows = []
    for name, (found, wanted) in tried.items():
        mm, deg = np.linalg.norm((found - wanted)[:, :3], axis=1), on_arrays(geodesic_degrees, found, wanted)
        rows.append({"convention": name, "mm": mm.mean(), "deg": deg.mean(), "mm_95": np.quantile(mm, 0.95),
                     "deg_95": np.quantile(deg, 0.95), "rows": int(whole.sum())})
    return rows


def centre_and_spread(poses):
    """(N, 6), NaN = missing -> (mean (6,), sd (6,)); angles about their circular mean: 179, -179 give 180."""
    angle = np.deg2rad(poses[:, 3:])
    about = np.zeros(6)
    about[3:] = np.rad2deg(np.arctan2(np.nanmean(np.sin(angle), axis=0), np.nanmean(np.cos(angle), axis=0)))
    apart = on_arrays(pose_error, poses, np.broadcast_to(about, poses.shape))
    return about + np.nanmean(apart, axis=0), np.maximum(np.nanstd(apart, axis=0), 1e-6)


def read_transitions(path):
    """A transitions_dataset.json -> list of dicts: frame_t1, frame_t2, ft1, ft2 (text), at1, motion, at2 (6,) float64.

    A bare list or {"transitions": [...]}; further keys are ignored, null and missing poses are NaN. Raises UserError
    that lists every row that cannot be read.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise common.UserError(f"{path}: expected JSON, found {common.one_line(error)}") from None
    listed = listed.get("transitions") if isinstance(listed, dict) else listed
    if not isinstance(listed, list) or not listed:
        raise common.UserError(f"{path}: expected a list of transitions, or a dict with one under `transitions`, found "
                               f"{type(listed).__name__}{' (empty)' if listed == [] else ''}")
    rows, faults = [], []
    for number, entry in enumerate(listed, start=1):
        try:
            rows.append(_transition(entry))
        except (ValueError, TypeError, AttributeError) as error:
            faults.append(f"row {number}: {common.one_line(error)}")
    if faults:
        raise common.UserError(f"{path}: {len(faults)} of {len(listed)} rows cannot be read: {'; '.join(faults[:5])}"
                               f"{'; ...' if len(faults) > 5 else ''}. Mend or delete these rows.")
    return rows


def _transition(entry):
    paths = {which: entry.get(f"{which}_image_path") for which in ("ft1", "ft2")}
    if not isinstance(paths["ft1"], str) or not isinstance(paths["ft2"], (str, type(None))):
        raise ValueError(f"expected the path of a picture under ft1_image_path, found {paths['ft1']!r}")
    row = {which: (path or "").replace("\\", "/") for which, path in paths.items()}
    for which, path in list(row.items()):
        row[f"frame_t{which[-1]}"] = str(entry.get(f"frame_t{which[-1]}") or Path(path).stem)
    for name, key in FIELDS.items():
        value = [math.nan] * 6 if entry.get(key) is None else entry[key]
        if not isinstance(value, list) or len(value) != 6:
            raise ValueError(f"expected 6 numbers under {key}, found {str(value)[:60]}")
        row[name] = np.array([math.nan if number is None else float(number) for number in value])
    return row


def find_transitions(args):
    """(sequence of each row, rows as read_transitions gives them with their number, (path t1, path t2) or None)."""
    files = sorted(args.data_dir.rglob(FILE_NAME)) if args.data_dir.is_dir() else []
    if not files:
        raise common.UserError(f"--data_dir {args.data_dir}: expected folders with a {FILE_NAME}, found none")
    sequences, rows, paths = [], [], []
    for file in files:
        name = file.parent.relative_to(args.data_dir).as_posix()
        listed = read_transitions(file)[:args.max_transitions or None]
        for number, row in enumerate(listed, start=1):
            sequences.append(args.data_dir.resolve().name if name == "." else name)
            rows.append({**row, "number": number})
        paths += resolve_frames(file, listed)
    return sequences, rows, paths


def resolve_frames(file, rows):
    """Paths of both frames of each row inside the sequence's folder, None where there is none.

    Case may differ, and leading folders of the name may be missing on disk. UserError for names that leave the folder.
    """
    folder = file.parent
    spelled = {path.relative_to(folder).as_posix().lower(): path for path in file_names.find_images(folder)}
    leaving = [f"row {i}: {row[which]}" for i, row in enumerate(rows, start=1) for which in ("ft1", "ft2")
               if re.match("/|[A-Za-z]:", row[which]) or ".." in row[which].split("/")]
    if leaving:
        raise common.UserError(f"{file}: expected pictures inside its folder, found {'; '.join(leaving[:5])}")

    def found(name):
        if (folder / name).is_file():
            return folder / name
        parts = name.removeprefix("./").lower().split("/")
        tails = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((spelled[tail] for tail in tails if tail in spelled), None)
    return [(found(row["ft1"]), found(row["ft2"]) if row["ft2"] else None) for row in rows]


def largest_angle(poses):
    """Largest credible |angle| of all at1 and at2, or of the motions where there is neither; 0: nothing is known."""
    known = [np.abs(poses[name][:, 3:]) for name in ("at1", "at2")]
    known = known if np.isfinite(np.concatenate(known)).any() else [np.abs(poses["motion"][:, 3:])]
    known = np.concatenate(known)
    return float(known[known <= LARGEST_LABEL].max(initial=0.0))


def angle_unit(poses, asked):
    """'deg' or 'rad': in radians no angle exceeds pi, in degrees a whole study that stays under 3.2 is unheard of."""
    return asked if asked != "auto" else "rad" if 0 < largest_angle(poses) <= math.pi + 1e-6 else "deg"


def mask_labels(poses, unit):
    """Turn radians into degrees and take out, in place, what is no pose: NaN, infinite, beyond 200. Returns notes."""
    notes = []
    for name, values in poses.items():
        values[:, 3:] = np.rad2deg(values[:, 3:]) if unit == "rad" else values[:, 3:]
        absent = np.isnan(values).all(1)
        wild = ~(np.abs(values) <= LARGEST_LABEL) & ~absent[:, None]
        values[wild] = np.nan
        if wild.any():
            notes.append(f"{wild.sum()} values of {FIELDS[name]} in {wild.any(1).sum()} rows masked (NaN, or beyond "
                         f"{LARGEST_LABEL:g})")
        if absent.any():
            notes.append(f"{absent.sum()} rows have no {FIELDS[name]}")
    return notes


def choose_composition(asked, residuals):
    """(convention, sentence on why): the one asked for, or the one with the smallest residual on the data."""
    tried = {row["convention"]: row["mm"] + row["deg"] for row in residuals if row["convention"] in CONVENTIONS}
    chosen = asked if asked != "auto" else min(tried, key=tried.get) if tried else "additive"
    if not tried:
        return chosen, f"composition {chosen}: untested, no row has at1, motion and at2"
    row = next(row for row in residuals if row["convention"] == chosen)
    text = (f"composition {chosen} ({'asked for' if asked != 'auto' else 'the best fit'}): at2 missed by "
            f"{row['mm']:.3g} mm and {row['deg']:.3g} degrees on average")
    is_poor = tried[chosen] > 1.0 or tried[chosen] > 2 * min(tried.values()) + 0.01
    return chosen, text + (": a poor fit, look at --mode audit" if is_poor else "")


def complete_poses(poses, convention):
    """Derive, in place, whole poses that a row lacks from the other two. Returns notes."""
    at1, motion, at2 = (poses[name] for name in FIELDS)
    ways = {"at2": (CONVENTIONS[convention].at2, at1, motion), "motion": (CONVENTIONS[convention].motion, at1, at2),
            "at1": (CONVENTIONS[convention].at1, at2, motion)}
    lacking, notes = {name: np.isnan(poses[name]).all(1) for name in ways}, []
    for name, (function, first, second) in ways.items():
        others = [other for other in ways if other != name]
        rows = lacking[name] & ~np.any([lacking[other] for other in others], axis=0)
        if rows.any():
            poses[name][rows] = on_arrays(function, first[rows], second[rows])
            notes.append(f"{rows.sum()} rows: {FIELDS[name]} derived from the other two ({convention})")
    return notes


def reasons_to_skip(rows, paths, poses, needs_labels):
    """Why each row cannot be used, None where it can."""
    has_motion = ~np.isnan(poses["motion"]).any(1)
    has_label = ~np.isnan(np.hstack([poses["at1"], poses["at2"]])).all(1)

    def reason(i):
        if not paths[i][0] or (needs_labels and not paths[i][1]):
            return f"no file {rows[i]['ft1'] if not paths[i][0] else rows[i]['ft2']!r}"
        if not has_motion[i]:
            return f"no usable {FIELDS['motion']}"
        return None if has_label[i] or not needs_labels else "no usable label"
    return [reason(i) for i in range(len(rows))]


def load_frames(args, run, rows):
    """[(sequence, path t1, path t2 or None)] -> (ImageStore, (N, 2) index into it, {indices of bad pictures}).

    A picture that a sequence holds twice, as ft2 of one transition and ft1 of the next, is decoded once.
    """
    index, paths, held = np.full((len(rows), 2), -1), [], {}
    for i, (sequence, *pair) in enumerate(rows):
        for which, path in enumerate(path for path in pair if path):
            key = sequence, common.data_fingerprint([path.read_bytes()])
            if key not in held:
                held[key] = len(paths)
                paths.append(path)
            index[i, which] = held[key]
    run.say(f"decoding {len(paths)} different frames")
    store = picture_files.ImageStore(paths, args.image_size, args.cache)
    good = picture_files.check_bad_files(store.audit, args.on_bad_file)
    return store, index, set(range(len(paths))) - set(good)


def unique_names(names):
    """(N,) names, which must differ. UserError lists the transitions that stand there twice."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise common.UserError(f"{len(twice)} transitions are listed twice: {', '.join(twice[:5])}. Delete the copies.")
    return np.array(names)


def patients_of(args, sequences):
    """({sequence: patient}, did anybody say so?) from --patient_map or --patient_regex, else the folder's own name."""
    folders = sorted(set(sequences))
    if args.patient_regex:
        found = {folder: re.search(args.patient_regex, folder) for folder in folders}
        table = {folder: match[min(1, match.re.groups)] for folder, match in found.items() if match}
    elif args.patient_map:
        table = read_patient_map(args.patient_map, folders)
    else:
        return {folder: folder for folder in folders}, False
    unknown = [folder for folder in folders if not table.get(folder)]
    if unknown:
        raise common.UserError(f"--patient_map or --patient_regex names no patient for {', '.join(unknown[:10])}"
                               f"{' ...' if len(unknown) > 10 else ''}; every folder needs one")
    return table, True


def read_patient_map(path, folders):
    """JSON {folder: patient} or {patient: [folders]}, or CSV with the columns folder and patient -> {folder: patient}.

    A folder may be named with or without the folders above it.
    """
    if path.suffix.lower() == ".json":
        listed = common.read_json(path)
        pairs = [(folder, patient) for patient, value in listed.items() if isinstance(value, list) for folder in value]
        pairs += [(folder, str(value)) for folder, value in listed.items() if not isinstance(value, list)]
    else:
        table = csv_tables.read_table(path)
        columns = [next((c for c in table.columns if c.lower() in names), None)
                   for names in (("folder", "sequence"), ("patient", "patient_id"))]
        if None in columns:
            raise common.UserError(f"--patient_map {path}: expected the columns folder and patient, found "
                                   f"{', '.join(table.columns)}")
        pairs = zip(*(table[column] for column in columns))
    table = {str(folder): str(patient) for folder, patient in pairs}
    return {folder: table.get(folder, table.get(folder.rsplit("/", 1)[-1])) for folder in folders}


def similar_sequences(study, most=5):
    """Lines on folders that may belong to one patient: names that differ in a last number only, tracks that agree.

    The distance of two tracks is the median distance from a pose at1 of one to the nearest of the other, over the six
    axes in units of their sd; the same sweep twice gives 0.
    """
    folders, stems = sorted(set(study.sequences)), collections.defaultdict(list)
    for folder in folders:
        stems[re.sub(r"[_-]?\d+$", "", folder)].append(folder)
    lines = [f"names alike: {', '.join(alike[:6])}{' ...' if len(alike) > 6 else ''}; one patient? --patient_regex "
             r"'(.*)_\d+$'" for alike in stems.values() if len(alike) > 1]
    if np.isnan(study.at1).any(1).all():
        return lines
    scaled = study.at1 / centre_and_spread(study.at1)[1]
    tracks = {folder: scaled[(study.sequences == folder) & ~np.isnan(study.at1).any(1)][:400] for folder in folders}

    def distance(a, b):
        apart = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))  # (A, B)
        return max(np.median(apart.min(0)), np.median(apart.min(1)))
    pairs = [(distance(tracks[a], tracks[b]), a, b) for a, b in itertools.combinations(folders, 2)
             if len(tracks[a]) and len(tracks[b])]
    return lines + [f"tracks alike: {a} and {b}, {apart:.2f} sd apart" for apart, a, b in sorted(pairs)[:most]]
