"""Detections against boxes: COCO matching, average precision, states, and intervals over pictures.

Letters: M pictures scored, P parts, S states, K boxes and D detections of one picture, C
categories, T IoU thresholds.
"""
import contextlib
import copy
import dataclasses
import io

import numpy as np
import torch

import common
from evidence import class_scores, subject_intervals
from readers import part_boxes

FOUND_IOU = 0.5  # a part is found from this overlap
N_STATES = len(part_boxes.STATES)
N_DRAWS = 200  # of resamples, each a pass of pycocotools


@dataclasses.dataclass
class Detections:
    """What a detector found in one picture."""
    boxes: np.ndarray  # (D, 4) in pixels of the picture on disk
    labels: np.ndarray  # (D,) int from 0
    scores: np.ndarray  # (D,) float
    states: np.ndarray | None  # (D, S) probabilities, None for a plain detector

    def take(self, chosen):
        """The detections of a mask (D,) or of places."""
        states = None if self.states is None else self.states[chosen]
        return Detections(self.boxes[chosen], self.labels[chosen], self.scores[chosen], states)

    def called(self):
        """(D,) most probable state; UNKNOWN for a plain detector."""
        if self.states is None:
            return np.full(len(self.scores), part_boxes.UNKNOWN)
        return self.states.argmax(1)


def coco_set(annotations):
    """A pycocotools data set in memory; ids count from 1, since its matching takes 0 for no match."""
    from pycocotools.coco import COCO
    made = COCO()
    numbered = [{**each, "id": k} for k, each in enumerate(annotations, start=1)]
    made.dataset = {"annotations": numbered, "categories": []}
    made.createIndex()
    return made


def coco_match(truth, detections, kind):
    """Detections of M pictures matched with their boxes at IoU .5 to .95 -> pycocotools' COCOeval.

    kind: map; joint_map, where part and state together are the category; map_present, without boxes
    of absent parts and without detections called absent. Ignored boxes, and in joint_map those
    without a state, count neither way.
    """
    from pycocotools.cocoeval import COCOeval
    annotated = []
    found = []
    for picture, detected in enumerate(detections):
        kept = truth.shown(picture)
        ignored = truth.ignored[picture][kept]
        states = np.where(ignored, part_boxes.UNKNOWN, truth.states[picture][kept])
        annotated += coco_entries(
            picture, truth.boxes[picture][kept], truth.labels[picture][kept], states, kind, iscrowd=ignored)
        found += coco_entries(
            picture, detected.boxes, detected.labels, detected.called(), kind,
            score=detected.scores, place=range(len(detected.scores)))
    categories = range(1, len(truth.parts) + 1)
    if kind == "joint_map":
        categories = sorted({entry["category_id"] for entry in annotated if not entry["iscrowd"]})
    with contextlib.redirect_stdout(io.StringIO()):
        matching = COCOeval(coco_set(annotated), coco_set(found), "bbox")
        matching.params.imgIds = range(len(detections))
        matching.params.catIds = categories
        matching.params.areaRng = [[0, 1e10]]
        matching.params.maxDets = [100]
        matching.evaluate()
    return matching


def coco_entries(picture, boxes, labels, states, kind, **fields):
    """COCO annotations of the K boxes of a picture; kind: of coco_match; fields: {name: (K,)}.

    A box without a state, kind joint_map: a crowd box in each state.
    """
    entries = []
    for k, box in enumerate(boxes.tolist()):
        if kind == "map_present" and states[k] == part_boxes.ABSENT:
            continue
        entry = {
            "image_id": picture,
            "bbox": part_boxes.to_xywh(*box),
            "area": 0,  # all lie in the one range of areas
            "iscrowd": 0,
            "state": states[k],
            **{name: values[k] for name, values in fields.items()}}
        categories = [labels[k] + 1]
        if kind == "joint_map":
            first = labels[k] * N_STATES + 1
            categories = [first + states[k]] if states[k] >= 0 else range(first, first + N_STATES)
            entry["iscrowd"] |= states[k] < 0
        entries += [{**entry, "category_id": each} for each in categories]
    return entries


def average_precision(matching, pictures):
    """(T, C) AP over these pictures (repeats count), NaN for a category without a box there.

    What coco_match found in each of them is put together anew; nothing is matched again.
    """
    categories = matching.params.catIds
    cells = np.array(matching.evalImgs, object)  # pycocotools' order: category x area (one here) x image
    drawn = copy.copy(matching)
    drawn.params = copy.copy(matching.params)
    drawn.params.imgIds = range(len(pictures))
    drawn._paramsEval = drawn.params
    drawn.evalImgs = cells.reshape(len(categories), len(matching.params.imgIds))[:, pictures].ravel().tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        drawn.accumulate()
    precision = drawn.eval["precision"][:, :, :, 0, 0]  # (T, recall, C), -1 where there is no box
    return np.where((precision < 0).any(1), np.nan, precision.mean(1))


