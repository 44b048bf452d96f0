"""The predictions table, where a script ends and its judging begins.

A CSV with a row for each picture, clip or transition. Its first column says which, `group` which
rows are not independent, `fold` which of several models predicted the row, `seen` what that model
has done with it (seen_rows.WORDS). Scores stand in NAME_true, NAME_predicted and NAME_BASELINE of
each score; classes in true_label, prob_CLASS and BASELINE_prob_CLASS, with threshold and
BASELINE_threshold where the class in positive_class is given from a threshold on.

Letters: M rows, R scores, C classes.
"""
import dataclasses
import itertools

import numpy as np

import common
from evidence import baseline_models, class_scores, metric_names, seen_rows, splitting, subject_intervals
from readers import csv_tables


@dataclasses.dataclass(kw_only=True)
class Rows:
    """What tables of scores and of classes have in common: M rows, R scores or C classes."""
    keys: dict  # heading -> (M,) text; the first says which row it is
    names: list  # R or C
    truth: np.ndarray  # (M, R) scores, NaN = missing; or (M,) class indices, -1 = unknown
    baselines: dict  # name -> (M, R) or (M, C)
    groups: np.ndarray | None = None  # (M,) text
    seen: np.ndarray | None = None  # (M,) of seen_rows.WORDS
    warning: np.ndarray | None = None  # (M,) text, of row_warnings.texts
    notes: list | tuple = ()  # sentences on how the table was read
    alarms: list | tuple = ()  # sentences on rows that may not be independent

    @property
    def row_names(self):
        """(M,) text that says which row it is."""
        return next(iter(self.keys.values()))

    @property
    def n_folds(self):
        """How many folds' models predicted the rows, as far as the table says."""
        return len(set(self.keys.get("fold", ["all"])))

    def row_columns(self):
        """{heading: (M,)} of what is known of the rows."""
        return _known({**self.keys, "group": self.groups, "seen": self.seen, "warning": self.warning})

    def rows_of(self, names):
        """(M,) places of the rows in a list of names. UserError for names that repeat."""
        place = {name: row for row, name in enumerate(names)}
        if len(place) < len(names):
            raise common.UserError(f"the column {next(iter(self.keys))} must tell rows apart, found {len(place)} "
                                   f"values in {len(names)} rows; give each row its own")
        return np.array([place[name] for name in self.row_names])

    def take(self, rows):
        """The table of these rows."""
        return combine([self], lambda parts: parts[0][rows])

    def labelled(self):
        """The table of the rows with a true value."""
        return self.take(self.is_known.any(1))

    @property
    def sample(self):
        """How much the rows hold: their number, different sets of labels, subjects, positives."""
        import pandas as pd
        return {
            "rows": len(self.truth),
            "distinct_label_vectors": len(pd.DataFrame(self.truth).drop_duplicates()),
            "subjects": None if self.groups is None else len(set(self.groups)),
            "positives": None if self.positive is None else np.sum(self.truth == self.positive),
        }

    def fold_numbers(self):
        """What the fold table says of one fold: the model's metrics, and the best baseline's R2 or AUC."""
        baseline = self.quality(self.baselines[self.best_baseline])
        return {"rows": len(self.truth), **self.main_metrics(), f"baseline_{self.metric}": baseline}

    @property
    def best_baseline(self):
        """Name of the baseline of the highest R2 or AUC."""
        qualities = [self.quality(outputs) for outputs in self.baselines.values()]
        best = np.argmax(np.nan_to_num(qualities, nan=-np.inf))
        return list(self.baselines)[best]


