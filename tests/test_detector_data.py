"""What train_detector.py reads: part annotations and COCO as found in the wild, boxes, splits, samples and flags.

    python -m pytest tests/test_detector_data.py
"""
import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import ImageColor
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import make_sample_data
import train_detector
import unicodedata
from evidence import detection_judging, detection_scores, detection_tables
from readers.part_boxes import ABSENT, STATES, UNKNOWN
from readers import part_boxes

pytestmark = pytest.mark.fault("tables, COCO, JSON: quirks and mistakes")


def write_pictures(folder, names, size=(60, 40)):
    """Grey pictures of `size` (width, height) with one bright pixel each, so that no two are copies."""
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        pixels = np.full((size[1], size[0], 3), 90, np.uint8)
        pixels[10:20, 2 * k:2 * k + 6] = 255 - 20 * k
        cv2.imwrite(str(folder / name), pixels)
    return folder


def part(box, **fields):
    return {"absolute_bounding_box": dict(zip(("left", "top", "width", "height"), box)), **fields}


PARTS = {
    "0.jpg": {"image": {"height": 40, "width": 60}, "parts": {
        "back_wheel": part([0, 10, 20, 20], object_state="intact", trust=0.9),
        "front_wheel": part([30, 10, 20, 20], object_state="Damaged"),
        "bell": part([5, 5, 6, 6], object_state="absent", object_state_class=2, trust=0.2)}},
    "1": {"image": {"height": 40, "width": 60}, "parts": {
        "saddle": part([10, 5, 10, 5], object_state_class=3), "bell": part([0, 0, 0, 0], object_state="absent"),
        "front_wheel": part([50, 30, 30, 30], object_state="in\x01tact")}},
    "2.jpg": {"image": {"height": 40, "width": 60}, "parts": {}}}


def coco(**changes):
    """Ids from 0 with gaps, no area, boolean iscrowd, the state under each of its three names and missing."""
    return {
        "images": [{"id": 0, "file_name": "0.jpg", "width": 60, "height": 40}, {"id": 9, "file_name": "1.jpg"}],
        "categories": [{"id": 0, "name": "saddle"}, {"id": 4, "name": "bell"}, {"id": 7, "name": "never_used"}],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 4, "bbox": [1, 2, 10, 10], "state": "damaged", "iscrowd": False},
            {"id": 5, "image_id": 0, "category_id": 0, "bbox": [20, 5, 10, 10], "state_id": 3},
            {"id": 6, "image_id": 9, "category_id": 4, "bbox": [1, 2, 5, 5], "attributes": {"state": "intact"}},
            {"id": 8, "image_id": 9, "category_id": 0, "bbox": [1, 12, 5, 5], "iscrowd": True}], **changes}


@pytest.fixture
def flags(tmp_path):
    """parse_args of a training run on tmp_path/a.json and tmp_path/images."""
    def make(*more):
        return train_detector.parse_args(["--train_json", str(tmp_path / "a.json"), "--train_images",
                                          str(tmp_path / "images"), "--model", "fasterrcnn_resnet18_fpn",
                                          "--min_size", "40", "--max_size", "80", *map(str, more)])
    return make


def study_of(tmp_path, flags, content, *more, names=("0.jpg", "1.jpg", "2.jpg"), parts=None):
    write_pictures(tmp_path / "images", names)
    (tmp_path / "a.json").write_text(json.dumps(content) if not isinstance(content, str) else content)
    files = {"train": (tmp_path / "a.json", tmp_path / "images")}
    return train_detector.load_study(flags(*more), files, lambda text: None, parts)


# --- formats ------------------------------------------------------------------------

def test_part_annotations(tmp_path, flags):
    text = json.dumps(PARTS).replace("\\u0001", "\x01")  # a raw control character, as files in the wild have
    study = study_of(tmp_path, flags, text)
    assert study.truth.parts == ["back_wheel", "front_wheel", "bell", "saddle"]
    assert list(study.truth.images) == ["0.jpg", "1", "2.jpg"]
    np.testing.assert_array_equal(study.truth.boxes[0], [[0, 10, 20, 30], [30, 10, 50, 30], [5, 5, 11, 11]])
    assert study.truth.states[0].tolist() == [0, 1, ABSENT] and study.truth.states[1].tolist() == [3, 0]
    assert study.truth.ignored[0].tolist() == [False, False, True], "trust .2 is under --min_trust"
    bell = study.truth.parts.index("bell")
    assert study.truth.absent[1].tolist() == [bell], "an absent part with a zero box has no box"
    np.testing.assert_array_equal(study.truth.boxes[1][1], [50, 30, 60, 40])
    assert len(study.truth.boxes[2]) == 0 and study.truth.boxes[2].shape == (0, 4)


def test_coco(tmp_path, flags):
    study = study_of(tmp_path, flags, coco(), names=("0.jpg", "1.jpg"))
    assert study.truth.parts == ["saddle", "bell"] and study.truth.ids == [0, 9]
    assert study.truth.states[0].tolist() == [1, 3] and study.truth.states[1].tolist() == [0, UNKNOWN]
    assert study.truth.ignored[1].tolist() == [False, True] and any("never_used" in note for note in study.notes)
    assert study.category_ids["train"] == {"saddle": 0, "bell": 4}


@pytest.mark.parametrize("box", [None, [0, 0, 0, 0], [200, 10, 20, 20]])
def test_an_absent_part_of_a_coco_file_may_lack_its_box(tmp_path, flags, box):
    study = study_of(tmp_path, flags, changed(0, bbox=box, state="absent"), names=("0.jpg", "1.jpg"))
    assert not study.skipped
    assert study.truth.absent[0].tolist() == [study.truth.parts.index("bell")] and len(study.truth.boxes[0]) == 1


def said_before_training(monkeypatch, args, study, train, val):
    """What fit says before it builds the model."""
    said = []
    run = SimpleNamespace(compute=SimpleNamespace(place=None), say=said.append)
    monkeypatch.setattr(train_detector, "build_model", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        train_detector.fit(run, args, study, {"train": np.array(train), "val": np.array(val)})
    return said


def test_parts_that_never_had_a_state_in_training_are_named(tmp_path, flags, monkeypatch):
    study = study_of(tmp_path, flags, coco(), names=("0.jpg", "1.jpg"))
    note = "no train box of {} has a state; the states predicted for them are learnt from other parts alone"
    assert "note: " + note.format("saddle") in said_before_training(monkeypatch, flags(), study, train=[1], val=[0])
    assert "no train box" not in str(said_before_training(monkeypatch, flags(), study, train=[0], val=[1]))


def test_a_list_of_absent_parts_is_read(tmp_path, flags):
    images = [{"id": 0, "file_name": "0.jpg"}, {"id": 9, "file_name": "1.jpg", "absent_parts": ["saddle", " bell"]}]
    study = study_of(tmp_path, flags, coco(images=images), names=("0.jpg", "1.jpg"))
    assert study.truth.absent[0].tolist() == [] and sorted(study.truth.absent[1].tolist()) == [0, 1]


def test_one_list_of_parts_for_all_splits_by_name(tmp_path, flags):
    """Other ids, another order and a missing category in val: labels still mean the same parts."""
    write_pictures(tmp_path / "images", ("0.jpg", "1.jpg"))
    (tmp_path / "a.json").write_text(json.dumps(coco()))
    (tmp_path / "v.json").write_text(json.dumps({
        "images": [{"id": 3, "file_name": "1.jpg"}], "categories": [{"id": 1, "name": "bell"}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 1, "bbox": [0, 0, 9, 9]}]}))
    files = {"train": (tmp_path / "a.json", tmp_path / "images"), "val": (tmp_path / "v.json", tmp_path / "images")}
    study = train_detector.load_study(flags(), files, lambda text: None)
    assert study.truth.images.tolist() == ["train/0.jpg", "train/1.jpg", "val/1.jpg"]
    assert study.truth.labels[2].tolist() == [study.truth.parts.index("bell")] == [1]
    row, = train_detector.split_rows(study.truth, {"val": [2], "test": []})
    assert row["part"] == "val" and row["parts without a box"] == "saddle"


