"""make_sample_data.py: repeatable bytes, known ceiling, learnable signal by group, quirky files, folders left alone.

    python -m pytest tests/test_sample_data.py
"""
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor, ImageOps
from scipy.spatial.transform import Rotation
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common
from readers import picture_files
import make_sample_data

WIDE = "ratings/per_image_Slider_mean_sd_from_wide.csv"


def digest(folder):
    """{relative path: sha256} of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["make_sample_data.py", "--task", "assessor", *map(str, flags)])
    make_sample_data.main()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, ground truth) of the default data, made once through the command line."""
    output = tmp_path_factory.mktemp("data")
    script = Path(make_sample_data.__file__)
    command = [sys.executable, str(script), "--task", "assessor", "--output_dir", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    folder = output / "assessor"
    assert "ground_truth.json" in done.stdout
    return folder, json.loads((folder / "ground_truth.json").read_text(encoding="utf-8"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with 30 pictures, made in the process."""
    run(monkeypatch, "--output_dir", tmp_path, "--n_images", 30, "--seed", 1)
    return tmp_path / "assessor"


def open_upright(path):
    """RGB pixels as a viewer shows them, by Pillow alone."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    return paper.convert("RGB")


def test_same_flags_same_bytes_and_another_seed_differs(small, tmp_path, monkeypatch):
    other = tmp_path / "again"
    run(monkeypatch, "--output_dir", other, "--n_images", 30, "--seed", 1)
    assert digest(small) == digest(other / "assessor")
    run(monkeypatch, "--output_dir", tmp_path / "new", "--n_images", 30, "--seed", 2)
    assert not set(digest(small).values()) & set(digest(tmp_path / "new" / "assessor").values())


def test_layout_and_columns(made):
    folder, truth = made
    table = pd.read_csv(folder / WIDE)
    assert len(table) == 120 and table.image.is_unique and list(table.columns[:2]) == ["image", "subject"]
    assert list(table.columns[2:]) == [f"{r}_{part}" for r in truth["formula"] for part in ("mean", "sd", "n")]
    assert len(truth["formula"]) == 14
    assert {f"images/{p.name}" for p in (folder / "images").iterdir()} == set(table.image)
    counts = table.groupby("subject").size()
    assert len(counts) == 30 and counts.min() >= 2 and counts.nunique() > 2
    assert table.filter(regex="_n$").min().min() >= 2 and table.filter(regex="_n$").stack().nunique() > 4
    sizes = [open_upright(p).size for p in (folder / "images").iterdir()]
    assert min(map(min, sizes)) >= 160 and max(map(max, sizes)) <= 320 and len(set(sizes)) > 60
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 5_000_000


def test_wide_table_is_the_raw_table_aggregated(made):
    folder, truth = made
    wide = pd.read_csv(folder / WIDE)
    raw = pd.read_csv(folder / "ratings/raw_ratings_long.csv")
    assert raw.rating.between(1, 9).all() and not raw.duplicated(["stimulus", "attribute", "rater"]).any()
    grouped = raw.groupby(["stimulus", "attribute"]).rating
    wide.index = wide.image.str.removeprefix("images/")
    for part, values in (("mean", grouped.mean()), ("sd", grouped.std()), ("n", grouped.size())):
        table = values.unstack().loc[wide.index, list(truth["formula"])]
        np.testing.assert_allclose(wide[[f"{r}_{part}" for r in truth["formula"]]], table, atol=5.1e-5)


def test_ceiling_and_noise_are_as_stated(made):
    folder, truth = made
    table = pd.read_csv(folder / WIDE)
    true = pd.DataFrame.from_dict(truth["true_ratings"], orient="index", columns=list(truth["formula"]))
    true = true.loc[table.image.str.removeprefix("images/")].to_numpy()
    mean, sd, n = (table.filter(regex=f"_{part}$").to_numpy() for part in ("mean", "sd", "n"))
    stated = np.array(list(truth["ceiling_r2"].values()))
    np.testing.assert_allclose(np.sqrt((sd**2).mean(0)), make_sample_data.NOISE_SD, rtol=0.06)
    # 120 pictures: the share of true variance in the observed means scatters by a few hundredths
    np.testing.assert_allclose(np.corrcoef(np.hstack([mean, true]).T)[range(14), range(14, 28)]**2, stated, atol=0.09)
    estimated = 1 - (sd**2 / n).mean(0) / mean.var(0, ddof=1)
    np.testing.assert_allclose(estimated, stated, atol=0.09)
    assert stated.min() > 0.5 and stated.max() < 0.99 and np.ptp(stated) > 0.2


def test_true_ratings_follow_the_documented_formula():
    properties = np.random.default_rng(0).uniform(-1, 1, (5, len(make_sample_data.PROPERTIES)))
    true, _ = make_sample_data.rate(properties, np.random.default_rng(1))
    for j, terms in enumerate(make_sample_data.FORMULA.values()):
        z = sum(w * properties[:, make_sample_data.PROPERTIES.index(p)] for p, w in terms.items())
        np.testing.assert_allclose(true[:, j], 5 + (4 - 3**0.5 * make_sample_data.NOISE_SD[j]) * np.tanh(z))


def test_signal_is_learnable_across_subjects(made):
    folder, _ = made
    table = pd.read_csv(folder / WIDE)
    pictures = [ImageOps.fit(open_upright(folder / name), (16, 16), Image.Resampling.BOX) for name in table.image]
    pixels = [np.asarray(picture, float) for picture in pictures]
    features = np.array([np.r_[p.ravel(), 5 * p.mean((0, 1))] for p in pixels])
    target = table.filter(regex="_mean$").to_numpy()
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 13)))
    predicted = cross_val_predict(ridge, features, target, groups=table.subject, cv=GroupKFold(5))
    r2 = 1 - ((target - predicted)**2).sum(0) / ((target - target.mean(0))**2).sum(0)
    assert r2.mean() > 0.45 and r2.min() > 0


