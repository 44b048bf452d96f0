"""Make small sample data with a known, learnable signal, for a first run and for the tests.

    python make_sample_data.py --task assessor --output_dir sample_data
    python make_sample_data.py --task assessor --output_dir sample_data --n_samples 300 --seed 7 --overwrite
    python make_sample_data.py --task video --output_dir sample_data
    python make_sample_data.py --task detector
    python make_sample_data.py --task dreamer --output_dir sample_data --motions se3_left

Written in a few seconds, byte for byte the same for the same flags and package versions:
    assessor/images/              drawn faces of 160 to 320 px; a few in awkward formats (EXIF-turned, grey, palette,
                                  alpha, 16 bit, .JPG, a name with a space and an umlaut)
    assessor/ratings/per_image_Slider_mean_sd_from_wide.csv    image, subject, then X_mean, X_sd, X_n for 14 ratings
    assessor/ratings/raw_ratings_long.csv                      the single ratings: rating, attribute, stimulus, rater
    assessor/ground_truth.json    the formula, the raters' noise, the noise ceiling and every true rating
    video/videos/                 20 s of one animal that nods at another; MPEG-4 .mp4 and MJPEG .avi, odd frame rates
    video/manifests/              events: all.csv, and train, val and test.csv with different groups; label_map.json;
                                  leaky_*.csv, the same with planted leaks
    video/sequences/, sequences.csv and .json, cv_*.json    folders of frames with 7 scores, and folds of their animals
    video/ground_truth.json       the rule of the classes, the confound, every planted leak counted, the true scores
    detector/images/              drawn bicycles with 8 parts, each intact, damaged (rusty, a zigzag through it), absent
                                  (not drawn; its box is where it would be) or occluded (leaves over it)
    detector/annotations.json     part annotations with the quirks of the wild: a key without suffix, states as number,
                                  missing trust, control characters, a box of zero size, one over the edge, no parts
    detector/train_coco.json, val_coco.json    the same as COCO, other streets in val: ids from 0 with gaps, a category
                                  missing in val, boolean iscrowd, no area, the state under three different names
    detector/ground_truth.json    every state and box as drawn

How a rating comes about, for rating j and picture i on a scale from 1 to 9:
    true[i, j] = 5 + (4 - sqrt(3) * noise_sd[j]) * tanh(sum over properties p of FORMULA[j][p] * property[i, p])
    rating     = true[i, j] + uniform noise of standard deviation noise_sd[j], which never leaves 1 to 9
so the ceiling of any model is R2 = var(true) / (var(true) + mean(noise_sd^2 / n)). Properties lie in -1 to 1; those of
LOOKS belong to the subject and are shared by all its pictures, so only a split by subject is honest.

How an event gets its class: in an `ear` event a head comes near slowly and snaps back, in a `tail` event it snaps near
and goes back slowly. One is the other played backwards: no frame, and no set of frames out of order, tells them apart.
A sequence's score j is 2 * (pain of its animal at its moment + noise), drawn as the j-th part of a face, in thirds.

    dreamer/patient_PP_QQ/        sequence QQ of patient PP: transitions_dataset.json, ft1/ and ft2/ with grey frames of
                                  64 px; a few in awkward forms (backslashes, extra keys, RGB, a dict instead of a list,
                                  missing at2 or action, NaN, a wild value, a normalization_stats.json to be ignored)
    dreamer/patient_map.json      {folder: patient}
    dreamer/ground_truth.json     the rule by which motions and poses hang together, and the quirks

Each patient is a volume: an anatomy that all share, bent and scaled a little, under a speckle of his own. A frame is
the slice at the pose at1 = (x, y, z, roll, pitch, yaw) in mm and degrees, R = Rz Ry Rx, 0 = the view to be found; poses
follow smooth paths, and --motions says how at2 follows from at1 and the motion.

Axes: N pictures or transitions, A raters, P properties, R ratings, H x W pixels.
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
FRAME_RATES, VIDEO_SIZES = (15.0, 14.9937, 12.0, 12.5, 13.333), ((128, 96), (112, 112), (128, 112))
SLOT_SEC, N_SLOTS = 3.6, 5  # an event's motion fills its slot; what the manifest calls the event lies in its middle
SLOW_SHARE = 0.85  # of a period: the slow way; the way back takes the rest
IDLE = {"behavior": None, "period_sec": 1.0, "phase": 0.0}
N_GROUPS, BUSY_PAIR = 8, (1, 2)  # pens; the two animals of each with most tail events
OTHER_PAIRS = [pair for pair in itertools.permutations((1, 2, 3, 4), 2) if pair != BUSY_PAIR]
PARTS = {"train": (1, 2, 3, 4), "val": (5, 6), "test": (7, 8)}  # groups
SPELLINGS = {"ear": ("ear", "Ear", "EAR"), "tail": ("tail", "TAIL", "Tail", "tail/teat?", "tailhead")}
LEAK_KINDS = ("shared_groups", "shared_videos", "shared_events", "duplicates", "overlapping_windows")
PLANTED = {  # what plant_leaks puts into leaky_*.csv, which differ from train, val and test.csv in nothing else
    "train-val": dict(zip(LEAK_KINDS, (0, 0, 0, 2, 0))), "train-test": dict(zip(LEAK_KINDS, (2, 2, 0, 0, 1))),
    "val-test": dict(zip(LEAK_KINDS, (1, 0, 3, 0, 0))), "train": {"overlapping_windows": 2, "repeated_rows": 2},
    "test": {"windows_past_the_end": 3}}
MOMENT_PAIN = {"M0": 0.15, "M1": 0.40, "M2": 0.75, "M3": 0.55, "M4": 0.25}  # of the greatest pain, in the mean
ACTION_UNITS = ("Orbital_tightening", "Brow_tension", "Ears_backward", "Cheek_tension", "Mouth_strain", "Head_low",
                "Nostril_muzzle")
TRUTH_FILE = "ground_truth.json"
EXIF_ORIENTATION = 0x0112


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS), help="which script the data are for")
    add("--output_dir", type=Path, default=Path("sample_data"), help="the data go to TASK in it")
    add("--n_samples", "--n_images", type=common.bounded(int, 30, 9999),
        help="number of pictures, clips or transitions (default: each task's own)")
    add("--motions", choices=MOTIONS, default=MOTIONS[0], help="dreamer: at2 = at1 + motion, T(motion) T(at1), or "
        "T(at1) T(motion)")
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


# ---------------------------------------------------------------------------
# Clips of behaviour
# ---------------------------------------------------------------------------
# Videos of a pen: one animal nods at another without pause, in a rhythm whose direction in time is the behaviour.


def nearness(phase, behavior):
    """How near the head is, 0 to 1, at a phase in periods; None: the idle rhythm, the same in both directions."""
    if behavior is None:
        return 0.5 - 0.5 * math.cos(2 * math.pi * phase)
    phase = phase % 1 if behavior == "ear" else -phase % 1
    return phase / SLOW_SHARE if phase < SLOW_SHARE else (1 - phase) / (1 - SLOW_SHARE)


def plan_videos(n_events, rng):
    """Dicts of group, day, camera, file, fps, size (W, H), start and delay of the camera (s), slots with an event."""
    n_videos = max(N_GROUPS, -(-n_events // N_SLOTS))
    videos = []
    for v in range(n_videos):
        turn, group = divmod(v, N_GROUPS)
        day, suffix, n_filled = turn // 2 + 1, ("mp4", "avi")[(v + turn) % 2], (n_events + n_videos - 1 - v) // n_videos
        videos.append({
            "group": group + 1, "day": day, "camera": 8, "fps": FRAME_RATES[v % len(FRAME_RATES)],
            "file": f"Group {group + 1} Day {day}/Cam 8/N{860 + v}_ch8_main.{suffix}", "size": VIDEO_SIZES[v % 3],
            "start": 6 * 3600 + 600 * (turn % 2) + 5, "delay": 0.0,
            "slots": sorted(rng.permutation(N_SLOTS)[:n_filled].tolist())})
    return videos


def plan_events(videos, rng):
    """Dicts of one event each, video by video: in each pen a quarter are tail, most of these by one pair of animals."""
    places = [(video, slot) for video in videos for slot in video["slots"]]
    in_pen = [[i for i, (video, _) in enumerate(places) if video["group"] == g + 1] for g in range(N_GROUPS)]
    tails = set(itertools.chain(*(rng.permutation(rows)[:round(len(rows) / 4)].tolist() for rows in in_pen)))
    events = []
    for i, ((video, slot), draw) in enumerate(zip(places, rng.random((len(places), 5)))):
        behavior = "tail" if i in tails else "ear"
        is_busy = draw[0] < (0.8 if behavior == "tail" else 0.1)
        pair = BUSY_PAIR if is_busy else OTHER_PAIRS[int(draw[1] * len(OTHER_PAIRS))]
        duration = round(1.5 + 0.9 * draw[2], 2)
        middle = slot * SLOT_SEC + SLOT_SEC / 2
        events.append({
            "video": video, "slot": slot, "behavior": behavior, "duration": 0 if i % 9 == 5 else duration,
            "offset": round(middle - (0 if i % 9 == 5 else duration / 2), 3),
            "pair": tuple(100 * video["group"] + animal for animal in pair),
            "period_sec": 0.8 + 0.3 * float(draw[3]), "phase": float(draw[4])})
    return events


def draw_pen(size, rng):
    """(H, W, 3) uint8 background of a pen: blurred discs under a fixed grain."""
    picture = np.asarray(draw_background(size, rng), float)
    return (picture * 0.8 + rng.normal(0, 9, picture.shape)).clip(0, 255).round().astype(np.uint8)


def render_video(folder, video, events, seed):
    """Write one video with the events that it holds; `seed` decides looks and places, never the rhythm."""
    import cv2
    rng, by_slot = np.random.default_rng(seed), {event["slot"]: event for event in events}
    (width, height), fps, path = video["size"], video["fps"], folder / video["file"]
    pen, colours = draw_pen((width, height), rng), rng.integers([150, 30], [256, 90], (3, 2)).T.tolist()
    places = rng.uniform([0.35, 0.4, 0], [0.65, 0.6, 2 * np.pi], (N_SLOTS, 3))  # of the other animal; direction
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter_fourcc(*("mp4v" if path.suffix == ".mp4" else "MJPG"))
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, fps, (width, height))
    if not writer.isOpened():
        raise common.UserError(f"OpenCV {cv2.__version__} cannot write {path}: it was built without FFmpeg")
    for i in range(math.floor((N_SLOTS * SLOT_SEC + video["delay"]) * fps)):
        time_sec = i / fps - video["delay"]
        slot = min(max(int(time_sec / SLOT_SEC), 0), N_SLOTS - 1)
        event = by_slot.get(slot, IDLE)
        near = nearness((time_sec - slot * SLOT_SEC) / event["period_sec"] + event["phase"], event["behavior"])
        writer.write(draw_nod(pen.copy(), places[slot], near, colours))
    writer.release()


def draw_nod(picture, place, near, colours):
    """Draw the other animal, and the head `near` of 0 to 1 to it, the nearer the larger, into (H, W, 3) uint8 BGR."""
    import cv2
    side, sub = min(picture.shape[:2]), 16  # cv2 takes positions in sixteenths of a pixel
    x, y, angle = place[0] * picture.shape[1], place[1] * picture.shape[0], place[2]
    reach, radius = side * (0.16 + 0.20 * (1 - near)), side * (0.09 + 0.07 * near)
    head = x + reach * math.cos(angle), y + reach * math.sin(angle)
    for centre, size, colour in (((x, y), side * 0.10, colours[1]), (head, radius, colours[0])):
        at = tuple(round(value * sub) for value in centre)
        cv2.circle(picture, at, round(size * sub), colour, -1, cv2.LINE_AA, 4)
    return picture


# ---------------------------------------------------------------------------
# Event manifests
# ---------------------------------------------------------------------------
# Tables as they are found: Windows paths, times and dates in several spellings, labels in nine, some durations of 0.


def clock(seconds, is_padded):
    """06:00:25, or 6:00:25, of seconds since midnight."""
    hour, minute, second = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hour:0{2 if is_padded else 1}d}:{minute:02d}:{second:02d}"


def manifest_row(number, event):
    """One row with the header of the published studies; the number decides how things are written."""
    video, spelling, month_day = event["video"], SPELLINGS[event["behavior"]], f"7/{event['video']['day'] + 5}/2024"
    start, name = video["start"] + event["offset"], Path(video["file"]).name
    folder = "\\".join(["E:", "Some study 2024", *Path(video["file"]).parent.parts])
    written = name.upper() if number % 10 == 7 else name
    return {
        "event_idx": number, "group": video["group"], "day": video["day"],
        "date": (f"{month_day} 0:00", "", month_day)[number % 3], "start_time": clock(start, number % 2 == 0),
        "end_time": clock(start + event["duration"], number % 4 < 2), "duration_sec": event["duration"],
        "behavior": spelling[number % 7 % len(spelling)], "initiator_id": event["pair"][0],
        "receiver_id": event["pair"][1], "ended_by": ("initiator", "receiver", "")[number % 3],
        "pen_location": ("trough", "bedding")[number % 2], "linked": "no", "camera_id": video["camera"],
        "video_filename": written, "video_path": f"{folder}\\{written}", "event_offset_sec": event["offset"]}


def write_manifests(folder, parts):
    """Write {name: events} as CSV; the same event has the same row in each."""
    folder.mkdir()
    numbers = {}
    for name, events in parts.items():
        rows = [manifest_row(numbers.setdefault(id(event), len(numbers) + 1), event) for event in events]
        common.write_table(folder / f"{name}.csv", rows)
    common.write_json(folder / "label_map.json", {text: label for label in SPELLINGS for text in SPELLINGS[label]})


def plant_leaks(folder, parts, seed):
    """{part: its events with leaks}; writes the two more videos that these take. Counts: PLANTED."""
    leaky = {part: list(events) for part, events in parts.items()}

    def by_video(part, group):  # the events of the first video of a group, those with a duration first
        video = next(event["video"] for event in parts[part] if event["video"]["group"] == group)
        return sorted((e for e in parts[part] if e["video"] is video), key=lambda e: (e["duration"] == 0, e["slot"]))

    for group in (7, 8):  # two test videos: one of their events is trained on
        moved = by_video("test", group)[-1]
        leaky["test"] = [event for event in leaky["test"] if event is not moved]
        leaky["train"].append(moved)
    for event in (by_video("test", 7)[0], by_video("train", 1)[0], by_video("train", 2)[0]):  # overlapping windows
        leaky["train"].append(event | {"offset": round(event["offset"] + 1, 3)})
    leaky["train"] += by_video("train", 3)[:2]  # rows repeated on purpose

    seen = by_video("val", 5)  # events of a validation video, tested on as another camera saw them
    side = {"camera": 3, "delay": 1.5, "start": seen[0]["video"]["start"] - 1.5,
            "file": f"Group 5 Day 1/Cam 3/{Path(seen[0]['video']['file']).stem.replace('ch8_main', 'ch3_side')}.avi"}
    side = seen[0]["video"] | side
    render_video(folder, side, seen, [seed, 4])
    leaky["test"] += [event | {"video": side, "offset": round(event["offset"] + 1.5, 3)} for event in seen[:3]]

    source = by_video("train", 4)  # a training video lies in a validation group once more, under another name
    name = Path(source[0]["video"]["file"])
    copy = source[0]["video"] | {"group": 6, "day": 9, "file": f"Group 6 Day 9/Cam 8/N899_ch8_main{name.suffix}"}
    (folder / copy["file"]).parent.mkdir(parents=True)
    shutil.copyfile(folder / name, folder / copy["file"])
    leaky["val"] += [event | {"video": copy, "pair": (603, 604)} for event in source[:2]]
    late = by_video("test", 8)[:3]
    leaky["test"] += [event | {"offset": event["offset"] + 1000} for event in late]
    return {f"leaky_{part}": events for part, events in leaky.items()}


def make_events(folder, n_events, seed):
    """Videos and manifests; returns what there is to know of them."""
    rng = np.random.default_rng([seed, 2])
    videos = plan_videos(n_events, rng)
    events = plan_events(videos, rng)
    for v, video in enumerate(videos):
        render_video(folder / "videos", video, [event for event in events if event["video"] is video], [seed, 3, v])
    junk = folder / "videos" / videos[0]["file"]
    junk.with_name(f"._{junk.name}").write_bytes(b"Mac OS X")
    parts = {part: [e for e in events if e["video"]["group"] in groups] for part, groups in PARTS.items()}
    leaky = plant_leaks(folder / "videos", parts, seed)
    write_manifests(folder / "manifests", {"all": events, **parts, **leaky})
    tails = [event for event in events if event["behavior"] == "tail"]
    busy = [event for event in events if event["pair"][0] % 100 == 1 and event["pair"][1] % 100 == 2]
    return {
        "rule": "ear: near slowly, back at once; tail: near at once, back slowly; each the other backwards",
        "n_events": len(events), "n_videos": len(videos), "n_tail": len(tails), "n_zero_duration":
            sum(event["duration"] == 0 for event in events), "groups": PARTS,
        "confound": {"pairs": "initiator 100 * group + 1, receiver 100 * group + 2", "n_events": len(busy),
                     "n_tail": sum(event["behavior"] == "tail" for event in busy)},
        "planted_leaks": PLANTED}


# ---------------------------------------------------------------------------
# Sequences with scores
# ---------------------------------------------------------------------------
# Folders of frames of a face whose seven parts show the seven scores; pain depends on the moment and on the animal.


def plan_sequences(n_animals, rng):
    """(animal (N,), moment (N,), true scores (N, 7) in 0 to 2): each animal at each moment."""
    animal, moment = np.divmod(np.arange(n_animals * len(MOMENT_PAIN)), len(MOMENT_PAIN))
    pain = np.array(list(MOMENT_PAIN.values()))[moment] + rng.normal(0, 0.10, n_animals)[animal]
    pain = (pain + rng.normal(0, 0.15, len(animal)))[:, None]  # (N, 1)
    scores = 2 * (pain + rng.normal(0, 0.18, (len(animal), len(ACTION_UNITS)))).clip(0, 1)  # (N, 7)
    return animal, moment, scores


def draw_grimace(scores, looks, side, rng):
    """(side, side, 3) uint8 RGB face; scores: 7 in 0 to 2, each drawn in a part of its own."""
    import cv2
    eye, brow, ear, cheek, mouth, low, nostril = np.asarray(scores) / 2  # in the order of ACTION_UNITS
    picture = np.full((192, 192, 3), looks["ground"], np.uint8)
    cx, cy = (96 + rng.normal(0, 1.5, 2) + [0, 34 * (low - 0.5)]).round().astype(int).tolist()
    skin, dark = looks["skin"], (30, 22, 20)
    for s in (-1, 1):
        tip = (cx + s * 78, round(cy - 40 + 50 * (ear - 0.5)))
        cv2.fillPoly(picture, [np.array([(cx + s * 28, cy - 44), (cx + s * 46, cy - 14), tip])], looks["ear"])
    cv2.ellipse(picture, (cx, cy), (48, 64), 0, 0, 360, skin, -1)
    for s in (-1, 1):
        cv2.circle(picture, (cx + s * 34, cy + 12), 10, tuple(round(c * (1 - 0.6 * cheek)) for c in skin), -1)
        cv2.ellipse(picture, (cx + s * 22, cy - 16), (13, round(2 + 11 * (1 - eye))), 0, 0, 360, dark, -1)
        inner, outer = (cx + s * 8, round(cy - 42 + 16 * brow)), (cx + s * 36, round(cy - 38 - 6 * brow))
        cv2.line(picture, inner, outer, dark, 5)
        cv2.circle(picture, (cx + s * 9, cy + 28), round(2 + 5 * nostril), dark, -1)
    cv2.line(picture, (cx - 22, cy + 48), (cx + 22, cy + 48), (150, 40, 50), round(3 + 13 * mouth))
    picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    return (picture + rng.normal(0, 3, picture.shape)).clip(0, 255).round().astype(np.uint8)


def render_sequence(folder, scores, looks, rng):
    """Write 8 to 40 frames as JPEG, numbered without padding; returns their number."""
    import cv2
    folder.mkdir(parents=True)
    side, n_frames = int(rng.integers(64, 97)), int(rng.integers(8, 41))
    for i in range(n_frames):
        pixels = draw_grimace((scores + rng.normal(0, 0.04, len(scores))).clip(0, 2), looks, side, rng)
        code = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
        (folder / f"frame {i + 1}.jpg").write_bytes(code.tobytes())
    return n_frames


def sequence_row(path, number, animal, moment, n_frames, scores, rng):
    """One row with the header of the published study: parts in thirds (a few missing), total, NRS, VAS."""
    parts = (scores * 3).round() / 3
    total = float(np.clip(parts.sum() + rng.choice([-0.5, 0, 0, 0, 0.5]), 0, 14))
    row = {"sequence_path": path, "animal": animal, "moment": moment, "sequence_id": number, "num_frames": n_frames}
    row |= {name: None if rng.random() < 0.03 else round(float(part), 4) for name, part in zip(ACTION_UNITS, parts)}
    nrs, vas = 1 + 9 * total / 14 + rng.normal(0, 0.5), 100 * total / 14 + rng.normal(0, 6)
    return row | {"NRS (1-10)": round(float(np.clip(nrs, 1, 10))), "VAS (0-100)": round(float(np.clip(vas, 0, 100))),
                  "Total.Facial.scale": round(total, 4)}


def write_folds(folder, animals):
    """Four folds of the animals in the three spellings that are found: a list, keys fold_0 ..., a text of Python."""
    held_out = [animals[k::4] for k in range(4)]
    folds = [{"fold": k, "train_animals": [animal for animal in animals if animal not in out], "val_animals": out}
             for k, out in enumerate(held_out)]
    common.write_json(folder / "cv_list.json", {"cv_folds": folds})
    common.write_json(folder / "cv_keys.json", {f"fold_{fold['fold']}": fold for fold in folds})
    common.write_json(folder / "cv_text.json", {"cv_folds": str(folds)})


def make_sequences(folder, n_animals, seed):
    """Frame folders, their scores as CSV and as JSON, folds; returns what there is to know of them."""
    animal, moment, scores = plan_sequences(n_animals, np.random.default_rng([seed, 5]))
    names, rows = list(MOMENT_PAIN), []
    for i, (a, m) in enumerate(zip(animal.tolist(), moment.tolist())):
        rng = np.random.default_rng([seed, 6, i])
        tones = np.random.default_rng([seed, 7, a]).integers([140, 90, 40], [230, 170, 120], (3, 3)).T.tolist()
        looks = dict(zip(("skin", "ear", "ground"), tones))
        path = f"sequences/Animal {a + 1} {names[m]} visit {1 + i % 2}"
        n_frames = render_sequence(folder / path, scores[i], looks, rng)
        rows.append(sequence_row(path, i + 1, a + 1, names[m], n_frames, scores[i], rng))
    common.write_table(folder / "sequences.csv", rows)
    spelled = {"animal": "animal_id", "Total.Facial.scale": "Total_Facial_scale"}
    texts = [{spelled.get(key, key): value for key, value in row.items()} for row in rows]
    texts = [row | {"sequence_id": f"tensor({row['sequence_id']})"} for row in texts]
    common.write_json(folder / "sequences.json", {"sequences": texts})
    write_folds(folder, list(range(1, n_animals + 1)))
    return {"n_sequences": len(rows), "n_animals": n_animals, "moment_pain": MOMENT_PAIN, "action_units": ACTION_UNITS,
            "true_scores": {row["sequence_path"]: each.round(4).tolist() for row, each in zip(rows, scores)}}


def make_video(folder, n_events, seed):
    """Events in videos, and sequences of frames with scores, an animal for ten events; returns the ground truth."""
    return {"events": make_events(folder, n_events, seed),
            "sequences": make_sequences(folder, max(4, n_events // 10), seed)}


# ---------------------------------------------------------------------------
# Bicycles
# ---------------------------------------------------------------------------
# A bicycle is drawn part by part; the state of a part decides how, its street gives the background.

# part: (x, y, half width, half height), the wheels at -1 and 1, y downwards
PART_PLACES = {
    "back_wheel": (-1.0, 0.0, 0.62, 0.62), "front_wheel": (1.0, 0.0, 0.62, 0.62), "chain": (-0.45, 0.04, 0.50, 0.13),
    "saddle": (-0.55, -1.02, 0.30, 0.13), "steer": (0.70, -1.12, 0.30, 0.20), "front_light": (1.12, -0.72, 0.14, 0.14),
    "back_light": (-1.60, -0.55, 0.13, 0.13), "kickstand": (-0.15, 0.52, 0.13, 0.30)}
PART_STATES, STATE_SHARES = ("intact", "damaged", "absent", "occluded"), (0.62, 0.14, 0.13, 0.11)
PART_COLOURS = {"back_wheel": (30, 30, 34), "front_wheel": (30, 30, 34), "chain": (70, 72, 78), "saddle": (60, 34, 22),
                "steer": (150, 155, 165), "front_light": (250, 240, 170), "back_light": (210, 20, 30),
                "kickstand": (120, 124, 130)}
FRAME_TUBES = (((-1, 0), (-0.5, -0.8)), ((-0.5, -0.8), (0.7, -0.8)), ((0.7, -0.8), (1, 0)), ((-1, 0), (-0.1, 0.05)),
               ((-0.1, 0.05), (-0.55, -0.95)), ((-0.1, 0.05), (0.7, -0.8)), ((0.7, -0.8), (0.66, -1.0)))
RUST, LEAVES = (170, 84, 30), (46, 104, 40)
UNTRUSTED, EMPTY, SUFFIXLESS, ZERO_BOX, OVER_EDGE = 5, 9, 3, 11, 13  # rows of annotations.json with a quirk


def draw_part(draw, part, box, state, width):
    """One part in its box (x1, y1, x2, y2), rusty where damaged; nothing where absent."""
    colour = RUST if state == "damaged" else PART_COLOURS[part]
    x1, y1, x2, y2 = box
    if part.endswith("wheel"):
        draw.ellipse(box, outline=colour, width=2 * width)
        for angle in np.arange(0, np.pi, np.pi / 5):
            reach = np.array([np.cos(angle), np.sin(angle)]) * (x2 - x1) / 2
            centre = np.array([x1 + x2, y1 + y2]) / 2
            draw.line([*(centre - reach), *(centre + reach)], fill=colour, width=1)
    elif part == "steer":
        draw.line([x1, y1 + width, (x1 + x2) / 2, y2 - width, x2, y1 + width], fill=colour, width=3 * width)
    elif part == "kickstand":
        draw.line([x2 - width, y1, x1 + width, y2], fill=colour, width=2 * width)
    elif part == "saddle":
        draw.polygon([(x1, y1), (x2, y1 + (y2 - y1) * 0.3), (x2, y2), (x1, y2)], fill=colour)
    elif part == "chain":
        draw.rounded_rectangle(box, (y2 - y1) / 2, outline=colour, width=2 * width)
    else:
        draw.ellipse(box, fill=colour, outline=(20, 20, 20))
    if state == "damaged":
        x, y = np.linspace(x1, x2, 7), np.where(np.arange(7) % 2, y1 + (y2 - y1) * 0.25, y2 - (y2 - y1) * 0.25)
        draw.line(list(zip(x.tolist(), y.tolist())), fill=(250, 150, 60), width=2 * width)


def draw_bicycle(states, street, size, rng):
    """((H, W, 3) uint8, {part: box (4,) x1 y1 x2 y2}) of a bicycle with these states; every second one is mirrored."""
    from PIL import Image, ImageDraw
    wide, high = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    picture = draw_background((wide, high), np.random.default_rng(street))
    draw, unit = ImageDraw.Draw(picture), wide / 4.4 * rng.uniform(0.85, 1.05)
    origin = np.array([wide / 2, high * 0.58]) + rng.uniform(-0.06, 0.06, 2) * [wide, high]
    mirror, width = rng.choice([-1, 1]), max(2, int(unit / 28))

    def place(x, y):
        return tuple(origin + np.array([mirror * x, y]) * unit)
    frame = tuple(int(c) for c in hue_to_rgb(rng.uniform(), 0.6, 0.6))
    for start, end in FRAME_TUBES:
        draw.line([*place(*start), *place(*end)], fill=frame, width=3 * width)
    boxes = {}
    for part, (x, y, half_x, half_y) in PART_PLACES.items():
        (x1, y1), (x2, y2) = place(x - half_x, y - half_y), place(x + half_x, y + half_y)
        box = [min(x1, x2), y1, max(x1, x2), y2]
        boxes[part] = [value / SUPERSAMPLE for value in box]
        if states[part] != "absent":
            draw_part(draw, part, box, states[part], width)
    for part in (part for part in PART_PLACES if states[part] == "occluded"):
        x1, y1, x2, y2 = np.array(boxes[part]) * SUPERSAMPLE
        for cx, cy in rng.uniform([x1, y1], [x2, y2], (9, 2)):
            reach = 0.22 * max(x2 - x1, y2 - y1) * rng.uniform(0.7, 1.2)
            draw.ellipse([cx - reach, cy - 0.6 * reach, cx + reach, cy + 0.6 * reach], fill=LEAVES)
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), float) + rng.normal(0, 2.5, (*size[::-1], 3))
    return pixels.clip(0, 255).round().astype(np.uint8), boxes


def part_entry(row, part, box, state, rng):
    """One part as part annotations write it; every third row says the state as a number, every fourth has no trust."""
    left, top, right, bottom = (round(value, 1) for value in box)
    entry = {"absolute_bounding_box": {"left": left, "top": top, "width": round(right - left, 1),
                                       "height": round(bottom - top, 1)}}
    entry |= {"object_state_class": PART_STATES.index(state)} if row % 3 == 2 else {"object_state": state}
    return entry | ({"trust": round(float(rng.uniform(0.6, 1)), 2)} if row % 4 else {})


def part_annotations(bicycles, rng):
    """{image: {image, parts}} of [dict of name, size, street, states, boxes], with the quirks put in."""
    content = {}
    for row, made in enumerate(bicycles):
        parts = {part: part_entry(row, part, made["boxes"][part], made["states"][part], rng) for part in PART_PLACES}
        if row == UNTRUSTED:
            parts["saddle"] |= {"trust": 0.2, "absolute_bounding_box": {"left": 2, "top": 2, "width": 9, "height": 9}}
        if row == ZERO_BOX:
            parts["chain"] |= {"object_state": "intact", "object_state_class": 0,
                               "absolute_bounding_box": {"left": 30, "top": 40, "width": 0, "height": 12}}
        if row == OVER_EDGE:
            parts["back_wheel"]["absolute_bounding_box"]["height"] += 400
        width, height = made["size"]
        content[made["name"].removesuffix(".jpg") if row == SUFFIXLESS else made["name"]] = {
            "image": {"height": height, "width": width}, "street": f"street {made['street']}",
            "note": "CONTROL", "parts": {} if row == EMPTY else parts}
    return content


def coco_annotations(bicycles, leave_out):
    """COCO of these bicycles without the part `leave_out`; image ids from 0 with gaps, the state under three names."""
    names = [part for part in PART_PLACES if part != leave_out]
    categories = [{"id": 3 * k, "name": part} for k, part in enumerate(names)]
    made = {"images": [], "annotations": [], "categories": categories}
    for row, each in enumerate(bicycles):
        made["images"].append({"id": 7 * row, "file_name": each["name"], "street": f"street {each['street']}",
                               **dict(zip(("width", "height"), each["size"]))})
        for k, part in enumerate(names):
            (x1, y1, x2, y2), state = each["boxes"][part], each["states"][part]
            said = ({"state": state}, {"state_id": PART_STATES.index(state)}, {"attributes": {"state": state}})[row % 3]
            crowd = {"iscrowd": False} if row % 2 else {}
            made["annotations"].append({"id": len(made["annotations"]), "image_id": 7 * row, "category_id": 3 * k,
                                        "bbox": [round(v, 1) for v in (x1, y1, x2 - x1, y2 - y1)], **said, **crowd})
    return made


def make_detector(folder, n_images, seed):
    """Bicycles, their annotations in both formats and what was drawn, in `folder`; returns the ground truth."""
    from PIL import Image
    rng = np.random.default_rng([seed, 2])
    (folder / "images").mkdir()
    n_streets, bicycles = max(5, n_images // 6), []
    for row in range(n_images):
        own = np.random.default_rng([seed, 3, row])
        states = dict(zip(PART_PLACES, own.choice(PART_STATES, len(PART_PLACES), p=STATE_SHARES).tolist()))
        size = (int(own.integers(220, 281)), int(own.integers(170, 211)))
        pixels, boxes = draw_bicycle(states, [seed, 4, row % n_streets], size, own)
        Image.fromarray(pixels).save(folder / "images" / f"{row}.jpg", quality=90)
        bicycles.append({"name": f"{row}.jpg", "size": size, "street": row % n_streets, "states": states,
                         "boxes": boxes})
    text = json.dumps(part_annotations(bicycles, rng), indent=1).replace("CONTROL", "seen\tat\x07 dusk")
    (folder / "annotations.json").write_text(text, encoding="utf-8")
    held_out = [each for each in bicycles if each["street"] >= n_streets - max(1, n_streets // 5)]
    trained = [each for each in bicycles if each not in held_out]
    common.write_json(folder / "train_coco.json", coco_annotations(trained, None))
    common.write_json(folder / "val_coco.json", coco_annotations(held_out, "kickstand"))
    quirks = {"untrusted": UNTRUSTED, "no_parts": EMPTY, "no_suffix": SUFFIXLESS, "zero_box": ZERO_BOX,
              "over_edge": OVER_EDGE}
    return {"parts": list(PART_PLACES), "states": list(PART_STATES), "group_column": "street",
            "quirks": {name: f"{row}.jpg" for name, row in quirks.items()},
            "drawn": {each["name"]: {part: [each["states"][part], *np.round(each["boxes"][part], 1).tolist()]
                                     for part in PART_PLACES} for each in bicycles}}


# ---------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------
# A frame is what a plane at a 6-DoF pose cuts out of a patient's volume; poses go smoothly from view to view.

MOTIONS = ("additive", "se3_left", "se3_right")
REACH = np.array([12.0, 12.0, 12.0, 20.0, 20.0, 20.0])  # of a path about the view to be found, mm and degrees
FRAME_SIDE, FRAME_MM, PER_SEQUENCE = 64, 64.0, 25
N_SHARED, N_OWN = 24, 16  # blobs of the anatomy, and those that mean nothing


def euler_matrix(angles):
    """(..., 3) roll, pitch, yaw in degrees -> (..., 3, 3) R = Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = (np.moveaxis(f(np.deg2rad(angles)), -1, 0) for f in (np.cos, np.sin))
    return np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr, sy * cp, sy * sp * sr + cy * cr,
                     sy * sp * cr - cy * sr, -sp, cp * sr, cp * cr], -1).reshape(*np.shape(angles)[:-1], 3, 3)


