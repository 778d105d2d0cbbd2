"""What Hessian-vector products and Lanczos cost, side by side in one run.

    python scripts/benchmark_hessian.py [--model=wrn16_4] [--examples=1000] [--steps=20]
    python scripts/benchmark_hessian.py --peers=pyhessian,matfree   # those that are installed

Prints the median time of a product of all examples over that of a gradient of the same (rounds in
turns), the time of so many Lanczos steps, and with --peers

  pyhessian  as many products of its power iteration on the same network, in PyTorch with the same
             weights, images and batches (its own Lanczos does not run on today's PyTorch), and both
             values of v'Hv / v'v for one vector v;
  matfree    as many steps of its Lanczos with full re-orthogonalisation on the same product (of the
             first batch alone, since it wants a traced one), against ours, and both largest values.

Images are random (fake_cifar10), or the digits for --data=digits.
"""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from absl import app, flags
from jax.flatten_util import ravel_pytree

from configs import cifar, digits
from sam_jax import data, models, replicas, train_step
from sam_jax.analysis import hessian, monitor, objective

_MODEL = flags.DEFINE_string('model', 'wrn16_4', 'A WideResNet.')
_DATA = flags.DEFINE_string('data', 'fake_cifar10', 'Data set that needs no download.')
_EXAMPLES = flags.DEFINE_integer('examples', 1000, 'How many.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 250, 'Examples computed at once.')
_STEPS = flags.DEFINE_integer('steps', 20, 'Of Lanczos.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Of gradients and products; 0 for none.')
_PEERS = flags.DEFINE_list('peers', [], 'Of pyhessian, matfree.')


def open_network():
    """Returns (Objective, params): random weights, which is all that matters for time."""
    source = digits if _DATA.value == 'digits' else cifar
    config = source.get_config(f'model={_MODEL.value}')
    config.data.name = _DATA.value
    layout, _ = replicas.make_layout(1, 1, 1, devices=jax.devices()[:1])
    dataset = data.load_dataset(config.data)
    model = models.from_config(config.model, dataset.num_classes)
    state = train_step.create_train_state(config, model, dataset.image_shape)
    split = monitor.chosen_examples(dataset.train, _EXAMPLES.value, 0)
    return objective.create(
        model, {'params': state.params, 'batch_stats': state.batch_stats}, dataset, split, layout,
        _BATCH_SIZE.value)


def seconds(function):
    then = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - then


def batches(loss):
    """The images, normalised, and labels of the batches, as NumPy arrays."""
    for feed in loss.feeds:
        batch = jax.device_get(jax.jit(loss.dataset.eval_batch)(
            loss.arrays, jax.tree.map(lambda x: x[0], feed)))
        real = batch['mask'] > 0
        yield batch['image'][real], batch['label'][real]


def against_pyhessian(loss, params):
    """Prints the time of as many products of PyHessian, and one product of both."""
    import pytorch_peer
    import torch
    from pyhessian import hessian as pyhessian

    net = pytorch_peer.WideResNet(
        loss.model, {'params': params, 'batch_stats': loss.batch_stats}, train=False)
    loader = [(torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2))),
               torch.tensor(y.astype(np.int64))) for x, y in batches(loss)]
    peer = pyhessian(net, torch.nn.CrossEntropyLoss(), dataloader=_warm(net, loader), cuda=False)
    v = jax.tree.map(lambda x: np.random.RandomState(0).randn(*x.shape).astype(x.dtype),
                     jax.device_get(params))
    flat = ravel_pytree(v)[0]
    ours = float(flat @ ravel_pytree(loss.hessian_product(params, loss.layout.replicate(v)))[0])
    theirs, _ = peer.dataloader_hv_product(
        [torch.tensor(pytorch_peer.to_torch(x)) for x in jax.tree.leaves(v)])
    print(f"v'Hv / v'v: ours {ours / float(flat @ flat):.8g}, "
          f'PyHessian {theirs / float(flat @ flat):.8g}')
    then = time.perf_counter()
    values, _ = peer.eigenvalues(maxIter=_STEPS.value, tol=0.0)
    print(f'PyHessian: {_STEPS.value} products in {time.perf_counter() - then:.1f} s, power '
          f'iteration finds {values[0]:.6g}')


