"""Train a network that names the behaviour in a clip, or scores a sequence of frames.

    python train_video.py --config configs/video_intravideo.yaml --video_root videos
    python train_video.py --manifest events.csv --video_root videos --dry_run
    python train_video.py --mode predict --checkpoint outputs/run_X --manifest new.csv
    python train_video.py --mode predict --checkpoint outputs/run_X --video recordings --every 0.5
    python train_video.py --mode judge_bouts --predictions outputs/run_Y --manifest events.csv
    python train_video.py --mode evaluate --predictions predictions.csv --output metrics.json
    python train_video.py --mode audit --train_manifest a.csv --val_manifest b.csv
    python train_video.py --task regress --config configs/pain_scores.yaml --folds 9

Writes outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), best_model.pth, metrics.json,
predictions_val.csv (and _test), training_history.csv and .png, splits.json,
leakage_report.json, the plots of the task, args.json, log.txt. With --folds K the same in each
fold_K/, pooled above them.

A row of the manifest is an event (classify) or a sequence (regress). A clip is the T frames of it
that the network sees at once; several clips of an event are predicted and combined.
Letters: N rows, M rows predicted, B batch, T frames of a clip, G frames of a row's time grid,
C classes, R scores, K outputs (C or R), F features, H width of the LSTM, V random views, S side of
the input in pixels.
Units: seconds from the start of a file; scores in the unit of their table; pixels are uint8 RGB
until they reach the device.
"""
import argparse
import collections
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

import common
from evidence import (
    baseline_models, calibrating, class_judging, class_scores, confounding, ethograms, event_audit,
    judging,
    metric_names, plotting, prediction_tables, rater_agreement, reporting, score_judging, splitting,
    table_judging, verdicts)
from readers import (
    backbones, csv_tables, event_tables, event_times, file_names, score_tables, video_files)

MODES = ("train", "predict", "evaluate", "audit", "judge_bouts")
PARTS = ("train", "val", "test")
OVERFITTING_REMEDY = "Fewer trained layers (--freeze_stages 3 --freeze_norm, --freeze_backbone), more clips"
CNN_LSTM = "cnn_lstm"
MOTION_READOUT = "motion_readout"
FRAME_MODELS = (CNN_LSTM, MOTION_READOUT)  # what reads frames one by one, with an image network
# flags of training as they are for a model that is solved, not trained
SOLVED = {
    "epochs": 1, "freeze_backbone": True, "select": "last", "augment": "none", "balance": "none",
    "boost_to": 0.0, "mixup": 0.0, "label_smoothing": 0.0, "focal_alpha": None, "sample_weight": [],
    "augment_for": [], "target_weights": None, "bounded": False, "init_from": None,
}
FIXED_INPUT = {  # frames, pixels
    "s3d": (16, 224),
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
}
# flags that decide which pixels are read
READING = ("image_size", "n_frames", "fps", "min_event_sec", "pixel_range")
# flags that a checkpoint keeps: how clips are read and combined, and what the network looks like
ARCHITECTURE = ("task", "model", "backbone", "hidden", "dropout", "bounded", *READING,
                "clips_per_event", "aggregation")
TASK_DEFAULTS = {
    "classify": {
        "model": "r3d_18", "n_frames": 16, "loss": "ce", "augment": "heavy",
        "epochs": 30, "batch_size": 4, "val_batch_size": 8,
        "lr": 5e-5, "weight_decay": 0.05, "clip_grad": 1.0,
        "scheduler": "cosine", "warmup_epochs": 2.0, "min_lr": 1e-6,
        "patience": 10, "min_delta": 0.0, "min_epochs": 0,
    },
    "regress": {
        "model": CNN_LSTM, "n_frames": 32, "loss": "mse", "augment": "basic", "select": "loss",
        "epochs": 50, "batch_size": 64, "val_batch_size": 64,
        "lr": 5e-5, "weight_decay": 1e-4, "clip_grad": 0.5,
        "scheduler": "plateau", "warmup_epochs": 0.0, "min_lr": 1e-7,
        "patience": 15, "min_delta": 1e-4, "min_epochs": 5,
    },
}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_shared_arguments(parser, plateau_patience=7, on_bad_file="skip")
    job = parser.group("job")
    job("--task", choices=tuple(TASK_DEFAULTS), default="classify",
        help="a class for each event, or scores for each sequence; sets the defaults of training")
    job("--mode", choices=MODES, default="train",
        help="train a network, predict with trained ones, evaluate a table of predictions, audit "
             "manifests and videos, or judge the bouts of recordings by a table of events")
    job("--checkpoint", type=Path, nargs="+",
        help="predict: best_model.pth files or run folders; several are averaged")
    job("--predictions", type=Path,
        help="evaluate, audit: a predictions CSV of this script; judge_bouts: the run folder of "
             "predict --video")
    job("--output", type=Path,
        help="file that predict (.csv), evaluate or audit (.json) writes")
    add_recording_arguments(parser.group("whole recordings"))
    add_clip_arguments(parser.group("clips and labels"))
    add_model_arguments(parser.group("model"))
    add_learning_arguments(parser.group("learning"))
    parser.set_defaults(**TASK_DEFAULTS["classify"])
    asked = common.parse_arguments(parser, argv)  # the configuration may name task and model
    parser.set_defaults(**TASK_DEFAULTS[asked.task])
    if asked.model == MOTION_READOUT:
        parser.set_defaults(**SOLVED)
    args = common.parse_arguments(parser, argv)
    check_flags(parser, args)
    return args


def add_recording_arguments(add):
    """What predict does with recordings that have no table of events."""
    add("--video", type=Path, metavar="FILE_OR_FOLDER",
        help="predict: recordings instead of a manifest; the trained window slides over each")
    add("--every", type=common.bounded(float, 1e-3), default=0.5,
        help="seconds from one window to the next")
    add("--min_bout_sec", type=common.AMOUNT, default=0.0,
        help="a shorter bout is left out, after close ones have been joined")
    add("--merge_gap_sec", type=common.AMOUNT, default=0.0,
        help="bouts of one class that are at most so far apart are one")
    add("--annotate", action="store_true",
        help="also write a copy of each video with class and probability drawn in (without sound)")


def add_clip_arguments(data):
    """Where the events are, what is asked of them, and how clips are cut from their videos."""
    data("--manifest", type=Path, may_change=True,
         help="table of events or sequences (CSV, JSON), or a folder of class folders")
    for part in PARTS:
        data(f"--{part}_manifest", type=Path, may_change=True,
             help=f"events of the {part} part, instead of a split made here")
    data("--video_root", type=Path, may_change=True,
         help="folder that holds the videos, whatever folders the manifest names")
    data("--label_map", type=Path,
         help="file of spelling -> class (JSON, YAML, CSV); a blank class leaves the row out")
    data("--path_column", help="column of the videos' paths (default: by its name)")
    data("--label_column", help="classify: column of the labels (default: by its name)")
    data("--time_unit", choices=("sec", "ms", "min", "frame"),
         help="classify: unit of columns of times whose names say none (default: sec)")
    data("--target_columns", nargs="+", metavar="NAME",
         help="scores to learn (default: all numeric columns)")
    data("--split_by", choices=("event", "video", "group"),
         help="what a split keeps whole (default: the coarsest there is)")
    data("--filter", help='rows to use, e.g. "moment==M2 and age>=3"')
    data("--min_event_sec", type=common.AMOUNT, default=1.0,
         help="a shorter event gets a window of this length around it")
    data("--max_missing", type=common.SHARE, default=0.05,
         help="share of unreadable videos that is allowed")
    data("--gap_sec", type=common.AMOUNT, default=30.0,
         help="windows of one video that are closer than this are reported")
    data("--cv_file", type=Path,
         help="folds of a study: cv_folds with train_animals and val_animals")
    data("--test_groups",
         help="groups kept for the test, e.g. 14,17; with --folds all models predict them")
    data("--moment_column", default="moment",
         help="regress: column that says when a sequence was filmed, such as M0 before and M2 "
              "after surgery; each moment is also judged alone")
    data("--fps", type=common.bounded(float, 0.1, 240), default=12.0,
         help="classify: frames per second of a clip")
    data("--n_frames", type=common.POSITIVE,
         help="classify: frames in a clip (default 16); regress: at most so many frames of a "
              "sequence are read (default 32)")
    data("--image_size", "--img_size", type=common.SIDE, default=112,
         help="side of the input in pixels")
    data("--jitter_sec", type=common.AMOUNT, default=0.0,
         help="training clips may reach this far outside their event")
    data("--clips_per_event", type=common.POSITIVE, default=5,
         help="classify: clips of each event that are predicted")
    data("--aggregation", choices=("mean", "max"), default="mean",
         help="how the outputs for the clips of an event are combined")


def add_model_arguments(model):
    """The network and which parts of it are trained."""
    model("--model",
          help=f"{MOTION_READOUT}, for small data: a linear model, solved in closed form, on what an "
               "untuned image backbone sees in the frames and how it changes from frame to frame; "
               f"{CNN_LSTM}: an image backbone frame by frame, then an LSTM; or a torchvision video "
               "network (r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v2_s, swin3d_t), which computes in "
               "fp32 on CPUs")
    model("--backbone", "--encoder", default="resnet18",
          help=f"image network of {' and '.join(FRAME_MODELS)}, and of the motion readout that "
               "every other model is compared with")
    model("--hidden", type=common.POSITIVE, default=256, help=f"width of the LSTM of {CNN_LSTM}")
    model("--dropout", type=common.DROPOUT, default=0.5,
          help="dropout before the last layer")
    model("--bounded", action="store_true",
          help="regress: keep the predictions within the range of the train rows")
    common.add_freezing_arguments(model)
    model("--feature_views", type=common.POSITIVE, default=4,
          help="with --freeze_backbone: random clips of each row that features are computed of")


def add_learning_arguments(learn):
    """Loss, imbalance, weights and the choice of the epoch."""
    learn("--loss", choices=("ce", "focal", "mse", "smooth_l1"),
          help="classify: ce or focal; regress: mse or smooth_l1")
    learn("--focal_gamma", type=common.AMOUNT, default=2.0, help="focal: weight (1 - p)^gamma")
    learn("--focal_alpha", type=common.SHARE,
          help="weight of the positive class; the other classes get 1 minus this")
    learn("--label_smoothing", type=common.bounded(float, 0, 0.9), default=0.0,
          help="share of each label that is spread over all classes")
    learn("--balance", choices=("none", "sampler", "weights"), default="none",
          help="sampler: draw all classes equally often; weights: give each class the same total "
               "weight in the loss")
    learn("--boost_to", type=common.bounded(float, 0, 0.9), default=0.0,
          help="repeat train rows of the positive class up to this share; 0 = off")
    learn("--force", action="store_true", help="allow several corrections of the class balance")
    learn("--mixup", type=common.AMOUNT, default=0.0, help="alpha of mixup; 0 = off")
    learn("--positive_class", help="the class that matters (default: the rarest)")
    learn("--sample_weight", action="append", metavar="COLUMN:LEVEL=W", default=[],
          help="weight in the loss of the rows with this level, e.g. moment:M2=2.5")
    learn("--augment_for", action="append", metavar="COLUMN:LEVEL=PRESET", default=[],
          help="augmentation of the rows with this level")
    learn("--target_weights", nargs="+", metavar="NAME=W",
          help="regress: weight of scores in the loss")
    learn("--consistency_weight", type=common.AMOUNT, default=0.1,
          help="regress: weight of the penalty on a total that is not the sum of its parts; "
               "0 = off")
    learn("--select",
          help="val_ column that chooses the epoch, e.g. tail_f1 or f1_tail, or last: no choice "
               "(default: average precision of the positive class; regress: loss)")


