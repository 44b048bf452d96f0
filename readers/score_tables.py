"""Tables of observers' scores of frame sequences, and fold files that others made.

Letters: N rows, R scores.
"""
import ast
import dataclasses
import re

import numpy as np

import common
from readers import csv_tables, event_tables, event_times, file_names

GROUP_COLUMNS = "animal animal_id subject subject_id participant participant_id patient patient_id group".split()
RATER_COLUMNS = "rater rater_id observer observer_id coder coder_id annotator annotator_id scorer scorer_id".split()
NO_SCORE = re.compile(
    r"(.*_)?(id|idx|n|sd|index|frames?|sec|fps|path|filename|camera|date|day|time|fold)|unnamed.*|"
    r"row|line|animal|subject|participant|patient|individual|person|group|pen|cage|farm|herd|site|moment|session|visit|"
    r"trial|week|hour|month|year|rater|observer|coder|annotator|scorer|sex|age")


def sequence_rows(path):
    """CSV, or JSON as {"sequences": [...]}, as a dict keyed by id or as a bare list -> DataFrame of text cells.

    A dict inside an entry, such as {"scores": {...}}, stands for columns of its own.
    """
    import pandas as pd
    if path.suffix.lower() == ".json":
        rows = [dict(common.leaves(entry)) for entry in sequence_entries(path)]
        cells = pd.DataFrame(rows, index=range(1, len(rows) + 1), dtype=object)
        table = cells.map(str, na_action="ignore").fillna("")
    else:
        table = csv_tables.read_table(path)
    return table.map(event_tables.without_tensor)


def sequence_entries(path):
    """The dicts of a JSON file of sequences, with the key of a dict as their sequence_id."""
    content = csv_tables.read_json_under(path, "sequences")
    entries = as_list(content, "sequence_id")
    n_dicts = sum(isinstance(entry, dict) for entry in entries)
    if not entries or n_dicts < len(entries):
        raise common.UserError(
            f"{path}: expected a list of sequences, a dict of them by id, or one under 'sequences'; "
            f"found {type(content).__name__} in which {n_dicts} of {len(entries)} entries are dicts")
    return entries


def as_list(content, key_name, prefix=""):
    """A list as it is; of a dict those entries that are dicts and whose keys begin with the prefix, with their keys."""
    if isinstance(content, dict):
        return [
            {key_name: key, **entry}
            for key, entry in content.items() if isinstance(entry, dict) and str(key).startswith(prefix)]
    return content if isinstance(content, list) else []


def score_columns(rows, wanted, path, no_scores):
    """Names of the R score columns: those asked for in any spelling, else the numeric ones that are no ids or times.

    no_scores: keys of columns that are something else.
    """
    if wanted:
        return csv_tables.pick_columns(wanted, rows, f"{path} has no --target_columns")
    keys = {name: csv_tables.column_key(name) for name in rows}
    names = [
        name for name, key in keys.items()
        if not (key in no_scores or NO_SCORE.fullmatch(key) or event_times.column_match(key))
        and csv_tables.looks_numeric(rows[name])]
    if not names:
        raise common.UserError(
            f"{path}: expected columns of scores, found none among "
            f"{common.shorten_list(rows, 40)}; name them with --target_columns")
    return names


def drop_times_without_unit(table):
    """(the table without the columns of times whose names say no unit, names of those)."""
    unsaid = []
    while found := [column.name for column in event_times.time_columns(table) if column.unit is None]:
        unsaid += found
        table = table.drop(columns=found)  # without an onset, an offset would be taken for the start
    return table, unsaid


