"""Train a network that watches a clip and names the behaviour in it, or scores a sequence of frames.

    python train_video.py --config configs/video_intravideo.yaml --video_root videos
    python train_video.py --manifest events.csv --video_root videos --dry_run
    python train_video.py --mode predict --checkpoint outputs/run_X --manifest new.csv --video_root videos
    python train_video.py --mode evaluate --predictions predictions.csv --output metrics.json
    python train_video.py --mode audit --train_manifest a.csv --val_manifest b.csv --test_manifest c.csv
    python train_video.py --task regress --config configs/pain_scores.yaml --folds 9 --group_column animal

Writes outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), best_model.pth, metrics.json, predictions_val.csv (and
_test), training_history.csv and .png, splits.json, leakage_report.json, the plots of the task, args.json,
log.txt. With --folds K the same in each fold_K/, pooled above them.

Letters: N clips, M clips scored, B batch, T frames of a clip, G frames of its time grid, C classes, R scores, K outputs
(C or R), F features, V views, S side of the input in pixels.
Units: seconds from the start of a file; scores in the unit of their table; pixels are uint8 RGB until the device.
"""
import argparse
import collections
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common
from evidence import baseline_models, calibrating, confounding, event_audit, plotting, prediction_tables, rater_agreement, reporting, splitting, subject_intervals, verdicts
from readers import csv_tables, event_tables, score_tables, video_files

MODES = ("train", "predict", "evaluate", "audit")
KINETICS_MEAN, KINETICS_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
ONLY_FRAMES = "cnn_lstm"  # the one --model that sees frames one by one
FIXED_INPUT = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}  # frames, pixels
# what a checkpoint keeps of the flags: all that decides how a clip is read and what the network looks like
ARCHITECTURE = ("task", "model", "backbone", "hidden", "dropout", "bounded", "image_size", "n_frames", "fps",
                "clips_per_event", "aggregation", "min_event_sec")
UNCALIBRATED = {"temperature": 1.0, "threshold": None}  # of top_epoch_N.pth: the most probable class is chosen
TASK_DEFAULTS = {
    "classify": {"model": "r3d_18", "n_frames": 16, "epochs": 30, "batch_size": 4, "val_batch_size": 8, "lr": 5e-5,
                 "weight_decay": 0.05, "scheduler": "cosine", "warmup_epochs": 2.0, "min_lr": 1e-6, "clip_grad": 1.0,
                 "patience": 10, "min_delta": 0.0, "min_epochs": 0, "augment": "heavy", "loss": "ce"},
    "regress": {"model": ONLY_FRAMES, "n_frames": 32, "epochs": 50, "batch_size": 64, "val_batch_size": 64, "lr": 5e-5,
                "weight_decay": 1e-4, "scheduler": "plateau", "warmup_epochs": 0.0, "min_lr": 1e-7, "clip_grad": 0.5,
                "patience": 15, "min_delta": 1e-4, "min_epochs": 5, "augment": "basic", "loss": "mse",
                "select": "loss"}}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    by_task = dict.fromkeys([*TASK_DEFAULTS["classify"], *TASK_DEFAULTS["regress"]])
    common.add_shared_arguments(parser, plateau_patience=7, on_bad_file="skip")
    job = parser.add_argument_group("job").add_argument
    job("--task", choices=("classify", "regress"), default="classify",
        help="a class for each event, or scores for each sequence; it also sets the defaults of training")
    job("--mode", choices=MODES, default="train", help="evaluate needs no video, audit no model")
    job("--checkpoint", type=Path, nargs="+", help="predict: best_model.pth files or run folders; several are averaged")
    job("--predictions", type=Path, help="evaluate, audit: a predictions CSV of this script")
    job("--output", type=Path, help="file that predict (.csv), evaluate or audit (.json) writes")
    add_clip_arguments(parser.add_argument_group("clips and labels").add_argument)
    add_model_arguments(parser.add_argument_group("model").add_argument)
    add_learning_arguments(parser.add_argument_group("learning").add_argument)
    parser.set_defaults(**by_task)
    args = common.parse_arguments(parser, argv)
    for name, value in TASK_DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_flags(parser, args)
    return args


def add_clip_arguments(data):
    """Where the clips are, what is asked of them, and how they are cut from their videos."""
    data("--manifest", type=Path, help="table of events or sequences (CSV, JSON), or a folder of class folders")
    for part in ("train", "val", "test"):
        data(f"--{part}_manifest", type=Path, help=f"events of the {part} part, instead of a split made here")
    data("--video_root", type=Path, help="folder that holds the videos, whatever folders the manifest names")
    data("--label_map", type=Path, help="file of spelling -> class (JSON, YAML, CSV); a blank class leaves the row out")
    data("--target_columns", nargs="+", metavar="NAME", help="scores to learn (default: all numeric columns)")
    data("--split_by", choices=("event", "video", "group"), help="what a split never cuts (default: the coarsest)")
    data("--filter", help='rows to use, e.g. "moment==M2 and age>=3"')
    data("--min_event_sec", type=common.bounded(float, 0), default=1.0, help="shorter events get a window so long")
    data("--max_missing", type=common.bounded(float, 0, 1), default=0.05, help="share of unreadable videos allowed")
    data("--gap_sec", type=common.bounded(float, 0), default=30.0, help="windows of a video closer than this are told")
    data("--cv_file", type=Path, help="folds of a study: cv_folds with train_animals and val_animals")
    data("--test_groups", help="groups kept for the test, e.g. 14,17; all folds predict them, as an ensemble too")
    data("--moment_column", default="moment", help="regress: column whose levels get rows of their own in the tables")
    data("--fps", type=common.bounded(float, 0.1, 240), default=12.0, help="classify: frames per second of a clip")
    data("--n_frames", type=common.bounded(int, 1), help="frames of a clip (classify 16), at most of a sequence (32)")
    data("--image_size", type=common.bounded(int, 32), default=112, help="side of the input in pixels")
    data("--jitter_sec", type=common.bounded(float, 0), default=0.0, help="training clips may start so much off")
    data("--clips_per_event", type=common.bounded(int, 1), default=5, help="classify: clips scored and averaged")
    data("--aggregation", choices=("mean", "max"), default="mean", help="of the outputs of an event's clips")


def add_model_arguments(model):
    """The network and which parts of it are trained."""
    model("--model", help="a torchvision video network (r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v2_s, swin3d_t), which "
                          f"computes in fp32 on CPUs, or {ONLY_FRAMES}: an image backbone frame by frame, then an LSTM")
    model("--backbone", default="resnet18", help=f"image network of {ONLY_FRAMES}")
    model("--hidden", type=common.bounded(int, 1), default=256, help=f"width of the LSTM of {ONLY_FRAMES}")
    model("--dropout", type=common.bounded(float, 0, 0.95), default=0.5, help="before the last layer")
    model("--bounded", action="store_true", help="regress: hold the scores to the range of the train rows")
    model("--freeze_stages", type=common.bounded(int, 0), default=0, help="first resolutions that are not trained")
    model("--freeze_norm", action="store_true", help="keep the BatchNorm statistics: steadier on few clips")
    model("--freeze_backbone", action="store_true", help="train the rest alone, on features computed once")
    model("--feature_views", type=common.bounded(int, 1), default=4, help="with --freeze_backbone: random views a clip")
    model("--backbone_lr_mult", type=common.bounded(float, 0), default=1.0, help="backbone learning rate over --lr")


def add_learning_arguments(learn):
    """Loss, imbalance, weights and the choice of the epoch."""
    learn("--loss", choices=("ce", "focal", "mse", "smooth_l1"), help="ce or focal for classes, the others for scores")
    learn("--focal_gamma", type=common.bounded(float, 0), default=2.0, help="focal: weight (1 - p)^gamma")
    learn("--focal_alpha", type=common.bounded(float, 0, 1), help="focal: weight of the positive class, else 1 - it")
    learn("--label_smoothing", type=common.bounded(float, 0, 0.9), default=0.0, help="share spread over all classes")
    learn("--balance", choices=("none", "sampler", "weights"), default="none", help="draw, or weigh, all classes alike")
    learn("--boost_to", type=common.bounded(float, 0, 0.9), help="repeat rare train rows up to this share")
    learn("--force", action="store_true", help="allow several corrections of the class balance at once")
    learn("--mixup", type=common.bounded(float, 0), default=0.0, help="alpha of mixup; 0 = off")
    learn("--positive_class", help="the class that matters (default: the rarest in the train rows)")
    learn("--sample_weight", action="append", metavar="COLUMN:LEVEL=W", help="weight of rows, e.g. moment:M2=2.5")
    learn("--augment_for", action="append", metavar="COLUMN:LEVEL=PRESET", help="augmentation of some rows")
    learn("--target_weights", nargs="+", metavar="NAME=W", help="regress: weight of scores in the loss")
    learn("--consistency_weight", type=common.bounded(float, 0), default=0.1, help="ties a total to its parts; 0 = off")
    learn("--select", help="val_ column that chooses the epoch, e.g. tail_f1 or f1_tail (default: average precision of "
                           "the positive class; regress: loss), or last: a fixed number of epochs")


def check_flags(parser, args):
    """parser.error for what a mode lacks, and for flags that contradict each other."""
    needed = {"predict": ("checkpoint", "manifest"), "evaluate": ("predictions",)}.get(args.mode, ())
    lacking = [f"--{name}" for name in needed if not getattr(args, name)]
    manifests = [args.manifest, args.train_manifest, args.val_manifest, args.test_manifest]
    if lacking or args.mode in ("train", "audit") and not any([*manifests, args.video_root]):
        parser.error(f"--mode {args.mode} needs {' and '.join(lacking) or '--manifest, or --train_manifest'}")
    if args.manifest and any(manifests[1:]):
        parser.error(f"--manifest {args.manifest} is split here; give it alone, or the manifests of the parts")
    if any(manifests[1:]) and (args.folds or args.cv_file or not args.train_manifest and args.mode == "train"):
        parser.error(f"manifests of parts need --train_manifest {args.train_manifest} and go without folds")
    if args.mode == "train" and (args.loss in ("ce", "focal")) != (args.task == "classify"):
        parser.error(f"--loss {args.loss} does not fit --task {args.task}")
    corrections = [args.balance == "sampler", args.balance == "weights", args.focal_alpha is not None]
    if sum(corrections) > 1 and not args.force:
        parser.error(f"--balance {args.balance} and --focal_alpha {args.focal_alpha} both correct the class balance; "
                     "drop one, or give --force")
    if args.task == "regress" and args.model != ONLY_FRAMES and args.mode == "train":
        parser.error(f"--task regress reads sequences of any length: --model {ONLY_FRAMES}, found {args.model}")
    if args.mode == "train" and not args.cv_file and not any(manifests[1:]):
        common.check_split_flags(parser, args)


# --- score tables: sequence on disk -> table -----------------------------------------------


