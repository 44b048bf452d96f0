"""Make small sample data with a known, learnable signal, for a first run and for the tests.

    python make_sample_data.py --task assessor --output_dir sample_data
    python make_sample_data.py --task assessor --output_dir sample_data --n_images 300 --seed 7 --overwrite

Written in a few seconds, byte for byte the same for the same flags and package versions:
    assessor/images/              drawn faces of 160 to 320 px; a few in awkward formats (EXIF-turned, grey, palette,
                                  alpha, 16 bit, .JPG, a name with a space and an umlaut)
    assessor/ratings/per_image_Slider_mean_sd_from_wide.csv    image, subject, then X_mean, X_sd, X_n for 14 ratings
    assessor/ratings/raw_ratings_long.csv                      the single ratings: rating, attribute, stimulus, rater
    assessor/ground_truth.json    the formula, the raters' noise, the noise ceiling and every true rating

How a rating comes about, for rating j and picture i on a scale from 1 to 9:
    true[i, j] = 5 + (4 - sqrt(3) * noise_sd[j]) * tanh(sum over properties p of FORMULA[j][p] * property[i, p])
    rating     = true[i, j] + uniform noise of standard deviation noise_sd[j], which never leaves 1 to 9
so the ceiling of any model is R2 = var(true) / (var(true) + mean(noise_sd^2 / n)). Properties lie in -1 to 1; those of
LOOKS belong to the subject and are shared by all its pictures, so only a split by subject is honest.

Axes: N pictures, A raters, P properties, R ratings, H x W pixels.
"""
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np

import common

LOOKS = ("face_width", "eye_size", "hair_height", "hue_warmth")
STATES = ("smile", "brow_anger", "eye_open", "mouth_open", "brightness", "light_warmth")
PROPERTIES = LOOKS + STATES
FORMULA = {
    "Approach": {"smile": 1.2, "brow_anger": -0.6, "light_warmth": 0.3},
    "Arousal": {"mouth_open": 1.0, "eye_open": 0.8, "brightness": 0.3},
    "Valence": {"smile": 1.4, "brightness": 0.4, "brow_anger": -0.4},
    "Dominance": {"face_width": 0.9, "brow_anger": 0.9},
    "Happiness": {"smile": 1.6, "mouth_open": 0.3},
    "Sadness": {"smile": -1.1, "brightness": -0.7, "eye_open": -0.3},
    "Anger": {"brow_anger": 1.4, "smile": -0.6},
    "Surprise": {"eye_open": 0.9, "mouth_open": 1.0, "brow_anger": -0.4},
    "Calmness": {"mouth_open": -1.0, "brow_anger": -0.6, "eye_open": -0.4},
    "Alertness": {"eye_open": 1.1, "brightness": 0.6},
    "Cuteness": {"eye_size": 1.1, "smile": 0.5, "face_width": 0.4},
    "Warmth": {"light_warmth": 0.9, "hue_warmth": 0.7, "smile": 0.3},
    "Brightness": {"brightness": 1.5, "light_warmth": 0.2},
    "Liveliness": {"hair_height": 0.8, "mouth_open": 0.6, "brightness": 0.5},
}
NOISE_SD = np.linspace(0.7, 1.5, len(FORMULA))  # scale points; one rater, one picture
N_RATERS, MISSING_SHARE, SUPERSAMPLE = 24, 0.04, 2
QUIRKS = {3: "exif", 7: "grey", 11: "palette", 15: "alpha", 19: "deep", 23: "upper_case", 27: "name"}  # row -> quirk
TRUTH_FILE = "ground_truth.json"
EXIF_ORIENTATION = 0x0112


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS), help="which script the data are for")
    add("--output_dir", type=Path, default=Path("sample_data"), help="the data go to TASK in it")
    add("--n_images", type=common.bounded(int, 30, 9999), default=120, help="number of pictures; about 4 a subject")
    add("--seed", type=common.bounded(int, 0), default=42, help="another seed makes other pictures and ratings")
    add("--overwrite", action="store_true", help="replace sample data made here earlier")
    return common.parse_arguments(parser, argv)


# ---------------------------------------------------------------------------
# Faces
# ---------------------------------------------------------------------------
# A face is drawn from its properties alone; position, background and pixel noise vary at random and mean nothing.


def hue_to_rgb(hue, saturation, value):
    """(3,) float RGB in 0 to 255 of a hue in turns; saturation and value in 0 to 1."""
    ramp = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation + saturation * ramp)


