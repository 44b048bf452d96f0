"""Splits and folds (whole groups, mixed strata, the same rows in any order) and the leakage report on them.

    python -m pytest tests/test_splits_leakage.py
"""
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import scipy.spatial
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, StratifiedKFold

import common
from evidence import judging, prediction_tables, reporting, splitting
from readers import file_names, picture_files

OMI = Path(__file__).resolve().parents[2] / "shared" / "data" / "ratings" / "omi"
RATIOS = {"train": 0.7, "val": 0.15, "test": 0.15}


def fails(function, *args, **kwargs):
    """The one-line message of the UserError that the call must raise."""
    with pytest.raises(common.UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


def as_parts(split, n_rows):
    """{name: rows} -> (N,) name, checking that each row is in exactly one part."""
    parts = np.full(n_rows, "", dtype=object)
    for name, rows in split.items():
        assert np.array_equal(rows, np.unique(rows)) and (parts[rows] == "").all(), f"{name}: unsorted or used twice"
        parts[rows] = name
    return parts


# make_split

def test_sizes_and_strata_of_a_row_split():
    score = np.random.default_rng(0).normal(size=800)
    split = splitting.make_split(range(800), RATIOS, strata=score, seed=1)
    assert (as_parts(split, 800) != "").all()
    assert [len(split[name]) for name in RATIOS] == [560, 120, 120]
    tenth = np.digitize(score, np.quantile(score, np.linspace(0, 1, 11)[1:-1]))
    for name, share in RATIOS.items():
        assert np.abs(np.bincount(tenth[split[name]], minlength=10) - 80 * share).max() <= 1


def test_random_rows_within_strata():
    """Over many seeds each row is in val as often as any other: 0.2 with the error of 400 draws."""
    score = np.random.default_rng(0).normal(size=50)
    in_val = np.zeros(50)
    for seed in range(400):
        in_val[splitting.make_split(range(50), {"train": 0.8, "val": 0.2}, strata=score, seed=seed)["val"]] += 1
    assert np.abs(in_val / 400 - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / 400)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_groups_are_never_cut_and_order_does_not_matter(data, seed):
    group = np.array(data.draw(st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=12, max_size=60)))
    n_rows, rng = len(group), np.random.default_rng(seed)
    score, keys = rng.normal(size=n_rows), np.array([f"{i}.jpg" for i in range(n_rows)])
    if len(set(group)) < 3:
        return
    use_groups = data.draw(st.booleans())
    arguments = {"keys": keys, "strata": score, "groups": group if use_groups else None}
    parts = as_parts(splitting.make_split(ratios=RATIOS, seed=seed, **arguments), n_rows)
    assert set(parts) == set(RATIOS)
    if use_groups:
        assert all(len(set(parts[group == name])) == 1 for name in group)
    order = rng.permutation(n_rows)
    turned = {name: None if values is None else values[order] for name, values in arguments.items()}
    again = as_parts(splitting.make_split(ratios=RATIOS, seed=seed, **turned), n_rows)
    assert (again == parts[order]).all()


def test_groups_are_stratified_as_far_as_they_allow():
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(60), rng.integers(5, 25, 60))
    label = (rng.random(60) < 0.3)[group].astype(int)
    split = splitting.make_split(range(len(group)), RATIOS, strata=label, groups=group, seed=0)
    for name, share in RATIOS.items():
        assert abs(len(split[name]) / len(group) - share) < 0.02
        assert abs(label[split[name]].mean() - label.mean()) < 0.03


@pytest.mark.parametrize("ratios, n_rows, groups, words", [
    ({"train": 0.999, "val": 0.001}, 100, None, ["empty split", "100 rows"]),
    (RATIOS, 2, None, ["empty split", "2 rows"]),
    (RATIOS, 100, ["a", "b"] * 50, ["empty split", "2 groups"]),
    (RATIOS, 4, ["a", "", "c", ""], ["2 blank"])])
def test_impossible_splits(ratios, n_rows, groups, words):
    message = fails(splitting.make_split, range(n_rows), ratios, groups=groups)
    assert all(word in message for word in words), message


def test_a_ratio_of_zero_is_an_empty_part():
    split = splitting.make_split(range(10), {"train": 0.8, "val": 0.2, "test": 0.0})
    assert [len(split[name]) for name in ("train", "val", "test")] == [8, 2, 0] and split["test"].dtype.kind == "i"


# make_folds

