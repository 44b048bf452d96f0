"""Train a detector that finds the parts of an object, each a box, and says of each: intact, damaged, absent, occluded.

    python train_detector.py --train_json train.json --val_json val.json --train_images train/ --val_images val/
    python train_detector.py --train_json all.json --train_images images/ --split_ratio 0.8 --dry_run
    python train_detector.py --train_json all.json --train_images images/ --folds 5
    python train_detector.py --mode convert --json parts.json --images_dir images --output coco.json
    python train_detector.py --mode audit --json train.json --images_dir train/
    python train_detector.py --mode evaluate --checkpoint outputs/run_X --json test.json --images_dir test/
    python train_detector.py --mode predict --checkpoint outputs/run_X --images_dir new/ --visualize 8

Training and evaluation write outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first),
metrics.json, per_part.csv, per_state.csv, detections_<part>.json (COCO results) and .csv,
failures.jpg, pictures/, skipped.csv, args.json, log.txt; training also best_model.pth, last.pth,
training_history.csv and .png, splits.json, leakage_report.json, <part>_coco.json, and
with --baseline heads baseline/. With --folds K the same in each fold_K/, pictures left out in turn, and
what the K detectors found in them judged as one. Prediction writes --output (COCO results), the
same as CSV beside it, and --visualize pictures.

TRAIN_JSON, VAL_JSON, TRAIN_CLEANED and VAL_CLEANED (the folders of pictures) and OUTPUT_DIR, from
the environment or lines NAME=VALUE of ./.env, are the defaults of --train_json, --val_json,
--train_images, --val_images, --output_dir.

Where a score comes from: judge() hands the detections of the test pictures, else of the val
pictures, to evidence/detection_judging.py. AP is that of pycocotools, mean over IoU .5 to .95 and
over the parts, beside that of the mean box of each part; of joint AP part and state together are
the class.

Letters: N images, M images scored, B batch, P parts, S states, K boxes and D detections of one
image, Q proposals of a batch, F features. Units: boxes are x1 y1 x2 y2 in pixels of the upright
picture on disk; scores and probabilities 0..1.
"""
import collections
import dataclasses
import functools
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import common
from evidence import (box_pictures, calibrating, detection_judging, detection_scores, detection_tables, judging,
                      plotting, reporting, row_warnings, seen_rows, splitting)
from readers import backbones, file_names, part_boxes, picture_files

ENVIRONMENT = {
    "TRAIN_JSON": "train_json",
    "VAL_JSON": "val_json",
    "TRAIN_CLEANED": "train_images",
    "VAL_CLEANED": "val_images",
    "OUTPUT_DIR": "output_dir",
}
RESNET18 = "fasterrcnn_resnet18_fpn"
COCO_ANCHORS = (32, 64, 128, 256, 512)  # sides of the square ones, in input pixels
LEVEL_STRIDES = (8, 16, 32, 64)  # input pixels of a cell on each level of RESNET18's pyramid
N_LEVELS = len(LEVEL_STRIDES)
MODELS = {  # and their --min_size, --max_size
    "fasterrcnn_resnet50_fpn": (800, 1333),
    "fasterrcnn_resnet50_fpn_v2": (800, 1333),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (320, 640),
    RESNET18: (384, 640),
}
# Inputs are padded to multiples of the coarsest stride, 64 in each of MODELS: torchvision takes
# input // map for the stride of the anchors, which would otherwise depend on the other pictures of
# a batch.
PADDING = LEVEL_STRIDES[-1]
SPLIT_WAYS = {  # and the flags of each, which the other ways refuse
    "folds": ["folds"],
    "split_file": ["split_file"],
    "split_ratio": ["split_ratio", "train_ratio", "test_ratio"],
    "val_json": ["val_json", "test_json"],
}
MODE_FLAGS = {  # mode: (flags that it needs, others that it alone or few other modes read)
    "train": ("train_json train_images", "folds fold"),
    "convert": ("json output", "images_dir"),
    "predict": ("checkpoint images_dir", "output"),
    "evaluate": ("checkpoint json images_dir", ""),
    "audit": ("json images_dir", "output"),
}
# what --checkpoint decides
CHECKPOINT_FLAGS = ("model", "min_size", "max_size", "anchor_sizes", "pixel_range", "absent")


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_shared_arguments(
        parser, epochs=20, batch_size=2, lr=1e-4, weight_decay=1e-4, scheduler="plateau",
        plateau_patience=3, augment="light", augments=("none", "light"))
    add_data_arguments(parser.group("pictures and annotations"))
    add_model_arguments(parser.group("model"))
    add_result_arguments(parser.group("results"))
    parser.set_defaults(**environment_defaults())
    args = common.parse_arguments(parser, argv)
    check_flags(parser, args)
    if args.mode == "train":
        args = settle_split(parser, args)
        check_split_flags(parser, args)
    return args


def add_data_arguments(data):
    """What is done, with which pictures and boxes."""
    data("--mode", choices=tuple(MODE_FLAGS), default="train", help="what to do")
    for part in splitting.PARTS:
        data(f"--{part}_json", type=Path, may_change=True,
             help=f"part annotations or COCO file of the {part} split")
        data(f"--{part}_images", type=Path, may_change=True,
             help="folder of its pictures, searched with its subfolders")
    data("--split_ratio", type=common.bounded(float, 1e-6, 1),
         help="without --val_json: share of --train_json that trains; --test_ratio is tested, the "
              "rest validates")
    data("--json", type=Path, help="annotations to convert, evaluate or audit")
    data("--images_dir", type=Path, may_change=True,
         help="pictures to convert, predict, evaluate or audit")
    data("--checkpoint", type=common.best_model_of,
         help="best_model.pth, or its run folder, to predict or evaluate")
    data("--output", type=common.new_file,
         help="JSON to write (predict: default detections.json; convert; audit)")
    data("--min_trust", type=common.SHARE, default=0.5,
         help="boxes whose annotators trusted them less do not count, and train as background")
    data("--box_format", choices=part_boxes.BOX_FORMATS,
         help="what the four numbers of a box are: left top width height in pixels (the default), "
              "corners, centre and size, or left top width height as shares of the picture")
    data("--state_attribute", metavar="NAME",
         help="attribute of the boxes that names their state (default: state)")
    data("--drop_empty", action="store_true",
         help="leave out pictures without a box; else they teach the background")
    data("--absent", choices=("keep", "drop"), default="keep",
         help="boxes of absent parts: keep trains and scores them with their state, drop takes "
              "them for background")


def add_model_arguments(model):
    """The network, its input and its loss."""
    model("--model", "--backbone", "--encoder", choices=tuple(MODELS), default="fasterrcnn_resnet50_fpn",
          help="torchvision detector")
    model("--min_size", "--image_size", "--img_size", type=common.SIDE,
          help="short side of the input in pixels (default: the model's)")
    model("--max_size", type=common.SIDE, help="longest side of the input in pixels (default: the model's)")
    model("--anchor_sizes", type=common.bounded(int, 2), nargs="+", metavar="PX",
          help="sides of the anchors in input pixels, smallest first: five, or for "
               f"{RESNET18} four, eight, ... (default: the published five, or eight that fit the train boxes)")
    model("--trainable_layers", type=common.bounded(int, 0, 5), default=3,
          help="last stages of the backbone that are trained, of five resolutions; with random "
               "weights all are")
    model("--state_weight", type=common.AMOUNT, default=0.5,
          help="weight of the state loss in the total")
    model("--state_class_weights", choices=("none", "balanced"), default="none",
          help="weights of the states in their loss: balanced = inverse frequency in the train boxes")
    model("--select", choices=("val_loss", "map", "joint_map"), default="val_loss",
          help="validation column that chooses the epoch and drives --scheduler plateau")


