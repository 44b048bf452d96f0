"""Train a detector that finds the parts of an object and says of each: intact, damaged, absent or occluded.

    python train_detector.py --train_json train.json --val_json val.json --train_images train/ --val_images val/
    python train_detector.py --train_json all.json --train_images images/ --split_ratio 0.8 --dry_run
    python train_detector.py --mode convert --json annotations.json --images_dir images --output train_coco.json
    python train_detector.py --mode audit --json train.json --images_dir train/
    python train_detector.py --mode evaluate --checkpoint outputs/run_X --json test.json --images_dir test/
    python train_detector.py --mode predict --checkpoint outputs/run_X --images_dir new/ --visualize 8

Training and evaluation write outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), metrics.json, per_part.csv,
per_state.csv, detections_<part>.json (COCO results) and .csv, failures.jpg, pictures/, args.json, log.txt; training
also best_model.pth, last.pth, training_history.csv and .png, splits.json, leakage_report.json. Prediction writes
--output (COCO results), the same as CSV beside it, and --visualize pictures.

TRAIN_JSON, VAL_JSON, TRAIN_CLEANED and VAL_CLEANED (the folders of pictures) and OUTPUT_DIR, from the environment or
lines NAME=VALUE of ./.env, are the defaults of --train_json, --val_json, --train_images, --val_images, --output_dir.

Letters: N images, M images scored, B batch, P parts, S states, K boxes and D detections of one image, Q proposals of a
batch, F features. Units: boxes are x1 y1 x2 y2 in pixels of the upright picture on disk; scores and probabilities 0..1.
"""
import collections
import dataclasses
import io
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

import common
from evidence import detection_scores, plotting, reporting, splitting, verdicts
from readers import file_names, part_boxes, picture_files
ENVIRONMENT = {"TRAIN_JSON": "train_json", "VAL_JSON": "val_json", "TRAIN_CLEANED": "train_images",
               "VAL_CLEANED": "val_images", "OUTPUT_DIR": "output_dir"}
# name: (short side, longest side of the input in pixels, sides of the square anchors)
MODELS = {"fasterrcnn_resnet50_fpn": (800, 1333, (32, 64, 128, 256, 512)),
          "fasterrcnn_resnet50_fpn_v2": (800, 1333, (32, 64, 128, 256, 512)),
          "fasterrcnn_mobilenet_v3_large_320_fpn": (320, 640, (32, 64, 128, 256, 512)),
          "fasterrcnn_resnet18_fpn": (384, 640, (16, 40, 96, 224))}
# For a CPU: no level of stride 4, and a quarter of torchvision's proposals, which is plenty for some twenty parts.
SMALL_HEADS = {"box_batch_size_per_image": 128, "rpn_batch_size_per_image": 128, "rpn_pre_nms_top_n_train": 500,
               "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_train": 500, "rpn_post_nms_top_n_test": 250}
