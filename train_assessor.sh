#!/usr/bin/env bash
# From the repository folder: sbatch train_assessor.sh [train_SCRIPT.py] [flags of the script]
# On SLURM's signal the script saves and leaves with 75, and the job requeues itself as long as it makes progress.
# Several nodes or GPUs: sbatch --nodes=2 --ntasks-per-node=4 --gres=gpu:4 train_assessor.sh ..., one task a GPU.
# Environment: MODULES="python/3.11 cuda" are loaded first, then CONDA_ENV=name, or VENV=folder (default ./.venv).
#SBATCH --job-name=train_assessor
#SBATCH --output=logs/train_assessor_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --time=24:00:00
#SBATCH --mem=32G
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
set -eo pipefail  # no -u: module and conda read unset variables
cd "${SLURM_SUBMIT_DIR:?start it with sbatch; without SLURM: ./run_local.sh}"
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}
echo "job $job, start $((SLURM_RESTART_COUNT + 1)), on $SLURM_JOB_NODELIST, GPU ${CUDA_VISIBLE_DEVICES:-none}, $(date)"

if [ -n "$MODULES" ]; then read -ra modules <<<"$MODULES"; module load "${modules[@]}"; fi
if [ -n "$CONDA_ENV" ]; then
    eval "$(conda shell.bash hook)"; conda activate "$CONDA_ENV"
elif [ -n "$VENV" ] || [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    . "${VENV:-.venv}/bin/activate"
fi
script=train_assessor.py
if [[ $1 == *.py ]]; then script=$1; shift; fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit --cpus-per-task since Slurm 22.05
# srun is told how many, as it would start a task for every core of an --exclusive job
tasks=${SLURM_NTASKS:-$((${SLURM_NTASKS_PER_NODE:-1} * ${SLURM_JOB_NUM_NODES:-1}))}
progress=logs/.progress_$job
mkdir -p logs
touch "$progress"
rc=0
# where the processes of several nodes meet: the first node, and a port that another job rarely wants
if [ -z "$MASTER_ADDR" ]; then MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); fi
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
python=${PYTHON:-$(command -v python || command -v python3)}
srun --ntasks="$tasks" --kill-on-bad-exit=1 "$python" "$script" --resume auto "$@" || rc=$?
if [ "$rc" -ne 75 ]; then rm -f "$progress"; exit "$rc"; fi

# 75: saved, start again. A job that has only saved what an earlier start had saved makes no progress and would be
# requeued for ever. One start may end before anything is saved, as in the decoding of pictures.
default=outputs
if [[ $script == *train_detector.py ]]; then default=${OUTPUT_DIR:-outputs}; fi  # it alone reads this
outputs=$(printf '%s\n' "$default" "$@" | sed -n '1p; s/^--output[_-]dir=//p; /^--output[_-]dir$/{n;p;}' | tail -n 1)
newer=(-newer "$progress" \( -name last.pth -o -name metrics.json \))
saved=$(find "$outputs" "${newer[@]}" -exec cksum {} + | sort | cksum) || true  # no such folder: nothing is saved
if grep -qxF "$saved" "$progress"; then
    echo "job $job made no progress under $outputs (the --output_dir of the command line, not that of a --config," \
        "--resume or .env): not requeued; sbatch again continues it"
else
    echo "$saved" >>"$progress"
    echo "job $job: requeued"
    scontrol requeue "$job"
fi
exit 75
