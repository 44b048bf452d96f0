"""The predictions table, where a script ends and its judging begins.

Letters: N rows, R scores.
"""
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

    def columns(kind):
        return np.stack([csv_tables.to_numbers(table[f"{n}_{kind}"], f"{path}, column {n}_{kind}") for n in names], axis=1)
    return list(table[key]), {kind: columns(kind) for kind in kinds}