PADDING = 32  # inputs are padded to multiples of it: the stride of the coarsest map that boxes are pooled from
STATE_COLOURS = ((0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (110, 110, 110))  # the last: no state


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_shared_arguments(parser, epochs=20, batch_size=2, lr=1e-4, weight_decay=1e-4, scheduler="plateau",
                                augment="light", plateau_patience=3)
    data = parser.group("pictures and annotations")
    data("--mode", choices=("train", "convert", "predict", "evaluate", "audit"), default="train", help="what to do")
    for part in ("train", "val", "test"):
        data(f"--{part}_json", type=Path, may_change=True,
             help=f"part annotations or COCO file of the {part} split")
        data(f"--{part}_images", type=Path, may_change=True,
             help="folder of its pictures, searched with its subfolders")
    data("--split_ratio", type=common.bounded(float, 0, 1, open_low=True),
         help="without --val_json: share of --train_json that trains; --test_ratio is tested, the rest validates")
    data("--json", type=Path, help="annotations to convert, evaluate or audit")
    data("--images_dir", type=Path, may_change=True, help="pictures to convert, predict, evaluate or audit")
    data("--checkpoint", type=Path, help="best_model.pth, or its run folder, to predict or evaluate")
    data("--output", type=Path, help="JSON to write (predict: default detections.json; convert; audit)")
    data("--min_trust", type=common.bounded(float, 0, 1), default=0.5,
         help="boxes whose annotators trusted them less neither train nor count")
    data("--drop_empty", action="store_true", help="leave out pictures without a box; else they teach the background")
    data("--absent", choices=("keep", "drop"), default="keep",
         help="boxes of absent parts: keep trains and scores them with their state, drop takes them for background")
    model = parser.group("model")
    model("--model", choices=tuple(MODELS), default="fasterrcnn_resnet50_fpn", help="torchvision detector")
    model("--min_size", type=common.bounded(int, 32), help="short side of the input in pixels (default: the model's)")
    model("--max_size", type=common.bounded(int, 32), help="longest side of the input in pixels")
    model("--anchor_sizes", type=common.bounded(int, 2), nargs="+", metavar="PX",
          help="sides of the anchors in input pixels, smallest first: five, fasterrcnn_resnet18_fpn four")
    model("--trainable_layers", type=common.bounded(int, 0, 6), default=3,
          help="last stages of the backbone that are trained: 0 to 5, MobileNet to 6; with random weights all are")
    model("--norm", choices=("auto", "frozen", "batch"), default="auto",
          help="BatchNorm statistics: frozen, or those of each batch; auto = frozen with pretrained weights")
    model("--state_weight", type=common.bounded(float, 0), default=0.5, help="weight of the state loss in the total")
    model("--state_class_weights", nargs="+", type=class_weight, default=["none"], metavar="W",
          help="none, balanced (inverse frequency in the train boxes), or four numbers: " + " ".join(part_boxes.STATES))
    model("--select", choices=("val_loss", "map", "joint_map"), default="val_loss",
          help="validation column that chooses the epoch and drives --scheduler plateau")
    output = parser.group("results")
    output("--score_threshold", type=common.bounded(float, 0, 1), default=0.5,
           help="score from which a detection counts in precision, recall, hallucinations and pictures")
    output("--one_per_part", action="store_true", help="keep the best box of each part; absent where none")
    output("--visualize", type=common.bounded(int, 0), default=8, may_change=True,
           help="pictures to draw with boxes and states")
    output("--bootstrap_draws", type=common.bounded(int, 20), default=200, help="resamples of images for intervals")
    parser.set_defaults(**environment_defaults())
    args = common.parse_arguments(parser, argv)
    check_flags(parser, args)
    if args.mode == "predict" and args.output is None:
        args.output = Path("detections.json")
    return args


def environment_defaults(path=Path(".env")):
    """{flag: text} of the names in ENVIRONMENT, from the environment or else from the lines NAME=VALUE of `path`."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else []
    pairs = [line.strip().removeprefix("export ").partition("=") for line in lines if not line.strip().startswith("#")]
    values = {name.strip(): value.strip().strip("\"'") for name, _, value in pairs} | dict(os.environ)
    return {flag: values[name] for name, flag in ENVIRONMENT.items() if values.get(name)}


def class_weight(text):
    """argparse type of --state_class_weights: one of its words, or a weight of 0 or more."""
    return text if text in ("none", "balanced") else common.bounded(float, 0)(text)


def check_flags(parser, args):
    """parser.error for combinations that cannot work; --split_ratio becomes the shares that common knows."""
    needed = {"train": ("train_json", "train_images"), "convert": ("json", "output"),
              "predict": ("checkpoint", "images_dir"), "evaluate": ("checkpoint", "json", "images_dir"),
              "audit": ("json", "images_dir")}[args.mode]
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"--mode {args.mode} needs {' and '.join(missing)}")
    if args.folds or args.fold != "all":
        parser.error(f"--folds {args.folds} --fold {args.fold}: the detector trains one split; leave both out")
    if args.augment == "full":
        parser.error(f"--augment {args.augment}: the detector knows none and light (flip, colour, size)")
    n_anchors = len(MODELS[args.model][2])
    if args.anchor_sizes and (len(args.anchor_sizes) != n_anchors or args.anchor_sizes != sorted(args.anchor_sizes)):
        parser.error(f"--anchor_sizes {args.anchor_sizes}: {args.model} takes {n_anchors} sides, smallest first")
    weights = args.state_class_weights
    if weights not in (["none"], ["balanced"]) and (len(weights) != len(part_boxes.STATES) or not all(
            isinstance(weight, float) for weight in weights) or not sum(weights)):
        parser.error(f"--state_class_weights {weights}: expected none, balanced, or a number for each of {part_boxes.STATES}")
    if args.mode == "train":
        check_split_flags(parser, args)


def check_split_flags(parser, args):
    """One way to split: the files of the parts, --split_file, or shares of --train_json."""
    if args.split_ratio is not None:
        if "val_json" not in args.given:
            args.val_json = None  # it comes from the environment, the wish to split from the user
        args.train_ratio, args.val_ratio = args.split_ratio, 1 - args.split_ratio - args.test_ratio
    for part in ("val", "test"):
        path = getattr(args, f"{part}_json")
        if path and not getattr(args, f"{part}_images"):
            parser.error(f"--{part}_json {path} needs --{part}_images")
    if args.val_json and (args.split_file or args.split_ratio is not None or args.test_ratio):
        parser.error(f"--val_json {args.val_json} is the split: give no --split_file, --split_ratio, --test_ratio")
    if args.test_json and not args.val_json:
        parser.error(f"--test_json {args.test_json} needs --val_json: without it --train_json is split")
    if not args.val_json and not args.split_file and args.val_ratio < 1e-9:
        parser.error(f"--val_ratio {args.val_ratio:g}: the validation part must not be empty, it chooses the epoch")


# --- annotations: file -> objects, checked ------------------------------------------------


@dataclasses.dataclass
class Study:
    """N pictures with their boxes, cleaned: what is trained on, and what is judged against."""
    parts: list  # P names, one list for all splits; labels count from 0
    images: np.ndarray  # (N,) text
    ids: list  # N ids as their file writes them
    sizes: np.ndarray  # (N, 2) width and height in pixels
    boxes: list  # N of (K, 4) float32, inside the picture
    labels: list  # N of (K,) int64
    states: list  # N of (K,) int64, UNKNOWN where there is none
    ignored: list  # N of (K,) bool, True = a crowd or not trusted: neither trained on nor judged
    absent: list  # N of int64 arrays: labels of the parts said to be absent without a box
    groups: np.ndarray | None  # (N,) text
    origin: np.ndarray  # (N,) text: train, val or test, the file that names the picture
    category_ids: dict  # that file -> {part: id as it writes them}
    store: picture_files.ImageStore
    stored: np.ndarray  # (N,) index of each picture in the store
    skipped: list  # dicts of image, annotation and reason
    notes: list

    def picture(self, row):
        """Decoded picture of a row, uint8 (H, W, 3)."""
        return self.store[self.stored[row]]

    def audit(self, field):
        """(N,) one field of the pictures' audit, such as pixel_sha."""
        return [getattr(self.store.audit[i], field) for i in self.stored]

    def judged(self, row, absent="keep"):
        """(K,) bool, True = trained on and judged; `absent` as in --absent."""
        return ~self.ignored[row] & ((self.states[row] != part_boxes.ABSENT) | (absent == "keep"))

    def state_names(self, rows, absent):
        """STATES, or [] where no box of these rows has one: plain detection."""
        return list(part_boxes.STATES) if any((self.states[row][self.judged(row, absent)] >= 0).any() for row in rows) else []

    def strata(self):
        """(N,) for each picture its rarest part and state, so that a split deals those out evenly."""
        cells = [[(label, state) for label, state in zip(*pair)] for pair in zip(self.labels, self.states)]
        counts = collections.Counter(cell for row in cells for cell in row)
        return [str(min(row, key=lambda cell: (counts[cell], cell), default="none")) for row in cells]

    def record(self, split):
        """What args.json says of the data and their split; a resumed run must find the same."""
        contents = [*self.parts, *self.images, *self.audit("file_sha")]
        contents += [array for row in zip(self.boxes, self.labels, self.states, self.ignored) for array in row]
        listed = [item for part, rows in split.items() for item in (part, rows)]
        return {"fingerprint": common.data_fingerprint(contents), "split": common.data_fingerprint(listed),
                "pictures": len(self.images), "boxes": sum(map(len, self.boxes)), "parts": self.parts}


def load_study(args, files, say, parts=None):
    """{split: (JSON, folder of pictures)} -> Study; what cannot be used is counted, said and kept in `skipped`.

    parts: the names that a checkpoint knows; without it those that have a box in any file, in order of appearance.
    """
    read = {origin: part_boxes.read_annotations(path) for origin, (path, _) in files.items()}
    listed = [(origin, image) for origin, found in read.items() for image in found.images]
    paths, skipped, notes = [], [], []
    for origin, (_, folder) in files.items():
        found, unused = part_boxes.find_pictures(read[origin], folder)
        paths += found
        skipped += [{"image": name, "reason": f"no entry in {files[origin][0].name}"} for name in unused]
    present = [k for k, path in enumerate(paths) if path is not None]
    say(f"decoding {len(present)} pictures")
    short_side = args.min_size or MODELS[args.model][0]
    store = picture_files.ImageStore([paths[k] for k in present], short_side, args.cache)
    stored = check_pictures(store, [listed[k][1] for k in present], args.on_bad_file, skipped)
    skipped += [{"image": image.name, "reason": "no such picture"} for (_, image), p in zip(listed, paths) if not p]
    rows = {present[i]: row for row, i in enumerate(stored)}  # place in `listed` -> row of the study
    objects = gather_objects(read, rows)
    names, parts = parts, parts or used_parts(read, objects, notes)
    if names is not None:
        unknown = sorted({each.part for each in objects} - set(parts))
        part_boxes.refuse([name + common.closest(name, parts) for name in unknown], "the checkpoint does not know these parts:",
               f"It knows {', '.join(parts)}.")
    chosen = [listed[present[i]] for i in stored]
    several = len(files) > 1  # two folders may hold the same name
    study = Study(
        parts, np.array([f"{origin}/{image.name}" if several else image.name for origin, image in chosen], str),
        [image.id for _, image in chosen], np.array([(store.audit[i].width, store.audit[i].height) for i in stored]),
        [], [], [], [], [np.array([parts.index(p) for p in image.absent if p in parts], int) for _, image in chosen],
        read_groups(args.group_column, chosen), np.array([origin for origin, _ in chosen], str),
        {origin: found.category_ids for origin, found in read.items()}, store,
        np.array(stored, int), skipped, notes)
    fill_boxes(study, objects, args.min_trust)
    if args.drop_empty:
        study = without_empty(study)
    say_study(study, say)
    return study


def check_pictures(store, images, on_bad_file, skipped):
    """Places of the usable pictures; a size other than annotated is a fault too, since the boxes would not fit."""
    for found, image in zip(store.audit, images):
        size = image.size
        if size and not found.error and max(abs(found.width - size[0]), abs(found.height - size[1])) > 1:
            found.error = f"is {found.width} x {found.height} pixels, annotated as {size[0]} x {size[1]}"
    good = picture_files.check_bad_files(store.audit, on_bad_file)
    if not good:
        raise common.UserError(f"none of the {len(images)} pictures can be used")
    skipped += [{"image": image.name, "reason": found.error} for found, image in zip(store.audit, images)
                if found.error]
    return good


def gather_objects(read, rows):
    """The objects of all files whose picture is used; their image is the row of the study."""
    objects, start = [], 0
    for found in read.values():
        objects += [dataclasses.replace(each, image=rows[start + each.image])
                    for each in found.objects if start + each.image in rows]
        start += len(found.images)
    return objects


def used_parts(read, objects, notes):
    """Part names that have a box in any file, in order of appearance; the others are noted by name."""
    used = {each.part for each in objects}
    known = list(dict.fromkeys(name for found in read.values() for name in found.parts))
    if not used:
        raise common.UserError(f"no box in {', '.join(str(found.path) for found in read.values())}: nothing to learn")
    if len(used) < len(known):
        notes.append(f"parts without a box, left out: {', '.join(name for name in known if name not in used)}")
    return [name for name in known if name in used]


def read_groups(column, chosen):
    """(N,) group of each image from its entry, or None without --group_column."""
    if column is None:
        return None
    values = [image.fields.get(column) for _, image in chosen]
    lacking = [image.name for (_, image), value in zip(chosen, values) if value in (None, "")]
    part_boxes.refuse(lacking, f"--group_column {column}: missing in {len(lacking)} of {len(chosen)} images:", "Fill it.")
    return np.array(list(map(str, values)), str)


def fill_boxes(study, objects, min_trust):
    """Boxes cut to their picture; those without area there are skipped by name, those not trusted are ignored."""
    rows, cut, crowds, doubted = collections.defaultdict(list), 0, 0, 0
    for each in objects:
        width, height = study.sizes[each.image]
        box = np.clip(each.box, 0, [width, height, width, height])
        cut += not np.allclose(box, each.box, atol=1)
        if (box[2:] - box[:2]).min() < 0.5:
            shown = " ".join(f"{value:g}" for value in each.box)
            study.skipped.append({"image": study.images[each.image], "annotation": f"{each.key} ({each.part})",
                                  "reason": f"box {shown} has no area in {width} x {height} pixels"})
            continue
        crowds, doubted = crowds + each.crowd, doubted + (each.trust < min_trust)
        rows[each.image].append((box, study.parts.index(each.part), each.state,
                                    each.crowd or each.trust < min_trust))
    for row in range(len(study.images)):
        boxes, labels, states, ignored = zip(*rows[row]) if rows[row] else ((), (), (), ())
        study.boxes.append(np.array(boxes, np.float32).reshape(-1, 4))
        study.labels.append(np.array(labels, np.int64))
        study.states.append(np.array(states, np.int64))
        study.ignored.append(np.array(ignored, bool))
    counts = {"boxes reached over the edge and were cut": cut, "crowd boxes are ignored": crowds,
              f"boxes are trusted less than {min_trust:g} and ignored": doubted}
    study.notes += [f"{count} {text}" for text, count in counts.items() if count]


def without_empty(study):
    """The study without the pictures that have no box to learn."""
    kept = [row for row in range(len(study.images)) if study.judged(row).any()]
    empty = sorted(set(range(len(study.images))) - set(kept))
    study.skipped += [{"image": study.images[row], "reason": "no box (--drop_empty)"} for row in empty]
    per_row = {field.name: getattr(study, field.name) for field in dataclasses.fields(study)
               if field.name in ("images ids sizes boxes labels states ignored absent groups origin stored".split())}
    return dataclasses.replace(study, **{
        name: None if values is None else values[kept] if isinstance(values, np.ndarray) else [values[k] for k in kept]
        for name, values in per_row.items()})


def say_study(study, say):
    """What was read, how much was left out and why."""
    boxes, empty = sum(map(len, study.boxes)), sum(not len(boxes) for boxes in study.boxes)
    groups = "" if study.groups is None else f" in {len(set(study.groups))} groups"
    states = collections.Counter(np.concatenate([*study.states, np.empty(0, int)]).tolist())
    listed = ", ".join(f"{count} {part_boxes.STATES[k] if k >= 0 else 'without a state'}" for k, count in sorted(states.items()))
    say(f"data: {len(study.images)} pictures{groups} ({empty} without a box), {len(study.parts)} parts, {boxes} boxes "
        f"({listed}), {sum(map(len, study.absent))} absent parts without a box; {len(study.skipped)} skipped; "
        f"{study.store.description}")
    for note in study.notes:
        say(f"note: {note}")
    for each in study.skipped[:10]:
        say(f"skipped: {', '.join(str(value) for value in each.values())}")
    if len(study.skipped) > 10:
        say(f"skipped: and {len(study.skipped) - 10} more")


# --- data: row of the study -> sample -> batch ------------------------------------------------

def fit_size(width, height, short_side, max_size, factor=1.0):
    """(width, height) of the input: the short side `short_side` times factor, the long one at most max_size."""
    scale = min(short_side * factor / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize_picture(pixels, size):
    """uint8 (H, W, 3) scaled to `size` (width, height)."""
    import cv2
    if pixels.shape[1::-1] == size:
        return pixels
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if size[0] < pixels.shape[1] else cv2.INTER_LINEAR)


def has_sides(parts):
    """True where a part name says left or right: mirrored pictures would then teach the wrong names."""
    return any({"left", "right"} & set(re.split("[^a-z]+", part.lower())) for part in parts)


def augment_picture(pixels, boxes, size_of, generator, may_flip):
    """Random flip, colours and size of a picture (H, W, 3) and its boxes (K, 4), relative to it, 0..1.

    A flip mirrors the boxes and nothing else: a front wheel stays a front wheel. size_of(factor) gives the input size.
    """
    drawn = common.sample_augmentation("light", generator)
    pixels = resize_picture(pixels, size_of(0.8 + 0.4 * torch.rand((), generator=generator).item()))
    if drawn.flip and may_flip:
        pixels, boxes = pixels[:, ::-1], np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    return common.jitter_colours(np.ascontiguousarray(pixels), drawn), boxes


class PartImages(common.Samples):
    """Samples of chosen rows; a key is (epoch, index), which seeds the augmentation.

    Each sample: pixels uint8 (H, W, 3); boxes (K, 4) in its pixels; labels (K,) from 1; states (K,), -1 unknown; name;
    scale (2,) pixels of the picture on disk per input pixel.
    """

    def __init__(self, study, rows, args, settings, augment):
        self.study, self.rows, self.args, self.settings, self.augment = study, rows, args, settings, augment

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, index = key
        row = int(self.rows[index])
        study, keep, generator = self.study, None, common.generator_for(self.args.seed, epoch, row)
        keep, pixels = study.judged(row, self.args.absent), study.picture(row)
        boxes = study.boxes[row][keep] / np.tile(study.sizes[row], 2)  # (K, 4) in 0..1

        def size_of(factor):
            return fit_size(*study.sizes[row], self.settings["min_size"], self.settings["max_size"], factor)
        if self.augment == "none":
            pixels = resize_picture(pixels, size_of(1.0))
        else:
            pixels, boxes = augment_picture(pixels, boxes, size_of, generator, not has_sides(study.parts))
        size = np.array(pixels.shape[1::-1])
        return {"pixels": torch.from_numpy(np.array(pixels)), "scale": study.sizes[row] / size,
                "boxes": torch.from_numpy((boxes * np.tile(size, 2)).astype(np.float32)),
                "labels": torch.from_numpy(study.labels[row][keep] + 1),
                "states": torch.from_numpy(study.states[row][keep]), "name": str(study.images[row])}


def collate(samples):
    """Samples -> batch: pixels (B, H, W, 3) padded by 0 to multiples of PADDING, sizes (height, width), else lists."""
    height, width = (PADDING * math.ceil(max(sample["pixels"].shape[axis] for sample in samples) / PADDING)
                     for axis in (0, 1))
    pixels = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8)
    for place, sample in zip(pixels, samples):
        place[:sample["pixels"].shape[0], :sample["pixels"].shape[1]] = sample["pixels"]
    return {"pixels": pixels, "sizes": [tuple(sample["pixels"].shape[:2]) for sample in samples],
            **{name: [sample[name] for sample in samples] for name in samples[0] if name != "pixels"}}


