"""Transitions of a probe, and the algebra of its poses in six degrees of freedom.

Letters: N transitions. Units: a pose is (x, y, z, roll, pitch, yaw), mm and degrees.
"""
import collections
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import torch

import common
from readers import csv_tables, file_names

AXES = "x_mm y_mm z_mm roll_deg pitch_deg yaw_deg".split()
FILE_NAME = "transitions_dataset.json"
FIELDS = {"at1": "at1_6dof", "motion": "action_change_6dof", "at2": "at2_6dof"}
LARGEST_LABEL = 200.0  # mm or degrees: anything beyond is a fault of the tracker
LARGE_MASKED = 0.05  # share of the rows that is no accident, such as angles from 0 to 360
LARGE_RESIDUAL = 1.0  # mm and degrees together
EULER_ORDERS = "zyx zxy yzx yxz xzy xyz".split()  # of the factors of R; the first is ours


# --------------------------------------------------------------------------------------
# Algebra of poses
# --------------------------------------------------------------------------------------
# A pose (..., 6) is T = [R | t] with t = (x, y, z) in mm and R = Rz(yaw) Ry(pitch) Rx(roll) of
# angles in degrees. Torch throughout, since the composition lies inside the loss; on_arrays runs
# the same code on numpy in float64.

def on_arrays(function, *arrays):
    """function(*tensors) on numpy arrays, in float64."""
    return function(*[torch.from_numpy(np.array(each, np.float64)) for each in arrays]).numpy()


def wrap_degrees(angle):
    """Angles in degrees -> [-180, 180)."""
    return torch.remainder(angle + 180.0, 360.0) - 180.0


def add_poses(pose, motion):
    """pose + motion (..., 6), the angles wrapped at 180."""
    total = pose + motion
    return torch.cat([total[..., :3], wrap_degrees(total[..., 3:])], -1)


def pose_error(predicted, target):
    """predicted - target (..., 6), the angles wrapped at 180: 179 and -179 degrees are 2 apart."""
    return add_poses(predicted, -target)


def difference(poses, others):
    """pose_error of arrays (..., 6), in float64."""
    return on_arrays(pose_error, poses, others)


def rotation_matrix(angles):
    """(..., 3) roll, pitch, yaw in degrees -> (..., 3, 3) R = Rz(yaw) Ry(pitch) Rx(roll)."""
    radians = torch.deg2rad(angles)
    cr, cp, cy = torch.cos(radians).unbind(-1)
    sr, sp, sy = torch.sin(radians).unbind(-1)
    rows = [
        cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
        sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
        -sp, cp * sr, cp * cr]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def from_order(poses, order):
    """{name: poses (N, 6) whose R is the product of the three turns in another order} -> the same poses in ours."""
    if order == "zyx":
        return poses
    turned = {}
    for name, values in poses.items():
        product = np.eye(3)
        for axis in map("xyz".index, order):
            turn = np.where(np.arange(3) == axis, values[:, 3:], 0)
            product = product @ on_arrays(rotation_matrix, turn)
        turned[name] = np.hstack([values[:, :3], on_arrays(euler_degrees, product)])
    return turned


def euler_degrees(rotation):
    """(..., 3, 3) -> (..., 3) roll, pitch, yaw in degrees, pitch in [-90, 90]; at a pitch of 90 roll is taken as 0."""
    r00, r01, _, r10, r11, _, r20, r21, r22 = rotation.flatten(-2).unbind(-1)
    cos_pitch = torch.sqrt(r21 ** 2 + r22 ** 2 + 1e-14)
    locked = cos_pitch < 1e-6
    roll = torch.where(locked, 0.0, torch.atan2(r21, r22))
    pitch = torch.atan2(-r20, cos_pitch)
    yaw = torch.where(locked, torch.atan2(-r01, r11), torch.atan2(r10, r00))
    return torch.rad2deg(torch.stack([roll, pitch, yaw], -1))


def multiply(left, right):
    """Matrices (..., 3, 3) and (..., 3, n) -> (..., 3, n); a GPU may round what `@` multiplies to TF32."""
    return (left[..., None] * right[..., None, :, :]).sum(-2)


