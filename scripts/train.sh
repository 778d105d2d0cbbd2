#!/usr/bin/env bash
# Trains one config: ./scripts/train.sh [NAME or FILE[:ARGUMENTS]] [--workdir=DIR] [--config.KEY=VALUE ...]
# The default config is configs/digits.py.
# Without --workdir the run goes to runs/<name of the config and its arguments, with _ for each />.
set -euo pipefail

config=configs/digits.py
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
  config="$1"
  shift
fi
# Paths are meant from where the command was typed.
here="$PWD"
file="${config%%:*}"
arguments="${config#"$file"}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ "$file" == */* || "$file" == *.py ]] && [[ "$file" != /* ]]; then  # else a config by name
  if [ -e "$here/$file" ]; then config="$here/$config"; else config="$root/$config"; fi
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt

workdir="runs/$(basename "$file" .py)${arguments//\//_}"
for argument in "$@"; do
  case "$argument" in --workdir|--workdir=*|-workdir|-workdir=*) workdir="" ;; esac
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cd "$here"
exec python -m sam_jax.main --config="$config" ${workdir:+--workdir="$root/$workdir"} "$@"