def test_one_folder_for_two_files(tmp_path, flags):
    """Their pictures keep their names; skipped is what is lost, boxes first, and no picture that the other file names."""
    umlaut = "1\u00e4.jpg"  # on disk as macOS writes it
    write_pictures(tmp_path / "images", ["0.jpg", unicodedata.normalize("NFD", umlaut), "2.jpg", "3.jpg"])
    lost = {"parts": {"bell": part([1, 1, 9, 9]), "saddle": part([9, 9, 0, 0])}}
    for file, name in (("a.json", "0.jpg"), ("v.json", umlaut)):
        (tmp_path / file).write_text(json.dumps({name: lost, "2.jpg": lost} if file == "v.json" else {name: lost}))
    files = {part: (tmp_path / file, tmp_path / "images") for part, file in (("train", "a.json"), ("val", "v.json"))}
    study = train_detector.load_study(flags(), files, lambda text: None)
    assert study.truth.images.tolist() == ["0.jpg", umlaut, "2.jpg"]
    assert [each["image"] for each in study.skipped] == ["0.jpg", umlaut, "2.jpg", "3.jpg"]
    assert study.skipped[-1]["reason"] == "no entry in the annotations"


def test_the_written_annotations_are_what_was_judged(tmp_path, flags):
    """Boxes not trusted, boxes of absent parts, parts absent without a box: the files alone give the same numbers."""
    def bicycle(k):
        absent = part([5 + k, 25, 6, 6], object_state="absent", trust=0.9)
        return {"parts": {
            "wheel": part([k, 10, 20, 20], object_state="intact", trust=0.4 + 0.1 * k), "saddle": absent,
            "bell": part([30, k, 9, 9], object_state="damaged"), "chain": part([0, 0, 0, 0], object_state="absent", trust=0.6)}}
    content = {f"{k}.jpg": bicycle(k) for k in range(6)}
    content["5.jpg"]["parts"]["chain"] = part([40, 20, 9, 9], object_state="intact")
    study = study_of(tmp_path, flags, content, names=list(content))
    truth = study.truth
    found = [detection_scores.Detections(boxes.astype(float), labels.copy(), np.linspace(0.9, 0.6, len(labels)),
                                         np.eye(4)[states])
             for boxes, labels, states in zip(truth.boxes, truth.labels, truth.states)]
    found[0].labels[:] = truth.parts.index("chain")  # absent in that picture
    run = SimpleNamespace(path=lambda name: tmp_path / name)
    train_detector.write_annotations(run, flags(), study, {"val": np.arange(6)})
    rows = detection_tables.detection_rows([{"image": name, "seen": "new"} for name in truth.images], found, truth.parts)
    common.write_json(tmp_path / "found.json", detection_tables.coco_results(
        rows, dict(zip(truth.images, truth.ids)), study.category_ids["train"]))
    again, results, *_ = detection_judging.read_coco_results(tmp_path / "val_coco.json", tmp_path / "found.json")
    ours, theirs = (detection_scores.Judged(*each, 0.5).values(np.arange(6))[0]
                    for each in ((truth, found), (again, results)))
    assert theirs == pytest.approx(ours, abs=1e-6, nan_ok=True)


def test_parts_of_a_checkpoint_are_matched_by_name(tmp_path, flags):
    study = study_of(tmp_path, flags, coco(), names=("0.jpg", "1.jpg"), parts=["bell", "chain", "saddle"])
    assert study.truth.labels[0].tolist() == [0, 2]
    with pytest.raises(common.UserError, match="does not know.*bell"):
        study_of(tmp_path, flags, coco(), names=("0.jpg", "1.jpg"), parts=["saddle"])


def test_convert_keeps_everything(tmp_path, flags, monkeypatch):
    first = study_of(tmp_path, flags, {name: {**entry, "street": name[0]} for name, entry in PARTS.items()})
    command = f"train_detector.py --mode convert --json {tmp_path}/a.json --images_dir {tmp_path}/images --output " \
              f"{tmp_path}/c.json"
    monkeypatch.setattr(sys, "argv", command.split())
    train_detector.main()
    made = json.loads((tmp_path / "c.json").read_text())
    assert made["images"][1]["file_name"] == "1.jpg" and made["images"][1]["absent_parts"] == {"bell": 1}
    again = study_of(tmp_path, flags, made, "--group_column", "street")
    assert again.truth.parts == first.truth.parts and list(again.truth.groups) == ["0", "1", "2"]
    for name in ("boxes", "labels", "states", "ignored", "absent"):
        for one, other in zip(getattr(first.truth, name), getattr(again.truth, name)):
            np.testing.assert_array_equal(one, other)


def convert(tmp_path, monkeypatch, *more):
    """c.json made of a.json and the pictures."""
    command = f"train_detector.py --mode convert --json {tmp_path}/a.json --images_dir {tmp_path}/images --output " \
              f"{tmp_path}/c.json"
    monkeypatch.setattr(sys, "argv", [*command.split(), *more])
    train_detector.main()
    return json.loads((tmp_path / "c.json").read_text())


def test_a_conversion_names_pictures_that_do_not_fit(tmp_path, monkeypatch, capsys):
    """Its boxes would be wrong: annotated in another size; and pictures that are missing or cannot be read."""
    content = json.loads(json.dumps(PARTS))
    content["0.jpg"]["image"] = {"height": 80, "width": 120}
    content["1"]["parts"]["saddle"] = part([70, 10, 5, 5])
    (tmp_path / "a.json").write_text(json.dumps(content))
    write_pictures(tmp_path / "images", ("0.jpg", "1.jpg", "7.jpg"))
    with pytest.raises(common.UserError, match="60 x 40 pixels .EXIF applied., annotated as 120 x 80"):
        convert(tmp_path, monkeypatch)
    made = convert(tmp_path, monkeypatch, "--on_bad_file", "skip")
    assert [image["file_name"] for image in made["images"]] == ["1.jpg"]
    said = capsys.readouterr().out
    for line in ("skipped: 2.jpg, no such picture", "skipped: 7.jpg, no entry in the annotations", "skipped: 0.jpg, is 60 x 40",
                 "skipped: 1, saddle (saddle), box 70 10 75 15 has no area"):
        assert line in said


def test_an_audit_counts_states_and_absent_parts(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(PARTS))
    write_pictures(tmp_path / "images", ("0.jpg", "1.jpg", "2.jpg"))
    command = f"train_detector.py --mode audit --json {tmp_path}/a.json --images_dir {tmp_path}/images --output " \
              f"{tmp_path}/c.json"
    monkeypatch.setattr(sys, "argv", command.split())
    train_detector.main()
    found = json.loads((tmp_path / "c.json").read_text())["parts"]
    assert {row["part"]: list(row.values())[1:] for row in found} == {
        # boxes, intact, damaged, absent, occluded, absent without a box
        "back_wheel": [1, 1, 0, 0, 0, 0], "bell": [1, 0, 0, 1, 0, 1], "front_wheel": [2, 1, 1, 0, 0, 0],
        "saddle": [1, 0, 0, 0, 1, 0]}


def test_an_absent_part_that_no_one_trusts_is_not_counted(tmp_path, flags, monkeypatch):
    content = {"0.jpg": {"parts": {"saddle": part([1, 1, 9, 9]), "bell": part([0, 0, 0, 0], object_state="absent",
                                                                             trust=0.2)}}}
    assert study_of(tmp_path, flags, content, names=("0.jpg",)).truth.absent[0].tolist() == []
    study = study_of(tmp_path, flags, content | {"1.jpg": {"parts": {"bell": part([1, 1, 9, 9])}}}, "--min_trust", 0,
                     names=("0.jpg", "1.jpg"))
    assert study.truth.absent[0].tolist() == [1]
    assert convert(tmp_path, monkeypatch)["images"][0]["absent_parts"] == {"bell": 0.2}


def test_a_resumed_run_notices_other_absent_parts_groups_and_ids(tmp_path, flags):
    found = study_of(tmp_path, flags, PARTS)
    split = {"train": [0], "val": [1]}
    before = found.data_record(split)["fingerprint"]
    others = {"ids": [3, 4, 5], "groups": np.array(["a", "b", "c"]), "absent": [np.array([1])] * 3}
    for name, value in others.items():
        study = dataclasses.replace(found, truth=dataclasses.replace(found.truth, **{name: value}))
        assert study.data_record(split)["fingerprint"] != before, name


@pytest.mark.parametrize("select, column, higher_is_better", [
    ("val_loss", "val_loss", False), ("map", "val_map", True), ("joint_map", "val_joint_map", True)])
