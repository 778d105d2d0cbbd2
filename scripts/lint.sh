#!/usr/bin/env bash
# Checks style, layout (`ruff format` mends it) and types: ruff and basedpyright, in an environment of
# their own, .venv-lint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
libraries="$VIRTUAL_ENV/bin/python"  # what is imported, of which basedpyright reads the types
unset VIRTUAL_ENV
VENV=.venv-lint
source scripts/environment.sh requirements-lint.txt
status=0
ruff check || status=1
ruff format --check || status=1
basedpyright --pythonpath "$libraries" || status=1
exit $status
