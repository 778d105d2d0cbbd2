"""A method as a link of an optax chain, and what a caller hands it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32

from sam_jax.sharpness.combine import Correction
from sam_jax.sharpness.protocol import Evaluation, Loss, Method, Now


class SharpnessState(NamedTuple):
    """State of a method as a link.

    Attributes:
      count: number of updates so far, int32.
      memory: the method's own state.
      perturbation_norm: norm of the last perturbation in the norm that rho bounds; 0 where there
        was none. For reports only.
      evaluations: gradients taken so far besides one a step, int32; a Hessian-vector product counts
        as two. For reports only.
    """

    count: Int32[ArrayLike, '']
    memory: Any
    perturbation_norm: Float[Array, '']
    evaluations: Int32[Array, '']


class Link(optax.GradientTransformationExtraArgs):
    """A method as an optax transformation: a chain and the train step take the same object.

    Attributes:
      init, update: as of any transformation, see `as_optax`.
      gate_norm: whether the method has a gate that looks at the gradient. A training loop of
        several groups then computes all gradients first and gives their norm.
      previous: whether it takes gradients on the batch of the step before.
      trajectory: None, or the `Trajectory` whose loss the training loop adds.
    """

    update: Callable[..., tuple[Any, Any]]  # optax's takes no None and gives no Report
    gate_norm: bool
    previous: bool
    trajectory: Any

    def __new__(cls, init, update, gate_norm=False, previous=False, trajectory=None):
        self = super().__new__(cls, init, update)
        self.gate_norm, self.previous, self.trajectory = gate_norm, previous, trajectory
        return self


def as_optax(method: Method, **asks) -> Link:
    """Makes a method a link of an optax chain.

    The `update` of the result takes grads, state and params and the keyword arguments
      grad_fn: params -> gradient of the same loss on the same examples with the same randomness;
      loss: in place of grad_fn, where the method wants more than gradients: a `Loss`, such as
        `from_loss_fn` makes;
      with_report: True returns ((updates, Report), state), for use outside of a chain;
    and whatever else of `Now` the method needs. With grad_fn the gradient at the params is the one
    given. A `loss` computes it itself, since more is asked of it than a gradient; and a method that
    wants its gradient at another place does not look at the one given either. (A compiler leaves
    away what nobody looks at.)

    The updates have the dtype of grads. A memory that would not be finite stays what it was, so
    that a bad step does not spoil the steps to come; a `Correction` is of its step alone.

    Args:
      method: the method.
      **asks: of `Link`.

    Raises (from update):
      TypeError: something is missing that the method needs; or grad_fn cannot take the tree that
        `optax.masked` made.
    """

    def init(params):
        return SharpnessState(
            jnp.zeros((), jnp.int32),
            method.init(params),
            jnp.zeros((), float),
            jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, *, grad_fn=None, loss=None, with_report=False, **given):
        loss = _loss(updates, params, grad_fn, loss)
        result, memory, report = method.step(loss, params, state.memory, Now(state.count, given))
        report = report if report.cosines else loss.compared(report, result)
        result = jax.tree.map(
            lambda u, like: u.astype(like.dtype), result, params if updates is None else updates
        )
        new_state = SharpnessState(
            optax.safe_increment(state.count),
            _if_finite(memory, state.memory),
            jnp.asarray(report.norm, state.perturbation_norm.dtype),
            state.evaluations + (loss.taken - 1) + report.evaluations,
        )
        return ((result, report) if with_report else result), new_state

    return Link(init, update, **asks)


def _loss(grads, params, grad_fn, loss):
    if params is None or (grad_fn is None and loss is None):
        raise TypeError(
            'A sharpness-aware update needs the params and a gradient function: '
            'tx.update(grads, state, params, grad_fn=grad_fn).'
        )
    masked = any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
    if masked and not getattr(loss or grad_fn, 'fills_masked', False):
        raise TypeError(
            'Inside optax.masked a sharpness-aware update sees only a part of the params: pass '
            'grad_fn=sharpness.fill_masked(grad_fn, params), or the same of loss.'
        )
    if loss is not None:
        return loss.uncounted()
    assert grad_fn is not None  # as was seen above
    loss = Loss(
        lambda params, climb=False, **more: (
            _known_of('grad_fn', more) or Evaluation(grad_fn(params))
        )
    )
    return loss if grads is None else loss.knowing(params, Evaluation(grads))


def _known_of(who, more):
    """Raises TypeError if a method asks for more than the one who made its loss can know."""
    if more:
        raise TypeError(
            f'This method asks the loss for {", ".join(more)}, which {who} cannot tell: '
            'tx.update(..., loss=...) wants sharpness.from_network(...) for cotangents_of, and a '
            'sharpness.Loss of your own for the rest.'
        )


def from_loss_fn(loss_fn: Callable[[optax.Params], Float[Array, '']]) -> Loss:
    """Returns the `Loss` of a function params -> scalar, for methods that also want values."""

    def evaluate(params, climb=False, **more):
        del climb
        _known_of('a loss function', more)
        value, grads = jax.value_and_grad(loss_fn)(params)
        return Evaluation(grads, value)

    return Loss(evaluate)


def from_network(
    outputs_fn: Callable[[optax.Params], Any], loss_of_outputs: Callable[[Any], Float[Array, '']]
) -> Loss:
    """Returns the `Loss` of params -> outputs -> scalar, for `functional_sam` and all of above.

    Args:
      outputs_fn: params -> outputs of the network for the batch, any pytree.
      loss_of_outputs: outputs -> scalar.
    """

    def evaluate(params, climb=False, cotangents_of=None, **more):
        del climb
        _known_of('a network', more)
        outputs, pull_back = jax.vjp(outputs_fn, params)
        value, cotangents = jax.value_and_grad(loss_of_outputs)(outputs)
        if cotangents_of is not None:
            cotangents = jax.tree.map(lambda c, z: c.astype(z.dtype), cotangents_of.aux, outputs)
        return Evaluation(pull_back(cotangents)[0], value, aux=cotangents)

    return Loss(evaluate)


def _if_finite(new, old):
    """`new`, or `old` where an entry became NaN or infinite; corrections are new in any case."""

    def is_correction(x):
        return isinstance(x, Correction)

    now, structure = jax.tree.flatten(new, is_leaf=is_correction)
    before = jax.tree.leaves(old, is_leaf=is_correction)
    kept = [(a, b) for a, b in zip(now, before) if not is_correction(a)]
    bad = [
        jnp.any(~jnp.isfinite(a) & jnp.isfinite(b))
        for a, b in kept
        if jnp.issubdtype(jnp.result_type(a), jnp.inexact)
    ]
    if not bad:
        return new
    spoilt = functools.reduce(jnp.logical_or, bad)
    return jax.tree.unflatten(
        structure, [a if is_correction(a) else jnp.where(spoilt, b, a) for a, b in zip(now, before)]
    )


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def fill_masked(grad_fn: Any, params: optax.Params) -> Any:
    """Makes grad_fn, or a `Loss`, usable inside `optax.masked`.

    The masked transformation perturbs only its own part of the params; the function returned fills
    the rest in from `params`, unperturbed, and returns the gradient of the part.

    Args:
      grad_fn: function from the full params to their gradient; or a Loss.
      params: the full params.
    """

    def full(part):
        return jax.tree.map(
            lambda x, w: w if _is_masked(x) else x, part, params, is_leaf=_is_masked
        )

    def part_of(grads, part):
        return jax.tree.map(lambda x, g: x if _is_masked(x) else g, part, grads, is_leaf=_is_masked)

    def evaluate(part, **which):
        evaluation = grad_fn.evaluate(full(part), **which)
        return evaluation._replace(grads=part_of(evaluation.grads, part))

    filled: Any = (
        Loss(evaluate)
        if isinstance(grad_fn, Loss)
        else (lambda part: part_of(grad_fn(full(part)), part))
    )
    filled.fills_masked = True
    return filled