def sample_weights(table, flags):
    """--sample_weight moment:M2=2.5 (several multiply) -> (N,) float64 weights of the rows in the loss, 1 = plain."""
    weights = np.ones(len(table))
    for text in flags or []:
        column, level, value = event_tables.parse_level_flag(text, "--sample_weight")
        factor = csv_tables.to_numbers([value], f"--sample_weight {text}")[0]
        if not factor >= 0:
            raise common.UserError(f"--sample_weight {text}: expected a weight of 0 or more, found {value}")
        weights[event_tables.level_mask(table, column, level, "--sample_weight")] *= factor
    return weights


def augment_presets(table, flags, default, presets):
    """--augment_for moment:M2=heavy (the last one that fits counts) -> (N,) preset of each row, else the default."""
    chosen = np.full(len(table), default, dtype=object)
    for text in flags or []:
        column, level, value = event_tables.parse_level_flag(text, "--augment_for")
        if value not in presets:
            raise common.UserError(f"--augment_for {text}: expected one of {', '.join(presets)}, found {value!r}")
        chosen[event_tables.level_mask(table, column, level, "--augment_for")] = value
    return chosen


# --- data: table and pixels -> sample ------------------------------------------------

@dataclasses.dataclass
class Study:
    """N clips that can be read: their table, their frames, and what was left out."""
    table: event_tables.EventTable
    store: video_files.ClipStore
    stored: np.ndarray  # (N,) index of each clip in the store
    args: object
    skipped: list  # dicts of row and reason
    pooled: np.ndarray | None = None  # (N, F) features of the middle clip through the untuned backbone
    features: dict | None = None  # of a frozen backbone: {"views": (V, N, ...), (row, start): (...)}

    def frames(self, row):
        """Grid frames of a row, uint8 (G, H, W, 3)."""
        return self.store[self.stored[row]]

    def audit(self, row):
        """ClipAudit of a row."""
        return self.store.audit[self.stored[row]]

    def start_range(self, row, jittered=False):
        """(first, last) grid frame at which a clip of a row may start."""
        found, length = self.audit(row), self.args.n_frames
        if self.args.task == "regress":
            return 0, 0
        reach = round(self.args.jitter_sec * self.args.fps) if jittered else 0
        last = found.first + max(found.usable - length, 0)
        return max(found.first - reach, 0), last + min(reach, max(found.n_grid - length - last, 0))

    def starts(self, row):
        """Grid frames at which the clips start that are scored: evenly over the event, the middle where it is one."""
        first, last = self.start_range(row)
        count = self.args.clips_per_event
        places = np.linspace(first, last, count) if count > 1 else [(first + last) / 2]
        return sorted({int(round(place)) for place in places})

    @property
    def clusters(self):
        """(N,) what is resampled for intervals: groups, else videos that hold several events; None = rows."""
        table = self.table
        return table.groups if table.groups is not None else (
            table.videos if len(set(table.videos)) < len(table) else None)

    @property
    def strata(self):
        """(N,) what splits are stratified on."""
        return event_tables.strata_of(self.table)

    def record(self, split):
        """What args.json says of the data and their split; a resumed run must find the same."""
        table, values = self.table, self.table.label if self.table.target is None else self.table.target
        shas = [self.audit(row).pixel_sha for row in range(len(table))]
        parts = itertools.chain.from_iterable((part, rows) for part, rows in split.items())
        return {"fingerprint": common.data_fingerprint([*table.names, *table.clip_ids, values, *shas]),
                "split": common.data_fingerprint(parts), "clips": len(table), "names": table.names}


def read_table_of(args, names=None, need_labels=True):
    """The Table that the flags name; names: classes or scores of a trained model."""
    if args.task == "regress":
        table = score_tables.read_sequences(args.manifest, args.video_root, args.group_column, names or args.target_columns,
                               need_labels=need_labels, max_missing=args.max_missing)
    else:
        manifests = {"": args.manifest, "train": args.train_manifest, "val": args.val_manifest,
                     "test": args.test_manifest}
        manifests = {part: path for part, path in manifests.items() if path} or {"": args.video_root}
        table = event_tables.read_events(manifests, args.video_root, args.label_map, args.min_event_sec, args.group_column,
                            names=names, need_labels=need_labels, max_missing=args.max_missing)
    return table.take(event_tables.filter_rows(table, args.filter)) if args.filter else table


def load_study(args, say, skipped_file=None, names=None, need_labels=True):
    """Table and clips, checked; what cannot be used is counted, said and listed in the file."""
    table = read_table_of(args, names, need_labels)
    if (table.unit == "frame").any():
        fps = {source: video_files.probe(source, args.fps).fps or args.fps for source in dict.fromkeys(table.sources)}
        table = event_tables.seconds_of(table, np.array([fps[source] for source in table.sources]), args.min_event_sec)
    say(f"decoding {len(table)} clips of {len(set(table.sources))} videos with {video_files.decoder_name()}")
    store = video_files.ClipStore(table.sources, table.windows, grid="even" if args.task == "regress" else "rate", fps=args.fps,
                      n_frames=args.n_frames, short_side=resize_side(args.image_size), jitter_sec=args.jitter_sec,
                      cache=args.cache)
    good = video_files.check_clips(store.audit, args.max_missing, args.on_bad_file)
    stored = np.array([row for row in good if not store.audit[row].past_end], dtype=int)
    reasons = {row: store.audit[row].error or "its window starts past the end of the video"
               for row in set(range(len(table))) - set(stored.tolist())}
    skipped = table.skipped + [{"row": table.clip_ids[row], "video": str(table.sources[row]), "reason": reason}
                               for row, reason in sorted(reasons.items())]
    if skipped and skipped_file:
        common.write_table(skipped_file, skipped)
    for reason, count in collections.Counter(entry["reason"] for entry in skipped).items():
        say(f"skipped: {count} rows, {reason}")
    for note in table.notes:
        say(f"note: {note}")
    say(f"data: {len(stored)} clips, {len(set(table.events))} events; {len(skipped)} rows skipped"
        f"{' (listed in skipped.csv)' if skipped and skipped_file else ''}; {store.description}")
    if not len(stored):
        raise common.UserError(f"none of {len(table)} clips can be used (first: {skipped[0]['reason']})")
    return Study(table.take(stored), store, stored, args, skipped)


def resize_side(image_size):
    """Short side that frames are scaled to before the crop: 128 for 112."""
    return round(image_size * 8 / 7)


class Clips(common.Samples):
    """Clips of chosen rows; a key is (epoch, index), which seeds start and augmentation.

    In training a view is a row with a random start; else every start that is scored is a view. Each sample: input
    uint8 (T, S, S, 3), or features of a frozen backbone (T, F) or (F,); mask (T,), True = a real frame; target (K,);
    weight; name.
    """

    def __init__(self, study, rows, objective, args, train, presets=None):
        self.study, self.rows, self.objective, self.args, self.presets = study, rows, objective, args, presets
        starts = [[None] if train else study.starts(row) for row in rows]
        self.views = [(int(row), start) for row, each in zip(rows, starts) for start in each]
        self.place = np.repeat(np.arange(len(rows)), [len(each) for each in starts])  # (views,) index into rows

    def __len__(self):
        return len(self.views)

    def __getitem__(self, key):
        epoch, index = key
        row, start = self.views[index]
        generator = common.generator_for(self.args.seed, epoch, index)
        pixels = self.frozen(row, start, generator) if self.study.features else self.clip(row, start, generator)
        mask = torch.arange(self.args.n_frames) < min(self.study.audit(row).n_grid, self.args.n_frames)  # (T,)
        return {"input": torch.from_numpy(pixels), "mask": mask, "target": self.objective.target[row],
                "weight": self.objective.weight[row], "name": self.study.table.clip_ids[row]}

    def frozen(self, row, start, generator):
        """Features of the frozen backbone: of one of the random views, or of the start that is scored."""
        if start is not None:
            return self.study.features[row, start]
        views = self.study.features["views"]
        return views[torch.randint(len(views), (), generator=generator), row]

    def clip(self, row, start, generator):
        """uint8 (T, S, S, 3), black frames after the last real one."""
        frames, length, size = self.study.frames(row), self.args.n_frames, self.args.image_size
        preset = "none" if self.presets is None else self.presets[row]
        if start is None:
            first, last = self.study.start_range(row, jittered=True)
            start = first + int(torch.randint(last - first + 1, (), generator=generator))
        chosen = frames[start:start + length]
        drawn = common.sample_augmentation(preset, generator)
        clip = np.zeros((length, size, size, 3), np.uint8)
        clip[:len(chosen)] = (np.stack([common.eval_crop(frame, size) for frame in chosen]) if preset == "none"
                              else common.augment_clip(chosen, drawn, size))
        return clip


# --- model --------------------------------------------------------------------------

class Head(nn.Module):
    """(B, F) -> (B, K): dropout and a linear layer; scores are put on their scale, logits stay as they are.

    The first outputs lie about `centre`, the train mean or log prior; bounded: a sigmoid over this range.
    """

    def __init__(self, n_features, n_outputs, dropout, bounded=False):
        super().__init__()
        self.dropout, self.linear, self.bounded = nn.Dropout(dropout), nn.Linear(n_features, n_outputs), bounded
        self.register_buffer("offset", torch.zeros(n_outputs))
        self.register_buffer("spread", torch.ones(n_outputs))

    def start_at(self, centre, offset, spread):
        """Set the scale (K,) and a bias that gives `centre` (K,) where no feature speaks."""
        centre, offset, spread = (torch.as_tensor(each, dtype=torch.float32) for each in (centre, offset, spread))
        self.offset.copy_(offset)
        self.spread.copy_(spread)
        share = (centre - offset) / spread
        self.linear.bias.data = torch.logit(share.clamp(0.01, 0.99)) if self.bounded else share

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            raw = self.linear(self.dropout(features.float()))  # (B, F) -> (B, K)
            return self.offset + self.spread * (torch.sigmoid(raw) if self.bounded else raw)


class ClipNet(common.BackboneModel):
    """A torchvision video network over all frames at once: clips (B, T, 3, S, S) -> (B, K)."""

    def __init__(self, backbone, n_features, head, freeze_norm=False):
        super().__init__(backbone, freeze_norm)
        self.head = head(n_features)

    def extract(self, clips, mask):
        """Features of the backbone: (B, T, 3, S, S) -> (B, F), on a CPU in fp32.

        The bf16 weight gradients of small 3-D convolutions in oneDNN read memory that was never written (torch 2.14).
        """
        with torch.autocast("cpu", enabled=False):
            return self.backbone(clips.transpose(1, 2))  # (B, T, 3, S, S) -> (B, 3, T, S, S) -> (B, F)

    def forward(self, clips, mask):
        # (B, T, 3, S, S) clips, or (B, F) features of a frozen backbone
        return self.head(clips if clips.ndim == 2 else self.extract(clips, mask))  # (B, F) -> (B, K)


