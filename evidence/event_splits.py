"""Parts and folds of a table of events: given by manifests, by --test_groups, by a file, or made by the shared flags.

Letters: N rows.
"""
from pathlib import Path

import numpy as np

import common
from evidence import judging, splitting
from readers import event_tables, score_tables


def add_arguments(add):
    """Where the events are, what their columns are called, and how they are split."""
    add("--manifest", type=Path, may_change=True,
        help="table of events or sequences (CSV, JSON), or a folder of class folders")
    for part in splitting.PARTS:
        add(f"--{part}_manifest", type=Path, may_change=True,
            help=f"events of the {part} part, instead of a split made here")
    add("--video_root", type=Path, may_change=True,
        help="folder that holds the videos, whatever folders the manifest names")
    add("--label_map", type=Path, may_change=True,
        help="file of spelling -> class (JSON, YAML, CSV); a blank class leaves the row out")
    add("--path_column", help="column of the videos' paths (default: by its name)")
    add("--label_column", help="classify: column of the labels (default: by its name)")
    add("--time_unit", choices=("sec", "ms", "min", "frame"),
        help="classify: unit of columns of times whose names say none (default: sec)")
    add("--target_columns", nargs="+", metavar="NAME",
        help="scores to learn (default: the numeric columns but for ids, times and the like, by their names)")
    add("--min_event_sec", type=common.AMOUNT, default=1.0,
        help="a shorter event gets a window of this length around it (default: %(default)s; predict: the checkpoint's)")
    add("--max_missing", type=common.SHARE, default=0.05,
        help="share of missing or unreadable videos, and of damaged frames, that is allowed")
    add("--split_by", choices=("event", "video", "group"),
        help="what a split keeps whole (default: the coarsest there is)")
    add("--filter", help='rows to use, e.g. "moment==M2 and age>=3"')
    add("--gap_sec", type=common.AMOUNT, default=30.0,
        help="windows of one video that are closer than this are reported")
    add("--cv_file", type=Path, may_change=True,
        help="folds of a study: cv_folds with train_animals and val_animals")
    add("--test_groups",
        help="groups kept for the test, e.g. 14,17; with --folds all models predict them")


def manifests_of(args):
    """{part: manifest} as given; the part '' is one manifest for all."""
    given = {part: getattr(args, f"{part}_manifest") for part in splitting.PARTS} | {"": args.manifest}
    return {part: path for part, path in given.items() if path}


def check_flags(parser, args):
    """parser.error for flags of the split that contradict each other."""
    manifests = manifests_of(args)
    if args.manifest and len(manifests) > 1:
        parser.error(f"--manifest {args.manifest} is split here; give it alone, or the manifests of the parts")
    if args.mode != "train":
        return
    asked = {name for name in ("folds", "cv_file", "test_groups", "split_file") if getattr(args, name)}
    if args.test_ratio:
        asked |= {"test_ratio"} & args.given  # else it stands in a configuration
    flags = ", ".join(f"--{name}" for name in sorted(asked))
    if manifests and not args.manifest:
        if not args.train_manifest:
            parser.error("manifests of parts need --train_manifest")
        if asked:
            parser.error(f"manifests of parts are the split, without folds or other ways to make one: {flags}")
        return
    if {"cv_file", "test_groups"} & asked and {"split_file", "test_ratio"} & asked:
        parser.error(f"give one way to split of: {flags}")
    if not args.cv_file:
        splitting.check_flags(parser, args)


def asked_splits(args, table):
    """The {train, val, test: rows} that a run trains on: one, or the folds that --fold asks for."""
    if not (args.folds or args.cv_file):
        return [make_split(args, table)]
    folds = make_folds(args, table)
    return folds if args.fold == "all" else [folds[args.fold]]


def make_split(args, table):
    """{train, val, test: rows} by the manifests' parts, --test_groups, ratios or --split_file."""
    parts = given_parts(args, table)
    if not any(parts):
        return splitting.split_of_flags(args, *split_columns(args, table))
    split = splitting.rows_by_part(parts)
    return split if len(split["val"]) else split | part_of_train(args, table, split["train"])


def make_folds(args, table):
    """List of {train, val, test: rows}: of --cv_file or of --folds; test groups are in no fold."""
    is_test = given_parts(args, table) == "test"
    test = np.flatnonzero(is_test)
    rest = np.flatnonzero(~is_test)
    if args.cv_file:
        folds = score_tables.read_cv_file(args.cv_file, table.take(rest))
        if args.fold != "all" and args.fold >= len(folds):
            raise common.UserError(f"--fold {args.fold}: --cv_file {args.cv_file} has {len(folds)} "
                                   f"folds, from 0 to {len(folds) - 1}")
        if args.folds not in (0, len(folds)):
            raise common.UserError(f"--folds {args.folds}: --cv_file {args.cv_file} has {len(folds)}; leave it out")
    else:
        folds = splitting.folds_of_flags(args, *split_columns(args, table, rest))
    return [{"train": rest[fold["train"]], "val": rest[fold["val"]], "test": test} for fold in folds]


def split_columns(args, table, rows=slice(None)):
    """What a split goes by: the rows' keys, what is shared out evenly, and what is kept whole."""
    kept_whole = event_tables.split_keys(table, args.split_by)
    return [column[rows] for column in (table.clip_ids, event_tables.strata_of(table), kept_whole)]


def given_parts(args, table):
    """(N,) part of each row by --test_groups (all others: train) or by the manifests, '' = none."""
    if not args.test_groups:
        return table.parts
    return np.where(event_tables.group_mask(table, args.test_groups), "test", "train")


def part_of_train(args, table, rows):
    """train and val cut from these rows by their ratios."""
    shares = splitting.ratios_of_flags(args)
    val_ratio = shares["val"] / (shares["train"] + shares["val"])
    keys, *others = split_columns(args, table, rows)
    made = splitting.make_split(keys, {"train": 1 - val_ratio, "val": val_ratio}, *others, args.seed)
    if not len(made["val"]):
        raise common.UserError(
            f"--val_ratio {args.val_ratio:g}: the validation part must not be empty, it chooses the epoch")
    return {part: rows[chosen] for part, chosen in made.items()}  # chosen: indices into `rows`


def limits(args, table):
    """Sentences on what a reader must not conclude from this run."""
    lines = ["Valid for clips like these, labelled by people like these; nothing else was tested."]
    if table.groups is None:
        lines.append("No --group_column: one animal, pen or scene may stand on both sides of the split.")
    elif args.split_by in ("event", "video") or len(set(table.groups)) == 1:
        lines.append("The same animals and places are on both sides of the split, so nothing is said of new ones.")
    return lines + judging.limits_of_start(args)
