"""Speed, as ratios measured side by side in one run; a table, and JSON with --json=FILE.

    python -m sam_jax.benchmarks.step [--cases=digits,wrn16_4] [--rounds=10] [--json=FILE]
    python -m sam_jax.benchmarks.step --cases=wrn16_4 --rounds=4 --epochs=-1 --peers=optax,pytorch
    taskset -c 0 python -m sam_jax.benchmarks.step --cases=digits --epochs=-1 \
        --methods=periodic_sam,rst,looksam,ae_sam
    python -m sam_jax.benchmarks.step --cases=wrn16_4 --rounds=4 --epochs=-1 --replicas=8

Needs no TensorFlow and no dataset: images are random but for the digits. On an accelerator the case
wrn28_10 (batch 256, bfloat16) is added. Per case:

  step      median time of one compiled step, the kinds taking turns: SGD, SAM, SAM behind a gate
            that is shut, and on CPU SAM with JAX's own rule for convolutions
            (docs/convolutions.md);
  optax     unless --peers leaves it out: the same model with optax.contrib.sam in opaque mode, with
            one step of ascent and with two of rho / 2, and ours over each; distance is
            ||a - b|| / ||b|| of the params after two steps from the same weights on the same
            batches, ours (a) against optax's (b);
  epoch     a real run (input, augmentation, logging, one checkpoint) over steps x bare SAM step,
            the bare step being on one batch that already lies on the device, not augmented;
  pytorch   with --peers=pytorch, where it is installed: the SAM step of the same network from the
            same weights on the same batch, not augmented, in PyTorch; on CPU with as many threads,
            its images lying as they do by default and with the channels last, on a GPU with the
            channels last and compiled by torch.compile, too; median times, ours over each, and the
            distance of the params after two steps;
  methods   with --methods: these over SGD, and the gradients a step that they took, which is what
            the ratio should be: of those, too, that climb at some steps only;
  replicas  with --replicas=N: SAM with the batch cut into N replicas on one device, unrolled and
            scanned: seconds to compile, median time of a step;
  MFU       operations of convolutions and matrix products / time / peak of the device (if known).
"""

import functools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from sam_jax import (
    convolutions,
    gradients,
    replicas,
    settings,
    tables,
    train,
    train_state,
    train_step,
)
from sam_jax.experiment import Experiment
from sam_jax.settings import schema
from sam_jax.targets import hardware, operations

_CASES = flags.DEFINE_list('cases', None, 'Default: digits,wrn16_4 and, on accelerators, wrn28_10.')
_ROUNDS = flags.DEFINE_integer('rounds', 10, 'Rounds of step timing.')
_EPOCHS = flags.DEFINE_integer(
    'epochs', 0, 'Epochs of the real run; 0: 20 for digits, else 1; -1: no run.'
)
PEERS = 'optax', 'pytorch'
_PEERS = flags.DEFINE_list('peers', ['optax'], f'Whose steps are timed, too: {", ".join(PEERS)}.')
_METHODS = flags.DEFINE_list('methods', [], 'Methods to time over SGD.')
_REPLICAS = flags.DEFINE_integer('replicas', 0, 'Time the step of so many replicas; 0: do not.')
flags.register_validator(
    'peers', lambda peers: set(peers) <= set(PEERS), f'they are {", ".join(PEERS)}'
)
_JSON = flags.DEFINE_string('json', '', 'Where the figures go as JSON.')