class FrameLstm(common.BackboneModel):
    """An image backbone frame by frame, then an LSTM: clips (B, T, 3, S, S), mask (B, T) -> (B, K)."""

    def __init__(self, backbone, n_features, head, hidden, freeze_norm=False):
        super().__init__(backbone, freeze_norm)
        self.n_features = n_features
        self.lstm = nn.LSTM(n_features, hidden, batch_first=True)
        self.head = head(hidden)

    def extract(self, clips, mask):
        """Features of the real frames, 0 for the others: (B, T, 3, S, S), mask (B, T) -> (B, T, F)."""
        features = torch.zeros(*mask.shape, self.n_features, device=clips.device)
        frames = clips.movedim(2, -1)[mask].movedim(-1, 1)  # only real ones, colours stay the last in memory
        found = self.backbone(frames)  # (frames, 3, S, S) -> (frames, F)
        return features.masked_scatter(mask[..., None], found.float())  # (B, T, F)

    def forward(self, clips, mask):
        # (B, T, 3, S, S) clips, or (B, T, F) features of a frozen backbone
        features = clips if clips.ndim == 3 else self.extract(clips, mask)
        with torch.autocast(features.device.type, enabled=False):
            states, _ = self.lstm(features.float())  # (B, T, F) -> (B, T, H)
        last = mask.sum(1).clamp(min=1) - 1  # (B,) index of the last real frame
        return self.head(states[torch.arange(len(last), device=last.device), last])  # (B, H) -> (B, K)


def build_model(args, n_outputs):
    """The network that the flags (or a checkpoint's) describe; the seed decides the random part."""
    torch.manual_seed(common.hash_seed(args.seed))

    def head(n_features):
        return Head(n_features, n_outputs, args.dropout, args.bounded)
    needed = FIXED_INPUT.get(args.model, (args.n_frames, args.image_size))
    if needed != (args.n_frames, args.image_size):
        raise common.UserError(f"--model {args.model} takes clips of --n_frames {needed[0]} --image_size {needed[1]} "
                               f"alone, found {args.n_frames} and {args.image_size}")
    if args.model == ONLY_FRAMES:
        example = torch.zeros(1, 3, args.image_size, args.image_size)
        parts = common.build_backbone(args.backbone, args.pretrained, args.weights, args.image_size)
    else:
        example = torch.zeros(1, 3, args.n_frames, args.image_size, args.image_size)
        parts = common.build_backbone(args.model, args.pretrained, args.weights, args.image_size, family="video")
    common.freeze_stages(parts[0], args.freeze_stages, example)
    return (FrameLstm(*parts, head, args.hidden, args.freeze_norm) if args.model == ONLY_FRAMES
            else ClipNet(*parts, head, args.freeze_norm))


def pixel_statistics(model_name):
    """(mean, sd) of the three colours that the published weights of a network expect."""
    return (common.IMAGENET_MEAN, common.IMAGENET_STD) if model_name == ONLY_FRAMES else (KINETICS_MEAN, KINETICS_STD)


# --- the two tasks: what is learnt, and how it is measured --------------------------------

class Behaviours:
    """--task classify: targets, loss and metrics of C classes, as the train rows weigh them."""

    def __init__(self, args, table, train):
        self.args, self.names = args, table.names
        counts = np.bincount(table.label[train], minlength=len(self.names))
        if (counts == 0).any():
            raise common.UserError(f"no train row of class {common.shorten_list(itertools.compress(self.names, counts == 0))}; "
                                   "change the split or the label map")
        self.positive = self.names.index(positive_class(args.positive_class, self.names, counts))
        self.prior = counts / counts.sum()
        factor = np.ones(len(counts))
        if args.balance == "weights":
            factor = 1 / (len(counts) * self.prior)
        if args.focal_alpha is not None:
            factor = factor * np.where(np.arange(len(counts)) == self.positive, args.focal_alpha, 1 - args.focal_alpha)
        self.factor = torch.tensor(factor / (factor * self.prior).sum(), dtype=torch.float32)  # mean 1 over train rows
        self.label, self.repeats = table.label, table.repeats
        self.target = nn.functional.one_hot(torch.tensor(np.maximum(table.label, 0)), len(counts)).float()  # (N, C)
        self.weight = torch.tensor(sample_weights(table, args.sample_weight), dtype=torch.float32)  # (N,)
        self.default_select = f"{self.names[self.positive]}_average_precision"

    def rows(self, train):
        """Train rows as often as the manifest repeats them, the positive class up to --boost_to: (n,) -> (m,)."""
        train = np.repeat(train, self.repeats[train])
        rare, share = train[self.label[train] == self.positive], self.args.boost_to or 0
        wanted = round(share * (len(train) - len(rare)) / (1 - share))  # rows of the positive class
        return np.concatenate([train, np.resize(rare, max(0, wanted - len(rare)))])

    def sampler_weights(self, rows):
        """(n,) chances that draw all classes alike, or None."""
        return 1 / np.bincount(self.label[rows])[self.label[rows]] if self.args.balance == "sampler" else None

    def trained_prior(self, rows):
        """(C,) class shares as the loss saw them: drawn by the sampler, repeated, weighted."""
        share = np.bincount(self.label[rows], minlength=len(self.names)) * self.factor.numpy()
        return np.full(len(share), 1 / len(share)) if self.args.balance == "sampler" else share / share.sum()

    def scale(self):
        """(centre, offset, spread) of the head, (C,) each: the first output is the log prior."""
        return np.log(self.prior), np.zeros(len(self.prior)), np.ones(len(self.prior))

    def loss(self, logits, target, weight):
        """Mean over the batch: (B, C) logits, (B, C) class shares (mixup), (B,) weights -> float tensor.

        Focal loss: Lin et al. 2017, with the probability of the target mixture.
        """
        smoothing = self.args.label_smoothing
        smooth = target * (1 - smoothing) + smoothing / target.shape[1]
        error = -(smooth * torch.log_softmax(logits, 1)).sum(1)  # (B,)
        if self.args.loss == "focal":
            error = error * (1 - (target * torch.softmax(logits, 1)).sum(1)) ** self.args.focal_gamma
        return (error * weight * (target @ self.factor.to(target.device))).mean()

    def history(self, logits, rows):
        """{metric: value} of the rows at their natural class shares, for a row of the history."""
        values = common.classification_metrics(common.softmax(logits), self.label[rows], names=self.names,
                                               positive=self.positive)
        return {name: value for name, value in values.items() if name not in ("n", "confusion")}

    def select(self, wanted):
        """--select -> (history column, higher is better). Raises UserError that names the closest."""
        known = common.classification_names(self.names)
        return select_column(known, wanted or self.default_select)


class Scores:
    """--task regress: targets, loss and metrics of R scores, on the scale of the train rows."""

    def __init__(self, args, table, train):
        self.args, self.names, target = args, table.names, table.target
        self.mean, self.sd = np.nanmean(target[train], axis=0), np.nanstd(target[train], axis=0)
        constant = self.sd < 1e-9
        if constant.any() or np.isnan(self.mean).any():
            raise common.UserError("the same score in every train row, or none, is nothing to learn: "
                                   f"{common.shorten_list(itertools.compress(self.names, ~(self.sd >= 1e-9)))}; leave it out "
                                   "with --target_columns")
        self.low, self.high = np.nanmin(target[train], axis=0), np.nanmax(target[train], axis=0)
        self.values, self.repeats = target, table.repeats
        self.target = torch.tensor(target, dtype=torch.float32)  # (N, R), NaN = missing
        self.weight = torch.tensor(sample_weights(table, args.sample_weight), dtype=torch.float32)  # (N,)
        self.target_weight = torch.tensor(target_weights(args.target_weights, self.names), dtype=torch.float32)
        self.total, self.parts = score_tables.total_and_parts(self.names)

    def rows(self, train):
        """Train rows, as often as the table repeats them: (n,) -> (m,)."""
        return np.repeat(train, self.repeats[train])

    def sampler_weights(self, rows):
        """No weighted sampling of scores."""
        return None

    def scale(self):
        """(centre, offset, spread) of the head, (R,) each: the first output is the train mean."""
        if self.args.bounded:
            return self.mean, self.low, self.high - self.low
        return self.mean, self.mean, self.sd

    def loss(self, predicted, target, weight):
        """Mean over rows of each row's mean over its labelled scores, errors in sd: (B, R), (B, R), (B,) -> tensor.

        A missing score is NaN in target and counts nothing. Consistency: squared (total - sum of parts) in sd of the
        total, for every row, labelled or not.
        """
        sd = torch.as_tensor(self.sd, dtype=torch.float32, device=predicted.device)
        labelled = ~torch.isnan(target)  # (B, R), True = a score is there
        pointwise = nn.functional.smooth_l1_loss if self.args.loss == "smooth_l1" else nn.functional.mse_loss
        error = pointwise(predicted / sd, torch.where(labelled, target, predicted.detach()) / sd, reduction="none")
        share = labelled * self.target_weight.to(predicted.device)
        loss = ((error * share).sum(1) / share.sum(1).clamp(min=1e-9) * weight).mean()
        if self.parts and self.args.consistency_weight:
            gap = (predicted[:, self.total] - predicted[:, self.parts].sum(1)) / sd[self.total]
            loss = loss + self.args.consistency_weight * (gap ** 2).mean()
        return loss

    def history(self, predicted, rows):
        """{metric: value} of the rows, means over the scores in their units; loss: that of training."""
        means = common.mean_metrics(common.regression_metrics(predicted, self.values[rows]))
        loss = self.loss(torch.tensor(predicted, dtype=torch.float32), self.target[rows], self.weight[rows])
        return {"loss": float(loss), **{name: means[name] for name in ("mse", "mae", "r2", "pearson_r")}}

    def select(self, wanted):
        """--select -> (history column, higher is better). Raises UserError that names the closest."""
        return select_column({name: name for name in ("loss", "mse", "mae", "r2", "pearson_r")}, wanted)


TASKS = {"classify": Behaviours, "regress": Scores}


def positive_class(wanted, names, counts):
    """The class that matters: as asked for, in any case, else the rarest. Raises UserError."""
    spelled = {name.casefold(): name for name in names}
    if wanted and wanted.casefold() not in spelled:
        raise common.UserError(f"--positive_class {wanted} is no class{common.closest(wanted, names)} "
                               f"(found: {common.shorten_list(names)})")
    return spelled[wanted.casefold()] if wanted else names[int(np.argmin(counts))]


def select_column(known, wanted):
    """Name as typed -> (val_ column or 'last', higher is better), from {spelling: metric}. Raises UserError."""
    name = wanted.removeprefix("val_")
    if name == "last":
        return "last", True
    if name not in known:
        raise common.UserError(f"--select {wanted} is no metric of this run{common.closest(name, known)}; "
                               f"metrics: {common.shorten_list(known, 40)}, last")
    return f"val_{known[name]}", not known[name].endswith(common.LOWER_IS_BETTER)


