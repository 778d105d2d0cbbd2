#!/usr/bin/env bash
# Looks at a report in a real browser: runs the tests marked browser. Needs Debian or Ubuntu, and root if
# chromium has to be installed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt
if ! command -v chromium > /dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-dejavu-core > /dev/null
fi
exec python -m pytest -m browser "$@"
