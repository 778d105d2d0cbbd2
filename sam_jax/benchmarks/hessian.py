"""What Hessian-vector products and Lanczos cost, side by side in one run.

    python -m sam_jax.benchmarks.hessian [--model=wrn16_4] [--examples=1000] [--steps=20]
    python -m sam_jax.benchmarks.hessian --peers=pyhessian,matfree   # those that are installed

Prints the median time of a product of all examples over that of a gradient of the same (rounds in
turns), the time of so many Lanczos steps, and with --peers

  pyhessian  as many products of its power iteration on the same network, in PyTorch with the same
             weights, images and batches (its own Lanczos does not run on today's PyTorch), and both
             values of v'Hv / v'v for one vector v;
  matfree    as many steps of its Lanczos with full re-orthogonalisation on the same product (of the
             first batch alone, since it wants a traced one), against ours, and both largest values.

Images are random (fake_cifar10), or the digits for --data=digits.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.flatten_util import ravel_pytree

from sam_jax import settings
from sam_jax.analysis import hessian, monitor, objective
from sam_jax.experiment import Experiment

_MODEL = flags.DEFINE_string('model', 'wrn16_4', 'A WideResNet.')
_DATA = flags.DEFINE_string('data', 'fake_cifar10', 'Data set that needs no download.')
_EXAMPLES = flags.DEFINE_integer('examples', 1000, 'How many.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 250, 'Examples computed at once.')
_STEPS = flags.DEFINE_integer('steps', 20, 'Of Lanczos.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Of gradients and products; 0 for none.')
_PEERS = flags.DEFINE_list('peers', [], 'Of pyhessian, matfree.')


def open_network() -> tuple[objective.Objective, Any]:
    """Returns (Objective, params): random weights, which is all that matters for time."""
    source = 'digits' if _DATA.value == 'digits' else 'cifar'
    _, config = settings.load(f'{source}:model={_MODEL.value}')
    config.data.name = _DATA.value
    experiment = Experiment.from_config(config, jax.devices()[:1])
    dataset = experiment.dataset
    split = monitor.chosen_examples(dataset.train, _EXAMPLES.value, 0)
    return objective.create(
        experiment.model,
        experiment.weights(experiment.create_state()),
        dataset,
        split,
        experiment.layout,
        _BATCH_SIZE.value,
    )


def _seconds(function):
    then = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - then


def batches(loss: objective.Objective) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images, normalised, and labels of the batches, as NumPy arrays."""
    for feed in loss.feeds:
        batch = jax.device_get(
            jax.jit(loss.dataset.eval_batch)(loss.arrays, jax.tree.map(lambda x: x[0], feed))
        )
        real = batch['mask'] > 0
        yield batch['image'][real], batch['label'][real]


def against_pyhessian(loss: objective.Objective, params: Any) -> None:
    """Prints the time of as many products of PyHessian, and one product of both."""
    import torch
    from pyhessian import hessian as pyhessian

    from sam_jax.benchmarks import pytorch_peer

    net = pytorch_peer.WideResNet(
        loss.model, {'params': params, 'batch_stats': loss.batch_stats}, train=False
    )
    loader = [
        (
            torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2))),
            torch.tensor(y.astype(np.int64)),
        )
        for x, y in batches(loss)
    ]
    peer = pyhessian(net, torch.nn.CrossEntropyLoss(), dataloader=_warm(net, loader), cuda=False)
    v = jax.tree.map(
        lambda x: np.random.RandomState(0).randn(*x.shape).astype(x.dtype), jax.device_get(params)
    )
    flat = ravel_pytree(v)[0]
    ours = float(flat @ ravel_pytree(loss.hessian_product(params, loss.layout.replicate(v)))[0])
    theirs, _ = peer.dataloader_hv_product(
        [torch.tensor(pytorch_peer.to_torch(x)) for x in jax.tree.leaves(v)]
    )
    print(
        f"v'Hv / v'v: ours {ours / float(flat @ flat):.8g}, "
        f'PyHessian {theirs / float(flat @ flat):.8g}'
    )
    then = time.perf_counter()
    values, _ = peer.eigenvalues(maxIter=_STEPS.value, tol=0.0)
    print(
        f'PyHessian: {_STEPS.value} products in {time.perf_counter() - then:.1f} s, power '
        f'iteration finds {values[0]:.6g}'
    )


