"""Formats that transitions come in, patients and splits: what train_dreamer.py reads, masks, derives and refuses.

    python -m pytest tests/test_dreamer_data.py
"""
import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import common
import make_sample_data
from evidence import baseline_models, pose_audit, pose_scores, prediction_tables, seen_rows, splitting
import train_dreamer
from conftest import only_run, run_script
from readers.probe_poses import FIELDS
from readers import picture_files, probe_poses

DRAWS = np.random.default_rng(11)
NONE_SEEN = seen_rows.SeenRows([], [])


def write_sequence(folder, count=6, motions="additive", edit=None, wrap=None, scale=1.0):
    """A sequence of `count` transitions with 32 px frames; edit(rows) changes them, wrap(rows) makes the JSON."""
    poses = np.hstack([DRAWS.uniform(-20, 20, (count + 1, 3)), DRAWS.uniform(-60, 60, (count + 1, 3))])
    motion = probe_poses.on_arrays(probe_poses.CONVENTIONS[motions].motion, poses[:-1], poses[1:])
    turned = np.array([1, 1, 1, scale, scale, scale])
    pictures = DRAWS.integers(0, 255, (count + 1, 32, 32), dtype=np.uint8)
    for which, first in (("ft1", 0), ("ft2", 1)):
        (folder / which).mkdir(parents=True)
        for i in range(first, first + count):
            Image.fromarray(pictures[i]).save(folder / which / f"frame_{i:04d}.png")
    rows = [{"frame_t1": f"frame_{i:04d}", "frame_t2": f"frame_{i + 1:04d}",
             "ft1_image_path": f"ft1/frame_{i:04d}.png", "ft2_image_path": f"ft2/frame_{i + 1:04d}.png",
             "at1_6dof": (poses[i] * turned).tolist(), "action_change_6dof": (motion[i] * turned).tolist(),
             "at2_6dof": (poses[i + 1] * turned).tolist()} for i in range(count)]
    if edit:
        edit(rows)
    (folder / probe_poses.FILE_NAME).write_text(json.dumps(wrap(rows) if wrap else rows))
    return poses[:-1], motion, poses[1:]


class QuietRun:
    """As much of common.Run as loading needs."""

    def __init__(self, folder):
        self.folder, self.lines = Path(folder), []

    def say(self, text=""):
        self.lines.append(str(text))

    def path(self, name):
        return self.folder / name


def load(data, *flags, needs_labels=True, usual=None):
    own = ["--data_dir", str(data), "--image_size", "32", "--cache", "none"]
    args = train_dreamer.parse_args([*own, *map(str, flags)])
    run = QuietRun(data.parent)
    study = train_dreamer.load_study(args, run, needs_labels, usual=usual)
    return study, "\n".join(run.lines), args


def test_a_plain_list_is_read_as_it_stands(tmp_path):
    at1, motion, at2 = write_sequence(tmp_path / "data" / "a_01")
    study, _, _ = load(tmp_path / "data")
    assert np.array_equal(study.at1, at1) and np.array_equal(study.motion, motion) and np.array_equal(study.at2, at2)
    assert study.names[0] == "a_01/frame_0000-frame_0001" and study.compose == "additive"
    assert len(study.store) == 7, "a frame that is ft2 of one row and ft1 of the next is decoded once"


def test_linked_folders_are_sequences_and_hidden_ones_are_not(tmp_path):
    for name in ("elsewhere/a_01", "data/b_01", "data/.Trash/c_01"):
        write_sequence(tmp_path / name)
    (tmp_path / "data" / "a_01").symlink_to(tmp_path / "elsewhere" / "a_01")
    rows, _ = probe_poses.find_transitions(tmp_path / "data", limit=1, exact_names=False)
    assert [row.sequence for row in rows] == ["a_01", "b_01"] and all(row.path_t1 for row in rows)


def backslashes(rows):
    for row in rows:
        for key in ("ft1_image_path", "ft2_image_path"):
            row[key] = row[key].replace("/", "\\")


def no_folders_and_capitals(rows):
    for row in rows:
        row["ft1_image_path"] = "data_x/FT1/" + row["frame_t1"].upper() + ".PNG"


def two_spellings(rows):
    for row in rows[:-1]:  # the frame at t1 of the next row
        row["ft2_image_path"] = f"./FT1\\{row['frame_t2'].upper()}.PNG"