def draw_background(size, rng):
    """(H, W, 3) uint8 of `size` (W, H): a gradient of two dull colours with five blurred discs, new in each one."""
    from PIL import Image
    y, x = np.mgrid[0:1:48j, 0:1:48j]
    angle, colours = rng.uniform(0, 2 * np.pi), rng.uniform(95, 165, (2, 3))
    ramp = 0.5 + (x - 0.5) * np.cos(angle) * 0.7 + (y - 0.5) * np.sin(angle) * 0.7
    pixels = ramp[..., None] * colours[0] + (1 - ramp[..., None]) * colours[1]
    for cx, cy, radius, lift in rng.uniform([0, 0, 0.12, -55], [1, 1, 0.35, 55], (5, 4)):
        pixels += lift * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * radius**2))[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def draw_eyes(draw, face, cx, cy, unit):
    """Two eyes with pupils, and brows whose inner ends drop with anger."""
    radius = unit * (0.17 + 0.06 * face["eye_size"])
    opening = radius * (0.60 + 0.40 * face["eye_open"])
    for side in (-1, 1):
        x, y = cx + side * unit * (0.34 + 0.05 * face["face_width"]), cy - unit * 0.12
        draw.ellipse([x - radius, y - opening, x + radius, y + opening], fill=(250, 250, 250))
        pupil = radius * 0.55
        draw.ellipse([x - pupil, y - min(pupil, opening), x + pupil, y + min(pupil, opening)], fill=(40, 34, 46))
        inner, outer = y - unit * (0.32 - 0.13 * face["brow_anger"]), y - unit * (0.32 + 0.10 * face["brow_anger"])
        line = [x - side * unit * 0.18, inner, x + side * unit * 0.20, outer]
        draw.line(line, fill=(52, 40, 48), width=int(unit * 0.085))


def draw_mouth(draw, face, cx, cy, unit):
    """A mouth as a closed shape: the lips follow a parabola (smile), the lower one hangs lower (open)."""
    x, gap = np.linspace(-1, 1, 21), unit * (0.10 + 0.08 * face["mouth_open"])
    middle, half = cy + unit * (0.42 + 0.20 * face["smile"] * (0.5 - x**2)), gap * np.sqrt(np.clip(1 - x**2, 0, None))
    across = cx + unit * 0.38 * x
    outline = np.c_[np.r_[across, across[::-1]], np.r_[middle - half * 0.6, (middle + half)[::-1]]]
    corners = [tuple(corner) for corner in outline.tolist()]
    draw.polygon(corners, fill=(120, 28, 48))
    draw.line(corners + corners[:1], fill=(84, 20, 36), width=max(2, int(unit * 0.045)))


def draw_head(draw, face, cx, cy, unit):
    """Hair, ears, head and nose in shades of one colour, from blue over green to yellow."""
    half_x, half_y = unit * (0.70 + 0.12 * face["face_width"]), unit * 0.86
    skin = hue_to_rgb(0.40 - 0.24 * face["hue_warmth"], 0.34, 0.74)
    shades = {share: tuple(int(c) for c in skin * share) for share in (0.42, 0.82, 0.88, 1.0)}
    top = cy - half_y * (1.06 + 0.12 * face["hair_height"])
    draw.ellipse([cx - half_x * 1.07, top, cx + half_x * 1.07, cy + half_y * 0.55], fill=shades[0.42])
    for ear in (cx - half_x, cx + half_x):
        draw.ellipse([ear - unit * 0.12, cy - unit * 0.14, ear + unit * 0.12, cy + unit * 0.16], fill=shades[0.88])
    draw.ellipse([cx - half_x, cy - half_y * 0.86, cx + half_x, cy + half_y], fill=shades[1.0])
    nose = [(cx, cy), (cx - unit * 0.07, cy + unit * 0.19), (cx + unit * 0.07, cy + unit * 0.19)]
    draw.polygon(nose, fill=shades[0.82])


def draw_face(face, width, height, rng):
    """(H, W, 3) uint8 picture of one face; `face` maps each of PROPERTIES to -1..1."""
    from PIL import Image, ImageDraw
    picture = draw_background((width * SUPERSAMPLE, height * SUPERSAMPLE), rng)
    draw = ImageDraw.Draw(picture)
    shift_x, shift_y, zoom = rng.uniform([-0.04, 0.0, 0.88], [0.04, 0.06, 0.96])
    side = SUPERSAMPLE * min(width, height)
    cx, cy, unit = SUPERSAMPLE * width / 2 + side * shift_x, SUPERSAMPLE * height / 2 + side * shift_y, side * zoom / 2
    draw_head(draw, face, cx, cy, unit)
    draw_eyes(draw, face, cx, cy, unit)
    draw_mouth(draw, face, cx, cy, unit)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), float)  # (H, W, 3)
    warmth = 1 + face["light_warmth"] * np.array([0.14, 0.02, -0.16])
    pixels = pixels * (1 + 0.30 * face["brightness"]) * warmth + rng.normal(0, 2.5, pixels.shape)
    return pixels.clip(0, 255).round().astype(np.uint8)


