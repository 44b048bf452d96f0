"""train_detector.py from end to end, and its numbers: AP by pycocotools and by hand, states, hallucinations, baselines.

    python -m pytest tests/test_detector.py
"""
import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageColor, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, log_loss

import common
import train_detector
from conftest import ROOT, only_run, run_fresh, run_here, run_script
from evidence import box_pictures, detection_judging, detection_scores, detection_tables, judging, plotting, verdicts
from readers import part_boxes
from readers.part_boxes import ABSENT, UNKNOWN, PartTruth

BOX, OTHER, FAR = [10, 10, 30, 30], [50, 10, 90, 40], [5, 60, 25, 95]
SMALL = ("--model fasterrcnn_resnet18_fpn --no_pretrained --min_size 32 --max_size 40 --epochs 1 --batch_size 4 "
         "--num_workers 0 --visualize 2").split()


def annotated(*pictures, parts=("bell", "saddle"), absent=(), groups=None, size=(100, 100)):
    """Judged boxes: each picture a list of (label, state, box[, ignored])."""
    def column(k, kind, default=None):
        return [np.array([each[k] if k < len(each) else default for each in boxes], kind) for boxes in pictures]
    n = len(pictures)
    return PartTruth(
        parts=list(parts), images=np.array([f"{k}.jpg" for k in range(n)]), ids=list(range(n)),
        sizes=np.tile(size, (n, 1)), groups=groups, labels=column(0, np.int64), states=column(1, np.int64),
        boxes=[b.reshape(-1, 4) for b in column(2, np.float32)], ignored=column(3, bool, False),
        absent=[np.array(absent[k] if absent else [], int) for k in range(n)])


def detections(*boxes, states=True):
    """One picture's detections from (label, score, state, box)."""
    labels, scores, called, places = ([each[k] for each in boxes] for k in range(4))
    return detection_scores.Detections(
        labels=np.array(labels, int), scores=np.array(scores, float),
        states=np.eye(4)[np.array(called, int)] if states else None, boxes=np.array(places, float).reshape(-1, 4))


def judge(truth, found, threshold=0.5, states=True, baseline=None):
    """With a baseline that calls all states intact."""
    rates = np.eye(4)[np.zeros((len(found), len(truth.parts)), int)]
    if not states:
        found = [dataclasses.replace(each, states=None) for each in found]
    return detection_scores.Judged(truth, found, threshold, baseline, rates)


def map_of(truth, found):
    return detection_scores.Judged(truth, found, 0.5).epoch_metrics()["map"]


def values_of(*arguments, **options):
    """Every number over all pictures, and ap_PART of each part."""
    judged = judge(*arguments, **options)
    overall, each = judged.values(judged.every)
    return overall | {f"ap_{part}": value for part, value in zip(judged.truth.parts, each["ap"])}


# --- average precision ------------------------------------------------------------------

def test_joint_ap_by_hand():
    """Three bells, intact, damaged and intact, all boxes right, the second called intact.

    Parts: AP 1. Joint, category bell-intact: two boxes and three detections, the wrong one ranks second: precision 1 up
    to recall 1/2, then 2/3: (51 * 1 + 50 * 2/3) / 101. Category bell-damaged: one box, no detection: 0. Mean: half.
    """
    truth = annotated([(0, 0, BOX)], [(0, 1, BOX)], [(0, 0, BOX)])
    found = [detections((0, 0.9, 0, BOX)), detections((0, 0.8, 0, BOX)), detections((0, 0.7, 0, BOX))]
    values = values_of(truth, found)
    assert values["map"] == pytest.approx(1) and values["map50"] == pytest.approx(1)
    assert values["joint_map"] == pytest.approx((51 + 50 * 2 / 3) / 101 / 2)
    plain = [dataclasses.replace(each, states=None) for each in found]
    of_baselines = [judge(truth, found, baseline=each).result().overall.baseline for each in (found, plain)]
    assert of_baselines[0]["joint_map"].value == values["joint_map"] and "joint_map" not in of_baselines[1]
    assert of_baselines[0]["map"].value == of_baselines[1]["map"].value == pytest.approx(1)


def test_joint_ap_is_one_only_if_box_part_and_state_are_right():
    truth = annotated([(0, 3, BOX), (1, 1, OTHER)])
    right = [detections((0, 0.9, 3, BOX), (1, 0.9, 1, OTHER))]
    assert values_of(truth, right)["joint_map"] == pytest.approx(1)
    for wrong in ((0, 0.9, 2, BOX), (1, 0.9, 3, BOX), (0, 0.9, 3, FAR)):
        assert values_of(truth, [detections(wrong, (1, 0.9, 1, OTHER))])["joint_map"] == pytest.approx(0.5)


def test_boxes_without_a_state_and_ignored_boxes_count_neither_way():
    truth = annotated([(0, 1, BOX), (0, UNKNOWN, OTHER), (0, 1, FAR, True)])
    found = [detections((0, 0.6, 1, BOX), (0, 0.9, 0, OTHER), (0, 0.8, 0, FAR))]
    values = values_of(truth, found)
    assert values["joint_map"] == pytest.approx(1), "the two others are right or wrong for no one"
    assert values["map"] == pytest.approx(1) and values["precision"] == 1 and values["recall"] == 1
    truth = annotated([(0, 0, BOX), (0, 1, FAR, True), (0, ABSENT, OTHER, True)])
    found = [detections((0, 0.6, 0, BOX), (0, 0.8, 0, FAR), (0, 0.9, 0, OTHER))]
    values = values_of(truth, found)
    assert values["joint_map"] == pytest.approx(1), "the state of an ignored box is not judged either"
    assert values["map_present"] == pytest.approx(1), "nobody trusts that the part is absent there"
    missed = values_of(truth, [detections((0, 0.6, 0, BOX))])
    assert missed["map"] == pytest.approx(1) and missed["recall"] == 1, "nor is it missed where it is not found"


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
    return annotated(*pictures, parts=parts), found


def coco_stats(truth, found, pictures):
    """(AP, AP50) as pycocotools' own summary gives them for these pictures; a repeated one is a picture of its own."""
    annotations, results = [], []
    for k, row in enumerate(pictures, start=1):
        for label, box in zip(truth.labels[row], truth.boxes[row].astype(float)):
            size = box[2:] - box[:2]
            annotations.append({"id": len(annotations) + 1, "image_id": k, "category_id": int(label), "iscrowd": 0,
                                "bbox": [*box[:2], *size], "area": size.prod()})
        results += [{"image_id": k, "category_id": int(label), "score": score, "bbox": [*box[:2], *(box[2:] - box[:2])]}
                    for label, score, box in zip(found[row].labels, found[row].scores, found[row].boxes)]
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


def test_of_each_part_the_hundred_best_of_a_picture_count():
    """As in pycocotools' own summary; programs write up to 300."""
    truth = annotated([(0, 0, BOX)])
    for n_wrong, expected in ((99, 1 / 100), (100, 0)):
        found = [detections(*[(0, 0.9, 0, FAR)] * n_wrong, (0, 0.8, 0, BOX))]
        assert values_of(truth, found)["map"] == pytest.approx(expected)
        assert coco_stats(truth, found, [0])[0] == pytest.approx(expected)


def test_a_part_is_found_from_half_an_overlap_on():
    """By hand: moved by 6 of its 20 pixels a box overlaps by 14 / 26 = .54, by 7 of them by .48; and so on.

    Of an ignored box counts the share of the detection that lies on it: 10.5 / 20, or 9.5 / 20.
    """
    truth = annotated([(0, 1, BOX), (1, 0, FAR, True), (2, ABSENT, OTHER)], parts=("bell", "saddle", "lamp"))

    def moved(bell, saddle, lamp):
        places = np.add([BOX, FAR, OTHER], [[shift, 0, shift, 0] for shift in (bell, saddle, lamp)])
        return values_of(truth, [detections(*zip((0, 1, 2), (0.9, 0.9, 0.9), (1, 0, 0), places))])
    found = moved(6, 9.5, 13)
    assert found["precision"] == 1 and found["recall"] == 1 and found["hallucination_rate"] == 1
    assert found["state_accuracy"] == 0.5, "the absent lamp is called intact"
    missed = moved(7, 10.5, 14)
    assert missed["precision"] == missed["recall"] == missed["hallucination_rate"] == 0
    assert math.isnan(missed["state_accuracy"])


def test_without_absent_parts():
    """Absent boxes leave the truth and detections called absent leave the list."""
    truth = annotated([(0, 0, BOX), (1, ABSENT, OTHER)])
    values = values_of(truth, [detections((0, 0.9, 0, BOX), (1, 0.95, ABSENT, OTHER))])
    assert values["map"] == values["map_present"] == pytest.approx(1)
    values = values_of(truth, [detections((0, 0.6, 0, BOX), (0, 0.9, ABSENT, FAR))])
    assert values["map_present"] == pytest.approx(1)
    truth = dataclasses.replace(truth, keeps_absent=False)
    dropped = values_of(truth, [detections((0, 0.9, 0, BOX), (1, 0.95, 0, OTHER))])
    assert dropped["map"] == pytest.approx(1) and dropped["precision"] == 0.5 and dropped["recall"] == 1


def test_nothing_found_and_nothing_there():
    values = values_of(annotated([(0, 0, BOX)], []), [detections(), detections()])
    assert values["map"] == 0 and values["recall"] == 0 and math.isnan(values["precision"])
    assert math.isnan(values["ap_saddle"]) and math.isnan(values["state_accuracy"])
    values = values_of(annotated([(0, UNKNOWN, BOX)]), [detections((0, 0.9, 0, BOX), states=False)], states=False)
    assert values["map"] == pytest.approx(1) and "joint_map" not in values and "macro_f1" not in values


# --- COCO results of other programs ------------------------------------------------------

