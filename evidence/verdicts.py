"""What must be said before any number: signs of a broken model, bars set beforehand, the one-sentence verdict.
"""
import dataclasses
import itertools
import math
import re
import typing
from fractions import Fraction

import numpy as np

import common
from evidence import class_scores, metric_names


# --- alarms ------------------------------------------------------------------------------------------

CONSTANT_REMEDY = ("The model has learnt nothing: published weights, more rows; where a network is "
                   "trained, more --epochs, a higher --lr or a weaker --augment")
NOT_FINITE_REMEDY = "Lower --lr, or --use_amp off"
REPEATS_REMEDY = ("Look for rows with the same input (the section Leakage), and keep them "
                  "together: --group_column (probe guidance: --patient_map)")
LABELS_REMEDY = "Add rows with other labels, or leave it out (--target_columns, where a script has them)"
GAPS = ("train far below validation", "train far above validation")  # how split_gap_alarms begin


def flat_outputs(predicted, target, folds):
    """(K,) which predictions (N, K) vary too little beside the targets, in all rows or within the folds.

    folds: (N,) which of several models predicted each row, or None. Models that each give one value
    give several together, so rows count about the mean of their fold, too.
    """
    import pandas as pd
    rows = pd.DataFrame(np.hstack([predicted, target]))
    in_folds = rows if folds is None else rows - rows.groupby(folds).transform("mean")
    sds = [np.split(common.sd_without_nan(each.to_numpy()), 2) for each in (rows, in_folds)]
    return np.any([predicted < 0.05 * target for predicted, target in sds], axis=0)


def regression_alarms(predicted, target, names, folds=None):
    """Sentences on signs of a broken model or of data that cannot judge it, for (N, R), (N, R) and R names; else [].

    folds: of flat_outputs.
    """
    import pandas as pd
    is_finite = np.isfinite(predicted)
    labelled = ~np.isnan(target)
    finite = np.where(is_finite, predicted, np.nan)
    judged = np.where(labelled, finite, np.nan)
    spread_p = common.sd_without_nan(judged)  # (R,)
    spread_t = common.sd_without_nan(target)
    # (R,) how many rows share the most frequent label; NaN without a label
    modal = pd.DataFrame(target).apply(lambda column: column.value_counts().max())
    is_constant = spread_p <= 1e-9 * spread_t
    is_flat = flat_outputs(judged, target, folds)
    faults = [
        ("not a finite number in the predictions", ~is_finite.all(0), NOT_FINITE_REMEDY),
        ("constant output (sd under 5 % of the labels', of all or in each fold)",
         is_flat & ~is_constant,
         CONSTANT_REMEDY),
        ("constant prediction, so r has no value and counts as 0", is_constant, CONSTANT_REMEDY),
        ("correlation undefined, the labels do not vary", ~(spread_t > 0), LABELS_REMEDY),
        ("labels almost all equal (95 % or more share one value)", modal >= 0.95 * labelled.sum(0), LABELS_REMEDY),
    ]
    alarms = [f"{fault}: {', '.join(itertools.compress(names, flags))}. {remedy}"
              for fault, flags, remedy in faults if flags.any()]
    low = np.fmin.reduce(finite)
    high = np.fmax.reduce(finite)
    margin = 0.01 * (high - low)
    is_inside = ((predicted > low + margin) & (predicted < high - margin)).any(1)  # others may be cut to a scale
    _, repeats = find_repeats(predicted, is_inside, modal.min())
    if len(repeats) and not is_constant.all():
        alarms.append(f"the same prediction for {repeats.max()} rows, and for 3 or more in "
                      f"{repeats.sum()} of {len(predicted)} rows. {REPEATS_REMEDY}")
    return alarms


def find_repeats(predicted, is_judged, modal):
    """Predictions that repeat so often that it speaks for a fault: ((n, K) of them, (n,) in how many rows).

    predicted: (N, K); is_judged: (N,) bool; modal: how many rows share the most frequent label.
    Three equal ones or more count where all such hold 2 % of the rows, as in many rows some meet by
    chance. Coarse ones (is_coarse) meet often: of them only one counts that more than half of the
    rows have, and that a tenth of the rows more have than the most frequent label.
    """
    rows = len(predicted)
    values, repeats = np.unique(predicted[is_judged], axis=0, return_counts=True)
    is_repeated = repeats >= 3
    if is_coarse(predicted):
        is_repeated = repeats > max(rows / 2, modal + rows / 10)
    elif repeats[is_repeated].sum() < 0.02 * rows:
        is_repeated[:] = False
    return values[is_repeated], repeats[is_repeated]


