#!/usr/bin/env bash
# Trains one config: ./scripts/train.sh configs/digits.py [--workdir=DIR] [--config.sam.rho=0.1 ...]
# Without --workdir the run goes to runs/<name of the config and its arguments>.
set -euo pipefail

if [ $# -eq 0 ] || [[ "$1" == -* ]]; then
  echo "usage: $0 CONFIG[:ARGUMENTS] [--workdir=DIR] [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config="$1"
shift
# Paths are meant from where the command was typed.
here="$PWD"
file="${config%%:*}"
case "$file" in /*) ;; *) [ -e "$here/$file" ] && config="$here/$config" ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt

workdir="runs/$(basename "${config//.py/}")"
for argument in "$@"; do
  case "$argument" in --workdir|--workdir=*|-workdir|-workdir=*) workdir="" ;; esac
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
root="$PWD"
cd "$here"
exec python -m sam_jax.main --config="$config" ${workdir:+--workdir="$root/$workdir"} "$@"
