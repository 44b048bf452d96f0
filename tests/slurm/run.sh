#!/usr/bin/env bash
# Jobs of train_assessor.sh on a real SLURM of two nodes, started here for the purpose: about 10 minutes on 2 cores.
#   tests/slurm/run.sh [--fault_table FILE] [name of a scenario ...]
#   VENV=DIR   environment with the packages (default: ./.venv-tests)
# Needs root and the Debian packages slurm-wlm and munge (apt-get install slurm-wlm munge); without them it is skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PATH:/usr/sbin
if [ "$(id -u)" != 0 ]; then echo "skipped: slurm (needs root to start its daemons)"; exit 0; fi
for program in slurmctld slurmd munged sbatch; do
    if ! command -v "$program" >/dev/null; then
        echo "skipped: slurm ($program is not installed: apt-get install slurm-wlm munge)"
        exit 0
    fi
done
python=${VENV:-$PWD/.venv-tests}/bin/python
base=$(mktemp -d)
chmod 755 "$base"
trap 'tests/slurm/one_node.sh stop "$base/slurm" || true; rm -rf "$base" || true' EXIT
if ! tests/slurm/one_node.sh start "$base/slurm"; then echo "skipped: slurm (its daemons do not start here)"; exit 0; fi
# shellcheck source=/dev/null
. "$base/slurm/env"
OMP_NUM_THREADS=1 PYTHON=$python "$python" tests/slurm/scenarios.py "$base/work" "$@"
