"""train_detector.py from end to end, and its numbers: AP by pycocotools and by hand, states, hallucinations, baselines.

    python -m pytest tests/test_detector.py
"""
import contextlib
import csv
import io
import json
import math
import sys
import types
import warnings

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

import common
import train_detector
from conftest import ROOT, only_run, run_fresh, run_script
from readers.part_boxes import ABSENT, STATES, UNKNOWN
from evidence import detection_scores

BOX, OTHER, FAR = [10, 10, 30, 30], [50, 10, 90, 40], [5, 60, 25, 95]
SMALL = ("--model fasterrcnn_resnet18_fpn --no_pretrained --min_size 48 --max_size 64 --epochs 2 --batch_size 4 "
         "--num_workers 0 --bootstrap_draws 20 --visualize 2").split()


def study(*pictures, parts=("bell", "saddle"), absent=()):
    """Judged boxes: each picture a list of (label, state, box[, ignored]); pictures of 100 x 100."""
    def column(k, kind, default=None):
        return [np.array([each[k] if k < len(each) else default for each in boxes], kind) for boxes in pictures]
    made = types.SimpleNamespace(
        parts=list(parts), groups=None, sizes=np.full((len(pictures), 2), 100), labels=column(0, np.int64),
        states=column(1, np.int64), boxes=[b.reshape(-1, 4) for b in column(2, np.float32)],
        ignored=column(3, bool, False),
        absent=[np.array(absent[k] if absent else [], int) for k in range(len(pictures))])
    made.judged = lambda row, absent="keep": train_detector.Study.judged(made, row, absent)
    return made


def detections(*boxes, states=True):
    """One picture's detections from (label, score, state, box)."""
    labels, scores, called, places = ([each[k] for each in boxes] for k in range(4))
    return {"labels": np.array(labels, int), "scores": np.array(scores, float),
            "states": np.eye(4)[np.array(called, int)] if states else None,
            "boxes": np.array(places, float).reshape(-1, 4)}


def judge(truth, found, threshold=0.5, absent="keep", states=True, baseline=None):
    settings = {"parts": truth.parts, "states": list(STATES) if states else []}
    return detection_scores.Judged(truth, np.arange(len(found)), found, settings, threshold, absent, baseline)


def values_of(*arguments, **options):
    """Every number over all pictures, and ap_PART of each part."""
    judged = judge(*arguments, **options)
    overall, each = judged.values(judged.every)
    return overall | {f"ap_{part}": value for part, value in zip(judged.parts, each["ap"])}


# --- average precision ------------------------------------------------------------------

def test_joint_ap_by_hand():
    """Three bells, intact, damaged and intact, all boxes right, the second called intact.

    Parts: AP 1. Joint, category bell-intact: two boxes and three detections, the wrong one ranks second: precision 1 up
    to recall 1/2, then 2/3: (51 * 1 + 50 * 2/3) / 101. Category bell-damaged: one box, no detection: 0. Mean: half.
    """
    truth = study([(0, 0, BOX)], [(0, 1, BOX)], [(0, 0, BOX)])
    found = [detections((0, 0.9, 0, BOX)), detections((0, 0.8, 0, BOX)), detections((0, 0.7, 0, BOX))]
    values = values_of(truth, found)
    assert values["map"] == pytest.approx(1) and values["map50"] == pytest.approx(1)
    assert values["joint_map"] == pytest.approx((51 + 50 * 2 / 3) / 101 / 2)


def test_joint_ap_is_one_only_if_box_part_and_state_are_right():
    truth = study([(0, 3, BOX), (1, 1, OTHER)])
    right = [detections((0, 0.9, 3, BOX), (1, 0.9, 1, OTHER))]
    assert values_of(truth, right)["joint_map"] == pytest.approx(1)
    for wrong in ((0, 0.9, 2, BOX), (1, 0.9, 3, BOX), (0, 0.9, 3, FAR)):
        assert values_of(truth, [detections(wrong, (1, 0.9, 1, OTHER))])["joint_map"] == pytest.approx(0.5)


def test_boxes_without_a_state_and_ignored_boxes_count_neither_way():
    truth = study([(0, 1, BOX), (0, UNKNOWN, OTHER), (0, 1, FAR, True)])
    found = [detections((0, 0.6, 1, BOX), (0, 0.9, 0, OTHER), (0, 0.8, 0, FAR))]
    values = values_of(truth, found)
    assert values["joint_map"] == pytest.approx(1), "the two others are right or wrong for no one"
    assert values["map"] == pytest.approx(1) and values["precision"] == 1 and values["recall"] == 1


