#!/usr/bin/env bash
# Tests the sweep's Slurm engine for real: makes a cluster of this one machine, runs the tests marked
# slurm, and takes it down again. Needs Debian or Ubuntu, and root: it installs slurm-wlm if that is
# not there. A cluster that is configured here already is left alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt

if ! command -v slurmctld > /dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm > /dev/null
fi
python -m pip install --quiet 'submitit>=1.5,<2'

cluster="$(mktemp -d)"
mkdir "$cluster/state" "$cluster/spool"
host="$(hostname -s)"
cat > "$cluster/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
export SLURM_CONF="$cluster/slurm.conf"

stop() {
  scancel --user=root 2> /dev/null || true
  for daemon in slurmd slurmctld; do
    if [ -f "$cluster/$daemon.pid" ]; then kill "$(cat "$cluster/$daemon.pid")" || true; fi
  done
  sleep 2
  rm -rf "$cluster"
}
trap stop EXIT

if ! pgrep -x munged > /dev/null; then
  mkdir -p /run/munge && chown munge: /run/munge
  runuser -u munge -- munged
fi
slurmctld
slurmd
for _ in $(seq 30); do
  if [ "$(sinfo --noheader --format=%t 2> /dev/null)" = idle ]; then break; fi
  sleep 1
done
sinfo
python -m pytest -m slurm "$@"