def fold_numbers(n_rows, k, **options):
    """(N,) fold of each row, which is in exactly one."""
    return as_parts(dict(enumerate(splitting.make_folds(range(n_rows), k, **options))), n_rows).astype(int)


def test_folds_without_groups_against_sklearn():
    label = np.repeat([0, 1, 2], [61, 23, 9])
    fold = fold_numbers(93, 5, strata=label, seed=7)
    judge = np.empty(93, int)
    for k, (_, rows) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(label, label)):
        judge[rows] = k
    for value in (0, 1, 2):
        mine = np.bincount(fold[label == value], minlength=5)
        assert sorted(mine) == sorted(np.bincount(judge[label == value], minlength=5))
    assert np.ptp(np.bincount(fold)) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_group_folds_are_balanced_like_sklearn(seed):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(30), rng.integers(1, 30, 30)))
    fold = fold_numbers(len(group), 5, groups=group, seed=seed)
    assert all(len(set(fold[group == name])) == 1 for name in range(30)) and set(fold) == set(range(5))
    judge = [len(rows) for _, rows in GroupKFold(5).split(group, groups=group)]
    assert np.ptp(np.bincount(fold)) <= np.ptp(judge) + 2


def test_folds_repeat_and_differ_by_seed():
    folds = [fold_numbers(200, 4, seed=seed) for seed in (1, 1, 2)]
    assert (folds[0] == folds[1]).all() and (folds[0] != folds[2]).any()


