#!/usr/bin/env bash
# Tests on real data: Fashion-MNIST of Debian's package, and files that Hugging Face's `datasets`
# writes. Installs both if they are not there: ./scripts/test_datasets.sh [pytest's arguments]
# The package is on Debian and Ubuntu, and is installed by root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt

if ! dpkg -s dataset-fashion-mnist > /dev/null 2>&1; then
  sudo=''
  if [ "$(id -u)" != 0 ]; then sudo=sudo; fi
  if ! command -v apt-get > /dev/null || ! command -v ${sudo:-true} > /dev/null; then
    echo "error: dataset-fashion-mnist is not there; it is installed by root with apt-get." >&2
    exit 2
  fi
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq dataset-fashion-mnist > /dev/null
fi
python -m pip install --quiet --disable-pip-version-check 'datasets>=4,<6'
exec python -m pytest -m datasets tests/datasets_test.py tests/files_test.py "$@"
