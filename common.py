"""The shared shelf of the train scripts: what a run needs whatever it predicts. Imports no script.

Sections, in the order in which a run meets them: Errors and exit codes; Arguments and config; Run folder and log;
Files; Device, seed and loaders; Several processes; Transforms; Optimiser and schedule; Early stopping; Checkpoints;
Training; Metrics.

Letters: N rows, B batch, T frames, R ratings or other targets, F features, H and W height and width in pixels, S side
of a square input.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
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
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

# --- Errors and exit codes -------------------------------------------------
# A user's mistake is one line and never a traceback; a stop signal saves and ends with an exit code of its own.

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER = 2
EXIT_CHECKPOINT = 3
EXIT_SAVED = 75
EXIT_INTERRUPT = 130


class UserError(Exception):
    """A mistake the user can fix: printed as one line without traceback, exit code 2."""
    code = EXIT_USER
    said_by_first = False  # True on the other processes of a run, where the first one prints it


def run_main(main):
    """Run main() and exit with the contract's code: one line for a user's mistake, a traceback for ours."""
    if sys.stderr is None:  # closed, or Windows without a console; progress bars and errors go there
        sys.stderr = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        # a terminal may lack the letters of a file's name, and a log is read while it grows
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        leave_processes()
        return
    except SystemExit:  # all of them stop here, as on a signal
        leave_processes(wait=False)
        raise
    except (Exception, KeyboardInterrupt) as error:
        code, text = _explain(error)
        if code is None:
            raise
    finally:
        StopSignals.leave()
    if text:
        sys.stderr.write(f"{_process_prefix()}{text}\n")
    sys.exit(code)


LOST_PROCESS = re.compile("gloo|nccl|TCPStore|connection (closed|reset)|broken pipe", re.IGNORECASE)
LOST_DRIVE = (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.EHOSTDOWN)  # over a network, or pulled out
LOST_WORKER = re.compile(r"DataLoader (worker \(|timed out)|</torch_")  # </torch_...> is a file of a full /dev/shm
# of Apple GPUs, CPUs, OpenCV; of cuBLAS and cuDNN, which take memory beside torch
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|Insufficient memory|STATUS_ALLOC_FAILED")
IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker .*\n\S+: ", re.DOTALL)  # torch's text up to the error's own


def is_out_of_memory(error):
    """True where the memory of a GPU or of the computer was too small, whichever library says so."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


def _explain(error):
    """(exit code, text for the user) of an exception; (None, None) for a programming mistake."""
    text = IN_WORKER.sub("", str(error)).rstrip()
    reason = one_line(text)
    if isinstance(error, UserError):
        return error.code, "" if error.said_by_first else f"error: {text}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPT, "interrupted"
    if is_out_of_memory(error):
        return EXIT_CRASH, f"error: out of memory ({reason})\n{_half_batch()}"
    if "more than 1 value per channel" in reason:
        return EXIT_USER, ("error: BatchNorm got a single value per channel: take a larger "
                           "--batch_size or picture, or keep its statistics (--freeze_norm)")
    if isinstance(error, ImportError):
        return EXIT_CRASH, f"error: a package does not load ({reason}); what to do: python verify_setup.py"
    if "no kernel image is available" in reason:
        return EXIT_USER, ("error: this build of torch has no kernels for this GPU. python "
                           "verify_setup.py says which build has them; or run with --device cpu")
    if "does not have a deterministic implementation" in reason:  # such as the backward pass of VGG's pooling on CUDA
        return EXIT_USER, f"error: {reason.partition(',')[0]}: leave --deterministic out, or take another network"
    if LOST_PROCESS.search(text) and launched_processes().size > 1:
        cause = one_line(text.rpartition("Last error:")[2])  # NCCL's own words, which may be none
        return (EXIT_CRASH, "error: another process of this run has ended, see there, or cannot be "
                f"reached ({cause or reason})")
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC:
        return EXIT_CRASH, f"error: {reason}: a full drive, or a full /dev/shm (then try --num_workers 0)"
    if number in LOST_DRIVE:
        return EXIT_CRASH, f"error: {reason}: a drive does not answer. Once it does, --resume auto continues"
    if LOST_WORKER.search(text):
        return EXIT_CRASH, (f"error: a loader worker died or hangs, or lacks shared memory ({reason}). The last "
                            "checkpoint is whole: --resume auto continues. Try --num_workers 0, or a larger /dev/shm")
    return None, None


def _process_prefix():
    with contextlib.suppress(UserError):  # the error may be that the rank is none
        rank = launched_processes().rank
        if rank > 0:
            return f"[process {rank}] "
    return ""


def _half_batch():
    """The command with half the batch and twice --accumulate: the same optimiser steps, in a run of its own."""
    command = shlex.join(["python", *map(_snake_case, sys.argv)])
    batch = re.search(r"--batch_size[ =](\d+)", command)
    accumulate = re.search(r"--accumulate(?:_grad_batches)?[ =](\d+)", command)
    if not batch or batch[1] == "1":
        return ("try again with a smaller --batch_size (in training with --accumulate: the same gradient) or "
                "--val_batch_size, smaller pictures, or in predict_assessor.py a smaller --predict_batch_size")
    half = int(batch[1]) // 2
    doubled = 2 * int(accumulate[1]) if accumulate else 2
    changed = r" --(batch_size|accumulate(_grad_batches)?|resume(_from_checkpoint)?)[ =](?!auto|--)('[^']*'|\S+)"
    kept = re.sub(changed, "", command)
    return (f"try: {kept} --batch_size {half} --accumulate {doubled}\n"
            "(or, if it was in evaluation, with a smaller --val_batch_size)")


STOP_SIGNALS = {  # Windows has the first two
    number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")}


class StopSignals:
    """TERM, USR1, USR2 and the first Ctrl-C ask for a save and a stop; another Ctrl-C stops at once."""

    def __init__(self):
        self.received = 0  # the number of the last signal; 0: none yet
        self.armed = False  # True in the epoch loop; elsewhere nothing is to be saved
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number, _):
        is_second = self.received == signal.SIGINT
        self.received = number
        if number == signal.SIGINT and (is_second or not self.armed):
            raise KeyboardInterrupt
        if not self.armed:
            self.leave()
            sys.exit(EXIT_SAVED)

    def disarm(self):
        """From here on nothing is to be saved: a signal that came since the last look is obeyed at once."""
        self.armed = False
        if self.received:
            self._receive(self.received, None)

    @staticmethod
    def leave():
        """From here on only Ctrl-C is obeyed: on the way out a signal could only change the exit code.

        srun sends one to tasks that are slower to leave than the first, and Python puts every
        handler but SIG_IGN back to the default before it ends.
        """
        for number in STOP_SIGNALS - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)


def did_you_mean(name, known):
    """' (did you mean X?)' for the known name nearest to `name` in any case, or ''."""
    spelled = {other.lower(): other for other in known}
    match = difflib.get_close_matches(name.lower(), spelled, 1)
    return f" (did you mean {spelled[match[0]]}?)" if match else ""


def one_line(error):
    """The message of an exception on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def shorten_list(items, limit=10):
    """'a, b, c and 4 more': every fault counted, the first `limit` shown."""
    items = list(items)
    shown = ", ".join(map(str, items[:limit]))
    hidden = len(items) - limit
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def rows_by_key(keys):
    """{key: the rows that have it}, in the order of the first rows."""
    rows_of = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    return rows_of


# --- Arguments and config --------------------------------------------------
# A flag is declared once; config file, flags of a resumed run and command line all pass through its type.

RELATIONS = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}  # of --criteria and --filter


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one and does not tell it itself."""

    def _get_help_string(self, action):
        says_none = action.default in (None, "") or action.nargs == 0
        return action.help if says_none or "default" in action.help else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose error is one line, with exit code 2."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Help, **options)
        self.may_change = set()  # flags that may change on resume: where and how fast, never what

    def group(self, title, may_change=False):
        """add_argument of a new group of flags; may_change=True may be said of all of them, or of one."""
        group = self.add_argument_group(title)

        def add(*names, may_change=may_change, **options):
            action = group.add_argument(*names, **options)
            if may_change:
                self.may_change.add(action.dest)
        return add

    def error(self, message):
        self.exit(EXIT_USER, f"error: {message}\n")


def bounded(kind, low=-math.inf, high=math.inf, word=None):
    """argparse type: a finite `kind` (int, float) in [low, high], or this word."""
    def parse(text):
        if text == word:
            return text
        value = kind(text)
        if not low <= value <= high or abs(value) > sys.float_info.max:
            raise argparse.ArgumentTypeError(f"{text} is outside [{low:g}, {high:g}]")
        return value
    parse.__name__ = f"{word} or {kind.__name__}" if word else kind.__name__  # in argparse's messages
    return parse


def new_file(text):
    """argparse type: Path of a file to write at the end, which must be possible from the start."""
    path = Path(text)
    is_other = path.exists() and not path.is_file()  # a folder, or a device such as /dev/null
    if is_other or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: expected a file, in a folder that exists and can be written to")
    return path


def best_model_of(text):
    """argparse type: Path of a checkpoint; of a run folder, its best_model.pth."""
    path = Path(text)
    if not path.is_dir():
        return path
    best = path / "best_model.pth"
    if not best.exists():
        raise argparse.ArgumentTypeError(
            f"{path} holds no best_model.pth; of a run with folds name one, as {path}/fold_0")
    return best


WHOLE = bounded(int, 0)
POSITIVE = bounded(int, 1)
AMOUNT = bounded(float, 0)
SHARE = bounded(float, 0, 1)
DROPOUT = bounded(float, 0, 0.95)
SIDE = bounded(int, 32)  # of an input, in pixels


def add_run_arguments(parser):
    """How a run is repeated; where it writes, how it is continued, saved and watched."""
    add = parser.group("run")
    add("--seed", type=WHOLE, default=42, help="seed of every draw")
    add("--deterministic", action="store_true",
        help="refuse operations that may not repeat exactly (GPU: slower)")
    add("--init_from", type=best_model_of, metavar="CHECKPOINT",
        help="a new run from the weights of a checkpoint, or of a run folder (fine-tuning)")
    add("--dry_run", action="store_true",
        help="2 batches, 1 epoch, the whole run folder: does everything work?")

    add = parser.group("run folder", may_change=True)
    add("--output_dir", type=Path, default=Path("outputs"), help="parent of the timestamped run folders")
    add("--config", type=Path, help="YAML or JSON file of flags, a run's args.json too; the command line wins")
    add("--name", help="what runs.csv calls this run")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="auto", metavar="{auto,RUN,CHECKPOINT}",
        help="continue exactly: auto = the newest unfinished run with these flags; or a run "
             "folder; or a checkpoint")
    add("--save_every", type=WHOLE, default=10, help="epochs between checkpoint_epoch_N.pth; 0 = none")
    add("--save_minutes", type=AMOUNT, default=10.0, help="minutes between saves within an epoch; 0 = none")
    add("--save_top_k", type=WHOLE, default=0,
        help="keep the k best epochs as top_epoch_N_SCORE.pth; 0 = none")
    add("--keep_last", action="store_true",
        help="keep last.pth and .prev of a finished run (default: only last.pth, and only where "
             "the schedule allows more epochs)")
    add("--criteria", default="", help='bars to judge, e.g. "r2>0.15,mae<3.0": PASS, FAIL or NOT RESOLVABLE')
    add("--tensorboard", action="store_true",
        help="also write TensorBoard event files (needs the tensorboard package)")
    add("--wandb", action="store_true", help="also log to Weights & Biases (needs the wandb package)")


def add_training_arguments(parser):
    """Epochs, batches, optimiser, schedule and early stopping."""
    add = parser.group("training")
    add("--epochs", "--max_epochs", type=POSITIVE, default=50, help="passes over the training rows")
    add("--batch_size", type=POSITIVE, default=32, help="samples per batch, over all processes")
    add("--val_batch_size", type=POSITIVE, may_change=True,
        help="samples per batch in evaluation; without it, --batch_size")
    add("--accumulate", "--accumulate_grad_batches", type=POSITIVE, default=1,
        help="batches per optimiser step")
    add("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw", help="sgd: momentum 0.9")
    add("--lr", "--learning_rate", type=bounded(float, 1e-12), default=1e-4, help="peak learning rate")
    add("--weight_decay", type=AMOUNT, default=0.01, help="not applied to biases and normalisation layers")
    add("--scheduler", default="cosine",
        choices=("cosine", "step", "plateau", "warm_restarts", "onecycle", "none"),
        help="cosine: to 0 over the run; step: x0.1 every epochs//3; plateau: x0.5 after epochs "
             "without a gain (in the training loss with --select last); warm_restarts: cosine over "
             "10, 20, 40, ... epochs; onecycle: up over 30 %% of the run, then to 0")
    add("--plateau_patience", type=WHOLE, default=5,
        help="epochs without a gain that plateau bears; 0: the first one acts")
    add("--min_lr", type=AMOUNT, default=0.0, help="lowest learning rate of the schedule")
    add("--warmup_epochs", type=AMOUNT, default=0.0, help="epochs of linear warm-up from 0")
    add("--clip_grad", type=AMOUNT, default=1.0, help="largest gradient norm; 0 = no clipping")
    add("--patience", "--early_stopping", "--early_stop_patience", type=WHOLE, default=15,
        help="epochs without a better validation score before stopping; 0 = never stop early")
    add("--min_epochs", type=WHOLE, default=0, help="never stop early before this epoch")
    add("--min_delta", type=AMOUNT, default=0.0, help="smallest gain that counts as better, for patience")
    add("--compile", action="store_true",
        help="compile the network first (torch.compile, minutes): for long runs on a GPU")