def save_picture(pixels, folder, number, quirk):
    """Write one picture (H, W, 3) uint8, in the awkward format that `quirk` names, and return its file name."""
    import cv2
    from PIL import Image
    picture = Image.fromarray(pixels)
    suffix = ".png" if quirk in ("grey", "palette", "alpha", "deep") else ".JPG" if quirk == "upper_case" else ".jpg"
    name = f"face {number:04d} gr\u00fcn.jpg" if quirk == "name" else f"face_{number:04d}{suffix}"
    if quirk == "deep":
        wide = pixels[..., ::-1].astype(np.uint16) * 257  # the same picture on 0 to 65535, BGR
        (folder / name).write_bytes(cv2.imencode(".png", wide)[1].tobytes())
        return name
    options = {"quality": 90} if suffix.lower() == ".jpg" else {}
    if quirk == "grey":
        picture = picture.convert("L")
    elif quirk == "palette":
        picture = picture.quantize(128)
    elif quirk == "alpha":
        y, x = np.mgrid[-1:1:pixels.shape[0] * 1j, -1:1:pixels.shape[1] * 1j]
        picture.putalpha(Image.fromarray(np.where(np.hypot(x, y) < 1.25, 255, 0).astype(np.uint8)))
    elif quirk == "exif":
        picture, options["exif"] = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        options["exif"][EXIF_ORIENTATION] = 6  # stored turned to the left; viewers turn it back
    picture.save(folder / name, **options)
    return name


# ---------------------------------------------------------------------------
# Ratings
# ---------------------------------------------------------------------------
# Subjects have looks, pictures have states, ratings follow by FORMULA, raters add noise.


def sample_properties(n_images, rng):
    """(subject number of each picture (N,), properties (N, P) in -1..1); 2 to 7 pictures a subject, in random order."""
    n_subjects = n_images // 4
    twice = np.repeat(np.arange(n_subjects), 2)
    subject = rng.permutation(np.r_[twice, rng.integers(0, n_subjects, n_images - len(twice))])
    looks = rng.uniform(-1, 1, (n_subjects, len(LOOKS)))[subject]
    properties = np.hstack([looks, rng.uniform(-1, 1, (n_images, len(STATES)))])
    colours = [PROPERTIES.index(name) for name in ("hue_warmth", "light_warmth")]
    properties[np.ix_([i for i, quirk in QUIRKS.items() if quirk == "grey"], colours)] = 0  # a grey picture shows none
    return subject, properties


def sample_size(rng):
    """(W, H) in pixels: 200 to 320 wide, between 4:5 and 5:4."""
    width = int(rng.integers(200, 321))
    return width, int(np.clip(width * rng.uniform(0.8, 1.25), 160, 320))


def rate(properties, rng):
    """(true ratings (N, R), single ratings (N, A, R) with NaN where a rater did not rate)."""
    weights = np.array([[terms.get(p, 0.0) for p in PROPERTIES] for terms in FORMULA.values()])  # (R, P)
    true = 5 + (4 - math.sqrt(3) * NOISE_SD) * np.tanh(properties @ weights.T)  # (N, R)
    n_images, n_ratings = true.shape
    noise = rng.uniform(-math.sqrt(3), math.sqrt(3), (n_images, N_RATERS, n_ratings)) * NOISE_SD
    panel = rng.random((n_images, N_RATERS)).argsort(axis=1) < rng.integers(5, 13, (n_images, 1))  # (N, A): took part
    answered = panel[..., None] & (rng.random(noise.shape) > MISSING_SHARE)
    return true, np.where(answered, np.round(true[:, None] + noise, 2), np.nan)