def as_files(folder, truth, found):
    """truth.json and results.json as another program writes them: other ids, a crowd box, no state."""
    ids = [f"picture {k}" for k in range(len(found))]
    annotations, results = [], []
    for k, (boxes, labels, detected) in enumerate(zip(truth.boxes, truth.labels, found)):
        for label, box in zip(labels, boxes.astype(float)):
            size = box[2:] - box[:2]
            annotations.append({"id": len(annotations) + 1, "image_id": ids[k], "category_id": 10 + int(label),
                                "iscrowd": int(len(annotations) % 9 == 0), "bbox": [*box[:2], *size],
                                "area": size.prod()})
        results += [{"image_id": ids[k], "category_id": 10 + int(label), "score": score,
                     "bbox": [*box[:2], *(box[2:] - box[:2])]}
                    for label, score, box in zip(detected.labels, detected.scores, detected.boxes)]
    common.write_json(folder / "truth.json", {
        "images": [{"id": each, "file_name": f"{each}.jpg", "width": 100, "height": 100} for each in ids],
        "categories": [{"id": 10 + k, "name": part} for k, part in enumerate(truth.parts)],
        "annotations": annotations})
    common.write_json(folder / "results.json", results)


def judge_files(folder, baseline):
    """metrics.json of results.json against truth.json in a folder; baseline: of mean_boxes."""
    truth, found, *_ = detection_judging.read_coco_results(folder / "truth.json", folder / "results.json")
    args = train_detector.parse_args(["--mode", "audit", "--json", "x", "--images_dir", "y", "--output_dir",
                                      str(folder / "out")])
    with common.start_run(args) as run:
        return detection_judging.judge_detections(run, truth, found, judging.Setting(), [baseline] * len(found), {})


def test_results_of_another_program_are_judged_as_pycocotools_does(tmp_path):
    as_files(tmp_path, *random_case(3))
    run_script("judge_predictions.py", "--predictions", tmp_path / "results.json", "--truth", tmp_path / "truth.json",
               "--criteria", "map>0.99", "--output_dir", tmp_path / "out")
    folder = only_run(tmp_path / "out")
    metrics = json.loads((folder / "metrics.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [metrics["model"][name]["value"] for name in ("map", "map50")]
    assert values == pytest.approx(evaluation.stats[:2], abs=1e-6)
    assert metrics["part"] == "table" and metrics["per_state"] == [] and "joint_map" not in metrics["model"]
    assert [bar["verdict"] for bar in metrics["criteria"]] == ["FAIL"]
    page = (folder / "report.html").read_text()
    assert "mean boxes are those of these very pictures" in page and not (folder / "failures.jpg").exists()


@pytest.mark.parametrize("word, flags, held_out, verdict", [
    ("not known", [], None, "PASS"), ("new", ["--held_out"], True, "PASS"),
    ("chose", ["--held_out"], False, "PASS on validation"), ("train", ["--held_out"], False, "PASS on train rows")])
def test_what_results_say_of_their_pictures_and_another_detector_count(tmp_path, word, flags, held_out, verdict):
    """The other detector found half of the boxes; what was judged against what stands in the record."""
    as_files(tmp_path, *random_case(3))
    truth, results, weak = (tmp_path / f"{name}.json" for name in ("truth", "results", "weak"))
    rows = json.loads(results.read_text())
    common.write_json(results, [rows[0] | {"seen": word}, *rows[1:]])
    common.write_json(weak, [rows[0] | {"file_name": "picture 11.jpg"}, *rows[2::2]])
    run_here("judge_predictions.py", "--predictions", results, "--truth", truth, "--baseline", weak, "--criteria", "map>0.1",
             "--output_dir", tmp_path / "out", *flags)
    folder = only_run(tmp_path / "out")
    metrics = common.read_json(folder / "metrics.json")
    assert metrics["held_out"] is held_out and [bar["verdict"] for bar in metrics["criteria"]] == [verdict]
    assert metrics["baseline_name"] == "weak" and set(metrics["baselines"]) == {"mean box", "weak"}
    own_truth, found, *_ = detection_judging.read_coco_results(truth, weak)
    assert metrics["baselines"]["weak"] == pytest.approx(values_of(own_truth, found)["map"])
    assert common.read_json(folder / "args.json")["data"] == {"predictions": [str(results)], "truth": str(truth)}
    page = (folder / "report.html").read_text()
    assert "<title>Detections of results.json" in page and "12 pictures scored" in page
    assert "note: weak.json: 1 results have the image_id of another" in (folder / "log.txt").read_text()
    for bar in ("r2", "joint_map"):  # no detection has a state
        said = run_here("judge_predictions.py", "--predictions", results, "--truth", truth, "--criteria", f"{bar}>0.1",
                        "--output_dir", tmp_path / "none", code=2).text
        assert bar in said and not (tmp_path / "none").exists()


def test_the_baseline_of_the_highest_ap_counts_and_limits_of_a_run_stand_on_its_page(tmp_path):
    truth, found = random_case(3)
    setting = judging.Setting(limits=["Of one observer."])
    args = train_detector.parse_args(
        ["--mode", "audit", "--json", "x", "--images_dir", "y", "--output_dir", str(tmp_path)])
    trained = {"heads": found, "other": [detections()] * len(found)}
    with common.start_run(args) as run:
        priors = [detection_judging.mean_boxes(truth)] * len(found)
        metrics = detection_judging.judge_detections(run, truth, found, setting, priors, trained)
    assert metrics["baseline_name"] == "heads" and list(metrics["baselines"]) == ["mean box", "heads", "other"]
    assert metrics["baselines"]["heads"] == metrics["model"]["map"]["value"] > metrics["baselines"]["mean box"]
    page = (run.folder / "report.html").read_text()
    assert "Of one observer." in page and "nothing else was tested" in page


RESULT = {"image_id": "picture 0", "category_id": 10, "bbox": [1, 2, 3, 4], "score": 0.5}
def test_the_file_name_of_a_result_decides_where_its_image_id_is_of_the_other_program(tmp_path):
    """Ultralytics writes the name of the picture without its ending, as a number where it is one."""
    as_files(tmp_path, *random_case(3))
    files = tmp_path / "truth.json", tmp_path / "results.json"
    truth, wanted, *_ = detection_judging.read_coco_results(*files)
    rows = json.loads(files[1].read_text())
    ids = truth.ids
    for number, other in enumerate((dict(zip(ids, ids[1:] + ids[:1])), {own: f"img_{own}" for own in ids})):
        common.write_json(files[1], [{**row, "image_id": other[row["image_id"]], "file_name": f"{row['image_id']}.jpg"}
                                     for row in rows])
        _, found, _, annotations = detection_judging.read_coco_results(*files)
        for one, again in zip(wanted, found):
            np.testing.assert_array_equal(one.boxes, again.boxes)
        said = f"results.json: {len(rows)} results have the image_id of another image than their file_name, which decides"
        assert said in annotations.notes
    run_script("judge_predictions.py", "--predictions", files[1], "--truth", files[0], "--baseline", files[1],
               "--output_dir", tmp_path / "out")
    assert (only_run(tmp_path / "out") / "log.txt").read_text().count(said) == 1


def test_versions_of_roboflow_are_one_group_of_results_too_and_said(tmp_path):
    as_files(tmp_path, *random_case(3))
    content = json.loads((tmp_path / "truth.json").read_text())
    for k, image in enumerate(content["images"]):
        image["file_name"] = f"{k // 2}_jpg.rf.{'ab'[k % 2] * 32}.jpg"
    common.write_json(tmp_path / "truth.json", content)
    truth, *_, found = detection_judging.read_coco_results(tmp_path / "truth.json", tmp_path / "results.json")
    assert len(set(truth.groups)) == 6 and sum("Roboflow" in note for note in found.notes) == 1
    truth, *_, found = detection_judging.read_coco_results(
        tmp_path / "truth.json", tmp_path / "results.json", group_column="file_name")
    assert len(set(truth.groups)) == 12 and not any("Roboflow" in note for note in found.notes)


def test_file_names_decide_by_all_of_their_folders_and_then_by_unique_base_names(tmp_path):
    """One base name in two folders is decided by the folder, or else by the image id; other pictures by their names.

    What is not annotated is left out.
    """
    as_files(tmp_path, *random_case(3))
    truth = json.loads((tmp_path / "truth.json").read_text())
    names = ["d1/a.jpg", "d2/a.jpg", *(f"{k}.jpg" for k in range(2, len(truth["images"])))]
    for image, name in zip(truth["images"], names):
        image["file_name"] = name
    common.write_json(tmp_path / "truth.json", truth)
    ids = [part_boxes.read_id(image["id"]) for image in truth["images"]]
    found = part_boxes.read_annotations(tmp_path / "truth.json")
    written = {"d2/a.jpg": 1, "/data/d2/a.jpg": 1, "a.jpg": 0, "val/2.jpg": 2, None: 0, 7: 7}
    elsewhere = {**RESULT, "image_id": ids[0], "file_name": "elsewhere.jpg"}
    entries = [elsewhere, *({**elsewhere, "file_name": name} for name in written)]
    n_notes = len(found.notes)
    content = detection_tables.results_as_coco(entries, found, part_boxes.Reading("xywh", "state"))
    assert [ids.index(each["image_id"]) for each in content["annotations"]] == list(written.values())
    common.write_json(tmp_path / "results.json", entries)
    notes = detection_tables.read_results(tmp_path / "results.json", found, None)[3]
    assert [note[14:40] for note in notes] == ["4 results have the image_i", "1 results are of pictures "]
    assert len(found.notes) == n_notes
    content = detection_tables.results_as_coco([elsewhere], found, part_boxes.Reading("xywh", "state"))
    assert [each["image_id"] for each in content["annotations"]] == [ids[0]], "where no name fits the ids are all there is"


def test_boxes_over_the_edge_are_cut_on_both_sides_and_those_without_area_are_listed(tmp_path):
    by_less_than_a_pixel = [(0, 0, [70, 10, 100.9, 30])]
    truth = annotated([(0, 0, [80, 10, 120, 30])], [(0, 0, BOX), (1, 0, [5, 5, 5, 50])], by_less_than_a_pixel,
                      *[[(0, 0, BOX)]] * 9)
    as_files(tmp_path, truth, [detections((0, 0.9, 0, [80, 10, 120, 30])), *[detections((0, 0.8, 0, BOX))] * 11])
    judged, found, *_ = detection_judging.read_coco_results(tmp_path / "truth.json", tmp_path / "results.json")
    assert found[0].boxes.tolist() == judged.boxes[0].tolist() == [[80, 10, 100, 30]]
    run_script("judge_predictions.py", "--predictions", tmp_path / "results.json", "--truth", tmp_path / "truth.json",
               "--output_dir", tmp_path / "out")
    run = only_run(tmp_path / "out")
    [row] = read_csv(run / "skipped.csv")
    assert row["image"] == "picture 1.jpg" and "no area" in row["reason"]
    said = (run / "log.txt").read_text()
    assert "note: 1 annotations are left out (listed in skipped.csv)" in said and "note: 1 boxes reached over the edge" in said


RESULT_FAULTS = {
    "image": ([{**RESULT, "image_id": 7}], ["result 0", "image_id 7"]),
    "category": ([RESULT, {**RESULT, "category_id": 1}], ["result 1", "category_id 1"]),
    "score": ([{**RESULT, "score": "high"}], ["result 0", "score 'high'"]),
    "box": ([{**RESULT, "bbox": [1, 2, 3]}], ["result 0", "four numbers"]),
    "negative width": ([RESULT, {**RESULT, "bbox": [10, 10, -3, 3]}], ["result 1", "negative"]),
    "state": ([{**RESULT, "state": "intakt"}], ["result 0", "intakt"]),
    "one state": ([RESULT, {**RESULT, "state": "intact"}], ["1 of 2 results have no state"]),
    "probabilities": ([{**RESULT, "state_probabilities": [1]}], ["result 0", "state_probabilities"]),
    "logits": ([{**RESULT, "state_probabilities": [2.5, -1, 0.2, -0.7]}], ["result 0", "from 0 to 1", "2.5"]),
    "percent": ([{**RESULT, "state_probabilities": [70, 10, 10, 10]}], ["result 0", "sum 1"]),
    "sum": ([{**RESULT, "state_probabilities": [0.7, 0.7, 0.1, 0.1]}], ["result 0", "sum 1"]),
    "no object": ([3], ["each an object", "found [3]"]),
    "one that is no object": ([RESULT, 3], ["each an object"]),
    "no list": ({"a": 1}, ["expected a list"])}


@pytest.mark.fault("tables, COCO, JSON: quirks and mistakes")
@pytest.mark.parametrize("name", RESULT_FAULTS)
def test_faults_of_results_are_named(tmp_path, name):
    content, words = RESULT_FAULTS[name]
    as_files(tmp_path, *random_case(3))
    common.write_json(tmp_path / "results.json", content)
    with pytest.raises(common.UserError) as error:
        detection_judging.read_coco_results(tmp_path / "truth.json", tmp_path / "results.json")
    for word in ("results.json", *words):
        assert word in str(error.value)


@pytest.mark.fault("tables, COCO, JSON: quirks and mistakes")
@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh", "fractions"])
def test_results_in_another_convention_stop_and_are_read_when_it_is_named(tmp_path, box_format):
    boxes = [[45 + k, 50 + k, 85 + k, 95 + k] for k in range(4)]
    as_files(tmp_path, annotated(*([(0, 0, box)] for box in boxes)), [detections((0, 0.9, 0, box)) for box in boxes])
    files = tmp_path / "truth.json", tmp_path / "results.json"
    wanted = detection_judging.read_coco_results(*files)[1]
    content = json.loads(files[1].read_text())
    for result in content:
        left, top, width, height = result["bbox"]
        result["bbox"] = {"xyxy": [left, top, left + width, top + height],
                          "cxcywh": [left + width / 2, top + height / 2, width, height],
                          "fractions": [number / 100 for number in result["bbox"]]}[box_format]
    common.write_json(files[1], content)
    with pytest.raises(common.UserError, match=f"results.json: .* look like {box_format}.*--box_format {box_format}"):
        detection_judging.read_coco_results(*files)
    for one, other in zip(wanted, detection_judging.read_coco_results(*files, box_format=box_format)[1]):
        np.testing.assert_allclose(other.boxes, one.boxes, atol=1e-9)


def test_annotations_in_another_convention_stop_and_are_read_when_they_are_converted(tmp_path):
    """Corners: read as sizes most boxes would leave their pictures, and right detections would look wrong."""
    boxes = [[45 + k, 50 + k, 85 + k, 95 + k] for k in range(4)]
    as_files(tmp_path, annotated(*([(0, 0, box)] for box in boxes)), [detections((0, 0.9, 0, box)) for box in boxes])
    files = tmp_path / "truth.json", tmp_path / "results.json"
    content = json.loads(files[0].read_text())
    for annotation, box in zip(content["annotations"], boxes):
        annotation["bbox"] = box
    common.write_json(files[0], content)
    with pytest.raises(common.UserError, match="truth.json: .* look like xyxy.*Write them as COCO with .*--mode convert .*--box_format xyxy"):
        detection_judging.read_coco_results(*files)
    convert = ["--mode", "convert", "--json", files[0], "--output", tmp_path / "made.json"]
    assert "--box_format xyxy" in run_here("train_detector.py", *convert, code=2).stderr
    assert not (tmp_path / "made.json").exists()
    run_here("train_detector.py", *convert, "--box_format", "xyxy")
    truth = detection_judging.read_coco_results(tmp_path / "made.json", files[1])[0]
    np.testing.assert_allclose(np.concatenate(truth.boxes), boxes)


def test_states_of_results_may_be_text_or_numbers(tmp_path):
    as_files(tmp_path, *random_case(3))
    common.write_json(tmp_path / "results.json", [{**RESULT, "state": "Damaged"}])
    [plain, *_] = detection_judging.read_coco_results(tmp_path / "truth.json", tmp_path / "results.json")[1]
    assert plain.scores.tolist() == [0.5] and plain.states is None, "no annotated box has a state to judge them by"
    content = json.loads((tmp_path / "truth.json").read_text())
    content["annotations"][1]["state"] = "damaged"
    common.write_json(tmp_path / "truth.json", content)
    common.write_json(tmp_path / "results.json", [{**RESULT, "state": "Damaged"}, {**RESULT, "state": 3}])
    found = detection_judging.read_coco_results(tmp_path / "truth.json", tmp_path / "results.json")[1]
    assert found[0].called().tolist() == [1, 3] and found[1].states.shape == (0, 4)
    judged = detection_judging.read_coco_results(tmp_path / "truth.json", tmp_path / "results.json")[0]
    metrics = judge_files(tmp_path, detection_judging.mean_boxes(judged))
    assert metrics["per_state"] and metrics["state_calibration"] == [], "no probabilities were given"
    assert "Reliability" not in (only_run(tmp_path / "out") / "report.html").read_text()


@pytest.mark.parametrize("probabilities, is_read", [
    ([0.12, 0.12, 0.12, 0.62], True), ([0.13, 0.13, 0.13, 0.63], True), ([0.13, 0.13, 0.14, 0.63], False)])
def test_probabilities_with_two_digits_are_read(tmp_path, probabilities, is_read):
    """Of eight votes three states get one each, the fourth five: 1/8 is written as .12 or .13."""
    as_files(tmp_path, annotated([(0, 0, BOX)]), [detections()])
    common.write_json(tmp_path / "results.json", [{**RESULT, "state_probabilities": probabilities}])
    annotations = part_boxes.read_annotations(tmp_path / "truth.json")
    refusal = contextlib.nullcontext() if is_read else pytest.raises(common.UserError, match="with sum 1")
    with refusal:
        [found] = detection_tables.read_results(tmp_path / "results.json", annotations, None)[1]
        assert found.states.tolist() == [probabilities]


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
    truth = annotated([(0, 0, BOX), (1, 1, OTHER), (1, 3, FAR)], [(0, 1, BOX)])
    found = [detections((0, 0.9, 0, BOX), (1, 0.2, 3, OTHER)), detections((0, 0.8, 1, BOX), (0, 0.7, 0, FAR))]
    judged = judge(truth, found, baseline=found)
    assert judged.confusions.sum(0).astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0] * 4, [0] * 4]
    values, _ = judged.values(judged.every)
    intact, _ = judged.baseline_values(judged.every)
    assert values["state_accuracy"] == pytest.approx(2 / 3) and intact["state_accuracy"] == pytest.approx(1 / 3)
    assert intact["balanced_accuracy"] == pytest.approx(0.5)
    assert values["precision"] == pytest.approx(2 / 3) and values["recall"] == pytest.approx(2 / 4)
    rows = detection_judging.per_state_rows(judged)
    assert [row["found"] for row in rows] == [1, 2, 0, 0]
    assert rows[1]["called occluded"] == 1 and rows[1]["recall"] == 0.5
    # joint categories with a box: bell-intact and bell-damaged are found, saddle-damaged and saddle-occluded are not
    np.testing.assert_allclose([row["joint_ap"] for row in rows], [1, 0.5, math.nan, 0])


