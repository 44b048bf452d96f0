"""The predictions table, where a script ends and its judging begins.

Letters: N rows, R scores.
"""
import dataclasses

import numpy as np

import common
from readers import csv_tables


def write_target_table(path, keys, names, values):
    """CSV of predictions: columns `keys` {heading: N texts}, then NAME_KIND of each target; values {kind: (N, R)}."""
    columns = keys | {f"{name}_{kind}": each[:, r] for r, name in enumerate(names) for kind, each in values.items()}
    common.write_table(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def read_target_table(path, key, names):
    """A CSV of write_target_table -> (N texts of column `key`, {kind: (N, R)}); the first target tells the kinds."""
    table, first = csv_tables.read_table(path), f"{names[0]}_"
    kinds = [column.removeprefix(first) for column in table if column.startswith(first)]
    kinds = [kind for kind in kinds if all(f"{name}_{kind}" in table for name in names)]  # not of a longer name

    def columns(kind):
        return np.stack([csv_tables.to_numbers(table[f"{n}_{kind}"], f"{path}, column {n}_{kind}") for n in names], axis=1)
    return list(table[key]), {kind: columns(kind) for kind in kinds}


@dataclasses.dataclass
class ClassPredictions:
    """A predictions CSV of --task classify."""
    names: list  # C
    clip_ids: list  # M
    label: np.ndarray  # (M,) -1 = unknown
    chosen: np.ndarray  # (M,) pred_label
    probability: np.ndarray  # (M, C)
    logits: np.ndarray  # (M, C)
    baselines: dict  # name -> (M, C)
    groups: np.ndarray | None  # (M,)
    threshold: np.ndarray | None  # (M,) of the positive class; None = the most probable class is chosen


def read_probabilities(path):
    """predictions CSV -> ClassPredictions. Raises UserError for missing columns and labels that are no class."""
    table = csv_tables.read_table(path)
    names = [column.removeprefix("prob_") for column in table if column.startswith("prob_")]
    if not names or "true_label" not in table:
        raise common.UserError(f"--predictions {path}: expected columns true_label and prob_CLASS, found "
                               f"{common.shorten_list(table.columns, 40)}")
    unknown = sorted(set(table["true_label"]) - {*names, ""})
    if unknown:
        raise common.UserError(f"--predictions {path}: true_label {common.shorten_list(unknown)} has no column prob_")

    def block(kind):
        columns = [f"{kind}_{name}" for name in names]
        return np.stack([csv_tables.to_numbers(table[c], f"{path}, column {c}") for c in columns], 1)
    index = {**{name: c for c, name in enumerate(names)}, "": -1}
    own = {f"{kind}_{name}" for kind in ("prob", "logit") for name in names}
    ending = f"_{names[0]}"
    kinds = [column.removesuffix(ending) for column in table if column.endswith(f"_prob{ending}") and column not in own]
    kinds = [kind for kind in kinds if all(f"{kind}_{name}" in table for name in names)]  # not of a longer name
    probability = block("prob")
    label, chosen = (np.array([index.get(name, -1) for name in table[column]]) if column in table
                     else probability.argmax(1) for column in ("true_label", "pred_label"))
    logits = block("logit") if f"logit_{names[0]}" in table else np.log(np.maximum(probability, 1e-12))
    return ClassPredictions(names, list(table["clip_id"]), label, chosen, probability, logits,
                            {kind.removesuffix("_prob"): block(kind) for kind in kinds},
                            table["group"].to_numpy(str) if "group" in table else None,
                            csv_tables.to_numbers(table["threshold"], f"{path}, column threshold")
                            if "threshold" in table else None)