def add_result_arguments(result):
    """What counts as a detection, and what is drawn."""
    result("--score_threshold", type=common.SHARE, default=0.5,
           help="score from which a detection counts in precision, recall, hallucinations and "
                "pictures")
    result("--nms_iou", type=common.SHARE,
           help="of two boxes of one part that overlap more, the better is kept; lower it where "
                "boxes come twice (default: the checkpoint's, else 0.5)")
    result("--one_per_part", action="store_true",
           help="keep the best box of each part; absent where none; the report is of what is kept")
    result("--baseline", choices=("boxes", "heads"), default="boxes",
           help="what the detector must beat: boxes = the mean box of each part, which alone never "
                "makes a page green; heads = also the same detector with only its heads trained, "
                "which takes about as long again")
    result("--visualize", type=common.WHOLE, default=8, may_change=True,
           help="pictures to draw with boxes and states")


def environment_defaults():
    """{flag: text} of ENVIRONMENT, from the environment or else lines NAME=VALUE of ./.env."""
    path = Path(".env")
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    lines = re.findall(r"^\s*(?:export )?\s*(\w+)\s*=(.*)$", text, re.MULTILINE)
    values = {name: value.strip().strip("\"'") for name, value in lines} | os.environ
    return {flag: values[name] for name, flag in ENVIRONMENT.items() if values.get(name)}


def check_flags(parser, args):
    """parser.error for combinations that cannot work."""
    needed, others = map(str.split, MODE_FLAGS[args.mode])
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"--mode {args.mode} needs {' and '.join(missing)}")
    of_all_modes = " ".join(itertools.chain(*MODE_FLAGS.values())).split()
    idle = args.given.intersection(of_all_modes) - {*needed, *others}
    if idle:
        parser.error(f"--mode {args.mode} does not use --{' and --'.join(sorted(idle))}; leave it out (training starts "
                     "from a checkpoint with --init_from; runs are written to --output_dir)")
    fixed = [name for name in CHECKPOINT_FLAGS if name in args.given]
    if fixed and "checkpoint" in needed:
        parser.error(f"--mode {args.mode} takes --{' and --'.join(fixed)} from the checkpoint; leave it out")
    if args.compile:
        parser.error("--compile: the detector's inputs vary in size; leave it out")
    anchors = args.anchor_sizes or []
    if args.model == RESNET18:
        number = f"{N_LEVELS}, {2 * N_LEVELS}, ..."
        fits = len(anchors) % N_LEVELS == 0
    else:
        number = len(COCO_ANCHORS)
        fits = len(anchors) in (0, number)
    if not fits or anchors != sorted(anchors):
        parser.error(f"--anchor_sizes {anchors}: {args.model} takes {number} sides, smallest first")
    if args.baseline == "heads" and not (starts_trained(args) and args.trainable_layers):
        parser.error("--baseline heads needs trained weights to start from and --trainable_layers "
                     "over 0: else it is the model itself, or one on random features")


def settle_split(parser, args):
    """One way to split, and --split_ratio as the ratios that all scripts know.

    The way of the command line goes before those of a configuration and of VAL_JSON,
    and there the first of SPLIT_WAYS. Flags of the other ways are refused where they
    are typed, and else given up, with a note.
    """
    asked = [way for way in SPLIT_WAYS if getattr(args, way)]
    if not asked:
        return args
    way = min(asked, key=lambda each: each not in args.given)  # the first that is typed, else the first
    idle = {name for name in itertools.chain(*SPLIT_WAYS.values()) if getattr(args, name)} - {*SPLIT_WAYS[way]}
    refused = sorted(idle & args.given - {"train_ratio"})  # which may stand as 1 - val_ratio, as in all scripts
    if refused:
        parser.error(f"--{way} {getattr(args, way)} makes the split; leave out --{' and --'.join(refused)}")
    given_up = sorted(idle - args.given)
    if given_up:
        common.print_first(f"note: --{way} makes the split, so {' and '.join(given_up)} of the configuration or "
                           "the environment not used")
    settled = {name: 0 if name in ("folds", "test_ratio") else None for name in given_up}
    if way == "split_ratio":
        settled["train_ratio"] = args.split_ratio
        settled["val_ratio"] = round(1 - (args.split_ratio + args.test_ratio), 9)
    return common.with_flags(args, **settled)


def check_split_flags(parser, args):
    """parser.error for what the way to split lacks, and for shares that contradict it."""
    for part in ("val", "test"):
        path = getattr(args, f"{part}_json")
        if path and not getattr(args, f"{part}_images"):
            parser.error(f"--{part}_json {path} needs --{part}_images")
    if "split_ratio" in args.given and args.given & {"train_ratio", "val_ratio"}:
        parser.error(f"--split_ratio {args.split_ratio:g} is the split: give no --train_ratio, --val_ratio")
    if args.folds and not args.val_ratio:
        parser.error(f"--folds {args.folds} --val_ratio 0: pictures of the train part choose the epoch")
    if args.test_json and not args.val_json:
        parser.error(f"--test_json {args.test_json} needs --val_json: without it --train_json is "
                     "split")
    idle = args.given & {"fold", "val_ratio"}
    if args.val_json and idle:
        parser.error(f"--val_json {args.val_json} makes the split; leave out --{' and --'.join(sorted(idle))}")
    if not args.val_json:
        splitting.check_flags(parser, args)


# --- data: annotations on disk -> boxes -> sample -----------------------------------------

@dataclasses.dataclass(kw_only=True)
class Study(picture_files.StoredPictures):
    """N pictures with their boxes, cleaned."""
    truth: part_boxes.PartTruth
    images: list  # N AnnotatedImages
    category_ids: dict  # train, val or test -> {part: id as its file writes it}
    skipped: list  # dicts of image, annotation and reason
    notes: list

    @property
    def strata(self):
        """(N,) rarest part and state of each picture, so that a split deals those out evenly."""
        cells = [list(zip(labels, states)) for labels, states in zip(self.truth.labels, self.truth.states)]
        counts = collections.Counter(itertools.chain.from_iterable(cells))
        rarest = [min(row, key=lambda cell: (counts[cell], cell), default="none") for row in cells]
        return np.array(list(map(str, rarest)))

    def data_record(self, split):
        """What args.json says of the data and their split; a resumed run must find the same."""
        truth = self.truth
        contents = [*truth.parts, *truth.images, *truth.ids, truth.groups, *self.audit("file_sha")]
        for row in zip(truth.boxes, truth.labels, truth.states, truth.ignored, truth.absent):
            contents += row
        return common.data_record(
            contents, split,
            pictures=len(truth.images),
            boxes=sum(map(len, truth.boxes)),
            parts=truth.parts)


def load_study(args, files, say, known_parts=None):
    """{split: (JSON, folder of pictures)} -> Study; what cannot be used is listed in `skipped`.

    known_parts: those of the checkpoint that is to find them, or to be trained further.
    """
    read = {}
    images = []
    skipped = []
    notes = []
    for origin, (path, folder) in files.items():
        found = part_boxes.read_annotations(path, args.box_format, args.state_attribute)
        part_boxes.find_pictures(found, folder, args.exact_names)
        for image in found.images:
            image.origin = origin
        read[origin] = found
        images += found.images
        skipped += found.skipped
        notes += found.notes
    say(f"decoding {len(images)} pictures")
    store = picture_files.ImageStore(
        [image.path for image in images], input_limits(args)[0], args.cache, args.pixel_range)
    stored, bad = part_boxes.check_pictures(store.audit, images, args.on_bad_file)
    used = [images[i] for i in stored]
    parts, part_notes = part_boxes.used_parts(read.values(), used, known_parts)
    paths, folders = zip(*files.values())
    part_boxes.refuse_other_convention(used, common.shorten_list(paths), args.box_format)
    if len({image.name for image in used}) < len(used):  # two files share names
        for image in used:
            image.name = f"{image.origin}/{image.name}"
    truth, without_area, box_notes = part_boxes.as_truth(
        used, parts, args.min_trust,
        groups=part_boxes.read_groups(used, args.group_column, notes),
        keeps_absent=args.absent == "keep")
    study = Study(
        truth=truth,
        images=used,
        category_ids={origin: part_boxes.number_parts(parts, found.category_ids)
                      for origin, found in read.items()},
        store=store,
        stored=np.array(stored),
        skipped=without_area + skipped + bad + part_boxes.without_entry(folders, images),
        notes=notes + part_notes + box_notes)
    if args.drop_empty:
        study = without_empty(study)
    say_study(study, say)
    return study


