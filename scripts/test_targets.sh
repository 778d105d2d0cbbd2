#!/usr/bin/env bash
# Compiles for TPUs that are not there and looks at the programs, in an environment of its own,
# .venv-targets, which it makes: ./scripts/test_targets.sh [pytest's arguments]
set -euo pipefail
unset VIRTUAL_ENV
VENV="${VENV:-.venv-targets}"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-targets.txt
exec python -m pytest tests/targets_test.py tests/every_target_test.py -m targets "$@"
