"""Judge a table of predictions that any program wrote: intervals, baseline, calibration, verdict, one page.

    python judge_predictions.py --predictions predictions.csv --group_column subject
    python judge_predictions.py --predictions mine.csv theirs.csv --group_column subject
    python judge_predictions.py --predictions detections.json --truth coco.json

A table of scores has the columns NAME_true and NAME_predicted for each score, and NAME_BASELINE where there is one.
A table of classes has true_label (or label) and prob_CLASS for each class, or score for two classes. Detections are
COCO results beside their COCO annotations. Writes outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first),
metrics.json, plots, args.json, log.txt. With several tables of the same rows each gets a folder, and comparison.csv says
which of two is better, with the paired interval of their difference.

Units: those of the table.
"""
import itertools
from pathlib import Path

import numpy as np

import common
from evidence import class_judging, judging, prediction_tables, score_judging, subject_intervals, verdicts


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("predictions").add_argument
    add("--predictions", type=Path, nargs="+", required=True, help="CSV of predictions, or COCO results (with --truth)")
    add("--truth", type=Path, help="COCO annotations that detections are judged against")
    add("--group_column", help="column whose rows are not independent, such as subject (default: group, if there)")
    add("--baseline", metavar="COLUMN", help="what the model must beat: a column, or BASELINE of NAME_BASELINE or "
        "BASELINE_prob_CLASS (default: the best of all there are)")
    add("--positive_class", help="class whose AUC counts (default: the rarest)")
    add("--criteria", default="", help='bars to judge, e.g. "r2>0.15,mae<3.0": PASS, FAIL or NOT RESOLVABLE')
    add("--held_out", action="store_true", help="no model was trained or chosen on these rows: I know that they are new")
    add("--output_dir", type=Path, default=Path("outputs"), help="parent of the timestamped run folder")
    args = common.parse_arguments(parser, argv)
    if args.truth and len(args.predictions) > 1:
        parser.error("--truth judges one file of detections; give one to --predictions")
    return args


def judge_table(run, args, table, path):
    """Judge one table in a run folder of its own; returns its metrics."""
    setting = judging.Setting(
        title=f"Predictions of {path.name}",
        held_out=True if args.held_out else None,
        criteria=args.criteria,
        data=[judging.rows_text(table)],
        limits=["Judged from the table alone: which rows the model was trained on, and what they share with these, "
                "is not known here."])
    if isinstance(table, prediction_tables.ScoreTable):
        return score_judging.judge_scores(run, table, setting)
    return class_judging.judge_classes(run, table, setting)


def same_rows(tables, paths):
    """The tables with the rows of the first, in its order. Raises UserError where rows or truth differ."""
    first = tables[0]
    wanted = next(iter(first.keys.values()))
    aligned = [first]
    for table, path in zip(tables[1:], paths[1:]):
        place = {name: row for row, name in enumerate(next(iter(table.keys.values())))}
        lacking = [name for name in wanted if name not in place]
        if lacking or len(place) != len(wanted) or table.names != first.names:
            raise common.UserError(
                f"{path} and {paths[0]} must judge the same rows and targets; {len(lacking)} rows of the first are "
                f"missing ({common.shorten_list(lacking, 3) or 'none'}), {len(place)} and {len(wanted)} rows, "
                f"targets {common.shorten_list(table.names, 5)} and {common.shorten_list(first.names, 5)}")
        other = table.take(np.array([place[name] for name in wanted]))
        if not np.array_equal(other.truth, first.truth, equal_nan=True):
            raise common.UserError(f"{path} and {paths[0]} have other true values in the same rows; compare one truth")
        aligned.append(other)
    return aligned


def compare_tables(tables, names):
    """A dict for each pair: which is better, by the paired interval of the difference over the same resamples."""
    rows = []
    for (a, name_a), (b, name_b) in itertools.combinations(zip(tables, names), 2):
        if isinstance(a, prediction_tables.ScoreTable):
            metric = "r2"
            result = subject_intervals.bootstrap_regression(
                a.predicted, a.target, a.groups, b.predicted, names=a.names, baseline_name=name_b)
        else:
            metric = "roc_auc"
            result = subject_intervals.bootstrap_classification(
                a.probability, a.label, a.groups, b.probability, a.names, a.threshold, a.positive, baseline_name=name_b)
        gain = result.gain(metric)
        better = "not resolvable"
        if gain.low > 0 or gain.high < 0:
            better = name_a if gain.value > 0 else name_b
        rows.append({
            "first": name_a,
            "second": name_b,
            "metric": common.METRICS[metric].label,
            "value_of_first": result.overall.model[metric].value,
            "value_of_second": result.overall.baseline[metric].value,
            "difference": gain.value,
            "low": gain.low,
            "high": gain.high,
            "better": better,
            "method": result.method,
        })
    return rows


def judge_several(run, args, tables):
    """A folder for each table, and comparison.csv and report.html above them."""
    names = [f"{number}_{path.stem}" for number, path in enumerate(args.predictions, 1)]
    rows = compare_tables(same_rows(tables, args.predictions), names)
    for name, path, table in zip(names, args.predictions, tables):
        with run.child(name) as child:
            judge_table(child, args, table, path)
    common.write_table(run.path("comparison.csv"), rows)
    judging.write_comparison(run, rows)


def judge_coco(run, args):
    """Judge COCO results against COCO annotations."""
    truth, detections = detection_judging.read_coco_results(args.truth, args.predictions[0])
    setting = judging.Setting(
        title=f"Detections of {args.predictions[0].name}",
        held_out=True if args.held_out else None,
        criteria=args.criteria)
    detection_judging.judge_detections(run, truth, detections, setting)


def main():
    args = parse_args()
    with common.start_run(args) as run:
        run.write_args(predictions=[str(path) for path in args.predictions])
        if args.truth:
            return judge_coco(run, args)
        tables = [prediction_tables.read_predictions(path, args.group_column, args.baseline, args.positive_class)
                  for path in args.predictions]
        if len(tables) == 1:
            judge_table(run, args, tables[0], args.predictions[0])
        else:
            judge_several(run, args, tables)


if __name__ == "__main__":
    common.run_main(main)