@pytest.mark.parametrize("sizes", [[10] * 12, [40, *[2] * 40], list(range(1, 13))])
def test_group_folds_differ_by_seed_where_other_deals_are_as_good(sizes):
    """Equal sizes, one large group among equal small ones, and sizes that many deals balance."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    folds = [fold_numbers(len(group), 3, groups=group, seed=seed) for seed in range(8)]
    # the same partition under other fold numbers is no other partition
    partitions = {frozenset(frozenset(np.flatnonzero(fold == k)) for k in range(3)) for fold in folds}
    assert len(partitions) >= 7
    assert (folds[3] == fold_numbers(len(group), 3, groups=group, seed=3)).all()


def test_one_class_in_one_group_only():
    group = np.repeat(np.arange(6), 10)
    fold = fold_numbers(60, 3, strata=(group == 0).astype(int), groups=group)
    assert np.bincount(fold).tolist() == [20, 20, 20]


def test_too_few_units_for_the_folds():
    message = fails(splitting.make_folds, range(40), 5, groups=["a", "b", "c", "d"] * 10)
    assert "--folds 5" in message and "4 groups" in message
    assert "3 rows" in fails(splitting.make_folds, range(3), 5)
    assert "2 or more" in fails(splitting.make_folds, range(30), 1)


def test_strata_with_missing_values():
    score = np.where(np.arange(100) % 4 == 0, np.nan, np.arange(100.0))
    fold = fold_numbers(100, 5, strata=score)
    assert np.bincount(fold[np.isnan(score)]).tolist() == [5] * 5
    assert len(fold_numbers(20, 4, strata=np.full(20, np.nan))) == 20


# split files

def test_split_file_round_trip(tmp_path):
    keys = [f"grün/{i}.jpg" for i in range(30)]
    split = splitting.make_split(keys, RATIOS)
    splitting.record_split(Recorded(tmp_path), split, keys, {"between": {}, "within": {}})
    order = np.random.default_rng(0).permutation(30)
    again = splitting.read_split_file(tmp_path / "splits.json", [keys[row] for row in order])
    assert {name: sorted(order[rows]) for name, rows in again.items()} == {n: list(r) for n, r in split.items()}


@pytest.mark.parametrize("content, words", [
    ({"train": ["a", "b"], "val": ["c", "a"]}, ["a (listed 2 times)"]),
    ({"train": ["a", "x"], "val": ["y"]}, ["x (", "y (", "not in the table"]),
    ({"train": ["a"], "val": ["b"], "tests": ["c"]}, ["tests", "did you mean test"]),
    ({"train": ["a"], "val": ["b"], "test": "c"}, ["no list in test"]), ({"val": ["a"]}, ["no train part"]),
    ({"train": ["a"]}, ["no val part"]), ({"train": []}, ["train"]), (["a"], ["list"]), ("no json", ["JSON"])])
def test_faulty_split_files(tmp_path, content, words):
    path = tmp_path / "s.json"
    path.write_text(content if content == "no json" else json.dumps(content))
    message = fails(splitting.read_split_file, path, ["a", "b", "c"])
    assert "--split_file" in message and all(word in message for word in words), message
    assert "--split_file" in fails(splitting.read_split_file, tmp_path / "none.json", ["a"])


class Recorded:
    """As much of a run folder as record_split needs."""
    args = SimpleNamespace(allow_leakage=False)

    def __init__(self, folder):
        self.folder = folder
        self.said = []
        self.say = self.said.append

    def path(self, name):
        return self.folder / name


def test_rows_in_no_part_are_counted(tmp_path):
    report = {"between": {}, "within": {}}
    run = Recorded(tmp_path)
    splitting.record_split(run, {"train": np.arange(6), "val": np.arange(7, 9)}, list("abcdefghij"), report)
    assert "note: 2 of 10 rows are in no part of the split" in run.said
    run = Recorded(tmp_path)
    splitting.record_split(run, {"train": np.arange(6), "val": np.arange(6, 10)}, list("abcdefghij"), report)
    assert not any("no part" in text for text in run.said)


def test_a_run_that_was_killed_between_two_files_of_its_split(tmp_path):
    """splits.json stands, leakage_report.json does not: the resumed run writes it; whole files are kept."""
    split = {"train": np.arange(6), "val": np.arange(6, 10)}
    common.write_json(tmp_path / "splits.json", {"train": list("abcdef"), "val": list("ghij")})
    run = Recorded(tmp_path)
    splitting.record_split(run, split, list("abcdefghij"), {"between": {}, "within": {}})
    assert json.loads((tmp_path / "leakage_report.json").read_text()) == {"between": {}, "within": {}}
    common.write_json(tmp_path / "leakage_report.json", {"between": {"train-val": {}}, "within": {}})
    splitting.record_split(run, split, list("abcdefghij"), {"between": {}, "within": {}})
    assert "train-val" in (tmp_path / "leakage_report.json").read_text()
    (tmp_path / "splits.json").write_text('{"train": [')
    splitting.record_split(run, split, list("abcdefghij"), {"between": {}, "within": {}})
    assert json.loads((tmp_path / "splits.json").read_text())["val"] == list("ghij")


@pytest.mark.parametrize("rows", [10, 11, 17])
def test_blocks_of_time_lose_no_row_but_the_gaps(rows):
    for gap in (0, 1):
        split = splitting.split_by_time(
            np.full(rows, "a"), np.arange(rows), {"train": 0.33, "val": 0.33, "test": 0.34}, gap)
        parts = as_parts(split, rows)
        assert (parts == "").sum() == 2 * gap and parts[-1] == "test"


def test_blocks_of_time_are_cut_in_each_sequence_by_its_order():
    sequences = np.array(list("ab") * 8 + ["a"] * 4)  # 12 rows of a, 8 of b, the last ones first
    order = np.arange(20)[::-1]

    def places(rows):
        """Which rows these are in the order of their own sequence."""
        own = {name: rows[sequences[rows] == name] for name in "ab"}
        return {name: sorted(np.searchsorted(np.sort(order[sequences == name]), order[each]).tolist())
                for name, each in own.items()}
    split = splitting.split_by_time(sequences, order, {"train": 0.5, "val": 0.25, "test": 0.25}, 1)
    assert {part: places(rows) for part, rows in split.items()} == {
        "train": {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2]}, "val": {"a": [6, 7], "b": [4, 5]},
        "test": {"a": [9, 10, 11], "b": [7]}}
    folds = splitting.folds_by_time(sequences, order, 3, 1)
    assert [places(fold["val"]) for fold in folds] == [
        {"a": [0, 1, 2, 3], "b": [0, 1]}, {"a": [4, 5, 6, 7], "b": [2, 3, 4]}, {"a": [8, 9, 10, 11], "b": [5, 6, 7]}]
    assert [places(fold["train"]) for fold in folds] == [
        {"a": [5, 6, 7, 8, 9, 10, 11], "b": [3, 4, 5, 6, 7]}, {"a": [0, 1, 2, 9, 10, 11], "b": [0, 6, 7]},
        {"a": [0, 1, 2, 3, 4, 5, 6], "b": [0, 1, 2, 3]}]
    assert not any(len(fold["test"]) for fold in folds)
    assert "--gap 3" in fails(splitting.folds_by_time, np.full(4, "a"), np.arange(4), 2, 3)


def test_effective_size():
    rows = {"keys": {}, "names": ["a", "b"], "baselines": {}}
    target = np.array([[1, np.nan], [1, np.nan], [1, 2], [2, 2]])
    scores = prediction_tables.ScoreTable(**rows, truth=target, predicted=target, groups=np.array(["p", "p", "q", "q"]))
    assert scores.sample == {"rows": 4, "distinct_label_vectors": 3, "subjects": 2, "positives": None}
    sample = prediction_tables.ClassTable(**rows, truth=np.array([0, 1, 1, -1]), probability=np.zeros((4, 2)), positive=1).sample
    assert sample["distinct_label_vectors"] == 3
    assert sample["positives"] == 2 and ", 2 of the positive class, no groups" in judging.sample_sentence(sample)


# leakage

def scene(seed, size=160):
    """A random smooth picture (size, size, 3) uint8: blurred noise, so that its low frequencies are its own."""
    noise = np.random.default_rng(seed).normal(size=(size, size, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 6)
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def saved_again(image, size, quality):
    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def bits_apart(a, b):
    """Hamming distance counted bit by bit, as a judge of the vectorised one."""
    return sum(int(x ^ y).bit_count() for x, y in zip(a.tolist(), b.tolist()))


def test_hash_is_the_sign_of_scipy_dct():
    from scipy.fft import dctn
    image = scene(0, 64)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
    low = dctn(gray, norm="ortho")[1:17, 1:17].ravel()
    bits = np.unpackbits(picture_files.perceptual_hash(image).view(np.uint8))
    clear = np.abs(low - np.median(low)) > 0.1
    assert clear.sum() > 200 and (bits[clear] == (low > np.median(low))[clear]).all()


def test_copies_are_near_and_others_far():
    images = [scene(seed) for seed in range(20)]
    hashes = [picture_files.perceptual_hash(image) for image in images]
    assert hashes[0].shape == (4,) and hashes[0].dtype == np.uint64
    for image, original in zip(images, hashes):
        copies = [saved_again(image, 128, 70), saved_again(image, 300, 50), cv2.convertScaleAbs(image, alpha=0.8)]
        apart = [bits_apart(picture_files.perceptual_hash(copy), original) for copy in copies]
    assert max(apart) <= splitting.NEAR_DUPLICATE_BITS
    others = [bits_apart(a, b) for a, b in itertools.combinations(hashes, 2)]
    assert min(others) > splitting.NEAR_DUPLICATE_BITS


def test_a_mirrored_copy_is_near_and_others_are_not():
    images = [scene(seed) for seed in range(20)]
    mirrored = [saved_again(np.ascontiguousarray(image[:, ::-1]), 128, 70) for image in images]
    phash = [picture_files.perceptual_hash(image) for image in images + mirrored]
    names = [f"{i:02d}" for i in range(40)]
    report = splitting.leakage_report({"train": np.arange(20), "val": np.arange(20, 40)}, names, names, phash, {})
    assert report["between"]["train-val"]["near_duplicates"]["count"] == 20
    assert report["within"]["train"]["near_duplicates"]["count"] == 0


def test_similar_pairs_are_the_planted_ones_whatever_the_part_and_unit():
    """90 random directions, four of them nearly repeated in a later part; one repeated within its part is no pair."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(90, 64))
    for copy, row in ((60, 3), (75, 9), (89, 61), (20, 4)):
        features[copy] = 3 * features[row] + 0.2 * rng.normal(size=64)
    split = {"train": np.arange(60), "val": np.arange(60, 75), "test": np.arange(75, 90)}
    for scale, shift in ((1, 0), (100, 7)):
        found = splitting.similar_pairs(scale * features + shift, split)
        assert set(found) == {(3, 60), (9, 75), (61, 89)}