def input_limits(args):
    """(short side, largest longest side) of the input in pixels."""
    min_size, max_size = MODELS[args.model]
    min_size = args.min_size or min_size
    return min_size, max(args.max_size or max_size, min_size)


def without_empty(study):
    """The study without the pictures that have no box to learn."""
    truth = study.truth
    rows = [row for row in range(len(study.images)) if truth.judged(row).any()]
    if not rows:
        raise common.UserError("no picture has a box that is trusted (--min_trust, --absent): --drop_empty leaves none")
    empty = [{"image": name, "reason": "no box (--drop_empty)"} for name in np.delete(truth.images, rows)]
    return dataclasses.replace(
        study,
        truth=truth.take(rows),
        images=[study.images[row] for row in rows],
        stored=study.stored[rows],
        skipped=study.skipped + empty)


def say_study(study, say):
    """What was read, how much was left out and why."""
    truth = study.truth
    n_boxes = [len(boxes) for boxes in truth.boxes]
    groups = "" if truth.groups is None else f" in {len(set(truth.groups))} groups"
    states = collections.Counter(itertools.chain.from_iterable(truth.states))
    names = [*part_boxes.STATES, "without a state"]  # the last is that of UNKNOWN, -1
    listed = ", ".join(f"{count} {names[state]}" for state, count in sorted(states.items()))
    say(f"data: {len(n_boxes)} pictures{groups} ({n_boxes.count(0)} without a box), "
        f"{len(truth.parts)} parts, {sum(n_boxes)} boxes ({listed}), "
        f"{sum(map(len, truth.absent))} absent parts without a box; {len(study.skipped)} skipped; "
        f"{study.store.description}")
    for note in study.notes:
        say(f"note: {note}")
    if study.skipped:
        lines = [": ".join(map(str, each.values())) for each in study.skipped]
        say(f"skipped: {common.shorten_list(lines)}")


