#!/usr/bin/env bash
# Runs the tests: ./scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt
# A worker a core; a file stays with one worker, which keeps what it compiled.
# A worker that dies ends the run: one that takes its place can wait forever (pytest-xdist 784).
exec python -m pytest -n 2 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder "$@"