def test_similar_pairs_are_those_of_the_rule_counted_row_by_row():
    """A scene of 140, and copies from perfect to none, among rows of no part, which have no features."""
    rng = np.random.default_rng(7)
    known = np.flatnonzero(np.arange(900) % 9 > 1)  # 700
    features = np.full((900, 12), np.nan)
    features[known] = rng.normal(3, 1, (700, 12))
    features[known[200:340]] = features[known[200]] + 0.1 * rng.normal(size=(140, 12))
    features[known[-80:]] = features[known[:80]] + np.linspace(0, 1, 80)[:, None] * rng.normal(size=(80, 12))
    shares = np.split(rng.permutation(known), [400, 600])
    split = dict(zip(("train", "val", "test"), shares))
    part_of = {row: part for part, rows in enumerate(shares) for row in rows}
    rows = list(part_of)
    centred = features[rows] - features[rows].mean(0)
    nearest, near, growth = [], [], []
    for row, distances in zip(rows, scipy.spatial.distance.cdist(centred, centred, "cosine")):
        d = np.sort(distances[distances > 1e-6])  # neither itself nor a perfect copy
        d1, other = min((distance, other) for distance, other in zip(distances, rows) if part_of[other] != part_of[row])
        nearest.append(other)
        near.append([d1 / d[k - 1] for k in (10, 20, 40, 80, 160)])
        growth.append([d[k - 1] / d[2 * k - 1] for k in (10, 20, 40, 80, 160)])
    dimension = np.log(0.5) / np.log(np.median(growth, axis=0))  # (dk / d2k) ** m has the median 1/2
    limit = (0.01 / np.array([9, 19, 39, 79, 159])) ** (1 / dimension)  # of d1 / dk
    share = (near / limit).min(1)
    expected = [tuple(sorted((rows[k], nearest[k]), key=part_of.get)) for k in share.argsort(kind="stable") if share[k] < 1]
    found = splitting.similar_pairs(features, split)
    assert len(found) > 100 and found == list(dict.fromkeys(expected))