def euler_angles(matrix):
    """(..., 3, 3) -> (..., 3) roll, pitch, yaw in degrees, for pitches under 90 degrees."""
    return np.rad2deg(np.stack([np.arctan2(matrix[..., 2, 1], matrix[..., 2, 2]), np.arcsin(-matrix[..., 2, 0]),
                                np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])], -1))


def motion_between(at1, at2, motions):
    """(N, 6), (N, 6) poses -> (N, 6) motions by the rule that `motions` names."""
    if motions == "additive":
        return at2 - at1
    first, second = euler_matrix(at1[:, 3:]), euler_matrix(at2[:, 3:])
    back = first.transpose(0, 2, 1)
    turn = second @ back if motions == "se3_left" else back @ second
    moved = turn @ at1[:, :3, None] if motions == "se3_left" else at1[:, :3, None]
    shift = at2[:, :3, None] - moved  # (N, 3, 1)
    shift = shift if motions == "se3_left" else back @ shift
    return np.hstack([shift[..., 0], euler_angles(turn)])


def make_anatomy(rng):
    """What all patients share: blobs (centre mm, radii mm, brightness)."""
    return make_blobs(N_SHARED, (6, 14), (60, 140), rng)


def make_blobs(count, radii, lifts, rng):
    """(centres (K, 3) mm, radii (K, 3) mm, brightness (K,)) of Gaussian blobs, two thirds of them bright."""
    signs = rng.choice([-1, 1, 1], count)
    return rng.uniform(-34, 34, (count, 3)), rng.uniform(*radii, (count, 3)), rng.uniform(*lifts, count) * signs