def add_data_arguments(parser, augments):
    """Splits, folds, leakage, bad files and augmentation."""
    add = parser.group("data")
    add("--train_ratio", type=SHARE,
        help="share of the rows (or groups) for training (default: what val_ratio and test_ratio leave)")
    add("--val_ratio", type=SHARE, default=0.2, help="share for validation: selects the epoch")
    add("--test_ratio", type=SHARE, default=0.0, help="share for the test, scored once at the end")
    add("--folds", type=WHOLE, default=0, help="K-fold cross-validation; 0 = one split")
    add("--fold", type=bounded(int, 0, word="all"), default="all", may_change=True,
        help="with --folds: all, or one fold from 0")
    add("--group_column",
        help="column whose groups (subjects, videos, sites) never stand on two sides of a split")
    add("--split_file", type=Path, may_change=True,
        help="splits.json of another run, or {train: [names], val: [...]}")
    add("--allow_leakage", action="store_true",
        help="train although splits share groups or identical pictures")
    add("--on_bad_file", choices=("error", "skip"), default="error",
        help="unreadable files: list and stop, or skip")
    add("--exact_names", action="store_true",
        help="no guess at the file that a name of another folder or spelling means")
    add("--pixel_range", type=bounded(float), nargs=2, metavar=("LOW", "HIGH"),
        help="grey pictures of more than 8 bits: values that become black and white (default: one "
             "range for all, from the data)")
    add("--cache", choices=("auto", "ram", "disk", "none"), default="auto", may_change=True,
        help="where decoded pictures are kept")
    add("--augment", choices=augments, default="full", help="random changes of training pictures")


def add_model_arguments(parser):
    """Where weights come from."""
    add = parser.group("weights")
    add("--pretrained", action="store_true", default=True,
        help="start from torchvision's published weights (default)")
    add("--no_pretrained", dest="pretrained", action="store_false", help="start from random weights")
    add("--weights", type=Path, metavar="FILE",
        help="state dict for the backbone instead of the published weights, or the name of another "
             "published set, such as IMAGENET1K_V1")


def add_compute_arguments(parser):
    """Device, precision and workers: the flags that training and prediction share."""
    add = parser.group("speed", may_change=True)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--use_amp", nargs="?", const="on", default="auto", choices=("auto", "on", "off"),
        help="mixed precision; auto = where the device is fast at it")
    add("--num_workers", type=bounded(int, 0, word="auto"), default="auto",
        help="loader processes; auto is printed")


def add_shared_arguments(parser, augments=None, **defaults):
    """Declare every flag that the train scripts share; `defaults` sets the script's own defaults.

    augments: what --augment may say, in a script that does not know all of AUGMENTATIONS.
    """
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_data_arguments(parser, augments or AUGMENTATIONS)
    add_model_arguments(parser)
    add_compute_arguments(parser)
    parser.set_defaults(**defaults)


def parse_arguments(parser, argv):
    """Parse the command line over --config over the flags of the --resume run over the defaults.

    Returns a Namespace of the flags and three sets of their names: `given`, those that were typed;
    `may_change` (see Parser); and of these `data_paths`, which say where the data are. UserError
    for a config that cannot be read, an unknown key, or a value that its flag refuses.
    """
    words = list(map(_snake_case, sys.argv[1:] if argv is None else argv))
    typed, others = _read_flags(parser, words)
    for word in others:  # said before flags that are missing, of which it may be a misspelling
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag != "--help":
            parser.error(f"unknown flag {flag}{did_you_mean(flag, parser._option_string_actions)}; --help lists all")
    values = config_values(parser, typed["config"]) if "config" in typed else {}
    resume = (values | typed).get("resume", "auto")
    if resume != "auto":
        values = config_values(parser, run_folder_of(resume) / "args.json") | values
    for action in parser._actions:
        if action.dest in values and action.dest not in typed:
            action.default = values[action.dest]
            action.required = False
    flags = vars(parser.parse_args(words))
    _check_flags(parser, flags, typed)
    if flags.get("dry_run"):  # one epoch without extra checkpoints, whatever else is given
        flags |= {"epochs": 1, "patience": 0, "save_every": 0}
    paths = {action.dest for action in parser._actions if action.type is Path}
    data_paths = paths & parser.may_change - {"output_dir", "config"}
    return argparse.Namespace(
        **flags, given=set(typed), may_change=parser.may_change, data_paths=data_paths)


def _check_flags(parser, flags, typed):
    """parser.error for values of shared flags that cannot be meant."""
    low, high = flags.get("pixel_range") or (0, 1)
    if not low < high:
        parser.error(f"--pixel_range {low:g} {high:g}: expected the value of black, then a higher one of white")
    if "warmup_epochs" in typed and flags["warmup_epochs"] >= flags["epochs"]:
        parser.error(f"--warmup_epochs {flags['warmup_epochs']:g} of {flags['epochs']} epochs: "
                     "--lr would never be reached; warm up for fewer")
    output = flags.get("output")  # given or not, it must not be a file that another flag names
    for name, value in typed.items():
        named = value if isinstance(value, list) else [value]
        paths = [os.path.realpath(path) for path in named if isinstance(path, Path)]
        if output and name != "output" and os.path.realpath(output) in paths:
            parser.error(f"--output and --{name} name the same file; name another one")


def _read_flags(parser, words, **options):
    """({flag: value} of the flags among these words, each read by its own type; list of the other words)."""
    reader = Parser(add_help=False, **options)
    for action in map(copy.copy, parser._actions):
        action.required = False
        action.default = argparse.SUPPRESS
        if action.dest != "help":
            reader._add_action(action)
    found, others = reader.parse_known_args(words)
    return vars(found), others


def flags_of(args):
    """{flag: value} of what parse_arguments returns."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "may_change", "data_paths")}


def with_flags(args, /, **values):
    """Flags of its own for a part of a run: those of parse_arguments with these values in place of theirs."""
    return argparse.Namespace(**vars(args) | values)


def _snake_case(word):
    """--some-flag=a-b -> --some_flag=a-b; other words stay as they are."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def config_values(parser, path):
    """Config file -> {flag: value}, checked here, so that an error names the file."""
    switches = {}
    words = []
    key_of = {}  # flag -> its key, which may be another name of it
    declared = parser._option_string_actions
    for key, value in read_config(path).items():
        name = f"--{key.replace('-', '_')}"
        if name not in declared:
            near = did_you_mean(key, [other[2:] for other in declared])
            raise UserError(f"{path}: unknown key {key!r}{near}; a key is a flag of this script "
                            "without its dashes, and a run has those of the script that made it")
        if value in (None, "", "~", "null"):
            continue
        action = declared[name]
        if action.dest == "config":
            raise UserError(f"{path}: {key} {value} would not be read; copy its lines")
        first = key_of.setdefault(action.dest, key)
        if first != key:
            raise UserError(f"{path}: {first} and {key} are names of one flag; keep one")
        truth = {"true": True, "false": False}.get(str(value).lower())  # None: the value is neither
        if action.nargs == 0:
            if truth is None:
                raise UserError(f"{path}: {key} is a switch: expected true or false, found {value!r}")
            switches[action.dest] = action.const if truth else not action.const
        elif truth is not None and "on" in (action.choices or ()):  # --use_amp is nearly a switch
            words.append(f"{name}={'on' if truth else 'off'}")
        else:
            words += _words_of(action, name, value, f"{path}: {key}")
    try:
        values, others = _read_flags(parser, words, exit_on_error=False)
    except argparse.ArgumentError as error:
        raise UserError(f"{path}: {error}") from None
    if others:
        raise UserError(f"{path}: more values than a flag takes: {shorten_list(others)}")
    return switches | values


def _words_of(action, name, value, where):
    """The words of a command line that give a flag this value of a config file."""
    is_repeated = isinstance(action, argparse._AppendAction)
    is_list = isinstance(value, list) and (is_repeated or action.nargs not in (None, "?"))
    items = value if is_list else [value]
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"{where} expected {getattr(action.type, '__name__', 'text')}, found {value!r}")
    if is_list and not is_repeated:
        return [name, *items]
    return [f"{name}={item}" for item in items]


def read_config(path):
    """{flag name: text or list of texts} of a YAML or JSON file, without its sections.

    Of an args.json: its flags but --config and --resume. UserError for what is no mapping, and for
    duplicate keys, anchors and deep nesting.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=unique_keys, parse_int=str, parse_float=str,
                                parse_constant=str)
        else:
            values = _parse_yaml(text)
        if isinstance(values, dict) and {"command", "flags"} <= set(values):
            values = values["flags"] | {"config": None, "resume": None}
        return unique_keys(leaves({} if values is None else values))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a config file ({len(text)} characters)") from None
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a config file (YAML or JSON in UTF-8): {one_line(error)}") from None


def unique_keys(pairs):
    """{key: value} of pairs, such as those of a JSON object. ValueError for two equal keys: one would be lost."""
    found = {}
    for key, value in pairs:
        name = str(key)
        if name in found:
            raise ValueError(f"the key {name!r} stands there twice, in one or in two sections")
        found[name] = value
    return found


def _parse_yaml(text):
    import yaml

    class Loader(yaml.BaseLoader):
        """Loader of plain texts that refuses anchors and duplicate keys."""

        def compose_node(self, parent, index):
            event = self.peek_event()
            if event.anchor:
                raise ValueError(f"anchors and aliases are not read (line {event.start_mark.line + 1})")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            return unique_keys(self.construct_pairs(node))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{error}") from None


def leaves(values):
    """(key, value) pairs of a mapping and of the sections in it."""
    if not isinstance(values, dict):
        raise ValueError(f"expected `flag: value` lines, found {type(values).__name__}")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield key, value


# --- Run folder and log ----------------------------------------------------
# One folder a run, made with os.mkdir as the lock.

@dataclasses.dataclass(eq=False)
class Run:
    """An open run folder: `say` writes to terminal and log.txt; leaving the `with` block closes it.

    A user error or a stop signal before args.json is written removes the folder again. Of several
    processes only the first one says and writes.
    """

    folder: Path
    args: argparse.Namespace
    compute: "Compute"
    signals: StopSignals
    resumed: bool = False
    wandb_works: bool = True  # False from its first failure on
    folds_after: int = 0  # how many folds are to be trained after this one
    is_part: bool = False  # True for a run folder inside that of its run

    def __post_init__(self):
        self.is_writer = self.compute.processes.is_first
        with explained_write_errors(self.folder):
            self._lock = lock_folder(self.folder) if self.is_writer else contextlib.nullcontext()
            log = self.path("log.txt") if self.is_writer else os.devnull
            self._log = open(log, "a", buffering=1, encoding="ascii", errors="backslashreplace")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with contextlib.suppress(OSError), self._lock, self._log:  # a full disk must not hide the error
            if error and not isinstance(error, SystemExit):
                self._log.write(f"{kind.__name__}: {error}\n")
        if not self.is_writer:
            return
        if not error and self.path("metrics.json").exists():
            self._drop_checkpoints()
        was_stopped = isinstance(error, (UserError, SystemExit, KeyboardInterrupt))
        with contextlib.suppress(OSError):  # the drive that it is on may be what was lost
            if was_stopped and not self.resumed and "args.json" not in os.listdir(self.folder):
                shutil.rmtree(self.folder)

    def _drop_checkpoints(self):
        """Of a finished run and its baseline/, keep last.pth alone, and only where it may go on."""
        for last in self.path("last.pth"), self.path("baseline/last.pth"):
            if last.exists() and not self.args.keep_last:
                last.with_suffix(".pth.prev").unlink(missing_ok=True)
                if self.args.scheduler not in OPEN_SCHEDULES:
                    last.unlink()

    def path(self, name):
        """Path of a file in the run folder."""
        return self.folder / name

    def say(self, text):
        """Print a line and keep it in log.txt, there in ASCII."""
        if self.is_writer:
            try:
                print(text)
            except OSError:  # the reader (| head, a terminal) has gone; the run and its log go on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with explained_write_errors(self._log.name):
            self._log.write(text + "\n")

    def child(self, name, args=None):
        """The run of one fold, or of flags of its own: a run folder inside this one, opened again where it exists."""
        self.path(name).mkdir(exist_ok=True)
        return dataclasses.replace(
            self, folder=self.path(name), args=args or self.args, folds_after=0, is_part=True)

    def each_fold(self, splits, run_split):
        """run_split(run, split) in fold_K/ for each fold of --fold that is not finished; returns the numbers of all."""
        chosen = range(len(splits)) if self.args.fold == "all" else [self.args.fold]
        for k in chosen:
            with self.child(f"fold_{k}") as child:
                child.folds_after = chosen[-1] - k
                if self.compute.processes.on_first(lambda: has_metrics(child.folder, self.args.epochs)):
                    child.say(f"fold {k} is finished")
                else:
                    child.say(f"fold {k + 1} of {len(splits)} (in {child.folder.name})")
                    run_split(child, splits[k])
        return chosen

    @functools.cached_property
    def tensorboard(self):
        """The one writer of this run's TensorBoard files."""
        return optional_package("tensorboard", "torch.utils.tensorboard").SummaryWriter(self.folder)

    @functools.cached_property
    def wandb(self):
        """The Weights & Biases run of this folder, begun or continued: its id is made of the folder's path."""
        import wandb
        if wandb.run:  # that of the fold before
            wandb.finish()
        own = uuid.uuid5(uuid.NAMESPACE_URL, self.folder.resolve().as_uri()).hex
        return wandb.init(project=script_name(), name=str(self.folder), id=own, resume="allow",
                          config=json_safe(flags_of(self.args)))

    def watch(self, row):
        """Send a history row to TensorBoard and Weights & Biases, where their flags are given; by the first process."""
        numbers = {name: value for name, value in row.items() if name != "epoch"}
        if self.args.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, row["epoch"])
            self.tensorboard.flush()
        if self.args.wandb and self.wandb_works:
            try:
                self.wandb.log(numbers, step=row["epoch"])
            except Exception as error:  # whatever fails there must not end a run
                self.wandb_works = False
                self.say(f"WARNING: the run goes on without Weights & Biases ({one_line(error)}); "
                         "run `wandb login`, or set WANDB_MODE=offline")

    def write_args(self, **data):
        """args.json: what repeats the run. On resume: refuse flags or data unlike the first start's.

        More epochs are no such difference: the metrics of fewer are removed. Nor is --fold all: it
        is kept, so that the next --resume continues all folds.
        """
        record = _args_record(self.args, self.compute, data) | {"is_part": self.is_part}
        path = self.path("args.json")
        if not path.exists():
            write_json(path, record)
            return
        first = read_json(path)
        flags = first["flags"]
        started = dict(flags)
        flags["epochs"] = max(flags["epochs"], self.args.epochs)
        if self.args.fold == "all":
            flags["fold"] = "all"
        before, now = map(self._lasting, (first, record))
        lines = [f"\n  {name:24} {json.dumps(before.get(name))[:30]:32} {json.dumps(value)[:30]}"
                 for name, value in now.items() if value != before.get(name)]
        if lines:
            raise UserError(f"{self.folder} cannot be continued exactly: these differ (then, now); "
                            f"start a new run or restore them{''.join(lines)}")
        if started["epochs"] < self.args.epochs:
            for folder in (self.folder, *self.folder.glob("fold_*")):
                read_last(self, folder)  # CheckpointError before anything is changed
            self.path("metrics.json").unlink(missing_ok=True)
        if flags != started:
            write_json(path, first)

    def write_record(self, study, split, **further):
        """args.json, which refuses a resumed run on other data, before anything is overwritten; skipped.csv."""
        self.write_args(**study.data_record(split), **further)
        path = self.path("skipped.csv")
        if study.skipped:
            write_table(path, study.skipped)
        else:
            path.unlink(missing_ok=True)

    def _lasting(self, record):
        """What of an args.json a resumed run must keep."""
        flags = {f"--{name}": value for name, value in record["flags"].items() if name not in self.args.may_change}
        return {"precision": record["device"]["precision"], **record["data"], "script": record.get("script"), **flags}


