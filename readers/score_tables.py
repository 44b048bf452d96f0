"""Tables of observers' scores of frame sequences, and fold files that others made.

Letters: N rows, R scores.
"""
import ast
import collections
import json
import math
import re
from pathlib import Path

import numpy as np

import common
from readers import csv_tables, event_tables

RATER_COLUMNS = ("rater", "rater_id", "observer", "observer_id")
NO_SCORE = re.compile(r"(.*_)?(id|idx|n|sd|index|frames?|sec|fps|path|filename|camera|date|day|time|fold)|unnamed.*|"
                      r"row|line|animal|subject|group|moment|rater|observer|age")


def sequence_rows(path):
    """CSV, or JSON as {"sequences": [...]}, as a dict keyed by id or as a bare list -> DataFrame of text cells."""
    import pandas as pd
    if Path(path).suffix.lower() != ".json":
        return csv_tables.read_table(path).map(without_tensor)
    content = read_loose_json(path)
    content = content.get("sequences", content) if isinstance(content, dict) else content
    if isinstance(content, dict):
        content = [{"sequence_id": key, **entry} for key, entry in content.items() if isinstance(entry, dict)]
    entries = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
    if not entries:
        raise common.UserError(f"{path}: expected a list of sequences, a dict of them by id, or one under 'sequences'; "
                               f"found {type(content).__name__} without any")
    rows = [{**entry, **{key: cell for value in entry.values() if isinstance(value, dict)
                         for key, cell in value.items()}} for entry in entries]
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if not any(isinstance(row.get(name), dict) for row in rows)]
    cells = [["" if row.get(name) in (None, "") or row[name] != row[name] else without_tensor(row[name])
              for name in names] for row in rows]
    return pd.DataFrame(cells, columns=names, index=range(1, len(rows) + 1), dtype=object)


def without_tensor(cell):
    """'tensor(9)' -> '9': as scripts print ids that they forgot to unpack."""
    return re.sub(r"^tensor\(\s*\[?([^,()\]]*).*\)$", r"\1", str(cell).strip()).strip()