@dataclasses.dataclass
class FoundStates:
    """The n boxes with a state that were found at IoU .5 and any score."""
    pictures: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)
    true: np.ndarray  # (n,) states
    probabilities: np.ndarray  # (n, S)


def found_states(matching, detections):
    """FoundStates of matched detections with states; a plain detector has none."""
    rows = []
    for cell in filter(None, matching.evalImgs):
        states = detections[cell["image_id"]].states
        for box, match, is_ignored in zip(cell["gtIds"], cell["gtMatches"][0], cell["gtIgnore"]):
            true = matching.cocoGt.anns[box]["state"]
            if match and not is_ignored and true >= 0 and states is not None:
                place = matching.cocoDt.anns[match]["place"]
                rows.append((cell["image_id"], cell["category_id"] - 1, true, *states[place]))
    rows = np.reshape(rows, (-1, 3 + N_STATES))
    return FoundStates(*rows[:, :3].astype(int).T, probabilities=rows[:, 3:])


def count_matches(matching, threshold):
    """Counts (M, P) of each picture at IoU .5: truth, and right and wrong detections from `threshold`."""
    shape = len(matching.params.imgIds), len(matching.params.catIds)
    counts = {name: np.zeros(shape) for name in ("truth", "right", "wrong")}
    for cell in filter(None, matching.evalImgs):
        place = cell["image_id"], cell["category_id"] - 1
        hit = cell["dtMatches"][0] > 0
        judged = ~cell["dtIgnore"][0] & (np.array(cell["dtScores"]) >= threshold)
        counts["truth"][place] += np.sum(cell["gtIgnore"] == 0)
        counts["right"][place] += np.sum(hit & judged)
        counts["wrong"][place] += np.sum(~hit & judged)
    return counts


def count_hallucinations(truth, detections, threshold):
    """Counts (M, P) of absent parts: absent, claimed (a detection not called absent) anywhere.

    And of those with a box: absent_boxes, claimed_there. A part annotated in another
    place too is not absent anywhere.
    """
    from torchvision.ops import box_iou
    counts = {name: np.zeros((len(detections), len(truth.parts)))
              for name in ("absent", "claimed", "absent_boxes", "claimed_there")}
    for picture, detected in enumerate(detections):
        labels = truth.labels[picture]
        said_absent = truth.states[picture] == part_boxes.ABSENT
        is_absent = said_absent & ~truth.ignored[picture]
        claimed = detected.take((detected.scores >= threshold) & (detected.called() != part_boxes.ABSENT))
        own = labels[is_absent]  # (K,)
        absent = np.setdiff1d(np.union1d(own, truth.absent[picture]), labels[~said_absent])
        counts["absent"][picture, absent] = 1
        counts["claimed"][picture, np.intersect1d(absent, claimed.labels)] = 1
        places = torch.from_numpy(truth.boxes[picture][is_absent])
        iou = box_iou(places, torch.from_numpy(claimed.boxes)).numpy()  # (K, D)
        is_claimed = (iou >= FOUND_IOU) & (own[:, None] == claimed.labels)
        counts["absent_boxes"][picture, own] = 1
        counts["claimed_there"][picture, own[is_claimed.any(1)]] = 1
    return counts


def state_scores(confusion):
    """(S, S) true x predicted -> accuracy, macro F1 of states that occur, mean recall of true ones."""
    found, _ = class_scores.confusion_metrics(confusion[None])
    return {
        "state_accuracy": found["accuracy"][0],
        "macro_f1": found["macro_f1"][0],
        "balanced_accuracy": found["balanced_accuracy"][0]}


def rates_of(counts):
    """Precision, recall and the rates of hallucination, NaN where nothing counts.

    counts: of count_matches and count_hallucinations, summed: numbers or (P,) each.
    """
    with common.undefined_is_nan():
        return {
            "precision": counts["right"] / (counts["right"] + counts["wrong"]),
            "recall": counts["right"] / counts["truth"],
            "hallucination_rate": counts["claimed_there"] / counts["absent_boxes"],
            "hallucination_rate_anywhere": counts["claimed"] / counts["absent"]}