def with_progress(label, batches, total, done=0):
    """The batches, with a tqdm bar (rate, time left) on a terminal."""
    from tqdm import tqdm
    is_hidden = None if launched_processes().is_first else True  # tqdm's None: where there is no terminal
    return tqdm(batches, label, total, initial=done, leave=False, ascii=True, disable=is_hidden)


def optional_package(name, module=None):
    """The package that only one flag needs, or this module of it. UserError that names the package if it is missing."""
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise UserError(f"{name} is needed and not installed ({error}): pip install {name}") from None


def start_run(args, fp32_on_cpu=False, fixed_shapes=False):
    """Set up processes, device, threads and stop signals -> Run in a new folder, or the one to resume.

    fixed_shapes: batches are alike, so that cuDNN may try out what is fastest for them. UserError
    for a missing device, SystemExit(0) where the run to resume is finished.
    """
    if args.tensorboard:
        optional_package("tensorboard", "torch.utils.tensorboard")
    if args.wandb:
        optional_package("wandb")
    processes = launched_processes()
    compute = choose_compute(args.device, args.use_amp, processes, fp32_on_cpu)
    processes.join(compute.device)
    signals = StopSignals()  # from here on; until then there is nothing to save
    if compute.device.type == "cpu":
        keep_freed_memory()
    if compute.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = fixed_shapes and not args.deterministic
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = processes.on_first(lambda: _folder_to_resume(args)) if args.resume else None
    if found:  # the number of threads decides the last bits of every sum
        torch.set_num_threads(read_json(found / "args.json")["device"]["threads"])
    folder = found or processes.on_first(lambda: new_folder(args.output_dir))
    run = Run(folder, args, compute, signals, resumed=bool(found))
    run.say(f"run folder: {folder}{' (continued)' if found else ''}")
    run.say(f"command: {command_line()}")
    run.say(f"device: {compute.text}; {torch.get_num_threads()} threads; torch {torch.__version__}")
    if processes.size > 1:
        run.say(f"processes: {processes.size}; they share the {args.batch_size} samples of a batch")
    return run


def new_folder(parent):
    """Make run_YYYYMMDD_HHMMSS[_jobN][_2], which no other run has. UserError where `parent` cannot be written."""
    name = datetime.datetime.now().strftime("run_%Y%m%d_%H%M%S")
    job = slurm_job_id()
    if job:
        name += f"_job{job}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / name
        for number in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            folder = parent / f"{name}_{number}"
    except OSError as error:
        raise UserError(f"--output_dir {parent} cannot be written: {error.strerror}; name another") from None


def slurm_job_id():
    """The SLURM job of this process ('123', '123_4' for an array task), or None."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return os.environ.get("SLURM_JOB_ID")


def lock_folder(folder):
    """Open file whose lock says that this process writes the folder. Raises UserError where another one does."""
    handle = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader workers would inherit
    except (BlockingIOError, PermissionError):
        handle.close()
        raise UserError(f"{folder} is being written by another process; wait, or start a new run") from None
    except (ImportError, OSError):
        pass  # Windows, or a network drive without locks: a second writer is not detected there
    return handle


def is_being_written(folder):
    """True where another process has the lock of a run folder, or the folder is another user's."""
    try:
        lock_folder(folder).close()
    except (UserError, OSError):
        return True
    return False


def run_folder_of(target):
    """--resume RUN or CHECKPOINT -> the run folder, for a part of a run that of the whole. May raise UserError."""
    target = Path(target)
    folder = target if target.is_dir() else target.parent
    if not (folder / "args.json").is_file():
        raise UserError(f"--resume {target} is no run folder or checkpoint inside one "
                        f"(no args.json in {folder})")
    if not target.exists() and not has_metrics(folder, epochs=0):  # a finished run keeps no last.pth
        raise UserError(f"--resume {target}: no such file in that run; --resume {folder} takes the newest it has")
    while read_or_warn(folder / "args.json").get("is_part") and (folder.parent / "args.json").is_file():
        folder = folder.parent
    return folder


def _folder_to_resume(args):
    """The folder that --resume names, or None. Where its run is finished there is nothing to do: SystemExit."""
    if args.resume == "auto":
        folder = _newest_folder(args)
    else:
        folder = run_folder_of(args.resume)
        flags = read_json(folder / "args.json")["flags"]
        if args.epochs > flags["epochs"] and flags["scheduler"] not in OPEN_SCHEDULES:
            raise UserError(
                f"{folder}: its --scheduler {flags['scheduler']} is made for {flags['epochs']} epochs, not for "
                f"{args.epochs}. Go on from its weights in a new run: --init_from {folder}, or "
                "train with --scheduler plateau or none")
    if folder and is_finished(folder, args):
        print(f"{folder} is finished: nothing to continue; its results are there")
        sys.exit(EXIT_OK)
    named = Path(args.resume)
    if named.is_file():
        with checkpoint_fields(named):
            load_model_file(named)["progress"]  # a file of another kind is refused before anything is decoded
    return folder


def _newest_folder(args):
    """Of the runs with these flags and data: that of this SLURM job, or the newest neither finished nor running."""
    now = json_safe(flags_of(args))
    job = slurm_job_id()
    unfinished = None  # the newest
    for path in sorted(args.output_dir.glob("run_*/args.json"), key=os.path.getmtime, reverse=True):
        folder = path.parent
        record = read_or_warn(path)
        if record.get("script") != script_name():
            continue
        different = {name for name, value in now.items() if record["flags"].get(name) != value}
        if different - (args.may_change - args.data_paths):  # other mathematics, or other data
            continue
        if job and re.search(rf"_job{job}(_\d+)?$", folder.name):
            return folder
        if not unfinished and not is_finished(folder, args) and not is_being_written(folder):
            unfinished = folder
    return unfinished


def has_metrics(folder, epochs):
    """True where a run folder holds its metrics, and not those of fewer epochs."""
    return bool(read_or_warn(folder / "metrics.json")) and read_json(folder / "args.json")["flags"]["epochs"] >= epochs


def is_finished(folder, args):
    """True where a run folder holds its metrics, made of all the epochs and folds that are asked for."""
    if not has_metrics(folder, args.epochs):
        return False
    compared = list(folder.glob("run_*/args.json"))  # of several backbones, each with its own folds
    if compared:
        return all(is_finished(path.parent, args) for path in compared)
    pooled = {f"fold_{fold['fold']}" for fold in read_json(folder / "metrics.json").get("folds", [])}
    if args.fold != "all":
        return f"fold_{args.fold}" in pooled
    parts = read_or_warn(folder / "splits.json")  # with folds: fold_0, fold_1, ..., test
    return not pooled or bool(parts) and pooled >= parts.keys() - {"test"}


def script_name():
    """File name of the running script."""
    return Path(sys.argv[0]).name


def command_line():
    """The command as it was typed, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def _args_record(args, compute, data):
    slurm = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_NNODES", "SLURM_NTASKS")
    return json_safe({
        "script": script_name(),
        "command": command_line(),
        "flags": flags_of(args),
        "versions": package_versions(),
        "git": _git_commit(),
        "data": data,
        "device": {"device": str(compute.device), "name": compute.text,
                   "precision": compute.precision, "threads": torch.get_num_threads()},
        "slurm": {name: os.environ[name] for name in slurm if name in os.environ}})


def package_versions():
    """Versions of Python and of every package that can change a result."""
    from importlib import metadata
    versions = {"python": platform.python_version()}
    for name in "torch torchvision numpy pillow opencv-python opencv-python-headless pandas av pycocotools".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit():
    """The commit of this repository, ending in -dirty where a file was changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return None


def data_fingerprint(items):
    """sha256 (hex) over strings, bytes, numbers and arrays in this order."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, bytes):
            data = item
        elif hasattr(item, "tobytes"):
            data = item.tobytes()
        else:
            data = str(item).encode(errors="backslashreplace")
        head = f"{type(item)} {getattr(item, 'dtype', '')} {np.shape(item)} {len(data)}:"
        digest.update(head.encode() + data)
    return digest.hexdigest()


def data_record(contents, split, **facts):
    """What args.json says of the data and their split; a resumed run must find the same.

    contents: all that decides a result, as data_fingerprint takes it; facts: numbers
    for the reader.
    """
    return {
        "fingerprint": data_fingerprint(contents),
        "split": data_fingerprint(itertools.chain(*split.items())),
        **facts}


# --- Files -----------------------------------------------------------------
# Every file appears whole or not at all.

class CannotSave(UserError):
    """A file that cannot be written; the checkpoint before it stays whole. Exit code 1."""
    code = EXIT_CRASH


@contextlib.contextmanager
def explained_write_errors(path, n_bytes="more"):
    """An OSError in this block becomes CannotSave: which file; on a full disk the bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CannotSave(f"cannot write {path}: {error.strerror}") from error
        free = shutil.disk_usage(Path(path).absolute().parent).free
        raise CannotSave(f"no space to write {path}: {n_bytes} bytes needed, {free} free") from error


