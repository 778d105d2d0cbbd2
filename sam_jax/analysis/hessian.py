"""The Hessian's spectrum by products alone: Lanczos, stochastic quadrature, Hutchinson's trace.

Products are those of `objective.Objective`, in float32 on the devices. What Lanczos makes of them,
the tridiagonal matrix and its eigenvalues, is in float64 on the host, where its vectors lie too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import linalg

from sam_jax import metrics, rngs
from sam_jax.replicas import Layout

# Of the Hessian and a flat vector.
Product = Callable[[np.ndarray], np.ndarray]

# A remainder this small beside the matrix is rounding: the Krylov space is exhausted.
_EXHAUSTED = 1e-6


class Flat(NamedTuple):
    """A product of pytrees as one of flat vectors.

    Attributes:
      product: (n,) float32 NumPy vector -> the same.
      unflatten: such a vector -> pytree of NumPy arrays.
      size: n.
    """

    product: Any
    unflatten: Any
    size: int


def flat(product: Callable[[Any, Any], Any], params: Any, layout: Layout) -> Flat:
    """Returns a product (params, vector) -> vector of pytrees as a `Flat`."""
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])

    def unflatten(vector):
        parts = np.split(vector, ends[:-1])
        return jax.tree.unflatten(
            structure, [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves)]
        )

    def of_flat(vector):
        result = product(params, layout.replicate(unflatten(vector)))
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(result))])

    return Flat(of_flat, unflatten, int(ends[-1]))


class Tridiagonal(NamedTuple):
    """Q'HQ = T after m steps of Lanczos.

    Attributes:
      diagonal: (m,) float64.
      off_diagonal: (m - 1,) float64.
      remainder: norm of what the last product adds to the space; 0 if nothing.
      basis: Q', float32 (m, n).
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    remainder: float
    basis: np.ndarray

    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (eigenvalues ascending, eigenvectors of T in columns)."""
        return linalg.eigh_tridiagonal(self.diagonal, self.off_diagonal)


def lanczos(
    product: Product,
    start: np.ndarray,
    steps: int,
    enough: Callable[[Tridiagonal], bool] = lambda so_far: False,
) -> Tridiagonal:
    """Lanczos with full re-orthogonalisation, twice in each step.

    Args:
      product: (n,) -> (n,), symmetric.
      start: (n,), not zero.
      steps: at most that many products; fewer if the space is exhausted before.
      enough: Tridiagonal so far -> whether to stop; called after each step.

    Returns:
      Tridiagonal.

    Raises:
      FloatingPointError: a product is not finite.
    """
    start = np.asarray(start)
    dtype = np.result_type(start.dtype, np.float32)
    steps = min(steps, start.size)
    basis = np.zeros((steps, start.size), dtype)
    basis[0] = start / np.linalg.norm(start.astype(np.float64))
    diagonal, off_diagonal, largest = [], [], 0.0
    for j in range(steps):
        w = np.asarray(product(basis[j]), dtype)
        if not np.isfinite(w).all():
            raise FloatingPointError(f'Product {j + 1} of Lanczos is not finite.')
        diagonal.append(np.dot(basis[j].astype(np.float64), w.astype(np.float64)))
        known = basis[: j + 1]
        for _ in range(2):
            w = w - (known @ w) @ known
        remainder = float(np.linalg.norm(w.astype(np.float64)))
        largest = max(largest, abs(diagonal[-1]), remainder)
        if remainder <= _EXHAUSTED * largest:
            remainder = 0.0
        found = Tridiagonal(np.array(diagonal), np.array(off_diagonal), remainder, known)
        if enough(found) or not remainder or j + 1 == steps:
            return found
        off_diagonal.append(remainder)
        basis[j + 1] = w / remainder


class Eigenpairs(NamedTuple):
    """Largest eigenvalues first.

    Attributes:
      values: (k,) float64.
      vectors: (k, n) float32, of length 1.
      residuals: (k,), ||H v - value v||: an eigenvalue of H is at most that far from each value.
      steps: products made.
      lowest: the least Ritz value, which bounds the least eigenvalue from above.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    steps: int
    lowest: float