def test_a_page_of_too_few_rows_does_not_say_that_similar_pictures_were_looked_for(tmp_path):
    """29 rows tell no usual distance; "share none of: ..., similar pictures" was said of parts not compared."""
    features = np.random.default_rng(0).normal(size=(30, 8))
    keys = np.array([f"{i}.jpg" for i in range(30)])
    run = SimpleNamespace(path=lambda name: tmp_path / name, say=print,
                          compute=SimpleNamespace(processes=common.Processes()))
    for n_rows, is_looked_for in ((29, False), (30, True)):
        split = {"train": np.arange(10), "val": np.arange(10, n_rows)}
        common.write_json(tmp_path / "leakage_report.json", splitting.leakage_report(split, keys, keys, None, {}))
        assert splitting.add_similar(run, features, split, keys) == []
        assert ("similar pictures" in "".join(reporting.leakage_blocks(run))) == is_looked_for


@pytest.mark.parametrize("n_copies", [4, 12, 30])
def test_copies_are_found_where_most_rows_have_some(n_copies):
    """40 scenes of as many copies, dealt out at random: every row has copies, so they are what is usual.

    From 11 on none was named: the tenth nearest row, beside which the nearest was judged, was a copy too.
    """
    rng = np.random.default_rng(1)
    scene = np.repeat(np.arange(40), n_copies)
    features = rng.normal(size=(40, 64))[scene] + 0.2 * rng.normal(size=(len(scene), 64))
    rows = rng.permutation(len(scene))
    split = {"fold_0": rows[::2], "fold_1": rows[1::2]}
    pairs = splitting.similar_pairs(features, split)
    assert all(scene[i] == scene[j] and i in split["fold_0"] and j in split["fold_1"] for i, j in pairs)
    both = np.intersect1d(scene[split["fold_0"]], scene[split["fold_1"]])
    assert set(np.ravel(pairs)) == set(np.flatnonzero(np.isin(scene, both))) and len(set(pairs)) == len(pairs)
    assert splitting.similar_pairs(rng.normal(size=(len(scene), 64)), split) == [], "no two of them are near"


@pytest.mark.parametrize("n_black", [45, 55])
def test_black_pictures_are_like_each_other_and_no_other_row(n_black):
    """Of 55 black ones of 100 none was named, and all the others were: the usual tenth row lay as near as the twentieth."""
    features = np.random.default_rng(3).normal(size=(100, 64)).astype(np.float32)
    features[:n_black] = features[0]
    pairs = splitting.similar_pairs(features, {"train": np.arange(0, 100, 2), "val": np.arange(1, 100, 2)})
    assert set(np.ravel(pairs)) == set(range(n_black))


@pytest.mark.parametrize("dimension", [3, 6])
def test_rows_without_a_copy_are_rarely_similar_whatever_the_dimension_of_the_features(dimension):
    """1 row in 100 has a neighbour as near as the limit, and that neighbour may not be one of them."""
    n_similar = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(1000, dimension)) @ rng.normal(size=(dimension, 64))
        pairs = splitting.similar_pairs(features, {f"fold_{row}": [row] for row in range(1000)})
        n_similar += len(set(np.ravel(pairs)))
    assert 0.006 < n_similar / 6000 < 0.016


