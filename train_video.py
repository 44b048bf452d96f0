"""Train a network that names the behaviour in a clip, or scores a sequence of frames.

    python train_video.py --config configs/video_intravideo.yaml --video_root videos
    python train_video.py --manifest events.csv --video_root videos --dry_run
    python train_video.py --mode predict --checkpoint outputs/run_X --manifest new.csv
    python train_video.py --mode predict --checkpoint outputs/run_X --video recordings --every 0.5
    python train_video.py --mode judge_bouts --predictions outputs/run_Y --manifest events.csv
    python train_video.py --mode evaluate --predictions predictions.csv --output metrics.json
    python train_video.py --mode audit --train_manifest a.csv --val_manifest b.csv
    python train_video.py --task regress --config configs/pain_scores.yaml --manifest sequences.csv --folds 9

Writes outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), best_model.pth, metrics.json,
predictions_val.csv (and _test), training_history.csv and .png, splits.json, leakage_report.json,
skipped.csv, calibration.json (classify) or scores.csv (regress), the plots of the task, args.json,
log.txt. With --folds K the same in each fold_K/, pooled above them.

A row of the manifest is an event, whose class is predicted (classify), or a sequence of frames, whose
scores are (regress). A clip is the T frames of it that the network sees at once; several clips of an
event are predicted and combined.

Where a score comes from: judge() hands the predictions of the test rows, else of the val rows, to
evidence/class_judging.py (first the AUC: of the positive class, or of three classes and more the mean
over them) or evidence/score_judging.py (first R2, the mean over the scores), beside the best baseline
on these rows; evidence/subject_intervals.py gives each its interval.

Letters: N rows, M rows predicted, B batch, T frames of a clip, G frames of a row's time grid,
C classes, R scores, K outputs (C or R), F features, H width of the LSTM, V random views, S side of
the input in pixels.
Units: seconds from the start of a file; scores and their errors in the unit of their table, their mse
loss in squared sds of the train rows; classes as probabilities at the natural class shares; pixels are uint8
RGB until they reach the device.
"""
import argparse
import collections
import dataclasses
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common
import exporting
from evidence import (
    baseline_models, calibrating, class_judging, class_scores, confounding, ethograms, event_audit,
    event_splits, judging, plotting, prediction_tables, rater_agreement, reporting,
    row_warnings, score_judging, seen_rows, splitting, table_judging, verdicts)
from readers import (
    backbones, csv_tables, event_tables, event_times, score_tables, sliding_windows, video_files)

OVERFITTING_REMEDY = "Fewer trained layers (--freeze_stages 3 --freeze_norm, --freeze_backbone), more clips"
CNN_LSTM = "cnn_lstm"
MOTION_READOUT = "motion_readout"
FRAME_MODELS = (CNN_LSTM, MOTION_READOUT)  # these read frames one by one, with an image network
# The motion readout is solved in one step, without epochs. What these flags are for it:
SOLVED = {
    "epochs": 1, "freeze_backbone": True, "select": "last", "augment": "none",
    "balance": "none", "consistency_weight": 0.1}
# flags that must be off for it,
OFF_IN_SOLVED = ("augment_for boost_to bounded focal_alpha init_from jitter_sec label_smoothing "
                 "mixup sample_weight target_weights").split()
# and flags that must not be typed, whatever their value
UNUSED_BY_SOLVED = set("loss focal_gamma lr hidden dropout freeze_stages weight_decay optimizer".split())
BALANCING = ("balance", "boost_to", "focal_alpha")
# flags that a task does not read: refused unless they ask for nothing
UNUSED_BY = {
    "classify": "bounded consistency_weight target_columns target_weights".split(),
    "regress": [
        *BALANCING, *"jitter_sec label_column label_map label_smoothing mixup positive_class time_unit".split()],
}
# flags of predict: as typed, else from the checkpoint
OWN_OF_PREDICT = "clips_per_event aggregation min_event_sec".split()
FIXED_INPUT = ("s3d", "mvit_v1_b", "mvit_v2_s")  # networks that take 16 frames of 224 pixels and nothing else
# flags that decide which pixels are read: predict takes them from the checkpoint
READING = "image_size n_frames fps pixel_range".split()
# flags that a checkpoint keeps: how clips are read and combined, and what the network looks like
ARCHITECTURE = [*"task model backbone hidden dropout bounded".split(), *READING, *OWN_OF_PREDICT]
TASK_DEFAULTS = {
    "classify": {
        "model": "r3d_18", "n_frames": 16, "loss": "ce", "augment": "heavy",
        "epochs": 30, "batch_size": 4, "val_batch_size": 8,
        "weight_decay": 0.05, "warmup_epochs": 2.0, "min_lr": 1e-6, "patience": 10,
    },
    "regress": {
        "model": CNN_LSTM, "n_frames": 32, "loss": "mse", "augment": "basic", "select": "loss",
        "batch_size": 64, "val_batch_size": 64,
        "weight_decay": 1e-4, "clip_grad": 0.5,
        "scheduler": "plateau", "min_lr": 1e-7,
        "min_delta": 1e-4, "min_epochs": 5,
    },
}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_shared_arguments(parser, lr=5e-5, plateau_patience=7, on_bad_file="skip")
    job = parser.group("job")
    job("--task", choices=TASK_DEFAULTS, default="classify",
        help="a class for each event, or scores for each sequence; the defaults shown here are those of "
             "%(default)s, others are shown by --task TASK --help")
    job("--mode", choices=MODES, default="train",
        help="train a network, predict with trained ones, evaluate a table of predictions, audit "
             "manifests and videos, or judge the bouts of recordings by a table of events")
    job("--checkpoint", type=Path, nargs="+",
        help="predict: best_model.pth files or run folders; several are averaged")
    job("--predictions", type=Path,
        help="evaluate, audit: a table of predictions; judge_bouts: the run folder of predict --video")
    job("--output", type=common.new_file,
        help="file to write (default: predictions.csv, with judge_bouts bout_scores.csv in the folder of "
             "--predictions, with audit audit.json, with evaluate none)")
    exporting.add_argument(job, "the model of one clip")
    ethograms.add_arguments(parser.group("whole recordings"))
    event_splits.add_arguments(parser.group("tables and splits"))
    add_clip_arguments(parser.group("clips and labels"))
    add_model_arguments(parser.group("model"))
    add_learning_arguments(parser.group("learning"))
    words = sys.argv[1:] if argv is None else argv
    # the configuration may name task and model, and so may words beside --help
    asked = common.parse_arguments(parser, [word for word in words if word not in ("-h", "--help")])
    parser.set_defaults(task=asked.task, **TASK_DEFAULTS[asked.task])
    if asked.model == MOTION_READOUT:
        parser.set_defaults(**SOLVED)
    if asked.mode == "judge_bouts":
        parser.set_defaults(min_event_sec=0.0)  # bouts are compared with events as they are
    args = common.parse_arguments(parser, argv)
    check_flags(parser, args)
    return args


def add_clip_arguments(data):
    """The column of moments, and how clips are cut from the videos and their outputs combined."""
    data("--moment_column", default="moment",
         help="regress: column that says when a sequence was filmed, such as M0 before and M2 "
              "after surgery; each moment is also judged alone")
    data("--fps", type=common.bounded(float, 0.1, 240), default=12.0,
         help="classify: frames per second of a clip; both tasks: of folders of frames and .npy "
              "clips, which have no clock (default: %(default)s, for judge_bouts that of its predict run)")
    data("--n_frames", type=common.POSITIVE,
         help="classify: frames in a clip (default 16); regress: at most so many frames of a "
              "sequence are read (default 32)")
    data("--image_size", "--img_size", type=common.SIDE, default=112,
         help="side of the input in pixels: the centre square of a frame, random crops in training")
    data("--jitter_sec", type=common.AMOUNT, default=0.0,
         help="classify: training clips may reach this far outside their event")
    data("--clips_per_event", type=common.POSITIVE, default=5,
         help="classify: clips of each event that are predicted (default: %(default)s; predict: the checkpoint's)")
    data("--aggregation", choices=("mean", "max"), default="mean",
         help="how the outputs for an event's clips are combined (default: %(default)s; predict: the checkpoint's)")