FORMS = {
    "two spellings of one picture": {"edit": two_spellings},
    "backslashes": {"edit": backslashes},
    "extra keys": {"edit": lambda rows: [row.update(operator="A", id=i) for i, row in enumerate(rows)]},
    "a dict with the list": {"wrap": lambda rows: {"version": 2, "transitions": rows}},
    "other folders and case": {"edit": no_folders_and_capitals},
    "no frame names": {"edit": lambda rows: [row.pop(key) for row in rows for key in ("frame_t1", "frame_t2")]},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_the_wild_give_the_same(tmp_path, form):
    at1, motion, at2 = write_sequence(tmp_path / "data" / "a_01", **FORMS[form])
    study, _, _ = load(tmp_path / "data")
    assert np.array_equal(study.at1, at1) and np.array_equal(study.at2, at2) and len(study.store) == 7


def test_colour_pngs_become_the_same_grey(tmp_path):
    write_sequence(tmp_path / "data" / "a_01")
    study, _, args = load(tmp_path / "data")
    plain = train_dreamer.ProbeTransitions(study, np.arange(6), args, "none")[0, 2]["frames"]
    for path in (tmp_path / "data").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    study, _, args = load(tmp_path / "data")
    colour = train_dreamer.ProbeTransitions(study, np.arange(6), args, "none")[0, 2]["frames"]
    on_disk = np.asarray(Image.open(tmp_path / "data" / "a_01" / "ft1" / "frame_0002.png").convert("L"))
    assert colour.shape == (2, 1, 32, 32) and np.array_equal(colour[0, 0].numpy(), on_disk)
    assert np.array_equal(plain.numpy(), colour.numpy())


@pytest.mark.parametrize("motions", probe_poses.CONVENTIONS)
@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_pose_is_derived_in_the_convention_of_the_data(tmp_path, motions, name):
    def edit(rows):
        for row in rows[:3]:
            row.pop(FIELDS[name])
    poses = dict(zip(FIELDS, write_sequence(tmp_path / "data" / "a_01", motions=motions, edit=edit)))
    study, text, _ = load(tmp_path / "data")
    assert study.compose == motions
    error = probe_poses.on_arrays(probe_poses.pose_error, getattr(study, name), poses[name])
    assert np.abs(error).max() < 1e-6 and f"3 rows: {FIELDS[name]} derived" in text


def test_bad_labels_are_masked_and_counted(tmp_path):
    def edit(rows):
        rows[0]["at1_6dof"][1] = float("nan")
        rows[1]["at2_6dof"][4] = 9999.0
        rows[2]["at1_6dof"][0] = -201.0
        rows[3]["at1_6dof"][5] = None
    at1, _, at2 = write_sequence(tmp_path / "data" / "a_01", edit=edit)
    study, text, _ = load(tmp_path / "data")
    masked = {(0, 1), (2, 0), (3, 5)}
    assert {tuple(cell) for cell in np.argwhere(np.isnan(study.at1)).tolist()} == masked
    assert np.argwhere(np.isnan(study.at2)).tolist() == [[1, 4]]
    assert np.array_equal(study.at1[~np.isnan(study.at1)], at1[~np.isnan(study.at1)])
    assert "3 values of at1_6dof in 3 rows masked" in text and "1 values of at2_6dof" in text
    assert text.count("WARNING: 3 values") == text.count("WARNING: 1 values") == 1, "a half and a sixth of the rows"


def test_bad_labels_of_the_sample_data_are_masked(tmp_path):
    draws = np.random.default_rng(0)
    poses = make_sample_data.make_path(7, draws)
    make_sample_data.write_sequence(tmp_path / "data" / "patient_000_01", poses, np.eye(3), [], "bad_labels", draws)
    study, _, _ = load(tmp_path / "data")
    masked = np.zeros((6, 6), bool)
    masked[2, 1] = True
    assert np.array_equal(np.isnan(study.at1), masked) and np.allclose(study.at1[~masked], poses[:-1][~masked], atol=1e-4)
    assert np.flatnonzero(np.isnan(study.at2)).tolist() in ([], [4 * 6 + 3])


def test_a_label_that_is_masked_by_accident_is_a_note(tmp_path):
    def edit(rows):
        rows[0]["at1_6dof"][1] = 9999.0
    write_sequence(tmp_path / "data" / "a_01", count=24, edit=edit)
    assert "note: 1 values of at1_6dof in 1 rows masked" in load(tmp_path / "data")[1]


def test_a_row_without_motion_and_without_a_way_to_it_is_listed(tmp_path):
    def edit(rows):
        del rows[2]["action_change_6dof"], rows[2]["at2_6dof"]
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    study, text, args = load(tmp_path / "data")
    assert len(study.names) == 5 and "1 rows skipped" in text
    assert study.skipped == [{"sequence": "a_01", "row": 3, "reason": "no usable action_change_6dof"}]
    train_dreamer.audit(QuietRun(tmp_path), args)
    assert "a_01,3,no usable" in (tmp_path / "skipped.csv").read_text()


def test_other_patients_are_other_data(tmp_path):
    for name in "ab":
        write_sequence(tmp_path / "data" / name)
    prints = []
    for owners in {"a": "A", "b": "B"}, {"a": "B", "b": "A"}:
        common.write_json(tmp_path / "map.json", owners)
        study, _, _ = load(tmp_path / "data", "--patient_map", tmp_path / "map.json")
        prints.append(study.data_record({})["fingerprint"])
    assert prints[0] != prints[1]


@pytest.mark.parametrize("asked", ["auto", "rad"])
def test_radians_are_turned_into_degrees(tmp_path, asked):
    at1, motion, _ = write_sequence(tmp_path / "data" / "a_01", scale=np.pi / 180)
    study, text, _ = load(tmp_path / "data", "--angle_unit", asked)
    assert np.allclose(study.at1, at1) and np.allclose(study.motion, motion)
    assert study.angle_unit == "rad" and "angles are read as rad" in text


def write_poses(rows, poses, unit=1.0, order="zyx", motions="se3_left"):
    """Sets the poses (N + 1, 6) of a sequence, with angles in another unit or Euler order; returns those of at1."""
    motion = probe_poses.on_arrays(probe_poses.CONVENTIONS[motions].motion, poses[:-1], poses[1:])
    for key, values in (("at1_6dof", poses[:-1]), ("action_change_6dof", motion), ("at2_6dof", poses[1:])):
        angles = np.empty((len(values), 3))  # roll about x, pitch about y, yaw about z
        turn = Rotation.from_euler("ZYX", values[:, :2:-1], degrees=True)
        angles[:, ["xyz".index(axis) for axis in order]] = turn.as_euler(order.upper(), degrees=True)
        for row, place, own in zip(rows, values, angles):
            row[key] = [*place[:3].tolist(), *(own * unit).tolist()]
    return poses[:-1]


def sweep(count):
    """Poses of a linear sweep whose angles stay under 3 degrees."""
    return np.hstack([np.linspace([-10, 5, 30], [40, 8, 60], count), DRAWS.uniform(-2.5, 2.5, (count, 3))])


@pytest.mark.parametrize("unit, named", [(1.0, "deg"), (np.pi / 180, "rad")])
def test_small_angles_are_read_in_the_unit_in_which_the_poses_compose(tmp_path, unit, named):
    poses = sweep(21)
    write_sequence(tmp_path / "data" / "a_01", count=20, edit=lambda rows: write_poses(rows, poses, unit))
    study, text, _ = load(tmp_path / "data")
    assert study.angle_unit == named and study.compose == "se3_left" and "guessed" not in text
    np.testing.assert_allclose(study.at1, poses[:-1], atol=1e-9)


def test_frames_without_labels_are_read_in_the_unit_of_the_training_data(tmp_path):
    def edit(rows):
        write_poses(rows, sweep(21) * [1, 1, 1, 0.3, 0.3, 0.3])
        for row in rows:
            del row["at1_6dof"], row["at2_6dof"]
    write_sequence(tmp_path / "data" / "a_01", count=20, edit=edit)
    usual = {"angle_unit": "deg", "euler_order": "zyx", "compose": "se3_left"}
    study, text, _ = load(tmp_path / "data", "--compose", "se3_left", needs_labels=False, usual=usual)
    assert study.angle_unit == "deg" and "as in the training data" in text
    assert load(tmp_path / "data", "--compose", "se3_left", needs_labels=False)[0].angle_unit == "rad"


def test_a_unit_that_only_the_size_tells_is_a_warning(tmp_path):
    write_sequence(tmp_path / "data" / "a_01", count=20, edit=lambda rows: write_poses(rows, sweep(21),
                                                                                              motions="additive"))
    study, text, _ = load(tmp_path / "data")
    assert study.angle_unit == "rad" and "WARNING" in text and "--angle_unit" in text
    assert "guessed" not in load(tmp_path / "data", "--angle_unit", "deg")[1]


@pytest.mark.parametrize("order", ["xyz", "zxy", "yxz"])
def test_another_euler_order_is_found_named_and_turned_into_ours(tmp_path, order):
    poses = np.hstack([DRAWS.uniform(-20, 20, (21, 3)), DRAWS.uniform(-40, 40, (21, 3))])
    write_sequence(tmp_path / "data" / "a_01", count=20, edit=lambda rows: write_poses(rows, poses, order=order))
    study, text, _ = load(tmp_path / "data")
    factors = " ".join(f"R{axis}" for axis in order)
    assert study.euler_order == order and study.compose == "se3_left"
    assert f"WARNING: angles are read as R = {factors}" in text
    np.testing.assert_allclose(study.at1, poses[:-1], atol=1e-6)
    assert load(tmp_path / "data", "--euler_order", "zyx")[0].euler_order == "zyx"


@pytest.mark.parametrize("shift", [400, -400])
def test_poses_in_the_frame_of_a_tracker_are_refused_by_axis_and_not_masked_away(tmp_path, shift):
    def edit(rows):
        for row in rows:
            for key in ("at1_6dof", "at2_6dof"):
                row[key][2] += shift
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    with pytest.raises(common.UserError, match=r"z_mm \(12 of 12\) of at1 and at2 are beyond 200.*tracker"):
        load(tmp_path / "data")


def test_metres_are_noticed(tmp_path):
    def edit(rows):
        for row in rows:
            for key in ("at1_6dof", "action_change_6dof", "at2_6dof"):
                row[key][:3] = [value / 1000 for value in row[key][:3]]
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    assert "positions in metres? Give all in mm and degrees: a_01" in load(tmp_path / "data")[1]


@pytest.mark.parametrize("unit, length, said", [
    (np.pi / 180, 1, "angles in rad, not in deg? Give all in mm and degrees: b_01"),
    (1, 0.001, "positions in metres? Give all in mm and degrees: b_01"), (1, 1, None)])
def test_a_sequence_in_other_units_than_the_rest_is_named(tmp_path, unit, length, said):
    """Its poses fit one another, and beside the others it would be a patient whose probe hardly moves."""
    poses = np.hstack([DRAWS.uniform(-20, 20, (7, 3)), DRAWS.uniform(-40, 40, (7, 3))])
    nearly_at_rest = poses / 1000  # positions and angles: no other unit

    def edit(rows):
        write_poses(rows, poses, unit)
        for row in rows:
            for key in probe_poses.FIELDS.values():
                row[key][:3] = [length * value for value in row[key][:3]]
    for name, change in (("a_01", poses), ("a_02", poses[::-1]), ("c_01", nearly_at_rest)):
        write_sequence(tmp_path / "data" / name, edit=lambda rows: write_poses(rows, change))
    write_sequence(tmp_path / "data" / "b_01", edit=edit)
    warnings = [line for line in load(tmp_path / "data")[1].splitlines() if "Give all in mm and degrees" in line]
    assert warnings == ([f"note: WARNING: {said}"] if said else [])


def transitions(poses, unit=1.0, order="zyx", motions="se3_left", labelled=True):
    """Rows of a file as _read_row makes them, without pictures."""
    rows = [{"ft1_image_path": f"{i}.png"} for i in range(len(poses) - 1)]
    write_poses(rows, poses, unit, order, motions)
    for row in rows:
        if not labelled:
            del row["at1_6dof"], row["at2_6dof"]
    return [probe_poses._read_row(row, "a", number) for number, row in enumerate(rows, 1)]


def rounded(rows, decimals):
    """These rows as a file holds them that was written with so many decimals."""
    for row in rows:
        for name, values in row.poses.items():
            row.poses[name] = values.round(decimals)
    return rows


def approach(first):
    """Poses on a straight way to the target view, where the probe rests for three frames."""
    return np.outer([*np.linspace(1, 0.2, 30), 0, 0, 0], first)


@pytest.mark.parametrize("asked", ["auto", "rad"])
def test_rounded_radians_are_not_taken_for_degrees(asked):
    """In degrees the last digit misses at2 by a 57th of what it does in radians, and says nothing of the unit."""
    rows = rounded(transitions(approach([31, -17, 23, 20.3, -29.1, 11.7]), np.pi / 180, motions="additive"), 3)
    found, facts = probe_poses.complete_rows(rows, asked, "auto", "auto", {})
    assert (facts["angle_unit"], facts["compose"]) == ("rad", "additive")
    assert any("WARNING" in note for note in facts["notes"]) == (asked == "auto"), facts["notes"]
    assert np.abs(found["at1"]).max() == pytest.approx(31, abs=0.01) and np.abs(found["at1"][0, 4]) > 29


def test_sequences_near_the_target_are_not_in_other_units():
    """At rest there 0 fits in any unit, and short ones go less than a mm."""
    whole = approach([31, -17, 23, 20.3, -29.1, 11.7])
    near = approach([0.6, -0.4, 0.5, 0.7, 0.3, -0.6])
    rows = []
    for name, poses in {"whole": whole, "near_1": near, "near_2": -near, "near_3": near / 2}.items():
        own = rounded(transitions(poses, motions="additive"), 1)
        rows += [dataclasses.replace(row, sequence=name) for row in own]
    _, facts = probe_poses.complete_rows(rows, "auto", "auto", "auto", {})
    assert not any("Give all" in note for note in facts["notes"]), facts["notes"]


@pytest.mark.parametrize("unit, named", [(1.0, "deg"), (np.pi / 180, "rad")])
def test_data_tell_their_unit_whatever_the_model_was_trained_on(unit, named):
    poses = sweep(21)
    for usual in ("deg", "rad"):
        found, facts = probe_poses.complete_rows(
            transitions(poses, unit), "auto", "se3_left", "auto", {"angle_unit": usual, "euler_order": "zyx"})
        assert facts["angle_unit"] == named
        np.testing.assert_allclose(found["at1"], poses[:-1], atol=1e-9)


@pytest.mark.parametrize("usual", ["deg", "rad"])
def test_data_that_do_not_tell_their_unit_are_read_as_the_training_data(usual):
    """New frames without labels, small motions: a guess by their size would be radians."""
    rows = transitions(sweep(21) * [1, 1, 1, 0.3, 0.3, 0.3], labelled=False)
    found, facts = probe_poses.complete_rows(
        rows, "auto", "se3_left", "auto", {"angle_unit": usual, "euler_order": "xyz"})
    assert (facts["angle_unit"], facts["euler_order"]) == (usual, "xyz")
    assert "WARNING" in facts["notes"][0] and "as in the training data, --angle_unit" in facts["notes"][0]
    assert any(note.startswith("angles are read as R = Rx Ry Rz") for note in facts["notes"])
    motion = np.stack([row.poses["motion"] for row in rows])
    motion[:, 3:] *= 1.0 if usual == "deg" else 180 / np.pi
    np.testing.assert_allclose(found["motion"], probe_poses.from_order({"motion": motion}, "xyz")["motion"])


@pytest.mark.parametrize("order", ["zyx", "xyz"])
def test_data_tell_their_euler_order_whatever_the_model_was_trained_on(order):
    poses = np.hstack([DRAWS.uniform(-20, 20, (21, 3)), DRAWS.uniform(-40, 40, (21, 3))])
    for usual in ("zyx", "xyz"):
        found, facts = probe_poses.complete_rows(
            transitions(poses, order=order), "auto", "auto", "auto", {"angle_unit": "deg", "euler_order": usual})
        assert facts["euler_order"] == order
        warnings = [note for note in facts["notes"] if note.startswith("WARNING: angles are read as R = ")]
        assert len(warnings) == (order != usual), "a change from the training data, to our order or from it"
        np.testing.assert_allclose(found["at1"], poses[:-1], atol=1e-6)


def test_a_wrong_unit_can_be_forced_and_spoils_the_composition(tmp_path):
    write_sequence(tmp_path / "data" / "a_01", motions="se3_left", scale=np.pi / 180)
    study, text, _ = load(tmp_path / "data", "--angle_unit", "deg", "--compose", "se3_left")
    assert study.residuals[1]["mm"] > 1 and "poor fit" in text


def test_a_statistics_file_is_ignored_and_nothing_is_written(tmp_path):
    write_sequence(tmp_path / "data" / "a_01")
    (tmp_path / "data" / "a_01" / "normalization_stats.json").write_text('{"mean": 1e9}')
    before = sorted(tmp_path.glob("data/**/*"))
    study, _, _ = load(tmp_path / "data")
    assert np.abs(study.at1).max() < 100 and sorted(tmp_path.glob("data/**/*")) == before


MISTAKES = {
    "five numbers": (lambda rows: rows[1]["at1_6dof"].pop(), ["row 2", "6 numbers", "at1_6dof"]),
    "a word": (lambda rows: rows[1].update(at1_6dof=["left"] * 6), ["row 2"]),
    "a path that is a number": (lambda rows: rows[1].update(ft1_image_path=7), ["row 2", "ft1_image_path, found 7"]),
    "no path": (lambda rows: rows[0].pop("ft1_image_path"), ["row 1", "ft1_image_path"]),
    "a path that leaves": (lambda rows: rows[3].update(ft2_image_path="../../etc/passwd.png"), ["row 4", "no file"]),
    "an absolute path": (lambda rows: rows[3].update(ft1_image_path="C:\\frames\\1.png"), ["row 4", "no file"]),
    "a missing picture": (lambda rows: rows[5].update(ft2_image_path="ft2/gone.png"), ["gone.png", "--on_bad_file"]),
    "a number beyond all bounds": (lambda rows: rows[1]["at1_6dof"].__setitem__(0, 10**400), ["row 2", "too large"]),
    "a name of two pictures": (lambda rows: rows[2].update(ft1_image_path="ft1/two"), ["ft1/two -> ", "two.jpg"]),
    "a row twice": (lambda rows: rows.append(dict(rows[0])), ["listed twice"]),
    "an empty list": (lambda rows: rows.clear(), ["expected a list of transitions", "found []"]),
    "a row that is a list": (lambda rows: rows.insert(1, [1, 2]), ["row 2", "an object with the fields", "[1, 2]"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_read_is_named(tmp_path, mistake):
    edit, words = MISTAKES[mistake]
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    for suffix in ("png", "jpg"):
        Image.new("L", (32, 32)).save(tmp_path / "data" / "a_01" / "ft1" / f"two.{suffix}")
    with pytest.raises(common.UserError) as error:
        load(tmp_path / "data")
    assert all(word in str(error.value) for word in words) and "a_01" in str(error.value), error.value


def test_all_missing_and_unreadable_pictures_are_listed_or_skipped(tmp_path):
    written = write_sequence(
        tmp_path / "data" / "a_01", edit=lambda rows: rows[0].update(ft1_image_path="ft1/gone.png"))
    (tmp_path / "data" / "a_01" / "ft2" / "frame_0004.png").write_bytes(b"no picture")
    study, _, args = load(tmp_path / "data", "--on_bad_file", "skip")
    assert [row["reason"][:10] for row in study.skipped] == ["no file 'f", "unreadable"]
    assert [row["row"] for row in study.skipped] == [1, 4]
    kept = [1, 2, 4, 5]  # each with its own poses and pictures
    assert study.order.tolist() == kept
    assert study.names.tolist() == [f"a_01/frame_000{i}-frame_000{i + 1}" for i in kept]
    assert all(np.allclose(found, poses[kept]) for found, poses in zip((study.at1, study.motion, study.at2), written))
    samples = train_dreamer.ProbeTransitions(study, np.arange(4)[::-1], args, "none")
    for row, i in enumerate(kept):
        sample = samples[0, 3 - row]
        for which, name in enumerate((f"ft1/frame_{i:04d}.png", f"ft2/frame_{i + 1:04d}.png")):
            with Image.open(tmp_path / "data" / "a_01" / name) as picture:
                assert np.array_equal(study.picture(study.frames[row, which])[:, :, 0], picture)
                assert np.array_equal(sample["frames"][which, 0], picture)
        for name, poses in zip(FIELDS, written):
            assert np.allclose(sample[name], poses[i], atol=1e-5)
    with pytest.raises(common.UserError, match="gone.png"):
        load(tmp_path / "data")


@pytest.mark.parametrize("flags", [[], ["--mode", "predict", "--checkpoint", "x"]])
def test_data_whose_pictures_are_all_unreadable_are_refused(tmp_path, flags):
    write_sequence(tmp_path / "data" / "a_01")
    for path in (tmp_path / "data").rglob("frame_000[0-5].png"):
        path.write_bytes(b"no picture")
    with pytest.raises(common.UserError, match=r"none of 6 transitions can be used \(first: unreadable picture"):
        load(tmp_path / "data", "--on_bad_file", "skip", *flags, needs_labels=not flags)


def test_every_empty_picture_is_named_at_once(tmp_path):
    """Their contents are the same, but not one picture."""
    write_sequence(tmp_path / "data" / "a_01")
    for name in ("ft1/frame_0001.png", "ft2/frame_0004.png"):
        (tmp_path / "data" / "a_01" / name).write_bytes(b"")
    with pytest.raises(common.UserError, match=r"2 of 9 pictures cannot(?s:.*)frame_0001.png(?s:.*)frame_0004.png"):
        load(tmp_path / "data")


def test_prediction_needs_neither_labels_nor_the_second_frame(tmp_path):
    def edit(rows):
        for row in rows:
            del row["at1_6dof"], row["at2_6dof"], row["ft2_image_path"]
    _, motion, _ = write_sequence(tmp_path / "data" / "a_01", edit=edit)
    study, _, args = load(tmp_path / "data", needs_labels=False)
    assert np.array_equal(study.motion, motion) and np.isnan(study.at1).all()
    assert np.array_equal(study.frames[:, 0], study.frames[:, 1])
    sample = train_dreamer.ProbeTransitions(study, np.arange(6), args, "none")[0, 1]
    assert sample["frames"].shape == (2, 1, 32, 32)


def test_prediction_off_the_frame_needs_nothing_but_frames(tmp_path, recwarn):
    """A world model imagines from the motion."""
    def edit(rows):
        for row in rows:
            del row["at1_6dof"], row["at2_6dof"], row["action_change_6dof"], row["ft2_image_path"]
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    study, _, _ = load(tmp_path / "data", needs_labels=False)
    table = train_dreamer.predictions_table(study, np.arange(6), np.full((6, 6), 190.0), {}, NONE_SEEN)
    assert (table.predicted == [190.0] * 3 + [-170.0] * 3).all() and not recwarn.list
    with pytest.raises(common.UserError, match="no usable action_change_6dof"):
        load(tmp_path / "data", "--token_type", "spatial", needs_labels=False)


def test_the_poses_of_a_predictions_table_subtract(tmp_path):
    """A yaw on both sides of 180, predicted 1.5 degrees too large."""
    def edit(rows):
        for i, row in enumerate(rows):
            for key, yaw in (("at1_6dof", (i + 357.0) % 360 - 180), ("action_change_6dof", 1.0),
                             ("at2_6dof", (i + 358.0) % 360 - 180)):
                row[key][3:] = [0.0, 0.0, yaw]
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    study, _, _ = load(tmp_path / "data")
    rows = np.arange(6)
    table = train_dreamer.predictions_table(study, rows, study.at1 + 1.5, {}, NONE_SEEN)
    assert np.allclose(table.predicted - table.truth, 1.5)


def test_the_second_frame_is_needed_by_a_world_model_alone(tmp_path):
    write_sequence(tmp_path / "data" / "a_01", edit=lambda rows: rows[2].pop("ft2_image_path"))
    assert len(load(tmp_path / "data")[0].names) == 6
    study, _, _ = load(tmp_path / "data", "--token_type", "spatial")
    assert len(study.names) == 5 and study.skipped[0]["reason"] == "no ft2_image_path"


def test_a_frame_may_have_the_number_0(tmp_path):
    write_sequence(tmp_path / "data" / "a_01", edit=lambda rows: rows[0].update(frame_t1=0, frame_t2=1))
    assert load(tmp_path / "data")[0].names[0] == "a_01/0-1"


def test_an_axis_that_never_varies_has_an_sd_of_0():
    poses = np.zeros((3, 6))
    poses[:, 0] = [1, 2, 3]
    poses[:, 5] = np.nan
    ranges = pose_audit.pose_ranges({"at1": poses})["at1"]
    assert [ranges[axis]["sd"] for axis in ("x_mm", "y_mm", "yaw_deg")] == [pytest.approx((2 / 3) ** 0.5), 0, 0]


def test_an_axis_without_a_label_is_named_before_training(tmp_path, recwarn):
    def edit(rows):
        for i, row in enumerate(rows):
            row["at1_6dof"][0] = 10 * i
            row["at1_6dof"][4] = None
    write_sequence(tmp_path / "data" / "a_01", edit=edit)
    study, _, _ = load(tmp_path / "data")
    ranges = {check.name: check for check in pose_audit.check_ranges(study.poses)}
    assert ranges["range at1"].status == "WARN" and ranges["range motion"].status == "OK" and not recwarn.list
    assert pose_audit.check_time(study.place[:2], study.at1[:2]) == [], "any two points are on a line"
    assert pose_audit.check_chain(study.sequences[:1], study.frames[:1], study.at1[:1], study.at2[:1]) == []
    [check] = pose_audit.check_time(study.place, study.at1)
    assert check.status == "WARN" and "x_mm +1.00" in check.found and not recwarn.list
    with pytest.raises(common.UserError, match="no train row has a usable pitch_deg in at1_6dof"):
        train_dreamer.fit_scaler(study, np.arange(6))


def test_the_audit_lists_what_is_missing_or_broken(tmp_path):
    write_sequence(tmp_path / "data" / "a_01", edit=lambda rows: rows[0].update(ft1_image_path="ft1/gone.png"))
    (tmp_path / "data" / "a_01" / "ft2" / "frame_0004.png").write_bytes(b"no picture")
    run_script("train_dreamer.py", "--mode", "audit", "--data_dir", tmp_path / "data", "--image_size", 32,
               "--output_dir", tmp_path / "out")
    checks = json.loads((only_run(tmp_path / "out") / "audit.json").read_text())["checks"]
    failed = {check["name"]: check["found"] for check in checks if check["status"] == "FAIL"}
    assert set(failed) == {"missing files", "unreadable frames"} and "a_01 row 1" in failed["missing files"]
    assert "frame_0004.png" in failed["unreadable frames"]


def test_poses_are_audited_without_any_picture(tmp_path):
    write_sequence(tmp_path / "data" / "a_01")
    for path in (tmp_path / "data" / "a_01").rglob("*.png"):
        path.unlink()
    with pytest.raises(common.UserError, match="pictures that are not there"):
        load(tmp_path / "data")
    run_script("train_dreamer.py", "--mode", "audit", "--data_dir", tmp_path / "data", "--image_size", 32,
               "--output_dir", tmp_path / "out")
    report = json.loads((only_run(tmp_path / "out") / "audit.json").read_text())
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert found["missing files"].startswith("6 rows") and "poses are checked" in found["missing files"]
    assert found["data"].startswith("6 transitions") and report["residuals"]
    assert found["several patients"] == "1 folders", "nobody said whose they are"


# --- patients and splits ---------------------------------------------------------------

@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Six patients with one to three folders each."""
    data = tmp_path_factory.mktemp("clinic") / "data"
    for patient in range(6):
        for number in range(1 + patient % 3):
            write_sequence(data / f"p{patient}_{number + 1:02d}", count=5 + patient)
    return data


def test_patients_by_regex_by_json_and_by_csv(clinic, tmp_path):
    folders = sorted(path.name for path in clinic.iterdir())
    owner = {folder: folder[:2] for folder in folders}
    by_patient = {patient: [f for f in folders if f[:2] == patient] for patient in set(owner.values())}
    files = {"a.json": json.dumps(owner), "b.json": json.dumps(by_patient),
             "C.CSV": "folder,patient\n" + "\n".join(f"{f},{p}" for f, p in owner.items()),
             "d.csv": "Patient;Folder\n" + "\n".join(f"{p};{f}" for f, p in owner.items())}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ways = [["--patient_regex", r"(.*)_\d+$"], *(["--patient_map", tmp_path / name] for name in files)]
    for flags in ways:
        study, text, _ = load(clinic, *flags)
        assert [owner[s] for s in study.sequences] == study.patients.tolist() and "WARNING" not in text


@pytest.mark.parametrize("regex, patient", [(r"(p\d)_(s\d)", "p1"), (r"p\d_s", "p1_s"), (r"_(s\d)", "s2")])
def test_the_first_group_of_a_regex_is_the_patient_and_without_one_all_that_it_matches(regex, patient):
    assert probe_poses.patients_of(["site/p1_s2"], None, regex) == {"site/p1_s2": patient}
    with pytest.raises(common.UserError, match="names no patient for q7; every folder needs one"):
        probe_poses.patients_of(["site/p1_s2", "q7"], None, regex)


def test_folders_of_a_map_have_any_slashes(tmp_path):
    (tmp_path / "map.csv").write_text("ward 1\\p1_01,p1\nward 1/p1_02/,p1\np2_01/,p2\n")
    found = probe_poses.patients_of(["ward 1/p1_01", "ward 1/p1_02", "ward 2/p2_01"], tmp_path / "map.csv", None)
    assert found == {"ward 1/p1_01": "p1", "ward 1/p1_02": "p1", "ward 2/p2_01": "p2"}


def test_without_a_map_folders_are_suspected(clinic):
    study, text, _ = load(clinic)
    assert not study.has_patients and "a folder is not a patient" in text
    assert text.count("names alike") == 4 and "names alike: p2_01, p2_02, p2_03; one patient?" in text
    hint = text.rsplit("--patient_regex '")[-1].split("'")[0]
    assert probe_poses.patients_of(["p2_01", "p2_02", "scan3", "scan10"], None, hint) == {
        "p2_01": "p2", "p2_02": "p2", "scan3": "scan", "scan10": "scan"}


def test_an_incomplete_map_names_what_it_lacks(clinic, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_files, "ImageStore", None)  # said before any picture is decoded
    (tmp_path / "map.json").write_text('{"p0_01": "p0"}')
    with pytest.raises(common.UserError, match="p1_01, p1_02"):
        load(clinic, "--patient_map", tmp_path / "map.json")
    (tmp_path / "map.json").write_text('{"A": ["p0_01", "p1_01"], "B": ["p0_01"]}')
    with pytest.raises(common.UserError, match="map.json: p0_01 is both A and B"):
        load(clinic, "--patient_map", tmp_path / "map.json")
    (tmp_path / "map.json").write_text('["p0_01"]')
    with pytest.raises(common.UserError, match="found list"):
        load(clinic, "--patient_map", tmp_path / "map.json")
    with pytest.raises(common.UserError, match="No such file.*none.json"):
        load(clinic, "--patient_map", tmp_path / "none.json")


@pytest.mark.parametrize("seed", range(5))
def test_patients_never_straddle_a_split_or_a_fold(clinic, seed):
    study, _, args = load(clinic, "--patient_regex", r"(.*)_\d+$", "--seed", seed)
    split = train_dreamer.make_split(args, study)
    owners = {part: set(study.patients[rows]) for part, rows in split.items()}
    assert all(owners.values()) and sum(map(len, owners.values())) == 6
    folds = splitting.make_folds(study.names, 3, None, study.patients, seed)
    assert sum(len(set(study.patients[rows])) for rows in folds) == 6 and sum(map(len, folds)) == len(study.names)


def test_manual_lists_take_folders_or_patients_and_refuse_an_overlap(clinic):
    flags = ["--patient_regex", r"(.*)_\d+$", "--manual_splits"]
    lists = ["--train_patients", "p0,p2_01", "--val_patients", "p1", "--test_patients", "p4"]
    study, _, args = load(clinic, *flags, *lists)
    split = train_dreamer.make_split(args, study)
    assert set(study.patients[split["train"]]) == {"p0", "p2"} and set(study.patients[split["test"]]) == {"p4"}
    _, _, args = load(clinic, *flags, "--train_patients", "p2_01,p0", "--val_patients", "p2_02")
    with pytest.raises(common.UserError, match="split; p2 in train and val"):
        train_dreamer.make_split(args, study)
    _, _, args = load(clinic, *flags, "--train_patients", "p0,p9", "--val_patients", "p1")
    with pytest.raises(common.UserError, match="p9"):
        train_dreamer.make_split(args, study)


def test_a_listed_folder_goes_by_its_last_name_unless_two_patients_share_it():
    """The later one was taken, and the other one left out without a word."""
    folders = np.array(["north/scan_1", "south/scan_1", "north/scan_2"])
    study = types.SimpleNamespace(sequences=folders, patients=folders)
    args = types.SimpleNamespace(manual_splits=True, train_patients="scan_1", val_patients="scan_2", test_patients=None)
    with pytest.raises(common.UserError, match="no such group: scan_1 "):
        train_dreamer.make_split(args, study)
    args.train_patients = "south/scan_1"
    assert [rows.tolist() for rows in train_dreamer.make_split(args, study).values()] == [[1], [2], []]
    study.patients = np.array(["a", "a", "b"])
    args.train_patients = "scan_1"
    assert [rows.tolist() for rows in train_dreamer.make_split(args, study).values()] == [[0, 1], [2], []]


def test_blocks_of_time_keep_their_gap(tmp_path):
    write_sequence(tmp_path / "data" / "a_01", count=60)
    study, _, args = load(tmp_path / "data", "--split_by", "time", "--gap", 4)
    split = train_dreamer.make_split(args, study)
    spans = [(study.order[rows].min(), study.order[rows].max(), len(rows)) for rows in split.values()]
    assert spans == [(0, 35, 36), (40, 47, 8), (52, 59, 8)]
    frames = [set(study.frames[rows].ravel().tolist()) for rows in split.values()]
    assert frames[0].isdisjoint(frames[1]) and frames[1].isdisjoint(frames[2])
    _, _, args = load(tmp_path / "data", "--split_by", "time", "--gap", 40)
    with pytest.raises(common.UserError, match="too short for blocks of time with --gap 40; empty: .*smaller --gap, a larger share"):
        train_dreamer.make_split(args, study)


def test_a_frame_in_two_parts_is_found_before_training(tmp_path):
    """t2 of one transition is t1 of the next."""
    write_sequence(tmp_path / "data" / "a_01", count=20)
    study, _, args = load(tmp_path / "data", "--split_by", "time")
    run = QuietRun(tmp_path)
    run.args, run.resumed = args, False
    with pytest.raises(common.UserError, match=r"share 1 exact duplicate \(a_01/ft2/frame_0010.png\).*--gap"):
        train_dreamer.check_split(run, args, study, {"train": np.arange(10), "val": np.arange(10, 20)})


def test_what_chooses_the_epoch_of_a_fold_shares_no_frame_with_the_train_rows(tmp_path):
    """Also where a sequence is so short that a quarter of it is no row."""
    for folder, count in (("p_1", 3), ("p_2", 30), ("q_1", 3), ("q_2", 30)):
        write_sequence(tmp_path / "data" / folder, count=count)
    study, _, args = load(tmp_path / "data", "--patient_regex", r"(.*)_\d", "--folds", 2)
    for fold in train_dreamer.make_folds(args, study):
        assert not np.intersect1d(study.frames[fold["train"]], study.frames[fold["val"]]).size


@pytest.mark.parametrize("select, parts", [("main_task_loss", ["train", "val", "test"]), ("last", ["train", "val"])])
def test_a_fold_chooses_its_epoch_on_patients_of_their_own(clinic, select, parts):
    study, _, args = load(clinic, "--patient_regex", r"(.*)_\d", "--folds", 3, "--select", select)
    folds = train_dreamer.make_folds(args, study)
    for fold in folds:
        patients = [set(study.patients[rows]) for part, rows in fold.items() if len(rows)]
        assert [part for part, rows in fold.items() if len(rows)] == parts
        assert sum(map(len, patients)) == 6 == len(set.union(*patients))
    left_out = np.concatenate([fold[parts[-1]] for fold in folds])
    assert sorted(left_out) == list(range(len(study.names)))


def test_too_few_patients_for_the_parts_say_what_to_do(tmp_path):
    for folder, n_patients in (("a_01", 1), ("b_01", 2)):
        write_sequence(tmp_path / "data" / folder)
        study, _, args = load(tmp_path / "data")
        with pytest.raises(common.UserError, match=f"{n_patients} patients are too few for 3 parts: --split_by time.*of "
                                                   "two patients --test_ratio 0 .*--folds 2"):
            train_dreamer.make_split(args, study)
    study, _, args = load(tmp_path / "data", "--test_ratio", 0)
    assert {name: len(set(study.patients[rows])) for name, rows in train_dreamer.make_split(args, study).items()} == {
        "train": 1, "val": 1, "test": 0}
    study, _, args = load(tmp_path / "data", "--folds", 2)
    assert len(train_dreamer.make_folds(args, study)) == 2


def test_scaler_is_fitted_on_train_rows_alone(clinic):
    study, _, args = load(clinic, "--patient_regex", r"(.*)_\d+$")
    rows = train_dreamer.make_split(args, study)["train"]
    scaler = train_dreamer.fit_scaler(study, rows)
    assert np.allclose(scaler["at1"]["mean"], study.at1[rows].mean(0)) and np.allclose(
        scaler["motion"]["sd"], study.motion[rows].std(0))


def test_a_start_from_random_weights_is_said_of_the_run_that_had_it(clinic):
    study, _, args = load(clinic, "--no_pretrained")
    assert "random weights" in train_dreamer.limits(args, study)[-1]
    for other in ({"pretrained": True}, {"init_from": Path("run_0")}, {"mode": "evaluate"}):
        assert "random weights" not in str(train_dreamer.limits(common.with_flags(args, **other), study))


def test_false_motions_are_a_permutation_without_a_fixed_row(clinic):
    study, _, args = load(clinic)
    data = train_dreamer.ProbeTransitions(study, np.arange(len(study.names)), args, "none").poses
    assert (data["other_motion"] != data["motion"]).any(1).all()
    assert sorted(map(tuple, data["other_motion"].tolist())) == sorted(map(tuple, data["motion"].tolist()))


def test_augmentation_turns_both_frames_alike_and_repeats(clinic):
    study, _, args = load(clinic)
    study.frames[0, 1] = study.frames[0, 0]
    data = train_dreamer.ProbeTransitions(study, np.arange(5), args, "full")
    first, second = data[3, 0]["frames"]
    assert np.array_equal(first, second) and np.array_equal(first, data[3, 0]["frames"][0])
    assert not np.array_equal(first, data[4, 0]["frames"][0])


def test_only_frames_that_are_trained_on_are_augmented(clinic):
    study, _, args = load(clinic, "--augment", "full", "--batch_size", 4, "--num_workers", 0)
    plain = [train_dreamer.to_grey(np.stack([study.picture(i) for i in study.frames[row]])) for row in range(4)]
    own = dict(zip(study.names, plain))
    for train in (False, True):
        loader = train_dreamer.make_loader(study, np.arange(4), args, common.choose_compute("cpu", "off"), train)
        [batch] = loader
        same = [np.array_equal(frames, own[name]) for name, frames in zip(batch["name"], batch["frames"])]
        assert same == [not train] * 4


@pytest.mark.parametrize("preset, turn", [("light", 0), ("full", 5)])
def test_augmentation_draws_up_to_its_limits_on_both_sides(preset, turn):
    drawn = [train_dreamer.draw_augmentation(preset, common.generator_for(0, 0, row)) for row in range(300)]
    limits = {"rotation_deg": (-turn, turn), "brightness": (0.9, 1.1), "contrast": (0.9, 1.1)}
    for name, (low, high) in limits.items():
        values = [getattr(each, name) for each in drawn]
        assert low <= min(values) <= low + 0.02 * (high - low) and high >= max(values) >= high - 0.02 * (high - low)
    assert {each.noise[0] for each in drawn} == {2.55} and len({each.noise[1] for each in drawn}) == 300


def test_nearest_places_prefer_the_own_sequence():
    sequences, place = np.array(["a", "a", "b", "b", "c"]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    rows = np.resize([1, 3, 4], 3000)  # more than one block of them
    weights = baseline_models.means_by_place(np.eye(2), place, sequences, np.array([0, 2]), rows)
    assert np.allclose(weights, np.tile([[1, 0], [0, 1], [0.5, 0.5]], (1000, 1)))


def test_time_blocks_cover_every_row_once():
    """Errors without correlation give blocks of about ten rows, those of a slow walk one block."""
    generator = np.random.default_rng(0)
    rows, sequences = generator.permutation(90), np.array(["a"] * 60 + ["b"] * 30)
    order = np.r_[np.arange(60), np.arange(30)]
    for error, fewest, most in ((generator.normal(size=(90, 6)), 5, 9), (generator.normal(size=(90, 6)).cumsum(0), 1, 2)):
        table = prediction_tables.ScoreTable(
            keys={}, names=list("abcdef"), truth=np.zeros((90, 6)), predicted=error[rows], baselines={})
        blocks = pose_scores.time_blocks(table, sequences[rows], order[rows])
        in_time = blocks[np.argsort(rows)]
        assert (np.diff(in_time) >= 0).all() and fewest <= len(set(blocks)) <= most