def write_whole(path, content, keep_previous=False):
    """Write bytes so that a kill at any moment leaves the old file or the new one.

    keep_previous: the old one stays as .prev. Of several processes only the first one writes.
    """
    if not launched_processes().is_first:
        return
    with explained_write_errors(path, len(content)):
        replace_file(path, content, path.with_name(f".{path.name}.tmp"), keep_previous)
        _sync_folder(path.parent)


def replace_file(path, content, temporary, keep_previous=False):
    """Write bytes into a temporary file, which then takes the path; an OSError leaves nothing of it.

    keep_previous: an older file stays as .prev. With hard links there is a file at every moment.
    """
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if keep_previous and path.exists():
            previous = Path(f"{path}.prev")
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:
                os.replace(path, previous)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(folder):
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of drives that sync no folders, as VirtualBox's shares
            raise
    finally:
        os.close(handle)


def write_json(path, value):
    """Strict JSON (a NaN is null), written whole."""
    write_whole(path, f"{json.dumps(json_safe(value), indent=1)}\n".encode())


def read_json(path, as_object=None):
    """The content of a JSON file of any origin, with control characters in texts, or UserError.

    as_object: [(key, value)] of an object -> what stands for it; None: a dict.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, strict=False, object_pairs_hook=as_object)
    except RecursionError:
        raise UserError(f"{path}: JSON that is nested too deeply; is it the right file?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON ({one_line(error)})") from None


def read_or_warn(path):
    """The object in a JSON file; {} where there is none, with a WARNING where the file cannot be read."""
    content = {}
    if path.exists():
        try:
            content = read_json(path)
        except UserError as error:
            print(f"WARNING: {error}")
    return content if isinstance(content, dict) else {}


def write_table(path, rows):
    """CSV of a list of {column: value}, or of {column: values}; NaN and None are empty. Written whole.

    What is not ASCII begins with a byte-order mark, by which spreadsheets know UTF-8.
    """
    import pandas as pd
    table = pd.DataFrame(rows, dtype=object)  # whole numbers stay whole beside empty cells
    content = table.to_csv(index=False, lineterminator="\n")
    encoding = "utf-8" if content.isascii() else "utf-8-sig"
    write_whole(path, content.encode(encoding, errors="backslashreplace"))  # names of files may be no Unicode


def json_safe(value):
    """Plain JSON types: paths become text, arrays lists, and a number that is not finite null."""
    text = json.dumps(value, default=_json_type)
    return json.loads(text, parse_constant=lambda _: None)


def _json_type(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return sorted(value) if isinstance(value, set) else str(value)


# --- Device, seed and loaders ----------------------------------------------
# Every draw is a pure function of (seed, epoch, sample): no random state to save, any worker count agrees.

CAN_FORK = sys.platform not in ("win32", "darwin")  # the numeric libraries of macOS do not survive it


@dataclasses.dataclass
class Compute:
    """Where and how precisely the model runs: fp32, bf16 or fp16; `text` is what the user is told."""
    device: torch.device
    precision: str
    channels_last: bool
    text: str
    processes: "Processes"

    def autocast(self):
        """Mixed-precision context of the forward pass."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def send(self, tensor):
        """Tensor on the device; the copy from pinned memory is not waited for."""
        return tensor.to(self.device, non_blocking=True)

    def place(self, model):
        """Model on the device, convolutions in the memory layout that the device is fast at."""
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if self.channels_last else {}
        for parameter in model.to(self.device).parameters():
            if parameter.ndim in layouts:
                parameter.data = parameter.data.to(memory_format=layouts[parameter.ndim])
        return model


def in_fp32(tensor):
    """Context on the device of a tensor in which nothing is in mixed precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def choose_compute(device, use_amp, processes=None, fp32_on_cpu=False):
    """--device and --use_amp -> Compute. Raises UserError for a GPU that is asked for and absent.

    processes: of a run that works with several; each takes a GPU of its own on its machine.
    fp32_on_cpu: this model has no mixed precision there, whatever the flags say.
    """
    if processes is None:
        processes = launched_processes()
        if processes.size > 1:
            raise UserError(f"this command works in one process, started were {processes.size}; "
                            "start it without torchrun, or with srun --ntasks=1")
    device = _choose_device(device, processes)
    precision = fast_precision(device)
    if use_amp == "on" and precision == "fp32":
        precision = "bf16"
    if use_amp == "off" or (fp32_on_cpu and device.type == "cpu"):
        precision = "fp32"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpuinfo("model name") or platform.processor() or platform.machine()
        if torch.backends.mps.is_available():
            name += "; its GPU is untested here: --device mps tries it"
    return Compute(
        device, precision,
        channels_last=device.type != "mps",
        text=f"{device} ({name}), {precision}",
        processes=processes)


def announce_compute(args, fp32_on_cpu=False):
    """choose_compute of --device and --use_amp, which a line names: for predictions without a run folder."""
    compute = choose_compute(args.device, args.use_amp, fp32_on_cpu=fp32_on_cpu)
    print(f"device: {compute.text}")
    return compute


def _choose_device(name, processes):
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # those of a driver too old are counted
    gpus = [f"cuda:{index}" for index in range(n_gpus)]
    known = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if torch.backends.mps.is_available():
        known.append("mps")
    if name == "auto":
        name = "cuda" if gpus else "cpu"  # not mps: nobody has run these scripts there yet
    if gpus and processes.size > 1 and re.fullmatch(r"cuda(:\d+)?", name):
        name = gpus[processes.local_rank % len(gpus)]  # srun may show each process its own GPU alone
    if name not in known:
        raise UserError(
            f"--device {name}: expected auto, cpu, cuda, cuda:N or mps; this torch sees {len(gpus)} CUDA GPUs and "
            f"{known.count('mps')} Apple ones. Use --device cpu, or run verify_setup.py to see why")
    device = torch.device(name)
    if device.index is not None:  # events, and waiting for copies, are of the current GPU, which else is the first one
        torch.cuda.set_device(device)
    return device


def keep_freed_memory():
    """Have the C library of Linux keep freed memory for the next batch; it takes a little more of it.

    glibc hands blocks of many MB back to the system at once and asks for them again in every step,
    page by page: a tenth of a ResNet-18's training step on a CPU. Elsewhere nothing happens.
    """
    m_trim_threshold = -1  # malloc.h
    m_mmap_max = -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2 ** 31 - 1)


def peak_memory(device):
    """Most bytes this process has held: on the GPU, or in RAM; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fast_precision(device):
    """bf16 where the device has it in hardware, fp16 on GPUs of compute capability 7, else fp32."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16"
        if major == 7:
            return "fp16"
    if device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()):
        return "bf16"
    return "fp32"


def _cpuinfo(field):
    """First line of this field in Linux's /proc/cpuinfo, '' elsewhere."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return ""