def manifests_of(args):
    """{part: manifest} as given; the part '' is one manifest for all."""
    given = {"": args.manifest, "train": args.train_manifest,
             "val": args.val_manifest, "test": args.test_manifest}
    return {part: path for part, path in given.items() if path}


def check_flags(parser, args):
    """parser.error for what a mode lacks, and for flags that contradict each other."""
    manifests = manifests_of(args)
    if args.mode == "predict" and not (args.checkpoint and bool(args.manifest) != bool(args.video)):
        parser.error("--mode predict needs --checkpoint, and either --manifest or --video")
    if args.mode == "judge_bouts" and not (args.predictions and args.manifest):
        parser.error("--mode judge_bouts needs --predictions and --manifest")
    if args.mode == "evaluate" and not args.predictions:
        parser.error("--mode evaluate needs --predictions")
    if args.mode in ("train", "audit") and not (manifests or args.video_root):
        parser.error(f"--mode {args.mode} needs --manifest, or --train_manifest")
    if args.mode != "evaluate" and args.task == "regress" and not args.manifest:
        parser.error("--task regress needs --manifest")
    if args.manifest and len(manifests) > 1:
        parser.error(f"--manifest {args.manifest} is split here; give it alone, "
                     "or the manifests of the parts")
    is_parted = bool(manifests) and not args.manifest
    if is_parted and (args.folds or args.cv_file):
        parser.error("manifests of parts go without folds; give one --manifest")
    if args.mode != "train":
        return
    if is_parted and not args.train_manifest:
        parser.error("manifests of parts need --train_manifest")
    if (args.loss in ("ce", "focal")) != (args.task == "classify"):
        parser.error(f"--loss {args.loss} does not fit --task {args.task}")
    if args.balance != "none" and args.focal_alpha is not None and not args.force:
        parser.error(f"--balance {args.balance} and --focal_alpha {args.focal_alpha} both correct "
                     "the class balance; drop one, or give --force")
    if args.mixup and args.task == "regress":
        parser.error("--mixup blends the classes of --task classify; scores may be missing")
    if args.task == "regress" and args.model not in FRAME_MODELS:
        parser.error("--task regress reads sequences of any length: --model "
                     f"{' or '.join(FRAME_MODELS)}, found {args.model}")
    if args.model == MOTION_READOUT:
        idle = [f"--{name}" for name, value in SOLVED.items() if getattr(args, name) != value]
        if idle:
            parser.error(f"--model {MOTION_READOUT} is solved in closed form, not trained; without "
                         f"meaning for it: {', '.join(idle)}")
    if not is_parted and not args.cv_file:
        common.check_split_flags(parser, args)


# --- data: row on disk -> table -> sample ---------------------------------------------------

@dataclasses.dataclass
class Features:
    """What untuned networks see in N rows, computed once for all folds.

    Of each row the mean over its predicted clips.
    """
    last: np.ndarray  # (N, F) of the model's last stage, for the first baseline
    motion: np.ndarray | None = None  # (N, F) of a MotionReadout, where there is an image network
    blocks: dict | None = None  # name -> columns of these that a readout may choose
    # with --freeze_backbone, which trains on them instead of pixels:
    views: np.ndarray | None = None  # (V, N, F) or (V, N, T, F) of random clips
    of_clips: dict | None = None  # (row, start) of a predicted clip -> (F,) or (T, F)


@dataclasses.dataclass
class Study:
    """N rows that can be read: their table, their frames, and what was left out."""
    table: event_tables.EventTable
    store: video_files.ClipStore
    stored: np.ndarray  # (N,) index of each row in the store
    args: argparse.Namespace
    skipped: list  # dicts of row and reason
    positive: int | None = None  # the class that matters; None for scores

    def frames(self, row, start=0, stop=None):
        """Grid frames start to stop of a row, uint8 (T, H, W, 3)."""
        return self.store.part(self.stored[row], start, stop)

    def middle_frame(self, row):
        """uint8 (H, W, 3)."""
        place = self.audit(row).n_grid // 2
        return np.asarray(self.frames(row, place, place + 1)[0])

    def audit(self, row):
        """ClipAudit of a row."""
        return self.store.audit[self.stored[row]]

    def mask(self, row, start):
        """(T,) bool, True = a frame of the clip at `start` that the model is to read.

        None after the row's last frame, and no frame again for MOTION_READOUT, which compares
        neighbours.
        """
        found = self.audit(row)
        places = start + np.arange(self.args.n_frames)
        mask = places < found.n_grid
        if self.args.model == MOTION_READOUT:
            mask[1:] &= ~np.isin(places[1:], found.repeats)
        return mask

    def start_range(self, row, jitter_sec=0.0):
        """(first, last) grid frame at which a clip may start, jitter_sec outside the event."""
        if self.args.task == "regress":
            return 0, 0
        found = self.audit(row)
        length = self.args.n_frames
        reach = round(jitter_sec * self.args.fps)
        last = found.first + max(found.usable - length, 0)
        frames_after = max(found.n_grid - length - last, 0)
        return max(found.first - reach, 0), last + min(reach, frames_after)

    def starts(self, row):
        """Grid frames where the predicted clips start: evenly over the row; one in its middle."""
        first, last = self.start_range(row)
        if self.args.clips_per_event == 1:
            return [round((first + last) / 2)]
        even = np.linspace(first, last, self.args.clips_per_event).round().astype(int)
        return sorted(set(even.tolist()))

    @property
    def truth(self):
        """(N,) labels or (N, R) scores."""
        return self.table.label if self.table.target is None else self.table.target

    @property
    def groups(self):
        """(N,) text, rows that are not independent: groups of the table, else rows of one video.

        None where every row has a video of its own.
        """
        if self.table.groups is not None:
            return self.table.groups
        has_shared = len(set(self.table.videos)) < len(self.table)
        return self.table.videos if has_shared else None

    @property
    def hashes(self):
        """(N, 2) content_hashes of the rows."""
        return self.store.hashes[self.stored]

    def groups_of(self, rows):
        """(M,) groups of these rows, or None."""
        return None if self.groups is None else self.groups[rows]

    def data_record(self, split):
        """What args.json says of the data and their split; resuming refuses other data."""
        table = self.table
        shas = [self.audit(row).pixel_sha for row in range(len(table))]
        contents = [*table.names, *table.clip_ids, self.truth, *shas]
        return common.data_record(contents, split, rows=len(table), names=table.names)


def read_table(args, names=None, need_labels=True):
    """EventTable that the flags name, in seconds; names: classes or scores of a trained model."""
    checks = {"need_labels": need_labels, "max_missing": args.max_missing,
              "path_column": args.path_column, "need_files": args.mode != "audit",
              "exact_names": args.exact_names}
    if args.task == "regress":
        table = score_tables.read_sequences(
            args.manifest, args.video_root, args.group_column, names or args.target_columns,
            **checks)
    else:
        manifests = manifests_of(args) or {"": args.video_root}
        table = event_tables.read_events(
            manifests, args.video_root, args.label_map, args.min_event_sec, args.group_column,
            names=names, label_column=args.label_column, time_unit=args.time_unit, **checks)
    if args.filter:
        table = table.take(event_tables.filter_rows(table, args.filter))
    if (table.unit == "sec").all():
        return table
    counted = {source for source, unit in zip(table.sources, table.unit) if unit == "frame"}
    infos = {source: video_files.probe(source, args.fps) for source in counted}
    return event_times.seconds_of(table, infos, args.min_event_sec)


def load_study(args, say, skipped_file=None, names=None, need_labels=True):
    """Table and frames, checked; what cannot be used is counted, said and listed in the file."""
    table = read_table(args, names, need_labels)
    for note in table.notes:
        say(f"note: {note}")
    say(f"decoding {len(table)} rows of {len(set(table.sources))} videos "
        f"with {video_files.decoder_name()}")
    store = video_files.ClipStore(
        table.sources, table.windows, grid="even" if args.task == "regress" else "rate",
        fps=args.fps, n_frames=args.n_frames, short_side=resize_side(args.image_size),
        jitter_sec=args.jitter_sec, cache=args.cache, pixel_range=args.pixel_range)
    readable = video_files.check_clips(store.audit, args.max_missing, args.on_bad_file)
    stored = np.array([row for row in readable if not store.audit[row].fault], dtype=int)
    skipped = list(table.skipped)
    for row in np.setdiff1d(np.arange(len(table)), stored):
        reason = store.audit[row].error or store.audit[row].fault
        video = str(table.sources[row])
        skipped.append({"row": table.clip_ids[row], "video": video, "reason": reason})
    if skipped and skipped_file:
        common.write_table(skipped_file, skipped)
    for reason, count in collections.Counter(entry["reason"] for entry in skipped).items():
        say(f"skipped: {count} rows, {reason}")
    late = {found.path: found.first_sec for found in store.audit if found.first_sec > 0.5}
    if late:
        say(f"note: the picture starts {max(late.values()):.2f} s or less after the start of the file in {len(late)} "
            f"videos ({common.shorten_list(late, 3)}); seconds count from the start of the file, as a player shows them")
    slow = {found.path for found in store.audit if found.repeats and found.n_frames > 1}
    if slow:
        say(f"note: {len(slow)} videos have fewer than {args.fps:g} frames a second (--fps), and show some twice "
            f"({common.shorten_list(sorted(slow), 3)})")
    if not len(stored):
        raise common.UserError(f"none of {len(table)} rows can be used "
                               f"(first: {skipped[0]['reason']})")
    say(f"data: {len(stored)} rows, {len(set(table.events))} events; "
        f"{len(skipped)} rows skipped; {store.description}")
    table = table.take(stored)
    positive = None
    if need_labels and table.target is None:
        positive = positive_class(args.positive_class, table.names, table.label)
    return Study(table, store, stored, args, skipped, positive)


def resize_side(image_size):
    """Short side that frames are scaled to before the crop: 128 for 112."""
    return round(image_size * 8 / 7)


def positive_class(wanted, names, label):
    """Index of the class that matters: the wanted one, whatever its case, else the rarest label.

    Raises UserError for a name that is no class.
    """
    if not wanted:
        return class_scores.rarest_class(label, len(names))
    spelled = [name.casefold() for name in names]
    if wanted.casefold() not in spelled:
        raise common.UserError(f"--positive_class {wanted} is no class"
                               f"{common.closest(wanted, names)} "
                               f"(found: {common.shorten_list(names)})")
    return spelled.index(wanted.casefold())


def sample_weights(table, flags):
    """--sample_weight moment:M2=2.5 (several multiply) -> (N,) weights of the rows in the loss."""
    weights = np.ones(len(table))
    for text in flags:
        rows, value = event_tables.rows_of_level(table, text, "--sample_weight")
        [factor] = csv_tables.to_numbers([value], f"--sample_weight {text}")
        if not factor >= 0:
            raise common.UserError(f"--sample_weight {text}: expected a weight of 0 or more, "
                                   f"found {value}")
        weights[rows] *= factor
    return weights


def augment_presets(table, flags, default):
    """--augment_for moment:M2=heavy (the last that fits counts) -> (N,) preset of each row."""
    presets = np.full(len(table), default, dtype=object)
    for text in flags:
        rows, preset = event_tables.rows_of_level(table, text, "--augment_for")
        if preset not in common.AUGMENTATIONS:
            raise common.UserError(f"--augment_for {text}: expected one of "
                                   f"{', '.join(common.AUGMENTATIONS)}, found {preset!r}")
        presets[rows] = preset
    return presets


