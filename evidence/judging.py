"""From a judged predictions table to metrics.json and report.html: the end of every run, and of any program's table.

A task's own judging (score_judging, class_judging, detection_judging, pose_judging)
gives what it found to close_run.
"""
import contextlib
import dataclasses
import itertools
import time

import numpy as np

import common
from evidence import metric_names, reporting, seen_rows, verdicts


METRICS_SCHEMA = 1  # of metrics.json; docs/judging.md
NO_RESULTS = ["fold", "rows", "best_epoch"]  # in the numbers of a fold


@dataclasses.dataclass(kw_only=True)
class Setting:
    """What a run knows beside its predictions table.

    The defaults are what is known of a table alone.
    """
    title: str = "Predictions"
    part: str = "table"  # val, test, folds or table
    seen: np.ndarray = ("not known",)  # (M,) of seen_rows.WORDS: what the model has done with the rows
    best_epoch: int | None = None
    alarms: tuple = ()  # sentences found before the judging
    data: tuple = ()  # HTML of the section Data and split
    similar: tuple = ()  # HTML of the section Leakage: pictures of two parts that look alike
    is_similar: np.ndarray = False  # (M,) which rows are in such a pair
    cases: tuple = ()  # HTML of the section Best and worst cases
    limits: tuple = ()  # sentences on what must not be concluded
    folds: tuple = ()  # a dict of numbers for each fold

    @property
    def worst_seen(self):
        """The worst of the words in `seen`."""
        return seen_rows.worst(self.seen)

    @property
    def rows_judged(self):
        """Which rows are judged, as captions say it."""
        return "the rows of the table" if self.part == "table" else f"the {self.part} rows"

    @property
    def held_out(self):
        """True, False, or None where it is not known."""
        return {"new": True, "not known": None}.get(self.worst_seen, False)


def fold_table(folds):
    """One dict of numbers for each fold -> the same with two more rows, the mean and the SD; [] without folds."""
    if not folds:
        return []
    import pandas as pd
    numbers = pd.DataFrame(folds).drop(columns=NO_RESULTS, errors="ignore").astype(float)
    return [*folds, {"fold": "mean", **numbers.mean()}, {"fold": "SD", **numbers.std()}]


def finished_folds(run, chosen, numbers):
    """Write fold_table.csv; returns a dict for each finished fold; numbers: a dict for each of the chosen folds."""
    folds = [{"fold": k, "best_epoch": common.read_json(run.path(f"fold_{k}/metrics.json"))["best_epoch"], **own}
             for k, own in zip(chosen, numbers)]
    common.write_table(run.path("fold_table.csv"), fold_table(folds))
    return folds


def identical_fold_alarms(folds):
    """Sentences on folds with the same numbers to the last digit."""
    results = [(fold["fold"], [value for name, value in fold.items() if name not in NO_RESULTS]) for fold in folds]
    return [f"folds {a} and {b} have identical results: were they trained and judged on the same "
            "rows? Compare their splits.json, and deal the rows out anew (--seed)"
            for (a, own), (b, other) in itertools.combinations(results, 2) if own == other and any(own)]


def gap_alarms_of_folds(run, folds):
    """Sentences on what verdicts.split_gap_alarms say of most folds, which pooled rows do not show.

    In a single one of few rows it may be chance.
    """
    alarms = [common.read_json(run.path(f"fold_{fold['fold']}/metrics.json"))["alarms"] for fold in folds]
    counts = {gap: sum(gap in str(own) for own in alarms) for gap in verdicts.GAPS}
    return [f"{gap} in {count} of {len(folds)} folds. The pages in their folders say how far, and what helps"
            for gap, count in counts.items() if 2 * count > len(folds)]


def rows_text(table, unit="rows"):
    """HTML: how many rows are judged, how many differ in their labels, what is resampled."""
    return reporting.html_text(sample_sentence(table.sample, unit))


def sample_sentence(size, unit="rows"):
    """The effective sample in words; size: of Rows.sample."""
    groups = "no groups named: each row its own" if size["subjects"] is None else f"{size['subjects']} groups"
    positives = "" if size["positives"] is None else f", {size['positives']} of the positive class"
    return (f"{size['rows']} {unit} scored, {size['distinct_label_vectors']} different sets of "
            f"labels{positives}, {groups}.")


def subject_blocks(table, result):
    """HTML of what the fold table would say of each subject, where they are too few for an interval."""
    if result.has_intervals or table.groups is None:
        return []
    rows = [{"subject": name, **table.take(table.groups == name).fold_numbers()}
            for name in sorted(set(table.groups))]
    return [reporting.html_table(
        rows, caption="Each subject alone, beside its best baseline: they are too few for an interval")]


