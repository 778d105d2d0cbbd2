#!/usr/bin/env bash
# On the GPU or TPU of this machine: the tests that hold on one device of any kind.
# ./scripts/test_accelerator.sh [pytest's arguments]
# Needs JAX for it in the environment, see docs/howto/gpu.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt
platform="$(python -c 'import jax; print(jax.devices()[0].platform)')"
if [ "$platform" = cpu ]; then
  echo "error: JAX finds no accelerator here, see docs/howto/gpu.md." >&2
  exit 2
fi
if [ "$platform" = gpu ]; then platform=cuda; fi
# The CPU is there to be compared with. Several workers share a GPU's memory; a TPU takes one.
export SAM_JAX_TEST_PLATFORMS="$platform,cpu" XLA_PYTHON_CLIENT_PREALLOCATE=false
workers=0
if [ "$platform" = cuda ]; then
  workers=$(( $(nproc) < 12 ? $(nproc) : 12 ))
  # Sums of GPUs may be in any order; one test resumes runs, which must be the same bit for bit.
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true"
fi
# A plugin for benchmarks, where there is one, warns of the workers, and warnings are errors.
exec python -m pytest -p no:benchmark -n "$workers" --max-worker-restart=0 -m 'accelerator and not slow' "$@"
