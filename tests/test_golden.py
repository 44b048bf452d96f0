"""Golden numbers: fixed predictions tables, judged as at the close of a run, give the metrics that are kept.

    python -m pytest tests/test_golden.py
    python tests/test_golden.py            # write tests/golden/*.json anew, after a change that is meant to change them

What a rebuild must not change without saying so: each metric, interval, baseline, calibration, alarm and verdict.
The tables are small enough to read; no network is trained, so the numbers are the same on every processor.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent / "golden"
TABLES = {"scores": "r2>0.2,mae_Pain<0.5", "classes": "auc>0.6,tail_recall>0.2,ece<0.25", "three_classes": "accuracy>0.9"}


def judged(name, folder):
    """metrics.json of the golden table of this name."""
    from conftest import only_run, run_here
    run_here("judge_predictions.py", "--predictions", FOLDER / f"{name}.csv", "--criteria", TABLES[name], "--output_dir",
             folder)
    return json.loads((only_run(folder) / "metrics.json").read_text())


def differences(found, kept, place=""):
    """Places where two nests of dicts, lists and numbers differ: numbers by more than 1e-9 of their size."""
    if isinstance(kept, dict) and isinstance(found, dict):
        names = kept.keys() | found.keys()
        return [line for name in sorted(names)
                for line in differences(found.get(name, "missing"), kept.get(name, "missing"), f"{place}/{name}")]
    if isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        return [line for k, pair in enumerate(zip(found, kept)) for line in differences(*pair, f"{place}[{k}]")]
    is_number = all(isinstance(value, (int, float)) for value in (found, kept))
    if found == kept or (is_number and math.isclose(found, kept, rel_tol=1e-9, abs_tol=1e-12)):
        return []
    return [f"{place}: {found!r}, golden {kept!r}"]


@pytest.mark.parametrize("name", TABLES)
def test_golden_numbers(name, tmp_path):
    found = judged(name, tmp_path)
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    lines = differences(found, kept)
    assert not lines, "\n".join(lines[:20])


def test_a_changed_number_is_seen():
    kept = json.loads((FOLDER / "scores.json").read_text())
    changed = json.loads((FOLDER / "scores.json").read_text())
    changed["model"]["r2"]["low"] += 1e-6
    assert len(differences(changed, kept)) == 1 and not differences(kept, kept)


def make_tables():
    """The golden tables, by a seed: 12 subjects, missing cells, baselines of several qualities, a threshold."""
    import common
    from evidence import class_scores
    draw = np.random.default_rng(14)
    rows = []
    for i in range(48):
        true = draw.normal(size=2)
        values = {"Pain": true[0], "Joy": true[1]}
        row = {"image": f"face_{i:02d}.jpg", "group": f"s{i % 12:02d}"}
        for k, (target, value) in enumerate(values.items()):
            row |= {f"{target}_true": None if (i + k) % 11 == 0 else round(value, 4),
                    f"{target}_predicted": round(0.8 * value + 0.4 * draw.normal(), 4),
                    f"{target}_train_mean": 0.01, f"{target}_ridge": round(0.5 * value + 0.6 * draw.normal(), 4)}
        rows.append(row)
    common.write_table(FOLDER / "scores.csv", rows)
    for name, classes, groups in (("classes", ("ear", "tail"), 24), ("three_classes", ("baseline", "ear", "tail"), 8)):
        rows = []
        for i in range(72):
            label = int(draw.integers(len(classes))) if i % 3 else 0
            row = {"clip_id": f"c{i:02d}", "group": f"g{i % groups:02d}", "true_label": classes[label]}
            for kind, strength in (("prob", 1.5), ("train_prior_prob", 0.0), ("logistic_prob", 0.7)):
                noise = draw.normal(size=len(classes)) if strength else np.zeros(len(classes))
                probability = class_scores.softmax(strength * (np.arange(len(classes)) == label) + noise)
                row |= {f"{kind}_{each}": round(float(p), 4) for each, p in zip(classes, probability)}
            rows.append(row | ({"threshold": 0.45} if len(classes) == 2 else {}))
        common.write_table(FOLDER / f"{name}.csv", rows)


if __name__ == "__main__":
    import tempfile
    sys.path.insert(0, str(FOLDER.parent))
    import conftest  # noqa: F401  puts the repository on the path
    make_tables()
    for each in TABLES:
        with tempfile.TemporaryDirectory() as scratch:
            text = json.dumps(judged(each, scratch), indent=1) + "\n"
        (FOLDER / f"{each}.json").write_text(text, encoding="utf-8")