def test_pictures_of_one_subject_share_looks(made):
    folder, _ = made
    table = pd.read_csv(folder / WIDE)
    cheeks = [open_upright(folder / name).resize((64, 64)).crop((20, 34, 44, 38)) for name in table.image]
    colours = np.array([np.asarray(cheek, float).mean((0, 1)) for cheek in cheeks])
    hue = colours[:, 0] / colours[:, 2]
    within = pd.Series(hue).groupby(table.subject).std().mean()
    assert within < 0.6 * hue.std()


def test_quirks_are_what_they_claim_and_keep_the_picture(made):
    folder, truth = made
    files = {quirk: folder / "images" / name for name, quirk in truth["quirks"].items()}
    modes = {quirk: Image.open(path).mode for quirk, path in files.items()}
    assert (modes["grey"], modes["palette"], modes["alpha"]) == ("L", "P", "RGBA")
    assert Image.open(files["exif"]).getexif()[0x0112] == 6
    assert files["deep"].read_bytes()[24] == 16, "bit depth in the PNG header"
    assert files["upper_case"].suffix == ".JPG" and " " in files["name"].name and not files["name"].name.isascii()
    index = {quirk: row for row, quirk in make_sample_data.QUIRKS.items()}
    assert len(index) == 7
    for quirk, path in files.items():
        expected = plain_picture(index[quirk])
        shown = np.asarray(open_upright(path), float)
        reference = expected if quirk != "grey" else np.repeat(expected.mean(2, keepdims=True), 3, 2)
        assert shown.shape == reference.shape
        assert np.median(np.abs(shown - reference)) < 8, quirk


def plain_picture(number):
    """(H, W, 3) float: picture `number` of seed 42 as it was drawn, before any file format."""
    rng = np.random.default_rng([42, 0])
    _, properties = make_sample_data.sample_properties(120, rng)
    rng = np.random.default_rng([42, 1, number])
    size = rng.integers(200, 321, 2).tolist()
    face = dict(zip(make_sample_data.PROPERTIES, properties[number]))
    return make_sample_data.draw_face(face, *size, rng).astype(float)


