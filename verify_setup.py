"""Check that this machine and these data are ready. One row per check: OK, WARN, FAIL or SKIP, then what to do.

    python verify_setup.py
    python verify_setup.py --quick --task assessor --images_dir ./images --ratings_file ./ratings/table.csv
    python verify_setup.py --quick --task detector --images_dir ./images --json annotations.json
    python verify_setup.py --quick --task video --manifest events.csv --video_root videos
    python verify_setup.py --download_weights resnet50 vit_b_16      # on a machine with internet

Without --images_dir and --ratings_file the data are ./images with the table in ./ratings, else ./sample_data, else
temporary sample data; without --manifest ./sample_data, else temporary sample data. Writes only to a temporary folder
and, with --download_weights, to the weights cache.
Exit code 1 if any row says FAIL, else 0. Packages are imported where used, so the table appears without torch too.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
TASKS = ("assessor", "video", "detector", "dreamer")
PUBLISHED_TABLE = "per_image_Slider_mean_sd_from_wide.csv"
SAMPLE_IMAGES = Path("assessor/images")
SAMPLE_TABLE = Path("assessor/ratings") / PUBLISHED_TABLE
# Flags of a dry run; paths are relative to the output folder of make_sample_data.py.
SAMPLE_EVENTS = {"--manifest": Path("video/manifests/all.csv"), "--video_root": Path("video/videos"),
                 "--label_map": Path("video/manifests/label_map.json")}
DRY_RUN_FLAGS = {"assessor": ["--images_dir", SAMPLE_IMAGES, "--ratings_file", SAMPLE_TABLE, "--no_pretrained",
                              "--backbone", "resnet18", "--image_size", "64"],
                 "detector": ["--train_json", "detector/annotations.json", "--train_images", "detector/images",
                              "--split_ratio", "0.7", "--group_column", "street", "--no_pretrained", "--min_size",
                              "64", "--max_size", "96", "--num_workers", "0", "--model", "fasterrcnn_resnet18_fpn"],
                 "dreamer": ["--data_dir", "dreamer", "--patient_map", "dreamer/patient_map.json", "--no_pretrained",
                             "--encoder", "resnet18", "--image_size", "64", "--token_type", "spatial",
                             "--d_model", "48"],
                 "video": [*itertools.chain(*SAMPLE_EVENTS.items()), "--model", "cnn_lstm", "--no_pretrained",
                           "--image_size", "32", "--n_frames", "4"]}
WEIGHTS = {"assessor": "resnet18 resnet34 resnet50 resnet101 efficientnet_b0 efficientnet_b3 vit_b_16".split(),
           "detector": ["resnet18", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2",
                        "fasterrcnn_mobilenet_v3_large_320_fpn"], "dreamer": ["resnet34", "resnet18"],
           "video": ["r3d_18", "resnet18"]}
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
MODULES = {"pillow": "PIL", "opencv-python": "cv2", "PyYAML": "yaml"}  # packages whose module has another name
IMPORT_REMEDIES = {
    "cv2": "where system libraries are missing: apt install libgl1 libglib2.0-0, or without root: pip uninstall "
           "opencv-python; pip install --force-reinstall opencv-python-headless",
    "torchvision": "its release may not match that of torch: pip install --upgrade torch torchvision"}
GIB = 1 << 30
Check = collections.namedtuple("Check", "status name found remedy", defaults=("",))


# --- Python and packages: standard library only --------------------------------

def version_numbers(text):
    """'2.14.1+cu130' -> (2, 14, 1): the leading numbers, for comparison."""
    return tuple(int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number)


def read_requirements(path):
    """requirements file -> {package: lowest version, '' for any}. Raises ValueError for any other line."""
    required = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        found = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s*(?:>=\s*([\d.]+))?", line)
        if line and not found:
            raise ValueError(f"{path}: expected `package` or `package>=version`, found {line!r}")
        if found:
            required[found[1]] = found[2] or ""
    return required


def installed_version(package):
    """(name, version) of a package, (name, None) if absent; any build of OpenCV counts as opencv-python."""
    for name in OPENCV if package == "opencv-python" else (package,):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    return package, None


def unmet_requirements(paths):
    """['torch 2.9.1 (needs 2.10 or newer)', 'tqdm is missing', ...] for requirements files; nothing is imported."""
    unmet = []
    for package, lowest in (item for path in paths for item in read_requirements(path).items()):
        name, version = installed_version(package)
        if version is None:
            unmet.append(f"{name} is missing")
        elif version_numbers(version) < version_numbers(lowest):
            unmet.append(f"{name} {version} (needs {lowest} or newer)")
    return unmet


def check_installation():
    """Python, the packages' versions against requirements.txt, then whether each loads."""
    old = sys.version_info < (3, 10)
    yield Check("FAIL" if old else "OK", "Python", f"{sys.version.split()[0]} in {sys.prefix}",
                "create the environment with Python 3.10 or newer" if old else "")
    unmet = unmet_requirements([REQUIREMENTS])
    for fault in unmet:
        yield Check("FAIL", "packages", fault, f"{sys.executable} -m pip install -r {REQUIREMENTS}")
    if not unmet:
        required = read_requirements(REQUIREMENTS)
        yield Check("OK", "packages", ", ".join(" ".join(installed_version(package)) for package in required))
        yield from check_imports(MODULES.get(package, package) for package in required)