def test_the_best_epoch_has_the_lowest_loss_or_the_highest_ap(select, column, higher_is_better, tmp_path, flags, monkeypatch):
    class Asked(Exception):
        pass

    def training(*_, select, higher_is_better, **__):
        raise Asked(select, higher_is_better)
    monkeypatch.setattr(common, "Training", training)
    study = study_of(tmp_path, flags, PARTS)
    run = SimpleNamespace(compute=common.choose_compute("cpu", "off"), say=print)
    args = flags("--no_pretrained", "--select", select, "--num_workers", 0)
    with pytest.raises(Asked) as asked:
        train_detector.fit(run, args, study, {"train": np.array([0, 1]), "val": np.array([1])})
    assert asked.value.args == (column, higher_is_better)


def test_a_refused_resume_leaves_the_written_annotations(tmp_path, flags):
    study = study_of(tmp_path, flags, PARTS)

    def refuse(*_, **further):
        raise common.UserError("cannot be continued exactly")
    run = SimpleNamespace(path=lambda name: tmp_path / name, say=lambda text: None, args=flags(), resumed=True,
                          write_record=refuse)
    with pytest.raises(common.UserError, match="continued"):
        train_detector.run_split(run, flags(), study, {part: np.array([k]) for k, part in enumerate(("train", "val"))}
                                 | {"test": np.arange(0)})
    assert not (tmp_path / "train_coco.json").exists()


def changed(place, **fields):
    """coco() with one annotation changed."""
    content = coco()
    content["annotations"][place] |= fields
    return content


FAULTS = {
    "state": (changed(0, state="intakt"), ["0.jpg", "annotation 0", "intakt", "intact"]),
    "two states": (changed(0, state_id=2), ["different states", "damaged", "absent"]),
    "state number": (changed(1, state_id=4), ["annotation 5", "'4'"]),
    "image id": (changed(2, image_id=3), ["annotation 6", "image_id 3"]),
    "category id": (changed(2, category_id=[1]), ["category_id [1]"]),
    "three numbers": (changed(3, bbox=[1, 2, 3]), ["1.jpg", "annotation 8", "four numbers"]),
    "text in the box": (changed(3, bbox=[1, 2, "3 px", 4]), ["annotation 8"]),
    "true in the box": (changed(3, bbox=[1, 2, True, 4]), ["annotation 8"]),
    "trust": (changed(3, trust="much"), ["annotation 8", "trust"]),
    "trust in percent": (changed(3, trust=85), ["annotation 8", "trust 85"]),
    "trust of an absent part": (coco(images=[{"id": 0, "file_name": "0.jpg", "absent_parts": {"bell": 20}},
                                             {"id": 9, "file_name": "1.jpg"}]), ["0.jpg", "trust 20"]),
    "id twice": (coco(images=[{"id": 0, "file_name": name} for name in ("0.jpg", "1.jpg")]), ["images[1]", "twice"]),
    "category twice": (coco(categories=[*coco()["categories"], {**coco()["categories"][0], "name": "lamp"}]),
                       ["categories[3]", "is used twice"]),
    "name twice": (coco(images=[{"id": k, "file_name": "0.jpg"} for k in (0, 9)]), ["0.jpg", "2 times"]),
    "no name": (coco(images=[{"id": 0}, {"id": 9, "file_name": "1.jpg"}]), ["image 0", "no file_name"]),
    "no categories": (coco(categories=None), ["categories"]),
    "nameless category": (coco(categories=[{"id": 0, "name": "bell"}, {"id": 4}]), ["expected names"]),
    "no object": (coco(annotations=[3]), ["annotations[0]", "expected an object, found 3"]),
    "true for an id": (changed(0, id=True), ["annotations[0]", "expected an id"]),
    "no id": (coco(categories=[{"name": "bell"}]), ["categories[0]", "expected an id"]),
    "picture size": (coco(images=[{"id": 0, "file_name": "0.jpg", "width": -1, "height": 4},
                                  {"id": 9, "file_name": "1.jpg"}]), ["0.jpg", "-1"]),
    "part is a number": ({"0.jpg": {"parts": {"bell": 3}}}, ["0.jpg", "parts"]),
    "no box": ({"0.jpg": {"parts": {"bell": {"object_state": "intact"}}}}, ["0.jpg", "bell", "four numbers"]),
    "NaN": (json.dumps({"0.jpg": {"parts": {"bell": part([float("nan"), 1, 2, 2])}}}), ["bell", "four numbers"]),
    "key twice": ('{"0.jpg": {"parts": {}}, "0.jpg": {"parts": {}}}', ["twice"]),
    "LabelMe": ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, ["or COCO", "'shapes'", "of another format as COCO"]),
    "VIA": ({"0.jpg123": {"filename": "0.jpg", "size": 123, "regions": []}}, ["'0.jpg123'", "of another format as COCO"]),
    "a list": ("[1, 2]", ["list"]), "empty": ("{}", ["found none"]), "no JSON": ("<html>", ["expected JSON"]),
    "deep": ("[" * 100_000, ["nested too deeply"])}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(tmp_path, flags, name):
    content, words = FAULTS[name]
    with pytest.raises(common.UserError) as error:
        study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    assert "a.json" in str(error.value) and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_all_faults_at_once(tmp_path, flags):
    content = changed(0, state="intakt")
    content["annotations"][1]["bbox"] = [1]
    with pytest.raises(common.UserError, match="annotation 0.*annotation 5"):
        study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers(-3, 9) | st.text(max_size=6),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                                       max_size=3), max_leaves=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 40), value=json_values, as_coco=st.booleans())
def test_anything_in_any_place_is_read_or_refused(tmp_path, place, value, as_coco):
    """One value anywhere in the file replaced by arbitrary JSON: Annotations or UserError, nothing else."""
    content, places = json.loads(json.dumps(coco() if as_coco else PARTS)), []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])
    walk(content)
    node, key = places[place % len(places)]
    node[key] = value
    (tmp_path / "h.json").write_text(json.dumps(content))
    try:
        found = part_boxes.read_annotations(tmp_path / "h.json")
    except common.UserError:
        return
    assert all(np.isfinite(each.box).all() for image in found.images for each in image.objects)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\..\\secret.jpg", "C:\\0.jpg"])
def test_names_that_leave_the_folder_mean_a_picture_inside_or_none(tmp_path, flags, name):
    content = coco()
    content["images"][0]["file_name"] = name
    write_pictures(tmp_path, ("secret.jpg",))
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    assert study.truth.images.tolist() == ([name, "1.jpg"] if name == "C:\\0.jpg" else ["1.jpg"])
    assert any("1 of 2 names" in note for note in study.notes)


def test_links_out_of_the_folder_are_refused(tmp_path, flags):
    write_pictures(tmp_path / "elsewhere", ("0.jpg",))
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "elsewhere" / "0.jpg", tmp_path / "images" / "link.jpg")
    content = coco()
    content["images"][0]["file_name"] = "link.jpg"
    with pytest.raises(common.UserError, match="lead out of.*link.jpg"):
        study_of(tmp_path, flags, content, names=("1.jpg",))


# --- COCO as other programs write it --------------------------------------------------------

def each(key, change):
    """coco() with every record of a list changed by change(record)."""
    content = coco()
    for record in content[key]:
        record |= change(record)
    return content


def triangle(left, top, width, height):
    return [left, top, left + width, top, left, top + height]


def ids_as(kind):
    content = each("annotations", lambda a: {key: kind(a[key]) for key in ("image_id", "category_id")})
    content["images"][1]["id"] = kind(9)
    return content