def _config(case):
    if case == 'digits':
        _, config = settings.load('digits')
        epochs = 20
    else:
        _, config = settings.load(f'cifar:model={case}')
        config.data.name = 'fake_cifar10'
        config.batch_size = 128 if case == 'wrn16_4' else 256
        config.replica_batch_size = config.batch_size
        config.log_every_steps = 10
        epochs = 1
        if case == 'wrn28_10':
            config.model.dtype = 'bfloat16'
    config.total_epochs = max(_EPOCHS.value, 0) or epochs
    config.eval.every_epochs = 0
    # One checkpoint in the middle, as a run of usual length has one now and then.
    config.checkpoint.every_epochs = max(config.total_epochs // 2, 1)
    return config


class Stepper:
    """A compiled step with all its arguments on the device."""

    def __init__(self, config, make_step, own_state=None):
        experiment = Experiment.from_config(config, jax.devices()[:1])
        layout, dataset, self.model = experiment.layout, experiment.dataset, experiment.model
        self._batch = layout.map(
            functools.partial(_replica, layout=layout, dataset=dataset),
            in_axes=(None, 0, None, None),
            out_axes=0,
        )
        state = experiment.create_state()
        if own_state:
            hparams = train_state.HParams.from_config(config)
            state = state.replace(opt_state=own_state(config, hparams).init(state.params))
        self.state = layout.replicate(jax.tree.map(jax.numpy.copy, state))
        feed = dataset.train_feed(config.seed, 0, layout)
        if train_step.asks_for_previous(config):
            feed = train_step.paired(feed, None)
        self._arguments = layout.shard(feed), *experiment.constants
        step = make_step(self.model, config, layout, dataset)
        then = time.perf_counter()
        self._step = step.lower(self.state, *self._arguments).compile()
        self.compile_seconds = time.perf_counter() - then
        self.flops = operations.flops(jax.make_jaxpr(step)(self.state, *self._arguments))

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) that the next step trains on, NumPy, as augmented and normalised."""
        feed, arrays, hparams = self._arguments
        replica = jax.device_get(self._batch(self.state.step, feed, arrays, hparams))
        return replica['image'][0], replica['label'][0]

    def gradients_a_step(self) -> float:
        """The mean so far, of a method of ours."""
        return 1 + int(self.state.sharpness_state.evaluations) / int(self.state.step)

    def time(self, steps: int) -> float:
        """Seconds a step, over a few."""
        then = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self._step(self.state, *self._arguments)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - then) / steps


def _replica(step, feed, arrays, hparams, *, layout, dataset):
    """The examples and keys of a step's only replica."""
    return jax.tree.map(
        lambda x: x[0],
        train_step.keyed_replicas(step, feed, arrays, hparams, layout, dataset.train_batch),
    )


def _optax_step(state, feed, arrays, hparams, *, model, config, layout, dataset):
    """The same step on one replica with optax.contrib.sam in place of ours."""
    replica = _replica(state.step, feed, arrays, hparams, layout=layout, dataset=dataset)
    training = gradients.Training.from_config(config, model, hparams.weight_decay)

    def gradient(params):
        return gradients.replica_gradient(params, state.batch_stats, replica, training)[0]

    grads, aux = gradient(state.params)
    updates, opt_state = _optax_sam(config, hparams).update(
        grads, state.opt_state, state.params, grad_fn=lambda params, i: gradient(params)[0]
    )
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=aux['batch_stats'],
    ), {
        # What our step reports and optax's can.
        **aux['reported'],
        'clean_grad_norm': optax.tree.norm(grads),
        'param_norm': optax.tree.norm(state.params),
    }


def _optax_sam(config, hparams):
    descent = optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.sgd(hparams.learning_rate, config.optimizer.momentum, config.optimizer.nesterov),
    )
    steps, size = (config.sam.steps, config.sam.step_size) if 'steps' in config.sam else (1, 1.0)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(size * hparams.rho))
    return optax.contrib.sam(descent, ascent, sync_period=steps + 1, opaque_mode=True)


def _make_optax_step(model, config, layout, dataset):
    step = functools.partial(
        _optax_step, model=model, config=config, layout=layout, dataset=dataset
    )
    return layout.map(step, in_axes=(None, 0, None, None), donate_argnums=0)


