"""Any table of ratings -> one RatingsTable of means, rater sds and numbers of raters.

Letters: N pictures, R ratings.
"""
import collections
import dataclasses
import re
import shlex

import numpy as np

import common
from readers import csv_tables, file_names

IMAGE_COLUMNS = "image filename file stimulus path".split()
# val sd are the words of valsd; price_usd and ptsd end in one word
WORD_BORDER = re.compile(r"([\W_]+|(?<=[a-z])(?=[A-Z])|(?<=.)(?=SD$)|(?<=[a-z\d]{3})(?=sd$))")
SPELLINGS = {"mean": "mean mn avg m", "sd": "sd std stdev", "n": "n count", "se": "se sem"}
ROLES = {word: role for role, words in SPELLINGS.items() for word in words.split()}
ABOUT_RATERS = ("sd", "n", "se")  # roles that say how many raters a mean has and how far they agree
NO_RATING = set("id index unnamed names rt latency".split())
# where and when in the experiment a single rating was given
TRIAL = set("block blocknum order trial trialnum row screen time timestamp started stopped onset "
            "duration elapsed coordinate".split())
RATER = set("rater participant subject respondent observer judge coder worker user pid".split())
DEMOGRAPHIC = set("age sex gender country nationality language education group status".split())  # participant_age
ATTRIBUTE = "attribute trait question scale item measure dimension".split()
ANSWER = set("rating response score value answer".split())
# Written for a missing answer: 99, -99, 999 and so on, and -9.
MISSING_CODES = [77, 777, 7777, 88, 888, 8888, 99, 999, 9999]
DIGIT_CODES = [7, 8, 9]  # answers too, unless they are very far from the others, as beside 0, 1 and 2
MISSING_CODES += [-code for code in (*DIGIT_CODES, *MISSING_CODES)]


@dataclasses.dataclass
class RatingsTable:
    """N images in the order of the file, R ratings in its unit."""
    names: list  # of the R ratings
    images: list  # N different names, each as its first row writes it
    mean: np.ndarray  # (N, R) float64, NaN = missing
    sd: np.ndarray | None  # (N, R) between raters, None where the file has none
    n: np.ndarray | None  # (N, R) number of raters
    single_ratings: dict  # name -> N arrays of single ratings, where each row is one
    extra: object  # DataFrame of the other columns
    notes: list


def read_ratings(path, image_column=None, target_columns=None, duplicates="error", group_column=None,
                 rater_column=None, attribute_column=None, rating_column=None, missing_codes=None):
    """Ratings file -> RatingsTable; layouts: X_mean, X_sd, X_n; one column per rating; one row per single rating.

    duplicates: what rows of one image are that no rater and no attribute tells apart:
    'error'; 'ratings', each is a single rating; 'mean' (mean and sd averaged, n
    summed). group_column is never a target. missing_codes: numbers that stand for
    missing; None: what looks like one is an error. Raises UserError for every fault
    that would make the training meaningless, naming rows and columns.
    """
    table = csv_tables.read_table(path)
    source = f"--ratings_file {path}"

    def named(flag, wanted, options, known=()):
        return csv_tables.find_column(options, known, wanted, f"{source} has no --{flag}_column")
    if group_column:
        table = table.rename(columns={named("group", group_column, table): group_column})
    image = named("image", image_column, table, IMAGE_COLUMNS)
    if image is None:
        raise common.UserError(
            f"{source} has no image column (found: {common.shorten_list(table.columns)}). Name it with --image_column; "
            "where each picture has columns of its own, write a row for each picture, or rater and picture.")
    csv_tables.refuse_blank(table, source, image)
    same_image = table[image].map(file_names.clean_name)
    table[image] = table[image].groupby(same_image).transform("first")  # one spelling each
    others = table.columns.drop(image)
    columns = Columns(
        table, source, image, group_column, target_columns, missing_codes,
        rater=named("rater", rater_column, others),
        attribute=named("attribute", attribute_column, others),
        rating=named("rating", rating_column, others))
    columns.find_single_ratings(duplicates)
    if columns.attribute or columns.rows_are_ratings:
        ratings = _single_ratings(columns)
    else:
        ratings = _wide_ratings(columns, duplicates)
    if group_column and group_column not in ratings.extra.columns:
        raise common.UserError(
            f"{source}: expected one group for each image in --group_column, found {group_column} to be an "
            "image, rating, sd or n column, or to vary within an image. Name another column.")
    _refuse_useless(ratings, source)
    return ratings