def test_states_are_held_against_those_that_their_parts_usually_have():
    """Bells are mostly damaged, saddles intact: of four boxes found the rates of the parts call three right."""
    truth = annotated([(0, 1, BOX), (1, 0, OTHER)], [(0, 1, BOX), (1, 3, OTHER)])
    found = [detections((0, 0.9, 0, BOX), (1, 0.9, 0, OTHER)) for _ in range(2)]
    for each in found:
        each.states = 0.99 * each.states + 0.0025
    rates = np.array([[0.2, 0.6, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    judged = detection_scores.Judged(truth, found, 0.5, found, np.stack([rates, rates]))
    assert judged.baseline_values(judged.every)[0]["state_accuracy"] == pytest.approx(3 / 4)
    model, prior = detection_judging.calibration_rows(judged)
    assert prior["nll"] == pytest.approx(log_loss([1, 0, 1, 3], rates[[0, 1, 0, 1]], labels=range(4)))
    assert model["boxes"] == 4 and model["nll"] > prior["nll"], "the model is sure and wrong"


def judge_run(tmp_path, truth, found, baseline, similar=()):
    """(metrics, log and page) of a run that judges these detections beside those of a baseline that was trained.

    similar: the pictures that look like one in another part of the split.
    """
    args = train_detector.parse_args(
        ["--mode", "audit", "--json", "x", "--images_dir", "y", "--output_dir", str(tmp_path)])
    setting = judging.Setting(seen=np.repeat("new", len(found)), is_similar=np.isin(np.arange(len(found)), similar))
    with common.start_run(args) as run:
        priors = [detection_judging.mean_boxes(truth)] * len(found)
        metrics = detection_judging.judge_detections(run, truth, found, setting, priors, {"heads": baseline})
    return metrics, run.path("log.txt").read_text() + run.path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("called, level", [((0, 1), "good"), ((1, 0), "caution")])
def test_a_page_is_not_green_where_states_are_told_no_better_than_by_the_usual_ones(tmp_path, called, level):
    """Boxes are found far better than by the baseline; bells are damaged in every other picture, saddles never."""
    boxes = np.array([BOX, OTHER]) + 2 * np.arange(12)[:, None, None]  # (12, 2, 4)
    truth = annotated(*[[(0, k % 2, bell), (1, 0, saddle)] for k, (bell, saddle) in enumerate(boxes)])
    found, shifted = ([detections((0, 0.9, called[k % 2], bell), (1, 0.8, 0, saddle))
                       for k, (bell, saddle) in enumerate(places)] for places in (boxes, boxes + 3))
    metrics, _ = judge_run(tmp_path, truth, found, shifted)
    assert metrics["headline"]["verdict"] == "better" and metrics["headline"]["level"] == level
    said = ["are not told better for certain" in doubt and "0.333 against 0.500" in doubt for doubt in metrics["doubts"]]
    assert said == [True] * (level == "caution") and metrics["alarms"] == []


@pytest.mark.parametrize("similar, level, words", [
    ((10, 11), "good", "2 of 12 rows look like one in another part of the split. Without them: "),
    (range(8), "caution", "8 of 12 rows look like one in another part of the split. Without them: "),
    ((0, 1), "caution", "This says nothing of saddle."),
    (range(12), "caution", "12 of 12 rows look like one in another part of the split. If")])
def test_the_verdict_is_repeated_without_pictures_that_look_like_train_pictures(tmp_path, similar, level, words):
    """Eight pictures are right and four as bad as those of the baseline; saddles are in the first two."""
    boxes = np.array(BOX) + 2 * np.arange(12)[:, None]  # (12, 4)
    shifts = np.repeat([0, 3], [8, 4])[:, None]
    pictures = [[(0, UNKNOWN, box)] for box in boxes]
    for picture in pictures[:2]:
        picture.append((1, UNKNOWN, FAR))
    found, baseline = ([detections((0, 0.9, 0, box), (1, 0.9, 0, FAR), states=False) for box in places]
                       for places in (boxes + shifts, boxes + 3))
    metrics, said = judge_run(tmp_path, annotated(*pictures), found, baseline, similar)
    assert metrics["headline"]["verdict"] == "better" and metrics["headline"]["level"] == level
    assert [words in doubt for doubt in metrics["doubts"]] == [True] * (level == "caution")
    assert said.count(words) >= 2


def test_the_numbers_over_some_pictures_are_those_of_these_pictures_alone():
    truth, found = random_case(1, 24)
    groups = np.array([f"g{k % 8}" for k in range(24)])
    baseline = found[::-1]
    kept = np.array([2, 3, 5, 7, 11, 13, 17, 19, 20, 22])
    for own in (truth, dataclasses.replace(truth, groups=groups)):
        alone = judge(own.take(kept), [found[k] for k in kept], baseline=[baseline[k] for k in kept]).result(folds=3)
        among = judge(own, found, baseline=baseline).result(folds=3, pictures=kept)
        assert str(among.record()) == str(alone.record())


def test_states_that_are_told_or_that_parts_always_have_leave_no_doubt():
    truth = annotated(*[[(0, 0, BOX), (1, 1, OTHER)]] * 6)
    found = [detections((0, 0.9, 0, BOX), (1, 0.9, 1, OTHER))] * 6
    usual = np.tile(np.eye(4)[:2], (6, 1, 1))
    for rates in (usual, usual[:, [0, 0]]):
        result = detection_scores.Judged(truth, found, 0.5, found, rates).result()
        assert detection_judging.state_doubts(result) == []


def test_hallucinations_by_hand():
    """Four absent parts, two with a box: one is claimed at its box, one detected there and rightly called absent;
    of those without a box one is claimed elsewhere, one only below the threshold."""
    truth = annotated([(0, ABSENT, BOX)], [(0, ABSENT, BOX)], [], [], absent=[[], [], [1], [1]])
    found = [detections((0, 0.9, 0, BOX)), detections((0, 0.9, ABSENT, BOX)), detections((1, 0.6, 1, FAR)),
             detections((1, 0.4, 0, FAR))]
    values = values_of(truth, found)
    assert values["hallucination_rate"] == pytest.approx(1 / 2)
    assert values["hallucination_rate_anywhere"] == pytest.approx(2 / 4)
    judged = judge(truth, found, baseline=found)
    rows = detection_judging.per_part_rows(judged, judged.result())
    for row, k in zip(rows, (1, 1)):
        low, high = binomtest(k, 2).proportion_ci(method="wilson")
        assert row["hallucination_rate_anywhere"] == k / 2 and row["absent"] == 2
        found_ends = row["hallucination_rate_anywhere_low"], row["hallucination_rate_anywhere_high"]
        assert found_ends == pytest.approx((low, high))
    elsewhere = values_of(truth, [detections((0, 0.9, 0, OTHER)), *found[1:]])
    assert elsewhere["hallucination_rate"] == 0 and elsewhere["hallucination_rate_anywhere"] == pytest.approx(2 / 4)


def test_that_no_part_is_absent_is_said_only_where_none_is():
    """Of each absent part it is told whether it has a box, or stands in the list of its picture."""
    cases = {True: [annotated([(0, 0, BOX)])],
             False: [annotated([(0, ABSENT, BOX)]), annotated([(0, 0, BOX)], absent=[[1]])]}
    for is_said, truths in cases.items():
        for truth in truths:
            limits = detection_judging.general_limits(judge(truth, [detections()]))
            assert any("hallucinations were not measured" in sentence for sentence in limits) == is_said


def test_errors_of_a_picture_are_missed_boxes_wrong_ones_and_wrong_states():
    """By hand: none; one missed for one elsewhere; two wrong states; one missed, and a wrong one under the threshold."""
    both = [(0, 0, BOX), (1, 1, OTHER)]
    found = [detections((0, 0.9, 0, BOX), (1, 0.9, 1, OTHER)), detections((0, 0.9, 0, FAR), (1, 0.9, 1, OTHER)),
             detections((0, 0.9, 1, BOX), (1, 0.9, 0, OTHER)), detections((0, 0.9, 0, BOX), (1, 0.4, 1, FAR))]
    assert detection_judging.count_errors(judge(annotated(*[both] * 4), found)).tolist() == [0, 2, 2, 1]


def test_what_is_not_trusted_or_there_too_is_no_hallucination():
    """An absent box that no one trusts; a part annotated twice, absent in one place and found in the other."""
    truth = annotated([(0, ABSENT, BOX, True)], [(0, ABSENT, FAR), (0, 0, BOX)])
    counts = judge(truth, [detections((0, 0.9, 0, BOX))] * 2).counts
    assert {name: int(counts[name].sum()) for name in ("absent", "claimed", "absent_boxes", "claimed_there")} == {
        "absent": 0, "claimed": 0, "absent_boxes": 1, "claimed_there": 0}


def test_mean_boxes_by_hand():
    truth = annotated([(0, 1, [0, 0, 20, 20])], [(0, 1, [20, 20, 40, 60]), (1, 0, BOX, True)], [(0, 0, [10, 10, 30, 40])],
                  [])
    baseline = detection_judging.mean_boxes(truth)
    np.testing.assert_allclose(baseline["boxes"][0], [0.1, 0.1, 0.3, 0.4])
    assert baseline["score"].tolist() == [0.75, 0]
    np.testing.assert_allclose(baseline["states"], [[2 / 7, 3 / 7, 1 / 7, 1 / 7], [0.25] * 4], err_msg="one more of each")
    found = detection_judging.baseline_detections([baseline], np.array([[200, 100]]))[0]
    np.testing.assert_allclose(found.boxes, [[20, 10, 60, 40]])
    assert found.labels.tolist() == [0] and found.called().tolist() == [1]


def test_intervals_pair_model_and_baseline_and_need_five_pictures():
    truth, found = random_case(1, 24)
    baseline_boxes = [detections((0, 0.5, 0, [20, 20, 50, 50])) for _ in found]
    judged = judge(truth, found, baseline=baseline_boxes)
    result = judged.result()
    model, baseline, difference = (getattr(result.overall, side)["map"] for side in ("model", "baseline", "difference"))
    assert "24 images" in result.method and model.low < model.value < model.high and difference.low > 0
    assert difference.value == pytest.approx(model.value - baseline.value)
    assert result.n.tolist() == np.bincount(np.concatenate(truth.labels)).tolist(), "boxes of each part"
    four = judge(truth.take(range(4)), found[:4]).result()
    assert four.method == "no interval under 5 images, here 4" and math.isnan(four.overall.model["map"].low)
    few = judge(truth.take(range(12)), found[:12], baseline=baseline_boxes[:12]).result()
    assert "t-interval" in few.method and few.overall.model["map"].low < few.overall.model["map"].high
    truth = dataclasses.replace(truth, groups=np.array([f"g{k % 3}" for k in range(24)]))
    assert judge(truth, found).result().method == "no interval under 5 groups, here 3"


def test_what_rests_on_under_five_pictures_or_groups_has_no_interval():
    """Of 12 pictures one has a damaged saddle, one an absent saddle; the bells are in all."""
    pictures = [[(0, 0, BOX)] for _ in range(12)]
    pictures[0].append((1, 1, OTHER))
    pictures[1].append((1, ABSENT, FAR))
    found = [detections((0, 0.9, k % 2, BOX), (1, 0.8, 1, OTHER)) for k in range(12)]
    truth = annotated(*pictures)
    result = judge(truth, found, baseline=found).result()
    ap = result.each.model["ap"]
    assert ap.low[0] <= ap.value[0] and math.isnan(ap.low[1]) and math.isnan(result.each.difference["ap"].low[1])
    model = result.overall.model
    for metric in ("hallucination_rate", "hallucination_rate_anywhere"):
        assert math.isfinite(model[metric].value) and math.isnan(model[metric].high), metric
    for metric in ("map", "state_accuracy", "precision"):
        assert math.isfinite(model[metric].high), metric
    meanings = detection_judging.criteria_names(truth.parts, True)
    bars = verdicts.parse_criteria("ap_saddle<1,hallucination_rate<0.9", meanings)
    judged = verdicts.judge_criteria(bars, verdicts.named_estimates(result, meanings))
    assert [bar["verdict"] for bar in judged] == ["NOT RESOLVABLE"] * 2
    two_states = judge(annotated(*pictures[:1], *pictures[2:]), found[:11]).result().overall.model
    assert math.isfinite(two_states["state_accuracy"].high) and math.isnan(two_states["balanced_accuracy"].high)
    bells = dataclasses.replace(annotated(*([[(0, 0, BOX)]] * 8), *([[(1, 0, OTHER)]] * 4)),
                                groups=np.array([f"g{k // 2}" for k in range(12)]))
    few = judge(bells, found).result()
    assert "6 groups" in few.method and np.isnan(few.each.model["ap"].low).all()


def test_intervals_cover_the_truth():
    """Simulated: 60 studies of 30 pictures from one source whose AP is known from 3,000; nominal .95."""
    truth, found = random_case(99, 3000)
    whole = values_of(truth, found, states=False)["map"]  # the same AP
    covered = []
    for seed in range(60):
        truth, found = random_case(seed, 30)
        judged = judge(truth, found, states=False)
        found = judged.result().overall.model["map"]
        covered.append(found.low <= whole <= found.high)
    assert 0.85 <= np.mean(covered) <= 1, np.mean(covered)


def test_few_pictures_make_ap_too_high_and_the_page_says_so():
    many = values_of(*random_case(99, 2000))
    few = [values_of(*random_case(seed, 12)) for seed in range(40)]
    for name in ("map", "joint_map"):
        assert np.mean([each[name] for each in few]) > many[name] + 0.01, name
    limits = detection_judging.general_limits(judge(*random_case(0)))
    assert any("Few pictures make AP and joint AP too high" in sentence for sentence in limits)


def test_best_of_each_part_and_absent_where_none_is_over_the_threshold():
    detected = detections((1, 0.3, 0, BOX), (0, 0.9, 1, OTHER), (0, 0.95, 3, BOX), (1, 0.4, 0, FAR))
    best = detection_tables.best_of_each_part(detected, 0.35)
    assert best.labels.tolist() == [0, 1] and best.scores.tolist() == [0.95, 0.4]
    best = detection_tables.best_of_each_part(detected, 0.5)
    rows = detection_tables.detection_rows([{"image": "x.jpg"}], [best], ["bell", "saddle"], lists_absent=True)
    assert [(row["part"], row["state"], row["score"]) for row in rows] == [
        ("bell", "occluded", 0.95), ("saddle", "absent", None)]


def test_a_picture_without_any_detection_keeps_its_row_and_its_warning():
    rows = detection_tables.detection_rows(
        [{"image": "x.jpg", "warning": "unlike the training pictures"}, {"image": "y.jpg", "warning": ""}],
        [detections(), detections((0, 0.9, 0, BOX))], ["bell"])
    assert [(row["image"], row["part"], row["warning"]) for row in rows] == [
        ("x.jpg", None, "unlike the training pictures"), ("y.jpg", "bell", "")]
    for states in (False, True):
        [row] = detection_tables.detection_rows(
            [{"image": "x.jpg", "seen": "new"}], [detections(states=states)], ["bell"])
        assert tuple(row) == detection_tables.COLUMNS, "whatever was found"


def test_a_part_that_the_annotation_file_lacks_gets_an_id_of_its_own():
    detected = detections((0, 0.9, 1, OTHER), (1, 0.3, 0, BOX), (2, 0.4, 0, FAR))
    parts = ["bell", "saddle", "lamp"]
    rows = detection_tables.detection_rows([{"image": "x.jpg", "seen": "new"}], [detected], parts)
    results = detection_tables.coco_results(rows, {"x.jpg": 7}, part_boxes.number_parts(parts, {"saddle": 1}))
    assert [(row["part"], row["category_id"]) for row in results] == [("bell", 2), ("saddle", 1), ("lamp", 3)]


def drawn_boxes(*args):
    return np.asarray(box_pictures.draw_boxes(*args))


def test_boxes_are_drawn_where_they_are():
    """Two boxes in pixels of a picture on disk of 160 x 80, drawn on its cached half."""
    boxes = np.array([[20.0, 20, 60, 70], [90, 30, 150, 75]])
    drawn = drawn_boxes(
        np.zeros((40, 80, 3), np.uint8), (160, 80), boxes, np.array([0, 0]), np.array([0, 1]), ["a"])
    assert drawn.shape == (320, 640, 3)
    for box, colour in zip(4 * boxes.astype(int), box_pictures.STATE_COLOURS):
        left, top, right, bottom = box
        is_frame = (drawn == ImageColor.getrgb(colour)).all(2)
        assert is_frame[bottom, left:right].all() and is_frame[top:bottom, right].all()
        assert not is_frame[bottom - 4, left + 4:right - 4].any()
    line = drawn_boxes(
        np.zeros((1, 4000, 3), np.uint8), (4000, 1), np.array([[0.0, 0, 900, 1]]), np.array([0]), np.array([0]), ["a"])
    assert line.shape == (1, 640, 3), "less than half a pixel high"
    named = [drawn_boxes(np.zeros((40, 80, 3), np.uint8), (160, 80), boxes[:1], np.array([0]), np.array([0]),
                                     [name]) for name in ("\xfc", "\xe9", "\u0436")]
    assert not any((one == other).all() for one, other in zip(named, named[1:])), "each letter is drawn as itself"


def test_the_text_of_a_box_at_an_edge_is_whole():
    """At the right edge the state and the score were cut off, at the lower edge all of it; a later frame crosses none."""
    def draw(*boxes):
        n = len(boxes)
        return drawn_boxes(np.zeros((480, 640, 3), np.uint8), (640, 480), np.array(boxes, float), np.zeros(n, int),
                                       np.ones(n, int), ["rear wheel"], [0.92] * n)
    whole = (draw([100, 100, 300, 300]) == 255).all(2).sum()
    assert whole > 20
    for box in ([600, 100, 639, 300], [100, 470, 300, 479], [630, 474, 639, 479]):
        assert (draw(box) == 255).all(2).sum() == whole
    assert (draw([100, 100, 300, 300], [120, 50, 140, 400]) == 255).all(2).sum() == 2 * whole
    below_one_another = draw([100, 100, 300, 300], [100, 106, 300, 300])
    assert (below_one_another == 255).all(2).sum() < 2 * whole, "texts, not frames, still lie on one another"


def test_a_box_says_its_part_its_state_and_its_score_on_its_own_colour(monkeypatch):
    """A part without a known state says none, an annotated box no score; its frame is two pixels wide."""
    said = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, *more: said.append((list(place), text)))
    boxes = np.array([[100.0, 100, 300, 300], [20, 30, 60, 50]])
    drawn = drawn_boxes(np.zeros((480, 640, 3), np.uint8), (640, 480), boxes, np.array([1, 0]),
                        np.array([part_boxes.STATES.index("damaged"), UNKNOWN]), ["bell", "saddle"], [0.94, 0.5])
    assert said == [([100, 100], " saddle damaged 0.94"), ([20, 30], " bell 0.50")]
    orange, grey = (np.array(ImageColor.getrgb(box_pictures.STATE_COLOURS[state])) for state in (1, UNKNOWN))
    assert (drawn[100:112, 100:200] == orange).all() and (drawn[30:42, 20:50] == grey).all(), "under the text"
    assert (drawn[299:301, 100:301] == orange).all() and not drawn[298, 110:290].any() and not drawn[301].any()
    said.clear()
    drawn_boxes(np.zeros((480, 640, 3), np.uint8), (640, 480), np.array([[-30.0, -9, 60, 50]]), np.array([0]),
                np.array([part_boxes.STATES.index("absent")]), ["bell"])
    assert said == [([0, 0], " bell absent")]


def test_a_sheet_shows_in_each_line_the_annotated_boxes_left_and_the_detected_ones_right(monkeypatch):
    """Upright pictures, the second one first; neither an ignored box nor a detection under the threshold is drawn."""
    sheets = []
    monkeypatch.setattr(plotting, "write_picture", lambda path, picture: sheets.append(np.asarray(picture)))
    low, small = [10, 40, 30, 60], [5, 5, 9, 9]
    truth = annotated(*[[(0, 0, BOX), (1, 0, small, True)]] * 2, size=(40, 80))
    found = [detections((1, 0.5, 1, low), (0, 0.49, 1, small))] * 2
    greys = [np.full((80, 40, 3), grey, np.uint8) for grey in (50, 100)]
    box_pictures.write_sheet("sheet.jpg", truth, found, lambda row: greys[row], [1, 0], 0.5)
    [sheet] = sheets
    assert sheet.shape == (2 * 652, 1292, 3)
    for grey, line in zip(greys[::-1], np.split(sheet, 2)):
        [left, right] = [drawn_boxes(grey, (40, 80), np.array([box], float), np.array([label]),
                                                 np.array([state]), truth.parts, scores)
                         for box, label, state, scores in ((BOX, 0, 0, None), (low, 1, 1, [0.5]))]
        np.testing.assert_array_equal(line[:640, :320], left)
        np.testing.assert_array_equal(line[:640, 332:652], right)
        assert (line[:640, 320:332] == 255).all() and (line[:, 652:] == 255).all() and (line[640:] == 255).all()


def test_the_sheets_of_errors_name_their_pictures(tmp_path):
    """The second picture's box is missed: it is the worst, and its annotation may be wrong."""
    found = [detections((0, 0.9, 0, BOX)), detections(), detections((0, 0.9, 0, BOX))]
    judged = judge(annotated(*[[(0, 0, BOX)]] * 3), found)
    run = SimpleNamespace(path=tmp_path.joinpath)
    _, worst, best = detection_judging.case_blocks(
        run, judged, found, lambda row: np.zeros((9, 9, 3), np.uint8), 0.5)
    assert "with most errors, from the top: 1.jpg, 2.jpg, 0.jpg<" in worst
    assert "with fewest errors, from the top: 0.jpg, 2.jpg<" in best


def test_without_states_each_part_has_a_colour():
    unknown, parts = np.full(18, UNKNOWN), np.arange(18)
    colours = box_pictures.colours_of(parts, unknown, 18)
    assert len(set(colours)) == 18 and all(max(ImageColor.getrgb(colour)) == 179 for colour in colours)
    unknown[0] = ABSENT
    assert box_pictures.colours_of(parts, unknown, 18) == [box_pictures.STATE_COLOURS[state] for state in unknown]
    drawn = drawn_boxes(np.zeros((40, 80, 3), np.uint8), (80, 40), np.array([[10.0, 10, 30, 30]]),
                                    np.array([1]), np.array([UNKNOWN]), ["a", "b"])
    [second] = box_pictures.colours_of([1], np.array([UNKNOWN]), 2)
    assert (drawn == ImageColor.getrgb(second)).all(2).any()


def test_alarms_name_their_remedy():
    judged = judge(annotated([(0, 0, BOX)]), [detections((0, 0.3, 0, BOX))])
    alarms = detection_judging.find_alarms(judged, [detections((0, 0.3, 0, BOX))], 0.5)
    for said, remedy in (("highest is 0.30", "--score_threshold"), ("saddle", "--test_ratio"), ("are intact", "annotate")):
        own, = [alarm for alarm in alarms if said in alarm and remedy in alarm]
        assert said == "are intact" or "train_detector.py" in own, "judge_predictions.py has no such flag"


def test_a_detector_that_answers_alike_everywhere_is_an_alarm():
    truth = annotated(*[[(0, 0, BOX), (1, 0, OTHER)]] * 4)
    same, shifted, more = (detections((0, 0.9, 0, BOX), (1, 0.9, 0, place)) for place in (OTHER, [51, 10, 90, 40], FAR))

    def repeats(*found):
        return [alarm for alarm in detection_judging.find_alarms(judge(truth, found), found, 0.5) if "same boxes" in alarm]
    [alarm] = repeats(same, shifted, same, same)
    assert alarm.startswith("exactly the same boxes in 3 of 4 pictures. ")
    assert repeats(same, shifted, same, more) == repeats(*[detections()] * 4) == []
    alarms = detection_judging.find_alarms(judge(truth, [same, shifted, more, same]), [same, *[detections()] * 3], 0.5)
    assert [alarm[:43] for alarm in alarms] == ["95 % or more of the found parts are intact:"], "one picture has a sure one"


@pytest.mark.parametrize("confusion, words", [
    ([[5, 0, 0, 0], [3, 0, 0, 0]], ["one state only is ever predicted: intact. "]), ([[5, 0, 0, 0], [0, 3, 0, 0]], []),
    ([[0, 0, 0, 0], [1, 18, 0, 0]], ["95 % or more of the found parts are damaged: "]), ([[0, 0, 0, 0]] * 2, []),
    ([[18, 0, 0, 0], [0, 1, 0, 0]], []), ([[5, 0, 0, 0], [0] * 4], ["95 % or more of the found parts are intact: "]),
    ([[19, 0, 0, 0], [0, 1, 0, 0]], ["95 % or more of the found parts are intact: "])])
def test_alarms_on_states_by_their_confusion(confusion, words):
    alarms = detection_judging.state_alarms(np.array(confusion + [[0] * 4] * 2))
    assert [alarm[:len(word)] for alarm, word in zip(alarms, words, strict=True)] == words


def test_a_validation_loss_above_twice_the_train_loss_is_an_alarm():
    assert train_detector.overfitting_alarms({"train_loss": 0.5, "val_loss": 1.0}) == []
    [alarm] = train_detector.overfitting_alarms({"train_loss": 0.5, "val_loss": 1.01})
    assert "1.010 far above train loss 0.500" in alarm and "--trainable_layers" in alarm


def test_a_plain_detector_is_not_said_to_be_judged_on_states():
    truth = annotated([(0, 0, BOX)])
    found = [detections((0, 0.9, 0, BOX))]
    said = [" ".join(detection_judging.general_limits(judge(truth, found, states=states))) for states in (True, False)]
    assert "States are judged" in said[0] and "States are judged" not in said[1]


def test_annotations_without_a_box_judge_nothing():
    with pytest.raises(common.UserError, match="t.json: no box"):
        detection_judging.refuse_without_boxes(annotated([(0, 0, BOX, True)], []), "t.json")
    detection_judging.refuse_without_boxes(annotated([(0, 0, BOX)], []), "t.json")


def test_a_baseline_that_fails_keeps_its_folder(tmp_path, monkeypatch):
    """As after a loss that is not finite: the message says that the last checkpoint is healthy."""
    args = train_detector.parse_args(
        ["--mode", "audit", "--json", "x", "--images_dir", "y", "--output_dir", str(tmp_path)])

    def fail(run, args, study, split):
        run.path("last.pth").write_text("healthy")
        raise common.UserError("the loss is nan")
    monkeypatch.setattr(train_detector, "fit", fail)
    with pytest.raises(common.UserError), common.start_run(args) as run:
        run.write_args()
        train_detector.train_heads(run, args, SimpleNamespace(data_record=lambda split: {"pictures": 3}), {})
    record = json.loads((only_run(tmp_path) / "baseline" / "args.json").read_text())
    folder = only_run(tmp_path)
    assert record["flags"]["trainable_layers"] == 0 and (folder / "baseline" / "last.pth").exists()
    for schedule, is_kept in (("plateau", True), ("cosine", False)):
        resumed = train_detector.parse_args(["--mode", "audit", "--json", "x", "--images_dir", "y", "--resume", str(folder),
                                             "--scheduler", schedule])
        with common.Run(folder, resumed, common.choose_compute("cpu", "off"), None):
            (folder / "metrics.json").write_text("{}")
        assert (folder / "baseline" / "last.pth").exists() == is_kept, "a finished run drops what it needs no more"


# --- end to end ---------------------------------------------------------------------------

def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def bicycles(made_data):
    return made_data("detector", 36)


def train_flags(bicycles, output_dir, *more):
    return ["--train_json", bicycles / "annotations.json", "--train_images", bicycles / "images", "--split_ratio", 0.5,
            "--test_ratio", 0.25, "--group_column", "street", "--output_dir", output_dir, *SMALL, *more]


@pytest.fixture(scope="module")
def trained(bicycles, tmp_path_factory):
    """A run from random weights."""
    folder = tmp_path_factory.mktemp("trained")
    run_fresh("train_detector.py", *train_flags(bicycles, folder, "--criteria", "map>0.9,ap_saddle<2"))
    return only_run(folder)


CONTRACT = """args.json log.txt train_coco.json val_coco.json test_coco.json state_reliability.png splits.json
leakage_report.json skipped.csv training_history.csv training_history.png
best_model.pth metrics.json detections_test.csv detections_test.json per_part.csv per_part.png per_state.csv
failures.jpg best_pictures.jpg report.html""".split()
PARTS_OF_LOSS = ["loss", "loss_classifier", "loss_box_reg", "loss_state", "loss_objectness", "loss_rpn_box_reg"]


def test_a_start_from_random_weights_leaves_the_whole_run_folder(trained):
    assert [name for name in CONTRACT if not (trained / name).stat().st_size] == []
    assert len(list((trained / "pictures").glob("*.jpg"))) == 2
    content = common.load_model_file(trained / "best_model.pth", "train_detector.py")
    assert content["epoch"] == 1 and len(content["settings"]["parts"]) == 8
    rows = read_csv(trained / "training_history.csv")
    columns = {f"{split}_{name}" for split in ("train", "val") for name in PARTS_OF_LOSS}
    assert set(rows[0]) == columns | {"epoch", "learning_rate", "val_map", "val_map50", "val_joint_map",
                                      "val_state_accuracy"}
    assert all(math.isfinite(float(row[name])) for row in rows for name in columns)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["part"] == "test" and len(metrics["per_part"]) == 8
    assert {bar["name"]: bar["verdict"] for bar in metrics["criteria"]}["map"] != "PASS"
    assert content["temperature"] > 0 and [row["states of"] for row in metrics["state_calibration"]][0] == "model"
    assert any("--baseline" in doubt for doubt in metrics["doubts"]) and list(metrics["baselines"]) == ["mean box"]
    assert "similar_pictures" in json.loads((trained / "leakage_report.json").read_text())["between"]["train-test"]
    page = re.sub("base64,[^\"]+", "", (trained / "report.html").read_text())
    assert "mean precision over recalls" in page and "A clip" not in page and not re.search(r"\bR2\b|\bAUC\b", page)
    skipped = read_csv(trained / "skipped.csv")
    assert skipped == [{"image": "11.jpg", "annotation": "chain (chain)", "reason": skipped[0]["reason"]}]


def test_groups_stand_on_one_side(bicycles, trained):
    truth = json.loads((bicycles / "annotations.json").read_text(), strict=False)
    splits = json.loads((trained / "splits.json").read_text())
    streets = {part: {truth[name]["street"] for name in splits[part]} for part in ("train", "val", "test")}
    assert sum(map(len, streets.values())) == len(set.union(*streets.values())) and min(map(len, streets.values())) >= 1


def test_folds_judge_every_picture_by_a_detector_that_has_not_seen_it(bicycles, tmp_path):
    """The pooled numbers are those of the folds' own files put together, also when the run is continued."""
    truth = json.loads((bicycles / "annotations.json").read_text(), strict=False)
    truth = dict(list(truth.items())[:15])  # a fold takes a third of a second for each picture
    common.write_json(tmp_path / "few.json", truth)
    flags = train_flags(bicycles, tmp_path, "--folds", 3, "--train_json", tmp_path / "few.json")
    del flags[4:8]  # the shares of one split
    run_script("train_detector.py", *flags)
    run = only_run(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    parts = [json.loads((run / f"fold_{k}" / "splits.json").read_text()) for k in range(3)]
    for split in parts:
        streets = [{truth[name]["street"] for name in split[part]} for part in ("train", "val", "test")]
        assert sum(map(len, streets)) == len(set.union(*streets)) and min(map(len, streets)) >= 1
        assert set(split["train"]) | set(split["val"]) | set(split["test"]) == set(truth)
    assert sorted(name for split in parts for name in split["test"]) == sorted(truth)
    assert metrics["part"] == "folds" and metrics["pictures"] == len(truth) and metrics["held_out"] is True
    each = [json.loads((run / f"fold_{k}" / "detections_test.json").read_text()) for k in range(3)]
    assert json.loads((run / "detections_folds.json").read_text()) == [row for rows in each for row in rows]
    judged, found, *_ = detection_judging.read_coco_results(run / "folds_coco.json", run / "detections_folds.json")
    assert metrics["model"]["map"]["value"] == pytest.approx(values_of(judged, found)["map"], abs=1e-6)
    assert "widened x1.58 for 3 folds" in metrics["method"]
    table = {row["fold"]: row for row in read_csv(run / "fold_table.csv")}
    own = [json.loads((run / f"fold_{k}" / "metrics.json").read_text()) for k in range(3)]
    assert [float(table[str(k)]["ap"]) for k in range(3)] == pytest.approx(
        [fold["model"]["map"]["value"] for fold in own], abs=1e-6)
    assert [int(table[str(k)]["rows"]) for k in range(3)] == [len(split["test"]) for split in parts]
    assert [float(table[str(k)]["baseline_ap"]) for k in range(3)] == pytest.approx(
        [fold["baseline"]["map"]["value"] for fold in own], abs=1e-6)
    priors = [common.load_model_file(run / f"fold_{k}" / "best_model.pth", "train_detector.py")["baseline"]
              for k, split in enumerate(parts) for _ in split["test"]]
    mean_boxes = detection_judging.baseline_detections(priors, judged.sizes)
    assert metrics["baseline"]["map"]["value"] == pytest.approx(map_of(judged, mean_boxes), abs=1e-6)
    assert "Started from random weights" in (run / "report.html").read_text()
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "fold_2")  # as if it had been killed there
    text = run_script("train_detector.py", "--resume", run).text
    assert "fold 0 is finished" in text
    assert json.loads((run / "metrics.json").read_text())["model"] == metrics["model"]
    refused = run_script("train_detector.py", "--mode", "predict", "--checkpoint", run, "--images_dir",
                         bicycles / "images", code=2)
    assert f"of a run with folds name one, as {run}/fold_0" in refused.text


def refused_folds(bicycles, folder, change, *flags):
    """The one line that refuses folds of changed annotations, before a fold is begun."""
    truth = json.loads((bicycles / "annotations.json").read_text(), strict=False)
    change(truth)
    common.write_json(folder / "own.json", truth)
    text = run_script("train_detector.py", "--train_json", folder / "own.json", "--train_images", bicycles / "images",
                      "--folds", 3, "--output_dir", folder / "out", *SMALL, *flags, code=2).stderr
    assert text.count("\n") == 1 and not list((folder / "out").glob("run_*/fold_0")), "refused before anything is trained"
    return text


def test_folds_that_cannot_be_trained_are_refused_before_the_first_one(bicycles, tmp_path):
    def states_at_one_street(truth):
        streets = sorted({entry["street"] for entry in truth.values()})
        forget_states({name: entry for name, entry in truth.items() if entry["street"] != streets[0]})
    text = refused_folds(bicycles, tmp_path, states_at_one_street, "--group_column", "street")
    assert "has a state, so its detector would name none" in text


@pytest.mark.parametrize("more", [[], ["--folds", 3]])
def test_weights_that_are_not_there_are_missed_before_pictures_are_decoded(bicycles, tmp_path, monkeypatch, more):
    monkeypatch.setattr(train_detector, "load_study", lambda *_: pytest.fail("the pictures were decoded first"))
    text = run_here("train_detector.py", "--train_json", bicycles / "annotations.json", "--train_images",
                    bicycles / "images", "--output_dir", tmp_path, *SMALL, "--weights", "none.pth", *more, code=2).stderr
    assert text.startswith("error: --weights none.pth: no such file") and not list(tmp_path.glob("run_*"))


def forget_states(truth):
    for entry in truth.values():
        for part in entry["parts"].values():
            for name in [name for name in part if "state" in name]:
                del part[name]


@pytest.mark.parametrize("way", ["val_json", "folds"])
def test_choosing_by_states_that_the_val_part_lacks_is_refused_before_training(bicycles, tmp_path, way):
    truth = json.loads((bicycles / "annotations.json").read_text(), strict=False)
    with_states = dict(list(truth.items())[:12])
    without = dict(list(truth.items())[12:24])
    forget_states(without)
    flags = ["--train_json", tmp_path / "a.json", "--train_images", bicycles / "images", "--output_dir", tmp_path / "out",
             *SMALL, "--select", "joint_map"]
    if way == "folds":  # three pictures with states train in every fold, but do not choose in every one
        common.write_json(tmp_path / "a.json", without | dict(list(with_states.items())[:3]))
        flags += ["--folds", 3]
    else:
        common.write_json(tmp_path / "a.json", with_states)
        common.write_json(tmp_path / "v.json", without)
        flags += ["--val_json", tmp_path / "v.json", "--val_images", bicycles / "images"]
    text = run_script("train_detector.py", *flags, code=2).stderr
    assert "--select joint_map: no box of the val part has a state; use --select map" in text
    assert not list((tmp_path / "out").glob("run_*")), "before anything is written"


def test_criteria_on_states_need_states_that_train():
    args = SimpleNamespace(dry_run=False, select="map", criteria="joint_map>0.5")
    split = {"train": np.array([0]), "val": np.array([1])}
    train_detector.check_states(args, annotated([(0, 0, BOX)], [(0, 1, BOX)]), split)
    with pytest.raises(common.UserError, match="joint_map"):
        train_detector.check_states(args, annotated([(0, UNKNOWN, BOX)], [(0, 1, BOX)]), split)


def test_folds_need_three_groups(bicycles, tmp_path):
    def two_sites(truth):
        for k, entry in enumerate(truth.values()):
            entry["site"] = "ab"[k % 2]
    text = refused_folds(bicycles, tmp_path, two_sites, "--group_column", "site", "--folds", 2)
    assert "--folds 2: each fold must leave two groups or more" in text and "found 2 groups" in text


@pytest.mark.parametrize("n_groups, folds, is_refused", [(3, 3, False), (3, 2, True), (4, 2, False)])
def test_each_fold_leaves_two_groups(n_groups, folds, is_refused):
    """Two folds of three groups leave one of them and two; one group cannot both train and choose the epoch."""
    groups = np.array([f"g{k % n_groups}" for k in range(24)])
    truth = annotated(*[[(0, 0, BOX)]] * 24, groups=groups)
    study = SimpleNamespace(truth=truth, strata=np.zeros(24, int))
    args = SimpleNamespace(folds=folds, val_ratio=0.25, seed=0)
    if is_refused:
        with pytest.raises(common.UserError, match="must leave two groups or more.*found 3 groups"):
            train_detector.make_folds(args, study)
        return
    for split in train_detector.make_folds(args, study):
        owners = [set(groups[split[part]]) for part in ("train", "val", "test")]
        assert all(owners) and sum(map(len, owners)) == len(set.union(*owners)) == n_groups


def test_of_what_a_fold_does_not_leave_out_the_share_of_val_ratio_chooses_the_epoch():
    """Of 24 pictures in three folds 8 are left out; of the 16 others a quarter."""
    study = SimpleNamespace(truth=annotated(*[[(0, 0, BOX)]] * 24), strata=np.zeros(24, int))
    for split in train_detector.make_folds(SimpleNamespace(folds=3, val_ratio=0.25, seed=0), study):
        assert {part: len(rows) for part, rows in split.items()} == {"train": 12, "val": 4, "test": 8}
        assert sorted(np.concatenate(list(split.values()))) == list(range(24))


def test_the_mean_box_of_a_picture_is_that_of_its_fold():
    """Two pictures, each with the prior of the other's box: by hand, no box overlaps; with its own, all do."""
    truth = annotated([(0, 0, BOX)], [(0, 1, FAR)])
    priors = [detection_judging.mean_boxes(truth.take([row])) for row in (0, 1)]
    assert map_of(truth, detection_judging.baseline_detections(priors, truth.sizes)) == 1
    swapped = detection_judging.baseline_detections(priors[::-1], truth.sizes)
    assert map_of(truth, swapped) == 0
    rates = np.array([prior["states"] for prior in priors])
    found = [detections((0, 0.9, 0, BOX)), detections((0, 0.9, 0, FAR))]
    for own, accuracy in ((rates, 1), (rates[::-1], 0)):
        judged = detection_scores.Judged(truth, found, 0.5, swapped, own)
        assert judged.baseline_values(judged.every)[0]["state_accuracy"] == accuracy


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
             bicycles / "images", "--num_workers", 0]
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
    assert {each["seen"] for each in results} <= {"new"} and ours["held_out"] is True and ours["part"] == "test"


@pytest.mark.parametrize("part, word", [("train", "train"), ("val", "chose")])
def test_evaluation_on_pictures_of_the_run_is_not_held_out(bicycles, trained, tmp_path, part, word):
    """Those that were trained on raise an alarm, those that chose the epoch are called optimistic; so in the files."""
    splits, truth = (json.loads(path.read_text(), strict=False)
                     for path in (trained / "splits.json", bicycles / "annotations.json"))
    names = splits[part][:3]
    (tmp_path / "part.json").write_text(json.dumps({name: truth[name] for name in names}))
    run_script("train_detector.py", "--mode", "evaluate", "--checkpoint", trained, "--json", tmp_path / "part.json",
               "--images_dir", bicycles / "images", "--num_workers", 0, "--output_dir",
               tmp_path / "out")
    folder = only_run(tmp_path / "out")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["part"] == part and metrics["held_out"] is False
    assert any("3 of 3 rows trained the model" in alarm for alarm in metrics["alarms"]) == (part == "train")
    assert ("selected on these rows" in metrics["verdict"]) == (part == "val")
    rows = read_csv(folder / f"detections_{part}.csv")
    assert {row["seen"] for row in rows} <= {word}
    run_script("train_detector.py", "--mode", "convert", "--json", tmp_path / "part.json", "--output",
               tmp_path / "coco.json")
    seen = detection_judging.read_coco_results(tmp_path / "coco.json", folder / f"detections_{part}.json")[2]
    named = {row["image"] for row in rows if row["part"]}
    assert len(seen) == 3 and (seen == word).sum() == len(named) and set(seen) <= {word, "not known"}


def test_the_written_detections_give_the_same_numbers_again(bicycles, trained, tmp_path):
    """The files alone, read as those of any program, against the run's own metrics.json."""
    run_script("train_detector.py", "--mode", "convert", "--json", bicycles / "annotations.json", "--output",
               tmp_path / "truth.json")
    content = json.loads((tmp_path / "truth.json").read_text())
    names = json.loads((trained / "splits.json").read_text())["test"]
    content["images"] = [image for image in content["images"] if image["file_name"] in names]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    for image in content["images"]:
        image.update(zip(("width", "height"), Image.open(next((bicycles / "images").glob(
            f"{Path(image['file_name']).stem}.*"))).size))
    common.write_json(tmp_path / "truth.json", content)
    (tmp_path / "results.json").write_bytes((trained / "detections_test.json").read_bytes())
    baseline = common.load_model_file(trained / "best_model.pth", "train_detector.py")["baseline"]
    ours, theirs = judge_files(tmp_path, baseline), json.loads((trained / "metrics.json").read_text())
    for side in ("model", "baseline"):
        for name in theirs[side]:
            value = theirs[side][name]["value"]
            assert ours[side][name]["value"] == pytest.approx(math.nan if value is None else value, nan_ok=True), name
    aps = {row["target"]: row["ap"] for row in ours["per_part"]}
    for row in theirs["per_part"]:
        assert aps[row["target"]] == pytest.approx(math.nan if row["ap"] is None else row["ap"], nan_ok=True)


def test_prediction_lists_every_picture(bicycles, trained, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for k in range(3):
        (images / f"{k}.jpg").write_bytes((bicycles / "images" / f"{k}.jpg").read_bytes())
    (images / "broken.jpg").write_bytes(b"no picture")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)  # not resized
    Image.fromarray(noise).save(images / "noise.png")
    flags = ["--mode", "predict", "--checkpoint", trained, "--images_dir", images, "--output", tmp_path / "d.csv",
             "--num_workers", 0, "--one_per_part", "--visualize", 4, "--score_threshold", 0.06]
    monkeypatch.setattr(sys, "argv", ["train_detector.py", *map(str, flags)])
    train_detector.main()
    text = capsys.readouterr().out
    assert "5 pictures, 1 could not be read" in text and "1 of 5 pictures: unlike the training pictures" in text
    rows = read_csv(tmp_path / "d.csv")
    assert {row["warning"] for row in rows if row["image"] == "noise.png"} == {"unlike the training pictures"}
    assert all((row["warning"] == "trained on") == (row["seen"] == "train") for row in rows if row["image"] != "noise.png")
    assert [row["image"] for row in rows if row["error"]] == ["broken.jpg"]
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        own = [row for row in rows if row["image"] == name]
        assert sorted(row["part"] for row in own) == sorted(train_detector.load_detector(
            trained / "best_model.pth", common.choose_compute("cpu", "off"), None)[1]["settings"]["parts"])
        assert all(row["state"] == "absent" for row in own if not row["score"])
    drawn = sorted(path.name for path in (tmp_path / "d_pictures").glob("*.jpg"))
    assert drawn == ["000_0.jpg", "001_1.jpg", "002_2.jpg", "004_noise.jpg"], "the broken one cannot be drawn"
    # the name of the CSV was given: the JSON stands beside it
    n_found = len(json.loads((tmp_path / "d.json").read_text()))
    assert n_found > 1 and f"{n_found} detections, {n_found} of them from score 0.06" in text


def test_a_folder_without_pictures_has_nothing_to_predict(tmp_path):
    with pytest.raises(common.UserError, match="--images_dir .*: expected pictures, found none"):
        train_detector.pictures_to_predict(tmp_path, {})


def test_an_audit_counts_the_boxes_of_its_file(bicycles, tmp_path):
    text = run_here("train_detector.py", "--mode", "audit", "--json", bicycles / "train_coco.json", "--images_dir",
                    bicycles / "images", "--min_size", 32, "--max_size", 40, "--output", tmp_path / "audit.json").stdout
    found = json.loads((tmp_path / "audit.json").read_text())
    judge = COCO(str(bicycles / "train_coco.json"))
    boxes = {each["name"]: len(judge.getAnnIds(catIds=[each["id"]])) for each in judge.loadCats(judge.getCatIds())}
    skipped = [each["annotation"] for each in found["skipped"] if "annotation" in each]
    for row in found["parts"]:
        lost = sum(f"({row['part']})" in name for name in skipped)
        assert row["boxes"] + lost == boxes[row["part"]] and row["part"] in text
    names = [image["file_name"] for image in judge.imgs.values()]
    pixels = {np.asarray(Image.open(bicycles / "images" / name)).tobytes() for name in names}
    assert found["pictures"] == len(names) and found["copies"]["exact_duplicates"]["count"] == len(names) - len(pixels)


def test_plain_detection_without_any_state(bicycles, tmp_path):
    content = json.loads((bicycles / "val_coco.json").read_text())
    for annotation in content["annotations"]:
        for name in ("state", "state_id", "attributes"):
            annotation.pop(name, None)
    (tmp_path / "plain.json").write_text(json.dumps(content))
    run_script("train_detector.py", "--train_json", tmp_path / "plain.json", "--train_images", bicycles / "images",
               "--output_dir", tmp_path / "out", *SMALL, "--dry_run", "--batch_size", 2, "--select", "map")
    folder = only_run(tmp_path / "out")
    columns = set(read_csv(folder / "training_history.csv")[0])
    assert "train_loss_state" not in columns and "val_state_accuracy" not in columns and "val_map" in columns
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["per_state"] == [] and not read_csv(folder / "detections_val.csv")[0]["state"]
    assert not (folder / "per_state.csv").exists()


def test_a_start_from_another_run_keeps_its_parts_whatever_the_order_of_the_file(bicycles, trained, tmp_path):
    """Fewer parts, the last of them first; one that the detector does not know is refused."""
    content = json.loads((bicycles / "val_coco.json").read_text())
    left_out = content["categories"].pop(0)["id"]
    content["categories"].reverse()
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] != left_out]
    flags = ["--train_json", tmp_path / "other.json", "--train_images", bicycles / "images", "--output_dir", tmp_path / "out",
             *SMALL, "--dry_run", "--batch_size", 2, "--init_from", trained]
    (tmp_path / "other.json").write_text(json.dumps(content))
    run_script("train_detector.py", *flags)
    before, after = (common.read_checkpoint(folder / "best_model.pth") for folder in (trained, only_run(tmp_path / "out")))
    assert after["settings"]["parts"] == before["settings"]["parts"]
    content["categories"][0]["name"] = "basket"
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert "does not know these parts: basket" in run_script("train_detector.py", *flags, code=2).stderr


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
        if "bicycle" in path.name:
            published = args.augment, args.state_class_weights, args.patience, args.clip_grad
            assert published == ("none", "none", 0, 0)


