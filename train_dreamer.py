"""Guide a probe: read the motion that is still missing to the target view off a frame, or (--token_type channel) off
the frame that a world model imagines after a known motion.

    python train_dreamer.py --data_dir data/processed --output_dir outputs
    python train_dreamer.py --data_dir data/processed --dry_run
    python train_dreamer.py --mode audit --data_dir data/processed
    python train_dreamer.py --mode evaluate --checkpoint outputs/run_X/best_model.pth
    python train_dreamer.py --mode predict --checkpoint outputs/run_X/best_model.pth --data_dir new_frames

Reads every transitions_dataset.json under --data_dir, one a sequence. Writes outputs/run_YYYYMMDD_HHMMSS/: report.html
(open it first), best_model.pth, final_model.pth, metrics.json, predictions_<part>.csv, per_axis_error.csv,
per_patient_error.csv and .png, skipped.csv, dataset_stats.json, dataset_statistics.png, training_summary.png,
training_history.csv and .png, splits.json, leakage_report.json, args.json, log.txt. With --folds K the same in each
fold_K/, patients left out in turn.

Where a score comes from: judge() hands the predictions of at1 for the test rows, else for the val rows, to
evidence/pose_judging.py: the mean absolute error of each axis in mm or degrees, angles wrapped at 180, and its mean
over the axes in sds of the labels, which the verdict compares with the best baseline.

Letters: N transitions, M transitions scored, B batch, F channels of the encoder, G cells of its feature map, K tokens,
P features of a frame on grids, D width of a token, S side of a frame in pixels. Units: a pose or motion is (x, y, z,
roll, pitch, yaw), mm and degrees, everywhere; frames are uint8 grey until they reach the model.
at1, at2: the motion asked for at t1 and t2 (at1_6dof, at2_6dof); motion: the known one from t1 to t2.
"""
import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import common
from evidence import (
    baseline_models, judging, plotting, pose_audit, pose_judging, pose_scores, prediction_tables, reporting,
    row_warnings, seen_rows, splitting, verdicts)
from readers import backbones, picture_files, probe_poses

GRIDS = (2, 4)  # cells a side over which the readout averages feature maps
TIME_BLOCKS = 10  # of each sequence, for the inner folds of a single patient
# What evaluate and predict take from the checkpoint:
MODEL_FLAGS = "encoder image_size token_type d_model n_layers n_heads feedforward dropout compose".split()
# and from the args.json beside it:
ENCODER_FLAGS = {"seed", "weights"}
PATIENT_FLAGS = {"patient_map", "patient_regex"}  # unless one is given
DATA_FLAGS = {"data_dir", "max_transitions", "split_by", "angle_unit", "euler_order"}  # unless --data_dir is given
# What --augment changes in both frames of a transition alike:
LARGEST_TURN = {"light": 0.0, "full": 5.0}  # degrees
JITTER = 0.1  # of brightness and contrast, as a share
NOISE_SD = 2.55  # grey levels


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_shared_arguments(
        parser, epochs=150, batch_size=16, lr=2e-4, patience=20, save_top_k=3, augment="none",
        augments=("none", *LARGEST_TURN), val_ratio=0.15, test_ratio=0.15)
    add_data_arguments(parser.group("transitions and patients"))
    add_model_arguments(parser.group("model"))
    add_world_model_arguments(parser.group("world model: --token_type channel or spatial"))
    first = common.parse_arguments(parser, argv)  # on which some defaults depend
    parser.set_defaults(**dependent_defaults(first))
    args = common.parse_arguments(parser, argv)
    splitting.check_flags(parser, args)
    check_flags(parser, args)
    return args


def add_data_arguments(add):
    """Which transitions, whose, and how they are split."""
    add("--mode", choices=("train", "evaluate", "predict", "audit"), default="train",
        help="evaluate: score a checkpoint; predict: no labels needed; audit: examine the data (audit.json)")
    add("--data_dir", type=Path, default=Path("data/processed"), may_change=True,
        help=f"folder with a {probe_poses.FILE_NAME} in each sequence")
    add("--checkpoint", type=common.best_model_of, metavar="FILE",
        help="best_model.pth (or its run folder) for evaluate and predict")
    add("--patient_map", type=Path, metavar="FILE", may_change=True,
        help="JSON or CSV that says which patient a folder belongs to")
    add("--patient_regex", metavar="REGEX",
        help=r"patient = its first group in the folder's name, e.g. '(.*)_\d+$'")
    add("--angle_unit", choices=("auto", "deg", "rad"), default="auto",
        help="unit of the angles in the files")
    add("--euler_order", choices=("auto", *probe_poses.EULER_ORDERS), default="auto",
        help="order of the turns in the files' angles, zyx: R = Rz Ry Rx; auto = zyx, unless another one alone fits")
    add("--compose", choices=("auto", *probe_poses.CONVENTIONS), default="auto",
        help="how at1 and motion give at2: sum, T(motion) T(at1), T(at1) T(motion); auto = what fits the data")
    add("--split_by", choices=("patient", "time"), default="patient",
        help="time: blocks of each sequence, for a single one; says nothing across patients")
    add("--gap", type=common.POSITIVE, default=10,
        help="transitions left out between two blocks of time")
    add("--manual_splits", action="store_true",
        help="split by the three lists below")
    for part in splitting.PARTS:
        add(f"--{part}_patients", metavar="A,B",
            help=f"patients or folders of the {part} part, separated by commas")
    add("--max_transitions", type=common.WHOLE, default=0,
        help="use only the first transitions of every sequence; 0 = all")


def add_model_arguments(add):
    """Encoder, kind of model, loss and choice of the epoch."""
    add("--encoder", "--backbone", "--model", default="resnet34",
        help="resnet18, resnet34, ... of torchvision; for --token_type none any classifier with feature maps")
    add("--image_size", "--img_size", type=common.SIDE, default=224,
        help="side of a frame in pixels")
    add("--token_type", choices=("none", "channel", "spatial"), default="none",
        help="none: at1 is read off the frame at t1, by a solved readout of a frozen encoder and what training adds; "
             "else the world model, channel: with a token per feature channel (512), as published; "
             "spatial: with one per cell of the feature map (49), cheaper")
    add("--dropout", type=common.DROPOUT, default=0.1,
        help="on residual and feed-forward paths; inside attention it is 0, which lets the fused kernel run")
    add("--smooth_l1_beta", type=common.AMOUNT, default=1.0,
        help="error, in label sds, from which the loss on a pose grows linearly")
    add("--select", choices=("main_task_loss", "last"), default="main_task_loss",
        help="validation column that chooses the epoch; last = no choice, so that validation stays unseen")
    use_amp = {"32": "off", "16": "on", "bf16": "on"}
    add("--precision", dest="use_amp", type=lambda word: use_amp.get(word, word), choices=("on", "off"),
        metavar="{32,16,bf16}", help="alias: 32 = --use_amp off, 16 and bf16 = --use_amp on")


def add_world_model_arguments(add):
    """Tokens, transformer, training of the encoder and losses that a readout of the frame at t1 has not."""
    add("--d_model", type=common.POSITIVE, default=768,
        help="width of a token")
    add("--n_layers", "--num_layers", type=common.POSITIVE, default=6,
        help="transformer layers")
    add("--n_heads", "--num_heads", type=common.POSITIVE, default=12,
        help="attention heads; they divide d_model")
    add("--feedforward", type=common.POSITIVE, default=3072,
        help="width of the feed-forward layers")
    add("--freeze_layers", type=common.bounded(int, 0, 5), default=0,
        help="first stages of the encoder (stem, then four) that are not trained; 5 = none is")
    add("--backbone_lr_mult", type=common.AMOUNT, default=1.0,
        help="learning rate of the encoder over --lr")
    add("--lambda_t2_action", type=common.AMOUNT, default=1.0,
        help="weight of the loss on at2")
    add("--lambda_latent", type=common.AMOUNT, default=0.2,
        help="weight of the loss on imagined features")
    add("--primary_task_only", action="store_true",
        help="train on at1 alone: both weights 0")


