"""Judge a table of predictions that any program wrote: intervals, baseline, calibration, verdict, one page.

    python judge_predictions.py --predictions predictions.csv --group_column subject
    python judge_predictions.py --predictions mine.csv theirs.csv --group_column subject
    python judge_predictions.py --predictions detections.json --truth coco.json
    python judge_predictions.py --runs outputs

A table of scores has the columns NAME_true and NAME_predicted for each score, and NAME_BASELINE where there is one. A
table of classes has true_label (or label) and prob_CLASS for each class, or score for two classes. Writes
outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), metrics.json, scores.csv (each score), plots, args.json,
log.txt. With several tables of the same rows each gets a folder, and comparison.csv says which of two is better, with
the paired interval of their difference. With --truth the predictions are COCO results, judged against COCO or part
annotations; no picture is read (per_part.csv, per_state.csv).
With --runs report.html lists the finished runs in a folder, as its runs.csv does, with the flags that differ, and
holds any two of the newest against each other on the rows that both have predicted.

Units: those of the table.
"""
from pathlib import Path

import numpy as np

import common
from evidence import detection_judging, judging, reporting, table_judging
from readers import part_boxes


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("predictions").add_argument
    add("--predictions", type=Path, nargs="+", help="CSV of predictions, or COCO results with --truth")
    add("--runs", type=Path, metavar="FOLDER", help="instead of --predictions: compare the runs in a folder")
    add("--truth", type=Path, help="annotations that detections are judged against")
    add("--box_format", choices=part_boxes.BOX_FORMATS,
        help="with --truth: what the four numbers of a detected box are (default: left top width height in pixels)")
    add("--group_column", help="column whose rows are not independent, such as subject (default: "
        "group, else names that repeat)")
    add("--baseline", metavar="COLUMN", help="what the model must beat: a column, or BASELINE of NAME_BASELINE or "
        "BASELINE_prob_CLASS (default: the best of all there are); with --truth: COCO results of another detector")
    add("--positive_class", help="class whose AUC counts (default: the rarest), and that `score` "
        "speaks for (default: 1, yes, true or positive)")
    add("--criteria", default="", help='bars to judge, e.g. "r2>0.15,mae<3.0": PASS, FAIL or NOT RESOLVABLE')
    add("--held_out", action="store_true", help="state that no model was trained or chosen on these rows")
    add("--output_dir", type=Path, default=Path("outputs"), help="parent of the timestamped run folder")
    # no network runs here
    parser.set_defaults(device="cpu", use_amp="off", deterministic=False, resume=None, tensorboard=False, wandb=False)
    args = common.parse_arguments(parser, argv)
    if bool(args.predictions) == bool(args.runs):
        parser.error("give either --predictions or --runs")
    idle = {  # what does nothing, by what is judged
        "runs": "truth box_format group_column baseline positive_class criteria held_out",
        "truth": "positive_class",
        "predictions": "box_format",
    }
    way = next(name for name in idle if getattr(args, name))
    for name in args.given.intersection(idle[way].split()):
        parser.error(f"--{name} does nothing with --{way} alone; leave it out")
    if way == "predictions" and any(path.suffix.lower() == ".json" for path in args.predictions):
        parser.error(
            "--predictions expected a CSV, found a .json file; for COCO results name the annotations with --truth")
    if args.truth and len(args.predictions) > 1:
        parser.error("--truth judges one file of detections: give one file to --predictions, another one to --baseline")
    return args


def judge_coco(args):
    """Judge COCO results against annotations."""
    path = args.predictions[0]
    reading = args.group_column, args.box_format
    truth, detections, seen, annotated = detection_judging.read_coco_results(args.truth, path, *reading)
    scored = f"{len(detections)} pictures scored, {sum(map(len, truth.boxes))} boxes of {len(truth.parts)} parts."
    setting = judging.Setting(
        title=f"Detections of {path.name}",
        seen=as_stated(seen, args),
        data=[reporting.html_text(scored)],
        limits=["The mean boxes are those of these very pictures, which favours the baseline slightly."])
    trained = {}
    if args.baseline:
        baseline = Path(args.baseline)
        _, other, _, also = detection_judging.read_coco_results(args.truth, baseline, *reading)
        trained[baseline.stem] = other
        annotated.notes += [note for note in also.notes if note not in annotated.notes]
    detection_judging.check_criteria(args.criteria, truth.parts, detections[0].states is not None)
    with common.start_run(args) as run:
        run.write_args(predictions=[path], truth=args.truth)
        if annotated.skipped:
            common.write_table(run.path("skipped.csv"), annotated.skipped)
            run.say(f"note: {len(annotated.skipped)} annotations are left out (listed in skipped.csv)")
        for note in annotated.notes:
            run.say(f"note: {note}")
        priors = [detection_judging.mean_boxes(truth)] * len(detections)
        detection_judging.judge_detections(run, truth, detections, setting, priors, trained)


def as_stated(seen, args):
    """(M,) seen_rows.WORDS, with --held_out "new" in place of "not known"."""
    return np.where(args.held_out & (seen == "not known"), "new", seen)


def judge_several(run, args, tables):
    """A folder for each table, and comparison.csv and report.html above them."""
    names = [f"{number}_{path.stem}" for number, path in enumerate(args.predictions, 1)]
    rows = table_judging.compare_tables(tables, names)
    for name, path, table in zip(names, args.predictions, tables):
        with run.child(name) as child:
            table_judging.judge_table(child, table, path)
    # groups that one table names count for all
    fullest = max(tables, key=lambda table: (table.groups is not None, len(table.alarms)))
    judging.write_comparison(run, rows, [("Alarms", [reporting.html_list(fullest.alarms)])])


def judge_runs(args):
    """One page of the runs in a folder."""
    runs = judging.list_runs(args.runs)
    if not runs:
        raise common.UserError(f"--runs {args.runs} holds no finished run (run_*/metrics.json)")
    with common.start_run(args) as run:
        run.write_args(runs=args.runs)
        table_judging.write_runs_page(run, args.runs, runs, most_compared=6)


def main():
    args = parse_args()
    if args.runs:
        return judge_runs(args)
    if args.truth:
        return judge_coco(args)
    tables = [table_judging.read_table(path, args, args.baseline) for path in args.predictions]
    for table in tables:
        table.seen = as_stated(table.seen, args)
    tables = table_judging.same_rows(tables, args.predictions)
    with common.start_run(args) as run:
        run.write_args(predictions=args.predictions)
        if len(tables) == 1:
            table_judging.judge_table(run, tables[0], args.predictions[0])
        else:
            judge_several(run, args, tables)


if __name__ == "__main__":
    common.run_main(main)
