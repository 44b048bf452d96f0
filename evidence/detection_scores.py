"""Detections against boxes: COCO matching, average precision, states, and intervals over pictures.

Letters: M pictures scored, P parts, S states, K boxes and D detections of one picture, C categories.
"""
import contextlib
import copy
import io
import math

import numpy as np

import common
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
    made.dataset = {"images": [{"id": k} for k in range(n_pictures)],
                    "categories": [{"id": c} for c in categories],
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
        truth += true_entries(study, row, picture, kind, absent)
        states = state_of(detected)
        for box, label, state, score in zip(detected["boxes"], detected["labels"], states, detected["scores"]):
            if kind != "present" or state != part_boxes.ABSENT:
                entries = coco_entries(picture, box, label, state, kind, ignored=False)
                found += [{**entry, "score": float(score)} for entry in entries]
    categories = list(range(1, len(study.parts) + 1))
    if kind == "joint":
        categories = sorted({entry["category_id"] for entry in truth if not entry["iscrowd"]})
    matching = COCOeval(coco_set(truth, len(rows), categories), coco_set(found, len(rows), categories), "bbox")
    matching.params.imgIds = list(range(len(rows)))
    matching.params.catIds = categories
    matching.params.areaRng = [[0, 1e10]]
    matching.params.areaRngLbl = ["all"]
    matching.params.maxDets = [100]
    with contextlib.redirect_stdout(io.StringIO()):
        matching.evaluate()
    return matching


def true_entries(study, row, picture, kind, absent):
    """COCO annotations of the true boxes of a row."""
    entries = []
    boxes = zip(study.boxes[row], study.labels[row], study.states[row], study.ignored[row])
    for box, label, state, ignored in boxes:
        if state != part_boxes.ABSENT or (absent != "drop" and kind != "present"):
            entries += coco_entries(picture, box, label, state, kind, bool(ignored))
    return entries


def coco_entries(picture, box, label, state, kind, ignored):
    """COCO annotations of one box: one, or a crowd box in each state where a joint category has no state."""
    left, top, right, bottom = map(float, box)
    entry = {"image_id": picture, "bbox": [left, top, right - left, bottom - top], "state": int(state),
             "area": (right - left) * (bottom - top), "iscrowd": int(ignored)}
    if kind != "joint":
        return [{**entry, "category_id": int(label) + 1}]
    first = int(label) * len(part_boxes.STATES) + 1
    if state >= 0:
        return [{**entry, "category_id": first + int(state)}]
    return [{**entry, "category_id": first + each, "iscrowd": 1} for each in range(len(part_boxes.STATES))]


def average_precision(matching, pictures):
    """(T, C) AP of each IoU threshold and category over these pictures (repeats count), NaN where there is no box."""
    categories = matching.params.catIds
    if not categories:
        return np.full((len(matching.params.iouThrs), 0), np.nan)
    cells = np.empty(len(matching.evalImgs), object)
    cells[:] = matching.evalImgs
    drawn = copy.copy(matching)
    drawn.params = copy.copy(matching.params)
    drawn.params.imgIds = list(range(len(pictures)))
    drawn._paramsEval = drawn.params
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
    n_states = len(part_boxes.STATES)
    counts = {name: np.zeros((n_pictures, n_parts)) for name in ("truth", "right", "wrong")}
    confusion = np.zeros((n_pictures, n_states, n_states))
    for cell in matching.evalImgs:
        if cell is None:
            continue
        picture, part = cell["image_id"], cell["category_id"] - 1
        hit = cell["dtMatches"][0] > 0
        judged = ~np.asarray(cell["dtIgnore"][0], bool)
        sure = np.array(cell["dtScores"]) >= threshold
        counts["truth"][picture, part] += np.sum(np.asarray(cell["gtIgnore"]) == 0)
        counts["right"][picture, part] += np.sum(hit & judged & sure)
        counts["wrong"][picture, part] += np.sum(~hit & judged & sure)
        found = np.array(cell["dtIds"])[hit & judged]
        for own, other in zip(found, cell["dtMatches"][0][hit & judged]):
            true = matching.cocoGt.anns[int(other)]["state"]
            predicted = matching.cocoDt.anns[int(own)]["state"]
            if true >= 0 and predicted >= 0:
                confusion[picture, true, predicted] += 1
    return {**counts, "confusion": confusion}


def count_hallucinations(study, rows, detections, threshold):
    """(M, P, 5) absent parts; claimed (a detection not called absent) anywhere; absent parts with a box; claimed there;
    detected there under any state."""
    counts = np.zeros((len(rows), len(study.parts), 5))
    for picture, (row, detected) in enumerate(zip(rows, detections)):
        is_absent = study.states[row] == part_boxes.ABSENT
        sure = detected["scores"] >= threshold
        claimed = sure & (state_of(detected) != part_boxes.ABSENT)
        boxed = set(study.labels[row][is_absent].tolist())
        for label in boxed | set(study.absent[row].tolist()):
            own = detected["labels"] == label
            counts[picture, label, :2] += [1, (own & claimed).any()]
            if label in boxed:
                places = study.boxes[row][is_absent & (study.labels[row] == label)]
                there = own & overlaps(detected["boxes"], places)
                counts[picture, label, 2:] += [1, (claimed & there).any(), (sure & there).any()]
    return counts


def overlaps(boxes, others):
    """(D,) True where a box (D, 4) overlaps one of the others (K, 4) with IoU .5 or more."""
    corner = np.maximum(boxes[:, None, :2], others[:, :2])
    end = np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = np.clip(end - corner, 0, None).prod(2)  # (D, K)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    other_area = (others[:, 2:] - others[:, :2]).prod(1)
    return (shared / (area[:, None] + other_area - shared) >= FOUND_IOU).any(1)


def state_scores(confusion):
    """(S, S) counts, true x predicted -> accuracy, macro F1 over states that occur, mean recall of the true ones."""
    found, _ = common.confusion_metrics(confusion[None])
    return {"state_accuracy": float(found["accuracy"][0]),
            "macro_f1": float(found["macro_f1"][0]),
            "balanced_accuracy": float(found["balanced_accuracy"][0])}


def share(part, whole):
    """part / whole as float, NaN for an empty whole."""
    return float(part / whole) if whole else math.nan


def mean_of(values):
    """Mean of the finite values, NaN where there are none."""
    return float(common.mean_without_nan(np.ravel(values)))


class Judged:
    """Detections of M pictures against their boxes: every number over any of the pictures, and its intervals."""

    def __init__(self, study, rows, detections, settings, threshold, absent, baseline=None):
        self.study, self.rows = study, rows
        self.parts = settings["parts"]
        self.has_states = bool(settings["states"])
        self.every = np.arange(len(rows))
        kinds = {"map": "parts"}
        if self.has_states:
            kinds |= {"joint_map": "joint", "map_present": "present"}
        self.matching = {name: coco_match(study, rows, detections, kind, absent) for name, kind in kinds.items()}
        self.of_baseline = {}
        if baseline is not None:
            self.of_baseline = {name: coco_match(study, rows, baseline, kind, absent)
                                for name, kind in kinds.items() if name != "map_present"}
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
        """({metric: float}, {"ap": (P,)}) of the model over these pictures, repeats count."""
        overall, each = average_precisions(self.matching, pictures)
        truth, right, wrong = (self.counts[name][pictures].sum() for name in ("truth", "right", "wrong"))
        absent, anywhere, boxed, there, detected = self.hallucinated[pictures].sum((0, 1))
        overall |= {"precision": share(right, right + wrong), "recall": share(right, truth),
                    "hallucination_rate": share(there, boxed), "hallucination_rate_anywhere": share(anywhere, absent),
                    "absent_box_detected": share(detected, boxed)}
        if self.has_states:
            overall |= state_scores(self.counts["confusion"][pictures].sum(0))
        return overall, each

    def baseline_values(self, pictures):
        """As values: AP of the baseline's detections, and the states of the model's where all are called intact."""
        overall, each = average_precisions(self.of_baseline, pictures)
        if self.has_states:
            confusion = self.counts["confusion"][pictures].sum(0)
            intact = np.zeros_like(confusion)
            intact[:, part_boxes.INTACT] = confusion.sum(1)
            overall |= state_scores(intact)
        return overall, each

    def result(self, draws, seed):
        """The subject_intervals.Result over all pictures; resampled are images, or groups where there are some."""
        groups = self.study.groups
        owners = self.every if groups is None else np.unique(groups[self.rows], return_inverse=True)[1]

        def over_draws(values):
            def statistic(weights):
                times = weights.astype(int)[:, owners]  # (D, M)
                return stack_draws([values(np.repeat(self.every, drawn)) for drawn in times])
            return statistic
        return subject_intervals.estimate(
            over_draws(self.values), over_draws(self.baseline_values) if self.of_baseline else None,
            owners.max() + 1, "images" if groups is None else "groups", draws, seed, names=self.parts,
            n=self.counts["truth"].sum(0).astype(int), rows=len(self.rows), baseline_name="mean box")


def stack_draws(draws):
    """[(overall, each) of each of D draws] -> (overall {metric: (D,)}, each {metric: (D, P)})."""
    overall, each = zip(*draws)
    return ({metric: np.array([draw[metric] for draw in overall]) for metric in overall[0]},
            {metric: np.array([draw[metric] for draw in each]) for metric in each[0]})


def average_precisions(matchings, pictures):
    """({map, map50, ...: float}, {"ap": (P,)}) of COCO matchings by name over these pictures; map50, ap: of map."""
    overall, each = {}, {}
    for name, matching in matchings.items():
        ap = average_precision(matching, pictures)  # (T, C)
        overall[name] = mean_of(ap)
        if name == "map":
            overall["map50"] = mean_of(ap[0])
            each["ap"] = common.mean_without_nan(ap, axis=0)
    return overall, each
