"""train_dreamer.py: the model and its losses, whole runs as a user starts them, and every mistake by its message.

    python -m pytest tests/test_dreamer.py
"""
import csv
import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

import common
import train_dreamer
import verify_setup
from conftest import DRAW, ROOT, only_run, run_here, run_fresh, run_script
from evidence import (
    baseline_models, plotting, pose_judging, pose_scores, prediction_tables, seen_rows, splitting, subject_intervals,
    verdicts)
from readers.probe_poses import AXES
from readers import backbones, probe_poses

CONTRACT = [
    "args.json", "log.txt", "splits.json", "leakage_report.json", "training_history.csv", "training_history.png",
    "best_model.pth", "final_model.pth", "metrics.json", "predictions_val.csv", "report.html", "dataset_stats.json",
    "dataset_statistics.png", "training_summary.png", "per_patient_error.csv", "per_patient_error.png",
    "per_axis_error.csv",
]
HISTORY = {"epoch", "learning_rate", "train_loss", "train_total_loss", "train_main_task_loss", "train_t2_loss",
           "train_latent_loss", "val_loss", "val_main_task_loss", "val_t2_loss", "val_latent_loss",
           *(f"val_mae_{axis}" for axis in AXES)}
TINY = ("--encoder resnet18 --no_pretrained --image_size 32 --token_type spatial --d_model 32 --n_layers 1 --n_heads 2 "
        "--feedforward 32 --epochs 3 --batch_size 8 --num_workers 0 --lr 1e-3").split()


def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def slices(made_data):
    """48 transitions of 3 patients, 6 folders."""
    return made_data("dreamer", 48)


def flags(slices, output_dir, *more):
    data = ["--data_dir", slices, "--patient_map", slices / "patient_map.json", "--output_dir", output_dir]
    return [*data, *TINY, *more]


def train(slices, output_dir, *more, **options):
    return run_script("train_dreamer.py", *flags(slices, output_dir, *more), **options)


