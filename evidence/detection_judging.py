"""Judge detections: AP with intervals, the mean-box baseline, states, hallucinations and verdict.

Letters: M pictures scored, P parts, S states, D detections of one picture.
"""
import collections
import dataclasses
import functools
import math

import numpy as np

import common
from evidence import (box_pictures, calibrating, class_scores, detection_scores, detection_tables, judging, plotting,
                      reporting, subject_intervals, verdicts)
from readers import part_boxes


# --- from COCO files ------------------------------------------------------------------------

def read_coco_results(truth_json, detections_json, group_column=None, box_format=None):
    """Annotations (COCO or of parts), COCO results of any program -> (PartTruth, M Detections, (M,) their seen,
    Annotations with what was skipped and noted in both).

    box_format: of the results, see part_boxes.BOX_FORMATS. Boxes that annotators trusted less than
    .5 are ignored. Raises UserError that lists what cannot be read.
    """
    found = part_boxes.read_annotations(truth_json)
    images = found.images
    part_boxes.refuse([image.name for image in images if image.size is None],
                      f"{truth_json}: images without width and height:", "Add them.")
    part_boxes.refuse_other_convention(
        images, truth_json, None,
        "Write them as COCO with train_detector.py --mode convert --json FILE --output NEW.json --box_format")
    parts, detections, seen, notes = detection_tables.read_results(detections_json, found, box_format)
    truth, without_area, box_notes = part_boxes.as_truth(
        images, parts, min_trust=0.5, groups=part_boxes.read_groups(images, group_column, found.notes))
    refuse_without_boxes(truth, truth_json)
    if not truth.has_states():
        detections = [dataclasses.replace(detected, states=None) for detected in detections]
    found.skipped += without_area
    found.notes += notes + box_notes
    return truth, detections, seen, found


def refuse_without_boxes(truth, path):
    """UserError where no box of a PartTruth, read from `path`, is judged."""
    if not len(truth.judged_states()):
        raise common.UserError(f"{path}: no box to judge detections against")


# --- the baseline ---------------------------------------------------------------------------

def mean_boxes(truth):
    """Baseline without pixels: of each part the mean box in 0..1, its frequency, and the rates of its states (P, S).

    Of each state one box more is counted than there is, so that no rate is 0.
    """
    found = [truth.relative(row) for row in range(len(truth.images))]
    boxes, labels, states = map(np.concatenate, zip(*found))
    numbers = np.arange(len(truth.parts))
    of_part = (labels == numbers[:, None]).astype(float)  # (P, boxes)
    counts = 1 + of_part @ (states[:, None] == np.arange(detection_scores.N_STATES))  # (P, S)
    return {
        "boxes": of_part @ boxes / np.maximum(of_part.sum(1, keepdims=True), 1),
        "score": np.mean([np.isin(numbers, own) for _, own, _ in found], axis=0),
        "states": counts / counts.sum(1, keepdims=True)}


def baseline_detections(priors, sizes):
    """The mean boxes on M pictures of sizes (M, 2) -> M Detections; priors: of mean_boxes, for each picture."""
    detections = []
    for prior, size in zip(priors, sizes):
        boxes, score, states = (np.asarray(prior[name]) for name in ("boxes", "score", "states"))
        labels = np.flatnonzero(score > 0)
        detections.append(detection_scores.Detections(
            boxes[labels] * np.tile(size, 2), labels, score[labels], states[labels]))
    return detections


# --- judging --------------------------------------------------------------------------------