def check_flags(parser, args):
    """parser.error for flags that contradict each other."""
    lists = [args.train_patients, args.val_patients, args.test_patients]
    if args.manual_splits != any(lists) or (args.manual_splits and not all(lists[:2])):
        parser.error(f"--manual_splits needs --train_patients and --val_patients, and they need it; found {lists}")
    if args.manual_splits and (args.folds or args.split_file or args.split_by == "time"):
        parser.error("--manual_splits makes its own split: no --folds, --split_file or --split_by time")
    if args.folds and args.select != "last" and not args.val_ratio:
        parser.error(f"--folds {args.folds} --val_ratio 0: rows of the train part choose the epoch, or --select last")
    if args.token_type != "none" and not re.match("(wide_)?resnex?t", args.encoder):
        parser.error(f"--encoder {args.encoder}: --token_type {args.token_type} needs a "
                     "torchvision ResNet such as resnet34")
    if args.patient_map and args.patient_regex:
        parser.error(f"--patient_map {args.patient_map} and --patient_regex {args.patient_regex!r}: give one")
    if args.group_column:
        parser.error(f"--group_column {args.group_column}: transitions have no columns; see --patient_map")
    if args.d_model % (2 * args.n_heads):
        parser.error(f"--d_model {args.d_model} is no multiple of 2 x --n_heads {args.n_heads}")
    if bool(args.checkpoint) != (args.mode in ("evaluate", "predict")):
        parser.error(f"--mode {args.mode}: evaluate and predict need --checkpoint FILE, the others "
                     "take none (training starts from its weights with --init_from)")
    try:
        re.compile(args.patient_regex or "")
    except re.error as error:
        parser.error(f"--patient_regex {args.patient_regex!r} is no regular expression: {error}")


def dependent_defaults(args):
    """{flag: default} of flags whose default depends on another flag."""
    defaults = {}
    if args.folds:
        defaults["test_ratio"] = 0.0
    if args.mode == "audit":
        defaults["on_bad_file"] = "skip"  # an audit lists them all
    if args.checkpoint:
        defaults |= flags_of_run(args)
    return defaults


def flags_of_run(args):
    """Flags that evaluate and predict take over from the run folder that the checkpoint still lies in."""
    path = args.checkpoint.with_name("args.json")
    flags = common.read_json(path).get("flags", {}) if path.is_file() else {}
    names = set(ENCODER_FLAGS)
    if "data_dir" not in args.given:
        names |= DATA_FLAGS
        if not PATIENT_FLAGS & args.given:
            names |= PATIENT_FLAGS
    return {name: flags[name] for name in names if flags.get(name) is not None}


# --- data: row on disk -> table -> sample ---------------------------------------------------

@dataclasses.dataclass(kw_only=True)
class Study:
    """What is known of N transitions, in the order of the files; poses (N, 6) in mm and degrees, NaN = missing."""
    names: np.ndarray  # (N,) text, sequence/frame_t1-frame_t2
    sequences: np.ndarray  # (N,) text
    patients: np.ndarray  # (N,) text
    has_patients: bool  # False: nobody said which patient a folder belongs to
    order: np.ndarray  # (N,) position within its sequence, from 0
    at1: np.ndarray  # (N, 6) motion asked for at t1
    motion: np.ndarray  # (N, 6) known motion from t1 to t2
    at2: np.ndarray  # (N, 6) motion asked for at t2
    compose: str  # a key of probe_poses.CONVENTIONS
    angle_unit: str  # deg or rad, in the files
    euler_order: str  # in the files
    residuals: list  # a dict per convention
    store: picture_files.ImageStore
    frames: np.ndarray  # (N, 2) index of both frames in the store, -1 = none; t1 twice without t2
    skipped: list  # dicts of sequence, row and reason
    notes: list
    grids: np.ndarray | None = None  # (frames in the store, P) of the untuned encoder
    blocks: dict | None = None  # {name: columns of the grids}

    def picture(self, index):
        """uint8 (S, S, 3) of a frame in the store, cut square from the middle."""
        return common.eval_crop(self.store[index], self.store.short_side)

    def frame_audit(self, field):
        """One field of the audit of every picture in the store, such as pixel_sha."""
        return [getattr(found, field) for found in self.store.audit]

    @property
    def hashes(self):
        """(N, 4) content_hashes of the frames of the rows: a row is seen where one of its frames is."""
        return self.store.hashes[self.frames].reshape(len(self.frames), -1)

    @property
    def label_sd(self):
        """(6,) sd of at1."""
        return probe_poses.centre_and_spread(self.at1)[1]

    @property
    def poses(self):
        """{at1, motion, at2: (N, 6)}"""
        return {name: getattr(self, name) for name in probe_poses.FIELDS}

    @property
    def unit(self):
        """What a group is: a patient, or a folder where nobody said whose it is."""
        return "patients" if self.has_patients else "folders"

    def inner_groups(self, rows):
        """(n,) names of what an inner fold never cuts: patients, or blocks of time where there is but one."""
        patients = self.patients[rows]
        if len(set(patients)) > 1:
            return patients
        blocks = (TIME_BLOCKS * self.place[rows]).astype(int).clip(max=TIME_BLOCKS - 1)
        return np.char.add(self.sequences[rows], blocks.astype(str))

    def grids_at_t1(self, rows):
        """(n, P) of the frames at t1."""
        return self.grids[self.frames[rows, 0]]

    @property
    def place(self):
        """(N,) position within its sequence, 0 for its first row to 1 for its last."""
        import pandas as pd
        last = pd.Series(self.order).groupby(self.sequences).transform("max")
        return self.order / last.clip(lower=1).to_numpy()

    def data_record(self, split):
        """What args.json says of the data and their split; a resumed run must find the same."""
        contents = [*self.names, *self.patients, *self.poses.values(), self.compose, *self.frame_audit("file_sha")]
        return common.data_record(
            contents, split,
            transitions=len(self.names),
            patients=len(set(self.patients)),
            compose=self.compose)


def load_study(args, run, needs_labels=True, needs_frames=True, usual=None):
    """Transitions of every sequence, checked and completed; what cannot be used is counted, for skipped.csv.

    needs_labels False: rows without at1, at2, a frame at t2 or a motion that nothing is imagined
    from are kept, for prediction. needs_frames False: rows whose pictures are missing are listed
    and kept, for the audit of their poses. usual: angle_unit, euler_order and compose of the data
    that a model was trained on.
    """
    rows, matching = probe_poses.find_transitions(args.data_dir, args.max_transitions, args.exact_names)
    poses, facts = probe_poses.complete_rows(rows, args.angle_unit, args.compose, args.euler_order, usual or {})
    facts["notes"] += matching
    imagines = args.token_type != "none"
    without_frame = probe_poses.missing_frames(rows, needs_labels, imagines)
    without_pose = probe_poses.missing_poses(poses, needs_labels, imagines)
    reasons = [frame or pose for frame, pose in zip(without_frame, without_pose)]  # for skipped.csv
    to_drop = reasons if needs_frames else without_pose
    refuse_unusable(args, rows, to_drop)
    owner = probe_poses.patients_of([row.sequence for row in rows], args.patient_map, args.patient_regex)
    usable = np.flatnonzero([not reason for reason in to_drop])
    store, frames, is_good = decode_frames(args, run, [rows[i] for i in usable])
    for i in usable[~is_good]:
        reasons[i] = "unreadable picture"
    if needs_frames:
        refuse_unusable(args, rows, reasons)

    places = usable[is_good]
    kept = [rows[i] for i in places]
    sequences = np.array([row.sequence for row in kept])
    study = Study(
        names=probe_poses.unique_names([row.name for row in kept]),
        sequences=sequences,
        patients=np.array([owner[name] for name in sequences]),
        has_patients=bool(args.patient_map or args.patient_regex),
        order=np.array([row.number - 1 for row in kept]),
        store=store,
        frames=frames[is_good],
        skipped=[{"sequence": row.sequence, "row": row.number, "reason": reason}
                 for row, reason in zip(rows, reasons) if reason],
        **{name: values[places] for name, values in poses.items()},
        **facts)
    say_study(run, study)
    return study


