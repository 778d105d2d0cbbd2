#!/usr/bin/env bash
# Trains one run on several nodes of a Slurm cluster, one process a node, which uses all GPUs it is given.
#   ./scripts/launch_slurm.sh [--dry_run] [--nodes=2] [--gpus_per_node=8] [--cpus_per_task=N] [--time=24:00:00]
#       [--partition=NAME] [--account=NAME] [--sbatch=OPTION ...] CONFIG[:ARGUMENTS] --workdir=DIR [--config.KEY=VALUE ...]
# --dry_run only prints the batch script. The workdir must be on a file system that all nodes see; what the run
# says is added to DIR/log.txt. Before its time is over, and when it is preempted, the run saves and the job is
# requeued; it goes on from there. A run that fails is not requeued. (Preemption is PreemptMode=REQUEUE. The run
# hears of it if there is a GraceTime, else Slurm requeues by itself and the last checkpoint counts.)
set -euo pipefail

nodes=2 gpus=8 options=() dry_run="" run=() workdir=""
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --dry_run) dry_run=1 ;;
    --nodes=*) nodes="$value" ;;
    --gpus_per_node=*) gpus="$value" ;;
    --cpus_per_task=*) options+=("--cpus-per-task=$value") ;;
    --time=*) options+=("--time=$value") ;;
    --partition=*) options+=("--partition=$value") ;;
    --account=*) options+=("--account=$value") ;;
    --sbatch=*) options+=("$value") ;;
    --workdir=*) workdir="$value"; run+=("--workdir=$(realpath -m "$value")") ;;
    --config.*) run+=("$argument") ;;
    -*) echo "error: unknown option '$argument'; see the head of ${BASH_SOURCE[0]}." >&2; exit 2 ;;
    *) run=("$argument" ${run[@]+"${run[@]}"}) ;;
  esac
done
for number in "nodes $nodes" "gpus_per_node $gpus"; do
  if ! [[ "${number#* }" =~ ^[0-9]+$ ]] || [ "$number" = "nodes 0" ]; then
    echo "error: --${number% *} is '${number#* }'; it must be a number (gpus_per_node=0: CPUs alone)." >&2
    exit 2
  fi
done
if [ -z "$workdir" ]; then
  echo "error: --workdir is missing; it must name a folder that all nodes see." >&2
  exit 2
fi
workdir="$(realpath -m "$workdir")"
devices=""
if [ "$gpus" -gt 0 ]; then
  options+=("--gpus-per-node=$gpus")
  # Under Slurm JAX takes one GPU a process unless it is told of the others.
  devices="export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))"
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

batch="#!/usr/bin/env bash
#SBATCH --job-name=sam_jax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$workdir/log.txt
#SBATCH --signal=B:TERM@120
$(printf '#SBATCH %s\n' ${options[@]+"${options[@]}"})

# Slurm tells this script alone that the time is over; it tells the run, waits, and asks for more.
stop() { stopped=1; scancel --signal=TERM \"\$SLURM_JOB_ID.0\"; }
trap stop TERM
cd $(printf %q "$PWD")
$devices
srun --wait=60 $(printf '%q ' "$root/scripts/train.sh" "${run[@]}")--distributed &
srun_pid=\$!
wait \$srun_pid; status=\$?
if [ -n \"\${stopped:-}\" ]; then wait \$srun_pid; status=\$?; fi
# The run was asked to go and has saved. A preemption with a GraceTime tells it alone, and does not
# requeue a job that ends in time. Of one that was cancelled the state is another.
if [ \$status -eq 143 ] && scontrol show job \"\$SLURM_JOB_ID\" | grep -q JobState=RUNNING; then
  exec scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$status"

if [ -n "$dry_run" ]; then
  echo "$batch"
  exit
fi
# Requirements are installed once, here, where all nodes see them.
here="$PWD"
source "$root/scripts/environment.sh" requirements.txt
cd "$here"
mkdir -p "$workdir"
sbatch <<< "$batch"