def write_tables(folder, names, subject, single):
    """Write the mean/sd/n table and the long table of single ratings (N, A, R); returns the counts n (N, R)."""
    count = np.isfinite(single).sum(axis=1)  # (N, R)
    mean, sd = np.nanmean(single, axis=1).round(4), np.nanstd(single, axis=1, ddof=1).round(4)
    wide = [{"image": f"images/{name}", "subject": f"S{number + 1:03d}"} for name, number in zip(names, subject)]
    for (i, row), (j, rating) in itertools.product(enumerate(wide), enumerate(FORMULA)):
        row |= {f"{rating}_mean": mean[i, j], f"{rating}_sd": sd[i, j], f"{rating}_n": count[i, j]}
    long = [{"rating": single[i, a, j], "attribute": list(FORMULA)[j], "stimulus": names[i], "rater": f"R{a + 1:02d}"}
            for i, a, j in np.argwhere(np.isfinite(single))]
    folder.mkdir()
    common.write_table(folder / "per_image_Slider_mean_sd_from_wide.csv", wide)
    common.write_table(folder / "raw_ratings_long.csv", long)
    return count


def make_assessor(folder, n_images, seed):
    """Pictures, ratings and their ground truth in `folder` (which exists and is empty); returns the ground truth."""
    rng = np.random.default_rng([seed, 0])
    subject, properties = sample_properties(n_images, rng)
    true, single = rate(properties, rng)
    (folder / "images").mkdir()
    names = []
    for i, row in enumerate(properties):
        rng_picture = np.random.default_rng([seed, 1, i])
        pixels = draw_face(dict(zip(PROPERTIES, row)), *sample_size(rng_picture), rng_picture)
        names.append(save_picture(pixels, folder / "images", i + 1, QUIRKS.get(i)))
    count = write_tables(folder / "ratings", names, subject, single)
    ceiling = true.var(axis=0) / (true.var(axis=0) + (NOISE_SD**2 / count).mean(axis=0))  # (R,)
    return {
        "formula": FORMULA, "scale": [1, 9], "group_column": "subject", "n_subjects": int(subject.max()) + 1,
        "quirks": {names[i]: quirk for i, quirk in QUIRKS.items()},
        "rater_noise_sd": dict(zip(FORMULA, NOISE_SD.round(4).tolist())),
        "ceiling_r2": dict(zip(FORMULA, ceiling.round(4).tolist())),
        "ceiling_r": dict(zip(FORMULA, np.sqrt(ceiling).round(4).tolist())),
        "true_ratings": dict(zip(names, true.round(4).tolist())),
    }


TASKS = {"assessor": make_assessor}


# ---------------------------------------------------------------------------
# Folder
# ---------------------------------------------------------------------------
# The data are made beside their place and moved there whole; a folder that holds anything else is never touched.


def list_files(folder):
    """Sorted paths of all files below `folder`, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_folder(folder, settings, overwrite):
    """True when `folder` holds these very data already; UserError when it holds anything that may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        made = json.loads((folder / TRUTH_FILE).read_text(encoding="utf-8"))
        strangers = set(list_files(folder)) - {*made["files"], TRUTH_FILE}
    except (OSError, ValueError, KeyError, TypeError):
        raise common.UserError(f"{folder} is not empty and holds no sample data made by this script (no readable "
                               f"{TRUTH_FILE}): nothing was written. Choose another --output_dir.") from None
    if strangers:
        raise common.UserError(f"{folder} holds files that this script did not make: {', '.join(sorted(strangers))}; "
                               "move them away or choose another --output_dir.")
    if made["settings"] != settings and not overwrite:
        raise common.UserError(f"{folder} holds sample data made with {made['settings']}, asked for {settings}. "
                               "Give --overwrite to replace them, or choose another --output_dir.")
    return made["settings"] == settings and not overwrite


def main():
    args = parse_args()
    folder = args.output_dir / args.task
    settings = {"task": args.task, "n_images": args.n_images, "seed": args.seed}
    if check_folder(folder, settings, args.overwrite):
        print(f"{folder}: already there with these settings, nothing to do")
        return
    draft = args.output_dir / f".{args.task}.new"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    truth = TASKS[args.task](draft, args.n_images, args.seed)
    files = list_files(draft)
    common.write_json(draft / TRUTH_FILE, {"settings": settings, **truth, "files": files})
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    print(f"{folder}: {len(files)} files made; the signal and its ceiling are in {folder / TRUTH_FILE}")


if __name__ == "__main__":
    common.run_main(main)