@dataclasses.dataclass(kw_only=True)
class ScoreTable(Rows):
    """Predicted scores of M rows beside the truth and what the baselines predict."""
    predicted: np.ndarray  # (M, R)
    spread: np.ndarray | None = None  # (M, R) sd over the members of an ensemble
    metric = "r2"  # of the verdict
    positive = None

    @property
    def is_known(self):
        """(M, R) bool, True = there is a true score."""
        return ~np.isnan(self.truth)

    def quality(self, predicted):
        """Mean R2 of predictions (M, R) where there are any."""
        target = np.where(np.isnan(predicted), np.nan, self.truth)
        return common.mean_metrics(predicted, target)["r2"]

    def quality_within(self, levels):
        """Mean R2 of how rows of the same level, (M,) of any text, differ."""
        import pandas as pd
        predicted = np.where(self.is_known, self.predicted, np.nan)
        scores = pd.DataFrame(np.hstack([predicted, self.truth]))
        from_mean = scores - scores.groupby(levels).transform("mean")
        return common.mean_metrics(*np.hsplit(from_mean.to_numpy(), 2))["r2"]

    def compare(self):
        """subject_intervals.Result of the model, paired with the best baseline."""
        best = self.best_baseline
        return subject_intervals.bootstrap_regression(
            self.predicted, self.truth, self.groups, self.baselines[best], names=self.names, baseline_name=best,
            folds=self.n_folds)

    def against(self, other, name):
        """The table with the predictions of another one of the same rows as its only baseline."""
        return dataclasses.replace(self, baselines={name: other.predicted})

    def main_metrics(self):
        """{metric: mean over the scores}."""
        return common.mean_metrics(self.predicted, self.truth)

    def write(self, path):
        """The CSV, written whole."""
        blocks = _known({"true": self.truth, "predicted": self.predicted, **self.baselines, "sd": self.spread})
        columns = self.row_columns()
        for r, name in enumerate(self.names):
            columns |= {f"{name}_{kind}": block[:, r] for kind, block in blocks.items()}
        common.write_table(path, columns)

    def rank_rows(self):
        """(rows from the smallest to the largest error, two lines of text on each row).

        The error is the root mean square over the scores that vary, each in units of the sd of its
        truth; rows without truth are left out.
        """
        sd = common.sd_without_nan(self.truth)
        scaled = (self.predicted - self.truth) / np.where(sd > 0, sd, np.nan)  # (M, R)
        error = np.sqrt(common.mean_without_nan(scaled ** 2))
        worst = np.nan_to_num(np.abs(scaled)).argmax(1)  # (M,) scores
        lines = [[f"rms error {error[row]:.2f} sd", f"largest in {self.names[r]}: true {self.truth[row, r]:.2f}, "
                  f"predicted {self.predicted[row, r]:.2f}"] for row, r in enumerate(worst)]
        order = np.argsort(error, kind="stable")
        return order[:np.isfinite(error).sum()], lines


@dataclasses.dataclass(kw_only=True)
class ClassTable(Rows):
    """Predicted classes of M rows beside the truth and what the baselines predict."""
    positive: int  # the class whose AUC counts, and that a threshold gives
    probability: np.ndarray  # (M, C)
    baseline_thresholds: dict = dataclasses.field(default_factory=dict)  # name -> (M,), of those that have one
    threshold: np.ndarray | None = None  # (M,) of the positive class; None = the most probable class is given
    logits: np.ndarray | None = None  # (M, C) before calibration
    score: np.ndarray | None = None  # (M, 2), where `probability` holds its ranks
    uncalibrated: np.ndarray | None = None  # (M, C), where `probability` is calibrated on other rows
    metric = "roc_auc"  # of the verdict

    @property
    def chosen(self):
        """(M,) indices of the classes that are given."""
        return class_scores.predicted_class(self.probability, self.threshold, self.positive)

    @property
    def is_known(self):
        """(M, 1) bool, True = there is a true class."""
        return self.truth[:, None] >= 0

    def scores_of(self, probability, threshold=None):
        """class_scores.ClassMetrics of probabilities (M, C)."""
        return class_scores.classification_metrics(probability, self.truth, threshold, self.positive)

    def quality(self, probability):
        """AUC of probabilities (M, C)."""
        return self.scores_of(probability).overall["roc_auc"]

    def quality_within(self, levels):
        """AUC over the pairs of a positive and another row of the same level, (M,) of any text.

        What is left of an AUC once a level can no longer tell the class; NaN without such a pair.
        """
        import pandas as pd
        score = pd.Series(self.probability[:, self.positive])
        is_positive = self.truth == self.positive
        # a rank among the rows of the level less that among its like: how many others are below, equal ones half
        below = score.groupby(levels).rank() - score.groupby([levels, is_positive]).rank()
        others = pd.Series(~is_positive).groupby(levels).transform("sum")
        with common.undefined_is_nan():
            return below[is_positive].sum() / others[is_positive].sum()

    def compare(self):
        """subject_intervals.Result, paired with the best baseline; each decides by its own threshold, if any."""
        best = self.best_baseline
        return subject_intervals.bootstrap_classification(
            self.probability, self.truth, self.groups, self.baselines[best],
            threshold=self.threshold,
            positive=self.positive,
            baseline_threshold=self.baseline_thresholds.get(best),
            folds=self.n_folds,
            names=self.names,
            baseline_name=best)

    def against(self, other, name):
        """The table with the predictions of another one of the same rows as its only baseline."""
        return dataclasses.replace(
            self, baselines={name: other.probability}, baseline_thresholds={name: other.threshold})

    def main_metrics(self):
        """{metric: value}, in the order of the fold table."""
        overall = self.scores_of(self.probability, self.threshold).overall
        shown = ("roc_auc", "balanced_accuracy", "macro_f1", "accuracy", "loss", "ece")
        return {name: overall[name] for name in shown}

    def rank_rows(self):
        """(rows from the smallest to the largest error, two lines of text on each row)."""
        true = self.probability[np.arange(len(self.truth)), self.truth]
        lines = [[f"true {self.names[label]}, predicted {self.names[chosen]}", f"p of the true class {p:.2f}"]
                 for label, chosen, p in zip(self.truth, self.chosen, true)]
        return np.argsort(1 - true, kind="stable"), lines

    def write(self, path):
        """The CSV, written whole."""
        spelled = np.array([*self.names, ""])  # label -1 = unknown
        columns = self.row_columns() | {"true_label": spelled[self.truth], "pred_label": spelled[self.chosen]}
        baselines = {f"{name}_prob": block for name, block in self.baselines.items()}
        blocks = _known({"prob": self.probability, "logit": self.logits, **baselines})
        for kind, block in blocks.items():
            columns |= {f"{kind}_{name}": block[:, c] for c, name in enumerate(self.names)}
        thresholds = {f"{name}_threshold": values for name, values in self.baseline_thresholds.items()}
        columns |= _known({"threshold": self.threshold, **thresholds})
        columns["positive_class"] = self.names[self.positive]
        common.write_table(path, columns)