def add_model_arguments(model):
    """The network and which parts of it are trained."""
    model("--model",
          help=f"{MOTION_READOUT}, for small data: a linear model, solved and not trained, on what an untuned image "
               f"backbone makes of the frames and how it changes from frame to frame; {CNN_LSTM}: an image backbone "
               "frame by frame, then an LSTM; or a torchvision video network (r3d_18, mc3_18, "
               "r2plus1d_18, s3d, mvit_v2_s, swin3d_t), which computes in fp32 on CPUs")
    model("--backbone", "--encoder", default="resnet18",
          help=f"image network of {' and '.join(FRAME_MODELS)}, and of the motion readout that "
               "every other model is compared with")
    model("--hidden", type=common.POSITIVE, default=256, help=f"width of the LSTM of {CNN_LSTM}")
    model("--dropout", type=common.DROPOUT, default=0.5,
          help="dropout before the last layer")
    model("--bounded", action="store_true",
          help="regress: keep the predictions within the range of the train rows (with --init_from: of that run's)")
    backbones.add_freezing_arguments(model)
    model("--feature_views", type=common.POSITIVE, default=4,
          help="with --freeze_backbone: random clips of each row that features are computed of")


def add_learning_arguments(learn):
    """Loss, imbalance, weights and the choice of the epoch."""
    learn("--loss", choices=("ce", "focal", "mse", "smooth_l1"),
          help="classify: ce or focal; regress: mse or smooth_l1")
    learn("--focal_gamma", type=common.AMOUNT, default=2.0, help="focal: weight (1 - p)^gamma")
    learn("--focal_alpha", type=common.SHARE,
          help="classify: weight of the positive class in the loss; the others get 1 minus this")
    learn("--label_smoothing", type=common.bounded(float, 0, 0.9), default=0.0,
          help="classify: share of each label that is spread over all classes")
    learn("--balance", choices=("none", "sampler", "weights"), default="none",
          help="classify; sampler: draw all classes equally often; weights: give each class the same "
               "total weight in the loss")
    learn("--boost_to", type=common.bounded(float, 0, 0.9), default=0.0,
          help="classify: repeat train rows of the positive class up to this share; 0 = off")
    learn("--force", action="store_true", help="allow several corrections of the class balance")
    learn("--mixup", type=common.AMOUNT, default=0.0, help="classify: alpha of mixup; 0 = off")
    learn("--positive_class", help="classify: the class that matters (default: the rarest)")
    learn("--sample_weight", action="append", metavar="COLUMN:LEVEL=W", default=[],
          help="weight in the loss of the rows with this level, e.g. moment:M2=2.5")
    learn("--augment_for", action="append", metavar="COLUMN:LEVEL=PRESET", default=[],
          help="augmentation of the rows with this level")
    learn("--target_weights", nargs="+", metavar="NAME=W",
          help="regress: weight of scores in the loss")
    learn("--consistency_weight", type=common.AMOUNT, default=0.1,
          help="regress: weight of the penalty on a total that is not the sum of its parts; 0 = off")
    learn("--select",
          help="val_ column that chooses the epoch, e.g. tail_f1 or f1_tail, or last: no choice "
               "(default: average precision of the positive class; regress: loss)")


def check_flags(parser, args):
    """parser.error for what a mode lacks, and for flags that contradict each other."""
    events = (event_splits.manifests_of(args) or args.video_root, "--manifest, or --train_manifest")
    if args.task == "regress":
        events = (args.manifest, "--manifest where --task is regress")
    needs = {  # mode: (whether all is there, what that is)
        "train": events,
        "audit": events,
        "predict": (args.checkpoint and bool(args.manifest) != bool(args.video),
                    "--checkpoint, and either --manifest or --video"),
        "judge_bouts": (args.predictions and args.manifest, "--predictions and --manifest"),
        "evaluate": (args.predictions, "--predictions"),
    }
    is_given, needed = needs[args.mode]
    if not is_given:
        parser.error(f"--mode {args.mode} needs {needed}")
    if args.export and not (args.mode == "predict" and args.manifest):
        parser.error("--export belongs to --mode predict with --manifest, whose clips it is checked on")
    if args.mode == "predict":
        of_checkpoint = args.given.intersection([*READING, "positive_class"])
        refuse(parser, "--mode predict, whose checkpoint says it,", of_checkpoint)
        if args.video:
            refuse(parser, "predict --video, which writes a run folder,", args.given & {"output"})
        else:
            refuse(parser, "predict without --video", args.given & {"annotate"})
    event_splits.check_flags(parser, args)
    if args.mode == "train":
        check_learning_flags(parser, args)


def refuse(parser, who, names):
    """parser.error where there are names of flags, which `who` does not use."""
    if names:
        flags = [f"--{name}" for name in sorted(names)]
        parser.error(f"{who} does not use {', '.join(flags)}")


def changed(args, names):
    """Those of these flags that are neither off (0, empty) nor as in SOLVED, where they ask for nothing."""
    flags = vars(args)
    return {name for name in names if flags[name] and flags[name] != SOLVED.get(name)}


def check_learning_flags(parser, args):
    """parser.error for flags of training that contradict each other, or do nothing."""
    if (args.loss in ("ce", "focal")) != (args.task == "classify"):
        parser.error(f"--loss {args.loss} does not fit --task {args.task}")
    refuse(parser, f"--task {args.task}", changed(args, UNUSED_BY[args.task]))
    corrections = [f"--{name} {getattr(args, name)}" for name in sorted(changed(args, BALANCING))]
    if len(corrections) > 1 and not args.force:
        parser.error(f"{' and '.join(corrections)} each correct the class balance; keep one, or give --force")
    if args.task == "regress" and args.model not in FRAME_MODELS:
        parser.error("--task regress reads sequences of any length: --model "
                     f"{' or '.join(FRAME_MODELS)}, found {args.model}")
    if args.model == MOTION_READOUT:
        unused = changed(args, [*SOLVED, *OFF_IN_SOLVED]) | (UNUSED_BY_SOLVED & args.given)
        if not args.freeze_backbone:  # as a configuration may say
            unused.add("freeze_backbone")
        refuse(parser, f"--model {MOTION_READOUT}, which is solved, not trained,", unused)


# --- data: row on disk -> table -> sample ---------------------------------------------------

@dataclasses.dataclass
class Features:
    """Features from untuned networks, computed once for all folds.

    of_rows: of each row the mean over its predicted clips, NaN in rows that nobody asked for. of_clips, with
    --freeze_backbone, which trains on them instead of pixels: (row, start) of a predicted clip -> a tuple of one,
    its features, (F,) or (T, F); (row, None) -> a tuple of V, those of random clips of the row.
    """
    of_rows: dict  # name of the linear model on them -> (N, F); the first one is logistic or ridge
    of_clips: dict | None

    @property
    def last_resolution(self):
        """(N, F) of the network's last layer before its head, by which similar rows are found."""
        return next(iter(self.of_rows.values()))


@dataclasses.dataclass
class Study:
    """N rows that can be read: their table and their frames."""
    table: event_tables.EventTable
    store: video_files.ClipStore
    stored: np.ndarray  # (N,) index of each row in the store
    args: argparse.Namespace

    def frames(self, row, start, stop):
        """Grid frames start to stop of a row, uint8 (T, H, W, 3)."""
        return self.store.part(self.stored[row], start, stop)

    def labels(self, rows):
        """A text for each of these rows: its clip, and its class or its first score."""
        table = self.table
        if table.label is None:
            known = [f"{table.names[0]} {score:.3g}" for score in table.target[:, 0]]
        else:
            known = np.array(table.names)[table.label]
        return [f"{table.clip_ids[row]}\n{known[row]}" for row in rows]

    def strip(self, row):
        """Five frames of a row's window, without those for jitter, side by side: uint8 (H, 5 W, 3)."""
        window = self.audits[row]
        return plotting.strip_of(self.frames(row, window.first, window.first + window.usable))

    @functools.cached_property
    def audits(self):
        """video_files.ClipAudit of each row."""
        return [self.store.audit[row] for row in self.stored]

    def mask(self, row, start):
        """(T,) bool, True = a frame of the clip at `start` that the model is to read.

        False after the row's last frame, and for MOTION_READOUT, which compares neighbours, also
        where a frame repeats the one before.
        """
        length = self.args.n_frames
        shown = self.audits[row].indices[start:start + length]  # of the file
        mask = np.arange(length) < len(shown)
        if self.args.model == MOTION_READOUT:
            mask[1:len(shown)] = np.diff(shown) > 0
        return mask

    @property
    def presets(self):
        """(N,) augmentation preset of each row in training."""
        return event_tables.augment_presets(self.table, self.args.augment_for, self.args.augment)

    def starts(self, row):
        """Grid frames where the predicted clips start."""
        return self.audits[row].even_starts(self.args.n_frames, self.args.clips_per_event)

    @property
    def skipped(self):
        """Dicts of row, video and reason."""
        return self.table.skipped

    @property
    def hashes(self):
        """(N, 4) hashes of the rows: of window, two roundings of its middle, pixels."""
        return self.store.hashes[self.stored]

    def data_record(self, split):
        """What args.json says of the data and their split; resuming refuses other data."""
        table = self.table
        contents = [*table.names, *table.clip_ids, table.truth, table.repeats, table.groups, table.events,
                    *confounding.prior_levels(table).values(), *(audit.pixel_sha for audit in self.audits)]
        return common.data_record(contents, split, rows=len(table), names=table.names)