def check_imports(modules):
    """Import each module; one row for each that does not load."""
    faults = []
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            remedy = IMPORT_REMEDIES.get(module, f"pip install --force-reinstall {module}, or create a new environment")
            faults.append(Check("FAIL", f"import {module}", " ".join(str(error).split()), remedy))
    yield from faults or [Check("OK", "imports", "every package loads")]


# --- the machine ---------------------------------------------------------------

def check_processor():
    """Processor, and whether bf16 is fast on it."""
    import common
    import torch
    compute = common.choose_compute("cpu", "auto")
    yield Check("OK", "processor", f"{compute.text}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
                f"{'fast' if compute.precision == 'bf16' else 'no fast'} bf16")


def check_gpu():
    """One row for each GPU, or why there is none."""
    import torch
    if torch.cuda.is_available():
        yield from map(gpu_row, range(torch.cuda.device_count()))
    elif shutil.which("nvidia-smi"):
        yield Check("WARN", "GPU", f"nvidia-smi exists, but torch {torch.__version__} sees no GPU",
                    f"check that it lists a card and CUDA {torch.version.cuda} or newer; SLURM: --gres=gpu:1")
    else:
        apple = torch.backends.mps.is_available()
        yield Check("OK", "GPU", "Apple GPU (mps), untested: the CPU is used unless --device mps" if apple
                    else "none: everything runs on the CPU")


