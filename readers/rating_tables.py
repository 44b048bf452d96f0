"""Any table of ratings -> one RatingsTable of means, rater sds and numbers of raters.

Letters: N pictures, R ratings.
"""
import dataclasses
import math
import re

import numpy as np

import common
from readers import csv_tables, file_names

IMAGE_COLUMNS = ("image", "filename", "file", "stimulus", "path")
NOT_A_TARGET = re.compile(r"(.*_)?(id|n|sd)|index|unnamed.*", re.IGNORECASE)


@dataclasses.dataclass
class RatingsTable:
    """N images in the order of the file, R ratings in its unit.

    images: N names as written; mean, sd, n: (N, R) float64, NaN = missing, sd and n None where the file has none;
    ratings_by_image: name -> N arrays of single ratings (long tables); extra: DataFrame of the other columns.
    """
    names: list
    images: list
    mean: np.ndarray
    sd: np.ndarray = None
    n: np.ndarray = None
    ratings_by_image: dict = None
    extra: object = None
    notes: list = dataclasses.field(default_factory=list)


def read_ratings(path, image_column=None, target_columns=None, duplicates="error", group_column=None):
    """Ratings file -> RatingsTable; layouts: X_mean/X_sd/X_n, one column per rating, or long (rating, attribute).

    duplicates: 'error', or 'mean' (mean and sd of repeated rows averaged, n summed). group_column is never a target.
    Raises UserError for every fault that would make the training meaningless, naming rows and columns.
    """
    table, source = csv_tables.read_table(path), f"--ratings_file {path}"
    group = csv_tables.pick_column(group_column and [group_column], table.columns, f"{source} has no --group_column")
    table = table.rename(columns=dict(zip(group, [group_column])))
    spelled = {name.lower(): name for name in table.columns}
    image = csv_tables.pick_column(image_column and [image_column], table.columns, f"{source} has no --image_column")
    image = (image + [spelled[name] for name in IMAGE_COLUMNS if name in spelled] + [None])[0]
    if image is None:
        raise common.UserError(f"{source} has no image column (found: {common.shorten_list(table.columns)}). Name it with --image_column.")
    is_long = {"rating", "attribute"} <= set(spelled)
    for column in [image, spelled["attribute"]] if is_long else [image]:
        blank = table.index[table[column] == ""]
        if len(blank):
            raise common.UserError(f"{source}: column {column} is blank in line {common.shorten_list(blank)}. Fill or delete these rows.")
    if is_long:
        ratings = _long_ratings(table, source, image, spelled["attribute"], spelled["rating"], target_columns)
    else:
        ratings = _wide_ratings(table, source, image, group_column, target_columns)
        _merge_duplicates(ratings, source, duplicates)
    ratings.notes[:0] = table.attrs["notes"]
    if group_column and group_column not in ratings.extra.columns:
        raise common.UserError(f"{source}: expected one group for each image in --group_column, found {group_column} to be an "
                        f"image, rating, sd or n column, or to vary within an image. Name another column.")
    empty = [name for name, row in zip(ratings.images, ratings.mean) if np.isnan(row).all()]
    if empty:
        raise common.UserError(f"{source}: all ratings are missing for {common.shorten_list(empty)}. Fill or delete these rows.")
    constant = [name for name, column in zip(ratings.names, ratings.mean.T) if len(set(column[~np.isnan(column)])) < 2]
    if constant:
        raise common.UserError(f"{source}: constant rating columns (nothing to learn): {common.shorten_list(constant)}. Leave them out: "
                        f"--target_columns {' '.join(name for name in ratings.names if name not in constant)}")
    return ratings