def _warm(net, loader):
    """PyHessian reads the gradients of its network before it has computed any."""
    from torch.nn import functional
    functional.cross_entropy(net(loader[0][0]), loader[0][1]).backward()
    return loader


def against_matfree(loss, params):
    """Prints the times of both Lanczos on the first batch, compiled, and what they find."""
    from matfree import decomp, eig

    one = loss.of_split(loss.split.subset(np.arange(_BATCH_SIZE.value)))
    (images, labels), = batches(one)
    batch = {'image': images, 'label': labels, 'mask': np.ones(len(labels), np.float32)}
    start, unravel = ravel_pytree(jax.device_get(params))
    arguments = jax.device_put((start, jax.device_get(one.batch_stats), batch))

    def product(v, start, stats, batch):
        def value(w):
            return one.of_logits(one.logits(unravel(w), stats, batch), batch) / len(labels)

        return jax.jvp(jax.grad(value), (start,), (v,))[1]

    vector = jax.numpy.asarray(hessian.random_start(start.size, 0))
    largest = jax.jit(lambda v, *arguments: eig.eigh_partial(decomp.tridiag_sym(
        _STEPS.value, reortho='full'))(product, v, *arguments)[0].max())
    one_product = jax.jit(product)
    theirs = float(largest(vector, *arguments))
    one_product(vector, *arguments)
    times = [seconds(lambda: largest(vector, *arguments))]
    then = time.perf_counter()
    found = hessian.lanczos(
        lambda v: np.asarray(one_product(v, *arguments)), np.asarray(vector), _STEPS.value)
    times.append(time.perf_counter() - then)
    print(f'{_STEPS.value} steps on {len(labels)} examples: matfree {times[0]:.2f} s, largest '
          f'{theirs:.8g}; ours {times[1]:.2f} s, largest {found.eigen()[0][-1]:.8g}')


def compare_products(loss, params, flat):
    """Prints the median time of a gradient, and of products over it."""
    vector = loss.layout.replicate(flat.unflatten(hessian.random_start(flat.size, 0)))
    steps = {'gradient': lambda: loss.gradient(params),
             'Hessian': lambda: loss.hessian_product(params, vector),
             'Gauss-Newton': lambda: loss.gauss_newton_product(params, vector)}
    for step in steps.values():
        seconds(step)
    times = {name: [] for name in steps}
    for _ in range(_ROUNDS.value):
        for name, step in steps.items():
            times[name].append(seconds(step))
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(f'gradient {medians["gradient"]:.3g} s; over it: ' + ', '.join(
        f'{name} product {t / medians["gradient"]:.2f}' for name, t in medians.items()
        if name != 'gradient'), flush=True)


def main(argv):
    del argv
    loss, params = open_network()
    flat = hessian.flat(loss.hessian_product, params, loss.layout)
    print(f'{_MODEL.value}, {flat.size:,} params, {len(loss)} examples of {_DATA.value}, '
          f'{jax.devices()[0].device_kind}', flush=True)
    if _ROUNDS.value:
        compare_products(loss, params, flat)
    then = time.perf_counter()
    found = hessian.lanczos(flat.product, hessian.random_start(flat.size, 0), _STEPS.value)
    print(f'{_STEPS.value} Lanczos steps in {time.perf_counter() - then:.1f} s, largest value '
          f'{found.eigen()[0][-1]:.6g}', flush=True)
    for peer in _PEERS.value:
        {'pyhessian': against_pyhessian, 'matfree': against_matfree}[peer](loss, params)


if __name__ == '__main__':
    app.run(main)