def read_table(args, names=None, need_labels=True):
    """EventTable that the flags name, in seconds; names: classes or scores of a trained model."""
    shared = {
        "min_event_sec": args.min_event_sec,
        "group_column": args.group_column,
        "path_column": args.path_column,
        "row_filter": args.filter,
        "exact_names": args.exact_names,
        "max_missing": args.max_missing,
        "need_labels": need_labels,
        "need_files": args.mode != "audit",
    }
    if args.task == "regress":
        table = score_tables.read_sequences(
            args.manifest, args.video_root, target_columns=names or args.target_columns,
            moment_column=args.moment_column, **shared)
    else:
        manifests = event_splits.manifests_of(args) or {"": args.video_root}
        table = event_tables.read_events(
            manifests, args.video_root, args.label_map, names=names,
            label_column=args.label_column, time_unit=args.time_unit, **shared)
    return event_times.seconds_of(table, args.fps, args.min_event_sec)


def load_study(args, table, say):
    """Table and frames, checked; what cannot be used is counted and said."""
    for note in table.notes:
        say(f"note: {note}")
    say(f"decoding {len(table)} rows of {len(set(table.sources))} videos with {video_files.decoder_name()}")
    store = video_files.ClipStore(
        table.sources, table.windows, grid="even" if args.task == "regress" else "rate",
        fps=args.fps, n_frames=args.n_frames, short_side=common.resize_side(args.image_size),
        jitter_sec=args.jitter_sec, cache=args.cache, pixel_range=args.pixel_range)
    video_files.check_clips(store.audit, args.max_missing, args.on_bad_file)
    for note in store.time_notes():
        say(f"note: {note}")
    reasons = [found.error or found.fault for found in store.audit]
    usable = table.without(reasons)
    for reason, count in collections.Counter(row["reason"] for row in usable.skipped).items():
        say(f"skipped: {count} rows, {reason}")
    n_outside = sum(bool(found.fault) for found in store.audit)
    if not len(usable) or n_outside > max(0.5, args.max_missing) * len(table):
        raise common.UserError(
            f"{len(usable) or 'none'} of {len(table)} rows can be used (such as: {usable.skipped[-1]['reason']}). Are "
            "their times seconds from the start of the file? Spreadsheets take 1:05, one minute, "
            "for an hour. --max_missing lets more be lost")
    say(f"data: {len(usable)} rows, {len(set(usable.events))} events; {len(usable.skipped)} rows "
        f"skipped; {store.description}")
    stored = np.flatnonzero([not reason for reason in reasons])
    return Study(usable, store, stored, args)


class Clips(common.Samples):
    """Clips of chosen rows; a key is (epoch, index), which fixes the random start and augmentation.

    With presets (N,), the augmentation of each row, a sample is a random clip of a row. Without
    them the samples are the clips of each row that are predicted, in the order of the rows.
    `rows`: of each sample the row and the grid frame where its clip starts, None = a random one.
    Each sample: input uint8 (T, S, S, 3), or (T, F) or (F,) where features of a frozen backbone are
    given; mask (T,) of Study.mask; name; with an objective also target (K,) and weight.
    """

    def __init__(self, study, rows, presets=None, objective=None, features=None):
        self.study = study
        self.args = study.args
        self.presets = presets
        self.objective = objective
        self.features = features
        if presets is None:
            self.rows = [(row, start) for row in rows for start in study.starts(row)]
        else:
            self.rows = [(row, None) for row in rows]

    def __getitem__(self, key):
        epoch, index = key
        row, start = self.rows[index]
        generator = common.generator_for(self.args.seed, epoch, index)
        if self.features:
            views = self.features[row, start]
            inputs = views[torch.randint(len(views), (), generator=generator)]
            start = start or 0  # a random clip reads as many frames as the first one
        else:
            if start is None:  # anywhere on the grid, which reaches --jitter_sec outside the window
                last = max(len(self.study.audits[row].indices) - self.args.n_frames, 0)
                start = int(torch.randint(last + 1, (), generator=generator))
            inputs = self.pixels(row, start, generator)
        sample = {
            "input": torch.from_numpy(inputs),
            "mask": torch.from_numpy(self.study.mask(row, start)),
            "name": self.study.table.clip_ids[row],
        }
        if self.objective:
            sample["target"] = self.objective.target[row]
            sample["weight"] = self.objective.weight[row]
        return sample

    def pixels(self, row, start, generator):
        """Clip at `start`, uint8 (T, S, S, 3); black after the last frame of a sequence that is shorter."""
        length = self.args.n_frames
        size = self.args.image_size
        preset = "none" if self.presets is None else self.presets[row]
        drawn = common.sample_augmentation(preset, generator)
        frames = self.study.frames(row, start, start + length)
        clip = np.zeros((length, size, size, 3), np.uint8)
        clip[:len(frames)] = common.augment_clip(frames, drawn, size)
        return clip


# --- model and loss ----------------------------------------------------------------------

class Head(nn.Module):
    """(B, F) -> (B, K): dropout and a linear layer, whose outputs are put on the scale of the task.

    bounded: a sigmoid over the range from `offset` to `offset + span`. prior_shift,
    (K,): added to the logits outside training, where class balancing showed other
    class shares than the natural ones.
    """

    def __init__(self, n_features, n_outputs, dropout=0.0, bounded=False):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(n_features, n_outputs)
        self.bounded = bounded
        self.register_buffer("offset", torch.zeros(n_outputs))
        self.register_buffer("span", torch.ones(n_outputs))
        self.register_buffer("prior_shift", torch.zeros(n_outputs), persistent=False)

    def start_at(self, centre, offset, span):
        """Set the scale (K,) and a bias that gives `centre` (K,) where all features are 0."""
        self.offset.copy_(torch.as_tensor(offset))
        self.span.copy_(torch.as_tensor(span))
        scaled = (torch.as_tensor(centre, dtype=torch.float32) - self.offset) / self.span
        if self.bounded:
            scaled = torch.logit(scaled.clamp(0.01, 0.99))
        self.linear.bias.data = scaled

    def forward(self, features):
        with common.in_fp32(features):
            outputs = self.linear(self.dropout(features.float()))  # (B, F) -> (B, K)
            if self.bounded:
                outputs = torch.sigmoid(outputs)
            outputs = self.offset + self.span * outputs
            return outputs if self.training else outputs + self.prior_shift


class ClipNet(backbones.BackboneModel):
    """A torchvision video network over all frames at once: clips (B, T, 3, S, S) -> (B, K).

    of_head: dropout and bounded of the Head.
    """

    def __init__(self, backbone, n_features, n_outputs, freeze_norm=False, **of_head):
        super().__init__(backbone, freeze_norm)
        self.head = Head(n_features, n_outputs, **of_head)

    def extract(self, clips, mask):
        """Features of the backbone: (B, T, 3, S, S) -> (B, F), on a CPU in fp32; (B, F) stays as it is.

        In bf16 oneDNN's weight gradients of small 3-D convolutions read memory that was never
        written (torch 2.14).
        """
        if clips.ndim == 2:
            return clips
        with torch.autocast("cpu", enabled=False):
            return self.backbone(clips.transpose(1, 2))  # (B, 3, T, S, S) -> (B, F)

    def forward(self, clips, mask):
        # (B, T, 3, S, S) clips, or their features
        return self.head(self.extract(clips, mask))  # (B, F) -> (B, K)