def hash_seed(*integers):
    """Hash integers to a 63-bit seed (splitmix64 finaliser), so that neighbours share nothing."""
    mask = 0xFFFFFFFFFFFFFFFF
    state = 0
    for integer in integers:
        state = (state + integer + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def generator_for(*integers):
    """torch.Generator whose draws depend on these integers alone."""
    return torch.Generator().manual_seed(hash_seed(*integers))


@dataclasses.dataclass(eq=False)
class EpochBatches(torch.utils.data.Sampler):
    """Batches of the keys (epoch, index), by which a dataset makes and augments its samples.

    In training they are a permutation seeded by (seed, epoch), cut into batches; each process takes
    its slice of every batch, and a single leftover sample joins the batch before it, since
    BatchNorm cannot take one alone. In evaluation each process takes a block of the rows, so that
    `Processes.gather` joins the results in the order of the rows.
    """
    n_samples: int
    batch_size: int
    seed: int
    train: bool
    weights: np.ndarray | None = None  # (N,) chances of being drawn, with replacement; None: a permutation
    rank: int = 0  # of this process
    size: int = 1  # number of processes
    epoch: int = 0  # to begin with
    start: int = 0  # first batch of that epoch
    goes_on: bool = False  # True: the later epochs follow without end, so that loader workers never stop between two

    def __post_init__(self):
        first = 0
        last = self.n_samples
        if not self.train:
            first = self.n_samples * self.rank // self.size
            last = self.n_samples * (self.rank + 1) // self.size
        self.edges = [*range(first, last, self.batch_size), last]  # batch b takes the samples edges[b]:edges[b + 1]
        if self.train and self.n_samples % self.batch_size == 1 and len(self.edges) > 2:
            del self.edges[-2]

    def __len__(self):
        return len(self.edges) - 1

    def __iter__(self):
        yield from self._batches_of(self.epoch, self.start)
        if self.goes_on:
            for epoch in itertools.count(self.epoch + 1):
                yield from self._batches_of(epoch, start=0)

    def _batches_of(self, epoch, start):
        generator = generator_for(self.seed, epoch)
        if not self.train:
            order = range(self.n_samples)
        elif self.weights is None:
            order = torch.randperm(self.n_samples, generator=generator).tolist()
        else:
            weights = torch.as_tensor(self.weights)
            order = torch.multinomial(weights, self.n_samples, True, generator=generator).tolist()
        for batch in range(start, len(self)):
            span = self.own_span(batch) or self.step_span(batch, 1)[:2]
            yield [(epoch, order[position]) for position in span]

    def own_span(self, batch):
        """range of sample positions of this process's slice of a batch: for BatchNorm 2 or more where possible.

        Where none is left the range is empty, and the iteration gives samples that must count for
        nothing, so that every process takes every step.
        """
        whole = self.step_span(batch, 1)
        if not self.train:
            return whole
        least = 2 if self.batch_size >= 2 * self.size else 1
        n = len(whole)
        takers = min(self.size, max(n // least, 1))  # only the first processes; for a later rank both ends are >= n
        return whole[n * self.rank // takers:n * (self.rank + 1) // takers]

    def step_span(self, batch, accumulate):
        """range of sample positions of the optimiser step that a batch belongs to."""
        first = batch // accumulate * accumulate
        return range(self.edges[first], self.edges[min(first + accumulate, len(self))])


class Samples(torch.utils.data.Dataset):
    """Base of the scripts' datasets, with a sample for each of their `rows`.

    Without loader workers a thread for each core prepares samples, which depend on their key alone;
    decoding and warping do not hold Python's lock.
    """

    def __len__(self):
        return len(self.rows)

    @functools.cached_property
    def _threads(self):
        return concurrent.futures.ThreadPoolExecutor(cores_of_process())

    def __getitems__(self, keys):
        """Samples of a batch, for the loader."""
        if torch.utils.data.get_worker_info():
            return [self[key] for key in keys]
        return list(self._threads.map(self.__getitem__, keys))


class WatchedLoader(torch.utils.data.DataLoader):
    """A loader with a progress bar."""

    def __iter__(self):
        return iter(with_progress(f"looking at {len(self.dataset)}", super().__iter__(), len(self)))


def make_loader(dataset, args, compute, train, cached=False, weights=None, collate=None,
                batch_size=None):
    """DataLoader over EpochBatches; `cached`: samples cost little, so `auto` takes fewer workers."""
    if batch_size is None:
        batch_size = args.batch_size if train else args.val_batch_size or args.batch_size
    workers = resolve_workers(args.num_workers, cached)
    processes = compute.processes
    batches = EpochBatches(len(dataset), batch_size, args.seed, train, weights,
                           rank=processes.rank, size=processes.size)
    if train and args.dry_run:
        del batches.edges[3:]  # two batches are left
    kind = torch.utils.data.DataLoader if train else WatchedLoader  # the bar of training names the epoch
    return kind(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
        pin_memory=compute.device.type == "cuda", worker_init_fn=_guard_worker,
        persistent_workers=workers > 0, timeout=600 if workers else 0,
        multiprocessing_context="fork" if workers and CAN_FORK else None)


def count_cores():
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_of_process(env=os.environ):
    """Cores for this process alone, at least 1: each task of SLURM has its own, processes of torchrun share theirs."""
    cores = count_cores()
    if "SLURM_CPUS_PER_TASK" in env and "RANK" not in env:
        return min(cores, int(env["SLURM_CPUS_PER_TASK"]))
    return max(cores // launched_processes(env).local_size, 1)


def resolve_workers(num_workers, cached):
    """'auto' -> up to 8; 0 where none can fork, and for cached samples on two cores: the model needs both."""
    if num_workers != "auto":
        return num_workers
    cores = cores_of_process()
    if not CAN_FORK or (cached and cores <= 2):
        return 0
    return min(8, cores)


def _guard_worker(_):
    """Loader workers ignore stop signals that a scheduler sends to all; they obey their parent's TERM.

    The loader's own shutdown hangs with SIG_IGN, so they are blocked and a thread waits for them.
    """
    load_opencv()
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait():
        while True:
            info = signal.sigwaitinfo(STOP_SIGNALS)
            if info.si_signo == signal.SIGTERM and info.si_pid == parent:
                os._exit(0)
    threading.Thread(target=wait, daemon=True).start()


# --- Several processes -----------------------------------------------------
# For torchrun and srun: every process runs the whole script on its share of each batch and of each
# evaluation; the first one alone writes. One alone never touches torch.distributed.

PROCESS_TIMEOUT = datetime.timedelta(minutes=30)  # how long they wait for one another


def launched_processes(env=os.environ):
    """Processes as torchrun or an srun step describes them in the environment; else one alone."""
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a batch script has a rank, but is no step
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                 "SLURM_STEP_TASKS_PER_NODE")
    else:
        return Processes()
    given = [env.get(name, "0") for name in names]
    digits = [re.sub(r"\D.*", "", text) for text in given]  # 2(x3),1 tasks on the nodes -> 2
    if not all(digits) or int(digits[0]) >= int(digits[1]):
        raise UserError(f"{names[0]}={given[0]} and {names[1]}={given[1]} are no rank of a number "
                        "of processes; start with torchrun or srun, or unset them")
    rank, size, local_rank, local_size = map(int, digits)
    return Processes(rank, size, local_rank, max(local_size, 1))


def print_first(text):
    """Print a line; of several processes only the first one does."""
    if launched_processes().is_first:
        print(text)


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that share one run; with one of them every method is a no-op."""
    rank: int = 0  # of this one
    size: int = 1
    local_rank: int = 0  # among the local_size ones on its machine
    local_size: int = 1

    @property
    def is_first(self):
        """True for the process that alone prints and writes."""
        return self.rank == 0

    def join(self, device):
        """Meet the other processes at MASTER_ADDR and MASTER_PORT, or UserError; stop signals end the waiting.

        torchrun and train_assessor.sh set both; on one machine they may be left out.
        """
        if self.size == 1:
            return
        if self.local_size == self.size:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Imported later, as by the first optimiser, this module would take the group for its default
        # arguments and keep it, and its threads, past leave_processes().
        importlib.import_module("torch.distributed.nn.functional")
        where = ":".join(os.environ.get(name, f"(no {name})") for name in ("MASTER_ADDR", "MASTER_PORT"))
        for number in (signal.SIGINT, signal.SIGTERM):  # torch waits where no handler in Python is called
            signal.signal(number, signal.SIG_DFL)
        if self.is_first:
            print(f"process 0 of {self.size} waits for the others at {where} (started by srun? For "
                  "one process: srun -n 1, or unset SLURM_STEP_ID)")
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=PROCESS_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"process {self.rank} of {self.size} did not meet the others at {where} "
                            f"({one_line(error)}); set MASTER_ADDR to the first node, MASTER_PORT to "
                            "a free port (as train_assessor.sh does), GLOO_SOCKET_IFNAME to the network between them"
                            ) from None
        if CAN_FORK:
            # A thread of the group that lets go of its last message holds a lock of Python 3.11 for a
            # moment; a loader worker forked in that moment hangs for ever. All messages are waited
            # for, so a short rest empties it.
            os.register_at_fork(before=lambda: time.sleep(0.02))

    def on_first(self, function):
        """function() of the first process, given to all; a user error or exit there ends all alike."""
        result = error = None
        if self.is_first:
            try:
                result = function()
            except (UserError, SystemExit) as caught:
                error = caught
        try:
            result, error = self.gather([(result, error)])[0]
        except RuntimeError:  # the others have left, as on a signal to all
            if error is None:
                raise
        if error is None:
            return result
        error.said_by_first = not self.is_first
        raise error

    def gather(self, parts):
        """Lists of parts (CPU tensors, arrays, dicts of them, ...) of all processes, joined in their order."""
        if self.size == 1:
            return parts
        boxes = [None] * self.size
        dist.all_gather_object(boxes, parts)
        return list(itertools.chain(*boxes))

    def largest(self, numbers):
        """Element-wise largest of a list of integers over the processes."""
        if self.size == 1:
            return numbers
        numbers = torch.tensor(numbers)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    @torch.no_grad()
    def spread(self, model):
        """Give all processes the first one's weights and buffers (running means of BatchNorm)."""
        if self.size == 1:
            return
        for tensor in model.state_dict().values():
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def leave_processes(wait=True):
    """Part from the others, where `wait` once all have come this far; alone, nothing.

    It ends the threads of the group, one of which may abort an interpreter that ends
    (exit code 134).
    """
    if dist.is_available() and dist.is_initialized():
        if wait:
            dist.barrier()
        dist.destroy_process_group()


BUCKET_BYTES = 25 * 2 ** 20  # as DistributedDataParallel has them


class GradientExchange:
    """Adds up gradients over the processes while the backward pass is still under way.

    They travel in buckets, the last layers first, each once it is full and those before it are
    sent, so that all processes send the same in the same order. A layer without a gradient counts
    as one with the gradient 0.
    """

    def __init__(self, processes, model):
        self.is_open = False  # True in the last backward pass of an optimiser step
        self.waiting = []  # buckets that are not sent yet: lists of parameters; none where a process is alone
        self.sent = []  # (bucket, its gradients as one tensor, handle of the exchange) of those under way
        self.ready = set()  # parameters whose gradient the backward pass has given
        self.hooks = []
        if processes.size == 1:
            return
        n_bytes = BUCKET_BYTES
        for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
            if n_bytes >= BUCKET_BYTES:
                self.waiting.append([])
                n_bytes = 0
            self.waiting[-1].append(parameter)
            n_bytes += parameter.nbytes
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_is_ready))

    def _gradient_is_ready(self, parameter):
        if not self.is_open:
            return
        self.ready.add(parameter)
        while self.waiting and self.ready.issuperset(self.waiting[0]):
            self._send()

    def _send(self):
        bucket = self.waiting.pop(0)
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        message = torch.cat([parameter.grad.flatten() for parameter in bucket])
        self.sent.append((bucket, message, dist.all_reduce(message, async_op=True)))

    def finish(self, sums):
        """Wait until each gradient, and the tensor `sums`, is the sum over the processes."""
        if not self.hooks:
            return
        while self.waiting:
            self._send()
        dist.all_reduce(sums)
        for bucket, message, work in self.sent:
            work.wait()
            totals = message.split([parameter.numel() for parameter in bucket])
            for parameter, total in zip(bucket, totals):
                parameter.grad.copy_(total.view(parameter.shape))
            self.waiting.append(bucket)  # for the next step
        self.sent.clear()
        self.ready.clear()

    def close(self):
        """Take the hooks off the parameters."""
        for hook in self.hooks:
            hook.remove()


def first_process_only(function):
    """Decorator of function(run, ...): the first process does it for all, who wait for the result."""
    @functools.wraps(function)
    def wrapped(run, *args, **options):
        return run.compute.processes.on_first(lambda: function(run, *args, **options))
    return wrapped


# --- Transforms ------------------------------------------------------------
# Augmentation is drawn once and applied as one warp, one colour matrix and one erased rectangle.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = np.array([0.299, 0.587, 0.114])
HUE_TURN = np.array([  # the cross product with the grey axis: turns colours about it
    [0, -1, 1],
    [1, 0, -1],
    [-1, 1, 0]]) / math.sqrt(3)


@dataclasses.dataclass(frozen=True)
class Preset:
    """How strongly --augment changes pictures: chances from 0 to 1, and ranges as (low, high) or +- the number."""
    flip: float = 0.0
    jitter: tuple = (0, 0, 0, 0)  # brightness, contrast, saturation, hue
    rotation: float = 0  # degrees
    shear: float = 0
    scale: tuple = (1, 1)
    translate: float = 0  # parts of the output size
    area: tuple | None = None  # parts of the picture that a crop takes before it is resized; None: crops as they are
    greyscale: float = 0.0
    perspective: float = 0.0
    erase: float = 0.0
    shuffle: float = 0.0  # of the colour channels
    autocontrast: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


AUGMENTATIONS = {
    "none": Preset(),
    "light": Preset(flip=.5, jitter=(.1, .1, .1, 0)),
    "full": Preset(
        flip=.5, jitter=(.3, .3, .3, .1), rotation=15, shear=10, scale=(.9, 1.1),
        translate=.1, greyscale=.1, perspective=.3, erase=.2),
    # of a published study of calves
    "heavy": Preset(
        flip=.5, area=(.6, 1), jitter=(.5, .5, .3, .05), rotation=10,
        greyscale=.2, erase=.3, blur=.3, autocontrast=.4, shuffle=.1, noise=.2),
    # of a published study of cattle faces
    "basic": Preset(flip=.5, jitter=(.2, .2, .2, 0), rotation=10),
    "enhanced": Preset(
        flip=.5, jitter=(.3, .3, .3, .1), rotation=15, scale=(.9, 1.1),
        translate=.1, blur=.3),
}


def load_opencv():
    """OpenCV with one thread: its own threads do not survive a fork."""
    import cv2
    cv2.setNumThreads(0)
    return cv2


@dataclasses.dataclass
class Augmentation:
    """One draw of augment parameters; the defaults change nothing and crop the centre."""
    crop: tuple = (0.5, 0.5)  # x, y as parts of the free margin
    resized: tuple | None = None  # (part of the area, width / height) of a crop that is scaled to the output
    flip: bool = False
    rotation_deg: float = 0.0
    translate: tuple = (0.0, 0.0)  # x, y as parts of the output size
    scale: float = 1.0
    shear_deg: float = 0.0
    corners: tuple | None = None  # x, y clockwise from the top left, as parts of the largest inward shift
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # turns of the colour circle
    jitter_order: tuple = ("brightness", "contrast", "saturation", "hue")
    greyscale: bool = False
    erase: tuple | None = None  # (part of the area, height / width, x, y as parts of the free margin)
    channels: tuple = (0, 1, 2)  # which colour becomes R, G and B
    autocontrast: bool = False
    blur: float = 0.0  # sigma in pixels
    noise: tuple | None = None  # (sd in grey levels, seed)


def sample_augmentation(preset, generator):
    """Draw an Augmentation for a preset of AUGMENTATIONS; every draw takes 48 numbers from the torch.Generator.

    The distributions are those of torchvision: RandomCrop or RandomResizedCrop,
    RandomHorizontalFlip, RandomRotation, RandomAffine, ColorJitter, RandomGrayscale,
    RandomPerspective(.2), RandomErasing(scale=(.02, .15)), RandomAutocontrast,
    GaussianBlur(sigma=(.1, 2)).
    """
    numbers = iter(torch.rand(48, generator=generator).tolist())
    if preset == "none":
        return Augmentation()
    chosen = AUGMENTATIONS[preset]
    brightness, contrast, saturation, hue = chosen.jitter

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * next(numbers)

    def around(centre, width):
        return uniform(centre - width, centre + width)

    def log_uniform(low, high):
        return math.exp(uniform(math.log(low), math.log(high)))

    def happens(chance):
        return uniform() < chance

    def shuffled(items):
        return tuple(sorted(items, key=lambda _: next(numbers)))
    return Augmentation(  # in the order of the draws
        crop=(uniform(), uniform()),
        flip=happens(chosen.flip),
        brightness=around(1, brightness),
        contrast=around(1, contrast),
        saturation=around(1, saturation),
        jitter_order=shuffled(Augmentation.jitter_order),
        rotation_deg=around(0, chosen.rotation),
        shear_deg=around(0, chosen.shear),
        scale=uniform(*chosen.scale),
        translate=(around(0, chosen.translate), around(0, chosen.translate)),
        hue=around(0, hue),
        greyscale=happens(chosen.greyscale),
        corners=tuple(uniform() for _ in range(8)) if happens(chosen.perspective) else None,
        erase=(uniform(0.02, 0.15), log_uniform(0.3, 3.3), uniform(), uniform()) if happens(chosen.erase) else None,
        resized=(uniform(*chosen.area), log_uniform(3 / 4, 4 / 3)) if chosen.area else None,
        channels=shuffled(Augmentation.channels) if happens(chosen.shuffle) else Augmentation.channels,
        autocontrast=happens(chosen.autocontrast),
        blur=uniform(0.1, 2.0) if happens(chosen.blur) else 0.0,
        noise=(uniform(2.0, 12.0), int(uniform(0, 2 ** 31))) if happens(chosen.noise) else None)


def window_start(length, size, fraction):
    """First pixel of a window of `size` in `length`, each of the possible ones equally likely; fraction: below 1."""
    if length < size:
        raise ValueError(f"a window of {size} pixels does not fit into a picture of {length}")
    return int(fraction * (length - size + 1))


def crop_window(shape, drawn, size):
    """(left, top, width, height) in pixels of the crop that a draw takes from a picture of shape (H, W, 3)."""
    height, width, _ = shape
    x, y = drawn.crop
    if drawn.resized is None:
        return window_start(width, size, x), window_start(height, size, y), size, size
    part, ratio = drawn.resized
    area = part * height * width
    crop_width = min(math.sqrt(area * ratio), width)
    crop_height = min(math.sqrt(area / ratio), height)
    return (width - crop_width) * x, (height - crop_height) * y, crop_width, crop_height


def homography(drawn, window, size):
    """Matrix (3, 3) from picture to output, pixel centres at .5, composed of the steps in torchvision's order."""
    left, top, width, height = window
    half = size / 2
    zoom = size / np.array([width, height])
    centre = zoom * [left, top] + half  # of the crop, in pixels of the output
    mirror = -1 if drawn.flip else 1
    angle = math.radians(drawn.rotation_deg)
    cos = math.cos(angle)
    sin = math.sin(angle)
    turn = np.array([
        [cos * mirror, sin],
        [-sin * mirror, cos]])
    shear = np.array([
        [1, -math.tan(math.radians(drawn.shear_deg))],
        [0, 1]])
    linear = drawn.scale * shear @ turn
    shift = np.round(np.multiply(drawn.translate, size)) + half
    matrix = np.eye(3)
    matrix[:2, :2] = linear * zoom
    matrix[:2, 2] = shift - linear @ centre
    if drawn.corners is None:
        return matrix
    cv2 = load_opencv()
    return cv2.getPerspectiveTransform(*moved_corners(drawn.corners, size)) @ matrix


def moved_corners(corners, size):
    """Pixels that the perspective moves, clockwise from the top left, and where to: float32 (4, 2) of whole numbers."""
    unit = np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])  # x, y
    reach = int(0.2 * (size // 2)) + 1
    inward = np.floor(np.float32(corners).reshape(4, 2) * reach) * (1 - 2 * unit)  # +1 at 0, -1 at the far side
    before = (size - 1) * unit
    return before, before + inward


def _colour_matrix(drawn, mean):
    """(3, 4) matrix [M | offset] of all colour operations on RGB in 0..255; mean (3,): mean colour of the picture.

    The formulas are torchvision's, with two differences: hue is a rotation about the grey axis
    (Rodrigues), which agrees with HSV's at multiples of a third and keeps R + G + B; and values are
    cut to 0..255 once, at the end.
    """
    matrix = np.eye(3, 4)
    for name in drawn.jitter_order:
        step = np.eye(3) * getattr(drawn, name)
        shift = 0.0
        if name == "contrast":
            shift = (1 - drawn.contrast) * (LUMA @ (matrix @ np.append(mean, 1)))
        elif name == "saturation":
            step += (1 - drawn.saturation) * LUMA
        elif name == "hue":
            angle = 2 * math.pi * drawn.hue
            cos = math.cos(angle)
            step = cos * np.eye(3) + (1 - cos) / 3 + math.sin(angle) * HUE_TURN
        matrix = step @ matrix
        matrix[:, 3] += shift
    if drawn.greyscale:
        return np.tile(LUMA @ matrix, (3, 1))
    return matrix[list(drawn.channels)]


def jitter_colours(image, drawn):
    """The colour part of an Augmentation on uint8 (H, W, 3), geometry untouched."""
    cv2 = load_opencv()
    return cv2.transform(image, _colour_matrix(drawn, cv2.mean(image)[:3]))


def augment_clip(frames, drawn, size):
    """Apply one Augmentation to all frames of a clip alike: uint8 (T, H, W, 3) -> (T, size, size, 3).

    H and W at least `size`. Colour operations use means and extremes of the whole clip, so that
    nothing flickers. What the crop cut off comes back where a rotation or shift needs it; pixels
    from outside the picture are 0.
    """
    if drawn == Augmentation():
        return eval_crop(frames, size)
    cv2 = load_opencv()
    clip = warp_clip(frames, drawn, size)
    tall = jitter_colours(clip.reshape(-1, size, 3), drawn)  # (T * size, size, 3): one call for all frames
    if drawn.autocontrast:
        tall = _stretch_contrast(tall)
    clip = tall.reshape(clip.shape)
    if drawn.blur:
        clip = np.stack([cv2.GaussianBlur(frame, (0, 0), drawn.blur) for frame in clip])
    if drawn.noise:
        sd, seed = drawn.noise
        noise = np.random.default_rng(seed).normal(0, sd, clip.shape[1:]).astype(np.float32)
        clip = np.rint(clip + noise).clip(0, 255).astype(np.uint8)
    if drawn.erase:
        _erase(clip, *drawn.erase)
    return clip


def warp_clip(frames, drawn, size):
    """Geometry as one homography: uint8 (T, H, W, 3) -> (T, size, size, 3)."""
    cv2 = load_opencv()
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from pixel centres
    window = crop_window(frames.shape[1:], drawn, size)
    matrix = np.linalg.inv(half) @ homography(drawn, window, size) @ half
    clip = np.empty((len(frames), size, size, 3), np.uint8)
    for frame, warped in zip(frames, clip):
        cv2.warpPerspective(frame, matrix, (size, size), dst=warped)  # bilinear
    return clip


def _stretch_contrast(pixels):
    """Each colour of uint8 (H, W, 3) stretched to 0..255, a constant one left alone; as torchvision's autocontrast."""
    cv2 = load_opencv()
    colours = cv2.split(pixels)
    return cv2.merge([
        cv2.normalize(colour, None, 0, 255, cv2.NORM_MINMAX) if colour.min() < colour.max() else colour
        for colour in colours])


def _erase(clip, area, ratio, x, y):
    """Paint a rectangle of uint8 (T, S, S, 3) in ImageNet's mean colour, 0 after to_input; in place."""
    size = clip.shape[1]
    height = round(size * math.sqrt(area * ratio))
    width = round(size * math.sqrt(area / ratio))
    top = window_start(size, height, y)
    left = window_start(size, width, x)
    clip[:, top:top + height, left:left + width] = [round(255 * mean) for mean in IMAGENET_MEAN]


def resize_side(image_size):
    """Short side that pictures and frames are scaled to before the crop: 256 for 224."""
    return round(image_size * 8 / 7)


def eval_crop(image, size):
    """Centre crop of uint8 (..., H, W, 3) to uint8 (..., size, size, 3), a copy; H and W at least `size`."""
    left, top, _, _ = crop_window(image.shape[-3:], Augmentation(), size)
    return image[..., top:top + size, left:left + size, :].copy()


@functools.lru_cache
@torch.inference_mode(False)
def on_device(numbers, device):
    """A tuple of numbers, or of such tuples, as a float32 tensor that is copied to the device once, not every batch."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def to_input(batch, compute, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Normalise a uint8 tensor (B, H, W, 3) on the device to float32 (B, 3, H, W); channels_last costs no copy."""
    pixels = compute.send(batch).float()  # (B, H, W, 3)
    # Rows of W * 3 numbers: a last axis of length 3 would be four times slower.
    centre, spread = on_device((tuple(mean), tuple(std)), compute.device).repeat(1, batch.shape[2])
    pixels.flatten(2).sub_(255 * centre).div_(255 * spread)
    pixels = pixels.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
    return pixels if compute.channels_last else pixels.contiguous()


# --- Optimiser and schedule ------------------------------------------------
# The learning rate is a pure function of the progress of the run; only `plateau` remembers anything.

def build_optimizer(model, args, backbone=None):
    """Optimiser of what is trained; biases and normalisation layers (ndim < 2) are not decayed.

    backbone: the child module of the model whose learning rate is --backbone_lr_mult
    times that of the others.
    """
    groups = []
    for module in [model] if backbone is None else model.children():
        factor = args.backbone_lr_mult if module is backbone else 1.0
        for is_decayed, decay in ((True, args.weight_decay), (False, 0.0)):
            parameters = [p for p in module.parameters() if p.requires_grad and (p.ndim > 1) == is_decayed]
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr": args.lr * factor, "factor": factor})
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
        for group in groups:
            for parameter in group["params"]:
                # torch makes it without values in the first step, and leaves it so where that step is not taken
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, fused=True)


OPEN_SCHEDULES = ("none", "plateau", "warm_restarts")  # whose learning rate does not depend on the number of epochs


def schedule_factor(scheduler, progress, epochs, warmup_epochs):
    """Learning-rate factor in [0, 1] at `progress` epochs: linear warm-up, then what the name of the schedule says.

    warm_restarts: SGDR (Loshchilov & Hutter 2017) with T0 = 10 epochs, doubled at each restart;
    onecycle: Smith & Topin 2018, from 1/25 up to 1 over the first 30 % of the run, down to 0 over
    the rest, both along a cosine.
    """
    if progress < warmup_epochs:
        return max(progress / warmup_epochs, 1e-3)
    if scheduler == "step":
        return 0.1 ** (progress // max(1, epochs // 3))
    passed = progress - warmup_epochs
    part = passed / max(epochs - warmup_epochs, 1e-9)
    if scheduler == "cosine":
        return _cosine(part)
    if scheduler == "onecycle":
        if part < 0.3:
            return 1 - (1 - 1 / 25) * _cosine(part / 0.3)
        return _cosine((part - 0.3) / 0.7)
    if scheduler == "warm_restarts":
        length = 10.0
        while passed >= length:
            passed -= length
            length *= 2
        return _cosine(passed / length)
    return 1.0


def _cosine(part):
    """From 1 at 0 down to 0 at 1 along half a wave."""
    return 0.5 * (1 + math.cos(math.pi * part))


# --- Early stopping --------------------------------------------------------
# Counts epochs without a gain; a score that is not a number is never a gain.

@dataclasses.dataclass
class EarlyStopping:
    """Stop after `patience` epochs that beat the best score by no more than min_delta; 0 = never. Larger is better."""
    patience: int
    min_epochs: int = 0
    min_delta: float = 0.0
    reference: float = -math.inf  # the score to beat
    bad_epochs: int = 0

    def update(self, score, epoch):
        """Count one epoch (numbered from 1); True when it is time to stop."""
        if score > self.reference + self.min_delta:
            self.reference = score
            self.bad_epochs = 0
        else:
            self.bad_epochs += 1
        return self.is_over(epoch)

    def is_over(self, epoch):
        """True where the epochs up to this one are enough."""
        return 0 < self.patience <= self.bad_epochs and epoch >= self.min_epochs


# --- Checkpoints -----------------------------------------------------------
# What is written survives a kill at any moment; what is read is checked to the last byte before anything is trusted.

FORMAT = 1
PLAIN = (bool, int, float, str, type(None))  # beside dense tensors, and lists and dicts of all these
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickled magic number
SAVING_TIME = 0.1  # part of the time between two saves that the saving itself may take


class CheckpointError(UserError):
    """A checkpoint that is damaged, hostile or missing: exit code 3."""
    code = EXIT_CHECKPOINT


def to_plain_types(value):
    """Copies on the CPU of tensors, numbers, strings, lists and dicts: what weights_only loading accepts."""
    plain = _plain(value)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # wait once for all copies, which _plain only starts
    return plain


def _plain(value):
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=value.is_cuda, copy=True)
    return value if isinstance(value, PLAIN) else str(value)


def save_checkpoint(path, content, keep_previous=False):
    """Write a dict of plain types, whole or not at all, with write_whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer(), keep_previous)


def read_checkpoint(path):
    """Load a checkpoint file as plain data. Nothing in it is executed; every byte is checked (zip CRC) before use.

    Raises CheckpointError for anything but a whole, uncompressed torch zip of dense
    tensors and plain values.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path} (expected a regular file)")
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(content)
        return content
    except CheckpointError:
        raise
    except pickle.UnpicklingError:  # torch's own text advises to load with weights_only=False
        fault = "it holds more than tensors, numbers and texts: objects whose loading could run code"
    except Exception as error:  # torch and zipfile raise nearly every kind for a damaged file
        fault = f"{type(error).__name__}: {one_line(error)}"
    raise CheckpointError(f"{path} is no usable checkpoint ({fault})")


