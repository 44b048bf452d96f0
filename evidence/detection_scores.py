"""Detections against boxes: COCO matching, average precision, states, and intervals over pictures.

Letters: M pictures scored, P parts, S states, K boxes and D detections of one picture, C categories.
"""
import contextlib
import copy
import io
import math

import numpy as np

from evidence import subject_intervals
from readers import part_boxes

LOWEST_SCORE, FOUND_IOU = 0.05, 0.5  # detections below this score are never listed; a part is found from this overlap


def state_of(detected):
    """(D,) most probable state of each detection; UNKNOWN for a plain detector."""
    return np.full(len(detected["scores"]), part_boxes.UNKNOWN) if detected["states"] is None else detected["states"].argmax(1)


def coco_set(annotations, n_pictures, categories):
    """A pycocotools data set in memory; ids count from 1, since its matching takes 0 for no match."""
    from pycocotools.coco import COCO
    made = COCO()
    made.dataset = {"images": [{"id": k} for k in range(n_pictures)], "categories": [{"id": c} for c in categories],
                    "annotations": [{**each, "id": k} for k, each in enumerate(annotations, start=1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        made.createIndex()
    return made


def coco_match(study, rows, detections, kind, absent):
    """Detections of M pictures matched with their boxes by pycocotools at IoU .5 to .95 -> its COCOeval.

    kind: parts; joint, where part and state together are the category; present, without boxes of absent parts and
    without detections called absent. Ignored boxes, and in joint those without a state, count neither way.
    """
    from pycocotools.cocoeval import COCOeval
    truth, found = [], []
    for picture, (row, detected) in enumerate(zip(rows, detections)):
        drop = absent == "drop" or kind == "present"
        boxes = zip(study.boxes[row], study.labels[row], study.states[row], study.ignored[row])
        for box, label, state, ignored in boxes:
            if not (drop and state == part_boxes.ABSENT):
                truth += coco_entries(picture, box, label, state, kind, bool(ignored))
        boxes = zip(detected["boxes"], detected["labels"], state_of(detected), detected["scores"])
        for box, label, state, score in boxes:
            if not (kind == "present" and state == part_boxes.ABSENT):
                found += [{**entry, "score": float(score)}
                          for entry in coco_entries(picture, box, label, state, kind, False)]
    categories = sorted({entry["category_id"] for entry in truth if not entry["iscrowd"]})
    categories = list(range(1, len(study.parts) + 1)) if kind != "joint" else categories
    matching = COCOeval(coco_set(truth, len(rows), categories), coco_set(found, len(rows), categories), "bbox")
    matching.params.imgIds, matching.params.catIds = list(range(len(rows))), categories
    matching.params.areaRng, matching.params.areaRngLbl, matching.params.maxDets = [[0, 1e10]], ["all"], [100]
    with contextlib.redirect_stdout(io.StringIO()):
        matching.evaluate()
    return matching


def coco_entries(picture, box, label, state, kind, ignored):
    """COCO annotations of one box: one, or a crowd box in each state where a joint category has no state."""
    left, top, right, bottom = map(float, box)
    entry = {"image_id": picture, "bbox": [left, top, right - left, bottom - top], "state": int(state),
             "area": (right - left) * (bottom - top), "iscrowd": int(ignored)}
    if kind != "joint":
        return [{**entry, "category_id": int(label) + 1}]
    states = [int(state)] if state >= 0 else range(len(part_boxes.STATES))
    return [{**entry, "category_id": int(label) * len(part_boxes.STATES) + each + 1, "iscrowd": int(ignored or state < 0)}
            for each in states]


def average_precision(matching, pictures):
    """(T, C) AP of each IoU threshold and category over these pictures (repeats count), NaN where there is no box."""
    drawn, categories = copy.copy(matching), matching.params.catIds
    if not categories:
        return np.full((len(matching.params.iouThrs), 0), np.nan)
    cells = np.empty(len(matching.evalImgs), object)
    cells[:] = matching.evalImgs
    drawn.params = copy.copy(matching.params)
    drawn.params.imgIds, drawn._paramsEval = list(range(len(pictures))), drawn.params
    drawn.evalImgs = cells.reshape(len(categories), -1)[:, pictures].ravel().tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        drawn.accumulate()
    precision = drawn.eval["precision"][:, :, :, 0, 0]  # (T, recall, C), -1 where there is no box
    return np.where((precision < 0).any(1), np.nan, precision.mean(1))


def count_matches(matching, n_parts, threshold):
    """Counts of each picture from COCO's matching at IoU .5: truth, right, wrong (M, P) and confusion (M, S, S).

    right and wrong: detections from `threshold`; confusion: true x predicted state of every box found at any score.
    """
    n_pictures = len(matching.params.imgIds)
    counts = {name: np.zeros((n_pictures, n_parts)) for name in ("truth", "right", "wrong")}
    confusion = np.zeros((n_pictures, len(part_boxes.STATES), len(part_boxes.STATES)))
    for cell in (cell for cell in matching.evalImgs if cell is not None):
        place = cell["image_id"], cell["category_id"] - 1
        hit, judged = cell["dtMatches"][0] > 0, ~np.asarray(cell["dtIgnore"][0], bool)
        sure = np.array(cell["dtScores"]) >= threshold
        counts["truth"][place] += np.sum(np.asarray(cell["gtIgnore"]) == 0)
        counts["right"][place] += np.sum(hit & judged & sure)
        counts["wrong"][place] += np.sum(~hit & judged & sure)
        for own, other in zip(np.array(cell["dtIds"])[hit & judged], cell["dtMatches"][0][hit & judged]):
            true, predicted = matching.cocoGt.anns[int(other)]["state"], matching.cocoDt.anns[int(own)]["state"]
            if true >= 0 and predicted >= 0:
                confusion[place[0], true, predicted] += 1
    return {**counts, "confusion": confusion}


def count_hallucinations(study, rows, detections, threshold):
    """(M, P, 5) absent parts; claimed (a detection not called absent) anywhere; absent parts with a box; claimed there;
    detected there under any state."""
    counts = np.zeros((len(rows), len(study.parts), 5))
    for picture, (row, detected) in enumerate(zip(rows, detections)):
        is_absent, sure = study.states[row] == part_boxes.ABSENT, detected["scores"] >= threshold
        claimed = sure & (state_of(detected) != part_boxes.ABSENT)
        boxed = set(study.labels[row][is_absent].tolist())
        for label in boxed | set(study.absent[row].tolist()):
            own = detected["labels"] == label
            counts[picture, label, :2] += [1, (own & claimed).any()]
            if label in boxed:
                there = overlaps(detected["boxes"], study.boxes[row][is_absent & (study.labels[row] == label)])
                counts[picture, label, 2:] += [1, (own & claimed & there).any(), (own & sure & there).any()]
    return counts


def overlaps(boxes, others):
    """(D,) True where a box (D, 4) overlaps one of the others (K, 4) with IoU .5 or more."""
    corner, end = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = np.clip(end - corner, 0, None).prod(2)  # (D, K)
    area, other_area = (boxes[:, 2:] - boxes[:, :2]).prod(1), (others[:, 2:] - others[:, :2]).prod(1)
    return (shared / (area[:, None] + other_area - shared) >= FOUND_IOU).any(1)


def state_scores(confusion):
    """(S, S) counts, true x predicted -> accuracy, macro F1 over states that occur, mean recall of the true ones."""
    true, predicted, right = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    return {"state_accuracy": share(right.sum(), true.sum()),
            "macro_f1": mean_of(2 * right[true + predicted > 0] / (true + predicted)[true + predicted > 0]),
            "balanced_accuracy": mean_of(right[true > 0] / true[true > 0])}


def share(part, whole):
    """part / whole as float, NaN for an empty whole."""
    return float(part / whole) if whole else math.nan


def mean_of(values):
    """Mean of the finite values, NaN where there are none."""
    values = np.asarray(values, float)[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


class Judged:
    """Detections of M pictures against their boxes: `values(pictures)` gives every number over any pictures of them."""

    def __init__(self, study, rows, detections, settings, threshold, absent, baseline=None):
        self.study, self.rows, self.parts = study, rows, settings["parts"]
        self.has_states, self.every = bool(settings["states"]), np.arange(len(rows))
        kinds = {"map": "parts", **({"joint_map": "joint", "map_present": "present"} if self.has_states else {})}
        self.matching = {name: coco_match(study, rows, detections, kind, absent) for name, kind in kinds.items()}
        if baseline is not None:
            self.matching |= {f"baseline_{name}": coco_match(study, rows, baseline, kinds[name], absent)
                              for name in kinds if name != "map_present"}
        self.counts = count_matches(self.matching["map"], len(self.parts), threshold)
        self.hallucinated = count_hallucinations(study, rows, detections, threshold)

    def epoch_metrics(self):
        """The columns of an epoch: map, map50, and with states joint_map and state_accuracy."""
        ap = average_precision(self.matching["map"], self.every)
        values = {"map": mean_of(ap), "map50": mean_of(ap[0])}
        if self.has_states:
            values["joint_map"] = mean_of(average_precision(self.matching["joint_map"], self.every))
            values["state_accuracy"] = state_scores(self.counts["confusion"].sum(0))["state_accuracy"]
        return values

    def values(self, pictures):
        """{name: float} over these pictures, repeats count; ap_PART for each part."""
        ap = {name: average_precision(matching, pictures) for name, matching in self.matching.items()}  # (T, C)
        values = {name: mean_of(each) for name, each in ap.items()} | {"map50": mean_of(ap["map"][0])}
        values |= {f"difference_{name}": values[name] - values[f"baseline_{name}"] for name in ("map", "joint_map")
                   if f"baseline_{name}" in values}
        truth, right, wrong = (self.counts[name][pictures].sum() for name in ("truth", "right", "wrong"))
        values |= {"precision": share(right, right + wrong), "recall": share(right, truth)}
        absent, anywhere, boxed, there, detected = self.hallucinated[pictures].sum((0, 1))
        values |= {"hallucination_rate": share(there, boxed), "hallucination_rate_anywhere": share(anywhere, absent),
                   "absent_box_detected": share(detected, boxed)}
        if self.has_states:
            confusion = self.counts["confusion"][pictures].sum(0)
            intact = np.zeros_like(confusion)
            intact[:, part_boxes.INTACT] = confusion.sum(1)
            values |= state_scores(confusion)
            values |= {f"always_intact_{name}": value for name, value in state_scores(intact).items()}
        return values | {f"ap_{part}": mean_of(ap["map"][:, label]) for label, part in enumerate(self.parts)}

    def intervals(self, draws, seed):
        """({name: (low, high)} or {}, the method in words): images, or groups where there are some, are resampled.

        From 20 of them: bootstrap, t times the sd of the draws about the value less the bias that the draws show (AP on
        few pictures is too high); 5 to 19: t-interval on the jackknife; fewer: none.
        """
        groups = self.study.groups[self.rows] if self.study.groups is not None else self.every
        unit, names = "images" if self.study.groups is None else "groups", sorted(set(groups.tolist()))
        members = [self.every[groups == name] for name in names]
        count, rng = len(members), np.random.default_rng(seed)
        if count < subject_intervals.FEWEST_FOR_INTERVAL:
            return {}, f"no interval: only {count} {unit}"
        if count < subject_intervals.FEWEST_FOR_BOOTSTRAP:
            drawn = [self.values(np.concatenate(members[:k] + members[k + 1:])) for k in range(count)]
            reach, whole = subject_intervals.t_quantile(0.95, count - 1) * math.sqrt(count - 1), self.values(self.every)
            half = {name: reach * np.std([each[name] for each in drawn]) for name in whole}
            return ({name: (whole[name] - half[name], whole[name] + half[name]) for name in whole},
                    f"95 % t-interval over {count} {unit}, jackknife")
        drawn = [self.values(np.concatenate([members[k] for k in rng.integers(0, count, count)])) for _ in range(draws)]
        whole, ends, t = self.values(self.every), {}, subject_intervals.t_quantile(0.95, count - 1)
        for name in whole:
            column = np.array([each[name] for each in drawn if math.isfinite(each[name])])
            spread = column.std() if len(column) > 1 else math.nan
            half = t * math.sqrt(count / (count - 1)) * spread
            low, high = 2 * whole[name] - mean_of(column) + np.array([-half, half])
            floor = -1.0 if name.startswith("difference_") else 0.0
            ends[name] = (float(np.clip(low, floor, 1)), float(np.clip(high, floor, 1)))
        return ends, f"95 % bootstrap interval over {count} {unit}, {draws} draws"