def fit_size(width, height, min_size, max_size, factor=1.0):
    """(width, height) of the input: short side min_size times factor, the long one limited."""
    scale = min(min_size * factor / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def mirror(pixels, boxes):
    """Picture (H, W, 3) and boxes (K, 4), relative to it, mirrored; a front wheel stays one."""
    left, top, right, bottom = boxes.T
    return pixels[:, ::-1], np.stack([1 - right, top, 1 - left, bottom], axis=1)


@dataclasses.dataclass(eq=False)
class PartImages(common.Samples):
    """Samples of chosen rows; a key is (epoch, index), which seeds flip, colours and size.

    Each sample: pixels uint8 (H, W, 3); boxes (K, 4) in its pixels; labels (K,) from 1; states
    (K,), -1 unknown; scale (2,) pixels of the picture on disk per input pixel.
    """
    study: Study
    rows: np.ndarray  # (M,)
    settings: dict  # of model_settings
    augment: str  # none or light
    seed: int

    def __post_init__(self):
        self.mirrored = part_boxes.mirrored_labels(self.study.truth.parts)

    def __getitem__(self, key):
        epoch, index = key
        row = int(self.rows[index])
        truth = self.study.truth
        boxes, labels, states = truth.relative(row)
        generator = common.generator_for(self.seed, epoch, row)
        drawn = common.sample_augmentation(self.augment, generator)
        size_factor = 1.0
        if self.augment != "none":
            size_factor = 0.8 + 0.4 * torch.rand((), generator=generator).item()
        size = fit_size(*truth.sizes[row], self.settings["min_size"], self.settings["max_size"], size_factor)
        pixels = picture_files.resize(self.study.picture(row), size)
        if drawn.flip and self.mirrored is not None:
            pixels, boxes = mirror(pixels, boxes)
            labels = self.mirrored[labels]
        if self.augment != "none":
            pixels = common.jitter_colours(np.ascontiguousarray(pixels), drawn)
        return {
            "pixels": torch.from_numpy(np.array(pixels)),
            "boxes": torch.from_numpy((boxes * np.tile(size, 2)).astype(np.float32)),
            "labels": torch.from_numpy(labels + 1),
            "states": torch.from_numpy(states),
            "scale": truth.sizes[row] / size,
            "name": truth.images[row],
        }


def padded_size(sizes):
    """(height, width) of a batch of pictures of these (height, width)."""
    return tuple(PADDING * math.ceil(max(sides) / PADDING) for sides in zip(*sizes))


def collate(samples):
    """Samples -> batch: pixels (B, H, W, 3) padded by 0, sizes (height, width), else lists."""
    sizes = [tuple(sample["pixels"].shape[:2]) for sample in samples]
    pixels = torch.zeros(len(samples), *padded_size(sizes), 3, dtype=torch.uint8)
    for place, sample, (own_height, own_width) in zip(pixels, samples, sizes):
        place[:own_height, :own_width] = sample["pixels"]
    others = {name: [sample[name] for sample in samples] for name in samples[0] if name != "pixels"}
    return {"pixels": pixels, "sizes": sizes, **others}


def collate_alike(samples):
    """Samples -> batches of neighbours padded to the same size, so that none changes what is found in another one."""
    neighbours = itertools.groupby(samples, lambda sample: padded_size([sample["pixels"].shape[:2]]))
    return [collate(list(alike)) for _, alike in neighbours]


# --- model and loss ----------------------------------------------------------------------

class PaddedRoIAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign; the padded size of the input gives the scale of each map.

    torchvision guesses the scales once, from the sizes of the first pictures without their padding:
    wrong for pictures under some 90 pixels, and another guess where a run is continued. On CPUs its
    kernel takes ten times as long as align_boxes, and 0.4 of a training step.
    """

    def forward(self, x, boxes, image_shapes):
        # maps (B, C, H, W); boxes: B of (Q, 4) in input pixels -> (Q of all, C, bins, bins)
        shapes = [padded_size(image_shapes)]
        self.scales = None
        if boxes[0].device.type != "cpu":
            return super().forward(x, boxes, shapes)
        super().forward(x, [each[:0] for each in boxes], shapes)  # without boxes it only finds the scale of each map
        maps = [each for name, each in x.items() if name in self.featmap_names]
        level = self.map_levels(boxes)  # (Q,)
        picture = torch.repeat_interleave(torch.tensor(list(map(len, boxes))))  # (Q,)
        joined = torch.cat(boxes)
        pooled = []
        for number, scale in enumerate(self.scales):
            own = level == number
            pooled.append(align_boxes(maps[number], picture[own], scale * joined[own], self.output_size[0]))
        order = level.argsort(stable=True).argsort()
        return torch.cat(pooled)[order]


def align_boxes(features, picture, boxes, n_bins):
    """torchvision.ops.roi_align with 2 x 2 samples a bin, for boxes that begin on the map: (Q, C, bins, bins).

    features: (B, C, H, W); picture: (Q,) index into B; boxes: (Q, 4) in pixels of the map. A sample
    lies between four pixels, so each bin is a weighted sum of 16, whose channels are added together.
    """
    n_channels, height, width = features.shape[1:]
    low, high = boxes.view(-1, 2, 2, 1).unbind(1)  # (Q, 2, 1) each, x and y
    ends = torch.tensor([width, height])[:, None]
    sample = (torch.arange(2 * n_bins) + 0.5) / (2 * n_bins)
    places = low + (high - low).clamp(min=1) * sample  # (Q, 2, 2 * bins): a box is at least a pixel wide
    is_on_map = places <= ends  # what lies beyond it is 0
    places = places.clamp(max=ends - 1)
    pixels = torch.stack([places.floor(), places.ceil()], 3).long()
    share = places.frac()
    of_axes = torch.stack([1 - share, share], 3) * is_on_map[..., None] / 2
    columns, rows = pixels.view(-1, 2, n_bins, 4).unbind(1)  # (Q, bins, 4) each
    rows = rows + height * picture[:, None, None]
    index = width * rows[:, :, None, :, None] + columns[:, None, :, None]  # (Q, bins, bins, 4, 4)
    of_columns, of_rows = of_axes.view(-1, 2, n_bins, 4).unbind(1)
    weights = of_rows[:, :, None, :, None] * of_columns[:, None, :, None]
    pooled = nn.functional.embedding_bag(
        index.view(-1, 16), features.permute(0, 2, 3, 1).flatten(0, 2), mode="sum",
        per_sample_weights=weights.view(-1, 16))
    return pooled.view(-1, n_bins, n_bins, n_channels).permute(0, 3, 1, 2)


class PartDetector(nn.Module):
    """torchvision's Faster R-CNN for P parts, with a third head for their S states (0: none).

    settings: of model_settings; class_weights: (S,) of the states in their loss, None = equal.

    forward: inputs (B, 3, H, W) normalised and padded with 0, sizes: B of (height, width) -> B
    dicts of detections, boxes (D, 4) in input pixels, scores (D,), labels (D,) from 1, states
    (D, S); with targets, B dicts of boxes (K, 4), labels and states (K,): dict of losses.

    Training: the sampled proposals keep the index of the ground-truth box that they matched, so the
    state loss is the cross-entropy over the foreground ones whose box has a known state. Inference:
    after class scores and suppression the final boxes are pooled once more, as Mask R-CNN (He et
    al. 2017) does, and each gets its S probabilities.
    """

    def __init__(self, settings, class_weights=None):
        super().__init__()
        rcnn = build_rcnn(settings)
        self.settings = settings
        self.backbone = rcnn.backbone
        self.rpn = rcnn.rpn
        self.rpn.head.register_forward_hook(in_float32)
        heads = rcnn.roi_heads
        pool = heads.box_roi_pool
        n_features = heads.box_predictor.cls_score.in_features
        heads.box_roi_pool = PaddedRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        heads.box_predictor = FastRCNNPredictor(n_features, len(settings["parts"]) + 1)
        heads.nms_thresh = settings["nms_iou"]
        self.roi_heads = heads  # torchvision's limits: 100 detections of a picture, from a score of .05 on
        self.temperature = 1.0  # of the states' probabilities, see finish_best_model
        self.n_states = len(settings["states"])
        if self.n_states:
            heads.state_head = nn.Sequential(
                nn.Linear(n_features, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, self.n_states))
        weights = torch.tensor(class_weights or [1.0] * self.n_states)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, inputs, sizes, targets=None):
        # (B, 3, H, W) -> maps (B, 256, H / 4, W / 4) and smaller -> B detections, or losses
        return self.heads(self.features(inputs), inputs, sizes, targets)

    def features(self, inputs):
        """Maps of the pyramid in float32: anchors take their precision, and bf16 rounds them."""
        return {name: each.float() for name, each in self.backbone(inputs).items()}

    def picture_features(self, features, sizes):
        """(B, 256) on the CPU: means of the maps in a box around each picture, pooled as those of the parts are."""
        whole = [features["0"].new_tensor([[0, 0, width, height]]) for height, width in sizes]
        return self.roi_heads.box_roi_pool(features, whole, sizes).mean((2, 3)).cpu()

    def heads(self, features, inputs, sizes, targets=None):
        """Losses where there are targets, else detections; train() and eval() decide on dropout and BatchNorm alone."""
        self.rpn.training = targets is not None  # True: losses, and as many proposals as in training
        proposals, losses = self.rpn(detection.image_list.ImageList(inputs, sizes), features, targets)
        if targets is None:
            return self.detections(features, proposals, sizes)
        return self.box_losses(features, proposals, sizes, targets) | losses

    def box_losses(self, features, proposals, sizes, targets):
        """{name: loss} of boxes, parts and states; proposals: B of (Q, 4)."""
        proposals, matched, labels, regression = self.roi_heads.select_training_samples(proposals, targets)
        pooled = self.pool(features, proposals, sizes)  # (Q, F)
        classifier, box_reg = detection.roi_heads.fastrcnn_loss(*self.box_logits(pooled), labels, regression)
        losses = {"loss_classifier": classifier, "loss_box_reg": box_reg}
        if self.n_states:
            losses["loss_state"] = self.state_loss(pooled, matched, labels, targets)
        return losses

    def detections(self, features, proposals, sizes):
        """B dicts of what is found in proposals, B of (Q, 4)."""
        logits = self.box_logits(self.pool(features, proposals, sizes))
        boxes, scores, labels = self.roi_heads.postprocess_detections(*logits, proposals, sizes)
        states = self.state_probabilities(features, boxes, sizes)
        names = ("boxes", "scores", "labels", "states")
        return [dict(zip(names, found)) for found in zip(boxes, scores, labels, states)]

    def pool(self, features, boxes, sizes):
        """Features of B of (Q, 4) boxes -> (Q of all pictures, F)."""
        return self.roi_heads.box_head(self.roi_heads.box_roi_pool(features, boxes, sizes))

    def box_logits(self, pooled):
        """(Q, F) -> (Q, P + 1), (Q, 4 (P + 1)), in float32 as those of the RPN, see in_float32."""
        return [each.float() for each in self.roi_heads.box_predictor(pooled)]

    def state_loss(self, pooled, matched, labels, targets):
        """Mean cross-entropy over the foreground proposals with a known state, 0 without any."""
        states = torch.cat([target_states(target["states"], index)
                            for target, index in zip(targets, matched)])
        known = (torch.cat(labels) > 0) & (states >= 0)  # (Q,), True = it teaches a state
        logits = self.roi_heads.state_head(pooled[known]).float()  # (n, F) -> (n, S)
        if not len(logits):
            return logits.sum()
        return nn.functional.cross_entropy(logits, states[known], self.class_weights)

    def state_probabilities(self, features, boxes, sizes):
        """B of (D, S) for the final boxes, B of (D, 4)."""
        counts = [len(each) for each in boxes]
        if not self.n_states or not sum(counts):
            return [each.new_zeros(len(each), self.n_states) for each in boxes]
        pooled = self.pool(features, boxes, sizes)  # (D of all pictures, F)
        logits = self.roi_heads.state_head(pooled).float() / self.temperature  # (D, F) -> (D, S)
        return logits.softmax(1).split(counts)  # B of (D, S)

    def train(self, mode=True):
        super().train(mode)
        if self.settings["frozen_norm"]:
            for module in backbones.batch_norms(self):
                module.eval()
        return self


def target_states(states, matched):
    """(Q,) state of the true box that each proposal matched; UNKNOWN in a picture without any."""
    return states[matched] if len(states) else torch.full_like(matched, part_boxes.UNKNOWN)


def in_float32(module, inputs, output):
    """Forward hook: boxes are decoded in this precision; bf16 has steps of 2 at 512 pixels."""
    return tuple([each.float() for each in maps] for maps in output)


def build_rcnn(settings):
    """torchvision's Faster R-CNN with random weights: `settings` model and anchor_sizes."""
    name = settings["model"]
    if "mobilenet" in name:
        sizes = [settings["anchor_sizes"]] * 3  # its three levels share all sizes
    else:
        n_levels = N_LEVELS if name == RESNET18 else len(COCO_ANCHORS)
        sizes = np.reshape(settings["anchor_sizes"], (n_levels, -1)).tolist()
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    if name != RESNET18:
        rcnn = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2)
        rcnn.rpn.anchor_generator = anchors
        return rcnn
    # for a CPU: no level of stride 4, and a quarter of torchvision's proposals, plenty for twenty parts
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5,
        returned_layers=[2, 3, 4])
    return detection.FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(256 * 7 ** 2, 512),
        box_predictor=FastRCNNPredictor(512, 2),
        box_batch_size_per_image=128,
        rpn_batch_size_per_image=128,
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=500,
        rpn_post_nms_top_n_test=250)


def fit_anchors(truth, min_size, max_size):
    """Sides of anchors in input pixels, two for each level of RESNET18's pyramid, smallest first.

    A level whose cells are s pixels wide serves boxes with a side (root of the area)
    from 3 s to 6 s, the finest the smaller ones too and the coarsest the larger ones:
    then some anchor lies close to any box. Its sides are the k-means of the log sides
    of its boxes; where it has few boxes, 3 s and 1.41 times that.
    """
    logs = []
    for row, (width, height) in enumerate(truth.sizes):
        scale = fit_size(width, height, min_size, max_size)[0] / width
        boxes = truth.boxes[row][truth.judged(row)]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        logs.append(np.log(area * scale ** 2) / 2)
    logs = np.concatenate(logs)  # (boxes,)
    first = np.log([3 * stride for stride in LEVEL_STRIDES])  # smallest side of each level
    level = np.digitize(logs, first[1:])
    sides = []
    for number, smallest in enumerate(first):
        centres = smallest + np.log(2) * np.array([0, 0.5])
        own = logs[level == number]
        if len(own) >= 20:
            centres = two_means(own)
        sides += [max(2, round(side)) for side in np.exp(centres).tolist()]
    return sides