def case_blocks(table, picture, blocks_of=None):
    """HTML of the section Best and worst cases: the five rows with the smallest and with the largest error.

    picture: function of a row of the table -> uint8 (H, W, 3); blocks_of: function (rows, a case
    for each) -> HTML, where it is more than the cases.
    """
    order, lines = table.rank_rows()
    blocks = []
    for word, rows in (("Best:", order[:5]), ("Worst:", order[::-1][:5])):
        cases = [{"image": picture(row), "title": table.row_names[row], "lines": lines[row]} for row in rows]
        blocks.append(reporting.html_text(word))
        blocks += blocks_of(rows, cases) if blocks_of else [reporting.html_cases(cases)]
    return blocks


def similar_blocks(pairs, titles, picture):
    """HTML of the six nearest of splitting.similar_pairs; titles: (N,) text; picture: function of one of N rows."""
    cases = [{"image": picture(row), "title": f"pair {number}: {titles[row]}"}
             for number, pair in enumerate(pairs[:6], 1) for row in pair]
    return [reporting.html_text("Pictures of two parts that look alike to the untuned network. If they are copies or "
                                "one scene, keep them together with --group_column:", "caution"),
            reporting.html_cases(cases)] if pairs else []


def judge_without_similar(run, setting, result, compare, describe, metric, metric_of_each=None):
    """What is left of a Result without the rows that look like one in another part of the split.

    compare: function of the rows that are left -> their Result; describe: of a Result -> its verdict
    in a sentence. Returns the Setting with that sentence in the section Leakage, and doubts: one
    where the verdict is then another one, where `metric`, of which more is better, falls below its
    interval, or where a class, score or part has no metric_of_each, by default the same metric.
    """
    is_similar = setting.is_similar
    if not np.any(is_similar):
        return setting, []
    kept = np.flatnonzero(~is_similar)
    sentence = f"{is_similar.sum()} of {len(is_similar)} rows look like one in another part of the split."
    holds = False
    if len(kept):
        rest = compare(kept)
        sentence += f" Without them: {describe(rest)}"
        had, has = (~np.isnan(found.each.model[metric_of_each or metric].value) for found in (result, rest))
        lost = list(itertools.compress(result.names, had & ~has))
        if lost:
            sentence += f" This says nothing of {common.shorten_list(lost)}."
        is_same = verdicts.outcome_of(rest.gain(metric)) == verdicts.outcome_of(result.gain(metric))
        has_fallen = rest.overall.model[metric].value < result.overall.model[metric].low
        holds = is_same and not has_fallen and not lost
    setting = dataclasses.replace(setting, similar=[reporting.html_text(sentence), *setting.similar])
    if holds:
        run.say(f"note: {sentence}")
        return setting, []
    return setting, [f"{sentence} If they show one scene or subject, keep them together: --group_column"]


def limits_of_start(args):
    """The sentence on a model that started from random weights; none on one that was trained before, for anything."""
    if args.pretrained or args.weights or args.init_from:
        return []
    return ["Started from random weights; published weights usually do far better on data of this size."]


def list_runs(output_dir):
    """A dict for each finished run in a folder, by its start: what it was, and what its verdict rests on."""
    rows = []
    for path in sorted(output_dir.glob("run_*/metrics.json")):
        with contextlib.suppress(common.UserError, KeyError, TypeError):  # comparisons, and what is not of this version
            record = common.read_json(path.with_name("args.json"))
            found = common.read_json(path)["headline"]
            rows.append({
                "finished": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
                "script": record["script"],
                "name": record["flags"].get("name"),
                "verdict": found["verdict"],
                "metric": found["metric"],
                "value": found["value"],
                "low": found["interval"][0],
                "high": found["interval"][1],
                "baseline": found["baseline"]["name"],
                "baseline_value": found["baseline"]["value"],
                "data": record["data"].get("fingerprint", "")[:8],
                "folder": path.parent.name})
    return rows


def comparison_sentence(row):
    """What one dict of table_judging.compare_tables says, and what the two models had done with the rows."""
    verb = "" if row["better"].startswith("not ") else " is better"
    worst = seen_rows.worst([row["seen_first"], row["seen_second"]])
    first = metric_names.number_text(row["value_of_first"])
    second = metric_names.number_text(row["value_of_second"])
    difference = metric_names.number_text(row["difference"], "+.3f")
    return (f"{row['first']} (rows: {row['seen_first']}) against {row['second']} (rows: {row['seen_second']}): "
            f"{row['better']}{verb}, {row['metric']} {first} and {second}, difference {difference} "
            f"{verdicts.interval_text(row['low'], row['high'], row['method'])}"
            f"{verdicts.ENDINGS[worst]}")