def random_case(seed, n_pictures=12, parts=("a", "b", "c")):
    rng = np.random.default_rng(seed)
    pictures, found = [], []
    for _ in range(n_pictures):
        corners = rng.uniform(0, 60, (rng.integers(0, 5), 2))
        boxes = np.hstack([corners, corners + rng.uniform(8, 40, corners.shape)])
        labels = rng.integers(0, len(parts), len(boxes))
        pictures.append([(label, rng.integers(-1, 4), box) for label, box in zip(labels, boxes)])
        near = [(label, rng.uniform(0.05, 1), rng.integers(4), box + rng.normal(0, 3, 4))
                for label, box in zip(labels, boxes)]
        lost = [(rng.integers(len(parts)), rng.uniform(0.05, 1), rng.integers(4), [40, 40, 70, 80])] * rng.integers(2)
        found.append(detections(*near[:4], *lost))
    return study(*pictures, parts=parts), found


def coco_stats(truth, found, pictures):
    """(AP, AP50) as pycocotools' own summary gives them for these pictures; a repeated one is a picture of its own."""
    annotations, results = [], []
    for k, row in enumerate(pictures, start=1):
        for label, box in zip(truth.labels[row], truth.boxes[row].astype(float)):
            size = box[2:] - box[:2]
            annotations.append({"id": len(annotations) + 1, "image_id": k, "category_id": int(label), "iscrowd": 0,
                                "bbox": [*box[:2], *size], "area": size.prod()})
        results += [{"image_id": k, "category_id": int(label), "score": score, "bbox": [*box[:2], *(box[2:] - box[:2])]}
                    for label, score, box in zip(found[row]["labels"], found[row]["scores"], found[row]["boxes"])]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": k} for k in range(1, len(pictures) + 1)], "annotations": annotations,
                        "categories": [{"id": k} for k in range(len(truth.parts))]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:2]


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools_on_resampled_pictures_too(seed):
    truth, found = random_case(seed)
    judged, draws = judge(truth, found), np.random.default_rng(seed).integers(0, 12, (3, 12))
    for pictures in (judged.every, *draws):
        values, _ = judged.values(pictures)
        assert (values["map"], values["map50"]) == pytest.approx(coco_stats(truth, found, pictures), abs=1e-9)


def test_without_absent_parts():
    """Absent boxes leave the truth and detections called absent leave the list."""
    truth = study([(0, 0, BOX), (1, ABSENT, OTHER)])
    values = values_of(truth, [detections((0, 0.9, 0, BOX), (1, 0.95, ABSENT, OTHER))])
    assert values["map"] == values["map_present"] == pytest.approx(1)
    values = values_of(truth, [detections((0, 0.6, 0, BOX), (0, 0.9, ABSENT, FAR))])
    assert values["map_present"] == pytest.approx(1)
    dropped = values_of(truth, [detections((0, 0.9, 0, BOX), (1, 0.95, 0, OTHER))], absent="drop")
    assert dropped["map"] == pytest.approx(1) and dropped["precision"] == 0.5 and dropped["recall"] == 1


def test_nothing_found_and_nothing_there():
    values = values_of(study([(0, 0, BOX)], []), [detections(), detections()])
    assert values["map"] == 0 and values["recall"] == 0 and math.isnan(values["precision"])
    assert math.isnan(values["ap_saddle"]) and math.isnan(values["state_accuracy"])
    values = values_of(study([(0, UNKNOWN, BOX)]), [detections((0, 0.9, 0, BOX), states=False)], states=False)
    assert values["map"] == pytest.approx(1) and "joint_map" not in values and "macro_f1" not in values


# --- states, hallucinations, baselines -----------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_state_scores_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    true, predicted = rng.choice(4, 40, p=[0.6, 0.3, 0.1, 0]), rng.choice(4, 40, p=[0.5, 0.4, 0, 0.1])
    scores = detection_scores.state_scores(confusion_matrix(true, predicted, labels=range(4)).astype(float))
    assert scores["state_accuracy"] == pytest.approx((true == predicted).mean())
    assert scores["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a state that is predicted and never true
        assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))


