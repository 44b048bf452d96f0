"""Any CSV table as people have it -> a pandas table of text, and its columns -> numbers."""
import collections
import contextlib
import csv
import gzip
import io
import math
import re
import zlib
from pathlib import Path

import numpy as np

import common

MISSING_CELLS = {"", "na", "nan", "n/a", "#n/a", "<na>"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def pick_columns(wanted, options, where):
    """Names asked for -> those in `options`, in any case, X also for X_mean. UserError lists the unknown ones."""
    spelled = {name.lower().removesuffix("_mean"): name for name in options}
    spelled |= {name.lower(): name for name in options}
    spelled |= {name: name for name in options}
    picked = {name: spelled.get(name, spelled.get(name.lower())) for name in wanted}
    unknown = [
        name + common.closest(name, options)
        for name, column in picked.items() if column is None]
    if unknown:
        raise common.UserError(
            f"{where} {common.shorten_list(unknown)} (found: {common.shorten_list(options, 40)}). "
            "Correct the name.")
    return list(dict.fromkeys(picked.values()))


def looks_numeric(cells):
    """True where at least half of the cells that are not blank are numbers."""
    filled = [cell.replace(",", ".", 1) for cell in cells if cell]
    return 2 * sum(map(bool, map(NUMBER.fullmatch, filled))) >= max(len(filled), 1)


def _table_text(path):
    """Text of a file, unpacked where it is gzip: UTF-8 or UTF-16 (BOM), Windows-1252 as the last resort."""
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise common.UserError(f"{path}: expected a CSV table, found {found}.")
    data = Path(path).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise common.UserError(
                f"{path}: expected a gzip file, found a damaged one ({error}). Copy it again.") from None
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ["utf-16"] if is_utf16 else ["utf-8-sig", "cp1252"]:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if "\0" not in text:
                return text
    raise common.UserError(
        f"{path}: expected a CSV table, found binary data ({len(data)} bytes). Save it as CSV (UTF-8).")


def _csv_rows(text, delimiter, strict=True):
    lines = io.StringIO(text, newline="")
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=strict)


def _read_header(text, delimiter):
    """-> (names, number of fields in the first row below them)."""
    rows = filter(any, _csv_rows(text[:100_000], delimiter, strict=False))
    names = next(rows, [])
    width = len(next(rows, names))
    if len(names) == 1 < width:  # the whole header stands in one pair of quotes
        names = next(_csv_rows(names[0], delimiter, strict=False))
    return names, width


def _sniff(text):
    """-> (header names, delimiter): the one whose header fits its first row, then the one with the most names."""
    best = (False, 1)
    chosen = ","  # stands for a table of one column too
    for delimiter in ",;\t":
        names, width = _read_header(text, delimiter)
        fit = (len(names) == width, len(names))
        if len(names) > 1 and fit >= best:
            best = fit
            chosen = delimiter
    return _read_header(text, chosen)[0], chosen


def _clean_cells(values):
    """Stripped str cells, '' where missing; each different cell is looked at once (long tables repeat them)."""
    values = [str(value) for value in values]
    clean = {value: value.strip() for value in set(values)}
    return ["" if clean[value].lower() in MISSING_CELLS else clean[value] for value in values]


def read_table(path):
    """CSV table -> DataFrame of str cells, '' where blank, NA or NaN; its index holds the line numbers in the file.

    Comma, semicolon or tab; BOM; .gz; CRLF; a header quoted as one field is repaired. attrs: delimiter, notes.
    Raises UserError: no such file, binary, empty, rows of another width than the header, repeated column names.
    """
    import pandas as pd
    text = _table_text(path)
    header, delimiter = _sniff(text)
    reader = _csv_rows(text, delimiter)
    try:
        rows = [(reader.line_num, *row) for row in reader if any(row)]
    except csv.Error as error:
        raise common.UserError(
            f"{path}, line {reader.line_num}: expected CSV, found {error}. Correct the quotes.") from None
    if len(rows) < 2:
        raise common.UserError(
            f"{path}: expected a header and rows, found {len(rows)} line(s) with content. Check the file.")
    is_repaired = len(rows.pop(0)) - 1 != len(header)
    wrong = [
        f"line {line} has {len(cells)}"
        for line, *cells in rows if len(cells) != len(header)]
    if wrong:
        raise common.UserError(
            f"{path}: expected {len(header)} fields in every row as in the header, but "
            f"{common.shorten_list(wrong, 5)}. "
            f"Put cells that contain {delimiter!r} in quotes, and fill short rows.")
    names = [name.strip() or f"unnamed_{i}" for i, name in enumerate(header)]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise common.UserError(
            f"{path}: expected unique column names, found twice: {common.shorten_list(repeated)}. "
            "Rename or delete them.")
    lines, *columns = zip(*rows)
    cells = dict(zip(names, map(_clean_cells, columns)))
    table = pd.DataFrame(cells, index=pd.Index(lines), dtype=object)
    table.attrs["delimiter"] = delimiter
    table.attrs["notes"] = ["the quoted header line was parsed again"] * is_repaired
    return table


def to_numbers(values, where):
    """Column of read_table, or a list -> (N,) float64, NaN where blank. `where`: file and column, for messages.

    Decimal commas count where no cell has a point and, in a comma file, not all could be thousands (1,234).
    Raises UserError listing the cells that are no finite number, with their lines.
    """
    cells = _clean_cells(values)
    is_column = hasattr(values, "attrs")
    if not any("." in cell for cell in cells):
        decimals = [
            re.fullmatch(r"[+-]?\d*,(\d+)([eE][+-]?\d+)?", cell)
            for cell in cells if "," in cell]
        is_comma_file = not is_column or values.attrs.get("delimiter", ",") == ","
        if all(decimals) and not (is_comma_file and all(len(match[1]) == 3 for match in decimals)):
            cells = [cell.replace(",", ".") for cell in cells]
    lines = values.index if is_column else range(1, len(cells) + 1)
    what = "line" if is_column else "row"
    bad = [
        f"{cell!r} in {what} {line}" for cell, line in zip(cells, lines)
        if cell and not (NUMBER.fullmatch(cell) and math.isfinite(float(cell)))]
    if bad:
        raise common.UserError(
            f"{where}: expected numbers, found {common.shorten_list(bad)}. "
            "Correct these cells or leave them blank.")
    return np.array([float(cell) if cell else math.nan for cell in cells])