def two_means(values):
    """Centres (2,) of two clusters of values, smallest first: k-means from the quartiles on."""
    centres = np.quantile(values, [0.25, 0.75])
    for _ in range(100):
        is_upper = values > centres.mean()
        if not is_upper.any():
            break
        centres = np.array([values[~is_upper].mean(), values[is_upper].mean()])
    return centres


def starting_settings(args):
    """The settings of the detector of --init_from; UserError where it is another model, whose levels differ."""
    content = backbones.starting_content(args.init_from, model=args.model)
    with common.checkpoint_fields(args.init_from):
        return content["settings"]


def choose_anchors(args, truth, min_size, max_size):
    """Sides by the flag; of the detector or the published weights to start from; or those that fit the train boxes."""
    if args.anchor_sizes:
        return args.anchor_sizes
    if args.init_from:
        return starting_settings(args)["anchor_sizes"]
    if args.model != RESNET18:
        return list(COCO_ANCHORS)
    return fit_anchors(truth, min_size, max_size)


def model_settings(args, truth):
    """What describes the network, kept in the checkpoint; truth: of the train pictures."""
    min_size, max_size = input_limits(args)
    return {
        "model": args.model,
        "min_size": min_size,
        "max_size": max_size,
        "anchor_sizes": choose_anchors(args, truth, min_size, max_size),
        "parts": truth.parts,
        "states": list(part_boxes.STATES) if truth.has_states() else [],
        "nms_iou": 0.5 if args.nms_iou is None else args.nms_iou,
        "frozen_norm": starts_trained(args),  # statistics of small batches are worse
        "pixel_mean": list(common.IMAGENET_MEAN),
        "pixel_sd": list(common.IMAGENET_STD),
    }


def starts_trained(args):
    """Whether the run starts from trained weights of any kind."""
    return any((args.pretrained, args.weights, args.init_from))


def build_model(args, settings, class_weights):
    """PartDetector with the weights that the flags ask for; the seed decides the random part."""
    torch.manual_seed(common.hash_seed(args.seed))
    model = PartDetector(settings, class_weights)
    if not starts_trained(args):
        return model
    if args.init_from:
        backbones.start_from(model, args.init_from, is_frozen=False, states=settings["states"])
    else:
        load_pretrained(model, *weights_to_start_from(args))
    freeze_layers(model.backbone.body, args.trainable_layers)
    return model


def weights_to_start_from(args):
    """State dict of --weights, else of the published set; what a message calls it."""
    source = "resnet18" if args.model == RESNET18 else args.model
    return backbones.load_weights(source, args.weights), args.weights or source


def load_pretrained(model, state, source):
    """Weights of a detector without its predictors, or of the classifier the backbone was.

    A prefix that all layers share (model.) is taken off.
    """
    body = "backbone.body."
    prefix = backbones.shared_prefix(state, model.backbone.body.state_dict())
    if not prefix.endswith(body):
        backbones.load_backbone_state(model.backbone.body, state, "fc", source)
        return
    prefix = prefix.removesuffix(body)
    if prefix:
        common.print_first(f"note: {source}: the layers are loaded without the prefix {prefix}")
    try:
        for part in ("backbone", "rpn", "roi_heads.box_head"):
            start = f"{prefix}{part}."
            layers = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            model.get_submodule(part).load_state_dict(layers)
    except RuntimeError as error:
        raise common.UserError(f"{source}: not the weights of this detector: {common.one_line(error)}") from None


def freeze_layers(body, n_trained):
    """Train the last n_trained of the five resolutions of a backbone, and no BatchNorm."""
    backbones.freeze_stages(body, 5 - n_trained, torch.zeros(1, 3, 64, 64))
    for module in backbones.batch_norms(body):
        module.requires_grad_(False)


def state_weights(args, truth):
    """Weights of the states in the loss, mean 1 over the train boxes, or None for equal ones.

    A state that no train box has weighs 1, so that a validation batch of such boxes
    alone has a loss.
    """
    if args.state_class_weights == "none":
        return None
    states = truth.judged_states()
    counts = np.bincount(states[states >= 0], minlength=len(part_boxes.STATES))
    occurs = counts > 0
    weights = counts.sum() / np.maximum(counts, 1) / max(occurs.sum(), 1)
    return np.where(occurs, weights, 1.0).tolist()


def total_loss(losses, state_weight):
    """Sum of torchvision's four losses, and the state loss times its weight."""
    weights = {"loss_state": state_weight}
    return sum(weights.get(name, 1.0) * value for name, value in losses.items())


# --- training ---------------------------------------------------------------------------

def make_loader(study, rows, settings, args, compute, train=False):
    """Loader of these rows, augmented and shuffled for training."""
    dataset = PartImages(study, rows, settings, args.augment if train else "none", args.seed)
    is_cached = study.store.cache == "ram"
    return common.make_loader(dataset, args, compute, train, is_cached, collate=collate if train else collate_alike)


def to_inputs(batch, compute, settings):
    """Batch -> inputs (B, 3, H, W) normalised, 0 where padded."""
    inputs = common.to_input(
        batch["pixels"], compute, settings["pixel_mean"], settings["pixel_sd"])  # (B, H, W, 3) -> (B, 3, H, W)
    for picture, (height, width) in zip(inputs, batch["sizes"]):
        picture[:, height:] = 0
        picture[:, :, width:] = 0
    return inputs


def to_device(batch, compute, settings):
    """Batch -> inputs (B, 3, H, W); sizes; targets: B dicts of boxes (K, 4), labels, states."""
    sizes = batch["sizes"]
    names = ("boxes", "labels", "states")
    targets = [{name: compute.send(batch[name][k]) for name in names} for k in range(len(sizes))]
    return to_inputs(batch, compute, settings), sizes, targets


def train_one_epoch(model, loader, training, compute, state_weight):
    """One pass over the train rows; returns {'train_loss': mean over the pictures, and parts}."""
    model.train()
    for batch in training.batches(loader):
        inputs, sizes, targets = to_device(batch, compute, model.settings)
        with compute.autocast():
            losses = model(inputs, sizes, targets)  # (B, 3, H, W) -> dict of losses
        training.step(total_loss(losses, state_weight), **losses)
    return training.epoch_means()


@torch.no_grad()
def evaluate(model, loader, args, compute):
    """Whole split at once -> (M Detections, {'val_loss': mean, and its parts}).

    The losses are those of the training path, without gradients, dropout or a change of any buffer;
    the sampler's draws depend on the seed and the batch alone, so that epochs can be compared.
    """
    model.eval()
    parts = []
    for number, batch in enumerate(itertools.chain.from_iterable(loader)):
        inputs, sizes, targets = to_device(batch, compute, model.settings)
        torch.manual_seed(common.hash_seed(args.seed, 1, number))
        with compute.autocast():
            features = model.features(inputs)  # (B, 3, H, W) -> maps
            losses = model.heads(features, inputs, sizes, targets)
            found = model.heads(features, inputs, sizes)
        losses = {"loss": total_loss(losses, args.state_weight), **losses}
        summed = {name: value.item() * len(sizes) for name, value in losses.items()}
        parts.append((on_disk(found, batch["scale"]), summed))
    detections, summed = zip(*compute.processes.gather(parts))
    detections = list(itertools.chain(*detections))
    return detections, {f"val_{name}": sum(each[name] for each in summed) / len(detections) for name in summed[0]}