def read_loose_json(path):
    """JSON of any origin, control characters in strings allowed. Raises UserError naming the place."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), strict=False)
    except (OSError, ValueError, RecursionError) as error:
        raise common.UserError(f"{path}: expected JSON, found {common.one_line(error)}") from None


def score_columns(rows, wanted, path):
    """Names of the R score columns: those asked for in any spelling, else the numeric ones that are no ids."""
    spelled = {event_tables.column_key(name): name for name in rows.columns}
    unknown = [name + common.closest(name, rows.columns) for name in wanted or [] if event_tables.column_key(name) not in spelled]
    if unknown:
        raise common.UserError(f"{path} has no --target_columns {common.shorten_list(unknown)} (found: "
                               f"{common.shorten_list(rows.columns, 40)})")

    def is_score(key):
        filled = [cell for cell in rows[spelled[key]] if cell]
        numeric = [bool(csv_tables.NUMBER.fullmatch(cell.replace(",", ".", 1))) for cell in filled]
        return not NO_SCORE.fullmatch(key) and np.mean(numeric or [0]) >= 0.5
    names = [spelled[event_tables.column_key(name)] for name in wanted] if wanted else [
        spelled[key] for key in spelled if is_score(key)]
    if not names:
        raise common.UserError(f"{path}: expected columns of scores, found none among {common.shorten_list(rows.columns, 40)}; "
                               "name them with --target_columns")
    return names


def with_missing_scores(rows, names):
    """The table with a blank column for each of the names that it has in no spelling."""
    known = {event_tables.column_key(name) for name in rows.columns}
    return rows.assign(**{name: "" for name in names if event_tables.column_key(name) not in known})


def read_sequences(path, root=None, group_column=None, target_columns=None, path_column=None, need_labels=True,
                   max_missing=0.05):
    """Scores of frame sequences (CSV or JSON) -> Table for --task regress; names as the file spells them.

    Several rows of one sequence (one per rater) become their mean, the single ratings are kept. Groups: group_column,
    else the column animal, animal_id, subject or group. Raises UserError as read_events does.
    """
    raw = sequence_rows(path)
    if target_columns and not need_labels:  # new sequences may come without the scores that a trained model has
        raw = with_missing_scores(raw, target_columns)
    names = score_columns(raw, target_columns, path)
    target = np.stack([csv_tables.to_numbers(raw[name], f"{path}, column {name}") for name in names], axis=1)
    rows = event_tables.keyed_columns(raw.drop(columns=names), path)
    source = event_tables.first_column(rows, path_column, (*event_tables.PATH_COLUMNS, "sequence_id", "id"), "--path_column", path)
    group = event_tables.first_column(rows, group_column, event_tables.GROUP_COLUMNS, "--group_column", path)
    if source is None:
        raise common.UserError(f"{path}: expected a column of folders ({', '.join(event_tables.PATH_COLUMNS)}), found "
                               f"{common.shorten_list(rows.columns, 40)}; name it with --path_column")
    windows, unit, faults = event_tables.event_windows(rows, path)
    core = {"path": rows[source], "part": "", "line": [f"{Path(path).name} row {line}" for line in rows.index],
            "root": str(root or Path(path).parent), "start": windows[:, 0], "end": windows[:, 1], "unit": unit,
            "row_order": event_tables.row_places(len(rows))}
    rows = rows.assign(**{f"@{name}": value for name, value in core.items()}).reset_index(drop=True)
    sources = event_tables.find_sources(rows, root is None, max_missing, notes := [])
    reasons = [fault or ("no such folder" if found is None else
                         "no score" if need_labels and np.isnan(scores).all() else "")
               for fault, found, scores in zip(faults, sources, target)]
    keep, table = event_tables.build_table(rows, sources, names, reasons, notes)
    table.target, table.groups = target[keep], event_tables.groups_of(rows.iloc[keep], group, group_column is not None, table)
    return with_total_note(merge_raters(table))


def merge_raters(table):
    """Rows of one sequence: equal scores without a rater column are repeats, others are raters and are averaged."""
    rows_of = collections.defaultdict(list)
    for row, clip in enumerate(table.clip_ids):
        rows_of[clip].append(row)
    has_raters = any(name in table.extra for name in RATER_COLUMNS)
    blocks = [table.target[rows] for rows in rows_of.values()]
    is_repeat = [not has_raters and np.array_equal(block, np.repeat(block[:1], len(block), 0), equal_nan=True)
                 for block in blocks]
    kept = table.take([rows[0] for rows in rows_of.values()])
    kept.repeats = np.array([len(block) if same else 1 for block, same in zip(blocks, is_repeat)], np.int64)
    kept.target = np.stack([[np.mean(scores[~np.isnan(scores)]) if (~np.isnan(scores)).any() else np.nan
                             for scores in block.T] for block in blocks])
    if not all(is_repeat):
        kept.single_ratings = {name: [block[:1 if same else None, r][~np.isnan(block[:1 if same else None, r])]
                                      for block, same in zip(blocks, is_repeat)] for r, name in enumerate(table.names)}
        rated = sum(not same and len(block) > 1 for block, same in zip(blocks, is_repeat))
        kept.notes.append(f"{rated} sequences have several rows: taken as raters and averaged")
    if (kept.repeats > 1).any():
        kept.notes.append(f"{(kept.repeats - 1).sum()} rows repeat another one: each is counted once in evaluation")
    kept.clip_ids = event_tables.unique_ids(kept)
    return kept


def total_and_parts(names):
    """R target names -> (index of the total or None, indices of the parts that it sums)."""
    keys = [event_tables.column_key(name) for name in names]
    total = next((r for r, key in enumerate(keys) if "total" in key), None)
    parts = [r for r, key in enumerate(keys) if r != total and not re.match("nrs|vas|total|sum|mean", key)]
    return total, parts if total is not None else []


def with_total_note(table):
    """The Table with a note that counts the rows whose total differs from the sum of its parts."""
    total, parts = total_and_parts(table.names)
    if not parts:
        return table
    gap = np.abs(table.target[:, total] - table.target[:, parts].sum(1))
    gap = gap[~np.isnan(gap)]
    differs = (gap > 1e-6).sum()
    if differs:
        table.notes.append(f"{table.names[total]} differs from the sum of its {len(parts)} parts in {differs} of "
                           f"{len(gap)} rows, by at most {gap.max():.3g} ({(gap > 0.5 + 1e-6).sum()} by more than 0.5)")
    return table


def column_of(table, name, flag):
    """(N,) text of a column of the Table by name in any spelling. Raises UserError where there is none."""
    key, targets = event_tables.column_key(name), {event_tables.column_key(each): r for r, each in enumerate(table.names)}
    if key in table.extra:
        return table.extra[key].to_numpy(str)
    if table.target is not None and key in targets:
        return np.array(["" if math.isnan(value) else repr(float(value)) for value in table.target[:, targets[key]]])
    raise common.UserError(f"{flag}: no column {name!r}{common.closest(key, table.extra.columns)} "
                           f"(found: {common.shorten_list(table.extra.columns, 40)})")


def read_cv_file(path, table):
    """Split file -> list of dicts(fold, train (n,) rows, val (m,) rows), in order of the folds.

    cv_folds as a list, as a dict with fold_0 keys, or either as a string of Python; or these at the top level. Each
    fold names train_animals and val_animals (or any train_*, val_*). Animals without rows are noted.
    Raises UserError: no folds, an animal on both sides, a side without rows.
    """
    if table.groups is None:
        raise common.UserError(f"--cv_file {path} names animals: it needs --group_column")
    content = as_python(read_loose_json(path), path)
    content = as_python(content.get("cv_folds", content), path) if isinstance(content, dict) else content
    if isinstance(content, dict):
        content = [{"fold": key, **fold} for key, value in content.items() if str(key).startswith("fold")
                   and isinstance(fold := as_python(value, path), dict)]
    folds = [fold_rows(fold, k, path, table) for k, fold in enumerate(content if isinstance(content, list) else [])]
    if not folds:
        raise common.UserError(f"--cv_file {path}: expected cv_folds as a list or with keys fold_0, fold_1, ...; found "
                               f"{common.shorten_list(content) if isinstance(content, dict) else type(content).__name__}")
    return sorted(folds, key=lambda fold: fold["fold"])


def as_python(value, path):
    """A string that holds Python literals is read as such; anything else stays. Raises UserError."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(re.sub(r"tensor\(([^()]*)\)", r"\1", value))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise common.UserError(f"--cv_file {path}: cannot read {value[:60]!r} as a list of folds "
                               f"({common.one_line(error)})") from None