# --- model and loss ----------------------------------------------------------------------

class RowRoIAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign (sampling_ratio r), on a CPU as one sum of weighted rows of all maps.

    Every bin of a box is the mean of r * r bilinear samples, so a weighted sum of 4 * r * r pixels: an embedding bag
    over the maps' pixels, each a row of C channels. Forward and backward then work on whole rows and all cores, where
    torchvision's backward adds number by number on one.

    torchvision guesses the scale of the maps once, from the sizes of the first pictures without their padding: wrong
    for pictures under some 90 pixels, and another guess where a run is continued. Here the padded size gives it.
    """

    def forward(self, x, boxes, image_shapes):
        # x: maps (B, C, H, W); boxes: B of (Q, 4) in input pixels -> (Q of all pictures, C, bins, bins)
        maps = [each for name, each in x.items() if name in self.featmap_names]
        padded = PADDING * math.ceil(max(height for height, _ in image_shapes) / PADDING)
        levels = [round(math.log2(padded / each.shape[2])) for each in maps]  # 3: a pixel of the map is 8 of the input
        self.scales = [2.0 ** -level for level in levels]
        self.map_levels = initLevelMapper(levels[0], levels[-1], self.canonical_scale, self.canonical_level)
        if maps[0].device.type != "cpu" or self.sampling_ratio < 1:
            return super().forward(x, boxes, image_shapes)
        rows = torch.cat([each.permute(0, 2, 3, 1).flatten(0, 2) for each in maps])  # (B * H * W of all maps, C)
        with torch.no_grad():
            index, weight = self.pixels_of(maps, boxes)
        pooled = nn.functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight.to(rows.dtype))
        bins = self.output_size  # the order of weights that were trained on torchvision's is kept:
        return pooled.view(-1, *bins, rows.shape[1]).permute(0, 3, 1, 2)  # (Q * bins, C) -> (Q, C, bins, bins)

    def pixels_of(self, maps, boxes):
        """(row of each pixel that a bin sums, its weight), both (Q * bins, 4 r r)."""
        heights, widths = (torch.tensor([each.shape[axis] for each in maps]) for axis in (2, 3))
        starts = torch.cumsum(len(maps[0]) * heights * widths, 0) - len(maps[0]) * heights * widths
        level = self.map_levels(boxes) if len(maps) > 1 else torch.zeros(sum(map(len, boxes)), dtype=torch.long)
        picture = torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor([len(each) for each in boxes]))
        height, width = heights[level], widths[level]  # (Q,) of the map that a box is pooled from
        left, top, right, bottom = (torch.cat(boxes) * torch.tensor(self.scales)[level, None]).unbind(1)
        y, y_weight = self.samples_of(top, bottom, height, self.output_size[0])
        x, x_weight = self.samples_of(left, right, width, self.output_size[1])
        first = (starts[level] + picture * height * width)[:, None, None, None, None]  # row of the map's first pixel
        index = first + y[:, :, None, :, None] * width[:, None, None, None, None] + x[:, None, :, None, :]
        weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]  # (Q, bins, bins, 2 r, 2 r)
        return index.flatten(0, 2).flatten(1), weight.flatten(0, 2).flatten(1)

    def samples_of(self, low, high, length, n_bins):
        """Along one axis (pixels, weights) of each bin's samples, (Q, bins, 2 r) both; low, high, length: (Q,).

        As torchvision's kernel: a box is at least one pixel, a sample within a pixel outside counts as on the border,
        one further out counts nothing.
        """
        ratio, last = self.sampling_ratio, (length - 1)[:, None]
        step = ((high - low).clamp(min=1) / (n_bins * ratio))[:, None]
        place = low[:, None] + (torch.arange(n_bins * ratio) + 0.5) * step  # (Q, bins * r)
        inside = (place >= -1) & (place <= length[:, None])
        place = torch.minimum(place.clamp(min=0), last)
        before = place.long()
        pixels, share = torch.stack([before, torch.minimum(before + 1, last)], 2), place - before
        weights = torch.stack([1 - share, share], 2) * inside[..., None] / ratio  # (Q, bins * r, 2)
        return pixels.view(-1, n_bins, 2 * ratio), weights.view(-1, n_bins, 2 * ratio)


class StateRoIHeads(RoIHeads):
    """torchvision's RoIHeads with new predictors for P parts and a third head for S states (S = 0: none).

    Training: the sampled proposals keep the index of the ground-truth box that they matched, so the state loss is the
    cross-entropy over the foreground ones whose box has a known state. Inference: after class scores and suppression
    the final boxes are pooled once more, as Mask R-CNN (He et al. 2017) does, and each gets its S probabilities.
    """

    def __init__(self, heads, n_parts, n_states, class_weights=None):
        n_features = heads.box_predictor.cls_score.in_features
        matcher, sampler, pool = heads.proposal_matcher, heads.fg_bg_sampler, heads.box_roi_pool
        pool = RowRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        super().__init__(pool, heads.box_head, FastRCNNPredictor(n_features, n_parts + 1),
                         matcher.high_threshold, matcher.low_threshold, sampler.batch_size_per_image,
                         sampler.positive_fraction, heads.box_coder.weights, detection_scores.LOWEST_SCORE, heads.nms_thresh,
                         heads.detections_per_img)
        self.n_states = n_states
        self.state_head = nn.Sequential(nn.Linear(n_features, 256), nn.ReLU(), nn.Dropout(0.2),
                                        nn.Linear(256, n_states)) if n_states else None
        self.register_buffer("class_weights", torch.tensor(class_weights or [1.0] * n_states), persistent=False)

    def forward(self, features, proposals, image_shapes, targets=None):
        # features: maps (B, C, H, W); proposals: B of (Q, 4); targets: B dicts of boxes (K, 4), labels, states (K,)
        if self.training:
            proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))  # (Q, F)
        class_logits, box_regression = self.box_predictor(pooled)  # (Q, P + 1), (Q, 4 (P + 1))
        if self.training:
            classifier, box_reg = fastrcnn_loss(class_logits, box_regression, labels, regression)
            losses = {"loss_classifier": classifier, "loss_box_reg": box_reg}
            if self.state_head is not None:
                losses["loss_state"] = self.state_loss(pooled, matched, labels, targets)
            return [], losses
        boxes, scores, labels = self.postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        states = self.state_probabilities(features, boxes, image_shapes)
        return [{"boxes": b, "scores": s, "labels": c, "states": p}
                for b, s, c, p in zip(boxes, scores, labels, states)], {}

    def state_loss(self, pooled, matched, labels, targets):
        """Mean cross-entropy over the foreground proposals with a known state; 0 where there are none."""
        states = torch.cat([target_states(target["states"], index) for target, index in zip(targets, matched)])
        known = (torch.cat(labels) > 0) & (states >= 0)  # (Q,), True = this proposal teaches a state
        logits = self.state_head(pooled[known]).float()  # (n, F) -> (n, S)
        if not len(logits):
            return logits.sum()
        return nn.functional.cross_entropy(logits, states[known], self.class_weights)

    def state_probabilities(self, features, boxes, image_shapes):
        """B of (D, S) for the final boxes, B of (D, 4)."""
        counts = [len(each) for each in boxes]
        if self.state_head is None or not sum(counts):
            return [each.new_zeros(len(each), self.n_states) for each in boxes]
        pooled = self.box_head(self.box_roi_pool(features, boxes, image_shapes))  # (D of all pictures, F)
        return self.state_head(pooled).float().softmax(1).split(counts)


def target_states(states, matched):
    """(Q,) state of the ground-truth box that each proposal matched; UNKNOWN in a picture without boxes."""
    return states[matched] if len(states) else torch.full_like(matched, part_boxes.UNKNOWN)


class PartDetector(nn.Module):
    """torchvision's Faster R-CNN for P parts, with the state of each part; `settings` as model_settings makes them.

    forward: inputs (B, 3, H, W) normalised and padded with 0, sizes: B of (height, width) -> B dicts of detections,
    boxes (D, 4) in input pixels, scores (D,), labels (D,) from 1, states (D, S); with targets: dict of losses.
    """

    def __init__(self, settings, class_weights=None):
        super().__init__()
        self.settings, rcnn = settings, build_rcnn(settings)
        self.backbone, self.rpn = rcnn.backbone, rcnn.rpn
        self.roi_heads = StateRoIHeads(rcnn.roi_heads, len(settings["parts"]), len(settings["states"]), class_weights)
        for head in (self.rpn.head, self.roi_heads.box_predictor):
            head.register_forward_hook(in_float32)

    def forward(self, inputs, sizes, targets=None):
        # (B, 3, H, W) -> maps (B, 256, H / 4, W / 4) and smaller -> B detections, or losses
        return self.heads(self.features(inputs), inputs, sizes, targets)

    def features(self, inputs):
        """Maps of the pyramid, in float32: torchvision makes its anchors in their precision, and bf16 rounds them."""
        return {name: each.float() for name, each in self.backbone(inputs).items()}

    def heads(self, features, inputs, sizes, targets=None):
        """Losses where there are targets, else detections; train() and eval() decide on dropout and BatchNorm only."""
        self.rpn.training = self.roi_heads.training = targets is not None
        proposals, rpn_losses = self.rpn(ImageList(inputs, sizes), features, targets)
        detections, losses = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **rpn_losses} if targets is not None else detections

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and self.settings["frozen_norm"]:
                module.eval()
        return self


def in_float32(module, inputs, output):
    """Forward hook: torchvision decodes boxes in the precision of the outputs; bf16 has steps of 2 at 512 pixels."""
    first, second = output
    is_list = isinstance(first, list)
    return ([t.float() for t in first], [t.float() for t in second]) if is_list else (first.float(), second.float())


def build_rcnn(settings):
    """torchvision's Faster R-CNN with random weights, as `settings` (model, anchor_sizes) describe it."""
    is_mobile = "mobilenet" in settings["model"]  # its three levels share all sizes, a ResNet's levels take one each
    sizes = (tuple(settings["anchor_sizes"]),) * 3 if is_mobile else tuple((s,) for s in settings["anchor_sizes"])
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    if settings["model"] == "fasterrcnn_resnet18_fpn":
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d,
                                       trainable_layers=5, returned_layers=[2, 3, 4])
        rcnn = detection.FasterRCNN(
            backbone, rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
            box_head=TwoMLPHead(256 * 7 ** 2, 512), box_predictor=FastRCNNPredictor(512, 2), **SMALL_HEADS)
    else:
        rcnn = getattr(detection, settings["model"])(weights=None, weights_backbone=None, num_classes=2)
    rcnn.rpn.anchor_generator = anchors
    return rcnn


