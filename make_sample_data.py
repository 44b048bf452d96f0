"""Make small sample data with a known, learnable signal, for a first run and for the tests.

    python make_sample_data.py --task assessor --output_dir sample_data
    python make_sample_data.py --task video --output_dir sample_data
    python make_sample_data.py --task detector --n_samples 90 --seed 7
    python make_sample_data.py --task dreamer

Takes a few seconds. The same flags and package versions give the same files, byte for byte:
    assessor/images/            drawn faces of 200 to 320 px; a few in awkward formats (rotated by EXIF, grey, palette,
                                alpha, 16 bit, .JPG, a name with a space and an umlaut)
    assessor/ratings/           per_image_Slider_mean_sd_from_wide.csv: image, subject, X_mean, X_sd, X_n of 14 ratings;
                                raw_ratings_long.csv, the single ratings: rating, attribute, stimulus, rater
    video/videos/               18 s of one animal that nods at another; MPEG-4 .mp4 and MJPEG .avi, odd frame rates
    video/manifests/            events: all.csv; train, val and test.csv with different groups; label_map.json
    video/sequences/, sequences.csv, cv_folds.json    folders of frames with 9 scores; folds of their animals
    detector/images/            drawn bicycles with 8 parts, each intact, damaged (rusty), absent (not
                                drawn; its box is where it would be) or occluded (by leaves)
    detector/annotations.json   part annotations with quirks: a key without suffix, states as numbers, missing trust,
                                control characters, a box of zero size, a box over the edge, a picture without parts
    detector/train_coco.json, val_coco.json    the same as COCO, other streets in val
    dreamer/patient_PP_QQ/      sequence QQ of patient PP: transitions_dataset.json, and grey frames of 64 px in ft1/
                                and ft2/; a few with quirks (backslashes, a dict for a list, no at2, NaN, an outlier)
    dreamer/patient_map.json    {folder: patient}
    TASK/ground_truth.json      what is true of the data: settings, quirks, true ratings, noise ceiling

Rating j of picture i, on a scale from 1 to 9:
    true[i, j] = 5 + (4 - sqrt(3) * noise_sd[j]) * tanh(sum over properties p of FORMULA[j][p] * property[i, p])
    rating     = true[i, j] + uniform noise of standard deviation noise_sd[j], which never leaves 1 to 9
The ceiling of any model is R2 = var(true) / (var(true) + mean(noise_sd^2 / n)). Properties lie in -1 to 1. All pictures
of a subject share its LOOKS, so only a split by subject is honest.

In an `ear` event a head approaches slowly and snaps back; a `tail` event is the same played backwards. No frame, and no
set of frames without their order, tells the two apart.

A frame of dreamer is the slice of a patient's volume at the pose at1 = (x, y, z, roll, pitch, yaw) in mm and degrees;
the target view is at 0, and at2 = at1 + motion.

Axes: N pictures or transitions, A raters, P properties, R ratings, H x W pixels.
"""
import colorsys
import dataclasses
import datetime
import itertools
import json
import math
import shutil
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageDraw

import common
from readers import part_boxes, probe_poses


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS), help="which script the data are for")
    add("--output_dir", type=Path, default=Path("sample_data"), help="the data go to TASK in this folder")
    add("--n_samples", "--n_images", type=common.bounded(int, 30, 9999),
        help="number of pictures, events or transitions (default: depends on the task)")
    add("--seed", type=common.WHOLE, default=42, help="another seed gives other data")
    return common.parse_arguments(parser, argv)


def generator(*integers):
    """Random numbers that are those of these integers."""
    return np.random.default_rng(integers)


def to_pixels(values):
    """Float array -> uint8, rounded and limited to 0 to 255."""
    return values.clip(0, 255).round().astype(np.uint8)