def judge_detections(run, truth, detections, setting, priors, trained, picture=None, threshold=0.5):
    """Judge the Detections of M pictures; write tables, plots, sheets, report.html and metrics.json.

    truth: PartTruth of the pictures; priors: for each picture, of mean_boxes; trained: {name: M
    Detections} of baselines that look at pixels; picture: function of a row -> uint8 (H, W, 3),
    without it no sheets; threshold: score from which a detection counts in precision, recall and
    hallucinations. The model is compared with the baseline of the highest AP. Returns the metrics.
    """
    others = {"mean box": baseline_detections(priors, truth.sizes), **trained}
    baselines = {name: detection_scores.Judged(truth, each, threshold).epoch_metrics()["map"]
                 for name, each in others.items()}
    strongest = max(baselines, key=baselines.get)
    state_rates = np.array([prior["states"] for prior in priors])  # (M, P, S)
    judged = detection_scores.Judged(truth, detections, threshold, others[strongest], state_rates)
    compare = functools.partial(judged.result, strongest, len(setting.folds))  # all pictures, or these
    result = compare()
    part_rows = per_part_rows(judged, result)
    state_rows = per_state_rows(judged)
    calibration = calibration_rows(judged)
    common.write_table(run.path("per_part.csv"), part_rows)
    if state_rows:
        common.write_table(run.path("per_state.csv"), state_rows)

    def describe(result):
        return verdicts.verdict_sentence(result, "map", setting.worst_seen)
    setting, doubts = judging.judge_without_similar(run, setting, result, compare, describe, "map", "ap")
    doubts += verdicts.baseline_doubts(others, "the same detector with only its heads trained (--baseline heads)")
    setting = dataclasses.replace(
        setting,
        cases=case_blocks(run, judged, detections, picture, threshold),
        limits=[*general_limits(judged), *setting.limits])
    return judging.close_run(
        run, setting,
        verdict=describe(result),
        result=result,
        metric="map",
        doubts=doubts + state_doubts(result),
        alarms=find_alarms(judged, detections, threshold),
        meanings=criteria_names(truth.parts, judged.has_states),
        figures=key_figures(result),
        blocks=metric_blocks(run, setting, result, part_rows, threshold),
        sections=[("States", state_blocks(run, judged, state_rows, calibration))],
        numbers={
            "pictures": len(detections),
            "score_threshold": threshold,
            "absent": "keep" if truth.keeps_absent else "drop",
            "baselines": baselines,
            "per_part": part_rows,
            "per_state": state_rows,
            "state_calibration": calibration,
        })


def criteria_names(parts, has_states):
    """What --criteria may name."""
    overall = "map map50 precision recall hallucination_rate hallucination_rate_anywhere".split()
    if has_states:
        overall += "joint_map map_present state_accuracy macro_f1 balanced_accuracy".split()
    return verdicts.spell_metrics(overall, ("ap",), parts)


def check_criteria(text, parts, has_states):
    """Raises UserError where --criteria names no metric of such a run."""
    verdicts.parse_criteria(text, criteria_names(parts, has_states))


def general_limits(judged):
    """What a reader must not conclude from detections of these pictures."""
    limits = [
        "Valid for pictures like these, taken and annotated by people like these; nothing else was tested.",
        "Few pictures make AP and joint AP too high, and intervals do not show it: hold an AP "
        "against those of about as many pictures.",
    ]
    if judged.has_states:
        limits.append("States are judged on the parts that were found; one that is missed counts "
                      "in recall and joint AP only.")
    if not (judged.counts["absent"] + judged.counts["absent_boxes"]).any():
        limits.append("No part is annotated as absent: hallucinations were not measured.")
    return limits


# --- tables ---------------------------------------------------------------------------------

def per_part_rows(judged, result):
    """One dict per part: boxes, AP with interval and baseline, precision, recall, hallucinations."""
    import pandas as pd
    counts = {name: values.sum(0).astype(int) for name, values in judged.counts.items()}  # (P,) each
    rates = detection_scores.rates_of(counts)
    ends = subject_intervals.share_interval(counts["claimed"], counts["absent"])
    hallucination = subject_intervals.Estimate(rates["hallucination_rate_anywhere"], *ends)
    columns = {
        "target": result.names,
        "boxes": counts["truth"],
        **result.each.model["ap"].columns("ap"),
        "ap50": result.each.model["ap50"].value,
        "baseline_ap": result.each.baseline["ap"].value,
        "baseline_ap50": result.each.baseline["ap50"].value,
        "precision": rates["precision"],
        "recall": rates["recall"],
        "absent": counts["absent"],
        "hallucinated": counts["claimed"],
        **hallucination.columns("hallucination_rate_anywhere"),
        "absent_boxes": counts["absent_boxes"],
        "hallucinated_there": counts["claimed_there"]}
    return pd.DataFrame(columns).to_dict("records")