class Judged:
    """Detections of M pictures against their boxes: every number over any of them, and intervals.

    baseline: M Detections to compare with, or None; state_rates (M, P, S): how often each part has
    each state in the train pictures, the baseline of the states.
    """

    def __init__(self, truth, detections, threshold, baseline=None, state_rates=None):
        self.truth = truth
        self.has_states = detections[0].states is not None
        self.every = np.arange(len(detections))
        kinds = ["map", "joint_map", "map_present"] if self.has_states else ["map"]
        self.matching = {kind: coco_match(truth, detections, kind) for kind in kinds}
        self.found = found_states(self.matching["map"], detections)
        self.confusions = self.count_states(self.found.probabilities)
        self.baseline_matching = {}
        if baseline is not None:
            shared = kinds[:2] if baseline[0].states is not None else ["map"]  # without map_present
            self.baseline_matching = {kind: coco_match(truth, baseline, kind) for kind in shared}
            # (n, S) rates of the states in the part of each box found
            self.part_rates = state_rates[self.found.pictures, self.found.labels]
            self.baseline_confusions = self.count_states(self.part_rates)
        self.counts = {
            **count_matches(self.matching["map"], threshold),
            **count_hallucinations(truth, detections, threshold)}

    def count_states(self, probabilities):
        """(M, S, S) true x most probable states of the boxes found in each picture, for probabilities (n, S)."""
        confusions = np.zeros((len(self.every), N_STATES, N_STATES))
        np.add.at(confusions, (self.found.pictures, self.found.true, probabilities.argmax(1)), 1)
        return confusions

    def epoch_metrics(self):
        """The columns of an epoch: map, map50, and with states joint_map and state_accuracy."""
        overall, _ = self.values(self.every)
        columns = ("map", "map50", "joint_map", "state_accuracy")
        return {name: overall[name] for name in columns if name in overall}

    def values(self, pictures):
        """({metric: float}, {ap, ap50: (P,)}) of the model over these pictures, repeats count."""
        overall, each = average_precisions(self.matching, pictures)
        overall |= rates_of({name: counts[pictures].sum() for name, counts in self.counts.items()})
        if self.has_states:
            overall |= state_scores(self.confusions[pictures].sum(0))
        return overall, each

    def baseline_values(self, pictures):
        """As values, of the baseline; its states: the model's boxes, each called as its part is most often."""
        overall, each = average_precisions(self.baseline_matching, pictures)
        if self.has_states:
            overall |= state_scores(self.baseline_confusions[pictures].sum(0))
        return overall, each

    def result(self, baseline_name="mean box", folds=0, pictures=None):
        """The subject_intervals.Result over all pictures, or these.

        Groups are resampled, without them images. folds: of the run.
        """
        if pictures is None:
            pictures = self.every
        groups = self.truth.groups
        units, owners = np.unique(pictures if groups is None else groups[pictures], return_inverse=True)

        def over_draws(values):
            def statistic(weights):
                times = weights.astype(int)[:, owners]  # (draws, pictures)
                overall, each = zip(*[values(np.repeat(pictures, drawn)) for drawn in times])
                return stack_draws(overall), stack_draws(each)
            return statistic
        model = over_draws(self.values)
        support = subject_intervals.support_alone(model, len(units))
        occurs = self.confusions[pictures].any(2)  # (pictures, S), True = a box found in the picture has that state
        n_owners = sorted(len(np.unique(owners[has])) for has in occurs.T)
        for metric in ("balanced_accuracy", "macro_f1"):
            support["overall", metric] = n_owners[-2]  # a mean over the states needs two; the others may be rare
        return subject_intervals.estimate(
            model,
            over_draws(self.baseline_values) if self.baseline_matching else None,
            len(units),
            "images" if groups is None else "groups",
            draws=N_DRAWS,
            names=self.truth.parts,
            support=support,
            n=self.counts["truth"][pictures].sum(0).astype(int),
            rows=len(pictures),
            folds=folds,
            baseline_name=baseline_name)


def stack_draws(draws):
    """D dicts {metric: value} -> {metric: (D, ...)}."""
    return {metric: np.array([draw[metric] for draw in draws]) for metric in draws[0]}


def average_precisions(matchings, pictures):
    """({map, map50, ...: float}, {ap, ap50: (P,)}) of {name: COCO matching}; map50, ap and ap50: of map."""
    overall = {}
    each = {}
    for name, matching in matchings.items():
        ap = average_precision(matching, pictures)  # (T, C)
        overall[name] = common.mean_without_nan(ap, axis=None)
        if name == "map":
            overall["map50"] = common.mean_without_nan(ap[0])
            each["ap"] = common.mean_without_nan(ap, axis=0)
            each["ap50"] = ap[0]
    return overall, each