def _refuse_useless(ratings, source):
    """UserError for images without any rating, and for ratings that are all equal or named like other columns."""
    import pandas as pd
    others = {f"{name}_{kind}" for name in ratings.names for kind in ("sd", "low", "high")}  # in predictions.csv
    clashes = sorted((others | {"image", "seen", "warning", "error"}) & set(ratings.names))
    if clashes:
        raise common.UserError(
            f"{source}: ratings called {common.shorten_list(clashes)}, as columns of predictions "
            "are. Rename them, or choose others with --target_columns.")
    mean = pd.DataFrame(ratings.mean, ratings.images, ratings.names)
    empty = mean.index[mean.isna().all(axis=1)]
    if len(empty):
        raise common.UserError(
            f"{source}: all ratings are missing for {common.shorten_list(empty)}. "
            "Fill or delete these rows.")
    is_constant = mean.nunique() < 2
    if is_constant.any():
        others = shlex.join(mean.columns[~is_constant])
        remedy = f" Leave them out: --target_columns {others}" if others else ""
        raise common.UserError(
            f"{source}: constant rating columns (nothing to learn): "
            f"{common.shorten_list(mean.columns[is_constant])}.{remedy}")


# --------------------------------------------------------------------------------------
# What the columns are
# --------------------------------------------------------------------------------------

def role_of(name):
    """Column -> (mean, sd, n, se or None; the name without that word): Valence_SD_men -> ('sd', 'Valence_men')."""
    parts = WORD_BORDER.split(name)  # words, and the borders between them
    known = [k for k, part in enumerate(parts) if part.lower() in ROLES]
    if not known:
        return None, name
    clear = [k for k in known if parts[k].lower() != "m"]  # which may also say men
    last = (clear or known)[-1]
    role = ROLES[parts[last].lower()]
    del parts[max(last - 1, 0):last + 1]  # the word, and the border before it
    base = "".join(parts).strip(" _.-()[]")
    if role == "n" and _names_rater(base):  # n_raters: of every rating
        base = ""
    return role, base


def _words(name):
    return {word.lower() for word in WORD_BORDER.split(name)}


def _names_rater(name):
    """True for participant, user_id and num_raters, not for user_rating."""
    words = _words(name.removesuffix("s"))
    return bool(words & RATER) and not words & ANSWER


def _tells_raters_apart(name):
    """True for participant and user_id; not for num_raters, which counts them, nor for participant_age."""
    words = _words(name)
    return _names_rater(name) and bool(words & RATER) and not words & DEMOGRAPHIC


