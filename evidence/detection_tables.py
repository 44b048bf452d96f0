"""Detections as files: COCO results and CSV, written by prediction and read back to be judged.

Letters: D detections of one picture, P parts, S states.
"""
import dataclasses
import itertools

import numpy as np

import common
from evidence import detection_scores
from readers import part_boxes

BOX_COLUMNS = ("x1", "y1", "x2", "y2")
ROUNDING = 0.02  # probabilities with two digits add up to 1 up to this


def best_of_each_part(detected, threshold):
    """The detections of one picture from `threshold`, only the best of each part."""
    detected = detected.take(detected.scores >= threshold)
    order = np.argsort(-detected.scores, kind="stable")
    first = np.unique(detected.labels[order], return_index=True)[1]
    return detected.take(np.sort(order[first]))


def coco_results(names, ids, detections, parts, category_ids, seen):
    """COCO results: image_id and category_id as the annotation file writes them.

    category_ids: {part: id} of that file; parts that it lacks get the smallest free ids from 1;
    seen: (M,) of common.SEEN_WORDS.
    """
    taken = set(category_ids.values())
    free = (own for own in itertools.count(1) if own not in taken)
    own_ids = [category_ids[part] if part in category_ids else next(free) for part in parts]
    results = []
    for name, own, detected, word in zip(names, ids, detections, seen):
        states = detected.called()
        for d, label in enumerate(detected.labels):
            left, top, right, bottom = detected.boxes[d]
            entry = {
                "image_id": own,
                "category_id": own_ids[label],
                "bbox": [left, top, right - left, bottom - top],
                "score": detected.scores[d],
                "file_name": name,
                "seen": word,
                "part": parts[label]}
            if detected.states is not None:
                entry["state"] = part_boxes.STATES[states[d]]
                entry["state_probabilities"] = detected.states[d]
            results.append(entry)
    return results


def detection_rows(names, detections, parts, seen, errors=None, lists_absent=False):
    """[dict] for the CSV: image, part, score, state, its probabilities, x1 y1 x2 y2, seen, error.

    seen: (M,) of common.SEEN_WORDS; errors: text of each picture that could not be read, else "";
    lists_absent: a row for each part not detected.
    """
    probabilities = [f"p_{state}" for state in part_boxes.STATES]
    errors = errors or [""] * len(detections)
    columns = ["image", "part", "score", *BOX_COLUMNS, "seen"]
    if lists_absent or any(detected.states is not None for detected in detections):
        columns[3:3] = ["state", *probabilities]
    if any(errors):
        columns.append("error")
    rows = []
    for name, detected, word, error in zip(names, detections, seen, errors):
        if error:
            rows.append({"image": name, "error": error})
            continue
        states = detected.called()
        for d, label in enumerate(detected.labels):
            row = {"image": name, "part": parts[label], "score": detected.scores[d]}
            if detected.states is not None:
                row["state"] = part_boxes.STATES[states[d]]
                row |= zip(probabilities, detected.states[d])
            row |= zip(BOX_COLUMNS, detected.boxes[d])
            rows.append(row | {"seen": word})
        for label, part in enumerate(parts if lists_absent else ()):
            if label not in detected.labels:
                absent = part_boxes.STATES[part_boxes.ABSENT]
                rows.append({"image": name, "part": part, "state": absent, "seen": word})
    return [{column: row.get(column) for column in columns} for row in rows or [{}]]


@dataclasses.dataclass
class FoundBox:
    """One COCO result."""
    part: str
    box: list  # x1, y1, x2, y2
    score: float
    states: np.ndarray | None  # (S,) probabilities, None where it names no state
    seen: str  # of common.SEEN_WORDS
    area: None = None  # not known, see part_boxes.refuse_other_convention


def read_results(path, images, category_ids, box_format):
    """COCO results of any program -> (parts, Detections and one of common.SEEN_WORDS for each AnnotatedImage).

    parts: those of category_ids {part: id}, then what else the results name as their `part`. The
    state stands in state_probabilities or in state (text or number), or nowhere: then they are
    plain detections. box_format: one of part_boxes.BOX_FORMATS, None for xywh.
    """
    entries = common.read_json(path)
    if not isinstance(entries, list):
        raise common.UserError(f"{path}: expected a list of COCO results, found a {type(entries).__name__}")
    place = {part_boxes.read_id(image.id): k for k, image in enumerate(images)}
    part_of = {part_boxes.read_id(own): part for part, own in category_ids.items()}
    found = [[] for _ in images]
    faults = []
    for number, entry in enumerate(entries):
        where = f"result {number}"
        if not isinstance(entry, dict):
            faults.append(f"{where}: expected an object, found {str(entry)[:60]}")
            continue
        picture = place.get(part_boxes.read_id(entry.get("image_id")))
        if picture is None:
            faults.append(f"{where}: unknown image_id {entry.get('image_id')!r}")
            continue
        found[picture].append(read_result(entry, part_of, images[picture].size, box_format or "xywh", where, faults))
    listed = [each for row in found for each in row]
    n_states = sum(each.states is not None for each in listed)
    if 0 < n_states < len(listed):
        faults.append(f"{len(listed) - n_states} of {len(listed)} results have no state")
    part_boxes.refuse(faults, f"{path}: cannot be read:", "Correct these entries.")
    part_boxes.refuse_other_convention(found, [image.size for image in images], path, box_format)
    parts = list(dict.fromkeys([*category_ids, *(each.part for each in listed)]))
    seen = [common.worst_seen([each.seen for each in row] or ["not known"]) for row in found]
    return parts, [stack_detections(row, parts, n_states > 0) for row in found], np.array(seen)


def read_result(entry, part_of, size, box_format, where, faults):
    """One COCO result -> FoundBox; what is wrong with it is appended to the faults."""
    part = entry.get("part", part_of.get(part_boxes.read_id(entry.get("category_id"))))
    score = part_boxes.read_number(entry.get("score"))
    if not isinstance(part, str):
        faults.append(f"{where}: unknown category_id {entry.get('category_id')!r}")
    if score is None:
        faults.append(f"{where}: score {entry.get('score')!r} is no number")
    seen = entry.get("seen")
    return FoundBox(
        part=part,
        box=part_boxes.read_box(entry.get("bbox"), where, faults, box_format, size),
        score=score,
        states=read_states(entry, where, faults),
        seen=seen if seen in common.SEEN_WORDS else "not known")


def read_states(entry, where, faults):
    """(S,) probabilities of a result, from state_probabilities or state; None where it names none."""
    n_states = detection_scores.N_STATES
    given = entry.get("state_probabilities")
    if given is None:
        state = part_boxes.read_state([entry.get("state")], where, faults)
        return None if state == part_boxes.UNKNOWN else np.eye(n_states)[state]
    numbers = list(map(part_boxes.read_number, given)) if isinstance(given, list) else []
    is_whole = len(numbers) == n_states and None not in numbers
    if not is_whole or min(numbers) < 0 or abs(sum(numbers) - 1) > ROUNDING:
        faults.append(f"{where}: expected {n_states} state_probabilities from 0 to 1 with sum 1, found "
                      f"{str(given)[:60]}")
    return np.array(numbers)


def stack_detections(listed, parts, has_states):
    """FoundBoxes of one picture -> Detections."""
    states = None
    if has_states:
        states = np.array([each.states for each in listed]).reshape(-1, detection_scores.N_STATES)
    return detection_scores.Detections(
        boxes=np.array([each.box for each in listed], float).reshape(-1, 4),
        labels=np.array([parts.index(each.part) for each in listed], int),
        scores=np.array([each.score for each in listed], float),
        states=states)