WRITTEN = {
    "numbers as text": (each("annotations", lambda a: {"bbox": [f"{v:.4f}" for v in a["bbox"]]}), "4 boxes have"),
    "ids as text": (ids_as(str), "8 ids are text"),
    "ids with a fraction": (ids_as(float), "8 ids are text or have a fraction"),
    "categories repeated": (coco(categories=coco()["categories"] * 3), "6 categories are listed more than once"),
    "a category in two forms": (coco(categories=[*coco()["categories"], {**coco()["categories"][0], "colour": "red"}]),
                                "1 categories are listed more than once"),
    "one name twice": (coco(categories=[{"id": 99, "name": "bell"}, *coco()["categories"]]), "1 categories share"),
    "size 0": (each("images", lambda image: {"width": 0, "height": 0}), "2 images have the size 0"),
    "ids are null": (each("annotations", lambda a: {"id": None}), ""),
    "ids repeat": (each("annotations", lambda a: {"id": a["category_id"]}), "2 annotations have an id"),
    "the whole file twice": ({key: 2 * records for key, records in coco().items()},
                             "4 annotations are listed more than once"),
    "the same without ids": (coco(annotations=2 * each("annotations", lambda a: {"id": None})["annotations"]),
                             "4 annotations are listed more than once"),
    "polygons alone": (each("annotations", lambda a: {"bbox": [], "segmentation": [triangle(*a["bbox"])]}),
                       "4 boxes are drawn round"),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_sound_files_of_other_programs_give_the_same_boxes_and_a_note(tmp_path, flags, form):
    content, note = WRITTEN[form]
    plain = study_of(tmp_path, flags, coco(), names=("0.jpg", "1.jpg"))
    study = study_of(tmp_path, flags, json.loads(json.dumps(content)), names=("0.jpg", "1.jpg"))
    for name in ("boxes", "states", "ignored"):
        for one, other in zip(getattr(plain.truth, name), getattr(study.truth, name)):
            np.testing.assert_array_equal(one, other)
    found = [[study.truth.parts[label] for label in row] for row in study.truth.labels]
    assert found == [["bell", "saddle"]] * 2 and any(note in line for line in study.notes), study.notes
    assert study.category_ids["train"]["bell"] == 4, "the id that its boxes have"


@pytest.mark.parametrize("fields", [{"bbox": []}, {"bbox": None, "segmentation": []}, {"category_id": None}])
def test_one_annotation_without_a_box_or_category_is_left_out_by_name(tmp_path, flags, fields):
    study = study_of(tmp_path, flags, changed(1, **fields), names=("0.jpg", "1.jpg"))
    assert [len(boxes) for boxes in study.truth.boxes] == [1, 2]
    assert "annotation 5" in study.skipped[0]["annotation"] and study.skipped[0]["image"] == "0.jpg"


def with_states(form):
    content = coco()
    for k, record in enumerate(content["annotations"]):
        record.pop("state", None), record.pop("state_id", None)
        record["attributes"] = form(["intact", "damaged"][k % 2])
    return content


STATE_FORMS = {
    "any case": (lambda state: {"State": state.capitalize(), "occluded": False}, []),
    "list": (lambda state: [{"name": "state", "value": state}], []),
    "another name": (lambda state: {"Condition": state}, ["--state_attribute", "condition"]),
}


@pytest.mark.parametrize("form", STATE_FORMS)
def test_states_stand_in_an_attribute_of_any_name(tmp_path, flags, form):
    make, more = STATE_FORMS[form]
    study = study_of(tmp_path, flags, with_states(make), *more, names=("0.jpg", "1.jpg"))
    assert [row.tolist() for row in study.truth.states] == [[0, 1], [0, 1]]


def test_a_state_attribute_that_no_box_has_is_refused(tmp_path, flags):
    content = with_states(lambda state: {"Condition": state})
    with pytest.raises(common.UserError, match="--state_attribute conditoin: no box in .*a.json has it.*Condition"):
        study_of(tmp_path, flags, content, "--state_attribute", "conditoin", names=("0.jpg", "1.jpg"))


def test_attributes_that_are_not_used_are_named_and_survive_a_conversion(tmp_path, flags, monkeypatch):
    content = with_states(lambda state: {"condition": state, "view": "side"})
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    assert not study.truth.has_states()
    args = flags("--state_class_weights", "balanced")
    said = said_before_training(monkeypatch, args, study, train=[0], val=[1])
    assert "note: no box has a state, so --state_class_weights balanced does nothing" in said
    for said in ("attribute condition of the boxes was not used: intact 2, damaged 2", "attribute view", "side 4"):
        assert any(said in note for note in study.notes)
    command = f"train_detector.py --mode convert --json {tmp_path}/a.json --output {tmp_path}/c.json"
    monkeypatch.setattr(sys, "argv", command.split())
    train_detector.main()
    with pytest.raises(SystemExit, match="2"):  # the annotations themselves stay as they are
        train_detector.parse_args(["--mode", "convert", "--json", f"{tmp_path}/a.json", "--output", f"{tmp_path}/./a.json"])
    made = json.loads((tmp_path / "c.json").read_text())
    assert [a["attributes"] for a in made["annotations"]] == [a["attributes"] for a in content["annotations"]]
    unknown = with_states(lambda state: {"state": state if state == "intact" else "__undefined__"})
    study = study_of(tmp_path, flags, unknown, names=("0.jpg", "1.jpg"))
    assert [row.tolist() for row in study.truth.states] == [[0, UNKNOWN]] * 2


def test_a_file_without_boxes_is_named(tmp_path, flags):
    with pytest.raises(common.UserError, match="no box in .*a.json: nothing to learn"):
        study_of(tmp_path, flags, coco(annotations=[]), names=("0.jpg", "1.jpg"))


def test_ids_that_are_names_are_sound(tmp_path, flags):
    content = each("annotations", lambda a: {"image_id": f"img_{a['image_id']}"})
    for image in content["images"]:
        image["id"] = f"img_{image['id']}"
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    assert len(study.truth.boxes[0]) == 2 and not any("ids are" in note for note in study.notes)


# --- boxes ------------------------------------------------------------------------------

def in_convention(box_format, n=20):
    """n boxes all over a picture of 60 x 40, as a file in another convention has them."""
    rng = np.random.default_rng(0)
    content = coco(annotations=[])
    for k in range(n):
        width, height = rng.integers(5, 20, 2).tolist()
        left, top = int(rng.integers(0, 60 - width)), int(rng.integers(0, 40 - height))
        box = {
            "xywh": [left, top, width, height],
            "xyxy": [left, top, left + width, top + height],
            "cxcywh": [left + width / 2, top + height / 2, width, height],
            "fractions": [left / 60, top / 40, width / 60, height / 40]}[box_format]
        content["annotations"].append({"id": k, "image_id": 0, "category_id": 4, "bbox": box})
    return content


@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh", "fractions"])
def test_boxes_in_another_convention_stop_the_run_and_are_read_when_it_is_named(tmp_path, flags, box_format):
    plain = study_of(tmp_path, flags, in_convention("xywh"), names=("0.jpg", "1.jpg"))
    content = in_convention(box_format)
    words = "convert YOLO's.*" if box_format == "fractions" else ""
    with pytest.raises(common.UserError, match=f"{words}--box_format {box_format}"):
        study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    study = study_of(tmp_path, flags, content, "--box_format", box_format, names=("0.jpg", "1.jpg"))
    np.testing.assert_allclose(study.truth.boxes[0], plain.truth.boxes[0], atol=1e-5)
    if box_format == "fractions":
        del content["images"][0]["width"]
        with pytest.raises(common.UserError, match="'0.jpg', annotation 0: a box in fractions needs width and height"):
            study_of(tmp_path, flags, content, "--box_format", box_format, names=("0.jpg", "1.jpg"))


def test_areas_betray_corners_and_boxes_that_truly_leave_are_cut(tmp_path, flags):
    content = in_convention("xyxy")
    for record in content["annotations"]:
        record["bbox"] = [value / 2 for value in record["bbox"]]  # all in the corner: none leaves the picture
        x1, y1, x2, y2 = record["bbox"]
        record["area"] = (x2 - x1) * (y2 - y1)
    with pytest.raises(common.UserError, match="the area in the file"):
        study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    content = in_convention("xywh")
    for record in content["annotations"][:8]:
        record["bbox"][2] = 58  # by no convention inside
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    assert any("reached over the edge" in note for note in study.notes)



def test_degenerate_boxes_are_named_by_image_and_annotation(tmp_path, flags):
    content = changed(0, bbox=[10, 10, 0, 8])
    content["annotations"][1]["bbox"] = [70, 5, 10, 10]  # right of the picture
    content["annotations"][2]["bbox"] = [9, 9, -5, 5]
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    listed = [(each["image"], each["annotation"]) for each in study.skipped]
    assert listed == [("0.jpg", "annotation 0 (bell)"), ("0.jpg", "annotation 5 (saddle)"),
                      ("1.jpg", "annotation 6 (bell)")]
    assert "70 5 80 15" in study.skipped[1]["reason"] and len(study.truth.boxes[0]) == 0


@pytest.mark.parametrize("n_boxes", [100, 101])
def test_more_boxes_than_are_found_in_a_picture_are_said(tmp_path, flags, n_boxes):
    one = {"image_id": 9, "category_id": 4, "bbox": [1, 2, 9, 9]}
    content = coco(annotations=[{**one, "id": k} for k in range(n_boxes)])
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    assert any("1 pictures have over 100 boxes" in note for note in study.notes) == (n_boxes > 100)


def test_images_without_objects_stay_or_go(tmp_path, flags):
    assert len(study_of(tmp_path, flags, PARTS).truth.images) == 3
    study = study_of(tmp_path, flags, PARTS, "--drop_empty")
    assert list(study.truth.images) == ["0.jpg", "1"] and study.skipped[-1]["image"] == "2.jpg"
    assert len(study.truth.boxes) == len(study.truth.sizes) == len(study.stored) == 2


def test_boxes_are_cut_to_the_four_edges_of_their_picture():
    assert part_boxes.cut_box([-5, -3, 10, 9], (8, 6)).tolist() == [0, 0, 8, 6]
    assert part_boxes.cut_box([-5, -3, 10, 9], None).tolist() == [-5, -3, 10, 9], "of unknown size"
    assert part_boxes.cut_box([7.5, 0, 20, 3], (8, 6)).tolist() == [7.5, 0, 8, 3]
    for outside in ([7.6, 0, 20, 3], [0, -9, 5, 0.4], [5, 2, 3, 4]):
        assert part_boxes.cut_box(outside, (8, 6)) is None


def test_the_clean_coco_of_one_box_by_hand(tmp_path):
    bell = part_boxes.PartObject("bell", "bell", [-2, 3, 12, 8], 1, 0.5, True, {"colour": "red"}, {})
    gone = part_boxes.PartObject("lamp", "lamp", [30, 3, 40, 8], part_boxes.UNKNOWN, 1.0, False, {}, {})
    image = part_boxes.AnnotatedImage("a", 7, (20, 10), {}, {"id": 7}, [bell, gone], path=tmp_path / "b" / "a.jpg")
    content, dropped = part_boxes.as_coco([image], {"bell": 4, "lamp": 5}, tmp_path)
    assert content["images"] == [{"id": 7, "file_name": "b/a.jpg", "absent_parts": {}, "width": 20, "height": 10}]
    assert content["annotations"] == [{
        "id": 1, "image_id": 7, "category_id": 4, "bbox": [0, 3, 12, 5], "area": 60, "iscrowd": 1, "trust": 0.5,
        "state": "damaged", "state_id": 1, "attributes": {"colour": "red"}}]
    assert [(each["image"], each["annotation"]) for each in dropped] == [("a", "lamp (lamp)")]


def test_dropping_every_picture_is_refused(tmp_path, flags):
    content = {"0.jpg": {"parts": {"bell": part([5, 5, 10, 10], trust=0.1)}}}
    with pytest.raises(common.UserError, match="--drop_empty"):
        study_of(tmp_path, flags, content, "--drop_empty", names=("0.jpg",))


def test_absent_parts_are_kept_or_dropped(tmp_path, flags):
    study = study_of(tmp_path, flags, PARTS, "--min_trust", 0)
    assert study.truth.judged(0).tolist() == [True, True, True]
    study = study_of(tmp_path, flags, PARTS, "--min_trust", 0, "--absent", "drop")
    assert study.truth.judged(0).tolist() == [True, True, False]


def test_pictures_of_another_size_than_annotated(tmp_path, flags):
    content = coco()
    content["images"][0] |= {"width": 40, "height": 60}
    with pytest.raises(common.UserError, match="60 x 40 pixels .EXIF applied., annotated as 40 x 60"):
        study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    study = study_of(tmp_path, flags, content, "--on_bad_file", "skip", names=("0.jpg", "1.jpg"))
    assert list(study.truth.images) == ["1.jpg"]
    content["images"][1] |= {"width": 41, "height": 60}
    with pytest.raises(common.UserError, match="none of the 2 pictures can be used.*60 x 40 pixels.*40 x 60"):
        study_of(tmp_path, flags, content, "--on_bad_file", "skip", names=("0.jpg", "1.jpg"))


def test_missing_and_surplus_pictures_are_listed(tmp_path, flags):
    """A link that leads to itself is one of the surplus ones."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    study = study_of(tmp_path, flags, PARTS, names=("0.jpg", "2.jpg", "7.jpg"))
    assert {(each["image"], each["reason"]) for each in study.skipped} == {
        ("1", "no such picture"), ("7.jpg", "no entry in the annotations"),
        ("loop.jpg", "no entry in the annotations")}


def test_a_field_that_repeats_and_is_not_used_is_an_alarm_before_training(tmp_path, flags):
    content = {f"{k}.jpg": {"subject": k // 2, "parts": {"bell": part([5, 5, 10, 10])}} for k in range(12)}
    study = study_of(tmp_path, flags, content, names=list(content))
    run = SimpleNamespace(path=lambda name: tmp_path / name, say=lambda text: None, args=flags(), resumed=False)
    alarms = train_detector.check_split(run, study, {"train": np.arange(0, 12, 2), "val": np.arange(1, 12, 2),
                                                     "test": np.arange(0)})
    assert len(alarms) == 1 and "--group_column subject" in alarms[0]


def test_groups_come_from_the_entries(tmp_path, flags):
    content = json.loads(json.dumps(PARTS))
    for k, entry in enumerate(content.values()):
        entry["street"] = k // 2
    assert list(study_of(tmp_path, flags, content, "--group_column", "street").truth.groups) == ["0", "0", "1"]
    with pytest.raises(common.UserError, match="--group_column owner.* another of .*street"):
        study_of(tmp_path, flags, content, "--group_column", "owner")


def test_versions_that_roboflow_made_of_a_picture_stay_together(tmp_path, flags):
    names = [f"goat{k}_jpg.rf.{version * 32}.jpg" for k in range(3) for version in "ab"]
    content = {name: {"goat": str(k % 2), "parts": {"bell": part([5, 5, 10, 10])}} for k, name in enumerate(names)}
    study = study_of(tmp_path, flags, content, names=names)
    assert list(study.truth.groups) == ["goat0_jpg.jpg"] * 2 + ["goat1_jpg.jpg"] * 2 + ["goat2_jpg.jpg"] * 2
    assert any(note.endswith("where these are other pictures: --group_column file_name") for note in study.notes)
    own = study_of(tmp_path, flags, content, "--group_column", "file_name", names=names).truth.groups
    assert list(own) == names, "several originals of one name are no versions"
    assert list(study_of(tmp_path, flags, content, "--group_column", "goat", names=names).truth.groups) == list("010101")
    single = {name: content[name] for name in names[::2]}
    assert study_of(tmp_path, flags, single, names=names).truth.groups is None, "one version of each: no groups"


def test_groups_by_name_silence_no_alarm_on_a_column_that_repeats(tmp_path, flags):
    names = [f"a{k}_jpg.rf.{'a' * 32}.jpg" for k in range(10)] + [f"a9_jpg.rf.{'b' * 32}.jpg"]
    content = {name: {"subject": int(name[1]) // 2, "parts": {"bell": part([5, 5, 10, 10])}} for name in names}
    study = study_of(tmp_path, flags, content, names=names)
    run = SimpleNamespace(path=lambda name: tmp_path / name, say=lambda text: None, args=flags(), resumed=False)
    split = {"train": np.arange(1, 11), "val": np.arange(1), "test": np.arange(0)}
    assert "--group_column subject" in train_detector.check_split(run, study, split)[0]


# --- samples ----------------------------------------------------------------------------

def marked(tmp_path, flags, *more, parts=("back_wheel", "front_wheel")):
    """A study of one picture of 60 x 40 with a white front wheel, or the last of these parts, on its left."""
    (tmp_path / "images").mkdir()
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 5:25] = 255
    cv2.imwrite(str(tmp_path / "images" / "0.png"), pixels)
    (tmp_path / "a.json").write_text(json.dumps({"0.png": {"parts": {
        parts[0]: part([35, 10, 20, 20], object_state="damaged"),
        parts[1]: part([5, 10, 20, 20], object_state="occluded")}}}))
    args = flags(*more)
    files = {"train": (tmp_path / "a.json", tmp_path / "images")}
    return args, train_detector.load_study(args, files, lambda text: None)


def test_a_flip_keeps_names_and_boxes_follow_the_pixels(tmp_path, flags):
    args, study = marked(tmp_path, flags)
    data = train_detector.PartImages(study, np.array([0]), {"min_size": 40, "max_size": 80}, "light", args.seed)
    sides, widths = set(), set()
    for epoch in range(24):
        sample = data[epoch, 0]
        assert [study.truth.parts[label - 1] for label in sample["labels"]] == ["back_wheel", "front_wheel"]
        assert sample["states"].tolist() == [1, 3]
        back, front = sample["boxes"].tolist()
        rows, columns = np.nonzero(sample["pixels"].numpy().min(2) > 100)
        np.testing.assert_allclose(front, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1.5)
        assert (front[0] < back[0]) == (columns.mean() < sample["pixels"].shape[1] / 2)
        np.testing.assert_allclose(sample["scale"] * np.array(sample["pixels"].shape[1::-1]), [60, 40])
        sides.add(front[0] < back[0])
        widths.add(sample["pixels"].shape[1])
    assert sides == {True, False} and len(widths) > 8 and min(widths) >= 48 and max(widths) <= 72


def test_left_and_right_change_places_in_a_flip(tmp_path, flags):
    """In a mirrored picture the white box, on the right now, is called the right one; its state goes with it."""
    args, study = marked(tmp_path, flags, parts=("Right light", "left light"))
    data = train_detector.PartImages(study, np.array([0]), {"min_size": 40, "max_size": 80}, "light", args.seed)
    sides = set()
    for epoch in range(12):
        sample = data[epoch, 0]
        names = [study.truth.parts[label - 1] for label in sample["labels"]]
        centre = sample["pixels"].shape[1] / 2
        for name, box, state in zip(names, sample["boxes"].tolist(), sample["states"].tolist()):
            is_white = sample["pixels"][int(box[1] + box[3]) // 2, int(box[0] + box[2]) // 2].min() > 100
            assert name == ("left light" if (box[0] + box[2]) / 2 < centre else "Right light")
            assert state == (3 if is_white else 1)
        sides.add(sample["boxes"][0][0].item() < centre)
    assert sides == {True, False}


@pytest.mark.parametrize("parts, expected", [
    (["bell", "front wheel"], [0, 1]), (["left_door", "hood", "RIGHT_door"], [2, 1, 0]),
    (["front-left-light", "front-right-light", "leftover"], [1, 0, 2]), (["left eye", "nose"], None),
    (["leftWheel", "rightWheel", "DoorLeft", "DoorRight"], [1, 0, 3, 2]), (["Wheel", "wheel", "bell"], [0, 1, 2]),
    (["LEFT_EYE", "RIGHT_EYE", "copyright", "BRIGHT lamp"], [1, 0, 2, 3]),
    (["L_ear", "R_ear", "earR", "earL", "lip", "nail L1", "nail R1"], [1, 0, 3, 2, 4, 6, 5]),
    (["wheel_L", "wheel_R", "pedal_L"], None), (["eye_l", "nose"], [0, 1]), (["left_eye", "right_eye", "l_shape"], [1, 0, 2]), (["L1", "L2", "L3", "T1"], [0, 1, 2, 3])])
def test_labels_of_a_mirrored_picture(parts, expected):
    found = part_boxes.mirrored_labels(parts)
    assert found is expected is None or list(found) == expected


def test_a_side_without_its_counterpart_is_said_to_forbid_mirroring(tmp_path, flags, monkeypatch):
    content = coco(categories=[{"id": 0, "name": "left pedal"}, {"id": 4, "name": "bell"}])
    study = study_of(tmp_path, flags, content, names=("0.jpg", "1.jpg"))
    said = []

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_detector, "build_model", stop)
    with pytest.raises(KeyboardInterrupt):
        run = SimpleNamespace(say=said.append, compute=SimpleNamespace(place=None))
        train_detector.fit(run, flags("--augment", "light"), study, {"train": np.arange(2), "val": np.arange(2)})
    assert "called left or right" in said[0] and "not mirrored" in said[0]


def test_a_part_of_the_split_without_a_judged_box_is_refused(tmp_path, flags):
    study = study_of(tmp_path, flags, PARTS)
    with pytest.raises(common.UserError, match="no box in the val part: .*--split_file"):
        train_detector.examine_split(study, {"train": np.array([0, 1]), "val": np.array([2])})


def drawn_truth(sides):
    """Boxes of these sides (pictures, boxes), twice as wide as the square and half as high, in pictures of 800 px.

    The first box of each, over the whole picture, is one that does not count.
    """
    boxes = np.full((len(sides), sides.shape[1] + 1, 4), [0, 0, 800, 800], np.float32)
    boxes[:, 1:, :2] = 90, 70
    boxes[:, 1:, 2:] = [90, 70] + sides[:, :, None] * [2, 0.5]
    return SimpleNamespace(sizes=np.full((len(sides), 2), 800), boxes=list(boxes),
                           judged=lambda row: np.arange(boxes.shape[1]) > 0)


def test_anchors_fit_the_train_boxes_in_input_pixels():
    """Two of each level are scikit-learn's two means of the sides that it serves, where there are enough."""
    from sklearn.cluster import KMeans
    draws = np.random.default_rng(0)
    # half of it in the input: 10 to 75, most of them small, so that the means are no quartiles
    sides = np.exp(np.log(20) + np.log(150 / 20) * draws.uniform(size=(60, 3)) ** 2)
    found = train_detector.fit_anchors(drawn_truth(sides), 400, 800)
    logs = np.log(sides.ravel() / 2)[:, None]
    expected = [np.sort(KMeans(2, n_init=10, random_state=0).fit(own).cluster_centers_.ravel())
                for own in (logs[logs[:, 0] < np.log(48)], logs[logs[:, 0] >= np.log(48)])]
    assert found == [*np.round(np.exp(np.concatenate(expected))), 96, 136, 192, 272] == sorted(found)


def test_a_detector_to_start_from_keeps_its_anchors(tmp_path):
    """Its proposals were learnt for them, whatever the new boxes are."""
    path = tmp_path / "best_model.pth"
    learnt = [16, 24, 40, 56, 90, 130, 190, 260]
    common.save_checkpoint(path, {"format": common.FORMAT, "script": common.script_name(), "model": {}, "seen": None,
                                  "settings": {"model": train_detector.RESNET18, "anchor_sizes": learnt}})
    flags = SimpleNamespace(model=train_detector.RESNET18, anchor_sizes=None, init_from=path)
    assert train_detector.choose_anchors(flags, drawn_truth(np.full((4, 3), 300.0)), 400, 800) == learnt
    flags.model = "fasterrcnn_resnet50_fpn"
    with pytest.raises(common.UserError, match="--init_from .* model fasterrcnn_resnet18_fpn, expected fasterrcnn_resnet50_fpn"):
        train_detector.choose_anchors(flags, drawn_truth(np.full((4, 3), 300.0)), 400, 800)
    flags.model = train_detector.RESNET18
    flags.init_from = None
    assert train_detector.choose_anchors(flags, drawn_truth(np.full((4, 3), 300.0)), 400, 800) != learnt
    flags.model = "fasterrcnn_resnet50_fpn"
    published = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    sides = [side for level in published.rpn.anchor_generator.sizes for side in level]
    assert train_detector.choose_anchors(flags, drawn_truth(np.full((4, 3), 300.0)), 400, 800) == sides
    flags.anchor_sizes = [9, 18, 36, 72, 144]
    assert train_detector.choose_anchors(flags, drawn_truth(np.full((4, 3), 300.0)), 400, 800) == flags.anchor_sizes


def test_boxes_of_one_size_have_anchors_of_that_size():
    found = train_detector.fit_anchors(drawn_truth(np.full((8, 3), 60.0)), 400, 800)
    assert min(abs(np.subtract(found, 30))) < 1 and found == sorted(found) and np.isfinite(found).all()


def test_anchors_come_close_to_more_boxes_than_one_fixed_size_a_level():
    """Share of boxes, anywhere in the picture, that an anchor of torchvision's generator overlaps by IoU .7."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    draws = np.random.default_rng(1)
    sides = np.exp(draws.normal(np.log(50), 0.6, (100, 3)))
    centres = draws.uniform(120, 280, (300, 2))
    boxes = np.hstack([centres - sides.reshape(-1, 1) / 2, centres + sides.reshape(-1, 1) / 2])
    maps = [torch.zeros(1, 1, 448 // stride, 448 // stride) for stride in train_detector.LEVEL_STRIDES]
    shares = []
    for sizes in ([16, 40, 96, 224], train_detector.fit_anchors(drawn_truth(sides), 800, 800)):
        levels = tuple(map(tuple, np.reshape(sizes, (4, -1)).tolist()))
        generator = AnchorGenerator(levels, ((0.5, 1.0, 2.0),) * 4)
        anchors = generator(ImageList(torch.zeros(1, 3, 448, 448), [(448, 448)]), maps)[0]
        best = torchvision.ops.box_iou(torch.from_numpy(boxes).float(), anchors).max(1).values
        shares.append((best >= 0.7).float().mean().item())
    assert shares[1] > 2 * shares[0], shares


def test_a_sample_depends_on_seed_epoch_and_row_alone(tmp_path, flags):
    args, study = marked(tmp_path, flags)
    data = train_detector.PartImages(study, np.array([0]), {"min_size": 40, "max_size": 80}, "light", args.seed)
    first, again, other = data[3, 0], data[3, 0], data[4, 0]
    assert first["name"] == "0.png", "what a loss that is not finite is said to come from"
    assert torch.equal(first["pixels"], again["pixels"])
    assert first["pixels"].shape != other["pixels"].shape or not torch.equal(first["pixels"], other["pixels"])


def test_batches_are_padded_with_zeros_after_normalisation(tmp_path, flags):
    args, study = marked(tmp_path, flags)
    data = train_detector.PartImages(study, np.array([0]), {"min_size": 40, "max_size": 80}, "none", args.seed)
    small = {**data[0, 0], "pixels": torch.full((20, 30, 3), 7, dtype=torch.uint8)}
    batch = train_detector.collate([data[0, 0], small])
    assert batch["pixels"].shape == (2, 64, 64, 3) and batch["sizes"] == [(40, 60), (20, 30)]
    compute = common.choose_compute("cpu", "off")
    inputs, sizes, targets = train_detector.to_device(batch, compute, {"pixel_mean": common.IMAGENET_MEAN,
                                                                       "pixel_sd": common.IMAGENET_STD})
    assert (inputs[1, :, 20:] == 0).all() and (inputs[1, :, :, 30:] == 0).all() and (inputs[1, :, :20, :30] != 0).all()
    assert targets[0]["boxes"].shape == (2, 4)


def test_elongated_pictures_keep_to_max_size():
    assert train_detector.fit_size(400, 100, 80, 160) == (160, 40)
    assert train_detector.fit_size(100, 400, 80, 1000) == (80, 320)
    assert train_detector.fit_size(1, 900, 80, 160) == (1, 160) and train_detector.fit_size(900, 1, 80, 160) == (160, 1)


@pytest.mark.parametrize("has_states, typed, nms_iou", [(True, [], 0.5), (False, ["--nms_iou", "0"], 0)])
def test_a_checkpoint_keeps_what_describes_its_network(has_states, typed, nms_iou):
    truth = drawn_truth(np.full((4, 3), 60.0))
    truth.parts = ["bell"]
    truth.has_states = lambda: has_states
    args = train_detector.parse_args([*DATA, "--no_pretrained", "--model", train_detector.RESNET18, "--anchor_sizes",
                                      "8", "16", "32", "64", *typed])
    assert train_detector.model_settings(args, truth) == {
        "model": train_detector.RESNET18, "min_size": 384, "max_size": 640, "anchor_sizes": [8, 16, 32, 64],
        "parts": ["bell"], "states": list(part_boxes.STATES) if has_states else [], "nms_iou": nms_iou,
        "frozen_norm": False, "pixel_mean": list(common.IMAGENET_MEAN), "pixel_sd": list(common.IMAGENET_STD)}


@pytest.mark.parametrize("asked, limits", [
    ((None, None), (384, 640)), ((100, None), (100, 640)), ((None, 500), (384, 500)), ((100, 50), (100, 100))])
def test_limits_of_the_input_are_the_flags_else_the_models(asked, limits):
    flags = SimpleNamespace(model=train_detector.RESNET18, min_size=asked[0], max_size=asked[1])
    assert train_detector.input_limits(flags) == limits


# --- flags ------------------------------------------------------------------------------

def test_defaults_from_the_environment_and_from_env_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("# data\nexport TRAIN_JSON='a b.json'\nTRAIN_CLEANED=pictures\nVAL_JSON=v.json\n"
                            "VAL_CLEANED=w\nOUTPUT_DIR=\"results\"\nOTHER=1\n")
    monkeypatch.setenv("VAL_JSON", "from_environment.json")
    args = train_detector.parse_args(["--val_images", "typed"])
    assert (args.train_json, args.train_images) == (Path("a b.json"), Path("pictures"))
    assert args.output_dir == Path("results")
    assert (args.val_json, args.val_images) == (Path("from_environment.json"), Path("typed"))
    args = train_detector.parse_args(["--split_ratio", "0.7", "--test_ratio", "0.1"])
    assert args.val_json is None and args.val_ratio == pytest.approx(0.2)


def test_the_split_of_a_configuration_gives_way_to_files(tmp_path, capsys):
    """Whatever the configuration says of the split; typed beside the files it is a mistake (see MISTAKES)."""
    (tmp_path / "c.yaml").write_text("split_ratio: 0.8\ntest_ratio: 0.1\n")
    data = ["--train_json", "a.json", "--train_images", "i"]
    files = ["--val_json", "v.json", "--val_images", "w"]
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data, *files])
    assert args.val_json == Path("v.json") and not args.split_ratio and not args.test_ratio
    said = capsys.readouterr().out
    assert said.startswith("note: ") and "split_ratio and test_ratio" in said and said.count("\n") == 1
    train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data])
    assert not capsys.readouterr().out
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data, "--split_file", "s.json"])
    assert args.split_file == Path("s.json")
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data, "--folds", "3"])
    assert args.folds == 3 and not args.test_ratio and "split_ratio and test_ratio" in capsys.readouterr().out
    (tmp_path / "c.yaml").write_text("folds: 3\nval_json: x.json\n")
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data, *files])
    assert not args.folds and args.val_json == Path("v.json")
    assert "note: --val_json makes the split, so folds of" in capsys.readouterr().out
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data])
    assert args.folds == 3 and not args.val_json and "--folds makes the split, so val_json" in capsys.readouterr().out
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data, "--folds", "0", "--val_images", "w"])
    assert args.val_json == Path("x.json"), "0 asks for no folds"
    (tmp_path / "c.yaml").write_text("train_ratio: 0.7\nval_ratio: 0.15\ntest_ratio: 0.15\nsplit_ratio: 0.7\n"
                                     "val_json: x.json\nval_images: w\ntest_json: t.json\ntest_images: w\n")
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data, "--folds", "5"])
    assert (args.folds, args.val_ratio, args.train_ratio, args.test_ratio, args.test_json) == (5, 0.15, None, 0, None)
    args = train_detector.parse_args(["--config", str(tmp_path / "c.yaml"), *data])
    assert args.train_ratio == 0.7 and not args.val_json, "as the args.json of a run has it"


DATA = ["--train_json", "a.json", "--train_images", "i"]
EVALUATE = ["--mode", "evaluate", "--checkpoint", "c", "--json", "j", "--images_dir", "i"]
MISTAKES = {
    "nothing given": ([], ["--train_json and --train_images"]),
    "evaluate": (["--mode", "evaluate"], ["--checkpoint and --json and --images_dir"]),
    "folds": ([*DATA, "--folds", "3", "--val_ratio", "0"], ["choose the epoch"]),
    "full": ([*DATA, "--augment", "full"], ["light"]),
    "heavy": ([*DATA, "--augment", "heavy"], ["--augment: invalid choice", "none", "light"]),
    "two splits": ([*DATA, "--val_json", "v", "--val_images", "w", "--split_ratio", "0.5"], ["--split_ratio"]),
    "two splits, folds": ([*DATA, "--val_json", "v", "--val_images", "w", "--folds", "3"], ["--folds"]),
    "folds of an evaluation": ([*EVALUATE, "--folds", "5"], ["--mode evaluate does not use --folds"]),
    "no fold": ([*DATA, "--val_json", "v", "--val_images", "w", "--fold", "0"], ["leave out --fold", "--val_json v"]),
    "no share": ([*DATA, "--val_json", "v", "--val_images", "w", "--val_ratio", "0.3"],
                 ["--val_json v", "leave out --val_ratio"]),
    "file and share": ([*DATA, "--split_file", "s.json", "--split_ratio", "0.5"], ["--split_ratio", "--split_file"]),
    "two shares": ([*DATA, "--split_ratio", "0.8", "--val_ratio", "0.3"], ["--split_ratio", "--val_ratio"]),
    "a checkpoint to train from": ([*DATA, "--checkpoint", "c"], ["does not use --checkpoint", "--init_from"]),
    "runs without a folder": ([*DATA, "--output", "runs"], ["does not use --output", "--output_dir"]),
    "an evaluation into a file": ([*EVALUATE, "--output", "o.json"], ["--mode evaluate does not use --output"]),
    "what the checkpoint decides": ([*EVALUATE, "--absent", "drop", "--min_size", "99"], ["--min_size and --absent"]),
    "no folder": ([*DATA, "--val_json", "v"], ["--val_images"]),
    "no validation": ([*DATA, "--split_ratio", "0.8", "--test_ratio", "0.2"], ["must not be empty", "'val': 0.0,"]),
    "test alone": ([*DATA, "--test_json", "t", "--test_images", "u"], ["--val_json"]),
    "weights": ([*DATA, "--state_class_weights", "1", "2"], ["invalid choice"]),
    "anchors": ([*DATA, "--anchor_sizes", "8", "16"], ["takes 5"]),
    "anchors of the small one": ([*DATA, "--model", "fasterrcnn_resnet18_fpn", "--anchor_sizes", "8", "16"],
                                 ["takes 4, 8, ... sides"]),
    "compiled": ([*DATA, "--compile"], ["--compile", "vary in size", "leave it out"]),
    "a baseline of random features": ([*DATA, "--no_pretrained", "--baseline", "heads"],
                                      ["--baseline heads", "trained weights"]),
    "a baseline that is the model": ([*DATA, "--trainable_layers", "0", "--baseline", "heads"], ["--trainable_layers"]),
    "model": ([*DATA, "--model", "fasterrcnn"], ["fasterrcnn_resnet50_fpn"])}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_flags(tmp_path, monkeypatch, capsys, name):
    flags, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    for variable in train_detector.ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as error:
        train_detector.parse_args(flags)
    text = capsys.readouterr().err
    assert error.value.code == 2 and text.count("\n") == 1
    for word in words:
        assert word in text


# --- sample data ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bicycles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bicycles")
    return folder, make_sample_data.make_detector(folder, 36, 7)


def test_sample_data_repeat_to_the_byte(bicycles, tmp_path):
    folder, truth = bicycles
    assert make_sample_data.make_detector(tmp_path, 36, 7) == truth
    names, again = ({path.relative_to(made) for path in made.rglob("*.j*")} for made in (folder, tmp_path))
    assert len(names) == 39 and names == again
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def coco_study(folder, flags):
    """Both COCO files of sample data, read without a word."""
    both = {part: (folder / f"{part}_coco.json", folder / "images") for part in ("train", "val")}
    return train_detector.load_study(flags("--group_column", "street"), both, lambda text: None)


def test_sample_states_can_be_seen(bicycles, flags):
    """Rust in the box says damaged, leaf green occluded: the colours alone tell the states of the saddles apart."""
    folder, _ = bicycles
    truth = coco_study(folder, flags).truth
    saddle = truth.parts.index("saddle")
    right = []
    for name, boxes, labels, states in zip(truth.images, truth.boxes, truth.labels, truth.states):
        if saddle not in labels:  # the picture without parts
            continue
        [row] = np.flatnonzero(labels == saddle)
        state = STATES[states[row]]
        x1, y1, x2, y2 = boxes[row].round().astype(int)
        pixels = cv2.imread(str(folder / "images" / Path(name).name))[max(y1, 0):y2, max(x1, 0):x2, ::-1].astype(int)

        def share(colour):
            return (np.abs(pixels - ImageColor.getrgb(colour)).max(2) < 60).mean()
        looks = {"damaged": share(make_sample_data.RUST) > 0.3, "occluded": share(make_sample_data.LEAVES) > 0.25,
                 "intact": share(make_sample_data.PART_LOOKS["saddle"][-1]) > 0.3}
        right.append(next((s for s, is_seen in looks.items() if is_seen), "absent") == state)
    assert np.mean(right) > 0.9


def test_sample_quirks_are_there_and_both_formats_agree(bicycles, flags):
    folder, truth = bicycles
    text = (folder / "annotations.json").read_text()
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    content, quirks = json.loads(text, strict=False), truth["quirks"]
    assert quirks["no_suffix"] not in content and Path(quirks["no_suffix"]).stem in content
    images = folder / "images"
    study = train_detector.load_study(flags(), {"train": (folder / "annotations.json", images)}, lambda text: None)
    row_of = {Path(name).stem: row for row, name in enumerate(study.truth.images)}
    assert [each["image"] for each in study.skipped] == [quirks["zero_box"]]
    assert len(study.truth.boxes[row_of[Path(quirks["no_parts"]).stem]]) == 0
    assert study.truth.ignored[row_of[Path(quirks["untrusted"]).stem]].sum() == 1
    coco = coco_study(folder, flags)
    shared = [row for row, name in enumerate(coco.truth.images) if Path(name).name not in quirks.values()]
    for row in shared:
        other = row_of[Path(coco.truth.images[row]).stem]
        parts, others = ({truth.parts[label]: (state, box) for label, state, box in zip(
            truth.labels[k], truth.states[k], truth.boxes[k])} for truth, k in ((coco.truth, row), (study.truth, other)))
        for part, (state, box) in parts.items():
            assert others[part][0] == state
            np.testing.assert_allclose(others[part][1], box, atol=0.2)
    assert len(shared) == 31
    val = np.array([image.origin == "val" for image in coco.images])
    assert set(coco.truth.groups[val]) == {"street 5"} and set(coco.truth.groups[~val]) == {f"street {k}" for k in range(5)}
    for row, image in enumerate(content.values()):
        for part, entry in image["parts"].items():
            assert ("object_state_class" in entry) == (row % 3 == 2 or (row == 11 and part == "chain")), "states as numbers"
            assert ("trust" in entry) == (row % 4 > 0), "missing trust"



def test_features_for_look_alikes_are_those_of_each_picture_whatever_the_others(bicycles, flags):
    """By row of the study, NaN where none were asked for; the model is that of the flags, before any training."""
    folder, _ = bicycles
    study = coco_study(folder, flags)
    args = flags("--min_size", "64", "--max_size", "96", "--no_pretrained")
    compute = common.choose_compute("cpu", "off")
    found = train_detector.untuned_features(args, study, compute, np.array([5, 2, 9]))
    assert found.shape == (len(study.stored), 256) and np.flatnonzero(~np.isnan(found[:, 0])).tolist() == [2, 5, 9]
    for row in (2, 9):
        alone = train_detector.untuned_features(args, study, compute, np.array([row]))
        np.testing.assert_allclose(found[row], alone[row], rtol=1e-3, atol=1e-5)
    assert np.abs(found[2] - found[9]).max() > 1e-3


def test_what_each_fold_found_is_judged_beside_its_pictures_and_those_that_look_alike(bicycles, flags, tmp_path, monkeypatch):
    """Picture by picture, in the order of the folds: detections of all models, mean boxes, words, look-alikes."""
    study = coco_study(bicycles[0], flags)
    found = {name: [detection_scores.Detections(np.full((1, 4), row + shift), np.zeros(1, int), np.ones(1), None)
                    for row in range(len(study.stored))] for name, shift in (("model", 0.0), ("heads", 0.5))}
    scored = [train_detector.Scored(np.array(rows), {name: [each[row] for row in rows] for name, each in found.items()},
                                    prior, np.full(len(rows), word))
              for rows, prior, word in (([9, 2], "first", "new"), ([7], "second", "chose"))]
    run = SimpleNamespace(path=lambda name: tmp_path / name, compute=SimpleNamespace(processes=common.Processes()))
    judged = []
    monkeypatch.setattr(detection_judging, "judge_detections", lambda *given, **known: judged.append((given, known)))
    folds = {"fold_0": np.array([9, 2]), "fold_1": np.array([7])}
    train_detector.judge(run, flags("--visualize", "2", "--score_threshold", "0.3"), study, folds, "folds", scored,
                         [(2, 5), (7, 1)], limits=["a limit"])
    [((_, truth, own, setting), known)] = judged
    rows = [9, 2, 7]
    assert truth.images.tolist() == study.truth.images[rows].tolist()
    assert own == [found["model"][row] for row in rows]
    assert known["trained"] == {"heads": [found["heads"][row] for row in rows]}
    assert known["priors"] == ["first", "first", "second"] and known["threshold"] == 0.3
    assert (setting.part, setting.seen.tolist(), setting.limits) == ("folds", ["new", "new", "chose"], ["a limit"])
    assert setting.is_similar.tolist() == [False, True, True]
    for number, pair in enumerate([(2, 5), (7, 1)], 1):
        assert all(f"pair {number}: {study.truth.images[row]}" in setting.similar[1] for row in pair)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(known["picture"](place), study.picture(row))
    written = common.read_json(tmp_path / "detections_folds.json")
    assert [(each["image_id"], each["bbox"][0], each["seen"]) for each in written] == [
        (study.truth.ids[row], row, word) for row, word in zip(rows, setting.seen)]
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert drawn == [f"{k:03d}_{Path(study.truth.images[row]).stem}.jpg" for k, row in enumerate(rows[:2])]