def decode_frames(args, run, rows):
    """n Transitions -> (ImageStore of their frames; (n, 2) index in it of t1 and t2; (n,) bool, True = both read)."""
    paths, frames = probe_poses.different_frames(rows)
    run.say(f"decoding {len(paths)} different frames")
    store = picture_files.ImageStore(paths, args.image_size, args.cache, args.pixel_range)
    good = picture_files.check_bad_files(store.audit, args.on_bad_file)
    return store, frames, np.isin(frames, [-1, *good]).all(1)


def refuse_unusable(args, rows, reasons):
    """UserError where pictures are missing and --on_bad_file does not skip them, or where no row is left."""
    missing = [f"{row.sequence} row {row.number}: {reason}" for row, reason in zip(rows, reasons)
               if reason.startswith("no file")]
    if missing and args.on_bad_file == "error":
        raise common.UserError(f"{len(missing)} transitions name pictures that are not there: "
                               f"{common.shorten_list(missing)}. Add them, or pass --on_bad_file skip.")
    if all(reasons):
        raise common.UserError(f"--data_dir {args.data_dir}: none of {len(rows)} transitions can "
                               f"be used (first: {reasons[0]})")


def say_study(run, study):
    """The data in a few lines."""
    patients = f"{len(set(study.patients))} patients" if study.has_patients else "patients unknown"
    run.say(f"data: {len(study.names)} transitions in {len(set(study.sequences))} sequences, {patients}; "
            f"{len(study.skipped)} rows skipped{' (listed in skipped.csv)' if study.skipped else ''}; "
            f"{study.store.description}")
    for row in study.residuals:
        run.say(f"composition {row['convention']:9} misses by {row['mm']:.4g} mm, {row['deg']:.4g} "
                f"degrees ({row['rows']} rows)")
    for note in study.notes:
        run.say(f"note: {note}")
    if not study.has_patients:
        run.say("WARNING: a folder is not a patient. Without --patient_map or --patient_regex each folder counts as "
                "one, and two folders of one patient may stand on two sides of a split.")
        for line in probe_poses.similar_names(study.sequences):
            run.say(f"  {line}")


def draw_augmentation(preset, generator):
    """common.Augmentation of a preset of LARGEST_TURN, from four numbers of a torch.Generator."""
    turn, brightness, contrast, seed = torch.rand(4, generator=generator).tolist()
    return common.Augmentation(
        rotation_deg=LARGEST_TURN[preset] * (2 * turn - 1),
        brightness=1 + JITTER * (2 * brightness - 1),
        contrast=1 + JITTER * (2 * contrast - 1),
        noise=(NOISE_SD, int(seed * 2 ** 31)))


@dataclasses.dataclass(eq=False)
class ProbeTransitions(common.Samples):
    """Samples of chosen rows; a key is (epoch, index), which seeds the augmentation.

    Each sample: frames uint8 (2, 1, S, S), or grids of the untuned encoder, float32
    (2, P), for a readout; motion, other_motion (that of another row), at1, at2 (6,)
    float32 in mm and degrees, NaN = missing; name.
    """
    study: Study
    rows: np.ndarray  # (M,)
    args: object
    augment: str  # none, or of LARGEST_TURN

    def __post_init__(self):
        self.poses = {name: torch.tensor(values[self.rows], dtype=torch.float32)
                      for name, values in self.study.poses.items()}
        shuffled = np.random.default_rng(self.args.seed).permutation(len(self.rows))
        other = np.roll(shuffled, 1)[shuffled.argsort()]  # of each row, the one before it in this order: never itself
        self.poses["other_motion"] = self.poses["motion"][other]

    def __getitem__(self, key):
        epoch, index = key
        row = int(self.rows[index])
        is_readout = self.args.token_type == "none"
        if is_readout and self.augment == "none" and self.study.grids is not None:
            frames = self.study.grids[self.study.frames[row]]  # (2, P)
        else:
            frames = self.pixels(epoch, row)
        poses = {name: values[index] for name, values in self.poses.items()}
        return {"frames": torch.from_numpy(frames), "name": self.study.names[row], **poses}

    def pixels(self, epoch, row):
        """Both frames of a row, uint8 (2, 1, S, S)."""
        frames = np.stack([self.study.picture(i) for i in self.study.frames[row]])  # (2, S, S, 3)
        if self.augment != "none":
            drawn = draw_augmentation(self.augment, common.generator_for(self.args.seed, epoch, row))
            frames = common.augment_clip(frames, drawn, self.args.image_size)
        return to_grey(frames)  # (2, S, S, 3) -> (2, 1, S, S)


def to_grey(frames):
    """uint8 (T, S, S, 3) RGB -> uint8 (T, 1, S, S) luma (ITU-R BT.601), unchanged where the three are equal."""
    import cv2
    side = frames.shape[1]
    tall = frames.reshape(-1, side, 3)
    return cv2.cvtColor(tall, cv2.COLOR_RGB2GRAY).reshape(-1, 1, side, side)


# --- model and loss ----------------------------------------------------------------------

class Imagined(NamedTuple):
    """What one pass gives: poses (B, 6) in mm and degrees, and features of t1 and of t2 as imagined.

    Features are maps (B, F, G); of a FrameReadout grids (B, P, 1) at t1 and None at t2.
    """
    at1: torch.Tensor
    at2: torch.Tensor
    features_t1: torch.Tensor
    features_t2: torch.Tensor | None = None


class GreyEncoder(nn.Module):
    """Base class: grey frames, uint8 (B, 1, S, S) -> features; features that were computed before pass unchanged.

    pixel_scale: mean and sd of the pixels, from 0 to 255, that the weights expect;
    without weights both are 127.5.
    """

    def __init__(self, args):
        super().__init__()
        mean = sd = 0.5
        if args.pretrained or args.weights:
            mean, sd = backbones.pixel_statistics(args.encoder, args.weights)
        scale = torch.tensor([255 * np.mean(mean), 255 * np.mean(sd)], dtype=torch.float32)
        self.register_buffer("pixel_scale", scale)

    def forward(self, frames):
        if frames.dtype != torch.uint8:
            return frames
        mean, sd = self.pixel_scale
        return self.extract((frames.float() - mean) / sd)


class GridEncoder(GreyEncoder):
    """Untuned backbone: uint8 grey frames (B, 1, S, S) -> (B, P), its maps averaged over grids, always in fp32."""

    def __init__(self, backbone, args):
        super().__init__(args)
        self.scales = backbones.MultiScale(backbone, args.image_size, GRIDS).requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # BatchNorm keeps its statistics

    def extract(self, frames):
        """(B, 1, S, S) float32, scaled -> (B, P)."""
        with common.in_fp32(frames):
            return self.scales(frames.expand(-1, 3, -1, -1))


