"""train_video.py from end to end: both tasks, all modes, folds, kill and resume, and every mistake by its message.

    python -m pytest tests/test_video.py

One run of each task and the killed ones are subprocesses; the rest calls main() in this process, which is quicker.
"""
import argparse
import csv
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import (accuracy_score, average_precision_score, brier_score_loss, confusion_matrix, f1_score,
                             log_loss, matthews_corrcoef, r2_score, recall_score, roc_auc_score)

import common
from evidence import calibrating, event_splits, prediction_tables, splitting
from readers import video_files
import train_video
from conftest import ROOT, only_run, run_here, run_fresh, run_script
from planted_leaks import PLANTED, plant_leaks

CONTRACT = ["args.json", "log.txt", "splits.json", "leakage_report.json", "training_history.csv",
            "training_history.png", "best_model.pth", "metrics.json", "predictions_val.csv", "report.html"]
CLASS_PLOTS = ["confusion.png", "precision_recall.png", "risk_coverage.png", "reliability.png", "calibration.json"]
SMALL = ("--model cnn_lstm --hidden 16 --image_size 32 --n_frames 4 --fps 4 --clips_per_event 2 "
         "--epochs 2 --batch_size 8 --num_workers 0 --save_every 0 --augment light").split()
SOLVED = ("--model motion_readout --image_size 32 --n_frames 4 --fps 4 --clips_per_event 2 "
          "--num_workers 0").split()


def save_small_weights(path):
    """Weights of a ShuffleNet: random, with batch statistics, without which its features hardly differ between pictures.

    Always the same draw: a few in a hundred tell two behaviours apart by luck, this one scores an AUC of .52 [.22, .80].
    """
    torch.manual_seed(1)
    network = torchvision.models.shufflenet_v2_x0_5()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1
    network(torch.randn(64, 3, 32, 32))
    torch.save(network.state_dict(), path)


def video(*flags, code=0):
    run = run_here if code else run_script
    return run("train_video.py", *flags, code=code)


def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(rows, column):
    return np.array([float(row[column] or "nan") for row in rows])


@pytest.fixture(scope="module")
def made(made_data, tmp_path_factory):
    """40 events in 8 videos of 8 pens, 20 sequences of 4 animals; flags that name them."""
    folder = tmp_path_factory.mktemp("sample")
    shutil.copytree(made_data("video", 40), folder / "video")
    save_small_weights(folder / "weights.pth")
    network = ["--backbone", "shufflenet_v2_x0_5", "--weights", folder / "weights.pth"]
    data = folder / "video"
    manifests = data / "manifests"
    look = ["--video_root", data / "videos", "--label_map", manifests / "label_map.json"]
    plant_leaks(data)

    def parts(kind=""):
        return [*look, *(item for part in ("train", "val", "test")
                         for item in (f"--{part}_manifest", manifests / f"{kind}{part}.csv"))]
    return SimpleNamespace(folder=data, manifests=manifests, look=look, parts=parts, sequences=data / "sequences.csv",
                           small=[*SMALL, *network], solved=[*SOLVED, *network], weights=folder / "weights.pth",
                           everything=["--manifest", manifests / "all.csv", *look])


@pytest.fixture(scope="module")
def behaviours(made, tmp_path_factory):
    """The run folder of a classification with train, val and test manifests and the balanced sampler."""
    folder = tmp_path_factory.mktemp("behaviours")
    run_fresh("train_video.py", *made.parts(), *made.small, "--epochs", 3, "--balance", "sampler", "--jitter_sec", 0.3,
               "--augment", "heavy", "--mixup", 0.2, "--output_dir", folder, "--save_top_k", 1, "--criteria",
               "auc>0.5,tail_recall>0.9")
    return only_run(folder)


@pytest.fixture(scope="module")
def scores(made, tmp_path_factory):
    """The run folder of a regression in 3 folds by animal, with the fourth animal as the test."""
    folder = tmp_path_factory.mktemp("scores")
    run_script("train_video.py", "--task", "regress", "--manifest", made.sequences, *made.small, "--batch_size", 6,
               "--folds", 3, "--test_groups", "4", "--group_column", "animal", "--output_dir", folder,
               "--sample_weight", "moment:M2=2.5", "--augment_for", "moment:M2=enhanced", "--bounded",
               "--criteria", "r2>0.99,mae_M2<1000")
    return only_run(folder)


@pytest.fixture(scope="module")
def class_folds(made, tmp_path_factory):
    """The run folder of a classification in 2 folds of one manifest, on features of a frozen backbone."""
    folder = tmp_path_factory.mktemp("class_folds")
    video(*made.everything, *made.small, "--folds", 2, "--freeze_backbone", "--feature_views", 2, "--output_dir", folder,
          "--test_groups", "8", "--criteria", "accuracy<=1,accuracy>1.5,auc>0.5")
    return only_run(folder)


@pytest.fixture(scope="module")
def solved(made, tmp_path_factory):
    """The run folder of the motion readout in 2 folds, with a pen as the test."""
    folder = tmp_path_factory.mktemp("solved")
    video(*made.everything, *made.solved, "--folds", 2, "--test_groups", "8", "--output_dir", folder)
    return only_run(folder)


# --- the run folder of a classification ------------------------------------------------------

def test_run_folder_holds_what_the_contract_says(made, behaviours):
    missing = [name for name in [*CONTRACT, *CLASS_PLOTS, "training_batch.jpg", "predictions_test.csv"]
               if not (behaviours / name).is_file() or not (behaviours / name).stat().st_size]
    assert not missing
    record = read_json(behaviours / "args.json")
    assert set(record) >= {"flags", "command", "versions", "git", "data", "device", "slurm"}
    assert record["flags"]["model"] == "cnn_lstm" and record["data"]["rows"] == 40
    splits = read_json(behaviours / "splits.json")
    assert [len(splits[part]) for part in ("train", "val", "test")] == [20, 10, 10]
    assert all(len(read_csv(made.manifests / f"{part}.csv")) == len(splits[part]) for part in ("train", "val", "test"))
    log = (behaviours / "log.txt").read_text()
    assert "PyAV" in log, "the decoder is named"
    assert "colours are normalised with mean (0.485, 0.456, 0.406)" in log


def test_history_columns_are_named_by_class(behaviours):
    rows = read_csv(behaviours / "training_history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"learning_rate", "train_loss", "val_loss", "val_accuracy", "val_macro_f1", "val_roc_auc", "val_mcc",
            "val_ece", "val_brier", "val_tail_recall", "val_tail_precision", "val_tail_f1",
            "val_tail_average_precision", "val_ear_recall"} <= set(rows[0])
    best = read_json(behaviours / "metrics.json")["best_epoch"]
    assert best == 1 + int(np.nanargmax(numbers(rows, "val_tail_average_precision"))), "the default --select"
    assert common.read_checkpoint(behaviours / "best_model.pth")["metric"] == "val_tail_average_precision"


def test_metrics_are_those_of_the_predictions_file(behaviours):
    """Every number of the test part, recomputed by scikit-learn from predictions_test.csv alone."""
    rows, metrics = read_csv(behaviours / "predictions_test.csv"), read_json(behaviours / "metrics.json")
    true, chosen = ([row[name] == "tail" for row in rows] for name in ("true_label", "pred_label"))
    p = numbers(rows, "prob_tail")
    expected = {"loss": log_loss(true, p), "accuracy": accuracy_score(true, chosen), "brier": brier_score_loss(true, p),
                "roc_auc": roc_auc_score(true, p), "macro_f1": f1_score(true, chosen, average="macro"),
                "mcc": matthews_corrcoef(true, chosen)}
    found = {name: metrics["model"][name]["value"] for name in expected}
    assert found == pytest.approx(expected, abs=1e-9)
    of_class = {entry["name"]: entry["model"] for entry in metrics["per_class"]}
    assert of_class["tail"]["average_precision"]["value"] == pytest.approx(average_precision_score(true, p))
    for name, positive in (("tail", 1), ("ear", 0)):
        assert of_class[name]["recall"]["value"] == pytest.approx(recall_score(true, chosen, pos_label=positive))
    assert metrics["confusion"] == confusion_matrix(true, chosen).tolist() and metrics["part"] == "test"
    assert metrics["held_out"] and metrics["positive_class"] == "tail"


def test_calibration_leaves_accuracy_and_auc_alone(behaviours):
    """Temperature: same ranks and the same most probable class; both it and the threshold are in the checkpoint."""
    stored = common.read_checkpoint(behaviours / "best_model.pth")["calibration"]
    assert stored == read_json(behaviours / "calibration.json") and set(stored) == {"temperature", "threshold"}
    rows = read_csv(behaviours / "predictions_test.csv")
    logits, p = (np.stack([numbers(rows, f"{kind}_{name}") for name in ("ear", "tail")], 1)
                 for kind in ("logit", "prob"))
    assert np.allclose(p, softmax(logits / stored["temperature"], axis=1), atol=1e-9)
    before = softmax(logits, axis=1)
    assert (before.argmax(1) == p.argmax(1)).all()
    true = [row["true_label"] == "tail" for row in rows]
    assert roc_auc_score(true, p[:, 1]) == roc_auc_score(true, before[:, 1])
    assert [row["pred_label"] == "tail" for row in rows] == (p[:, 1] >= stored["threshold"]).tolist()
    stages = {row["stage"]: row for row in read_json(behaviours / "metrics.json")["calibration"]}
    assert stages["before"]["nll"] == pytest.approx(log_loss(true, before[:, 1]))
    assert stages["after"]["nll"] == pytest.approx(log_loss(true, p[:, 1]))
    assert {"brier", "ece", "ece_adaptive", "ece_of_a_calibrated_model", "f1"} <= set(stages["after"])


