"""Fixed points z = f(z), and their gradients (deep equilibrium models, arXiv:1909.01377).

A state z is a tuple of arrays [N, ...], in float32 or float64. Examples are solved by themselves:
sums are over all that an example has, and one that is done keeps its value whatever its neighbours
still need. Each solver returns the iterate with the smallest residual that it has met.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

State = tuple[jax.Array, ...]
_TINY = 1e-9  # added to |f(z)| in a relative residual


class Solver(NamedTuple):
  """How an equation z = f(z) is solved.

  Attributes:
    name: "broyden" or "anderson".
    iterations: steps at most, each of which evaluates f once; one more is at the start.
    stop: "relative", "absolute" or "fixed"; see `config.model.stop`.
    tolerance: of the residual.
    history: iterates that Anderson combines.
    ridge: of its least squares, over the mean square of its residuals.
    damping: share of f(z) in what it combines.
  """

  name: str
  iterations: int
  stop: str = "relative"
  tolerance: float = 1e-3
  history: int = 6
  ridge: float = 1e-4
  damping: float = 1.0


class Solution(NamedTuple):
  """What a solver returns.

  Attributes:
    z: the best iterate.
    residual: [N], |f(z) - z| of that; over |f(z)| unless the solver stops by the absolute one.
    iterations: int32 [N], steps until each example was done.
  """

  z: State
  residual: jax.Array
  iterations: jax.Array


class _Progress(NamedTuple):
  step: jax.Array
  z: State
  g: State  # f(z) - z
  memory: Any
  best: Solution
  active: jax.Array  # bool [N]


# (memory, z, f(z) - z, steps taken) -> next z, memory
_Advance = Callable[[Any, State, State, jax.Array], tuple[State, Any]]


def solve(f: Callable[[State], State], z0: State, solver: Solver) -> Solution:
  """Return a fixed point of f; not to be differentiated, see `fixed_point`.

  Args:
    f: function of a state, of each example by itself.
    z0: where to start.
    solver: how.
  """
  shapes = [x.shape for x in z0]

  def whole(rows: State) -> State:
    return tuple(x.reshape(shape) for x, shape in zip(rows, shapes, strict=True))

  # As rows, states and what is kept of them have no last axis of a few channels, which a TPU would
  # pad to 128.
  found = _solve(lambda rows: _rows(f(whole(rows))), _rows(z0), solver)
  return found._replace(z=whole(found.z))


def _solve(f: Callable[[State], State], z0: State, solver: Solver) -> Solution:
  advance, memory = {"broyden": _broyden, "anderson": _anderson}[solver.name](solver, z0)
  fixed = solver.stop == "fixed"

  def residual(z: State, g: State) -> jax.Array:
    size = jnp.sqrt(dot(g, g))
    if solver.stop == "absolute":
      return size
    value = add(z, g)
    return size / (jnp.sqrt(dot(value, value)) + _TINY)

  def unfinished(residual: jax.Array) -> jax.Array:
    return jnp.isfinite(residual) & (fixed | (residual >= solver.tolerance))

  def step(now: _Progress) -> _Progress:
    with jax.named_scope("solver"):
      z, memory = advance(now.memory, now.z, now.g, now.step)
      z = _where(now.active, z, now.z)
    value = f(z)
    with jax.named_scope("solver"):
      g = subtract(value, z)
      found = residual(z, g)
      better = now.active & (found < now.best.residual)
      best = Solution(
        _where(better, z, now.best.z),
        jnp.where(better, found, now.best.residual),
        now.best.iterations + now.active,
      )
      return _Progress(now.step + 1, z, g, memory, best, now.active & unfinished(found))

  g0 = subtract(f(z0), z0)
  first = residual(z0, g0)
  start = Solution(z0, first, jnp.zeros(first.shape, jnp.int32))
  progress = _Progress(jnp.int32(0), z0, g0, memory, start, unfinished(first))
  if fixed:
    return jax.lax.fori_loop(0, solver.iterations, lambda _, now: step(now), progress).best
  return jax.lax.while_loop(
    lambda now: (now.step < solver.iterations) & jnp.any(now.active), step, progress
  ).best


def _broyden(solver: Solver, z0: State) -> tuple[_Advance, Any]:
  """Return Broyden's good method: an estimate -I + U V^T of the inverse Jacobian of f(z) - z.

  Every step adds a column to U and V, which are stored in whole.
  """
  columns = max(1, solver.iterations - 1)
  empty = tuple(jnp.zeros((columns, *x.shape), x.dtype) for x in z0)

  def advance(memory: Any, z: State, g: State, step: jax.Array) -> tuple[State, Any]:
    left, right, z_before, g_before = memory
    # In the first step dz is 0, and with it the row: there is nothing to learn yet.
    dz, dg = subtract(z, z_before), subtract(g, g_before)
    row = subtract(_combine(_products(left, dz), right), dz)  # dz^T (-I + U V^T)
    change = subtract(_combine(_products(right, dg), left), dg)  # (-I + U V^T) dg
    scale = dot(row, dg)
    usable = jnp.abs(scale) > jnp.finfo(scale.dtype).tiny
    inverse = jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)
    column = tuple(x * _spread(inverse, x) for x in subtract(dz, change))
    slot = jnp.maximum(step - 1, 0)
    left, right = _store(left, column, slot), _store(right, row, slot)
    update = subtract(g, _combine(_products(right, g), left))
    return add(z, update), (left, right, z, g)

  return advance, (empty, empty, z0, z0)


def _anderson(solver: Solver, z0: State) -> tuple[_Advance, Any]:
  """Return Anderson's method: the combination of the last iterates with the least residual.

  Weights a minimise |sum_i a_i (f(z_i) - z_i)|^2 + ridge * |a|^2, where they sum to 1.
  """
  history = min(solver.history, solver.iterations)
  empty = tuple(jnp.zeros((history, *x.shape), x.dtype) for x in z0)

  def advance(memory: Any, z: State, g: State, step: jax.Array) -> tuple[State, Any]:
    iterates, residuals = memory
    slot = step % history
    iterates, residuals = _store(iterates, z, slot), _store(residuals, g, slot)
    known = (jnp.arange(history) <= step).astype(g[0].dtype)
    gram = jnp.stack(
      [_products(residuals, tuple(x[i] for x in residuals)) for i in range(history)]
    ).transpose(2, 0, 1)
    mean = jnp.trace(gram, axis1=1, axis2=2) / jnp.sum(known)
    ridge = solver.ridge * jnp.where(mean > 0, mean, 1)
    weights = _solve_symmetric(
      gram + ridge[:, None, None] * jnp.eye(history, dtype=gram.dtype), known
    )
    weights = (weights / jnp.sum(weights, axis=1, keepdims=True)).T
    step_by = _combine(solver.damping * weights, residuals)
    return add(_combine(weights, iterates), step_by), (iterates, residuals)

  return advance, (empty, empty)


def _solve_symmetric(matrix: jax.Array, right: jax.Array) -> jax.Array:
  """Return x [N, m] of matrix x = right, for a few positive definite matrices [N, m, m].

  By elimination in the order of rows, without a call of a library, which the compiler would not
  split over devices.
  """
  n, m, _ = matrix.shape
  whole = jnp.concatenate([matrix, jnp.broadcast_to(right[None, :, None], (n, m, 1))], axis=2)
  for i in range(m):
    row = whole[:, i] / whole[:, i, i, None]
    whole = (whole - whole[:, :, i, None] * row[:, None]).at[:, i].set(row)
  return whole[:, :, m]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fixed_point(
  f: Callable[[Any, State], State], forward: Solver, backward: Solver, args: Any, z0: State
) -> Solution:
  """Return a fixed point of z = f(args, z), whose gradient to args is the implicit one.

  For a cotangent w of z the gradient solves u = u J + w, where J is the Jacobian of f to z at the
  fixed point. What the backward pass keeps is args and z, however many iterations there are.
  Residual and iterations have no gradient.

  Args:
    f: function of args and a state; it closes over no array.
    forward: solver of the fixed point.
    backward: of its gradient.
    args: tree of floating point arrays.
    z0: where to start.
  """
  del backward
  return solve(functools.partial(f, args), z0, forward)


def _fixed_point_forward(
  f: Callable[[Any, State], State], forward: Solver, backward: Solver, args: Any, z0: State
) -> tuple[Solution, Any]:
  solution = fixed_point(f, forward, backward, args, z0)
  return solution, (args, solution.z)


def _fixed_point_backward(
  f: Callable[[Any, State], State], forward: Solver, backward: Solver, kept: Any, wanted: Any
) -> tuple[Any, State]:
  del forward
  _, pull = jax.vjp(f, *kept)
  nothing = tuple(jnp.zeros_like(x) for x in wanted.z)
  u = solve(lambda u: add(pull(u)[1], wanted.z), nothing, backward).z
  return pull(u)[0], nothing


fixed_point.defvjp(_fixed_point_forward, _fixed_point_backward)


def unroll(
  f: Callable[[Any, State], State], layers: int, damping: float, args: Any, z0: State
) -> Solution:
  """Return what f makes of z0, layer by layer, with the ordinary gradient.

  Args:
    f: as in `fixed_point`.
    layers: how often.
    damping: share of f(z) in each layer; the rest is z.
    args: as in `fixed_point`.
    z0: where to start.

  Returns:
    The last state, with the relative change in the last layer as its residual.
  """

  def layer(z: State, _: None) -> tuple[State, jax.Array]:
    change = subtract(f(args, z), z)
    new = tuple(x + damping * y for x, y in zip(z, change, strict=True))
    value = add(z, change)
    residual = jnp.sqrt(dot(change, change)) / (jnp.sqrt(dot(value, value)) + _TINY)
    return new, jax.lax.stop_gradient(residual)

  z, residuals = jax.lax.scan(layer, z0, length=layers)
  return Solution(z, residuals[-1], jnp.full(residuals.shape[1:], layers, jnp.int32))


def jacobian_loss(
  f: Callable[[Any, State], State], args: Any, z: State, key: jax.Array
) -> jax.Array:
  """Return an estimate of |J|^2 per value of z, J the Jacobian of f to z (arXiv:2106.14342).

  Its gradient goes to args; z is a point like any other.

  Args:
    f: as in `fixed_point`.
    args: as in `fixed_point`.
    z: where J is.
    key: of the random vector.
  """
  keys = jax.random.split(key, len(z))
  probe = tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, z, strict=True))
  _, pull = jax.vjp(functools.partial(f, args), jax.lax.stop_gradient(z))
  (product,) = pull(probe)
  return jnp.sum(dot(product, product)) / sum(x.size for x in z)


def add(a: State, b: State) -> State:
  """Return a + b."""
  return tuple(x + y for x, y in zip(a, b, strict=True))


def subtract(a: State, b: State) -> State:
  """Return a - b."""
  return tuple(x - y for x, y in zip(a, b, strict=True))


def dot(a: State, b: State) -> jax.Array:
  """Return the inner products of examples, [N]."""
  return functools.reduce(
    jnp.add, [jnp.sum(x * y, axis=range(1, x.ndim)) for x, y in zip(a, b, strict=True)]
  )


def _products(many: State, one: State) -> jax.Array:
  """Return the inner products of `one` with each of `many` [m, N, ...], as [m, N]."""
  return functools.reduce(
    jnp.add, [jnp.sum(x * y, axis=range(2, x.ndim)) for x, y in zip(many, one, strict=True)]
  )


def _combine(weights: jax.Array, many: State) -> State:
  """Return the sum of `many` [m, N, ...] by weights [m, N]."""
  return tuple(jnp.sum(_spread(weights, x) * x, axis=0) for x in many)


def _store(many: State, one: State, slot: jax.Array) -> State:
  return tuple(
    jax.lax.dynamic_update_index_in_dim(x, y, slot, 0) for x, y in zip(many, one, strict=True)
  )


def _rows(z: State) -> State:
  """Return a state with all values of an example in one axis."""
  return tuple(x.reshape(len(x), -1) for x in z)


def _where(condition: jax.Array, a: State, b: State) -> State:
  return tuple(jnp.where(_spread(condition, x), x, y) for x, y in zip(a, b, strict=True))


def _spread(values: jax.Array, like: jax.Array) -> jax.Array:
  """Give values [N], or [m, N], the axes of `like`."""
  return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
