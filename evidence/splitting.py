"""Splits and folds that keep groups whole, and what the parts of a split share all the same.

Letters: N rows.
"""

import collections
import itertools
import re

import numpy as np

import common
from readers import picture_files

# Measured on 804 aligned faces: copies (64 to 512 px, JPEG 30 to 90, brighter, darker) differ
# in at most 34 of 256 bits, different faces in at least 58. Mirrored: 34 and 64 of 250 faces.
NEAR_DUPLICATE_BITS = 40
# in the names of columns that say who, what or where was recorded, and in those that measure or describe it
GROUP_WORDS = re.compile(
    r"(?<![a-z])(subject|participant|person|patient|individual|family|household|animal|pen|cage|tank|barn|farm|herd|"
    r"flock|litter|nest|colony|scene|group|session|video|recording|site|street|clinic|hospital)"
    r"(s|id|nr|no|name|code)?(?![a-z])")
MEASURE_WORDS = re.compile(
    r"^n[^a-z]|(?<![a-z])(age|area|body|anatom|count|date|duration|length|mean|predicted|prob_|score|sd|sex|share|size|"
    r"species|true|type|weight)")
FEWEST_FOR_SIMILAR = 30  # rows
PARTS = ("train", "val", "test")
STOPPING_LEAKS = ("groups", "events", "exact_duplicates")