def test_validation_rows_are_not_judged_by_what_was_fitted_on_them(behaviours):
    rows = read_csv(behaviours / "predictions_val.csv")
    p = softmax(np.stack([numbers(rows, f"logit_{name}") for name in ("ear", "tail")], 1), axis=1)
    assert np.allclose(numbers(rows, "prob_tail"), p[:, 1]) and "threshold" not in rows[0]


def test_sampler_is_corrected_for(behaviours):
    """Logits speak of the natural class shares: the shift is the log of natural over drawn shares."""
    content = common.read_checkpoint(behaviours / "best_model.pth")
    assert content["prior_shift"] == pytest.approx([math.log(0.8 / 0.5), math.log(0.2 / 0.5)])


def test_report_begins_with_the_verdict(behaviours):
    page, metrics = (behaviours / "report.html").read_text(encoding="utf-8"), read_json(behaviours / "metrics.json")
    assert metrics["verdict"].split(":")[0] in page and "baseline" in metrics["verdict"] and "AUC of tail" in page
    assert "http://" not in page and "https://" not in page and len(page) < 5e6
    assert "A clip is shown by five of its frames" in page
    assert {row["name"] for row in metrics["confounds"]} >= {"pair", "group"} or metrics["confounds"]
    assert {entry["verdict"] for entry in metrics["criteria"]} == {"NOT RESOLVABLE"}, "two groups give no interval"


# --- the motion readout ----------------------------------------------------------------------

def test_a_solved_model_is_a_run_like_any_other(made, solved, tmp_path):
    """Contract, one row of history, validation rows that chose nothing; predict repeats what training wrote."""
    for k in range(2):
        assert all((solved / f"fold_{k}" / name).is_file() for name in CONTRACT)
        [row] = read_csv(solved / f"fold_{k}" / "training_history.csv")
        assert 0 < float(row["train_loss"]) < 2 and float(row["learning_rate"]) == 0
        alarms = read_json(solved / f"fold_{k}" / "metrics.json")["alarms"]
        assert not any("overfitting" in alarm for alarm in alarms), "what is solved fits its own rows always"
    content = common.read_checkpoint(solved / "fold_0" / "best_model.pth")
    assert content["architecture"]["pixel_mean"] == list(common.IMAGENET_MEAN)
    own = argparse.Namespace(model="motion_readout", backbone="googlenet", weights=None, pixel_mean=[0.1] * 3, pixel_sd=[0.2] * 3)
    assert train_video.pixel_statistics(own) == ([0.1] * 3, [0.2] * 3), "predict normalises as the checkpoint says"
    assert content["architecture"]["fps"] == 4 and content["prior_shift"] == [0, 0]
    assert {row["seen"] for row in read_csv(solved / "predictions_folds.csv")} == {"new"}, "no epoch was chosen"
    assert "motion_readout_prob_tail" not in read_csv(solved / "predictions_folds.csv")[0]
    assert "features by the inner folds: " in (solved / "fold_0" / "log.txt").read_text()
    assert "samples/s" not in (solved / "fold_0" / "log.txt").read_text(), "it reads features of its rows"
    text = video("--mode", "predict", "--checkpoint", solved, *made.everything, "--filter", "group==8", "--output",
                 tmp_path / "p.csv", "--num_workers", 0, "--use_amp", "on").stdout
    assert re.search("device: cpu .*, fp32", text)
    ours = {row["clip_id"]: row for row in read_csv(tmp_path / "p.csv")}
    for row in read_csv(solved / "test_ensemble" / "predictions_test.csv"):
        assert float(ours[row["clip_id"]]["prob_tail"]) == pytest.approx(float(row["prob_tail"]), abs=1e-4)


@pytest.mark.parametrize("flags, message", [
    (["--mode", "predict", "--checkpoint", "m", "--manifest", "t.csv", "--export", "model.pth"],
     "argument --export: model.pth: expected a name that ends in .pt2 or .onnx"),
    (["--mode", "predict", "--checkpoint", "m", "--video", "v", "--export", "model.pt2"], "--mode predict with --manifest"),
    (["--manifest", "t.csv", "--export", "model.pt2"], "--mode predict with --manifest")])