@pytest.fixture(scope="module")
def trained(slices, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(slices, folder, "--criteria", "mae<100,mae_x_mm<0.001", "--token_type", "channel", "--save_top_k", 2, env=DRAW)
    return only_run(folder)


READOUT = ["--token_type", "none", "--image_size", 64]


@pytest.fixture(scope="module")
def read_off(slices, tmp_path_factory):
    """A run without a world model: at1 is read off the frame."""
    folder = tmp_path_factory.mktemp("read_off")
    train(slices, folder, *READOUT)
    return only_run(folder)


@pytest.fixture(scope="module")
def folds(slices, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    train(slices, folder, "--folds", 3, "--epochs", 1)
    return only_run(folder)


# --- whole runs -------------------------------------------------------------------

def test_run_folder_holds_what_the_contract_says(trained):
    assert not [name for name in [*CONTRACT, "predictions_test.csv"] if not (trained / name).stat().st_size]
    rows = read_csv(trained / "training_history.csv")
    assert HISTORY <= set(rows[0]) and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert "samples/s" in (trained / "log.txt").read_text() and "min left" in (trained / "log.txt").read_text()
    assert "http" not in (trained / "report.html").read_text().replace("http-equiv", "")


def test_the_best_epochs_by_the_main_task_are_kept(trained):
    losses = [float(row["val_main_task_loss"]) for row in read_csv(trained / "training_history.csv")]
    kept = {path.name for path in trained.glob("top_epoch_*.pth")}
    assert kept == {f"top_epoch_{epoch + 1}_val_main_task_loss_{losses[epoch]:.4g}.pth" for epoch in np.argsort(losses)[:2]}
    assert common.read_checkpoint(trained / "best_model.pth")["epoch"] == int(np.argmin(losses)) + 1


def test_metrics_are_those_of_the_predictions_file(trained):
    """MAE of each axis, wrapped, and of the motion taken for the answer, from predictions_test.csv alone."""
    rows, metrics = read_csv(trained / "predictions_test.csv"), json.loads((trained / "metrics.json").read_text())
    for row in metrics["per_axis"]:
        axis = row["target"]
        known = [r for r in rows if r[f"{axis}_true"]]
        for kind, found in (("predicted", row["mae"]), ("copy", row["mae_copy"]), ("zero", row["mae_zero"])):
            errors = np.array([float(r[f"{axis}_{kind}"]) - float(r[f"{axis}_true"]) for r in known])
            errors = (errors + 180) % 360 - 180 if axis.endswith("deg") else errors
            assert found == pytest.approx(np.abs(errors).mean(), rel=1e-9)
    judged = {entry["name"]: entry["verdict"] for entry in metrics["criteria"]}
    assert metrics["part"] == "test" and set(judged) == {"mae", "mae_x_mm"}
    assert set(judged.values()) == {"NOT RESOLVABLE"}, "two blocks of time give no interval"
    without_time = set(pose_scores.BASELINES) - {"interpolated", "nearest_in_time", "patient_mean"}
    assert without_time == {row["baseline"] for row in metrics["baselines"]}


def test_the_history_is_that_of_the_losses_as_documented(trained):
    """Sums by the flags' weights; of the best epoch the losses and errors are those of predictions_val.csv."""
    history = read_csv(trained / "training_history.csv")
    for row in history:
        for part in ("train", "val"):
            wanted = sum(weight * float(row[f"{part}_{name}"]) for name, weight in (
                ("main_task_loss", 1), ("t2_loss", 1), ("latent_loss", 0.2)))
            assert float(row[f"{part}_loss"]) == pytest.approx(wanted, rel=1e-5)
    content = common.read_checkpoint(trained / "best_model.pth")
    rows = read_csv(trained / "predictions_val.csv")
    predicted, target = (np.array([[float(row[f"{axis}_{kind}"] or "nan") for axis in AXES] for row in rows])
                         for kind in ("predicted", "true"))
    error = (predicted - target) / content["scaler"]["at1"]["sd"].numpy()
    loss = np.nanmean(np.where(np.abs(error) < 1, error ** 2 / 2, np.abs(error) - 0.5), axis=1)
    best = history[content["epoch"] - 1]
    assert float(best["val_main_task_loss"]) == pytest.approx(loss.mean(), rel=1e-5)
    found = [float(best[f"val_mae_{axis}"]) for axis in AXES]
    assert found == pytest.approx(np.nanmean(np.abs(predicted - target), axis=0), rel=1e-5)


def test_another_program_judges_the_predictions_alike(trained, tmp_path):
    """Angles stand within 180 degrees of the truth, so that whoever subtracts them gets the errors of the report."""
    run_script("judge_predictions.py", "--predictions", trained / "predictions_test.csv", "--output_dir", tmp_path)
    again, first = (json.loads((run / "metrics.json").read_text()) for run in (only_run(tmp_path), trained))
    assert [row["name"] for row in again["per_target"]] == list(AXES)
    assert again["baseline_name"] in pose_scores.BASELINES and again["subjects"] == 1
    errors = [[row["model"]["mae"]["value"] for row in metrics["per_target"]] for metrics in (again, first)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


def test_angles_are_turned_towards_the_truth():
    target = np.array([[0, 0, 0, 179.0, -170.0, np.nan]])
    found = pose_scores.wrapped(np.array([[200.0, 0, 0, -179.0, 175.0, 400.0]]), target)
    assert found.tolist() == [[200.0, 0, 0, 181.0, -185.0, 40.0]], "without a truth within 180 degrees of 0"


def test_data_turned_by_180_degrees_give_the_same_numbers():
    """A yaw whose true R2 is .08, about 0 and about 180: the truth was split into two clouds, and R2 was .997."""
    draws = np.random.default_rng(0)
    target = draws.normal(0, 5, (300, 6))
    guess = 0.08 * target + draws.normal(0, 1.4, target.shape)
    found = []
    for turn in (0.0, 180.0):
        turned, predicted = ((poses + [0, 0, 0, turn, turn, turn]) for poses in (target, guess))
        turned[:, 3:] = (turned[:, 3:] + 180) % 360 - 180
        truth = pose_scores.unwrapped(turned)
        mean = np.tile(probe_poses.centre_and_spread(turned)[0], (300, 1))
        table = pose_table(np.arange(300) % 6, truth, pose_scores.wrapped(predicted, truth))
        table.baselines = {"train_mean": pose_scores.wrapped(mean, truth)}
        result = pose_scores.compare(table, None, probe_poses.centre_and_spread(turned)[1])["train_mean"]
        found.append([getattr(result.each, side)[metric].value for side, metric in (
            ("model", "r2"), ("model", "pearson_r"), ("model", "mae"), ("baseline", "r2"), ("baseline", "mae"))])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[1][0]).max() < 0.2 and np.abs(found[1][3]).max() < 1e-9


def test_patients_stand_on_one_side_and_the_report_says_zero(slices, trained):
    owner, splits = (json.loads(path.read_text()) for path in (slices / "patient_map.json", trained / "splits.json"))
    sides = [{owner[name.split("/")[0]] for name in splits[part]} for part in ("train", "val", "test")]
    assert all(len(side) == 1 for side in sides) and len(set.union(*sides)) == 3
    report = json.loads((trained / "leakage_report.json").read_text())
    shared = [pair[what]["count"] for pair in report["between"].values() for what in ("groups", "exact_duplicates")]
    assert shared == [0] * 6
    stats = json.loads((trained / "dataset_stats.json").read_text())
    assert stats["patients_in_two_parts"] == [] and stats["notes"]
    assert stats["compose"] in {row["convention"] for row in stats["residuals"]}
    for axis in stats["poses"]["at1"].values():
        assert set(axis) == {"min", "max", "count", "mean", "sd"} and axis["min"] < axis["mean"] < axis["max"]
        assert 0 < axis["sd"] < axis["max"] - axis["min"] and axis["count"] > 0


def test_too_few_patients_for_an_interval_are_said(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["unit"] == "time blocks"
    assert metrics["verdict"].startswith("One patient proves nothing across patients")


def test_evaluate_repeats_the_test_metrics(trained, slices, tmp_path):
    """Without any other flag: data, patients, split and settings come from the run."""
    checkpoint = trained / "best_model.pth"
    run_fresh("train_dreamer.py", "--mode", "evaluate", "--checkpoint", checkpoint, "--output_dir", tmp_path)
    again, first = (json.loads((run / "metrics.json").read_text()) for run in (only_run(tmp_path), trained))
    assert again["part"] == "test"
    assert again["per_axis"] == first["per_axis"] and again["baselines"] == first["baselines"]
    assert again["use"] == pytest.approx(first["use"], rel=1e-3)
    study, _ = loaded(slices)
    splits = json.loads((trained / "splits.json").read_text())
    train_poses, test_poses = (study.at1[np.isin(study.names, splits[part])] for part in ("train", "test"))
    is_outside = (test_poses < np.nanmin(train_poses, 0)) | (test_poses > np.nanmax(train_poses, 0))
    assert first["use"]["outside_training_range"] == pytest.approx(is_outside.any(1).mean()), "of what it was trained on"
    assert "composition additive (as in the training data)" in (only_run(tmp_path) / "log.txt").read_text()


def test_scoring_all_rows_is_not_held_out(trained, slices, tmp_path):
    """A checkpoint that was copied out of its run folder: nothing says how its data were split."""
    checkpoint = tmp_path / "copied.pth"
    checkpoint.write_bytes((trained / "best_model.pth").read_bytes())
    run_script("train_dreamer.py", "--mode", "evaluate", "--checkpoint", checkpoint, "--data_dir", slices, "--output_dir",
               tmp_path)
    metrics = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    splits = json.loads((trained / "splits.json").read_text())
    words = {"train": "train", "val": "chose", "test": "new"}
    seen = {row["name"]: row["seen"] for row in read_csv(only_run(tmp_path) / "predictions_all.csv")}
    assert seen == {name: words[part] for part in words for name in splits[part]}
    n_train = len(splits["train"])
    assert metrics["held_out"] is False
    assert any(alarm.startswith(f"{n_train} of {len(seen)} rows trained the model") for alarm in metrics["alarms"])
    assert any(doubt.startswith("Nobody said which patient a folder belongs to") for doubt in metrics["doubts"])
    assert metrics["unit"] == "folders"


def test_evaluate_on_data_it_never_saw(trained, slices, tmp_path):
    """Other folders: all rows, only the baselines that need no train rows; a trained patient raises an alarm."""
    run_script("make_sample_data.py", "--task", "dreamer", "--output_dir", tmp_path, "--n_samples", 30, "--seed", 9)
    other = tmp_path / "dreamer"
    other.rename(tmp_path / "other")
    for path in (tmp_path / "other").glob("patient_*_*"):
        path.rename(path.with_name(path.name.replace("patient", "guest")))
    run_script("train_dreamer.py", "--mode", "evaluate", "--checkpoint", trained, "--data_dir", tmp_path / "other",
               "--patient_regex", r"(.*)_\d+$", "--output_dir", tmp_path / "out")
    metrics = json.loads((only_run(tmp_path / "out") / "metrics.json").read_text())
    assert metrics["part"] == "all"
    assert {row["baseline"] for row in metrics["baselines"]} == {"zero", "copy", "train_mean"}
    assert not any("trained on these patients" in alarm for alarm in metrics["alarms"])
    assert metrics["held_out"] is True
    known = common.read_checkpoint(trained / "best_model.pth")["train_patients"][0]
    folders = sorted(path.name for path in (tmp_path / "other").glob("guest_*"))
    owners = {folder: known if k == 0 else "guest" for k, folder in enumerate(folders)}
    common.write_json(tmp_path / "map.json", owners)
    run_script("train_dreamer.py", "--mode", "evaluate", "--checkpoint", trained, "--data_dir", tmp_path / "other",
               "--patient_map", tmp_path / "map.json", "--output_dir", tmp_path / "again")
    metrics = json.loads((only_run(tmp_path / "again") / "metrics.json").read_text())
    assert any(f"trained on these patients: {known}. Score others" in alarm for alarm in metrics["alarms"])


@pytest.mark.parametrize("kind", ["trained", "read_off"])
def test_predict_repeats_the_predictions_without_labels(kind, slices, tmp_path, request):
    trained = request.getfixturevalue(kind)
    motion = "action_change_6dof"
    for path in sorted(slices.glob("patient_*_*")):
        (tmp_path / "data" / path.name).mkdir(parents=True)
        (tmp_path / "data" / path.name / "ft1").symlink_to(path / "ft1")
        listed = json.loads((path / probe_poses.FILE_NAME).read_text())
        listed = listed["transitions"] if isinstance(listed, dict) else listed
        kept = ("frame_t1", "frame_t2", "ft1_image_path", motion)
        rows = [{key: row[key] for key in kept} for row in listed if motion in row]
        (tmp_path / "data" / path.name / probe_poses.FILE_NAME).write_text(json.dumps(rows))
    run_script("train_dreamer.py", "--mode", "predict", "--checkpoint", trained, "--data_dir", tmp_path / "data",
               "--output_dir", tmp_path / "out")
    found = {row["name"]: row for row in read_csv(only_run(tmp_path / "out") / "predictions.csv")}
    assert all(("trained on" in row["warning"]) == (row["seen"] == "train") for row in found.values())
    wanted = [row for row in read_csv(trained / "predictions_test.csv") if row["name"] in found]
    assert len(wanted) >= 8
    before, now = (np.array([[float(row[f"{axis}_predicted"]) for axis in AXES] for row in rows])
                   for rows in (wanted, [found[row["name"]] for row in wanted]))
    assert (np.abs(now - before) < 0.05 * before.std(0)).all(), "other batches: bf16 rounds elsewhere"


def test_folds_leave_each_patient_out_once(folds, slices):
    pooled = read_csv(folds / "predictions_folds.csv")
    assert len({row["name"] for row in pooled}) == len(pooled) == 48
    for k in range(3):
        splits = json.loads((folds / f"fold_{k}" / "splits.json").read_text())
        owners = [{name[:10] for name in splits[part]} for part in ("train", "val", "test")]
        assert len(owners[2]) == 1 and owners[2].isdisjoint(owners[0] | owners[1])
        assert set(splits["train"]).isdisjoint(splits["val"]), "other blocks of time, since two patients are few"
    table = read_csv(folds / "fold_table.csv")
    assert [row["fold"] for row in table] == ["0", "1", "2", "mean", "SD"]
    for row in table[:3]:
        metrics = json.loads((folds / f"fold_{row['fold']}" / "metrics.json").read_text())
        assert float(row["error"]) == pytest.approx(metrics["model"]["mae"]["value"], rel=1e-9)
        assert float(row["baseline_error"]) == pytest.approx(metrics["baseline"]["mae"]["value"], rel=1e-9)
        assert float(row["latent_skill"]) == pytest.approx(metrics["use"]["latent_skill"], rel=1e-9)
    assert "3 patients are too few" in json.loads((folds / "metrics.json").read_text())["verdict"]


def test_folds_continue_fold_by_fold(folds):
    before = (folds / "predictions_folds.csv").read_bytes()
    (folds / "metrics.json").unlink()
    shutil.rmtree(folds / "fold_2")
    text = run_script("train_dreamer.py", "--resume", folds).text
    assert "fold 0 is finished" in text and "fold 2 is finished" not in text
    assert (folds / "predictions_folds.csv").read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--folds", 3)])
def test_a_run_that_is_stopped_while_its_frames_are_encoded_can_be_continued(slices, tmp_path, monkeypatch, more):
    def stopped(*_):
        raise SystemExit(common.EXIT_SAVED)
    monkeypatch.setattr(train_dreamer, "with_features", stopped)
    for _ in range(2):
        run_here("train_dreamer.py", *flags(slices, tmp_path, *more), "--resume", "auto", code=common.EXIT_SAVED)
    assert (only_run(tmp_path) / "args.json").exists()


def test_time_blocks_of_one_patient_prove_nothing(slices, tmp_path):
    """Also other options in one run: SE(3) asked for, primary task only, warm restarts, fp32, frozen layers."""
    one_patient = tmp_path / "one.json"
    one_patient.write_text(json.dumps({path.name: "the one" for path in slices.glob("patient_*_*")}))
    train(slices, tmp_path, "--split_by", "time", "--gap", 1, "--max_transitions", 20, "--dry_run",
          "--compose", "se3_left", "--primary_task_only", "--scheduler", "warm_restarts", "--precision", "32",
          "--freeze_layers", 2, "--patient_map", one_patient)
    run = only_run(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["verdict"].startswith("One patient proves nothing")
    assert "The parts are blocks of time of the same sequences" in (run / "log.txt").read_text()
    assert "poor fit" in (run / "log.txt").read_text() and ", fp32" in (run / "log.txt").read_text()
    assert any("nothing is said about another patient" in doubt for doubt in metrics["doubts"])
    assert "train_latent_loss" not in read_csv(run / "training_history.csv")[0]


def test_verify_setup_audits_transitions(slices, tmp_path, monkeypatch):
    monkeypatch.setattr(verify_setup, "run_script", run_script)
    data = ["--data_dir", slices, "--patient_map", slices / "patient_map.json"]
    checks = list(verify_setup.check_by_script("dreamer", data, tmp_path))
    text = "\n".join(f"{check.name} {check.found}" for check in checks)
    assert "composition additive" in text and "patients" in text
    assert "FAIL" not in [check.status for check in checks]


# --- at1 read off the frame ---------------------------------------------------------------

def test_a_readout_that_training_does_not_improve_is_the_baseline(slices, tmp_path):
    """The correction begins at 0, and steps this long make every epoch worse on the validation rows.

    A run that was killed before its metrics, when best_model.pth says epoch 0 already, ends in the same way.
    """
    train(slices, tmp_path, *READOUT, "--lr", 1, "--keep_last")
    run = only_run(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best_epoch"] == 0 and "no epoch is better than the solved readout" in (run / "log.txt").read_text()
    assert metrics["difference"]["mae"]["value"] == pytest.approx(0, abs=1e-4)
    for row in read_csv(run / "predictions_test.csv"):
        for axis in AXES:
            assert float(row[f"{axis}_predicted"]) == pytest.approx(float(row[f"{axis}_grid_readout"]), abs=1e-2)
    predicted = (run / "predictions_test.csv").read_bytes()
    (run / "metrics.json").unlink()
    run_script("train_dreamer.py", "--resume", run)
    assert (run / "predictions_test.csv").read_bytes() == predicted
    assert json.loads((run / "metrics.json").read_text())["best_epoch"] == 0


def test_an_epoch_is_kept_where_it_is_better_on_validation_rows(read_off):
    losses = [float(row["val_main_task_loss"]) for row in read_csv(read_off / "training_history.csv")]
    text = next(line for line in (read_off / "log.txt").read_text().splitlines() if line.startswith("validation loss of"))
    start = float(text.split()[6].rstrip(","))
    rows = read_csv(read_off / "predictions_val.csv")
    sd = common.read_checkpoint(read_off / "best_model.pth")["scaler"]["at1"]["sd"].numpy()
    solved, target = (np.array([[float(row[f"{axis}_{kind}"] or "nan") for axis in AXES] for row in rows])
                      for kind in ("grid_readout", "true"))
    error = np.abs(solved - target) / sd
    assert start == pytest.approx(np.nanmean(np.where(error < 1, error ** 2 / 2, error - 0.5), axis=1).mean(), abs=1e-4)
    epoch = json.loads((read_off / "metrics.json").read_text())["best_epoch"]
    assert epoch == (int(np.argmin(losses)) + 1 if min(losses) < start else 0)


def test_readout_run_says_that_nothing_is_imagined(read_off):
    metrics = json.loads((read_off / "metrics.json").read_text())
    assert set(metrics["use"]) == {"outside_training_range"} and not [alarm for alarm in metrics["alarms"] if "motion" in alarm]
    assert "nothing is imagined" in (read_off / "report.html").read_text()
    assert "val_latent_loss" not in read_csv(read_off / "training_history.csv")[0]


@pytest.mark.parametrize("name", ["best_model.pth", "final_model.pth"])
def test_both_models_of_a_run_can_be_evaluated(read_off, slices, tmp_path, name):
    run_script("train_dreamer.py", "--mode", "evaluate", "--checkpoint", read_off / name, "--output_dir", tmp_path)
    metrics = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert metrics["part"] == "test" and metrics["best_epoch"] in (0, 1, 2, 3)
    if name == "best_model.pth":
        assert metrics["model"]["mae"]["value"] == pytest.approx(
            json.loads((read_off / "metrics.json").read_text())["model"]["mae"]["value"], rel=1e-3)
    else:
        assert metrics["best_epoch"] == 3


def test_folds_in_time_leave_a_gap_on_both_sides(slices, tmp_path):
    """Poses before and after in the same sequence are a baseline that sees no pixel."""
    train(slices, tmp_path, *READOUT, "--split_by", "time", "--folds", 2, "--gap", 1, "--epochs", 1, "--val_ratio", 0.3)
    run = only_run(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"interpolated", "nearest_in_time", "patient_mean"} <= {row["baseline"] for row in metrics["baselines"]}
    assert len(read_csv(run / "predictions_folds.csv")) == 48
    splits = json.loads((run / "fold_0" / "splits.json").read_text())
    places = {part: {name.split("/")[1] for name in names if name.startswith(splits["test"][0].split("/")[0])}
              for part, names in splits.items()}
    assert places["test"].isdisjoint(places["train"] | places["val"]) and places["train"]


def loaded(slices, *more):
    """(Study, its rows)"""
    args = tiny_args("--data_dir", slices, *more)
    study = train_dreamer.load_study(args, types.SimpleNamespace(say=lambda text: None, path=slices.joinpath))
    return study, np.arange(len(study.names))


def test_folders_cut_in_time_leave_both_doubts():
    """Blocks of time say nothing about another patient, nor are folders patients."""
    args = types.SimpleNamespace(split_by="time")
    unknown, known = (types.SimpleNamespace(has_patients=has_patients) for has_patients in (False, True))
    in_time, folders = train_dreamer.split_doubts(args, unknown)
    assert in_time.startswith("The parts are blocks of time") and "which patient a folder belongs to" in folders
    assert train_dreamer.split_doubts(args, known) == [in_time]


def test_inner_folds_never_cut_what_belongs_together(slices):
    study, rows = loaded(slices)
    assert set(study.inner_groups(rows)) == set(study.patients)
    sweep = types.SimpleNamespace(patients=np.full(40, "p"), sequences=np.full(40, "s"), place=np.linspace(0, 1, 40))
    blocks, sizes = np.unique(train_dreamer.Study.inner_groups(sweep, np.arange(40)), return_counts=True)
    assert len(blocks) == train_dreamer.TIME_BLOCKS and set(sizes) == {4}, "the last row is no block of its own"
    sweep.sequences = np.repeat(["s", "t"], [18, 22])
    assert len(set(train_dreamer.Study.inner_groups(sweep, np.arange(40)))) == 11, "the fifth of s and the fifth of t"
    short = types.SimpleNamespace(sequences=np.array(list("abbb")), order=np.array([0, 0, 1, 4]))
    assert train_dreamer.Study.place.fget(short).tolist() == [0, 0, 0.25, 1]


# --- the model --------------------------------------------------------------------------

def tiny_args(*more):
    return train_dreamer.parse_args([*TINY, *map(str, more)])


UNIT = {name: {"mean": np.zeros(6), "sd": np.ones(6)} for name in ("motion", "at1", "at2")}


@pytest.mark.parametrize("token_type, tokens", [("channel", 513), ("spatial", 50)])
def test_shapes_are_as_written(token_type, tokens):
    args = tiny_args("--token_type", token_type, "--image_size", 224, "--encoder", "resnet34")
    model = train_dreamer.build_model(args, UNIT, "additive").eval()
    seen = []
    model.imagination.layers.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        found = model(torch.zeros(2, 1, 224, 224, dtype=torch.uint8), torch.ones(2, 6))
    assert model.encoder(torch.zeros(1, 1, 224, 224, dtype=torch.uint8)).shape == (1, 512, 49) and seen == [(2, tokens, 32)]
    assert found.features_t2.shape == (2, 512, 49) and found.at1.shape == found.at2.shape == (2, 6)
    assert torch.allclose(found.at2, torch.zeros(2, 6)) and torch.allclose(found.at1, -torch.ones(2, 6))


def test_a_world_model_works_in_sds_of_the_train_poses():
    """A readout that says 0.5 everywhere: at2 is half an sd beyond its mean; the motion enters scaled."""
    scaler = {name: {"mean": np.arange(6.0) + first, "sd": np.arange(1.0, 7) * first}
              for first, name in enumerate(("at1", "motion", "at2"), 1)}
    model = train_dreamer.build_model(tiny_args(), scaler, "additive").eval()
    nn.init.constant_(model.readout[-1].bias, 0.5)
    entered = []
    model.imagination.motion.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    frame = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    motion = torch.tensor([[7.0, 0, 3, 5, 179, -179]])
    with torch.no_grad():
        found = model(frame, motion)
        false = model.imagine(found.features_t1, 2 * motion, motion)
    at2 = torch.arange(6.0) + 3 + 0.5 * 3 * torch.arange(1.0, 7)
    at1 = at2 - motion[0]
    at1[5] -= 360  # -179 subtracted from 16
    assert torch.allclose(found.at2[0], at2) and torch.allclose(found.at1[0], (at1 + 180) % 360 - 180)
    wanted = (motion[0] - torch.arange(6.0) - 2) / (2 * torch.arange(1.0, 7))
    wanted[5] = (-179 - 7 + 360) / 12
    assert torch.allclose(entered[0][0], wanted)
    assert not torch.allclose(entered[1], entered[0]) and torch.equal(false.at1, found.at1), "the true motion composes"


def test_a_readout_of_the_frame_is_its_solved_layer_and_a_scaled_correction():
    args = readout_args()
    scaler = UNIT | {"at1": {"mean": np.zeros(6), "sd": np.arange(1.0, 7)}}
    model = train_dreamer.build_model(args, scaler, "additive").eval()
    grids = np.random.default_rng(0).normal(5, 2, (40, model.encoder.scales.n_features)).astype(np.float32)
    model.scale_grids(grids)
    nn.init.normal_(model.correction[-1].weight)
    motion = torch.full((40, 6), 100.0)
    with torch.no_grad():
        found = model(torch.from_numpy(grids), motion)
        scaled = torch.from_numpy((grids - grids.mean(0)) / model.grid_sd.numpy())
        wanted = model.solved(torch.from_numpy(grids)) + torch.arange(1.0, 7) * model.correction(scaled)
    assert torch.allclose(found.at1, wanted, rtol=1e-3, atol=1e-3)
    assert ((model.grid_sd.numpy() >= grids.std(0)) & (model.grid_sd.numpy() < grids.std(0) + 0.5)).all()
    assert torch.allclose(found.at2, probe_poses.add_poses(found.at1, motion), atol=1e-4)


def test_position_codes_are_those_of_vaswani():
    codes = train_dreamer.sine_cosine(7, 8)
    wanted = [[f(k / 10_000 ** (2 * i / 8)) for i in range(4) for f in (np.sin, np.cos)] for k in range(7)]
    assert np.allclose(codes, wanted, atol=1e-6)


def test_a_grey_frame_gives_what_it_gave_as_colour(tmp_path):
    torch.manual_seed(0)
    resnet, width = backbones.build_backbone("resnet18", pretrained=False)
    features = nn.Sequential(*list(resnet.children())[:-2]).eval()
    grey = torch.randint(0, 256, (2, 1, 72, 72), dtype=torch.uint8)  # no multiple of 32
    wanted = features(((grey / 255 - 0.5) / 0.5).repeat(1, 3, 1, 1)).flatten(2)
    encoder = train_dreamer.Encoder(resnet, tiny_args("--image_size", 72)).eval()
    assert torch.allclose(encoder(grey), wanted, atol=1e-5) and wanted.shape == (2, width, encoder.n_cells)
    assert encoder.n_features == width
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    args = tiny_args("--image_size", 72, "--weights", tmp_path / "resnet18.pth")
    encoder = train_dreamer.Encoder(resnet, args).eval()
    grey_of_imagenet = (grey / 255 - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)
    wanted = features(grey_of_imagenet.repeat(1, 3, 1, 1)).flatten(2)
    assert torch.allclose(encoder(grey), wanted, atol=1e-4), "as weights of photographs expect it, a mean over colours"


def test_frozen_layers_stay_as_they_are():
    encoder = train_dreamer.build_encoder(tiny_args("--freeze_layers", 3), train_dreamer.Encoder).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)).square().mean().backward()
    assert all((p.grad is None) == name.startswith(("stages.0", "stages.1", "stages.2"))
               for name, p in encoder.named_parameters())
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all(name.startswith(("stages.3", "stages.4")) for name in changed)  # BatchNorm's statistics


def test_nothing_is_dropped_inside_attention():
    """With the dropout of the other paths at 0 a layer in training gives what it gives in evaluation."""
    layer, tokens = train_dreamer.transformer_layer(tiny_args("--dropout", 0.5)).train(), torch.randn(2, 9, 32)
    assert torch.equal(layer.self_attn(tokens, tokens, tokens)[0], layer.self_attn(tokens, tokens, tokens)[0])
    assert not torch.equal(layer(tokens), layer(tokens))


def test_a_layer_normalises_before_each_half():
    """Written out: attention and feed-forward are each added to what they were given."""
    layer, tokens = train_dreamer.transformer_layer(tiny_args("--dropout", 0)), torch.randn(2, 9, 32)
    normed = layer.norm1(tokens)
    middle = tokens + layer.self_attn(normed, normed, normed)[0]
    wanted = middle + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm2(middle))))
    assert torch.allclose(layer(tokens), wanted, atol=1e-5) and torch.allclose(layer.eval()(tokens), wanted, atol=1e-5)


