"""Detections as files: COCO results and CSV, written by prediction and read back to be judged.

Letters: D detections of one picture, P parts, S states.
"""
import numpy as np

import common
from evidence import detection_scores, seen_rows
from readers import file_names, part_boxes

N_STATES = detection_scores.N_STATES
BOX_COLUMNS = ("x1", "y1", "x2", "y2")
PROBABILITY_COLUMNS = tuple(f"p_{state}" for state in part_boxes.STATES)
COLUMNS = ("image", "part", "score", "state", *PROBABILITY_COLUMNS, *BOX_COLUMNS, "seen", "warning", "error")


def best_of_each_part(detected, threshold):
    """The detections of one picture from `threshold`, only the best of each part."""
    detected = detected.take(detected.scores >= threshold)
    order = np.argsort(-detected.scores, kind="stable")
    first = np.unique(detected.labels[order], return_index=True)[1]
    return detected.take(np.sort(order[first]))


def detection_rows(pictures, detections, parts, lists_absent=False):
    """[dict] for the CSV: image, part, score, state, its probabilities, x1 y1 x2 y2, seen, warning, error.

    pictures: M dicts of what all rows of a picture say: image, seen (of seen_rows.WORDS) and maybe
    warning; of one that could not be read, and so has no detections, image and error. lists_absent:
    a row for each part not detected. A picture without any detection has a row without a part.
    """
    rows = []
    for known, detected in zip(pictures, detections):
        own = []
        states = detected.called()
        for d, label in enumerate(detected.labels):
            row = {"part": parts[label], "score": detected.scores[d]}
            if detected.states is not None:
                row["state"] = part_boxes.STATES[states[d]]
                row |= zip(PROBABILITY_COLUMNS, detected.states[d])
            own.append(row | dict(zip(BOX_COLUMNS, detected.boxes[d])))
        if lists_absent and "error" not in known:
            absent = part_boxes.STATES[part_boxes.ABSENT]
            own += [{"part": part, "state": absent} for part in np.delete(parts, detected.labels)]
        rows += [known | row for row in own or [{}]]
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def coco_results(rows, image_ids, category_ids):
    """COCO results of detection_rows.

    image_ids: {image: id}, category_ids: {part: id}, as the annotation file writes them.
    """
    results = []
    for row in rows:
        if row["score"] is None:  # a picture without a detection, or an absent part
            continue
        entry = {
            "image_id": image_ids[row["image"]],
            "category_id": category_ids[row["part"]],
            "bbox": part_boxes.to_xywh(*(row[column] for column in BOX_COLUMNS)),
            "score": row["score"],
            "file_name": row["image"],
            "seen": row["seen"],
            "part": row["part"]}
        if row["state"]:
            entry["state"] = row["state"]
            entry["state_probabilities"] = [row[column] for column in PROBABILITY_COLUMNS]
        results.append(entry)
    return results


def read_results(path, annotated, box_format):
    """COCO results of any program -> (parts, Detections and one of seen_rows.WORDS for each image, notes).

    annotated: Annotations of these images; parts: theirs, then what else the results name as their
    `part`. The state stands in state_probabilities or in state (text or number), or nowhere: then
    they are plain detections. box_format: one of part_boxes.BOX_FORMATS, None for xywh. UserError
    that lists what cannot be read.
    """
    entries = common.read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise common.UserError(f"{path}: expected a list of COCO results, each an object, found {str(entries)[:60]}")
    reading = part_boxes.Reading(box_format or "xywh", "state")
    found = part_boxes.read_coco(path, results_as_coco(entries, annotated, reading), reading)
    parts = list(found.category_ids)
    listed = [each for image in found.images for each in image.objects]
    states = {each.key: read_states(each, reading.faults) for each in listed}
    for each in listed:
        score = each.fields.get("score")
        if part_boxes.read_number(score) is None:
            reading.faults.append(f"{each.key}: score {score!r} is no number")
        if np.less(each.box[2:], each.box[:2]).any():
            reading.faults.append(f"{each.key}: its box has a negative width or height")
    n_without = list(states.values()).count(None)
    if 0 < n_without < len(listed):
        reading.faults.append(f"{n_without} of {len(listed)} results have no state")
    part_boxes.refuse(reading.faults, f"{path}: cannot be read:", "Correct these entries.")
    part_boxes.refuse_other_convention(found.images, path, box_format)
    detections = []
    seen = []
    for image in found.images:
        own = image.objects
        boxes = np.array([each.box for each in own], float).reshape(-1, 4)
        detections.append(detection_scores.Detections(
            boxes=boxes.clip(0, [*image.size, *image.size]),  # as the annotated ones
            labels=np.array([parts.index(each.part) for each in own], int),
            scores=np.array([part_boxes.read_number(each.fields["score"]) for each in own], float),
            states=None if n_without else np.reshape([states[each.key] for each in own], (-1, N_STATES))))
        words = [each.fields.get("seen") for each in own]
        seen.append(next((word for word in seen_rows.WORDS if word in words), "not known"))  # the worst
    return parts, detections, np.array(seen), [f"{path.name}: {note}" for note in found.notes]


def results_as_coco(entries, annotated, reading):
    """COCO results, and the images and categories of Annotations -> COCO.

    The file_name decides, where it fits one image: a program may have written image ids of its own.
    Then a result whose file_name fits none is left out.
    """
    ids = dict(annotated.category_ids)
    image_ids = {file_names.clean_name(image.name): part_boxes.read_id(image.id) for image in annotated.images}
    names = [file_names.clean_name(entry.get("file_name") or "") for entry in entries]
    fits = file_names.NameIndex(image_ids, file_names.IMAGE_SUFFIXES).match(set(names), exact=False)
    meant = {name: image_ids[fit.files[0]] for name, fit in fits.items() if len(fit.files) == 1}
    annotations = []
    for number, (entry, name) in enumerate(zip(entries, names)):
        given = entry.get("image_id")
        image_id = meant.get(name, given)
        is_other = part_boxes.read_id(image_id) != part_boxes.read_id(given)
        reading.counts["results have the image_id of another image than their file_name, which decides"] += is_other
        if meant and name and not fits[name].files:
            reading.counts["results are of pictures that are not annotated, and left out"] += 1
            continue
        category = entry.get("category_id")
        part = entry.get("part")
        if isinstance(part, str):
            category = ids.setdefault(part, f"part {part}")
        annotations.append({
            **entry,
            "id": number,
            "entry": f"result {number}",
            "image_id": image_id,
            "category_id": category})
    return part_boxes.coco_content([image.fields for image in annotated.images], annotations, ids)


def read_states(found, faults):
    """S probabilities of a result, from state_probabilities or its state; None where it names none."""
    given = found.fields.get("state_probabilities")
    if given is None:
        return None if found.state == part_boxes.UNKNOWN else np.eye(N_STATES)[found.state].tolist()
    numbers = list(map(part_boxes.read_number, given)) if isinstance(given, list) else []
    is_whole = len(numbers) == N_STATES and None not in numbers
    # two digits add up to 1 as far as this
    if not is_whole or min(numbers) < 0 or abs(sum(numbers) - 1) > 0.005 * N_STATES + 1e-6:
        faults.append(f"{found.key}: expected {N_STATES} state_probabilities from 0 to 1 with sum "
                      f"1, found {str(given)[:60]}")
    return numbers