class Clips(common.Samples):
    """Clips of chosen rows; a key is (epoch, index), which seeds start and augmentation.

    With presets (N,), the augmentation of each row, a sample is a random clip of a row. Without
    them the samples are the clips of each row that are predicted, in the order of the rows.
    Each sample: input uint8 (T, S, S, 3), or (T, F) or (F,) where features of a frozen backbone are
    given; mask (T,), True = a real frame; with an objective also target (K,) and weight.
    """

    def __init__(self, study, rows, presets=None, objective=None, features=None):
        self.study = study
        self.args = study.args
        self.presets = presets
        self.objective = objective
        self.features = features
        if presets is None:
            self.row_starts = [(row, start) for row in rows for start in study.starts(row)]
        else:
            self.row_starts = [(row, None) for row in rows]

    def __len__(self):
        return len(self.row_starts)

    def __getitem__(self, key):
        epoch, index = key
        row, start = self.row_starts[index]
        generator = common.generator_for(self.args.seed, epoch, index)
        if self.features and start is None:
            view = torch.randint(len(self.features.views), (), generator=generator)
            inputs = self.features.views[view, row]
            start = 0
        elif self.features:
            inputs = self.features.of_clips[row, start]
        else:
            start = self.random_start(row, generator) if start is None else start
            inputs = self.pixels(row, start, generator)
        mask = torch.from_numpy(self.study.mask(row, start))
        sample = {"input": torch.from_numpy(inputs), "mask": mask}
        if self.objective:
            sample["target"] = self.objective.target[row]
            sample["weight"] = self.objective.weight[row]
        return sample

    def random_start(self, row, generator):
        """Grid frame at which a train clip of the row starts."""
        first, last = self.study.start_range(row, self.args.jitter_sec)
        return first + int(torch.randint(last - first + 1, (), generator=generator))

    def pixels(self, row, start, generator):
        """Clip at `start`, uint8 (T, S, S, 3); black after its last frame."""
        length = self.args.n_frames
        size = self.args.image_size
        preset = "none" if self.presets is None else self.presets[row]
        chosen = self.study.frames(row, start, start + length)
        clip = np.zeros((length, size, size, 3), np.uint8)
        if preset == "none":
            clip[:len(chosen)] = [common.eval_crop(frame, size) for frame in chosen]
        else:
            drawn = common.sample_augmentation(preset, generator)
            clip[:len(chosen)] = common.augment_clip(chosen, drawn, size)
        return clip


# --- model and loss ----------------------------------------------------------------------

class Head(nn.Module):
    """(B, F) -> (B, K): dropout and a linear layer, whose outputs are put on the scale of the task.

    bounded: a sigmoid over the range from `offset` to `offset + span`.
    """

    def __init__(self, n_features, n_outputs, dropout=0.0, bounded=False):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(n_features, n_outputs)
        self.bounded = bounded
        self.register_buffer("offset", torch.zeros(n_outputs))
        self.register_buffer("span", torch.ones(n_outputs))

    def start_at(self, centre, offset, span):
        """Set the scale (K,) and a bias that gives `centre` (K,) where all features are 0."""
        self.offset.copy_(torch.as_tensor(offset))
        self.span.copy_(torch.as_tensor(span))
        scaled = (torch.as_tensor(centre, dtype=torch.float32) - self.offset) / self.span
        if self.bounded:
            scaled = torch.logit(scaled.clamp(0.01, 0.99))
        self.linear.bias.data = scaled

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            outputs = self.linear(self.dropout(features.float()))  # (B, F) -> (B, K)
            if self.bounded:
                outputs = torch.sigmoid(outputs)
            return self.offset + self.span * outputs


class ClipNet(backbones.BackboneModel):
    """A torchvision video network over all frames at once: clips (B, T, 3, S, S) -> (B, K)."""

    def __init__(self, backbone, n_features, n_outputs, dropout=0.0, bounded=False,
                 freeze_norm=False):
        super().__init__(backbone, freeze_norm)
        self.head = Head(n_features, n_outputs, dropout, bounded)

    def extract(self, clips, mask):
        """Features of the backbone: (B, T, 3, S, S) -> (B, F), on a CPU in fp32.

        In bf16 oneDNN's weight gradients of small 3-D convolutions read memory that was never
        written (torch 2.14).
        """
        with torch.autocast("cpu", enabled=False):
            return self.backbone(clips.transpose(1, 2))  # (B, 3, T, S, S) -> (B, F)

    def forward(self, clips, mask):
        # (B, T, 3, S, S) clips, or (B, F) features of a frozen backbone
        features = clips if clips.ndim == 2 else self.extract(clips, mask)
        return self.head(features)  # (B, F) -> (B, K)


def places_of(mask, device):
    """(frames,) indices into the B * T frames of a batch that the mask marks."""
    return mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)


def real_frames(clips, mask):
    """The frames that the mask marks: (B, T, 3, S, S), (B, T) -> (frames, 3, S, S)."""
    if mask.all():
        return clips.flatten(0, 1)
    frames = clips.movedim(2, -1).flatten(0, 1)  # (B * T, S, S, 3): colours stay the last
    return frames[places_of(mask, clips.device)].movedim(-1, 1)


def in_places(values, mask):
    """What is known of those frames, 0 for the others: (frames, ...), (B, T) -> (B, T, ...)."""
    if mask.all():
        return values.unflatten(0, mask.shape)
    everywhere = values.new_zeros(mask.numel(), *values.shape[1:])
    everywhere = everywhere.index_copy(0, places_of(mask, values.device), values)
    return everywhere.unflatten(0, mask.shape)


def mean_and_sd(features, mask):
    """(B, T, F) features and (B, T), True = counts -> (B, 2 F) over time; the SD tells motion."""
    mask = mask[..., None].to(features.device)  # (B, T, 1)
    count = mask.sum(1).clamp(min=1)
    mean = (features * mask).sum(1) / count
    deviation = (features - mean[:, None]) * mask
    return torch.cat([mean, ((deviation ** 2).sum(1) / count).sqrt()], 1)


class MotionReadout(ClipNet):
    """A linear layer on the maps of an image backbone: clips (B, T, 3, S, S), mask (B, T) -> (B, K).

    It reads, of each channel (C of the last three resolutions together), appearance: mean and SD
    over time of its mean over the picture; and motion: how far it rises, and how far it falls, from
    one frame to the next, at the place where it does so most, as the root mean square over time.
    The mask tells real frames that are not the frame before again.
    """

    def __init__(self, backbone, n_outputs, image_size):
        maps = backbones.FeatureMaps(backbone, image_size)
        self.n_channels = sum(maps.n_channels)
        super().__init__(maps, 4 * self.n_channels, n_outputs)

    def blocks(self):
        """{name: columns of the features} that the readout may choose from."""
        appearance, motion = np.arange(4 * self.n_channels).reshape(2, -1)
        return {"appearance": appearance, "motion": motion, "both": np.append(appearance, motion)}

    def last_stage(self, features):
        """(N, F) features -> those of appearance of the last resolution alone."""
        means, sds = features[:, :2 * self.n_channels].reshape(-1, 2, self.n_channels).swapaxes(0, 1)
        n_last = self.backbone.n_channels[-1]
        return np.append(means[:, -n_last:], sds[:, -n_last:], axis=1)

    def see(self, frames):
        """(n, 3, S, S) -> (n, 3, C): mean, largest rise and largest fall since the frame before.

        The first frame has none before it and gets 0. In fp32: bf16 would round changes away.
        """
        with torch.autocast(frames.device.type, enabled=False):
            maps = self.backbone(frames)  # three of (n, C, H, W)
        means = [each.mean((2, 3)) for each in maps]
        changes = [torch.diff(each.flatten(2), dim=0) for each in maps]  # (n - 1, C, H * W)
        rises = torch.cat([each.amax(2).clamp(min=0) for each in changes], 1)
        falls = torch.cat([each.amin(2).clamp(max=0) for each in changes], 1)
        since_before = torch.stack([rises, falls], 1)  # (n - 1, 2, C)
        since_before = nn.functional.pad(since_before, (0, 0, 0, 0, 1, 0))
        return torch.cat([torch.cat(means, 1)[:, None], since_before], 1)

    def pool(self, seen, mask):
        """What is seen in the frames of clips, (B, T, 3, C), and their mask (B, T) -> (B, 4 C)."""
        mask = mask.to(seen.device)
        # not the first frame of a clip: its change is from another clip
        is_pair = (mask & (mask.cumsum(1) > 1))[..., None, None]  # (B, T, 1, 1)
        squares = (seen[:, :, 1:] ** 2 * is_pair).sum(1)  # (B, 2, C)
        motion = (squares / is_pair.sum(1).clamp(min=1)).sqrt()
        return torch.cat([mean_and_sd(seen[:, :, 0], mask), motion.flatten(1)], 1)

    def extract(self, clips, mask):
        """(B, T, 3, S, S), (B, T) -> (B, 4 C)."""
        return self.pool(in_places(self.see(real_frames(clips, mask)), mask), mask)

    def forward(self, clips, mask):
        # clips, (B, T, 3, C) seen in their frames, or (B, F) features
        return super().forward(self.pool(clips, mask) if clips.ndim == 4 else clips, mask)


class FrameLstm(backbones.BackboneModel):
    """An image backbone frame by frame, then an LSTM: clips (B, T, 3, S, S), mask (B, T) -> (B, K).

    The mask stays on the CPU, where counting its frames waits for no device.
    """

    def __init__(self, backbone, n_features, n_outputs, hidden, dropout=0.0, bounded=False,
                 freeze_norm=False):
        super().__init__(backbone, freeze_norm)
        self.lstm = nn.LSTM(n_features, hidden, batch_first=True)
        self.head = Head(hidden, n_outputs, dropout, bounded)

    def extract(self, clips, mask):
        """Features of the real frames, 0 for the others: (B, T, 3, S, S), (B, T) -> (B, T, F)."""
        return in_places(self.backbone(real_frames(clips, mask)).float(), mask)

    def forward(self, clips, mask):
        # (B, T, 3, S, S) clips, or (B, T, F) features of a frozen backbone
        features = clips if clips.ndim == 3 else self.extract(clips, mask)
        with torch.autocast(features.device.type, enabled=False):
            states, _ = self.lstm(features.float())  # (B, T, F) -> (B, T, H)
        last = mask.sum(1).clamp(min=1) - 1  # (B,) index of the last real frame
        last = last.to(features.device, non_blocking=True)
        rows = torch.arange(len(last), device=last.device)
        return self.head(states[rows, last])  # (B, H) -> (B, K)


def build_model(args, n_outputs):
    """The network that the flags (or a checkpoint's) describe; the seed decides the random part."""
    torch.manual_seed(common.hash_seed(args.seed))
    n_frames, size = FIXED_INPUT.get(args.model, (args.n_frames, args.image_size))
    if (n_frames, size) != (args.n_frames, args.image_size):
        raise common.UserError(
            f"--model {args.model} needs --n_frames {n_frames} --image_size {size}, "
            f"found {args.n_frames} and {args.image_size}")
    if args.model in FRAME_MODELS:
        name, family, example = args.backbone, "models", torch.zeros(1, 3, size, size)
    else:
        name, family, example = args.model, "video", torch.zeros(1, 3, n_frames, size, size)
    backbone, n_features = backbones.build_backbone(
        name, args.pretrained, args.weights, size, family)
    if args.model == MOTION_READOUT:
        return MotionReadout(backbone, n_outputs, size)
    backbones.freeze_stages(backbone, args.freeze_stages, example)
    shared = {"dropout": args.dropout, "bounded": args.bounded, "freeze_norm": args.freeze_norm}
    if args.model == CNN_LSTM:
        return FrameLstm(backbone, n_features, n_outputs, args.hidden, **shared)
    return ClipNet(backbone, n_features, n_outputs, **shared)