def test_confusion_counts_matched_boxes_and_the_intact_baseline_stands_beside():
    truth = study([(0, 0, BOX), (1, 1, OTHER), (1, 3, FAR)], [(0, 1, BOX)])
    found = [detections((0, 0.9, 0, BOX), (1, 0.2, 3, OTHER)), detections((0, 0.8, 1, BOX), (0, 0.7, 0, FAR))]
    judged = judge(truth, found)
    assert judged.counts["confusion"].sum(0).astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0] * 4, [0] * 4]
    values, _ = judged.values(judged.every)
    intact, _ = judged.baseline_values(judged.every)
    assert values["state_accuracy"] == pytest.approx(2 / 3) and intact["state_accuracy"] == pytest.approx(1 / 3)
    assert intact["balanced_accuracy"] == pytest.approx(0.5)
    assert values["precision"] == pytest.approx(2 / 3) and values["recall"] == pytest.approx(2 / 4)
    rows = train_detector.per_state_rows(judged)
    assert [row["found"] for row in rows] == [1, 2, 0, 0]
    assert rows[1]["called occluded"] == 1 and rows[1]["recall"] == 0.5


def test_hallucinations_by_hand():
    """Four absent parts, two with a box: one is claimed at its box, one detected there and rightly called absent;
    of those without a box one is claimed elsewhere, one only below the threshold."""
    truth = study([(0, ABSENT, BOX)], [(0, ABSENT, BOX)], [], [], absent=[[], [], [1], [1]])
    found = [detections((0, 0.9, 0, BOX)), detections((0, 0.9, ABSENT, BOX)), detections((1, 0.6, 1, FAR)),
             detections((1, 0.4, 0, FAR))]
    values = values_of(truth, found)
    assert values["hallucination_rate"] == pytest.approx(1 / 2) and values["absent_box_detected"] == pytest.approx(1)
    assert values["hallucination_rate_anywhere"] == pytest.approx(2 / 4)
    elsewhere = values_of(truth, [detections((0, 0.9, 0, OTHER)), *found[1:]])
    assert elsewhere["hallucination_rate"] == 0 and elsewhere["hallucination_rate_anywhere"] == pytest.approx(2 / 4)


def test_mean_boxes_by_hand():
    truth = study([(0, 1, [0, 0, 20, 20])], [(0, 1, [20, 20, 40, 60]), (1, 0, BOX, True)], [(0, 0, [10, 10, 30, 40])],
                  [])
    baseline = train_detector.mean_boxes(truth, np.array([0, 1, 2, 3]), "keep")
    np.testing.assert_allclose(baseline["boxes"][0], [0.1, 0.1, 0.3, 0.4])
    assert baseline["score"].tolist() == [0.75, 0] and baseline["state"][0] == 1
    found = train_detector.baseline_detections(baseline, np.array([[200, 100]]), True)[0]
    np.testing.assert_allclose(found["boxes"], [[20, 10, 60, 40]])
    assert found["labels"].tolist() == [0] and found["states"].argmax(1).tolist() == [1]


def test_intervals_pair_model_and_baseline_and_need_five_pictures():
    truth, found = random_case(1, 24)
    baseline_boxes = [detections((0, 0.5, 0, [20, 20, 50, 50])) for _ in found]
    judged = judge(truth, found, baseline=baseline_boxes)
    result = judged.result(60, 0)
    model, baseline, difference = (getattr(result.overall, side)["map"] for side in ("model", "baseline", "difference"))
    assert "24 images" in result.method and model.low < model.value < model.high and difference.low > 0
    assert difference.value == pytest.approx(model.value - baseline.value)
    four = judge(truth, found[:4]).result(20, 0)
    assert four.method == "no interval: only 4 images" and math.isnan(four.overall.model["map"].low)
    few = judge(truth, found[:12], baseline=baseline_boxes[:12]).result(20, 0)
    assert "t-interval" in few.method and few.overall.model["map"].low < few.overall.model["map"].high
    truth.groups = np.array([f"g{k % 3}" for k in range(24)])
    assert judged.result(20, 0).method == "no interval: only 3 groups"


def test_intervals_cover_the_truth():
    """Simulated: 60 studies of 30 pictures from one source whose AP is known from 3,000; nominal .95."""
    truth, found = random_case(99, 3000)
    whole = values_of(truth, found)["map"]
    covered = []
    for seed in range(60):
        truth, found = random_case(seed, 30)
        judged = judge(truth, found, states=False)
        found = judged.result(50, seed).overall.model["map"]
        covered.append(found.low <= whole <= found.high)
    assert 0.85 <= np.mean(covered) <= 1, np.mean(covered)


