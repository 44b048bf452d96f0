#!/usr/bin/env bash
# Run the tests on a bare machine with only Python 3.10+ and pip: about 15 minutes on 2 cores, no GPU.
#   tests/run.sh [--all] [pytest arguments]     --all: also the tests marked `long`, and all cases of every fault
#   VENV=DIR     environment to use or make (default: ./.venv-tests)      PYTHON=...  interpreter that makes it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(VENV="${VENV:-$PWD/.venv-tests}" ./run_local.sh --install_only requirements.txt tests/requirements.txt)
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" --all_cases "$@"
else
    echo "tests marked 'long' and most cases of the fault table are left out; tests/run.sh --all runs them"
fi
# -rs prints the name and the reason of every skipped test
exec "$python" -m pytest -q -rs "$@"