def make_patient(rng):
    """How one patient differs: bend (3, 3) near the identity, shift (3,) mm, gain, blobs of his own, speckle seed."""
    return (np.eye(3) + rng.normal(0, 0.02, (3, 3)), rng.normal(0, 0.5, 3), rng.uniform(0.7, 1.3),
            make_blobs(N_OWN, (3, 7), (20, 60), rng), int(rng.integers(2 ** 31)))


def cut_slice(pose, anatomy, patient):
    """(H, W) uint8 slice at a pose (6,): blobs over tissue that brightens with depth, and speckle."""
    bend, shift, gain, own, speckle = patient
    u = (np.arange(FRAME_SIDE) + 0.5) / FRAME_SIDE * FRAME_MM - FRAME_MM / 2
    plane = np.stack([*np.meshgrid(u, u), np.zeros((FRAME_SIDE, FRAME_SIDE))], -1)  # (H, W, 3) mm, in the probe's frame
    points = (plane @ euler_matrix(pose[3:]).T + pose[:3]) @ bend.T + shift
    grey = 75 + 0.5 * points[..., 1]
    for centre, radius, lift in (*zip(*anatomy), *zip(*own)):
        grey += lift * np.exp(-0.5 * np.square((points - centre) / radius) @ np.ones(3))
    cell = np.floor(points / 2.0).astype(np.int64) @ np.array([73856093, 19349663, 83492791]) + speckle
    noise = np.sin(cell * 12.9898) * 43758.5453 % 1  # the same cell of tissue has the same speckle in every slice
    return (gain * grey * (0.85 + 0.3 * noise)).clip(0, 255).astype(np.uint8)