def compose(first, second):
    """Poses (..., 6) -> the pose of T(first) T(second)."""
    rotation = rotation_matrix(first[..., 3:])
    shift = multiply(rotation, second[..., :3, None])[..., 0] + first[..., :3]
    angles = euler_degrees(multiply(rotation, rotation_matrix(second[..., 3:])))
    return torch.cat([shift, angles], -1)


def invert(pose):
    """Pose (..., 6) -> the pose of its inverse."""
    back = rotation_matrix(pose[..., 3:]).transpose(-1, -2)
    shift = -multiply(back, pose[..., :3, None])[..., 0]
    return torch.cat([shift, euler_degrees(back)], -1)


def geodesic_degrees(predicted, target):
    """Poses (..., 6) -> (...) angle in degrees, 0 to 180, of the rotation between their orientations."""
    apart = rotation_matrix(predicted[..., 3:]) - rotation_matrix(target[..., 3:])
    chord = apart.flatten(-2).norm(dim=-1)  # (...), sqrt(8) sin(angle / 2)
    return torch.rad2deg(2 * torch.asin((chord / math.sqrt(8)).clamp(max=1.0)))


@dataclasses.dataclass
class Convention:
    """at2 is the product of at1 and motion: three poses (..., 6), each of which follows from the other two."""
    product: object  # of two poses
    inverse: object  # of a pose

    def at2(self, at1, motion):
        return self.product(at1, motion)

    def at1(self, motion, at2):
        return self.product(at2, self.inverse(motion))

    def motion(self, at1, at2):
        return self.product(self.inverse(at1), at2)


CONVENTIONS = {
    "additive": Convention(add_poses, torch.neg),
    "se3_left": Convention(lambda at1, motion: compose(motion, at1), invert),  # T(at2) = T(motion) T(at1)
    "se3_right": Convention(compose, invert),  # T(at2) = T(at1) T(motion)
}


def composition_residuals(at1, motion, at2):
    """(N, 6) arrays -> dicts of convention, mean of what at2 is missed by in mm and degrees, rows.

    Rows with anything missing are left out. The last line is the motion read the wrong
    way round, T(motion) T(at2).
    """
    whole = ~np.isnan(at1 + motion + at2).any(1)
    if not whole.any():
        return []
    at1, motion, at2 = (poses[whole] for poses in (at1, motion, at2))

    def residual(name, found, wanted):
        mm = np.linalg.norm((found - wanted)[:, :3], axis=1)
        deg = on_arrays(geodesic_degrees, found, wanted)
        return {
            "convention": name,
            "mm": mm.mean(),
            "deg": deg.mean(),
            "rows": len(mm)}
    rows = [
        residual(name, on_arrays(convention.at2, at1, motion), at2)
        for name, convention in CONVENTIONS.items()]
    return [*rows, residual("reversed", on_arrays(compose, motion, at2), at1)]


def centre_and_spread(poses):
    """(N, 6), NaN = missing -> (mean (6,), sd (6,)); angles about their circular mean: 179, -179 give 180.

    The sd of an axis that never varies is 1, so that rounding does not count as an error.
    """
    direction = common.mean_without_nan(np.exp(1j * np.deg2rad(poses[:, 3:])), 0)
    about = np.append(np.zeros(3), np.angle(direction, deg=True))
    apart = difference(poses, about)
    sd = common.sd_without_nan(apart)
    return about + common.mean_without_nan(apart, 0), np.where(sd > 1e-6, sd, 1.0)


# --------------------------------------------------------------------------------------
# Reading transitions
# --------------------------------------------------------------------------------------

@dataclasses.dataclass
class Transition:
    """One row of a file."""
    name: str  # sequence/frame_t1-frame_t2
    sequence: str  # its folder below the data
    number: int  # of the row in its file, from 1
    ft1: str  # pictures as the file names them, ft2 '' where there is none
    ft2: str
    poses: dict  # {at1, motion, at2: (6,) float64, NaN = missing}
    path_t1: Path | None = None  # None where there is no such picture
    path_t2: Path | None = None