@dataclasses.dataclass
class Columns:
    """What the columns of a table are: by flag, by name, or by what varies within what."""
    table: object  # DataFrame of text
    source: str  # for messages
    image: str
    group: str | None
    wanted: list | None  # --target_columns
    codes: list | None  # --missing_codes
    rater: str | None
    attribute: str | None  # what was asked, where a row is a single rating
    rating: str | None  # the answer to it
    rows_are_ratings: bool = False  # each row holds single ratings, one a column

    def __post_init__(self):
        self.notes = self.table.attrs["notes"]
        # all but those of the image and the group
        self.others = [name for name in self.table if name not in (self.image, self.group)]
        self.roles = {name: role_of(name) for name in self.others}
        self.of_rating = collections.defaultdict(dict)  # key of a rating -> {role: column}
        for name, (role, _) in self.roles.items():
            self.of_rating[self.key(name)][role] = name
        # column of means -> name of its rating; mean_trust beside sd_trust or n_trust alone, as mean is a trait too
        self.means = {}
        for name, (role, base) in self.roles.items():
            others = self.of_rating[self.key(name)]
            by_name = base and ("n" in others or name.lower().endswith("mean"))
            if role == "mean" and ("sd" in others or by_name):
                self.means[name] = base or name

    def key(self, name):
        """The rating that a column belongs to, in any spelling."""
        return re.sub(r"[\W_]+", "", self.roles[name][1]).lower()

    def partner(self, name, role):
        """The column of a role that says more of the rating in a column, or None; n may stand there once for all."""
        if self.roles[name][0] in ABOUT_RATERS:  # an sd that is itself to be learnt
            return None
        found = self.of_rating[self.key(name)].get(role)
        return found or (self.of_rating[""].get("n") if role == "n" else None)

    def numbers(self, name):
        """(N,) float64 Series by line, NaN where blank. UserError lists the cells that are none."""
        import pandas as pd
        cells = self.table[name]
        return pd.Series(csv_tables.to_numbers(cells, f"{self.source}, column {name}"), cells.index)

    def possible_ratings(self):
        """The columns that look numeric and are by name no sd, n, id, image, rater or number of raters."""
        return [
            name for name, (role, _) in self.roles.items()
            if role not in ABOUT_RATERS and csv_tables.column_key(name) not in IMAGE_COLUMNS
            and not (_words(name) & NO_RATING or _names_rater(name))
            and csv_tables.looks_numeric(self.table[name])]

    def possible_answers(self):
        """Those of possible_ratings that may be single ones: no trial number, nothing that describes image or rater."""
        chosen = [name for name in self.possible_ratings()
                  if not _words(name) & TRIAL and not name.startswith("mouse.")]  # PsychoPy's pointer, not the animal
        for described in filter(None, (self.image, self.rater)):
            chosen = self.varying(chosen, [described]) or chosen
        return chosen

    def targets(self):
        """The columns asked for, else all means by name, else all that may be ratings.

        UserError where none is.
        """
        asked = self.wanted or list(filter(None, [self.rating]))
        if asked:
            short = {base: name for name, (role, base) in self.roles.items() if role == "mean"}
            chosen = csv_tables.pick_columns(asked, self.others, f"{self.source} has no --target_columns", short)
        elif self.rows_are_ratings:
            chosen = self.possible_answers()
        else:
            chosen = list(self.means) or self.possible_ratings()
        names = {self.means.get(name, name) for name in chosen}
        if not names or len(names) < len(chosen):
            raise common.UserError(
                f"{self.source}: expected one numeric column for each rating, took "
                f"{common.shorten_list(chosen) or 'none'} of {common.shorten_list(self.others)}. "
                "Choose with --target_columns.")
        return chosen

    def find_single_ratings(self, duplicates):
        """Set rater, attribute and rating where each row is a single rating.

        UserError where it is unclear.
        """
        varying = self.varying(self.others, [self.image])
        rater = self.rater or next(filter(_tells_raters_apart, varying), None)
        rating = csv_tables.find_column(self.others, ["rating"])
        attribute = csv_tables.find_column(self.others, ["attribute"])
        if rating and attribute:  # so named
            self.attribute = self.attribute or attribute
            self.rating = self.rating or rating
        if self.attribute and self.rating:
            self.rater = rater
            return
        if not self.attribute and not self.table[self.image].duplicated().any():
            return
        are_told = self.rater or self.attribute or duplicates == "ratings"
        if not are_told and any("sd" in roles and len(roles) > 1 for roles in self.of_rating.values()):
            return  # means, each beside its sd
        self.rater = rater
        answers = [self.rating] if self.rating else self.possible_answers()
        if self.rater:
            varying = self.varying(varying, [self.image, self.rater])
        if not self.attribute:
            self.find_attribute(varying, any_text=len(answers) == 1 and duplicates != "ratings")
        if self.attribute and not self.rating:
            self.find_rating(answers)
        self.rows_are_ratings = bool(self.rater or duplicates == "ratings")

    def find_attribute(self, varying, any_text):
        """Set it to the one of the varying columns that says what was asked: by its name, else (any_text) a text."""
        asked = [name for name in varying if name.lower() in ATTRIBUTE]
        if not asked and any_text:
            asked = list(filter(self.may_be_attribute, varying))
        if len(asked) > 1:
            raise common.UserError(
                f"{self.source}: {common.shorten_list(asked)} vary within an image; which one says "
                "what was asked? --attribute_column")
        self.attribute = asked[0] if asked else None

    def find_rating(self, answers):
        """Set it to that of the possible answers which its name calls one, else to the only one."""
        answers = [name for name in answers if name != self.attribute]
        answers = [name for name in answers if _words(name) & ANSWER] or answers
        if len(answers) != 1:
            raise common.UserError(
                f"{self.source}: {self.attribute} says what was asked, but which column holds the "
                f"answers? --rating_column (found: {common.shorten_list(answers)})")
        self.rating = answers[0]

    def varying(self, names, within):
        """Those of the columns that have several values for one value of `within`."""
        n_values = self.table.groupby(within)[names].nunique().max()
        return list(n_values.index[n_values > 1])

    def extra_columns(self, used):
        """The unused columns with one value an image, a row for each image; notes name them and what is left out."""
        others = self.table.drop(columns={self.image, *used} - {None})
        varying = self.varying(list(others), [self.image])
        if varying:
            self.notes.append(f"columns that vary within an image, left out: {common.shorten_list(varying)}")
        extra = others[~self.table[self.image].duplicated()].drop(columns=varying)
        if len(extra.columns):
            self.notes.append(f"columns that are no ratings: {common.shorten_list(extra.columns)}")
        return extra

    def may_be_attribute(self, name):
        """True for text not of raters, without blanks, each value of which stands at two images or more."""
        if _names_rater(name):
            return False
        cells = self.table[name]
        n_images = self.table[self.image].groupby(cells).nunique()
        return (cells != "").all() and n_images.min() > 1 and not csv_tables.looks_numeric(cells)