def uses_published_anchors(model):
    """True where published weights of the whole detector exist: its anchors belong to them, whatever the input size."""
    return model != "fasterrcnn_resnet18_fpn"


def model_settings(args, study, rows):
    """What describes the network, kept in the checkpoint; rows: the train rows."""
    short_side, longest, anchors = MODELS[args.model]
    if args.min_size and not uses_published_anchors(args.model):
        anchors = [round(side * args.min_size / short_side) for side in anchors]
    is_trained = args.pretrained or args.weights is not None or args.init_from is not None
    return {"model": args.model, "min_size": args.min_size or short_side, "parts": study.parts,
            "max_size": max(args.max_size or longest, args.min_size or short_side),
            "anchor_sizes": list(args.anchor_sizes or anchors), "states": study.state_names(rows, args.absent),
            "frozen_norm": args.norm == "frozen" or (args.norm == "auto" and is_trained),
            "pixel_mean": list(common.IMAGENET_MEAN), "pixel_sd": list(common.IMAGENET_STD)}


def build_model(args, settings, class_weights):
    """PartDetector with the weights that the flags ask for; the seed decides the random part."""
    torch.manual_seed(common.hash_seed(args.seed))
    model = PartDetector(settings, class_weights)
    if args.init_from:
        start_from(model, args.init_from, settings)
    elif args.weights or args.pretrained:
        source = args.weights or args.model.replace("fasterrcnn_resnet18_fpn", "resnet18")
        load_pretrained(model, common.load_weights_file(source) if args.weights else common.published_weights(source),
                        source)
    if args.init_from or args.weights or args.pretrained:
        freeze_layers(model.backbone.body, args.trainable_layers, settings["frozen_norm"])
    return model


