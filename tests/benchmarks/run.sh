#!/usr/bin/env bash
# All benchmarks, one after the other: about two hours on 2 cores. Nothing else should run meanwhile.
#   tests/benchmarks/run.sh [name ...]   assessor video detector dreamer decode scaling equality (default: all)
#   OUT=DIR    where speed.jsonl, and the table and picture made of it, are written (./outputs/benchmarks)
#   VENV=DIR   environment with the packages (default: ./.venv-benchmarks, made when missing)
# Published ResNet weights are used where torch's cache (TORCH_HOME) has them; nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export VENV=${VENV:-$PWD/.venv-benchmarks}
python=$(./run_local.sh --install_only requirements.txt tests/benchmarks/requirements.txt)
out=${OUT:-outputs/benchmarks}
mkdir -p "$out"
file=$out/speed.jsonl
bench() { "$python" "tests/benchmarks/$1.py" "${@:2}" --json "$file"; }

failed=0
[ $# -gt 0 ] || set -- assessor video detector dreamer decode scaling equality
for part in "$@"; do
    case $part in
        assessor) bench assessor
                  bench assessor --backbone resnet50 --images 64 --batch_size 16 --repeats 3 ;;
        video)    bench video
                  bench video --model cnn_lstm --clips 48 ;;
        detector) bench detector
                  bench detector --model fasterrcnn_resnet50_fpn --images 8 --min_size 320 --batch_size 2 ;;
        dreamer)  bench dreamer ;;
        decode)   "$python" tests/benchmarks/video_decode.py ;;
        scaling)  bench scaling ;;
        equality) bench equality || failed=$?
                  bench equality --tasks assessor --against one_warp || failed=$? ;;
        *) printf 'error: no benchmark %s\n' "$part" >&2; exit 2 ;;
    esac
done
"$python" tests/benchmarks/summary.py "$file"
exit "$failed"