def _check_archive(path):
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with path.open("rb") as handle:
            if handle.read(64).startswith(LEGACY_TORCH):
                raise CheckpointError(
                    f"{path} is from before torch 1.6; write it anew: python -c \"import torch; "
                    f"torch.save(torch.load('{path}', weights_only=True), '{path}')\"")
        raise ValueError(f"it is {size} bytes, no zip archive")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if is_packed or sum(entry.file_size for entry in entries) > size:
            raise ValueError(f"its archive claims more than its {size} bytes hold")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the entry {damaged} is damaged")


def _check_plain(value):
    """ValueError but for a dict of dense tensors and plain values. Iterative, since nesting may be hostile."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a dict, found {type(value).__name__}")
    todo = [value]
    seen = set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            is_dense = item.layout == torch.strided and not item.is_meta and not item.is_quantized
            if not is_dense or item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor is not dense ({item.layout}, shape {tuple(item.shape)})")
        elif isinstance(item, (dict, list, tuple)):
            if id(item) in seen:
                continue
            seen.add(id(item))
            todo.extend(item)
            if isinstance(item, dict):
                todo.extend(item.values())
        elif not isinstance(item, PLAIN):
            raise ValueError(f"it holds a {type(item).__name__}")


def load_model_file(path, script=None):
    """Checkpoint of `script`, None: of the running one -> dict. UserError for another's, CheckpointError for damage."""
    content = read_checkpoint(path)
    if content.get("format") != FORMAT or "model" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this project (format {content.get('format')!r})")
    expected = script or script_name()
    if content.get("script") != expected:
        raise UserError(f"{path} was written by {content.get('script')}, expected {expected}")
    if "seen" not in content:
        raise CheckpointError(f"{path} was written by an older version of {expected}: use it with that version")
    return content


