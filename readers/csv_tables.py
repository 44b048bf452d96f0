"""Any CSV table as people have it -> a pandas table of text, and its columns -> numbers; lists and pairs in JSON."""
import contextlib
import csv
import gzip
import io
import math
import re
import zlib

import numpy as np

import common
from readers import file_names

MISSING_CELLS = {"", *"na nan n/a n.a. #n/a <na> null . -".split()}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def column_key(name):
    """'Total.Facial.scale' = 'Total_Facial_scale' = 'total_facial_scale'."""
    return re.sub(r"\W+", "_", str(name).casefold()).strip("_")


def pick_columns(wanted, options, where, short=()):
    """Names asked for -> those in `options`, in any spelling. UserError lists the unknown ones.

    short: {other name: the one in `options`}.
    """
    spelled = {column_key(name): option for name, option in dict(short).items()}
    spelled |= {column_key(name): name for name in options}
    picked = {name: name if name in options else spelled.get(column_key(name)) for name in wanted}
    unknown = [
        name + common.did_you_mean(name, options)
        for name, column in picked.items() if column is None]
    if unknown:
        raise common.UserError(
            f"{where} {common.shorten_list(unknown)} (found: "
            f"{common.shorten_list(options, 40) or 'none'}). Correct the name.")
    return list(dict.fromkeys(picked.values()))


def find_column(columns, known, wanted=None, where=""):
    """The column that is asked for, else the first of the `known` keys that there is, in any spelling; None for none.

    UserError, after the words `where`, for one that is asked for and is not there.
    """
    if wanted:
        return pick_columns([wanted], columns, where)[0]
    spelled = {column_key(name): name for name in columns}
    return next((spelled[key] for key in known if key in spelled), None)


def refuse_blank(table, source, column):
    """UserError that lists the lines in which a column is blank."""
    blank = table.index[table[column] == ""]
    if len(blank):
        raise common.UserError(
            f"{source}: column {column} is blank in line {common.shorten_list(blank)}. "
            "Fill or delete these rows.")


def refuse_blank_names(names, source):
    """UserError for names of classes that, as cells of a table, are blank."""
    blank = [repr(name) for name in names if name.lower() in MISSING_CELLS]
    if blank:
        raise common.UserError(
            f"{source}: no class can be called {', '.join(blank)}, which is a blank cell in a table. Rename it.")


def looks_numeric(cells):
    """True where at least a quarter of the cells that are not blank are numbers: the others are then errors."""
    filled = [cell.replace(",", ".", 1).removesuffix("%") for cell in cells if cell]
    numbers = list(filter(NUMBER.fullmatch, filled))
    return 4 * len(numbers) >= max(len(filled), 1)


def read_text(path):
    """Text of a file, unpacked where it is gzip: UTF-8 or UTF-16 (BOM), Windows-1252 as the last resort."""
    if not path.is_file():
        found = "a folder; join its tables in one" if path.is_dir() else "no such file"
        raise common.UserError(f"{path}: expected a table or list, found {found}.")
    data = path.read_bytes()
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
        f"{path}: expected a table or list, found binary data ({len(data)} bytes). Save it as CSV (UTF-8); in MATLAB: "
        "writetable, with one row an event (path, label, start_frame, end_frame) or a picture.")


