"""Pose algebra of train_dreamer.py against scipy's Rotation, and the audit's choice of a composition.

    python -m pytest tests/test_dreamer_poses.py
"""
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from conftest import only_run, run_script
from readers.probe_poses import CONVENTIONS, on_arrays
from readers import probe_poses

DRAWS = np.random.default_rng(5)


def random_poses(count, reach_deg=180.0):
    return np.hstack([DRAWS.uniform(-30, 30, (count, 3)), DRAWS.uniform(-reach_deg, reach_deg, (count, 3))])


def matrix(pose):
    """(6,) -> (4, 4) by scipy: intrinsic z, y, x = Rz Ry Rx."""
    whole = np.eye(4)
    whole[:3, :3] = Rotation.from_euler("ZYX", pose[[5, 4, 3]], degrees=True).as_matrix()
    whole[:3, 3] = pose[:3]
    return whole


def matrices(poses):
    return np.stack([matrix(pose) for pose in poses])


def test_rotation_is_that_of_scipy():
    poses = random_poses(200)
    assert np.allclose(on_arrays(probe_poses.rotation_matrix, poses[:, 3:]), matrices(poses)[:, :3, :3], atol=1e-12)


def test_angles_come_back_from_the_matrix():
    poses = random_poses(200)
    angles = on_arrays(probe_poses.euler_degrees, matrices(poses)[:, :3, :3])
    again = np.hstack([poses[:, :3], angles])
    assert np.allclose(matrices(again), matrices(poses), atol=1e-7)
    assert (np.abs(angles[:, 1]) <= 90).all()


@pytest.mark.parametrize("pitch", [90.0, -90.0])
def test_gimbal_lock_keeps_the_rotation(pitch):
    poses = np.array([[0, 0, 0, 20.0, pitch, 50.0], [0, 0, 0, 0.0, pitch, -170.0]])
    angles = on_arrays(probe_poses.euler_degrees, matrices(poses)[:, :3, :3])
    assert np.isfinite(angles).all()
    assert np.allclose(matrices(np.hstack([poses[:, :3], angles])), matrices(poses), atol=1e-6)


def test_compose_and_invert_are_those_of_matrices():
    a, b = random_poses(100), random_poses(100)
    assert np.allclose(matrices(on_arrays(probe_poses.compose, a, b)), matrices(a) @ matrices(b), atol=1e-6)
    assert np.allclose(matrices(on_arrays(probe_poses.invert, a)), np.linalg.inv(matrices(a)), atol=1e-6)


def test_geodesic_angle_is_that_of_scipy():
    a, b = random_poses(300), random_poses(300)
    b[:50, 3:] = a[:50, 3:] + DRAWS.normal(0, 1e-4, (50, 3))  # tiny: arccos of the trace has no digits left there
    b[50, 3:] = a[50, 3:] + [180, 0, 0]
    rotations = [Rotation.from_matrix(matrices(poses)[:, :3, :3]) for poses in (a, b)]
    wanted = np.rad2deg((rotations[0].inv() * rotations[1]).magnitude())
    assert np.allclose(on_arrays(probe_poses.geodesic_degrees, a, b), wanted, atol=1e-6)


def test_errors_wrap_at_180():
    """By hand: 179 to -179 is 2 degrees, not 358; translations never wrap."""
    predicted, target = np.array([[200.0, 0, 0, 179, -179, 0]]), np.array([[-200.0, 0, 0, -179, 179, 360]])
    assert on_arrays(probe_poses.pose_error, predicted, target).tolist() == [[400.0, 0, 0, -2, 2, 0]]
    angles = torch.tensor([-180.0, 180.0, 539.0, -181.0, 0.0])
    assert probe_poses.wrap_degrees(angles).tolist() == [-180.0, -180.0, 179.0, 179.0, 0.0]


def test_mean_of_angles_is_circular():
    poses = np.zeros((4, 6))
    poses[:, 3] = [178.0, -178.0, 179.0, -179.0]
    poses[:, 0] = [1.0, 2.0, 3.0, np.nan]
    mean, sd = probe_poses.centre_and_spread(poses)
    assert abs(abs(mean[3]) - 180) < 1e-9 and mean[0] == 2.0 and sd[3] == pytest.approx(np.sqrt(2.5))