def write_comparison(run, rows, sections):
    """comparison.csv, report.html and metrics.json of several tables on the same rows: which of two is better.

    sections: (title, HTML blocks) that stand above it.
    """
    sentences = list(map(comparison_sentence, rows))
    sections = [
        *sections,
        ("Comparison", [reporting.html_table(
            rows, caption="Pairs of tables on the same rows; the interval is of the paired difference")]),
        ("Command and versions", reporting.command_blocks()),
    ]
    found = " ".join(sentences[:3]) or "No two of them could be compared; the log says why."
    verdict = verdicts.Verdict("caution", "Comparison", found)
    reporting.write_report(run.path("report.html"), f"Comparison: {run.folder.name}",
                           verdict, sections, run.compute.text)
    common.write_table(run.path("comparison.csv"), rows)
    common.write_json(run.path("metrics.json"), {"comparisons": rows})
    for sentence in sentences:
        run.say(sentence)
    run.say(f"open next: {run.path('report.html')}")


def headline(result, metric, level):
    """What metrics.json of every script says first: the metric of the verdict, beside the strongest baseline."""
    model = result.overall.model[metric]
    difference = result.overall.difference[metric]
    return {
        "metric": metric,
        "value": model.value,
        "interval": [model.low, model.high],
        "baseline": {"name": result.baseline_name, "value": result.overall.baseline[metric].value},
        "difference": {"value": difference.value, "interval": [difference.low, difference.high]},
        "verdict": verdicts.outcome_of(result.gain(metric)),
        "level": level,
    }


def page_sections(run, setting, blocks, sections, metrics):
    """[(heading, HTML blocks)] of the page of a run, in order.

    blocks, sections: as in close_run; metrics: what it returns.
    """
    marked = [reporting.html_text(f"ALARM: {alarm}", "poor") for alarm in metrics["alarms"]]
    marked += [reporting.html_text(doubt, "caution") for doubt in metrics["doubts"]]
    criteria = reporting.html_table(metrics["criteria"], digits=".4g", caption="Criteria")
    when = " before their calibration, which the other folds give" if "calibration" in metrics else ""
    folds = reporting.html_table(fold_table(setting.folds), digits=".4g", caption=f"Folds{when}")
    return [
        ("Alarms and doubts", marked),
        ("Data and split", setting.data),
        ("Leakage", [*reporting.leakage_blocks(run), *setting.similar]),
        ("Metrics", [*blocks, criteria, folds]),
        *sections,
        ("Learning curves", reporting.history_blocks(run)),
        ("Best and worst cases", setting.cases),
        ("Limits", [reporting.html_list(setting.limits)]),
        ("Command and versions", reporting.command_blocks(run.args)),
    ]


def close_run(run, setting, *, result, metric, verdict, alarms, meanings, figures, blocks, sections, numbers,
              doubts, further_estimates=None):
    """Write report.html and metrics.json of a run, and say its verdict; returns what metrics.json holds.

    result: subject_intervals.Result; metric, verdict: of the verdict, and its sentence; meanings: of the names that
    --criteria may use; figures: key figures for the top of the report; blocks: HTML of the section Metrics; sections:
    (title, HTML blocks) of the task's own sections; numbers: what else metrics.json says; doubts: sentences on what
    beside the alarms keeps the verdict from green; further_estimates: {name: Estimate} of names that mean no metric of
    the result.
    """
    seen = seen_rows.sentences(setting.seen)
    alarms = [*alarms, *setting.alarms, *gap_alarms_of_folds(run, setting.folds),
              *identical_fold_alarms(setting.folds)]
    if "train" in seen:
        alarms.append(seen.pop("train"))
    doubts = [*doubts, *verdicts.chance_doubts(result, metric), *seen.values()]
    if vars(run.args).get("dry_run"):
        doubts.append("A dry run, of two batches and one epoch, shows that everything works; its numbers say nothing")
    reached = verdicts.reach_verdict(result.gain(metric), alarms + doubts, verdict)
    estimates = (further_estimates or {}) | verdicts.named_estimates(result, meanings)
    criteria = verdicts.judge_criteria(
        verdicts.parse_criteria(run.args.criteria, meanings), estimates, setting.worst_seen)
    metrics = {
        "schema": METRICS_SCHEMA,
        "headline": headline(result, metric, reached.level),
        "part": setting.part,
        "best_epoch": setting.best_epoch,
        "verdict": verdict,
        "held_out": setting.held_out,
        **result.record(),
        **numbers,
        "alarms": alarms,
        "doubts": doubts,
        "criteria": criteria,
        "folds": setting.folds,
    }
    reporting.write_report(
        run.path("report.html"), f"{setting.title}: {run.folder.name}", reached,
        page_sections(run, setting, blocks, sections, metrics), run.compute.text, figures)
    common.write_json(run.path("metrics.json"), metrics)  # last: its presence says that the run is finished
    if "sample" in metrics:
        run.say(f"effective sample: {sample_sentence(metrics['sample'])}")
    verdicts.say_results(run, metrics)
    if run.folder.name.startswith("run_"):  # no fold
        with contextlib.suppress(common.UserError):  # the next run that is finished lists this one too
            common.write_table(run.folder.parent / "runs.csv", list_runs(run.folder.parent))
    return metrics