def target_weights(pairs, names):
    """--target_weights NAME=W ... -> (R,) float64, 1 where not named. Raises UserError."""
    weights = dict.fromkeys(names, 1.0)
    spelled = {event_tables.column_key(name): name for name in names}
    for text in pairs or []:
        name, _, value = text.rpartition("=")
        if event_tables.column_key(name) not in spelled or not csv_tables.NUMBER.fullmatch(value) or float(value) < 0:
            raise common.UserError(f"--target_weights expects NAME=WEIGHT of {common.shorten_list(names, 40)}, found {text!r}")
        weights[spelled[event_tables.column_key(name)]] = float(value)
    return np.array(list(weights.values()))


# --- training ---------------------------------------------------------------------------

def make_loaders(study, split, objective, args, compute):
    """Loader of the augmented train clips, and {part: loader} of the train, val and test clips as they are."""
    presets = augment_presets(study.table, args.augment_for, args.augment, tuple(common.AUGMENTATIONS))
    cached = study.store.cache == "ram" or args.freeze_backbone
    rows = objective.rows(split["train"])
    training = common.make_loader(Clips(study, rows, objective, args, True, presets), args.batch_size, args, compute,
                                  True, cached, objective.sampler_weights(rows))
    scoring = {part: common.make_loader(Clips(study, split[part], objective, args, False), args.val_batch_size, args,
                                        compute, False, cached) for part in split if len(split[part])}
    return training, scoring


def to_device(batch, args, compute):
    """Batch -> clips (B, T, 3, S, S) normalised, or features; mask (B, T); target (B, K); weight (B,)."""
    clips = batch["input"]
    if clips.dtype == torch.uint8:
        # memory stays in the order B, T, S, S, 3: channels_last for pictures and for clips alike
        frames = common.to_input(clips.flatten(0, 1), compute.device, *pixel_statistics(args.model))
        clips = frames.unflatten(0, clips.shape[:2])  # (B * T, 3, S, S) -> (B, T, 3, S, S)
    mask, target, weight = (batch[name].to(compute.device, non_blocking=True) for name in ("mask", "target", "weight"))
    return clips.to(compute.device), mask, target, weight


def mixed_up(clips, target, alpha):
    """mixup (Zhang et al. 2018): each clip and target with a share of another one of its batch; alpha 0: unchanged."""
    if not alpha:
        return clips, target
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(clips)).to(clips.device)
    return share * clips + (1 - share) * clips[order], share * target + (1 - share) * target[order]


def train_one_epoch(model, loader, objective, training, args, compute):
    """One pass over the train rows; returns {'train_loss': mean over the rows}."""
    model.train()
    for batch in training.batches(loader):
        clips, mask, target, weight = to_device(batch, args, compute)
        clips, target = mixed_up(clips, target, args.mixup)
        with compute.autocast():
            outputs = model(clips, mask)  # (B, T, 3, S, S) -> (B, K)
        training.step(objective.loss(outputs.float(), target, weight))
    return training.epoch_means()


@torch.no_grad()
def evaluate(model, loader, args, compute):
    """Whole split at once -> (M, K) float64 outputs of its rows, over all clips of a row by --aggregation."""
    model.eval()
    outputs = []
    for batch in loader:
        clips, mask, _, _ = to_device(batch, args, compute)
        with compute.autocast():
            outputs.append(model(clips, mask).float().cpu())  # (B, T, 3, S, S) -> (B, K)
    outputs = torch.cat(compute.processes.gather(outputs)).double().numpy()  # (views, K)
    place = loader.dataset.place  # (views,)
    first = np.flatnonzero(np.append(True, np.diff(place)))
    if args.aggregation == "max":
        return np.maximum.reduceat(outputs, first)
    return np.add.reduceat(outputs, first) / np.bincount(place)[:, None]


def fit(run, args, study, split):
    """Train on split['train'], choose the epoch on split['val']; ({part: outputs (M, K)}, Training, objective)."""
    compute, objective = run.compute, TASKS[args.task](args, study.table, split["train"])
    select, higher_is_better = objective.select(args.select)
    train_loader, loaders = make_loaders(study, split, objective, args, compute)
    model = build_model(args, len(objective.names))
    model.head.start_at(*objective.scale())
    if args.init_from:
        common.load_state(model, common.starting_weights(args.init_from, names=objective.names), args.init_from)
    model = compute.place(model)
    model.freeze_backbone(args.freeze_backbone)
    rest = nn.ModuleList([module for name, module in model.named_children() if name != "backbone"])
    optimizer = common.build_optimizer([(model.backbone, args.backbone_lr_mult), (rest, 1.0)], args)
    shift = prior_shift(objective, train_loader.dataset.rows) if args.task == "classify" else 0.0
    training = common.Training(run, model, optimizer, args, select, lambda: describe(args, objective, shift),
                               higher_is_better)
    for _ in training.epochs():
        row = train_one_epoch(model, train_loader, objective, training, args, compute)
        scored = evaluate(model, loaders["val"], args, compute)
        values = objective.history(scored + shift, split["val"])
        training.end_epoch({**row, **{f"val_{name}": value for name, value in values.items()}})
    best = common.load_model_file(run.path("best_model.pth"), common.script_name())
    common.load_state(model, best["model"], "best_model.pth")
    outputs = {part: evaluate(model, loader, args, compute) + shift for part, loader in loaders.items()}
    if args.task == "classify":
        best["calibration"] = calibrate(outputs["val"], objective.label[split["val"]], objective.positive)
        common.save_checkpoint(run.path("best_model.pth"), common.to_plain_types(best))
    return outputs, training, objective


def prior_shift(objective, rows):
    """(C,) to add to the logits, so that they speak of the class shares of the data and not of those trained on."""
    return calibrating.prior_correction(np.zeros(len(objective.names)), objective.prior, objective.trained_prior(rows))


def describe(args, objective, shift):
    """What predict needs beside the weights: architecture, names, scaling, the shift to the natural class shares."""
    mean, sd = pixel_statistics(args.model)
    described = {"architecture": {name: getattr(args, name) for name in ARCHITECTURE}, "names": objective.names,
                 "pixel_mean": list(mean), "pixel_sd": list(sd)}
    if args.task == "classify":
        return {**described, "positive": objective.names[objective.positive], "prior": list(objective.prior),
                "prior_shift": list(shift)}
    return {**described, "label_sd": objective.sd}


@torch.no_grad()
def extract_features(model, dataset, epoch, args, compute, batch_size=16):
    """float32 features of every view of a dataset through an untuned backbone: (views, F) or (views, T, F)."""
    model.eval()
    features = []
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[epoch, i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = torch.utils.data.default_collate(samples)
        clips, mask, _, _ = to_device(batch, args, compute)
        with compute.autocast():
            features.append(model.extract(clips, mask).float().cpu())
    return torch.cat(features).numpy()


def prepare_features(run, args, study):
    """study.pooled for the baselines; with --freeze_backbone study.features too, once for all folds."""
    rows = np.arange(len(study.table))
    model = run.compute.place(build_model(args, len(study.table.names)))
    objective = TASKS[args.task](args, study.table, rows)
    middle = dataclasses.replace(study, args=argparse.Namespace(**{**vars(args), "clips_per_event": 1}))
    plain = Clips(middle, rows, objective, args, False)
    features = extract_features(model, plain, 0, args, run.compute)
    study.pooled = features
    if features.ndim == 3:  # (N, T, F): mean and sd over the real frames, which tells still clips from moving ones
        mask = np.stack([plain[0, i]["mask"].numpy() for i in range(len(plain))])[..., None]  # (N, T, 1)
        count = mask.sum(1)
        mean = (features * mask).sum(1) / count
        spread = np.sqrt((((features - mean[:, None]) * mask) ** 2).sum(1) / count)
        study.pooled = np.concatenate([mean, spread], axis=1)
    if not args.freeze_backbone:
        return
    presets = augment_presets(study.table, args.augment_for, args.augment, tuple(common.AUGMENTATIONS))
    random_views = Clips(study, rows, objective, args, True, presets)
    scored = Clips(study, rows, objective, args, False)
    plain = extract_features(model, scored, 0, args, run.compute)
    views = np.stack([extract_features(model, random_views, view, args, run.compute)
                      for view in range(args.feature_views)])
    study.features = {"views": views, **dict(zip(scored.views, plain))}


# --- results: outputs -> whole-split metric -> run folder ---------------------------------------

@dataclasses.dataclass
class Scored:
    """Outputs for rows that the model was not trained on, beside the baselines' for the same rows."""
    rows: np.ndarray  # (M,) rows of the study
    outputs: np.ndarray  # (M, K) logits at the natural class shares, or scores
    baselines: dict  # name -> (M, K) probabilities or scores
    part: str  # val, test or folds
    trained_on: list  # (train rows, scored rows) of each fold, one pair without folds
    calibration: list | None = None  # (M,) entries: temperature and threshold fitted on other rows; classify


def calibrate(logits, label, positive):
    """Temperature, and threshold of the positive class after it, from validation logits (M, C) and labels (M,)."""
    temperature = calibrating.fit_temperature(logits, label)
    probability = common.softmax(logits / temperature)
    return {"temperature": temperature, "threshold": calibrating.fit_threshold(probability, label, positive=positive)}


def calibrated(scored):
    """(probabilities (M, C) after temperature, thresholds (M,))."""
    temperature, threshold = (np.array([each[name] for each in scored.calibration])
                              for name in ("temperature", "threshold"))
    return common.softmax(scored.outputs / temperature[:, None]), threshold


def decision_of(scored):
    """(probabilities (M, C), thresholds (M,) or None): calibrated where that was fitted on other rows, else as is."""
    return calibrated(scored) if scored.calibration else (common.softmax(scored.outputs), None)


def baselines(study, train, rows):
    """{name: (M, K)} of what trains no network: what is frequent, and a linear model on the untuned features."""
    table, groups = study.table, None if study.clusters is None else study.clusters[train]
    x, size = study.pooled, len(rows)
    if table.target is None:
        logistic = baseline_models.fit_logistic(x[train], table.label[train], len(table.names), groups=groups, sd_floor=0.01)
        return {"train_prior": baseline_models.prior_baseline(table.label[train], size, len(table.names)),
                "logistic": logistic.predict(x[rows])}
    ridge = baseline_models.fit_ridge(x[train], table.target[train], groups=groups, sd_floor=0.01)
    predicted = {"train_mean": baseline_models.train_mean_baseline(table.target[train], size), "ridge": ridge.predict(x[rows])}
    moments = moment_levels(study)
    if moments is not None:
        predicted["moment_mean"] = np.stack([level_mean(table.target[train], moments[train] == moments[row])
                                             for row in rows])
    return predicted


def level_mean(target, chosen):
    """(R,) mean of the chosen rows, of all where a score has none: (n, R), (n,) bool."""
    everywhere = baseline_models.train_mean_baseline(target, 1)[0]
    own = baseline_models.train_mean_baseline(target[chosen], 1)[0] if chosen.any() else everywhere
    return np.where(np.isnan(own), everywhere, own)


def moment_levels(study):
    """(N,) levels of --moment_column, or None where the table has no such column."""
    key = event_tables.column_key(study.args.moment_column)
    return study.table.extra[key].to_numpy(str) if key in study.table.extra else None


def write_predictions(path, study, scored):
    """predictions CSV. Classify: labels, probabilities (calibrated where they can be), logits, the baselines' too."""
    table, rows = study.table, scored.rows
    keys = {"clip_id": table.clip_ids[rows]}
    if study.clusters is not None:
        keys["group"] = study.clusters[rows]
    if table.target is not None:
        values = {"true": table.target[rows], "predicted": scored.outputs, **scored.baselines}
        return prediction_tables.write_target_table(path, keys, table.names, values)
    probability, threshold = decision_of(scored)
    chosen = common.predicted_class(probability, threshold, study.positive)
    names = np.array([*table.names, ""])  # label -1 = unknown
    keys |= {"event": table.events[rows], "true_label": names[table.label[rows]], "pred_label": names[chosen]}
    blocks = {"prob": probability, "logit": scored.outputs, **{f"{k}_prob": v for k, v in scored.baselines.items()}}
    columns = {f"{kind}_{name}": block[:, c] for kind, block in blocks.items() for c, name in enumerate(table.names)}
    columns |= {} if threshold is None else {"threshold": threshold}
    columns["n_clips"] = [len(study.starts(row)) for row in rows]
    common.write_table(path, [dict(zip([*keys, *columns], row)) for row in zip(*keys.values(), *columns.values())])


def read_predictions(path, study, split, part, calibration):
    """The predictions CSV of a finished fold -> Scored."""
    row_of = {name: row for row, name in enumerate(study.table.clip_ids)}
    if study.table.target is not None:
        clips, values = prediction_tables.read_target_table(path, "clip_id", study.table.names)
        outputs = values.pop("predicted")
        values.pop("true")
    else:
        found = prediction_tables.read_probabilities(path)
        clips, outputs, values = found.clip_ids, found.logits, found.baselines
    rows = np.array([row_of[name] for name in clips])
    return Scored(rows, outputs, values, part, [(split["train"], rows)], calibration and [calibration] * len(rows))


def best_baseline(others, label, names, positive):
    """Name of the baseline with the highest AUC of the positive class; {name: (M, C)}, (M,) labels."""
    auc = {name: common.classification_metrics(p, label, names=names, positive=positive)["roc_auc"]
           for name, p in others.items()}
    return max(auc, key=lambda name: np.nan_to_num(auc[name], nan=-1))


def judge_classes(probability, label, names, positive, groups, others, threshold=None):
    """Metrics with intervals of (M, C) probabilities and (M,) thresholds, paired with the best of the baselines, which
    decide by their most probable class -> (result, its name)."""
    known = label >= 0
    best = best_baseline(others, label, names, positive) if others else None
    return subject_intervals.bootstrap_classification(
        probability[known], label[known], None if groups is None else groups[known], others[best][known] if best else
        None, names, None if threshold is None else threshold[known], positive), best


def decision_metrics(chosen, label, names, positive):
    """What hangs on the decision alone: accuracy, F1, recall, precision, MCC of (M,) chosen classes."""
    one_hot = np.eye(len(names))[chosen]
    values = common.classification_metrics(one_hot, label, names=names, positive=positive)
    wanted = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "precision", "recall", "f1")
    return {name: value for name, value in values.items() if name.endswith(wanted)}