def test_an_axis_that_never_varies_is_not_measured_in_nanometres(recwarn):
    """Rounding to float32 at a fixed depth was .25 of a label sd, averaged over the axes."""
    poses = random_poses(50, 30)
    poses[:, 2] = 123.4
    poses[:, 4] = np.nan
    mean, sd = probe_poses.centre_and_spread(poses)
    known = [0, 1, 3, 5]
    assert sd[2] == sd[4] == 1 and np.isnan(mean[4]) and not recwarn.list
    np.testing.assert_allclose(sd[known], poses[:, known].std(0), rtol=1e-9)
    assert np.nanmax(np.abs(poses - poses.astype(np.float32)) / sd) < 1e-4


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_three_ways_of_a_convention_agree(name):
    """at2 from at1 and motion, at1 back from at2 and motion, and the motion back from both."""
    at1, motion = random_poses(100, 60), random_poses(100, 30)
    at2 = on_arrays(CONVENTIONS[name].at2, at1, motion)
    wanted = {"se3_left": matrices(motion) @ matrices(at1), "se3_right": matrices(at1) @ matrices(motion)}
    if name in wanted:
        assert np.allclose(matrices(at2), wanted[name], atol=1e-6)
    for found, true in ((on_arrays(CONVENTIONS[name].at1, motion, at2), at1),
                        (on_arrays(CONVENTIONS[name].motion, at1, at2), motion)):
        assert np.abs(on_arrays(probe_poses.pose_error, found, true)).max() < 1e-6


@pytest.mark.parametrize("name", CONVENTIONS)
def test_gradients_through_the_composition_are_right(name):
    at2, motion = (torch.from_numpy(random_poses(3, 50)).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(CONVENTIONS[name].at1, (motion, at2), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_right_convention_is_found_and_its_residual_is_zero(name):
    at1, motion = random_poses(80, 40), random_poses(80, 8) * [0.1, 0.1, 0.1, 1, 1, 1]
    at2 = on_arrays(CONVENTIONS[name].at2, at1, motion)
    at2[3] = np.nan
    residuals = probe_poses.composition_residuals(at1, motion, at2)
    row = {row["convention"]: row for row in residuals}
    assert probe_poses.choose_composition("auto", residuals, None)[0] == name
    assert row[name]["mm"] < 1e-9 and row[name]["deg"] < 1e-9 and row[name]["rows"] == 79
    assert all(row[other]["mm"] + row[other]["deg"] > 0.01 for other in row if other != name)


@pytest.mark.parametrize("missed, asked, is_poor", [
    ((1.0, 2, 3), "auto", False), ((1.01, 2, 3), "auto", True), ((0.4, 0.2, 3), "additive", False),
    ((0.42, 0.2, 3), "additive", True)])
def test_a_poor_fit_is_above_1_or_twice_the_best_one(missed, asked, is_poor):
    residuals = [{"mm": each / 4, "deg": 3 * each / 4} for each in missed]
    name, text = probe_poses.choose_composition(asked, residuals, None)
    assert name == "additive" and (": a poor fit; check" in text) is is_poor


@pytest.mark.parametrize("motions", CONVENTIONS)
def test_the_audit_picks_the_convention_that_the_data_were_made_in(motions, tmp_path):
    run_script("make_sample_data.py", "--task", "dreamer", "--output_dir", tmp_path, "--n_samples", 48)
    data = tmp_path / "dreamer"
    for path in data.glob("*/transitions_dataset.json"):
        rows = json.loads(path.read_text())
        for row in rows["transitions"] if isinstance(rows, dict) else rows:
            if "at2_6dof" in row:
                poses = np.array([[row["at1_6dof"]], [row["at2_6dof"]]])
                row["action_change_6dof"] = on_arrays(CONVENTIONS[motions].motion, *poses)[0].tolist()
            else:
                row["action_change_6dof"] = None
        path.write_text(json.dumps(rows))
    run_script("train_dreamer.py", "--mode", "audit", "--data_dir", data, "--patient_map", data / "patient_map.json",
               "--image_size", 32, "--output_dir", tmp_path / "out")
    audit = json.loads((only_run(tmp_path / "out") / "audit.json").read_text())
    assert audit["compose"] == motions and audit["angle_unit"] == "deg"
    assert not [check for check in audit["checks"] if check["status"] == "FAIL"]
