"""What every method is built with: gate, ascent, second gradient, combination."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_jax.sharpness.ascent import lp_norm, move, promote
from sam_jax.sharpness.combine import Combine, perturbed
from sam_jax.sharpness.gate import Gate, always


class Method(optax.GradientTransformationExtraArgs):
    """A method: an optax transformation that also says what its training loop must provide.

    Attributes:
      init, update: as of any transformation, so that it is a link of a chain.
      point: None, or a function (state, params, **extra_args) -> params at which the gradient that
        `update` takes must be computed, in place of the params; extra_args are those of `update`.
      climbs: (state, **extra_args) -> whether the step climbs along the gradient that `update`
        takes, a bool, traced or not. Where it does not, that gradient descends. (Shake models know
        a gradient for each.) A gate that looks at the gradient itself counts as open.
      needs: names of the keyword arguments without which `update` cannot do its work.
      trajectory: None, or the `Trajectory` whose loss the training loop adds.
    """

    point: Callable | None
    climbs: Callable
    needs: frozenset
    trajectory: Any

    def __new__(cls, init, update, point=None, climbs=None, needs=(), trajectory=None):
        self = super().__new__(cls, init, update)
        self.point, self.climbs = point, climbs or (lambda state, **extra_args: False)
        self.needs, self.trajectory = frozenset(needs), trajectory
        return self


class SharpnessState(NamedTuple):
    """State of a sharpness-aware method.

    Attributes:
      count: number of updates so far, int32.
      ascent, combine, gate: states of the three parts.
      perturbation_norm: norm of the last perturbation in the norm that rho bounds; 0 where the gate
        was shut. For reports only.
      evaluations: number of gradients taken so far, besides those given, int32; a Hessian-vector
        product counts as two. For reports only.
    """

    count: jax.Array
    ascent: Any
    combine: Any
    gate: Any
    perturbation_norm: jax.Array
    evaluations: jax.Array


def sharpness_aware(
    ascent: optax.GradientTransformation,
    combine: Combine | None = None,
    gate: Gate | None = None,
    norm: Callable[[Any, Any, Any], jax.Array] | None = None,
    second_order: bool = False,
    fraction: float = 1.0,
    needs=(),
) -> Method:
    """Builds a method: gradient at w -> sharpness-aware gradient at w.

    If the gate is open: eps = ascent(g), g_p = grad_fn(w + eps), result = combine(g, g_p); else
    result = combine.skip(g). w + eps is at least float32 whatever the dtype of w. Where eps = 0
    (rho = 0, zero gradient) the result is g itself, bit for bit. Behind a shut gate the states of
    ascent and combination stay as they are; a schedule of rho still is one of the updates.

    The `update` of the result takes, besides grads, state and params, the keyword arguments
      grad_fn: params -> gradient of the same loss on the same examples with the same randomness;
      aux: optional. Then grad_fn returns (gradient, aux) with aux of this structure (losses, say),
        and update returns ((updates, perturbed_aux), state); where the gate is shut, perturbed_aux
        is the aux given. For use outside of a chain;
      ascent_grad_fn: optional, params -> gradient that the ascent climbs along, where that is not
        grad_fn's;
      selected_grad_fn: where fraction < 1, (params, fraction) -> what grad_fn returns, the gradient
        over only that fraction of the examples whose loss rises most from w to those params;
    and hands all others to the ascent and the gate, `key` for instance.

    Args:
      ascent: transformation from the gradient to eps, see `sam_jax.sharpness.ascent`.
      combine: default `combine.perturbed()`.
      gate: default `gate.always()`.
      norm: (eps, grads, params) -> the norm that rho bounds, for
        `SharpnessState.perturbation_norm`; default that of all entries together, p = 2.
      second_order: keep the term that SAM drops (SAM paper, section 3 and appendix C.4), so that
        the perturbed gradient is that of w -> L(w + eps(w)):  g_p + (d eps / d w)' g_p. The
        derivative of eps by the gradient is the ascent's own; that of the gradient by w, the
        Hessian, is applied as a Hessian-vector product of ascent_grad_fn, forward over reverse,
        which costs about two gradients.
      fraction: in (0, 1]; the part of the examples whose gradient is taken at w + eps.
      needs: what `Method.needs` says; for whoever drives the method.

    Raises (from update):
      TypeError: no grad_fn or params; or grad_fn cannot take the tree that `optax.masked` made.
    """
    ascent = optax.with_extra_args_support(ascent)
    combine = combine or perturbed()
    gate = gate or always()
    norm = norm or (lambda eps, grads, params: lp_norm(eps))

    def init(params):
        return SharpnessState(
            count=jnp.zeros((), jnp.int32),
            ascent=ascent.init(params),
            combine=combine.init(params),
            gate=gate.init(params),
            perturbation_norm=jnp.zeros((), float),
            evaluations=jnp.zeros((), jnp.int32),
        )

    def update(grads, state, params=None, *, grad_fn=None, aux=None, ascent_grad_fn=None,
               selected_grad_fn=None, **extra_args):
        _check_arguments(params, grad_fn)
        if fraction < 1 and selected_grad_fn is None:
            raise TypeError('This method takes the gradient of some examples only: tx.update(..., '
                            'selected_grad_fn=(params, fraction) -> gradient).')

        climbed = ascent_grad_fn or (
            grad_fn if aux is None else lambda params: grad_fn(params)[0])
        descended = grad_fn if fraction == 1 else (
            lambda params: selected_grad_fn(params, fraction))

        def like_grads(updates):
            return jax.tree.map(lambda g, u: u.astype(g.dtype), grads, updates)

        def open_gate(parts):
            taken = []  # an entry a gradient, while this is traced

            def counted(params):
                taken.append(1)
                return climbed(params)

            def perturb(grads, params):
                return ascent.update(grads, parts[0], params, grad_fn=counted, count=state.count,
                                     **extra_args)

            if second_order:
                eps, pull_back, ascent_state = jax.vjp(perturb, grads, params, has_aux=True)
            else:
                eps, ascent_state = perturb(grads, params)
            size = norm(eps, grads, params).astype(state.perturbation_norm.dtype)

            def gradient_at(sign):
                taken.append(1)
                result = descended(move(params, eps, sign))
                return result if aux is not None else (result, None)

            wide = jax.tree.map(promote, grads)

            def settle(perturbed_grads):
                # A selection and not a blend: a NaN of the gradient not chosen must not leak.
                return jax.tree.map(lambda g, g_p: jnp.where(size == 0, g, g_p.astype(g.dtype)),
                                    wide, perturbed_grads)

            perturbed_grads, perturbed_aux = gradient_at(combine.signs[0])
            if second_order:
                by_grads, by_params = pull_back(
                    jax.tree.map(lambda e, g_p: g_p.astype(e.dtype), eps, perturbed_grads))
                by_hessian = jax.jvp(climbed, (params,), (by_grads,))[1]
                taken.extend([1, 1])
                perturbed_grads = jax.tree.map(
                    lambda *terms: sum(terms), perturbed_grads, by_hessian, by_params)
            perturbed_grads = settle(perturbed_grads)
            if combine.signs[1:]:
                perturbed_grads = (perturbed_grads, *(
                    settle(gradient_at(sign)[0]) for sign in combine.signs[1:]))
            updates, combine_state = combine.combine(wide, perturbed_grads, parts[1], params)
            return ((like_grads(settle(updates)), perturbed_aux), (ascent_state, combine_state),
                    size, jnp.int32(len(taken)))

        def shut_gate(parts):
            updates, combine_state = combine.skip(grads, parts[1], params)
            return (like_grads(updates), aux), (parts[0], combine_state), jnp.zeros_like(
                state.perturbation_norm), jnp.int32(0)

        decision, gate_state = gate.decide(grads, state.gate, state.count, **extra_args)
        parts = (state.ascent, state.combine)
        if isinstance(decision, bool):
            result, parts, size, extra = (open_gate if decision else shut_gate)(parts)
        else:
            result, parts, size, extra = jax.lax.cond(decision, open_gate, shut_gate, parts)
        new_state = SharpnessState(
            optax.safe_increment(state.count), parts[0], parts[1], gate_state, size,
            state.evaluations + extra)
        return (result if aux is not None else result[0]), new_state

    def climbs(state, **extra_args):
        return gate.looks or gate.decide(None, state.gate, state.count, **extra_args)[0]

    if fraction < 1:
        needs = {*needs, 'selected_grad_fn'}
    return Method(init, update, climbs=climbs, needs=needs)


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def _check_arguments(params, grad_fn):
    if grad_fn is None or params is None:
        raise TypeError(
            'A sharpness-aware update needs the params and a gradient function: '
            'tx.update(grads, state, params, grad_fn=grad_fn).')
    masked = any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
    if masked and not getattr(grad_fn, 'fills_masked', False):
        raise TypeError(
            'Inside optax.masked a sharpness-aware update sees only a part of the params: pass '
            'grad_fn=sharpness.fill_masked(grad_fn, params).')


def fill_masked(grad_fn, params):
    """Makes grad_fn usable inside `optax.masked`.

    The masked transformation perturbs only its own part of the params; the function returned fills
    the rest in from `params`, unperturbed, and returns the gradient of the part.

    Args:
      grad_fn: function from the full params to their gradient.
      params: the full params.
    """

    def filled(part):
        full = jax.tree.map(
            lambda x, w: w if _is_masked(x) else x, part, params, is_leaf=_is_masked)
        return jax.tree.map(
            lambda x, g: x if _is_masked(x) else g, part, grad_fn(full), is_leaf=_is_masked)

    filled.fills_masked = True
    return filled