def test_missing_labels_change_neither_loss_nor_gradient():
    predicted, target, sd = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6), torch.rand(6) + 0.5
    target[1, 2] = target[3, 0] = torch.nan
    target[2] = target[4, 1:] = torch.nan
    scaler = {"at1": {"sd": sd}, "at2": {"sd": 2 * sd}}
    loss_function = train_dreamer.DreamLoss(tiny_args(), scaler)
    loss = loss_function.of_pose("at1", predicted, target)
    assert torch.allclose(loss_function.of_pose("at2", 2 * predicted, 2 * target), loss, atol=1e-5)
    loss.sum().backward()
    known = ~target.isnan()
    for row in (0, 1, 3, 4):
        error = ((predicted - target) / sd)[row, known[row]]
        assert torch.allclose(loss[row], nn.functional.smooth_l1_loss(error, torch.zeros_like(error)))
    assert loss[2] == 0 and (predicted.grad[~known] == 0).all() and (predicted.grad[known] != 0).all()


def test_losses_and_errors_of_a_model_that_says_the_mean_by_hand():
    """Before training at2 is its mean, 0: each loss is that of the true poses in their own sds, in two batches."""
    args = tiny_args("--lambda_t2_action", 0.5, "--lambda_latent", 0)
    scaler = {"motion": UNIT["motion"], **{name: {"mean": np.zeros(6), "sd": np.full(6, sd)}
                                           for name, sd in (("at1", 2.0), ("at2", 8.0))}}
    model = train_dreamer.build_model(args, scaler, "additive")
    loss_function = train_dreamer.DreamLoss(args, scaler)
    draws = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 2, 1, 32, 32), dtype=torch.uint8, generator=draws)
    poses = {name: 10 * torch.rand(5, 6, generator=draws) for name in ("at1", "at2", "motion", "other_motion")}
    batches = [{"frames": frames[cut], **{name: each[cut] for name, each in poses.items()}}
               for cut in (slice(0, 3), slice(3, 5))]
    compute = common.choose_compute("cpu", "off")
    frame_t1, frame_t2, sent = train_dreamer.to_device(batches[1], compute)
    assert torch.equal(frame_t1, frames[3:, 0]) and torch.equal(frame_t2, frames[3:, 1])
    assert all(torch.equal(sent[name], each[3:]) for name, each in poses.items())
    at1, _, numbers = train_dreamer.evaluate(model, batches, loss_function, compute)
    assert np.allclose(at1, -poses["motion"], atol=1e-5)
    wanted = [nn.functional.smooth_l1_loss(error, torch.zeros(5, 6)).item()
              for error in ((poses["motion"] + poses["at1"]) / 2, poses["at2"] / 8)]
    assert [numbers["main_task_loss"], numbers["t2_loss"]] == pytest.approx(wanted)
    assert numbers["loss"] == pytest.approx(wanted[0] + wanted[1] / 2)
    assert [numbers[f"mae_{axis}"] for axis in AXES] == pytest.approx((poses["motion"] + poses["at1"]).mean(0).tolist())
    with torch.no_grad():
        imagined = model(frames[:, 0], poses["motion"])
        total, parts = loss_function(imagined, poses, model.true_features(frames[:, 1]))
    assert [parts["main_task_loss"].item(), parts["t2_loss"].item()] == pytest.approx(wanted)
    assert total.item() == pytest.approx(numbers["loss"])
    primary = train_dreamer.DreamLoss(tiny_args("--primary_task_only"), scaler)
    assert primary.total({"main_task_loss": 2.0, "t2_loss": 3.0, "latent_loss": 5.0}) == 2


