"""The two functions that run on the devices: pure, to be jitted over the mesh."""

from typing import Any, Callable

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import optax

from trainer import augment
from trainer.state import TrainState

Batch = dict[str, jax.Array]

# One small vector a step is one transfer to the host instead of six.
METRICS = ("loss", "top1", "grad_norm", "param_norm", "learning_rate", "request")

# What a host may ask for at any step. The step takes the highest of all hosts, so that they agree without a word more.
NOTHING, SAVE, STOP = range(3)


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, schedule: optax.Schedule,
    config: ml_collections.ConfigDict) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
  """Returns train_step(state, batch, requests) -> (state, metrics).

  The batch holds `image` uint8 [N, S, S, 3] and `label` int32 [N]; metrics is float32 [len(METRICS)] in that order,
  over the whole global batch; requests is int32 [devices], what the host of each asks for. BN statistics are those of the global batch too: the mean over a sharded axis is a mean
  over all devices.
  """
  dtype = jnp.dtype(config.model.dtype)

  def loss_fn(params: Any, batch_stats: Any, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    model.train()
    logits = model(augment.normalize(batch["image"], config.data, dtype))
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), config.label_smoothing)
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    return loss, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

  def train_step(state: TrainState, batch: Batch, requests: jax.Array) -> tuple[TrainState, jax.Array]:
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, batch_stats)), grads = grad_fn(state.params, state.batch_stats, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      # While few steps are averaged the window grows with them, else the random start would linger (Adam's bias).
      decay = jnp.minimum(config.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))
      ema = optax.incremental_update({"params": params, "batch_stats": batch_stats}, ema, 1.0 - decay)
    metrics = jnp.stack([
        loss,
        jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
        optax.tree.norm(grads),
        optax.tree.norm(params),
        schedule(state.step),
        jnp.max(requests),
    ]).astype(jnp.float32)
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics

  return train_step


def make_eval_step(graphdef: nnx.GraphDef,
                   config: ml_collections.ConfigDict) -> Callable[[Any, Any, Batch, Batch, jax.Array], Batch]:
  """Returns eval_step(params, batch_stats, totals, batch, requests) -> totals.

  The batch holds `image` uint8 [N, S, S, 3], `label` int32 [N] and `mask` bool [N], False on padding. Totals are
  scalars over all real examples so far: `loss` float32 sum (no smoothing), `top1`, `top5`, `examples` int32 counts, and
  `request` int32, the highest request of any host.
  """
  dtype = jnp.dtype(config.model.dtype)

  def eval_step(params: Any, batch_stats: Any, totals: Batch, batch: Batch, requests: jax.Array) -> Batch:
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    model.eval()
    logits = model(augment.normalize(batch["image"], config.data, dtype))
    mask, labels = batch["mask"], batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = (best == labels[:, None]) & mask[:, None]
    return {
        "loss": totals["loss"] + jnp.sum(jnp.where(mask, losses, 0.0)),
        "top1": totals["top1"] + jnp.sum(hits[:, 0]),
        "top5": totals["top5"] + jnp.sum(hits),
        "examples": totals["examples"] + jnp.sum(mask),
        "request": jnp.maximum(totals["request"], jnp.max(requests)),
    }

  return eval_step