def pixel_statistics(args):
    """(mean, sd) of the three colours that the published weights of the flags' network expect."""
    return backbones.pixel_statistics(network_name(args), args.weights)


def network_name(args):
    """The network whose weights --weights or torchvision has."""
    return args.backbone if args.model in FRAME_MODELS else args.model


class Behaviours:
    """--task classify: targets, loss and metrics of C classes, fitted to the train rows.

    The natural class shares are those of the train rows, each counted once. Rows that are repeated,
    sampled or weighted change the shares that training sees; prior_shift takes that back.
    """

    def __init__(self, args, study, train):
        table = study.table
        counts = np.bincount(table.label[train], minlength=len(table.names))
        if (counts == 0).any():
            lacking = common.shorten_list(itertools.compress(table.names, counts == 0))
            raise common.UserError(f"no train row of class {lacking}; "
                                   "change the split or the label map")
        self.args = args
        self.names = table.names
        self.positive = study.positive
        self.label = table.label
        self.repeats = table.repeats
        self.prior = counts / counts.sum()  # (C,) natural class shares
        self.class_weight = class_weights(args, self.prior, study.positive)
        known = torch.tensor(np.maximum(table.label, 0))
        self.target = nn.functional.one_hot(known, len(counts)).float()  # (N, C)
        self.weight = torch.from_numpy(sample_weights(table, args.sample_weight)).float()  # (N,)
        self.columns = verdicts.class_columns(table.names)  # of the history: {column: MetricOf}
        self.meanings = verdicts.spell_class_metrics(table.names)  # names of --select
        self.default_select = f"average_precision_{table.names[study.positive]}"

    def rows_of_epoch(self, train):
        """Train rows -> the same, each as often as an epoch shows it.

        Rows that the manifest repeats are repeated, then the positive class up to --boost_to.
        """
        train = np.repeat(train, self.repeats[train])
        rare = train[self.label[train] == self.positive]
        n_others = len(train) - len(rare)
        wanted = round(self.args.boost_to * n_others / (1 - self.args.boost_to))
        return np.concatenate([train, np.resize(rare, max(0, wanted - len(rare)))])

    def sampler_weights(self, rows):
        """A chance for each of these rows that draws all classes equally often, or None."""
        if self.args.balance != "sampler":
            return None
        label = self.label[rows]
        return 1 / np.bincount(label)[label]

    def prior_shift(self, rows):
        """(C,) to add to the logits: from the class shares in training to the natural ones."""
        n_classes = len(self.names)
        seen = np.bincount(self.label[rows], minlength=n_classes) * self.class_weight
        if self.args.balance == "sampler":
            seen = np.ones(n_classes)
        return calibrating.prior_correction(np.zeros(n_classes), self.prior, seen / seen.sum())

    def scale(self):
        """(centre, offset, span) of the head, (C,) each: the first output is the log prior."""
        return np.log(self.prior), np.zeros(len(self.prior)), np.ones(len(self.prior))

    def loss(self, logits, target, weight):
        """Mean over the batch: logits and class shares (B, C), weights (B,) -> float tensor.

        Focal loss: Lin et al. 2017, with the probability of the target mixture.
        """
        smoothing = self.args.label_smoothing
        smooth = target * (1 - smoothing) + smoothing / target.shape[1]
        error = -(smooth * torch.log_softmax(logits, 1)).sum(1)  # (B,)
        if self.args.loss == "focal":
            probability = (target * torch.softmax(logits, 1)).sum(1)
            error = error * (1 - probability) ** self.args.focal_gamma
        class_weight = common.on_device(self.class_weight, target.device)
        class_weight = (target * class_weight).sum(1)  # (B, C) -> (B,)
        return (error * weight * class_weight).mean()

    def history(self, logits, rows):
        """{column: value} of the history for logits (M, C) of these rows."""
        found = class_scores.classification_metrics(
            class_scores.softmax(logits), self.label[rows], positive=self.positive)
        values = {}
        for column, (metric, name) in self.columns.items():
            if name is None:
                values[column] = found.overall[metric]
            else:
                values[column] = found.per_class[metric][self.names.index(name)]
        return values


def class_weights(args, prior, positive):
    """Tuple of C weights of the classes in the loss, whose mean over the train rows is 1."""
    weights = np.ones(len(prior))
    if args.balance == "weights":
        weights /= prior
    if args.focal_alpha is not None:
        is_positive = np.arange(len(prior)) == positive
        weights *= np.where(is_positive, args.focal_alpha, 1 - args.focal_alpha)
    return tuple(weights / (weights * prior).sum())


class Scores:
    """--task regress: targets, loss and metrics of R scores, on the scale of the train rows."""
    columns = {name: verdicts.MetricOf(name) for name in ("loss", "mse", "mae", "r2", "pearson_r")}
    meanings = verdicts.spell_metrics(columns, (), ())
    default_select = "loss"
    positive = None

    def __init__(self, args, study, train):
        table = study.table
        self.args = args
        self.names = table.names
        self.repeats = table.repeats
        self.values = table.target
        self.mean = np.nanmean(table.target[train], axis=0)
        self.sd = np.nanstd(table.target[train], axis=0)
        self.low = np.nanmin(table.target[train], axis=0)
        self.high = np.nanmax(table.target[train], axis=0)
        varies = self.sd >= 1e-9  # False for NaN: no train row has the score
        if not varies.all():
            raise common.UserError(
                "the same score in every train row, or none, is nothing to learn: "
                f"{common.shorten_list(itertools.compress(table.names, ~varies))}; "
                "leave it out with --target_columns")
        self.target = torch.tensor(table.target, dtype=torch.float32)  # (N, R), NaN = missing
        self.weight = torch.from_numpy(sample_weights(table, args.sample_weight)).float()  # (N,)
        self.target_weight = target_weights(args.target_weights, table.names)
        self.total, self.parts = score_tables.total_and_parts(table.names)

    def rows_of_epoch(self, train):
        """Train rows -> the same, each as often as the manifest repeats it."""
        return np.repeat(train, self.repeats[train])

    def sampler_weights(self, rows):
        """No weighted sampling of scores."""
        return None

    def prior_shift(self, rows):
        """Nothing to correct in scores."""
        return 0.0

    def scale(self):
        """(centre, offset, span) of the head, (R,) each: the first output is the train mean."""
        if self.args.bounded:
            return self.mean, self.low, self.high - self.low
        return self.mean, self.mean, self.sd

    def loss(self, predicted, target, weight):
        """Mean over rows of each row's mean over its labelled scores.

        predicted, target: (B, R), weight: (B,); returns a float tensor. Errors are in sd; a missing
        score is NaN in target and does not count. Consistency: squared (total - sum of parts) in sd
        of the total, for every row, labelled or not.
        """
        sd = common.on_device(tuple(self.sd), predicted.device)
        labelled = ~torch.isnan(target)  # (B, R), True = a score is there
        # a missing score is its own target: its error is 0, without a NaN in the gradient
        filled = torch.where(labelled, target, predicted.detach())
        pointwise = nn.functional.mse_loss
        if self.args.loss == "smooth_l1":
            pointwise = nn.functional.smooth_l1_loss
        error = pointwise(predicted / sd, filled / sd, reduction="none")
        cell_weight = labelled * common.on_device(self.target_weight, predicted.device)
        row_error = (error * cell_weight).sum(1) / cell_weight.sum(1).clamp(min=1e-9)
        loss = (row_error * weight).mean()
        if self.parts and self.args.consistency_weight:
            parts = sum(predicted[:, part] for part in self.parts)
            gap = predicted[:, self.total] - parts
            loss = loss + self.args.consistency_weight * ((gap / sd[self.total]) ** 2).mean()
        return loss

    def history(self, predicted, rows):
        """{column: value} of the history for scores (M, R) of these rows, means over the scores."""
        means = common.mean_metrics(common.regression_metrics(predicted, self.values[rows]))
        predicted = torch.tensor(predicted, dtype=torch.float32)
        loss = self.loss(predicted, self.target[rows], self.weight[rows])
        return {"loss": float(loss)} | {name: means[name] for name in self.columns if name in means}


def target_weights(pairs, names):
    """--target_weights NAME=W ... -> tuple of R weights, 1 where not named. Raises UserError."""
    weights = [1.0] * len(names)
    keys = [csv_tables.column_key(name) for name in names]
    for text in pairs or []:
        name, _, value = text.rpartition("=")
        key = csv_tables.column_key(name)
        if key not in keys or not csv_tables.NUMBER.fullmatch(value) or float(value) < 0:
            raise common.UserError(f"--target_weights expects NAME=WEIGHT of "
                                   f"{common.shorten_list(names, 40)}, found {text!r}")
        weights[keys.index(key)] = float(value)
    return tuple(weights)


TASKS = {"classify": Behaviours, "regress": Scores}


def select_column(wanted, objective):
    """--select as typed -> (val_ column or 'last', higher is better). Raises UserError."""
    name = (wanted or objective.default_select).removeprefix("val_")
    if name == "last":
        return "last", True
    if name not in objective.meanings:
        names = [*objective.meanings, "last"]
        raise common.UserError(f"--select {name} is no metric of this run{common.closest(name, names)}; "
                               f"metrics: {common.shorten_list(names, 40)}")
    meaning = objective.meanings[name]
    column_of = {own: column for column, own in objective.columns.items()}
    return f"val_{column_of[meaning]}", not metric_names.METRICS[meaning.metric].lower_is_better


# --- training ---------------------------------------------------------------------------

def make_loaders(study, split, objective, args, compute, features):
    """Loader of random train clips, and {part: loader} of the clips that are predicted."""
    presets = augment_presets(study.table, args.augment_for, args.augment)
    is_cached = study.store.cache == "ram" or args.freeze_backbone
    given = features if args.freeze_backbone else None  # else pixels
    rows = objective.rows_of_epoch(split["train"])
    train_loader = common.make_loader(
        Clips(study, rows, presets, objective, given), args, compute, True,
        is_cached, objective.sampler_weights(rows))
    loaders = {}
    for part, rows in split.items():
        if len(rows):
            clips = Clips(study, rows, features=given)
            loaders[part] = common.make_loader(
                clips, args, compute, False, is_cached)
    return train_loader, loaders


def to_device(batch, args, compute):
    """Batch -> clips (B, T, 3, S, S) normalised, or features; mask (B, T), on the CPU."""
    clips = batch["input"]
    if clips.dtype == torch.uint8:
        # memory stays in the order B, T, S, S, 3: channels_last for pictures and clips alike
        mean, sd = pixel_statistics(args)
        frames = common.to_input(clips.flatten(0, 1), compute.device, mean, sd)
        clips = frames.unflatten(0, clips.shape[:2])  # (B * T, 3, S, S) -> (B, T, 3, S, S)
    return compute.send(clips), batch["mask"]