def _using(config, method, **options):
    """The config with another method, its options those given or else its defaults."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        schema.set_method(changed, method)
        changed.sam.update(options)
    return changed


def _steppers(config):
    using = functools.partial(_using, config)
    steppers = {
        'sgd': Stepper(using('sgd'), train_step.make_train_step),
        'sam': Stepper(config, train_step.make_train_step),
        # Open at step 0 alone, which the first call below takes.
        'shut': Stepper(using('periodic_sam', k=10**6), train_step.make_train_step),
    }
    if 'optax' in _PEERS.value:
        two = using('multistep_sam', steps=2, step_size=0.5)
        steppers |= {
            'optax': Stepper(config, _make_optax_step, own_state=_optax_sam),
            'two': Stepper(two, train_step.make_train_step),
            'optax_two': Stepper(two, _make_optax_step, own_state=_optax_sam),
        }
    if jax.default_backend() == 'cpu':
        with convolutions.as_jax_does():
            steppers['sam_as_jax_does'] = Stepper(config, train_step.make_train_step)
    steppers |= {
        name: Stepper(using(name), train_step.make_train_step)
        for name in _METHODS.value
        if name not in steppers
    }
    for stepper in steppers.values():
        stepper.time(2)
    return steppers


def _distance(ours, theirs):
    """||a - b|| / ||b|| of two pytrees."""
    difference = jax.tree.map(lambda a, b: a - b, ours, theirs)
    return float(optax.tree.norm(difference) / optax.tree.norm(theirs))


def _step_times(steppers, rounds):
    """Median seconds a step of each, the kinds taking turns."""
    # Whole periods of the gates.
    steps = (
        5 * max(1, round(0.1 / steppers['sgd'].time(1)))
        if _METHODS.value
        else max(1, round(0.5 / steppers['sgd'].time(1)))
    )
    times = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper.time(steps))
    return {name: statistics.median(t) for name, t in times.items()}


def _against_pytorch(config, rounds):
    """Figures of our SAM step and PyTorch's, taking turns; not augmented."""
    from sam_jax.benchmarks import pytorch_peer

    config = config.copy_and_resolve_references()
    config.data.augment = 'none'
    ours = Stepper(config, train_step.make_train_step)
    variables = {'params': ours.state.params, 'batch_stats': ours.state.batch_stats}
    images, labels = ours.batch()
    forms, device = (
        (('default', 'channels_last'), 'cpu')
        if jax.default_backend() == 'cpu'
        else (('channels_last', 'compiled'), 'cuda')
    )
    steppers = {'ours': ours} | {
        form: pytorch_peer.Stepper(
            ours.model, jax.device_get(variables), images, labels, config, form, device
        )
        for form in forms
    }
    for stepper in steppers.values():
        stepper.time(2)
    expected = {
        '/'.join(k.key for k in path): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(jax.device_get(ours.state.params))[0]
    }
    figures = {'pytorch_distance': _distance(steppers[forms[0]].params(), expected)}
    steps = max(1, round(0.3 / ours.time(1)))
    times = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper.time(steps))
    medians = {name: statistics.median(t) for name, t in times.items()}
    figures['sam_not_augmented_ms'] = 1e3 * medians['ours']
    for form in forms:
        figures[f'pytorch_{form}_ms'] = 1e3 * medians[form]
        figures[f'sam_over_pytorch_{form}'] = medians['ours'] / medians[form]
    return figures


def _of_replicas(config, count, rounds):
    """Seconds to compile and a step, of the batch in `count` replicas, unrolled and scanned."""
    steppers = {}
    for loop in ('unroll', 'scan'):
        changed = config.copy_and_resolve_references()
        changed.replica_batch_size = config.batch_size // count
        changed.replica_loop = loop
        steppers[loop] = Stepper(changed, train_step.make_train_step)
        steppers[loop].time(2)
    times = {loop: [] for loop in steppers}
    for _ in range(rounds):
        for loop, stepper in steppers.items():
            times[loop].append(stepper.time(1))
    return {
        f'{count}_replicas_{loop}_{unit}': value
        for loop, stepper in steppers.items()
        for unit, value in (
            ('compile_s', stepper.compile_seconds),
            ('step_ms', 1e3 * statistics.median(times[loop])),
        )
    }


