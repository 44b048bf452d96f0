"""Splits and folds that keep groups whole, and what the parts of a split share all the same.

Letters: N rows.
"""
import collections
import itertools
import json
from pathlib import Path

import numpy as np

import common

# Measured on 804 aligned faces: copies (64 to 512 px, JPEG 30 to 90, brighter, darker) differ in at most 34 of 256
# bits, different faces in at least 58.
NEAR_DUPLICATE_BITS = 40


def _strata_codes(strata, n_rows):
    """Labels -> codes; floats -> up to 10 quantile bins of 10 rows or more, NaN in a bin of its own; (N,) int."""
    strata = np.zeros(n_rows, int) if strata is None else np.asarray(strata)
    if strata.dtype.kind == "f":
        inner = np.linspace(0, 1, min(10, max(1, n_rows // 10)) + 1)[1:-1]
        edges = np.quantile(strata[~np.isnan(strata)], inner) if not np.isnan(strata).all() else []
        strata = np.where(np.isnan(strata), -1, np.searchsorted(edges, strata, side="right"))
    return np.unique(strata.astype(str), return_inverse=True)[1]


def _deal_out_units(sizes, order, shares):
    """Each unit in this order to the part that lacks most rows -> (U,) part; no part with a share stays empty."""
    part, held, dealt = np.empty(len(order), int), np.zeros(len(shares)), 0
    for unit in order:
        dealt += sizes[unit]
        part[unit] = np.argmax(shares * dealt - held)
        held[part[unit]] += sizes[unit]
    for empty in np.flatnonzero((shares > 0) & (held == 0)):
        donor = np.argmax(np.bincount(part, minlength=len(shares)))
        part[order[part[order] == donor][-1]] = empty
    return part


def _assign(shares, strata, unit, seed, keys, n_rows):
    """-> (N,) part: rows dealt out stratum by stratum; groups by the best stratified of many random deals."""
    rng, stratum = np.random.default_rng(seed), _strata_codes(strata, n_rows)
    if unit is None:
        by_key = np.arange(n_rows) if keys is None else np.argsort(np.asarray(keys, dtype=str), kind="stable")
        shuffled = by_key[rng.permutation(n_rows)]
        return _deal_out_units(np.ones(n_rows), shuffled[np.argsort(stratum[shuffled], kind="stable")], shares)
    rows = np.zeros((unit.max() + 1, stratum.max() + 1))
    np.add.at(rows, (unit, stratum), 1)
    sizes, in_stratum = rows.sum(axis=1), rows.sum(axis=0)

    def misfit(part):
        held = np.stack([rows[part == p].sum(axis=0) for p in range(len(shares))])
        by_stratum = ((held - shares[:, None] * in_stratum) ** 2 / in_stratum).mean(axis=1)
        return (by_stratum + (held.sum(axis=1) - shares * n_rows) ** 2 / n_rows).sum()
    n_deals = min(300, 10 + 40_000 // len(rows))  # about a second at most
    orders = [np.argsort(-sizes, kind="stable"), *(rng.permutation(len(rows)) for _ in range(n_deals))]
    return min((_deal_out_units(sizes, order, shares) for order in orders), key=misfit)[unit]


def _units(n_rows, groups):
    """-> group number of each row (None without groups), how many units there are, what to call them."""
    if groups is None:
        return None, n_rows, "rows"
    labels, unit = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if "" in labels:
        raise common.UserError(f"expected a group in every row, found {np.sum(unit == 0)} blank. Fill the group column.")
    return unit, len(labels), "groups"


def make_split(n_rows, ratios, strata=None, groups=None, seed=42, keys=None):
    """Ratios {name: share} -> {name: sorted (n,) int rows}; groups stay whole, strata (labels, or binned floats) mixed.

    With keys (N unique str) the same rows get the same parts in any row order.
    Raises UserError: ratios do not add up to 1, a part would be empty, a blank group.
    """
    shares, (unit, n_units, what) = np.array(list(ratios.values()), dtype=float), _units(n_rows, groups)
    if not abs(shares.sum() - 1) < 1e-6 or shares.min() < 0:
        raise common.UserError(f"split ratios must be 0 or more and add up to 1, found {ratios} (sum {shares.sum():g}).")
    if n_units < np.sum(shares > 0) or np.any((shares > 0) & (shares * n_rows < 0.5)):
        raise common.UserError(f"empty split: {n_rows} rows ({n_units} {what}) are too few for {ratios}. Change the ratios.")
    part = _assign(shares, strata, unit, seed, keys, n_rows)
    return {name: np.flatnonzero(part == p) for p, name in enumerate(ratios)}


def make_folds(n_rows, k, strata=None, groups=None, seed=42, keys=None):
    """-> (N,) int fold 0 to k-1 of each row, balanced and dealt as in make_split. UserError: fewer units than folds."""
    unit, n_units, what = _units(n_rows, groups)
    if not 2 <= k <= n_units:
        raise common.UserError(f"--folds {k}: expected 2 or more and at most the number of {what}, found {n_units} {what}.")
    return _assign(np.full(k, 1 / k), strata, unit, seed, keys, n_rows)


def write_splits(path, split, keys, extra=None):
    """JSON {part: [keys in row order]} and, under 'info', whatever else explains the split."""
    listed = {name: [str(keys[row]) for row in rows] for name, rows in split.items()}
    common.write_json(path, {**listed, "info": extra or {}})


def read_split_file(path, keys):
    """JSON of write_splits, or {"train": [names], ...} -> {part: sorted (n,) int rows}. UserError lists the faults."""
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        parts = {name: list(map(str, names)) for name, names in listed.items() if isinstance(names, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise common.UserError(f"--split_file {path}: expected JSON with a list train, found {error}") from None
    row_of, counts = {str(key): row for row, key in enumerate(keys)}, collections.Counter(sum(parts.values(), []))
    faults = [f"{name} (listed {count} times{'' if name in row_of else ', not in the table'})"
              for name, count in counts.items() if count > 1 or name not in row_of]
    if faults or not parts.get("train"):
        raise common.UserError(f"--split_file {path}: expected each image name once and a part train, found "
                        f"{common.shorten_list(faults) or common.shorten_list(parts) or 'no lists'}.")
    return {name: np.array(sorted(row_of[key] for key in names), dtype=int) for name, names in parts.items()}


def split_of_flags(args, keys, strata=None, groups=None):
    """The split that the flags ask for, by ratios or from --split_file: {train, val, test: sorted (n,) int rows}."""
    if not args.split_file:
        ratios = {"train": args.train_ratio, "val": args.val_ratio, "test": args.test_ratio}
        return make_split(len(keys), ratios, strata, groups, args.seed, keys)
    split = read_split_file(args.split_file, keys)
    if not len(split.get("val", ())):
        raise common.UserError(f"--split_file {args.split_file} has no val part; it chooses the epoch")
    return {part: split.get(part, np.array([], dtype=int)) for part in ("train", "val", "test")}


def effective_size(target, subjects=None):
    """target (N,) or (N, R), subjects (N,) -> {rows, distinct_label_vectors, subjects}: what the data really hold."""
    target = np.nan_to_num(np.asarray(target, dtype=float).reshape(len(target), -1), nan=np.inf)
    return {"rows": len(target), "distinct_label_vectors": len(np.unique(target, axis=0)),
            "subjects": None if subjects is None else len(set(map(str, subjects)))}


def _near_pairs(phash):
    """(N, 4) uint64 -> (2, P) rows i < j of the pairs that differ in at most NEAR_DUPLICATE_BITS."""
    signs = 2 * np.unpackbits(np.ascontiguousarray(phash).view(np.uint8), axis=1).astype(np.float32) - 1
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(signs), 1024):
        agree = signs[start:start + 1024] @ signs[start:].T  # (B, N): number of bits - 2 x Hamming distance
        pairs.append(np.argwhere(np.triu(agree, 1) >= max(1, signs.shape[1] - 2 * NEAR_DUPLICATE_BITS)) + start)
    return np.concatenate(pairs).T


def leakage_report(split, pixel_sha, phash, keys, groups=None, events=None):
    """What every two parts share -> {between: {a-b: {what: {count, examples}}}, within: {part: {what: count}}}.

    split: {part: rows}; pixel_sha: N str, '' = unreadable; phash: (N, 4) uint64; keys: N names; groups, events: N str,
    '' = none. Groups, events and exact duplicates count distinct values, near-duplicates pairs that are not exact.
    """
    part_of = {row: name for name, rows in split.items() for row in rows}
    rows = [row for row in sorted(part_of, key=lambda row: str(keys[row])) if pixel_sha[row]]
    twins, near = collections.defaultdict(list), collections.defaultdict(list)
    for row in rows:
        twins[pixel_sha[row]].append(str(keys[row]))
    for i, j in np.take(rows, _near_pairs(np.asarray(phash)[rows])).T:
        if pixel_sha[i] != pixel_sha[j]:
            near[frozenset((part_of[i], part_of[j]))].append(f"{keys[i]} = {keys[j]}")
    columns = {"groups": groups, "events": events, "exact_duplicates": [" = ".join(twins[sha]) for sha in pixel_sha]}
    held = {(what, name): {str(column[row]) for row in rows_in} - {""} for what, column in columns.items()
            if column is not None for name, rows_in in split.items()}
    report = {"near_duplicate_bits": NEAR_DUPLICATE_BITS, "between": {}, "within": {}}
    for a, b in itertools.combinations(filter(lambda name: len(split[name]), split), 2):
        shared = {what: sorted(held[what, a] & held[what, b]) for what in columns if columns[what] is not None}
        shared["near_duplicates"] = near[frozenset((a, b))]
        report["between"][f"{a}-{b}"] = {what: {"count": len(found), "examples": found[:5]}
                                         for what, found in shared.items()}
    for name in split:
        copies = sum(part_of[row] == name for row in rows) - len(held["exact_duplicates", name])
        report["within"][name] = {"exact_duplicates": copies, "near_duplicates": len(near[frozenset((name,))])}
    return report


def leakage_text(report):
    """Report -> one line per two parts, with an example of each kind shared, and one per part that holds copies."""
    def line(where, counts, examples=()):
        text = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        return f"leakage {where}: {text}" + "".join(f" ({example})" for example in examples)
    between = [line(pair, {what: found["count"] for what, found in shared.items()},
                    [found["examples"][0] for found in shared.values() if found["count"]])
               for pair, shared in report["between"].items()]
    return "\n".join(between + [line(f"inside {part}", counts) for part, counts in report["within"].items()
                                if any(counts.values())])


def check_leakage(report, allow_leakage=False):
    """UserError where parts share groups, events or exact duplicates, unless allowed; near-duplicates never stop."""
    faults = [f"{pair} share {found['count']} {what.replace('_', ' ')} ({common.shorten_list(found['examples'], 3)})"
              for pair, shared in report["between"].items() for what, found in shared.items()
              if found["count"] and what != "near_duplicates"]
    if faults and not allow_leakage:
        raise common.UserError(f"leakage between the splits: {'; '.join(faults)}. Split by --group_column, remove the copies, "
                        f"or go on with --allow_leakage.")


def record_split(run, split, keys, pixel_sha, phash, groups=None, events=None):
    """splits.json and leakage_report.json of a run, its text in the log. UserError for a split that leaks."""
    write_splits(run.path("splits.json"), split, keys)
    report = leakage_report(split, pixel_sha, phash, keys, groups, events)
    common.write_json(run.path("leakage_report.json"), report)
    run.say(leakage_text(report))
    check_leakage(report, run.args.allow_leakage)