class FrameReadout(nn.Module):
    """The motion asked for at t1, off the frame at t1: a solved linear layer on its grids, and what training adds.

    The correction begins at 0, so that the untrained model is the solved readout.
    """
    imagines = False

    def __init__(self, encoder, args, scaler, convention):
        super().__init__()
        self.encoder = encoder
        n_features = encoder.scales.n_features
        self.solved = nn.Linear(n_features, 6).requires_grad_(False)
        self.correction = nn.Sequential(
            nn.Linear(n_features, 256), nn.GELU(), nn.Dropout(args.dropout),
            nn.Linear(256, 6))
        set_to_zero(self.correction[-1])
        self.at2_from = probe_poses.CONVENTIONS[convention].at2
        self.register_buffer("grid_mean", torch.zeros(n_features))
        self.register_buffer("grid_sd", torch.ones(n_features))
        self.register_buffer("at1_sd", torch.as_tensor(scaler["at1"]["sd"], dtype=torch.float32))

    def scale_grids(self, grids):
        """Give the correction the scale of these grids (N, P)."""
        mean, sd = baseline_models.standardisation(grids, baseline_models.FEATURE_SD_FLOOR)
        self.grid_mean.copy_(torch.from_numpy(mean))
        self.grid_sd.copy_(torch.from_numpy(sd))

    def forward(self, frame_t1, motion):
        # uint8 (B, 1, S, S) or (B, P) of a frame, (B, 6) motion in mm and degrees
        grids = self.encoder(frame_t1)  # (B, P)
        with common.in_fp32(grids):
            correction = self.correction((grids - self.grid_mean) / self.grid_sd)  # (B, P) -> (B, 6)
            at1 = self.solved(grids) + self.at1_sd * correction
            return Imagined(at1, self.at2_from(at1, motion), grids[..., None])


class Encoder(GreyEncoder):
    """ResNet without its pooling and classifier: uint8 grey frames (B, 1, S, S) -> (B, F, G), G = (S / 32)^2.

    The kernel of the first layer is the sum of its RGB kernels, so that a grey picture
    gives what it gave as RGB.
    """

    def __init__(self, resnet, args):
        super().__init__(args)
        colour = resnet.conv1
        stem = nn.Conv2d(1, colour.out_channels, colour.kernel_size, colour.stride, colour.padding,
                         bias=False)
        stem.weight.data = colour.weight.data.sum(1, keepdim=True)
        self.stages = nn.Sequential(
            nn.Sequential(stem, resnet.bn1, resnet.relu, resnet.maxpool),
            resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        self.n_features = resnet.inplanes  # channels of its last stage
        self.n_cells = math.ceil(args.image_size / 32) ** 2
        self.freeze_layers = args.freeze_layers
        self.stages[:self.freeze_layers].requires_grad_(False)

    def extract(self, frames):
        """(B, 1, S, S) float32, scaled -> (B, F, G)."""
        return self.stages(frames).flatten(2)

    def train(self, mode=True):
        super().train(mode)
        self.stages[:self.freeze_layers].eval()  # BatchNorm keeps its statistics
        return self


def transformer_layer(args):
    """Layer on (B, K, D), normalised before each half, without dropout inside attention: one fused kernel."""
    layer = nn.TransformerEncoderLayer(
        args.d_model, args.n_heads, args.feedforward, args.dropout, "gelu", batch_first=True, norm_first=True)
    layer.self_attn.dropout = 0.0
    return layer


def sine_cosine(n_tokens, d_model):
    """(K, D) position codes of Vaswani et al. 2017: sines and cosines of wavelengths from 2 pi to 20,000 pi."""
    wavelength = 10_000 ** (torch.arange(0, d_model, 2) / d_model)  # (D / 2,)
    angle = torch.arange(n_tokens)[:, None] / wavelength  # (K, D / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (K, D)


class Imagination(nn.Module):
    """Features (B, F, G) of the frame at t1 and the scaled motion (B, 6) -> imagined features (B, F, G) at t2."""

    def __init__(self, n_features, n_cells, args):
        super().__init__()
        self.by_channel = args.token_type == "channel"
        n_tokens, token_size = (n_features, n_cells) if self.by_channel else (n_cells, n_features)
        width = args.d_model
        self.embed = nn.Linear(token_size, width)
        self.motion = nn.Sequential(
            nn.Linear(6, 64), nn.GELU(),
            nn.Linear(64, 256), nn.GELU(),
            nn.Linear(256, width))
        self.register_buffer("position", sine_cosine(n_tokens + 1, width), persistent=False)
        self.norm = nn.LayerNorm(width)
        layers = [transformer_layer(args) for _ in range(args.n_layers)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))
        self.head = nn.Linear(width, token_size)

    def forward(self, features, motion):
        tokens = features if self.by_channel else features.transpose(1, 2)  # (B, F, G) or (B, G, F)
        motion = self.motion(motion)[:, None]  # (B, 6) -> (B, 1, D)
        tokens = torch.cat([motion, self.embed(tokens)], 1)  # (B, K, D): the motion is token 0
        tokens = self.layers(self.norm(tokens + self.position))  # (B, K, D)
        imagined = self.head(tokens[:, 1:])  # (B, K, D) -> (B, K - 1, G or F)
        return imagined if self.by_channel else imagined.transpose(1, 2)  # (B, F, G)


class Dreamer(nn.Module):
    """Encoder, imagination and readout; the motion asked for at t1 follows from that at t2 and the known motion."""
    imagines = True

    def __init__(self, encoder, args, scaler, convention):
        super().__init__()
        self.encoder = encoder
        self.imagination = Imagination(encoder.n_features, encoder.n_cells, args)
        self.readout = nn.Sequential(
            nn.Linear(encoder.n_features, 1024), nn.GELU(), nn.Dropout(args.dropout),
            nn.Linear(1024, 512), nn.GELU(), nn.Dropout(args.dropout),
            nn.Linear(512, 6))
        set_to_zero(self.readout[-1])  # the first guess of at2 is the train mean
        self.at1_from = probe_poses.CONVENTIONS[convention].at1
        for name in ("motion", "at2"):
            for what, values in scaler[name].items():
                values = torch.as_tensor(values, dtype=torch.float32)
                self.register_buffer(f"{name}_{what}", values, persistent=False)

    def forward(self, frame_t1, motion):
        # uint8 (B, 1, S, S) frame, (B, 6) motion in mm and degrees
        return self.imagine(self.encoder(frame_t1), motion, motion)

    @torch.no_grad()
    def true_features(self, frames):
        """(B, 1, S, S) at t2 -> (B, F, G) float32: what is to be imagined; the encoder learns nothing from it."""
        return self.encoder(frames).float()

    def imagine(self, features, motion, known_motion):
        """(B, F, G), (B, 6) that is imagined from, (B, 6) that at1 is composed with: the true one -> Imagined."""
        entering = probe_poses.pose_error(motion, self.motion_mean) / self.motion_sd  # (B, 6)
        imagined = self.imagination(features, entering).float()  # (B, F, G)
        with common.in_fp32(features):  # bf16 has steps of half a degree at 100 degrees
            at2 = self.at2_mean + self.at2_sd * self.readout(imagined.mean(2))  # (B, F, G) -> (B, F) -> (B, 6)
            at1 = self.at1_from(known_motion, at2)  # (B, 6)
        return Imagined(at1, at2, features.float(), imagined)