def test_similar_pictures_are_counted_and_shown_and_do_not_stop(tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 64))
    features[[30, 31, 35]] = features[[2, 5, 4]] + 0.1
    keys = np.array([f"{i}.jpg" for i in range(40)])
    split = {"train": np.arange(30), "val": np.arange(30, 35), "test": np.arange(35, 40)}
    said = []
    run = SimpleNamespace(path=lambda name: tmp_path / name, say=said.append,
                          compute=SimpleNamespace(processes=common.Processes()))
    common.write_json(tmp_path / "leakage_report.json", splitting.leakage_report(split, keys, keys, None, {}))
    pairs = splitting.add_similar(run, features, split, keys)
    assert sorted(pairs) == [(2, 30), (4, 35), (5, 31)]
    assert said == ["leakage train-val: 2 similar pictures (2.jpg = 30.jpg)", "leakage train-test: 1 similar picture (35.jpg = 4.jpg)"]
    splitting.check_leakage(common.read_json(tmp_path / "leakage_report.json"))
    block, *_ = reporting.leakage_blocks(run)
    assert "note caution" in block and "2 similar pictures (2.jpg = 30.jpg)" in block
    text, shown = judging.similar_blocks(pairs[:2], keys, lambda row: np.full((8, 8, 3), row, np.uint8))
    assert "--group_column" in text and shown.count("<img") == 4 and "pair 2: " in shown
    assert judging.similar_blocks(7 * pairs[:1], keys, lambda row: np.zeros((8, 8, 3), np.uint8))[1].count("<img") == 12, "six pairs"
    assert judging.similar_blocks([], keys, None) == []


def leaky_data(n_rows=60):
    rng = np.random.default_rng(5)
    phash = rng.integers(0, 2 ** 63, (n_rows, 4), dtype=np.uint64)
    sha = [f"sha{i}" for i in range(n_rows)]
    split = {"train": np.arange(0, 40), "val": np.arange(40, 50), "test": np.arange(50, n_rows)}
    return split, sha, phash, [f"{i:03d}.jpg" for i in range(n_rows)]


def test_a_clean_split_reports_zeros():
    split, sha, phash, keys = leaky_data()
    groups = np.repeat(["a", "b", "c"], [40, 10, 10])
    report = splitting.leakage_report(split, keys, sha, phash, {"groups": groups, "events": groups})
    assert set(report["between"]) == {"train-val", "train-test", "val-test"}
    assert all(found["count"] == 0 for shared in report["between"].values() for found in shared.values())
    assert all(found["count"] == 0 for held in report["within"].values() for found in held.values())
    splitting.check_leakage(report)
    zeros = "0 groups, 0 events, 0 exact duplicates, 0 near duplicates"
    assert splitting.leakage_text(report).splitlines() == [
        f"leakage {pair}: {zeros}" for pair in ("train-val", "train-test", "val-test")]
    assert splitting.leakage_text({**report, "notes": ["a note"]}).endswith("\na note")


def planted():
    split, sha, phash, keys = leaky_data()
    sha[41], phash[41] = sha[3], phash[3]
    sha[5], phash[5] = sha[4], phash[4]
    phash[55] = phash[42] ^ np.uint64(0b1011)
    phash[7], phash[8] = 0, 0
    sha[7] = sha[44] = ""
    groups = np.array([f"g{i}" for i in range(60)], dtype=object)
    groups[[1, 2, 45, 59]], groups[[30, 46]] = "shared", ""
    return split, sha, phash, keys, groups


def test_planted_leaks_are_counted_and_named():
    split, sha, phash, keys, groups = planted()
    report = splitting.leakage_report(split, keys, sha, phash, {"groups": groups})
    counts = {(pair, what): found["count"]
              for pair, shared in report["between"].items() for what, found in shared.items()}
    assert {key: count for key, count in counts.items() if count} == {
        ("train-val", "groups"): 1, ("train-test", "groups"): 1, ("val-test", "groups"): 1,
        ("train-val", "exact_duplicates"): 1, ("val-test", "near_duplicates"): 1}
    assert report["between"]["train-val"]["exact_duplicates"]["examples"] == ["003.jpg = 041.jpg"]
    assert report["between"]["val-test"]["near_duplicates"]["examples"] == ["042.jpg = 055.jpg"]
    assert report["within"]["train"] == {"exact_duplicates": {"count": 1, "examples": ["004.jpg = 005.jpg"]},
                                         "near_duplicates": {"count": 0, "examples": []}}
    assert json.loads(json.dumps(report)) == report
    assert splitting.leakage_text(report).splitlines()[0] == (
        "leakage train-val: 1 group (shared), 1 exact duplicate (003.jpg = 041.jpg), 0 near duplicates")


