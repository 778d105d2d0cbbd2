"""How a run is watched: flags of sam-jax-train, which commands that start runs hand on."""

from absl import flags

from sam_jax import trackers, watchdog

TRACKER = flags.DEFINE_list(
    'tracker',
    ['tensorboard'],
    f'Where metrics go besides metrics.jsonl: {", ".join(trackers.NAMES)}; empty for nowhere.',
)
HANG_MINUTES = flags.DEFINE_float(
    'hang_minutes',
    0.0,
    'After so long without a step the process prints its stacks and ends, to be started again; '
    'more than compilation, an evaluation or an analysis takes. 0: never.',
    0.0,
    watchdog.MAX_MINUTES,
)


def named_trackers() -> tuple[str, ...]:
    """Returns the names that --tracker has."""
    return tuple(filter(None, TRACKER.value))


def handed_on() -> tuple[str, ...]:
    """Returns those of these flags that were given, as a run is to be given them.

    Raises:
      UserError: there is no such tracker.
    """
    trackers.check(named_trackers())
    return tuple(
        flags.FLAGS[flag.name].serialize() for flag in (TRACKER, HANG_MINUTES) if flag.present
    )