def read_sequences(path, root=None, group_column=None, target_columns=None, need_labels=True, path_column=None,
                   min_event_sec=1.0, moment_column=None, row_filter=None, **finding):
    """Scores of frame sequences (CSV or JSON) -> EventTable for --task regress; names as the file spells them.

    Several rows of one sequence (one per rater) become their mean, that of each rater is kept.
    Groups: group_column, else the first of GROUP_COLUMNS. Times are columns whose names say their
    unit. finding, errors: as read_events has them.
    """
    raw = sequence_rows(path)
    if target_columns and not need_labels:  # new sequences may come without the scores of a trained model
        known = set(map(csv_tables.column_key, raw))
        raw = raw.assign(**{name: "" for name in target_columns if csv_tables.column_key(name) not in known})
    sources = (*event_tables.PATH_COLUMNS, "media", "sequence_id", "id")
    named = filter(None, (group_column, path_column, moment_column))
    no_scores = {*sources, *map(csv_tables.column_key, named)}
    names = score_columns(raw, target_columns, path, no_scores)
    target = np.column_stack([csv_tables.to_numbers(raw[name], f"{path}, column {name}") for name in names])  # (N, R)
    extra = event_tables.keyed_columns(raw, path).drop(columns=[csv_tables.column_key(name) for name in names])
    source = csv_tables.find_column(extra, sources, path_column, f"{path} has no column for --path_column")
    group = csv_tables.find_column(extra, GROUP_COLUMNS, group_column, f"{path} has no column for --group_column")
    if source is None:
        raise common.UserError(
            f"{path}: no column of folders; name it with --path_column (found: {common.shorten_list(extra, 40)})")
    timed, unsaid = drop_times_without_unit(extra)
    rows = event_tables.describe_rows(timed, path, root or path.parent, extra[source], min_event_sec)
    notes = []
    rows["source"] = event_tables.find_sources(rows, notes, root is None, **finding)
    if unsaid:
        notes.append(f"{', '.join(unsaid)}: not read as times of a sequence; those say their unit, such as start_sec")
    numeric = [name for name in extra
               if name not in {group, *no_scores} and csv_tables.looks_numeric(extra[name])]
    if not target_columns:
        notes.append(f"scores by their names: {common.shorten_list(names, 40)}; other numeric columns: "
                     f"{common.shorten_list(numeric) or 'none'}; --target_columns names the scores")
    rows["reason"] = np.where(np.isnan(target).all(axis=1) & need_labels, "no score", "")
    table = event_tables.build_table(rows, extra, names, notes, group, group_column, row_filter, target)
    table = merge_raters(table)
    *_, note = total_and_parts(names, table.target)
    if note and need_labels:  # of what is to be trained
        table.notes.append(note)
    return table


def merge_raters(table):
    """Rows of one sequence: several of one rater are averaged first, then the raters; unnamed equal rows count once.

    A blank name is nobody's: such rows are raters of their own.
    """
    import pandas as pd
    rater = csv_tables.find_column(table.extra, RATER_COLUMNS)
    raters = table.extra.get(rater, "")
    names = np.where(raters == "", table.lines, raters)
    of_raters = pd.DataFrame(table.target).groupby([table.clip_ids, names], sort=False).mean()
    sequences = of_raters.groupby(level=0, sort=False)
    ratings = np.empty(len(sequences), object)  # of each sequence (raters, R)
    for i, (_, block) in enumerate(sequences):
        if rater is None and len(block.drop_duplicates()) == 1:
            block = block[:1]
        ratings[i] = block.to_numpy()
    rated = sum(len(block) > 1 for block in ratings)
    if len(ratings) < len(table):
        table.notes.append(f"{len(table)} rows of {len(ratings)} sequences: {rated} have several raters, whose mean is "
                           "learnt; several rows of one rater, and other rows that repeat one, count once")
    return dataclasses.replace(
        table.take(~pd.Index(table.clip_ids).duplicated()),
        target=sequences.mean().to_numpy(),
        single_ratings=ratings if rated else None)


def total_and_parts(names, target):
    """R names, (N, R) scores -> (index of the total or None, indices of its parts, what to say if they do not add up).

    A name alone makes no total: none where half of the sums miss it by over half an SD of it.
    """
    import pandas as pd
    keys = list(map(csv_tables.column_key, names))
    total = next((r for r, key in enumerate(keys) if "total" in key), None)
    parts = [r for r, key in enumerate(keys) if not re.match("nrs|vas|total|sum|mean", key) and r != total]
    if total is None or not parts:
        return None, [], ""
    scores = pd.DataFrame(target)
    gap = (scores[total] - target[:, parts].sum(1)).abs().median()
    if not gap > 0.5 * scores[total].std(ddof=0):
        return total, parts, ""
    note = (f"{names[total]} differs from the sum of its {len(parts)} parts, by {gap:.3g} in the "
            "median row, and is not tied to it")
    return None, [], note


