"""Parts and folds of a table of events: given by its manifests, by --test_groups, by a file, or made by the shared flags.

Letters: N rows.
"""
import numpy as np

import common
from evidence import splitting
from readers import event_tables, score_tables

PARTS = ("train", "val", "test")


def manifests_of(args):
    """{part: manifest} as given; the part '' is one manifest for all."""
    given = {part: getattr(args, f"{part}_manifest") for part in PARTS} | {"": args.manifest}
    return {part: path for part, path in given.items() if path}


def make_split(args, table):
    """{train, val, test: rows} by the manifests' parts, --test_groups, ratios or --split_file."""
    if (table.parts != "").any():
        split = {part: np.flatnonzero(table.parts == part) for part in PARTS}
        return split if len(split["val"]) else split | part_of_train(args, table, split["train"])
    if args.test_groups:
        test, rest = kept_for_test(args, table)
        return part_of_train(args, table, rest) | {"test": test}
    return splitting.split_of_flags(args, *split_columns(args, table))


def make_folds(args, table):
    """List of {train, val, test: rows}: of --cv_file or of --folds; test groups are in no fold."""
    test, rest = kept_for_test(args, table)
    if args.cv_file:
        folds = score_tables.read_cv_file(args.cv_file, table)
        if args.fold != "all" and args.fold >= len(folds):
            raise common.UserError(f"--fold {args.fold}: --cv_file {args.cv_file} has {len(folds)} folds, from 0 to "
                                   f"{len(folds) - 1}")
        return [{"train": np.setdiff1d(fold["train"], test), "val": np.setdiff1d(fold["val"], test), "test": test}
                for fold in folds]
    folds = splitting.folds_of_flags(args, *split_columns(args, table, rest))
    return [{"train": rest[fold["train"]], "val": rest[fold["val"]], "test": test} for fold in folds]


def split_columns(args, table, rows=slice(None)):
    """What a split goes by: the rows' keys, what is shared out evenly, and what is kept whole."""
    kept_whole = event_tables.split_keys(table, args.split_by)
    return [column[rows] for column in (table.clip_ids, event_tables.strata_of(table), kept_whole)]


def kept_for_test(args, table):
    """(rows of --test_groups, all others)."""
    is_test = np.zeros(len(table), bool)
    if args.test_groups:
        is_test = event_tables.group_mask(table, args.test_groups)
    return np.flatnonzero(is_test), np.flatnonzero(~is_test)


def part_of_train(args, table, rows):
    """train and val cut from these rows by their ratios."""
    shares = common.split_ratios(args)
    val_ratio = shares["val"] / (shares["train"] + shares["val"])
    keys, strata, kept_whole = split_columns(args, table, rows)
    made = splitting.make_split(
        len(rows), {"train": 1 - val_ratio, "val": val_ratio}, strata, kept_whole, args.seed, keys)
    return {part: rows[chosen] for part, chosen in made.items()}  # chosen: indices into `rows`


def few_rows(table, rows, count):
    """The first `count` of the rows and one of every class, for a dry run."""
    if table.label is None:
        return rows[:count]
    _, first = np.unique(table.label[rows], return_index=True)
    return np.union1d(rows[:count], rows[first])