def find_transitions(data_dir, limit, exact_names):
    """-> (Transitions of all sequences below a folder, notes); limit: the first ones of each sequence, 0 for all."""
    files = sorted(file for file in file_names.visible_files(data_dir) if file.name == FILE_NAME)
    if not files:
        raise common.UserError(f"--data_dir {data_dir}: expected folders with a {FILE_NAME}, found none")
    transitions = []
    notes = []
    for file in files:
        folder = file.parent
        sequence = folder.as_posix() if folder.name else data_dir.resolve().name
        found, matching = read_transitions(data_dir / file, sequence, exact_names)
        transitions += found[:limit or None]
        notes += [f"{sequence}: {note}" for note in matching]
    return transitions, notes


def read_transitions(path, sequence, exact_names):
    """A transitions_dataset.json -> (list of Transition, notes).

    A bare list or {"transitions": [...]}; further keys are ignored, null and missing poses are NaN.
    Pictures lie in the file's folder, and are found as file_names.match_images finds them. Raises
    UserError that lists every row that cannot be read.
    """
    listed = csv_tables.read_json_under(path, "transitions")
    if not isinstance(listed, list) or not listed:
        raise common.UserError(
            f"{path}: expected a list of transitions, or a dict with one under `transitions`, "
            f"found {str(listed)[:60]}")
    rows = []
    faults = []
    for number, entry in enumerate(listed, start=1):
        try:
            rows.append(_read_row(entry, sequence, number))
        except (ValueError, TypeError, OverflowError) as error:
            faults.append(f"row {number}: {common.one_line(error)}")
    if faults:
        raise common.UserError(
            f"{path}: {len(faults)} of {len(listed)} rows cannot be read: "
            f"{common.shorten_list(faults, 5)}. Correct or delete these rows.")
    return rows, _find_pictures(rows, path.parent, exact_names)


def _find_pictures(rows, folder, exact_names):
    """Sets path_t1 and path_t2 of Transitions whose pictures lie in a folder; returns notes."""
    if not file_names.find_images(folder):
        return []
    names = [name for row in rows for name in (row.ft1, row.ft2) if name]
    found, _, notes = file_names.match_images(names, folder, exact_names, spelling=str.casefold)
    for row in rows:
        row.path_t1 = found.get(row.ft1)
        row.path_t2 = found.get(row.ft2)
    return notes


def _read_row(entry, sequence, number):
    """One entry of a file -> Transition. Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with the fields of a transition, found {str(entry)[:60]}")
    frame_t1, ft1 = _read_frame(entry, "t1")
    frame_t2, ft2 = _read_frame(entry, "t2")
    if not ft1:
        raise ValueError("expected the path of a picture under ft1_image_path, found none")
    poses = {name: _read_pose(entry, key) for name, key in FIELDS.items()}
    return Transition(f"{sequence}/{frame_t1}-{frame_t2}", sequence, number, ft1, ft2, poses)


def _read_frame(entry, which):
    """(what the file calls a frame, which may be 0, else the name of its picture; that picture, '' for none)."""
    key = f"f{which}_image_path"
    picture = entry.get(key)
    if not isinstance(picture, str | None):
        raise ValueError(f"expected the path of a picture under {key}, found {picture!r}")
    picture = file_names.clean_name(picture or "")
    name = entry.get(f"frame_{which}")
    return Path(picture).stem if name in (None, "") else str(name), picture


def _read_pose(entry, key):
    """(6,) numbers under a key of an entry; NaN where it, or one of them, is missing or null."""
    value = entry.get(key) or [None] * 6
    if np.shape(value) != (6,):
        raise ValueError(f"expected 6 numbers under {key}, found {str(value)[:60]}")
    return np.array(value, float)  # None: NaN


def different_frames(transitions):
    """-> (paths of the different pictures, (N, 2) index into them of the frames t1 and t2, -1 = none).

    A picture that a sequence holds twice, as ft2 of one transition and ft1 of the
    next, stands there once. Where there is no frame t2 the index has t1 twice. Empty
    files are as many faults, not one picture.
    """
    index = np.full((len(transitions), 2), -1)
    first = {}  # (sequence, content) -> (place, path)
    for i, row in enumerate(transitions):
        for which, path in enumerate((row.path_t1, row.path_t2 or row.path_t1)):
            if path is not None:
                key = row.sequence, common.data_fingerprint([path.read_bytes() or str(path)])
                index[i, which], _ = first.setdefault(key, (len(first), path))
    return [path for _, path in first.values()], index


def unique_names(names):
    """(N,) names, which must differ. UserError lists the transitions that stand there twice."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise common.UserError(
            f"{len(twice)} transitions are listed twice: {common.shorten_list(twice, 5)}. Delete the copies.")
    return np.array(names)


