"""A pod of the tests: sam-jax-train in a process that is forked with all imports made.

So that sixteen of them start, and start anew, on a small machine.
"""

import os
import sys

# What the server of the forks imports, once.
PRELOADED = [
    *('kubelet', 'sam_jax.main', 'sam_jax.experiment', 'sklearn.datasets', 'orbax.checkpoint'),
    *('tqdm', 'grain', 'jax.experimental.multihost_utils', 'jax.experimental.topologies'),
]


def pod(arguments, log):
    """Trains as the arguments say; what is said is added to the file `log`."""
    os.setsid()
    with open(log, 'ab') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ['sam-jax-train', *arguments]
    from sam_jax import main

    main.run()