def make_path(n_poses, rng):
    """(N, 6) poses on a smooth path: two sines of different wavelengths an axis, within REACH."""
    turns = np.arange(n_poses)[:, None] / rng.uniform(9, 16, 6) + rng.uniform(0, 1, 6)
    slow = np.arange(n_poses)[:, None] / rng.uniform(25, 45, 6) + rng.uniform(0, 1, 6)
    return REACH * (0.55 * np.sin(2 * np.pi * turns) + 0.45 * np.sin(2 * np.pi * slow))


def write_sequence(folder, poses, pictures, motions, quirk):
    """One folder: its frames (N + 1, H, W), and N transitions between them, in the awkward form that `quirk` names."""
    from PIL import Image
    names = [f"frames_{folder.name.removeprefix('patient_')}_{i:04d}" for i in range(len(poses))]
    motion = motion_between(poses[:-1], poses[1:], motions)
    slash, rows = "\\" if quirk == "backslashes" else "/", []
    for which, first in (("ft1", 0), ("ft2", 1)):
        (folder / which).mkdir(parents=True)
        for i in range(first, first + len(motion)):
            picture = Image.fromarray(pictures[i])
            (picture.convert("RGB") if quirk == "rgb" else picture).save(folder / which / f"{names[i]}.png")
    for i, step in enumerate(motion):
        rows.append({"frame_t1": names[i], "frame_t2": names[i + 1],
                     "ft1_image_path": f"ft1{slash}{names[i]}.png", "ft2_image_path": f"ft2{slash}{names[i + 1]}.png",
                     "at1_6dof": poses[i].tolist(), "action_change_6dof": step.tolist(),
                     "at2_6dof": poses[i + 1].tolist()})
    if quirk == "extra_keys":
        rows = [{"id": i, "operator": "A", **row} for i, row in enumerate(rows)]
    if quirk in ("no_at2", "no_action"):
        for row in rows[::2]:
            del row["at2_6dof" if quirk == "no_at2" else "action_change_6dof"]
    if quirk == "bad_labels":
        rows[2]["at1_6dof"][1], rows[4]["at2_6dof"][3] = math.nan, 9999.0
    if quirk == "stats_file":
        (folder / "normalization_stats.json").write_text('{"mean": [1e9], "std": [0]}')
    text = json.dumps({"transitions": rows} if quirk == "dict" else rows, indent=1)
    (folder / "transitions_dataset.json").write_text(text)