class MotionReadout(ClipNet):
    """A linear layer on backbones.MotionFeatures: clips (B, T, 3, S, S), mask (B, T) -> (B, K).

    mask: True = a frame to read, which is real and does not repeat the one before.
    """

    def __init__(self, backbone, n_outputs, image_size):
        features = backbones.MotionFeatures(backbone, image_size)
        super().__init__(features, features.n_features, n_outputs)

    def frame_features(self, clips):
        """(B, T, 3, S, S) -> (B, T, 3, C)."""
        return self.backbone.frame_features(clips)

    def extract(self, clips, mask):
        """Clips (B, T, 3, S, S), their frame_features (B, T, 3, C), or features (B, F) as they are -> (B, F)."""
        if clips.ndim == 2:
            return clips
        if clips.ndim == 5:  # pixels
            n_frames = int(mask.any(0).nonzero().max()) + 1  # short clips are filled up at their end
            clips = self.frame_features(clips[:, :n_frames])
            mask = mask[:, :n_frames]
        return self.backbone.pool(clips, mask)


class FrameLstm(backbones.BackboneModel):
    """An image backbone frame by frame, then an LSTM: clips (B, T, 3, S, S), mask (B, T) -> (B, K).

    The mask stays on the CPU, where counting its frames waits for no device. of_head:
    dropout and bounded of the Head.
    """

    def __init__(self, backbone, n_features, n_outputs, hidden, freeze_norm=False, **of_head):
        super().__init__(backbone, freeze_norm)
        self.lstm = nn.LSTM(n_features, hidden, batch_first=True)
        self.head = Head(hidden, n_outputs, **of_head)

    def frame_features(self, clips):
        """(B, T, 3, S, S) -> (B, T, F)."""
        return self.backbone(clips.flatten(0, 1)).float().unflatten(0, clips.shape[:2])

    def extract(self, clips, mask):
        """frame_features of the real frames alone, 0 for the others: (B, T, 3, S, S) -> (B, T, F).

        Features (B, T, F) stay as they are. The black frames at the end of a short clip would
        change the statistics of a BatchNorm that is trained.
        """
        if clips.ndim == 3:
            return clips
        real = mask.flatten().nonzero()[:, 0].to(clips.device, non_blocking=True)
        pixels = clips.movedim(2, -1).flatten(0, 1)  # (B * T, S, S, 3): colours stay the last in memory
        features = self.backbone(pixels[real].movedim(-1, 1)).float()  # (frames, 3, S, S) -> (frames, F)
        everywhere = features.new_zeros(mask.numel(), features.shape[1])
        return everywhere.index_copy(0, real, features).unflatten(0, mask.shape)

    def forward(self, clips, mask):
        # (B, T, 3, S, S) clips, or (B, T, F) features of a frozen backbone
        features = self.extract(clips, mask)
        with common.in_fp32(features):
            states, _ = self.lstm(features)  # (B, T, F) -> (B, T, H)
        last = (mask.sum(1) - 1).to(features.device, non_blocking=True)  # (B,) index of the last real frame
        rows = torch.arange(states.shape[0], device=last.device)
        return self.head(states[rows, last])  # (B, H) -> (B, K)


def backbone_name(args):
    """The image network that reads frames one by one, or the video network."""
    return args.backbone if args.model in FRAME_MODELS else args.model


def build_model(args, n_outputs):
    """The network that the flags (or a checkpoint's) describe; the seed decides the random part."""
    torch.manual_seed(common.hash_seed(args.seed))
    size = args.image_size
    if args.model in FIXED_INPUT and (args.n_frames, size) != (16, 224):
        raise common.UserError(
            f"--model {args.model} needs --n_frames 16 --image_size 224, found {args.n_frames} and {size}")
    family = "models"
    shape = [1, 3, size, size]
    if args.model not in FRAME_MODELS:
        family = "video"
        shape.insert(2, args.n_frames)
    backbone, n_features = backbones.build_backbone(
        backbone_name(args), args.pretrained, args.weights, size, family)
    if args.model == MOTION_READOUT:
        return MotionReadout(backbone, n_outputs, size)
    backbones.freeze_stages(backbone, args.freeze_stages, torch.zeros(shape))
    shared = {"dropout": args.dropout, "bounded": args.bounded, "freeze_norm": args.freeze_norm}
    if args.model == CNN_LSTM:
        return FrameLstm(backbone, n_features, n_outputs, args.hidden, **shared)
    return ClipNet(backbone, n_features, n_outputs, **shared)


def pixel_statistics(args):
    """(mean, sd) of the three colours: of the checkpoint, or what the published weights of the network expect."""
    if "pixel_mean" in args:
        return args.pixel_mean, args.pixel_sd
    return backbones.pixel_statistics(backbone_name(args), args.weights)


class Objective:
    """What a task asks of the network: target (N, K), loss and metrics, fitted to the train rows.

    scale: (centre, offset, span), (K,) each, with which Head.start_at makes it predict what is
    usual in the train rows; meanings: {name that --select may use: MetricOf}, of which the first
    name of each is its column of the history; default_select.
    """
    sampler_weights = None  # a chance of being drawn for each of the epoch_rows; None: all alike
    prior_shift = 0.0  # what is to be added to the outputs of a network that was trained on the epoch_rows

    def __init__(self, args, table, train):
        self.args = args
        self.names = table.names
        self.epoch_rows = np.repeat(train, table.repeats[train])  # as often as the manifest repeats them
        weight = event_tables.sample_weights(table, args.sample_weight)
        self.weight = torch.from_numpy(weight).float()  # (N,) in the loss

    def check_val(self, rows):
        """UserError for --select, or for rows that it cannot choose an epoch by."""
        self.select()

    def select(self):
        """(column of the history that chooses the epoch, whether higher is better).

        Raises UserError.
        """
        return verdicts.select_column(self.args.select or self.default_select, self.meanings)


class Behaviours(Objective):
    """--task classify: C classes.

    The natural class shares are those of the train rows, each counted once. Rows that are repeated,
    drawn more often (--balance sampler: all classes alike) or weighted change the shares in
    training; prior_shift takes that back.
    """

    def __init__(self, args, table, train):
        super().__init__(args, table, train)
        self.label = table.label
        self.positive = prediction_tables.choose_positive(args.positive_class, self.names, self.label)
        self.positive_name = self.names[self.positive]
        lacking = self.classes_without(train)
        if lacking:
            raise common.UserError(f"no train row of class {lacking}; change the split or the label map")
        self.prior = np.bincount(self.label[train]) / len(train)  # (C,) natural class shares
        self.class_weight = calibrating.class_weights(args, self.prior, self.positive)
        self.scale = np.log(self.prior), 0, 1
        self.target = nn.functional.one_hot(torch.tensor(self.label)).float()  # (N, C)
        self.meanings = verdicts.spell_class_metrics(self.names)
        self.default_select = f"average_precision_{self.positive_name}"
        self.epoch_rows = self.boosted(self.epoch_rows)
        label = self.label[self.epoch_rows]
        counts = np.bincount(label)
        if args.balance == "sampler":
            self.sampler_weights = 1 / counts[label]
            counts = np.ones(len(counts))  # classes are drawn alike
        shares = counts * self.class_weight  # in training
        self.prior_shift = calibrating.prior_correction(self.prior, shares / shares.sum())  # (C,)

    def boosted(self, rows):
        """These rows, those of the positive class repeated up to --boost_to."""
        rare = rows[self.label[rows] == self.positive]
        n_others = len(rows) - len(rare)
        wanted = round(self.args.boost_to * n_others / (1 - self.args.boost_to))
        return np.concatenate([rows, np.resize(rare, max(0, wanted - len(rare)))])

    def classes_without(self, rows):
        """The names of the classes of which none of these rows is, as text."""
        return common.shorten_list(np.delete(self.names, self.label[rows]))

    def check_val(self, rows):
        """UserError where not even a perfect network has a value on these rows in the column that chooses the epoch."""
        column, _ = self.select()
        if column == "last":
            return
        name = column.removeprefix("val_")
        perfect = self.history(class_scores.log_of(self.target[rows].numpy()), rows)
        if math.isnan(perfect[name]):
            raise common.UserError(
                f"val holds no row of class {self.classes_without(rows)}, which --select {name} needs: make other "
                "groups (--seed, --val_ratio), or choose by --select last or loss")

    def loss(self, logits, target, weight):
        """Mean over the batch: logits and class shares (B, C), weights (B,) -> float tensor.

        Focal loss: Lin et al. 2017, with the probability of the target mixture.
        """
        error = nn.functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=self.args.label_smoothing)  # (B,)
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
        row = dict(found.overall)
        for (metric, name), column in verdicts.history_columns(self.meanings).items():
            if name is not None:  # else it is in `overall`
                row[column] = found.per_class[metric][self.names.index(name)]
        return row