# --------------------------------------------------------------------------------------
# Checking and completing poses
# --------------------------------------------------------------------------------------
# asked: what a flag says, or auto. usual: what the data had that a model was trained on, None where none was trained.

def in_degrees(poses, unit):
    """{name: (N, 6)} in a unit -> in degrees, NaN for what is no pose: NaN, infinite, beyond 200."""
    factor = np.repeat([1, 180 / math.pi if unit == "rad" else 1], 3)
    return {
        name: np.where(np.abs(values * factor) <= LARGEST_LABEL, values * factor, np.nan)
        for name, values in poses.items()}


def best_miss(poses, degree=1.0):
    """What the best convention misses at2 by, mm and degrees together; infinite where no row has all three poses.

    degree: what a degree counts, in mm.
    """
    residuals = composition_residuals(**poses)[:len(CONVENTIONS)]
    return min((row["mm"] + degree * row["deg"] for row in residuals), default=math.inf)


def sizes_of_labels(poses):
    """(2 N, 6) how large at1 and at2 are, NaN = missing."""
    return np.abs(np.concatenate([poses["at1"], poses["at2"]]))


def choose_unit(poses, asked, usual):
    """(deg or rad, why): beyond pi are degrees; else that in which the poses compose, else the usual one or a guess."""
    if asked != "auto":
        return asked, "asked for"
    angles = sizes_of_labels(poses)[:, 3:]
    if not np.isfinite(angles).any():
        angles = np.abs(poses["motion"][:, 3:])
    largest = angles[angles <= LARGEST_LABEL].max(initial=0.0)  # 0: nothing is known
    known = f"largest in the files: {largest:.4g}"
    if largest == 0 or largest > math.pi + 1e-6:
        return "deg", known
    # angles as the files have them: a rounded digit of them, 57 times as large in degrees, tells no unit
    degrees = {"deg": 1.0, "rad": math.pi / 180}  # one degree in each unit
    missed = {unit: best_miss(in_degrees(poses, unit), degree) for unit, degree in degrees.items()}
    best, other = sorted(missed, key=missed.get)
    if missed[other] > 2 * missed[best] + 0.01:
        return best, (f"{known}; as mm and {best} at2 is missed by {missed[best]:.3g}, "
                      f"as mm and {other} by {missed[other]:.3g}")
    source = "as in the training data" if usual else "guessed from that alone"
    return usual or "rad", f"WARNING: {known}; {source}, --angle_unit tells it"


def check_positions(poses):
    """UserError where most positions of an axis are beyond 200: these are no outliers."""
    sizes = sizes_of_labels(poses)
    n_far = (sizes > LARGEST_LABEL).sum(0)
    n_known = (~np.isnan(sizes)).sum(0)
    far = [f"{axis} ({count} of {known})" for axis, count, known in zip(AXES, n_far, n_known) if 2 * count > known]
    if far:
        raise common.UserError(
            f"{', '.join(far)} of at1 and at2 are beyond {LARGEST_LABEL:g}: poses in the frame of the tracker? Give "
            "them relative to the target view, in mm and degrees from -180 to 180.")