def test_no_gradient_reaches_the_target_frame():
    """The gradient of the latent loss is that of features of t2 which are mere numbers."""
    args = tiny_args("--dropout", 0)
    model = train_dreamer.build_model(args, UNIT, "additive").eval()
    loss_function = train_dreamer.DreamLoss(args, UNIT)
    frames = torch.randint(0, 256, (2, 3, 1, 32, 32), dtype=torch.uint8)
    poses = {name: torch.zeros(3, 6) for name in ("at1", "at2")}
    grads = []
    for features_t2 in (model.true_features(frames[1]), model.encoder(frames[1]).detach().clone()):
        model.zero_grad()
        _, parts = loss_function(model(frames[0], torch.ones(3, 6)), poses, features_t2)
        parts["latent_loss"].backward()
        grads.append([weight.grad.clone() for weight in model.encoder.parameters()])
    assert all(map(torch.equal, *grads)) and sum(grad.abs().sum() for grad in grads[0]) > 0


def test_a_constant_map_has_a_latent_loss_of_1():
    features_t2 = torch.randn(3, 8, 4)
    constant = features_t2.mean((0, 2), keepdim=True).expand(3, 8, 4)
    numbers = pose_scores.latent_numbers(pose_scores.latent_terms(features_t2 + 1, constant, features_t2))
    assert numbers["latent_loss"].item() == pytest.approx(1.0, rel=1e-5)


def test_a_motion_that_is_ignored_matters_where_it_is_large():
    use = {"feature_spread": 0.5, "action_shuffle_ratio": 1.0, "latent_skill": 0.5}
    assert not pose_scores.use_alarms(use, motion=0.05)
    alarm, = pose_scores.use_alarms(use, motion=0.5)
    assert "the known motion is ignored" in alarm and "--token_type none" in alarm
    assert not pose_scores.use_alarms({}, motion=0.5)


def test_poses_outside_the_training_range_raise_an_alarm():
    poses = np.zeros((10, 6))
    poses[:, 0], poses[:, 5] = np.arange(10), 179 + np.arange(10)
    poses[:, 5] -= 360 * (poses[:, 5] > 180)  # about the wrap
    share = pose_scores.outside_share(poses, np.arange(2, 8), np.arange(10))
    assert share == {"outside_training_range": 0.4}
    assert "40% of the scored poses" in pose_scores.use_alarms(share, motion=0.5)[0]
    advice = [pose_scores.use_alarms(share, 0.5, scores_one_block)[0] for scores_one_block in (True, False)]
    assert "--folds 5" in advice[0] and "--" not in advice[1], "another split proves something else"
    assert pose_scores.outside_share(poses, np.arange(10), np.arange(10))["outside_training_range"] == 0


