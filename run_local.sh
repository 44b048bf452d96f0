#!/usr/bin/env bash
# Set up this machine (Python 3.10+ and pip are enough) and train, without SLURM:
#
#   ./run_local.sh [train_SCRIPT.py] [flags of the script]      default script: train_assessor.py
#   ./run_local.sh --install_only [requirements files]          environment only; its python is printed last
#
# Flags that name the data (--images_dir, --manifest, --video_root, --config, --resume RUN) and those of other scripts
# are passed on as they are. Without them train_assessor.py takes ./images with the table in ./ratings, else sample data
# that are made, as train_video.py does; all other flags override the defaults.
# Environment: the active venv or conda environment, else ./.venv (made when missing).
#   VENV=DIR      use or make the environment in DIR       PYTHON=FILE   use this interpreter
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
published=per_image_Slider_mean_sd_from_wide.csv  # the table's name in the published study

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# --- environment -------------------------------------------------------------

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a working Python 3.10 or newer"
    done
    die "no Python 3.10 or newer found; install one (Debian, Ubuntu: apt install python3 python3-venv)," \
        "or name it with PYTHON=FILE"
}

is_environment() {  # a venv or conda environment, where pip may install
    "$1" -c 'import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.path.isdir(sys.prefix + "/conda-meta"))'
}

has_packages() {  # PYTHON FILE...: is every requirement met? Metadata only, no import, well under a second
    local python=$1
    shift
    PYTHONPATH=$here PYTHONDONTWRITEBYTECODE=1 "$python" -c \
        'import sys, verify_setup; sys.exit(bool(verify_setup.unmet_requirements(sys.argv[1:])))' "$@"
}

make_environment() {  # PYTHON DIR: a venv with pip, also where Debian's python3-venv package is missing
    local base=$1 env=$2 site
    if [ -e "$env" ] && [ ! -e "$env/pyvenv.cfg" ]; then
        die "$env exists and is not a virtual environment; remove it or name another folder with VENV=DIR"
    fi
    say "creating the environment $env"
    "$base" -m venv "$env" >/dev/null 2>&1 && return
    # without ensurepip, pip from outside installs a pip inside
    if "$base" -m venv --without-pip "$env" >/dev/null 2>&1 && "$base" -m pip --version >/dev/null 2>&1; then
        site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$base" -m pip install --quiet --target "$site" pip >&2 && return
    fi
    die "$base cannot create an environment: install its venv package (Debian, Ubuntu: apt install python3-venv)" \
        "or activate a venv or conda environment, then run this again"
}

loads_opencv() {  # also true where it is not installed
    "$1" -c 'import importlib.util as found; found.find_spec("cv2") and __import__("cv2")'
}

install_packages() {  # PYTHON FILE...
    local python=$1
    shift
    if ! has_packages "$python" "$@"; then
        say "installing $* into $("$python" -c 'import sys; print(sys.prefix)') (torch is large; this takes minutes)"
        "$python" -m pip install "${@/#/--requirement=}" >&2 ||  # each FILE becomes --requirement=FILE
            die "pip could not install the packages (no internet? see the lines above)"
    fi
    if ! loads_opencv "$python" 2>/dev/null; then
        say "cv2 does not load (system libraries are missing): replacing opencv-python by opencv-python-headless"
        "$python" -m pip uninstall --yes opencv-python >&2
        "$python" -m pip install --force-reinstall --no-deps opencv-python-headless >&2
        loads_opencv "$python" || die "cv2 still does not load; Debian, Ubuntu: apt install libgl1 libglib2.0-0"
    fi
}

