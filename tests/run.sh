#!/usr/bin/env bash
# Run the tests on a bare machine with only Python 3.10+ and pip: 8 minutes on 2 cores, no GPU.
#   tests/run.sh                        all tests but the long ones, and the short part of the fault table
#   tests/run.sh --all                  the long ones too, every case of every fault, and jobs on a real SLURM (40 minutes to 2 hours)
#   tests/run.sh pytest-arguments       only these, as in: tests/run.sh tests/test_tables.py -k header
#   FAULT_TABLE=FILE  where the lines fault | cases | result are written       VENV=DIR  environment (./.venv-tests)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-$PWD/.venv-tests}
export VENV
python=$(./run_local.sh --install_only requirements.txt tests/requirements.txt)
pytest=("$python" -m pytest -q -rs)  # -rs prints the name and the reason of every skipped test
if [ -n "${FAULT_TABLE:-}" ]; then
    pytest+=("--fault_table=$FAULT_TABLE")
    printf '| fault | cases | result |\n|---|---|---|\n' >"$FAULT_TABLE"
fi

slurm=:
if [ "${1:-}" = --all ]; then
    shift
    pytest+=(-m "" --all_cases)
    slurm=tests/slurm/run.sh
elif [ $# -gt 0 ]; then
    exec "${pytest[@]}" "$@"
else
    echo "tests marked 'long' and most cases of the fault table are left out; tests/run.sh --all runs them"
fi
failed=0
# two files at a time, in the order of tests/conftest.py
OMP_NUM_THREADS=1 "${pytest[@]}" --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
"$slurm" ${FAULT_TABLE:+--fault_table "$FAULT_TABLE"} || failed=$?
exit "$failed"