def top_eigenpairs(
    product: Product,
    size: int,
    k: int = 5,
    steps: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Eigenpairs:
    """The k (algebraically) largest eigenvalues and their vectors, by Lanczos.

    Args:
      product: (n,) -> (n,), symmetric.
      size: n.
      k: how many; fewer where n is smaller.
      steps: at most that many products.
      tolerance: enough is when all k residuals are at most tolerance * |largest|; 0 for never.
      seed: of the start, uniform on the sphere.
      on_step: called with the number of products made.

    Raises:
      ValueError: k exceeds steps.
      FloatingPointError: a product is not finite.
    """
    if not 1 <= k <= steps:
        raise ValueError(f'k is {k}; it must be at least 1 and at most the {steps} steps.')

    def top(found):
        values, vectors = found.eigen()
        residuals = found.remainder * np.abs(vectors[-1])
        return values[::-1], vectors[:, ::-1][:, :k], residuals[::-1][:k]

    def enough(found):
        on_step(len(found.diagonal))
        if len(found.diagonal) < k or not tolerance:
            return False
        values, _, residuals = top(found)
        return residuals.max() <= tolerance * abs(values[0])

    found = lanczos(product, random_start(size, seed), steps, enough)
    values, vectors, residuals = top(found)
    return Eigenpairs(
        values[:k],
        vectors.T.astype(found.basis.dtype) @ found.basis,
        residuals,
        len(found.diagonal),
        float(values[-1]),
    )


def random_start(size: int, seed: int, probe: int = 0) -> np.ndarray:
    """Returns a vector of independent normal numbers, float32 (n,): the same on every machine."""
    key = rngs.key(seed, 'lanczos', probe)
    return np.asarray(jax.random.normal(key, (size,), 'float32'))


class Density(NamedTuple):
    """The spectral density as weighted points, those of each probe summing to 1.

    Attributes:
      nodes, weights: float64 (probes, steps).
    """

    nodes: np.ndarray
    weights: np.ndarray

    def on(self, grid: np.ndarray, sigma: float) -> np.ndarray:
        """The density on a grid, each point widened to a normal one of deviation sigma."""
        nodes, weights = self.nodes.ravel(), self.weights.ravel() / len(self.nodes)
        z = (np.asarray(grid)[:, None] - nodes) / sigma
        return np.exp(-0.5 * z**2) @ weights / (sigma * np.sqrt(2 * np.pi))

    def moment(self, power: int) -> tuple[float, float]:
        """Returns (mean of lambda^power over the eigenvalues, its standard error over probes)."""
        each = np.sum(self.weights * self.nodes**power, axis=1)
        return float(each.mean()), metrics.standard_error(each)


def density(
    product: Product,
    size: int,
    probes: int = 4,
    steps: int = 50,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Density:
    """The spectral density by stochastic Lanczos quadrature (Ghorbani et al., arXiv 1901.10159).

    A probe z with Lanczos' T = U diag(nodes) U' gives z' f(H) z / z'z = sum_i U_1i^2 f(nodes_i),
    exact for polynomials f of degree up to 2 steps - 1, and its mean over probes is tr f(H) / n.

    Args:
      product, size: as of `top_eigenpairs`.
      probes: number of independent normal starts.
      steps: products of each.
      seed: of the probes.
      on_step: called with the number of products made.
    """
    nodes, weights = np.zeros((2, probes, min(steps, size)))
    for i in range(probes):

        def enough(so_far, i=i):
            on_step(i * steps + len(so_far.diagonal))
            return False

        found = lanczos(product, random_start(size, seed, i + 1), steps, enough)
        values, vectors = found.eigen()
        # Of an exhausted space there are fewer points; the rest keeps the weight 0.
        nodes[i, : len(values)], weights[i, : len(values)] = values, vectors[0] ** 2
    return Density(nodes, weights)


class Trace(NamedTuple):
    """tr H, an estimate.

    Attributes:
      mean, standard_error: of all params.
      layers: {name of the parameter: (mean, standard error)} of the diagonal blocks.
    """

    mean: float
    standard_error: float
    layers: dict


def trace(
    product: Callable[[Any, Any], Any],
    params: Any,
    layout: Layout,
    probes: int = 20,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trace:
    """The trace by Hutchinson: the mean of z'Hz over z with independent entries +-1.

    z_l'(Hz)_l of one layer's entries has the trace of its diagonal block as its mean.

    Args:
      product: (params, vector) -> vector, pytrees on the devices.
      params: where, on the devices.
      layout: replicas.Layout.
      probes: how many z, two or more.
      seed: of the probes.
      on_step: called with the number of products made.
    """
    names = [
        '/'.join(str(getattr(k, 'key', k)) for k in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    leaves, structure = jax.tree.flatten(jax.device_get(params))
    samples = np.zeros((probes, len(leaves)))
    for i in range(probes):
        keys = jax.random.split(rngs.key(seed, 'hutchinson', i), len(leaves))
        z = [np.asarray(jax.random.rademacher(k, x.shape, x.dtype)) for k, x in zip(keys, leaves)]
        hz = jax.tree.leaves(
            jax.device_get(product(params, layout.replicate(jax.tree.unflatten(structure, z))))
        )
        samples[i] = [np.sum(a * b, dtype=np.float64) for a, b in zip(z, hz)]
        on_step(i + 1)
    total = samples.sum(axis=1)
    return Trace(
        float(total.mean()),
        metrics.standard_error(total),
        {name: (float(x.mean()), metrics.standard_error(x)) for name, x in zip(names, samples.T)},
    )