def _known(fields):
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def join(tables, folds):
    """The rows of the tables of these folds, by their numbers, as one table."""
    joined = combine(tables, np.concatenate)
    joined.keys["fold"] = np.repeat(folds, [len(table.truth) for table in tables])
    _take_one_prior(joined.baselines)
    return joined


def _take_one_prior(baselines):
    """Set train_prior, of the baselines of pooled folds, to its mean over the rows.

    The share among a fold's train rows is high where its held-out rows have few: it
    would rank the folds in reverse.
    """
    if "train_prior" in baselines:
        prior = baselines["train_prior"]
        baselines["train_prior"] = np.where(np.isnan(prior), prior, common.mean_without_nan(prior, 0))


def mean(tables):
    """Several models' tables of the same rows as one: their means, those of the baselines too.

    Probabilities are averaged after calibration; scores get the sd over the models beside them.
    """
    if len(tables) == 1:
        return tables[0]
    averaged = ("predicted", "probability", "threshold", "baselines", "baseline_thresholds")
    found = combine(tables, lambda parts: np.mean(parts, axis=0), averaged)
    found.seen = seen_rows.worst_of_each(table.seen for table in tables)
    if isinstance(found, ScoreTable):
        found.spread = np.std([table.predicted for table in tables], axis=0, ddof=1)
    else:
        found.logits = class_scores.log_of(found.probability)
        found.uncalibrated = None
    return found


def combine(records, function, names=None):
    """Several records of one dataclass as one.

    A field of arrays becomes function(list of them), and so does each array in a dict.
    What one record lacks (None) is None; all else is that of the first, and so are
    fields that are not among `names`, if given.
    """
    fields = {}
    for name, first in vars(records[0]).items():
        if names and name not in names:
            continue
        parts = [getattr(record, name) for record in records]
        if any(part is None for part in parts):
            fields[name] = None
        elif isinstance(first, dict):
            fields[name] = {key: function([part[key] for part in parts]) for key in first}
        elif isinstance(first, np.ndarray):
            fields[name] = function(parts)
    return dataclasses.replace(records[0], **fields)


# --- a table of any program ------------------------------------------------------------------------

ID_COLUMNS = "image clip_id id filename file name".split()
FURTHER_KEYS = "sequence event n_clips video start_sec end_sec fold".split()
BOUNDS = ("sd", "low", "high")  # NAME_ of how sure the model is: baselines only where one is named
LABEL_COLUMNS = ("true_label", "label", "true", "target")
PLAIN_LABELS = ("0 1", "0.0 1.0", "no yes", "false true", "negative positive")  # the second one is the positive class