choose_environment() {  # FILE...: sets $python to an interpreter that has the packages
    local base env
    base=$(find_python)
    env=${VENV:-$here/.venv}
    if [ -z "${VENV:-}" ] && { is_environment "$base" || has_packages "$base" "$@"; }; then
        python=$base
    else
        "$env/bin/python" -m pip --version >/dev/null 2>&1 || make_environment "$base" "$env"
        python=$env/bin/python
    fi
    install_packages "$python" "$@"
    say "python: $python"
}

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
if [ "${1:-}" = --install_only ]; then
    shift
    [ $# -gt 0 ] || set -- "$here/requirements.txt"
    choose_environment "$@"
    echo "$python"
    exit
fi

# --- data --------------------------------------------------------------------

find_table() {  # the table in the ratings folder: the published name, or the only .csv
    set -- "$data"/ratings/*.csv
    [ ! -f "$data/ratings/$published" ] || set -- "$data/ratings/$published"
    [ $# -eq 1 ] || die "several tables in $data/ratings ($*); name --images_dir and --ratings_file"
    [ -f "$1" ] || die "no .csv in $data/ratings; name --images_dir and --ratings_file"
    echo "$1"
}

verify() {
    "$python" "$here/verify_setup.py" --task "$task" "$@"
}

has_flag() {  # "NAME|NAME|..." FLAGS...: is one of them given, written with - or _?
    local names=$1 word
    shift
    for word in "$@"; do
        word=${word%%=*}
        if [[ ${word//-/_} =~ ^__?($names)$ ]]; then return 0; fi
    done
    return 1
}

names_data() {  # FLAGS...: true where they say what is read; --resume RUN does, --resume auto does not
    has_flag "images_dir|ratings_file|manifest|train_manifest|video_root|config|mode|help|h" "$@" ||
        { [[ "$*" =~ --resume[^=\ ]*[=\ ][^-\ ] ]] && [[ ! "$*" =~ --resume[^=\ ]*[=\ ]auto ]]; }
}

needs_random_weights() {  # FLAGS...: true where pretrained weights are wanted but not available
    if has_flag "no_pretrained|weights" "$@" || "$python" "$here/verify_setup.py" --download_weights resnet18; then
        return 1
    fi
    say "PRETRAINED WEIGHTS ARE NOT AVAILABLE: using RANDOM WEIGHTS, on sample data only; scores will be low"
}

run_script() {
    say "python $script $*"
    exec "$python" "$here/$script" "$@"
}

script=train_assessor.py
case "${1:-}" in
    *.py) script=$(basename "$1"); shift ;;
esac
[ -f "$here/$script" ] || die "there is no $script in $here (found: $(cd "$here" && echo train_*.py))"
task=${script#train_}
task=${task%.py}
choose_environment "$here/requirements.txt"

if { [ "$task" != assessor ] && [ "$task" != video ]; } || names_data "$@"; then
    run_script "$@"
fi
reason=
if [ "$task" = assessor ]; then
    data=.
    if [ ! -d images ] || [ ! -d ratings ]; then data=$here; fi
    if [ -d "$data/images" ] && [ -d "$data/ratings" ]; then
        table=$(find_table)
        verify --images_dir "$data/images" --ratings_file "$table" ||
            say "verify_setup.py found problems (above); training starts anyway and reports what stops it"
        run_script --images_dir "$data/images" --ratings_file "$table" "$@"
    fi
    reason=" and no ./images with ./ratings here"
fi

sample=$here/sample_data/$task
say "no data given$reason: using SAMPLE DATA in $sample; the results say nothing about real data"
"$python" "$here/make_sample_data.py" --task "$task" --output_dir "$here/sample_data"
verify
if [ "$task" = video ]; then
    set -- --config "$here/configs/video_small_data.yaml" --manifest "$sample/manifests/all.csv" \
        --video_root "$sample/videos" --label_map "$sample/manifests/label_map.json" "$@"
    has_flag "folds|cv_file|split_file|test_groups|train_ratio|val_ratio|test_ratio" "$@" ||
        set -- --val_ratio 0.25 --test_ratio 0.25 "$@"
else  # takes about two minutes on two cores, with random weights too
    set -- --images_dir "$sample/images" --ratings_file "$sample/ratings/$published" --group_column subject \
        --backbone resnet18 --image_size 96 --epochs 20 --batch_size 8 --lr 5e-4 --dropout 0 --augment none "$@"
fi
! needs_random_weights "$@" || set -- --no_pretrained "$@"
run_script "$@"