def test_a_model_no_better_than_the_place_in_the_sequence_is_sent_to_other_sweeps():
    _, result, _ = small_result(gain=0.0)
    alarm, = pose_scores.place_alarms({"frame_index": result})
    assert "sweeps that begin and end elsewhere" in alarm and "--" not in alarm, "another split proves something else"


def test_collapsed_features_raise_an_alarm():
    use = {"feature_spread": 0.001, "action_shuffle_ratio": 1.3, "latent_skill": 0.5}
    alarms = pose_scores.use_alarms(use, motion=1.0)
    assert len(alarms) == 1 and "collapsed" in alarms[0]


# --- does it use the motion? -------------------------------------------------------------------

def banded_batches(count, seed, model):
    """Maps of frames whose four corners tell at1 in brightness, with large motions: the best answer needs both."""
    draws = np.random.default_rng(seed)
    at1, motion = (torch.tensor(draws.normal(0, 10, (count, 6)), dtype=torch.float32) for _ in range(2))
    at1[:, 4:] = 0
    pixels = torch.tensor(draws.integers(0, 30, (count, 32, 32)), dtype=torch.float32)
    for axis, (top, left) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
        pixels[:, top:top + 16, left:left + 16] += (100 + 3 * at1[:, axis]).clamp(0, 220)[:, None, None]
    frames = pixels.to(torch.uint8)[:, None]  # t2 looks like t1
    maps = model.eval().true_features(frames)[:, None].expand(-1, 2, -1, -1)
    other = motion.roll(1, 0)
    return [{"frames": maps[i:i + 32], "motion": motion[i:i + 32], "other_motion": other[i:i + 32],
             "at1": at1[i:i + 32], "at2": at1[i:i + 32] + motion[i:i + 32]} for i in range(0, count, 32)]


def shuffle_ratio(ignore_motion):
    """action_shuffle_ratio of a model trained on the maps of a frozen encoder."""
    args = tiny_args("--dropout", 0, "--freeze_layers", 5)
    spreads = {"motion": 10, "at1": 10, "at2": 14}
    scaler = {name: {"mean": np.zeros(6), "sd": np.full(6, sd)} for name, sd in spreads.items()}
    model = train_dreamer.build_model(args, scaler, "additive")
    compute = common.choose_compute("cpu", "off")
    loss_function = train_dreamer.DreamLoss(args, scaler)
    if ignore_motion:
        model.imagination.motion = Deaf(args.d_model)
    optimizer = common.build_optimizer(model, args)
    batches = banded_batches(192, 0, model)
    for _ in range(10):
        for batch in batches:
            frame_t1, _, poses = train_dreamer.to_device(batch, compute)
            loss = loss_function(model.train()(frame_t1, poses["motion"]), poses, None)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    held_out = banded_batches(64, 1, model)
    study = types.SimpleNamespace(at1=np.zeros((64, 6)), patients=np.array(["p"] * 64))
    *_, numbers = train_dreamer.evaluate(model, held_out, loss_function, compute)
    use = train_dreamer.use_of_inputs(model, held_out, numbers, loss_function, compute, study, [], np.arange(64))
    return use["action_shuffle_ratio"]


class Deaf(nn.Module):
    """A motion token that says nothing of the motion."""

    def __init__(self, width):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))

    def forward(self, motion):
        return self.token.expand(len(motion), -1)


def test_action_shuffle_ratio_tells_who_listens_to_the_motion():
    assert shuffle_ratio(ignore_motion=True) == pytest.approx(1.0, abs=0.02)
    assert shuffle_ratio(ignore_motion=False) > 1.2


def test_retrieval_rank_by_hand():
    truth = torch.tensor([[0.0], [1.0], [2.0], [10.0], [20.0]])
    guess = torch.tensor([[0.1], [2.2], [2.0], [20.0], [20.0]])
    patients = np.array(["a", "a", "a", "b", "b"])
    assert pose_scores.retrieval_rank(guess, truth, patients) == pytest.approx(np.mean([0, 0.5, 0, 1, 0]))
    assert pose_scores.retrieval_rank(truth * 0, truth * 0, patients) == 0.5, "ties are chance"
    alone = np.append(patients[:-1], "x")
    assert pose_scores.retrieval_rank(guess, truth, alone) == pytest.approx(np.mean([0, 0.5, 0])), "b and x have one row"
    truth[-1] = torch.nan
    assert pose_scores.retrieval_rank(guess, truth, alone) == pytest.approx(np.mean([0, 0.5, 0])), "x has no features"


def test_latent_numbers_do_not_depend_on_the_batches():
    t1, imagined, t2 = torch.randn(3, 12, 5, 4)
    compute = common.choose_compute("cpu", "off")
    cuts = [slice(0, 7), slice(7, 9), slice(9, 12)]
    batches = [pose_scores.latent_terms(t1[cut], imagined[cut], t2[cut]) for cut in cuts]
    found = {name: value.item() for name, value in
             pose_scores.latent_numbers(train_dreamer.join_batches(batches, compute)).items()}
    variance = (t2 - t2.mean((0, 2), keepdim=True)).square().mean()
    skill = (imagined - t2).square().sum() / (t1 - t2).square().sum()
    assert found["latent_skill"] == pytest.approx(skill.item(), rel=1e-5)
    assert found["latent_loss"] == pytest.approx(((imagined - t2).square().mean() / variance).item(), rel=1e-4)
    spread = t2.mean(2).var(0, correction=0).mean().sqrt() / t2.square().mean().sqrt()
    assert found["feature_spread"] == pytest.approx(spread.item(), rel=1e-4)


# --- baselines and verdict --------------------------------------------------------------------------

def pose_table(patients, target, predicted, baselines=None):
    return prediction_tables.ScoreTable(
        keys={"name": np.arange(len(target)).astype(str)}, names=list(AXES), truth=target, predicted=predicted,
        baselines=baselines or {"zero": np.zeros_like(target)}, groups=patients)


def small_result(patients=6, gain=0.3, seed=3, unit="patients"):
    """`patients` with 20 rows each, and a model that has `gain` of the zero baseline's error removed."""
    draws = np.random.default_rng(seed)
    names = np.repeat([f"p{i}" for i in range(patients)], 20)
    target = draws.normal(0, 10, (len(names), 6))
    table = pose_table(names, target, gain * target + draws.normal(0, 0.1, target.shape))
    sd = probe_poses.centre_and_spread(target)[1]
    blocks = pose_scores.time_blocks(table, names, np.tile(np.arange(20), patients))
    return table, pose_scores.compare(table, blocks, sd, unit)["zero"], sd


@pytest.mark.parametrize("patients, unit, words", [
    (6, "patients", ["The model beats the baseline (zero)", "t-interval over 6 patients",
                     "sign-flip p of this difference 0.03", "better in 6 of 6 patients"]),
    (6, "folders", ["t-interval over 6 folders", "better in 6 of 6 folders"]),
    (3, "patients", ["3 patients are too few", "better in 3 of 3", "over blocks of time: "]),
    (3, "folders", ["3 folders are too few"]),
    (1, "patients", ["One patient proves nothing across patients", "over blocks of time: "]),
])
def test_the_verdict_says_over_what_it_holds(patients, unit, words):
    table, result, sd = small_result(patients, unit=unit)
    per_patient = pose_scores.patient_rows(table, "zero", sd)
    text = pose_scores.verdict(result, per_patient, unit, "new")
    assert all(word in text for word in words), text


def test_a_patient_counts_as_better_by_the_error_of_the_verdict():
    """By hand: .76 against .84 label sds, though the ratio of the first axis is 5; an unlabelled axis does not count."""
    sd = np.array([2.0, 1, 1, 1, 1, 4])
    predicted = sd * [[0.05, 0.9, 0.9, 0.9, 0.9, 0.9]]
    baseline = {"other": sd * [[0.01, 1, 1, 1, 1, 1]]}
    target = np.zeros((1, 6))
    row, = pose_scores.patient_rows(pose_table(np.array(["p"]), target, predicted, baseline), "other", sd)
    assert (row["error"], row["baseline_error"]) == (pytest.approx(4.55 / 6), pytest.approx(5.01 / 6))
    target[0, 2] = np.nan
    second, = pose_scores.patient_rows(pose_table(np.array(["q"]), target, predicted, baseline), "other", sd)
    assert second["error"] == pytest.approx(3.65 / 5)
    result = small_result(3)[1]
    assert "better in 2 of 2" in pose_scores.verdict(result, [row, second], "patients", "new")


def test_no_gain_is_not_called_one():
    result = small_result(gain=0.0)[1]
    assert "The model beats" not in pose_scores.verdict(result, [], "patients", "new")


def test_an_axis_along_which_the_probe_never_moves_is_no_fault_of_the_model():
    """Users are told to write 0 there; the page said that the model had learnt nothing."""
    table = small_result(gain=0.9)[0]
    assert not pose_judging.axis_alarms(table)
    table.truth[:, 2] = table.predicted[:, 2] = 0.1
    assert not pose_judging.axis_alarms(table)
    table.predicted[:, 0] = 5.0
    alarm, = pose_judging.axis_alarms(table)
    assert alarm.startswith("constant prediction") and "x_mm" in alarm
    assert pose_judging.axis_alarms(table.take(np.arange(1))), "one row"


def test_the_top_of_the_page_says_small_errors_in_mm():
    """Of a probe that hardly moves: no 0.00 mm beside 0.00 mm."""
    nothing = subject_intervals.Estimate(0.5, np.nan, np.nan)
    overall = types.SimpleNamespace(model={"mae": nothing}, baseline={"mae": nothing})
    result = types.SimpleNamespace(overall=overall, baseline_name="zero", baseline_label="no motion", has_intervals=False, method="m")
    rows = [{"predictor": "model", "mae_mm": 0.00412, "mae_deg": 4.137}, {"predictor": "zero", "mae_mm": 0.0068, "mae_deg": 12.25}]
    *_, shift, turn = pose_judging.key_figures(result, rows)
    assert shift == ("MAE, translations", "0.00412 mm", "no motion: 0.0068 mm")
    assert turn == ("MAE, angles", "4.14 deg", "no motion: 12.2 deg")