def class_results(run, args, study, scored):
    """What metrics.json says of classes: values with intervals, calibration, priors without pixels; writes plots."""
    table, rows, positive = study.table, scored.rows, study.positive
    label, names = table.label[rows], table.names
    groups = None if study.clusters is None else study.clusters[rows]
    probability, threshold = decision_of(scored)
    result, baseline = judge_classes(probability, label, names, positive, groups, scored.baselines, threshold)
    low = result["interval"]["roc_auc"][0] if result["interval"] else result["value"]["roc_auc"]
    levels = confounding.prior_levels(table)
    confounds = confounding.flag_confounds(
        confounding.level_priors(levels, table.label, *folds_apart(scored), study.clusters, positive), low)
    for row in confounds:
        if row["name"] in levels:
            row["model_auc_within_levels"] = confounding.within_level_auc(probability[:, positive], label,
                                                                     levels[row["name"]][rows], positive)
    plotting.plot_confusion(result["confusion"], names, run.path("confusion.png"))
    plotting.plot_precision_recall(probability, label, names, run.path("precision_recall.png"),
                                 positive if len(names) == 2 else None)
    plotting.plot_risk_coverage(probability.max(1), probability.argmax(1) == label, run.path("risk_coverage.png"))
    plotting.plot_reliability(probability, label, run.path("reliability.png"),
                            common.softmax(scored.outputs) if scored.calibration else None)
    return {"metric": "roc_auc", "baseline": baseline, "positive_class": names[positive], "names": names,
            **{key: result[key] for key in ("value", "interval", "per_subject", "sign_flip_p", "method", "confusion",
                                            "n")},
            "null_ece": calibrating.expected_ece(probability.max(1)), "calibration": calibration_table(study, scored),
            "confounds": confounds,
            "alarms": verdicts.classification_alarms(probability, label, names, threshold, positive)}


def folds_apart(scored):
    """(train rows of each fold, scored rows of each fold)."""
    return [train for train, _ in scored.trained_on], [rows for _, rows in scored.trained_on]


def calibration_table(study, scored):
    """Dicts of NLL, Brier, ECE, F1 and recall of the positive class before and after temperature and threshold."""
    label, names, positive = study.table.label[scored.rows], study.table.names, study.positive
    stages = {"before": (common.softmax(scored.outputs), None)}
    if scored.calibration:
        stages["after"] = calibrated(scored)
    table = []
    for stage, (probability, threshold) in stages.items():
        values = common.classification_metrics(probability, label, names=names, positive=positive)
        values |= decision_metrics(common.predicted_class(probability, threshold, positive), label, names, positive)
        name = names[positive]
        table.append({"stage": stage, "nll": values["loss"], "brier": values["brier"], "ece": values["ece"],
                      "ece_adaptive": values["ece_adaptive"],
                      "ece_of_a_calibrated_model": calibrating.expected_ece(probability.max(1)),
                      "accuracy": values["accuracy"], **{f"{name}_{m}": values[f"{name}_{m}"]
                                                         for m in ("precision", "recall", "f1")}})
    return table


def score_results(run, args, study, scored):
    """What metrics.json says of scores: per score and moment, bias and slope, priors without pixels; writes plots."""
    table, rows = study.table, scored.rows
    target, predicted, names = table.target[rows], scored.outputs, table.names
    groups = None if study.clusters is None else study.clusters[rows]
    result, baseline = subject_intervals.score_regression(predicted, target, groups, scored.baselines)
    per_target = subject_intervals.target_rows(result, names)
    for r, row in enumerate(per_target):
        row |= bias_and_slope(predicted[:, r], target[:, r])
    low = result["interval"]["mean_r2"][0] if result["interval"] else result["value"]["mean_r2"]
    confounds = confounding.flag_confounds(
        confounding.level_means(confounding.prior_levels(table), table.target, *folds_apart(scored), study.clusters), low)
    common.write_table(run.path("scores.csv"), per_target)
    plotting.plot_per_target(per_target, run.path("scores.png"))
    plotting.plot_scatter(predicted, target, names, run.path("predicted_against_true.png"))
    icc = {name: rater_agreement.icc([each[row] for row in range(len(table))])
           for name, each in (table.single_ratings or {}).items()}
    return {"metric": "mean_r2", "baseline": baseline, "names": names, "per_target": per_target,
            "per_moment": moment_rows(study, scored), "icc": icc, "result": result, "confounds": confounds,
            "value": {k: v for k, v in result["value"].items() if "mean_" in k},
            "interval": {k: v for k, v in (result["interval"] or {}).items() if "mean_" in k} or None,
            "sign_flip_p": result["sign_flip_p"], "method": result["method"],
            "alarms": verdicts.regression_alarms(predicted, target, names) + slope_alarms(per_target)}


def bias_and_slope(predicted, target):
    """Mean error and the slope of target on prediction (1 = no correction needed), (M,) each, NaN = missing."""
    known = ~np.isnan(target)
    p, t = predicted[known], target[known]
    spread = p.var() if len(p) else 0.0
    slope = float(((p - p.mean()) * (t - t.mean())).mean() / spread) if spread > 1e-12 else math.nan
    return {"bias": float((p - t).mean()) if len(p) else math.nan, "slope": slope}


def slope_alarms(per_target):
    """Sentences on scores whose order is right and whose values are not: R2 negative although r is positive."""
    return [f"{row['target']}: r {row['pearson_r']:.2f} but R2 {row['r2']:.2f}; the order holds, the values do not "
            f"(bias {row['bias']:+.3g}, slope {row['slope']:.2f})"
            for row in per_target if row["r2"] < 0 and row["pearson_r"] > 0.1]


def moment_rows(study, scored):
    """Dicts of moment, target, n and the model's metrics for each level of --moment_column and score."""
    moments = moment_levels(study)
    if moments is None:
        return []
    rows = []
    for level in sorted(set(moments[scored.rows])):
        here = moments[scored.rows] == level
        values = common.regression_metrics(scored.outputs[here], study.table.target[scored.rows][here])
        for r, name in enumerate(study.table.names):
            rows.append({"moment": level, "target": name, **{k: v[r] for k, v in values.items()}})
    return rows


def criteria_values(study, metrics, scored):
    """(names -> value, names -> interval) that --criteria may name: those of the metrics, and MAE_LEVEL of moments."""
    if study.table.target is None:
        return verdicts.classification_values(metrics, study.table.names)
    values, intervals = verdicts.named_values(metrics["result"], study.table.names)
    moments = moment_levels(study)
    for level in sorted(set(moments)) if moments is not None else ():
        rows = scored.rows[moments[scored.rows] == level]
        place = np.flatnonzero(np.isin(scored.rows, rows))
        result = subject_intervals.bootstrap_regression(scored.outputs[place], study.table.target[rows],
                                             None if study.clusters is None else study.clusters[rows])
        for metric in common.REGRESSION_METRICS:
            values[f"{metric}_{level}"] = float(result["value"][f"mean_{metric}"])
            intervals[f"{metric}_{level}"] = result["interval"] and tuple(result["interval"][f"mean_{metric}"])
    return values, intervals


def criteria_names(study):
    """All that --criteria may name in this run."""
    if study.table.target is None:
        return list(common.classification_names(study.table.names))
    moments = moment_levels(study)
    endings = ["", *(f"_{each}" for each in [*study.table.names, *(() if moments is None else sorted(set(moments)))])]
    return [metric + ending for metric in common.REGRESSION_METRICS for ending in endings]