def mix_up(clips, mask, target, weight, alpha):
    """mixup (Zhang et al. 2018): each clip and its target blended with another of the batch.

    A frame is real where one of the two has it.
    """
    if not alpha:
        return clips, mask, target, weight
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(clips))
    places = order.to(clips.device, non_blocking=True)

    def blend(values):
        return share * values + (1 - share) * values[places]
    return blend(clips), mask | mask[order], blend(target), blend(weight)


def train_one_epoch(model, loader, objective, training, args, compute):
    """One pass over the train rows; returns {'train_loss': mean over the rows}."""
    model.train()
    for batch in training.batches(loader):
        clips, mask = to_device(batch, args, compute)
        target = compute.send(batch["target"])
        weight = compute.send(batch["weight"])
        clips, mask, target, weight = mix_up(clips, mask, target, weight, args.mixup)
        with compute.autocast():
            outputs = model(clips, mask)  # (B, T, 3, S, S) -> (B, K)
        training.step(objective.loss(outputs.float(), target, weight))
    return training.epoch_means()


@torch.no_grad()
def evaluate(model, loader, args, compute):
    """Predict a whole split -> (M, K) float64; the clips of a row are combined by --aggregation."""
    model.eval()
    outputs = []
    for batch in loader:
        clips, mask = to_device(batch, args, compute)
        with compute.autocast():
            outputs.append(model(clips, mask).float().cpu())  # (B, T, 3, S, S) -> (B, K)
    outputs = torch.cat(compute.processes.gather(outputs)).double().numpy()  # (clips, K)
    return combine_clips(outputs, loader.dataset.row_starts, args.aggregation)


def combine_clips(outputs, row_starts, aggregation):
    """Mean or max over the clips of each row: (clips, K), (row, start) of each -> (M, K)."""
    row_of = np.array([row for row, _ in row_starts])  # (clips,)
    is_first = np.append(True, row_of[1:] != row_of[:-1])
    first = np.flatnonzero(is_first)  # (M,) where the clips of a row begin
    if aggregation == "max":
        return np.maximum.reduceat(outputs, first)
    n_clips = np.diff(first, append=len(outputs))
    return np.add.reduceat(outputs, first) / n_clips[:, None]


@dataclasses.dataclass
class Fitted:
    """A network at its best epoch."""
    outputs: dict  # part -> (M, K) scores, or logits at the natural class shares
    objective: Behaviours | Scores
    training: common.Training


def start_model(args, objective, compute):
    """The network before its first step, on the device, with the frozen parts out of training."""
    model = build_model(args, len(objective.names))
    model.head.start_at(*objective.scale())
    if args.init_from:
        common.start_from(model, args.init_from, args.freeze_backbone, names=objective.names)
    model = compute.place(model)
    model.freeze_backbone(args.freeze_backbone)
    return model


def fit(run, args, study, split, features):
    """Train on split['train'], choose the epoch on split['val']; returns Fitted."""
    compute = run.compute
    train = split["train"]
    objective = TASKS[args.task](args, study, train)
    column, higher_is_better = select_column(args.select, objective)
    train_loader, loaders = make_loaders(study, split, objective, args, compute, features)
    is_solved = args.model == MOTION_READOUT  # from each row once, at the natural class shares
    shift = objective.prior_shift(train if is_solved else objective.rows_of_epoch(train))
    model = start_model(args, objective, compute)
    mean, sd = pixel_statistics(args)
    run.say(f"{args.model}: colours are normalised with mean {mean} and SD {sd}, "
            "as its published weights expect")
    rest = nn.ModuleList(
        [module for name, module in model.named_children() if name != "backbone"])
    optimizer = common.build_optimizer([(model.backbone, args.backbone_lr_mult), (rest, 1.0)], args)
    training = common.Training(
        run, model, optimizer, args, column, lambda: model_metadata(args, study, objective, shift),
        higher_is_better, study.hashes, split)
    for _ in training.epochs():
        if is_solved:
            solve_head(model, study, train, features, run.say)
            outputs = evaluate(model, loaders["train"], args, compute)
            row = {"train_loss": objective.history(outputs, train)["loss"]}
        else:
            row = train_one_epoch(model, train_loader, objective, training, args, compute)
        outputs = evaluate(model, loaders["val"], args, compute) + shift
        for name, value in objective.history(outputs, split["val"]).items():
            row[f"val_{name}"] = value
        training.end_epoch(row)
    outputs = predict_with_best(training, study, split, loaders, objective, shift)
    return Fitted(outputs, objective, training)


def predict_with_best(training, study, split, loaders, objective, shift):
    """{part: outputs (M, K)} of the best epoch; of classes the calibration on val is saved with it."""
    run = training.run
    best = training.load_best()
    outputs = {}
    for part, loader in loaders.items():
        outputs[part] = evaluate(training.model, loader, training.args, run.compute) + shift
    if study.table.label is None:
        return outputs
    val = split["val"]
    calibration = calibrate(outputs["val"], objective.label[val], objective.positive)
    best["calibration"] = calibration
    best["seen"] = training.seen.plus(common.SeenRows(fitted=[], chose=study.hashes[val]))
    common.save_checkpoint(run.path("best_model.pth"), common.to_plain_types(best))
    common.write_json(run.path("calibration.json"), calibration)
    return outputs


def fit_motion_readout(study, rows, features):
    """baseline_models.Readout of these rows on features.motion."""
    n_classes = None if study.table.label is None else len(study.table.names)
    return baseline_models.fit_readout(
        features.motion[rows], study.truth[rows], study.groups_of(rows), n_classes, features.blocks)


def solve_head(model, study, rows, features, say):
    """Put the readout that these rows give into the linear layer of a MotionReadout."""
    readout = fit_motion_readout(study, rows, features)
    named = ", ".join(map(" ".join, zip(study.table.names, readout.blocks)))
    say(f"features by the inner folds: {named if study.table.label is None else readout.blocks[0]}")
    span = model.head.span.cpu().double().numpy()
    offset = model.head.offset.cpu().double().numpy()
    dataclasses.replace(
        readout, weights=readout.weights / span, intercept=(readout.intercept - offset) / span,
    ).write_into(model.head.linear)


def model_metadata(args, study, objective, shift):
    """What predict needs beside the weights: architecture, names, pixel scale, prior shift."""
    mean, sd = pixel_statistics(args)
    content = {
        "architecture": {
            **{name: getattr(args, name) for name in ARCHITECTURE},
            "pixel_range": study.store.pixel_range},
        "names": objective.names,
        "pixel_mean": list(mean),
        "pixel_sd": list(sd),
    }
    if args.task == "classify":
        content["positive"] = objective.names[objective.positive]
        content["prior"] = list(objective.prior)
        content["prior_shift"] = list(shift)  # to be added to the logits
    return content


@torch.no_grad()
def extract_features(model, clips, epoch, args, compute):
    """float32 features of every clip through an untuned backbone: (clips, F) or (clips, T, F)."""
    model.eval()
    loader = common.make_loader(clips, args, compute, False, batch_size=16)
    loader.batch_sampler.epoch = epoch
    features = []
    for batch in loader:
        inputs, mask = to_device(batch, args, compute)
        with compute.autocast():
            features.append(model.extract(inputs, mask).float().cpu())
    return torch.cat(compute.processes.gather(features)).numpy()


def untuned_features(args, study, run):
    """Features from networks before any tuning: for the baselines, and --freeze_backbone.

    The baselines see the clips that the model predicts.
    """
    compute = run.compute
    rows = np.arange(len(study.table))
    model = compute.place(build_model(args, len(study.table.names)))
    clips = Clips(study, rows)
    found = extract_features(model, clips, 0, args, compute)
    of_clips = found  # (clips, F)
    if found.ndim == 3:
        masks = np.stack([study.mask(row, start) for row, start in clips.row_starts])
        of_clips = mean_and_sd(torch.from_numpy(found), torch.from_numpy(masks)).numpy()
    pooled = combine_clips(of_clips, clips.row_starts, "mean")
    if args.model == MOTION_READOUT:
        return Features(
            last=model.last_stage(pooled), motion=pooled, blocks=model.blocks(),
            of_clips=dict(zip(clips.row_starts, found)))
    features = Features(last=pooled)
    motion = features_of_motion_readout(args, study, run)
    if motion:
        features.motion, features.blocks = motion.motion, motion.blocks
    if args.freeze_backbone:
        presets = augment_presets(study.table, args.augment_for, args.augment)
        views = [extract_features(model, Clips(study, rows, presets), view, args, compute)
                 for view in range(args.feature_views)]
        features.views = np.stack(views)
        features.of_clips = dict(zip(clips.row_starts, found))
    return features


def features_of_motion_readout(args, study, run):
    """Features of the MotionReadout that any other model is compared with.

    None, with a note, where its image network or the weights of that cannot be had.
    """
    weights = args.weights if args.model == CNN_LSTM else None
    own = argparse.Namespace(**{**vars(args), "model": MOTION_READOUT, "weights": weights})
    try:
        return untuned_features(own, dataclasses.replace(study, args=own), run)
    except common.UserError as error:
        run.say(f"note: no motion readout to compare with: {error}")
        return None


# --- results: predictions table -> judged run folder -------------------------------------------

@dataclasses.dataclass(kw_only=True)
class HeldOut:
    """Outputs for rows that the model was not trained on, and the baselines' for the same rows."""
    rows: np.ndarray  # (M,) rows of the study
    outputs: np.ndarray  # (M, K) logits at the natural class shares, or scores
    baselines: dict  # name -> (M, K) probabilities or scores
    trained_on: list  # (train rows, held-out rows) of each fold, one pair without folds
    seen: np.ndarray  # (M,) of common.SEEN_WORDS
    spread: np.ndarray | None = None  # (M, R) sd over several models; regress
    fold: np.ndarray | None = None  # (M,) number of the fold, of pooled folds
    # classify, fitted on other rows:
    temperature: np.ndarray | None = None  # (M,)
    threshold: np.ndarray | None = None  # (M,) of the positive class, after the temperature
    baseline_thresholds: dict = dataclasses.field(default_factory=dict)  # name -> (M,)


def calibrate(logits, label, positive):
    """Temperature, and threshold of the positive class after it: logits (M, C), labels (M,)."""
    temperature = calibrating.fit_temperature(logits, label)
    probability = class_scores.softmax(logits / temperature)
    threshold = calibrating.fit_threshold(probability, label, positive=positive)
    return {"temperature": temperature, "threshold": threshold}


def calibrate_on(held_out, others, study):
    """HeldOut with temperature and threshold from the rows of other HeldOuts, the model's and the baselines' alike."""
    label = np.concatenate([study.table.label[each.rows] for each in others])

    def fit(of):
        return calibrate(np.concatenate([of(each) for each in others]), label, study.positive)
    tuned = {}
    thresholds = {}
    for name in held_out.baselines:
        found = fit(lambda each: log_of(each.baselines[name]))
        tuned[name] = class_scores.softmax(log_of(held_out.baselines[name]) / found["temperature"])
        thresholds[name] = np.full(len(held_out.rows), found["threshold"])
    return dataclasses.replace(
        held_out, baselines=tuned, baseline_thresholds=thresholds,
        **calibration_of_rows(fit(lambda each: each.outputs), len(held_out.rows)))


def log_of(probability):
    """Logits of probabilities, finite also for those of 0."""
    return np.log(np.maximum(probability, 1e-12))


def calibration_of_rows(calibration, n_rows):
    """What calibrate gave -> those fields of HeldOut for so many rows; None -> no fields."""
    return {name: np.full(n_rows, value) for name, value in (calibration or {}).items()}