def _strata_codes(strata, n_rows):
    """Labels, or floats in up to 10 bins of 10 rows or more, NaN apart -> (N,) int code of each row; None -> zeros."""
    if strata is None:
        return np.zeros(n_rows, int)
    if strata.dtype.kind == "f":
        is_known = ~np.isnan(strata)
        n_bins = min(10, max(1, n_rows // 10))
        inner = np.linspace(0, 1, n_bins + 1)[1:-1]
        edges = np.quantile(strata[is_known], inner) if is_known.any() else []
        strata = np.where(is_known, np.searchsorted(edges, strata, side="right"), -1)
    return np.unique(strata, return_inverse=True)[1]


def deal_out_units(sizes, order, shares):
    """Each unit in this order to the part that lacks most rows -> (U,) part.

    No part with a share stays empty.
    """
    part = np.empty(len(order), int)
    held = np.zeros(len(shares))
    dealt = 0
    for unit in order:
        dealt += sizes[unit]
        part[unit] = np.argmax(shares * dealt - held)
        held[part[unit]] += sizes[unit]
    for empty in np.flatnonzero((shares > 0) & (held == 0)):
        donor = np.argmax(np.bincount(part, minlength=len(shares)))
        part[order[part[order] == donor][-1]] = empty
    return part


def _assign_groups(shares, stratum, unit, seed):
    """-> (N,) part: the best stratified of many random deals of whole groups."""
    import pandas as pd
    rng = np.random.default_rng(seed)
    rows = pd.crosstab(unit, stratum).to_numpy()
    sizes = rows.sum(axis=1)
    in_stratum = rows.sum(axis=0)

    def misfit(part):
        held = np.stack([rows[part == p].sum(axis=0) for p in range(len(shares))])
        by_stratum = ((held - shares[:, None] * in_stratum) ** 2 / in_stratum).mean(axis=1)
        by_size = (held.sum(axis=1) - shares * len(unit)) ** 2 / len(unit)
        return (by_stratum + by_size).sum()

    n_deals = min(300, 10 + 40_000 // len(rows))  # about a second at most
    orders = [rng.permutation(len(rows)) for _ in range(n_deals)]
    # Largest first fits best where sizes differ much. It comes last and breaks ties at random:
    # a deal that every seed gives must not win where others are as good.
    orders.append(orders[0][np.argsort(-sizes[orders[0]], kind="stable")])
    deals = [deal_out_units(sizes, order, shares) for order in orders]
    return min(deals, key=misfit)[unit]


def units_of(n_rows, groups):
    """-> group number of each row (None without groups), number of units, their name.

    UserError: a blank group.
    """
    if groups is None:
        return None, n_rows, "rows"
    labels, unit = np.unique(groups, return_inverse=True)
    if "" in labels:
        blank = np.sum(unit == 0)
        raise common.UserError(f"expected a group in every row, found {blank} blank. Fill the group column.")
    return unit, len(labels), "groups"


def make_split(keys, ratios, strata=None, groups=None, seed=42):
    """Ratios {part: share}, which add up to 1 -> {part: sorted (n,) int rows}; groups stay whole.

    Each part holds the strata (labels, or floats in bins) in equal shares as far as groups allow.
    keys: N unique names, by which the same rows get the same parts in any row order.
    Raises UserError: a part would be empty, a blank group.
    """
    n_rows = len(keys)
    shares = np.array(list(ratios.values()))
    unit, n_units, what = units_of(n_rows, groups)
    wanted = shares > 0
    if n_units < wanted.sum() or np.any(shares[wanted] * n_rows < 0.5):
        raise common.UserError(
            f"empty split: {n_rows} rows ({n_units} {what}) are too few for {ratios}. Change the "
            "ratios, or what is kept whole.")
    stratum = _strata_codes(strata, n_rows)
    if unit is None:
        order = np.random.default_rng(seed).permutation(np.argsort(keys, kind="stable"))
        order = order[np.argsort(stratum[order], kind="stable")]  # stratum by stratum
        part = deal_out_units(np.ones(n_rows), order, shares)
    else:
        part = _assign_groups(shares, stratum, unit, seed)
    return {name: np.flatnonzero(part == p) for p, name in enumerate(ratios)}


def make_folds(keys, k, strata=None, groups=None, seed=42):
    """-> k sorted (n,) int rows, left out in turn, as in make_split.

    UserError: fewer units than folds.
    """
    _, n_units, what = units_of(len(keys), groups)
    if not 2 <= k <= n_units:
        raise common.UserError(
            f"--folds {k}: expected 2 or more and at most the number of {what}, found {n_units} {what}.")
    return list(make_split(keys, dict.fromkeys(range(k), 1 / k), strata, groups, seed).values())


def listed_parts(path):
    """JSON {part: [keys]}, as in splits.json -> the same, keys as text.

    UserError without such lists.
    """
    content = common.read_json(path)
    wrong = PARTS
    if isinstance(content, dict):
        wrong = [part for part in PARTS if not isinstance(content.get(part) or [], list)]
    if wrong:
        raise common.UserError(f"{path}: expected lists train, val and test, found no list in {', '.join(wrong)}")
    return {part: list(map(str, listed)) for part, listed in content.items() if isinstance(listed, list)}


def read_split_file(path, keys):
    """JSON of listed_parts -> {train, val, test: sorted (n,) int rows}.

    UserError lists the parts that are unknown or missing, and the keys that are
    unknown or listed twice.
    """
    try:
        parts = listed_parts(path)
    except common.UserError as error:
        raise common.UserError(f"--split_file {error}") from None
    known = set(keys)
    faults = [f"no {part} part" for part in ("train", "val") if not parts.get(part)]
    faults += [f"a part {part}{common.did_you_mean(part, PARTS)}" for part in parts if part not in PARTS]
    for key, count in collections.Counter(itertools.chain(*parts.values())).items():
        unknown = "" if key in known else ", not in the table"
        if count > 1 or unknown:
            faults.append(f"{key} (listed {count} times{unknown})")
    if faults:
        raise common.UserError(
            f"--split_file {path}: expected parts train, val (it chooses the epoch) and test, and "
            f"each image name once, found {common.shorten_list(faults)}.")
    return {part: np.flatnonzero(np.isin(keys, parts.get(part, []))) for part in PARTS}


def check_flags(parser, args):
    """parser.error for split and fold flags that contradict each other."""
    if args.folds == 1 or (args.fold != "all" and args.fold >= args.folds):
        parser.error(f"--folds {args.folds} --fold {args.fold}: expected at least 2 folds, "
                     "a fold from 0 to folds - 1")
    if args.folds and args.split_file:
        parser.error(f"--folds {args.folds} and --split_file {args.split_file} both make the "
                     "split; give one")
    if args.folds and args.test_ratio and "test_ratio" in args.given:  # that of a configuration gives way
        parser.error(f"--folds {args.folds} scores every row once: "
                     f"--test_ratio {args.test_ratio:g} has none")
    ratios = args.given & {"train_ratio", "val_ratio", "test_ratio"}
    if args.split_file and ratios:
        parser.error(f"--split_file {args.split_file} makes the split; leave out {' and '.join(sorted(ratios))}")
    shares = ratios_of_flags(args)
    needed = ("train",) if args.folds else ("train", "val")
    empty = [part for part in needed if shares[part] < 1e-9]
    if empty and not args.split_file:
        parser.error(f"the {empty[0]} part must not be empty (val chooses the epoch), found {shares}")


def ratios_of_flags(args):
    """{train, val, test: share}; train takes what the others leave, unless --train_ratio says its own.

    Raises UserError for shares below 0, or that do not add up to 1.
    """
    rest = 1 - args.val_ratio - args.test_ratio
    train = rest if args.train_ratio is None else args.train_ratio
    shares = {"train": train, "val": args.val_ratio, "test": args.test_ratio}
    if min(shares.values()) < -1e-9 or abs(sum(shares.values()) - 1) > 1e-6:
        raise common.UserError(
            f"split ratios must be 0 or more and add up to 1, found {shares} (sum "
            f"{sum(shares.values()):g}); without --train_ratio the training takes what the others leave")
    return shares


def split_of_flags(args, keys, strata, groups):
    """{train, val, test: sorted (n,) int rows} by the ratios or from --split_file."""
    if args.split_file:
        return read_split_file(args.split_file, keys)
    return make_split(keys, ratios_of_flags(args), strata, groups, args.seed)


def folds_of_flags(args, keys, strata, groups):
    """{train, val, test: (n,) int rows} for each of --folds; no row is in a test part."""
    none = np.array([], int)
    return [{"train": np.setdiff1d(np.arange(len(keys)), left_out), "val": left_out, "test": none}
            for left_out in make_folds(keys, args.folds, strata, groups, args.seed)]


def rows_to_try(split, args, truth=None):
    """{part: rows} as it is; in a dry run two batches of each part with two values of each score, or every class.

    truth: (N, R) scores, NaN = missing, or (N,) labels; None: two batches alone.
    """
    if not args.dry_run:
        return split
    few = {part: rows[:2 * args.batch_size] for part, rows in split.items()}
    if truth is None:
        return few
    if truth.ndim == 1:
        truth = truth[:, None] == np.unique(truth)  # (N, C)
    for column, (part, rows) in itertools.product(truth.T, split.items()):
        _, first = np.unique(column[rows], return_index=True)  # NaN comes last
        few[part] = np.union1d(few[part], rows[first[:2]])
    return few


def nested_folds(folds, divide):
    """Folds whose left-out rows are tested, so that other rows choose the epoch.

    divide: function of the (n,) rows that a fold does not leave out -> {train, val:
    places in them}.
    """
    nested = []
    for fold in folds:
        rest = fold["train"]
        parts = {part: rest[places] for part, places in divide(rest).items()}
        nested.append(parts | {"test": fold["val"]})
    return nested


def _near_duplicates(split, keys, pixels, phash):
    """Pairs (i, j): rows of other pixels that differ, or of which one mirrored does, in few bits.

    Of each row the nearest one in every part, so that the clips of one camera, all of
    which look alike, are as many pairs as clips. Rows and parts: as in leakage_report.
    """
    rows = sorted({row for held in split.values() for row in held if pixels[row]}, key=keys.__getitem__)
    hashes = np.array(phash, np.uint64)[rows]
    bits = np.stack([hashes, picture_files.mirrored_hash(hashes)])
    signs, mirrored = 2 * np.unpackbits(bits.view(np.uint8), axis=-1).astype(np.float32) - 1  # (n, 256) each
    least = signs.shape[1] - 2 * NEAR_DUPLICATE_BITS
    _, content = np.unique(np.array(pixels)[rows], return_inverse=True)  # (n,)
    places_of = [np.flatnonzero(np.isin(rows, held)) for held in split.values()]
    pairs = set()
    for block in np.array_split(np.arange(len(rows)), len(rows) // 1024 + 1):
        # (B, n): number of bits - 2 x Hamming distance
        agreement = np.maximum(signs[block] @ signs.T, signs[block] @ mirrored.T)
        agreement[content[block][:, None] == content] = -np.inf  # itself, and its exact duplicates
        for places in filter(len, places_of):
            nearest = places[agreement[:, places].argmax(1)]
            is_near = agreement[np.arange(len(block)), nearest] >= least
            near = np.stack([block, nearest], 1)[is_near]  # (pairs, 2)
            pairs.update((rows[i], rows[j]) for i, j in np.sort(near).tolist())
    return pairs


def similar_pairs(features, split):
    """Rows of two parts that are far nearer to each other than rows of their kind are by chance.

    features: (N, F) of a network before any tuning; split: {part: rows}. Returns (i, j), the row of
    the earlier part first, each row with its nearest one of another part, the nearest pair first.
    Distance: 1 - cosine. Far nearer: the nearest row is so much nearer than the kth as 1 row in 100
    is in a cloud of this dimension m (Levina & Bickel 2004): of (dk / d2k) ** m, which is
    Beta(k, k), the median is 1/2, and (d1 / dk) ** m is the least of k - 1 uniform numbers, in 1 %
    under .01 / (k - 1). Each k from 10 to 160 is tried: a scene of 30 frames is near beside the 40th.
    """
    part = np.repeat(np.arange(len(split)), [len(rows) for rows in split.values()])
    rows = np.concatenate(list(split.values()))
    centred = features[rows] - features[rows].mean(0)
    directions = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    places = 10 * 2 ** np.arange(6)
    places = places[places <= max(20, len(rows) / 2)]  # (K + 1,)
    other = np.empty(len(rows), int)  # the nearest row of another part
    nearness = np.empty((len(rows), len(places) - 1))  # its distance, as a share of that of the kth nearest row
    growth = np.empty_like(nearness)  # from the kth nearest to the one twice as far down
    for block in np.array_split(np.arange(len(rows)), len(rows) // 1024 + 1):
        distance = 1 - directions[block] @ directions.T  # (B, n)
        apart = np.where(part[block][:, None] == part, np.inf, distance)
        other[block] = apart.argmin(1)
        distance[distance < 1e-6] = 2  # the largest there is: itself and its equals are no neighbours
        reach = np.partition(distance, places - 1)[:, places - 1]
        nearness[block] = apart.min(1, keepdims=True) / reach[:, :-1]
        growth[block] = reach[:, 1:] / reach[:, :-1]
    limit = np.median(growth, axis=0) ** np.log2(0.01 / (places[:-1] - 1))
    of_limit = (nearness / limit).min(1)  # under 1: nearer than 1 row in 100
    found = [sorted((k, other[k])) for k in of_limit.argsort(kind="stable") if of_limit[k] < 1]
    return list(dict.fromkeys((rows[a], rows[b]) for a, b in found))


@common.first_process_only
def add_similar(run, features, split, keys):
    """similar_pairs, which are said and counted in leakage_report.json, of rows enough to tell; keys: (N,) names."""
    part_of = {row: part for part, rows in split.items() for row in rows}
    if len(part_of) < FEWEST_FOR_SIMILAR:
        return []
    pairs = similar_pairs(features, split)
    report = common.read_json(run.path("leakage_report.json"))
    for place, found in report["between"].items():
        own = [" = ".join(sorted(keys[[i, j]])) for i, j in pairs if f"{part_of[i]}-{part_of[j]}" == place]
        similar = {"similar_pictures": found_items(own)}
        found |= similar
        if own:
            run.say(_leakage_line(f"leakage {place}", similar))
    common.write_json(run.path("leakage_report.json"), report)
    return pairs


def found_items(items):
    """Distinct texts -> {count, examples: the first five}."""
    items = sorted(set(items))
    return {"count": len(items), "examples": items[:5]}


def leakage_report(split, keys, pixels, phash, values, pairs=None):
    """What every two parts share and what each holds twice, whatever the order of the rows.

    split: {part: rows}, a row of two parts is its own duplicate; keys: N unique names;
    pixels: N texts, equal for equal pixels, '' = unreadable; phash: N perceptual_hash;
    values: {what: N texts or None}, '' = none, such as groups and events; pairs: {what:
    list of two rows}. Returns {between: {a-b: {what: {count, examples}}}, within:
    {part: {what: {count, examples}}}}: distinct values for values and exact duplicates
    (within a part: copies beyond the first), pairs for pairs and near duplicates.
    """
    parts_of = [[] for _ in keys]
    for part, rows in split.items():
        for row in rows:
            parts_of[row].append(part)
    # {what: lists of rows that are alike}
    alike = {"exact_duplicates": _rows_by_value(pixels).values(), **(pairs or {})}
    if phash is not None:
        alike["near_duplicates"] = _near_duplicates(split, keys, pixels, phash)
    # {what: {text: its rows}}
    rows_of = {what: _rows_by_value(column) for what, column in values.items() if column is not None}
    for what, lists in alike.items():
        rows_of[what] = {" = ".join(sorted(keys[row] for row in rows if parts_of[row])): rows for rows in lists}
    # {what: {text: how often it stands in each part}}
    counts = {what: {text: collections.Counter(part for row in rows for part in parts_of[row])
                     for text, rows in found.items()}
              for what, found in rows_of.items()}

    parts = [part for part in split if len(split[part])]
    between = {}
    for a, b in itertools.combinations(parts, 2):
        between[f"{a}-{b}"] = {
            what: found_items(text for text, times in found.items() if times[a] and times[b])
            for what, found in counts.items()}
    within = {part: {} for part in parts}
    for (part, found), what in itertools.product(within.items(), alike):
        repeats = {text: times[part] - 1 for text, times in counts[what].items() if times[part] > 1}
        found[what] = {**found_items(repeats), "count": sum(repeats.values())}
    return {"near_duplicate_bits": NEAR_DUPLICATE_BITS, "between": between, "within": within}


def _rows_by_value(values):
    """{value: list of the rows that have it}, without ''."""
    return {value: rows for value, rows in common.rows_by_key(values).items() if value}


def _count_text(what, item):
    words = what.replace("_", " ")
    one = words.replace("copies", "copy").removesuffix("s")
    return f"{item['count']} {one if item['count'] == 1 else words}"


def _leakage_line(where, found):
    counts = []
    for what, item in found.items():
        example = f" ({item['examples'][0]})" if item["count"] else ""
        counts.append(_count_text(what, item) + example)
    return f"{where}: {', '.join(counts)}"


def found_leakage(word, places):
    """A line for each of these places, such as report["between"], that holds anything twice."""
    lines = []
    for place, found in places.items():
        shared = {what: item for what, item in found.items() if item["count"]}
        if shared:
            lines.append(_leakage_line(f"{word} {place}", shared))
    return lines


def leakage_text(report):
    """A line per two parts, with all zeros, and per part that holds copies, and the notes of the report."""
    lines = [_leakage_line(f"leakage {pair}", found) for pair, found in report["between"].items()]
    lines += found_leakage("inside", report["within"])
    return "\n".join(lines + report.get("notes", []))


def check_leakage(report, allow_leakage=False, stopping=STOPPING_LEAKS):
    """UserError where two parts share what `stopping` names, unless allowed."""
    faults = [f"{pair} share {_count_text(what, item)} ({common.shorten_list(item['examples'], 3)})"
              for pair, found in report["between"].items() for what, item in found.items()
              if what in stopping and item["count"]]
    if faults and not allow_leakage:
        raise common.UserError(
            f"leakage between the splits: {'; '.join(faults)}. Split by --group_column (probe guidance: --patient_map, "
            "in time a larger --gap), remove the copies, or go on with --allow_leakage.")


def record_split(run, split, keys, report, stopping=STOPPING_LEAKS, columns=None, groups=None):
    """splits.json, leakage_report.json and its text in the log. UserError for a split that leaks.

    A resumed run keeps its files that can be read: whether the split is still the same
    is checked by write_args. Returns the alarms of unused_groups on these columns,
    said before anything is trained.
    """
    split_file = run.path("splits.json")
    leakage_file = run.path("leakage_report.json")
    if not (common.read_or_warn(split_file) and common.read_or_warn(leakage_file)):
        common.write_json(split_file, {part: [keys[row] for row in rows] for part, rows in split.items()})
        common.write_json(leakage_file, report)
    n_unused = len(keys) - sum(map(len, split.values()))
    if n_unused:
        run.say(f"note: {n_unused} of {len(keys)} rows are in no part of the split")
    run.say(leakage_text(report))
    check_leakage(report, run.args.allow_leakage, stopping)
    alarms = unused_groups(columns or {}, split, groups)
    for alarm in alarms:
        run.say(f"ALARM: {alarm}")
    return alarms


def names_group(name):
    """True for the name of a column that says who, what or where was recorded."""
    return GROUP_WORDS.search(name.lower()) and not MEASURE_WORDS.search(name.lower())


def in_several_parts(values, split):
    """Which of N values stand in several parts of a split {part: rows}, sorted."""
    n_parts = collections.Counter(itertools.chain.from_iterable(set(values[rows]) for rows in split.values()))
    return sorted(value for value, count in n_parts.items() if count > 1)


def unused_groups(columns, split, groups, fault="stand on two sides of the split"):
    """Sentences on columns that repeat as subjects do and of which a split parts the rows; else [].

    columns: {name: (N,) text}; split: {part: rows}; groups: (N,) of --group_column, or None; fault: what is said of
    values in several parts. A column that each group has one value of, such as the site of a subject, is none.
    """
    sentences = []
    for name, cells in columns.items():
        cells = np.asarray(cells, dtype=str)
        levels = set(cells) - {""}
        is_coarser = groups is not None and len(set(zip(groups, cells))) == len(set(groups))
        if is_coarser or not names_group(name) or not 5 <= len(levels) <= len(cells) / 2:
            continue
        parted = len(levels.intersection(in_several_parts(cells, split)))
        if parted:
            sentences.append(
                f"the column {name} repeats ({len(levels)} values in {len(cells)} rows), and {parted} of its values "
                f"{fault}. If it says who or what was recorded: --group_column {name}")
    return sentences


def rows_by_part(part_of):
    """(N,) part of each row -> {train, val, test: its rows}."""
    return {part: np.flatnonzero(part_of == part) for part in PARTS}


def _by_time(sequences, order):
    """The rows of each sequence in their order."""
    return [sorted(rows, key=order.__getitem__)
            for rows in common.rows_by_key(sequences).values()]


def split_by_time(sequences, order, ratios, gap):
    """Each sequence cut into consecutive blocks by the ratios, `gap` rows left out between two: {part: sorted rows}.

    sequences: (N,) names; order: (N,) place within the sequence. Raises UserError
    where a part would be empty.
    """
    used = [part for part, ratio in ratios.items() if ratio > 0]
    part_of = np.full(len(order), "between")
    for rows in _by_time(sequences, order):
        room = max(len(rows) - gap * (len(used) - 1), 0)
        start = 0
        for part in used:
            stop = start + round(ratios[part] * room) if part != used[-1] else len(rows)
            part_of[rows[start:stop]] = part
            start = stop + gap
    split = rows_by_part(part_of)
    empty = [part for part in used if not len(split[part])]
    if empty:
        raise common.UserError(
            f"the sequences are too short for blocks of time with --gap {gap}; empty: "
            f"{', '.join(empty)}. A smaller --gap, a larger share (--val_ratio) or longer sequences help")
    return split


def folds_by_time(sequences, order, n_folds, gap):
    """[{train, val, test: rows}]: each sequence cut into n_folds blocks, left out in turn with `gap` rows beside it.

    sequences: (N,) names; order: (N,) place within the sequence. The test parts are empty. Raises
    UserError for sequences that are too short.
    """
    part_of = np.full((n_folds, len(order)), "train")
    for rows in _by_time(sequences, order):
        edges = np.arange(n_folds + 1) * len(rows) // n_folds
        for own, start, stop in zip(part_of, edges, edges[1:]):
            own[rows[max(start - gap, 0):stop + gap]] = "gap"
            own[rows[start:stop]] = "val"
    folds = [rows_by_part(own) for own in part_of]
    if not all(len(fold["train"]) and len(fold["val"]) for fold in folds):
        raise common.UserError(
            f"--folds {n_folds}: the sequences are too short for so many blocks of time with --gap {gap}")
    return folds


def split_by_names(listed, groups, aliases):
    """{part: names of groups} -> {part: sorted rows}. groups: (N,) names; aliases: {other name: group}.

    Raises UserError for an unknown name, and for a group in two parts.
    """
    group_of = {**aliases, **dict(zip(groups, groups))}
    unknown = [name + common.did_you_mean(name, group_of)
               for name in itertools.chain(*listed.values()) if name not in group_of]
    if unknown:
        raise common.UserError(f"the lists of the split name no such group: {', '.join(unknown)}")
    owners = {part: {group_of[name] for name in names} for part, names in listed.items()}
    twice = [f"{common.shorten_list(sorted(owners[a] & owners[b]))} in {a} and {b}"
             for a, b in itertools.combinations(owners, 2) if owners[a] & owners[b]]
    if twice:
        raise common.UserError(f"a group stands on one side of a split; {'; '.join(twice)}")
    return {part: np.flatnonzero(np.isin(groups, list(names))) for part, names in owners.items()}