def test_angles_of_a_patient_leave_out_rows_with_a_missing_label():
    """A missing angle must not count as 0 degrees."""
    target = np.full((2, 6), 40.0)
    target[1, 4] = np.nan
    table = pose_table(np.array(["p", "p"]), target, np.full((2, 6), 40.0))
    row = pose_scores.patient_rows(table, "zero", np.ones(6))[0]
    assert row["geodesic_deg"] == pytest.approx(0, abs=1e-6) and row["mae_pitch_deg"] == 0


def test_baselines_find_what_they_can_know():
    """at1 made of the motion: the ridge on it is exact; the copy is the motion itself."""
    motion = np.random.default_rng(3).normal(0, 1, (120, 6))
    names = np.repeat([f"p{i}" for i in range(6)], 20)
    study = types.SimpleNamespace(at1=2 * motion + 5, motion=motion, sequences=names, patients=names,
                                  order=np.tile(np.arange(20), 6), place=np.tile(np.arange(20) / 19, 6),
                                  inner_groups=lambda rows: names[rows])
    train, rows = np.arange(80), np.arange(80, 120)
    found = train_dreamer.predict_baselines(study, train, rows)
    assert np.abs(found["motion_ridge"] - study.at1[rows]).max() < 0.1
    assert np.allclose(found["train_mean"], study.at1[train].mean(0))
    assert np.array_equal(found["copy"], motion[rows])
    assert np.abs(found["frame_index"]).max() < np.abs(study.at1).max() + 1


def test_a_median_of_skewed_poses_beats_no_baseline():
    """The loss draws constants towards the median, whose error is below that of the mean: no frame is needed for it."""
    draw = np.random.default_rng(5)
    names = np.repeat([f"p{i:02d}" for i in range(12)], 30)
    at1 = 179 + draw.lognormal(0, 1, (360, 6))  # the angles turn over at 180
    at1[3, 4] = np.nan
    study = types.SimpleNamespace(at1=at1, motion=draw.normal(0, 1, at1.shape), sequences=names, patients=names,
                                  order=np.tile(np.arange(30), 12), place=np.tile(np.arange(30) / 29, 12),
                                  inner_groups=lambda rows: names[rows])
    train, rows = np.arange(180), np.arange(180, 360)
    found = {name: pose_scores.wrapped(block, at1[rows])
             for name, block in train_dreamer.predict_baselines(study, train, rows).items()}
    median = np.nanmedian(at1[train], 0)
    assert np.allclose(found["train_median"], median)
    table = pose_table(names[rows], at1[rows], np.tile(0.8 * median + 0.2 * np.nanmean(at1[train], 0), (180, 1)), found)
    results = pose_scores.compare(table, None, np.nanstd(at1, 0))
    assert verdicts.outcome_of(results["train_mean"].gain("mae")) == "better"
    best = min(results, key=lambda name: results[name].overall.baseline["mae"].value)
    assert best == "train_median" and verdicts.outcome_of(results[best].gain("mae")) != "better"


def test_poses_in_time_are_interpolated_on_both_sides_of_a_gap():
    """Against numpy: a line between the neighbours, the last one beyond the ends, and nothing across sequences."""
    times = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 0, 9])
    sequences = np.array(["a"] * 8 + ["b"] * 2)
    values = np.array([[0.0, 5], [10, 5], [0, 0], [0, 0], [40, np.nan], [60, 5], [0, 0], [0, 0], [1, 1], [0, 0]])
    train, rows = np.array([5, 0, 1, 4, 8]), np.array([2, 3, 6, 7, 9])
    found = baseline_models.time_baselines(values, times, sequences, train, rows)
    assert found["interpolated"].tolist() == [[20, 5], [30, 5], [60, 5], [60, 5], [1, 1]]
    assert found["nearest_in_time"].tolist() == [[10, 5], [40, 5], [60, 5], [60, 5], [1, 1]]
    filled = baseline_models.time_baselines(values, times, sequences, train[:4], rows)
    assert filled["interpolated"].tolist() == [*found["interpolated"][:4].tolist(), [27.5, 5]], "b: the train mean"
    assert baseline_models.time_baselines(values, times, sequences, train[:4], rows[4:]) == {}


def test_a_short_sequence_takes_no_baseline_out_of_a_fold():
    """20 rows beside 100: the middle fold leaves no train row of them, and the folds could not be joined."""
    sequences = np.repeat(["a", "b"], [100, 20])
    order = np.r_[np.arange(100), np.arange(20)]
    motion = np.random.default_rng(3).normal(0, 1, (120, 6))
    study = types.SimpleNamespace(at1=motion + 5, motion=motion, sequences=sequences, patients=sequences, order=order,
                                  place=order / 100, inner_groups=lambda rows: order[rows] // 10)
    tables = []
    for fold in splitting.folds_by_time(sequences, order, 5, 10):
        train, rows = fold["train"], fold["val"]
        found = train_dreamer.predict_baselines(study, train, rows)
        assert {"interpolated", "nearest_in_time", "patient_mean"} <= set(found)
        tables.append(pose_table(sequences[rows], study.at1[rows], study.at1[rows], found))
    assert len(prediction_tables.join(tables, range(5)).baselines["interpolated"]) == 120


def test_a_patient_mean_needs_train_rows_of_each_patient():
    motion = np.random.default_rng(3).normal(0, 1, (60, 6))
    names = np.repeat(["p", "q", "r"], 20)
    study = types.SimpleNamespace(at1=motion + 5, motion=motion, sequences=names, patients=names,
                                  order=np.tile(np.arange(20), 3), place=np.tile(np.arange(20) / 19, 3),
                                  inner_groups=lambda rows: names[rows])
    train = np.r_[0:15, 20:35]
    centre = study.at1[train].mean(0)
    found = train_dreamer.predict_baselines(study, train, np.array([38, 17]))["patient_mean"]
    assert np.allclose(found, [study.at1[20:35].mean(0), study.at1[0:15].mean(0)])
    filled = train_dreamer.predict_baselines(study, train, np.array([38, 50]))["patient_mean"]
    assert np.allclose(filled, [study.at1[20:35].mean(0), centre]), "the train mean for a patient without train rows"
    place = train_dreamer.predict_baselines(study, train, np.array([17]))["frame_index"]
    near = np.exp(-0.5 * ((17 - np.arange(15)) / 19 / 0.05) ** 2)
    assert np.allclose(place, near @ study.at1[:15] / near.sum()), "nearest in place within the own sequence"
    assert "patient_mean" not in train_dreamer.predict_baselines(study, train, np.array([50, 51]))
    assert "patient_mean" not in train_dreamer.predict_baselines(study, train[:15], np.array([16, 17])), "one patient"


def test_the_summary_of_training_says_the_final_numbers(monkeypatch):
    figures = {}
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.update({path: figure}))
    history = [{"epoch": epoch, "learning_rate": 1e-4, "train_loss": 1 / epoch, "train_total_loss": 1 / epoch,
                "val_loss": 2 / epoch, "val_mae_x_mm": 3.0} for epoch in (1, 2)]
    numbers = {"rows": 90, "error": 0.259, "baseline_error": 0.31, "r2": 0.84}
    train_dreamer.plot_training(types.SimpleNamespace(path=str), history, 2, "test", numbers)
    *_, last = figures["training_summary.png"].axes
    assert last.texts[0].get_text().splitlines() == [
        "best epoch: 2", "test: 90 rows", "error: 0.259 label sds", "best baseline: 0.310", "R2: 0.840"]
    assert not figures["training_history.png"].axes[-1].texts


def test_results_are_back_in_mm_and_degrees():
    table, result, sd = small_result()
    result = pose_scores.in_units(result, sd)
    model, baseline = result.each.model["mae"], result.each.baseline["mae"]
    assert result.unit == "patients" and np.allclose(baseline.value, np.abs(table.truth).mean(0))
    assert ((model.low < model.value) & (model.value < model.high)).all()
    assert np.allclose(result.each.model["mse"].value, ((table.predicted - table.truth) ** 2).mean(0))
    assert np.allclose(result.each.model["rmse"].value, result.each.model["mse"].value ** 0.5)
    assert np.allclose([row["mae_zero"] for row in pose_scores.axis_rows(result, table)], np.abs(table.truth).mean(0))


def test_the_tables_of_predictors_and_baselines_by_numpy_and_scipy():
    table, result, sd = small_result()
    table.truth[3, 4] = np.nan
    known = ~np.isnan(table.truth)
    for row, predicted in zip(pose_scores.predictor_rows(table), (table.predicted, 0 * table.predicted), strict=True):
        error = np.where(known, predicted - table.truth, np.nan)
        turns = [Rotation.from_euler("ZYX", poses[known.all(1)][:, :2:-1], degrees=True)
                 for poses in (predicted, table.truth)]
        assert row == {"predictor": row["predictor"], **{name: pytest.approx(value) for name, value in {
            "mae_mm": np.nanmean(np.abs(error[:, :3])), "mae_deg": np.nanmean(np.abs(error[:, 3:])),
            "distance_mm": np.mean((error[:, :3] ** 2).sum(1) ** 0.5),
            "geodesic_deg": np.degrees((turns[0].inv() * turns[1]).magnitude()).mean()}.items()}}
    row, = pose_scores.baseline_rows({"zero": result})
    difference = result.overall.difference["mae"]
    assert list(row.values()) == ["zero", result.overall.baseline["mae"].value, difference.value, difference.low,
                                  difference.high, result.sign_flip_p["mae"], "no motion"]
    table.baselines["far"] = table.truth * 0 + 99
    numbers = pose_scores.fold_numbers(table, sd)
    errors = [np.nanmean(np.abs(each - table.truth) / sd, axis=0).mean() for each in (table.predicted, 0)]
    assert (numbers["rows"], numbers["error"], numbers["baseline_error"]) == (120, *map(pytest.approx, errors))


