#!/usr/bin/env bash
# Runs the tests: ./scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt
exec python -m pytest "$@"