def predict_baselines(study, features, train, rows):
    """{name: (M, K)} predictions without training a network.

    The class shares or means of the train rows, and linear models on untuned features: of the
    model's last stage, and for other models the motion readout.
    """
    table = study.table
    groups = study.groups_of(train)
    n_classes = None if table.label is None else len(table.names)
    readouts = {}
    last = baseline_models.fit_readout(features.last[train], study.truth[train], groups, n_classes)
    readouts["logistic" if n_classes else "ridge"] = last.predict(features.last[rows])
    if features.motion is not None and study.args.model != MOTION_READOUT:
        motion = fit_motion_readout(study, train, features)
        readouts[MOTION_READOUT] = motion.predict(features.motion[rows])
    if n_classes:
        prior = baseline_models.prior_baseline(table.label[train], len(rows), n_classes)
        return {"train_prior": prior} | {
            name: class_scores.softmax(logits) for name, logits in readouts.items()}
    target = table.target[train]
    predicted = {
        "train_mean": baseline_models.train_mean_baseline(target, len(rows)), **readouts}
    moments = moment_levels(study)
    if moments is not None:
        codes = np.unique(moments, return_inverse=True)[1]
        predicted["moment_mean"] = confounding.smoothed_means(codes, table.target, train, rows)
    return predicted


def moment_levels(study):
    """(N,) levels of --moment_column, or None where the table has no such column."""
    key = csv_tables.column_key(study.args.moment_column)
    return study.table.extra[key].to_numpy(str) if key in study.table.extra else None


def predictions_table(study, held_out):
    """HeldOut -> ScoreTable, or ClassTable with the probabilities after calibration."""
    table = study.table
    rows = held_out.rows
    shared = {
        "names": table.names,
        "baselines": held_out.baselines,
        "groups": study.groups_of(rows),
        "seen": held_out.seen,
    }
    start_sec, end_sec = table.windows[rows].T
    where = {
        "video": np.array([str(table.sources[row]) for row in rows]),
        "start_sec": start_sec,
        "end_sec": end_sec,
    }
    if held_out.fold is not None:
        where["fold"] = held_out.fold
    if table.target is not None:
        return prediction_tables.ScoreTable(
            keys={"clip_id": table.clip_ids[rows], **where},
            target=table.target[rows],
            predicted=held_out.outputs,
            spread=held_out.spread,
            **shared)
    probability = class_scores.softmax(held_out.outputs)
    uncalibrated = None
    if held_out.temperature is not None:
        uncalibrated = probability
        probability = class_scores.softmax(held_out.outputs / held_out.temperature[:, None])
    n_clips = np.array([len(study.starts(row)) for row in rows])
    return prediction_tables.ClassTable(
        keys={"clip_id": table.clip_ids[rows], "event": table.events[rows], "n_clips": n_clips,
              **where},
        positive=study.positive,
        label=table.label[rows],
        probability=probability,
        threshold=held_out.threshold,
        baseline_thresholds=held_out.baseline_thresholds,
        logits=held_out.outputs,
        uncalibrated=uncalibrated,
        **shared)


@common.first_process_only
def judge(run, args, study, split, held_out, part, alarms, best_epoch=None, folds=()):
    """Judge the outputs for held-out rows; split: {name: rows}; part: val, test or folds."""
    table = predictions_table(study, held_out)
    rows = held_out.rows
    is_classes = study.table.target is None
    levels = confounding.prior_levels(study.table)
    train_rows, held_out_rows = zip(*held_out.trained_on)
    confounds = confounding.level_priors(
        levels, study.truth, list(train_rows), list(held_out_rows), study.groups, study.positive)
    setting = judging.Setting(
        title="Behaviour in clips" if is_classes else "Scores of frame sequences",
        part=part,
        seen=table.seen,
        best_epoch=best_epoch,
        alarms=alarms,
        criteria=args.criteria,
        data=data_blocks(study, split, rows, table),
        cases=judging.case_blocks(
            table, study.table.clip_ids[rows], lambda i: study.middle_frame(rows[i])),
        limits=limits(args, study),
        folds=folds)
    if is_classes:
        of_rows = {name: values[rows] for name, values in levels.items()}
        class_judging.judge_classes(run, table, setting, confounds, of_rows)
        return
    ceiling = None
    if study.table.single_ratings:
        ceiling = rater_agreement.measure_ceiling(
            study.table.names, study.table.target, single_ratings=study.table.single_ratings)
    moments = moment_levels(study)
    of_rows = None if moments is None else moments[rows]
    score_judging.judge_scores(run, table, setting, ceiling, confounds, of_rows)


def criteria_names(study):
    """What --criteria may name: metrics of all, of one class or score, and of one moment."""
    if study.table.target is None:
        return verdicts.spell_class_metrics(study.table.names)
    moments = moment_levels(study)
    levels = () if moments is None else sorted(set(moments))
    return score_judging.criteria_names(study.table.names, levels)


def data_blocks(study, split, rows, table):
    """HTML of the section Data and split."""
    sizes = []
    for part, part_rows in split.items():
        size = {"part": part, "rows": len(part_rows)}
        if study.table.target is None:
            counts = np.bincount(study.table.label[part_rows], minlength=len(study.table.names))
            size |= dict(zip(study.table.names, counts.tolist()))
        sizes.append(size)
    events = f"{len(set(study.table.events[rows]))} events; {len(study.skipped)} rows skipped."
    return [judging.rows_text(table), reporting.html_text(events), reporting.html_table(sizes)]


def limits(args, study):
    """Sentences on what a reader must not conclude from this run."""
    lines = ["Valid for clips like these, labelled by people like these; nothing else was tested."]
    if study.table.groups is None:
        lines.append("No --group_column: one animal, pen or scene may stand on both sides of the "
                     "split.")
    elif args.split_by in ("event", "video"):
        lines.append(f"Split by {args.split_by}: the same animals and places are on both sides, so "
                     "nothing is said of new ones.")
    if not args.pretrained and not args.weights:
        lines.append("Started from random weights; published weights usually do far better on data "
                     "of this size.")
    return lines


# --- one run, or one run per fold -------------------------------------------------------------

def check_split(run, study, split):
    """Refuse a split that leaks; write splits.json and the leakage report. Returns alarms on what it parts."""
    args = study.args
    audits = [study.audit(row) for row in range(len(study.table))]
    shas = [audit.pixel_sha for audit in audits]
    phash = np.array([audit.phash for audit in audits], dtype=np.uint64)
    report = event_audit.audit_table(study.table, split, shas, phash, gap_sec=args.gap_sec,
                                     judges_priors=False)
    keeps_groups = args.group_column and args.split_by in (None, "group")
    stopping = splitting.STOPPING_LEAKS if keeps_groups else ("events", "exact_duplicates")
    columns = {}
    if args.split_by in (None, "group"):  # else what repeats stands on both sides on purpose
        columns = confounding.prior_levels(study.table)
    for made in ("video", "pair", "hour"):  # no columns of the manifest
        columns.pop(made, None)
    groups = study.table.groups if keeps_groups else None
    return splitting.record_split(run, split, study.table.clip_ids, report, stopping, columns, groups)


def run_split(run, args, study, split, features=None):
    """Train on one split and judge its held-out rows: test where there is one, else val."""
    alarms = check_split(run, study, split)
    if args.dry_run:
        split = {part: few_rows(study.table, rows, 2 * args.batch_size)
                 for part, rows in split.items()}
    if features is None:
        features = untuned_features(args, study, run)
    run.write_args(**study.data_record(split))
    fitted = fit(run, args, study, split, features)
    results = {}
    for part in ("val", "test"):
        rows = split[part]
        if len(rows):
            results[part] = HeldOut(
                rows=rows,
                outputs=fitted.outputs[part],
                baselines=predict_baselines(study, features, split["train"], rows),
                trained_on=[(split["train"], rows)],
                seen=fitted.training.seen.words(study.hashes[rows]))
            if part == "test" and args.task == "classify":
                results[part] = calibrate_on(results[part], [results["val"]], study)
            table = predictions_table(study, results[part])
            table.write(run.path(f"predictions_{part}.csv"))
    best_epoch = fitted.training.progress.best_epoch
    plotting.plot_history(plotted_history(fitted), run.path("training_history.png"), best_epoch)
    train, val = (fitted.objective.history(fitted.outputs[part], split[part])
                  for part in ("train", "val"))
    metric = "roc_auc" if args.task == "classify" else "pearson_r"
    alarms += verdicts.split_gap_alarms(train, val, metric, OVERFITTING_REMEDY)
    part = "test" if "test" in results else "val"
    judge(run, args, study, split, results[part], part, alarms, best_epoch)


def plotted_history(fitted):
    """The history for its plot: no class but the positive one, and one of several like metrics."""
    objective = fitted.objective
    left_out = set()
    for column, (metric, name) in objective.columns.items():
        is_other_class = name is not None and name != objective.names[objective.positive]
        if is_other_class or metric in ("ece_adaptive", "brier", "mcc", "mse"):
            left_out.add(f"val_{column}")
    return [{name: value for name, value in row.items() if name not in left_out}
            for row in fitted.training.progress.history]


def few_rows(table, rows, count):
    """About `count` of the rows for a dry run, some of every class."""
    if table.label is None:
        return rows[:count]
    classes = [rows[table.label[rows] == c] for c in range(len(table.names))]
    per_class = math.ceil(count / len(classes))
    return np.sort(np.concatenate([of_class[:per_class] for of_class in classes]))


def make_split(args, study):
    """The split of the flags: by the manifests' parts, --test_groups, ratios or --split_file."""
    table = study.table
    if (table.parts != "").any():
        split = {part: np.flatnonzero(table.parts == part) for part in PARTS}
        return split if len(split["val"]) else split | part_of_train(args, table, split["train"])
    if args.test_groups:
        is_test = event_tables.group_mask(table, args.test_groups)
        test = np.flatnonzero(is_test)
        return part_of_train(args, table, np.flatnonzero(~is_test)) | {"test": test}
    kept_whole = event_tables.split_keys(table, args.split_by)
    return splitting.split_of_flags(
        args, table.clip_ids, event_tables.strata_of(table), kept_whole)


def part_of_train(args, table, rows):
    """train and val cut from these rows by their ratios."""
    shares = common.split_ratios(args)
    val_ratio = shares["val"] / (shares["train"] + shares["val"])
    kept_whole = event_tables.split_keys(table, args.split_by)
    made = splitting.make_split(
        len(rows), {"train": 1 - val_ratio, "val": val_ratio}, event_tables.strata_of(table)[rows],
        kept_whole[rows], args.seed, table.clip_ids[rows])
    return {part: rows[chosen] for part, chosen in made.items()}  # chosen: indices into `rows`


def make_folds(args, study):
    """List of {train, val, test} rows: of --cv_file or of --folds; test groups are in no fold."""
    table = study.table
    is_test = np.zeros(len(table), bool)
    if args.test_groups:
        is_test = event_tables.group_mask(table, args.test_groups)
    test = np.flatnonzero(is_test)
    if args.cv_file:
        return [{"train": np.setdiff1d(fold["train"], test),
                 "val": np.setdiff1d(fold["val"], test),
                 "test": test} for fold in score_tables.read_cv_file(args.cv_file, table)]
    rest = np.flatnonzero(~is_test)
    kept_whole = event_tables.split_keys(table, args.split_by)
    fold_of = np.full(len(table), -1)  # (N,) -1 = test
    fold_of[rest] = splitting.make_folds(
        len(rest), args.folds, event_tables.strata_of(table)[rest], kept_whole[rest], args.seed,
        table.clip_ids[rest])
    return [{"train": rest[fold_of[rest] != k], "val": np.flatnonzero(fold_of == k), "test": test}
            for k in range(args.folds)]