def test_common_reads_every_picture(made):
    folder, truth = made
    for name in truth["quirks"]:
        pixels = picture_files.load_image(folder / "images" / name)
        difference = np.abs(pixels.astype(float) - np.asarray(open_upright(folder / "images" / name), float))
        assert np.median(difference) < 3, name


def test_second_run_with_the_same_flags_changes_nothing(small, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    run(monkeypatch, "--output_dir", small.parent, "--n_images", 30, "--seed", 1)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in small.rglob("*")}


@pytest.mark.parametrize("there", ["other settings", "no truth", "an empty folder", "a truth of something else", "a list",
                                   "damaged"])
def test_what_else_is_there_is_left_alone(small, monkeypatch, there):
    n_images = 31 if there == "other settings" else 30
    truth = small / "ground_truth.json"
    if there == "no truth":
        truth.unlink()
    elif there == "an empty folder":
        shutil.rmtree(small)
        small.mkdir()
    elif there == "a truth of something else":
        truth.write_text('{"answer": 42}')
    elif there == "a list":
        truth.write_text("[42]")
    elif there == "damaged":
        truth.write_bytes(truth.read_bytes()[:100])
    before = digest(small)
    with pytest.raises(common.UserError, match=f"{small}: something else is there .ground_truth.json is missing, damaged or "
                                                r"of other settings.; remove it or choose another --out"):
        run(monkeypatch, "--output_dir", small.parent, "--n_images", n_images, "--seed", 1)
    assert digest(small) == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(common.UserError, match="--output_dir .* cannot be written: Not a directory"):
        run(monkeypatch, "--output_dir", tmp_path / place)