def test_the_correlation_time_is_that_of_sums_over_each_lag():
    errors = np.cumsum(np.random.default_rng(0).normal(size=(2, 60, 6)), axis=1)
    errors[0, 7, 2] = np.nan
    times = []
    for own in errors:
        centred = own - np.nanmean(own, axis=0)
        scaled = np.nan_to_num(centred / np.nanmean(centred ** 2, axis=0) ** 0.5)
        products = np.array([(scaled[lag:] * scaled[:60 - lag]).sum() for lag in range(60)])
        first_zero = np.flatnonzero(products <= 0)[0]
        times.append(1 + 2 * (products / products[0])[1:first_zero].sum())
    assert pose_scores.correlation_time(errors.swapaxes(0, 1)) == pytest.approx(max(times)) and min(times) > 3


# --- learning ------------------------------------------------------------------------------------

def test_one_batch_can_be_overfitted():
    args = tiny_args("--dropout", 0, "--token_type", "channel")
    model = train_dreamer.build_model(args, UNIT, "se3_left")
    loss_function = train_dreamer.DreamLoss(args, UNIT)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    frames = 255 * torch.randint(0, 2, (4, 1, 32, 32), dtype=torch.uint8)
    motion, at1 = torch.randn(4, 6), torch.randn(4, 6) * 3
    poses = {"at1": at1, "at2": probe_poses.CONVENTIONS["se3_left"].at2(at1, motion)}
    poses["at1"][0, 1] = torch.nan
    for _ in range(75):
        loss, parts = loss_function(model(frames, motion), poses, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["main_task_loss"].item() < 0.05


@pytest.mark.parametrize("scheduler, points", [
    ("onecycle", {0: 1 / 25, 3: 1.0, 10: 0.0}), ("warm_restarts", {0: 1.0, 5: 0.5, 10: 1.0, 20: 0.5, 30: 1.0}),
])
def test_schedules_pass_through_their_points(scheduler, points):
    for progress, factor in points.items():
        assert common.schedule_factor(scheduler, progress, 10, 0) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_smooth_l1_beta_is_that_of_torch(beta):
    args = tiny_args("--smooth_l1_beta", beta)
    predicted, target = torch.randn(2, 5, 6)
    found = train_dreamer.DreamLoss(args, UNIT).of_pose("at1", predicted, target)
    assert torch.allclose(found, nn.functional.smooth_l1_loss(predicted, target, reduction="none", beta=beta).mean(1))


def test_keys_of_the_published_study_are_read(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "model:\n  token_type: channel\n  d_model: 64\n  num_heads: 4\n  num_layers: 3\n"
        "loss: {smooth_l1_beta: 0.5, lambda_latent: 0.3}\n"
        "training:\n  max_epochs: 7\n  accumulate_grad_batches: 4\n  precision: 16\n  early_stop_patience: 9\n")
    args = train_dreamer.parse_args(["--config", str(tmp_path / "study.yaml")])
    assert (args.n_heads, args.n_layers, args.epochs, args.accumulate, args.patience) == (4, 3, 7, 4, 9)
    assert (args.smooth_l1_beta, args.lambda_latent, args.use_amp, args.token_type) == (0.5, 0.3, "on", "channel")


def test_a_typed_precision_wins_over_a_config(tmp_path):
    """Every args.json names use_amp."""
    (tmp_path / "c.yaml").write_text("use_amp: on")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert train_dreamer.parse_args(config).use_amp == "on"
    assert train_dreamer.parse_args([*config, "--precision", "32"]).use_amp == "off"
    (tmp_path / "c.yaml").write_text("precision: bf16")
    assert train_dreamer.parse_args(config).use_amp == "on"
    assert train_dreamer.parse_args([*config, "--use_amp", "off"]).use_amp == "off"
    assert train_dreamer.parse_args([]).use_amp == "auto"


def test_the_published_size_can_be_trained_in_folds_and_without_a_test_part():
    config = ["--config", str(ROOT / "configs" / "dreamer_production.yaml")]
    args = train_dreamer.parse_args([*config, "--folds", "3"])
    assert splitting.ratios_of_flags(args) == {"train": 0.85, "val": 0.15, "test": 0.0}
    args = train_dreamer.parse_args([*config, "--test_ratio", "0"])
    assert splitting.ratios_of_flags(args)["train"] == 0.85


def test_an_undefined_number_of_one_fold_is_undefined_over_all():
    """null in the metrics.json of a fold whose patients have one row each."""
    folds = [{"rows": 10, "retrieval_rank": None, "latent_skill": 0.5},
             {"rows": 30, "retrieval_rank": 0.3, "latent_skill": 0.9}]
    found = train_dreamer.mean_use(folds)
    assert found["latent_skill"] == pytest.approx(0.8) and np.isnan(found["retrieval_rank"])


# --- from a checkpoint -----------------------------------------------------------------------

def write_model(folder, args):
    """best_model.pth of an untrained model -> its path."""
    model = train_dreamer.build_model(args, UNIT, "additive")
    settings = {name: getattr(args, name) for name in train_dreamer.MODEL_FLAGS}
    settings |= {"compose": "additive", "angle_unit": "deg", "euler_order": "zyx", "pixel_range": [0.0, 900.0]}
    common.save_checkpoint(folder / "best_model.pth", common.to_plain_types({
        "format": common.FORMAT, "script": "train_dreamer.py", "model": model.state_dict(), "seen": None, "epoch": 1,
        "scaler": UNIT, "settings": settings, "pretrained": False}))
    return folder / "best_model.pth"


@pytest.fixture
def as_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_dreamer.py"])


def readout_args(*more):
    return tiny_args(*READOUT, *more)


def test_what_belongs_to_the_files_is_not_that_of_the_checkpoint(as_script, tmp_path):
    path = write_model(tmp_path, readout_args())
    run = types.SimpleNamespace(say=lambda text: None, compute=common.choose_compute("cpu", "off"))
    own = ["--mode", "evaluate", "--checkpoint", path, "--data_dir", "new"]
    typed = ["--angle_unit", "rad", "--pixel_range", 0, 50, "--compose", "auto"]
    for more, unit, pixel_range in (([], "auto", [0, 900]), (typed, "rad", [0, 50])):
        asked = train_dreamer.parse_args([*map(str, own), *map(str, more)])
        *_, args = train_dreamer.load_checkpoint(asked, run)
        assert (args.angle_unit, list(args.pixel_range)) == (unit, pixel_range)
        assert (args.encoder, args.compose, args.image_size) == ("resnet18", "additive", 64)
    asked = train_dreamer.parse_args([*map(str, own), "--compose", "se3_left", "--image_size", "64"])
    with pytest.raises(common.UserError, match="^--compose se3_left: --mode evaluate takes this from the checkpoint"):
        train_dreamer.load_checkpoint(asked, run)


@pytest.mark.parametrize("given, found", [
    ([], {"patient_regex": "(.*)_", "angle_unit": "rad", "seed": 7, "weights": Path("w.pth"), "data_dir": Path("old")}),
    (["--patient_map", "new.csv"], {"patient_regex": None, "patient_map": Path("new.csv"), "angle_unit": "rad"}),
    (["--data_dir", "new", "--seed", "3"],
     {"patient_regex": None, "angle_unit": "auto", "seed": 3, "weights": Path("w.pth"), "data_dir": Path("new")}),
])
def test_flags_are_taken_over_from_the_run_of_the_checkpoint(tmp_path, given, found):
    flags = {"data_dir": "old", "patient_regex": "(.*)_", "angle_unit": "rad", "seed": 7, "weights": "w.pth"}
    (tmp_path / "args.json").write_text(json.dumps({"flags": flags}))
    (tmp_path / "best_model.pth").touch()
    args = train_dreamer.parse_args(["--mode", "evaluate", "--checkpoint", str(tmp_path), *given])
    assert {name: getattr(args, name) for name in found} == found


def test_data_of_the_same_names_are_not_the_checkpoints_own(tmp_path):
    """Rows named train that it was not trained on: every row is scored, and none is fitted on."""
    names = np.array(["p/1-2", "p/2-3", "q/1-2"])
    (tmp_path / "splits.json").write_text(json.dumps(dict(zip(("train", "val", "test"), ([name] for name in names)))))
    args = types.SimpleNamespace(checkpoint=tmp_path / "best_model.pth")
    seen = seen_rows.SeenRows(fitted=[1], chose=[2])
    lines = []
    run = types.SimpleNamespace(say=lines.append)
    own = types.SimpleNamespace(names=names, hashes=np.array([[1], [2], [3]]))
    part, rows, fitted = train_dreamer.rows_to_score(run, args, own, seen)
    assert (part, rows.tolist(), fitted.tolist(), lines) == ("test", [2], [0, 1], [])
    (tmp_path / "splits.json").write_text('{"train": ["p/1-2"], "val": ["p/2-3"], "test": ["q/1-2", ["odd"], {}, null]}')
    assert train_dreamer.rows_to_score(run, args, own, seen)[1].tolist() == [2]
    other = types.SimpleNamespace(names=names, hashes=np.array([[7], [8], [9]]))
    part, rows, fitted = train_dreamer.rows_to_score(run, args, other, seen)
    assert (part, rows.tolist(), fitted.tolist()) == ("all", [0, 1, 2], []) and lines[0].startswith("note: ")
    for damaged in ("[1]", '{"test": 5}'):
        (tmp_path / "splits.json").write_text(damaged)
        with pytest.raises(common.UserError, match="splits.json: expected lists"):
            train_dreamer.rows_to_score(run, args, own, seen)


def test_weights_of_another_model_or_encoder_are_refused_as_a_start(as_script, slices, tmp_path):
    """A mistake in the flags, not a damaged file; another encoder would give other features than the readout's."""
    path = write_model(tmp_path, readout_args())
    cases = {("--token_type", "spatial"): "token_type none, expected spatial",
             (*READOUT, "--encoder", "resnet34"): "encoder resnet18, expected resnet34",
             (*READOUT, "--seed", 7): "began from other --weights or --seed"}
    study, rows = loaded(slices)
    for more, words in cases.items():
        args = tiny_args("--init_from", path, "--data_dir", slices, *more)
        with pytest.raises(common.UserError, match=words) as error:
            train_dreamer.fit(types.SimpleNamespace(compute=common.choose_compute("cpu", "off")), args, study,
                              {"train": rows, "val": rows}, None)
        assert not isinstance(error.value, common.CheckpointError)


def test_training_begins_at_the_solved_readout_and_the_scale_of_the_train_frames(slices, monkeypatch):
    study, rows = loaded(slices)
    grids = np.random.default_rng(0).normal(3, 2, (len(study.store), 17_920)).astype(np.float32)
    study = dataclasses.replace(study, grids=grids)
    readout = baseline_models.Readout(np.full((17_920, 6), 2.0), np.arange(6.0), ["all"])
    begun = []

    def stop(run, model, *_, **__):
        begun.append(model)
        raise common.UserError("begun")
    monkeypatch.setattr(common, "Training", stop)
    with pytest.raises(common.UserError, match="begun"):
        train_dreamer.fit(types.SimpleNamespace(compute=common.choose_compute("cpu", "off")), readout_args(), study,
                          {"train": rows[:20], "val": rows[20:]}, readout)
    [model] = begun
    assert (model.solved.weight == 2).all() and model.solved.bias.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.allclose(model.grid_mean, grids[study.frames[rows[:20], 0]].mean(0), atol=1e-4)


def test_a_readout_solved_on_train_and_validation_rows_is_undone_by_a_resume():
    """Killed between best_model.pth and metrics.json: with --select last, too, validation rows are predicted anew."""
    model = types.SimpleNamespace(imagines=False, solved=nn.Linear(3, 6))
    training = types.SimpleNamespace(model=model, select="last", load_best=lambda: {"epoch": 3})
    readout = baseline_models.Readout(np.full((3, 6), 2.0), np.arange(6.0), ["all"])
    assert train_dreamer.keep_if_better(training, None, None, readout, None) == {"epoch": 3}
    assert (model.solved.weight == 2).all() and model.solved.bias.tolist() == [0, 1, 2, 3, 4, 5]


def test_patients_that_the_final_readout_was_solved_on_are_train_patients():
    study = types.SimpleNamespace(patients=np.array(["a", "b", "c"]), hashes=np.array([[1], [2], [3]]))
    readout = baseline_models.Readout(np.zeros((3, 6)), np.zeros(6), ["all"])
    model = types.SimpleNamespace(imagines=False, solved=nn.Linear(3, 6))
    training = types.SimpleNamespace(model=model, seen=seen_rows.SeenRows([1], [2]))
    found = train_dreamer.use_readout(training, study, np.array([0, 1]), readout)
    assert found["train_patients"] == ["a", "b"] and found["seen"].fitted.tolist() == [1, 2]


def test_a_solved_readout_reads_angles_about_their_mean():
    """Poses that are linear in the grids of t1, with a yaw on both sides of 180 degrees."""
    grids = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    poses = grids @ np.random.default_rng(1).normal(size=(4, 6)) + [10, 20, 30, 0, 90, 178]
    poses[:, 5] = (poses[:, 5] + 180) % 360 - 180
    assert poses[:, 5].min() < -170 and poses[:, 5].max() > 170
    study = train_dreamer.Study(**{
        **dict.fromkeys(field.name for field in dataclasses.fields(train_dreamer.Study)),
        "patients": np.repeat(list("abcd"), 20), "at1": poses, "grids": grids[::-1],
        "frames": np.stack([79 - np.arange(80), np.zeros(80, int)], 1), "blocks": {"all": slice(None)}})
    readout = train_dreamer.solve_readout(study, np.arange(60))
    found = readout.predict(study.grids_at_t1(np.arange(60, 80)))
    assert np.abs(probe_poses.difference(found, poses[60:])).max() < 0.05


def test_a_trained_readout_lends_its_encoder_to_the_baseline(slices):
    """Random weights of another seed, as those of another --weights file would be."""
    study, rows = loaded(slices, *READOUT)
    compute = common.choose_compute("cpu", "off")
    args = readout_args("--mode", "predict", "--checkpoint", "x")
    new, encoder = (train_dreamer.build_encoder(of_run, train_dreamer.GridEncoder) for of_run in (
        args, readout_args("--seed", 7)))
    own, lent = (train_dreamer.with_features(study, rows[:4], args, compute, lender).grids for lender in (new, encoder))
    frame = torch.from_numpy(train_dreamer.to_grey(study.picture(study.frames[0, 0])[None]))
    np.testing.assert_allclose(lent[study.frames[0, 0]], encoder(frame)[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(own[study.frames[0, 0]], lent[study.frames[0, 0]])


# --- mistakes -----------------------------------------------------------------------------------

LISTS = ["--manual_splits", "--train_patients", "a", "--val_patients", "b"]
FLAG_MISTAKES = {
    "no data": (["--data_dir", "nowhere"], ["nowhere: expected a folder, found no such folder"]),
    "heads": (["--d_model", 30, "--n_heads", 4], ["--d_model 30"]),
    "folds in time": (["--folds", 3, "--split_by", "time"], ["too short", "--gap 10"]),
    "folds of lists": (["--folds", 3, *LISTS], ["own split"]),
    "folds without a choice": (["--folds", 3, "--val_ratio", 0], ["--select last"]),
    "lists without the switch": (["--train_patients", "a"], ["--manual_splits"]),
    "two maps": (["--patient_regex", "x"], ["give one"]),
    "unknown precision": (["--precision", "64"], ["--precision", "64"]),
    "no checkpoint": (["--mode", "evaluate"], ["--checkpoint"]),
    "a checkpoint to train from": (["--checkpoint", "x.pth"], ["--mode train", "--init_from"]),
    "two splits": (["--split_file", "s.json", *LISTS], ["own split"]),
    "lists in time": (["--split_by", "time", *LISTS], ["own split"]),
    "a broken pattern": (["--patient_regex", "("], ["--patient_regex '('", "unterminated"]),
    "no ResNet": (["--encoder", "vgg11"], ["vgg11", "ResNet"]),
    "a ResNet of timm": (["--encoder", "timm:resnet18", "--token_type", "channel"], ["timm:resnet18", "torchvision"]),
    "unknown encoder": (["--encoder", "resnet99"], ["resnet99"]),
    "unknown encoder of folds": (["--encoder", "resnet99", "--folds", 3], ["resnet99"]),
    "unknown metric": (["--criteria", "mae_x<3"], ["mae_x_mm"]),
    "unknown preset": (["--augment", "heavy"], ["--augment: invalid choice", "none", "light", "full"]),
    "a group column": (["--group_column", "animal"], ["--patient_map"]),
    "more folds than patients": (["--folds", 4], ["3 groups"]),
    "unknown flag": (["--epoch", 3], ["--epochs"]),
}


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_mistakes_in_the_flags(slices, tmp_path, name):
    more, words = FLAG_MISTAKES[name]
    given = [*flags(slices, tmp_path / "out"), *more] if name != "a broken pattern" else more
    text = run_here("train_dreamer.py", *given, code=2).stderr
    assert text.startswith("error: ") and "Traceback" not in text and text.count("\n") == 1, text
    assert all(word in text for word in words), text
    assert not list((tmp_path / "out").glob("run_*")), "a mistake leaves no run folder behind"


def test_weights_that_are_not_there_are_missed_before_frames_are_decoded(slices, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dreamer, "load_study", lambda *_: pytest.fail("the frames were decoded first"))
    text = run_here("train_dreamer.py", *flags(slices, tmp_path), "--weights", "none.pth", code=2).stderr
    assert text.startswith("error: --weights none.pth: no such file") and not list(tmp_path.glob("run_*"))


def test_checkpoints_of_others_are_refused(trained, tmp_path):
    content = common.read_checkpoint(trained / "best_model.pth")
    common.save_checkpoint(tmp_path / "other.pth", {**content, "script": "train_video.py"})
    common.save_checkpoint(tmp_path / "bare.pth", {key: content[key] for key in ("format", "script", "model", "seen", "epoch")})
    cases = ("other.pth", 2, "train_video.py"), ("bare.pth", 3, "lacks"), ("none.pth", 3, "no checkpoint")
    for name, code, word in cases:
        text = run_script("train_dreamer.py", "--mode", "predict", "--checkpoint", tmp_path / name, "--output_dir",
                          tmp_path / "out", "--data_dir", tmp_path, code=code).stderr
        assert word in text and "Traceback" not in text
