#!/usr/bin/env bash
# Trains one run in N processes on this machine, each with an equal share of its GPUs; without GPUs on CPU.
#   ./scripts/launch_local.sh N [--dry_run] [CONFIG[:ARGUMENTS]] [--workdir=DIR] [--config.KEY=VALUE ...]
# What follows N is as for train.sh; --dry_run only prints the commands. SIGTERM or Ctrl-C saves and ends all
# of them. If one of them fails, the others end within a minute, and so does this; the same command resumes.
set -euo pipefail

usage="usage: launch_local.sh N [--dry_run] [CONFIG[:ARGUMENTS]] [--workdir=DIR] [--config.KEY=VALUE ...]"
n="${1:-}"
if ! [[ "$n" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: N is '$n'; it must be the number of processes. $usage" >&2
  exit 2
fi
shift
arguments=() dry_run=""
for argument in "$@"; do
  case "$argument" in --dry_run) dry_run=1 ;; *) arguments+=("$argument") ;; esac
done

scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus="${CUDA_VISIBLE_DEVICES//,/ }"
else
  gpus="$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | tr '\n' ' ' || true)"
fi
read -ra gpus <<< "$gpus" || true
if [ "${#gpus[@]}" -gt 0 ] && [ $((${#gpus[@]} % n)) -ne 0 ]; then
  echo "error: N is $n; it must divide the number of GPUs, ${#gpus[@]} (CUDA_VISIBLE_DEVICES chooses among them)." >&2
  exit 2
fi

# A port that is free now; the first process listens there.
port="${PORT:-}"
while [ -z "$port" ]; do
  port=$((20000 + RANDOM % 20000))
  if (exec 3<> "/dev/tcp/localhost/$port") 2> /dev/null; then port=""; fi
done

each=$((${#gpus[@]} / n))
command_of() {  # of process $1, in the array `command`
  if [ "$each" -gt 0 ]; then
    share="${gpus[*]:$(($1 * each)):$each}"
    command=(env "CUDA_VISIBLE_DEVICES=${share// /,}")
  else
    command=(env JAX_PLATFORMS=cpu)
  fi
  command+=("$scripts/train.sh" ${arguments[@]+"${arguments[@]}"}
    "--coordinator_address=localhost:$port" "--num_processes=$n" "--process_id=$1")
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < n; i++)); do
    command_of "$i"
    echo "$(printf '%q ' "${command[@]}")&"
  done
  exit
fi

# Requirements are installed once, before any process starts.
here="$PWD"
source "$scripts/environment.sh" requirements.txt
cd "$here"

pids=() asked=""
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true; asked=1' INT TERM
for ((i = 0; i < n; i++)); do
  command_of "$i"
  # A process group of its own: a Ctrl-C comes through here alone.
  setsid "${command[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done

status=0 running=("${pids[@]}")
while [ "${#running[@]}" -gt 0 ]; do
  sleep 0.2
  still=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then still+=("$pid"); continue; fi
    code=0
    wait "$pid" 2> /dev/null || code=$?
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$code
      if [ -z "$asked" ]; then
        for i in "${!pids[@]}"; do
          if [ "${pids[$i]}" = "$pid" ]; then
            echo "Process $i of $n ended with status $code; the others are given a minute to end." >&2
          fi
        done
        (sleep 60; kill -KILL "${pids[@]}" 2> /dev/null) &
        killer=$!
      fi
    fi
  done
  running=(${still[@]+"${still[@]}"})
done
if [ -n "${killer:-}" ]; then
  pkill -P "$killer" || true
  wait "$killer" 2> /dev/null || true
  echo "All processes have ended; the same command goes on from the last checkpoint." >&2
fi
exit "$status"