def per_state_rows(judged):
    """One dict per state: how often it is true, what it is called, recall, precision, F1, AP."""
    if not judged.has_states:
        return []
    import pandas as pd
    confusion = judged.confusions.sum(0).astype(int)
    _, each = class_scores.confusion_metrics(confusion[None])  # {metric: (1, S)}
    matching = judged.matching["joint_map"]
    ap = detection_scores.average_precision(matching, judged.every)  # (T, C)
    state_of = (np.array(matching.params.catIds, int) - 1) % detection_scores.N_STATES  # (C,)
    columns = {
        "state": part_boxes.STATES,
        "found": confusion.sum(1),
        **{f"called {state}": counts for state, counts in zip(part_boxes.STATES, confusion.T)},
        **{name: each[name][0] for name in ("recall", "precision", "f1")},
        "joint_ap": [common.mean_without_nan(ap[:, state_of == k], axis=None)
                     for k in range(detection_scores.N_STATES)]}
    return pd.DataFrame(columns).to_dict("records")


def calibration_rows(judged):
    """NLL, Brier score and ECE of the states of the boxes found: of the model, and of the rates of each part.

    No rows without states, nor where results only name them: nobody gave these
    probabilities of 0 and 1.
    """
    found = judged.found
    rows = []
    if np.isin(found.probabilities, (0, 1)).all():
        return rows
    for name, probability in (("model", found.probabilities), ("rates of the part", judged.part_rates)):
        scores = class_scores.classification_metrics(probability, found.true).overall
        numbers = calibrating.calibration_numbers(probability, scores)
        rows.append({"states of": name, "boxes": len(found.true), **numbers})
    return rows


# --- signs of a broken model ----------------------------------------------------------------

def find_alarms(judged, detections, threshold):
    """Sentences on signs of a broken model, or of data that cannot judge it."""
    alarms = []
    sure = [detected.take(detected.scores >= threshold) for detected in detections]
    highest = max(detected.scores.max(initial=0) for detected in detections)
    if highest == 0 or highest < threshold:
        alarms.append(f"no detection reaches the score {threshold:g}, the highest is {highest:.2f}. Train longer "
                      "(--epochs), start from published weights, or lower --score_threshold (train_detector.py alone)")
    unseen = [part for part, n in zip(judged.truth.parts, judged.counts["truth"].sum(0)) if not n]
    if unseen:
        alarms.append(f"parts without a box here, so not judged: {', '.join(unseen)}. Score more pictures "
                      "(train_detector.py: a higher --test_ratio or fewer --folds), or take these "
                      "parts out of the annotations")
    repeats = collections.Counter(np.round(each.boxes, 1).tobytes() for each in sure if len(each.boxes))
    most = max(repeats.values(), default=0)
    if most >= 3:
        alarms.append(f"exactly the same boxes in {most} of {len(detections)} pictures. {verdicts.CONSTANT_REMEDY}")
    return alarms + state_alarms(judged.confusions.sum(0))


def state_alarms(confusion):
    """Sentences on states always predicted or almost always true: (S, S) true x predicted."""
    if not confusion.sum():
        return []
    alarms = []
    true = confusion.sum(1)
    predicted = confusion.sum(0)
    if (predicted > 0).sum() == 1 and (true > 0).sum() > 1:
        alarms.append(f"one state only is ever predicted: {part_boxes.STATES[predicted.argmax()]}. "
                      "Train longer (--epochs), or --state_class_weights balanced")
    if true.max() >= 0.95 * confusion.sum():
        alarms.append(f"95 % or more of the found parts are {part_boxes.STATES[true.argmax()]}: "
                      "their state accuracy says little. Look at the balanced accuracy, and "
                      "annotate more of the other states")
    return alarms


def state_doubts(result):
    """A sentence where the states may be told no better than by each part's usual one, which is not always right."""
    usual = result.overall.baseline.get("balanced_accuracy")
    if not usual or not usual.value < 1 or verdicts.outcome_of(result.gain("balanced_accuracy")) == "better":
        return []
    own = result.overall.model["balanced_accuracy"]
    return [f"The verdict is of boxes and parts: their states are not told better for certain than by the usual one of "
            f"each part (balanced accuracy {own.value:.3f} against {usual.value:.3f}). More boxes of the rarer states, "
            "more --epochs, or --state_class_weights balanced"]


# --- blocks of the page ---------------------------------------------------------------------

