"""The functions that run on the devices: pure, to be jitted over the mesh."""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from trainer import augment, averages, compiler, distill, finetune, losses, models
from trainer import mesh as mesh_lib
from trainer.models import family, layers, norm
from trainer.pod.requests import FAIL
from trainer.sparse import method as sparse_lib
from trainer.state import (
  BatchStats,
  Model,
  Params,
  TrainState,
  Tree,
  Variables,
  step_key,
)

# Arrays by name: image uint8 [N, S, S, 3], label int32 [N] and, in evaluation, mask bool [N].
Batch = dict[str, jax.Array]
# What an evaluation has counted so far, by name: see `make_eval_step`.
Totals = dict[str, jax.Array]

# One small vector a step is one transfer to the host instead of five.
METRICS = ("loss", "top1", "grad_norm", "param_norm", "learning_rate")


def _own_metrics(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Return the names of what the model and its teacher measure."""
  names = models.family_of(config.model).METRICS
  return (*names, *distill.METRICS) if config.distill.weight else names


def metric_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Return the names of what a step measures, in the order of `StepOutput.metrics`."""
  names = (*METRICS, *_own_metrics(config))
  return names if config.sparsity.name == "none" else (*names, *sparse_lib.METRICS)


class StepOutput(NamedTuple):
  """What a training step returns beside the state.

  Attributes:
    metrics: float32 [len(metric_names)], float64 if the model is; means over the global batch.
    request: int32, the highest request of any host; see trainer.pod.requests.
  """

  metrics: jax.Array
  request: jax.Array


# (state, batch, requests), and the weights of the teacher if there is one
TrainStep = Callable[..., tuple[TrainState, StepOutput]]
# (variables, totals, batch, requests), and which classes count if not all do
EvalStep = Callable[..., Totals]
# The statistics of every batch norm, and over how many batches they are, an int32 scalar.
Statistics = tuple[BatchStats, jax.Array]
StatisticsStep = Callable[[Variables, Statistics, Batch], Statistics]


class _Inputs(NamedTuple):
  """What the model and the loss get of a micro-batch.

  Attributes:
    images: [N, S, S, 3], normalised and augmented, in the dtype of the model; [N, S/2, S, 6] with
      row_pairs.
    targets: [N, classes], not smoothed.
    labels: int32 [N].
    key: of the randomness of the model.
  """

  images: jax.Array
  targets: jax.Array
  labels: jax.Array
  key: jax.Array


class _Sums(NamedTuple):
  """What is added up over micro-batches, each a mean over one of them.

  Attributes:
    loss: scalar; over several slices that of each example, added up.
    top1: a share, likewise.
    grads: as the parameters.
    own: scalars that the model and its teacher measure.
  """

  loss: jax.Array
  top1: jax.Array
  grads: Params
  own: dict[str, jax.Array]


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  ema_start: int = 0,
  augment_until: int | None = None,
  guarded: bool = False,
  sparse: sparse_lib.Sparse | None = None,
  teacher: distill.Teacher | None = None,
) -> TrainStep:
  """Return train_step(state, batch, requests) -> (state, output).

  Requests is int32 [devices], what the host of each device asks for. The metric top1 counts the
  examples whose highest logit is their own label, whatever else was mixed into them: with mixing it
  is far below that of evaluation.

  With `config.accumulation_steps` = A the batch is computed in A micro-batches, one after the
  other, and the gradient is their mean. Micro-batch a is the rows a, a + A, a + 2A and so on: every
  device splits its own rows, and which examples share a micro-batch does not depend on the number
  of devices. BN statistics are of groups within a micro-batch, and the running averages see the
  micro-batches in order.

  Args:
    model: the net, without its arrays.
    optimizer: of its parameters.
    schedule: the learning rate by steps taken, for the metrics.
    config: of the run.
    mesh: of all devices.
    ema_start: until so many steps are taken, averaged weights are copies.
    augment_until: images are augmented while fewer steps than that were taken; None is always.
    guarded: whether a step with FAIL of any host returns the state as it was given.
    sparse: which weights are zero, if not none: the state has masks, see trainer/sparse.
    teacher: its weights are a fourth argument, which is not donated; see trainer/distill.py.

  Raises:
    ValueError: one sentence, if `config.loss` or `config.augment` names what does not exist.
  """
  accumulation_steps = config.accumulation_steps
  average = averages.make_average(config, ema_start)
  loss_of = distill.make_loss(config, losses.make_loss(config.loss), mesh, teacher)
  inputs = augment.make_inputs(config, augment_until)
  frozen = config.optimizer.freeze
  for_micro_batches = functools.partial(
    models.family_of(config.model).for_micro_batches, fields=models.own_fields(config.model)
  )
  own_metrics = _own_metrics(config)
  # In a computation that sends to other slices the compiler of TPUs (libtpu 0.0.42) makes few
  # operations of several results, as of sums of batch norm beside a convolution. So nothing is sent
  # in the loop over micro-batches, which there is for a single one too, nor in the branch that
  # updates the state.
  apart = guarded and mesh_lib.crosses_slices(mesh)
  looped = accumulation_steps > 1 or apart

  def loss_fn(
    params: Params,
    statistics: Variables,
    teacher_weights: Variables | None,
    make: Callable[[], _Inputs],
    step: jax.Array,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict[str, jax.Array], Variables]]:
    made = make()
    params = finetune.stop_gradients(frozen, params)
    net = model.merge(statistics._replace(params=params), made.key)
    finetune.freeze_norms(frozen, net)
    family.set_steps_taken(net, step + 1)
    logits = net(made.images)
    targets = optax.smooth_labels(made.targets, config.label_smoothing)
    of_examples, measured = loss_of(logits, targets, made.images, teacher_weights)
    sown = family.reap(net)
    loss = sum(sown.losses, of_examples.mean())
    hits = jnp.argmax(logits, -1) == made.labels
    measured |= sown.metrics
    own = {name: measured[name] for name in own_metrics}
    statistics = model.variables(net)._replace(params={})
    if apart:  # else the sums over devices that means need would stay in the loop
      return loss, (sum(sown.losses, of_examples), hits.astype(logits.dtype), own, statistics)
    return loss, (loss, jnp.mean(hits, dtype=logits.dtype), own, statistics)

  def gradients(
    params: Params,
    statistics: Variables,
    teacher_weights: Variables | None,
    batch: Batch,
    step: jax.Array,
    shards: Tree,
  ) -> tuple[_Sums, norm.Joined, Tree]:
    """Return means over the batch, running averages, those of BN for each group, and the others."""
    in_loop, pull = params, lambda grads: (grads,)
    if looped:
      in_loop, pull = jax.vjp(
        lambda params: for_micro_batches(params, statistics.batch_stats), params
      )
      # Those of another form are not in shards.
      shards = jax.tree.map(
        lambda x, like, sharding: sharding if x.shape == like.shape else mesh_lib.replicated(mesh),
        *(in_loop, params, shards),
      )

    def inputs_of(batch: Batch, micro_batch: jax.Array | int) -> _Inputs:
      key_augment, key_model = jax.random.split(step_key(config.seed, step, micro_batch))
      return _Inputs(*inputs(key_augment, batch, step), batch["label"], key_model)

    def of_micro_batch(
      statistics: Variables, make: Callable[[], _Inputs]
    ) -> tuple[_Sums, Variables]:
      # Inputs are made within: before it, another order of operations would change the last bits of
      # every run.
      grads, (loss, top1, own, statistics) = jax.grad(loss_fn, has_aux=True)(
        in_loop, statistics, teacher_weights, make, step
      )
      # Left whole, the sum over devices is moved behind the loop over micro-batches by the compiler
      # of TPUs, if nothing lies between it and the sum over rounds; in shards it is scattered in
      # each round.
      return _Sums(loss, top1, mesh_lib.scatter(grads, shards), own), statistics

    def joined(new: Variables) -> tuple[norm.Joined, Tree]:
      return norm.join_groups(new.batch_stats, statistics.batch_stats), new.others

    if config.model.get("row_pairs", False):
      # As bytes, and before the loop: inside, the compiler would move pixels in float32.
      batch = batch | {"image": layers.row_pairs(batch["image"])}
    if not looped:
      total, new = of_micro_batch(statistics, lambda: inputs_of(batch, 0))
      return total, *joined(new)
    micro_batches = split(batch, accumulation_steps)
    # Of the only round they are made before the loop: bytes it would copy into the order of axes of
    # the first convolution.
    first = inputs_of(jax.tree.map(lambda x: x[0], micro_batches), 0)

    def of_first() -> tuple[_Sums, Variables]:
      return of_micro_batch(statistics, lambda: first)

    shapes, of_statistics = jax.eval_shape(of_first)
    if accumulation_steps == 1:

      def only_round(
        number: jax.Array, carry: tuple[_Sums, tuple[norm.Joined, Tree]]
      ) -> tuple[_Sums, tuple[norm.Joined, Tree]]:
        # Else the compiler would move what does not depend on the number out of the loop again.
        made, _ = jax.lax.optimization_barrier((first, number))
        sums, new = of_micro_batch(statistics, lambda: made)
        # The compiler moves sums over devices behind the loop only from where they are added up.
        total = jax.tree.map(lambda zero, x: zero + x.astype(zero.dtype), carry[0], sums)
        return total, joined(new)

      # One summand is kept without loss in the dtype in which it was computed, and crosses in that.
      dtypes, _ = compiler.before_widening(of_first)
      zeros = jax.tree.map(lambda x, dtype: jnp.zeros(x.shape, dtype), shapes, dtypes)
      unset = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(joined, of_statistics)
      )
      # It may not know either that there is one round.
      rounds = jnp.where(step < 0, 0, 1)
      with compiler.one_round():
        total, (batch_stats, others) = jax.lax.fori_loop(0, rounds, only_round, (zeros, unset))
    else:

      def accumulate(
        carry: tuple[_Sums, Variables], micro_batch: tuple[Batch, jax.Array]
      ) -> tuple[tuple[_Sums, Variables], None]:
        total, statistics = carry
        sums, statistics = of_micro_batch(statistics, lambda: inputs_of(*micro_batch))
        return (jax.tree.map(jnp.add, total, sums), statistics), None

      # Averages start the same in all groups; the mean over groups may wait until the last
      # micro-batch, being linear.
      start = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        jax.tree.map(norm.for_groups, statistics, of_statistics),
      )
      numbers = jnp.arange(accumulation_steps)
      (total, new), _ = jax.lax.scan(accumulate, start, (micro_batches, numbers))
      batch_stats, others = joined(new)
    total = jax.tree.map(lambda x, like: x.astype(like.dtype) / accumulation_steps, total, shapes)
    (grads,) = pull(total.grads)
    if apart:
      total = total._replace(loss=jnp.mean(total.loss), top1=jnp.mean(total.top1))
    return total._replace(grads=grads), batch_stats, others

  def train_step(
    state: TrainState, batch: Batch, requests: jax.Array, teacher_weights: Variables | None = None
  ) -> tuple[TrainState, StepOutput]:
    # Parameters are whole where they meet activations, and in shards where they are updated
    # (sharding_rules). Said at both places, the compiler gathers and scatters parameters, and never
    # splits a convolution by channel.
    shards = mesh_lib.state_shardings(config, mesh, {"opt_state": state.params})["opt_state"]
    whole = jax.lax.with_sharding_constraint(state.params, mesh_lib.replicated(mesh))
    statistics = Variables({}, state.batch_stats, state.others)
    (loss, top1, grads, own), averages_of_groups, others = gradients(
      whole, statistics, teacher_weights, batch, state.step, shards
    )
    batch_stats = norm.average_groups(averages_of_groups, state.batch_stats)
    if apart:  # else the compiler would move sums over devices into the branch below
      loss, top1, own, batch_stats = jax.lax.optimization_barrier((loss, top1, own, batch_stats))
    # In the shards of the update, so that the compiler joins a guard with that.
    old = dataclasses.replace(state, params=jax.lax.with_sharding_constraint(state.params, shards))

    def update() -> tuple[TrainState, jax.Array]:
      masks: Tree = None
      more: list[jax.Array] = []
      mean = grads
      if sparse is None:
        updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
        params = optax.apply_updates(old.params, updates)
      else:
        mean, params, opt_state, masks, more = sparse.step(optimizer, grads, old.params, state)
      ema = state.ema
      if ema is not None:
        ema = average(ema, params, batch_stats, state.step)
        if sparse is not None:
          ema = sparse.mask_averages(ema, masks, state.step)
      means = [loss, top1, optax.tree.norm(mean), optax.tree.norm(params), schedule(state.step)]
      metrics = jnp.stack([*means, *(own[name] for name in own_metrics), *more])
      new = TrainState(state.step + 1, params, batch_stats, others, opt_state, ema, masks)
      return new, metrics.astype(loss.dtype)

    if apart:
      nothing = old, jnp.zeros(len(metric_names(config)), loss.dtype)
      new, metrics = jax.lax.cond(jnp.max(requests) >= FAIL, lambda: nothing, update)
    else:
      new, metrics = update()
    request = jnp.max(requests)
    if guarded and not apart:
      new = jax.tree.map(lambda x, y: jnp.where(request >= FAIL, x, y), old, new)
    return new, StepOutput(metrics, request)

  return train_step