class Scores(Objective):
    """--task regress: R scores, on the scale of the train rows."""
    positive_name = None
    meanings = verdicts.spell_metrics("loss mse mae r2 pearson_r".split())
    default_select = "loss"

    def __init__(self, args, table, train):
        super().__init__(args, table, train)
        self.values = table.target
        known = self.values[train]
        mean = common.mean_without_nan(known, axis=0)
        self.sd = common.sd_without_nan(known)
        varies = self.sd >= 1e-9  # False for NaN: no train row has the score
        if not varies.all():
            raise common.UserError(
                "the same score in every train row, or none, is nothing to learn: "
                f"{common.shorten_list(np.array(self.names)[~varies])}; leave it out with --target_columns")
        self.scale = mean, mean, self.sd
        if args.bounded:
            low = np.nanmin(known, axis=0)
            self.scale = mean, low, np.nanmax(known, axis=0) - low
        self.target = torch.tensor(self.values, dtype=torch.float32)  # (N, R), NaN = missing
        self.target_weight = score_tables.target_weights(args.target_weights, self.names)
        self.total, self.parts, _ = score_tables.total_and_parts(self.names, known)

    def loss(self, predicted, target, weight):
        """Mean over rows of each row's mean over its labelled scores.

        predicted, target: (B, R), weight: (B,); returns a float tensor. Errors are in sd; a missing
        score is NaN in target and does not count. Consistency: squared (total - sum of parts) in sd
        of the total, for every row, labelled or not.
        """
        sd = common.on_device(tuple(self.sd), predicted.device)
        error, labelled = common.labelled_errors(self.args.loss, predicted / sd, target / sd)
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
        found = common.mean_metrics(predicted, self.values[rows])
        predicted = torch.tensor(predicted, dtype=torch.float32)
        found["loss"] = self.loss(predicted, self.target[rows], self.weight[rows]).item()
        return {name: found[name] for name in self.meanings}


TASKS = {"classify": Behaviours, "regress": Scores}


# --- training ---------------------------------------------------------------------------

def make_loader(clips, compute, train=False, **options):
    """Loader of Clips; options: weights, batch_size."""
    is_cached = clips.study.store.cache == "ram" or clips.features is not None
    return common.make_loader(clips, clips.args, compute, train, is_cached, **options)


def make_loaders(study, split, objective, compute, features):
    """Loader of random train clips, and {part: loader} of the clips that are predicted.

    features: Features.of_clips, which are read instead of pixels, or None.
    """
    clips = Clips(study, objective.epoch_rows, study.presets, objective, features)
    train_loader = make_loader(clips, compute, train=True, weights=objective.sampler_weights)
    loaders = {part: make_loader(Clips(study, rows, features=features), compute)
               for part, rows in split.items() if len(rows)}
    return train_loader, loaders


def to_device(batch, args, compute):
    """Batch -> clips (B, T, 3, S, S) normalised, or features; mask (B, T), on the CPU."""
    clips = batch["input"]
    if clips.dtype == torch.uint8:
        # memory stays in the order B, T, S, S, 3: channels_last for pictures and clips alike
        frames = common.to_input(clips.flatten(0, 1), compute, *pixel_statistics(args))
        clips = frames.unflatten(0, clips.shape[:2])  # (B * T, 3, S, S) -> (B, T, 3, S, S)
    return compute.send(clips), batch["mask"]