@torch.no_grad()
def detect(model, loader, compute):
    """Whole split at once -> lists of M: {detections, picture_features (256,), of Pictures also hashes, errors}."""
    model.eval()
    parts = []
    for batch in itertools.chain.from_iterable(loader):
        inputs = to_inputs(batch, compute, model.settings)
        with compute.autocast():
            maps = model.features(inputs)  # (B, 3, H, W) -> maps
            found = model.heads(maps, inputs, batch["sizes"])
        parts.append({
            "detections": on_disk(found, batch["scale"]),
            "picture_features": list(model.picture_features(maps, batch["sizes"]).numpy()),
            "hashes": batch.get("hashes", []),
            "errors": batch.get("error", []),
        })
    gathered = compute.processes.gather(parts)
    return {name: list(itertools.chain(*(part[name] for part in gathered))) for name in gathered[0]}


def on_disk(found, scales):
    """B dicts of detections in input pixels -> B Detections in pixels of the pictures on disk."""
    detections = []
    for each, scale in zip(found, scales):
        values = {name: value.cpu().numpy() for name, value in each.items()}
        detections.append(detection_scores.Detections(
            boxes=values["boxes"] * np.tile(scale, 2),
            labels=values["labels"] - 1,
            scores=values["scores"].astype(float),
            states=values["states"] if values["states"].shape[1] else None))
    return detections


def fit(run, args, study, split):
    """Train on split['train'], choose the epoch on split['val'], write best_model.pth -> Progress of the training."""
    compute = run.compute
    train_truth = study.truth.take(split["train"])
    val_truth = study.truth.take(split["val"])
    settings = model_settings(args, train_truth) | {"pixel_range": study.store.pixel_range}
    if args.augment == "light" and part_boxes.mirrored_labels(train_truth.parts) is None:
        run.say("note: a part is called left or right and its counterpart is missing, so pictures are not mirrored")
    run.say(f"anchors of {' '.join(map(str, settings['anchor_sizes']))} input pixels (--anchor_sizes)")
    if args.state_class_weights != "none" and not settings["states"]:
        run.say(f"note: no box has a state, so --state_class_weights {args.state_class_weights} does nothing")
    stateless = train_truth.parts_without_state()
    if settings["states"] and stateless:
        run.say(f"note: no train box of {common.shorten_list(stateless)} has a state; the states "
                "predicted for them are learnt from other parts alone")
    model = compute.place(build_model(args, settings, state_weights(args, train_truth)))
    train_loader = make_loader(study, split["train"], settings, args, compute, train=True)
    val_loader = make_loader(study, split["val"], settings, args, compute)
    optimizer = common.build_optimizer(model, args)
    training = common.Training(
        run, model, optimizer, args,
        select=f"val_{args.select.removeprefix('val_')}",
        metadata={
            "settings": settings,
            "absent": args.absent,
            "baseline": detection_judging.mean_boxes(train_truth)},
        higher_is_better=args.select != "val_loss",
        seen=seen_rows.of_run(args, study.hashes, split))
    for _ in training.epochs():
        row = train_one_epoch(model, train_loader, training, compute, args.state_weight)
        detections, losses = evaluate(model, val_loader, args, compute)
        judged = detection_scores.Judged(val_truth, detections, args.score_threshold)
        scores = {f"val_{name}": value for name, value in judged.epoch_metrics().items()}
        training.end_epoch(row | losses | scores)
    train_loader = make_loader(study, split["train"], settings, args, compute)
    finish_best_model(training, val_truth, train_loader, val_loader)
    return training.progress


def finish_best_model(training, val_truth, train_loader, val_loader):
    """Write best_model.pth of the best epoch, completed by two things that only the trained model can give.

    known_data: the features of the train pictures, from which prediction warns of unlike ones;
    temperature: of the states, fitted on the boxes found in the val pictures.
    """
    model = training.model
    run = training.run
    best = training.load_best()
    of_train = detect(model, train_loader, run.compute)["picture_features"]
    found = detect(model, val_loader, run.compute)
    best["known_data"] = row_warnings.known_data(np.stack(of_train), np.stack(found["picture_features"]))
    if model.settings["states"]:
        matching = detection_scores.coco_match(val_truth, found["detections"], "map")
        states = detection_scores.found_states(matching, found["detections"])
        temperature = calibrating.fit_temperature(np.log(states.probabilities), states.true)
        run.say(f"temperature of the states: {temperature:.3g}, from {len(states.true)} boxes "
                "found in the val pictures")
        best["temperature"] = temperature
    training.save_model(best)


# --- results: detections -> whole-split metric -> run folder ------------------------------

def untuned_features(args, study, compute, rows):
    """(N, 256) picture_features of these rows from the detector before it is trained, NaN of all others."""
    settings = model_settings(args, study.truth)
    model = compute.place(build_model(args, settings, None))
    features = np.full((len(study.stored), 256), np.nan, np.float32)
    features[rows] = detect(model, make_loader(study, rows, settings, args, compute), compute)["picture_features"]
    return features


@dataclasses.dataclass
class Scored:
    """What the detectors of one split found in M pictures that are to be judged."""
    rows: np.ndarray  # (M,)
    found: dict  # {"model", and each trained baseline: M Detections}
    prior: dict  # of detection_judging.mean_boxes: of the train pictures
    seen: np.ndarray  # (M,) of seen_rows.WORDS


def detect_rows(run, args, study, rows, models, content):
    """Scored: what models find in these rows; models, content: of load_models."""
    loader = make_loader(study, rows, models["model"].settings, args, run.compute)
    found = {name: limit_detections(detect(model, loader, run.compute)["detections"], args)
             for name, model in models.items()}
    seen = seen_rows.of_checkpoint(content).words(study.hashes[rows])
    return Scored(rows, found, content["baseline"], seen)


def limit_detections(detections, args):
    """The detections that are written and judged: all, or with --one_per_part the best of each part."""
    if not args.one_per_part:
        return detections
    return [detection_tables.best_of_each_part(each, args.score_threshold) for each in detections]


def write_detections(path, folder, args, pictures, image_ids, detections, category_ids, picture):
    """`path` (COCO results), the same as CSV beside it, and in `folder` the first pictures with what was detected.

    pictures: see detection_tables.detection_rows; image_ids, category_ids: see coco_results there,
    the parts in the order of the labels; picture: function of its number -> (uint8 (H, W, 3),
    (width, height) on disk).
    """
    parts = list(category_ids)
    rows = detection_tables.detection_rows(pictures, detections, parts, args.one_per_part)
    common.write_table(path.with_suffix(".csv"), rows)
    common.write_json(path, detection_tables.coco_results(rows, image_ids, category_ids))
    good = [k for k, known in enumerate(pictures) if "error" not in known]
    for k in good[:args.visualize]:
        folder.mkdir(exist_ok=True)
        pixels, size = picture(k)
        drawn = box_pictures.draw_detections(
            pixels, size, detections[k], parts, args.score_threshold)
        plotting.write_picture(folder / f"{k:03d}_{Path(pictures[k]['image']).stem}.jpg", drawn)


@common.first_process_only
def judge(run, args, study, split, part, scored, similar=(), **known):
    """Write and judge what was found: detections, tables, pictures, metrics.json and report.html.

    scored: a list of Scored, one for each fold; similar: of splitting.add_similar; known: further
    fields of the Setting.
    """
    rows = np.concatenate([each.rows for each in scored])
    found = {name: [detections for each in scored for detections in each.found[name]]
             for name in scored[0].found}
    own = found.pop("model")
    seen = np.concatenate([each.seen for each in scored])
    truth = study.truth.take(rows)
    pictures = [{"image": name, "seen": word} for name, word in zip(truth.images, seen)]
    write_detections(
        run.path(f"detections_{part}.json"), run.path("pictures"), args,
        pictures, dict(zip(truth.images, truth.ids)), own, study.category_ids[study.images[rows[0]].origin],
        lambda k: (study.picture(rows[k]), truth.sizes[k]))
    setting = judging.Setting(
        title="Parts and their states",
        part=part,
        seen=seen,
        data=data_blocks(args, study, split, len(rows)),
        similar=judging.similar_blocks(similar, study.truth.images, study.picture),
        is_similar=np.isin(rows, similar),
        **known)
    detection_judging.judge_detections(
        run, truth, own, setting,
        priors=[each.prior for each in scored for _ in each.rows],
        trained=found,
        picture=lambda k: study.picture(rows[k]),
        threshold=args.score_threshold)