SLICE_QUIRKS = ("backslashes", "extra_keys", "rgb", "dict", "no_at2", "no_action", "bad_labels", "stats_file")


def make_dreamer(folder, n_transitions, seed, motions):
    """Sequences of slices of several patients in `folder` (which exists and is empty); returns the ground truth."""
    n_sequences = max(6, round(n_transitions / PER_SEQUENCE))
    lengths = [len(part) for part in np.array_split(range(n_transitions), n_sequences)]
    anatomy, patients, quirks = make_anatomy(np.random.default_rng([seed, 0])), {}, {}
    n_patients = max(3, n_sequences // 2)
    for k, length in enumerate(lengths):
        patient, number = k % n_patients, k // n_patients + 1
        name, rng = f"patient_{patient + 1:02d}_{number:02d}", np.random.default_rng([seed, 1, k])
        volume = make_patient(np.random.default_rng([seed, 2, patient]))
        poses = make_path(length + 1, rng)
        quirk = SLICE_QUIRKS[k] if k < len(SLICE_QUIRKS) else None
        frames = [cut_slice(pose, anatomy, volume) for pose in poses]
        write_sequence(folder / name, poses, frames, motions, quirk)
        patients[name], quirks[name] = name[:-3], quirk
    common.write_json(folder / "patient_map.json", patients)
    return {"motions": motions, "angle_unit": "deg", "patients": patients, "quirks": quirks,
            "field_of_view_mm": FRAME_MM, "reach": REACH.tolist()}


TASKS = {  # task: (its maker, default number of samples)
    "assessor": (make_assessor, 120), "video": (make_video, 120), "detector": (make_detector, 60),
    "dreamer": (make_dreamer, 600)}
OPTIONS = {"dreamer": ("motions",)}  # task: flags that its maker takes beside number and seed


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
    maker, n_samples = TASKS[args.task]
    options = {name: getattr(args, name) for name in OPTIONS.get(args.task, ())}
    settings = {"task": args.task, "n_samples": args.n_samples or n_samples, "seed": args.seed, **options}
    if check_folder(folder, settings, args.overwrite):
        print(f"{folder}: already there with these settings, nothing to do")
        return
    draft = args.output_dir / f".{args.task}.new"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    truth = maker(draft, settings["n_samples"], args.seed, **options)
    files = list_files(draft)
    common.write_json(draft / TRUTH_FILE, {"settings": settings, **truth, "files": files})
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    print(f"{folder}: {len(files)} files made; the signal and its ceiling are in {folder / TRUTH_FILE}")


if __name__ == "__main__":
    common.run_main(main)
