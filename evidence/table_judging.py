"""Judge tables of predictions of which nothing else is known, and hold several against each other.

Letters: M rows.
"""
import dataclasses
import itertools
from pathlib import Path

import numpy as np

import common
from evidence import (
    class_judging, judging, metric_names, prediction_tables, reporting, score_judging, seen_rows, verdicts)

PREDICTIONS = ("predictions_folds.csv", "predictions_test.csv", "predictions_val.csv")  # the first of a run counts
FEWEST_SHARED = 5  # rows of two runs that are compared
RANK_METRICS = ("roc_auc", "average_precision")  # what the order of the rows alone decides


def judge_table(run, table, path):
    """Judge one table in a run folder of its own; returns its metrics."""
    for note in (f"baselines: {', '.join(table.baselines)}; --baseline names another column", *table.notes):
        run.say(f"note: {note}")
    setting = judging.Setting(
        title=f"Predictions of {path.name}",
        seen=table.seen,
        alarms=table.alarms,
        data=[judging.rows_text(table)],
        limits=["Judged from the table alone: what train rows share with these is not known here.", *table.notes])
    if isinstance(table, prediction_tables.ScoreTable):
        return score_judging.judge_scores(run, table, setting)
    return class_judging.judge_classes(run, table, setting)


def read_table(path, args, baseline=None):
    """The labelled rows of a file.

    Raises UserError for one that cannot be judged, or that a flag does not fit.
    """
    table = prediction_tables.read_predictions(path, args.group_column, baseline, args.positive_class)
    prediction_tables.refuse_useless(table, path)
    kind = class_judging
    if isinstance(table, prediction_tables.ScoreTable):
        kind = score_judging
        if args.positive_class:
            raise common.UserError("--positive_class is of classes; the table holds scores")
    meanings = kind.criteria_names(table.names)
    for bar in verdicts.parse_criteria(args.criteria, meanings):
        if kind is class_judging and table.score is not None and meanings[bar["name"]].metric not in RANK_METRICS:
            raise common.UserError(f"--criteria {bar['name']}: of a score that is no probability "
                                   "only AUC and average precision mean something")
    judged = table.labelled()
    if len(judged.truth) < len(table.truth):
        judged.notes.append(f"only {len(judged.truth)} of {len(table.truth)} rows have a true value; no others count")
    return judged


def same_rows(tables, paths):
    """The tables with the rows of the first, in its order.

    Raises UserError where rows or truth differ.

    paths: their files or names, for messages.
    """
    first = tables[0]
    names = first.row_names
    aligned = [first]
    for table, path in zip(tables[1:], paths[1:]):
        others = table.row_names
        if sorted(names) != sorted(others) or table.names != first.names:
            missing = sorted(set(names) - set(others))
            raise common.UserError(
                f"{path} and {paths[0]} must judge the same rows, and targets in one order; {len(missing)} rows of the "
                f"first are missing ({common.shorten_list(missing, 3) or 'none'}), "
                f"{len(others)} and {len(names)} rows, "
                f"targets {common.shorten_list(table.names, 5)} and {common.shorten_list(first.names, 5)}")
        other = table.take(first.rows_of(others))
        rounding = 1e-3 * common.sd_without_nan(first.truth)  # one may write fewer digits
        if not np.allclose(other.truth, first.truth, rtol=0, atol=rounding, equal_nan=True):
            raise common.UserError(f"{path} and {paths[0]} have other true values in the same rows; compare one truth")
        aligned.append(other)
    return aligned


def compare_runs(folders, say):
    """compare_tables of any two run folders, on the rows that both have predicted.

    say: what is told, as notes, of runs and pairs that cannot be compared.
    """
    if len(folders) == 1:
        say(f"note: {folders[0].name} is the only run of its script: nothing to compare it with")
        return []
    tables = {}
    for folder in folders:
        path = next(filter(Path.exists, map(folder.joinpath, PREDICTIONS)), None)
        if path:
            tables[folder.name] = prediction_tables.read_predictions(path).labelled()
        else:
            say(f"note: {folder.name} is not compared: it holds none of {', '.join(PREDICTIONS)}")
    rows = []
    for names in itertools.combinations(tables, 2):
        pair = [tables[name] for name in names]
        shared = np.intersect1d(pair[0].row_names, pair[1].row_names)
        if len(shared) < FEWEST_SHARED:
            say(f"note: {' and '.join(names)} are not compared: they share {len(shared)} rows, "
                f"expected {FEWEST_SHARED}")
            continue
        pair = [table.take(np.isin(table.row_names, shared)) for table in pair]
        try:
            rows += compare_tables(same_rows(pair, names), names)
        except common.UserError as error:
            say(f"note: {' and '.join(names)} are not compared: {error}")
    return rows


def compare_tables(tables, names):
    """A dict for each pair: which is better, by the paired interval of the difference over the same resamples."""
    rows = []
    groups = next((table.groups for table in tables if table.groups is not None), None)
    for (a, name_a), (b, name_b) in itertools.combinations(zip(tables, names), 2):
        paired = dataclasses.replace(  # what any knows of the rows
            a.against(b, name_b),
            keys=max(a, b, key=lambda table: table.n_folds).keys,
            groups=groups)
        result = paired.compare()
        metric = a.metric
        gain = result.gain(metric)
        seen = [seen_rows.worst(table.seen) for table in (a, b)]
        better = {"better": name_a, "worse": name_b}.get(verdicts.outcome_of(gain), "not resolvable")
        if "train" in seen:
            better = "not comparable"
        rows.append({
            "first": name_a,
            "second": name_b,
            "metric": metric_names.METRICS[metric].label,
            "value_of_first": result.overall.model[metric].value,
            "value_of_second": result.overall.baseline[metric].value,
            "difference": gain.value,
            "low": gain.low,
            "high": gain.high,
            "better": better,
            "seen_first": seen[0],
            "seen_second": seen[1],
            "method": result.method,
        })
    return rows


@common.first_process_only
def write_runs_page(run, parent, listed, most_compared):
    """comparison.csv and report.html of runs, by script: what each found, flags that differ, and any two held together.

    listed: of judging.list_runs(parent), in the order of the page; of a script's runs the last
    `most_compared` are held against each other.
    """
    sections = []
    compared = []
    for script in dict.fromkeys(row["script"] for row in listed):
        own = [row for row in listed if row["script"] == script]
        folders = [parent / row["folder"] for row in own]
        tables = [reporting.html_table(own)]
        if len(own) > 1:
            tables.append(reporting.html_table(flags_that_differ(folders), caption="Flags that differ"))
        sections.append((script, tables))
        compared += compare_runs(folders[-most_compared:], run.say)
    judging.write_comparison(run, compared, sections)


def flags_that_differ(folders):
    """A dict for each run folder, of the flags that are not the same in all."""
    import pandas as pd
    of_run = {folder.name: common.read_json(folder / "args.json")["flags"] for folder in folders}
    flags = pd.DataFrame(of_run)
    differing = flags.astype(str).nunique(axis=1, dropna=False) > 1
    shown = flags[differing].map(reporting.public_text, na_action="ignore")
    return shown.T.reset_index(names="folder").to_dict("records")