def key_figures(result):
    """[(label, value, remark)] for the top of the report."""
    model = result.overall.model
    baseline = result.overall.baseline
    estimates = {"AP": model["map"], "Joint AP": model.get("joint_map")}
    of_rates = baseline.get("balanced_accuracy")
    if of_rates and of_rates.value != 1:  # 1: the parts' usual states are always right, so there is nothing to tell
        estimates["State balanced accuracy"] = model["balanced_accuracy"]
    estimates[f"AP of the {result.baseline_label}"] = baseline["map"]
    estimates["Hallucination rate anywhere"] = model["hallucination_rate_anywhere"]
    known = {label: found for label, found in estimates.items()
             if found and math.isfinite(found.value)}
    return reporting.key_figures(known, result)


def metric_blocks(run, setting, result, part_rows, threshold):
    """HTML of the section Metrics: numbers over all parts, and of each part."""
    columns = {"target": "part", "boxes": "n", "ap": "AP", "ap_low": "low", "ap_high": "high",
               "ap50": "AP50", "baseline_ap": "baseline", "precision": "precision",
               "recall": "recall", "absent": "absent", "hallucinated": "claimed",
               "hallucination_rate_anywhere_low": "from", "hallucination_rate_anywhere_high": "to"}
    drawn = [row for row in part_rows if row["boxes"]]
    plot = run.path("per_part.png")
    plotting.plot_per_target(drawn, plot, ("ap", "ap50"))
    return [
        reporting.html_table(
            subject_intervals.overall_rows(result),
            caption=f"On {setting.rows_judged.replace('rows', 'pictures')}; precision, recall and hallucinations at "
                    f"score {threshold:g}; baseline of AP: the {result.baseline_label}, of states: "
                    f"the usual one of the part; {result.method}"),
        reporting.html_table(
            part_rows, columns,
            caption="Each part: n boxes, COCO AP (mean precision over recalls) over IoU .50 to .95 with its interval, "
                    "AP of the baseline; claimed: found, though absent in that picture, and the "
                    "binomial interval of their share"),
        reporting.html_image(plot, "AP and AP50 of each part that has boxes here, and the baseline's"
                                   f"{plotting.note_if_cut(len(drawn), 'parts')}"),
    ]


def state_blocks(run, judged, rows, calibration):
    """HTML of the section States: the confusion, how well each state is told, and whether probabilities hold."""
    if not rows:
        return []
    caption = ("True state (rows) of the boxes found at IoU .5 and any score, and what the model "
               "calls them (columns)")
    blocks = [reporting.html_table(rows, caption=caption)]
    if calibration:
        plot = run.path("state_reliability.png")
        plotting.plot_reliability(judged.found.probabilities, judged.found.true, plot)
        blocks += [
            reporting.html_table(
                calibration, caption="State probabilities of the boxes found, beside the rates of "
                                     "the states in their parts, which look at no pixel"),
            reporting.html_image(plot, "Reliability: how often a state of that confidence is right")]
    return blocks


def case_blocks(run, judged, detections, picture, threshold):
    """HTML of the section Best and worst cases: sheets of the pictures with most and fewest errors."""
    if picture is None:
        return []
    order = np.argsort(count_errors(judged), kind="stable")
    colours = (f"Annotated (left), detected from score {threshold:g} (right). Green intact, orange damaged, pink "
               "absent, blue occluded, grey no state; without any state a colour for each part")
    blocks = [reporting.html_text(colours)]
    sheets = {"failures.jpg": ("most", order[::-1][:4]), "best_pictures.jpg": ("fewest", order[:2])}
    for file, (word, rows) in sheets.items():
        sheet = run.path(file)
        box_pictures.write_sheet(sheet, judged.truth, detections, picture, rows, threshold)
        names = ", ".join(judged.truth.images[row] for row in rows)
        blocks.append(reporting.html_image(sheet, f"The pictures with {word} errors, from the top: {names}"))
    return blocks


def count_errors(judged):
    """(M,) missed boxes, wrong detections and wrong states of each picture."""
    missed = (judged.counts["truth"] - judged.counts["right"]).sum(1)
    wrong_state = judged.confusions.sum((1, 2)) - np.trace(judged.confusions, axis1=1, axis2=2)
    return missed + judged.counts["wrong"].sum(1) + wrong_state
