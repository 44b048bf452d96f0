"""The shared shelf of the train scripts: what a run needs whatever it predicts. Imports no script.

Sections, in the order in which a run meets them: Constants and user errors; Arguments and config; Run folder and log;
Device, seed and loaders; Several processes; Tables and splits; Leakage; Images and clips; Transforms; Backbones and
weights; Optimiser and schedule; Checkpoints and resume; Early stopping; Metrics; Intervals and baselines; Noise
ceiling; Calibration; Alarms and criteria; Plots; Report.

Letters: N rows, B batch, R ratings or other targets, C classes, F features, D draws, S side of a square input or number
of subjects.
"""
import argparse
import base64
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import gzip
import hashlib
import html
import importlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

# ---------------------------------------------------------------------------
# Constants and user errors
# ---------------------------------------------------------------------------
# What every section may need; a UserError is one line for the user and never a traceback.

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".tga", ".mpo")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXIT_OK, EXIT_CRASH, EXIT_USER, EXIT_CHECKPOINT, EXIT_SAVED, EXIT_INTERRUPT = 0, 1, 2, 3, 75, 130


class UserError(Exception):
    """A mistake the user can mend: printed as one line without traceback, exit code 2."""
    code = EXIT_USER


def closest(name, known):
    """' (did you mean X?)' for the known name nearest to `name` in any case, or ''."""
    spelled = {other.lower(): other for other in known}
    match = difflib.get_close_matches(name.lower(), spelled, 1)
    return f" (did you mean {spelled[match[0]]}?)" if match else ""


def one_line(error):
    """The message of an exception on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def some(items, limit=10):
    """'a, b, c and 4 more': every fault counted, the first `limit` shown."""
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


# ---------------------------------------------------------------------------
# Arguments and config
# ---------------------------------------------------------------------------
# A flag is declared once; config file, flags of a resumed run and command line all pass through its own type.

# What makes training fast, has no flag of its own and can be left out by --without. Beside them stay a few kernels of
# the scripts that give the same numbers sooner, as their tests show.
FAST_WAYS = {"layout": "channels_last memory", "optimizer": "fused optimiser", "augment": "augmentation in one warp",
             "decode": "JPEGs decoded at reduced size", "memory": "freed memory kept (CPU, Linux)"}

# They may change between the two halves of a resumed run: they decide where and how fast, never what is computed.
NEUTRAL_FLAGS = {"output_dir", "config", "resume", "num_workers", "device", "cache", "save_every", "save_minutes",
                 "save_top_k", "tensorboard", "wandb", "images_dir", "ratings_file", "criteria", "use_amp", "fold",
                 "data_dir",
                 "video_root", "manifest", "train_manifest", "val_manifest", "test_manifest", "val_batch_size",
                 "train_json", "val_json", "test_json", "train_images", "val_images", "test_images", "visualize"}


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose mistakes are one line that names the closest flag, with exit code 2."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            message = f"unknown flag {unknown[1]}{closest(unknown[1], self._option_string_actions)}; --help lists all"
        self.exit(EXIT_USER, f"error: {message}\n")


def bounded(kind, low=-math.inf, high=math.inf, open_low=False, word=None):
    """argparse type: a finite `kind` (int or float) in [low, high], without `low` if open_low; or this word."""
    def parse(text):
        if text == word:
            return text
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text} is outside {'(' if open_low else '['}{low:g}, {high:g}]")
        return value
    parse.__name__ = f"{word} or {kind.__name__}" if word else kind.__name__
    return parse


def add_run_arguments(parser):
    """Where a run writes, how it is repeated, continued and watched."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=Path, default=Path("outputs"), help="parent of the timestamped run folders")
    add("--config", type=Path, help="YAML or JSON file of flags, a run's args.json too; the command line wins")
    add("--seed", type=bounded(int, 0), default=42, help="seed of every draw")
    add("--deterministic", action="store_true", help="refuse operations that may not repeat exactly (GPU: slower)")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="auto", metavar="{auto,RUN,CHECKPOINT}",
        help="continue exactly: auto = the newest unfinished run with these flags; or a run folder; or a checkpoint")
    add("--init_from", type=Path, metavar="CHECKPOINT", help="a new run from the weights of a checkpoint (fine-tuning)")
    add("--save_every", type=bounded(int, 0), default=10, help="epochs between checkpoint_epoch_N.pth; 0 = none")
    add("--save_minutes", type=bounded(float, 0), default=10.0, help="minutes between saves within an epoch; 0 = none")
    add("--save_top_k", type=bounded(int, 0), default=0, help="keep the k best epochs as top_epoch_N.pth; 0 = none")
    add("--dry_run", action="store_true", help="2 batches, 1 epoch, the whole run folder: does everything work?")
    add("--criteria", default="", help='bars to judge, e.g. "r2>0.15,mae<3.0": PASS, FAIL or NOT RESOLVABLE')
    add("--tensorboard", action="store_true", help="also write TensorBoard event files (needs the tensorboard package)")
    add("--wandb", action="store_true", help="also log to Weights & Biases (needs the wandb package)")


def add_training_arguments(parser):
    """Epochs, batches, optimiser, schedule and early stopping."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", "--max_epochs", type=bounded(int, 1), default=50, help="passes over the training rows")
    add("--batch_size", type=bounded(int, 1), default=32, help="samples per batch, over all processes")
    add("--val_batch_size", type=bounded(int, 1), help="samples per batch in evaluation (default: batch_size)")
    add("--accumulate", "--accumulate_grad_batches", type=bounded(int, 1), default=1, help="batches per optimiser step")
    add("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw", help="sgd has momentum 0.9")
    add("--lr", type=bounded(float, 0, open_low=True), default=1e-4, help="peak learning rate")
    add("--weight_decay", type=bounded(float, 0), default=0.01, help="not applied to biases and normalisation layers")
    add("--scheduler", choices=("cosine", "step", "plateau", "warm_restarts", "onecycle", "none"), default="cosine",
        help="cosine: to 0 over the run; step: x0.1 every epochs//3; plateau: x0.5 after epochs without a gain; "
             "warm_restarts: cosine over 10, 20, 40, ... epochs; onecycle: up over 30 %% of the run, then to 0")
    add("--plateau_patience", type=bounded(int, 0), default=5, help="epochs without a gain that plateau waits for")
    add("--min_lr", type=bounded(float, 0), default=0.0, help="the schedule never goes below this learning rate")
    add("--warmup_epochs", type=bounded(float, 0), default=0.0, help="epochs of linear warm-up from 0")
    add("--clip_grad", type=bounded(float, 0), default=1.0, help="largest gradient norm; 0 = no clipping")
    add("--patience", "--early_stopping", "--early_stop_patience", type=bounded(int, 0), default=15,
        help="epochs without a better validation score before stopping; 0 = never stop early")
    add("--min_epochs", type=bounded(int, 0), default=0, help="never stop early before this epoch")
    add("--min_delta", type=bounded(float, 0), default=0.0, help="smallest gain that counts as better, for patience")
    add("--without", nargs="+", choices=(*FAST_WAYS, "all"), metavar="WAY",
        help="for comparison, train without a way of being fast: " + ", ".join(
            f"{name} ({what})" for name, what in FAST_WAYS.items()) + ", or all; see also --use_amp and --cache")


def takes(args, way):
    """True where --without leaves this one of FAST_WAYS in."""
    return not {way, "all"} & set(args.without or ())


def add_data_arguments(parser):
    """Splits, folds, leakage and bad files."""
    add, share = parser.add_argument_group("data").add_argument, bounded(float, 0, 1)
    add("--train_ratio", type=share, default=0.8, help="share of the rows (or groups) for training")
    add("--val_ratio", type=share, default=0.2, help="share for validation: selects the epoch")
    add("--test_ratio", type=share, default=0.0, help="share for the test, scored once at the end")
    add("--folds", type=bounded(int, 0), default=0, help="K-fold cross-validation; 0 = one split")
    add("--fold", type=bounded(int, 0, word="all"), default="all", help="with --folds: all, or one fold from 0")
    add("--group_column", help="column whose groups (subjects, videos, sites) never stand on two sides of a split")
    add("--split_file", type=Path, help="splits.json of another run, or {train: [names], val: [...]}")
    add("--allow_leakage", action="store_true", help="train although splits share groups or identical pictures")
    add("--on_bad_file", choices=("error", "skip"), default="error", help="unreadable files: list and stop, or skip")
    add("--cache", choices=("auto", "ram", "disk", "none"), default="auto", help="where decoded pictures are kept")
    add("--augment", choices=tuple(AUGMENTATIONS), default="full", help="random changes of training pictures")


def add_model_arguments(parser):
    """Where weights come from."""
    add = parser.add_argument_group("weights").add_argument
    add("--pretrained", action="store_true", default=True, help="start from torchvision's published weights (default)")
    add("--no_pretrained", dest="pretrained", action="store_false", help="start from random weights")
    add("--weights", type=Path, metavar="FILE", help="state dict for the backbone, instead of the published weights")


def add_compute_arguments(parser):
    """Device, precision and workers: the flags that training and prediction share."""
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--use_amp", nargs="?", const="on", default="auto", choices=("auto", "on", "off"),
        help="mixed precision; auto = where the device is fast at it")
    add("--num_workers", type=bounded(int, 0, word="auto"), default="auto", help="loader processes; auto is printed")


def add_shared_arguments(parser, **defaults):
    """Declare every flag that the train scripts share; `defaults` sets the script's own default values."""
    for add in (add_run_arguments, add_training_arguments, add_data_arguments, add_model_arguments,
                add_compute_arguments):
        add(parser)
    parser.set_defaults(**defaults)


def parse_arguments(parser, argv=None):
    """Parse the command line over --config over the flags of the run named by --resume over the defaults.

    Returns the Namespace, with `given` = the set of flag names typed on the command line.
    Raises UserError for an unreadable config, an unknown key (closest flag named) or a value that its flag refuses.
    """
    argv = [_snake_case(token) for token in (sys.argv[1:] if argv is None else argv)]
    declared, first = parser._option_string_actions, Parser(add_help=False)
    for name in ("--config", "--resume"):
        if name in declared:
            first._add_action(copy.copy(declared[name]))
    known = vars(first.parse_known_args(argv)[0])
    given = {declared[name].dest for name in (token.split("=", 1)[0] for token in argv) if name in declared}
    inherited, skip = {}, given | {"config", "resume"}
    if known.get("resume") not in (None, "auto"):
        inherited |= _config_tokens(parser, run_folder_of(known["resume"]) / "args.json", skip)
    if known.get("config"):
        inherited |= _config_tokens(parser, known["config"], skip)
    args = parser.parse_args([*itertools.chain(*inherited.values()), *argv])
    args.given = given
    return args


def check_split_flags(parser, args):
    """parser.error for split and fold flags that contradict each other."""
    if args.folds == 1 or (args.fold != "all" and args.fold >= args.folds):
        parser.error(f"--folds {args.folds} --fold {args.fold}: expected at least 2 folds, a fold from 0 to folds - 1")
    if args.folds and args.split_file:
        parser.error(f"--folds {args.folds} and --split_file {args.split_file} both make the split; give one")
    if args.folds and args.test_ratio:
        parser.error(f"--folds {args.folds} scores every row once: --test_ratio {args.test_ratio:g} has none")
    if not args.folds and not args.split_file and args.val_ratio == 0:
        parser.error(f"--val_ratio {args.val_ratio:g}: the validation part must not be empty, it chooses the epoch")


def _snake_case(token):
    name, equals, value = token.partition("=")
    is_flag = name.startswith("--") and len(name) > 2
    return "--" + name[2:].replace("-", "_") + equals + value if is_flag else token


def _config_tokens(parser, path, skip):
    """Config file -> {flag: its command-line tokens}; each value is checked here, so that an error names the file."""
    tokens, declared = {}, parser._option_string_actions
    for key, value in read_config(path).items():
        action = declared.get("--" + key.replace("-", "_"))
        if action is None:
            near = closest(key, [name[2:] for name in declared])
            raise UserError(f"{path}: unknown key {key!r}{near}; a key is a flag of this script without its dashes")
        if action.dest not in skip and value is not None:
            tokens[action.dest] = _option_tokens(parser, action, key, value, path)
    return tokens


def _option_tokens(parser, action, key, value, path):
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is a switch: expected true or false, found {value!r}")
        wanted = value == action.const  # `no_pretrained: true` and `pretrained: false` both ask for pretrained = False
        switches = [other for other in parser._actions if other.dest == action.dest and other.const is wanted]
        return [switch.option_strings[0] for switch in switches[:1]]
    if isinstance(value, bool) and action.choices and {"on", "off"} <= set(action.choices):
        value = "on" if value else "off"  # YAML 1.1 reads a bare `on` as true
    is_repeatable = isinstance(action, argparse._AppendAction)
    items = value if isinstance(value, list) and (action.nargs or is_repeatable) else [value]
    for item in items:
        _check_value(action, key, item, path)
    option = action.option_strings[0]
    if isinstance(value, list) and not is_repeatable:
        return [option, *map(str, items)]
    return [f"{option}={item}" for item in items]


def _check_value(action, key, item, path):
    expected = f"{path}: {key} expected {getattr(action.type, '__name__', 'text')}, found {item!r}"
    if isinstance(item, (bool, dict, list)):
        raise UserError(f"{expected}")
    try:
        converted = action.type(str(item)) if action.type else str(item)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{expected} ({error})") from None
    if action.choices and converted not in action.choices:
        raise UserError(f"{path}: {key} is one of {', '.join(map(str, action.choices))}; found {item!r}")


def read_config(path):
    """Flat {flag name: value} of a YAML (safe subset) or JSON file; sections are dropped, an args.json gives its flags.

    Raises UserError for files that are missing, over 1 MB, not a mapping, or that hold duplicate keys, anchors, NaN or
    nesting deeper than the parser can follow.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path} (expected a YAML or JSON file of flags)")
    if path.stat().st_size > 1_000_000:
        raise UserError(f"{path} has {path.stat().st_size} bytes: a config file stays under 1 MB")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        values = json.loads(text, object_pairs_hook=_unique) if path.suffix.lower() == ".json" else _parse_yaml(text)
        if isinstance(values, dict) and isinstance(values.get("flags"), dict) and "command" in values:
            values = values["flags"]
        return _unique(_leaves({} if values is None else values))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a config file ({len(text)} characters)") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a config file: {one_line(error)}") from None


def _unique(pairs):
    flags = {}
    for key, value in pairs:
        if str(key) in flags:
            raise ValueError(f"the key {str(key)!r} stands there twice, in one section or in two sections")
        flags[str(key)] = value
    return flags


def _parse_yaml(text):
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader with a constructor of its own for mappings."""
    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
                           lambda loader, node: _unique(loader.construct_pairs(node, deep=True)))
    try:
        for event in yaml.parse(text, Loader):
            if getattr(event, "anchor", None):
                raise ValueError(f"anchors and aliases are not read (line {event.start_mark.line + 1})")
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{error}") from None


def _leaves(values):
    """(key, value) pairs of a mapping and of the sections in it."""
    if not isinstance(values, dict):
        raise ValueError(f"expected `flag: value` lines, found {type(values).__name__}")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value} (NaN or infinite): not a value")
        else:
            yield key, value


# ---------------------------------------------------------------------------
# Run folder and log
# ---------------------------------------------------------------------------
# One folder a run, made with os.mkdir as the lock; every file in it appears whole or not at all.