def test_interrupted_run_leaves_no_half_data(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(make_sample_data, "write_tables", fail)
    with pytest.raises(OSError):
        run(monkeypatch, "--output_dir", tmp_path, "--n_images", 30)
    assert not (tmp_path / "assessor").exists()
    monkeypatch.undo()
    run(monkeypatch, "--output_dir", tmp_path, "--n_images", 30)
    assert [p.name for p in tmp_path.iterdir()] == ["assessor"]


def test_the_fewest_samples_have_groups_for_every_part(tmp_path):
    """29 are refused, see below."""
    for name in ("detector", "dreamer"):
        (tmp_path / name).mkdir()
    make_sample_data.make_detector(tmp_path / "detector", 30, 1)
    annotations = common.read_json(tmp_path / "detector" / "annotations.json")
    assert len({entry["street"] for entry in annotations.values()}) == 5
    make_sample_data.make_dreamer(tmp_path / "dreamer", 30, 1)
    assert len(set(common.read_json(tmp_path / "dreamer" / "patient_map.json").values())) == 3


@pytest.mark.parametrize("flags, message", [
    (["--n_images", "29"], "n_images"), (["--seed", "-1"], "seed"), (["--task", "poetry"], "poetry"),
    (["--images", "9"], "--n_images")])
def test_bad_flags_exit_2(tmp_path, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--output_dir", tmp_path, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# --- slices and bicycles ---------------------------------------------------------------

def test_a_frame_is_the_slice_at_its_pose():
    """A small blob that lies in the plane, 6 mm right and 9 mm above its middle, is seen there; SciPy turns the plane."""
    pose = np.array([5.0, -4, 7, 20, -35, 50])
    bend = np.array([[1, 0.1, 0], [0, 1, -0.2], [0.1, 0, 1]])
    plane = Rotation.from_euler("ZYX", pose[[5, 4, 3]], degrees=True).as_matrix()
    centre = bend @ (plane @ [6, -9, 0] + pose[:3])

    def cut(blobs):
        return make_sample_data.cut_slice(pose, bend, blobs, np.random.default_rng(0)).astype(float)
    plain, with_blob = cut([]), cut([(centre, np.full(3, 2.5), 100)])
    gain = (with_blob - plain) / plain * (plain > 0)
    where = [(gain * place).sum() / gain.sum() for place in np.mgrid[:64, :64]]
    assert where == pytest.approx([31.5 - 9, 31.5 + 6], abs=0.1), "a pixel is a millimetre"
    rows = make_sample_data.cut_slice(np.zeros(6), np.eye(3), [], np.random.default_rng(0)).mean(1)
    assert np.polyfit(np.arange(64) - 31.5, rows, 1) == pytest.approx([0.5, 75], rel=0.05), "brighter with depth"


def test_sequences_of_slices_are_what_their_page_says(tmp_path):
    """at2 = at1 + motion, frames follow one another, and each quirk is in the sequence that the ground truth names."""
    truth = make_sample_data.make_dreamer(tmp_path, 200, 3)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == [f"patient_{patient:02d}_{number:02d}" for patient in (1, 2, 3, 4) for number in (1, 2)]
    assert common.read_json(tmp_path / "patient_map.json") == {name: name[:10] for name in folders}
    quirk_of = {quirk: name for name, quirk in truth["quirks"].items()}
    assert set(quirk_of) == {"backslashes", "dict", "no_at2", "bad_labels"} and set(quirk_of.values()) < set(folders)
    poses = {}
    for name in folders:
        rows = json.loads((tmp_path / name / "transitions_dataset.json").read_text())
        assert isinstance(rows, dict) == (name == quirk_of["dict"])
        rows = rows["transitions"] if isinstance(rows, dict) else rows
        assert len(rows) == 25 and ("\\" in rows[0]["ft1_image_path"]) == (name == quirk_of["backslashes"])
        lacking = [k for k, row in enumerate(rows) if "at2_6dof" not in row]
        assert lacking == (list(range(0, 25, 2)) if name == quirk_of["no_at2"] else [])
        at1, motion = (np.array([row[key] for row in rows]) for key in ("at1_6dof", "action_change_6dof"))
        at2 = np.array([row.get("at2_6dof", [np.nan] * 6) for row in rows])
        if name == quirk_of["bad_labels"]:
            assert np.isnan(at1[2, 1]) and at2[4, 3] == 9999
            at1[2, 1], at2[4, 3] = at2[1, 1], at1[5, 3]
        known = ~np.isnan(at2[:, 0])
        np.testing.assert_allclose(at1[known] + motion[known], at2[known], atol=1e-9)
        np.testing.assert_allclose(at1[1:], at1[:-1] + motion[:-1], atol=1e-9)
        for one, other in zip(rows[:-1], rows[1:]):
            paths = [tmp_path / name / path.replace("\\", "/") for path in (one["ft2_image_path"], other["ft1_image_path"])]
            assert one["frame_t2"] == other["frame_t1"] == paths[0].stem == paths[1].stem
            assert paths[0].read_bytes() == paths[1].read_bytes() and Image.open(paths[0]).size == (64, 64)
        poses[name] = at1
    reach = np.abs(np.concatenate([*poses.values()])).max(0)
    assert (reach < [12, 12, 12, 20, 20, 20]).all() and (reach > [6, 6, 6, 10, 10, 10]).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_part_is_drawn_in_its_box_unless_it_is_absent(seed):
    """The only change to a bicycle without parts; its box stays where it was; mirrored or not, by the seed."""
    parts = list(make_sample_data.PART_LOOKS)

    def draw(**states):
        rng = np.random.default_rng(seed)
        background = Image.new("RGB", (500, 380), (200, 200, 200))
        return make_sample_data.draw_bicycle([states.get(part, "absent") for part in parts], background, rng)
    nothing, seen = draw()
    boxes = {part: box for part, (_, box) in seen.items()}
    assert (boxes["front_wheel"][0] > boxes["back_wheel"][0]) == (seed == 1)
    for part in parts:
        for state in ("intact", "damaged"):
            pixels, seen = draw(**{part: state})
            assert seen[part] == (state, boxes[part])
            y, x = np.nonzero(np.abs(pixels.astype(int) - nothing).max(2) > 40)
            found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert found == pytest.approx(boxes[part], abs=1.5), f"{part} {state}"
            colour = np.median(pixels[y, x], axis=0)
            rust = np.array(ImageColor.getrgb(make_sample_data.RUST))
            assert (np.abs(colour - rust).max() < 40) == (state == "damaged"), f"{part} {state}"