def checkpoint_files(paths):
    """Files and run folders -> checkpoint files: a folder's own best_model.pth, or those of its folds."""
    files = {}  # one that is named twice counts once
    for path in paths:
        found = [path]
        if path.is_dir():
            found = list(path.glob("best_model.pth")) or sorted(path.glob("fold_*/best_model.pth"))
        if not found:
            raise UserError(f"--checkpoint {path} holds no best_model.pth and no fold_K/best_model.pth")
        files |= {file.resolve(): file for file in found}
    return list(files.values())


@contextlib.contextmanager
def checkpoint_fields(path):
    """A field that a checkpoint lacks, or has in another form, becomes CheckpointError inside this block."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path} lacks what this version of the script stores in a checkpoint "
                              f"({type(error).__name__}: {one_line(error)}); best_model.pth is for prediction and "
                              "--init_from, last.pth for --resume") from None


def check_weights(state, source):
    """Raises CheckpointError where a state dict holds numbers that are not finite."""
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{source} holds weights that are not finite ({shorten_list(bad, 1)})")


def load_state(model, state, source):
    """Strict load_state_dict whose refusal is one sentence; NaN weights are refused too."""
    check_weights(state, source)
    versioned = model.state_dict()  # has the versions of the layers, which plain types lose and some (MNASNet) need
    versioned.clear()
    try:
        versioned.update(state)
        model.load_state_dict(versioned)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} does not fit this model: {one_line(error)}") from None


def read_last(run, folder):
    """Content of the newest usable checkpoint of a run or its fold, or of the one that --resume names; None: none yet.

    Raises CheckpointError where there are files and none of them can be used, or they are lost.
    """
    paths = [folder / "last.pth", folder / "last.pth.prev"]
    named = Path(run.args.resume)
    if named.is_file() and named.resolve().parent == folder.resolve():  # not in the other folds
        paths = [named]
    faults = []
    for path in filter(Path.exists, paths):
        try:
            content = load_model_file(path)
        except UserError as error:
            faults.append(str(error))
            run.say(f"WARNING: {error}")
            continue
        if path.suffix == ".prev":
            run.say(f"WARNING: continuing from {path.name}, the checkpoint before last.pth")
        return content
    kept = sorted(set(folder.glob("checkpoint_epoch_*.pth")) - set(paths), key=os.path.getmtime)
    # a kill may leave that of epoch 1 before there is any last.pth
    has_older = kept and kept[-1].name != "checkpoint_epoch_1.pth"
    if not faults and not has_older and not (folder / "training_history.csv").exists():
        return None
    advice = f"--resume {kept[-1]} goes on from it" if kept else "start a new run, or remove the folder of a fold"
    raise CheckpointError(f"{folder} cannot be continued: no usable checkpoint "
                          f"({'; '.join(faults) or 'last.pth is lost'}); {advice}")


# --- Training --------------------------------------------------------------
# The steps that are easy to get wrong, and a state from which a killed run repeats the same bits.

def labelled_errors(loss, predicted, target):
    """(errors, which have a label), (B, R) each, of predictions (B, R) and targets with NaN = missing.

    loss: smooth_l1, else the error is squared.
    """
    pointwise = nn.functional.smooth_l1_loss if loss == "smooth_l1" else nn.functional.mse_loss
    labelled = ~torch.isnan(target)
    # a missing target becomes the prediction: its error and its gradient are 0
    filled = torch.where(labelled, target, predicted.detach())
    return pointwise(predicted, filled, reduction="none"), labelled


class NotFinite(UserError):
    """A NaN or infinite loss or gradient, whose step is not taken, or such a score after every epoch: exit code 1."""
    code = EXIT_CRASH


@dataclasses.dataclass
class StepBatch:
    """A batch whose gradient is part of an optimiser step."""
    number: int  # in the epoch, from 1
    names: list  # of its samples in this process
    loss: torch.Tensor  # of this process


@dataclasses.dataclass
class OptimizerStep:
    """What is known of an optimiser step; the device may still be at work on it."""
    batches: list = dataclasses.field(default_factory=list)  # of StepBatch
    n_samples: int = 0  # of all processes
    names: tuple = ()  # of the losses
    sums: torch.Tensor | float = 0.0  # of each loss over the samples: of this process, of all once they are exchanged
    numbers: torch.Tensor | None = None  # the sums, and the norm of the gradient; on the CPU once copied
    copied: torch.cuda.Event | None = None


@dataclasses.dataclass
class Progress:
    """What a kill must not lose beside the states of model, optimiser and gradient scaler."""
    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the epoch after them
    sums: dict = dataclasses.field(default_factory=dict)  # name of a loss -> its sum over that epoch's samples so far
    samples: int = 0  # that these sums are made of
    history: list = dataclasses.field(default_factory=list)  # a dict for each finished epoch
    best_epoch: int | None = None

    def next_epoch(self):
        """Begin another epoch: no batches and no sums yet."""
        self.epoch += 1
        self.batch = 0
        self.sums = {}
        self.samples = 0


@dataclasses.dataclass(eq=False)
class Training:
    """The training of one model: optimiser steps, learning rate, history, best epoch, early stopping, saving, stopping.

    for epoch in training.epochs():              # the epochs still to do
        for batch in training.batches(loader):   # the batches still to do: seeds dropout, sets the learning rate
            training.step(loss)                  # scale, backward, unscale, clip, check, step, zero, save, stop
        training.end_epoch(row)                  # history, best, early stopping, checkpoints

    Several processes take every step together: gradients, means, stop signals and
    non-finite losses are those of all (docs/survival.md says where their number counts
    all the same). DistributedDataParallel is not used: it would have to be called in
    the model's place, whose methods scripts call. No step waits for the device: what
    one gave is looked at when the next one is queued.
    """
    run: Run
    model: nn.Module
    optimizer: torch.optim.Optimizer
    args: argparse.Namespace
    select: str  # history column that chooses the best epoch, or 'last'
    metadata: dict  # what predict needs beside the weights, stored in best_model.pth
    higher_is_better: bool = True
    seen: object = None  # what every checkpoint says of the rows behind it, as evidence/seen_rows.py reads it

    def __post_init__(self):
        args = self.args
        compute = self.run.compute
        self.processes = compute.processes
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        self.progress = Progress()
        # What the history decides, from which a resumed run counts it again:
        self.stopping = EarlyStopping(0 if self.select == "last" else args.patience, args.min_epochs, args.min_delta)
        self.plateau = EarlyStopping(args.plateau_patience + 1)
        self.plateau_factor = 1.0  # of the learning rate
        # What is known of the epoch under way and may be forgotten in a kill:
        self.sampler = None
        self.exchange = None
        self.started = time.perf_counter()
        self.n_samples = 0  # of all processes, since it started
        self.learning_rate = 0.0
        self.names = []  # of the samples of this batch
        self.open_step = OptimizerStep()  # that this batch is a part of
        self.stream = None  # batches of the loader, of this epoch and all after it
        self.queued = None  # OptimizerStep, the last one until it is looked at
        # Apple GPUs have no float64
        self.sum_type = torch.float32 if compute.device.type == "mps" else torch.float64
        self.saved_at = time.monotonic()
        self.saving_seconds = 0.0  # what the last save took
        # Content of a best_model.pth that waits for the next save: lost in a kill together with its epoch, which is
        # then repeated to the same bits.
        self.unwritten_best = None
        if self.processes.size > 1 and compute.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if args.compile:
            self.model.compile()  # in place: the names in checkpoints stay
        if self.run.resumed:
            self._load_last()
        self.processes.spread(self.model)

    # --- the loop -----------------------------------------------------------

    def epochs(self):
        """Numbers of the epochs that remain, from 1; stop signals are obeyed within."""
        signals = self.run.signals
        signals.armed = True
        while not self.is_done:
            yield self.progress.epoch + 1
            self._save_or_stop()
        self.stream = None  # its loader workers end
        self._save_or_stop()  # for a signal that came since, to any process
        signals.disarm()

    @property
    def is_done(self):
        """True after the last epoch, or where early stopping made it the last."""
        epoch = self.progress.epoch
        return self.stopping.is_over(epoch) or epoch >= self.args.epochs

    def batches(self, loader):
        """The batches that remain in this epoch. Model and sampler are made ready."""
        progress = self.progress
        self.sampler = sampler = loader.batch_sampler
        n_batches = len(sampler)
        if self.stream is None:
            self.run.say(f"loader: {loader.num_workers or 'no'} workers, {n_batches} batches an epoch")
            sampler.epoch = progress.epoch
            sampler.start = progress.batch
            sampler.goes_on = True
            self.stream = iter(loader)
        self.exchange = GradientExchange(self.processes, self.model)
        self.started = time.perf_counter()
        self.n_samples = 0
        self._set_learning_rate()  # also where the run was stopped after the last batch: the history needs it
        remaining = itertools.islice(self.stream, n_batches - progress.batch)
        label = f"epoch {progress.epoch + 1}/{self.args.epochs}"
        for batch in with_progress(label, remaining, n_batches, progress.batch):
            self.names = batch.get("name", [])
            self._set_learning_rate()
            self._seed_dropout()
            yield batch
        self._check_queued()
        self.exchange.close()
        self.processes.spread(self.model)  # buffers differ, and weights may on unlike processors

    def _set_learning_rate(self):
        batch = min(self.progress.batch, len(self.sampler) - 1)
        first = self.sampler.step_span(batch, self.args.accumulate).start
        passed = self.progress.epoch + first / self.sampler.n_samples  # epochs; any cut into batches gives the same
        factor = schedule_factor(self.args.scheduler, passed, self.args.epochs, self.args.warmup_epochs)
        rate = max(self.args.lr * self.plateau_factor * factor, self.args.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.learning_rate = rate

    def _seed_dropout(self):
        seed = hash_seed(self.args.seed, self.progress.epoch, self.progress.batch)
        if not self.processes.is_first:
            seed = hash_seed(seed, self.processes.rank)
        torch.manual_seed(seed)

    # --- a step -------------------------------------------------------------

    def step(self, loss, **parts):
        """Add a batch's gradient so that every sample of the optimiser step counts the same; step when it is full.

        loss: mean over this process's samples of the batch; parts: further tensors to
        average into the history. A step whose loss or gradient is not finite is not
        taken, and the next call or the end of the epoch raises NotFinite; for a
        gradient in fp16 only where no loss scale above 1 makes it finite.
        """
        sampler = self.sampler
        step = self.open_step
        batch = self.progress.batch
        is_full = (batch + 1) % self.args.accumulate == 0 or batch + 1 == len(sampler)
        own = len(sampler.own_span(batch))  # 0 in a batch too small for all processes
        step.n_samples = len(sampler.step_span(batch, self.args.accumulate))
        self.exchange.is_open = is_full
        values = torch.stack([loss, *parts.values()]).detach()
        one_or_nan = 1 + 0 * values[0]  # a loss that is not finite makes its gradient NaN
        self.scaler.scale(loss * one_or_nan * (own / step.n_samples)).backward()
        step.batches.append(StepBatch(batch + 1, self.names, values[0]))
        step.names = ("loss", *parts)
        step.sums += values.to(self.sum_type) * own
        self.n_samples += len(sampler.step_span(batch, 1))
        self.progress.batch += 1
        if is_full:
            self._step_optimizer(step)
            self._save_or_stop()

    def _step_optimizer(self, step):
        self.open_step = OptimizerStep()
        self.exchange.finish(step.sums)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # GradScaler's way to leave out a fused step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        step.numbers = torch.cat([step.sums, norm.to(self.sum_type)[None]])
        if norm.is_cuda:
            step.numbers = step.numbers.to("cpu", non_blocking=True)
            step.copied = torch.cuda.current_stream().record_event()
        self._check_queued()
        self.queued = step

    def _check_queued(self):
        """Count the step before into the means; raise NotFinite in all processes where it was not taken."""
        step = self.queued
        if step is None:
            return
        self.queued = None
        if step.copied:
            step.copied.synchronize()
        *sums, norm = step.numbers.tolist()
        if not math.isfinite(sums[0]):
            bad = [batch for batch in step.batches if not torch.isfinite(batch.loss)]
            raise self._not_finite("loss", sums[0], bad)
        # the scale of fp16 is halved after each overflow; other precisions have a scale of 1
        if not math.isfinite(norm) and self.scaler.get_scale() <= 1:
            raise self._not_finite("gradient", norm, step.batches)
        for name, total in zip(step.names, sums):
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + total
        self.progress.samples += step.n_samples

    def _not_finite(self, what, value, batches):
        """NotFinite with the numbers of these batches, and the names of their samples in all processes."""
        batches = self.processes.gather([(batch.number, batch.names) for batch in batches])
        numbers = ", ".join(map(str, sorted({number for number, _ in batches})))
        names = ", ".join(str(name) for _, own in batches for name in own)
        return NotFinite(f"the {what} is {value} in epoch {self.progress.epoch + 1}, batch {numbers} "
                         f"(samples: {names}); the last checkpoint is healthy. Try a smaller --lr, "
                         "--use_amp off, or look at these samples")

    def _save_or_stop(self):
        """Save where it is due or a stop signal has come to any process; leave on the signal."""
        is_due = self.processes.is_first and 0 < 60 * self.args.save_minutes < self._seconds_since_save()
        stop, is_due = self.processes.largest([self.run.signals.received, is_due])
        if is_due or stop:
            self._check_queued()
            self.save()
        if not stop:
            return
        self.processes.largest([0])  # the first one has saved: where one task ends, srun may end the others
        self.run.signals.leave()
        asked = signal.Signals(stop)
        fold = f" --fold {self.args.fold}" if "fold" in self.args.given else ""
        self.run.say(f"{asked.name} received: saved after epoch {self.progress.epoch} and {self.progress.batch} "
                     f"batches; continue with --resume {self.run.folder}{fold}")
        sys.exit(EXIT_INTERRUPT if asked == signal.SIGINT else EXIT_SAVED)

    # --- the end of an epoch ------------------------------------------------

    def epoch_means(self):
        """Means over the samples of this epoch of every part given to step(): {'train_loss': ...}."""
        progress = self.progress
        return {f"train_{name}": total / progress.samples for name, total in progress.sums.items()}

    def end_epoch(self, row):
        """Close an epoch: its history row, the best model, early stopping, and the checkpoints that are due."""
        progress = self.progress
        numbers = self.processes.on_first(lambda: row)  # those of one, by which all decide alike
        progress.history.append(
            {"epoch": progress.epoch + 1, "learning_rate": self.learning_rate, **numbers})
        progress.next_epoch()
        progress.best_epoch = next(iter(self._best_epochs()), None)
        is_best = progress.best_epoch == progress.epoch
        self._count_patience(progress.epoch)
        if self.processes.is_first:
            self.run.watch(progress.history[-1])
            if is_best:
                self.unwritten_best = self.model_file()
            self._save_epoch()
        self._report(numbers, is_best)

    def _best_epochs(self):
        """Numbers of the epochs with a score, the best first and the first of equals before the others."""
        epochs = [epoch for epoch in range(1, self.progress.epoch + 1) if self._score_of(epoch) > -math.inf]
        return sorted(epochs, key=self._score_of, reverse=True)

    def _score_of(self, epoch):
        """Larger is better: the epoch's number for 'last' and in a dry run, -inf for NaN."""
        if self.select == "last" or self.args.dry_run:
            return float(epoch)
        score = self.progress.history[epoch - 1][self.select]
        if not math.isfinite(score):
            return -math.inf
        return score if self.higher_is_better else -score

    def _count_patience(self, epoch):
        """Count an epoch for early stopping, and halve the learning rate where it is one too many on a plateau."""
        score = self._score_of(epoch)
        self.stopping.update(score, epoch)
        gain = -self.progress.history[epoch - 1]["train_loss"] if self.select == "last" else score
        if self.args.scheduler == "plateau" and self.plateau.update(gain, epoch):
            self.plateau_factor *= 0.5
            self.plateau.bad_epochs = 0

    def _report(self, numbers, is_best):
        """The epoch on a line: the number that chooses, and the first two others."""
        progress = self.progress
        seconds = time.perf_counter() - self.started
        memory = peak_memory(self.run.compute.device)
        peak = f"peak {memory / 1e9:.2f} GB, " if memory else ""
        left = seconds * (self.args.epochs * (1 + self.run.folds_after) - progress.epoch)
        # a model that is solved has seen none
        rate = f"{self.n_samples / seconds:.1f} samples/s, " if self.n_samples else ""
        end = f"({seconds:.2f} s, {rate}{peak}{left / 60:.0f} min left){' *' if is_best else ''}"
        chosen_first = sorted(numbers, key=lambda name: name != self.select)
        shown = "".join(f"  {name} {numbers[name]:.4g}" for name in chosen_first[:3])
        self.run.say(f"epoch {progress.epoch}/{self.args.epochs}{shown}  {end}")
        self._say_stopped_early()

    def _say_stopped_early(self):
        epoch = self.progress.epoch
        if self.is_done and epoch < self.args.epochs:
            self.run.say(f"stopped early after epoch {epoch}: no better {self.select} for "
                         f"{self.stopping.bad_epochs} epochs; only a new run trains on, with "
                         f"--init_from {self.run.path('best_model.pth')}")

    # --- saving and loading -------------------------------------------------

    def _seconds_since_save(self):
        return time.monotonic() - self.saved_at

    def save(self):
        """Write what a run continues from at this moment; the last.pth of before becomes last.pth.prev."""
        if not self.processes.is_first:
            return
        start = time.monotonic()
        # best first: a kill between the two repeats the epoch and writes the same best again
        if self.unwritten_best:
            save_checkpoint(self.run.path("best_model.pth"), self.unwritten_best)
            self.unwritten_best = None
        save_checkpoint(self.run.path("last.pth"), self._last_file(), keep_previous=True)
        self._write_history()
        self.saved_at = time.monotonic()
        self.saving_seconds = self.saved_at - start

    def _write_history(self):
        """training_history.csv, once there is a row."""
        if self.progress.history:
            write_table(self.run.path("training_history.csv"), self.progress.history)

    def _last_file(self):
        """Content of last.pth at this moment."""
        return self._file(
            progress=self.progress, optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def _save_epoch(self):
        """Write what is asked for at the end of this epoch, and the checkpoint if there is time."""
        epoch = self.progress.epoch
        args = self.args
        is_asked_for = args.save_every > 0 and epoch % args.save_every == 0
        if is_asked_for:
            save_checkpoint(self.run.path(f"checkpoint_epoch_{epoch}.pth"), self._last_file())
        if args.save_top_k:
            self._save_top()
        has_time = self.saving_seconds <= SAVING_TIME * self._seconds_since_save()
        if is_asked_for or args.save_top_k or self.is_done or has_time:
            self.save()

    def _save_top(self):
        """Keep top_epoch_N_NAME_SCORE.pth of the save_top_k best epochs."""
        best = [self._top_file(epoch) for epoch in self._best_epochs()[:self.args.save_top_k]]
        newest = self._top_file(self.progress.epoch)
        if newest in best:
            save_checkpoint(newest, self.model_file())
        for path in set(self.run.folder.glob("top_epoch_*.pth")) - set(best):
            path.unlink()

    def _top_file(self, epoch):
        score = "" if self.select == "last" else f"_{self.select}_{self.progress.history[epoch - 1][self.select]:.4g}"
        name = f"top_epoch_{epoch}{score}".replace("/", "_")  # of a class ear/tail
        return self.run.path(f"{name}.pth")

    def model_file(self):
        """Content of best_model.pth for the epoch that has just ended."""
        progress = self.progress
        return self._file(epoch=progress.epoch, metric=self.select, history=progress.history[-1], **self.metadata)

    def _file(self, **fields):
        """Content of a checkpoint with these fields."""
        return to_plain_types({"format": FORMAT, "script": script_name(), "model": self.model.state_dict(),
                               "seen": self.seen, **fields})

    def load_best(self):
        """Give the model the weights of the best epoch; returns all that best_model.pth holds.

        Raises NotFinite where no epoch has a score, CheckpointError where the file
        holds another epoch.
        """
        if not self.progress.best_epoch:
            raise NotFinite(f"{self.select} is a number after none of the {self.progress.epoch} epochs. Look at the "
                            "validation part (one class, equal ratings?), choose by another column "
                            "(--select) or by none (--select last)")
        best = load_model_file(self.run.path("best_model.pth"))
        if best["history"]["epoch"] != self.progress.best_epoch:  # best["epoch"] is 0 where a script kept none
            raise CheckpointError(
                f"{self.run.folder}: the best epoch is {self.progress.best_epoch}, but best_model.pth is of epoch "
                f"{best['history']['epoch']}, from before --resume of an older checkpoint, and not repeated since. "
                "Start a new run; with --deterministic GPUs too repeat epochs exactly")
        load_state(self.model, best["model"], "best_model.pth")
        return best

    def save_model(self, content, name="best_model.pth"):
        """Write a model file with the weights as they are now; content: what load_best gave and what has come to it."""
        self.processes.on_first(lambda: save_checkpoint(
            self.run.path(name), to_plain_types(content | {"model": self.model.state_dict()})))

    def _load_last(self):
        content = read_last(self.run, self.run.folder)
        if content is None:
            return
        with checkpoint_fields(self.run.folder):
            load_state(self.model, content["model"], "last.pth")
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.progress = progress = Progress(**{name: content["progress"][name] for name in vars(self.progress)})
            for epoch in range(1, progress.epoch + 1):
                self._count_patience(epoch)
        if progress.best_epoch:
            try:
                load_model_file(self.run.path("best_model.pth"))
            except CheckpointError as error:
                raise CheckpointError(f"{error}; it held the best epoch: put back a copy, or start a new run") from None
        self._write_history()  # a kill after the last save may have cost its last row
        self.run.say(f"continuing after epoch {progress.epoch} and {progress.batch} batches")
        self._say_stopped_early()


# --- Metrics ---------------------------------------------------------------
# Of ratings and other numbers, in their unit, on the whole split at once; see evidence/class_scores.py for classes.

REGRESSION_METRICS = ("pearson_r", "r2", "mae", "mse", "rmse")


def regression_moments(predicted, target):
    """(8, N, R) terms whose sums over rows give every regression metric: 1, p, t, pp, tt, pt, |p - t|, (p - t)^2.

    predicted, target: (N, R), NaN in target = missing (zero in all eight terms). p and t are taken
    about their means, which changes neither r nor R2 and keeps the digits of large offsets.
    """
    predicted = np.asarray(predicted, np.float64)
    target = np.asarray(target, np.float64)
    if predicted.shape != target.shape or target.ndim != 2:
        raise ValueError(f"expected two arrays of one shape (N, R), got {predicted.shape} and {target.shape}")
    labelled = ~np.isnan(target)
    count = np.maximum(labelled.sum(0), 1)
    p = np.where(labelled, predicted, 0.0)
    t = np.where(labelled, target, 0.0)
    error = p - t
    p = (p - p.sum(0) / count) * labelled
    t = (t - t.sum(0) / count) * labelled
    return np.stack([
        labelled, p, t,
        p * p, t * t, p * t,
        np.abs(error), error ** 2])  # (8, N, R)


def undefined_is_nan():
    """Context in which 0 / 0 is NaN, without a warning."""
    return np.errstate(divide="ignore", invalid="ignore")


def metrics_from_sums(sums):
    """Metrics from summed regression_moments: (..., 8, R) -> dict of name -> (..., R) float64.

    n = 0: all NaN; constant target, as with n = 1: r and R2 NaN; constant prediction: r = 0. R2 = 1
    - SSE / SST about the mean of these same rows.
    """
    n, p, t, pp, tt, pt, absolute, squared = np.moveaxis(sums, -2, 0)
    with undefined_is_nan():
        spread_p = pp - p * p / n
        spread_t = tt - t * t / n
        joint = pt - p * t / n
        # 1e-12 of the raw sum is the rounding that a subtraction of equal sums leaves behind
        defined = spread_t > 1e-12 * tt
        correlation = np.where(spread_p <= 1e-12 * pp, 0.0, joint / np.sqrt(spread_p * spread_t))
        mse = squared / n
        return {"pearson_r": np.where(defined, np.clip(correlation, -1.0, 1.0), np.nan),
                "r2": np.where(defined, 1.0 - squared / spread_t, np.nan),
                "mae": absolute / n,
                "mse": mse,
                "rmse": np.sqrt(mse)}


def regression_metrics(predicted, target):
    """Per-target metrics: (N, R), (N, R) with NaN = missing -> dict of n, pearson_r, r2, mae, mse, rmse, each (R,)."""
    sums = regression_moments(predicted, target).sum(1)
    return {"n": sums[0].astype(np.int64), **metrics_from_sums(sums)}


def mean_metrics(predicted, target):
    """Means of the regression_metrics over the targets, undefined ones left out: {name: number}."""
    per_target = regression_metrics(predicted, target)
    return {name: float(mean_without_nan(per_target[name])) for name in REGRESSION_METRICS}


def mean_without_nan(values, axis=-1):
    """Mean over one axis without NaN; NaN where nothing is left (np.nanmean warns there)."""
    with undefined_is_nan():
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def sd_without_nan(values):
    """Standard deviations over the first axis without NaN."""
    centred = values - mean_without_nan(values, axis=0)
    return np.sqrt(mean_without_nan(centred ** 2, axis=0))
