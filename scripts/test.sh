#!/usr/bin/env bash
# Runs the tests: ./scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt
# A worker a core; a file stays with one worker, which keeps what it compiled.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
