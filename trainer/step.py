"""The two functions that run on the devices: pure, to be jitted over the mesh."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from trainer import augment
from trainer import mesh as mesh_lib
from trainer.models import norm
from trainer.state import TrainState

Batch = dict[str, jax.Array]

# One small vector a step is one transfer to the host instead of six.
METRICS = ("loss", "top1", "grad_norm", "param_norm", "learning_rate", "request")

# What a host may ask for at any step. The step returns the highest of all hosts, so that they agree without another word.
NOTHING, SAVE, STOP = range(3)


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
  """Returns train_step(state, batch, requests) -> (state, metrics).

  The batch holds `image` uint8 [N, S, S, 3] and `label` int32 [N]; requests is int32 [devices], what the host of each
  device asks for; metrics is float32 (float64 if the model is) [len(METRICS)] in that order, over the whole global batch.

  With `config.accumulation_steps` = A the batch is computed in A micro-batches, one after the other, and the gradient
  is their mean. Micro-batch a is the rows a, a + A, a + 2A and so on: every device splits its own rows, and which
  examples share a micro-batch does not depend on the number of devices. BN statistics are of groups within a
  micro-batch, and the running averages see the micro-batches in order.
  """
  dtype = jnp.dtype(config.model.dtype)
  accumulation_steps = config.accumulation_steps

  def loss_fn(
    params: Any, batch_stats: Any, batch: Batch
  ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    model.train()
    logits = model(augment.normalize(batch["image"], config.data, dtype))
    targets = optax.smooth_labels(
      jax.nn.one_hot(batch["label"], logits.shape[-1], dtype=logits.dtype), config.label_smoothing
    )
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    top1 = jnp.mean(jnp.argmax(logits, -1) == batch["label"], dtype=logits.dtype)
    return loss, (top1, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

  def gradients(params: Any, batch_stats: Any, batch: Batch, shards: Any) -> tuple[Any, Any]:
    """Returns (loss, top1, gradients), each a mean over the batch, and the new BN statistics of each group."""

    def one(batch_stats: Any, batch: Batch) -> tuple[Any, Any]:
      (loss, (top1, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, batch_stats, batch
      )
      # Left whole, the sum over devices is moved behind the loop over micro-batches by the compiler of TPUs; in shards
      # it is scattered in each round.
      return (loss, top1, mesh_lib.scatter(grads, shards)), batch_stats

    def accumulate(carry: tuple[Any, Any], batch: Batch) -> tuple[tuple[Any, Any], None]:
      total, batch_stats = carry
      result, batch_stats = one(batch_stats, batch)
      return (jax.tree.map(jnp.add, total, result), batch_stats), None

    if accumulation_steps == 1:
      return one(batch_stats, batch)
    micro_batches = {
      name: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)
      for name, x in batch.items()
    }
    shapes = jax.eval_shape(one, batch_stats, jax.tree.map(lambda x: x[0], micro_batches))
    # Averages start the same in all groups; the mean over groups may wait until the last micro-batch, being linear.
    start = (
      jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0]),
      jax.tree.map(lambda x, new: jnp.broadcast_to(x, new.shape), batch_stats, shapes[1]),
    )
    (total, batch_stats), _ = jax.lax.scan(accumulate, start, micro_batches)
    return jax.tree.map(lambda x: x / accumulation_steps, total), batch_stats

  def train_step(
    state: TrainState, batch: Batch, requests: jax.Array
  ) -> tuple[TrainState, jax.Array]:
    # Parameters are whole where they meet activations, and in shards where they are updated (sharding_rules). Said at
    # both places, the compiler gathers and scatters parameters, and never splits a convolution by channel.
    shards = mesh_lib.state_shardings(config, mesh, {"opt_state": state.params})["opt_state"]
    whole = jax.lax.with_sharding_constraint(state.params, mesh_lib.replicated(mesh))
    (loss, top1, grads), batch_stats = gradients(whole, state.batch_stats, batch, shards)
    batch_stats = norm.average_groups(batch_stats)
    params = jax.lax.with_sharding_constraint(state.params, shards)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = state.ema
    if ema is not None:
      # While few steps are averaged the window grows with them, else the random start would linger (Adam's bias).
      decay = jnp.minimum(
        config.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step)
      ).astype(loss.dtype)
      ema = optax.incremental_update(
        {"params": params, "batch_stats": batch_stats}, ema, 1.0 - decay
      )
    metrics = jnp.stack(
      [
        loss,
        top1,
        optax.tree.norm(grads),
        optax.tree.norm(params),
        schedule(state.step),
        jnp.max(requests),
      ]
    )
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics.astype(
      loss.dtype
    )

  return train_step


def make_eval_step(
  graphdef: nnx.GraphDef, config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Any, Any, Batch, Batch, jax.Array], Batch]:
  """Returns eval_step(params, batch_stats, totals, batch, requests) -> totals.

  The batch holds `image` uint8 [N, S, S, 3], `label` int32 [N] and `mask` bool [N], False on padding. Totals are
  scalars over all real examples so far: `loss` float32 sum (no smoothing), `top1`, `top5`, `examples` int32 counts, and
  `request` int32, the highest request of any host.
  """
  dtype = jnp.dtype(config.model.dtype)

  def eval_step(
    params: Any, batch_stats: Any, totals: Batch, batch: Batch, requests: jax.Array
  ) -> Batch:
    params = jax.lax.with_sharding_constraint(params, mesh_lib.replicated(mesh))
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    model.eval()
    logits = model(augment.normalize(batch["image"], config.data, dtype))
    mask, labels = batch["mask"], batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # How many classes come before the right one, equal logits in the order of classes. For a sort the compiler would
    # bring all logits to every device.
    own, before = (
      jnp.take_along_axis(logits, labels[:, None], 1),
      jnp.arange(logits.shape[-1]) < labels[:, None],
    )
    rank = jnp.sum((logits > own) | ((logits == own) & before), -1)
    new = {
      "loss": jnp.sum(jnp.where(mask, losses, 0.0)),
      "top1": jnp.sum(mask & (rank < 1)),
      "top5": jnp.sum(mask & (rank < 5)),
      "examples": jnp.sum(mask),
    }
    # Sums of booleans are int64 where JAX runs in 64 bits.
    return {
      name: totals[name] + value.astype(totals[name].dtype) for name, value in new.items()
    } | {"request": jnp.maximum(totals["request"], jnp.max(requests))}

  return eval_step