def test_exports_that_cannot_be(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_video.parse_args(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def stop(*_):
    raise KeyboardInterrupt


def test_a_solved_model_continues_fold_by_fold(made, solved, monkeypatch):
    """Also where it is stopped once more before the test groups are judged: the run is then not finished."""
    before = (solved / "predictions_folds.csv").read_bytes()
    (solved / "metrics.json").unlink()
    shutil.rmtree(solved / "fold_1")
    shutil.rmtree(solved / "test_ensemble")
    with monkeypatch.context() as patched:
        patched.setattr(train_video, "judge_ensemble", stop)
        text = video("--resume", solved, code=130).stdout
    assert "fold 0 is finished" in text and "fold 1 is finished" not in text
    assert (solved / "predictions_folds.csv").read_bytes() == before
    assert "fold 1 is finished" in video("--resume", solved).stdout
    assert (solved / "metrics.json").exists() and (solved / "test_ensemble" / "metrics.json").exists()


@pytest.mark.parametrize("folds", [[], ["--folds", 2]])
def test_a_run_stopped_before_its_features_are_computed_is_continued(made, tmp_path, monkeypatch, folds):
    flags = [*made.everything, *made.solved, *folds, "--dry_run", "--output_dir", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(train_video, "untuned_features", stop)
        video(*flags, code=130)
    assert "(continued)" in video(*flags, "--resume").stdout and (only_run(tmp_path) / "metrics.json").exists()


def test_the_motion_readout_of_scores_is_its_baseline_in_another_run(made, scores, tmp_path):
    """As a model and as the second baseline of another one it predicts the same, fold by fold."""
    video("--task", "regress", "--manifest", made.sequences, *made.solved, "--folds", 3, "--test_groups", "4",
          "--group_column", "animal", "--output_dir", tmp_path)
    for k in range(3):
        own = read_csv(only_run(tmp_path) / f"fold_{k}" / "predictions_val.csv")
        other = read_csv(scores / f"fold_{k}" / "predictions_val.csv")
        for name in ("Head_low", "Total.Facial.scale"):
            assert numbers(own, f"{name}_predicted") == pytest.approx(
                numbers(other, f"{name}_motion_readout"), abs=1e-3)
    assert "Head_low_motion_readout" not in own[0] and "Head_low_ridge" in own[0]


def test_two_raters_of_scores_give_a_ceiling(made, tmp_path):
    """One score on which they agree exactly, one on which they do not."""
    rows = read_csv(made.sequences)
    for row in rows:
        row["sequence_path"] = made.folder / row["sequence_path"]
    draw = np.random.default_rng(0)
    rated = [{"path": row["sequence_path"], "animal": row["animal"], "rater": rater, "same": float(row["Total.Facial.scale"] or 1),
              "other": float(row["Total.Facial.scale"] or 1) + draw.normal()} for row in rows for rater in "AB"]
    common.write_table(tmp_path / "rated.csv", rated)
    video("--task", "regress", "--manifest", tmp_path / "rated.csv", *made.solved, "--group_column", "animal", "--dry_run",
          "--target_columns", "same", "other", "--output_dir", tmp_path / "out")
    ceiling = read_json(only_run(tmp_path / "out") / "metrics.json")["ceiling"]
    assert "Spearman-Brown" in ceiling["source"]
    assert ceiling["r2"][0] == pytest.approx(1) and ceiling["r2"][1] < 0.999


def test_a_motion_readout_whose_weights_cannot_be_had_is_no_baseline(monkeypatch):
    def fail(*_):
        raise common.UserError("no pretrained weights for resnet18")
    monkeypatch.setattr(train_video, "build_model", lambda *_: None)
    monkeypatch.setattr(train_video, "features_of_rows", lambda *_: np.ones((2, 3)))
    monkeypatch.setattr(train_video, "motion_features", fail)
    said = []
    run = SimpleNamespace(compute=SimpleNamespace(place=lambda network: network), say=said.append)
    study = SimpleNamespace(table=SimpleNamespace(names=["a", "b"], label=np.array([0, 1])))
    args = SimpleNamespace(freeze_backbone=False, model=train_video.CNN_LSTM)
    found = train_video.untuned_features(args, study, run, np.arange(2))
    assert list(found.of_rows) == ["logistic"]
    assert said == ["note: no motion readout to compare with: no pretrained weights for resnet18"]


# --- the other modes -------------------------------------------------------------------------

def test_predict_repeats_the_test_predictions(made, behaviours, tmp_path):
    output = tmp_path / "p.csv"
    video("--mode", "predict", "--checkpoint", behaviours, "--manifest", made.manifests / "test.csv", *made.look,
          "--output", output, "--num_workers", 0)
    predicted = {row["clip_id"]: row for row in read_csv(output)}
    expected = read_csv(behaviours / "predictions_test.csv")
    assert len(predicted) == len(expected) == 10
    for row in expected:
        own = predicted[row["clip_id"]]
        assert [own[name] for name in ("event", "true_label", "pred_label", "n_clips")] == [
            row[name] for name in ("event", "true_label", "pred_label", "n_clips")]
        assert float(own["prob_tail"]) == pytest.approx(float(row["prob_tail"]), abs=1e-6)
        assert float(own["logit_tail"]) == pytest.approx(float(row["logit_tail"]), abs=1e-5)


def test_predict_says_which_clips_were_trained_on_and_which_are_unlike_them(made, behaviours, tmp_path):
    content = common.read_checkpoint(behaviours / "best_model.pth")
    content["known_data"]["farthest"] *= 0.01
    common.save_checkpoint(tmp_path / "narrow.pth", content)
    text = video("--mode", "predict", "--checkpoint", tmp_path / "narrow.pth", "--manifest", made.manifests / "train.csv",
                 *made.look, "--output", tmp_path / "p.csv", "--num_workers", 0).text
    rows = read_csv(tmp_path / "p.csv")
    assert {row["warning"] for row in rows} == {"trained on; unlike the training clips"}
    assert f"warning: {len(rows)} of {len(rows)} clips: unlike the training clips" in text


def test_a_clip_with_rounded_times_was_seen_and_its_neighbour_was_not(made, behaviours, tmp_path):
    def predicted(manifest):
        video("--mode", "predict", "--checkpoint", behaviours, "--manifest", manifest, *made.look,
              "--output", tmp_path / "p.csv", "--num_workers", 0)
        return read_csv(tmp_path / "p.csv")

    trained = predicted(made.manifests / "train.csv")
    middles = [(row["video"], (float(row["start_sec"]) + float(row["end_sec"])) / 2) for row in trained]

    def again(change):
        """(video, middle, seen) of the trained clips with other times."""
        rows = [{"path": row["video"], **{name: change(float(row[name])) for name in ("start_sec", "end_sec")}}
                for row in trained]
        common.write_table(tmp_path / "again.csv", rows)
        found = predicted(tmp_path / "again.csv")
        assert len(found) == len(rows)
        return [(row["path"], (row["start_sec"] + row["end_sec"]) / 2, other["seen"]) for row, other in zip(rows, found)]

    assert {seen for _, _, seen in again(lambda sec: round(sec, 1))} == {"train"}
    away = [seen for source, middle, seen in again(lambda sec: sec + 0.45)
            if min(abs(middle - other) for name, other in middles if name == source) > 0.2]
    assert away and set(away) == {"new"}


def test_a_run_from_weights_knows_their_clips_by_rounded_times(made, behaviours, tmp_path):
    """Every row trained the run that it starts from, with times that lie a little beside."""
    video("--mode", "predict", "--checkpoint", behaviours, "--manifest", made.manifests / "train.csv", *made.look,
          "--output", tmp_path / "p.csv", "--num_workers", 0)
    common.write_table(tmp_path / "moved.csv", [
        {"path": row["video"], "label": row["true_label"], "group": row["group"],
         "start_sec": float(row["start_sec"]) + 0.04, "end_sec": float(row["end_sec"]) + 0.04}
        for row in read_csv(tmp_path / "p.csv")])
    video("--manifest", tmp_path / "moved.csv", "--video_root", made.folder / "videos", *made.small, "--split_by", "event",
          "--epochs", 1, "--init_from", behaviours, "--output_dir", tmp_path)
    rows = read_csv(only_run(tmp_path) / "predictions_val.csv")
    assert rows and {row["seen"] for row in rows} == {"train"}


def test_predict_needs_no_labels(made, behaviours, tmp_path):
    rows = read_csv(made.manifests / "test.csv")
    with open(tmp_path / "new.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, [name for name in rows[0] if name != "behavior"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[:4])
    video("--mode", "predict", "--checkpoint", behaviours / "best_model.pth", "--manifest", tmp_path / "new.csv",
          "--video_root", made.folder / "videos", "--output", tmp_path / "p.csv", "--num_workers", 0,
          "--clips_per_event", 1, "--aggregation", "max")
    found = read_csv(tmp_path / "p.csv")
    assert [row["true_label"] for row in found] == [""] * 4 and {row["n_clips"] for row in found} == {"1"}


def test_evaluate_gives_the_metrics_of_the_run(behaviours, tmp_path):
    video("--mode", "evaluate", "--predictions", behaviours / "predictions_test.csv", "--output", tmp_path / "m.json",
          "--output_dir", tmp_path, "--positive_class", "Tail")
    ours, theirs = read_json(tmp_path / "m.json"), read_json(behaviours / "metrics.json")
    for name in ("model", "baseline", "difference", "per_class", "confusion", "n", "baseline_name", "positive_class",
                 "null_ece", "method"):
        assert ours[name] == theirs[name], name


def test_evaluate_of_scores_gives_the_metrics_of_the_folds(scores, tmp_path):
    text = video("--mode", "evaluate", "--task", "regress", "--predictions", scores / "predictions_folds.csv",
                 "--output", tmp_path / "m.json", "--output_dir", tmp_path, "--criteria", "mae<1000").stdout
    ours, theirs = read_json(tmp_path / "m.json"), read_json(scores / "metrics.json")
    for name in ("model", "baseline", "difference", "per_target", "baseline_name", "method"):
        assert ours[name] == theirs[name], name
    assert "mae < 1000" in text and (only_run(tmp_path) / "report.html").exists()


def test_evaluate_refuses_what_judge_predictions_does_before_it_writes(tmp_path):
    write = (tmp_path / "p.csv").write_text
    for text, flags, words in (
            ("A_true,A_predicted\n1,2\n2,3\n", ["--criteria", "foo>1"], "foo"),
            ("A_true,A_predicted\n1,2\n2,3\n", ["--positive_class", "a"], "--positive_class"),
            ("A_true,A_predicted\n1,2\n1,3\n", [], "no two different values")):
        write(text)
        said = video("--mode", "evaluate", "--predictions", tmp_path / "p.csv", "--output_dir", tmp_path / "out", *flags,
                     code=2)
        assert words in said.stderr and not (tmp_path / "out").exists()


def test_several_checkpoints_are_averaged(made, scores, tmp_path):
    """Mean and spread of three folds; and their mean on the test animal is the ensemble that training wrote."""
    members = [scores / f"fold_{k}" / "best_model.pth" for k in range(3)]

    def predict(checkpoints, name):
        video("--mode", "predict", "--task", "regress", "--checkpoint", *checkpoints, "--manifest", made.sequences,
              "--output", tmp_path / name, "--num_workers", 0)
        return read_csv(tmp_path / name)
    single = [numbers(predict([path], f"{k}.csv"), "Head_low_predicted") for k, path in enumerate(members)]
    whole = predict([scores], "all.csv")
    assert numbers(whole, "Head_low_predicted") == pytest.approx(np.mean(single, axis=0), abs=1e-6)
    assert numbers(whole, "Head_low_sd") == pytest.approx(np.std(single, axis=0, ddof=1), abs=1e-6)
    ensemble = {row["clip_id"]: row for row in read_csv(scores / "test_ensemble" / "predictions_test.csv")}
    own = {row["clip_id"]: row for row in whole if row["clip_id"] in ensemble}
    assert len(own) == 5 and all(float(own[name]["Head_low_predicted"]) == pytest.approx(
        float(row["Head_low_predicted"]), abs=1e-4) for name, row in ensemble.items())


def test_an_ensemble_has_no_numbers_before_calibration(class_folds):
    """Its outputs are logs of probabilities that are calibrated already."""
    stages = read_json(class_folds / "test_ensemble" / "metrics.json")["calibration"]
    assert [row["stage"] for row in stages] == ["as it is"]
    page = (class_folds / "test_ensemble" / "report.html").read_text(encoding="utf-8")
    assert "members of an ensemble are calibrated before" in page


def test_clips_of_the_test_groups_that_look_like_clips_of_the_folds_are_looked_for(class_folds):
    """The page of the folds compared them; that of the ensemble, which they are the doubt of, did not."""
    between = read_json(class_folds / "test_ensemble" / "leakage_report.json")["between"]["train-test"]
    assert "similar_pictures" in between
    assert "similar pictures" in (class_folds / "test_ensemble" / "report.html").read_text(encoding="utf-8")


def test_predict_obeys_min_event_sec(made, behaviours, tmp_path):
    """The flag as typed counts, not that of the checkpoint: the same as a checkpoint that was trained with it."""
    content = common.read_checkpoint(behaviours / "best_model.pth")
    content["architecture"]["min_event_sec"] = 4.0
    common.save_checkpoint(tmp_path / "wide.pth", content)

    def tail(checkpoint, *flags):
        video("--mode", "predict", "--checkpoint", checkpoint, "--manifest", made.manifests / "test.csv", *made.look,
              "--output", tmp_path / "p.csv", "--num_workers", 0, *flags)
        return numbers(read_csv(tmp_path / "p.csv"), "prob_tail")
    own = behaviours / "best_model.pth"
    assert tail(own, "--min_event_sec", 4).tolist() == tail(tmp_path / "wide.pth").tolist() != tail(own).tolist()


def test_members_that_read_other_windows_are_refused(made, behaviours, tmp_path):
    """The same network, once with windows of 4 s: their mean would be over other pixels."""
    content = common.read_checkpoint(behaviours / "best_model.pth")
    content["architecture"]["min_event_sec"] = 4.0
    common.save_checkpoint(tmp_path / "wide.pth", content)
    text = video("--mode", "predict", "--checkpoint", behaviours / "best_model.pth", tmp_path / "wide.pth", "--manifest",
                 made.manifests / "test.csv", *made.look, "--output", tmp_path / "p.csv", code=2).stderr
    assert "must agree" in text and "min_event_sec" in text and text.count("\n") == 1


def test_class_ensemble_of_predict_is_that_of_training(made, class_folds, tmp_path):
    video("--mode", "predict", "--checkpoint", class_folds, *made.everything, "--filter", "group==8", "--output",
          tmp_path / "p.csv", "--num_workers", 0)
    ours = {row["clip_id"]: row for row in read_csv(tmp_path / "p.csv")}
    for row in read_csv(class_folds / "test_ensemble" / "predictions_test.csv"):
        assert float(ours[row["clip_id"]]["prob_tail"]) == pytest.approx(float(row["prob_tail"]), abs=1e-4)
        assert ours[row["clip_id"]]["pred_label"] == row["pred_label"]


def test_predictions_of_the_folds_own_rows_are_not_held_out(made, class_folds, tmp_path):
    """Every event outside the test pen trained one of the two models; the table says it, and who evaluates it too."""
    text = video("--mode", "predict", "--checkpoint", class_folds, *made.everything, "--output", tmp_path / "p.csv",
                 "--num_workers", 0).stdout
    rows = read_csv(tmp_path / "p.csv")
    tested = {row["clip_id"] for row in read_csv(class_folds / "test_ensemble" / "predictions_test.csv")}
    assert all(row["seen"] == ("new" if row["clip_id"] in tested else "train") for row in rows) and tested
    assert f"note: {len(rows) - len(tested)} of {len(rows)} rows trained the model" in text
    video("--mode", "evaluate", "--predictions", tmp_path / "p.csv", "--output", tmp_path / "m.json", "--output_dir",
          tmp_path / "out")
    metrics = read_json(tmp_path / "m.json")
    assert metrics["held_out"] is False and any("rows trained the model" in alarm for alarm in metrics["alarms"])
    assert {row["seen"] for row in read_csv(class_folds / "predictions_folds.csv")} == {"chose"}
    assert read_json(class_folds / "test_ensemble" / "metrics.json")["held_out"] is True


def test_baselines_decide_by_thresholds_from_the_same_rows(made, class_folds):
    """Temperature and threshold of the logistic regression, fitted anew on the other folds' rows, as the model's are."""
    pooled = {row["clip_id"]: row for row in read_csv(class_folds / "predictions_folds.csv")}
    own = [read_csv(class_folds / f"fold_{k}" / "predictions_val.csv") for k in range(2)]
    assert "logistic_threshold" not in own[0][0], "validation rows: the most probable class, as the model's"
    names = ("ear", "tail")
    others = [row for rows in own[1:] for row in rows]
    p = np.stack([numbers(others, f"logistic_prob_{name}") for name in names], 1)
    label = np.array([names.index(row["true_label"]) for row in others])
    temperature = calibrating.fit_temperature(np.log(p), label)
    threshold = calibrating.fit_threshold(softmax(np.log(p) / temperature, axis=1), label)
    for row in own[0]:
        expected = softmax(np.log([float(row[f"logistic_prob_{name}"]) for name in names]) / temperature)[1]
        found = pooled[row["clip_id"]]
        assert float(found["logistic_prob_tail"]) == pytest.approx(expected, abs=1e-9)
        assert float(found["logistic_threshold"]) == pytest.approx(threshold, abs=1e-9)
    assert "logistic_threshold" in read_csv(class_folds / "test_ensemble" / "predictions_test.csv")[0]


LEAKS = ("shared_groups", "shared_videos", "shared_events", "duplicates", "overlapping_windows")


def test_audit_finds_exactly_what_was_planted(made, tmp_path):
    text = video("--mode", "audit", *made.parts("leaky_"), "--output", tmp_path / "a.json").stdout
    report = read_json(tmp_path / "a.json")
    for pair in ("train-val", "train-test", "val-test"):
        found = report["between"][pair]
        assert {"shared_groups": found["groups"]["count"], "shared_videos": found["videos"]["count"],
                "shared_events": found["events"]["count"], "duplicates": found["exact_duplicates"]["count"],
                "overlapping_windows": found["overlapping_windows"]["count"]} == dict.fromkeys(
                    LEAKS, 0) | PLANTED[pair], pair
    assert report["between"]["train-val"]["renamed_copies"]["count"] == 1
    assert report["within"]["train"]["overlapping_windows"]["count"] == PLANTED["train"]["overlapping_windows"]
    assert report["parts"]["train"]["repeated_rows"] == PLANTED["train"]["repeated_rows"]
    assert report["windows_past_the_end"]["past"]["count"] == PLANTED["test"]["windows_past_the_end"]
    assert report["windows_past_the_end"]["cut"]["count"] == 0 and report["unreadable"] == {}
    assert "3 of 14 test events are in train or val" in text


def test_audit_of_clean_parts_reports_zeros(made, behaviours, tmp_path):
    video("--mode", "audit", *made.parts(), "--output", tmp_path / "a.json", "--predictions",
          behaviours / "predictions_test.csv")
    report = read_json(tmp_path / "a.json")
    counts = [found["count"] for pair in report["between"].values() for found in pair.values()]
    counts += [seen["count"] for seen in report["seen_events"].values()]
    assert counts == [0] * len(counts) and report["windows_past_the_end"]["past"]["count"] == 0
    assert report["probability_clusters"]["rows"] == 10
    assert all("auc" in row and "low" in row for row in report["priors"])
    text = "\n".join(report["notes"])
    assert "nan" not in text and f"[no interval over {report['priors'][0]['subjects']} groups]" in text


def test_the_pair_is_a_prior_without_pixels(tmp_path):
    """A confound: one pair of animals holds most tail events. Judge: the pair's train rate, by hand, and its AUC."""
    draws, rows = np.random.default_rng(0), {"train": [], "test": []}
    for group in range(16):
        np.save(tmp_path / f"{group}.npy", np.zeros((10, 8, 8, 3), np.uint8))
        for event in range(10):
            pair = (1, 2) if draws.random() < 0.4 else (int(draws.integers(3, 5)), 2)
            label = "tail" if draws.random() < (0.6 if pair == (1, 2) else 0.1) else "ear"
            rows["train" if group < 8 else "test"].append((f"{group}.npy", label, group, *pair, event, event + 1))
    for part, lines in rows.items():
        with open(tmp_path / f"{part}.csv", "w", newline="") as handle:
            csv.writer(handle).writerows(
                [("path", "label", "group", "initiator_id", "receiver_id", "start_sec", "end_sec"), *lines])
    video("--mode", "audit", *(item for part in rows for item in (f"--{part}_manifest", tmp_path / f"{part}.csv")),
          "--output", tmp_path / "a.json", "--positive_class", "Tail", "--min_event_sec", 0.1, "--fps", 1)
    priors = {row["name"]: row for row in read_json(tmp_path / "a.json")["priors"]}
    n_tail = {pair: [row[1] == "tail" for row in rows["train"] if row[3:5] == pair]
              for pair in ((1, 2), (3, 2), (4, 2))}
    rate = [np.mean(n_tail[row[3:5]]) for row in rows["test"]]
    found = priors["pair"]
    assert found["auc"] == pytest.approx(roc_auc_score([row[1] == "tail" for row in rows["test"]], rate), abs=1e-9)
    assert found["auc"] > 0.7 and 0.5 < found["low"] < found["auc"] < found["high"] <= 1
    assert found["auc"] == max(row["auc"] for row in priors.values()), "initiator_id alone says as much"


# --- leakage ---------------------------------------------------------------------------------

def test_leaking_parts_are_refused_unless_allowed(made, tmp_path):
    text = video(*made.parts("leaky_"), *made.small, "--output_dir", tmp_path / "a", code=2).stderr
    for words in ("error: leakage", "train-val share 2 exact duplicates", "val-test share 3 events",
                  "--allow_leakage"):
        assert words in text, words
    assert not list((tmp_path / "a").glob("run_*"))
    text = video(*made.parts("leaky_"), *made.small, "--output_dir", tmp_path / "b", "--allow_leakage", "--dry_run").stdout
    run = only_run(tmp_path / "b")
    assert read_json(run / "leakage_report.json")["between"]["val-test"]["events"]["count"] == 3
    assert "3 rows skipped" in text and len(read_csv(run / "skipped.csv")) == 3
    assert all("past the end" in row["reason"] for row in read_csv(run / "skipped.csv"))
    assert all(re.fullmatch(r"leaky_\w+\.csv line \d+", row["row"]) for row in read_csv(run / "skipped.csv"))
    assert "test events are in train or val" in (run / "report.html").read_text(encoding="utf-8")


# --- one manifest, class folders, windows ---------------------------------------------------

@pytest.mark.parametrize("split_by", ["event", "video", "group"])
def test_one_manifest_is_split_by(made, split_by):
    """No event, video or group stands on two sides; splitting by event does leave videos on both."""
    args = train_video.parse_args(list(map(str, [*made.everything, "--split_by", split_by, "--train_ratio", 0.6,
                                                 "--val_ratio", 0.2, "--test_ratio", 0.2])))
    table = train_video.read_table(args)
    split = event_splits.make_split(args, table)
    levels = {"event": table.events, "video": table.videos, "group": table.groups}

    def n_shared(level):
        sides = [set(levels[level][rows]) for rows in split.values()]
        return len(sides[0] & sides[1]) + len(sides[0] & sides[2]) + len(sides[1] & sides[2])
    assert sorted(np.concatenate(list(split.values()))) == list(range(40)) and min(map(len, split.values())) >= 5
    assert n_shared("event") == n_shared(split_by) == 0
    assert (n_shared("video") > 0) == (split_by == "event")


def test_class_folders_and_npy_clips(made, tmp_path):
    """CLASS/clip.npy and no manifest at all: a whole run, with features of a frozen backbone."""
    for c, name in enumerate(("jump", "rest")):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(9 + 3 * c):
            clip = np.random.default_rng([c, i]).integers(0, 256, (6, 40, 48, 3), dtype=np.uint8)
            np.save(tmp_path / "clips" / name / f"{i}.npy", clip)
    text = video("--video_root", tmp_path / "clips", *made.small, "--dry_run", "--freeze_backbone", "--output_dir",
                 tmp_path / "out", "--test_ratio", 0.2, "--train_ratio", 0.6, "--cache", "none").stdout
    run = only_run(tmp_path / "out")
    assert all((run / name).exists() for name in [*CONTRACT, *CLASS_PLOTS]) and "21 rows" in text
    assert common.read_checkpoint(run / "best_model.pth")["names"] == ["jump", "rest"]
    assert {len(read_csv(run / "training_history.csv")), read_json(run / "args.json")["flags"]["epochs"]} == {1}


def test_photographs_are_classified_by_what_they_show(tmp_path):
    """Class folders of pictures: the readout takes appearance, as one frame has no motion."""
    draws = np.random.default_rng(0)
    for c, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(14):
            pixels = draws.integers(60 * c, 120 + 60 * c, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    video("--video_root", tmp_path / "photos", *SOLVED, "--no_pretrained", "--n_frames", 1, "--output_dir", tmp_path / "out",
          "--train_ratio", 0.5, "--val_ratio", 0.5)
    run = only_run(tmp_path / "out")
    assert "features by the inner folds: appearance" in (run / "log.txt").read_text()
    assert read_json(run / "metrics.json")["model"]["roc_auc"]["value"] > 0.95


def test_a_table_of_frames_becomes_seconds(made, tmp_path):
    """start_frame and end_frame, both inclusive, at 15 frames a second, in the minimal table path,label."""
    name = sorted((made.folder / "videos").rglob("N*.mp4"))[0]
    (tmp_path / "m.csv").write_text("path,label,start_frame,end_frame\n"
                                    f"{name},a,0,29\n{name},b,30,59\n{name},a,60,60\n")
    args = train_video.parse_args(["--manifest", str(tmp_path / "m.csv"), "--video_root", str(made.folder / "videos"),
                                   *map(str, made.small)])
    study = train_video.load_study(args, train_video.read_table(args), lambda text: None)
    fps = video_files.probe(name).header_fps
    assert study.table.windows[:2] == pytest.approx(np.array([[0, 30], [30, 60]]) / fps)
    assert np.ptp(study.table.windows[2]) == pytest.approx(1.0) and study.table.unit.tolist() == ["sec"] * 3


# --- folds ------------------------------------------------------------------------------------

def test_fold_table_and_scores_per_moment(scores):
    table = read_csv(scores / "fold_table.csv")
    assert [row["fold"] for row in table] == ["0", "1", "2", "mean", "SD"]
    assert {"rows", "best_epoch", "mae", "rmse", "r2", "pearson_r"} <= set(table[0])
    assert float(table[3]["mae"]) == pytest.approx(np.mean(numbers(table[:3], "mae")))
    assert float(table[4]["mae"]) == pytest.approx(np.std(numbers(table[:3], "mae"), ddof=1))
    rows = read_csv(scores / "fold_scores.csv")
    assert {row["moment"] for row in rows} == {"all", "M0", "M1", "M2", "M3", "M4"}
    assert {"fold", "target", "n", "mae", "rmse", "r2", "pearson_r"} <= set(rows[0])
    for k in range(3):
        own = read_csv(scores / f"fold_{k}" / "predictions_val.csv")
        [row] = [row for row in rows if (row["fold"], row["moment"], row["target"]) == (str(k), "all", "Head_low")]
        gap = numbers(own, "Head_low_predicted") - numbers(own, "Head_low_true")
        assert float(row["mae"]) == pytest.approx(np.nanmean(np.abs(gap))) and int(row["n"]) == np.isfinite(gap).sum()


def test_folds_pool_every_row_once_and_leave_the_test_animal_out(made, scores):
    table = {f"sequences/{row['sequence_path'].split('/')[-1]}": row for row in read_csv(made.sequences)}
    pooled = read_csv(scores / "predictions_folds.csv")
    kept = {name for name, row in table.items() if row["animal"] != "4"}
    assert sorted(row["clip_id"] for row in pooled) == sorted(kept) and len(kept) == 15
    for k in range(3):
        folder = scores / f"fold_{k}"
        assert all((folder / name).exists() for name in CONTRACT)
        split = read_json(folder / "splits.json")
        animals = {part: {table[name]["animal"] for name in split[part]} for part in ("train", "val", "test")}
        assert animals["test"] == {"4"} and not animals["train"] & animals["val"]
        assert {row["clip_id"] for row in read_csv(folder / "predictions_val.csv")} == set(split["val"])
    metrics = read_json(scores / "metrics.json")
    true, predicted = numbers(pooled, "NRS (1-10)_true"), numbers(pooled, "NRS (1-10)_predicted")
    [row] = [row for row in read_csv(scores / "scores.csv") if row["target"] == "NRS (1-10)"]
    assert float(row["r2"]) == pytest.approx(r2_score(true, predicted)) and metrics["part"] == "folds"
    assert float(row["bias"]) == pytest.approx((predicted - true).mean()) and len(metrics["folds"]) == 3
    assert "moment_mean_predicted" not in pooled[0] and "NRS (1-10)_moment_mean" in pooled[0]


def test_moment_mean_is_the_mean_of_the_other_folds(made, scores):
    table = {f"sequences/{row['sequence_path'].split('/')[-1]}": row for row in read_csv(made.sequences)}
    train = read_json(scores / "fold_1" / "splits.json")["train"]
    overall = np.mean([float(table[name]["Total.Facial.scale"]) for name in train])
    for row in read_csv(scores / "fold_1" / "predictions_val.csv"):
        same = [float(table[name]["Total.Facial.scale"]) for name in train
                if table[name]["moment"] == table[row["clip_id"]]["moment"]]
        smoothed = np.mean([*same, overall])  # as the section Without a pixel has it
        assert float(row["Total.Facial.scale_moment_mean"]) == pytest.approx(smoothed)


def test_bounded_scores_stay_in_their_range(scores):
    content = common.read_checkpoint(scores / "fold_0" / "best_model.pth")
    low, span = (content["model"][f"head.{name}"].numpy() for name in ("offset", "span"))
    for row in read_csv(scores / "predictions_folds.csv"):
        if row["clip_id"] in read_json(scores / "fold_0" / "splits.json")["val"]:
            values = np.array([float(row[f"{name}_predicted"]) for name in content["names"]])
            assert (values >= low - 1e-4).all() and (values <= low + span + 1e-4).all()


def test_the_ensemble_judges_the_test_animal(scores):
    metrics = read_json(scores / "test_ensemble" / "metrics.json")
    members = [read_csv(scores / f"fold_{k}" / "predictions_test.csv") for k in range(3)]
    ensemble = read_csv(scores / "test_ensemble" / "predictions_test.csv")
    mean = np.mean([numbers(rows, "NRS (1-10)_predicted") for rows in members], axis=0)
    assert numbers(ensemble, "NRS (1-10)_predicted") == pytest.approx(mean) and len(ensemble) == 5
    assert metrics["held_out"] and metrics["part"] == "test" and metrics["sample"]["subjects"] == 1
    assert metrics["model"]["r2"]["low"] is None, "one subject has no interval"


def test_class_folds_judge_criteria_and_pool_calibration(class_folds):
    """Seven pens give intervals: PASS, FAIL and NOT RESOLVABLE; each fold is calibrated on the others."""
    metrics = read_json(class_folds / "metrics.json")
    verdicts = {f"{entry['name']}{entry['relation']}": entry["verdict"] for entry in metrics["criteria"]}
    assert verdicts == {"accuracy<=": "PASS on validation", "accuracy>": "FAIL", "auc>": "NOT RESOLVABLE"}
    auc = metrics["model"]["roc_auc"]
    assert auc["low"] < 0.5 < auc["high"], "random features"
    pooled = {row["clip_id"]: row for row in read_csv(class_folds / "predictions_folds.csv")}
    own = [read_csv(class_folds / f"fold_{k}" / "predictions_val.csv") for k in range(2)]
    assert len(pooled) == sum(map(len, own)) == 35
    logits, label = (np.concatenate(each) for each in zip(*(
        (np.stack([numbers(rows, f"logit_{name}") for name in ("ear", "tail")], 1),
         [int(row["true_label"] == "tail") for row in rows]) for rows in own[1:])))
    temperature = calibrating.fit_temperature(logits, label)
    for row in own[0]:
        p = softmax([float(row["logit_ear"]) / temperature, float(row["logit_tail"]) / temperature])
        assert float(pooled[row["clip_id"]]["prob_tail"]) == pytest.approx(p[1], abs=1e-9)
    assert [row["fold"] for row in read_csv(class_folds / "fold_table.csv")] == ["0", "1", "mean", "SD"]
    assert "Folds before their calibration" in (class_folds / "report.html").read_text()


@pytest.fixture(scope="module")
def balanced_folds(made, tmp_path_factory):
    """The run folder of 2 folds of classes with 14, 13 and 13 events, one of them called baseline."""
    folder = tmp_path_factory.mktemp("balanced")
    rows = read_csv(made.manifests / "all.csv")
    for row, name in zip(rows, itertools.cycle(["ear", "baseline", "tail"])):
        row["behavior"] = name
    with open(folder / "all.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    video("--manifest", folder / "all.csv", "--video_root", made.folder / "videos", *made.small, "--epochs", 1, "--folds", 2,
          "--freeze_backbone", "--feature_views", 1, "--split_by", "event", "--output_dir", folder)
    return only_run(folder)


def test_events_of_two_animals_at_one_time_are_not_each_other(made, tmp_path):
    """A long event and a short one with the same middle, in different parts: none was trained on."""
    videos = sorted((made.folder / "videos").rglob("N*.mp4"))
    spans = [("ear", 0.0, 3.8), ("tail", 1.4, 2.4), ("ear", 4.0, 7.8), ("tail", 5.4, 6.4)]
    common.write_table(tmp_path / "pairs.csv", [
        {"path": str(path), "label": label, "start_sec": start, "end_sec": end}
        for path in videos for label, start, end in spans])
    video("--manifest", tmp_path / "pairs.csv", "--video_root", made.folder / "videos", *made.solved, "--split_by", "event",
          "--val_ratio", 0.2, "--test_ratio", 0.3, "--output_dir", tmp_path)
    for part in ("val", "test"):
        rows = read_csv(only_run(tmp_path) / f"predictions_{part}.csv")
        assert rows and {row["seen"] for row in rows} == {"new"}


def test_all_folds_have_one_positive_class(balanced_folds):
    folders = [balanced_folds, *(balanced_folds / f"fold_{k}" for k in range(2))]
    assert {read_json(folder / "metrics.json")["positive_class"] for folder in folders} == {"baseline"}
    stored = [common.read_checkpoint(folder / "best_model.pth")["positive"] for folder in folders[1:]]
    assert set(stored) == {"baseline"}


def test_a_class_called_baseline_has_its_own_auc(balanced_folds, tmp_path):
    """In metrics.json, in the report, and where the predictions file is judged again."""
    rows = read_csv(balanced_folds / "predictions_folds.csv")
    video("--mode", "evaluate", "--predictions", balanced_folds / "predictions_folds.csv", "--output",
          tmp_path / "m.json", "--output_dir", tmp_path)
    records = [read_json(path)["per_class"] for path in (balanced_folds / "metrics.json", tmp_path / "m.json")]
    assert records[0] == records[1] and [entry["name"] for entry in records[0]] == ["baseline", "ear", "tail"]
    page = (balanced_folds / "report.html").read_text(encoding="utf-8")
    assert "mean AUC" in read_json(tmp_path / "m.json")["verdict"] and page.count("mean AUC") >= 2
    for entry in records[0]:
        true = [row["true_label"] == entry["name"] for row in rows]
        auc = roc_auc_score(true, numbers(rows, f"prob_{entry['name']}"))
        assert entry["model"]["roc_auc"]["value"] == pytest.approx(auc, abs=1e-9)
        other = roc_auc_score(true, numbers(rows, f"{read_json(tmp_path / 'm.json')['baseline_name']}_prob_{entry['name']}"))
        assert entry["baseline"]["roc_auc"]["value"] == pytest.approx(other, abs=1e-9)
        line = page.split(f'<th scope="row">{entry["name"]}</th>')[-1].split("</tr>")[0]
        assert f"<td>{auc:.3f}" in line or f'<td class="num">{auc:.3f}' in line


def test_columns_of_a_class_are_no_baseline(tmp_path):
    """Classes a, prob_a and x_prob_a beside a baseline: each column is read for what it is."""
    names, blocks = ["a", "prob_a", "x_prob_a"], ("prob", "logit", "train_prior_prob")
    rows = [{"clip_id": f"c{i}", "true_label": names[i % 3],
             **{f"{kind}_{name}": (1 + i + 10 * k + 100 * c) / (3 * (101 + i + 10 * k)) for k, kind in enumerate(blocks)
                for c, name in enumerate(names)}} for i in range(6)]
    common.write_table(tmp_path / "p.csv", rows)
    found = prediction_tables.read_predictions(tmp_path / "p.csv")
    assert found.names == names and list(found.baselines) == ["train_prior"]
    assert found.probability[1] == pytest.approx(np.array([2, 102, 202]) / 306)
    assert found.baselines["train_prior"][1] == pytest.approx(np.array([22, 122, 222]) / 366)
    table = prediction_tables.ScoreTable(
        keys={"image": ["x", "y"]}, names=["pain", "pain_true"], truth=np.ones((2, 2)), predicted=np.zeros((2, 2)),
        baselines={})
    table.write(tmp_path / "t.csv")
    scores = prediction_tables.read_predictions(tmp_path / "t.csv")
    assert scores.names == ["pain", "pain_true"] and scores.truth.all() and not scores.predicted.any()


def test_frozen_backbone_does_not_change(made, class_folds):
    weights = common.read_checkpoint(class_folds / "fold_1" / "best_model.pth")["model"]
    for name, value in torch.load(made.weights).items():
        assert name.startswith("fc.") or torch.equal(value, weights[f"backbone.{name}"]), name


def test_folds_continue_fold_by_fold(scores):
    """A run that lost its last fold: the finished ones are taken as they are, the pooled result is the same."""
    before = (scores / "predictions_folds.csv").read_bytes()
    (scores / "metrics.json").unlink()
    shutil.rmtree(scores / "fold_2")
    text = video("--resume", scores, "--task", "regress").stdout
    assert "fold 0 is finished" in text and "fold 2 is finished" not in text
    assert (scores / "predictions_folds.csv").read_bytes() == before


def test_one_fold_alone_and_a_file_of_folds(made, tmp_path):
    """--fold 1 of --cv_file: that fold's animals, a weight of 0, two scores; scores and folds in other forms."""
    folds = read_json(made.folder / "cv_folds.json")["cv_folds"]
    (tmp_path / "folds.json").write_text(json.dumps({"cv_folds": str(folds)}))
    rows = [{"animal_id" if name == "animal" else name: value or None for name, value in row.items()}
            | {"sequence_id": f"tensor({row['sequence_id']})"} for row in read_csv(made.sequences)]
    (tmp_path / "scores.json").write_text(json.dumps({"sequences": rows}))
    video("--task", "regress", "--manifest", tmp_path / "scores.json", "--video_root", made.folder, *made.small,
          "--epochs", 1, "--cv_file", tmp_path / "folds.json", "--fold", 1, "--folds", 4, "--output_dir", tmp_path / "runs",
          "--target_columns", "Total.Facial.scale", "NRS (1-10)", "--target_weights", "NRS (1-10)=0")
    run = only_run(tmp_path / "runs")
    assert [path.name for path in run.glob("fold_*[0-9]")] == ["fold_1"]
    rows = read_csv(run / "predictions_folds.csv")
    assert {row["group"] for row in rows} == set(map(str, folds[1]["val_animals"])) and len(rows) == 5
    assert {row["fold"] for row in rows} == {"1"}


# --- further flags ---------------------------------------------------------------------------

def test_dry_run_of_scores_writes_the_whole_run_folder(made, tmp_path):
    video("--task", "regress", "--manifest", made.sequences, *made.small, "--dry_run", "--filter", "moment!=M4",
          "--output_dir", tmp_path)
    run = only_run(tmp_path)
    assert all((run / name).exists() for name in CONTRACT) and len(read_csv(run / "training_history.csv")) == 1
    assert {"scores.csv", "scores.png", "predicted_against_true.png"} <= {path.name for path in run.iterdir()}
    assert {row["moment"] for row in read_json(run / "metrics.json")["per_moment"]} <= {"M0", "M1", "M2", "M3"}


def test_fine_tuning_starts_from_the_other_weights(made, behaviours, tmp_path):
    video(*made.parts(), *made.small, "--init_from", behaviours / "best_model.pth", "--epochs", 1, "--lr", 1e-12,
          "--min_lr", 0, "--output_dir", tmp_path, "--select", "f1_tail", "--loss", "focal", "--label_smoothing", 0.1)
    ours, theirs = (common.read_checkpoint(run / "best_model.pth")["model"] for run in (only_run(tmp_path), behaviours))
    assert torch.allclose(ours["lstm.weight_ih_l0"], theirs["lstm.weight_ih_l0"], atol=1e-6)
    assert torch.allclose(ours["head.linear.bias"], theirs["head.linear.bias"], atol=1e-6)


def test_configs_are_read(made):
    """Every shipped configuration of this script; its values are flags and pass their types."""
    found = {}
    for name in ("video_baseline", "video_intravideo", "video_intravideo_boosted", "pain_scores", "video_small_data"):
        flags = ["--manifest", "events.csv", "--config", str(ROOT / f"configs/{name}.yaml")]
        found[name] = train_video.parse_args(flags)
    baseline, boosted, pain = (found[name] for name in ("video_baseline", "video_intravideo_boosted", "pain_scores"))
    assert (baseline.split_by, baseline.dropout, baseline.weight_decay, baseline.lr, baseline.epochs,
            baseline.select) == ("video", 0.3, 0.01, 1e-4, 20, "macro_f1")
    assert found["video_intravideo"].split_by == "event" and found["video_intravideo"].boost_to == 0
    assert (boosted.split_by, boosted.boost_to) == ("event", 0.3)
    assert (pain.task, pain.model, pain.n_frames, pain.epochs, pain.batch_size, pain.lr, pain.min_epochs) == (
        "regress", "cnn_lstm", 32, 50, 64, 5e-5, 5)
    assert all(f"configs/{name}.yaml" in (ROOT / f"configs/{name}.yaml").read_text() for name in found)


# --- mistakes: message and exit code -----------------------------------------------------------

FLAG_MISTAKES = {
    "nothing to read": ([], ["--mode train needs", "--manifest"]),
    "two kinds of manifest": (["--manifest", "a.csv", "--train_manifest", "b.csv"], ["split here"]),
    "parts without train": (["--val_manifest", "b.csv"], ["--train_manifest"]),
    "parts and folds": (["--train_manifest", "a.csv", "--folds", 3], ["without folds"]),
    "scores in manifests of parts": (["--task", "regress", "--train_manifest", "a.csv"], ["needs --manifest where --task is regress"]),
    "loss of the other task": (["--manifest", "a.csv", "--loss", "mse"], ["--loss mse", "--task classify"]),
    "two corrections of balance": (["--manifest", "a.csv", "--balance", "sampler", "--focal_alpha", 0.7, "--loss",
                                    "focal"], ["--focal_alpha 0.7", "--force"]),
    "scores by a clip network": (["--manifest", "a.csv", "--task", "regress", "--model", "r3d_18"], ["cnn_lstm"]),
    "mixup of scores": (["--manifest", "a.csv", "--task", "regress", "--mixup", 0.2], ["--mixup"]),
    "training of a solved model": (["--manifest", "a.csv", "--model", "motion_readout", "--balance", "sampler",
                                    "--epochs", 5, "--loss", "focal"], ["solved, not trained", "--epochs", "--balance", "--loss"]),
    "predict without checkpoint": (["--mode", "predict", "--manifest", "a.csv"], ["--checkpoint"]),
    "evaluate without predictions": (["--mode", "evaluate"], ["--predictions"]),
    "unknown flag": (["--manifest", "a.csv", "--clip_per_event", 3], ["--clips_per_event"]),
    "one fold": (["--manifest", "a.csv", "--folds", 1], ["at least 2"]),
    "share above 1": (["--manifest", "a.csv", "--max_missing", 5], ["max_missing"]),
    "bounded classes": (["--manifest", "a.csv", "--bounded"], ["--task classify does not use --bounded"]),
    "sums and columns of classes": (["--manifest", "a.csv", "--consistency_weight", 0.5, "--target_columns",
                                     "a"], ["--task classify does not use --consistency_weight, --target_columns"]),
    "labels of scores": (["--manifest", "a.csv", "--task", "regress", "--label_smoothing", 0.1, "--jitter_sec", 1,
                          "--positive_class", "a", "--label_column", "b", "--time_unit", "ms"],
                         ["--jitter_sec, --label_column, --label_smoothing, --positive_class, --time_unit"]),
    "balance of scores": (["--manifest", "a.csv", "--task", "regress", "--balance", "weights", "--boost_to", 0.2, "--label_map",
                           "m.json"], ["--task regress does not use --balance, --boost_to, --label_map"]),
    "two corrections by repeats": (["--manifest", "a.csv", "--balance", "weights", "--boost_to", 0.4],
                                   ["--balance weights", "--boost_to 0.4", "--force"]),
    "tuning of a solved model": (["--manifest", "a.csv", "--model", "motion_readout", "--freeze_stages", 2, "--jitter_sec", 1,
                                  "--weight_decay", 0.1, "--optimizer", "sgd"],
                                 ["--freeze_stages", "--jitter_sec", "--optimizer", "--weight_decay"]),
    "groups and a file of the split": (["--manifest", "a.csv", "--test_groups", "14", "--split_file", "s.json"],
                                       ["one way to split", "--test_groups", "--split_file"]),
    "groups and a share of the test": (["--manifest", "a.csv", "--test_groups", "14", "--test_ratio", 0.2],
                                       ["one way to split", "--test_ratio"]),
    "parts and groups": (["--train_manifest", "a.csv", "--test_groups", "14"], ["manifests of parts", "--test_groups"]),
    "parts and a share of the test": (["--train_manifest", "a.csv", "--test_ratio", 0.2], ["manifests of parts", "--test_ratio"]),
    "a file of folds and one of the split": (["--manifest", "a.csv", "--task", "regress", "--cv_file", "c.json", "--split_file",
                                              "s.json"], ["one way to split", "--cv_file", "--split_file"]),
    "one file for recordings": (["--mode", "predict", "--checkpoint", "m", "--video", "v", "--output", "p.csv"], ["--output"]),
    "copies of rows": (["--mode", "predict", "--checkpoint", "m", "--manifest", "a.csv", "--annotate"],
                       ["predict without --video does not use --annotate"]),
    "another rate than the checkpoint's": (["--mode", "predict", "--checkpoint", "m", "--manifest", "a.csv", "--fps", 5,
                                            "--n_frames", 8], ["--fps, --n_frames"]),
    "another class than the checkpoint's": (["--mode", "predict", "--checkpoint", "m", "--video", "v", "--positive_class", "a"],
                                            ["whose checkpoint says it, does not use --positive_class"]),
}


def test_what_is_off_is_no_mistake_of_any_task():
    assert train_video.parse_args("--manifest a.csv --consistency_weight 0 --boost_to 0".split())


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("video*.yaml")) + ["pain_scores.yaml"])
@pytest.mark.parametrize("mode", [
    ["--manifest", "a.csv"], ["--manifest", "a.csv", "--test_groups", "14,17"], ["--manifest", "a.csv", "--mode", "audit"],
    ["--mode", "predict", "--checkpoint", "m", "--manifest", "a.csv"], ["--mode", "predict", "--checkpoint", "m", "--video", "v"],
    ["--mode", "judge_bouts", "--predictions", "p", "--manifest", "a.csv"], ["--mode", "evaluate", "--predictions", "p.csv"]])
def test_a_configuration_types_no_flag(config, mode):
    """What a shipped configuration says is no mistake of the user in any mode."""
    assert train_video.parse_args(["--config", str(ROOT / "configs" / config), *mode])
    if config.startswith("video_intra") and "train" not in mode:
        train_video.parse_args(["--config", str(ROOT / "configs" / config), "--train_manifest", "a.csv"])


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_mistakes_in_the_flags(name):
    flags, words = FLAG_MISTAKES[name]
    text = video(*flags, code=2).stderr
    assert "Traceback" not in text
    for word in words:
        assert word in text, text


def val(made):
    return ["--manifest", made.manifests / "val.csv", *made.look]


DATA_MISTAKES = {
    "missing manifest": (lambda d: ["--manifest", "none.csv"], ["none.csv"]),
    "missing video root": (lambda d: ["--manifest", d.manifests / "val.csv", "--video_root", "nowhere"], ["nowhere"]),
    "no column of labels": (lambda d: ["--manifest", d.sequences, "--video_root", d.folder], ["labels"]),
    "labels without a class": (lambda d: ["--manifest", d.manifests / "all.csv", "--video_root", d.folder / "videos",
                                          "--label_map", d.folder / "map.json"], ["'tail'", "rows)", "--label_map"]),
    "videos that are not there": (lambda d: ["--manifest", d.manifests / "val.csv", "--video_root", d.folder /
                                             "sequences"], ["3 of 3 videos", "--max_missing"]),
    "unknown class": (lambda d: [*val(d), "--positive_class", "tale"], ["tale", "tail"]),
    "unknown metric of selection": (lambda d: [*val(d), "--select", "tail_f2"], ["tail_f2", "tail_f1"]),
    "unknown criterion": (lambda d: [*val(d), "--criteria", "tail_recal>0.3"], ["tail_recal", "tail_recall"]),
    "unknown group column": (lambda d: [*val(d), "--group_column", "grup"], ["grup", "group"]),
    "filter that keeps nothing": (lambda d: [*val(d), "--filter", "camera_id==99"], ["keeps none of 10"]),
    "filter that cannot be read": (lambda d: [*val(d), "--filter", "camera_id"], ["--filter expects"]),
    "weight of an unknown level": (lambda d: [*val(d), "--sample_weight", "camera_id:77=2"], ["camera_id '77'"]),
    "unknown preset": (lambda d: [*val(d), "--augment_for", "camera_id:8=heavier"], ["heavier", "heavy"]),
    "unknown test group": (lambda d: [*val(d), "--test_groups", "12"], ["no such groups: 12"]),
    "unknown network": (lambda d: [*val(d), "--model", "r3d_81", "--split_by", "event"], ["r3d_81", "r3d_18"]),
    "more folds than groups": (lambda d: [*val(d), "--folds", 5], ["5", "groups"]),
    "unknown score": (lambda d: ["--task", "regress", "--manifest", d.sequences, "--target_columns", "Head_lo"],
                      ["Head_lo", "Head_low"]),
    "weight of an unknown score": (lambda d: ["--task", "regress", "--manifest", d.sequences, "--target_weights",
                                              "Head=2"], ["--target_weights", "Head=2"]),
    "a file of folds without folds": (lambda d: ["--task", "regress", "--manifest", d.sequences, "--cv_file",
                                                 d.folder / "ground_truth.json"], ["cv_folds"]),
    "a fold that the file of folds lacks": (lambda d: ["--task", "regress", "--manifest", d.sequences, "--cv_file",
                                                       d.folder / "cv_folds.json", "--fold", 99],
                                            ["--fold 99", "4 folds, from 0 to 3"]),
}


@pytest.mark.parametrize("name", DATA_MISTAKES)
def test_mistakes_in_the_data(made, tmp_path, name):
    flags, words = DATA_MISTAKES[name]
    (made.folder / "map.json").write_text('{"Ear": "ear"}')
    text = video(*made.small, "--output_dir", tmp_path, *flags(made), code=2).stderr
    assert text.startswith("error: ") and "Traceback" not in text and text.count("\n") == 1, text
    for word in words:
        assert word in text, text
    assert not list(tmp_path.glob("run_*")), "a mistake leaves no run folder behind"


@pytest.fixture
def sequences(tmp_path):
    """A table of 6 sequences of 3 animals, whose pictures nobody can read."""
    for k in range(6):
        (tmp_path / f"s{k}").mkdir()
        (tmp_path / f"s{k}" / "0.jpg").write_bytes(b"no picture")
    rows = [f"s{k},{k // 2},{k},{k % 3}\n" for k in range(6)]
    (tmp_path / "scores.csv").write_text("path,animal,ears,mouth\n" + "".join(rows))
    (tmp_path / "cv.json").write_text(json.dumps([
        {"train_animals": [0, 1, 77], "val_animals": [2]}, {"train_animals": [1, 2], "val_animals": [0]}]))
    return ["--task", "regress", "--manifest", tmp_path / "scores.csv", "--group_column", "animal", "--no_pretrained",
            "--backbone", "shufflenet_v2_x0_5", "--image_size", 32, "--output_dir", tmp_path / "runs"]


@pytest.mark.parametrize("flags, words", [
    (["--cv_file", "none.json"], ["none.json"]), (["--cv_file", "cv.json", "--folds", 5], ["--folds 5", "has 2"]),
    (["--cv_file", "cv.json", "--test_groups", "2"], ["cv.json, fold 0", "without rows: 2"]),
    (["--cv_file", "cv.json", "--criteria", "r3>0"], ["r3"]),
    (["--folds", 3, "--test_groups", "9"], ["no such groups: 9"]),
    (["--test_groups", "2", "--val_ratio", 0, "--train_ratio", 1], ["must not be empty"]),
    (["--split_file", "none.json"], ["none.json"]), (["--folds", 3, "--select", "r3"], ["r3"]),
    (["--folds", 3, "--moment_column", "tim"], ["--moment_column", "tim"]),
    (["--folds", 3, "--target_columns", "rare"], ["the same score in every train row"])])
def test_what_the_table_tells_is_checked_before_a_picture_is_read(sequences, tmp_path, monkeypatch, flags, words):
    text = (tmp_path / "scores.csv").read_text().replace("\n", ",1\n").replace("mouth,1", "mouth,rare").replace("s0,0,0,0,1", "s0,0,0,0,2")
    (tmp_path / "scores.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_video, "load_study", lambda *a: pytest.fail("the videos were decoded first"))
    found = video(*sequences, *flags, code=2).stderr
    assert found.startswith("error: ") and found.count("\n") == 1
    for word in words:
        assert word in found, found


def test_animals_of_a_file_of_folds_without_rows_are_noted(sequences, tmp_path):
    text = video(*sequences, "--cv_file", tmp_path / "cv.json", code=2).stdout
    assert "note: --cv_file, fold 0: no rows of 77" in text


def test_parts_without_validation_rows_are_refused(tmp_path):
    for k in range(4):
        np.save(tmp_path / f"{k}.npy", np.zeros((8, 40, 40, 3), np.uint8))
    (tmp_path / "m.csv").write_text("path,label\n" + "".join(f"{k}.npy,{'ab'[k % 2]}\n" for k in range(4)))
    text = video("--train_manifest", tmp_path / "m.csv", "--val_ratio", 0, *SOLVED, "--no_pretrained", "--output_dir",
                 tmp_path / "runs", code=2).stderr
    assert "--val_ratio 0" in text and "Traceback" not in text


def test_published_weights_that_cannot_be_had(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for model in ("r3d_18", "cnn_lstm"):
        text = video(*SMALL, *val(made), "--model", model, "--split_by", "event", "--output_dir", tmp_path / "out",
                     code=2).stderr
        assert "--weights FILE" in text and "--no_pretrained" in text and text.count("\n") == 1
    monkeypatch.setattr(video_files.ClipStore, "decode", lambda *a: pytest.fail("decoded before the weights were looked for"))
    args = train_video.parse_args(list(map(str, [*SMALL, *val(made), "--split_by", "event", "--output_dir", tmp_path / "out",
                                                 "--backbone", "resnet18"])))
    with pytest.raises(common.UserError, match="no pretrained weights for resnet18"):
        train_video.train(args)


def test_windows_after_the_end_of_their_videos_leave_nothing(made, tmp_path):
    """And a rate above that of the videos is said."""
    path = next((made.folder / "videos").rglob("*.mp4"))
    rows = [{"path": path, "label": "ab"[k % 2], "start_sec": 900 + 10 * k, "end_sec": 902 + 10 * k} for k in range(12)]
    common.write_table(tmp_path / "late.csv", rows)
    said = video("--manifest", tmp_path / "late.csv", *made.small, "--fps", 90, "--output_dir", tmp_path, code=2)
    assert "none of 12 rows can be used (such as: its window starts past the end of the video)" in said.stderr
    assert re.search("note: .*--fps", said.stdout)
    for row in rows[:5]:
        row.update(start_sec=0, end_sec=300)
    rows.insert(0, {**rows[0], "label": ""})
    common.write_table(tmp_path / "hours.csv", rows)
    args = train_video.parse_args(["--manifest", str(tmp_path / "hours.csv"), "--cache", "none"])
    table = train_video.read_table(args)
    with pytest.raises(common.UserError, match="2 of 9 rows can be used .such as: its window starts past the end.*seconds.*1:05"):
        train_video.load_study(args, table, lambda text: None)
    args = common.with_flags(args, max_missing=0.9)
    assert len(train_video.load_study(args, table, lambda text: None).table) == 2


def test_broken_videos_are_named_and_counted(made, behaviours, tmp_path):
    root = tmp_path / "videos"
    shutil.copytree(made.folder / "videos", root)
    broken = next(root.rglob("N864*.mp4"), None) or next(root.rglob("N864*"))
    broken.write_bytes(b"no video")
    flags = ["--video_root", root, "--manifest", made.manifests / "all.csv", "--label_map",
             made.manifests / "label_map.json", *made.small, "--dry_run"]
    text = video(*flags, "--output_dir", tmp_path / "a", code=2).stderr
    assert "5 of 40 rows" in text and broken.name in text and "--max_missing" in text
    video(*flags, "--output_dir", tmp_path / "b", "--max_missing", 0.2)
    assert {row["video"] for row in read_csv(only_run(tmp_path / "b") / "skipped.csv")} == {str(broken)}
    text = video(*flags, "--output_dir", tmp_path / "c", "--max_missing", 0.2, "--on_bad_file", "error", code=2).stderr
    assert broken.name in text
    text = video("--mode", "predict", "--checkpoint", behaviours, *flags[:6], "--max_missing", 0.2, "--output",
                 tmp_path / "p.csv").stdout
    assert len(re.findall(f"skipped: .*{broken.name}: ", text)) == 5 and "5 rows skipped" in text


def test_checkpoints_that_do_not_fit(made, behaviours, scores, tmp_path):
    """Another script's, another task's and one of other classes; an epoch's own file predicts without calibration."""
    content = common.read_checkpoint(behaviours / "best_model.pth")
    flags = ["--mode", "predict", *val(made), "--output", tmp_path / "p.csv", "--checkpoint"]
    common.save_checkpoint(tmp_path / "other.pth", {**content, "script": "train_assessor.py"})
    assert "train_assessor.py" in video(*flags, tmp_path / "other.pth", code=2).stderr
    of_scores = ["--mode", "predict", "--checkpoint", scores, "--video", made.folder / "videos"]
    assert "--video needs checkpoints of --task classify" in video(*of_scores, code=2).stderr
    text = video(*flags, behaviours, scores, code=2).stderr
    assert "must agree" in text and text.count("\n") == 1
    top = next(behaviours.glob("top_epoch_*.pth"))
    video(*flags, top)
    rows = read_csv(tmp_path / "p.csv")
    assert "threshold" not in rows[0] and all(
        (row["pred_label"] == "tail") == (float(row["prob_tail"]) > 0.5) for row in rows)


@pytest.mark.parametrize("flags, code, words", [
    (["--freeze_backbone"], 2, "its backbone was trained"), (["--hidden", 8], 3, "does not fit this model")])
def test_weights_that_cannot_be_started_from_are_refused_before_videos_are_decoded(
        made, behaviours, scores, tmp_path, monkeypatch, flags, code, words):
    monkeypatch.setattr(train_video, "load_study", lambda *_: pytest.fail("the videos were decoded first"))
    text = video(*made.parts(), *made.small, "--init_from", scores / "fold_0" / "best_model.pth", "--output_dir",
                 tmp_path / "out", code=2).stderr
    assert "--init_from" in text and "Head_low" in text and not list((tmp_path / "out").glob("run_*"))
    text = video(*made.parts(), *made.small, *flags, "--init_from", behaviours, "--output_dir", tmp_path / "out", code=code)
    assert words in text.stderr and not list((tmp_path / "out").glob("run_*"))


def test_bounded_scores_do_not_start_from_a_head_without_bounds(made, scores, tmp_path):
    """Its offset and span are mean and SD, between which the sigmoid would hold the scores."""
    text = video("--task", "regress", "--manifest", made.sequences, *made.small, "--init_from", scores / "fold_0",
                 "--output_dir", tmp_path, code=2).stderr
    assert text.endswith("was trained for something else: bounded True, expected False\n")


def test_predictions_that_cannot_be_evaluated(tmp_path):
    for text, words in (("clip_id,a\n1,2\n", "NAME_predicted"), ("clip_id,prob_a\n1,1\n", "true_label"),
                        ("clip_id,true_label,prob_a\n1,b,1\n", "no column prob_"),
                        ("clip_id,true_label,prob_a,prob_b\n1,a,70,30\n", "divide percentages by 100, or turn logits"),
                        ("clip_id,true_label,prob_a,prob_b\n1,a,.7,.6\n", "sum 1"),
                        ("clip_id,true_label,prob_a,prob_b\n1,a,.7,.3\n2,b,1.4,-.4\n", "row 2: expected probabilities"),
                        ("clip_id,true_label,prob_a,prob_b,x_prob_a,x_prob_b\n1,a,1,0,3,4\n", "x_prob_a"),
                        ("clip_id,true_label,prob_a,prob_b\n1,,1,0\n", "the true label has no two")):
        (tmp_path / "p.csv").write_text(text)
        found = video("--mode", "evaluate", "--predictions", tmp_path / "p.csv", "--output_dir", tmp_path,
                      code=2).stderr
        assert words in found and found.count("\n") == 1


def test_a_checkpoint_keeps_the_pixel_range():
    args = train_video.parse_args(["--task", "regress", "--manifest", "m.csv"])
    study = SimpleNamespace(store=SimpleNamespace(pixel_range=(0.0, 1023.0)))
    objective = SimpleNamespace(names=["pain"], positive_name=None)
    model = SimpleNamespace(head=train_video.Head(4, 1))
    content = train_video.model_metadata(args, study, objective, model)
    assert content["architecture"]["pixel_range"] == (0, 1023) and "pixel_range" in train_video.READING
    assert content["positive"] is None and content["prior_shift"] == [0]


def test_the_verdict_is_repeated_without_clips_that_look_like_train_clips(tiny_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "add_similar", lambda run, features, split, keys: [
        (split["train"][0], split["val"][1]), (split["train"][2], split["val"][3])])
    run_here("train_video.py", *tiny_flags["train_video.py"], "--epochs", "1", "--output_dir", tmp_path)
    run = only_run(tmp_path)
    n_rows = len(json.loads((run / "splits.json").read_text())["val"])
    assert f"2 of {n_rows} rows look like one in another part of the split. Without them: " in (run / "log.txt").read_text()