def test_best_of_each_part_and_absent_where_none_is_over_the_threshold():
    detected = detections((1, 0.3, 0, BOX), (0, 0.9, 1, OTHER), (0, 0.95, 3, BOX), (1, 0.4, 0, FAR))
    best = train_detector.best_per_part(detected)
    assert best["labels"].tolist() == [0, 1] and best["scores"].tolist() == [0.95, 0.4]
    args = types.SimpleNamespace(one_per_part=True, score_threshold=0.5)
    rows = train_detector.detection_rows(["x.jpg"], train_detector.limited([detected], args), ["bell", "saddle"],
                                         absent_below=0.5)
    assert [(row["part"], row["state"], row["score"]) for row in rows] == [
        ("bell", "occluded", 0.95), ("saddle", "absent", None)]


# --- end to end ---------------------------------------------------------------------------

def read_csv(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def bicycles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bicycles")
    run_script("make_sample_data.py", "--task", "detector", "--output_dir", folder, "--n_samples", 36)
    return folder / "detector"


def train_flags(bicycles, output_dir, *more):
    return ["--train_json", bicycles / "annotations.json", "--train_images", bicycles / "images", "--split_ratio", 0.5,
            "--test_ratio", 0.25, "--group_column", "street", "--output_dir", output_dir, *SMALL, *more]


@pytest.fixture(scope="module")
def trained(bicycles, tmp_path_factory):
    """A run from random weights."""
    folder = tmp_path_factory.mktemp("trained")
    run_fresh("train_detector.py", *train_flags(bicycles, folder, "--criteria", "map>0.9,ap_saddle<2"))
    return only_run(folder)


CONTRACT = """args.json log.txt splits.json leakage_report.json skipped.csv training_history.csv training_history.png
last.pth best_model.pth metrics.json detections_test.csv detections_test.json per_part.csv per_part.png per_state.csv
failures.jpg best_pictures.jpg report.html""".split()
PARTS_OF_LOSS = ["loss", "loss_classifier", "loss_box_reg", "loss_state", "loss_objectness", "loss_rpn_box_reg"]


def test_a_start_from_random_weights_leaves_the_whole_run_folder(trained):
    assert [name for name in CONTRACT if not (trained / name).stat().st_size] == []
    assert len(list((trained / "pictures").glob("*.jpg"))) == 2
    content = common.load_model_file(trained / "best_model.pth", "train_detector.py")
    assert content["epoch"] in (1, 2) and len(content["settings"]["parts"]) == 8
    rows = read_csv(trained / "training_history.csv")
    columns = {f"{split}_{name}" for split in ("train", "val") for name in PARTS_OF_LOSS}
    assert set(rows[0]) == columns | {"epoch", "learning_rate", "val_map", "val_map50", "val_joint_map",
                                      "val_state_accuracy"}
    assert all(math.isfinite(float(row[name])) for row in rows for name in columns)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["part"] == "test" and len(metrics["per_part"]) == 8
    assert {bar["name"]: bar["verdict"] for bar in metrics["criteria"]}["map"] != "PASS"
    skipped = read_csv(trained / "skipped.csv")
    assert skipped == [{"image": "11.jpg", "annotation": "chain (chain)", "reason": skipped[0]["reason"]}]


def test_groups_stand_on_one_side(bicycles, trained):
    truth = json.loads((bicycles / "annotations.json").read_text(), strict=False)
    splits = json.loads((trained / "splits.json").read_text())
    streets = {part: {truth[name]["street"] for name in splits[part]} for part in ("train", "val", "test")}
    assert sum(map(len, streets.values())) == len(set.union(*streets.values())) and min(map(len, streets.values())) >= 1


def test_evaluation_repeats_the_test_numbers(bicycles, trained, tmp_path):
    """The test pictures as a COCO file with its own ids: same AP, ids of that file, one picture of train is noticed."""
    splits, truth = (json.loads(path.read_text(), strict=False)
                     for path in (trained / "splits.json", bicycles / "annotations.json"))
    own = {name: truth[name] for name in splits["test"]}
    (tmp_path / "part.json").write_text(json.dumps(own))
    run_script("train_detector.py", "--mode", "convert", "--json", tmp_path / "part.json", "--output",
               tmp_path / "test.json")
    content = json.loads((tmp_path / "test.json").read_text())
    for image in content["images"]:
        image["id"] += 100
    for annotation in content["annotations"]:
        annotation["image_id"] += 100
    (tmp_path / "test.json").write_text(json.dumps(content))
    flags = ["--mode", "evaluate", "--checkpoint", trained, "--json", tmp_path / "test.json", "--images_dir",
             bicycles / "images", "--num_workers", 0, "--bootstrap_draws", 20]
    run_script("train_detector.py", *flags, "--output_dir", tmp_path / "out")
    folder = only_run(tmp_path / "out")
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (folder, trained))
    for side, name in (("model", "map"), ("model", "map50"), ("model", "joint_map"), ("model", "recall"),
                       ("baseline", "map")):
        value = theirs[side][name]["value"]
        assert ours[side][name]["value"] == pytest.approx(value, abs=1e-9), (side, name)
    results = json.loads((folder / "detections_test.json").read_text())
    assert all(each["image_id"] >= 100 and len(each["state_probabilities"]) == 4 for each in results)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "test.json"))
        if results:
            coco.loadRes(str(folder / "detections_test.json"))
    (tmp_path / "part.json").write_text(json.dumps({splits["train"][0]: truth[splits["train"][0]]}))
    text = run_script("train_detector.py", *flags[:4], "--json", tmp_path / "part.json", *flags[6:], "--output_dir",
                      tmp_path / "leak", code=2).stderr
    assert "train-test share 1 exact duplicates" in text and splits["train"][0] in text


