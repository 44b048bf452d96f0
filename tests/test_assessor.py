"""train_assessor.py and predict_assessor.py from end to end, as a user runs them, and every mistake by its message.

    python -m pytest tests/test_assessor.py
"""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.metrics import r2_score

import common
import exporting
import predict_assessor
import train_assessor
from conftest import DRAW, only_run, run_here, run_script, small_run
from readers import backbones

CONTRACT = [
    "args.json", "log.txt", "splits.json", "leakage_report.json", "training_history.csv", "training_history.png",
    "best_model.pth", "training_batch.jpg", "metrics.json", "predictions_val.csv", "report.html", "target_scaler.json",
    "per_dimension_performance.png", "best_model_per_dimension_performance.csv",
]


def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


def train(sample, output_dir, *flags, **options):
    return run_script("train_assessor.py", *small_run(sample, output_dir, *flags), **options)


def without_groups(flags):
    return [flag for flag in flags if flag not in ("--group_column", "subject")]


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(
        sample, folder, "--test_ratio", 0.2, "--train_ratio", 0.6, "--normalize_targets", "--criteria",
        "r2>0.9,mae_Valence<100", env=DRAW,
    )
    return only_run(folder)


@pytest.fixture(scope="module")
def folds(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    train(sample, folder, "--folds", 3, "--epochs", 1)
    return only_run(folder)


# --- the run folder ---------------------------------------------------------------

def test_run_folder_holds_what_the_contract_says(trained):
    missing = [name for name in [*CONTRACT, "predictions_test.csv"] if not (trained / name).stat().st_size]
    assert not missing
    record = json.loads((trained / "args.json").read_text())
    assert set(record) >= {"flags", "command", "versions", "git", "data", "device", "slurm"}
    assert record["flags"]["normalize_targets"] is True and record["data"]["pictures"] == 48


def test_history_has_a_row_for_every_epoch(trained):
    rows = read_csv(trained / "training_history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"learning_rate", "train_loss", "val_loss", "val_mse", "val_mae", "val_r2", "val_pearson_r"} <= set(rows[0])


def test_metrics_are_those_of_the_predictions_file(trained):
    """R2 and MAE of the test part, recomputed by scikit-learn from predictions_test.csv alone."""
    rows = read_csv(trained / "predictions_test.csv")
    metrics = json.loads((trained / "metrics.json").read_text())
    per_target = []
    for row in metrics["per_target"]:
        name = row["name"]
        pairs = np.array([[float(r[f"{name}_true"]), float(r[f"{name}_predicted"])] for r in rows if r[f"{name}_true"]])
        per_target.append(r2_score(pairs[:, 0], pairs[:, 1]))
        assert row["model"]["r2"]["value"] == pytest.approx(per_target[-1], abs=1e-9)
        assert row["model"]["mae"]["value"] == pytest.approx(np.abs(pairs[:, 0] - pairs[:, 1]).mean(), abs=1e-9)
    assert metrics["part"] == "test" and metrics["model"]["r2"]["value"] == pytest.approx(np.mean(per_target), abs=1e-9)


def test_columns_of_the_table_predict_without_a_pixel(sample, trained, folds):
    """Each with its R2 in other rows than it was made of, beside that of the model within its levels."""
    subject = {row["image"]: row["subject"] for row in read_csv(sample.ratings)}
    for run in trained, folds:
        rows = {row["name"]: row for row in json.loads((run / "metrics.json").read_text())["confounds"]}
        assert set(rows) == {"subject", "row order"}
        assert rows["subject"]["r2"] < 0.1 and not rows["subject"]["red_flag"], "no subject is in two parts"
        assert "Without a pixel" in (run / "report.html").read_text()
        part = "test" if run == trained else "folds"
        table = read_csv(run / f"predictions_{part}.csv")
        split = json.loads((run / "splits.json").read_text())
        n_train = len(split["train"]) if run == trained else len(subject) - len(split["fold_0"])
        n_blocks = max(2, n_train // 10)
        block = {image: row * n_blocks // len(subject) for row, image in enumerate(subject)}
        r2 = []
        for name in ("Valence", "Anger"):  # what is known of a subject without a train row is the train mean
            rated = [row for row in table if row[f"{name}_true"]]
            found = pd.DataFrame({kind: [float(row[f"{name}_{kind}"]) for row in rated]
                                  for kind in ("true", "predicted", "train_mean")})
            r2.append([r2_score(found.true, found.train_mean)])
            for level in subject, block:
                within = found - found.groupby([level[row["image"]] for row in rated]).transform("mean")
                r2[-1].append(r2_score(within.true, within.predicted))
        known = [rows["subject"]["r2"], *(rows[name]["model_r2_within_levels"] for name in ("subject", "row order"))]
        assert rows["row order"]["n_levels"] == n_blocks
        assert known == pytest.approx(np.mean(r2, axis=0).tolist(), abs=1e-9)


def test_groups_are_on_one_side_and_the_report_says_zero(sample, trained):
    splits = json.loads((trained / "splits.json").read_text())
    subject = {row["image"]: row["subject"] for row in read_csv(sample.ratings)}
    sides = {part: {subject[name] for name in splits[part]} for part in ("train", "val", "test")}
    assert (
        sides["train"].isdisjoint(sides["val"])
        and sides["train"].isdisjoint(sides["test"])
        and sides["val"].isdisjoint(sides["test"])
    )
    report = json.loads((trained / "leakage_report.json").read_text())
    assert all(
        found["count"] == 0
        for pair in report["between"].values()
        for what, found in pair.items()
        if what != "near_duplicates"
    )


def test_criteria_and_ceilings_are_judged(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    verdicts = {entry["name"]: entry["verdict"] for entry in metrics["criteria"]}
    assert verdicts["mae_Valence"] in ("PASS", "NOT RESOLVABLE") and verdicts["r2"] in ("FAIL", "NOT RESOLVABLE")
    ceilings = [value for value in metrics["ceiling"]["r2"] if value is not None]
    assert ceilings and all(0 <= value <= 1 for value in ceilings)


def test_scaler_is_fitted_on_train_rows_only(sample, trained):
    scaler = json.loads((trained / "target_scaler.json").read_text())
    rows = {row["image"]: row for row in read_csv(sample.ratings)}
    names = json.loads((trained / "splits.json").read_text())["train"]
    for k, name in enumerate(scaler["names"]):
        values = [float(rows[image][f"{name}_mean"]) for image in names if rows[image][f"{name}_mean"]]
        assert scaler["mean"][k] == pytest.approx(np.mean(values)) and scaler["sd"][k] == pytest.approx(np.std(values))
        baseline = [float(row[f"{name}_train_mean"]) for row in read_csv(trained / "predictions_test.csv")]
        assert baseline == pytest.approx([np.mean(values)] * len(baseline))


def test_a_split_and_weights_can_be_used_again(sample, trained, tmp_path):
    train(sample, tmp_path, "--split_file", trained / "splits.json", "--init_from", trained / "best_model.pth",
          "--normalize_targets", "--epochs", 1, "--lr", 1e-12)
    again, first = (json.loads((run / "splits.json").read_text()) for run in (only_run(tmp_path), trained))
    assert all(again[part] == first[part] for part in ("train", "val", "test"))
    ours, theirs = (common.read_checkpoint(run / "best_model.pth")["model"] for run in (only_run(tmp_path), trained))
    assert torch.allclose(ours["head.0.weight"], theirs["head.0.weight"], atol=1e-6)
    ours, theirs = ((run / "report.html").read_text() for run in (only_run(tmp_path), trained))
    assert "Started from random weights" in theirs and "Started from random weights" not in ours


def test_args_json_repeats_the_run(trained, tmp_path):
    """The config of a run, in another folder: the same history, byte for byte."""
    run_script("train_assessor.py", "--config", trained / "args.json", "--output_dir", tmp_path)
    assert (only_run(tmp_path) / "training_history.csv").read_bytes() == (trained / "training_history.csv").read_bytes()


def test_folds_pool_every_row_once(folds, sample):
    pooled = read_csv(folds / "predictions_folds.csv")
    assert sorted(row["image"] for row in pooled) == sorted(row["image"] for row in read_csv(sample.ratings))
    assert {row["fold"] for row in pooled} == {"0", "1", "2"}
    assert "widened x1.58 for 3 folds" in json.loads((folds / "metrics.json").read_text())["method"]
    for k in range(3):
        assert (folds / f"fold_{k}" / "best_model.pth").exists() and (folds / f"fold_{k}" / "report.html").exists()
        own = read_csv(folds / f"fold_{k}" / "predictions_val.csv")
        assert {row["image"] for row in own}.isdisjoint(
            json.loads((folds / f"fold_{k}" / "splits.json").read_text())["train"]
        )
    assert [row["fold"] for row in read_csv(folds / "fold_table.csv")] == ["0", "1", "2", "mean", "SD"]


def test_folds_continue_fold_by_fold(folds):
    """A run that lost its last fold: the finished ones are taken as they are, the pooled result is the same."""
    before = (folds / "predictions_folds.csv").read_bytes()
    (folds / "metrics.json").unlink()
    shutil.rmtree(folds / "fold_2")
    text = run_script("train_assessor.py", "--resume", folds).text
    assert "fold 0 is finished" in text and "fold 2 is finished" not in text
    assert (folds / "predictions_folds.csv").read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--folds", 3)])
def test_a_run_that_is_stopped_while_its_features_are_computed_can_be_continued(sample, tmp_path, monkeypatch, more):
    def stopped(*_):
        raise SystemExit(common.EXIT_SAVED)
    monkeypatch.setattr(train_assessor, "untuned_features", stopped)
    for _ in range(2):
        run_here("train_assessor.py", *small_run(sample, tmp_path, *more), "--resume", "auto", code=common.EXIT_SAVED)
    assert (only_run(tmp_path) / "args.json").exists()


def test_several_frozen_backbones_are_compared_on_the_same_folds(sample, tmp_path):
    """One command, one table of pairs; NAME=FILE has weights of its own. Judge of the difference: scikit-learn."""
    torch.save(torchvision.models.get_model("shufflenet_v2_x0_5", weights=None).state_dict(), tmp_path / "own.pth")
    flags = ["--backbone", "shufflenet_v2_x0_5", f"shufflenet_v2_x0_5={tmp_path / 'own.pth'}", "--head", "ridge",
             "--freeze_backbone", "--folds", 2, "--epochs", 1]
    train(sample, tmp_path, *flags)
    run = only_run(tmp_path)
    names = ["run_shufflenet_v2_x0_5", "run_shufflenet_v2_x0_5_own"]
    tables = [read_csv(run / name / "predictions_folds.csv") for name in names]
    assert [row["image"] for row in tables[0]] == [row["image"] for row in tables[1]]
    assert [row["fold"] for row in tables[0]] == [row["fold"] for row in tables[1]]
    scores = [name.removesuffix("_true") for name in tables[0][0] if name.endswith("_true")]
    r2 = {}
    for name, rows in zip(names, tables):
        pairs = [np.array([[float(row[f"{score}_{part}"]) for part in ("true", "predicted")] for row in rows if
                           row[f"{score}_true"]]).T for score in scores]
        r2[name] = np.mean([r2_score(*pair) for pair in pairs])
    assert r2[names[0]] != r2[names[1]]
    better, worse = sorted(names, key=r2.get, reverse=True)
    [pair] = read_csv(run / "comparison.csv")
    assert (pair["first"], pair["second"]) == (better, worse)
    assert float(pair["difference"]) == pytest.approx(r2[better] - r2[worse])
    assert float(pair["low"]) < float(pair["difference"]) < float(pair["high"])
    assert [row["folder"] for row in read_csv(run / "runs.csv")] == names
    (run / names[1] / "metrics.json").unlink()
    again = run_script("train_assessor.py", "--resume", run).text
    assert again.count("is finished") == 2 and "fold 1 of 2" not in again, "nothing is trained twice"
    assert "own.pth" in json.loads((run / names[1] / "args.json").read_text())["flags"]["weights"]
    assert "add --freeze_backbone" in train(sample, tmp_path, *flags[:3], code=2).text
    again = train(sample, tmp_path, flags[0], flags[1], flags[1], *flags[3:], code=2).text
    assert "would have the same name" in again


def test_a_single_value_for_batchnorm_is_said(sample, tmp_path):
    text = run_here("train_assessor.py", *small_run(sample, tmp_path, "--batch_size", 1), code=2).text
    assert "BatchNorm got a single value" in text and not list(tmp_path.rglob("*.pth"))


def test_single_ratings_give_a_split_half_ceiling(sample, tmp_path):
    flags = small_run(sample, tmp_path, "--ratings_file", sample.raw, "--target_columns", "Valence", "Anger", "--dry_run")
    run_script("train_assessor.py", *without_groups(flags))
    metrics = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert "Spearman-Brown" in metrics["ceiling"]["source"]


def test_dry_run_of_sparse_ratings(sample, tmp_path):
    """The first half of the pictures has no rating of Anger; how they were taken may be said by numbers."""
    def without_anger(header, rows):
        for row in rows[:24]:
            row[header.index("Anger_mean")] = ""
        for number, row in enumerate([header, *rows]):
            row += [number % 2, number % 3, number % 3] if number else ["camera", "session", "perceived_age"]
    table = edited(sample, tmp_path, without_anger)
    train(sample, tmp_path / "out", "--ratings_file", table, "--dry_run", "--batch_size", 2)
    metrics = json.loads((only_run(tmp_path / "out") / "metrics.json").read_text())
    assert {target["name"]: target["n"] > 1 for target in metrics["per_target"]} == {"Valence": True, "Anger": True}
    assert {row["name"] for row in metrics["confounds"]} == {"camera", "session", "subject", "row order"}
    assert metrics["headline"]["level"] != "good" and "A dry run" in metrics["doubts"][-1]


def untuned(weights):
    """For each value of the backbone: is it that of the random weights that the script begins with?"""
    torch.manual_seed(common.hash_seed(42))  # as the script seeds them
    backbone, _ = backbones.build_backbone("shufflenet_v2_x0_5", pretrained=False)
    trunk = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    same = []
    for name, value in backbone.state_dict().items():
        [kept] = [other for path, other in trunk.items() if path.endswith(f".{name}")]
        same.append(torch.equal(value, kept))
    return same


@pytest.mark.parametrize(
    "flags",
    [
        ["--freeze_backbone"],
        ["--freeze_epochs", 1, "--backbone_lr_mult", 0.1, "--loss", "weighted", "--cache", "none", "--augment", "light",
         "--save_every", 1],
        ["--loss", "smooth_l1", "--optimizer", "sgd", "--scheduler", "step", "--warmup_epochs", 1],
        [
            "--head", "ridge", "--flip_average", "--freeze_stages", 2, "--freeze_norm", "--image_size", 64,
            "--normalize_targets",
        ],
        ["--head", "ridge", "--freeze_backbone", "--image_size", 64, "--select", "last", "--save_top_k", 1, "--use_amp",
         "off"],
    ],
)
def test_options_run(sample, tmp_path, flags):
    train(sample, tmp_path, *flags, "--epochs", 2)
    assert len(read_csv(only_run(tmp_path) / "training_history.csv")) == 2
    metrics = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    content = common.read_checkpoint(only_run(tmp_path) / "best_model.pth")
    assert content["freeze_backbone"] == ("--freeze_backbone" in flags)
    if "--freeze_backbone" in flags:
        assert all(untuned(content["model"]))
    if "--freeze_epochs" in flags:
        first, second = (common.read_checkpoint(only_run(tmp_path) / f"checkpoint_epoch_{epoch}.pth")["model"]
                         for epoch in (1, 2))
        assert all(untuned(first)) and not any(untuned(second))
    assert "ridge" not in flags or not any("overfitting" in alarm for alarm in metrics["alarms"]), "it is solved"
    for path in only_run(tmp_path).glob("top_epoch_*.pth"):
        with pytest.raises(common.UserError, match="solved at the end of a run; give its best_model.pth"):
            train_assessor.load_assessor(path, common.choose_compute("cpu", "off"))
    is_frozen_ridge = {"ridge", "--freeze_backbone"} <= set(flags)
    is_same = is_frozen_ridge and metrics["baseline_name"] == "ridge_multiscale"
    assert metrics["verdict"].startswith("The model is the same predictor as the baseline (ridge regression on three feature scales)") == is_same
    if is_frozen_ridge:
        rows = read_csv(only_run(tmp_path) / "predictions_val.csv")
        pairs = [[float(row[f"Valence_{kind}"]) for row in rows] for kind in ("predicted", "ridge_multiscale")]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-3)


# --- learning --------------------------------------------------------------------

def test_one_batch_can_be_learnt_by_heart():
    """The training step, the loss mask and the model together: 8 random pictures are reproduced."""
    torch.manual_seed(0)
    backbone, width = backbones.build_backbone("shufflenet_v2_x0_5", pretrained=False)
    model = train_assessor.Assessor(backbone, width, 3, "mlp", 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    images, target = torch.randn(8, 3, 32, 32), torch.rand(8, 3) * 8 + 1
    target[0, 1] = math.nan
    for _ in range(50):
        loss = train_assessor.rating_loss("mse", model(images), target, torch.ones(8, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_missing_ratings_change_neither_loss_nor_gradient(loss):
    predicted = torch.randn(5, 4, requires_grad=True)
    target, weight = torch.randn(5, 4), torch.ones(5, 4)
    target[1, 2] = target[3, 0] = math.nan
    value = train_assessor.rating_loss(loss, predicted, target, weight)
    value.backward()
    labelled = ~torch.isnan(target)
    pointwise = {"mse": torch.nn.functional.mse_loss, "smooth_l1": torch.nn.functional.smooth_l1_loss}[loss]
    rows = [pointwise(p[m], t[m]) for p, t, m in zip(predicted, target, labelled)]
    assert torch.allclose(value, torch.stack(rows).mean())
    assert (predicted.grad[~labelled] == 0).all() and (predicted.grad[labelled] != 0).all()


def test_accumulated_gradients_equal_one_large_batch(sample, tmp_path):
    """Batch 8 x accumulate 2 and batch 16: the same first epoch, in fp32 without dropout, augmentation, BatchNorm."""
    rows = []
    for name, flags in {"a": ["--batch_size", 8, "--accumulate", 2], "b": ["--batch_size", 16]}.items():
        train(
            sample, tmp_path / name, "--epochs", 1, "--dropout", 0, "--augment", "none", "--use_amp", "off",
            "--freeze_backbone", *flags,
        )
        rows.append(read_csv(only_run(tmp_path / name) / "training_history.csv")[0])
    assert float(rows[0]["val_loss"]) == pytest.approx(float(rows[1]["val_loss"]), rel=1e-5)


def test_the_unit_of_the_ratings_does_not_decide_what_is_learnt(sample, tmp_path):
    """Ratings from 0 to 100 and the same divided by 20: the same R2 in every epoch."""
    rows = read_csv(sample.ratings)
    histories = []
    for factor in (1, 20):
        table = tmp_path / f"{factor}.csv"
        with open(table, "w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["image", "Valence_mean"])
            writer.writerows([row["image"], float(row["Valence_mean"]) * factor] for row in rows if row["Valence_mean"])
        flags = small_run(sample, tmp_path / f"out{factor}", "--dropout", 0, "--augment", "none", "--epochs", 2,
                          "--target_columns", "Valence_mean")
        flags[3] = table
        run_script("train_assessor.py", *without_groups(flags))
        histories.append([float(row["val_r2"]) for row in read_csv(only_run(tmp_path / f"out{factor}") /
                                                                    "training_history.csv")])
    assert histories[0] == pytest.approx(histories[1], abs=1e-3)


def test_recipe_for_small_data():
    """Chosen by the number of pictures where no flag names a model; what is typed wins over it."""
    needed = ["--images_dir", "a", "--ratings_file", "b"]
    plain = train_assessor.parse_args(needed)
    chosen = [train_assessor.choose_recipe(train_assessor.parse_args([*needed, *more]), pictures, {})
              for more, pictures in (([], 804), ([], 3000), (["--backbone", "resnet50"], 804),
                                     (["--recipe", "plain"], 804), (["--recipe", "small_data"], 9000),
                                     (["--head", "mlp"], 804), (["--head", "ridge"], 804))]
    assert chosen == ["small_data", "plain", "plain", "plain", "small_data", "plain", "small_data"]
    small = train_assessor.parse_args([*needed, "--epochs", "9"], "small_data")
    as_config = train_assessor.parse_args([*needed, "--epochs", "9", "--config", str(train_assessor.SMALL_DATA)])
    differ = {name for name, value in vars(small).items() if value != vars(as_config)[name]}
    assert differ == {"given", "config"} and small.epochs == 9 and small.head == "ridge" and small.select == "last"
    assert plain.head == "mlp" and plain.normalize_targets and plain.epochs == 50
    typed = train_assessor.parse_args([*needed, "--no_flip_average"], "small_data")
    assert small.flip_average and not typed.flip_average


@pytest.mark.parametrize("head, recipe", [("mlp", "plain"), ("ridge", "small_data")])
def test_a_network_to_start_from_brings_its_settings(sample, trained, tmp_path, monkeypatch, head, recipe):
    """The command that a finished run advises, by file or run folder; what is typed wins and is compared at once."""
    content = common.read_checkpoint(trained / "best_model.pth")
    common.save_checkpoint(tmp_path / "best_model.pth", {**content, "head": head})
    flags = ["--images_dir", sample.images, "--ratings_file", sample.ratings]
    for start in (tmp_path, tmp_path / "best_model.pth"):
        words = ["train_assessor.py", *flags, "--init_from", start, "--dropout", 0.2]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        args, _, chosen = train_assessor.parse_args_with_recipe()
        assert args.init_from == tmp_path / "best_model.pth" and (chosen, args.head) == (recipe, head)
        assert (args.backbone, args.image_size, args.dropout) == ("shufflenet_v2_x0_5", 32, 0.2)
        assert args.epochs == (5 if recipe == "small_data" else 50), "how it is trained is the recipe's"


def test_a_network_to_start_from_that_is_another_one_is_said_before_pictures_are_decoded(sample, trained, tmp_path):
    said = train(sample, tmp_path, "--init_from", trained, "--backbone", "shufflenet_v2_x1_0", code=2).text
    assert "backbone shufflenet_v2_x0_5, expected shufflenet_v2_x1_0" in said and "decoding" not in said
    assert not list(tmp_path.glob("run_*"))


def test_weights_of_a_rating_without_sd_are_1_without_a_warning(recwarn):
    study = SimpleNamespace(ratings=np.arange(8.0).reshape(4, 2), sd=np.array([[1, np.nan]] * 4), n=None)
    weights = train_assessor.rating_weights(study, np.arange(4), "weighted")
    assert (weights == 1).all() and not recwarn.list


def test_weights_are_inverse_variances_of_mean_1_and_count_in_the_loss():
    """By hand: the train ratings 1, 2, 3 have variance 2/3; noise / variance is 3/8, 3, 3/2 in the last three rows."""
    study = SimpleNamespace(ratings=np.array([[1.0], [2], [3], [9]]), sd=np.array([[0.0], [1], [2], [1]]),
                            n=np.array([[1], [4], [2], [0]]))
    raw = np.array([1 / (1 + 3 / 8), 1 / 4, 1 / (1 + 3 / 2)])
    weights = train_assessor.rating_weights(study, np.arange(3), "weighted")
    assert weights[:, 0] == pytest.approx([1, *raw / raw[:2].mean()])
    study.n = None  # noise / variance: 3/2, 6, 3/2
    weights = train_assessor.rating_weights(study, np.arange(3), "weighted")
    assert weights[2] / weights[1] == pytest.approx((1 + 3 / 2) / 7) and weights[3] == pytest.approx(weights[1])
    assert (train_assessor.rating_weights(study, np.arange(3), "mse") == 1).all()
    predicted, target = torch.tensor([[2.0, 7], [1, 5.5]]), torch.tensor([[1.0, math.nan], [3, 5]])
    loss = train_assessor.rating_loss("weighted", predicted, target, torch.tensor([[2.0, 9], [0.5, 4]]))
    assert loss == pytest.approx(((1 * 2) / 1 + (4 * 0.5 + 0.25 * 4) / 2) / 2)


def test_rows_without_a_picture_shift_no_rating_to_another_one(tmp_path):
    """Pictures as bright as they are rated; the first is missing and the third is broken."""
    raters = [2, 3, 2, 3, 1, 3]
    rows = [[f"{k}.png", f"p{p}", 20 * k + k * p, f"lens{k}"] for k in range(6) for p in range(raters[k])]
    for k in range(1, 6):
        Image.new("RGB", (40, 40), (20 * k,) * 3).save(tmp_path / f"{k}.png")
    (tmp_path / "2.png").write_text("no picture")
    with open(tmp_path / "r.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([["image", "participant", "valence", "lens"], *rows])
    args = train_assessor.parse_args(["--images_dir", str(tmp_path), "--ratings_file", str(tmp_path / "r.csv"),
                                      "--group_column", "lens", "--image_size", "32", "--on_bad_file", "skip",
                                      "--loss", "weighted"])
    table = train_assessor.read_table(args)
    study = train_assessor.load_study(args, SimpleNamespace(say=lambda text: None), table)
    kept = [1, 3, 4, 5]
    assert study.images.tolist() == [f"{k}.png" for k in kept]
    assert [int(study.picture(row).mean()) for row in range(4)] == [20 * k for k in kept]
    assert study.ratings[:, 0].tolist() == [np.mean(20 * k + k * np.arange(raters[k])) for k in kept]
    assert study.sd[:, 0].tolist() == pytest.approx([1, 3, math.nan, 5], nan_ok=True), "one rater has no sd"
    assert study.n[:, 0].tolist() == [raters[k] for k in kept]
    assert [list(each) for each in study.single_ratings["valence"]] == [
        [20 * k + k * p for p in range(raters[k])] for k in kept]
    assert study.groups.tolist() == study.columns["lens"].tolist() == [f"lens{k}" for k in kept]
    assert {row["image"]: row["reason"] for row in study.skipped}["0.png"] == "no such picture"
    assert {row["image"] for row in study.skipped} == {"0.png", "2.png"}

    split = {"train": np.array([0, 3]), "val": np.array([1]), "test": np.array([2])}
    args = common.with_flags(args, augment="full", num_workers=0)
    scaler = {"mean": np.array([10.0]), "sd": np.array([4.0])}
    loader, loaders = train_assessor.make_loaders(study, split, scaler, args, common.choose_compute("cpu", "off"), {})
    assert loader.dataset.augment == "full" and {each.dataset.augment for each in loaders.values()} == {"none"}
    weights = train_assessor.rating_weights(study, split["train"], "weighted")[:, 0]
    assert len(set(weights)) == 4
    for part, each in loaders.items():
        batch = {name: value for batch in each for name, value in batch.items()}
        assert batch["input"][:, 0, 0, 0].tolist() == [20 * kept[row] for row in split[part]]
        assert batch["target"][:, 0].tolist() == [(study.ratings[row, 0] - 10) / 4 for row in split[part]]
        assert batch["weight"][:, 0].tolist() == pytest.approx(weights[split[part]])


def test_heat_maps_are_of_pictures_as_the_model_takes_them(monkeypatch):
    taken = []
    monkeypatch.setattr(train_assessor.heat_maps, "explain", lambda *given: taken.append(given))
    monkeypatch.setattr(backbones, "map_paths", lambda backbone, inputs: ["layer"])
    model = SimpleNamespace(backbone=None)
    settings = {"pixel_mean": [0.1, 0.2, 0.3], "pixel_sd": [0.5, 0.25, 2.0]}
    pixels = np.full((2, 4, 4, 3), 51, np.uint8)
    train_assessor.explain(model, settings, pixels, common.choose_compute("cpu", "off"), [1])
    [(explained, paths, inputs, ratings)] = taken
    assert explained is model and paths == ["backbone.layer"] and ratings == [1]
    assert inputs.shape == (2, 3, 4, 4) and inputs[1, :, 2, 3].tolist() == pytest.approx([0.2, 0, -0.05], abs=1e-6)


def test_a_report_says_the_limits_of_its_own_run():
    def words(**flags):
        given = {"group_column": "subject", "head": "mlp", "init_from": "run", "pretrained": True} | flags
        return " ".join(train_assessor.limits(SimpleNamespace(**given)))
    assert "No --group_column" not in words() and "solved anew" not in words()
    assert "No --group_column" in words(group_column=None) and "solved anew" in words(head="ridge")


def test_the_head_works_in_fp32_whatever_the_backbone_works_in():
    model = train_assessor.Assessor(torch.nn.Flatten(), 12, 2, "ridge", 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.full((1, 3, 2, 2), 50.1))
    assert found.dtype == torch.float32 and torch.allclose(found, model.head(torch.full((1, 12), 50.1)), rtol=1e-6)


# --- prediction --------------------------------------------------------------------

@pytest.mark.parametrize("flags", [["--flip_average", "--freeze_stages", 2], ["--freeze_backbone"]])
def test_predictions_repeat_the_validation_predictions(sample, tmp_path, flags):
    """predict_assessor.py on the val pictures gives what training wrote, within the rounding of folded BatchNorm.

    A solved head tells pictures apart, which the mlp head does not within the epochs of a test.
    """
    train(sample, tmp_path / "run", "--head", "ridge", "--image_size", 64, "--epochs", 1, "--use_amp", "off", *flags)
    run = only_run(tmp_path / "run")
    run_script("predict_assessor.py", "--checkpoint", run, "--image_dir", sample.images, "--output", tmp_path / "p.csv",
               "--use_amp", "off")
    predicted = {row["image"]: row for row in read_csv(tmp_path / "p.csv")}
    rows = read_csv(run / "predictions_val.csv")
    names = ("Valence", "Anger")
    wanted = np.array([[float(row[f"{name}_predicted"]) for name in names] for row in rows])
    found = np.array([[float(predicted[row["image"].removeprefix("images/")][name]) for name in names] for row in rows])
    spread = wanted.std(axis=0).max()
    assert spread > 1e-3 and np.abs(found - wanted).max() < 0.005 * spread


def test_every_input_keeps_its_row(sample, folds, tmp_path):
    """A broken file and a missing one keep their rows, empty and with the reason; order is that of the list."""
    pictures = sorted(sample.images.iterdir())[:3]
    (tmp_path / "broken.jpg").write_text("no picture")
    listed = [pictures[2], "broken.jpg", pictures[0], "missing.png"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, listed)) + "\n", encoding="utf-8")
    output = tmp_path / "p.csv"
    text = run_script(
        "predict_assessor.py", "--checkpoint", folds, "--image_list", tmp_path / "list.txt", "--output", output,
        "--interval", 0.9,
    ).text
    rows = read_csv(output)
    assert [row["image"] for row in rows] == [str(path) for path in listed]
    assert rows[0]["Valence"] and rows[0]["Valence_sd"] and not rows[0]["error"]
    assert float(rows[0]["Valence_low"]) < float(rows[0]["Valence"]) < float(rows[0]["Valence_high"])
    assert not rows[1]["Valence"] and "broken.jpg" in rows[1]["error"] and "missing.png" in rows[3]["error"]
    assert "2 could not be read" in text and "3 checkpoint(s)" in text
    assert "note: --interval rests on rows that have chosen an epoch" in text


def test_predictions_say_what_makes_them_doubtful(sample, trained, tmp_path):
    """Noise is unlike the pictures, which are not; what was trained on, and what lies beyond the labels, is said."""
    noise = np.random.default_rng(0).choice(np.uint8([0, 255]), (36, 36, 3))
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_text("no picture")
    pictures = [tmp_path / "noise.png", tmp_path / "broken.png", *sorted(sample.images.iterdir())]
    flags = ["predict_assessor.py", "--images", *pictures, "--output", tmp_path / "p.csv", "--checkpoint"]
    text = run_script(*flags, trained / "best_model.pth").text
    noisy, broken, *rows = read_csv(tmp_path / "p.csv")
    assert "unlike the training pictures" in noisy["warning"] and not broken["warning"]
    assert noisy["seen"] == "new" and not broken["seen"], "nobody knows which picture it is"
    assert not any("unlike" in row["warning"] for row in rows if row["seen"] == "chose"), "they set the limit"
    assert all(("trained on" in row["warning"]) == (row["seen"] == "train") for row in rows)
    n_trained = sum(row["seen"] == "train" for row in rows)
    assert n_trained and f"warning: {n_trained} of {len(pictures)} pictures: trained on" in text

    content = common.read_checkpoint(trained / "best_model.pth")
    valence = content["names"].index("Valence")
    content["known_data"]["label_range"][:, valence] = -1.0
    common.save_checkpoint(tmp_path / "narrow.pth", content)
    run_script(*flags, tmp_path / "narrow.pth")
    assert all("Valence outside the training labels" in row["warning"] for row in read_csv(tmp_path / "p.csv")[2:])
    del content["known_data"]
    common.save_checkpoint(tmp_path / "unfinished.pth", content)
    text = run_script(*flags, tmp_path / "unfinished.pth").text
    assert "does not say what its training pictures are like, as best_model.pth of a finished run" in text
    assert {row["warning"] for row in read_csv(tmp_path / "p.csv")} == {"", "trained on"}


def test_a_page_shows_where_the_model_looks(sample, folds, tmp_path):
    """Three pictures, each beside two maps of the mean over three members; the report shows maps beside its cases."""
    flags = ["--checkpoint", folds, "--image_dir", sample.images, "--output", tmp_path / "p.csv", "--explain", 3]
    said = run_script("predict_assessor.py", *flags, "--explain_rating", "valence").text
    page = (tmp_path / "p.html").read_text()
    assert page.count("<figure>") == 9 and page.count("rank correlation") == 4 and "mean rank correlation" in said
    assert "Places on which the prediction rests: valence" in page
    text = run_script("predict_assessor.py", *flags, "--explain_rating", "Valense", code=2).stderr
    assert text.startswith("error: --explain_rating: found no Valense") and "Valence" in text
    report = (folds / "report.html").read_text()
    assert report.count("<b>where it looks</b>") == report.count("<b>with random weights</b>") == 10


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.long)])
def test_an_exported_model_gives_the_same_ratings_without_this_repository(sample, tmp_path, suffix):
    """In a fresh process that knows nothing of ours, from pictures decoded, resized and cropped as about.json says."""
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    pictures = shutil.copytree(sample.images, tmp_path / "pictures")
    tiles = np.random.default_rng(0).integers(0, 256, (40, 55, 3), np.uint8)
    Image.fromarray(np.kron(tiles, np.ones((28, 28, 1), np.uint8))).save(pictures / "large.jpg")
    train(sample, tmp_path / "run", "--head", "ridge", "--freeze_backbone", "--image_size", 64, "--epochs", 1)
    text = run_script("predict_assessor.py", "--checkpoint", only_run(tmp_path / "run"), "--image_dir", pictures,
                      "--use_amp", "off", "--output", tmp_path / "p.csv", "--export", tmp_path / f"model{suffix}").text
    assert re.search("on 10 rows within .* of this script with --use_amp off", text), "mixed precision is further off"
    code = Path(__file__).with_name("exported_model.py")
    done = subprocess.run([sys.executable, code, tmp_path / f"model{suffix}", pictures], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert np.std([[*row.values()] for row in found.values()], axis=0).max() > 0.1, "it tells pictures apart"
    for row in read_csv(tmp_path / "p.csv"):
        for name, value in found[row["image"]].items():
            assert value == pytest.approx(float(row[name]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_an_export_lacks_is_named_before_anything_is_read(package, monkeypatch, tmp_path):
    """A .pt2 file needs none of them."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else SimpleNamespace())
    flags = ["--checkpoint", "no.pth", "--image_dir", "none", "--export"]
    with pytest.raises(common.UserError, match=f"pip install {package}$"):
        predict_assessor.parse_args([*flags, str(tmp_path / "model.onnx")])
    assert predict_assessor.parse_args([*flags, str(tmp_path / "model.pt2")]).export == tmp_path / "model.pt2"
    monkeypatch.setitem(sys.modules, package, SimpleNamespace())
    assert predict_assessor.parse_args([*flags, str(tmp_path / "model.onnx")]).export == tmp_path / "model.onnx"


def test_an_export_is_checked_on_ten_pictures_whatever_is_explained(sample, trained, tmp_path, monkeypatch, capsys):
    """What is explained are the first pictures that could be read, under their names in the table, and the rating asked for."""
    exported, explained = [], []
    monkeypatch.setattr(predict_assessor, "export", lambda path, members, pixels: exported.extend(pixels))
    monkeypatch.setattr(predict_assessor, "write_heat_maps", lambda args, members, chosen, titles, pixels, compute:
                        explained.append((chosen, titles, pixels)))
    folder = shutil.copytree(sample.images, tmp_path / "images")
    first, second, third, *_ = sorted(folder.iterdir())
    second.write_text("no picture")
    words = ["--checkpoint", trained, "--image_dir", folder, "--output", tmp_path / "p.csv", "--explain", 2,
             "--export", tmp_path / "m.pt2", "--num_workers", 0]
    for more in ([], ["--explain_rating", "anger"]):
        monkeypatch.setattr(sys, "argv", ["predict_assessor.py", *map(str, words), *more])
        predict_assessor.main()
        said = capsys.readouterr().out
        assert re.search("Valence +[0-9.]+ +[0-9.]+", said) and "48 pictures, 1 could not be read" in said
        assert re.search("note: .* rows trained the model", said)
    assert [chosen for chosen, _, _ in explained] == [slice(None), [1]], "Valence, Anger"
    for _, titles, pixels in explained:
        assert titles == [first.name, third.name] and len(exported) == 20
        assert np.array_equal(pixels, torch.stack(exported[:2])) and pixels.shape == (2, 32, 32, 3)


def test_an_export_is_compared_with_the_ratings_in_units_of_their_labels(monkeypatch):
    given = []
    monkeypatch.setattr(predict_assessor.exporting, "export", lambda *args, **more: given.append((args, more)))
    monkeypatch.setattr(predict_assessor.Member, "predict", lambda self, pixels, compute: (pixels * self.model, "features"))
    members = [predict_assessor.Member(k, {"names": ["calm"], "image_size": 32, "pixel_range": [0, 4095],
                                           "label_sd": torch.full([1], 20.0 + k)}) for k in (1, 2)]
    pixels = torch.ones(2, 32, 32, 3)
    predict_assessor.export("m.pt2", members, pixels)
    [((path, models, answer, inputs), more)] = given
    assert path == "m.pt2" and models == members and list(inputs) == ["pixels"] and inputs["pixels"] is pixels
    assert torch.equal(answer(members[1], None), 2 * pixels) and more["unit"] == 21
    assert more["about"] == exporting.about_pictures(["calm"], 32, [0, 4095])


def test_the_page_of_heat_maps_is_of_the_mean_of_the_members(tmp_path, monkeypatch):
    """A member whose maps are 1 and one whose are 4, of two pictures; without --explain_rating all ratings are shown."""
    written, shown_maps = [], []
    monkeypatch.setattr(predict_assessor, "explain", lambda model, settings, pixels, compute, chosen: np.full(
        (2, len(pixels), 8, 8), model * settings["k"] + chosen[0]))
    monkeypatch.setattr(predict_assessor.heat_maps, "show", lambda cases, pixels, maps, shown: (
        shown_maps.append((cases, maps, shown)) or ["grid"], SimpleNamespace(sentence="They change.")))
    monkeypatch.setattr(predict_assessor.reporting, "write_report", lambda *given: written.append(given))
    members = [predict_assessor.Member(1, {"k": 1}), predict_assessor.Member(2, {"k": 2})]
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    for rating, expected in ((None, "the mean over the ratings"), ("calm", "calm")):
        args = SimpleNamespace(output=tmp_path / "p.csv", explain_rating=rating)
        predict_assessor.write_heat_maps(args, members, [0], ["a", "b"], pixels, SimpleNamespace(text="a machine"))
        cases, maps, shown = shown_maps.pop()
        assert shown == expected and (maps == 2.5).all() and maps.shape == (2, 2, 8, 8)
        assert [case["title"] for case in cases] == ["a", "b"]
        assert all((case["image"] == own).all() for case, own in zip(cases, pixels))
        path, _, verdict, sections, machine = written.pop()
        assert path == tmp_path / "p.html" and verdict.sentence == "They change." and machine == "a machine"
        assert sections[0] == (f"Places on which the prediction rests: {expected}", ["grid"])


def test_what_is_exported_of_several_models_is_their_mean(folds):
    members = predict_assessor.load_members(common.checkpoint_files([folds]), common.choose_compute("cpu", "off"))
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, *each = (exporting.MeanOutput(some).eval()(pixels)
                           for some in (members, *([member] for member in members)))
    assert len(each) == 3 and torch.allclose(together, torch.stack(each).mean(0), rtol=1e-5)


def test_only_pictures_have_mirror_images_and_only_where_they_are_asked_for():
    picture = torch.arange(12.0).reshape(1, 3, 2, 2)
    [alone] = train_assessor.views_of(picture, False)
    own, mirrored = train_assessor.views_of(picture, True)
    assert torch.equal(alone, picture) and torch.equal(own, picture) and torch.equal(mirrored, picture[..., [1, 0]])
    assert len(train_assessor.views_of(torch.zeros(1, 3), True)) == 1


@pytest.mark.parametrize("is_frozen", [True, False])
def test_mirror_images_are_averaged_as_the_model_was_judged(is_frozen):
    """A frozen backbone's head was judged on the mean of the features, all others by the mean of their outputs."""
    torch.manual_seed(0)
    model = train_assessor.Assessor(torch.nn.Flatten(), 3 * 8 * 8, 2, "mlp", 0.0).eval()
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    settings = {"pixel_mean": [0.5] * 3, "pixel_sd": [0.2] * 3, "flip_average": True, "freeze_backbone": is_frozen,
                "scaler": {"mean": torch.tensor([5.0, 50]), "sd": torch.tensor([1.0, 20])}}
    member = predict_assessor.Member(model, settings)
    views = [(view.movedim(-1, 1) / 255 - 0.5) / 0.2 for view in (pixels, pixels.flip(2))]
    with torch.no_grad():
        of_features = model(sum(views) / 2) * settings["scaler"]["sd"] + settings["scaler"]["mean"]
        of_outputs = sum(map(model, views)) / 2 * settings["scaler"]["sd"] + settings["scaler"]["mean"]
        found, features = member.predict(pixels, common.choose_compute("cpu", "off"))
        exported = member.predict_pixels(pixels)
    assert (of_features - of_outputs).abs().max() > 0.1
    expected = of_features if is_frozen else of_outputs
    assert torch.allclose(found, expected, rtol=1e-4) and torch.allclose(exported, expected, rtol=1e-4)
    assert torch.allclose(features, sum(views).flatten(1) / 2, atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_members(sample, folds, tmp_path):
    def predict(checkpoint, name):
        run_script(
            "predict_assessor.py", "--checkpoint", *checkpoint, "--images", *sorted(sample.images.iterdir())[:2],
            "--output", tmp_path / name,
        )
        return [float(row["Anger"]) for row in read_csv(tmp_path / name)]
    members = [folds / f"fold_{k}" / "best_model.pth" for k in range(2)]
    single = [predict([path], f"{k}.csv") for k, path in enumerate(members)]
    twice = [*members, folds / "fold_0"]
    assert predict(twice, "all.csv") == pytest.approx(list(np.mean(single, axis=0)), abs=1e-9), "it counts once"


def test_members_of_other_ratings_or_pictures_are_refused(trained, tmp_path):
    content = common.read_checkpoint(trained / "best_model.pth")
    for other in ({"names": content["names"][::-1]}, {"image_size": 64}, {"pixel_range": [0, 4095]}):
        common.save_checkpoint(tmp_path / "other.pth", content | other)
        with pytest.raises(common.UserError, match=f"other.pth has {[*other][0]} .*must agree"):
            predict_assessor.load_members([trained / "best_model.pth", tmp_path / "other.pth"],
                                          common.choose_compute("cpu", "off"))


def test_columns_of_the_predictions_by_hand():
    """Two members, three pictures, two ratings: mean, sd over the members with n - 1, mean -+ width."""
    predicted = np.array([[[1.0, 10], [2, 20], [3, 30]], [[3, 10], [2, 24], [7, 36]]])
    inputs = [(f"{name}.jpg", None) for name in "cab"]
    found = predict_assessor.output_columns(inputs, predicted, ["calm", "bold"], np.array([0.5, np.inf]))
    assert {name: list(values) for name, values in found.items()} == {
        "image": ["c.jpg", "a.jpg", "b.jpg"],
        "calm": [2, 2, 5], "calm_sd": pytest.approx([2 ** 0.5, 0, 8 ** 0.5]), "calm_low": [1.5, 1.5, 4.5],
        "calm_high": [2.5, 2.5, 5.5],
        "bold": [10, 22, 33], "bold_sd": pytest.approx([0, 8 ** 0.5, 18 ** 0.5]), "bold_low": [-np.inf] * 3,
        "bold_high": [np.inf] * 3}
    alone = predict_assessor.output_columns(inputs, predicted[:1], ["calm", "bold"], None)
    assert list(alone) == ["image", "calm", "bold"], "one member has no sd"


def test_members_that_differ_are_each_said(trained, tmp_path, capsys):
    content = common.read_checkpoint(trained / "best_model.pth")
    common.save_checkpoint(tmp_path / "other.pth", content | {"flip_average": True})
    files = [trained / "best_model.pth", trained / "best_model.pth", tmp_path / "other.pth"]
    predict_assessor.load_members(files, common.choose_compute("cpu", "off"))
    network = "shufflenet_v2_x0_5, head mlp, flip average"
    assert f"model: {network} False; {network} True; 32 px, 2 ratings, 3 checkpoint(s)" in capsys.readouterr().out


def test_conformal_interval_is_the_residual_quantile(sample, folds):
    members = predict_assessor.load_members(
        common.checkpoint_files([folds]), common.choose_compute("cpu", "off")
    )
    widths = predict_assessor.half_widths(members, 0.5)
    residuals = np.concatenate([member.settings["abs_residuals"].numpy() for member in members])
    rated = {row["image"]: row for row in read_csv(sample.ratings)}
    for k, settings in enumerate(member.settings for member in members):
        rows = read_csv(folds / f"fold_{k}" / "predictions_val.csv")
        errors = [[abs(float(row[f"{name}_predicted"]) - float(row[f"{name}_true"] or "nan"))
                   for name in settings["names"]] for row in rows]
        np.testing.assert_allclose(settings["abs_residuals"], errors, rtol=1e-6)
        assert settings["residual_rows"] == [row["image"] for row in rows]
        assert settings["residual_subjects"] == [rated[row["image"]]["subject"] for row in rows]
        names = json.loads((folds / f"fold_{k}" / "splits.json").read_text())["train"]
        ratings = np.array([[float(rated[name][f"{score}_mean"] or "nan") for score in settings["names"]]
                            for name in names])
        assert settings["label_sd"].numpy() == pytest.approx(np.nanstd(ratings, axis=0))
        assert settings["known_data"]["label_range"][1].numpy() == pytest.approx(np.nanmax(ratings, axis=0))
    assert residuals.shape[0] == 48 and len(widths) == residuals.shape[1]
    assert ((np.nanmin(residuals, axis=0) <= widths) & (widths <= np.nanmax(residuals, axis=0))).all()
    seeds = [*members, *members, *members]  # as of several seeds on one split: the same rows again
    assert predict_assessor.half_widths(seeds, 0.95) == pytest.approx(predict_assessor.half_widths(members, 0.95))
    assert np.isinf(predict_assessor.half_widths(seeds[::3], 0.95)).all(), "16 rows are too few, however often counted"


def test_an_interval_needs_members_that_are_all_grouped_or_all_not(capsys):
    def member(name, subjects):
        return predict_assessor.Member(None, {
            "abs_residuals": torch.arange(20.0)[:, None], "residual_rows": [f"{name}{i}" for i in range(20)],
            "residual_subjects": subjects, "metric": "last"})
    whole = member("a", None)
    grouped = member("b", [f"s{i // 4}" for i in range(20)])
    assert predict_assessor.half_widths([whole], 0.5) == 10 and predict_assessor.half_widths([grouped], 0.5) > 0
    assert "chosen" not in capsys.readouterr().out
    whole.settings["metric"] = "val_r2"
    predict_assessor.half_widths([member("c", None), whole], 0.5)
    assert "the bounds may hold less than 50% of new pictures" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="some checkpoints were trained with --group_column"):
        predict_assessor.half_widths([whole, grouped], 0.5)
    del whole.settings["abs_residuals"]
    for some in ([whole], [member("c", None), whole]):
        with pytest.raises(common.UserError, match="best_model.pth of a finished run holds"):
            predict_assessor.half_widths(some, 0.5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_a_list_of_pictures_is_read_as_windows_writes_it(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("K\u00e4fer 1.jpg\r\n\r\npen 2\\b.png\r\n".encode(encoding))
    args = predict_assessor.parse_args(["--checkpoint", "m", "--image_list", str(tmp_path / "list.txt")])
    paths = [tmp_path / "K\u00e4fer 1.jpg", tmp_path / "pen 2" / "b.png"]
    assert predict_assessor.find_inputs(args) == list(zip(["K\u00e4fer 1.jpg", "pen 2\\b.png"], paths))


def test_names_that_are_no_file_keep_their_rows(tmp_path):
    """A link that leads to itself, a name that no file system takes: found later, as pictures that are not there."""
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "p.csv").touch()
    (tmp_path / "list.txt").write_text(f"loop.jpg\n{'x' * 300}.jpg")
    args = predict_assessor.parse_args(
        ["--checkpoint", "m", "--image_list", str(tmp_path / "list.txt"), "--output", str(tmp_path / "p.csv")])
    names = [name for name, _ in predict_assessor.find_inputs(args)]
    assert names == ["loop.jpg", f"{'x' * 300}.jpg"]


# --- mistakes: message and exit code ---------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--output", "nowhere/p.csv"], "--output: nowhere/p.csv: expected a file, in a folder that exists"),
    (["--output", "."], "expected a file"), (["--output", os.devnull], "expected a file"), (["--export", "nowhere/m.pt2"], "--export: nowhere/m.pt2: expected a file"),
    (["--output", "p.html"], "ends in .csv"),
    (["--explain_rating", "Valence"], "says what --explain shows")])
def test_what_prediction_cannot_do_is_said_at_once(flags, message, capsys):
    with pytest.raises(SystemExit) as left:
        predict_assessor.parse_args(["--checkpoint", "m", "--images", "a.jpg", *flags])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_prediction_without_pictures_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict_assessor.parse_args(["--checkpoint", "m"])
    assert "no pictures given; name them with --image_dir, --image_list or --images" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("\n\n")
    for flags in (["--image_dir", tmp_path], ["--image_list", tmp_path / "list.txt"]):
        args = predict_assessor.parse_args(["--checkpoint", "m", *map(str, flags)])
        with pytest.raises(common.UserError, match=f"no pictures found in {flags[1]}"):
            predict_assessor.find_inputs(args)


def test_an_infinite_interval_is_said_and_so_is_a_constant_rating(capsys):
    """The sds of a and b are 1.414 and 0.707; a twentieth of the mean sds of the labels 1.4 and 0.75."""
    members = [predict_assessor.Member(None, {"label_sd": torch.tensor(sds)}) for sds in ([20.0, 10], [36.0, 20])]
    predicted = np.array([[[0.0, 20], [3.0, 22]], [[2.0, 20], [3.0, 20]]])  # (2 members, 2 pictures, 2 ratings)
    predict_assessor.print_summary(predicted, ["a", "b"], members, np.array([0.5, np.inf]))
    said = capsys.readouterr().out
    rows = {words[0]: words[1:] for words in map(str.split, said.splitlines())}
    assert [*map(float, rows["a"])] == [2, 1.414, 1, 3]
    assert [*map(float, rows["b"][:4])] == [20.5, 0.707, 20, 21] and rows["b"][4:] == ["NEARLY", "CONSTANT"]
    assert "interval: infinite for 1 ratings, too few residuals" in said
    for widths in (np.array([0.5, 0.5]), None):
        predict_assessor.print_summary(predicted, ["a", "b"], members, widths)
        assert "interval" not in capsys.readouterr().out


def test_without_a_readable_picture_nothing_is_exported_and_it_is_said(folds, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    text = run_here("predict_assessor.py", "--checkpoint", folds / "fold_0", "--images", tmp_path / "broken.jpg", "--output",
                    tmp_path / "p.csv", "--export", tmp_path / "m.pt2", code=2).stderr
    assert text.startswith("error: no picture could be read") and "broken.jpg" in read_csv(tmp_path / "p.csv")[0]["error"]
    (tmp_path / "p.csv").unlink()
    run_here("predict_assessor.py", "--checkpoint", folds / "fold_0", "--images", tmp_path / "broken.jpg", "--output",
             tmp_path / "p.csv")
    assert len(read_csv(tmp_path / "p.csv")) == 1, "a table is all that was asked for"


def test_a_checkpoint_to_continue_is_no_model_to_predict_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_assessor.py"])
    path = tmp_path / "last.pth"
    common.save_checkpoint(path, {
        "format": common.FORMAT, "script": "train_assessor.py", "model": {}, "seen": None, "optimizer": {},
        "progress": {}})
    message = "best_model.pth is for prediction and --init_from, last.pth for --resume"
    with pytest.raises(common.CheckpointError, match=message):
        train_assessor.load_assessor(path, common.choose_compute("cpu", "off"))
    with pytest.raises(common.CheckpointError, match=message):
        backbones.starting_content(path, names=["Valence"])


def test_further_fields_of_a_checkpoint_are_ignored(tmp_path):
    """One that lacks a field, as one of an older version may, is refused in a sentence before any picture is read."""
    settings = dict(backbone="shufflenet_v2_x0_5", head="mlp", dropout=0.0, image_size=64, flip_average=False)
    args = SimpleNamespace(
        **settings, pretrained=False, weights=None, freeze_stages=0, freeze_norm=False, seed=0)
    model = train_assessor.build_model(args, np.full(1, 3.5))
    assert (model.eval()(torch.rand(2, 3, 64, 64)) == 3.5).all(), "it begins by predicting the train mean"
    content = {
        "format": common.FORMAT, "script": "train_assessor.py", "model": model.state_dict(), "seen": None,
        "names": ["Valence"], "seed": 7, "pretrained": True, "freeze_backbone": False, **settings}
    common.save_checkpoint(tmp_path / "m.pth", content)
    compute = common.choose_compute("cpu", "off")
    found, content = train_assessor.load_assessor(tmp_path / "m.pth", compute)
    assert content["seed"] == 7 and not found.training
    del content["freeze_backbone"]
    common.save_checkpoint(tmp_path / "older.pth", content)
    with pytest.raises(common.CheckpointError, match="older.pth lacks what .*'freeze_backbone'"):
        train_assessor.load_assessor(tmp_path / "older.pth", compute)


def test_ratings_that_differ_by_rounding_alone_are_not_blown_up():
    scaler = train_assessor.fit_scaler(np.array([[0.3], [0.30000000000000004]]), normalize=True)
    assert scaler["sd"] == 1e-8
    ratings = np.array([[3.0, 5.0], [4.0, 8.0]])
    scaler = train_assessor.fit_scaler(ratings, normalize=False)
    assert ((ratings - scaler["mean"]) / scaler["sd"]).tolist() == ratings.tolist(), "in the units of the ratings"


def same_in_train_rows(header, rows):
    """Anger is known of one subject alone, which every split leaves out of a part."""
    subject, anger = header.index("subject"), header.index("Anger_mean")
    for k, row in enumerate(row for row in rows if row[subject] == rows[0][subject]):
        row[anger] = str(k)
    for row in rows:
        if row[subject] != rows[0][subject]:
            row[anger] = ""


@pytest.mark.parametrize("flags", [["--folds", 3], ["--split_file", "split.json"]])
def test_a_rating_without_a_value_in_the_train_rows_is_named(sample, tmp_path, flags, monkeypatch):
    """In a fold, and in one split: no run of NaN that advises a smaller --lr."""
    monkeypatch.chdir(tmp_path)
    table = edited(sample, tmp_path, same_in_train_rows)
    rows = read_csv(table)
    parts = {"train": [row["image"] for row in rows if not row["Anger_mean"]],
             "val": [row["image"] for row in rows if row["Anger_mean"]]}
    Path("split.json").write_text(json.dumps(parts))
    text = run_here("train_assessor.py", *small_run(sample, "out", "--ratings_file", table, *flags), code=2).stderr
    assert text.startswith("error: Anger: no two different ratings in the train rows") and "--target_columns" in text
    assert not list(Path("out").glob("run_*")), "a mistake leaves no run folder behind"


def test_choosing_by_a_metric_that_the_val_rows_do_not_have_is_refused(sample, tmp_path):
    def same_in_val_rows(header, rows):
        for row in rows[:4]:
            row[header.index("Valence_mean")] = row[header.index("Anger_mean")] = "3"
    table = edited(sample, tmp_path, same_in_val_rows)
    names = [row["image"] for row in read_csv(table)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[4:], "val": names[:4]}))
    flags = ["--ratings_file", table, "--split_file", tmp_path / "split.json", "--select", "r2", "--allow_leakage"]
    text = run_here("train_assessor.py", *small_run(sample, tmp_path / "out", *flags), code=2).stderr
    assert "no two different values of any rating, so --select r2 has none" in text and "--select last or loss" in text


def test_two_different_ratings_are_enough():
    study = SimpleNamespace(names=["calm", "bold"], ratings=np.array([[1.0, 1], [2, 2], [3, 5], [4, 5], [np.nan, 5]]))
    split = {"train": np.array([0, 1]), "val": np.array([2, 3, 4])}
    args = SimpleNamespace(select="r2")
    train_assessor.check_ratings(args, study, [split])
    with pytest.raises(common.UserError, match="^bold: no two different ratings in the train rows"):
        train_assessor.check_ratings(args, study, [split, split | {"train": np.array([2, 3, 4])}])
    flat = split | {"val": np.array([4])}
    with pytest.raises(common.UserError, match="so --select r2 has none"):
        train_assessor.check_ratings(args, study, [split, flat])
    train_assessor.check_ratings(SimpleNamespace(select="last"), study, [flat])


@pytest.mark.parametrize("is_long", [False, True])
def test_a_loss_by_the_sds_of_raters_needs_them(sample, tmp_path, is_long):
    """A long table with one answer to each question has sds of single ratings, which are none."""
    columns = ["image", "subject", "Valence_mean", "Anger_mean"]
    rows = [{name: row[name] for name in columns} for row in read_csv(sample.ratings)]
    if is_long:
        rows = [{"image": row["image"], "subject": row["subject"], "attribute": name, "rating": row[name]}
                for row in rows for name in columns[2:]]
    common.write_table(tmp_path / "means.csv", rows)
    flags = ["--ratings_file", tmp_path / "means.csv", "--loss", "weighted"]
    text = run_here("train_assessor.py", *small_run(sample, tmp_path / "out", *flags), code=2).stderr
    assert "--loss weighted needs rater sds: expected X_sd columns or single ratings" in text and "--loss mse" in text


def edited(sample, tmp_path, edit):
    """A copy of the ratings file after edit(header: list, rows: list of lists)."""
    with open(sample.ratings, newline="", encoding="utf-8-sig") as handle:
        header, *rows = list(csv.reader(handle))
    edit(header, rows)
    path = tmp_path / "ratings.csv"
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


def blank_row(header, rows):
    rows[4][2:] = [""] * len(rows[4][2:])


def constant_column(header, rows):
    for row in rows:
        row[header.index("Anger_mean")] = "3"


def no_image_column(header, rows):
    header[header.index("image")] = "stimulus_no"


TABLE_MISTAKES = {
    "no image column": (no_image_column, ["has no image column", "stimulus_no", "--image_column"]),
    "all ratings of a row missing": (blank_row, ["all ratings are missing"]),
    "constant column": (constant_column, ["constant", "Anger", "--target_columns"]),
    "no picture found": (
        lambda header, rows: [row.__setitem__(0, f"nowhere_{i}.jpg") for i, row in enumerate(rows)],
        ["none of the 48 pictures"],
    ),
    "a word among numbers": (
        lambda header, rows: rows[3].__setitem__(header.index("Anger_mean"), "high"),
        ["Anger_mean", "high"],
    ),
    "a row listed twice": (lambda header, rows: rows.append(list(rows[0])), ["twice", "--duplicates mean"]),
}


@pytest.mark.parametrize("name", TABLE_MISTAKES)
def test_mistakes_in_the_table(sample, tmp_path, name):
    edit, words = TABLE_MISTAKES[name]
    table = edited(sample, tmp_path, edit)
    text = run_here("train_assessor.py", *small_run(sample, tmp_path / "out", "--ratings_file", table), code=2).stderr
    assert text.startswith("error: ") and "Traceback" not in text and text.count("\n") == 1
    for word in words:
        assert word in text
    assert not list((tmp_path / "out").glob("run_*")), "a mistake leaves no run folder behind"


FLAG_MISTAKES = {
    "missing file": (["--ratings_file", "none.csv"], ["none.csv"]),
    "missing folder": (["--images_dir", "nowhere"], ["nowhere"]),
    "empty split": (["--train_ratio", 1, "--val_ratio", 0], ["val"]),
    "ratios do not sum": (["--train_ratio", 0.5, "--val_ratio", 0.2], ["0.7"]),
    "fewer groups than folds": (["--folds", 40], ["40", "groups"]), "one fold": (["--folds", 1], ["at least 2"]),
    "GPU that is absent": (["--device", "cuda:7"], ["cuda:7", "--device cpu"]),
    "device of another kind": (["--device", "xpu"], ["--device xpu", "auto, cpu, cuda, cuda:N or mps", "--device cpu"]),
    "unknown backbone": (["--backbone", "resnet5O"], ["resnet5O", "resnet50"]),
    "unknown flag": (["--epoch", 3], ["--epochs"]),
    "unknown rating": (["--target_columns", "Valense_mean"], ["Valence"]),
    "unknown group column": (["--group_column", "subjekt"], ["subject"]),
    "folds and a test part": (["--folds", 3, "--test_ratio", 0.2], ["--test_ratio"]),
    "unknown metric": (["--criteria", "r22>0.1"], ["r22", "r2"]),
    "folds and a split file": (["--folds", 3, "--split_file", "s.json"], ["give one"]),
    "damaged weights": (["--weights", __file__], ["no usable checkpoint"]),
}


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_mistakes_in_the_flags(sample, tmp_path, name):
    flags, words = FLAG_MISTAKES[name]
    code = 3 if name == "damaged weights" else 2
    text = run_here("train_assessor.py", *small_run(sample, tmp_path / "out", *flags), code=code).stderr
    assert text.startswith("error: ") and "Traceback" not in text and text.count("\n") == 1, text
    for word in words:
        assert word in text
    assert not list((tmp_path / "out").glob("run_*")), "a mistake leaves no run folder behind"


def test_unreadable_pictures_are_all_listed_or_skipped(sample, tmp_path):
    """Skipped by a dry run, which writes the whole run folder."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sample.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "face_0001.jpg").write_bytes(b"")
    (images / "face_0002.jpg").write_bytes((sample.images / "face_0002.jpg").read_bytes()[:500])
    text = run_here("train_assessor.py", *small_run(sample, tmp_path / "out", "--images_dir", images), code=2).stderr
    assert "2 of 48 pictures" in text and "face_0001.jpg" in text and "face_0002.jpg" in text
    train(sample, tmp_path / "out", "--images_dir", images, "--on_bad_file", "skip", "--dry_run")
    run = only_run(tmp_path / "out")
    assert {row["image"] for row in read_csv(run / "skipped.csv")} == {"images/face_0001.jpg", "images/face_0002.jpg"}
    assert all((run / name).exists() for name in CONTRACT) and len(read_csv(run / "training_history.csv")) == 1


def test_single_ratings_of_12_bit_pictures_from_training_to_prediction(tmp_path):
    """One row per rater, deep pictures and a HEIC file: one range from the data, and a row for every picture."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        pixels = rng.integers(0, 3000, (32, 32)) + 40 * i
        Image.fromarray(pixels.astype(np.uint16)).save(images / f"{i:03d}.png")
        rows += [[f"{i}.png", f"p{p}", 1 + (i + p) % 7] for p in range(3)]
    (images / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with open(tmp_path / "ratings.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([["image", "participant", "valence"], *rows, ["phone.heic", "p0", 3]])
    flags = ["--images_dir", images, "--ratings_file", tmp_path / "ratings.csv", "--output_dir", tmp_path / "out"]
    small = "--backbone shufflenet_v2_x0_5 --no_pretrained --image_size 32 --epochs 1 --batch_size 8 --num_workers 0".split()
    assert "phone.heic: HEIC (iPhone): convert to JPEG" in run_here("train_assessor.py", *flags, *small, code=2).stderr
    said = run_script("train_assessor.py", *flags, *small, "--on_bad_file", "skip").stdout
    run = only_run(tmp_path / "out")
    assert "61 single ratings of 21 images" in said and "values 0 to 4095 became 0 to 255" in said
    assert "20 of 21 names are of another folder or spelling" in said, "Excel dropped their zeros"
    assert common.load_model_file(run / "best_model.pth", "train_assessor.py")["pixel_range"] == [0, 4095]
    run_script("predict_assessor.py", "--checkpoint", run, "--image_dir", images, "--output", tmp_path / "p.csv")
    predicted = read_csv(tmp_path / "p.csv")
    assert len(predicted) == 21 and "HEIC" in predicted[-1]["error"] and not any(row["error"] for row in predicted[:-1])
    after = {row["image"]: float(row["valence_predicted"]) for row in read_csv(run / "predictions_val.csv")}
    for row in predicted[:-1]:
        name = row["image"].lstrip("0") if row["image"] != "000.png" else "0.png"
        if name in after:
            assert float(row["valence"]) == pytest.approx(after[name], abs=1e-4)


def test_weights_that_cannot_be_had(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    flags = small_run(sample, tmp_path, "--backbone", "resnet18")
    flags.remove("--no_pretrained")
    text = run_here("train_assessor.py", *flags, code=2).stderr
    assert "--weights FILE" in text and "--no_pretrained" in text


def test_checkpoint_of_another_script(sample, trained, tmp_path):
    content = common.read_checkpoint(trained / "best_model.pth")
    common.save_checkpoint(tmp_path / "other.pth", {**content, "script": "train_video.py"})
    text = run_here("predict_assessor.py", "--checkpoint", tmp_path / "other.pth", "--image_dir", sample.images,
                    code=2).stderr
    assert "train_video.py" in text


def test_a_loss_that_is_not_finite_stops_before_the_step(sample, tmp_path):
    text = train(sample, tmp_path, "--lr", 1e20, "--clip_grad", 0, "--save_minutes", 1e-9, code=1).stderr
    assert "epoch 1" in text and "batch" in text and "face_" in text and "Traceback" not in text
    weights = common.read_checkpoint(only_run(tmp_path) / "last.pth")["model"]
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


def test_labels_that_belong_to_scenes_are_told_by_the_rows_without_a_look_alike(tmp_path):
    """30 scenes of two pictures each and one label: what the model knows of the other picture of a scene is no skill."""
    draw = np.random.default_rng(0)
    scenes = {}
    with open(tmp_path / "ratings.csv", "w") as handle:
        handle.write("image,v\n")
        for k in draw.permutation(60):
            scene = np.random.default_rng(1 + k // 2)
            pixels = np.kron(scene.integers(0, 255, (8, 8, 3)), np.ones((6, 6, 1))) + draw.normal(0, 0.4, (48, 48, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{k}.png")
            scenes[f"{k}.png"] = k // 2
            handle.write(f"{k}.png,{scene.normal() + draw.normal(0, 0.05)}\n")
    flags = ("--backbone shufflenet_v2_x0_5 --no_pretrained --image_size 32 --epochs 1 --batch_size 8 --num_workers 0 "
             "--head ridge --select last --val_ratio 0.4 --target_columns v")
    run_here("train_assessor.py", "--images_dir", tmp_path, "--ratings_file", tmp_path / "ratings.csv", *flags.split(),
             "--output_dir", tmp_path / "out")
    run = only_run(tmp_path / "out")
    split = json.loads((run / "splits.json").read_text())
    trained_on = {scenes[name] for name in split["train"]}
    shared = sum(scenes[name] in trained_on for name in split["val"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["headline"]["value"] > 0.2
    told = re.search(r"(\d+) of (\d+) rows look like one in another part of the split.*mean R2 (\S+) against", (run / "log.txt").read_text())
    assert shared / 2 < int(told[1]) <= shared and int(told[2]) == len(split["val"])
    assert float(told[3]) < metrics["headline"]["value"] - 0.2