def _wide_ratings(table, source, image, group_column, wanted):
    """Targets: the columns asked for, else all *_mean, else those that are no ids and at least half numeric."""
    options = [name for name in table.columns if name not in (image, group_column)]

    def is_rating(name):
        numeric = [bool(csv_tables.NUMBER.fullmatch(cell.replace(",", ".", 1))) for cell in table[name] if cell]
        return not NOT_A_TARGET.fullmatch(name) and np.mean(numeric or [0]) >= 0.5  # a few bad cells are errors below
    chosen = (csv_tables.pick_column(wanted, options, f"{source} has no --target_columns")
              or [name for name in options if name.lower().endswith("_mean")] or list(filter(is_rating, options)))
    names = [re.sub("_mean$", "", name, flags=re.IGNORECASE) for name in chosen]
    if not names or len(set(names)) < len(names):
        raise common.UserError(f"{source}: expected one numeric column for each rating, took {common.shorten_list(chosen) or 'none'} of "
                        f"{common.shorten_list(options)}. Choose with --target_columns.")
    spelled = {name.lower(): name for name in options}
    sd_columns = [spelled.get(f"{name}_sd".lower()) for name in names]
    n_columns = [spelled.get(f"{name}_n".lower(), spelled.get("n")) for name in names]

    def block(columns):
        cells = [csv_tables.to_numbers(table[c], f"{source}, column {c}") if c else np.full(len(table), np.nan) for c in columns]
        return np.stack(cells, axis=1) if any(columns) else None
    extra = table.drop(columns={image, *chosen, *sd_columns, *n_columns} - {None})
    notes = [f"columns that are no ratings: {common.shorten_list(extra.columns)}"] if len(extra.columns) else []
    blocks = map(block, (chosen, sd_columns, n_columns))
    return RatingsTable(names, list(table[image]), *blocks, None, extra, notes)


def _long_ratings(table, source, image, attribute, rating, wanted):
    """One row per single rating -> mean, sd (ddof 1, NaN for one rating), n, and the ratings themselves."""
    import pandas as pd
    chosen = csv_tables.pick_column(wanted, table[attribute].unique(), f"{source} has no --target_columns")
    table = table[table[attribute].isin(chosen)] if chosen else table
    value = csv_tables.to_numbers(table[rating], f"{source}, column {rating}")
    (image_code, images), (name_code, names) = pd.factorize(table[image]), pd.factorize(table[attribute])
    filled, shape = ~np.isnan(value), (len(images), len(names))
    cell = (image_code * len(names) + name_code)[filled]
    stats = pd.Series(value[filled]).groupby(cell).agg(["mean", "std", "count"]).reindex(range(math.prod(shape)))
    mean, sd, n = stats.to_numpy().T.reshape(3, *shape)
    pieces = np.split(value[filled][np.argsort(cell, kind="stable")], np.nancumsum(n).astype(int)[:-1])
    others = table.drop(columns=[image, attribute, rating])
    varying = [name for name in others.columns if (others[name].groupby(image_code).nunique() > 1).any()]
    notes = [f"{filled.sum()} single ratings of {len(images)} images ({(~filled).sum()} blank ones left out)"]
    notes += [f"columns that vary within an image, left out: {common.shorten_list(varying)}"] if varying else []
    extra = others.drop(columns=varying).iloc[np.unique(image_code, return_index=True)[1]]
    by_name = {name: pieces[r::len(names)] for r, name in enumerate(names)}
    return RatingsTable(list(names), list(images), mean, sd, np.nan_to_num(n), by_name, extra, notes)


def _merge_duplicates(ratings, source, duplicates):
    import pandas as pd
    names = [file_names.clean_name(name) for name in ratings.images]
    lines = pd.Series(ratings.extra.index.astype(str)).groupby(names, sort=False)
    repeated = [f"{name} (lines {', '.join(rows)})" for name, rows in lines if len(rows) > 1]
    if repeated and duplicates != "mean":
        raise common.UserError(f"{source} lists images twice: {common.shorten_list(repeated)}. Delete rows, or average: --duplicates mean.")
    if repeated:
        code, first = lines.ngroup().to_numpy(), [rows.index[0] for _, rows in lines]
        for what in [what for what in ("mean", "sd", "n") if getattr(ratings, what) is not None]:
            rows = pd.DataFrame(getattr(ratings, what)).groupby(code)
            setattr(ratings, what, (rows.sum(min_count=1) if what == "n" else rows.mean()).to_numpy())
        ratings.images, ratings.extra = [ratings.images[row] for row in first], ratings.extra.iloc[first]
        ratings.notes.append(f"repeated rows of {len(repeated)} images were averaged: {common.shorten_list(repeated)}")