def _parse(path, text, delimiter, strict=True):
    """[(number of its line in the file, cells)] of the rows with content."""
    if delimiter == " ":  # columns that stand below one another: many blanks are one
        text = re.sub("(?m)^ +| +$|(?<= ) +", "", text)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != " ", strict=strict)
    try:
        return [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise common.UserError(
            f"{path}, line {reader.line_num}: expected CSV, found {error}. Correct the quotes.") from None


def _split_again(cells, delimiter):
    """A row that was written as one quoted field -> its cells; others as they are."""
    if len(cells) > 1:
        return cells
    return next(csv.reader(io.StringIO(cells[0], newline=""), delimiter=delimiter, skipinitialspace=True))


def _names_file(cell):
    return cell.strip().lower().endswith((*file_names.IMAGE_SUFFIXES, *file_names.VIDEO_SUFFIXES))


def _is_title(cells, below):
    """True for a line above the header: a # comment, or a single filled cell; below it comes a line of names."""
    filled = list(filter(None, below))
    are_names = not any(_names_file(cell) or NUMBER.fullmatch(cell) for cell in filled)
    if cells[0].startswith("#"):
        return below[0].startswith("#") or are_names
    return sum(map(bool, cells)) == 1 < len(filled) and are_names


def _read_head(rows, delimiter):
    """-> (number of title lines, cells of the header, number of fields in the first row below it)."""
    rows = [_split_again(cells, delimiter) for _, cells in rows[:100]] or [[]]
    n_titles = 0
    while len(rows) > 1 and _is_title(*rows[:2]):
        rows.pop(0)
        n_titles += 1
    header, *below = rows
    return n_titles, header, len(below[0] if below else header)


def _sniff(path, text):
    """-> the delimiter whose header fits its first row, needs no titles and has most names; blanks if no other does."""
    fits = {}
    for delimiter in "\t;, ":
        rows = _parse(path, text[:100_000], delimiter, strict=False)
        n_titles, names, width = _read_head(rows, delimiter)
        widths = {len(cells) for _, cells in rows[1:100]}
        is_even = not n_titles and widths in ({len(names)}, {len(names) + 1})  # one more: R's row names
        if len(names) > 1 and (delimiter != " " or is_even):
            fits[delimiter] = delimiter != " ", len(names) == width, n_titles == 0, len(names)
    return max(fits, key=fits.get, default=",")  # a table of one column too


def _clean_cells(values):
    """Stripped str cells, '' where missing."""
    cells = [str(value).strip() for value in values]
    return ["" if cell.lower() in MISSING_CELLS else cell for cell in cells]


def read_table(path):
    """CSV table -> DataFrame of str cells, '' where blank, NA or NaN; its index holds the line numbers in the file.

    Comma, semicolon, tab or blanks; BOM; .gz; CRLF; Excel's sep= line, titles and # comments above
    the header, what Qualtrics writes below it, rows quoted as one field and rows without their last
    blank cells; R's row names. Without a header the column of files is `path`, the others column_2
    and so on. attrs: delimiter, notes. Raises UserError: no such file, binary, empty, rows wider
    than the header, repeated column names.
    """
    import pandas as pd
    text = read_text(path)
    mark = re.match('"?sep=(.)"?', text)
    text = text[mark.end():] if mark else text  # what is left of its line keeps the numbers of the others
    delimiter = mark[1] if mark else _sniff(path, text)
    rows = _parse(path, text, delimiter)
    n_titles, header, _ = _read_head(rows, delimiter)
    rows = rows[n_titles:]
    notes = []
    if n_titles:
        notes.append(f"{n_titles} line(s) above the header were skipped")
    is_file = list(map(_names_file, header))
    if sum(is_file) == 1:
        notes.append("the first line holds a file name and is no header: the columns are path, column_2, ...")
        header = ["path" if own else f"column_{i}" for i, own in enumerate(is_file, start=1)]
    elif rows:
        _, first = rows.pop(0)
        if len(first) != len(header):
            notes.append("the quoted header line was parsed again")
    if any(cell.startswith('{"ImportId":') for _, cells in rows[1:2] for cell in cells):
        notes.append("the two lines below the header, in which Qualtrics describes the columns, were skipped")
        rows = rows[2:]
    if not rows:
        raise common.UserError(
            f"{path}: expected a header and rows, found {min(len(header), 1)} line(s) with content. Check the file.")
    header, rows = _fit_header(header, rows, delimiter, notes)
    wrong = [f"line {line} has {len(cells)}" for line, cells in rows if len(cells) != len(header)]
    if wrong:
        raise common.UserError(
            f"{path}: expected {len(header)} fields in every row as in the header, but "
            f"{common.shorten_list(wrong, 5)}. Put cells that contain {delimiter!r} in quotes.")
    names = pd.Index([name.strip() or f"unnamed_{i}" for i, name in enumerate(header)])
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        raise common.UserError(
            f"{path}: expected unique column names, found twice: {common.shorten_list(repeated)}. "
            "Rename or delete them, or write a header line.")
    lines, cells = zip(*rows)
    table = pd.DataFrame(list(map(_clean_cells, cells)), lines, names, dtype=object)
    table.attrs.update(delimiter=delimiter, notes=notes)
    return table


def read_pairs(path, flag, columns):
    """{key: value} of JSON or YAML, also as {value: [keys]}, or of a CSV table with these two columns.

    All is text, '' where there is none. columns: names of the two, in either order; two columns of
    other names stand in this one. UserError for a key with two values.
    """
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        table = read_table(path)
        if len(table.columns) != 2 or set(map(column_key, table.columns)) == set(columns):
            table = table[pick_columns(columns, table.columns, f"{flag} {path} has no column")]
        pairs = [list(table.columns), *table.to_numpy().tolist()]  # without a header the first line is a pair
    else:
        pairs = []
        for key, value in common.read_config(path).items():
            pairs += [(each, key) for each in value] if isinstance(value, list) else [(key, value)]
    found = {}
    for key, value in pairs:
        value = "" if value is None else str(value)
        if found.setdefault(str(key), value) != value:
            raise common.UserError(f"{flag} {path}: {key} is both {found[str(key)]} and {value}. Delete one.")
    return found


def read_json_under(path, key):
    """The content of a JSON file, or, where it is an object with this key, what stands there."""
    content = common.read_json(path)
    if isinstance(content, dict):
        content = content.get(key, content)
    return content


def _fit_header(header, rows, delimiter, notes):
    """-> (header, rows) where rows have another width: quoted as one field, R's row names, blank cells at the end."""
    if len(header) > 1:
        rows = [(line, _split_again(cells, delimiter)) for line, cells in rows]
    wide = [cells for _, cells in rows if len(cells) == len(header) + 1]
    first = {cells[0] for cells in wide}
    # where the last cells are blank, each row may just end in a delimiter
    is_filled = any(cells[-1].strip() or _names_file(cells[1]) for cells in wide)
    if is_filled and len(first) == len(rows) and not any(map(_names_file, first)):
        header = ["row_names", *header]
        notes.append("the rows have one cell more than the header: the first one is taken for the name of the row")
    width = len(header)
    n_short = sum(len(cells) < width for _, cells in rows)
    if n_short:
        notes.append(f"{n_short} rows are shorter than the header: the cells that they lack are blank")
    for _, cells in rows:
        while len(cells) > width and not cells[-1].strip():
            cells.pop()
        cells += [""] * (width - len(cells))
    return header, rows


def to_numbers(values, where, expected="numbers"):
    """Column of read_table, or a list -> (N,) float64, NaN where blank. where, expected: file and column, for messages.

    Decimal commas count where no cell has a point and, in a comma file, not all could
    be thousands (1,234). 12% is 12. Raises UserError listing the cells that are no
    finite number, with their lines.
    """
    written = _clean_cells(values)
    cells = [cell.removesuffix("%") for cell in written]
    delimiter = ","
    lines = range(1, len(cells) + 1)
    what = "row"
    if hasattr(values, "attrs"):  # a column of read_table
        delimiter = values.attrs.get("delimiter", delimiter)
        lines = values.index
        what = "line"
    may_be_thousands = delimiter == "," and all(re.fullmatch(r"[^,]*,\d{3}", cell) for cell in cells if "," in cell)
    if not may_be_thousands and not any("." in cell for cell in cells):
        cells = [cell.replace(",", ".") for cell in cells]
    bad = [
        f"{shown!r} in {what} {line}" for shown, cell, line in zip(written, cells, lines)
        if cell and not (NUMBER.fullmatch(cell) and math.isfinite(float(cell)))]
    if bad:
        raise common.UserError(
            f"{where}: expected {expected}, found {common.shorten_list(bad)}. "
            "Correct these cells or leave them blank.")
    return np.array([float(cell or "nan") for cell in cells])
