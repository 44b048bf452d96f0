"""Any table of ratings -> one RatingsTable of means, rater sds and numbers of raters.

Letters: N pictures, R ratings.
"""
import dataclasses
import re

import numpy as np

import common
from readers import csv_tables, file_names

IMAGE_COLUMNS = ("image", "filename", "file", "stimulus", "path")
NOT_A_TARGET = re.compile(r"(.*_)?(id|n|sd)|index|unnamed.*", re.IGNORECASE)


@dataclasses.dataclass
class RatingsTable:
    """N images in the order of the file, R ratings in its unit."""
    names: list  # of the R ratings
    images: list  # N names as written
    mean: np.ndarray  # (N, R) float64, NaN = missing
    sd: np.ndarray | None  # (N, R) between raters, None where the file has none
    n: np.ndarray | None  # (N, R) number of raters
    ratings_by_image: dict | None  # name -> N arrays of single ratings, of long tables
    extra: object  # DataFrame of the other columns
    notes: list


def read_ratings(path, image_column=None, target_columns=None, duplicates="error", group_column=None):
    """Ratings file -> RatingsTable; layouts: X_mean/X_sd/X_n, one column per rating, or long (rating, attribute).

    duplicates: 'error', or 'mean' (mean and sd of repeated rows averaged, n summed). group_column is never a target.
    Raises UserError for every fault that would make the training meaningless, naming rows and columns.
    """
    table = csv_tables.read_table(path)
    source = f"--ratings_file {path}"
    if group_column:
        where = f"{source} has no --group_column"
        spelled, = csv_tables.pick_columns([group_column], table.columns, where)
        table = table.rename(columns={spelled: group_column})
    image = _image_column(table, source, image_column)
    _refuse_blank(table, source, image)
    lower = {name.lower(): name for name in table.columns}
    if "rating" in lower and "attribute" in lower:
        attribute = lower["attribute"]
        _refuse_blank(table, source, attribute)
        ratings = _long_ratings(table, source, image, attribute, lower["rating"], target_columns)
    else:
        ratings = _wide_ratings(table, source, image, group_column, target_columns)
        ratings = _merge_duplicates(ratings, source, duplicates)
    if group_column and group_column not in ratings.extra.columns:
        raise common.UserError(
            f"{source}: expected one group for each image in --group_column, found {group_column} to be an "
            "image, rating, sd or n column, or to vary within an image. Name another column.")
    _refuse_useless(ratings, source)
    return ratings


def _image_column(table, source, wanted):
    if not wanted:
        lower = table.columns.str.lower()
        wanted = next((name for name in IMAGE_COLUMNS if name in lower), None)
    if not wanted:
        raise common.UserError(
            f"{source} has no image column (found: {common.shorten_list(table.columns)}). "
            "Name it with --image_column.")
    return csv_tables.pick_columns([wanted], table.columns, f"{source} has no --image_column")[0]


def _refuse_blank(table, source, column):
    blank = table.index[table[column] == ""]
    if len(blank):
        raise common.UserError(
            f"{source}: column {column} is blank in line {common.shorten_list(blank)}. "
            "Fill or delete these rows.")


def _refuse_useless(ratings, source):
    """UserError for images without any rating, and for ratings that are all equal."""
    is_missing = np.isnan(ratings.mean)
    empty = [name for name, row in zip(ratings.images, is_missing) if row.all()]
    if empty:
        raise common.UserError(
            f"{source}: all ratings are missing for {common.shorten_list(empty)}. "
            "Fill or delete these rows.")
    constant = []
    for r, name in enumerate(ratings.names):
        if len(np.unique(ratings.mean[~is_missing[:, r], r])) < 2:
            constant.append(name)
    if constant:
        others = [name for name in ratings.names if name not in constant]
        raise common.UserError(
            f"{source}: constant rating columns (nothing to learn): {common.shorten_list(constant)}. "
            f"Leave them out: --target_columns {' '.join(others)}")