def test_copies_in_no_part_are_not_named():
    split, sha, phash, keys, groups = planted()
    sha[59] = sha[3]
    split = {part: rows[rows != 59] for part, rows in split.items()}
    report = splitting.leakage_report(split, keys, sha, phash, {"groups": groups})
    assert report["between"]["train-val"]["exact_duplicates"] == {"count": 1, "examples": ["003.jpg = 041.jpg"]}


def test_report_does_not_depend_on_row_order():
    split, sha, phash, keys, groups = planted()
    order = np.random.default_rng(1).permutation(60)
    new_row = np.argsort(order)
    turned = splitting.leakage_report({name: new_row[rows] for name, rows in split.items()}, [keys[i] for i in order],
                                      [sha[i] for i in order], phash[order], {"groups": groups[order]})
    assert turned == splitting.leakage_report(split, keys, sha, phash, {"groups": groups})


def test_what_stops_the_run_and_what_only_warns():
    split, sha, phash, keys, groups = planted()
    report = splitting.leakage_report(split, keys, sha, phash, {"groups": groups})
    message = fails(splitting.check_leakage, report)
    assert "1 group (shared)" in message and "1 exact duplicate (003.jpg = 041.jpg)" in message
    assert "--allow_leakage" in message and "near" not in message
    splitting.check_leakage(report, allow_leakage=True)
    splitting.check_leakage(splitting.leakage_report(split, keys, [""] * 60, None, {"groups": groups}),
                            stopping=("events", "exact_duplicates"))
    clean, sha, _, _ = leaky_data()
    events = splitting.leakage_report(clean, keys, sha, None, {"events": ["e1"] * 60})
    assert "1 event (e1)" in fails(splitting.check_leakage, events)
    phash[55] = phash[41]
    clean_but_near = splitting.leakage_report(split, keys, [f"s{i}" for i in range(60)], phash, {})
    assert clean_but_near["between"]["val-test"]["near_duplicates"]["count"] == 1
    splitting.check_leakage(clean_but_near)


def test_pairs_agree_with_counting_bit_by_bit():
    rng = np.random.default_rng(2)
    phash = rng.integers(0, 2 ** 63, (1100, 4), dtype=np.uint64)
    for i, n_bits in enumerate((1, 20, 39, 40, 41, 60)):
        flips = np.zeros(256, np.uint8)
        flips[rng.choice(256, n_bits, replace=False)] = 1
        phash[1050 + i] = phash[5 + i] ^ np.packbits(flips).view(np.uint64)
    phash[1090] = phash[1030] ^ np.uint64(1)  # both beyond the first block of rows
    split = {"train": np.arange(1050), "val": np.arange(1050, 1100)}
    names = [f"{i:04d}" for i in range(1100)]
    report = splitting.leakage_report(split, names, names, phash, {})
    expected = sum(bits_apart(phash[i], phash[j]) <= 40 for i in range(5, 11) for j in range(1050, 1056))
    found = report["between"]["train-val"]["near_duplicates"]
    assert found["count"] == expected + 1 == 5 and found["examples"][-1] == "1030 = 1090"


def test_of_many_that_look_alike_each_is_named_with_its_nearest_in_every_part():
    """Clips of one camera: as many pairs as clips, not as pairs of clips; the same ones in any order of the rows."""
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2, 256, dtype=np.uint8)
    bits = np.stack([np.where(rng.random(256) < 0.05, 1 - base, base) for _ in range(60)])
    bits[7] = bits[3]  # equal hashes of other pixels: a tie of distances
    pixels = [str(row) for row in range(60)]
    pixels[9] = pixels[8]
    names = np.array([f"{row:02d}" for row in range(60)])

    def nearest_pairs(first, second):
        pairs = set()
        for own, others in ((first, second), (second, first)):
            for row in own:
                allowed = [other for other in others if pixels[other] != pixels[row]]
                pairs.add(frozenset((row, min(allowed, key=lambda other: ((bits[row] != bits[other]).sum(), other)))))
        return pairs
    train, val = range(40), range(40, 60)
    found = nearest_pairs(train, val)
    for order in (np.arange(60), rng.permutation(60)):
        place = order.argsort()
        report = splitting.leakage_report(
            {"train": place[:40], "val": place[40:]}, names[order], [pixels[row] for row in order],
            np.packbits(bits[order], axis=1).view(np.uint64), {})
        assert report["between"]["train-val"]["near_duplicates"]["count"] == len(found) <= 60
        assert report["within"]["train"]["near_duplicates"]["count"] == len(nearest_pairs(train, train)) <= 40
        assert report["between"]["train-val"]["near_duplicates"]["examples"] == sorted(
            " = ".join(sorted(names[list(pair)])) for pair in found)[:5]


