#!/usr/bin/env bash
# Compares Vision Transformers, CLIP, language models and small networks with those of timm and
# transformers, which need PyTorch, in an environment of its own, .venv-peers, which it makes:
# ./scripts/test_peers.sh [pytest's arguments]
# PIP_FIND_LINKS names a folder of wheels, such as one with PyTorch's build for CPUs.
set -euo pipefail
unset VIRTUAL_ENV
VENV="${VENV:-.venv-peers}"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-peers.txt
exec python -m pytest tests/*peers_test.py -m peers "$@"