def read_predictions(path, group_column=None, baseline=None, positive_class=None):
    """Any program's predictions -> ScoreTable or ClassTable.

    Columns: NAME_true, NAME_predicted (scores); true_label or label with prob_CLASS, or with score
    (two classes). group_column: None = `group` where there is one, else names that repeat;
    baseline: column, or part of a column's name, of the baseline to hold against; None = all that
    the table has, and without shares of train rows the class shares of these rows.
    positive_class: in any case; None = what the table says, else the rarest. Raises UserError for
    what cannot be judged.
    """
    table = csv_tables.read_table(path)
    spelled = {name.lower(): name for name in table if name.lower() not in table}
    table = table.rename(columns={spelled[key]: key for key in (*FURTHER_KEYS, "seen") if key in spelled})
    if group_column:
        group_column = known_name(group_column, table, f"{path}, --group_column")
    elif "group" in table:  # so spelled: a column Group may be that of a treatment
        group_column = "group"
    keys = _keys_of(table)
    notes = []
    groups = table[group_column].to_numpy(str) if group_column else _repeated_names(keys, notes)
    shared = {"keys": keys, "groups": groups, "seen": _seen_column(table), "notes": notes}
    found = _read_kind(table, path, baseline, positive_class, shared)
    is_judged = found.is_known.any(1)
    units = np.arange(is_judged.sum()) if groups is None else groups[is_judged]
    found.alarms = splitting.unused_groups(
        table[is_judged].drop(columns=list(keys), errors="ignore"), common.rows_by_key(units),
        units if group_column else None, "stand in several rows that count as independent")
    return found


def _read_kind(table, path, baseline, positive_class, shared):
    """ScoreTable or ClassTable, whichever the columns are of; shared: fields of Rows."""
    names = _score_names(table, baseline, path)
    if names:
        return _read_scores(table, path, names, baseline, shared)
    label_column = csv_tables.find_column(table, LABEL_COLUMNS)
    if label_column and any(column.startswith("prob_") for column in table):
        found = _read_probabilities(table, path, label_column, baseline, positive_class, shared)
    elif label_column and "score" in table:
        found = _read_binary(table, path, label_column, baseline, positive_class, shared)
    else:
        raise common.UserError(
            f"{path} is no table of predictions: expected NAME_true and NAME_predicted (scores), or "
            f"true_label with prob_CLASS or score (classes); found {common.shorten_list(table, 40)}")
    if not baseline and "train_prior" not in found.baselines:
        found.baselines["shares_of_these_rows"] = baseline_models.prior_baseline(
            found.truth, len(found.truth), len(found.names))
    return found


def read_folds(run, chosen, part):
    """The tables of one part of these folds of a run."""
    return [read_predictions(run.path(f"fold_{k}/predictions_{part}.csv")) for k in chosen]


def refuse_useless(table, path):
    """UserError for a table of read_predictions that lacks predictions or groups, or with labels that do not vary."""
    import pandas as pd
    judged = table.labelled()
    if isinstance(table, ScoreTable):
        predicted = table.predicted
        truths = [f"{name}_true" for name in table.names]
    else:
        predicted = table.probability
        truths = ["the true label"]
    n_values = pd.DataFrame(judged.truth).nunique()  # without NaN
    flat = list(itertools.compress(truths, n_values < 2))
    for name, block in {"the model": predicted, **table.baselines}.items():
        rows = np.flatnonzero((table.is_known & np.isnan(block)).any(1)) + 1
        if len(rows):
            raise common.UserError(
                f"{path}: {len(rows)} of {len(block)} rows have a true value and no prediction of {name} (rows "
                f"{common.shorten_list(rows, 5)}); fill them in, or leave these rows out")
    splitting.units_of(len(judged.truth), judged.groups)  # refuses blank ones
    if flat:
        raise common.UserError(f"{path}: {common.shorten_list(flat, 5)} has no two different values, so nothing "
                               "can be said of how well it is predicted; add rows, or leave it out")


def _keys_of(table):
    """{heading: (M,) text} of the column that says which row it is, else its number; and of FURTHER_KEYS."""
    first = csv_tables.find_column(table, ID_COLUMNS) or "row"
    numbered = table.assign(row=range(1, len(table) + 1))
    return {heading: numbered[heading].to_numpy(str)
            for heading in (first, *FURTHER_KEYS) if heading in numbered}


def _repeated_names(keys, notes):
    """(M,) names of rows as their groups, where they repeat as in repeated cross-validation; else None."""
    heading, names = next(iter(keys.items()))
    names = np.array([name or f"row {row}" for row, name in enumerate(names)])  # blank ones are no group
    count = len(set(names))
    if count in (1, len(names)):
        return None
    notes.append(f"{heading} has {count} values in {len(names)} rows: rows of one value are one "
                 "group, as they are not independent (--group_column names another)")
    return names


