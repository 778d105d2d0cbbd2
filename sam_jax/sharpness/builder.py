"""Methods of three parts: when to climb (gate), where to (ascent), what to make of it (combine)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sam_jax.sharpness import combine as combinations
from sam_jax.sharpness import gate as gates
from sam_jax.sharpness.as_optax import Link, as_optax
from sam_jax.sharpness.protocol import Evaluation, Loss, Method, Now, Report, gated, unless_still
from sam_jax.sharpness.trees import lp_norm


class Parts(NamedTuple):
    """The states of the three parts."""

    ascent: Any
    combine: Any
    gate: Any


def sharpness_aware(
    ascent: optax.GradientTransformation,
    combine: combinations.Combine | None = None,
    gate: gates.Gate | None = None,
    norm: Callable[[Any, Any, Any], Float[Array, '']] | None = None,
) -> Link:
    """Builds a method: gradient at w -> sharpness-aware gradient at w.

    If the gate is open: eps = ascent(g), g_p = gradient at w + eps, result = combine(g, g_p); else
    result = combine.skip(g). w + eps is at least float32 whatever the dtype of w. Where eps = 0
    (rho = 0, zero gradient) the result is g itself, bit for bit. Behind a shut gate the states of
    ascent and combination stay as they are; a schedule of rho still is one of the updates.

    Args:
      ascent: transformation from the gradient to eps, see `sam_jax.sharpness.ascent`. It is given
        the keyword arguments of the update that are in `Now.given`.
      combine: default `combine.perturbed()`.
      gate: default `gate.always()`.
      norm: (eps, grads, params) -> the norm that rho bounds, for
        `SharpnessState.perturbation_norm`; default that of all entries together, p = 2.

    Returns:
      A `Link`, see `as_optax`.
    """
    ascent = optax.with_extra_args_support(ascent)
    combine = combine or combinations.perturbed()
    gate = gate or gates.always()
    norm = norm or (lambda eps, grads, params: lp_norm(eps))

    def init(params):
        return Parts(ascent.init(params), combine.init(params), gate.init(params))

    def step(loss, params, state, now):
        looked_at, opens, gate_state = _decide(gate, loss, params, state.gate, now)

        def climb(loss, clean):
            eps, ascent_state = climbed(ascent, loss, clean, params, state.ascent, now)
            there = loss.moved(params, eps, clean, linear=combine.linear)
            grads, combine_state = combine.combine(clean.grads, there.grads, state.combine, params)
            return (
                unless_still(eps, grads, clean),
                (ascent_state, combine_state),
                Report(clean, there, norm(eps, clean.grads, params).astype(float)),
            )

        def stay(loss, clean):
            del loss
            grads, combine_state = combine.skip(clean.grads, state.combine, params)
            return grads, (state.ascent, combine_state), Report(clean, clean, jnp.zeros((), float))

        grads, parts, report = gated(opens, climb, stay, loss, params, looked_at)
        return grads, Parts(parts[0], parts[1], gate_state), report

    return as_optax(Method(init, step), gate_norm=gate.looks)


def _decide(gate, loss, params, state, now):
    """Returns (clean Evaluation if the gate looks at it, else None; decision; gate's state)."""
    clean = loss(params, climb=True) if gate.looks else None
    grads = None if clean is None else clean.grads
    return clean, *gate.decide(grads, state, now.count, **now.given)


def climbed(
    ascent: optax.GradientTransformationExtraArgs,
    loss: Loss,
    clean: Evaluation,
    params: optax.Params,
    state: Any,
    now: Now,
) -> tuple[Any, Any]:
    """Returns (eps, the ascent's new state): an ascent from an Evaluation at the params."""
    return ascent.update(
        clean.grads,
        state,
        params,
        count=now.count,
        grad_fn=lambda w: loss(w, climb=True).grads,
        **now.given,
    )