def load_pretrained(model, state, source):
    """Weights of a whole detector without its predictors, or of the classifier that the backbone was."""
    is_detector = any(name.startswith("backbone.body.") for name in state)
    if is_detector:
        state = {name: value for name, value in state.items()
                 if name.startswith(("backbone.", "rpn.", "roi_heads.box_head."))}
    else:
        own = model.backbone.body.state_dict()
        state = {f"backbone.body.{name}": value for name, value in state.items()
                 for name in [name.removeprefix("features.")] if name in own}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise common.UserError(f"{source}: layers of another shape: {common.one_line(error)}") from None
    expected = ("backbone.", "rpn.", "roi_heads.box_head.") if is_detector else ("backbone.body.",)
    missing = [name for name in missing if name.startswith(expected) and not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise common.UserError(f"{source}: not the weights of this detector or its backbone: {len(missing)} layers "
                               f"missing, {len(unexpected)} too many (first: {[*missing, *unexpected][0]})")


def freeze_layers(body, n_trainable, frozen_norm):
    """Train the last n_trainable stages of a ResNet (of 5) or MobileNet (of 6), as torchvision counts them."""
    blocks = [name for name, _ in body.named_children()]
    if "layer4" in blocks:
        trained = ["layer4", "layer3", "layer2", "layer1", "conv1", "bn1"][:n_trainable + (n_trainable >= 5)]
    else:
        strided = [i for i, block in enumerate(body.children()) if getattr(block, "_is_cn", False)]
        first = [len(blocks), *reversed([0, *strided, len(blocks) - 1])][n_trainable]
        trained = blocks[first:]
    for name, parameter in body.named_parameters():
        is_norm = isinstance(body.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
        parameter.requires_grad_(name.split(".")[0] in trained and not (is_norm and frozen_norm))


def state_weights(study, rows, args):
    """Weights of the four states in the loss, mean 1 over the train boxes where balanced; None without any."""
    if args.state_class_weights == ["none"]:
        return None
    if args.state_class_weights != ["balanced"]:
        return args.state_class_weights
    states = np.concatenate([study.states[row][study.judged(row, args.absent)] for row in rows])
    counts = np.bincount(states[states >= 0], minlength=len(part_boxes.STATES))
    return (counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1) * (counts > 0)).tolist()


def total_loss(losses, state_weight):
    """Sum of torchvision's four losses, and the state loss times its weight."""
    return sum(value * (state_weight if name == "loss_state" else 1) for name, value in losses.items())


# --- training ---------------------------------------------------------------------------

def make_loaders(study, split, settings, args, compute):
    """Loader of the augmented train rows, and {part: loader} of the val and test rows as they are."""
    def loader(part, train):
        dataset = PartImages(study, split[part], args, settings, args.augment if train else "none")
        size = args.batch_size if train else args.val_batch_size or args.batch_size
        return common.make_loader(dataset, size, args, compute, train, study.store.cache == "ram",
                                  collate=collate)
    return loader("train", True), {part: loader(part, False) for part in ("val", "test")}


def to_device(batch, compute, settings):
    """Batch -> inputs (B, 3, H, W) normalised, 0 where padded; sizes; targets: B dicts of boxes, labels, states."""
    inputs = common.to_input(batch["pixels"], compute.device, settings["pixel_mean"], settings["pixel_sd"],
                             compute.channels_last)
    for picture, (height, width) in zip(inputs, batch["sizes"]):
        picture[:, height:], picture[:, :, width:] = 0, 0
    names = ("boxes", "labels", "states")
    targets = [{name: value.to(compute.device) for name, value in zip(names, values)}
               for values in zip(*(batch[name] for name in names))]
    return inputs, batch["sizes"], targets


def train_one_epoch(model, loader, training, compute, state_weight):
    """One pass over the train rows; returns {'train_loss': mean over the pictures, and each of its parts}."""
    model.train()
    for batch in training.batches(loader):
        inputs, sizes, targets = to_device(batch, compute, model.settings)
        with compute.autocast():
            losses = model(inputs, sizes, targets)  # (B, 3, H, W) -> dict of losses
        training.step(total_loss(losses, state_weight), **losses)
    return training.epoch_means()


@torch.no_grad()
def evaluate(model, loader, compute, seed, state_weight):
    """Whole split at once -> (M detections in pixels of the pictures on disk, {'val_loss': mean, and its parts}).

    The losses are those of the training path, without gradients, dropout or a change of any buffer; the sampler's draws
    depend on the seed and the batch alone, so that epochs can be compared.
    """
    model.eval()
    parts = []
    for number, batch in enumerate(loader):
        inputs, sizes, targets = to_device(batch, compute, model.settings)
        torch.manual_seed(common.hash_seed(seed, 1, number))
        with compute.autocast():
            features = model.features(inputs)  # (B, 3, H, W) -> maps
            losses = model.heads(features, inputs, sizes, targets)
            found = model.heads(features, inputs, sizes)
        losses["loss"] = total_loss(losses, state_weight)
        summed = {name: value.item() * len(sizes) for name, value in losses.items()}
        parts.append(([on_disk(each, scale) for each, scale in zip(found, batch["scale"])], summed))
    detections, summed = zip(*compute.processes.gather(parts))
    detections = list(itertools.chain(*detections))
    names = sorted(summed[0], key=lambda name: name != "loss")  # the whole loss first
    return detections, {f"val_{name}": sum(each[name] for each in summed) / len(detections) for name in names}


def on_disk(detected, scale):
    """Detections of one picture in numpy: boxes in its pixels on disk, labels from 0, states (D, S) or None."""
    values = {name: value.float().cpu().numpy() for name, value in detected.items()}
    return {"boxes": values["boxes"] * np.tile(scale, 2), "labels": values["labels"].astype(int) - 1,
            "scores": values["scores"].astype(float), "states": values["states"] if values["states"].shape[1] else None}


def fit(run, args, study, split):
    """Train on split['train'], choose the epoch on split['val']; returns ({part: detections}, settings, Training)."""
    compute, settings = run.compute, model_settings(args, study, split["train"])
    if args.augment == "light" and has_sides(study.parts):
        run.say("note: part names say left or right, so pictures are not flipped")
    if args.select == "joint_map" and not settings["states"]:
        raise common.UserError(f"--select {args.select}: no box has a state; use --select map")
    model = compute.place(build_model(args, settings, state_weights(study, split["train"], args)))
    train_loader, loaders = make_loaders(study, split, settings, args, compute)
    optimizer = common.build_optimizer([(model, 1.0)], args)
    training = common.Training(
        run, model, optimizer, args, select=args.select if args.select == "val_loss" else f"val_{args.select}",
        describe=lambda: describe(args, study, split, settings), higher_is_better=args.select != "val_loss")
    for _ in training.epochs():
        row = train_one_epoch(model, train_loader, training, compute, args.state_weight)
        detections, losses = evaluate(model, loaders["val"], compute, args.seed, args.state_weight)
        scores = detection_scores.Judged(study, split["val"], detections, settings, args.score_threshold, args.absent).epoch_metrics()
        training.end_epoch({**row, **losses, **{f"val_{name}": value for name, value in scores.items()}})
    best = common.load_model_file(run.path("best_model.pth"), common.script_name())
    common.load_state(model, best["model"], "best_model.pth")
    detections = {part: evaluate(model, loader, compute, args.seed, args.state_weight)[0]
                  for part, loader in loaders.items() if len(split[part])}
    return detections, settings, training


def describe(args, study, split, settings):
    """What prediction and evaluation need beside the weights; the train pictures' hashes show leakage later."""
    return {"settings": settings, "absent": args.absent, "score_threshold": args.score_threshold,
            "baseline": mean_boxes(study, split["train"], args.absent),
            "train_sha": [study.audit("pixel_sha")[row] for row in split["train"]]}


def start_from(model, path, settings):
    """--init_from: the weights of another run of this script, for the same parts and states."""
    content = common.load_model_file(path, common.script_name())
    with common.checkpoint_fields(path):
        other = content["settings"]
        same = [name for name in ("model", "parts", "states") if other[name] == settings[name]]
    if len(same) < 3:
        raise common.UserError(f"--init_from {path} is a {other['model']} for {other['parts']} with states "
                               f"{other['states']}; expected the model, parts and states of this run")
    common.load_state(model, content["model"], path)


def load_detector(path, compute):
    """Checkpoint, or run folder -> (PartDetector in evaluation mode on the device, what else the file holds)."""
    path = common.checkpoint_files([path])[0]
    content = common.load_model_file(path, common.script_name())
    with common.checkpoint_fields(path):
        settings = content["settings"]
        model = PartDetector(settings)
        common.load_state(model, content["model"], path)
        content["baseline"], content["train_sha"], content["absent"]
    return compute.place(model).eval(), content


# --- judging: detections -> COCO matching -> numbers ----------------------------------------

def mean_boxes(study, rows, absent):
    """Baseline without pictures: of each part the mean box, relative to its picture, its frequency and usual state."""
    boxes, score, state = np.zeros((len(study.parts), 4)), np.zeros(len(study.parts)), np.zeros(len(study.parts), int)
    for label in range(len(study.parts)):
        chosen = [(row, (study.labels[row] == label) & study.judged(row, absent)) for row in rows]
        relative = [study.boxes[row][keep] / np.tile(study.sizes[row], 2) for row, keep in chosen]
        states = np.concatenate([study.states[row][keep] for row, keep in chosen])
        if len(states):
            boxes[label] = np.concatenate(relative).mean(0)
            score[label] = np.mean([keep.any() for _, keep in chosen])
            state[label] = np.bincount(states + 1, minlength=2)[1:].argmax()
    return {"boxes": boxes, "score": score, "state": state}


def baseline_detections(baseline, sizes, has_states):
    """The mean boxes on M pictures of sizes (M, 2), in the form of detections."""
    boxes, score, state = (np.asarray(baseline[name]) for name in ("boxes", "score", "state"))
    labels = np.flatnonzero(score > 0)
    return [{"boxes": boxes[labels] * np.tile(size, 2), "labels": labels, "scores": score[labels],
             "states": np.eye(len(part_boxes.STATES))[state[labels]] if has_states else None} for size in sizes]


def best_per_part(detected):
    """--one_per_part: the detections of one picture, only the best of each part."""
    order = np.argsort(-detected["scores"], kind="stable")
    first = np.sort(order[np.unique(detected["labels"][order], return_index=True)[1]])
    return {name: None if values is None else values[first] for name, values in detected.items()}


# --- results: detections -> tables, pictures, run folder ---------------------------------------

@dataclasses.dataclass
class Scored:
    """Detections on pictures that the model was not trained on, beside the mean boxes on the same pictures."""
    rows: np.ndarray  # (M,) rows of the study
    part: str  # val or test
    detections: list  # M dicts
    baseline: list  # M dicts


def detection_rows(names, detections, parts, errors=None, absent_below=None):
    """[dict] for the CSV: image, part, score, state, its probabilities, x1 y1 x2 y2; absent_below: --one_per_part."""
    rows = []
    for k, (name, detected) in enumerate(zip(names, detections)):
        states = detection_scores.state_of(detected)
        for d, (label, score, box) in enumerate(zip(detected["labels"], detected["scores"], detected["boxes"])):
            row = {"image": name, "part": parts[label], "score": float(score)}
            if detected["states"] is not None:
                row |= {"state": part_boxes.STATES[states[d]]}
                row |= {f"p_{name}": float(p) for name, p in zip(part_boxes.STATES, detected["states"][d])}
            rows.append(row | dict(zip(("x1", "y1", "x2", "y2"), map(float, box))))
        if absent_below is not None and not (errors and errors[k]):
            seen = set(detected["labels"][detected["scores"] >= absent_below].tolist())
            rows += [{"image": name, "part": part, "state": part_boxes.STATES[part_boxes.ABSENT]} for c, part in enumerate(parts)
                     if c not in seen]
        if errors and errors[k]:
            rows.append({"image": name, "error": errors[k]})
    columns = ["image", "part", "score", "state", *(f"p_{s}" for s in part_boxes.STATES), "x1", "y1", "x2", "y2", "error"]
    always = ("image", "part", "score", "x1", "y1", "x2", "y2")
    used = [c for c in columns if c in always or any(c in row for row in rows)]
    return [{column: row.get(column) for column in used} for row in rows] or [dict.fromkeys(used)]


def coco_results(names, ids, detections, parts, category_ids):
    """COCO results: image_id and category_id as the annotation file writes them, bbox = left, top, width, height."""
    results = []
    for name, own, detected in zip(names, ids, detections):
        for d, (label, score, box) in enumerate(zip(detected["labels"], detected["scores"], detected["boxes"])):
            entry = {"image_id": own, "category_id": category_ids.get(parts[label], int(label) + 1),
                     "bbox": [*map(float, box[:2]), *map(float, box[2:] - box[:2])], "score": float(score),
                     "file_name": str(name), "part": parts[label]}
            if detected["states"] is not None:
                entry |= {"state": part_boxes.STATES[detection_scores.state_of(detected)[d]], "state_probabilities": detected["states"][d].tolist()}
            results.append(entry)
    return results


def limited(detections, args):
    """The detections that are written: all, or with --one_per_part the best of each part over the threshold."""
    if not args.one_per_part:
        return detections
    return [best_per_part({name: None if values is None else values[each["scores"] >= args.score_threshold]
                           for name, values in each.items()}) for each in detections]


def draw_boxes(pixels, boxes, texts, states, long_side=640):
    """Picture (H, W, 3) scaled to long_side, with a frame in the colour of its state and a text at every box."""
    from PIL import Image, ImageDraw, ImageFont
    scale = long_side / max(pixels.shape[:2])
    picture = Image.fromarray(pixels).resize((round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, long_side // 52))
    placed = []
    for (left, top, right, bottom), text, state in sorted(zip(boxes, texts, states), key=lambda each: each[0][1]):
        colour, (x1, y1, x2, y2) = STATE_COLOURS[state], [v * scale for v in (left, top, right, bottom)]
        draw.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=colour, width=max(2, long_side // 320))
        width, height = draw.textbbox((0, 0), text, font=font)[2:]
        x, y = min(x1, picture.width - width - 4), max(0, y1 - height - 4)
        while any(abs(x - a) < max(width, w) and abs(y - b) < height + 3 for a, b, w in placed) and (
                y + 2 * height < picture.height):
            y += height + 4
        placed.append((x, y, width))
        draw.rectangle([x, y, x + width + 4, y + height + 3], fill=colour)
        draw.text((x + 2, y), text, fill="white", font=font)
    return np.asarray(picture)


def draw_detections(pixels, detected, parts, threshold, scale=1.0):
    """The detections from `threshold` on a picture (H, W, 3), with part, state and score."""
    states, sure = detection_scores.state_of(detected), detected["scores"] >= threshold
    texts = [f"{parts[label]} {part_boxes.STATES[state] + ' ' if state >= 0 else ''}{score:.2f}"
             for label, state, score in zip(detected["labels"], states, detected["scores"])]
    return draw_boxes(pixels, detected["boxes"][sure] * scale, np.array(texts, object)[sure], states[sure])


def draw_truth(study, row, scale):
    """The annotated boxes on the picture of a row; ignored ones are left out."""
    keep = ~study.ignored[row]
    texts = [f"{study.parts[label]} {part_boxes.STATES[state] if state >= 0 else ''}".strip()
             for label, state in zip(study.labels[row][keep], study.states[row][keep])]
    return draw_boxes(study.picture(row), study.boxes[row][keep] * scale, texts, study.states[row][keep])


def write_picture(path, pixels):
    """JPEG of uint8 (H, W, 3)."""
    from PIL import Image
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=85)
    common.write_whole(path, packed.getvalue())


def write_sheet(path, study, scored, order, threshold):
    """Contact sheet: in each line a picture with its annotated boxes (left) and what was detected (right)."""
    lines = []
    for k in order:
        row = scored.rows[k]
        pixels, scale = study.picture(row), study.picture(row).shape[1] / study.sizes[row][0]
        pair = [draw_truth(study, row, scale),
                draw_detections(pixels, scored.detections[k], study.parts, threshold, scale)]
        lines.append(np.concatenate([pair[0], np.full((len(pair[0]), 12, 3), 255, np.uint8), pair[1]], axis=1))
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 12), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    write_picture(path, np.concatenate(padded))


def error_counts(judged, threshold):
    """(M,) missed boxes, wrong detections and wrong states of each picture: what orders the failure sheet."""
    missed = (judged.counts["truth"] - judged.counts["right"]).sum(1)
    confusion = judged.counts["confusion"]
    wrong_state = confusion.sum((1, 2)) - np.trace(confusion, axis1=1, axis2=2)
    return missed + judged.counts["wrong"].sum(1) + wrong_state


def per_part_rows(judged, result):
    """One dict per part: boxes, AP with interval, the mean box's AP, precision and recall, hallucinations."""
    ap50 = detection_scores.average_precision(judged.matching["map"], judged.every)[0]  # (P,)
    baseline_ap50 = detection_scores.average_precision(judged.of_baseline["map"], judged.every)[0]
    rows = []
    for label, part in enumerate(judged.parts):
        truth, right, wrong = (judged.counts[name][:, label].sum() for name in ("truth", "right", "wrong"))
        absent, anywhere, boxed, there, _ = judged.hallucinated[:, label].sum(0)
        ap = result.each.model["ap"].at(label)
        rows.append({"target": part, "boxes": int(truth), "ap": ap.value, "ap_low": ap.low, "ap_high": ap.high,
                     "ap50": ap50[label], "baseline_ap": result.each.baseline["ap"].value[label],
                     "baseline_ap50": baseline_ap50[label],
                     "precision": detection_scores.share(right, right + wrong),
                     "recall": detection_scores.share(right, truth), "absent": int(absent),
                     "hallucinated": int(anywhere), "absent_boxes": int(boxed), "hallucinated_there": int(there)})
    return rows


def per_state_rows(judged):
    """One dict per state: how often it is true, the confusion with each other one, recall, precision, F1, joint AP."""
    if not judged.has_states:
        return []
    confusion, matching = judged.counts["confusion"].sum(0), judged.matching["joint_map"]
    ap, categories = detection_scores.average_precision(matching, judged.every), np.array(matching.params.catIds, int)
    rows = []
    for k, state in enumerate(part_boxes.STATES):
        true, predicted, right = confusion[k].sum(), confusion[:, k].sum(), confusion[k, k]
        rows.append({"state": state, "found": int(true), **{f"called {s}": int(confusion[k, j])
                                                            for j, s in enumerate(part_boxes.STATES)},
                     "recall": detection_scores.share(right, true), "precision": detection_scores.share(right, predicted),
                     "f1": detection_scores.share(2 * right, true + predicted), "joint_ap": detection_scores.mean_of(ap[:, (categories - 1) % 4 == k])})
    return rows


def find_alarms(judged, scored, result, threshold):
    """Sentences on signs of a broken model, or of data that cannot judge it."""
    alarms, confusion = [], judged.counts["confusion"].sum(0)
    if not any((each["scores"] >= threshold).any() for each in scored.detections):
        alarms.append(f"no detection reaches the score {threshold:g}")
    unseen = [part for part, n in zip(judged.parts, result.n) if not n]
    if unseen:
        alarms.append(f"parts without a box here, so not judged: {', '.join(unseen)}")
    boxes = [np.round(each["boxes"][each["scores"] >= threshold], 1).tobytes() for each in scored.detections]
    repeats = max(collections.Counter(each for each in boxes if each).values(), default=0)
    if repeats >= 3:
        alarms.append(f"exactly the same boxes in {repeats} of {len(boxes)} pictures")
    if judged.has_states and confusion.sum():
        if (confusion.sum(0) > 0).sum() == 1 and (confusion.sum(1) > 0).sum() > 1:
            alarms.append(f"one state only is ever predicted: {part_boxes.STATES[confusion.sum(0).argmax()]}")
        if confusion.sum(1).max() >= 0.95 * confusion.sum():
            alarms.append(f"95 % or more of the found parts are {part_boxes.STATES[confusion.sum(1).argmax()]}: their state "
                          "accuracy says little")
    return alarms


def criteria_names(settings):
    """What --criteria may name."""
    overall = ["map", "map50", "precision", "recall", "hallucination_rate", "hallucination_rate_anywhere"]
    if settings["states"]:
        overall += ["joint_map", "map_present", "state_accuracy", "macro_f1", "balanced_accuracy"]
    return verdicts.spell_metrics(overall, ("ap",), settings["parts"])


@common.first_process_only
def report_results(run, args, study, scored, settings, context):
    """metrics.json, tables, pictures, report.html; context: split, best_epoch, alarms, random_weights."""
    threshold = args.score_threshold
    judged = detection_scores.Judged(study, scored.rows, scored.detections, settings, threshold, args.absent, scored.baseline)
    result = judged.result(args.bootstrap_draws, args.seed)
    held_out = scored.part == "test"
    verdict = verdicts.verdict_sentence(result, "map", None, held_out)
    names = criteria_names(settings)
    criteria = verdicts.judge_criteria(verdicts.parse_criteria(args.criteria, names),
                                       verdicts.named_estimates(result, names))
    metrics = {"part": scored.part, "best_epoch": context.get("best_epoch"), "verdict": verdict, "held_out": held_out,
               "pictures": len(scored.rows), "score_threshold": threshold, "absent": args.absent,
               **result.record("per_target"), "criteria": criteria,
               "alarms": find_alarms(judged, scored, result, threshold) + context.get("alarms", []),
               "per_part": per_part_rows(judged, result), "per_state": per_state_rows(judged)}
    write_results(run, args, study, scored, judged, metrics)
    write_page(run, args, study, metrics, result, context)
    common.write_json(run.path("metrics.json"), metrics)  # last: its presence says that the run is finished
    verdicts.say_results(run, metrics)


def write_results(run, args, study, scored, judged, metrics):
    """Detections as COCO results and CSV, the two tables, the plot of the parts, the sheets and single pictures."""
    names, written = [study.images[row] for row in scored.rows], limited(scored.detections, args)
    ids, category_ids = [study.ids[row] for row in scored.rows], study.category_ids[str(study.origin[scored.rows[0]])]
    common.write_json(run.path(f"detections_{scored.part}.json"),
                      coco_results(names, ids, written, study.parts, category_ids))
    common.write_table(run.path(f"detections_{scored.part}.csv"), detection_rows(
        names, written, study.parts, absent_below=args.score_threshold if args.one_per_part else None))
    common.write_table(run.path("per_part.csv"), metrics["per_part"])
    if metrics["per_state"]:
        common.write_table(run.path("per_state.csv"), metrics["per_state"])
    plotting.plot_per_target(metrics["per_part"][:40], run.path("per_part.png"), ("ap", "ap50"))
    order = np.argsort(error_counts(judged, args.score_threshold), kind="stable")
    write_sheet(run.path("failures.jpg"), study, scored, order[::-1][:4], args.score_threshold)
    write_sheet(run.path("best_pictures.jpg"), study, scored, order[:2], args.score_threshold)
    run.path("pictures").mkdir(exist_ok=True)
    for k in range(min(args.visualize, len(names))):
        row = scored.rows[k]
        scale = study.picture(row).shape[1] / study.sizes[row][0]
        write_picture(run.path("pictures") / f"{k:03d}_{Path(names[k]).stem}.jpg", draw_detections(
            study.picture(row), written[k], study.parts, args.score_threshold, scale))


def write_page(run, args, study, metrics, result, context):
    """report.html: the verdict first, then the order of sections that all train scripts share."""
    part_columns = {"target": "part", "boxes": "n", "ap": "AP", "ap_low": "low", "ap_high": "high", "ap50": "AP50",
                    "baseline_ap": "mean box", "precision": "precision", "recall": "recall", "absent": "absent",
                    "hallucinated": "claimed"}
    formats = {name: ".3f" for name in part_columns if name not in ("target", "boxes", "absent", "hallucinated")}
    state_columns = {name: name.removeprefix("called ").replace("_", " ") for row in metrics["per_state"][:1]
                     for name in row}
    t = metrics["score_threshold"]
    sections = [
        ("Data and split", [
            reporting.html_text(f"{metrics['pictures']} pictures scored, {len(study.parts)} parts; {len(study.skipped)} "
                             f"files or boxes skipped. Absent parts that have a box: {metrics['absent']}."),
            *([reporting.html_text("\n".join(f"- {note}" for note in study.notes))] if study.notes else []),
            reporting.html_table([split_row(study, part, rows) for part, rows in context["split"].items() if len(rows)])]),
        ("Leakage", reporting.leakage_blocks(run)),
        ("Metrics", [
            *(reporting.html_text(f"ALARM: {alarm}", "poor") for alarm in metrics["alarms"]),
            reporting.html_table(summary_rows(result), formats=dict.fromkeys(("value", "low", "high", "baseline"), ".3f"),
                              caption=f"On the {metrics['part']} pictures; precision, recall and hallucinations at "
                                      f"score {t:g}; {metrics['method']}"),
            reporting.html_table(metrics["per_part"], part_columns, formats,
                              "Each part: n boxes, COCO AP over IoU .50 to .95 with its interval, AP of the mean box; "
                              "claimed: found, though absent in that picture"),
            reporting.html_image(run.path("per_part.png"), "AP and AP50 of each part, interval, mean-box baseline"),
            *([reporting.html_table(metrics["criteria"], caption="Criteria")] if metrics["criteria"] else [])]),
        ("States", [reporting.html_table(
            metrics["per_state"], state_columns, dict.fromkeys(("recall", "precision", "f1", "joint_ap"), ".3f"),
            "True state (rows) of the boxes found at IoU .5 and any score, and what the model calls them (columns)")]
            if metrics["per_state"] else []),
        ("Learning curves", reporting.history_blocks(run)),
        ("Best and worst cases", [
            reporting.html_image(run.path("failures.jpg"), "The pictures with most errors: annotated (left), detected "
                              f"from score {t:g} (right). Green intact, orange damaged, pink absent, blue occluded, "
                              "grey no state"),
            reporting.html_image(run.path("best_pictures.jpg"), "The pictures with fewest errors")]),
        ("Limits", [reporting.html_text(limits_text(args, metrics, context))]),
        ("Command and versions", reporting.command_blocks())]
    level = verdicts.verdict_level(result.gain("map"), metrics["alarms"])
    reporting.write_report(run.path("report.html"), f"Parts and their states: {run.folder.name}",
                        (level, metrics["verdict"]), sections, run.compute.text, key_figures(result))


def split_row(study, part, rows):
    """One line of the split table: pictures, boxes, states, and the parts that have no box there."""
    labels = {label for row in rows for label in study.labels[row].tolist()}
    states = np.concatenate([np.empty(0, int), *(study.states[row] for row in rows)])
    return {"part": part, "pictures": len(rows), "boxes": sum(len(study.labels[row]) for row in rows),
            **{state: int((states == k).sum()) for k, state in enumerate(part_boxes.STATES)},
            "parts without a box": ", ".join(p for c, p in enumerate(study.parts) if c not in labels) or "none"}


SUMMARY = {"map": "AP", "map50": "AP50", "map_present": "AP without absent parts",
           "joint_map": "joint AP (part and state)", "precision": "precision", "recall": "recall",
           "state_accuracy": "state accuracy", "macro_f1": "state macro F1",
           "balanced_accuracy": "state balanced accuracy",
           "hallucination_rate": "hallucinations: absent part claimed at its box",
           "hallucination_rate_anywhere": "hallucinations: absent part claimed anywhere",
           "absent_box_detected": "box of an absent part detected, under any state"}


def summary_rows(result):
    """[{metric, value, low, high, baseline, which}] of the numbers over all parts."""
    rows = []
    for name, text in SUMMARY.items():
        if name in result.overall.model:
            found, baseline = result.overall.model[name], result.overall.baseline.get(name)
            which = "mean box" if name in ("map", "map50", "joint_map") else "always intact"
            rows.append({"metric": text, "value": found.value, "low": found.low, "high": found.high,
                         "baseline": baseline.value if baseline else None, "which": which if baseline else ""})
    return rows


def key_figures(result):
    """[(label, value, remark)] for the top of the report."""
    model, baseline = result.overall.model, result.overall.baseline
    figures = {"AP": model["map"], "Joint AP": model.get("joint_map")}
    if baseline.get("balanced_accuracy") and baseline["balanced_accuracy"].value != 1:  # with one state nothing to tell
        figures["State balanced accuracy"] = model["balanced_accuracy"]
    figures["AP of the mean box"] = baseline["map"]
    figures["Hallucination rate"] = model["hallucination_rate_anywhere"]
    return [reporting.key_figure(label, found, result.method) for label, found in figures.items()
            if found is not None and np.isfinite(found.value)]


def limits_text(args, metrics, context):
    """What a reader must not conclude from this run, as a list."""
    lines = ["Valid for pictures like these, taken and annotated by people like these; nothing else was tested.",
             "States are judged on the parts that were found; one that is missed counts in recall and joint AP only."]
    if not metrics["held_out"]:
        lines.append(f"The epoch was chosen by {args.select} on the pictures that are scored here, so the numbers are "
                     "optimistic; use --test_ratio or --test_json.")
    if not args.group_column:
        lines.append("No --group_column: pictures of one object or session may stand on both sides of the split.")
    if context.get("random_weights"):
        lines.append("Started from random weights; published weights usually do far better on data of this size.")
    if math.isnan(metrics["model"]["hallucination_rate_anywhere"]["value"]):
        lines.append("No part is annotated as absent: hallucinations were not measured.")
    return "\n".join(f"- {line}" for line in lines)


# --- one run, and the other modes -------------------------------------------------------------

def make_split(args, study):
    """{train, val, test: (n,) rows}: the files of the parts, --split_file, or shares of the one file."""
    if args.val_json:
        return {part: np.flatnonzero(study.origin == part) for part in ("train", "val", "test")}
    return splitting.split_of_flags(args, study.images, study.strata(), study.groups)


def prepare_split(run, args, study, split):
    """splits.json and the leakage report; refuses a split that leaks or teaches nothing, names parts that it lacks."""
    empty = [part for part in ("train", "val") if not any(study.judged(row, args.absent).any() for row in split[part])]
    if empty:
        raise common.UserError(f"no box in the {' and '.join(empty)} part: nothing to learn or judge; change the split")
    phash = np.array(study.audit("phash"), dtype=np.uint64)
    report = splitting.leakage_report(split, study.images, study.audit("pixel_sha"), phash, {"groups": study.groups})
    splitting.record_split(run, split, study.images, report)
    for row in (split_row(study, part, rows) for part, rows in split.items() if len(rows)):
        run.say(", ".join(f"{name} {value}" for name, value in row.items()))


def run_split(run, args, study, split):
    """Train and score one split: test where there is one, else val."""
    prepare_split(run, args, study, split)
    context = {"split": split, "random_weights": not (args.pretrained or args.weights or args.init_from)}
    if args.dry_run:
        split = {part: rows[:2 * args.batch_size] for part, rows in split.items()}
    run.write_args(**study.record(split), val_batch_size=args.val_batch_size)  # the validation loss draws by batches
    detections, settings, training = fit(run, args, study, split)
    panels = [{re.sub(r"(train|val)_loss_(\w+)", r"\1_\2_loss", name): value for name, value in row.items()}
              for row in training.progress.history]  # each loss in a panel of its own
    plotting.plot_history(panels, run.path("training_history.png"), training.progress.best_epoch)
    baseline = mean_boxes(study, split["train"], args.absent)
    best_epoch = training.progress.best_epoch
    context |= {"best_epoch": best_epoch, "alarms": gap_alarms(training.progress.history[best_epoch - 1])}
    for part in detections:
        if part == "val" and "test" in detections:
            continue
        others = baseline_detections(baseline, study.sizes[split[part]], bool(settings["states"]))
        scored = Scored(split[part], part, detections[part], others)
        report_results(run, args, study, scored, settings, context)


def gap_alarms(row):
    """A sentence where the validation loss of the chosen epoch is far above the train loss; else []."""
    far = row["val_loss"] > 2 * row["train_loss"]
    return [f"validation loss {row['val_loss']:.3f} far above train loss {row['train_loss']:.3f}: pictures learnt by "
            "heart"] if far else []


def train(args):
    """--mode train."""
    files = {part: (getattr(args, f"{part}_json"), getattr(args, f"{part}_images")) for part in ("train", "val", "test")
             if getattr(args, f"{part}_json")}
    with common.start_run(args) as run:
        study = load_study(args, files, run.say)
        if study.skipped:
            common.write_table(run.path("skipped.csv"), study.skipped)
        split = make_split(args, study)
        verdicts.parse_criteria(args.criteria, criteria_names(model_settings(args, study, split["train"])))
        run_split(run, args, study, split)


def evaluate_checkpoint(args):
    """--mode evaluate: a run folder with the same report, on pictures that the checkpoint was not trained on."""
    with common.start_run(args) as run:
        model, content = load_detector(args.checkpoint, run.compute)
        settings = content["settings"]
        verdicts.parse_criteria(args.criteria, criteria_names(settings))
        args.min_size, args.model = settings["min_size"], settings["model"]
        run.say(f"checkpoint: {settings['model']}, epoch {content['epoch']}, input {settings['min_size']} to "
                f"{settings['max_size']} px, {len(settings['parts'])} parts, states: {settings['states'] or 'none'}")
        study = load_study(args, {"test": (args.json, args.images_dir)}, run.say, settings["parts"])
        if study.skipped:
            common.write_table(run.path("skipped.csv"), study.skipped)
        rows = np.arange(len(study.images))
        run.write_args(**study.record({"test": rows}))
        args.absent = content["absent"]
        check_against_training(run, args, study, content["train_sha"])
        dataset = PartImages(study, rows, args, settings, "none")
        loader = common.make_loader(dataset, args.val_batch_size or args.batch_size, args, run.compute, False,
                                    study.store.cache == "ram",
                                  collate=collate)
        detections, losses = evaluate(model, loader, run.compute, args.seed, args.state_weight)
        others = baseline_detections(content["baseline"], study.sizes, bool(settings["states"]))
        scored = Scored(rows, "test", detections, others)
        report_results(run, args, study, scored, settings, {"split": {"test": rows}})


def check_against_training(run, args, study, train_sha):
    """Leakage report of an evaluation: pictures that the checkpoint was trained on. UserError unless allowed."""
    shared = sorted({str(name) for name, sha in zip(study.images, study.audit("pixel_sha")) if sha in set(train_sha)})
    found = {"exact_duplicates": {"count": len(shared), "examples": shared[:5]}}
    report = {"between": {"train-test": found}, "within": {}}
    common.write_json(run.path("leakage_report.json"), report)
    run.say(splitting.leakage_text(report))
    splitting.check_leakage(report, args.allow_leakage)


@torch.no_grad()
def predict(args):
    """--mode predict: detections of every picture under --images_dir; an unreadable one keeps a row with its error."""
    compute = common.choose_compute(args.device, args.use_amp)
    print(f"device: {compute.text}", flush=True)
    model, content = load_detector(args.checkpoint, compute)
    settings, paths = content["settings"], file_names.find_images(args.images_dir)
    if not paths:
        raise common.UserError(f"--images_dir {args.images_dir}: expected pictures, found none")
    names = [path.relative_to(args.images_dir).as_posix() for path in paths]
    pictures = picture_files.Pictures(paths, settings["min_size"], lambda pixels, size: resize_picture(
        pixels, fit_size(*size, settings["min_size"], settings["max_size"])))
    loader = common.make_loader(pictures, args.batch_size, args, compute, False, collate=collate)
    detections, errors = [], []
    for batch in loader:
        inputs, sizes, _ = to_device({**batch, "boxes": [], "labels": [], "states": []}, compute, settings)
        with compute.autocast():
            found = model(inputs, sizes)
        detections += [on_disk(each, scale) for each, scale in zip(found, batch["scale"])]
        errors += batch["error"]
    for k in np.flatnonzero([bool(error) for error in errors]):
        detections[k] = {name: None if v is None else v[:0] for name, v in detections[k].items()}
    written, parts = limited(detections, args), settings["parts"]
    common.write_json(args.output, coco_results(names, range(1, len(names) + 1), written, parts, {}))
    common.write_table(args.output.with_suffix(".csv"), detection_rows(
        names, written, parts, errors, args.score_threshold if args.one_per_part else None))
    folder = args.output.with_name(f"{args.output.stem}_pictures")
    for k in [k for k, error in enumerate(errors) if not error][:args.visualize]:
        folder.mkdir(exist_ok=True)
        write_picture(folder / f"{k:03d}_{paths[k].stem}.jpg", draw_detections(
            picture_files.load_image(paths[k]), written[k], parts, args.score_threshold))
    failed = sum(map(bool, errors))
    sure = sum(int((each["scores"] >= args.score_threshold).sum()) for each in written)
    print(f"{len(paths)} pictures, {failed} could not be read (see the error column); {sure} detections from score "
          f"{args.score_threshold:g}; written to {args.output}, {args.output.with_suffix('.csv')}"
          f"{f' and {folder}' if folder.exists() else ''}")


def convert(args):
    """--mode convert: part annotations (or any COCO read here) -> clean COCO with area, iscrowd, state and trust."""
    found = part_boxes.read_annotations(args.json)
    names = [image.name for image in found.images]
    sizes = [image.size for image in found.images]
    paths = part_boxes.find_pictures(found, args.images_dir)[0] if args.images_dir else []
    for number, path in enumerate(paths):
        if path is not None:
            names[number] = path.relative_to(args.images_dir).as_posix()
            audit = picture_files.audit_image(path, 32)[0]
            if not audit.error:
                sizes[number] = audit.width, audit.height
    coco, dropped = part_boxes.as_coco(found, names, sizes)
    common.write_json(args.output, coco)
    for line in dropped:
        print(f"dropped: {line}")
    absent = sum(len(image["absent_parts"]) for image in coco["images"])
    print(f"{args.output}: {len(names)} images, {len(coco['annotations'])} boxes of {len(found.parts)} parts, "
          f"{absent} absent parts without a box (absent_parts of their image), {len(dropped)} boxes dropped")


def audit(args):
    """--mode audit: what the annotations and pictures hold and what is wrong with them; --output writes it as JSON."""
    study = load_study(args, {"train": (args.json, args.images_dir)}, print)
    labels, states = (np.concatenate(values) for values in (study.labels, study.states))
    rows = [{"part": part, "boxes": int((labels == c).sum()),
             **{state: int(((labels == c) & (states == k)).sum()) for k, state in enumerate(part_boxes.STATES)},
             "absent without a box": sum(int((each == c).sum()) for each in study.absent)}
            for c, part in enumerate(study.parts)]
    print("".join(f"{name:>22}" if k else f"{name:24}" for k, name in enumerate(rows[0])))
    for row in rows:
        print("".join(f"{str(value):>22}" if k else f"{str(value)[:23]:24}" for k, value in enumerate(row.values())))
    everyone = {"all": np.arange(len(study.images))}
    report = splitting.leakage_report(everyone, study.images, study.audit("pixel_sha"),
                                      np.array(study.audit("phash"), np.uint64))
    print(splitting.leakage_text(report) or "no picture stands there twice")
    if args.output:
        common.write_json(args.output, {"pictures": len(study.images), "parts": rows, "skipped": study.skipped,
                                        "notes": study.notes, "copies": report["within"]["all"]})


def main():
    args = parse_args()
    modes = {"train": train, "convert": convert, "predict": predict, "evaluate": evaluate_checkpoint, "audit": audit}
    modes[args.mode](args)


if __name__ == "__main__":
    common.run_main(main)