def mix_up(clips, mask, target, weight, alpha):
    """mixup (Zhang et al. 2018): each clip and its target blended with another of the batch.

    A frame is real where one of the two has it.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(clips))
    places = order.to(clips.device, non_blocking=True)

    def blend(values):
        return share * values + (1 - share) * values[places]
    return blend(clips), mask | mask[order], blend(target), blend(weight)


def train_one_epoch(model, loader, objective, training, compute):
    """One pass over the train rows; returns {'train_loss': mean over the rows}."""
    args = training.args
    model.train()
    for batch in training.batches(loader):
        clips, mask = to_device(batch, args, compute)
        target = compute.send(batch["target"])
        weight = compute.send(batch["weight"])
        if args.mixup:
            clips, mask, target, weight = mix_up(clips, mask, target, weight, args.mixup)
        with compute.autocast():
            outputs = model(clips, mask)  # (B, T, 3, S, S) -> (B, K)
        training.step(objective.loss(outputs.float(), target, weight))
    return training.epoch_means()


def predict_batch(model, batch, args, compute):
    """Outputs (B, K) and features (B, F) on the CPU for the clips or features of a batch and their mask."""
    clips, mask = to_device(batch, args, compute)
    with compute.autocast():
        features = model.extract(clips, mask)  # (B, T, 3, S, S) -> (B, F) or (B, T, F)
        outputs = model(features, mask)  # -> (B, K)
    return outputs.float().cpu(), backbones.over_time(features, mask).float().cpu()


@torch.no_grad()
def evaluate(model, loader, compute):
    """Predict a whole split -> outputs (M, K) float64 and features (M, F).

    The outputs (logits, or scores) for the clips of a row are combined by
    --aggregation, its features by their mean.
    """
    model.eval()
    clips = loader.dataset
    found = [predict_batch(model, batch, clips.args, compute) for batch in loader]
    outputs, features = map(torch.cat, zip(*compute.processes.gather(found)))  # (clips, K), (clips, F)
    return (class_scores.combine_clips(outputs.double().numpy(), clips.rows, clips.args.aggregation),
            class_scores.combine_clips(features.numpy(), clips.rows, "mean"))


def start_model(args, names):
    """The network for these classes or scores before its first step, with the weights of --init_from, if any."""
    model = build_model(args, len(names))
    if args.init_from:
        backbones.start_from(model, args.init_from, args.freeze_backbone, names=names, bounded=args.bounded)
    return model


def fit(run, args, study, split, features):
    """Train on split['train'], choose the epoch on split['val'].

    Returns the common.Training, the objective, and the outputs of finish_best_model.
    """
    compute = run.compute
    train = split["train"]
    objective = TASKS[args.task](args, study.table, train)
    column, higher_is_better = objective.select()
    train_loader, loaders = make_loaders(study, split, objective, compute, features.of_clips)
    if not args.freeze_backbone:  # else it trains on features, which are no pictures
        plotting.plot_batch(run, train_loader.dataset, study.labels(objective.epoch_rows))
    model = start_model(args, objective.names)
    if args.model != MOTION_READOUT:  # which is solved from each row once, at the natural class shares
        if not args.init_from:
            model.head.start_at(*objective.scale)
        model.head.prior_shift.copy_(torch.as_tensor(objective.prior_shift))
    model = compute.place(model)
    model.freeze_backbone(args.freeze_backbone)
    mean, sd = pixel_statistics(args)
    run.say(f"{args.model}: colours are normalised with mean {mean} and SD {sd}, as its published weights expect")
    optimizer = common.build_optimizer(model, args, model.backbone)
    training = common.Training(
        run, model, optimizer, args,
        select=column,
        metadata=model_metadata(args, study, objective, model),
        higher_is_better=higher_is_better,
        seen=seen_rows.of_run(args, study.hashes, split))
    for _ in training.epochs():
        if args.model == MOTION_READOUT:
            solve_head(model, study, train, features, run.say)
            outputs, _ = evaluate(model, loaders["train"], compute)
            row = {"train_loss": objective.history(outputs, train)["loss"]}
        else:
            row = train_one_epoch(model, train_loader, objective, training, compute)
        outputs, _ = evaluate(model, loaders["val"], compute)
        found = objective.history(outputs, split["val"])
        row |= {f"val_{name}": value for name, value in found.items()}
        training.end_epoch(row)
    return training, objective, finish_best_model(training, study, split, loaders, objective)


def finish_best_model(training, study, split, loaders, objective):
    """Predict each part with the best epoch, and add to best_model.pth what is known only then.

    It is what its training data are like, for row_warnings, and of classes the calibration on val.
    Returns {part: outputs (M, K)}, which are scores, or logits at the natural class shares.
    """
    run = training.run
    best = training.load_best()
    outputs = {}
    features = {}
    for part, loader in loaders.items():
        outputs[part], features[part] = evaluate(training.model, loader, run.compute)
    scores = study.table.target
    known_scores = None if scores is None else scores[split["train"]]
    best["known_data"] = row_warnings.known_data(features["train"], features["val"], known_scores)
    if scores is None:
        val = split["val"]
        best["calibration"] = calibrating.calibrate(outputs["val"], objective.label[val], objective.positive)
        best["seen"] = training.seen.plus(seen_rows.SeenRows(fitted=[], chose=study.hashes[val]))
        common.write_json(run.path("calibration.json"), best["calibration"])
    training.save_model(best)
    return outputs


def fit_readout(study, rows, features, name):
    """baseline_models.Readout of these rows, the linear model of this name."""
    table = study.table
    n_classes = None if table.label is None else len(table.names)
    values = features.of_rows[name][rows]
    blocks = backbones.motion_blocks(values.shape[1]) if name == MOTION_READOUT else None
    return baseline_models.fit_readout(values, table.truth[rows], table.groups_of(rows), n_classes, blocks)


def solve_head(model, study, rows, features, say):
    """Put the readout that these rows give into the linear layer of a MotionReadout."""
    readout = fit_readout(study, rows, features, MOTION_READOUT)
    chosen = readout.blocks  # one for all classes
    if study.table.label is None:
        chosen = [f"{name} {block}" for name, block in zip(study.table.names, chosen)]
    say(f"features by the inner folds: {', '.join(chosen)}")
    readout.write_into(model.head.linear)  # in the unit of the task: offset 0 and span 1 stay


def model_metadata(args, study, objective, model):
    """What predict needs beside the weights: architecture, names, prior shift."""
    architecture = {name: getattr(args, name) for name in ARCHITECTURE}
    architecture["pixel_mean"], architecture["pixel_sd"] = pixel_statistics(args)
    architecture["pixel_range"] = study.store.pixel_range
    return {
        "architecture": architecture,
        "names": objective.names,
        "positive": objective.positive_name,
        "prior_shift": model.head.prior_shift.tolist(),
    }


@torch.no_grad()
def extract_features(network, clips, n_views, compute):
    """Features.of_clips: what an untuned backbone makes of every clip, of random ones n_views times."""
    network.eval()
    loader = make_loader(clips, compute, batch_size=16)
    views = []
    for view in range(n_views):
        loader.batch_sampler.epoch = view
        found = []
        for batch in loader:
            inputs, mask = to_device(batch, clips.args, compute)
            with compute.autocast():
                found.append(network.extract(inputs, mask).float().cpu())
        views.append(torch.cat(compute.processes.gather(found)).numpy())  # (clips, F) or (clips, T, F)
    return dict(zip(clips.rows, zip(*views)))  # of each clip all its views


def features_of_rows(network, study, rows, compute, of_clips=None):
    """(N, F) of Features.of_rows: what evaluate makes of the clips of these rows, or of of_clips, their features."""
    loader = make_loader(Clips(study, rows, features=of_clips), compute, batch_size=16)
    _, found = evaluate(network, loader, compute)  # (M, F)
    features = np.full((len(study.table), found.shape[1]), np.nan, found.dtype)
    features[rows] = found
    return features


def untuned_features(args, study, run, rows):
    """Features of these rows from networks before any tuning: for the baselines, and where the backbone is frozen."""
    compute = run.compute
    table = study.table
    network = compute.place(build_model(args, len(table.names)))
    of_clips = None
    if args.freeze_backbone:
        of_clips = extract_features(network, Clips(study, rows), 1, compute)
    own = features_of_rows(network, study, rows, compute, of_clips)
    linear_model = "ridge" if table.label is None else "logistic"
    if args.model == MOTION_READOUT:
        return Features({linear_model: own[:, network.backbone.last_resolution()], MOTION_READOUT: own}, of_clips)
    of_rows = {linear_model: own}
    try:
        of_rows[MOTION_READOUT] = motion_features(args, study, compute, rows)
    except common.UserError as error:  # its image network, or the weights of that, cannot be had
        run.say(f"note: no motion readout to compare with: {error}")
    if args.freeze_backbone:
        of_clips |= extract_features(network, Clips(study, rows, study.presets), args.feature_views, compute)
    return Features(of_rows, of_clips)


def motion_features(args, study, compute, rows):
    """(N, F) of the motion readout, which any other model is compared with."""
    weights = args.weights if args.model == CNN_LSTM else None  # of other models they fit another backbone
    args = common.with_flags(args, model=MOTION_READOUT, weights=weights)
    network = compute.place(build_model(args, len(study.table.names)))
    return features_of_rows(network, dataclasses.replace(study, args=args), rows, compute)


# --- results: predictions table -> judged run folder -------------------------------------------

def predict_baselines(study, features, train, rows):
    """{name: (M, K)} predictions without training a network.

    The class shares or means of the train rows; a linear model on the untuned network's features;
    the motion readout, unless it is the model.
    """
    table = study.table
    is_classes = table.label is not None
    if is_classes:
        predicted = {"train_prior": baseline_models.prior_baseline(table.label[train], len(rows), len(table.names))}
    else:
        predicted = {"train_mean": baseline_models.train_mean_baseline(table.target[train], len(rows))}
    for name, values in features.of_rows.items():
        if name != study.args.model:
            outputs = fit_readout(study, train, features, name).predict(values[rows])
            predicted[name] = class_scores.softmax(outputs) if is_classes else outputs
    moments = moment_levels(study.args, table)
    if len(moments) and not is_classes:
        predicted["moment_mean"] = confounding.smoothed_means(moments, table.target, train, rows)
    return predicted


def moment_levels(args, table, rows=slice(None)):
    """(M,) levels of --moment_column in these rows, as most rows spell them; () where the table has no such column."""
    key = csv_tables.column_key(args.moment_column)
    if key not in table.extra:
        return ()
    cells = table.extra[key]
    levels = cells.map(event_tables.plain_level)
    return cells.groupby(levels).transform(lambda same: same.mode()[0]).to_numpy(str)[rows]


def predictions_table(study, rows, outputs, baselines, seen):
    """ScoreTable of scores (M, R), or ClassTable of logits (M, C) at the natural class shares.

    baselines: {name: (M, K) scores or probabilities}; seen: (M,) of seen_rows.WORDS.
    """
    table = study.table
    own = table.take(rows)
    keys = {"clip_id": own.clip_ids}
    if own.target is None:
        keys["event"] = own.events
        keys["n_clips"] = np.array([len(study.starts(row)) for row in rows])
    keys["video"] = own.sources.astype(str)
    keys["start_sec"], keys["end_sec"] = own.windows.T
    shared = {
        "keys": keys,
        "names": table.names,
        "truth": own.truth,
        "baselines": baselines,
        "groups": table.groups_of(rows),
        "seen": seen,
    }
    if own.target is not None:
        return prediction_tables.ScoreTable(predicted=outputs, **shared)
    return prediction_tables.ClassTable(
        positive=prediction_tables.choose_positive(study.args.positive_class, table.names, table.label),
        probability=class_scores.softmax(outputs),
        logits=outputs,
        **shared)


@common.first_process_only
def judge(run, study, split, table, part, trained_on, similar, **known):
    """Judge a predictions table of held-out rows.

    split: {name: rows}; part: val, test or folds; trained_on: a pair (train rows, scored rows) for
    each network; similar: of splitting.add_similar; known: further fields of the Setting.
    """
    manifest = study.table
    rows = table.rows_of(manifest.clip_ids)
    is_classes = manifest.target is None
    confounds = confounding.level_priors(
        confounding.prior_levels(manifest), manifest.truth, *zip(*trained_on), manifest.groups_of(), table.positive)
    setting = judging.Setting(
        title="Behaviour in clips" if is_classes else "Scores of frame sequences",
        part=part,
        seen=table.seen,
        data=data_blocks(study, split, rows, table),
        similar=judging.similar_blocks(similar, manifest.clip_ids, study.strip),
        is_similar=np.isin(rows, similar),
        cases=[reporting.html_text("A clip is shown by five of its frames, evenly from its first to its last."),
               *judging.case_blocks(table, lambda i: study.strip(rows[i]))],
        limits=event_splits.limits(study.args, manifest),
        **known)
    if is_classes:
        class_judging.judge_classes(run, table, setting, confounds, rows)
        return
    ceiling = None
    if manifest.single_ratings is not None:
        by_target = {name: [each[:, r] for each in manifest.single_ratings] for r, name in enumerate(manifest.names)}
        ceiling = rater_agreement.measure_ceiling(manifest.names, manifest.target, single_ratings=by_target)
    score_judging.judge_scores(
        run, table, setting, ceiling, confounds, rows, moment_levels(study.args, manifest, rows))


def data_blocks(study, split, rows, table):
    """HTML of the section Data and split."""
    sizes = [
        {"part": part, "rows": len(held), **event_audit.count_classes(study.table.take(held))}
        for part, held in split.items()]
    return [
        judging.rows_text(table),
        reporting.html_text(f"{len(set(study.table.events[rows]))} events; {len(study.skipped)} rows skipped."),
        reporting.html_table(sizes)]


# --- one run, or one run per fold -------------------------------------------------------------

def run_split(run, args, study, split, features=None):
    """Train on one split and judge its held-out rows: test where there is one, else val."""
    alarms = event_audit.record_split(run, study, split)
    split = splitting.rows_to_try(split, args, study.table.truth)
    run.write_record(study, split)
    if features is None:
        features = untuned_features(args, study, run, np.sort(np.concatenate(list(split.values()))))
    similar = splitting.add_similar(run, features.last_resolution, split, study.table.clip_ids)
    training, objective, outputs = fit(run, args, study, split, features)
    # of window and pixels alone: the middle of a row may be that of another event of the same second
    own_hashes = study.hashes[:, [0, -1]]
    seen = seen_rows.of_run(args, own_hashes, split).words(study.hashes)  # (N,)
    tables = {}
    for part in ("val", "test"):
        rows = split[part]
        if len(rows):
            baselines = predict_baselines(study, features, split["train"], rows)
            table = predictions_table(study, rows, outputs[part], baselines, seen[rows])
            if part == "test" and args.task == "classify":  # val cannot calibrate itself
                table = calibrating.calibrate_on(table, [tables["val"]])
            table.write(run.path(f"predictions_{part}.csv"))
            tables[part] = table
    best_epoch = training.progress.best_epoch
    history = verdicts.history_to_plot(training.progress.history, objective.meanings, objective.positive_name)
    plotting.plot_history(history, run.path("training_history.png"), best_epoch)
    if args.model != MOTION_READOUT:  # a solved readout always fits its own rows better
        train, val = (objective.history(outputs[part], split[part]) for part in ("train", "val"))
        metric = "roc_auc" if args.task == "classify" else "pearson_r"
        alarms += verdicts.split_gap_alarms(train, val, OVERFITTING_REMEDY, metric)
    part = "test" if "test" in tables else "val"
    judge(run, study, split, tables[part], part, [(split["train"], split[part])],
          alarms=alarms, similar=similar, best_epoch=best_epoch)


def run_folds(run, args, study):
    """One run per fold in fold_K/, all judged as one; their mean on the test groups."""
    manifest = study.table
    folds = event_splits.make_folds(args, manifest)
    test = folds[0]["test"]
    parts = {f"fold_{k}": fold["val"] for k, fold in enumerate(folds)}
    if len(test):
        parts["test"] = test
    alarms = event_audit.record_split(run, study, parts)
    run.write_record(study, parts)
    features = untuned_features(args, study, run, np.arange(len(manifest)))
    similar = splitting.add_similar(run, features.last_resolution, parts, manifest.clip_ids)
    chosen = run.each_fold(
        folds, lambda child, split: run_split(child, args, study, split, features))
    tables = prediction_tables.read_folds(run, chosen, "val")
    if args.task == "regress":
        rows = []
        for k, table in zip(chosen, tables):
            moments = moment_levels(args, manifest, table.rows_of(manifest.clip_ids))
            rows += [{"fold": k, **row} for row in score_judging.rows_of_scores(table, moments)]
        common.write_table(run.path("fold_scores.csv"), rows)
    done = judging.finished_folds(run, chosen, [table.fold_numbers() for table in tables])
    if args.task == "classify" and len(tables) > 1:
        tables = calibrating.calibrate_folds(tables)
    pooled = prediction_tables.join(tables, chosen)
    pooled.write(run.path("predictions_folds.csv"))
    trained_on = [(folds[k]["train"], folds[k]["val"]) for k in chosen]
    if len(test):
        members = prediction_tables.read_folds(run, chosen, "test")
        with run.child("test_ensemble") as child:
            judge_ensemble(child, study, features, test, prediction_tables.mean(members))
    # last: with its metrics the run is finished
    judge(run, study, parts, pooled, "folds", trained_on, alarms=alarms, similar=similar, folds=done)


def judge_ensemble(run, study, features, test, table):
    """Judge the mean of all folds' models on the test groups, which none of them has seen."""
    train = np.setdiff1d(np.arange(len(study.table)), test)
    split = {"train": train, "test": test}
    alarms = event_audit.record_split(run, study, split)
    similar = splitting.add_similar(run, features.last_resolution, split, study.table.clip_ids)
    table.write(run.path("predictions_test.csv"))
    judge(run, study, split, table, "test", [(train, test)], alarms=alarms, similar=similar)