def _wide_ratings(table, source, image, group_column, wanted):
    """Targets: the columns asked for, else all *_mean, else those that are no ids and at least half numeric."""
    options = [name for name in table.columns if name not in (image, group_column)]
    chosen = [name for name in options if name.lower().endswith("_mean")]
    if wanted:
        chosen = csv_tables.pick_columns(wanted, options, f"{source} has no --target_columns")
    elif not chosen:  # a few cells that are no numbers are errors below
        chosen = [
            name for name in options
            if not NOT_A_TARGET.fullmatch(name) and csv_tables.looks_numeric(table[name])]
    names = [re.sub("_mean$", "", name, flags=re.IGNORECASE) for name in chosen]
    if not names or len(set(names)) < len(names):
        raise common.UserError(
            f"{source}: expected one numeric column for each rating, took "
            f"{common.shorten_list(chosen) or 'none'} of {common.shorten_list(options)}. "
            "Choose with --target_columns.")
    lower = {name.lower(): name for name in options}
    sd_columns = [lower.get(f"{name}_sd".lower()) for name in names]
    n_columns = [lower.get(f"{name}_n".lower(), lower.get("n")) for name in names]
    extra = table.drop(columns={image, *chosen, *sd_columns, *n_columns} - {None})
    notes = list(table.attrs["notes"])
    if len(extra.columns):
        notes.append(f"columns that are no ratings: {common.shorten_list(extra.columns)}")
    return RatingsTable(
        names=names,
        images=list(table[image]),
        mean=_number_columns(table, source, chosen),
        sd=_number_columns(table, source, sd_columns),
        n=_number_columns(table, source, n_columns),
        ratings_by_image=None,
        extra=extra,
        notes=notes)


def _number_columns(table, source, columns):
    """(N, R) of R columns, NaN where one is None; None where all are."""
    if not any(columns):
        return None
    values = np.full((len(table), len(columns)), np.nan)
    for r, column in enumerate(columns):
        if column:
            values[:, r] = csv_tables.to_numbers(table[column], f"{source}, column {column}")
    return values


def _long_ratings(table, source, image, attribute, rating, wanted):
    """One row per single rating -> mean, sd (ddof 1, NaN for one rating), n, and the ratings themselves."""
    import pandas as pd
    if wanted:
        where = f"{source} has no --target_columns"
        chosen = csv_tables.pick_columns(wanted, table[attribute].unique(), where)
        table = table[table[attribute].isin(chosen)]
    value = csv_tables.to_numbers(table[rating], f"{source}, column {rating}")
    images = table[image].unique()
    names = table[attribute].unique()
    filled = pd.Series(value, index=[table[image], table[attribute]]).dropna()
    cells = filled.groupby(level=[0, 1])

    def pivot(series):
        return series.unstack().reindex(index=images, columns=names).to_numpy(float)  # (N, R)
    single = {key: ratings.to_numpy() for key, ratings in cells}
    others = table.drop(columns=[image, attribute, rating])
    by_image = others.groupby(table[image])
    varying = others.columns[(by_image.nunique() > 1).any()]
    n_blank = len(value) - len(filled)
    notes = [
        *table.attrs["notes"],
        f"{len(filled)} single ratings of {len(images)} images ({n_blank} blank ones left out)"]
    if len(varying):
        notes.append(f"columns that vary within an image, left out: {common.shorten_list(varying)}")
    return RatingsTable(
        names=list(names),
        images=list(images),
        mean=pivot(cells.mean()),
        sd=pivot(cells.std()),
        n=np.nan_to_num(pivot(cells.count())),
        ratings_by_image={
            name: [single.get((each, name), np.empty(0)) for each in images] for name in names},
        extra=others[~table[image].duplicated()].drop(columns=varying),
        notes=notes)


def _merge_duplicates(ratings, source, duplicates):
    """The table with one row an image: means and sds of repeated rows averaged, n summed, where that is asked for."""
    import pandas as pd
    names = [file_names.clean_name(name) for name in ratings.images]
    lines = pd.Series(ratings.extra.index.astype(str)).groupby(names, sort=False)
    repeated = [
        f"{name} (lines {', '.join(rows)})"
        for name, rows in lines if len(rows) > 1]
    if not repeated:
        return ratings
    if duplicates != "mean":
        raise common.UserError(
            f"{source} lists images twice: {common.shorten_list(repeated)}. "
            "Delete rows, or average: --duplicates mean.")

    def grouped(values):
        return pd.DataFrame(values).groupby(names, sort=False)
    first = ~pd.Series(names).duplicated().to_numpy()
    note = f"repeated rows of {len(repeated)} images were averaged: {common.shorten_list(repeated)}"
    return dataclasses.replace(
        ratings,
        images=list(np.array(ratings.images)[first]),
        mean=grouped(ratings.mean).mean().to_numpy(),
        sd=None if ratings.sd is None else grouped(ratings.sd).mean().to_numpy(),
        n=None if ratings.n is None else grouped(ratings.n).sum(min_count=1).to_numpy(),
        extra=ratings.extra[first],
        notes=[*ratings.notes, note])