# --------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------

def _wide_ratings(columns, duplicates):
    """One row per picture; of several the means and sds are averaged and n summed, where that is asked for."""
    chosen = columns.targets()
    sd_columns = [columns.partner(name, "sd") for name in chosen]
    n_columns = [columns.partner(name, "n") for name in chosen]
    averaged = _note_on_repeated(columns, duplicates)
    used = [*chosen, *sd_columns, *n_columns]
    extra = columns.extra_columns(used)
    unused = [name for name, (role, _) in columns.roles.items() if role in ABOUT_RATERS and name not in used]
    notes = columns.notes
    if unused:
        notes.append(f"not used, though by name an sd or a number of raters: {common.shorten_list(unused)}")
    raters = [name for name in chosen if name[-1].isdigit()
              and WORD_BORDER.split(name.rstrip("0123456789 _"))[-1].lower() in RATER | {"obs", "r", "p"}]
    if len(raters) > 1:
        notes.append(
            f"{common.shorten_list(raters)} are learnt as {len(raters)} ratings. If they are people who "
            "answered one question, give each answer a row (columns image, rater, rating): then "
            "their mean is learnt, and how far they agree tells what a model can reach")
    return RatingsTable(
        names=[columns.means.get(name, name) for name in chosen],
        images=list(columns.table[columns.image].unique()),
        mean=_number_columns(columns, chosen),
        sd=_number_columns(columns, sd_columns, "sd"),
        n=_number_columns(columns, n_columns, "n"),
        single_ratings={},
        extra=extra,
        notes=notes + averaged)


def _note_on_repeated(columns, duplicates):
    """[a note on the images of several rows], [] without any.

    UserError where --duplicates does not average them.
    """
    images = columns.table[columns.image]
    repeated = images[images.duplicated(keep=False)]
    if repeated.empty:
        return []
    examples = [f"{image} (lines {common.shorten_list(own.index, 3)})"
                for image, own in repeated.groupby(repeated, sort=False)]
    counted = f"{repeated.nunique()} images stand in {len(repeated)} rows: {common.shorten_list(examples)}"
    if duplicates == "mean":
        return [f"repeated rows were averaged: {counted}"]
    raise common.UserError(
        f"{columns.source} lists images twice: {counted}. If a column says who rated or what was asked, name it: "
        "--rater_column, --attribute_column; if each row is a single rating, say --duplicates ratings (sds of means "
        "are then not used). Delete rows, or average: --duplicates mean.")


def _number_columns(columns, names, role="mean"):
    """(N, R) of R columns of a role, NaN where one is None; None where all are.

    UserError for an sd or n below 0.
    """
    import pandas as pd
    if not any(names):
        return None
    are_counts = role == "n"
    found = _without_codes(columns, {name: columns.numbers(name) for name in names if name}, are_counts)
    faults = [f"{name} in line {common.shorten_list(values.index[values < 0])}"
              for name, values in found.items() if role != "mean" and values.min() < 0]
    if faults:
        raise common.UserError(f"{columns.source}: an sd or a number of raters cannot be below 0, found "
                               f"{'; '.join(faults)}. Correct these cells, or leave them blank.")
    of_images = pd.DataFrame(found).groupby(columns.table[columns.image], sort=False)
    merged = of_images.sum(min_count=1) if are_counts else of_images.mean()
    return merged.reindex(columns=names).to_numpy()