def check_sequences(poses, sequences, unit):
    """Notes that name sequences which seem to be in other units than mm and the one in which angles are read.

    Positions: below 1, and far smaller beside the angles than those of other
    sequences. Angles: as choose_unit tells.
    """
    other = "deg" if unit == "rad" else "rad"
    turned = []
    small = {}  # sequence whose positions are below 1 -> how large they are beside its angles
    in_mm = []  # the same of the other sequences
    for name, rows in common.rows_by_key(sequences).items():
        own = {key: values[rows] for key, values in poses.items()}
        sizes = sizes_of_labels(own)
        sizes[~(sizes <= LARGEST_LABEL)] = 0.0  # no poses
        position = sizes[:, :3].max()
        angle = sizes[:, 3:].max()
        if angle and choose_unit(own, "auto", unit)[0] != unit:
            turned.append(name)
        ratio = position / (angle or 1.0)
        if position >= 1:
            in_mm.append(ratio)
        elif position:
            small[name] = ratio
    limit = np.median(in_mm or math.inf) / 100
    in_metres = [name for name, ratio in small.items() if ratio < limit]
    texts = {"positions in metres?": in_metres, f"angles in {other}, not in {unit}?": turned}
    return [f"WARNING: {text} Give all in mm and degrees: {common.shorten_list(names)}"
            for text, names in texts.items() if names]


def mask_labels(poses, unit):
    """Turn radians into degrees and take out, in place, what is no pose: NaN, infinite, beyond 200. Returns notes."""
    notes = []
    for name, values in in_degrees(poses, unit).items():
        absent = np.isnan(poses[name]).all(1)
        wild = np.isnan(values) & ~absent[:, None]
        poses[name] = values
        in_rows = wild.any(1)  # (N,)
        if in_rows.any():
            level = "WARNING: " if in_rows.mean() > LARGE_MASKED else ""
            notes.append(
                f"{level}{wild.sum()} values of {FIELDS[name]} in {in_rows.sum()} rows masked "
                f"(NaN, or beyond {LARGEST_LABEL:g}; angles go from -180 to 180)")
        if absent.any():
            notes.append(f"{absent.sum()} rows have no {FIELDS[name]}")
    return notes


def read_order(poses, asked, usual):
    """Poses whose angles have another Euler order are turned, in place, into ours.

    Returns (order, notes).

    auto: the usual one or ours, unless it fits poorly and another one fits far better.
    """
    usual = usual or "zyx"
    order = asked
    why = "asked for"
    if asked == "auto":
        order = usual
        why = "as in the training data"
        found = {tried: best_miss(from_order(poses, tried)) for tried in EULER_ORDERS}
        best = min(found, key=found.get)
        if found[usual] > 0.01 and found[best] < found[usual] / 10:
            order = best
            why = f"at2 is missed by {found[best]:.3g} mm and degrees instead of {found[usual]:.3g}: --euler_order"
    if order == usual == "zyx":
        return order, []
    poses.update(from_order(poses, order))
    factors = " ".join(f"R{axis}" for axis in order)
    level = "" if order in (asked, usual) else "WARNING: "
    remark = ", unlike those of the training data" if order == "zyx" else " and turned into R = Rz Ry Rx"
    return order, [f"{level}angles are read as R = {factors}{remark} ({why})"]


def choose_composition(asked, residuals, usual):
    """(convention, sentence on why): the one asked for, or the one with the smallest residual on the data."""
    tried = dict(zip(CONVENTIONS, residuals))
    missed = {name: row["mm"] + row["deg"] for name, row in tried.items()}
    best = min(missed, key=missed.get, default="additive")
    chosen = best if asked == "auto" else asked
    if not tried:
        return chosen, f"composition {chosen}: untested, no row has at1, motion and at2"
    reasons = {"auto": "the best fit", usual: "as in the training data"}
    why = reasons.get(asked, "asked for")
    text = (
        f"composition {chosen} ({why}): at2 missed by {tried[chosen]['mm']:.3g} mm and "
        f"{tried[chosen]['deg']:.3g} degrees on average")
    if missed[chosen] > LARGE_RESIDUAL or missed[chosen] > 2 * missed[best] + 0.01:
        text += ": a poor fit; check --angle_unit, --euler_order and which way the motion goes"
    return chosen, text