def run_folds(run, args, study):
    """One run per fold in fold_K/, all judged as one; their mean on the test groups."""
    folds = make_folds(args, study)
    test = folds[0]["test"]
    parts = {f"fold_{k}": fold["val"] for k, fold in enumerate(folds)}
    if len(test):
        parts["test"] = test
    alarms = check_split(run, study, parts)
    features = untuned_features(args, study, run)
    run.write_args(**study.data_record(parts))
    chosen = run.each_fold(
        folds, lambda child, split: run_split(child, args, study, split, features))
    results = [read_fold(run.path(f"fold_{k}"), study, folds[k], "val") for k in chosen]
    tables = [predictions_table(study, result) for result in results]
    if args.task == "regress":
        rows = fold_score_rows(study, chosen, results, tables)
        common.write_table(run.path("fold_scores.csv"), rows)
    done = judging.finished_folds(run, chosen, [table.fold_numbers() for table in tables])
    pooled = pool(results, study)
    predictions_table(study, pooled).write(run.path("predictions_folds.csv"))
    judge(run, args, study, parts, pooled, "folds", alarms, folds=done)
    if len(test):
        members = [read_fold(run.path(f"fold_{k}"), study, folds[k], "test") for k in chosen]
        with run.child("test_ensemble") as child:
            judge_ensemble(child, args, study, members)


def read_fold(folder, study, fold, part):
    """HeldOut of one part of a finished fold, from its files."""
    is_classes = study.table.target is None
    positive = study.table.names[study.positive] if is_classes else None
    table = prediction_tables.read_predictions(
        folder / f"predictions_{part}.csv", positive_class=positive)
    rows = prediction_tables.rows_of(table, study.table.clip_ids)
    shared = {"rows": rows, "baselines": table.baselines, "seen": table.seen,
              "trained_on": [(fold["train"], rows)]}
    if not is_classes:
        return HeldOut(outputs=table.predicted, **shared)
    return HeldOut(
        outputs=table.logits if part == "val" else log_of(table.probability),  # test: calibrated
        threshold=table.threshold,
        baseline_thresholds=table.baseline_thresholds,
        **shared)


def fold_score_rows(study, chosen, results, tables):
    """Dicts of n and the metrics of every fold, score and moment ('all' and each)."""
    moments = moment_levels(study)
    rows = []
    for k, result, table in zip(chosen, results, tables):
        own = None if moments is None else moments[result.rows]
        rows += [{"fold": k, **row} for row in score_judging.rows_of_scores(table, own)]
    return rows


def pool(results, study):
    """HeldOut of all folds as one; each fold's calibration is fitted on the other folds' rows."""
    if study.table.target is None and len(results) > 1:
        results = [calibrate_on(own, [each for each in results if each is not own], study)
                   for own in results]
    return dataclasses.replace(
        prediction_tables.combine(results, np.concatenate),
        trained_on=list(itertools.chain.from_iterable(each.trained_on for each in results)),
        fold=np.repeat(np.arange(len(results)), [len(each.rows) for each in results]))


def mean_of_members(members, study):
    """HeldOut of several models on the same rows as one: their mean, of classes after calibration.

    So with the baselines, each of which has a member for each model.
    """
    first = members[0]
    if len(members) == 1:
        return first
    seen = zip(*(member.seen for member in members))
    shared = {"seen": np.array(list(map(common.worst_seen, seen)))}
    for name in ("baselines", "baseline_thresholds"):
        parts = [getattr(member, name) for member in members]
        shared[name] = {key: np.mean([part[key] for part in parts], axis=0) for key in parts[0]}
    first = dataclasses.replace(first, **shared)
    if study.table.target is not None:
        outputs = np.stack([member.outputs for member in members])  # (members, M, R)
        return dataclasses.replace(first, outputs=outputs.mean(0), spread=outputs.std(0, ddof=1))
    tables = [predictions_table(study, member) for member in members]
    threshold = None
    if all(table.threshold is not None for table in tables):
        threshold = np.mean([table.threshold for table in tables], axis=0)
    outputs = log_of(np.mean([table.probability for table in tables], axis=0))
    return dataclasses.replace(first, outputs=outputs, temperature=None, threshold=threshold)


def judge_ensemble(run, args, study, members):
    """Judge the mean of all folds' models on the test groups, which none of them has seen."""
    mean = mean_of_members(members, study)
    train = np.setdiff1d(np.arange(len(study.table)), mean.rows)
    mean = dataclasses.replace(mean, trained_on=[(train, mean.rows)])
    split = {"train": train, "test": mean.rows}
    check_split(run, study, split)
    predictions_table(study, mean).write(run.path("predictions_test.csv"))
    judge(run, args, study, split, mean, "test", [])


def train(args):
    """--mode train: one split, or all folds."""
    is_lstm = args.model == CNN_LSTM
    with common.start_run(args, fp32_on_cpu=not is_lstm, fixed_shapes=not is_lstm) as run:
        check_fold_of_file(args)
        check_weights(args)
        study = load_study(args, run.say, run.path("skipped.csv"))
        check_flags_of_study(args, study)
        if args.folds or args.cv_file:
            run_folds(run, args, study)
        else:
            run_split(run, args, study, make_split(args, study))


def check_weights(args):
    """UserError for weights that cannot be had, before any video is decoded."""
    name = network_name(args)
    if args.weights:
        backbones.load_weights_file(args.weights)
    elif args.pretrained and name in torchvision.models.list_models():
        backbones.fetch_weights(name)


def check_fold_of_file(args):
    """UserError for a --fold that --cv_file does not have, before any video is decoded."""
    if not args.cv_file or args.fold == "all":
        return
    n_folds = len(score_tables.read_cv_file(args.cv_file, read_table(args)))
    if args.fold >= n_folds:
        raise common.UserError(f"--fold {args.fold}: --cv_file {args.cv_file} has {n_folds} folds, "
                               f"from 0 to {n_folds - 1}")


def check_flags_of_study(args, study):
    """UserError for flags that name what these data do not have, before anything is computed."""
    verdicts.parse_criteria(args.criteria, criteria_names(study))
    select_column(args.select, TASKS[args.task](args, study, np.arange(len(study.table))))
    augment_presets(study.table, args.augment_for, args.augment)
    if args.init_from:
        common.starting_weights(args.init_from, names=study.table.names)


# --- the other modes -------------------------------------------------------------------------

@dataclasses.dataclass
class Member:
    """One of the trained networks whose mean is predicted."""
    model: nn.Module  # in evaluation mode
    content: dict  # of its checkpoint


def load_members(paths, compute):
    """Checkpoints or run folders -> list of Member. Raises UserError where they differ."""
    members = []
    files = common.checkpoint_files(paths)
    untrained = {"seed": 0, "pretrained": False, "weights": None, "freeze_stages": 0,
                 "freeze_norm": False}
    for path in files:
        content = common.load_model_file(path, common.script_name())
        with common.checkpoint_fields(path):
            flags = argparse.Namespace(**content["architecture"], **untrained)
            model = build_model(flags, len(content["names"]))
        common.load_state(model, content["model"], path)
        model = compute.place(model).eval()
        if members and has_same_weights(model.backbone, members[0].model.backbone):
            model.backbone = members[0].model.backbone  # of frozen folds: what it sees counts for all
        members.append(Member(model, content))
        first = members[0].content
        if (flags.task, content["names"]) != (first["architecture"]["task"], first["names"]):
            raise common.UserError(
                f"{path} predicts {content['names']}, {files[0]} {first['names']}; "
                "members of one mean must agree")
    return members


def has_same_weights(one, other):
    """Whether two modules are the same."""
    states = one.state_dict(), other.state_dict()
    is_alike = states[0].keys() == states[1].keys()
    return is_alike and all(map(torch.equal, states[0].values(), states[1].values()))


def predict(args):
    """--mode predict: one row for each row of the manifest; the mean over the checkpoints."""
    if args.video:
        predict_recordings(args)
        return
    compute = common.choose_compute(args.device, args.use_amp)
    members = load_members(args.checkpoint, compute)
    own = ("clips_per_event", "aggregation", "min_event_sec")
    typed = {name: getattr(args, name) for name in own if name in args.given}
    study = None
    results = []
    for member in members:
        flags = member.content["architecture"]
        own_args = argparse.Namespace(**{**vars(args), **flags, **typed, "jitter_sec": 0.0})
        study = study_of_member(study, own_args, member.content["names"])
        results.append(predict_rows(member, study, compute))
    if "positive" in members[0].content:
        positive = study.table.names.index(members[0].content["positive"])
        study = dataclasses.replace(study, positive=positive)
    output = args.output or Path("predictions.csv")
    table = predictions_table(study, mean_of_members(results, study))
    table.write(output)
    print(f"{len(study.table)} rows predicted by {len(members)} checkpoint(s), "
          f"{len(study.skipped)} rows skipped; written to {output}")
    splitting.say_seen(table.seen, print)
    for entry in study.skipped:
        print(f"skipped: {entry['row']}: {entry['reason']}")


def study_of_member(study, args, names):
    """The study as these flags read it; `study`, of the member before or None, where they agree.

    Raises UserError where they can read other rows.
    """
    if study and all(getattr(study.args, name) == getattr(args, name) for name in READING):
        return dataclasses.replace(study, args=args)
    found = load_study(args, print, names=names, need_labels=False)
    order = found.table.extra["row_order"]  # the place of each row in the manifest
    if study and not np.array_equal(order, study.table.extra["row_order"]):
        raise common.UserError("the checkpoints can read different rows of the manifest, because "
                               f"they differ in {', '.join(READING)}; predict with each alone")
    return found


def predict_rows(member, study, compute):
    """HeldOut of all rows of the study by one trained network."""
    args = study.args
    rows = np.arange(len(study.table))
    loader = common.make_loader(
        Clips(study, rows), args, compute, False, study.store.cache == "ram")
    outputs = evaluate(member.model, loader, args, compute)
    calibration = member.content.get("calibration")  # a top_epoch_N.pth has none
    return HeldOut(
        rows=rows,
        outputs=outputs + member.content.get("prior_shift", 0.0),
        baselines={},
        trained_on=[],
        seen=member.content["seen"].words(study.hashes),
        **calibration_of_rows(calibration, len(rows)))


# --- whole recordings --------------------------------------------------------------------------

def predict_recordings(args):
    """--mode predict --video: windows, bouts and ethogram of each recording, in a run folder."""
    videos = recordings_in(args.video)
    with common.start_run(args) as run:
        members = load_members(args.checkpoint, run.compute)
        check_window(members)
        run.write_args(videos=list(videos))
        tables = {"windows": [], "bouts": []}
        failed = []
        for name, path in videos.items():
            try:
                recording = open_recording(path, members)
                windows = read_windows(recording, members, args, run, name)
            except common.UserError as error:
                failed.append(f"{name}: {common.one_line(error)}")
                continue
            say_losses(recording, run.say)
            folder = run.path(name.replace(".", "_"))
            folder.mkdir(parents=True, exist_ok=True)
            for kind, rows in describe_recording(recording, windows, members, args, folder).items():
                common.write_table(folder / f"{kind}.csv", rows)
                tables[kind] += rows
                common.write_table(run.path(f"{kind}.csv"), tables[kind])
        for line in failed:
            run.say(f"skipped: {line}")
        run.say(f"{len(videos) - len(failed)} of {len(videos)} recordings read, "
                f"{len(tables['bouts'])} bouts; open next: {run.folder}")
    if len(failed) == len(videos):
        raise common.UserError(f"no recording in {args.video} could be read; see {run.path('log.txt')}")