def data_blocks(args, study, split, n_scored):
    """HTML of the section Data and split."""
    scored = (f"{n_scored} pictures scored, {len(study.truth.parts)} parts; "
              f"{len(study.skipped)} files or boxes skipped. Absent parts that have a box: {args.absent}.")
    return [
        reporting.html_text(scored),
        reporting.html_list(study.notes),
        reporting.html_table(split_rows(study.truth, split)),
    ]


def split_rows(truth, split):
    """The split table: pictures, boxes, states, and the parts of the object without a box."""
    table = []
    for part, rows in split.items():
        if not len(rows):
            continue
        chosen = truth.take(rows)
        labels = np.concatenate(chosen.labels)
        without = np.delete(truth.parts, labels)
        table.append({"part": part, "pictures": len(rows), "boxes": len(labels),
                      **count_states(np.concatenate(chosen.states)),
                      "parts without a box": ", ".join(without) or "none"})
    return table


def count_states(states):
    """{state: how often it is in (K,) states}."""
    return {name: (states == k).sum() for k, name in enumerate(part_boxes.STATES)}


def limits(args):
    """Sentences on what a reader must not conclude from this run."""
    lines = []
    if not args.group_column:
        lines.append("No --group_column: pictures of one object or session may stand on both sides of the split.")
    return lines + judging.limits_of_start(args)


# --- one run, or one run per fold ---------------------------------------------------------------

def make_split(args, study):
    """{train, val, test: (n,) rows}: the files of the parts, --split_file, or shares."""
    if args.val_json:
        return splitting.rows_by_part(np.array([image.origin for image in study.images]))
    return splitting.split_of_flags(args, study.truth.images, study.strata, study.truth.groups)


def make_folds(args, study):
    """[{train, val, test: (n,) rows}]: a fold leaves out its test part; --val_ratio of the rest chooses the epoch."""
    truth = study.truth
    ratios = {"train": 1 - args.val_ratio, "val": args.val_ratio}
    folds = splitting.folds_of_flags(args, truth.images, study.strata, truth.groups)
    if truth.groups is not None and min(len(set(truth.groups[fold["train"]])) for fold in folds) < 2:
        raise common.UserError(
            f"--folds {args.folds}: each fold must leave two groups or more, since one chooses the "
            f"epoch; found {len(set(truth.groups))} groups in all. Three groups need three folds")

    def divide(rows):
        own = truth.take(rows)
        return splitting.make_split(own.images, ratios, study.strata[rows], own.groups, args.seed)
    return splitting.nested_folds(folds, divide)


def examine_split(study, split):
    """The leakage report of a split; UserError where no box trains, or none chooses the epoch."""
    truth = study.truth
    for part, rows in split.items():
        if part in ("train", "val") and not any(truth.judged(row).any() for row in rows):
            raise common.UserError(
                f"no box in the {part} part: nothing to learn or judge; make other parts (--seed, --split_file)")
    return splitting.leakage_report(
        split, truth.images, study.audit("pixel_sha"), study.audit("phash"), {"groups": truth.groups})


def check_split(run, study, split):
    """Refuse a split that leaks or teaches nothing; write splits.json and the leakage report; returns alarms."""
    truth = study.truth
    fields = dict.fromkeys(name for image in study.images for name in image.fields)
    columns = {name: [str(image.fields.get(name, "")) for image in study.images] for name in fields}
    alarms = splitting.record_split(
        run, split, truth.images, examine_split(study, split), columns=columns,
        groups=truth.groups if run.args.group_column else None)
    for row in split_rows(truth, split):
        run.say(", ".join(f"{name} {value}" for name, value in row.items()))
    return alarms


def check_states(args, truth, split):
    """UserError where --select or --criteria ask for states that no box has."""
    parts = ["train"] if args.dry_run else ["train", "val"]
    without = [part for part in parts if not truth.take(split[part]).has_states()]
    if args.select == "joint_map" and without:
        raise common.UserError(f"--select joint_map: no box of the {without[0]} part has a state; use --select map")
    detection_judging.check_criteria(args.criteria, truth.parts, "train" not in without)


def write_annotations(run, args, study, split):
    """train_coco.json and so on: pictures and boxes of each part, with the ids of detections."""
    for part, rows in split.items():
        if len(rows):
            images = [study.images[row] for row in rows]
            origin = images[0].origin
            coco, _ = part_boxes.as_coco(images, study.category_ids[origin], getattr(args, f"{origin}_images"))
            common.write_json(run.path(f"{part}_coco.json"), coco)


def train_heads(run, args, study, split):
    """Train the baseline of --baseline heads in baseline/."""
    own = common.with_flags(args, trainable_layers=0)
    with run.child("baseline", own) as child:
        child.folds_after = run.folds_after - 1
        child.write_args(**study.data_record(split))
        child.say(f"baseline: the same detector with only its heads trained (in {child.folder.name})")
        fit(child, own, study, split)


def run_split(run, args, study, split, features=None):
    """Train on one split and judge its held-out rows, test where there is one, else val."""
    alarms = check_split(run, study, split)
    split = splitting.rows_to_try(split, args)
    check_states(args, study.truth, split)
    # the proposals of the validation loss are drawn batch by batch, so a resumed run must keep their size
    run.write_record(study, split, val_batch_size=args.val_batch_size)
    write_annotations(run, args, study, split)
    if features is None:
        features = untuned_features(args, study, run.compute, np.concatenate(list(split.values())))
    similar = splitting.add_similar(run, features, split, study.truth.images)
    if args.baseline == "heads":
        run.folds_after = 2 * run.folds_after + 1  # each fold trains twice: for the estimate of the time left
    else:
        run.say("note: only the mean box of each part is there to beat, so the report is amber at "
                "best; --baseline heads trains a baseline, in about the same time again")
    progress = fit(run, args, study, split)
    plotting.plot_history(progress.history, run.path("training_history.png"), progress.best_epoch)
    part = "test" if len(split["test"]) else "val"
    if args.baseline == "heads":
        train_heads(run, args, study, split)
    scored = detect_rows(run, args, study, split[part], *load_models(run.path("best_model.pth"), args, run.compute))
    judge(run, args, study, split, part, [scored], similar,
          best_epoch=progress.best_epoch,
          alarms=alarms + overfitting_alarms(progress.history[progress.best_epoch - 1]),
          limits=limits(args))


def run_folds(run, args, study):
    """One run per fold in fold_K/; what the detectors of all folds found in the left-out pictures is judged as one."""
    splits = make_folds(args, study)
    folds = {f"fold_{k}": split["test"] for k, split in enumerate(splits)}
    for k, split in enumerate(splits):  # all of them before the first one is trained
        splitting.check_leakage(examine_split(study, split), args.allow_leakage)
        if study.truth.take(split["train"]).has_states() != study.truth.has_states():
            raise common.UserError(f"--folds {args.folds}: no box that trains fold {k} has a state, so its detector "
                                   "would name none; fewer folds, or another --group_column")
        check_states(args, study.truth, split)
    alarms = check_split(run, study, folds)
    run.write_record(study, folds)
    features = untuned_features(args, study, run.compute, np.arange(len(study.stored)))
    similar = splitting.add_similar(run, features, folds, study.truth.images)
    chosen = run.each_fold(splits, lambda child, split: run_split(child, args, study, split, features))
    scored = []
    numbers = []
    for k in chosen:
        folder = run.path(f"fold_{k}")
        rows = splitting.rows_to_try(splits[k], args)["test"]
        scored.append(detect_rows(run, args, study, rows, *load_models(folder / "best_model.pth", args, run.compute)))
        headline = common.read_json(folder / "metrics.json")["headline"]
        numbers.append({
            "rows": len(rows),
            "ap": headline["value"],
            "baseline_ap": headline["baseline"]["value"]})
    write_annotations(run, args, study, {"folds": np.concatenate([each.rows for each in scored])})
    done = judging.finished_folds(run, chosen, numbers)
    judge(run, args, study, folds, "folds", scored, similar, alarms=alarms, folds=done, limits=limits(args))