class Run:
    """An open run folder: `say` writes to the terminal and log.txt; leaving the `with` block closes it.

    A user error before args.json is written removes the folder again, so that a typing mistake leaves nothing behind.
    Of several processes only the first one says and writes.
    """

    def __init__(self, folder, args, compute, signals, resumed=False):
        self.folder, self.args, self.compute, self.signals, self.resumed = folder, args, compute, signals, resumed
        with saving(folder):
            self._lock = _lock_folder(folder) if compute.processes.is_first else contextlib.nullcontext()
            self._log = open(folder / "log.txt" if compute.processes.is_first else os.devnull, "a", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with contextlib.suppress(OSError), self._log, self._lock:  # a full disk must not hide the error that led here
            if error is not None and not isinstance(error, SystemExit):
                self._log.write(f"{kind.__name__}: {error}\n")
        is_mine = self.compute.processes.is_first and not self.resumed
        if is_mine and isinstance(error, UserError) and not self.path("args.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # it may be what was lost

    def path(self, name):
        """Path of a file in the run folder."""
        return self.folder / name

    def say(self, text="", log_only=False):
        """Print a line (ASCII) and keep it in log.txt; log_only leaves the terminal alone."""
        text = str(text).encode("ascii", "backslashreplace").decode()
        if not log_only and self.compute.processes.is_first:
            try:
                print(text, flush=True)
            except OSError:  # who read along (| head, a terminal) has gone; the run and its log.txt go on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with saving(self._log.name):
            self._log.write(text + "\n")
            self._log.flush()

    def child(self, name):
        """The run of one fold: an ordinary run folder inside this one, opened again where it exists."""
        self.path(name).mkdir(exist_ok=True)
        return Run(self.path(name), self.args, self.compute, self.signals, self.resumed)

    def watch(self, row):
        """Send a history row to TensorBoard and Weights & Biases, where their flags are given."""
        if not self.compute.processes.is_first:
            return
        numbers = {name: value for name, value in row.items() if name != "epoch"}
        if self.args.tensorboard:
            with optional_package("tensorboard", "torch.utils.tensorboard").SummaryWriter(self.folder) as writer:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, row["epoch"])
        if self.args.wandb:
            wandb = optional_package("wandb", "wandb")
            if wandb.run is None or wandb.run.name != str(self.folder):
                wandb.init(project=script_name(), name=str(self.folder), reinit=True)
            wandb.log(numbers, step=row["epoch"])

    def write_args(self, **data):
        """args.json: what repeats the run. On resume: refuse when flags or data differ from the first start."""
        record, path = _args_record(self.args, self.compute, data), self.path("args.json")
        if not path.exists():
            return write_json(path, record)
        before = read_json(path)
        pairs = [(f"--{name}", before["flags"].get(name), value) for name, value in record["flags"].items()
                 if name not in NEUTRAL_FLAGS]
        pairs += [(name, before["data"].get(name), value) for name, value in record["data"].items()]
        pairs += [("precision", before["device"]["precision"], record["device"]["precision"])]
        lines = [f"\n  {name:24} {json.dumps(old)[:30]:32} {json.dumps(new)[:30]}" for name, old, new in pairs
                 if old != new]
        if lines:
            raise UserError(f"{self.folder} cannot be continued exactly: these differ (then, now); start a new run or "
                            f"restore them{''.join(lines)}")


def with_progress(run, label, batches, total, done=0):
    """The batches, with a tqdm bar (rate, time left) on a terminal, and in the log one plain line at the end."""
    from tqdm import tqdm
    start, count = time.perf_counter(), 0
    is_hidden = not sys.stderr.isatty() or not run.compute.processes.is_first
    bar = tqdm(batches, label, total, initial=done, leave=False, ascii=True, disable=is_hidden)
    for count, batch in enumerate(bar, start=1):
        yield batch
    seconds = max(time.perf_counter() - start, 1e-9)
    run.say(f"{label}: {count} batches in {seconds:.1f} s ({count / seconds:.2f} batches/s)", log_only=True)


def optional_package(flag, module):
    """A package that only one flag needs. Raises UserError that names both where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--{flag} needs a package that is not installed ({error}): pip install {flag}") from None


def start_run(args):
    """Processes, device, threads, stop signals and the run folder (new, or the one to resume).

    Returns Run. Raises UserError for a missing device or an output folder that cannot be written; SystemExit(0) when
    the run to resume is finished.
    """
    if args.dry_run:
        args.epochs, args.patience, args.save_every = 1, 0, 0
    if args.tensorboard:
        optional_package("tensorboard", "torch.utils.tensorboard")
    if args.wandb:
        optional_package("wandb", "wandb")
    signals, processes = StopSignals(), Processes()
    compute = choose_compute(args.device, args.use_amp, processes, takes(args, "layout"))
    processes.join(compute.device)
    if takes(args, "memory") and compute.device.type == "cpu":
        keep_freed_memory()
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    folder = processes.on_first(lambda: _folder_to_resume(args) if args.resume else None)
    resumed = folder is not None
    if resumed:  # the number of threads decides the last bits of every sum
        torch.set_num_threads(read_json(folder / "args.json")["device"]["threads"])
    run = Run(folder or processes.on_first(lambda: _new_folder(args.output_dir)), args, compute, signals, resumed)
    run.say(f"run folder: {run.folder}{' (continued)' if run.resumed else ''}")
    run.say(f"command: {command_line()}")
    run.say(f"device: {compute.text}; {torch.get_num_threads()} threads; torch {torch.__version__}")
    left_out = ", ".join(way for way in FAST_WAYS if not takes(args, way))
    run.say(f"fast by: {', '.join(what for way, what in FAST_WAYS.items() if takes(args, way)) or 'nothing'}"
            f"{f' (left out: {left_out})' if left_out else ''}")
    if processes.size > 1:
        run.say(f"processes: {processes.size}; each takes its share of the {args.batch_size} samples of a batch")
    return run


def _new_folder(parent):
    stamp, job = datetime.datetime.now().strftime("run_%Y%m%d_%H%M%S"), slurm_job_id()
    stamp += f"_job{job}" if job else ""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(f"--output_dir {parent} cannot be written: {error.strerror}; name another folder") from None


def slurm_job_id():
    """The SLURM job of this process ('123', '123_4' for an array task), or None."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return os.environ.get("SLURM_JOB_ID")


def _lock_folder(folder):
    handle = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader workers would inherit
    except (BlockingIOError, PermissionError):
        handle.close()
        raise UserError(f"{folder} is being written by another process; wait for it or start a new run") from None
    except (ImportError, OSError):
        pass  # Windows, or a network drive without locks: a second writer is not detected there
    return handle


def _is_being_written(folder):
    try:
        _lock_folder(folder).close()
    except UserError:
        return True
    return False


def run_folder_of(target):
    """--resume RUN or CHECKPOINT -> the run folder, for a fold that of all folds. UserError where there is none."""
    target = Path(target)
    folder = target if target.is_dir() else target.parent
    if not target.exists() or not (folder / "args.json").is_file():
        raise UserError(f"--resume {target} is no run folder or checkpoint inside one (no args.json in {folder})")
    is_fold = re.fullmatch(r"fold_\d+", folder.name) and (folder.parent / "args.json").is_file()
    return folder.parent if is_fold else folder


def _folder_to_resume(args):
    if args.resume != "auto":
        folder = run_folder_of(args.resume)
        script = read_json(folder / "args.json")["script"]
        if script != script_name():
            raise UserError(f"{folder} is a run of {script}, not of {script_name()}")
        return _unfinished_or_exit(folder, args)
    job = slurm_job_id()
    records = sorted(args.output_dir.glob("run_*/args.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    runs = [path.parent for path in records if _same_run(read_json(path), args)]
    for folder in (f for f in runs if job and re.search(rf"_job{job}(_\d+)?$", f.name)):
        return _unfinished_or_exit(folder, args)
    return next((folder for folder in runs if not is_finished(folder, args) and not _is_being_written(folder)), None)


def _same_run(record, args):
    flags = json_safe(_flags(args))
    return record.get("script") == script_name() and all(
        record["flags"].get(name) == value for name, value in flags.items() if name not in NEUTRAL_FLAGS)


def is_finished(folder, args):
    """True where a run folder holds its metrics and so does every fold asked for: --fold 0 alone is no whole run."""
    folds = range(args.folds) if args.fold == "all" else [args.fold]
    parts = [folder, *(folder / f"fold_{k}" for k in (folds if args.folds else ()))]
    return all((part / "metrics.json").exists() for part in parts)


def _unfinished_or_exit(folder, args):
    if is_finished(folder, args):
        print(f"{folder} is finished: nothing to continue; its report is {folder / 'report.html'}", flush=True)
        sys.exit(EXIT_OK)
    return folder


def script_name():
    """File name of the running script."""
    return Path(sys.argv[0]).name


def command_line():
    """The command as it was typed, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def public_command():
    """command_line with every path shortened to what follows the current folder, or to its last two parts."""
    words = [shorten_path(word, [Path.cwd()]) if Path(word).is_absolute() else word for word in sys.argv]
    return shlex.join(["python", *words])


def _flags(args):
    return {name: value for name, value in vars(args).items() if name != "given"}


def _args_record(args, compute, data):
    slurm = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_NNODES", "SLURM_NTASKS")
    return json_safe({
        "script": script_name(), "command": command_line(), "flags": _flags(args), "versions": package_versions(),
        "git": _git_commit(), "data": data,
        "device": {"device": str(compute.device), "name": compute.text, "precision": compute.precision,
                   "threads": torch.get_num_threads()},
        "slurm": {name: os.environ[name] for name in slurm if name in os.environ}})


def package_versions():
    """Versions of Python and of every package that can change a result."""
    from importlib import metadata
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "pillow", "opencv-python", "opencv-python-headless", "pandas"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def json_safe(value):
    """Plain JSON types: paths become text, arrays lists, and a number that is not finite null."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return [json_safe(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class CannotSave(UserError):
    """A file that cannot be written; the checkpoint before it stays whole. Exit code 1."""
    code = EXIT_CRASH


@contextlib.contextmanager
def saving(path, n_bytes="more"):
    """An OSError in this block becomes CannotSave: which file, and on a full disk the bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CannotSave(f"cannot write {path}: {error.strerror}") from error
        free = shutil.disk_usage(Path(path).absolute().parent).free
        raise CannotSave(f"no space to write {path}: {n_bytes} bytes needed, {free} free") from error


def write_whole(path, content):
    """Write bytes so that a kill at any moment leaves the old file or the new one: temp file, fsync, rename.

    Of several processes only the first one writes.
    """
    if launched_processes()["rank"] > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with saving(path, len(content)):
        try:
            with open(temporary, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def _sync_folder(folder):
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Strict JSON (a NaN is null), written whole."""
    write_whole(path, (json.dumps(json_safe(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path):
    """A JSON file that this project wrote. Raises UserError where it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def write_table(path, rows):
    """CSV with the columns of all rows in order of appearance, floats in full, NaN and None empty. Written whole."""
    columns, text = list(dict.fromkeys(name for row in rows for name in row)), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    write_whole(path, text.getvalue().encode())


def _cell(value):
    value = value.item() if isinstance(value, np.generic) else value
    return "" if value is None or value != value else repr(value) if isinstance(value, float) else value


def run_main(main):
    """Run main() and leave with the exit code of the contract: one line for a user's mistake, a traceback for ours."""
    try:
        main()
    except UserError as error:
        if getattr(error, "said_by_first", False):
            sys.exit(error.code)
        code, text = error.code, f"error: {error}"
    except KeyboardInterrupt:
        code, text = EXIT_INTERRUPT, "interrupted"
    except (torch.OutOfMemoryError, MemoryError) as error:
        code, text = EXIT_CRASH, f"error: out of memory ({one_line(error)})\n{_half_batch()}"
    except RuntimeError as error:
        if launched_processes()["size"] > 1 and LOST_PROCESS.search(str(error)):
            code, text = EXIT_CRASH, f"error: another process of this run has ended, see there ({one_line(error)})"
        elif "DataLoader" not in str(error):
            raise
        else:
            code, text = EXIT_CRASH, (
                f"error: a loader worker died or hangs ({one_line(error)}). The last checkpoint is whole: --resume "
                "auto continues. Try --num_workers 0, or a larger /dev/shm")
    except SystemExit:  # all of them stop here, as on a signal
        leave_processes(wait=False)
        raise
    else:
        return leave_processes()
    finally:
        StopSignals.leave()
    rank = 0
    with contextlib.suppress(UserError):  # the error may be that the rank is none
        rank = launched_processes()["rank"]
    sys.stderr.write(f"[process {rank}] {text}\n" if rank else f"{text}\n")
    sys.exit(code)


def _half_batch():
    tokens = " ".join(sys.argv)
    batch, accumulate = (re.search(rf"--{name}[ =](\d+)", tokens) for name in ("batch_size", "accumulate"))
    if not batch:
        return "try again with half the batch size (--batch_size) and --accumulate 2"
    kept = re.sub(r"--(batch_size|accumulate)[ =]\d+ ?", "", tokens).strip()
    doubled = 2 * int(accumulate[1]) if accumulate else 2
    return f"try: python {kept} --batch_size {max(1, int(batch[1]) // 2)} --accumulate {doubled}"


# ---------------------------------------------------------------------------
# Device, seed and loaders
# ---------------------------------------------------------------------------
# Every draw is a pure function of (seed, epoch, sample): no random state to save, and any worker count agrees.

CAN_FORK = sys.platform not in ("win32", "darwin")  # macOS can, but its numeric libraries do not survive it


@dataclasses.dataclass
class Compute:
    """Where and how precisely the model runs: `precision` is fp32, bf16 or fp16; `text` is what the user is told."""
    device: torch.device
    precision: str
    channels_last: bool
    text: str
    processes: "Processes" = dataclasses.field(default_factory=lambda: Processes({"rank": 0, "size": 1}))

    def autocast(self):
        """Mixed-precision context of the forward pass."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def place(self, model):
        """Model on the device, convolutions of pictures and clips in the memory layout that the device is fast at."""
        model, layouts = model.to(self.device), {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in model.parameters() if self.channels_last else ():
            if parameter.ndim in layouts:
                parameter.data = parameter.data.to(memory_format=layouts[parameter.ndim])
        return model


def choose_compute(device, use_amp, processes=None, layout=True):
    """--device and --use_amp -> Compute. Raises UserError for a GPU that is asked for and absent.

    processes: of a run that works with several; each takes a GPU of its own on its machine. layout: channels_last where
    the device is fast at it.
    """
    launched = launched_processes()
    if processes is None and launched["size"] > 1:
        raise UserError(f"this command works in one process, started were {launched['size']}; start it without "
                        "torchrun, or with srun --ntasks=1")
    processes = processes or Processes(launched)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and processes.size > 1 and torch.cuda.device_count():
        device = torch.device("cuda", processes.local_rank % torch.cuda.device_count())  # srun may show each its own
        torch.cuda.set_device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this torch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu, "
                        "or run verify_setup.py to see why")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: this machine has no Apple GPU; use --device cpu")
    precision = "fp32" if use_amp == "off" else fast_precision(device)
    if use_amp == "on" and precision == "fp32":
        precision = "bf16"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        _cpuinfo("model name") or platform.processor() or platform.machine())
    layout = layout and device.type in ("cpu", "cuda")
    text = f"{device} ({name}), {precision}{' with channels_last' if layout else ''}"
    return Compute(device, precision, layout, text, processes)


def keep_freed_memory():
    """Have the C library of Linux keep freed memory for the next batch, at the price of some per cent more of it.

    glibc hands blocks of many MB back to the system at once and asks for them again in every step, page by page: a
    tenth of a ResNet-18's training step on a CPU. Elsewhere nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2 ** 31 - 1)


def fast_precision(device):
    """bf16 where the device computes it in hardware, fp16 on GPUs from compute capability 7 without it, else fp32."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
    return "bf16" if device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()) else "fp32"


def _cpuinfo(field):
    """First line of this field in Linux's /proc/cpuinfo, '' elsewhere."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[1].strip() if found else ""
    return ""


def mix(*integers):
    """Hash integers to a 63-bit seed (splitmix64 finaliser): neighbours such as (seed, epoch + 1) share nothing."""
    state = 0
    for integer in integers:
        state = (state + integer + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def generator_for(*integers):
    """torch.Generator whose draws depend on these integers alone."""
    return torch.Generator().manual_seed(mix(*integers))


class EpochBatches(torch.utils.data.Sampler):
    """Batches of (epoch, index): a permutation seeded by (seed, epoch), cut into batches, from batch `start` on.

    The dataset's __getitem__ takes the pair, so that augmentation is seeded by it. Set `epoch` and `start` before
    iterating. In training a single leftover sample joins the batch before it, since BatchNorm cannot take one alone.
    weights: (N,) chances of being drawn, with replacement, instead of a permutation.
    rank of size processes: in training each takes its slice of every batch; else a block of the rows, so that the
    results of all processes, one after the other, are those of all rows (`Processes.gather`).
    """

    def __init__(self, n_samples, batch_size, seed, train, weights=None, rank=0, size=1):
        self.n_samples, self.seed, self.train, self.weights = n_samples, seed, train, weights
        self.batch_size, self.rank, self.size = batch_size, rank, size
        low, high = (0, n_samples) if train else (n_samples * rank // size, n_samples * (rank + 1) // size)
        self.edges = [*range(low, high, batch_size), high]
        if train and batch_size > 1 and len(self.edges) > 2 and self.edges[-1] - self.edges[-2] == 1:
            del self.edges[-2]
        self.epoch, self.start = 0, 0

    def __len__(self):
        return len(self.edges) - 1

    def __iter__(self):
        order = range(self.n_samples)
        generator = generator_for(self.seed, self.epoch)
        if self.train and self.weights is not None:
            order = torch.multinomial(torch.as_tensor(self.weights), self.n_samples, True, generator=generator).tolist()
        elif self.train:
            order = torch.randperm(self.n_samples, generator=generator).tolist()
        for batch in range(self.start, len(self)):
            own = self.own_span(batch)
            first, last = own if own[0] < own[1] else (self.edges[batch], self.edges[batch] + self._least(batch))
            yield [(self.epoch, index) for index in order[first:last]]

    def _least(self, batch):
        """Samples that a slice holds at least: 2 where the batch size allows, since BatchNorm cannot take one alone."""
        return min(max(self.batch_size // self.size, 1), 2, self.edges[batch + 1] - self.edges[batch])

    def own_span(self, batch):
        """(first, last) sample positions of this process's slice of a batch; none left for it: an empty span, and the
        iteration gives samples that must count for nothing, so that every process takes every step.
        """
        first, last = self.edges[batch:batch + 2]
        if not self.train or self.size == 1:
            return first, last
        takers = min(self.size, (last - first) // self._least(batch))
        cuts = [first + (last - first) * min(k, takers) // takers for k in (self.rank, self.rank + 1)]
        return tuple(cuts)

    def step_span(self, batch, accumulate):
        """(first, last) sample positions of the optimiser step that batch number `batch` belongs to."""
        first = batch // accumulate * accumulate
        return self.edges[first], self.edges[min(first + accumulate, len(self))]


class Samples(torch.utils.data.Dataset):
    """Base of the scripts' datasets: without loader workers each core prepares its part of a batch in a thread.

    A sample depends on its key alone, so any cut gives the same batch; decoding and warping do not hold Python's lock.
    """
    _threads = None

    def __getitems__(self, keys):
        """Samples of a batch, for the loader."""
        parts = 1 if torch.utils.data.get_worker_info() else min(cores_of_process(), len(keys))
        if parts == 1:
            return [self[key] for key in keys]
        self._threads = self._threads or concurrent.futures.ThreadPoolExecutor(cores_of_process() - 1)
        cuts = [len(keys) * part // parts for part in range(parts + 1)]
        others = [self._threads.submit(self._some, keys[first:last]) for first, last in zip(cuts[1:], cuts[2:])]
        return [*self._some(keys[:cuts[1]]), *itertools.chain.from_iterable(other.result() for other in others)]

    def _some(self, keys):
        return [self[key] for key in keys]


def make_loader(dataset, batch_size, args, compute, train, cached=False, weights=None, collate=None):
    """DataLoader over EpochBatches; `cached`: samples cost little, so that --num_workers auto needs fewer workers."""
    workers = resolve_workers(args.num_workers, cached)
    share = compute.processes.rank, compute.processes.size
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=EpochBatches(len(dataset), batch_size, args.seed, train, weights, *share),
        num_workers=workers, persistent_workers=workers > 0, collate_fn=collate,
        multiprocessing_context="fork" if workers and CAN_FORK else None,
        worker_init_fn=_guard_worker if workers else None, pin_memory=compute.device.type == "cuda",
        timeout=600 if workers else 0)


def count_cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_process():
    """This process's share of the cores, at least 1."""
    return max(count_cores() // launched_processes()["local_size"], 1)


def resolve_workers(num_workers, cached):
    """'auto' -> up to 8; 0 where a core more for the model helps more (two cores, cached samples) or none can fork."""
    if num_workers != "auto":
        return num_workers
    cores = cores_of_process()
    return 0 if not CAN_FORK or (cached and cores <= 2) else min(8, cores)


def _guard_worker(_):
    """Loader workers ignore the stop signals that a scheduler sends to every process; they obey their parent's TERM.

    SIG_IGN would make the loader's own shutdown hang, so the signals are blocked and one thread waits for them.
    """
    import cv2
    cv2.setNumThreads(0)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    parent, stops = os.getppid(), StopSignals.available()
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)

    def wait():
        while True:
            info = signal.sigwaitinfo(stops)
            if info.si_signo == signal.SIGTERM and info.si_pid == parent:
                os._exit(0)
    threading.Thread(target=wait, daemon=True).start()


class StopSignals:
    """TERM, USR1, USR2 and the first Ctrl-C ask for a save and a stop; the second Ctrl-C stops at once.

    While `armed` (in the epoch loop) a signal is only noted; elsewhere there is nothing to save and it stops at once.
    """

    def __init__(self):
        self.received, self.armed = None, False
        for number in self.available():
            signal.signal(number, self._receive)

    @staticmethod
    def available():
        """Their numbers, as far as this system has them."""
        names = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
        return {getattr(signal, name) for name in names if hasattr(signal, name)}

    def _receive(self, number, _):
        again = self.received == signal.SIGINT
        self.received = signal.Signals(number)
        if number == signal.SIGINT and (again or not self.armed):
            raise KeyboardInterrupt
        if not self.armed:
            self.leave()
            sys.exit(EXIT_SAVED)

    @classmethod
    def leave(cls):
        """From here on only Ctrl-C is obeyed: on the way out another signal could do no more than change the exit code.

        srun sends one to the tasks of a step that are slower to leave than the first, and Python puts every handler but
        SIG_IGN back to the default before it ends.
        """
        for number in cls.available() - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------
# torch.distributed for torchrun and srun: every process runs the whole script on its share of each batch and of each
# evaluation; the first one alone writes. One process alone never touches torch.distributed.

LOST_PROCESS = re.compile(r"gloo|nccl|TCPStore|[Cc]onnection (closed|reset)|Broken pipe", re.IGNORECASE)
PROCESS_TIMEOUT = datetime.timedelta(minutes=30)  # how long processes wait for one another, as for a report


def launched_processes(env=os.environ):
    """{rank, size, local_rank, local_size} that torchrun or an srun step gives this process; alone: rank 0 of 1."""
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # the batch script has a rank too, but is no step
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        names = ()
    found = [int(re.match(r"\d+", env.get(name, ""))[0]) if re.match(r"\d", env.get(name, "")) else None
             for name in names]
    rank, size, local_rank, local_size = found or (0, 1, 0, 1)
    if rank is None or size is None or not 0 <= rank < size:
        raise UserError(f"{names[0]}={env.get(names[0])} and {names[1]}={env.get(names[1])} are no rank of a number of "
                        "processes; start with torchrun or srun, or unset them")
    return {"rank": rank, "size": size, "local_rank": local_rank or 0, "local_size": local_size or 1}


def meeting_point(env=os.environ):
    """(address, port) at which the processes of an srun step find one another; MASTER_ADDR and MASTER_PORT count first.

    The first node of the step, or the node that srun was started on where its name leads nowhere; the port follows
    from job and step, so that two jobs on a node rarely want the same.
    """
    nodes = env.get("SLURM_STEP_NODELIST", "localhost")
    first = re.match(r"([^,\[]*)(?:\[(\d+)[^]]*\]([^,\[]*))?", nodes)  # gpu[003-004,7]-ib,other -> gpu003-ib
    host = "".join(part or "" for part in first.groups())
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        host = env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    port = 20000 + mix(int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))) % 20000
    return env.get("MASTER_ADDR", host), env.get("MASTER_PORT", str(port))


class Processes:
    """The processes that share one run; `rank` 0 of `size` is the first. With one of them every method is a no-op."""

    def __init__(self, launched=None):
        launched = launched or launched_processes()
        self.rank, self.size = launched["rank"], launched["size"]
        self.local_rank, self.is_first = launched.get("local_rank", 0), launched["rank"] == 0

    def join(self, device):
        """Meet the other processes. Raises UserError where they do not come together."""
        if self.size == 1:
            return
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting_point()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Imported later, as by the first optimiser, this module would take the group for its default arguments and keep
        # it, and its threads, past leave_processes().
        import torch.distributed.nn.functional
        try:
            torch.distributed.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=PROCESS_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"process {self.rank} of {self.size} did not meet the others at {where} "
                            f"({one_line(error)}); set MASTER_ADDR to the first node, MASTER_PORT to a free port, "
                            "GLOO_SOCKET_IFNAME to the network between them") from None
        if CAN_FORK:
            # A thread of the group that lets go of its last message holds a lock of Python 3.11 for a moment; a loader
            # worker forked in that moment hangs for ever. All messages are waited for, so a short rest empties it.
            os.register_at_fork(before=lambda: time.sleep(0.02))

    def on_first(self, function):
        """What function() gives on the first process, given to all; a user error or exit there ends all alike."""
        if self.size == 1:
            return function()
        outcome = [None, None]
        try:
            outcome[0] = function() if self.is_first else None
        except (UserError, SystemExit) as error:
            outcome[1] = error
        outcome = self.from_first(outcome)
        if outcome[1] is not None:
            outcome[1].said_by_first = not self.is_first
            raise outcome[1]
        return outcome[0]

    def from_first(self, value):
        """The first process's value, for all."""
        if self.size > 1:
            box = [value]
            torch.distributed.broadcast_object_list(box, 0)
            value = box[0]
        return value

    def gather(self, parts):
        """List of parts (tensors, arrays, dicts of them, ...) of all processes, in the order of the samples."""
        if self.size == 1:
            return parts
        boxes = [None] * self.size
        torch.distributed.all_gather_object(boxes, on_cpu(parts))
        return [part for box in boxes for part in box]

    def largest(self, numbers):
        """Element-wise largest of a list of integers over the processes."""
        if self.size > 1:
            numbers = torch.tensor(numbers)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
            numbers = numbers.tolist()
        return numbers

    def add_up(self, tensors):
        """Replace each tensor by its sum over the processes: one message for each dtype among them."""
        for dtype in {tensor.dtype: None for tensor in tensors} if self.size > 1 else ():
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            torch.distributed.all_reduce(flat)
            for tensor, piece in zip(own, flat.split([tensor.numel() for tensor in own])):
                tensor.copy_(piece.view(tensor.shape))

    @torch.no_grad()
    def spread(self, model):
        """Give all processes the first one's weights and buffers (running means of BatchNorm)."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                whole = tensor.detach().contiguous()
                torch.distributed.broadcast(whole, 0)
                tensor.copy_(whole)


def leave_processes(wait=True):
    """Part from the others, where `wait` once all have come this far; alone, nothing.

    It ends the threads of the group: one that lets go of a tensor while the interpreter ends would abort the process,
    with exit code 134 in place of its own.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if wait:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def on_cpu(value):
    """The same nest of dicts and lists with its tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_cpu(item) for item in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def first_process_only(function):
    """Decorator of function(run, ...): the first process does it for all, which wait for its result."""
    @functools.wraps(function)
    def wrapped(run, *args, **options):
        return run.compute.processes.on_first(lambda: function(run, *args, **options))
    return wrapped


# ---------------------------------------------------------------------------
# Tables and splits
# ---------------------------------------------------------------------------
# Any ratings table found in the wild becomes one RatingsTable; a split keeps groups whole and repeats exactly.

MISSING_CELLS = {"", "na", "nan", "n/a", "#n/a", "<na>"}
IMAGE_COLUMNS = ("image", "filename", "file", "stimulus", "path")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
NOT_A_TARGET = re.compile(r"(.*_)?(id|n|sd)|index|unnamed.*", re.IGNORECASE)


def _pick(wanted, options, where):
    """Names asked for -> those in `options`, in any case, X also for X_mean. UserError lists the unknown ones."""
    spelled = {name.lower().removesuffix("_mean"): name for name in options}
    spelled |= {name.lower(): name for name in options} | {name: name for name in options}
    unknown = [name + closest(name, options) for name in wanted or [] if not {name, name.lower()} & set(spelled)]
    if unknown:
        raise UserError(f"{where} {some(unknown)} (found: {some(options, 40)}). Correct the name.")
    return list(dict.fromkeys(spelled.get(name) or spelled[name.lower()] for name in wanted or []))


def _table_text(path):
    """Text of a file, unpacked where it is gzip: UTF-8 or UTF-16 (BOM), Windows-1252 as the last resort."""
    if not Path(path).is_file():
        raise UserError(f"{path}: expected a CSV table, found {'a folder' if Path(path).is_dir() else 'no such file'}.")
    data = Path(path).read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a gzip file, found a damaged one ({error}). Copy it again.") from None
    for encoding in ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1252"]:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if "\0" not in text:
                return text
    raise UserError(f"{path}: expected a CSV table, found binary data ({len(data)} bytes). Save it as CSV (UTF-8).")


def _csv_rows(text, delimiter, strict=True):
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=strict)


def _sniff(text):
    """-> (header names, delimiter); a header that lies in one quoted field above a row of many is parsed once more."""
    def fit(delimiter):
        rows = list(itertools.islice(filter(any, _csv_rows(text[:100_000], delimiter, strict=False)), 2)) or [[]]
        is_quoted = len(rows[0]) == 1 < len(rows[-1])
        names = next(_csv_rows(rows[0][0], delimiter, strict=False)) if is_quoted else rows[0]
        is_table = len(names) > 1  # among equals the comma comes last; alone it stands for a table of one column
        agrees = is_table and len(names) == len(rows[-1])
        return is_table, agrees, len(names), (delimiter == ",") != is_table, names, delimiter
    return max(map(fit, "\t;,"))[-2:]


def _clean_cells(values):
    """Stripped str cells, '' where missing; each different cell is looked at once (long tables repeat them)."""
    values = [str(value) for value in values]
    clean = {value: "" if value.strip().lower() in MISSING_CELLS else value.strip() for value in set(values)}
    return [clean[value] for value in values]


def read_table(path):
    """CSV table -> DataFrame of str cells, '' where blank, NA or NaN; its index holds the line numbers in the file.

    Comma, semicolon or tab; BOM; .gz; CRLF; a header quoted as one field is repaired. attrs: delimiter, notes.
    Raises UserError: no such file, binary, empty, rows of another width than the header, repeated column names.
    """
    import pandas as pd
    text = _table_text(path)
    header, delimiter = _sniff(text)
    reader = _csv_rows(text, delimiter)
    try:
        rows = [(reader.line_num, *row) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: expected CSV, found {error}. Correct the quotes.") from None
    if len(rows) < 2:
        raise UserError(f"{path}: expected a header and rows, found {len(rows)} line(s) with content. Check the file.")
    is_repaired = len(rows.pop(0)) - 1 != len(header)
    wrong = [f"line {row[0]} has {len(row) - 1}" for row in rows if len(row) - 1 != len(header)]
    if wrong:
        raise UserError(f"{path}: expected {len(header)} fields in every row as in the header, but {some(wrong, 5)}. "
                        f"Put cells that contain {delimiter!r} in quotes, and fill short rows.")
    names = [name.strip() or f"unnamed_{i}" for i, name in enumerate(header)]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: expected unique column names, found twice: {some(repeated)}. Rename or delete them.")
    lines, *columns = zip(*rows)
    table = pd.DataFrame(dict(zip(names, map(_clean_cells, columns))), index=pd.Index(lines), dtype=object)
    table.attrs.update(delimiter=delimiter, notes=["the quoted header line was parsed again"] * is_repaired)
    return table


def to_numbers(values, where):
    """Column of read_table, or a list -> (N,) float64, NaN where blank. `where`: file and column, for messages.

    Decimal commas count where no cell has a point and, in a comma file, not all could be thousands (1,234).
    Raises UserError listing the cells that are no finite number, with their lines.
    """
    cells, is_column = _clean_cells(values), hasattr(values, "attrs")
    commas = [re.fullmatch(r"[+-]?\d*,(\d+)([eE][+-]?\d+)?", cell) for cell in cells if "," in cell]
    if all(commas) and not any("." in cell for cell in cells):
        if is_column and values.attrs.get("delimiter") in (";", "\t") or any(len(match[1]) != 3 for match in commas):
            cells = [cell.replace(",", ".") for cell in cells]
    good = [not cell or (NUMBER.fullmatch(cell) and math.isfinite(float(cell))) for cell in cells]
    if not all(good):
        lines, what = (values.index, "line") if is_column else (range(1, len(cells) + 1), "row")
        bad = [f"{cell!r} in {what} {line}" for cell, line, ok in zip(values, lines, good) if not ok]
        raise UserError(f"{where}: expected numbers, found {some(bad)}. Correct these cells or leave them blank.")
    return np.array([float(cell) if cell else math.nan for cell in cells])


@dataclasses.dataclass
class RatingsTable:
    """N images in the order of the file, R ratings in its unit.

    images: N names as written; mean, sd, n: (N, R) float64, NaN = missing, sd and n None where the file has none;
    ratings_by_image: name -> N arrays of single ratings (long tables); extra: DataFrame of the other columns.
    """
    names: list
    images: list
    mean: np.ndarray
    sd: np.ndarray = None
    n: np.ndarray = None
    ratings_by_image: dict = None
    extra: object = None
    notes: list = dataclasses.field(default_factory=list)


def read_ratings(path, image_column=None, target_columns=None, duplicates="error", group_column=None):
    """Ratings file -> RatingsTable; layouts: X_mean/X_sd/X_n, one column per rating, or long (rating, attribute).

    duplicates: 'error', or 'mean' (mean and sd of repeated rows averaged, n summed). group_column is never a target.
    Raises UserError for every fault that would make the training meaningless, naming rows and columns.
    """
    table, source = read_table(path), f"--ratings_file {path}"
    group = _pick(group_column and [group_column], table.columns, f"{source} has no --group_column")
    table = table.rename(columns=dict(zip(group, [group_column])))
    spelled = {name.lower(): name for name in table.columns}
    image = _pick(image_column and [image_column], table.columns, f"{source} has no --image_column")
    image = (image + [spelled[name] for name in IMAGE_COLUMNS if name in spelled] + [None])[0]
    if image is None:
        raise UserError(f"{source} has no image column (found: {some(table.columns)}). Name it with --image_column.")
    is_long = {"rating", "attribute"} <= set(spelled)
    for column in [image, spelled["attribute"]] if is_long else [image]:
        blank = table.index[table[column] == ""]
        if len(blank):
            raise UserError(f"{source}: column {column} is blank in line {some(blank)}. Fill or delete these rows.")
    if is_long:
        ratings = _long_ratings(table, source, image, spelled["attribute"], spelled["rating"], target_columns)
    else:
        ratings = _wide_ratings(table, source, image, group_column, target_columns)
        _merge_duplicates(ratings, source, duplicates)
    ratings.notes[:0] = table.attrs["notes"]
    if group_column and group_column not in ratings.extra.columns:
        raise UserError(f"{source}: expected one group for each image in --group_column, found {group_column} to be an "
                        f"image, rating, sd or n column, or to vary within an image. Name another column.")
    empty = [name for name, row in zip(ratings.images, ratings.mean) if np.isnan(row).all()]
    if empty:
        raise UserError(f"{source}: all ratings are missing for {some(empty)}. Fill or delete these rows.")
    constant = [name for name, column in zip(ratings.names, ratings.mean.T) if len(set(column[~np.isnan(column)])) < 2]
    if constant:
        raise UserError(f"{source}: constant rating columns (nothing to learn): {some(constant)}. Leave them out: "
                        f"--target_columns {' '.join(name for name in ratings.names if name not in constant)}")
    return ratings


def _wide_ratings(table, source, image, group_column, wanted):
    """Targets: the columns asked for, else all *_mean, else those that are no ids and at least half numeric."""
    options = [name for name in table.columns if name not in (image, group_column)]

    def is_rating(name):
        numeric = [bool(NUMBER.fullmatch(cell.replace(",", ".", 1))) for cell in table[name] if cell]
        return not NOT_A_TARGET.fullmatch(name) and np.mean(numeric or [0]) >= 0.5  # a few bad cells are errors below
    chosen = (_pick(wanted, options, f"{source} has no --target_columns")
              or [name for name in options if name.lower().endswith("_mean")] or list(filter(is_rating, options)))
    names = [re.sub("_mean$", "", name, flags=re.IGNORECASE) for name in chosen]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{source}: expected one numeric column for each rating, took {some(chosen) or 'none'} of "
                        f"{some(options)}. Choose with --target_columns.")
    spelled = {name.lower(): name for name in options}
    sd_columns = [spelled.get(f"{name}_sd".lower()) for name in names]
    n_columns = [spelled.get(f"{name}_n".lower(), spelled.get("n")) for name in names]

    def block(columns):
        cells = [to_numbers(table[c], f"{source}, column {c}") if c else np.full(len(table), np.nan) for c in columns]
        return np.stack(cells, axis=1) if any(columns) else None
    extra = table.drop(columns={image, *chosen, *sd_columns, *n_columns} - {None})
    notes = [f"columns that are no ratings: {some(extra.columns)}"] if len(extra.columns) else []
    blocks = map(block, (chosen, sd_columns, n_columns))
    return RatingsTable(names, list(table[image]), *blocks, None, extra, notes)


def _long_ratings(table, source, image, attribute, rating, wanted):
    """One row per single rating -> mean, sd (ddof 1, NaN for one rating), n, and the ratings themselves."""
    import pandas as pd
    chosen = _pick(wanted, table[attribute].unique(), f"{source} has no --target_columns")
    table = table[table[attribute].isin(chosen)] if chosen else table
    value = to_numbers(table[rating], f"{source}, column {rating}")
    (image_code, images), (name_code, names) = pd.factorize(table[image]), pd.factorize(table[attribute])
    filled, shape = ~np.isnan(value), (len(images), len(names))
    cell = (image_code * len(names) + name_code)[filled]
    stats = pd.Series(value[filled]).groupby(cell).agg(["mean", "std", "count"]).reindex(range(math.prod(shape)))
    mean, sd, n = stats.to_numpy().T.reshape(3, *shape)
    pieces = np.split(value[filled][np.argsort(cell, kind="stable")], np.nancumsum(n).astype(int)[:-1])
    others = table.drop(columns=[image, attribute, rating])
    varying = [name for name in others.columns if (others[name].groupby(image_code).nunique() > 1).any()]
    notes = [f"{filled.sum()} single ratings of {len(images)} images ({(~filled).sum()} blank ones left out)"]
    notes += [f"columns that vary within an image, left out: {some(varying)}"] if varying else []
    extra = others.drop(columns=varying).iloc[np.unique(image_code, return_index=True)[1]]
    by_name = {name: pieces[r::len(names)] for r, name in enumerate(names)}
    return RatingsTable(list(names), list(images), mean, sd, np.nan_to_num(n), by_name, extra, notes)


def _merge_duplicates(ratings, source, duplicates):
    import pandas as pd
    names = [_clean_name(name) for name in ratings.images]
    lines = pd.Series(ratings.extra.index.astype(str)).groupby(names, sort=False)
    repeated = [f"{name} (lines {', '.join(rows)})" for name, rows in lines if len(rows) > 1]
    if repeated and duplicates != "mean":
        raise UserError(f"{source} lists images twice: {some(repeated)}. Delete rows, or average: --duplicates mean.")
    if repeated:
        code, first = lines.ngroup().to_numpy(), [rows.index[0] for _, rows in lines]
        for what in [what for what in ("mean", "sd", "n") if getattr(ratings, what) is not None]:
            rows = pd.DataFrame(getattr(ratings, what)).groupby(code)
            setattr(ratings, what, (rows.sum(min_count=1) if what == "n" else rows.mean()).to_numpy())
        ratings.images, ratings.extra = [ratings.images[row] for row in first], ratings.extra.iloc[first]
        ratings.notes.append(f"repeated rows of {len(repeated)} images were averaged: {some(repeated)}")


def write_target_table(path, keys, names, values):
    """CSV of predictions: columns `keys` {heading: N texts}, then NAME_KIND of each target; values {kind: (N, R)}."""
    columns = keys | {f"{name}_{kind}": each[:, r] for r, name in enumerate(names) for kind, each in values.items()}
    write_table(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def read_target_table(path, key, names):
    """A CSV of write_target_table -> (N texts of column `key`, {kind: (N, R)}); the first target tells the kinds."""
    table, first = read_table(path), f"{names[0]}_"
    kinds = [column.removeprefix(first) for column in table if column.startswith(first)]

    def columns(kind):
        return np.stack([to_numbers(table[f"{n}_{kind}"], f"{path}, column {n}_{kind}") for n in names], axis=1)
    return list(table[key]), {kind: columns(kind) for kind in kinds}


def find_images(folder):
    """All image files under `folder`, recursive, in natural order (2 before 10); hidden and '._' ones ignored."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: expected a folder of images, found no such folder. Check the path.")
    paths = [path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    found = {path.relative_to(folder): path for path in paths}
    natural = {name: [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", str(name).casefold()))]
               for name in found if not any(part.startswith(".") for part in name.parts)}
    return [found[name] for name in sorted(natural, key=lambda name: (natural[name], str(name)))]


def _clean_name(name):
    return unicodedata.normalize("NFC", str(name).strip()).replace("\\", "/").removeprefix("./")


def _path_key(name):
    """'a/B.JPG' -> '/a/b': without the image suffix and in one case."""
    stem, dot, suffix = name.rpartition(".")
    return "/" + (stem if dot + suffix.lower() in IMAGE_SUFFIXES else name).casefold()


def match_images(names, images_dir):
    """Names as a table writes them -> (N paths, None where no file fits; names of the files that no row asks for).

    With or without folder and suffix, any case, backslashes, NFC or NFD; a folder in the name must not contradict the
    one on disk. UserError: a name leaves `images_dir` or fits several files, or several names mean one file.
    """
    folder = Path(images_dir)
    files = {_clean_name(path.relative_to(folder).as_posix()): path for path in find_images(folder)}
    if not files:
        raise UserError(f"--images_dir {folder}: expected images ({' '.join(IMAGE_SUFFIXES)}), found none.")
    root = f"{_clean_name(folder.absolute().as_posix())}/"
    written = [_clean_name(name).removeprefix(root) for name in names]
    leaving = [f"row {i + 1} {names[i]!r}" for i, name in enumerate(written)
               if re.match("/|[A-Za-z]:", name) or ".." in name.split("/")]
    if leaving:
        raise UserError(f"expected names inside --images_dir {folder}, found {some(leaving)}. Correct these rows.")
    by_stem, names_of = collections.defaultdict(dict), collections.defaultdict(set)
    for file in files:
        by_stem[_path_key(file).rpartition("/")[2]][file] = _path_key(file)
    hits = [_best_files(name, by_stem[_path_key(name).rpartition("/")[2]]) for name in written]
    for name, hit in zip(written, hits):
        names_of[hit].add(name)
    unclear = [f"{some(sorted(rows))} -> {some(hit)}" for hit, rows in names_of.items() if len(rows) * len(hit) > 1]
    if unclear:
        raise UserError(f"expected one file for one image name, found {some(unclear)}. Write folder and suffix.")
    used = {file for hit in hits for file in hit}
    return [files[hit[0]] if hit else None for hit in hits], [file for file in files if file not in used]


def _best_files(name, candidates):
    """Of {file: path key} those that fit best: several where the name does not decide, none where folders differ."""
    key, written = _path_key(name), Path(name)
    fitting = {file: other for file, other in candidates.items() if key.endswith(other) or other.endswith(key)}

    def score(file):
        return (min(len(key), len(fitting[file])), Path(file).suffix.lower() == written.suffix.lower(),
                len(fitting[file]) <= len(key), Path(file).stem == written.stem)
    best = max(map(score, fitting), default=None)
    return tuple(file for file in fitting if score(file) == best)


def data_fingerprint(items):
    """sha256 (hex) over strings, bytes, numbers and arrays in this order."""
    digest = hashlib.sha256()
    for item in items:
        data = item if isinstance(item, bytes) else item.tobytes() if hasattr(item, "tobytes") else str(item).encode()
        digest.update(f"{type(item)} {getattr(item, 'dtype', '')} {np.shape(item)} {len(data)}:".encode() + data)
    return digest.hexdigest()


def _strata_codes(strata, n_rows):
    """Labels -> codes; floats -> up to 10 quantile bins of 10 rows or more, NaN in a bin of its own; (N,) int."""
    strata = np.zeros(n_rows, int) if strata is None else np.asarray(strata)
    if strata.dtype.kind == "f":
        inner = np.linspace(0, 1, min(10, max(1, n_rows // 10)) + 1)[1:-1]
        edges = np.quantile(strata[~np.isnan(strata)], inner) if not np.isnan(strata).all() else []
        strata = np.where(np.isnan(strata), -1, np.searchsorted(edges, strata, side="right"))
    return np.unique(strata.astype(str), return_inverse=True)[1]


def _deal(sizes, order, shares):
    """Each unit in this order to the part that lacks most rows -> (U,) part; no part with a share stays empty."""
    part, held, dealt = np.empty(len(order), int), np.zeros(len(shares)), 0
    for unit in order:
        dealt += sizes[unit]
        part[unit] = np.argmax(shares * dealt - held)
        held[part[unit]] += sizes[unit]
    for empty in np.flatnonzero((shares > 0) & (held == 0)):
        donor = np.argmax(np.bincount(part, minlength=len(shares)))
        part[order[part[order] == donor][-1]] = empty
    return part


def _assign(shares, strata, unit, seed, keys, n_rows):
    """-> (N,) part: rows dealt out stratum by stratum; groups by the best stratified of many random deals."""
    rng, stratum = np.random.default_rng(seed), _strata_codes(strata, n_rows)
    if unit is None:
        by_key = np.arange(n_rows) if keys is None else np.argsort(np.asarray(keys, dtype=str), kind="stable")
        shuffled = by_key[rng.permutation(n_rows)]
        return _deal(np.ones(n_rows), shuffled[np.argsort(stratum[shuffled], kind="stable")], shares)
    rows = np.zeros((unit.max() + 1, stratum.max() + 1))
    np.add.at(rows, (unit, stratum), 1)
    sizes, in_stratum = rows.sum(axis=1), rows.sum(axis=0)

    def misfit(part):
        held = np.stack([rows[part == p].sum(axis=0) for p in range(len(shares))])
        by_stratum = ((held - shares[:, None] * in_stratum) ** 2 / in_stratum).mean(axis=1)
        return (by_stratum + (held.sum(axis=1) - shares * n_rows) ** 2 / n_rows).sum()
    n_deals = min(300, 10 + 40_000 // len(rows))  # about a second at most
    orders = [np.argsort(-sizes, kind="stable"), *(rng.permutation(len(rows)) for _ in range(n_deals))]
    return min((_deal(sizes, order, shares) for order in orders), key=misfit)[unit]


def _units(n_rows, groups):
    """-> group number of each row (None without groups), how many units there are, what to call them."""
    if groups is None:
        return None, n_rows, "rows"
    labels, unit = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if "" in labels:
        raise UserError(f"expected a group in every row, found {np.sum(unit == 0)} blank. Fill the group column.")
    return unit, len(labels), "groups"


def make_split(n_rows, ratios, strata=None, groups=None, seed=42, keys=None):
    """Ratios {name: share} -> {name: sorted (n,) int rows}; groups stay whole, strata (labels, or binned floats) mixed.

    With keys (N unique str) the same rows get the same parts in any row order.
    Raises UserError: ratios do not add up to 1, a part would be empty, a blank group.
    """
    shares, (unit, n_units, what) = np.array(list(ratios.values()), dtype=float), _units(n_rows, groups)
    if not abs(shares.sum() - 1) < 1e-6 or shares.min() < 0:
        raise UserError(f"split ratios must be 0 or more and add up to 1, found {ratios} (sum {shares.sum():g}).")
    if n_units < np.sum(shares > 0) or np.any((shares > 0) & (shares * n_rows < 0.5)):
        raise UserError(f"empty split: {n_rows} rows ({n_units} {what}) are too few for {ratios}. Change the ratios.")
    part = _assign(shares, strata, unit, seed, keys, n_rows)
    return {name: np.flatnonzero(part == p) for p, name in enumerate(ratios)}


def make_folds(n_rows, k, strata=None, groups=None, seed=42, keys=None):
    """-> (N,) int fold 0 to k-1 of each row, balanced and dealt as in make_split. UserError: fewer units than folds."""
    unit, n_units, what = _units(n_rows, groups)
    if not 2 <= k <= n_units:
        raise UserError(f"--folds {k}: expected 2 or more and at most the number of {what}, found {n_units} {what}.")
    return _assign(np.full(k, 1 / k), strata, unit, seed, keys, n_rows)


def write_splits(path, split, keys, extra=None):
    """JSON {part: [keys in row order]} and, under 'info', whatever else explains the split."""
    listed = {name: [str(keys[row]) for row in rows] for name, rows in split.items()}
    write_json(path, {**listed, "info": extra or {}})


def read_split_file(path, keys):
    """JSON of write_splits, or {"train": [names], ...} -> {part: sorted (n,) int rows}. UserError lists the faults."""
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        parts = {name: list(map(str, names)) for name, names in listed.items() if isinstance(names, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--split_file {path}: expected JSON with a list train, found {error}") from None
    row_of, counts = {str(key): row for row, key in enumerate(keys)}, collections.Counter(sum(parts.values(), []))
    faults = [f"{name} (listed {count} times{'' if name in row_of else ', not in the table'})"
              for name, count in counts.items() if count > 1 or name not in row_of]
    if faults or not parts.get("train"):
        raise UserError(f"--split_file {path}: expected each image name once and a part train, found "
                        f"{some(faults) or some(parts) or 'no lists'}.")
    return {name: np.array(sorted(row_of[key] for key in names), dtype=int) for name, names in parts.items()}


def split_of_flags(args, keys, strata=None, groups=None):
    """The split that the flags ask for, by ratios or from --split_file: {train, val, test: sorted (n,) int rows}."""
    if not args.split_file:
        ratios = {"train": args.train_ratio, "val": args.val_ratio, "test": args.test_ratio}
        return make_split(len(keys), ratios, strata, groups, args.seed, keys)
    split = read_split_file(args.split_file, keys)
    if not len(split.get("val", ())):
        raise UserError(f"--split_file {args.split_file} has no val part; it chooses the epoch")
    return {part: split.get(part, np.array([], dtype=int)) for part in ("train", "val", "test")}


def effective_size(target, subjects=None):
    """target (N,) or (N, R), subjects (N,) -> {rows, distinct_label_vectors, subjects}: what the data really hold."""
    target = np.nan_to_num(np.asarray(target, dtype=float).reshape(len(target), -1), nan=np.inf)
    return {"rows": len(target), "distinct_label_vectors": len(np.unique(target, axis=0)),
            "subjects": None if subjects is None else len(set(map(str, subjects)))}


# ---------------------------------------------------------------------------
# Leakage
# ---------------------------------------------------------------------------
# Counts what two parts of a split share, before anything is trained on one and scored on the other.

# Measured on 804 aligned faces: copies (64 to 512 px, JPEG 30 to 90, brighter, darker) differ in at most 34 of 256
# bits, different faces in at least 58.
NEAR_DUPLICATE_BITS = 40


def perceptual_hash(image):
    """(H, W, 3) uint8 RGB -> (4,) uint64: 256 bits, which of the 16 x 16 lowest DCT frequencies exceed their median.

    Stands resizing, recompression and brightness; not mirroring or cropping. After pHash (Zauner 2010).
    """
    import cv2
    gray = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    low = cv2.dct(gray.astype(np.float32))[1:17, 1:17].ravel()
    return np.packbits(low > np.median(low) + 0.01).view(np.uint64)


def _near_pairs(phash):
    """(N, 4) uint64 -> (2, P) rows i < j of the pairs that differ in at most NEAR_DUPLICATE_BITS."""
    signs = 2 * np.unpackbits(np.ascontiguousarray(phash).view(np.uint8), axis=1).astype(np.float32) - 1
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(signs), 1024):
        agree = signs[start:start + 1024] @ signs[start:].T  # (B, N): number of bits - 2 x Hamming distance
        pairs.append(np.argwhere(np.triu(agree, 1) >= max(1, signs.shape[1] - 2 * NEAR_DUPLICATE_BITS)) + start)
    return np.concatenate(pairs).T


def leakage_report(split, pixel_sha, phash, keys, groups=None, events=None):
    """What every two parts share -> {between: {a-b: {what: {count, examples}}}, within: {part: {what: count}}}.

    split: {part: rows}; pixel_sha: N str, '' = unreadable; phash: (N, 4) uint64; keys: N names; groups, events: N str,
    '' = none. Groups, events and exact duplicates count distinct values, near-duplicates pairs that are not exact.
    """
    part_of = {row: name for name, rows in split.items() for row in rows}
    rows = [row for row in sorted(part_of, key=lambda row: str(keys[row])) if pixel_sha[row]]
    twins, near = collections.defaultdict(list), collections.defaultdict(list)
    for row in rows:
        twins[pixel_sha[row]].append(str(keys[row]))
    for i, j in np.take(rows, _near_pairs(np.asarray(phash)[rows])).T:
        if pixel_sha[i] != pixel_sha[j]:
            near[frozenset((part_of[i], part_of[j]))].append(f"{keys[i]} = {keys[j]}")
    columns = {"groups": groups, "events": events, "exact_duplicates": [" = ".join(twins[sha]) for sha in pixel_sha]}
    held = {(what, name): {str(column[row]) for row in rows_in} - {""} for what, column in columns.items()
            if column is not None for name, rows_in in split.items()}
    report = {"near_duplicate_bits": NEAR_DUPLICATE_BITS, "between": {}, "within": {}}
    for a, b in itertools.combinations(filter(lambda name: len(split[name]), split), 2):
        shared = {what: sorted(held[what, a] & held[what, b]) for what in columns if columns[what] is not None}
        shared["near_duplicates"] = near[frozenset((a, b))]
        report["between"][f"{a}-{b}"] = {what: {"count": len(found), "examples": found[:5]}
                                         for what, found in shared.items()}
    for name in split:
        copies = sum(part_of[row] == name for row in rows) - len(held["exact_duplicates", name])
        report["within"][name] = {"exact_duplicates": copies, "near_duplicates": len(near[frozenset((name,))])}
    return report


def leakage_text(report):
    """Report -> one line per two parts, with an example of each kind shared, and one per part that holds copies."""
    def line(where, counts, examples=()):
        text = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        return f"leakage {where}: {text}" + "".join(f" ({example})" for example in examples)
    between = [line(pair, {what: found["count"] for what, found in shared.items()},
                    [found["examples"][0] for found in shared.values() if found["count"]])
               for pair, shared in report["between"].items()]
    return "\n".join(between + [line(f"inside {part}", counts) for part, counts in report["within"].items()
                                if any(counts.values())])


def check_leakage(report, allow_leakage=False):
    """UserError where parts share groups, events or exact duplicates, unless allowed; near-duplicates never stop."""
    faults = [f"{pair} share {found['count']} {what.replace('_', ' ')} ({some(found['examples'], 3)})"
              for pair, shared in report["between"].items() for what, found in shared.items()
              if found["count"] and what != "near_duplicates"]
    if faults and not allow_leakage:
        raise UserError(f"leakage between the splits: {'; '.join(faults)}. Split by --group_column, remove the copies, "
                        f"or go on with --allow_leakage.")


def record_split(run, split, keys, pixel_sha, phash, groups=None, events=None):
    """splits.json and leakage_report.json of a run, its text in the log. UserError for a split that leaks."""
    write_splits(run.path("splits.json"), split, keys)
    report = leakage_report(split, pixel_sha, phash, keys, groups, events)
    write_json(run.path("leakage_report.json"), report)
    run.say(leakage_text(report))
    check_leakage(report, run.args.allow_leakage)


# ---------------------------------------------------------------------------
# Images and clips
# ---------------------------------------------------------------------------
# Every picture passes through one decoder, in training and in prediction alike, and is decoded once per run.

MAX_PIXELS = 200_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "TGA")  # Pillow opens MPO as JPEG
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError,
                 RuntimeError, MemoryError, struct.error, zlib.error)  # what its parsers raise on damaged files


class BadImage(UserError):
    """One file that cannot be used as a picture; the message is the reason."""


@dataclasses.dataclass
class ImageAudit:
    """What decoding one file found; `error` is None for a good picture, else the reason and all else is empty.

    width, height: pixels of the whole upright picture. file_sha, pixel_sha: SHA-256 of the file and of the decoded,
    resized pixels. phash: their perceptual_hash as 4 integers.
    """
    path: str
    error: str | None = None
    width: int = 0
    height: int = 0
    file_sha: str = ""
    pixel_sha: str = ""
    phash: tuple = (0, 0, 0, 0)


def _imaging():
    """(cv2, Pillow's Image), with our size limit and one thread: OpenCV's own threads do not survive a fork."""
    import cv2
    from PIL import Image
    if Image.MAX_IMAGE_PIXELS != MAX_PIXELS // 2:  # Pillow raises above twice its limit, from the header alone
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        warnings.filterwarnings("ignore", module=r"PIL\.")
    cv2.setNumThreads(0)
    return cv2, Image


@contextlib.contextmanager
def _open_picture(path):
    """Pillow's image of a regular file with the header read and no pixels; BadImage for whatever happens inside."""
    Image = _imaging()[1]
    try:
        if not Path(path).is_file():  # a pipe or device would block for ever
            raise BadImage(f"{'not a regular file' if os.path.exists(path) else 'no such file'}")
        if not (size := Path(path).stat().st_size):
            raise BadImage(f"empty file, {size} bytes")
        with open(path, "rb") as handle:
            yield Image.open(handle, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"its header claims more than {MAX_PIXELS // 10**6} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"no picture, or a damaged header (formats read: {', '.join(IMAGE_FORMATS)})") from error
    except PILLOW_ERRORS as error:
        raise BadImage(f"damaged: {one_line(error) or type(error).__name__}") from error


def scaled_size(width, height, short_side):
    """(width, height) with the short side equal to short_side, the long side rounded; None keeps the size."""
    scale = 1 if short_side is None else short_side / min(width, height)
    size = round(width * scale), round(height * scale)
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage(f"too elongated to be scaled: {width} x {height} pixels")
    return size


def _grey_to_8bit(image):
    """uint8 (H, W) from integers of more than 8 bits or floats, scaled and never clipped.

    Integers up to 16 bits: their whole range becomes 0..255, so signed zero is mid-grey. 32-bit integers and floats
    declare no white: floats within 0..1 are multiplied by 255, all else is stretched from its minimum to its maximum.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, sample_format = tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0], tags.get(TIFF_SAMPLE_FORMAT, (1,))[0]
    if bits == 32 and sample_format == 1:
        values = values.view(np.uint32)  # Pillow holds unsigned 32-bit samples as signed
    if not np.isfinite(values).all():
        raise BadImage(f"has {np.sum(~np.isfinite(values))} NaN or infinite pixels")
    low, high = float(values.min()), float(values.max())
    if bits <= 16 and values.dtype.kind in "iu":
        low = -2.0 ** (bits - 1) if sample_format == 2 else 0.0
        high = low + 2.0 ** bits - 1
    elif values.dtype.kind == "f" and 0 <= low and high <= 1:
        low, high = 0.0, 1.0
    grey = np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return 255 - grey if tags.get(TIFF_PHOTOMETRIC) == 0 else grey


def _to_rgb(image):
    """uint8 (H, W, 3) from any Pillow mode: transparency on white, CMYK by Pillow's formula without a profile."""
    if image.mode[0] in "IF":
        return np.repeat(_grey_to_8bit(image)[..., None], 3, axis=2)
    if "A" in image.mode or "transparency" in image.info:
        Image, rgba = _imaging()[1], image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _decode(path, short_side, reduced=True):
    """(pixels uint8 (H, W, 3), (width, height) of the whole upright picture); BadImage with the bare reason."""
    from PIL import ImageOps  # decodes, because OpenCV, a fifth faster, returns the rest of a truncated JPEG as grey
    cv2 = _imaging()[0]
    with _open_picture(path) as image:
        whole = image.size
        scaled_size(*whole, short_side)  # refuses before anything is allocated
        if reduced and short_side is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (math.ceil(1.5 * short_side),) * 2)  # decodes at 1/2, 1/4 or 1/8, never below this
        drafted = image.size
        image.load()
        with contextlib.suppress(*PILLOW_ERRORS):  # damaged EXIF does not damage the picture
            ImageOps.exif_transpose(image, in_place=True)
        whole = whole if image.size == drafted else whole[::-1]
        pixels, size = _to_rgb(image), scaled_size(*whole, short_side)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if size[0] <= image.width else cv2.INTER_CUBIC), whole


def load_image(path, short_side=None, reduced=True):
    """Decode one picture to uint8 (H, W, 3) RGB, upright, scaled so that its short side is `short_side` pixels.

    Transparency is put on white, more than 8 bits are scaled to 8, the first frame is taken. JPEGs are decoded at
    `reduced` size, at least 1.5 times the target; smaller pictures are enlarged. Raises BadImage: file and reason.
    """
    try:
        return _decode(path, short_side, reduced)[0]
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from error


def audit_image(path, short_side, reduced=True):
    """(ImageAudit, pixels uint8 (H, W, 3)) of one file; pixels has no rows when the file is bad."""
    try:
        pixels, (width, height) = _decode(path, short_side, reduced)
    except BadImage as error:
        return ImageAudit(str(path), str(error)), np.empty((0, 0, 3), np.uint8)
    file_sha, pixel_sha = (hashlib.sha256(data).hexdigest() for data in (Path(path).read_bytes(), pixels))
    phash = tuple(perceptual_hash(pixels).tolist())
    return ImageAudit(str(path), None, width, height, file_sha, pixel_sha, phash), pixels


def check_bad_files(audit, on_bad_file):
    """Indices of the good ones in a list of ImageAudit; "error" raises UserError listing all bad ones."""
    bad = [f"  {found.path}: {found.error}" for found in audit if found.error]
    if bad and on_bad_file == "error":
        raise UserError(f"{len(bad)} of {len(audit)} pictures cannot be read. Mend or remove them, or pass "
                        f"--on_bad_file skip:\n" + "\n".join(bad))
    print("".join(f"skipped{line[1:]}\n" for line in bad), end="", flush=True)
    return [index for index, found in enumerate(audit) if not found.error]


def available_memory():
    """Bytes this process may still take: what the machine has free, or what its cgroup (a SLURM job) leaves."""
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        group = Path("/sys/fs/cgroup", re.search(r"^0::/(.*)", Path("/proc/self/cgroup").read_text(), re.M)[1])
    except (OSError, TypeError):
        return 4 << 30  # not Linux: a careful guess
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file: no limit here
            free = min(free, int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(free, 0) // launched_processes()["local_size"]


class PixelStore:
    """N uint8 arrays (..., H, W, 3), each decoded once; the base of ImageStore and of the clips of train_video.py.

    cache: "ram"; "disk", one memory-mapped file in cache_dir that a second run takes up again; "none", decoded at
    each access; "auto", ram up to a quarter of the available memory, else disk, else none. `audit` is a list of N
    dataclasses with path, error, pixel_sha and phash. progress(done, total) is called after each one. Pixels from a
    cache are read-only: worker processes share them. Raises UserError for a cache in a data folder or without room.
    A subclass sets what its methods need, then calls start(); it gives _estimate, _decoded, _load, _contents and
    _still_bad, and names its items, its audit's class and the data folders.
    """
    item, file_prefix, audit_class, data_folders = "picture", "images", ImageAudit, frozenset()

    def start(self, n_items, cache, cache_dir, progress):
        """Choose the cache, then take it up or decode everything."""
        self.n_items, self.progress = n_items, progress
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "small-data-scripts")
        self.cache_dir = Path(cache_dir or home).absolute()
        if cache_dir and self.data_folders & {self.cache_dir, *self.cache_dir.parents}:
            raise UserError(f"cache folder {self.cache_dir} lies in a data folder; name one outside the {self.item}s")
        self.bytes = self._estimate() if cache in ("auto", "disk") else 0
        if cache == "auto":
            cache = "ram" if self.bytes <= available_memory() / 4 else "disk" if self._disk_fits() else "none"
        self.cache, self.file = cache, self._cache_file() if cache == "disk" else None
        if cache != "disk":
            self._pixels = [None] * n_items
            for index, pixels in self._decode_all():
                self._pixels[index] = pixels if cache == "ram" else None
        elif not self._open_cache():
            self._write_cache()
            assert self._open_cache(), f"{self.file} was written and does not read back"

    def __len__(self):
        return self.n_items

    def __getitem__(self, index):
        if self.audit[index].error:
            raise BadImage(f"{self.audit[index].path}: {self.audit[index].error}")
        return self._load(index) if self.cache == "none" else self._pixels[index]

    @property
    def description(self):
        """Which cache, how many items and how many MB, for the log."""
        where = f"{self.cache} cache {self.file}" if self.file else f"{self.cache} cache"
        return f"{where}: {len(self)} {self.item}s, {self.bytes / 1e6:.0f} MB decoded"

    def _threaded(self, work, items, in_flight=8):
        """Results of work(item) in order; `in_flight` items a thread at a time, so that memory stays flat."""
        threads = count_cores()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(items), in_flight * threads):
                yield from pool.map(work, items[start:start + in_flight * threads])

    def _disk_fits(self):
        existing = next(folder for folder in (self.cache_dir, *self.cache_dir.parents) if folder.exists())
        return os.access(existing, os.W_OK) and shutil.disk_usage(existing).free > 1.1 * self.bytes + 2 ** 26

    def _decode_all(self):
        """Yield (index, pixels) in the order of decoding; fills the audit."""
        self.audit, self.bytes = [None] * len(self), 0
        for done, (index, found, pixels) in enumerate(self._decoded(), 1):
            self.audit[index] = found
            self.bytes += pixels.nbytes
            pixels.flags.writeable = False
            if self.progress:
                self.progress(done, len(self))
            yield index, pixels

    def _cache_file(self):
        """The cache's name is a fingerprint of the files, the settings and the decoders."""
        key = json.dumps([2, [library.__version__ for library in _imaging()], self._contents()])
        return self.cache_dir / f"{self.file_prefix}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache"

    def _write_cache(self):
        if not self._disk_fits():
            raise UserError(f"--cache disk needs {self.bytes / 1e6:.0f} MB of writable space in {self.cache_dir}; "
                            f"free some, set XDG_CACHE_HOME to a larger disk, or use --cache none")
        with saving(self.file, self.bytes):
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            handle = tempfile.NamedTemporaryFile(dir=self.cache_dir, prefix=self.file.stem, suffix=".tmp", delete=False)
            try:
                with handle:
                    self._write_items(handle)
                os.replace(handle.name, self.file)
            finally:
                Path(handle.name).unlink(missing_ok=True)

    def _write_items(self, handle):
        """All pixels as they come, then offsets, shapes and audit as JSON, its length (8 bytes), its SHA-256 (32)."""
        places, offset = [None] * len(self), 0
        for index, pixels in self._decode_all():
            handle.write(pixels)
            places[index] = [offset, pixels.shape]
            offset += pixels.nbytes
        index = json.dumps([[*place, dataclasses.asdict(a)] for place, a in zip(places, self.audit)]).encode()
        handle.write(index + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest())
        handle.flush()
        os.fsync(handle.fileno())

    def _open_cache(self):
        """Take up the cache file; False where there is none or any part of it does not hold what it should."""
        if not self.file.is_file() or self.file.stat().st_size < 40:
            return False
        memory = np.memmap(self.file, np.uint8, "r")
        index = memory[max(-40 - int.from_bytes(memory[-40:-32].tobytes(), "little"), -len(memory)):-40].tobytes()
        if hashlib.sha256(index).digest() != memory[-32:].tobytes():
            return False
        items = json.loads(index)
        self.audit = [self.audit_class(**{**found, "phash": tuple(found["phash"])}) for *_, found in items]
        self._pixels = [memory[start:start + math.prod(shape)].reshape(shape) for start, shape, _ in items]
        self.bytes = sum(pixels.nbytes for pixels in self._pixels)
        # What could not be read then may be readable now without a change of its size and date: it is tried again.
        return all(self._still_bad(found.path) if found.error else hashlib.sha256(pixels).hexdigest() == found.pixel_sha
                   for found, pixels in zip(self.audit, self._pixels))


class ImageStore(PixelStore):
    """N pictures, each decoded once, served as uint8 (H, W, 3) with the given short side in pixels.

    cache, cache_dir, progress: see PixelStore; reduced: see load_image. `audit` is a list of N ImageAudit. Raises
    BadImage for a bad picture.
    """

    def __init__(self, paths, short_side, cache="auto", cache_dir=None, progress=None, reduced=True):
        self.paths, self.short_side, self.reduced = [Path(path) for path in paths], short_side, reduced
        self.data_folders = {path.absolute().parent for path in self.paths}
        self.start(len(self.paths), cache, cache_dir, progress)

    def _estimate(self):
        return sum(self._threaded(self._decoded_bytes, self.paths))

    def _decoded_bytes(self, path):
        with contextlib.suppress(BadImage), _open_picture(path) as image:
            return 3 * math.prod(scaled_size(*image.size, self.short_side))
        return 0

    def _decoded(self):
        results = self._threaded(lambda path: audit_image(path, self.short_side, self.reduced), self.paths)
        return ((index, *result) for index, result in enumerate(results))

    def _load(self, index):
        return load_image(self.paths[index], self.short_side, self.reduced)

    def _contents(self):
        return [self.short_side, self.reduced, [file_stamp(path) for path in self.paths]]

    def _still_bad(self, path):
        return bool(audit_image(path, self.short_side, self.reduced)[0].error)


def file_stamp(path):
    """[absolute path, size, date in ns] of a file, or [absolute path, None]: changes when the file does."""
    state = Path(path).stat() if Path(path).is_file() else None
    return [os.path.abspath(path), *((state.st_size, state.st_mtime_ns) if state else (None,))]


# ---------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------
# Augmentation is drawn once and applied as one warp, one colour matrix and one erased rectangle.

# Ranges are (low, high) or +- the number, chances lie in 0 to 1; `heavy` is the preset of a published study of calves,
# `basic` and `enhanced` those of one of cattle faces.
AUGMENTATIONS = {
    "none": {},
    "light": {"flip": .5, "jitter": (.1, .1, .1, 0)},
    "full": {"flip": .5, "jitter": (.3, .3, .3, .1), "rotation": 15, "shear": 10, "scale": (.9, 1.1), "translate": .1,
             "greyscale": .1, "perspective": .3, "erase": .2},
    "heavy": {"flip": .5, "area": (.6, 1), "jitter": (.5, .5, .3, .05), "rotation": 10, "greyscale": .2, "erase": .3,
              "blur": .3, "autocontrast": .4, "shuffle": .1, "noise": .2},
    "basic": {"flip": .5, "jitter": (.2, .2, .2, 0), "rotation": 10},
    "enhanced": {"flip": .5, "jitter": (.3, .3, .3, .1), "rotation": 15, "scale": (.9, 1.1), "translate": .1,
                 "blur": .3},
}
LUMA = np.array([0.299, 0.587, 0.114])
HUE_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)


@dataclasses.dataclass
class Augmentation:
    """One draw of augment parameters; the defaults change nothing and crop the centre.

    crop and the last two of erase (area, height / width, x, y): position as a fraction of the free margin;
    resized: (share of the picture's area, width / height) of a crop that is scaled to the output, None = no scaling;
    translate: of the output size; corners: x, y clockwise from the top left, of the largest inward shift; blur: sigma
    in pixels; noise: (sd in grey levels, seed); channels: which colour becomes R, G and B; in_steps: applied by
    torchvision, one operation after the other.
    """
    crop: tuple = (0.5, 0.5)
    resized: tuple | None = None
    flip: bool = False
    rotation_deg: float = 0.0
    translate: tuple = (0.0, 0.0)
    scale: float = 1.0
    shear_deg: float = 0.0
    corners: tuple | None = None
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    jitter_order: tuple = ("brightness", "contrast", "saturation", "hue")
    greyscale: bool = False
    erase: tuple | None = None
    channels: tuple = (0, 1, 2)
    autocontrast: bool = False
    blur: float = 0.0
    noise: tuple | None = None
    in_steps: bool = False


def sample_augmentation(preset, generator, in_steps=False):
    """Draw an Augmentation for a preset of AUGMENTATIONS from a torch.Generator; every draw takes 48 numbers from it.

    "full" has the distributions of torchvision's RandomCrop, RandomHorizontalFlip, RandomRotation(15),
    RandomAffine(0, (.1, .1), (.9, 1.1), 10), ColorJitter(.3, .3, .3, .1), RandomGrayscale(.1),
    RandomPerspective(.2, .3), RandomErasing(.2, (.02, .15)); "heavy" those of RandomResizedCrop(scale=(.6, 1)),
    GaussianBlur(sigma=(.1, 2)), RandomAutocontrast and others in place of some.
    """
    if preset not in AUGMENTATIONS:
        raise ValueError(f"preset must be one of {', '.join(AUGMENTATIONS)}, not {preset!r}")
    numbers = iter(torch.rand(48, generator=generator).tolist())
    if preset == "none":
        return Augmentation()
    ranges = {"rotation": 0, "shear": 0, "scale": (1, 1), "translate": 0, "perspective": 0, "erase": 0, "greyscale": 0,
              "blur": 0, "autocontrast": 0, "shuffle": 0, "noise": 0, **AUGMENTATIONS[preset]}

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * next(numbers)

    def happens(name):
        return uniform() < ranges[name]

    def around(name):
        return uniform(-ranges[name], ranges[name])
    drawn = Augmentation((uniform(), uniform()), flip=happens("flip"), in_steps=in_steps)
    *factors, hue = ranges["jitter"]
    drawn.brightness, drawn.contrast, drawn.saturation = (uniform(1 - width, 1 + width) for width in factors)
    drawn.jitter_order = tuple(sorted(drawn.jitter_order, key=lambda _: next(numbers)))
    drawn.rotation_deg, drawn.shear_deg, drawn.scale = around("rotation"), around("shear"), uniform(*ranges["scale"])
    drawn.translate, drawn.hue = (around("translate"), around("translate")), uniform(-hue, hue)
    drawn.greyscale = happens("greyscale")
    if happens("perspective"):
        drawn.corners = tuple(uniform() for _ in range(8))
    if happens("erase"):
        drawn.erase = (uniform(0.02, 0.15), math.exp(uniform(math.log(0.3), math.log(3.3))), uniform(), uniform())
    if "area" in ranges:
        drawn.resized = (uniform(*ranges["area"]), math.exp(uniform(math.log(3 / 4), math.log(4 / 3))))
    if happens("shuffle"):
        drawn.channels = tuple(sorted(range(3), key=lambda _: next(numbers)))
    drawn.autocontrast = happens("autocontrast")
    if happens("blur"):
        drawn.blur = uniform(0.1, 2.0)
    if happens("noise"):
        drawn.noise = (uniform(2.0, 12.0), int(uniform(0, 2 ** 31)))
    return drawn


def _position(length, size, fraction):
    """First pixel of a window of `size` in `length`, each of the possible ones equally likely."""
    if length < size:
        raise ValueError(f"a window of {size} pixels does not fit into a picture of {length}")
    return min(int(fraction * (length - size + 1)), length - size)


def _crop_window(shape, drawn, size):
    """(left, top, width, height) in pixels of the crop that a draw takes from a picture of shape (H, W, 3)."""
    height, width = shape[:2]
    if drawn.resized is None:
        return _position(width, size, drawn.crop[0]), _position(height, size, drawn.crop[1]), size, size
    share, ratio = drawn.resized
    wide, high = (min(math.sqrt(share * height * width * r), side) for r, side in ((ratio, width), (1 / ratio, height)))
    return (width - wide) * drawn.crop[0], (height - high) * drawn.crop[1], wide, high


def _homography(drawn, window, size):
    """Matrix (3, 3) from picture to output, pixel centres at .5, composed of the steps in torchvision's order."""
    half, scale, mirror, (left, top, width, height) = size / 2, drawn.scale, -1 if drawn.flip else 1, window
    to_centre = np.array([[size / width, 0, -(left * size / width + half)],
                          [0, size / height, -(top * size / height + half)], [0, 0, 1]])
    cos, sin = math.cos(math.radians(drawn.rotation_deg)), math.sin(math.radians(drawn.rotation_deg))
    turn = np.array([[cos * mirror, sin, 0], [-sin * mirror, cos, 0], [0, 0, 1]])
    shift_x, shift_y = (round(fraction * size) + half for fraction in drawn.translate)
    affine = np.array([[scale, -scale * math.tan(math.radians(drawn.shear_deg)), shift_x],
                       [0, scale, shift_y], [0, 0, 1]])
    matrix = affine @ turn @ to_centre
    if drawn.corners is None:
        return matrix
    return _imaging()[0].getPerspectiveTransform(*_moved_corners(drawn, size)) @ matrix


def _moved_corners(drawn, size):
    """Pixels that the perspective moves, clockwise from the top left, and where to: float32 (4, 2) of whole numbers."""
    unit = np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])
    inward = np.floor(np.float32(drawn.corners).reshape(4, 2) * (int(0.2 * (size // 2)) + 1)) * (1 - 2 * unit)
    return (size - 1) * unit, (size - 1) * unit + inward


def _colour_matrix(drawn, mean):
    """(3, 4) matrix [M | offset] of all colour operations on RGB in 0..255; mean (3,): mean colour of the picture.

    The formulas are torchvision's; the grey mean that contrast needs is carried through the operations before it.
    Two differences: hue is a rotation about the grey axis (Rodrigues), which agrees with HSV's hue at multiples of a
    third and keeps R + G + B, not max and min; and values are cut to 0..255 once, at the end.
    """
    matrix = np.hstack([np.eye(3), np.zeros((3, 1))])
    for name in drawn.jitter_order:
        step, shift = np.eye(3) * getattr(drawn, name), 0.0
        if name == "contrast":
            shift = (1 - drawn.contrast) * (LUMA @ (matrix @ np.append(mean, 1)))
        elif name == "saturation":
            step += (1 - drawn.saturation) * LUMA
        elif name == "hue":
            cos, sin = math.cos(2 * math.pi * drawn.hue), math.sin(2 * math.pi * drawn.hue)
            step = cos * np.eye(3) + (1 - cos) / 3 + sin * HUE_TURN
        matrix = step @ matrix
        matrix[:, 3] += shift
    return np.tile(LUMA @ matrix, (3, 1)) if drawn.greyscale else matrix[list(drawn.channels)]


def jitter_colours(image, drawn):
    """The colour part of an Augmentation on uint8 (H, W, 3), geometry untouched."""
    if drawn.in_steps:
        clip = torch.tensor(image[None]).permute(0, 3, 1, 2)  # (1, 3, H, W)
        return _colours_in_steps(clip, drawn)[0].permute(1, 2, 0).numpy()
    cv2 = _imaging()[0]
    return cv2.transform(image, _colour_matrix(drawn, cv2.mean(image)[:3]))


def apply_augmentation(image, parameters, size):
    """Apply an Augmentation to uint8 (H, W, 3) and return uint8 (size, size, 3); H and W at least `size`.

    One bilinear warp; pixels from outside the picture are 0. What the crop cut off comes back where a rotation or
    shift needs it, so there are fewer black corners than with separate steps. Erased pixels are 0 after to_input.
    """
    return augment_clip(image[None], parameters, size)[0]


def augment_clip(frames, parameters, size):
    """Apply one Augmentation to all frames of a clip alike: uint8 (T, H, W, 3) -> (T, size, size, 3).

    Means and extremes that colour operations need are those of the whole clip, so that nothing flickers (in_steps:
    those of each frame, as torchvision takes them).
    """
    cv2, drawn = _imaging()[0], parameters
    clip = (_warp_in_steps if drawn.in_steps else _warp_at_once)(frames, drawn, size)
    if drawn.autocontrast:
        clip = _stretch_contrast(clip.reshape(-1, size, 3)).reshape(clip.shape)
    if drawn.blur:
        clip = np.stack([cv2.GaussianBlur(pixels, (0, 0), drawn.blur) for pixels in clip])
    if drawn.noise is not None:
        sd, seed = drawn.noise
        pattern = np.random.default_rng(seed).normal(0, sd, clip.shape[1:]).astype(np.float32)
        clip = np.clip(np.rint(clip + pattern), 0, 255).astype(np.uint8)
    if drawn.erase is not None:
        area, ratio, x, y = drawn.erase
        height, width = round(size * math.sqrt(area * ratio)), round(size * math.sqrt(area / ratio))
        top, left = _position(size, height, y), _position(size, width, x)
        clip[:, top:top + height, left:left + width] = [round(255 * mean) for mean in IMAGENET_MEAN]
    return clip


def _warp_at_once(frames, drawn, size):
    """Geometry as one homography and colours as one matrix: uint8 (T, H, W, 3) -> (T, size, size, 3)."""
    cv2 = _imaging()[0]
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from pixel centres
    window = _crop_window(frames.shape[1:], drawn, size)
    matrix = np.linalg.inv(half) @ _homography(drawn, window, size) @ half
    clip = np.empty((len(frames), size, size, 3), np.uint8)
    for frame, pixels in zip(frames, clip):
        cv2.warpPerspective(frame, matrix, (size, size), dst=pixels, flags=cv2.INTER_LINEAR)
    tall = clip.reshape(-1, size, 3)  # (T * size, size, 3): one call for the colours of all frames
    return cv2.transform(tall, _colour_matrix(drawn, cv2.mean(tall)[:3])).reshape(clip.shape)


def _warp_in_steps(frames, drawn, size):
    """Geometry and colours as torchvision's operations one by one: uint8 (T, H, W, 3) -> (T, size, size, 3)."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F
    left, top, width, height = map(round, _crop_window(frames.shape[1:], drawn, size))
    bilinear, clip = InterpolationMode.BILINEAR, torch.tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
    clip = F.resized_crop(clip, top, left, height, width, [size, size], bilinear, antialias=True)
    clip = F.hflip(clip) if drawn.flip else clip
    clip = F.rotate(clip, drawn.rotation_deg, bilinear) if drawn.rotation_deg else clip
    shift, shear = [round(fraction * size) for fraction in drawn.translate], [drawn.shear_deg, 0.0]
    if any(shift) or drawn.shear_deg or drawn.scale != 1:
        clip = F.affine(clip, 0.0, shift, drawn.scale, shear, bilinear)
    if drawn.corners is not None:
        start, end = (corners.astype(int).tolist() for corners in _moved_corners(drawn, size))
        clip = F.perspective(clip, start, end, bilinear)
    return np.ascontiguousarray(_colours_in_steps(clip, drawn).permute(0, 2, 3, 1).numpy())


def _colours_in_steps(clip, drawn):
    """Colours of uint8 (T, 3, H, W) by torchvision's operations one by one."""
    from torchvision.transforms import functional as F
    for name in drawn.jitter_order:
        amount = getattr(drawn, name)
        if amount != (0.0 if name == "hue" else 1.0):
            clip = getattr(F, f"adjust_{name}")(clip, amount)
    return F.rgb_to_grayscale(clip, 3) if drawn.greyscale else clip[:, list(drawn.channels)]


def _stretch_contrast(pixels):
    """Each colour of uint8 (H, W, 3) stretched to 0..255, a constant one left alone; as torchvision's autocontrast."""
    cv2 = _imaging()[0]
    low, high = np.float32([cv2.minMaxLoc(colour)[:2] for colour in cv2.split(pixels)]).T
    low, spread = np.where(high > low, low, 0), np.where(high > low, high - low, 255)
    table = (np.arange(256, dtype=np.float32)[:, None] - low) * (255 / spread)  # (256, 3): a new level for each
    return cv2.LUT(pixels, table.clip(0, 255).round().astype(np.uint8)[None])


def eval_crop(image, size):
    """Centre crop of uint8 (H, W, 3) to uint8 (size, size, 3), a copy; H and W at least `size`."""
    top, left = _position(image.shape[0], size, 0.5), _position(image.shape[1], size, 0.5)
    return image[top:top + size, left:left + size].copy()


def to_input(batch, device, mean=IMAGENET_MEAN, std=IMAGENET_STD, channels_last=True):
    """Normalise a uint8 tensor (B, H, W, 3) on `device` to float32 (B, 3, H, W); channels_last costs no copy."""
    # Rows of W * 3 numbers: a last axis of length 3 would be four times slower.
    pixels = batch.to(device, non_blocking=True).to(torch.float32)  # (B, H, W, 3)
    centre, spread = (255 * torch.tensor(values, device=device).repeat(batch.shape[2]) for values in (mean, std))
    pixels.flatten(2).sub_(centre).div_(spread)
    pixels = pixels.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
    return pixels if channels_last else pixels.contiguous()


# ---------------------------------------------------------------------------
# Backbones and weights
# ---------------------------------------------------------------------------
# Any torchvision classifier without its last layer; its weights come from a file, the cache or the network.

def build_backbone(name, pretrained=True, weights=None, image_size=224, family="models"):
    """torchvision classifier -> (module: (B, 3, H, W) -> (B, F), feature width F).

    weights: state dict file; family: "models", or "video" for networks (B, 3, T, H, W) -> (B, F). Raises UserError for
    an unknown name, weights that cannot be had (both ways out named), or a file whose layers are others.
    """
    import torchvision
    classifiers = torchvision.models.list_models(module=getattr(torchvision.models, family, torchvision.models))
    if name not in classifiers:
        raise UserError(f"{name} is no torchvision classifier of {family}{closest(name, classifiers)}")
    if name.startswith("vit_") and image_size % int(name.rsplit("_", 1)[1]):
        raise UserError(f"--image_size {image_size}: {name} needs a multiple of {name.rsplit('_', 1)[1]}")
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    last = _last_linear(model, name)
    if weights or pretrained:
        state = load_weights_file(weights) if weights else published_weights(name)
        _load_backbone_state(model, state, last, weights or name)
    layer = model.get_submodule(last)
    n_features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    model.set_submodule(last, nn.Identity())
    return model, n_features


def _last_linear(model, name):
    """Path of the classifier's last layer, linear or a convolution. UserError where it ends in something else."""
    if hasattr(model, "aux_logits"):  # the side heads of GoogLeNet and Inception serve only their own training
        model.aux_logits, model.AuxLogits, model.aux1, model.aux2 = False, None, None, None
    path = next((path for path, module in reversed(list(model.named_modules()))
                 if isinstance(module, (nn.Linear, nn.Conv3d))), None)
    if path is None or len(model.get_submodule(path).weight) not in (1000, 400):  # classes of ImageNet, Kinetics
        raise UserError(f"--backbone {name} does not end in a linear layer; choose another, such as resnet50")
    return path


def cached_weights_file(name):
    """(path, url) of torchvision's published weights of a model; the path in the hub cache may not exist yet."""
    import torchvision
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1], url


def published_weights(name):
    """State dict of torchvision's default weights, from cache or network. UserError where neither has them."""
    path, url = cached_weights_file(name)
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:
            raise UserError(f"no pretrained weights for {name}: {path} is missing and the download failed ({error}). "
                            f"Run `python verify_setup.py --download_weights {name}` where there is internet, or give "
                            "--weights FILE; --no_pretrained starts from random weights") from None
    if zipfile.is_zipfile(path):
        return load_weights_file(path)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
        raise CheckpointError(f"{path} is damaged (its SHA-256 does not begin with {prefix}); delete it")
    # an older file without a checked archive, but the hash proves it
    return _state_dict(torch.load(path, map_location="cpu", weights_only=True), path)


def load_weights_file(path):
    """Weights file -> {name: float tensor}; bare, under state_dict or model, prefixed by module., half precision.

    What has overflowed in a conversion to half precision is its largest number, 65504, and is said. Raises
    CheckpointError for other numbers that are not finite: a run could be trained with them, and never be continued.
    """
    return _state_dict(read_checkpoint(path), path)


def _state_dict(state, path):
    for key in ("state_dict", "model", "model_state"):
        state = state[key] if isinstance(state.get(key), dict) else state
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors: expected a state dict, found {list(state)[:5]}")
    overflown = [name for name, value in tensors.items() if value.dtype == torch.float16 and value.isinf().any()]
    if overflown:  # an infinite running variance would silence its channel
        largest = torch.finfo(torch.float16).max
        print(f"note: {path}: numbers too large for half precision in {some(overflown, 3)}; {largest:.0f} taken for them",
              flush=True)
        tensors |= {name: tensors[name].clamp(-largest, largest) for name in overflown}
    _check_weights(tensors, path)
    return {name.removeprefix("module."): value.float() if value.is_floating_point() else value
            for name, value in tensors.items()}


def _check_weights(state, source):
    bad = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{source} holds weights that are not finite ({some(bad, 1)})")


def _load_backbone_state(model, state, last, source):
    """Load all but the classifier `last`, strictly."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{last}.")}
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or wrong:
        raise UserError(f"{source}: not the weights of this backbone: {len(missing)} of {len(own)} layers missing, "
                        f"{len(wrong)} of another shape (first: {[*missing, *wrong][0]})")
    model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)


def fold_batchnorm(model):
    """Copy in eval mode with BatchNorm folded into the convolutions: same outputs within rounding, fewer passes.

    A model that torch.fx cannot trace is returned as it is.
    """
    from torch.fx.experimental.optimization import fuse
    model.eval()
    try:
        # traced before it is copied: the copy of a feature extractor falls back to training mode
        traced = copy.deepcopy(torch.fx.symbolic_trace(model)).eval()
        return fuse(traced, inplace=True, no_trace=True).eval()
    except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError):
        return model


class MultiScale(nn.Module):
    """Feature maps of a backbone's last three resolutions, each averaged over a grid: (B, 3, S, S) -> (B, F).

    What is asked for may hang on small things or large ones; the last layer alone keeps little of the small.
    """

    def __init__(self, backbone, image_size, grid=4):
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor
        ends = stage_ends(backbone, torch.zeros(1, 3, image_size, image_size))[-3:]
        if len(ends) < 3:
            raise UserError(f"--head ridge needs a backbone with feature maps of 3 resolutions, found {len(ends)}; "
                            "use --head mlp")
        self.maps, self.grid = create_feature_extractor(backbone, ends), grid
        self.n_features = self(torch.zeros(1, 3, image_size, image_size)).shape[1]

    def forward(self, images):
        maps = self.maps(images).values()  # (B, 3, S, S) -> three of (B, C, H, W)
        return torch.cat([nn.functional.adaptive_avg_pool2d(m, self.grid).flatten(1) for m in maps], 1)  # (B, F)


@torch.inference_mode()
def stage_ends(backbone, example):
    """Paths of the modules that end each resolution, largest first, found by one pass over an example input."""
    sizes = {1: {}, 2: {}}  # depth of the module -> {height: path}, in the order of execution

    def note(path):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.ndim == example.ndim and (
                    output.shape[-2] == output.shape[-1] > 1):
                sizes[path.count(".") + 1][output.shape[-1]] = path
        return hook
    hooks = [module.register_forward_hook(note(path)) for path, module in backbone.named_modules()
             if path and path.count(".") < 2]
    backbone.eval()(example)
    for hook in hooks:
        hook.remove()
    stages = sizes[1] if len(sizes[1]) >= 3 else sizes[2]
    return [stages[height] for height in sorted(stages, reverse=True)]


def freeze_stages(backbone, n_stages, example):
    """Take the layers of the first n_stages resolutions out of training. Raises UserError where there are fewer."""
    if not n_stages:
        return
    ends = stage_ends(backbone, example)
    if n_stages > len(ends):
        raise UserError(f"--freeze_stages {n_stages}: this backbone has {len(ends)} resolutions: {', '.join(ends)}")
    end, modules = ends[n_stages - 1], list(backbone.named_modules())
    last = max(i for i, (path, _) in enumerate(modules) if path == end or path.startswith(f"{end}."))
    for _, module in modules[1:last + 1]:  # a stage may end in a layer without weights
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


class BackboneModel(nn.Module):
    """A `backbone` that may be frozen, and what a script puts on top of it.

    Layers that are not trained stay in evaluation mode, and with freeze_norm every BatchNorm does.
    """

    def __init__(self, backbone, freeze_norm=False):
        super().__init__()
        self.backbone, self.freeze_norm = backbone, freeze_norm
        self.trainable = [p for p in backbone.parameters() if p.requires_grad]

    def freeze_backbone(self, frozen):
        """Take the backbone out of training, or put back what was trainable at first."""
        for parameter in self.trainable:
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if not any(p.requires_grad for p in self.trainable):
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                    self.freeze_norm or not module.weight.requires_grad):
                module.eval()
        return self


@torch.inference_mode()
def frozen_features(backbone, keys, pixels, compute, batch_size=64):
    """float32 (N, F) features of N pictures through a frozen backbone; pixels(key) is uint8 (S, S, 3)."""
    features, processes = [], compute.processes
    own = range(len(keys) * processes.rank // processes.size, len(keys) * (processes.rank + 1) // processes.size)
    for start in own[::batch_size]:
        batch = torch.from_numpy(np.stack([pixels(key) for key in keys[start:min(start + batch_size, own.stop)]]))
        with compute.autocast():
            inputs = to_input(batch, compute.device, channels_last=compute.channels_last)  # (B, 3, S, S)
            features.append(backbone(inputs).float().cpu())  # (B, 3, S, S) -> (B, F)
    return torch.cat(processes.gather(features)).numpy()


# ---------------------------------------------------------------------------
# Optimiser and schedule
# ---------------------------------------------------------------------------
# The learning rate is a pure function of the progress of the run; only `plateau` remembers anything.

def build_optimizer(modules, args):
    """Optimiser over [(module, learning-rate factor)]; biases and normalisation layers (ndim < 2) are not decayed."""
    groups = []
    for module, factor in modules:
        parameters = [p for p in module.parameters() if p.requires_grad]
        for decay, is_matrix in ((args.weight_decay, True), (0.0, False)):
            chosen = [p for p in parameters if (p.ndim > 1) == is_matrix]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "lr": args.lr * factor, "factor": factor})
    fused = takes(args, "optimizer") or None  # None: what torch takes by itself
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, fused=fused)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=args.lr, fused=fused)


def schedule_factor(scheduler, progress, epochs, warmup_epochs):
    """Learning-rate factor in [0, 1] at `progress` epochs: linear warm-up, then what the name of the schedule says.

    warm_restarts: SGDR (Loshchilov & Hutter 2017) with T0 = 10 epochs, doubled at each restart; onecycle: Smith &
    Topin 2018, from 1/25 up to 1 over the first 30 % of the run, down to 0 over the rest, both along a cosine.
    """
    if progress < warmup_epochs:
        return max(progress / warmup_epochs, 1e-3)
    if scheduler == "warm_restarts":
        length, passed = 10.0, progress - warmup_epochs
        while passed >= length:
            length, passed = 2 * length, passed - length
        return 0.5 * (1 + math.cos(math.pi * passed / length))
    if scheduler == "onecycle":
        share = (progress - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
        if share < 0.3:
            return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * share / 0.3))
        return 0.5 * (1 + math.cos(math.pi * (share - 0.3) / 0.7))
    if scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)))
    if scheduler == "step":
        return 0.1 ** (int(progress) // max(1, epochs // 3))
    return 1.0


# ---------------------------------------------------------------------------
# Checkpoints and resume
# ---------------------------------------------------------------------------
# What is written survives a kill at any moment; what is read is checked to the last byte before anything is trusted.

FORMAT = 1
SAVE_PAUSE = 4  # between two saves of brief epochs, in times of what a save takes


class CheckpointError(UserError):
    """A checkpoint that is damaged, hostile or none at all: exit code 3."""
    code = EXIT_CHECKPOINT


def save_checkpoint(path, content, keep_previous=False):
    """Write a dict of what `plain` gives, whole or not at all; keep_previous leaves the file before it as .prev."""
    buffer, path = io.BytesIO(), Path(path)
    torch.save(content, buffer)
    if keep_previous and path.exists():
        with saving(f"{path}.prev"):
            _keep_previous(path, path.with_name(path.name + ".prev"), path.with_name(f".{path.name}.prev.tmp"))
    write_whole(path, buffer.getbuffer())


def _keep_previous(path, previous, temporary):
    """Give the old file the name .prev without a moment in which neither name has a whole file."""
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except OSError:  # no hard links here (exFAT, some network drives): for a moment only .prev exists
        return os.replace(path, previous)
    try:
        os.replace(temporary, previous)
    finally:  # a rename between two links of one file does nothing, and leaves both
        temporary.unlink(missing_ok=True)


def read_checkpoint(path):
    """Load a checkpoint file as plain data. Nothing in it is executed; every byte is checked (zip CRC) before use.

    Raises CheckpointError for anything but a whole, uncompressed torch zip of dense tensors and plain values.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path} (expected a regular file)")
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(content)
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
            AssertionError, MemoryError, pickle.UnpicklingError) as error:
        # torch's own text on unpickling advises to load with weights_only=False
        reason = "it holds more than tensors, numbers and texts: objects whose loading could run code" if isinstance(
            error, pickle.UnpicklingError) else f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path} is no usable checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no usable checkpoint (expected a dict, found {type(content).__name__})")
    return content


def _check_archive(path):
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with path.open("rb") as handle:
            head = handle.read(64)
        hint = "a Git LFS pointer: run `git lfs pull`" if head.startswith(b"version https://git-lfs") else (
            "a web page" if head.lstrip()[:1] == b"<" else f"{size} bytes, no zip archive")
        raise ValueError(f"it is {hint}")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if is_packed or sum(entry.file_size for entry in entries) > size:
            raise ValueError(f"its archive claims more than its {size} bytes hold")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the entry {damaged} is damaged")


def _check_plain(value):
    """Dense, materialised tensors and plain Python values only. Iterative, since nesting may be hostile."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            is_dense = item.layout == torch.strided and not item.is_meta and not item.is_quantized
            if not is_dense or item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor is not dense ({item.layout}, shape {tuple(item.shape)})")
        elif isinstance(item, (dict, list, tuple)):
            if id(item) in seen:
                continue
            seen.add(id(item))
            todo.extend([*item, *item.values()] if isinstance(item, dict) else item)
        elif not (item is None or isinstance(item, (bool, int, float, str))):
            raise ValueError(f"it holds a {type(item).__name__}")


def load_model_file(path, script):
    """best_model.pth of `script` -> dict. Raises UserError for another script's file, CheckpointError for damage."""
    content = read_checkpoint(path)
    if content.get("format") != FORMAT or "model" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this project (format {content.get('format')!r})")
    if content.get("script") != script:
        raise UserError(f"{path} was written by {content.get('script')}, expected one of {script}")
    return content


def starting_weights(path, **expected):
    """--init_from -> state dict of another run of this script. UserError where a field differs from `expected`."""
    content = load_model_file(path, script_name())
    wrong = [f"{name} {content.get(name)}, expected {value}" for name, value in expected.items()
             if content.get(name) != value]
    if wrong:
        raise UserError(f"--init_from {path} was trained for something else: {'; '.join(wrong)}")
    return content["model"]


def checkpoint_files(paths):
    """Files and run folders -> checkpoint files: a folder's own best_model.pth, or those of its folds."""
    files = []
    for path in map(Path, paths):
        inside = [path / "best_model.pth"] if (path / "best_model.pth").is_file() else sorted(
            path.glob("fold_*/best_model.pth"), key=lambda p: int(p.parent.name.removeprefix("fold_")))
        if path.is_dir() and not inside:
            raise UserError(f"--checkpoint {path} holds no best_model.pth and no fold_K/best_model.pth")
        files += inside if path.is_dir() else [path]
    return files


@contextlib.contextmanager
def checkpoint_fields(path):
    """A field that a checkpoint lacks, or has in another form, becomes CheckpointError inside this block."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fault = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path} lacks what this script stores in a checkpoint ({fault})") from None


def load_state(model, state, source):
    """Strict load_state_dict whose refusal is one sentence; NaN weights are refused too."""
    _check_weights(state, source)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} does not fit this model: {one_line(error)}") from None


class NotFinite(UserError):
    """A loss or gradient that is NaN or infinite: the run stops with exit code 1 before the step is taken."""
    code = EXIT_CRASH


class Training:
    """The state that a kill must not lose, and the steps that are easy to get wrong.

    run, model, optimizer, args: of this run. select: history column that chooses the best epoch, or 'last'.
    describe: function () -> dict of what predict needs beside the weights, stored in best_model.pth. brief_epochs: they
    may take less time than their saving, so it waits until it takes a fifth of the whole time; a kill repeats them.

    for epoch in training.epochs():              # the epochs still to do
        for batch in training.batches(loader):   # the batches still to do: seeds dropout, sets the learning rate
            training.step(loss)                  # scale, backward, unscale, clip, check, step, zero, save, stop
        training.end_epoch(row)                  # history, best, early stopping, checkpoints

    Several processes take every step together: gradients, means, stop signals and non-finite losses are those of all,
    and so the result depends on the number of processes in the last bits alone. Not so with BatchNorm on the CPU, which
    sees a slice of the batch (on GPUs it is made to see all), with dropout, and with losses that sample (detector).
    DistributedDataParallel is not used: it gives every process the same weight, whatever its share of the samples.
    """

    def __init__(self, run, model, optimizer, args, select, describe, higher_is_better=True, brief_epochs=False):
        self.run, self.model, self.optimizer, self.args, self.describe = run, model, optimizer, args, describe
        self.select, self.sign, self.brief_epochs = select, 1 if higher_is_better else -1, brief_epochs
        self.scaler = torch.amp.GradScaler(run.compute.device.type, enabled=run.compute.precision == "fp16")
        self.epoch, self.batch, self.sums, self.history, self.done = 0, 0, {}, [], False
        self.best = {"epoch": None, "score": None}
        self.stopping = EarlyStopping(args.patience, args.min_epochs, args.min_delta)
        self.plateau, self.plateau_factor = EarlyStopping(args.plateau_patience, 0, 0.0), 1.0
        self._last_save, self._save_seconds, self._started = time.monotonic(), 0.0, None
        self._is_saved, self._unsaved_best = True, None  # the last epoch; a best_model.pth that is still to be written
        self.processes = run.compute.processes
        if self.processes.size > 1 and run.compute.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if run.resumed:
            self._load_last()
        self.processes.spread(model)

    # --- the loop -----------------------------------------------------------

    def epochs(self):
        """Numbers of the epochs that remain, from 1; stop signals are obeyed within."""
        signals = self.run.signals
        signals.armed = True
        while not self.done:
            yield self.epoch + 1
            stop, = self.processes.largest([int(signals.received or 0)])
            if stop and not self._is_saved:
                self._write_epoch()
            self._stop_if(stop)
        signals.armed = False

    def batches(self, loader):
        """The batches that remain in this epoch. Model and sampler are made ready."""
        sampler = self._sampler = loader.batch_sampler
        if self._started is None:
            self.run.say(f"loader: {loader.num_workers or 'no'} workers, {len(sampler)} batches an epoch")
        self._started, self._seen = time.perf_counter(), 0
        self._n_batches = min(2, len(sampler)) if self.args.dry_run else len(sampler)
        sampler.epoch, sampler.start, self._own, self._bad = self.epoch, self.batch, {}, []
        self.optimizer.zero_grad(set_to_none=True)
        self._set_learning_rate()  # also where the run was stopped after the last batch: the history needs it
        to_do = itertools.islice(loader, self._n_batches - self.batch)
        label = f"epoch {self.epoch + 1}/{self.args.epochs}"
        for batch in with_progress(self.run, label, to_do, self._n_batches, self.batch):
            self._names = batch.get("name", [])
            self._set_learning_rate()
            seed, rank = mix(self.args.seed, self.epoch, self.batch), self.processes.rank
            torch.manual_seed(mix(seed, rank) if rank else seed)  # dropout
            yield batch
        self.processes.spread(self.model)  # buffers differ, and weights may on unlike processors

    def step(self, loss, **parts):
        """Add a batch's gradient so that every sample of the optimiser step counts the same; step when it is full.

        loss: mean over this process's samples of the batch; parts: further tensors to average into the history. Raises
        NotFinite before the step when the loss or gradient is not finite: the checkpoint before it stays healthy.
        """
        self._check_finite(loss.detach(), "loss")
        own, whole, step = (last - first for first, last in (  # in samples; own is 0 in a batch too small for all
            self._sampler.own_span(self.batch), self._sampler.step_span(self.batch, 1),
            self._sampler.step_span(self.batch, self.args.accumulate)))
        self.scaler.scale(loss * (own / step)).backward()
        for name, value in {"loss": loss, **parts}.items():
            total, count = self._own.get(name, (0.0, 0))
            self._own[name] = (total + value.detach().double() * own, count + whole)
        self.batch, self._seen = self.batch + 1, self._seen + whole
        if self.batch % self.args.accumulate and self.batch < self._n_batches:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        stop, is_due = self._share(parameters)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf, foreach=True)
        if not self.scaler.is_enabled():
            self._check_finite(norm, "gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if is_due or stop:
            self.save()
        self._stop_if(stop)

    def _share(self, parameters):
        """Make gradients and sums those of all processes; (stop signal or 0, is a save due) as all of them see it."""
        minutes, stop = self.args.save_minutes, int(self.run.signals.received or 0)
        is_due = bool(minutes) and time.monotonic() - self._last_save > 60 * minutes
        if self.processes.size > 1:
            graded = [p.grad is not None for p in parameters]
            stop, is_due, is_bad, *graded = self.processes.largest([stop, is_due, bool(self._bad), *graded])
            if is_bad:
                raise NotFinite(self.processes.gather(self._bad)[0])
            used = [p for p, is_graded in zip(parameters, graded) if is_graded]
            for p in used:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.processes.add_up([*(total for total, _ in self._own.values()), *(p.grad for p in used)])
        for name, (total, count) in self._own.items():
            sum_before, count_before = self.sums.get(name, (0.0, 0))
            self.sums[name] = (sum_before + total, count_before + count)
        self._own = {}
        return stop, is_due

    def epoch_means(self):
        """Means over the samples of this epoch of every part given to step(): {'train_loss': ...}."""
        return {f"train_{name}": float(total) / count for name, (total, count) in self.sums.items()}

    def _set_learning_rate(self):
        batch = min(self.batch, self._n_batches - 1)
        first, _ = self._sampler.step_span(batch, self.args.accumulate)
        progress = self.epoch + first / self._sampler.n_samples  # in samples: any cut into batches gives the same rate
        factor = schedule_factor(self.args.scheduler, progress, self.args.epochs, self.args.warmup_epochs)
        self._rate = max(self.args.lr * self.plateau_factor * factor, self.args.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * group["factor"]

    def _check_finite(self, value, what):
        if torch.isfinite(value):
            return
        names = ", ".join(map(str, self._names))
        text = (f"the {what} is {value.item()} in epoch {self.epoch + 1}, batch {self.batch + 1} (samples: {names}); "
                "the last checkpoint is healthy. Try a smaller --lr, --use_amp off, or look at these samples")
        if self.processes.size == 1 or what == "gradient":
            raise NotFinite(text)
        self._bad.append(text)  # all processes stop together, before the step

    def _stop_if(self, stop):
        """Leave where the processes have agreed on a stop signal (its number, else 0)."""
        if stop:
            self.processes.largest([0])  # the first one has saved: where one task ends, srun may end the others
            self.run.signals.leave()
            asked = signal.Signals(stop)
            self.run.say(f"{asked.name} received: saved epoch {self.epoch + 1}, batch {self.batch}; "
                         f"continue with --resume {self.run.folder}")
            sys.exit(EXIT_INTERRUPT if asked == signal.SIGINT else EXIT_SAVED)

    # --- the end of an epoch ------------------------------------------------

    def end_epoch(self, row):
        """Close an epoch: its history row, the best model, early stopping, and the checkpoints that are due."""
        row = self.processes.from_first(row)
        self.history.append({"epoch": self.epoch + 1, "learning_rate": self._rate, **row})
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        score = self._score_of(self.epoch)
        better = self.best["epoch"] is None or score > self.best["score"]
        if better:
            self.best = {"epoch": self.epoch, "score": score}
        if self.args.scheduler == "plateau" and self.plateau.update(score, self.epoch):
            self.plateau_factor, self.plateau.bad_epochs = self.plateau_factor * 0.5, 0
        self.run.watch(self.history[-1])
        stop = self.stopping.update(score, self.epoch) and self.epoch < self.args.epochs and self.select != "last"
        self.done = stop or self.epoch >= self.args.epochs
        if better and self.processes.is_first:
            self._unsaved_best = self._model_file()
        self._is_saved = self._is_due()
        if self._is_saved:
            self._write_epoch()
        elif better:
            self._unsaved_best = copy.deepcopy(self._unsaved_best)  # training goes on with these very tensors
        lead = [*row] if len(row) <= 10 else [*dict.fromkeys([*itertools.islice(row, 6), self.select])]
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in lead if name in row)  # the rest: training_history.csv
        seconds, memory = time.perf_counter() - self._started, peak_memory(self.run.compute.device) / 2 ** 30
        self.run.say(f"epoch {self.epoch}/{self.args.epochs}  {shown}  ({seconds:.2f} s, {self._seen / seconds:.1f} "
                     f"samples/s, peak {memory:.2f} GB){' *' if better else ''}")
        if stop:
            self.run.say(f"stopped early after epoch {self.epoch}: no better {self.select} for "
                         f"{self.stopping.bad_epochs} epochs")

    def _score_of(self, epoch):
        """Larger is better: the epoch's number for 'last', -inf for NaN or an epoch that is not in the history."""
        if epoch > len(self.history):
            return -math.inf
        score = float(epoch) if self.select == "last" else self.sign * self.history[epoch - 1][self.select]
        return score if math.isfinite(score) else -math.inf

    def _is_due(self):
        """Is this epoch written at once? Brief ones, shorter than their own saving, share one in a while."""
        every, spent = self.args.save_every, time.monotonic() - self._last_save
        asked_for = self.args.save_top_k or (every and self.epoch % every == 0)
        return self.done or asked_for or not self.brief_epochs or spent > SAVE_PAUSE * self._save_seconds

    def _write_epoch(self):
        start = time.monotonic()
        if self.processes.is_first:
            if self.args.save_top_k:
                self._save_top()
            if self.args.save_every and self.epoch % self.args.save_every == 0:
                save_checkpoint(self.run.path(f"checkpoint_epoch_{self.epoch}.pth"), self._content())
        self.save()
        self._save_seconds = time.monotonic() - start

    def _model_file(self):
        return plain({"format": FORMAT, "script": script_name(), "model": self.model.state_dict(), "epoch": self.epoch,
                      "metric": self.select, "history": self.history[-1], **self.describe()})

    def _save_top(self):
        kept = {int(path.stem.rsplit("_", 1)[1]) for path in self.run.folder.glob("top_epoch_*.pth")} | {self.epoch}
        ranked = sorted(kept, key=self._score_of, reverse=True)[:self.args.save_top_k]
        if self.epoch in ranked:
            save_checkpoint(self.run.path(f"top_epoch_{self.epoch}.pth"), self._model_file())
        for epoch in kept - set(ranked):
            self.run.path(f"top_epoch_{epoch}.pth").unlink(missing_ok=True)

    # --- saving and loading -------------------------------------------------

    def _content(self):
        return plain({
            "format": FORMAT, "script": script_name(), "epoch": self.epoch, "batch": self.batch, "done": self.done,
            "sums": {name: [float(total), count] for name, (total, count) in self.sums.items()}, "best": self.best,
            "history": self.history, "stopping": vars(self.stopping), "plateau": vars(self.plateau),
            "plateau_factor": self.plateau_factor, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()})

    def save(self):
        """Write best_model.pth if there is a better one, last.pth, the one before it as last.pth.prev, the history."""
        if self.processes.is_first:
            # best first: a kill between the two repeats the epoch and writes the same best again
            if self._unsaved_best:
                save_checkpoint(self.run.path("best_model.pth"), self._unsaved_best)
            save_checkpoint(self.run.path("last.pth"), self._content(), keep_previous=True)
            if self.history:
                write_table(self.run.path("training_history.csv"), self.history)
        self._unsaved_best, self._last_save = None, time.monotonic()

    def _load_last(self):
        content = self._read_last()
        if content is None:
            return
        with checkpoint_fields(self.run.folder):
            load_state(self.model, content["model"], "last.pth")
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.epoch, self.batch, self.done = content["epoch"], content["batch"], content["done"]
            self.history, self.best = content["history"], content["best"]
            self.plateau_factor = content["plateau_factor"]
            self.sums = {name: (torch.tensor(total, dtype=torch.float64), count)
                         for name, (total, count) in content["sums"].items()}
            vars(self.stopping).update(content["stopping"])
            vars(self.plateau).update(content["plateau"])
        if self.history:  # a kill after the last save may have cost the file its last row
            write_table(self.run.path("training_history.csv"), self.history)
        where = f"epoch {self.epoch + 1}, batch {self.batch}" if self.batch else f"after epoch {self.epoch}"
        self.run.say(f"continuing {where}")

    def _read_last(self):
        """The newest good one of CHECKPOINT, last.pth and last.pth.prev; None where the run was stopped before any."""
        paths, named = [self.run.path("last.pth"), self.run.path("last.pth.prev")], Path(self.args.resume)
        if named.is_file() and named.resolve().parent == self.run.folder.resolve():  # not in the other folds
            paths = [named]
        found, faults = [path for path in paths if path.exists()], []
        for path in found:
            try:
                content = read_checkpoint(path)
                if content.get("format") != FORMAT or content.get("script") != script_name():
                    raise CheckpointError(f"{path} is no checkpoint of {script_name()} ({content.get('script')!r})")
            except CheckpointError as error:
                faults.append(str(error))
                self.run.say(f"WARNING: {error}")
                continue
            if faults:
                self.run.say(f"WARNING: continuing from {path.name}, the checkpoint before it")
            return content
        if found:
            raise CheckpointError(f"{self.run.folder} cannot be continued: no usable checkpoint ({'; '.join(faults)})")
        return None


def peak_memory(device):
    """Most bytes this process has held: on the GPU, or in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def plain(value):
    """Tensors (copied to the CPU), numbers, strings, lists and dicts only: what weights_only loading accepts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# ---------------------------------------------------------------------------
# Early stopping
# ---------------------------------------------------------------------------
# Counts epochs without a gain; a score that is not a number is never a gain.

class EarlyStopping:
    """Stop after `patience` epochs that beat the best score by no more than min_delta; 0 = never. Larger is better.

    A checkpoint keeps vars() of it.
    """

    def __init__(self, patience, min_epochs, min_delta):
        self.patience, self.min_epochs, self.min_delta = patience, min_epochs, min_delta
        self.reference, self.bad_epochs = -math.inf, 0

    def update(self, score, epoch):
        """Count one epoch (numbered from 1); True when it is time to stop."""
        if score > self.reference + self.min_delta:
            self.reference, self.bad_epochs = score, 0
        else:
            self.bad_epochs += 1
        return 0 < self.patience <= self.bad_epochs and epoch >= self.min_epochs


# ---------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------
# Computed on the whole split at once, in the unit of the labels; each is a function of how often every row counts.

REGRESSION_METRICS = ("pearson_r", "r2", "mae", "mse", "rmse")
LOWER_IS_BETTER = ("mae", "mse", "rmse", "loss", "nll", "brier", "ece", "ece_adaptive")


def regression_moments(predicted, target):
    """(8, N, R) terms whose sums over rows give every regression metric: 1, p, t, pp, tt, pt, |p - t|, (p - t)^2.

    predicted, target: (N, R), NaN in target = missing (zero in all eight terms); p and t are taken about their means
    over the labelled rows, which changes neither r nor R2 and keeps the digits of large offsets.
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if predicted.shape != target.shape or target.ndim != 2:
        raise ValueError(f"expected two arrays of one shape (N, R), got {predicted.shape} and {target.shape}")
    labelled = ~np.isnan(target)
    count = np.maximum(labelled.sum(0), 1)
    p, t = np.where(labelled, predicted, 0.0), np.where(labelled, target, 0.0)
    error = p - t
    p, t = np.where(labelled, p - p.sum(0) / count, 0.0), np.where(labelled, t - t.sum(0) / count, 0.0)
    return np.stack([labelled.astype(np.float64), p, t, p * p, t * t, p * t, np.abs(error), error ** 2])  # (8, N, R)


def metrics_from_sums(sums):
    """Metrics from summed regression_moments: (..., 8, R) -> dict of name -> (..., R) float64.

    n = 0: all NaN; n < 2 or constant target: r and R2 NaN; constant prediction: r = 0. R2 = 1 - SSE / SST about the
    mean of these same rows.
    """
    n, p, t, pp, tt, pt, absolute, squared = np.moveaxis(np.asarray(sums, np.float64), -2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_p, spread_t, joint = pp - p * p / n, tt - t * t / n, pt - p * t / n
        # 1e-12 of the raw sum is the rounding that a subtraction of equal sums leaves behind
        defined = (n >= 2) & (spread_t > 1e-12 * tt)
        correlation = np.where(spread_p <= 1e-12 * pp, 0.0, joint / np.sqrt(spread_p * spread_t))
        r2, mae, mse = 1.0 - squared / spread_t, absolute / n, squared / n
    return {"pearson_r": np.where(defined, np.clip(correlation, -1.0, 1.0), np.nan),
            "r2": np.where(defined, r2, np.nan), "mae": mae, "mse": mse, "rmse": np.sqrt(mse)}


def regression_metrics(predicted, target):
    """Per-target metrics: (N, R), (N, R) with NaN = missing -> dict of n, pearson_r, r2, mae, mse, rmse, each (R,)."""
    sums = regression_moments(predicted, target).sum(1)
    return {"n": sums[0].astype(np.int64), **metrics_from_sums(sums)}


def mean_metrics(per_target):
    """Means over targets, undefined ones left out: dict of (R,) -> dict of numbers, n_targets = those with an R2."""
    counts = {"n_labels": int(per_target["n"].sum()), "n_targets": int(np.isfinite(per_target["r2"]).sum())}
    return {**counts, **{name: float(_nanmean(per_target[name])) for name in REGRESSION_METRICS}}


def _nanmean(values, axis=-1):
    """Mean over one axis without NaN; NaN where nothing is left (np.nanmean warns there)."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


CLASSIFICATION_METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "mcc", "ece", "ece_adaptive",
                          "brier")
CLASS_METRICS = ("precision", "recall", "f1", "average_precision", "roc_auc")  # under the keys CLASS_METRIC
ECE_BINS = 15


def classification_metrics(probability, label, threshold=None, positive=None, names=None):
    """Metrics of a whole split: (N, C) probabilities, (N,) class indices (below 0 = missing) -> dict of floats.

    loss (mean NLL), accuracy, balanced_accuracy, macro_f1, roc_auc, mcc, ece and ece_adaptive (15 bins of equal width,
    of equal mass), brier; tail_recall and so on for each class of `names` (None: "0", "1", ...) and of CLASS_METRICS;
    confusion (C, C) int64, rows = true; n. With a threshold, rows whose probability of `positive` (None: class 1)
    reaches it get that class, the others the most probable of the rest. roc_auc: of the positive class, for three
    classes or more the mean one-vs-rest. NaN: recall, f1, average precision and AUC of a class without rows, precision
    of one never predicted; means leave them out. mcc of a constant prediction is 0, of constant labels NaN. The Brier
    score is the sum over classes, halved for two (0 to 1). Not a finite number in any probability: all NaN.
    """
    statistic = _class_statistic(probability, label, threshold, positive, names)
    values = statistic(np.ones((1, int((np.asarray(label) >= 0).sum()))))
    confusion = np.rint(values.pop("confusion")[0]).astype(np.int64)
    return {"n": int(confusion.sum()), **{key: float(value[0]) for key, value in values.items()},
            "confusion": confusion}


def classification_names(names):
    """Names of --select and --criteria -> keys of classification_metrics, for the C class names.

    Beside the keys themselves: auc and nll, and f1_tail or ap_tail for tail_f1 and tail_average_precision.
    """
    keys, short = {}, {**{metric: metric for metric in CLASS_METRICS}, "ap": "average_precision", "auc": "roc_auc"}
    for (alias, metric), name in itertools.product(short.items(), names):
        keys |= {f"{name}_{alias}": f"{name}_{metric}", f"{alias}_{name}": f"{name}_{metric}"}
    return keys | {name: name for name in CLASSIFICATION_METRICS} | {"auc": "roc_auc", "nll": "loss"}


def predicted_class(probability, threshold=None, positive=None):
    """(N, C) -> (N,) class indices: the most probable class, or as classification_metrics says with a threshold."""
    probability = np.asarray(probability, np.float64)
    if threshold is None:
        return probability.argmax(1)
    positive, rest = 1 if positive is None else positive, probability.copy()
    rest[:, positive] = -np.inf
    return np.where(probability[:, positive] >= threshold, positive, rest.argmax(1))


def ranking_metrics(score, is_positive, weights=None):
    """ROC AUC and average precision of (N,) scores under (D, N) row weights (None: ones) -> two (D,), NaN = undefined.

    Equal scores count half in the AUC (Mann-Whitney) and are one step of the precision-recall curve, which is summed
    without interpolation.
    """
    score, is_positive = np.asarray(score, np.float64), np.asarray(is_positive, bool)
    weights = np.ones((1, len(score))) if weights is None else weights
    if not len(score):
        return np.full((2, len(weights)), np.nan)
    order, first = _tied_runs(score)
    drawn = weights[:, order]
    hits = drawn * is_positive[order]
    if len(first) < len(order):
        drawn, hits = (np.add.reduceat(part, first, axis=1) for part in (drawn, hits))
    misses = drawn - hits  # (D, distinct scores), highest score first
    found, false = hits.cumsum(1), misses.cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = 1.0 - (hits * (false - misses / 2)).sum(1) / (found[:, -1] * false[:, -1])
        precision = np.where(found > 0, found / (found + false), 0.0)
        return auc, (hits * precision).sum(1) / found[:, -1]


def _tied_runs(score):
    """(order of falling scores, first place of each run of equal ones) of (N >= 1,) scores."""
    order = np.argsort(-score, kind="stable")
    return order, np.flatnonzero(np.append(True, np.diff(score[order]) != 0))


def _class_statistic(probability, label, threshold, positive, names):
    """classification_metrics as a function of row weights: (D, N) -> dict of name -> (D,), and confusion (D, C, C).

    N counts the labelled rows. Every metric of a resample follows from how often each row was drawn.
    """
    probability, label = np.asarray(probability, np.float64), np.asarray(label, np.int64)
    if probability.ndim != 2 or label.shape != probability.shape[:1] or label.max(initial=0) >= probability.shape[1]:
        raise ValueError(f"expected (N, C) probabilities and (N,) labels below C, got shapes {probability.shape} and "
                         f"{label.shape} with labels up to {label.max(initial=0)}")
    probability, label = probability[label >= 0], label[label >= 0]
    count, names = probability.shape[1], [str(c) for c in range(probability.shape[1])] if names is None else list(names)
    cell = label * count + predicted_class(probability, threshold, positive)
    row_terms = _row_terms(probability, label)  # (2, N)
    confidence = probability.max(1)
    gap = confidence - (probability.argmax(1) == label)
    bins = [_confidence_bins(confidence, ECE_BINS, adaptive) for adaptive in (False, True)]
    finite = np.isfinite(probability).all()

    def statistic(weights):
        with np.errstate(divide="ignore", invalid="ignore"):
            total = weights.sum(1)
            confusion = _sums_by(cell, count ** 2, weights).reshape(-1, count, count)
            ranks = [ranking_metrics(probability[:, c], label == c, weights) for c in range(count)]
            loss, brier = (weights @ row_terms.T / total[:, None]).T
            ece, adaptive = (np.abs(_sums_by(b, ECE_BINS, weights * gap)).sum(1) / total for b in bins)
        values = {"loss": loss, "ece": ece, "ece_adaptive": adaptive, "brier": brier}
        values |= _confusion_metrics(confusion, names) | _rank_values(np.array(ranks), names, positive)
        ordered = [*CLASSIFICATION_METRICS, *(f"{name}_{metric}" for name in names for metric in CLASS_METRICS)]
        return {key: values[key] if finite else values[key] * np.nan for key in ordered} | {"confusion": confusion}
    return statistic


def _row_terms(probability, label):
    """(2, N): each row's negative log-likelihood, clipped at the float64 epsilon, and its Brier term."""
    is_label = label[:, None] == np.arange(probability.shape[1])  # (N, C)
    likelihood = np.where(is_label, probability, 0.0).sum(1)
    squared = ((probability - is_label) ** 2).sum(1) / (2 if probability.shape[1] == 2 else 1)
    return np.stack([-np.log(np.maximum(likelihood, np.finfo(np.float64).eps)), squared])


def _confidence_bins(confidence, n_bins, adaptive):
    """(N,) bin of each confidence: n_bins of equal width over 0 to 1, or between its quantiles; ties share a bin."""
    inner = np.linspace(0.0, 1.0, n_bins + 1)[1:-1]
    return np.searchsorted(np.quantile(confidence, inner) if adaptive and len(confidence) else inner, confidence)


def _sums_by(code, size, weights):
    """Sum (D, N) weights over rows of the same code: (N,) codes below size -> (D, size)."""
    place = code + size * np.arange(len(weights))[:, None]
    return np.bincount(place.ravel(), weights.ravel(), len(weights) * size).reshape(len(weights), size)


def _confusion_metrics(confusion, names):
    """(D, C, C) -> accuracy, balanced_accuracy, macro_f1, mcc (Gorodkin 2004) and those of each class, (D,) each."""
    right, true, given = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)  # (D, C) each
    with np.errstate(divide="ignore", invalid="ignore"):
        total, hit = true.sum(1), right.sum(1)
        precision, recall, f1 = right / given, right / true, 2 * right / (true + given)
        spread_true, spread_given = (total ** 2 - (part ** 2).sum(1) for part in (true, given))
        joint = (hit * total - (true * given).sum(1)) / np.sqrt(spread_true * spread_given)
        mcc = np.where(spread_true > 0, np.where(spread_given > 0, joint, 0.0), np.nan)
        values = {"accuracy": hit / total, "balanced_accuracy": _nanmean(recall), "macro_f1": _nanmean(f1), "mcc": mcc}
    per_class = {"precision": precision, "recall": recall, "f1": f1}
    return {f"{name}_{metric}": array[:, c] for metric, array in per_class.items()
            for c, name in enumerate(names)} | values


def _rank_values(ranks, names, positive):
    """(C, 2, D) AUC and average precision of each class -> roc_auc and those of each class, (D,) each."""
    auc, precision = ranks[:, 0], ranks[:, 1]
    chosen = auc[1 if positive is None else positive] if len(names) == 2 else _nanmean(auc, axis=0)
    values = {f"{name}_{metric}": array[c] for metric, array in (("average_precision", precision), ("roc_auc", auc))
              for c, name in enumerate(names)}
    return {**values, "roc_auc": chosen}


def expected_ece(confidence, n_bins=ECE_BINS, draws=1000, seed=0, adaptive=False, level=None):
    """ECE that a perfectly calibrated model of these (N,) confidences shows at this N, by simulation -> float.

    Its mean over `draws` sets of answers that are right with the stated probability; with a level that quantile.
    """
    confidence = np.asarray(confidence, np.float64)
    bins = _confidence_bins(confidence, n_bins, adaptive)
    correct = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    ece = np.abs(_sums_by(bins, n_bins, confidence - correct)).sum(1) / max(len(confidence), 1)  # (draws,)
    return float(ece.mean() if level is None else np.quantile(ece, level))


def risk_coverage(confidence, correct):
    """Error rate among the most confident rows: (N,), (N,) bool -> (coverage, risk), one entry a distinct confidence.

    Coverage rises to 1; rows of equal confidence enter together, so the order of the rows does not matter.
    """
    order, first = _tied_runs(np.asarray(confidence, np.float64)) if len(confidence) else (np.zeros(0, int),) * 2
    last = np.append(first[1:], len(order))[:len(first)]
    wrong = np.cumsum(~np.asarray(correct, bool)[order])
    return last / max(len(order), 1), wrong[last - 1] / last


# ---------------------------------------------------------------------------
# Intervals and baselines
# ---------------------------------------------------------------------------
# Rows of one subject are not independent, so whole subjects are resampled, and baselines over the same resamples.

FEWEST_FOR_INTERVAL, FEWEST_FOR_BOOTSTRAP, MOST_FOR_SIGN_FLIP = 5, 20, 16
RIDGE_LAMBDAS = tuple(10.0 ** (k / 2) for k in range(-2, 13))
LOGISTIC_LAMBDAS = tuple(10.0 ** (k / 2) for k in range(-2, 11))
# where a jackknife estimate is nearer to a normal distribution: (to that scale, and back)
NORMAL_SCALES = {"pearson_r": (np.arctanh, np.tanh), "r2": (lambda r2: np.log1p(-r2), lambda s: -np.expm1(s)),
                 "mse": (np.log, np.exp), "rmse": (np.log, np.exp), "loss": (np.log, np.exp), "brier": (np.log, np.exp)}
SHARES = ("accuracy", "macro_f1", "precision", "recall", "f1", "roc_auc")  # ends of the names of what lies in 0 to 1
INFLATED_BY_RESAMPLING = ("ece", "ece_adaptive", "average_precision")  # ends of names; rows drawn twice flatter them


def subject_sums(moments, subjects):
    """Sum the rows of each subject: (M, N, R) and (N,) names -> (S, M, R), subjects in sorted order."""
    order = np.argsort(subjects, kind="stable")
    first = np.unique(np.asarray(subjects)[order], return_index=True)[1]
    return np.add.reduceat(moments[:, order], first, axis=1).swapaxes(0, 1)


def t_quantile(level, df):
    """Two-sided Student t quantile: t with P(|T| < t) = level for df >= 1 degrees of freedom."""
    angle = np.linspace(0.0, math.pi / 2, 20001)  # with t = sqrt(df) tan(a) the density is cos(a)^(df - 1)
    density = np.cos(angle) ** (df - 1)
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return float(math.sqrt(df) * math.tan(np.interp(level, mass / mass[-1], angle)))


def sign_flip_p(differences):
    """Exact two-sided sign-flip p of the mean of (S,) differences, one a subject, NaN left out; None unless 5 to 16."""
    differences = np.array([value for value in differences if not math.isnan(value)], np.float64)
    if not FEWEST_FOR_INTERVAL <= len(differences) <= MOST_FOR_SIGN_FLIP:
        return None
    bits = (np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))) & 1
    flipped = np.abs((1 - 2 * bits) @ differences)  # (2^S,)
    return float(np.mean(flipped >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()))


def cluster_intervals(statistic, sums, draws=2000, seed=0, level=0.95, unit="subjects"):
    """Intervals over subjects for any statistic of summed rows.

    statistic: (D, ...) sums of D resamples -> dict of name -> (D,) or (D, R); sums: (S, ...), one row per subject, or
    the number S, for a statistic of how often each subject was drawn, (D, S).
    Returns (dict of name -> (2,) or (R, 2), or None; the method in words). From 20 subjects: percentile bootstrap, its
    levels widened to the t distribution (Hesterberg 2015, expanded percentile); 5 to 19: t-interval on jackknife
    pseudo-values, for a mean over equal clusters the subjects' own means; under 5: None.
    """
    count = sums if isinstance(sums, int) else len(sums)
    if count < FEWEST_FOR_INTERVAL:
        return None, f"no interval: only {count} {unit}"
    if count < FEWEST_FOR_BOOTSTRAP:
        sums = np.eye(count) if isinstance(sums, int) else sums
        return _jackknife_intervals(statistic, sums, level), f"{level:.0%} t-interval over {count} {unit}"
    tail = 0.5 * math.erfc(t_quantile(level, count - 1) * math.sqrt(count / (count - 1) / 2))
    drawn = _recentred(_bootstrap_draws(statistic, sums, draws, seed), statistic, sums).items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a target that is undefined in every draw
        ends = {name: np.nanquantile(values, (tail, 1 - tail), axis=0).T for name, values in drawn}
    return ends, f"{level:.0%} bootstrap interval over {count} {unit}"


def _bootstrap_draws(statistic, sums, draws, seed):
    """The statistic of `draws` resamples of subjects, in blocks that bound the memory: dict of name -> (D, ...)."""
    generator, count = np.random.default_rng(seed), sums if isinstance(sums, int) else len(sums)
    blocks, block = [], max(1, 2_000_000 // count)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = generator.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times_drawn = np.bincount(picks.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        by_sums = None if isinstance(sums, int) else times_drawn @ sums.reshape(count, -1)
        blocks.append(statistic(times_drawn if by_sums is None else by_sums.reshape(size, *sums.shape[1:])))
    return {name: np.concatenate([part[name] for part in blocks]) for name in blocks[0]}


def _recentred(drawn, statistic, sums):
    """The draws; those of INFLATED_BY_RESAMPLING moved so that their mean is the value of the whole sample."""
    moved = [name for name in drawn if name.endswith(INFLATED_BY_RESAMPLING)]
    whole = statistic(np.ones((1, sums)) if isinstance(sums, int) else sums.sum(0)[None]) if moved else {}
    for name in moved:
        drawn[name] = drawn[name] + whole[name] - _nanmean(drawn[name], axis=0)
        drawn[name] = drawn[name] if name.startswith("difference_") else np.clip(drawn[name], 0.0, 1.0)
    return drawn


def _jackknife_intervals(statistic, sums, level):
    """dict of name -> (..., 2): value -+ t x jackknife standard error, r and R2 and squared errors on NORMAL_SCALES."""
    reach, intervals = t_quantile(level, len(sums) - 1) * math.sqrt(len(sums) - 1), {}
    whole, left_out = statistic(sums.sum(0)[None]), statistic(sums.sum(0) - sums)
    for name, value in whole.items():
        metric = name.removeprefix("baseline_").removeprefix("mean_")
        is_share = metric.endswith(SHARES) and not metric.startswith("difference_")
        forward, backward = (_logit, _share) if is_share else NORMAL_SCALES.get(metric, (np.asarray, np.asarray))
        with np.errstate(divide="ignore", invalid="ignore"):
            centre, parts = forward(value[0]), forward(left_out[name])
            half = reach * parts.std(0)
            intervals[name] = np.sort(np.stack([backward(centre - half), backward(centre + half)], -1), -1)
    return intervals


def _logit(share):
    """log(p / (1 - p)) of shares held to 0.0001 and 0.9999, so that all right is not infinitely sure."""
    share = np.clip(share, 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share))


def _share(logit):
    """The inverse of _logit."""
    return 1.0 / (1.0 + np.exp(-logit))


def _paired_statistic(sums):
    """(D, 8, R) model, or (D, 16, R) with baseline -> dict of `r2`, `mean_r2`, `baseline_r2`, `difference_r2`, ..."""
    model = metrics_from_sums(sums[:, :8])
    values = {**model, **{f"mean_{name}": _nanmean(value) for name, value in model.items()}}
    if sums.shape[1] == 8:
        return values
    baseline = _paired_statistic(sums[:, 8:])
    paired = {f"baseline_{name}": value for name, value in baseline.items()}
    return {**values, **paired, **{f"difference_{name}": values[name] - baseline[name] for name in values}}


def bootstrap_regression(predicted, target, subjects=None, baseline=None, draws=2000, seed=0):
    """Metrics of a whole split with intervals over subjects, and the paired comparison with a baseline.

    predicted, target, baseline: (N, R), NaN in target = missing; subjects: (N,) names, None = every row its own.
    Returns a dict: `value` and `interval` (None under 5 subjects) with the keys METRIC, mean_METRIC (over targets) and
    baseline_, difference_ (model - baseline, same resamples) before both; arrays (R,) and (R, 2), means () and (2,),
    NaN interval for a target labelled in under 5 subjects; `per_subject` the same keys with (S, R) and (S,), None from
    20 subjects; `sign_flip_p` {METRIC: p or None}; `subjects`, `rows`, `method`.
    """
    labelled = ~np.isnan(np.asarray(target, np.float64)).all(1)
    names = np.arange(len(labelled)) if subjects is None else np.asarray(subjects, str)
    models = [np.asarray(model)[labelled] for model in (predicted, baseline) if model is not None]
    moments = np.concatenate([regression_moments(model, np.asarray(target)[labelled]) for model in models])
    sums = subject_sums(moments, names[labelled])  # (S, 8 or 16, R)
    value = {name: array[0] for name, array in _paired_statistic(sums.sum(0)[None]).items()}
    unit = "rows" if subjects is None else "subjects"
    interval, method = cluster_intervals(_paired_statistic, sums, draws, seed, unit=unit)
    sparse = (sums[:, 0] > 0).sum(0) < FEWEST_FOR_INTERVAL  # (R,)
    for pair in (pair for pair in (interval or {}).values() if pair.ndim == 2):
        pair[sparse] = np.nan
    per_subject = _paired_statistic(sums) if len(sums) < FEWEST_FOR_BOOTSTRAP else {}
    flips = {name: sign_flip_p(per_subject.get(f"difference_mean_{name}", ())) for name in REGRESSION_METRICS}
    return {"value": value, "interval": interval, "per_subject": per_subject or None, "sign_flip_p": flips,
            "subjects": len(sums), "rows": int(labelled.sum()), "method": method}


def target_rows(result, names):
    """bootstrap_regression's result, with n (R,) -> one dict per target: metrics, their intervals, the baseline's."""
    rows = []
    for r, name in enumerate(names):
        row = {"target": name, "n": result["n"][r]}
        for metric in REGRESSION_METRICS:
            low, high = result["interval"][metric][r] if result["interval"] else (np.nan, np.nan)
            row |= {metric: result["value"][metric][r], f"{metric}_low": low, f"{metric}_high": high,
                    f"baseline_{metric}": result["value"][f"baseline_{metric}"][r]}
        rows.append(row)
    return rows


def score_regression(predicted, target, subjects, baselines):
    """bootstrap_regression of a model, paired with the best of its baselines by mean R2 -> (result with n, its name).

    predicted, target: (N, R), NaN in target = missing; baselines: {name: (N, R)}.
    """
    r2 = {kind: mean_metrics(regression_metrics(values, target))["r2"] for kind, values in baselines.items()}
    best = max(r2, key=lambda kind: np.nan_to_num(r2[kind], nan=-np.inf))
    result = bootstrap_regression(predicted, target, subjects, baselines[best])
    result["n"] = regression_metrics(predicted, target)["n"]
    return result, best


def wilson_interval(k, n, level=0.95):
    """Wilson score interval of a proportion k of n independent rows -> (low, high); NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max((centre - half) / (n + z * z), 0.0), min((centre + half) / (n + z * z), 1.0)


def bootstrap_classification(probability, label, groups=None, baseline=None, names=None, threshold=None, positive=None,
                             baseline_threshold=None, draws=2000, seed=0):
    """Metrics of a whole split with intervals over subjects, and the paired comparison with a baseline's probabilities.

    probability, baseline: (N, C); label: (N,), below 0 = missing; groups: (N,) names, None = every row its own; the
    rest as in classification_metrics. Returns a dict as bootstrap_regression does: `value` {key: float} with the keys
    of classification_metrics and baseline_, difference_ (model - baseline, same resamples) before them; `interval`
    {key: (2,)} or None under 5 subjects; `per_subject` {key: (S,)}, None from 20 subjects; `sign_flip_p` of METRIC
    among loss, brier, accuracy; `confusion` (C, C), `n` (C,) rows and `n_subjects` (C,) subjects of each class;
    `subjects`, `rows`, `method`. Intervals of a class seen in (or outside of) under 5 subjects are NaN. Exceptions, by
    Wilson: accuracy, recall and precision of ungrouped rows; and a value of 0 or 1 that no resample changes, over the
    subjects of the rarest class that it needs.
    """
    probability, label = np.asarray(probability, np.float64), np.asarray(label, np.int64)
    names = [str(c) for c in range(probability.shape[1])] if names is None else list(names)
    subjects = (np.arange(len(label)) if groups is None else np.asarray(groups, str))[label >= 0]
    index, count = _subject_index(subjects)
    scored = {"": (probability, threshold), "baseline_": (baseline, baseline_threshold)}
    scored = {prefix: pair for prefix, pair in scored.items() if pair[0] is not None}
    models = [_class_statistic(each, label, cut, positive, names) for each, cut in scored.values()]
    confusion = {prefix: classification_metrics(each, label, cut, positive, names)["confusion"]
                 for prefix, (each, cut) in scored.items()}
    statistic = _paired_weights(models, index)
    value = {key: float(array[0]) for key, array in statistic(np.ones((1, count))).items()}
    interval, method = cluster_intervals(statistic, count, draws, seed, unit="rows" if groups is None else "subjects")
    seen, other = (np.array([len(np.unique(index[(label[label >= 0] == c) == is_in])) for c in range(len(names))])
                   for is_in in (True, False))  # (C,) subjects with rows of the class, and with rows of another
    if interval:
        _mend_intervals(value, interval, count, seen, np.minimum(seen, other), names)
        if groups is None:
            interval |= _wilson_intervals(confusion, names)
    per_subject = statistic(np.eye(count)) if 0 < count < FEWEST_FOR_BOOTSTRAP else {}
    flips = {name: sign_flip_p(per_subject.get(f"difference_{name}", ())) for name in ("loss", "brier", "accuracy")}
    return {"value": value, "interval": interval, "per_subject": per_subject or None, "sign_flip_p": flips,
            "confusion": confusion[""], "n": confusion[""].sum(1), "n_subjects": seen, "subjects": count,
            "rows": len(index), "method": method}


def _mend_intervals(value, interval, count, seen, both, names):
    """NaN for classes seen in, or outside of, too few subjects; Wilson for a share of 0 or 1 that no resample changes.

    seen, both (C,): subjects with rows of the class; the smaller of that and of those with rows of another class.
    """
    needed = {f"{name}_{metric}": (seen if metric in ("recall", "precision", "f1") else both)[c]
              for c, name in enumerate(names) for metric in CLASS_METRICS}
    rarest = min(both) if len(names) == 2 else min(seen[seen > 0], default=0)
    needed |= {"roc_auc": rarest, "macro_f1": rarest, "balanced_accuracy": rarest}
    for key, pair in interval.items():
        base, is_share = key.removeprefix("baseline_").removeprefix("difference_"), key.endswith(SHARES)
        units = needed.get(base, count)
        if units < FEWEST_FOR_INTERVAL and (len(names) == 2 or base not in CLASSIFICATION_METRICS):
            interval[key] = np.full(2, np.nan)
        elif is_share and not key.startswith("difference_") and value[key] in (0.0, 1.0) and np.ptp(pair) < 1e-9:
            interval[key] = np.array(wilson_interval(value[key] * units, units))


def _wilson_intervals(confusion, names):
    """{key: (2,)} of accuracy, recall and precision of independent rows, for each prefix -> (C, C) of confusion."""
    found = {}
    for prefix, table in confusion.items():
        counts = {"accuracy": (np.trace(table), table.sum())}
        counts |= {f"{name}_recall": (table[c, c], table[c].sum()) for c, name in enumerate(names)}
        counts |= {f"{name}_precision": (table[c, c], table[:, c].sum()) for c, name in enumerate(names)}
        found |= {prefix + key: np.array(wilson_interval(int(k), int(n))) for key, (k, n) in counts.items()}
    return found


def _subject_index(subjects):
    """((N,) number of each row's subject, how many there are), subjects in sorted order."""
    found, index = np.unique(subjects, return_inverse=True)
    return index, len(found)


def _paired_weights(models, index):
    """The metrics of one or two _class_statistic as a function of (D, S) times that each subject was drawn.

    dict of name -> (D,), with baseline_ and difference_ for the second; in blocks that bound the memory.
    """
    def paired(weights):
        model, *baselines = ({k: v for k, v in each(weights).items() if k != "confusion"} for each in models)
        for other in baselines:
            return {**model, **{f"baseline_{key}": array for key, array in other.items()},
                    **{f"difference_{key}": model[key] - array for key, array in other.items()}}
        return model

    def statistic(drawn):
        block = max(1, 1_000_000 // max(1, len(index)))
        parts = [paired(drawn[start:start + block][:, index]) for start in range(0, len(drawn), block)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return statistic


def train_mean_baseline(train_target, n_rows):
    """Each target's mean over the train rows as the prediction: (N, R) with NaN = missing -> (n_rows, R)."""
    return np.tile(_nanmean(np.asarray(train_target, np.float64), axis=0), (n_rows, 1))


@dataclasses.dataclass
class Ridge:
    """A linear model on standardised features, made by fit_ridge; penalty (R,) is the chosen lambda of each target."""
    feature_mean: np.ndarray  # (F,)
    feature_sd: np.ndarray  # (F,)
    weights: np.ndarray  # (F, R)
    intercept: np.ndarray  # (R,)
    penalty: np.ndarray  # (R,)

    def predict(self, features):
        """(N, F) features -> (N, R) float64 in the unit of the labels."""
        return (np.asarray(features, np.float64) - self.feature_mean) / self.feature_sd @ self.weights + self.intercept


def standardisation(features, sd_floor=0.0):
    """(mean, sd), both (F,), of (N, F) features; 1 for the sd of a constant one; sd_floor as fit_ridge explains."""
    mean, sd = features.mean(0), features.std(0)
    sd = np.where(sd > 1e-10 * (np.abs(mean) + 1e-300), sd, 1.0)
    return mean, np.hypot(sd, sd_floor * math.sqrt(np.mean(sd ** 2)))


def fit_ridge(features, target, lambdas=RIDGE_LAMBDAS, groups=None, folds=5, seed=0, sd_floor=0.0):
    """Ridge regression in closed form, lambda > 0 per target by inner cross-validation -> Ridge.

    features: (N, F), standardised here (a constant one becomes 0); target: (N, R), NaN = missing; groups: (N,) names,
    never cut by an inner fold. Minimises |y - Xw - b|^2 + lambda |w|^2. Targets labelled on the same rows share one
    eigendecomposition; under 3 labelled rows the prediction is their mean. sd_floor: features of one network share a
    unit, so one that hardly varied here must not count as many sds when it does later; a share of the RMS sd is added.
    """
    features, target = np.asarray(features, np.float64), np.asarray(target, np.float64)
    mean, sd = standardisation(features, sd_floor)
    x, groups = (features - mean) / sd, np.arange(len(features)) if groups is None else np.asarray(groups, str)
    model = Ridge(mean, sd, np.zeros((x.shape[1], target.shape[1])), _nanmean(target, axis=0),
                  np.full(target.shape[1], np.nan))
    labelled = ~np.isnan(target)
    for rows in (rows for rows in np.unique(labelled, axis=1).T if rows.sum() >= 3):
        columns = np.flatnonzero((labelled == rows[:, None]).all(0))
        weights, penalty = _ridge_solve(x[rows], target[np.ix_(rows, columns)], np.asarray(lambdas, np.float64),
                                        _inner_folds(groups[rows], folds, seed))
        model.weights[:, columns], model.penalty[columns] = weights, penalty
        model.intercept[columns] -= x[rows].mean(0) @ weights
    return model


def _ridge_solve(x, y, lambdas, folds):
    """Weights (F, R) and the lambda (R,) with the smallest held-out squared error for x (N, F), y (N, R)."""
    x, y = x - x.mean(0), y - y.mean(0)
    primal = x.shape[1] <= len(x)
    power, basis = np.linalg.eigh(x.T @ x if primal else x @ x.T)
    power = np.maximum(power, 0.0)  # (K,), the smaller of N and F
    scores = x @ basis if primal else basis * np.sqrt(power)  # (N, K): orthogonal columns of squared length `power`
    projected = scores.T @ y  # (K, R)
    error = np.stack([_held_out_error(scores, y, projected, power + penalty, folds) for penalty in lambdas])  # (L, R)
    penalty = lambdas[error.argmin(0)]
    coefficients = projected / (power[:, None] + penalty)  # (K, R)
    dual = coefficients / np.sqrt(np.maximum(power, 1e-300))[:, None]
    return basis @ coefficients if primal else x.T @ (basis @ dual), penalty


def _held_out_error(scores, y, projected, damped, folds):
    """(R,) squared errors of the left-out folds without refitting: residual_g = (I - H_gg)^-1 (y - H y)_g, exact for
    H = 11'/N + Z (Z'Z + lambda)^-1 Z' (PRESS, Allen 1974, for blocks of rows)."""
    residual, total = y - scores @ (projected / damped[:, None]), np.zeros(y.shape[1])
    for rows in folds:
        hat = scores[rows] / damped @ scores[rows].T + 1.0 / len(y)
        total += (np.linalg.solve(np.eye(len(rows)) - hat, residual[rows]) ** 2).sum(0)
    return total


def _inner_folds(groups, folds, seed):
    """Row indices of each fold: groups in random order, each into the smallest fold; one group alone: cut by rows."""
    if len(np.unique(groups)) == 1:
        groups = np.arange(len(groups))
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    fold_of, filled = np.zeros(len(names), np.int64), np.zeros(min(folds, len(names)))
    for group in np.random.default_rng(seed).permutation(len(names)):
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return [np.flatnonzero(fold_of[index] == fold) for fold in range(len(filled))]


def prior_baseline(train_label, n_rows, n_classes):
    """Share of each class among the train labels (below 0 = missing) as everybody's prediction -> (n_rows, C)."""
    train_label = np.asarray(train_label, np.int64)
    counts = np.bincount(train_label[train_label >= 0], minlength=n_classes).astype(np.float64)
    return np.tile(counts / max(counts.sum(), 1.0), (n_rows, 1))


@dataclasses.dataclass
class Logistic:
    """A multinomial logistic model on standardised features, made by fit_logistic; penalty is the chosen lambda."""
    feature_mean: np.ndarray  # (F,)
    feature_sd: np.ndarray  # (F,)
    weights: np.ndarray  # (F, C)
    intercept: np.ndarray  # (C,), -inf for a class without a train row
    penalty: float

    def predict(self, features):
        """(M, F) features -> (M, C) probabilities."""
        features = (np.asarray(features, np.float64) - self.feature_mean) / self.feature_sd
        return softmax(features @ self.weights + self.intercept)


def softmax(logits):
    """(..., C) -> probabilities over the last axis; a logit of -inf gives 0."""
    grown = np.exp(logits - np.max(logits, -1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def fit_logistic(features, label, n_classes=None, lambdas=LOGISTIC_LAMBDAS, groups=None, folds=5, seed=0, sd_floor=0.0):
    """Multinomial logistic regression with a ridge penalty, lambda > 0 by inner cross-validation -> Logistic.

    features (N, F), groups, folds and sd_floor as in fit_ridge; label: (N,) class indices, below 0 = missing (row left
    out). Minimises the summed NLL + lambda / 2 |W|^2, with two classes + lambda |W|^2, so that lambda = 1 / C of
    scikit-learn. The inner folds judge by the NLL, from large lambdas down until three bring no gain; a held-out row
    of a class that the other folds lack does not count.
    """
    label = np.asarray(label, np.int64)
    kept = label >= 0
    if not kept.any():
        raise UserError(f"a logistic baseline needs labelled rows, found none among {len(label)}")
    features, names = np.asarray(features, np.float64)[kept], np.arange(len(label)) if groups is None else groups
    n_classes, label = n_classes or int(label.max()) + 1, label[kept]
    mean, sd = standardisation(features, sd_floor)
    left, power, basis = np.linalg.svd((features - mean) / sd, full_matrices=False)
    scores = left * power  # (N, K), K the smaller of N and F: the penalty does not change under rotation
    parts = _inner_folds(np.asarray(names, str)[kept], folds, seed) if len(lambdas) > 1 else []
    trained_on = np.ones((len(parts), len(label)), bool)
    for number, rows in enumerate(parts):
        trained_on[number, rows] = False
    chosen = len(parts) > 1 and _choose_penalty(scores, power, label, n_classes, trained_on, lambdas)
    penalty = chosen or max(lambdas)
    weights, intercept = _logistic_solve(scores, power, label, n_classes, np.ones((1, len(label)), bool), penalty)
    return Logistic(mean, sd, basis.T @ weights[0], intercept[0, 0], float(penalty))


def _choose_penalty(scores, power, label, n_classes, trained_on, lambdas):
    """The lambda with the smallest held-out NLL; trained_on: (folds, N)."""
    errors = {}
    for penalty in sorted(lambdas, reverse=True):
        weights, intercept = _logistic_solve(scores, power, label, n_classes, trained_on, penalty, tolerance=1e-3)
        errors[penalty] = _held_out_nll(scores @ weights + intercept, label, trained_on)
        if len(errors) > 3 and min(errors, key=errors.get) not in list(errors)[-3:]:
            break
    return min(errors, key=errors.get)


def _held_out_nll(logits, label, trained_on):
    """Summed NLL of the rows left out of each fit: (folds, N, C) logits, (folds, N) True = trained on -> float."""
    known = np.isfinite(np.take_along_axis(logits, label[None, :, None], 2)[..., 0])
    likelihood = np.take_along_axis(softmax(logits), label[None, :, None], 2)[..., 0]  # (folds, N)
    return float(-np.log(np.maximum(likelihood[known & ~trained_on], 1e-300)).sum())


def _logistic_solve(scores, power, label, n_classes, trained_on, penalty, tolerance=1e-7):
    """Weights (J, K, C) and intercepts (J, 1, C) of J fits on the rows (J, N) True, all in one L-BFGS.

    scores: (N, K) with orthogonal columns of length `power`: dividing each by the root of the curvature that it can
    have at most (Boehning 1992: a half, and the penalty) makes the problem round, whatever the features.
    """
    scale = torch.from_numpy(1.0 / np.sqrt(power ** 2 / 2 + penalty))[:, None]  # (K, 1)
    x, y, rows = torch.from_numpy(scores) * scale.T, torch.from_numpy(label), torch.from_numpy(trained_on).double()
    present = torch.stack([(rows * (y == c)).sum(1) > 0 for c in range(n_classes)], 1)[:, None]  # (J, 1, C)
    weights = torch.zeros(len(rows), x.shape[1], n_classes, dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(len(rows), 1, n_classes, dtype=torch.float64, requires_grad=True)
    width, strength = math.sqrt(2.0 / len(label)), penalty * (1 if n_classes == 2 else 0.5)
    optimizer = torch.optim.LBFGS([weights, intercept], max_iter=500, history_size=20, tolerance_grad=tolerance,
                                  tolerance_change=1e-5 * tolerance, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = torch.where(present, x @ weights + intercept * width, -math.inf)  # (J, N, C)
        likelihood = torch.log_softmax(logits, 2).gather(2, y[None, :, None].expand(len(rows), -1, 1))[..., 0]
        loss = strength * ((weights * scale) ** 2).sum() - torch.where(rows > 0, likelihood, 0.0).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    found = torch.where(present, intercept * width, -math.inf)
    return (weights * scale).detach().numpy(), found.detach().numpy()


# --- no-pixel confounds ---

def _level_rates(codes, target, train, test):
    """Train mean of the target in each test row's level: codes (N,), target (N, R), NaN = missing -> (m, R).

    One row at the overall train mean is added to each level (smoothing); a level without train rows has that mean.
    """
    labelled = ~np.isnan(target[train])
    overall, levels = _nanmean(target[train], axis=0), codes.max() + 1
    total, count = np.zeros((levels, target.shape[1])), np.zeros((levels, target.shape[1]))
    np.add.at(total, codes[train], np.where(labelled, target[train], 0.0))
    np.add.at(count, codes[train], labelled)
    return ((total + overall) / (count + 1))[codes[test]]


def _level_codes(levels, n_rows, train, position):
    """{name: (N,) codes} of the columns that can tell anything (2 levels or more, up to three for four train rows),
    and `row order`: up to 20 blocks of neighbouring rows, of 10 train rows or more."""
    codes = {name: np.unique(np.asarray(values, str), return_inverse=True)[1] for name, values in levels.items()}
    codes = {name: code for name, code in codes.items() if 2 <= code.max(initial=0) + 1 <= max(2, 0.75 * len(train))}
    blocks = min(20, max(2, len(train) // 10))
    position = np.arange(n_rows) if position is None else np.asarray(position, np.int64)
    return {**codes, "row order": position * blocks // (position.max(initial=0) + 1)}


def _by_fold(rows):
    """Row indices, or a list of them, -> list of (n,) int64."""
    several = isinstance(rows, list) and len(rows) > 0 and np.ndim(rows[0]) > 0
    return [np.asarray(each, np.int64) for each in (rows if several else [rows])]


def level_priors(levels, label, train, test, groups=None, positive=1, position=None, draws=2000, seed=0):
    """What metadata alone predict of a class, without a pixel: a list of dicts, highest AUC first.

    levels: dict of name -> (N,) values; label: (N,) class indices, below 0 = missing; train, test: row indices, or
    lists of them, one entry a fold, whose test rows are judged as one; groups: (N,) names for the interval. Each
    column's predictor is the smoothed train rate of the `positive` class in the row's level, the rate of all train rows
    for a new level; `row order` does the same with blocks of neighbouring rows (position: (N,) row number of each in
    its own file; None = its index). dict(name, n_levels, auc, low, high, red_flag False); low and high are NaN where
    there is no interval. Rates count from their fold's overall rate: it is high where the held-out rows are negative.
    """
    label, train, test = np.asarray(label), _by_fold(train), _by_fold(test)
    held_out = np.concatenate(test)
    target, rows = np.where(label < 0, np.nan, label == positive)[:, None].astype(np.float64), []
    is_positive = np.where(label[held_out] < 0, -1, label[held_out] == positive)
    subjects = None if groups is None else np.asarray(groups)[held_out]
    for name, codes in _level_codes(levels, len(label), train[0], position).items():
        rate = np.concatenate([_level_rates(codes, target, *fold)[:, 0] - _nanmean(target[fold[0], 0])
                               for fold in zip(train, test)])
        result = bootstrap_classification(np.stack([-rate, rate], 1), is_positive, subjects, draws=draws, seed=seed)
        low, high = result["interval"]["roc_auc"] if result["interval"] else (math.nan, math.nan)
        rows.append({"name": name, "n_levels": int(codes.max()) + 1, "auc": result["value"]["roc_auc"],
                     "low": float(low), "high": float(high), "red_flag": False})
    return sorted(rows, key=lambda row: -np.nan_to_num(row["auc"], nan=-1.0))


def level_means(levels, target, train, test, groups=None, position=None, draws=2000, seed=0):
    """What metadata alone predict of (N, R) scores, NaN = missing: a list of dicts, highest R2 first.

    As level_priors, with the smoothed train mean of the level: dict(name, n_levels, r2, low, high, mae, mae_low,
    mae_high, red_flag False), R2 and MAE as means over targets.
    """
    target, train, test = np.asarray(target, np.float64), _by_fold(train), _by_fold(test)
    held_out = np.concatenate(test)
    subjects, rows = None if groups is None else np.asarray(groups)[held_out], []
    for name, codes in _level_codes(levels, len(target), train[0], position).items():
        means = np.concatenate([_level_rates(codes, target, *fold) for fold in zip(train, test)])
        result = bootstrap_regression(means, target[held_out], subjects, None, draws, seed)
        value, interval = result["value"], result["interval"] or {}
        (low, high), mae = (interval.get(f"mean_{key}", (math.nan,) * 2) for key in ("r2", "mae"))
        rows.append({"name": name, "n_levels": int(codes.max()) + 1, "r2": float(value["mean_r2"]), "low": float(low),
                     "high": float(high), "mae": float(value["mean_mae"]), "mae_low": float(mae[0]),
                     "mae_high": float(mae[1]), "red_flag": False})
    return sorted(rows, key=lambda row: -np.nan_to_num(row["r2"], nan=-math.inf))


def flag_confounds(rows, model_low):
    """The rows of level_priors or level_means with red_flag set where the prior reaches the model's interval.

    model_low: the lower end of the interval of the model's AUC or R2 (its value where there is no interval); NaN flags
    nothing, and neither does a prior that knows nothing (AUC up to .5, R2 up to 0).
    """
    def reaches(row):
        value, chance = (row["auc"], 0.5) if "auc" in row else (row["r2"], 0.0)
        return bool(value > chance and value >= model_low)
    return [{**row, "red_flag": reaches(row)} for row in rows]


def within_level_auc(score, label, levels, positive=1):
    """AUC over the pairs of a positive and another row of the same level: (N,) scores, labels, levels -> float.

    What is left of an AUC once a level can no longer tell the class; NaN without such a pair.
    """
    score, is_positive = np.asarray(score, np.float64), np.asarray(label) == positive
    levels, labelled, won, pairs = np.asarray(levels, str), np.asarray(label) >= 0, 0.0, 0
    for level in np.unique(levels):
        here = labelled & (levels == level)
        count = int(is_positive[here].sum()) * int((~is_positive[here]).sum())
        won += count * ranking_metrics(score[here], is_positive[here])[0][0] if count else 0.0
        pairs += count
    return float(won / pairs) if pairs else math.nan


def within_level_metrics(predicted, target, levels):
    """regression_metrics of (N, R) predictions and targets after the mean of each level is taken from both."""
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    centred, levels = [np.where(np.isnan(target), np.nan, predicted), target.copy()], np.asarray(levels, str)
    for level, part in itertools.product(np.unique(levels), centred):
        part[levels == level] -= _nanmean(part[levels == level], axis=0)
    return regression_metrics(*centred)


# ---------------------------------------------------------------------------
# Noise ceiling
# ---------------------------------------------------------------------------
# What a perfect model could reach, given that the raters disagree; too much disagreement is "not measurable".

def noise_ceiling(mean, sd, n):
    """Ceiling from summary ratings: mean, sd (N, R), raters n (N, R) or a number -> dict of r2, r, rows (R,), note.

    R2 ceiling = 1 - mean(sd^2 / n) / var(mean), r ceiling its root (reliability of a mean in classical test theory).
    Rows with sd = 0 or anything missing do not count. A negative R2 ceiling is NaN with the note "not measurable".
    """
    mean, sd = np.asarray(mean, np.float64), np.asarray(sd, np.float64)
    n = np.broadcast_to(np.asarray(n, np.float64), mean.shape)
    valid = np.isfinite(mean) & (sd > 0) & (n > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = _nanmean(np.where(valid, sd ** 2 / n, np.nan), axis=0)
        centred = mean - _nanmean(np.where(valid, mean, np.nan), axis=0)
        signal_and_noise = np.where(valid, centred ** 2, 0.0).sum(0) / (valid.sum(0) - 1)
        r2 = np.where(valid.sum(0) >= 2, 1.0 - noise / signal_and_noise, np.nan)
    r2 = np.where(r2 >= 0, r2, np.nan)
    note = ["not measurable" if np.isnan(value) else "" for value in r2]
    return {"r2": r2, "r": np.sqrt(r2), "rows": valid.sum(0), "note": note}


def ceiling_table(mean, sd):
    """R2 ceilings for 2 to 30 raters, where their number is not known: (N, R), (N, R) -> dict of n -> (R,)."""
    return {n: noise_ceiling(mean, sd, n)["r2"] for n in range(2, 31)}


def _stack_ratings(ratings, fewest):
    """N 1-D arrays -> (values (M,), image (M,) sorted indices, counts (N,)) of images with `fewest` ratings or more."""
    parts = [values[~np.isnan(values)] for values in (np.asarray(part, np.float64) for part in ratings)]
    counts = np.array([len(part) for part in parts if len(part) >= fewest], np.int64)
    values = np.concatenate([np.empty(0)] + [part for part in parts if len(part) >= fewest])
    return values, np.repeat(np.arange(len(counts)), counts), counts


def split_half(ratings, halves=100, seed=0):
    """Reliability of the mean rating (= its R2 ceiling) of one target, from single ratings: N 1-D arrays -> float.

    Each image's raters are cut in two at random, the halves' means correlated over images (those with 2 raters or
    more), stepped up by Spearman-Brown 2r / (1 + r) and averaged over `halves`. Not above 0: NaN, not measurable.
    """
    values, image, counts = _stack_ratings(ratings, 2)
    if len(counts) < 3:  # two images always correlate by 1 or -1
        return math.nan
    generator, reliability = np.random.default_rng(seed), []
    first = np.arange(len(values)) - (np.cumsum(counts) - counts)[image] < (counts // 2)[image]  # (M,) True = half one
    total = np.bincount(image, values)
    for _ in range(halves):
        order = np.argsort(image + generator.random(len(values)))
        half_one = np.bincount(image[first], values[order[first]])
        r = np.corrcoef(half_one / (counts // 2), (total - half_one) / (counts - counts // 2))[0, 1]
        reliability.append(2 * r / (1 + r))
    return float(np.mean(reliability)) if np.mean(reliability) > 0 else math.nan


def icc(ratings):
    """ICC(1,1) and ICC(1,k) of one target by one-way ANOVA: N 1-D arrays -> (single rating, mean rating) floats.

    Shrout & Fleiss 1979; unequal numbers of raters enter as n0 = (M - sum n^2 / M) / (N - 1). Negative: NaN.
    """
    values, image, counts = _stack_ratings(ratings, 1)
    images, total = len(counts), len(values)
    if images < 2 or total == images:
        return math.nan, math.nan
    means = np.bincount(image, values) / counts
    between = (counts * (means - values.mean()) ** 2).sum() / (images - 1)
    within = ((values - means[image]) ** 2).sum() / (total - images)
    n0, signal = (total - (counts ** 2).sum() / total) / (images - 1), between - within
    return (float(signal / (between + (n0 - 1) * within)), float(signal / between)) if signal > 0 else (math.nan,) * 2


# ---------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------
# How far a prediction may be off, from residuals on rows that the model was not trained on.

def conformal_quantile(abs_residuals, alpha, subjects=None, seed=0):
    """Half-width of a 1 - alpha prediction interval: the ceil((n + 1)(1 - alpha))-th smallest of (M,) |residuals|.

    NaN residuals are dropped; too few give inf (alpha .1 needs 9). With subjects (M,) n counts subjects, each giving
    one residual drawn at random: exchangeable with a row of a new subject (Dunn, Wasserman & Ramdas 2023).
    """
    kept = ~np.isnan(abs_residuals)
    values = np.asarray(abs_residuals, np.float64)[kept]
    if subjects is not None:
        order = np.random.default_rng(seed).permutation(len(values))
        values = values[order][np.unique(np.asarray(subjects, str)[kept][order], return_index=True)[1]]
    rank = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else math.inf


def fit_temperature(logits, label):
    """Temperature T in .05 to 20 with the smallest NLL of softmax(logits / T): (N, C), (N,) indices -> float.

    Dividing by T changes neither the most probable class nor a two-class AUC. 1.0 where every labelled row is right
    (the NLL would fall for ever, so nothing says how sure the model may be) and where no row is labelled.
    """
    label = np.asarray(label, np.int64)
    logits, label = np.asarray(logits, np.float64)[label >= 0], label[label >= 0]
    own = logits[np.arange(len(label)), label]
    if not len(label) or (own > np.where(np.arange(logits.shape[1]) == label[:, None], -np.inf, logits).max(1)).all():
        return 1.0
    low, high = math.log(1 / 20.0), math.log(1 / 0.05)  # of log(1 / T); the NLL is convex in 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((softmax(logits * math.exp(middle)) * logits).sum(1) - own).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def prior_correction(logits, train_prior, sampled_prior):
    """Logits (N, C) of a model that saw classes in shares sampled_prior, for shares train_prior, (C,) each.

    Adds log(train / sampled), to be done before the temperature (Saerens, Latinne & Decaestecker 2002); a class that
    either lacks is left as it is.
    """
    train_prior, sampled_prior = (np.asarray(prior, np.float64) for prior in (train_prior, sampled_prior))
    both = (train_prior > 0) & (sampled_prior > 0)
    return np.asarray(logits, np.float64) + np.log(np.where(both, train_prior, 1) / np.where(both, sampled_prior, 1))


def fit_threshold(probability, label, metric="f1", positive=1):
    """Threshold of the positive class with the best metric on these rows: (N, C), (N,) indices -> float in 0 to 1.

    metric: f1 of the positive class, balanced_accuracy, accuracy or mcc, positive against the rest. The threshold lies
    halfway between two scores; of equally good ones the nearest to .5. Without both classes .5.
    """
    label = np.asarray(label, np.int64)
    score, is_positive = np.asarray(probability, np.float64)[label >= 0, positive], label[label >= 0] == positive
    if is_positive.all() or not is_positive.any():
        return 0.5
    order, first = _tied_runs(score)
    ends = np.append(first, len(score))  # (G + 1,) how many rows get the class
    hits = np.append(0, np.cumsum(is_positive[order]))[ends]
    misses, missed = ends - hits, is_positive.sum() - hits
    confusion = np.stack([len(score) - ends - missed, misses, missed, hits], -1).reshape(-1, 2, 2)
    values = _confusion_metrics(confusion.astype(np.float64), ("rest", "positive"))
    key = "positive_f1" if metric == "f1" else metric
    if key not in values:
        raise ValueError(f"metric is {metric!r}, expected f1, balanced_accuracy, accuracy or mcc")
    edges = np.concatenate([[1.0], score[order][first], [0.0]])
    cuts = (edges[:-1] + edges[1:]) / 2
    best = np.flatnonzero(values[key] >= np.nanmax(values[key]) - 1e-12)
    return float(cuts[best[np.abs(cuts[best] - 0.5).argmin()]])


# ---------------------------------------------------------------------------
# Alarms and criteria
# ---------------------------------------------------------------------------
# What must be said before any number: signs of a broken model, bars set beforehand, and the one-sentence verdict.

def regression_alarms(predicted, target, names):
    """Sentences on signs of a broken model or of data that cannot judge it, for (N, R), (N, R) and R names; else []."""
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    seen = np.where(np.isnan(target) | ~np.isfinite(predicted), np.nan, predicted)
    spread_p, spread_t = np.sqrt([_nanmean((a - _nanmean(a, 0)) ** 2, 0) for a in (seen, target)])  # (R,), (R,)
    modal = [np.unique(c[~np.isnan(c)], return_counts=True)[1].max(initial=0) for c in target.T]
    faults = {"not a finite number in the predictions": ~np.isfinite(predicted).all(0),
              "constant output (sd under 5 % of the labels')": spread_p < 0.05 * spread_t,
              "constant prediction, so r has no value and counts as 0": spread_p <= 1e-9 * spread_t,
              "correlation undefined, the labels do not vary": ~(spread_t > 0),
              "labels almost all equal (95 % or more share one value)": modal >= 0.95 * (~np.isnan(target)).sum(0)}
    alarms = [f"{text}: {', '.join(itertools.compress(names, flags))}" for text, flags in faults.items() if flags.any()]
    repeats = np.unique(predicted, axis=0, return_counts=True)[1].max() if len(predicted) else 0
    if repeats >= 3:
        alarms.append(f"the same prediction for {repeats} of {len(predicted)} rows")
    return alarms


def split_gap_alarms(train_metrics, val_metrics, metric="pearson_r"):
    """Sentences where a train and a validation metric (dicts of floats, higher is better) lie far apart; else []."""
    train, val = train_metrics[metric], val_metrics[metric]
    numbers = f"({metric} {train:.3f} and {val:.3f})"
    below = [f"train far below validation {numbers}: a leak, or a fault in evaluation"] if train < val - 0.15 else []
    return below + ([f"train far above validation {numbers}: rows learnt by heart"] if train > val + 0.3 else [])


def identical_fold_alarms(fold_results):
    """Sentences on folds with the same numbers to the last digit; fold_results: one array of any shape per fold."""
    return [f"folds {a} and {b} have identical results: were they trained and judged on the same rows?"
            for a, b in itertools.combinations(range(len(fold_results)), 2)
            if np.array_equal(fold_results[a], fold_results[b])]


def classification_alarms(probability, label, names, threshold=None, positive=None):
    """Sentences on signs of a broken classifier or of labels that cannot judge it; else [].

    probability: (N, C); label: (N,) indices, below 0 = missing; names: C classes; the rest as classification_metrics.
    """
    probability, label = np.asarray(probability, np.float64), np.asarray(label, np.int64)
    if not len(probability):
        return ["no rows to judge"]
    finite, given = np.isfinite(probability).all(), np.unique(predicted_class(probability, threshold, positive))
    rows, labelled = len(probability), label[label >= 0]
    counts = np.bincount(labelled, minlength=len(names))
    spread, wanted = probability.std(0), (labelled[:, None] == np.arange(len(names))).std(0)  # (C,), (C,)
    values, repeats = np.unique(np.round(probability, 6), axis=0, return_counts=True)
    alarms = [] if finite else ["not a finite number in the probabilities"]
    if len(given) == 1 and finite:
        alarms.append(f"one class only: {names[given[0]]} is given to all {rows} rows")
    if len(labelled) and (spread < 0.05 * wanted).any():
        alarms.append("constant output (sd of the probability under 5 % of the labels'): "
                      + ", ".join(itertools.compress(names, spread < 0.05 * wanted)))
    if repeats.max() >= 3:
        last = min(1, len(names) - 1) if positive is None else positive
        alarms.append(f"the same probability 3 times or more: {repeats[repeats >= 3].sum()} of {rows} rows share "
                      f"{(repeats >= 3).sum()} values, {repeats.max()} of them {names[last]} "
                      f"{values[repeats.argmax(), last]:.6f}")
    if len(labelled) and counts.max() >= 0.95 * len(labelled):
        alarms.append(f"labels almost all equal: {names[counts.argmax()]} in {counts.max()} of {len(labelled)} rows")
    return alarms


def classification_values(result, names):
    """bootstrap_classification's result under all names of classification_names -> (values, intervals or None)."""
    keys = classification_names(names)
    return ({name: result["value"][key] for name, key in keys.items()},
            {name: result["interval"] and tuple(result["interval"][key].tolist()) for name, key in keys.items()})


def named_values(result, names):
    """bootstrap_regression's result under the names of --criteria: `r2` = mean over targets, `r2_Valence` one target.

    Returns (dict of name -> float, dict of name -> (low, high) or None).
    """
    places = {metric: (f"mean_{metric}", ...) for metric in REGRESSION_METRICS}
    places |= {f"{metric}_{name}": (metric, k) for metric in REGRESSION_METRICS for k, name in enumerate(names)}
    values = {name: float(result["value"][key][k]) for name, (key, k) in places.items()}
    return values, {name: result["interval"] and tuple(result["interval"][key][k].tolist())
                    for name, (key, k) in places.items()}


def parse_criteria(text, known):
    """`"r2>0.15,mae_M2<3.0"` -> list of dict(name, relation, bar); known: the metric names that exist.

    Raises UserError that lists every part that cannot be read, or every unknown name with the closest known one.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    matches = [re.fullmatch(r"([^<>=]+?)\s*([<>]=?)\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)", p) for p in parts]
    bad = [part for part, match in zip(parts, matches) if match is None]
    if bad:
        raise UserError(f"--criteria expects NAME>NUMBER or NAME<NUMBER separated by commas, found: {'; '.join(bad)}")
    unknown = [match[1] + closest(match[1], known) for match in matches if match[1] not in known]
    if unknown:
        raise UserError(f"--criteria names no metric of this run: {', '.join(unknown)}. Use METRIC or METRIC_TARGET.")
    return [{"name": match[1], "relation": match[2], "bar": float(match[3])} for match in matches]


def judge_criteria(criteria, values, intervals):
    """PASS where the whole interval clears the bar, FAIL where none of it does, else (or without one) NOT RESOLVABLE.

    criteria: from parse_criteria; values: dict of name -> float; intervals: dict of name -> (low, high) or None.
    Returns a list of dict(name, relation, bar, value, low, high, verdict).
    """
    compare, judged = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}, []
    for entry in criteria:
        low, high = intervals[entry["name"]] or (math.nan, math.nan)
        clears = {bool(compare[entry["relation"]](end, entry["bar"])) for end in (low, high)}
        verdict = "NOT RESOLVABLE"
        if len(clears) == 1 and not math.isnan(low + high):
            verdict = "PASS" if True in clears else "FAIL"
        judged.append({**entry, "value": values[entry["name"]], "low": low, "high": high, "verdict": verdict})
    return judged


def verdict_sentence(result, baseline_name, metric="r2", ceiling=None, held_out=True, lower_is_better=None, label=None):
    """One honest sentence: does the model beat its baseline, by how much, and what could be reached at best.

    result: dict of bootstrap_regression's or bootstrap_classification's shape: value and interval (or None) with the
    keys METRIC, baseline_METRIC and difference_METRIC or, over targets, the same with mean_METRIC; method; sign_flip_p
    and, where there is one, per_subject.
    ceiling: what `metric` could reach, or None. held_out False: the numbers are neither a test split's nor folds'.
    lower_is_better: None = as LOWER_IS_BETTER says; label: the metric's name in the sentence.
    """
    key = f"mean_{metric}" if f"mean_{metric}" in result["value"] else metric
    model, baseline, difference = (result["value"][part + key] for part in ("", "baseline_", "difference_"))
    low, high = (result["interval"] or {}).get(f"difference_{key}", (np.nan, np.nan))
    downwards = metric in LOWER_IS_BETTER if lower_is_better is None else lower_is_better
    gains = [-difference, -low, -high] if downwards else [difference, low, high]
    beaten = "The model beats" if min(gains) > 0 else "The model does not beat" if gains[0] <= 0 else None
    verdict = beaten if beaten and np.isfinite(gains).all() else "Not resolvable whether the model beats"
    text = f"{verdict} the {baseline_name} baseline: {label or key.replace('mean_', 'mean ', 1)} {model:.3f} against "
    text += f"{baseline:.3f}, "
    how = result["method"]
    if result["interval"]:
        known = np.isfinite([low, high]).all()
        how = f"{low:+.3f} to {high:+.3f}, {how}" if known else "no interval: too few to resolve it"
    text += f"difference {difference:+.3f} [{how}]"
    # R2 within a subject has no meaning, nor has a rank metric: their errors stand in
    flips, errors = result["sign_flip_p"], "mse" if metric == "r2" else metric
    errors = errors if errors in flips else "brier"
    if flips.get(errors) is not None:
        own = result["per_subject"][f"difference_{key.replace(metric, errors)}"]  # (S,)
        fewer = int(((own if errors in LOWER_IS_BETTER else -own) < 0).sum())
        text += f", exact sign-flip p {flips[errors]:.4f} on the subjects' errors, smaller than the baseline's in "
        text += f"{fewer} of {int(np.isfinite(own).sum())}"
    text += "" if ceiling is None or not np.isfinite(ceiling) else f"; the raters' agreement allows {ceiling:.3f}"
    return text + ("." if held_out else "; selected on validation, therefore optimistic.")


def verdict_level(gain, gain_low, alarms):
    """Level of a verdict: good only where the gain over the baseline is beyond its interval and no alarm is raised."""
    level = "good" if gain_low > 0 and not alarms else "caution"
    return level if gain > 0 else "poor"


def say_results(run, metrics):
    """The closing lines of a run: verdict, alarms, criteria, and the file to open next."""
    run.say(metrics["verdict"])
    for alarm in metrics["alarms"]:
        run.say(f"ALARM: {alarm}")
    for bar in metrics["criteria"]:
        run.say(f"{bar['verdict']}: {bar['name']} {bar['relation']} {bar['bar']:g}, found {bar['value']:.4g}")
    run.say(f"open next: {run.path('report.html')}")


# ---------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------
# Small pictures in the Okabe-Ito colours, drawn without pyplot, so that no window and no hidden state is involved.

_INK, _SOFT, _GRID = "#20262d", "#66707a", "#e3e7ea"
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"


def new_figure(rows, columns, panel_inches, used, **subplots):
    """(figure, its first `used` axes) in the look of all plots; panel_inches = (width, height) of one panel."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(columns * panel_inches[0], rows * panel_inches[1]), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots).ravel()
    for k, axis in enumerate(axes):
        axis.set_visible(k < used)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_SOFT)
        axis.tick_params(colors=_SOFT, labelsize=8, length=3)
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes[:used]


def save_figure(figure, path):
    """Write the figure as a PNG of 64 colours: a third of the usual size, the same bytes for the same figure."""
    from PIL import Image
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    write_whole(path, packed.getvalue())


def _values(rows, key):
    """One column of a list of dicts as floats (len(rows),); an empty, missing or None cell is NaN."""
    return np.array([float("nan") if row.get(key) in (None, "") else float(row[key]) for row in rows])


def _metric_families(history):
    """{family: [columns]}: train_loss and val_loss share a panel, and so do val_mae and val_mae_left."""
    columns = [c for c in dict.fromkeys(c for row in history for c in row) if c.startswith(("train_", "val_"))]
    names = [column.split("_", 1)[1] for column in columns]
    families = {}
    for column, name in zip(columns, names):
        roots = [other for other in names if name == other or name.startswith(other + "_")]
        families.setdefault(min(roots, key=len), []).append(column)
    return families


def _draw_history_panel(axis, history, family, columns, best_epoch):
    """One family over the epochs; the title tells the value of its first val_ column at the best epoch."""
    epochs, colours = _values(history, "epoch"), itertools.cycle([_BLUE, _GREEN, _PURPLE, _YELLOW, _SKY])
    for column in columns:
        colour, style = (_ORANGE, "--") if column.startswith("train_") else (next(colours), "-")
        axis.plot(epochs, _values(history, column), style, color=colour, label=column, marker=".", markersize=3)
    axis.set_title(family, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axis.set_xlabel("epoch", fontsize=8, color=_SOFT)
    axis.locator_params(axis="x", integer=True)
    if len(columns) > 1:
        axis.legend(fontsize=7, frameon=False, labelcolor=_INK)
    if best_epoch in epochs:
        shown = next((column for column in columns if column.startswith("val_")), columns[0])
        value = _values(history, shown)[epochs == best_epoch][0]
        axis.axvline(best_epoch, color=_INK, linewidth=0.9, linestyle=":")
        axis.plot([best_epoch], [value], "o", color=_INK, markersize=4)
        axis.set_title(f"epoch {best_epoch:g}: {value:.3g}", loc="right", fontsize=8, color=_SOFT)


def plot_history(history, path, best_epoch=None):
    """Learning curves as PNG: a panel per family of train_ and val_ columns, then the learning rate (log scale).

    history: dicts with epoch and any train_*, val_* and learning_rate (None or "" leaves a gap). best_epoch is marked
    in every panel. It takes half a second or more, so it belongs at the end of a run, not into each epoch.
    """
    families = _metric_families(history)
    if np.nanmax([0.0, *_values(history, "learning_rate")]) > 0:
        families["learning_rate"] = ["learning_rate"]
    columns = min(3, len(families))
    figure, axes = new_figure(-(-len(families) // columns), columns, (3.5, 2.5), len(families))
    for axis, (family, members) in zip(axes, families.items()):
        _draw_history_panel(axis, history, family, members, best_epoch)
        axis.set_yscale("log" if family == "learning_rate" else "linear")
    save_figure(figure, path)


def plot_per_target(rows, path, metrics=("pearson_r", "r2")):
    """Horizontal bars per target (1 to 40), best on top, as PNG; one panel per metric.

    rows: dicts with target and, for each metric m, the keys m, m_low and m_high (interval), baseline_m and ceiling_m;
    all but target and m may be missing. The axis ends at -0.5; the number beside the bar is always the true one.
    """
    rows = sorted(rows, key=lambda row: np.nan_to_num(_values([row], metrics[0])[0], nan=-math.inf))
    figure, axes = new_figure(1, len(metrics), (4.8, 1.15 + 0.26 * len(rows)), len(metrics), sharey=True)
    height = np.arange(len(rows))
    for axis, metric in zip(axes, metrics):
        value, low, high, baseline, ceiling = (_values(rows, key) for key in (
            metric, f"{metric}_low", f"{metric}_high", f"baseline_{metric}", f"ceiling_{metric}"))
        axis.barh(height, value, height=0.62, color=_SKY, label="model")
        axis.hlines(height, low, high, color=_INK, linewidth=1.3, label="interval")
        axis.plot(baseline, height, "|", color=_ORANGE, markersize=11, markeredgewidth=2.4, label="baseline")
        if np.isfinite(ceiling).any():
            axis.plot(ceiling, height, "D", color=_INK, markersize=4.5, markerfacecolor="none", label="noise ceiling")
        axis.set_title(metric, loc="left", fontsize=10, fontweight="bold", color=_INK)
        axis.set_xlim(max(-0.5, 1.1 * np.nanmin([0.0, *value, *low, *baseline])), 1.0)
        for y, number in zip(height, value):
            axis.annotate(f"{number:.2f}", (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.axvline(0, color=_SOFT, linewidth=0.9)
        axis.grid(visible=False, axis="y")
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(height, [str(row["target"])[:28].replace("$", r"\$") for row in rows], color=_INK)
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


def plot_scatter(predicted, target, names, path):
    """Small multiples of predicted over true as PNG, a panel per target (up to 40) with identity line, r and n.

    predicted, target: (N, R) in the original unit, NaN = missing; names: R labels.
    """
    predicted, target = np.asarray(predicted, float), np.asarray(target, float)  # (N, R)
    known = np.isfinite(predicted) & np.isfinite(target)
    pearson_r = regression_metrics(predicted, np.where(known, target, np.nan))["pearson_r"]  # (R,)
    columns, inches = (min(len(names), 4), 2.4) if len(names) <= 16 else (7, 1.75)
    figure, axes = new_figure(-(-len(names) // columns), columns, (inches, inches), len(names))
    for j, axis in enumerate(axes):
        x, y = target[known[:, j], j], predicted[known[:, j], j]  # (n,)
        low, high = (min(*x, *y), max(*x, *y)) if len(x) else (0.0, 1.0)
        margin = 0.05 * (high - low) or 0.5
        axis.plot([low, high], [low, high], color=_SOFT, linewidth=1, linestyle="--")
        axis.plot(x, y, "o", color=_BLUE, markersize=3, alpha=0.5 if len(x) < 300 else 0.2, markeredgewidth=0)
        axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), box_aspect=1)
        axis.locator_params(nbins=4 if columns <= 4 else 2)
        axis.set_title(str(names[j])[:18], loc="left", fontsize=8, fontweight="bold", color=_INK, parse_math=False)
        axis.annotate(f"r {pearson_r[j]:.2f}\nn {len(x)}", (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=7)
    figure.supxlabel("true", fontsize=9, color=_SOFT)
    figure.supylabel("predicted", fontsize=9, color=_SOFT)
    save_figure(figure, path)


def _panel_title(axis, title, note=""):
    """Title at the left in ink, a note at the right in the soft colour."""
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK, parse_math=False)
    axis.set_title(note, loc="right", fontsize=8, color=_SOFT, parse_math=False)


def plot_confusion(confusion, names, path):
    """Confusion matrix as PNG: (C, C) counts, rows true, columns predicted; the shade is the share of the row."""
    confusion = np.asarray(confusion, np.int64)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = max(2.9, 1.5 + 0.62 * len(names))
    figure, (axis,) = new_figure(1, 1, (side + 0.5, side), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in itertools.product(range(len(names)), repeat=2):
        axis.text(j, i, f"{confusion[i, j]}\n{share[i, j]:.0%}", ha="center", va="center", fontsize=8,
                  color="white" if share[i, j] > 0.55 else _INK)
    labels = [str(name)[:22].replace("$", r"\$") for name in names]
    turned = {"rotation": 40, "ha": "right"} if len(names) > 4 else {}
    axis.set_xticks(range(len(names)), labels, color=_INK, **turned)
    axis.set_yticks(range(len(names)), labels, color=_INK)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("predicted", fontsize=9, color=_SOFT)
    axis.set_ylabel("true", fontsize=9, color=_SOFT)
    _panel_title(axis, f"n {confusion.sum()}", f"{np.trace(confusion)} right")
    save_figure(figure, path)


def plot_reliability(probability, label, path, before=None, n_bins=ECE_BINS, seed=0):
    """Reliability diagram as PNG: share of right rows over the confidence, a bin a point, its area the rows in it.

    probability, before: (N, C), after and (None: not drawn) before calibration; label: (N,), below 0 = missing. The
    title tells the ECE and what a perfectly calibrated model of these confidences shows at this n: mean, 95th percent.
    """
    label = np.asarray(label, np.int64)
    figure, (axis,) = new_figure(1, 1, (4.2, 3.9), 1)
    axis.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle="--")
    for values, colour, name in ((before, _ORANGE, "before"), (probability, _BLUE, "after")):
        if values is not None:
            values = np.asarray(values, np.float64)[label >= 0]
            _draw_reliability(axis, values.max(1), values.argmax(1) == label[label >= 0], n_bins, colour, name)
    confidence = np.asarray(probability, np.float64)[label >= 0].max(1, initial=0)
    ece = classification_metrics(probability, label)["ece"]
    null, high = (expected_ece(confidence, n_bins, seed=seed, level=level) for level in (None, 0.95))
    _panel_title(axis, f"ECE {ece:.3f}, n {len(confidence)}\nof a calibrated model {null:.3f} (95 % under {high:.3f})")
    axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    axis.set_xlabel("confidence", fontsize=9, color=_SOFT)
    axis.set_ylabel("share of right answers", fontsize=9, color=_SOFT)
    if before is not None:
        axis.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="upper left")
    save_figure(figure, path)


def _draw_reliability(axis, confidence, correct, n_bins, colour, name):
    """One model's bins with Wilson intervals."""
    bins = _confidence_bins(confidence, n_bins, adaptive=False)
    ones = np.ones((1, len(bins)))
    count, mean, right = (_sums_by(bins, n_bins, ones * part)[0] for part in (1, confidence, correct))
    used = count > 0
    ends = np.array([wilson_interval(k, n) for k, n in zip(right[used], count[used])]).reshape(-1, 2)
    x = mean[used] / count[used]
    axis.vlines(x, ends[:, 0], ends[:, 1], color=colour, linewidth=1.2, alpha=0.6)
    axis.plot(x, right[used] / count[used], color=colour, linewidth=1, alpha=0.6)
    axis.scatter(x, right[used] / count[used], 12 + 150 * count[used] / max(count.sum(), 1), color=colour,
                 label=name, zorder=3, linewidths=0)


def plot_risk_coverage(confidence, correct, path):
    """Risk-coverage curve as PNG: the error rate among the most confident share of the rows, (N,) and (N,) bool."""
    coverage, risk = risk_coverage(confidence, correct)
    figure, (axis,) = new_figure(1, 1, (4.2, 3.0), 1)
    axis.plot(coverage, risk, color=_BLUE, drawstyle="steps-post", linewidth=1.4, label="model")
    if len(risk):
        axis.axhline(risk[-1], color=_ORANGE, linestyle="--", linewidth=1.2, label="random order")
        axis.legend(fontsize=8, frameon=False, labelcolor=_INK)
    half = risk[np.searchsorted(coverage, 0.5)] if len(risk) else math.nan
    _panel_title(axis, "risk over coverage", f"all {risk[-1] if len(risk) else math.nan:.2f}, surest half {half:.2f}")
    axis.set(xlim=(0, 1.02), ylim=(0, max(0.1, 1.15 * risk.max(initial=0))))
    axis.set_xlabel("coverage: share of rows, most confident first", fontsize=9, color=_SOFT)
    axis.set_ylabel("error rate", fontsize=9, color=_SOFT)
    save_figure(figure, path)


def plot_precision_recall(probability, label, names, path, positive=None):
    """Precision-recall and ROC curves as PNG, each class against the rest (with `positive` that class alone).

    probability: (N, C); label: (N,), below 0 = missing; a class without rows, or without others, is left out.
    """
    label = np.asarray(label, np.int64)
    probability, label = np.asarray(probability, np.float64)[label >= 0], label[label >= 0]
    shown = [c for c in (range(len(names)) if positive is None else [positive]) if 0 < (label == c).sum() < len(label)]
    figure, axes = new_figure(1, 2, (3.9, 3.8), 2)
    colours = itertools.cycle([_BLUE, _ORANGE, _GREEN, _PURPLE, _YELLOW, _SKY])
    for c, colour in zip(shown, colours):
        _draw_curves(axes, probability[:, c], label == c, colour, str(names[c])[:18].replace("$", r"\$"))
    axes[1].plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle="--")
    for axis, title, x, y in ((axes[0], "precision-recall", "recall", "precision"),
                              (axes[1], "ROC", "false positive rate", "recall")):
        _panel_title(axis, title, f"n {len(label)}")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
        axis.set_xlabel(x, fontsize=9, color=_SOFT)
        axis.set_ylabel(y, fontsize=9, color=_SOFT)
        place = "lower left" if axis is axes[0] else "lower right"
        if shown:
            axis.legend(fontsize=7, frameon=False, labelcolor=_INK, loc=place)
    save_figure(figure, path)


def _draw_curves(axes, score, is_positive, colour, name):
    """Both curves of one class; the dotted line is the precision of a random order."""
    order, first = _tied_runs(score)
    ends = np.append(first[1:], len(score))
    found = np.cumsum(is_positive[order])[ends - 1]
    recall, false_rate = found / is_positive.sum(), (ends - found) / (~is_positive).sum()
    auc, precision = (float(value[0]) for value in ranking_metrics(score, is_positive))
    axes[0].plot(np.append(0, recall), np.append(found[0] / ends[0], found / ends), color=colour, linewidth=1.4,
                 drawstyle="steps-pre", label=f"{name}: AP {precision:.2f}")
    axes[0].axhline(is_positive.mean(), color=colour, linewidth=1, linestyle=":")
    axes[1].plot(np.append(0, false_rate), np.append(0, recall), color=colour, linewidth=1.4,
                 label=f"{name}: AUC {auc:.2f}")


# ---------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------
# One HTML file that carries everything inside: the builders return escaped HTML, write_report puts it in order.

REPORT_MAX_BYTES = 5_000_000
_LEVELS = {  # word and outline: shape and word tell the levels apart without colour
    "good": ("Holds", '<circle cx="12" cy="12" r="11"/><path d="M6.8 12.4l3.6 3.7 6.9-7.6"/>'),
    "caution": ("With caution", '<path class="f" d="M12 1.8L23.3 21.6H.7z"/><path d="M12 9v6M12 18.1v.4"/>'),
    "poor": ("Does not hold", '<path class="f" d="M7.6 1.5h8.8l6.1 6.1v8.8l-6.1 6.1H7.6l-6.1-6.1V7.6z"/>'
                              '<path d="M8.3 8.3l7.4 7.4M15.7 8.3l-7.4 7.4"/>')}
_REPORT_CSS = """
:root{--ground:#f4f6f8;--paper:#fff;--ink:#1b2128;--soft:#57626d;--line:#dde2e7;--good:#00684e;--good-bg:#e5f4ee;
  --caution:#855000;--caution-bg:#fdf2dd;--poor:#a5301a;--poor-bg:#fcebe6}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--ground:#12161b;--paper:#1a2027;--ink:#e6eaee;
  --soft:#9aa6b2;--line:#313a44;--good:#4fd0a5;--good-bg:#12302a;--caution:#f0b54e;--caution-bg:#33280f;--poor:#ff9c82;
  --poor-bg:#3a1d17} img{filter:brightness(.93)}}
*{box-sizing:border-box;print-color-adjust:exact} p,ul{margin:0 0 .8rem;max-width:46rem} ul{padding-left:1.2rem}
body{margin:0;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;font:16px/1.55 system-ui,sans-serif}
.page{max-width:74rem;margin:auto;padding:2.2rem 1.5rem;display:grid;gap:0 2.5rem;
  grid-template-columns:12rem minmax(0,1fr)} .page>:not(nav,main){grid-column:1/-1}
main,nav ol{counter-reset:n;padding:0;margin:0;list-style:none} h2{font-size:1.2rem;margin:0 0 .9rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 1rem} nav{position:sticky;top:1rem;align-self:start;font-size:.9rem}
h2:before,nav a:before{counter-increment:n;content:counter(n);color:var(--soft);font-weight:400;margin-right:.7em}
nav a{display:block;padding:.3rem 0;text-decoration:none;color:var(--soft);border-bottom:1px solid var(--line)}
svg{flex:none;width:1.5em;height:1.5em;fill:currentColor;stroke:var(--paper);stroke-width:2.6;stroke-linecap:round;
  stroke-linejoin:round} svg circle,svg .f{stroke:none} .good{color:var(--good);background:var(--good-bg)}
.caution{color:var(--caution);background:var(--caution-bg)} .poor{color:var(--poor);background:var(--poor-bg)}
.note{display:flex;gap:.7rem;align-items:center;border-radius:.6rem;padding:.6rem .9rem;margin:0 0 1rem;max-width:46rem}
.note p{margin:0;max-width:none;color:var(--ink)} .verdict{max-width:none;padding:1.2rem;gap:1.1rem;font-size:1.25rem}
.verdict svg{width:3.4rem;height:3.4rem} .word{font-size:.8rem;font-weight:700;text-transform:uppercase}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.8rem;margin:0 0 2rem}
.figures div,section{background:var(--paper);border:1px solid var(--line);border-radius:.8rem;padding:.8rem 1rem}
dt,.small,figcaption,footer{color:var(--soft);font-size:.85rem;line-height:1.45}
dd{margin:0} .big{font-size:1.7rem;font-weight:600} section{padding:1.4rem 1.5rem .8rem;margin:0 0 1.2rem}
.scroll{overflow-x:auto;margin:0 0 1rem} table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{padding:.38rem .8rem;overflow-wrap:normal;text-align:left;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-size:.8rem;border-bottom-width:2px} tbody tr:last-child>*{border:0}
tbody th{font-weight:500;position:sticky;left:0;background:var(--paper)} th:first-child{padding-left:0}
.num,.big,.cases span{font-variant-numeric:tabular-nums} th.num,.num{text-align:right;white-space:nowrap}
figure{margin:0 0 1.2rem} img{display:block;max-width:100%;height:auto;background:#fff;border-radius:.5rem}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:1rem;margin:0 0 1rem}
.cases figure{margin:0} .cases img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--ground)}
.cases b,.cases span{display:block} .cases b{color:var(--ink);margin-top:.4rem}
pre{background:var(--ground);border-radius:.5rem;padding:.7rem .9rem;white-space:pre-wrap;font:.85rem/1.5 monospace}
@media screen and (max-width:52rem){.page{display:block;padding:1rem .9rem} h1{font-size:1.4rem} .big{font-size:1.35rem}
  .verdict{padding:1rem;font-size:1.05rem} .verdict svg{width:2.4rem;height:2.4rem} section{padding:1.1rem 1rem .4rem}
  .figures{grid-template-columns:1fr 1fr;gap:.6rem;margin-bottom:1.1rem} nav{position:static;margin:0 0 1.2rem}
  nav ol{display:flex;flex-wrap:wrap;gap:.45rem} nav a:before{content:none} .plot img{max-width:none;width:44rem}
  nav a{border:1px solid var(--line);border-radius:1rem;padding:.25rem .7rem;background:var(--paper)}}
@media print{:root{--ground:#fff} body{font-size:10pt} .page{display:block;padding:0} nav{display:none}
  section{border:0;padding:.4rem 0} .note{border:1.5pt solid} .scroll{overflow:visible} table{font-size:8.5pt}
  figure,tr,pre,.figures div{break-inside:avoid} h2{break-after:avoid} img{max-height:125mm}}
"""


def shorten_path(path, roots=()):
    """The path as it may be published: what follows the innermost of `roots` that holds it, else its last two parts."""
    path = Path(os.path.abspath(path))
    holding = [root for root in map(Path, map(os.path.abspath, roots)) if root in path.parents]
    inner = max(holding, key=lambda root: len(root.parts), default=None)
    return path.relative_to(inner).as_posix() if inner else "/".join(path.parts[1:][-2:])


def _note(body, level, kind="note"):
    assert level in _LEVELS, f"level {level!r} is none of {', '.join(_LEVELS)}"
    mark = f'<svg viewBox="0 0 24 24" role="img" aria-label="{_LEVELS[level][0]}">{_LEVELS[level][1]}</svg>'
    return f'<div class="{kind} {level}">{mark}<div>{body}</div></div>'


def html_text(text, level=None):
    """Paragraphs, split at blank lines; lines that begin with "- " make a list; with a level: a marked note."""
    blocks = []
    for part in re.split(r"\n\s*\n", str(text).strip()):
        lines = [html.escape(line.strip()) for line in part.splitlines()]
        is_list = all(line.startswith("- ") for line in lines)
        items = "".join(f"<li>{line[2:]}</li>" for line in lines)
        blocks.append(f"<ul>{items}</ul>" if is_list else f"<p>{' '.join(lines)}</p>")
    return _note("\n".join(blocks), level) if level else "\n".join(blocks)


def html_code(text):
    """Preformatted text such as a command; long lines wrap."""
    return f"<pre><code>{html.escape(str(text))}</code></pre>"


def _cell_text(value, spec):
    """Escaped text of a table cell; a missing value is a dash, `spec` formats numbers only."""
    if value is None or value != value:
        return "&ndash;"
    spec = spec or (".4g" if isinstance(value, (float, np.floating)) else "")
    return html.escape(value if isinstance(value, str) else format(value, spec))


def html_table(rows, columns=None, formats=None, caption="", max_rows=300):
    """Table that scrolls sideways on a narrow screen, numbers right aligned; rows beyond max_rows are only counted.

    rows: dicts; columns: {key: heading} or keys (default: those of the first row); formats: {key: spec such as ".3f"}.
    """
    columns = columns or list(rows[0] if rows else ["empty"])
    columns = columns if isinstance(columns, dict) else {key: str(key).replace("_", " ") for key in columns}
    cells = [[_cell_text(row.get(key), (formats or {}).get(key)) for key in columns] for row in rows[:max_rows]]
    if len(rows) > max_rows:
        cells.append([f"and {len(rows) - max_rows:,} more rows"] + [""] * (len(columns) - 1))
    numeric = [all(re.match(r"[-+]?(\.?\d|inf)|&ndash;|$", cell) for cell in column) for column in zip(*cells)]
    align = [' class="num"' if j and numeric and numeric[j] else "" for j in range(len(columns))]
    head = "".join(f'<th scope="col"{a}>{html.escape(str(name))}</th>' for a, name in zip(align, columns.values()))
    others = ["".join(f"<td{a}>{cell}</td>" for a, cell in zip(align[1:], row[1:])) for row in cells]
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>{other}</tr>' for row, other in zip(cells, others))
    title = f'<p class="small">{html.escape(caption)}</p>' if caption else ""
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'{title}<div class="scroll" tabindex="0">{table}</div>'


def _data_uri(picture, max_side, kind="JPEG"):
    """Data URI of a PIL picture, its longer side cut down to max_side; JPEG for photographs, PNG for plots."""
    picture, buffer = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((max_side, max_side))
    (picture.quantize(64) if kind == "PNG" else picture).save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def html_image(path, caption, max_side=1600):
    """Figure with the plot or picture at `path` inside; the caption is also its text alternative."""
    from PIL import Image
    with Image.open(path) as picture:
        uri = _data_uri(picture, max_side, "PNG" if picture.format == "PNG" else "JPEG")
    text = html.escape(caption)
    image = f'<div class="scroll"><img src="{uri}" alt="{text}"></div>'
    return f'<figure class="plot">{image}<figcaption>{text}</figcaption></figure>'


def html_cases(cases, max_side=256):
    """Grid of thumbnails with a title and lines of text below each, for the best and the worst cases.

    cases: dicts with image (uint8 (H, W, 3) or (H, W), or the path of a picture), title, and lines (list of text).
    """
    from PIL import Image
    figures = []
    for case in cases:
        pixels = case["image"] if isinstance(case["image"], np.ndarray) else load_image(case["image"])
        title = html.escape(str(case["title"]))
        lines = "".join(f"<span>{html.escape(str(line))}</span>" for line in case.get("lines", ()))
        figures.append(f'<figure><img src="{_data_uri(Image.fromarray(pixels), max_side)}" alt="{title}">'
                       f"<figcaption><b>{title}</b>{lines}</figcaption></figure>")
    return '<div class="cases">' + "\n".join(figures) + "</div>"


def key_figure(label, value, interval, remark):
    """(label, value, remark) texts for the top of a report; an interval (low, high) goes before the remark."""
    low, high = interval if interval is not None else (math.nan, math.nan)
    return label, f"{value:.3f}", f"95 % interval {low:.3f} to {high:.3f}" if low == low else remark


def leakage_blocks(run):
    """The section on leakage, from leakage_report.json."""
    lines = leakage_text(read_json(run.path("leakage_report.json"))).splitlines()
    return [html_text("\n".join(f"- {line}" for line in lines))]


def history_blocks(run):
    """The section on learning curves: those of the run, or of its first fold."""
    curves = sorted(run.folder.glob("**/training_history.png"))
    return [html_image(path, f"Learning curves, {path.parent.name}") for path in curves[:1]]


def command_blocks():
    """The section that repeats the run: the command with public paths, and the versions of the packages."""
    versions = [{"package": name, "version": version} for name, version in package_versions().items()]
    return [html_code(public_command()), html_table(versions)]


def _fit_pictures(document, max_bytes):
    """Shrink every picture that takes more than an equal share of the room, when the page is over max_bytes."""
    from PIL import Image
    pattern = re.compile(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)")
    text_bytes, n_pictures = len(pattern.sub("", document)), len(pattern.findall(document))

    def shrink(match):
        uri, picture = match[0], Image.open(io.BytesIO(base64.b64decode(match[1])))
        side = max(picture.size)
        while len(uri) * n_pictures > max_bytes - text_bytes and side > 16:
            side = side * 3 // 4
            uri = _data_uri(picture, side)
        return uri

    return pattern.sub(shrink, document) if len(document) > max_bytes else document


def write_report(path, title, verdict, sections, foot="", figures=()):
    """Write one self-contained HTML page: ASCII, no script, no network, under 5 MB, light and dark, phone and print.

    verdict: (level good, caution or poor, sentence); figures: the key figures as (label, value, remark) texts;
    sections: (heading, blocks from the html_ builders), without blocks left out. The order of every train script: Data
    and split, Leakage, Metrics, Calibration, Learning curves, Best and worst cases, Limits, Command and versions.
    """
    title, foot, sentence = map(html.escape, (title, foot, verdict[1]))
    sections = [(html.escape(heading), "\n".join(blocks)) for heading, blocks in sections if blocks]
    links = "".join(f'<li><a href="#s{i}">{heading}</a></li>' for i, (heading, _) in enumerate(sections))
    tile = '<div><dt>{}</dt><dd class="big">{}</dd><dd class="small">{}</dd></div>'
    tiles = "".join(tile.format(*map(html.escape, figure)) for figure in figures)
    main = "\n".join(f'<section id="s{i}"><h2>{h}</h2>\n{body}\n</section>' for i, (h, body) in enumerate(sections))
    banner = _note(f'<div class="word">{_LEVELS[verdict[0]][0]}</div><p>{sentence}</p>', verdict[0], "note verdict")
    document = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_REPORT_CSS}</style></head><body><div class="page">
<header><h1>{title}</h1></header>
{banner}
<dl class="figures">{tiles}</dl>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>
{main}
</main>
<footer>{foot}</footer></div></body></html>
""".encode("ascii", "xmlcharrefreplace").decode()
    write_whole(path, _fit_pictures(document, REPORT_MAX_BYTES - 1).encode())