def _warm(net, loader):
    """PyHessian reads the gradients of its network before it has computed any."""
    from torch.nn import functional

    functional.cross_entropy(net(loader[0][0]), loader[0][1]).backward()
    return loader


def against_matfree(loss: objective.Objective, params: Any) -> None:
    """Prints the times of both Lanczos on the first batch, compiled, and what they find."""
    from matfree import decomp, eig

    one = loss.of_split(loss.split.subset(np.arange(_BATCH_SIZE.value)))
    ((images, labels),) = batches(one)
    batch = {'image': images, 'label': labels, 'mask': np.ones(len(labels), np.float32)}
    start, unravel = ravel_pytree(jax.device_get(params))
    arguments = jax.device_put((start, jax.device_get(one.batch_stats), batch))

    def product(v, start, stats, batch):
        def value(w):
            return one.of_logits(one.logits(unravel(w), stats, batch), batch) / len(labels)

        return jax.jvp(jax.grad(value), (start,), (v,))[1]

    vector = jax.numpy.asarray(hessian.random_start(start.size, 0))
    largest = jax.jit(
        lambda v, *arguments: eig.eigh_partial(decomp.tridiag_sym(_STEPS.value, reortho='full'))(
            product, v, *arguments
        )[0].max()
    )
    one_product = jax.jit(product)
    theirs = float(largest(vector, *arguments))
    one_product(vector, *arguments)
    times = [_seconds(lambda: largest(vector, *arguments))]
    then = time.perf_counter()
    found = hessian.lanczos(
        lambda v: np.asarray(one_product(v, *arguments)), np.asarray(vector), _STEPS.value
    )
    times.append(time.perf_counter() - then)
    print(
        f'{_STEPS.value} steps on {len(labels)} examples: matfree {times[0]:.2f} s, largest '
        f'{theirs:.8g}; ours {times[1]:.2f} s, largest {found.eigen()[0][-1]:.8g}'
    )


def compare_products(loss: objective.Objective, params: Any, flat: hessian.Flat) -> None:
    """Prints the median time of a gradient, and of products over it."""
    vector = loss.layout.replicate(flat.unflatten(hessian.random_start(flat.size, 0)))
    steps = {
        'gradient': lambda: loss.gradient(params),
        'Hessian': lambda: loss.hessian_product(params, vector),
        'Gauss-Newton': lambda: loss.gauss_newton_product(params, vector),
    }
    for step in steps.values():
        _seconds(step)
    times = {name: [] for name in steps}
    for _ in range(_ROUNDS.value):
        for name, step in steps.items():
            times[name].append(_seconds(step))
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(
        f'gradient {medians["gradient"]:.3g} s; over it: '
        + ', '.join(
            f'{name} product {t / medians["gradient"]:.2f}'
            for name, t in medians.items()
            if name != 'gradient'
        ),
        flush=True,
    )


def main(argv: list[str]) -> None:
    """Prints the times."""
    del argv
    loss, params = open_network()
    flat = hessian.flat(loss.hessian_product, params, loss.layout)
    print(
        f'{_MODEL.value}, {flat.size:,} params, {len(loss)} examples of {_DATA.value}, '
        f'{jax.devices()[0].device_kind}',
        flush=True,
    )
    if _ROUNDS.value:
        compare_products(loss, params, flat)
    then = time.perf_counter()
    found = hessian.lanczos(flat.product, hessian.random_start(flat.size, 0), _STEPS.value)
    print(
        f'{_STEPS.value} Lanczos steps in {time.perf_counter() - then:.1f} s, largest value '
        f'{found.eigen()[0][-1]:.6g}',
        flush=True,
    )
    for peer in _PEERS.value:
        {'pyhessian': against_pyhessian, 'matfree': against_matfree}[peer](loss, params)


if __name__ == '__main__':
    app.run(main)
