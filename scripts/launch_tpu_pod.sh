#!/usr/bin/env bash
# Trains one run on all workers of a Cloud TPU slice that it asks for as a queued resource, and starts it anew,
# from its last checkpoint, when the slice is preempted. Needs gcloud, logged in.
#   ./scripts/launch_tpu_pod.sh [--dry_run] --name=NAME --zone=ZONE --type=v4-32 [--project=PROJECT] [--spot]
#       [--version=tpu-ubuntu2204-base] --bucket=BUCKET --repository=URL [--revision=main] [--retries=1] [--keep]
#       CONFIG[:ARGUMENTS] --workdir=DIR [--config.KEY=VALUE ...]
# DIR is a folder in the bucket, which every worker mounts at /tmp/bucket with gcsfuse; data.dir can lie there too.
# The slice is given back at the end unless there is --keep. --dry_run only prints the commands.
set -euo pipefail

name="" zone="" type="" project="" version=tpu-ubuntu2204-base bucket="" repository="" revision=main
spot="" keep="" dry_run="" retries=1 workdir="" run=() poll="${POLL_SECONDS:-30}"
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --dry_run) dry_run=1 ;;
    --spot) spot=--spot ;;
    --keep) keep=1 ;;
    --name=*) name="$value" ;;
    --zone=*) zone="$value" ;;
    --type=*) type="$value" ;;
    --project=*) project="$value" ;;
    --version=*) version="$value" ;;
    --bucket=*) bucket="${value#gs://}" ;;
    --repository=*) repository="$value" ;;
    --revision=*) revision="$value" ;;
    --retries=*) retries="$value" ;;
    --workdir=*) workdir="$value" ;;
    --config.*) run+=("$argument") ;;
    -*) echo "error: unknown option '$argument'; see the head of ${BASH_SOURCE[0]}." >&2; exit 2 ;;
    *) run=("$argument" ${run[@]+"${run[@]}"}) ;;
  esac
done
for needed in name zone type bucket repository workdir; do
  if [ -z "${!needed}" ]; then echo "error: --$needed is missing; see the head of ${BASH_SOURCE[0]}." >&2; exit 2; fi
done
case "$workdir" in
  /*|*:*) echo "error: --workdir is '$workdir'; it must name a folder in the bucket, such as runs/imagenet." >&2; exit 2 ;;
esac

place=(--zone="$zone" ${project:+--project="$project"})
slices=(gcloud compute tpus queued-resources)

call() {  # prints a command, or runs it
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() {
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}
state() {  # NONE where there is no such slice; UNKNOWN where gcloud cannot tell
  local answer
  if answer="$("${slices[@]}" describe "$name" "${place[@]}" --format='value(state.state)' 2>&1)"; then
    echo "$answer" | tail -n 1
  elif [[ "$answer" == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}
create() {
  call "${slices[@]}" create "$name" --node-id="$name" "${place[@]}" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+"$spot"}
}
delete() {
  call "${slices[@]}" delete "$name" "${place[@]}" --force --quiet
}
wait_until_active() {
  local now before=""
  while true; do
    now="$(state)"
    if [ "$now" != "$before" ]; then echo "$name: $now" >&2; before="$now"; fi
    case "$now" in
      ACTIVE) return ;;
      NONE) create ;;
      FAILED|SUSPENDED) delete; create ;;
    esac
    sleep "$poll"
  done
}

setup="set -e
[ -d sam_jax ] || git clone --quiet $(printf %q "$repository") sam_jax
cd sam_jax && git fetch --quiet origin $(printf %q "$revision") && git checkout --quiet --detach FETCH_HEAD
[ -x .venv/bin/python ] || { python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 .venv; }
source scripts/environment.sh requirements.txt && pip install --quiet 'jax[tpu]' -r requirements.txt
mkdir -p /tmp/bucket
mountpoint -q /tmp/bucket || gcsfuse --implicit-dirs --rename-dir-limit=200000 $(printf %q "$bucket") /tmp/bucket"
train="cd sam_jax && ./scripts/train.sh $(printf '%q ' ${run[@]+"${run[@]}"})--workdir=/tmp/bucket/$(printf %q "$workdir") --distributed"

if [ -n "$dry_run" ]; then
  create
  echo "# until it is ACTIVE, every $poll s; anew if it is FAILED or SUSPENDED:"
  echo "$(printf '%q ' "${slices[@]}" describe "$name" "${place[@]}")--format='value(state.state)'"
  on_all "$setup"
  on_all "$train"
  [ -n "$keep" ] || delete
  exit
fi

while true; do
  wait_until_active
  status=0
  { on_all "$setup" && on_all "$train"; } || status=$?
  if [ "$status" -eq 0 ]; then break; fi
  now="$(state)"
  while [ "$now" = UNKNOWN ]; do sleep "$poll"; now="$(state)"; done
  if [ "$now" = ACTIVE ]; then
    if [ "$retries" -eq 0 ]; then
      echo "error: the run failed with status $status on a slice that works; it is kept, look at its messages above." >&2
      exit "$status"
    fi
    retries=$((retries - 1))
    echo "The run ended with status $status; it is started again." >&2
  else
    echo "$name was preempted ($now); the run goes on from its last checkpoint on another slice." >&2
  fi
done
[ -n "$keep" ] || delete