def _epoch_ratio(config, rounds):
    """Median over rounds of a real run's time over steps x bare step, timed before and after it."""
    bare_config = config.copy_and_resolve_references()
    bare_config.data.augment = 'none'
    bare = Stepper(bare_config, train_step.make_train_step)
    bare.time(2)
    steps = max(3, round(2.0 / bare.time(1)))
    ratios = []
    for _ in range(rounds):
        before = bare.time(steps)
        with tempfile.TemporaryDirectory() as workdir:
            train.train_and_evaluate(config, workdir, jax.devices()[:1])
            with open(os.path.join(workdir, 'result.json')) as f:
                seconds = config.batch_size / json.load(f)['perf/images_per_second']
        ratios.append(seconds / statistics.mean([before, bare.time(steps)]))
    return statistics.median(ratios)


def measure(case: str, rounds: int) -> dict[str, Any]:
    """Returns the figures of a case as a dict."""
    config = _config(case)
    device = jax.devices()[0]
    steppers = _steppers(config)
    ours_and_optax = {'sam': 'optax', 'two': 'optax_two'} if 'optax' in _PEERS.value else {}
    distances = {
        f'{ours}_optax_distance': _distance(
            steppers[ours].state.params, steppers[theirs].state.params
        )
        for ours, theirs in ours_and_optax.items()
    }
    times = _step_times(steppers, rounds)
    figures = {
        'case': case,
        'device': device.device_kind,
        'dtype': config.model.dtype,
        'batch_size': config.batch_size,
        'sgd_step_ms': 1e3 * times['sgd'],
        'sam_step_ms': 1e3 * times['sam'],
        'sam_over_sgd': times['sam'] / times['sgd'],
        'shut_gate_over_sgd': times['shut'] / times['sgd'],
        **{
            f'{ours}_over_optax': times[ours] / times[theirs]
            for ours, theirs in ours_and_optax.items()
        },
        **distances,
        'sam_images_per_second': config.batch_size / times['sam'],
    }
    if 'sam_as_jax_does' in times:
        figures['sam_over_sam_as_jax_does'] = times['sam'] / times['sam_as_jax_does']
    for name in _METHODS.value:
        figures[f'{name}_over_sgd'] = times[name] / times['sgd']
        figures[f'{name}_gradients'] = steppers[name].gradients_a_step()
    chip = hardware.known(device.device_kind)
    if chip:
        peak = chip.peak(config.model.dtype)
        figures['sam_mfu'] = steppers['sam'].flops / times['sam'] / peak
    if peak_memory := replicas.peak_memory(device):
        figures['peak_memory_gib'] = peak_memory / 2**30
    del steppers
    if _REPLICAS.value:
        figures.update(_of_replicas(config, _REPLICAS.value, rounds))
    if 'pytorch' in _PEERS.value and case.startswith('wrn'):
        figures.update(_against_pytorch(config, rounds))
    if _EPOCHS.value >= 0:
        figures['epoch_over_bare_steps'] = _epoch_ratio(config, rounds=5 if case == 'digits' else 1)
    return figures


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    logging.getLogger('sam_jax').setLevel(logging.WARNING)
    logging.getLogger('absl').setLevel(logging.WARNING)
    cases = _CASES.value or ['digits', 'wrn16_4'] + (
        ['wrn28_10'] if jax.default_backend() != 'cpu' else []
    )
    rows = []
    for case in cases:
        rows.append(measure(case, _ROUNDS.value))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(
        tables.markdown(
            names,
            [
                [
                    f'{row[name]:.4g}' if isinstance(row.get(name), float) else row.get(name, '')
                    for name in names
                ]
                for row in rows
            ],
        )
    )
    if _JSON.value:
        with open(_JSON.value, 'w') as f:
            json.dump(rows, f, indent=2)


if __name__ == '__main__':
    app.run(main)