def complete_poses(poses, convention):
    """Derive, in place, whole poses that a row lacks from the other two. Returns notes."""
    lacking = {name: np.isnan(values).all(1) for name, values in poses.items()}
    has_others = sum(lacking.values()) == 1
    notes = []
    for name in poses:  # at1, motion, at2
        rows = lacking[name] & has_others
        if rows.any():
            others = [values[rows] for other, values in poses.items() if other != name]
            poses[name][rows] = on_arrays(getattr(CONVENTIONS[convention], name), *others)
            notes.append(f"{rows.sum()} rows: {FIELDS[name]} derived from the other two ({convention})")
    return notes


def complete_rows(transitions, asked_unit, asked_composition, asked_order, usual):
    """({at1, motion, at2: (N, 6)} of N Transitions, checked and completed, what was found on the way).

    usual: {angle_unit, euler_order, compose} of the data that a model was trained on, {}
    where there is none. Found are the same three of these data, residuals (of
    composition_residuals) and notes.
    """
    poses = {name: np.stack([row.poses[name] for row in transitions]) for name in FIELDS}
    check_positions(poses)
    unit, why = choose_unit(poses, asked_unit, usual.get("angle_unit"))
    notes = check_sequences(poses, [row.sequence for row in transitions], unit)
    notes += [f"angles are read as {unit} ({why})", *mask_labels(poses, unit)]
    order, reordered = read_order(poses, asked_order, usual.get("euler_order"))
    notes += reordered
    residuals = composition_residuals(**poses)
    convention, text = choose_composition(asked_composition, residuals, usual.get("compose"))
    notes += [text, *complete_poses(poses, convention)]
    return poses, {
        "angle_unit": unit, "euler_order": order, "compose": convention, "residuals": residuals, "notes": notes}


def missing_frames(transitions, needs_labels, imagines):
    """N texts on the picture that a row needs and lacks, '' = none.

    needs_labels: for all but prediction. imagines: by a world model, which learns from
    the frame at t2.
    """
    def missing(row):
        if row.path_t1 is None:
            return f"no file {row.ft1!r}"
        if row.path_t2 or not needs_labels:
            return ""
        if row.ft2:
            return f"no file {row.ft2!r}"
        return "no ft2_image_path" if imagines else ""
    return list(map(missing, transitions))


def missing_poses(poses, needs_labels, imagines):
    """(N,) text on the pose that a row needs and lacks, '' = none; needs_labels, imagines: as in missing_frames."""
    lacks_motion = np.isnan(poses["motion"]).any(1)
    lacks_label = np.isnan(np.hstack([poses["at1"], poses["at2"]])).all(1)
    return np.select(
        [lacks_motion & (needs_labels or imagines), lacks_label & needs_labels],
        [f"no usable {FIELDS['motion']}", "no usable label"], "")


# --------------------------------------------------------------------------------------
# Patients
# --------------------------------------------------------------------------------------

def patients_of(sequences, patient_map, patient_regex):
    """{sequence: patient} from --patient_map or --patient_regex; without both the folder's own name.

    patient_map: file of csv_tables.read_pairs, folder and patient; a folder may stand
    without the folders above it.
    """
    folders = sorted(set(sequences))
    patients = dict(zip(folders, folders))
    if patient_map:
        pairs = csv_tables.read_pairs(patient_map, "--patient_map", ("folder", "patient"))
        named = {file_names.clean_name(folder).rstrip("/"): patient for folder, patient in pairs.items()}
        patients = {folder: named.get(folder, named.get(Path(folder).name)) for folder in folders}
    elif patient_regex:
        found = {folder: re.search(patient_regex, folder) for folder in folders}
        patients = {folder: match[min(1, match.re.groups)] for folder, match in found.items() if match}
    unknown = [folder for folder in folders if not patients.get(folder)]
    if unknown:
        raise common.UserError(
            f"--patient_map or --patient_regex names no patient for "
            f"{common.shorten_list(unknown)}; every folder needs one")
    return patients


def similar_names(sequences):
    """Lines on folders (N,) that may belong to one patient: names that differ in a last number only."""
    folders = np.unique(sequences)
    alike = common.rows_by_key(re.sub(r"[_-]?\d+$", "", folder) for folder in folders)
    return [f"names alike: {common.shorten_list(folders[rows], 6)}; one patient? " r"--patient_regex '(.*?)[_-]?\d+$'"
            for rows in alike.values() if len(rows) > 1]
