"""A run on a Kubernetes cluster: the manifest of a JobSet, https://jobset.sigs.k8s.io, v1alpha2.

Every host of a target runs one pod with one process. On TPUs GKE tells JAX where the others are; on
GPUs process 0 is found by the name that JobSet gives its pod. A pod that is asked to go saves and
ends with status 143. Then, or when its node was taken away, all pods start again, as often as that
happens, and the run goes on from its checkpoint; after another failure so often as `retries` says.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sam_jax.errors import UserError
from sam_jax.targets import hardware

# GKE's label of each kind of TPU, the number of sides of its shapes, and the largest shape.
TPUS = {
    'v4': ('tpu-v4-podslice', 3, (12, 16, 16)),
    'v5e': ('tpu-v5-lite-podslice', 2, (16, 16)),
    'v5p': ('tpu-v5p-slice', 3, (16, 16, 24)),
    'v6e': ('tpu-v6e-slice', 2, (16, 16)),
}
FLAT_SHAPES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CHIPS_ON_A_HOST = 4

WORKER, CONTAINER, PORT = 'worker', 'train', 8476
EXIT_PREEMPTED = 143


class Hosts(NamedTuple):
    """What the hosts of a target are.

    Attributes:
      number: of hosts.
      devices: chips or GPUs of each.
      resource: what Kubernetes calls a device.
      selector: labels of their nodes.
    """

    number: int
    devices: int
    resource: str
    selector: dict[str, str]


def hosts_of(target: str, number: int = 0) -> Hosts:
    """Returns the hosts of 'tpu:KIND:SHAPE' or 'gpu:KIND:HOSTSxGPUS'.

    A TPU host has 4 chips, but for 1x1, and for 2x4 of v5e and v6e, which is one host of 8 or two
    hosts of 4.

    Args:
      target: such as 'tpu:v5e:4x4' or 'gpu:h100:2x8'; as sam-jax-compile takes it.
      number: of hosts, to be compared with the shape; 0 for what the shape says.

    Raises:
      UserError: no such target, or it has another number of hosts.
    """
    match = re.fullmatch(r'(tpu|gpu):([\w-]+):(\d+(?:x\d+)*)', target)
    kinds: Mapping[str, Any] = {'tpu': TPUS, 'gpu': hardware.GPUS}.get(
        match[1] if match else '', {}
    )
    if not match or match[2] not in kinds:
        raise UserError(
            f'--target is {target!r}; it must be tpu:KIND:SHAPE or gpu:KIND:HOSTSxGPUS with one of '
            f'the kinds {", ".join((*TPUS, *hardware.GPUS))}, such as tpu:v5e:4x4 or gpu:h100:2x8.'
        )
    platform, kind, shape = match.groups()
    sides = [int(side) for side in shape.split('x')]
    if platform == 'gpu':
        possible = _gpu_hosts(target, sides)
        resource, selector = 'nvidia.com/gpu', {}
    else:
        possible = _tpu_hosts(target, kind, shape, sides)
        resource = 'google.com/tpu'
        selector = {
            'cloud.google.com/gke-tpu-accelerator': TPUS[kind][0],
            'cloud.google.com/gke-tpu-topology': shape,
        }
    hosts = number or possible[0]
    if hosts not in possible:
        raise UserError(f'--hosts is {number}; {target} has {" or ".join(map(str, possible))}.')
    return Hosts(hosts, math.prod(sides) // hosts, resource, selector)


def _gpu_hosts(target, sides):
    if len(sides) > 2 or not all(sides):
        raise UserError(
            f'--target is {target!r}; of GPUs it must say how many a host has, gpu:h100:8, or on '
            'how many hosts, gpu:h100:2x8.'
        )
    return (1 if len(sides) == 1 else sides[0],)


def _tpu_hosts(target, kind, shape, sides):
    _, dimensions, largest = TPUS[kind]
    if dimensions == 2:
        good, allowed = shape in FLAT_SHAPES, f'one of {", ".join(FLAT_SHAPES)}'
    else:
        # Cubes of 4x4x4 chips, or a part of one.
        good = (
            len(sides) == 3
            and sides == sorted(sides)
            and (
                all(x % 4 == 0 < x for x in sides)
                or tuple(sides) in ((2, 2, 2), (2, 2, 4), (2, 4, 4))
            )
            and all(x <= most for x, most in zip(sides, largest))
        ) or sides == [2, 2, 1]
        most = 'x'.join(map(str, largest))
        allowed = f'2x2x1, 2x2x2, 2x2x4, 2x4x4, or three multiples of 4 in order, up to {most}'
    if not good:
        raise UserError(f'--target is {target!r}; the shape of a {kind} must be {allowed}.')
    chips = math.prod(sides)
    if f'{kind}:{shape}' in hardware.EIGHT_ON_A_HOST:
        return 1, 2
    return (max(1, chips // CHIPS_ON_A_HOST),)


def manifest(
    name: str,
    image: str,
    hosts: Hosts,
    arguments: Sequence[str],
    claim: str,
    mount: str = '/data',
    grace_seconds: int = 120,
    retries: int = 3,
    selector: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns a JobSet of one run, as YAML or JSON takes it.

    Args:
      name: of the JobSet.
      image: of the container; it holds this package.
      hosts: of `hosts_of`.
      arguments: of sam-jax-train, without those that say which process of how many it is.
      claim: name of a PersistentVolumeClaim that all pods may write to.
      mount: where its volume is.
      grace_seconds: between SIGTERM and SIGKILL.
      retries: restarts after failures that are no preemption.
      selector: further labels of the nodes.

    Raises:
      UserError: a name that Kubernetes refuses.
    """
    # The longest name made of it is that of a pod's host.
    longest = 63 - len(f'-{WORKER}-0-{hosts.number - 1}')
    if not re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', name) or len(name) > longest:
        raise UserError(
            f'--name is {name!r}; it must be of at most {longest} lower-case letters, digits and '
            '-, begin with a letter and not end with -.'
        )
    tpu = hosts.resource == 'google.com/tpu'
    several = hosts.number > 1
    if several and tpu:
        joining = ['--distributed']
    elif several:
        joining = [
            f'--coordinator_address={name}-{WORKER}-0-0.{name}:{PORT}',
            f'--num_processes={hosts.number}',
            '--process_id=$(PROCESS_ID)',
        ]
    else:
        joining = []
    volumes: list[tuple[str, str, dict[str, Any]]] = [
        ('data', mount, {'persistentVolumeClaim': {'claimName': claim}})
    ]
    if not tpu:  # NCCL's; the default of 64 MiB is too little
        volumes.append(('shm', '/dev/shm', {'emptyDir': {'medium': 'Memory'}}))
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container = {
        'name': CONTAINER,
        'image': image,
        'command': ['sam-jax-train'],
        # Kubernetes replaces $(NAME), and $$ by $.
        'args': [*(a.replace('$', '$$') for a in arguments), *joining],
        'env': [{'name': 'PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': index}}}],
        'resources': {'limits': {hosts.resource: hosts.devices}},
        'volumeMounts': [{'name': n, 'mountPath': path} for n, path, _ in volumes],
    }
    pod = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': grace_seconds,
        'nodeSelector': {**hosts.selector, **(selector or {})},
        'containers': [container],
        'volumes': [{'name': n, **source} for n, _, source in volumes],
    }
    exits = {'containerName': CONTAINER, 'operator': 'In', 'values': [EXIT_PREEMPTED]}
    job = {
        'completionMode': 'Indexed',
        'parallelism': hosts.number,
        'completions': hosts.number,
        'backoffLimit': 0,
        # By its reason, PodFailurePolicy, the JobSet knows a preemption.
        'podFailurePolicy': {
            'rules': [
                {
                    'action': 'FailJob',
                    'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}],
                },
                {'action': 'FailJob', 'onExitCodes': exits},
            ]
        },
        'template': {'spec': pod},
    }
    metadata: dict[str, Any] = {'name': name}
    if several and tpu:  # a slice of its own, all of it
        topology = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
        metadata['annotations'] = {topology: 'cloud.google.com/gke-nodepool'}
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata,
        'spec': {
            'network': {'enableDNSHostnames': True, 'subdomain': name},
            'failurePolicy': {
                'maxRestarts': retries,
                'rules': [
                    {
                        'name': 'preempted',
                        'action': 'RestartJobSetAndIgnoreMaxRestarts',
                        'onJobFailureReasons': ['PodFailurePolicy'],
                    }
                ],
            },
            'replicatedJobs': [{'name': WORKER, 'replicas': 1, 'template': {'spec': job}}],
        },
    }