def test_a_trained_baseline(bicycles, tmp_path):
    """--baseline heads: the same steps on the frozen backbone; evaluation and the written files compare with it too."""
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    truth = json.loads((bicycles / "annotations.json").read_text(), strict=False)
    common.write_json(tmp_path / "half.json", dict(list(truth.items())[:18]))
    flags = train_flags(bicycles, tmp_path / "out", "--weights", tmp_path / "weights.pth", "--dry_run", "--batch_size", 2,
                        "--train_json", tmp_path / "half.json", "--keep_last")
    flags.remove("--no_pretrained")
    run_script("train_detector.py", *flags, "--baseline", "heads")
    folder = only_run(tmp_path / "out")
    start = torch.load(tmp_path / "weights.pth", weights_only=True)["layer4.0.conv1.weight"]
    moved = [(common.load_model_file(path, "train_detector.py")["model"]["backbone.body.layer4.0.conv1.weight"]
              != start).any().item() for path in (folder / "best_model.pth", folder / "baseline" / "best_model.pth")]
    assert moved == [True, False]
    steps = [len(read_csv(path / "training_history.csv")) for path in (folder, folder / "baseline")]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert steps[0] == steps[1] and set(metrics["baselines"]) == {"mean box", "heads"}
    strongest = max(metrics["baselines"], key=metrics["baselines"].get)
    assert metrics["headline"]["baseline"]["name"] == strongest
    assert not any("no input" in doubt for doubt in metrics["doubts"])
    (folder / "metrics.json").unlink()  # as if it had been killed while it judged
    run_script("train_detector.py", *flags, "--baseline", "heads", "--resume", folder)
    resumed = json.loads((folder / "metrics.json").read_text())
    assert resumed["baselines"] == metrics["baselines"] and resumed["model"] == metrics["model"]
    run_script("train_detector.py", "--mode", "evaluate", "--checkpoint", folder, "--baseline", "heads", "--json",
               folder / "test_coco.json", "--images_dir", bicycles / "images", "--num_workers", 0, "--output_dir",
               tmp_path / "evaluated")
    run_script("judge_predictions.py", "--predictions", folder / "detections_test.json", "--truth",
               folder / "test_coco.json", "--baseline", folder / "detections_test.json", "--output_dir",
               tmp_path / "judged")
    again, judged = (json.loads((only_run(tmp_path / name) / "metrics.json").read_text())
                     for name in ("evaluated", "judged"))
    assert again["baselines"] == pytest.approx(metrics["baselines"], abs=1e-6)
    assert judged["model"]["map"]["value"] == pytest.approx(metrics["model"]["map"]["value"], abs=1e-6)
    assert judged["baselines"]["detections_test"] == pytest.approx(judged["model"]["map"]["value"])


def test_metrics_are_of_the_boxes_that_one_per_part_keeps(trained, bicycles, tmp_path):
    run_script("train_detector.py", "--mode", "evaluate", "--checkpoint", trained, "--json", trained / "test_coco.json",
               "--images_dir", bicycles / "images", "--num_workers", 0, "--score_threshold",
               0.06, "--one_per_part", "--output_dir", tmp_path)
    one = only_run(tmp_path)
    truth, found, *_ = detection_judging.read_coco_results(
        trained / "test_coco.json", trained / "detections_test.json", "street")
    kept = [detection_tables.best_of_each_part(each, 0.06) for each in found]
    metrics = json.loads((one / "metrics.json").read_text())
    assert metrics["model"]["map"]["value"] == pytest.approx(values_of(truth, kept)["map"], abs=1e-6)
    assert sum(len(each.scores) for each in kept) == len(json.loads((one / "detections_test.json").read_text()))