def set_to_zero(linear):
    """Start a linear layer with zero weights and bias, so that its first output is 0."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def build_encoder(args, kind):
    """GridEncoder, or the Encoder of a world model, as the flags describe it; the seed decides the random part."""
    torch.manual_seed(common.hash_seed(args.seed))
    backbone, _ = backbones.build_backbone(args.encoder, args.pretrained, args.weights, args.image_size)
    return kind(backbone, args)


def build_model(args, scaler, convention):
    """FrameReadout or Dreamer as the flags describe it."""
    if args.token_type == "none":
        return FrameReadout(build_encoder(args, GridEncoder), args, scaler, convention)
    return Dreamer(build_encoder(args, Encoder), args, scaler, convention)


def fit_scaler(study, rows):
    """{motion, at1, at2: {mean (6,), sd (6,)}} over these rows, which are train rows only.

    UserError for an axis that none of them has a label of.
    """
    scaler = {}
    for name, values in study.poses.items():
        mean, sd = probe_poses.centre_and_spread(values[rows])
        lacking = ", ".join(itertools.compress(probe_poses.AXES, np.isnan(mean)))
        if lacking:
            raise common.UserError(f"no train row has a usable {lacking} in {probe_poses.FIELDS[name]}: label it, or "
                                   "write 0 throughout where the probe does not move along it")
        scaler[name] = {"mean": mean, "sd": sd}
    return scaler


class DreamLoss:
    """Weighted sum of the losses on at1 (main task), at2 and the imagined features; sds (6,) of train rows."""

    def __init__(self, args, scaler):
        self.beta = args.smooth_l1_beta
        self.uses_t2 = args.token_type != "none" and not args.primary_task_only
        self.weights = {
            "main_task_loss": 1.0,
            "t2_loss": args.lambda_t2_action * self.uses_t2,
            "latent_loss": args.lambda_latent * self.uses_t2,
        }
        self.sd = {name: tuple(scaler[name]["sd"].tolist()) for name in ("at1", "at2")}

    def of_pose(self, name, predicted, target):
        """SmoothL1 of at1 or at2 in units of its sd, angles wrapped: (B, 6), (B, 6) with NaN = missing -> (B,)."""
        labelled = ~torch.isnan(target)  # (B, 6), True = a label is there
        error = torch.where(labelled, probe_poses.pose_error(predicted, target), 0.0)
        error = error / common.on_device(self.sd[name], predicted.device)
        losses = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=self.beta)
        return losses.sum(1) / labelled.sum(1).clamp(min=1)  # (B, 6) -> (B,)

    def total(self, parts):
        """Weighted sum of the losses that are among these numbers."""
        return sum(weight * parts[name] for name, weight in self.weights.items() if name in parts)

    def __call__(self, imagined, batch, features_t2):
        """Imagined, targets {at1, at2: (B, 6)}, true features at t2 (B, F, G) or None -> (total, {part: tensor})."""
        parts = {"main_task_loss": self.of_pose("at1", imagined.at1, batch["at1"]).mean()}
        if features_t2 is not None:
            parts["t2_loss"] = self.of_pose("at2", imagined.at2, batch["at2"]).mean()
            terms = pose_scores.latent_terms(imagined.features_t1, imagined.features_t2, features_t2)
            parts["latent_loss"] = pose_scores.latent_numbers(terms)["latent_loss"]
        return self.total(parts), parts


# --- training ---------------------------------------------------------------------------

def make_loader(study, rows, args, compute, train=False):
    """Loader of these rows, augmented and shuffled for training."""
    dataset = ProbeTransitions(study, rows, args, args.augment if train else "none")
    return common.make_loader(dataset, args, compute, train, study.store.cache == "ram")


def to_device(batch, compute):
    """Batch -> both frames, uint8 (B, 1, S, S), or (B, ...) that was computed before; {motion, at1, ...: (B, 6)}."""
    sent = {name: compute.send(values) for name, values in batch.items() if name != "name"}
    return *sent.pop("frames").unbind(1), sent  # (B, 2, ...) -> two of (B, ...)


def train_one_epoch(model, loader, loss_function, training, compute):
    """One pass over the train rows; returns {'train_loss', 'train_main_task_loss', ...}: means over the rows."""
    model.train()
    for batch in training.batches(loader):
        frame_t1, frame_t2, poses = to_device(batch, compute)
        with compute.autocast():
            imagined = model(frame_t1, poses["motion"])
            features_t2 = model.true_features(frame_t2) if loss_function.uses_t2 else None
        loss, parts = loss_function(imagined, poses, features_t2)
        training.step(loss, **parts)
    return training.epoch_means()


@torch.no_grad()
def evaluate(model, loader, loss_function, compute):
    """Whole split at once -> (at1 (M, 6) in mm and degrees, features of t1 (M, F), {name: number} for the history)."""
    model.eval()
    batches = []
    for batch in loader:
        frame_t1, frame_t2, poses = to_device(batch, compute)
        with compute.autocast():
            imagined = model(frame_t1, poses["motion"])
            features_t2 = model.true_features(frame_t2) if model.imagines else None
        batches.append({
            "at1": imagined.at1,
            "features": imagined.features_t1.mean(2),
            "true_at1": poses["at1"],
            "main_task_loss": loss_function.of_pose("at1", imagined.at1, poses["at1"]),  # (B,)
            "t2_loss": loss_function.of_pose("at2", imagined.at2, poses["at2"])})
        if model.imagines:
            batches[-1] |= pose_scores.latent_terms(imagined.features_t1, imagined.features_t2, features_t2)
    rows = join_batches(batches, compute)  # {name: (M, ...)}
    means = {name: rows[name].mean() for name in ("main_task_loss", "t2_loss")}
    if model.imagines:
        means |= pose_scores.latent_numbers(rows)
    means = {name: value.item() for name, value in means.items()}
    at1 = rows["at1"].double()
    error = probe_poses.pose_error(at1, rows["true_at1"].double()).abs()  # (M, 6)
    mae = {f"mae_{axis}": value for axis, value in zip(probe_poses.AXES, error.nanmean(0).tolist())}
    numbers = {"loss": loss_function.total(means), **means, **mae}
    return at1.numpy(), rows["features"].numpy(), numbers


def join_batches(batches, compute):
    """List of {name: (B, ...)} of each process -> {name: (M, ...)} on the CPU, over the whole split."""
    own = [{name: value.cpu() for name, value in batch.items()} for batch in batches]
    joined = compute.processes.gather(own)
    return {name: torch.cat([batch[name] for batch in joined]) for name in joined[0]}


def fit(run, args, study, split, readout):
    """Train on split['train'], choose the epoch on split['val'] -> (Training, DreamLoss).

    readout: of solve_readout on the train rows, with which a FrameReadout starts.
    """
    compute = run.compute
    scaler = fit_scaler(study, split["train"])
    train_loader = make_loader(study, split["train"], args, compute, train=True)
    val_loader = make_loader(study, split["val"], args, compute)
    model = build_model(args, scaler, study.compose)
    if args.init_from:
        backbones.start_from(model, args.init_from, is_frozen=not model.imagines,
                             token_type=args.token_type, encoder=args.encoder)
    if not model.imagines:
        readout.write_into(model.solved)
        model.scale_grids(study.grids_at_t1(split["train"]))
    model = compute.place(model)
    loss_function = DreamLoss(args, scaler)
    optimizer = common.build_optimizer(model, args, model.encoder)
    training = common.Training(
        run, model, optimizer, args,
        select="last" if args.select == "last" else f"val_{args.select}",
        metadata=model_metadata(args, study, split, scaler),
        higher_is_better=False,
        seen=seen_rows.of_run(args, study.hashes, split))
    for _ in training.epochs():
        row = train_one_epoch(model, train_loader, loss_function, training, compute)
        *_, numbers = evaluate(model, val_loader, loss_function, compute)
        row["train_total_loss"] = row["train_loss"]
        row |= {f"val_{name}": value for name, value in numbers.items()}
        training.end_epoch(row)
    training.save_model(training.model_file(), "final_model.pth")
    return training, loss_function


def keep_if_better(training, study, rows, readout, loss_function):
    """Give a FrameReadout its best epoch, or epoch 0 where none beats the solved readout on these rows.

    Returns the content of best_model.pth.
    """
    best = training.load_best()
    if training.model.imagines:
        return best
    readout.write_into(training.model.solved)  # a run that was killed may have solved it anew already
    if training.select == "last":
        return best
    start = torch.from_numpy(readout.predict(study.grids_at_t1(rows)))
    start_loss = loss_function.of_pose("at1", start, torch.from_numpy(study.at1[rows])).mean().item()
    best_loss = best["history"][training.select]
    training.run.say(f"validation loss of the solved readout {start_loss:.4f}, of epoch "
                     f"{best['history']['epoch']} {best_loss:.4f}")
    if best_loss >= start_loss:
        training.run.say("note: no epoch is better than the solved readout, so nothing is added to it (epoch 0)")
        set_to_zero(training.model.correction[-1])
        best["epoch"] = 0
    return best


def model_metadata(args, study, split, scaler):
    """What evaluate and predict need beside the weights."""
    settings = {name: getattr(args, name) for name in MODEL_FLAGS}
    settings |= {
        "compose": study.compose,
        "angle_unit": study.angle_unit,
        "euler_order": study.euler_order,
        "pixel_range": study.store.pixel_range}
    return {
        "settings": settings,
        "scaler": scaler,
        "pretrained": args.pretrained,
        "train_patients": np.unique(study.patients[split["train"]]).tolist(),
    }


@torch.no_grad()
def use_of_inputs(model, loader, numbers, loss_function, compute, study, trained, rows):
    """Does the model use the motion and the imagined frame? {name of pose_judging.USE_MEANINGS: number} of these rows.

    False motions are those of other rows of the split; they enter the imagination only, while the
    composition keeps the true one: otherwise a model that adds and subtracts the same motion would
    look as if it ignored it. A FrameReadout imagines nothing: of it there is only the share of rows
    outside the range of the training poses. numbers: what evaluate found of these rows; trained:
    rows that the model was trained on.
    """
    use = pose_scores.outside_share(study.at1, trained, rows)
    if not model.imagines:
        return use
    model.eval()
    batches = []
    for batch in loader:
        frame_t1, frame_t2, poses = to_device(batch, compute)
        with compute.autocast():
            true = model(frame_t1, poses["motion"])
            features_t2 = model.true_features(frame_t2)  # (B, F, G)
            false = model.imagine(true.features_t1, poses["other_motion"], poses["motion"])
        batches.append({
            "false_loss": loss_function.of_pose("at1", false.at1, poses["at1"]),  # (B,)
            "map_imagined": true.features_t2.flatten(1).half(),  # (B, F * G)
            "map_t2": features_t2.flatten(1).half()})
    joined = join_batches(batches, compute)  # {name: (M, ...)}
    return use | {
        "action_shuffle_ratio": (joined["false_loss"].mean() / numbers["main_task_loss"]).item(),
        "latent_skill": numbers["latent_skill"],
        "feature_spread": numbers["feature_spread"],
        "retrieval_rank": pose_scores.retrieval_rank(joined["map_imagined"], joined["map_t2"], study.patients[rows]),
    }


@torch.no_grad()
def with_features(study, rows, args, compute, encoder=None):
    """The Study with a GridEncoder's grids of the frames of these rows, 0 for other frames.

    encoder: None = as the flags describe it.
    """
    encoder = compute.place(encoder or build_encoder(args, GridEncoder)).eval()
    wanted = np.unique(study.frames[rows])
    grids = np.zeros((len(study.store), encoder.scales.n_features), np.float32)
    for chunk in np.array_split(wanted, math.ceil(len(wanted) / 64)):
        frames = np.stack([study.picture(i) for i in chunk])  # (64, S, S, 3)
        frames = torch.from_numpy(to_grey(frames))  # (64, S, S, 3) -> (64, 1, S, S)
        grids[chunk] = encoder(compute.send(frames)).cpu()
    return dataclasses.replace(study, grids=grids, blocks=encoder.scales.blocks)


def solve_readout(study, rows):
    """baseline_models.Readout of at1 in mm and degrees on the grids of the frames at t1 of these rows."""
    centre = probe_poses.centre_and_spread(study.at1[rows])[0]
    deviation = probe_poses.difference(study.at1[rows], centre)  # (n, 6)
    readout = baseline_models.fit_readout(
        study.grids_at_t1(rows), deviation, study.inner_groups(rows), blocks=study.blocks)
    return dataclasses.replace(readout, intercept=readout.intercept + centre)


def predict_baselines(study, train, rows, readout=None, centre=None):
    """{name: (M, 6)} of what trains no network; without train rows (other data) only those that need none.

    readout: of solve_readout on the train rows. centre: (6,) mean of at1 over the rows that a
    checkpoint was trained on, for data without train rows. What is fitted is fitted to the
    deviation from the mean.
    """
    import pandas as pd
    if len(train):
        centre, _ = probe_poses.centre_and_spread(study.at1[train])
    still = np.zeros((len(rows), 6))
    predicted = {
        "zero": still,
        "train_mean": still + centre,
        "copy": study.motion[rows],
    }
    if not len(train):
        return predicted
    deviation = probe_poses.difference(study.at1, centre)  # (N, 6)
    known = np.nan_to_num(deviation[train])  # a missing label counts as the mean
    motion_ridge = baseline_models.fit_readout(study.motion[train], deviation[train], study.inner_groups(train))
    found = {
        "train_median": still + np.nanmedian(deviation[train], axis=0),
        "frame_index": baseline_models.means_by_place(known, study.place, study.sequences, train, rows),
        "motion_ridge": motion_ridge.predict(study.motion[rows]),
        **baseline_models.time_baselines(deviation, study.order, study.sequences, train, rows),
    }
    asked = study.patients[rows]
    trained = study.patients[train]
    if np.isin(asked, trained).any() and len({*asked, *trained}) > 1:
        of_patients = pd.DataFrame(known).groupby(trained).mean()
        found["patient_mean"] = of_patients.reindex(asked, fill_value=0).to_numpy()  # 0 = the train mean
    predicted |= {name: centre + values for name, values in found.items()}
    if readout:
        predicted["grid_readout"] = readout.predict(study.grids_at_t1(rows))
    return predicted


# --- results: predictions table -> judged run folder -------------------------------------------

def predictions_table(study, rows, predicted, others, seen):
    """ScoreTable of at1 for these rows; predicted (M, 6); others {baseline: (M, 6)}; seen: SeenRows of the model.

    Angles are turned to within 180 degrees of the truth, and the truth of its circular
    mean over the study, so that whoever subtracts them gets their errors, and
    variances are those of the angles.
    """
    target = pose_scores.unwrapped(study.at1)[rows]
    return prediction_tables.ScoreTable(
        keys={"name": study.names[rows], "sequence": study.sequences[rows]},
        names=list(probe_poses.AXES),
        truth=target,
        predicted=pose_scores.wrapped(predicted, target),
        baselines={name: pose_scores.wrapped(block, target) for name, block in others.items()},
        groups=study.patients[rows],
        seen=seen.words(study.hashes[rows]))


@common.first_process_only
def judge(run, args, study, split, rows, table, part, use, alarms, **known):
    """Judge the predictions for these rows of the study.

    part: val, test, folds, or what evaluate scores; use: of use_of_inputs; known:
    further fields of the Setting.
    """
    motion_size = np.nanmean(np.abs(study.motion[rows]) / study.label_sd)
    scores_one_block = args.mode == "train" and args.split_by == "time" and not args.folds
    setting = judging.Setting(
        title="Probe guidance",
        part=part,
        seen=table.seen,
        alarms=pose_scores.use_alarms(use, motion_size, scores_one_block) + alarms,
        data=data_blocks(run, study, split, table),
        cases=judging.case_blocks(table, lambda i: study.picture(study.frames[rows[i], 0])),
        limits=limits(args, study),
        **known)
    pose_judging.judge_poses(
        run, table, setting,
        blocks=pose_scores.time_blocks(table, study.sequences[rows], study.order[rows]),
        label_sd=study.label_sd,
        unit=study.unit,
        doubts=split_doubts(args, study),
        compose=study.compose,
        use=use)


def data_blocks(run, study, split, table):
    """HTML of the section Data and split."""
    sizes = [{
        "part": part,
        "transitions": len(rows),
        study.unit: len(set(study.patients[rows])),
        "sequences": len(set(study.sequences[rows])),
    } for part, rows in split.items()]
    blocks = [
        judging.rows_text(table, "transitions"),
        reporting.html_text(f"Groups are {study.unit}; {len(study.skipped)} rows skipped."),
        reporting.html_table(sizes),
        reporting.html_list(study.notes),
    ]
    plot = run.path("dataset_statistics.png")
    if plot.exists():  # not where a checkpoint is evaluated
        blocks.append(reporting.html_image(plot, "Data and split"))
    return blocks


def split_doubts(args, study):
    """Sentences on a split that does not tell how the model does on another patient."""
    doubts = []
    if args.split_by == "time":
        doubts.append("The parts are blocks of time of the same sequences: nothing is said about another patient. "
                      "Where there are several, split by them (--split_by patient)")
    if not study.has_patients:
        doubts.append("Nobody said which patient a folder belongs to: two folders of one patient count as two, and may "
                      "stand on two sides of the split. Give --patient_map or --patient_regex")
    return doubts


def limits(args, study):
    """Sentences on what a reader must not conclude from this run."""
    lines = ["Valid for probes, views and patients like these; nothing else was tested."]
    if study.compose == "additive":
        lines.append("at2 = at1 + motion here: at1 and at2 carry the same information, and the loss on at2 adds none.")
    if args.mode == "train":  # a checkpoint does not say whether its run began with --init_from
        lines += judging.limits_of_start(args)
    return lines


# --- one run, or one run per fold -------------------------------------------------------------

def make_split(args, study):
    """The split of the flags: {train, val, test: (n,) rows}."""
    if args.manual_splits:
        import pandas as pd
        listed = {}
        for part in splitting.PARTS:
            names = (getattr(args, f"{part}_patients") or "").split(",")
            listed[part] = [name.strip() for name in names if name.strip()]
        folders = dict(zip(study.sequences, study.patients))
        by_last_name = pd.Series(study.patients).groupby([Path(sequence).name for sequence in study.sequences])
        last_names = by_last_name.first()[by_last_name.nunique() == 1].to_dict()  # those of one patient's folders
        return splitting.split_by_names(listed, study.patients, last_names | folders)
    if args.split_by == "time" and not args.split_file:
        return splitting.split_by_time(study.sequences, study.order, splitting.ratios_of_flags(args), args.gap)
    n_parts = 3 if args.test_ratio else 2
    n_patients = len(set(study.patients))
    if n_patients < n_parts and not args.split_file:
        raise common.UserError(f"{n_patients} patients are too few for {n_parts} parts: --split_by time cuts the "
                               "sequences in blocks (and says nothing across patients); of two patients "
                               "--test_ratio 0 keeps one for validation, --folds 2 leaves each out in turn")
    return splitting.split_of_flags(args, study.names, None, study.patients)


def make_folds(args, study):
    """[{train, val, test}]: what a fold leaves out is its test part, and rows of the others choose the epoch: patients,
    or where those are fewer than three, blocks of time.

    With --select last nothing is chosen, and what is left out is the val part.
    """
    if args.split_by == "time":
        splits = splitting.folds_by_time(study.sequences, study.order, args.folds, args.gap)
    else:
        splits = splitting.folds_of_flags(args, study.names, None, study.patients)
    if args.select == "last":
        return splits
    ratios = {"train": 1 - args.val_ratio, "val": args.val_ratio}

    def divide(rows):
        if args.split_by == "time" or len(set(study.patients[rows])) < 3:
            _, lengths = np.unique(study.sequences[rows], return_counts=True)
            # what chooses the epoch may stand nearer than what is scored, but neighbours share a frame
            gap = min(args.gap, max(1, lengths.min() // 4))
            return splitting.split_by_time(study.sequences[rows], study.order[rows], ratios, gap)
        return splitting.make_split(study.names[rows], ratios, groups=study.patients[rows], seed=args.seed)
    return splitting.nested_folds(splits, divide)


def check_split(run, args, study, split):
    """Refuse a split that leaks; write splits.json, the leakage report over the frames, and the statistics."""
    by_time = args.split_by == "time"
    patient_of = np.full(len(study.store), "", dtype=object)  # of every picture in the store
    patient_of[study.frames] = study.patients[:, None]
    names = [path.relative_to(args.data_dir).as_posix() for path in study.store.paths]
    frames = {part: np.unique(study.frames[rows]) for part, rows in split.items()}
    is_top_of_folds = "train" not in split
    # within a fold, the epoch may be chosen by blocks of time of the train patients, see make_folds
    has_whole_patients = not by_time and (is_top_of_folds or not args.folds)
    report = splitting.leakage_report(
        frames, names, study.frame_audit("pixel_sha"), study.frame_audit("phash"),
        {"groups": patient_of if has_whole_patients else None})
    stopping = splitting.STOPPING_LEAKS
    if by_time and is_top_of_folds:
        stopping = ()
        report["notes"] = ["the blocks of time meet here; each fold leaves --gap around what it leaves out"]
    splitting.record_split(run, split, study.names, report, stopping)
    pose_audit.write_statistics(run, study, split)


def run_split(run, args, study, split):
    """Train on one split and judge its held-out rows: test where there is one, else val."""
    check_split(run, args, study, split)
    split = splitting.rows_to_try(split, args)
    run.write_record(study, split)
    if study.grids is None:
        study = with_features(study, np.concatenate(list(split.values())), args, run.compute)
    readout = solve_readout(study, split["train"])
    run.say(f"solved readout: {', '.join(dict.fromkeys(readout.blocks))} of the encoder, by the inner folds")
    training, loss_function = fit(run, args, study, split, readout)
    judge_split(args, study, split, readout, training, loss_function)


def judge_split(args, study, split, readout, training, loss_function):
    """Judge what fit trained on the held-out rows; what is found out on the way is added to best_model.pth."""
    run = training.run
    model = training.model

    def score(of_part, baselines):
        """(ScoreTable of a part, features of its frames, numbers of evaluate)."""
        own = split[of_part]
        loader = make_loader(study, own, args, run.compute)
        predicted, features, numbers = evaluate(model, loader, loss_function, run.compute)
        return predictions_table(study, own, predicted, baselines, training.seen), features, numbers

    part = "val"
    fitted = split["train"]
    rows = split["val"]
    best = keep_if_better(training, study, rows, readout, loss_function)
    train_table, train_features, _ = score("train", {})
    table, features, numbers = score("val", predict_baselines(study, fitted, rows, readout))
    table.write(run.path("predictions_val.csv"))
    best["known_data"] = row_warnings.known_data(train_features, features)
    alarms = []
    if model.imagines:  # a readout always fits its own rows better
        alarms = verdicts.split_gap_alarms(
            train_table.main_metrics(), table.main_metrics(),
            remedy="Fewer trained layers (--freeze_layers), --augment full, more patients")
    if len(split["test"]):
        part = "test"
        fitted = np.union1d(fitted, rows)  # validation has done its work
        rows = split["test"]
        readout = solve_readout(study, fitted)
        best |= use_readout(training, study, fitted, readout)
        table, _, numbers = score("test", predict_baselines(study, fitted, rows, readout))
        table.write(run.path("predictions_test.csv"))
    training.save_model(best)
    plot_training(run, training.progress.history, best["epoch"], part, pose_scores.fold_numbers(table, study.label_sd))
    loader = make_loader(study, rows, args, run.compute)
    trained = split["train"] if model.imagines else fitted
    use = use_of_inputs(model, loader, numbers, loss_function, run.compute, study, trained, rows)
    judge(run, args, study, split, rows, table, part, use, alarms=alarms, best_epoch=best["epoch"])


def use_readout(training, study, rows, readout):
    """Put a readout of these rows into a FrameReadout; returns what its file then says of its rows."""
    if training.model.imagines:
        return {}
    readout.write_into(training.model.solved)
    return {
        "seen": training.seen.plus(seen_rows.SeenRows(fitted=study.hashes[rows], chose=[])),
        "train_patients": np.unique(study.patients[rows]).tolist(),
    }


def plot_training(run, history, best_epoch, part, numbers):
    """training_history.png of all columns, training_summary.png of the losses, the learning rate and the final numbers.

    numbers: of pose_scores.fold_numbers on the rows of `part`.
    """
    import pandas as pd
    columns = pd.DataFrame(history).drop(columns="train_total_loss")  # the same as train_loss
    losses = columns.filter(regex="^epoch$|^learning_rate$|loss$")
    final = [
        f"best epoch: {best_epoch}",
        f"{part}: {numbers['rows']} rows",
        f"error: {numbers['error']:.3f} label sds",
        f"best baseline: {numbers['baseline_error']:.3f}",
        f"R2: {numbers['r2']:.3f}"]
    plotting.plot_history(columns, run.path("training_history.png"), best_epoch)
    plotting.plot_history(losses, run.path("training_summary.png"), best_epoch, final)


def run_folds(run, args, study):
    """One run per fold in fold_K/, patients or blocks of time left out in turn; their predictions are judged as one."""
    splits = make_folds(args, study)
    left_out = "val" if args.select == "last" else "test"
    folds = {f"fold_{k}": split[left_out] for k, split in enumerate(splits)}
    check_split(run, args, study, folds)
    run.write_record(study, folds)
    study = with_features(study, np.arange(len(study.names)), args, run.compute)
    chosen = run.each_fold(splits, lambda child, split: run_split(child, args, study, split))
    tables = prediction_tables.read_folds(run, chosen, left_out)
    pooled = prediction_tables.join(tables, chosen)
    rows = pooled.rows_of(study.names)
    pooled.groups = study.patients[rows]  # as a cell, a name such as NA would be blank
    pooled.write(run.path("predictions_folds.csv"))
    numbers = [
        pose_scores.fold_numbers(table, study.label_sd) | common.read_json(run.path(f"fold_{k}/metrics.json"))["use"]
        for k, table in zip(chosen, tables)]
    done = judging.finished_folds(run, chosen, numbers)
    judge(run, args, study, folds, rows, pooled, "folds", mean_use(done), alarms=[], folds=done)


def mean_use(folds):
    """Numbers of use over all folds: their means over the rows, NaN where one of them is undefined."""
    n_rows = [fold["rows"] for fold in folds]
    return {
        name: np.average(np.array([fold[name] for fold in folds], float), weights=n_rows)
        for name in pose_judging.USE_MEANINGS if name in folds[0]}


def train(run, args):
    """--mode train: one run, or one per fold."""
    verdicts.parse_criteria(args.criteria, pose_judging.criteria_names())
    build_encoder(args, GridEncoder)  # wrong names and weights stop here, before frames are decoded
    study = load_study(args, run)
    if args.folds:
        run_folds(run, args, study)
    else:
        run_split(run, args, study, make_split(args, study))


# --- the other modes -------------------------------------------------------------------------

def load_checkpoint(args, run):
    """--checkpoint -> (its content, model on the device, DreamLoss, args with the model's settings for the flags)."""
    path = args.checkpoint
    content = common.load_model_file(path)
    with common.checkpoint_fields(path):
        settings = {name: content["settings"][name] for name in MODEL_FLAGS}
        others = [f"--{name} {getattr(args, name)}" for name, value in settings.items()
                  if name in args.given and getattr(args, name) not in (value, "auto")]
        if others:
            raise common.UserError(f"{' '.join(others)}: --mode {args.mode} takes this from the "
                                   "checkpoint, which has another value; leave it out")
        settings["pretrained"] = content["pretrained"]
        settings["pixel_range"] = args.pixel_range or content["settings"]["pixel_range"]
        args = common.with_flags(args, **settings)
        untrained = common.with_flags(args, pretrained=False, weights=None)
        model = build_model(untrained, content["scaler"], args.compose)
        common.load_state(model, content["model"], path)
    text = ", ".join(f"{name} {settings[name]}" for name in MODEL_FLAGS)
    run.say(f"checkpoint: epoch {content['epoch']}, {text}")
    loss_function = DreamLoss(args, content["scaler"])
    return content, run.compute.place(model), loss_function, args


def rows_to_score(run, args, study, seen):
    """(part to score, its rows, rows to fit baselines to).

    Of the data that the checkpoint was trained on, the test part of its split, else the val part;
    of other data all rows, and none to fit. seen: seen_rows.SeenRows of the checkpoint, since other
    data may have the same names.
    """
    path = args.checkpoint.with_name("splits.json")
    listed = splitting.listed_parts(path) if path.is_file() else {}
    split = {part: np.flatnonzero(np.isin(study.names, listed.get(part, []))) for part in splitting.PARTS}
    if "new" in seen.words(study.hashes[split["train"]]):
        run.say("note: rows of the names in splits.json did not train this checkpoint; its split does not count here")
        split = dict.fromkeys(splitting.PARTS, np.array([], int))
    split["all"] = np.arange(len(study.names))
    part = next(name for name in ("test", "val", "all") if len(split[name]))
    fitted = split["train"]
    if part == "test":
        fitted = np.union1d(fitted, split["val"])
    return part, split[part], fitted


def evaluate_checkpoint(run, args):
    """--mode evaluate: judge a trained model on rows it was not trained on."""
    content, model, loss_function, args = load_checkpoint(args, run)
    study = load_study(args, run, usual=content["settings"])
    seen = seen_rows.of_checkpoint(content)
    part, rows, fitted = rows_to_score(run, args, study, seen)
    run.write_record(study, {part: rows})
    readout = None
    if len(fitted):
        encoder = None if model.imagines else model.encoder
        study = with_features(study, np.union1d(fitted, rows), args, run.compute, encoder)
        readout = solve_readout(study, fitted)
    loader = make_loader(study, rows, args, run.compute)
    predicted, _, numbers = evaluate(model, loader, loss_function, run.compute)
    others = predict_baselines(study, fitted, rows, readout, content["scaler"]["at1"]["mean"].numpy())
    table = predictions_table(study, rows, predicted, others, seen)
    table.write(run.path(f"predictions_{part}.csv"))
    trained = fitted[seen.words(study.hashes[fitted]) == "train"]
    use = use_of_inputs(model, loader, numbers, loss_function, run.compute, study, trained, rows)
    known = sorted(set(table.groups) & set(content["train_patients"]))
    alarms = []
    if known:
        alarms = [f"the model was trained on these patients: {common.shorten_list(known, 5)}. "
                  "Score others (--data_dir)"]
    judge(run, args, study, {part: rows}, rows, table, part, use, alarms=alarms, best_epoch=content["epoch"])


def predict(run, args):
    """--mode predict: predictions.csv with at1 for every transition; labels are not needed."""
    content, model, loss_function, args = load_checkpoint(args, run)
    study = load_study(args, run, needs_labels=False, usual=content["settings"])
    rows = np.arange(len(study.names))
    run.write_record(study, {"all": rows})
    loader = make_loader(study, rows, args, run.compute)
    predicted, features, _ = evaluate(model, loader, loss_function, run.compute)
    seen = seen_rows.of_checkpoint(content)
    table = predictions_table(study, rows, predicted, {"motion": study.motion}, seen)
    table.warning = row_warnings.texts([(content, features)], table.seen, "frames", run.say)
    table.write(run.path("predictions.csv"))
    common.write_json(run.path("metrics.json"),
                      {"part": "predict", "rows": len(rows), "epoch": content["epoch"]})
    seen_rows.say_notes(table.seen, run.say)
    run.say(f"{len(rows)} transitions; predicted: the motion asked for at t1. Open next: {run.path('predictions.csv')}")


def audit(run, args):
    """--mode audit: audit.json and the terminal, one line a check, with what was found and what to do."""
    study = load_study(args, run, needs_frames=False)
    checks = pose_audit.check_study(study)
    for check in checks:
        run.say(f"{check.status:5} {check.name:20} {check.found}")
        if check.remedy:
            run.say(f"{'':26} -> {check.remedy}")
    if study.skipped:
        common.write_table(run.path("skipped.csv"), study.skipped)
    common.write_json(run.path("audit.json"), {
        "checks": [vars(check) for check in checks],
        "residuals": study.residuals,
        "compose": study.compose,
        "angle_unit": study.angle_unit,
    })
    run.say(f"open next: {run.path('audit.json')}")


def main():
    args = parse_args()
    modes = {"train": train, "evaluate": evaluate_checkpoint, "predict": predict, "audit": audit}
    with common.start_run(args, fixed_shapes=True) as run:
        modes[args.mode](run, args)


if __name__ == "__main__":
    common.run_main(main)