def target_weights(pairs, names):
    """--target_weights NAME=W ... -> tuple of R weights, 1 where not named. Raises UserError."""
    weights = dict.fromkeys(map(csv_tables.column_key, names), 1.0)
    for text in pairs or []:
        name, _, value = text.rpartition("=")
        key = csv_tables.column_key(name)
        if key not in weights or not csv_tables.NUMBER.fullmatch(value) or float(value) < 0:
            raise common.UserError(f"--target_weights expects NAME=WEIGHT of "
                                   f"{common.shorten_list(names, 40)}, found {text!r}")
        weights[key] = float(value)
    return tuple(weights.values())


def read_cv_file(path, table):
    """Split file -> list of dicts(order, train (n,) rows, val (m,) rows), in order of the folds.

    cv_folds as a list, as a dict with fold_0 keys, or either as a string of Python; or a list or
    dict at the top level. Each fold names train_animals and val_animals, or train and val. Animals
    without rows are noted, and those that no fold judges. Raises UserError: no folds, an animal on
    both sides or judged twice, a side without rows.
    """
    if table.groups is None:
        raise common.UserError(f"--cv_file {path} names animals: it needs --group_column")
    content = csv_tables.read_json_under(path, "cv_folds")
    if isinstance(content, str):
        content = as_python(content, path)
    listed = as_list(content, "fold", prefix="fold")
    if not listed:
        raise common.UserError(
            f"--cv_file {path}: expected cv_folds as a list or with keys fold_0, fold_1, ...; "
            f"found {str(content)[:60]}")
    folds = [fold_rows(fold, k, path, table) for k, fold in enumerate(listed)]
    n_judged = sum(np.isin(np.arange(len(table)), fold["val"]) for fold in folds)  # (N,)
    twice = dict.fromkeys(table.groups[n_judged > 1])
    never = dict.fromkeys(table.groups[n_judged == 0])
    if twice:
        raise common.UserError(f"--cv_file {path}: expected each animal in val_animals of one fold, as its rows are "
                               f"judged once; in several: {common.shorten_list(twice)}")
    if never:
        table.notes.append(f"--cv_file: never judged, in val_animals of no fold: {common.shorten_list(never)}")
    return sorted(folds, key=lambda fold: fold["order"])


def as_python(text, path):
    """The value of a string of Python literals, in which tensor(9) is 9. Raises UserError."""
    try:
        return ast.literal_eval(re.sub(r"tensor\(([^(),]*)[^()]*\)", r"\1", text))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise common.UserError(
            f"--cv_file {path}: cannot read {text[:60]!r} as a list of folds ({common.one_line(error)})") from None


def fold_rows(fold, k, path, table):
    """One fold of a split file -> dict(order, train, val). Raises UserError, see read_cv_file."""
    fold = fold if isinstance(fold, dict) else {}
    train, val = [animals_of(fold, side, f"--cv_file {path}, fold {k}") for side in ("train", "val")]
    both = sorted(train & val)
    unknown = sorted((train | val) - set(table.groups))
    train_rows, val_rows = [np.flatnonzero(np.isin(table.groups, list(animals))) for animals in (train, val)]
    if both or not len(train_rows) or not len(val_rows):
        raise common.UserError(
            f"--cv_file {path}, fold {k}: expected train_animals and val_animals that the scores "
            f"have and that do not overlap; on both sides: {common.shorten_list(both) or 'none'}; "
            f"rows: {len(train_rows)} and {len(val_rows)}; without rows: {common.shorten_list(unknown) or 'none'}")
    if unknown:
        table.notes.append(f"--cv_file, fold {k}: no rows of {common.shorten_list(unknown)}")
    return {"order": file_names.natural_key(fold.get("fold", k)), "train": train_rows, "val": val_rows}


def animals_of(fold, side, where):
    """Set of the animals under train_animals or train; the same for val.

    UserError without such a list.
    """
    animals = fold.get(f"{side}_animals", fold.get(side))
    if not isinstance(animals, (list, tuple, set)):
        raise common.UserError(f"{where}: expected {side}_animals or {side} with a list of "
                               f"animals, found the keys {common.shorten_list(fold) or '(none)'}")
    return set(map(event_tables.plain_level, animals))