@pytest.mark.skipif(not OMI.is_dir(), reason="the OMI faces are not beside the repository")
def test_aligned_faces_are_told_apart():
    images = [cv2.imread(str(path))[:, :, ::-1] for path in file_names.find_images(OMI / "images")]
    phash = np.stack([picture_files.perceptual_hash(np.ascontiguousarray(image)) for image in images])
    copies = np.stack([picture_files.perceptual_hash(saved_again(image, 128, 70)) for image in images[:100]])
    n_rows = len(images) + len(copies)
    split = {"train": np.arange(len(images)), "val": np.arange(len(images), n_rows)}
    names = [f"{i:04d}" for i in range(n_rows)]
    report = splitting.leakage_report(split, names, names, np.concatenate([phash, copies]), {})
    assert report["within"]["train"]["near_duplicates"]["count"] == 0
    assert report["between"]["train-val"]["near_duplicates"]["count"] == 100


def test_a_column_that_repeats_and_is_parted_is_an_alarm_with_its_flag():
    rng = np.random.default_rng(0)
    rows = np.arange(120)
    scene = np.array([f"scene {n}" for n in rows // 3])
    columns = {"scene_group": scene, "age": (20 + rows % 30).astype(str), "camera": np.where(rows % 2, "a", "b"),
               "note": rows.astype(str), "farm site": np.array([f"farm {n}" for n in rows // 15]), "emotion": rows % 7}
    halves = {"train": rows[rng.permutation(120) < 90], "val": rows[:0]}
    halves["val"] = np.setdiff1d(rows, halves["train"])
    found = splitting.unused_groups(columns, halves, None)
    assert len(found) == 2 and "--group_column scene_group" in found[0] and "40 values in 120 rows" in found[0]
    whole = splitting.make_split(rows, {"train": 0.75, "val": 0.25}, groups=scene)
    assert splitting.unused_groups(columns, whole, scene) == []


def test_a_dry_run_tries_rows_with_two_ratings_of_each_and_every_class():
    """The first rows have none of the second rating, one value of the first, and no row of class 2."""
    ratings = np.full((90, 2), np.nan)
    ratings[:, 0] = np.arange(90) > 60
    ratings[70:, 1] = np.arange(20) % 3
    split = {"train": np.arange(80), "val": np.arange(80, 90), "test": np.arange(0)}
    args = SimpleNamespace(dry_run=True, batch_size=4)
    few = splitting.rows_to_try(split, args, ratings)
    assert few["train"][:8].tolist() == list(range(8)) and few["train"].tolist()[8:] == [61, 70, 71]
    assert len(few["val"]) == 8 and not len(few["test"])
    labels = np.where(np.arange(90) < 75, np.arange(90) % 2, 2)
    assert splitting.rows_to_try(split, args, labels)["train"].tolist() == [*range(8), 75]
    assert splitting.rows_to_try(split, args)["train"].tolist() == list(range(8))
    assert splitting.rows_to_try(split, SimpleNamespace(dry_run=False), ratings) is split


@pytest.mark.parametrize("name, is_group", [
    ("pen", True), ("Street", True), ("farm_no", True), ("home cage", True), ("litter ID", True), ("clinics", True),
    ("video_file", True), ("PatientID", True), ("animal.name", True), ("open", False), ("pencil", False),
    ("herd_size", False), ("n_animals", False), ("personality", False), ("video_length", False), ("opposite", False),
    ("anatom_site_general", False), ("familiar", False), ("group_mean", False), ("Patient_Age", False)])
def test_names_of_columns_that_say_who_or_where_and_their_false_friends(name, is_group):
    rows = np.arange(60)
    found = splitting.unused_groups({name: rows % 12}, {"train": rows[:40], "val": rows[40:]}, None)
    assert bool(found) is is_group


