"""Any CSV table as people have it -> a pandas table of text, and its columns -> numbers."""
import collections
import contextlib
import csv
import gzip
import io
import itertools
import math
import re
import zlib
from pathlib import Path

import numpy as np

import common

MISSING_CELLS = {"", "na", "nan", "n/a", "#n/a", "<na>"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def pick_column(wanted, options, where):
    """Names asked for -> those in `options`, in any case, X also for X_mean. UserError lists the unknown ones."""
    spelled = {name.lower().removesuffix("_mean"): name for name in options}
    spelled |= {name.lower(): name for name in options} | {name: name for name in options}
    unknown = [name + common.closest(name, options) for name in wanted or [] if not {name, name.lower()} & set(spelled)]
    if unknown:
        raise common.UserError(f"{where} {common.shorten_list(unknown)} (found: {common.shorten_list(options, 40)}). Correct the name.")
    return list(dict.fromkeys(spelled.get(name) or spelled[name.lower()] for name in wanted or []))


def _table_text(path):
    """Text of a file, unpacked where it is gzip: UTF-8 or UTF-16 (BOM), Windows-1252 as the last resort."""
    if not Path(path).is_file():
        raise common.UserError(f"{path}: expected a CSV table, found {'a folder' if Path(path).is_dir() else 'no such file'}.")
    data = Path(path).read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise common.UserError(f"{path}: expected a gzip file, found a damaged one ({error}). Copy it again.") from None
    for encoding in ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1252"]:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if "\0" not in text:
                return text
    raise common.UserError(f"{path}: expected a CSV table, found binary data ({len(data)} bytes). Save it as CSV (UTF-8).")


def _csv_rows(text, delimiter, strict=True):
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=strict)


def _sniff(text):
    """-> (header names, delimiter); a header that lies in one quoted field above a row of many is parsed once more."""
    def fit(delimiter):
        rows = list(itertools.islice(filter(any, _csv_rows(text[:100_000], delimiter, strict=False)), 2)) or [[]]
        is_quoted = len(rows[0]) == 1 < len(rows[-1])
        names = next(_csv_rows(rows[0][0], delimiter, strict=False)) if is_quoted else rows[0]
        is_table = len(names) > 1  # among equals the comma comes last; alone it stands for a table of one column
        agrees = is_table and len(names) == len(rows[-1])
        return is_table, agrees, len(names), (delimiter == ",") != is_table, names, delimiter
    return max(map(fit, "\t;,"))[-2:]


def _clean_cells(values):
    """Stripped str cells, '' where missing; each different cell is looked at once (long tables repeat them)."""
    values = [str(value) for value in values]
    clean = {value: "" if value.strip().lower() in MISSING_CELLS else value.strip() for value in set(values)}
    return [clean[value] for value in values]


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
        raise common.UserError(f"{path}, line {reader.line_num}: expected CSV, found {error}. Correct the quotes.") from None
    if len(rows) < 2:
        raise common.UserError(f"{path}: expected a header and rows, found {len(rows)} line(s) with content. Check the file.")
    is_repaired = len(rows.pop(0)) - 1 != len(header)
    wrong = [f"line {row[0]} has {len(row) - 1}" for row in rows if len(row) - 1 != len(header)]
    if wrong:
        raise common.UserError(f"{path}: expected {len(header)} fields in every row as in the header, but {common.shorten_list(wrong, 5)}. "
                        f"Put cells that contain {delimiter!r} in quotes, and fill short rows.")
    names = [name.strip() or f"unnamed_{i}" for i, name in enumerate(header)]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise common.UserError(f"{path}: expected unique column names, found twice: {common.shorten_list(repeated)}. Rename or delete them.")
    lines, *columns = zip(*rows)
    table = pd.DataFrame(dict(zip(names, map(_clean_cells, columns))), index=pd.Index(lines), dtype=object)
    table.attrs.update(delimiter=delimiter, notes=["the quoted header line was parsed again"] * is_repaired)
    return table


def to_numbers(values, where):
    """Column of read_table, or a list -> (N,) float64, NaN where blank. `where`: file and column, for messages.

    Decimal commas count where no cell has a point and, in a comma file, not all could be thousands (1,234).
    Raises UserError listing the cells that are no finite number, with their lines.
    """
    cells, is_column = _clean_cells(values), hasattr(values, "attrs")
    commas = [re.fullmatch(r"[+-]?\d*,(\d+)([eE][+-]?\d+)?", cell) for cell in cells if "," in cell]
    if all(commas) and not any("." in cell for cell in cells):
        if is_column and values.attrs.get("delimiter") in (";", "\t") or any(len(match[1]) != 3 for match in commas):
            cells = [cell.replace(",", ".") for cell in cells]
    good = [not cell or (NUMBER.fullmatch(cell) and math.isfinite(float(cell))) for cell in cells]
    if not all(good):
        lines, what = (values.index, "line") if is_column else (range(1, len(cells) + 1), "row")
        bad = [f"{cell!r} in {what} {line}" for cell, line, ok in zip(values, lines, good) if not ok]
        raise common.UserError(f"{where}: expected numbers, found {common.shorten_list(bad)}. Correct these cells or leave them blank.")
    return np.array([float(cell) if cell else math.nan for cell in cells])