def _seen_column(table):
    """(M,) of seen_rows.WORDS: the column `seen`; "not known" where there is none, or another word."""
    words = table.reindex(columns=["seen"])["seen"]
    return words.where(words.isin(seen_rows.WORDS), "not known").to_numpy(str)


def _score_names(table, baseline, path):
    """Names of the scores that have NAME_true and NAME_predicted. UserError for a further one without a truth.

    A_human_predicted beside A_predicted is a baseline of A, and so is the column that --baseline names.
    """
    predicted = [column.removesuffix("_predicted") for column in table if column.endswith("_predicted")]
    names = [name for name in predicted if f"{name}_true" in table]
    with_score = tuple(f"{name}_" for name in names)
    lacking = [
        f"{name}_true beside {name}_predicted" for name in predicted
        if name not in names and not name.startswith(with_score) and f"{name}_predicted" != baseline]
    if names and lacking:
        raise common.UserError(
            f"{path}: no column {common.shorten_list(lacking, 5)}; name its truth so, or leave it out")
    return names


def _block(table, columns, path):
    """(M, len(columns)) numbers; None where the table lacks one."""
    if not set(columns) <= set(table):
        return None
    return np.column_stack([csv_tables.to_numbers(table[column], f"{path}, column {column}") for column in columns])


def _probabilities(table, prefix, names, path):
    """(M, C) numbers from 0 to 1 of columns PREFIX+NAME, which add up to 1 as far as two decimals allow."""
    columns = [prefix + name for name in names]
    block = _block(table, columns, path)
    rounding = 0.005 * len(names) + 1e-6
    is_bad = (block < -1e-6).any(1) | (np.abs(block.sum(1) - 1) > rounding)  # refuse_useless judges blank cells
    if is_bad.any():
        row = is_bad.argmax()
        raise common.UserError(
            f"{path}, row {row + 1}: expected probabilities from 0 to 1 with sum 1 in {columns[0]} and its like, found "
            f"{block[row].tolist()} ({is_bad.sum()} such rows); divide percentages by 100, or turn "
            "logits into probabilities (softmax) first")
    return block


def _read_scores(table, path, names, baseline, shared):
    """ScoreTable of the columns NAME_true, NAME_predicted and NAME_BASELINE; shared: fields of Rows."""
    first = f"{names[0]}_"
    kinds = [column.removeprefix(first) for column in table if column.startswith(first)]
    # texts beside the scores, such as a remark, are no predictions of them
    kinds = [kind for kind in kinds if kind in ("true", "predicted", *metric_names.BASELINES)
             or csv_tables.looks_numeric(table[first + kind])]
    # without those of a score whose name begins with this one
    blocks = _known({kind: _block(table, [f"{name}_{kind}" for name in names], path) for kind in kinds})
    found = ScoreTable(
        names=names,
        truth=blocks.pop("true"),
        predicted=blocks.pop("predicted"),
        baselines=blocks,
        **shared)
    found.baselines = _score_baselines(found, table, baseline, path)
    return found


def _score_baselines(found, table, baseline, path):
    """{name: (M, R)} of a ScoreTable, which still holds every further column of its scores as a baseline.

    baseline: as in read_predictions.
    """
    if baseline in table and len(found.names) == 1:
        return {baseline: _block(table, [baseline], path)}
    blocks = found.baselines
    if baseline:
        name = known_name(baseline, blocks, path)
        return {name: blocks[name]}
    blocks = {kind: block for kind, block in blocks.items() if kind not in BOUNDS}
    if "train_mean" in blocks:
        return blocks
    # another program's: a count or an error beside the scores is no prediction of them
    likely = {kind: block for kind, block in blocks.items()
              if kind in metric_names.BASELINES or found.quality(block) > 0}
    return likely | {"mean_of_these_rows": baseline_models.train_mean_baseline(found.truth, len(found.truth))}


