"""How long the SAM step of every full-size model takes to compile, and the memory it needs.

    python -m sam_jax.benchmarks.compile [--models=wrn28_10,...] [--remat] [--cache=DIR]

Traces and compiles the whole train step (two gradients, clipping, momentum) on one device for one
replica, without ever allocating the model, and prints a row a model as soon as it is known:

  kept              what one gradient keeps from its forward for its backward pass, parameters
                    included: what --remat is for, whatever XLA makes of it
  trace, compile    seconds; compile is XLA's part, without a cache unless --cache names one
  temporary         XLA's memory for what the step computes in between
  arguments         state, batch and hyper-parameters; the step gives the state's memory back
"""

import sys
import time
import types

import jax
import jax.numpy as jnp
from absl import app, flags

from sam_jax import models, replicas, tables, train_state, train_step
from sam_jax.models.layers import Network
from sam_jax.settings import schema

# Model -> (side of the image, classes, examples of a replica as in the paper).
MODELS = {
    'wrn28_10': (32, 100, 32),
    'wrn40_10': (32, 10, 32),
    'shake_shake_26_2x96d': (32, 100, 32),
    'pyramidnet272': (32, 100, 32),
    'pyramidnet272_shakedrop': (32, 100, 32),
    'resnet32': (32, 10, 32),
    'resnet56': (32, 10, 32),
    'resnet110': (32, 10, 32),
    **{f'resnet{n}': (224, 1000, 32) for n in (18, 34, 50, 101, 152, 200)},
    **{
        f'efficientnet-b{i}': (side, 1000, 16)
        for i, side in enumerate((224, 240, 260, 300, 380, 456, 528, 600, 672))
    },
    'efficientnet-l2': (800, 1000, 4),
    'efficientnet-l2-475': (475, 1000, 4),
}

_MODELS = flags.DEFINE_list('models', list(MODELS), 'Models to report.')
_REMAT = flags.DEFINE_bool('remat', False, 'With config.model.remat.')
_CACHE = flags.DEFINE_string('cache', '', 'Folder of a persistent compilation cache.')


def kept(model: Network, images: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes that the gradient at a batch of images' shape keeps between its passes."""
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def backward(variables, x):
        rngs = {name: jax.random.key(0) for name in ('dropout', 'shake', 'stochastic_depth')}

        def loss(params):
            return model.apply(
                {**variables, 'params': params}, x, train=True, mutable=['batch_stats'], rngs=rngs
            )[0].sum()

        return jax.vjp(loss, variables['params'])[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, variables, images))
    return sum(x.size * x.dtype.itemsize for x in residuals)


def report(name: str) -> tuple[float, ...]:
    """Returns (batch, side, GiB kept, seconds to trace, to compile, GiB of temporaries, of
    arguments)."""
    side, classes, batch = MODELS[name]
    config = schema.default_config()
    schema.set_model(config, name)
    config.batch_size = config.replica_batch_size = batch
    config.model.remat = _REMAT.value
    layout, _ = replicas.make_layout(batch, batch, 1, devices=jax.devices()[:1])
    model = models.from_config(config.model, classes)
    dataset = types.SimpleNamespace(
        num_train_examples=1000 * batch, train_batch=lambda arrays, feed, *_: feed
    )
    gib_kept = kept(model, jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)) / 2**30
    began = time.perf_counter()
    state = jax.eval_shape(lambda: train_state.create_train_state(config, model, (side, side, 3)))
    feed = {
        'image': jax.ShapeDtypeStruct((1, 1, batch, side, side, 3), jnp.float32),
        'label': jax.ShapeDtypeStruct((1, 1, batch), jnp.int32),
    }
    step = train_step.make_train_step(model, config, layout, dataset)
    lowered = step.lower(state, feed, {}, train_state.HParams.from_config(config))
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return (
        batch,
        side,
        gib_kept,
        traced - began,
        time.perf_counter() - traced,
        memory.temp_size_in_bytes / 2**30,
        memory.argument_size_in_bytes / 2**30,
    )


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    if _CACHE.value:
        jax.config.update('jax_compilation_cache_dir', _CACHE.value)
    rows = []
    for name in _MODELS.value:
        batch, side, *figures = report(name)
        jax.clear_caches()  # gigabytes of programs that nobody will run
        rows.append((name, batch, side, *(f'{x:.3g}' for x in figures)))
        print(*rows[-1], file=sys.stderr, flush=True)
    print(
        tables.markdown(
            (
                'model',
                'batch',
                'image',
                'kept (GiB)',
                'trace (s)',
                'compile (s)',
                'temporary (GiB)',
                'arguments (GiB)',
            ),
            rows,
        )
    )


if __name__ == '__main__':
    app.run(main)