@common.first_process_only
def report_results(run, args, study, split, scored, alarms, best_epoch=None, folds=()):
    """metrics.json, tables, plots and report.html of one run, or of all folds pooled."""
    results = class_results if study.table.target is None else score_results
    metrics = results(run, args, study, scored)
    held_out = scored.part == "test" or args.select == "last"
    metric = metrics["metric"].removeprefix("mean_")
    label = f"AUC of {metrics['positive_class']}" if study.table.target is None else None
    verdict = verdicts.verdict_sentence(metrics.get("result", metrics), metrics["baseline"].replace("_", " "), metric,
                                      held_out=held_out, label=label)
    flagged = [row["name"] for row in metrics["confounds"] if row["red_flag"] and row["name"] != "row order"]
    if flagged:
        verdict += f" No pixel is needed to come as far: {common.shorten_list(flagged, 3)}."
    criteria = verdicts.parse_criteria(args.criteria, criteria_names(study))
    values, intervals = criteria_values(study, metrics, scored) if criteria else ({}, {})
    target = study.table.label[scored.rows] if study.table.target is None else study.table.target[scored.rows]
    sample = splitting.effective_size(target, None if study.clusters is None else study.clusters[scored.rows])
    metrics |= {"part": scored.part, "best_epoch": best_epoch, "verdict": verdict, "held_out": held_out,
                "alarms": metrics["alarms"] + alarms, "criteria": verdicts.judge_criteria(criteria, values, intervals),
                "sample": sample, "folds": list(folds)}
    metrics.pop("result", None)
    write_page(run, args, study, split, scored, metrics)
    common.write_json(run.path("metrics.json"), metrics)  # last: its presence says that the run is finished
    verdicts.say_results(run, metrics)
    return metrics


def write_page(run, args, study, split, scored, metrics):
    """report.html: the verdict first, then the order of sections that all train scripts share."""
    is_classes, sample = study.table.target is None, metrics["sample"]
    subjects = "no groups: each row its own" if study.clusters is None else f"{sample['subjects']} groups or videos"
    sizes = [{"part": part, "clips": len(rows), **({} if not is_classes else {
        name: int((study.table.label[rows] == c).sum()) for c, name in enumerate(study.table.names)})}
        for part, rows in split.items()]
    sections = [
        ("Data and split", [
            reporting.html_text(f"{sample['rows']} clips scored, {len(set(study.table.events[scored.rows]))} events, "
                             f"{sample['distinct_label_vectors']} distinct label vectors, {subjects}; "
                             f"{len(study.skipped)} rows skipped."), reporting.html_table(sizes)]),
        ("Leakage", reporting.leakage_blocks(run)),
        ("Metrics", [*(reporting.html_text(f"ALARM: {alarm}", "poor") for alarm in metrics["alarms"]),
                     *(class_blocks if is_classes else score_blocks)(run, metrics),
                     *([reporting.html_table(metrics["criteria"], caption="Criteria")] if metrics["criteria"] else []),
                     *([reporting.html_table(fold_rows_of(metrics["folds"]), caption="Folds")]
                       if metrics["folds"] else [])]),
        ("Without a pixel", confound_blocks(metrics)),
        ("Calibration", calibration_blocks(run, metrics)),
        ("Learning curves", reporting.history_blocks(run)),
        ("Best and worst cases", case_blocks(study, scored)),
        ("Limits", [reporting.html_text(limits_text(args, study, metrics))]),
        ("Command and versions", reporting.command_blocks())]
    name, value, interval = metrics["metric"], metrics["value"], metrics["interval"] or {}
    level = verdicts.verdict_level(value[f"difference_{name}"], interval.get(f"difference_{name}", (math.nan,) * 2)[0],
                                 metrics["alarms"] or any(row["red_flag"] for row in metrics["confounds"]))
    title = "Behaviour in clips" if is_classes else "Scores of frame sequences"
    reporting.write_report(run.path("report.html"), f"{title}: {run.folder.name}", (level, metrics["verdict"]), sections,
                        run.compute.text, key_figures(metrics, value, interval))


def key_figures(metrics, value, interval):
    """[(label, value, remark)] for the top of the report."""
    baseline = metrics["baseline"].replace("_", " ")
    if metrics["metric"] == "roc_auc":
        positive = metrics["positive_class"]
        labels = {"roc_auc": f"AUC of {positive}", f"{positive}_average_precision": "Average precision",
                  f"{positive}_recall": f"Recall of {positive}", "baseline_roc_auc": f"AUC of the {baseline}"}
    else:
        labels = {"mean_r2": "Mean R2", "mean_pearson_r": "Mean r", "mean_mae": "Mean MAE",
                  "baseline_mean_r2": f"R2 of the {baseline}"}
    return [reporting.key_figure(label, value[name], interval.get(name), metrics["method"])
            for name, label in labels.items()]


def class_blocks(run, metrics):
    """Tables and plots of classes."""
    value, interval = metrics["value"], metrics["interval"] or {}

    def row(name, key):
        low, high = interval.get(key, (math.nan,) * 2)
        return {"metric": name, "value": value[key], "low": low, "high": high,
                "baseline": value.get(f"baseline_{key}", math.nan)}
    overall = [row(key.replace("_", " "), key) for key in common.CLASSIFICATION_METRICS]
    def with_interval(key):
        low, high = interval.get(key, (math.nan,) * 2)
        return f"{value[key]:.3f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")
    per_class = [{"class": name, "n": int(n), **{m: with_interval(f"{name}_{m}") for m in common.CLASS_METRICS}}
                 for name, n in zip(metrics["names"], metrics["n"])]
    formats = dict.fromkeys(("value", "low", "high", "baseline"), ".3f")
    return [reporting.html_table(overall, formats=formats, caption=f"On the {metrics['part']} rows; baseline: "
                              f"{metrics['baseline'].replace('_', ' ')}; {metrics['method']}"),
            reporting.html_table(per_class, caption="Each class against the rest, with 95 % intervals"),
            reporting.html_image(run.path("confusion.png"), "Confusion matrix: rows true, columns predicted"),
            reporting.html_image(run.path("precision_recall.png"), "Precision-recall and ROC curves"),
            reporting.html_image(run.path("risk_coverage.png"), "Errors among the most confident")]


def score_blocks(run, metrics):
    """Tables and plots of scores."""
    columns = {"target": "score", "n": "n", "mae": "MAE", "rmse": "RMSE", "r2": "R2", "r2_low": "R2 low",
               "r2_high": "R2 high", "pearson_r": "r", "bias": "bias", "slope": "slope", "baseline_r2": "baseline R2",
               "baseline_mae": "baseline MAE"}
    formats = {name: ".3f" for name in columns if name not in ("target", "n")}
    blocks = [reporting.html_table(metrics["per_target"], columns, formats,
                                caption=f"Each score on the {metrics['part']} rows, in its unit; baseline: "
                                        f"{metrics['baseline'].replace('_', ' ')}; {metrics['method']}"),
              reporting.html_image(run.path("scores.png"), "r and R2, interval, baseline"),
              reporting.html_image(run.path("predicted_against_true.png"), "Predicted against true")]
    if metrics["per_moment"]:
        columns = {"moment": "moment", "target": "score", "n": "n", "mae": "MAE", "rmse": "RMSE", "r2": "R2",
                   "pearson_r": "r"}
        blocks.append(reporting.html_table(metrics["per_moment"], columns, formats, caption="Each moment alone"))
    if metrics["icc"]:
        rows = [{"score": name, "ICC(1,1)": one, "ICC(1,k)": mean} for name, (one, mean) in metrics["icc"].items()]
        blocks.append(reporting.html_table(rows, formats={"ICC(1,1)": ".3f", "ICC(1,k)": ".3f"},
                                        caption="Agreement of the raters"))
    return blocks


def confound_blocks(metrics):
    """What metadata alone predict, beside the model."""
    if not metrics["confounds"]:
        return [reporting.html_text("The table has no column with few levels: nothing to test.")]
    formats = {name: ".3f" for name in metrics["confounds"][0] if name not in ("name", "n_levels", "red_flag")}
    rows = [{**row, "red_flag": "reaches the model" if row["red_flag"] else ""} for row in metrics["confounds"]]
    flagged = [row["name"] for row in metrics["confounds"] if row["red_flag"]]
    note = [] if not flagged else [
        reporting.html_text(f"{common.shorten_list(flagged)}: known without looking at any picture, and as good as the "
                         "model's interval allows. Judge the model within the levels.", "caution")]
    return [*note, reporting.html_table(rows, formats=formats, caption="Each column's train rate (or mean) per level as a "
                                     "predictor of the scored rows")]


def calibration_blocks(run, metrics):
    """Reliability diagram and table, for classes."""
    if "calibration" not in metrics:
        return []
    formats = {name: ".3f" for name in metrics["calibration"][0] if name != "stage"}
    note = ("Temperature and threshold were fitted on other rows (validation, or the other folds)."
            if len(metrics["calibration"]) > 1 else "Temperature and threshold were fitted on these very rows and are "
            "therefore shown for test rows and folds only; they are in best_model.pth.")
    return [reporting.html_text(note), reporting.html_table(metrics["calibration"], formats=formats),
            reporting.html_image(run.path("reliability.png"), "Reliability: how often a confidence is right")]