def overfitting_alarms(row):
    """A sentence where the validation loss of an epoch is far above its train loss; else []."""
    if row["val_loss"] <= 2 * row["train_loss"]:
        return []
    return [f"validation loss {row['val_loss']:.3f} far above train loss {row['train_loss']:.3f}: "
            "overfitting. Fewer trained layers (--trainable_layers), --augment light, more pictures"]


def train(args):
    """--mode train."""
    files = {part: (getattr(args, f"{part}_json"), getattr(args, f"{part}_images"))
             for part in splitting.PARTS if getattr(args, f"{part}_json")}
    with common.start_run(args) as run:
        parts = None
        if args.init_from:
            parts = starting_settings(args)["parts"]
        elif starts_trained(args):
            weights_to_start_from(args)  # missing ones are told before pictures are decoded
        study = load_study(args, files, run.say, parts)
        if args.folds:
            run_folds(run, args, study)
        else:
            run_split(run, args, study, make_split(args, study))


# --- the other modes -------------------------------------------------------------------------

def load_models(path, args, compute):
    """Checkpoint -> ({"model": PartDetector, and "heads" with that --baseline}, what the file holds)."""
    model, content = load_detector(path, compute, args.nms_iou)
    models = {"model": model}
    if args.baseline == "heads":
        models["heads"], _ = load_detector(path.parent / "baseline" / "best_model.pth", compute, args.nms_iou)
    return models, content


def load_detector(path, compute, nms_iou):
    """Checkpoint -> (PartDetector on the device, all that the file holds)."""
    content = common.load_model_file(path)
    with common.checkpoint_fields(path):
        model = PartDetector(content["settings"])
        common.load_state(model, content["model"], path)
        model.temperature = content.get("temperature", 1.0)
        if nms_iou is not None:
            model.roi_heads.nms_thresh = nms_iou
    return compute.place(model).eval(), content


def evaluate_checkpoint(args):
    """--mode evaluate: the same report on other pictures; it says which the checkpoint has seen."""
    with common.start_run(args) as run:
        models, content = load_models(args.checkpoint, args, run.compute)
        settings = content["settings"]
        parts = settings["parts"]
        detection_judging.check_criteria(args.criteria, parts, bool(settings["states"]))
        run.say(f"checkpoint: {settings['model']}, epoch {content['epoch']}, input "
                f"{settings['min_size']} to {settings['max_size']} px, {len(parts)} parts, "
                f"states: {settings['states'] or 'none'}")
        args = common.with_flags(args, absent=content["absent"], min_size=settings["min_size"],
                                 pixel_range=settings["pixel_range"])
        study = load_study(args, {"test": (args.json, args.images_dir)}, run.say, parts)
        detection_judging.refuse_without_boxes(study.truth, args.json)
        worst = seen_rows.worst(seen_rows.of_checkpoint(content).words(study.hashes))
        part = {"train": "train", "chose": "val"}.get(worst, "test")  # what the pictures were to the checkpoint
        split = {part: np.arange(len(study.stored))}
        run.write_record(study, split)
        scored = detect_rows(run, args, study, split[part], models, content)
        judge(run, args, study, split, part, [scored])


def pictures_to_predict(folder, settings):
    """picture_files.Pictures of all pictures in a folder, in the size that the detector takes."""
    paths = file_names.find_images(folder)
    if not paths:
        raise common.UserError(f"--images_dir {folder}: expected pictures, found none")
    prepare = functools.partial(fit_picture, settings["min_size"], settings["max_size"])
    return picture_files.Pictures(paths, settings["min_size"], prepare, settings["pixel_range"])


def fit_picture(min_size, max_size, pixels, size):
    """uint8 (H, W, 3) in the size that the detector takes of a picture of this (width, height)."""
    return picture_files.resize(pixels, fit_size(*size, min_size, max_size))


def predict(args):
    """--mode predict: detections of every picture; an unreadable one keeps a row with its error."""
    compute = common.announce_compute(args)
    model, content = load_detector(args.checkpoint, compute, args.nms_iou)
    dataset = pictures_to_predict(args.images_dir, model.settings)
    names = [path.relative_to(args.images_dir).as_posix() for path in dataset.rows]
    loader = common.make_loader(dataset, args, compute, False, collate=collate_alike)
    found = detect(model, loader, compute)
    detections = limit_detections(found["detections"], args)
    features = np.stack(found["picture_features"])
    bad = np.flatnonzero(found["errors"])
    features[bad] = np.nan
    words = seen_rows.of_checkpoint(content).words(np.stack(found["hashes"]))
    warnings = row_warnings.texts([(content, features)], words, "pictures", print)
    pictures = [{"image": name, "seen": word, "warning": warning}
                for name, word, warning in zip(names, words, warnings)]
    for k in bad:
        detections[k] = detections[k].take([])  # what is found in the black one that stands for it
        pictures[k] = {"image": names[k], "error": found["errors"][k]}

    def picture(k):
        pixels = picture_files.load_image(dataset.rows[k], pixel_range=dataset.pixel_range)
        return pixels, pixels.shape[1::-1]
    output = args.output or Path("detections.json")
    if output.suffix.lower() == ".csv":  # that is written beside it
        output = output.with_suffix(".json")
    folder = output.with_name(f"{output.stem}_pictures")
    write_detections(
        output, folder, args, pictures, dict(zip(names, itertools.count(1))), detections,
        part_boxes.number_parts(model.settings["parts"], {}), picture)
    seen_rows.say_notes(words, print)
    scores = np.concatenate([each.scores for each in detections])
    n_sure = (scores >= args.score_threshold).sum()
    print(f"{len(names)} pictures, {len(bad)} could not be read (see the error column); {len(scores)} detections, "
          f"{n_sure} of them from score {args.score_threshold:g}; written to {output}, "
          f"{output.with_suffix('.csv')} and, with --visualize, {folder}")


def convert(args):
    """--mode convert: part annotations or COCO -> clean COCO with area, iscrowd, state, trust."""
    found = part_boxes.read_annotations(args.json, args.box_format, args.state_attribute)
    if args.images_dir:
        part_boxes.find_pictures(found, args.images_dir, args.exact_names)
        unnamed = part_boxes.without_entry([args.images_dir], found.images)
        audits = [picture_files.audit_image(image.path, 32)[0] for image in found.images]
        good, bad = part_boxes.check_pictures(audits, found.images, args.on_bad_file)
        found.images = [found.images[k] for k in good]
        found.skipped += bad + unnamed
    part_boxes.refuse_other_convention(found.images, args.json, args.box_format)
    coco, dropped = part_boxes.as_coco(found.images, found.category_ids, args.images_dir)
    common.write_json(args.output, coco)
    for note in found.notes:
        print(f"note: {note}")
    for each in found.skipped + dropped:
        print(f"skipped: {', '.join(each.values())}")
    n_absent = sum(len(image["absent_parts"]) for image in coco["images"])
    print(f"{args.output}: {len(found.images)} images, {len(coco['annotations'])} boxes of "
          f"{len(found.category_ids)} parts, {n_absent} absent parts without a box (absent_parts "
          f"of their image), {len(dropped)} boxes dropped")


def audit(args):
    """--mode audit: what annotations and pictures hold and what is wrong with them."""
    import pandas as pd
    study = load_study(args, {"train": (args.json, args.images_dir)}, print)
    truth = study.truth
    labels = np.concatenate(truth.labels)
    states = np.concatenate(truth.states)
    absent = np.concatenate(truth.absent)
    rows = []
    for label, part in enumerate(truth.parts):
        own = labels == label
        rows.append({"part": part, "boxes": own.sum(), **count_states(states[own]),
                     "absent without a box": (absent == label).sum()})
    print(pd.DataFrame(rows).to_string(index=False))
    report = examine_split(study, {"all": np.arange(len(study.stored))})
    print(splitting.leakage_text(report) or "no picture stands there twice")
    if args.output:
        common.write_json(args.output, {
            "pictures": len(study.stored),
            "parts": rows,
            "skipped": study.skipped,
            "notes": study.notes,
            "copies": report["within"]["all"]})


def main():
    args = parse_args()
    modes = {"train": train, "convert": convert, "predict": predict, "evaluate": evaluate_checkpoint, "audit": audit}
    modes[args.mode](args)


if __name__ == "__main__":
    common.run_main(main)