def fold_rows(fold, k, path, table):
    """One fold of a split file -> dict(fold, train, val). Raises UserError, see read_cv_file."""
    fold = fold if isinstance(fold, dict) else {}
    number = re.search(r"\d+", str(fold.get("fold", k)))
    sides = {}
    for side in ("train", "val"):
        found = next((as_python(value, path) for key, value in fold.items()
                      if re.match(f"{side}[_a-z]*$", str(key)) and not isinstance(value, (int, float))), [])
        sides[side] = {event_tables.plain_level(name) for name in (found if isinstance(found, (list, tuple, set)) else [])}
    both, unknown = sides["train"] & sides["val"], (sides["train"] | sides["val"]) - set(table.groups)
    rows = {side: np.flatnonzero(np.isin(table.groups, sorted(names))) for side, names in sides.items()}
    if both or not len(rows["train"]) or not len(rows["val"]):
        raise common.UserError(f"--cv_file {path}, fold {k}: expected train_animals and val_animals that the scores "
                               "have and that do not overlap; on both sides: "
                               f"{common.shorten_list(sorted(both)) or 'none'}; rows: {len(rows['train'])} and "
                               f"{len(rows['val'])}; without rows: {common.shorten_list(sorted(unknown))}")
    if unknown:
        table.notes.append(f"--cv_file, fold {k}: no rows of {common.shorten_list(sorted(unknown))}")
    return {"fold": int(number[0]) if number else k, **rows}