def recordings_in(path):
    """{name below the folder: path} of the recordings that --video names."""
    if path.is_file():
        return {path.name: path}
    videos, others = file_names.find_videos(path)
    videos |= {name: file for name, file in others.items() if video_files.has_pictures(file)}
    if not videos:
        raise common.UserError(f"--video {path}: found no video in it")
    return videos


def check_window(members):
    """UserError where the checkpoints give no classes, or read other windows."""
    first, *others = [member.content["architecture"] for member in members]
    if first["task"] != "classify":
        raise common.UserError("--video needs checkpoints of --task classify: a sequence of scores "
                               "has no window of its own")
    window = ("image_size", "n_frames", "fps")
    if any(flags[name] != first[name] for flags in others for name in window):
        raise common.UserError(f"--video: the checkpoints differ in {', '.join(window)}; "
                               "predict with each alone")


def open_recording(path, members):
    """The Recording on the grid of the trained window."""
    flags = members[0].content["architecture"]
    return video_files.Recording(
        path, flags["fps"], resize_side(flags["image_size"]), flags["pixel_range"])


def say_losses(recording, say):
    """Name what of a recording could not be read."""
    if recording.fault or recording.read_sec < 0.98 * recording.expected_sec - 1:
        say(f"note: {recording.path}: read up to {recording.read_sec:.1f} of "
            f"{recording.expected_sec:.1f} s by its header {recording.fault}")
    if recording.damaged:
        say(f"note: {recording.path}: {len(recording.damaged)} frames are damaged, the first at "
            f"{recording.damaged[0]:.2f} s; windows there show the frames before them")


class SlidingWindow:
    """Windows of one clip over the frames of a recording, of which no more than needed are kept.

    Of a MotionReadout what it sees in a frame, computed once; of other networks the pixels.
    """

    def __init__(self, members, args, compute):
        self.members = members
        self.compute = compute
        self.args = [argparse.Namespace(**{**vars(args), **member.content["architecture"]})
                     for member in members]
        self.length = self.args[0].n_frames
        self.kept = {}  # backbone -> values of the latest frames, (n, S, S, 3) or (n, 3, C)
        self.is_new = np.zeros(0, bool)  # of these frames, see GridFrame
        self.last_crop = None
        self.n_frames = 0  # of the grid so far

    def take(self, frames):
        """The next GridFrames."""
        size = self.args[0].image_size
        crops = torch.from_numpy(np.stack([common.eval_crop(frame.pixels, size) for frame in frames]))
        is_new = np.array([frame.is_new for frame in frames])
        n_kept = len(frames) + self.length
        before = crops[:1] if self.last_crop is None else self.last_crop
        networks = {member.model.backbone: k for k, member in enumerate(self.members)}
        for backbone, k in networks.items():
            values = crops
            if self.args[k].model == MOTION_READOUT:
                values = self.see(k, torch.cat([before, crops[is_new]]))
                values = values[is_new.cumsum()]  # a frame that is shown again, as it was seen before
            kept = self.kept.get(backbone, values[:0])
            self.kept[backbone] = torch.cat([kept, values])[-n_kept:]
        self.last_crop = crops[-1:]
        self.is_new = np.append(self.is_new, is_new)[-n_kept:]
        self.n_frames += len(frames)

    def see(self, k, crops):
        """(n, 3, C) that member k sees in crops (n, S, S, 3)."""
        clips, _ = to_device({"input": crops[None], "mask": None}, self.args[k], self.compute)
        return self.members[k].model.see(clips[0])

    def probability(self, starts):
        """(B, C) mean over the members, after calibration, for windows that start at these places."""
        first = self.n_frames - len(self.is_new)
        places = torch.as_tensor(starts)[:, None] + torch.arange(self.length) - first  # (B, T)
        found = []
        for member, args in zip(self.members, self.args):
            mask = torch.ones(places.shape, dtype=torch.bool)
            if args.model == MOTION_READOUT:
                mask[:, 1:] = torch.from_numpy(self.is_new)[places[:, 1:]]
            batch = {"input": self.kept[member.model.backbone][places], "mask": mask}
            clips, mask = to_device(batch, args, self.compute)
            with self.compute.autocast():
                logits = member.model(clips, mask).cpu().double().numpy()
            temperature = member.content.get("calibration", {}).get("temperature", 1.0)
            shift = member.content.get("prior_shift", 0.0)
            found.append(class_scores.softmax((logits + shift) / temperature))
        return np.mean(found, axis=0)


@torch.no_grad()
def read_windows(recording, members, args, run, label):
    """ethograms.Windows of a recording: one every --every seconds, on its grid, the last at its end.

    What is shorter than a window is one, in which the last frame is shown on.
    """
    fps = recording.fps
    step = max(round(args.every * fps), 1)
    n_frames = step * args.val_batch_size  # at a time
    window = SlidingWindow(members, args, run.compute)
    starts = []  # places on the grid
    found = []
    grid = recording.grid()
    batches = iter(lambda: list(itertools.islice(grid, n_frames)), [])
    total = math.ceil(recording.expected_sec * fps / n_frames)
    frames = []
    for frames in common.with_progress(run, label, batches, total):
        window.take(frames)
        first = starts[-1] + step if starts else 0
        complete = range(first, window.n_frames - window.length + 1, step)
        if complete:
            starts += complete
            found.append(window.probability(complete))
    if not frames:
        raise common.UserError(recording.fault or "no frame can be decoded")
    begin_sec = frames[-1].time_sec - (window.n_frames - 1) / fps
    if window.n_frames < window.length:
        again = dataclasses.replace(frames[-1], is_new=False)
        window.take([again] * (window.length - window.n_frames))
    last = window.n_frames - window.length
    if last not in starts[-1:]:
        starts.append(last)
        found.append(window.probability([last]))
    probability = np.concatenate(found)
    start_sec = begin_sec + np.array(starts) / fps
    end_sec = np.minimum(start_sec + window.length / fps, recording.read_sec)
    return ethograms.Windows(
        np.stack([start_sec, end_sec], 1), probability, choose_classes(probability, members))


def choose_classes(probability, members):
    """(W,) classes by the threshold of the checkpoints, or the most probable ones."""
    content = members[0].content
    calibrations = [member.content.get("calibration") for member in members]
    if not all(calibrations):
        return class_scores.predicted_class(probability)
    threshold = np.mean([calibration["threshold"] for calibration in calibrations])
    positive = content["names"].index(content["positive"])
    return class_scores.predicted_class(probability, threshold, positive)


def describe_recording(recording, windows, members, args, folder):
    """Draw a recording's ethogram, and with --annotate its copy; returns rows of windows and bouts."""
    names = members[0].content["names"]
    bouts = ethograms.bouts_of(windows, names, args.min_bout_sec, args.merge_gap_sec)
    ethograms.plot_ethogram(windows, bouts, names, folder / "ethogram.png")
    if args.annotate:
        again = open_recording(recording.path, members)
        ethograms.annotate(again, windows, names, folder / "annotated.mp4")
    video = str(recording.path.resolve())
    rows = []
    for (start_sec, end_sec), probability, c in zip(
            windows.spans, windows.probability, windows.chosen):
        each = {f"prob_{name}": p for name, p in zip(names, probability)}
        rows.append({"video": video, "start_sec": start_sec, "end_sec": end_sec,
                     "pred_label": names[c], **each})
    return {"windows": rows, "bouts": [{"video": video, **vars(bout)} for bout in bouts]}


def judge_bouts(args):
    """--mode judge_bouts: the bouts of predict --video against a table of events."""
    windows, bouts = (csv_tables.read_table(args.predictions / f"{kind}.csv").assign(
        start_sec=lambda table: table["start_sec"].astype(float),
        end_sec=lambda table: table["end_sec"].astype(float)) for kind in ("windows", "bouts"))
    names = [name.removeprefix("prob_") for name in windows if name.startswith("prob_")]
    as_they_are = argparse.Namespace(**{**vars(args), "min_event_sec": 0.0})
    table = read_table(as_they_are, names)
    events = table.extra.assign(
        video=[str(Path(source).resolve()) for source in table.sources],
        label=np.array(names)[table.label],
        start_sec=np.nan_to_num(table.windows[:, 0]),  # without times: from the start to the end
        end_sec=np.nan_to_num(table.windows[:, 1], nan=math.inf))
    is_watched = events["video"].isin(windows["video"])
    print(f"{is_watched.sum()} of {len(events)} events are in the recordings")
    if not is_watched.any():
        raise common.UserError(f"no event is in a recording of {args.predictions}: expected "
                               f"{common.shorten_list(set(windows['video']), 3)}, "
                               f"found {common.shorten_list(set(events['video']), 3)}")
    rows, method = ethograms.judge_bouts(windows, bouts, events, names)
    output = args.output or args.predictions / "bout_scores.csv"
    common.write_table(output, rows)
    for row in rows:
        print(f"{row['label']}: {row['bouts']} bouts, {row['events']} events; F1 at IoU .25 "
              f"{row['f1_at_0.25']:.3f}, at .5 {row['f1_at_0.5']:.3f}; kappa {row['kappa']:.3f} "
              f"[{row['kappa_low']:.3f}, {row['kappa_high']:.3f}]")
    print(f"{method}; written to {output}")


def judge_predictions(args):
    """--mode evaluate: a short way to judge_predictions.py, for one table of predictions."""
    table = prediction_tables.read_predictions(
        args.predictions, args.group_column, positive_class=args.positive_class)
    with common.start_run(args) as run:
        run.write_args(predictions=str(args.predictions))
        metrics = table_judging.judge_table(run, table, args.predictions, args.criteria)
        if args.output:
            common.write_json(args.output, metrics)


def audit(args):
    """--mode audit: what the parts share, bad windows, and labels that metadata predict."""
    table = read_table(args)
    durations = {}
    unreadable = {}
    damaged = {}
    for source in dict.fromkeys(table.sources):
        info = video_files.probe(source, args.fps)
        if info.error:
            unreadable[str(source)] = info.error
        else:
            durations[source] = info.duration_sec
        if info.damage:
            damaged[str(source)] = info.damage
    split = {part or "all": np.flatnonzero(table.parts == part) for part in (*PARTS, "")}
    report = event_audit.audit_table(
        table, split, durations=durations, predictions=args.predictions,
        positive=args.positive_class, gap_sec=args.gap_sec)
    report["unreadable"] = unreadable
    report["damaged"] = damaged
    report["skipped"] = table.skipped
    output = args.output or Path("audit.json")
    common.write_json(output, report)
    print(splitting.leakage_text(report))
    for note in table.notes:
        print(f"note: {note}")
    for what, found in (("unreadable", unreadable), ("damaged", damaged)):
        if found:
            lines = [f"{path}: {reason}" for path, reason in found.items()]
            print(f"{what}, {len(lines)} of {len(set(table.sources))} videos: {common.shorten_list(lines)}")
    print(f"{len(table.skipped)} rows skipped; written to {output}")


def main():
    args = parse_args()
    modes = {"train": train, "predict": predict, "evaluate": judge_predictions,
             "audit": audit, "judge_bouts": judge_bouts}
    modes[args.mode](args)


if __name__ == "__main__":
    common.run_main(main)