def gpu_row(index):
    """Name, memory and bf16 of CUDA device number `index`, and whether this torch build computes on it."""
    import torch
    facts = torch.cuda.get_device_properties(index)
    found = (f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {'bf16' if facts.major >= 8 else 'no bf16'}, "
             f"compute capability {facts.major}.{facts.minor}")
    try:
        torch.ones(8, 8, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:  # no kernels for this card
        reason = str(error).splitlines()[0]
        return Check("WARN", f"GPU {index}", f"{found}; torch {torch.__version__} cannot compute on it: {reason}",
                     "a new card: pip install --upgrade torch torchvision; an old one: pip install --force-reinstall "
                     "torch torchvision --index-url https://download.pytorch.org/whl/cu126; or run with --device cpu")
    return Check("OK", f"GPU {index}", found)


def check_minimum(name, value, fail_below, warn_below, found, remedy):
    """Check of a value that should not be small."""
    if value >= warn_below:
        return Check("OK", name, found)
    return Check("FAIL" if value < fail_below else "WARN", name, found, remedy)


def check_space(output_dir):
    """Free space where runs are written and in shared memory, and the number of files a process may open."""
    folder = Path(output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / GIB
    yield check_minimum("disk", free, 1, 10, f"{free:.1f} GiB free for {output_dir}",
                        "free some space or use another --output_dir")
    if Path("/dev/shm").is_dir():  # loader processes pass batches through it
        free = shutil.disk_usage("/dev/shm").free / GIB
        yield check_minimum("/dev/shm", free, 0, 1, f"{free:.1f} GiB free",
                            "start the container with --shm-size=8g, or use --num_workers 0")
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = math.inf if files == resource.RLIM_INFINITY else files
        yield check_minimum("open files", files, 0, 1024, f"ulimit -n {files}", "run ulimit -n 4096 before training")


def check_model(tasks):
    """Run a small backbone with random weights once; list the published weights that are not in the cache."""
    import common
    import torch
    backbone, width = common.build_backbone("resnet18", pretrained=False)
    shape = tuple(backbone.eval()(torch.zeros(1, 3, 224, 224)).shape)
    yield Check("OK" if shape == (1, width) else "FAIL", "model", f"resnet18 returns features of shape {shape}")
    names = dict.fromkeys(name for task in tasks for name in WEIGHTS.get(task, ()))
    missing = [name for name in names if not common.cached_weights_file(name)[0].exists()]
    yield warn_if_any("weights not cached", missing, "downloaded at first use; without internet, first run on a "
                      "machine with it: python verify_setup.py --download_weights NAME")


def download_weights(names):
    """Fill the weights cache: a line before and a row after each file, which is loaded once as a check."""
    import common
    import torchvision
    unknown = [name for name in names if name not in torchvision.models.list_models()]
    if unknown:
        raise common.UserError(f"torchvision has no model {', '.join(unknown)}")
    socket.setdefaulttimeout(30)  # fail instead of waiting behind a firewall that drops requests
    for name in names:
        path, url = common.cached_weights_file(name)
        print(f"{'reading' if path.exists() else f'downloading {url} to'} {path}", flush=True)
        try:
            common.published_weights(name)
        except common.UserError as error:
            remedy = f"remove {path}" if path.exists() else f"download {url} on another machine and copy it to {path}"
            yield Check("FAIL", name, str(error), remedy)
        else:
            yield Check("OK", name, f"{path.stat().st_size / 1e6:.0f} MB in {path}")


# --- the data ------------------------------------------------------------------

@functools.cache
def make_sample(task, folder):
    """Run make_sample_data.py once; returns the folder. Raises UserError with the end of its output where it fails."""
    import common
    command = [sys.executable, HERE / "make_sample_data.py", "--task", task, "--output_dir", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise common.UserError(f"make_sample_data.py --task {task} failed: {result.stderr.strip()[-300:]}")
    return Path(folder)


def find_assessor_data(args, temporary):
    """(images folder, ratings table): the flags, else ./images with the table in ./ratings, else sample data."""
    import common
    if bool(args.images_dir) != bool(args.ratings_file):
        raise common.UserError(f"--images_dir needs --ratings_file; found {args.images_dir or args.ratings_file} alone")
    if args.images_dir:
        return args.images_dir, args.ratings_file
    tables = sorted(Path("ratings").glob("*.csv")) if Path("images").is_dir() else []
    tables = [path for path in tables if path.name == PUBLISHED_TABLE] or tables
    if len(tables) > 1:
        raise common.UserError(
            f"{len(tables)} tables in ./ratings: {common.shorten_list(tables)}; name one with --ratings_file")
    if tables:
        return Path("images"), tables[0]
    made = Path("sample_data")
    made = made if (made / SAMPLE_TABLE).exists() else make_sample("assessor", temporary)
    return made / SAMPLE_IMAGES, made / SAMPLE_TABLE


def check_assessor(args, temporary):
    """Audit of a ratings table and its images: rows without image, images without row."""
    import common
    from readers import file_names
    images_dir, path = find_assessor_data(args, temporary)
    yield Check("OK", "data", f"{images_dir}, {path}")
    ratings = yield from check_table(path, args)
    paths, without_row, _ = file_names.match_images(ratings.images, images_dir)
    without_file = [name for name, image in zip(ratings.images, paths) if image is None]
    for what, names in (("rows without image", without_file), ("images without row", without_row)):
        yield warn_if_any(what, names, "they will be skipped")
    if len(without_file) == len(paths):
        raise common.UserError(f"no row of {path} has an image in {images_dir}; check --image_column")
    yield from check_images([image for image in paths if image is not None])


def check_table(path, args):
    """Rows, targets, missing cells and repeated images; returns the RatingsTable."""
    import common
    import numpy as np

    from readers import rating_tables
    ratings = rating_tables.read_ratings(path, args.image_column, args.target_columns, duplicates="mean")
    also = " and ".join(name for name in ("sd", "n") if getattr(ratings, name) is not None) or "neither sd nor n"
    yield Check("OK", "ratings", f"{len(ratings.images)} images; {len(ratings.names)} ratings with {also}, means "
                f"{np.nanmin(ratings.mean):g} to {np.nanmax(ratings.mean):g}: {', '.join(ratings.names)}")
    for note in ratings.notes:
        yield Check("OK", "note", note)
    counts = np.isnan(ratings.mean).sum(axis=0)
    gaps = [f"{name} lacks {count} of {len(ratings.images)}" for name, count in zip(ratings.names, counts) if count]
    yield warn_if_any("missing cells", gaps, "the loss ignores them")
    if args.duplicates == "error":
        try:
            rating_tables.read_ratings(path, args.image_column, args.target_columns)
            yield Check("OK", "repeated rows", "none")
        except common.UserError as error:
            yield Check("FAIL", "repeated rows", str(error))
    return ratings


def check_images(paths):
    """Decode every picture: the speed, unreadable ones by name and reason, identical ones."""
    from readers import picture_files
    start = time.perf_counter()
    first = [picture_files.audit_image(path, 256)[0] for path in paths[:32]]
    speed = len(first) / (time.perf_counter() - start)
    yield Check("OK", "loading", f"{len(first)} pictures to a short side of 256 px: {speed:.0f} a second")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        audits = first + list(pool.map(lambda path: picture_files.audit_image(path, 256)[0], paths[32:]))
    bad = "".join(f"\n{audit.path}: {audit.error}" for audit in audits if audit.error)
    yield Check("FAIL" if bad else "OK", "unreadable images", f"{bad.count(chr(10))} of {len(paths)}{bad}",
                "fix or remove them, or train with --on_bad_file skip" if bad else "")
    same = collections.defaultdict(list)
    for audit in audits:
        same[audit.pixel_sha or audit.path].append(Path(audit.path).name)
    twins = [" = ".join(names) for names in same.values() if len(names) > 1]
    yield warn_if_any("identical images", twins, "a split between them would leak: keep one of each")


def find_dreamer_data(args, temporary):
    """(folder of transitions, patient map or None): the flags, else ./data/processed, else sample data."""
    if args.data_dir or Path("data/processed").is_dir():
        return args.data_dir or Path("data/processed"), args.patient_map
    made = Path("sample_data/dreamer")
    made = made if made.is_dir() else make_sample("dreamer", temporary) / "dreamer"
    return made, made / "patient_map.json"


def run_audit(script, *flags):
    """Run --mode audit of a script, which knows its formats. Raises UserError with what it could not read."""
    import common
    result = subprocess.run([sys.executable, HERE / script, "--mode", "audit", *flags], capture_output=True, text=True,
                            timeout=900)
    if result.returncode:
        raise common.UserError(f"{result.stderr.strip()[-1000:].removeprefix('error: ')}")


def check_dreamer(args, temporary):
    """Audit of transitions, by train_dreamer.py --mode audit."""
    import common
    folder, patient_map = find_dreamer_data(args, temporary)
    yield Check("OK", "data", str(folder))
    output = Path(temporary) / "audit"
    run_audit("train_dreamer.py", "--data_dir", folder, "--output_dir", output,
              *(["--patient_map", patient_map] if patient_map else []))
    for check in common.read_json(next(output.glob("run_*")) / "audit.json")["checks"]:
        yield Check(**check)


def check_video(args, temporary):
    """Audit of a manifest and its videos, by train_video.py --mode audit: each file is decoded to its end."""
    import common
    given = {f"--{name}": getattr(args, name) for name in ("manifest", "video_root", "label_map")}
    if given["--label_map"] and not given["--manifest"]:
        raise common.UserError(f"--label_map {args.label_map} needs --manifest")
    if not (given["--manifest"] or given["--video_root"]):
        made = Path("sample_data")
        made = made if (made / SAMPLE_EVENTS["--manifest"]).exists() else make_sample("video", temporary)
        given = {flag: made / path for flag, path in SAMPLE_EVENTS.items()}
    flags = [*itertools.chain(*((flag, path) for flag, path in given.items() if path)),
             *(["--group_column", args.group_column] if args.group_column else []),
             "--task", "regress" if args.scores else "classify"]
    yield Check("OK", "data", " ".join(str(path) for path in given.values() if path))
    output = Path(temporary) / "audit.json"
    start = time.perf_counter()
    run_audit("train_video.py", "--output", output, *flags)
    report = json.loads(output.read_text(encoding="utf-8"))
    [part] = report["parts"].values()
    yield Check("OK", "clips", f"{part['rows']} of {part['videos']} videos, {part['events']} events, "
                f"{'no' if part['groups'] is None else part['groups']} groups; "
                f"{', '.join(f'{name} {n}' for name, n in part['classes'].items()) or 'scores'}; read in "
                f"{time.perf_counter() - start:.0f} s")
    yield from video_problems(report)


def video_problems(report):
    """One row for each kind of problem that the audit found in videos and windows."""
    bad = "".join(f"\n{path}: {error}" for path, error in report["unreadable"].items())
    yield Check("FAIL" if bad else "OK", "unreadable videos", f"{len(report['unreadable'])}{bad}",
                "fix or remove them, or train with a larger --max_missing" if bad else "")
    damaged = [f"{path}: {damage}" for path, damage in report["damaged"].items()]
    yield warn_if_any("damaged videos", damaged, "copy them again; a damaged file stays so, and its rows are used")
    skipped = [f"{row['row']} ({row['reason']})" for row in report["skipped"]]
    yield warn_if_any("rows left out", skipped, "correct them in the manifest")
    [part] = report["parts"].values()
    [within] = report["within"].values()
    problems = (
        ("windows past the end", report["windows_past_the_end"]["past"], "correct their offsets"),
        ("identical clips", within["exact_duplicates"], "a split between them would leak: keep one of each"),
        ("overlapping windows", within["overlapping_windows"], "split by video or group"),
        ("events of two labels", part["events_with_two_labels"], "one of the labels is wrong"))
    for what, found, remedy in problems:
        count = found["count"]
        examples = found["examples"]
        if not count:
            yield Check("OK", what, "none")
            continue
        more = f" and {count - len(examples)} more" if count > len(examples) else ""
        yield Check("WARN", what, f"{count}: {', '.join(examples)}{more}", remedy)


def warn_if_any(what, names, remedy):
    """WARN with the number and the first of `names`, OK where there are none."""
    import common
    if not names:
        return Check("OK", what, "none")
    return Check("WARN", what, f"{len(names)}: {common.shorten_list(names, 10)}", remedy)


def check_dry_run(task, temporary):
    """Run the train script on sample data: 2 batches, 1 epoch, the whole run folder."""
    import common
    sample = make_sample(task, temporary)
    command = [sys.executable, HERE / f"train_{task}.py", "--dry_run", "--output_dir", "outputs", *DRY_RUN_FLAGS[task]]
    start = time.perf_counter()
    result = subprocess.run(command, cwd=sample, capture_output=True, text=True, timeout=900)
    if result.returncode:
        raise common.UserError(f"exit code {result.returncode} on sample data: {result.stderr.strip()[-300:]}")
    yield Check("OK", f"dry run {task}", f"on sample data, {time.perf_counter() - start:.0f} s")


def check_detector(args, temporary):
    """Audit of part annotations and their pictures, by train_detector.py --mode audit."""
    import common
    if bool(args.json) != bool(args.images_dir):
        raise common.UserError(f"--json needs --images_dir; found {args.json or args.images_dir} alone")
    made = None if args.json else make_sample("detector", temporary) / "detector"
    path, images_dir = (args.json, args.images_dir) if args.json else (made / "annotations.json", made / "images")
    yield Check("OK", "data", f"{images_dir}, {path}")
    found = Path(temporary) / "audit.json"
    run_audit("train_detector.py", "--json", path, "--images_dir", images_dir, "--min_size", "128", "--output", found)
    audit = common.read_json(found)
    parts = audit["parts"]
    totals = [f"{sum(row[name] for row in parts)} {name}" for name in parts[0] if name != "part"]
    yield Check("OK", "annotations", f"{audit['pictures']} pictures, {len(parts)} parts; {', '.join(totals)}")
    for note in audit["notes"]:
        yield Check("OK", "note", note)
    skipped = [": ".join(each.values()) for each in audit["skipped"]]
    yield warn_if_any("skipped", skipped, "they are left out of training and listed in skipped.csv of the run")
    yield Check("WARN" if audit["copies"]["exact_duplicates"] else "OK", "identical images",
                f"{audit['copies']['exact_duplicates']}, and {audit['copies']['near_duplicates']} near duplicates")


AUDITS = {"assessor": check_assessor, "video": check_video, "detector": check_detector, "dreamer": check_dreamer}


# --- the table -----------------------------------------------------------------

def parse_args(argv=None):
    """Command line; dashes within a flag are read as underscores."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = re.sub(r"(?<=\w)-", "_", flag)
        words.append(flag + equals + value)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=(*TASKS, "all"), default="all", help="whose data, dry run and weights are checked")
    add("--quick", action="store_true", help="skip the dry runs: seconds instead of minutes")
    add("--images_dir", type=Path, help="folder of images (assessor: default ./images)")
    add("--json", type=Path, help="detector: part annotations or COCO of the pictures in --images_dir")
    add("--ratings_file", type=Path, help="assessor: ratings table (default: the one in ./ratings)")
    add("--image_column", help="assessor: column of the image names, where it is not recognised")
    add("--target_columns", nargs="+", metavar="NAME", help="assessor: ratings to predict (default: all)")
    add("--duplicates", choices=("error", "mean"), default="error", help="assessor: repeated rows fail or are averaged")
    add("--data_dir", type=Path, help="dreamer: folder of transitions (default: ./data/processed)")
    add("--patient_map", type=Path, help="dreamer: JSON or CSV of the patient of each folder")
    add("--manifest", type=Path, help="video: table of events or sequences (default: sample data)")
    add("--video_root", type=Path, help="video: folder of the videos, or of class folders without a manifest")
    add("--label_map", type=Path, help="video: file of spelling -> class")
    add("--group_column", help="video: column of the groups that a split keeps whole")
    add("--scores", action="store_true", help="video: the manifest holds scores of sequences (--task regress)")
    add("--output_dir", type=Path, default=Path("outputs"), help="where runs will be written: its disk is checked")
    add("--download_weights", nargs="*", metavar="NAME", help="only fill the weights cache (no name: all)")
    return parser.parse_args(words)


def show(check):
    """Print one row, its further lines, and below it what to do."""
    indent = "\n" + " " * 27
    text = f"{check.status:<5} {check.name:<20} {check.found}".replace("\n", indent)
    if check.remedy:
        text += f"{indent}-> {check.remedy}"
    print(text.encode("ascii", "backslashreplace").decode(), flush=True)


def run_check(name, rows, expected_errors=()):
    """Print the rows of one check as they come, one of `expected_errors` as the last; returns their statuses."""
    statuses = []
    try:
        for check in rows:
            show(check)
            statuses.append(check.status)
    except expected_errors as error:
        show(Check("FAIL", name, str(error)))
        statuses.append("FAIL")
    return statuses


def machine_and_task_checks(args, tasks, temporary):
    """[(name, rows)] of the machine, then of the data and the dry run of each task; skipped checks are named."""
    checks = [("processor", check_processor()), ("GPU", check_gpu()), ("disk", check_space(args.output_dir)),
              ("model", check_model(tasks))]
    for task in tasks:
        checks.append((f"data of {task}", AUDITS[task](args, temporary)))
        left_out = [Check("SKIP", f"dry run {task}", "skipped by --quick")]
        checks.append((f"dry run {task}", left_out if args.quick else check_dry_run(task, temporary)))
    return checks


def main(argv=None):
    """Print the table; returns the exit code."""
    args = parse_args(argv)
    statuses = run_check("installation", check_installation())
    if "FAIL" in statuses:
        print("Fix these first; the other checks need them.")
        return 1
    import common
    tasks = TASKS if args.task == "all" else (args.task,)
    with tempfile.TemporaryDirectory(prefix="verify_setup_") as temporary:
        if args.download_weights is not None:
            names = args.download_weights or [name for task in tasks for name in WEIGHTS.get(task, ())]
            checks = [("--download_weights", download_weights(names))]
        else:
            checks = machine_and_task_checks(args, tasks, temporary)
        for name, rows in checks:
            statuses += run_check(name, rows, (common.UserError, subprocess.TimeoutExpired))
    print(", ".join(f"{statuses.count(status)} {status}" for status in ("OK", "WARN", "FAIL", "SKIP")))
    return int("FAIL" in statuses)


if __name__ == "__main__":
    sys.exit(main())
