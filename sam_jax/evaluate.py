"""Evaluation: exact sums over a whole split, on any number of devices."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax

from sam_jax import losses, metrics
from sam_jax.errors import UserError
from sam_jax.replicas import AXIS, Layout, paced


def eval_step(
    params: Any,
    batch_stats: Any,
    arrays: Any,
    feed: Any,
    *,
    apply_fn: Callable[..., jax.Array],
    batch_fn: Callable[..., dict[str, jax.Array]],
    top5: bool = False,
    loss: str = 'softmax',
) -> dict[str, jax.Array]:
    """Sums over one batch, over all devices of the axis; pure.

    Args:
      params, batch_stats: the model's variables.
      arrays: the split's arrays on the device; 'frozen', the model's variables of that name.
      feed: this device's row of the dataset's `eval_feeds`.
      apply_fn: the model's `apply`.
      batch_fn: (arrays, feed) -> {'image', 'label', 'mask'}.
      top5: whether to count top-5 errors too.
      loss: of `losses.LOSSES`.

    Returns:
      {'loss', 'error_rate'[, 'top5_error_rate'], 'count'}: sums, the same on all devices. The loss
      is that of the training without smoothing or penalty.
    """
    batch = batch_fn(arrays, feed)
    variables = {'params': params, 'batch_stats': batch_stats, 'frozen': arrays.get('frozen', {})}
    logits = apply_fn(variables, batch['image'], train=False)
    values = {
        'loss': losses.LOSSES[loss](logits, batch['label']),
        'error_rate': metrics.top1_error(logits, batch['label']),
    }
    if top5:
        values['top5_error_rate'] = metrics.topk_error(logits, batch['label'], 5)
    return lax.psum(metrics.masked_sums(values, batch['mask']), AXIS)


def make_eval_step(
    model: Any, layout: Layout, dataset: Any, top5: bool = False, loss: str = 'softmax'
) -> jax.stages.Wrapped:
    """Returns the evaluation step on all devices: (params, batch_stats, arrays, feed) -> sums."""
    step = functools.partial(
        eval_step, apply_fn=model.apply, batch_fn=dataset.eval_batch, top5=top5, loss=loss
    )
    return layout.map(step, in_axes=(None, None, None, 0))


def evaluate(
    step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batch_stats: Any,
    arrays: Any,
    feeds: Iterable[Any],
    layout: Layout,
) -> dict[str, float]:
    """Runs an evaluation step over all feeds of a split.

    Returns:
      {metric: mean over the split's examples} as Python floats.

    Raises:
      UserError: there are none, since all of its images are damaged.
    """
    results = (step(params, batch_stats, arrays, layout.shard(feed)) for feed in feeds)
    sums = jax.device_get(list(paced(results)))
    count = sum(float(s['count']) for s in sums)
    if not count:
        raise UserError('All images of a split to evaluate are damaged; mend the dataset.')
    return {name: sum(float(s[name]) for s in sums) / count for name in sums[0] if name != 'count'}
