"""What a method is: it asks the loss for the gradients that it wants, and makes one of them.

    init(params) -> state
    step(loss, params, state, now) -> (grads, state, Report)

SAM's step, whole:

    clean = loss(params, climb=True)
    eps, state = ball.update(clean.grads, state, params, count=now.count)
    there = loss.moved(params, eps, clean)
    return there.grads, state, Report(clean, there, lp_norm(eps))

`as_optax.py` makes such a pair a link of an optax chain; a method never sees where its loss comes
from, be it a user's gradient function or a group of replicas of the train step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32

from sam_jax.sharpness.trees import lp_norm, move, promote


class Evaluation(NamedTuple):
    """What the loss tells of one point.

    Attributes:
      grads: the gradient, a pytree like the params; a `Loss` gives it in at least float32.
      value: the loss whose gradient it is, a scalar, in at least float32; None where nobody told.
      reported: what reports are told of the point besides: any pytree of scalars.
      aux: whatever else came out, of any structure.
      cosines: of `Loss.moved`, see there; {} elsewhere.
    """

    grads: Any
    value: Float[ArrayLike, ''] | None = None
    reported: Any = None
    aux: Any = ()
    cosines: Any = {}


class Report(NamedTuple):
    """What a step saw, for those who watch it.

    Attributes:
      clean: Evaluation at the params, or at the place that the method has in place of them. Behind
        a gate its gradient's norm is in place of the gradient.
      perturbed: Evaluation at the perturbed params; `clean` where none was made. Behind a gate only
        its value and what it reports.
      norm: of the perturbation, in the norm that rho bounds; 0 where there was none.
      evaluations: gradients that the loss has not counted, since they were asked for on one of two
        ways, int32.
      cosines: {name: scalar}, of `Loss.compared`; {} where nobody compares, or nothing was moved.
    """

    clean: Evaluation
    perturbed: Evaluation
    norm: float | Float[Array, '']
    evaluations: int | Int32[Array, ''] = 0
    cosines: Any = {}


class Method(NamedTuple):
    """A method.

    Attributes:
      init: params -> state, any pytree.
      step: (Loss, params, state, Now) -> (grads, state, Report). Pure.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, Report]]


class Loss:
    """The loss of a step as a method sees it: a function of the params, counting what it costs.

    Every point is asked about on the same examples with the same randomness. `taken` is the number
    of gradients asked for so far, a Python int, since it is counted while the step is traced.

    Args:
      evaluate: (params, **which) -> Evaluation, with `which` of the keywords of a call.
      part: the same of a part of the examples, where the caller averages over all parts what comes
        of the step; None where there is one part. See `linear` of a call.
      compare: (pytree, pytree) -> their cosine, where the caller wants cosines in the Report; None
        where not. Either may be of a part.
    """

    def __init__(
        self,
        evaluate: Callable[..., Evaluation],
        part: Callable[..., Evaluation] | None = None,
        compare: Callable[[Any, Any], Float[Array, '']] | None = None,
    ) -> None:
        self.evaluate, self.part, self.compare, self.taken = evaluate, part, compare, 0

    def __call__(self, params: Any, linear: bool = False, **which) -> Evaluation:
        """Evaluates the loss.

        Args:
          params: pytree.
          linear: True where the step's result is linear in this gradient, with factors that do not
            depend on it, and no memory depends on it. Then that of a part will do, since a mean of
            results over the parts is the result of the mean: devices that share a group need not
            exchange this gradient.
          **which: nothing for the gradient that descends, or one of
            climb: True (or a traced bool) for that of the loss itself, along which an ascent goes.
              The two differ for models that know a gradient for each (shake models);
            previous: True for the examples of the step before;
            most_risen: (fraction, since), for the gradient of only that fraction of the examples
              whose loss has risen most since that Evaluation;
            cotangents_of: an Evaluation, whose derivative by the network's outputs is pulled back
              here in place of the one here.
        """
        self.taken += 1
        evaluate = self.part if linear and self.part is not None else self.evaluate
        evaluation = evaluate(params, **which)
        value = evaluation.value
        return evaluation._replace(
            grads=jax.tree.map(promote, evaluation.grads),
            value=None if value is None else promote(jnp.asarray(value)),
        )

    def moved(
        self, params: Any, eps: Any, clean: Evaluation, sign: float = 1.0, **which
    ) -> Evaluation:
        """Evaluates at params + sign eps; the gradient where eps = 0 is `clean`'s, bit for bit.

        Where the caller compares, the `cosines` are those of the clean gradient with eps ('ascent')
        and with the gradient there ('perturbed').
        """
        there = self(move(params, eps, sign), **which)
        grads, cosines = unless_still(eps, there.grads, clean), {}
        if self.compare is not None:
            cosines = {
                'ascent': self.compare(clean.grads, eps),
                'perturbed': self.compare(clean.grads, grads),
            }
        return there._replace(grads=grads, cosines=cosines)

    def compared(self, report: Report, grads: Any) -> Report:
        """Adds the cosines of what moved, and of the gradient there with the result ('descent')."""
        there = report.perturbed
        if self.compare is None or not there.cosines:
            return report
        told = {**there.cosines, 'descent': self.compare(there.grads, grads)}
        return report._replace(cosines=told)

    def hessian_product(self, params: Any, vector: Any) -> Any:
        """The Hessian of the climbed loss times a vector, forward over reverse: two gradients."""
        self.taken += 2
        vector = jax.tree.map(lambda v, w: v.astype(w.dtype), vector, params)
        return jax.jvp(lambda w: self.evaluate(w, climb=True).grads, (params,), (vector,))[1]

    def knowing(self, params: Any, clean: Evaluation) -> 'Loss':
        """The same loss, of which the Evaluation at these very params is there already.

        Asking for it counts as any other: it was a gradient too.
        """

        def evaluate(at, **which):
            if at is params and not which.keys() - {'climb'}:
                return clean
            return self.evaluate(at, **which)

        return Loss(evaluate, self.part, self.compare)

    def uncounted(self) -> 'Loss':
        """The same loss, of which nothing has been asked yet."""
        return Loss(self.evaluate, self.part, self.compare)