def photograph(drawing, rng, light=1.0):
    """A drawing at half its size, for smooth edges, in this light and with noise: (H, W, 3) uint8."""
    picture = drawing.resize((drawing.width // 2, drawing.height // 2), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, float) * light
    return to_pixels(pixels + rng.normal(0, 2.5, pixels.shape))


def draw_ellipse(draw, x, y, half_width, half_height, colour):
    """A filled ellipse about (x, y)."""
    draw.ellipse([x - half_width, y - half_height, x + half_width, y + half_height], fill=colour)


# ---------------------------------------------------------------------------
# Faces
# ---------------------------------------------------------------------------
# A face is drawn from its properties alone; position, background and pixel noise are random and carry no signal.

LOOKS = "face_width eye_size hair_height hue_warmth".split()
STATES = "smile brow_anger eye_open mouth_open brightness light_warmth".split()
PROPERTIES = LOOKS + STATES
GREY_ROW = 7
QUIRKS = {  # row: quirk
    3: "exif", GREY_ROW: "grey", 11: "palette", 15: "alpha", 19: "deep", 23: "upper_case", 27: "name"}
ENDINGS = {
    "grey": ".png", "palette": ".png", "alpha": ".png", "deep": ".png", "upper_case": ".JPG", "name": " gr\u00fcn.jpg"}
EXIF_ORIENTATION = 0x0112


def draw_background(size, rng):
    """Picture of `size` (W, H): a dull colour with five blurred discs, lighter or darker."""
    y, x = np.mgrid[0:1:48j, 0:1:48j]
    pixels = np.full((48, 48, 3), rng.uniform(95, 165, 3))
    discs = rng.uniform([0, 0, 0.12, -55], [1, 1, 0.35, 55], (5, 4))
    for cx, cy, radius, lift in discs:
        distance = np.hypot(x - cx, y - cy) / radius
        pixels += lift * np.exp(-0.5 * distance**2)[..., None]
    return Image.fromarray(to_pixels(pixels)).resize(size, Image.Resampling.BICUBIC)


def draw_head(draw, face, cx, cy, unit):
    """Hair and head in two shades of one colour, from blue over green to yellow."""
    half_x = unit * (0.70 + 0.12 * face["face_width"])
    half_y = unit * 0.86
    rgb = colorsys.hsv_to_rgb(0.40 - 0.24 * face["hue_warmth"], 0.34, 0.74)
    skin = tuple(int(255 * value) for value in rgb)
    hair = tuple(int(107 * value) for value in rgb)
    top = cy - half_y * (1.06 + 0.12 * face["hair_height"])
    draw.ellipse([cx - half_x * 1.07, top, cx + half_x * 1.07, cy + half_y * 0.55], fill=hair)
    draw_ellipse(draw, cx, cy + half_y * 0.07, half_x, half_y * 0.93, skin)


def draw_eyes(draw, face, cx, cy, unit):
    """Two eyes, and brows whose inner ends drop with anger."""
    radius = unit * (0.17 + 0.06 * face["eye_size"])
    opening = radius * (0.60 + 0.40 * face["eye_open"])
    y = cy - unit * 0.12
    inner = y - unit * (0.32 - 0.13 * face["brow_anger"])
    outer = y - unit * (0.32 + 0.10 * face["brow_anger"])
    for side in (-1, 1):
        x = cx + side * unit * (0.34 + 0.05 * face["face_width"])
        draw_ellipse(draw, x, y, radius, opening, "#fafafa")
        brow = [x - side * unit * 0.18, inner, x + side * unit * 0.20, outer]
        draw.line(brow, fill="#342830", width=int(unit * 0.085))


def draw_mouth(draw, face, cx, cy, unit):
    """A mouth whose lips follow a parabola (smile); the lower one hangs lower (open)."""
    x = np.linspace(-1, 1, 21)
    middle = cy + unit * (0.42 + 0.20 * face["smile"] * (0.5 - x**2))
    half = unit * (0.12 + 0.08 * face["mouth_open"]) * np.sqrt(1 - x**2)
    across = cx + unit * 0.40 * x
    upper = np.c_[across, middle - 0.6 * half]
    lower = np.c_[across, middle + half]
    outline = np.vstack([upper, lower[::-1]])
    draw.polygon(outline.ravel().tolist(), fill="#69192b")


def draw_face(face, width, height, rng):
    """(H, W, 3) uint8 picture of one face; `face` maps each of PROPERTIES to -1..1."""
    drawing = draw_background((2 * width, 2 * height), rng)
    draw = ImageDraw.Draw(drawing)
    shift_x, shift_y, zoom = rng.uniform([-0.04, 0.0, 0.88], [0.04, 0.06, 0.96])
    side = min(width, height)
    place = (width + 2 * side * shift_x, height + 2 * side * shift_y, side * zoom)
    draw_head(draw, face, *place)
    draw_eyes(draw, face, *place)
    draw_mouth(draw, face, *place)
    light = 1 + face["light_warmth"] * np.array([0.14, 0.02, -0.16])
    return photograph(drawing, rng, light * (1 + 0.30 * face["brightness"]))


def save_picture(pixels, folder, number, quirk):
    """Write one picture (H, W, 3) uint8, in the awkward format that `quirk` names; returns its file name."""
    name = f"face_{number:04d}{ENDINGS.get(quirk, '.jpg')}"
    if quirk == "deep":
        import cv2
        deep = pixels[..., ::-1].astype(np.uint16) * 257  # the same picture on 0 to 65535, BGR
        cv2.imwrite(str(folder / name), deep)
        return name
    picture = Image.fromarray(pixels)
    exif = b""
    if quirk == "grey":
        picture = picture.convert("L")
    elif quirk == "palette":
        picture = picture.quantize(128)
    elif quirk == "alpha":
        alpha = np.full(pixels.shape[:2], 255, np.uint8)
        alpha[:9] = 0
        picture.putalpha(Image.fromarray(alpha))
    elif quirk == "exif":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6  # viewers turn it back
    picture.save(folder / name, quality=90, exif=exif)
    return name


# ---------------------------------------------------------------------------
# Ratings
# ---------------------------------------------------------------------------
# Subjects have looks, pictures have states, ratings follow by FORMULA, raters add noise.

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
N_RATERS = 24
MISSING_SHARE = 0.04


def sample_properties(n_images, rng):
    """(subject number of each picture (N,), properties (N, P) in -1..1); 2 to 7 pictures a subject, in random order."""
    n_subjects = n_images // 4
    twice = np.repeat(np.arange(n_subjects), 2)
    others = rng.integers(0, n_subjects, n_images - len(twice))
    subject = rng.permutation(np.r_[twice, others])
    looks = rng.uniform(-1, 1, (n_subjects, len(LOOKS)))
    states = rng.uniform(-1, 1, (n_images, len(STATES)))
    properties = np.hstack([looks[subject], states])
    for name in ("hue_warmth", "light_warmth"):
        properties[GREY_ROW, PROPERTIES.index(name)] = 0  # a grey picture shows no colour
    return subject, properties


def rate(properties, rng):
    """(true ratings (N, R), single ratings (N, A, R) with NaN where a rater did not rate)."""
    weights = np.array([[terms.get(name, 0) for terms in FORMULA.values()] for name in PROPERTIES])  # (P, R)
    largest_noise = math.sqrt(3) * NOISE_SD
    true = 5 + (4 - largest_noise) * np.tanh(properties @ weights)  # (N, R)
    shape = (len(true), N_RATERS, len(FORMULA))
    noise = largest_noise * rng.uniform(-1, 1, shape)
    place = rng.random(shape[:2]).argsort(axis=1)
    took_part = place < rng.integers(5, 13, (len(true), 1))  # (N, A)
    answered = took_part[..., None] & (rng.random(shape) > MISSING_SHARE)
    single = np.round(true[:, None] + noise, 2)
    return true, np.where(answered, single, np.nan)


def write_tables(folder, names, subject, single):
    """Write the mean/sd/n table and the long table of single ratings (N, A, R); returns the counts n (N, R)."""
    count = np.isfinite(single).sum(axis=1)  # (N, R)
    mean = np.nanmean(single, axis=1).round(4)
    sd = np.nanstd(single, axis=1, ddof=1).round(4)
    wide = {
        "image": [f"images/{name}" for name in names],
        "subject": [f"S{number + 1:03d}" for number in subject]}
    for j, rating in enumerate(FORMULA):
        wide |= {f"{rating}_mean": mean[:, j], f"{rating}_sd": sd[:, j], f"{rating}_n": count[:, j]}
    attributes = list(FORMULA)
    long = [
        {"rating": rating, "attribute": attributes[j], "stimulus": names[i], "rater": f"R{a + 1:02d}"}
        for (i, a, j), rating in np.ndenumerate(single) if np.isfinite(rating)]
    folder.mkdir()
    common.write_table(folder / "per_image_Slider_mean_sd_from_wide.csv", wide)
    common.write_table(folder / "raw_ratings_long.csv", long)
    return count


def make_assessor(folder, n_images, seed):
    """Pictures, ratings and their ground truth in `folder` (which exists and is empty); returns the ground truth."""
    rng = generator(seed, 0)
    subject, properties = sample_properties(n_images, rng)
    true, single = rate(properties, rng)
    (folder / "images").mkdir()
    names = []
    for i, values in enumerate(properties):
        own_rng = generator(seed, 1, i)
        width, height = own_rng.integers(200, 321, 2).tolist()
        pixels = draw_face(dict(zip(PROPERTIES, values)), width, height, own_rng)
        names.append(save_picture(pixels, folder / "images", i + 1, QUIRKS.get(i)))
    count = write_tables(folder / "ratings", names, subject, single)
    variance = true.var(axis=0)
    ceiling = variance / (variance + (NOISE_SD**2 / count).mean(axis=0))  # (R,)
    return {
        "formula": FORMULA,
        "quirks": {names[row]: quirk for row, quirk in QUIRKS.items()},
        "ceiling_r2": dict(zip(FORMULA, ceiling.round(4))),
        "true_ratings": dict(zip(names, true.round(4)))}


# ---------------------------------------------------------------------------
# Clips of behaviour
# ---------------------------------------------------------------------------
# Videos of a pen: one animal nods at another without pause, in a rhythm whose direction in time is the behaviour.

FRAME_RATES = (15.0, 14.9937, 12.0, 12.5, 13.333)
VIDEO_SIZES = ((128, 96), (112, 112), (128, 112))
N_SLOTS = 5
SLOT_SEC = 3.6  # an event's motion fills its slot; what the manifest calls the event lies in the middle
SLOW_SHARE = 0.85  # of a period, for the slow way; the way back takes the rest
N_GROUPS = 8  # pens
BUSY_PAIR = (1, 2)  # the two animals of each pen with most tail events
BUSY_SHARE = {"tail": 0.8, "ear": 0.1}  # of the events, that are theirs
OTHER_PAIRS = [pair for pair in itertools.permutations(range(1, 5), 2) if pair != BUSY_PAIR]


@dataclasses.dataclass
class Event:
    """A nod of one animal at another, and what the manifest says of it."""
    behavior: str
    duration: float  # seconds
    offset: float  # seconds from the start of the video
    pair: tuple  # (initiator, receiver)
    period_sec: float
    phase: float  # in periods


@dataclasses.dataclass
class Video:
    """A recording of one pen."""
    group: int  # the pen
    day: int
    file: str
    fps: float
    size: tuple  # (W, H)
    start: float  # seconds since midnight
    events: dict  # {slot: Event}; the other slots are idle


def nearness(phase, behavior):
    """How near the head is, 0 to 1, at a phase in periods; behavior None: idle, the same in both directions."""
    if behavior is None:
        return 0.5 - 0.5 * math.cos(2 * math.pi * phase)
    phase = phase % 1 if behavior == "ear" else -phase % 1
    return min(phase / SLOW_SHARE, (1 - phase) / (1 - SLOW_SHARE))


def plan_videos(n_events, rng):
    """Each pen is filmed in turn; the events are spread evenly over the videos, which are returned without them."""
    n_videos = max(N_GROUPS, math.ceil(n_events / N_SLOTS))
    videos = []
    for v in range(n_videos):
        turn, pen = divmod(v, N_GROUPS)
        group = pen + 1
        day = turn // 2 + 1  # two turns a day
        suffix = ("mp4", "avi")[(v + turn) % 2]
        n_filled = math.ceil((n_events - v) / n_videos)
        videos.append(Video(
            group=group, day=day,
            file=f"Group {group} Day {day}/Cam 8/N{860 + v}_ch8_main.{suffix}",
            fps=FRAME_RATES[v % len(FRAME_RATES)], size=VIDEO_SIZES[v % len(VIDEO_SIZES)],
            start=6 * 3600 + 600 * (turn % 2) + 5,
            events=dict.fromkeys(sorted(rng.permutation(N_SLOTS)[:n_filled].tolist()))))
    return videos


def plan_events(videos, rng):
    """Fill the videos: in each pen a quarter are tail events, most of them of one pair of animals."""
    places = [(video, slot) for video in videos for slot in video.events]
    tails = set()
    for in_pen in common.rows_by_key(video.group for video, _ in places).values():
        n_tails = round(len(in_pen) / 4)
        tails.update(rng.permutation(in_pen)[:n_tails])
    for i, (video, slot) in enumerate(places):
        behavior = "tail" if i in tails else "ear"
        is_busy = rng.random() < BUSY_SHARE[behavior]
        pair = BUSY_PAIR if is_busy else rng.choice(OTHER_PAIRS)
        duration = 0 if i % 9 == 5 else round(rng.uniform(1.5, 2.4), 2)
        middle = (slot + 0.5) * SLOT_SEC
        video.events[slot] = Event(
            behavior=behavior, duration=duration, offset=round(middle - duration / 2, 3),
            pair=tuple(100 * video.group + animal for animal in pair),
            period_sec=rng.uniform(0.8, 1.1), phase=rng.random())


def render_video(folder, video, rng):
    """Write one video with its events; rng: of looks and places."""
    import cv2
    background = np.asarray(draw_background(video.size, rng), float)
    pen = to_pixels(background * 0.8 + rng.normal(0, 9, background.shape))
    colours = rng.integers([150, 30], [256, 90], (3, 2)).T.tolist()
    places = rng.uniform([0.35, 0.4, 0], [0.65, 0.6, 2 * np.pi], (N_SLOTS, 3))
    path = folder / video.file
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter_fourcc(*("mp4v" if path.suffix == ".mp4" else "MJPG"))
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, video.fps, video.size)
    if not writer.isOpened():
        raise common.UserError(f"OpenCV {cv2.__version__} cannot write {path}: it was built without FFmpeg")
    for i in range(math.floor(N_SLOTS * SLOT_SEC * video.fps)):
        slot, time_sec = divmod(i / video.fps, SLOT_SEC)
        event = video.events.get(slot)
        near = nearness(time_sec, None)
        if event:
            near = nearness(time_sec / event.period_sec + event.phase, event.behavior)
        writer.write(draw_nod(pen.copy(), places[int(slot)], near, colours))
    writer.release()


def draw_nod(picture, place, near, colours):
    """Draw the other animal, and the head `near` of 0 to 1 to it, the nearer the larger, into (H, W, 3) uint8 BGR.

    place: x and y of the other animal in shares of the picture, direction of the head in radians.
    """
    import cv2
    x, y, direction = place
    height, width = picture.shape[:2]
    side = min(height, width)
    reach = side * (0.16 + 0.20 * (1 - near))
    body = np.array([x * width, y * height])
    head = body + reach * np.array([math.cos(direction), math.sin(direction)])
    discs = (
        (body, 0.10, colours[1]),
        (head, 0.09 + 0.07 * near, colours[0]))
    for centre, radius, colour in discs:
        sixteenths = (16 * centre).round().astype(int)  # of a pixel, as cv2 takes them
        cv2.circle(picture, sixteenths, round(16 * side * radius), colour, -1, cv2.LINE_AA, 4)
    return picture


# ---------------------------------------------------------------------------
# Event manifests
# ---------------------------------------------------------------------------
# Tables with the quirks of real ones: Windows paths, several spellings of times, dates and labels, durations of 0.

PARTS = {"train": (1, 2, 3, 4), "val": (5, 6), "test": (7, 8)}  # groups
SPELLINGS = {"ear": ("ear", "Ear", "EAR"), "tail": ("tail", "TAIL", "Tail", "tail/teat?", "tailhead")}


def clock(seconds, is_padded):
    """06:00:25, or 6:00:25, of seconds since midnight."""
    text = str(datetime.timedelta(seconds=int(seconds)))
    return text.zfill(8) if is_padded else text


def manifest_row(number, video, event):
    """One row with the header of the published studies; the number decides the spelling."""
    path = PureWindowsPath("E:/Some study 2024", video.file)
    name = path.name.upper() if number % 10 == 7 else path.name
    spellings = SPELLINGS[event.behavior]
    start = video.start + event.offset
    date = f"7/{video.day + 5}/2024"
    return {
        "event_idx": number, "group": video.group, "day": video.day,
        "date": (f"{date} 0:00", "", date)[number % 3],
        "start_time": clock(start, number % 2 == 0),
        "end_time": clock(start + event.duration, number % 4 < 2),
        "duration_sec": event.duration,
        "behavior": spellings[number % 7 % len(spellings)],
        "initiator_id": event.pair[0], "receiver_id": event.pair[1],
        "ended_by": ("initiator", "receiver", "")[number % 3],
        "pen_location": ("trough", "bedding")[number % 2],
        "linked": "no", "camera_id": 8, "video_filename": name,
        "video_path": path.with_name(name),
        "event_offset_sec": event.offset}


def make_events(folder, n_events, seed):
    """Videos and manifests."""
    rng = generator(seed, 2)
    videos = plan_videos(n_events, rng)
    plan_events(videos, rng)
    rows = []
    for v, video in enumerate(videos):
        render_video(folder / "videos", video, generator(seed, 3, v))
        for event in video.events.values():
            rows.append(manifest_row(len(rows) + 1, video, event))
    junk = folder / "videos" / videos[0].file
    junk.with_name(f"._{junk.name}").write_bytes(b"Mac OS X")
    manifests = folder / "manifests"
    manifests.mkdir()
    common.write_table(manifests / "all.csv", rows)
    for part, groups in PARTS.items():
        common.write_table(manifests / f"{part}.csv", [row for row in rows if row["group"] in groups])
    labels = {text: label for label, texts in SPELLINGS.items() for text in texts}
    common.write_json(manifests / "label_map.json", labels)


# ---------------------------------------------------------------------------
# Sequences with scores
# ---------------------------------------------------------------------------
# Folders of frames of a face that shows seven scores; pain depends on the moment and on the animal.

MOMENT_PAIN = {"M0": 0.15, "M1": 0.40, "M2": 0.75, "M3": 0.55, "M4": 0.25}  # mean, as a share of the greatest pain
ACTION_UNITS = {  # score: the property of the face that falls as it rises
    "Orbital_tightening": "eye_open", "Brow_tension": "brow_anger",
    "Ears_backward": "hair_height", "Cheek_tension": "smile",
    "Mouth_strain": "mouth_open", "Head_low": "face_width", "Nostril_muzzle": "eye_size"}
UNSCORED = "hue_warmth brightness light_warmth".split()  # properties that tell animals apart


def render_sequence(folder, scores, looks, rng):
    """Write 8 to 40 frames as JPEG, numbered without padding; scores: (7,) in 0 to 2. Returns their number."""
    folder.mkdir(parents=True)
    side, n_frames, place = rng.integers([64, 8, 0], [97, 41, 2 ** 31]).tolist()
    for i in range(n_frames):
        shown = (scores + rng.normal(0, 0.04, len(scores))).clip(0, 2)
        face = looks | dict(zip(ACTION_UNITS.values(), 1 - shown))
        pixels = draw_face(face, side, side, generator(place))
        Image.fromarray(pixels).save(folder / f"frame {i + 1}.jpg", quality=88)
    return n_frames


def score_columns(scores, rng):
    """{column: score} as in a published study: parts in thirds (a few missing), NRS and total."""
    parts = (scores * 3).round() / 3
    total = np.clip(parts.sum() + rng.choice([-0.5, 0, 0, 0, 0.5]), 0, 14)
    columns = {name: None if rng.random() < 0.03 else part for name, part in zip(ACTION_UNITS, parts.round(4))}
    nrs = 1 + 9 * total / 14 + rng.normal(0, 0.5)
    columns["NRS (1-10)"] = round(np.clip(nrs, 1, 10))
    columns["Total.Facial.scale"] = total.round(4)
    return columns


def make_sequences(folder, n_animals, seed):
    """Frame folders, each animal at each moment, with their scores and folds."""
    rows = []
    animals = np.arange(1, n_animals + 1)
    for animal in animals:
        animal_rng = generator(seed, 5, animal)
        tendency = animal_rng.normal(0, 0.10)
        looks = dict(zip(UNSCORED, animal_rng.uniform(-1, 1, len(UNSCORED))))
        for moment, mean_pain in MOMENT_PAIN.items():
            number = len(rows) + 1
            rng = generator(seed, 6, number)
            pain = mean_pain + tendency + rng.normal(0, 0.15)
            scores = 2 * (pain + rng.normal(0, 0.18, len(ACTION_UNITS))).clip(0, 1)
            path = f"sequences/Animal {animal} {moment} visit {2 - number % 2}"
            rows.append({
                "sequence_path": path, "animal": animal, "moment": moment, "sequence_id": number,
                "num_frames": render_sequence(folder / path, scores, looks, rng),
                **score_columns(scores, rng)})
    common.write_table(folder / "sequences.csv", rows)
    fold_of = (animals - 1) % 4
    folds = [
        {"fold": k, "train_animals": animals[fold_of != k], "val_animals": animals[fold_of == k]} for k in range(4)]
    common.write_json(folder / "cv_folds.json", {"cv_folds": folds})


def make_video(folder, n_events, seed):
    """Events in videos, and sequences of frames with scores, an animal for ten events; returns the ground truth."""
    make_events(folder, n_events, seed)
    make_sequences(folder, max(4, n_events // 10), seed)
    return {"groups": PARTS}


# ---------------------------------------------------------------------------
# Bicycles
# ---------------------------------------------------------------------------
# A bicycle is drawn part by part; the state of a part decides how, its street gives the background.

# part: (x, y, half width, half height, colour), the wheels at -1 and 1, y downwards
PART_LOOKS = {
    "back_wheel": (-1.0, 0.0, 0.62, 0.62, "#1e1e22"),
    "front_wheel": (1.0, 0.0, 0.62, 0.62, "#1e1e22"),
    "chain": (-0.45, 0.04, 0.50, 0.13, "#46484e"),
    "saddle": (-0.55, -1.02, 0.30, 0.13, "#3c2216"),
    "steer": (0.70, -1.12, 0.30, 0.20, "#969ba5"),
    "front_light": (1.12, -0.72, 0.14, 0.14, "#faf0aa"),
    "back_light": (-1.60, -0.55, 0.13, 0.13, "#d2141e"),
    "kickstand": (-0.15, 0.52, 0.13, 0.30, "#787c82")}
STATE_SHARES = (0.62, 0.14, 0.13, 0.11)  # of part_boxes.STATES
RINGS = ("back_wheel", "front_wheel", "chain")  # the other parts are discs
FRAME = ((-1, 0), (-0.5, -0.8), (0.7, -0.8),
         (1, 0), (-0.1, 0.05), (0.7, -0.8))
RUST = "#eb7d28"
LEAVES = "#2e6828"
ANNOTATION_QUIRKS = {3: "no_suffix", 5: "untrusted", 9: "no_parts", 11: "zero_box", 13: "over_edge"}  # row: quirk


def draw_leaves(draw, x1, y1, x2, y2, rng):
    """Leaves over a box."""
    for x, y in rng.uniform([x1, y1], [x2, y2], (9, 2)):
        reach = 0.22 * max(x2 - x1, y2 - y1) * rng.uniform(0.7, 1.2)
        draw_ellipse(draw, x, y, reach, 0.6 * reach, LEAVES)


def draw_bicycle(states, background, rng):
    """((H, W, 3) uint8, {part: (state, box)}) of a bicycle, mirrored or not; background: picture of twice the size."""
    wide, high = background.size
    draw = ImageDraw.Draw(background)
    unit = wide / 4.4 * rng.uniform(0.85, 1.05)
    origin_x = wide * rng.uniform(0.44, 0.56)
    origin_y = high * rng.uniform(0.52, 0.64)
    mirror = rng.choice([-1, 1])
    width = int(unit / 28)

    def place(x, y):
        return origin_x + mirror * x * unit, origin_y + y * unit
    colour = tuple(rng.integers(60, 160, 3).tolist())
    draw.line([place(x, y) for x, y in FRAME], fill=colour, width=3 * width)
    boxes = [[*place(x - mirror * half_x, y - half_y), *place(x + mirror * half_x, y + half_y)]
             for x, y, half_x, half_y, _ in PART_LOOKS.values()]
    for part, box, state in zip(PART_LOOKS, boxes, states):
        colour = RUST if state == "damaged" else PART_LOOKS[part][-1]
        if state == "absent":
            continue
        if part in RINGS:
            draw.ellipse(box, outline=colour, width=2 * width)
        else:
            draw.ellipse(box, fill=colour)
    for box, state in zip(boxes, states):
        if state == "occluded":
            draw_leaves(draw, *box, rng)
    halved = (np.array(boxes) / 2).tolist()
    return photograph(background, rng), dict(zip(PART_LOOKS, zip(states, halved)))


def box_entry(x1, y1, x2, y2):
    """A box as part annotations write it."""
    return {"absolute_bounding_box": {
        "left": x1, "top": y1, "width": round(x2 - x1, 1), "height": round(y2 - y1, 1)}}


def part_entry(row, state, box, rng):
    """One part as part annotations write it; every third row gives the state as a number, every fourth no trust."""
    entry = box_entry(*(round(value, 1) for value in box))
    if row % 3 == 2:
        entry["object_state_class"] = part_boxes.STATES.index(state)
    else:
        entry["object_state"] = state
    if row % 4:
        entry["trust"] = round(rng.uniform(0.6, 1), 2)
    return entry


def picture_annotation(row, width, height, street, seen, rng):
    """{image: {image, street, note, parts}} of one picture, with its quirk; seen: {part: (state, box)}."""
    parts = {part: part_entry(row, *each, rng) for part, each in seen.items()}
    name = f"{row}.jpg"
    quirk = ANNOTATION_QUIRKS.get(row)
    if quirk == "no_suffix":
        name = str(row)
    elif quirk == "untrusted":
        parts["saddle"] |= {**box_entry(2, 2, 11, 11), "trust": 0.2}
    elif quirk == "no_parts":
        parts = {}
    elif quirk == "zero_box":
        parts["chain"] |= {**box_entry(30, 40, 30, 52), "object_state_class": 0}
    elif quirk == "over_edge":
        parts["back_wheel"]["absolute_bounding_box"]["height"] += 400
    return {name: {
        "image": {"height": height, "width": width}, "street": f"street {street}", "note": "CONTROL", "parts": parts}}


def make_detector(folder, n_images, seed):
    """Bicycles, their annotations in both formats in `folder`; returns the ground truth."""
    n_streets = n_images // 6
    (folder / "images").mkdir()
    content = {}
    trust_rng = generator(seed, 2)
    for row in range(n_images):
        rng = generator(seed, 3, row)
        street = row % n_streets
        states = rng.choice(part_boxes.STATES, len(PART_LOOKS), p=STATE_SHARES)
        width, height = rng.integers([220, 170], [281, 211]).tolist()
        background = draw_background((2 * width, 2 * height), generator(seed, 4, street))
        pixels, parts = draw_bicycle(states, background, rng)
        Image.fromarray(pixels).save(folder / "images" / f"{row}.jpg", quality=90)
        content |= picture_annotation(row, width, height, street, parts, trust_rng)
    text = json.dumps(content, indent=1).replace("CONTROL", "seen\tat\x07 dusk")
    (folder / "annotations.json").write_text(text)
    found = part_boxes.read_annotations(folder / "annotations.json")
    part_boxes.find_pictures(found, folder / "images", exact_names=False)
    held_out = [f"street {street}" for street in range(n_streets - n_streets // 5, n_streets)]
    for part in ("train", "val"):
        images = [image for image in found.images if (image.fields["street"] in held_out) == (part == "val")]
        coco, _ = part_boxes.as_coco(images, found.category_ids, folder / "images")
        common.write_json(folder / f"{part}_coco.json", coco)
    return {"quirks": {quirk: f"{row}.jpg" for row, quirk in ANNOTATION_QUIRKS.items()}}


# ---------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------
# A frame is what a plane at a 6-DoF pose cuts out of a patient's volume; poses go smoothly from view to view.

REACH = np.repeat([12.0, 20.0], 3)  # of a path about the target view, mm and degrees
FRAME_SIDE = 64  # pixels, and mm
PER_SEQUENCE = 25
N_SHARED = 24  # blobs of the anatomy
N_OWN = 16  # blobs of a patient, which carry no signal
SLICE_QUIRKS = {0: "backslashes", 3: "dict", 4: "no_at2", 6: "bad_labels"}  # sequence: quirk


def make_blobs(count, radii, brightness, rng):
    """Gaussian blobs, two thirds of them bright: list of (centre (3,) mm, radii (3,) mm, brightness)."""
    signs = rng.choice([-1, 1, 1], count)
    centres = rng.uniform(-34, 34, (count, 3))
    sizes = rng.uniform(*radii, (count, 3))
    return list(zip(centres, sizes, signs * rng.uniform(*brightness, count)))


def cut_slice(pose, bend, blobs, rng):
    """(H, W) uint8 slice at a pose (6,): blobs over tissue that brightens with depth, and noise.

    bend: (3, 3) near the identity, of the anatomy that all patients share.
    """
    u = np.arange(FRAME_SIDE) + 0.5 - FRAME_SIDE / 2
    x, y = np.meshgrid(u, u)
    plane = np.stack([x, y, np.zeros_like(x)], -1)  # (H, W, 3) mm, in the probe's frame
    rotation = probe_poses.on_arrays(probe_poses.rotation_matrix, pose[3:])
    points = (plane @ rotation.T + pose[:3]) @ bend.T
    grey = 75 + 0.5 * points[..., 1]
    for centre, radii, brightness in blobs:
        distance = np.square((points - centre) / radii).sum(-1)
        grey += brightness * np.exp(-0.5 * distance)
    return to_pixels(grey * rng.normal(1, 0.08, grey.shape))


def make_path(n_poses, rng):
    """(N, 6) poses on a smooth path: two sines of different wavelengths an axis, within REACH."""
    step = np.arange(n_poses)[:, None]
    fast = step / rng.uniform(9, 16, 6) + rng.uniform(0, 1, 6)
    slow = step / rng.uniform(25, 45, 6) + rng.uniform(0, 1, 6)
    waves = 0.55 * np.sin(2 * np.pi * fast) + 0.45 * np.sin(2 * np.pi * slow)
    return REACH * waves


def write_sequence(folder, poses, bend, blobs, quirk, rng):
    """One folder: its frames, and the N transitions between N + 1 poses, with the quirk named."""
    names = [f"frames_{folder.name.removeprefix('patient_')}_{i:04d}" for i in range(len(poses))]
    pictures = [Image.fromarray(cut_slice(pose, bend, blobs, rng)) for pose in poses]
    for which in ("ft1", "ft2"):
        (folder / which).mkdir(parents=True)
    motion = probe_poses.difference(poses[1:], poses[:-1])
    slash = "\\" if quirk == "backslashes" else "/"
    rows = []
    for i, step in enumerate(motion):
        pictures[i].save(folder / "ft1" / f"{names[i]}.png")
        pictures[i + 1].save(folder / "ft2" / f"{names[i + 1]}.png")
        rows.append({
            "frame_t1": names[i], "frame_t2": names[i + 1],
            "ft1_image_path": f"ft1{slash}{names[i]}.png",
            "ft2_image_path": f"ft2{slash}{names[i + 1]}.png",
            "at1_6dof": poses[i].tolist(),
            "action_change_6dof": step.tolist(),
            "at2_6dof": poses[i + 1].tolist()})
    if quirk == "no_at2":
        for row in rows[::2]:
            del row["at2_6dof"]
    elif quirk == "bad_labels":
        rows[2]["at1_6dof"][1] = math.nan
        rows[4]["at2_6dof"][3] = 9999.0
    elif quirk == "dict":
        rows = {"transitions": rows}
    (folder / "transitions_dataset.json").write_text(json.dumps(rows, indent=1))


def make_dreamer(folder, n_transitions, seed):
    """Sequences of slices of several patients in `folder` (which exists and is empty); returns the ground truth."""
    n_sequences = max(6, round(n_transitions / PER_SEQUENCE))
    n_patients = n_sequences // 2
    anatomy = make_blobs(N_SHARED, (6, 14), (60, 140), generator(seed, 0))
    patients = {}
    for k, part in enumerate(np.array_split(range(n_transitions), n_sequences)):
        number = k % n_patients
        name = f"patient_{number + 1:02d}"
        sequence = f"{name}_{k // n_patients + 1:02d}"
        own_rng = generator(seed, 2, number)
        bend = np.eye(3) + own_rng.normal(0, 0.02, (3, 3))
        blobs = anatomy + make_blobs(N_OWN, (3, 7), (20, 60), own_rng)
        rng = generator(seed, 1, k)
        poses = make_path(len(part) + 1, rng)
        write_sequence(folder / sequence, poses, bend, blobs, SLICE_QUIRKS.get(k), rng)
        patients[sequence] = name
    common.write_json(folder / "patient_map.json", patients)
    return {"quirks": {name: SLICE_QUIRKS[k] for k, name in enumerate(patients) if k in SLICE_QUIRKS}}


# ---------------------------------------------------------------------------
# Folder
# ---------------------------------------------------------------------------
# The data are made beside their place and moved there whole; a folder that is there is never touched.

TASKS = {  # task: (how its data are made, number of samples)
    "assessor": (make_assessor, 120), "video": (make_video, 120),
    "detector": (make_detector, 60), "dreamer": (make_dreamer, 600)}


def main():
    args = parse_args()
    folder = args.output_dir / args.task
    truth_file = folder / "ground_truth.json"
    make, default_samples = TASKS[args.task]
    n_samples = args.n_samples or default_samples
    settings = {"task": args.task, "n_samples": n_samples, "seed": args.seed}
    if common.read_or_warn(truth_file).get("settings") == settings:
        print(f"{folder}: already there with these settings, nothing to do")
        return
    if folder.exists():
        raise common.UserError(f"{folder}: something else is there ({truth_file.name} is missing, damaged or of other "
                               "settings); remove it or choose another --output_dir")
    draft = args.output_dir / f".{args.task}.new"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise common.UserError(f"--output_dir {args.output_dir} cannot be written: "
                               f"{error.strerror}; name another folder") from None
    truth = make(draft, n_samples, args.seed)
    common.write_json(draft / truth_file.name, {"settings": settings, **truth})
    draft.rename(folder)
    print(f"{folder}: made; the ground truth is in {truth_file}")


if __name__ == "__main__":
    common.run_main(main)
