#!/usr/bin/env bash
# A real SLURM on this machine alone, for tests: munged, slurmctld and two slurmd, two nodes by name, in one folder.
#   one_node.sh start BASE      write the configuration under BASE and start; then `. BASE/env` for sbatch and the like
#   one_node.sh stop BASE       end the jobs and the daemons
# Needs root and the Debian packages slurm-wlm and munge; no systemd, no cgroups; touches no other SLURM of the machine.
set -euo pipefail
base=$2
host=$(hostname -s)

start() {
    local port=$((20000 + RANDOM % 10000))
    mkdir -p "$base"/{state,log,run,spool.n1,spool.n2}
    chmod 755 "$base" "$base/run" "$base/log"
    (umask 077; head -c 1024 /dev/urandom >"$base/run/munge.key")
    # cred_expire is also how long a requeued job waits before it starts again (120 s by default)
    # an explicit cgroup/v1 starts everywhere: nothing uses it, but slurmd loads some plugin and autodetection may fail
    echo 'CgroupPlugin=cgroup/v1' >"$base/cgroup.conf"
    cat >"$base/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmctldPidFile=$base/run/slurmctld.pid
SlurmdPidFile=$base/run/slurmd.%n.pid
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool.%n
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket=$base/run/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=900
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=8 RealMemory=6000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
    # shellcheck disable=SC2016  # expanded where it is read
    printf 'export SLURM_CONF=%q\nexport PATH=$PATH:/usr/sbin\n' "$base/slurm.conf" >"$base/env"
    # shellcheck source=/dev/null
    . "$base/env"
    munged --force --socket="$base/run/munge.socket" --key-file="$base/run/munge.key" \
        --pid-file="$base/run/munged.pid" --log-file="$base/log/munged.log" --seed-file="$base/run/munge.seed" \
        2>/dev/null
    slurmctld -c
    for node in n1 n2; do slurmd -N "$node"; done
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -p low -t idle -o %N 2>/dev/null | wc -l)" = 2 ]; then return 0; fi
        sleep 0.5
    done
    tail -n 5 "$base"/log/*.log >&2
    return 1
}

stop() {
    # shellcheck source=/dev/null
    . "$base/env"
    scancel --user=root 2>/dev/null || true
    sleep 1
    for file in "$base"/run/slurmd.*.pid "$base/run/slurmctld.pid" "$base/run/munged.pid"; do
        if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
    for _ in $(seq 40); do  # they still write into their folder for a moment
        if [ -z "$(ls "$base"/run/*.pid 2>/dev/null)" ]; then return 0; fi
        sleep 0.25
    done
}

"$1"