def case_blocks(study, scored, count=5):
    """Middle frames of the clips with the smallest and the largest error."""
    table, rows = study.table, scored.rows
    if table.target is None:
        probability, threshold = decision_of(scored)
        label, chosen = table.label[rows], common.predicted_class(probability, threshold, study.positive)
        error = 1 - probability[np.arange(len(rows)), label]
        lines = [[f"true {table.names[a]}, predicted {table.names[b]}", f"p of the true class {p[a]:.2f}"]
                 for a, b, p in zip(label, chosen, probability)]
    else:
        scaled = (scored.outputs - table.target[rows]) / np.nanstd(table.target, axis=0)
        error = np.sqrt(np.nanmean(scaled ** 2, axis=1))
        worst = [int(np.nanargmax(np.abs(each))) for each in scaled]
        lines = [[f"rms error {e:.2f} sd", f"{table.names[w]}: true {table.target[row, w]:.2f}, predicted {out[w]:.2f}"]
                 for e, w, row, out in zip(error, worst, rows, scored.outputs)]

    def case(i):
        frames = study.frames(rows[i])
        return {"image": np.asarray(frames[len(frames) // 2]), "title": table.clip_ids[rows[i]], "lines": lines[i]}
    order = np.argsort(error, kind="stable")
    return [reporting.html_text("Best:"), reporting.html_cases([case(i) for i in order[:count]]),
            reporting.html_text("Worst:"), reporting.html_cases([case(i) for i in order[::-1][:count]])]


def limits_text(args, study, metrics):
    """What a reader must not conclude from this run, as a list."""
    lines = ["Valid for clips like these, labelled by people like these; nothing else was tested."]
    if not metrics["held_out"]:
        lines.append("The epoch was chosen on the rows that are scored here, so the numbers are optimistic; give a "
                     "test part, or --select last with a fixed number of epochs.")
    if study.table.groups is None:
        lines.append("No --group_column: one animal, pen or scene may stand on both sides of the split.")
    elif args.split_by in ("event", "video"):
        lines.append(f"Split by {args.split_by}: the same animals and places are on both sides, so nothing is said of "
                     "new ones.")
    if not args.pretrained and not args.weights:
        lines.append("Started from random weights; published weights usually do far better on data of this size.")
    return "\n".join(f"- {line}" for line in lines)


def fold_rows_of(folds):
    """Fold table: one dict per fold, then mean and SD over the folds."""
    rows = [{"fold": fold["fold"], "rows": fold["rows"], "best_epoch": fold["best_epoch"], **fold["metrics"]}
            for fold in folds]
    values = {name: np.array([row[name] for row in rows], float) for name in folds[0]["metrics"]}
    mean = {name: np.nanmean(v) if np.isfinite(v).any() else math.nan for name, v in values.items()}
    sd = {name: np.nanstd(v, ddof=1) if np.isfinite(v).sum() > 1 else math.nan for name, v in values.items()}
    return [*rows, {"fold": "mean", **mean}, {"fold": "SD", **sd}]


# --- one run, or one run per fold -------------------------------------------------------------

def prepare_split(run, args, study, split):
    """Write splits.json and the leakage report; refuse a split that leaks events, copies or the groups it keeps whole."""
    audits = [study.audit(row) for row in range(len(study.table))]
    phash = np.array([audit.phash for audit in audits], dtype=np.uint64)
    report = event_audit.audit_table(study.table, split, [audit.pixel_sha for audit in audits], phash,
                                     gap_sec=args.gap_sec)
    keeps_groups = args.group_column and args.split_by in (None, "group")
    stopping = splitting.STOPPING_LEAKS if keeps_groups else ("events", "exact_duplicates")
    splitting.record_split(run, split, study.table.clip_ids, report, stopping)


def run_split(run, args, study, split):
    """Train and score one split; returns {part: Scored} of the held-out rows."""
    prepare_split(run, args, study, split)
    if args.dry_run:
        split = {part: some_of(study, rows, 2 * args.batch_size) for part, rows in split.items()}
    if study.pooled is None:
        prepare_features(run, args, study)
    run.write_args(**study.record(split))
    outputs, training, objective = fit(run, args, study, split)
    study.positive = getattr(objective, "positive", None)
    scored, calibration = {}, None
    if args.task == "classify":
        calibration = calibrate(outputs["val"], objective.label[split["val"]], objective.positive)
        common.write_json(run.path("calibration.json"), calibration)
    for part in ("val", "test"):
        if len(split[part]):
            rows = split[part]
            fitted = [calibration] * len(rows) if calibration and part == "test" else None
            scored[part] = Scored(rows, outputs[part], baselines(study, split["train"], rows), part,
                                  [(split["train"], rows)], fitted)
            write_predictions(run.path(f"predictions_{part}.csv"), study, scored[part])
    plotting.plot_history(plotted(training.progress.history, objective), run.path("training_history.png"), training.progress.best_epoch)
    gaps = [objective.history(outputs[part], split[part]) for part in ("train", "val")]
    alarms = verdicts.split_gap_alarms(*gaps, "roc_auc" if args.task == "classify" else "pearson_r")
    report_results(run, args, study, split, scored.get("test", scored["val"]), alarms, training.progress.best_epoch)
    return scored


def plotted(history, objective):
    """The history without what would crowd the plot: of classes only the positive one, one of several like metrics."""
    others = [f"val_{name}_" for name in objective.names if name != objective.names[getattr(objective, "positive", 0)]]
    left_out = (*others, "val_ece_adaptive", "val_brier", "val_mcc", "val_mse")
    return [{name: value for name, value in row.items() if not name.startswith(left_out)} for row in history]


def some_of(study, rows, count):
    """A few rows for a dry run, of every class."""
    if study.table.target is not None:
        return rows[:count]
    turn = np.zeros(len(rows), int)
    for c in range(len(study.table.names)):
        here = study.table.label[rows] == c
        turn[here] = np.arange(here.sum())
    return np.sort(rows[np.argsort(turn, kind="stable")[:count]])


def folds_of(args, study):
    """List of {train, val, test} rows: from --cv_file, or dealt out by groups; the test groups stay outside."""
    table = study.table
    kept = event_tables.group_mask(table, args.test_groups) if args.test_groups else np.zeros(len(table), bool)
    test, rest = np.flatnonzero(kept), np.flatnonzero(~kept)
    if args.cv_file:
        folds = score_tables.read_cv_file(args.cv_file, table)
        return [{"train": np.setdiff1d(fold["train"], test), "val": np.setdiff1d(fold["val"], test), "test": test}
                for fold in folds]
    fold_of = splitting.make_folds(len(rest), args.folds, study.strata[rest], split_units(args, study)[rest], args.seed,
                                table.clip_ids[rest])
    return [{"train": rest[fold_of != k], "val": rest[fold_of == k], "test": test} for k in range(args.folds)]


def split_units(args, study):
    """(N,) what a split keeps whole: by --split_by, else the coarsest unit there is."""
    return event_tables.split_keys(study.table, args.split_by)


def split_of(args, study):
    """The split of the flags: by the manifests' parts, by --test_groups, by ratios or from --split_file."""
    table, parts = study.table, study.table.parts
    if (parts != "").any():
        split = {part: np.flatnonzero(parts == part) for part in ("train", "val", "test")}
        return split if len(split["val"]) else {**split, **part_of_train(args, study, split["train"])}
    units = split_units(args, study)
    if args.test_groups:
        kept = event_tables.group_mask(table, args.test_groups)
        return {**part_of_train(args, study, np.flatnonzero(~kept)), "test": np.flatnonzero(kept)}
    return splitting.split_of_flags(args, table.clip_ids, study.strata, units)


def part_of_train(args, study, rows):
    """train and val cut from these rows by their ratios."""
    share = args.val_ratio / (args.train_ratio + args.val_ratio)
    made = splitting.make_split(len(rows), {"train": 1 - share, "val": share}, study.strata[rows],
                             split_units(args, study)[rows], args.seed, study.table.clip_ids[rows])
    return {part: rows[places] for part, places in made.items()}


def run_folds(run, args, study):
    """One run per fold in fold_K/, then the out-of-fold outputs pooled and scored as one; the ensemble on test rows."""
    folds = folds_of(args, study)
    parts = {f"fold_{k}": fold["val"] for k, fold in enumerate(folds)}
    parts |= {"test": folds[0]["test"]} if len(folds[0]["test"]) else {}
    prepare_split(run, args, study, parts)
    prepare_features(run, args, study)
    run.write_args(**study.record(parts))
    results, done = [], []
    for k in range(len(folds)) if args.fold == "all" else [args.fold]:
        with run.child(f"fold_{k}") as child:
            if child.path("metrics.json").exists():
                child.say(f"fold {k} is finished")
                results.append(finished_fold(child, study, folds[k]))
            else:
                results.append(run_split(child, args, study, folds[k]))
            metrics = common.read_json(child.path("metrics.json"))
        done.append({"fold": k, "rows": len(results[-1]["val"].rows), "best_epoch": metrics["best_epoch"],
                     "metrics": fold_metrics(study, results[-1]["val"])})
    common.write_table(run.path("fold_table.csv"), fold_rows_of(done))
    write_fold_moments(run, study, done, results)
    pooled = pool([result["val"] for result in results], study)
    write_predictions(run.path("predictions_folds.csv"), study, pooled)
    alarms = verdicts.identical_fold_alarms([list(fold["metrics"].values()) for fold in done])
    report_results(run, args, study, parts, pooled, alarms, folds=done)
    if len(folds[0]["test"]):
        with run.child("test_ensemble") as child:
            score_ensemble(child, args, study, parts, [result["test"] for result in results])


def finished_fold(run, study, fold):
    """{part: Scored} of a fold that is done, from its files."""
    calibration = common.read_json(run.path("calibration.json")) if study.table.target is None else None
    if study.table.target is None:
        study.positive = study.table.names.index(common.read_json(run.path("metrics.json"))["positive_class"])
    return {part: read_predictions(run.path(f"predictions_{part}.csv"), study, fold, part,
                                   calibration if part == "test" else None)
            for part in ("val", "test") if len(fold[part])}


def fold_metrics(study, scored):
    """{name: number} of one fold for the fold table."""
    if study.table.target is None:
        names, label = study.table.names, study.table.label[scored.rows]
        values = common.classification_metrics(common.softmax(scored.outputs), label, names=names,
                                               positive=study.positive)
        wanted = ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "loss", "ece")
        return {name: values[name] for name in [*wanted, f"{names[study.positive]}_average_precision"]}
    means = common.mean_metrics(common.regression_metrics(scored.outputs, study.table.target[scored.rows]))
    return {name: means[name] for name in ("mae", "rmse", "r2", "pearson_r")}


def write_fold_moments(run, study, done, results):
    """fold_scores.csv: n, MAE, RMSE, R2 and r of every fold, score and moment ('all' and each level)."""
    if study.table.target is None:
        return
    rows = []
    for fold, result in zip(done, results):
        scored = result["val"]
        values = common.regression_metrics(scored.outputs, study.table.target[scored.rows])
        rows += [{"fold": fold["fold"], "moment": "all", "target": name, **{k: v[r] for k, v in values.items()}}
                 for r, name in enumerate(study.table.names)]
        rows += [{"fold": fold["fold"], **row} for row in moment_rows(study, scored)]
    common.write_table(run.path("fold_scores.csv"), rows)


def pool(results, study):
    """Scored of all folds as one; each fold's calibration is fitted on the other folds' rows."""
    calibration = None
    if study.table.target is None and len(results) > 1:
        calibration = []
        for k, own in enumerate(results):
            others = [other for j, other in enumerate(results) if j != k]
            logits, rows = (np.concatenate([getattr(other, name) for other in others]) for name in ("outputs", "rows"))
            calibration += [calibrate(logits, study.table.label[rows], study.positive)] * len(own.rows)
    return Scored(np.concatenate([s.rows for s in results]), np.concatenate([s.outputs for s in results]),
                  {name: np.concatenate([s.baselines[name] for s in results]) for name in results[0].baselines},
                  "folds", [pair for s in results for pair in s.trained_on], calibration)


def score_ensemble(run, args, study, parts, members):
    """The mean of all folds' models on the test groups, which none of them has seen, in its own run folder."""
    first = members[0]
    train, calibration = np.setdiff1d(np.arange(len(study.table)), first.rows), None
    if study.table.target is None:  # as predict does: the mean of probabilities that are calibrated already
        probability, threshold = (np.mean(each, axis=0) for each in zip(*map(calibrated, members)))
        outputs, calibration = np.log(probability), [{"temperature": 1.0, "threshold": each} for each in threshold]
    else:
        outputs = np.mean([member.outputs for member in members], axis=0)
    scored = Scored(first.rows, outputs, baselines(study, train, first.rows), "test", [(train, first.rows)],
                    calibration)
    prepare_split(run, args, study, {"train": train, "test": first.rows})
    write_predictions(run.path("predictions_test.csv"), study, scored)
    report_results(run, args, study, {"train": train, "test": first.rows}, scored, [])


# --- the other modes -------------------------------------------------------------------------

def load_members(paths, compute):
    """Checkpoints or run folders -> [(model in eval mode, its content, its flags)]. UserError where they differ."""
    members, files = [], common.checkpoint_files(paths)
    for path in files:
        content = common.load_model_file(path, common.script_name())
        with common.checkpoint_fields(path):
            flags = argparse.Namespace(**content["architecture"], seed=0, pretrained=False, weights=None,
                                       freeze_stages=0, freeze_norm=False)
            model = build_model(flags, len(content["names"]))
        common.load_state(model, content["model"], path)
        members.append((compute.place(model).eval(), content, flags))
    first = members[0]
    for path, (_, content, flags) in zip(files, members):
        if content["names"] != first[1]["names"] or vars(flags)["task"] != first[2].task:
            raise common.UserError(f"{path} predicts {content['names']}, {files[0]} {first[1]['names']}; members of "
                                   "one mean must agree")
    return members


def run_predict(args):
    """--mode predict: one row for every row of the manifest, in its order; the mean over the checkpoints."""
    compute = common.choose_compute(args.device, args.use_amp)
    members, per_member, study = load_members(args.checkpoint, compute), [], None
    names = members[0][1]["names"]
    for model, content, flags in members:
        given = {name: getattr(args, name) for name in ("clips_per_event", "aggregation") if name in args.given}
        merged = argparse.Namespace(**{**vars(args), **vars(flags), **given, "jitter_sec": 0.0})
        if study is None or any(getattr(study.args, name) != getattr(merged, name)
                                for name in ("image_size", "n_frames", "fps")):
            study = load_study(merged, lambda text: print(text, flush=True), names=names, need_labels=False)
        study.args = merged
        loader = common.make_loader(Clips(study, np.arange(len(study.table)), Unlabelled(study), merged, False),
                                    args.val_batch_size, merged, compute, False, study.store.cache == "ram")
        per_member.append((evaluate(model, loader, merged, compute), content))
    output = args.output or Path("predictions.csv")
    common.write_table(output, prediction_rows(study, per_member))
    print(f"{len(study.table)} clips predicted by {len(members)} checkpoint(s), {len(study.skipped)} rows skipped; "
          f"written to {output}")
    for entry in study.skipped:
        print(f"skipped: {entry['row']}: {entry['reason']}")


class Unlabelled:
    """Stands for a task where there is nothing to learn: targets and weights that nobody reads."""

    def __init__(self, study):
        self.target, self.weight = torch.zeros(len(study.table), 1), torch.ones(len(study.table))


def prediction_rows(study, per_member):
    """One dict per clip: scores (and their spread over members), or label, probabilities and logits."""
    table, names = study.table, study.table.names
    keys = {"clip_id": table.clip_ids} | ({} if study.clusters is None else {"group": study.clusters})
    if table.target is not None:
        stacked = np.stack([outputs for outputs, _ in per_member])  # (members, N, R)
        blocks = {"true": table.target, "predicted": stacked.mean(0)}
        blocks |= {"sd": stacked.std(0, ddof=1)} if len(per_member) > 1 else {}
        columns = {f"{name}_{kind}": block[:, r] for r, name in enumerate(names) for kind, block in blocks.items()}
    else:
        shifted = [outputs + content["prior_shift"] for outputs, content in per_member]  # members x (N, C)
        logits = np.mean(shifted, axis=0)
        fitted = [content.get("calibration", UNCALIBRATED) for _, content in per_member]
        probability = np.mean([common.softmax(each / own["temperature"]) for each, own in zip(shifted, fitted)], axis=0)
        cuts = [own["threshold"] for own in fitted]
        threshold = None if None in cuts else np.mean(cuts)
        chosen = common.predicted_class(probability, threshold, names.index(per_member[0][1]["positive"]))
        spelled = np.array([*names, ""])
        keys |= {"event": table.events, "true_label": spelled[table.label], "pred_label": spelled[chosen]}
        columns = {f"{kind}_{name}": block[:, c] for kind, block in (("prob", probability), ("logit", logits))
                   for c, name in enumerate(names)}
        columns |= {} if threshold is None else {"threshold": np.full(len(table), threshold)}
        columns["n_clips"] = [len(study.starts(row)) for row in range(len(table))]
    return [dict(zip([*keys, *columns], row)) for row in zip(*keys.values(), *columns.values())]


def run_evaluate(args):
    """--mode evaluate: metrics with intervals of a predictions CSV, without model or video."""
    is_classes = any(column.startswith("prob_") for column in csv_tables.read_table(args.predictions))
    metrics = evaluate_classes(args) if is_classes else evaluate_scores(args)
    output = args.output or Path("metrics.json")
    common.write_json(output, metrics)
    for alarm in metrics["alarms"]:
        print(f"ALARM: {alarm}")
    for bar in metrics["criteria"]:
        print(f"{bar['verdict']}: {bar['name']} {bar['relation']} {bar['bar']:g}, found {bar['value']:.4g}")
    print(f"written to {output}")


def evaluate_classes(args):
    """Metrics of a predictions CSV of classes, as run_evaluate writes them."""
    found = prediction_tables.read_probabilities(args.predictions)
    names, labelled = found.names, found.label >= 0
    if not labelled.any():
        raise common.UserError(f"--predictions {args.predictions}: no row has a true_label, nothing to score")
    counts = np.bincount(found.label[labelled], minlength=len(names))
    positive = names.index(positive_class(args.positive_class, names, np.where(counts, counts, len(found.label))))
    result, baseline = judge_classes(found.probability, found.label, names, positive, found.groups, found.baselines,
                                     found.threshold)
    print_values(result, [*common.CLASSIFICATION_METRICS, *(f"{n}_{m}" for n in names for m in common.CLASS_METRICS)])
    criteria = verdicts.parse_criteria(args.criteria, list(common.classification_names(names)))
    return {"positive_class": names[positive], "baseline": baseline,
            "decisions": decision_metrics(found.chosen[labelled], found.label[labelled], names, positive),
            "null_ece": calibrating.expected_ece(found.probability[labelled].max(1)),
            **{key: result[key] for key in ("value", "interval", "confusion", "n", "sign_flip_p", "method")},
            "alarms": verdicts.classification_alarms(found.probability, found.label, names, found.threshold, positive),
            "criteria": verdicts.judge_criteria(criteria, *verdicts.classification_values(result, names))}


def evaluate_scores(args):
    """Metrics of a predictions CSV of scores, as run_evaluate writes them."""
    table = csv_tables.read_table(args.predictions)
    names = [column.removesuffix("_predicted") for column in table if column.endswith("_predicted")]
    if not names or f"{names[0]}_true" not in table:
        raise common.UserError(f"--predictions {args.predictions}: expected columns NAME_true and NAME_predicted, "
                               f"found {common.shorten_list(table.columns, 40)}")
    _, values = prediction_tables.read_target_table(args.predictions, "clip_id", names)
    groups = table["group"].to_numpy(str) if "group" in table else None
    others = {kind: each for kind, each in values.items() if kind not in ("true", "predicted", "sd")}
    if others:
        result, baseline = subject_intervals.score_regression(values["predicted"], values["true"], groups, others)
    else:
        result, baseline = subject_intervals.bootstrap_regression(values["predicted"], values["true"], groups), None
    numbers, intervals = verdicts.named_values(result, names)
    print_values(result, [f"mean_{name}" for name in common.REGRESSION_METRICS])
    return {"baseline": baseline, **{key: result[key] for key in ("value", "interval", "sign_flip_p", "method")},
            "alarms": verdicts.regression_alarms(values["predicted"], values["true"], names),
            "criteria": verdicts.judge_criteria(verdicts.parse_criteria(args.criteria, list(numbers)), numbers, intervals)}


def print_values(result, names):
    """One line for each metric: value, interval, the baseline's value."""
    print(f"{'metric':32}{'value':>9}   95 % interval    {'baseline':>9}   ({result['method']})")
    for name in names:
        low, high = (result["interval"] or {}).get(name, (math.nan,) * 2)
        other = result["value"].get(f"baseline_{name}", math.nan)
        print(f"{name[:31]:32}{float(result['value'][name]):9.3f}   [{low:6.3f}, {high:6.3f}]{other:12.3f}")


def run_audit(args):
    """--mode audit: what the parts share, what leaves its file, and what needs no pixels."""
    table = read_table_of(args)
    infos = {source: video_files.probe(source, args.fps) for source in dict.fromkeys(table.sources)}
    if (table.unit == "frame").any():
        fps = np.array([infos[source].fps or args.fps for source in table.sources])
        table = event_tables.seconds_of(table, fps, args.min_event_sec)
    parts = {"train": "train", "val": "val", "test": "test", "": "all"}
    split = {name: np.flatnonzero(table.parts == part) for part, name in parts.items()}
    durations = {path: info.duration_sec for path, info in infos.items() if not info.error}
    report = event_audit.audit_table(table, split, durations=durations, predictions=args.predictions,
                                     positive=args.positive_class, gap_sec=args.gap_sec)
    report["unreadable"] = {str(path): info.error for path, info in infos.items() if info.error}
    report["skipped"] = table.skipped
    output = args.output or Path("audit.json")
    common.write_json(output, report)
    print(splitting.leakage_text(report))
    for path, error in report["unreadable"].items():
        print(f"unreadable: {path}: {error}")
    print(f"{len(table.skipped)} rows skipped; written to {output}")


def say_effective_size(run, study):
    """What the data really hold, before anything else: rows, distinct labels, groups, rows of each class."""
    table = study.table
    size = splitting.effective_size(table.label if table.target is None else table.target, study.clusters)
    classes = "" if table.label is None else "; " + ", ".join(
        f"{(table.label == c).sum()} {name}" for c, name in enumerate(table.names))
    run.say(f"effective sample: {size['rows']} clips, {len(set(table.events))} events, "
            f"{size['distinct_label_vectors']} distinct label vectors, {size['subjects'] or 'no'} groups or "
            f"videos{classes}")


def run_train(args):
    """--mode train: one split, or all folds."""
    with common.start_run(args) as run:
        if args.model != ONLY_FRAMES and run.compute.device.type == "cpu":
            run.say(f"{args.model}: a 3-D network, computed in fp32 on a CPU; mixed precision needs a GPU")
        study = load_study(args, run.say, run.path("skipped.csv"))
        say_effective_size(run, study)
        verdicts.parse_criteria(args.criteria, criteria_names(study))
        TASKS[args.task](args, study.table, np.arange(len(study.table))).select(args.select)
        augment_presets(study.table, args.augment_for, args.augment, tuple(common.AUGMENTATIONS))
        if args.init_from:
            common.starting_weights(args.init_from, names=study.table.names)
        if args.folds or args.cv_file:
            run_folds(run, args, study)
        else:
            run_split(run, args, study, split_of(args, study))


def main():
    args = parse_args()
    {"train": run_train, "predict": run_predict, "evaluate": run_evaluate, "audit": run_audit}[args.mode](args)


if __name__ == "__main__":
    common.run_main(main)