def test_prediction_lists_every_picture(bicycles, trained, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for k in range(3):
        (images / f"{k}.jpg").write_bytes((bicycles / "images" / f"{k}.jpg").read_bytes())
    (images / "broken.jpg").write_bytes(b"no picture")
    flags = ["--mode", "predict", "--checkpoint", trained, "--images_dir", images, "--output", tmp_path / "d.json",
             "--num_workers", 0, "--one_per_part", "--visualize", 1, "--score_threshold", 0.06]
    monkeypatch.setattr(sys, "argv", ["train_detector.py", *map(str, flags)])
    train_detector.main()
    assert "4 pictures, 1 could not be read" in capsys.readouterr().out
    rows = read_csv(tmp_path / "d.csv")
    assert [row["image"] for row in rows if row["error"]] == ["broken.jpg"]
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        own = [row for row in rows if row["image"] == name]
        assert sorted(row["part"] for row in own) == sorted(train_detector.load_detector(
            trained, common.choose_compute("cpu", "off"))[1]["settings"]["parts"])
        assert all(row["state"] == "absent" for row in own if not row["score"])
    assert len(list((tmp_path / "d_pictures").glob("*.jpg"))) == 1
    assert isinstance(json.loads((tmp_path / "d.json").read_text()), list)


def test_plain_detection_without_any_state(bicycles, tmp_path):
    content = json.loads((bicycles / "val_coco.json").read_text())
    for annotation in content["annotations"]:
        for name in ("state", "state_id", "attributes"):
            annotation.pop(name, None)
    (tmp_path / "plain.json").write_text(json.dumps(content))
    run_script("train_detector.py", "--train_json", tmp_path / "plain.json", "--train_images", bicycles / "images",
               "--output_dir", tmp_path / "out", *SMALL, "--dry_run", "--select", "map")
    folder = only_run(tmp_path / "out")
    columns = set(read_csv(folder / "training_history.csv")[0])
    assert "train_loss_state" not in columns and "val_state_accuracy" not in columns and "val_map" in columns
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["per_state"] == [] and "state" not in read_csv(folder / "detections_val.csv")[0]
    assert not (folder / "per_state.csv").exists()


def test_two_files_leak_where_they_share_pictures(bicycles, tmp_path):
    """The same pictures in train and val, under two files and other ids: exit 2, and the copies are named."""
    flags = ["--train_json", bicycles / "train_coco.json", "--train_images", bicycles / "images", "--val_json",
             bicycles / "annotations.json", "--val_images", bicycles / "images", "--output_dir", tmp_path, *SMALL]
    text = run_script("train_detector.py", *flags, code=2).stderr
    assert "exact duplicates" in text and "train/" in text and text.count("\n") == 1
    assert not list(tmp_path.glob("run_*"))


def test_configurations_are_read():
    for path in (ROOT / "configs").glob("detector_*.yaml"):
        args = train_detector.parse_args(["--config", str(path), "--train_json", "a", "--train_images", "b"])
        assert args.model in train_detector.MODELS