def _without_codes(columns, found, are_counts=False):
    """{name: numbers by line} with NaN for --missing_codes, which a note counts.

    UserError for what looks like others.

    In numbers of raters only those below 0 are codes: 99 raters are 99.
    """
    codes = [code for code in columns.codes or [] if code < 0 or not are_counts]
    faults = []
    blanked = []
    for name, values in found.items():
        is_code = values.isin(codes)
        found[name] = values.mask(is_code)
        if is_code.any():
            blanked.append(f"{name} {is_code.sum()}")
        if columns.codes != [] and not are_counts:
            faults += _code_faults(name, found[name])
    if blanked:
        columns.notes.append(f"cells taken for missing: {common.shorten_list(blanked)}")
    if faults:
        raise common.UserError(
            f"{columns.source}: codes for missing answers? {common.shorten_list(faults, 5)}. To take such "
            "numbers for missing: --missing_codes NUMBERS, all of them; to keep all: "
            "--missing_codes without a number; to keep some: blank the other cells.")
    return found


def _code_faults(name, values):
    """A line for each number that is written for a missing answer and far from all the others."""
    faults = []
    digits = [code for code in DIGIT_CODES if (values == code).sum() > 1 and values.nunique() > 2]
    for codes, n_ranges in ((MISSING_CODES, 1), (digits, 2)):
        is_code = values.isin(codes)
        others = values[~is_code]
        low = others.min()
        high = others.max()
        margin = n_ranges * (high - low)
        is_far = (values < low - margin) | (values > high + margin)
        if low >= 0:
            is_far |= values < 0
        faults += [f"{name} is {code:g} in {len(cells)} cells (line {common.shorten_list(cells.index, 3)}), the others "
                   f"{low:g} to {high:g}" for code, cells in values[is_code & is_far].groupby(values)]
    return faults


def _single_ratings(columns):
    """One rating a row, where a column says which attribute it is of; else one row a picture and rater."""
    if columns.attribute:
        csv_tables.refuse_blank(columns.table, columns.source, columns.attribute)
        asked = columns.table[columns.attribute]
        if columns.wanted:
            chosen = csv_tables.pick_columns(
                columns.wanted, asked.unique(), f"{columns.source} has no --target_columns")
            columns.table = columns.table[asked.isin(chosen)]
        used = [columns.attribute, columns.rating]
        by_name = dict(iter(columns.numbers(columns.rating).groupby(asked, sort=False)))
    else:
        used = columns.targets()
        by_name = {columns.means.get(name, name): columns.numbers(name) for name in used}
    return _summarise_singles(columns, _without_codes(columns, by_name), used)


def _summarise_singles(columns, found, used):
    """found: {rating: single ones by line} -> RatingsTable; sd has ddof 1 and is NaN for one single rating.

    Several of one rater are first averaged: they agree more than those of different raters.
    """
    import pandas as pd
    names = list(found)
    table = columns.table
    image_of = table[columns.image]
    images = image_of.unique()
    line = table.index.to_series()  # a number, unlike the text of any name
    rater_of = table.get(columns.rater, line).mask(lambda rater: rater == "", line)
    answers = pd.concat(found)
    singles = pd.concat({name: values.groupby([image_of, rater_of], sort=False).mean().droplevel(1)
                         for name, values in found.items()})
    grouped = singles.dropna().groupby(level=[1, 0])
    moments = grouped.agg(["mean", "std", "count"]).reindex(pd.MultiIndex.from_product([images, names]))
    mean, sd, n = moments.to_numpy().T.reshape(3, len(images), len(names))  # (statistic, image, rating)
    extra = columns.extra_columns([columns.rater, *used])
    flags = ("rater", "attribute", "rating")
    told = [f"--{flag}_column {getattr(columns, flag)}" for flag in flags if getattr(columns, flag)]
    notes = [
        *columns.notes,
        f"{answers.count()} single ratings of {len(images)} images ({answers.isna().sum()} blank "
        f"ones left out), of {common.shorten_list(names)}: {' '.join(told) or 'no rater named'}"]
    n_repeated = answers.count() - singles.count()
    if n_repeated:
        differing = columns.varying(columns.others, [columns.image, columns.rater])
        notes.append(
            f"{n_repeated} single ratings are further ones of the same rater and image: their mean counts once. They "
            f"differ in {common.shorten_list(differing) or 'nothing'}. Does a column say what was asked? "
            "--attribute_column. Do several people have one number, as in two laboratories? Write both in the column "
            "of the raters")
    arrays = {key: own.to_numpy() for key, own in grouped}
    return RatingsTable(
        names=names,
        images=list(images),
        mean=mean,
        sd=sd,
        n=np.nan_to_num(n),
        single_ratings={name: [arrays.get((image, name), np.empty(0)) for image in images] for name in names},
        extra=extra,
        notes=notes)
