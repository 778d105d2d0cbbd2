"""Throws faults at real runs: `python scripts/faults.py --minutes=20 --seed=0`; see --help."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In this order: the name of this script is that of the package.
sys.path[:1] = [ROOT, os.path.join(ROOT, 'tests')]

import quick

# Before JAX is imported: small runs on CPU, quick to compile, all of whose programs are kept.
os.environ.update(
    JAX_PLATFORMS='cpu', XLA_FLAGS=quick.flags(), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0'
)

from faults import campaign

campaign.main()