def is_coarse(predicted):
    """True where all predictions (N, K) have up to five decimals, or are shares of 1000 votes or fewer."""
    values = np.unique(predicted[np.isfinite(predicted)])
    some = values[::len(values) // 1000 + 1]  # a thousand tell
    rest = some[np.abs(some - np.round(some, 5)) > 1e-9]
    return all(abs(Fraction(value).limit_denominator(1000) - value) < 5e-7 for value in rest.tolist())


def split_gap_alarms(train_metrics, val_metrics, remedy, metric="pearson_r"):
    """Sentences where a train and a validation metric (dicts of floats, higher is better) lie far apart; else [].

    remedy: the sentence on what helps against overfitting, with the script's flags;
    None: it is not looked for.
    """
    train = train_metrics[metric]
    val = val_metrics[metric]
    numbers = f"({metric} {train:.3f} and {val:.3f})"
    if train < val - 0.15:
        return [f"{GAPS[0]} {numbers}: a leak, or a fault in evaluation. Look for copies in the "
                "section Leakage, and name who or what repeats: --group_column (probe guidance: --patient_map)"]
    if remedy and train > val + 0.3:
        return [f"{GAPS[1]} {numbers}: overfitting. {remedy}"]
    return []


def classification_alarms(table):
    """Sentences on signs of a broken classifier or of labels that cannot judge it, for a ClassTable; else []."""
    names = table.names
    probability = table.probability  # (N, C)
    rows = len(probability)
    alarms = []
    if not np.isfinite(probability).all():
        alarms.append(f"not a finite number in the probabilities. {NOT_FINITE_REMEDY}")
    given = np.unique(table.chosen)
    if len(given) == 1 and not alarms:
        alarms.append(f"one class only: {names[given[0]]} is given to all {rows} rows. Add rows of the others; "
                      "where a network is trained, balance them (--balance sampler) or train longer (--epochs)")
    of_class = table.truth[:, None] == np.arange(len(names))  # (N, C)
    counts = of_class.sum(0)
    flat = flat_outputs(probability, of_class, table.keys.get("fold"))
    if flat.any():
        alarms.append("constant output (sd of the probability under 5 % of the labels', of all or in each fold): "
                      f"{', '.join(itertools.compress(names, flat))}. {CONSTANT_REMEDY}")
    is_unsure = probability.max(1) < 0.99  # rows that are told apart with ease have nearly 0 and 1
    compared = np.round(probability, 7) if table.score is None else table.score
    values, repeats = find_repeats(compared, is_unsure, counts.max())
    if len(repeats):
        most = repeats.argmax()
        alarms.append(f"the same probability 3 times or more, in {repeats.sum()} of {rows} rows; that of "
                      f"{names[table.positive]} is {values[most, table.positive]:g} in {repeats[most]} of them. "
                      f"{REPEATS_REMEDY}. Isotonic calibration repeats them too: judge those before it")
    if counts.max() >= 0.95 * counts.sum() > 0:
        alarms.append(f"labels almost all equal: {names[counts.argmax()]} in {counts.max()} of "
                      f"{counts.sum()} rows. Add rows of other classes")
    return alarms


# --- names of --select and --criteria ----------------------------------------------------------------

class MetricOf(typing.NamedTuple):
    """What a name means: a metric of one target or class, or of all of them (of None)."""
    metric: str
    of: str | None = None


def spell_metrics(overall, each=(), names=()):
    """{name: MetricOf}: METRIC of all, METRIC_NAME of each of the names."""
    meanings = {f"{metric}_{name}": MetricOf(metric, name) for metric, name in itertools.product(each, names)}
    return meanings | {metric: MetricOf(metric) for metric in overall}


def spell_class_metrics(names):
    """{name: MetricOf} for C classes: METRIC of all; CLASS_METRIC and METRIC_CLASS of each; auc, nll and ap for short.

    METRIC_CLASS always means the class; of a class called `macro`, macro_f1 is the
    metric of all, f1_macro its own.
    """
    short = {metric: metric for metric in class_scores.CLASS_METRICS} | {"ap": "average_precision", "auc": "roc_auc"}
    meanings = spell_metrics(class_scores.CLASSIFICATION_METRICS)
    for name, (spelled, metric) in itertools.product(names, short.items()):
        meanings.setdefault(f"{name}_{spelled}", MetricOf(metric, name))
        meanings[f"{spelled}_{name}"] = MetricOf(metric, name)
    return meanings | {"auc": MetricOf("roc_auc"), "nll": MetricOf("loss")}


def history_columns(meanings):
    """{MetricOf: its column of the history}, the first of its names."""
    columns = {}
    for name, meaning in meanings.items():
        columns.setdefault(meaning, name)
    return columns


def select_column(name, meanings):
    """What --select names -> (val_ column of the history or 'last', higher is better).

    meanings: {name that may be used: MetricOf}. Raises UserError for another name.
    """
    name = name.removeprefix("val_")
    if name == "last":
        return "last", True
    if name not in meanings:
        names = [*meanings, "last"]
        raise common.UserError(f"--select {name} is no metric of this run{common.did_you_mean(name, names)}; "
                               f"metrics: {common.shorten_list(names, 40)}")
    meaning = meanings[name]
    return f"val_{history_columns(meanings)[meaning]}", not metric_names.METRICS[meaning.metric].lower_is_better


def history_to_plot(history, meanings, positive):
    """The history without the columns of other classes than the positive one, and without metrics that resemble others.

    meanings: {name: MetricOf}; positive: name of the class, or None for scores.
    """
    left_out = {f"val_{name}" for name, (metric, of) in meanings.items()
                if of not in (None, positive) or metric in ("ece_adaptive", "brier", "mcc", "mse")}
    return [{name: value for name, value in row.items() if name not in left_out} for row in history]


def named_estimates(result, meanings):
    """{name: Estimate of the model} for each name that means a metric of the Result, its targets or its classes."""
    found = {}
    for name, (metric, of) in meanings.items():
        if of is None:
            found[name] = result.overall.model[metric]
        elif of in result.names:
            found[name] = result.each.model[metric].at(result.names.index(of))
    return found


# --- criteria ----------------------------------------------------------------------------------------

def parse_criteria(text, meanings):
    """`"r2>0.15,mae_M2<3.0"` -> list of dict(name, metric (its label), relation, bar).

    meanings: of the names that there are.

    Raises UserError that lists every part that cannot be read, or every unknown name
    with the closest known one.
    """
    parts = [part.strip() for part in re.split(r"(?<=[\d.])\s*,[\s,]*", text or "") if part.strip()]
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    matches = [re.fullmatch(rf"([^<>=]+?)\s*([<>]=?)\s*({number})", part) for part in parts]
    bad = [part for part, match in zip(parts, matches) if match is None]
    if bad:
        raise common.UserError("--criteria expects NAME>NUMBER or NAME<NUMBER separated by commas, found: "
                               + "; ".join(bad))
    found = [match.groups() for match in matches]
    unknown = [name + common.did_you_mean(name, meanings) for name, _, _ in found if name not in meanings]
    if unknown:
        raise common.UserError(
            f"--criteria names no metric of this run: {', '.join(unknown)}. Use METRIC or METRIC_TARGET.")
    return [{
        "name": name,
        "metric": metric_names.METRICS[meanings[name].metric].label,
        "relation": relation,
        "bar": float(bar),
    } for name, relation, bar in found]


def judge_criteria(criteria, estimates, seen="new"):
    """PASS where the whole interval clears the bar, FAIL where none of it does, else (or without one) NOT RESOLVABLE.

    criteria: from parse_criteria; estimates: {name: Estimate}, NaN ends = no interval;
    seen: as in verdict_sentence. Returns a list of dict(name, metric, relation, bar,
    value, low, high, verdict).
    """
    judged = []
    for entry in criteria:
        found = estimates[entry["name"]]
        clears = [common.RELATIONS[entry["relation"]](end, entry["bar"]) for end in (found.low, found.high)]
        verdict = "NOT RESOLVABLE"
        if clears[0] == clears[1] and not math.isnan(found.low + found.high):
            verdict = PASSES.get(seen, "PASS") if clears[0] else "FAIL"
        judged.append({**entry, **vars(found), "verdict": verdict})
    return judged


# --- verdict -----------------------------------------------------------------------------------------

# how the sentence ends, and how a bar that is passed is called, by the worst of seen_rows.WORDS
ENDINGS = {
    "train": "; the model was trained on rows that are scored here: nothing is said about new ones.",
    "chose": "; selected on these rows, therefore optimistic.",
    "not known": "; whether these rows are new to the model is not known here.",
    "new": ".",
}
PASSES = {"train": "PASS on train rows", "chose": "PASS on validation"}

# by outcome_of: how the sentence begins, and the word of the page where not all is well
STARTS = {
    "better": "The model beats",
    "worse": "The model does worse than",
    "not resolvable": "Not resolvable whether the model beats",
}
WORDS = {
    "better": "Better, with doubts",
    "worse": "Worse than the baseline",
    "not resolvable": "Not resolvable",
}
# baselines that look at no input; beside one of these columns the others of a table may be anything
TRIVIAL_COLUMNS = {
    "mean_of_these_rows", "shares_of_these_rows", "train_mean", "train_median", "train_prior", "moment_mean", "zero"}
TRIVIAL_BASELINES = TRIVIAL_COLUMNS | {"mean box"}
# baselines that are known to look at the input
KNOWN_BASELINES = {*metric_names.BASELINES, "copy", "motion_ridge", "motion_readout", "grid_readout"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What stands at the top of a page."""
    level: str  # good, caution or poor: its colour
    word: str
    sentence: str


def outcome_of(gain):
    """better, worse or not resolvable: by the interval of the gain alone, without one not resolvable."""
    if gain.low > 0:
        return "better"
    return "worse" if gain.high < 0 else "not resolvable"


def reach_verdict(gain, doubts, sentence):
    """Verdict; good only where the whole interval of the gain is above 0 and nothing is in doubt."""
    outcome = outcome_of(gain)
    if outcome == "better" and not doubts:
        return Verdict("good", "Holds", sentence)
    return Verdict("poor" if outcome == "worse" else "caution", WORDS[outcome], sentence)


def baseline_doubts(names, model="ridge or logistic regression on published features, whose predictions stand in "
                                 "the table as a baseline's (judge_predictions.py --baseline)"):
    """Sentences on baselines, by name, that are too weak for a result to hold; else []. model: what would help.

    What other columns of a table are is a guess, unless their name is known.
    """
    telling = set(names) - TRIVIAL_BASELINES
    if TRIVIAL_COLUMNS & set(names):
        telling &= KNOWN_BASELINES
    if telling:
        return []
    shown = ", ".join(sorted(names)).replace("_", " ")
    return [f"No baseline that is known to look at the input was there to beat (there were: "
            f"{shown}). A result holds where it beats a simple model too, such as {model}"]


def chance_doubts(result, metric):
    """A sentence where the model beats its baseline, but not guessing for certain; else []."""
    known = metric_names.METRICS[metric]
    own = result.overall.model[metric]
    if known.chance is None or own.low > known.chance or outcome_of(result.gain(metric)) != "better":
        return []
    return [f"The model's own {known.label} is not above {known.chance:g} for certain, which guessing reaches "
            f"(interval {own.low:.3f} to {own.high:.3f}): to beat a baseline that does worse than "
            "guessing says nothing. Add rows or groups"]


def verdict_sentence(result, metric, seen="new", label=None, ceiling=None, is_same=False):
    """One honest sentence: does the model beat its baseline, by how much, and what could be reached at best.

    result: a Result with a baseline; seen: the worst of seen_rows.WORDS among the rows; label: the
    metric's name in the sentence; ceiling: what `metric` could reach, or None; is_same: model and
    baseline predict the same.
    """
    difference = result.overall.difference[metric]
    start = STARTS[outcome_of(result.gain(metric))]
    if difference.low == difference.high == 0:
        start = "The model does exactly as well as"
    if is_same:
        start = "The model is the same predictor as"
    shown = metric_names.number_text
    text = (f"{start} the baseline ({result.baseline_label}): {label or metric_names.METRICS[metric].label} "
            f"{shown(result.overall.model[metric].value)} against {shown(result.overall.baseline[metric].value)}, "
            f"difference {shown(difference.value, '+.3f')} "
            f"{interval_text(difference.low, difference.high, result.method)}{_sign_flip_text(result, metric)}")
    if ceiling is not None and np.isfinite(ceiling):
        text += f"; the raters' agreement allows {ceiling:.3f}"
    return text + ENDINGS[seen]


def interval_text(low, high, method):
    """What stands behind a difference: its interval and how that was made, or why there is none."""
    if np.isfinite(low + high):
        return f"[{low:+.3f} to {high:+.3f}, {method}]"
    return f"[{method}]" if method.startswith("no interval") else "[no interval: too few to resolve it]"


def _sign_flip_text(result, metric):
    """What the sign-flip test says of the same difference, subject by subject; "" without one."""
    p = result.sign_flip_p.get(metric)
    if p is None:
        return ""
    text = f", sign-flip p of this difference {p:.4f}"
    if metric == "roc_auc":  # ranks rows of different subjects: what each adds is not its own AUC
        return text
    differences = result.per_subject[metric]  # (S,)
    better = differences < 0 if metric_names.METRICS[metric].lower_is_better else differences > 0
    return f"{text}, better in {better.sum()} of {np.isfinite(differences).sum()} {result.unit}"


def say_results(run, metrics):
    """The closing lines of a run: verdict, alarms, doubts, criteria, and the file to open next."""
    run.say(metrics["verdict"])
    for alarm in metrics["alarms"]:
        run.say(f"ALARM: {alarm}")
    for doubt in metrics["doubts"]:
        run.say(f"doubt: {doubt}")
    for bar in metrics["criteria"]:
        run.say(f"{bar['verdict']}: {bar['name']} {bar['relation']} {bar['bar']:g}, "
                f"found {bar['metric']} {bar['value']:.4g}")
    run.say(f"open next: {run.path('report.html')}")
