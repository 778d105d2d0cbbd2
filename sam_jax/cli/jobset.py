r"""Prints the manifest of a run on a Kubernetes cluster, a JobSet; it is started by kubectl.

    sam-jax-jobset --name=rn50 --image=IMAGE --target=tpu:v5e:4x4 --claim=CLAIM \
        --config=imagenet:model=resnet50 --workdir=/data/rn50 | kubectl apply -f -

A pod for each host of the target, which is named as for sam-jax-compile: tpu:v5e:4x4 has 4 hosts,
gpu:h100:2x8 has 2. IMAGE holds this package and the config; CLAIM is a volume that all pods can
write to, at /data. Needs JobSet on the cluster, https://jobset.sigs.k8s.io, and on TPUs GKE.

A preempted pod saves within --grace_seconds, and all pods start again from the last checkpoint, as
often as that happens; after other failures they do --retries times. --tracker and --hang_minutes
are handed on to the run.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from sam_jax import settings
from sam_jax.cli import commands, watching
from sam_jax.errors import UserError
from sam_jax.settings import shipped
from sam_jax.targets import jobset

_CONFIG = commands.define_config('Config of the run.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run, on the volume.')
_NAME = flags.DEFINE_string('name', '', 'Name of the JobSet.')
_IMAGE = flags.DEFINE_string('image', '', 'Image of the container.')
_TARGET = flags.DEFINE_string('target', '', 'tpu:KIND:SHAPE or gpu:KIND:HOSTSxGPUS.')
_HOSTS = flags.DEFINE_integer('hosts', 0, 'How many there are; 0: as the target says.', 0)
_CLAIM = flags.DEFINE_string('claim', '', 'PersistentVolumeClaim of the volume.')
_MOUNT = flags.DEFINE_string('mount', '/data', 'Where the volume is.')
_GRACE = flags.DEFINE_integer('grace_seconds', 120, 'Between SIGTERM and SIGKILL.', 1)
_RETRIES = flags.DEFINE_integer('retries', 3, 'Restarts after failures; preemptions are none.', 0)
_SELECTOR = flags.DEFINE_multi_string(
    'node_selector', [], 'LABEL=VALUE of the nodes, such as those with the GPUs; several times.'
)


def _in_the_image(flag):
    """--config as the container takes it: a config of ours by its name, another file as it is."""
    path, colon, argument = flag.partition(':')
    folder, file = os.path.split(os.path.abspath(path))
    if folder == shipped.folder():
        path = file.removesuffix('.py')
    return path + colon + argument


def _labels():
    labels = {}
    for text in _SELECTOR.value:
        label, equals, value = text.partition('=')
        if not (label and equals and value):
            raise UserError(f'--node_selector is {text!r}; it must be of the form LABEL=VALUE.')
        labels[label] = value
    return labels


def main() -> None:
    """Prints what the flags say."""
    import yaml

    for flag in (_NAME, _IMAGE, _TARGET, _CLAIM, _WORKDIR):
        if not flag.value:
            raise UserError(f'--{flag.name} is missing; see sam-jax-jobset --help.')
    settings.check(_CONFIG.value)
    mount = _MOUNT.value.rstrip('/')
    if not f'{_WORKDIR.value}/'.startswith(f'{mount}/'):
        raise UserError(
            f'--workdir is {_WORKDIR.value!r}; it must lie on the volume, under {mount}, or it is '
            'lost with its pod.'
        )
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    arguments = [
        f'--config={_in_the_image(config_flags.get_config_filename(flags.FLAGS["config"]))}',
        f'--workdir={_WORKDIR.value}',
        *(f'--config.{key}={value}' for key, value in overrides.items()),
        *watching.handed_on(),
    ]
    made = jobset.manifest(
        _NAME.value,
        _IMAGE.value,
        jobset.hosts_of(_TARGET.value, _HOSTS.value),
        arguments,
        _CLAIM.value,
        mount,
        _GRACE.value,
        _RETRIES.value,
        _labels(),
    )
    yaml.safe_dump(made, sys.stdout, sort_keys=False)


def run() -> None:
    """Console command `sam-jax-jobset`."""
    commands.run(main)


if __name__ == '__main__':
    run()