class Now:
    """What a step is given besides loss, params and state.

    Attributes:
      count: number of updates so far, int32; schedules are read there.
      given: the keyword arguments of the update, of which methods know
        key: a JAX key of the step (of the group, where there are several);
        gate_key: one that all groups share;
        gate_norm: a gradient's norm that all groups share, for gates that look at it;
        learning_rate: of this step;
        momentum: the optimizer's, before the step, a pytree;
        added_loss: True where the caller's loss has the term that `saf` and `mesa` are;
        corrected: True where the caller adds `add_correction` to the optimizer's updates.
    """

    _SAY = {
        'key': 'needs a key: tx.update(..., key=jax.random.key(step)).',
        'learning_rate': 'needs the learning rate of the step: tx.update(..., learning_rate=...).',
        'momentum': "needs the optimizer's momentum, before the step: tx.update(..., "
        'momentum=optax.tree.get(opt_state, "trace")).',
        'added_loss': 'is a term of the loss, sam_jax.losses.trajectory, and leaves the gradient '
        'as it is: add the term to your loss, and say so by '
        'tx.update(..., added_loss=True).',
    }

    def __init__(self, count: Int32[ArrayLike, ''], given: dict[str, Any]) -> None:
        self.count, self.given = count, given

    def need(self, name: str, who: str = 'This method') -> Any:
        """Returns what was given by that name.

        Raises:
          TypeError: nothing was; says what is to be done.
        """
        value = self.given.get(name)
        if value is None or value is False:
            raise TypeError(f'{who} {self._SAY[name]}')
        return value


def unless_still(eps: Any, grads: Any, clean: Evaluation) -> Any:
    """Returns grads, and the clean gradient bit for bit where eps = 0.

    A selection and not a blend: a NaN of the gradient not chosen must not leak.
    """
    still = lp_norm(eps) == 0
    return jax.tree.map(lambda g, u: jnp.where(still, g, u.astype(g.dtype)), clean.grads, grads)


def gated(
    opens: Any,
    climb: Callable,
    stay: Callable,
    loss: Loss,
    params: Any,
    clean: Evaluation | None = None,
) -> tuple[Any, Any, Report]:
    """Goes one of two ways.

    On NVIDIA GPUs the clean gradient is computed on both ways, where the gate did not look at it.
    Their host waits for a traced decision: at the beginning of a step it has nothing else to do,
    within one the GPU would wait for it then. Elsewhere it is computed before, and compiled once.

    Args:
      opens: a Python bool decides while tracing; a traced one becomes a `lax.cond` and must be the
        same on all devices.
      climb, stay: (loss, clean Evaluation) -> (grads, state, Report), of equal structures.
      loss: of the step; each way has its own, which counts what is asked for on that way.
      params: where the clean gradient is.
      clean: None, or the Evaluation there, which is counted already.

    Returns:
      (grads, state, Report) of the way gone.
    """

    def way(step, climbs, clean):
        own = loss.uncounted()
        # A gradient that nothing climbs along descends; shake models tell the two apart.
        grads, state, report = step(own, own(params, climb=climbs) if clean is None else clean)
        there = report.perturbed
        if not there.cosines:  # nothing was moved; both ways tell as much
            still = {'ascent': jnp.zeros((), float), 'perturbed': jnp.ones((), float)}
            there = there._replace(cosines=still)
        cosines = own.compared(report._replace(perturbed=there), grads).cosines
        return grads, state, report._replace(evaluations=jnp.int32(own.taken), cosines=cosines)

    if isinstance(opens, bool):
        return way(climb if opens else stay, opens, clean)

    def choose(clean):
        def behind(step, climbs):
            def go():
                grads, state, report = way(step, climbs, clean)
                # Gradients and what a network keeps would be copied out of the branch for nothing.
                there = report.perturbed._replace(grads=(), aux=(), cosines={})
                told = _with_norm(report.clean) if clean is None else None
                return grads, state, report._replace(clean=told, perturbed=there)

            return go

        grads, state, report = jax.lax.cond(opens, behind(climb, True), behind(stay, False))
        return grads, state, report if clean is None else report._replace(clean=clean)

    def choose_after_clean():
        first = loss.uncounted()
        clean = first(params, climb=opens)
        grads, state, report = choose(clean)
        taken = report.evaluations + first.taken
        return grads, state, report._replace(clean=_with_norm(clean), evaluations=taken)

    if clean is not None:
        return choose(clean)
    return jax.lax.platform_dependent(cuda=lambda: choose(None), default=choose_after_clean)


def _with_norm(clean):
    """The Evaluation with its gradient's norm in place of the gradient."""
    return clean._replace(grads=lp_norm(clean.grads))
