"""Judge tables of predictions of which nothing else is known, and hold several against each other.

Letters: M rows.
"""
import itertools
from pathlib import Path

import numpy as np

import common
from evidence import class_judging, judging, metric_names, prediction_tables, reporting, score_judging

FEWEST_SHARED = 5  # rows of two runs that are compared


def judge_table(run, table, path):
    """Judge one table in a run folder of its own; returns its metrics."""
    setting = judging.Setting(
        title=f"Predictions of {path.name}",
        seen=table.seen,
        data=[judging.rows_text(table)],
        limits=["Judged from the table alone: what train rows share with these is not known here."])
    if isinstance(table, prediction_tables.ScoreTable):
        return score_judging.judge_scores(run, table, setting)
    return class_judging.judge_classes(run, table, setting)


def same_rows(tables, paths):
    """The tables with the rows of the first, in its order. Raises UserError where rows or truth differ."""
    first = tables[0]
    names = first.row_names
    aligned = [first]
    for table, path in zip(tables[1:], paths[1:]):
        others = table.row_names
        lacking = sorted(set(names) - set(others))
        if lacking or len(others) != len(names) or table.names != first.names:
            raise common.UserError(
                f"{path} and {paths[0]} must judge the same rows and targets; {len(lacking)} rows of the first are "
                f"missing ({common.shorten_list(lacking, 3) or 'none'}), {len(others)} and {len(names)} rows, "
                f"targets {common.shorten_list(table.names, 5)} and {common.shorten_list(first.names, 5)}")
        other = prediction_tables.take(table, prediction_tables.rows_of(first, others))
        if not np.array_equal(other.truth, first.truth, equal_nan=True):
            raise common.UserError(f"{path} and {paths[0]} have other true values in the same rows; compare one truth")
        aligned.append(other)
    return aligned


def compare_runs(folders):
    """compare_tables of any two run folders, on the rows that both have predicted and for the same targets."""
    files = ("predictions_folds.csv", "predictions_test.csv", "predictions_val.csv")
    found = [next(filter(Path.exists, map(folder.joinpath, files)), None) for folder in folders]
    tables = {path: prediction_tables.read_predictions(path) for path in found if path}
    rows = []
    for paths in itertools.combinations(tables, 2):
        pair = [tables[path] for path in paths]
        shared = np.intersect1d(pair[0].row_names, pair[1].row_names)
        if len(shared) < FEWEST_SHARED or pair[0].names != pair[1].names:
            continue
        pair = [prediction_tables.take(table, np.isin(table.row_names, shared)) for table in pair]
        rows += compare_tables(same_rows(pair, paths), [path.parent.name for path in paths])
    return rows


def compare_tables(tables, names):
    """A dict for each pair: which is better, by the paired interval of the difference over the same resamples."""
    rows = []
    for (a, name_a), (b, name_b) in itertools.combinations(zip(tables, names), 2):
        result = a.against(b, name_b).compare()
        metric = a.metric
        gain = result.gain(metric)
        better = "not resolvable"
        if gain.low > 0 or gain.high < 0:
            better = name_a if gain.value > 0 else name_b
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
            "method": result.method,
        })
    return rows


@common.first_process_only
def write_runs_page(run, parent, listed, most_compared):
    """comparison.csv and report.html of runs, by script: what each found, flags that differ, and any two held together.

    listed: of judging.list_runs(parent), in the order of the page; of a script's runs the last `most_compared` are
    held against each other.
    """
    sections = []
    compared = []
    for script in dict.fromkeys(row["script"] for row in listed):
        own = [row for row in listed if row["script"] == script]
        folders = [parent / row["folder"] for row in own]
        found = [{"folder": row["folder"]} | {name: row[name] for name in row if name != "script"} for row in own]
        tables = [reporting.html_table(found)]
        if len(own) > 1:
            tables.append(reporting.html_table(flags_that_differ(folders), caption="Flags that differ"))
        sections.append((script, tables))
        compared += compare_runs(folders[-most_compared:])
    common.write_table(run.path("comparison.csv"), compared)
    judging.write_comparison(run, compared, sections)


def flags_that_differ(folders):
    """A dict for each run folder, of the flags that are not the same in all."""
    import pandas as pd
    flags = pd.DataFrame({folder.name: common.read_json(folder / "args.json")["flags"] for folder in folders}).astype(str)
    return flags[flags.nunique(axis=1) > 1].T.reset_index(names="folder").to_dict("records")