def train(args):
    """--mode train: one split, or all folds."""
    is_lstm = args.model == CNN_LSTM  # which alone is in mixed precision on CPUs, and skips what fills a clip up
    with common.start_run(args, fp32_on_cpu=not is_lstm, fixed_shapes=not is_lstm) as run:
        table = read_table(args)
        start_model(args, table.names)  # wrong weights stop here, before videos are decoded
        check_flags_of_table(args, table)
        study = load_study(args, table, run.say)
        check_flags_of_table(args, study.table)  # of which rows may have been left out
        if args.folds or args.cv_file:
            run_folds(run, args, study)
        else:
            run_split(run, args, study, event_splits.make_split(args, study.table))


def check_flags_of_table(args, table):
    """UserError for flags that name what these rows do not have, and for splits that lack a class they need."""
    meanings = class_judging.criteria_names(table.names)
    if args.task == "regress":
        if "moment_column" in args.given:
            event_tables.column_of(table, args.moment_column, "--moment_column")
        meanings = score_judging.criteria_names(table.names, moment_levels(args, table))
    verdicts.parse_criteria(args.criteria, meanings)
    for split in event_splits.asked_splits(args, table):
        TASKS[args.task](args, table, split["train"]).check_val(split["val"])
    event_tables.augment_presets(table, args.augment_for, args.augment)


# --- the other modes -------------------------------------------------------------------------

@dataclasses.dataclass
class Member:
    """One of the trained networks whose mean is predicted."""
    model: nn.Module  # in evaluation mode
    content: dict  # of its checkpoint
    args: argparse.Namespace  # as typed, with its architecture

    @property
    def calibration(self):
        """{temperature, threshold} of classes; {}: a top_epoch_N.pth has none."""
        return self.content.get("calibration", {})

    def finish(self, outputs):
        """What the network gives (B, K) -> probabilities after its calibration, or scores."""
        if self.args.task == "regress":
            return outputs
        return torch.softmax(outputs / self.calibration.get("temperature", 1.0), 1)

    def predict_pixels(self, pixels, mask=None):
        """uint8 clips (B, T, S, S, 3) -> finished (B, K), for a file of its own.

        mask: (B, T), of networks that read frames one by one.
        """
        clips = exporting.normalise(pixels, *pixel_statistics(self.args))  # (B, T, 3, S, S)
        if mask is not None:
            clips = self.model.frame_features(clips)
        return self.finish(self.model(clips, mask))

    def predict(self, batch, compute):
        """Finished (B, K), float64, for the clips or features of a batch and their mask."""
        outputs, _ = predict_batch(self.model, batch, self.args, compute)
        return self.finish(outputs.double()).numpy()


def load_member(path, args):
    """Member of a checkpoint, on the CPU; what it says of clips and network wins over flags that were not typed."""
    content = common.load_model_file(path)
    typed = {name: getattr(args, name) for name in OWN_OF_PREDICT if name in args.given}
    with common.checkpoint_fields(path):
        own = common.with_flags(
            args, **content["architecture"] | typed,
            pretrained=False, names=content["names"], positive_class=content.get("positive"))
        model = build_model(own, len(content["names"]))
    common.load_state(model, content["model"], path)
    model.head.prior_shift.copy_(torch.tensor(content.get("prior_shift", 0.0)))
    return Member(model.eval(), content, own)


def load_members(args):
    """--checkpoint -> list of Member. Raises UserError where they differ in what a mean needs."""
    files = common.checkpoint_files(args.checkpoint)
    members = [load_member(path, args) for path in files]
    first = members[0]
    for path, member in zip(files, members):
        for name in ("task", "names", "positive_class", "min_event_sec", *READING):
            found = getattr(member.args, name)
            wanted = getattr(first.args, name)
            if found != wanted:
                raise common.UserError(
                    f"members of one mean must agree: {path} has {name} {found}, {files[0]} {wanted}")
        if backbones.is_same(member.model.backbone, first.model.backbone):
            member.model.backbone = first.model.backbone  # of frozen folds: its features count for all
    return members