def _read_probabilities(table, path, label_column, baseline, positive_class, shared):
    """ClassTable of the columns prob_CLASS and BASELINE_prob_CLASS; shared: fields of Rows."""
    import pandas as pd
    names = [column.removeprefix("prob_") for column in table if column.startswith("prob_")]
    csv_tables.refuse_blank_names(names, path)
    unknown = sorted(set(table[label_column]) - {*names, ""})
    if unknown:
        raise common.UserError(f"{path}: {label_column} {common.shorten_list(unknown)} has no column prob_CLASS")
    first = f"_prob_{names[0]}"
    kinds = [column.removesuffix(first) for column in table if column.endswith(first)]
    kinds = [kind for kind in kinds if all(f"{kind}_prob_{name}" in table for name in names)]
    if baseline:
        kinds = [known_name(baseline, kinds, path)]
    blocks = {kind: _probabilities(table, f"{kind}_prob_", names, path) for kind in kinds}
    if "fold" in table:
        _take_one_prior(blocks)
    stated = _stated_class(table, names, path)
    label = pd.Index(names).get_indexer(table[label_column])
    found = ClassTable(
        names=names,
        truth=label,
        positive=choose_positive(positive_class or stated, names, label),
        probability=_probabilities(table, "prob_", names, path),
        baselines=blocks,
        threshold=_threshold(table, "threshold", label_column, path),
        baseline_thresholds=_known(
            {kind: _threshold(table, f"{kind}_threshold", label_column, path) for kind in kinds}),
        logits=_block(table, [f"logit_{name}" for name in names], path),
        **shared)
    if stated not in (None, names[found.positive]):  # the thresholds are of another class
        found.threshold = None
        found.baseline_thresholds = {}
    return found


def _stated_class(table, names, path):
    """The class that the column positive_class names, None without one.

    Raises UserError for several.
    """
    said = sorted(set(table.get("positive_class", [])) - {""})
    found = csv_tables.pick_columns(said, names, f"{path}: found no")
    if len(found) > 1:
        raise common.UserError(f"{path}: positive_class names {common.shorten_list(found)}; expected one class")
    return found[0] if found else None


def _threshold(table, column, label_column, path):
    """(M,) numbers of a column, None without it.

    Raises UserError for blank cells beside a label.
    """
    if column not in table:
        return None
    csv_tables.refuse_blank(table[table[label_column] != ""], path, column)
    return csv_tables.to_numbers(table[column], f"{path}, column {column}")


def _read_binary(table, path, label_column, baseline, positive_class, shared):
    """ClassTable of two classes and the column `score` of the positive one; shared: fields of Rows."""
    import pandas as pd
    names = sorted(set(table[label_column]) - {""}, key=str.casefold)
    if len(names) != 2:
        raise common.UserError(
            f"{path}: a score needs two classes in {label_column}, found "
            f"{common.shorten_list(names)}; for more write a column prob_CLASS for each")
    if not positive_class and " ".join(names).casefold() not in PLAIN_LABELS:
        raise common.UserError(f"{path}: the score may speak for either class; name the one that is likely where it is "
                               f"high with --positive_class ({', '.join(names)})")
    positive_class = known_name(positive_class or names[1], names, path)
    if positive_class == names[0]:
        names.reverse()
    probability, score = _from_score(table, "score", path, shared["notes"])
    baselines = {}
    if baseline:
        name = known_name(baseline, table, path)
        baselines[name], _ = _from_score(table, name, path, shared["notes"])
    return ClassTable(
        names=names,
        truth=pd.Index(names).get_indexer(table[label_column]),
        positive=1,
        probability=probability,
        score=score,
        baselines=baselines,
        **shared)


def _from_score(table, column, path, notes):
    """(M, 2) probabilities of a column and None; where it is not from 0 to 1 its ranks and the (M, 2) scores."""
    import pandas as pd
    score = _block(table, [column], path)  # (M, 1)
    if not ((score < 0) | (score > 1)).any():  # blank cells are for refuse_useless
        return np.hstack([1 - score, score]), None
    rank = pd.DataFrame(score).rank(method="dense", pct=True).to_numpy()
    notes.append(f"{column} is no probability, so its rank stands for it: AUC and average precision are those of the "
                 "score; calibration, loss and what a threshold decides (accuracy, precision, "
                 "recall, F1) mean nothing. Of log odds write the logistic, 1 / (1 + exp(-x))")
    return np.hstack([1 - rank, rank]), np.hstack([-score, score])


def choose_positive(wanted, names, label):
    """Index of the class that matters: the one of this name, in any case, else the rarest of the labels (N,)."""
    if wanted:
        return names.index(known_name(wanted, names, "--positive_class"))
    counts = np.bincount(label[label >= 0], minlength=len(names))
    return np.argmin(np.where(counts, counts, len(label) + 1))  # of those that have rows


def known_name(name, known, source):
    """The known name that is spelled so, in any case. Raises UserError with the closest one."""
    return csv_tables.pick_columns([name], known, f"{source}: found no")[0]
