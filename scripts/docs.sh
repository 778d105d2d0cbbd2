#!/usr/bin/env bash
# The documentation, built in an environment of its own, .venv-docs.
#   ./scripts/docs.sh             builds the site into site/
#   ./scripts/docs.sh serve       shows it at http://localhost:8000; further arguments are those of mkdocs serve
#   ./scripts/docs.sh test        builds it strictly, looks at it in chromium if that is there, executes the
#                                 notebooks; further arguments are pytest's
#   ./scripts/docs.sh notebooks   runs the notebooks and keeps their outputs
set -euo pipefail
unset VIRTUAL_ENV
VENV="${VENV:-.venv-docs}"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-docs.txt
export NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
task="${1:-build}"
shift || true
case "$task" in
  build) exec mkdocs build --strict "$@" ;;
  serve) exec mkdocs serve "$@" ;;
  test) exec python -m pytest -m docs tests/docs_test.py "$@" ;;
  notebooks) exec jupyter nbconvert --to notebook --execute --inplace docs/notebooks/*.ipynb ;;
  *) echo "error: unknown task '$task'; it must be build, serve, test or notebooks." >&2; exit 2 ;;
esac