def all_in_fp32(members):
    """True where none of these models was trained in mixed precision on a CPU."""
    return all(member.args.model != CNN_LSTM for member in members)


def predict(args):
    """--mode predict: one row for each row of the manifest; the mean over the checkpoints."""
    if args.video:
        return predict_recordings(args)
    members = load_members(args)
    args = members[0].args
    compute = common.announce_compute(args, fp32_on_cpu=all_in_fp32(members))
    study = load_study(args, read_table(args, args.names, need_labels=False), print)
    tables, answers = zip(*[predict_rows(member, study, compute) for member in members])
    table = prediction_tables.mean(tables)
    table.warning = row_warnings.texts(answers, table.seen, "clips", print)
    output = args.output or Path("predictions.csv")
    table.write(output)
    print(f"{len(study.table)} rows predicted by {len(members)} checkpoint(s), "
          f"{len(study.skipped)} rows skipped; written to {output}")
    seen_rows.say_notes(table.seen, print)
    for entry in study.skipped:
        print(f"skipped: {entry['row']}, {entry['video']}: {entry['reason']}")
    if args.export:
        export(args.export, members, study)


def predict_rows(member, study, compute):
    """(predictions table of all rows of the study by one trained network, what row_warnings.texts takes of it)."""
    study = dataclasses.replace(study, args=member.args)
    rows = np.arange(len(study.table))
    model = compute.place(member.model)
    outputs, features = evaluate(model, make_loader(Clips(study, rows), compute), compute)
    seen = seen_rows.of_checkpoint(member.content).words(study.hashes)
    table = predictions_table(study, rows, outputs, {}, seen)
    if member.calibration:
        table = calibrating.apply_calibration(table, member.calibration)
    return table, (member.content, features, outputs)


def export(path, members, study):
    """Write the mean of the members as one file, compared with this script on the first ten clips of the study."""
    first = members[0]
    args = first.args
    if len({member.args.model for member in members}) > 1:
        raise common.UserError(f"--export {path}: the checkpoints are of different --model; export those of one")
    clips = Clips(study, np.arange(len(study.table)))
    batch = torch.utils.data.default_collate([clips[0, i] for i in range(min(len(clips), 10))])
    inputs = {"clips": batch["input"]}
    if args.model in FRAME_MODELS:
        inputs["mask"] = batch["mask"]
    about = exporting.about_pictures(first.content["names"], args.image_size, args.pixel_range)
    about |= {"task": args.task, "frames": args.n_frames}
    if args.task == "classify":
        about |= {
            "frames_per_sec": args.fps,
            "clip_sec": args.n_frames / args.fps,
            "threshold": calibrating.mean_threshold(member.calibration for member in members),
            "positive_class": args.positive_class,
        }

    def answer(member, compute):
        return torch.from_numpy(member.predict(batch, compute))
    exporting.export(path, members, answer, inputs, about, first.model.head.span.cpu())


# --- whole recordings --------------------------------------------------------------------------

def predict_recordings(args):
    """--mode predict --video: windows, bouts and ethogram of each recording, in a run folder."""
    videos = video_files.find_recordings(args.video)
    members = load_members(args)
    own = members[0].args
    if own.task != "classify":
        raise common.UserError("--video needs checkpoints of --task classify: a sequence of "
                               "scores has no window of its own")
    with common.start_run(args, fp32_on_cpu=all_in_fp32(members)) as run:
        run.write_args(fps=own.fps)
        step = max(round(own.every * own.fps), 1)  # frames from one window to the next
        if not math.isclose(step / own.fps, own.every):
            run.say(f"note: --every {own.every:g} is {step / own.fps:g} s, on the grid of {own.fps:g} frames a second")
        read = []
        for name, path in videos.items():
            try:
                recording = video_files.Recording(
                    path, own.fps, common.resize_side(own.image_size), own.pixel_range)
                windows = read_windows(recording, members, step, run.compute, name)
            except common.UserError as error:
                run.say(f"skipped: {name}: {common.one_line(error)}")
                continue
            for loss in recording.losses():
                run.say(f"note: {loss}")
            folder = run.path("_".join(name.rsplit(".", 1)))  # pen 1/a.mp4 -> pen 1/a_mp4, beside that of a.avi
            read.append(ethograms.write_recording(recording, windows, own.names, args, folder))
            ethograms.write_tables(run.folder, read)
        if not read:
            raise common.UserError(f"no recording in {args.video} could be read, for the reasons above")
        common.write_json(run.path("metrics.json"), {"part": "predict", "recordings": len(read)})
        n_bouts = sum(len(tables["bouts"]) for tables in read)
        run.say(f"{len(read)} of {len(videos)} recordings read, {n_bouts} bouts; open next: {run.folder}")


@torch.no_grad()
def read_windows(recording, members, step, compute, label):
    """ethograms.Windows of a recording: one every `step` frames of its grid, the last at its end.

    label: of the progress bar.
    """
    own = members[0].args
    for member in members:
        compute.place(member.model)
    by_backbone = {member.model.backbone: member for member in members if member.args.model in FRAME_MODELS}

    def frame_features(crops):
        """{backbone: its features of all frames but the first}, of networks that read frames one by one."""
        features = {}
        for backbone, member in by_backbone.items():
            clips, _ = to_device({"input": crops[None], "mask": None}, member.args, compute)
            with compute.autocast():
                features[backbone] = member.model.frame_features(clips)[0, 1:]
        return features
    grid = common.with_progress(
        label, recording.grid(own.n_frames), math.ceil(recording.expected_sec * own.fps))
    starts = []
    found = []
    for places, frames in sliding_windows.slide(
            grid, own.n_frames, step, own.val_batch_size, own.image_size, frame_features):
        starts += places
        found.append(np.mean([predict_windows(member, frames, compute) for member in members], axis=0))
    probability = np.concatenate(found)  # (W, C)
    threshold = calibrating.mean_threshold(member.calibration for member in members)
    chosen = class_scores.predicted_class(probability, threshold, own.names.index(own.positive_class))
    return ethograms.Windows(recording.spans(starts, own.n_frames), probability, chosen)


def predict_windows(member, frames, compute):
    """Probabilities (B, C) of B windows by one network.

    frames: of sliding_windows.slide, pixels and is_new (B, T, ...), and under each
    backbone its features of them.
    """
    mask = torch.ones_like(frames["is_new"])
    if member.args.model == MOTION_READOUT:  # as Study.mask: the first frame counts, others where they are new
        mask[:, 1:] = frames["is_new"][:, 1:]
    clips = frames.get(member.model.backbone, frames["pixels"])
    return member.predict({"input": clips, "mask": mask}, compute)


def judge_bouts(args):
    """--mode judge_bouts: the bouts of predict --video against a table of events, whose frames have its rate."""
    data = common.read_or_warn(args.predictions / "args.json").get("data", {})
    if "fps" not in args.given and "fps" in data:  # a training run has none, and is refused below
        args = common.with_flags(args, fps=data["fps"])
    ethograms.judge_folder(args.predictions, lambda names: read_table(args, names), args.output)


def judge_predictions(args):
    """--mode evaluate: a short way to judge_predictions.py, for one table of predictions."""
    table = table_judging.read_table(args.predictions, args)
    with common.start_run(args) as run:
        run.write_args(predictions=args.predictions)
        metrics = table_judging.judge_table(run, table, args.predictions)
        if args.output:
            common.write_json(args.output, metrics)


def audit(args):
    """--mode audit: what the parts share, bad windows, and labels that metadata predict."""
    table = read_table(args)
    report = event_audit.audit_videos(
        table, args.fps, predictions=args.predictions, positive=args.positive_class,
        gap_sec=args.gap_sec)
    output = args.output or Path("audit.json")
    common.write_json(output, report)
    print(splitting.leakage_text(report))
    print(f"{len(table.skipped)} rows skipped; written to {output}")


MODES = {"train": train, "predict": predict, "evaluate": judge_predictions, "audit": audit,
         "judge_bouts": judge_bouts}


def main():
    args = parse_args()
    MODES[args.mode](args)


if __name__ == "__main__":
    common.run_main(main)