def split(batch: Batch, parts: int) -> Batch:
  """Return the micro-batches of a batch, [parts, N / parts, ...]: part a has the rows a::parts."""
  return {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def make_eval_step(model: Model, config: ml_collections.ConfigDict, mesh: Mesh) -> EvalStep:
  """Return eval_step(variables, totals, batch, requests, allowed=None) -> totals.

  The mask of the batch is False on padding. With `config.eval.flip` the logits are the mean of
  those of the image and of its mirror. With `allowed`, bool [classes], the logits of other classes
  do not count. Totals are over all real examples so far:

    loss                      float32 sum of the cross entropy, without smoothing
    top1, top5, examples      int32 counts
    request                   int32, the highest request of any host
    confusion                 int32 [classes, classes] by label and highest logit, if it is given
    real_top1, real_examples  int32 counts, if the batch has `accepted`, bool [N, classes]; see
                              trainer/real_labels.py
  """
  dtype = jnp.dtype(config.model.dtype)

  def eval_step(
    variables: Variables,
    totals: Totals,
    batch: Batch,
    requests: jax.Array,
    allowed: jax.Array | None = None,
  ) -> Totals:
    whole = jax.lax.with_sharding_constraint(variables.params, mesh_lib.replicated(mesh))
    net = model.merge(variables._replace(params=whole), None)
    images = augment.normalize(batch["image"], config.data, dtype)
    logits = net(images)
    if config.eval.flip:
      logits = (logits + net(images[:, :, ::-1])) / 2
    if allowed is not None:
      logits = jnp.where(allowed, logits, -jnp.inf)
    mask, labels = batch["mask"], batch["label"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # How many classes come before the right one, equal logits in the order of classes. For a sort
    # the compiler would bring all logits to every device.
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & before), -1)
    new = {
      "loss": jnp.sum(jnp.where(mask, cross_entropy, 0.0)),
      "top1": jnp.sum(mask & (rank < 1)),
      "top5": jnp.sum(mask & (rank < 5)),
      "examples": jnp.sum(mask),
    }
    if "accepted" in batch:
      accepted = batch["accepted"]
      hit = jnp.take_along_axis(accepted, jnp.argmax(logits, -1)[:, None], 1)[:, 0]
      new["real_top1"] = jnp.sum(mask & hit)
      new["real_examples"] = jnp.sum(mask & jnp.any(accepted, -1))
    if "confusion" in totals:
      # Zeros and ones, whose products are exact in any precision and their sums in float32.
      classes = logits.shape[-1]
      own_class = jax.nn.one_hot(labels, classes) * mask[:, None]
      new["confusion"] = own_class.T @ jax.nn.one_hot(jnp.argmax(logits, -1), classes)
    # Sums of booleans are int64 where JAX runs in 64 bits.
    return {
      name: totals[name] + value.astype(totals[name].dtype) for name, value in new.items()
    } | {"request": jnp.maximum(totals["request"], jnp.max(requests))}

  return eval_step


def make_statistics_step(
  model: Model, config: ml_collections.ConfigDict, mesh: Mesh
) -> StatisticsStep:
  """Return statistics_step(variables, (batch_stats, count), batch) -> (batch_stats, count + 1).

  The model computes as in evaluation, but each batch norm with the moments of its batch. What comes
  out are the moments over all examples of the batches so far; with a count of 0 those that come in
  have no weight.
  """
  dtype = jnp.dtype(config.model.dtype)

  def statistics_step(variables: Variables, so_far: Statistics, batch: Batch) -> Statistics:
    whole = jax.lax.with_sharding_constraint(variables.params, mesh_lib.replicated(mesh))
    net = model.merge(variables._replace(params=whole), None)
    norm.use_batch(net)
    net(augment.normalize(batch["image"], config.data, dtype))
    batch_stats, count = so_far
    new = model.variables(net).batch_stats
    return norm.merge_moments(batch_stats, new, count), count + 1

  return statistics_step
